"""Text files are UTF-8 whatever the locale."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for folder in ("unitok_mllm", "training", "eval", "tests") for path in (ROOT / folder).rglob("*.py")
)
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
OTHER_OPEN = ("Image", "tarfile", "os")  # open no text files


def opens_text_by_locale(call: ast.Call) -> bool:
    """Whether a call opens a text file in the locale's encoding; ruff's PLW1514 misses paths of unknown type."""
    if any(keyword.arg == "encoding" for keyword in call.keywords):
        return False
    match call.func:
        case ast.Attribute(attr="read_text"):
            return not call.args
        case ast.Attribute(attr="write_text"):
            return len(call.args) < 2
        case ast.Name(id="open"):
            modes = call.args[1:2]
        case ast.Attribute(attr="open", value=opener) if ast.unparse(opener) not in OTHER_OPEN:
            modes = call.args[:1]
        case _:
            return False
    modes += [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    return not any("b" in ast.literal_eval(mode) for mode in modes)


def test_every_text_file_is_opened_with_an_encoding():
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and opens_text_by_locale(node):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not found


def run_in_ascii(program: str, *args: str) -> bytes:
    """What a program writes in a locale that knows ASCII alone."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONIOENCODING"} | ASCII
    check = "import locale; assert locale.getpreferredencoding(False) == 'ANSI_X3.4-1968'\n"
    done = subprocess.run(
        [sys.executable, "-c", check + program, *args], cwd=ROOT, env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@pytest.mark.full
def test_data_and_configs_are_read_in_an_ascii_locale(tmp_path):
    rows = [{"conversations": [{"from": "human", "value": "Größe?"}, {"from": "gpt", "value": "groß ✨"}]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0], ensure_ascii=False) + "\n", encoding="utf-8")
    (tmp_path / "config.yaml").write_text("system_line: Größe ✨\n", encoding="utf-8")
    program = """
import sys
from dataclasses import dataclass
from pathlib import Path
from training.arguments import parse_yaml_and_command_line
from training.files import read_rows

@dataclass
class Settings:
    system_line: str = ""

folder = Path(sys.argv[1])
(settings,) = parse_yaml_and_command_line((Settings,), [str(folder / "config.yaml")])
print(ascii([settings.system_line, list(read_rows(folder / "rows.json")), list(read_rows(folder / "rows.jsonl"))]))
"""
    assert ast.literal_eval(run_in_ascii(program, str(tmp_path)).decode()) == ["Größe ✨", rows, rows]


@pytest.mark.parametrize("encoding, expected", [("ascii", "ö ✨".encode()), ("latin-1", b"\xf6 \\u2728")])
def test_the_command_line_prints_and_reads_any_text_in_any_locale(encoding, expected):
    program = f"""
import sys, typer
from unitok_mllm import cli
sys.stdout.reconfigure(encoding={encoding!r})
assert cli.utf8(sys.argv[1]) == "gr\\xf6\\xdfer"
cli.app = lambda: [typer.echo(text) for text in ("\\xf6 \\u2728", sys.argv[1])]
cli.main()
"""
    assert run_in_ascii(program, "größer") == expected + b"\n" + "größer\n".encode()  # a path's bytes stay
