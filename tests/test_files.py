"""Broken tables are named; a file is written whole or not at all."""

import itertools
import json

import pytest
from faulty_disk import killed_at

from training.files import read_rows, write_atomically


pytestmark = pytest.mark.attack


@pytest.mark.parametrize(
    "name, content",
    [
        ("rows.json", b"[{"),
        ("rows.json", b"\xff\xfe"),
        ("rows.json", b'{"image": "a.png"}'),
        ("rows.json", b"[1, 2]"),
        ("rows.jsonl", b'{"image": "a.png"}\n{"ima'),
        ("rows.jsonl", b"\xff\xfe\x00"),
        ("rows.parquet", b""),
        ("rows.parquet", b"PAR1 none PAR1"),
    ],
)
def test_broken_tables_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"data file .*{name}"):
        read_rows(tmp_path / name)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize(
    "content",
    [b"", b"\n\n", b"[" * 100_000, b'{"a":' * 100_000, b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"],
    ids=range(5),
)
def test_tables_without_rows_or_nested_without_end_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot read the data file .*{name}: ."):
        read_rows(tmp_path / name)


def test_only_nesting_counts_not_the_brackets_in_texts(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"caption": "[" * 1000 + '"{' * 1000, "turns": [{"a": [i]} for i in range(1000)]}
    path.write_text(f"{json.dumps(row)}\n{json.dumps(row)}\n", encoding="utf-8")
    assert read_rows(path)[1] == row
    path.write_text(f"{json.dumps(row)}\n" + "[" * 501 + "]" * 501, encoding="utf-8")
    with pytest.raises(
        ValueError, match="cannot read the data file .*rows.jsonl: line 2 is nested more than 500 deep"
    ):
        read_rows(path)


def test_a_kill_while_a_report_is_written_leaves_the_old_or_the_new_one(tmp_path):
    path = tmp_path / "report.json"
    for event in itertools.count(1):
        write_atomically(path, b'{"old": 1}')
        if not killed_at(event, lambda: write_atomically(path, b'{"new": 2}')):
            break
        assert json.loads(path.read_text(encoding="utf-8")) == {"old": 1}
    assert event > 2 and json.loads(path.read_text(encoding="utf-8")) == {"new": 2}
