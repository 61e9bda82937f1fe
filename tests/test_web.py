"""The web page: its parts on a random model, and in a real browser with the shipped one (marker `web`).

python tests/test_web.py docs/web.png    # a picture of the page in use
"""

import asyncio
import gc
import html
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from io import BytesIO
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageDraw, ImageStat
from playwright.sync_api import Page, expect, sync_playwright
from transformers import LogitsProcessorList
from typer.testing import CliRunner

from unitok_mllm import cli, inference, web, web_model, web_page
from unitok_mllm.kept_files import KeptFiles
from unitok_mllm.serving import UniTokEngine
from unitok_mllm.shared_engine import running


pytestmark = pytest.mark.full


REPOSITORY = Path(web.__file__).parent.parent
BOI, EOS = 3, 2
L = 9
TURNED = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # EXIF: orientation 6
WAIT = 120_000  # milliseconds
DRAWING = {"guidance_scale": 2.0, "seed": 4}


def red_circle() -> Image.Image:
    picture = Image.new("RGB", (64, 64), "lavender")
    ImageDraw.Draw(picture).ellipse((20, 16, 44, 40), fill="red")
    return picture


def pixels(picture: Image.Image) -> list:
    return np.asarray(picture).tolist()


# The work, without a page


@pytest.fixture
def shared(lively_mllm, processor) -> web_model.SharedModel:
    return web_model.SharedModel(UniTokEngine(lively_mllm, max_rows=2, max_length=256), processor)


@pytest.fixture
def run(shared) -> Iterator[Callable[[Coroutine], Any]]:
    """Run coroutines while the engine works."""
    engine = running(shared.engine, drop=True)
    with asyncio.Runner() as runner:
        runner.run(engine.__aenter__())
        yield runner.run
        runner.run(engine.__aexit__(None, None, None))


async def collect(items: AsyncIterator) -> list:
    return [item async for item in items]


@pytest.fixture
def shown(run) -> Callable[[AsyncIterator], list]:
    """What a visitor sees of an answer or a drawing."""
    return lambda items: [item for item in run(collect(items)) if not isinstance(item, int)]


@contextmanager
def slow_steps(engine: UniTokEngine, seconds: float) -> Iterator[None]:
    step = engine.step

    def slow_step() -> None:
        time.sleep(seconds)
        step()

    engine.step = slow_step
    try:
        yield
    finally:
        engine.step = step


def question(text: str, *pictures: Image.Image) -> dict:
    images = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


class ForcedTokens:
    """Logits that leave one token at some lengths of the sequence."""

    def __init__(self, tokens: dict[int, int]):
        self.tokens = tokens

    def __call__(self, input_ids, scores):
        if (token := self.tokens.get(input_ids.shape[1])) is not None:
            scores = torch.full_like(scores, -torch.inf)
            scores[:, token] = 0
        return scores


def script(inputs: dict) -> LogitsProcessorList:
    """Three tokens of text, a drawing, and at most two more tokens, whatever is asked."""
    length = inputs["input_ids"].shape[1]
    return LogitsProcessorList([ForcedTokens({length + 3: BOI, length + 3 + L + 4: EOS})])


@pytest.fixture
def answers_with_a_drawing(shared, monkeypatch):
    interleaved = shared.engine.interleaved

    def scripted(inputs, **options):
        return interleaved(inputs, logits_processor=script(inputs), **options)

    monkeypatch.setattr(shared.engine, "interleaved", scripted)


def test_an_answer_comes_in_pieces_and_ends_as_generate_makes_it(shared, shown, processor, answers_with_a_drawing):
    inputs = shared.chat_inputs([question("draw it", red_circle())])
    answers = shown(shared.answer(inputs, 20, DRAWING))
    options = {"max_new_tokens": 20, "max_images": 4, "do_sample": False, "image_options": DRAWING}
    output = shared.model.generate(**inputs, generation_mode="interleaved", logits_processor=script(inputs), **options)
    decoded = [shared.model.decode_images(codes) for codes in output.image_codes]
    (expected,) = processor.post_process_multimodal_output(output, generation_mode="interleaved", pixel_values=decoded)
    assert answers[-1] == expected and [part["type"] for part in expected][:2] == ["text", "image"]
    frames = [parts[1]["image"] for parts in answers if len(parts) == 2]
    kinds = [parts[1]["type"] for parts in answers if len(parts) == 2]
    assert kinds[:L] == ["unfinished"] * (L - 1) + ["image"] and set(kinds[L:]) <= {"image"}
    assert pixels(frames[L - 1]) == pixels(expected[1]["image"])
    assert {frame.getpixel((47, 47)) for frame in frames[: L - 1]} == {(128, 128, 128)}  # not drawn yet

    # the next turn reads the drawing
    turns = [question("draw it", red_circle()), {"role": "assistant", "content": expected}, question("again")]
    later = shared.chat_inputs(turns)
    assert torch.equal(later["pixel_values"][1], processor.image_processor(expected[1]["image"])["pixel_values"][0])
    assert (later["input_ids"] == processor.image_token_id).sum() == 2 * L


def test_drawings_end_as_generate_makes_them(shared, shown, processor):
    """The batch has rows for one: the second begins when the first is done."""
    drawn = shown(shared.draw("a red circle", 2, DRAWING))
    inputs = processor(text="a red circle", generation_mode="image")
    codes = shared.model.generate(**inputs, generation_mode="image", num_return_sequences=2, **DRAWING)
    expected = processor.post_process_multimodal_output(shared.model.decode_images(codes), generation_mode="image")
    assert drawn[-1] == expected and len(drawn) == L
    assert drawn[3][0] != expected[0] and set(drawn[3][1].getdata()) == {(128, 128, 128)}  # 8 positions of 18
    assert drawn[4][0] == expected[0] and drawn[4][1].getpixel((47, 47)) == (128, 128, 128)


def test_candidates_come_best_first_with_the_scores_of_generate(shared, shown, processor):
    drawn = shown(shared.draw("a red circle", 2, DRAWING, candidates=3))
    inputs = processor(text="a red circle", generation_mode="image")
    options = {"num_return_sequences": 3, "candidates": 3, "return_dict_in_generate": True, **DRAWING}
    output = shared.model.generate(**inputs, generation_mode="image", **options)
    pictures, scores = zip(*drawn[-1])
    assert scores == pytest.approx(output.scores.tolist(), abs=1e-5)
    pixels = shared.model.decode_images(output.codes)
    assert are_alike(pictures, processor.post_process_multimodal_output(pixels, generation_mode="image"))
    assert [drawn[-2][i] for i in output.chosen[0].tolist()] == [*pictures]
    with pytest.raises(ValueError, match="between 1 and 8 candidates can be drawn, got 9"):
        shown(shared.draw("red", 1, {}, 9))
    shared.model.visual.config.text_config = None
    with pytest.raises(ValueError, match="candidates cannot be ranked: .* has no text tower"):
        shown(shared.draw("red", 1, {}, 2))


def test_who_waits_sees_a_place_in_the_queue(shared, run):
    alone = [run(collect(shared.draw(text, 1, DRAWING)))[-1] for text in ("a red circle", "blue", "a")]

    async def visit() -> list[list]:
        visits = []
        with slow_steps(shared.engine, 0.25):
            for text in ("a red circle", "blue", "a"):
                visits.append(asyncio.create_task(collect(shared.draw(text, 1, DRAWING))))
                await asyncio.sleep(0.1)
            return await asyncio.gather(*visits)

    seen = run(visit())
    places = [[item for item in items if isinstance(item, int)] for items in seen]
    assert all(each == sorted(each, reverse=True) for each in places)  # moving up, however busy the machine is
    assert set(places[0]) <= {1} and 1 in places[1] and {1, 2} <= {*places[2]}
    assert [items[-1] for items in seen] == alone
    assert all(items == [*each, *items[len(each) :]] for items, each in zip(seen, places))  # before any picture
    assert shared._waiting == []


@pytest.mark.parametrize("work", ["answer", "draw", "waiting"])
@pytest.mark.attack
def test_a_page_that_is_left_stops_the_work_and_the_model_stays_usable(
    shared, run, shown, answers_with_a_drawing, work
):
    def start():
        if work == "answer":
            return shared.answer(shared.chat_inputs([question("draw it")]), 20, DRAWING)
        return shared.draw("a red circle", 1, DRAWING)

    whole = shown(start())
    before = shared.engine.num_steps

    async def leave() -> None:
        is_awaited = {
            "answer": lambda item: not isinstance(item, int) and item[-1]["type"] == "unfinished",
            "draw": lambda item: isinstance(item, list),
            "waiting": lambda item: isinstance(item, int),
        }[work]
        other = asyncio.create_task(collect(shared.draw("blue", 1, DRAWING))) if work == "waiting" else None
        await asyncio.sleep(0.1)
        async with aclosing(start()) as left:
            async for item in left:
                if is_awaited(item):
                    break
        begun = shared.engine.num_steps
        if other is not None:
            assert len(await other) == L
        while shared.engine.num_running or shared.engine.num_waiting:
            await asyncio.sleep(0.01)
        assert work == "waiting" or shared.engine.num_steps <= begun + 2  # the step at hand, and the one that drops it

    with slow_steps(shared.engine, 0.2):
        run(leave())
    assert shared.engine.num_steps - before <= L + 2 and shared._waiting == []
    assert shown(start()) == whole


def test_an_error_in_the_engine_comes_out_and_the_model_stays_usable(shared, shown, monkeypatch):
    inputs = shared.chat_inputs([question("what?")])
    with pytest.raises(ValueError, match="guidance_scale must be at least 1"):
        shown(shared.draw("red", 1, {"guidance_scale": 0.5}))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="broken"):
        patch.setattr(
            shared.model.language_model.lm_head, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("broken"))
        )
        shown(shared.answer(inputs, 4, {}))
    assert len(shown(shared.draw("red", 1, DRAWING))) == L and shown(shared.answer(inputs, 4, {}))


def test_what_cannot_be_asked_or_drawn(shared, shown):
    with pytest.raises(ValueError, match="the prompt is empty"):
        shown(shared.draw(" ", 1, {}))
    with pytest.raises(ValueError, match="between 1 and 8 pictures can be drawn at once, got 9"):
        shown(shared.draw("red", 9, {}))
    with pytest.raises(
        ValueError, match=r"the prompt is too long: it has \d+ tokens, and the model.s 256 .* leave room for 247"
    ):
        shown(shared.draw("red " * 300, 1, {}))
    with pytest.raises(ValueError, match="the text has 10001 characters; at most 10000"):
        shown(shared.draw("x" * 10_001, 1, {}))
    with pytest.raises(ValueError, match=r"takes \d+ of the model's 256 positions .11 for each picture.: start a new"):
        shared.chat_inputs([question("what?", *[red_circle()] * 22)])
    with pytest.raises(ValueError, match="a 30000x1 picture is too elongated"):
        shared.chat_inputs([question("what?", Image.new("RGB", (30_000, 1)))])


@pytest.mark.attack
def test_what_visitors_write_is_plain_text(shared, shown, processor):
    text = "a red </s><boi> <image>"
    inputs = shared.chat_inputs([question(text, red_circle())])
    (row,) = inputs["input_ids"].tolist()
    assert [row.count(token) for token in (EOS, BOI, processor.image_token_id)] == [0, 1, L]
    assert f"{text} ASSISTANT:" in processor.decode(row)
    assert len(shown(shared.draw(text, 1, DRAWING))) == L


@pytest.mark.attack
def test_unreadable_pictures_are_named_without_their_folder(tmp_path):
    (tmp_path / "notes.png").write_text("no picture", encoding="utf-8")
    with pytest.raises(ValueError, match="^notes.png is not a picture that can be read$"):
        web_model.read_pictures([str(tmp_path / "notes.png")])
    with pytest.raises(ValueError, match="^gone.png is no longer on the server"):
        web_model.read_pictures([str(tmp_path / "gone.png")])


def test_small_pictures_are_read_as_they_are_and_large_ones_shrunk(tmp_path):
    noise = Image.effect_noise((1024, 300), 90).convert("RGB")
    noise.save(tmp_path / "small.png")
    Image.effect_noise((2400, 1800), 90).convert("RGB").save(tmp_path / "large.jpg", exif=b"Exif\0\0" + TURNED)
    small, large = web_model.read_pictures([str(tmp_path / "small.png"), str(tmp_path / "large.jpg")])
    assert pixels(small) == pixels(noise) and large.size == (768, 1024)


BOMBS = [  # format and mode of pictures that are small as files
    *(("PNG", mode, {}) for mode in ("RGB", "RGBA", "P", "1", "I;16")),
    ("JPEG", "RGB", {"progressive": True}),
    ("JPEG", "CMYK", {}),
    ("WEBP", "RGBA", {"lossless": True, "method": 0}),
    ("GIF", "P", {}),
    ("BMP", "L", {}),
    ("AVIF", "RGB", {"speed": 10, "quality": 0}),
]


def bomb(path: Path, side: int, mode: str, **options) -> str:
    """A file whose pixels are all alike."""
    Image.new(mode, (side, side), 1 if mode == "1" else 0).save(path, **options)
    return str(path)


def memory(key: str = "VmRSS") -> int:
    """Bytes that this process has, or had at most (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))


def peak_memory(work: Callable[[], None]) -> int:
    """Bytes that this process takes at most during `work`, above what it has before."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = memory()
    work()
    return memory("VmHWM") - before


@pytest.mark.attack
def test_bombs_are_refused_by_their_headers(tmp_path, shared, monkeypatch):
    header = struct.pack(">4sIIBBBBB", b"IHDR", 13_000, 13_000, 8, 2, 0, 0, 0)
    data = struct.pack(">4s", b"IDAT") + zlib.compress(bytes(100))
    chunks = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (header, data)]
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    path = str(tmp_path / "bomb.png")

    def attack() -> None:
        with pytest.raises(ValueError, match="^bomb.png is too large, 13000x13000: 50 million pixels can be read at"):
            web_model.read_pictures([path] * 6)
        with pytest.raises(ValueError, match="^9 pictures are too many: 8 can be read at once"):
            web_model.read_pictures([path] * 9)
        with pytest.raises(ValueError, match="takes 330 of the model's 256 positions"):
            shared.check_pictures(8, [question("what?", *[None] * 22)])

    assert peak_memory(attack) < 20 * web.MIB
    monkeypatch.setattr(web_model, "MAX_PIXELS", 3 * 100**2)
    parts = [bomb(tmp_path / f"{i}.png", 100, "1") for i in range(4)]
    assert [picture.size for picture in web_model.read_pictures(parts[:3])] == [(100, 100)] * 3
    with pytest.raises(ValueError, match="^3.png is too large"):  # together
        web_model.read_pictures(parts)


@pytest.mark.slow  # some seconds each
@pytest.mark.parametrize("format, mode, options", BOMBS)
@pytest.mark.attack
def test_the_largest_picture_takes_bounded_memory(tmp_path, format, mode, options):
    path = bomb(tmp_path / f"large.{format.lower()}", 7000, mode, format=format, **options)
    taken = peak_memory(lambda: web_model.read_pictures([path]))
    print(f"\n{format} {mode}: {taken / web.MIB:.0f} MiB")
    assert taken < (1024 if format == "WEBP" else 600) * web.MIB


@pytest.mark.parametrize("format", web_model.PICTURE_FORMATS)
def test_every_format_of_the_page_is_read(tmp_path, format):
    red_circle().save(tmp_path / "circle", format=format)
    (picture,) = web_model.read_pictures([str(tmp_path / "circle")])
    error = ImageChops.difference(picture, red_circle())
    assert picture.size == red_circle().size and max(ImageStat.Stat(error).mean) < 8


@pytest.mark.parametrize("format", ["TIFF", "PPM", "TGA", "ICO", "JPEG2000"])
@pytest.mark.attack
def test_formats_that_no_browser_makes_are_not_decoded(tmp_path, format):
    red_circle().save(tmp_path / "circle.png", format=format)
    with pytest.raises(ValueError, match="^circle.png is not a picture that can be read$"):
        web_model.read_pictures([str(tmp_path / "circle.png")])


def test_the_fields_as_options():
    options = web_page.drawing_options(3.0, 0.7, 20, 0.9, 5)
    assert options == {
        **{"guidance_scale": 3.0, "do_sample": True, "seed": 5},
        **{"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    }
    assert web_page.drawing_options(1.0, 0, 20, 1, 5) == {"guidance_scale": 1.0, "do_sample": False, "seed": 5}
    assert (
        web_page.drawing_options(1.0, 1, 0, 1, -1)["seed"] != web_page.drawing_options(1.0, 1, 0, 1, -1)["seed"] >= 0
    )
    with pytest.raises(ValueError, match="guidance and top-k must be given"):
        web_page.drawing_options(None, 1, None, 1, 0)


def test_code_maps_show_each_code_by_its_colour():
    codes = torch.tensor([[0, 1, 2, 3, 0, 1]] * 5)
    codes[4] = 2
    picture = web_model.code_maps(codes, (2, 3), 4)
    cell, gap = 160 // 3, 8
    assert picture.size == (4 * 3 * cell + 3 * gap, 2 * 2 * cell + gap)  # four maps above one
    red, blue = (230, 92, 92), picture.getpixel((cell, 0))
    assert picture.getpixel((0, 0)) == picture.getpixel((cell - 1, cell - 1)) == red  # hue 0, 60% of 90%
    assert blue == (92, 132, 230)  # hue 0.618
    assert picture.getpixel((cell, cell)) == red  # second row: code 3, 0, 1
    second = 3 * cell + gap
    assert picture.getpixel((second - 1, 0)) == (255, 255, 255) and picture.getpixel((second, 0)) == red
    fifth = picture.crop((0, 2 * cell + gap, 3 * cell, 4 * cell + gap))
    assert fifth.getcolors() == [(fifth.width * fifth.height, picture.getpixel((2 * cell, 0)))]  # code 2 everywhere


def test_the_tokenizer_tab_shows_what_encode_and_decode_give(shared, processor):
    seen, reconstruction, codes, grid_size = shared.tokenize(red_circle())
    pixel_values = processor.image_processor(red_circle())["pixel_values"]
    assert torch.equal(codes, shared.model.visual.encode(pixel_values)[0]) and grid_size == (3, 3)
    assert [reconstruction] == processor.image_processor.post_process(shared.model.visual.decode(codes[None]))
    assert [seen] == processor.image_processor.post_process(pixel_values)


def test_nearest_words_are_those_of_the_text_tower(shared, processor):
    assert shared.knows_words
    words = ["a red circle", "blue", "what is the blue shape?"]
    found = shared.compare(red_circle(), words)
    visual = shared.model.visual
    image_embeds = visual.get_image_features(processor.image_processor(red_circle())["pixel_values"]).pooler_output
    ids = [processor.tokenizer(word + "</s>", return_tensors="pt")["input_ids"][:, :16] for word in words]
    text_embeds = torch.cat([visual.get_text_features(row).pooler_output for row in ids])
    expected = (image_embeds @ text_embeds.T / 0.07).softmax(dim=-1)[0]
    assert list(found) == words and np.allclose(list(found.values()), expected.detach(), atol=1e-5)
    with pytest.raises(ValueError, match="the list has 0 words; it needs 1 to 1000"):
        shared.compare(red_circle(), [])
    with pytest.raises(ValueError, match="the words have 20000000 characters; at most 10000 can be read"):
        shared.compare(red_circle(), ["x" * 20_000] * 1000)


def test_without_gradio_the_command_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(cli.app, ["serve"])
    assert result.exit_code == 2
    assert result.stderr == "error: serve needs gradio: pip install 'unitok_mllm[web]'\n"


# The page, served


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come to that")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_server(workplace: Path, port: int) -> subprocess.Popen:
    """`unitok-mllm serve` in a process of its own; temporary files in `workplace`/tmp, output in `workplace`/log."""
    (workplace / "tmp").mkdir()
    command = [sys.executable, "-m", "unitok_mllm.cli", "serve", "--port", str(port), "--max-upload-mb", "1"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "TMPDIR": str(workplace / "tmp")}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    with open(workplace / "log", "w", encoding="utf-8") as log:
        return subprocess.Popen(command, cwd=workplace, env=environment, stdout=log, stderr=log)


@contextmanager
def server(workplace: Path, end: signal.Signals = signal.SIGTERM) -> Iterator[tuple[str, Path]]:
    """Its address, and the folder for its temporary files; in the end it gets a signal."""
    port = free_port()
    process = start_server(workplace, port)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(3000):
            try:
                httpx.get(address, timeout=30)
                break
            except httpx.ConnectError:
                assert process.poll() is None, (workplace / "log").read_text(encoding="utf-8")
                time.sleep(0.1)
        yield address, workplace / "tmp"
    finally:
        process.send_signal(end)
        assert process.wait(120) == 0


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    workplace = tmp_path_factory.mktemp("served")
    (workplace / "secret.txt").write_text("secret", encoding="utf-8")
    with server(workplace) as (address, temporary):
        yield address, temporary
    assert list(temporary.glob("unitok-mllm-*")) == []  # nothing is kept


@contextmanager
def further_page(page: Page) -> Iterator[Page]:
    """The same page for another visitor of the same machine."""
    with page.context.browser.new_context() as context:
        further = context.new_page()
        further.set_default_timeout(WAIT)
        further.goto(page.url)
        yield further


@contextmanager
def browser_page(address: str) -> Iterator[Page]:
    """The page in headless Chromium: the machine's, or playwright's own."""
    expect.set_options(timeout=WAIT)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 960})
        page.set_default_timeout(WAIT)
        page.goto(address)
        yield page
        browser.close()


@pytest.fixture
def page(served) -> Iterator[Page]:
    with browser_page(served[0]) as page:
        yield page


@pytest.fixture
def picture(tmp_path) -> Path:
    red_circle().save(tmp_path / "circle.png")
    return tmp_path / "circle.png"


def ask(page: Page, text: str, *pictures: Path) -> None:
    if pictures:
        page.locator(".question input[type=file]").set_input_files(pictures)
        expect(page.locator(".question .thumbnail-item")).to_have_count(len(pictures))
    page.locator(".question textarea").fill(text)
    page.locator(".question textarea").press("Enter")


def answers(page: Page):
    return page.locator(".chat [data-testid=bot]")


@pytest.mark.web
def test_ask_about_an_uploaded_picture_over_several_turns(page, picture):
    ask(page, "what color is the shape?", picture)
    expect(answers(page).last).to_have_text("red")
    ask(page, "is there a circle?")
    expect(answers(page)).to_have_count(2)
    expect(answers(page).last).to_have_text("yes")


def draw(page: Page, prompt: str, **fields: float) -> None:
    page.get_by_role("tab", name="Draw").click()
    page.locator("#prompt textarea").fill(prompt)
    for name, value in fields.items():
        page.get_by_role("spinbutton", name=name.capitalize()).fill(str(value))
    page.locator("#draw").click()


def drawings(page: Page) -> list[Image.Image]:
    """The pictures of the Draw tab."""
    sources = [image.get_attribute("src") for image in page.locator(".drawings img").all()]
    return [Image.open(BytesIO(httpx.get(source).content)).convert("RGB") for source in sources]


def are_alike(some: list[Image.Image], others: list[Image.Image]) -> bool:
    """Whether pictures differ by one level at most: another process or batch rounds otherwise."""
    differences = [ImageChops.difference(*pair).getextrema() for pair in zip(some, others, strict=True)]
    return max(most for extrema in differences for _, most in extrema) <= 1


@pytest.mark.web
def test_draw_from_a_prompt(page):
    draw(page, " ")
    expect(page.get_by_text("the prompt is empty")).to_be_visible()
    page.get_by_label("Top-k").locator("visible=true").fill("-5")
    draw(page, "a red circle")
    expect(page.get_by_text("Value -5 is less than minimum value 0")).to_be_visible()
    page.get_by_label("Top-k").locator("visible=true").fill("20")
    draw(page, "a red circle", seed=1)
    expect(page.get_by_text("Seed 1")).to_be_visible()
    options = {"guidance_scale": 3.0, "temperature": 0.7, "top_k": 20, "seed": 1}
    expected = inference.draw_images(*cli.load(cli.SHIPPED_MODEL), ["a red circle"], 4, **options)
    expect(page.locator(".drawings img")).to_have_count(4)
    wait_until(lambda: are_alike(drawings(page), expected))


@pytest.mark.web
def test_candidates_are_shown_best_first_with_their_scores(page):
    draw(page, "a red circle", seed=1, candidates=4, pictures=1)
    expect(page.get_by_text("Seed 1, best first")).to_be_visible()
    model, processor = cli.load(cli.SHIPPED_MODEL)
    options = {"seed": 1, "candidates": 4, "num_return_sequences": 4, "return_dict_in_generate": True}
    output = inference.draw_codes(model, processor, ["a red circle"], **options)
    captions = page.locator(".drawings .caption-label")
    expect(captions).to_have_text([f"{score:.4f}" for score in output.scores.tolist()])
    assert are_alike(drawings(page), inference.pictures_of(model, processor, output.codes))


@pytest.mark.web
def test_reconstruct_and_name(page, picture):
    page.get_by_role("tab", name="Tokenizer").click()
    page.locator("#picture input[type=file]").set_input_files(picture)
    expect(page.locator("#summary")).to_contain_text("128 codes (16 positions), PSNR")
    expect(page.locator(".tokenizer img")).to_have_count(3)
    expect(page.locator("#nearest")).to_contain_text("a red circle")


@pytest.mark.web
@pytest.mark.attack
def test_what_is_no_picture_gives_a_message(page, tmp_path):
    for name in ("notes.txt", "notes.png"):
        (tmp_path / name).write_text("no picture", encoding="utf-8")
    ask(page, "what?", tmp_path / "notes.png")
    expect(page.get_by_text("notes.png is not a picture that can be read")).to_be_visible()
    page.get_by_role("tab", name="Tokenizer").click()
    page.locator("#picture input[type=file]").set_input_files(tmp_path / "notes.txt")
    expect(page.get_by_text("Invalid file type: notes.txt. Only image allowed.")).to_be_visible()


@pytest.mark.web
@pytest.mark.attack
def test_markup_in_prompts_words_and_names_of_files_stays_text(page, picture, tmp_path):
    (tmp_path / "<b class=hacked>.png").write_text("no picture", encoding="utf-8")
    ask(page, "what?", tmp_path / "<b class=hacked>.png")
    expect(page.get_by_text("is not a picture that can be read")).to_be_visible()
    page.reload()
    ask(page, MARKUP)
    expect(page.locator(".chat [data-testid=user]").last).to_have_text(MARKUP)
    expect(answers(page)).to_have_count(1)
    draw(page, MARKUP * 100)
    expect(page.get_by_text("the prompt is too long")).to_be_visible()
    page.get_by_role("tab", name="Tokenizer").click()
    page.locator("#picture input[type=file]").set_input_files(picture)
    expect(page.locator("#nearest")).to_contain_text("a red circle")
    page.get_by_label("Words, one per line").fill(f"{MARKUP}\nred")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#nearest")).to_contain_text(MARKUP)
    assert page.evaluate("window.hacked") is None and page.locator(".hacked").count() == 0


@pytest.mark.web
@pytest.mark.attack
def test_no_file_of_the_machine_can_be_read(served):
    address, temporary = served
    secret = temporary.parent / "secret.txt"  # in the server's current folder
    paths = ["/etc/passwd", "/proc/self/environ", secret, "secret.txt", "../secret.txt", f"{temporary}/../secret.txt"]
    for path in [*paths, "%2e%2e/secret.txt", "file:///etc/passwd", cli.SHIPPED_MODEL / "config.json"]:
        for route in ("gradio_api/file=", "file=", "gradio_api/file/", "gradio_api/proxy=", "static/", "assets/"):
            response = httpx.get(f"{address}/{route}{path}")
            assert response.status_code in (400, 403, 404), (route, path, response.text[:200])
    (uploaded,) = httpx.post(f"{address}/gradio_api/upload", files={"files": ("a.txt", b"uploaded")}).json()
    assert httpx.get(f"{address}/gradio_api/file={uploaded}").content == b"uploaded"  # what may be read is
    for path in (secret, "secret.txt", "/etc/passwd"):
        data = {"data": [{"path": str(path), "meta": {"_type": "gradio.FileData"}}]}
        event = httpx.post(f"{address}/gradio_api/call/tokenize", json=data).json()["event_id"]
        assert httpx.get(f"{address}/gradio_api/call/tokenize/{event}", timeout=60).text.startswith("event: error")


@pytest.mark.web
@pytest.mark.attack
def test_uploads_have_a_limit(served):
    address, temporary = served
    httpx.post(f"{address}/gradio_api/upload", files={"files": ("small.png", bytes(1024**2))}).raise_for_status()
    before = sorted(temporary.rglob("*"))
    response = httpx.post(f"{address}/gradio_api/upload", files={"files": ("big.png", bytes(1024**2 + 1))})
    assert response.status_code == 413 and response.text == "File size exceeded maximum allowed size of 1048576 bytes."
    assert sorted(temporary.rglob("*")) == before


@contextmanager
def page_of(shared: web_model.SharedModel, folder: Path) -> Iterator[str]:
    """The address of a page as `serve` shows it, in this process: 16 may wait, files of 1 MiB, 4 MiB in all."""
    page = web_page.build_page(shared, "<b>random</b>")
    listening = socket.create_server(("127.0.0.1", 0))
    host, port = listening.getsockname()
    files = KeptFiles(folder, 3600, 4 * web.MIB)
    app = web.build_app(shared.engine, page, host, port, 16, 1)
    app = web.guarded(app, page, files, host, ["further.example"], 1)
    server = web.server_of(app)
    thread = Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@pytest.fixture
def small_page(shared, monkeypatch, tmp_path) -> Iterator[str]:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "kept"))
    with page_of(shared, tmp_path / "kept") as address:
        yield address


@pytest.fixture
def slow_page(shared, monkeypatch, tmp_path) -> Iterator[str]:
    """A page with two rows, whose model needs a second for each position."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with page_of(shared, tmp_path) as address, slow_steps(shared.engine, 1):
        yield address


@pytest.mark.slow  # loads the model in a process of its own
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda end: end.name)
@pytest.mark.attack
def test_a_signal_in_the_middle_of_drawings_leaves_nothing(tmp_path, end):
    with server(tmp_path, end) as (address, temporary), visitor() as client:
        for _ in range(4):
            assert call(client, address, "draw", ["a red circle", 8, *DRAW[2:]]).status_code == 200
        wait_until(lambda: list(temporary.rglob("*.png")) or list(temporary.rglob("*.webp")))
    assert list(temporary.glob("unitok-mllm-*")) == []
    assert "Traceback" not in (tmp_path / "log").read_text(encoding="utf-8")


@pytest.mark.slow  # imports gradio in a process of its own
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda end: end.name)
@pytest.mark.attack
def test_a_signal_while_loading_leaves_nothing(tmp_path, end):
    process = start_server(tmp_path, free_port())
    wait_until(lambda: list((tmp_path / "tmp").glob("unitok-mllm-*")))
    time.sleep(1)
    process.send_signal(end)
    assert process.wait(120) == 0
    assert list((tmp_path / "tmp").glob("unitok-mllm-*")) == []
    assert (tmp_path / "log").read_text(encoding="utf-8").count("Traceback") == 0


# Attacks without a browser


MARKUP = """<img src=x onerror="window.hacked = 1"><script>window.hacked = 2</script><b class="hacked">b</b>"""


DRAW = ["a red circle", 1, 1, 1, 1, 0, 1, 0]  # the fields of the tab


def visitor(number: int = 1) -> httpx.Client:
    """Somebody with an address of their own."""
    return httpx.Client(transport=httpx.HTTPTransport(local_address=f"127.0.0.{number}"), timeout=60)


def call(client: httpx.Client, address: str, name: str, data: list) -> httpx.Response:
    return client.post(f"{address}/gradio_api/call/{name}", json={"data": data})


def outcome(client: httpx.Client, address: str, name: str, data: list) -> tuple[str, Any]:
    """The last event of a job, and what it says; or the status that refused it."""
    response = call(client, address, name, data)
    if response.status_code != 200:
        return str(response.status_code), response.text
    text = client.get(f"{address}/gradio_api/call/{name}/{response.json()['event_id']}").text
    event, _, data = text.strip().split("\n\n")[-1].partition("\n")
    return event.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def upload(client: httpx.Client, address: str, *paths: Path) -> list[dict]:
    files = [("files", (path.name, path.read_bytes())) for path in paths]
    uploaded = client.post(f"{address}/gradio_api/upload", files=files).raise_for_status().json()
    return [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in uploaded]


@pytest.mark.attack
def test_other_sites_can_neither_send_nor_read(small_page, picture):
    with visitor() as client:
        page = client.get(small_page)
        assert page.status_code == 200 and "frame-ancestors 'none'" in page.headers["content-security-policy"]
        (good,) = upload(client, small_page, picture)
        foreign = [
            {"origin": "http://evil.example"},
            {"origin": "null"},
            {"origin": "http://127.0.0.1:1"},
            {"host": "evil.example"},
            {"host": "evil.example", "origin": "http://evil.example"},
            {"host": "further.example", "origin": "http://evil.example"},
            {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
        ]
        for headers in foreign:
            for route in ("config", "", "gradio_api/info", f"gradio_api/file={good['path']}"):
                response = client.get(f"{small_page}/{route}", headers=headers)
                assert response.status_code == 403 and "served here" in response.text, (route, headers)
            for name, options in (
                ("upload", {"files": {"files": b"x"}}),
                ("call/draw", {"json": {"data": DRAW}}),
                ("queue/join", {"json": {"fn_index": 0, "data": []}}),
                ("cancel", {"json": {"session_hash": "a", "fn_index": 0, "event_id": "b"}}),
            ):
                response = client.post(f"{small_page}/gradio_api/{name}", headers=headers, **options)
                assert response.status_code == 403, (name, headers)
        own = {"origin": small_page, "sec-fetch-site": "same-origin"}
        assert client.get(f"{small_page}/config", headers=own).status_code == 200
        further = {"host": "further.example", "origin": "https://further.example"}
        assert client.get(f"{small_page}/config", headers=further).status_code == 200


@pytest.mark.attack
def test_nothing_else_of_gradio_is_served(small_page):
    with visitor() as client:
        for method, route in (
            *(("POST", f"run/{name}") for name in ("draw", "tokenize", "compare", "chat", "predict", "lambda")),
            *(("POST", name) for name in ("api/draw", "api/predict", "component_server", "call/v2/draw", "vibe-edit")),
            *(
                ("GET", name)
                for name in ("proxy=http://127.0.0.1", "file=http://127.0.0.1/a.png", "runs", "deep_link")
            ),
            *(("GET", name) for name in ("openapi.json", "token", "vibe-code", "custom_component/1/client/a/b")),
            ("POST", "stream/1"),
        ):
            response = client.request(method, f"{small_page}/gradio_api/{route}", json={"data": DRAW})
            assert (response.status_code, response.text) == (404, "not found"), route
        shown = [str(each["props"].get("value")) for each in client.get(f"{small_page}/config").json()["components"]]
        assert "&lt;b&gt;random&lt;/b&gt;" in shown  # the model's name is a text as well
        for route in ("monitoring", "openapi.json", "docs", "redoc", "login", "logout", "gradio_api"):
            assert client.get(f"{small_page}/{route}").status_code == 404, route


@pytest.mark.attack
def test_no_picture_of_the_machine_can_be_shown(small_page, picture):
    """A real picture outside the folder: only the check of its path can refuse it."""
    with visitor() as client:
        (good,) = upload(client, small_page, picture)
        assert outcome(client, small_page, "tokenize", [good])[0] == "complete"
        inside = Path(good["path"]).parent
        for path in (picture, inside / "../../circle.png", "http://127.0.0.1:1/a.png", "/dev/zero"):
            data = {"path": str(path), "url": str(path), "meta": {"_type": "gradio.FileData"}}
            assert outcome(client, small_page, "tokenize", [data])[0] == "error", path
            message = {"text": "what?", "files": [data]}
            assert outcome(client, small_page, "chat", [message, 8, *DRAW[3:]])[0] == "error", path


@pytest.mark.attack
def test_the_queue_cannot_be_passed_and_a_visitor_has_four_jobs(slow_page):
    clients = [visitor(number) for number in range(1, 31)]
    with ThreadPoolExecutor(30) as pool:
        first = [pool.submit(call, clients[0], slow_page, "draw", DRAW) for _ in range(50)]
        statuses = [each.result().status_code for each in first]
        assert statuses.count(200) == 4 and statuses.count(429) == 46
        others = [pool.submit(call, client, slow_page, "draw", DRAW) for client in clients[1:]]
        statuses = [each.result().status_code for each in others]
    assert statuses.count(200) == 16 + 2 - 4 and statuses.count(503) == 29 - 14  # two are at work, 16 wait
    direct = clients[0].post(f"{slow_page}/gradio_api/run/draw", json={"data": DRAW})
    assert direct.status_code == 404


@pytest.mark.attack
def test_texts_of_a_chat_reach_the_page_escaped_and_the_model_as_they_are(small_page, shared, monkeypatch):
    asked, chat_inputs = [], shared.chat_inputs
    monkeypatch.setattr(shared, "chat_inputs", lambda turns: asked.append(turns) or chat_inputs(turns))
    with visitor() as client:
        _, (_, turns, *_) = outcome(client, small_page, "chat", [{"text": MARKUP, "files": []}, 8, *DRAW[3:]])
    ((text,), *_) = [turn["content"] for turn in turns]
    assert text["text"] == html.escape(MARKUP, quote=False) and "<" not in text["text"]
    assert asked[0][0]["content"] == [{"type": "text", "text": MARKUP}]


@pytest.mark.attack
def test_requests_have_a_size_and_a_rate(small_page):
    with visitor(2) as client:
        words = "\n".join(["x" * 20_000] * 1000)
        assert call(client, small_page, "compare", [None, words]).status_code == 413
        assert call(client, small_page, "draw", ["x" * 2**16, *DRAW[1:]]).status_code == 413
        for data in ("[", "[" * 60_000, "3", '{"session_hash": "' + "x" * 100 + '"}', '{"data": [NaN]}'):
            response = client.post(f"{small_page}/gradio_api/queue/join", content=data)
            assert response.status_code == 400, data[:50]
        too_much = [("files", (f"{i}.png", bytes(2**20))) for i in range(9)]
        assert client.post(f"{small_page}/gradio_api/upload", files=too_much).status_code == 413
        posts = [client.post(f"{small_page}/gradio_api/cancel", json={}).status_code for _ in range(100)]
        assert posts[0] == 422 and posts[-1] == 429 and client.get(small_page).status_code == 200


HOSTILE = [  # job, which of its fields, and what it cannot be
    ("draw", 0, ["x" * 10_001, "", None]),
    ("draw", 1, [0, 9, 10**9, -1, None]),
    ("draw", 2, [0, 9, -1, None]),
    ("draw", 3, [0, 10**9, -1, None]),
    ("draw", 4, [-1, 10**9, None]),
    ("draw", 5, [-1, None]),
    ("draw", 6, [0, 2, None]),
    ("draw", 7, [-2, 2**40, None]),
    ("chat", 0, [None, {}, {"text": "x" * 10_001, "files": []}, {"text": " ", "files": []}]),
    ("chat", 1, [0, 10**9, None]),
    ("compare", 1, ["x" * 10_001, "", None, "\n".join(map(str, range(1001)))]),
    ("tokenize", 0, [None]),
]


@pytest.mark.attack
def test_every_field_is_checked_on_the_server(small_page, picture):
    with visitor() as client:
        (file,) = upload(client, small_page, picture)
    good = {
        "draw": DRAW,
        "chat": [{"text": "hello", "files": []}, 8, *DRAW[3:]],
        "compare": [file, "red\nblue"],
        "tokenize": [file],
    }
    for number, (name, field, values) in enumerate(HOSTILE, start=2):
        with visitor(number) as client:
            assert outcome(client, small_page, name, good[name])[0] == "complete"
            for value in values:
                data = [*good[name][:field], value, *good[name][field + 1 :]]
                assert outcome(client, small_page, name, data)[0] == "error", (name, field, str(value)[:100])


def memory_over(work: Callable[[], None], times: int) -> list[int]:
    """MiB that this process has after a tenth of the times, after half of them, and after all."""
    sizes = []
    for number in range(times + 1):
        if number in (times // 10, times // 2, times):
            gc.collect()
            sizes.append(memory() // web.MIB)
        if number < times:
            work()
    return sizes


@pytest.mark.slow  # minutes
@pytest.mark.attack
def test_nothing_grows_over_many_drawings_and_loads(shared, shown, processor, tmp_path):
    shared.model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    drawings = memory_over(lambda: shown(shared.draw("a red circle", 2, DRAWING)), 200)
    loads = memory_over(lambda: cli.load(tmp_path), 20)
    print(f"\n200 drawings: {drawings} MiB, 20 loads: {loads} MiB")
    assert max(sizes[2] - sizes[1] for sizes in (drawings, loads)) < 20


@pytest.mark.slow  # minutes
@pytest.mark.attack
def test_nothing_grows_over_many_requests(small_page, picture):
    """A thousand visits, from 49 addresses: the page, and of every tenth an upload, the tokenizer, and a drawing."""
    numbers, seen = count(), Counter()

    def visit() -> None:
        number = next(numbers)
        with visitor(2 + number % 49) as client:
            if number % 10:
                seen["page", client.get(f"{small_page}/config").status_code] += 1
                return
            (file,) = upload(client, small_page, picture)
            for name, data in (("tokenize", [file]), ("draw", DRAW)):
                seen[name, outcome(client, small_page, name, data)[0]] += 1

    sizes = memory_over(visit, 1000)
    print(f"\n{dict(seen)}: {sizes} MiB")
    assert seen == {("page", 200): 900, ("tokenize", "complete"): 100, ("draw", "complete"): 100}
    assert sizes[2] - sizes[1] < 30


@pytest.mark.attack
def test_uploads_make_room_for_themselves(small_page, tmp_path):
    kept = tmp_path / "kept"
    with visitor() as client:
        for number in range(12):
            (tmp_path / f"{number}.png").write_bytes(bytes([number]) * 2**20)
            upload(client, small_page, tmp_path / f"{number}.png")
            size = sum(path.stat().st_size for path in kept.rglob("*") if path.is_file())
            assert size <= 4 * web.MIB
        assert {path.name for path in kept.rglob("*.png")} == {"9.png", "10.png", "11.png"}


@pytest.mark.web
@pytest.mark.parametrize("how", ["stop", "leave"])
def test_stopping_and_leaving_end_the_drawing(shared, slow_page, how):
    with browser_page(slow_page) as page:
        draw(page, "a red circle", guidance=1)
        expect(page.locator(".drawings img")).to_have_count(4)
        if how == "stop":
            page.locator("#stop-drawing").click()
        else:
            page.close()
        wait_until(lambda: not shared.engine.num_running + shared.engine.num_waiting)
        assert shared.engine.num_steps < 2 * L  # two pictures at a time
        if how == "stop":
            draw(page, "a blue circle")  # and usable
            wait_until(lambda: shared.engine.num_steps > 2 * L)


@pytest.mark.web
def test_visitors_who_wait_see_their_place(slow_page):
    with browser_page(slow_page) as first, further_page(first) as second, further_page(first) as third:
        draw(first, "a red circle", guidance=2)  # two rows
        expect(first.locator(".drawings img")).to_have_count(4)
        draw(second, "a blue circle")
        expect(second.get_by_text("Waiting, number 1 in the queue")).to_be_visible()
        draw(third, "a green circle")
        expect(third.get_by_text("queue: 1/1")).to_be_visible()  # gradio's


@pytest.mark.web
def test_two_browsers_at_the_same_time_get_what_each_gets_alone(tmp_path, monkeypatch):
    model, processor = cli.load(cli.SHIPPED_MODEL)
    shared = web_model.SharedModel(UniTokEngine(model), processor)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with (
        page_of(shared, tmp_path) as address,
        slow_steps(shared.engine, 0.5),
        browser_page(address) as first,
        further_page(first) as second,
    ):
        wanted = {first: ("a red circle", 1), second: ("a blue square", 2)}
        for page, (prompt, seed) in wanted.items():
            draw(page, prompt, seed=seed)
        wait_until(lambda: shared.engine.num_running == 8)
        for page in wanted:  # while it draws
            expect(page.locator(".drawings img")).to_have_count(4)
        assert shared.engine.num_running == 8
        for page, (prompt, seed) in wanted.items():
            expect(page.get_by_text(f"Seed {seed}")).to_be_visible()
            expected = inference.draw_images(model, processor, [prompt], 4, seed=seed)
            wait_until(lambda page=page, expected=expected: are_alike(drawings(page), expected))


@pytest.mark.web
def test_the_package_and_the_other_commands_do_not_import_gradio():
    code = "import sys, unitok_mllm.cli; print('gradio' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr


def take_picture(path: Path) -> None:
    """Chat and Draw side by side, as one PNG."""
    with tempfile.TemporaryDirectory() as folder, server(Path(folder)) as (address, _), browser_page(address) as page:
        for number, text in enumerate(("draw a red circle", "make it blue", "what color is the shape?"), start=1):
            ask(page, text)
            expect(answers(page)).to_have_count(number)
            page.wait_for_timeout(5000)
        page.screenshot(path=f"{folder}/chat.png")
        draw(page, "a red circle")
        page.wait_for_timeout(8000)
        page.screenshot(path=f"{folder}/draw.png")
        chat, drawn = Image.open(f"{folder}/chat.png"), Image.open(f"{folder}/draw.png")
        both = Image.new("RGB", (chat.width + drawn.width, chat.height))
        both.paste(chat, (0, 0))
        both.paste(drawn, (chat.width, 0))
        both.save(path)


if __name__ == "__main__":
    take_picture(Path(sys.argv[1]))
