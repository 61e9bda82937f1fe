"""Codes that start from data, and dead ones that are moved; the trainer's use of them is in test_tokenizer_trainer.py."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

from training.codebooks import DeadCodes, gather_chunks, start_from_data
from unitok_mllm import UniTokMultiCodebookQuantizer


K, V, D = 2, 6, 4


@pytest.fixture
def quantizer():
    return UniTokMultiCodebookQuantizer(K, V, K * D)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(values: torch.Tensor) -> set[tuple[float, ...]]:
    return set(map(tuple, values.tolist()))


def test_chunks_are_those_that_the_search_compares_with_the_codes(quantizer):
    features = torch.randn(3, 5, K * D)
    chunks = gather_chunks(quantizer, features)
    assert chunks.shape == (K, 15, D)
    for k in range(K):
        expected = F.normalize(features[..., k * D : (k + 1) * D], dim=-1).flatten(0, 1)
        torch.testing.assert_close(chunks[k], expected)
        nearest = (chunks[k] @ F.normalize(quantizer.codebooks[k], dim=-1).T).argmax(dim=1)
        assert torch.equal(nearest, quantizer.encode(features)[:, k].flatten())


def test_of_many_tokens_some_are_taken(quantizer):
    features = torch.randn(2, 50, K * D)
    taken = gather_chunks(quantizer, features.flatten(0, 1)[::4])  # 100 tokens, 4 for each of 6 codes are enough
    assert torch.equal(gather_chunks(quantizer, features), taken) and taken.shape[1] == 25


def test_codes_start_as_random_chunks_and_become_the_means_of_those_nearest_to_them(quantizer):
    chunks = gather_chunks(quantizer, torch.randn(4, 10, K * D))
    codebooks = start_from_data(chunks, V, generator(), iterations=0)
    for k in range(K):
        assert len(rows(codebooks[k])) == V and rows(codebooks[k]) < rows(chunks[k])
    similarity = [(chunks @ codebooks.mT).amax(dim=2).mean().item()]
    for iterations in (1, 3, 100):
        codebooks = start_from_data(chunks, V, generator(), iterations)
        similarity.append((chunks @ codebooks.mT).amax(dim=2).mean().item())
    assert similarity == sorted(similarity) and similarity[0] < similarity[-1] - 0.01
    for k in range(K):
        nearest = (chunks[k] @ codebooks[k].T).argmax(dim=1)
        assert set(nearest.tolist()) == set(range(V))
        means = torch.stack([F.normalize(chunks[k, nearest == code].sum(dim=0), dim=0) for code in range(V)])
        torch.testing.assert_close(codebooks[k], means)


def test_too_few_features_to_start_from_are_refused():
    with pytest.raises(ValueError, match="5 features are too few for 6 codes to start from"):
        start_from_data(torch.randn(K, V - 1, D), V, generator())


def test_dead_codes_move_to_features(quantizer):
    dead_codes = DeadCodes(quantizer.usage)
    dead_codes.count(torch.tensor([[[0, 1], [2, 2]]]))
    dead_codes.count(torch.tensor([[[1, 3], [2, 0]]]))
    alive = torch.zeros(K, V, dtype=torch.bool)
    alive[0, [0, 1, 3]], alive[1, [0, 2]] = True, True
    assert torch.equal(dead_codes.chosen, alive)

    features = torch.randn(2, 3, K * D)
    chunks = gather_chunks(quantizer, features)
    is_moved, places = dead_codes.revive(chunks, generator())
    assert torch.equal(is_moved, ~alive[..., None].expand(K, V, D)) and not dead_codes.chosen.any()
    for k in range(K):
        moved = rows(places[k, ~alive[k]])
        assert len(moved) == V - int(alive[k].sum()) and moved <= rows(chunks[k])
    with torch.no_grad():
        quantizer.codebooks.copy_(torch.where(is_moved, places, quantizer.codebooks))
    codes = quantizer.encode(features)
    assert all(set(codes[:, k].flatten().tolist()) >= set((~alive[k]).nonzero().flatten().tolist()) for k in range(K))


def test_of_more_dead_codes_than_features_a_part_moves(quantizer):
    chunks = gather_chunks(quantizer, torch.randn(1, 4, K * D))
    is_moved, places = DeadCodes(quantizer.usage).revive(chunks, generator())
    assert is_moved[..., 0].sum(dim=1).tolist() == [4, 4]
    assert all(rows(places[k, is_moved[k, :, 0]]) == rows(chunks[k]) for k in range(K))


def start_and_revive(quantizer, features, codes) -> tuple[torch.Tensor, torch.Tensor]:
    """The codebooks after their start and after a revival, on these features and choices of this process."""
    chunks = gather_chunks(quantizer, features)
    started = start_from_data(chunks, V, generator(1))
    dead_codes = DeadCodes(quantizer.usage)
    dead_codes.count(codes)
    is_moved, places = dead_codes.revive(chunks, generator(2))
    return started, torch.where(is_moved, places, started)


def one_of_two(rank, port, features, codes, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    both = start_and_revive(
        UniTokMultiCodebookQuantizer(K, V, K * D), torch.from_numpy(features[rank]), torch.from_numpy(codes[rank])
    )
    queue.put([part.numpy() for part in both])
    dist.destroy_process_group()


def test_two_processes_move_the_same_codes_as_one_with_the_whole_batch(quantizer):
    features, codes = torch.randn(2, 3, 5, K * D), torch.zeros(2, 3, K, 5, dtype=torch.long)
    codes[1] = 1
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("fork")  # a spawned process would import everything anew
    queue = context.SimpleQueue()
    arguments = (port, features.numpy(), codes.numpy(), queue)
    processes = mp.start_processes(one_of_two, arguments, nprocs=2, join=False, start_method="fork")
    results = [queue.get() for _ in range(2)]
    while not processes.join():
        pass
    started, revived = start_and_revive(quantizer, features.flatten(0, 1), codes.flatten(0, 1))
    assert torch.equal(revived[:, :2], started[:, :2]) and (revived[:, 2:] != started[:, 2:]).any(dim=2).all()
    for result in results:
        torch.testing.assert_close(torch.from_numpy(result[0]), started)
        torch.testing.assert_close(torch.from_numpy(result[1]), revived)
