"""A release is written whole: a kill or a full disk leaves the old folder or the new one."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faulty_disk import contents, full_disk, killed_at

from training.release import save_release, write_folder
from unitok_mllm import UniTokMLLMForConditionalGeneration


pytestmark = pytest.mark.attack


def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new_one(tmp_path):
    def writer(text: str) -> Callable[[Path], None]:
        return lambda folder: (
            [(folder / name).write_text(text, encoding="utf-8") for name in ("config.json", "model.safetensors")]
            and None
        )

    target = tmp_path / "release"
    old, new, newest = ({"config.json": t, "model.safetensors": t} for t in (b"old", b"new", b"newest"))
    seen = []
    for event in itertools.count(1):
        shutil.rmtree(tmp_path)
        write_folder(target, writer("old"))
        if not killed_at(event, lambda: write_folder(target, writer("new"))):
            break
        found = contents(target if target.exists() else target.with_name(".release.old"))
        assert found in (old, new), event
        seen.append(found == new)
        with pytest.raises(ZeroDivisionError):
            write_folder(target, lambda _: 1 / 0)
        assert contents(target) == found  # whatever was left lying about
        write_folder(target, writer("newest"))
        assert contents(tmp_path) == {f"release/{name}": text for name, text in newest.items()}
    assert contents(target) == new and len(seen) >= 6 and {False, True} == {*seen}


def test_a_full_disk_leaves_the_old_release_and_gives_its_room_back(lively_mllm, processor, tmp_path):
    target = tmp_path / "release"
    save_release(lively_mllm, processor, target, torch.float32)
    before = contents(tmp_path)
    assert len(before["release/model.safetensors"]) > 200_000
    for free in (1000, 100_000):  # not even the config, and not the weights
        with full_disk(free), pytest.raises(Exception, match="File too large"):
            save_release(lively_mllm, processor, target, torch.float32)
        assert contents(tmp_path) == before
    save_release(lively_mllm, processor, target, torch.float32)
    assert UniTokMLLMForConditionalGeneration.from_pretrained(target).num_parameters() == lively_mllm.num_parameters()
