"""Extracted codes of images on disk: `metadata.json` and shards, written by `training.extract_codes`.

A shard is a parquet file with the columns `key` and `codes` (little-endian uint16 as bytes), or a webdataset tar file
with a `<key>.npy` for each image. The codes of an image have the shape (variants, K, L). Its key is its path in the
data.
"""

import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import webdataset as wds

from training.shards import tar_members


SUFFIXES = {"parquet": ".parquet", "webdataset": ".tar"}
CODE_TYPE = np.dtype("<u2")
SCHEMA = pa.schema({"key": pa.string(), "codes": pa.binary()})
MOST = 2**24  # maximum of any number in the metadata
READ_ROWS = 1024  # at a time; pyarrow's default fails on a shard without rows, whose images were all broken


def shard_path(folder: str | os.PathLike, number: int, metadata: dict) -> Path:
    """Return the path of a shard in the format that `metadata` gives."""
    folder = Path(folder)
    return folder / f"{number:06d}{SUFFIXES[metadata['format']]}"


def read_metadata(path: str | os.PathLike) -> dict:
    """Read and check a `metadata.json`.

    Raises:
        ValueError: the file is not JSON, or the format or a number is missing or not allowed.
    """
    path = Path(path)
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is broken: {error}") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"{path} is broken: it has no settings.")
    if metadata.get("format") not in SUFFIXES:
        raise ValueError(f"{path} is broken: format must be {' or '.join(SUFFIXES)}, got {metadata.get('format')!r}.")
    for name in ("variants", "num_codebooks", "codebook_size", "num_positions", "num_shards"):
        value = metadata.get(name)
        if type(value) is not int or not 1 <= value <= MOST:
            raise ValueError(f"{path} is broken: {name} must be an integer from 1 to {MOST}, got {value!r}.")
    return metadata


def check_parquet(shard: str | os.PathLike) -> None:
    """Check a parquet shard's header.

    Raises:
        ValueError: the shard is broken, or has other columns.
    """
    shard = Path(shard)
    try:
        schema = pq.read_schema(shard)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{shard} is broken: {error}") from error
    if not SCHEMA.equals(schema.remove_metadata()):
        columns = ", ".join(f"{field.name} {field.type}" for field in schema)
        raise ValueError(f"{shard} has the columns {columns}, expected key string, codes binary.")


def write_metadata(folder: str | os.PathLike, metadata: dict) -> None:
    """Write `metadata.json`, or check that the existing one is the same.

    Args:
        folder: folder of the codes.
        metadata: settings of the extraction, with at least `format`, `variants`, `num_codebooks` (K), `codebook_size`
            (V), `num_positions` (L) and `num_shards`.

    Raises:
        ValueError: the folder has other metadata; the message names the differences.
    """
    folder = Path(folder)
    path = folder / "metadata.json"
    if path.is_file():
        old = read_metadata(path)
        differing = [name for name in sorted({*old, *metadata}) if old.get(name) != metadata.get(name)]
        if differing:
            changes = ", ".join(f"{name} {old.get(name)} (now {metadata.get(name)})" for name in differing)
            raise ValueError(f"{folder} has codes of other settings: {changes}. Choose another folder.")
        return
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".metadata.{os.getpid()}.unfinished"
    unfinished.write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)


def write_shard(path: str | os.PathLike, codes: Mapping[str, torch.Tensor]) -> None:
    """Write a shard atomically.

    Args:
        path: path of the shard; ends in .parquet or .tar.
        codes: codes of each image by key, (variants, K, L), integers in [0, 65536).
    """
    path = Path(path)
    arrays = {key: value.numpy().astype(CODE_TYPE) for key, value in codes.items()}
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        if path.suffix == ".tar":
            with wds.TarWriter(str(unfinished), mtime=0) as writer:
                for key, array in arrays.items():
                    writer.write({"__key__": key, "npy": array})
        else:
            columns = {"key": list(arrays), "codes": [array.tobytes() for array in arrays.values()]}
            pq.write_table(pa.table(columns, schema=SCHEMA), unfinished)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


class CodeStore(Mapping):
    """Mapping from image keys to codes: (variants, K, L), int64, in [0, V). Parquet shards are memory-mapped.

    Args:
        folder: folder that `training.extract_codes` wrote.

    Attributes:
        metadata: settings of the extraction.

    Raises:
        FileNotFoundError: the folder does not exist, or has no codes.
        ValueError: shards are missing, a file is broken, or an image has codes twice; the message names it.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / "metadata.json"
        if not path.is_file():
            raise FileNotFoundError(f"There are no codes in {folder}: it has no metadata.json.")
        self.metadata = read_metadata(path)
        self.shape = tuple(self.metadata[name] for name in ("variants", "num_codebooks", "num_positions"))
        shards = [shard_path(self.folder, i, self.metadata) for i in range(self.metadata["num_shards"])]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise ValueError(
                f"{folder} lacks {len(missing)} of its {len(shards)} shards, {missing[0]} first: "
                "the extraction is not finished."
            )
        if self.metadata["format"] == "parquet":
            for shard in shards:
                check_parquet(shard)
            files = [str(shard) for shard in shards]
            self.rows = datasets.Dataset.from_parquet(files, batch_size=READ_ROWS)
            found = [(key, i) for i, key in enumerate(self.rows["key"][:])]
        else:
            members = ((shard, *item) for shard in shards for item in tar_members(shard).items())
            found = [(name.removesuffix(".npy"), (shard, *place)) for shard, name, place in members]
        self.places = dict(found)
        if len(self.places) < len(found):
            twice = Counter(key for key, _ in found).most_common(1)[0][0]
            raise ValueError(f"{folder} has codes of {twice} twice.")

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __contains__(self, key: object) -> bool:
        return key in self.places

    def __getitem__(self, key: str) -> torch.Tensor:
        """Return the codes of an image.

        Raises:
            KeyError: there is no such image.
            ValueError: its codes cannot be read, are not integers in [0, V), or do not have the shape in the metadata.
        """
        if key not in self.places:
            raise KeyError(f"no codes of image {key} in {self.folder}, which has {len(self)} images")
        file = self._file(key)
        try:
            codes = self._read(key)
        except (OSError, EOFError, ValueError, TypeError, MemoryError, pa.ArrowException) as error:
            raise ValueError(f"cannot read the codes of {key} in {file}: {error}") from error
        if codes.dtype.kind not in "ui":
            raise ValueError(f"The codes of {key} in {file} are {codes.dtype}, not integers.")
        if codes.shape != self.shape:
            raise ValueError(f"The codes of {key} in {file} are {codes.shape}, expected {self.shape}.")
        if codes.size and codes.min() < 0:
            raise ValueError(f"The codes of {key} in {file} go down to {codes.min()}.")
        if codes.size and codes.max() >= self.metadata["codebook_size"]:
            raise ValueError(
                f"The codes of {key} in {file} reach {codes.max()}, but there are "
                f"{self.metadata['codebook_size']} in a codebook."
            )
        return torch.from_numpy(codes.astype(np.int64))

    def _file(self, key: str) -> Path:
        """Return the path to name in an error: the tar shard, or the folder of parquet shards."""
        return self.folder if self.metadata["format"] == "parquet" else self.places[key][0]

    def _read(self, key: str) -> np.ndarray:
        place = self.places[key]
        if self.metadata["format"] == "parquet":
            codes = np.frombuffer(self.rows[place]["codes"], CODE_TYPE)
            return codes.reshape(self.shape) if codes.size == math.prod(self.shape) else codes
        shard, offset, size = place
        with shard.open("rb") as file:
            file.seek(offset)
            return np.lib.format.read_array(io.BytesIO(file.read(size)), allow_pickle=False)
