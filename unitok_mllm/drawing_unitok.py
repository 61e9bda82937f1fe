"""How one image is drawn: for each of its L positions a step of the LLM, then K of the depth transformer.

    prompts -> LLM -> state -> depth transformer -> K codes -> embedder -> LLM -> state -> ...

`UniTokGuidance` lays the prompts that guidance compares into one batch and combines their logits, `UniTokCodeSampler`
chooses codes, and `UniTokDrawing` runs the model: `prefill` goes through the prompts, `step` from one position to the
next. `UniTokDrawingParts` holds the modules in the form that is fastest on the device; made once, it serves several
drawings.
"""

import numpy as np
import torch
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, StaticLayer
from transformers.generation.logits_process import LogitsProcessorList

from .cuda_graph_unitok import UniTokCudaGraph, static_cache
from .growing_cache_unitok import growing_cache
from .packing_unitok import pack_linears


def uniform_noise(seeds: list[int], num_return_sequences: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The random numbers that samples are drawn with: (prompts * num_return_sequences, *shape), in [0, 1).

    Those of sample j of a prompt depend on that prompt's seed and on j alone, not on its neighbours in the batch.
    """
    draws = [
        np.random.default_rng((seed, j)).random(shape, dtype=np.float32)
        for seed in seeds
        for j in range(num_return_sequences)
    ]
    return torch.from_numpy(np.stack(draws))


def sample_codes(logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draws from softmax(logits) by inverting its cumulative sum: logits (B, V), noise (B,) in [0, 1) -> (B,).

    `torch.multinomial` takes its numbers from one generator for the whole batch, so that a sample would depend on the
    rows beside it. Here each row brings its own.
    """
    cumulative = logits.float().softmax(dim=-1).cumsum(dim=-1)
    return torch.searchsorted(cumulative, noise[:, None] * cumulative[:, -1:], right=True).squeeze(1)


class UniTokGuidance:
    """Prompts in R branches of one batch: the condition, then those that guidance leads away from.

    Args:
        branches: embeddings (B, T, D) and mask (B, T) of each; T may differ.
        scales: guidance scales, of each branch but the first.
        num_return_sequences: how often each row is repeated.

    Attributes:
        inputs_embeds, attention_mask: (R * B * num_return_sequences, T, D) and (..., T), padded on the left.
    """

    def __init__(
        self, branches: list[tuple[torch.Tensor, torch.Tensor]], scales: list[float], num_return_sequences: int
    ):
        self.scales, self.num_branches = scales, len(branches)
        length = max(mask.shape[1] for _, mask in branches)
        embeds = [F.pad(embeds, (0, 0, length - embeds.shape[1], 0)) for embeds, _ in branches]
        masks = [F.pad(mask, (length - mask.shape[1], 0)) for _, mask in branches]
        self.inputs_embeds, self.attention_mask = (
            torch.cat(rows).repeat_interleave(num_return_sequences, dim=0) for rows in (embeds, masks)
        )

    def combine(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of all branches (R * B, V) -> guided ones (B, V), float32."""
        logits, *others = logits.float().chunk(self.num_branches)
        return logits + sum((scale - 1) * (logits - other) for scale, other in zip(self.scales, others))

    def repeat(self, embeds: torch.Tensor) -> torch.Tensor:
        """What all branches go on with: (B, T, D) -> (R * B, T, D)."""
        return embeds.repeat(self.num_branches, 1, 1)


class UniTokCodeSampler:
    """Chooses codes from logits (B, V): the likeliest, or by noise (B,) in [0, 1) from what the warpers leave.

    Args:
        warpers: temperature, top-k and top-p; None for the likeliest code.
    """

    def __init__(self, warpers: LogitsProcessorList | None):
        self.warpers = warpers

    def __call__(self, logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        if self.warpers is None:
            return logits.argmax(dim=-1)
        logits = logits - logits.amax(dim=-1, keepdim=True)  # so that no temperature makes infinity of them
        return sample_codes(self.warpers(None, logits), noise)


class UniTokDrawingParts:
    """The LLM's decoder, the embedder and the depth transformer, on a CPU with weights in oneDNN's blocked layout.

    The layout is a copy of the weights: make this anew when they change.
    """

    def __init__(self, model: PreTrainedModel):
        modules = model.get_decoder(), model.embedder, model.depth_head
        self.llm, self.embedder, self.depth_head = (pack_linears(module) for module in modules)


def has_keys(cache: Cache) -> bool:
    """Whether any of its layers keeps keys and values (a dynamic one without layers will); a Mamba's keep a state."""
    return not cache.layers or any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)


class UniTokDrawing:
    """A drawing under way.

    The keys and values of a step are kept in one of three ways, all of which give the same codes: preallocated and of
    fixed length, so that the step can be recorded as a CUDA graph; preallocated and growing; or not at all, so that
    every step goes through everything again.

    Args:
        model: the MLLM.
        parts: its modules.
        num_positions: how many will be drawn.
        use_cache: False for the third way.
        cuda_graph: False for the second way even where the first is possible.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        parts: UniTokDrawingParts,
        guidance: UniTokGuidance,
        sampler: UniTokCodeSampler,
        num_positions: int,
        use_cache: bool,
        cuda_graph: bool,
    ):
        self.guidance, self.sampler = guidance, sampler
        self.llm, self.embedder, self.depth_head = parts.llm, parts.embedder, parts.depth_head
        self.attention_mask = F.pad(guidance.attention_mask, (0, num_positions), value=1)
        self.position_ids = (self.attention_mask.long().cumsum(dim=1) - 1).clamp_min(0)
        length = self.attention_mask.shape[1]
        fixed_cache = static_cache(model, length) if use_cache and cuda_graph else None
        self._advance, self.is_fixed = self._next_group, fixed_cache is not None
        if self.is_fixed:
            self.cache, self.embedder_cache = fixed_cache, Cache(layers=[StaticLayer(num_positions)])
            self._advance = UniTokCudaGraph(self._next_group)
        elif use_cache:
            self.llm, self.cache = growing_cache(self.llm, length)
            self.embedder_cache = DynamicCache()
        else:
            self.cache = self.embedder_cache = None

    def prefill(self, noise: torch.Tensor) -> torch.Tensor:
        """The codes (B, K) of the first position; noise (B, K) as of `UniTokCodeSampler`."""
        return self._after(self.guidance.inputs_embeds, noise)

    def step(self, groups: list[torch.Tensor], noise: torch.Tensor) -> torch.Tensor:
        """The codes (B, K) of the position after those drawn so far, (B, K) each."""
        if self.cache is None:
            drawn = self._embed(torch.stack(groups, dim=2))
            return self._after(torch.cat([self.guidance.inputs_embeds, drawn], dim=1), noise)
        end = self.guidance.inputs_embeds.shape[1] + len(groups)
        mask = self.attention_mask if self.is_fixed else self.attention_mask[:, :end]
        if not has_keys(self.cache):
            mask = None  # padding is behind a state
        return self._advance(groups[-1], mask, self.position_ids[:, end - 1 : end], noise)

    def _after(self, inputs_embeds: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The codes (B, K) of the position after these inputs from the first on, (R * B, T, D)."""
        end = inputs_embeds.shape[1]
        mask = self.attention_mask if self.is_fixed else self.attention_mask[:, :end]
        return self._choose(inputs_embeds, mask, self.position_ids[:, :end], noise)

    def _next_group(self, group, attention_mask, position_ids, noise) -> torch.Tensor:
        return self._choose(self._embed(group[:, :, None]), attention_mask, position_ids, noise)

    def _embed(self, codes: torch.Tensor) -> torch.Tensor:
        """(B, K, l) -> (R * B, l, D)."""
        return self.guidance.repeat(self.embedder(codes, self.embedder_cache))

    def _choose(self, inputs_embeds, attention_mask, position_ids, noise) -> torch.Tensor:
        hidden_states = self.llm(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=self.cache,
            use_cache=self.cache is not None,
        ).last_hidden_state[:, -1]
        return self.depth_head.generate(
            hidden_states, lambda logits, k: self.sampler(self.guidance.combine(logits), noise[:, k])
        )


__all__ = [
    "UniTokCodeSampler",
    "UniTokDrawing",
    "UniTokDrawingParts",
    "UniTokGuidance",
    "has_keys",
    "sample_codes",
    "uniform_noise",
]
