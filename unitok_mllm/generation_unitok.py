"""Generation: text by the library's own loop, images by L steps of the LLM with K depth steps each.

Guidance (classifier-free, https://arxiv.org/abs/2207.12598): `logits = uncond + scale * (cond - uncond)` for a scale
above 1; both branches go through the model in one batch and go on with the same codes.
"""

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import DynamicCache, GenerationMixin
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


IMAGE_INPUTS = ("pixel_values", "image_codes")


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
    """Draws from softmax(logits) by inverting its cumulative sum: logits (B, V), noise (B,) in [0, 1) -> (B,)."""
    cumulative = logits.float().softmax(dim=-1).cumsum(dim=-1)
    return torch.searchsorted(cumulative, noise[:, None] * cumulative[:, -1:], right=True).squeeze(1)


def pad_left(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """Zeros in front, up to `length` columns."""
    return F.pad(tensor, (length - tensor.shape[1], 0))


class UniTokGenerationMixin(GenerationMixin):
    """`generate` in two modes, "text" (the default) and "image"."""

    def generate(self, inputs: torch.Tensor | None = None, *args, generation_mode: str = "text", **kwargs):
        """Generates text, or the codes of one image for each prompt.

        Args:
            inputs: prompt ids (B, T), also as `input_ids=`.
            generation_mode: "text": transformers' own `generate`, with all its options.
                "image": `generate_image_codes`, with the options named there.

        Raises:
            ValueError: another mode.
        """
        if generation_mode == "text":
            return super().generate(inputs, *args, **kwargs)
        if generation_mode == "image":
            return self.generate_image_codes(kwargs.pop("input_ids", inputs), *args, **kwargs)
        raise ValueError(f"generation_mode is 'text' or 'image', got {generation_mode!r}.")

    def prepare_inputs_for_generation(self, input_ids, is_first_iteration=False, **kwargs):
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in IMAGE_INPUTS:
                model_inputs.pop(name, None)
        return model_inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Repeats whole samples, each with all its images (the library would repeat each image in place)."""
        images = {name: model_kwargs.pop(name) for name in IMAGE_INPUTS if model_kwargs.get(name) is not None}
        if images and expand_size > 1:
            for name, value in images.items():
                counts = self.images_per_sample(input_ids, len(value), self._num_positions(name, value))
                images[name] = torch.cat([group for group in value.split(counts) for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | images

    def _num_positions(self, name: str, value: torch.Tensor) -> int:
        """L of these pixels (N, 3, H, W) or codes (N, K, L)."""
        if name == "image_codes":
            return value.shape[-1]
        height, width = self.visual.vision_model.grid_size(value)
        return height * width

    @torch.no_grad()
    def generate_image_codes(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        unconditional_input_ids: torch.Tensor | None = None,
        unconditional_attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_codes: torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        do_sample: bool = True,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | list[int] | None = None,
        num_return_sequences: int = 1,
        num_positions: int | None = None,
        use_cache: bool = True,
        progress: bool = False,
    ) -> torch.Tensor:
        """Draws one image for each prompt, or `num_return_sequences` of them.

        Args:
            input_ids, attention_mask: (B, T), prompts that end with the token that opens an image, padded on the left.
            unconditional_input_ids, unconditional_attention_mask: (1 or B, T'), the prompts that guidance leads away
                from; the processor makes them. Looked at only with a `guidance_scale` above 1.
            pixel_values, image_codes: images that the prompts hold, see `UniTokMLLMForConditionalGeneration.embed`.
            guidance_scale: 1: no guidance, one branch. Above 1: `uncond + scale * (cond - uncond)`, two branches.
            do_sample: False for the likeliest code each time.
            temperature, top_k, top_p: as in transformers; `top_k` 0 keeps all codes.
            seed: one for all prompts or one for each; None to take it from torch's generator. Sample j of a prompt
                depends on its seed and on j alone, not on its neighbours in the batch.
            num_return_sequences: samples for each prompt.
            num_positions: code groups to draw; None for a whole image (L).
            use_cache: False to compute everything anew at each step (slow; gives the same codes).
            progress: show a progress bar.

        Returns:
            (B * num_return_sequences, K, L), int64, the samples of a prompt side by side.

        Raises:
            ValueError: an option out of its range, a prompt that does not end with the token that opens an image, or
                guidance without an unconditional prompt.
        """
        if guidance_scale < 1:
            raise ValueError(f"guidance_scale must be at least 1 (1: no guidance), got {guidance_scale}.")
        if num_return_sequences < 1:
            raise ValueError(f"num_return_sequences must be at least 1, got {num_return_sequences}.")
        if num_positions is None:
            num_positions = self.config.num_image_positions
        if num_positions < 1:
            raise ValueError(f"num_positions must be at least 1, got {num_positions}.")
        if not (input_ids[:, -1] == self.config.boi_token_id).all():
            raise ValueError(
                f"Each prompt must end with the token that opens an image ({self.config.boi_token_id}): make prompts "
                "with processor(text=..., generation_mode='image'), padded on the left."
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        warpers = self._warpers(temperature, top_k, top_p)
        noise = None
        if do_sample:
            seeds = self._seeds(seed, len(input_ids))
            noise_shape = (num_positions, self.depth_head.num_codebooks)
            noise = uniform_noise(seeds, num_return_sequences, noise_shape).to(input_ids.device)

        inputs_embeds, _ = self.embed(input_ids, pixel_values, image_codes)
        inputs_embeds = inputs_embeds.repeat_interleave(num_return_sequences, dim=0)
        attention_mask = attention_mask.repeat_interleave(num_return_sequences, dim=0)
        guided = guidance_scale > 1
        if guided:
            if unconditional_input_ids is None:
                raise ValueError(
                    "A guidance_scale above 1 needs unconditional_input_ids: "
                    "make prompts with processor(text=..., generation_mode='image')."
                )
            inputs_embeds, attention_mask = self._add_unconditional(
                inputs_embeds, attention_mask, unconditional_input_ids, unconditional_attention_mask
            )
        branches = 2 if guided else 1

        def choose(logits: torch.Tensor, position: int, k: int) -> torch.Tensor:
            logits = logits.float()
            if guided:
                cond, uncond = logits.chunk(2)
                logits = uncond + guidance_scale * (cond - uncond)
            if noise is None:
                return logits.argmax(dim=-1)
            return sample_codes(warpers(None, logits), noise[:, position, k])

        batch, prompt_length, _ = inputs_embeds.shape
        attention_mask = F.pad(attention_mask, (0, num_positions), value=1)
        position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp_min(0)
        llm_cache = DynamicCache(config=self.config.text_config) if use_cache else None
        embedder_cache = DynamicCache() if use_cache else None
        groups = []
        for position in tqdm(range(num_positions), desc="drawing", disable=not progress, leave=False):
            end = prompt_length + position
            start = end - inputs_embeds.shape[1]
            hidden_states = self.get_decoder()(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask[:, :end],
                position_ids=position_ids[:, start:end],
                cache=llm_cache,
                use_cache=use_cache,
            ).last_hidden_state[:, -1]
            groups.append(self.depth_head.generate(hidden_states, lambda logits, k, p=position: choose(logits, p, k)))
            if position + 1 == num_positions:
                break
            if use_cache:
                inputs_embeds = self.embedder(groups[-1][:, :, None], embedder_cache).repeat(branches, 1, 1)
            else:
                drawn = self.embedder(torch.stack(groups, dim=2)).repeat(branches, 1, 1)
                inputs_embeds = torch.cat([inputs_embeds[:, :prompt_length], drawn], dim=1)
        return torch.stack(groups, dim=2)

    @staticmethod
    def _warpers(temperature: float, top_k: int, top_p: float) -> LogitsProcessorList:
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0 (do_sample=False is greedy), got {temperature}.")
        if top_k < 0:
            raise ValueError(f"top_k must be at least 0 (0: all codes), got {top_k}.")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}.")
        warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
        if top_k:
            warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            warpers.append(TopPLogitsWarper(top_p))
        return warpers

    @staticmethod
    def _seeds(seed: int | list[int] | None, num_prompts: int) -> list[int]:
        if seed is None:
            return torch.randint(2**31, (num_prompts,)).tolist()
        seeds = [seed] * num_prompts if isinstance(seed, int) else list(seed)
        if len(seeds) != num_prompts:
            raise ValueError(f"Got {len(seeds)} seeds for {num_prompts} prompts.")
        return seeds

    def _add_unconditional(self, inputs_embeds, attention_mask, unconditional_ids, unconditional_mask):
        """Puts the unconditional branch under the conditional one, both padded on the left to one length."""
        if unconditional_mask is None:
            unconditional_mask = torch.ones_like(unconditional_ids)
        batch, num_prompts = len(inputs_embeds), len(unconditional_ids)
        if batch % num_prompts:
            raise ValueError(f"Got {num_prompts} unconditional prompts for a batch of {batch}.")
        length = max(inputs_embeds.shape[1], unconditional_ids.shape[1])
        unconditional_embeds, _ = self.embed(pad_left(unconditional_ids, length))
        inputs_embeds = F.pad(inputs_embeds, (0, 0, length - inputs_embeds.shape[1], 0))
        repeats = batch // num_prompts
        return (
            torch.cat([inputs_embeds, unconditional_embeds.repeat_interleave(repeats, dim=0)]),
            torch.cat(
                [
                    pad_left(attention_mask, length),
                    pad_left(unconditional_mask, length).repeat_interleave(repeats, dim=0),
                ]
            ),
        )


__all__ = ["UniTokGenerationMixin"]
