"""Helpers shared by the evaluation scripts: settings, model loading, batching, versions."""

import json
import os
from collections.abc import Callable, Collection
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

import unitok_mllm
from training.arguments import Parser
from training.checkpoints import check_file
from unitok_mllm import UniTokMLLMForConditionalGeneration, UniTokMLLMProcessor
from unitok_mllm.devices import AUTO, find_device
from unitok_mllm.drawing_unitok import IMAGE_GENERATION, UniTokDrawingOptions, image_generation


Settings = TypeVar("Settings")


def parse_settings(
    settings_class: type[Settings], argv: list[str] | None = None, docstring: str | None = None
) -> Settings:
    """Parse the command line into an instance of a dataclass. `docstring` is that of the script, see `Parser`."""
    (settings,) = Parser(settings_class, docstring).parse(argv)
    return settings


DRAWING = {
    "guidance": "guidance_scale",
    "plausibility": "plausibility",
    **{name: name for name in ("temperature", "top_k", "top_p")},
}


@dataclass
class DrawingSettings:
    """Command-line options for drawing. An option left out takes the model's own default."""

    guidance: float | None = field(
        default=None, metadata={"help": "guidance scale; 1 for none; default: the model's own"}
    )
    plausibility: float | None = field(
        default=None,
        metadata={
            "help": "leave out codes whose probability without guidance is below this share of the likeliest one's; 0 for "
            "none; default: the model's own"
        },
    )
    temperature: float | None = field(
        default=None, metadata={"help": "sampling temperature; default: the model's own"}
    )
    top_k: int | None = field(
        default=None, metadata={"help": "sample from the k likeliest codes; 0 for all; default: the model's own"}
    )
    top_p: float | None = field(
        default=None,
        metadata={
            "help": "sample from the likeliest codes that have this total probability; default: the model's own"
        },
    )

    def complete(self, folder: str) -> None:
        """Fill in the missing options from the model in a folder, or from the defaults of new models if it has none.

        Raises:
            ValueError: an option is out of its range.
        """
        has_own = (Path(folder) / GENERATION_CONFIG_NAME).is_file()
        own = GenerationConfig.from_pretrained(folder) if has_own else GenerationConfig()
        given = {name: value for name, value in self.drawing.items() if value is not None}
        options = UniTokDrawingOptions(**(image_generation(own) or IMAGE_GENERATION) | given)
        for option, name in DRAWING.items():
            setattr(self, option, getattr(options, name))

    @property
    def drawing(self) -> dict[str, float]:
        """The options under the names that `generate_image_codes` uses."""
        return {name: getattr(self, option) for option, name in DRAWING.items()}

    @property
    def sampling(self) -> str:
        """Description of the sampling, for the protocol. A plausibility of 0, which does nothing, is left out."""
        given = [option for option in DRAWING if option != "plausibility" or self.plausibility]
        return ", ".join(f"{option.replace('_', '-')} {getattr(self, option):g}" for option in given)


def load_model(folder: str, device: str = AUTO) -> tuple[UniTokMLLMForConditionalGeneration, UniTokMLLMProcessor]:
    """Load an MLLM onto a device (see `find_device`), together with its processor."""
    model = AutoModelForImageTextToText.from_pretrained(folder).to(find_device(device)).eval()
    return model, AutoProcessor.from_pretrained(folder)


def check_kind(model: str, *kinds: str) -> None:
    """Check by its config that a model, in a folder or on the hub, is of one of these kinds.

    Raises:
        ValueError: it is of another.
        OSError: there is none.
    """
    kind = AutoConfig.from_pretrained(model).model_type
    if kind not in kinds:
        raise ValueError(f"{model} is a {kind} model, not a {' or '.join(kinds)} one")


def check_skipped(skipped: Collection[str], kind: str, names: Collection[str], is_all_right: bool = False) -> None:
    """Check what `--skip` names.

    Args:
        kind: what the names are, such as "metrics".
        names: all that can be skipped.
        is_all_right: something is measured without any of them too.

    Raises:
        ValueError: a name is unknown, or nothing is left to measure.
    """
    if unknown := set(skipped) - set(names):
        raise ValueError(f"cannot skip {', '.join(sorted(unknown))}; the {kind} are {', '.join(names)}")
    if set(skipped) == set(names) and not is_all_right:
        raise ValueError(f"--skip {','.join(skipped)} leaves nothing to measure: keep one of the {kind}")


def check_effect(settings: object, condition: str, *names: str) -> None:
    """Check that options that would have no effect are not given.

    Args:
        settings: a dataclass.
        condition: what the options have an effect with.
        names: of the options.

    Raises:
        ValueError: one has another value than its default.
    """
    for option in fields(settings):
        value = getattr(settings, option.name)
        if option.name in names and value != option.default:
            raise ValueError(f"--{option.name} {value} has no effect without {condition}: leave it out")


def check_finished(path: str | os.PathLike) -> None:
    """Check that a file of an earlier run can be read, see `training.checkpoints.check_file`.

    Raises:
        ValueError: the file is broken; the message names it and says what to do.
    """
    try:
        check_file(path)
    except ValueError as error:
        raise ValueError(f"{error}. Remove it, or choose another output") from error


def check_result(path: str | os.PathLike, result: Collection[str] | None, *keys: str) -> None:
    """
    Raises:
        ValueError: what a file holds lacks one of these keys; the message names it, and what to do.
    """
    if result is None or not set(result) >= set(keys):
        raise ValueError(f"{path} is not a result of this evaluation. Remove it, or choose another output")


def read_result(path: str | os.PathLike, *keys: str) -> dict:
    """Read the JSON file that an earlier run of the same evaluation has written; empty if there is none.

    Args:
        path: path of the JSON file.
        keys: keys that it must have.

    Raises:
        ValueError: the file is broken, or not a result of this evaluation; the message names it and says what to do.
    """
    path = Path(path)
    if not path.is_file():
        return {}
    check_finished(path)
    result = json.loads(path.read_text(encoding="utf-8"))
    check_result(path, result if isinstance(result, dict) else None, *keys)
    return result


@contextmanager
def weights_needed(metric: str, weights: str, remedy: str):
    """Context manager that turns errors from loading missing or wrong weights into a ValueError that says what to do.

    Network errors are OSErrors; `torch.load` raises errors of many types.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{metric} needs {weights}: {reason}. Give {remedy}.") from error


def in_batches(
    function: Callable, rows: torch.Tensor, batch_size: int, device: torch.device, title: str
) -> torch.Tensor:
    """Apply a function to all rows, in batches on the device, with a progress bar. Return the results on the CPU."""
    return torch.cat([function(chunk.to(device)).cpu() for chunk in tqdm(rows.split(batch_size), desc=title)])


def versions() -> dict[str, str]:
    """Return the versions of the libraries that all numbers depend on."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "unitok_mllm": unitok_mllm.__version__,
    }
