"""Evaluation of a tokenizer while it is trained: PSNR, L1 and code usage of its reconstructions, over all processes."""

import math
from collections.abc import Iterable

import torch
from accelerate.utils import gather_object

from training.losses import psnr
from training.sharding import TrainedNetwork


@torch.no_grad()
def evaluate_reconstructions(network: TrainedNetwork, batches: Iterable[torch.Tensor]) -> dict[str, float]:
    """Evaluate a tokenizer's reconstructions; every process must call it.

    Args:
        network: the tokenizer, in eval mode.
        batches: pixels (B, 3, H, W) in [-1, 1] of this process's share of the images. Processes may have different
            numbers of batches.

    Returns:
        `eval_psnr` (dB) and `eval_l1`, the means over all images, whatever the batch size and the number of processes;
        and `eval_codebook_usage`, the percentage of all codes that occur in any of the images.

    Raises:
        ValueError: there are no images.
    """
    accelerator = network.accelerator
    counts = torch.zeros_like(network.module.vision_model.quantizer.usage, dtype=torch.int64)  # (K, V)
    decibels, errors = [], []
    for pixels in batches:
        reconstruction, codes = _reconstruct(network, pixels)
        decibels += psnr(reconstruction, pixels).tolist()
        errors += (reconstruction - pixels).abs().mean(dim=(1, 2, 3)).tolist()
        chosen = codes.transpose(0, 1).flatten(1)  # (K, B * L)
        counts.scatter_add_(1, chosen, torch.ones_like(chosen))
    _join_other_passes(network)
    counts = accelerator.reduce(counts, "sum")
    columns = gather_object([[math.fsum(decibels), math.fsum(errors), len(errors)]])
    decibels, errors, images = (math.fsum(column) for column in zip(*columns))
    if not images:
        raise ValueError("The evaluation set has no images.")
    return {
        "eval_psnr": decibels / images,
        "eval_l1": errors / images,
        "eval_codebook_usage": 100 * (counts > 0).double().mean().item(),
    }


def _reconstruct(network: TrainedNetwork, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute reconstructions (B, 3, H, W), float32 in [-1, 1], and codes (B, K, L)."""
    if network.is_sharded:
        _makes_any_pass(network, 1)
    output = network.inference(pixels)
    return output.reconstruction.float().clamp(-1, 1), output.codes


def _makes_any_pass(network: TrainedNetwork, own: int) -> bool:
    """Return whether any process runs a pass now. Every process must call it before each of its passes."""
    accelerator = network.accelerator
    return accelerator.reduce(torch.tensor(own, device=accelerator.device), "sum").item() > 0


def _join_other_passes(network: TrainedNetwork) -> None:
    """Take part in other processes' passes, which need this process's shard of the weights, until all are done."""
    if not network.is_sharded:
        return
    size = network.module.config.vision_config.image_size
    while _makes_any_pass(network, 0):
        network.inference(torch.zeros(1, 3, size, size, device=network.accelerator.device))
