"""Answers of text and images: their options of `generate`, their streamer and their stopping criterion."""

import time

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList


# Options of transformers' `generate` that apply unchanged to answers with images. All others are refused: they count
# positions (images have positions too), need all prompts at once, or would start again after each image.
TEXT_OPTIONS = frozenset(
    (
        *("max_new_tokens", "min_new_tokens", "max_time", "stop_strings", "tokenizer", "eos_token_id"),
        *("bos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p"),
        *("epsilon_cutoff", "eta_cutoff", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids"),
        *("renormalize_logits", "remove_invalid_values", "suppress_tokens", "sequence_bias", "forced_eos_token_id"),
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile"),
        *("prefill_chunk_size", "generation_config", "logits_processor", "stopping_criteria"),
        *("prefix_allowed_tokens_fn", "streamer"),
    )
)
IMAGE_OPTIONS = frozenset(
    (
        *("guidance_scale", "plausibility", "do_sample", "temperature", "top_k", "top_p", "seed"),
        *("use_cache", "cuda_graph", "progress", "streamer", "logits_processor", "stopping_criteria"),
    )
)
INSTEAD = {
    "guidance_scale": "image_options has one for the images",
    "max_length": "max_new_tokens counts the text",
    "min_length": "min_new_tokens counts the text",
    "num_return_sequences": "repeat the prompt",
    "seed": "image_options has one for the images",
}


def check_options(options: dict, config: GenerationConfig | None, own: GenerationConfig, image_options: dict) -> None:
    """Refuse options that an answer with images cannot honour.

    Args:
        options: arguments of `generate` other than the prompts.
        config: the `generation_config` of the call.
        own: the model's generation config, whose `max_length` and `min_length` are ignored.
        image_options: options of the drawings.

    Raises:
        ValueError: an option that this mode does not take has another value than its default. The message names it.
    """
    defaults = GenerationConfig._get_default_generation_params()
    given = {name: value for name, value in vars(own).items() if name not in ("max_length", "min_length")}
    given |= {name: value for name, value in vars(config or GenerationConfig()).items() if value is not None}
    given.pop("image_generation", None)  # for the images, and checked there
    given |= {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        is_default = value is None or value is False or name in defaults and value == defaults[name]
        if name.startswith("_") or name == "transformers_version" or is_default:
            continue
        if name not in TEXT_OPTIONS or (name, value) == ("cache_implementation", "paged"):
            hint = f": {INSTEAD[name]}" if name in INSTEAD else ""
            raise ValueError(f"generation_mode='interleaved' does not take {name}={value!r:.80}{hint}.")
    for name in image_options.keys() - IMAGE_OPTIONS:
        raise ValueError(f"image_options does not take {name!r}; known: {', '.join(sorted(IMAGE_OPTIONS))}.")


class UniTokAnswerEnd(StoppingCriteria):
    """Stopping criterion: a text ends where an image opens, the answer by `criteria` or the time limit.

    Args:
        boi_token_id: the token that opens an image.
        criteria: the caller's stopping criteria.
        max_time: seconds from now; None for no limit.
    """

    def __init__(self, boi_token_id: int, criteria: StoppingCriteriaList | list | None, max_time: float | None):
        self.boi_token_id, self.criteria = boi_token_id, StoppingCriteriaList(criteria or [])
        self.deadline = float("inf") if max_time is None else time.monotonic() + max_time
        self.is_over = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        """Return whether to stop, (1,), for sequences (1, T)."""
        is_over = self.criteria(input_ids, scores, **kwargs) if self.criteria else input_ids.new_zeros(1).bool()
        self.is_over = bool(is_over.any()) or time.monotonic() >= self.deadline
        return (input_ids[:, -1] == self.boi_token_id) | self.is_over


class UniTokAnswerStream:
    """Pass the pieces of an answer to a streamer as one answer: with a single prompt and a single end."""

    def __init__(self, streamer):
        self.streamer, self.has_begun = streamer, False

    def put(self, value: torch.Tensor) -> bool | None:
        """Pass on a token (1,), codes (1, K, l), or the first prompt (1, T)."""
        if value.ndim == 2:
            if self.has_begun:
                return None
            self.has_begun = True
        return self.streamer.put(value)

    def end(self) -> None:
        pass


__all__ = ["UniTokAnswerEnd", "UniTokAnswerStream", "check_options"]
