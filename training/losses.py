"""The losses of the tokenizer's training (UniTok, https://arxiv.org/abs/2502.20321, section 3.1).

Each function returns a scalar, or `(total, {name: value})` with the unweighted terms under their names in the logs.
All losses are float32 means over the images of a process. DistributedDataParallel averages their gradients over
processes, which gives the gradient of the whole batch's loss.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from training.arguments import BELOW_ONE, check_arguments
from training.augment import diff_augment
from unitok_mllm.configuration_unitok import SHARE, WEIGHT
from unitok_mllm.inference import image_psnr
from unitok_mllm.modeling_unitok import UniTokOutput
from unitok_mllm.quantization_unitok import num_processes


TERMS = ("l1", "l2", "perceptual", "vq", "entropy", "contrastive", "consistency", "gan")
DISCRIMINATOR_TERMS = ("discriminator", "discriminator_consistency")
RECONSTRUCTION_TERMS = ("l1", "l2", "perceptual")
MOST_PSNR = 100.0  # dB; an image of 256x256 with one value wrong by one level has 101 dB


@dataclass
class LossArguments:
    """The weight and start of each term, and the networks that some terms need.

    Starts and warm-ups are shares of the training's steps. The fields' help texts explain them.

    Raises:
        ValueError: a value is outside its range, all weights are 0, a term lacks another term that it needs, or a
            checkpoint is given for a term without a weight.
    """

    l1_weight: float = field(default=0.2, metadata={"help": "weight of the mean absolute error"})
    l1_start: float = field(default=0.0, metadata={"help": "share of the training after which l1 is switched on"})
    l2_weight: float = field(default=1.0, metadata={"help": "weight of the mean squared error"})
    l2_start: float = field(default=0.0, metadata={"help": "share of the training after which l2 is switched on"})
    perceptual_weight: float = field(default=0.0, metadata={"help": "weight of the perceptual distance"})
    perceptual_start: float = field(
        default=0.0, metadata={"help": "share of the training after which perceptual is switched on"}
    )
    vq_weight: float = field(default=1.0, metadata={"help": "weight of the quantizer's loss"})
    vq_start: float = field(default=0.0, metadata={"help": "share of the training after which vq is switched on"})
    entropy_weight: float = field(default=0.0, metadata={"help": "weight of the quantizer's entropy loss"})
    entropy_start: float = field(
        default=0.0, metadata={"help": "share of the training after which entropy is switched on"}
    )
    contrastive_weight: float = field(
        default=1.0, metadata={"help": "weight of CLIP's loss between images and captions"}
    )
    contrastive_start: float = field(
        default=0.0, metadata={"help": "share of the training after which contrastive is switched on"}
    )
    consistency_weight: float = field(
        default=0.0,
        metadata={"help": "weight of the distance between the image embeddings of reconstruction and original"},
    )
    consistency_start: float = field(
        default=0.0, metadata={"help": "share of the training after which consistency is switched on"}
    )
    gan_weight: float = field(
        default=0.0, metadata={"help": "weight of the hinge GAN loss, which the adaptive weight multiplies"}
    )
    gan_start: float = field(
        default=0.375, metadata={"help": "share of the training after which the discriminator is switched on"}
    )
    gan_warmup: float = field(
        default=0.03,
        metadata={"help": "share of the training in which the GAN's weight grows; the blur fades in twice that"},
    )
    gan_blur: float = field(
        default=9.58, metadata={"help": "sigma of the discriminator's blur at the start, in pixels of a 256x256 image"}
    )
    gan_consistency_weight: float = field(
        default=4.0, metadata={"help": "weight of the balanced consistency regularisation"}
    )
    perceptual_backbone: str = field(
        default="lpips", metadata={"help": "backbone of the perceptual distance: lpips, or a timm model"}
    )
    perceptual_pretrained: bool = field(default=True, metadata={"help": "load pretrained weights of the backbone"})
    perceptual_checkpoint: str = field(default="", metadata={"help": "file of these weights; empty for the hub's"})
    discriminator_backbone: str = field(
        default="vit_small_patch14_dinov2.lvd142m", metadata={"help": "backbone of the discriminator: a timm model"}
    )
    discriminator_depths: list[int] = field(
        default_factory=lambda: [0, 2, 5, 8, 11],
        metadata={"help": "blocks of the backbone whose outputs get a discriminator head"},
    )
    discriminator_pretrained: bool = field(default=True, metadata={"help": "load pretrained weights of the backbone"})
    discriminator_checkpoint: str = field(default="", metadata={"help": "file of these weights; empty for the hub's"})

    def __post_init__(self):
        ranges = {f"{name}_weight": WEIGHT for name in (*TERMS, "gan_consistency")}
        ranges |= {f"{name}_start": BELOW_ONE for name in TERMS}
        check_arguments(self, **ranges, gan_warmup=SHARE, gan_blur=(0, 128), discriminator_depths=(0, 1000))
        depths = self.discriminator_depths
        if not depths or len(set(depths)) < len(depths):
            raise ValueError(f"discriminator_depths must be at least one depth, and all different, got {depths}.")
        if not any(vars(self)[f"{name}_weight"] for name in TERMS):
            raise ValueError("All weights of the loss are 0.")
        if self.gan_weight and not any(vars(self)[f"{name}_weight"] for name in RECONSTRUCTION_TERMS):
            raise ValueError(
                f"gan_weight is {self.gan_weight}, but {', '.join(RECONSTRUCTION_TERMS)}, whose gradient balances it, "
                "have no weight."
            )
        if self.consistency_weight and not (
            self.contrastive_weight and self.contrastive_start <= self.consistency_start
        ):
            raise ValueError(
                f"consistency_weight is {self.consistency_weight} from {self.consistency_start} on, contrastive_weight "
                f"{self.contrastive_weight} from {self.contrastive_start} on: without the contrastive term all "
                "image embeddings may collapse to one."
            )
        for network, name in (("perceptual", "perceptual"), ("discriminator", "gan")):
            checkpoint = vars(self)[f"{network}_checkpoint"]
            if checkpoint and not vars(self)[f"{name}_weight"]:
                raise ValueError(f"{network}_checkpoint is {checkpoint}, but {name}_weight is 0.")

    def gan_progress(self, progress: float) -> float:
        """Return the progress of the GAN's warm-up, from 0 to 1.

        Args:
            progress: finished share of the training, in [0, 1].
        """
        if not self.gan_warmup:
            return float(progress >= self.gan_start)
        return min(1.0, max(0.0, (progress - self.gan_start) / self.gan_warmup))

    def blur_sigma(self, progress: float, image_size: int) -> float:
        """Return the sigma of the blur before the discriminator, in pixels.

        Args:
            progress: finished share of the training, in [0, 1].
            image_size: side of the images, in pixels.
        """
        if not self.gan_warmup:
            return 0.0
        faded = max(0.0, progress - self.gan_start) / (2 * self.gan_warmup)
        return self.gan_blur * image_size / 256 * max(0.0, 1 - faded)

    def weights(self, progress: float) -> dict[str, float]:
        """Return the current weight of each term, which is 0 before the term's start.

        Args:
            progress: finished share of the training, in [0, 1].
        """
        weights = {name: vars(self)[f"{name}_weight"] * (progress >= vars(self)[f"{name}_start"]) for name in TERMS}
        return weights | {"gan": weights["gan"] * self.gan_progress(progress)}


def psnr(reconstruction: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Compute the peak signal-to-noise ratio of each image, in dB, at most `MOST_PSNR`.

    Args:
        reconstruction: reconstructions, (B, 3, H, W); this function clamps them to [-1, 1].
        pixels: originals, (B, 3, H, W) in [-1, 1].

    Returns:
        The PSNR of each image, (B,), float32, or float64 for images in float64.
    """
    return image_psnr(reconstruction, pixels).clamp_max(MOST_PSNR)


class GatherRows(torch.autograd.Function):
    """Gather the rows of all processes, in order: (N, D) -> (processes * N, D).

    The gradient of a row is the sum of its gradients on all processes.
    """

    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> torch.Tensor:
        gathered = rows.new_empty(num_processes() * len(rows), rows.shape[1])
        dist.all_gather_single(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(num_processes())[dist.get_rank()]


class NearestRowLoss(torch.autograd.Function):
    """Mean cross-entropy of matching each row among all rows by scaled similarity.

    It equals `F.cross_entropy(scale * rows @ all_rows.T, first + arange(B))`. The forward pass computes the gradients
    together with the loss, chunk by chunk, and the backward pass only scales them. No (B, N) matrix is kept.
    """

    MAX_SIMILARITIES = 2**22  # of a chunk: 16 MiB in float32

    @staticmethod
    def forward(ctx, rows: torch.Tensor, all_rows: torch.Tensor, scale: torch.Tensor, first: int) -> torch.Tensor:
        """Compute the loss, a scalar, from rows (B, D), all rows (N, D), and the first row's index among all rows."""
        total, scale_gradient = rows.new_zeros(()), rows.new_zeros(())
        row_gradients, all_gradients = torch.empty_like(rows), torch.zeros_like(all_rows)
        step = max(1, NearestRowLoss.MAX_SIMILARITIES // len(all_rows))
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            similarities = part @ all_rows.T
            log_probs = F.log_softmax(scale * similarities, dim=1)
            own = torch.arange(first + start, first + start + len(part), device=rows.device)[:, None]
            total -= log_probs.gather(1, own).sum()
            gradients = log_probs.exp_().scatter_add_(1, own, torch.full_like(own, -1, dtype=rows.dtype))
            scale_gradient += (gradients * similarities).sum()
            row_gradients[start : start + len(part)] = scale * (gradients @ all_rows)
            all_gradients += scale * (gradients.T @ part)
        ctx.save_for_backward(*(value / len(rows) for value in (row_gradients, all_gradients, scale_gradient)))
        return total / len(rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        return *(gradient * value for value in ctx.saved_tensors), None


def contrastive_loss(image_embeds: torch.Tensor, text_embeds: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    """Compute CLIP's symmetric InfoNCE (https://arxiv.org/abs/2103.00020) over the batches of all processes.

    Each process compares its own rows with those of all processes. Gradients flow back to the process of each row.
    Values and gradients equal those of open_clip's `ClipLoss` with `local_loss` and `gather_with_grad`, up to
    rounding. Similarities are computed in chunks, so memory is linear in the number of rows, not quadratic.

    Args:
        image_embeds: image embeddings of unit length, (B, D); the same B on every process.
        text_embeds: text embeddings of unit length, (B, D); row i belongs to row i of `image_embeds`.
        logit_scale: factor of the similarities, a scalar or (1,).

    Returns:
        The mean over this process's rows, a float32 scalar.
    """
    images, texts = image_embeds.float(), text_embeds.float()
    all_images, all_texts, first = images, texts, 0
    if num_processes() > 1:
        all_images, all_texts = GatherRows.apply(images), GatherRows.apply(texts)
        first = len(images) * dist.get_rank()
    scale = logit_scale.float().reshape(())
    pairs = (images, all_texts), (texts, all_images)
    return sum(NearestRowLoss.apply(rows, all_rows, scale, first) for rows, all_rows in pairs) / 2


def consistency_loss(reconstruction_embeds: torch.Tensor, image_embeds: torch.Tensor) -> torch.Tensor:
    """Compute the mean of 1 - cosine similarity between embeddings of reconstructions and originals.

    Args:
        reconstruction_embeds: embeddings of reconstructions, (B, D), of unit length.
        image_embeds: embeddings of originals, (B, D), of unit length; they get no gradient.
    """
    return 1 - (reconstruction_embeds.float() * image_embeds.detach().float()).sum(dim=-1).mean()


def tokenizer_losses(
    output: UniTokOutput,
    pixel_values: torch.Tensor,
    weights: dict[str, float],
    perceptual: nn.Module | None = None,
    contrastive: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute every term except the GAN's.

    A term whose inputs are in the output is computed even if its weight is 0, so that each parameter gets a gradient
    in every step. The perceptual term has no trained parameters, and is computed only from its start on.

    Args:
        output: output of the tokenizer.
        pixel_values: originals, (B, 3, H, W) in [-1, 1].
        weights: weight of each term, see `LossArguments.weights`.
        perceptual: distance of (reconstruction, pixels), see `perceptual_distance`.
        contrastive: contrastive loss to use; None to compute it from the embeddings in the output.

    Returns:
        The weighted sum, and the unweighted terms by name.
    """
    reconstruction, pixels = output.reconstruction.float(), pixel_values.float()
    losses = {
        "l1": F.l1_loss(reconstruction, pixels),
        "l2": F.mse_loss(reconstruction, pixels),
        "vq": output.vq_loss,
    }
    if weights["perceptual"]:
        with torch.autocast(pixels.device.type, enabled=False):
            losses["perceptual"] = perceptual(reconstruction, pixels)
    if output.entropy_loss is not None:
        losses["entropy"] = output.entropy_loss
    if contrastive is not None:
        losses["contrastive"] = contrastive
    elif output.text_embeds is not None:
        losses["contrastive"] = contrastive_loss(output.image_embeds, output.text_embeds, output.logit_scale)
    if output.reconstruction_embeds is not None:
        losses["consistency"] = consistency_loss(output.reconstruction_embeds, output.image_embeds)
    return sum(weights[name] * value for name, value in losses.items()), losses


def adaptive_gan_weight(
    reconstruction_gradient: torch.Tensor, gan_gradient: torch.Tensor, last_inputs: torch.Tensor, last_layer: nn.Conv2d
) -> torch.Tensor:
    """Compute VQGAN's adaptive weight of the GAN loss, over the batches of all processes.

    It is the ratio of two gradient norms at the weight of the decoder's last layer: that of the reconstruction losses
    over that of the GAN loss (https://arxiv.org/abs/2012.09841, section 3.1). Both are computed from the gradients at
    the layer's outputs, so that any sharding of the weight works.

    Args:
        reconstruction_gradient: gradient of the reconstruction losses at the layer's outputs, (B, 3, H, W).
        gan_gradient: gradient of the GAN loss at the layer's outputs, (B, 3, H, W).
        last_inputs: inputs of the layer, (B, C, H, W).
        last_layer: the last convolution of the decoder.

    Returns:
        A scalar without gradient, in [0.015, 1e4].
    """
    shape = last_layer.out_channels, last_layer.in_channels, *last_layer.kernel_size
    with torch.autocast(last_inputs.device.type, enabled=False):
        gradients = torch.stack(
            [
                torch.nn.grad.conv2d_weight(
                    last_inputs.detach().float(), shape, gradient.float(), padding=last_layer.padding
                )
                for gradient in (reconstruction_gradient, gan_gradient)
            ]
        )
    if num_processes() > 1:
        dist.all_reduce(gradients)
        gradients /= num_processes()
    reconstruction_norm, gan_norm = gradients.flatten(1).norm(dim=1)
    return (reconstruction_norm / (gan_norm + 1e-6)).clamp(0.015, 1e4)


def discriminator_losses(
    discriminator: nn.Module,
    real: torch.Tensor,
    fake: torch.Tensor,
    draws: torch.Tensor,
    consistency_weight: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute the hinge loss on augmented images, and balanced consistency regularisation.

    See https://arxiv.org/abs/2002.04724 for the latter.

    Args:
        discriminator: network that maps images to logits (B, N).
        real: originals, (B, 3, H, W) in [-1, 1], without gradient.
        fake: reconstructions, (B, 3, H, W) in [-1, 1], without gradient.
        draws: random numbers of the augmentation, (B, 7), the same for real and fake.
        consistency_weight: weight of the mean squared change of the logits under the augmentation.

    Returns:
        The weighted sum, and the unweighted terms by name.
    """
    augmented = [diff_augment(images, draws) for images in (real, fake)]
    real_plain, fake_plain, real_logits, fake_logits = (
        discriminator(torch.cat([real, fake, *augmented])).float().chunk(4)
    )
    hinge = F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()
    consistency = F.mse_loss(real_logits, real_plain) + F.mse_loss(fake_logits, fake_plain)
    return hinge + consistency_weight * consistency, dict(zip(DISCRIMINATOR_TERMS, (hinge, consistency)))
