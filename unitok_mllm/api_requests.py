"""Requests to the HTTP server: their fields, their pictures, and the errors with which they are refused."""

import base64
import binascii
from collections.abc import Collection
from typing import Annotated, Any, Literal

from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from .fetch import fetch
from .image_processing_unitok import load_image, picture_size


PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PICTURES = 16
MAX_PIXELS = 50_000_000  # of all pictures in a request
MAX_SIDE = 1024  # pixels; larger pictures are shrunk to it


def needs_stream(value: Any, info: ValidationInfo) -> Any:
    """Check a field that applies only to streams. The field `stream` must be declared before it."""
    if value and not info.data.get("stream"):
        raise ValueError("requires stream: true")
    return value


def needs_no_stream(value: int | None, info: ValidationInfo) -> int | None:
    """Check that several candidates are not streamed: they are ranked only once all are drawn.

    The field `stream` must be declared before `candidates`.
    """
    if (value or 1) > 1 and info.data.get("stream"):
        raise ValueError("cannot be combined with stream: the best drawing is known only at the end")
    return value


Temperature = Annotated[float | None, Field(ge=0, le=100)]
Share = Annotated[float | None, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, le=64)]
StreamOptions = Annotated[
    dict[Literal["include_usage", "include_obfuscation"], bool] | None, AfterValidator(needs_stream)
]
Seed = Annotated[int | None, Field(ge=0, lt=2**31)]


class APIError(Exception):
    """An error that the client receives.

    Args:
        status: HTTP status.
        message: text of the error.
        field: name of the request's field that caused it, if any.
    """

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
    """Fields that all requests have. Unknown fields are errors, so that no option is silently ignored."""

    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    user: str | None = None  # part of OpenAI's API; ignored


class TextOptions(Strict):
    """Options of chats and completions. `top_k` and `repetition_penalty` are extensions, as in transformers."""

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
        """Return the arguments of `generate`.

        Decoding is greedy at temperature 0, and if none of `temperature`, `top_p` and `top_k` is given.
        """
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
    """Body of a chat request, https://platform.openai.com/docs/api-reference/chat/create.

    With "image" in `modalities`, the answer may contain images, which are returned in the message's `images`.
    `guidance` is the guidance scale of these images.

    With `choices`, the answer is the likeliest of these, or with `by_length` that of the highest mean log-likelihood of
    a token. The options of generation do not apply.
    """

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    modalities: list[Literal["text", "image"]] = ["text"]
    guidance: float | None = None
    choices: Annotated[list[str], Field(min_length=1, max_length=64)] | None = None
    by_length: bool = False

    @model_validator(mode="after")
    def check_choices(self) -> "ChatRequest":
        if self.choices is None:
            if self.by_length:
                raise ValueError("by_length requires choices")
            return self
        for name in self.model_fields_set - {"model", "user", "messages", "choices", "by_length"}:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"choices cannot be combined with {name}: the likeliest of them is the answer")
        return self


class CompletionRequest(TextOptions):
    """Body of a completion request, https://platform.openai.com/docs/api-reference/completions/create."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=64)]


class ImageRequest(Strict):
    """Body of a request for images, https://platform.openai.com/docs/api-reference/images/create.

    `guidance`, `image_guidance`, `plausibility`, `temperature`, `top_k`, `top_p` and `seed` are extensions, see
    `generate_image_codes`. The model's own values are the defaults.
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
    plausibility: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def drawing(self) -> dict:
        """Return the arguments of `generate_image_codes`; temperature 0 means greedy decoding."""
        options = {"guidance_scale": self.guidance, "image_guidance_scale": self.image_guidance, "seed": self.seed}
        options |= {"plausibility": self.plausibility, "top_k": self.top_k, "top_p": self.top_p}
        options |= {"do_sample": False} if self.temperature == 0 else {"temperature": self.temperature}
        return {name: value for name, value in options.items() if value is not None}


class EmbeddingRequest(Strict):
    """Body of a request for embeddings, https://platform.openai.com/docs/api-reference/embeddings/create.

    Each input is a text or the data URL of an image.
    """

    input: str | Annotated[list[str], Field(min_length=1, max_length=MAX_PICTURES)]
    encoding_format: Literal["float", "base64"] = "float"


class Pictures:
    """The pictures of one request. Their number and total size are checked before a picture is decoded.

    Args:
        url_hosts: hosts from which pictures may be fetched.
    """

    def __init__(self, url_hosts: Collection[str]):
        self.url_hosts = url_hosts
        self.pictures: list[Image.Image] = []
        self.num_pixels = 0

    def add(self, data: bytes) -> Image.Image:
        """Check and decode the bytes of a picture file.

        Raises:
            APIError: there are too many pictures or pixels, or the file is not a readable picture.
        """
        try:
            if len(self.pictures) == MAX_PICTURES:
                raise ValueError(f"a request may have at most {MAX_PICTURES} pictures")
            width, height = picture_size(data, formats=PICTURE_FORMATS)
            self.num_pixels += width * height
            if self.num_pixels > MAX_PIXELS:
                raise ValueError(
                    f"the pictures of a request may have at most {MAX_PIXELS / 1e6:.0f} million pixels in all"
                )
            self.pictures.append(load_image(data, formats=PICTURE_FORMATS, max_side=MAX_SIDE))
        except ValueError as error:
            raise APIError(400, str(error), "image") from error
        return self.pictures[-1]

    def add_url(self, url: str) -> Image.Image:
        """Add the picture of a data URL, or fetch it from one of the allowed hosts.

        Raises:
            APIError: the URL is neither, the picture cannot be fetched, or see `add`.
        """
        if self.url_hosts and url.startswith(("http://", "https://")):
            try:
                data = fetch(url, self.url_hosts)
            except ValueError as error:
                raise APIError(400, str(error), "image") from error
            return self.add(data)
        head, comma, body = url.partition(",")
        if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
            raise APIError(
                400, "an image must be a data URL, data:image/...;base64,...; other URLs are not fetched", "image"
            )
        try:
            return self.add(base64.b64decode(body, validate=True))
        except binascii.Error as error:
            raise APIError(400, f"an image's base64 cannot be read: {error}", "image") from error
