"""The web page: its parts on a random model, and in a real browser with the shipped one (marker `web`).

python tests/test_web.py docs/web.png    # a picture of the page in use
"""

import gc
import html
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright
from typer.testing import CliRunner
from web_runs import DRAWING, L, are_alike, memory, red_circle, slow_steps

from unitok_mllm import cli, inference, web, web_model, web_page
from unitok_mllm.kept_files import KeptFiles
from unitok_mllm.serving import UniTokEngine


pytestmark = pytest.mark.full

REPOSITORY = Path(web.__file__).parent.parent
WAIT = 120_000  # milliseconds


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


def test_the_command_serves_the_page(served):
    response = httpx.get(served[0])
    assert response.status_code == 200 and "gradio" in response.text


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
    options = {"guidance_scale": 5.0, "temperature": 0.7, "top_k": 20, "seed": 1}
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


DRAW = ["a red circle", 1, 1, 1, 0, 1, 0, 1, 0]  # the fields of the tab


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
                assert response.status_code == 403, (route, headers)
                assert re.search("host .* is not served here|requests from other sites are refused", response.text)
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
    ("draw", 4, [-1, 2, None]),
    ("draw", 5, [-1, 10**9, None]),
    ("draw", 6, [-1, None]),
    ("draw", 7, [0, 2, None]),
    ("draw", 8, [-2, 2**40, None]),
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
        expect(third.get_by_text("queue: 1/1").first).to_be_visible()  # gradio's


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


def still_picture(page: Page) -> Image.Image:
    """A screenshot of the page once it does not change any more."""
    before, now = None, page.screenshot()
    while now != before:
        page.wait_for_timeout(5000)
        before, now = now, page.screenshot()
    return Image.open(BytesIO(now))


def take_picture(path: Path) -> None:
    """Chat and Draw side by side, as one PNG."""
    with tempfile.TemporaryDirectory() as folder, server(Path(folder)) as (address, _), browser_page(address) as page:
        for number, text in enumerate(("draw a red circle", "make it blue", "what color is the shape?"), start=1):
            ask(page, text)
            expect(answers(page)).to_have_count(number)
            chat = still_picture(page)
        draw(page, "a red circle")
        expect(page.locator(".drawings img")).to_have_count(4)
        drawn = still_picture(page)
        both = Image.new("RGB", (chat.width + drawn.width, chat.height))
        both.paste(chat, (0, 0))
        both.paste(drawn, (chat.width, 0))
        both.save(path)


if __name__ == "__main__":
    take_picture(Path(sys.argv[1]))
