"""Images and captions for the visual tokenizer's training (UniTok, https://arxiv.org/abs/2502.20321).

A source is one entry of a config's `datasets`:

    kind: folder                   # a .jsonl, .json or .parquet of {"image", "caption"}, image paths relative to it;
    path: data/captions.jsonl      # or a folder with captions.jsonl; or a folder of images with a .txt beside each
    repeat: 3                      # passes over the source in an epoch
    in_memory: true                # keep the processed pixels in memory: for small sets that are read often

    kind: hf                       # a data set on the hub, or a folder written by `save_to_disk`
    path: owner/name
    name: default                  # its configuration
    split: train
    image_column: image
    caption_column: caption

    kind: webdataset               # a stream of tar shards with jpg, png or webp, and txt
    shards: "data/{00000..00099}.tar"
    samples_per_epoch: 1000000     # over all processes
    resampled: true                # sample shards with replacement, forever; false: each sample once per epoch
    shuffle: 1000                  # size of the blocks in which a worker shuffles samples

Each source may also set `random_crop`, `horizontal_flip` and `max_shift` (see `ImageTextTransform`).
"""

import bisect
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, count, islice
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

import datasets
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from torchvision.transforms import v2
from transformers import PreTrainedTokenizerBase
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys
from webdataset.utils import pytorch_worker_info

from training.arguments import TRUST_CONFIG, TRUSTED
from training.errors import check_keys
from training.files import IMAGE_SUFFIXES, BrokenSamples, decode_image, read_rows
from training.progress import SharedClock
from training.shards import BROKEN_SHARD, shard_files
from unitok_mllm.image_processing_unitok import UniTokImageProcessor, load_image


# URL schemes of shards that are read without running a command. A single letter is a Windows drive.
SCHEMES = ("file", "http", "https")
CROP_SCALE = (0.9, 1.0)  # share of the area in a random crop; large, since captions describe the whole picture
CHANGES = ("random_crop", "horizontal_flip", "max_shift")  # options of the transform that a source may override
OPTIONS = {  # options of each kind of source; True: required
    "folder": {"path": True, "repeat": False, "in_memory": False},
    "hf": {
        "path": True,
        "name": False,
        "split": False,
        "image_column": False,
        "caption_column": False,
        "repeat": False,
    },
    "webdataset": {"shards": True, "samples_per_epoch": True, "resampled": False, "shuffle": False},
}


def sample_seed(*parts: int | str) -> int:
    """Derive one seed from several numbers or names, such as (seed, epoch, index)."""
    return random.Random(repr(parts)).getrandbits(63)


@contextmanager
def random_numbers(seed: int) -> Iterator[None]:
    """Seed torch's random numbers on the CPU within the block, and restore their state after it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def augmentation(image_processor: UniTokImageProcessor, horizontal_flip: bool, max_shift: int) -> nn.Module:
    """Build the random augmentation of processed pixels (3, H, W).

    Args:
        image_processor: image processor, whose size is H and W.
        horizontal_flip: mirror half of the images.
        max_shift: largest shift in pixels, horizontally and vertically; border pixels are repeated.

    Raises:
        ValueError: `max_shift` is negative.
    """
    if max_shift < 0:
        raise ValueError(f"max_shift must be at least 0 pixels, got {max_shift}.")
    size = image_processor.size["height"], image_processor.size["width"]
    steps = [v2.RandomHorizontalFlip()] if horizontal_flip else []
    if max_shift:
        steps.append(v2.RandomCrop(size, padding=max_shift, padding_mode="edge"))
    return nn.Sequential(*steps)


@dataclass
class ImageTextTransform:
    """Convert a picture and its caption to a training sample.

    Args:
        image_processor: image processor of the visual tokenizer.
        text_tokenizer: tokenizer of the text tower.
        max_text_length: T, length of the text tower; longer captions are truncated, and keep their end token.
        random_crop: whether to replace the processor's own resizing by a random crop of 90 to 100% of the area, with
            an aspect ratio between 3:4 and 4:3; suits photographs.
        horizontal_flip: see `augmentation`.
        max_shift: see `augmentation`.

    Raises:
        ValueError: the text tokenizer has no end or no padding token, or `max_shift` is negative.
    """

    image_processor: UniTokImageProcessor
    text_tokenizer: PreTrainedTokenizerBase
    max_text_length: int
    random_crop: bool = False
    horizontal_flip: bool = False
    max_shift: int = 0

    def __post_init__(self):
        if self.text_tokenizer.eos_token_id is None or self.text_tokenizer.pad_token_id is None:
            raise ValueError("The text tokenizer needs an end token (eos_token) and a padding token (pad_token).")
        size = self.image_processor.size["height"], self.image_processor.size["width"]
        self.crop = v2.RandomResizedCrop(size, scale=CROP_SCALE, interpolation=v2.InterpolationMode.BICUBIC)
        self.augment = augmentation(self.image_processor, self.horizontal_flip, self.max_shift)

    def __call__(self, image: Image.Image, caption: str | None, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Convert an image and its caption to a sample.

        Args:
            image: any image that `load_image` accepts.
            caption: its caption.
            generator: source of the random numbers; one number is drawn from it.

        Returns:
            `pixel_values` (3, H, W), float32 in [-1, 1]; `input_ids` (T,), int64, padded on the right.

        Raises:
            ValueError: there is no caption, or the picture is broken or too elongated.
        """
        return self.change(self.prepare(image, caption), generator)

    def prepare(self, image: Image.Image, caption: str | None) -> dict[str, torch.Tensor | Image.Image]:
        """Run the deterministic part of `__call__`. With `random_crop`, `pixel_values` is still a picture."""
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"expected a caption, got {caption!r}")
        image = load_image(image)
        pixels = image if self.random_crop else self.image_processor(image)["pixel_values"][0]
        return {"pixel_values": pixels, "input_ids": self.encode(caption)}

    def change(self, sample: dict, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Run the random part of `__call__` on the result of `prepare`."""
        pixels = sample["pixel_values"]
        with random_numbers(int(torch.randint(2**63 - 1, (), generator=generator))):
            if self.random_crop:
                pixels = self.image_processor(self.crop(pixels), do_resize=False)["pixel_values"][0]
            pixels = self.augment(pixels)
        return sample | {"pixel_values": pixels}

    def encode(self, caption: str) -> torch.Tensor:
        """Encode a caption to ids (T,): tokens, end token, padding. Special tokens spelled in it become plain text."""
        end, length = self.text_tokenizer.eos_token_id, self.max_text_length
        options = {"truncation": True, "max_length": length, "split_special_tokens": True}
        ids = self.text_tokenizer(caption, **options)["input_ids"]
        if ids[-1:] != [end]:
            ids = [*ids[: length - 1], end]
        return torch.tensor(ids + [self.text_tokenizer.pad_token_id] * (length - len(ids)))


class ImageFiles:
    """Captioned images of a `folder` source.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the source has no images.
    """

    def __init__(self, path: str):
        self.path, self.rows, self.images = Path(path), None, None
        if self.path.is_dir() and (self.path / "captions.jsonl").is_file():
            self.path = self.path / "captions.jsonl"
        if self.path.is_dir():
            self.images = sorted(p for p in self.path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        else:
            self.rows = read_rows(self.path)
        if not len(self):
            raise ValueError(f"{self.path} has no images.")

    def __len__(self) -> int:
        return len(self.images if self.rows is None else self.rows)

    def name(self, index: int) -> str:
        if self.images is not None:
            return str(self.images[index])
        return f"{self.rows[index].get('image')} in row {index} of {self.path}"

    def load(self, index: int) -> tuple[Image.Image, str | None]:
        """Load an image and its caption; raises ValueError if the image is broken or missing."""
        if self.images is not None:
            text = self.images[index].with_suffix(".txt")
            return load_image(self.images[index]), text.read_text("utf-8") if text.is_file() else None
        row = self.rows[index]
        if not row.get("image"):
            raise ValueError("the row has no image")
        image, caption = row["image"], row.get("caption")
        if not isinstance(image, str) or not isinstance(caption, str | None):
            raise ValueError(f"image and caption must be strings, got {image!r:.80} and {caption!r:.80}")
        return load_image(self.path.parent / image), caption


class DatasetImages:
    """Captioned images of an `hf` source.

    Raises:
        ValueError: a column is missing.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        split: str = "train",
        image_column: str = "image",
        caption_column: str = "caption",
    ):
        if (Path(path) / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(path)[split]
        elif (Path(path) / "state.json").is_file():
            rows = datasets.load_from_disk(path)
        else:
            rows = datasets.load_dataset(path, name, split=split)
        columns = [image_column, caption_column]
        if missing := set(columns) - set(rows.column_names):
            raise ValueError(f"{path} has the columns {rows.column_names}, but no {', '.join(sorted(missing))}.")
        self.rows = rows.select_columns(columns).cast_column(image_column, datasets.Image(decode=False))
        self.path, self.columns = f"{path} ({split})", columns

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"row {index} of {self.path}"

    def load(self, index: int) -> tuple[Image.Image, str | None]:
        """Load an image and its caption; raises ValueError if the image is broken or missing."""
        image, caption = map(self.rows[index].get, self.columns)
        if image is None:
            raise ValueError("the row has no image")
        return decode_image(image["bytes"]) if image["bytes"] else load_image(image["path"]), caption


class PreparedImages:
    """Samples of a folder after `transform.prepare`, cached in memory when they are first used.

    The cache lives as long as the process, so that a second training on the same folder uses it too.
    """

    kept: ClassVar[dict[tuple, dict[int, dict]]] = {}

    def __init__(self, source: ImageFiles, transform: ImageTextTransform):
        self.source, self.transform = source, transform
        processor, tokenizer = transform.image_processor, transform.text_tokenizer
        key = str(source.path), processor.to_json_string(), tokenizer.name_or_path, transform.max_text_length
        self.samples = self.kept.setdefault(key, {})

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def load(self, index: int) -> tuple[dict]:
        """Return the argument of `transform.change` in a tuple; raises ValueError if the image is broken or missing."""
        if index not in self.samples:
            self.samples[index] = self.transform.prepare(*self.source.load(index))
        return (self.samples[index],)


class EpochDataset(Dataset):
    """A data set whose epoch is in shared memory, so that persistent DataLoader workers see it change.

    Args:
        seed: seed of everything random.

    Attributes:
        clock: measures the time of decoding and preparing samples.
    """

    def __init__(self, seed: int):
        self.seed, self.clock = seed, SharedClock()
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch before it begins. Seed and epoch determine all random choices."""
        self._epoch.fill_(epoch)


class ImageTextDataset(EpochDataset):
    """The samples of `folder` and `hf` sources, one source after the other.

    A sample depends only on (seed, epoch, index), not on workers, processes or resuming. Its key is its index in the
    current epoch, or (epoch, index) for samplers over several epochs. A broken sample is replaced by the next readable
    one.

    Args:
        parts: sources with their transforms. A transform is called with what the source loads and a generator. A
            repeated source is listed several times.
        seed: seed of all random choices.
        max_broken_share: see `BrokenSamples`.
    """

    def __init__(
        self,
        parts: list[tuple[ImageFiles | DatasetImages | PreparedImages, Callable]],
        seed: int,
        max_broken_share: float = 0.01,
    ):
        super().__init__(seed)
        self.parts = parts
        self.ends = list(accumulate(len(source) for source, _ in parts))
        self.broken = BrokenSamples(max_broken_share, minimum=min(100, len(self)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, torch.Tensor]:
        """Return the sample of an index, or of (epoch, index); see `ImageTextTransform`.

        Raises:
            IndexError: there is no such index.
            ValueError: too many samples are broken.
        """
        epoch, index = key if isinstance(key, tuple) else (self.epoch, key)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} samples")
        generator = torch.Generator().manual_seed(sample_seed(self.seed, epoch, index))
        for place in (*range(index, len(self)), *range(index)):
            part = bisect.bisect_right(self.ends, place)
            source, transform = self.parts[part]
            row = place - self.ends[part] + len(source)
            try:
                with self.clock.measured():
                    sample = transform(*source.load(row), generator)
            except ValueError as error:
                self.broken.count_broken(source.name(row), error)
                continue
            self.broken.count()
            return sample
        raise ValueError(f"None of the {len(self)} samples can be read.")


def check_shards(shards: list[str]) -> None:
    """Check that no shard is the output of a command, unless the config is trusted.

    Raises:
        ValueError: a shard is not a file or a web address, but runs a command ("pipe:...", "gs:..."), and the config is
            not trusted (`--trust_config`).
    """
    schemes = {shard: urlsplit(shard).scheme for shard in shards}
    commands = [shard for shard, scheme in schemes.items() if len(scheme) > 1 and scheme not in SCHEMES]
    if commands and not os.environ.get(TRUSTED):
        raise ValueError(
            f"the shard {commands[0]!r:.200} is the output of a command: trust the config with {TRUST_CONFIG}"
        )


class ImageTextStream(EpochDataset, IterableDataset):
    """The samples of a `webdataset` source, in an order that the seed determines.

    Each worker of each process (torch's, or RANK and WORLD_SIZE in the environment) reads its own lane. With `resampled`,
    a lane is endless: it picks one random shard after another, and reads each to its end. Otherwise each epoch has
    every sample exactly once, and its shards are distributed over the lanes anew; processes then end at slightly
    different times. A lane is shuffled block by block.

    To resume exactly, the consumer passes the `stream_position` of the last sample that it used to `record`. The next
    iteration continues after that sample, also in another process, through `state_dict` and `load_state_dict`. It
    reads the current shard and one block again. The number of workers must stay the same.

    Args:
        shards: paths or URLs, with `{00..99}` for many, or a list of them.
        transform: transform of each sample. Its random numbers depend only on the seed and the sample's position.
        seed: seed of all orders and random numbers.
        samples_per_epoch: samples in an epoch over all processes; the stream itself does not use it.
        resampled: whether to sample shards with replacement, forever.
        shuffle: number of samples in a block, which are kept undecoded in memory; 0 to keep the order of the shard.
        max_broken_share: see `BrokenSamples`; a truncated shard counts as a sample or two.

    Raises:
        ValueError: there are no shards, `samples_per_epoch` is below 1, or `shuffle` is negative.
    """

    def __init__(
        self,
        shards: str | list[str],
        transform: ImageTextTransform,
        seed: int,
        samples_per_epoch: int,
        resampled: bool = False,
        shuffle: int = 1000,
        max_broken_share: float = 0.01,
    ):
        super().__init__(seed)
        self.shards = expand_urls(shards) if isinstance(shards, str) else shards
        check_shards(self.shards)
        if not self.shards or samples_per_epoch < 1 or shuffle < 0:
            raise ValueError(
                f"A stream needs at least 1 shard, samples_per_epoch of at least 1 and shuffle of at least 0, got "
                f"{len(self.shards)} shards, {samples_per_epoch} and {shuffle}."
            )
        self.transform, self.samples_per_epoch = transform, samples_per_epoch
        self.resampled, self.shuffle = resampled, shuffle
        self.broken = BrokenSamples(max_broken_share)
        # by lane: epoch, shard and sample at which the block begins, and number of its samples already used
        self.positions: dict[int, list[int]] = {}
        self.next_lane = 0

    def record(self, position: torch.Tensor) -> None:
        """Record the `stream_position` (5,) of a used sample. The stream continues with the next lane."""
        lane, *self.positions[lane] = position.tolist()
        self.next_lane = lane + 1

    def state_dict(self) -> dict:
        """Return the positions of this process's lanes."""
        return {"epoch": self.epoch, "positions": dict(self.positions), "next_lane": self.next_lane}

    def load_state_dict(self, state: dict) -> None:
        self.set_epoch(state["epoch"])
        self.positions, self.next_lane = dict(state["positions"]), state["next_lane"]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Iterate over the samples of one lane.

        Returns:
            Samples of `ImageTextTransform`, with `stream_position` (5,), int64, for `record`.

        Raises:
            ValueError: too many samples are broken, or there are fewer shards than processes.
            FileNotFoundError: a shard is missing.
        """
        rank, world_size, worker, workers = pytorch_worker_info()
        lane = (self.next_lane + worker) % workers  # a DataLoader takes the first batch from worker 0
        epoch = 0 if self.resampled else self.epoch
        if self.resampled:
            draws = (sample_seed(self.seed, rank, lane, draw) % len(self.shards) for draw in count())
            shards = (self.shards[draw] for draw in draws)
        elif len(self.shards) < world_size:
            raise ValueError(f"{len(self.shards)} shards are too few for {world_size} processes: set resampled: true.")
        else:
            order = random.Random(sample_seed(self.seed, epoch)).sample(self.shards, len(self.shards))
            shards = iter(order[rank::world_size][lane::workers])
        of_epoch, shard, first, used = self.positions.get(lane, (epoch, 0, 0, 0))
        if of_epoch != epoch:
            shard = first = used = 0
        samples = self._read(islice(enumerate(shards), shard, None), first)
        return self._transformed(self._shuffled(samples, used, (rank, lane, epoch)))

    def _read(self, shards: Iterator[tuple[int, str]], first: int) -> Iterator[tuple[int, int, dict]]:
        """Iterate over raw samples with their place (shard, index), starting at sample `first` of the first shard."""
        for shard, url in shards:
            samples = group_by_keys(self._files(url), handler=self._skip_shard)
            for index, sample in islice(enumerate(samples), first, None):
                yield shard, index, sample
            first = 0

    def _files(self, url: str) -> Iterator[dict]:
        """Iterate over the files of a shard as far as it is readable."""
        try:
            yield from shard_files(url)
        except BROKEN_SHARD as error:
            error.args = (*error.args, url)
            self._skip_shard(error)

    def _shuffled(
        self, samples: Iterator[tuple[int, int, dict]], used: int, stream: tuple[int, int, int]
    ) -> Iterator[tuple[dict, torch.Tensor, torch.Generator]]:
        """Shuffle the samples within each block, and skip the first `used` ones of the first block.

        Args:
            samples: raw samples with their place.
            used: number of samples of the first block that were already used.
            stream: (process, lane, epoch).

        Returns:
            Each sample with the position after it and the generator of its random numbers.
        """
        while block := list(islice(samples, max(1, self.shuffle))):
            place = block[0][:2]
            random.Random(sample_seed(self.seed, *stream, *place)).shuffle(block)
            for number in range(used, len(block)):
                position = torch.tensor([*stream[1:], *place, number + 1])
                generator = torch.Generator().manual_seed(sample_seed(self.seed, *stream, *place, number))
                yield block[number][2], position, generator
                block[number] = None
            used = 0

    def _skip_shard(self, error: Exception) -> bool:
        if isinstance(error, FileNotFoundError):
            raise error
        self.broken.count_broken("the rest of a shard", " ".join(map(str, error.args)))
        return True

    def _transformed(
        self, samples: Iterator[tuple[dict, torch.Tensor, torch.Generator]]
    ) -> Iterator[dict[str, torch.Tensor]]:
        for sample, position, generator in samples:
            try:
                images = [sample[suffix[1:]] for suffix in IMAGE_SUFFIXES if suffix[1:] in sample]
                if not images:
                    raise ValueError("the sample has no image")
                caption = sample["txt"].decode() if "txt" in sample else None
                with self.clock.measured():
                    transformed = self.transform(decode_image(images[0]), caption, generator)
            except ValueError as error:
                self.broken.count_broken(f"{sample['__key__']} of {sample['__url__']}", error)
                continue
            self.broken.count()
            yield transformed | {"stream_position": position}
        self.broken.check()


def build_image_text_dataset(
    source: dict | list[dict], transform: ImageTextTransform, seed: int, max_broken_share: float = 0.01
) -> ImageTextDataset | ImageTextStream:
    """Build the data set of one or more sources, see the module's docstring.

    Args:
        source: one source, or several to concatenate. A webdataset source must be the only one.
        transform: transform of all samples; a source may override its options.
        seed: seed of orders and augmentation.
        max_broken_share: share of broken samples above which the run stops.

    Raises:
        ValueError: there is no source, a kind or option is unknown, an option is missing, or a webdataset source is
            one of several.
    """
    sources = [source] if isinstance(source, dict) else source
    kinds = [one.get("kind") for one in sources]
    if not sources or "webdataset" in kinds and len(kinds) > 1:
        raise ValueError(f"The sources must be one webdataset, or any number of other kinds, got {kinds}.")
    parts = []
    for one in sources:
        kind = one.get("kind")
        if kind not in OPTIONS:
            raise ValueError(f"kind must be one of {', '.join(OPTIONS)}, got {kind!r} in {one}.")
        changes = {name: value for name, value in one.items() if name in CHANGES}
        options = {name: value for name, value in one.items() if name not in changes and name != "kind"}
        check_keys(f"a {kind} source", options, [*OPTIONS[kind], *CHANGES])
        missing = {name for name, required in OPTIONS[kind].items() if required} - options.keys()
        if missing:
            raise ValueError(f"A {kind} source needs {', '.join(sorted(missing))}, got {one}.")
        changed = replace(transform, **changes)
        if kind == "webdataset":
            return ImageTextStream(transform=changed, seed=seed, max_broken_share=max_broken_share, **options)
        repeat = options.pop("repeat", 1)
        if repeat < 1:
            raise ValueError(f"repeat must be at least 1, got {repeat} in {one}.")
        in_memory = options.pop("in_memory", False)
        images = ImageFiles(**options) if kind == "folder" else DatasetImages(**options)
        if in_memory and changed.random_crop:
            raise ValueError(f"in_memory keeps processed pixels: it does not work with random_crop, got {one}.")
        if in_memory:
            images, changed = PreparedImages(images, changed), changed.change
        parts += [(images, changed)] * repeat
    return ImageTextDataset(parts, seed, max_broken_share)
