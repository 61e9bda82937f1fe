"""Command lines of the training scripts: a YAML file, and `--name value` options that override its fields."""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import httpx
import torch
import yaml
from huggingface_hub import HfApi, try_to_load_from_cache
from transformers import HfArgumentParser, TrainingArguments

from training.checkpoints import check_file
from training.errors import CommandLine, check_keys
from unitok_mllm.configuration_unitok import check_ranges
from unitok_mllm.devices import AUTO, find_device
from unitok_mllm.inference import check_model


TRUST_CONFIG, TRUSTED = "--trust_config", "UNITOK_TRUST_CONFIG"
# Options that the library's parser takes for texts.
LIBRARY_MAPPINGS = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs", "lr_scheduler_kwargs")
BELOW_ONE = (0.0, 1 - 1e-9)


def check_arguments(arguments: Any, **ranges: tuple[float, float]) -> None:
    """Check the types and ranges of a dataclass's fields.

    Args:
        arguments: the dataclass. None is allowed in a field whose default is None.
        ranges: inclusive range of each field to check, by name.

    Raises:
        ValueError: a field has another type, or is outside its range (NaN always is).
    """
    for field in fields(arguments):
        value, kind, inner = getattr(arguments, field.name), get_origin(field.type), get_args(field.type)
        if value is None is field.default:
            continue
        kind = field.type if kind in (None, UnionType) else kind
        is_of_kind = isinstance(value, int | float if kind is float else kind)
        if is_of_kind and kind is list and inner:
            is_of_kind = all(isinstance(item, inner) for item in value)
        if not is_of_kind or isinstance(value, bool) and kind is not bool:
            name = kind.__name__ if isinstance(kind, type) else kind
            raise ValueError(f"{field.name} must be of type {name}, got {value!r}.")
    check_ranges(arguments, **ranges)


def checked_number(name: str, value: Any, least: float, most: float) -> float:
    """Convert a value of a config to a number. It may be a string, since YAML reads 1e-3 (without a dot) as one.

    Raises:
        ValueError: the value is not a number, or outside the inclusive range.
    """
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not least <= found <= most:
        raise ValueError(f"{name} must be a number from {least:g} to {most:g}, got {value!r}.")
    return found


def check_datasets(datasets: list[dict]) -> None:
    """Check that a config has data sets.

    Raises:
        ValueError: the config has none.
    """
    if not datasets:
        raise ValueError("There is no training data: `datasets` is empty.")


def check_source(option: str, name: str | os.PathLike, is_model: bool = True) -> None:
    """Check that a folder or a model on the hub (or in its cache) exists, which takes seconds at most; "" passes.

    Args:
        option: name of the option, for the message.
        name: the folder, or the name on the hub.
        is_model: whether a folder must have a config.json.

    Raises:
        ValueError: neither exists, or the folder has no config.json, or one that is not JSON.
    """
    name = str(name)
    if not name or Path(name).is_dir():
        config = Path(name, "config.json")
        if name and config.is_file():
            check_file(config)
        elif name and is_model:
            try:
                check_model(name)
            except ValueError as error:
                raise ValueError(f"{option}: {error}") from error
        return
    if (
        Path(name).parent == Path() or not Path(name).parent.exists()
    ):  # a sibling of the missing folder exists, so this is not a hub name
        try:
            cached = [try_to_load_from_cache(name, file) for file in ("config.json", "tokenizer_config.json")]
            if not any(isinstance(path, str) for path in cached):
                HfApi().model_info(name, timeout=10)
            return
        except (ValueError, OSError, httpx.HTTPError) as error:
            reason = f", and the hub has none of that name: {' '.join(str(error).split())[:120]}"
    else:
        reason = ""
    raise ValueError(f"{option}: there is no folder {name}{reason}")


def check_open_clip(name: str, weights: str, option: str) -> None:
    """Check that open_clip knows a model and its weights; `hf-hub:OWNER/NAME` and `local-dir:FOLDER` pass.

    Args:
        name: name of the model.
        weights: a file, or one of open_clip's tags for this model.
        option: name of the option that gave the weights, for the message.

    Raises:
        ValueError: open_clip does not know them.
    """
    import open_clip  # slow: keep `--help` and error messages quick

    if ":" in name:
        return
    check_keys("open_clip", [name], open_clip.list_models())
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights not in tags and not Path(weights).is_file():
        raise ValueError(f"{option} is a file or a tag of {name}'s ({', '.join(tags) or 'none'}), not {weights!r}")


def mapping(text: str) -> dict:
    """Parse a dict on a command line, in YAML or JSON.

    Raises:
        argparse.ArgumentTypeError: the text is not a mapping.
    """
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a mapping such as '{{name: value}}', got {text!r}")
    return value


def mapping_or_file(text: str) -> dict | str:
    """Parse a dict on a command line, see `mapping`; a text that does not begin as one is a file's path."""
    return mapping(text) if text.startswith("{") else text


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show each option's default, and do not break the lines of an example command."""


class Parser(HfArgumentParser, CommandLine):
    """transformers' parser of dataclasses, which also accepts dicts; errors take one line.

    Args:
        dataclass_types: one or several dataclasses, whose fields are the options.
        docstring: docstring of the script. The help begins with its first line and ends with its first command.
    """

    def __init__(self, dataclass_types: Any, docstring: str | None = None, **kwargs: Any):
        lines = (docstring or "").splitlines()
        command = next((line.strip() for line in lines if line.lstrip().startswith("python -m ")), None)
        super().__init__(
            dataclass_types,
            description=lines[0] if lines else None,
            epilog=command and f"example:\n  {command.partition('  #')[0].rstrip()}",
            formatter_class=HelpFormatter,
            **kwargs,
        )
        for action in self._actions:
            if action.type is dict or action.dest in LIBRARY_MAPPINGS:
                action.type = mapping
            elif action.dest in ("accelerator_config", "deepspeed"):
                action.type = mapping_or_file
            elif action.const is False:  # --no_bf16, with the help of --bf16
                action.help = f"the same as --{action.dest} false"

    def parse(self, argv: list[str] | None = None) -> tuple:
        """Parse the command line into an instance of each dataclass.

        Raises:
            ScriptEnd: see `CommandLine.parse_args`.
            ValueError: see there; also if a dataclass refuses a value.
        """
        given = self.parse_args(argv)
        deepspeed = vars(given).get("deepspeed")
        if isinstance(deepspeed, str) and deepspeed.endswith(".json"):
            if not Path(deepspeed).is_file():
                raise ValueError(f"deepspeed: there is no file {deepspeed}")
            read_yaml(deepspeed, json.loads)
        return self.parse_args_into_dataclasses(args=argv)


def parse_yaml_and_command_line(
    dataclass_types: tuple, argv: list[str] | None = None, docstring: str | None = None
) -> tuple:
    """Read `CONFIG.yaml [--name value ...]` into instances of the dataclasses. Options override the file.

    `--device`, or a key of that name, sets the field `use_cpu` if a dataclass has it. `--trust_config` allows the config
    to run commands, whose output are shards. The help takes its description and example from `docstring`.

    Raises:
        SystemExit: no config was given, or see `Parser.parse`.
        ValueError: the config does not exist, is not YAML, or has an unknown key; or see `Parser.parse`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if TRUST_CONFIG in argv:
        argv.remove(TRUST_CONFIG)
        os.environ[TRUSTED] = "1"  # also for DataLoader workers
    parser = Parser(dataclass_types, docstring)
    if any(action.dest == "use_cpu" for action in parser._actions):
        parser.add_argument("--device", default=AUTO, help="auto (accelerators where there are some), cpu or cuda")
    if not argv or argv[0] in ("-h", "--help"):
        parser.parse_args(["--help"])
    if not Path(argv[0]).is_file():
        parser.error(f"the first argument is a YAML config; there is no file {argv[0]}")
    values = read_yaml(argv[0])
    known = {action.dest for action in parser._actions}
    check_keys(argv[0], values, sorted(known))
    defaults = {
        "use_cpu": not torch.accelerator.is_available(),  # else bf16 is refused without a GPU
        "remove_unused_columns": False,  # batches go to the model as they are
        "label_names": [],
        "num_train_epochs": 1,
    }
    if TrainingArguments in dataclass_types:
        defaults["logging_steps"] = 0.02  # of all steps
        defaults["eval_steps"] = values.get("logging_steps", 500)  # transformers' default
    parser.set_defaults(**{name: value for name, value in defaults.items() if name in known})
    parser.set_defaults(**values)
    argv = argv[1:]
    if "device" in known:
        argv += use_cpu_of(parser.parse_args(argv).device)
    return tuple(arguments for arguments in parser.parse(argv) if not isinstance(arguments, argparse.Namespace))


def use_cpu_of(device: str) -> list[str]:
    """Translate `--device` into the option `--use_cpu`.

    Raises:
        ValueError: there is no such device, or it names a single accelerator out of several.
    """
    place = find_device(device)
    if place.index is not None:
        raise ValueError(
            f"a training uses all visible accelerators, got {device}: set CUDA_VISIBLE_DEVICES={place.index} instead."
        )
    return [] if device in ("", AUTO) else ["--use_cpu", str(place.type == "cpu")]


def read_yaml(path: str, parse: Callable[[str], Any] = yaml.safe_load) -> dict:
    """Read the values of a config.

    Args:
        path: path of the file.
        parse: function that parses the text; `json.loads` for JSON.

    Raises:
        ValueError: the file is not YAML, or not a mapping.
    """
    try:
        values = parse(Path(path).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid {'YAML' if parse is yaml.safe_load else 'JSON'}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} has a {type(values).__name__}, expected a mapping of names to values")
    return values
