"""UniTok's claim in miniature: more sub-codebooks under one total vocabulary, and joint training without conflict.

    python -m eval.claims training/configs/claims.yaml
    python -m eval.claims training/configs/claims.yaml --steps 20 --search_steps 10 --seeds 0 --codebooks 1 8

The same tokenizer is trained with K = 1, 2, 4, 8 sub-codebooks of `total_codes` / K codes each. The width before
quantization, the data and their order, the steps and the batch are the same.

1. Search: for each K, every setting in `candidates` (dead-code revival, learning rates, ...) is tried once for
   `search_steps`. The one with the highest PSNR on the `validation` images becomes this K's setting.
2. Comparison: each K is trained with its setting for `steps`, once for each seed, and measured on the `held_out`
   images. The largest K is also trained for reconstruction alone (`contrastive_weight` 0) and for captions alone (no
   reconstruction term).

Each run is measured by three metrics:

- PSNR of reconstructions, with two baselines: each image painted in its own mean colour, and the mean training image.
- Zero-shot accuracy, if captions are easy-VQA's 24 pairs of colour and shape: an image of a red circle counts as right
  if "a red circle" is the nearest of the 24 texts.
- Code usage: the percentage of all codes that occur in the held-out images.

PSNR on the validation images during training shows whether `steps` were enough.

The paper (https://arxiv.org/abs/2502.20321) reports at its size: with a total of 16384, each doubling of the
sub-codebooks from 1 to 8 improves rFID and ImageNet accuracy (Table 8), and joint training reconstructs slightly
better than reconstruction alone, rFID 0.72 and 0.82 (Table 6). Its Table 8 trains each tokenizer for one of the two
(rFID without captions, accuracy without reconstruction). Here, with captions, both are measured on one tokenizer.

A run's folder is `<output_dir>/runs/<name>`. It holds the config, checkpoints during training, the tokenizer, and
`result.json`. The name ends with a digest of every setting the result depends on: the same command resumes a killed
run, and other settings get runs of their own. After each run, `claims.json`, `claims.md` and `claims.png` are updated
with the finished runs of this command. `--processes 2` trains each tokenizer in two processes, which divide the batch.
"""

import hashlib
import io
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoTokenizer

from eval._common import read_result, versions
from eval.easy_vqa import PAIRS
from training import train_tokenizer
from training.arguments import parse_yaml_and_command_line
from training.errors import one_line_errors
from training.extract_codes import file_digest
from training.files import whole_checkpoints, write_atomically
from training.image_text_data import ImageFiles, ImageTextTransform
from training.losses import RECONSTRUCTION_TERMS, LossArguments, psnr
from training.run_folder import claim_folder
from training.tokenizer_arguments import TokenizerTrainingArguments
from training.tokenizer_trainer import HISTORY, STATE
from training.train_tokenizer import TokenizerArguments
from unitok_mllm import UniTokConfig, UniTokImageProcessor, UniTokModel


BENCHMARK = "sub-codebooks under one total vocabulary"
CLASSES = [f"a {color} {shape}" for color, shape in PAIRS]
JOINT, RECONSTRUCTION, CAPTIONS = "joint", "reconstruction", "captions"
WEIGHTS = {  # changes of the config for each kind of supervision
    JOINT: {},
    RECONSTRUCTION: {"contrastive_weight": 0.0},
    CAPTIONS: {f"{name}_weight": 0.0 for name in RECONSTRUCTION_TERMS},
}
SECONDS = "training, seconds"
GAINED = "validation PSNR (dB) gained in the last quarter"
SET_HERE = ("max_steps", "seed", "per_device_train_batch_size", "gradient_accumulation_steps", "resume")
WITHOUT_EFFECT = (
    "logging_steps",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "report_to",
    "dataloader_num_workers",
)


@dataclass
class ClaimsArguments:
    """Options of the comparison: what is trained, and for how long."""

    steps: int = field(default=900, metadata={"help": "optimizer steps of each run of the comparison"})
    search_steps: int = field(default=300, metadata={"help": "optimizer steps of each run of the search"})
    batch_size: int = field(default=48, metadata={"help": "images per step, over all processes"})
    total_codes: int = field(default=4096, metadata={"help": "total number of codes in all sub-codebooks"})
    codebooks: list[int] = field(default_factory=lambda: [1, 2, 4, 8], metadata={"help": "numbers of sub-codebooks"})
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "seeds of the comparison, one run for each"}
    )
    search_seed: int = field(default=100, metadata={"help": "seed of the search"})
    candidates: dict = field(
        default_factory=dict,
        metadata={"help": "settings to try for each K, by name, each a dict of options to change (YAML only)"},
    )
    validation: dict = field(
        default_factory=dict,
        metadata={"help": "as held_out, for the choice of settings and for the curves (YAML only)"},
    )
    held_out: dict = field(
        default_factory=dict, metadata={"help": "files or folders of captioned images by name (YAML only)"}
    )
    limit: int = field(
        default=0, metadata={"help": "number of images of each held-out set, the first ones; 0 for all"}
    )
    processes: int = field(default=1, metadata={"help": "processes per training, on this machine"})

    def __post_init__(self):
        for name in ("steps", "search_steps", "batch_size", "total_codes", "processes"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {vars(self)[name]}.")
        for name in ("codebooks", "seeds", "candidates", "validation", "held_out"):
            if not vars(self)[name]:
                raise ValueError(f"{name} must not be empty.")
        if min(self.limit, self.search_seed, *self.seeds) < 0:
            raise ValueError(
                f"limit and seeds must be at least 0, got {self.limit}, {self.search_seed} and {self.seeds}."
            )
        if self.batch_size % self.processes:
            raise ValueError(f"batch_size ({self.batch_size}) is not a multiple of {self.processes} processes.")
        for k in self.codebooks:
            if k < 1 or self.total_codes % k:
                raise ValueError(f"total_codes ({self.total_codes}) is not a multiple of {k} sub-codebooks.")
        for kind in ("validation", "held_out"):
            for name, path in vars(self)[kind].items():
                if not Path(path).exists():
                    raise ValueError(f"The {kind} set {name!r} is not there: {path}.")


@dataclass
class Run:
    """One tokenizer to be trained.

    Attributes:
        stage: "search" or "comparison".
        num_codebooks: K, the number of sub-codebooks.
        codebook_size: V, the number of codes in each. K * V is the total.
        supervision: "joint", "reconstruction" or "captions".
        candidate: name of the candidate setting.
        seed: seed of the training.
        settings: everything the result depends on. `training` is the config of `training.train_tokenizer`, without the
            options that differ between machines (see `train`).
    """

    stage: str
    num_codebooks: int
    codebook_size: int
    supervision: str
    candidate: str
    seed: int
    settings: dict

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()
        return f"{self.stage}-k{self.num_codebooks}-{self.supervision}-seed{self.seed}-{digest[:10]}"

    @property
    def bits(self) -> float:
        """Capacity of one image position in bits: log2 of the V^K combinations of codes."""
        return self.num_codebooks * math.log2(self.codebook_size)


def digest_of_files(paths: list[str]) -> dict[str, str]:
    """Return the SHA-256 of each path that is a file."""
    return {path: file_digest([Path(path)]) for path in paths if Path(path).is_file()}


def check_geometry(preset: str, text_overrides: dict, vision_overrides: dict) -> None:
    """Check before any training that the sizes fit.

    Raises:
        ValueError: they do not.
    """
    try:
        UniTokConfig.preset(preset, text_overrides, **vision_overrides)
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error


class Plan:
    """The runs of a comparison.

    Raises:
        ValueError: the config sets an option that each run sets itself, a source is not a folder, a candidate has an
            unknown option, or a geometry is impossible.
    """

    def __init__(
        self,
        claims: ClaimsArguments,
        tokenizer: TokenizerArguments,
        losses: LossArguments,
        training: TokenizerTrainingArguments,
    ):
        defaults = {f.name: f.default for f in fields(TokenizerTrainingArguments)}
        if given := [name for name in SET_HERE if vars(training)[name] != defaults[name]]:
            raise ValueError(f"Set steps, seeds and batch_size instead of {', '.join(given)}.")
        if tokenizer.init_from or tokenizer.init_open_clip:
            raise ValueError("Every run starts from new weights: leave out init_from and init_open_clip.")
        if kinds := sorted({source.get("kind", "") for source in tokenizer.datasets} - {"folder"}):
            raise ValueError(f"The datasets must be of kind folder, got {', '.join(kinds)}.")
        if tokenizer.eval_datasets:
            raise ValueError("Give the validation sets in validation, not in eval_datasets.")
        apart = (*SET_HERE, *WITHOUT_EFFECT, "output_dir")
        self.claims, self.tokenizer = claims, tokenizer
        self.common = {
            name: value
            for part in (tokenizer, losses, training)
            for name, value in asdict(part).items()
            if name not in apart
        }
        self.common["eval_datasets"] = [
            {"kind": "folder", "path": path, "in_memory": True} for path in claims.validation.values()
        ]
        for name, options in claims.candidates.items():
            if not isinstance(options, dict):
                raise ValueError(f"The candidate {name!r} must be a mapping of options to values, got {options!r}.")
            if unknown := sorted(options.keys() - self.common.keys()):
                raise ValueError(f"The candidate {name!r} sets unknown options: {', '.join(unknown)}.")
        for k in claims.codebooks:
            check_geometry(tokenizer.preset, tokenizer.text_overrides, self._vision_overrides(k))
        paths = [source["path"] for source in tokenizer.datasets if "path" in source]
        paths += [*claims.validation.values(), *claims.held_out.values(), f"{tokenizer.text_tokenizer}/tokenizer.json"]
        self.beside = {
            "limit": claims.limit,
            "batch_size": claims.batch_size,
            "files_sha256": digest_of_files(paths),
        }

    def _vision_overrides(self, k: int) -> dict:
        codes = {"num_codebooks": k, "codebook_size": self.claims.total_codes // k}
        return self.tokenizer.vision_overrides | codes

    def _run(self, stage: str, k: int, supervision: str, candidate: str, seed: int) -> Run:
        claims = self.claims
        config = self.common | claims.candidates[candidate] | WEIGHTS[supervision]
        config |= {"vision_overrides": self._vision_overrides(k), "seed": seed}
        config["max_steps"] = claims.search_steps if stage == "search" else claims.steps
        measured = claims.validation if stage == "search" else claims.held_out
        settings = {"training": config, "measured": measured, **self.beside}
        return Run(stage, k, claims.total_codes // k, supervision, candidate, seed, settings)

    def search(self) -> list[Run]:
        """Return a run for every candidate and K; empty if there is only one candidate."""
        claims = self.claims
        if len(claims.candidates) == 1:
            return []
        return [
            self._run("search", k, JOINT, candidate, claims.search_seed)
            for candidate in claims.candidates
            for k in dict.fromkeys(claims.codebooks)
        ]

    def comparison(self, choice: dict[int, str]) -> list[Run]:
        """Return all runs with the chosen candidate of each K, seed by seed: the first seed already compares all K."""
        claims = self.claims
        return [
            self._run("comparison", k, supervision, choice[k], seed)
            for seed in dict.fromkeys(claims.seeds)
            for k in dict.fromkeys(claims.codebooks)
            for supervision in (WEIGHTS if k == max(claims.codebooks) else (JOINT,))
        ]


def train(run: Run, folder: Path, claims: ClaimsArguments, training: TokenizerTrainingArguments) -> dict:
    """Train a run, or resume it, and write the tokenizer to `folder / "release"`.

    Raises:
        subprocess.CalledProcessError: one of several processes failed.
    """
    config = run.settings["training"] | {name: vars(training)[name] for name in WITHOUT_EFFECT}
    config |= {"output_dir": str(folder), "resume": True}
    config["per_device_train_batch_size"] = claims.batch_size // claims.processes
    path = folder / "config.yaml"
    write_atomically(path, yaml.safe_dump(config, sort_keys=False).encode())
    first_step, start = max(whole_checkpoints(folder, STATE), default=0), time.perf_counter()
    if claims.processes == 1:
        try:
            train_tokenizer.main([str(path)])
        except KeyboardInterrupt as interrupt:
            interrupt.args = ()  # its message is about resuming the other script
            raise
    else:
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(claims.processes)]
        command = [sys.executable, "-m", *launcher, "-m", "training.train_tokenizer", str(path)]
        with subprocess.Popen(command) as process:
            try:
                code = process.wait()
            except KeyboardInterrupt:
                process.terminate()  # its processes then write a checkpoint
                raise
        if code:
            raise subprocess.CalledProcessError(code, command)
    return {"resumed_from_step": first_step, "training_seconds": round(time.perf_counter() - start, 1)}


def zero_shot(image_embeds: torch.Tensor, class_embeds: torch.Tensor, captions: list[str]) -> dict | None:
    """Compute zero-shot accuracy, in [0, 1], over the images whose caption is one of CLASSES.

    Args:
        image_embeds: embeddings of the images, (N, D), of unit length.
        class_embeds: embeddings of CLASSES, (24, D), of unit length.
        captions: captions of the images.

    Returns:
        The accuracy; None if no caption is one of CLASSES.
    """
    rows = [i for i, caption in enumerate(captions) if caption in CLASSES]
    if not rows:
        return None
    guesses = (image_embeds[rows] @ class_embeds.T).argmax(dim=1).tolist()
    right = sum(CLASSES[guess] == captions[i] for guess, i in zip(guesses, rows))
    return {"images": len(rows), "right": right, "accuracy": right / len(rows)}


@torch.no_grad()
def measure(
    folder: Path, sets: dict[str, str], limit: int, batch_size: int, device: torch.device, supervision: str
) -> dict:
    """Measure a trained tokenizer on held-out images.

    Args:
        folder: folder of the tokenizer, its image processor and text tokenizer.
        sets: paths of captioned images by name.
        limit: number of images of each set, the first ones; 0 for all.
        batch_size: images per batch.
        device: device to run on.
        supervision: what the tokenizer was trained for, see `Run`; only that is measured.

    Returns:
        The number of `parameters`; and for each set the number of `images`, the percentage of all codes that occur in
        them, the mean `psnr_db`, and `zero_shot`.

    Raises:
        ValueError: an image cannot be read; the message names it.
    """
    model = UniTokModel.from_pretrained(folder).to(device).eval()
    image_processor = AutoImageProcessor.from_pretrained(folder)
    length = model.config.text_config.max_position_embeddings
    encode = ImageTextTransform(image_processor, AutoTokenizer.from_pretrained(folder), length).encode
    class_embeds = model.get_text_features(
        torch.stack([encode(name) for name in CLASSES]).to(device)
    ).pooler_output.cpu()
    results = {}
    for name, path in sets.items():
        pixel_values, captions = load_set(path, limit, image_processor.to_json_string())
        parts = []
        for pixels in tqdm(pixel_values.split(batch_size), desc=name):
            pixels = pixels.to(device)
            output = model(pixels)
            decibels = psnr(output.reconstruction, pixels)
            parts.append([tensor.cpu() for tensor in (decibels, output.codes, output.image_embeds)])
        decibels, codes, embeds = (torch.cat(column) for column in zip(*parts))
        used = sum(len(of_one.unique()) for of_one in codes.unbind(dim=1))
        results[name] = {
            "images": len(captions),
            "codes_used_percent": 100 * used / model.vision_model.quantizer.usage.numel(),
            "psnr_db": None if supervision == CAPTIONS else decibels.mean().item(),
            "zero_shot": None if supervision == RECONSTRUCTION else zero_shot(embeds, class_embeds, captions),
        }
    return {"parameters": model.num_parameters(), "sets": results}


@lru_cache
def load_set(path: str, limit: int, processor: str) -> tuple[torch.Tensor, list[str | None]]:
    """Load pixels (N, 3, H, W) in [-1, 1] and captions of the first `limit` images (0 for all); cached.

    Args:
        path: path of the captioned images.
        limit: number of images.
        processor: the image processor as JSON, so that it can be a key of the cache.

    Raises:
        ValueError: an image cannot be read; the message names it.
    """
    source, image_processor = ImageFiles(path), UniTokImageProcessor.from_dict(json.loads(processor))
    rows = tqdm(range(min(len(source), limit or len(source))), desc=path)
    images, captions = zip(*(load_named(source, row) for row in rows))
    pixels = [image_processor(image)["pixel_values"] for image in images]
    return torch.cat(pixels), list(captions)


def load_named(source: ImageFiles, row: int) -> tuple[Image.Image, str | None]:
    """Load an image and its caption.

    Raises:
        ValueError: the image cannot be read; the message names it.
    """
    try:
        return source.load(row)
    except ValueError as error:
        raise ValueError(f"{source.name(row)}: {error}") from error


def baselines(claims: ClaimsArguments, tokenizer: TokenizerArguments) -> dict[str, dict[str, float]]:
    """Compute the PSNR (dB) of two reconstructions that need no tokenizer, on each held-out set.

    Returns:
        The mean PSNR of each set, by name, for "mean colour" (each image painted in its own mean colour) and "mean
        image" (the mean of all training images instead of each image).

    Raises:
        ValueError: an image cannot be read; the message names it.
    """
    config = UniTokConfig.preset(tokenizer.preset, tokenizer.text_overrides, **tokenizer.vision_overrides)
    size = config.vision_config.image_size
    processor = UniTokImageProcessor(mode=tokenizer.image_mode, size={"height": size, "width": size}).to_json_string()
    sources = [source for source in tokenizer.datasets for _ in range(source.get("repeat", 1))]
    mean_image = torch.cat([load_set(source["path"], 0, processor)[0] for source in sources]).mean(dim=0)
    results = {"mean colour": {}, "mean image": {}}
    for name, path in claims.held_out.items():
        pixels, _ = load_set(path, claims.limit, processor)
        results["mean colour"][name] = (
            psnr(pixels.mean(dim=(2, 3), keepdim=True).expand_as(pixels), pixels).mean().item()
        )
        results["mean image"][name] = psnr(mean_image.expand_as(pixels), pixels).mean().item()
    return results


def validation_curve(folder: Path) -> list[dict[str, float]]:
    """Return the trainer's validation measurements in order: `step`, `psnr_db`, `codes_used_percent`."""
    lines = map(json.loads, (folder / HISTORY).read_text("utf-8").splitlines())
    by_step = {  # a step that was repeated after resuming counts once
        line["step"]: {
            "step": line["step"],
            "psnr_db": line["eval_psnr"],
            "codes_used_percent": line["eval_codebook_usage"],
        }
        for line in lines
        if "eval_psnr" in line
    }
    return [by_step[step] for step in sorted(by_step)]


def finish(run: Run, folder: Path, claims: ClaimsArguments, trained: dict, device: torch.device) -> None:
    """Measure a trained run, write its `result.json`, and remove its checkpoints."""
    start, steps = time.perf_counter(), run.settings["training"]["max_steps"]
    measured = measure(
        folder / "release", run.settings["measured"], claims.limit, claims.batch_size, device, run.supervision
    )
    result = {
        "run": run.name,
        "stage": run.stage,
        "codebooks": run.num_codebooks,
        "codebook_size": run.codebook_size,
        "bits_per_position": run.bits,
        "supervision": run.supervision,
        "candidate": run.candidate,
        "seed": run.seed,
        "images_trained_on": steps * claims.batch_size,
        **trained,
        "evaluation_seconds": round(time.perf_counter() - start, 1),
        **measured,
        "validation_curve": validation_curve(folder),
        "settings": run.settings,
        "versions": versions(),
        "device": str(device),
        "processes": claims.processes,
        "threads": torch.get_num_threads(),
    }
    write_atomically(folder / "result.json", json.dumps(result, indent=2).encode())
    for checkpoint in whole_checkpoints(folder, STATE).values():
        shutil.rmtree(checkpoint)


def validation_psnr(result: dict) -> float:
    """Return the mean PSNR (dB) over all images of a search run's sets."""
    sets = result["sets"].values()
    return sum(one["images"] * one["psnr_db"] for one in sets) / sum(one["images"] for one in sets)


def choose(claims: ClaimsArguments, results: list[dict]) -> dict[int, str]:
    """Choose, for each K, the candidate with the highest validation PSNR; on a tie, the first one."""
    if len(claims.candidates) == 1:
        return dict.fromkeys(claims.codebooks, *claims.candidates)
    by_k = {k: [result for result in results if result["codebooks"] == k] for k in claims.codebooks}
    return {k: max(tried, key=validation_psnr)["candidate"] for k, tried in by_k.items()}


def metrics(result: dict) -> dict[str, float]:
    """Return the metrics of one run that are averaged over seeds, under the names in tables and plots.

    The training time is left out if the run was interrupted.
    """
    sets, curve = result["sets"], result["validation_curve"]
    numbers = {f"PSNR (dB), {name}": one["psnr_db"] for name, one in sets.items() if one["psnr_db"] is not None}
    numbers |= {
        f"zero-shot (%), {name}": 100 * one["zero_shot"]["accuracy"] for name, one in sets.items() if one["zero_shot"]
    }
    numbers |= {f"codes used (%), {name}": one["codes_used_percent"] for name, one in sets.items()}
    earlier = [point["psnr_db"] for point in curve if point["step"] <= 0.75 * curve[-1]["step"]]
    if earlier and result["supervision"] != CAPTIONS:
        numbers[GAINED] = curve[-1]["psnr_db"] - earlier[-1]
    return numbers | ({} if result["resumed_from_step"] else {SECONDS: result["training_seconds"]})


def aggregate(results: list[dict]) -> list[dict]:
    """Compute mean and sample standard deviation over the seeds of each setting (None for a single seed).

    Returns:
        A row for each (codebooks, supervision), sorted by codebooks. Its `metrics` have `mean`, `std` and the `values`
        by name; its `curve` is the mean validation PSNR (dB) by step, at the steps that all seeds have.
    """
    groups: dict[tuple, list[dict]] = {}
    for result in results:
        groups.setdefault((result["codebooks"], result["supervision"]), []).append(result)
    rows = []
    for (k, supervision), group in sorted(groups.items()):
        columns = [metrics(result) for result in group]
        names = dict.fromkeys(name for column in columns for name in column)
        values = {name: [column[name] for column in columns if name in column] for name in names}
        curves = [{point["step"]: point["psnr_db"] for point in result["validation_curve"]} for result in group]
        shared = set.intersection(*(set(curve) for curve in curves))
        rows.append(
            {
                "codebooks": k,
                "codebook_size": group[0]["codebook_size"],
                "bits_per_position": group[0]["bits_per_position"],
                "supervision": supervision,
                "candidate": group[0]["candidate"],
                "seeds": [result["seed"] for result in group],
                "metrics": {
                    name: {
                        "mean": statistics.mean(numbers),
                        "std": statistics.stdev(numbers) if len(numbers) > 1 else None,
                        "values": numbers,
                    }
                    for name, numbers in values.items()
                },
                "curve": {step: statistics.mean(curve[step] for curve in curves) for step in sorted(shared)},
            }
        )
    return rows


def metric_names(rows: list[dict]) -> list[str]:
    """List the metrics of all rows in order of first appearance, the cost last."""
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    return sorted(names, key=lambda name: name == SECONDS)


def markdown(cells: list[list[str]]) -> str:
    """Format an aligned Markdown table; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    rows = [cells[0], ["-" * width for width in widths], *cells[1:]]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows)


def table(rows: list[dict], without_tokenizer: dict[str, dict[str, float]]) -> str:
    """Format the results as Markdown: the baselines, then mean ± standard deviation over seeds.

    Args:
        without_tokenizer: see `baselines`.
    """
    names = metric_names(rows)
    cells = [["codebooks", "bits", "trained for", "setting", *names, "seeds"]]
    for kind, decibels in without_tokenizer.items():
        shown = {f"PSNR (dB), {name}": f"{value:.2f}" for name, value in decibels.items()}
        cells.append([f"({kind})", "-", "-", "-", *(shown.get(name, "-") for name in names), "-"])
    for row in rows:
        shown = []
        for name in names:
            value = row["metrics"].get(name)
            digits = 0 if name == SECONDS else 2
            spread = "" if value is None or value["std"] is None else f" ± {value['std']:.{digits}f}"
            shown.append("-" if value is None else f"{value['mean']:.{digits}f}{spread}")
        shape = f"{row['codebooks']} x {row['codebook_size']}"
        about = [shape, f"{row['bits_per_position']:g}", row["supervision"], row["candidate"]]
        cells.append([*about, *shown, " ".join(map(str, row["seeds"]))])
    return markdown(cells)


def search_table(results: list[dict]) -> str:
    """Format the search as Markdown: validation PSNR (dB) and used codes of each candidate (row) and K (column)."""
    shapes = {r["codebooks"]: f"{r['codebooks']} x {r['codebook_size']}" for r in results}
    shown = {
        (r["candidate"], r["codebooks"]): f"{validation_psnr(r):.2f} dB, "
        + ", ".join(f"{one['codes_used_percent']:.1f}%" for one in r["sets"].values())
        for r in results
    }
    names = dict.fromkeys(candidate for candidate, _ in shown)
    rows = [[name, *(shown.get((name, k), "-") for k in sorted(shapes))] for name in names]
    return markdown([["setting", *(shapes[k] for k in sorted(shapes))], *rows])


def plot(rows: list[dict], without_tokenizer: dict[str, dict[str, float]], title: str) -> bytes:
    """Plot each metric over the number of sub-codebooks, and the validation PSNR over the steps.

    Error bars are standard deviations, and lines are baselines.

    Returns:
        The bytes of a PNG.
    """
    names = [name for name in metric_names(rows) if name not in (SECONDS, GAINED)]
    figure = Figure(figsize=(3.6 * (len(names) + 1), 3.6), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=10)
    *axes, curves = figure.subplots(1, len(names) + 1, squeeze=False)[0]
    for axis, name in zip(axes, names):
        for supervision, marker in ((JOINT, "o-"), (RECONSTRUCTION, "s"), (CAPTIONS, "^")):
            points = [row for row in rows if row["supervision"] == supervision and name in row["metrics"]]
            if points:
                values = [row["metrics"][name] for row in points]
                spread = [value["std"] or 0 for value in values]
                means = [value["mean"] for value in values]
                axis.errorbar(
                    [row["codebooks"] for row in points], means, yerr=spread, fmt=marker, capsize=4, label=supervision
                )
        for (kind, decibels), style in zip(without_tokenizer.items(), ("--", ":")):
            for set_name, value in decibels.items():
                if name == f"PSNR (dB), {set_name}":
                    axis.axhline(value, color="gray", linestyle=style, label=kind)
        axis.set_xscale("log", base=2)
        shapes = {row["codebooks"]: f"{row['codebooks']}x{row['codebook_size']}" for row in rows}
        axis.set_xticks(list(shapes), list(shapes.values()))
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("sub-codebooks x codes")
    for row in rows:
        if row["supervision"] != CAPTIONS:
            label = f"{row['codebooks']}x{row['codebook_size']}, {row['supervision']}"
            curves.plot(list(row["curve"]), list(row["curve"].values()), ".-", label=label)
    curves.set_title("PSNR (dB), validation", fontsize=9)
    curves.set_xlabel("step")
    for axis in (*axes, curves):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def finished(output_dir: Path, runs: list[Run]) -> list[dict]:
    """Return the results of the finished runs; for errors see `read_result`."""
    results = (read_result(output_dir / "runs" / run.name / "result.json") for run in runs)
    return [result for result in results if result]


def summarize(
    output_dir: Path, searched: list[Run], compared: list[Run], claims: ClaimsArguments, without_tokenizer: dict
) -> dict:
    """Write `claims.json`, `claims.md` and `claims.png` for the finished runs."""
    search, results = finished(output_dir, searched), finished(output_dir, compared)
    rows = aggregate(results)
    report = {
        "benchmark": BENCHMARK,
        "settings": asdict(claims),
        "versions": versions(),
        "prompt": "a {color} {shape}",
        "rows": rows,
        "baselines_psnr_db": without_tokenizer,
        "choice": {str(run.num_codebooks): run.candidate for run in compared},
        "missing_runs": [run.name for run in (*searched, *compared) if not is_finished(output_dir, run)],
        "seconds": round(sum(one["training_seconds"] + one["evaluation_seconds"] for one in (*search, *results)), 1),
        "search": search,
        "runs": results,
    }
    title = f"{claims.total_codes} codes in all, {claims.steps} steps of {claims.batch_size} images"
    text = f"{title}; mean ± standard deviation\n\n{table(rows, without_tokenizer)}\n" if rows else ""
    if search:
        text += f"\nSearch, {claims.search_steps} steps, on validation images\n\n{search_table(search)}\n"
    write_atomically(output_dir / "claims.json", json.dumps(report, indent=2).encode())
    write_atomically(output_dir / "claims.md", text.encode())
    if rows:
        image = plot(rows, without_tokenizer, f"{title}; mean and standard deviation over seeds")
        write_atomically(output_dir / "claims.png", image)
    return report


def is_finished(output_dir: Path, run: Run) -> bool:
    """Return whether a run has a result."""
    return (output_dir / "runs" / run.name / "result.json").is_file()


def compare(
    claims: ClaimsArguments,
    tokenizer: TokenizerArguments,
    losses: LossArguments,
    training: TokenizerTrainingArguments,
) -> dict:
    """Train and measure the runs that have no result yet, one after another.

    Returns:
        The content of `claims.json`.

    Raises:
        ValueError: see `Plan`; also if this script was started in several processes.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("Start this script without torchrun: --processes sets the processes of each training.")
    plan, output_dir = Plan(claims, tokenizer, losses, training), Path(training.output_dir)
    claim_folder(output_dir)
    accelerator = None if training.use_cpu else torch.accelerator.current_accelerator(check_available=True)

    earlier = {path.parent.name for path in (output_dir / "runs").glob("*/config.yaml")}

    def do(run: Run, about: str) -> None:
        folder = output_dir / "runs" / run.name
        is_done = is_finished(output_dir, run)
        print(f"{about}, {run.name} ({run.candidate}): {'is there' if is_done else 'starts'}", flush=True)
        if not is_done:
            trained = train(run, folder, claims, training)
            finish(run, folder, claims, trained, accelerator or torch.device("cpu"))

    searched, compared = plan.search(), []
    for number, run in enumerate(searched, start=1):
        do(run, f"search, run {number} of {len(searched)}")
        summarize(output_dir, searched, compared, claims, {})
    without_tokenizer = baselines(claims, tokenizer)
    compared = plan.comparison(choose(claims, finished(output_dir, searched)))
    if others := earlier - {run.name for run in (*searched, *compared)}:
        print(f"{len(others)} runs in {output_dir / 'runs'} are of other settings: they are left as they are")
    for number, run in enumerate(compared, start=1):
        do(run, f"comparison, run {number} of {len(compared)}")
        summarize(output_dir, searched, compared, claims, without_tokenizer)
    return summarize(output_dir, searched, compared, claims, without_tokenizer)


@one_line_errors("Interrupted. Finished runs are kept; the same command goes on from there.")
def main(argv: list[str] | None = None) -> None:
    types = (ClaimsArguments, TokenizerArguments, LossArguments, TokenizerTrainingArguments)
    report = compare(*parse_yaml_and_command_line(types, argv, __doc__))
    print(table(report["rows"], report["baselines_psnr_db"]))


if __name__ == "__main__":
    main()
