"""Configurations: presets, ranges and geometry checks, and what is refused by name."""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from unitok_mllm import UniTokConfig, UniTokDepthConfig, UniTokMLLMConfig, UniTokModel, UniTokVisionConfig


def content(config):
    return {
        key: value
        for key, value in json.loads(config.to_json_string(use_diff=False)).items()
        if key != "_name_or_path"
    }


def millions(module):
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: UniTokVisionConfig(image_size=250), r"image_size \(250\) is not a multiple of the stride \(16\)"),
        (lambda: UniTokVisionConfig(image_size=0), r"image_size \(0\) .* stride \(16\)"),
        (
            lambda: UniTokVisionConfig(quantizer_dim=60),
            r"quantizer_dim \(60\) is not a multiple of num_codebooks \(8\)",
        ),
        (lambda: UniTokVisionConfig(num_codebooks=0), r"quantizer_dim \(64\) .* num_codebooks \(0\)"),
        (
            lambda: UniTokVisionConfig(num_attention_heads=15),
            r"hidden_size \(1024\) is not a multiple of num_attention_heads \(15\)",
        ),
        (lambda: UniTokVisionConfig(num_attention_heads=0), r"hidden_size \(1024\) .* num_attention_heads \(0\)"),
        (lambda: UniTokVisionConfig(codebook_size=65537), r"codebook_size \(65537\) .* 65536"),
        (lambda: UniTokVisionConfig(codebook_size=0), r"codebook_size \(0\) .* 65536"),
        (lambda: UniTokVisionConfig(stage_dims=(8, 16, 32)), r"stage_dims \(8, 16, 32\) and stage_depths \(2, 4\)"),
        (lambda: UniTokVisionConfig(quant_proj="mlp"), "'attention' or 'linear', got 'mlp'"),
        (
            lambda: UniTokConfig(vision_config={"projection_dim": 20}, text_config={"projection_dim": 24}),
            r"projection_dim \(24\) is not the vision tower's \(20\)",
        ),
        (lambda: UniTokConfig(vision_config={"image_size": 250}), r"\(250\) .* \(16\)"),
        (
            lambda: UniTokMLLMConfig(embedder_dim=100, embedder_heads=16),
            r"embedder_dim \(100\) .* embedder_heads \(16\)",
        ),
        (lambda: UniTokMLLMConfig(boi_token_id=4), r"boi_token_id \(4\), eoi_token_id \(4\)"),
    ],
)
def test_impossible_geometry_raises_and_names_both_numbers(build, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message) as caught:
        build()
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize(
    "preset, total, encoder, decoder, text",
    [("large", 820.3, 332.3, 352.4, 123.7), ("base", 317.5, 87.0, 99.8, 123.7), ("tiny", 7.9, 2.9, 3.7, 0.5)],
)
def test_presets_have_the_known_sizes(preset, total, encoder, decoder, text):
    with torch.device("meta"):
        model = UniTokModel(UniTokConfig.preset(preset))
    parts = (model, model.vision_model.encoder, model.decoder, model.text_model)
    assert [round(millions(part), 1) for part in parts] == [total, encoder, decoder, text]


def test_preset_takes_overrides_and_names_the_known_ones():
    vision = UniTokConfig.preset("tiny", image_size=96, causal_projection=True).vision_config
    assert (vision.image_size, vision.num_positions, vision.causal_projection) == (96, 36, True)
    assert UniTokConfig.preset("tiny").vision_config.image_size == 64
    config = UniTokConfig.preset("tiny", {"projection_dim": 64, "hidden_size": 32}, projection_dim=64)
    assert config.text_config.hidden_size == 32 and config.vision_config.projection_dim == 64
    assert UniTokConfig.preset("tiny").text_config.hidden_size == 128
    with pytest.raises(ValueError, match="Unknown preset 'huge'; known: large, base, tiny"):
        UniTokConfig.preset("huge")


@pytest.mark.parametrize("with_text", [True, False])
def test_round_trip_through_a_folder_keeps_everything(tokenizer_config, tmp_path, with_text):
    config = tokenizer_config
    config.decoder_layers, config.vision_config.vq_beta = 3, 0.5
    if not with_text:
        config.text_config = None
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is UniTokConfig and loaded.decoder_layers == 3
    assert content(loaded.vision_config) == content(config.vision_config)
    assert content(UniTokVisionConfig.from_pretrained(tmp_path)) == content(config.vision_config)
    if with_text:
        assert content(loaded.text_config) == content(config.text_config)
    else:
        assert loaded.text_config is None


def test_depth_and_decoder_sizes_follow_the_rest_unless_given(llama_config, tokenizer_config):
    assert tokenizer_config.decoder_layers == 2
    same = UniTokMLLMConfig(text_config=llama_config, visual_config=tokenizer_config).depth_config
    assert (same.hidden_size, same.intermediate_size, same.num_attention_heads, same.num_key_value_heads) == (
        64,
        96,
        1,
        1,
    )
    own = UniTokMLLMConfig(
        text_config=llama_config, visual_config=tokenizer_config, depth_config={"hidden_size": 128}
    ).depth_config
    assert (own.hidden_size, own.intermediate_size, own.num_attention_heads) == (128, 512, 2)


def test_an_mllm_config_counts_the_positions_of_an_image(mllm, tmp_path):
    mllm.config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is UniTokMLLMConfig and loaded.num_image_positions == 9
    for part in ("text_config", "visual_config", "depth_config"):
        assert content(getattr(loaded, part)) == content(getattr(mllm.config, part))


@pytest.mark.parametrize("config_class", [UniTokVisionConfig, UniTokConfig, UniTokDepthConfig, UniTokMLLMConfig])
@pytest.mark.attack
def test_absurd_values_in_a_config_are_refused_with_field_and_value(config_class):
    own = config_class.__annotations__.keys() & {field.name for field in dataclasses.fields(config_class)}
    assert len(own) >= 4
    for name, value in itertools.product(sorted(own), (-1, 10**15, -math.inf, math.inf, math.nan, "much")):
        with pytest.raises(StrictDataclassError) as error:
            config_class(**{name: value})
        assert name in str(error.value) and str(value) in str(error.value), (name, value, str(error.value))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: UniTokVisionConfig(stage_dims=(160, -5)), r"stage_dims \(\(160, -5\)\) is not between 1 and 65536"),
        (lambda: UniTokVisionConfig(stage_depths=(0, 4)), r"stage_depths \(\(0, 4\)\) is not between 1 and 1000"),
        (lambda: UniTokVisionConfig(image_size=2**20), r"image_size \(1048576\) is not between 16 and 16384"),
        (lambda: UniTokConfig(text_config={"vocab_size": 10**12}), r"text_config.vocab_size \(1000000000000\)"),
        (lambda: UniTokConfig(text_config={"num_hidden_layers": -3}), r"text_config.num_hidden_layers \(-3\)"),
        (lambda: UniTokDepthConfig(hidden_act="grelu"), r"hidden_act \('grelu'\) is not an activation"),
        (
            lambda: UniTokDepthConfig(hidden_size=100, num_attention_heads=3),
            r"hidden_size \(100\) is not a multiple of num_attention_heads \(3\)",
        ),
        (lambda: UniTokMLLMConfig(boi_token_id=32000, image_token_id=5), r"boi_token_id \(32000\) is not .* 31999"),
        (
            lambda: UniTokMLLMConfig(depth_config={"num_attention_heads": 7}),
            r"hidden_size \(4096\) is not a multiple of num_attention_heads \(7\)",
        ),
        (
            lambda: UniTokMLLMConfig(text_config={"model_type": "llama", "vocab_size": 0}),
            r"text_config.vocab_size \(0\) is not between 1 and 4194304",
        ),
    ],
)
@pytest.mark.attack
def test_parts_and_lists_of_a_config_are_checked_too(build: Callable[[], PreTrainedConfig], message):
    with pytest.raises(StrictDataclassError, match=message):
        build()
