"""An HTTP server with OpenAI's API over the engine: chat about pictures, completions, images, embeddings of images.

Requests carry what they are about; nothing of them is kept or logged but counts and times. What this model cannot do, or an
option that it does not know, is refused by name, in the API's own form of an error.
"""

import asyncio
import base64
import binascii
import hmac
import json
import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Collection
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from .fetch import fetch
from .guard import Guard, Refused, own_hosts
from .image_processing_unitok import load_image, picture_size
from .inference import picture_bytes
from .serving import QueueFull, UniTokEngine


PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PICTURES = 16
MAX_PIXELS = 50_000_000  # of all pictures of a request
MAX_SIDE = 1024  # that pictures are shrunk to
MAX_TOKENS = 256  # of an answer, where a request does not say, and there is room
ROUTES = (
    r"GET /(health|metrics|v1/models)",
    r"GET /v1/models/[^/]+",
    r"POST /v1/(chat/completions|completions|embeddings|images/generations|images/edits)",
)
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # seconds

Temperature = Annotated[float | None, Field(ge=0, le=100)]
Share = Annotated[float | None, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, le=64)]
Seed = Annotated[int | None, Field(ge=0, lt=2**31)]


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
    stream_options: dict[Literal["include_usage", "include_obfuscation"], bool] | None = None

    def generation(self) -> dict:
        """The arguments of `generate`; without a temperature, and at temperature 0, the likeliest tokens."""
        options = {"do_sample": bool(self.temperature)}
        if self.temperature:
            options["temperature"] = self.temperature
            options |= {n: v for n in ("top_p", "top_k") if (v := getattr(self, n)) is not None}
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
    partial_images: Annotated[int, Field(ge=0, le=64)] = 0
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
    """https://platform.openai.com/docs/api-reference/embeddings/create, of images (data URLs) in the place of texts."""

    input: str | Annotated[list[str], Field(min_length=1, max_length=MAX_PICTURES)]
    encoding_format: Literal["float", "base64"] = "float"


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


class Metrics:
    """Counts and times in Prometheus's text format."""

    def __init__(self, engine: UniTokEngine):
        self.engine, self.lock = engine, threading.Lock()
        self.requests: Counter[tuple[str, int]] = Counter()
        self.times: dict[str, list[int]] = {}
        self.sums: Counter[str] = Counter()

    def observe(self, name: str, seconds: float) -> None:
        with self.lock:
            counts = self.times.setdefault(name, [0] * (len(BUCKETS) + 1))
            counts[next((i for i, bound in enumerate(BUCKETS) if seconds <= bound), len(BUCKETS))] += 1
            self.sums[name] += seconds

    def text(self) -> str:
        engine = self.engine
        lines = []
        for name, kind, value in (
            ("requests_waiting", "gauge", engine.num_waiting),
            ("requests_running", "gauge", engine.num_running),
            ("steps_total", "counter", engine.num_steps),
            ("rows_total", "counter", engine.num_rows_computed),
            ("positions_reused_total", "counter", engine.num_positions_reused),
        ):
            lines += [f"# TYPE unitok_{name} {kind}", f"unitok_{name} {value}"]
        with self.lock:
            lines.append("# TYPE unitok_responses_total counter")
            for (path, status), count in sorted(self.requests.items()):
                lines.append(f'unitok_responses_total{{path="{path}",status="{status}"}} {count}')
            for name, counts in sorted(self.times.items()):
                lines.append(f"# TYPE unitok_{name}_seconds histogram")
                total = 0
                for bound, count in zip((*BUCKETS, "+Inf"), counts):
                    total += count
                    lines.append(f'unitok_{name}_seconds_bucket{{le="{bound}"}} {total}')
                lines += [f"unitok_{name}_seconds_sum {self.sums[name]}", f"unitok_{name}_seconds_count {total}"]
        return "\n".join(lines) + "\n"


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


def encode_png(image: Image.Image) -> str:
    return base64.b64encode(picture_bytes(image)).decode()


class Service:
    """What the endpoints do with a model, a processor and an engine."""

    def __init__(self, engine: UniTokEngine, processor, name: str, url_hosts: Collection[str]):
        self.engine, self.processor, self.name, self.url_hosts = engine, processor, name, url_hosts
        self.model, self.metrics, self.created = engine.model, Metrics(engine), int(time.time())

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise APIError(404, f"there is no model {name!r}, only {self.name!r}", "model")

    def conversation(self, messages: list[dict]) -> list[dict]:
        """The processor's conversation of the API's, pictures decoded."""
        pictures, turns = Pictures(self.url_hosts), []
        for message in messages:
            role, content = message.get("role"), message.get("content")
            if foreign := message.keys() - {"role", "content", "name", "images", "refusal"}:
                raise APIError(400, f"a message has no {min(foreign)!r} here", "messages")
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
                raise APIError(400, "a message's content must be a text or a list of parts", "messages")
            turns.append({"role": role, "content": [self._part(part, pictures) for part in parts]})
            for part in message.get("images") or []:  # of an answer of ours, sent back
                turns[-1]["content"].append(self._part(part, pictures))
        return turns

    @staticmethod
    def _part(part: dict, pictures: Pictures) -> dict:
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            return {"type": "text", "text": part["text"]}
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        if kind == "image_url" and isinstance(url, str):
            return {"type": "image", "image": pictures.add_url(url)}
        raise APIError(400, f"a part must be a text or an image_url, got {str(kind)[:50]!r}", "messages")

    def pixels(self, codes: torch.Tensor) -> Image.Image:
        """(K, L), or fewer positions: the rest is drawn with the last ones' codes."""
        missing = self.model.config.num_image_positions - codes.shape[1]
        codes = torch.cat([codes, codes[:, -1:].expand(-1, missing)], dim=1)
        with torch.inference_mode():
            pixels = self.model.decode_images(codes[None])
        return self.processor.post_process_multimodal_output(pixels, generation_mode="image")[0]


async def of_engine(call, *args, **options):
    """A call into the engine, or into the model, in a thread; its errors become the API's."""
    try:
        return await asyncio.to_thread(call, *args, **options)
    except QueueFull as error:
        raise APIError(429, str(error)) from error
    except (ValueError, TypeError) as error:
        raise APIError(400, str(error)) from error


class Stream:
    """What the engine tells in its thread, for a coroutine: items, then the end of the future."""

    def __init__(self):
        self.loop, self.queue = asyncio.get_running_loop(), asyncio.Queue()

    def tell(self, item) -> None:
        self.loop.call_soon_threadsafe(self.queue.put_nowait, item)

    def end_with(self, future: Future) -> None:
        future.add_done_callback(lambda future: self.loop.call_soon_threadsafe(self.queue.put_nowait, future))

    async def __aiter__(self) -> AsyncIterator:
        while not isinstance(item := await self.queue.get(), Future):
            yield item


async def results(request: Request, futures: list[Future]) -> list:
    """The results of all; they are cancelled when the client has gone."""

    has_left = False

    async def watch() -> None:
        nonlocal has_left
        while not await request.is_disconnected():
            await asyncio.sleep(0.2)
        has_left = True
        for future in futures:
            future.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await asyncio.gather(*map(asyncio.wrap_future, futures))
    except asyncio.CancelledError as error:
        if not has_left:  # the time is up
            raise
        raise APIError(499, "the client has gone") from error
    finally:
        watcher.cancel()
        for future in futures:
            future.cancel()


def sse(events: AsyncIterator[dict], futures: list[Future]) -> StreamingResponse:
    """Events as they come; the futures are cancelled when the client has gone."""

    async def lines() -> AsyncIterator[str]:
        try:
            async for event in events:
                kind = f"event: {event['type']}\n" if "type" in event else ""
                yield f"{kind}data: {json.dumps(event)}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            for future in futures:
                future.cancel()

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


class TextPieces:
    """The text of tokens as they come: whole characters, up to the first of the stop texts."""

    def __init__(self, tokenizer, stops: list[str]):
        self.tokenizer, self.stops = tokenizer, stops
        self.ids: list[int] = []
        self.sent, self.is_over = "", False

    def add(self, token: int | None) -> str:
        """What the token adds; None: what had been held back, at the end."""
        if token is not None:
            self.ids.append(token)
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if places := [place for stop in self.stops if (place := text.find(stop)) >= 0]:
            text, self.is_over = text[: min(places)], True
        elif token is not None:
            held = max((len(stop) for stop in self.stops), default=1) - 1
            if text.endswith("\ufffd"):
                return ""
            text = text[: len(text) - held] if held else text
        new, self.sent = text[len(self.sent) :], max(text, self.sent, key=len)
        return new


def create_app(
    engine: UniTokEngine,
    processor,
    name: str,
    api_key: str | None = None,
    hosts: set[str] | None = None,
    further_hosts: set[str] = frozenset(),
    max_body: int = 32 * 2**20,
    timeout: float = 600,
    url_hosts: Collection[str] = (),
) -> Guard:
    """The ASGI application.

    Args:
        engine, processor: of one model; the engine's thread is started and stopped with the application.
        name: of the model, for clients.
        api_key: that clients must send; None to let anybody in.
        hosts, further_hosts: names by which it is reached, see `guard`; by default those of this machine alone.
        max_body: bytes of a request.
        timeout: seconds that a request may take.
        url_hosts: where pictures may be fetched from, see `fetch`.
    """
    service = Service(engine, processor, name, url_hosts)
    thread = threading.Thread(target=engine.run, name="engine", daemon=True)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        thread.start()
        yield
        engine.stop()
        await asyncio.to_thread(thread.join)  # finishes what is under way

    app = FastAPI(title="unitok_mllm", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(APIError)
    async def of_api(request: Request, error: APIError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> JSONResponse:
        return APIError(error.status_code, str(error.detail)).response()

    @app.exception_handler(RequestValidationError)
    async def of_fields(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        places = [str(place) for place in first["loc"] if place != "body"]
        return APIError(400, f"{'.'.join(places) or 'body'}: {first['msg']}", places[0] if places else None).response()

    @app.exception_handler(Exception)
    async def of_all(request: Request, error: Exception) -> JSONResponse:
        return APIError(500, "the request failed").response()

    @app.get("/health")
    async def health() -> dict:
        if not thread.is_alive():
            raise APIError(503, "the engine has ended")
        return {"status": "ok", "running": engine.num_running, "waiting": engine.num_waiting}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    def described() -> dict:
        return {"id": service.name, "object": "model", "created": service.created, "owned_by": "unitok_mllm"}

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [described()]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict:
        service.check_model(name)
        return described()

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        service.check_model(body.model)
        conversation = await of_engine(service.conversation, body.messages)
        body.max_tokens = body.max_completion_tokens or body.max_tokens
        with_images = "image" in body.modalities
        inputs = await of_engine(
            service.processor.apply_chat_template,
            conversation,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"generation_mode": "interleaved"} if with_images else {},
        )
        answers = Answers(service, body, "chat.completion", "chatcmpl")
        return await answers.respond(request, [inputs] * body.n, with_images)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.check_model(body.model)
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        inputs = [await of_engine(service.processor, text=prompt, sanitize_control_tokens=True) for prompt in prompts]
        answers = Answers(service, body, "text_completion", "cmpl")
        return await answers.respond(request, [one for one in inputs for _ in range(body.n)], False)

    @app.post("/v1/images/generations")
    async def generations(body: ImageRequest, request: Request) -> Response:
        return await draw(body, request, None)

    @app.post("/v1/images/edits")
    async def edits(request: Request) -> Response:
        async with request.form(max_files=MAX_PICTURES, max_fields=32, max_part_size=2**16) as form:
            fields = {name: value for name, value in form.multi_items() if not isinstance(value, UploadFile)}
            files = [(name, value) for name, value in form.multi_items() if isinstance(value, UploadFile)]
            if foreign := [name for name, _ in files if name not in ("image", "image[]")]:
                raise APIError(400, f"{foreign[0]}: a picture is given as 'image'", foreign[0])
            if not files:
                raise APIError(400, "image: Field required", "image")
            data = [await file.read() for _, file in files]
        try:
            body = ImageRequest.model_validate(fields)
        except ValueError as error:
            raise RequestValidationError(error.errors()) from error
        pictures = Pictures(url_hosts)
        return await draw(body, request, [await of_engine(pictures.add, one) for one in data])

    async def draw(body: ImageRequest, request: Request, pictures: list[Image.Image] | None) -> Response:
        service.check_model(body.model)
        config = service.model.config.visual_config.vision_config
        size = f"{config.image_size}x{config.image_size}"
        if body.size not in (None, "auto", size):
            raise APIError(400, f"size: this model draws {size}, got {body.size!r}", "size")
        options = {"generation_mode": "image" if pictures is None else "edit"}
        if pictures is not None:
            options["images"] = [pictures]
        inputs = await of_engine(service.processor, text=[body.prompt], **options)
        drawing, is_edit = body.drawing(), pictures is not None
        if body.n > 1 and "seed" not in drawing:
            drawing["seed"] = int(torch.randint(2**31, ()))
        stream = Stream()
        futures = [
            await of_engine(
                engine.draw,
                inputs,
                (lambda codes, j=j: stream.tell((j, codes))) if body.stream else None,
                sample=j,
                **drawing,
            )
            for j in range(body.n)
        ]
        if not body.stream:
            drawn = [
                {"b64_json": encode_png(await of_engine(service.pixels, codes))}
                for codes in await results(request, futures)
            ]
            return JSONResponse({"created": int(time.time()), "data": drawn, "size": size, "output_format": "png"})
        for future in futures:
            stream.end_with(future)
        return sse(image_events(service, stream, futures, body.partial_images, is_edit), futures)

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest) -> Response:
        service.check_model(body.model)
        urls = [body.input] if isinstance(body.input, str) else body.input
        if not all(url.startswith("data:") for url in urls):
            raise APIError(400, "input: images as data URLs; this folder has no tokenizer for the text tower", "input")
        pictures = Pictures(url_hosts)
        images = [await of_engine(pictures.add_url, url) for url in urls]

        def embed() -> torch.Tensor:
            pixels = service.processor.image_processor(images, return_tensors="pt")["pixel_values"]
            with torch.inference_mode():
                return service.model.visual.get_image_features(pixels.to(engine.model.device)).pooler_output.float()

        rows = (await of_engine(embed)).cpu()
        packed = body.encoding_format == "base64"
        data = [
            {
                "object": "embedding",
                "index": i,
                "embedding": base64.b64encode(row.numpy().tobytes()).decode() if packed else row.tolist(),
            }
            for i, row in enumerate(rows)
        ]
        usage = {"prompt_tokens": 0, "total_tokens": 0}
        return JSONResponse({"object": "list", "data": data, "model": service.name, "usage": usage})

    hosts = own_hosts("127.0.0.1") if hosts is None else hosts
    front = Front(app, service.metrics, api_key, timeout)
    return Guard(front, hosts, set(further_hosts), ROUTES, max_body, None, None, refusal)


def refusal(refused: Refused) -> tuple[str, str]:
    """The guard's refusals in the API's form of an error."""
    return "application/json", APIError(refused.status, str(refused)).response().body.decode()


class Front:
    """ASGI middleware: asks for the key, counts and times the responses, and ends what takes longer than `timeout`."""

    def __init__(self, app, metrics: Metrics, api_key: str | None, timeout: float):
        self.app, self.metrics, self.timeout = app, metrics, timeout
        self.api_key = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        start, status = time.monotonic(), None

        async def watched(message: dict) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if self.api_key is not None and not hmac.compare_digest(given, self.api_key):
                await APIError(401, "the API key is missing or wrong").response()(scope, receive, watched)
                return
            async with asyncio.timeout(self.timeout):
                await self.app(scope, receive, watched)
        except TimeoutError:
            if status is None:
                error = APIError(504, f"the request took longer than {self.timeout:g} seconds")
                await error.response()(scope, receive, watched)
        finally:
            self.metrics.observe("response", time.monotonic() - start)
            with self.metrics.lock:
                self.metrics.requests["/".join(scope["path"].split("/")[2:4]), status] += 1


class Answers:
    """Answers to chats and completions, whole or as a stream."""

    def __init__(self, service: Service, body: TextOptions, kind: str, prefix: str):
        self.service, self.body, self.kind = service, body, kind
        self.is_chat = kind == "chat.completion"
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}

    async def respond(self, request: Request, prompts: list[dict], with_images: bool) -> Response:
        """
        Args:
            prompts: inputs of the engine, one for each answer.
        """
        body, engine, stream = self.body, self.service.engine, Stream()
        options, call = body.generation(), engine.answer
        if with_images:
            call = engine.interleaved
            options["image_options"] = {} if body.guidance is None else {"guidance_scale": body.guidance}
        elif getattr(body, "guidance", None) is not None:
            raise APIError(400, 'guidance: is about images, ask for them by modalities=["text", "image"]', "guidance")
        if body.stops:
            options |= {"stop_strings": body.stops, "tokenizer": self.service.processor.tokenizer}
        seed = body.seed
        if seed is None and options["do_sample"]:
            seed = int(torch.randint(2**31, ()))
        futures = []
        for index, inputs in enumerate(prompts):
            tell = (lambda item, index=index: stream.tell((index, item))) if body.stream else None
            of_answer = None if seed is None else seed + index
            room = engine.max_length - inputs["input_ids"].shape[1]  # for text alone; an answer with images has more
            options["max_new_tokens"] = body.max_tokens or max(1, min(MAX_TOKENS, room))
            futures.append(await of_engine(call, inputs, tell, seed=of_answer, **options))
        num_prompt = sum(inputs["input_ids"].shape[1] for inputs in prompts)
        if body.stream:
            for future in futures:
                stream.end_with(future)
            return sse(self._events(stream, futures, num_prompt), futures)
        start = time.monotonic()
        choices, num_tokens = [], 0
        for index, result in enumerate(await results(request, futures)):
            ids, images = result if with_images else (result, [])
            num_tokens += len(ids)
            message, reason = await self._message(ids, images)
            choices.append({"index": index, "finish_reason": reason, "logprobs": None} | message)
        self.service.metrics.observe("answer", time.monotonic() - start)
        answer = {"object": self.kind, **self.head, "choices": choices, "usage": usage(num_prompt, num_tokens)}
        return JSONResponse(answer)

    async def _message(self, ids: torch.Tensor, images) -> tuple[dict, str]:
        pieces = TextPieces(self.service.processor.tokenizer, self.body.stops)
        pieces.ids = [token for token in ids.tolist() if token != self.service.model.config.image_token_id]
        text = pieces.add(None)
        reason = self._reason(ids, pieces)
        if not self.is_chat:
            return {"text": text}, reason
        message = {"role": "assistant", "content": text}
        if len(images):
            urls = [encode_png(await of_engine(self.service.pixels, codes)) for codes in images]
            message["images"] = [
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{url}"}} for url in urls
            ]
        return {"message": message}, reason

    def _reason(self, ids: torch.Tensor, pieces: TextPieces) -> str:
        ends = self.service.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return "stop" if pieces.is_over or len(ids) and int(ids[-1]) in ends else "length"

    async def _events(self, stream: Stream, futures: list[Future], num_prompt: int) -> AsyncIterator[dict]:
        """The chunks of all answers, in the order in which they come."""
        model, start = self.service.model, time.monotonic()
        pieces = [TextPieces(self.service.processor.tokenizer, self.body.stops) for _ in futures]
        groups: list[list[torch.Tensor]] = [[] for _ in futures]
        num_tokens = num_done = 0

        def chunk(index: int, delta: dict, reason: str | None = None) -> dict:
            choice = {"index": index, "finish_reason": reason, "logprobs": None}
            choice |= {"delta": delta} if self.is_chat else {"text": delta.get("content", "")}
            kind = "chat.completion.chunk" if self.is_chat else self.kind
            return {"object": kind, **self.head, "choices": [choice]}

        if self.is_chat:
            for index in range(len(futures)):
                yield chunk(index, {"role": "assistant", "content": ""})
        while num_done < len(futures):
            item = await stream.queue.get()
            if isinstance(item, Future):
                num_done += 1
                index = futures.index(item)
                if item.cancelled() or item.exception() is not None:
                    yield {"error": {"message": "the answer was broken off", "type": "server_error"}}
                    return
                result = item.result()
                ids = result[0] if isinstance(result, tuple) else result
                if text := pieces[index].add(None):
                    yield chunk(index, {"content": text})
                yield chunk(index, {}, self._reason(ids, pieces[index]))
                continue
            index, value = item
            if num_tokens == 0:
                self.service.metrics.observe("first_token", time.monotonic() - start)
            if value.ndim:
                groups[index].append(value)
                if len(groups[index]) == model.config.num_image_positions:
                    image = await of_engine(self.service.pixels, torch.stack(groups[index], dim=1))
                    url = f"data:image/png;base64,{encode_png(image)}"
                    yield chunk(index, {"images": [{"type": "image_url", "image_url": {"url": url}}]})
                    groups[index] = []
                continue
            num_tokens += 1
            if not pieces[index].is_over and (text := pieces[index].add(int(value))):
                yield chunk(index, {"content": text})
        if (self.body.stream_options or {}).get("include_usage"):
            kind = "chat.completion.chunk" if self.is_chat else self.kind
            yield {"object": kind, **self.head, "choices": [], "usage": usage(num_prompt, num_tokens)}


async def image_events(service, stream, futures, num_partial: int, is_edit: bool) -> AsyncIterator[dict]:
    """Partial and whole drawings as they come."""
    prefix = "image_edit" if is_edit else "image_generation"
    groups: list[list[torch.Tensor]] = [[] for _ in futures]
    num_positions, start = service.model.config.num_image_positions, time.monotonic()
    shown = {num_positions * (i + 1) // (num_partial + 1) for i in range(num_partial)}
    num_done, has_begun = 0, False
    while num_done < len(futures):
        item = await stream.queue.get()
        if isinstance(item, Future):
            num_done += 1
            if item.cancelled() or item.exception() is not None:
                yield {"type": "error", "error": {"message": "the drawing was broken off", "type": "server_error"}}
                return
            png = encode_png(await of_engine(service.pixels, item.result()))
            yield {
                "type": f"{prefix}.completed",
                "b64_json": png,
                "output_format": "png",
                "created_at": int(time.time()),
            }
            continue
        index, codes = item
        groups[index].append(codes)
        if len(groups[index]) in shown and len(groups[index]) < num_positions:
            png = encode_png(await of_engine(service.pixels, torch.stack(groups[index], dim=1)))
            if not has_begun:
                service.metrics.observe("first_partial_image", time.monotonic() - start)
                has_begun = True
            number = sum(place < len(groups[index]) for place in shown)
            yield {"type": f"{prefix}.partial_image", "b64_json": png, "partial_image_index": number}


def usage(num_prompt: int, num_tokens: int) -> dict:
    return {"prompt_tokens": num_prompt, "completion_tokens": num_tokens, "total_tokens": num_prompt + num_tokens}


def serve(engine: UniTokEngine, processor, name: str, host: str, port: int, **options) -> None:
    """Serves until SIGINT or SIGTERM, then finishes what is under way."""
    import uvicorn

    app = create_app(engine, processor, name, hosts=own_hosts(host), **options)
    logging.getLogger("uvicorn.access").disabled = True
    uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=60)
