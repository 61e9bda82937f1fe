"""The depth transformer: from one LLM state to the K codes of one image position, code after code.

UniTok (https://arxiv.org/abs/2502.20321, section 3.3), after RQ-Transformer (https://arxiv.org/abs/2203.01941).
Input 1 is the LLM's state at the *previous* position, input k + 1 the embedding of code k; input k predicts code k.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from .configuration_unitok import UniTokMLLMConfig


class UniTokDepthTransformer(nn.Module):
    """A few causal Llama layers over the K codes of a position, with one output layer shared by all codes.

    Args:
        config: `depth_config` gives the layers, `text_config` the width of the LLM's states.
    """

    def __init__(self, config: UniTokMLLMConfig):
        super().__init__()
        vision = config.visual_config.vision_config
        self.num_codebooks, self.codebook_size = vision.num_codebooks, vision.codebook_size
        llama_config = config.depth_config.llama_config(self.num_codebooks)
        llama_config._attn_implementation = "sdpa"
        width, llm_width = llama_config.hidden_size, config.text_config.hidden_size
        self.in_proj = nn.Identity() if width == llm_width else nn.Linear(llm_width, width, bias=False)
        self.embeddings = nn.Embedding((self.num_codebooks - 1) * self.codebook_size, width)  # one table per code
        self.layers = nn.ModuleList(
            [LlamaDecoderLayer(llama_config, i) for i in range(llama_config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(width, eps=llama_config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(llama_config)
        self.head = nn.Linear(width, self.codebook_size)

    def _positions(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rotary cosines and sines of inputs 1..K."""
        position_ids = torch.arange(self.num_codebooks, device=hidden_states.device)[None]
        return self.rotary_emb(hidden_states, position_ids=position_ids)

    def _decode(self, inputs_embeds, position_embeddings, cache: DynamicCache | None = None) -> torch.Tensor:
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_embeddings=position_embeddings, cache=cache)
        return self.head(self.norm(hidden_states))

    def forward(self, hidden_states: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Teacher-forced logits.

        Args:
            hidden_states: (N, D), the LLM's states at the positions before the N image positions.
            codes: (N, K), the true codes; the last one is not looked at.

        Returns:
            (N, K, V).
        """
        offsets = self.codebook_size * torch.arange(self.num_codebooks - 1, device=codes.device)
        inputs_embeds = torch.cat(
            [self.in_proj(hidden_states)[:, None], self.embeddings(codes[:, :-1] + offsets)], dim=1
        )
        return self._decode(inputs_embeds, self._positions(inputs_embeds))

    def generate(
        self, hidden_states: torch.Tensor, choose: Callable[[torch.Tensor, int], torch.Tensor]
    ) -> torch.Tensor:
        """Chooses the K codes of one position with a key/value cache: K passes of one input each.

        Args:
            hidden_states: (R * B, D), the LLM's states, R guidance branches one after the other.
            choose: given the logits (R * B, V) and the code's number (from 0), returns the codes (B,); all branches
                go on with the same.

        Returns:
            (B, K), int64.
        """
        inputs_embeds = self.in_proj(hidden_states)[:, None]
        cosines, sines = self._positions(inputs_embeds)
        cache, codes = DynamicCache(), []
        for k in range(self.num_codebooks):
            logits = self._decode(inputs_embeds, (cosines[:, k : k + 1], sines[:, k : k + 1]), cache)
            codes.append(choose(logits[:, 0], k))
            if k + 1 < self.num_codebooks:
                embeds = self.embeddings(codes[-1] + k * self.codebook_size)
                inputs_embeds = embeds.repeat(len(hidden_states) // len(embeds), 1)[:, None]
        return torch.stack(codes, dim=1)


__all__ = ["UniTokDepthTransformer"]
