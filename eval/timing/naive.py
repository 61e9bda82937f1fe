"""Plain implementations of the jobs of `eval.speed` with the same weights, to compare time and results.

There are no KV caches: each image position and each text token recomputes the whole prefix, and the depth transformer
recomputes the codes of the current position for each code. Sub-codebooks are processed in a loop, and upsampling is
nearest-neighbour followed by a 3x3 convolution. The functions use the model's own modules. Only `tokenizer_forward` is
differentiable.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaModel

from unitok_mllm import UniTokMLLMForConditionalGeneration, UniTokModel, UniTokMultiCodebookQuantizer
from unitok_mllm.modeling_unitok import UniTokOutput


def nearest_codes(quantizer: UniTokMultiCodebookQuantizer, features: torch.Tensor) -> torch.Tensor:
    """Find the nearest codes (B, K, L) of features (B, L, dim), one sub-codebook after another."""
    chunks = features.float().chunk(len(quantizer.codebooks), dim=-1)
    codes = [
        (F.normalize(chunk, dim=-1) @ F.normalize(codebook.float(), dim=-1).T).argmax(dim=-1)
        for chunk, codebook in zip(chunks, quantizer.codebooks, strict=True)
    ]
    return torch.stack(codes, dim=1)


def code_vectors(quantizer: UniTokMultiCodebookQuantizer, codes: torch.Tensor) -> torch.Tensor:
    """Look up the vectors (B, L, dim) of codes (B, K, L), in the codebooks' dtype, one sub-codebook after another."""
    vectors = [
        F.normalize(codebook.float(), dim=-1)[indices]
        for codebook, indices in zip(quantizer.codebooks, codes.unbind(dim=1), strict=True)
    ]
    return torch.cat(vectors, dim=-1).to(quantizer.codebooks.dtype)


def encode(tokenizer: UniTokModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Encode pixels (B, 3, H, W) in [-1, 1] to codes (B, K, L)."""
    vision = tokenizer.vision_model
    return nearest_codes(vision.quantizer, vision.encode_features(pixel_values))


def upsample(conv: nn.Conv2d, hidden_states: torch.Tensor) -> torch.Tensor:
    """Upsample by 2 (nearest), then apply the 3x3 convolution: (B, C, h, w) -> (B, C', 2 h, 2 w)."""
    return F.conv2d(F.interpolate(hidden_states, scale_factor=2, mode="nearest"), conv.weight, conv.bias, padding=1)


def reconstruct(tokenizer: UniTokModel, semantic_embeds: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """Run the decoder: (B, h * w, C) -> (B, 3, 16 h, 16 w)."""
    decoder = tokenizer.decoder
    hidden_states = decoder.norm(decoder.blocks(semantic_embeds)).transpose(1, 2).unflatten(2, grid_size)
    hidden_states = upsample(decoder.up_conv1.conv, hidden_states)
    for stage in (decoder.up_conv2, decoder.up_conv3):
        first, *others = stage
        shortcut = upsample(first.shortcut.conv, hidden_states)
        hidden_states = F.gelu(first.conv1_1x1(first.pre_norm(hidden_states)))
        hidden_states = F.gelu(first.conv2_kxk(upsample(first.up.conv, hidden_states)))
        hidden_states = shortcut + first.conv3_1x1(hidden_states)
        for block in others:
            hidden_states = block(hidden_states)
    stem = decoder.up_conv4
    return stem.conv2(F.gelu(stem.norm1(upsample(stem.conv1.conv, hidden_states))))


def decode(tokenizer: UniTokModel, codes: torch.Tensor) -> torch.Tensor:
    """Decode codes (B, K, L) of square images to pixels (B, 3, H, W), clamped to [-1, 1]."""
    vision, side = tokenizer.vision_model, math.isqrt(codes.shape[-1])
    semantic_embeds = vision.post_quant_proj(code_vectors(vision.quantizer, codes))
    return reconstruct(tokenizer, semantic_embeds, (side, side)).clamp(-1, 1)


def tokenizer_forward(
    tokenizer: UniTokModel, pixel_values: torch.Tensor, input_ids: torch.Tensor | None = None
) -> UniTokOutput:
    """Compute the output of `UniTokModel.forward` for training, without the entropy loss and the code statistics."""
    vision = tokenizer.vision_model
    quantizer = vision.quantizer
    features = vision.encode_features(pixel_values)
    vectors, vq_loss = [], 0.0
    with torch.autocast(features.device.type, enabled=False):
        codes = nearest_codes(quantizer, features.detach())
        chunks = features.float().chunk(len(quantizer.codebooks), dim=-1)
        for chunk, codebook, indices in zip(chunks, quantizer.codebooks, codes.unbind(dim=1), strict=True):
            chunk, vector = F.normalize(chunk, dim=-1), F.normalize(codebook.float(), dim=-1)[indices]
            vq_loss += F.mse_loss(vector, chunk.detach()) + quantizer.beta * F.mse_loss(vector.detach(), chunk)
            vectors.append(chunk + (vector - chunk).detach())
    semantic_embeds = vision.post_quant_proj(torch.cat(vectors, dim=-1).to(features.dtype))
    has_text = input_ids is not None
    return UniTokOutput(
        reconstruction=reconstruct(tokenizer, semantic_embeds, vision.grid_size(pixel_values)),
        codes=codes,
        vq_loss=vq_loss / len(vectors),
        image_embeds=vision.pool(semantic_embeds),
        text_embeds=tokenizer.get_text_features(input_ids).pooler_output if has_text else None,
        logit_scale=tokenizer.logit_scale.clamp(0, math.log(100)).exp() if has_text else None,
    )


def depth_llama(model: UniTokMLLMForConditionalGeneration) -> LlamaModel:
    """Build a transformers `LlamaModel` that shares the weights of the depth transformer's layers."""
    weights = {n: w for n, w in model.depth_head.state_dict().items() if n.startswith(("layers.", "norm."))}
    config = model.config.depth_config.llama_config(model.depth_head.num_codebooks)
    llama = LlamaModel(config).to(model.device, model.dtype).eval()
    # only the embedding table, of a single row, has no counterpart
    if llama.load_state_dict(weights, strict=False, assign=True) != (["embed_tokens.weight"], []):
        raise ValueError(f"The depth transformer is no stack of Llama layers: {', '.join(weights)}.")
    return llama


def draw(
    model: UniTokMLLMForConditionalGeneration,
    depth: LlamaModel,
    input_ids: torch.Tensor,
    unconditional_input_ids: torch.Tensor,
    guidance_scale: float,
    num_positions: int,
) -> torch.Tensor:
    """Draw greedily with guidance, recomputing everything at each position.

    Args:
        model: the MLLM.
        depth: see `depth_llama`.
        input_ids: ids of the prompts, (B, T), without padding and images.
        unconditional_input_ids: ids of the null prompts, (B, T), without padding and images.
        guidance_scale: scale of classifier-free guidance.
        num_positions: number of positions to draw.

    Returns:
        The codes, (B, K, num_positions), int64.
    """
    head = model.depth_head
    prompts = torch.cat([model.embed(ids)[0] for ids in (input_ids, unconditional_input_ids)])
    groups: list[torch.Tensor] = []
    for _ in range(num_positions):
        inputs_embeds = prompts
        if groups:
            drawn = model.embedder(torch.stack(groups, dim=2))
            inputs_embeds = torch.cat([prompts, drawn.repeat(2, 1, 1)], dim=1)
        state = model.get_decoder()(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state[:, -1]
        depth_inputs, group = head.in_proj(state)[:, None], []
        for k in range(head.num_codebooks):
            hidden_states = depth(inputs_embeds=depth_inputs, use_cache=False).last_hidden_state[:, -1]
            conditional, unconditional = head.head(hidden_states).float().chunk(2)
            group.append((unconditional + guidance_scale * (conditional - unconditional)).argmax(dim=-1))
            if k + 1 < head.num_codebooks:
                embeds = head.embeddings(group[-1] + k * head.codebook_size)
                depth_inputs = torch.cat([depth_inputs, embeds.repeat(2, 1)[:, None]], dim=1)
        groups.append(torch.stack(group, dim=1))
    return torch.stack(groups, dim=2)


def answer(
    model: UniTokMLLMForConditionalGeneration,
    input_ids: torch.Tensor,
    num_tokens: int,
    suppressed: list[int],
    pixel_values: torch.Tensor | None = None,
    image_codes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Answer greedily, (B, T) -> (B, num_tokens), recomputing the whole sequence and all its logits for each token."""
    if pixel_values is not None:
        image_codes = encode(model.visual, pixel_values)
    sequence = input_ids
    for _ in range(num_tokens):
        logits = model(input_ids=sequence, image_codes=image_codes, use_cache=False).logits[:, -1]
        logits[:, [token for token in suppressed if token < logits.shape[-1]]] = -math.inf
        sequence = torch.cat([sequence, logits.argmax(dim=-1, keepdim=True)], dim=1)
    return sequence[:, input_ids.shape[1] :]
