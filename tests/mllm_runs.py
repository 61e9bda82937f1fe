"""Runs of the MLLM training, for all tests of it: their config, their command, and what they log."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainingArguments

from training.arguments import parse_yaml_and_command_line
from training.train_mllm import MLLMArguments, build_model, build_processor
from training.trainer_options import METRICS


ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
DEEPSPEED = ROOT / "training/configs/deepspeed"
LORA = {"lora": {"r": 4, "lora_alpha": 8}, "trainable": ["embedder", "depth_head"], "learning_rate": 1e-2}


def write_config(path: Path, start: Path, sources: list[dict], **options) -> Path:
    """A config for training `start` on the sources, in `<path without .yaml>/`; options replace what it says."""
    config = {
        "model": str(start),
        "datasets": sources,
        "max_length": 250,
        "output_dir": str(path.with_suffix("")),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "release_dtype": "float32",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    path.write_text(yaml.safe_dump(config | options), encoding="utf-8")
    return path


def launch(config: Path, processes: int = 1, *options: str, start_new_session: bool = False) -> subprocess.Popen:
    command = [sys.executable, "-m", "training.train_mllm"]
    if processes > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command = [*torchrun, "--master_port", str(20000 + os.getpid() % 20000), "-m", "training.train_mllm"]
    return subprocess.Popen(
        [*command, str(config), *options],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=start_new_session,
    )


def run(config: Path, processes: int = 1, *options: str) -> Path:
    """Runs to the end; the folder of the results."""
    process = launch(config, processes, *options)
    output = process.communicate(timeout=500)[0].decode()
    assert process.returncode == 0, output[-4000:]
    return config.with_suffix("")


def losses(folder: Path) -> list[tuple[float, float, float]]:
    """(loss, text_loss, image_loss) of each step."""
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [(h["loss"], h.get("text_loss", 0.0), h.get("image_loss", 0.0)) for h in history if "loss" in h]


def evaluations(folder: Path) -> list[tuple[float, float, float]]:
    """(loss, text_loss, image_loss) of each evaluation."""
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [tuple(h[f"eval_{name}"] for name in METRICS) for h in history if "eval_loss" in h]


def changed(before: Path, after: Path) -> set[str]:
    """The names of the weights that differ."""
    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


def built(config: Path):
    arguments, training_arguments = parse_yaml_and_command_line((MLLMArguments, TrainingArguments), [str(config)])
    processor = build_processor(arguments)
    return build_model(arguments, training_arguments, processor), processor
