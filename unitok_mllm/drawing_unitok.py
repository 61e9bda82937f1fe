"""Draw an image: for each of its L positions one step of the LLM, then K steps of the depth transformer.

    prompts -> LLM -> state -> depth transformer -> K codes -> embedder -> LLM -> state -> ...

`UniTokDrawingOptions` has the options. `UniTokGuidance` puts the prompt and the null prompts of guidance into one
batch, and combines their logits. `UniTokCodeSampler` chooses codes. `UniTokDrawing` runs the model: `prefill` on the
prompts, then `step` from one position to the next.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from numbers import Integral, Real

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

# The `image_generation` in the generation config of new models (chosen with the shipped model).
IMAGE_GENERATION = {"guidance_scale": 3.0, "temperature": 0.7, "top_k": 20}
# Options that `image_generation` may have.
SAMPLING = (
    *("guidance_scale", "image_guidance_scale", "plausibility", "do_sample", "temperature", "top_k", "top_p"),
    "candidates",
)
# Options of text generation that the library's pipelines also pass for drawings, or that it writes into every config.
TEXT_OPTIONS = {"max_new_tokens", "max_length", "pad_token_id", "bos_token_id", "eos_token_id", "transformers_version"}
MAX_GUIDANCE = 1e6  # keeps guided logits finite in float32
MIN_TEMPERATURE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class UniTokDrawingOptions:
    """Options of a drawing.

    All are arguments of `generate_image_codes`. A model's defaults of the first eight are in its generation config, in
    the dict `image_generation`, separate from the options of text.

    Attributes:
        guidance_scale: guidance by the prompt's text. 1 means no guidance and one branch. Above 1, with a second branch,
            the logits are `uncond + scale * (cond - uncond)`.
        image_guidance_scale: guidance by the images in the prompts, by the same formula with a branch of its own.
        plausibility: codes are not drawn if their probability without guidance (at temperature 1) is below this share of
            the likeliest code's; 0 to draw from all, at most 1. Guidance then chooses only where the model itself is
            undecided, so that it does not lead away from pictures that the model knows by heart. This is the adaptive
            plausibility constraint of contrastive decoding (https://arxiv.org/abs/2210.15097, section 3.2), whose alpha
            is 0.1.
        do_sample: False to take the most likely code each time.
        temperature: as in transformers; above 0.
        top_k: as in transformers; 0 keeps all codes.
        top_p: as in transformers; above 0 and at most 1.
        candidates: samples to draw and rank for each prompt, at least `num_return_sequences`, of which the best are
            returned; see `ranking_unitok`. 1 to draw only what is returned, without ranking.
        num_return_sequences: drawings to return for each prompt.
        num_positions: positions to draw; None for a whole image (L).
        seed: one for all prompts or one for each; None to draw it from torch's generator. Sample j of a prompt depends
            only on the seed and on j, not on other rows of the batch.
        use_cache: False to recompute the whole sequence at each step (slow; gives the same codes).
        cuda_graph: False to launch all kernels of each step from Python (slow; gives the same codes). This also
            happens if no graph is possible: see `cuda_graph_unitok`.

    Raises:
        ValueError: an option outside its range.
    """

    guidance_scale: float = 1.0
    image_guidance_scale: float = 1.0
    plausibility: float = 0.0
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    candidates: int = 1
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
            ("plausibility", lambda value: 0 <= value <= 1, "at least 0 (0: all codes) and at most 1"),
            ("temperature", lambda value: MIN_TEMPERATURE <= value < float("inf"), temperatures),
            ("top_k", lambda value: value >= 0, "at least 0 (0: all codes)"),
            ("top_p", lambda value: 0 < value <= 1, "above 0 and at most 1"),
            ("candidates", lambda value: isinstance(value, Integral) and value >= 1, "an integer of at least 1"),
            ("num_return_sequences", lambda value: value >= 1, "at least 1"),
            ("num_positions", lambda value: value is None or value >= 1, "at least 1"),
        ):
            value = getattr(self, name)
            if not isinstance(value, Real | None) or not is_valid(value):
                raise ValueError(f"{name} must be {expected}, got {value!r}.")
        if 1 < self.candidates < self.num_return_sequences:
            raise ValueError(
                f"candidates must be at least num_return_sequences ({self.num_return_sequences}), got {self.candidates}."
            )
        if self.candidates > 1 and self.num_positions is not None:
            raise ValueError(
                f"candidates are ranked as whole images: num_positions must be None, got {self.num_positions}."
            )

    @property
    def num_samples(self) -> int:
        """Number of samples drawn for each prompt."""
        return max(self.candidates, self.num_return_sequences)

    @property
    def log_plausibility(self) -> float:
        """Logarithm of `plausibility`: the least log-likelihood of a code, relative to the likeliest one."""
        return math.log(self.plausibility) if self.plausibility else -math.inf

    @classmethod
    def resolve(
        cls,
        model_config: GenerationConfig,
        config: GenerationConfig | None = None,
        without: Iterable[str] = (),
        **options,
    ) -> "UniTokDrawingOptions":
        """Collect the options of a call. The first source that has an option decides: arguments, configs, defaults.

        The order is: the call's arguments, its `generation_config`, the model's generation config, the defaults above.
        In a `generation_config`, `image_generation` precedes the options beside it, which are for text too. If such an
        option equals the model's (a pipeline passes all of them), it is used only if the model has no
        `image_generation`.

        Args:
            model_config: the model's generation config.
            config: the call's `generation_config`.
            without: guidance scales for which there is no null prompt, and `candidates` if there is no text to rank
                by: the model's own value is ignored, with a warning.
            options: the call's arguments; None means not given.

        Raises:
            ValueError: a config has an option that drawing does not know, or an option is outside its range.
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
        """Return temperature, top-k and top-p as the library's processors; None for the most likely code."""
        if not self.do_sample:
            return None
        warpers = LogitsProcessorList([TemperatureLogitsWarper(float(self.temperature))])
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        return warpers


def image_generation(config: GenerationConfig) -> dict:
    """Read and check the `image_generation` of a generation config.

    Returns:
        Its options other than None; an empty dict if there are none.

    Raises:
        ValueError: it is not a dict, or has an unknown option or one outside its range.
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
    """Draw the random numbers of all samples. Those of sample j of a prompt depend only on the prompt's seed and on j.

    Args:
        seeds: one for each prompt.
        num_return_sequences: samples for each prompt.
        shape: shape of one sample's numbers.

    Returns:
        (prompts * num_return_sequences, *shape), float32 in [0, 1).
    """
    draws = [
        np.random.default_rng((seed, j)).random(shape, dtype=np.float32)
        for seed in seeds
        for j in range(num_return_sequences)
    ]
    return torch.from_numpy(np.stack(draws))


def sample_codes(logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Sample from softmax(logits) by inverting its cumulative distribution.

    `torch.multinomial` takes its random numbers from one generator for the whole batch, so that a sample would depend
    on the other rows. Here each row has its own number.

    Args:
        logits: (B, V).
        noise: (B,), uniform in [0, 1).

    Returns:
        (B,), int64.
    """
    cumulative = logits.float().softmax(dim=-1).cumsum(dim=-1)
    return torch.searchsorted(cumulative, noise[:, None] * cumulative[:, -1:], right=True).squeeze(1)


def keep_plausible(guided: torch.Tensor, logits: torch.Tensor, log_plausibility: float | torch.Tensor) -> torch.Tensor:
    """Exclude codes that are too unlikely without guidance, see `plausibility` in `UniTokDrawingOptions`.

    Args:
        guided: guided logits, (B, V).
        logits: logits without guidance, (B, V).
        log_plausibility: log-likelihood that a code needs, relative to the likeliest one, or one for each row, (B, 1).

    Returns:
        The guided logits, (B, V), with -inf for excluded codes.
    """
    return guided.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + log_plausibility, -torch.inf)


class UniTokGuidance:
    """Classifier-free guidance: the prompts and their null prompts, as R branches of one batch.

    Args:
        branches: embeddings (B, T, D) and mask (B, T) of each branch, the prompts' first; T may differ.
        scales: guidance scale of each branch but the first.
        num_return_sequences: samples for each prompt.
        log_plausibility: see `keep_plausible`.

    Attributes:
        inputs_embeds: (R * B * num_return_sequences, T, D), padded on the left.
        attention_mask: (R * B * num_return_sequences, T).
    """

    def __init__(
        self,
        branches: list[tuple[torch.Tensor, torch.Tensor]],
        scales: list[float],
        num_return_sequences: int,
        log_plausibility: float = -math.inf,
    ):
        self.scales, self.num_branches, self.log_plausibility = scales, len(branches), log_plausibility
        length = max(mask.shape[1] for _, mask in branches)
        embeds = [F.pad(embeds, (0, 0, length - embeds.shape[1], 0)) for embeds, _ in branches]
        masks = [F.pad(mask, (length - mask.shape[1], 0)) for _, mask in branches]
        self.inputs_embeds, self.attention_mask = (
            torch.cat(rows).repeat_interleave(num_return_sequences, dim=0) for rows in (embeds, masks)
        )

    def combine(self, logits: torch.Tensor) -> torch.Tensor:
        """Combine the logits of all branches (R * B, V) to guided ones (B, V), float32."""
        logits, *others = logits.float().chunk(self.num_branches)
        guided = logits + sum((scale - 1) * (logits - other) for scale, other in zip(self.scales, others))
        return guided if self.log_plausibility == -math.inf else keep_plausible(guided, logits, self.log_plausibility)

    def repeat(self, embeds: torch.Tensor) -> torch.Tensor:
        """Repeat embeddings for all branches: (B, T, D) -> (R * B, T, D)."""
        return embeds.repeat(self.num_branches, 1, 1)


class UniTokCodeSampler:
    """Choose the codes of one drawing, one after the other.

    Args:
        warpers: temperature, top-k and top-p; None to take the most likely code.
        processors: the caller's, applied before the warpers. They get the codes so far, (B, n), and the guided logits
            (B, V), float32. The codes are in the order of positions, K for each: code n is of sub-codebook n % K, and
            all sub-codebooks use the same numbers.
    """

    def __init__(self, warpers: LogitsProcessorList | None, processors: LogitsProcessorList | None = None):
        self.warpers, self.processors, self.drawn = warpers, processors, None

    def __call__(self, logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Choose one code for each row.

        Args:
            logits: (B, V).
            noise: (B,), uniform in [0, 1).

        Returns:
            (B,), int64.

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
        logits = logits - logits.amax(dim=-1, keepdim=True)  # avoids infinities at low temperatures
        return sample_codes(self.warpers(None, logits), noise)


def has_keys(cache: Cache) -> bool:
    """Return whether a layer of a cache stores keys and values, or will (dynamic caches). Mamba layers store a state."""
    return not cache.layers or any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)


class UniTokDrawing:
    """One drawing of a batch: its caches and its steps.

    Args:
        parts: the model's modules, from `prepare_drawing`.
        guidance: the prompts.
        sampler: chooses codes.
        num_positions: positions to draw.
        use_cache: see `UniTokDrawingOptions`.
        cuda_graph: see `UniTokDrawingOptions`.
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
        """Draw the codes (B, K) of the first position, with noise (B, K), uniform in [0, 1)."""
        return self._after(self.guidance.inputs_embeds, noise)

    def step(self, groups: list[torch.Tensor], noise: torch.Tensor) -> torch.Tensor:
        """Draw the codes (B, K) of the position after the `groups` so far, (B, K) each."""
        if self.caches.llm_cache is None:
            drawn = self._embed(torch.stack(groups, dim=2))
            return self._after(torch.cat([self.guidance.inputs_embeds, drawn], dim=1), noise)
        end = self.guidance.inputs_embeds.shape[1] + len(groups)
        mask = self.attention_mask if self.caches.is_fixed else self.attention_mask[:, :end]
        if not has_keys(self.caches.llm_cache):
            mask = None  # a recurrent state already excludes the padding
        return self._advance(groups[-1], mask, self.position_ids[:, end - 1 : end], noise)

    def _after(self, inputs_embeds: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Draw the codes (B, K) of the position after the whole sequence of inputs, (R * B, T, D)."""
        end = inputs_embeds.shape[1]
        mask = self.attention_mask if self.caches.is_fixed else self.attention_mask[:, :end]
        return self._choose(inputs_embeds, mask, self.position_ids[:, :end], noise)

    def _next_group(self, group, attention_mask, position_ids, noise) -> torch.Tensor:
        return self._choose(self._embed(group[:, :, None]), attention_mask, position_ids, noise)

    def _embed(self, codes: torch.Tensor) -> torch.Tensor:
        """Embed codes for all branches: (B, K, l) -> (R * B, l, D)."""
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
    "keep_plausible",
    "sample_codes",
    "uniform_noise",
]
