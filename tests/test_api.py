"""The server with the API's own client, over the loopback interface."""

import asyncio
import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import torch
import uvicorn
from PIL import Image
from test_serving import run

from eval.serving import start_server
from unitok_mllm import api_requests, api_responses
from unitok_mllm.api import create_app
from unitok_mllm.guard import own_hosts
from unitok_mllm.inference import SHIPPED_MODEL, choose_answers, text_tower_inputs
from unitok_mllm.serving import QueueFull, UniTokEngine
from unitok_mllm.streaming_unitok import UniTokImageStreamer


pytestmark = pytest.mark.full
KEY = "a secret"
ROOT = Path(__file__).parents[1]


@contextmanager
def served(model, processor, name="tiny", **options):
    """A server on a free port, in a thread; its address and its engine."""
    sizes = {name: options.pop(name) for name in ("max_rows", "max_queue") if name in options}
    engine = UniTokEngine(model, max_length=256, **sizes)
    app = create_app(engine, processor, name, hosts=own_hosts("127.0.0.1"), **options)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", engine
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def server(lively_mllm, processor):
    with served(lively_mllm, processor, api_key=KEY) as (address, engine):
        yield address, engine


@pytest.fixture
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key=KEY, max_retries=0)


def data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def opened(b64: str) -> np.ndarray:
    return np.int16(Image.open(io.BytesIO(base64.b64decode(b64))))


def near(images: list[Image.Image]):
    """Equals pixels of another batch: within one level, by rounding."""
    return pytest.approx(np.stack([np.int16(image) for image in images]), abs=1)


PICTURE = Image.new("RGB", (60, 40), "tomato")
TURN = {
    "role": "user",
    "content": [
        {"type": "image_url", "image_url": {"url": data_url(PICTURE)}},
        {"type": "text", "text": "what is this"},
    ],
}


def expected_answer(model, processor, **options) -> str:
    content = [{"type": "image", "image": PICTURE}, {"type": "text", "text": "what is this"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    ids = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(ids, skip_special_tokens=True).lstrip()


def test_chats_whole_and_streamed_are_those_of_generate(client, lively_mllm, processor):
    options = {"model": "tiny", "messages": [TURN], "max_tokens": 12}
    expected = expected_answer(lively_mllm, processor, max_new_tokens=12, do_sample=False)
    whole = client.chat.completions.create(**options)
    assert whole.choices[0].message.content == expected
    assert whole.usage.completion_tokens <= 12 and whole.choices[0].finish_reason in ("stop", "length")
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
    assert chunks[-1].usage == whole.usage
    sampled = client.chat.completions.create(**options, temperature=0.8, top_p=0.9, seed=3, n=2)
    for index, choice in enumerate(sampled.choices):
        torch.manual_seed(3 + index)
        text = expected_answer(lively_mllm, processor, max_new_tokens=12, do_sample=True, temperature=0.8, top_p=0.9)
        assert choice.message.content == text


def test_a_stop_text_ends_an_answer_and_is_not_part_of_it(client, lively_mllm, processor):
    whole = expected_answer(lively_mllm, processor, max_new_tokens=12, do_sample=False)
    stop = whole[3:5]
    options = {"model": "tiny", "messages": [TURN], "max_tokens": 12, "stop": [stop]}
    answer = client.chat.completions.create(**options).choices[0]
    assert answer.message.content == whole[: whole.index(stop)] and answer.finish_reason == "stop"
    chunks = client.chat.completions.create(**options, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer.message.content


def test_an_answer_may_hold_images(lively_mllm, processor):
    with torch.no_grad():  # the model opens an image at once
        lively_mllm.get_output_embeddings().weight[processor.boi_token_id] *= 0
    lively_mllm.generation_config.sequence_bias = [[[processor.boi_token_id], 60.0]]
    with served(lively_mllm, processor) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        options = {"model": "tiny", "messages": [{"role": "user", "content": "draw"}], "max_tokens": 6, "seed": 1}
        options["extra_body"] = {"modalities": ["text", "image"], "guidance": 2.0}
        message = client.chat.completions.create(**options).choices[0].message
        images = [image["image_url"]["url"] for image in message.images]
        assert len(images) == 4 and all(url.startswith("data:image/png;base64,") for url in images)
        streamed = [
            image["image_url"]["url"]
            for chunk in client.chat.completions.create(**options, stream=True)
            for image in getattr(chunk.choices[0].delta, "images", None) or []
        ]
        assert streamed == images
        again = {"role": "assistant", "content": message.content, "images": message.images}
        more = {**options, "messages": [*options["messages"], again, {"role": "user", "content": "yes"}]}
        del more["extra_body"]
        assert client.chat.completions.create(**more).choices[0].message.content is not None


def test_the_best_candidates_are_those_of_generate(client, lively_mllm, processor):
    extra = {"guidance": 2.0, "seed": 5, "candidates": 4}
    drawn = client.images.generate(prompt="a red circle", n=2, extra_body=extra)
    inputs = processor(text=["a red circle"], generation_mode="image")
    options = {"guidance_scale": 2.0, "seed": 5, "candidates": 4, "num_return_sequences": 2}
    output = lively_mllm.generate_image_codes(**inputs, **options, return_dict_in_generate=True)
    pixels = torch.cat([lively_mllm.decode_images(codes[None]) for codes in output.codes])  # not in one batch there
    expected = processor.post_process_multimodal_output(pixels, generation_mode="image")
    assert np.stack([opened(one.b64_json) for one in drawn.data]) == near(expected)
    assert [one.score for one in drawn.data] == pytest.approx(output.scores.tolist(), abs=1e-5)
    assert drawn.candidate_scores == pytest.approx(output.candidate_scores[0].tolist(), abs=1e-5)
    for options, message in (
        ({"stream": True}, "cannot be combined with stream"),
        ({"n": 5}, "4 are too few for n 5"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            client.images.generate(prompt="red", extra_body={"candidates": 4}, **options)
    with pytest.raises(openai.BadRequestError, match="the drawings of an edit cannot be ranked"):
        picture = base64.b64decode(drawn.data[0].b64_json)
        client.images.edit(image=picture, prompt="make it blue", extra_body={"candidates": 4})
    lively_mllm.visual.config.text_config = None
    with pytest.raises(openai.BadRequestError, match="has no text tower"):
        client.images.generate(prompt="a red circle", extra_body={"candidates": 4})


def test_the_likeliest_choice_is_that_of_choose_answers(client, lively_mllm, processor, monkeypatch):
    monkeypatch.setattr(api_responses, "CHOICES_AT_ONCE", 2)
    choices = ["a red circle", "blue", "what is the blue shape?"]
    for by_length in (False, True):
        question = [(PICTURE, "what is this")]
        (expected,), scores = choose_answers(lively_mllm, processor, question, choices, by_length)
        extra = {"choices": choices, "by_length": by_length}
        answer = client.chat.completions.create(model="tiny", messages=[TURN], extra_body=extra)
        (choice,) = answer.choices
        assert choice.message.content == expected and choice.finish_reason == "stop"
        assert [row["content"] for row in choice.choice_scores] == choices
        values = [row["log_likelihood"] / (row["num_tokens"] if by_length else 1) for row in choice.choice_scores]
        assert values == pytest.approx(scores[0].tolist(), rel=1e-5)
        assert answer.usage.completion_tokens == choice.choice_scores[choices.index(expected)]["num_tokens"]
    for options, extra, message in (
        ({"stream": True}, {"choices": choices}, "choices cannot be combined with stream"),
        ({"temperature": 0.5}, {"choices": choices}, "choices cannot be combined with temperature"),
        ({}, {"by_length": True}, "by_length requires choices"),
        ({}, {"choices": ["blue", " "]}, "and none empty"),
        ({}, {"choices": ["blue", "red " * 300]}, "positions, but a row has 256"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            client.chat.completions.create(model="tiny", messages=[TURN], **options, extra_body=extra)


@pytest.mark.attack
def test_choices_wait_for_one_another_and_no_more_than_the_queue_holds(lively_mllm, processor, monkeypatch):
    service = api_responses.Service(UniTokEngine(lively_mllm, max_length=256, max_queue=1), processor, "tiny", ())
    inputs, go_on, score = processor(text="red"), threading.Event(), lively_mllm.score
    monkeypatch.setattr(lively_mllm, "score", lambda **options: go_on.wait() and score(**options))
    running, waiting = (service.score(inputs, ["blue", "yes"]) for _ in range(2))
    with pytest.raises(QueueFull, match="1 requests are waiting to be scored"):
        service.score(inputs, ["blue"])
    assert waiting.cancel()  # as when its client leaves
    again = service.score(inputs, ["blue"])
    go_on.set()
    torch.testing.assert_close(again.result().log_likelihoods, running.result().log_likelihoods[:, :1])


def test_drawings_whole_and_streamed_are_those_of_generate(client, lively_mllm, processor):
    extra = {"guidance": 2.0, "temperature": 0.8, "top_k": 10, "seed": 5}
    drawn = client.images.generate(prompt="a red circle", n=2, extra_body=extra)
    inputs = processor(text=["a red circle"], generation_mode="image")
    codes = lively_mllm.generate_image_codes(
        **inputs, guidance_scale=2.0, temperature=0.8, top_k=10, seed=5, num_return_sequences=2
    )
    pixels = lively_mllm.decode_images(codes)
    expected = processor.post_process_multimodal_output(pixels, generation_mode="image")
    assert np.stack([opened(one.b64_json) for one in drawn.data]) == near(expected)
    events = list(client.images.generate(prompt="a red circle", stream=True, partial_images=2, extra_body=extra))
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image", "partial_image", "completed"]
    assert [event.partial_image_index for event in events[:-1]] == [0, 1]
    decoder = UniTokImageStreamer(lively_mllm, processor)
    for event, length in zip(events, (3, 6, 9)):
        pixels = decoder.decode(codes[:1, :, :length])
        (picture,) = processor.post_process_multimodal_output(pixels, generation_mode="image")
        assert opened(event.b64_json)[None] == near([picture])
    assert np.int16(picture)[None] == near(expected[:1])
    two = list(client.images.generate(prompt="a red circle", n=2, stream=True, partial_images=1, extra_body=extra))
    assert sorted((event.index, event.type.rpartition(".")[2]) for event in two) == [
        *((0, "completed"), (0, "partial_image"), (1, "completed"), (1, "partial_image"))
    ]
    completed = {event.index: opened(event.b64_json) for event in two if event.type.endswith("completed")}
    assert np.stack([completed[0], completed[1]]) == near(expected)


def test_edits_are_those_of_generate(client, lively_mllm, processor):
    file = io.BytesIO(base64.b64decode(data_url(PICTURE).partition(",")[2]))
    file.name = "picture.png"
    extra = {"seed": "4", "guidance": "2", "image_guidance": "1.5"}
    edited = client.images.edit(image=file, prompt="make it blue", extra_body=extra)
    inputs = processor(text=["make it blue"], images=[[PICTURE]], generation_mode="edit")
    codes = lively_mllm.generate_image_codes(**inputs, seed=4, guidance_scale=2.0, image_guidance_scale=1.5)
    (expected,) = processor.post_process_multimodal_output(lively_mllm.decode_images(codes), generation_mode="image")
    assert opened(edited.data[0].b64_json)[None] == near([expected])


def test_completions_embeddings_and_models(client, server, lively_mllm, processor):
    completed = client.completions.create(model="tiny", prompt=["a red", "blue"], max_tokens=5)
    for text, choice in zip(("a red", "blue"), completed.choices):
        inputs = processor(text=text)
        ids = lively_mllm.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert choice.text == processor.tokenizer.decode(ids, skip_special_tokens=True)
    rows = client.embeddings.create(model="tiny", input=[data_url(PICTURE)]).data
    pixels = processor.image_processor([PICTURE], return_tensors="pt")["pixel_values"]
    expected = lively_mllm.visual.get_image_features(pixels).pooler_output[0]
    torch.testing.assert_close(torch.tensor(rows[0].embedding), expected)
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    assert httpx.get(f"{server[0]}/health").json()["status"] == "ok"
    metrics = httpx.get(f"{server[0]}/metrics").text
    assert 'unitok_responses_total{path="completions",status="200"} 1' in metrics
    assert "unitok_response_seconds_count 4" in metrics
    assert "unitok_first_token_seconds_count 2" in metrics


def test_texts_are_embedded_by_the_text_tower(client, lively_mllm, processor):
    rows = client.embeddings.create(model="tiny", input=["a red circle", data_url(PICTURE), "blue"])
    texts = text_tower_inputs(lively_mllm, processor, ["a red circle", "blue"])
    expected = lively_mllm.visual.get_text_features(**texts).pooler_output
    torch.testing.assert_close(torch.tensor([rows.data[i].embedding for i in (0, 2)]), expected)
    pixels = processor.image_processor([PICTURE], return_tensors="pt")["pixel_values"]
    (image,) = lively_mllm.visual.get_image_features(pixels).pooler_output
    torch.testing.assert_close(torch.tensor(rows.data[1].embedding), image)
    assert rows.usage.prompt_tokens == texts["attention_mask"].sum()
    with pytest.raises(openai.BadRequestError, match=r"text 1 has \d+ tokens; the text tower reads 16"):
        client.embeddings.create(model="tiny", input=["red", "red " * 100])
    lively_mllm.visual.config.text_config = None
    with pytest.raises(openai.BadRequestError, match="this model has no text tower"):
        client.embeddings.create(model="tiny", input="red")


def test_many_clients_at_once_get_what_each_gets_alone(lively_mllm, processor):
    with served(lively_mllm, processor, max_rows=8) as (address, engine):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=300)

        def ask(seed: int) -> np.ndarray:
            extra = {"seed": seed, "guidance": 2.0}
            return opened(client.images.generate(prompt=f"a red circle {seed}", extra_body=extra).data[0].b64_json)

        with ThreadPoolExecutor(64) as pool:
            drawn = list(pool.map(ask, range(64)))
        assert engine.num_rows_computed / engine.num_steps > 4
    for seed in (0, 31, 63):
        inputs = processor(text=[f"a red circle {seed}"], generation_mode="image")
        codes = lively_mllm.generate_image_codes(**inputs, seed=seed, guidance_scale=2.0)
        pixels = lively_mllm.decode_images(codes)
        (expected,) = processor.post_process_multimodal_output(pixels, generation_mode="image")
        assert drawn[seed][None] == near([expected])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.attack
def test_a_client_that_leaves_makes_room(lively_mllm, processor, stream):
    with served(lively_mllm, processor, max_rows=1) as (address, engine):
        body = {"prompt": "red", "max_tokens": 200, "stream": stream}
        if stream:
            with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{address}/v1/completions", json=body, timeout=0.3)
        deadline = time.monotonic() + 20
        while engine.num_running:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        answer = httpx.post(f"{address}/v1/completions", json={"prompt": "red", "max_tokens": 1}, timeout=60)
        assert answer.status_code == 200


@contextmanager
def slow_steps(engine, monkeypatch, seconds: float):
    """Steps that take a while; a list that holds the number of those begun."""
    step, begun = engine.step, [0]

    def slow_step() -> None:
        begun[0] += 1
        time.sleep(seconds)
        step()

    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", slow_step)
        yield begun


@pytest.mark.parametrize("kind", ["whole", "stream without partial images"])
@pytest.mark.attack
def test_a_slot_is_free_within_a_position_after_its_client_has_gone(lively_mllm, processor, monkeypatch, kind):
    with (
        served(lively_mllm, processor, max_rows=2) as (address, engine),
        slow_steps(engine, monkeypatch, 0.3) as begun,
    ):
        body = {"prompt": "red", "seed": 0, "stream": kind != "whole"}
        client = socket.create_connection(address.removeprefix("http://").split(":"))
        content = json.dumps(body).encode()
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(content)}\r\n"
        client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
        while begun[0] < 3:
            time.sleep(0.01)
        client.close()
        while engine.num_running:
            time.sleep(0.01)
        assert begun[0] <= 4  # the step at hand, and the one that drops it
        assert len(engine._free) == 2


@pytest.mark.attack
def test_a_client_that_does_not_read_holds_up_nobody_and_gets_all_when_it_reads(lively_mllm, processor):
    with served(lively_mllm, processor, max_rows=16) as (address, engine):
        body = {"prompt": "red", "n": 8, "seed": 0, "stream": True, "partial_images": 8}
        with httpx.stream("POST", f"{address}/v1/images/generations", json=body, timeout=60) as slow:
            while engine.num_running or not engine.num_steps:
                time.sleep(0.01)
            answer = httpx.post(f"{address}/v1/completions", json={"prompt": "red", "max_tokens": 1}, timeout=60)
            assert answer.status_code == 200
            events = [line for line in slow.iter_lines() if line.startswith("event: ")]
    assert len(events) == 8 * 9 and events.count("event: image_generation.completed") == 8


@pytest.mark.attack
def test_a_request_of_which_a_part_is_refused_leaves_nothing_in_the_queue(lively_mllm, processor, monkeypatch):
    engine = UniTokEngine(lively_mllm, max_rows=2, max_length=256, max_queue=2)
    monkeypatch.setattr(engine, "run", lambda: None)  # nobody works
    body = {"prompt": ["red", "blue", "a"], "max_tokens": 5}
    response = asked(create_app(engine, processor, "tiny", hosts={"test"}), body)
    assert response.status_code == 429
    engine.step()
    assert engine.num_waiting == engine.num_running == 0


REFUSED = {
    "no key": ({"headers": {"authorization": "Bearer wrong"}}, 401, "the API key is missing or wrong"),
    "another model": ({"json": {"model": "gpt", "prompt": "x"}}, 404, "there is no model 'gpt', only 'tiny'"),
    "no JSON": ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "JSON decode error"),
    "no prompt": ({"json": {}}, 400, "prompt: Field required"),
    "unknown option": ({"json": {"prompt": "x", "beams": 2}}, 400, "beams: Extra inputs are not permitted"),
    "out of range": ({"json": {"prompt": "x", "top_p": 2}}, 400, "top_p: Input should be less than or equal to 1"),
    "no stream": (
        {"json": {"prompt": "x", "stream_options": {"include_usage": True}}},
        *(400, "stream_options: Value error, requires stream: true"),
    ),
    "too long": ({"json": {"prompt": "x" * 500}}, 400, "do not fit"),
    "too large": ({"content": b"x" * 2**21}, 413, "longer than 1048576 bytes"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.attack
def test_what_cannot_be_is_refused_in_the_apis_form(lively_mllm, processor, case):
    options, status, message = REFUSED[case]
    with served(lively_mllm, processor, api_key=KEY, max_body=2**20) as (address, _):
        options = dict(options)
        headers = {"authorization": f"Bearer {KEY}"} | options.pop("headers", {})
        response = httpx.post(f"{address}/v1/completions", headers=headers, timeout=60, **options)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


PARTS = {
    "a URL": ("http://127.0.0.1:9/x.png", "must be a data URL"),
    "a file": ("file:///etc/passwd", "must be a data URL"),
    "no picture": ("data:image/png;base64," + base64.b64encode(b"no picture").decode(), "cannot read image"),
    "no base64": ("data:image/png;base64,%%%", "base64 cannot be read"),
}


@pytest.mark.parametrize("case", PARTS)
@pytest.mark.attack
def test_pictures_that_are_none_are_refused(client, case):
    url, message = PARTS[case]
    content = [{"type": "image_url", "image_url": {"url": url}}]
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}])


@pytest.mark.attack
def test_other_refusals(client, server):
    with pytest.raises(openai.BadRequestError, match="this model draws 48x48, got '512x512'"):
        client.images.generate(prompt="red", size="512x512")
    with pytest.raises(openai.BadRequestError, match="top_k must be at least 0"):
        client.images.generate(prompt="red", extra_body={"top_k": -1, "guidance": 1.0})
    with pytest.raises(openai.BadRequestError, match="a part must be a text or an image_url, got 'input_audio'"):
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]
        )
    response = httpx.get(f"{server[0]}/v1/files")
    assert response.status_code == 404 and response.json()["error"]["message"] == "not found"
    response = httpx.get(f"{server[0]}/health", headers={"host": "evil.example"})
    assert response.status_code == 403


@pytest.mark.attack
def test_pictures_are_counted_and_measured_before_they_are_decoded(monkeypatch):
    data = base64.b64decode(data_url(PICTURE).partition(",")[2])
    pictures = api_requests.Pictures(())
    for _ in range(api_requests.MAX_PICTURES):
        pictures.add(data)
    with pytest.raises(api_requests.APIError, match="at most 16 pictures"):
        pictures.add(data)
    monkeypatch.setattr(api_requests, "MAX_PIXELS", 2 * 60 * 40)
    monkeypatch.setattr(api_requests, "load_image", lambda *arguments, **options: PICTURE)
    pictures = api_requests.Pictures(())
    for _ in range(2):
        pictures.add(data)
    monkeypatch.setattr(api_requests, "load_image", None)
    with pytest.raises(api_requests.APIError, match="may have at most .* million pixels in all"):
        pictures.add(data)


@pytest.mark.attack
def test_a_request_that_takes_too_long_ends(lively_mllm, processor, monkeypatch):
    engine = UniTokEngine(lively_mllm, max_length=256)
    monkeypatch.setattr(engine, "run", lambda: None)  # nobody works
    response = asked(create_app(engine, processor, "tiny", hosts={"test"}, timeout=0.5))
    assert response.status_code == 504
    assert response.json()["error"]["message"] == "the request took longer than 0.5 seconds"
    engine.step()
    assert engine.num_waiting == engine.num_running == 0


def asked(app, body: dict | None = None) -> httpx.Response:
    """The response to a completion, without a server."""

    async def post() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post("/v1/completions", json=body or {"prompt": "red", "max_tokens": 5})

    return asyncio.run(post())


def test_a_model_may_have_its_owner_in_its_name(lively_mllm, processor):
    with served(lively_mllm, processor, "owner/tiny") as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
        assert client.models.retrieve("owner/tiny").id == "owner/tiny"
        with pytest.raises(openai.NotFoundError, match="owner/large"):
            client.models.retrieve("owner/large")


@pytest.mark.attack
def test_a_full_queue_is_a_429(lively_mllm, processor, monkeypatch):
    engine = UniTokEngine(lively_mllm, max_rows=1, max_length=256, max_queue=1)
    engine.answer(processor(text="red"), max_new_tokens=5)
    monkeypatch.setattr(engine, "run", lambda: None)  # nobody works
    response = asked(create_app(engine, processor, "tiny", hosts={"test"}))
    assert response.status_code == 429 and response.headers["retry-after"]
    assert "1 requests are waiting" in response.json()["error"]["message"]
    run(engine)


def test_a_server_that_stops_finishes_what_is_under_way(lively_mllm, processor):
    with served(lively_mllm, processor) as (address, engine), ThreadPoolExecutor(1) as pool:
        body = {"prompt": "red", "max_tokens": 60}
        answer = pool.submit(httpx.post, f"{address}/v1/completions", json=body, timeout=120)
        while not engine.num_running:
            time.sleep(0.01)
    assert json.loads(answer.result().text)["choices"][0]["text"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow  # starts the server twice, in processes of its own
@pytest.mark.attack
def test_a_server_that_is_killed_starts_again_on_its_port():
    port = free_port()
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    options = {"prompt": "a red circle", "extra_body": {"seed": 0}}
    killed = start_server(SHIPPED_MODEL, port)
    try:
        before = client.images.generate(**options).data[0].b64_json
        events = client.images.generate(prompt="a red circle", n=8, stream=True, partial_images=15)
        next(iter(events))
    finally:
        killed.kill()
        killed.communicate()
    with pytest.raises((openai.APIError, httpx.RemoteProtocolError)):
        list(events)
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
    again = start_server(SHIPPED_MODEL, port)
    try:
        assert client.images.generate(**options).data[0].b64_json == before
    finally:
        again.terminate()
        again.communicate()
    assert again.returncode == -signal.SIGTERM  # uvicorn ends by the signal, once all are answered


@pytest.mark.slow  # installs torch
def test_the_extra_is_all_that_the_server_needs(tmp_path):
    """In a new environment, as docs/serving.md says."""
    source, port = tmp_path / "source", free_port()
    shutil.copytree(ROOT / "unitok_mllm", source / "unitok_mllm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    venv.create(tmp_path / "venv", with_pip=True)
    folder = tmp_path / "venv/bin"
    install = [folder / "python", "-m", "pip", "install", "--quiet", "--editable", ".[serve]"]
    subprocess.run(install, cwd=source, env=environment, check=True)
    program = (str(folder / "unitok-mllm"),)
    server = start_server(SHIPPED_MODEL, port, program=program, cwd=tmp_path, env=environment)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        drawn = client.images.generate(prompt="a red circle", extra_body={"seed": 0}).data[0].b64_json
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{drawn}"}}
        question = {"role": "user", "content": [image, {"type": "text", "text": "what color is the shape?"}]}
        answer = client.chat.completions.create(model="tiny", messages=[question])
        assert answer.choices[0].message.content == "red"
        blue = {"model": "tiny", "input": ["a red circle", "a blue square", f"data:image/png;base64,{drawn}"]}
        red, other, picture = (torch.tensor(row.embedding) for row in client.embeddings.create(**blue).data)
        assert picture @ red > picture @ other
    finally:
        server.terminate()
        server.communicate()
        shutil.rmtree(tmp_path / "venv")  # gigabytes
