"""Real processes, ended by real signals as a terminal, a scheduler or a shutdown sends them: to all of a group."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_train_mllm import data, losses, start, write_config  # noqa: F401  # two of them are fixtures

from training.files import whole_checkpoints
from training.mllm_trainer import WHOLE


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_training_with_workers(tmp_path, start, data, number):  # noqa: F811
    options = {"max_steps": 40, "save_strategy": "steps", "save_steps": 15, "dataloader_num_workers": 2}
    options |= {"trainable": ["embedder"], "disable_tqdm": True}
    whole, told = (
        write_config(tmp_path / f"{name}.yaml", start, [data["text"], data["read"]], **options)
        for name in ("whole", "told")
    )
    finished("training.train_mllm", whole)
    checkpoints = tmp_path / "told"
    said = ended(number, lambda: whole_checkpoints(checkpoints, WHOLE), "training.train_mllm", told)
    step = max(whole_checkpoints(checkpoints, WHOLE))
    assert said.endswith(f"Interrupted. The same command goes on from {checkpoints}/checkpoint-{step}.\n")
    finished("training.train_mllm", told)
    assert losses(tmp_path / "told") == losses(tmp_path / "whole")


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


def test_an_evaluation_with_workers(tmp_path, photos, visual_tokenizer):
    visual_tokenizer.save_pretrained(tmp_path / "model")
    command = ["eval.reconstruction", "--model", tmp_path / "model", "--images", photos, "--skip", "rfid,lpips"]
    command += ["--batch_size", "1", "--workers", "2", "--save_images", tmp_path / "seen", "--output"]
    seen = tmp_path / "seen/originals"
    said = ended(signal.SIGTERM, lambda: len(list(seen.glob("*"))) > 5, *command, tmp_path / "told.json")
    assert said.endswith("the same command goes on from there.\n")
    (part,) = (tmp_path / "told.json.parts").glob("*/*.pt")
    done = int((torch.load(part)["measured"] > 0).sum())
    assert 5 < done < 100
    finished(*command, tmp_path / "told.json")
    finished(*command, tmp_path / "whole.json")
    told, whole = (json.loads((tmp_path / f"{name}.json").read_text("utf-8")) for name in ("told", "whole"))
    for name, value in whole["metrics"].items():
        assert told["metrics"][name] == pytest.approx(value), name
