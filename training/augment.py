"""Differentiable augmentation of the discriminator's images (DiffAugment, https://arxiv.org/abs/2006.10738).

The random numbers are an argument, so that the real and generated images of a step get the same augmentation.
"""

import math

import torch
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur


NUM_DRAWS = 7  # brightness, saturation, contrast, shift (y, x), centre of the cutout (y, x)
TRANSLATION = 0.125  # largest shift, as a share of the side
CUTOUT = 0.2  # side of the blanked square, as a share of the image's side


def draw_augmentation(batch_size: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Sample the random numbers for `diff_augment` on the CPU: (batch_size, 7), uniform in [0, 1)."""
    return torch.rand(batch_size, NUM_DRAWS, generator=generator)


def diff_augment(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Shift each image, change its colours, and blank a square of it, in this order; differentiable.

    Args:
        images: images, (B, 3, H, W) in [-1, 1].
        draws: random numbers from `draw_augmentation`, (B, 7) in [0, 1).

    Returns:
        The augmented images, (B, 3, H, W), not clamped. Pixels that are shifted in are 0 before the change of colours,
        blanked ones are 0 after it.
    """
    return _cutout(_change_colors(_translate(images, draws[:, 3:5]), draws[:, :3]), draws[:, 5:])


def _change_colors(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    brightness, saturation, contrast = draws[:, :, None, None, None].unbind(1)  # (B, 1, 1, 1) each
    images = images + brightness - 0.5
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * 2 * saturation
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (images - mean) * (contrast + 0.5)


def _translate(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    batch, _, *sides = images.shape
    most = [round(TRANSLATION * side) for side in sides]
    padded = F.pad(images, (most[1], most[1], most[0], most[0]))
    rows, columns = (
        torch.arange(side, device=images.device) + (draws[:, i, None] * (2 * most[i] + 1)).long()
        for i, side in enumerate(sides)
    )  # source row and column of each output pixel, (B, H) and (B, W)
    samples = torch.arange(batch, device=images.device)[:, None, None]
    return padded[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _cutout(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    inside = []
    for i, side in enumerate(images.shape[2:]):
        size = round(CUTOUT * side)
        offset = torch.arange(side, device=images.device) - (draws[:, i, None] * side).long() + size // 2
        inside.append((offset >= 0) & (offset < size))
    return images * ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])


def blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blur images with a Gaussian; differentiable.

    Args:
        images: images, (B, 3, H, W).
        sigma: standard deviation in pixels; 0 for no blur.
    """
    if sigma <= 0:
        return images
    size = 2 * math.ceil(4 * sigma) + 1  # cutting off at 3 sigmas would lose 1% of the spread
    for kernel in ((size, 1), (1, size)):  # separable, so the cost is linear in the size
        images = gaussian_blur(images, kernel_size=kernel, sigma=sigma)
    return images
