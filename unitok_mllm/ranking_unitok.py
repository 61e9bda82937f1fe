"""Rank several drawings of a prompt by how well they match its text, by the visual tokenizer's two embeddings.

The score of a drawing is the cosine similarity of its image embedding and the text's embedding, which are trained as in
CLIP (https://arxiv.org/abs/2103.00020). DALL-E (https://arxiv.org/abs/2102.12092, section 2.6) chooses its samples in
the same way.
"""

from dataclasses import dataclass

import torch
from transformers import CLIPTextConfig

from .modeling_unitok import UniTokModel


@dataclass
class UniTokDrawingOutput:
    """Output of `generate_image_codes` with `return_dict_in_generate=True`, for B prompts.

    Attributes:
        codes: (B * num_return_sequences, K, L), int64, the drawings of a prompt next to each other, best first.
        scores: (B * num_return_sequences,), float32 in [-1, 1], their scores; None if nothing was ranked.
        chosen: (B, num_return_sequences), int64, their indices among the candidates; None if nothing was ranked.
        candidate_codes: (B, candidates, K, L), all drawings in the order of their samples; None if nothing was ranked.
        candidate_scores: (B, candidates), float32, their scores; None if nothing was ranked.
        candidate_order: (B, candidates), int64, their indices, best first; None if nothing was ranked.
    """

    codes: torch.Tensor
    scores: torch.Tensor | None = None
    chosen: torch.Tensor | None = None
    candidate_codes: torch.Tensor | None = None
    candidate_scores: torch.Tensor | None = None
    candidate_order: torch.Tensor | None = None


def check_ranking(visual: UniTokModel, input_ids: torch.Tensor) -> None:
    """Check that the text tower can read the texts that drawings are ranked by.

    Args:
        visual: the visual tokenizer.
        input_ids: (B, T), see `score_drawings`.

    Raises:
        ValueError: there is no text tower, or it was trained with another text tokenizer than the LLM's.
    """
    config = visual.config.text_config
    if config is None:
        raise ValueError(
            "candidates cannot be ranked: the model's visual tokenizer has no text tower (its text_config is None)."
        )
    has_end = (input_ids == config.eos_token_id).any(dim=1).all()
    if not has_end or input_ids.max() >= config.vocab_size:
        raise ValueError(
            "candidates cannot be ranked: the visual tokenizer's text tower reads the ids of another text tokenizer "
            f"({config.vocab_size} ids, {config.eos_token_id} ends a text) than the LLM's."
        )


def cut_texts(
    config: CLIPTextConfig, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Cut texts to the length of the text tower. The last token of a cut text becomes the end-of-text token.

    Args:
        config: config of the text tower.
        input_ids: (B, T), the texts with the end-of-text token, padded on the right.
        attention_mask: (B, T), 0 for padding.

    Returns:
        `input_ids` and `attention_mask`, (B, min(T, `max_position_embeddings`)).
    """
    length = config.max_position_embeddings
    if input_ids.shape[1] <= length:
        return input_ids, attention_mask
    is_cut = ~(input_ids[:, :length] == config.eos_token_id).any(dim=1)
    input_ids = input_ids[:, :length].clone()
    input_ids[is_cut, -1] = config.eos_token_id
    return input_ids, None if attention_mask is None else attention_mask[:, :length]


@torch.no_grad()
def score_drawings(
    visual: UniTokModel, codes: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute the cosine similarities of drawings and the texts that they were drawn from.

    Args:
        visual: the visual tokenizer.
        codes: (B, N, K, L), N drawings for each text.
        input_ids: (B, T), the texts with the end-of-text token, padded on the right; see `cut_texts`.
        attention_mask: (B, T), 0 for padding.

    Returns:
        (B, N), float32 in [-1, 1].

    Raises:
        ValueError: see `check_ranking`.
    """
    check_ranking(visual, input_ids)
    input_ids, attention_mask = cut_texts(visual.config.text_config, input_ids, attention_mask)
    texts = visual.get_text_features(input_ids, attention_mask).pooler_output.float()
    tower = visual.vision_model
    images = tower.pool(tower.embed_codes(codes.flatten(0, 1))).float()
    return torch.einsum("bnd,bd->bn", images.unflatten(0, codes.shape[:2]), texts)


def choose_drawings(codes: torch.Tensor, scores: torch.Tensor, count: int) -> UniTokDrawingOutput:
    """Choose the best drawings of each prompt. Between equal scores the earlier sample comes first.

    Args:
        codes: (B, N, K, L).
        scores: (B, N).
        count: drawings to keep for each prompt, at most N.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    chosen, rows = order[:, :count], torch.arange(len(codes), device=codes.device)[:, None]
    return UniTokDrawingOutput(
        codes[rows, chosen].flatten(0, 1), scores.gather(1, chosen).flatten(), chosen, codes, scores, order
    )


__all__ = ["UniTokDrawingOutput", "check_ranking", "choose_drawings", "cut_texts", "score_drawings"]
