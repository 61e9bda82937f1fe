"""Tar files that are compressed, or whose headers claim more data than they have."""

import bz2
import gzip
import io
import tarfile
from pathlib import Path

import pytest

from eval.images import open_images
from training import shards
from training.files import ImageStore
from training.shards import shard_files, tar_members


pytestmark = pytest.mark.attack


FILES = {"a.png": b"first", "a.txt": b"red", "folder/b.png": b"", "__meta__/c.json": b"{}"}


def write(path: Path, files: dict[str, bytes], compress=lambda data: data) -> str:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    path.write_bytes(compress(data.getvalue()))
    return str(path)


def write_sparse(path: Path) -> str:
    """A file of 10 kB that claims to hold a terabyte."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("a.png")
        sparse = {"major": "1", "minor": "0", "name": "a.png", "realsize": str(10**12)}
        member.pax_headers = {f"GNU.sparse.{name}": value for name, value in sparse.items()}
        member.size = 512
        archive.addfile(member, io.BytesIO(b"0\n".ljust(512, b"\0")))
    return str(path)


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress], ids=["plain", "gzip", "bzip2"])
def test_a_shard_holds_the_same_files_compressed_or_not(tmp_path, compress):
    url = write(tmp_path / "a.tar", FILES, compress)
    read = {file["fname"]: file["data"] for file in shard_files(url)}
    assert read == {name: data for name, data in FILES.items() if not name.startswith("__")}
    assert [file["__url__"] for file in shard_files(f"file:{url}")] == [f"file:{url}"] * 3


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress], ids=["gzip", "bzip2"])
@pytest.mark.parametrize("bomb", ["file", "name", "many files"])
def test_a_shard_that_expands_too_much_is_refused_before_it_takes_the_memory(tmp_path, monkeypatch, compress, bomb):
    monkeypatch.setattr(shards, "FREE", 2**18)
    files = {
        "file": {"good.png": b"good", "a.png": bytes(2**23)},
        "name": {"good.png": b"good", "a" * 2**23: b""},  # an extended header of that size
        "many files": {"good.png": b"good"} | {f"{number}.png": bytes(2**18) for number in range(32)},
    }[bomb]
    url = write(tmp_path / "a.tar", files, compress)
    assert Path(url).stat().st_size < 2**16
    with pytest.raises(ValueError, match="it expands to more than 32 times its size"):
        list(shard_files(url))
    assert next(shard_files(url))["data"] == b"good"


def test_sparse_files_are_refused_by_name(tmp_path):
    url = write_sparse(tmp_path / "a.tar")
    message = "a.png is a sparse file that claims to hold 1000000000000 bytes"
    for read in (lambda: list(shard_files(url)), lambda: tar_members(url), lambda: ImageStore(url)):
        with pytest.raises(ValueError, match=message):
            read()
    with pytest.raises(ValueError, match=message):
        open_images(url)


def test_where_files_are_looked_up_by_their_place_a_compressed_shard_is_none(tmp_path):
    url = write(tmp_path / "a.tar", FILES, gzip.compress)
    for read in (tar_members, ImageStore, open_images):
        with pytest.raises(ValueError, match="cannot read .*a.tar: "):
            read(url)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x1f\x8b", b"BZh9", gzip.compress(b"no tar", mtime=0)[:-4], b"\xfd7zXZ\0\0", bytes(512)],
    ids=["empty", "gzip magic", "bzip2 magic", "gzip cut short", "xz magic", "zeros"],
)
def test_what_is_no_shard_is_refused(tmp_path, data):
    (tmp_path / "a.tar").write_bytes(data)
    try:
        assert list(shard_files(str(tmp_path / "a.tar"))) == []
    except shards.BROKEN_SHARD as error:
        assert str(error)
