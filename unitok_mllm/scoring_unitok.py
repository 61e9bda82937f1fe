"""Score given answers and images: their log-likelihoods under the model, with teacher forcing."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


@dataclass
class UniTokScores:
    """Log-likelihoods of C targets for each of B prompts.

    Attributes:
        log_likelihoods: (B, C), float32, in nats, summed over the tokens of each answer or the codes of each image.
        num_targets: (B, C), int64, number of tokens or codes of each.
    """

    log_likelihoods: torch.Tensor
    num_targets: torch.Tensor

    @property
    def means(self) -> torch.Tensor:
        """Mean log-likelihood of a token or code, (B, C), float32: the negative training loss of each target."""
        return self.log_likelihoods / self.num_targets.clamp_min(1)


class UniTokScoringMixin:
    """The MLLM's method `score`."""

    @torch.no_grad()
    def score(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_codes: torch.Tensor | None = None,
        target_ids: torch.Tensor | None = None,
        target_codes: torch.Tensor | None = None,
    ) -> UniTokScores:
        """Compute log-likelihoods of answers, or of images, that follow prompts.

        Each prompt runs once, and all its targets use its keys and values. Only LLMs with a recurrent state run the
        prompt again with each target.

        Args:
            input_ids: (B, T), prompts, padded on the left; before images they end with the token that opens one.
            attention_mask: (B, T), 0 for padding.
            pixel_values: (N, 3, H, W), images in the prompts, see `UniTokMLLMModel.embed`.
            image_codes: (N, K, L), instead of pixels.
            target_ids: (B, C, T'), int64, C answers to each prompt, with -100 after the end of the shorter ones.
            target_codes: (B, C, K, L), instead of answers: C images for each prompt.

        Raises:
            ValueError: not exactly one of `target_ids` and `target_codes`, not a row of targets for each prompt, an
                answer with an image placeholder, or a sequence longer than the LLM's positions; see `embed`.
        """
        if (target_ids is None) == (target_codes is None):
            raise ValueError("Give exactly one of target_ids and target_codes.")
        targets = target_codes if target_ids is None else target_ids
        if targets.dim() != (4 if target_ids is None else 3) or len(targets) != len(input_ids):
            raise ValueError(f"Got targets of shape {tuple(targets.shape)} for {len(input_ids)} prompts.")
        if target_ids is not None and (target_ids == self.config.image_token_id).any():
            raise ValueError("target_ids contain an image placeholder: give the image's codes as target_codes.")
        if target_codes is not None and not (input_ids[:, -1] == self.config.boi_token_id).all():
            raise ValueError(
                f"Each prompt of an image must end with the token that opens it ({self.config.boi_token_id})."
            )
        self._check_room(input_ids, targets.shape[-1])
        count, rows = targets.shape[1], targets.flatten(0, 1)
        if target_ids is not None:
            inputs_embeds = self.get_input_embeddings()(rows[:, :-1].clamp_min(0))
        else:
            inputs_embeds = self.embedder(rows)[:, :-1]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts, _ = self.embed(input_ids, pixel_values, image_codes)
        outputs = self._continued(prompts, mask, inputs_embeds, count, is_text=target_ids is not None)
        if target_ids is not None:
            losses = F.cross_entropy(outputs.float().transpose(1, 2), rows, ignore_index=-100, reduction="none")
            num_targets = (rows != -100).sum(dim=1)
        else:
            codes = rows.transpose(1, 2)  # (B * C, L, K)
            logits = self.depth_head(outputs.flatten(0, 1), codes.flatten(0, 1)).float()
            losses = F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none").unflatten(
                0, (len(rows), -1)
            )
            num_targets = rows.new_full((len(rows),), rows[0].numel())
        shape = targets.shape[:2]
        return UniTokScores(-losses.sum(dim=1).unflatten(0, shape), num_targets.unflatten(0, shape))

    def _continued(self, prompts, mask, inputs_embeds, count, is_text) -> torch.Tensor:
        """Run prompts (B, T, D), each with `count` continuations (B * count, T' - 1, D).

        Returns:
            The LLM's logits (for images, its states) before each of T' targets, (B * count, T', ...).
        """

        def run(keep: int, embeds: torch.Tensor, mask: torch.Tensor, cache: Cache | None = None):
            position_ids = (mask.long().cumsum(dim=1) - 1).clamp_min(0)[:, -embeds.shape[1] :]
            options = {"attention_mask": mask, "position_ids": position_ids, "cache": cache, "use_cache": True}
            if is_text:
                outputs = self.language_model(inputs_embeds=embeds, logits_to_keep=keep, **options)
                return outputs.logits, outputs.cache
            outputs = self.get_decoder()(inputs_embeds=embeds, **options)
            return outputs.last_hidden_state[:, -keep:], outputs.cache

        first, cache = run(1, prompts, mask)
        first, length = first.repeat_interleave(count, dim=0), inputs_embeds.shape[1]
        if not length:
            return first
        mask = F.pad(mask.repeat_interleave(count, dim=0), (0, length), value=1)
        if isinstance(cache, Cache) and all(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
            cache.batch_repeat_interleave(count)
            return torch.cat([first, run(length, inputs_embeds, mask, cache)[0]], dim=1)
        whole = torch.cat([prompts.repeat_interleave(count, dim=0), inputs_embeds], dim=1)
        return run(length + 1, whole, mask)[0]


__all__ = ["UniTokScores", "UniTokScoringMixin"]
