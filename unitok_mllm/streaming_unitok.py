"""Stream pictures to another thread while they are drawn."""

from collections.abc import Iterator
from contextlib import contextmanager
from queue import Queue

import torch
from PIL import Image
from torch.nn import functional as F


@contextmanager
def streamers_told(*streamers, error_only: bool = False) -> Iterator[None]:
    """Call `end` of streamers when the block ends, also after an error, which a `UniTokImageStreamer` then raises.

    Args:
        streamers: the streamers of `generate`; None for none. Each is called once, also if it is given twice.
        error_only: only after an error; without one, the block itself ends its streamers.
    """
    ended = [] if error_only else streamers
    try:
        yield
    except BaseException as error:
        ended = streamers
        for streamer in streamers:
            if isinstance(streamer, UniTokImageStreamer):
                streamer.fail(error)
        raise
    finally:
        for streamer in {id(one): one for one in ended if one is not None}.values():
            streamer.end()


class UniTokImageStreamer:
    """Iterate over pictures while `generate` draws them in another thread. Positions not drawn yet are grey.

    Each item is a list of PIL pictures, one for each image of the batch. The last item has whole pictures, unless the
    drawing was stopped.

    Args:
        model: the `UniTokMLLMForConditionalGeneration` that draws and decodes the pictures.
        processor: its processor.
        every: positions between two items, at least 1.
        timeout: seconds to wait for an item; None for no limit.

    Raises:
        ValueError: `every` is below 1.
        queue.Empty: while iterating, if nothing came within `timeout`.
        Exception: while iterating, if `generate` raised it.

    Example:
        ```python
        streamer = UniTokImageStreamer(model, processor, every=16)
        thread = Thread(target=model.generate, kwargs={**inputs, "generation_mode": "image", "streamer": streamer})
        thread.start()
        for pictures in streamer:
            show(pictures[0])
        ```
    """

    def __init__(self, model, processor, every: int = 16, timeout: float | None = None):
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}.")
        self.model, self.processor, self.every, self.timeout = model, processor, every, timeout
        self._queue: Queue[torch.Tensor | None] = Queue()
        self._is_stopped = False
        self._error: BaseException | None = None

    def put(self, codes: torch.Tensor) -> bool:
        """Take the codes so far, (B, K, l); called by `generate`. Returns whether to stop."""
        if codes.shape[-1] % self.every == 0 or codes.shape[-1] == self.model.config.num_image_positions:
            self._queue.put(codes)
        return self._is_stopped

    def end(self) -> None:
        """Mark the end of the drawing, also after an error; called by `generate`."""
        self._queue.put(None)

    def fail(self, error: BaseException) -> None:
        """Store an error, which the iteration raises at its end; called by `generate`."""
        self._error = error

    def stop(self) -> None:
        """End the drawing after the current position. The model can be used again."""
        self._is_stopped = True

    def __iter__(self) -> "UniTokImageStreamer":
        return self

    def __next__(self) -> list[Image.Image]:
        codes = self._queue.get(timeout=self.timeout)
        if codes is None:
            error, self._error = self._error, None
            raise error or StopIteration
        return self.processor.post_process_multimodal_output(self.decode(codes), generation_mode="image")

    def decode(self, codes: torch.Tensor, num_drawn: torch.Tensor | None = None) -> torch.Tensor:
        """Decode the codes of the first l positions, (B, K, l), to pixels (B, 3, H, W) in [-1, 1].

        Positions not drawn yet are 0: those from l on, or from `num_drawn` (B,) of each image.
        """
        length, known = self.model.config.num_image_positions, codes.shape[-1]
        num_drawn = codes.new_tensor([known]) if num_drawn is None else num_drawn
        filled = torch.cat([codes, codes[..., -1:].expand(-1, -1, length - known)], dim=-1)
        pixels = self.model.decode_images(filled)
        height, width = self.model.visual.vision_model.grid_size(pixels)
        is_drawn = torch.arange(length, device=pixels.device) < num_drawn.to(pixels.device)[:, None]
        is_drawn = is_drawn.view(-1, 1, height, width)
        return pixels * F.interpolate(is_drawn.to(pixels.dtype), size=pixels.shape[-2:])


__all__ = ["UniTokImageStreamer", "streamers_told"]
