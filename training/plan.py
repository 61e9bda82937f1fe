"""Plan a training before any GPU is booked: parameters, FLOPs, memory under each ZeRO stage, days.

    python -m training.plan tokenizer --preset large --samples 1.28e9 --gpus 256
    python -m training.plan mllm --llm llama-2-7b --visual large --samples 60e6 --gpus 64 --text-length 128
    python -m training.plan check

Models are built without memory, and one training step runs on tensors with shapes but without values. A counter adds
up the FLOPs of its matrix products and convolutions, forward and backward. Attention counts without a mask's savings,
as MFU is usually defined. `check` compares such predictions with real steps.

Memory per GPU = model states + activations:

- Model states are DeepSpeed's own estimates for its stages 2 and 3, for bf16 training with Adam: 2 bytes of weights
  and 18 of gradients and optimizer (2 + 4 + 4 + 8) for each trained parameter.  It has none for stages 0 and 1; with
  the same bytes, on N GPUs: 20 P for stage 0, 4 P + 16 P / N for stage 1 (weights and 16-bit gradients on every GPU).
  A frozen parameter takes 2 bytes (over N in stage 3; in the CPU's memory with offload).
- Activations are the bytes of all tensors that autograd keeps for the backward pass of a bf16 step, each storage once,
  parameters aside.  Not in it: what kernels need for themselves, the layer that checkpointing computes again, the
  allocator's fragments and the CUDA context, for which 10% of the GPU stay free; and what autocast over fp32 weights
  keeps besides (norms in fp32), where DeepSpeed does not make the model bf16.
"""

import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import psutil
import torch
import typer
import yaml
from peft import LoraConfig, inject_adapter_in_model
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count
from transformers import AutoConfig, LlamaConfig

from training.discriminator import FeatureDiscriminator
from training.errors import one_line_errors, script_app
from training.losses import LossArguments
from training.perceptual import FrozenFeatures, perceptual_distance
from unitok_mllm import UniTokConfig, UniTokMLLMConfig, UniTokMLLMForConditionalGeneration, UniTokModel
from unitok_mllm.cli import OneLineErrors
from unitok_mllm.configuration_unitok import UniTokVisionConfig
from unitok_mllm.inference import SHIPPED_MODEL


GIB = 2**30
USABLE_MEMORY = 0.9
STAGES = ("0", "1", "2", "3", "3, offload")
LLMS = {
    "llama-2-7b": LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
    )
}
TOKENIZER_PARTS = {
    "encoder": ["vision_model.encoder"],
    "quantizer and projections": [
        "vision_model.quant_proj",
        "vision_model.quantizer",
        "vision_model.post_quant_proj",
    ],
    "image embedding": ["vision_model.fc_norm", "vision_model.projection"],
    "decoder": ["decoder"],
    "text tower": ["text_model.text_model", "text_model.text_projection"],
}
TRAINED_PARTS = ("embedder", "depth_head", "language_model")
MLLM_PARTS = {
    "LLM": ["language_model"],
    "embedder": ["embedder"],
    "depth head": ["depth_head"],
    "visual tokenizer": ["visual"],
}


@dataclass
class Run:
    """The amount of training, and its hardware.

    Args:
        samples: of the whole training.
        gpus: all GPUs.
        gpu_memory: GiB of one GPU.
        gpu_flops: FLOP/s of one GPU, by its data sheet (989e12: bf16 of an H100 SXM without sparsity).
        mfu: share of `gpu_flops` that the training achieves. The recomputation of gradient checkpointing counts as
            work.
        batch_per_gpu: samples in one step of one GPU.
        gpus_per_node: GPUs of one machine.

    Raises:
        ValueError: a value that is not a finite number above 0, an MFU above 1, or machines that are not full.
    """

    samples: float
    gpus: int
    gpu_memory: float = 80.0
    gpu_flops: float = 989e12
    mfu: float = 0.4
    batch_per_gpu: int = 1
    gpus_per_node: int = 8

    def __post_init__(self):
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number above 0, got {value}.")
        if self.mfu > 1:
            raise ValueError(f"mfu is a share, at most 1, got {self.mfu}.")
        self.gpus_per_node = min(self.gpus_per_node, self.gpus)
        if self.gpus % self.gpus_per_node:
            raise ValueError(f"gpus ({self.gpus}) is not a multiple of gpus_per_node ({self.gpus_per_node}).")

    def days(self, flops_per_sample: float) -> float:
        """Compute the days of the whole training, at `flops_per_sample`."""
        return self.samples * flops_per_sample / (self.gpus * self.gpu_flops * self.mfu) / 86400


@dataclass
class Cost:
    """The cost of one sample.

    Attributes:
        forward: FLOPs of the forward pass.
        backward: FLOPs of the backward pass, with the recomputation of gradient checkpointing.
        activations: bytes kept for the backward pass.
        modules: forward FLOPs by the module's name.
    """

    forward: float
    backward: float
    activations: float
    modules: dict[str, float]


@dataclass
class Part:
    """A row of the plan: parameters, and FLOPs of one sample; `step` only if it is known for the part alone."""

    name: str
    parameters: int
    trainable: int
    forward: float
    step: float | None = None


@dataclass
class StageMemory:
    """Memory under one ZeRO stage, in GiB per GPU (`cpu`: per machine), and the largest batch per GPU that fits."""

    stage: str
    states: float
    activations: float
    total: float
    cpu: float
    fits: bool
    largest_batch: int


@dataclass
class Plan:
    """The plan of a training; FLOPs are those of one sample."""

    title: str
    run: Run
    parts: list[Part]
    notes: list[str]
    forward_flops: float
    step_flops: float
    memory: list[StageMemory]
    stage: str | None
    days: float


def without_values(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a module whose tensors have a shape and a dtype, but no values."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that are loaded and have nowhere to go
        module = build()
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    abstract = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, tensor in tensors:
            if tensor not in abstract:  # what is shared stays shared
                empty = torch.empty_like(tensor, device="cpu")
                is_parameter = isinstance(tensor, nn.Parameter)
                abstract[tensor] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, abstract[tensor])
    return module


def convolution_backward_flops(grad_shape, x_shape, w_shape, *args, out_shape=None, **kwargs) -> int:
    """Count a convolution's backward pass: each gradient takes as many multiplications as the convolution.

    torch's own formula ignores the groups, and counts a depthwise convolution many times.
    """
    transposed, output_mask = args[4], args[7]
    return sum(output_mask[:2]) * conv_flop_count(x_shape, w_shape, grad_shape, transposed)


def flop_counter() -> FlopCounterMode:
    return FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: convolution_backward_flops}
    )


def measure(step: Callable[[], torch.Tensor], module: nn.Module, batch: int) -> Cost:
    """Count the FLOPs and activations of a training step, on real tensors or on tensors without values.

    Args:
        step: computes the loss of `batch` samples.
        module: its parameters are not counted as activations.
        batch: samples.
    """
    # Every attention written out: fused kernels differ from device to device, and torch does not count the CPU's.
    with sdpa_kernel(SDPBackend.MATH):
        with flop_counter() as forward:
            loss = step()
        with flop_counter() as backward:
            if loss.requires_grad:
                loss.backward()
    parameters = {StorageWeakRef(parameter.untyped_storage()) for parameter in module.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if (key := StorageWeakRef(storage)) not in parameters:
            kept[key] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = step()
    return Cost(
        forward.get_total_flops() / batch,
        backward.get_total_flops() / batch,
        sum(storage.nbytes() for storage in kept.values()) / batch,
        {name: sum(flops.values()) / batch for name, flops in forward.get_flop_counts().items()},
    )


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Count all parameters and the trainable ones; shared ones count once."""
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def list_parts(model: nn.Module, names: dict[str, list[str]], cost: Cost) -> list[Part]:
    """List parameters and forward FLOPs of the parts of a model. `names` has the submodules of each part."""
    parts = []
    for name, paths in names.items():
        modules = [model.get_submodule(path) for path in paths]
        total, trainable = count_parameters(nn.ModuleList(modules))
        # a module that was called through the model is counted under its path, one called alone under its class
        flops = [
            cost.modules.get(f"{type(model).__name__}.{path}", cost.modules.get(type(module).__name__, 0))
            for path, module in zip(paths, modules)
        ]
        parts.append(Part(name, total, trainable, sum(flops)))
    return parts


def state_bytes(
    stage: str, trainable: int, frozen: int, largest_layer: int, gpus: int, gpus_per_node: int
) -> tuple[int, int]:
    """Compute the bytes of the model states on one GPU and in one machine's CPU memory; see the module's docstring.

    Args:
        stage: one of `STAGES`.
        trainable: number of trainable parameters.
        frozen: number of the other parameters.
        largest_layer: parameters of the largest single module, which stage 3 gathers.
    """
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    machines = {"num_gpus_per_node": gpus_per_node, "num_nodes": gpus // gpus_per_node}
    if stage in ("0", "1", "2"):
        cpu, gpu = estimate_zero2_model_states_mem_needs(trainable, cpu_offload=False, **machines)
        if stage == "0":
            gpu = 20 * trainable
        elif stage == "1":
            gpu = 4 * trainable + 16 * trainable // gpus
        return gpu + 2 * frozen, cpu
    offload = stage == "3, offload"
    cpu, gpu, _ = estimate_zero3_model_states_mem_needs(
        trainable, largest_layer, cpu_offload=offload, cpu_offload_params=offload, **machines
    )
    share = 2 * frozen // gpus
    return (gpu, cpu + share * gpus_per_node) if offload else (gpu + share, cpu)


def plan_memory(model: nn.Module, run: Run, activations: float, other: float = 0.0) -> list[StageMemory]:
    """Compute the memory of every stage.

    Args:
        activations: bytes of one sample.
        other: further bytes on every GPU, which ZeRO does not shard.
    """
    total, trainable = count_parameters(model)
    largest = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())
    rows = []
    for stage in STAGES:
        states, cpu = state_bytes(stage, trainable, total - trainable, largest, run.gpus, run.gpus_per_node)
        states += other
        usable = USABLE_MEMORY * run.gpu_memory * GIB
        needed = states + run.batch_per_gpu * activations
        rows.append(
            StageMemory(
                stage,
                states / GIB,
                run.batch_per_gpu * activations / GIB,
                needed / GIB,
                cpu / GIB,
                needed <= usable,
                max(0, int((usable - states) // activations)),
            )
        )
    return rows


def make_plan(
    title: str, run: Run, parts: list[Part], notes: list[str], forward: float, step: float, memory: list[StageMemory]
) -> Plan:
    stage = next((row.stage for row in memory if row.fits), None)
    return Plan(title, run, parts, notes, forward, step, memory, stage, run.days(step))


def visual_config(name: str, **vision_overrides) -> UniTokConfig:
    """Load a visual tokenizer's config from a preset's name (with changed sizes) or from a folder.

    Raises:
        ValueError: it is neither, or changed sizes are given for a folder.
    """
    if not Path(name, "config.json").is_file():
        return UniTokConfig.preset(name, **vision_overrides)
    if vision_overrides:
        raise ValueError(f"The folder {name} has its own sizes: {', '.join(vision_overrides)} would have no effect.")
    return UniTokConfig.from_pretrained(name)


def mllm_config(llm: str, visual: str) -> UniTokMLLMConfig:
    """Load an MLLM's config from presets or folders; an MLLM as `llm` also gives embedder and depth transformer.

    Raises:
        ValueError: an unknown name.
    """
    if Path(llm, "config.json").is_file():
        config = AutoConfig.from_pretrained(llm)
        if isinstance(config, UniTokMLLMConfig):
            config.visual_config = visual_config(visual)
            return config
        return UniTokMLLMConfig(text_config=config, visual_config=visual_config(visual))
    if llm not in LLMS:
        raise ValueError(f"Unknown LLM {llm!r}: no folder with a config.json, and no preset ({', '.join(LLMS)}).")
    return UniTokMLLMConfig(text_config=LLMS[llm], visual_config=visual_config(visual))


def tokenizer_batch(config: UniTokConfig, batch: int) -> dict[str, torch.Tensor]:
    """Make images and captions without content, for `UniTokModel.forward`."""
    size, length = config.vision_config.image_size, config.text_config.max_position_embeddings
    return {
        "pixel_values": torch.zeros(batch, config.vision_config.num_channels, size, size),
        "input_ids": torch.zeros(batch, length, dtype=torch.long),
    }


def tokenizer_loss(model: UniTokModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute a loss of reconstructions, codes and embeddings. Its value does not matter for the FLOPs."""
    output = model(**inputs)
    similarity = output.image_embeds @ output.text_embeds.T
    return output.reconstruction.float().square().mean() + output.vq_loss + similarity.float().mean()


def mllm_batch(config: UniTokMLLMConfig, batch: int, text_length: int, images: int, drawn: int) -> dict:
    """Make texts without content, each with `images` images at its end, of which `drawn` are targets."""
    vision, positions = config.visual_config.vision_config, config.num_image_positions
    image = [config.boi_token_id, *[config.image_token_id] * positions, config.eoi_token_id]
    input_ids = torch.tensor([[0] * text_length + images * image] * batch)
    inputs = {"input_ids": input_ids, "labels": input_ids}
    if images:
        inputs["image_codes"] = torch.zeros(batch * images, vision.num_codebooks, positions, dtype=torch.long)
        inputs["image_targets"] = torch.tensor([i < drawn for i in range(images)] * batch)
    return inputs


def mllm_loss(model: UniTokMLLMForConditionalGeneration, inputs: dict) -> torch.Tensor:
    """Run the parts of the MLLM's forward on tensors without values, which cannot be selected by a mask."""
    codes = inputs.get("image_codes")
    embeds, _ = model.embed(inputs["input_ids"], image_codes=codes)
    output = model.language_model(inputs_embeds=embeds, output_hidden_states=True, use_cache=False)
    loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), inputs["labels"][:, 1:].flatten())
    if codes is not None and inputs["image_targets"].any():
        targets = codes[inputs["image_targets"]].transpose(1, 2).flatten(0, 1)  # (N * L, K)
    else:
        targets = torch.zeros(1, model.depth_head.num_codebooks, dtype=torch.long)  # as the model does
    states = output.hidden_states[-1].flatten(0, 1)[: len(targets)]  # as many as are needed, from wherever
    logits = model.depth_head(states, targets)
    return loss + F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def plan_tokenizer(
    preset: str,
    run: Run,
    perceptual: bool = True,
    gan: bool = True,
    gan_start: float = 0.375,
    ema: bool = True,
    gradient_checkpointing: bool = False,
    **vision_overrides,
) -> Plan:
    """Plan the training of a visual tokenizer (UniTok, section 3.1).

    Args:
        preset: of `UniTokConfig`, or a folder.
        perceptual: count LPIPS on VGG-16: two forward passes a sample, and one backward pass to the reconstruction.
        gan: count the discriminator on DINOv2 ViT-S/14: one forward pass and two backward passes to the reconstruction
            (one for the adaptive weight, for which LPIPS has another backward pass), and a training step of the heads
            on four images: real and reconstructed, plain and augmented.
        gan_start: share of the training before the GAN starts.
        ema: count an average of the weights, in fp32 on every GPU.
        vision_overrides: fields of the preset's vision config that differ.

    Raises:
        ValueError: an unknown preset, one without a text tower, or a `gan_start` outside [0, 1].
    """
    config = visual_config(preset, **vision_overrides)
    if config.text_config is None:
        raise ValueError(f"The tokenizer {preset!r} has no text tower to train with.")
    if not 0 <= gan_start <= 1:
        raise ValueError(f"gan_start is a share between 0 and 1, got {gan_start}.")
    batch, size = run.batch_per_gpu, config.vision_config.image_size
    model = without_values(lambda: UniTokModel(config).bfloat16()).train()
    if gradient_checkpointing:
        model.activation_checkpointing_enable()
    inputs = tokenizer_batch(config, batch)
    cost = measure(lambda: tokenizer_loss(model, inputs), model, batch)
    parts = list_parts(model, TOKENIZER_PARTS, cost)
    forward, step, activations = cost.forward, cost.forward + cost.backward, cost.activations
    other = 4.0 * count_parameters(model)[0] if ema else 0.0
    notes = [
        f"EMA of the weights: {'4 bytes a parameter on every GPU' if ema else 'none'}.",
        "Not counted: cross-task consistency (off by default), and similarities to other GPUs' samples (below 0.1%).",
        "LPIPS and the discriminator are counted as float32; GPUs work more slowly in it than in bf16.",
        "training.train_tokenizer runs without DeepSpeed: its fp32 weights take 16 bytes a parameter, 20 in stage 0.",
    ]
    images = torch.zeros(batch, 3, size, size)

    def through(module: nn.Module, *args: torch.Tensor) -> Cost:
        return measure(lambda: module(images.clone().requires_grad_(), *args).float().square().mean(), module, batch)

    distance_backward = 0.0
    if perceptual:
        distance = without_values(lambda: perceptual_distance("lpips", size, pretrained=False))
        lpips = through(distance, images)
        distance_backward = lpips.backward
        parts.append(Part("LPIPS, VGG-16", *count_parameters(distance), lpips.forward, lpips.forward + lpips.backward))
        step += lpips.forward + lpips.backward
        activations += lpips.activations
        other += 4 * count_parameters(distance)[0]
    if gan:
        defaults = LossArguments()
        name, depths = defaults.discriminator_backbone, tuple(defaults.discriminator_depths)
        discriminator = without_values(
            lambda: FeatureDiscriminator(FrozenFeatures(name, size, depths, pretrained=False))
        )
        total, trainable = count_parameters(discriminator)
        heads = measure(lambda: discriminator(images).float().square().mean(), discriminator, batch)
        discriminator.requires_grad_(False)
        judged = through(discriminator)
        work = judged.forward + 2 * judged.backward + distance_backward + 4 * (heads.forward + heads.backward)
        parts.append(Part("discriminator, DINOv2 ViT-S/14", total, trainable, judged.forward, work))
        step += (1 - gan_start) * work
        activations += judged.activations
        other += 4 * (total - trainable) + 16 * trainable
        notes.append(f"The discriminator works in {1 - gan_start:.1%} of the steps; the step below is the mean.")
    title = f"UniTok tokenizer, {preset}: {run.samples:.3g} samples on {run.gpus} GPUs"
    return make_plan(title, run, parts, notes, forward, step, plan_memory(model, run, activations, other))


def plan_mllm(
    llm: str,
    visual: str,
    run: Run,
    text_length: int,
    images: int = 1,
    drawn: int | None = None,
    trainable: tuple[str, ...] = TRAINED_PARTS,
    lora_rank: int = 0,
    online_codes: bool = False,
    gradient_checkpointing: bool = False,
) -> Plan:
    """Plan a training of the unified MLLM (UniTok, section 3.4).

    Args:
        llm: a preset or a folder, see `mllm_config`.
        visual: a preset or a folder, see `mllm_config`.
        text_length: text tokens of a sample. Every image adds its positions and the two tokens around it.
        images: images in a sample.
        drawn: number of them that are targets; None for all.
        trainable: the trained parts, of `embedder`, `depth_head` and `language_model`.
        lora_rank: above 0, adapters of this rank on the LLM's linear layers are trained instead of the LLM.
        online_codes: encode images in the training; otherwise their codes are extracted beforehand.

    Raises:
        ValueError: an unknown preset or part, or an impossible sample.
    """
    drawn = images if drawn is None else drawn
    if text_length < 1 or not 0 <= drawn <= images:
        raise ValueError(
            f"A sample has at least 1 text token and draws none to all of its images, "
            f"got text_length {text_length}, images {images}, drawn {drawn}."
        )
    if unknown := sorted(set(trainable) - set(TRAINED_PARTS)):
        raise ValueError(f"trainable: unknown parts {', '.join(unknown)}; known: {', '.join(TRAINED_PARTS)}.")
    config = mllm_config(llm, visual)

    def build() -> UniTokMLLMForConditionalGeneration:
        model = UniTokMLLMForConditionalGeneration(config).bfloat16()
        for name in TRAINED_PARTS:
            model.get_submodule(name).requires_grad_(name in trainable)
        if lora_rank:
            adapters = LoraConfig(r=lora_rank, target_modules="all-linear")
            inject_adapter_in_model(adapters, model.language_model)
        return model

    model, batch = without_values(build).train(), run.batch_per_gpu
    if gradient_checkpointing:
        model.activation_checkpointing_enable()
    inputs = mllm_batch(config, batch, text_length, images, drawn)
    cost = measure(lambda: mllm_loss(model, inputs), model, batch)
    parts = list_parts(model, MLLM_PARTS, cost)
    forward, step = cost.forward, cost.forward + cost.backward
    notes = [
        f"A sample: {text_length} text tokens, {images} images, {drawn} of them drawn: "
        f"{inputs['input_ids'].shape[1]} positions, without padding.",
        "The LLM's loss covers all positions, images' too.",
    ]
    if online_codes and images:
        tower, pixels = model.visual.vision_model, tokenizer_batch(config.visual_config, batch * images)
        encoding = measure(lambda: tower.encode_features(pixels["pixel_values"]), tower, batch).forward
        parts[-1].forward, parts[-1].step = encoding, encoding
        forward, step = forward + encoding, step + encoding
    title = f"MLLM, {llm} with {visual}: {run.samples:.3g} samples on {run.gpus} GPUs"
    return make_plan(title, run, parts, notes, forward, step, plan_memory(model, run, cost.activations))


def markdown_table(*columns: str) -> Table:
    table = Table(box=box.MARKDOWN)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def show(plan: Plan, output: Path | None) -> None:
    """Print the plan's tables, and write the plan as JSON."""
    console, run = Console(width=119, highlight=False), plan.run
    parts = markdown_table("part", "parameters, M", "trained, M", "forward, GFLOPs", "training step, GFLOPs")
    for part in plan.parts:
        step = "" if part.step is None else f"{part.step / 1e9:,.1f}"
        parts.add_row(
            part.name,
            f"{part.parameters / 1e6:,.1f}",
            f"{part.trainable / 1e6:,.1f}",
            f"{part.forward / 1e9:,.1f}",
            step,
        )
    parts.add_row("one sample", "", "", f"{plan.forward_flops / 1e9:,.1f}", f"{plan.step_flops / 1e9:,.1f}")
    memory = markdown_table(
        "ZeRO stage", "states, GiB", "activations, GiB", "per GPU, GiB", "CPU of a node, GiB", "fits", "largest batch"
    )
    for row in plan.memory:
        numbers = [f"{value:,.1f}" for value in (row.states, row.activations, row.total, row.cpu)]
        memory.add_row(row.stage, *numbers, "yes" if row.fits else "no", str(row.largest_batch))
    console.print(plan.title, parts, *plan.notes, memory, sep="\n")
    stage = "no stage fits" if plan.stage is None else f"first stage that fits: {plan.stage}"
    console.print(f"With {run.batch_per_gpu} samples a GPU of {run.gpu_memory:g} GiB, {stage}.")
    console.print(
        f"{plan.days:.3g} days = {run.samples:.3g} samples x {plan.step_flops:.4g} FLOPs "
        f"/ ({run.gpus} GPUs x {run.gpu_flops:.4g} FLOP/s x MFU {run.mfu:g}) / 86400 s"
    )
    if output is not None:
        output.write_text(json.dumps(asdict(plan), indent=2) + "\n", encoding="utf-8")


def gemm_flops(size: int = 1536, runs: int = 10) -> float:
    """Measure the FLOP/s of this machine's fp32 matrix product, the best of some runs."""
    matrix, times = torch.rand(size, size), []
    for _ in range(runs):
        start = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


@dataclass
class Check:
    """A few real training steps (fp32, AdamW), compared with their prediction.

    Attributes:
        predicted_flops: of one step, counted on tensors without values.
        counted_flops: of one real step.
        seconds: median of a step, forward to optimizer.
        achieved_flops: FLOP/s.
        mfu: the same as a share of this machine's matrix product.
        predicted_states: MiB of weights, gradients and moments.
        measured_growth: MiB by which the process's memory grew.
    """

    model: str
    batch: int
    predicted_flops: float
    counted_flops: float
    seconds: float
    achieved_flops: float
    mfu: float
    predicted_states: float
    measured_growth: float


def check_training(
    name: str,
    build: Callable[[], nn.Module],
    abstract_loss: Callable[[nn.Module, dict], torch.Tensor],
    real_loss: Callable[[nn.Module, dict], torch.Tensor],
    make_inputs: Callable[[int], dict],
    batch: int,
    steps: int,
) -> Check:
    """Predict a model's training step, run it, and compare.

    Args:
        abstract_loss, real_loss: losses of a batch, for a model without values and for a real one.
        make_inputs: the batch of so many samples.
        steps: how many are timed, after one that is not.
    """
    inputs = make_inputs(batch)
    abstract = without_values(build).train()
    predicted = measure(lambda: abstract_loss(abstract, inputs), abstract, 1)
    total, trainable = count_parameters(abstract)
    before = psutil.Process().memory_info().rss
    model = build().train()
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)

    def train_step(inputs: dict) -> float:
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=False)
        real_loss(model, inputs).backward()
        optimizer.step()
        return time.perf_counter() - start

    train_step(make_inputs(1))  # hardly any activations
    growth = psutil.Process().memory_info().rss - before
    times = [train_step(inputs) for _ in range(steps + 1)][1:]
    counted = measure(lambda: real_loss(model, inputs), model, 1)
    seconds, flops = statistics.median(times), predicted.forward + predicted.backward
    return Check(
        model=name,
        batch=batch,
        predicted_flops=flops,
        counted_flops=counted.forward + counted.backward,
        seconds=seconds,
        achieved_flops=flops / seconds,
        mfu=flops / seconds / gemm_flops(),
        predicted_states=(16 * trainable + 4 * (total - trainable)) / 2**20,
        measured_growth=growth / 2**20,
    )


def run_check(name: str, batch: int, steps: int) -> Check:
    """Check the prediction for the tiny "tokenizer", or an "mllm" of the shipped model's sizes, with new weights."""
    if name == "tokenizer":
        config = UniTokConfig.preset("tiny")
        return check_training(
            "tokenizer, tiny",
            lambda: UniTokModel(config),
            tokenizer_loss,
            tokenizer_loss,
            lambda size: tokenizer_batch(config, size),
            batch,
            steps,
        )
    mllm_config = UniTokMLLMConfig.from_pretrained(SHIPPED_MODEL)
    return check_training(
        "MLLM, tiny",
        lambda: UniTokMLLMForConditionalGeneration(mllm_config),
        mllm_loss,
        lambda model, inputs: model(**inputs).loss,
        lambda size: mllm_batch(mllm_config, size, text_length=46, images=1, drawn=1),
        batch,
        steps,
    )


app = script_app(cls=OneLineErrors, no_args_is_help=True, help=__doc__)
Samples = Annotated[float, typer.Option(help="Samples of the whole training, like 1.28e9.")]
GPUs = Annotated[int, typer.Option(help="GPUs in all.")]
TrainedParts = Annotated[list[str], typer.Option(help="A part that is trained; once for each.")]
GPUMemory = Annotated[float, typer.Option(help="GiB of one GPU.")]
GPUFlops = Annotated[float, typer.Option(help="FLOP/s of one GPU, by its data sheet; the default is an H100's, bf16.")]
MFU = Annotated[float, typer.Option(help="Share of these FLOP/s that training achieves.")]
GPUsPerNode = Annotated[int, typer.Option(help="GPUs of one machine.")]
Batch = Annotated[int, typer.Option(help="Samples in one step of one GPU.")]
Checkpointing = Annotated[bool, typer.Option(help="Compute activations again in the backward pass.")]
JSONFile = Annotated[Path | None, typer.Option("--json", help="Write the plan to this file too.")]


def vision_fields(text: str) -> dict:
    """Fields of a vision config, from YAML (or JSON) like "{image_size: 512}".

    Raises:
        typer.BadParameter: it is no mapping, or names a field that there is not.
    """
    values = yaml.safe_load(text)
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{text!r} is no mapping like '{{image_size: 512}}'.")
    if unknown := values.keys() - {field.name for field in fields(UniTokVisionConfig)}:
        raise typer.BadParameter(f"A vision config has no {', '.join(sorted(unknown))}.")
    return values


@app.command("tokenizer")
def tokenizer_command(
    samples: Samples,
    gpus: GPUs,
    preset: Annotated[str, typer.Option(help="large, base or tiny, or a folder.")] = "large",
    gpu_memory: GPUMemory = 80.0,
    gpu_flops: GPUFlops = 989e12,
    mfu: MFU = 0.4,
    gpus_per_node: GPUsPerNode = 8,
    batch_per_gpu: Batch = 64,
    perceptual: Annotated[bool, typer.Option(help="With LPIPS.")] = True,
    gan: Annotated[bool, typer.Option(help="With the discriminator.")] = True,
    gan_start: Annotated[float, typer.Option(help="Share of the training before the discriminator starts.")] = 0.375,
    ema: Annotated[bool, typer.Option(help="With an average of the weights.")] = True,
    gradient_checkpointing: Checkpointing = False,
    vision_overrides: Annotated[
        dict,
        typer.Option(parser=vision_fields, help="Fields of its vision config that differ, like '{image_size: 512}'."),
    ] = "{}",
    json_file: JSONFile = None,
) -> None:
    """Plan the visual tokenizer's training."""
    run = Run(samples, gpus, gpu_memory, gpu_flops, mfu, batch_per_gpu, gpus_per_node)
    show(
        plan_tokenizer(preset, run, perceptual, gan, gan_start, ema, gradient_checkpointing, **vision_overrides),
        json_file,
    )


@app.command("mllm")
def mllm_command(
    samples: Samples,
    gpus: GPUs,
    llm: Annotated[
        str, typer.Option(help=f"A preset ({', '.join(LLMS)}), or a folder of an LLM or an MLLM.")
    ] = "llama-2-7b",
    visual: Annotated[str, typer.Option(help="large, base or tiny, or a folder.")] = "large",
    text_length: Annotated[int, typer.Option(help="Text tokens of a sample.")] = 128,
    images: Annotated[int, typer.Option(help="Images of a sample.")] = 1,
    drawn: Annotated[int | None, typer.Option(help="How many of them are targets.", show_default="all")] = None,
    trainable: TrainedParts = list(TRAINED_PARTS),  # noqa: B006
    lora_rank: Annotated[int, typer.Option(min=0, help="Above 0: LoRA on the LLM, with this rank.")] = 0,
    online_codes: Annotated[bool, typer.Option(help="Encode images while training.")] = False,
    gpu_memory: GPUMemory = 80.0,
    gpu_flops: GPUFlops = 989e12,
    mfu: MFU = 0.4,
    gpus_per_node: GPUsPerNode = 8,
    batch_per_gpu: Batch = 4,
    gradient_checkpointing: Checkpointing = False,
    json_file: JSONFile = None,
) -> None:
    """Plan a training of the unified MLLM."""
    run = Run(samples, gpus, gpu_memory, gpu_flops, mfu, batch_per_gpu, gpus_per_node)
    plan = plan_mllm(
        llm,
        visual,
        run,
        text_length,
        images,
        drawn,
        tuple(trainable),
        lora_rank,
        online_codes,
        gradient_checkpointing,
    )
    show(plan, json_file)


@app.command("check")
def check_command(
    batch: Annotated[int, typer.Option(min=1, help="Samples in one step.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed.")] = 3,
    json_file: JSONFile = None,
) -> None:
    """Compare predictions with a few real training steps of the tiny models, on this machine's CPU."""
    # a process for each, whose memory grows by that model alone
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        checks = list(pool.map(run_check, ("tokenizer", "mllm"), (batch, batch), (steps, steps)))
    table = markdown_table("", *[check.model for check in checks])
    rows = {
        "samples a step": lambda check: check.batch,
        "GFLOPs a step, predicted": lambda check: f"{check.predicted_flops / 1e9:.3f}",
        "GFLOPs a step, counted": lambda check: f"{check.counted_flops / 1e9:.3f}",
        "seconds a step": lambda check: f"{check.seconds:.3f}",
        "GFLOP/s achieved": lambda check: f"{check.achieved_flops / 1e9:.1f}",
        "MFU, of the matrix product's FLOP/s": lambda check: f"{check.mfu:.1%}",
        "MiB of states, predicted": lambda check: f"{check.predicted_states:.1f}",
        "MiB of memory growth, measured": lambda check: f"{check.measured_growth:.1f}",
    }
    for name, value in rows.items():
        table.add_row(name, *[str(value(check)) for check in checks])
    Console(width=119).print(table)
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(check) for check in checks], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    one_line_errors()(app)()
