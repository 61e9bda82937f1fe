"""Requests of the HTTP server: their fields, their pictures, and the errors that refuse them."""

import base64
import binascii
from collections.abc import Collection
from typing import Annotated, Any, Literal

from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

from .fetch import fetch
from .image_processing_unitok import load_image, picture_size


PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PICTURES = 16
MAX_PIXELS = 50_000_000  # of all pictures of a request
MAX_SIDE = 1024  # that pictures are shrunk to


def needs_stream(value: Any, info: ValidationInfo) -> Any:
    """A field that says something about a stream; `stream` stands before it."""
    if value and not info.data.get("stream"):
        raise ValueError("goes with stream: true alone")
    return value


def needs_no_stream(value: int | None, info: ValidationInfo) -> int | None:
    """Check candidates, of which the best is known when all are drawn; `stream` stands before them."""
    if (value or 1) > 1 and info.data.get("stream"):
        raise ValueError("goes without stream alone: which drawing is the best is known at the end")
    return value


Temperature = Annotated[float | None, Field(ge=0, le=100)]
Share = Annotated[float | None, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, le=64)]
StreamOptions = Annotated[
    dict[Literal["include_usage", "include_obfuscation"], bool] | None, AfterValidator(needs_stream)
]
Seed = Annotated[int | None, Field(ge=0, lt=2**31)]


class APIError(Exception):
    """What a client gets: a status, a message and the field that it is about."""

    def __init__(self, status: int, message: str, field: str | None = None):
        super().__init__(message)
        self.status, self.field = status, field

    def response(self) -> JSONResponse:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        kind = "server_error" if self.status >= 500 else kind
        error = {"message": str(self), "type": kind, "param": self.field, "code": None}
        headers = {"Retry-After": "5"} if self.status == 429 else None
        return JSONResponse({"error": error}, self.status, headers)


class Strict(BaseModel):
    """The fields of a request. Others are refused: an option that is passed over in silence would be missed later."""

    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    user: str | None = None  # identifies somebody elsewhere; not looked at


class TextOptions(Strict):
    """What chats and completions have in common. `top_k`, `repetition_penalty`: as in transformers."""

    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Temperature = None
    top_p: Share = None
    top_k: Annotated[int | None, Field(ge=0)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0)] = None
    seed: Seed = None
    n: Count = 1
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions = None

    def generation(self) -> dict:
        """The arguments of `generate`; at temperature 0, and where none of the three options is given, greedy."""
        given = {n: v for n in ("temperature", "top_p", "top_k") if (v := getattr(self, n)) is not None}
        is_greedy = not given or self.temperature == 0
        options = {"do_sample": False} if is_greedy else {"do_sample": True, **given}
        if self.repetition_penalty is not None:
            options["repetition_penalty"] = self.repetition_penalty
        return options

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatRequest(TextOptions):
    """https://platform.openai.com/docs/api-reference/chat/create

    `modalities` with "image": the answer may hold images, which come as the message's `images`.
    """

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    modalities: list[Literal["text", "image"]] = ["text"]
    guidance: float | None = None


class CompletionRequest(TextOptions):
    """https://platform.openai.com/docs/api-reference/completions/create"""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=64)]


class ImageRequest(Strict):
    """https://platform.openai.com/docs/api-reference/images/create

    `guidance`, `temperature`, `top_k`, `top_p`, `seed`: of the drawing; what is left out is as the model has it.
    """

    prompt: Annotated[str, Field(min_length=1)]
    n: Count = 1
    size: str | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=64), AfterValidator(needs_stream)] = 0
    candidates: Annotated[int | None, Field(ge=1, le=64), AfterValidator(needs_no_stream)] = None
    seed: Seed = None
    guidance: float | None = None
    image_guidance: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def drawing(self) -> dict:
        """The arguments of `generate_image_codes`; at temperature 0 the likeliest codes."""
        options = {"guidance_scale": self.guidance, "image_guidance_scale": self.image_guidance, "seed": self.seed}
        options |= {"top_k": self.top_k, "top_p": self.top_p}
        options |= {"do_sample": False} if self.temperature == 0 else {"temperature": self.temperature}
        return {name: value for name, value in options.items() if value is not None}


class EmbeddingRequest(Strict):
    """https://platform.openai.com/docs/api-reference/embeddings/create, of texts and of images (data URLs)."""

    input: str | Annotated[list[str], Field(min_length=1, max_length=MAX_PICTURES)]
    encoding_format: Literal["float", "base64"] = "float"


class Pictures:
    """The pictures of one request: counted, measured by their headers, then decoded.

    Args:
        url_hosts: where they may be fetched from.
    """

    def __init__(self, url_hosts: Collection[str]):
        self.url_hosts = url_hosts
        self.pictures: list[Image.Image] = []
        self.num_pixels = 0

    def add(self, data: bytes) -> Image.Image:
        """
        Raises:
            APIError: too many, too large, or no picture.
        """
        try:
            if len(self.pictures) == MAX_PICTURES:
                raise ValueError(f"{MAX_PICTURES} pictures are the most in one request")
            width, height = picture_size(data, formats=PICTURE_FORMATS)
            self.num_pixels += width * height
            if self.num_pixels > MAX_PIXELS:
                raise ValueError(f"{MAX_PIXELS / 1e6:.0f} million pixels are the most in one request")
            self.pictures.append(load_image(data, formats=PICTURE_FORMATS, max_side=MAX_SIDE))
        except ValueError as error:
            raise APIError(400, str(error), "image") from error
        return self.pictures[-1]

    def add_url(self, url: str) -> Image.Image:
        """The picture of a data URL, or of one of the hosts that are allowed."""
        if self.url_hosts and url.startswith(("http://", "https://")):
            try:
                data = fetch(url, self.url_hosts)
            except ValueError as error:
                raise APIError(400, str(error), "image") from error
            return self.add(data)
        head, comma, body = url.partition(",")
        if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
            raise APIError(400, "an image must be a data URL, data:image/...;base64,...: no other is fetched", "image")
        try:
            return self.add(base64.b64decode(body, validate=True))
        except binascii.Error as error:
            raise APIError(400, f"an image's base64 cannot be read: {error}", "image") from error
