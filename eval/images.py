"""Images for evaluation, in a fixed order and with stable names, from any kind of storage.

    open_images("photos")                            # all images below a folder
    open_images("imagenet/val")                      # class folders: with labels, by the sorted names of the folders
    open_images("shards/{000..009}.tar")             # webdataset shards; with labels if every sample has a `.cls`
    open_images("saved")                             # a Hugging Face data set written by `save_to_disk`
    open_images("owner/name", split="validation")    # a data set on the hub

`images[i]` is a picture, `images.names[i]` its name and `images.labels[i]` its class, if there are classes.
`load_batches` preprocesses them. `choose` selects a subset, and `deal_out` divides it among processes.
"""

import glob
import hashlib
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import datasets
import torch
from accelerate import PartialState
from braceexpand import braceexpand
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from training.files import IMAGE_SUFFIXES, decode_image
from training.shards import tar_members
from unitok_mllm.image_processing_unitok import load_image


SUFFIXES = (*IMAGE_SUFFIXES, ".bmp", ".gif", ".tif", ".tiff")


class UnreadableImage(ValueError):
    """An image is missing or broken, or the image processor refuses it; the message names it."""


def stamp(path: str | os.PathLike) -> str:
    """Return a string that identifies the version of a file: its size and modification time."""
    status = os.stat(path)
    return f"{status.st_size} {status.st_mtime_ns}"


class EvalImages(ABC):
    """An indexable sequence of images.

    Attributes:
        location: where the images are, see `open_images`.
        names: unique name of each image, with `/` between parts.
        labels: class index of each image; None if there are no classes.
        class_names: name of each class; None if they have no names.
        stamps: a value for each image that changes when its file does.

    Raises:
        ValueError: there are no images, or two with the same name.
    """

    def __init__(
        self,
        location: str,
        names: list[str],
        labels: list[int] | None,
        class_names: list[str] | None,
        stamps: list[str],
    ):
        if not names:
            raise ValueError(f"{location} has no images ({', '.join(SUFFIXES)})")
        if len(set(names)) < len(names):
            raise ValueError(f"{location} has two images with the name {Counter(names).most_common(1)[0][0]}")
        self.names, self.labels, self.class_names, self.stamps = names, labels, class_names, stamps

    @abstractmethod
    def read(self, index: int) -> Image.Image:
        """Read a picture, upright and in RGB.

        Raises:
            ValueError: the picture cannot be read.
        """

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Image.Image:
        """Return a picture, upright and in RGB.

        Raises:
            UnreadableImage: the picture is missing or broken.
        """
        try:
            return self.read(index)
        except (ValueError, OSError) as error:
            raise UnreadableImage(f"{self.names[index]}: {error}") from error

    def digest(self) -> str:
        """SHA-256 of the names and stamps, which identifies the set of images."""
        return hashlib.sha256("\n".join([*self.names, *self.stamps]).encode()).hexdigest()


class FolderImages(EvalImages):
    """All images in a folder and its subfolders, sorted by path, without hidden files.

    If every image is in a subfolder, the first folder of its path is its class.
    """

    def __init__(self, location: str):
        self.location = Path(location)
        files = glob.glob("**", root_dir=location, recursive=True)
        names = sorted(Path(name).as_posix() for name in files if name.lower().endswith(SUFFIXES))
        labels = class_names = None
        if all("/" in name for name in names):
            class_names = sorted({name.partition("/")[0] for name in names})
            numbers = {name: i for i, name in enumerate(class_names)}
            labels = [numbers[name.partition("/")[0]] for name in names]
        super().__init__(location, names, labels, class_names, [stamp(self.location / name) for name in names])

    def read(self, index: int) -> Image.Image:
        return load_image(self.location / self.names[index])


class ShardImages(EvalImages):
    """The images of webdataset tar files, shard by shard in their order, named SHARD/KEY.SUFFIX.

    The shards are indexed once; images are read when they are requested.

    Raises:
        FileNotFoundError: a shard does not exist.
        ValueError: a shard is broken or has no images, or a `.cls` is not a number.
    """

    def __init__(self, location: str):
        shards = []
        for pattern in braceexpand(location):
            found = sorted(glob.glob(pattern))
            if not found:
                raise FileNotFoundError(f"there is no shard {pattern}")
            shards += found
        self.members, names, labels, stamps = [], [], [], []
        for shard in shards:
            classes, samples, places = {}, [], tar_members(shard)
            for member, (offset, size) in places.items():
                folder, _, file = member.rpartition("/")
                key = f"{folder}/{file.partition('.')[0]}"
                if member.lower().endswith(SUFFIXES):
                    samples.append(key)
                    names.append(f"{Path(shard).name}/{member}")
                    self.members.append((shard, offset, size))
                elif member.endswith(".cls"):
                    classes[key] = read_class(shard, member, offset, size)
            labels += map(classes.get, samples)
            stamps += [stamp(shard)] * len(samples)
        super().__init__(location, names, None if None in labels else labels, None, stamps)

    def read(self, index: int) -> Image.Image:
        shard, offset, size = self.members[index]
        with open(shard, "rb") as file:
            file.seek(offset)
            return decode_image(file.read(size), self.names[index])


def read_class(shard: str, member: str, offset: int, size: int) -> int:
    """Read the number in a shard's `.cls` file.

    Raises:
        ValueError: the file does not contain a number.
    """
    with open(shard, "rb") as file:
        file.seek(offset)
        text = file.read(size)
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"cannot read {shard}: {member} is not a number") from error


class DatasetImages(EvalImages):
    """The images of a Hugging Face data set by row, with labels from the column "label", if there is one.

    Raises:
        ValueError: there are several splits and none is given, or the split or the image column does not exist.
    """

    def __init__(self, location: str, split: str, config: str | None, image_column: str):
        if Path(location).is_dir():
            rows = datasets.load_from_disk(location)
            if isinstance(rows, datasets.DatasetDict):
                split = split or (next(iter(rows)) if len(rows) == 1 else "")
                if split not in rows:
                    raise ValueError(f"{location} has the splits {', '.join(rows)}, but no {split!r}")
                rows = rows[split]
        elif split:
            rows = datasets.load_dataset(location, config, split=split)
        else:
            raise ValueError(f"there is no folder {location}; a data set on the hub needs a split")
        if image_column not in rows.column_names:
            raise ValueError(f"{location} has the columns {', '.join(rows.column_names)}, but no {image_column}")
        labels = class_names = None
        if "label" in rows.column_names:
            labels = list(rows["label"])
            if isinstance(rows.features["label"], datasets.ClassLabel):
                class_names = rows.features["label"].names
        self.images = rows.select_columns(image_column).cast_column(image_column, datasets.Image(decode=False))
        self.image_column = image_column
        names = [f"{split or 'row'}/{row:08d}" for row in range(len(rows))]
        super().__init__(location, names, labels, class_names, [rows._fingerprint] * len(rows))

    def read(self, index: int) -> Image.Image:
        image = self.images[index][self.image_column]
        if image is None:
            raise ValueError("the row has no image")
        return decode_image(image["bytes"], self.names[index]) if image["bytes"] else load_image(image["path"])


def open_images(
    location: str,
    split: str = "",
    config: str | None = None,
    image_column: str = "image",
) -> EvalImages:
    """Open the images at a location: a folder, shards, or a Hugging Face data set (examples in the module's docstring).

    Args:
        location: a pattern that ends in `.tar` with `*` or `{000..009}`; a folder; or a data set's name on the hub.
        split: split of a Hugging Face data set.
        config: configuration of a Hugging Face data set.
        image_column: column of a Hugging Face data set with the images. Labels are read from the column "label".

    Raises:
        FileNotFoundError, ValueError: the location does not exist or holds no image, or an option would have no effect.
    """
    is_saved_dataset = any((Path(location) / name).is_file() for name in ("dataset_dict.json", "state.json"))
    is_of_files = location.endswith(".tar") or Path(location).is_dir() and not is_saved_dataset
    given = (split, f"--split {split}"), (image_column != "image", f"--image_column {image_column}")
    given = [option for is_given, option in given if is_given and is_of_files]
    given += [f"--config {config}"] if config and (is_of_files or is_saved_dataset) else []
    if given:
        kind = "data set on the hub" if is_saved_dataset else "Hugging Face data set"
        raise ValueError(f"{' '.join(given)} has no effect: {location} is no {kind}. Leave it out")
    if location.endswith(".tar"):
        return ShardImages(location)
    if is_of_files:
        return FolderImages(location)
    return DatasetImages(location, split, config, image_column)


def choose(total: int, limit: int | None) -> list[int]:
    """Choose at most `limit` of `total` indices, evenly spread, so that every class is represented."""
    count = min(limit or total, total)
    return [i * total // count for i in range(count)]


def deal_out(indices: list[int], state: PartialState) -> list[int]:
    """Return this process's share: every n-th item for n processes."""
    return indices[state.process_index :: state.num_processes]


@dataclass
class ImageBatch:
    """Readable images of a batch, and the errors of the others.

    Attributes:
        indices: indices of the B readable images in their sequence.
        pixel_values: pixels, (B, 3, H, W); (0,) if no image could be read.
        broken: error messages of the other images, by index.
    """

    indices: list[int]
    pixel_values: torch.Tensor
    broken: dict[int, str]


class NamedImages(Protocol):
    """Images that `load_batches` accepts: indexable, with names; an unreadable image raises ValueError."""

    names: list[str]

    def __getitem__(self, index: int) -> Image.Image: ...


Preprocess = Callable[[Image.Image], torch.Tensor]  # -> (3, H, W)


def processed(image_processor: Callable, picture: Image.Image) -> torch.Tensor:
    """Preprocess a picture with any image processor of transformers: (3, H, W). Use `partial` to get a `Preprocess`."""
    return image_processor(picture, return_tensors="pt")["pixel_values"][0]


class _Preprocessed(Dataset):
    """Data set of (index, pixels (3, H, W), None) or (index, None, message).

    Errors are returned as messages, since a worker would wrap an exception.
    """

    def __init__(self, images: NamedImages, preprocess: Preprocess, indices: list[int]):
        self.images, self.preprocess, self.indices = images, preprocess, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, torch.Tensor | None, str | None]:
        index = self.indices[position]
        try:
            return index, self.preprocess(self.images[index]), None
        except UnreadableImage as error:
            return index, None, str(error)
        except ValueError as error:
            return index, None, f"{self.images.names[index]}: {error}"


def _collate(samples: list[tuple[int, torch.Tensor | None, str | None]]) -> ImageBatch:
    pixels = [pixels for _, pixels, _ in samples if pixels is not None]
    return ImageBatch(
        indices=[index for index, pixels, _ in samples if pixels is not None],
        pixel_values=torch.stack(pixels) if pixels else torch.empty(0),
        broken={index: message for index, _, message in samples if message is not None},
    )


def load_batches(
    images: NamedImages,
    preprocess: Preprocess,
    indices: list[int],
    batch_size: int,
    workers: int = 0,
    skip_broken: bool = False,
) -> Iterator[ImageBatch]:
    """Load preprocessed images in batches, in the order of `indices`.

    Args:
        images: the images.
        preprocess: function that converts a picture to pixels (3, H, W), or raises ValueError.
        indices: indices of the images to load.
        batch_size: images per batch.
        workers: number of processes that read and preprocess ahead; 0 to do it in this process.
        skip_broken: whether to return the errors of broken images in the batch instead of raising one.

    Raises:
        UnreadableImage: an image is missing or broken, and `skip_broken` is False.
    """
    loader = DataLoader(
        _Preprocessed(images, preprocess, indices), batch_size, num_workers=workers, collate_fn=_collate
    )
    for batch in loader:
        if batch.broken and not skip_broken:
            raise UnreadableImage(next(iter(batch.broken.values())))
        yield batch
