"""Lower bounds on the bytes that each job must move, see `least_bytes` in `eval.speed`."""

import torch
from torch import nn

from unitok_mllm import UniTokMLLMForConditionalGeneration, UniTokModel


def nbytes(*tensors: torch.Tensor) -> int:
    """Return the size of tensors in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def weight_bytes(*modules: nn.Module) -> int:
    """Count the bytes of all parameters, shared ones once. Embeddings are left out, since only a few rows are read."""
    layers = [layer for module in modules for layer in module.modules() if not isinstance(layer, nn.Embedding)]
    return nbytes(*{id(p): p for layer in layers for p in layer.parameters(recurse=False)}.values())


@torch.no_grad()
def cache_bytes(mllm: UniTokMLLMForConditionalGeneration) -> int:
    """Count the bytes of one token's keys and values in all layers of the LLM."""
    width = mllm.config.text_config.hidden_size
    embeds = torch.zeros(1, 1, width, dtype=mllm.dtype, device=mllm.device)
    cache = mllm.get_decoder()(inputs_embeds=embeds, use_cache=True).cache
    return nbytes(*[tensor for layer in cache.layers for tensor in (layer.keys, layer.values)])


def encode_bytes(tokenizer: UniTokModel, pixel_values: torch.Tensor, codes: torch.Tensor) -> int:
    """Count the bytes of encoding: weights, pixels and codes."""
    vision = tokenizer.vision_model
    return weight_bytes(vision.encoder, vision.quant_proj) + nbytes(vision.quantizer.codebooks, pixel_values, codes)


def decode_bytes(tokenizer: UniTokModel, codes: torch.Tensor, pixels: torch.Tensor) -> int:
    """Count the bytes of decoding: weights, codes and pixels."""
    return weight_bytes(tokenizer.vision_model.post_quant_proj, tokenizer.decoder) + nbytes(codes, pixels)


def draw_bytes(mllm: UniTokMLLMForConditionalGeneration, rows: int, prompt_tokens: int, positions: int) -> int:
    """Count the bytes of drawing. `rows` is the number of prompts times that of guidance branches."""
    head = mllm.depth_head
    depth = weight_bytes(head.in_proj) + head.num_codebooks * weight_bytes(head.layers, head.norm, head.head)
    earlier = sum(prompt_tokens + position - 1 for position in range(1, positions))
    return (
        positions * (weight_bytes(mllm.get_decoder()) + depth)
        + (positions - 1) * weight_bytes(mllm.embedder)
        + rows * earlier * cache_bytes(mllm)
    )


def answer_bytes(mllm: UniTokMLLMForConditionalGeneration, rows: int, prompt_tokens: int, tokens: int) -> int:
    """Count the bytes of an answer's tokens after the first."""
    earlier = sum(prompt_tokens + token - 1 for token in range(1, tokens))
    llm = weight_bytes(mllm.get_decoder(), mllm.get_output_embeddings())
    return (tokens - 1) * llm + rows * earlier * cache_bytes(mllm)


def train_bytes(module: nn.Module) -> int:
    """Count the bytes of a training step with AdamW, without activations.

    The weights are read in the forward pass, the backward pass and the update, and written once. Gradients and both
    moments are each read and written once.
    """
    return 10 * nbytes(*[p for p in module.parameters() if p.requires_grad])
