"""Multi-codebook quantization (UniTok, https://arxiv.org/abs/2502.20321, section 3.2).

A token of `dim` dims is cut into K chunks. Each chunk is replaced by the nearest entry, by cosine similarity, of its
own sub-codebook of V entries. The search, the losses and the usage statistics are computed in float32 whatever the
model's dtype.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from transformers.utils import ModelOutput


def num_processes() -> int:
    """Return the number of processes in the process group, or 1 if there is no group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def loads_weights(method: Callable) -> Callable:
    """Decorate a method that reads its module's own weights, so that it works with accelerate's CPU and disk offload.

    accelerate's hook brings offloaded weights in for `forward` only; the decorated method calls the same hook.
    """

    @functools.wraps(method)
    def loaded(self, *args, **kwargs):
        hook = getattr(self, "_hf_hook", None)
        if hook is None:
            return method(self, *args, **kwargs)
        args, kwargs = hook.pre_forward(self, *args, **kwargs)
        return hook.post_forward(self, method(self, *args, **kwargs))

    return loaded


def scattered(shape: tuple[int, ...], device: torch.device | None = None) -> torch.Tensor:
    """Return pseudo-random numbers in [-1, 1], the same at each call: a buffer must not be random before it is loaded."""
    return torch.arange(math.prod(shape), dtype=torch.float32, device=device).cos().view(shape)


@dataclass
class UniTokQuantizerOutput(ModelOutput):
    """Output of `UniTokMultiCodebookQuantizer.forward`.

    Attributes:
        features: (B, L, dim), the chosen code vectors, concatenated. The gradient passes to the input unchanged
            (straight-through), or rotated with `rotation_trick`.
        codes: (B, K, L), int64, in [0, V).
        vq_loss: scalar, float32: codebook term plus beta times the commitment term, averaged over sub-codebooks.
        entropy_loss: scalar, float32; None without `with_entropy`.
    """

    features: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    vq_loss: torch.Tensor | None = None
    entropy_loss: torch.Tensor | None = None


class UniTokMultiCodebookQuantizer(nn.Module):
    """K independent sub-codebooks of V unit vectors, searched in one batched product.

    Args:
        num_codebooks: K.
        codebook_size: V.
        dim: dims of a whole token; each sub-codebook has vectors of dim / K.
        beta: weight of the commitment term.
        entropy_temperature: softmax temperature of the entropy loss.
        trainable: True makes the codebooks a parameter. False makes them a buffer, which a checkpoint fills.
        rotation_trick: pass gradients to the input through the rotation that turns it into its code vector
            (https://arxiv.org/abs/2410.06424, section 4) instead of unchanged. No value of a forward pass depends on
            it.

    Attributes:
        codebooks: (K, V, dim / K), not normalised.
        usage: buffer, (K, V), float32: exponential average, over training steps and all processes, of the share of
            tokens that chose each code. It starts at 0; divided by its sum over V it is bias-corrected, like Adam's
            averages. It changes only in training mode, and only if the codebooks are trainable.

    Raises:
        ValueError: `dim` is not a multiple of K.

    Example:
        >>> quantizer = UniTokMultiCodebookQuantizer(num_codebooks=8, codebook_size=512, dim=64)
        >>> output = quantizer(torch.randn(2, 16, 64))
        >>> output.codes.shape
        torch.Size([2, 8, 16])
        >>> torch.equal(quantizer.encode(quantizer.decode(output.codes)), output.codes)
        True
    """

    USAGE_DECAY = 0.99

    def __init__(
        self,
        num_codebooks: int,
        codebook_size: int,
        dim: int,
        beta: float = 0.25,
        entropy_temperature: float = 0.01,
        trainable: bool = True,
        rotation_trick: bool = False,
    ):
        super().__init__()
        if dim % num_codebooks:
            raise ValueError(f"dim ({dim}) is not a multiple of num_codebooks ({num_codebooks}).")
        self.num_codebooks, self.codebook_size, self.dim = num_codebooks, codebook_size, dim
        self.beta, self.entropy_temperature, self.rotation_trick = beta, entropy_temperature, rotation_trick
        shape = num_codebooks, codebook_size, dim // num_codebooks
        if trainable:
            self.codebooks = nn.Parameter(torch.randn(shape))
        else:
            self.register_buffer("codebooks", scattered(shape))
        self.register_buffer("usage", torch.zeros(num_codebooks, codebook_size))

    def extra_repr(self) -> str:
        return f"num_codebooks={self.num_codebooks}, codebook_size={self.codebook_size}, dim={self.dim}"

    def _unit_codebooks(self) -> torch.Tensor:
        return F.normalize(self.codebooks.float(), dim=-1)

    def _unit_chunks(self, features: torch.Tensor) -> torch.Tensor:
        """(B, L, dim) -> (K, B * L, dim / K), float32, unit length."""
        chunks = features.float().reshape(-1, self.num_codebooks, self.dim // self.num_codebooks)
        return F.normalize(chunks, dim=-1).transpose(0, 1)

    def _join_chunks(self, chunks: torch.Tensor, batch_shape: torch.Size) -> torch.Tensor:
        """(K, B * L, dim / K) -> (B, L, dim)."""
        return chunks.transpose(0, 1).reshape(*batch_shape, self.dim)

    @staticmethod
    def _gather(codebooks: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Rows of each codebook: (K, V, d) and (K, N) -> (K, N, d)."""
        return codebooks.gather(1, indices[..., None].expand(-1, -1, codebooks.shape[-1]))

    @loads_weights
    def encode(self, features: torch.Tensor) -> torch.Tensor:
        """Return the codes nearest to the features.

        Args:
            features: (B, L, dim), any float dtype; only the directions of their chunks matter.

        Returns:
            (B, K, L), int64, in [0, V).
        """
        with torch.autocast(features.device.type, enabled=False):
            scores = torch.bmm(self._unit_chunks(features), self._unit_codebooks().transpose(1, 2))
        return self._to_codes(scores.argmax(dim=-1), features.shape[:-1])

    def _to_codes(self, indices: torch.Tensor, batch_shape: torch.Size) -> torch.Tensor:
        """(K, B * L) -> (B, K, L)."""
        return indices.reshape(self.num_codebooks, *batch_shape).transpose(0, 1)

    @loads_weights
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the code vectors of codes.

        Args:
            codes: (B, K, L), integers in [0, V).

        Returns:
            (B, L, dim), in the codebooks' dtype: K unit vectors, concatenated.

        Raises:
            ValueError: `codes` is not an integer tensor (B, K, L).
            IndexError: a code lies outside [0, V). This holds on a CPU; a GPU raises a device-side assertion, and a
                compiled or exported graph does not check.
        """
        if codes.dim() != 3 or codes.shape[1] != self.num_codebooks or codes.is_floating_point():
            raise ValueError(
                f"Expected integer codes of shape (B, {self.num_codebooks}, L), "
                f"got {codes.dtype} of shape {tuple(codes.shape)}."
            )
        indices = codes.long().transpose(0, 1).flatten(1)  # (K, B * L)
        if (
            codes.device.type == "cpu"
            and not torch.compiler.is_compiling()  # values are unknown while compiling
            and codes.numel()
            and not 0 <= indices.min() <= indices.max() < self.codebook_size
        ):
            raise IndexError(
                f"Codes go from {indices.min()} to {indices.max()}, "
                f"but each sub-codebook has codes 0 to {self.codebook_size - 1}."
            )
        with torch.autocast(codes.device.type, enabled=False):
            vectors = F.normalize(self._gather(self.codebooks, indices).float(), dim=-1)
        return self._join_chunks(vectors, (codes.shape[0], codes.shape[2])).to(self.codebooks.dtype)

    def forward(
        self, features: torch.Tensor, with_entropy: bool = False, track_usage: bool = True
    ) -> UniTokQuantizerOutput:
        """Quantize features with a straight-through gradient, and compute the losses that train the codebooks.

        Args:
            features: (B, L, dim), any float dtype.
            with_entropy: also compute the entropy loss, whose memory grows with B * L * K * V.
            track_usage: count the chosen codes in `usage`; False for features of anything but training images.

        Returns:
            `features` in the input's dtype, `codes`, `vq_loss`, and `entropy_loss` if asked for.
        """
        with torch.autocast(features.device.type, enabled=False):
            chunks, codebooks = self._unit_chunks(features), self._unit_codebooks()
            scores = torch.bmm(chunks, codebooks.transpose(1, 2)) if with_entropy else None
            with torch.no_grad():
                search = scores if with_entropy else torch.bmm(chunks, codebooks.transpose(1, 2))
                indices = search.argmax(dim=-1)  # (K, B * L)
            vectors = self._gather(codebooks, indices)
            vq_loss = F.mse_loss(vectors, chunks.detach()) + self.beta * F.mse_loss(vectors.detach(), chunks)
            entropy_loss = self._entropy_loss(scores) if with_entropy else None
            quantized = self._rotate(chunks, vectors) if self.rotation_trick else chunks + (vectors - chunks).detach()
        if track_usage and self.training and self.codebooks.requires_grad:
            self._update_usage(indices)
        return UniTokQuantizerOutput(
            features=self._join_chunks(quantized, features.shape[:-1]).to(features.dtype),
            codes=self._to_codes(indices, features.shape[:-1]),
            vq_loss=vq_loss,
            entropy_loss=entropy_loss,
        )

    @staticmethod
    def _rotate(chunks: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """Rotate the chunks onto the vectors, all of unit length. Gradients treat the rotations as constant."""
        start, end = chunks.detach(), vectors.detach()
        middle = F.normalize(start + end, dim=-1)
        reflected = 2 * middle * (middle * chunks).sum(dim=-1, keepdim=True)
        return chunks - reflected + 2 * end * (start * chunks).sum(dim=-1, keepdim=True)

    def _entropy_loss(self, scores: torch.Tensor) -> torch.Tensor:
        """Mean entropy of each token's soft assignment minus the entropy of the mean assignment; scores (K, N, V).

        In training, the mean assignment is over the tokens of all processes, of which each has the same number. The
        gradient is that of this process's tokens, so the mean of the processes' gradients is that of the whole batch.
        """
        squared_distance = 2 - 2 * scores  # of unit vectors
        log_probs = F.log_softmax(-squared_distance / self.entropy_temperature, dim=-1)
        probs = log_probs.exp()
        mean = probs.mean(dim=1)
        if self.training and num_processes() > 1:
            of_all = mean.detach().clone()
            dist.all_reduce(of_all)
            mean = mean + (of_all / num_processes() - mean).detach()
        token_entropy = -(probs * log_probs).sum(dim=-1).mean()
        mean_entropy = -(mean * mean.clamp_min(1e-10).log()).sum(dim=-1).mean()
        return token_entropy - mean_entropy

    @torch.no_grad()
    def _update_usage(self, indices: torch.Tensor) -> None:
        counts = torch.zeros_like(self.usage, dtype=torch.float32)
        counts.scatter_add_(1, indices, torch.ones_like(indices, dtype=torch.float32))
        if num_processes() > 1:
            dist.all_reduce(counts)
        share = counts / counts.sum(dim=1, keepdim=True)
        self.usage.copy_(self.USAGE_DECAY * self.usage + (1 - self.USAGE_DECAY) * share)

    @property
    def codebook_usage(self) -> torch.Tensor:
        """Scalar: percent of codes in use, over all sub-codebooks, by the running average `usage`.

        A code is in use if its average is above 1% of an even share. To report on a trained tokenizer, count the codes
        of an evaluation set instead.
        """
        total = self.usage.sum(dim=1, keepdim=True)
        return 100 * (self.usage > 0.01 / self.codebook_size * total).float().mean()


__all__ = ["UniTokMultiCodebookQuantizer", "UniTokQuantizerOutput"]
