"""The web page: its parts on a random model, and in a real browser with the shipped one (marker `web`).

python tests/test_web.py docs/web.png    # a picture of the page in use
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from threading import Event

import httpx
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from playwright.sync_api import Page, expect, sync_playwright
from transformers import LogitsProcessorList
from typer.testing import CliRunner

from unitok_mllm import cli, web


REPOSITORY = Path(web.__file__).parent.parent
BOI, EOS = 3, 2
L = 9
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
def shared(lively_mllm, processor) -> web.SharedModel:
    return web.SharedModel(lively_mllm, processor)


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


@pytest.fixture
def answers_with_a_drawing(shared, monkeypatch):
    """Three tokens of text, a drawing, and at most two more tokens, whatever is asked."""
    generate = shared.model.generate

    def scripted(**kwargs):
        if kwargs["generation_mode"] != "interleaved":
            return generate(**kwargs)
        length = kwargs["input_ids"].shape[1]
        script = ForcedTokens({length + 3: BOI, length + 3 + L + 4: EOS})
        return generate(**kwargs, logits_processor=LogitsProcessorList([script]))

    monkeypatch.setattr(shared.model, "generate", scripted)


def test_an_answer_comes_in_pieces_and_ends_as_generate_makes_it(shared, processor, answers_with_a_drawing):
    inputs = shared.chat_inputs([question("draw it", red_circle())])
    answers = list(shared.answer(inputs, 20, DRAWING))
    options = {"max_new_tokens": 20, "max_images": 4, "do_sample": False, "image_options": DRAWING}
    output = shared.model.generate(**inputs, generation_mode="interleaved", **options)
    decoded = [shared.model.decode_images(codes) for codes in output.image_codes]
    (expected,) = processor.post_process_multimodal_output(output, generation_mode="interleaved", pixel_values=decoded)
    assert answers[-1] == expected and [part["type"] for part in expected][:2] == ["text", "image"]
    streamed = answers[-2]
    assert [part.get("text", "").strip() for part in streamed] == [part.get("text", "") for part in expected]
    assert streamed[1] == expected[1]
    frames = [parts[1]["image"] for parts in answers if len(parts) == 2]
    kinds = [parts[1]["type"] for parts in answers if len(parts) == 2]
    assert kinds == ["unfinished"] * (L - 1) + ["image"]
    assert len(frames) == L and pixels(frames[-1]) == pixels(expected[1]["image"])
    assert {frame.getpixel((47, 47)) for frame in frames[:-1]} == {(128, 128, 128)}  # not drawn yet

    # the next turn reads the drawing
    turns = [question("draw it", red_circle()), {"role": "assistant", "content": expected}, question("again")]
    later = shared.chat_inputs(turns)
    assert torch.equal(later["pixel_values"][1], processor.image_processor(expected[1]["image"])["pixel_values"][0])
    assert (later["input_ids"] == processor.image_token_id).sum() == 2 * L


def test_drawings_end_as_generate_makes_them(shared, processor):
    shown = list(shared.draw("a red circle", 2, DRAWING))
    inputs = processor(text="a red circle", generation_mode="image")
    codes = shared.model.generate(**inputs, generation_mode="image", num_return_sequences=2, **DRAWING)
    expected = processor.post_process_multimodal_output(shared.model.decode_images(codes), generation_mode="image")
    assert shown[-1] == expected and len(shown) == L


@pytest.mark.parametrize("work", ["answer", "draw"])
def test_a_page_that_is_left_stops_the_work_and_the_model_stays_usable(
    shared, answers_with_a_drawing, work, monkeypatch
):
    def start():
        if work == "draw":
            return shared.draw("a red circle", 1, DRAWING)
        return shared.answer(shared.chat_inputs([question("draw it")]), 20, DRAWING)

    whole = list(start())
    streamer = web.UniTokImageStreamer if work == "draw" else web.AnswerStreamer
    put, stop = streamer.put, streamer.stop
    is_left, codes_seen = Event(), []

    def slow_put(self, value):
        if value.ndim == 3:
            codes_seen.append(value)
        result = put(self, value)
        if codes_seen:
            assert is_left.wait(60)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(streamer, "put", slow_put)
        patch.setattr(streamer, "stop", lambda self: (stop(self), is_left.set()))
        left = start()
        while not codes_seen:
            next(left)
        left.close()
    assert len(codes_seen) == 2 and not shared._lock.locked()  # it went on for one position
    assert list(start()) == whole


def test_an_error_in_the_thread_comes_out_and_the_model_stays_usable(shared, monkeypatch):
    inputs = shared.chat_inputs([question("what?")])
    with pytest.raises(ValueError, match="guidance_scale must be at least 1"):
        list(shared.draw("red", 1, {"guidance_scale": 0.5}))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="broken"):
        patch.setattr(
            shared.model.language_model.lm_head, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("broken"))
        )
        list(shared.answer(inputs, 4, {}))
    assert len(list(shared.draw("red", 1, DRAWING))) == L and list(shared.answer(inputs, 4, {}))


def test_what_cannot_be_asked_or_drawn(shared):
    with pytest.raises(ValueError, match="the prompt is empty"):
        next(shared.draw(" ", 1, {}))
    with pytest.raises(ValueError, match="from 1 to 8 pictures can be drawn at once, not 9"):
        next(shared.draw("red", 9, {}))
    with pytest.raises(ValueError, match=r"the prompt is too long: \d+ tokens, where the model's 256 .* leave 247"):
        next(shared.draw("red " * 300, 1, {}))
    with pytest.raises(ValueError, match="the text has 10001 characters, 10000 at most"):
        next(shared.draw("x" * 10_001, 1, {}))
    with pytest.raises(ValueError, match=r"takes \d+ of the model's 256 positions .11 for each picture.: start a new"):
        shared.chat_inputs([question("what?", *[red_circle()] * 22)])
    with pytest.raises(ValueError, match="a 30000x1 picture is too elongated"):
        shared.chat_inputs([question("what?", Image.new("RGB", (30_000, 1)))])


def test_what_visitors_write_is_plain_text(shared, processor):
    text = "a red </s><boi> <image>"
    inputs = shared.chat_inputs([question(text, red_circle())])
    (row,) = inputs["input_ids"].tolist()
    assert [row.count(token) for token in (EOS, BOI, processor.image_token_id)] == [0, 1, L]
    assert f"{text} ASSISTANT:" in processor.decode(row)
    assert len(list(shared.draw(text, 1, DRAWING))) == L


def test_unreadable_pictures_are_named_without_their_folder(tmp_path):
    (tmp_path / "notes.png").write_text("no picture", encoding="utf-8")
    with pytest.raises(ValueError, match="^notes.png is not a picture that can be read$"):
        web.read_picture(str(tmp_path / "notes.png"))
    with pytest.raises(ValueError, match="^gone.png is no longer kept"):
        web.read_picture(str(tmp_path / "gone.png"))


def test_the_fields_as_options():
    options = web.drawing_options(3.0, 0.7, 20, 0.9, 5)
    assert options == {
        **{"guidance_scale": 3.0, "do_sample": True, "seed": 5},
        **{"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    }
    assert web.drawing_options(1.0, 0, 20, 1, 5) == {"guidance_scale": 1.0, "do_sample": False, "seed": 5}
    assert web.drawing_options(1.0, 1, 0, 1, -1)["seed"] != web.drawing_options(1.0, 1, 0, 1, -1)["seed"] >= 0
    with pytest.raises(ValueError, match="guidance and top-k must be given"):
        web.drawing_options(None, 1, None, 1, 0)


def test_code_maps_show_each_code_by_its_colour():
    codes = torch.tensor([[0, 1, 2, 3, 0, 1]] * 5)
    codes[4] = 2
    picture = web.code_maps(codes, (2, 3), 4)
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


def test_without_gradio_the_command_names_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "unitok_mllm.web")
    monkeypatch.delattr("unitok_mllm.web")
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


@contextmanager
def server(workplace: Path) -> Iterator[tuple[str, Path]]:
    """`unitok-mllm serve` in a process of its own: its address, and the folder for its temporary files."""
    temporary = workplace / "tmp"
    temporary.mkdir()
    port = free_port()
    command = [sys.executable, "-m", "unitok_mllm.cli", "serve", "--port", str(port), "--max-upload-mb", "1"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "TMPDIR": str(temporary), "CUDA_VISIBLE_DEVICES": ""}
    with open(workplace / "log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=workplace, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            try:
                httpx.get(address, timeout=30)
                break
            except httpx.ConnectError:
                assert process.poll() is None, (workplace / "log").read_text(encoding="utf-8")
                time.sleep(0.1)
        yield address, temporary
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    workplace = tmp_path_factory.mktemp("served")
    (workplace / "secret.txt").write_text("secret", encoding="utf-8")
    with server(workplace) as (address, temporary):
        yield address, temporary
    assert list(temporary.glob("unitok-mllm-*")) == []  # nothing is kept


@contextmanager
def browser_page(address: str) -> Iterator[Page]:
    """The page in headless Chromium: the machine's, or playwright's own."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 960})
        page.set_default_timeout(WAIT)
        page.goto(address)
        yield page
        browser.close()


@pytest.fixture
def page(served) -> Iterator[Page]:
    expect.set_options(timeout=WAIT)
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


def draw(page: Page, prompt: str) -> None:
    page.get_by_role("tab", name="Draw").click()
    page.locator("#prompt textarea").fill(prompt)
    page.locator("#draw").click()


@pytest.mark.web
def test_draw_from_a_prompt(page):
    draw(page, " ")
    expect(page.get_by_text("the prompt is empty")).to_be_visible()
    page.get_by_label("Top-k").locator("visible=true").fill("-5")
    draw(page, "a red circle")
    expect(page.get_by_text("Value -5 is less than minimum value 0")).to_be_visible()
    page.get_by_label("Top-k").locator("visible=true").fill("20")
    page.get_by_label("Seed").locator("visible=true").fill("1")
    draw(page, "a red circle")
    expect(page.get_by_text("Seed 1")).to_be_visible()
    options = {"guidance_scale": 3.0, "temperature": 0.7, "top_k": 20, "seed": 1}
    expected = cli.draw_images(*cli.load(cli.SHIPPED_MODEL), ["a red circle"], 4, **options)
    expect(page.locator(".drawings img")).to_have_count(4)

    def shown() -> list:
        sources = [image.get_attribute("src") for image in page.locator(".drawings img").all()]
        return [pixels(Image.open(BytesIO(httpx.get(source).content))) for source in sources]

    wait_until(lambda: shown() == [pixels(picture) for picture in expected])


@pytest.mark.web
def test_reconstruct_and_name(page, picture):
    page.get_by_role("tab", name="Tokenizer").click()
    page.locator("#picture input[type=file]").set_input_files(picture)
    expect(page.locator("#summary")).to_contain_text("128 codes (16 positions), PSNR")
    expect(page.locator(".tokenizer img")).to_have_count(3)
    expect(page.locator("#nearest")).to_contain_text("a red circle")


@pytest.mark.web
def test_what_is_no_picture_gives_a_message(page, tmp_path):
    for name in ("notes.txt", "notes.png"):
        (tmp_path / name).write_text("no picture", encoding="utf-8")
    ask(page, "what?", tmp_path / "notes.png")
    expect(page.get_by_text("notes.png is not a picture that can be read")).to_be_visible()
    page.get_by_role("tab", name="Tokenizer").click()
    page.locator("#picture input[type=file]").set_input_files(tmp_path / "notes.txt")
    expect(page.get_by_text("Invalid file type: notes.txt. Only image allowed.")).to_be_visible()


@pytest.mark.web
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
def test_uploads_have_a_limit(served):
    address, temporary = served
    httpx.post(f"{address}/gradio_api/upload", files={"files": ("small.png", bytes(1024**2))}).raise_for_status()
    before = sorted(temporary.rglob("*"))
    response = httpx.post(f"{address}/gradio_api/upload", files={"files": ("big.png", bytes(1024**2 + 1))})
    assert response.status_code == 413 and response.text == "File size exceeded maximum allowed size of 1048576 bytes."
    assert sorted(temporary.rglob("*")) == before


@pytest.fixture
def slow_page(shared, monkeypatch, tmp_path):
    """A page whose random model needs a second for each position; its address, and the codes it has shown."""
    put, codes_seen = web.UniTokImageStreamer.put, []

    def slow_put(self, value):
        codes_seen.append(value)
        time.sleep(1)
        return put(self, value)

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    page = web.build_page(shared, "random").queue(max_size=1)
    _, address, _ = page.launch(server_port=free_port(), prevent_thread_lock=True, quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(web.UniTokImageStreamer, "put", slow_put)
        yield address.rstrip("/"), codes_seen
    page.close(verbose=False)


@pytest.mark.web
@pytest.mark.parametrize("how", ["stop", "leave"])
def test_stopping_and_leaving_end_the_drawing(shared, slow_page, monkeypatch, how):
    address, codes_seen = slow_page
    with browser_page(address) as page:
        draw(page, "a red circle")
        expect(page.locator(".drawings img")).to_have_count(4)
        if how == "stop":
            page.locator("#stop-drawing").click()
        else:
            page.close()
        with shared._lock:  # free again
            assert codes_seen[-1].shape[-1] < L
        if how == "stop":
            draw(page, "a blue circle")  # and usable
            wait_until(lambda: codes_seen[-1].shape[-1] == L)


@pytest.mark.web
def test_the_queue_has_a_limit(slow_page):
    address, codes_seen = slow_page
    data = {"data": ["a red circle", 1, 1, 1, 0, 1, 0]}

    def post() -> httpx.Response:
        return httpx.post(f"{address}/gradio_api/call/draw", json=data)

    assert post().status_code == 200
    wait_until(lambda: codes_seen)  # the first is being drawn
    assert post().status_code == 200  # the second waits
    assert post().status_code == 503


@pytest.mark.web
def test_the_package_and_the_other_commands_do_not_import_gradio():
    code = "import sys, unitok_mllm.cli; print('gradio' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr


def take_picture(path: Path) -> None:
    """Chat and Draw side by side, as one PNG."""
    with tempfile.TemporaryDirectory() as folder, server(Path(folder)) as (address, _), browser_page(address) as page:
        expect.set_options(timeout=WAIT)
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
