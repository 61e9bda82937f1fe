"""Writes easy-VQA or the emoji as the plain files that the trainings read: pictures, captions, conversations.

    python -m training.prepare_data easy-vqa runs/data/easy-vqa
    python -m training.prepare_data emoji runs/data/emoji --category "Food & Drink" --category Activities

The folder gets `images/`, and for each split `<split>_captions.jsonl` ({"image", "caption"} a line) and
`<split>_conversations.json` (the format of LLaVA).
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from training import easy_vqa, emoji


def conversation(image: str, question: str, answer: str) -> dict:
    """One turn about one image, in LLaVA's format."""
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": turns}


def write_split(folder: Path, split: str, captions: list[tuple[str, str]], questions: Iterator[tuple]) -> None:
    """Writes both files of a split: (image, caption) and (image, question, answer) each."""
    lines = [json.dumps({"image": image, "caption": caption}) + "\n" for image, caption in captions]
    (folder / f"{split}_captions.jsonl").write_text("".join(lines))
    (folder / f"{split}_conversations.json").write_text(json.dumps([conversation(*row) for row in questions]))


def prepare_easy_vqa(folder: Path) -> None:
    for split in ("train", "test"):
        samples, captions, questions = easy_vqa.load(split), [], []
        images = folder / "images" / split
        images.mkdir(parents=True, exist_ok=True)
        for sample in samples:
            shutil.copy(sample.image, images)
            name = f"images/{split}/{sample.image.name}"
            captions.append((name, sample.caption))
            questions += [(name, *pair) for pair in sample.questions]
        write_split(folder, split, captions, questions)


def prepare_emoji(folder: Path, packages: Path, categories: list[str]) -> None:
    pictures = emoji.load(packages, categories)
    emoji.write_images(pictures, packages, folder)
    (folder / emoji.TABLE).write_text(json.dumps([asdict(picture) for picture in pictures]))
    for split, held_out in (("train", False), ("test", True)):
        rows = [e for e in pictures if e.held_out == held_out]
        write_split(
            folder, split, [(e.image, e.caption) for e in rows], [(e.image, emoji.QUESTION, e.name) for e in rows]
        )


app = typer.Typer(help=__doc__, add_completion=False)


@app.command()
def main(
    dataset: str,
    folder: Path,
    packages: Annotated[Path, typer.Option(help="where the emoji's npm archives are kept")] = Path("runs/npm"),
    category: Annotated[list[str] | None, typer.Option(help="of the emoji, may be given again; default: all")] = None,
) -> None:
    """Writes DATASET ("easy-vqa" or "emoji") to FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    if dataset == "easy-vqa":
        prepare_easy_vqa(folder)
    elif dataset == "emoji":
        prepare_emoji(folder, packages, category or [])
    else:
        raise typer.BadParameter(f"the datasets are easy-vqa and emoji, not {dataset!r}")
    print(f"{dataset} is in {folder}")


if __name__ == "__main__":
    app()
