"""Drawing with the library's other models that draw with an LLM, at the same LLM size, random weights.

Their tokenizers do not run, as in the job `draw`. The images are those of their releases:

    janus    384 x 384 pixels from 576 tokens of 16384 codes, a head of its own; both guidance branches in one batch
    emu3     512 x 512 pixels from 64 rows of 64 tokens of 32768 codes and a row's end, all in the LLM's vocabulary; one
             pass for each guidance branch
"""

from collections.abc import Callable, Iterator

import torch
from transformers import (
    Emu3ForCausalLM,
    Emu3TextConfig,
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    LlamaConfig,
)

from eval.timing.measuring import Job, Way
from eval.timing.settings import PEERS, Settings
from eval.timing.subjects import LLAMA_2_7B, SMOLLM2


PROMPT_TOKENS, BOS, BOI, PAD = 32, 1, 2, 0
EMU3_CODES = 32768


def janus(llm: LlamaConfig) -> JanusForConditionalGeneration:
    """Build Janus around an LLM, with stand-ins for its vision tower and its tokenizer's network."""
    config = JanusConfig(
        text_config=llm.to_dict(),
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "projection_dim": llm.hidden_size,
        },
        vq_config={
            **{"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "latent_channels": 32},
            **{"projection_dim": llm.hidden_size, "image_token_embed_dim": llm.hidden_size},
        },
    )
    return JanusForConditionalGeneration(config)


def emu3(llm: LlamaConfig) -> Emu3ForCausalLM:
    """Build Emu3's LLM, whose vocabulary has the codes of images behind the words."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = {name: getattr(llm, name) for name in (*names, "tie_word_embeddings")}
    ids = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": None}
    return Emu3ForCausalLM(Emu3TextConfig(vocab_size=llm.vocab_size + EMU3_CODES, **sizes, **ids))


def janus_drawing(model: JanusForConditionalGeneration, ids: torch.Tensor, tokens: int, guidance: float) -> Callable:
    """Return a function that draws `tokens` tokens for prompts (B, T), greedily."""
    model.model.vision_model.config.num_image_tokens = tokens
    model.generation_config = GenerationConfig(
        guidance_scale=guidance, pad_token_id=PAD, bos_token_id=BOS, generation_kwargs={"boi_token_id": BOI}
    )
    options = {"generation_mode": "image", "do_sample": False}
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options)


def emu3_drawing(model: Emu3ForCausalLM, ids: torch.Tensor, tokens: int, guidance: float) -> Callable:
    """Return a function that draws `tokens` tokens for prompts (B, T), greedily."""
    vocabulary = model.config.vocab_size
    codes = torch.arange(vocabulary - EMU3_CODES, vocabulary, device=ids.device)
    options = {"guidance_scale": guidance, "negative_prompt_ids": ids.roll(1, dims=1), "do_sample": False}

    def draw() -> torch.Tensor:
        sequences = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            prefix_allowed_tokens_fn=lambda row, prefix: codes,
            **options,
        )
        return sequences[:, ids.shape[1] :]

    return draw


BUILD = {"janus": (janus, janus_drawing), "emu3": (emu3, emu3_drawing)}


def peer_jobs(name: str, guidance: float, settings: Settings) -> Iterator[Job]:
    """Yield the jobs that draw an image, or the first positions of one, with a model of the library.

    Args:
        name: one of `PEERS`.
        guidance: scale of classifier-free guidance.
        settings: the settings.
    """
    side, tokens = PEERS[name]
    tokens = settings.positions or tokens
    build, drawing = BUILD[name]
    with torch.device(settings.device):
        model = build(LLAMA_2_7B if settings.preset == "7b" else SMOLLM2)
    model = model.to(getattr(torch, settings.dtype)).eval()
    for batch in settings.batches:
        ids = torch.randint(10, 1000, (batch, PROMPT_TOKENS), device=settings.device)
        ids[:, 0], ids[:, -1] = BOS, BOI
        yield Job(
            Way(drawing(model, ids, tokens, guidance)),
            batch,
            batch,
            "images/s",
            detail=f"{tokens} positions" if settings.positions else "",
            describe=lambda codes, side=side: f"{PEERS[name][1]} positions make {side} x {side} pixels",
        )
