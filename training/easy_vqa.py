"""easy-VQA (PyPI `easy-vqa`, MIT): 4000 + 1000 images of one coloured shape, with 38,575 + 9,673 questions.

https://github.com/vzhou842/easy-VQA
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import easy_vqa
import numpy as np
from PIL import Image

from unitok_mllm.sheet import RGB as BY_NAME
from unitok_mllm.sheet import SHAPES, question_kind  # noqa: F401


RGB = dict(sorted(BY_NAME.items()))
COLORS = tuple(RGB)
KINDS = ("yes/no", "color", "shape")
VALIDATION_EVERY = 10  # every n-th image of the train split is for validation, the others are "fit"


@dataclass
class Sample:
    """One image with its (question, answer) pairs.

    `caption` says what can be inferred from the pairs, such as "a red circle"; if they do not determine the colour or
    the shape, "a circle" or "a red shape".
    """

    image: Path
    caption: str
    questions: list[tuple[str, str]]


def _value(words: tuple[str, ...], questions: list[tuple[str, str]]) -> str | None:
    """Return the only shape or colour that fits an image's questions and answers; None if several do."""
    possible = set(words)
    for question, answer in questions:
        mentioned = possible.intersection(question.rstrip("?").split())
        if answer in words:
            possible &= {answer}
        elif mentioned and answer in ("yes", "no"):
            negated = " not " in question or " no " in question
            possible = possible & mentioned if (answer == "yes") != negated else possible - mentioned
        elif mentioned:  # "what color is the circle?" reveals the shape
            possible &= mentioned
    return possible.pop() if len(possible) == 1 else None


def _caption(questions: list[tuple[str, str]]) -> str:
    color, shape = _value(COLORS, questions), _value(SHAPES, questions)
    return " ".join(["a", *([color] if color else []), shape or "shape"])


def recolor(image: Image.Image, colors: list[str]) -> list[Image.Image]:
    """Recolour the shape in a picture, exactly up to rounding, including its anti-aliased edges.

    Args:
        image: picture of one shape in one of `COLORS` on a background.
        colors: names of the new colours, each one of `COLORS`.

    Returns:
        One picture for each colour.

    Raises:
        ValueError: the picture does not show such a shape.
    """
    image = image.convert("RGB")
    by_count = [color for _, color in sorted(image.getcolors(image.width * image.height), reverse=True)]
    shape = next((np.array(c, dtype=float) for c in by_count if c in RGB.values()), None)
    background = next((np.array(c, dtype=float) for c in by_count if c not in RGB.values()), None)
    if shape is None or background is None:
        raise ValueError("The picture is no shape in one of easy-VQA's colours on a background.")
    difference = shape - background
    opacity = ((np.asarray(image) - background) @ difference / difference.dot(difference)).clip(0, 1)[..., None]
    new = (background + opacity * (np.array(RGB[color]) - background) for color in colors)
    return [Image.fromarray(pixels.round().astype(np.uint8)) for pixels in new]


def split_train(rows: Sequence) -> dict[str, list]:
    """Split rows about the images of the train split, in their order, into those of "fit" and those of "validation"."""
    parts = {"fit": [], "validation": []}
    for number, row in enumerate(rows):
        parts["fit" if number % VALIDATION_EVERY else "validation"].append(row)
    return parts


def load(split: str) -> list[Sample]:
    """Load the "train" or "test" split, or the "fit" or "validation" part of "train", in the order of the image numbers.

    Raises:
        ValueError: there is no such split.
    """
    if split in ("fit", "validation"):
        return split_train(load("train"))[split]
    if split == "train":
        paths, rows = easy_vqa.get_train_image_paths(), easy_vqa.get_train_questions()
    elif split == "test":
        paths, rows = easy_vqa.get_test_image_paths(), easy_vqa.get_test_questions()
    else:
        raise ValueError(f"easy-VQA has the splits 'train' and 'test', not {split!r}.")
    questions = defaultdict(list)
    for question, answer, number in zip(*rows, strict=True):
        questions[number].append((question, answer))
    return [Sample(Path(paths[n]), _caption(questions[n]), questions[n]) for n in sorted(paths)]
