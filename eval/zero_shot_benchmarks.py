"""Benchmarks of `eval.zero_shot`: images in folders of classes, easy-VQA, and the emoji."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from eval.images import FolderImages
from training import easy_vqa
from training.emoji import STYLES, TABLE, Emoji, read_table
from unitok_mllm.image_processing_unitok import load_image


SYNSET = re.compile(r"n\d{8}")
TEMPLATES = {"openai": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}  # open_clip's


@dataclass
class Benchmark:
    """N images and their possible classes.

    Attributes:
        title: name of the benchmark.
        classes: names of the C classes.
        templates: functions that turn a name into a prompt.
        images: paths of the N images.
        labels: class index of each image.
        parts: part of the benchmark to which each image belongs.
        totals: number of images of each part on disk, if only some of them are used.
    """

    title: str
    classes: Sequence[str]
    templates: Sequence[Callable[[str], str]]
    images: list[str]
    labels: list[int]
    parts: list[str]
    totals: Counter = field(default_factory=Counter)

    @property
    def names(self) -> list[str]:
        return self.images

    def __getitem__(self, index: int) -> Image.Image:
        """Read the picture; raises ValueError if it cannot be read."""
        return load_image(self.images[index])

    def only(self, rows: list[int]) -> "Benchmark":
        """Return the benchmark with only these images."""
        images, labels, parts = ([values[i] for i in rows] for values in (self.images, self.labels, self.parts))
        return replace(self, images=images, labels=labels, parts=parts)

    def limited(self, limit: int | None) -> "Benchmark":
        """Return the benchmark with at most this number of images per part, evenly spread."""
        rows = []
        for part in dict.fromkeys(self.parts):
            own = [i for i, name in enumerate(self.parts) if name == part]
            count = min(limit or len(own), len(own))
            rows += [own[i * len(own) // count] for i in range(count)]
        return replace(self.only(rows), totals=Counter(self.parts))


def class_folders(folder: str, templates: str) -> Benchmark:
    """Find images in folders named after their classes, or after ImageNet's 1000 synsets.

    Raises:
        ValueError: there is no folder or no images, an image is outside of the classes' folders, a class has no
            images, there are fewer than two classes or two of the same name, or the synsets are not ImageNet's 1000.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"there is no image folder {folder}")
    import open_clip  # slow: keep `--help` and error messages quick

    images = FolderImages(folder)
    if images.labels is None:
        stray = next(name for name in images.names if "/" not in name)
        raise ValueError(f"{folder}/{stray} lies in no class's folder")
    folders = [path.name for path in Path(folder).iterdir() if path.is_dir() and not path.name.startswith(".")]
    if empty := sorted(set(folders) - set(images.class_names)):
        raise ValueError(f"{folder}/{empty[0]} has no images")
    title, part, classes = Path(folder).resolve().name, "all", images.class_names
    if all(map(SYNSET.fullmatch, classes)):
        if len(classes) != len(open_clip.IMAGENET_CLASSNAMES):
            raise ValueError(
                f"{folder} has {len(classes)} synsets, ImageNet has {len(open_clip.IMAGENET_CLASSNAMES)}: name the "
                "folders of other classes by words"
            )
        title, part, classes = "ImageNet", "validation", open_clip.IMAGENET_CLASSNAMES
    else:
        classes = [name.replace("_", " ") for name in classes]
        if twice := [name for name, count in Counter(classes).items() if count > 1]:
            raise ValueError(f"{folder} has two folders for the class {twice[0]!r}")
        if len(classes) < 2:
            raise ValueError(f"{folder} has one class, {classes[0]!r}: there is nothing to choose")
    paths = [f"{folder}/{name}" for name in images.names]
    if templates in TEMPLATES:
        prompts = getattr(open_clip, TEMPLATES[templates])
    else:
        prompts = [lambda name: templates.replace("{}", name)]
    return Benchmark(title, classes, prompts, paths, images.labels, [part] * len(paths))


def colored_shapes() -> Benchmark:
    """Load easy-VQA's test images whose questions reveal colour and shape."""
    classes = [f"{color} {shape}" for color in easy_vqa.COLORS for shape in easy_vqa.SHAPES]
    template = "a {}".format
    labels = {template(name): label for label, name in enumerate(classes)}
    samples = [sample for sample in easy_vqa.load("test") if sample.caption in labels]
    return Benchmark(
        "easy-VQA, 24 pairs of colour and shape",
        classes,
        [template],
        [str(sample.image) for sample in samples],
        [labels[sample.caption] for sample in samples],
        ["test"] * len(samples),
    )


def emoji(folder: str) -> Benchmark:
    """Load the emoji in both styles; the part "held_out" was never trained on.

    Raises:
        ValueError: the folder has no table of emoji, or fewer than two names.
    """
    if not (Path(folder) / TABLE).is_file():
        raise ValueError(f"{folder} has no {TABLE}: python -m training.prepare_data emoji {folder}")
    pictures = read_table(Path(folder))
    classes = list(dict.fromkeys(picture.name for picture in pictures))
    if len(classes) < 2:
        raise ValueError(f"{folder} has {len(classes)} names of emoji: there is nothing to choose")
    numbers = {name: number for number, name in enumerate(classes)}
    return Benchmark(
        "emoji of two styles",
        classes,
        [Emoji("", "{}", style, "", False).caption.format for style in STYLES],
        [f"{folder}/{picture.image}" for picture in pictures],
        [numbers[picture.name] for picture in pictures],
        ["held_out" if picture.held_out else "seen" for picture in pictures],
    )
