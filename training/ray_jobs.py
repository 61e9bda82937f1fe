"""Jobs on the workers of a Ray cluster, for evaluations and the extraction of codes (extra `ray`)."""

import importlib.util
import pickle
import pkgutil
from collections.abc import Iterator
from typing import Any


BLOCKS = 64  # per worker; when a worker dies, only its current block is repeated


class _Worker:
    def __init__(self, name: str, arguments: dict):
        self.work = pkgutil.resolve_name(name)(**arguments)

    def __call__(self, row: dict) -> dict:
        """Run a job. Pickle its result or its `ValueError`, so that Ray does not wrap the error in another type."""
        try:
            result = self.work(pickle.loads(row["job"]))
        except ValueError as error:
            result = ValueError(str(error))
        return {"result": pickle.dumps(result)}


def run_jobs(name: str, arguments: dict, jobs: list[Any], num_workers: int) -> Iterator[Any]:
    """Run jobs with Ray Data on the cluster at `RAY_ADDRESS`, a running local cluster, or a new one on this machine.

    A job may run again when a worker dies, so it must check what is already done. Each worker has one CPU, and one GPU
    if the cluster has GPUs. Workers read and write files by the paths in the jobs, so they need a shared file system.

    Args:
        name: a class, "module:Class". Each worker creates an instance, and calls it with one job after another.
        arguments: arguments of the class, plain values.
        jobs: the jobs, plain values.
        num_workers: number of workers, at least 1.

    Yields:
        The results of the calls, in any order.

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
