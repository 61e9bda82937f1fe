"""Codes on disk: broken folders and shards are named; a kill or a full disk leaves what was there."""

import io
import itertools
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset as wds
from faulty_disk import contents, full_disk, killed_at

from training.codes import CodeStore, write_metadata, write_shard
from training.files import ImageStore, write_atomically


K, L, V = 4, 9, 32


METADATA = {"format": "parquet", "variants": 1, "num_codebooks": K, "codebook_size": V, "num_positions": L}


def code_folder(folder: Path, **changes) -> Path:
    """A folder with one shard of one image."""
    metadata = METADATA | {"num_shards": 1} | changes
    write_metadata(folder, METADATA | {"num_shards": 1, "format": metadata["format"]})
    (folder / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
    suffix = "tar" if metadata["format"] == "webdataset" else "parquet"
    write_shard(folder / f"000000.{suffix}", {"a.png": torch.arange(K * L).view(1, K, L) % V})
    return folder


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": "zip"}, "format must be parquet or webdataset, got 'zip'"),
        ({"variants": 0}, "variants must be an integer from 1 to .*, got 0"),
        ({"num_codebooks": -4}, "num_codebooks .* got -4"),
        ({"codebook_size": "32"}, "codebook_size .* got '32'"),
        ({"num_positions": 10**12}, "num_positions .* got 1000000000000"),
        ({"num_positions": 9.5}, "num_positions .* got 9.5"),
        ({"num_shards": None}, "num_shards .* got None"),
        ({"num_shards": True}, "num_shards .* got True"),
    ],
)
@pytest.mark.attack
def test_settings_of_codes_that_cannot_be_are_named(tmp_path, changes, message):
    code_folder(tmp_path)
    (tmp_path / "metadata.json").write_text(json.dumps(METADATA | {"num_shards": 1} | changes), encoding="utf-8")
    with pytest.raises(ValueError, match=f"metadata.json is broken: {message}"):
        CodeStore(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\xff"])
@pytest.mark.attack
def test_settings_of_codes_that_are_no_settings_are_named(tmp_path, content):
    code_folder(tmp_path)
    (tmp_path / "metadata.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="metadata.json is broken: "):
        CodeStore(tmp_path)


@pytest.mark.attack
def test_broken_parquet_shards_are_named(tmp_path):
    shard = code_folder(tmp_path) / "000000.parquet"
    data = shard.read_bytes()
    for size in (0, 3, len(data) // 2, len(data) - 1):
        shard.write_bytes(data[:size])
        with pytest.raises(ValueError, match="000000.parquet is broken: "):
            CodeStore(tmp_path)
    for columns in ({"key": ["a"]}, {"key": ["a"], "codes": [3]}, {"key": [1], "codes": [b""]}):
        pq.write_table(pa.table(columns), shard)
        with pytest.raises(
            ValueError, match="000000.parquet has the columns key .* expected key string, codes binary"
        ):
            CodeStore(tmp_path)
    for number, codes in enumerate((b"", b"123", bytes(2 * K * L - 2), None)):
        table = pa.table({"key": ["a.png"], "codes": pa.array([codes], pa.binary())})
        pq.write_table(table, shard)
        os.utime(shard, (number, number))  # or the library would know the file
        with pytest.raises(ValueError, match=f"codes of a.png in {tmp_path}"):
            CodeStore(tmp_path)["a.png"]


@pytest.mark.attack
def test_broken_tar_shards_and_what_lies_in_them_are_named(tmp_path):
    shard = code_folder(tmp_path, format="webdataset") / "000000.tar"
    data = shard.read_bytes()
    for size in (0, 100, 700):
        shard.write_bytes(data[:size])
        with pytest.raises(ValueError, match="cannot read .*000000.tar: "):
            CodeStore(tmp_path)
        with pytest.raises(ValueError, match="cannot read .*000000.tar: "):
            ImageStore(str(shard))
    good = np.zeros((1, K, L), np.uint16)
    for array, message in (
        (good.astype(np.float32), "are float32, not integers"),
        (good.astype(bool), "are bool, not integers"),
        (good.astype(np.int64) - 1, "go down to -1"),
        (good + V, f"reach {V}, but there are {V} in a codebook"),
        (good[:, :-1], r"are \(1, 3, 9\), expected \(1, 4, 9\)"),
        (good[0], r"are \(4, 9\), expected \(1, 4, 9\)"),
        (np.zeros(0, np.uint16), r"are \(0,\), expected"),
    ):
        with wds.TarWriter(str(shard)) as writer:
            writer.write({"__key__": "a.png", "npy": array})
        with pytest.raises(ValueError, match=f"The codes of a.png in .*000000.tar {message}"):
            CodeStore(tmp_path)["a.png"]
    objects = io.BytesIO()
    np.save(objects, np.array([{"a": 1}]), allow_pickle=True)
    archive = io.BytesIO()
    np.savez_compressed(archive, codes=np.zeros(10**6, np.uint16))
    large = io.BytesIO()
    np.lib.format.write_array_header_1_0(large, {"descr": "<u2", "fortran_order": False, "shape": (10**15,)})
    for content in (b"", b"none", objects.getvalue(), archive.getvalue(), large.getvalue()):
        with wds.TarWriter(str(shard), encoder=False) as writer:
            writer.write({"__key__": "a.png", "npy": content})
        with pytest.raises(ValueError, match="cannot read the codes of a.png in .*000000.tar: "):
            CodeStore(tmp_path)["a.png"]


@pytest.mark.attack
def test_a_kill_while_codes_are_written_leaves_whole_shards(tmp_path):
    codes = {"b.png": torch.ones(1, K, L, dtype=torch.long)}
    for format, suffix in (("parquet", "parquet"), ("webdataset", "tar")):
        store = code_folder(tmp_path / format, format=format)
        shard, before = store / f"000000.{suffix}", contents(store)
        for event in itertools.count(1):
            was_killed = killed_at(event, partial(write_shard, shard, codes))
            if not was_killed:
                break
            assert shard.read_bytes() == before[shard.name] and list(CodeStore(store)) == ["a.png"]
        assert event > 1 and list(CodeStore(store)) == ["b.png"]


@pytest.mark.attack
def test_a_full_disk_leaves_codes_and_reports_as_they_were(tmp_path):
    many = {f"{i}.png": torch.randint(V, (1, K, L)) for i in range(2000)}
    for format, suffix in (("parquet", "parquet"), ("webdataset", "tar")):
        store = code_folder(tmp_path / format, format=format)
        before = contents(store)
        with full_disk(30_000), pytest.raises(OSError, match="File too large"):
            write_shard(store / f"000000.{suffix}", many)
        assert contents(store) == before
        with full_disk(30_000), pytest.raises(OSError, match="File too large"):
            write_shard(store / f"000001.{suffix}", many)
        assert contents(store) == before
    path = tmp_path / "report.json"
    write_atomically(path, b"old")
    with full_disk(1000), pytest.raises(OSError, match="File too large"):
        write_atomically(path, bytes(2000))
    assert path.read_bytes() == b"old"
