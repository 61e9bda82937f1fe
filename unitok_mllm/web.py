"""The web page of `unitok-mllm serve`: chat with pictures, drawings, visual tokenizer; on gradio (extra `web`).

`SharedModel` runs requests in the engine's batch and does not depend on the page, `build_page` lays out the page, and
`serve` runs the server. An error that a visitor can correct is a `ValueError` and is shown on the page. Any other
exception is a bug, whose traceback appears only in the terminal.

The browser sends only pictures and texts. Conversations stay on the server, so that no visitor can submit another's.
Uploads and drawings are stored in one folder, the only one that the page serves files from. A `Guard` protects the
server; docs/robustness.md lists the attacks.
"""

import asyncio
import colorsys
import html
import json
import math
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from threading import Lock

import gradio as gr
import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from gradio.processing_utils import save_pil_to_cache
from PIL import Image
from transformers import BatchFeature

from .drawing_unitok import image_generation
from .guard import Guard, Refused, listen, own_hosts, url_of, visitor_of
from .image_processing_unitok import load_image, picture_size
from .inference import has_text_tower, psnr, sampling_options, text_tower_inputs
from .kept_files import KeptFiles
from .ranking_unitok import check_ranking
from .serving import QueueFull, UniTokEngine
from .shared_engine import SharedEngine, Stream, cancel, running, submit
from .sheet import COLORS, SHAPES


FRAMES = 16  # previews of a drawing while it is drawn
MAX_IMAGES = 4  # drawings in one answer
MAX_COUNT = 8  # drawings of one prompt
MAX_TEXT = 10_000  # characters
MAX_WORDS = 1000
NEAREST = 8
MAP_SIZE = 160  # about the side of one code map, in pixels
MAP_GAP = 8
GOLDEN_RATIO = (1 + math.sqrt(5)) / 2
UPLOADS_KEPT = 3600  # seconds
TIDY_EVERY = 60  # seconds
PICTURE_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "AVIF")  # few, since each decoder can be attacked
MAX_PICTURES = 8  # in one message
MAX_PIXELS = 50_000_000  # of all pictures in one message
MAX_SIDE = 1024  # pixels; a larger picture is shrunk while it is read
JOBS_OF_A_VISITOR = 4  # waiting or running
JOBS_AT_WORK = 32  # running jobs of all visitors; gradio's own limit is 40
MIB = 2**20
MULTIPART_HEADERS = 2**16  # bytes of an upload besides its files
MAX_SESSIONS = 1000  # conversations kept
MAX_CONNECTIONS = 1000
SESSION_NAME = 64  # characters; gradio's own have 11
ROUTES = (
    r"(GET|HEAD) /",
    r"GET /(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)",
    r"GET /(assets|static|svelte)/.*",
    r"GET /gradio_api/(info|app_id|startup-events|upload_progress|queue/data|heartbeat/[^/]*)",
    r"GET /gradio_api/call/[^/]*/[^/]*",
    r"(GET|HEAD) /gradio_api/file=/.*",  # a path, not a URL
    r"POST /gradio_api/(upload|cancel|reset|queue/join|call/[^/]*)",
)
READING = Lock()  # decode one picture at a time, over all visitors
WORDS = "\n".join(f"a {color} {shape}" for color in COLORS for shape in SHAPES)
CSS = """
.chat .image-frame img {width: 128px !important; height: 128px !important; object-fit: contain}
.chat button[title="Share"] {display: none}
.drawings img, .tokenizer img {width: 100%; height: 100%; object-fit: contain}
"""


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


def drawing_options(guidance: float, temperature: float, top_k: int, top_p: float, seed: int) -> dict:
    """Convert the page's fields to options of `generate_image_codes`.

    Temperature 0 means greedy drawing, a seed below 0 a random seed.

    Raises:
        ValueError: a field is empty.
    """
    fields = {"guidance": guidance, "temperature": temperature, "top-k": top_k, "top-p": top_p, "seed": seed}
    if empty := [name for name, value in fields.items() if value is None]:
        raise ValueError(f"{' and '.join(empty)} must be given")
    seed = random.SystemRandom().randrange(2**31) if seed < 0 else seed
    options = {"guidance_scale": guidance, "seed": seed, "do_sample": temperature > 0}
    return options | ({"temperature": temperature, "top_k": top_k, "top_p": top_p} if temperature > 0 else {})


@contextmanager
def shown_errors():
    """Context manager that shows errors that a visitor can correct, or a full GPU, as a message on the page."""
    try:
        yield
    except (ValueError, QueueFull) as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from error
    except torch.OutOfMemoryError as error:
        raise gr.Error("The device has no memory left for this: ask for less at once.") from error


def build_page(shared: SharedModel, title: str) -> gr.Blocks:
    """Build the page with its three tabs.

    Args:
        shared: the model.
        title: description of the model, as plain text.
    """
    jobs = min(shared.engine.max_rows, JOBS_AT_WORK)
    in_the_engine = {"concurrency_id": "engine", "concurrency_limit": jobs, "show_progress": "minimal"}
    one_at_a_time = {"concurrency_id": "tokenizer", "concurrency_limit": 1, "show_progress": "minimal"}
    with gr.Blocks(title="UniTok", analytics_enabled=False) as page:
        gr.Markdown("# UniTok: one model reads images and draws them")
        gr.HTML(html.escape(title))
        with gr.Tab("Chat"):
            _chat_tab(shared, in_the_engine)
        with gr.Tab("Draw"):
            _draw_tab(shared, in_the_engine)
        with gr.Tab("Tokenizer"):
            _tokenizer_tab(shared, one_at_a_time)
    return page


def _place(number: int) -> str:
    return f"Waiting, number {number} in the queue"


def _drawing_fields(shared: SharedModel, **given: float) -> list[gr.components.Component]:
    """Build the fields of `drawing_options`, in its order. Their defaults are those `given`, else the model's own."""
    values = sampling_options(shared.model, **given)
    with gr.Row():
        return [
            gr.Slider(1, 20, values["guidance_scale"], step=0.1, label="Guidance", info="1: none"),
            gr.Slider(0, 2, values["temperature"], step=0.05, label="Temperature", info="0: likeliest"),
            gr.Number(values["top_k"], precision=0, minimum=0, label="Top-k", info="0: all codes"),
            gr.Slider(0.01, 1, values["top_p"], step=0.01, label="Top-p", info="1: all codes"),
            gr.Number(-1, precision=0, minimum=-1, maximum=2**31 - 1, label="Seed", info="-1: a new one"),
        ]


def _chat_tab(shared: SharedModel, event_options: dict) -> None:
    conversation = gr.State([])  # turns as for a chat template, with paths of pictures
    chatbot = gr.Chatbot(
        show_label=False,
        height="60vh",
        elem_classes="chat",
        buttons=[],
        render_markdown=False,
        placeholder="Add a picture and ask about it, or ask for a drawing.",
    )
    box = gr.MultimodalTextbox(
        file_types=["image"],
        file_count="multiple",
        show_label=False,
        placeholder="Ask; add pictures with the clip, or paste them.",
        elem_classes="question",
    )
    with gr.Row():
        stop = gr.Button("Stop", variant="stop", size="sm", elem_id="stop-chat")
        clear = gr.Button("New chat", size="sm")
    with gr.Accordion("Answers and the drawings in them", open=False):
        longest = gr.Slider(
            1, 2048, 256, step=1, precision=0, label="Longest answer", info="In tokens; drawings do not count"
        )
        fields = _drawing_fields(shared, guidance_scale=1.0)

    def kept(part: dict) -> dict:
        """Save a picture to a file, to show it and to read it again in later turns."""
        if part["type"] == "text":
            return part
        return {"type": part["type"], "path": save_pil_to_cache(part["image"], chatbot.GRADIO_CACHE, format="png")}

    def shown_as_text(turns: list[dict]) -> list[dict]:
        """Escape the texts in turns, since the page renders HTML."""
        return [
            turn
            | {
                "content": [
                    part | {"text": html.escape(part["text"], quote=False)} if part["type"] == "text" else part
                    for part in turn["content"]
                ]
            }
            for turn in turns
        ]

    def loaded(turn: dict) -> dict:
        parts = [
            {"type": "image", "image": read_pictures([part["path"]])[0]} if part["type"] == "image" else part
            for part in turn["content"]
        ]
        return {"role": turn["role"], "content": parts}

    def read(message: dict | None, conversation: list[dict]) -> tuple[list[dict], BatchFeature]:
        """Return the turns with a new question, and the model's inputs for them."""
        message = message or {"files": [], "text": ""}
        text = message["text"].strip()
        if not (text or message["files"]):
            raise ValueError("write something, or add a picture")
        shared.check_pictures(len(message["files"]), conversation)
        pictures = [{"type": "image", "image": picture} for picture in read_pictures(message["files"])]
        content = [kept(part) for part in pictures] + ([{"type": "text", "text": text}] if text else [])
        turns = [*conversation, {"role": "user", "content": content}]
        return turns, shared.chat_inputs([loaded(turn) for turn in turns])

    async def chat(message, conversation, longest, *sampling):
        with shown_errors():
            turns, inputs = await asyncio.to_thread(read, message, conversation)
            options = drawing_options(*sampling)
            yield None, shown_as_text(turns), gr.skip()
            async with aclosing(shared.answer(inputs, longest, options)) as answer:
                async for parts in answer:
                    if isinstance(parts, int):
                        waiting = {"role": "assistant", "content": [{"type": "text", "text": _place(parts)}]}
                        yield gr.skip(), shown_as_text([*turns, waiting]), gr.skip()
                        continue
                    shown = await asyncio.to_thread(lambda parts=parts: [kept(part) for part in parts])
                    whole = [part for part in shown if part["type"] != "unfinished"]  # what a stopped answer keeps
                    answered = [*turns, {"role": "assistant", "content": whole}] if whole else gr.skip()
                    so_far = [*turns, {"role": "assistant", "content": shown}] if shown else turns
                    yield gr.skip(), shown_as_text(so_far), answered

    asked = box.submit(chat, [box, conversation, longest, *fields], [box, chatbot, conversation], **event_options)
    stop.click(None, cancels=asked)
    gr.on(
        [clear.click, chatbot.clear],
        lambda: ([], []),
        None,
        [chatbot, conversation],
        cancels=asked,
        concurrency_id="clear",
        show_progress="hidden",
    )


def _draw_tab(shared: SharedModel, event_options: dict) -> None:
    own = min(MAX_COUNT, image_generation(shared.model.generation_config).get("candidates", 1))
    with gr.Row():
        prompt = gr.Textbox(label="Prompt", placeholder="a red circle", scale=4, max_length=MAX_TEXT, elem_id="prompt")
        count = gr.Slider(1, MAX_COUNT, 4, step=1, precision=0, label="Pictures")
        candidates = gr.Slider(
            1,
            MAX_COUNT,
            own if shared.knows_words else 1,
            step=1,
            precision=0,
            label="Candidates",
            info="1: not ranked; more: best first" if shared.knows_words else "The model has no text tower to rank by",
            interactive=shared.knows_words,
        )
    with gr.Row():
        start = gr.Button("Draw", variant="primary", elem_id="draw")
        stop = gr.Button("Stop", variant="stop", elem_id="stop-drawing")
    gallery = gr.Gallery(
        label="Drawings",
        format="png",
        columns=4,
        height=320,
        object_fit="contain",
        buttons=["download", "fullscreen"],
        interactive=False,
        elem_classes="drawings",
    )
    used = gr.Markdown()
    with gr.Accordion("Sampling", open=True):
        fields = _drawing_fields(shared)

    async def draw(prompt, count, candidates, *sampling):
        with shown_errors():
            options = drawing_options(*sampling)
            async with aclosing(shared.draw(prompt, count, options, candidates)) as drawn:
                async for pictures in drawn:
                    if isinstance(pictures, int):
                        yield gr.skip(), _place(pictures)
                    elif isinstance(pictures[0], tuple):
                        scored = [(picture, f"{score:.4f}") for picture, score in pictures]
                        yield scored, f"Seed {options['seed']}, best first"
                    else:
                        yield pictures, f"Seed {options['seed']}"

    inputs = [prompt, count, candidates, *fields]
    drawn = gr.on([start.click, prompt.submit], draw, inputs, [gallery, used], **event_options)
    stop.click(None, cancels=drawn)


def _tokenizer_tab(shared: SharedModel, event_options: dict) -> None:
    codebook_size = shared.model.visual.config.vision_config.codebook_size
    upload = gr.File(label="Picture", file_types=["image"], height=120, elem_id="picture")
    with gr.Row(elem_classes="tokenizer"):
        options = {"format": "png", "interactive": False, "buttons": ["download"], "height": 300}
        seen = gr.Image(label="As the model sees it", **options)
        reconstruction = gr.Image(label="Back from its codes", **options)
        maps = gr.Image(label="Codes, a map for each codebook", **options)
    summary = gr.Markdown(elem_id="summary")

    def needed(path):
        if path is None:
            raise ValueError("upload a picture first")
        return path

    def tokenize(path):
        with shown_errors():
            (picture,) = read_pictures([needed(path)])
            original, result, codes, grid_size = shared.tokenize(picture)
            text = f"{codes.numel()} codes ({codes.shape[1]} positions), PSNR {psnr(original, result):.1f} dB"
            return original, result, code_maps(codes, grid_size, codebook_size), text

    tokenized = upload.upload(tokenize, upload, [seen, reconstruction, maps, summary], **event_options)
    if not shared.knows_words:
        return
    with gr.Row():
        with gr.Column():
            words = gr.Textbox(WORDS, label="Words, one per line", lines=11, max_lines=11, max_length=MAX_TEXT)
            again = gr.Button("Compare")
        nearest = gr.Label(label="Nearest words", num_top_classes=NEAREST, elem_id="nearest")

    def compare(path, words):
        with shown_errors():
            (picture,) = read_pictures([needed(path)])
            listed = dict.fromkeys(line.strip() for line in (words or "").splitlines() if line.strip())
            return shared.compare(picture, list(listed))

    for event in (tokenized.success, again.click):
        event(compare, [upload, words], nearest, **event_options)


def build_app(
    engine: UniTokEngine, page: gr.Blocks, host: str, port: int, queue_size: int, max_upload_mb: int
) -> FastAPI:
    """Build the page's application, without the guard. It runs the engine. For the arguments see `serve`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with running(engine, drop=True):
            yield

    page.queue(max_size=queue_size, api_open=False)
    page.state_session_capacity = MAX_SESSIONS
    fonts = ("system-ui", "sans-serif")
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None, lifespan=lifespan),
        page,
        "/",
        server_name=host,
        server_port=port,
        max_file_size=f"{max_upload_mb}mb",
        allowed_paths=[],
        show_error=False,
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        footer_links=[],
        theme=gr.themes.Soft(font=fonts, font_mono=("ui-monospace", "monospace")),
        css=CSS,
    )
    page.has_launched = True  # otherwise gradio does not check that a path is in its own folder
    return app


def guarded(
    app: FastAPI, page: gr.Blocks, files: KeptFiles, host: str, further_hosts: list[str], max_upload_mb: int
) -> Guard:
    """Put the page's application behind a guard. For the arguments see `serve`."""

    def num_jobs(visitor: str) -> int:
        queue = page._queue
        waiting = [event for queued in queue.event_queue_per_concurrency_id.values() for event in queued.queue]
        at_work = [event for job in queue.active_jobs if job is not None for event in job]
        return sum(visitor_of(event.request.client.host) == visitor for event in waiting + at_work)

    def admit(visitor: str, path: str, body: bytes) -> None:
        try:
            request = json.loads(body, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise Refused(400, "the request is not JSON") from error
        if not isinstance(request, dict) or len(str(request.get("session_hash") or "")) > SESSION_NAME:
            raise Refused(
                400, f"the request must be an object, with a session_hash of at most {SESSION_NAME} characters"
            )
        is_job = path.startswith(("/gradio_api/queue/join", "/gradio_api/call/"))
        if is_job and num_jobs(visitor) >= JOBS_OF_A_VISITOR:
            raise Refused(429, f"{JOBS_OF_A_VISITOR} of your requests are waiting already: wait for one of them")

    max_request = MAX_PICTURES * max_upload_mb * MIB + MULTIPART_HEADERS
    return Guard(app, own_hosts(host), {*further_hosts}, ROUTES, max_request, files.tidy, admit)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def server_of(app: Guard, proxy: str | None = None) -> uvicorn.Server:
    """Create the HTTP server of an application; for `proxy` see `serve`."""
    config = uvicorn.Config(
        app,
        ws="none",
        log_level="warning",
        proxy_headers=proxy is not None,
        forwarded_allow_ips=proxy,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=1,
        server_header=False,
    )
    return uvicorn.Server(config)


def serve(
    engine: UniTokEngine,
    processor,
    title: str,
    folder: str,
    host: str,
    port: int,
    queue_size: int,
    max_upload_mb: int,
    max_kept_mb: int,
    further_hosts: list[str],
    proxy: str | None,
) -> None:
    """Serve the page until SIGINT or SIGTERM.

    Args:
        engine: engine of the model.
        processor: processor of the same model.
        title: see `build_page`.
        folder: gradio's folder of files.
        host: address to listen on.
        port: port to listen on.
        queue_size: number of requests that may wait; the next one is refused.
        max_upload_mb: size limit of a file, in MiB.
        max_kept_mb: size limit of all uploads and drawings together, in MiB; the oldest are deleted first.
        further_hosts: other names by which browsers reach the server.
        proxy: address of a reverse proxy that is trusted to name visitors in `X-Forwarded-For`.

    Raises:
        ValueError: see `listen`.
    """
    page = build_page(SharedModel(engine, processor), title)
    files = KeptFiles(folder, UPLOADS_KEPT, max_kept_mb * MIB)
    app = guarded(
        build_app(engine, page, host, port, queue_size, max_upload_mb), page, files, host, further_hosts, max_upload_mb
    )
    with listen(host, port) as listening, files.tidied(TIDY_EVERY):
        print(f"Running on {url_of(host, port)}", flush=True)
        server_of(app, proxy).run([listening])
