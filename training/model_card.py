"""The README.md of a released folder: its model card, with what was trained and measured.

    python -m training.model_card runs/mllm-tiny/release --results runs/easy_vqa.json runs/emoji.json --license mit
    python -m training.model_card runs/mllm-tiny/release --runs runs/tokenizer-tiny runs/mllm-tiny
    python -m training.model_card runs/mllm-tiny/release --push_to_hub OWNER/NAME

The trainings write a card with each release. This command replaces its section "Evaluation" by the given results, and its
section "Learning curve" by a plot of the given runs' logs, and leaves the rest as it is; a folder without a card gets one. It reads results of easy_vqa, emoji, reconstruction,
zero_shot and text_to_image, and refuses those of other weights than the folder's. A card that does not begin with a
generated card's first line is hand-written, and is never overwritten.
"""

import argparse
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, get_local_safetensors_metadata
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import AutoConfig, PreTrainedConfig

from training.errors import CommandLine, check_keys, one_line_errors
from training.files import folder_digest, write_atomically
from training.learning_curve import plot_curves, read_curves
from unitok_mllm.inference import check_model


logger = logging.getLogger(__name__)
MARKER = "<!-- Written by training.model_card. Without this line the card is hand-written and never overwritten. -->"
EVALUATION = "\n## Evaluation\n"
LEARNING_CURVE = "\n## Learning curve\n"
CURVE_FILE = "learning_curve.png"
METADATA = ("license", "license_name", "license_link", "language", "datasets", "base_model", "tags", "model_name")
LISTS = ("language", "datasets", "base_model", "tags")
KINDS = {
    "unitok_mllm": {"pipeline_tag": "image-text-to-text", "tags": ["unitok", "text-to-image"]},
    "unitok": {"pipeline_tag": "image-feature-extraction", "tags": ["unitok", "image-tokenizer"]},
}
WHAT = {
    "unitok_mllm": "A multimodal LLM that reads images and draws them, through the multi-codebook visual tokenizer of "
    "[UniTok](https://arxiv.org/abs/2502.20321).",
    "unitok": "A multi-codebook visual tokenizer, [UniTok](https://arxiv.org/abs/2502.20321): images to codes and back, "
    "and to one embedding.",
}
CODE = {
    "unitok_mllm": """\
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "{name}"  # this folder, or its name on the hub
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)

question = [{{"type": "image", "image": Image.open("photo.jpg")}}, {{"type": "text", "text": "What is this?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": question}}], add_generation_prompt=True, tokenize=True, return_dict=True
)
answer = model.generate(**inputs, max_new_tokens=32, do_sample=False)
print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

inputs = processor(text=["a red circle"], generation_mode="image")
codes = model.generate(**inputs, generation_mode="image", seed=0)  # (1, {K}, {L})
drawings = processor.post_process_multimodal_output(model.decode_images(codes), generation_mode="image")
drawings[0].save("drawing.png")""",
    "unitok": """\
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

folder = "{name}"  # this folder, or its name on the hub
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
image_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)

codes = model.encode(image_processor(Image.open("photo.jpg"))["pixel_values"])  # (1, {K}, {L})
image_processor.post_process(model.decode(codes))[0].save("reconstruction.png")""",
}


class HandWrittenCard(ValueError):
    """A model card does not have the marker of generated cards."""


@dataclass
class TrainingRun:
    """Facts about a training for its model card.

    Attributes:
        started_from: folders or hub names of the initial weights.
        datasets: sources of the training data, as in the config.
        metadata: fields of the card's front matter, see `check_metadata`.
        facts: rows of the card's table, see `training_facts`.
        losses: last value of each loss, by name.
    """

    started_from: list[str] = field(default_factory=list)
    datasets: list[dict] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)


def training_facts(
    steps: int,
    first_step: int,
    samples_per_step: int,
    learning_rate: float,
    seconds: float,
    device: torch.device,
    processes: int,
    precision: str,
) -> dict[str, str]:
    """Build the rows of the table that describes a run.

    Args:
        steps: number of optimizer steps of the run.
        first_step: step at which the run was resumed; 0 if it was not.
        samples_per_step: global batch size.
        learning_rate: peak learning rate.
        seconds: duration in seconds, from `first_step` on.
        device: device of a process.
        processes: number of processes.
        precision: description of the precision, such as "bf16 autocast".
    """
    resumed = f" (for the last {steps - first_step} steps: the run was resumed)" if first_step else ""
    return {
        "steps": str(steps),
        "samples in a step": str(samples_per_step),
        "learning rate": f"{learning_rate:g}",
        "seconds": f"{seconds:.0f}{resumed}",
        "hardware": hardware(device, processes),
        "precision": precision,
    }


def hardware(device: torch.device, processes: int) -> str:
    """Describe the GPU or CPU of a process, and the number of processes."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        found = re.search(r"model name\s*: (.+)", _read("/proc/cpuinfo"))
        name = f"CPU, {found[1] if found else platform.machine()}, {os.cpu_count()} cores"
    else:
        name = device.type
    return f"{name}; {processes} process{'es' if processes > 1 else ''}"


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8") if Path(path).is_file() else ""


def check_metadata(metadata: dict) -> None:
    """Check the fields of a card's front matter that a config may set.

    Raises:
        ValueError: a field is unknown, or its value is empty or not a text (or list of texts, for fields that take them).
    """
    check_keys("card", metadata, METADATA)
    for name, value in metadata.items():
        texts = value if name in LISTS and isinstance(value, list) else [value]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(
                f"{name} of the card must be a text{' or a list of texts' * (name in LISTS)}, got {value!r}."
            )


def is_hub_name(name: str) -> bool:
    """Return whether a name is a hub name: it has the form of one, and there is no such local path."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def table(rows: list[tuple], header: tuple = ("", "")) -> str:
    """Format a Markdown table."""
    cells = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in cells)


def load_config(folder: str | os.PathLike) -> PreTrainedConfig:
    """Load the config of a model's folder.

    Raises:
        ValueError: the folder does not contain a model of this project.
    """
    folder = Path(folder)
    check_model(folder)
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in KINDS:
        raise ValueError(f"{folder} is a {config.model_type} model; there are cards for {', '.join(KINDS)}")
    return config


def sizes(folder: str | os.PathLike, config: PreTrainedConfig) -> str:
    """Format the table of a model's sizes. Parameters are counted in its files (with buffers; tied weights once)."""
    folder = Path(folder)
    tokenizer = config if config.model_type == "unitok" else config.visual_config
    vision, text = tokenizer.vision_config, tokenizer.text_config
    width = f"width {vision.hidden_size}, {vision.num_attention_heads} heads"
    rows = [
        (
            "pictures",
            f"{vision.image_size}x{vision.image_size}, {vision.num_positions} positions of {vision.num_codebooks} "
            f"codes, {vision.codebook_size} codes in each sub-codebook",
        ),
        ("encoder", f"ViTamin, {width}, {vision.num_hidden_layers} blocks"),
        ("decoder", f"ViTamin, {width}, {tokenizer.decoder_layers} blocks"),
    ]
    if text is not None:
        rows.append(("text tower", f"CLIP, width {text.hidden_size}, {text.num_hidden_layers} blocks"))
    if config.model_type == "unitok_mllm":
        llm, depth = config.text_config, config.depth_config
        of_llm = f"width {llm.hidden_size}, {llm.num_hidden_layers} blocks, {llm.vocab_size} tokens"
        rows.append(("LLM", f"{llm.model_type}, {of_llm}"))
        rows.append(("depth transformer", f"width {depth.hidden_size}, {depth.num_hidden_layers} blocks"))
    files = get_local_safetensors_metadata(folder)
    parts: dict[str, int] = {}
    for file in files.files_metadata.values():
        for name, tensor in file.tensors.items():
            part = name.split(".")[0]
            parts[part] = parts.get(part, 0) + tensor.parameter_count
    each = ", ".join(f"{part} {count / 1e6:.2f} M" for part, count in parts.items())
    rows.append(("parameters", f"{sum(parts.values()) / 1e6:.2f} M ({each})"))
    rows.append(("stored as", ", ".join(files.parameter_count)))
    return table(rows)


def training_section(run: TrainingRun) -> str:
    """Describe a run, in Markdown."""
    lines = ["\n## Training\n"]
    if run.started_from:
        lines.append(f"Started from {', '.join(f'`{name}`' for name in run.started_from)}.\n")
    if run.facts:
        lines.append(table(list(run.facts.items())) + "\n")
    rows = []
    for source in run.datasets:
        options = {name: value for name, value in source.items() if name not in ("path", "shards")}
        place = source.get("path") or source["shards"]
        rows.append((f"`{place}`", ", ".join(f"{name} {value}" for name, value in options.items())))
    if rows:
        lines.append(table(rows, ("data", "how it was used")) + "\n")
    if run.losses:
        values = [(name, f"{value:.4g}") for name, value in run.losses.items()]
        lines.append(table(values, ("last logged", "")) + "\n")
    return "\n".join(lines)


def model_name(folder: str | os.PathLike) -> str:
    """Return the name of a folder's model: that of the folder, or of its parent if the folder is a `release`."""
    folder = Path(folder)
    folder = folder.absolute()
    return folder.parent.name if folder.name == "release" else folder.name


def make_card(folder: str | os.PathLike, name: str, run: TrainingRun | None = None) -> ModelCard:
    """Create the card of a folder, without evaluation results.

    Raises:
        ValueError: see `load_config` and `check_metadata`.
    """
    folder = Path(folder)
    run = run or TrainingRun()
    check_metadata(run.metadata)
    config = load_config(folder)
    kind = config.model_type
    vision = (config if kind == "unitok" else config.visual_config).vision_config
    hub_sources = [source["path"] for source in run.datasets if source.get("kind") == "hf"]
    found = {
        "datasets": [source for source in hub_sources if is_hub_name(source)] or None,
        "base_model": [base for base in run.started_from if is_hub_name(base)] or None,
    }
    data = ModelCardData(**{"library_name": "transformers", **KINDS[kind], **found, **run.metadata})
    name = data.pop("model_name") or name  # in the front matter only next to results
    code = CODE[kind].format(name=name, K=vision.num_codebooks, L=vision.num_positions)
    body = [
        f"{MARKER}\n\n# {name}\n\n{WHAT[kind]}\n\n{sizes(folder, config)}\n\n## How to load it\n",
        f"```python\n{code}\n```\n",
        "It needs transformers (5.24 or newer), torch, torchvision, timm and pillow; its own code is in the folder. Where "
        "the package is installed, `import unitok_mllm` makes `trust_remote_code` needless.",
    ]
    if run != TrainingRun():
        body.append(training_section(run))
    return ModelCard(f"---\n{data.to_yaml()}\n---\n" + "\n".join(body).rstrip() + "\n")


def read_card(folder: str | os.PathLike) -> ModelCard | None:
    """Load the generated card of a folder, if there is one.

    Raises:
        HandWrittenCard: the card is not a generated one.
    """
    folder = Path(folder)
    path = folder / REPOCARD_NAME
    if not path.is_file():
        return None
    if MARKER not in path.read_text("utf-8"):
        raise HandWrittenCard(f"{path} is hand-written (it has no line {MARKER!r}) and is not changed.")
    return ModelCard.load(path)


def write_release_card(folder: str | os.PathLike, place: str | os.PathLike, run: TrainingRun | None = None) -> None:
    """Write the card into a folder that will replace `place`. A hand-written card in `place` is kept."""
    folder, place = Path(folder), Path(place)
    try:
        read_card(place)
    except HandWrittenCard as error:
        logger.warning("%s", error)
        shutil.copyfile(place / REPOCARD_NAME, folder / REPOCARD_NAME)
    else:
        (folder / REPOCARD_NAME).write_text(str(make_card(folder, model_name(place), run)), "utf-8")


def find_digests(result: Any) -> Iterator[str | None]:
    """Iterate over every `model_sha256` in a result: the digests of the evaluated weights."""
    if isinstance(result, dict):
        if "model_sha256" in result:
            yield result["model_sha256"]
        for value in result.values():
            yield from find_digests(value)


def _pick(values: dict, *names: str) -> dict:
    return {name: values[name] for name in names}


def easy_vqa_results(result: dict) -> Iterator[EvalResult]:
    """Yield the entries of a result of `eval.easy_vqa` for the card's metadata."""

    def one(task: str, metric: str, value: float, name: str, **args) -> EvalResult:
        names = {"dataset_type": "easy-vqa", "dataset_name": "easy-VQA"}
        names["dataset_split"] = result["settings"]["split"]
        return EvalResult(task, metric_type=metric, metric_value=value, metric_name=name, metric_args=args, **names)

    parts = result["parts"]
    if part := parts.get("reconstruction"):
        value = part["psnr_mean_of_images_db"]
        yield one("image-to-image", "psnr", value, "reconstruction, PSNR (dB), mean of images", images=part["images"])
    for kind, value in parts.get("vqa", {"accuracy": {}})["accuracy"].items():
        args = _pick(value, "questions")
        yield one("visual-question-answering", "accuracy", value["accuracy"], f"exact answers, {kind}", **args)
    if part := parts.get("text_to_image"):
        args = _pick(part["settings"], "guidance", "temperature", "top_k", "seed")
        name = "drawings of the colour and shape asked for (judged by a CNN)"
        yield one("text-to-image", "accuracy", part["both"], name, images=part["images"], **args)
        name = "drawings that fill their box as the shape does (pixel check)"
        yield one("text-to-image", "accuracy", part["pixel_check"]["all"], name, images=part["images"], **args)
    if part := parts.get("edit"):
        name = "edits with the new colour and the old shape (judged by a CNN)"
        yield one("image-to-image", "accuracy", part["both"], name, images=part["images"])


EMOJI_METRICS = (
    ("reconstruction", "psnr_db", "image-to-image", "psnr", "reconstruction, PSNR (dB)"),
    ("reconstruction", "top1", "image-to-image", "accuracy", "original nearest to its reconstruction"),
    ("naming", "accuracy", "visual-question-answering", "accuracy", "named exactly"),
    ("drawing", "top1", "text-to-image", "accuracy", "drawing nearest to what was asked for"),
    ("drawing", "top5", "text-to-image", "accuracy", "drawing among the five nearest"),
    ("drawing", "pair", "text-to-image", "accuracy", "drawing nearest of all names in all styles"),
    ("restyling", "pair", "image-to-image", "accuracy", "restyled: nearest of all names in all styles"),
)


def emoji_results(result: dict) -> Iterator[EvalResult]:
    """Yield the entries of a result of `eval.emoji` for the card's metadata."""
    for part, key, task, metric, name in EMOJI_METRICS:
        for split, values in result["parts"].get(part, {}).items():
            args = _pick(values, "pictures")
            if part == "drawing":
                args |= _pick(result["settings"], "guidance", "temperature", "top_k", "seed")
            names = {"metric_name": name, "metric_args": args, "dataset_split": split}
            yield EvalResult(task, "emoji", result["benchmark"], metric, values[key], **names)


def reconstruction_results(result: dict) -> Iterator[EvalResult]:
    """Yield the entries of a result of `eval.reconstruction` for the card's metadata."""
    data, args = Path(result["settings"]["images"]).name, _pick(result, "images", "image_size")
    for name, value in result["metrics"].items():
        if not isinstance(value, list):  # not one value per sub-codebook
            yield EvalResult("image-to-image", data, data, name, value, metric_name=name, metric_args=args)


def zero_shot_results(result: dict) -> Iterator[EvalResult]:
    """Yield the entries of a result of `eval.zero_shot` for the card's metadata."""
    title = result["benchmark"].removeprefix(ZERO_SHOT)
    data = result["settings"]["dataset"] or "imagenet-1k"
    for split, part in result["parts"].items():
        for key in ("top1", "top5"):
            names = {"metric_name": key, "metric_args": _pick(part, "images"), "dataset_split": split}
            yield EvalResult("zero-shot-image-classification", data, title, "accuracy", part[key], **names)


def text_to_image_results(result: dict) -> Iterator[EvalResult]:
    """Yield the entries of a result of `eval.text_to_image` for the card's metadata."""
    args = _pick(result, "prompts", "samples") | _pick(
        result["drawn_with"], "guidance", "temperature", "top_k", "top_p", "seed"
    )
    data = result["benchmark"]
    for name, part in result["metrics"].items():
        names = {"metric_name": name, "metric_args": part["settings"] | args}
        yield EvalResult("text-to-image", data, data, name, part["mean"], **names)


ZERO_SHOT = "zero-shot classification, "
READERS = {  # by the start of `benchmark`, which for text_to_image is the format of the prompts
    "easy-VQA, ": easy_vqa_results,
    "emoji of ": emoji_results,
    "reconstruction": reconstruction_results,
    ZERO_SHOT: zero_shot_results,
}


def read_results(path: str | os.PathLike, digest: str) -> tuple[list[EvalResult], str]:
    """Read the numbers and the library versions from the result file of a model.

    Args:
        path: path of the result file.
        digest: the model's `folder_digest`.

    Raises:
        ValueError: the file is not a result, or is a result of an unknown kind, of other weights, or of an unfinished
            evaluation.
    """
    path = Path(path)
    try:
        result = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    benchmark = str(result.get("benchmark", "")) if isinstance(result, dict) else ""
    readers = [reader for start, reader in READERS.items() if benchmark.startswith(start)]
    if benchmark and "drawn_with" in result:
        readers = [text_to_image_results]
    if not readers:
        raise ValueError(
            f"{path} is not a result of easy_vqa, emoji, reconstruction, zero_shot or text_to_image "
            f"(benchmark: {benchmark or 'none'})"
        )
    measured = set(find_digests(result))
    if measured != {digest}:
        found = ", ".join(str(one)[:12] for one in measured) or "does not say which"
        raise ValueError(f"{path} was measured with other weights (SHA-256 {found}, the folder's is {digest[:12]})")
    try:
        versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        results = list(readers[0](result))
    except KeyError as error:
        raise ValueError(f"{path} has no {error}: it was written by another version of its script") from error
    if not results:
        raise ValueError(f"{path} has no numbers yet")
    return results, versions


def evaluation_section(measured: dict[str, tuple[list[EvalResult], str]]) -> str:
    """Format results, grouped by their files, in Markdown."""
    lines = [EVALUATION]
    for file, (results, versions) in measured.items():
        rows = []
        for one in results:
            data = ", ".join(filter(None, (one.dataset_name, one.dataset_split)))
            args = ", ".join(f"{name} {value}" for name, value in one.metric_args.items())
            rows.append((data, one.metric_name, f"{one.metric_value:.4g}", args))
        lines.append(table(rows, ("data", "metric", "value", "of")) + "\n")
        lines.append(f"From `{file}`, measured with {versions}.\n")
    return "\n".join(lines)


def update_card(
    folder: str | os.PathLike,
    results: Iterable[str | os.PathLike],
    metadata: dict[str, Any] | None = None,
    runs: Iterable[str | os.PathLike] = (),
) -> None:
    """Replace the results and the learning curve in a folder's card. What is not given stays.

    A result that cannot be used is named in the log and left out.

    Args:
        folder: folder of the model.
        results: result files.
        metadata: fields of the front matter to set, see `check_metadata`.
        runs: output folders of the trainings whose logs are plotted.

    Raises:
        ValueError: no result can be used, or a run has no logs; see also `make_card` and `read_card`.
    """
    folder, results = Path(folder), [Path(result) for result in results]
    curves = {Path(run).name: read_curves(run) for run in runs}
    metadata = dict(metadata or {})
    check_metadata(metadata)
    card = read_card(folder) or make_card(folder, model_name(folder))
    heading = re.search(r"^# (.+)$", card.text, re.M)
    name = metadata.pop("model_name", "") or card.data.get("model_name") or (heading or ["", model_name(folder)])[1]
    for key, value in metadata.items():
        card.data[key] = value
    text, mark, evaluation = card.text.partition(EVALUATION)
    if curves:
        write_atomically(folder / CURVE_FILE, plot_curves(curves))
        names = " and ".join(f"`{name}`" for name in curves)
        section = f"{LEARNING_CURVE}\n![Losses and PSNR over the steps]({CURVE_FILE})\n\nFrom the logs of {names}.\n"
        text = text.split(LEARNING_CURVE)[0].rstrip() + "\n" + section
        card.text = text + mark + evaluation
    if results:
        digest, measured = folder_digest(str(folder)), {}
        for path in results:
            try:
                measured[path.name] = read_results(path, digest)
            except ValueError as error:
                logger.warning("left out: %s", error)
        if not measured:
            raise ValueError(f"none of the {len(results)} results can be used: the card is unchanged")
        card.data.eval_results = [one for found, _ in measured.values() for one in found]
        card.text = text.rstrip() + "\n" + evaluation_section(measured)
    if card.data.eval_results:
        card.data.model_name = name
    write_atomically(folder / REPOCARD_NAME, str(card).encode())


def push_release(folder: str | os.PathLike, name: str, private: bool | None = None, token: str | None = None) -> str:
    """Upload a folder with its card in one commit, and return its URL.

    Raises:
        ValueError: the folder has no card.
    """
    folder = Path(folder)
    if not (folder / REPOCARD_NAME).is_file():
        raise ValueError(f"{folder} has no card: python -m training.model_card {folder}")
    api = HfApi(token=token)
    place = api.create_repo(name, private=private, exist_ok=True)
    api.upload_folder(repo_id=place.repo_id, folder_path=folder, commit_message="Upload model with its card")
    return str(place)


@one_line_errors()
def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a released folder")
    parser.add_argument(
        "--results", type=Path, nargs="+", default=[], metavar="JSON", help="result files of the scripts in eval/"
    )
    parser.add_argument(
        "--runs", type=Path, nargs="+", default=[], metavar="FOLDER", help="output folders of trainings to plot"
    )
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="upload the folder to this repository afterwards")
    parser.add_argument(
        "--private", action="store_true", default=None, help="make the repository private, if it is new"
    )
    for name in METADATA:
        parser.add_argument(f"--{name}", nargs="+" if name in LISTS else None, help="entry of the card's front matter")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    metadata = {name: vars(arguments)[name] for name in METADATA if vars(arguments)[name] is not None}
    if arguments.push_to_hub is not None:
        validate_repo_id(arguments.push_to_hub)
    elif arguments.private:
        parser.error("--private has no effect without --push_to_hub: leave it out")
    update_card(arguments.folder, arguments.results, metadata, arguments.runs)
    print(f"the card is in {arguments.folder / REPOCARD_NAME}")
    if arguments.push_to_hub:
        print(push_release(arguments.folder, arguments.push_to_hub, arguments.private))


if __name__ == "__main__":
    main()
