"""Tar files of samples from untrusted sources: memory stays proportional to the size of a compressed file."""

import bz2
import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from webdataset.gopen import gopen


EXPANSION = 32  # largest ratio of decompressed to compressed bytes; picture files hardly compress at all
FREE = 2**26  # bytes that any shard may expand to
COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open}  # by the first bytes of a file
OF_WEBDATASET = re.compile(r"__[^/]*__($|/)")  # names of webdataset's own files, which are not samples
BROKEN_SHARD = (tarfile.TarError, OSError, EOFError, ValueError, zlib.error)


class _Counted(io.RawIOBase):
    """A stream that counts the bytes read from it."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.count = stream, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        self.count += len(data)
        return len(data)


class Expanded:
    """The content of a stream, decompressed if it is gzip or bzip2, with a limit on its expansion.

    Args:
        stream: any object whose `read` returns bytes.
    """

    def __init__(self, stream: BinaryIO):
        self.source, self.count = _Counted(stream), 0
        buffered = io.BufferedReader(self.source)
        start = buffered.peek(4)
        opened = [expand(buffered) for first, expand in COMPRESSED.items() if start.startswith(first)]
        self.content = opened[0] if opened else buffered

    def read(self, size: int) -> bytes:
        """Read up to `size` bytes of decompressed content.

        Raises:
            ValueError: the content expands too much.
        """
        data = self.content.read(size)
        self.count += len(data)
        if self.count > FREE + EXPANSION * self.source.count:
            raise ValueError(f"it expands to more than {EXPANSION} times its size")
        return data


def shard_files(url: str) -> Iterator[dict]:
    """Iterate over the files of a tar file in order, as `webdataset.tariterators.group_by_keys` takes them.

    Args:
        url: a path, or a URL that webdataset can open.

    Raises:
        One of BROKEN_SHARD: the shard is missing or broken, or expands too much.
    """
    with gopen(url) as stream, tarfile.open(fileobj=Expanded(stream), mode="r|") as archive:
        for member in archive:
            check_whole(member)
            if member.isreg() and not OF_WEBDATASET.match(member.name):
                yield {"fname": member.name, "data": archive.extractfile(member).read(), "__url__": url}
            archive.members = []


def tar_members(shard: str | Path) -> dict[str, tuple[int, int]]:
    """Return the offset and size in bytes of each file in an uncompressed tar file, by name.

    Raises:
        ValueError: the tar file is broken, or has two files of the same name; the message names it.
    """
    members: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in filter(tarfile.TarInfo.isfile, archive):
                check_whole(member)
                if member.name in members:
                    raise ValueError(f"it has two files of the name {member.name}")
                members[member.name] = member.offset_data, member.size
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"cannot read {shard}: {error}") from error
    length = Path(shard).stat().st_size
    if cut_off := [name for name, (offset, size) in members.items() if offset + size > length]:
        raise ValueError(f"cannot read {shard}: it ends within {cut_off[0]}")
    return members


def check_whole(member: tarfile.TarInfo) -> None:
    """Check that a file in an archive is not sparse.

    Raises:
        ValueError: the file is sparse, so its stated size may be larger than its data.
    """
    if member.issparse():
        raise ValueError(f"{member.name} is a sparse file that claims to hold {member.size} bytes")
