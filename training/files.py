"""File access for trainings and evaluations: tables, pictures by name, broken samples, atomic writes."""

import glob
import hashlib
import json
import logging
import os
import re
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import datasets
import pyarrow as pa
import torch
from accelerate import Accelerator
from braceexpand import braceexpand
from PIL import Image
from torch.utils.data import get_worker_info

from training.shards import tar_members
from unitok_mllm.image_processing_unitok import load_image


logger = logging.getLogger(__name__)
BROKEN_TABLE = (ValueError, RecursionError, StopIteration, pa.ArrowException)  # StopIteration: no rows
MOST_WORKERS = 1024  # of a DataLoader
MOST_NESTED = 500  # nesting levels in a line of JSON; its reader crashes at some greater depth
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def whole_checkpoints(output_dir: str | Path, last_file: str) -> dict[int, Path]:
    """List the completely written `checkpoint-STEP` folders of a run, by step, oldest first.

    Args:
        output_dir: output folder of the run.
        last_file: name of the file that is written last. A folder without it is incomplete.
    """
    folders = (path.parent for path in Path(output_dir).glob(f"checkpoint-*/{last_file}"))
    steps = ((folder.name.removeprefix("checkpoint-"), folder) for folder in folders)
    return dict(sorted((int(step), folder) for step, folder in steps if step.isdecimal()))


def how_to_go_on(output_dir: str | os.PathLike, last_file: str, command: str) -> str:
    """Return the message of an interrupted training.

    Args:
        output_dir: output folder of the run.
        last_file: see `whole_checkpoints`.
        command: description of the command that resumes it.
    """
    checkpoints = whole_checkpoints(output_dir, last_file)
    if not checkpoints:
        return f"Interrupted before the first checkpoint in {output_dir}: the same command begins anew."
    return f"Interrupted. {command[0].upper()}{command[1:]} goes on from {checkpoints[max(checkpoints)]}."


class UnusableSample(ValueError):
    """A sample that cannot be used; another one replaces it."""


def check_nesting(path: str | os.PathLike) -> None:
    """Check that no line of a JSONL file is nested so deeply that its reader would crash.

    Raises:
        ValueError: a line is; the message names it.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.count(b"[") + line.count(b"{") > MOST_NESTED:
                marks = re.sub(rb'"(?:[^"\\]|\\.)*"', b"", line)
                depths = accumulate((mark in b"[{") - (mark in b"]}") for mark in marks)
                if max(depths) > MOST_NESTED:
                    raise ValueError(f"line {number} is nested more than {MOST_NESTED} deep")


def read_rows(path: str | os.PathLike) -> list[dict] | datasets.Dataset:
    """Read the rows of a .json list, or of a .jsonl or .parquet file (memory-mapped).

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file has another extension, or is broken; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no data file {path}.")
    readers = {".jsonl": datasets.Dataset.from_json, ".parquet": datasets.Dataset.from_parquet}
    if path.suffix not in (".json", *readers):
        raise ValueError(f"A data file must be .json, .jsonl or .parquet, got {path}.")
    try:
        if path.suffix == ".jsonl":
            check_nesting(path)
        rows = (
            json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else readers[path.suffix](str(path))
        )
    except (*BROKEN_TABLE, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(
            f"cannot read the data file {path}: {str(error.__cause__ or error) or 'it has no rows'}"
        ) from error
    if isinstance(rows, list) and all(isinstance(row, dict) for row in rows) or isinstance(rows, datasets.Dataset):
        return rows
    raise ValueError(f"The data file {path} is not a list of rows.")


class ImageStore:
    """Pictures by name, from a folder or from tar files (which are indexed once).

    A picture in a tar file has the name of its member. If several shards have that name, it is `SHARD.tar/NAME`, with
    the shard's path relative to the common folder of all shards.

    Args:
        location: a folder, or a pattern of tar files with `*` or `{00..15}`.

    Attributes:
        names: names of the files in tar files, shard by shard in their order; empty for a folder.

    Raises:
        FileNotFoundError: the folder does not exist, or no file matches the pattern.
        ValueError: a tar file is broken.
    """

    def __init__(self, location: str):
        self.location, self.places = location, {}
        self.in_tar = location.endswith(".tar")
        if not self.in_tar:
            if not Path(location).is_dir():
                raise FileNotFoundError(f"There is no image folder {location}.")
            return
        shards = sorted({path for pattern in braceexpand(location) for path in glob.glob(pattern)})
        if not shards:
            raise FileNotFoundError(f"There is no shard {location}.")
        root = os.path.commonpath([os.path.dirname(shard) for shard in shards])
        members = {shard: tar_members(shard) for shard in shards}
        counts = Counter(name for of_shard in members.values() for name in of_shard)
        self.shared_names = {name for name, count in counts.items() if count > 1}
        for shard, of_shard in members.items():
            prefix = Path(os.path.relpath(shard, root or None)).as_posix()
            for name, place in of_shard.items():
                self.places[f"{prefix}/{name}" if name in self.shared_names else name] = shard, *place

    @property
    def names(self) -> list[str]:
        return list(self.places)

    def check_names(self, names: Iterable[str]) -> None:
        """Check that names are unambiguous.

        Raises:
            ValueError: several shards have a file of one of these names.
        """
        if self.in_tar and (shared := self.shared_names.intersection(names)):
            name = min(shared)
            full = [full for full in self.places if full.endswith(f".tar/{name}")]
            raise ValueError(f"{name} is in {len(full)} shards of {self.location}: name it {' or '.join(full[:2])}.")

    def __getitem__(self, name: str) -> Image.Image:
        """Load a picture, upright and in RGB, see `load_image`.

        Raises:
            UnusableSample: the picture is missing or broken.
            ValueError: see `check_names`.
        """
        if not self.in_tar:
            return load_sample_image(Path(self.location) / name)
        if name not in self.places:
            self.check_names([name])
            raise UnusableSample(f"no image {name} in {self.location}")
        shard, offset, size = self.places[name]
        with open(shard, "rb") as file:
            file.seek(offset)
            return decode_image(file.read(size), name)


def load_sample_image(path: str | os.PathLike) -> Image.Image:
    """Load an image, see `load_image`.

    Raises:
        UnusableSample: the image is missing or broken.
    """
    path = Path(path)
    try:
        return load_image(path)
    except ValueError as error:
        raise UnusableSample(str(error)) from error


def decode_image(data: bytes, name: str = "image") -> Image.Image:
    """Decode an image file's bytes to an upright RGB picture.

    Raises:
        UnusableSample: the data is not an image, or broken; the message has the `name`.
    """
    try:
        return load_image(data, name)
    except ValueError as error:
        raise UnusableSample(str(error)) from error


@dataclass
class BrokenSamples:
    """Count broken samples, and stop a run that skips too many.

    Each process and each worker of a DataLoader has its own counts, and checks only these.

    Args:
        max_share: tolerated share of broken samples among those seen.
        minimum: number of samples to see before the first check.

    Attributes:
        seen: number of samples that this worker has seen.
        broken: number of broken ones among them.
        last: names and errors of the last broken ones.
        of_workers: numbers of broken samples of all workers, in shared memory.
    """

    max_share: float
    minimum: int = 100
    seen: int = 0
    broken: int = 0
    last: deque[str] = field(default_factory=lambda: deque(maxlen=5))
    of_workers: torch.Tensor = field(
        default_factory=lambda: torch.zeros(1 + MOST_WORKERS, dtype=torch.int64).share_memory_(), repr=False
    )

    @property
    def total(self) -> int:
        """Number of broken samples in this process and all workers of its DataLoader."""
        return int(self.of_workers.sum())

    def count(self) -> None:
        """Count a sample, and check the share of broken ones once enough have been seen.

        Raises:
            ValueError: see `check`.
        """
        self.seen += 1
        if self.seen >= self.minimum:
            self.check()

    def count_broken(self, name: str, error: Exception | str) -> None:
        """Count a sample as seen and broken, and name it in the log.

        Raises:
            ValueError: see `check`.
        """
        self.broken += 1
        worker = get_worker_info()
        self.of_workers[0 if worker is None else 1 + worker.id] += 1
        self.last.append(f"{name} ({error})")
        logger.warning("skipping %s: %s", name, error)
        self.count()

    def check(self) -> None:
        """Check the share of broken samples.

        Raises:
            ValueError: too many samples are broken; the message has the counts, and the last ones with their errors.
        """
        if self.broken > self.max_share * self.seen:
            raise ValueError(
                f"{self.broken} of {self.seen} samples are broken, more than {self.max_share:.2%}. "
                f"The last ones: {', '.join(self.last)}."
            )


def check_broken_share(broken: list[str], total: int, max_share: float) -> None:
    """Check that a measurement does not have too many broken images.

    Args:
        broken: error of each broken image.
        total: number of all images.
        max_share: tolerated share of broken images.

    Raises:
        ValueError: the share is larger, or all images are broken.
    """
    if broken and (len(broken) > max_share * total or len(broken) == total):
        raise ValueError(
            f"{len(broken)} of {total} images are broken, at most {max_share:.2%} may be: {'; '.join(broken[:5])}. The "
            "others are measured and kept: the same command goes on with mended images, or with a higher "
            "--max_broken_share."
        )


def log_broken(broken: BrokenSamples, accelerator: Accelerator) -> None:
    """Log the number of skipped samples at the end of a training; every process must call it."""
    total = accelerator.reduce(torch.tensor(broken.total, device=accelerator.device), "sum").item()
    if total and accelerator.is_main_process:
        logger.warning("broken samples that were skipped: %d; they are named above", total)


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file atomically, so that an interruption leaves the old or the new file; create its folder if needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def folder_digest(folder: str) -> str:
    """Compute a SHA-256 digest of the weights, configurations and templates in a model's folder."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in (".safetensors", ".json", ".jinja"):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
    return digest.hexdigest()
