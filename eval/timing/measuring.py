"""Measurement of jobs: count FLOPs and memory in one run, time the others, compare outputs."""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from eval.timing.counting import PeakMemory, flop_counter
from eval.timing.settings import Settings
from training.planning.counting import saved_for_backward


@dataclass
class Way:
    """One way to compute a job. Its seconds and FLOPs are those of `run` minus those of `less`."""

    run: Callable[[], Any]
    less: Callable[[], Any] | None = None


@dataclass
class Job:
    """A job to measure. It gives one row, or two if it is also computed naively.

    Attributes:
        fast: the model's own implementation.
        batch: batch size.
        amount: output of one run, for the throughput.
        unit: unit of `amount`.
        least_bytes: see `eval.speed`; without activations.
        detail: description of the job in the row.
        naive: the naive implementation, if there is one.
        trained: module whose parameters get gradients; None for inference.
        counted: whether FLOPs and memory are counted in a run before the timed ones.
        first: whether to time the very first run.
        runs: number of runs; None for that of the settings.
        best: whether to report the fastest run instead of the median.
        quality: further fields of the row.
        describe: function that makes a note from the output.
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
    """Measurement of one way to compute a job; None for what was not counted.

    `kept_bytes` is the size of the tensors that autograd keeps for the backward pass; `memory` and `peak` are in
    bytes.
    """

    output: Any
    seconds: float
    runs: int
    flops: int | None = None
    kept_bytes: int = 0
    memory: int | None = None
    peak: int | None = None


def timed(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Run once, and return the wall time in seconds and the output."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    output = run()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, output


def count(way: Way, trained: nn.Module | None, settings: Settings) -> Measurement:
    """Count FLOPs, memory and the bytes that autograd keeps, in a run that is not timed."""
    # operations in compiled code cannot be counted
    eager = torch.compiler.set_stance("force_eager") if settings.compile else nullcontext()
    counter = flop_counter(trained is not None)
    with eager, saved_for_backward(trained) as saved, counter, PeakMemory(settings.device) as memory:
        output = way.run()
    flops = counter.get_total_flops()
    if way.less is not None:
        with flop_counter(False) as counter:
            way.less()
        flops -= counter.get_total_flops()
    return Measurement(output, 0.0, 0, flops, sum(saved.values()), memory.peak - memory.before, memory.peak)


def measure(job: Job, with_naive: bool, settings: Settings) -> list[Measurement]:
    """Count, then time the implementations alternately, so that other load on the machine affects them equally."""
    ways = [job.fast, job.naive] if with_naive and job.naive is not None else [job.fast]
    trains = job.trained is not None
    with torch.inference_mode(not trains), torch.set_grad_enabled(trains):
        measured = [count(way, job.trained, settings) if job.counted else Measurement(None, 0.0, 0) for way in ways]
        if settings.compile or (
            settings.device != "cpu" and not job.first
        ):  # a first run that compiles or loads is not timed
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
    """Compute the share of differing codes or tokens, the relative difference of losses, or the largest of pixels."""
    if not output.is_floating_point():
        return (output != other).float().mean().item()
    largest = (output.float() - other.float()).abs().max()
    return (largest / output.abs() if output.dim() == 0 else largest).item()
