"""The two public data sets as plain files; the emoji from archives made here, in the layout of the npm packages."""

import io
import json
import tarfile
from collections import Counter
from dataclasses import fields
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from easy_vqa import get_train_questions
from PIL import Image
from transformers import TrainingArguments
from typer.testing import CliRunner

from eval.emoji import distances, retrieval
from training import easy_vqa, emoji
from training.arguments import parse_yaml_and_command_line
from training.data import Source
from training.prepare_data import app, prepare_easy_vqa
from training.train_mllm import MLLMArguments


NUM_EMOJI = 20
KINDS = ("conversations", "edits", "dialogues")
CATEGORIES = ("Food & Drink", "Activities")
CONFIGS = Path(__file__).parents[1] / "training/configs"


@pytest.fixture
def packages(tmp_path) -> Path:
    """Both styles' archives: emoji i is a square of one colour, half transparent, called "NAME i"."""
    rows = [
        {
            "name": f"NAME {i}",
            "image": f"{i}.png",
            "category": CATEGORIES[i % 2],
            "has_img_google": True,
            "has_img_twitter": i != NUM_EMOJI,
        }
        for i in range(NUM_EMOJI + 1)
    ]
    for style in emoji.STYLES:
        files = {"package/emoji.json": json.dumps(rows).encode()}
        for i in range(NUM_EMOJI):
            picture = Image.new("RGBA", (64, 64), (10 * i, 0, 0, 255))
            picture.paste((0, 0, 0, 0), (0, 0, 32, 64))
            buffer = io.BytesIO()
            picture.save(buffer, format="png")
            files[f"package/img/{style}/64/{i}.png"] = buffer.getvalue()
        add_archive(tmp_path / f"emoji-datasource-{style}-{emoji.VERSION}.tgz", files)
    return tmp_path


def add_archive(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def four_styles(packages) -> Path:
    """Also the archives of vector graphics, in which emoji i is green or blue on a half, and those of the 3d style.

    The fluent style lacks the last emoji.
    """
    for (name, version), color in zip(emoji.VECTORS.values(), ("#0f0", "#00f", "#ff0")):
        body = f'<path fill="{color}" d="M16 0h16v32H16z"/>'
        count = NUM_EMOJI - ("fluent" in name)
        icons = {"width": 32, "height": 32, "icons": {f"emoji-{i}": {"body": body} for i in range(count)}}
        files = {"icons": icons, "chars": {str(i): f"emoji-{i}" for i in range(NUM_EMOJI)}}
        path = packages / f"{name[1:].replace('/', '-')}-{version}.tgz"
        add_archive(path, {f"package/{part}.json": json.dumps(value).encode() for part, value in files.items()})
    buffer = io.BytesIO()
    Image.new("RGBA", (256, 256), (255, 0, 0, 255)).save(buffer, format="webp", lossless=True)
    name, version = emoji.LARGE["3d"]
    files = {f"package/assets/{i}.webp": buffer.getvalue() for i in range(NUM_EMOJI)}
    add_archive(packages / f"{name[1:].replace('/', '-')}-{version}.tgz", files)
    return packages


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def conversations_of(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


def turns_of(row: dict) -> list[str]:
    return [turn["value"] for turn in row["conversations"]]


def test_emoji_become_pictures_on_white_captions_and_questions(packages, tmp_path):
    folder = tmp_path / "emoji"
    result = CliRunner().invoke(app, ["emoji", str(folder), "--packages", str(packages)])
    assert result.exit_code == 0, result.output
    picture = Image.open(folder / "images/google/7.png")
    assert picture.mode == "RGB" and picture.getpixel((0, 0)) == (255, 255, 255)
    assert picture.getpixel((40, 0)) == (70, 0, 0)
    train, test = (rows_of(folder / f"{split}_captions.jsonl") for split in ("train", "test"))
    assert len(train) == 2 * NUM_EMOJI - 2 and len(test) == 2
    assert all("twitter" in row["image"] for row in test)
    assert {"image": "images/google/7.png", "caption": "name 7 emoji, google style"} in train
    held_out = [row["caption"].split(" emoji")[0] for row in test]
    assert not any(f"{name} emoji, twitter" in row["caption"] for row in train for name in held_out)
    assert all(any(f"{name} emoji, google" in row["caption"] for row in train) for name in held_out)
    pictures = emoji.read_table(folder)
    assert [e.caption for e in pictures if not e.held_out] == [row["caption"] for row in train]
    assert [e.image for e in pictures if e.held_out] == [row["image"] for row in test]
    first = conversations_of(folder / "train_conversations.json")[0]
    assert first["conversations"] == [
        {"from": "human", "value": "<image>\nwhat is this?"},
        {"from": "gpt", "value": train[0]["caption"].split(" emoji")[0]},
    ]


def test_emoji_of_four_styles_hold_pairs_out_and_are_restyled(four_styles, tmp_path):
    folder = tmp_path / "emoji"
    options = [word for style in emoji.ALL_STYLES for word in ("--style", style)]
    command = ["emoji", str(folder), "--packages", str(four_styles), "--size", "128", *options]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    pictures = emoji.read_table(folder)
    assert len(pictures) == 4 * (NUM_EMOJI - 1)  # one has no picture in the fluent style
    colors = {"google": (0, 255, 0), "twitter": (0, 0, 255), "fluent": (255, 255, 0), "3d": (255, 0, 0)}
    for style, color in colors.items():
        with Image.open(folder / f"images/{style}/7.png") as picture:
            assert (picture.mode, picture.size, picture.getpixel((120, 5))) == ("RGB", (128, 128), color)
            assert picture.getpixel((5, 5)) == ((255, 0, 0) if style == "3d" else (255, 255, 255))
    captions = {
        split: {row["caption"] for row in rows_of(folder / f"{split}_captions.jsonl")}
        for split in ("train", "test", "fit", "validation")
    }
    assert captions["test"] == {e.caption for e in pictures if e.held_out} and len(captions["test"]) == 8
    assert captions["validation"] == {e.caption for e in pictures if e.validation} and len(captions["validation"]) == 4
    assert captions["train"] == captions["fit"] | captions["validation"]
    assert len(captions["fit"]) + 4 == len(captions["train"]) == len(pictures) - 8
    by_image, fit = {e.image: e for e in pictures}, captions["fit"]
    for split, of_split in captions.items():
        edits = conversations_of(folder / f"{split}_edits.json")
        pairs = [[by_image[image] for image in row["image"]] for row in edits]
        assert {target.caption for _, target in pairs} == of_split
        assert {given.caption for given, _ in pairs} <= (captions["train"] if split == "train" else fit)
        assert all(given.name == target.name and given.style != target.style for given, target in pairs)
        ask = f"<image>\ndraw it in {pairs[0][1].style} style"
        assert turns_of(edits[0]) == [ask, "<image>"]
    for style, message in (
        ("apple", "No style is called apple"),
        ("google", "A style is given twice: google, google"),
    ):
        with pytest.raises(ValueError, match=message):
            emoji.load(four_styles, styles=["google", style])
    with pytest.raises(ValueError, match="two to six styles, got 1: 3d"):
        emoji.load(four_styles, styles=["3d"])


def test_held_out_pairs_leave_each_name_and_style_known():
    categories = {f"{kind} {i}": kind for kind, count in (("a", 100), ("b", 51)) for i in range(count)}
    styles = ("google", "twitter", "fluent", "3d")
    pairs = emoji.hold_out_pairs(categories, styles)
    assert len({name for name, _ in pairs}) == len(pairs)
    assert Counter(pairs.values()) == {"test": 40 + 20, "validation": 20 + 10}
    assert sorted(Counter(style for _, style in pairs).values()) == [22, 22, 23, 23]
    of_tests = [pair for pair, split in pairs.items() if split == "test"]
    assert Counter(style for _, style in of_tests) == dict.fromkeys(styles, 15)
    assert Counter(categories[name] for name, _ in of_tests) == {"a": 40, "b": 20}
    assert pairs == emoji.hold_out_pairs(dict(reversed(categories.items())), styles)


def test_emoji_of_one_category_alone(packages, tmp_path):
    pictures = emoji.load(packages, ["Activities"])
    assert {e.name for e in pictures} == {f"name {i}" for i in range(1, NUM_EMOJI, 2)}
    assert sum(e.held_out for e in pictures) == 1
    with pytest.raises(ValueError, match="No emoji is of Drinks; there are Activities, Food & Drink"):
        emoji.load(packages, ["Activities", "Drinks"])


@pytest.mark.full
def test_easy_vqa_keeps_its_splits_and_all_its_questions(tmp_path):
    result = CliRunner().invoke(app, ["easy-vqa", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert [len(rows_of(tmp_path / f"{split}_captions.jsonl")) for split in ("train", "test")] == [4000, 1000]
    train, fit, validation = (rows_of(tmp_path / f"{part}_captions.jsonl") for part in ("train", "fit", "validation"))
    assert validation == train[::10] and fit == [row for row in train if row not in validation]
    for kind in ("conversations", "interviews", "edits", "dialogues"):
        names = [
            {row["image"][0] for row in conversations_of(tmp_path / f"{part}_{kind}.json")}
            for part in ("fit", "validation")
        ]
        assert names == [{row["image"] for row in part} for part in (fit, validation)]
    rows = {kind: conversations_of(tmp_path / f"train_{kind}.json") for kind in KINDS}
    assert len(rows["conversations"]) == len(get_train_questions()[0]) == 38575
    assert len(rows["edits"]) == len(rows["dialogues"]) == 3 * 4000
    assert all((tmp_path / image).is_file() for kind in KINDS for row in rows[kind][::100] for image in row["image"])
    for edit, dialogue in zip(rows["edits"][::1000], rows["dialogues"][::1000]):
        color = edit["conversations"][0]["value"].removeprefix("<image>\nmake it ")
        assert edit["image"] == dialogue["image"] and edit["image"][1].endswith(f"_{color}.png")
        assert turns_of(dialogue)[-4:] == [f"make it {color}", "<image>", "what color is the shape?", color]
        assert f"draw a {color}" not in turns_of(dialogue)[0]
        colors = [c for _, c in Image.open(tmp_path / edit["image"][1]).getcolors()]
        assert set(colors).intersection(easy_vqa.RGB.values()) == {easy_vqa.RGB[color]}


def test_a_third_of_easy_vqas_dialogues_begin_with_questions_about_the_users_picture(tmp_path, monkeypatch):
    samples = easy_vqa.load("train")[:20]
    monkeypatch.setattr(easy_vqa, "load", lambda split: samples)
    prepare_easy_vqa(tmp_path)
    beginnings = [turns_of(row)[:-4] for row in conversations_of(tmp_path / "train_dialogues.json")]
    for sample, uploaded, *drawn in zip(samples, beginnings[::3], beginnings[1::3], beginnings[2::3]):
        turns = [uploaded[0].removeprefix("<image>\n"), *uploaded[1:]]
        assert uploaded[0] != turns[0] and {*zip(turns[::2], turns[1::2])} <= {*sample.questions}
        assert drawn == 2 * [[f"draw {sample.caption}", "<image>"]]
    assert {len(turns) for turns in beginnings[::3]} == {2, 4}
    assert beginnings[0] == ["<image>\nis there a black shape?", "no"]  # of a blue rectangle


def test_an_interview_asks_all_questions_about_a_picture_in_another_order(tmp_path, monkeypatch):
    samples = easy_vqa.load("train")[:20]
    monkeypatch.setattr(easy_vqa, "load", lambda split: samples)
    prepare_easy_vqa(tmp_path)
    in_same_order = 0
    for sample, row in zip(samples, conversations_of(tmp_path / "train_interviews.json"), strict=True):
        first, *others = turns_of(row)
        turns = [first.removeprefix("<image>\n"), *others]
        asked = [*zip(turns[::2], turns[1::2], strict=True)]
        assert first != turns[0] and Counter(asked) == Counter(sample.questions)
        in_same_order += asked == sample.questions
    assert in_same_order < 3


def test_pythons_manual_is_split_by_topics(tmp_path):
    assert CliRunner().invoke(app, ["python-docs", str(tmp_path / "docs")]).exit_code == 0
    train, test = (
        [row["text"] for row in rows_of(tmp_path / f"docs/{split}_texts.jsonl")] for split in ("train", "test")
    )
    assert sorted(train + test) == sorted(topics.values()) and len(train) // len(test) in (2, 3)
    assert {*train}.isdisjoint(test)


def test_recoloring_changes_the_shape_alone_and_back_again():
    picture = Image.new("RGB", (8, 8), (240, 250, 230))
    picture.paste((255, 0, 0), (2, 2, 6, 6))
    picture.putpixel((1, 3), (248, 125, 115))  # half of each
    blue, teal = easy_vqa.recolor(picture, ["blue", "teal"])
    assert blue.getpixel((0, 0)) == (240, 250, 230) and blue.getpixel((3, 3)) == (0, 0, 255)
    assert np.abs(np.array(blue.getpixel((1, 3))) - (120, 125, 242)).max() <= 1
    assert teal.getpixel((3, 3)) == (0, 128, 128)
    (back,) = easy_vqa.recolor(blue, ["red"])
    assert np.abs(np.array(back).astype(int) - np.array(picture)).max() <= 1
    with pytest.raises(ValueError, match="no shape in one of easy-VQA's colours"):
        easy_vqa.recolor(Image.new("RGB", (8, 8), (1, 2, 3)), ["blue"])


def test_another_data_set_and_missing_archives_are_named(tmp_path, monkeypatch):
    result = CliRunner().invoke(app, ["coco", str(tmp_path)])
    assert result.exit_code == 2 and "easy-vqa, emoji or python-docs" in result.output
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="emoji-datasource-google.*there is no npm"):
        emoji.load(tmp_path)


def test_retrieval_counts_the_nearest_pictures():
    gallery = torch.arange(10.0)[:, None, None, None].expand(10, 3, 64, 64)
    pictures = gallery[[2, 5, 9]] + torch.tensor([0.1, 1.1, -7.0])[:, None, None, None]
    shares = retrieval(distances(pictures, gallery), torch.tensor([2, 5, 9]))
    assert shares == {"top1": pytest.approx(1 / 3), "top5": pytest.approx(2 / 3)}


@pytest.mark.parametrize("config", sorted(path.name for path in CONFIGS.glob("mllm_*.yaml")))
def test_configs_are_read(config):
    arguments, training = parse_yaml_and_command_line((MLLMArguments, TrainingArguments), [str(CONFIGS / config)])
    known = {field.name for field in fields(Source)}
    assert arguments.datasets and all(set(source) <= known for source in arguments.datasets)
    assert training.num_train_epochs == 1 and training.output_dir.startswith("runs/")
