"""The MLLM's training data: samples of every type, their mixture and packing, and broken samples."""

import json
import math
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import IMAGE_SIZE
from PIL import Image

from training.codes import write_metadata, write_shard
from training.data import IGNORE, MLLMCollator, MLLMDataset, SampleTexts, Source, drop_conditions, to_messages
from training.files import ImageStore, UnusableSample


L = (IMAGE_SIZE // 16) ** 2
EDIT_FORMS = (  # the words and pictures asked with, and all pictures
    ((None, "make it blue"), ("red.png", "blue.png")),
    ((None, "<unconditional>"), ("red.png", "blue.png")),
    (("make it blue",), ("blue.png",)),
)


@pytest.fixture
def texts(processor) -> SampleTexts:
    return SampleTexts(processor, max_length=200)


@pytest.fixture
def folder(tmp_path):
    """Six pictures with captions, questions and texts."""
    rng = np.random.default_rng(0)
    captions, conversations = [], []
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        captions.append({"image": f"{i}.png", "caption": f"shape {i}"})
        turns = [{"from": "human", "value": f"<image>\nwhat is {i}?"}, {"from": "gpt", "value": f"a {i}"}]
        conversations.append({"image": f"{i}.png", "conversations": turns})
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions), encoding="utf-8")
    (tmp_path / "conversations.json").write_text(json.dumps(conversations), encoding="utf-8")
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"blue {i}"}) + "\n" for i in range(4)), encoding="utf-8"
    )
    return tmp_path


def sources(folder) -> list[Source]:
    return [
        Source(path=f"{folder}/conversations.json"),
        Source(path=f"{folder}/captions.jsonl", type="captions", task="draw"),
        Source(path=f"{folder}/text.jsonl", type="text"),
    ]


# --- texts ---


def test_a_conversation_is_what_the_processor_makes_of_it_at_inference(texts, processor):
    messages = to_messages(
        [
            {"from": "human", "value": "<image>\nwhat is this?"},
            {"from": "gpt", "value": "a circle"},
            {"from": "human", "value": "and this? <image>"},
            {"from": "gpt", "value": "red"},
        ],
        "<image>",
        num_images=2,
    )
    sample = texts.conversation(messages)
    inputs = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        processor_kwargs={"images": [Image.new("RGB", (40, 40))] * 2},
    )
    assert sample["input_ids"].tolist() == inputs["input_ids"][0].tolist()
    is_answer = torch.as_tensor(inputs["assistant_masks"])[0].bool()
    assert torch.equal(sample["labels"], sample["input_ids"].masked_fill(~is_answer, IGNORE))
    assert sample["image_targets"].tolist() == [False, False]
    eos = processor.tokenizer.eos_token
    assert processor.decode(sample["labels"][sample["labels"] != IGNORE]).split(eos) == [" a circle", " red", ""]


def test_a_picture_in_an_answer_is_drawn(texts, processor):
    turns = [{"from": "human", "value": "draw a circle"}, {"from": "gpt", "value": "here: <image>"}]
    sample = texts.conversation(to_messages(turns, "<image>", num_images=1))
    assert sample["image_targets"].tolist() == [True]
    learned = sample["labels"][sample["labels"] != IGNORE].tolist()
    assert learned[-3:] == [processor.boi_token_id, processor.eoi_token_id, processor.tokenizer.eos_token_id]


def test_a_drawing_is_the_processors_sample(texts, processor):
    for caption in ("a red circle", None):
        sample = texts.drawing(caption)
        expected = processor(images=Image.new("RGB", (40, 40)), text=processor.image_sample(caption))["input_ids"][0]
        assert sample["input_ids"].tolist() == expected.tolist()
        frame = [processor.boi_token_id, processor.eoi_token_id, processor.tokenizer.eos_token_id]
        assert sample["labels"][sample["labels"] != IGNORE].tolist() == frame
        assert sample["image_targets"].tolist() == [True]


def test_captions_and_texts_are_learned_to_their_ends(texts, processor):
    eos = processor.tokenizer.eos_token
    for sample in (texts.reading("a circle"), texts.plain("a circle")):
        assert processor.decode(sample["labels"][sample["labels"] != IGNORE]) == f"a circle{eos}"
    assert texts.reading("a")["image_targets"].tolist() == [False]
    assert texts.plain("a")["image_targets"].tolist() == []


def test_long_samples_are_cut_but_never_through_an_image(processor):
    whole = SampleTexts(processor, 1000).reading("a circle " * 20)
    first = L + 3  # bos, boi, L positions, eoi
    cut = SampleTexts(processor, first + 5).reading("a circle " * 20)
    assert torch.equal(cut["input_ids"], whole["input_ids"][: first + 5])
    with pytest.raises(UnusableSample, match="nothing to learn"):
        SampleTexts(processor, first).reading("a circle")
    for max_length in (first - 1, first - 2, 3):
        with pytest.raises(UnusableSample, match=f"max_length {max_length} would cut through an image"):
            SampleTexts(processor, max_length).reading("a circle")


def test_turns_and_images_that_do_not_pair_up_are_named():
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "x"}]
    with pytest.raises(UnusableSample, match="1 <image> in the turns, but 2 image files"):
        to_messages(turns, "<image>", num_images=2)
    with pytest.raises(UnusableSample, match="from 'robot'"):
        to_messages([{"from": "robot", "value": "x"}], "<image>", num_images=0)


def test_a_turn_that_the_template_has_no_place_for_is_an_unusable_sample(texts):
    turns = [{"from": who, "value": who} for who in ("system", "developer", "human", "user", "gpt", "assistant")]
    sample = texts.conversation(to_messages(turns, "<image>", num_images=0))
    text = texts.processor.decode(sample["input_ids"])
    assert text == "<s>system developer USER: human USER: user ASSISTANT: gpt</s>ASSISTANT: assistant</s>"
    late = to_messages([turns[2], turns[0], turns[4]], "<image>", num_images=0)
    with pytest.raises(UnusableSample, match=r"Turn 2 \(system\) comes too late"):
        texts.conversation(late)
    with pytest.raises(UnusableSample, match="from 'tool'"):
        to_messages([{"from": "tool", "value": "x"}], "<image>", num_images=0)


@pytest.mark.attack
def test_texts_that_spell_control_tokens_are_learned_as_text(texts, processor):
    spelled = "a </s><s> <image><boi><eoi> b"
    turns = [{"from": "human", "value": "<image>\nwhat is </s>?"}, {"from": "gpt", "value": "an <eoi></s> or a <boi>"}]
    samples = {
        "drawing": (texts.drawing(spelled), 1, ""),
        "reading": (texts.reading(spelled), 1, spelled),
        "plain": (texts.plain(spelled), 0, spelled),
        "conversation": (texts.conversation(to_messages(turns, "<image>", 1)), 1, " an <eoi></s> or a <boi>"),
    }
    for name, (sample, images, learned) in samples.items():
        ids, labels = sample["input_ids"], sample["labels"]
        tokens = ("bos", "eos"), ("boi", "eoi", "image")
        names = [getattr(processor.tokenizer, f"{token}_token_id") for token in tokens[0]]
        names += [getattr(processor, f"{token}_token_id") for token in tokens[1]]
        assert [(ids == token).sum() for token in names] == [1, 1, images, images, images * L], name
        assert len(sample["image_targets"]) == images, name
        assert processor.decode(labels[labels != IGNORE]).removesuffix("</s>").removeprefix("<boi><eoi>") == learned
        assert (spelled in processor.decode(ids)) == (name != "conversation")
    prompt = processor(text=spelled, generation_mode="image")["input_ids"][0]
    assert texts.drawing(spelled)["input_ids"][: len(prompt)].tolist() == prompt.tolist()
    picture = Image.new("RGB", (9, 9))
    asked = processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what is </s>?"}],
            }
        ],
        tokenize=True,
        add_generation_prompt=True,
    )[0]
    assert samples["conversation"][0]["input_ids"][: len(asked)].tolist() == asked.tolist()


def test_conditions_are_dropped_one_at_a_time_where_pictures_are_the_answer():
    edit = [{"from": "human", "value": "<image>\nmake it blue"}, {"from": "gpt", "value": "<image>"}]
    messages, names = to_messages(edit, "<image>", num_images=2), ["red.png", "blue.png"]
    seen, rng = Counter(), np.random.default_rng(0)
    for _ in range(3000):
        new, kept = drop_conditions(messages, names, 0.1, rng)
        words = tuple(part.get("text") for part in new[0]["content"])
        seen[words, tuple(kept)] += 1
        assert new[1] == messages[1]
    counts = [seen.pop(key) for key in EDIT_FORMS]
    assert not seen and 2320 < counts[0] < 2480 and all(240 < count < 360 for count in counts[1:])
    assert messages == to_messages(edit, "<image>", num_images=2)  # as they were

    question = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "blue"}]
    messages = to_messages(question, "<image>", num_images=1)
    assert drop_conditions(messages, names[:1], 0.5, np.random.default_rng(0)) == (messages, names[:1])


@pytest.mark.attack
def test_a_picture_of_a_refused_shape_is_an_unusable_sample(texts, tmp_path):
    Image.new("RGB", (60000, 1)).save(tmp_path / "line.png")
    (tmp_path / "captions.jsonl").write_text('{"image": "line.png", "caption": "a line"}', encoding="utf-8")
    source = Source(str(tmp_path / "captions.jsonl"), type="captions")
    with pytest.raises(UnusableSample, match="line.png"):
        source.sample(0, texts, 0.0, np.random.default_rng(0))


def test_a_template_that_marks_no_answers_is_refused(processor):
    processor.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match="generation"):
        SampleTexts(processor, 100)


# --- sources and mixture ---


def test_pictures_come_alike_from_a_folder_and_from_shards(folder, tmp_path):
    for shard, numbers in enumerate(((0, 1, 2), (3, 4, 5))):
        with tarfile.open(tmp_path / f"s{shard}.tar", "w") as archive:
            for i in numbers:
                archive.add(folder / f"{i}.png", arcname=f"{i}.png")
    shards, plain = ImageStore(f"{tmp_path}/s{{0..1}}.tar"), ImageStore(str(folder))
    for i in range(6):
        assert np.array_equal(np.array(shards[f"{i}.png"]), np.array(plain[f"{i}.png"]))
    with pytest.raises(UnusableSample, match="no image 9.png"):
        shards["9.png"]
    with pytest.raises(FileNotFoundError, match="no shard"):
        ImageStore(f"{tmp_path}/x*.tar")


def test_equal_names_in_several_shards_are_told_apart(folder, texts, tmp_path):
    for shard in range(2):
        (tmp_path / f"part{shard}").mkdir()
        with tarfile.open(tmp_path / f"part{shard}/x.tar", "w") as archive:
            for i in range(3):
                archive.add(folder / f"{3 * shard + i}.png", arcname=f"{i}.png")
            archive.add(folder / f"{shard}.png", arcname=f"only{shard}.png")
    store = ImageStore(f"{tmp_path}/part{{0..1}}/x.tar")
    numbered = {f"part{shard}/x.tar/{i}.png": 3 * shard + i for shard in range(2) for i in range(3)}
    expected = numbered | {"only0.png": 0, "only1.png": 1}
    assert sorted(store.names) == sorted(expected)
    for name, i in expected.items():
        assert np.array_equal(np.array(store[name]), np.array(Image.open(folder / f"{i}.png"))), name
    with pytest.raises(
        ValueError, match=r"0.png is in 2 shards of .*: name it part0/x.tar/0.png or part1/x.tar/0.png"
    ):
        store["0.png"]
    with pytest.raises(ValueError, match="1.png is in 2 shards"):  # and not passed over as a broken sample
        rows = [{"image": "only0.png", "caption": "a"}, {"image": "1.png", "caption": "b"}]
        (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        Source(f"{tmp_path}/rows.json", type="captions", images=f"{tmp_path}/part{{0..1}}/x.tar").sample(
            1, texts, 0.0, np.random.default_rng(0)
        )
    with tarfile.open(tmp_path / "twice.tar", "w") as archive:
        archive.add(folder / "0.png", arcname="0.png")
        archive.add(folder / "1.png", arcname="0.png")
    with pytest.raises(ValueError, match="cannot read .*twice.tar: it has two files of the name 0.png"):
        ImageStore(str(tmp_path / "twice.tar"))
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(UnusableSample, match="no image 0.png in .*empty.tar"):
        ImageStore(str(tmp_path / "empty.tar"))["0.png"]


def test_the_mixture_keeps_its_weights_and_goes_through_every_row(folder, texts):
    mixed = sources(folder)
    for source, weight in zip(mixed, (1, 2, 1)):
        source.weight = weight
    dataset = MLLMDataset(mixed, texts, num_samples=48)
    assert np.bincount(dataset.choices).tolist() == [12, 24, 12]
    drawn = [dataset._row(1, rank) for rank in range(24)]
    for passes in range(4):
        assert sorted(drawn[6 * passes : 6 * passes + 6]) == list(range(6))
    assert drawn[:6] != drawn[6:12]
    assert len(MLLMDataset(sources(folder), texts)) == 16
    mixed[0].weight = None
    with pytest.raises(ValueError, match="all sources of `datasets` a weight, or none of them"):
        MLLMDataset(mixed, texts)


def as_lists(sample: dict) -> dict:
    return {k: [i.tolist() for i in v] if k == "images" else v.tolist() for k, v in sample.items()}


def test_a_sample_depends_on_the_seed_and_its_number_alone(folder, texts):
    forward = MLLMDataset(sources(folder), texts, num_samples=40, caption_dropout=0.5)
    backward = MLLMDataset(sources(folder), texts, num_samples=40, caption_dropout=0.5)
    later = {i: as_lists(backward[i]) for i in reversed(range(40))}
    assert [as_lists(forward[i]) for i in range(40)] == [later[i] for i in range(40)]
    other = MLLMDataset(sources(folder), texts, num_samples=40, caption_dropout=0.5, seed=1)
    assert [as_lists(other[i]) for i in range(40)] != [later[i] for i in range(40)]


def test_captions_are_dropped_for_the_null_prompt_of_guidance(folder, texts):
    source = Source(path=f"{folder}/captions.jsonl", type="captions", task="draw")
    dropped = [MLLMDataset([source], texts, 60, caption_dropout=share) for share in (0.0, 0.25, 1.0)]
    null = texts.drawing(None)["input_ids"].tolist()
    counts = [sum(dataset[i]["input_ids"].tolist() == null for i in range(60)) for dataset in dropped]
    assert counts[0] == 0 and 5 <= counts[1] <= 25 and counts[2] == 60


@pytest.mark.attack
def test_a_broken_picture_is_named_and_passed_over_and_many_stop_the_run(folder, texts, caplog):
    (folder / "2.png").write_bytes(b"not a picture")
    source = Source(path=f"{folder}/captions.jsonl", type="captions", task="draw")
    dataset = MLLMDataset([source], texts, 6, caption_dropout=0.0)
    prompts = sorted(texts.processor.decode(dataset[i]["input_ids"][:12]) for i in range(6))
    assert dataset.broken.broken == 1 and "2.png" in caplog.text
    assert [p.split("shape ")[1][0] for p in prompts] == ["0", "1", "3", "3", "4", "5"]
    for i in range(6):
        (folder / f"{i}.png").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="of 100 samples are broken"):
        dataset[0]


DRAW_TURNS = [{"from": "human", "value": "draw it"}, {"from": "gpt", "value": "<image>"}]
EDIT_TURNS = [{"from": "human", "value": "<image> flip it"}, {"from": "gpt", "value": "<image>"}]


@pytest.mark.parametrize(
    "options, row, modes",
    [
        ({"type": "captions", "task": "draw"}, {"image": "0.png", "caption": "x"}, ["reconstruct"]),
        ({"type": "captions"}, {"image": "0.png", "caption": "x"}, ["understand"]),
        ({"type": "captions", "prompt": "what?"}, {"image": "0.png", "caption": "x"}, ["understand"]),
        ({}, {"image": "0.png", "conversations": DRAW_TURNS}, ["reconstruct"]),
        ({}, {"image": ["0.png", "1.png"], "conversations": EDIT_TURNS}, ["understand", "understand"]),
        ({"mode": "classify"}, {"image": ["0.png", "1.png"], "conversations": EDIT_TURNS}, ["classify", "classify"]),
        (
            {"type": "captions", "task": "draw", "mode": "understand"},
            {"image": "0.png", "caption": "x"},
            ["understand"],
        ),
    ],
)
def test_what_is_drawn_is_cropped_and_what_is_read_is_whole(folder, texts, options, row, modes):
    (folder / "rows.json").write_text(json.dumps([row]), encoding="utf-8")
    sample = Source(f"{folder}/rows.json", **options).sample(0, texts, 0.0, np.random.default_rng(0))
    assert len(sample["images"]) == len(modes)
    for i, (pixels, mode) in enumerate(zip(sample["images"], modes)):
        picture = Image.open(folder / f"{i}.png")
        expected = texts.processor.image_processor(picture, mode=mode, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(pixels, expected)


def test_codes_in_another_mode_are_refused(folder, texts):
    metadata = {"format": "parquet", "variants": 1, "num_codebooks": 4, "codebook_size": 32, "num_positions": L}
    for mode in ("understand", "reconstruct"):
        write_metadata(folder / mode, metadata | {"num_shards": 1, "mode": mode})
        write_shard(folder / mode / "000000.parquet", {f"{i}.png": torch.full((1, 4, L), i) for i in range(6)})
    captions, draw = f"{folder}/captions.jsonl", {"type": "captions", "task": "draw"}
    (folder / "draw.json").write_text(json.dumps([{"image": "0.png", "conversations": DRAW_TURNS}]), encoding="utf-8")
    rng = np.random.default_rng(0)
    for options in (
        draw | {"codes": f"{folder}/reconstruct"},
        draw | {"codes": f"{folder}/understand", "mode": "understand"},
    ):
        assert Source(captions, **options).sample(2, texts, 0.0, rng)["images"][0].eq(2).all()
    for path, options, message in (
        (captions, draw | {"codes": f"{folder}/understand"}, "'understand', but .*captions.jsonl takes 'reconstruct'"),
        (captions, {"type": "captions", "codes": f"{folder}/reconstruct"}, "'reconstruct', but .* takes 'understand'"),
        (f"{folder}/conversations.json", {"codes": f"{folder}/understand", "mode": "classify"}, "takes 'classify'"),
    ):
        with pytest.raises(ValueError, match=message):
            Source(path, **options)
    source = Source(f"{folder}/draw.json", codes=f"{folder}/understand")
    with pytest.raises(
        ValueError, match="extract codes with --mode reconstruct, or give that source `mode: understand`"
    ):
        MLLMDataset([source], texts, 1)[0]


def test_a_source_that_cannot_be_is_refused(folder):
    for options, message in (
        ({"type": "pictures"}, "type must be one of conversations"),
        ({"task": "paint"}, "task must be read or draw"),
        ({"weight": 0}, "weight of .* must be a number from 1e-12 to 1e.12, got 0"),
        ({"weight": math.nan}, "weight of .* must be a number from 1e-12 to 1e.12, got nan"),
        ({"weight": "x"}, "weight of .* must be a number from 1e-12 to 1e.12, got 'x'"),
        ({"images": 3}, "images of a data set must be a text, got 3"),
        ({"images": "/nowhere"}, "no image folder"),
        ({"mode": "crop"}, "mode must be one of understand, reconstruct, classify, got 'crop'"),
        ({"task": "draw"}, "type conversations, task draw. has no use for task 'draw'"),
        ({"prompt": "what?"}, "has no use for prompt 'what"),
        ({"type": "captions", "task": "draw", "prompt": "what?"}, "task draw. has no use for prompt"),
        ({"codes": "x", "images": str(folder)}, "with codes. has no use for images"),
        ({"type": "text", "mode": "understand"}, "type text, task read. has no use for mode"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            Source(path=f"{folder}/conversations.json", **options)
    with pytest.raises(FileNotFoundError, match="no data file"):
        Source(path=f"{folder}/nothing.json")
    with pytest.raises(TypeError, match="imges"):
        Source(path=f"{folder}/conversations.json", imges="x")


# --- batches ---


@pytest.fixture
def samples(folder, texts) -> list[dict]:
    """Two of each kind, and a conversation about two pictures; pictures as codes and as pixels."""
    dataset = MLLMDataset(sources(folder), texts, num_samples=6, caption_dropout=0.0)
    samples = [dataset[i] for i in range(6)]
    turns = [{"from": "human", "value": "<image><image> which?"}, {"from": "gpt", "value": "the first one"}]
    two = texts.conversation(to_messages(turns, "<image>", num_images=2))
    return [*samples, two | {"images": [torch.randint(32, (4, L)), torch.randint(32, (4, L))]}]


def loss_of(model, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and its gradients."""
    batch = dict(batch)
    batch.pop("num_tokens")
    places = batch.pop("pixel_places")
    batch["image_codes"][places] = model.encode_images(batch.pop("pixel_values"))
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packing", [{"pack_to": 200}, {"pack_to": 400}, {"one_row": True}])
def test_packed_and_padded_give_the_same_loss_and_gradients(samples, processor, lively_mllm, packing):
    pad = processor.tokenizer.pad_token_id
    padded = MLLMCollator(pad, (4, L))(samples)
    packed = MLLMCollator(pad, (4, L), **packing)(samples)
    assert len(packed["input_ids"]) < len(padded["input_ids"])
    assert packed["num_tokens"] == padded["num_tokens"] == sum(len(s["input_ids"]) for s in samples)
    (expected, gradients), (loss, others) = loss_of(lively_mllm, padded), loss_of(lively_mllm, packed)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item() + 1e-7)


def test_a_packed_row_is_no_longer_than_asked_for(samples, processor):
    batch = MLLMCollator(processor.tokenizer.pad_token_id, (4, L), pack_to=200)(samples)
    assert batch["input_ids"].shape[1] <= 200
    starts = (batch["position_ids"] == 0) & (batch["input_ids"] == processor.tokenizer.bos_token_id)
    assert starts.sum() == len(samples)


def test_pictures_as_pixels_and_as_codes_share_a_batch(samples, processor):
    batch = MLLMCollator(processor.tokenizer.pad_token_id, (4, L))(samples)
    places = batch["pixel_places"].tolist()
    assert len(batch["image_codes"]) == len(places) + 2
    pixels = [image for sample in samples for image in sample["images"] if image.is_floating_point()]
    assert torch.equal(batch["pixel_values"], torch.stack(pixels))
    codes = [i for i in range(len(batch["image_codes"])) if i not in places]
    assert torch.equal(batch["image_codes"][codes], torch.stack(samples[-1]["images"]))


HOSTILE_ROWS = [
    ("conversations", {"image": 3}),
    ("conversations", {"image": {"path": "a.png"}}),
    ("conversations", {"image": [["a.png"]]}),
    ("conversations", {"image": ["a.png", None]}),
    ("conversations", {"image": "/dev/zero"}),
    ("conversations", {"conversations": "words"}),
    ("conversations", {"conversations": [3]}),
    ("conversations", {"conversations": [{"from": "human"}]}),
    ("conversations", {"conversations": [{"from": ["human"], "value": "a"}]}),
    ("conversations", {"conversations": None}),
    ("captions", {"caption": 3}),
    ("captions", {"caption": None}),
    ("captions", {"image": 3.5}),
    ("text", {"text": ["red"]}),
    ("text", {"text": None}),
]


@pytest.mark.parametrize("kind, change", HOSTILE_ROWS, ids=str)
@pytest.mark.attack
def test_rows_that_are_not_what_they_should_be_are_broken_samples(tmp_path, processor, picture, kind, change):
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
    row = {"image": picture.name, "conversations": turns, "caption": "red", "text": "a red circle"}
    texts, rng = SampleTexts(processor, 250), np.random.default_rng(0)
    for content, is_good in ((row, True), (row | change, False)):
        (tmp_path / "rows.json").write_text(json.dumps([content]), encoding="utf-8")
        source = Source(str(tmp_path / "rows.json"), kind)
        if is_good:
            assert len(source.sample(0, texts, 0.0, rng)["input_ids"])
            continue
        with pytest.raises(UnusableSample, match="named by texts, got|cannot be|'/dev/zero': not a regular file"):
            source.sample(0, texts, 0.0, rng)
