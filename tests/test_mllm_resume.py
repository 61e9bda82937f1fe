"""Breaks in the MLLM's training: kills, signals and full disks, and the checkpoints that are kept."""

import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from faulty_disk import full_disk
from mllm_runs import DEEPSPEED, LORA, changed, evaluations, launch, losses, run, write_config
from safetensors.torch import load_file
from transformers import TrainingArguments

from training import OF_NO_USE
from training.checkpoints import newest_checkpoint
from training.data import MLLMCollator, MLLMDataset, SampleTexts, Source
from training.errors import one_line_errors
from training.files import whole_checkpoints
from training.mllm_trainer import WHOLE, ExpectedTimeCallback, MLLMTrainer, set_visual_aside
from training.train_mllm import main


class Interrupted(ExpectedTimeCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("save_steps", [2, 5])
def test_ctrl_c_says_how_to_go_on(tmp_path, start, data, save_steps, monkeypatch, capsys):
    monkeypatch.setattr("training.train_mllm.ExpectedTimeCallback", Interrupted)
    options = {"save_strategy": "steps", "save_steps": save_steps, "max_steps": 8, "trainable": ["embedder"]}
    config = write_config(tmp_path / "run.yaml", start, [data["text"]], **options)
    with pytest.raises(SystemExit) as end:
        one_line_errors()(main)([str(config)])
    run = tmp_path / "run"
    said = {
        2: f"Interrupted. The same command goes on from {run}/checkpoint-2.",
        5: f"Interrupted before the first checkpoint in {run}: the same command begins anew.",
    }
    assert end.value.code == 130 and capsys.readouterr().err.endswith(f"\n{said[save_steps]}\n")


@pytest.mark.slow  # a process of its own: half a minute
def test_a_real_ctrl_c_ends_in_one_line_and_libraries_say_nothing_of_no_use(tmp_path, start, data):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 100000, "dataloader_num_workers": 5}
    options |= {"logging_steps": 1, **LORA}  # with LoRA come torchao and its warnings
    process = launch(write_config(tmp_path / "run.yaml", start, [data["text"]], **options), start_new_session=True)
    lines = []
    for line in map(bytes.decode, process.stdout):
        lines.append(line)
        if "'loss'" in line and sum("'loss'" in line for line in lines) == 3:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    assert process.wait(timeout=100) == 130, "".join(lines)
    said = re.fullmatch(r"Interrupted. The same command goes on from (.*).\n", lines[-1])
    assert said and (Path(said[1]) / WHOLE).is_file()
    text = "".join(lines)
    assert "Traceback" not in text and not [no_use for no_use in OF_NO_USE if no_use in text]


@pytest.mark.parametrize(
    "kind",
    [
        "bare",
        "lora",
        pytest.param("zero3", marks=pytest.mark.slow),  # two processes: half a minute
    ],
)
def test_the_best_checkpoint_is_kept_and_released(tmp_path, start, data, kind):
    """The loss falls, and the highest is called the best: that of the first evaluation."""
    options = {"eval_datasets": [data["draw"]], "max_steps": 6, "learning_rate": 1e-3, "save_total_limit": 1}
    options |= {f"{what}_strategy": "steps" for what in ("eval", "save")} | {"eval_steps": 2, "save_steps": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "image_loss", "greater_is_better": True}
    if kind == "lora":
        options |= LORA | {"trainable": ["depth_head.layers"]}
    config = write_config(tmp_path / "run.yaml", start, [data["draw"]], **options)
    if kind == "zero3":
        options["per_device_train_batch_size"] = 2
        run(config, 2, "--deepspeed", str(DEEPSPEED / "zero3.json"))
    else:
        main([str(config)])
    folder = tmp_path / "run"
    image_losses = [image_loss for _, _, image_loss in evaluations(folder)]
    assert image_losses[0] > image_losses[1] > image_losses[2]
    assert list(whole_checkpoints(folder, WHOLE)) == [2, 6]
    if kind == "lora":
        best, last = (load_file(folder / f"checkpoint-{step}/adapter_model.safetensors") for step in (2, 6))
        released = load_file(folder / "adapter/adapter_model.safetensors")
    else:
        best, last = (load_file(folder / f"checkpoint-{step}/model.safetensors") for step in (2, 6))
        released = load_file(folder / "release/model.safetensors")
    assert best and all(torch.equal(released[name], weight) for name, weight in best.items())
    assert any(not torch.equal(released[name], weight) for name, weight in last.items())
    check = {"eval_datasets": [data["draw"]], "eval_strategy": "steps", "eval_on_start": True, "max_steps": 1}
    main([str(write_config(tmp_path / "check.yaml", folder / "release", [data["draw"]], **check))])
    np.testing.assert_allclose(evaluations(tmp_path / "check")[0], evaluations(folder)[0], rtol=1e-5)
    card = (folder / "release/README.md").read_text(encoding="utf-8")
    assert f"| released | step 2, of the best image_loss ({image_losses[0]:.4g}) |" in card
    assert f"| eval_image_loss | {image_losses[0]:.4g} |" in card


def test_the_number_of_checkpoints_is_kept_to(tmp_path, start, data):
    options = {"eval_datasets": [data["text"]], "max_steps": 5, "metric_for_best_model": "loss"}
    options |= {f"{what}_strategy": "steps" for what in ("eval", "save")} | {"eval_steps": 1, "save_steps": 1}
    for name, limit, greater, kept in (
        ("low", 1, False, [5]),
        ("high", 3, True, [1, 4, 5]),
        ("two", 2, False, [4, 5]),
    ):
        best = {"save_total_limit": limit, "greater_is_better": greater}
        main([str(write_config(tmp_path / f"{name}.yaml", start, [data["text"]], **options, **best))])
        assert list(whole_checkpoints(tmp_path / name, WHOLE)) == kept


def test_a_run_without_a_best_model_releases_none(tmp_path, start, data):
    options = {"eval_datasets": [data["text"]], "eval_strategy": "steps", "save_strategy": "steps", "max_steps": 2}
    options |= {"load_best_model_at_end": True, "eval_steps": 1, "save_steps": 1, "eval_delay": 3}
    with pytest.raises(ValueError, match="There is no best model to release"):
        main([str(write_config(tmp_path / "run.yaml", start, [data["text"]], **options))])
    assert not (tmp_path / "run/release").exists()


@pytest.mark.full
@pytest.mark.attack
def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path, start, data):
    sources = list(data.values())
    options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 2}
    options |= {"image_loss_share": 0.5, "caption_dropout": 0.5}
    whole = losses(run(write_config(tmp_path / "whole.yaml", start, sources, **options)))
    config = write_config(tmp_path / "killed.yaml", start, sources, **options)
    process = launch(config)
    deadline = time.monotonic() + 200
    while not (tmp_path / f"killed/checkpoint-6/{WHOLE}").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/release").exists()
    broken_off = tmp_path / "killed/checkpoint-99"  # as a kill in the middle of saving leaves it
    broken_off.mkdir()
    (broken_off / "model.safetensors").write_bytes(b"")
    resumed = losses(run(config))
    assert len(resumed) == 12
    np.testing.assert_allclose(resumed, whole, rtol=1e-6)
    assert list(whole_checkpoints(tmp_path / "killed", WHOLE)) == [9, 12]
    first, second = (load_file(tmp_path / f"{name}/release/model.safetensors") for name in ("whole", "killed"))
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.attack
def test_an_mllm_training_goes_on_from_before_a_truncated_checkpoint(tmp_path, start, data, caplog):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    config = str(write_config(tmp_path / "run.yaml", start, [data["text"], data["draw"]], **options))
    main([config])
    whole, released = losses(tmp_path / "run"), load_file(tmp_path / "run/release/model.safetensors")
    newest, truncated = tmp_path / "run/checkpoint-3", set()
    for path in sorted(newest.iterdir()):
        content = path.read_bytes()
        if path.suffix in (".safetensors", ".pt", ".pth", ".bin", ".json"):
            path.write_bytes(content[: len(content) // 2])
            assert newest_checkpoint(tmp_path / "run", WHOLE).name == "checkpoint-2"
            path.write_bytes(content)
            truncated.add(path.name)
    assert truncated >= {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    (newest / "optimizer.pt").write_bytes(b"")
    shutil.rmtree(tmp_path / "run/release")
    main([config])
    assert f"{newest}/optimizer.pt is broken: File is not a zip file: going on from the checkpoint" in caplog.text
    assert losses(tmp_path / "run") == whole
    again = load_file(tmp_path / "run/release/model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in released.items())


@pytest.mark.attack
def test_signals_end_a_run_after_their_step_and_the_same_command_goes_on(tmp_path, start, data, capsys, monkeypatch):
    sources, options = list(data.values()), {"max_steps": 6, "save_strategy": "steps", "save_steps": 4}
    options |= {"image_loss_share": 0.5, "caption_dropout": 0.5, "logging_steps": 2, "save_total_limit": 1}
    script, step = one_line_errors()(main), MLLMTrainer.training_step
    signals = {2: signal.SIGTERM, 4: signal.SIGINT}  # in the middle of the third step, and of the fifth

    def interrupted_step(self, *args, **kwargs):
        if number := signals.pop(self.state.global_step, None):
            os.kill(os.getpid(), number)
        return step(self, *args, **kwargs)

    script([str(write_config(tmp_path / "whole.yaml", start, sources, **options))])
    config = [str(write_config(tmp_path / "told.yaml", start, sources, **options))]
    monkeypatch.setattr(MLLMTrainer, "training_step", interrupted_step)
    for number, last_step in ((signal.SIGTERM, 3), (signal.SIGINT, 5)):
        with pytest.raises(SystemExit) as end:
            script(config)
        said = capsys.readouterr().err
        assert end.value.code == 128 + number and "Stopping after this step, with a checkpoint" in said
        assert said.endswith(f"Interrupted. The same command goes on from {tmp_path}/told/checkpoint-{last_step}.\n")
        assert list(whole_checkpoints(tmp_path / "told", WHOLE)) == [last_step]
    assert not (tmp_path / "told/release").exists()
    script(config)
    assert losses(tmp_path / "told") == losses(tmp_path / "whole")
    assert not changed(tmp_path / "told/release", tmp_path / "whole/release")


@pytest.mark.attack
def test_without_checkpoints_a_signal_leaves_none(tmp_path, start, data, capsys, monkeypatch):
    monkeypatch.setattr(MLLMTrainer, "log", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as end:
        one_line_errors()(main)([str(write_config(tmp_path / "run.yaml", start, [data["text"]], max_steps=3))])
    assert end.value.code == 143 and f"first checkpoint in {tmp_path}/run: the same command" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.attack
def test_a_full_disk_leaves_the_mllm_training_its_last_checkpoint(tmp_path, lively_mllm, processor):
    (tmp_path / "text.jsonl").write_text('{"text": "what is red"}\n' * 8, encoding="utf-8")
    data = MLLMDataset([Source(str(tmp_path / "text.jsonl"), "text")], SampleTexts(processor, 50))
    set_visual_aside(lively_mllm)
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "report_to": "none"}
    options |= {"per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True}
    options |= {"dataloader_pin_memory": False, "remove_unused_columns": False}

    class Trainer(MLLMTrainer):
        free = 10**9

        def _save_checkpoint(self, model, trial):
            with full_disk(10**9 if self.state.global_step < 4 else self.free):
                super()._save_checkpoint(model, trial)

    def trainer() -> Trainer:
        collator = MLLMCollator(processor.tokenizer.pad_token_id, (4, 9))
        arguments = TrainingArguments(output_dir=str(tmp_path / "run"), **options)
        return Trainer(model=lively_mllm, args=arguments, train_dataset=data, data_collator=collator)

    first = trainer()
    first.free = 20_000
    with pytest.raises(Exception, match="File too large"):
        first.train()
    whole = {path.parent.name for path in (tmp_path / "run").glob("checkpoint-*/whole")}
    assert whole == {"checkpoint-2"}
    second = trainer()
    second.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert second.state.global_step == 4
    whole = {path.parent.name for path in (tmp_path / "run").glob("checkpoint-*/whole")}
    assert whole == {"checkpoint-4"}
