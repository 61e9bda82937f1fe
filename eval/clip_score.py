"""CLIP score of pictures (https://arxiv.org/abs/2104.08718), in the scale that is usual for text to image."""

from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoProcessor, CLIPModel

from eval._common import check_kind
from unitok_mllm.image_processing_unitok import load_image


def load_clip(model: str, device: str | torch.device = "cpu") -> tuple[CLIPModel, AutoProcessor]:
    """Load a CLIP model in float32 and its processor, from a folder or by its name on the hub.

    Raises:
        ValueError: there is none, or the model is of another kind.
    """
    try:
        check_kind(model, "clip")
        clip, processor = CLIPModel.from_pretrained(model, dtype=torch.float32), AutoProcessor.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load a CLIP model from {model}: {error}") from error
    return clip.to(device).eval(), processor


@torch.no_grad()
def clip_scores(
    pictures: list[Path], texts: list[str], model: str, batch_size: int = 64, device: str | torch.device = "cpu"
) -> list[float]:
    """Compute 100 * max(cos(picture, text), 0) for each pair. Texts are truncated to CLIP's length.

    torchmetrics' `clip_score` is not used, since it returns only one number for all pairs: the maximum of 0 and their
    mean.

    Args:
        pictures: paths of the pictures.
        texts: text of each picture.
        model: folder or hub name of a CLIP model, such as openai/clip-vit-large-patch14.
        batch_size: pairs per batch.
        device: device to run on.

    Raises:
        ValueError: there is no such model, or a picture is missing or broken; the message names it.
    """
    clip, processor = load_clip(model, device)
    options = {
        "return_tensors": "pt",
        "padding": True,
        "truncation": True,
        "max_length": clip.config.text_config.max_position_embeddings,
    }
    scores = []
    with tqdm(total=len(pictures), desc="CLIP score", unit="picture") as bar:
        for start in range(0, len(pictures), batch_size):
            rows = slice(start, start + batch_size)
            images = [load_image(path) for path in pictures[rows]]
            output = clip(**processor(images=images, text=texts[rows], **options).to(device))
            cosines = (output.image_embeds * output.text_embeds).sum(dim=-1)  # both have norm 1
            scores += (100 * cosines.clamp_min(0)).tolist()
            bar.update(len(images))
    return scores
