"""Functions that take a path take it as a string too."""

import ast
from pathlib import Path

import pytest

from training.codes import shard_path
from training.files import read_rows
from training.release import write_folder


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("folder", ["unitok_mllm", "training"])
def test_no_public_function_asks_for_a_path_object(folder):
    found = []
    for source in sorted((ROOT / folder).glob("*.py")):
        for node in ast.parse(source.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and source.name != "cli.py":
                commands = [decorator for decorator in node.decorator_list if "command" in ast.unparse(decorator)]
                arguments = () if commands else (*node.args.args, *node.args.kwonlyargs)
                asked = [
                    a.arg for a in arguments if a.annotation and ast.unparse(a.annotation) in ("Path", "list[Path]")
                ]
                found += [f"{source.name}: {node.name}({name})" for name in asked]
    assert not found


def test_strings_do(tmp_path):
    (tmp_path / "rows.json").write_text('[{"text": "größer"}]', encoding="utf-8")
    assert read_rows(str(tmp_path / "rows.json")) == read_rows(tmp_path / "rows.json") == [{"text": "größer"}]
    metadata = {"format": "parquet", "num_shards": 1}
    assert shard_path(str(tmp_path), 0, metadata) == shard_path(tmp_path, 0, metadata)
    write_folder(str(tmp_path / "new"), lambda folder: (folder / "a.txt").touch())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.txt"]
