"""Folders that hold a text tokenizer as `tokenizer.model` alone, as the original LLMs' do."""

import json
import random
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from unitok_mllm import UniTokImageProcessor, UniTokMLLMProcessor


# not every environment of old has what pyproject.toml asks for by now
pytestmark = pytest.mark.skipif(
    version("sentencepiece") == "0.2.3" and version("protobuf") < "7",
    reason="sentencepiece 0.2.3 needs protobuf 7 to read a model; pyproject.toml asks for an earlier one",
)
TEXTS = ["What color is the shape? A red circle.", "ünïcödé ✨ and 日本", "USER: yes ASSISTANT: no"]


def write_folder(folder: Path, model: bytes) -> Path:
    """A Llama's folder without `tokenizer.json`."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    return folder


def assert_loads(folder: Path, tmp_path: Path) -> None:
    """The folder's tokenizer gives sentencepiece's own ids, also through a processor that is saved and loaded."""
    reader = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = [[reader.bos_id(), *reader.encode(text)] for text in TEXTS]
    assert [tokenizer(text)["input_ids"] for text in TEXTS] == expected
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected] == [
        reader.decode(e) for e in expected
    ]
    UniTokMLLMProcessor(UniTokImageProcessor(), tokenizer).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved/tokenizer.model").exists()
    again = UniTokMLLMProcessor.from_pretrained(tmp_path / "saved")
    assert [again(text=text)["input_ids"].tolist() for text in TEXTS] == [[ids] for ids in expected]
    assert (again.boi_token_id, again.eoi_token_id, again.image_token_id) == (3, 4, len(reader))


def test_a_folder_with_a_sentencepiece_model_alone_loads(tmp_path):
    words = " ".join(TEXTS).split()
    lines = [" ".join(random.Random(i).choices(words, k=8)) for i in range(300)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(tmp_path / "words"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    assert_loads(write_folder(tmp_path / "llm", (tmp_path / "words.model").read_bytes()), tmp_path)


@pytest.mark.slow  # needs mistral-common, whose model has the 32,000 pieces of the Llama family
def test_a_real_sentencepiece_model_loads(tmp_path):
    pytest.importorskip("mistral_common")
    model = files("mistral_common") / "data" / "tokenizer.model.v1"
    assert_loads(write_folder(tmp_path / "llm", model.read_bytes()), tmp_path)
