"""Real processes, ended by real signals as a terminal, a scheduler or a shutdown sends them: to all of a group."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image


ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow  # each imports torch in processes of its own


def launch(*command: object) -> subprocess.Popen:
    """A script in a group of processes of its own; what it says goes to one stream."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(number: signal.Signals, is_time, *command: object) -> str:
    """What a script says that gets a signal once `is_time()`; it ends with the signal's code, without a traceback."""
    process = launch(*command)
    deadline = time.monotonic() + 200
    while not is_time():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    os.killpg(process.pid, number)
    said = process.communicate(timeout=200)[0]
    assert process.returncode == 128 + number and "Traceback" not in said, said[-3000:]
    return said


def finished(*command: object) -> None:
    process = launch(*command)
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 0, said[-3000:]


@pytest.fixture
def photos(tmp_path) -> Path:
    (tmp_path / "photos").mkdir()
    for number in range(100):
        pixels = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"photos/{number:03d}.png")
    return tmp_path / "photos"


def test_an_extraction_with_workers(tmp_path, photos, visual_tokenizer):
    visual_tokenizer.save_pretrained(tmp_path / "model")
    options = ["--visual-model", tmp_path / "model", "--batch-size", "2", "--shard-size", "10", "--workers", "2"]
    command = ["training.extract_codes", photos, tmp_path / "told", *options]
    said = ended(signal.SIGTERM, lambda: list((tmp_path / "told").glob("*.parquet")), *command)
    assert said.endswith("the same command goes on with the others.\n")
    assert 0 < len(list((tmp_path / "told").glob("*.parquet"))) < 10
    finished(*command)
    finished("training.extract_codes", photos, tmp_path / "whole", *options)
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("told", "whole")]
    assert contents[0] == contents[1] and len(contents[0]) == 11
