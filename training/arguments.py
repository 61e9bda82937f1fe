"""Command lines of the training scripts: one YAML file, then `--name value` for whatever should differ from it."""

import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_origin

import torch
import yaml
from transformers import HfArgumentParser

from unitok_mllm.configuration_unitok import check_ranges


TRUST_CONFIG, TRUSTED = "--trust_config", "UNITOK_TRUST_CONFIG"
BELOW_ONE = (0.0, 1 - 1e-9)


def check_arguments(arguments: Any, **ranges: tuple[float, float]) -> None:
    """Check the fields of a dataclass of options: each is of its type, and those named lie in their inclusive ranges.

    Raises:
        ValueError: one does not (NaN never does).
    """
    for field in fields(arguments):
        value, kind = getattr(arguments, field.name), get_origin(field.type) or field.type
        is_of_kind = isinstance(value, int | float if kind is float else kind)
        if not is_of_kind or isinstance(value, bool) and kind is not bool:
            raise ValueError(f"{field.name} must be of type {kind.__name__}, got {value!r}.")
    check_ranges(arguments, **ranges)


def run_script(main: Callable[[], None]) -> None:
    """Runs a script; what its user can mend becomes one line on stderr and exit code 2."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def parse_yaml_and_command_line(dataclass_types: tuple, argv: list[str] | None = None) -> tuple:
    """Reads `CONFIG.yaml [--name value ...]` into instances of the dataclasses; the command line wins.

    `--trust_config` says that what the config names may be run: shards that are the output of commands.

    Raises:
        SystemExit: no config was given, it does not exist, is no YAML of names and values, or has a key that no
            dataclass knows.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if TRUST_CONFIG in argv:
        argv.remove(TRUST_CONFIG)
        os.environ[TRUSTED] = "1"  # for the data's workers too
    parser = HfArgumentParser(dataclass_types)
    if not argv or argv[0] in ("-h", "--help"):
        parser.parse_args(["--help"])
    if not Path(argv[0]).is_file():
        parser.error(f"the first argument is a YAML config; there is no file {argv[0]}")
    try:
        values = yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        parser.error(f"{argv[0]} is no YAML: {' '.join(str(error).split())}")
    if not isinstance(values, dict):
        parser.error(f"{argv[0]} is a {type(values).__name__}, expected names and values")
    known = {action.dest for action in parser._actions}
    if unknown := sorted(values.keys() - known):
        parser.error(f"{argv[0]} has unknown keys: {', '.join(unknown)}")
    defaults = {
        "use_cpu": not torch.accelerator.is_available(),  # or bf16 is refused where there is no GPU
        "remove_unused_columns": False,  # batches go to the model as they are
        "label_names": [],
        "num_train_epochs": 1,
    }
    parser.set_defaults(**{name: value for name, value in defaults.items() if name in known})
    parser.set_defaults(**values)
    return parser.parse_args_into_dataclasses(args=argv[1:])
