"""The discriminator of the tokenizer's training: small heads on frozen features of DINOv2, one for each depth.

It follows StyleGAN-T (https://arxiv.org/abs/2301.09515, section 3.2), with GroupNorm instead of batch normalisation.
"""

import math

import torch
from torch import nn

from training.perceptual import FrozenFeatures


class ConvBlock(nn.Sequential):
    """1-D convolution over the positions (circular padding), GroupNorm, leaky ReLU."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__(
            nn.Conv1d(channels, channels, kernel_size, padding=kernel_size // 2, padding_mode="circular"),
            nn.GroupNorm(math.gcd(32, channels), channels),
            nn.LeakyReLU(0.2),
        )


class ResidualBlock(ConvBlock):
    """The sum of the block and its input, scaled to keep the variance."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return (hidden_states + super().forward(hidden_states)) / math.sqrt(2)


class FeatureDiscriminator(nn.Module):
    """Classifier of real images and reconstructions, with logits for each position at each depth of a frozen backbone.

    Args:
        features: frozen backbone; only the heads are trained.
    """

    def __init__(self, features: FrozenFeatures):
        super().__init__()
        self.features = features
        self.heads = nn.ModuleList(
            nn.Sequential(ConvBlock(channels, 1), ResidualBlock(channels, 9), nn.Conv1d(channels, 1, 1))
            for channels in features.channels
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compute logits, which are above 0 for real images.

        Args:
            images: images, (B, 3, H, W) in [-1, 1].

        Returns:
            The logits, (B, N), where N counts the positions of all depths.
        """
        features = self.features(images)
        return torch.cat([head(feature) for head, feature in zip(self.heads, features, strict=True)], dim=2).flatten(1)
