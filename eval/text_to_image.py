"""Draws the prompts of a text-to-image benchmark, and measures the pictures.

    python -m eval.text_to_image --model MODEL --prompts genai_image.json --output runs/genai --samples 4 --guidance 5
    torchrun --nproc_per_node 8 -m eval.text_to_image --model MODEL --prompts evaluation_metadata.jsonl ...
    ... --clip openai/clip-vit-large-patch14 --vqa_score clip-flant5-xxl --vqa_python ~/t2v/bin/python
    ... --prompts meta_data.json --samples 1 --fid_reference mjhq30k_imgs

Prompt files of GenAI-Bench, GenEval, MJHQ-30K and PartiPrompts, or a prompt a line; see `eval.prompts`, also for the
names of the pictures. In the output folder: `images/`, laid out as the benchmark's own evaluation expects it (GenEval:
`python evaluation/evaluate_images.py OUTPUT/images`), `settings.json`, `results.json` and `sheet.png`, the first pictures.

The same command goes on where an earlier one was stopped, and finished metrics are kept; more `--samples`, a higher
`--limit` and other metrics may be asked for later, another setting is refused. Each picture has a seed of its own, made
of `--seed`, the prompt's number and the sample's. Batches are cut from the list of all pictures, and one with missing
pictures is drawn as a whole, so that in any precision neither the number of processes nor a resumption changes a
picture. Nor does the batch size, up to rounding: sums of another order may tip the choice between codes of almost equal
probability, in float32 hardly ever, in bfloat16 now and then.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from urllib.error import URLError

import torch
from accelerate import PartialState
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoProcessor, HfArgumentParser

from eval._common import check_model_folder, folder_digest, load_model, png_bytes, versions, write_atomically
from eval.clip_score import clip_scores
from eval.prompts import FORMATS, Prompt, read_prompts
from unitok_mllm import UniTokMLLMForConditionalGeneration, UniTokMLLMProcessor
from unitok_mllm.image_processing_unitok import DECODE_ERRORS, load_image
from unitok_mllm.sheet import contact_sheet


ROOT = Path(__file__).parents[1]
SHOWN = 32  # pictures on the sheet
REFERENCE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FID_LAYER = "2048"  # of Inception v3: the last pooling
WAIT = timedelta(days=7)  # for the slowest process
METRICS = {  # each metric's options; it is computed if the first one is given
    "clip_score": ("clip",),
    "vqa_score": ("vqa_score",),
    "fid": ("fid_reference", "fid_size", "inception_weights"),
}
FIND_T2V = "import importlib.util, sys; sys.exit(importlib.util.find_spec('t2v_metrics') is None)"


@dataclass
class Settings:
    """The command line.

    Raises:
        ValueError: a value out of its range, a file or folder that is not there, or a package that a metric needs.
    """

    prompts: str = field(metadata={"help": "prompt file of a benchmark, or a prompt a line"})
    output: str = field(metadata={"help": "folder of pictures, settings and results"})
    model: str = field(default="unitok_mllm/checkpoints/tiny", metadata={"help": "folder of model and processor"})
    format: str = field(default="", metadata={"help": f"{', '.join(FORMATS)}; found from the content if not given"})
    samples: int = field(default=4, metadata={"help": "pictures of each prompt"})
    limit: int | None = field(default=None, metadata={"help": "only the first so many prompts"})
    guidance: float = field(default=5.0, metadata={"help": "guidance scale; 1: none"})
    temperature: float = field(default=1.0, metadata={"help": "temperature"})
    top_k: int = field(default=0, metadata={"help": "draw from the k likeliest codes; 0: from all"})
    top_p: float = field(default=1.0, metadata={"help": "draw from the likeliest codes that make up this probability"})
    seed: int = field(default=0, metadata={"help": "of all pictures"})
    truncate: bool = field(default=False, metadata={"help": "cut prompts that are too long for the model"})
    batch_size: int = field(default=16, metadata={"help": "pictures at a time, in each process"})
    device: str = field(default="", metadata={"help": "cpu, cuda, ...; an accelerator for each process if there are"})
    clip: str = field(default="", metadata={"help": "CLIP score by this model: a folder, or a name on the hub"})
    fid_reference: str = field(default="", metadata={"help": "FID to the pictures in this folder and those below it"})
    fid_size: int = field(default=0, metadata={"help": "scale and crop all pictures to this side for FID; 0: don't"})
    inception_weights: str = field(default="", metadata={"help": "torch-fidelity's Inception weights; '': download"})
    vqa_score: str = field(default="", metadata={"help": "VQAScore by this model, such as clip-flant5-xxl"})
    vqa_python: str = field(default=sys.executable, metadata={"help": "the Python where t2v-metrics is installed"})

    def __post_init__(self):
        check_model_folder(self.model)
        for name in ("samples", "limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.guidance < 1 or self.temperature <= 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or self.seed < 0:
            raise ValueError(
                "guidance must be at least 1, temperature above 0, top_k and seed at least 0, top_p in (0, 1]"
            )
        if self.format and self.format not in FORMATS:
            raise ValueError(f"format is one of {', '.join(FORMATS)}, got {self.format}")
        if self.fid_reference:
            if not importlib.util.find_spec("torch_fidelity"):
                raise ValueError("--fid_reference needs torch-fidelity: pip install torch-fidelity")
            reference_pictures(self.fid_reference)
            if self.inception_weights:
                check_weights(self.inception_weights)
        if self.vqa_score and (
            not shutil.which(self.vqa_python)
            or subprocess.run([self.vqa_python, "-c", FIND_T2V], check=False).returncode
        ):
            raise ValueError(
                f"--vqa_score needs t2v-metrics, which {self.vqa_python} has not: pip install t2v-metrics in an "
                "environment of its own (it pins torch and transformers) and name that one's Python as --vqa_python"
            )


@dataclass(frozen=True)
class Picture:
    """One sample of a prompt: where it goes, the text it is drawn from, and its seed."""

    path: Path
    prompt: Prompt
    text: str
    seed: int


def fit_text(text: str, length: Callable[[str], int], room: int) -> str:
    """The text, or where its length is above `room`, a beginning of it that fits."""
    if length(text) <= room:
        return text
    end = bisect_right(range(len(text)), room, key=lambda n: length(text[:n])) - 1
    return text[: max(end, 0)].rstrip()


def fit_prompts(
    prompts: list[Prompt], processor: UniTokMLLMProcessor, max_positions: int, num_image_positions: int, truncate: bool
) -> list[str]:
    """The prompts' texts, which with an image's positions after them fit into the model's context.

    Raises:
        ValueError: one that does not, if they are not to be truncated, or with no room for any text; names it.
    """
    room = max_positions - num_image_positions

    def length(text: str) -> int:
        return len(processor.tokenizer(processor.image_prompt(text))["input_ids"])

    texts = [fit_text(prompt.text, length, room) if truncate else prompt.text for prompt in prompts]
    for prompt, text in zip(prompts, texts):
        if not text or length(text) > room:
            raise ValueError(
                f"prompt {prompt.name} is too long: its {length(prompt.text)} tokens and the {num_image_positions} of an "
                f"image do not fit into {max_positions} positions (--truncate cuts prompts): {prompt.text[:80]!r}"
            )
    return texts


def picture_seed(seed: int, prompt: int, sample: int) -> int:
    """Another one for each triple of numbers below 2^32."""
    return (seed << 64) + (prompt << 32) + sample


def is_whole(path: Path) -> bool:
    """Whether there is an image file that has all its parts."""
    try:
        with Image.open(path) as image:
            image.verify()
    except DECODE_ERRORS:
        return False
    return True


def draw(
    model: UniTokMLLMForConditionalGeneration, processor: UniTokMLLMProcessor, pictures: list[Picture], **options
) -> list[Image.Image]:
    """Draws a batch; its codes are decoded one by one, since in a batch a pixel may round to another grey level.

    Args:
        options: of `generate_image_codes`: `guidance_scale`, `temperature`, `top_k`, `top_p`.
    """
    inputs = processor(text=[p.text for p in pictures], generation_mode="image").to(model.device)
    codes = model.generate(**inputs, generation_mode="image", seed=[p.seed for p in pictures], **options)
    pixels = torch.cat([model.decode_images(row) for row in codes.split(1)])
    return processor.post_process_multimodal_output(pixels, generation_mode="image")


def reference_pictures(folder: str) -> list[Path]:
    """The pictures in a folder and those below it, sorted.

    Raises:
        ValueError: no folder, or fewer than two.
    """
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in REFERENCE_SUFFIXES)
    if len(paths) < 2:
        raise ValueError(f"FID needs at least 2 pictures ({', '.join(REFERENCE_SUFFIXES)}) in {folder}: {len(paths)}")
    return paths


def check_weights(path: str) -> None:
    """
    Raises:
        ValueError: no file of plain tensors (torch-fidelity would unpickle anything).
    """
    try:
        torch.load(path, weights_only=True)
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"cannot read Inception weights from {path}: {reason}") from error


class PictureFiles(Dataset):
    """Files as (3, H, W) uint8, as torch-fidelity takes them.

    Args:
        size: all are scaled and centre-cropped to this side; 0: they are of one size.
    """

    def __init__(self, paths: list[Path], size: int = 0):
        self.paths, self.size = paths, (size, size) if size else None
        self.first_size = load_image(paths[0]).size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = load_image(self.paths[index])
        if self.size:
            image = ImageOps.fit(image, self.size, Image.Resampling.BICUBIC)
        elif image.size != self.first_size:
            raise ValueError(
                f"{self.paths[index]} is {image.size}, {self.paths[0]} {self.first_size}: --fid_size makes them equal"
            )
        return pil_to_tensor(image)


def fid(
    pictures: list[Path],
    reference: list[Path],
    weights: str = "",
    size: int = 0,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
) -> float:
    """Fréchet inception distance (https://arxiv.org/abs/1706.08500) of two sets of pictures, by torch-fidelity.

    Args:
        weights: file of torch-fidelity's Inception v3; "" to download it.

    Raises:
        ValueError: a picture that is broken, or of another size (it is named), or no way to download the weights.
    """
    import torch_fidelity

    try:
        metrics = torch_fidelity.calculate_metrics(
            input1=PictureFiles(pictures, size),
            input2=PictureFiles(reference, size),
            fid=True,
            feature_layer_fid=FID_LAYER,
            feature_extractor_weights_path=weights or None,
            batch_size=batch_size,
            cuda=torch.device(device).type == "cuda",
        )
    except URLError as error:
        raise ValueError(f"cannot download Inception weights ({error}): name a file as --inception_weights") from error
    return metrics[torch_fidelity.KEY_METRIC_FID]


def vqa_scores(
    pictures: list[Path], texts: list[str], model: str, python: str, batch_size: int = 16, device: str = "cpu"
) -> list[float]:
    """VQAScore of each pair, in [0, 1], by `eval.vqa_score` under another Python.

    Raises:
        CalledProcessError: it failed; it has said why.
    """
    with tempfile.TemporaryDirectory() as folder:
        pairs, scores = Path(folder) / "pairs.json", Path(folder) / "scores.json"
        pairs.write_text(
            json.dumps([[str(path.absolute()), text] for path, text in zip(pictures, texts)]), encoding="utf-8"
        )
        command = [python, "-m", "eval.vqa_score", str(pairs), str(scores), "--model", model, "--device", device]
        subprocess.run([*command, "--batch_size", str(batch_size)], check=True, cwd=ROOT)
        return json.loads(scores.read_text(encoding="utf-8"))


def summarize(pictures: list[Picture], scores: list[float]) -> dict:
    """Means over all pictures, over the prompts of each group, and of each prompt."""
    by_prompt, by_group = defaultdict(list), defaultdict(list)
    for picture, score in zip(pictures, scores, strict=True):
        by_prompt[picture.prompt.name].append(score)
        for group in picture.prompt.groups:
            by_group[group].append(score)

    def means(lists: dict[str, list[float]]) -> dict[str, float]:
        return {name: sum(values) / len(values) for name, values in lists.items()}

    return {"mean": sum(scores) / len(scores), "by_group": means(by_group), "by_prompt": means(by_prompt)}


class Evaluation:
    """A list of pictures to draw and to measure; everything is checked before the work begins.

    Raises:
        ValueError: see `read_prompts` and `fit_prompts`; two pictures of one name; a folder that holds other pictures.
    """

    def __init__(self, settings: Settings):
        self.settings, self.folder = settings, Path(settings.output)
        self.state = PartialState(cpu=settings.device == "cpu", timeout=WAIT)
        self.device = settings.device or str(self.state.device)
        self.format, prompts = read_prompts(settings.prompts, settings.format)
        self.prompts = prompts[: settings.limit]
        self.processor = AutoProcessor.from_pretrained(settings.model)
        config = AutoConfig.from_pretrained(settings.model)
        texts = fit_prompts(
            self.prompts,
            self.processor,
            config.text_config.max_position_embeddings,
            config.num_image_positions,
            settings.truncate,
        )
        self.pictures = [
            Picture(
                self.folder / "images" / prompt.picture(sample),
                prompt,
                text,
                picture_seed(settings.seed, index, sample),
            )
            for index, (prompt, text) in enumerate(zip(self.prompts, texts))
            for sample in range(settings.samples)
        ]
        names = set()
        for picture in self.pictures:
            if picture.path in names:
                raise ValueError(f"{settings.prompts} has two pictures called {picture.path}")
            names.add(picture.path)
        self.drawn_with = {
            "format": self.format,
            "prompts_sha256": hashlib.sha256(json.dumps([(p.name, p.text) for p in prompts]).encode()).hexdigest(),
            "model_sha256": folder_digest(settings.model),
            **{
                name: getattr(settings, name)
                for name in ("guidance", "temperature", "top_k", "top_p", "seed", "truncate")
            },
        }
        self._check_folder()
        results = self.folder / "results.json"
        self.earlier = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}

    def _check_folder(self) -> None:
        """Refuses a folder of other pictures."""
        path = self.folder / "settings.json"
        if path.is_file():
            there = json.loads(path.read_text(encoding="utf-8"))
            changed = [
                f"{name} was {there.get(name)}, now {value}"
                for name, value in self.drawn_with.items()
                if there.get(name) != value
            ]
            if changed:
                raise ValueError(
                    f"{self.folder} holds pictures of other settings ({'; '.join(changed)}): give another --output"
                )
        elif (self.folder / "images").is_dir():
            raise ValueError(f"{self.folder} has images/ but no settings.json: give another --output")

    def draw(self) -> dict:
        """Draws what is missing, in all processes; returns what the JSON says of it."""
        state, size = self.state, self.settings.batch_size
        missing = {picture.path for picture in self.pictures if not is_whole(picture.path)}
        batches = [self.pictures[i : i + size] for i in range(0, len(self.pictures), size)]
        batches = [batch for batch in batches if any(picture.path in missing for picture in batch)]
        state.wait_for_everyone()  # all have seen the same
        if state.is_main_process:
            write_atomically(self.folder / "settings.json", json.dumps(self.drawn_with, indent=2).encode())
            for prompt in self.prompts:
                if prompt.metadata is not None:
                    path = self.folder / "images" / prompt.name / "metadata.jsonl"
                    write_atomically(path, json.dumps(prompt.metadata).encode())
        if not batches:
            return self.earlier.get("drawing", {"drawn": 0, "seconds": 0.0})
        start, own = time.perf_counter(), batches[state.process_index :: state.num_processes]
        model, _ = load_model(self.settings.model, self.device)
        options = {name: getattr(self.settings, name) for name in ("temperature", "top_k", "top_p")}
        title = f"drawing, 1 of {state.num_processes} processes" if state.num_processes > 1 else "drawing"
        total = sum(picture.path in missing for batch in own for picture in batch)
        with tqdm(total=total, desc=title, unit="picture", disable=not state.is_main_process) as bar:
            for batch in own:
                images = draw(model, self.processor, batch, guidance_scale=self.settings.guidance, **options)
                for picture, image in zip(batch, images):
                    if picture.path in missing:
                        write_atomically(picture.path, png_bytes(image))
                        bar.update()
        state.wait_for_everyone()
        return {
            "drawn": len(missing),
            "seconds": round(time.perf_counter() - start, 1),
            "processes": state.num_processes,
            "device": str(model.device),
            "dtype": str(model.dtype),
        }

    def clip_score(self) -> dict:
        """Means of `eval.clip_score`."""
        return summarize(self.pictures, clip_scores(*self._pairs(), self.settings.clip, **self._options()))

    def vqa_score(self) -> dict:
        """Means of VQAScore."""
        model, python = self.settings.vqa_score, self.settings.vqa_python
        return summarize(self.pictures, vqa_scores(*self._pairs(), model, python, **self._options()))

    def fid(self) -> dict:
        """FID to the reference folder."""
        reference = reference_pictures(self.settings.fid_reference)
        weights, size = self.settings.inception_weights, self.settings.fid_size
        value = fid(self._pairs()[0], reference, weights, size, **self._options())
        version = importlib.metadata.version("torch-fidelity")
        return {"mean": value, "reference_pictures": len(reference), "torch_fidelity": version}

    def _pairs(self) -> tuple[list[Path], list[str]]:
        """All pictures, and what each was meant to show, whole where the model was given a part."""
        return [picture.path for picture in self.pictures], [picture.prompt.text for picture in self.pictures]

    def _options(self) -> dict:
        return {"batch_size": self.settings.batch_size, "device": self.device}

    def report(self, drawing: dict) -> dict:
        """Measures what is not known yet, and writes `sheet.png` and, after each metric, `results.json`."""
        counts = {"prompts": len(self.prompts), "samples": self.settings.samples}
        wanted = {
            name: {**counts, **{option: getattr(self.settings, option) for option in options}}
            for name, options in METRICS.items()
            if getattr(self.settings, options[0])
        }
        known = {
            name: part
            for name, part in self.earlier.get("metrics", {}).items()
            if counts.items() <= part["settings"].items() and part["settings"] == wanted.get(name, part["settings"])
        }
        report = {
            "benchmark": self.format,
            "settings": asdict(self.settings),
            "drawn_with": self.drawn_with,
            "versions": versions(),
            "prompt": self.processor.image_prompt("{prompt}"),
            "seed": self.settings.seed,
            **counts,
            "pictures": len(self.pictures),
            "truncated": sum(p.text != p.prompt.text for p in self.pictures[:: self.settings.samples]),
            "drawing": drawing,
            "metrics": known,
        }
        shown = self.pictures[:SHOWN]
        sheet = contact_sheet([load_image(p.path) for p in shown], [p.text for p in shown])
        write_atomically(self.folder / "sheet.png", png_bytes(sheet))
        self._write(report)
        for name in [name for name in wanted if name not in known]:
            start = time.perf_counter()
            values = getattr(self, name)()
            seconds = round(time.perf_counter() - start, 1)
            report["metrics"][name] = {"settings": wanted[name], "seconds": seconds, **values}
            self._write(report)
        return report

    def _write(self, report: dict) -> None:
        write_atomically(self.folder / "results.json", json.dumps(report, indent=2).encode())


def table(report: dict) -> str:
    """The report in a few lines, for people."""
    drawing = report["drawing"]
    lines = [
        f"{report['benchmark']}: {report['pictures']} pictures of {report['prompts']} prompts, "
        f"{drawing['drawn']} drawn in {drawing['seconds']} s"
    ]
    titles = {"clip_score": "CLIP score", "vqa_score": "VQAScore", "fid": "FID"}
    for name, part in report["metrics"].items():
        lines.append(f"  {titles[name]:32}{part['mean']:10.4f}   ({part['seconds']} s)")
        lines += [f"    {group:30}{value:10.4f}" for group, value in part.get("by_group", {}).items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    try:
        (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses(args=argv)
        evaluation = Evaluation(settings)
    except ValueError as error:
        sys.exit(f"error: {error}")
    try:
        drawing = evaluation.draw()
        is_main_process = evaluation.state.is_main_process
        evaluation.state.destroy_process_group()  # the others need not wait for the metrics
        if is_main_process:
            print(table(evaluation.report(drawing)))
    except KeyboardInterrupt:
        sys.exit(f"Interrupted. Finished pictures are in {settings.output}; the same command goes on from there.")


if __name__ == "__main__":
    main()
