"""The API server as an application of Ray Serve (extra `ray`): replicas on many machines, more of them when requests wait.

    serve run unitok_mllm.ray_serving:build model=FOLDER max_replicas=8

Each replica is the server of `unitok-mllm api` with an engine of its own. A request goes to one of the two less busy of
them. When a replica dies, its requests end in an error of the status 500, and another replica is started.
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve import Application

from .api import create_app, read_key
from .devices import AUTO
from .guard import MAX_OPEN
from .inference import SHIPPED_MODEL, check_model, load
from .serving import UniTokEngine


class Arguments(BaseModel):
    """What `build` takes: the options of `unitok-mllm api` but address and proxy, and `max_replicas`, the most replicas."""

    model_config = ConfigDict(extra="forbid")
    model: str = str(SHIPPED_MODEL)
    name: str | None = None
    max_rows: int = 32
    max_length: int | None = None
    queue_size: int = 256
    timeout: float = 600
    max_body_mb: int = 32
    max_open: int = MAX_OPEN
    device: str = AUTO
    api_key_file: str | None = None
    allow_host: list[str] = []
    allow_url: list[str] = []
    max_replicas: int = 1


@serve.deployment
@serve.ingress()
class UniTokServer:
    """A replica."""

    def __init__(self, arguments: Arguments):
        self.arguments = arguments
        model, self.processor = load(arguments.model, device=arguments.device)
        sizes = {"max_rows": arguments.max_rows, "max_length": arguments.max_length}
        self.engine = UniTokEngine(model, max_queue=arguments.queue_size, **sizes)

    def __serve_build_asgi_app__(self):
        """The application, which Ray asks for after the constructor."""
        arguments = self.arguments
        return create_app(
            self.engine,
            self.processor,
            arguments.name or Path(arguments.model).resolve().name,
            api_key=read_key(arguments.api_key_file),
            further_hosts=set(arguments.allow_host),
            max_body=arguments.max_body_mb * 2**20,
            timeout=arguments.timeout,
            url_hosts=arguments.allow_url,
            max_open=arguments.max_open,
        )


def build(arguments: Arguments) -> Application:
    """Build the application. A config file of Ray Serve may change what is set here, see docs/serving.md.

    A replica takes `max_rows` requests at once. Others wait before the replicas, at most `queue_size`: a further one gets
    a 503. There is another replica for each half of `max_rows` that are running or waiting, on average.

    Raises:
        ValueError: see `check_model`.
    """
    check_model(arguments.model)
    scaling = {"min_replicas": 1, "max_replicas": arguments.max_replicas}
    return UniTokServer.options(
        max_ongoing_requests=arguments.max_rows,
        max_queued_requests=arguments.queue_size,
        autoscaling_config=scaling | {"target_ongoing_requests": max(1, arguments.max_rows // 2)},
    ).bind(arguments)


__all__ = ["Arguments", "UniTokServer", "build"]
