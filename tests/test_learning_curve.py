"""Learning curves of both trainings, from their logs, in the model card."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.learning_curve import plot_curves, read_curves


def tokenizer_run(folder: Path) -> Path:
    folder.mkdir()
    lines = [{"step": 1, "l1": 0.5, "psnr": 10.0}, {"step": 2, "l1": 0.4, "psnr": 12.0}, {"step": 2, "l1": 0.3}]
    lines.append({"step": 2, "eval_psnr": 11.0})
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def mllm_run(folder: Path) -> Path:
    folder.mkdir()
    state = {"log_history": [{"step": 20, "text_loss": 2.0}, {"step": 10, "text_loss": 3.0}, {"step": 20, "epoch": 1}]}
    (folder / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    return folder


def test_curves_are_those_of_the_logs_and_a_step_counts_once(tmp_path):
    curves = read_curves(tokenizer_run(tmp_path / "tokenizer"))
    assert curves == {"l1": [(1, 0.5), (2, 0.3)], "psnr": [(1, 10.0), (2, 12.0)], "eval_psnr": [(2, 11.0)]}
    assert read_curves(mllm_run(tmp_path / "mllm"))["text_loss"] == [(10, 3.0), (20, 2.0)]
    with pytest.raises(ValueError, match="has no logs of a training: neither history.jsonl nor trainer_state.json"):
        read_curves(tmp_path)


def test_the_plot_shows_each_run_and_its_values():
    curves = {"l1": [(1, 0.5), (2, 0.4)], "psnr": [(1, 10.0), (2, 12.0)]}
    pictures = [
        np.asarray(Image.open(io.BytesIO(plot_curves(runs))).convert("RGB"))
        for runs in (
            {"a": curves},
            {"a": curves},
            {"a": curves | {"l1": [(1, 0.5), (2, 0.1)]}},
            {"a": curves, "b": curves},
        )
    ]
    assert (pictures[0] == pictures[1]).all() and (pictures[0] != pictures[2]).any()
    assert pictures[3].shape[0] == 2 * pictures[0].shape[0] and pictures[3].shape[1] == pictures[0].shape[1]
    with pytest.raises(ValueError, match="the logs of b have neither losses nor PSNR"):
        plot_curves({"a": curves, "b": {"grad_norm": [(1, 2.0)]}})
