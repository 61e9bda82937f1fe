"""The model behind the web page, shared by its visitors, and the pictures that they upload."""

import asyncio
import colorsys
import math
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature

from .image_processing_unitok import load_image, picture_size
from .inference import has_text_tower, text_tower_inputs
from .ranking_unitok import check_ranking
from .serving import UniTokEngine
from .shared_engine import SharedEngine, Stream, cancel, submit


FRAMES = 16  # previews of a drawing while it is drawn
MAX_IMAGES = 4  # drawings in one answer
MAX_COUNT = 8  # drawings of one prompt
MAX_TEXT = 10_000  # characters
MAX_WORDS = 1000
MAP_SIZE = 160  # about the side of one code map, in pixels
MAP_GAP = 8
GOLDEN_RATIO = (1 + math.sqrt(5)) / 2
PICTURE_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "AVIF")  # few, since each decoder can be attacked
MAX_PICTURES = 8  # in one message
MAX_PIXELS = 50_000_000  # of all pictures in one message
MAX_SIDE = 1024  # pixels; a larger picture is shrunk while it is read
READING = Lock()  # decode one picture at a time, over all visitors


class SharedModel(SharedEngine):
    """A model shared by several visitors, whose requests run in one batch.

    `answer` and `draw` are generators; closing one cancels its requests. While the requests wait for rows of the
    batch, the generator yields their place in the queue (an int, from 1) once a second.

    Args:
        engine: engine of a `UniTokMLLMForConditionalGeneration`.
        processor: the `UniTokMLLMProcessor` of the same model.
    """

    def __init__(self, engine: UniTokEngine, processor):
        super().__init__(engine, processor)
        self.num_positions = self.model.config.num_image_positions
        self.max_positions = engine.max_length
        self.every = max(1, self.num_positions // FRAMES)
        self._waiting: list[Stream] = []  # in the order of submission

    async def _told(self, *calls: Callable) -> AsyncIterator[int | tuple[int, torch.Tensor]]:
        """Submit requests to the engine, one per call, and yield each item that it reports.

        Yields:
            The index of the call and the item, see `Stream.tell`; or the place in the queue, while waiting.
        """
        stream, futures = Stream(), []
        self._waiting.append(stream)
        try:
            futures = await submit(partial(call, tell=partial(stream.tell, index)) for index, call in enumerate(calls))
            async for told in stream.items(futures, idle=1):
                if told is None:
                    if stream in self._waiting and self.engine.num_waiting:
                        yield self._waiting.index(stream) + 1
                    continue
                if stream in self._waiting:
                    self._waiting.remove(stream)
                index, item = told
                if item is not None:
                    yield told
                elif not futures[index].cancelled():  # as when the server shuts down
                    futures[index].result()  # raises the request's error
        finally:
            cancel(futures)
            if stream in self._waiting:
                self._waiting.remove(stream)

    def _check_length(self, length: int) -> None:
        if length >= self.max_positions:
            raise ValueError(
                f"the conversation takes {length} of the model's {self.max_positions} positions "
                f"({self.num_positions + 2} for each picture): start a new one, or ask for less"
            )

    def check_pictures(self, count: int, conversation: list[dict]) -> None:
        """Check that `count` more pictures fit into a conversation, before any of them is read.

        Raises:
            ValueError: they do not fit.
        """
        count += sum(part["type"] == "image" for turn in conversation for part in turn["content"])
        self._check_length(count * (self.num_positions + 2))

    def check_text(self, text: str) -> None:
        """Check the length of a text.

        Raises:
            ValueError: the text is too long.
        """
        if len(text) > MAX_TEXT:
            raise ValueError(f"the text has {len(text)} characters; at most {MAX_TEXT} can be read")

    def chat_inputs(self, conversation: list[dict]) -> BatchFeature:
        """Prepare the inputs of `answer` from a conversation that ends with a question.

        Raises:
            ValueError: a text or a picture is unusable, or the conversation is longer than the model's context.
        """
        for turn in conversation:
            for part in turn["content"]:
                if part["type"] == "text" and turn["role"] == "user":
                    self.check_text(part["text"])
        inputs = self.processor.apply_chat_template(
            conversation,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"generation_mode": "interleaved"},
        )
        self._check_length(inputs["input_ids"].shape[1])
        return inputs.to(self.model.device)

    async def answer(
        self, inputs: BatchFeature, max_new_tokens: int, image_options: dict
    ) -> AsyncIterator[int | list[dict]]:
        """Stream an answer: each item is the turn's `content` so far, the last one the whole answer.

        An incomplete drawing has the type "unfinished" instead of "image", and is gray where nothing is drawn yet.

        Args:
            inputs: output of `chat_inputs`.
            max_new_tokens: maximum number of text tokens.
            image_options: options of `generate_image_codes` for the drawings in the answer.

        Raises:
            ValueError: an option is out of its range.
        """
        room = self.max_positions - inputs["input_ids"].shape[1]
        max_new_tokens = min(max_new_tokens, room)
        image_options = dict(image_options)
        call = partial(
            self.engine.interleaved,
            inputs,
            seed=image_options.pop("seed", None),
            max_images=min(MAX_IMAGES, (room - max_new_tokens) // (self.num_positions + 1)),
            image_options=image_options,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        finished, current, words, groups = [], [], [], []
        async with aclosing(self._told(call)) as told:
            async for item in told:
                if isinstance(item, int):
                    yield item
                    continue
                _, item = item
                if not item.ndim:  # a token
                    words.append(int(item))
                    text = self.processor.tokenizer.decode(words, skip_special_tokens=True).strip()
                    current = [{"type": "text", "text": text}] if text else []
                else:
                    if words:  # the text before the drawing ends here
                        finished, current, words = finished + current, [], []
                    groups.append(item)
                    if len(groups) % self.every and len(groups) < self.num_positions:
                        continue
                    (picture,) = await self.decode([groups])
                    current = [{"type": "unfinished", "image": picture}]
                    if len(groups) == self.num_positions:
                        finished, current, groups = [*finished, {"type": "image", "image": picture}], [], []
                yield finished + current

    async def draw(
        self, prompt: str, count: int, image_options: dict, candidates: int = 1
    ) -> AsyncIterator[int | list[Image.Image] | list[tuple[Image.Image, float]]]:
        """Stream drawings of a prompt, gray where nothing is drawn yet; the last item is complete.

        Args:
            prompt: the prompt.
            count: number of drawings.
            image_options: options of `generate_image_codes`.
            candidates: number of drawings to rank, if above 1. At least so many are drawn, and the last item has them
                best first, each with its score, see `ranking_unitok`.

        Raises:
            ValueError: the prompt is empty or too long, an option or number is out of its range, or the model cannot
                rank drawings.
        """
        if not (prompt or "").strip():
            raise ValueError("the prompt is empty")
        if not 1 <= count <= MAX_COUNT:
            raise ValueError(f"between 1 and {MAX_COUNT} pictures can be drawn at once, got {count}")
        if not 1 <= candidates <= MAX_COUNT:
            raise ValueError(f"between 1 and {MAX_COUNT} candidates can be drawn, got {candidates}")
        self.check_text(prompt)
        inputs = await asyncio.to_thread(self.processor, text=prompt.strip(), generation_mode="image")
        if candidates > 1:
            check_ranking(self.model.visual, inputs["ranking_input_ids"])
            count = max(count, candidates)
        length = inputs["input_ids"].shape[1]
        if length + self.num_positions > self.max_positions:
            raise ValueError(
                f"the prompt is too long: it has {length} tokens, and the model's {self.max_positions} positions leave "
                f"room for {self.max_positions - self.num_positions} besides the picture"
            )
        inputs, drawings, num_told = inputs.to(self.model.device), [[] for _ in range(count)], 0
        calls = (partial(self.engine.draw, inputs, sample=index, **image_options) for index in range(count))
        async with aclosing(self._told(*calls)) as told:
            async for item in told:
                if isinstance(item, int):
                    yield item
                    continue
                index, codes = item
                drawings[index].append(codes)
                num_told += 1
                if num_told % (self.every * count) == 0 or num_told == self.num_positions * count:
                    pictures = await self.decode(drawings)
                    yield pictures
        if candidates > 1 and num_told == self.num_positions * count:  # not cancelled
            codes = torch.stack([torch.stack(groups, dim=1) for groups in drawings])
            ranked = await asyncio.to_thread(self.rank, codes, inputs, count)
            yield [(pictures[i], score) for i, score in zip(ranked.chosen[0].tolist(), ranked.scores.tolist())]

    @torch.inference_mode()
    def tokenize(self, picture: Image.Image) -> tuple[Image.Image, Image.Image, torch.Tensor, tuple[int, int]]:
        """Encode a picture and decode it again.

        Returns:
            The picture as the model sees it, its reconstruction, its codes (K, L), and their grid (rows, columns).

        Raises:
            ValueError: the picture is too elongated.
        """
        image_processor, visual = self.processor.image_processor, self.model.visual
        pixel_values = image_processor(images=[picture], mode="understand")["pixel_values"].to(visual.device)
        codes = visual.encode(pixel_values)
        pixels = visual.decode(codes, tuple(pixel_values.shape[-2:]))
        (seen,), (reconstruction,) = image_processor.post_process(pixel_values), image_processor.post_process(pixels)
        return seen, reconstruction, codes[0].cpu(), visual.vision_model.grid_size(pixel_values)

    @property
    def knows_words(self) -> bool:
        """Whether words can be compared with a picture, see `has_text_tower`."""
        return has_text_tower(self.model, self.processor)

    @torch.inference_mode()
    def compare(self, picture: Image.Image, words: list[str]) -> dict[str, float]:
        """Compute the probability that each text describes the picture; the probabilities sum to 1.

        Raises:
            ValueError: there are no words, too many or too long ones, or the picture is too elongated.
        """
        if (length := sum(map(len, words))) > MAX_TEXT:
            raise ValueError(f"the words have {length} characters; at most {MAX_TEXT} can be read")
        if not 1 <= len(words) <= MAX_WORDS:
            raise ValueError(f"the list has {len(words)} words; it needs 1 to {MAX_WORDS}, one per line")
        visual = self.model.visual
        texts = text_tower_inputs(self.model, self.processor, words, truncate=True)
        pixels = self.processor.image_processor(images=[picture], mode="understand")["pixel_values"]
        text_embeds = visual.get_text_features(**texts).pooler_output
        image_embeds = visual.get_image_features(pixels.to(visual.device)).pooler_output
        logit_scale = visual.logit_scale.float().clamp(0, math.log(100)).exp()
        logits = logit_scale * image_embeds.float() @ text_embeds.float().T
        return dict(zip(words, logits.softmax(dim=-1)[0].tolist()))


def code_maps(codes: torch.Tensor, grid_size: tuple[int, int], codebook_size: int) -> Image.Image:
    """Draw codes as maps, one per codebook, four in a row: a square per position, a colour per code.

    Args:
        codes: integers in [0, codebook_size), (K, L), positions in row-major order.
        grid_size: rows and columns of positions.
        codebook_size: V. Code v has the hue v / golden ratio (mod 1), so that neighbouring codes look different.
    """
    rows, columns = grid_size
    hues = np.arange(codebook_size) / GOLDEN_RATIO % 1
    palette = np.array([colorsys.hsv_to_rgb(hue, 0.6, 0.9) for hue in hues])
    palette = (palette * 255).round().astype(np.uint8)  # (V, 3)
    cell = max(1, MAP_SIZE // max(rows, columns))
    maps = palette[codes.numpy()].reshape(len(codes), rows, columns, 3).repeat(cell, axis=1).repeat(cell, axis=2)
    height, width = maps.shape[1:3]
    per_row = min(4, len(codes))
    size = (per_row * (width + MAP_GAP) - MAP_GAP, math.ceil(len(codes) / per_row) * (height + MAP_GAP) - MAP_GAP)
    picture = Image.new("RGB", size, "white")
    for k, pixels in enumerate(maps):
        place = (k % per_row * (width + MAP_GAP), k // per_row * (height + MAP_GAP))
        picture.paste(Image.fromarray(pixels), place)
    return picture


def read_pictures(paths: list[str]) -> list[Image.Image]:
    """Read uploaded or drawn pictures, shrunk to sides of at most `MAX_SIDE` pixels.

    Their number is checked first, then their sizes by their headers. Only then are they decoded, one at a time over
    all visitors.

    Raises:
        ValueError: there are too many pictures or pixels, or a file is gone or has none of the `PICTURE_FORMATS`. The
            message has the file's name without its folder.
    """
    if len(paths) > MAX_PICTURES:
        raise ValueError(f"{len(paths)} pictures are too many: {MAX_PICTURES} can be read at once")
    num_pixels = 0
    for path in paths:
        with _picture_errors(path):
            width, height = picture_size(path, formats=PICTURE_FORMATS)
        num_pixels += width * height
        if num_pixels > MAX_PIXELS:
            raise ValueError(
                f"{Path(path).name} is too large, {width}x{height}: {MAX_PIXELS / 1e6:.0f} million pixels can be read "
                "at once"
            )
    pictures = []
    for path in paths:
        with _picture_errors(path), READING:
            pictures.append(load_image(path, formats=PICTURE_FORMATS, max_side=MAX_SIDE))
    return pictures


@contextmanager
def _picture_errors(path: str) -> Iterator[None]:
    if not Path(path).is_file():
        raise ValueError(f"{Path(path).name} is no longer on the server: start a new chat, or upload it again")
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{Path(path).name} is not a picture that can be read") from error
