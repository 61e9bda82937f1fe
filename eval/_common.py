"""What the measurements share."""

import os
from pathlib import Path


def write_atomically(path: str | Path, data: bytes) -> None:
    """Writes a file, and the folders above it, so that an interruption leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)
