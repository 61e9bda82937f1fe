"""Measure a model on easy-VQA's test split: reconstruction, answers, drawings and edits.

python -m eval.easy_vqa --model unitok_mllm/checkpoints/tiny --output runs/easy_vqa.json

Each finished part is written to the JSON with its settings, and the same command resumes from there (`--no_resume`
measures everything again). `eval.judge` classifies the drawings; it is trained first if its weights are missing. A
picture next to the JSON shows the drawings. `eval.pixel_check` tells how many of them have straight edges and right angles,
which the judge does not see. `--split validation` measures on a tenth of the train split instead, to choose between models
that were trained on the other nine (the `fit_*` files of `training.prepare_data`).
"""

import importlib.metadata
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.image_utils import PILImageResampling

from eval._common import (
    DRAWING,
    DrawingSettings,
    check_skipped,
    in_batches,
    load_model,
    parse_settings,
    read_result,
    versions,
)
from eval.judge import (
    IMAGE_SIZE,
    UNKNOWN,
    Judge,
    judge_accuracy,
    judge_images,
    load_judge,
    load_labels,
    load_pixels,
    make_judge,
)
from eval.pixel_check import check_shapes
from eval.protocol import number
from training.easy_vqa import COLORS, KINDS, SHAPES, load, question_kind
from training.errors import one_line_errors
from training.files import folder_digest, write_atomically
from training.losses import psnr
from unitok_mllm import UniTokMLLMForConditionalGeneration, UniTokMLLMProcessor, inference
from unitok_mllm.configuration_unitok import check_ranges
from unitok_mllm.devices import AUTO, DEVICE_HELP, find_device
from unitok_mllm.drawing_unitok import MAX_GUIDANCE
from unitok_mllm.image_processing_unitok import MODES
from unitok_mllm.inference import answer_ids, check_model, draw_codes, edit_codes, generate_answers, picture_bytes
from unitok_mllm.outputs import check_output_file
from unitok_mllm.scoring_unitok import UniTokScores


MAX_ANSWER_TOKENS = 16
MISTAKES_KEPT = 20
EDIT = "make it {color}"
SPLITS = ("test", "validation")
ANSWERS = ["yes", "no", *COLORS, *SHAPES]
PAIRS = [(color, shape) for color in COLORS for shape in SHAPES]


@dataclass
class Settings(DrawingSettings):
    """Command-line options.

    Raises:
        ValueError: a value is out of its range, or a folder holds no model.
    """

    model: str = field(default="unitok_mllm/checkpoints/tiny", metadata={"help": "folder of model and processor"})
    output: str = field(default="runs/easy_vqa.json", metadata={"help": "JSON file for the results"})
    judge: str = field(
        default="runs/judge.safetensors", metadata={"help": "file of the judge's weights; trained if missing"}
    )
    batch_size: int = field(default=64, metadata={"help": "questions or images per batch"})
    split: str = field(default="test", metadata={"help": "images to measure on: test, or validation"})
    limit: int | None = field(default=None, metadata={"help": "number of images, the first ones; default: all"})
    samples: int = field(default=8, metadata={"help": "drawings for each of the 24 pairs of colour and shape"})
    candidates: int = field(
        default=1,
        metadata={
            "help": "samples per drawing, of which the best by the tokenizer's embeddings counts; 1 for no ranking"
        },
    )
    choices: bool = field(
        default=False, metadata={"help": "also choose the likeliest of the benchmark's 13 answers to each question"}
    )
    edit_guidance: float = field(
        default=1.0, metadata={"help": "guidance scale of edits by the instruction; 1 for none"}
    )
    edit_image_guidance: float = field(
        default=1.0, metadata={"help": "guidance scale of edits by the picture; 1 for none"}
    )
    seed: int = field(default=0, metadata={"help": "seed of the first drawing; the next ones count up"})
    skip: str = field(default="", metadata={"help": "parts to leave out: reconstruction,vqa,text_to_image,edit"})
    resume: bool = field(default=True, metadata={"help": "keep parts of the output that have the same settings"})
    device: str = field(default=AUTO, metadata={"help": DEVICE_HELP})

    def __post_init__(self):
        find_device(self.device)
        check_model(self.model)
        for path in (self.output, self.judge):
            check_output_file(path)
        for name in ("batch_size", "limit", "samples", "candidates"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.split not in SPLITS:
            raise ValueError(f"split must be {' or '.join(SPLITS)}, got {self.split!r}")
        self.complete(self.model)
        check_ranges(self, edit_guidance=(1, MAX_GUIDANCE), edit_image_guidance=(1, MAX_GUIDANCE))
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        check_skipped(self.skipped, "parts", PARTS)
        if Path(self.judge).is_file():
            load_judge(self.judge)

    @property
    def skipped(self) -> list[str]:
        return self.skip.split(",") if self.skip else []


def normalize_answer(text: str) -> str:
    """Normalise an answer for comparison: lower case, without surrounding white space or a final period."""
    return text.strip().lower().removesuffix(".").rstrip()


def batches(rows: list[int], size: int, title: str) -> Iterator[list[int]]:
    """Iterate over batches of rows, with a progress bar that counts rows."""
    with tqdm(total=len(rows), desc=title) as bar:
        for start in range(0, len(rows), size):
            yield rows[start : start + size]
            bar.update(len(rows[start : start + size]))


def conversation(question: str) -> list[dict]:
    """Build a conversation of one turn: an image (any, since all take the same number of positions) and a question."""
    return inference.conversation(question, Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE)))


def question_batches(
    model: UniTokMLLMForConditionalGeneration,
    processor: UniTokMLLMProcessor,
    questions: list[str],
    image_codes: torch.Tensor,
    batch_size: int,
    title: str,
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Yield batches of N questions about one image each: indices of the questions, and inputs of the model.

    Args:
        model: the MLLM.
        processor: its processor.
        questions: the questions.
        image_codes: codes of the questions' images, (N, K, L).
        batch_size: questions per batch; those of similar length go together.
        title: title of the progress bar.
    """
    prompts = {
        question: processor.apply_chat_template(
            conversation(question), add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"][0]
        for question in dict.fromkeys(questions)
    }
    order = sorted(range(len(questions)), key=lambda i: len(prompts[questions[i]]))
    for rows in batches(order, batch_size, title):
        ids = [prompts[questions[i]] for i in rows]
        pad = {"batch_first": True, "padding_side": "left"}
        input_ids = pad_sequence(ids, padding_value=processor.tokenizer.pad_token_id, **pad)
        yield (
            rows,
            {
                "input_ids": input_ids.to(model.device),
                "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], **pad).to(model.device),
                "image_codes": image_codes[rows].to(model.device),
            },
        )


@torch.no_grad()
def answer_questions(
    model: UniTokMLLMForConditionalGeneration,
    processor: UniTokMLLMProcessor,
    questions: list[str],
    image_codes: torch.Tensor,
    batch_size: int = 64,
) -> list[str]:
    """Answer N questions about one image each, greedily and in free form.

    Args:
        model: the MLLM.
        processor: its processor.
        questions: the questions.
        image_codes: codes of the questions' images, (N, K, L).
        batch_size: questions per batch.
    """
    answers = [""] * len(questions)
    for rows, inputs in question_batches(model, processor, questions, image_codes, batch_size, "answering"):
        inputs["pad_token_id"] = processor.tokenizer.pad_token_id
        for i, text in zip(rows, generate_answers(model, processor, inputs, MAX_ANSWER_TOKENS)):
            answers[i] = text
    return answers


def score_choices(
    model: UniTokMLLMForConditionalGeneration,
    processor: UniTokMLLMProcessor,
    questions: list[str],
    image_codes: torch.Tensor,
    choices: list[str],
    batch_size: int = 64,
) -> UniTokScores:
    """Score C given answers to N questions about one image each, (N, C), on the CPU; see also `answer_questions`."""
    targets, shape = answer_ids(processor, choices).to(model.device), (len(questions), len(choices))
    scores = UniTokScores(torch.zeros(shape), torch.zeros(shape, dtype=torch.long))
    for rows, inputs in question_batches(model, processor, questions, image_codes, batch_size, "scoring choices"):
        part = model.score(**inputs, target_ids=targets.expand(len(rows), -1, -1))
        scores.log_likelihoods[rows], scores.num_targets[rows] = part.log_likelihoods.cpu(), part.num_targets.cpu()
    return scores


def count_right(answers: list[str], truths: list[str]) -> dict[str, dict[str, float | int]]:
    """Compute the accuracy, in [0, 1], over all questions and for each kind of question."""
    asked, right = Counter(), Counter()
    for answer, truth in zip(answers, truths, strict=True):
        for kind in ("all", question_kind(truth)):
            asked[kind] += 1
            right[kind] += normalize_answer(answer) == normalize_answer(truth)
    return {
        kind: {"accuracy": right[kind] / asked[kind], "right": right[kind], "questions": asked[kind]}
        for kind in ("all", *KINDS)
        if asked[kind]
    }


def draw(*args, **options) -> torch.Tensor:
    """Draw one image for each caption, see `draw_candidates`. Return its codes (N, K, L), on the CPU."""
    codes, _ = draw_candidates(*args, **options)
    return codes[:, 0]


def draw_candidates(
    model: UniTokMLLMForConditionalGeneration,
    processor: UniTokMLLMProcessor,
    captions: list[str],
    seeds: list[int],
    batch_size: int = 64,
    candidates: int = 1,
    **options,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Draw images for each caption. They depend on the caption's seed, but not on the batch.

    Args:
        model: the MLLM.
        processor: its processor.
        captions: the N captions.
        seeds: seed of each caption.
        batch_size: images per batch.
        candidates: number of images for each caption.
        options: options of `generate_image_codes`: `guidance_scale`, `plausibility`, `temperature`, `top_k`, `top_p`.

    Returns:
        Codes (N, candidates, K, L) and, for more than one candidate, their scores (N, candidates), on the CPU.
    """
    codes, scores = [], []
    for rows in batches(list(range(len(captions))), max(1, batch_size // candidates), "drawing"):
        texts, own_seeds = [captions[i] for i in rows], [seeds[i] for i in rows]
        options |= {"candidates": candidates, "return_dict_in_generate": True}
        output = draw_codes(model, processor, texts, seed=own_seeds, **options)
        codes.append((output.codes[:, None] if candidates == 1 else output.candidate_codes).cpu())
        scores.append(None if candidates == 1 else output.candidate_scores.cpu())
    return torch.cat(codes), None if candidates == 1 else torch.cat(scores)


def best_of(scores: torch.Tensor | None, count: int) -> torch.Tensor | int:
    """Return the index of the best of the first `count` candidates, (N,), for scores (N, candidates); 0 for None."""
    return 0 if scores is None else scores[:, :count].argmax(dim=1)


def contact_sheet(pictures: list[Image.Image], is_right: list[bool], samples: int) -> Image.Image:
    """Lay out all drawings: a row for each colour, `samples` columns for each shape. A frame marks wrong drawings.

    `pictures` and `is_right` are ordered by PAIRS, then by sample.
    """
    cell, left, top = IMAGE_SIZE + 6, 60, 24
    sheet = Image.new("RGB", (left + cell * samples * len(SHAPES), top + cell * len(COLORS)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, color in enumerate(COLORS):
        pen.text((left - 10, top + cell * (i + 0.5)), color, fill="black", anchor="rm")
    for j, shape in enumerate(SHAPES):
        pen.text((left + cell * samples * (j + 0.5), top / 2), shape, fill="black", anchor="mm")
    for n, (picture, right) in enumerate(zip(pictures, is_right, strict=True)):
        row, column = divmod(n, samples * len(SHAPES))
        x, y = left + column * cell, top + row * cell
        if not right:
            pen.rectangle((x, y, x + cell - 1, y + cell - 1), fill="red")
        sheet.paste(picture.resize((IMAGE_SIZE, IMAGE_SIZE)), (x + 3, y + 3))
    return sheet


class Evaluation:
    """Evaluation of a loaded model on the split's images. Each part has a method that returns its JSON entry."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.model, self.processor = load_model(settings.model, settings.device)
        self.samples = load(settings.split)[: settings.limit]

    @cached_property
    def pixel_values(self) -> torch.Tensor:
        """Preprocessed test images, (N, 3, H, W) in [-1, 1]."""
        return self.processor.image_processor([str(s.image) for s in self.samples])["pixel_values"]

    def in_batches(self, function: Callable, rows: torch.Tensor, title: str) -> torch.Tensor:
        """See `eval._common.in_batches`."""
        return in_batches(function, rows, self.settings.batch_size, self.model.device, title)

    @cached_property
    def codes(self) -> torch.Tensor:
        """Codes of the test images, (N, K, L)."""
        return self.in_batches(self.model.encode_images, self.pixel_values, "encoding")

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Decode codes (N, K, L) to pixels (N, 3, H, W) in [-1, 1], float32."""
        return self.in_batches(self.model.decode_images, codes, "decoding").float()

    @cached_property
    def judge(self) -> Judge:
        path = Path(self.settings.judge)
        if path.is_file():
            return load_judge(path)
        print(f"There is no judge at {path} yet: training one, which takes a minute or two.")
        return make_judge(path)

    @staticmethod
    def for_judge(pixels: torch.Tensor) -> torch.Tensor:
        """Resize pixels for the judge: (N, 3, H, W) -> (N, 3, 64, 64)."""
        if pixels.shape[-2:] == (IMAGE_SIZE, IMAGE_SIZE):
            return pixels
        return F.interpolate(pixels, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)

    def reconstruction(self) -> dict:
        """Measure PSNR (dB, peak to peak 2) of the decoded codes, and the percentage of codes in use."""
        image_psnr = psnr(self.decode(self.codes), self.pixel_values)
        mean_squared_error = (4 / 10 ** (image_psnr.double() / 10)).mean()
        codebook_size = self.model.config.visual_config.vision_config.codebook_size
        usage = [100 * len(codes.unique()) / codebook_size for codes in self.codes.unbind(dim=1)]
        image_processor = self.processor.image_processor
        resample = MODES[image_processor.mode][0] if image_processor.resample is None else image_processor.resample
        return {
            "images": len(self.samples),
            "image_size": list(self.pixel_values.shape[2:]),
            "preprocessing": image_processor.mode,
            "resize_filter": PILImageResampling(resample).name.lower(),
            "psnr_mean_of_images_db": image_psnr.mean().item(),
            "psnr_of_mean_error_db": (10 * torch.log10(4 / mean_squared_error)).item(),
            "codebook_usage_percent": sum(usage) / len(usage),
            "codebook_usage_percent_each": usage,
        }

    def vqa(self) -> dict:
        """Measure the accuracy over all questions by exact match after `normalize_answer`; the prompt is recorded.

        With `choices`, also measure that of the likeliest of all answers, by log-likelihood and by its mean per token.
        """
        rows = [(i, *pair) for i, sample in enumerate(self.samples) for pair in sample.questions]
        numbers, questions, truths = zip(*rows)
        answers = answer_questions(
            self.model, self.processor, list(questions), self.codes[list(numbers)], self.settings.batch_size
        )
        mistakes = [
            {"image": self.samples[i].image.name, "question": question, "answer": truth, "given": answer}
            for (i, question, truth), answer in zip(rows, answers)
            if normalize_answer(answer) != normalize_answer(truth)
        ]
        prompt = self.processor.apply_chat_template(conversation("{question}"), add_generation_prompt=True)
        chosen = {}
        if self.settings.choices:
            codes = self.codes[list(numbers)]
            scores = score_choices(
                self.model, self.processor, list(questions), codes, ANSWERS, self.settings.batch_size
            )
            for name, values in (("choices", scores.log_likelihoods), ("choices_by_length", scores.means)):
                likeliest = [ANSWERS[i] for i in values.argmax(dim=1).tolist()]
                chosen[f"accuracy_of_{name}"] = count_right(likeliest, truths)
        return {
            "images": len(self.samples),
            "accuracy": count_right(answers, truths),
            **chosen,
            "prompt": prompt,
            "first_mistakes": mistakes[:MISTAKES_KEPT],
        }

    def text_to_image(self) -> dict:
        """Measure the share of drawings that the judge classifies as requested, and the judge's own accuracy.

        With several candidates, also measure the best of the first 1, 2, 4 ... of them.
        """
        settings = self.settings
        drawings = [(pair, j) for pair in range(len(PAIRS)) for j in range(settings.samples)]
        captions = [f"a {' '.join(PAIRS[pair])}" for pair, _ in drawings]
        start = time.perf_counter()
        codes, scores = draw_candidates(
            self.model,
            self.processor,
            captions,
            seeds=[settings.seed + j * len(PAIRS) + pair for pair, j in drawings],
            batch_size=settings.batch_size,
            candidates=settings.candidates,
            **settings.drawing,
        )
        seconds = time.perf_counter() - start
        all_pixels = self.decode(codes.flatten(0, 1)).unflatten(0, codes.shape[:2])
        labels = torch.tensor([divmod(pair, len(SHAPES)) for pair, _ in drawings])
        verdicts = torch.stack(judge_images(self.judge, self.for_judge(all_pixels.flatten(0, 1))), dim=1)
        all_right = (verdicts.unflatten(0, codes.shape[:2]) == labels[:, None]).all(dim=2)
        numbers = torch.arange(len(drawings))
        best = best_of(scores, settings.candidates)
        is_right, pixels = all_right[numbers, best], all_pixels[numbers, best]
        counts = [2**i for i in range(settings.candidates.bit_length()) if settings.candidates > 1]
        by_candidates = {n: all_right[numbers, best_of(scores, n)].float().mean().item() for n in counts}
        sheet_path = Path(settings.output).with_suffix(".png")
        pictures = self.processor.image_processor.post_process(pixels)
        write_atomically(sheet_path, picture_bytes(contact_sheet(pictures, is_right.tolist(), settings.samples)))

        test_labels = load_labels(self.samples)
        is_known = (test_labels != UNKNOWN).all(dim=1)
        decoded = self.decode(self.codes)
        return {
            "prompt": self.processor.image_prompt("a {color} {shape}"),
            **judge_accuracy(self.judge, self.for_judge(pixels), labels),
            "both_by_pair": {
                " ".join(pair): share.item()
                for pair, share in zip(PAIRS, is_right.view(len(PAIRS), -1).float().mean(1))
            },
            "pixel_check": check_shapes(pixels, labels),
            "judge_on_test_images": judge_accuracy(self.judge, load_pixels(self.samples), test_labels),
            "judge_on_reconstructions": judge_accuracy(self.judge, self.for_judge(decoded), test_labels),
            "pixel_check_on_test_images": check_shapes(self.pixel_values[is_known], test_labels[is_known]),
            "pixel_check_on_reconstructions": check_shapes(decoded[is_known], test_labels[is_known]),
            "sheet": str(sheet_path),
            "drawing_seconds": round(seconds, 1),
            "both_by_candidates": by_candidates,
        }

    def edit(self) -> dict:
        """Measure the share of recoloured test images that the judge classifies as the new colour and the old shape.

        Only images whose questions determine colour and shape are used. The new colour depends on the image's index.
        Drawing is greedy.
        """
        settings, labels = self.settings, load_labels(self.samples)
        rows = (labels != UNKNOWN).all(dim=1).nonzero().flatten().tolist()
        wanted = labels[rows]
        for row, place in zip(wanted, rows):
            own = row[0].item()
            row[0] = random.Random(place).choice([c for c in range(len(COLORS)) if c != own])
        codes = []
        for numbers in batches(list(range(len(rows))), settings.batch_size, "editing"):
            requests = [(self.samples[rows[n]].image, EDIT.format(color=COLORS[wanted[n, 0]])) for n in numbers]
            scales = {"guidance_scale": settings.edit_guidance, "image_guidance_scale": settings.edit_image_guidance}
            codes.append(edit_codes(self.model, self.processor, requests, **scales, do_sample=False).cpu())
        pixels = self.decode(torch.cat(codes))
        return {
            "prompt": self.processor.edit_prompt(EDIT, 1),
            **judge_accuracy(self.judge, self.for_judge(pixels), wanted),
            "pixel_check": check_shapes(pixels, wanted),
        }


# Each part with the settings that its numbers depend on, in addition to the model's weights.
PARTS = {
    "reconstruction": ("split", "limit"),
    "vqa": ("split", "limit", "choices"),
    "text_to_image": ("split", "limit", "samples", "candidates", *DRAWING, "seed", "judge"),
    "edit": ("split", "limit", "edit_guidance", "edit_image_guidance", "judge"),
}


def read_finished(output: str, wanted: dict[str, dict]) -> dict[str, dict]:
    """Read the finished parts of an earlier output that have the current settings and library versions.

    Other parts are dropped, with a line on stderr.
    """
    parts = read_result(output, "parts").get("parts", {})
    finished = {
        name: part
        for name, part in parts.items()
        if (part["settings"], part["versions"]) == (wanted.get(name), versions())
    }
    for name in parts.keys() - finished.keys():
        print(f"{output}: {name} was measured with other settings or versions and is not kept", file=sys.stderr)
    return finished


def evaluate(settings: Settings) -> dict:
    """Run the selected parts that are missing, and write and return the complete report."""
    digest = folder_digest(settings.model)
    wanted = {
        name: {"model": settings.model, "model_sha256": digest, **{key: getattr(settings, key) for key in keys}}
        for name, keys in PARTS.items()
    }
    report = {
        "benchmark": f"easy-VQA, {settings.split} split",
        "settings": asdict(settings),
        "versions": versions() | {"easy-vqa": importlib.metadata.version("easy-vqa")},
        "parts": read_finished(settings.output, wanted) if settings.resume else {},
    }
    report["numbers"] = [one for part in report["parts"].values() for one in part.get("numbers", [])]
    missing = [name for name in PARTS if name not in settings.skipped and name not in report["parts"]]
    if not missing:
        return report
    evaluation = Evaluation(settings)
    report |= {"device": str(evaluation.model.device), "dtype": str(evaluation.model.dtype)}
    for name in missing:
        start = time.perf_counter()
        part = getattr(evaluation, name)()
        seconds = round(time.perf_counter() - start, 1)
        part = {"settings": wanted[name], "versions": versions(), "seconds": seconds, **part}
        part["numbers"] = numbers({name: part}, settings, evaluation.processor)
        report["parts"][name] = part
        report["numbers"] += part["numbers"]
        write_atomically(settings.output, json.dumps(report, indent=2).encode())
    return report


def numbers(parts: dict[str, dict], settings: Settings, processor: UniTokMLLMProcessor) -> list[dict]:
    """Return the main numbers of all parts with their protocols (`eval.protocol`)."""
    side = processor.image_processor.size
    images = f"{processor.image_processor.mode}, {side['width']}x{side['height']}"
    split = settings.split if settings.limit is None else f"{settings.split}, first {settings.limit} images"
    found = []
    if part := parts.get("reconstruction"):
        own = {"split": split, "images": images, "reference": "the same images"}
        found += [
            number("easy-VQA", "PSNR", part["psnr_mean_of_images_db"], "dB", tool="mean over images", **own),
            number(
                "easy-VQA",
                "codes in use",
                part["codebook_usage_percent"],
                "%",
                tool="codes chosen at all, mean over sub-codebooks",
                **own,
            ),
        ]
    if part := parts.get("vqa"):
        own = {"split": split, "prompt": "{question}", "sampling": "greedy", "images": images}
        share = part["accuracy"]["all"]["accuracy"]
        own |= {"reference": "the split's answers", "tool": "exact match"}
        found.append(number("easy-VQA", "answers right", 100 * share, "%", **own))
    if part := parts.get("text_to_image"):
        used = part["settings"]
        own = {
            "split": f"24 pairs of colour and shape, {used['samples']} drawings each",
            "prompt": part["prompt"].removesuffix(processor.boi_token),
            "sampling": settings.sampling + f", best of {used['candidates']}" * (used["candidates"] > 1),
        }
        own |= {"images": images, "reference": "colour and shape asked for", "tool": "the judge (eval.judge)"}
        found.append(number("easy-VQA", "drawings right", 100 * part["both"], "%", **own))
        own["tool"] = "the pixel check (eval.pixel_check)"
        found.append(
            number(
                "easy-VQA",
                "drawings that fill their box as the shape does",
                100 * part["pixel_check"]["all"],
                "%",
                **own,
            )
        )
    if part := parts.get("edit"):
        used = part["settings"]
        own = {
            "split": split,
            "prompt": EDIT,
            "sampling": f"greedy, guidance {used['edit_guidance']:g}, image guidance {used['edit_image_guidance']:g}",
        }
        own |= {"images": images, "reference": "new colour, old shape", "tool": "the judge (eval.judge)"}
        found.append(number("easy-VQA", "edits right", 100 * part["both"], "%", **own))
    return found


def table(report: dict) -> str:
    """Format the report as a few readable lines."""
    lines, parts = [], report["parts"]
    if part := parts.get("reconstruction"):
        lines += [
            f"reconstruction of {part['images']} images ({part['seconds']} s)",
            f"  PSNR, mean of images     {part['psnr_mean_of_images_db']:6.2f} dB",
            f"  PSNR of the mean error   {part['psnr_of_mean_error_db']:6.2f} dB",
            f"  codes in use             {part['codebook_usage_percent']:6.2f} %",
        ]
    if part := parts.get("vqa"):
        lines.append(f"answers about {part['images']} images ({part['seconds']} s)")
        for kind, value in part["accuracy"].items():
            lines.append(f"  {kind:23}  {value['accuracy']:6.2%}   {value['right']} of {value['questions']}")
        for name in ("choices", "choices_by_length"):
            for kind, value in part.get(f"accuracy_of_{name}", {}).items():
                title = f"{name.replace('_', ' ')}, {kind}"
                lines.append(f"  {title:27}{value['accuracy']:6.2%}   {value['right']} of {value['questions']}")
    if part := parts.get("text_to_image"):
        lines.append(f"{part['images']} drawings, {part['sheet']} ({part['seconds']} s)  both   color   shape")
        for name, value in (
            ("drawings", part),
            (f"judge, {report['settings']['split']} images", part["judge_on_test_images"]),
            ("judge, reconstructions", part["judge_on_reconstructions"]),
        ):
            lines.append(f"  {name:23}  {value['both']:6.2%}  {value['color']:6.2%}  {value['shape']:6.2%}")
        lines.append(f"pixel check  {'':12}" + "".join(f"{name:>11}" for name in ("all", *SHAPES)))
        for name, key in (
            ("drawings", ""),
            ("true images", "_on_test_images"),
            ("reconstructions", "_on_reconstructions"),
        ):
            value = part[f"pixel_check{key}"]
            lines.append(f"  {name:23}" + "".join(f"{value.get(k, float('nan')):11.2%}" for k in ("all", *SHAPES)))
        for count, both in part["both_by_candidates"].items():
            lines.append(f"  {f'best of the first {count}':23}  {both:6.2%}")
    if part := parts.get("edit"):
        lines.append(f"{part['images']} recoloured images ({part['seconds']} s)")
        lines.append(
            f"  {'new colour, old shape':23}  {part['both']:6.2%}  {part['color']:6.2%}  {part['shape']:6.2%}"
        )
    return "\n".join(lines)


@one_line_errors("Interrupted. Finished parts are kept; the same command goes on from there.")
def main(argv: list[str] | None = None) -> None:
    print(table(evaluate(parse_settings(Settings, argv, __doc__))))


if __name__ == "__main__":
    main()
