"""UniTok's claim in miniature: more sub-codebooks under one total vocabulary, and joint training without conflict.

    python -m eval.claims training/configs/claims.yaml
    python -m eval.claims training/configs/claims.yaml --steps 20 --seeds 0 --codebooks 1 8

The same tokenizer is trained with K = 1, 2, 4, 8 sub-codebooks of `total_codes` / K codes each; the width before
quantization, the data and their order, the steps, the batch and the learning rate are the same. The largest K is also
trained without captions (`contrastive_weight` 0). Each is trained once for each seed, and measured on held-out images:
PSNR of the reconstructions; zero-shot accuracy, where captions are easy-VQA's 24 pairs of colour and shape, an image
counting as right if, of all 24 texts, "a red circle" is the nearest to that of a red circle; and the codes in use.

What the paper (https://arxiv.org/abs/2502.20321) reports of this at its size: with a total of 16384, each doubling of
the sub-codebooks from 1 to 8 improves rFID and ImageNet accuracy (Table 8), and joint training reconstructs slightly
better than reconstruction alone, rFID 0.72 and 0.82 (Table 6). Its Table 8 trains each tokenizer for one of the two
(rFID without captions, accuracy without reconstruction); here, with captions, one tokenizer is measured for both.

A run lives in `<output_dir>/runs/<name>`: its config, checkpoints while it trains, the tokenizer, and `result.json`.
Its name ends with a digest of all that its result hangs on, so that the same command goes on where it was killed and
another setting has runs of its own. After each run `claims.json`, `claims.md` and `claims.png` are those of this
command's finished runs. `--processes 2` trains each tokenizer in two processes, which share out the batch.
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
from pathlib import Path

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoTokenizer

from eval._common import versions, write_atomically
from eval.easy_vqa import PAIRS
from training import train_tokenizer
from training.arguments import parse_yaml_and_command_line
from training.extract_codes import file_digest
from training.files import whole_checkpoints
from training.image_text_data import ImageFiles, ImageTextTransform
from training.losses import LossArguments, psnr
from training.tokenizer_trainer import STATE, TokenizerTrainingArguments
from training.train_tokenizer import TokenizerArguments
from unitok_mllm import UniTokConfig, UniTokModel


BENCHMARK = "sub-codebooks under one total vocabulary"
CLASSES = [f"a {color} {shape}" for color, shape in PAIRS]
JOINT, RECONSTRUCTION = "joint", "reconstruction"
SECONDS = "training, seconds"
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
    """What is compared, and at which cost."""

    steps: int = field(default=900, metadata={"help": "optimizer steps of each run"})
    batch_size: int = field(default=48, metadata={"help": "images of a step, over all processes"})
    total_codes: int = field(default=4096, metadata={"help": "of all sub-codebooks together"})
    codebooks: list[int] = field(default_factory=lambda: [1, 2, 4, 8], metadata={"help": "numbers of sub-codebooks"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "one run for each"})
    held_out: dict = field(
        default_factory=dict, metadata={"help": "files or folders of captioned images by name (YAML only)"}
    )
    limit: int = field(default=0, metadata={"help": "only the first so many images of each held-out set; 0: all"})
    processes: int = field(default=1, metadata={"help": "that each training has on this machine"})

    def __post_init__(self):
        for name in ("steps", "batch_size", "total_codes", "processes"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {vars(self)[name]}.")
        if not self.codebooks or not self.seeds or not self.held_out:
            raise ValueError("codebooks, seeds and held_out name at least one each.")
        if self.limit < 0 or min(self.seeds) < 0:
            raise ValueError(f"limit and seeds must be at least 0, got {self.limit} and {self.seeds}.")
        if self.batch_size % self.processes:
            raise ValueError(f"batch_size ({self.batch_size}) is not a multiple of {self.processes} processes.")
        for k in self.codebooks:
            if k < 1 or self.total_codes % k:
                raise ValueError(f"total_codes ({self.total_codes}) is not a multiple of {k} sub-codebooks.")
        for name, path in self.held_out.items():
            if not Path(path).exists():
                raise ValueError(f"The held-out set {name!r} is not there: {path}.")


@dataclass
class Run:
    """One tokenizer to be trained.

    Attributes:
        num_codebooks, codebook_size: K and V, K * V being the total.
        supervision: "joint" or "reconstruction".
        settings: all that its result hangs on; `training` is the config of `training.train_tokenizer`, without what
            may differ from place to place (see `train`).
    """

    num_codebooks: int
    codebook_size: int
    supervision: str
    seed: int
    settings: dict

    @property
    def name(self) -> str:
        """That of its folder."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()
        return f"k{self.num_codebooks}-{self.supervision}-seed{self.seed}-{digest[:10]}"

    @property
    def bits(self) -> float:
        """What one image position can tell, in bits: log2 of the V^K groups of codes."""
        return self.num_codebooks * math.log2(self.codebook_size)


def digest_of_files(paths: list[str]) -> dict[str, str]:
    """SHA-256 of those paths that are files."""
    return {path: file_digest([Path(path)]) for path in paths if Path(path).is_file()}


def check_geometry(preset: str, vision_overrides: dict) -> None:
    """Raises ValueError where the sizes do not fit, before anything is trained."""
    try:
        UniTokConfig.preset(preset, **vision_overrides)
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error


def plan(
    claims: ClaimsArguments,
    tokenizer: TokenizerArguments,
    losses: LossArguments,
    training: TokenizerTrainingArguments,
) -> list[Run]:
    """Every run, seed by seed, so that the first ones already compare all settings.

    Raises:
        ValueError: a setting that each run has to make itself, or a geometry that cannot be.
    """
    defaults = {f.name: f.default for f in fields(TokenizerTrainingArguments)}
    if given := [name for name in SET_HERE if vars(training)[name] != defaults[name]]:
        raise ValueError(f"Set steps, seeds and batch_size instead of {', '.join(given)}.")
    if tokenizer.init_from or tokenizer.init_open_clip:
        raise ValueError("Every run starts from fresh weights: init_from and init_open_clip have no place here.")
    paths = [source["path"] for source in tokenizer.datasets if "path" in source]
    paths += [*claims.held_out.values(), f"{tokenizer.text_tokenizer}/tokenizer.json"]
    beside = {
        "held_out": claims.held_out,
        "limit": claims.limit,
        "batch_size": claims.batch_size,
        "files_sha256": digest_of_files(paths),
    }
    apart = (*SET_HERE, *WITHOUT_EFFECT, "output_dir")
    common = {
        name: value
        for part in (tokenizer, losses, training)
        for name, value in asdict(part).items()
        if name not in apart
    }
    runs = []
    for seed in dict.fromkeys(claims.seeds):
        for k in dict.fromkeys(claims.codebooks):
            for supervision in (JOINT, RECONSTRUCTION) if k == max(claims.codebooks) else (JOINT,):
                overrides = tokenizer.vision_overrides | {
                    "num_codebooks": k,
                    "codebook_size": claims.total_codes // k,
                }
                check_geometry(tokenizer.preset, overrides)
                config = common | {"vision_overrides": overrides, "seed": seed, "max_steps": claims.steps}
                if supervision == RECONSTRUCTION:
                    config["contrastive_weight"] = 0.0
                settings = {"training": config, **beside}
                runs.append(Run(k, claims.total_codes // k, supervision, seed, settings))
    return runs


def train(run: Run, folder: Path, claims: ClaimsArguments, training: TokenizerTrainingArguments) -> dict:
    """Trains a run, or goes on with it, to `folder / "release"`.

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
        train_tokenizer.main([str(path)])
    else:
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(claims.processes)]
        subprocess.run([sys.executable, "-m", *launcher, "-m", "training.train_tokenizer", str(path)], check=True)
    return {"resumed_from_step": first_step, "training_seconds": round(time.perf_counter() - start, 1)}


def zero_shot(image_embeds: torch.Tensor, class_embeds: torch.Tensor, captions: list[str]) -> dict | None:
    """The share of images whose own class has the nearest text, of those whose caption is one of CLASSES.

    Args:
        image_embeds: (N, D); class_embeds: (24, D), in the order of CLASSES; all of unit length.

    Returns:
        None where no caption is.
    """
    rows = [i for i, caption in enumerate(captions) if caption in CLASSES]
    if not rows:
        return None
    guesses = (image_embeds[rows] @ class_embeds.T).argmax(dim=1).tolist()
    right = sum(CLASSES[guess] == captions[i] for guess, i in zip(guesses, rows))
    return {"images": len(rows), "right": right, "accuracy": right / len(rows)}


@torch.no_grad()
def measure(
    folder: Path, held_out: dict[str, str], limit: int, batch_size: int, device: torch.device, with_text: bool
) -> dict:
    """What a trained tokenizer does with held-out images.

    Args:
        folder: of the tokenizer, its image processor and text tokenizer.
        with_text: also zero-shot, for tokenizers whose text tower was trained.

    Returns:
        `parameters` of the model; `codebook_usage_percent`, the quantizer's own, from its last training steps; and for
        each set in `held_out` its `images`, mean `psnr_db`, the percentage of all codes that they are encoded with,
        and `zero_shot`.

    Raises:
        ValueError: an image cannot be read; it is named.
    """
    model = UniTokModel.from_pretrained(folder).to(device).eval()
    image_processor = AutoImageProcessor.from_pretrained(folder)
    length = model.config.text_config.max_position_embeddings
    encode = ImageTextTransform(image_processor, AutoTokenizer.from_pretrained(folder), length).encode
    class_embeds = model.get_text_features(
        torch.stack([encode(name) for name in CLASSES]).to(device)
    ).pooler_output.cpu()
    sets = {}
    for name, path in held_out.items():
        source, captions, parts = ImageFiles(path), [], []
        for rows in tqdm(range_in_batches(min(len(source), limit or len(source)), batch_size), desc=name):
            images, texts = zip(*(load_named(source, row) for row in rows))
            captions += texts
            pixels = image_processor(list(images))["pixel_values"].to(device)
            output = model(pixels)
            decibels = psnr(output.reconstruction, pixels)
            parts.append([tensor.cpu() for tensor in (decibels, output.codes, output.image_embeds)])
        decibels, codes, embeds = (torch.cat(column) for column in zip(*parts))
        used = sum(len(of_one.unique()) for of_one in codes.unbind(dim=1))
        sets[name] = {
            "images": len(captions),
            "psnr_db": decibels.mean().item(),
            "codes_used_percent": 100 * used / model.vision_model.quantizer.usage.numel(),
            "zero_shot": zero_shot(embeds, class_embeds, captions) if with_text else None,
        }
    return {
        "parameters": model.num_parameters(),
        "codebook_usage_percent": model.vision_model.quantizer.codebook_usage.item(),
        "held_out": sets,
    }


def range_in_batches(count: int, batch_size: int) -> list[range]:
    """0, 1, ... count - 1, cut into batches."""
    return [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


def load_named(source: ImageFiles, row: int) -> tuple[Image.Image, str | None]:
    """An image and its caption; the error of one that cannot be read names it."""
    try:
        return source.load(row)
    except ValueError as error:
        raise ValueError(f"{source.name(row)}: {error}") from error


def finish(run: Run, folder: Path, claims: ClaimsArguments, trained: dict, device: torch.device) -> None:
    """Measures a trained run, writes its `result.json`, and removes its checkpoints."""
    start = time.perf_counter()
    with_text = run.supervision == JOINT
    measured = measure(folder / "release", claims.held_out, claims.limit, claims.batch_size, device, with_text)
    result = {
        "run": run.name,
        "codebooks": run.num_codebooks,
        "codebook_size": run.codebook_size,
        "bits_per_position": run.bits,
        "supervision": run.supervision,
        "seed": run.seed,
        "images_trained_on": claims.steps * claims.batch_size,
        **trained,
        "evaluation_seconds": round(time.perf_counter() - start, 1),
        **measured,
        "settings": run.settings,
        "versions": versions(),
        "device": str(device),
        "processes": claims.processes,
        "threads": torch.get_num_threads(),
    }
    write_atomically(folder / "result.json", json.dumps(result, indent=2).encode())
    for checkpoint in whole_checkpoints(folder, STATE).values():
        shutil.rmtree(checkpoint)


def metrics(result: dict) -> dict[str, float]:
    """The numbers of one run that are averaged over seeds, by the names that tables and plots give them.

    The time is that of a run that was never broken off.
    """
    sets = result["held_out"]
    accuracies = {name: one["zero_shot"]["accuracy"] for name, one in sets.items() if one["zero_shot"]}
    return (
        {f"PSNR (dB), {name}": one["psnr_db"] for name, one in sets.items()}
        | {f"zero-shot (%), {name}": 100 * accuracy for name, accuracy in accuracies.items()}
        | {"codes in use (%)": result["codebook_usage_percent"]}
        | ({} if result["resumed_from_step"] else {SECONDS: result["training_seconds"]})
    )


def aggregate(results: list[dict]) -> list[dict]:
    """Mean and sample standard deviation (None of a single seed) over the seeds of each setting.

    Returns:
        A row for each (codebooks, supervision), by codebooks: `metrics` has `mean`, `std` and the `values` by name.
    """
    groups: dict[tuple, list[dict]] = {}
    for result in results:
        groups.setdefault((result["codebooks"], result["supervision"]), []).append(result)
    rows = []
    for (k, supervision), group in sorted(groups.items()):
        columns = [metrics(result) for result in group]
        names = dict.fromkeys(name for column in columns for name in column)
        values = {name: [column[name] for column in columns if name in column] for name in names}
        rows.append(
            {
                "codebooks": k,
                "codebook_size": group[0]["codebook_size"],
                "bits_per_position": group[0]["bits_per_position"],
                "supervision": supervision,
                "seeds": [result["seed"] for result in group],
                "metrics": {
                    name: {
                        "mean": statistics.mean(numbers),
                        "std": statistics.stdev(numbers) if len(numbers) > 1 else None,
                        "values": numbers,
                    }
                    for name, numbers in values.items()
                },
            }
        )
    return rows


def metric_names(rows: list[dict]) -> list[str]:
    """All metrics of all rows, in the order of their first appearance, the cost last."""
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    return sorted(names, key=lambda name: name == SECONDS)


def table(rows: list[dict]) -> str:
    """Markdown, aligned for the screen: mean, and after ± the standard deviation over seeds where there is one."""
    names = metric_names(rows)
    cells = [["codebooks", "bits", "trained for", *names, "seeds"]]
    for row in rows:
        shown = []
        for name in names:
            value = row["metrics"].get(name)
            digits = 0 if name == SECONDS else 2
            spread = "" if value is None or value["std"] is None else f" ± {value['std']:.{digits}f}"
            shown.append("-" if value is None else f"{value['mean']:.{digits}f}{spread}")
        shape = f"{row['codebooks']} x {row['codebook_size']}"
        seeds = " ".join(map(str, row["seeds"]))
        cells.append([shape, f"{row['bits_per_position']:g}", row["supervision"], *shown, seeds])
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells)


def plot(rows: list[dict], title: str) -> bytes:
    """A PNG: each metric but the cost over the number of sub-codebooks, with the standard deviation as error bars."""
    names = [name for name in metric_names(rows) if name != SECONDS]
    figure = Figure(figsize=(3.6 * len(names), 3.6), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=10)
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        for supervision, marker in ((JOINT, "o-"), (RECONSTRUCTION, "s")):
            points = [row for row in rows if row["supervision"] == supervision and name in row["metrics"]]
            if points:
                values = [row["metrics"][name] for row in points]
                spread = [value["std"] or 0 for value in values]
                means = [value["mean"] for value in values]
                axis.errorbar(
                    [row["codebooks"] for row in points], means, yerr=spread, fmt=marker, capsize=4, label=supervision
                )
        axis.set_xscale("log", base=2)
        shapes = {row["codebooks"]: f"{row['codebooks']}x{row['codebook_size']}" for row in rows}
        axis.set_xticks(list(shapes), list(shapes.values()))
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("sub-codebooks x codes")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def summarize(output_dir: Path, runs: list[Run], claims: ClaimsArguments) -> dict:
    """Writes `claims.json`, `claims.md` and `claims.png` of those of the runs that are finished; one at least is."""
    paths = {run.name: output_dir / "runs" / run.name / "result.json" for run in runs}
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths.values() if path.is_file()]
    rows = aggregate(results)
    report = {
        "benchmark": BENCHMARK,
        "settings": asdict(claims),
        "versions": versions(),
        "prompt": "a {color} {shape}",
        "rows": rows,
        "missing_runs": [name for name, path in paths.items() if not path.is_file()],
        "seconds": round(sum(result["training_seconds"] + result["evaluation_seconds"] for result in results), 1),
        "runs": results,
    }
    title = f"{claims.total_codes} codes in all, {claims.steps} steps of {claims.batch_size} images"
    write_atomically(output_dir / "claims.json", json.dumps(report, indent=2).encode())
    write_atomically(output_dir / "claims.md", f"{title}; mean ± standard deviation\n\n{table(rows)}\n".encode())
    write_atomically(output_dir / "claims.png", plot(rows, f"{title}; mean and standard deviation over seeds"))
    return report


def compare(
    claims: ClaimsArguments,
    tokenizer: TokenizerArguments,
    losses: LossArguments,
    training: TokenizerTrainingArguments,
) -> dict:
    """Trains and measures the runs that have no result yet, one after another; what `claims.json` then says.

    Raises:
        ValueError: see `plan`; or it was itself started in several processes.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("Start it once, without torchrun: --processes says how many each training has.")
    runs, output_dir = plan(claims, tokenizer, losses, training), Path(training.output_dir)
    accelerator = None if training.use_cpu else torch.accelerator.current_accelerator(check_available=True)
    for number, run in enumerate(runs, start=1):
        folder = output_dir / "runs" / run.name
        is_done = (folder / "result.json").is_file()
        print(f"run {number} of {len(runs)}, {run.name}: {'is there' if is_done else 'starts'}", flush=True)
        if not is_done:
            trained = train(run, folder, claims, training)
            finish(run, folder, claims, trained, accelerator or torch.device("cpu"))
            summarize(output_dir, runs, claims)
    return summarize(output_dir, runs, claims)


def main(argv: list[str] | None = None) -> None:
    types = (ClaimsArguments, TokenizerArguments, LossArguments, TokenizerTrainingArguments)
    try:
        report = compare(*parse_yaml_and_command_line(types, argv))
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted. Finished runs are kept; the same command goes on from there.")
    print(table(report["rows"]))


if __name__ == "__main__":
    main()
