"""A job, and its measurement: count a run, time others, compare outputs."""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from eval.timing.counting import PeakMemory, flop_counter
from eval.timing.settings import Settings


@dataclass
class Way:
    """One way to compute a job: seconds and FLOPs are those of `run` less those of `less`."""

    run: Callable[[], Any]
    less: Callable[[], Any] | None = None


@dataclass
class Job:
    """What becomes a row, or two.

    Attributes:
        fast, naive: how it is computed; `naive` None where there is no other way.
        amount, unit: what one run makes, for the throughput.
        least_bytes: see the module's docstring; without activations.
        trained: the module whose parameters take gradients; None for inference.
        counted: False to time it alone, without a run before that counts FLOPs and memory.
        first: what is timed is the very first run.
        runs: instead of the settings'.
        best: the fastest run instead of the median.
        quality: further fields of the row.
        describe: a note on the output.
    """

    fast: Way
    batch: int
    amount: int
    unit: str
    least_bytes: int | None = None
    detail: str = ""
    naive: Way | None = None
    trained: nn.Module | None = None
    counted: bool = True
    first: bool = False
    runs: int | None = None
    best: bool = False
    quality: dict[str, float] = field(default_factory=dict)
    describe: Callable[[Any], str] | None = None


@dataclass
class Measurement:
    """Of one way; None for what was not counted. `kept_bytes`: of what autograd keeps for the backward pass."""

    output: Any
    seconds: float
    runs: int
    flops: int | None = None
    kept_bytes: int = 0
    memory: int | None = None
    peak: int | None = None


def timed(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Wall time in seconds, and the output."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    output = run()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, output


def count(way: Way, trained: nn.Module | None, settings: Settings) -> Measurement:
    """FLOPs, memory and what autograd keeps, in a run that is not timed."""
    parameters = {StorageWeakRef(p.untyped_storage()) for p in trained.parameters()} if trained is not None else set()
    kept: dict[StorageWeakRef, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if (key := StorageWeakRef(storage)) not in parameters:
            kept[key] = storage.nbytes()
        return tensor

    # what is compiled would hide its operations
    eager = torch.compiler.set_stance("force_eager") if settings.compile else nullcontext()
    counter = flop_counter(trained is not None)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with eager, hooks, counter, PeakMemory(settings.device) as memory:
        output = way.run()
    flops = counter.get_total_flops()
    if way.less is not None:
        with flop_counter(False) as counter:
            way.less()
        flops -= counter.get_total_flops()
    return Measurement(output, 0.0, 0, flops, sum(kept.values()), memory.peak - memory.before, memory.peak)


def measure(job: Job, with_naive: bool, settings: Settings) -> list[Measurement]:
    """Counts, then times the job's ways in turn, so that what else the machine does meets them alike."""
    ways = [job.fast, job.naive] if with_naive and job.naive is not None else [job.fast]
    trains = job.trained is not None
    with torch.inference_mode(not trains), torch.set_grad_enabled(trains):
        measured = [count(way, job.trained, settings) if job.counted else Measurement(None, 0.0, 0) for way in ways]
        if settings.compile or (settings.device != "cpu" and not job.first):  # what compiles or loads at its first run
            for way in ways:
                way.run()
        times: list[list[float]] = [[] for _ in ways]
        spent = 0.0
        while len(times[0]) < (job.runs or settings.runs) and (not times[0] or spent < settings.seconds):
            for way, own, measurement in zip(ways, times, measured):
                seconds, measurement.output = timed(way.run, settings.device)
                spent += seconds
                if way.less is not None:
                    seconds -= timed(way.less, settings.device)[0]
                own.append(seconds)
    for own, measurement in zip(times, measured):
        measurement.seconds, measurement.runs = min(own) if job.best else statistics.median(own), len(own)
    return measured


def difference(output: torch.Tensor, other: torch.Tensor) -> float:
    """Share of codes or tokens that differ, relative difference of losses, or largest difference of pixels."""
    if not output.is_floating_point():
        return (output != other).float().mean().item()
    largest = (output.float() - other.float()).abs().max()
    return (largest / output.abs() if output.dim() == 0 else largest).item()
