"""The web page and its three tabs (chat, drawings, tokenizer), on gradio."""

import asyncio
import html
import random
from contextlib import aclosing, contextmanager

import gradio as gr
import torch
from gradio.processing_utils import save_pil_to_cache
from transformers import BatchFeature

from .drawing_unitok import image_generation
from .inference import psnr, sampling_options
from .serving import QueueFull
from .sheet import COLORS, SHAPES
from .web_model import MAX_COUNT, MAX_TEXT, SharedModel, code_maps, read_pictures


NEAREST = 8
JOBS_AT_WORK = 32  # running jobs of all visitors; gradio's own limit is 40
WORDS = "\n".join(f"a {color} {shape}" for color in COLORS for shape in SHAPES)
CSS = """
.chat .image-frame img {width: 128px !important; height: 128px !important; object-fit: contain}
.chat button[title="Share"] {display: none}
.drawings img, .tokenizer img {width: 100%; height: 100%; object-fit: contain}
"""


def drawing_options(
    guidance: float, plausibility: float, temperature: float, top_k: int, top_p: float, seed: int
) -> dict:
    """Convert the page's fields to options of `generate_image_codes`.

    Temperature 0 means greedy drawing, a seed below 0 a random seed.

    Raises:
        ValueError: a field is empty.
    """
    fields = {"guidance": guidance, "plausibility": plausibility, "temperature": temperature}
    fields |= {"top-k": top_k, "top-p": top_p, "seed": seed}
    if empty := [name for name, value in fields.items() if value is None]:
        raise ValueError(f"{' and '.join(empty)} must be given")
    seed = random.SystemRandom().randrange(2**31) if seed < 0 else seed
    options = {"guidance_scale": guidance, "plausibility": plausibility, "seed": seed, "do_sample": temperature > 0}
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
            gr.Slider(0, 1, values["plausibility"], step=0.01, label="Plausibility", info="0: all codes"),
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
