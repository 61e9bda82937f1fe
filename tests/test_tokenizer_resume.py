"""Breaks in the tokenizer's training: it goes on exactly where it was, also on a stream, after a kill or a full disk."""

import json
import os
import re
import shutil
import signal
from multiprocessing import set_forkserver_preload
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from faulty_disk import full_disk
from tokenizer_runs import ALL_TERMS, Recorder, image_stream, small_model, train_and_resume, trainer_of
from torch import multiprocessing

from training.checkpoints import newest_checkpoint
from training.files import whole_checkpoints
from training.interrupts import Interrupted
from training.tokenizer_trainer import HISTORY, SPEEDS, STATE, TokenizerTrainer


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
set_forkserver_preload(["training.tokenizer_trainer"])
KEPT_IN_USE = {"codebook_start": "data", "revive_dead_codes": 4, "rotation_trick": True, "save_steps": 2}


def test_a_resumed_run_revives_the_codes_of_one_without_a_break(tmp_path):
    whole = trainer_of(tmp_path / "whole", {}, **KEPT_IN_USE, max_steps=6, save_total_limit=3)
    whole.train()
    for step in (4, 6):  # as if it had been killed between the checkpoint of step 2 and the revival in step 4
        shutil.rmtree(tmp_path / "whole" / f"checkpoint-{step}")
    resumed = trainer_of(tmp_path / "whole", {}, **KEPT_IN_USE, max_steps=6, resume=True)
    assert resumed.step == 2 and resumed.dead_codes.chosen.any() and not resumed.dead_codes.chosen.all()
    resumed.train()
    assert resumed.reports == {step: whole.reports[step] for step in (3, 4, 5, 6)}
    assert all(torch.equal(value, resumed.ema.parts[name]) for name, value in whole.ema.parts.items())


def test_a_stream_is_begun_again_until_the_steps_are_done(tmp_path, text_tokenizer):
    stream = image_stream(tmp_path, text_tokenizer, shuffle=0)
    trainer = trainer_of(tmp_path / "1", {}, dataset=stream, samples_per_epoch=12, max_steps=0)
    batches = trainer._batches()
    captions = [next(batches)["input_ids"].tolist() for _ in range(3)]
    expected = [stream.transform.encode(f"0 {i}").tolist() for i in range(9)]
    assert captions == [expected[:4], expected[4:8], expected[:4]]
    assert stream.epoch == 1
    trainer.train()
    assert trainer.step == 3
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = trainer_of(
        tmp_path / "2", {}, dataset=image_stream(tmp_path / "few", text_tokenizer, (3,)), samples_per_epoch=12
    )
    with pytest.raises(ValueError, match="does not have the 4 images of a batch"):
        trainer.train()


@pytest.mark.parametrize("resampled", [False, True])
def test_a_run_on_a_stream_goes_on_exactly_where_it_was(tmp_path, text_tokenizer, resampled):
    options = {"resampled": resampled, "shuffle": 4}
    whole, resumed = train_and_resume(tmp_path, text_tokenizer, **options)
    assert resumed.reports == {step: whole.reports[step] for step in (3, 4, 5, 6)}
    stream = image_stream(tmp_path / "data-0", text_tokenizer, (6, 3, 5), **options)
    arguments = {"resume": True, "dataloader_num_workers": 2, "per_device_train_batch_size": 2}
    with pytest.raises(
        ValueError, match="by 1 processes that read the stream with 1 workers each, now there are 1 with 2"
    ):
        trainer_of(tmp_path, {}, dataset=stream, samples_per_epoch=8, **arguments)


RESUMED = ALL_TERMS | {"gan_warmup": 0.5}
LONG = {"max_steps": 6, "save_steps": 2, "save_total_limit": 1, "dataloader_num_workers": 0}


def _die_in_step_5(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    trainer = trainer_of(Path(folder), RESUMED, small_model(drop_path_rate=0.3), **LONG)
    trainer.die_at = 5
    trainer.train()


@pytest.mark.full
@pytest.mark.attack
def test_a_killed_run_goes_on_exactly_where_it_was(tmp_path):
    whole = trainer_of(tmp_path / "whole", RESUMED, small_model(drop_path_rate=0.3), **LONG)
    whole.train()
    with pytest.raises(multiprocessing.ProcessExitedException, match="SIGKILL"):
        multiprocessing.start_processes(_die_in_step_5, (str(tmp_path / "killed"),), start_method="forkserver")
    (tmp_path / "killed" / ".checkpoint-8.unfinished").mkdir()  # as if it had been killed while writing
    assert whole_checkpoints(tmp_path / "killed", STATE) == {4: tmp_path / "killed" / "checkpoint-4"}
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="has checkpoints: set resume"):
        trainer_of(tmp_path / "killed", RESUMED, **LONG)
    with pytest.raises(ValueError, match="4 images per step, now there are 8"):
        trainer_of(tmp_path / "killed", RESUMED, per_device_train_batch_size=8, resume=True, **LONG)
    resumed = trainer_of(tmp_path / "killed", RESUMED, small_model(drop_path_rate=0.3), resume=True, **LONG)
    assert resumed.step == 4
    resumed.train()
    assert resumed.reports == {step: whole.reports[step] for step in (5, 6)}
    weights = resumed._weights()
    for name, tensors in whole._weights().items():
        assert all(torch.equal(value, weights[name][key]) for key, value in tensors.items()), name
    assert list(whole_checkpoints(tmp_path / "killed", STATE)) == [6]


def test_a_resumed_run_logs_means_over_the_steps_before_the_break_too(tmp_path):
    arguments = {"max_steps": 4, "logging_steps": 4, "save_steps": 2}
    whole = trainer_of(tmp_path, {}, **arguments)
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="was trained with .*'weight_decay': 0.02.*, now .*'weight_decay': 0.5"):
        trainer_of(tmp_path, {}, resume=True, weight_decay=0.5, **arguments)
    resumed = trainer_of(tmp_path, {}, resume=True, **arguments)
    assert resumed.step == 2
    resumed.train()
    assert resumed.reports == whole.reports


@pytest.mark.parametrize("told_at", [2, 4])
@pytest.mark.attack
def test_a_signal_ends_a_training_after_its_step_and_it_goes_on_the_same(tmp_path, monkeypatch, told_at):
    monkeypatch.setattr(Recorder, "_report", TokenizerTrainer._report)
    options = {"max_steps": 4, "save_steps": 3, "logging_steps": 2, "dataloader_num_workers": 0}
    whole = trainer_of(tmp_path / "whole", {}, small_model(), **options)
    whole.train()
    told, train_on = trainer_of(tmp_path / "told", {}, small_model(), **options), Recorder._train_on

    def train_and_tell(self, *args):
        train_on(self, *args)
        if self.step == told_at - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Recorder, "_train_on", train_and_tell)
        told.train()
    assert max(whole_checkpoints(tmp_path / "told", STATE)) == told_at and not (tmp_path / "told/release").exists()
    resumed = trainer_of(tmp_path / "told", {}, small_model(), resume=True, **options)
    assert resumed.step == told_at
    resumed.train()

    def history(name: str) -> list[dict]:
        lines = map(json.loads, (tmp_path / name / HISTORY).read_text(encoding="utf-8").splitlines())
        return [{name: value for name, value in line.items() if name not in SPEEDS} for line in lines]

    assert history("told") == history("whole")
    for end, other in zip(resumed._weights().values(), whole._weights().values()):
        assert all(torch.equal(value, other[name]) for name, value in end.items())
    cards = [(tmp_path / name / "release/README.md").read_text(encoding="utf-8") for name in ("told", "whole")]
    losses = [re.findall(r"\n\| ((?:l1|psnr|loss|eval_\w+) \| .*) \|", card) for card in cards]
    assert losses[0] == losses[1] and len(losses[0]) > 3


@pytest.mark.attack
def test_a_full_disk_leaves_the_tokenizer_training_its_last_checkpoint(tmp_path):
    options = {"max_steps": 4, "save_steps": 2, "save_total_limit": 1, "dataloader_num_workers": 0}
    trainer = trainer_of(tmp_path, {}, small_model(), **options)
    saved = trainer._save_checkpoint

    def save() -> None:
        with full_disk(10**9 if trainer.step < 4 else 20_000):
            saved()

    trainer._save_checkpoint = save
    with pytest.raises(Exception, match="File too large"):
        trainer.train()
    assert {path.name for path in tmp_path.glob("*checkpoint*")} == {"checkpoint-2"}
    resumed = trainer_of(tmp_path, {}, small_model(), resume=True, **options)
    assert resumed.step == 2
    resumed.train()
    assert {path.name for path in tmp_path.glob("*checkpoint*")} == {"checkpoint-4"}


@pytest.mark.attack
def test_a_tokenizer_training_goes_on_from_before_a_truncated_checkpoint(tmp_path):
    options = {"max_steps": 4, "save_steps": 1, "save_total_limit": 2, "dataloader_num_workers": 0}
    trainer = trainer_of(tmp_path, {}, small_model(), **options)
    trainer.train()
    end = {name: value.clone() for name, value in trainer.tokenizer.module.state_dict().items()}
    files = [path for path in sorted((tmp_path / "checkpoint-4").rglob("*")) if path.is_file()]
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        assert newest_checkpoint(tmp_path, STATE).name == "checkpoint-3", path
        path.write_bytes(content)
    state = tmp_path / "checkpoint-4/state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    resumed = trainer_of(tmp_path, {}, small_model(), resume=True, **options)
    assert resumed.step == 3
    resumed.train()
    assert all(torch.equal(value, end[name]) for name, value in resumed.tokenizer.module.state_dict().items())
