"""Write a public data set as the plain files that the trainings read: pictures, captions, conversations, texts.

    python -m training.prepare_data easy-vqa runs/data/easy-vqa
    python -m training.prepare_data emoji runs/data/emoji --category "Food & Drink" --category Activities
    python -m training.prepare_data emoji runs/data/emoji4 --style google --style twitter --style fluent --style 3d --size 128
    python -m training.prepare_data python-docs runs/data/python-docs

Of easy-VQA and the emoji, the folder gets `images/`, and for each split

- `<split>_captions.jsonl`: {"image", "caption"} per line
- `<split>_conversations.json`: questions, in LLaVA's format
- `<split>_dialogues.json`: conversations with drawings. Those of easy-VQA start from a drawing or, in a third of them,
  from a picture of the user's, and have its colour changed
- `<split>_interviews.json`, easy-VQA only: all questions about a picture in one conversation, in random order
- `<split>_edits.json`: a picture, "make it blue", and the picture in blue; of the emoji a picture, "draw it in twitter
  style", and the picture of that style. Pictures that are not trained on are targets of their split's edits alone

The files of the train split are also written in two parts, `validation_*` and `fit_*`: of easy-VQA those of every tenth
picture, and the others; of the emoji with `--style` those of a twentieth of the (name, style) pairs, and the others. There,
a tenth of the pairs is the test split, and each name and each style is known from other pictures of the train split.

`python-docs` is the reference manual that Python's `help()` prints: `train_texts.jsonl` and `test_texts.jsonl` have {"text"}
per line, a topic each. Every fourth topic is for tests.
"""

import json
import os
import random
import shutil
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated

import typer
from PIL import Image
from tqdm import tqdm

from training import easy_vqa, emoji
from training.errors import one_line_errors
from unitok_mllm.outputs import check_output_folder
from unitok_mllm.typer_apps import script_app


EDITS_PER_IMAGE = 3
TEST_EVERY = 4  # every n-th topic of Python's manual is for tests
IMAGE = "<image>"


def conversation(images: list[str], *turns: str) -> dict:
    """Build a conversation in LLaVA's format, human's turn first. `IMAGE` in a text stands for the next image."""
    speakers = ("human", "gpt") * (len(turns) // 2)
    return {"image": images, "conversations": [{"from": s, "value": turn} for s, turn in zip(speakers, turns)]}


def write_lines(path: str | os.PathLike, rows: list[dict]) -> None:
    """Write rows as JSON lines."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_captions(path: str | os.PathLike, captions: list[tuple[str, str]]) -> None:
    """Write (image, caption) pairs as JSON lines."""
    write_lines(path, [{"image": image, "caption": caption} for image, caption in captions])


def write_rows(path: str | os.PathLike, rows: list[dict]) -> None:
    """Write conversations as a JSON list."""
    Path(path).write_text(json.dumps(rows), encoding="utf-8")


def asked_about(questions: list[tuple[str, str]], rng: random.Random) -> list[str]:
    """Return the first turns of a dialogue: one or two questions about the user's picture, and their answers."""
    first, *others = (turn for pair in rng.sample(questions, rng.randint(1, 2)) for turn in pair)
    return [f"{IMAGE}\n{first}", *others]


def prepare_easy_vqa(folder: str | os.PathLike, limit: int | None = None) -> None:
    """Write easy-VQA's pictures, captions, conversations, dialogues and edits to a folder.

    Args:
        folder: folder to write the files to.
        limit: number of pictures of each split, the first ones; None for all.
    """
    folder = Path(folder)
    for split in ("train", "test"):
        captions, questions, interviews, edits, dialogues = [], [], [], [], []  # an entry for each picture
        for directory in (f"images/{split}", f"images/{split}_recolored"):
            (folder / directory).mkdir(parents=True, exist_ok=True)
        for number, sample in enumerate(tqdm(easy_vqa.load(split)[:limit], desc=f"easy-VQA, {split}")):
            shutil.copy(sample.image, folder / f"images/{split}")
            name = f"images/{split}/{sample.image.name}"
            captions.append((name, sample.caption))
            questions.append(
                [conversation([name], f"{IMAGE}\n{question}", answer) for question, answer in sample.questions]
            )
            in_any_order = random.Random(f"interview {number}").sample(sample.questions, len(sample.questions))
            first, *others = (turn for pair in in_any_order for turn in pair)
            interviews.append(conversation([name], f"{IMAGE}\n{first}", *others))
            other_colors = sorted(set(easy_vqa.COLORS).difference(sample.caption.split()))
            rng = random.Random(number)
            colors = rng.sample(other_colors, EDITS_PER_IMAGE)
            drawn = [f"draw {sample.caption}", IMAGE]
            beginnings = [asked_about(sample.questions, rng), *[drawn] * (EDITS_PER_IMAGE - 1)]
            pictures = easy_vqa.recolor(Image.open(sample.image), colors)
            edits.append([])
            dialogues.append([])
            for color, picture, beginning in zip(colors, pictures, beginnings):
                recolored = f"images/{split}_recolored/{sample.image.stem}_{color}.png"
                picture.save(folder / recolored)
                ask, pair = f"make it {color}", [name, recolored]
                edits[-1].append(conversation(pair, f"{IMAGE}\n{ask}", IMAGE))
                dialogues[-1].append(conversation(pair, *beginning, ask, IMAGE, "what color is the shape?", color))
        numbers = range(len(captions))
        parts = {split: numbers}
        if split == "train":
            parts |= easy_vqa.split_train(numbers)
        for part, chosen in parts.items():
            write_captions(folder / f"{part}_captions.jsonl", [captions[n] for n in chosen])
            write_rows(folder / f"{part}_interviews.json", [interviews[n] for n in chosen])
            for kind, rows in (("conversations", questions), ("edits", edits), ("dialogues", dialogues)):
                write_rows(folder / f"{part}_{kind}.json", [row for n in chosen for row in rows[n]])


def restylings(targets: list[emoji.Emoji], sources: list[emoji.Emoji]) -> list[dict]:
    """Return conversations that ask for each target from each source of the same name in another style."""
    of_name = defaultdict(list)
    for e in sources:
        of_name[e.name].append(e)
    return [
        conversation([e.image, target.image], f"{IMAGE}\n{emoji.RESTYLE.format(style=target.style)}", IMAGE)
        for target in targets
        for e in of_name[target.name]
        if e.style != target.style
    ]


def prepare_emoji(
    folder: str | os.PathLike,
    packages: str | os.PathLike,
    categories: list[str] | None = None,
    styles: list[str] | None = None,
    size: int = emoji.SIZE,
    limit: int | None = None,
) -> None:
    """Write the emoji's pictures, captions, conversations, dialogues and edits to a folder.

    Args:
        folder: folder to write the files to.
        packages: folder of the npm packages, which are downloaded if they are missing.
        categories: see `training.emoji.load`.
        styles: see `training.emoji.load`.
        size: height and width of the pictures, in pixels.
        limit: see `training.emoji.load`.

    Raises:
        ValueError: see `training.emoji.load`.
    """
    folder, packages = Path(folder), Path(packages)
    pictures = emoji.load(packages, categories, styles, size, limit)
    emoji.write_images(pictures, packages, folder, size)
    (folder / emoji.TABLE).write_text(json.dumps([asdict(picture) for picture in pictures]), encoding="utf-8")
    trained_on = [e for e in pictures if not e.held_out]
    parts = {"train": trained_on, "test": [e for e in pictures if e.held_out]}
    fit = [e for e in trained_on if not e.validation]
    if styles:
        parts |= {"fit": fit, "validation": [e for e in trained_on if e.validation]}
    for split, rows in parts.items():
        write_captions(folder / f"{split}_captions.jsonl", [(e.image, e.caption) for e in rows])
        questions = [conversation([e.image], f"{IMAGE}\n{emoji.QUESTION}", e.name) for e in rows]
        dialogues = [conversation([e.image], f"draw {e.caption}", IMAGE, emoji.QUESTION, e.name) for e in rows]
        edits = restylings(rows, trained_on if split == "train" else fit)
        for kind, values in (("conversations", questions), ("dialogues", dialogues), ("edits", edits)):
            write_rows(folder / f"{split}_{kind}.json", values)


def prepare_python_docs(folder: str | os.PathLike) -> None:
    """Write the topics of Python's reference manual, in alphabetical order, to a folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    texts = {"train": [], "test": []}
    for number, name in enumerate(sorted(topics)):
        texts["train" if number % TEST_EVERY else "test"].append({"text": topics[name]})
    for split, rows in texts.items():
        write_lines(Path(folder, f"{split}_texts.jsonl"), rows)


app = script_app(help=__doc__)


@app.command()
def main(
    dataset: Annotated[str, typer.Argument(help="easy-vqa, emoji or python-docs")],
    folder: Annotated[Path, typer.Argument(help="folder to write the data set to")],
    packages: Annotated[
        Path | None, typer.Option(help="folder to keep the emoji's npm archives in", show_default="runs/npm")
    ] = None,
    category: Annotated[
        list[str] | None, typer.Option(help="category of emoji; repeat for several; default: all")
    ] = None,
    style: Annotated[
        list[str] | None,
        typer.Option(
            help=f"style of emoji, one of {', '.join(emoji.ALL_STYLES)}; repeat for several, of which (name, style) "
            "pairs are held out; default: google and twitter, with names held out in the second"
        ),
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=8, max=1024, help="height and width of the emoji, in pixels", show_default="64")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=10, help="pictures of each split of easy-VQA, or names of emoji", show_default="all"),
    ] = None,
) -> None:
    """Write DATASET ("easy-vqa", "emoji" or "python-docs") to FOLDER."""
    check_output_folder(folder)
    if dataset != "emoji" and (packages or category or style or size):
        raise typer.BadParameter(
            "--packages, --category, --style and --size have no effect without emoji: leave them out"
        )
    if dataset == "python-docs" and limit:
        raise typer.BadParameter("--limit has no effect with python-docs: leave it out")
    if dataset == "easy-vqa":
        prepare_easy_vqa(folder, limit)
    elif dataset == "emoji":
        packages = packages or Path("runs/npm")
        check_output_folder(packages)
        prepare_emoji(folder, packages, category, style, size or emoji.SIZE, limit)
    elif dataset == "python-docs":
        prepare_python_docs(folder)
    else:
        raise typer.BadParameter(f"the data set must be easy-vqa, emoji or python-docs, got {dataset!r}")
    print(f"{dataset} is in {folder}")


if __name__ == "__main__":
    one_line_errors()(app)()
