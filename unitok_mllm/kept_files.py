"""A folder whose files are kept up to an age, and up to a total size."""

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock, Thread


class KeptFiles:
    """The files in a folder and below it, whoever wrote them.

    Args:
        folder: the folder, which need not exist yet.
        seconds: age, since the last change, at which a file is deleted.
        max_bytes: largest size of all files together; the oldest are deleted first.
    """

    def __init__(self, folder: str | os.PathLike, seconds: float, max_bytes: int):
        self.folder, self.seconds, self.max_bytes = Path(folder), seconds, max_bytes
        self._lock = Lock()

    def tidy(self, room: int = 0) -> int:
        """Remove files that are too old, then the oldest until `room` more bytes fit. Returns the remaining bytes."""
        with self._lock:
            files = sorted(self._files())
            total = sum(size for _, size, _ in files)
            oldest = time.time() - self.seconds
            for changed, size, path in files:
                if changed >= oldest and total + room <= self.max_bytes:
                    break
                self._remove(path)
                total -= size
            return total

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """List each file's modification time, size and path; others may write and delete files meanwhile."""
        for parent, _, names in os.walk(self.folder):
            for name in names:
                path = os.path.join(parent, name)
                try:
                    status = os.lstat(path)
                except FileNotFoundError:
                    continue
                yield status.st_mtime, status.st_size, path

    def _remove(self, path: str) -> None:
        try:
            os.unlink(path)
            os.rmdir(os.path.dirname(path))
        except OSError as error:  # gone already, or the folder has more in it
            if os.path.lexists(path):
                print(f"cannot remove {path}: {error}", file=sys.stderr)

    @contextmanager
    def tidied(self, every: float) -> Iterator[None]:
        """Context in which a thread calls `tidy` every `every` seconds, and continues after any error."""
        is_over = Event()

        def work() -> None:
            while not is_over.wait(every):
                try:
                    self.tidy()
                except Exception:  # any error: try again next time
                    traceback.print_exc()

        thread = Thread(target=work, daemon=True, name="tidy")
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()
