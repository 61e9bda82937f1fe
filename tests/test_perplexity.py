"""The perplexity of texts equals one computed text by text; wrong options are named."""

import json
import math

import pytest
import torch

from eval import perplexity
from unitok_mllm.inference import SHIPPED_MODEL, load


pytestmark = pytest.mark.full
TEXTS = ["what color is the shape?", "a red circle and </s> a blue one, " * 5, "no"]


@torch.no_grad()
def one_by_one(model, processor, texts, max_length):
    total, tokens = 0.0, 0
    for text in texts:
        ids, _ = processor.encode_text(processor.mark_plain(text) + processor.tokenizer.eos_token)
        for start in range(0, len(ids), max_length):
            chunk = torch.tensor([ids[start : start + max_length]])
            if chunk.shape[1] > 1:
                likelihoods = model(input_ids=chunk).logits[0, :-1].log_softmax(dim=-1)
                total -= likelihoods.gather(1, chunk[0, 1:, None]).sum().item()
                tokens += chunk.shape[1] - 1
    return math.exp(total / tokens), tokens


@pytest.mark.parametrize(("max_length", "batch_size"), [(512, 1), (512, 3), (16, 4)])
def test_chunks_and_batches_change_nothing(max_length, batch_size):
    model, processor = load(SHIPPED_MODEL)
    result = perplexity.perplexity(model, processor, TEXTS, max_length, batch_size)
    value, tokens = one_by_one(model, processor, TEXTS, max_length)
    assert result["tokens"] == tokens and result["texts"] == len(TEXTS)
    assert result["perplexity"] == pytest.approx(value, rel=1e-5)


def test_the_command_writes_its_result(tmp_path, capsys):
    texts, output = tmp_path / "texts.jsonl", tmp_path / "new/out.json"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    perplexity.main(["--model", str(SHIPPED_MODEL), "--texts", str(texts), "--output", str(output)])
    result = json.loads(output.read_text(encoding="utf-8"))
    assert f"perplexity {result['perplexity']:.3f} over {result['tokens']} tokens" in capsys.readouterr().out
    assert result["numbers"][0]["value"] == result["perplexity"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (['{"text": "a"}'], ["--max_length", "1"], "max_length"),
        (['{"text": "a"}'], ["--batch_size", "0"], "batch_size"),
        (['{"caption": "a"}'], [], "must have a text"),
        (['{"text": 1}'], [], "must have a text"),
        (['{"text": "a"}'], ["--model", "{tmp}"], "{tmp}"),
    ],
)
def test_wrong_options_are_named(tmp_path, capsys, rows, options, message):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(rows) + "\n", encoding="utf-8")
    options = [option.replace("{tmp}", str(tmp_path)) for option in options]
    with pytest.raises(SystemExit) as end:
        perplexity.main(["--model", str(SHIPPED_MODEL), "--texts", str(texts), *options])
    assert end.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]  # after the progress bar of reading the file
    assert error.startswith("error: ") and message.replace("{tmp}", str(tmp_path)) in error
