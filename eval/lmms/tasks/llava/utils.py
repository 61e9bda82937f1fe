"""Benchmarks as LLaVA v1.5 asks and counts (https://github.com/haotian-liu/LLaVA, docs/Evaluation.md), the procedure behind
UniTok's published numbers, for lmms-eval, whose own tasks differ from it: TextVQA's prompt has the OCR tokens, POPE is
the mean F1 of its three parts and reads "no" out of longer answers, VQAv2's test-dev and MM-Vet become files for the
benchmarks' own servers.
"""

import functools
import json
from argparse import Namespace
from pathlib import Path

import datasets
from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor
from lmms_eval.tasks.mme.utils import mme_aggregate_results, mme_doc_to_text, mme_process_results  # noqa: F401
from lmms_eval.tasks.textvqa.utils import textvqa_doc_to_text, textvqa_process_results
from PIL import Image

from training.files import write_atomically


def image(doc: dict) -> list[Image.Image]:
    """Return the image of a row as a list, which is empty if there is none."""
    return [doc["image"].convert("RGB")] if doc["image"] else []


def question(doc: dict, lmms_eval_specific_kwargs: dict) -> str:
    """Return the question of a row, followed by the task's instruction."""
    return doc["question"].strip() + lmms_eval_specific_kwargs["post_prompt"]


def textvqa_question(doc: dict, lmms_eval_specific_kwargs: dict) -> str:
    """What is it?\\nReference OCR token: ONE, TWO\\nAnswer the question using a single word or phrase."""
    return textvqa_doc_to_text(doc, lmms_eval_specific_kwargs)


def textvqa_accuracy(doc: dict, results: list[str]) -> dict[str, float]:
    """Compute TextVQA's accuracy of an answer by lmms-eval's own function."""
    return {"exact_match": textvqa_process_results(doc, results)["exact_match"]}


@functools.cache
def gqa_images() -> tuple[datasets.Dataset, dict[str, int]]:
    """GQA's images, and the row of each id."""
    rows = datasets.load_dataset("lmms-lab-encoder/GQA", "testdev_balanced_images", split="testdev")
    return rows, {name: row for row, name in enumerate(rows["id"])}


def gqa_image(doc: dict) -> list[Image.Image]:
    """Return the image of a question of GQA."""
    rows, numbers = gqa_images()
    return image(rows[numbers[doc["imageId"]]])


def gqa_accuracy(doc: dict, results: list[str]) -> dict[str, float]:
    """Equal to the answer, in lower case and without a period at the end."""
    return {"exact_match": float(results[0].strip().rstrip(".").lower() == doc["answer"])}


def says_yes(answer: str) -> bool:
    """Whether the first sentence of an answer has no "no" or "not"."""
    words = answer.strip().split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def pope_pair(doc: dict, results: list[str]) -> dict[str, tuple[bool, bool]]:
    """What was said, and what is right."""
    return {"f1": (says_yes(results[0]), doc["answer"].strip().lower() == "yes")}


def pope_f1(pairs: list[tuple[bool, bool]]) -> float:
    """Harmonic mean of precision and recall of "yes"; 0 where it is never right."""
    right = sum(said and true for said, true in pairs)
    return 2 * right / max(1, sum(said + true for said, true in pairs))


def vqav2_row(doc: dict, results: list[str]) -> dict[str, dict]:
    """Return the row of an answer in the file for VQAv2's server."""
    return {"answers_in_file": {"question_id": doc["question_id"], "answer": EvalAIAnswerProcessor()(results[0])}}


def write_vqav2(rows: list[dict], args: Namespace) -> int:
    """Writes the file for VQAv2's server, `OUTPUT.vqav2.json`, in the order of the official questions; returns the
    number of answers.

    The server wants all questions of test2015, also where test-dev alone is counted: those not asked are answered "".

    Raises:
        ValueError: an answer to a question that the official file has not.
    """
    answers = {row["question_id"]: row["answer"] for row in rows}
    questions = json.loads(Path(args.vqav2_questions).read_text(encoding="utf-8"))["questions"]
    numbers = [row["question_id"] for row in questions]
    if unknown := sorted(answers.keys() - set(numbers)):
        raise ValueError(f"{args.vqav2_questions} has no question {unknown[0]}, which was answered")
    rows = [{"question_id": number, "answer": answers.get(number, "")} for number in numbers]
    write_atomically(f"{args.output_path}.vqav2.json", json.dumps(rows).encode())
    return len(answers)


def mmvet_row(doc: dict, results: list[str]) -> dict[str, dict]:
    """Return the row of an answer in the file for MM-Vet's evaluator."""
    return {"answers_in_file": {"question_id": str(doc["question_id"]), "answer": results[0].strip()}}


def write_mmvet(rows: list[dict], args: Namespace) -> int:
    """Writes the file for MM-Vet's online evaluator, `OUTPUT.mmvet.json`: answers by `v1_0`, `v1_1`, ..."""
    answers = {f"v1_{row['question_id'].removeprefix('v1_')}": row["answer"] for row in rows}
    write_atomically(f"{args.output_path}.mmvet.json", json.dumps(answers).encode())
    return len(answers)
