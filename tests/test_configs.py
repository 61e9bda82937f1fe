"""The commands at the head of each config have options that their scripts accept."""

import importlib
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import typer
import yaml

from training.errors import CommandLine


ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.name for path in (ROOT / "training/configs").glob("*.yaml"))
COMMAND = re.compile(r"^(?:python|torchrun)\b.* -m ((?:training|eval)\.\w+)(.*)")


class Parsed(Exception):
    """A script's command line has been parsed."""


def header(name: str) -> list[str]:
    """The lines of the comment that a config begins with; those that end in a backslash go on in the next one."""
    text = (ROOT / "training/configs" / name).read_text(encoding="utf-8")
    comment = re.match(r"(?:#.*\n)+", text)[0]
    return re.sub(r"^# ?", "", comment, flags=re.M).replace("\\\n", " ").splitlines()


def parse(module_name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Has a script parse its arguments, and stops it there; the options that it knows."""
    module = importlib.import_module(module_name)
    if hasattr(module, "app"):
        command = typer.main.get_command(module.app)
        command.make_context(module_name, arguments)
        return {option.lstrip("-") for parameter in command.params for option in parameter.opts}
    known = set()
    if hasattr(module, "parse_yaml_and_command_line"):
        place, name = module, "parse_yaml_and_command_line"
    else:
        place, name = CommandLine, "parse_args"
    parser = getattr(place, name)

    def parse_and_stop(first, argv, *rest):
        parser(first, argv, *rest)
        if place is module:
            known.update(field.name for one in first for field in fields(one))
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(place, name, parse_and_stop)
        with pytest.raises(Parsed):
            module.main(arguments)
    return known


@pytest.mark.parametrize("config", CONFIGS)
def test_the_commands_of_a_configs_header_are_taken(config, tmp_path, monkeypatch):
    for name in ("training", "unitok_mllm"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    values = yaml.safe_load((ROOT / "training/configs" / config).read_text(encoding="utf-8"))
    for path in (*values.get("validation", {}).values(), *values.get("held_out", {}).values()):
        Path(path).parent.mkdir(parents=True, exist_ok=True)  # the settings look whether it is there
        Path(path).touch()
    known, prose, own = set(), [], False
    for line in header(config):
        if match := COMMAND.match(line):
            module, arguments = match[1], shlex.split(match[2], comments=True)
            known |= parse(module, arguments, monkeypatch)
            own = own or f"training/configs/{config}" in arguments
        else:
            prose.append(re.sub(r"pip install [^;)]*", "", line))
    assert own, "no command runs the config"
    named = {name for line in prose for name in re.findall(r"--([a-z]\w*)", line)}
    assert named <= known


def test_an_unknown_option_is_noticed(monkeypatch):
    with pytest.raises(typer.TyperException, match="--dtype"):
        parse("training.extract_codes", ["a", "b", "--visual-model", "c", "--dtype", "bfloat16"], monkeypatch)
    with pytest.raises(ValueError, match="the command line has no '--dtype'"):
        parse("training.train_mllm", ["training/configs/mllm_tiny.yaml", "--dtype", "bfloat16"], monkeypatch)
