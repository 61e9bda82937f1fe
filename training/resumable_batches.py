"""Shuffled batches of a map-style data set, from any position of a run on."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from training.image_text_data import sample_seed


class ResumableBatches(Sampler):
    """Batch sampler of one process. It starts at any position, and yields lists of (epoch, index) pairs.

    Each epoch is a permutation that depends on (seed, epoch), cut into equal batches, which go to the processes in
    turn. Samples that do not fill an optimizer step of all processes are left out. Resuming loads no earlier samples.

    Args:
        per_epoch: number of batches per process in an epoch.
        length: number of samples in the data set.
        batch_size: number of samples in a batch.
        rank: rank of the process.
        world: number of processes.
        seed: seed of the permutations.
        first: index of the first batch to yield, counted from the start of the run.
    """

    def __init__(self, per_epoch: int, length: int, batch_size: int, rank: int, world: int, seed: int, first: int):
        self.per_epoch, self.length, self.batch_size = per_epoch, length, batch_size
        self.rank, self.world, self.seed, self.first = rank, world, seed, first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, position = divmod(self.first, self.per_epoch)
        while True:
            generator = torch.Generator().manual_seed(sample_seed(self.seed, epoch))
            order = torch.randperm(self.length, generator=generator).tolist()
            for batch in range(position, self.per_epoch):
                start = (batch * self.world + self.rank) * self.batch_size
                yield [(epoch, index) for index in order[start : start + self.batch_size]]
            epoch, position = epoch + 1, 0
