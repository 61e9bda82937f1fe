"""The command that trains a text tokenizer."""

import json
import re

import pytest
from transformers import AutoTokenizer

from training import text_tokenizer


def test_the_text_tokenizers_command_has_a_help_and_refuses_what_it_does_not_know(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        text_tokenizer.main(["--help"])
    assert "byte-level BPE" in capsys.readouterr().out
    for wrong in ([], ["a", "b"], ["--folder", "a"]):
        with pytest.raises(SystemExit) as end:
            text_tokenizer.main(wrong)
        assert end.value.code == 2
    assert not list(tmp_path.iterdir())


def test_a_text_tokenizer_of_own_captions_knows_their_words(tmp_path, capsys):
    captions = tmp_path / "captions.jsonl"
    rows = [json.dumps({"caption": f"an ostrich beside a zeppelin {i}"}) + "\n" for i in range(20)]
    captions.write_text("".join(rows), encoding="utf-8")
    text_tokenizer.main([str(tmp_path / "own"), "--captions", str(captions), "--vocab-size", "400"])
    own = AutoTokenizer.from_pretrained(tmp_path / "own")
    assert own.tokenize("an ostrich beside a zeppelin") == ["an", "Ġostrich", "Ġbeside", "Ġa", "Ġzeppelin"]
    assert "Ġdescription" in own.get_vocab() and "ĠASSISTANT" in own.get_vocab() and len(own) <= 400
    assert f"{len(own)} tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"text": "a"}, (), "Row 1 of .* has no text under 'caption'"),
        ({"caption": "a"}, ("--vocab-size", "200"), "--vocab-size 200 is below 262"),
        (None, (), "There is no data file"),
    ],
)
def test_captions_and_sizes_that_make_no_text_tokenizer_are_refused_in_a_line(row, options, message, tmp_path, capsys):
    if row is not None:
        (tmp_path / "captions.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        text_tokenizer.main([str(tmp_path / "own"), "--captions", str(tmp_path / "captions.jsonl"), *options])
    assert end.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "own").exists()
