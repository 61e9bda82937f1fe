"""An HTTP server with OpenAI's API in front of the engine: chat about pictures, completions, images, embeddings.

The server is stateless: it keeps and logs only counts and times, never the content of a request. Unknown options and
requests that the model cannot serve get an error in the API's format that names the option.
"""

import asyncio
import base64
import hmac
import logging
import os
import time
from collections.abc import Collection
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import torch
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from .api_metrics import Metrics
from .api_requests import (
    MAX_PICTURES,
    APIError,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    ImageRequest,
    Pictures,
)
from .api_responses import Answers, Events, Service, image_events, of_engine, refusals, results, tell_partial
from .guard import MAX_OPEN, Guard, Refused, own_hosts
from .serving import UniTokEngine
from .shared_engine import Stream, running, submit


ROUTES = (
    r"GET /(health|metrics|v1/models)",
    r"GET /v1/models/.+",
    r"POST /v1/(chat/completions|completions|embeddings|images/generations|images/edits)",
)


def add_error_handlers(app: FastAPI) -> None:
    """Let the application answer all errors in the API's format."""

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


def status_routes(service: Service) -> APIRouter:
    """Build the routes of the server's health, its metrics and its model."""
    router = APIRouter()

    @router.get("/health")
    async def health(request: Request) -> dict:
        if not request.app.state.thread.is_alive():
            raise APIError(503, "the engine has ended")
        return {"status": "ok", "running": service.engine.num_running, "waiting": service.engine.num_waiting}

    @router.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    def described() -> dict:
        return {"id": service.name, "object": "model", "created": service.created, "owned_by": "unitok_mllm"}

    @router.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [described()]}

    @router.get("/v1/models/{name:path}")  # "owner/name" too
    async def model(name: str) -> dict:
        service.check_model(name)
        return described()

    return router


def text_routes(service: Service) -> APIRouter:
    """Build the routes of chats and completions."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
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
        if body.choices is not None:
            return await answers.choose(request, inputs)
        return await answers.respond(request, [inputs] * body.n, with_images)

    @router.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.check_model(body.model)
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        inputs = [await of_engine(service.processor, text=prompt, sanitize_control_tokens=True) for prompt in prompts]
        answers = Answers(service, body, "text_completion", "cmpl")
        return await answers.respond(request, [one for one in inputs for _ in range(body.n)], False)

    return router


def image_routes(service: Service) -> APIRouter:
    """Build the routes of drawings and edits."""
    router = APIRouter()

    @router.post("/v1/images/generations")
    async def generations(body: ImageRequest, request: Request) -> Response:
        return await draw(service, body, request, None)

    @router.post("/v1/images/edits")
    async def edits(request: Request) -> Response:
        async with request.form(max_files=MAX_PICTURES, max_fields=32, max_part_size=2**16) as form:
            fields = {name: value for name, value in form.multi_items() if not isinstance(value, UploadFile)}
            files = [(name, value) for name, value in form.multi_items() if isinstance(value, UploadFile)]
            if foreign := [name for name, _ in files if name not in ("image", "image[]")]:
                raise APIError(400, f"{foreign[0]}: send pictures in the field 'image'", foreign[0])
            if not files:
                raise APIError(400, "image: Field required", "image")
            data = [await file.read() for _, file in files]
        try:
            body = ImageRequest.model_validate(fields)
        except ValueError as error:
            raise RequestValidationError(error.errors()) from error
        pictures = Pictures(service.url_hosts)
        return await draw(service, body, request, [await of_engine(pictures.add, one) for one in data])

    return router


async def draw(service: Service, body: ImageRequest, request: Request, pictures: list[Image.Image] | None) -> Response:
    """Draw images, and respond with them whole or as a stream.

    Args:
        service: the service.
        body: the options of the request.
        request: the HTTP request.
        pictures: pictures to edit; None to draw from the prompt alone.

    Raises:
        APIError: the engine or the model refused the request, or the client has disconnected.
    """
    service.check_model(body.model)
    if body.size not in (None, "auto", service.size):
        raise APIError(400, f"size: this model draws {service.size}, got {body.size!r}", "size")
    options = {"generation_mode": "image" if pictures is None else "edit"}
    if pictures is not None:
        options["images"] = [pictures]
    inputs = await of_engine(service.processor, text=[body.prompt], **options)
    candidates = await of_engine(service.num_candidates, body, inputs)
    drawing, stream, num_drawn = body.drawing(), Stream(), max(body.n, candidates)
    num_positions, parts = service.model.config.num_image_positions, body.partial_images + 1
    shown = [num_positions * part // parts for part in range(1, parts)]
    if num_drawn > 1 and "seed" not in drawing:
        drawing["seed"] = int(torch.randint(2**31, ()))

    def drawn(j: int) -> Future:
        tell = tell_partial(stream, j, shown) if shown else None
        return service.engine.draw(inputs, tell, sample=j, **drawing)

    with refusals():
        futures = await submit(partial(drawn, j) for j in range(num_drawn))
    if not body.stream:
        drawings, scores = await results(request, futures), [{}] * body.n
        head = {"created": int(time.time()), "size": service.size, "output_format": "png"}
        if candidates > 1:
            ranked = await of_engine(service.rank, torch.stack(drawings), inputs, body.n)
            drawings, scores = ranked.codes, [{"score": score} for score in ranked.scores.tolist()]
            head["candidate_scores"] = ranked.candidate_scores[0].tolist()
        pngs = await asyncio.gather(*(service.picture(codes.unbind(dim=1)) for codes in drawings))
        data = [{"b64_json": png} | score for png, score in zip(pngs, scores)]
        return JSONResponse(head | {"data": data})
    prefix = "image_generation" if pictures is None else "image_edit"
    return Events(image_events(service, stream, futures, shown, prefix), futures)


def embedding_routes(service: Service) -> APIRouter:
    """Build the route of embeddings."""
    router = APIRouter()

    @router.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest) -> Response:
        service.check_model(body.model)
        texts = [body.input] if isinstance(body.input, str) else body.input
        rows, num_tokens = await of_engine(service.embed, texts)
        packed = body.encoding_format == "base64"
        data = [
            {
                "object": "embedding",
                "index": i,
                "embedding": base64.b64encode(row.numpy().tobytes()).decode() if packed else row.tolist(),
            }
            for i, row in enumerate(rows)
        ]
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        return JSONResponse({"object": "list", "data": data, "model": service.name, "usage": usage})

    return router


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
    max_open: int = MAX_OPEN,
) -> Guard:
    """Create the ASGI application.

    Args:
        engine: engine of the model; its thread starts and stops with the application.
        processor: processor of the same model.
        name: name of the model in the API.
        api_key: key that clients must send; None to accept requests without a key.
        hosts: names by which clients reach the server, see `guard`; None for the loopback names only.
        further_hosts: other such names, which are also accepted in `Origin`.
        max_body: maximum size of a request's body in bytes.
        timeout: time limit of a request in seconds.
        url_hosts: hosts from which pictures may be fetched, see `fetch`.
        max_open: maximum number of concurrent requests from one address.
    """
    service = Service(engine, processor, name, url_hosts)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        async with running(engine) as app.state.thread:
            yield

    app = FastAPI(title="unitok_mllm", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    add_error_handlers(app)
    for routes in (status_routes, text_routes, image_routes, embedding_routes):
        app.include_router(routes(service))
    hosts = own_hosts("127.0.0.1") if hosts is None else hosts
    front = Front(app, service.metrics, api_key, timeout)
    return Guard(front, hosts, set(further_hosts), ROUTES, max_body, None, None, refusal, max_open)


def refusal(refused: Refused) -> tuple[str, str]:
    """Format a refusal of the guard as an error of the API: its content type and body."""
    return "application/json", APIError(refused.status, str(refused)).response().body.decode()


class Front:
    """ASGI middleware that checks the API key, counts and times responses, and enforces the timeout.

    Args:
        app: the application.
        metrics: metrics to which responses are added.
        api_key: key that clients must send; None to accept requests without a key.
        timeout: time limit of a request in seconds.
    """

    def __init__(self, app, metrics: Metrics, api_key: str | None, timeout: float):
        self.app, self.metrics, self.timeout = app, metrics, timeout
        self.api_key = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        start, status = time.monotonic(), 0  # no response yet

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
            if not status:
                error = APIError(504, f"the request took longer than {self.timeout:g} seconds")
                await error.response()(scope, receive, watched)
        finally:
            self.metrics.observe("response", time.monotonic() - start)
            with self.metrics.lock:
                self.metrics.requests["/".join(scope["path"].split("/")[2:4]), status] += 1


def read_key(file: str | os.PathLike | None) -> str | None:
    """Read the API key from a file or, if `file` is None, from `UNITOK_API_KEY`; None if that is not set.

    Raises:
        ValueError: the file cannot be read, or the file or the variable is empty.
    """
    try:
        key = os.environ.get("UNITOK_API_KEY") if file is None else Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"cannot read the API key in {file}: {error}") from error
    if key == "":
        raise ValueError(f"{file or 'UNITOK_API_KEY'} has no key.")
    return key


def serve(
    engine: UniTokEngine, processor, name: str, host: str, port: int, proxy: str | None = None, **options
) -> None:
    """Serve until SIGINT or SIGTERM, then finish the running requests.

    Args:
        engine: see `create_app`.
        processor: see `create_app`.
        name: see `create_app`.
        host: address to listen on.
        port: port to listen on.
        proxy: address of a reverse proxy that is trusted to name clients in `X-Forwarded-For`.
        options: further arguments of `create_app`.
    """
    import uvicorn

    app = create_app(engine, processor, name, hosts=own_hosts(host), **options)
    logging.getLogger("uvicorn.access").disabled = True
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=60,
        proxy_headers=proxy is not None,
        forwarded_allow_ips=proxy,
    )
