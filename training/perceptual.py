"""Perceptual distance of images: LPIPS (https://arxiv.org/abs/1801.03924), or by the features of any timm backbone."""

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import VGG16_Weights


class FrozenFeatures(nn.Module):
    """Feature maps of a frozen timm backbone at several depths.

    Args:
        name: name of a timm model that has `forward_intermediates`.
        image_size: side of the input images in pixels. For a vision transformer they are resized to the largest
            multiple of its patch size that is not above it (252 for 256 and patches of 14).
        depths: indices of the blocks or stages; None for all.
        pretrained: whether to load pretrained weights from timm's hub.
        checkpoint: file to load the weights from instead (with timm's names, or any that timm converts).

    Attributes:
        channels: number of channels at each depth.
    """

    def __init__(
        self,
        name: str,
        image_size: int,
        depths: tuple[int, ...] | None = None,
        pretrained: bool = True,
        checkpoint: str = "",
    ):
        super().__init__()
        import timm  # slow: keep `--help` quick
        from timm.models.vision_transformer import VisionTransformer

        overlay = {"file": checkpoint} if checkpoint else None
        self.backbone = timm.create_model(
            name, pretrained=pretrained or bool(checkpoint), pretrained_cfg_overlay=overlay, num_classes=0
        )
        self.depths, self.image_size, self.class_token = depths, image_size, False
        if isinstance(self.backbone, VisionTransformer):
            patch = self.backbone.patch_embed.patch_size[0]
            if image_size < patch:
                raise ValueError(f"The image size {image_size} is below the patch size {patch} of {name}.")
            self.image_size = image_size // patch * patch
            self.backbone.set_input_size((self.image_size, self.image_size))
            self.class_token = self.backbone.has_class_token
        config = self.backbone.pretrained_cfg
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()
        with torch.no_grad():
            features = self(torch.zeros(1, 3, image_size, image_size))
        self.channels = [feature.shape[1] for feature in features]

    def train(self, mode: bool = True) -> "FrozenFeatures":
        """Stay in eval mode, whatever the `mode`, since the backbone is frozen."""
        return super().train(False)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Compute the features of images at each depth. The class token, if any, is added to each patch token.

        Args:
            images: images, (B, 3, H, W) in [-1, 1].

        Returns:
            The features at each depth, (B, C, L).
        """
        if images.shape[-1] != self.image_size:
            images = F.interpolate(images, (self.image_size, self.image_size), mode="bilinear", antialias=True)
        images = ((images + 1) / 2 - self.mean) / self.std
        options = {"return_prefix_tokens": True} if self.class_token else {}
        features = self.backbone.forward_intermediates(
            images, indices=self.depths, norm=False, intermediates_only=True, **options
        )
        if self.class_token:
            return [maps.flatten(2) + prefix[:, 0, :, None] for maps, prefix in features]
        return [maps.flatten(2) for maps in features]


class FeatureDistance(nn.Module):
    """LPIPS's distance without its learned weights, on the features of any backbone.

    The features at each depth are normalised to unit length over the channels. Their squared difference is summed over
    channels, averaged over images and positions, and summed over depths.

    Args:
        features: the frozen backbone.
    """

    def __init__(self, features: FrozenFeatures):
        super().__init__()
        self.features = features

    def forward(self, reconstruction: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Compute the mean distance, a scalar, of two batches (B, 3, H, W) in [-1, 1]."""
        with torch.no_grad():
            targets = self.features(pixels)
        pairs = zip(self.features(reconstruction), targets, strict=True)
        return sum((F.normalize(a) - F.normalize(b)).square().sum(dim=1).mean() for a, b in pairs)


class VGGDistance(nn.Module):
    """LPIPS on VGG-16, from the `lpips` package (which contains the learned weights, but not those of VGG).

    Args:
        pretrained: whether to load VGG's ImageNet weights from torchvision's hub.
        checkpoint: file to load them from instead, with torchvision's names.

    Raises:
        ValueError: the file lacks tensors of VGG-16.
    """

    def __init__(self, pretrained: bool = True, checkpoint: str = ""):
        import lpips  # optional, from the extra `train`

        super().__init__()
        self.lpips = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        if pretrained or checkpoint:
            self._load_vgg(checkpoint)
        self.requires_grad_(False)

    def _load_vgg(self, checkpoint: str) -> None:
        if checkpoint:
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        else:
            state = VGG16_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True, weights_only=True)
        names = {name: f"features.{name.partition('.')[2]}" for name in self.lpips.net.state_dict()}
        if missing := sorted(set(names.values()) - state.keys()):
            raise ValueError(f"{checkpoint} is not a VGG-16 of torchvision: it lacks {', '.join(missing)}.")
        self.lpips.net.load_state_dict({ours: state[theirs] for ours, theirs in names.items()})

    def forward(self, reconstruction: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Compute the mean distance, a scalar, of two batches (B, 3, H, W) in [-1, 1]."""
        return self.lpips(reconstruction, pixels).mean()


def perceptual_distance(backbone: str, image_size: int, pretrained: bool = True, checkpoint: str = "") -> nn.Module:
    """Build a perceptual distance of (reconstruction, pixels).

    Args:
        backbone: "lpips", or the name of a timm model, whose features are compared at every depth.
        image_size: side of the images, in pixels.
        pretrained: whether to load pretrained weights of the backbone.
        checkpoint: file to load them from instead of the hub.
    """
    if backbone == "lpips":
        return VGGDistance(pretrained, checkpoint)
    return FeatureDistance(FrozenFeatures(backbone, image_size, pretrained=pretrained, checkpoint=checkpoint))
