"""easy-VQA for lmms-eval: its data, from PyPI's `easy-vqa`, and its count, that of `eval.easy_vqa`."""

import importlib.metadata
import os
import tempfile
from pathlib import Path

import datasets

from eval.easy_vqa import normalize_answer
from training.easy_vqa import load, question_kind


def dataset_folder() -> str:
    """The folder of the test split as a Hugging Face data set, made in the data sets' cache where it is missing."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / f"easy_vqa-{importlib.metadata.version('easy-vqa')}"
    if not folder.is_dir():
        rows = [
            {"image": str(sample.image), "question": question, "answer": answer}
            for sample in load("test")
            for question, answer in sample.questions
        ]
        features = datasets.Features(
            {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
        )
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Path(scratch) / folder.name
            datasets.DatasetDict(test=datasets.Dataset.from_list(rows, features=features)).save_to_disk(made)
            os.replace(made, folder)
    return str(folder)


DATASET = dataset_folder()


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """1 or 0 under "accuracy" and under the name of the question's kind."""
    right = float(normalize_answer(results[0]) == normalize_answer(doc["answer"]))
    kind = question_kind(doc["answer"]).replace("/", "_")
    return {"accuracy": right, f"accuracy_{kind}": right}
