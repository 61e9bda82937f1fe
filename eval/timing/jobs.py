"""All jobs by name, and those that do not train: peaks of the machine, coding, drawing, answering, imports."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO

import torch
from PIL import Image, ImageDraw
from torch import nn
from transformers import AutoProcessor, AutoTokenizer

from eval.timing import naive
from eval.timing.bounds import answer_bytes, decode_bytes, draw_bytes, encode_bytes, nbytes, weight_bytes
from eval.timing.measuring import Job, Way
from eval.timing.peers import peer_jobs
from eval.timing.settings import PEERS, Settings
from eval.timing.subjects import Subject, photographs, pixels_of_photographs, random_ids, repeat_to
from eval.timing.training_jobs import train_mllm_jobs, train_tokenizer_jobs
from training.image_text_data import ImageTextTransform
from training.losses import psnr
from unitok_mllm import UniTokImageProcessor, UniTokModel
from unitok_mllm.image_processing_unitok import load_image
from unitok_mllm.inference import SHIPPED_MODEL, answer_questions
from unitok_mllm.packing_unitok import pack_linears


GUIDANCE = 5.0

PROMPT_TOKENS, ANSWER_TOKENS = 32, 32

NOT_AT_IMPORT = ("deepspeed", "diffusers", "lmms_eval", "gradio", "peft", "datasets", "open_clip", "timm", "wandb")


def peaks_jobs(settings: Settings) -> Iterator[Job]:
    """Yield the jobs that measure the machine's peaks: the fastest matrix product and the fastest memory reading."""
    size = 2048 if settings.device == "cpu" else 8192
    matrix = torch.rand(size, size, dtype=getattr(torch, settings.dtype), device=settings.device)
    linear = nn.Linear(size, size, bias=False, device=settings.device, dtype=matrix.dtype)
    product = partial(pack_linears(linear), matrix)  # on a CPU by oneDNN, whose products are the fastest
    options = {"batch": 1, "amount": 1, "runs": 20, "best": True}
    yield Job(Way(product), **options, unit="products", least_bytes=3 * nbytes(matrix), detail="GEMM")
    memory = torch.ones(2**27, device=settings.device)  # 512 MiB, larger than any cache
    yield Job(Way(memory.sum), **options, unit="sums", least_bytes=nbytes(memory), detail="bandwidth")


def coding_jobs(
    tokenizer: UniTokModel,
    name: str,
    inputs: torch.Tensor,
    bytes_of: Callable[[UniTokModel, torch.Tensor, torch.Tensor], int],
    quality: dict[str, float],
    settings: Settings,
) -> Iterator[Job]:
    """Yield the tokenizer's "encode" or "decode", as it is and, if it has such layers, in oneDNN's blocked layout."""
    models = dict.fromkeys((tokenizer, pack_linears(tokenizer)))  # only one entry if no layer can be packed
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
    """Yield the jobs that encode photographs."""
    tokenizer = subject.tokenizer
    pixels = pixels_of_photographs(tokenizer.config.vision_config.image_size).to(settings.device)
    quality = {}
    if settings.dtype != "float32":
        true_codes = tokenizer.encode(pixels)
        tokenizer.to(getattr(torch, settings.dtype))
        quality = {"codes_equal_to_fp32": (tokenizer.encode(pixels) == true_codes).float().mean().item()}
    yield from coding_jobs(tokenizer, "encode", pixels, encode_bytes, quality, settings)


def decode_jobs(subject: Subject, settings: Settings) -> Iterator[Job]:
    """Yield the jobs that decode the codes of photographs."""
    tokenizer = subject.tokenizer
    pixels = pixels_of_photographs(tokenizer.config.vision_config.image_size).to(settings.device)
    all_codes, quality = tokenizer.encode(pixels), {}
    if settings.dtype != "float32":
        true_pixels = tokenizer.decode(all_codes)
        tokenizer.to(getattr(torch, settings.dtype))
        quality = {"psnr_to_fp32": psnr(tokenizer.decode(all_codes), true_pixels).mean().item()}
    if settings.compile:
        tokenizer.decoder.compile()
    yield from coding_jobs(tokenizer, "decode", all_codes, decode_bytes, quality, settings)


def draw_jobs(subject: Subject, settings: Settings, sampled: bool = False) -> Iterator[Job]:
    """Yield the jobs that draw an image from a prompt, greedily or from the 20 likeliest codes."""
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
            counted=settings.device == "cpu",  # operations in a replayed CUDA graph cannot be counted
        )


def answer_jobs(subject: Subject, settings: Settings) -> Iterator[Job]:
    """Yield the jobs that answer a question about a picture."""
    config = subject.mllm.config
    images = pixels_of_photographs(config.visual_config.vision_config.image_size).to(settings.device)
    codes = subject.tokenizer.encode(images)
    mllm = subject.mllm.to(getattr(torch, settings.dtype))
    ends = mllm.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or []
    suppressed = [config.image_token_id, *ends]  # else an answer might end early or contain a placeholder
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


def first_answer_jobs(subject: Subject, settings: Settings) -> Iterator[Job]:
    """Yield the jobs of a loaded model's first answer, and of a later one."""
    mllm, processor = subject.mllm.to(getattr(torch, settings.dtype)), AutoProcessor.from_pretrained(settings.folder)
    picture = Image.new("RGB", (64, 64), "lavender")
    ImageDraw.Draw(picture).ellipse((20, 16, 44, 40), fill="red")

    def ask() -> str:
        return answer_questions(mllm, processor, [(picture, "what color is the shape?")], ANSWER_TOKENS)[0]

    options = {"batch": 1, "amount": 1, "unit": "answers/s", "counted": False, "describe": repr}
    yield Job(Way(ask), **options, detail="first", runs=1, first=True)
    yield Job(Way(ask), **options, detail="later")


def import_in_fresh_process(line: str) -> list[str]:
    """Run a line of Python in a fresh process, and return the heavy libraries that it imports."""
    program = f"import sys; {line}; print(*sorted(set({NOT_AT_IMPORT}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return done.stdout.split()


def import_jobs(settings: Settings) -> Iterator[Job]:
    """Yield the jobs that import the package and, as lower bounds, the libraries that it uses."""
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


def load_jobs(settings: Settings) -> Iterator[Job]:
    """Yield the jobs that turn JPEGs into training samples: decoding, random crop, tensor, in one thread of Pillow."""
    processor = UniTokImageProcessor(size={"height": 256, "width": 256})
    transform = ImageTextTransform(
        processor, AutoTokenizer.from_pretrained(SHIPPED_MODEL), 77, random_crop=True, horizontal_flip=True
    )
    for width, height in ((512, 384), (1024, 768)):
        files = []
        for photograph in photographs():
            file = BytesIO()
            photograph.resize((width, height)).save(file, "JPEG", quality=90)
            files.append(file.getvalue())

        def load(files=files) -> torch.Tensor:
            generator = torch.Generator().manual_seed(0)
            samples = [transform(load_image(file), "a photograph", generator) for file in files]
            return torch.stack([sample["pixel_values"] for sample in samples])

        detail = f"JPEG of {width} x {height}, {sum(map(len, files)) / len(files) / 1000:.0f} kB"
        yield Job(Way(load), 1, len(files), "images/s", detail=detail, counted=False)


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

WITHOUT_MODEL = {
    **{"peaks": peaks_jobs, "load": load_jobs, "import": import_jobs},
    **{f"draw_{name}": partial(peer_jobs, name, GUIDANCE) for name in PEERS},
}
