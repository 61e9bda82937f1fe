"""The depth transformer: predicts the K codes of one image position from one LLM state, code after code.

UniTok (https://arxiv.org/abs/2502.20321, section 3.3), after RQ-Transformer (https://arxiv.org/abs/2203.01941).
Input 1 is the LLM's state at the *previous* position, input k + 1 the embedding of code k; input k predicts code k.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from .configuration_unitok import UniTokMLLMConfig


# Implementations of the plain causal attention that drawing steps compute with torch's own; hub kernels ("owner/name") too.
SAME_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")


class UniTokDepthTransformer(nn.Module):
    """A few causal Llama layers over the K codes of a position, with one output layer shared by all codes.

    Args:
        config: `depth_config` has the layers' sizes, `text_config` the width D of the LLM's states, `visual_config` K
            and V.
    """

    def __init__(self, config: UniTokMLLMConfig):
        super().__init__()
        vision = config.visual_config.vision_config
        self.num_codebooks, self.codebook_size = vision.num_codebooks, vision.codebook_size
        self.llama_config = llama_config = config.depth_config.llama_config(self.num_codebooks)
        self.set_attn_implementation(config.depth_config._attn_implementation or "sdpa")
        width, llm_width = llama_config.hidden_size, config.llm_sizes.hidden_size
        self.in_proj = nn.Identity() if width == llm_width else nn.Linear(llm_width, width, bias=False)
        self.embeddings = nn.Embedding((self.num_codebooks - 1) * self.codebook_size, width)  # one table per code
        self.layers = nn.ModuleList(
            [LlamaDecoderLayer(llama_config, i) for i in range(llama_config.num_hidden_layers)]
        )
        self.norm = nn.RMSNorm(width, eps=llama_config.rms_norm_eps)
        for layer in self.layers:  # torch's own norm is one kernel on CUDA, and keeps no float32 copy for backward
            layer.input_layernorm = nn.RMSNorm(width, eps=llama_config.rms_norm_eps)
            layer.post_attention_layernorm = nn.RMSNorm(width, eps=llama_config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(llama_config)
        self.head = nn.Linear(width, self.codebook_size)

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Set the library's attention function for teacher-forced passes. Drawing steps always call torch's own.

        Args:
            attn_implementation: a name that the library knows, such as "sdpa" or "eager". "paged|" in front is left
                out: paged caches serve texts, which never come here.

        Raises:
            ValueError: another kind of attention, which drawing steps would not compute.
        """
        name = attn_implementation.removeprefix("paged|")
        if name not in SAME_ATTENTION and "/" not in name:
            raise ValueError(
                f"The depth transformer takes {', '.join(SAME_ATTENTION)} or a hub kernel, got {attn_implementation!r}. "
                "For the LLM alone: model.language_model.set_attn_implementation(...)."
            )
        self.llama_config._attn_implementation = name

    def _positions(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rotary cosines and sines of inputs 1..K."""
        position_ids = torch.arange(self.num_codebooks, device=hidden_states.device)[None]
        return self.rotary_emb(hidden_states, position_ids=position_ids)

    def forward(self, hidden_states: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Compute teacher-forced logits.

        Args:
            hidden_states: (N, D), the LLM's states at the positions before the N image positions.
            codes: (N, K), the true codes, integers in [0, V); the last code of a position is not used.

        Returns:
            (N, K, V), the logits of each code.
        """
        offsets = self.codebook_size * torch.arange(self.num_codebooks - 1, device=codes.device)
        inputs_embeds = torch.cat(
            [self.in_proj(hidden_states)[:, None], self.embeddings(codes[:, :-1] + offsets)], dim=1
        )
        position_embeddings = self._positions(inputs_embeds)
        attention_mask = create_causal_mask(
            config=self.llama_config, inputs_embeds=inputs_embeds, attention_mask=None, cache=None, position_ids=None
        )
        for layer in self.layers:
            inputs_embeds = layer(
                inputs_embeds, attention_mask=attention_mask, position_embeddings=position_embeddings
            )
        return self.head(self.norm(inputs_embeds))

    def generate(
        self,
        hidden_states: torch.Tensor,
        choose: Callable[[torch.Tensor, int], torch.Tensor],
        passes: list[Callable[[torch.Tensor], torch.Tensor]] | None = None,
    ) -> torch.Tensor:
        """Choose the K codes of one position with a key/value cache, in K passes of one input each.

        Args:
            hidden_states: (R * B, D), the LLM's states, R guidance branches one after the other.
            choose: a function of the logits (R * B, V) and the index of the codebook (from 0) that returns the codes
                (B,). All branches continue with the same codes.
            passes: what `passes` returned for states of this shape; None to call it here.

        Returns:
            (B, K), int64.
        """
        inputs, codes = hidden_states, []
        for k, logits_of in enumerate(passes or self.passes(hidden_states)):
            codes.append(choose(logits_of(inputs), k))
            inputs = codes[-1].repeat(len(hidden_states) // len(codes[-1]))
        return torch.stack(codes, dim=1)

    def passes(self, hidden_states: torch.Tensor) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        """Prepare the K passes of a position. They share a key/value cache, and can be used for many positions.

        Args:
            hidden_states: (N, D); only its shape, dtype and device matter.

        Returns:
            K functions that return the logits (N, V) of one code each. The first takes the states, (N, D), the others
            the codes before theirs, (N,).
        """
        cosines, sines = (table[0] for table in self._positions(hidden_states))
        first, second = sines.chunk(2, dim=-1)
        rotation = cosines, torch.cat([-first, second], dim=-1)
        dtype = hidden_states.dtype
        if hidden_states.device.type == "cpu":
            dtype = torch.promote_types(dtype, torch.float32)  # see `growing_cache_unitok`
        caches = [
            hidden_states.new_empty((2, len(hidden_states), heads, self.num_codebooks, width), dtype=dtype)
            for heads, width in (
                (layer.self_attn.config.num_key_value_heads, layer.self_attn.head_dim) for layer in self.layers
            )
        ]
        return [partial(self._pass, k, rotation, caches) for k in range(self.num_codebooks)]

    def _pass(
        self,
        k: int,
        rotation: tuple[torch.Tensor, torch.Tensor],
        caches: list[torch.Tensor],
        inputs: torch.Tensor,
    ) -> torch.Tensor:
        hidden_states = self.in_proj(inputs) if k == 0 else self.embeddings(inputs + (k - 1) * self.codebook_size)
        for layer, cache in zip(self.layers, caches):
            hidden_states = self._step(layer, hidden_states, k, rotation, cache)
        return self.head(self.norm(hidden_states))

    @staticmethod
    def _step(
        layer: LlamaDecoderLayer,
        hidden_states: torch.Tensor,
        k: int,
        rotation: tuple[torch.Tensor, torch.Tensor],
        cache: torch.Tensor,
    ) -> torch.Tensor:
        """One cached decoding step of a layer for input k, (N, D) -> (N, D).

        Replaces `LlamaDecoderLayer.forward`, because its masks, caches and rotary tables cost more small operations
        than the layer itself computes: a drawing calls it K times for each position. It knows the layers that
        `UniTokDepthConfig` can describe: no biases, no attention dropout, RoPE of the default type over whole heads.

        Args:
            rotation: rotary cosines, and sines of which the first half is negative, (K, head_dim) each.
            cache: keys and values, (2, N, heads, K, head_dim); gets those of input k.
        """
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden_states)
        query, key, value = (
            projection(normed).unflatten(-1, (-1, attention.head_dim))  # (N, heads, head_dim)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        num_heads, num_kv_heads = query.shape[1], key.shape[1]
        both = torch.cat([query, key], dim=1)
        cosines, sines = rotation
        both = torch.addcmul(both * cosines[k], both.roll(attention.head_dim // 2, -1), sines[k])
        query, cache[0, :, :, k] = both.split([num_heads, num_kv_heads], dim=1)
        cache[1, :, :, k] = value
        keys, values = cache[:, :, :, : k + 1]
        query = query[:, :, None].to(keys.dtype)
        attended = F.scaled_dot_product_attention(
            query, keys, values, scale=attention.scaling, enable_gqa=num_heads != num_kv_heads
        )
        hidden_states = hidden_states + attention.o_proj(attended.flatten(1).to(hidden_states.dtype))
        return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))


__all__ = ["UniTokDepthTransformer"]
