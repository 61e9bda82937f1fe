"""What servers share: drawings that are decoded together are those decoded alone."""

import asyncio

import numpy as np
import pytest
import torch

from unitok_mllm.serving import UniTokEngine
from unitok_mllm.shared_engine import SharedEngine


@pytest.fixture
def shared(mllm, processor) -> SharedEngine:
    return SharedEngine(UniTokEngine(mllm), processor)


def drawings(shared: SharedEngine, *lengths: int) -> list[list[torch.Tensor]]:
    """Random codes of the first positions of some drawings."""
    return [[*torch.randint(32, (length, shared.model.depth_head.num_codebooks))] for length in lengths]


def test_those_that_wait_are_decoded_in_batches_as_alone(shared, monkeypatch):
    calls = [drawings(shared, 9), drawings(shared, 4, 0, 9), drawings(shared, 1), drawings(shared, *[9] * 20)]
    alone = [[shared.pictures([drawing])[0] for drawing in call] for call in calls]
    batches, decode = [], shared.pictures
    monkeypatch.setattr(shared, "pictures", lambda batch: batches.append(len(batch)) or decode(batch))

    async def together() -> list:
        return await asyncio.gather(*map(shared.decode, calls))

    decoded = asyncio.run(together())
    assert batches == [4, 21]
    for pictures, expected in zip(decoded, alone, strict=True):
        for picture, other in zip(pictures, expected, strict=True):
            np.testing.assert_allclose(np.int16(picture), np.int16(other), atol=1)


def test_a_failed_or_abandoned_decoding_leaves_the_others(shared):
    good, bad = drawings(shared, 9), [[torch.full((4,), 99)]]  # no such code

    async def together() -> list:
        abandoned = asyncio.create_task(shared.decode(good))
        await asyncio.sleep(0)
        abandoned.cancel()
        failed = await asyncio.gather(shared.decode(bad), return_exceptions=True)
        return [*failed, await shared.decode(good)]

    error, pictures = asyncio.run(together())
    assert isinstance(error, Exception) and len(pictures) == 1
