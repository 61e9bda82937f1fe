"""The tokenizer's training: its loop, its data, its checkpoints, and its script."""

import copy
import json
import math
import os
import re
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from multiprocessing import set_forkserver_preload
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import webdataset as wds
from accelerate.state import AcceleratorState, GradientState
from faulty_disk import full_disk
from huggingface_hub import ModelCard
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import multiprocessing, nn
from torch.utils.data import Dataset, Subset
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from training import text_tokenizer
from training.arguments import parse_yaml_and_command_line
from training.checkpoints import newest_checkpoint, set_random_state
from training.codebooks import gather_chunks, start_from_data
from training.discriminator import FeatureDiscriminator
from training.errors import one_line_errors
from training.files import whole_checkpoints
from training.image_text_data import ImageTextStream, ImageTextTransform
from training.interrupts import Interrupted
from training.losses import TERMS, LossArguments, psnr
from training.perceptual import FrozenFeatures, perceptual_distance
from training.progress import ExpectedTime
from training.resumable_batches import ResumableBatches
from training.sharding import MOMENTS
from training.tokenizer_arguments import TokenizerTrainingArguments
from training.tokenizer_trainer import CODEBOOKS, HISTORY, SPEEDS, STATE, TokenizerTrainer
from training.train_tokenizer import (
    TokenizerArguments,
    build_datasets,
    build_model,
    check_text_tokenizer,
    load_open_clip,
    main,
)
from unitok_mllm import UniTokConfig, UniTokImageProcessor, UniTokModel


set_forkserver_preload(["training.tokenizer_trainer"])
CONFIGS = Path(__file__).parent.parent / "training" / "configs"
SIZE = 32
RATES = ("learning_rate", "adam_beta1", "adam_epsilon", "weight_decay", "warmup", "final_learning_rate", "ema_decay")
RATES += ("max_grad_norm", "discriminator_learning_rate", "discriminator_beta2", "discriminator_weight_decay")
RATES += ("discriminator_adam_epsilon",)
ALL_TERMS = {f"{name}_weight": 1.0 for name in TERMS} | {"gan_start": 0.0, "gan_warmup": 0.0}


@pytest.fixture(autouse=True)
def _no_accelerator_of_another_test():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Noise(Dataset):
    """Random pictures with captions of one word, changed at every look."""

    def __init__(self, length: int = 16):
        generator = torch.Generator().manual_seed(0)
        self.pixel_values = torch.rand(length, 3, SIZE, SIZE, generator=generator) * 2 - 1

    def __len__(self) -> int:
        return len(self.pixel_values)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        generator = torch.Generator().manual_seed(1000 * epoch + index)
        pixels = self.pixel_values[index] * torch.rand((), generator=generator)
        return {"pixel_values": pixels, "input_ids": torch.tensor([1, 10 + index, 2, 0])}


class Recorder(TokenizerTrainer):
    """Keeps what is reported, by step, and can kill its own process."""

    die_at = math.inf
    speeds: dict[str, float] = {}  # of the last log

    def __init__(self, *args, **kwargs):
        self.reports = {}
        super().__init__(*args, **kwargs)

    def _report(self, values: dict[str, float]) -> None:
        self.speeds = {name: values.pop(name) for name in SPEEDS if name in values} or self.speeds
        self.reports[self.step] = self.reports.get(self.step, {}) | values
        if self.step == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)


def small_model(**vision_overrides) -> UniTokModel:
    torch.manual_seed(0)
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "stem_width": 8,
        "stage_dims": (8, 16),
    }
    vision |= {"stage_depths": (1, 1), "codebook_size": 16, "image_size": SIZE}
    config = UniTokConfig.preset("tiny", **vision | vision_overrides)
    text = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1}
    for name, value in text.items():
        setattr(config.text_config, name, value)
    return UniTokModel(config)


def trainer_of(
    folder: Path,
    losses: dict,
    model: UniTokModel | None = None,
    dataset=None,
    samples_per_epoch=None,
    eval_dataset=None,
    **arguments,
) -> Recorder:
    losses = LossArguments(**losses)
    networks = {}
    torch.manual_seed(1)
    if losses.perceptual_weight:
        networks["perceptual"] = perceptual_distance("test_resnet", SIZE, pretrained=False)
    if losses.gan_weight:
        networks["discriminator"] = FeatureDiscriminator(FrozenFeatures("test_vit", SIZE, (0, 4), pretrained=False))
    defaults = {"max_steps": 1, "per_device_train_batch_size": 4, "warmup": 0.0, "use_cpu": True, "bf16": False}
    defaults |= {"logging_steps": 1, "learning_rate": 1e-3, "output_dir": str(folder)}
    arguments = TokenizerTrainingArguments(**defaults | arguments)
    dataset = Noise() if dataset is None else dataset
    model = small_model() if model is None else model
    networks |= {"samples_per_epoch": samples_per_epoch, "eval_pixels": Noise(2).pixel_values}
    networks["eval_dataset"] = eval_dataset
    return Recorder(model, arguments, losses, dataset, **networks)


def copy_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def after_each_step(trainer: TokenizerTrainer, call: Callable[[], None]) -> None:
    trainer.tokenizer.optimizer.optimizer.register_step_post_hook(lambda optimizer, args, kwargs: call())


def test_one_step_with_every_term_moves_every_trained_parameter_and_no_other(tmp_path):
    trainer = trainer_of(tmp_path, ALL_TERMS)
    before, judge = copy_of(trainer.tokenizer.module), copy_of(trainer.discriminator.module)
    perceptual = copy_of(trainer.perceptual)
    trainer.train()
    still = {name for name, value in trainer.tokenizer.module.state_dict().items() if torch.equal(value, before[name])}
    unused = {"text_model.text_model.embeddings.position_embedding.weight"}  # all its rows but the first four
    assert still - unused == set()
    for name, value in trainer.discriminator.module.state_dict().items():
        if name.endswith(".2.bias"):
            continue  # within the hinge's margins the real and the fake pull it equally hard
        assert torch.equal(value, judge[name]) == name.startswith("features."), name
    assert all(torch.equal(value, perceptual[name]) for name, value in trainer.perceptual.state_dict().items())
    report = trainer.reports[1]
    assert report.keys() >= {
        *TERMS,
        "loss",
        "psnr",
        "running_codebook_usage",
        "learning_rate",
        "grad_norm",
        "eval_psnr",
    }
    expected = sum(report[name] for name in TERMS) + (report["gan_adaptive_weight"] - 1) * report["gan"]
    assert report["loss"] == pytest.approx(expected, rel=1e-5)


def test_terms_without_weight_train_nothing_and_terms_start_late(tmp_path):
    losses = {"contrastive_weight": 0.0, "perceptual_weight": 1.0, "perceptual_start": 0.5, "gan_weight": 1.0}
    losses |= {"gan_start": 0.75}
    trainer = trainer_of(tmp_path, losses, max_steps=4)
    before, judge = copy_of(trainer.tokenizer.module), copy_of(trainer.discriminator.module)
    trainer.train()
    for name, value in trainer.tokenizer.module.state_dict().items():
        frozen = name.startswith(("text_model.", "logit_scale", "vision_model.fc_norm.", "vision_model.projection."))
        assert torch.equal(value, before[name]) == frozen, name
    assert [{"perceptual", "gan", "discriminator"} & trainer.reports[step].keys() for step in (2, 3, 4)] == [
        set(),
        {"perceptual"},
        {"perceptual", "gan", "discriminator"},
    ]
    assert any(not torch.equal(v, judge[k]) for k, v in trainer.discriminator.module.state_dict().items())


def test_the_released_weights_are_the_average_and_the_newest_buffers(tmp_path, caplog):
    trainer = trainer_of(tmp_path, {}, ema_decay=0.75, ema_warmup=False)
    before = copy_of(trainer.tokenizer.module)
    trainer.train()
    after, released = trainer.tokenizer.module.state_dict(), AutoModel.from_pretrained(tmp_path / "release")
    buffers = dict(released.named_buffers())
    for name, value in released.state_dict().items():
        expected = after[name] if name in buffers else 0.75 * before[name] + 0.25 * after[name]
        torch.testing.assert_close(value, expected)
    assert "after 1 steps, 75% of it is still the initial weights" in caplog.text
    assert released.vision_model.quantizer.usage.sum() > 0 and released.dtype == torch.float32
    pixels = trainer.eval_pixels
    shown = psnr(released.eval()(pixels).reconstruction, pixels).mean().item()
    assert trainer.reports[1]["eval_psnr"] == pytest.approx(shown, rel=1e-4)
    assert Image.open(tmp_path / "samples" / "step-1.png").size == (2 * SIZE + 6, 2 * SIZE + 6)


def test_waiting_for_data_is_told_from_decoding_and_computing(tmp_path, text_tokenizer):
    class Slow(ImageTextTransform):
        def __call__(self, *args):
            time.sleep(0.05)
            return super().__call__(*args)

    stream = image_stream(tmp_path / "data", text_tokenizer, (6, 3, 5))
    transform = stream.transform
    stream.transform = Slow(transform.image_processor, transform.text_tokenizer, transform.max_text_length)
    trainer = trainer_of(tmp_path, {}, dataset=stream, samples_per_epoch=12, max_steps=3)
    trainer.train()
    assert trainer.speeds.keys() == set(SPEEDS) and trainer.speeds["decode_ms"] > 50
    seconds = 4 / trainer.speeds["images_per_second"]  # of the last step
    assert 4 * 0.05 <= seconds * trainer.speeds["data_wait_share"] < seconds
    quick = trainer_of(tmp_path / "quick", {}, max_steps=2)
    quick.train()
    assert quick.speeds.keys() == {"images_per_second", "data_wait_share"}


def test_the_average_warms_up_and_forgets_the_first_weights(tmp_path, caplog):
    trainer = trainer_of(tmp_path, {}, max_steps=3, ema_decay=0.2)
    expected = {name: value.clone() for name, value in trainer.tokenizer.module.named_parameters()}
    seen = []
    after_each_step(trainer, lambda: seen.append(copy_of(trainer.tokenizer.module)))
    trainer.train()
    for decay, weights in zip((1 / 10, 2 / 11, 0.2), seen, strict=True):
        expected = {name: decay * value + (1 - decay) * weights[name] for name, value in expected.items()}
    assert trainer.ema.parts.keys() == expected.keys()
    for name, value in trainer.ema.parts.items():
        torch.testing.assert_close(value, expected[name], msg=name)
    assert "average that lags" not in caplog.text  # 0.4% are left of them
    arguments = TokenizerTrainingArguments(output_dir="", ema_decay=0.9999)
    assert [arguments.ema_decay_after(steps) for steps in (0, 90, 10**6)] == [0.1, 0.91, 0.9999]


def test_the_evaluation_is_of_the_set_and_not_of_its_batches(tmp_path, text_tokenizer):
    evaluated = Noise(7)
    pixels = torch.stack([evaluated[i]["pixel_values"] for i in range(7)])
    with torch.no_grad():
        output = small_model().eval()(pixels)
    reconstruction = output.reconstruction.clamp(-1, 1)
    used = [len(codes.unique()) / 16 for codes in output.codes.unbind(dim=1)]
    expected = {"eval_psnr": psnr(reconstruction, pixels).mean().item()}
    expected |= {"eval_l1": (reconstruction - pixels).abs().mean().item()}
    expected |= {"eval_codebook_usage": 100 * sum(used) / len(used)}
    for batch_size, workers in ((1, 0), (3, 1), (7, 0)):
        AcceleratorState._reset_state(reset_partial_state=True)
        arguments = {"per_device_train_batch_size": batch_size, "dataloader_num_workers": workers}
        trainer = trainer_of(tmp_path / str(batch_size), {}, eval_dataset=evaluated, **arguments)
        assert trainer.evaluate() == pytest.approx(expected, rel=1e-5)
    assert 0 < expected["eval_codebook_usage"] < 100
    trainer.eval_dataset, trainer.eval_pixels = None, pixels
    assert trainer.evaluate() == pytest.approx(expected, rel=1e-5)
    stream = image_stream(tmp_path / "data", text_tokenizer, (6, 3, 5))
    trainer.eval_dataset = list(stream)
    listed = trainer.evaluate()
    trainer.eval_dataset, trainer.arguments.dataloader_num_workers = stream, 2
    assert trainer.evaluate() == pytest.approx(listed, rel=1e-5)
    trainer.eval_dataset = Subset(evaluated, [])
    with pytest.raises(ValueError, match="The evaluation set has no images"):
        trainer.evaluate()


def test_a_logit_scale_comes_back_to_its_bounds_and_can_leave_them(tmp_path):
    model = small_model()
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    trainer = trainer_of(tmp_path, {}, model, max_steps=2, learning_rate=0.1)
    scales = []
    after_each_step(trainer, lambda: scales.append(model.logit_scale.item()))  # before it is clamped
    trainer.train()
    assert scales[0] == pytest.approx(math.log(100) - 0.1, abs=1e-3)  # noise is not told apart: the scale falls
    assert model.logit_scale.item() == pytest.approx(scales[1])
    with torch.no_grad():
        model.logit_scale.fill_(math.log(100))
    trainer.tokenizer.module.train()
    model(trainer.eval_pixels, torch.tensor([[1, 10, 2, 0]] * 2)).logit_scale.backward()
    assert model.logit_scale.grad == pytest.approx(100, rel=1e-4)


def test_reconstructions_are_not_counted_as_images(tmp_path):
    usages = []
    for weight in (0.0, 1.0):
        AcceleratorState._reset_state(reset_partial_state=True)
        trainer = trainer_of(tmp_path / str(weight), {"consistency_weight": weight}, max_steps=1)
        trainer.train()
        usages.append(trainer.tokenizer.module.vision_model.quantizer.usage)
    assert torch.equal(*usages) and usages[0].sum() > 0


def test_learning_rate_decay_and_optimizer_groups(tmp_path):
    trainer = trainer_of(tmp_path, {}, max_steps=10, warmup=0.2, weight_decay=0.3)
    trainer.train()
    rates = [trainer.reports[step]["learning_rate"] / 1e-3 for step in range(1, 11)]
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(9)]
    assert rates == pytest.approx([0.5, *cosine])
    matrices, vectors = trainer.tokenizer.optimizer.param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0)
    assert min(p.ndim for p in matrices["params"]) == 2 and max(p.ndim for p in vectors["params"]) == 1


def test_the_discriminator_warms_up_over_a_share_of_all_steps_with_an_epsilon_of_its_own(tmp_path):
    losses = {"gan_weight": 1.0, "gan_start": 0.5}
    trainer = trainer_of(tmp_path, losses, max_steps=20, discriminator_warmup=0.1, discriminator_learning_rate=1.0)
    optimizer, schedule = trainer.discriminator.optimizer.optimizer, trainer.discriminator.schedule
    rates = []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]
    assert rates == pytest.approx([0, 0.5, *cosine])
    assert {group["eps"] for group in optimizer.param_groups} == {1e-6}
    assert {group["eps"] for group in trainer.tokenizer.optimizer.param_groups} == {1e-6}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0]


def test_codebooks_that_start_from_data_are_those_of_the_first_features_and_of_the_average(tmp_path):
    trainer = trainer_of(tmp_path, {"vq_weight": 0.0}, codebook_start="data", codebook_learning_rate=1e-12)
    vision = trainer.tokenizer.module.vision_model
    batches = islice(trainer._batches(), 4)  # of 4 images of 4 tokens: 4 tokens for each of 16 codes
    features = vision.encode_features(torch.cat([batch["pixel_values"] for batch in batches]))
    quantizer = vision.quantizer
    chunks = gather_chunks(quantizer, features)
    expected = start_from_data(chunks, quantizer.codebook_size, trainer._generator("codebook_start"))
    assert (quantizer.codebooks != expected).any(dim=2).all()
    trainer._start_codebooks_from_data()
    torch.testing.assert_close(quantizer.codebooks.detach(), expected)
    assert torch.equal(trainer.ema.parts[CODEBOOKS], quantizer.codebooks)
    started = copy_of(quantizer)["codebooks"]
    trainer.train()  # begins with the same start again
    torch.testing.assert_close(quantizer.codebooks, started, rtol=0, atol=1e-6)


def test_dead_codes_are_moved_at_their_interval_and_the_codebooks_have_their_own_rate(tmp_path):
    trainer = trainer_of(
        tmp_path, {}, revive_dead_codes=2, max_steps=4, codebook_learning_rate=0.25, rotation_trick=True
    )
    quantizer, optimizer = trainer.tokenizer.module.vision_model.quantizer, trainer.tokenizer.optimizer
    assert quantizer.rotation_trick
    (group,) = [group for group in optimizer.param_groups if group["params"][0] is quantizer.codebooks]
    assert group["lr"] == 0.25 and group["weight_decay"] == 0 and len(group["params"]) == 1
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trainer.ema.parts)
    trainer.train()
    assert [step for step, values in trainer.reports.items() if "revived_codes" in values] == [2, 4]
    assert 0 < trainer.reports[2]["revived_codes"] < quantizer.usage.numel()


def test_revived_codes_are_in_the_average_and_have_no_moments(tmp_path):
    trainer = trainer_of(tmp_path, {})
    trainer.train()
    alive, network = trainer.dead_codes.chosen.clone(), trainer.tokenizer
    moments = {moment: network.read(CODEBOOKS, moment).clone() for moment in MOMENTS}
    weights, average = network.read(CODEBOOKS).clone(), trainer.ema.parts[CODEBOOKS].clone()
    trainer._revive_dead_codes()
    codebooks = network.read(CODEBOOKS)
    assert alive.any(dim=1).all() and not alive.all() and not trainer.dead_codes.chosen.any()
    assert torch.equal(codebooks[alive], weights[alive]) and (codebooks[~alive] != weights[~alive]).any()
    assert torch.equal(trainer.ema.parts[CODEBOOKS][alive], average[alive])
    moved = (codebooks != weights).any(dim=2)
    assert torch.equal(trainer.ema.parts[CODEBOOKS][moved], codebooks[moved])
    for moment, before in moments.items():
        now = network.read(CODEBOOKS, moment)
        assert torch.equal(now[~moved], before[~moved]) and not now[moved].any()


def test_the_codebooks_are_left_alone_by_default(tmp_path):
    trainer = trainer_of(tmp_path, {}, max_steps=2, learning_rate=1e-12)
    before = copy_of(trainer.tokenizer.module.vision_model.quantizer)["codebooks"]
    trainer.train()
    torch.testing.assert_close(trainer.tokenizer.module.vision_model.quantizer.codebooks, before, rtol=0, atol=1e-9)
    assert len(trainer.tokenizer.optimizer.param_groups) == 2 and "revived_codes" not in trainer.reports[2]


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


@pytest.mark.parametrize(
    "option, message",
    [
        ({"codebook_start": "kmeans"}, "codebook_start must be random or data, got 'kmeans'"),
        ({"revive_dead_codes": -1}, r"revive_dead_codes \(-1\) is not between 0 and"),
        ({"codebook_learning_rate": math.nan}, r"codebook_learning_rate \(nan\) is not between 0"),
    ],
)
def test_impossible_codebook_options_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        TokenizerTrainingArguments(**option)


def test_accumulated_batches_are_one_batch(tmp_path):
    losses = {"contrastive_weight": 0.0, "perceptual_weight": 1.0}  # a contrastive batch is never divided
    whole = trainer_of(tmp_path / "1", losses, per_device_train_batch_size=8, adam_epsilon=1e-3)
    whole.train()
    AcceleratorState._reset_state(reset_partial_state=True)
    parts = trainer_of(tmp_path / "2", losses, gradient_accumulation_steps=2, adam_epsilon=1e-3)
    parts.train()
    for name in ("l1", "l2", "perceptual", "vq", "loss", "grad_norm"):
        assert parts.reports[1][name] == pytest.approx(whole.reports[1][name], rel=1e-4), name
    for (name, a), b in zip(whole.tokenizer.module.named_parameters(), parts.tokenizer.module.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6, msg=name)


def test_accumulated_batches_with_all_negatives_are_one_batch_for_every_term(tmp_path):
    losses = ALL_TERMS | {"entropy_weight": 0.0, "gan_weight": 0.0}  # not means over images; balanced for each batch
    whole = trainer_of(tmp_path / "1", losses, per_device_train_batch_size=8, adam_epsilon=1e-3)
    whole.train()
    AcceleratorState._reset_state(reset_partial_state=True)
    options = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2, "whole_batch_negatives": True}
    parts = trainer_of(tmp_path / "2", losses, adam_epsilon=1e-3, **options)
    parts.train()
    for name in ("contrastive", "consistency", "vq", "loss", "grad_norm"):
        assert parts.reports[1][name] == pytest.approx(whole.reports[1][name], rel=1e-4), name
    for (name, a), b in zip(whole.tokenizer.module.named_parameters(), parts.tokenizer.module.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6, msg=name)
    codes = [trainer.tokenizer.module.vision_model.quantizer.usage.gt(0) for trainer in (whole, parts)]
    assert torch.equal(*codes)  # each image is counted once, though seen twice


def test_the_pass_of_all_negatives_has_the_same_dropped_paths(tmp_path):
    model = small_model(drop_path_rate=0.5, num_hidden_layers=3)  # the first layer drops none
    trainer = trainer_of(tmp_path, {}, model, gradient_accumulation_steps=2, whole_batch_negatives=True)
    batches = list(islice(trainer._batches(), 2))
    (state, share), _ = trainer._whole_batch_contrastive(batches)
    set_random_state(state, torch.device("cpu"))
    module, seen = trainer.tokenizer.module, []
    module.vision_model.encoder.register_forward_hook(lambda module, args, output: seen.append(output))
    trainer._whole_batch_contrastive(batches)
    set_random_state(state, torch.device("cpu"))
    module(batches[0]["pixel_values"])
    torch.testing.assert_close(seen[-1], seen[0])
    module(batches[0]["pixel_values"])
    assert not torch.equal(seen[-1], seen[0])


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_gradient_checkpointing_recomputes_a_share_of_the_blocks_and_changes_no_value(tmp_path, share):
    reports, passes = [], []
    for checkpointing in (False, True):
        AcceleratorState._reset_state(reset_partial_state=True)
        model, counts = small_model(), Counter()
        blocks = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
        for index, block in enumerate(blocks):
            part = next(module for module in block.modules() if not list(module.children()))
            part.register_forward_hook(lambda module, args, output, i=index, counts=counts: counts.update([i]))
        options = {"gradient_checkpointing": checkpointing, "gradient_checkpointing_share": share, "max_steps": 2}
        trainer = trainer_of(tmp_path / str(checkpointing), ALL_TERMS, model, **options)
        trainer.train()
        reports.append(trainer.reports[2])
        passes.append(counts)
    assert reports[1] == pytest.approx(reports[0], rel=1e-4)
    recomputed = [index for index in passes[0] if passes[1][index] > passes[0][index]]
    assert len(recomputed) == int(share * len(blocks)) > 3


def test_the_quantizer_searches_in_float32_under_autocast(tmp_path):
    trainer = trainer_of(tmp_path, {}, bf16=True)
    quantizer, seen = trainer.tokenizer.module.vision_model.quantizer, []
    quantizer.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].detach(), output)))
    codebooks = quantizer.codebooks.detach().clone()
    trainer.train()
    features, output = seen[0]
    assert features.dtype == torch.bfloat16 and output.vq_loss.dtype == torch.float32
    chunks = nn.functional.normalize(features.double().unflatten(2, (8, 8)), dim=-1)  # (B, L, K, dims)
    scores = torch.einsum("blkd,kvd->bklv", chunks, nn.functional.normalize(codebooks.double(), dim=-1))
    assert torch.equal(output.codes, scores.argmax(dim=-1))
    assert all(parameter.dtype == torch.float32 for parameter in trainer.tokenizer.module.parameters())


@pytest.mark.parametrize("term", ["contrastive", "vq"])
def test_a_loss_that_is_not_finite_stops_the_run_by_name(tmp_path, term):
    trainer = trainer_of(tmp_path, {}, max_steps=4, logging_steps=4, save_steps=3)

    def spoil(module, inputs, output):
        if trainer.step == 1:
            output[f"{'vq_loss' if term == 'vq' else 'text_embeds'}"].data.mul_(math.nan)

    trainer.tokenizer.module.register_forward_hook(spoil)
    with pytest.raises(FloatingPointError, match=rf"Not finite in step 1: {term}\.$"):
        trainer.train()
    assert not whole_checkpoints(tmp_path, STATE)  # it was found out before the first checkpoint


def test_batches_are_permutations_dealt_out_and_reached_without_the_ones_before():
    def batches(rank: int, first: int, count: int) -> list[list[tuple[int, int]]]:
        sampler = iter(ResumableBatches(2, 14, 3, rank=rank, world=2, seed=5, first=first))
        return [next(sampler) for _ in range(count)]

    both = [batches(rank, 0, 4) for rank in range(2)]
    for epoch in range(2):
        seen = [pair for rank in both for batch in rank[2 * epoch : 2 * epoch + 2] for pair in batch]
        assert {e for e, _ in seen} == {epoch} and len({i for _, i in seen}) == 12
    assert both[0][0] != [(0, index) for _, index in both[0][2]]  # another order in each epoch
    assert batches(1, 3, 1) == both[1][3:]


def image_stream(folder: Path, text_tokenizer, shards: tuple[int, ...] = (9,), **options) -> ImageTextStream:
    """Pictures in tar files, so many in each."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for number, length in enumerate(shards):
        with wds.TarWriter(str(folder / f"{number}.tar")) as writer:
            for i in range(length):
                picture = Image.fromarray(generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
                writer.write({"__key__": f"{number}-{i}", "png": picture, "txt": f"{number} {i}"})
    transform = ImageTextTransform(UniTokImageProcessor(size={"height": SIZE, "width": SIZE}), text_tokenizer, 4)
    paths = [str(folder / f"{number}.tar") for number in range(len(shards))]
    return ImageTextStream(paths, transform, seed=0, samples_per_epoch=16, **options)


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


def train_and_resume(folder: Path, text_tokenizer, ports=(None, None), **options) -> tuple[Recorder, Recorder]:
    """Six steps on a stream, without a break and from the third one on.

    Of several processes, each training needs a port of its own: a network of the last one keeps that one's store open,
    and in it the addresses of the last process group, which the next would take for those of its own.
    """
    trained = []
    for resume, port in zip((False, True), ports):
        if port is not None:
            os.environ["MASTER_PORT"] = str(port)
        stream = image_stream(folder / f"data-{os.environ.get('RANK', 0)}", text_tokenizer, (6, 3, 5), **options)
        arguments = {
            "max_steps": 6,
            "save_steps": 2,
            "save_total_limit": 9,
            "resume": resume,
            "per_device_train_batch_size": 2,
        }
        trainer = trainer_of(folder, {}, dataset=stream, samples_per_epoch=8, **arguments)
        assert trainer.step == (2 if resume else 0)
        trainer.train()
        trained.append(trainer)
        if not resume and trainer.accelerator.is_main_process:
            for step in (4, 6):
                shutil.rmtree(folder / f"checkpoint-{step}")
        while not resume and (folder / "checkpoint-6").exists():
            time.sleep(0.1)
        AcceleratorState._reset_state(reset_partial_state=True)  # the training has ended the process group
    return trained


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


TWO = {"max_steps": 3, "adam_epsilon": 1e-3, "codebook_start": "data", "revive_dead_codes": 2, "rotation_trick": True}


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("localhost", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in listeners]


def _one_of_two(rank: int, folder: str, ports: list[int]) -> None:
    torch.set_num_threads(1)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": ports[0]}
    os.environ |= {name: str(value) for name, value in environment.items()} | {"MASTER_ADDR": "localhost"}
    trainer = trainer_of(Path(folder) / "nan", {}, max_steps=2, logging_steps=2)
    if rank:
        trainer.tokenizer.module.decoder.register_forward_hook(lambda module, inputs, output: output * math.nan)
    with pytest.raises(FloatingPointError, match="Not finite in step 0: l1, l2"):
        trainer.train()
    trainer = trainer_of(Path(folder) / "two", ALL_TERMS, eval_dataset=Noise(7), **TWO)
    evaluated = trainer.evaluate()
    trainer.train()
    torch.save([evaluated, trainer.reports], f"{folder}/{rank}.pt")
    AcceleratorState._reset_state(reset_partial_state=True)
    text = text_tokenizer.train_text_tokenizer(["red"], vocab_size=300)
    whole, resumed = train_and_resume(Path(folder) / "stream", text, ports[1:], resampled=True, shuffle=4)
    assert resumed.reports == {step: whole.reports[step] for step in (3, 4, 5, 6)}


@pytest.mark.full
def test_two_processes_train_like_one_and_stop_together(tmp_path):
    one = trainer_of(tmp_path / "one", ALL_TERMS, per_device_train_batch_size=8, eval_dataset=Noise(7), **TWO)
    before = one.evaluate()
    one.train()
    multiprocessing.start_processes(_one_of_two, (str(tmp_path), _free_ports(3)), nprocs=2, start_method="forkserver")
    for rank in range(2):
        evaluated, reports = torch.load(tmp_path / f"{rank}.pt")
        assert evaluated == pytest.approx(before, rel=1e-5)
        for step in (1, 2, 3):
            shown = {name: reports[step][name] for name in one.reports[step] if not name.startswith("eval")}
            expected = {name: one.reports[step][name] for name in shown}
            assert shown == pytest.approx(expected, rel=2e-3 if step > 1 else 1e-4), step
    a, b = (UniTokModel.from_pretrained(tmp_path / name / "release") for name in ("one", "two"))
    start = small_model()
    for (name, x), y, z in zip(a.named_parameters(), b.parameters(), start.parameters()):
        assert (x - y).norm() <= 0.02 * (x - z).norm() + 1e-6, name


def test_networks_and_images_that_are_missing_are_named(tmp_path):
    arguments = TokenizerTrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="gan_weight is 0.4, but its network is missing"):
        TokenizerTrainer(small_model(), arguments, LossArguments(gan_weight=0.4), Noise())
    with pytest.raises(ValueError, match="16 images are too few for one step of 64"):
        TokenizerTrainer(small_model(), arguments, LossArguments(), Noise())
    with pytest.raises(ValueError, match="save_steps must be at least 1, got 0"):
        TokenizerTrainingArguments(output_dir="", save_steps=0)
    with pytest.raises(ValueError, match="got comet"):
        TokenizerTrainingArguments(output_dir="", report_to=["comet"])
    network = perceptual_distance("test_resnet", SIZE, pretrained=False)
    with pytest.raises(ValueError, match="network for the term perceptual was given, but perceptual_weight is 0"):
        TokenizerTrainer(small_model(), arguments, LossArguments(), Noise(), perceptual=network)
    with pytest.raises(ValueError, match="samples_per_epoch is required for streams, and only for them, got 8"):
        TokenizerTrainer(small_model(), arguments, LossArguments(), Noise(), samples_per_epoch=8)
    arguments = replace(arguments, max_steps=10, per_device_train_batch_size=4)
    with pytest.raises(ValueError, match="entropy_start is 0.95: none of the 10 steps begins that late"):
        TokenizerTrainer(small_model(), arguments, LossArguments(entropy_weight=1.0, entropy_start=0.95), Noise())


def test_a_tracker_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("training.tokenizer_trainer.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match="report_to names wandb, which is not installed"):
        trainer_of(tmp_path, {}, report_to=["tensorboard", "wandb"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        *(({name: 0}, f"{name} must be at least 1, got 0") for name in ("num_train_epochs", "eval_steps")),
        *(({name: value}, f"{name} .{value}. is not between") for name in RATES for value in (math.nan, -0.1)),
        ({"learning_rate": 0.0}, "learning_rate .0.0. is not between"),
        ({"max_steps": -1}, "max_steps .-1. is not between"),
        ({"max_steps": 2.5}, "max_steps must be of type int, got 2.5"),
        ({"ema_decay": 7.0}, "ema_decay .7.0. is not between"),
        ({"ema_decay": 1.0}, "ema_decay .1.0. is not between"),
        ({"adam_beta2": 1.0}, "adam_beta2 .1.0. is not between"),
        ({"discriminator_warmup": 2.0}, "discriminator_warmup .2.0. is not between"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers .-1. is not between"),
        ({"seed": -1}, "seed .-1. is not between"),
        ({"bf16": "yes"}, "bf16 must be of type bool, got 'yes'"),
        ({"report_to": "wandb"}, "report_to must be of type list, got 'wandb'"),
    ],
)
@pytest.mark.attack
def test_training_arguments_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        TokenizerTrainingArguments(**wrong)


@pytest.mark.parametrize("beside", [{"vision_overrides": {"image_size": 32}}, {"init_open_clip": "ViTamin-L-256"}])
def test_a_tokenizer_to_start_from_takes_no_config_and_no_weights_beside_it(beside, text_tokenizer):
    with pytest.raises(ValueError, match="init_from .a. has its own .*(ViTamin|32)"):
        build_model(TokenizerArguments(init_from="a", **beside), text_tokenizer)


def test_a_fresh_text_tower_is_as_large_as_the_text_tokenizer_and_finds_its_ends(text_tokenizer):
    texts = copy.deepcopy(text_tokenizer)
    texts.add_tokens([f"<word{i}>" for i in range(700 - len(texts))])
    texts.add_special_tokens({"eos_token": "<end>"})
    model = build_model(TokenizerArguments(), texts)
    check_text_tokenizer(texts, model.config)
    text = model.config.text_config
    assert (text.vocab_size, text.bos_token_id, text.eos_token_id, text.pad_token_id) == (701, 1, 700, 0)
    ids = texts(["a red circle<end>", "a blue<word3><end>"], padding=True, padding_side="right", return_tensors="pt")
    longer = torch.cat([ids["input_ids"], torch.full((2, 3), 5)], dim=1)
    features = [model.get_text_features(i).pooler_output for i in (ids["input_ids"], longer)]
    torch.testing.assert_close(*features)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"init_open_clip_weights": "b.pt"}, "init_open_clip_weights is b.pt, but init_open_clip names no model"),
        ({"hub_model_id": "a/b/c"}, "Repo id must be"),
        ({"eval_datasets": [{"kind": "webdataset", "resampled": True}]}, "An evaluation set must end"),
        ({"datasets": {"kind": "folder"}}, "datasets must be of type list"),
    ],
)
def test_tokenizer_arguments_that_contradict_each_other_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        TokenizerArguments(**wrong)


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


def test_the_text_tokenizers_command_has_a_help_and_refuses_what_it_does_not_know(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        text_tokenizer.main(["--help"])
    assert "byte-level BPE" in capsys.readouterr().out
    for wrong in ([], ["a", "b"], ["--folder", "a"]):
        with pytest.raises(SystemExit) as end:
            text_tokenizer.main(wrong)
        assert end.value.code == 2
    assert not list(tmp_path.iterdir())


def test_a_text_tokenizer_of_own_captions_knows_their_words(tmp_path, capsys):
    captions = tmp_path / "captions.jsonl"
    rows = [json.dumps({"caption": f"an ostrich beside a zeppelin {i}"}) + "\n" for i in range(20)]
    captions.write_text("".join(rows), encoding="utf-8")
    text_tokenizer.main([str(tmp_path / "own"), "--captions", str(captions), "--vocab-size", "400"])
    own = AutoTokenizer.from_pretrained(tmp_path / "own")
    assert own.tokenize("an ostrich beside a zeppelin") == ["an", "Ġostrich", "Ġbeside", "Ġa", "Ġzeppelin"]
    assert "Ġdescription" in own.get_vocab() and "ĠASSISTANT" in own.get_vocab() and len(own) <= 400
    assert f"{len(own)} tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"text": "a"}, (), "Row 1 of .* has no text under 'caption'"),
        ({"caption": "a"}, ("--vocab-size", "200"), "--vocab-size 200 is below 262"),
        (None, (), "There is no data file"),
    ],
)
def test_captions_and_sizes_that_make_no_text_tokenizer_are_refused_in_a_line(row, options, message, tmp_path, capsys):
    if row is not None:
        (tmp_path / "captions.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        text_tokenizer.main([str(tmp_path / "own"), "--captions", str(tmp_path / "captions.jsonl"), *options])
    assert end.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "own").exists()


def small_open_clip(tmp_path: Path) -> nn.Module:
    """open_clip's ViTamin-S with a small text tower, and every tensor random."""
    config = open_clip.get_model_config("ViTamin-S")
    config["text_cfg"] |= {"context_length": 9, "vocab_size": 60, "width": 64, "heads": 2, "layers": 2}
    config["vision_cfg"]["timm_drop_path"] = 0.0
    path = tmp_path / "ViTamin-S-small.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    open_clip.add_model_config(path)
    clip = open_clip.create_model(path.stem).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return clip


def test_towers_from_open_clip_give_open_clips_features(tmp_path):
    clip = small_open_clip(tmp_path)
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    vision = {"image_size": 224, "stem_width": 64, "stage_dims": (64, 128), "stage_depths": (2, 4), "hidden_size": 384}
    vision |= {"num_attention_heads": 6, "num_hidden_layers": len(clip.visual.trunk.blocks), "projection_dim": 384}
    text = {"vocab_size": 60, "hidden_size": 64, "intermediate_size": 256, "projection_dim": 384}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 9, "hidden_act": "gelu"}
    text |= {"bos_token_id": 58, "eos_token_id": 59}
    model = UniTokModel(UniTokConfig(vision_config=vision, text_config=text, decoder_layers=1)).eval()
    report = load_open_clip(model, "ViTamin-S-small", str(tmp_path / "clip.pt"))
    assert report.used + len(report.left_out) == len(clip.state_dict())
    assert list(report.left_out) == ["visual.trunk.pos_embed"]
    assert model.logit_scale == clip.logit_scale

    input_ids = torch.tensor([[58, 5, 6, 59, 0, 0, 0, 0, 0], [58, 7, 8, 9, 10, 59, 0, 0, 0]])
    pixels = torch.rand(1, 3, 224, 224) * 2 - 1
    trunk, encoder = clip.visual.trunk, model.vision_model.encoder
    nn.init.zeros_(trunk.pos_embed)  # what UniTok lacks
    with torch.no_grad():
        texts = clip.encode_text(input_ids, normalize=True)
        torch.testing.assert_close(model.get_text_features(input_ids).pooler_output, texts, rtol=1e-4, atol=1e-5)
        encoder.norm = nn.Identity()  # what open_clip lacks
        ours, exact_gelu = encoder(pixels), trunk.forward_features(pixels)
        assert (ours - exact_gelu).norm() < 0.01 * exact_gelu.norm()
        for block in trunk.blocks:
            block.mlp.act = nn.GELU(approximate="tanh")
        torch.testing.assert_close(ours, trunk.forward_features(pixels), rtol=1e-3, atol=1e-4)
        pooled = nn.functional.normalize(model.vision_model.projection(model.vision_model.fc_norm(ours.mean(dim=1))))
        torch.testing.assert_close(pooled, clip.encode_image(pixels, normalize=True), rtol=1e-3, atol=1e-4)

    with pytest.raises(ValueError, match=r"visual\.trunk\..* does not fit: the tokenizer has"):
        load_open_clip(small_model(), "ViTamin-S-small", str(tmp_path / "clip.pt"))


@pytest.fixture
def captioned_folder(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    generator = np.random.default_rng(0)
    lines = []
    for i in range(9):
        Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "caption": "a red circle"}) + "\n")
    (folder / "train_captions.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "train_captions.jsonl"


def test_the_script_trains_on_a_folder_reports_and_releases(tmp_path, captioned_folder, text_tokenizer):
    text_tokenizer.save_pretrained(tmp_path / "text")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
vision_overrides: {{image_size: 32, hidden_size: 32, num_attention_heads: 2, num_hidden_layers: 1}}
text_tokenizer: {tmp_path / "text"}
datasets:
  - {{kind: folder, path: {captioned_folder}, repeat: 2, horizontal_flip: true, max_shift: 1}}
contrastive_weight: 0.1
perceptual_weight: 1.0
perceptual_backbone: test_resnet
perceptual_pretrained: false
gan_weight: 0.1
gan_start: 0.5
discriminator_backbone: test_vit
discriminator_depths: [0, 3]
discriminator_pretrained: false
output_dir: {tmp_path / "run"}
num_train_epochs: 1
per_device_train_batch_size: 6
logging_steps: 1
report_to: [tensorboard]
use_cpu: true
card: {{license: mit}}
""",
        encoding="utf-8",
    )
    main([str(config), "--learning_rate", "1e-3"])
    release = tmp_path / "run" / "release"
    model = AutoModel.from_pretrained(release)
    pixels = AutoImageProcessor.from_pretrained(release)(str(captioned_folder.parent / "0.png"))["pixel_values"]
    assert model.decode(model.encode(pixels)).shape == (1, 3, 32, 32)
    assert AutoTokenizer.from_pretrained(release).eos_token_id == model.config.text_config.eos_token_id
    assert list(whole_checkpoints(tmp_path / "run", STATE)) == [3]  # 18 images in batches of 6
    events = EventAccumulator(str(tmp_path / "run" / "tokenizer")).Reload()
    assert {"l1", "perceptual", "gan", "discriminator", "psnr", "eval_psnr"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("l1")] == [1, 2, 3]
    assert events.Tags()["images"] == ["reconstructions"]
    card = ModelCard.load(release / "README.md")
    assert card.data.license == "mit" and card.data.pipeline_tag == "image-feature-extraction"
    assert f"| `{captioned_folder}` | kind folder, repeat 2, horizontal_flip True, max_shift 1 |" in card.text
    assert "| steps | 3 |\n| samples in a step | 6 |\n| learning rate | 0.001 |\n" in card.text
    assert "bf16 autocast" in card.text and "grad_norm" not in card.text
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text("utf-8").splitlines()]
    for name in ("l1", "eval_codebook_usage"):
        logged = [(line["step"], line[name]) for line in history if name in line]
        assert logged == [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)], name
    for name in ("l1", "gan", "eval_psnr"):
        assert f"| {name} | {events.Scalars(name)[-1].value:.4g} |" in card.text


def test_ctrl_c_says_how_to_go_on_after_what_is_trained(
    tmp_path, captioned_folder, text_tokenizer, caplog, capsys, monkeypatch
):
    text_tokenizer.save_pretrained(tmp_path / "text")
    caplog.set_level("INFO")
    broken = captioned_folder.parent / "0.png"
    broken.write_bytes(broken.read_bytes()[:100])

    class Interrupted(ExpectedTime):
        def __call__(self, step):
            super().__call__(step)
            if step == self.total_steps - 1 and self.total_steps > 8:
                raise KeyboardInterrupt

    monkeypatch.setattr("training.tokenizer_trainer.ExpectedTime", Interrupted)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
vision_overrides: {{image_size: 32, hidden_size: 32, num_attention_heads: 2, num_hidden_layers: 1}}
text_tokenizer: {tmp_path / "text"}
datasets: [{{kind: folder, path: {captioned_folder}}}]
max_broken_share: 0.5
perceptual_weight: 0
gan_weight: 0
output_dir: {tmp_path / "run"}
per_device_train_batch_size: 4
save_steps: 7
bf16: false
use_cpu: true
""",
        encoding="utf-8",
    )
    with pytest.raises(SystemExit) as end:
        one_line_errors()(main)([str(config), "--max_steps", "9"])
    said = f"Interrupted. The same command with --resume true goes on from {tmp_path}/run/checkpoint-7.\n"
    assert end.value.code == 130 and capsys.readouterr().err.endswith(said)
    assert re.search(r"training the tokenizer: [\d.]+ M parameters at learning rate 0.0005", caplog.text)
    assert "9 steps of 4 images, 0 of them done; after a few more: the time that they take" in caplog.text
    assert re.search(r"[\d.]+ s a step: the other 3 take about 0:00:\d\d, evaluations aside", caplog.text)
    main([str(config), "--output_dir", str(tmp_path / "other"), "--max_steps", "2"])
    release = tmp_path / "other/release"
    assert re.search(r"broken samples that were skipped: \d; they are named above", caplog.text)
    last = caplog.records[-1].getMessage()
    assert last == f"the tokenizer is in {release}; try it: unitok-mllm reconstruct IMAGE --model {release}"


@pytest.mark.parametrize("size", ["tiny", "base", "large"])
def test_configs_are_read_and_the_large_ones_hold_the_released_recipe(size):
    arguments, losses, training = parse_yaml_and_command_line(
        (TokenizerArguments, LossArguments, TokenizerTrainingArguments), [f"{CONFIGS}/tokenizer_{size}.yaml"]
    )
    assert arguments.preset == size and len(arguments.datasets) == (2 if size == "tiny" else 1)
    if size != "tiny":
        weights = {"l1": 0.2, "l2": 1, "perceptual": 1, "vq": 1, "gan": 0.4, "contrastive": 1}
        assert losses.weights(0.5) == weights | {"entropy": 0, "consistency": 0}
        assert (training.learning_rate, training.weight_decay, training.max_grad_norm) == (5e-4, 0.02, 10)
        assert (training.adam_epsilon, training.discriminator_adam_epsilon) == (1e-6, 1e-6)
        assert (training.warmup, training.discriminator_warmup) == (0.01, 0.03)
        assert (losses.gan_start, losses.gan_warmup, losses.gan_consistency_weight) == (0.375, 0.03, 4)
        assert losses.blur_sigma(losses.gan_start, 256) == 9.58
        assert (training.ema_decay, training.ema_decay_after(78_124)) == (0.9999, 78_125 / 78_134)
        assert UniTokConfig.preset(size, **arguments.vision_overrides).vision_config.drop_path_rate == 0.1


def test_sources_that_do_not_go_together_are_refused(text_tokenizer, captioned_folder):
    data = UniTokImageProcessor(size={"height": 32, "width": 32}), text_tokenizer, 16, 0
    folder = {"kind": "folder", "path": str(captioned_folder)}
    stream = {"kind": "webdataset", "shards": "{00..01}.tar", "samples_per_epoch": 10}
    for sources in ([], [folder, stream]):
        with pytest.raises(ValueError, match="one webdataset, or any number of other kinds"):
            build_datasets(sources, *data)
    dataset, samples = build_datasets([folder, folder], *data)
    assert len(dataset) == 18 and samples is None


def test_a_text_tokenizer_of_another_kind_is_refused(text_tokenizer):
    config = UniTokConfig.preset("tiny")
    check_text_tokenizer(text_tokenizer, config)
    config.text_config.eos_token_id = 7
    with pytest.raises(ValueError, match="ends texts with 2; the text tower has 512 and looks for 7"):
        check_text_tokenizer(text_tokenizer, config)


def test_a_release_that_is_not_finite_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, {})
    trainer.ema.parts["vision_model.projection.weight"][1, 2] = torch.inf
    with pytest.raises(ValueError, match="The weight vision_model.projection.weight is not finite"):
        trainer._save_release()
    assert not (tmp_path / "release").exists()


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
