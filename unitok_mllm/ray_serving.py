"""The API server as a Ray Serve application (extra `ray`): replicas on many machines, autoscaled with the load.

    serve run unitok_mllm.ray_serving:build model=FOLDER max_replicas=8

Each replica is the server of `unitok-mllm api` with an engine of its own. A request goes to the less busy of two
random replicas. When a replica dies, its requests fail with status 500, and Ray starts another one.
"""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

from .api import create_app, read_key
from .devices import AUTO
from .guard import MAX_OPEN, host_name, served_host
from .inference import SHIPPED_MODEL, check_model, load
from .serving import UniTokEngine


class Arguments(BaseModel):
    """Arguments of `build`: `max_replicas`, and the options of `unitok-mllm api` except its address and proxy."""

    model_config = ConfigDict(extra="forbid")
    model: str = str(SHIPPED_MODEL)
    name: str | None = None
    max_rows: int = Field(32, ge=1)
    max_length: int | None = Field(None, ge=1)
    queue_size: int = Field(256, ge=1)
    timeout: float = Field(600, ge=0.1, allow_inf_nan=False)
    max_body_mb: int = Field(32, ge=1)
    max_open: int = Field(MAX_OPEN, ge=1)
    cuda_graph: bool = True
    device: str = AUTO
    api_key_file: str | None = None
    allow_host: list[Annotated[str, AfterValidator(served_host)]] = []
    allow_url: list[Annotated[str, AfterValidator(host_name)]] = []
    max_replicas: int = Field(1, ge=1)


@serve.deployment
@serve.ingress()
class UniTokServer:
    """One replica of the server, with its own model and engine."""

    def __init__(self, arguments: Arguments):
        self.arguments = arguments
        model, self.processor = load(arguments.model, device=arguments.device)
        sizes = arguments.max_rows, arguments.max_length, arguments.queue_size
        self.engine = UniTokEngine(model, *sizes, cuda_graph=arguments.cuda_graph)

    def __serve_build_asgi_app__(self):
        """Return the ASGI application. Ray calls this after the constructor."""
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
    """Build the Ray Serve application. A Ray Serve config file can override its settings, see docs/serving.md.

    A replica takes `max_rows` requests at once. Up to `queue_size` more wait for a replica; the next one gets status
    503. Ray aims at one replica for every `max_rows / 2` running or waiting requests.

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
