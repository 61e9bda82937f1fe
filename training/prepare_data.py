"""Write easy-VQA or the emoji as the plain files that the trainings read: pictures, captions, conversations.

    python -m training.prepare_data easy-vqa runs/data/easy-vqa
    python -m training.prepare_data emoji runs/data/emoji --category "Food & Drink" --category Activities

The folder gets `images/`, and for each split

- `<split>_captions.jsonl`: {"image", "caption"} per line
- `<split>_conversations.json`: questions, in LLaVA's format
- `<split>_dialogues.json`: conversations with drawings. Those of easy-VQA start from a drawing or, in a third of them,
  from a picture of the user's, and have its colour changed
- `<split>_edits.json`, easy-VQA only: a picture, "make it blue", and the picture in blue

For easy-VQA, the train captions are also written in two parts: every tenth picture in `validation_captions.jsonl`, the
others in `fit_captions.jsonl`.
"""

import json
import os
import random
import shutil
from dataclasses import asdict
from pathlib import Path
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
IMAGE = "<image>"


def conversation(images: list[str], *turns: str) -> dict:
    """Build a conversation in LLaVA's format, human's turn first. `IMAGE` in a text stands for the next image."""
    speakers = ("human", "gpt") * (len(turns) // 2)
    return {"image": images, "conversations": [{"from": s, "value": turn} for s, turn in zip(speakers, turns)]}


def write_captions(path: str | os.PathLike, captions: list[tuple[str, str]]) -> None:
    """Write (image, caption) pairs as JSON lines."""
    path = Path(path)
    path.write_text(
        "".join(json.dumps({"image": image, "caption": caption}) + "\n" for image, caption in captions),
        encoding="utf-8",
    )


def asked_about(questions: list[tuple[str, str]], rng: random.Random) -> list[str]:
    """Return the first turns of a dialogue: one or two questions about the user's picture, and their answers."""
    first, *others = (turn for pair in rng.sample(questions, rng.randint(1, 2)) for turn in pair)
    return [f"{IMAGE}\n{first}", *others]


def prepare_easy_vqa(folder: str | os.PathLike) -> None:
    """Write easy-VQA's pictures, captions, conversations, dialogues and edits to a folder."""
    folder = Path(folder)
    for split in ("train", "test"):
        captions, questions, edits, dialogues = [], [], [], []
        for directory in (f"images/{split}", f"images/{split}_recolored"):
            (folder / directory).mkdir(parents=True, exist_ok=True)
        for number, sample in enumerate(tqdm(easy_vqa.load(split), desc=f"easy-VQA, {split}")):
            shutil.copy(sample.image, folder / f"images/{split}")
            name = f"images/{split}/{sample.image.name}"
            captions.append((name, sample.caption))
            questions += [
                conversation([name], f"{IMAGE}\n{question}", answer) for question, answer in sample.questions
            ]
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
        write_captions(folder / f"{split}_captions.jsonl", captions)
        if split == "train":
            write_captions(folder / "validation_captions.jsonl", captions[::VALIDATION_EVERY])
            write_captions(folder / "fit_captions.jsonl", [c for i, c in enumerate(captions) if i % VALIDATION_EVERY])
        for kind, rows in (("conversations", questions), ("edits", edits), ("dialogues", dialogues)):
            (folder / f"{split}_{kind}.json").write_text(json.dumps(rows), encoding="utf-8")


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
            (folder / f"{split}_{kind}.json").write_text(json.dumps(values), encoding="utf-8")


app = script_app(help=__doc__)


@app.command()
def main(
    dataset: Annotated[str, typer.Argument(help="easy-vqa or emoji")],
    folder: Annotated[Path, typer.Argument(help="folder to write the data set to")],
    packages: Annotated[
        Path | None, typer.Option(help="folder to keep the emoji's npm archives in", show_default="runs/npm")
    ] = None,
    category: Annotated[
        list[str] | None, typer.Option(help="category of emoji; repeat for several; default: all")
    ] = None,
) -> None:
    """Write DATASET ("easy-vqa" or "emoji") to FOLDER."""
    check_output_folder(folder)
    if dataset == "easy-vqa":
        if packages or category:
            raise typer.BadParameter("--packages and --category have no effect without emoji: leave them out")
        prepare_easy_vqa(folder)
    elif dataset == "emoji":
        packages = packages or Path("runs/npm")
        check_output_folder(packages)
        prepare_emoji(folder, packages, category or [])
    else:
        raise typer.BadParameter(f"the data set must be easy-vqa or emoji, got {dataset!r}")
    print(f"{dataset} is in {folder}")


if __name__ == "__main__":
    one_line_errors()(app)()
