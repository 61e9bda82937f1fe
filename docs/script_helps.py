"""Print the helps of scripts as JSON: `python docs/script_helps.py unitok-mllm training.plan ...`.

All run in one process, so that torch is imported once.
"""

import contextlib
import importlib
import io
import json
import runpy
import sys
import warnings
from pathlib import Path

import typer


def help_text(name: str, module: str, *command: str) -> str:
    """Return what the script prints for `--help`."""
    output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # unlike a StringIO it can be reconfigured
    sys.argv = [name, *command, "--help"]
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        runpy.run_module(module, run_name="__main__")
    output.flush()
    return output.buffer.getvalue().decode("utf-8").strip()


def help_texts(script: str) -> dict[str, str]:
    """Return the helps of a script and of its commands, by command line."""
    name, module = (script, "unitok_mllm.cli") if script == "unitok-mllm" else (f"python -m {script}", script)
    texts = {name: help_text(name, module)}
    app = getattr(importlib.import_module(module), "app", None)
    if isinstance(app, typer.Typer):
        for command in getattr(typer.main.get_command(app), "commands", ()):
            texts[f"{name} {command}"] = help_text(name, module, command)
    return texts


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(Path(__file__).parents[1]))
    print(json.dumps({script: help_texts(script) for script in sys.argv[1:]}, indent=1))
