"""Elastic restarts: `torchrun --max-restarts` starts a run again after a worker has been killed."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from mllm_runs import ENVIRONMENT, ROOT, losses, write_config
from PIL import Image
from safetensors.torch import load_file

from training.files import whole_checkpoints
from training.mllm_trainer import WHOLE
from training.tokenizer_trainer import HISTORY, STATE


TOKENIZER = """
vision_overrides: {image_size: 32, hidden_size: 32, num_attention_heads: 2, num_hidden_layers: 1}
text_tokenizer: FOLDER/text
datasets: [{kind: folder, path: FOLDER/captions.jsonl, horizontal_flip: true}]
max_steps: 40
per_device_train_batch_size: 4
save_steps: 5
logging_steps: 1
use_cpu: true
bf16: false
resume: true
"""


def train_two(module: str, config: Path, run: Path, last_file: str, kill: bool, *options: str) -> str:
    """Train in two processes of torchrun, kill one of them after the first checkpoint, and return what was logged."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    # without it, the new workers may read the addresses of the old ones in the launcher's store
    environment = ENVIRONMENT | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONUNBUFFERED": "1"}
    log = run.with_suffix(".log")
    command = [*torchrun, "-m", module, str(config), "--output-dir", str(run), *options]
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file) as launcher,
    ):
        while kill and launcher.poll() is None:
            if whole_checkpoints(run, last_file):
                psutil.Process(launcher.pid).children()[1].kill()
                break
            time.sleep(0.01)
        launcher.wait(500)
    text = log.read_text(encoding="utf-8")
    assert launcher.returncode == 0, text[-6000:]
    return text


@pytest.mark.slow  # starts torchrun twice: two minutes
def test_a_tokenizers_run_whose_worker_is_killed_ends_like_one_left_alone(tmp_path, text_tokenizer):
    text_tokenizer.save_pretrained(tmp_path / "text")
    rows = [{"image": f"{i}.png", "caption": f"a circle {i}"} for i in range(16)]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for i in range(16):
        Image.new("RGB", (40, 40), (16 * i, 255 - 16 * i, 90)).save(tmp_path / f"{i}.png")
    config = tmp_path / "config.yaml"
    config.write_text(TOKENIZER.replace("FOLDER", str(tmp_path)), encoding="utf-8")
    histories = []
    for name in ("alone", "killed"):
        log = train_two("training.train_tokenizer", config, tmp_path / name, STATE, name == "killed")
        assert ("resumed from" in log) == (name == "killed")
        lines = [json.loads(line) for line in (tmp_path / name / HISTORY).read_text(encoding="utf-8").splitlines()]
        histories.append({line["step"]: line["loss"] for line in lines if "loss" in line})
    assert list(histories[0]) == list(range(1, 41)) and histories[1] == histories[0]
    weights, expected = (load_file(tmp_path / name / "release/model.safetensors") for name in ("killed", "alone"))
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())


@pytest.mark.slow  # starts torchrun twice: two minutes
def test_an_mllms_run_whose_worker_is_killed_ends_like_one_left_alone(tmp_path, start, data):
    options = {"max_steps": 20, "save_strategy": "steps", "save_steps": 4, "per_device_train_batch_size": 2}
    config = write_config(tmp_path / "config.yaml", start, list(data.values()), **options)
    for name in ("alone", "killed"):
        log = train_two("training.train_mllm", config, tmp_path / name, WHOLE, name == "killed")
        assert ("going on from" in log) == (name == "killed")
    assert len(losses(tmp_path / "alone")) == 20 and losses(tmp_path / "killed") == losses(tmp_path / "alone")
    weights, expected = (load_file(tmp_path / name / "release/model.safetensors") for name in ("killed", "alone"))
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
