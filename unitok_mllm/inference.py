"""Inference: load a model, answer, draw, edit, reconstruct.

The command line, the web page, the evaluations and the samples of a training use these functions. Heavy modules are
imported where they are needed, since the command line imports this one.
"""

import io
import json
import math
import os
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .devices import AUTO, find_device


if TYPE_CHECKING:
    import torch
    from PIL import Image

    from .modeling_unitok import UniTokModel
    from .ranking_unitok import UniTokDrawingOutput

MAX_SEQUENCES = 100  # beams or answers that a folder's generation config may ask for
TEMPLATE_SECONDS = 10
SHIPPED_MODEL = Path(__file__).parent / "checkpoints" / "tiny"


def check_model(folder: str | os.PathLike) -> None:
    """Check that a folder holds a model.

    Raises:
        ValueError: it has no config.json. The message says whether its subfolder `release` has one.
    """
    if not Path(folder, "config.json").is_file():
        hint = f"; {folder}/release has one" if Path(folder, "release", "config.json").is_file() else ""
        raise ValueError(f"no model in {folder}: it has no config.json{hint}")


def load(folder: str | os.PathLike, *, tokenizer_only: bool = False, device: str = AUTO) -> tuple[Any, Any]:
    """Load a model and its processor.

    The folder may be hostile: its size is checked before memory is allocated, its weights for finite values, its chat
    template with a time limit.

    Args:
        folder: folder of an MLLM.
        tokenizer_only: load only the visual tokenizer and its image processor, from its own or an MLLM's folder.
        device: see `find_device`.

    Returns:
        The model in eval mode (float32 on a CPU, bfloat16 on a GPU), and its processor.

    Raises:
        ValueError: there is no such model or device, or the model does not load completely.

    Example:
        >>> model, processor = load(SHIPPED_MODEL)
        >>> (picture,) = draw_images(model, processor, ["a red circle"], count=1, seed=0)
        >>> answer_questions(model, processor, [(picture, "what color is the shape?")], max_new_tokens=8)
        ['red']
    """
    folder = Path(folder)
    check_model(folder)
    import torch
    from jinja2 import TemplateError
    from safetensors import SafetensorError
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    from .convert_unitok import CONFIG_ERRORS
    from .modeling_unitok import UniTokModel

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    known = ("unitok", "unitok_mllm") if tokenizer_only else ("unitok_mllm",)
    model_class = UniTokModel if tokenizer_only else AutoModelForImageTextToText
    processor_class = AutoImageProcessor if tokenizer_only else AutoProcessor
    bad_folder = (*CONFIG_ERRORS, OSError, ImportError, AssertionError, MemoryError)
    bad_folder += (SafetensorError, pickle.UnpicklingError, TemplateError)
    place = find_device(device)
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        if model_type not in known:
            raise ValueError(f"its model type is {model_type!r}, this command needs {' or '.join(known)}")
        check_size(folder)
        model, info = model_class.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
        if bad := {key: sorted(names) for key, names in info.items() if names}:
            raise ValueError(f"its weights do not fit its config: {str(bad)[:300]}")
        check_values(model)
        processor = processor_class.from_pretrained(folder)
        if not tokenizer_only:
            check_template(processor)
    except bad_folder as error:
        raise ValueError(f"cannot load the model in {folder}: {error}") from error
    return model.to(place).eval(), processor


def check_size(folder: str | os.PathLike) -> None:
    """Check, before memory is allocated, that a folder has about as many weights as its config asks for.

    The library would first allocate missing or misshapen weights, and only then report them.

    Raises:
        ValueError: the model has many more parameters than the .safetensors files (or numbers than the .bin files have
            bytes), an unknown quantization, or computed tables larger than any model needs.
    """
    import torch
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    from .convert_unitok import MAX_COMPUTED, check_archive
    from .modeling_unitok import UniTokModel
    from .modeling_unitok_mllm import UniTokMLLMForConditionalGeneration

    folder, stored = Path(folder), 0
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    for path in files:
        if path.suffix == ".bin":
            check_archive(path)
            stored += path.stat().st_size
            continue
        try:
            with safe_open(path, "pt") as file:
                stored += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path.name}: {error}") from error
    config = AutoConfig.from_pretrained(folder)
    quantization = vars(config).get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if quantization is not None and str(method) not in {*AUTO_QUANTIZER_MAPPING, "bitsandbytes"}:
        raise ValueError(f"its quantization {quantization!r:.100} is unknown")
    model_class = UniTokModel if config.model_type == "unitok" else UniTokMLLMForConditionalGeneration
    with torch.device("meta"):
        model = model_class._from_config(config)
    needed, computed = model.num_parameters(), sum(map(torch.numel, model.buffers()))
    if files and needed > 4 * stored:  # tied weights are stored once, quantized ones packed
        raise ValueError(f"its config asks for {needed} parameters, its weights hold {stored}")
    if computed > 4 * stored + MAX_COMPUTED:
        raise ValueError(f"its config asks for tables of {computed} numbers besides {needed} parameters")


def check_values(model: Any) -> None:
    """Check a loaded model's weights and generation config.

    Raises:
        ValueError: a weight is NaN or infinite, or the generation config asks for too many sequences, or for options
            that drawing does not have.
    """
    from .drawing_unitok import image_generation

    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise ValueError(f"its weight {name} is not finite")
    if not model.can_generate():
        return
    image_generation(model.generation_config)
    for name in ("num_beams", "num_beam_groups", "num_return_sequences"):
        value = getattr(model.generation_config, name, None)
        if value is not None and not 1 <= value <= MAX_SEQUENCES:
            raise ValueError(f"its generation config has {name} {value}, expected 1 to {MAX_SEQUENCES}")


def check_template(processor: Any) -> None:
    """Check that a folder's chat template, which is a program, works for a question about a picture.

    Raises:
        ValueError: it takes too long.
        TemplateError: it fails, or accesses something forbidden.
    """
    from .time_limit import time_limit

    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    with time_limit(TEMPLATE_SECONDS, f"its chat template takes more than {TEMPLATE_SECONDS} seconds"):
        processor.apply_chat_template(question, add_generation_prompt=True)


def reconstruct_images(
    model: "UniTokModel", processor: Any, images: list["Image.Image"]
) -> tuple[list["Image.Image"], list["Image.Image"], int]:
    """Encode images and decode their codes.

    Returns:
        The images as the model sees them, their reconstructions (both in the model's size), and the number of codes
        of an image.
    """
    import torch

    pixel_values = processor(images=images, mode="understand")["pixel_values"].to(model.device)
    with torch.no_grad():
        codes = model.encode(pixel_values)
        pixels = model.decode(codes, tuple(pixel_values.shape[-2:]))
    return processor.post_process(pixel_values), processor.post_process(pixels), codes[0].numel()


def conversation(question: str, image: "Image.Image") -> list[dict]:
    """Make a conversation of one turn: an image and a question about it."""
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def generate_answers(model: Any, processor: Any, inputs: Any, max_new_tokens: int) -> list[str]:
    """Answer prompts greedily; `inputs` come from the processor. Returns texts without special tokens."""
    outputs = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def answer_questions(
    model: Any, processor: Any, questions: list[tuple["Image.Image", str]], max_new_tokens: int
) -> list[str]:
    """Answer (image, question) pairs greedily, in one batch."""
    chats = [conversation(question, image) for image, question in questions]
    inputs = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True)
    answers = generate_answers(model, processor, inputs.to(model.device), max_new_tokens)
    return [answer.strip() for answer in answers]


def answer_ids(processor: Any, answers: list[str]) -> "torch.Tensor":
    """Encode answers as the chat template continues a question, with the token that ends an answer.

    Returns:
        (C, T), int64, padded on the right with -100.

    Raises:
        ValueError: there are no answers, one is empty, or the template does not continue a question by its answer.
    """
    import torch

    if not answers or not all(answer.strip() for answer in answers):
        raise ValueError(f"expected at least one answer to choose from, and none empty, got {answers}")
    options, rows = {"tokenize": True, "return_dict": True}, []
    question = {"role": "user", "content": "?"}
    (prompt,) = processor.apply_chat_template([question], add_generation_prompt=True, **options)["input_ids"]
    for answer in answers:
        turns = [question, {"role": "assistant", "content": answer}]
        (whole,) = processor.apply_chat_template(turns, **options)["input_ids"]
        if not torch.equal(whole[: len(prompt)], prompt):
            raise ValueError(f"the chat template does not continue a question by the answer {answer!r}")
        rows.append(whole[len(prompt) :])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)


def choose_answers(
    model: Any,
    processor: Any,
    questions: list[tuple["Image.Image", str]],
    choices: list[str],
    by_length: bool = False,
) -> tuple[list[str], "torch.Tensor"]:
    """Choose the likeliest of some answers to each (image, question), in one batch.

    Args:
        model: an MLLM.
        processor: its processor.
        questions: N (image, question) pairs.
        choices: C answers.
        by_length: choose by the mean log-likelihood of a token, so that long answers are not at a disadvantage.

    Returns:
        The answers chosen, and the scores of all, (N, C), float32: log-likelihoods, or their means.

    Raises:
        ValueError: see `answer_ids` and `UniTokScoringMixin.score`.
    """
    chats = [conversation(question, image) for image, question in questions]
    inputs = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True)
    targets = answer_ids(processor, choices).to(model.device)
    scores = model.score(**inputs.to(model.device), target_ids=targets.expand(len(questions), -1, -1))
    values = scores.means if by_length else scores.log_likelihoods
    return [choices[i] for i in values.argmax(dim=1).tolist()], values


def sampling_options(model: Any, **given: Any) -> dict[str, Any]:
    """Return all sampling options of a drawing.

    Args:
        model: an MLLM, whose own options (or else `IMAGE_GENERATION`) fill those not given.
        given: options that override the model's; None means not given.
    """
    from .drawing_unitok import IMAGE_GENERATION, UniTokDrawingOptions, image_generation

    names = ("guidance_scale", "plausibility", "temperature", "top_k", "top_p")
    standard = {name: getattr(UniTokDrawingOptions, name) for name in names}
    own = image_generation(model.generation_config) or IMAGE_GENERATION
    return standard | own | {name: value for name, value in given.items() if value is not None}


def draw_codes(model: Any, processor: Any, prompts: list[str], **options: Any) -> "torch.Tensor | UniTokDrawingOutput":
    """Draw the codes of one image or several for each prompt, in one batch.

    Args:
        model: an MLLM.
        processor: its processor.
        prompts: descriptions.
        options: those of `UniTokGenerationMixin.generate_image_codes`.

    Returns:
        (prompts * num_return_sequences, K, L), int64; with `return_dict_in_generate` a `UniTokDrawingOutput`.
    """
    inputs = processor(text=prompts, generation_mode="image").to(model.device)
    return model.generate(**inputs, generation_mode="image", **options)


def edit_codes(
    model: Any, processor: Any, requests: list[tuple["Image.Image | Path", str]], **options: Any
) -> "torch.Tensor":
    """Draw the codes of an edited image for each (image or its file, instruction); otherwise as `draw_codes`."""
    images, instructions = zip(*requests)
    images = [str(image) if isinstance(image, Path) else image for image in images]
    inputs = processor(images=list(images), text=list(instructions), generation_mode="edit").to(model.device)
    return model.generate(**inputs, generation_mode="image", **options)


def pictures_of(model: Any, processor: Any, codes: "torch.Tensor") -> list["Image.Image"]:
    """Decode codes (N, K, L) to N pictures."""
    import torch

    with torch.no_grad():
        pixels = model.decode_images(codes)
    return processor.post_process_multimodal_output(pixels, generation_mode="image")


def picture_bytes(picture: "Image.Image", format: str = "PNG") -> bytes:
    """Encode a picture in one of Pillow's file formats, at its default quality."""
    file = io.BytesIO()
    picture.save(file, format)
    return file.getvalue()


def draw_images(
    model: Any, processor: Any, prompts: list[str], count: int, progress: bool = True, **options: Any
) -> list["Image.Image"]:
    """Draw `count` pictures for each prompt, next to each other, in one batch; options as in `draw_codes`."""
    codes = draw_codes(model, processor, prompts, num_return_sequences=count, progress=progress, **options)
    return pictures_of(model, processor, codes)


def edit_images(
    model: Any, processor: Any, requests: list[tuple["Image.Image", str]], **options: Any
) -> list["Image.Image"]:
    """Draw an edited picture for each (image, instruction), in one batch; options as in `draw_codes`."""
    return pictures_of(model, processor, edit_codes(model, processor, requests, progress=True, **options))


def has_text_tower(model: Any, processor: Any) -> bool:
    """Return whether the visual tokenizer has a text tower that reads the ids of the MLLM's text tokenizer."""
    text_config, tokenizer = model.visual.config.text_config, processor.tokenizer
    if text_config is None:
        return False
    return text_config.eos_token_id == tokenizer.eos_token_id and len(tokenizer) <= text_config.vocab_size


def text_tower_inputs(model: Any, processor: Any, texts: list[str], truncate: bool = False) -> Any:
    """Return the inputs of `model.visual.get_text_features` for texts.

    Args:
        model: an MLLM with a text tower, see `has_text_tower`.
        processor: its processor.
        texts: N texts. Special tokens in them are read as text.
        truncate: cut texts that are too long.

    Raises:
        ValueError: a text is too long.
    """
    from .ranking_unitok import cut_texts

    config, inputs = model.visual.config.text_config, processor.ranking_inputs(texts)
    limit = config.max_position_embeddings
    for index, count in enumerate(inputs["attention_mask"].sum(dim=1).tolist()):
        if count > limit and not truncate:
            raise ValueError(f"text {index} has {count} tokens; the text tower reads {limit}")
    inputs["input_ids"], inputs["attention_mask"] = cut_texts(config, **inputs)
    return inputs.to(model.visual.device)


def image_psnr(reconstruction: "torch.Tensor", pixels: "torch.Tensor") -> "torch.Tensor":
    """Compute the peak signal-to-noise ratio of each image, in dB; infinite for equal images.

    Args:
        reconstruction: (B, 3, H, W), clamped to [-1, 1] here.
        pixels: (B, 3, H, W) in [-1, 1].

    Returns:
        (B,), float32, or float64 for images in float64.
    """
    import torch

    dtype = torch.promote_types(reconstruction.dtype, torch.float32)
    error = (reconstruction.to(dtype).clamp(-1, 1) - pixels.to(dtype)).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / error)


def psnr(original: "Image.Image", reconstruction: "Image.Image") -> float:
    """Compute the peak signal-to-noise ratio of two RGB pictures of the same size, in dB."""
    import numpy as np
    import torch

    pixels = [torch.from_numpy(np.asarray(one, np.float64) / 127.5 - 1)[None] for one in (reconstruction, original)]
    return image_psnr(*pixels).item()


def picture_area(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the crop box of a picture of `size` (width, height) on the model's padded canvas."""
    scale = min(canvas[0] / size[0], canvas[1] / size[1])
    width, height = (max(1, round(side * scale)) for side in size)
    left, top = (canvas[0] - width) // 2, (canvas[1] - height) // 2
    return left, top, left + width, top + height
