"""The server of the web page of `unitok-mllm serve` (extra `web`): chat with pictures, drawings, visual tokenizer.

`web_model` runs requests in the engine's batch and does not depend on the page, `web_page` lays out the page, and
`serve` runs the server. An error that a visitor can correct is a `ValueError` and is shown on the page. Any other
exception is a bug, whose traceback appears only in the terminal.

The browser sends only pictures and texts. Conversations stay on the server, so that no visitor can submit another's.
Uploads and drawings are stored in one folder, the only one that the page serves files from. A `Guard` protects the
server; docs/robustness.md lists the attacks.
"""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import gradio as gr
import uvicorn
from fastapi import FastAPI

from .guard import Guard, Refused, listen, own_hosts, url_of, visitor_of
from .kept_files import KeptFiles
from .serving import UniTokEngine
from .shared_engine import running
from .web_model import MAX_PICTURES, SharedModel
from .web_page import CSS, build_page


UPLOADS_KEPT = 3600  # seconds
TIDY_EVERY = 60  # seconds
JOBS_OF_A_VISITOR = 4  # waiting or running
MIB = 2**20
MULTIPART_HEADERS = 2**16  # bytes of an upload besides its files
MAX_SESSIONS = 1000  # conversations kept
MAX_CONNECTIONS = 1000
SESSION_NAME = 64  # characters; gradio's own have 11
ROUTES = (
    r"(GET|HEAD) /",
    r"GET /(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)",
    r"GET /(assets|static|svelte)/.*",
    r"GET /gradio_api/(info|app_id|startup-events|upload_progress|queue/data|heartbeat/[^/]*)",
    r"GET /gradio_api/call/[^/]*/[^/]*",
    r"(GET|HEAD) /gradio_api/file=/.*",  # a path, not a URL
    r"POST /gradio_api/(upload|cancel|reset|queue/join|call/[^/]*)",
)


def build_app(
    engine: UniTokEngine, page: gr.Blocks, host: str, port: int, queue_size: int, max_upload_mb: int
) -> FastAPI:
    """Build the page's application, without the guard. It runs the engine. For the arguments see `serve`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with running(engine, drop=True):
            yield

    page.queue(max_size=queue_size, api_open=False)
    page.state_session_capacity = MAX_SESSIONS
    fonts = ("system-ui", "sans-serif")
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None, lifespan=lifespan),
        page,
        "/",
        server_name=host,
        server_port=port,
        max_file_size=f"{max_upload_mb}mb",
        allowed_paths=[],
        show_error=False,
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        footer_links=[],
        theme=gr.themes.Soft(font=fonts, font_mono=("ui-monospace", "monospace")),
        css=CSS,
    )
    page.has_launched = True  # otherwise gradio does not check that a path is in its own folder
    return app


def guarded(
    app: FastAPI, page: gr.Blocks, files: KeptFiles, host: str, further_hosts: list[str], max_upload_mb: int
) -> Guard:
    """Put the page's application behind a guard. For the arguments see `serve`."""

    def num_jobs(visitor: str) -> int:
        queue = page._queue
        waiting = [event for queued in queue.event_queue_per_concurrency_id.values() for event in queued.queue]
        at_work = [event for job in queue.active_jobs if job is not None for event in job]
        return sum(visitor_of(event.request.client.host) == visitor for event in waiting + at_work)

    def admit(visitor: str, path: str, body: bytes) -> None:
        try:
            request = json.loads(body, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise Refused(400, "the request is not JSON") from error
        if not isinstance(request, dict) or len(str(request.get("session_hash") or "")) > SESSION_NAME:
            raise Refused(
                400, f"the request must be an object, with a session_hash of at most {SESSION_NAME} characters"
            )
        is_job = path.startswith(("/gradio_api/queue/join", "/gradio_api/call/"))
        if is_job and num_jobs(visitor) >= JOBS_OF_A_VISITOR:
            raise Refused(429, f"{JOBS_OF_A_VISITOR} of your requests are waiting already: wait for one of them")

    max_request = MAX_PICTURES * max_upload_mb * MIB + MULTIPART_HEADERS
    return Guard(app, own_hosts(host), {*further_hosts}, ROUTES, max_request, files.tidy, admit)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def server_of(app: Guard, proxy: str | None = None) -> uvicorn.Server:
    """Create the HTTP server of an application; for `proxy` see `serve`."""
    config = uvicorn.Config(
        app,
        ws="none",
        log_level="warning",
        proxy_headers=proxy is not None,
        forwarded_allow_ips=proxy,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=1,
        server_header=False,
    )
    return uvicorn.Server(config)


def serve(
    engine: UniTokEngine,
    processor,
    title: str,
    folder: str,
    host: str,
    port: int,
    queue_size: int,
    max_upload_mb: int,
    max_kept_mb: int,
    further_hosts: list[str],
    proxy: str | None,
) -> None:
    """Serve the page until SIGINT or SIGTERM.

    Args:
        engine: engine of the model.
        processor: processor of the same model.
        title: see `build_page`.
        folder: gradio's folder of files.
        host: address to listen on.
        port: port to listen on.
        queue_size: number of requests that may wait; the next one is refused.
        max_upload_mb: size limit of a file, in MiB.
        max_kept_mb: size limit of all uploads and drawings together, in MiB; the oldest are deleted first.
        further_hosts: other names by which browsers reach the server.
        proxy: address of a reverse proxy that is trusted to name visitors in `X-Forwarded-For`.

    Raises:
        ValueError: see `listen`.
    """
    page = build_page(SharedModel(engine, processor), title)
    files = KeptFiles(folder, UPLOADS_KEPT, max_kept_mb * MIB)
    app = guarded(
        build_app(engine, page, host, port, queue_size, max_upload_mb), page, files, host, further_hosts, max_upload_mb
    )
    with listen(host, port) as listening, files.tidied(TIDY_EVERY):
        print(f"Running on {url_of(host, port)}", flush=True)
        server_of(app, proxy).run([listening])
