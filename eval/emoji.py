"""Measure a model on emoji: reconstruction, naming, drawing by name, and restyling.

    python -m eval.emoji --model unitok_mllm/checkpoints/tiny --guidance 1 --top_k 1 --data runs/data/emoji

Held-out pictures were never trained on, but others of the same name and of the same style were. With `--split validation`,
they are those of the validation part of the train split, for models that were trained on the `fit_*` files.

Drawings are compared with the pictures of the data set, by the mean squared error at 32x32, after averaging the colour over
each cell. The picture asked for must be the nearest

- `top1`: of all names in its style (`top5`: among the five nearest)
- `style`: of all styles of its name
- `pair`: of all names in all styles

`chance` has what picking one of these at random gives. The same figures for reconstructions are the limit that the
tokenizer sets. `restyling` asks for "draw it in twitter style" of a picture in another style that was trained on, greedily
and without guidance; `copied` counts results that are nearer to this picture than to those of its name in other styles.
A picture next to the JSON shows drawings.

Each finished part is written to the JSON, and the same command resumes from there (`--no_resume` measures everything
again).
"""

import hashlib
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

from eval._common import DrawingSettings, in_batches, load_model, parse_settings, read_result, versions
from eval.easy_vqa import answer_questions, draw, normalize_answer
from eval.images import stamp
from eval.protocol import number
from training.emoji import QUESTION, RESTYLE, TABLE, Emoji, read_table
from training.errors import one_line_errors
from training.files import folder_digest, write_atomically
from training.losses import psnr
from unitok_mllm import UniTokMLLMProcessor
from unitok_mllm.devices import AUTO, DEVICE_HELP, find_device
from unitok_mllm.inference import check_model, edit_codes, picture_bytes
from unitok_mllm.outputs import check_output_file
from unitok_mllm.sheet import contact_sheet


SHOWN = (
    *("rose", "sunflower", "cactus", "banana", "red apple", "strawberry", "watermelon", "slice of pizza"),
    *("hamburger", "birthday cake", "dog face", "cat face", "frog face", "penguin", "octopus", "butterfly"),
    *("face with tears of joy", "smiling face with sunglasses", "pile of poo", "ghost", "heavy black heart"),
    *("jack-o-lantern", "soccer ball", "trophy"),
)
SPLITS = ("test", "validation")
PARTS = ("reconstruction", "naming", "drawing", "restyling")
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
NOT_DECISIVE = ("output", "batch_size", "device", "resume")  # settings that do not affect the numbers


@dataclass
class Settings(DrawingSettings):
    """Command-line options.

    Raises:
        ValueError: a value is out of its range, or a folder does not exist.
    """

    model: str = field(default="unitok_mllm/checkpoints/tiny", metadata={"help": "folder of model and processor"})
    data: str = field(default="runs/data/emoji", metadata={"help": "folder written by training.prepare_data"})
    output: str = field(default="runs/emoji.json", metadata={"help": "JSON file for the results"})
    batch_size: int = field(default=64, metadata={"help": "pictures per batch"})
    seen: int = field(default=400, metadata={"help": "number of training pictures to measure, evenly spread"})
    split: str = field(
        default="test", metadata={"help": "held-out pictures: test, or validation for a model trained on fit_*"}
    )
    seed: int = field(default=0, metadata={"help": "seed of the first drawing; the next ones count up"})
    resume: bool = field(default=True, metadata={"help": "keep parts of the output that have the same settings"})
    device: str = field(default=AUTO, metadata={"help": DEVICE_HELP})

    def __post_init__(self):
        find_device(self.device)
        check_model(self.model)
        check_output_file(self.output)
        if not (Path(self.data) / TABLE).is_file():
            raise ValueError(f"{self.data} has no emoji: python -m training.prepare_data emoji {self.data}")
        if self.split not in SPLITS:
            raise ValueError(f"split must be {' or '.join(SPLITS)}, got {self.split!r}")
        for name, least in (("batch_size", 1), ("seen", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        self.complete(self.model)


def distances(pictures: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
    """Compute the distances (N, M) of pictures (N, 3, H, W) from those of a gallery (M, 3, H, W), at 32x32 cells."""
    return torch.cdist(*[F.adaptive_avg_pool2d(images.float(), 32).flatten(1) for images in (pictures, gallery)])


def retrieval(found: torch.Tensor, truths: torch.Tensor, rivals: torch.Tensor | bool = True) -> dict[str, float]:
    """Compute how often the picture asked for is the nearest in a gallery, or among the five nearest.

    Args:
        found: distances of pictures from a gallery, (N, M).
        truths: index in the gallery of the picture asked for, (N,).
        rivals: which pictures of the gallery it is compared with, (N, M), bool; True for all.

    Returns:
        The shares, in [0, 1].
    """
    rank = ((found < found.gather(1, truths[:, None])) & rivals).sum(dim=1)
    return {f"top{most}": (rank < most).float().mean().item() for most in (1, 5)}


class Evaluation:
    """Evaluation of a loaded model on the emoji, with one method for each part."""

    def __init__(self, settings: Settings, emoji: list[Emoji]):
        self.settings, self.emoji = settings, emoji
        self.model, self.processor = load_model(settings.model, settings.device)
        self.styles = list(dict.fromkeys(e.style for e in emoji))
        is_test = settings.split == "test"
        trained_on = [i for i, e in enumerate(emoji) if not e.held_out and not e.validation]
        held_out = [i for i, e in enumerate(emoji) if (e.held_out if is_test else e.validation)]
        step = max(1, len(trained_on) // settings.seen)
        self.sets = {
            "seen": trained_on[::step][: settings.seen],
            "held_out" if is_test else "validation": held_out,
        }
        files = [f"{settings.data}/{e.image}" for e in self.emoji]
        self.pixels = self.processor.image_processor(files)["pixel_values"]
        self.codes = self._batched(self.model.encode_images, self.pixels, "encoding")

    def _batched(self, function, rows: torch.Tensor, title: str) -> torch.Tensor:
        return in_batches(function, rows, self.settings.batch_size, self.model.device, title)

    def _retrieval(self, pictures: torch.Tensor, numbers: list[int]) -> dict:
        """Compute how often the picture asked for is the nearest, see the module's docstring."""
        found = distances(pictures, self.pixels)
        asked = [self.emoji[i] for i in numbers]
        is_style = torch.tensor([[e.style == other.style for other in self.emoji] for e in asked])
        is_name = torch.tensor([[e.name == other.name for other in self.emoji] for e in asked])
        truths = torch.tensor(numbers)
        shares = retrieval(found, truths, is_style)
        shares |= {"style": retrieval(found, truths, is_name)["top1"], "pair": retrieval(found, truths)["top1"]}
        num_styles, num_names = len(self.styles), len(self.emoji) / len(self.styles)
        chance = {"top1": 1 / num_names, "top5": min(1, 5 / num_names), "style": 1 / num_styles}
        return shares | {"chance": chance | {"pair": 1 / len(self.emoji)}}

    def reconstruction(self, numbers: list[int]) -> dict:
        """Measure PSNR (dB), and how often a reconstruction retrieves its original."""
        pixels = self._batched(self.model.decode_images, self.codes[numbers], "decoding").float()
        return {"psnr_db": psnr(pixels, self.pixels[numbers]).mean().item(), **self._retrieval(pixels, numbers)}

    def naming(self, numbers: list[int]) -> dict:
        """Measure the share of exact answers to "what is this?", and list the first mistakes."""
        names = [self.emoji[i].name for i in numbers]
        answers = answer_questions(
            self.model, self.processor, [QUESTION] * len(numbers), self.codes[numbers], self.settings.batch_size
        )
        right = [normalize_answer(a) == normalize_answer(n) for a, n in zip(answers, names)]
        mistakes = [{"name": n, "given": a} for n, a, r in zip(names, answers, right) if not r]
        return {"accuracy": sum(right) / len(right), "first_mistakes": mistakes[:20]}

    def drawing(self, numbers: list[int]) -> dict:
        """Measure how often a drawing is nearest to the requested picture."""
        return self._retrieval(self._draw([self.emoji[i] for i in numbers]), numbers)

    def restyling(self, numbers: list[int]) -> dict:
        """Measure how often "draw it in twitter style" of a picture in another style gives the picture asked for.

        The source is of the next style, in the order of the table, in which the name was trained on. Targets without
        one are left out.
        """
        places = {(e.name, e.style): i for i, e in enumerate(self.emoji)}
        requests, targets, sources = [], [], []
        for i in numbers:
            target = self.emoji[i]
            turn = self.styles.index(target.style)
            others = (places.get((target.name, style)) for style in self.styles[turn + 1 :] + self.styles[:turn])
            trained_on = (
                n for n in others if n is not None and not (self.emoji[n].held_out or self.emoji[n].validation)
            )
            if (source := next(trained_on, None)) is not None:
                ask = RESTYLE.format(style=target.style)
                requests.append((Path(self.settings.data, self.emoji[source].image), ask))
                targets.append(i)
                sources.append(source)
        if not targets:
            raise ValueError(f"{self.settings.data} has no name that was trained on in another style")
        size, options = self.settings.batch_size, {"do_sample": False, "guidance_scale": 1.0}
        codes = [
            edit_codes(self.model, self.processor, requests[start : start + size], **options).cpu()
            for start in tqdm(range(0, len(requests), size), desc="restyling")
        ]
        pictures = self._batched(self.model.decode_images, torch.cat(codes), "decoding").float()
        copied = self._retrieval(pictures, sources)["style"]
        return {"asked": len(targets), **self._retrieval(pictures, targets), "copied": copied}

    def _draw(self, emoji: list[Emoji]) -> torch.Tensor:
        settings = self.settings
        codes = draw(
            self.model,
            self.processor,
            [e.caption for e in emoji],
            seeds=[settings.seed + n for n in range(len(emoji))],
            batch_size=settings.batch_size,
            **settings.drawing,
        )
        return self._batched(self.model.decode_images, codes, "decoding").float()

    def sheet(self, path: Path) -> None:
        """Write a sheet of drawings of well-known emoji, in all styles."""
        by_name = {(e.name, e.style): e for e in self.emoji}
        shown = [by_name[name, style] for style in self.styles for name in SHOWN if (name, style) in by_name]
        pictures = self.processor.image_processor.post_process(self._draw(shown))
        captions = [e.caption.replace(" emoji", "") for e in shown]
        write_atomically(path, picture_bytes(contact_sheet(pictures, captions, columns=8)))


def protocol_number(
    benchmark: str, part: str, name: str, count: int, values: dict, settings: Settings, processor: UniTokMLLMProcessor
) -> dict:
    """Return a part's main number with its protocol (`eval.protocol`)."""
    size = processor.image_processor.size
    sampling = {"drawing": settings.sampling, "naming": "greedy", "restyling": "greedy"}.get(part)
    metric, value, unit, prompt, reference, tool = {
        "reconstruction": ("PSNR", values.get("psnr_db"), "dB", None, "the same pictures", "mean over pictures"),
        "naming": ("named exactly", 100 * values.get("accuracy", 0), "%", QUESTION, "names", "exact match"),
        "restyling": (
            "restyled",
            100 * values.get("pair", 0),
            "%",
            RESTYLE,
            "all pictures of all styles",
            "nearest in pixels at 32x32",
        ),
        "drawing": (
            "drawings right",
            100 * values.get("top1", 0),
            "%",
            processor.image_prompt("{name} in {style}").removesuffix(processor.boi_token),
            "all pictures of the style",
            "nearest in pixels at 32x32",
        ),
    }[part]
    images = f"{processor.image_processor.mode}, {size['width']}x{size['height']}"
    return number(
        benchmark,
        metric,
        value,
        unit,
        split=f"{name}, {count} pictures",
        prompt=prompt,
        sampling=sampling,
        images=images,
        reference=reference,
        tool=tool,
    )


def read_finished(output: str, wanted: dict) -> dict[str, dict]:
    """Read the finished parts of an earlier output. Parts with other settings are dropped, with a line on stderr."""
    report = read_result(output, "settings", "versions", "parts")
    if not report:
        return {}
    then, now = report["settings"] | {"versions": report["versions"]}, wanted | {"versions": versions()}
    changed = [name for name in now if name not in NOT_DECISIVE and then.get(name) != now[name]]
    if changed:
        print(f"{output} was measured with another {', '.join(changed)}: it is measured anew", file=sys.stderr)
        return {}
    return report["parts"]


def evaluate(settings: Settings) -> dict:
    """Measure the missing parts; the JSON is written after each part."""
    emoji = read_table(settings.data)
    flag = "held_out" if settings.split == "test" else "validation"
    if len({getattr(e, flag) for e in emoji}) < 2:
        kind = "held out" if settings.split == "test" else "for validation"
        raise ValueError(f"{settings.data} needs emoji that are {kind} and others, it has {len(emoji)} of one kind")
    pictures = [f"{e.image} {stamp(Path(settings.data) / e.image)}" for e in emoji]
    digests = {
        "model_sha256": folder_digest(settings.model),
        "data_sha256": hashlib.sha256("\n".join(pictures).encode()).hexdigest(),
    }
    wanted = asdict(settings) | digests
    earlier = read_finished(settings.output, wanted) if settings.resume else {}
    evaluation = Evaluation(settings, emoji)
    benchmark = f"emoji of {NUMBERS.get(len(evaluation.styles), len(evaluation.styles))} styles"
    report = {
        "benchmark": benchmark,
        "settings": wanted,
        "versions": versions(),
        "numbers": [],
        "parts": {},
    }
    for name, rows in evaluation.sets.items():
        for part in PARTS:
            values = earlier.get(part, {}).get(name)
            if values is None:
                start = time.perf_counter()
                values = getattr(evaluation, part)(rows)
                seconds = round(time.perf_counter() - start, 1)
                values = {"pictures": len(rows), "seconds": seconds, **values}
            report["parts"].setdefault(part, {})[name] = values
            report["numbers"].append(
                protocol_number(benchmark, part, name, len(rows), values, settings, evaluation.processor)
            )
            write_atomically(settings.output, json.dumps(report, indent=2).encode())
    evaluation.sheet(Path(settings.output).with_suffix(".png"))
    return report


def table(report: dict) -> str:
    """Format the report as a few readable lines."""
    sets = list(report["parts"]["drawing"])
    lines = [f"{'':44}" + "".join(f"{name.replace('_', ' '):>12}" for name in (*sets, "chance"))]
    rows = (
        ("reconstruction", "psnr_db", "reconstruction, PSNR, dB", "{:.2f}"),
        ("reconstruction", "top1", "original nearest to reconstruction", "{:.1%}"),
        ("naming", "accuracy", "named exactly", "{:.1%}"),
        ("drawing", "top1", "drawing nearest to what was asked for", "{:.1%}"),
        ("drawing", "top5", "... among the five nearest", "{:.1%}"),
        ("drawing", "style", "... nearest of all styles of its name", "{:.1%}"),
        ("drawing", "pair", "... nearest of all names in all styles", "{:.1%}"),
        ("restyling", "style", "restyled: nearest of all styles of its name", "{:.1%}"),
        ("restyling", "pair", "... nearest of all names in all styles", "{:.1%}"),
        ("restyling", "copied", "... still nearest to the given style", "{:.1%}"),
    )
    for part, key, title, form in rows:
        of_sets = [report["parts"][part][name] for name in sets]
        cells = [form.format(values[key]) for values in of_sets]
        chance = of_sets[0].get("chance", {}).get(key)
        lines.append(f"{title:44}" + "".join(f"{cell:>12}" for cell in (*cells, f"{chance:.2%}" if chance else "")))
    return "\n".join(lines)


@one_line_errors("Interrupted. Finished parts are kept; the same command goes on from there.")
def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(Settings, argv, __doc__)
    print(table(evaluate(settings)))


if __name__ == "__main__":
    main()
