"""A folder whose files are deleted above a certain age or total size."""

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock, Thread


class KeptFiles:
    """All files in a folder and its subfolders, whichever process wrote them.

    Args:
        folder: the folder, which need not exist yet.
        seconds: time after its last change at which a file is deleted.
        max_bytes: maximum size of all files together; the oldest are deleted first.
    """

    def __init__(self, folder: str | os.PathLike, seconds: float, max_bytes: int):
        self.folder, self.seconds, self.max_bytes = Path(folder), seconds, max_bytes
        self._lock = Lock()

    def tidy(self, room: int = 0) -> int:
        """Delete files that are too old, then the oldest until `room` more bytes fit.

        Returns:
            The size of the remaining files in bytes.
        """
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
        """List each file's modification time, size and path. Others may write and delete files meanwhile."""
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
        except OSError as error:  # already gone, or the folder is not empty
            if os.path.lexists(path):
                print(f"cannot remove {path}: {error}", file=sys.stderr)

    @contextmanager
    def tidied(self, every: float) -> Iterator[None]:
        """Context manager in which a thread calls `tidy` every `every` seconds, even after an error."""
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
