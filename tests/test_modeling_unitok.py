"""The visual tokenizer: encoding, decoding, embeddings, saving and loading."""

import copy
import logging
import math

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    CLIPTextModelWithProjection,
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    set_seed,
)

from unitok_mllm import UniTokConfig, UniTokModel, UniTokVisionConfig, UniTokVisionModel
from unitok_mllm.modeling_unitok import MAX_PIXELS, UniTokAttentionProjection, UniTokUpsampleConv, vitamin_encoder


TEXTS = torch.tensor([[1, 7, 9, 2, 0, 0], [1, 250, 8, 30, 40, 2]])  # <s> words </s> padding


def randomize(model):
    """Weights and biases large enough that no part of the model is without effect."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.add_(0.1 * noise)
            elif parameter.dim() == 2 or parameter.shape[-1] in (1, 3):
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model


@pytest.fixture
def model(visual_tokenizer):
    return randomize(visual_tokenizer)


def assert_same_state(model, other):
    state, other_state = model.state_dict(), other.state_dict()
    assert state.keys() == other_state.keys()
    assert [name for name in state if not torch.equal(state[name], other_state[name])] == []


# --- images to codes and back ---


def test_many_images_are_encoded_and_decoded_a_bounded_number_at_a_time(model, images):
    batches, sizes = [], []
    model.vision_model.encoder.register_forward_hook(lambda module, args, output: batches.append(len(args[0])))
    model.decoder.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    with torch.no_grad():
        codes = model.encode(images)
        pixels = model.decode(codes)
        assert torch.equal(model.encode(images, max_pixels=3 * 48 * 48), codes)
        torch.testing.assert_close(model.decode(codes, max_pixels=3 * 48 * 48), pixels)
        assert torch.equal(model.vision_model.encode(images, max_pixels=1), codes)
        assert batches == [4, 3, 1, 1, 1, 1, 1] and sizes == [4, 3, 1]
        wide = torch.cat([images, images.flip(-1)], dim=-1)
        torch.testing.assert_close(
            model.decode(model.encode(wide, max_pixels=1), (48, 96), max_pixels=1),
            model.decode(model.encode(wide), (48, 96)),
        )
        many = images[:1].expand(MAX_PIXELS // 48**2 + 1, -1, -1, -1)  # one more than are taken at a time
        batches.clear()
        assert (model.encode(many) == codes[:1]).all() and batches == [MAX_PIXELS // 48**2, 1]


@pytest.mark.parametrize("size", [(48, 48), (64, 64), (48, 80)])
def test_decoded_codes_equal_the_eval_forward_at_any_size(model, size):
    pixel_values = torch.rand(2, 3, *size) * 2 - 1
    with torch.no_grad():
        output = model(pixel_values)
        codes = model.encode(pixel_values)
        decoded = model.decode(codes, size)
    assert torch.equal(codes, output.codes) and codes.shape == (2, 4, size[0] // 16 * size[1] // 16)
    assert output.reconstruction.abs().max() > 1  # so that the clamp is seen
    torch.testing.assert_close(decoded, output.reconstruction.clamp(-1, 1), rtol=1e-4, atol=1e-5)
    if size[0] == size[1]:
        assert torch.equal(model.decode(codes), decoded)
    else:
        assert not torch.equal(model.decode(codes, size[::-1]).transpose(2, 3), decoded)


@pytest.mark.parametrize("size", [(512, 512), (256, 384)])
def test_the_tiny_preset_takes_large_and_oblong_images(size):
    model = UniTokModel(UniTokConfig.preset("tiny")).eval()
    pixel_values = torch.rand(1, 3, *size) * 2 - 1
    with torch.no_grad():
        output = model(pixel_values)
        decoded = model.decode(output.codes, size)
    assert decoded.shape == pixel_values.shape
    torch.testing.assert_close(decoded, output.reconstruction.clamp(-1, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.encode(torch.zeros(1, 3, 48, 50)), "size 48x50 is not a multiple of the stride 16"),
        (lambda m: m(torch.zeros(1, 3, 40, 48)), "size 40x48 is not a multiple of the stride 16"),
        (lambda m: m.vision_model(torch.zeros(1, 3, 0, 48)), "size 0x48"),
        (lambda m: m.encode(torch.zeros(1, 4, 48, 48)), r"\(B, 3, H, W\), got \(1, 4, 48, 48\)"),
        (lambda m: m.encode(torch.zeros(3, 48, 48)), r"got \(3, 48, 48\)"),
        (lambda m: m.decode(torch.zeros(1, 4, 15).long()), "15 positions do not make a square"),
        (
            lambda m: m.decode(torch.zeros(1, 4, 15).long(), (48, 64)),
            "48x64 with stride 16 does not have 15 positions",
        ),
        (lambda m: m.decode(torch.zeros(1, 4, 15).long(), (50, 80)), "50x80 with stride 16"),
        (lambda m: m.decode(torch.zeros(1, 5, 9).long()), r"\(B, 4, L\), got torch.int64 of shape \(1, 5, 9\)"),
    ],
)
def test_sizes_that_do_not_fit_raise_and_name_the_numbers(visual_tokenizer, call, message):
    with pytest.raises(ValueError, match=message):
        call(visual_tokenizer)


def test_out_of_range_codes_raise_on_the_way_to_pixels(visual_tokenizer):
    with pytest.raises(IndexError, match="Codes go from 0 to 32, but each sub-codebook has codes 0 to 31"):
        visual_tokenizer.decode(torch.arange(36).clamp_max(32).view(1, 4, 9))


def test_forward_returns_every_named_part(model, images):
    with torch.no_grad():
        bare = model(images)
        full = model(images, TEXTS, with_entropy=True, with_reconstruction_embeds=True)
        reconstruction_embeds = model.get_image_features(full.reconstruction).pooler_output
    assert set(full.keys()) - set(bare.keys()) == {"text_embeds", "entropy_loss", "reconstruction_embeds"}
    assert torch.equal(full.image_embeds, model.get_image_features(images).pooler_output)
    assert torch.equal(full.text_embeds, model.get_text_features(TEXTS).pooler_output)
    assert torch.equal(full.reconstruction_embeds, reconstruction_embeds)
    for embeds in (full.image_embeds, full.text_embeds):
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(len(embeds)))
    with torch.no_grad():
        model.logit_scale.fill_(10.0)
    assert model(images).logit_scale.item() == pytest.approx(100)
    training = model.train()(images, TEXTS).logit_scale
    assert training.item() == pytest.approx(math.exp(10)) and torch.autograd.grad(training, model.logit_scale)[0] > 0
    model.clamp_logit_scale()
    assert model.logit_scale.item() == pytest.approx(math.log(100))
    assert isinstance(model(images, return_dict=False), tuple)


def test_the_tower_gives_the_semantic_embeddings_of_the_codes(model, images):
    with torch.no_grad():
        output = model.vision_model(images)
        semantic = model.vision_model.embed_codes(model.encode(images))
        pooled = model.vision_model.pool(semantic)
    torch.testing.assert_close(output.last_hidden_state, semantic, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.pooler_output, pooled, rtol=1e-4, atol=1e-5)
    assert output.hidden_states is None


def test_the_towers_hidden_states_are_those_of_its_blocks_then_the_semantic_embeddings(model, images):
    tower = model.vision_model
    with torch.no_grad():
        output = tower(images, output_hidden_states=True)
        tokens = tower.encoder(images)
        chosen = tower(images, output_hidden_states=[-2]).hidden_states
    assert len(output.hidden_states) == tower.config.num_hidden_layers + 1
    assert output.hidden_states[-1] is output.last_hidden_state
    torch.testing.assert_close(tower.encoder.norm(output.hidden_states[-2]), tokens)
    assert not torch.allclose(output.hidden_states[0], output.hidden_states[-2])
    assert [state is None for state in chosen] == [True, False, True] and torch.equal(
        chosen[-2], output.hidden_states[-2]
    )
    tower.config.output_hidden_states = True
    assert len(tower(images).hidden_states) == 3 and len(tower(images, return_dict=False)) == 3
    with pytest.raises(ValueError, match="gives no attention weights"):
        tower(images, output_attentions=True)
    with pytest.raises(TypeError, match="'pixel_value'.*Did you mean"):
        tower(images, pixel_value=images)


# --- text tower ---


def test_a_text_is_pooled_at_its_end_token(model):
    features = model.get_text_features(TEXTS).pooler_output
    changed = TEXTS.clone()
    changed[0, 4:] = 77  # behind the end: without effect
    changed[1, 3] = 31  # before the end, though behind the largest id
    other = model.get_text_features(changed).pooler_output
    torch.testing.assert_close(other[0], features[0])
    assert (other[1] - features[1]).abs().max() > 1e-3
    mask = TEXTS.ne(0).long()
    torch.testing.assert_close(model.get_text_features(TEXTS, attention_mask=mask).pooler_output, features)


def test_text_features_equal_clips_own_with_an_end_token_that_it_knows(tokenizer_config):
    tokenizer_config.text_config.eos_token_id = 3
    model = UniTokModel(tokenizer_config).eval()
    texts = TEXTS.masked_fill(TEXTS == 2, 3)
    clip = CLIPTextModelWithProjection(tokenizer_config.text_config).eval()
    clip.load_state_dict(model.text_model.state_dict())
    torch.testing.assert_close(
        model.get_text_features(texts).pooler_output, F.normalize(clip(texts).text_embeds, dim=-1)
    )


def test_without_a_text_tower_text_features_raise_and_all_else_works(tokenizer_config, images, tmp_path):
    tokenizer_config.text_config = None
    model = UniTokModel(tokenizer_config).eval()
    with pytest.raises(ValueError, match="no text tower"):
        model.get_text_features(TEXTS)
    with pytest.raises(ValueError, match="no text tower"):
        model(images, TEXTS)
    assert model(images).logit_scale is None
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert_same_state(loaded, model)
    assert torch.equal(loaded.encode(images), model.encode(images))


# --- building blocks ---


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 4)])
def test_upsample_convolution_equals_nearest_upsampling_and_convolution(size):
    layer = UniTokUpsampleConv(3, 5)
    inputs = torch.randn(2, 3, *size, requires_grad=True)
    wanted = (inputs, layer.conv.weight, layer.conv.bias)
    upsampled = F.interpolate(inputs, scale_factor=2.0, mode="nearest")
    expected = F.conv2d(upsampled, layer.conv.weight, layer.conv.bias, padding=1)
    output = layer(inputs)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad((output * upstream).sum(), wanted),
        torch.autograd.grad((expected * upstream).sum(), wanted),
        rtol=1e-5,
        atol=1e-5,
    )


def test_encoder_is_timms_vitamin():
    small = UniTokVisionConfig(
        image_size=64,
        stem_width=64,
        stage_dims=(64, 128),
        hidden_size=384,
        num_hidden_layers=2,
        num_attention_heads=6,
        quantizer_dim=24,
    )
    encoder = vitamin_encoder(small).eval()
    reference = timm.create_model(
        "vitamin_small_224",
        img_size=64,
        depth=2,
        num_classes=0,
        global_pool="",
        fc_norm=False,
        pos_embed="none",
        act_layer="gelu_tanh",
    ).eval()
    encoder.load_state_dict(reference.state_dict())
    pixel_values = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixel_values), reference(pixel_values))


def loop_attention(attn, hidden_states):
    """The attention of one sequence (L, in_dim), head by head and query by query."""
    width = len(attn.q_bias)
    dims = width // attn.num_heads
    query, key, value = F.linear(hidden_states, attn.qkv.weight).split(width, dim=-1)
    query, value = query + attn.q_bias, value + attn.v_bias
    heads = []
    for head in range(attn.num_heads):
        part = slice(head * dims, (head + 1) * dims)
        rows = []
        for i in range(len(hidden_states)):
            end = i + 1 if attn.causal else len(hidden_states)
            scores = key[:end, part] @ query[i, part] / dims**0.5
            rows.append(scores.softmax(dim=0) @ value[:end, part])
        heads.append(torch.stack(rows))
    if not attn.narrowing:
        return attn.proj(torch.cat(heads, dim=-1))
    mean = sum(heads) / len(heads)
    return attn.proj(mean.unflatten(1, (attn.out_dim, -1)).mean(dim=-1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("in_dim, out_dim, heads", [(24, 6, 2), (24, 8, 3), (6, 24, 3), (12, 12, 4)])
def test_attention_projection_equals_a_loop_over_heads_and_queries(in_dim, out_dim, heads, causal):
    projection = randomize(UniTokAttentionProjection(in_dim, out_dim, heads, causal))
    hidden_states = torch.randn(2, 5, in_dim)
    attended = torch.stack([loop_attention(projection.attn, row) for row in projection.norm1(hidden_states)])
    expected = attended + projection.proj(projection.norm3(hidden_states))
    mlp = projection.mlp
    inner = mlp.norm(projection.norm2(expected))
    expected = expected + mlp.w2(F.gelu(mlp.w0(inner), approximate="tanh") * mlp.w1(inner))
    torch.testing.assert_close(projection(hidden_states), expected)


@pytest.mark.parametrize("in_dim, out_dim", [(24, 6), (6, 24)])
def test_causal_projections_see_no_later_token_and_full_ones_see_all(in_dim, out_dim):
    hidden_states = torch.randn(1, 5, in_dim)
    changed = hidden_states.clone()
    changed[:, 3] = torch.randn(in_dim)
    for causal in (True, False):
        projection = randomize(UniTokAttentionProjection(in_dim, out_dim, 3, causal))
        moved = (projection(changed) - projection(hidden_states)).abs().amax(dim=(0, 2)) > 1e-6
        assert moved.tolist() == ([False] * 3 + [True] * 2 if causal else [True] * 5)


@pytest.mark.parametrize("prefix", [1, 3])
def test_cached_projection_equals_the_uncached_one(prefix):
    projection = randomize(UniTokAttentionProjection(6, 24, 3, causal=True))
    hidden_states, cache = torch.randn(2, 7, 6), DynamicCache()
    parts = [projection(hidden_states[:, :prefix], cache)]
    parts += [projection(hidden_states[:, i : i + 1], cache) for i in range(prefix, 7)]
    torch.testing.assert_close(torch.cat(parts, dim=1), projection(hidden_states))


def test_heads_that_do_not_divide_the_width_raise():
    with pytest.raises(ValueError, match=r"width \(24\) is not a multiple of its heads \(5\)"):
        UniTokAttentionProjection(6, 24, 5, causal=False)


@pytest.mark.parametrize("causal, quant_proj", [(True, "attention"), (False, "attention"), (False, "linear")])
def test_config_chooses_the_projections(tokenizer_config, images, causal, quant_proj):
    config = tokenizer_config
    config.vision_config.causal_projection, config.vision_config.quant_proj = causal, quant_proj
    model = randomize(UniTokModel(config)).eval()
    codes = model.encode(images)
    changed = codes.clone()
    changed[:, :, -1] = (codes[:, :, -1] + 1) % 32
    embed = model.vision_model.embed_codes
    moved = (embed(changed) - embed(codes)).abs().amax(dim=(0, 2)) > 1e-6
    assert moved.tolist() == [not causal and quant_proj == "attention"] * 8 + [True]
    torch.testing.assert_close(model.decode(codes), model(images).reconstruction.clamp(-1, 1), rtol=1e-4, atol=1e-5)


# --- training ---


def training_loss(model, images, texts):
    output = model(images, texts, with_entropy=True)
    similarity = output.logit_scale * output.image_embeds[: len(texts)] @ output.text_embeds.T
    contrastive = F.cross_entropy(similarity, torch.arange(len(texts)))
    return F.mse_loss(output.reconstruction, images) + output.vq_loss + 0.1 * output.entropy_loss + contrastive


def test_a_training_pass_with_texts_reaches_every_parameter(model, images):
    model.train()
    training_loss(model, images, TEXTS).backward()
    untouched = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == []


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
def test_gradient_checkpointing_recomputes_and_changes_no_gradient(tokenizer_config, images, drop_path_rate):
    tokenizer_config.vision_config.drop_path_rate = drop_path_rate
    plain = randomize(UniTokModel(tokenizer_config)).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable()
    assert checkpointed.vision_model.gradient_checkpointing and checkpointed.decoder.gradient_checkpointing
    calls = {}
    gradients = []
    for model in (plain, checkpointed):
        vision = model.vision_model
        blocks = {
            "convolutions": vision.encoder.patch_embed.backbone.stages[0],
            "encoder": vision.encoder.blocks[0],
            "decoder": model.decoder.blocks[0],
            "text": model.text_model.text_model.encoder.layers[0].mlp,
        }
        counts = calls[model] = dict.fromkeys(blocks, 0)
        for name, block in blocks.items():
            block.register_forward_pre_hook(
                lambda *_, counts=counts, name=name: counts.update({name: counts[name] + 1})
            )
        set_seed(3)
        training_loss(model, images, TEXTS).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert set(calls[plain].values()) == {1} and set(calls[checkpointed].values()) == {2}
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")
    checkpointed.eval()
    with torch.no_grad():
        checkpointed.encode(images)
    assert calls[checkpointed]["encoder"] == 3


def test_a_frozen_tokenizer_in_train_mode_is_bit_identical_after_training_something_else(model, images):
    model.requires_grad_(False).train()
    before = copy.deepcopy(model)
    head = nn.Linear(64, 3)
    initial = head.weight.clone()
    optimizer = torch.optim.AdamW([*head.parameters(), *model.parameters()], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        head(model.vision_model(images).last_hidden_state).square().mean().backward()
        model(images, TEXTS, with_entropy=True)
        optimizer.step()
    assert not torch.equal(head.weight, initial)
    assert_same_state(model, before)
    assert torch.equal(model.encode(images), before.encode(images))


def test_a_bfloat16_model_takes_float32_pixels_and_gives_mostly_the_same_codes(model, images):
    codes = model.encode(images)
    half = copy.deepcopy(model).bfloat16()
    half_codes = half.encode(images)
    assert (half_codes == codes).float().mean() > 0.8
    output = half(images, TEXTS, with_entropy=True)
    assert torch.equal(output.codes, half_codes)
    assert output.reconstruction.dtype == torch.bfloat16 and output.vq_loss.dtype == torch.float32
    pixels = model.decode(codes)
    error = (half.decode(codes).float() - pixels).square().mean()
    assert error < 1e-3 * pixels.square().mean()
    assert (
        F.cosine_similarity(
            half.get_text_features(TEXTS).pooler_output.float(), model.get_text_features(TEXTS).pooler_output
        ).min()
        > 0.999
    )


# --- saving and loading ---


def test_save_and_load_is_bit_identical(model, images, tmp_path):
    model.train()(images)  # fills the usage statistics
    model.eval().save_pretrained(tmp_path)
    for loaded in (UniTokModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(loaded) is UniTokModel and not loaded.training
        assert_same_state(loaded, model)
        with torch.no_grad():
            expected, output = model(images, TEXTS), loaded(images, TEXTS)
        for name in ("codes", "reconstruction", "image_embeds", "text_embeds", "codebook_usage"):
            assert torch.equal(output[name], expected[name]), name
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert (half.encode(images) == model.encode(images)).float().mean() > 0.8


@pytest.fixture
def library_log(caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_the_tower_loads_from_a_tokenizers_folder_and_from_its_own(model, images, tmp_path, library_log):
    model.save_pretrained(tmp_path / "tokenizer")
    tower = UniTokVisionModel.from_pretrained(tmp_path / "tokenizer")
    tower.save_pretrained(tmp_path / "tower")
    for loaded in (tower, AutoModel.from_pretrained(tmp_path / "tower")):
        assert type(loaded) is UniTokVisionModel
        assert_same_state(loaded, model.vision_model)
        assert torch.equal(loaded(images).pooler_output, model.get_image_features(images).pooler_output)
    assert library_log.text == ""


def test_the_tokenizer_loads_from_an_mllms_folder(mllm, images, tmp_path, library_log):
    mllm.save_pretrained(tmp_path)
    loaded = UniTokModel.from_pretrained(tmp_path)
    assert_same_state(loaded, mllm.visual)
    assert torch.equal(loaded.encode(images), mllm.encode_images(images))
    assert library_log.text == ""


@pytest.mark.parametrize(
    "name", ["decoder.norm.weight", "vision_model.quantizer.codebooks", "text_model.text_projection.weight"]
)
def test_missing_unexpected_and_misshapen_weights_are_loud(visual_tokenizer, tmp_path, library_log, name):
    visual_tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    tensor = state.pop(name)
    save_file(state | {"decoder.surplus": tensor}, path, metadata={"format": "pt"})
    _, info = UniTokModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {name} and info["unexpected_keys"] == {"decoder.surplus"}
    assert name in library_log.text and "MISSING" in library_log.text and "decoder.surplus" in library_log.text
    save_file(state | {name: tensor[1:].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        UniTokModel.from_pretrained(tmp_path)
    assert name in library_log.text


def test_misspelt_arguments_of_the_tokenizer_and_the_tower_are_refused(visual_tokenizer, images):
    for model, name, hint in (
        (visual_tokenizer, "pixels", ""),
        (visual_tokenizer, "output_hidden_state", " Did you mean 'output_hidden_states'?"),
        (visual_tokenizer.vision_model, "interpolate_pos_encodings", ""),
    ):
        message = f"{type(model).__name__}.forward got an unexpected keyword argument {name!r}.{hint}"
        with pytest.raises(TypeError, match=message.replace("?", r"\?")):
            model(images, **{name: True})
    assert visual_tokenizer.vision_model(images, output_hidden_states=True, return_dict=True).hidden_states


def test_misspelt_fields_of_configs_are_refused(tokenizer_config):
    with pytest.raises(
        TypeError, match="UniTokVisionConfig got unexpected arguments: hiden_size. It takes image_size,"
    ):
        UniTokConfig(vision_config={"hiden_size": 64})
    with pytest.raises(TypeError, match="UniTokConfig got unexpected arguments: decoder_layer."):
        UniTokConfig(decoder_layer=3)
    assert UniTokConfig(**tokenizer_config.to_dict()).to_dict() == tokenizer_config.to_dict()


# --- inside another library model ---


def test_stock_llava_reads_images_through_the_tower_and_trains_its_projector(llama_config, tokenizer_config, images):
    config = LlavaConfig(
        vision_config=tokenizer_config.vision_config,
        text_config=llama_config,
        image_token_index=299,
        image_seq_length=9,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    llava = LlavaForConditionalGeneration(config).train()
    tower = randomize(llava.model.vision_tower)
    assert type(tower) is UniTokVisionModel
    tower.requires_grad_(False)
    input_ids = torch.tensor([[1, *[299] * 9, 20, 21, 22, 2], [1, *[299] * 9, 30, 31, 32, 2]])
    projector = copy.deepcopy(llava.model.multi_modal_projector)
    frozen = copy.deepcopy(tower)
    optimizer = torch.optim.SGD([p for p in llava.parameters() if p.requires_grad], lr=0.1)
    output = llava(input_ids=input_ids, pixel_values=images[:2], labels=input_ids.masked_fill(input_ids == 299, -100))
    output.loss.backward()
    optimizer.step()
    for name, parameter in llava.model.multi_modal_projector.named_parameters():
        assert not torch.equal(parameter, projector.get_parameter(name)), name
    assert_same_state(tower, frozen)
    llava.eval()
    with torch.no_grad():
        logits = [llava(input_ids=input_ids, pixel_values=pair).logits[:, -1] for pair in (images[:2], images[2:])]
    assert (logits[0] - logits[1]).abs().amax(dim=-1).min() > 1e-5
