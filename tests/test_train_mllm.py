"""The MLLM's training, run as people run it: each run a process (or two), with its own config and folder."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from logging import FileHandler, getLogger
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from mllm_runs import DEEPSPEED, ENVIRONMENT, LORA, ROOT, built, changed, evaluations, losses, run, write_config
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainingArguments
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging
from typer.testing import CliRunner

from training.arguments import parse_yaml_and_command_line
from training.data import IGNORE, MLLMCollator, MLLMDataset, SampleTexts, Source
from training.merge_lora import app as merge_lora_app
from training.mllm_trainer import EvalShare, MLLMTrainer, set_visual_aside
from training.release import save_release
from training.train_mllm import IMAGE_TOKENS, MLLMArguments, check_run, main
from training.trainer_options import METRICS
from unitok_mllm import UniTokMLLMForConditionalGeneration


STAGES = {
    "align": (["embedder"], ["caption"], {"embedder"}),
    "pretrain": (
        ["embedder", "depth_head", "language_model"],
        ["caption", "draw", "text"],
        {"embedder", "depth_head", "language_model"},
    ),
    "instruct": (["embedder", "language_model"], ["read"], {"embedder", "language_model"}),
}


@pytest.mark.parametrize("stage", STAGES)
def test_one_step_of_each_stage_changes_exactly_what_it_should(tmp_path, start, data, stage):
    trainable, kinds, parts = STAGES[stage]
    sources = [data[kind] for kind in kinds]
    options = {"trainable": trainable, "num_samples": 12, "per_device_train_batch_size": 12, "caption_dropout": 0.0}
    main([str(write_config(tmp_path / "run.yaml", start, sources, max_steps=1, **options))])
    weights = load_file(start / "model.safetensors")
    expected = {name for name in weights if name.split(".")[0] in parts} - {"embedder.quantizer.codebooks"}
    expected.discard("embedder.quantizer.usage")
    assert changed(start, tmp_path / "run/release") == expected


def test_the_embedder_learns_the_words_of_captions(tmp_path, start, data):
    options = {"trainable": ["embedder"], "align_words": True, "per_device_train_batch_size": 8, "num_samples": 160}
    main([str(write_config(tmp_path / "run.yaml", start, [data["caption"]], learning_rate=1e-2, **options))])
    (first, *_), *_, (last, *_) = losses(tmp_path / "run")
    assert last < first - 0.2
    assert {name.partition(".")[0] for name in changed(start, tmp_path / "run/release")} == {"embedder"}


def test_tokens_that_are_no_targets(processor):
    ids = torch.tensor([processor.tokenizer.bos_token_id, 7, 8, processor.tokenizer.eos_token_id])
    sample = {"input_ids": ids, "labels": ids, "images": [], "image_targets": torch.zeros(0, dtype=torch.bool)}
    collator = MLLMCollator(0, (2, 4), no_targets=tuple(processor.tokenizer.all_special_ids))
    assert collator([sample])["labels"].tolist() == [[IGNORE, 7, 8, IGNORE]]


def test_a_run_says_what_it_trains_how_long_that_takes_and_what_to_try_then(tmp_path, start, data, caplog):
    caplog.set_level("INFO")
    main([str(write_config(tmp_path / "run.yaml", start, [data["text"]], trainable=["embedder"], num_samples=32))])
    said = [record.getMessage() for record in caplog.records if record.name.startswith("training.")]
    release = tmp_path / "run/release"
    embedder = load_file(start / "model.safetensors")
    trained = sum(v.numel() for n, v in embedder.items() if n.startswith("embedder.") and ".quantizer." not in n)
    assert f"training embedder: {trained / 1e6:.2f} M parameters at learning rate 0.001" in said
    assert "32 samples, 4 of them a step: 8 steps; after a few of them: the time that they take" in said
    assert [s for s in said if re.search(r"^[\d.]+ s a step: the other 2 take about 0:00:\d\d, evaluations aside$", s)]
    assert said[-1] == f"the model is in {release}; try it: unitok-mllm ask IMAGE QUESTION --model {release}"


def test_broken_samples_are_named_and_counted_over_all_workers(tmp_path, start, data, monkeypatch):
    rows = [{"image": f"{i}.png", "caption": f"a red circle {i}"} for i in (0, 1, 77, 2, 3, 78, 4, 5)]
    rows[0] = {"caption": "a caption without its image"}
    table = Path(data["caption"]["path"])
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = {"dataloader_num_workers": 2, "per_device_train_batch_size": 1, "max_broken_share": 0.9}
    log = FileHandler(tmp_path / "log", encoding="utf-8")  # the workers write to it too
    monkeypatch.setattr(getLogger("training.files"), "handlers", [log])
    main([str(write_config(tmp_path / "run.yaml", start, [data["caption"]], trainable=["embedder"], **options))])
    *named, last = (tmp_path / "log").read_text(encoding="utf-8").splitlines()
    assert last == "broken samples that were skipped: 3; they are named above"
    named = "\n".join(named)
    assert f"skipping row 0 of {table}: a caption belongs to one image, but `image` is None" in named
    for name in (77, 78):
        assert f"cannot read image '{table.parent}/{name}.png'" in named


def test_codebooks_are_trained_where_asked_for(tmp_path, start, data):
    options = {"train_codebooks": True, "trainable": ["embedder.quantizer"], "max_steps": 1}
    main([str(write_config(tmp_path / "run.yaml", start, [data["caption"]], **options))])
    assert changed(start, tmp_path / "run/release") == {"embedder.quantizer.codebooks"}


def test_the_release_is_pushed_and_no_checkpoint(tmp_path, start, data, monkeypatch):
    pushed = []
    monkeypatch.setattr("training.train_mllm.push_release", lambda *arguments: pushed.append(arguments))
    options = {"push_to_hub": True, "hub_model_id": "someone/circles", "hub_private_repo": True, "max_steps": 1}
    options |= {"save_strategy": "steps", "save_steps": 1, "card": {"license": "mit"}}
    main([str(write_config(tmp_path / "run.yaml", start, [data["text"]], **options))])
    assert pushed == [(tmp_path / "run/release", "someone/circles", True, None)]
    assert ModelCard.load(tmp_path / "run/release/README.md").data.license == "mit"


def test_each_part_has_its_learning_rate_and_vectors_no_decay(tmp_path, start, data, monkeypatch):
    seen = []
    create = MLLMTrainer.create_optimizer

    def spy(self, model=None):
        optimizer = create(self, model)
        names = {id(p): n for n, p in self.model.named_parameters()}
        seen.extend(
            (names[id(p)], g["lr"], g["weight_decay"], p.ndim) for g in optimizer.param_groups for p in g["params"]
        )
        return optimizer

    monkeypatch.setattr(MLLMTrainer, "create_optimizer", spy)
    rates = {"language_model": 1e-4, "embedder": 2e-3, "embedder.projection": 3e-3}
    options = {"learning_rates": rates, "weight_decay": 0.1, "max_steps": 1}
    main([str(write_config(tmp_path / "run.yaml", start, [data["draw"]], **options))])
    assert seen
    for name, learning_rate, decay, dims in seen:
        fitting = [prefix for prefix in rates if name.startswith(prefix)]
        assert learning_rate == (rates[max(fitting, key=len)] if fitting else 1e-3), name
        assert decay == (0.1 if dims >= 2 else 0.0), name


def test_packing_and_accumulation_change_no_loss(tmp_path, start, data):
    """Eight samples a step: in one batch, in four batches of two, and packed."""
    sources = list(data.values())
    variants = {
        "whole": {"per_device_train_batch_size": 8},
        "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        "packed": {"per_device_train_batch_size": 8, "packing": True},
        "checkpointed": {"per_device_train_batch_size": 8, "activation_checkpointing": True},
    }
    results = {}
    for name, options in variants.items():
        main([str(write_config(tmp_path / f"{name}.yaml", start, sources, max_steps=4, **options))])
        results[name] = losses(tmp_path / name)
    assert len(results["whole"]) == 4
    for name in variants:
        np.testing.assert_allclose(results[name], results["whole"], rtol=1e-4, err_msg=name)


def test_evaluations_give_one_loss_for_every_batch_size(tmp_path, data, lively_mllm, processor):
    """The very losses of the samples one by one: sums over all targets by their number."""
    sources = [Source(**data[kind]) for kind in ("read", "caption", "draw", "text")]
    dataset = MLLMDataset(sources, SampleTexts(processor, 250), caption_dropout=0.0)
    pad = processor.tokenizer.pad_token_id
    sums, counts = np.zeros(2), np.zeros(2)
    for i in range(len(dataset)):
        batch = MLLMCollator(pad, (4, 9))([dataset[i]])
        number = np.array([(batch["labels"] != IGNORE).sum(), 36 * sum(batch.get("image_targets", [0]))])
        for name in ("num_tokens", "pixel_places", "image_codes"):
            batch.pop(name, None)
        with torch.no_grad():
            output = lively_mllm(**batch)
        sums += number * [output.text_loss.item(), output.image_loss.item()]
        counts += number
    assert counts.min() > 0

    set_visual_aside(lively_mllm)
    options = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = MLLMTrainer(lively_mllm, options, eval_dataset=dataset, image_loss_share=0.2)
    for size, packing, weight in (
        *((1, {}, 0.0), (3, {}, 0.0), (40, {}, 0.0), (3, {}, 0.3)),
        *((5, {"pack_to": 200}, 0.0), (5, {"one_row": True}, 0.0)),
    ):
        options.per_device_eval_batch_size, trainer.text_loss_weight = size, weight
        trainer.data_collator = MLLMCollator(pad, (4, 9), **packing)
        metrics = trainer.evaluate()
        loss = sums.sum() / counts.sum() if not weight else weight * sums[0] / counts[0] + 0.7 * sums[1] / counts[1]
        values = [metrics[f"eval_{name}"] for name in METRICS]
        np.testing.assert_allclose(values, [loss, *sums / counts], rtol=1e-5, err_msg=f"{size} {packing} {weight}")


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_processes_share_what_is_evaluated_and_repeat_nothing(data, processor, processes):
    dataset = MLLMDataset([Source(**data["draw"])], SampleTexts(processor, 250), 10)
    shares = [EvalShare(dataset, rank, processes) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    counted = []
    for place in range(len(shares[0])):
        for sample in (share[place] for share in shares):
            if (sample["labels"] != IGNORE).any():
                assert sample["image_targets"].tolist() == [True]
                counted.append(sample["input_ids"].tolist())
            else:
                assert sample["image_targets"].tolist() == [False]
    assert counted == [dataset[i]["input_ids"].tolist() for i in range(10)]


def test_logged_losses_are_those_of_all_targets_since_the_last(tmp_path, start, data):
    """Without learning: eight steps of four samples, logged once, against one step of the 32."""
    results = {}
    for name, size in (("whole", 32), ("steps", 4)):
        options = {"per_device_train_batch_size": size, "learning_rate": 0.0, "logging_steps": 32 // size}
        main([str(write_config(tmp_path / f"{name}.yaml", start, list(data.values()), num_samples=32, **options))])
        history = json.loads((tmp_path / name / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        results[name] = [*losses(tmp_path / name), history[-1]["train_loss"]]
    assert len(results["steps"]) == 2
    np.testing.assert_allclose(results["steps"][0], results["whole"][0], rtol=1e-5)
    assert results["steps"][1] == pytest.approx(results["whole"][1]) == pytest.approx(results["steps"][0][0])


@pytest.fixture
def llm(tmp_path) -> Callable[..., Path]:
    """Saves a Qwen3 with one weight for embeddings and output, and a text tokenizer with these special tokens."""

    def save(*special_tokens: str) -> Path:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special_tokens = list(dict.fromkeys(["<pad>", "<s>", "</s>", *special_tokens]))
        backend.train_from_iterator(
            ["a red circle"], trainers.BpeTrainer(special_tokens=special_tokens, initial_alphabet=alphabet)
        )
        names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
        config = Qwen3Config(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes)
        Qwen3ForCausalLM(config).save_pretrained(tmp_path / "llm")
        tokenizer.save_pretrained(tmp_path / "llm")
        return tmp_path / "llm"

    return save


def joined(tmp_path, start, llm: Path, sources: list[dict], **options) -> Path:
    """A config for training the LLM joined with the tokenizer of `start`."""
    parts = {"model": "", "visual_model": str(start), "llm": str(llm), "embedder_dim": 40, "embedder_heads": 2}
    return write_config(tmp_path / "joined.yaml", start, sources, **parts, **options)


def test_a_missing_gguf_file_is_named_and_a_folder_with_nothing_else_is_fine(tmp_path, start, data):
    (tmp_path / "llm").mkdir()
    options = {"model": "", "visual_model": str(start), "llm": str(tmp_path / "llm"), "llm_gguf_file": "weights.gguf"}
    config = str(write_config(tmp_path / "run.yaml", start, [data["text"]], **options))
    arguments = parse_yaml_and_command_line((MLLMArguments, TrainingArguments), [config])
    with pytest.raises(ValueError, match="llm_gguf_file: there is no weights.gguf in"):
        check_run(*arguments)
    (tmp_path / "llm/weights.gguf").touch()
    check_run(*arguments)


@pytest.mark.parametrize("pair", IMAGE_TOKENS)
def test_the_tokens_around_an_image_are_those_that_the_text_tokenizer_has(tmp_path, start, llm, pair):
    folder = llm("<other>", *pair, "<0x00>", "<0x01>")
    model, processor = built(joined(tmp_path, start, folder, []))
    assert (processor.boi_token, processor.eoi_token) == pair
    assert (model.config.boi_token_id, model.config.eoi_token_id) == (4, 5)
    named = {"boi_token": "<0x01>", "eoi_token": "<other>"}
    _, processor = built(joined(tmp_path, start, folder, [], **named))
    assert (processor.boi_token, processor.eoi_token) == ("<0x01>", "<other>")


def test_an_llm_of_ones_own_learns_words_first_then_answers_by_lora(tmp_path, start, llm, data):
    words = {"align_words": True, "trainable": ["embedder"], "max_steps": 2}
    main([str(joined(tmp_path, start, llm(*IMAGE_TOKENS[0]), [data["caption"]], **words))])
    lora = LORA | {"trainable": ["embedder"], "learning_rates": {"embedder": 1e-3}, "packing": True, "max_steps": 2}
    sources = [data["read"] | {"weight": 0.9}, data["text"] | {"weight": 0.1}]
    main([str(write_config(tmp_path / "lora.yaml", tmp_path / "joined/release", sources, num_samples=8, **lora))])
    names = changed(tmp_path / "joined/release", tmp_path / "lora/release")
    assert {name.partition(".")[0] for name in names} == {"embedder", "language_model"}


def test_tokens_around_an_image_are_added_with_rows_for_them_or_refused(tmp_path, start, llm):
    folder = llm()
    size = len(AutoTokenizer.from_pretrained(folder))
    with pytest.raises(ValueError, match="no <boi> and no <eoi> .* set add_image_tokens, or name two of its tokens"):
        built(joined(tmp_path, start, folder, []))
    model, processor = built(joined(tmp_path, start, folder, [], add_image_tokens=True))
    assert (processor.boi_token, processor.eoi_token, model.config.llm_sizes.vocab_size) == (
        "<boi>",
        "<eoi>",
        size + 2,
    )
    assert (model.config.boi_token_id, model.config.eoi_token_id, model.config.image_token_id) == (
        size,
        size + 1,
        size + 2,
    )
    before = Qwen3ForCausalLM.from_pretrained(folder)
    rows = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is rows and len(rows) == size + 2
    assert torch.equal(rows[:size], before.get_input_embeddings().weight)
    assert not torch.equal(rows[size], rows[size + 1]) and rows[size:].any(dim=1).all()
    named = {"boi_token": "<s>", "eoi_token": "<end>"}
    model, processor = built(joined(tmp_path, start, folder, [], add_image_tokens=True, **named))
    assert (model.config.boi_token_id, model.config.eoi_token_id, model.config.llm_sizes.vocab_size) == (
        1,
        size,
        size + 1,
    )


def test_a_tied_llm_resumes_without_a_word_of_missing_weights_but_of_those_that_are(tmp_path, start, llm, data):
    options = {"save_strategy": "steps", "save_steps": 1, "add_image_tokens": True}
    main([str(joined(tmp_path, start, llm(), [data["draw"]], max_steps=2, **options))])
    shutil.rmtree(tmp_path / "joined/checkpoint-2")
    first = losses(tmp_path / "joined")
    weights = tmp_path / "joined/checkpoint-1/model.safetensors"
    assert "language_model.lm_head.weight" not in load_file(weights)
    with CaptureLogger(logging.get_logger("transformers.trainer")) as captured:
        main([str(tmp_path / "joined.yaml")])
    assert "missing keys" not in captured.out
    np.testing.assert_allclose(losses(tmp_path / "joined"), first, rtol=1e-6)
    save_file({k: v for k, v in load_file(weights).items() if k != "embedder.norm.bias"}, weights)
    shutil.rmtree(tmp_path / "joined/checkpoint-2")
    with CaptureLogger(logging.get_logger("transformers.trainer")) as captured:
        main([str(tmp_path / "joined.yaml")])
    assert "There were missing keys in the checkpoint model loaded: ['embedder.norm.bias']." in captured.out


@pytest.mark.slow  # compiles every shape of batch: two minutes
def test_a_compiled_training_gives_the_losses_and_the_release_of_a_plain_one(tmp_path, start, data):
    for name, options in (("plain", {}), ("compiled", {"torch_compile": True, "torch_compile_backend": "eager"})):
        main(
            [str(write_config(tmp_path / f"{name}.yaml", start, [data["read"], data["draw"]], max_steps=2, **options))]
        )
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "plain"), rtol=1e-4)
    first, second = (load_file(tmp_path / f"{name}/release/model.safetensors") for name in ("plain", "compiled"))
    assert first.keys() == second.keys()
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.full
def test_two_processes_give_the_losses_of_one(tmp_path, start, data):
    sources = list(data.values())
    rows = Path(data["text"]["path"]).read_text(encoding="utf-8").splitlines()
    odd = tmp_path / "odd.jsonl"
    odd.write_text("\n".join(rows[:3]), encoding="utf-8")  # so that the processes have not equally many to evaluate
    options = {"max_steps": 6, "max_grad_norm": 1.0, "eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True}
    options |= {"eval_datasets": [data["read"], data["draw"], {"path": str(odd), "type": "text"}]}
    one = run(write_config(tmp_path / "one.yaml", start, sources, **options))
    options |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 3}
    two = run(write_config(tmp_path / "two.yaml", start, sources, **options), 2)
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-3)
    assert len(evaluations(one)) == 3
    np.testing.assert_allclose(evaluations(two)[0], evaluations(one)[0], rtol=1e-5)
    np.testing.assert_allclose(evaluations(two), evaluations(one), rtol=1e-3)


@pytest.mark.slow  # two processes, twice: two minutes each
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_zero_gives_the_losses_of_one_process_and_a_model_that_loads(tmp_path, start, data, stage):
    """Twenty steps, in some of which one process has only text."""
    sources = [data["text"] | {"weight": 2.0}, data["read"] | {"weight": 1.0}, data["draw"] | {"weight": 1.0}]
    dataset = MLLMDataset([Source(**source) for source in sources], texts=None, num_samples=80)
    only_text = (dataset.choices.reshape(20, 2, 2) == 0).all(axis=2)
    assert (only_text[:, 0] != only_text[:, 1]).any()
    # one gradient of the second step is 1e-8, a rounding error, which Adam's default epsilon would make a whole step of
    options = {"num_samples": 80, "save_strategy": "steps", "save_steps": 10, "adam_epsilon": 1e-6}
    one = run(write_config(tmp_path / "one.yaml", start, sources, **options))
    options["per_device_train_batch_size"] = 2
    config = write_config(tmp_path / "two.yaml", start, sources, **options)
    two = run(config, 2, "--deepspeed", str(DEEPSPEED / f"{stage}.json"))
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-3)
    expected = load_file(one / "release/model.safetensors")
    model = UniTokMLLMForConditionalGeneration.from_pretrained(two / "release")
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-2, atol=1e-4)
    assert load_file(two / "release/model.safetensors").keys() == expected.keys()
    resumed = run(
        config,
        2,
        "--deepspeed",
        str(DEEPSPEED / f"{stage}.json"),
        "--resume_from_checkpoint",
        str(two / "checkpoint-10"),
    )
    np.testing.assert_allclose(losses(resumed), losses(one), rtol=1e-3)


def test_samples_are_drawn_and_answered_at_evaluations(tmp_path, start, data):
    picture = str(Path(data["read"]["path"]).parent / "0.png")
    options = {
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_datasets": [data["read"]],
        "sample_prompts": ["a red circle", "a blue shape"],
        "sample_questions": [{"image": picture, "question": "what is this?"}],
        "report_to": "tensorboard",
    }
    main([str(write_config(tmp_path / "run.yaml", start, [data["draw"]], **options))])
    samples = tmp_path / "run/samples"
    assert {path.name for path in samples.iterdir()} == {f"step-{n}.{e}" for n in (2, 4) for e in ("png", "json")}
    answers = json.loads((samples / "step-4.json").read_text(encoding="utf-8"))["answers"]
    assert answers[0]["question"] == "what is this?" and isinstance(answers[0]["answer"], str)
    assert Image.open(samples / "step-4.png").getcolors(100000)
    history = json.loads((tmp_path / "run/trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert sum("eval_loss" in line for line in history) == 2

    card = (tmp_path / "run/release/README.md").read_text(encoding="utf-8")
    (last,) = (line for line in history if "loss" in line and line["step"] == 4)
    assert f"Started from `{start}`." in card and f"| `{data['draw']['path']}` | task draw, type captions |" in card
    assert "| steps | 4 |\n| samples in a step | 4 |\n| learning rate | 0.001 |\n" in card and "| float32 |" in card
    assert f"| loss | {last['loss']:.4g} |" in card and f"| image_loss | {last['image_loss']:.4g} |" in card
    assert f"| eval_loss | {history[-2]['eval_loss']:.4g} |" in card
    assert all(line["tokens_per_second"] > 0 and line["images_per_second"] > 0 for line in history if "loss" in line)
    assert list((tmp_path / "run").glob("**/events.out.tfevents*"))


@pytest.mark.slow  # a process of W&B's own, some ten seconds
def test_wandb_gets_every_loss_and_the_samples(tmp_path, start, data, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="no dependency of this project: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    picture = str(Path(data["read"]["path"]).parent / "0.png")
    options = {
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_datasets": [data["read"], data["draw"]],
        "sample_prompts": ["a red circle"],
        "sample_questions": [{"image": picture, "question": "what is this?"}],
        "report_to": "wandb",
        "run_name": "circles",
    }
    main([str(write_config(tmp_path / "run.yaml", start, [data["read"], data["draw"]], **options))])
    assert wandb.run.name == "circles" and wandb.run.config["learning_rate"] == 1e-3
    summary = {name: wandb.run.summary[name] for name in wandb.run.summary.keys()}
    wandb.finish()
    for name, value in zip(METRICS, losses(tmp_path / "run")[-1]):
        assert summary[f"train/{name}"] == value
    for name, value in zip(METRICS, evaluations(tmp_path / "run")[-1]):
        assert summary[f"eval/{name}"] == value
    assert summary["train/tokens_per_second"] > 0 and summary["train/global_step"] == 4
    (offline,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(offline.glob("run-*.wandb")) and summary["answers"]["nrows"] == 1
    assert (
        Image.open(offline / "files" / summary["samples"]["path"]).size
        == Image.open(tmp_path / "run/samples/step-4.png").size
    )


def test_codes_of_another_tokenizer_are_refused(tmp_path, start, data):
    folder = tmp_path / "codes"
    extract = [sys.executable, "-m", "training.extract_codes", data["read"]["path"], str(folder), "--visual-model"]
    shipped = str(ROOT / "unitok_mllm/checkpoints/tiny")
    subprocess.run([*extract, shipped, "--workers", "0"], cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    with pytest.raises(
        ValueError, match=r"codes are for 8 codebooks of 512 and 16 positions, .* 4 codebooks of 32 and 9"
    ):
        main([str(write_config(tmp_path / "run.yaml", start, [data["read"] | {"codes": str(folder)}]))])


def test_what_cannot_be_trained_is_refused(tmp_path, start, data):
    for options, message in (
        ({"trainable": ["head"]}, "trainable has no 'head'; it has embedder, depth_head, language_model"),
        ({"trainable": ["embedder.nothing"]}, "'embedder.nothing', which matches no parameter"),
        ({"num_train_epochs": 2}, "num_samples"),
        ({"lora": {"r": 4}}, "take language_model out"),
        ({"load_in_4bit": True}, "needs lora"),
        ({"datasets": []}, "no training data"),
        ({"card": {"licence": "mit"}}, "card has no 'licence': did you mean 'license'"),
        ({"model": ""}, "Give either model"),
        ({"eval_datasets": [data["read"]]}, "eval_strategy is no, with eval_datasets"),
        ({"eval_strategy": "steps"}, "eval_strategy is steps, without eval_datasets"),
        ({"learning_rates": {"embeder": 1e-3}}, "learning_rates has no 'embeder': did you mean 'embedder'"),
        ({"learning_rates": {"embedder": 1.0}, "trainable": ["depth_head"]}, "'embedder', which matches no trained"),
        ({"llm": "x"}, "With model, llm 'x' would have no effect"),
        ({"boi_token": "<x>"}, "With model, boi_token '<x>' would have no effect"),
        ({"add_image_tokens": True}, "With model, add_image_tokens True would have no effect"),
        ({"sample_options": {"top_k": 3}}, "With no sample_prompts, sample_options"),
        ({"train_codebooks": True, "trainable": ["depth_head"]}, "train_codebooks needs embedder"),
        ({"release_dtype": "int8"}, "release_dtype must be one of float32, float16, bfloat16, got 'int8'"),
        ({"llm_dtype": "half"}, "llm_dtype must be one of .*, got 'half'"),
        ({"text_loss_weight": 1.5}, "text_loss_weight .1.5. is not between 0.0 and 1.0"),
        ({"image_loss_share": 0.0}, "image_loss_share must be above 0"),
        ({"lora": {"modules_to_save": ["x"]}, "trainable": ["embedder"]}, "lora takes no modules_to_save"),
        ({"align_words": True}, "align_words trains the embedder alone: set trainable: .embedder."),
        ({"align_words": True} | LORA, "align_words trains the embedder alone"),
        (
            {"align_words": True, "trainable": ["embedder"]},
            "align_words takes captions to read .* got {.*conversations",
        ),
        (
            {"align_words": True, "trainable": ["embedder"], "deepspeed": str(DEEPSPEED / "zero3.json")}
            | {"datasets": [data["caption"]]},
            "as a whole: train it without ZeRO-3",
        ),
        ({"load_in_4bit": True, "visual_model": "x"} | LORA, "load_in_4bit needs `model` alone"),
    ):
        with pytest.raises(ValueError, match=message):
            main([str(write_config(tmp_path / "run.yaml", start, [data["read"]], **options))])


def test_a_release_with_an_empty_weight_is_refused(tmp_path, mllm, processor):
    weights = mllm.state_dict() | {"depth_head.head.weight": torch.zeros(0)}
    with pytest.raises(ValueError, match="depth_head.head.weight is empty"):
        save_release(mllm, processor, tmp_path / "release", state_dict=weights)
    weights.pop("depth_head.head.weight")
    with pytest.raises(ValueError, match="1 weights are missing, depth_head.head.weight"):
        save_release(mllm, processor, tmp_path / "release", state_dict=weights)
    assert not list(tmp_path.glob("**/model.safetensors"))


def test_a_weight_too_large_for_the_dtype_is_named(tmp_path, start, mllm, processor, data):
    with torch.no_grad():
        mllm.depth_head.head.weight[3, 4] = -1e5
    save_release(mllm, processor, tmp_path / "wide", torch.bfloat16)
    message = r"depth_head.head.weight reaches 100000, but torch.float16 ends at 65504: store it in bfloat16"
    with pytest.raises(ValueError, match=message):
        save_release(mllm, processor, tmp_path / "narrow", torch.float16)
    assert not (tmp_path / "narrow").exists()

    main([str(write_config(tmp_path / "run.yaml", start, [data["draw"]], max_steps=1, **LORA))])
    adapter = tmp_path / "run/adapter/adapter_model.safetensors"
    weights = load_file(adapter)
    weights["base_model.model.depth_head.head.weight"][3, 4] = -1e5
    save_file(weights, adapter, {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(merge_lora_app, [str(adapter.parent), str(tmp_path / "merged")], catch_exceptions=False)
    assert not (tmp_path / "merged").exists()

    mllm.depth_head.head.weight.data[3, 4] = torch.inf
    with pytest.raises(ValueError, match="depth_head.head.weight is not finite"):
        save_release(mllm, processor, tmp_path / "wide", torch.float32)
