"""The depth transformer: stepwise decoding equals the full pass."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaModel

from unitok_mllm import UniTokMLLMConfig
from unitok_mllm.configuration_unitok import UniTokDepthConfig
from unitok_mllm.depth_unitok import UniTokDepthTransformer


N, K, V, LLM_WIDTH = 5, 4, 32, 64


@pytest.fixture(params=[{}, {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1}])
def config(request, llama_config, tokenizer_config):
    """The LLM's own width, and a width of its own."""
    depth_config = {"num_hidden_layers": 2, **request.param}
    return UniTokMLLMConfig(
        text_config=llama_config,
        visual_config=tokenizer_config,
        depth_config=depth_config,
        embedder_dim=40,
        embedder_heads=2,
    )


@pytest.fixture
def depth(config):
    return UniTokDepthTransformer(config).eval()


@pytest.fixture
def states():
    return torch.randn(N, LLM_WIDTH)


@pytest.fixture
def codes():
    return torch.randint(V, (N, K))


def changed(a, b):
    """The numbers of the codes whose logits differ anywhere."""
    return [k for k in range(K) if not torch.equal(a[:, k], b[:, k])]


@torch.no_grad()
def test_logits_are_those_of_a_llama_fed_the_state_and_the_embedded_codes(depth, config, states, codes):
    llama = LlamaModel(config.depth_config.llama_config(K)).eval()
    llama.load_state_dict({k: v for k, v in depth.state_dict().items() if k.startswith(("layers", "norm"))}, False)
    inputs = [depth.in_proj(states)]
    inputs += [depth.embeddings.weight[k * V : (k + 1) * V][codes[:, k]] for k in range(K - 1)]
    expected = depth.head(llama(inputs_embeds=torch.stack(inputs, dim=1)).last_hidden_state)
    torch.testing.assert_close(depth(states, codes), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("num_hidden_layers", [0, 1])
def test_few_layers_or_none_choose_the_teacher_forced_codes(config, states, num_hidden_layers):
    config.depth_config.num_hidden_layers = num_hidden_layers
    depth = UniTokDepthTransformer(config).eval()
    codes = depth.generate(states, lambda logits, k: logits.argmax(dim=-1))
    assert torch.equal(depth(states, codes).argmax(dim=-1), codes)


@torch.no_grad()
@pytest.mark.parametrize("branches", [1, 2])
def test_cached_steps_give_the_teacher_forced_logits(depth, codes, branches):
    states, seen, order = torch.randn(branches * N, LLM_WIDTH), [], []

    def choose(logits, k):
        seen.append(logits)
        order.append(k)
        return codes[:, k]

    assert torch.equal(depth.generate(states, choose), codes)
    assert order == list(range(K))
    expected = depth(states, codes.repeat(branches, 1))
    torch.testing.assert_close(torch.stack(seen, dim=1), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("k", range(K))
def test_a_code_changes_only_the_logits_after_it_and_the_last_none(depth, states, codes, k):
    other = codes.clone()
    other[:, k] = (other[:, k] + 1) % V
    assert changed(depth(states, codes), depth(states, other)) == list(range(k + 1, K))


@torch.no_grad()
@pytest.mark.parametrize("k", range(K - 1))
def test_each_code_is_embedded_by_a_table_of_its_own(depth, states, k):
    same = torch.full((N, K), 7)
    before = depth(states, same)
    depth.embeddings.weight[k * V + 7] += 1
    assert changed(before, depth(states, same)) == list(range(k + 1, K))


@pytest.mark.parametrize(
    "name, value",
    [
        ("attention_bias", True),
        ("mlp_bias", True),
        ("attention_dropout", 0.1),
        ("head_dim", 24),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0}),
    ],
)
def test_layers_of_another_kind_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"The depth transformer does not take {name} "):
        UniTokDepthConfig(**{name: value})
    kept = UniTokDepthConfig(attention_bias=False, hidden_size=32)
    assert UniTokDepthConfig(**kept.to_dict()).to_dict() == kept.to_dict()


def test_heads_of_odd_width_are_refused():
    with pytest.raises(StrictDataclassError, match=r"hidden_size \(30\) over num_attention_heads \(2\) is odd"):
        UniTokDepthConfig(hidden_size=30, num_attention_heads=2)


def test_attention_that_drawing_steps_would_not_compute_is_refused(depth):
    with pytest.raises(ValueError, match="takes eager, sdpa, .* or a hub kernel, got 'sliding'. For the LLM alone"):
        depth.set_attn_implementation("sliding")
    depth.set_attn_implementation("paged|eager")
    assert depth.llama_config._attn_implementation == "eager"


@torch.no_grad()
def test_rows_are_independent_and_the_state_reaches_every_code(depth, states, codes):
    before = depth(states, codes)
    states[2] += 1
    after = depth(states, codes)
    assert changed(before[2:3], after[2:3]) == list(range(K))
    others = [0, 1, 3, 4]
    torch.testing.assert_close(after[others], before[others], rtol=1e-6, atol=1e-6)
