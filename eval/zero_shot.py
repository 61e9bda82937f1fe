"""Zero-shot classification: how often the text embedding nearest to an image is that of its class.

    python -m eval.zero_shot --model unitok-large --images imagenet/val --output runs/imagenet.json
    torchrun --nproc_per_node 8 -m eval.zero_shot --model unitok-large --images imagenet/val
    python -m eval.zero_shot --model unitok-large --images my/pictures
    python -m eval.zero_shot --model unitok_mllm/checkpoints/tiny --dataset easy-vqa
    python -m eval.zero_shot --model runs/tokenizer-tiny/model --dataset emoji
    python -m eval.zero_shot --system clip --model openai/clip-vit-large-patch14 --images imagenet/val
    python -m eval.zero_shot --system open_clip --model ViTamin-L-256 --pretrained datacomp1b --images imagenet/val

A class is embedded as the normalised mean of its prompts' normalised embeddings (CLIP, arXiv 2103.00020, section
3.1.4). The classes and prompts are

- with `--images`, the subfolders of a folder, by name ("red_circle" is "red circle"), in CLIP's 80 prompts or one of
  your own. For ImageNet's validation images, the 1000 synsets have the names that open_clip ships.
- with `--dataset easy-vqa`, the 24 pairs of colour and shape ("a red circle") of its test images.
- with `--dataset emoji`, the names of the emoji, each in the captions of both styles.

Next to the JSON are a picture of mistakes and a .nearest.safetensors, with `classifier` (classes, dims) and `nearest`
(images, 5): the classes nearest to each image. The latter is saved during the run, and the same command resumes from
it, also with fewer or more images. With another model or other prompts, everything is measured again.
"""

import hashlib
import importlib.metadata
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import safetensors.torch
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from safetensors import safe_open
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, CLIPProcessor, CLIPTextConfig

from eval._common import check_effect, check_finished, check_kind, check_result, parse_settings, read_result, versions
from eval.images import load_batches, stamp
from eval.protocol import number
from eval.zero_shot_benchmarks import TEMPLATES, Benchmark, class_folders, colored_shapes, emoji
from training.arguments import check_open_clip, check_source
from training.errors import one_line_errors
from training.extract_codes import file_digest
from training.files import MOST_WORKERS, check_broken_share, folder_digest, write_atomically
from training.image_text_data import ImageTextTransform
from unitok_mllm import UniTokModel
from unitok_mllm.configuration_unitok import SHARE, check_ranges
from unitok_mllm.devices import AUTO, DEVICE_HELP, find_device
from unitok_mllm.image_processing_unitok import MODES, UniTokImageProcessor, load_image
from unitok_mllm.inference import check_model, picture_bytes
from unitok_mllm.outputs import check_output_file
from unitok_mllm.sheet import contact_sheet


TOP = 5
BATCHES_PER_SAVE = 8
CONFUSIONS_KEPT = 20
MISTAKES_SHOWN = 24
CLIP_VOCABULARY = 49408  # vocabulary size of CLIP's tokenizer, which UniTok's released tokenizers use
DATASETS = ("easy-vqa", "emoji")


@dataclass
class Settings:
    """Command-line options.

    Raises:
        ValueError: a value is out of its range, a folder does not exist, or there is not exactly one of `images` and `dataset`.
    """

    model: str = field(
        default="unitok_mllm/checkpoints/tiny", metadata={"help": "folder, hub name or open_clip name of the model"}
    )
    system: str = field(default="unitok", metadata={"help": "kind of model: unitok, clip (transformers) or open_clip"})
    pretrained: str = field(
        default="", metadata={"help": "open_clip: pretrained tag of the model, or a file of weights"}
    )
    text_tokenizer: str = field(
        default="",
        metadata={
            "help": "unitok: folder or hub name of the text tokenizer; default: the model's own, or else CLIP's"
        },
    )
    image_mode: str = field(
        default="",
        metadata={"help": "unitok: mode of the image processor; default: classify for --images, else the model's own"},
    )
    images: str = field(default="", metadata={"help": "folder with a subfolder of images for each class"})
    dataset: str = field(default="", metadata={"help": "data set instead of --images: easy-vqa or emoji"})
    data: str = field(
        default="runs/data/emoji", metadata={"help": "folder of the emoji, written by training.prepare_data"}
    )
    templates: str = field(
        default="openai", metadata={"help": 'prompts for --images: openai (80), simple (7), or one such as "a {}"'}
    )
    output: str = field(default="runs/zero_shot.json", metadata={"help": "JSON file for the results"})
    limit: int | None = field(
        default=None, metadata={"help": "largest number of images of each part, evenly spread; default: all"}
    )
    batch_size: int = field(default=64, metadata={"help": "images or prompts per batch in each process"})
    workers: int = field(
        default=4, metadata={"help": "image-reading processes for each process; 0 to read in the process itself"}
    )
    max_broken_share: float = field(
        default=0.01,
        metadata={"help": "largest share of broken images, which are left out; no result above it"},
    )
    device: str = field(default=AUTO, metadata={"help": DEVICE_HELP})
    use_cpu: bool = field(default=False, metadata={"help": "the same as --device cpu"})

    def __post_init__(self):
        self.device = "cpu" if self.use_cpu else self.device
        find_device(self.device)
        check_output_file(self.output)
        check_ranges(self, max_broken_share=SHARE, workers=(0, MOST_WORKERS))
        if self.system not in SYSTEMS:
            raise ValueError(f"system must be one of {', '.join(SYSTEMS)}, got {self.system!r}")
        if self.templates not in TEMPLATES and self.templates.count("{}") != 1:
            raise ValueError(
                f"templates must be openai, simple, or a prompt with one {{}} in it, got {self.templates!r}"
            )
        if self.image_mode and self.image_mode not in MODES:
            raise ValueError(f"image_mode must be one of {', '.join(MODES)}, got {self.image_mode!r}")
        if bool(self.images) == bool(self.dataset):
            raise ValueError("give either --images FOLDER or --dataset NAME")
        if self.dataset and self.dataset not in DATASETS:
            raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {self.dataset!r}")
        if self.batch_size < 1 or (self.limit is not None and self.limit < 1):
            raise ValueError(f"batch_size and limit must be at least 1, got {self.batch_size} and {self.limit}")
        if self.system == "unitok":
            check_model(self.model)
            check_source("text_tokenizer", self.text_tokenizer, is_model=False)
            folder = Path(self.text_tokenizer)
            if self.text_tokenizer and folder.is_dir() and not (folder / "tokenizer_config.json").is_file():
                raise ValueError(
                    f"--text_tokenizer {folder} has no tokenizer_config.json: give the folder of a tokenizer"
                )
        else:
            check_effect(self, "--system unitok", "text_tokenizer", "image_mode")
        if self.system == "clip":
            check_source("model", self.model)
        if self.system != "open_clip":
            check_effect(self, "--system open_clip", "pretrained")
        if self.dataset:
            check_effect(self, "--images", "templates")
        if self.dataset != "emoji":
            check_effect(self, "--dataset emoji", "data")


def load_benchmark(settings: Settings) -> Benchmark:
    """Load the benchmark that the settings name; for errors see `class_folders` and `emoji`."""
    if settings.images:
        whole = class_folders(settings.images, settings.templates)
    else:
        whole = colored_shapes() if settings.dataset == "easy-vqa" else emoji(settings.data)
    return whole.limited(settings.limit)


class UniTokSystem:
    """A visual tokenizer with a text tower, from its own folder or an MLLM's.

    Raises:
        ValueError: the folder has a model of another kind, the model has no text tower, or no text tokenizer fits it.
    """

    def __init__(self, settings: Settings, device: torch.device):
        check_kind(settings.model, "unitok", "unitok_mllm")
        self.model = UniTokModel.from_pretrained(settings.model, dtype=torch.float32).to(device).eval()
        if self.model.text_model is None:
            raise ValueError(f"{settings.model} has no text tower, without which there is no zero-shot classification")
        self.image_processor = AutoImageProcessor.from_pretrained(settings.model)
        self.mode = settings.image_mode or ("classify" if settings.images else self.image_processor.mode)
        self.tokenize = text_encoder(settings, self.model.config.text_config, self.image_processor)
        size = self.image_processor.size
        self.preprocessing = f"UniTokImageProcessor, {self.mode}, {size['width']}x{size['height']}"

    def preprocess(self, picture: Image.Image) -> torch.Tensor:
        """Preprocess a picture to pixels (3, H, W)."""
        return self.image_processor(picture, mode=self.mode)["pixel_values"][0]

    def embed_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embed pixels: (B, 3, H, W) -> (B, D)."""
        return self.model.get_image_features(pixels.to(self.model.device)).pooler_output

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """Embed B texts: (B, D)."""
        return self.model.get_text_features(self.tokenize(texts).to(self.model.device)).pooler_output


def text_encoder(
    settings: Settings, text_config: CLIPTextConfig, image_processor: UniTokImageProcessor
) -> Callable[[list[str]], torch.Tensor]:
    """Return a function that encodes B texts to ids (B, T) in the format of a UniTok text tower.

    The text tokenizer is the one in the settings; or that of the model's folder, if it ends texts as the tower
    expects; or CLIP's, for a tower with CLIP's vocabulary (a converted tower comes without a tokenizer, and a
    converted MLLM with the LLM's).

    Raises:
        ValueError: there is no text tokenizer, or it ends texts with another token than the tower expects.
    """
    own = settings.model if (Path(settings.model) / "tokenizer_config.json").is_file() else ""
    source, end = settings.text_tokenizer or own, text_config.eos_token_id
    tokenizer = AutoTokenizer.from_pretrained(source) if source else None
    if tokenizer is not None and tokenizer.eos_token_id == end:
        encode = ImageTextTransform(image_processor, tokenizer, text_config.max_position_embeddings).encode
        return lambda texts: torch.stack([encode(text) for text in texts])
    if text_config.vocab_size == CLIP_VOCABULARY and not settings.text_tokenizer:
        import open_clip

        return open_clip.SimpleTokenizer(context_length=text_config.max_position_embeddings)
    found = "none" if tokenizer is None else f"{source}, which ends them with {tokenizer.eos_token_id}"
    raise ValueError(f"--text_tokenizer has to end texts with token {end}, as the text tower does; got {found}")


class CLIPSystem:
    """transformers' `CLIPModel` with its processor, from a folder or the hub.

    Raises:
        ValueError: the model is of another kind.
        OSError: there is no such model.
    """

    def __init__(self, settings: Settings, device: torch.device):
        check_kind(settings.model, "clip")
        self.model = CLIPModel.from_pretrained(settings.model, dtype=torch.float32).to(device).eval()
        self.processor = CLIPProcessor.from_pretrained(settings.model)
        size = self.processor.image_processor.crop_size
        self.preprocessing = f"{type(self.processor.image_processor).__name__}, {size['width']}x{size['height']}"

    def preprocess(self, picture: Image.Image) -> torch.Tensor:
        """Preprocess a picture to pixels (3, H, W)."""
        return self.processor.image_processor(picture, return_tensors="pt")["pixel_values"][0]

    def embed_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embed pixels: (B, 3, H, W) -> (B, D)."""
        return self.model.get_image_features(pixels.to(self.model.device)).pooler_output

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """Embed B texts: (B, D)."""
        length = self.model.config.text_config.max_position_embeddings
        inputs = self.processor.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return self.model.get_text_features(**inputs.to(self.model.device)).pooler_output


class OpenCLIPSystem:
    """An open_clip model: one of its names with a tag or a file, or `hf-hub:OWNER/NAME`, or `local-dir:FOLDER`.

    Raises:
        ValueError: the name or the tag is unknown.
        OSError: the folder does not exist.
    """

    def __init__(self, settings: Settings, device: torch.device):
        import open_clip

        name, pretrained = settings.model, settings.pretrained
        check_open_clip(name, pretrained, "pretrained")
        self.device = device
        model, self.preprocess = open_clip.create_model_from_pretrained(name, pretrained or None, device=device)
        self.model = model.eval()
        self.tokenizer = open_clip.get_tokenizer(name)
        self.preprocessing = " ".join(str(self.preprocess).split())

    def embed_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embed pixels: (B, 3, H, W) -> (B, D)."""
        return self.model.encode_image(pixels.to(self.device))

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """Embed B texts: (B, D)."""
        return self.model.encode_text(self.tokenizer(texts).to(self.device))


SYSTEMS = {"unitok": UniTokSystem, "clip": CLIPSystem, "open_clip": OpenCLIPSystem}
System = UniTokSystem | CLIPSystem | OpenCLIPSystem


@torch.inference_mode()
def class_embeddings(
    system: System, classes: Sequence[str], templates: Sequence[Callable[[str], str]], batch_size: int
) -> torch.Tensor:
    """Embed each class as the mean over its prompts, (C, D), float32, of unit length; all processes share the work."""
    state, embeds = PartialState(), []
    with state.split_between_processes(list(classes)) as mine:
        texts = [template(name) for name in mine for template in templates]
    starts = range(0, len(texts), batch_size)
    for start in tqdm(starts, desc="prompts", unit="batch", disable=not state.is_main_process):
        embeds.append(F.normalize(system.embed_texts(texts[start : start + batch_size]).float(), dim=-1).cpu())
    means = [torch.cat(embeds).unflatten(0, (-1, len(templates))).mean(dim=1)] if embeds else []
    return F.normalize(torch.cat(gather_object(means)), dim=-1)


def nearest_classes(image_embeds: torch.Tensor, classifier: torch.Tensor) -> torch.Tensor:
    """Find the classes nearest to each image, nearest first; on a tie, the earlier class first.

    Args:
        image_embeds: embeddings of images, (B, D), of any length.
        classifier: embeddings of classes, (C, D), of unit length.

    Returns:
        Class indices, (B, min(5, C)).
    """
    similarity = F.normalize(image_embeds.float(), dim=-1) @ classifier.T
    return similarity.sort(dim=-1, descending=True, stable=True).indices[:, :TOP]


@torch.inference_mode()
def classify(
    system: System,
    benchmark: Benchmark,
    tensors: dict[str, torch.Tensor],
    save: Callable[[], None],
    batch_size: int,
    workers: int,
    max_broken_share: float,
) -> None:
    """Fill the negative rows of `tensors["nearest"]`, (N, min(5, C)); all processes share the work.

    Rows of broken images, which are named on stderr, stay negative.

    Args:
        system: the model.
        benchmark: the images.
        tensors: `nearest`, and the `classifier` (C, D).
        save: function that saves the tensors; called after every few batches.
        batch_size: images per batch.
        workers: number of image-reading processes.
        max_broken_share: tolerated share of broken images.

    Raises:
        ValueError: see `check_broken_share`; the other images of the same batches are classified and saved.
    """
    state, nearest = PartialState(), tensors["nearest"]
    remaining = (nearest[:, 0] < 0).nonzero().flatten().tolist()
    with state.split_between_processes(remaining) as mine:
        batches = load_batches(benchmark, system.preprocess, mine, batch_size, workers, skip_broken=True)
    broken = []
    rounds = math.ceil(math.ceil(len(remaining) / state.num_processes) / (batch_size * BATCHES_PER_SAVE))
    with tqdm(
        desc="images", total=len(nearest), initial=len(nearest) - len(remaining), disable=not state.is_main_process
    ) as bar:
        for _ in range(rounds):  # the same number in every process; its last batches may be smaller or missing
            done, errors = [], []
            for batch in islice(batches, BATCHES_PER_SAVE):
                errors += batch.broken.values()
                if batch.indices:
                    embeds = system.embed_images(batch.pixel_values)
                    found = nearest_classes(embeds, tensors["classifier"].to(embeds.device))
                    done.append((batch.indices, found.to(nearest)))
            for numbers, found in gather_object(done):
                nearest[numbers] = found
                bar.update(len(numbers))
            save()
            errors = gather_object(errors)
            for error in errors if state.is_main_process else ():
                tqdm.write(f"skipping {error}", file=sys.stderr)
            broken += errors
            check_broken_share(broken, len(nearest), max_broken_share)


def accuracy(nearest: torch.Tensor, labels: torch.Tensor) -> dict[str, float | int]:
    """Compute accuracies, in [0, 1].

    Args:
        nearest: class indices, nearest first, (N, 5) or fewer columns.
        labels: class index of each image, (N,).
    """
    right = nearest == labels[:, None]
    return {
        "images": len(labels),
        "top1": right[:, 0].double().mean().item(),
        "top5": right.any(dim=1).double().mean().item(),
    }


def confusions(nearest: torch.Tensor, labels: torch.Tensor, classes: Sequence[str]) -> list[dict]:
    """List the most frequent confusions: pairs of a class and the one predicted instead."""
    pairs = Counter((label, given) for label, given in zip(labels.tolist(), nearest[:, 0].tolist()) if label != given)
    return [
        {"class": classes[label], "taken_for": classes[given], "images": count}
        for (label, given), count in pairs.most_common(CONFUSIONS_KEPT)
    ]


def mistakes_sheet(benchmark: Benchmark, nearest: torch.Tensor) -> bytes | None:
    """Make a PNG of some misclassified images, evenly spread, with the prediction and, in brackets, the class."""
    given = nearest[:, 0].tolist()
    wrong = [i for i, label in enumerate(benchmark.labels) if given[i] != label]
    if not wrong:
        return None
    shown = wrong[:: math.ceil(len(wrong) / MISTAKES_SHOWN)]
    names = [f"{benchmark.classes[given[i]]} ({benchmark.classes[benchmark.labels[i]]})" for i in shown]
    return picture_bytes(contact_sheet([load_image(benchmark.images[i]) for i in shown], names))


def digest(source: str) -> str | None:
    """Compute the SHA-256 of a model's folder or weights file; None if the model is not on disk."""
    path = Path(source.removeprefix("local-dir:"))
    if source and path.is_dir():
        return folder_digest(str(path))
    return file_digest([path]) if path.is_file() else None


def what_is_measured(settings: Settings, benchmark: Benchmark) -> dict[str, str | None]:
    """Collect every setting that an image's nearest classes depend on, except the image."""
    names = ("system", "model", "pretrained", "text_tokenizer", "image_mode", "images", "dataset")
    prompts = [template("{}") for template in benchmark.templates]
    return {
        **{name: getattr(settings, name) for name in names},
        **{f"{name}_sha256": digest(getattr(settings, name)) for name in ("model", "pretrained", "text_tokenizer")},
        "classes_sha256": sha256([*benchmark.classes, *prompts]),
    }


def sha256(values: list) -> str:
    """Compute the SHA-256 of a JSON-serializable value."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def stamped(images: list[str]) -> list[str]:
    """Return each path with its file's stamp."""
    return [f"{image} {stamp(image) if Path(image).is_file() else 'missing'}" for image in images]


def read_tensors(path: Path, measured: dict, images: list[str]) -> dict[str, torch.Tensor]:
    """Read the tensors of an earlier run with the same settings; `nearest` has a row of -1 for each missing image.

    A run with other settings is ignored, with a line on stderr.

    Args:
        path: path of the file.
        measured: settings of this run, see `what_is_measured`.
        images: images as `stamped` names them.

    Raises:
        ValueError: the file is broken, or of something else; it is named.
    """
    if not path.is_file():
        return {}
    check_finished(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        check_result(path, metadata, "measured", "images")
        then = json.loads(metadata["measured"])
        if changed := [name for name, value in measured.items() if then.get(name) != value]:
            if PartialState().is_main_process:
                print(f"{path} was measured with another {', '.join(changed)}: it is measured anew", file=sys.stderr)
            return {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    unknown = torch.full_like(tensors["nearest"][0], -1)
    known = dict(zip(json.loads(metadata["images"]), tensors["nearest"]))
    return {**tensors, "nearest": torch.stack([known.get(image, unknown) for image in images])}


def summary(settings: Settings, benchmark: Benchmark, nearest: torch.Tensor, preprocessing: str) -> dict:
    """Summarise N images for the JSON, from their nearest classes (N, 5)."""
    labels, parts, numbers = torch.tensor(benchmark.labels), {}, []
    templates = [template("{}") for template in benchmark.templates]
    is_named = bool(settings.images) and settings.templates in TEMPLATES
    prompt = f"{settings.templates} ({len(templates)} templates)" if is_named else " / ".join(templates)
    for part in dict.fromkeys(benchmark.parts):
        rows = [i for i, name in enumerate(benchmark.parts) if name == part]
        mixed_up = confusions(nearest[rows], labels[rows], benchmark.classes)
        parts[part] = {**accuracy(nearest[rows], labels[rows]), "most_frequent_confusions": mixed_up}
        of_all = f" of {benchmark.totals[part]}" if len(rows) < benchmark.totals[part] else ""
        numbers += [
            number(
                benchmark.title,
                f"zero-shot {title}",
                100 * parts[part][key],
                "%",
                split=f"{part}, {len(rows)}{of_all} images",
                prompt=prompt,
                images=preprocessing,
                reference=f"{len(benchmark.classes)} classes",
                tool="nearest mean text embedding",
            )
            for key, title in (("top1", "top-1"), ("top5", "top-5"))
        ]
    return {
        "benchmark": f"zero-shot classification, {benchmark.title}",
        "settings": asdict(settings),
        "versions": versions() | {name: importlib.metadata.version(name) for name in ("open_clip_torch", "easy-vqa")},
        "prompts": templates,
        "preprocessing": preprocessing,
        "seed": None,  # nothing is sampled
        "classes": len(benchmark.classes),
        "images": len(benchmark.images),
        "numbers": numbers,
        "parts": parts,
    }


def evaluate(settings: Settings) -> dict:
    """Classify the remaining images; the main process writes the report.

    Raises:
        ValueError, OSError: see `load_benchmark`, the systems and `classify`.
    """
    start, state = time.perf_counter(), PartialState(cpu=settings.device == "cpu")
    benchmark = load_benchmark(settings)
    measured = what_is_measured(settings, benchmark)
    files = stamped(benchmark.images)
    images = {"images_sha256": sha256([files, benchmark.labels, benchmark.parts])}
    output = Path(settings.output)
    path = output.with_suffix(".nearest.safetensors")
    report = read_result(output, "measured")
    tensors = read_tensors(path, measured, files)
    state.wait_for_everyone()  # all processes must read before one writes
    few_broken = len(report.get("broken", ())) <= settings.max_broken_share * len(benchmark.images)
    if report.get("measured") == measured | images and few_broken:
        return report

    with state.local_main_process_first():  # download hub files only once
        device = state.device if state.num_processes > 1 else find_device(settings.device, state.device)
        system = SYSTEMS[settings.system](settings, device)
    seconds_before = tensors.get("seconds", torch.zeros(())).item()

    def save_tensors() -> None:
        tensors["seconds"] = torch.tensor(seconds_before + time.perf_counter() - start)
        if state.is_main_process:
            metadata = {"measured": json.dumps(measured), "images": json.dumps(files)}
            write_atomically(path, safetensors.torch.save(tensors, metadata))

    if "classifier" not in tensors:
        tensors["classifier"] = class_embeddings(system, benchmark.classes, benchmark.templates, settings.batch_size)
        columns = min(TOP, len(benchmark.classes))
        tensors["nearest"] = torch.full((len(benchmark.images), columns), -1, dtype=torch.int32)
        save_tensors()
    how = settings.batch_size, settings.workers, settings.max_broken_share
    classify(system, benchmark, tensors, save_tensors, *how)
    is_whole = tensors["nearest"][:, 0] >= 0
    broken = [name for name, whole in zip(benchmark.images, is_whole.tolist()) if not whole]
    benchmark, nearest = benchmark.only(is_whole.nonzero().flatten().tolist()), tensors["nearest"][is_whole]
    report = {
        **summary(settings, benchmark, nearest, system.preprocessing),
        "broken": broken,
        "device": str(device),
        "seconds": round(tensors["seconds"].item(), 1),
        "measured": measured | images,
    }
    if state.is_main_process:
        if sheet := mistakes_sheet(benchmark, nearest):
            write_atomically(output.with_suffix(".png"), sheet)
        write_atomically(output, json.dumps(report, indent=2).encode())
    return report


def table(report: dict) -> str:
    """Format the report as a few readable lines."""
    prompts = f"{report['classes']} classes, {len(report['prompts'])} prompts each"
    lines = [
        f"{report['benchmark']}: {prompts} ({report['seconds']} s)",
        f"{'':16}{'images':>8}{'top-1':>9}{'top-5':>9}",
    ]
    for name, part in report["parts"].items():
        lines.append(f"  {name:14}{part['images']:8}{part['top1']:9.2%}{part['top5']:9.2%}")
    if broken := report["broken"]:
        lines.append(f"  {len(broken)} broken images left out: {', '.join(broken[:5])}")
    return "\n".join(lines)


@one_line_errors("Interrupted. The same command goes on from what is done.")
def main(argv: list[str] | None = None) -> None:
    report = evaluate(parse_settings(Settings, argv, __doc__))
    if PartialState().is_main_process:
        print(table(report))
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
