"""Measure the time and memory that a training step saves with `image_loss_share`.

    python -m eval.image_loss_share

A SmolLM2-135M-sized LLM (random weights) with 8 codebooks of 4096 and 256 positions draws 4 images: one forward and
backward pass, fp32. Each share runs in a process of its own, whose largest resident set is read at its end.
"""

import json
import resource
import subprocess
import sys
import time
from typing import Annotated

import torch
import typer

from eval.timing.subjects import smollm2_mllm
from training.errors import one_line_errors
from unitok_mllm.typer_apps import script_app


SHARES = (1.0, 0.5, 0.25)
IMAGES, TEXT = 4, 40


def measure(share: float, runs: int) -> dict:
    """Measure the median time of a step, in seconds, and by how much it raises the peak resident memory, in MiB."""
    torch.manual_seed(0)
    model = smollm2_mllm().train()
    config = model.config
    positions = config.num_image_positions
    ids = torch.randint(10, 1000, (IMAGES, TEXT + positions + 1))
    ids[:, TEXT:-1] = config.image_token_id
    inputs = {
        "input_ids": ids,
        "labels": ids,
        "image_codes": torch.randint(4096, (IMAGES, 8, positions)),
        "image_targets": torch.ones(IMAGES, dtype=torch.bool),
    }
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(runs + 1):
        start = time.perf_counter()
        model(**inputs, image_loss_share=share).loss.backward()
        seconds.append(time.perf_counter() - start)
        model.zero_grad()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"image_loss_share": share, "seconds": round(sorted(seconds[1:])[runs // 2], 2), "mib": round(grown)}


app = script_app(help=__doc__)


@app.command()
def main(
    share: Annotated[
        float, typer.Option(min=0, max=1, help="Only this share, in this process; 0: all of them.")
    ] = 0.0,
    runs: Annotated[int, typer.Option(min=1, help="Steps to take the median of.")] = 3,
) -> None:
    """Print one JSON line for each share."""
    if share:
        print(json.dumps(measure(share, runs)), flush=True)
        return
    for each in SHARES:
        subprocess.run(
            [sys.executable, "-m", "eval.image_loss_share", f"--share={each}", f"--runs={runs}"], check=True
        )


if __name__ == "__main__":
    one_line_errors()(app)()
