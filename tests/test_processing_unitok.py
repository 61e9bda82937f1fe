"""The processor: prompts, conversations and pictures to inputs, and outputs back."""

import base64
import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import pytest
import torch
from jinja2 import TemplateError
from PIL import Image
from tokenizers import processors
from transformers import AutoProcessor, LlamaTokenizer, pipeline

import unitok_mllm
from unitok_mllm import UniTokImageProcessor, UniTokMLLMProcessor
from unitok_mllm.processing_unitok import detached_tokenizer, vicuna_chat_template


BOS, EOS, BOI, EOI, IMAGE, L = 1, 2, 3, 4, 5, 9
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PICTURE = [BOI, *[IMAGE] * L, EOI]


def user(*parts):
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return {"role": "user", "content": content}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


@pytest.fixture
def picture():
    return Image.effect_noise((30, 50), 90).convert("RGB")


@pytest.fixture
def with_tokenizer(text_tokenizer):
    """A processor around a changed copy of the text tokenizer."""

    def build(change=lambda tokenizer: None, **kwargs):
        tokenizer = copy.deepcopy(text_tokenizer)
        change(tokenizer)
        image_processor = UniTokImageProcessor(size={"height": 48, "width": 48})
        return UniTokMLLMProcessor(image_processor, tokenizer, boi_token="<boi>", eoi_token="<eoi>", **kwargs)

    return build


def remove_bos(tokenizer):
    tokenizer.bos_token = None
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()


@pytest.mark.parametrize(
    "messages, generation_prompt, expected",
    [
        ([user(0, "what?")], True, f"{SYSTEM} USER: <image>\nwhat? ASSISTANT:"),
        ([{"role": "user", "content": "why"}], False, f"{SYSTEM} USER: why "),
        (
            [user("a", 0, 0, "b"), assistant("yes"), user("c"), {"role": "assistant", "content": "no"}],
            False,
            f"{SYSTEM} USER: a<image>\n<image>\nb ASSISTANT: yes</s>USER: c ASSISTANT: no</s>",
        ),
        ([{"role": "system", "content": "Be brief."}, user("c")], True, "Be brief. USER: c ASSISTANT:"),
        (
            [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, user("c"), assistant("d")],
            True,
            "Be brief. USER: c ASSISTANT: d</s>ASSISTANT:",
        ),
    ],
)
def test_the_chat_template_is_vicunas(processor, messages, generation_prompt, expected):
    assert processor.apply_chat_template(messages, add_generation_prompt=generation_prompt) == expected


def turn(role, content="x", **more):
    return {"role": role, "content": content, **more}


def by_every_route(processor, messages):
    """What the processor and its tokenizer make of a conversation: the text, or the error's."""

    def ids_text(ids):
        return processor.decode(ids).removeprefix("<s>")

    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = processor.chat_template
    options = {"tokenize": True, "return_dict": True}
    routes = (
        lambda: processor.apply_chat_template(messages),
        lambda: ids_text(processor.apply_chat_template(messages, **options)["input_ids"][0]),
        lambda: ids_text(processor.apply_chat_template([messages], **options)["input_ids"][0]),
        lambda: tokenizer.apply_chat_template(messages, tokenize=False),
        lambda: ids_text(tokenizer.apply_chat_template(messages, **options)["input_ids"]),
    )
    results = []
    for number, route in enumerate(routes):
        try:
            results.append(route())
        except (ValueError, TemplateError) as error:
            assert isinstance(error, ValueError) == (number < 3)
            results.append(f"{error}")
    assert len(set(results)) == 1, results
    return results[0]


@pytest.mark.parametrize(
    "messages, expected",
    [
        # a developer's words are the system's, and several turns and parts of theirs come one after another
        ([turn("developer", "Be brief."), turn("user")], "Be brief. USER: x "),
        ([turn("system", "Be brief."), turn("developer", "Be kind."), turn("user")], "Be brief. Be kind. USER: x "),
        (
            [
                turn("system", [{"type": "text", "text": "Be "}, {"type": "input_text", "text": "brief."}]),
                turn("user"),
            ],
            "Be brief. USER: x ",
        ),
        # each turn stays in its own mouth, in whatever order
        ([turn("user", "a"), turn("user", "b")], f"{SYSTEM} USER: a USER: b "),
        ([turn("assistant", "a"), turn("assistant", "b")], f"{SYSTEM} ASSISTANT: a</s>ASSISTANT: b</s>"),
        ([turn("user", [{"type": "input_text", "text": "a"}])], f"{SYSTEM} USER: a "),
        # what has no place is named
        ([turn("user"), turn("system")], r"Turn 2 (system) comes too late: its place is before all other turns."),
        (
            [turn("user"), turn("developer")],
            r"Turn 2 (developer) comes too late: its place is before all other turns.",
        ),
        *(
            (
                [turn("user"), turn(role)],
                f"Turn 2 ({role}) has an unknown role; known: system, developer, user, assistant.",
            )
            for role in ("tool", "function", "narrator", "Assistant", "")
        ),
        *(
            (
                [turn(role, [{"type": kind, kind: "a.mp4", "url": "a.mp4"}])],
                f"Turn 1 ({role}) has a part of type '{kind}'; known: text, input_text, output_text, image, "
                "image_url, input_image.",
            )
            for role in ("system", "user", "assistant")
            for kind in ("video", "audio", "input_audio", "file", "refusal", "thing")
        ),
        ([turn("user", [{"type": "text"}])], "Turn 1 (user) has a part of type 'text' without a text."),
        ([{"role": "user"}], "Turn 1 (user) has no content."),
        ([turn("user", None)], "Turn 1 (user) has no content."),
        (
            [turn("user"), turn("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": {}}}])],
            "Turn 2 (assistant) has tool_calls, for which this chat template has no place.",
        ),
        (
            [turn("user"), turn("assistant", "a", thinking="b")],
            "Turn 2 (assistant) has reasoning_content, for which this chat template has no place.",
        ),
    ],
)
def test_nothing_of_a_conversation_is_lost_or_put_into_anothers_mouth(processor, messages, expected):
    assert by_every_route(processor, messages) == expected


@pytest.mark.attack
def test_what_else_a_template_is_given_is_refused_by_name(processor):
    for options in ({"tools": [{"type": "function"}]}, {"documents": [{"title": "a", "text": "b"}]}):
        for tokenize in (False, True):
            with pytest.raises(ValueError, match=f"no place for {next(iter(options))}"):
                processor.apply_chat_template([user("a")], tokenize=tokenize, **options)
    for empty in ([], [[]]):
        with pytest.raises(ValueError, match="The conversation has no turns"):
            processor.apply_chat_template(empty)
    for part in ({"type": "input_image", "file_id": "7"}, {"type": "image_url"}):
        with pytest.raises(
            ValueError, match=rf"Turn 1 \(user\) has a part of type '{part['type']}' without an image_url"
        ):
            processor.apply_chat_template([turn("user", [part])])
    with pytest.raises(ValueError, match=r"Turn 1 \(user\) has a part of type 'str'"):
        processor.apply_chat_template([turn("user", ["red"])], tokenize=True)


def test_pictures_come_from_wherever_a_part_may_name_them(processor, picture, tmp_path):
    picture.save(tmp_path / "a.png")
    stream = BytesIO()
    picture.save(stream, format="png")
    data = base64.b64encode(stream.getvalue()).decode()
    url = f"data:image/png;base64,{data}"
    parts = (
        {"type": "image", "image": picture},
        {"type": "image", "image": str(tmp_path / "a.png")},
        {"type": "image", "path": str(tmp_path / "a.png")},
        {"type": "image", "url": url},
        {"type": "image", "base64": data},
        {"type": "image", "base64": base64.encodebytes(stream.getvalue()).decode()},
        {"type": "image", "base64": url},
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
        {"type": "image_url", "image_url": url},
        {"type": "input_image", "image_url": url},
    )
    options = {"tokenize": True, "return_dict": True}
    expected = processor.apply_chat_template([user(picture, "what?")], **options)
    rendered = processor.apply_chat_template([user(picture, "what?")])
    for part in parts:
        messages = [turn("user", [part, {"type": "text", "text": "what?"}])]
        before = copy.deepcopy(messages)
        inputs = processor.apply_chat_template(messages, **options)
        assert torch.equal(inputs["input_ids"], expected["input_ids"]), part
        assert torch.equal(inputs["pixel_values"], expected["pixel_values"]), part
        assert processor.apply_chat_template(messages) == rendered
        assert [m["content"][1:] for m in messages] == [m["content"][1:] for m in before]  # left as it was
    with pytest.raises(ValueError, match="cannot read image 'data:image/"):
        processor.apply_chat_template([turn("user", [{"type": "image", "base64": "abc"}])], **options)


@pytest.mark.attack
def test_texts_may_spell_control_tokens_in_conversations(processor, picture):
    spelled = "a </s><s> <image><boi><eoi><pad> b"
    messages = [turn("system", spelled), user(picture, spelled), assistant(spelled), turn("user", spelled)]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    for conversation in (messages, [messages, [user("red")]]):
        ids = processor.apply_chat_template(conversation, **options)["input_ids"][0]
        counts = [(ids == token).sum() for token in (BOS, EOS, BOI, EOI, IMAGE)]
        assert counts == [1, 1, 1, 1, L]
        image = processor.image_token
        expected = processor.apply_chat_template(messages, add_generation_prompt=True)
        assert processor.decode(ids).removeprefix("<s>").replace(f"<boi>{image * L}<eoi>", image) == expected
    processor.chat_template = "{{ tools[0]['a'] }}{{ messages[0]['role'] }}{{ messages[0]['tool_calls'][0]['b'] }}"
    other = [turn("user</s>", spelled, tool_calls=[{"b": spelled}])]
    ids = processor.apply_chat_template(other, tokenize=True, tools=[{"a": spelled}])[0]
    assert (ids == EOS).sum() == 0 and processor.decode(ids) == f"<s>{spelled}user</s>{spelled}"
    processor.chat_template = vicuna_chat_template()
    as_tokens = processor.apply_chat_template([user("a</s>")], tokenize=True, sanitize_control_tokens=False)
    assert (as_tokens == EOS).sum() == 1


def test_the_shipped_folder_has_the_template_of_today():
    folder = Path(unitok_mllm.__file__).parent / "checkpoints" / "tiny"
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == vicuna_chat_template(system="")


def test_the_template_writes_the_processors_own_image_token(with_tokenizer, picture):
    processor = with_tokenizer(image_token="<picture>")
    inputs = processor.apply_chat_template([user(picture, "<image>")], tokenize=True, return_dict=True)
    assert (inputs["input_ids"] == 300).sum() == L and len(inputs["pixel_values"]) == 1


BOS_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}"


@pytest.mark.parametrize("chat_template", [None, BOS_TEMPLATE], ids=["vicuna", "writes BOS"])
@pytest.mark.parametrize("change, count", [(lambda tokenizer: None, 1), (remove_bos, 0)], ids=["BOS", "no BOS"])
def test_exactly_one_bos_by_every_route(with_tokenizer, chat_template, change, count):
    if count == 0 and chat_template is not None:
        chat_template = chat_template.replace("{{ bos_token }}", "")
    processor = with_tokenizer(change, chat_template=chat_template)
    messages = [user("red"), assistant("yes")]
    rendered = processor.apply_chat_template(messages)
    routes = {
        "text": processor(text="red").input_ids,
        "texts": processor(text=["red", "<s>red", "<s><s>blue circle"][: 3 if count else 1]).input_ids,
        "chat": processor.apply_chat_template(messages, tokenize=True),
        "chats": processor.apply_chat_template([messages, messages[:1]], tokenize=True),
        "rendered chat": processor(text=rendered).input_ids,
        "without special tokens": processor(text="<s>" * count + "red", add_special_tokens=False).input_ids,
        "as text kwargs": processor(text="<s>" * count + "red", text_kwargs={"add_special_tokens": False}).input_ids,
        "image prompt": processor(text="red", generation_mode="image").input_ids,
        "null prompt": processor(text="red", generation_mode="image").unconditional_input_ids,
        "image sample": processor(text=processor.image_sample(None).replace("<image>", "")).input_ids,
    }
    for route, ids in routes.items():
        for row in torch.as_tensor(ids).tolist():
            row = [token for token in row if token != 0]
            assert row.count(BOS) == count and row[:count] == [BOS] * count, route


def test_llamas_byte_tokens_open_and_close_images():
    vocab = {
        token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "<0x00>", "<0x01>", "▁", "r", "e", "d", "▁r"])
    }
    tokenizer = LlamaTokenizer(vocab=vocab, merges=[("▁", "r")], add_bos_token=True)
    image_processor = UniTokImageProcessor(size={"height": 48, "width": 48})
    processor = UniTokMLLMProcessor(image_processor, tokenizer)
    inputs = processor(text=["red <image>", "red"], images=Image.new("RGB", (20, 20)))
    assert processor.image_token_id == 10 and tokenizer.pad_token == "<unk>"
    picture = [3, *[10] * L, 4]
    assert inputs.input_ids[0].tolist()[-len(picture) :] == picture
    assert inputs.input_ids[1].tolist()[-4:] == [1, 9, 7, 8]
    assert [row.count(1) for row in inputs.input_ids.tolist()] == [1, 1]


def test_the_assistant_mask_is_the_answers_and_their_ends(processor, picture):
    first = [user(picture, "what is it?"), assistant("a red circle"), user("and", picture, picture), assistant("yes")]
    second = [user("what?"), assistant("no")]
    inputs = processor.apply_chat_template(
        [first, second], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    mask = torch.as_tensor(inputs["assistant_masks"]).bool()
    assert mask.shape == inputs["input_ids"].shape and len(inputs["pixel_values"]) == 3
    answers = [processor.decode(ids[m]) for ids, m in zip(inputs["input_ids"], mask)]
    assert answers == [" a red circle</s> yes</s>", " no</s>"]
    assert not (mask & (inputs["input_ids"] == IMAGE)).any()


def test_each_image_becomes_its_positions_between_boi_and_eoi(processor, picture):
    ids = processor(text=["<image>red<image>", "red", "<image>"], images=[picture] * 3).input_ids
    red = processor.tokenizer.convert_tokens_to_ids(["red"])
    assert [row[row != 0].tolist() for row in ids] == [
        [BOS, *PICTURE, *red, *PICTURE],
        [BOS, *red],
        [BOS, *PICTURE],
    ]
    wide = {"images_kwargs": {"size": {"height": 32, "width": 64}}}
    assert (processor(text="<image>", images=picture, **wide).input_ids == IMAGE).sum() == 2 * 4


@pytest.mark.parametrize(
    "texts, counts, message",
    [
        ("<image>", 0, "Found 1 <image> tokens in the text but no images"),
        ("<image>", 2, "Found total 1 <image> tokens and 2 images"),
        ("<image><image>", 1, "Found total 2 <image> tokens and 1 images"),
        ("red", 1, "Found total 0 <image> tokens and 1 images"),
        (["<image>", "<image>"], [2, 0], r"The texts have \[1, 1\] <image> tokens, but got \[2, 0\] images"),
        (["red", "<image>"], [1, 0], r"The texts have \[0, 1\] <image> tokens, but got \[1, 0\] images"),
        (["<image>"], [1, 1], "Found total 1 <image> tokens and 2 images"),
    ],
)
def test_images_that_do_not_pair_up_with_their_placeholders_raise(processor, picture, texts, counts, message):
    images = [[picture] * n for n in counts] if isinstance(counts, list) else [picture] * counts or None
    for mode in ("text", "image"):
        with pytest.raises(ValueError, match=message):
            processor(text=texts, images=images, generation_mode=mode, sanitize_control_tokens=False)
    if images:
        with pytest.raises(ValueError, match=message):
            processor(text=texts, images=images, generation_mode="image")


def test_truncation_cuts_text_but_never_an_image(processor, picture):
    text = "<image> what is the blue shape?"
    whole = processor(text=text, images=picture).input_ids
    cut = processor(text=text, images=picture, truncation=True, max_length=14).input_ids
    assert torch.equal(cut, whole[:, :14])
    for max_length in (2, 6, 10, 11):  # before, within and right behind the placeholders
        with pytest.raises(ValueError, match="max_length"):
            processor(text=text, images=picture, truncation=True, max_length=max_length)
    with pytest.raises(ValueError, match="max_length"):
        processor(text="a red circle", generation_mode="image", truncation=True, max_length=6)


def test_prompts_are_the_beginnings_of_the_training_samples(processor, picture):
    description = "a red circle"
    prompt = processor(text=description, generation_mode="image")
    for ids, sample in (
        (prompt.input_ids[0], processor.image_sample(description)),
        (prompt.unconditional_input_ids[0], processor.image_sample(None)),
    ):
        trained = processor(text=sample, images=picture).input_ids[0].tolist()
        assert ids[-1] == BOI and trained == [*ids.tolist(), *[IMAGE] * L, EOI, EOS]
    suffix = " Generate an image based on this description."
    assert processor.decode(prompt.input_ids[0]) == f"<s>{description}{suffix}<boi>"
    assert processor.decode(prompt.unconditional_input_ids[0]) == "<s><unconditional><boi>"
    history = processor(text=["<image> in blue", "red"], images=[[picture], []], generation_mode="image")
    assert history.input_ids[:, -1].tolist() == [BOI, BOI] and history.pixel_values.shape[0] == 1
    assert history.unconditional_input_ids.shape[0] == 1


def test_text_alone_needs_no_images(processor, picture):
    what, one = processor.tokenizer.convert_tokens_to_ids(["what", "?"]), processor(text="what?")
    assert set(one) == {"input_ids", "attention_mask"} and one.input_ids.tolist() == [[BOS, *what]]
    for images in ([], [[]]):
        assert torch.equal(processor(text=["what?"], images=images).input_ids, one.input_ids)
    padded = processor(text=["what?", "what is the blue shape?"])
    assert padded.attention_mask.sum(dim=1).tolist() == [3, padded.attention_mask.shape[1]]
    assert torch.equal(padded.input_ids[0, -3:], one.input_ids[0])  # padded on the left
    assert set(processor(images=picture)) == {"pixel_values"}


def test_calls_that_mean_nothing_raise(processor):
    for kwargs, message in (
        ({}, "at least one input"),
        ({"text": []}, "empty list"),
        ({"text": [], "generation_mode": "image"}, "empty list"),
        ({"text": "red", "generation_mode": "video"}, "'text', 'image', 'interleaved' or 'edit', got 'video'"),
        ({"generation_mode": "image"}, "needs a text"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(**kwargs)


@pytest.mark.parametrize("missing", ["boi_token", "eoi_token"])
def test_tokens_that_are_not_in_the_vocabulary_raise(processor, missing):
    tokens = {"boi_token": "<boi>", "eoi_token": "<eoi>", missing: "<0x07>"}
    with pytest.raises(ValueError, match=f"{missing} '<0x07>' is not in the tokenizer's vocabulary"):
        UniTokMLLMProcessor(processor.image_processor, processor.tokenizer, **tokens)


def test_an_image_token_that_the_tokenizer_lacks_is_added_behind_its_vocabulary(with_tokenizer, picture):
    processor = with_tokenizer(image_token="<picture>")
    assert (
        processor.config_token_ids()
        == {"boi_token_id": 3, "eoi_token_id": 4, "image_token_id": 300} | processor.config_prompt_ids()
    )
    assert (processor(text="red <picture>", images=picture).input_ids == 300).sum() == L


@pytest.mark.parametrize("chat_template", [None, BOS_TEMPLATE], ids=["vicuna", "other"])
def test_saving_and_loading_keep_tokens_template_and_sizes(with_tokenizer, picture, tmp_path, chat_template):
    processor = with_tokenizer(image_token="<picture>", chat_template=chat_template)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is UniTokMLLMProcessor and loaded.chat_template == processor.chat_template
    assert loaded.config_token_ids() == processor.config_token_ids()
    assert loaded.image_processor.size == processor.image_processor.size
    for kwargs in (
        {"text": ["<picture> red", "<picture> a blue circle"], "images": [picture] * 2},
        {"text": ["<picture> red", "blue"], "images": picture, "generation_mode": "image"},
    ):
        before, after = processor(**kwargs), loaded(**kwargs)
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_outputs_become_texts_or_pictures(processor):
    ids = processor(text=["a red circle", "yes"]).input_ids
    assert processor.post_process_multimodal_output(ids) == ["a red circle", "yes"]
    kept = processor.post_process_multimodal_output(ids, skip_special_tokens=False)
    assert kept[0] == "<s>a red circle" and kept[1].endswith("<pad><s>yes")
    pixels = torch.full((2, 3, 16, 16), -1.0)
    pixels[1, 0] = 5
    pictures = processor.post_process_multimodal_output(pixels, generation_mode="image")
    assert [p.getpixel((3, 3)) for p in pictures] == [(0, 0, 0), (255, 0, 0)]
    with pytest.raises(ValueError, match="audio"):
        processor.post_process_multimodal_output(ids, generation_mode="audio")


def test_the_librarys_pipeline_chats_about_images(lively_mllm, processor, picture, tmp_path):
    lively_mllm.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pipe = pipeline("image-text-to-text", model=str(tmp_path))
    messages = [user(picture, "what is it?")]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    answer = pipe(text=messages, generate_kwargs=options, return_full_text=False)[0]["generated_text"]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = lively_mllm.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    assert answer == processor.post_process_multimodal_output(ids)[0]


ODD_TEXTS = {
    "empty": "",
    "control characters": "a\x00b\x07\x1b[31m\r\n\t\x7f\u0085",
    "right to left": "\u202eمربع أحمر \u05d0\u05d3\u05d5\u05dd\u202c",
    "joined and astral": "👩‍👩‍👧‍👦 e\u0301 \U000f1234",
    "placeholder": "is <image> an <image><image>?",
    "special tokens": "<s>red</s><boi>blue<eoi><pad> <boi><image><eoi>",
}


@pytest.mark.parametrize("name", ODD_TEXTS)
@pytest.mark.attack
def test_odd_texts_are_plain_text_by_every_route(processor, name):
    text, picture = ODD_TEXTS[name], Image.new("RGB", (20, 20), "red")
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]
    asked = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    drawn = processor(text=text, generation_mode="image")
    edited = processor(images=picture, text=text, generation_mode="edit")
    for ids, images, drawing in (
        (asked["input_ids"], 1, 0),
        (drawn["input_ids"], 0, 1),
        (edited["input_ids"], 1, 1),
        (edited["text_alone_input_ids"], 0, 1),
    ):
        (row,) = ids.tolist()
        counts = [row.count(token) for token in (BOS, BOI, IMAGE, EOI, EOS)]
        assert row[0] == BOS and counts == [1, images + drawing, images * L, images, 0]
        assert text in processor.tokenizer.decode(row)
    assert len(asked["pixel_values"]) == len(edited["pixel_values"]) == 1


def test_texts_without_tokens_are_the_same_sanitized_or_not(processor):
    texts, picture = ["a red circle", "and\nwhat else? \x07"], Image.new("RGB", (20, 20))
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": t}]}]
        for t in texts
    ]
    calls = (
        lambda **options: processor.apply_chat_template(chats, tokenize=True, return_dict=True, **options),
        lambda **options: processor(text=texts, generation_mode="image", **options),
        lambda **options: processor(images=[picture] * 2, text=texts, generation_mode="edit", **options),
    )
    for call in calls:
        plain, sanitized, default = call(sanitize_control_tokens=False), call(sanitize_control_tokens=True), call()
        assert plain.keys() == sanitized.keys() == default.keys()
        for key in plain:
            assert torch.equal(plain[key], sanitized[key]) and torch.equal(plain[key], default[key]), key


@pytest.mark.attack
def test_llamas_byte_tokens_can_be_spelled_too():
    vocabulary = ["<unk>", "<s>", "</s>", "<0x00>", "<0x01>", "▁", *"<>0x1/sunkred", "▁r"]
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = LlamaTokenizer(vocab=ids, merges=[("▁", "r")], add_bos_token=True)
    processor = UniTokMLLMProcessor(UniTokImageProcessor(size={"height": 48, "width": 48}), tokenizer)
    row = processor(text="red<0x00></s>", generation_mode="image", sanitize_control_tokens=True).input_ids[0].tolist()
    plain = processor(text="red", generation_mode="image").input_ids[0].tolist()
    assert row.count(3) == plain.count(3) == 1 and 2 not in row[1:] and row[:4] == plain[:4]


def test_plain_texts_take_the_librarys_options(processor):
    """Truncation, padding, offsets and masks are those of the same text without control tokens, but for its ids."""
    texts = ["red </s>blue", "is <image> an <s>?"]
    whole = processor.apply_chat_template(
        [[{"role": "user", "content": text}, {"role": "assistant", "content": text}] for text in texts],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    for ids, mask, text in zip(whole["input_ids"], torch.as_tensor(whole["assistant_masks"]).bool(), texts):
        assert processor.decode(ids[mask]) == f" {text}</s>" and (ids[mask] == EOS).sum() == 1
    cut = processor(text=texts[0], images=None, generation_mode="image", truncation=True, max_length=400)
    assert torch.equal(cut["input_ids"], processor(text=texts[0], generation_mode="image")["input_ids"])
    with pytest.raises(ValueError, match="max_length cuts off a <boi>"):
        processor(text=texts[0], generation_mode="image", truncation=True, max_length=5)
    padded = processor(text=texts[0], generation_mode="image", padding="max_length", max_length=100)
    assert padded["input_ids"].shape == padded["attention_mask"].shape == (1, 100)
    assert padded["attention_mask"].sum() == cut["input_ids"].shape[1]
    with pytest.raises(ValueError, match="come without special_tokens_mask"):
        processor(text=texts[0], generation_mode="image", return_special_tokens_mask=True)


def test_where_there_are_images_a_description_says_where_they_go(processor):
    pictures = [Image.new("RGB", (20, 20), "red")] * 2
    inputs = processor(text="<image> as</s> <image>", images=pictures, generation_mode="image")
    (row,) = inputs["input_ids"].tolist()
    assert [row.count(token) for token in (BOS, BOI, IMAGE, EOI, EOS)] == [1, 3, 2 * L, 2, 0]
    with pytest.raises(ValueError, match="Found total 0 <image> tokens and 2 images"):
        processor(text="<image> <image>", images=pictures, generation_mode="image", sanitize_control_tokens=True)


def test_placeholders_without_their_images_are_refused_where_texts_are_not_plain(processor):
    for mode in ("text", "image", "interleaved"):
        with pytest.raises(ValueError, match="Found 1 <image> tokens in the text but no images"):
            processor(text="a red <image>", generation_mode=mode, sanitize_control_tokens=False)
    with pytest.raises(ValueError, match="sanitize_control_tokens needs tokenize=True"):
        processor.apply_chat_template([{"role": "user", "content": "a"}], sanitize_control_tokens=True)


CALLS = {
    "plain": lambda processor: processor.text_ids(["a <image> circle", "red"]),
    "padded": lambda processor: processor(text=["a red circle <boi>", "red"])["input_ids"].tolist(),
    "cut": lambda processor: processor(text=["a red one", "a circle"], truncation=True, max_length=2)[
        "input_ids"
    ].tolist(),
    "marked": lambda processor: processor.encode_text(processor.mark_plain("a <image>") + "<image>"),
    "drawing": lambda processor: processor(text=["a <boi> circle"], generation_mode="image")["input_ids"].tolist(),
}


def test_threads_can_share_a_processor(processor):
    expected = [call(processor) for call in CALLS.values()]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(len(CALLS)) as pool:
            for _ in range(40):
                assert [*pool.map(lambda call: call(processor), CALLS.values())] == expected
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_leaves_the_tokenizers_options_alone(processor, name):
    backend = processor.tokenizer.backend_tokenizer
    processor.tokenizer("a", padding="max_length", truncation=True, max_length=7, split_special_tokens=True)
    before = backend.to_str(), backend.encode_special_tokens
    CALLS[name](processor)
    assert (backend.to_str(), backend.encode_special_tokens) == before


def test_a_detached_tokenizer_is_the_same_but_for_its_options(processor):
    shared = processor.tokenizer
    shared.add_tokens(["<new>", "<newer>"])
    detached = detached_tokenizer(shared)
    assert detached.backend_tokenizer is not shared.backend_tokenizer
    assert detached("a <new> <newer><image>").input_ids == shared("a <new> <newer><image>").input_ids
    shared.backend_tokenizer.no_padding()
    shared.backend_tokenizer.no_truncation()
    assert detached.backend_tokenizer.to_str() == shared.backend_tokenizer.to_str()


def test_tokens_that_are_added_later_count(processor):
    processor.tokenizer.add_tokens(["<new>"])
    assert processor(text="<new>")["input_ids"][0, -1] == processor.tokenizer.convert_tokens_to_ids("<new>")
