"""The demo of `unitok-mllm demo`: a model reads, answers, draws and recolors, all on one picture."""

from collections.abc import Callable
from typing import Any

from PIL import Image

from .image_processing_unitok import load_image
from .inference import answer_questions, draw_images, edit_images, psnr, reconstruct_images, sampling_options
from .sheet import (
    COLORS,
    EMOJI,
    EMOJI_STYLES,
    SHAPES,
    Answer,
    Reading,
    Section,
    choose_questions,
    make_sheet,
    summary,
)


def make_demo(
    model: Any,
    processor: Any,
    name: str,
    easy_vqa: Any,
    num_images: int,
    guidance: float | None,
    seed: int,
    tell: Callable[[str], None],
) -> tuple[Image.Image, str]:
    """Run the demo.

    Args:
        model: an MLLM.
        processor: its processor.
        name: name of the model on the picture.
        easy_vqa: the package with the test images.
        num_images: number of images to read.
        guidance: guidance scale of the drawings of shapes; None for the model's own.
        seed: of the test images and of the drawings.
        tell: called with a line of text before each stage.

    Returns:
        The picture, and the outcome in words.
    """
    chosen = choose_questions(easy_vqa, num_images, seed)
    pictures = [load_image(path) for path in chosen]
    tell(f"reading {num_images} images")
    originals, reconstructions, num_codes = reconstruct_images(model.visual, processor.image_processor, pictures)
    asked = [(picture, question) for picture, rows in zip(pictures, chosen.values()) for question, _ in rows]
    tell(f"answering {len(asked)} questions")
    answers = iter(answer_questions(model, processor, asked, max_new_tokens=8))
    readings = [
        Reading(*pair, psnr(*pair), [Answer(question, next(answers), truth) for question, truth in rows])
        for *pair, rows in zip(originals, reconstructions, chosen.values())
    ]
    sections = _drawings(model, processor, pictures, guidance, seed, tell)
    subtitle = f"{name}.  Images and questions: easy-VQA's test split, picked by seed {seed}."
    sheet = make_sheet("UniTok: one model reads images and draws them", subtitle, readings, sections)
    return sheet, summary(readings, sections, num_codes)


def _drawings(
    model: Any,
    processor: Any,
    pictures: list[Image.Image],
    guidance: float | None,
    seed: int,
    tell: Callable[[str], None],
) -> list[Section]:
    def draw(prompts: list[str], count: int, **options: Any) -> list[tuple[Image.Image, ...]]:
        tell(f"drawing {len(prompts) * count} pictures")
        drawn = draw_images(model, processor, prompts, count, **options)
        return list(zip(drawn[::2], drawn[1::2]))

    greedy = {"do_sample": False, "guidance_scale": 1.0}  # guidance degrades pictures that the model has memorised
    shapes = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]
    shape_pairs = draw(shapes, 2, **sampling_options(model, guidance_scale=guidance, seed=seed))
    named = [f"{name} emoji, {style} style" for name in EMOJI for style in EMOJI_STYLES]
    emoji_pairs = draw(named, 1, **greedy)
    requests = [(pictures[i % len(pictures)], f"make it {color}") for i, color in enumerate(COLORS)]
    edits = zip(requests, edit_images(model, processor, requests, **greedy))
    return [
        Section(
            "It draws", "the first two samples of each prompt, none picked by hand", list(zip(shapes, shape_pairs))
        ),
        Section(
            "It draws emoji",
            f"each name in two styles, {' and '.join(EMOJI_STYLES)}; it was never shown the second apple",
            list(zip(EMOJI, emoji_pairs)),
        ),
        Section("It recolors", "a test image, and what it became", [(text, (old, new)) for (old, text), new in edits]),
    ]
