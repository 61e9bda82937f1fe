"""Watching a drawing from another thread, and stopping it."""

from queue import Empty
from threading import Thread

import numpy as np
import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from unitok_mllm import UniTokImageStreamer


L, STRIDE = 9, 16


@pytest.fixture
def inputs(processor):
    return dict(processor(text=["a red circle", "blue"], generation_mode="image"))


def in_thread(model, **kwargs) -> tuple[Thread, list]:
    """A started thread that generates, and the list that its result goes to."""
    results = []
    thread = Thread(target=lambda: results.append(model.generate(**kwargs)))
    thread.start()
    return thread, results


def test_the_pictures_so_far_are_the_whole_ones_where_drawn_and_gray_elsewhere(lively_mllm, processor, inputs):
    options = {"generation_mode": "image", "seed": 3}
    codes = lively_mllm.generate(**inputs, **options)
    streamer = UniTokImageStreamer(lively_mllm, processor, every=4, timeout=60)
    thread, results = in_thread(lively_mllm, **inputs, **options, streamer=streamer)
    items = list(streamer)
    thread.join()
    assert torch.equal(results[0], codes)
    assert [len(pictures) for pictures in items] == [2, 2, 2]  # after 4, 8 and 9 positions
    whole = processor.post_process_multimodal_output(lively_mllm.decode_images(codes), generation_mode="image")
    for picture, expected in zip(items[-1], whole):
        assert np.array_equal(np.array(picture), np.array(expected))
    first = np.array(items[0][0])
    gray = (first == first[-1, -1]).all(axis=-1)
    assert gray[2 * STRIDE :].all() and gray[STRIDE:, STRIDE:].all()  # 4 of 3 x 3 positions are drawn
    assert not gray[:STRIDE].all() and abs(int(first[-1, -1, 0]) - 127) <= 1


def test_a_stopped_drawing_leaves_the_model_usable(lively_mllm, processor, inputs):
    options = {"generation_mode": "image", "seed": 3}
    codes = lively_mllm.generate(**inputs, **options)
    streamer = UniTokImageStreamer(lively_mllm, processor, every=1, timeout=60)
    streamer.stop()
    assert torch.equal(lively_mllm.generate(**inputs, **options, streamer=streamer), codes[..., :1])
    assert len(list(streamer)) == 1
    assert torch.equal(lively_mllm.generate(**inputs, **options), codes)


def test_the_watcher_hears_of_the_end_when_drawing_fails(lively_mllm, processor, inputs, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(lively_mllm.depth_head, "generate", fail)
    streamer = UniTokImageStreamer(lively_mllm, processor, timeout=60)
    with pytest.raises(RuntimeError, match="out of memory"):
        lively_mllm.generate(**inputs, generation_mode="image", streamer=streamer)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(streamer)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"guidance_scale": 0.5}, ValueError, "guidance_scale must be at least 1"),
        ({"num_return_sequences": 0}, ValueError, "num_return_sequences must be at least 1"),
        ({"guidance_scale": 2.0, "unconditional_input_ids": None}, ValueError, "needs unconditional_input_ids"),
        ({"input_ids": torch.ones(1, 300, dtype=torch.long)}, ValueError, "prompt is too long"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.long)}, ValueError, "must end with the token that opens an image"),
        ({"guidance": 2.0}, TypeError, "guidance"),
        ({"generation_mode": "video"}, ValueError, "generation_mode is 'text', 'image' or 'interleaved', got 'video'"),
    ],
)
def test_the_watcher_sees_what_is_raised_before_the_drawing(lively_mllm, processor, inputs, options, error, message):
    """In the thread that generates, and in the one that watches; then the streamer can be used again."""
    errors = []

    def work():
        try:
            lively_mllm.generate(**({**inputs, "generation_mode": "image"} | options), streamer=streamer)
        except Exception as caught:
            errors.append(caught)

    streamer = UniTokImageStreamer(lively_mllm, processor, every=9, timeout=60)
    thread = Thread(target=work)
    thread.start()
    with pytest.raises(error, match=message) as seen:
        list(streamer)
    thread.join()
    assert errors == [seen.value]
    lively_mllm.generate(**inputs, generation_mode="image", streamer=streamer)
    assert len(list(streamer)) == 1 and streamer._queue.empty()


def test_a_text_stream_ends_when_generate_refuses_its_prompt(lively_mllm, processor):
    streamer = TextIteratorStreamer(processor.tokenizer, timeout=60)
    with pytest.raises(ValueError, match="prompt is too long"):
        lively_mllm.generate(torch.ones(1, 300, dtype=torch.long), streamer=streamer)
    assert "".join(streamer) == ""


def test_nothing_to_watch_is_an_error(lively_mllm, processor):
    with pytest.raises(Empty):
        next(UniTokImageStreamer(lively_mllm, processor, timeout=0.01))
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        UniTokImageStreamer(lively_mllm, processor, every=0)


def test_the_librarys_text_streamers_and_stopping_criteria_work(lively_mllm, processor, images):
    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= length + 3)

    inputs = processor(text="<image> what?", images=images[:1] / 2 + 0.5)
    length = inputs["input_ids"].shape[1]
    options = {**inputs, "do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    expected = lively_mllm.generate(**options)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60)
    thread, results = in_thread(lively_mllm, **options, streamer=streamer)
    text = "".join(streamer)
    thread.join()
    assert torch.equal(results[0], expected) and text == processor.decode(expected[0, length:])
    stopped = lively_mllm.generate(**options, stopping_criteria=StoppingCriteriaList([After()]))
    assert torch.equal(stopped, expected[:, : length + 3])
    assert torch.equal(lively_mllm.generate(**options), expected)
