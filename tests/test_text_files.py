"""Text files are UTF-8 whatever the locale."""

import ast
from pathlib import Path


ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for folder in ("unitok_mllm", "training", "eval", "tests") for path in (ROOT / folder).rglob("*.py")
)
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
