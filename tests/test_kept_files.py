"""The folder of kept files: its limits of age and size."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from unitok_mllm.kept_files import KeptFiles


pytestmark = pytest.mark.attack


def put(path: Path, size: int, age: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (time.time() - age,) * 2)
    return path


def left(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_what_is_too_old_goes_and_then_the_oldest(tmp_path):
    put(tmp_path / "a/old.png", 10, 101)
    put(tmp_path / "b/oldest.png", 40, 90)
    put(tmp_path / "b/older.png", 40, 80)
    put(tmp_path / "c/d/new.png", 40, 10)
    files = KeptFiles(tmp_path, 100, 120)
    assert files.tidy() == 120
    assert left(tmp_path) == {"b", "b/oldest.png", "b/older.png", "c", "c/d", "c/d/new.png"}  # no empty folder
    assert files.tidy(1) == 80 and "b/oldest.png" not in left(tmp_path)
    assert files.tidy(1000) == 0 and not any(path.is_file() for path in tmp_path.rglob("*"))
    assert KeptFiles(tmp_path / "none", 1, 1).tidy() == 0


def test_links_are_removed_and_not_followed(tmp_path):
    secret = put(tmp_path / "secret.txt", 10, 1000)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/link").symlink_to(secret)
    (tmp_path / "kept/folder").symlink_to(tmp_path)
    KeptFiles(tmp_path / "kept", 0, 10).tidy()
    assert secret.exists() and not (tmp_path / "kept/link").is_symlink()


def test_it_holds_while_others_write_and_remove(tmp_path):
    files = KeptFiles(tmp_path, 100, 50_000)

    def work(number: int) -> None:
        for i in range(300):
            path = tmp_path / f"{number}-{i % 7}" / f"{i}.png"
            try:
                put(path, 1000, i % 3)
                if i % 2:
                    path.unlink()
            except FileNotFoundError:
                pass  # tidied away between two steps

    with ThreadPoolExecutor(4) as pool, files.tidied(0.001):
        for each in [pool.submit(work, number) for number in range(4)]:
            each.result()
    assert files.tidy() <= 50_000


def test_the_thread_goes_on_after_an_error(tmp_path, monkeypatch, capfd):
    files, calls = KeptFiles(tmp_path, 100, 10), []

    def tidy() -> None:
        calls.append(1)
        raise RuntimeError("Set changed size during iteration")

    monkeypatch.setattr(files, "tidy", tidy)
    with files.tidied(0.01):
        while len(calls) < 3:
            time.sleep(0.01)
    assert capfd.readouterr().err.count("RuntimeError: Set changed size") >= 3


def test_what_cannot_be_removed_is_named(tmp_path, monkeypatch, capfd):
    def refuse(path):
        raise PermissionError("not yours")

    path = put(tmp_path / "a/b.png", 10, 1000)
    monkeypatch.setattr(os, "unlink", refuse)
    KeptFiles(tmp_path, 100, 10).tidy()
    assert capfd.readouterr().err == f"cannot remove {path}: not yours\n"
