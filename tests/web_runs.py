"""A model that visitors share, and what its tests ask of it."""

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from unitok_mllm.serving import UniTokEngine


BOI, EOS = 3, 2
L = 9
DRAWING = {"guidance_scale": 2.0, "seed": 4}


def red_circle() -> Image.Image:
    picture = Image.new("RGB", (64, 64), "lavender")
    ImageDraw.Draw(picture).ellipse((20, 16, 44, 40), fill="red")
    return picture


def pixels(picture: Image.Image) -> list:
    return np.asarray(picture).tolist()


async def collect(items: AsyncIterator) -> list:
    return [item async for item in items]


@contextmanager
def slow_steps(engine: UniTokEngine, seconds: float) -> Iterator[None]:
    step = engine.step

    def slow_step() -> None:
        time.sleep(seconds)
        step()

    engine.step = slow_step
    try:
        yield
    finally:
        engine.step = step


def question(text: str, *pictures: Image.Image) -> dict:
    images = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def are_alike(some: list[Image.Image], others: list[Image.Image]) -> bool:
    """Whether pictures differ by one level at most: another process or batch rounds otherwise."""
    differences = [ImageChops.difference(*pair).getextrema() for pair in zip(some, others, strict=True)]
    return max(most for extrema in differences for _, most in extrema) <= 1


def memory(key: str = "VmRSS") -> int:
    """Bytes that this process has, or had at most (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))
