"""Prompt files of text-to-image benchmarks, and the paths where each benchmark expects the pictures.

| format    | file                                                        | picture of a prompt's first sample   |
|-----------|-------------------------------------------------------------|--------------------------------------|
| `genai`   | GenAI-Bench (https://arxiv.org/abs/2406.13743), `genai_image.json` or, of the 527, `prompts.txt` | `00000.png`, by its id |
| `geneval` | GenEval (https://arxiv.org/abs/2310.11513), `evaluation_metadata.jsonl` | `00000/samples/0000.png` |
| `mjhq`    | MJHQ-30K (https://arxiv.org/abs/2402.17245), `meta_data.json` | `category/id.png`                  |
| `parti`   | PartiPrompts (https://arxiv.org/abs/2206.10789), `PartiPrompts.tsv` | `00000.png`, by its row      |
| `text`    | one prompt per line                                         | `00000.png`, by its number           |

A text file next to a `genai_skills.json` is GenAI-Bench's: its lines are numbered from 1, as in that file.
Sample s > 0 of a prompt is `00000_s.png` (GenEval: `00000/samples/000s.png`).
"""

import csv
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path


SKILLS = "genai_skills.json"  # {"counting": [3, 17, ...], ...}, next to GenAI-Bench's prompts


@dataclass(frozen=True)
class Prompt:
    """One prompt of a benchmark.

    Args:
        text: text of the prompt.
        name: path of its pictures in the picture folder, without sample number and suffix.
        groups: groups for which the benchmark reports results: tag, category, challenge, skills.
        metadata: GenEval's line, which its evaluation needs next to the samples; None for other benchmarks.
    """

    text: str
    name: str
    groups: tuple[str, ...] = ()
    metadata: dict | None = None

    def picture(self, sample: int, format: str = "png") -> str:
        """Return the path of a sample in the picture folder."""
        if self.metadata is not None:
            return f"{self.name}/samples/{sample:04d}.{format}"
        return f"{self.name}_{sample}.{format}" if sample else f"{self.name}.{format}"


def _genai(text: str, path: Path) -> list[Prompt]:
    groups, skills = defaultdict(tuple), path.with_name(SKILLS)
    if skills.is_file():
        for skill, numbers in json.loads(skills.read_text(encoding="utf-8")).items():
            for number in numbers:
                groups[f"{int(number):05d}"] += (skill,)
    if text.lstrip().startswith("{"):
        texts = {name: row["prompt"] for name, row in json.loads(text).items()}
    else:
        texts = {f"{i:05d}": line.strip() for i, line in enumerate(text.split("\n"), start=1) if line.strip()}
    return [Prompt(prompt, name, groups[name]) for name, prompt in texts.items()]


def _geneval(text: str, path: Path) -> list[Prompt]:
    rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    return [Prompt(row["prompt"], f"{i:05d}", (row["tag"],), row) for i, row in enumerate(rows)]


def _mjhq(text: str, path: Path) -> list[Prompt]:
    rows = json.loads(text).items()
    return [Prompt(row["prompt"], f"{row['category']}/{name}", (row["category"],)) for name, row in rows]


def _parti(text: str, path: Path) -> list[Prompt]:
    rows = csv.DictReader(text.split("\n"), delimiter="\t", quoting=csv.QUOTE_NONE)
    return [
        Prompt(row["Prompt"], f"{i:05d}", tuple(filter(None, (row["Category"], row["Challenge"]))))
        for i, row in enumerate(rows)
    ]


def _text(text: str, path: Path) -> list[Prompt]:
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return [Prompt(line, f"{i:05d}") for i, line in enumerate(lines)]


FORMATS = {"genai": _genai, "geneval": _geneval, "mjhq": _mjhq, "parti": _parti, "text": _text}


def find_format(text: str, path: Path) -> str:
    """Detect the format of a prompt file by its content and the files beside it.

    Raises:
        ValueError: the file looks like JSON but is not, or is JSON of another kind.
    """
    text = text.lstrip()
    if not text.startswith(("{", "[")):
        columns = text.split("\n", 1)[0].split("\t")
        if {"Prompt", "Category"} <= set(columns):
            return "parti"
        return "genai" if path.with_name(SKILLS).is_file() else "text"
    first = json.JSONDecoder().raw_decode(text)[0]  # the first line, or the whole file
    if "prompt" in first:
        return "geneval"
    row = next(iter(first.values()), None) if isinstance(first, dict) else None
    if not isinstance(row, dict) or "prompt" not in row:
        raise ValueError(f'expected {{id: {{"prompt": ...}}}}, got {text[:60]!r}')
    return "mjhq" if "category" in row else "genai"


def read_prompts(path: str | Path, format: str = "") -> tuple[str, list[Prompt]]:
    """Read a prompt file.

    Args:
        path: path of the file.
        format: format of the file; "" to detect it.

    Returns:
        The format, and the prompts in the order of the file.

    Raises:
        ValueError: the file does not exist, has another format or no prompts, or has a prompt without a text or a
            usable name; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no prompt file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        format = format or find_format(text, path)
        prompts = FORMATS[format](text, path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        wanted = format or "any format (--format names one)"
        raise ValueError(f"cannot read the prompt file {path} as {wanted}: {error!r}") from error
    if not prompts:
        raise ValueError(f"the prompt file {path} is empty")
    for prompt in prompts:
        if not isinstance(prompt.text, str) or not prompt.text.strip():
            raise ValueError(f"prompt {prompt.name} of {path} has no text: {prompt.text!r}")
        if any(part in ("", ".", "..") for part in prompt.name.split("/")) or "\\" in prompt.name:
            raise ValueError(f"prompt {prompt.name!r} of {path} cannot name a picture")
    return format, prompts
