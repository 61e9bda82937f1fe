"""Prevent codebook collapse when a tokenizer is trained from scratch: initialise codes from data, revive dead ones.

A code is trained only when it is chosen. A code that is not the nearest one of any feature never changes, and training
may end with a handful of codes in use. Both remedies move codes to features. `start_from_data` moves all codes before
the first step (k-means, as in SoundStream, https://arxiv.org/abs/2107.03312, section III-C). `DeadCodes` moves those
that were not chosen for a while (random restarts, as in Jukebox, https://arxiv.org/abs/2005.00341, section 3). Both
use the features of all processes, and every process moves the same codes to the same places.
"""

import torch
import torch.distributed as dist
from torch.nn import functional as F

from unitok_mllm import UniTokMultiCodebookQuantizer
from unitok_mllm.quantization_unitok import num_processes


FEATURES_PER_CODE = 4  # for k-means


def gather_chunks(quantizer: UniTokMultiCodebookQuantizer, features: torch.Tensor) -> torch.Tensor:
    """Split the features of all processes into K chunks of unit length, as the nearest-code search does.

    If there are many tokens, only every n-th is used, such that about `FEATURES_PER_CODE` are left for each code.

    Args:
        quantizer: quantizer with K codebooks of V codes.
        features: features of this process, (..., dim), in the same shape on every process.

    Returns:
        The chunks, (K, N, dim / K), float32, of unit length, equal on every process.
    """
    tokens = features.detach().float().reshape(-1, quantizer.dim)
    count = len(tokens) * num_processes()
    tokens = tokens[:: max(1, count // (FEATURES_PER_CODE * quantizer.codebook_size))]
    if num_processes() > 1:
        parts = [torch.empty_like(tokens) for _ in range(num_processes())]
        dist.all_gather(parts, tokens.contiguous())
        tokens = torch.cat(parts)
    return F.normalize(tokens.unflatten(1, (quantizer.num_codebooks, -1)), dim=-1).transpose(0, 1)


@torch.no_grad()
def start_from_data(
    chunks: torch.Tensor, codebook_size: int, generator: torch.Generator, iterations: int = 10
) -> torch.Tensor:
    """Compute sub-codebooks by k-means with cosine similarity, starting from random chunks.

    A centre that no chunk is nearest to does not move.

    Args:
        chunks: chunks of unit length, (K, N, dim / K), see `gather_chunks`.
        codebook_size: V, the number of codes in each codebook.
        generator: CPU random generator. All processes use the result of the first one.
        iterations: number of k-means iterations.

    Returns:
        The codebooks, (K, V, dim / K), of unit length, equal on every process.

    Raises:
        ValueError: there are fewer chunks than codes.
    """
    if chunks.shape[1] < codebook_size:
        raise ValueError(f"{chunks.shape[1]} features are too few for {codebook_size} codes to start from.")
    codebooks = []
    for points in chunks:
        centres = points[torch.randperm(len(points), generator=generator)[:codebook_size].to(points.device)]
        for _ in range(iterations):
            nearest = (points @ centres.T).argmax(dim=1)
            sums = torch.zeros_like(centres).index_add_(0, nearest, points)
            is_chosen = torch.bincount(nearest, minlength=codebook_size)[:, None] > 0
            centres = torch.where(is_chosen, F.normalize(sums, dim=-1), centres)
        codebooks.append(centres)
    codebooks = torch.stack(codebooks)
    if num_processes() > 1:
        dist.broadcast(codebooks, src=0)  # sums on a GPU differ in their last bits
    return codebooks


class DeadCodes:
    """Record which codes are chosen, and move the others to features of the current batch.

    Args:
        usage: a tensor of shape (K, V) on the device to use; its values are ignored.

    Attributes:
        chosen: whether this process has chosen each code since the last call of `revive`, (K, V), bool.
    """

    def __init__(self, usage: torch.Tensor):
        self.chosen = torch.zeros_like(usage, dtype=torch.bool)

    def count(self, codes: torch.Tensor) -> None:
        """Record the codes (B, K, L), int64, of a training step."""
        self.chosen.scatter_(1, codes.transpose(0, 1).flatten(1), True)

    def chosen_by_any(self) -> torch.Tensor:
        """Return which codes any process chose, (K, V), bool; every process must call it."""
        chosen = self.chosen.int()
        if num_processes() > 1:
            dist.all_reduce(chosen)
        return chosen > 0

    @torch.no_grad()
    def revive(self, chunks: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Assign a different chunk to each dead code, and start a new record; every process must call it.

        If there are more dead codes than chunks, a random selection of them is moved.

        Args:
            chunks: chunks of unit length, (K, N, dim / K), see `gather_chunks`.
            generator: CPU random generator, in the same state on every process.

        Returns:
            A mask of the moved elements of the codebooks, (K, V, dim / K), bool, and their new values, in the same
            shape.
        """
        dead = ~self.chosen_by_any()
        is_moved = torch.zeros_like(dead)
        places = chunks.new_zeros(*dead.shape, chunks.shape[2])
        for k, points in enumerate(chunks):
            codes = dead[k].nonzero().squeeze(1)
            count = min(len(codes), len(points))
            codes = codes[torch.randperm(len(codes), generator=generator)[:count].to(codes.device)]
            is_moved[k, codes] = True
            places[k, codes] = points[torch.randperm(len(points), generator=generator)[:count].to(points.device)]
        self.chosen.zero_()
        return is_moved[..., None].expand_as(places), places
