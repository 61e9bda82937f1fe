"""Time the model's jobs on this machine, one JSON line each, and compare them with the machine's peaks.

    python -m eval.speed                                              # the shipped tiny model
    python -m eval.speed --preset smollm2 --dtype bfloat16 --jobs draw answer
    python -m eval.speed --preset smollm2 --jobs draw --batches 1 --naive --positions 32
    python -m eval.speed --preset smollm2 --jobs draw --batches 1 --peer janus emu3 --positions 48
    python -m eval.speed --model FOLDER --output runs/speed.json      # an MLLM, or a tokenizer alone

Presets:

    tiny                the shipped model
    smollm2             an LLM of SmolLM2-135M's size with 8 codebooks of 4096 codes and 256 positions, random weights
    large               the large tokenizer, random weights
    7b                  an LLM of Llama-2-7B's size with the large tokenizer, random weights, for a GPU

Jobs:

    encode, decode      images to codes, codes to images (photographs that scikit-image and scikit-learn ship). Rows
                        with oneDNN use `pack_linears(tokenizer)`, on a CPU
    draw                text to image codes, guidance 5, greedily; draw_sampled: from the 20 likeliest codes
    draw_janus, draw_emu3   with --peer: greedily with the library's models around an LLM of the same size, see
                        `eval.timing.peers`
    answer              time to the first token of an answer about a picture, and the tokens that follow
    train_tokenizer     one step: forward, the losses that need no other network, backward, AdamW
    train_mllm          one step on samples that read or write one image each, or on texts, padded as by the collator, or
                        packed. "with logits" keeps the logits of all targets; the others compute losses in chunks
    first_answer        the first question to a loaded model, with everything around the model
    load                JPEGs to training samples of 256 pixels, in one thread
    import              the package's classes in a fresh process

Each job runs in a process of its own, so that the memory is the job's alone. Each row has

    seconds             median of `runs` runs; of fewer if these would take more than --seconds
    flops               FLOPs of the matrix products and convolutions, counted during the run
    least_bytes         memory traffic that no implementation can avoid: each weight once per use (drawing uses the
                        LLM once per position and the depth transformer K times; training reads and writes weights,
                        gradients and moments 10 times in all), keys and values of earlier tokens, pixels and codes,
                        and in training the tensors kept for the backward pass, written and read. Other activations
                        could stay in caches.
    of_gemm, of_bandwidth   flops and least_bytes per second, as shares of the peaks in the `peaks` rows of the same
                        run: the fastest matrix product in that dtype, and the fastest reading of memory
    memory_mib, peak_mib    peak memory above the start of the job, and in all: of the process on a CPU (sampled),
                        allocated on CUDA
    ratio, difference, equal    with --naive, in a row of its own: the seconds of `eval.timing.naive` divided by those
                        of the row before; the share of codes that differ, the largest difference of pixels, or the
                        relative difference of losses; and whether this is 0 (codes) or below 1e-4
    codes_equal_to_fp32, psnr_to_fp32   in bfloat16, on the photographs; PSNR in dB

In bfloat16, training keeps float32 weights under autocast, as this project's trainings do. The 7b preset trains
bfloat16 weights, since its gradients and moments would not fit on a card otherwise. FLOPs include what gradient
checkpointing recomputes.
"""

import json
import os
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import connection, get_context, parent_process

import torch
from rich.console import Console

from eval._common import parse_settings, versions
from eval.timing.jobs import JOBS, WITHOUT_MODEL
from eval.timing.measuring import Job, Measurement, difference, measure
from eval.timing.settings import Settings
from eval.timing.subjects import load_subject
from training.errors import one_line_errors
from training.files import write_atomically


SAME = 1e-4
FIELDS = (
    *("job", "detail", "way", "batch", "seconds", "runs", "throughput", "unit", "flops", "least_bytes", "of_gemm"),
    *("of_bandwidth", "memory_mib", "peak_mib", "ratio", "difference", "equal", "codes_equal_to_fp32", "psnr_to_fp32"),
    *("note", "model", "dtype", "device", "threads"),
)


def rounded(value: float | None, digits: int = 4) -> float | None:
    """Round to significant digits; None passes."""
    return None if value is None else float(f"{value:.{digits}g}")


def make_row(name: str, job: Job, way: str, measured: Measurement, settings: Settings, note: str, peaks: dict) -> dict:
    """Build a row with all `FIELDS` except those of a comparison.

    Args:
        name: name of the job.
        job: the job.
        way: name of the implementation.
        measured: its measurement.
        settings: the settings.
        note: note in the row.
        peaks: peak FLOP/s as "GEMM" and bytes/s as "bandwidth"; empty while these are measured.
    """
    seconds, least_bytes = measured.seconds, job.least_bytes
    if least_bytes is not None:
        least_bytes += 2 * measured.kept_bytes
    notes = [note, job.describe(measured.output) if job.describe else ""]
    row = dict.fromkeys(FIELDS) | {
        "job": name,
        "detail": job.detail,
        "way": way,
        "batch": job.batch,
        "seconds": rounded(seconds),
        "runs": measured.runs,
        "throughput": rounded(job.amount / seconds),
        "unit": job.unit,
        "flops": measured.flops,
        "least_bytes": least_bytes,
        "memory_mib": rounded(None if measured.memory is None else measured.memory / 2**20),
        "peak_mib": rounded(None if measured.peak is None else measured.peak / 2**20),
        "note": "; ".join(filter(None, notes)),
        "model": settings.name,
        "dtype": settings.dtype,
        "device": settings.device,
        "threads": torch.get_num_threads(),
    }
    if peaks and measured.flops is not None:
        row["of_gemm"] = rounded(measured.flops / seconds / peaks["GEMM"])
    if peaks and least_bytes is not None:
        row["of_bandwidth"] = rounded(least_bytes / seconds / peaks["bandwidth"])
    return row | {key: rounded(value, 6) for key, value in job.quality.items()}


def run_job(settings: Settings, name: str, peaks: dict[str, float]) -> list[dict]:
    """Run one job and return its rows. Each is printed as soon as it is measured."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    note = ""
    with torch.set_grad_enabled(name.startswith("train")):
        if name in WITHOUT_MODEL:
            jobs = WITHOUT_MODEL[name](settings)
        else:
            subject = load_subject(settings)
            jobs, note = JOBS[name](subject, settings), subject.note
        rows = []
        for job in jobs:
            fast, *others = measure(job, settings.naive, settings)
            new = [make_row(name, job, "fast", fast, settings, note, peaks)]
            for slow in others:
                apart = difference(fast.output, slow.output)
                compared = {"ratio": rounded(slow.seconds / fast.seconds), "difference": rounded(apart)}
                compared["equal"] = apart == 0 or (fast.output.is_floating_point() and apart < SAME)
                new.append(make_row(name, job, "naive", slow, settings, note, peaks) | compared)
            for row in new:
                print(json.dumps(row), flush=True)
            rows += new
    return rows


def end_with_parent() -> None:
    """Make this process end as soon as its parent process ends, in whatever way."""

    def watch() -> None:
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def in_own_process(settings: Settings, name: str, peaks: dict[str, float]) -> list[dict]:
    """Call `run_job` in a fresh process, whose end frees the memory of the model.

    Raises:
        BrokenProcessPool: the process was killed, for example because memory ran out.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=end_with_parent) as pool:
        return pool.submit(run_job, settings, name, peaks).result()


def show(rows: list[dict]) -> None:
    """Print the rows as a table to stderr, in addition to the JSON lines on stdout."""
    from training.plan import markdown_table

    shown = {
        "job": lambda row: f"{row['job']} {row['detail']}".strip() + (", naive" if row["way"] == "naive" else ""),
        "batch": lambda row: str(row["batch"]),
        "seconds": lambda row: f"{row['seconds']:.4g}",
        "throughput": lambda row: f"{row['throughput']:.4g} {row['unit']}",
        "GFLOP": lambda row: f"{row['flops'] / 1e9:,.4g}",
        "least MB": lambda row: f"{row['least_bytes'] / 1e6:,.0f}",
        "of GEMM": lambda row: f"{row['of_gemm']:.1%}",
        "of bandwidth": lambda row: f"{row['of_bandwidth']:.1%}",
        "MiB": lambda row: f"{row['memory_mib']:,.0f}",
        "ratio": lambda row: f"{row['ratio']:.2f}",
        "equal": lambda row: "yes" if row["equal"] else f"{row['difference']:.1g} apart",
    }
    needs = {"GFLOP": "flops", "least MB": "least_bytes", "MiB": "memory_mib"}
    table = markdown_table(*shown)
    for row in rows:
        known = [row[needs.get(column, column.lower().replace(" ", "_"))] is not None for column in shown]
        table.add_row(*[cell(row) if is_known else "" for cell, is_known in zip(shown.values(), known)])
    Console(stderr=True, width=160, highlight=False).print(table)


@one_line_errors()
def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(Settings, argv, __doc__)
    rows, unfinished = in_own_process(settings, "peaks", {}), []
    gemm, bandwidth = rows
    peaks = {
        "GEMM": gemm["flops"] / gemm["seconds"],
        "bandwidth": bandwidth["least_bytes"] / bandwidth["seconds"],
    }
    for name in settings.jobs:
        try:
            rows += in_own_process(settings, name, peaks)
        except (BrokenProcessPool, torch.OutOfMemoryError) as error:
            unfinished.append(name)
            print(f"{name} was not finished, probably for want of memory: {error}", file=sys.stderr)
    show(rows)
    if settings.output:
        result = {"benchmark": "speed", "settings": asdict(settings), "versions": versions(), "rows": rows}
        write_atomically(settings.output, (json.dumps(result, indent=2) + "\n").encode())
    if unfinished:
        sys.exit(f"not finished: {', '.join(unfinished)}")


if __name__ == "__main__":
    main()
