"""How one image is drawn: for each of its L positions a step of the LLM, then K of the depth transformer.

    prompts -> LLM -> state -> depth transformer -> K codes -> embedder -> LLM -> state -> ...

`UniTokDrawingOptions` says how codes are chosen, `UniTokGuidance` lays the prompts that guidance compares into one batch
and combines their logits, `UniTokCodeSampler` chooses codes, and `UniTokDrawing` runs the model: `prefill` goes through
the prompts, `step` from one position to the next.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from numbers import Real

import numpy as np
import torch
from torch.nn import functional as F
from transformers import Cache, GenerationConfig
from transformers.cache_utils import CacheLayerMixin
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import logging

from .fast_drawing_unitok import UniTokDrawingParts


logger = logging.get_logger(__name__)

# The `image_generation` that new models get in their generation config (chosen with the shipped model).
IMAGE_GENERATION = {"guidance_scale": 3.0, "temperature": 0.7, "top_k": 20}
# What `image_generation` may hold.
SAMPLING = ("guidance_scale", "image_guidance_scale", "do_sample", "temperature", "top_k", "top_p")
# About text alone, yet passed for drawings too by the library's pipelines (or written into every config).
TEXT_OPTIONS = {"max_new_tokens", "max_length", "pad_token_id", "bos_token_id", "eos_token_id", "transformers_version"}
MAX_GUIDANCE = 1e6  # logits times it stay finite in float32
MIN_TEMPERATURE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class UniTokDrawingOptions:
    """How an image is drawn.

    Each is an argument of `generate_image_codes`. A model's own defaults of the first six stand in its generation config,
    as a dict `image_generation`, apart from those of text.

    Attributes:
        guidance_scale: how closely to follow the words. 1: no guidance, one branch. Above 1:
            `uncond + scale * (cond - uncond)`, another branch.
        image_guidance_scale: how closely to follow the images of the prompts, in the same way, with a branch of its own.
        do_sample: False for the likeliest code each time.
        temperature, top_k, top_p: as in transformers; `top_k` 0 keeps all codes.
        num_return_sequences: samples for each prompt.
        num_positions: code groups to draw; None for a whole image (L).
        seed: one for all prompts or one for each; None to take it from torch's generator. Sample j of a prompt depends on
            its seed and on j alone, not on its neighbours in the batch.
        use_cache: False to compute everything anew at each step (slow; gives the same codes).
        cuda_graph: False to launch all kernels of each step from Python (slow; gives the same codes), as is done where no
            graph is possible: see `cuda_graph_unitok`.

    Raises:
        ValueError: one is out of its range.
    """

    guidance_scale: float = 1.0
    image_guidance_scale: float = 1.0
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_return_sequences: int = 1
    num_positions: int | None = None
    seed: int | list[int] | None = None
    use_cache: bool = True
    cuda_graph: bool = True

    def __post_init__(self):
        temperatures = f"above 0 (do_sample=False is greedy), from {MIN_TEMPERATURE:.2g}, and finite"
        scales = f"at least 1 (1: no guidance) and at most {MAX_GUIDANCE:g}"
        for name, is_valid, expected in (
            ("guidance_scale", lambda scale: 1 <= scale <= MAX_GUIDANCE, scales),
            ("image_guidance_scale", lambda scale: 1 <= scale <= MAX_GUIDANCE, scales),
            ("temperature", lambda value: MIN_TEMPERATURE <= value < float("inf"), temperatures),
            ("top_k", lambda value: value >= 0, "at least 0 (0: all codes)"),
            ("top_p", lambda value: 0 < value <= 1, "above 0 and at most 1"),
            ("num_return_sequences", lambda value: value >= 1, "at least 1"),
            ("num_positions", lambda value: value is None or value >= 1, "at least 1"),
        ):
            value = getattr(self, name)
            if not isinstance(value, Real | None) or not is_valid(value):
                raise ValueError(f"{name} must be {expected}, got {value!r}.")

    @classmethod
    def resolve(
        cls,
        model_config: GenerationConfig,
        config: GenerationConfig | None = None,
        without: Iterable[str] = (),
        **options,
    ) -> "UniTokDrawingOptions":
        """Those of a call: its arguments, then its `generation_config`, then the model's, then the defaults above.

        Of a `generation_config`, `image_generation` counts before the options beside it, which are meant for text too.
        Those of them that the model's own has too (a pipeline passes them all) are looked at only where the model has no
        `image_generation`.

        Args:
            model_config: the model's.
            config: the call's.
            without: scales of guidance that there is no prompt for: the model's own is left out, with a warning.
            options: the call's arguments; None counts as not given.

        Raises:
            ValueError: a config has an option that drawing does not know, or one is out of its range.
            TypeError: an argument that drawing does not know.
        """
        own, given, of_text = image_generation(model_config), {}, {}
        if config is not None:
            known, text = {field.name for field in fields(cls)}, model_config.to_dict()
            beside = {n: v for n, v in config.to_diff_dict().items() if v is not None and not n.startswith("_")}
            beside.pop("image_generation", None)
            new = {name: value for name, value in beside.items() if name not in text or value != text[name]}
            if foreign := new.keys() - known - TEXT_OPTIONS:
                raise ValueError(f"Drawing does not know these options of the generation_config: {sorted(foreign)}.")
            if not own:
                of_text = {name: value for name, value in beside.items() if name in known and name not in new}
            given = {name: value for name, value in new.items() if name in known}
            given |= {n: v for n, v in image_generation(config).items() if n not in own or v != own[n]}
        given |= {name: value for name, value in options.items() if value is not None}
        for name in own.keys() & without:
            scale = own.pop(name)
            if name not in given and scale > 1:
                logger.warning_once(f"Drawn without the model's own {name} of {scale}: there is no prompt for it.")
        return cls(**of_text | own | given)

    def warpers(self) -> LogitsProcessorList | None:
        """Temperature, top-k and top-p as the library computes them; None for the likeliest code."""
        if not self.do_sample:
            return None
        warpers = LogitsProcessorList([TemperatureLogitsWarper(float(self.temperature))])
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        return warpers


def image_generation(config: GenerationConfig) -> dict:
    """The `image_generation` of a generation config, without what is None; empty where it has none.

    Raises:
        ValueError: it is no dict of options that it may hold, or one is out of its range.
    """
    options = vars(config).get("image_generation") or {}
    if not isinstance(options, dict):
        raise ValueError(f"image_generation must be a dict of drawing options, got {options!r:.100}.")
    for name in options.keys() - SAMPLING:
        nearest = get_close_matches(str(name), SAMPLING, 1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(SAMPLING)}."
        raise ValueError(f"image_generation has no {name!r}: {hint}")
    options = {name: value for name, value in options.items() if value is not None}
    UniTokDrawingOptions(**options)
    return options


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
    """Chooses the codes of one drawing from logits (B, V), one after the other.

    Each is the likeliest, or by noise (B,) in [0, 1) one of those that the warpers leave.

    Args:
        warpers: temperature, top-k and top-p; None for the likeliest code.
        processors: the caller's, applied before the warpers. They get the codes drawn so far, (B, n), position after
            position with the K codes of each in their order (so that code n is of sub-codebook n % K, whose codes share
            their numbers with the others'), and the logits (B, V) after guidance, float32.
    """

    def __init__(self, warpers: LogitsProcessorList | None, processors: LogitsProcessorList | None = None):
        self.warpers, self.processors, self.drawn = warpers, processors, None

    def __call__(self, logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """
        Raises:
            ValueError: the processors leave no code.
        """
        if not self.processors:
            return self._choose(logits, noise)
        if self.drawn is None:
            self.drawn = torch.zeros(len(logits), 0, dtype=torch.long, device=logits.device)
        logits = self.processors(self.drawn, logits)
        if not (logits > -torch.inf).any(dim=-1).all():
            raise ValueError(f"The logits_processor leaves no code to draw after {self.drawn.shape[1]} codes.")
        codes = self._choose(logits, noise)
        self.drawn = torch.cat([self.drawn, codes[:, None]], dim=1)
        return codes

    def _choose(self, logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        if self.warpers is None:
            return logits.argmax(dim=-1)
        logits = logits - logits.amax(dim=-1, keepdim=True)  # so that no temperature makes infinity of them
        return sample_codes(self.warpers(None, logits), noise)


def has_keys(cache: Cache) -> bool:
    """Whether any of its layers keeps keys and values (a dynamic one without layers will); a Mamba's keep a state."""
    return not cache.layers or any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)


class UniTokDrawing:
    """A drawing under way.

    Args:
        parts: the model's modules, of `prepare_drawing`.
        num_positions: how many will be drawn.
        use_cache, cuda_graph: as of `UniTokDrawingOptions`.
    """

    def __init__(
        self,
        parts: UniTokDrawingParts,
        guidance: UniTokGuidance,
        sampler: UniTokCodeSampler,
        num_positions: int,
        use_cache: bool,
        cuda_graph: bool,
    ):
        self.guidance, self.sampler = guidance, sampler
        self.embedder, self.depth_head = parts.embedder, parts.depth_head
        self.attention_mask = F.pad(guidance.attention_mask, (0, num_positions), value=1)
        self.position_ids = (self.attention_mask.long().cumsum(dim=1) - 1).clamp_min(0)
        self.caches = parts.begin(self.attention_mask.shape[1], num_positions, use_cache, cuda_graph)
        self._advance = self.caches.recorded(self._next_group)

    def prefill(self, noise: torch.Tensor) -> torch.Tensor:
        """The codes (B, K) of the first position; noise (B, K) as of `UniTokCodeSampler`."""
        return self._after(self.guidance.inputs_embeds, noise)

    def step(self, groups: list[torch.Tensor], noise: torch.Tensor) -> torch.Tensor:
        """The codes (B, K) of the position after those drawn so far, (B, K) each."""
        if self.caches.llm_cache is None:
            drawn = self._embed(torch.stack(groups, dim=2))
            return self._after(torch.cat([self.guidance.inputs_embeds, drawn], dim=1), noise)
        end = self.guidance.inputs_embeds.shape[1] + len(groups)
        mask = self.attention_mask if self.caches.is_fixed else self.attention_mask[:, :end]
        if not has_keys(self.caches.llm_cache):
            mask = None  # padding is behind a state
        return self._advance(groups[-1], mask, self.position_ids[:, end - 1 : end], noise)

    def _after(self, inputs_embeds: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The codes (B, K) of the position after these inputs from the first on, (R * B, T, D)."""
        end = inputs_embeds.shape[1]
        mask = self.attention_mask if self.caches.is_fixed else self.attention_mask[:, :end]
        return self._choose(inputs_embeds, mask, self.position_ids[:, :end], noise)

    def _next_group(self, group, attention_mask, position_ids, noise) -> torch.Tensor:
        return self._choose(self._embed(group[:, :, None]), attention_mask, position_ids, noise)

    def _embed(self, codes: torch.Tensor) -> torch.Tensor:
        """(B, K, l) -> (R * B, l, D)."""
        return self.guidance.repeat(self.embedder(codes, self.caches.embedder_cache))

    def _choose(self, inputs_embeds, attention_mask, position_ids, noise) -> torch.Tensor:
        cache = self.caches.llm_cache
        hidden_states = self.caches.llm(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=cache is not None,
        ).last_hidden_state[:, -1]
        return self.depth_head.generate(
            hidden_states, lambda logits, k: self.sampler(self.guidance.combine(logits), noise[:, k])
        )


__all__ = [
    "IMAGE_GENERATION",
    "UniTokCodeSampler",
    "UniTokDrawing",
    "UniTokDrawingOptions",
    "UniTokGuidance",
    "has_keys",
    "image_generation",
    "sample_codes",
    "uniform_noise",
]
