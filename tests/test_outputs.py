"""Outputs that cannot be written are found out before any work."""

import os
import re
from pathlib import Path

import pytest

from unitok_mllm.outputs import check_output_file, check_output_folder


pytestmark = pytest.mark.attack


def test_what_can_be_written_passes_and_nothing_remains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (".", "", "new", "new/run", tmp_path, tmp_path / "a/b/c"):
        check_output_folder(folder)
    (tmp_path / "old.json").write_text("{}", encoding="utf-8")
    for path in ("old.json", "new.json", tmp_path / "a/b.json"):
        check_output_file(path)
    assert os.listdir() == ["old.json"]


def test_what_cannot_be_written_is_named_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("a file", encoding="utf-8")
    Path("folder").mkdir()
    Path("link").symlink_to("nowhere")
    for folder, there in ("file", "file"), ("file/new/run", "file"), ("link", "link"), ("link/run", "link"):
        with pytest.raises(ValueError, match=f"^cannot write to {folder}: {tmp_path}/{there} is not a folder$"):
            check_output_folder(folder)
    with pytest.raises(ValueError, match=f"^cannot write to file: {tmp_path}/file is not a folder$"):
        check_output_file("file/x.json")
    for path in ("folder", ""):
        with pytest.raises(ValueError, match=f"^cannot write {re.escape(str(Path(path)))}: it is a folder$"):
            check_output_file(path)


@pytest.mark.skipif(not Path("/proc/sys").is_dir(), reason="a folder that nobody can write to, root neither")
def test_a_folder_that_takes_no_files_is_found_out():
    with pytest.raises(ValueError, match=r"^cannot write to /proc/sys/x: /proc/sys is not writable \(.+\)$"):
        check_output_folder("/proc/sys/x")
    with pytest.raises(ValueError, match=r"^cannot write to /proc/sys: /proc/sys is not writable \(.+\)$"):
        check_output_file("/proc/sys/x.json")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_found_out(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ValueError, match="locked is not writable .Permission denied."):
        check_output_folder(tmp_path / "locked/new")
