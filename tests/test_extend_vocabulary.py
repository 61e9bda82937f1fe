"""New tokens for a model, which keeps what it had learned."""

import json

import pytest
import torch
from typer.testing import CliRunner

from training.extend_vocabulary import app, extend_tokenizer, merge
from training.release import save_release
from unitok_mllm import UniTokMLLMForConditionalGeneration, UniTokMLLMProcessor


TEXTS = ["a slice of pizza", "slice of cake", " pizza", "a red circle"]


def test_merge_joins_pairs_from_the_left():
    assert merge(("a", "a", "a", "b"), ("a", "a")) == ("aa", "a", "b")
    assert merge(("a", "b", "a", "b"), ("a", "b")) == ("ab", "ab")
    assert merge(("b", "a"), ("a", "b")) == ("b", "a")


def test_merges_go_on_with_the_most_frequent_pairs(text_tokenizer):
    old = text_tokenizer
    one_more = extend_tokenizer(old, ["zq zq zq qx qx"], len(old) + 1)
    assert len(one_more) == len(old) + 1
    assert one_more.tokenize("zq qx") == ["zq", "Ġ", "q", "x"]  # "Ġz" comes twice, "zq" three times
    all_of_them = extend_tokenizer(old, TEXTS, 5000)
    assert all_of_them.tokenize("a slice of pizza") == ["a", "Ġslice", "Ġof", "Ġpizza"]
    assert len(all_of_them) < 5000
    assert all_of_them.convert_tokens_to_ids(old.convert_ids_to_tokens(range(len(old)))) == list(range(len(old)))
    assert all_of_them.special_tokens_map == old.special_tokens_map and all_of_them.padding_side == old.padding_side
    strange = "Ünïcode,  spaces\nand pizzas 🍕"
    assert all_of_them.decode(all_of_them(strange)["input_ids"], skip_special_tokens=True) == strange


def test_old_texts_read_as_before_and_new_words_as_the_mean_of_their_pieces(mllm, processor, tmp_path):
    before, after, captions = tmp_path / "before", tmp_path / "after", tmp_path / "captions.jsonl"
    save_release(mllm, processor, before, torch.float32)
    captions.write_text("".join(json.dumps({"caption": text}) + "\n" for text in TEXTS), encoding="utf-8")
    old_tokenizer = processor.tokenizer
    size = len(old_tokenizer) + 10
    arguments = [str(before), str(after), "--captions", str(captions), "--vocab-size", str(size)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert f"{len(old_tokenizer)} tokens and 10 new ones" in result.output

    extended = UniTokMLLMForConditionalGeneration.from_pretrained(after).eval()
    new_tokenizer = UniTokMLLMProcessor.from_pretrained(after).tokenizer
    text = "what is the blue shape?"
    ids = old_tokenizer(text, return_tensors="pt")["input_ids"]
    assert torch.equal(ids, new_tokenizer(text, return_tensors="pt")["input_ids"])
    with torch.no_grad():
        logits = [model(input_ids=ids).logits[..., : len(old_tokenizer)] for model in (mllm, extended)]
    torch.testing.assert_close(*logits)

    for part in ("language_model", "visual.text_model"):
        old, new = (model.get_submodule(part).get_input_embeddings().weight for model in (mllm, extended))
        for token in range(len(old_tokenizer), size):
            spelling = old_tokenizer(new_tokenizer.decode([token]), add_special_tokens=False)["input_ids"]
            torch.testing.assert_close(new[token], old[spelling].mean(dim=0))
    assert extended.language_model.get_output_embeddings().weight.shape[0] >= size


def test_too_small_a_vocabulary_is_refused(text_tokenizer):
    with pytest.raises(ValueError, match=f"{len(text_tokenizer)} tokens; vocab_size must be larger, got 100"):
        extend_tokenizer(text_tokenizer, TEXTS, 100)
