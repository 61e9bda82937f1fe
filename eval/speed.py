"""Times the model's jobs on this machine, one JSON line each.

python -m eval.speed                                # the shipped tiny model
python -m eval.speed --model FOLDER --dtype bfloat16
"""

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import unitok_mllm


SHIPPED = Path(unitok_mllm.__file__).parent / "checkpoints" / "tiny"


def median_seconds(job: Callable[[], object], runs: int = 5) -> float:
    """The median wall time of a job in seconds, after one run that is not counted."""
    job()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        job()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[runs // 2]


@torch.no_grad()
def main(
    model: Annotated[str, typer.Option(help="Folder of a unified MLLM.")] = str(SHIPPED),
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    batch: Annotated[int, typer.Option(help="Images, prompts or questions at once.")] = 16,
) -> None:
    """Times encoding, decoding, drawing (with guidance) and answering, at batch 1 and at a larger one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mllm = AutoModelForImageTextToText.from_pretrained(model, dtype=getattr(torch, dtype)).to(device).eval()
    processor = AutoProcessor.from_pretrained(model)
    size = mllm.config.visual_config.vision_config.image_size
    question = [{"type": "image", "image": Image.new("RGB", (size, size), "red")}, {"type": "text", "text": "what?"}]
    settings = {"dtype": dtype, "device": device, "threads": torch.get_num_threads(), "machine": platform.machine()}
    for n in dict.fromkeys((1, batch)):
        pixels = torch.rand(n, 3, size, size, device=device) * 2 - 1
        codes = mllm.encode_images(pixels)
        prompts = processor(text=["a red circle"] * n, generation_mode="image").to(device)
        answers = processor.apply_chat_template(
            [[{"role": "user", "content": question}]] * n, add_generation_prompt=True, tokenize=True, return_dict=True
        ).to(device)
        jobs = {
            "encode": lambda: mllm.encode_images(pixels),  # noqa: B023 - each job runs in its own iteration
            "decode": lambda: mllm.decode_images(codes),  # noqa: B023
            "draw, guidance 3": lambda: mllm.generate(**prompts, generation_mode="image", guidance_scale=3.0),  # noqa: B023
            "first answer token": lambda: mllm.generate(**answers, max_new_tokens=1, do_sample=False),  # noqa: B023
        }
        for name, job in jobs.items():
            seconds = median_seconds(job)
            row = {"job": name, "batch": n, "seconds": round(seconds, 4), "per_second": round(n / seconds, 1)}
            print(json.dumps(row | settings), flush=True)


if __name__ == "__main__":
    typer.run(main)
