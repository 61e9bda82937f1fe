"""Asynchronous use of an engine: run it in a thread, and stream its tokens and pictures to coroutines.

The API server and the web page share this module.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from itertools import islice

import torch
from PIL import Image

from .ranking_unitok import UniTokDrawingOutput, choose_drawings, score_drawings
from .serving import UniTokEngine
from .streaming_unitok import UniTokImageStreamer


DECODED_AT_ONCE = 16  # drawings in a batch; a call is never split, so a batch may be larger
# More are no faster on a CPU. The earlier a client gets its picture, the earlier it asks again, and the engine draws for
# it while the others' pictures are decoded.
DECODED_AT_ONCE_ON_CPU = 4


class SharedEngine:
    """An engine and its processor, shared by many coroutines.

    Args:
        engine: the engine; `running` runs it.
        processor: the `UniTokMLLMProcessor` of the same model.
    """

    def __init__(self, engine: UniTokEngine, processor):
        self.engine, self.processor, self.model = engine, processor, engine.model
        self._decoder = UniTokImageStreamer(engine.model, processor)
        self._undecoded: deque[tuple[list, asyncio.Future]] = deque()
        self._decoding: asyncio.Task | None = None

    @torch.inference_mode()
    def pictures(self, drawings: list[Sequence[torch.Tensor]]) -> list[Image.Image]:
        """Decode drawings, each given by the codes (K,) of its positions so far. The other positions are grey."""
        nothing = torch.zeros(self.model.depth_head.num_codebooks, dtype=torch.long, device=self.model.device)
        num_drawn = [len(groups) for groups in drawings]
        longest = max(1, *num_drawn)
        drawings = [[*groups, *[(groups or [nothing])[-1]] * (longest - len(groups))] for groups in drawings]
        codes = torch.stack([torch.stack(groups, dim=1) for groups in drawings])  # (B, K, l)
        pixels = self._decoder.decode(codes, torch.tensor(num_drawn, device=codes.device))
        return self.processor.post_process_multimodal_output(pixels, generation_mode="image")

    @torch.inference_mode()
    def rank(self, codes: torch.Tensor, inputs: dict, count: int) -> UniTokDrawingOutput:
        """Choose the best `count` drawings of one prompt.

        Args:
            codes: codes of the drawings, (N, K, L).
            inputs: the processor's output for the prompt.
            count: number of drawings to return.
        """
        ids, mask = inputs["ranking_input_ids"], inputs["ranking_attention_mask"]
        visual, codes = self.model.visual, codes[None]
        scores = score_drawings(visual, codes, ids.to(visual.device), mask.to(visual.device))
        return choose_drawings(codes, scores, count)

    async def decode(self, drawings: list[Sequence[torch.Tensor]]) -> list[Image.Image]:
        """Decode drawings in a thread, batched with those that other coroutines are waiting for; see `pictures`."""
        future = asyncio.get_running_loop().create_future()
        self._undecoded.append((drawings, future))
        if self._decoding is None or self._decoding.done():
            self._decoding = asyncio.create_task(self._decode_waiting())
        return await future

    async def _decode_waiting(self) -> None:
        most = DECODED_AT_ONCE_ON_CPU if self.model.device.type == "cpu" else DECODED_AT_ONCE
        while self._undecoded:
            calls, batch = [], []
            while self._undecoded and len(batch) < most:
                calls.append(self._undecoded.popleft())
                batch.extend(calls[-1][0])
            try:
                decoded = iter(await asyncio.to_thread(self.pictures, batch))
            except Exception as error:
                for _, future in calls:
                    if not future.done():  # its coroutine may have been cancelled
                        future.set_exception(error)
                continue
            for drawings, future in calls:
                pictures = list(islice(decoded, len(drawings)))
                if not future.done():
                    future.set_result(pictures)


@asynccontextmanager
async def running(engine: UniTokEngine, drop: bool = False) -> AsyncIterator[threading.Thread]:
    """Context manager that runs an engine in a thread.

    Args:
        engine: the engine.
        drop: whether to cancel the submitted requests on exit instead of finishing them.

    Yields:
        The engine's thread.
    """
    thread = threading.Thread(target=engine.run, name="engine", daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        engine.stop(drop)
        await asyncio.to_thread(thread.join)


class Stream:
    """A queue that passes tokens and codes from the engine's thread to a coroutine."""

    def __init__(self):
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue()

    def tell(self, index: int, item: torch.Tensor | None) -> None:
        """Put an item of the request at this index: a token, (), codes of a position, (K,), or None at its end."""
        self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, item))

    async def items(
        self, futures: list[Future], idle: float | None = None
    ) -> AsyncIterator[tuple[int, torch.Tensor | None] | None]:
        """Yield the arguments of each `tell`, the index of the request and the item, until all requests are done.

        Args:
            futures: futures of the requests, in the order of their indices.
            idle: seconds without an item after which None is yielded; None to wait without limit.
        """
        for index, future in enumerate(futures):
            future.add_done_callback(lambda _, index=index: self.tell(index, None))
        num_left = len(futures)
        while num_left:
            try:
                async with asyncio.timeout(idle):
                    index, item = await self._queue.get()
            except TimeoutError:
                yield None
                continue
            num_left -= item is None
            yield index, item


async def submit(calls: Iterable[Callable[[], Future]]) -> list[Future]:
    """Submit requests to the engine from a thread. If one is refused, cancel those before it and raise its error.

    Args:
        calls: functions that submit one request each.

    Returns:
        The futures of all requests, in the order of the calls.
    """
    futures = []
    try:
        for call in calls:
            futures.append(await asyncio.to_thread(call))
    except BaseException:
        cancel(futures)
        raise
    return futures


def cancel(futures: list[Future]) -> None:
    """Cancel requests. Those that are already done stay as they are."""
    for future in futures:
        future.cancel()
