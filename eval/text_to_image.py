"""Draw the prompts of a text-to-image benchmark, and measure the pictures.

    python -m eval.text_to_image --model MODEL --prompts genai_image.json --output runs/genai --samples 4 --guidance 5
    torchrun --nproc_per_node 8 -m eval.text_to_image --model MODEL --prompts evaluation_metadata.jsonl ...
    ... --ray_workers 16          # on a Ray cluster (extra `ray`), see docs/serving.md
    ... --clip openai/clip-vit-large-patch14 --vqa_score clip-flant5-xxl --vqa_python ~/t2v/bin/python
    ... --prompts meta_data.json --samples 1 --fid_reference mjhq30k_imgs --fid_tool clean-fid --fid_size 256

The prompts are a file of GenAI-Bench, GenEval, MJHQ-30K or PartiPrompts, or a text file with one prompt per line; see
`eval.prompts`. The output folder gets `images/`, laid out as the benchmark's own evaluation expects it (GenEval:
`python evaluation/evaluate_images.py OUTPUT/images`), `settings.json`, `results.json`, and the first pictures in
`sheet.png`.

The same command resumes an interrupted run and keeps finished metrics. A later command may have more `--samples`, a
higher `--limit` and other metrics; any other change of settings is refused.

Each picture has a seed of its own, computed from `--seed`, the prompt's number and the sample's. Batches are fixed
parts of the list of all pictures, and a batch with a missing picture is drawn as a whole: neither the number of
processes nor a resumption changes a picture, in any precision. The batch size changes one only through rounding, which
may decide between codes of almost equal probability: hardly ever in float32, now and then in bfloat16.
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

from accelerate import PartialState
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig, AutoProcessor

from eval._common import DRAWING, DrawingSettings, load_model, parse_settings, read_result, versions
from eval.clip_score import clip_scores, load_clip
from eval.fid import TOOLS, PictureFiles, fid, load_inception, reference_pictures
from eval.images import stamp
from eval.prompts import FORMATS, Prompt, read_prompts
from eval.protocol import number
from training.errors import one_line_errors
from training.files import folder_digest, write_atomically
from training.ray_jobs import run_jobs
from unitok_mllm import UniTokMLLMForConditionalGeneration, UniTokMLLMProcessor
from unitok_mllm.configuration_unitok import check_ranges
from unitok_mllm.devices import AUTO, DEVICE_HELP, find_device
from unitok_mllm.image_processing_unitok import DECODE_ERRORS, load_image
from unitok_mllm.inference import check_model, draw_codes, picture_bytes, pictures_of
from unitok_mllm.outputs import check_output_folder
from unitok_mllm.sheet import contact_sheet


ROOT = Path(__file__).parents[1]
SHOWN = 32  # pictures on the sheet
IMAGE_FORMATS = {"png": "png", "jpg": "jpeg"}  # suffix: Pillow's name of the format
BENCHMARKS = {"genai": "GenAI-Bench", "geneval": "GenEval", "mjhq": "MJHQ-30K", "parti": "PartiPrompts"}
WAIT = timedelta(days=7)  # timeout for the slowest process
METRICS = {  # each metric's options; it is computed if the first one is given
    "clip_score": ("clip",),
    "vqa_score": ("vqa_score",),
    "fid": ("fid_reference", "fid_tool", "fid_size", "inception_weights"),
}
FIND_T2V = "import importlib.util, sys; sys.exit(importlib.util.find_spec('t2v_metrics') is None)"


@dataclass(kw_only=True)
class Settings(DrawingSettings):
    """Command-line options.

    Raises:
        ValueError: a value is out of its range, or a file, a folder or a metric's package is missing.
    """

    prompts: str = field(metadata={"help": "prompt file of a benchmark, or a text file with a prompt on each line"})
    output: str = field(metadata={"help": "folder for pictures, settings and results"})
    model: str = field(default="unitok_mllm/checkpoints/tiny", metadata={"help": "folder of model and processor"})
    format: str = field(
        default="", metadata={"help": f"format of the prompts: {', '.join(FORMATS)}; default: detected"}
    )
    samples: int = field(default=4, metadata={"help": "pictures per prompt"})
    limit: int | None = field(default=None, metadata={"help": "number of prompts, the first ones; default: all"})
    seed: int = field(default=0, metadata={"help": "seed of all pictures"})
    image_format: str = field(
        default="png", metadata={"help": "format of the pictures' files: png, or jpg (quality 75)"}
    )
    truncate: bool = field(default=False, metadata={"help": "truncate prompts that are too long for the model"})
    batch_size: int = field(default=16, metadata={"help": "pictures per batch in each process"})
    ray_workers: int = field(default=0, metadata={"help": "number of Ray workers; 0 to draw in this process"})
    device: str = field(default=AUTO, metadata={"help": DEVICE_HELP})
    clip: str = field(default="", metadata={"help": "compute the CLIP score with this model: a folder or hub name"})
    fid_reference: str = field(
        default="", metadata={"help": "compute FID to the pictures in this folder and below it"}
    )
    fid_tool: str = field(default="torch-fidelity", metadata={"help": f"tool for FID: {' or '.join(TOOLS)}"})
    fid_size: int = field(
        default=0, metadata={"help": "scale and crop pictures to this side before FID; 0 for no scaling"}
    )
    inception_weights: str = field(
        default="", metadata={"help": "file of the FID tool's weights; downloaded if not given"}
    )
    vqa_score: str = field(default="", metadata={"help": "compute VQAScore with this model, such as clip-flant5-xxl"})
    vqa_python: str = field(
        default=sys.executable, metadata={"help": "Python interpreter of an environment with t2v-metrics"}
    )

    def __post_init__(self):
        find_device(self.device)
        check_model(self.model)
        check_output_folder(self.output)
        for name in ("samples", "limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.complete(self.model)
        check_ranges(self, fid_size=(0, 2**14))
        if self.ray_workers < 0:
            raise ValueError(f"ray_workers must be at least 0, got {self.ray_workers}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if self.format and self.format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {self.format}")
        for name, known in (("image_format", IMAGE_FORMATS), ("fid_tool", TOOLS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)}")
        if self.fid_reference:
            if not importlib.util.find_spec(TOOLS[self.fid_tool]):
                raise ValueError(f"--fid_reference needs {self.fid_tool}: pip install {self.fid_tool}")
            reference_pictures(self.fid_reference)
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
    """One sample of a prompt: its path, prompt, text and seed."""

    path: Path
    prompt: Prompt
    text: str
    seed: int


def fit_text(text: str, length: Callable[[str], int], room: int) -> str:
    """Truncate a text at its end until its length is at most `room`."""
    if length(text) <= room:
        return text
    end = bisect_right(range(len(text)), room, key=lambda n: length(text[:n])) - 1
    return text[: max(end, 0)].rstrip()


def fit_prompts(
    prompts: list[Prompt], processor: UniTokMLLMProcessor, max_positions: int, num_image_positions: int, truncate: bool
) -> list[str]:
    """Return the texts of prompts, such that each fits into the model's context together with an image.

    Raises:
        ValueError: a prompt is too long and may not be truncated, or there is no room for any text. The message names
            the prompt.
    """
    room = max_positions - num_image_positions

    def length(text: str) -> int:
        return processor(text=text, generation_mode="image")["input_ids"].shape[1]

    texts = [fit_text(prompt.text, length, room) if truncate else prompt.text for prompt in prompts]
    for prompt, text in zip(prompts, texts):
        if not text or length(text) > room:
            raise ValueError(
                f"prompt {prompt.name} is too long: its {length(prompt.text)} tokens and the {num_image_positions} of an "
                f"image do not fit into {max_positions} positions (--truncate cuts prompts): {prompt.text[:80]!r}"
            )
    return texts


def picture_seed(seed: int, prompt: int, sample: int) -> int:
    """Derive a different seed for each triple of numbers below 2^32."""
    return (seed << 64) + (prompt << 32) + sample


def is_whole(path: Path) -> bool:
    """Return whether a path is a complete image file."""
    try:
        with Image.open(path) as image:
            image.verify()
    except DECODE_ERRORS:
        return False
    return True


def draw(
    model: UniTokMLLMForConditionalGeneration,
    processor: UniTokMLLMProcessor,
    texts: list[str],
    seeds: list[int],
    **options,
) -> list[Image.Image]:
    """Draw a batch of pictures. Images are decoded one by one, since batching may change the rounding of a pixel.

    Args:
        model: the MLLM.
        processor: its processor.
        texts: text of each picture.
        seeds: seed of each picture.
        options: options of `generate_image_codes`: `guidance_scale`, `plausibility`, `temperature`, `top_k`, `top_p`.
    """
    codes = draw_codes(model, processor, texts, seed=seeds, **options)
    return [picture for row in codes.split(1) for picture in pictures_of(model, processor, row)]


class Drawer:
    """Draw batches of pictures, and write the missing ones.

    Args:
        model: folder of the MLLM.
        device: see `find_device`.
        image_format: suffix of the files, one of IMAGE_FORMATS.
        options: options of `draw`.
    """

    def __init__(self, model: str, device: str, image_format: str, options: dict):
        self.model, self.processor = load_model(model, device)
        self.image_format, self.options = image_format, options

    def __call__(self, batch: list[tuple[str, str, int]]) -> dict:
        """Draw the whole batch if any picture of it is missing.

        Args:
            batch: path, text and seed of each picture.

        Returns:
            The number of missing pictures that were `drawn`, and the `device` and `dtype` of the model.
        """
        missing = {path for path, *_ in batch if not is_whole(Path(path))}
        if missing:
            _, texts, seeds = map(list, zip(*batch))
            images = draw(self.model, self.processor, texts, seeds, **self.options)
            for (path, *_), image in zip(batch, images):
                if path in missing:
                    write_atomically(path, picture_bytes(image, IMAGE_FORMATS[self.image_format]))
        return {"drawn": len(missing), "device": str(self.model.device), "dtype": str(self.model.dtype)}


def vqa_scores(
    pictures: list[Path], texts: list[str], model: str, python: str, batch_size: int = 16, device: str = "cpu"
) -> list[float]:
    """Compute VQAScore of each pair, in [0, 1], by `eval.vqa_score` in another Python environment.

    Raises:
        CalledProcessError: the script failed; the reason is on stderr.
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
    """Compute means over all pictures, over the prompts of each group, and for each prompt."""
    by_prompt, by_group = defaultdict(list), defaultdict(list)
    for picture, score in zip(pictures, scores, strict=True):
        by_prompt[picture.prompt.name].append(score)
        for group in picture.prompt.groups:
            by_group[group].append(score)

    def means(lists: dict[str, list[float]]) -> dict[str, float]:
        return {name: sum(values) / len(values) for name, values in lists.items()}

    return {"mean": sum(scores) / len(scores), "by_group": means(by_group), "by_prompt": means(by_prompt)}


class Evaluation:
    """Pictures to draw and measure. Everything is checked before the work begins.

    Raises:
        ValueError: two pictures have the same name, or the folder has other pictures; see also `read_prompts` and
            `fit_prompts`.
    """

    def __init__(self, settings: Settings):
        self.settings, self.folder = settings, Path(settings.output)
        self.state = PartialState(cpu=settings.device == "cpu", timeout=WAIT)
        if settings.ray_workers and self.state.num_processes > 1:
            raise ValueError("--ray_workers starts its own processes: run it without torchrun")
        self.device = str(find_device(settings.device, self.state.device))
        self.format, prompts = read_prompts(settings.prompts, settings.format)
        self.prompts, self.num_prompts = prompts[: settings.limit], len(prompts)
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
                self.folder / "images" / prompt.picture(sample, settings.image_format),
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
        self.size = self.processor.image_processor.size["width"], self.processor.image_processor.size["height"]
        self.drawn_with = {
            "format": self.format,
            "prompts_sha256": hashlib.sha256(json.dumps([(p.name, p.text) for p in prompts]).encode()).hexdigest(),
            "model_sha256": folder_digest(settings.model),
            **{name: getattr(settings, name) for name in (*DRAWING, "seed", "image_format", "truncate")},
        }
        self._check_folder()
        self.earlier = read_result(self.folder / "results.json", "metrics")
        self.counts = {"prompts": len(self.prompts), "samples": settings.samples}
        self.wanted = {
            name: {**self.counts, **{option: getattr(settings, option) for option in options}}
            for name, options in METRICS.items()
            if getattr(settings, options[0])
        }
        if "fid" in self.wanted:
            self.reference = PictureFiles(reference_pictures(settings.fid_reference), settings.fid_size)
            stamps = "\n".join(f"{path} {stamp(path)}" for path in self.reference.paths)
            self.wanted["fid"]["reference_sha256"] = hashlib.sha256(stamps.encode()).hexdigest()
        self.known = {
            name: part
            for name, part in self.earlier.get("metrics", {}).items()
            if self.counts.items() <= part["settings"].items()
            and part["settings"] == self.wanted.get(name, part["settings"])
        }
        if self.state.is_main_process:
            self._check_networks()

    def _check_folder(self) -> None:
        """Check that the folder does not have pictures of other settings.

        Raises:
            ValueError: it does.
        """
        path = self.folder / "settings.json"
        if path.is_file():
            there = read_result(path)
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

    def _check_networks(self) -> None:
        """Load the networks of the metrics once, so that errors appear before the long drawing."""
        settings, missing = self.settings, []
        for name, load in (
            ("clip_score", lambda: load_clip(settings.clip)),
            ("fid", lambda: load_inception(settings.fid_tool, settings.inception_weights)),
        ):
            try:
                if name in self.wanted and name not in self.known:
                    load()
            except ValueError as error:
                missing.append(" ".join(str(error).split()))
        if missing:
            raise ValueError(" ".join(missing))

    def draw(self) -> dict:
        """Draw the missing pictures, in all processes, and return the entry in the JSON file."""
        state, size = self.state, self.settings.batch_size
        missing = {picture.path for picture in self.pictures if not is_whole(picture.path)}
        batches = [self.pictures[i : i + size] for i in range(0, len(self.pictures), size)]
        batches = [batch for batch in batches if any(picture.path in missing for picture in batch)]
        state.wait_for_everyone()  # until all have read the folder
        if state.is_main_process:
            write_atomically(self.folder / "settings.json", json.dumps(self.drawn_with, indent=2).encode())
            for prompt in self.prompts:
                if prompt.metadata is not None:
                    path = self.folder / "images" / prompt.name / "metadata.jsonl"
                    write_atomically(path, json.dumps(prompt.metadata).encode())
        if not batches:
            return self.earlier.get("drawing", {"drawn": 0, "seconds": 0.0})
        start = time.perf_counter()
        jobs = [[(str(p.path.absolute()), p.text, p.seed) for p in batch] for batch in batches]
        arguments = {
            "model": str(Path(self.settings.model).absolute()),
            "image_format": self.settings.image_format,
            "options": self.settings.drawing,
        }
        num_workers = self.settings.ray_workers
        if num_workers:
            own, title = jobs, f"drawing, {num_workers} workers"
            arguments["device"] = self.settings.device  # found by each worker
            reports = run_jobs("eval.text_to_image:Drawer", arguments, jobs, num_workers)
        else:
            own = jobs[state.process_index :: state.num_processes]
            title = f"drawing, 1 of {state.num_processes} processes" if state.num_processes > 1 else "drawing"
            reports = map(Drawer(device=self.device, **arguments), own)
        total, report = sum(Path(path) in missing for job in own for path, *_ in job), {}
        with tqdm(total=total, desc=title, unit="picture", disable=not state.is_main_process) as bar:
            for report in reports:
                bar.update(report["drawn"])
        state.wait_for_everyone()
        return {
            "drawn": len(missing),
            "seconds": round(time.perf_counter() - start, 1),
            "processes": num_workers or state.num_processes,
            "device": report.get("device", self.device),
            "dtype": report.get("dtype"),
        }

    def clip_score(self) -> dict:
        """Compute means of `eval.clip_score`."""
        return summarize(self.pictures, clip_scores(*self._pairs(), self.settings.clip, **self._options()))

    def vqa_score(self) -> dict:
        """Compute means of VQAScore."""
        model, python = self.settings.vqa_score, self.settings.vqa_python
        return summarize(self.pictures, vqa_scores(*self._pairs(), model, python, **self._options()))

    def fid(self) -> dict:
        """Compute FID to the reference folder."""
        settings, pictures = self.settings, PictureFiles(self._pairs()[0], self.settings.fid_size)
        value = fid(pictures, self.reference, settings.fid_tool, settings.inception_weights, **self._options())
        return {
            "mean": value,
            "reference_pictures": len(self.reference),
            "reference_size": list(self.reference.size),
            "tool_version": importlib.metadata.version(settings.fid_tool),
        }

    def _pairs(self) -> tuple[list[Path], list[str]]:
        """Return all pictures and their full prompts, even if the model was given truncated ones."""
        return [picture.path for picture in self.pictures], [picture.prompt.text for picture in self.pictures]

    def _options(self) -> dict:
        return {"batch_size": self.settings.batch_size, "device": self.device}

    def report(self, drawing: dict) -> dict:
        """Compute the missing metrics; write `sheet.png`, and `results.json` after each metric."""
        report = {
            "benchmark": self.format,
            "settings": asdict(self.settings),
            "drawn_with": self.drawn_with,
            "versions": versions(),
            "prompt": self.processor.image_prompt("{prompt}"),
            "seed": self.settings.seed,
            **self.counts,
            "pictures": len(self.pictures),
            "truncated": sum(p.text != p.prompt.text for p in self.pictures[:: self.settings.samples]),
            "drawing": drawing,
            "metrics": self.known,
        }
        shown = self.pictures[:SHOWN]
        sheet = contact_sheet([load_image(p.path) for p in shown], [p.text for p in shown])
        write_atomically(self.folder / "sheet.png", picture_bytes(sheet))
        self._write(report)
        for name in [name for name in self.wanted if name not in self.known]:
            start = time.perf_counter()
            values = getattr(self, name)()
            seconds = round(time.perf_counter() - start, 1)
            part = {"settings": self.wanted[name], "versions": versions(), "seconds": seconds}
            report["metrics"][name] = {**part, **values}
            self._write(report)
        return report

    def _numbers(self, metrics: dict) -> list[dict]:
        """Return the metrics with their protocols (`eval.protocol`)."""
        settings, numbers = self.settings, []
        count = len(self.prompts)
        shared = {
            "split": f"{count} of {self.num_prompts} prompts, {settings.samples} a prompt",
            "prompt": self.processor.image_prompt("{prompt}").removesuffix(self.processor.boi_token),
            "sampling": settings.sampling,
            "images": f"{settings.image_format} files, {self.size[0]}x{self.size[1]}",
        }
        benchmark = BENCHMARKS.get(self.format, Path(settings.prompts).name)
        for name, part in metrics.items():
            used = part["settings"]
            if name == "fid":
                reference = f"{part['reference_pictures']} pictures of {'x'.join(map(str, part['reference_size']))}"
                numbers.append(
                    number(benchmark, "FID", part["mean"], **shared, reference=reference, tool=used["fid_tool"])
                )
                continue
            title, tool = {
                "clip_score": ("CLIP score", f"CLIP score by {used.get('clip')}"),
                "vqa_score": ("VQAScore", f"VQAScore by {used.get('vqa_score')}"),
            }[name]
            for group, value in {"": part["mean"], **part["by_group"]}.items():
                metric = f"{title}, {group}" if group else title
                numbers.append(number(benchmark, metric, value, **shared, reference="the prompts", tool=tool))
        return numbers

    def _write(self, report: dict) -> None:
        report["numbers"] = self._numbers(report["metrics"])
        write_atomically(self.folder / "results.json", json.dumps(report, indent=2).encode())


def table(report: dict) -> str:
    """Format the report as a few readable lines."""
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


@one_line_errors("Interrupted. Finished pictures and metrics are kept; the same command goes on from there.")
def main(argv: list[str] | None = None) -> None:
    evaluation = Evaluation(parse_settings(Settings, argv, __doc__))
    drawing = evaluation.draw()
    is_main_process = evaluation.state.is_main_process
    evaluation.state.destroy_process_group()  # so that other processes need not wait for the metrics
    if is_main_process:
        print(table(evaluation.report(drawing)))


if __name__ == "__main__":
    main()
