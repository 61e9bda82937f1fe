"""The model behind the web page: answers and drawings that are streamed, pictures that are read, without a page."""

import asyncio
import struct
import zlib
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageStat
from transformers import LogitsProcessorList
from web_runs import BOI, DRAWING, EOS, L, are_alike, collect, memory, pixels, question, red_circle, slow_steps

from unitok_mllm import web, web_model, web_page


pytestmark = pytest.mark.full

TURNED = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # EXIF: orientation 6


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
    options = web_page.drawing_options(3.0, 0.1, 0.7, 20, 0.9, 5)
    assert options == {
        **{"guidance_scale": 3.0, "plausibility": 0.1, "do_sample": True, "seed": 5},
        **{"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    }
    greedy = {"guidance_scale": 1.0, "plausibility": 0, "do_sample": False, "seed": 5}
    assert web_page.drawing_options(1.0, 0, 0, 20, 1, 5) == greedy
    seeds = [web_page.drawing_options(1.0, 0, 1, 0, 1, -1)["seed"] for _ in range(2)]
    assert seeds[0] != seeds[1] >= 0
    with pytest.raises(ValueError, match="guidance and top-k must be given"):
        web_page.drawing_options(None, 0, 1, None, 1, 0)


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
