"""Write a public data set as the plain files that the trainings read: pictures, captions, conversations, texts.

    python -m training.prepare_data easy-vqa runs/data/easy-vqa
    python -m training.prepare_data emoji runs/data/emoji --category "Food & Drink" --category Activities
    python -m training.prepare_data python-docs runs/data/python-docs

Of easy-VQA and the emoji, the folder gets `images/`, and for each split

- `<split>_captions.jsonl`: {"image", "caption"} per line
- `<split>_conversations.json`: questions, in LLaVA's format
- `<split>_dialogues.json`: conversations with drawings. Those of easy-VQA start from a drawing or, in a third of them,
  from a picture of the user's, and have its colour changed
- `<split>_interviews.json`, easy-VQA only: all questions about a picture in one conversation, in random order
- `<split>_edits.json`, easy-VQA only: a picture, "make it blue", and the picture in blue

For easy-VQA, the captions, conversations and interviews of the train split are also written in two parts: those of every
tenth picture as `validation_*`, the others as `fit_*`.

`python-docs` is the reference manual that Python's `help()` prints: `train_texts.jsonl` and `test_texts.jsonl` have {"text"}
per line, a topic each. Every fourth topic is for tests.
"""

import json
import os
import random
import shutil
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
VALIDATION_EVERY = 10  # every n-th image of easy-VQA's train split is for validation
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


def prepare_easy_vqa(folder: str | os.PathLike) -> None:
    """Write easy-VQA's pictures, captions, conversations, dialogues and edits to a folder."""
    folder = Path(folder)
    for split in ("train", "test"):
        captions, questions, interviews, edits, dialogues = [], [], [], [], []
        for directory in (f"images/{split}", f"images/{split}_recolored"):
            (folder / directory).mkdir(parents=True, exist_ok=True)
        for number, sample in enumerate(tqdm(easy_vqa.load(split), desc=f"easy-VQA, {split}")):
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
            for color, picture, beginning in zip(colors, pictures, beginnings):
                recolored = f"images/{split}_recolored/{sample.image.stem}_{color}.png"
                picture.save(folder / recolored)
                ask, pair = f"make it {color}", [name, recolored]
                edits.append(conversation(pair, f"{IMAGE}\n{ask}", IMAGE))
                dialogues.append(conversation(pair, *beginning, ask, IMAGE, "what color is the shape?", color))
        write_rows(folder / f"{split}_edits.json", edits)
        write_rows(folder / f"{split}_dialogues.json", dialogues)
        numbers = range(len(captions))
        parts = {split: numbers}
        if split == "train":
            parts["validation"] = numbers[::VALIDATION_EVERY]
            parts["fit"] = [n for n in numbers if n % VALIDATION_EVERY]
        for part, chosen in parts.items():
            write_captions(folder / f"{part}_captions.jsonl", [captions[n] for n in chosen])
            write_rows(folder / f"{part}_conversations.json", [row for n in chosen for row in questions[n]])
            write_rows(folder / f"{part}_interviews.json", [interviews[n] for n in chosen])


def prepare_emoji(folder: str | os.PathLike, packages: str | os.PathLike, categories: list[str]) -> None:
    """Write the emoji's pictures, captions, conversations and dialogues to a folder.

    Args:
        folder: folder to write the files to.
        packages: folder of the npm packages, which are downloaded if they are missing.
        categories: categories of emoji to write; empty for all.
    """
    folder, packages = Path(folder), Path(packages)
    pictures = emoji.load(packages, categories)
    emoji.write_images(pictures, packages, folder)
    (folder / emoji.TABLE).write_text(json.dumps([asdict(picture) for picture in pictures]), encoding="utf-8")
    for split, held_out in (("train", False), ("test", True)):
        rows = [e for e in pictures if e.held_out == held_out]
        write_captions(folder / f"{split}_captions.jsonl", [(e.image, e.caption) for e in rows])
        questions = [conversation([e.image], f"{IMAGE}\n{emoji.QUESTION}", e.name) for e in rows]
        dialogues = [conversation([e.image], f"draw {e.caption}", IMAGE, emoji.QUESTION, e.name) for e in rows]
        for kind, values in (("conversations", questions), ("dialogues", dialogues)):
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
) -> None:
    """Write DATASET ("easy-vqa", "emoji" or "python-docs") to FOLDER."""
    check_output_folder(folder)
    if dataset != "emoji" and (packages or category):
        raise typer.BadParameter("--packages and --category have no effect without emoji: leave them out")
    if dataset == "easy-vqa":
        prepare_easy_vqa(folder)
    elif dataset == "emoji":
        packages = packages or Path("runs/npm")
        check_output_folder(packages)
        prepare_emoji(folder, packages, category or [])
    elif dataset == "python-docs":
        prepare_python_docs(folder)
    else:
        raise typer.BadParameter(f"the data set must be easy-vqa, emoji or python-docs, got {dataset!r}")
    print(f"{dataset} is in {folder}")


if __name__ == "__main__":
    one_line_errors()(app)()
