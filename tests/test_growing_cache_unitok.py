"""The preallocated cache for drawing gives the same results as the library's cache."""

import pytest
import torch
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from unitok_mllm.growing_cache_unitok import CACHE_DTYPE_ATTENTION, UniTokGrowingLayer, growing_cache


@pytest.fixture
def llm(llama_config):
    return LlamaForCausalLM(llama_config).eval().get_decoder()


def states_after(llm, cache, embeds, prompt_length):
    """The decoder's states (B, T, D): the prompt's at once, the others one at a time."""
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    mask[0, :2] = 0
    spans = [(0, prompt_length), *((t, t + 1) for t in range(prompt_length, embeds.shape[1]))]
    outputs = [
        llm(inputs_embeds=embeds[:, a:b], attention_mask=mask[:, :b], cache=cache, use_cache=True).last_hidden_state
        for a, b in spans
    ]
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_layer_holds_what_the_librarys_does_and_never_moves(dtype):
    layer, reference = UniTokGrowingLayer(7, dtype), DynamicLayer()
    assert layer.get_seq_length() == 0
    places = set()
    for length in (3, 1, 2, 1):
        keys, values = torch.randn(2, 2, 3, length, 4).bfloat16()
        held, expected = layer.update(keys, values), reference.update(keys, values)
        for own, other in zip(held, expected):
            assert torch.equal(own, other.to(own.dtype)) and own.dtype == (dtype or torch.bfloat16)
        places.add(held[0].data_ptr())
        assert layer.get_seq_length() == reference.get_seq_length()
        assert layer.get_mask_sizes(1) == reference.get_mask_sizes(1)
    assert len(places) == 1


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_decoder_computes_the_same(llm, dtype):
    exact = states_after(llm, DynamicCache(), embeds := torch.randn(2, 9, 64).bfloat16().float(), 5)
    llm = llm.to(dtype)
    decoder, cache = growing_cache(llm, 9)
    states = states_after(decoder, cache, embeds.to(dtype), 5)
    plain = states_after(llm, DynamicCache(), embeds.to(dtype), 5)
    assert cache.layers[1].keys.dtype == torch.float32 and cache.layers[1].keys.shape == (2, 2, 9, 16)
    assert states.dtype == dtype
    if dtype == torch.float32:
        assert decoder is llm and torch.equal(states, plain)
        return
    assert decoder is not llm and decoder.layers[0].mlp.up_proj is llm.layers[0].mlp.up_proj
    assert decoder.layers[0].self_attn.config._attn_implementation == CACHE_DTYPE_ATTENTION
    assert all(getattr(m, "config", llm.config)._attn_implementation == "sdpa" for m in llm.modules())
    errors = [(s.float() - exact)[:, 2:].norm() for s in (states, plain)]
    assert errors[0] < 1.1 * errors[1] < 0.05 * exact.norm()


def test_where_something_else_attends_the_decoder_and_its_dtype_stay(llm):
    llm = llm.bfloat16()
    for change in (lambda m: m.set_attn_implementation("eager"), lambda m: m.set_attn_implementation("sdpa")):
        change(llm)
        decoder, cache = growing_cache(llm, 9)
        assert (decoder is llm) == (llm.config._attn_implementation == "eager")
        assert cache.layers[0].dtype == (None if decoder is llm else torch.float32)
    llm.layers[0].forward = llm.layers[0].forward  # as hooks of accelerate do
    assert growing_cache(llm, 9)[0] is llm
    del llm.layers[0].forward
    llm.layers[1].mlp.compile()
    decoder, cache = growing_cache(llm, 9)
    assert decoder is llm and [type(layer) for layer in cache.layers] == [DynamicLayer, DynamicLayer]


@torch.no_grad()
def test_layers_that_slide_stay_the_librarys():
    config = Gemma3TextConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )
    llm, embeds = Gemma3ForCausalLM(config).eval().get_decoder().bfloat16(), torch.randn(2, 9, 32).bfloat16()
    decoder, cache = growing_cache(llm, 9)
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, UniTokGrowingLayer]
    states, plain = (states_after(m, c, embeds, 5) for m, c in ((decoder, cache), (llm, DynamicCache(config=config))))
    torch.testing.assert_close(states, plain, rtol=0.05, atol=0.05)
