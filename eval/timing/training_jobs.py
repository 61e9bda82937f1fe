"""The jobs that train: a training step of the tokenizer, and one of the MLLM."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from eval.timing import naive
from eval.timing.bounds import train_bytes
from eval.timing.measuring import Job, Way
from eval.timing.settings import Settings
from eval.timing.subjects import Subject, pixels_of_photographs, random_ids, repeat_to
from training.losses import LossArguments, tokenizer_losses
from unitok_mllm import UniTokMLLMConfig


def training_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[], torch.Tensor],
    max_grad_norm: float,
    settings: Settings,
) -> torch.Tensor:
    """Run the forward pass, the backward pass and the update, and return the loss."""
    with torch.autocast(settings.device.split(":")[0], torch.bfloat16, enabled=settings.dtype == "bfloat16"):
        loss = loss_of()
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def made_trainable(module: PreTrainedModel, settings: Settings) -> tuple[PreTrainedModel, torch.optim.AdamW]:
    """Prepare a model for training, with an optimizer whose learning rate of 0 leaves the weights unchanged.

    Every run then computes the same values, at the full cost of the optimizer.
    """
    module.requires_grad_(True).train()
    if settings.gradient_checkpointing:
        module.gradient_checkpointing_enable()
    if settings.compile:
        module.compile()
    return module, torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.0, fused=True)


def train_tokenizer_jobs(subject: Subject, settings: Settings) -> Iterator[Job]:
    """Yield the jobs of one training step of the tokenizer."""
    tokenizer, optimizer = made_trainable(subject.tokenizer, settings)
    pixels = pixels_of_photographs(tokenizer.config.vision_config.image_size).to(settings.device)
    text, weights = tokenizer.config.text_config, LossArguments().weights(1.0)
    for batch in settings.train_batches:
        images, ids = repeat_to(pixels, batch), None
        if text is not None:
            ids = torch.randint(10, text.vocab_size, (batch, text.max_position_embeddings), device=settings.device)
            ids[:, -1] = text.eos_token_id

        def loss_of(forward: Callable, images=images, ids=ids) -> torch.Tensor:
            return tokenizer_losses(forward(images, input_ids=ids), images, weights)[0]

        step = partial(training_step, tokenizer, optimizer, max_grad_norm=10.0, settings=settings)
        yield Job(
            Way(partial(step, partial(loss_of, tokenizer))),
            batch,
            batch,
            "images/s",
            train_bytes(tokenizer),
            naive=Way(partial(step, partial(loss_of, partial(naive.tokenizer_forward, tokenizer)))),
            trained=tokenizer,
        )


def training_sample(config: UniTokMLLMConfig, kind: str, text_tokens: int) -> dict:
    """Build a random sample in the format of `training.data`.

    It either writes an image after `text_tokens` tokens, or reads an image, and then the last 8 tokens are targets, or
    it is a text of the same length, all of it targets.
    """
    vision, positions = config.visual_config.vision_config, config.num_image_positions
    ids, writes = random_ids(config, text_tokens + positions + 3), kind == "write"
    if kind == "text":
        return {"input_ids": ids, "labels": ids, "image_targets": torch.zeros(0, dtype=torch.bool), "images": []}
    start = text_tokens + 1 if writes else 2
    ids[start - 1], ids[start + positions] = config.boi_token_id, config.eoi_token_id
    ids[start : start + positions] = config.image_token_id
    labels = ids.masked_fill(ids == config.image_token_id, -100)
    labels[: start - 1 if writes else -8] = -100
    return {
        "input_ids": ids,
        "labels": labels,
        "image_targets": torch.tensor([writes]),
        "images": [torch.randint(vision.codebook_size, (vision.num_codebooks, positions))],
    }


def training_batch(config: UniTokMLLMConfig, batch: int, mix: str, packed: bool, device: str) -> dict:
    """Build a batch of samples of unequal lengths with the MLLM trainer's collator.

    `mix` ("read", "half" or "write") says how many of them write an image; "text" has none. Packed rows have at least
    two samples.
    """
    from training.data import MLLMCollator

    kinds = ("write", "read") if mix == "half" else (mix,)
    samples = [training_sample(config, kinds[i % len(kinds)], 32 + 8 * (i // 2 % 3)) for i in range(batch)]
    vision, positions = config.visual_config.vision_config, config.num_image_positions
    collator = MLLMCollator(0, (vision.num_codebooks, positions), pack_to=2 * (positions + 64) if packed else 0)
    return {name: tensor.to(device) for name, tensor in collator(samples).items()}


def train_mllm_jobs(subject: Subject, settings: Settings) -> Iterator[Job]:
    """Yield a job for each batch size, where half of the samples (or the only one) write; for one size, all mixes.

    "with logits" does not compute the losses in chunks.
    """
    if settings.preset == "7b" and not settings.model:
        subject.mllm.to(getattr(torch, settings.dtype))
    mllm, optimizer = made_trainable(subject.mllm, settings)
    rows = [(batch, "half" if batch > 1 else "write", "") for batch in settings.train_batches]
    middle = 4 if 4 in settings.train_batches else max(settings.train_batches)
    for mix in ("half", "read", "write", "text"):
        rows += [(middle, mix, ""), (middle, mix, "with logits")]
    rows.append((middle, "half", "packed"))
    for batch, mix, variant in dict.fromkeys(rows):
        inputs = training_batch(mllm.config, batch, mix, variant == "packed", settings.device)
        num_tokens = int(inputs.pop("num_tokens"))
        fast = {"logits_at_targets": True} if variant == "with logits" else {"losses_alone": True}

        def loss_of(options: dict, inputs=inputs) -> torch.Tensor:
            return mllm(**inputs, **options).loss

        step = partial(training_step, mllm, optimizer, max_grad_norm=1.0, settings=settings)
        yield Job(
            Way(partial(step, partial(loss_of, fast))),
            batch,
            batch,
            "samples/s",
            train_bytes(mllm),
            detail=", ".join(filter(None, (mix, variant))),
            naive=Way(partial(step, partial(loss_of, {}))),
            trained=mllm,
            describe=lambda _, tokens=num_tokens: f"{tokens} tokens",
        )
