"""Times the model's jobs on this machine, one JSON line each, beside what the machine could do at best.

    python -m eval.speed                                              # the shipped tiny model
    python -m eval.speed --preset smollm2 --dtype bfloat16 --jobs draw answer
    python -m eval.speed --preset smollm2 --jobs draw --batches 1 --naive --positions 32
    python -m eval.speed --model FOLDER --output runs/speed.json      # an MLLM, or a tokenizer alone

Presets: `tiny` is the shipped model; `smollm2` an LLM of SmolLM2-135M's size with 8 codebooks of 4096 and 256 positions;
`large` the large tokenizer; `7b` an LLM of Llama-2-7B's size with the large tokenizer, for a GPU. All but the first have
random weights. Jobs:

    encode, decode      images to codes, codes to images (photographs that scikit-image and scikit-learn ship); oneDNN:
                        by `pack_linears(tokenizer)`, on a CPU
    draw                text to image codes, guidance 5, greedily; draw_sampled: from the 20 likeliest codes
    answer              time to the first token of an answer about a picture, and the tokens that follow
    train_tokenizer     one step: forward, the losses that need no other network, backward, AdamW
    train_mllm          one step on samples that read or write an image each, padded as the collator does, or packed
    first_answer        what the first question to a loaded model costs, with all that surrounds the model
    import              the package's classes in a fresh process

Each job runs in a process of its own, in which memory is the job's. A row's

    seconds             median of `runs` runs, fewer where these would take more than --seconds
    flops               of its matrix products and convolutions, counted while it runs
    least_bytes         what must be moved however clever the program: each weight once per use (drawing uses the LLM once
                        for each position and the depth transformer K times; training reads and writes weights, gradients
                        and moments 10 times over), keys and values of earlier tokens, pixels and codes, and in training
                        what is kept for the backward pass, out and in. Other activations could stay in caches.
    of_gemm, of_bandwidth   flops and least_bytes per second, as shares of the rows `peaks` of the same run: the best
                        matrix product in that dtype, and the best reading of memory
    memory_mib, peak_mib    the largest memory above what was held before, and in all: of the process on a CPU (sampled),
                        allocated on CUDA
    ratio, difference, equal    with --naive, in a row of its own: the seconds of `eval.naive` over those of the row before;
                        share of codes that differ, largest difference of pixels, or relative difference of losses; and
                        whether that is 0, or below 1e-4
    codes_equal_to_fp32, psnr_to_fp32   in bfloat16, of the photographs; PSNR in dB

In bfloat16 training keeps float32 weights under autocast, as the trainings do; those of the 7b preset, which would not
fit on a card with their gradients and moments, are bfloat16 too. What gradient checkpointing computes again is counted.
"""

import ctypes
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import connection, get_context, parent_process
from typing import Any

import psutil
import torch
from PIL import Image, ImageDraw
from rich.console import Console
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, LlamaConfig, PreTrainedModel

from eval import naive
from eval._common import parse_settings, versions
from training.errors import one_line_errors
from training.files import check_model_folder, write_atomically
from training.losses import LossArguments, psnr, tokenizer_losses
from unitok_mllm import (
    UniTokConfig,
    UniTokImageProcessorPil,
    UniTokMLLMConfig,
    UniTokMLLMForConditionalGeneration,
    UniTokModel,
)
from unitok_mllm.devices import AUTO, DEVICE_HELP, find_device
from unitok_mllm.inference import SHIPPED_MODEL, answer_questions
from unitok_mllm.packing_unitok import pack_linears


DTYPES = ("float32", "bfloat16")
TOKENIZER_JOBS = ("encode", "decode", "train_tokenizer")
MLLM_JOBS = ("draw", "draw_sampled", "answer", "train_mllm")
PRESETS = {
    "tiny": (*TOKENIZER_JOBS, *MLLM_JOBS, "first_answer", "import"),
    "smollm2": (*MLLM_JOBS, "import"),
    "large": (*TOKENIZER_JOBS, "import"),
    "7b": (*TOKENIZER_JOBS, *MLLM_JOBS, "import"),
}
SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
LLAMA_2_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
GUIDANCE = 5.0
PROMPT_TOKENS, ANSWER_TOKENS = 32, 32
SAME = 1e-4
NOT_AT_IMPORT = ("deepspeed", "diffusers", "lmms_eval", "gradio", "peft", "datasets", "open_clip", "timm", "wandb")
FIELDS = (
    *("job", "detail", "way", "batch", "seconds", "runs", "throughput", "unit", "flops", "least_bytes", "of_gemm"),
    *("of_bandwidth", "memory_mib", "peak_mib", "ratio", "difference", "equal", "codes_equal_to_fp32", "psnr_to_fp32"),
    *("note", "model", "dtype", "device", "threads"),
)


@dataclass
class Settings:
    """The command line.

    Raises:
        ValueError: an unknown preset, dtype, device or job, a job that the model has no part for, a folder that is no
            model, or a number out of its range.
    """

    preset: str = field(default="tiny", metadata={"help": f"one of {', '.join(PRESETS)}"})
    model: str = field(default="", metadata={"help": "folder of an MLLM or a tokenizer, instead of a preset"})
    dtype: str = field(default="float32", metadata={"help": f"one of {', '.join(DTYPES)}"})
    device: str = field(default=AUTO, metadata={"help": DEVICE_HELP})
    jobs: list[str] = field(default_factory=list, metadata={"help": "see above; all that the model has parts for"})
    batches: list[int] = field(default_factory=lambda: [1, 4, 16], metadata={"help": "images, prompts or questions"})
    train_batches: list[int] = field(default_factory=lambda: [1, 2, 4, 8], metadata={"help": "samples of a step"})
    runs: int = field(default=5, metadata={"help": "to take the median of"})
    seconds: float = field(default=60.0, metadata={"help": "no further run of a row begins after so many seconds"})
    positions: int = field(default=0, metadata={"help": "image positions to draw; 0: all"})
    threads: int = field(default=0, metadata={"help": "of the CPU; 0: torch's choice"})
    compile: bool = field(default=False, metadata={"help": "torch.compile the decoder, and the model that is trained"})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "train with less memory and more arithmetic"}
    )
    naive: bool = field(default=False, metadata={"help": "also the naive way, as a yardstick"})
    output: str = field(default="", metadata={"help": "JSON file for all of it"})

    def __post_init__(self):
        for name, choices in (("preset", PRESETS), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is one of {', '.join(choices)}, got {getattr(self, name)!r}")
        self.device = str(find_device(self.device))
        if self.device.split(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"device is cpu or cuda, got {self.device!r}")
        possible = PRESETS[self.preset]
        if self.model:
            check_model_folder(self.model)
            is_tokenizer = isinstance(AutoConfig.from_pretrained(self.model), UniTokConfig)
            possible = PRESETS["large" if is_tokenizer else "tiny"]
        if unknown := sorted(set(self.jobs) - set(possible)):
            raise ValueError(f"no job {', '.join(unknown)} for {self.name}: its jobs are {', '.join(possible)}")
        self.jobs = self.jobs or list(possible)
        for name in ("batches", "train_batches", "runs"):
            value = getattr(self, name)
            if min(value if isinstance(value, list) else [value], default=0) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if min(self.seconds, self.positions, self.threads) < 0:
            raise ValueError("seconds, positions and threads must be at least 0")

    @property
    def name(self) -> str:
        """Of the model."""
        return self.model or self.preset

    @property
    def folder(self) -> str:
        """That the model is loaded from; empty for random weights."""
        return self.model or (str(SHIPPED_MODEL) if self.preset == "tiny" else "")


@dataclass
class Way:
    """One way to compute a job: seconds and FLOPs are those of `run` less those of `less`."""

    run: Callable[[], Any]
    less: Callable[[], Any] | None = None


@dataclass
class Job:
    """What becomes a row, or two.

    Attributes:
        fast, naive: how it is computed; `naive` None where there is no other way.
        amount, unit: what one run makes, for the throughput.
        least_bytes: see the module's docstring; without activations.
        trained: the module whose parameters take gradients; None for inference.
        counted: False to time it alone, without a run before that counts FLOPs and memory.
        first: what is timed is the very first run.
        runs: instead of the settings'.
        best: the fastest run instead of the median.
        quality: further fields of the row.
        describe: a note on the output.
    """

    fast: Way
    batch: int
    amount: int
    unit: str
    least_bytes: int | None = None
    detail: str = ""
    naive: Way | None = None
    trained: nn.Module | None = None
    counted: bool = True
    first: bool = False
    runs: int | None = None
    best: bool = False
    quality: dict[str, float] = field(default_factory=dict)
    describe: Callable[[Any], str] | None = None


@dataclass
class Subject:
    """The model that is timed.

    Attributes:
        tokenizer: its visual tokenizer.
        mllm: None where there is the tokenizer alone.
        note: what to know of its weights.
        has_visual: False where the visual tokenizer is a stand-in, to be kept out of what is timed.
    """

    tokenizer: UniTokModel
    mllm: UniTokMLLMForConditionalGeneration | None = None
    note: str = ""
    has_visual: bool = True


@dataclass
class Measurement:
    """Of one way; None for what was not counted. `kept_bytes`: of what autograd keeps for the backward pass."""

    output: Any
    seconds: float
    runs: int
    flops: int | None = None
    kept_bytes: int = 0
    memory: int | None = None
    peak: int | None = None


def smollm2_mllm() -> UniTokMLLMForConditionalGeneration:
    """With an LLM of SmolLM2-135M's size, 8 codebooks of 4096 and 256 positions; the visual tokenizer is a stand-in."""
    visual = UniTokConfig.preset("tiny", image_size=256, codebook_size=4096)
    config = UniTokMLLMConfig(text_config=SMOLLM2, visual_config=visual, image_token_id=SMOLLM2.vocab_size)
    return UniTokMLLMForConditionalGeneration(config)


def load_subject(settings: Settings) -> Subject:
    """The model, float32 but for a 7B LLM's weights; see `encode_jobs` for what casts it."""
    torch.manual_seed(0)
    if settings.folder:
        is_tokenizer = isinstance(AutoConfig.from_pretrained(settings.folder), UniTokConfig)
        model_class = UniTokModel if is_tokenizer else UniTokMLLMForConditionalGeneration
        model = model_class.from_pretrained(settings.folder, dtype=torch.float32).to(settings.device).eval()
        return Subject(model) if is_tokenizer else Subject(model.visual, model)
    with torch.device(settings.device):
        if settings.preset == "large":
            return Subject(UniTokModel(UniTokConfig.preset("large")).eval(), note="random weights")
        if settings.preset == "smollm2":
            mllm = smollm2_mllm()
        else:
            llm = AutoModelForCausalLM.from_config(LLAMA_2_7B, dtype=getattr(torch, settings.dtype))
            mllm = UniTokMLLMForConditionalGeneration.from_parts(llm, UniTokModel(UniTokConfig.preset("large")))
    return Subject(mllm.visual, mllm.eval(), "random weights", has_visual=settings.preset != "smollm2")


def photographs(image_size: int) -> torch.Tensor:
    """Six photographs, (6, 3, H, W) in [-1, 1]."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    arrays = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket(), *load_sample_images().images]
    processor = UniTokImageProcessorPil(size={"height": image_size, "width": image_size})
    return processor([Image.fromarray(array) for array in arrays], mode="reconstruct")["pixel_values"]


def repeat_to(rows: torch.Tensor, batch: int) -> torch.Tensor:
    """The first `batch` rows, begun again where they end."""
    return rows[torch.arange(batch, device=rows.device) % len(rows)]


def random_ids(config: UniTokMLLMConfig, *shape: int) -> torch.Tensor:
    """Token ids without meaning, above the special ones."""
    return torch.randint(10, min(1000, config.text_config.vocab_size), shape)


# --- the least that must be moved ---


def nbytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def weight_bytes(*modules: nn.Module) -> int:
    """Of all parameters, shared ones once, but for embeddings: of these only the rows looked up are read."""
    layers = [layer for module in modules for layer in module.modules() if not isinstance(layer, nn.Embedding)]
    return nbytes(*{id(p): p for layer in layers for p in layer.parameters(recurse=False)}.values())


@torch.no_grad()
def cache_bytes(mllm: UniTokMLLMForConditionalGeneration) -> int:
    """Of one token's keys and values in all layers of the LLM."""
    width = mllm.config.text_config.hidden_size
    embeds = torch.zeros(1, 1, width, dtype=mllm.dtype, device=mllm.device)
    cache = mllm.get_decoder()(inputs_embeds=embeds, use_cache=True).cache
    return nbytes(*[tensor for layer in cache.layers for tensor in (layer.keys, layer.values)])


def encode_bytes(tokenizer: UniTokModel, pixel_values: torch.Tensor, codes: torch.Tensor) -> int:
    vision = tokenizer.vision_model
    return weight_bytes(vision.encoder, vision.quant_proj) + nbytes(vision.quantizer.codebooks, pixel_values, codes)


def decode_bytes(tokenizer: UniTokModel, codes: torch.Tensor, pixels: torch.Tensor) -> int:
    return weight_bytes(tokenizer.vision_model.post_quant_proj, tokenizer.decoder) + nbytes(codes, pixels)


def draw_bytes(mllm: UniTokMLLMForConditionalGeneration, rows: int, prompt_tokens: int, positions: int) -> int:
    """Of drawing, `rows` being prompts times guidance branches."""
    head = mllm.depth_head
    depth = weight_bytes(head.in_proj) + head.num_codebooks * weight_bytes(head.layers, head.norm, head.head)
    earlier = sum(prompt_tokens + position - 1 for position in range(1, positions))
    return (
        positions * (weight_bytes(mllm.get_decoder()) + depth)
        + (positions - 1) * weight_bytes(mllm.embedder)
        + rows * earlier * cache_bytes(mllm)
    )


def answer_bytes(mllm: UniTokMLLMForConditionalGeneration, rows: int, prompt_tokens: int, tokens: int) -> int:
    """Of an answer's tokens after the first."""
    earlier = sum(prompt_tokens + token - 1 for token in range(1, tokens))
    llm = weight_bytes(mllm.get_decoder(), mllm.get_output_embeddings())
    return (tokens - 1) * llm + rows * earlier * cache_bytes(mllm)


def train_bytes(module: nn.Module) -> int:
    """Of a step with AdamW, activations aside: weights into forward, backward and update, and out of it; gradients out
    and in; two moments in and out."""
    return 10 * nbytes(*[p for p in module.parameters() if p.requires_grad])


# --- jobs ---


def peaks_jobs(settings: Settings) -> Iterator[Job]:
    """The machine's own best."""
    size = 2048 if settings.device == "cpu" else 8192
    matrix = torch.rand(size, size, dtype=getattr(torch, settings.dtype), device=settings.device)
    linear = nn.Linear(size, size, bias=False, device=settings.device, dtype=matrix.dtype)
    product = partial(pack_linears(linear), matrix)  # on a CPU by oneDNN, whose products are the fastest
    options = {"batch": 1, "amount": 1, "runs": 20, "best": True}
    yield Job(Way(product), **options, unit="products", least_bytes=3 * nbytes(matrix), detail="GEMM")
    memory = torch.ones(2**27, device=settings.device)  # 512 MiB, more than caches hold
    yield Job(Way(memory.sum), **options, unit="sums", least_bytes=nbytes(memory), detail="bandwidth")


def coding_jobs(
    tokenizer: UniTokModel,
    name: str,
    inputs: torch.Tensor,
    bytes_of: Callable[[UniTokModel, torch.Tensor, torch.Tensor], int],
    quality: dict[str, float],
    settings: Settings,
) -> Iterator[Job]:
    """The tokenizer's "encode" or "decode", by itself and, where its layers can have it, in oneDNN's blocked layout."""
    models = dict.fromkeys((tokenizer, pack_linears(tokenizer)))  # one, where nothing can have it
    for batch in settings.batches:
        rows = repeat_to(inputs, batch)
        least = bytes_of(tokenizer, rows, getattr(tokenizer, name)(rows))
        options = {"batch": batch, "amount": batch, "unit": "images/s", "least_bytes": least, "quality": quality}
        for model in models:
            is_blocked = model is not tokenizer
            yield Job(
                Way(partial(getattr(model, name), rows)),
                detail="oneDNN" * is_blocked,
                naive=None if is_blocked else Way(partial(getattr(naive, name), tokenizer, rows)),
                **options,
            )


def encode_jobs(subject: Subject, settings: Settings) -> Iterator[Job]:
    tokenizer = subject.tokenizer
    pixels = photographs(tokenizer.config.vision_config.image_size).to(settings.device)
    quality = {}
    if settings.dtype != "float32":
        true_codes = tokenizer.encode(pixels)
        tokenizer.to(getattr(torch, settings.dtype))
        quality = {"codes_equal_to_fp32": (tokenizer.encode(pixels) == true_codes).float().mean().item()}
    yield from coding_jobs(tokenizer, "encode", pixels, encode_bytes, quality, settings)


def decode_jobs(subject: Subject, settings: Settings) -> Iterator[Job]:
    tokenizer = subject.tokenizer
    pixels = photographs(tokenizer.config.vision_config.image_size).to(settings.device)
    all_codes, quality = tokenizer.encode(pixels), {}
    if settings.dtype != "float32":
        true_pixels = tokenizer.decode(all_codes)
        tokenizer.to(getattr(torch, settings.dtype))
        quality = {"psnr_to_fp32": psnr(tokenizer.decode(all_codes), true_pixels).mean().item()}
    if settings.compile:
        tokenizer.decoder.compile()
    yield from coding_jobs(tokenizer, "decode", all_codes, decode_bytes, quality, settings)


def draw_jobs(subject: Subject, settings: Settings, sampled: bool = False) -> Iterator[Job]:
    mllm = subject.mllm.to(getattr(torch, settings.dtype))
    positions = settings.positions or mllm.config.num_image_positions
    depth = naive.depth_llama(mllm) if settings.naive and not sampled else None
    for batch in settings.batches:
        ids = random_ids(mllm.config, 2, batch, PROMPT_TOKENS)
        ids[:, :, -1] = mllm.config.boi_token_id
        prompts = dict(zip(("input_ids", "unconditional_input_ids"), ids.to(settings.device)))
        options = {"guidance_scale": GUIDANCE, "num_positions": positions}
        how = {"do_sample": True, "top_k": 20, "seed": 0} if sampled else {"do_sample": False}
        yield Job(
            Way(partial(mllm.generate, generation_mode="image", **prompts, **options, **how)),
            batch,
            batch,
            "images/s",
            draw_bytes(mllm, 2 * batch, PROMPT_TOKENS, positions),
            detail="" if positions == mllm.config.num_image_positions else f"{positions} positions",
            naive=None if sampled else Way(partial(naive.draw, mllm, depth, **prompts, **options)),
            counted=settings.device == "cpu",  # replays of a CUDA graph cannot be seen
        )


def answer_jobs(subject: Subject, settings: Settings) -> Iterator[Job]:
    config = subject.mllm.config
    images = photographs(config.visual_config.vision_config.image_size).to(settings.device)
    codes = subject.tokenizer.encode(images)
    mllm = subject.mllm.to(getattr(torch, settings.dtype))
    ends = mllm.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or []
    suppressed = [config.image_token_id, *ends]  # or an answer would end, or hold a placeholder
    for batch in settings.batches:
        ids = random_ids(config, batch, PROMPT_TOKENS + config.num_image_positions)
        ids[:, 8 : 8 + config.num_image_positions] = config.image_token_id
        ids = ids.to(settings.device)
        picture, reading = {"image_codes": repeat_to(codes, batch)}, 0
        if subject.has_visual:
            picture = {"pixel_values": repeat_to(images, batch)}
            reading = encode_bytes(mllm.visual, picture["pixel_values"], repeat_to(codes, batch))

        def fast(tokens: int, ids=ids, picture=picture) -> torch.Tensor:
            options = {"do_sample": False, "suppress_tokens": suppressed, "pad_token_id": 0}
            return mllm.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **picture, **options
            )[:, ids.shape[1] :]

        def slow(tokens: int, ids=ids, picture=picture) -> torch.Tensor:
            return naive.answer(mllm, ids, tokens, suppressed, **picture)

        first = weight_bytes(mllm.embedder, mllm.get_decoder(), mllm.get_output_embeddings())
        yield Job(
            Way(partial(fast, 1)),
            batch,
            batch,
            "tokens/s",
            first + reading,
            detail="first token",
            naive=Way(partial(slow, 1)),
        )
        yield Job(
            Way(partial(fast, ANSWER_TOKENS), partial(fast, 1)),
            batch,
            batch * (ANSWER_TOKENS - 1),
            "tokens/s",
            answer_bytes(mllm, batch, ids.shape[1], ANSWER_TOKENS),
            detail="next tokens",
            naive=Way(partial(slow, ANSWER_TOKENS), partial(slow, 1)),
        )


def training_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[], torch.Tensor],
    max_grad_norm: float,
    settings: Settings,
) -> torch.Tensor:
    """Forward, backward and update; returns the loss."""
    with torch.autocast(settings.device.split(":")[0], torch.bfloat16, enabled=settings.dtype == "bfloat16"):
        loss = loss_of()
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def made_trainable(module: PreTrainedModel, settings: Settings) -> tuple[PreTrainedModel, torch.optim.AdamW]:
    """The model as the settings train it, and an optimizer that does all its work and, at a rate of 0, leaves the
    weights as they are, so that every run computes the same."""
    module.requires_grad_(True).train()
    if settings.gradient_checkpointing:
        module.gradient_checkpointing_enable()
    if settings.compile:
        module.compile()
    return module, torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.0, fused=True)


def train_tokenizer_jobs(subject: Subject, settings: Settings) -> Iterator[Job]:
    tokenizer, optimizer = made_trainable(subject.tokenizer, settings)
    pixels = photographs(tokenizer.config.vision_config.image_size).to(settings.device)
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


def training_sample(config: UniTokMLLMConfig, writes: bool, text_tokens: int) -> dict:
    """A sample that writes an image from `text_tokens` tokens, or reads one and learns the last 8 of them.

    Ids and codes have no meaning; the form is that of `training.data`.
    """
    vision, positions = config.visual_config.vision_config, config.num_image_positions
    ids = random_ids(config, text_tokens + positions + 3)
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
    """What the MLLM's trainer gets from its collator: `batch` samples of unequal lengths, of which those of the mix
    (read, half, write) write an image. Packed rows hold at least two samples."""
    from training.data import MLLMCollator

    writes = {"read": lambda i: False, "half": lambda i: i % 2 == 0, "write": lambda i: True}[mix]
    samples = [training_sample(config, writes(i), 32 + 8 * (i // 2 % 3)) for i in range(batch)]
    vision, positions = config.visual_config.vision_config, config.num_image_positions
    collator = MLLMCollator(0, (vision.num_codebooks, positions), pack_to=2 * (positions + 64) if packed else 0)
    return {name: tensor.to(device) for name, tensor in collator(samples).items()}


def train_mllm_jobs(subject: Subject, settings: Settings) -> Iterator[Job]:
    """Each batch with half of its samples writing (a single one writes), and one of them with all mixes and packed."""
    if settings.preset == "7b" and not settings.model:
        subject.mllm.to(getattr(torch, settings.dtype))
    mllm, optimizer = made_trainable(subject.mllm, settings)
    rows = [(batch, "half" if batch > 1 else "write", False) for batch in settings.train_batches]
    middle = 4 if 4 in settings.train_batches else max(settings.train_batches)
    rows += [(middle, "read", False), (middle, "write", False), (middle, "half", True)]
    for batch, mix, packed in dict.fromkeys(rows):
        inputs = training_batch(mllm.config, batch, mix, packed, settings.device)
        num_tokens = int(inputs.pop("num_tokens"))

        def loss_of(logits_at_targets: bool, inputs=inputs) -> torch.Tensor:
            return mllm(**inputs, logits_at_targets=logits_at_targets).loss

        step = partial(training_step, mllm, optimizer, max_grad_norm=1.0, settings=settings)
        yield Job(
            Way(partial(step, partial(loss_of, True))),
            batch,
            batch,
            "samples/s",
            train_bytes(mllm),
            detail=mix + ", packed" * packed,
            naive=Way(partial(step, partial(loss_of, False))),
            trained=mllm,
            describe=lambda _, tokens=num_tokens: f"{tokens} tokens",
        )


def first_answer_jobs(subject: Subject, settings: Settings) -> Iterator[Job]:
    mllm, processor = subject.mllm.to(getattr(torch, settings.dtype)), AutoProcessor.from_pretrained(settings.folder)
    picture = Image.new("RGB", (64, 64), "lavender")
    ImageDraw.Draw(picture).ellipse((20, 16, 44, 40), fill="red")

    def ask() -> str:
        return answer_questions(mllm, processor, [(picture, "what color is the shape?")], ANSWER_TOKENS)[0]

    options = {"batch": 1, "amount": 1, "unit": "answers/s", "counted": False, "describe": repr}
    yield Job(Way(ask), **options, detail="first", runs=1, first=True)
    yield Job(Way(ask), **options, detail="later")


def import_in_fresh_process(line: str) -> list[str]:
    """Which heavy libraries the line of Python brings along."""
    program = f"import sys; {line}; print(*sorted(set({NOT_AT_IMPORT}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return done.stdout.split()


def import_jobs(settings: Settings) -> Iterator[Job]:
    """The package, and what it stands on: no import of it can be shorter."""
    for detail, line in (
        ("", "from unitok_mllm import UniTokMLLMForConditionalGeneration, UniTokMLLMProcessor"),
        ("transformers alone", "from transformers import AutoImageProcessor, AutoProcessor, LlamaForCausalLM"),
        ("torchvision alone", "import torchvision"),
    ):
        yield Job(
            Way(partial(import_in_fresh_process, line)),
            1,
            1,
            "imports/s",
            detail=detail,
            counted=False,
            describe=lambda found: f"imports {', '.join(found) or 'none of ' + ', '.join(NOT_AT_IMPORT)}",
        )


JOBS = {
    "encode": encode_jobs,
    "decode": decode_jobs,
    "draw": draw_jobs,
    "draw_sampled": partial(draw_jobs, sampled=True),
    "answer": answer_jobs,
    "train_tokenizer": train_tokenizer_jobs,
    "train_mllm": train_mllm_jobs,
    "first_answer": first_answer_jobs,
}
WITHOUT_MODEL = {"peaks": peaks_jobs, "import": import_jobs}


# --- measuring ---


class PeakMemory:
    """Inside it, watches the memory in use: of the process, every millisecond, or what is allocated on CUDA.

    Attributes:
        before, peak: bytes.
    """

    def __init__(self, device: str):
        self.on_cuda, self.process, self.done = device.startswith("cuda"), psutil.Process(), threading.Event()

    def __enter__(self) -> "PeakMemory":
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            if platform.libc_ver()[0] == "glibc":
                ctypes.CDLL(None).malloc_trim(0)  # what was freed before would hide what is taken now
            self.before = self.peak = self.process.memory_info().rss
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.001):
            self._look()

    def _look(self) -> None:
        self.peak = max(self.peak, self.process.memory_info().rss)

    def __exit__(self, *exception) -> None:
        if self.on_cuda:
            self.peak = torch.cuda.max_memory_allocated()
            return
        self.done.set()
        self.thread.join()
        self._look()


def flop_counter(trains: bool) -> FlopCounterMode:
    """torch's, with the CPU's attention and oneDNN's linear layers, and with the groups of convolutions backward."""
    aten = torch.ops.aten

    def attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
        return sdpa_flop_count(query, key, value)

    def attention_backward(gradient, query, key, value, *args, out_shape=None, **kwargs) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)

    def linear(inputs, *args, out_shape=None, **kwargs) -> int:
        return 2 * math.prod(out_shape) * inputs[-1]

    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    if torch.backends.mkldnn.is_available():
        mapping[torch.ops.mkldnn._linear_pointwise] = linear
    if trains:
        from training.planning.counting import convolution_backward_flops

        mapping[aten.convolution_backward] = convolution_backward_flops
    return FlopCounterMode(display=False, custom_mapping=mapping)


def timed(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Wall time in seconds, and the output."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    output = run()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, output


def count(way: Way, trained: nn.Module | None, settings: Settings) -> Measurement:
    """FLOPs, memory and what autograd keeps, in a run that is not timed."""
    parameters = {StorageWeakRef(p.untyped_storage()) for p in trained.parameters()} if trained is not None else set()
    kept: dict[StorageWeakRef, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if (key := StorageWeakRef(storage)) not in parameters:
            kept[key] = storage.nbytes()
        return tensor

    # what is compiled would hide its operations
    eager = torch.compiler.set_stance("force_eager") if settings.compile else nullcontext()
    counter = flop_counter(trained is not None)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with eager, hooks, counter, PeakMemory(settings.device) as memory:
        output = way.run()
    flops = counter.get_total_flops()
    if way.less is not None:
        with flop_counter(False) as counter:
            way.less()
        flops -= counter.get_total_flops()
    return Measurement(output, 0.0, 0, flops, sum(kept.values()), memory.peak - memory.before, memory.peak)


def measure(job: Job, with_naive: bool, settings: Settings) -> list[Measurement]:
    """Counts, then times the job's ways in turn, so that what else the machine does meets them alike."""
    ways = [job.fast, job.naive] if with_naive and job.naive is not None else [job.fast]
    trains = job.trained is not None
    with torch.inference_mode(not trains), torch.set_grad_enabled(trains):
        measured = [count(way, job.trained, settings) if job.counted else Measurement(None, 0.0, 0) for way in ways]
        if settings.compile or (settings.device != "cpu" and not job.first):  # what compiles or loads at its first run
            for way in ways:
                way.run()
        times: list[list[float]] = [[] for _ in ways]
        spent = 0.0
        while len(times[0]) < (job.runs or settings.runs) and (not times[0] or spent < settings.seconds):
            for way, own, measurement in zip(ways, times, measured):
                seconds, measurement.output = timed(way.run, settings.device)
                spent += seconds
                if way.less is not None:
                    seconds -= timed(way.less, settings.device)[0]
                own.append(seconds)
    for own, measurement in zip(times, measured):
        measurement.seconds, measurement.runs = min(own) if job.best else statistics.median(own), len(own)
    return measured


def difference(output: torch.Tensor, other: torch.Tensor) -> float:
    """Share of codes or tokens that differ, relative difference of losses, or largest difference of pixels."""
    if not output.is_floating_point():
        return (output != other).float().mean().item()
    largest = (output.float() - other.float()).abs().max()
    return (largest / output.abs() if output.dim() == 0 else largest).item()


def rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else float(f"{value:.{digits}g}")


def make_row(name: str, job: Job, way: str, measured: Measurement, settings: Settings, note: str, peaks: dict) -> dict:
    """All `FIELDS` but those of a comparison.

    Args:
        peaks: FLOP/s as "GEMM" and bytes/s as "bandwidth"; empty while these are measured.
    """
    seconds, least_bytes = measured.seconds, job.least_bytes
    if least_bytes is not None:
        least_bytes += 2 * measured.kept_bytes
    notes = [note, job.describe(measured.output) if job.describe else ""]
    row = dict.fromkeys(FIELDS) | {
        "job": name,
        "detail": job.detail,
        "way": way,
        "batch": job.batch,
        "seconds": rounded(seconds),
        "runs": measured.runs,
        "throughput": rounded(job.amount / seconds),
        "unit": job.unit,
        "flops": measured.flops,
        "least_bytes": least_bytes,
        "memory_mib": rounded(None if measured.memory is None else measured.memory / 2**20),
        "peak_mib": rounded(None if measured.peak is None else measured.peak / 2**20),
        "note": "; ".join(filter(None, notes)),
        "model": settings.name,
        "dtype": settings.dtype,
        "device": settings.device,
        "threads": torch.get_num_threads(),
    }
    if peaks and measured.flops is not None:
        row["of_gemm"] = rounded(measured.flops / seconds / peaks["GEMM"])
    if peaks and least_bytes is not None:
        row["of_bandwidth"] = rounded(least_bytes / seconds / peaks["bandwidth"])
    return row | {key: rounded(value, 6) for key, value in job.quality.items()}


def run_job(settings: Settings, name: str, peaks: dict[str, float]) -> list[dict]:
    """The rows of one job, each printed as soon as it is known; the model is gone with the process."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    note = ""
    with torch.set_grad_enabled(name.startswith("train")):
        if name in WITHOUT_MODEL:
            jobs = WITHOUT_MODEL[name](settings)
        else:
            subject = load_subject(settings)
            jobs, note = JOBS[name](subject, settings), subject.note
        rows = []
        for job in jobs:
            fast, *others = measure(job, settings.naive, settings)
            new = [make_row(name, job, "fast", fast, settings, note, peaks)]
            for slow in others:
                apart = difference(fast.output, slow.output)
                compared = {"ratio": rounded(slow.seconds / fast.seconds), "difference": rounded(apart)}
                compared["equal"] = apart == 0 or (fast.output.is_floating_point() and apart < SAME)
                new.append(make_row(name, job, "naive", slow, settings, note, peaks) | compared)
            for row in new:
                print(json.dumps(row), flush=True)
            rows += new
    return rows


def end_with_parent() -> None:
    """Lets this process end as soon as the one that started it does, however that ends."""

    def watch() -> None:
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def in_own_process(settings: Settings, name: str, peaks: dict[str, float]) -> list[dict]:
    """`run_job` in a fresh process.

    Raises:
        BrokenProcessPool: it was killed, as for memory.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=end_with_parent) as pool:
        return pool.submit(run_job, settings, name, peaks).result()


def show(rows: list[dict]) -> None:
    """A table on standard error, beside the lines of JSON on standard output."""
    from training.plan import markdown_table

    shown = {
        "job": lambda row: f"{row['job']} {row['detail']}".strip() + (", naive" if row["way"] == "naive" else ""),
        "batch": lambda row: str(row["batch"]),
        "seconds": lambda row: f"{row['seconds']:.4g}",
        "throughput": lambda row: f"{row['throughput']:.4g} {row['unit']}",
        "GFLOP": lambda row: f"{row['flops'] / 1e9:,.4g}",
        "least MB": lambda row: f"{row['least_bytes'] / 1e6:,.0f}",
        "of GEMM": lambda row: f"{row['of_gemm']:.1%}",
        "of bandwidth": lambda row: f"{row['of_bandwidth']:.1%}",
        "MiB": lambda row: f"{row['memory_mib']:,.0f}",
        "ratio": lambda row: f"{row['ratio']:.2f}",
        "equal": lambda row: "yes" if row["equal"] else f"{row['difference']:.1g} apart",
    }
    needs = {"GFLOP": "flops", "least MB": "least_bytes", "MiB": "memory_mib"}
    table = markdown_table(*shown)
    for row in rows:
        known = [row[needs.get(column, column.lower().replace(" ", "_"))] is not None for column in shown]
        table.add_row(*[cell(row) if is_known else "" for cell, is_known in zip(shown.values(), known)])
    Console(stderr=True, width=160, highlight=False).print(table)


@one_line_errors()
def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(Settings, argv)
    rows, unfinished = in_own_process(settings, "peaks", {}), []
    gemm, bandwidth = rows
    peaks = {
        "GEMM": gemm["flops"] / gemm["seconds"],
        "bandwidth": bandwidth["least_bytes"] / bandwidth["seconds"],
    }
    for name in settings.jobs:
        try:
            rows += in_own_process(settings, name, peaks)
        except (BrokenProcessPool, torch.OutOfMemoryError) as error:
            unfinished.append(name)
            print(f"{name} was not finished, probably for want of memory: {error}", file=sys.stderr)
    show(rows)
    if settings.output:
        result = {"benchmark": "speed", "settings": asdict(settings), "versions": versions(), "rows": rows}
        write_atomically(settings.output, (json.dumps(result, indent=2) + "\n").encode())
    if unfinished:
        sys.exit(f"not finished: {', '.join(unfinished)}")


if __name__ == "__main__":
    main()
