"""The loop of the tokenizer's training: its steps, terms, codebooks, averages and processes."""

import math
import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from multiprocessing import set_forkserver_preload
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from tokenizer_runs import ALL_TERMS, SIZE, Noise, image_stream, small_model, train_and_resume, trainer_of
from torch import multiprocessing, nn
from torch.utils.data import Subset
from transformers import AutoModel

from training import text_tokenizer
from training.checkpoints import set_random_state
from training.codebooks import gather_chunks, start_from_data
from training.files import whole_checkpoints
from training.image_text_data import ImageTextTransform
from training.losses import TERMS, LossArguments, psnr
from training.perceptual import perceptual_distance
from training.resumable_batches import ResumableBatches
from training.sharding import MOMENTS
from training.tokenizer_arguments import TokenizerTrainingArguments
from training.tokenizer_trainer import CODEBOOKS, SPEEDS, STATE, TokenizerTrainer
from training.whole_batch import whole_batch_contrastive
from unitok_mllm import UniTokModel


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
set_forkserver_preload(["training.tokenizer_trainer"])


def copy_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def after_each_step(trainer: TokenizerTrainer, call: Callable[[], None]) -> None:
    trainer.tokenizer.optimizer.optimizer.register_step_post_hook(lambda optimizer, args, kwargs: call())


def test_one_step_with_every_term_moves_every_trained_parameter_and_no_other(tmp_path):
    trainer = trainer_of(tmp_path, ALL_TERMS)
    before, discriminator = copy_of(trainer.tokenizer.module), copy_of(trainer.discriminator.module)
    perceptual = copy_of(trainer.perceptual)
    trainer.train()
    still = {name for name, value in trainer.tokenizer.module.state_dict().items() if torch.equal(value, before[name])}
    unused = {"text_model.text_model.embeddings.position_embedding.weight"}  # all its rows but the first four
    assert still - unused == set()
    for name, value in trainer.discriminator.module.state_dict().items():
        if name.endswith(".2.bias"):
            continue  # within the hinge's margins the real and the fake pull it equally hard
        assert torch.equal(value, discriminator[name]) == name.startswith("features."), name
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
    before, discriminator = copy_of(trainer.tokenizer.module), copy_of(trainer.discriminator.module)
    trainer.train()
    for name, value in trainer.tokenizer.module.state_dict().items():
        frozen = name.startswith(("text_model.", "logit_scale", "vision_model.fc_norm.", "vision_model.projection."))
        assert torch.equal(value, before[name]) == frozen, name
    assert [{"perceptual", "gan", "discriminator"} & trainer.reports[step].keys() for step in (2, 3, 4)] == [
        set(),
        {"perceptual"},
        {"perceptual", "gan", "discriminator"},
    ]
    assert any(not torch.equal(v, discriminator[k]) for k, v in trainer.discriminator.module.state_dict().items())


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
    (state, share), _ = whole_batch_contrastive(trainer.tokenizer, batches)
    set_random_state(state, torch.device("cpu"))
    module, seen = trainer.tokenizer.module, []
    module.vision_model.encoder.register_forward_hook(lambda module, args, output: seen.append(output))
    whole_batch_contrastive(trainer.tokenizer, batches)
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


def test_a_release_that_is_not_finite_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, {})
    trainer.ema.parts["vision_model.projection.weight"][1, 2] = torch.inf
    with pytest.raises(ValueError, match="The weight vision_model.projection.weight is not finite"):
        trainer._save_release()
    assert not (tmp_path / "release").exists()
