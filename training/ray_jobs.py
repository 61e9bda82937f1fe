"""Jobs on the workers of a Ray cluster, each done once; evaluations and the extraction of codes share this (extra `ray`)."""

import importlib.util
import pickle
import pkgutil
from collections.abc import Iterator
from typing import Any


BLOCKS = 64  # for each worker; when a worker dies, only its current block is done again


class _Worker:
    def __init__(self, name: str, arguments: dict):
        self.work = pkgutil.resolve_name(name)(**arguments)

    def __call__(self, row: dict) -> dict:
        """The pickled result of a job, or its ValueError, which stays what it is on its way to the caller."""
        try:
            result = self.work(pickle.loads(row["job"]))
        except ValueError as error:
            result = ValueError(str(error))
        return {"result": pickle.dumps(result)}


def run_jobs(name: str, arguments: dict, jobs: list[Any], num_workers: int) -> Iterator[Any]:
    """Run jobs with Ray Data, on the cluster that `RAY_ADDRESS` names, that runs here, or a new one on this machine.

    A job may be started again when a worker dies, so it must find out itself what of it is done. Workers have a CPU
    each, and a GPU each where the cluster has some. They read and write files by the paths in the jobs.

    Args:
        name: a class, "module:Class". Each worker has an instance of it, which is called with one job after another.
        arguments: of the class, plain values.
        jobs: plain values.
        num_workers: at least 1.

    Yields:
        What the calls return, in any order.

    Raises:
        ValueError: Ray is not installed, or a call raised it.
    """
    if importlib.util.find_spec("ray") is None:
        raise ValueError("workers of Ray need ray: pip install 'unitok_mllm[ray]'")
    import ray

    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    rows = [{"job": pickle.dumps(job)} for job in jobs]
    data = ray.data.from_items(rows, override_num_blocks=min(len(rows), BLOCKS * num_workers))
    results = data.map(
        _Worker,
        fn_constructor_args=(name, arguments),
        compute=ray.data.ActorPoolStrategy(size=num_workers),
        num_gpus=1 if ray.cluster_resources().get("GPU") else 0,
    )
    for row in results.iter_rows():
        result = pickle.loads(row["result"])
        if isinstance(result, ValueError):
            raise result
        yield result
