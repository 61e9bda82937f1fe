"""Plans of the two trainings: the visual tokenizer's and the MLLM's."""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, LlamaConfig

from training.discriminator import FeatureDiscriminator
from training.losses import LossArguments
from training.perceptual import FrozenFeatures, perceptual_distance
from training.planning.counting import Cost, Part, count_parameters, list_parts, measure, without_values
from training.planning.memory import Run, StageMemory, plan_memory
from unitok_mllm import UniTokConfig, UniTokMLLMConfig, UniTokMLLMForConditionalGeneration, UniTokModel


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
class Plan:
    """Plan of a training.

    Attributes:
        title: model and amount of training, in one line.
        run: amount of training, and its hardware.
        parts: parameters and FLOPs of the model's parts.
        notes: what is counted and what is not.
        forward_flops: FLOPs of one sample's forward pass.
        step_flops: FLOPs of one sample's training step.
        memory: memory under each kind of sharding.
        stage: first kind of sharding that fits; None if none does.
        days: duration of the training.
    """

    title: str
    run: Run
    parts: list[Part]
    notes: list[str]
    forward_flops: float
    step_flops: float
    memory: list[StageMemory]
    stage: str | None
    days: float


def make_plan(
    title: str, run: Run, parts: list[Part], notes: list[str], forward: float, step: float, memory: list[StageMemory]
) -> Plan:
    """Make a plan, with the first stage that fits and the duration of the training. For the arguments see `Plan`."""
    stage = next((row.stage for row in memory if row.fits), None)
    return Plan(title, run, parts, notes, forward, step, memory, stage, run.days(step))


def visual_config(name: str, **vision_overrides) -> UniTokConfig:
    """Load a visual tokenizer's config.

    Args:
        name: name of a preset, or a folder.
        vision_overrides: fields of the preset's vision config to change.

    Raises:
        ValueError: the name is neither, or fields are given for a folder.
    """
    if not Path(name, "config.json").is_file():
        return UniTokConfig.preset(name, **vision_overrides)
    if vision_overrides:
        raise ValueError(f"The folder {name} has its own sizes: {', '.join(vision_overrides)} would have no effect.")
    return UniTokConfig.from_pretrained(name)


def mllm_config(llm: str, visual: str) -> UniTokMLLMConfig:
    """Load an MLLM's config.

    Args:
        llm: name of a preset, or the folder of an LLM or an MLLM. An MLLM's embedder and depth transformer are used.
        visual: the visual tokenizer, see `visual_config`.

    Raises:
        ValueError: a name is unknown.
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
    """Make a batch of empty images and captions for `UniTokModel.forward`."""
    size, length = config.vision_config.image_size, config.text_config.max_position_embeddings
    return {
        "pixel_values": torch.zeros(batch, config.vision_config.num_channels, size, size),
        "input_ids": torch.zeros(batch, length, dtype=torch.long),
    }


def tokenizer_loss(model: UniTokModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute a loss of reconstructions, codes and embeddings. Only its FLOPs matter, not its value."""
    output = model(**inputs)
    similarity = output.image_embeds @ output.text_embeds.T
    return output.reconstruction.float().square().mean() + output.vq_loss + similarity.float().mean()


def mllm_batch(config: UniTokMLLMConfig, batch: int, text_length: int, images: int, drawn: int) -> dict:
    """Make a batch of empty texts, each followed by `images` images, of which the first `drawn` are targets."""
    vision, positions = config.visual_config.vision_config, config.num_image_positions
    image = [config.boi_token_id, *[config.image_token_id] * positions, config.eoi_token_id]
    input_ids = torch.tensor([[0] * text_length + images * image] * batch)
    inputs = {"input_ids": input_ids, "labels": input_ids}
    if images:
        inputs["image_codes"] = torch.zeros(batch * images, vision.num_codebooks, positions, dtype=torch.long)
        inputs["image_targets"] = torch.tensor([i < drawn for i in range(images)] * batch)
    return inputs


def mllm_loss(model: UniTokMLLMForConditionalGeneration, inputs: dict) -> torch.Tensor:
    """Compute the MLLM's loss from the parts of its forward pass.

    `forward` itself selects positions by a mask, which is impossible on tensors without values.
    """
    codes = inputs.get("image_codes")
    embeds, _ = model.embed(inputs["input_ids"], image_codes=codes)
    output = model.language_model(inputs_embeds=embeds, output_hidden_states=True, use_cache=False)
    loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), inputs["labels"][:, 1:].flatten())
    if codes is not None and inputs["image_targets"].any():
        targets = codes[inputs["image_targets"]].transpose(1, 2).flatten(0, 1)  # (N * L, K)
    else:
        targets = torch.zeros(1, model.depth_head.num_codebooks, dtype=torch.long)  # as the model does
    states = output.hidden_states[-1].flatten(0, 1)[: len(targets)]  # any states will do, in the right number
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
        preset: name of a preset of `UniTokConfig`, or a folder.
        run: amount of training, and its hardware.
        perceptual: whether to count LPIPS on VGG-16: two forward passes per sample, and one backward pass to the
            reconstruction.
        gan: whether to count the discriminator on DINOv2 ViT-S/14: one forward and backward pass to the
            reconstruction, and a training step of the heads on four images (real and reconstructed, plain and
            augmented).
        gan_start: share of the training after which the discriminator starts.
        ema: whether to count a running average of the weights, in fp32.
        gradient_checkpointing: whether activations are recomputed in the backward pass.
        vision_overrides: fields of the preset's vision config to change.

    Raises:
        ValueError: the preset is unknown or has no text tower, or `gan_start` is outside [0, 1].
    """
    config = visual_config(preset, **vision_overrides)
    if config.text_config is None:
        raise ValueError(f"The tokenizer {preset!r} has no text tower to train with.")
    if not 0 <= gan_start <= 1:
        raise ValueError(f"gan_start is a share between 0 and 1, got {gan_start}.")
    batch, size = run.batch_per_gpu, config.vision_config.image_size
    model = without_values(lambda: UniTokModel(config).bfloat16()).train()
    if gradient_checkpointing:
        from training.sharding import checkpoint_blocks  # takes seconds

        checkpoint_blocks(model, 1.0)
    inputs = tokenizer_batch(config, batch)
    cost = measure(lambda: tokenizer_loss(model, inputs), model, batch)
    parts = list_parts(model, TOKENIZER_PARTS, cost)
    forward, step, activations = cost.forward, cost.forward + cost.backward, cost.activations
    other = 0.0
    notes = [
        f"EMA of the weights: {'4 bytes a parameter, sharded as the weights are' if ema else 'none'}.",
        "Not counted: cross-task consistency (off by default), and similarities to other GPUs' samples (below 0.1%).",
        "LPIPS and the discriminator are counted as float32; GPUs work more slowly in it than in bf16.",
        "Weights stay float32 under every sharding; bf16 is autocast's.",
    ]
    images = torch.zeros(batch, 3, size, size)

    def through(module: nn.Module, *args: torch.Tensor) -> Cost:
        return measure(lambda: module(images.clone().requires_grad_(), *args).float().square().mean(), module, batch)

    if perceptual:
        distance = without_values(lambda: perceptual_distance("lpips", size, pretrained=False))
        lpips = through(distance, images)
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
        adversarial = through(discriminator)
        work = adversarial.forward + adversarial.backward + 4 * (heads.forward + heads.backward)
        parts.append(Part("discriminator, DINOv2 ViT-S/14", total, trainable, adversarial.forward, work))
        step += (1 - gan_start) * work
        activations += adversarial.activations
        other += 4 * (total - trainable) + 16 * trainable
        notes.append(f"The discriminator works in {1 - gan_start:.1%} of the steps; the step below is the mean.")
    title = f"UniTok tokenizer, {preset}: {run.samples:.3g} samples on {run.gpus} GPUs"
    return make_plan(title, run, parts, notes, forward, step, plan_memory(model, run, activations, other, ema))


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
        llm: name of a preset or a folder, see `mllm_config`.
        visual: name of a preset or a folder, see `visual_config`.
        run: amount of training, and its hardware.
        text_length: text tokens per sample. Each image adds its positions and the two tokens around it.
        images: images per sample.
        drawn: number of images that are targets; None for all.
        trainable: names of the trained parts, from `TRAINED_PARTS`.
        lora_rank: rank of adapters on the LLM's linear layers, which are trained instead of the LLM; 0 for none.
        online_codes: whether images are encoded during training; otherwise their codes are extracted beforehand.
        gradient_checkpointing: whether activations are recomputed in the backward pass.

    Raises:
        ValueError: a preset or part is unknown, or the numbers of tokens and images are impossible.
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
