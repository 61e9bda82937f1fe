"""The losses of the tokenizer's training; each returns, or is returned under, its own name."""

import torch
from torch.nn import functional as F

from unitok_mllm.modeling_unitok import UniTokOutput


def contrastive_loss(image_embeds: torch.Tensor, text_embeds: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric InfoNCE over a batch, https://arxiv.org/abs/2103.00020.

    Args:
        image_embeds, text_embeds: (B, D), of unit length, row i of one belonging to row i of the other.
        logit_scale: scalar, what the similarities are multiplied by.
    """
    logits = logit_scale.float() * image_embeds.float() @ text_embeds.float().T
    targets = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def tokenizer_losses(output: UniTokOutput, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every unweighted loss that the output allows for, under the names that the weights go by."""
    reconstruction, pixels = output.reconstruction.float(), pixel_values.float()
    losses = {
        "l1": F.l1_loss(reconstruction, pixels),
        "l2": F.mse_loss(reconstruction, pixels),
        "vq": output.vq_loss,
    }
    if output.entropy_loss is not None:
        losses["entropy"] = output.entropy_loss
    if output.text_embeds is not None:
        losses["contrastive"] = contrastive_loss(output.image_embeds, output.text_embeds, output.logit_scale)
    return losses


def weighted_total(losses: dict[str, torch.Tensor], weights: dict[str, float]) -> torch.Tensor:
    """The sum of the losses, each times the weight of its name."""
    return sum(weights[name] * value for name, value in losses.items())


def psnr(reconstruction: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image in dB; both (B, 3, H, W) in [-1, 1] -> (B,), float32."""
    error = (reconstruction.float().clamp(-1, 1) - pixels.float()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / error)
