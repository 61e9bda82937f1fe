"""Metrics of `eval.claims`: PSNR, zero-shot accuracy and code usage of a tokenizer on held-out images."""

import json
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoTokenizer

from eval.claims_plan import CAPTIONS, RECONSTRUCTION, ClaimsArguments
from eval.easy_vqa import PAIRS
from training.image_text_data import ImageFiles, ImageTextTransform
from training.losses import psnr
from training.tokenizer_trainer import HISTORY
from training.train_tokenizer import TokenizerArguments
from unitok_mllm import UniTokConfig, UniTokImageProcessor, UniTokModel


CLASSES = [f"a {color} {shape}" for color, shape in PAIRS]


def zero_shot(image_embeds: torch.Tensor, class_embeds: torch.Tensor, captions: list[str]) -> dict | None:
    """Compute zero-shot accuracy, in [0, 1], over the images whose caption is one of CLASSES.

    Args:
        image_embeds: embeddings of the images, (N, D), of unit length.
        class_embeds: embeddings of CLASSES, (24, D), of unit length.
        captions: captions of the images.

    Returns:
        The accuracy; None if no caption is one of CLASSES.
    """
    rows = [i for i, caption in enumerate(captions) if caption in CLASSES]
    if not rows:
        return None
    guesses = (image_embeds[rows] @ class_embeds.T).argmax(dim=1).tolist()
    right = sum(CLASSES[guess] == captions[i] for guess, i in zip(guesses, rows))
    return {"images": len(rows), "right": right, "accuracy": right / len(rows)}


@torch.no_grad()
def measure(
    folder: Path, sets: dict[str, str], limit: int, batch_size: int, device: torch.device, supervision: str
) -> dict:
    """Measure a trained tokenizer on held-out images.

    Args:
        folder: folder of the tokenizer, its image processor and text tokenizer.
        sets: paths of captioned images by name.
        limit: number of images of each set, the first ones; 0 for all.
        batch_size: images per batch.
        device: device to run on.
        supervision: what the tokenizer was trained for, see `Run`; only that is measured.

    Returns:
        The number of `parameters`; and for each set the number of `images`, the percentage of all codes that occur in
        them, the mean `psnr_db`, and `zero_shot`.

    Raises:
        ValueError: an image cannot be read; the message names it.
    """
    model = UniTokModel.from_pretrained(folder).to(device).eval()
    image_processor = AutoImageProcessor.from_pretrained(folder)
    length = model.config.text_config.max_position_embeddings
    encode = ImageTextTransform(image_processor, AutoTokenizer.from_pretrained(folder), length).encode
    class_embeds = model.get_text_features(
        torch.stack([encode(name) for name in CLASSES]).to(device)
    ).pooler_output.cpu()
    results = {}
    for name, path in sets.items():
        pixel_values, captions = load_set(path, limit, image_processor.to_json_string())
        parts = []
        for pixels in tqdm(pixel_values.split(batch_size), desc=name):
            pixels = pixels.to(device)
            output = model(pixels)
            decibels = psnr(output.reconstruction, pixels)
            parts.append([tensor.cpu() for tensor in (decibels, output.codes, output.image_embeds)])
        decibels, codes, embeds = (torch.cat(column) for column in zip(*parts))
        used = sum(len(of_one.unique()) for of_one in codes.unbind(dim=1))
        results[name] = {
            "images": len(captions),
            "codes_used_percent": 100 * used / model.vision_model.quantizer.usage.numel(),
            "psnr_db": None if supervision == CAPTIONS else decibels.mean().item(),
            "zero_shot": None if supervision == RECONSTRUCTION else zero_shot(embeds, class_embeds, captions),
        }
    return {"parameters": model.num_parameters(), "sets": results}


@lru_cache
def load_set(path: str, limit: int, processor: str) -> tuple[torch.Tensor, list[str | None]]:
    """Load pixels (N, 3, H, W) in [-1, 1] and captions of the first `limit` images (0 for all); cached.

    Args:
        path: path of the captioned images.
        limit: number of images.
        processor: the image processor as JSON, so that it can be a key of the cache.

    Raises:
        ValueError: an image cannot be read; the message names it.
    """
    source, image_processor = ImageFiles(path), UniTokImageProcessor.from_dict(json.loads(processor))
    rows = tqdm(range(min(len(source), limit or len(source))), desc=path)
    images, captions = zip(*(load_named(source, row) for row in rows))
    pixels = [image_processor(image)["pixel_values"] for image in images]
    return torch.cat(pixels), list(captions)


def load_named(source: ImageFiles, row: int) -> tuple[Image.Image, str | None]:
    """Load an image and its caption.

    Raises:
        ValueError: the image cannot be read; the message names it.
    """
    try:
        return source.load(row)
    except ValueError as error:
        raise ValueError(f"{source.name(row)}: {error}") from error


def baselines(claims: ClaimsArguments, tokenizer: TokenizerArguments) -> dict[str, dict[str, float]]:
    """Compute the PSNR (dB) of two reconstructions that need no tokenizer, on each held-out set.

    Returns:
        The mean PSNR of each set, by name, for "mean colour" (each image painted in its own mean colour) and "mean
        image" (the mean of all training images instead of each image).

    Raises:
        ValueError: an image cannot be read; the message names it.
    """
    config = UniTokConfig.preset(tokenizer.preset, tokenizer.text_overrides, **tokenizer.vision_overrides)
    size = config.vision_config.image_size
    processor = UniTokImageProcessor(mode=tokenizer.image_mode, size={"height": size, "width": size}).to_json_string()
    sources = [source for source in tokenizer.datasets for _ in range(source.get("repeat", 1))]
    mean_image = torch.cat([load_set(source["path"], 0, processor)[0] for source in sources]).mean(dim=0)
    results = {"mean colour": {}, "mean image": {}}
    for name, path in claims.held_out.items():
        pixels, _ = load_set(path, claims.limit, processor)
        results["mean colour"][name] = (
            psnr(pixels.mean(dim=(2, 3), keepdim=True).expand_as(pixels), pixels).mean().item()
        )
        results["mean image"][name] = psnr(mean_image.expand_as(pixels), pixels).mean().item()
    return results


def validation_curve(folder: Path) -> list[dict[str, float]]:
    """Return the trainer's validation measurements in order: `step`, `psnr_db`, `codes_used_percent`."""
    lines = map(json.loads, (folder / HISTORY).read_text("utf-8").splitlines())
    by_step = {  # a step that was repeated after resuming counts once
        line["step"]: {
            "step": line["step"],
            "psnr_db": line["eval_psnr"],
            "codes_used_percent": line["eval_codebook_usage"],
        }
        for line in lines
        if "eval_psnr" in line
    }
    return [by_step[step] for step in sorted(by_step)]
