"""The models to time, and their inputs: photographs, and random token ids."""

from dataclasses import dataclass

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from eval.timing.settings import Settings
from unitok_mllm import (
    UniTokConfig,
    UniTokImageProcessorPil,
    UniTokMLLMConfig,
    UniTokMLLMForConditionalGeneration,
    UniTokModel,
)


SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)

LLAMA_2_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)


@dataclass
class Subject:
    """The model to time.

    Attributes:
        tokenizer: the visual tokenizer.
        mllm: the MLLM; None if the subject is only a tokenizer.
        note: remark on the weights.
        has_visual: whether the visual tokenizer is timed; False if it is a stand-in.
    """

    tokenizer: UniTokModel
    mllm: UniTokMLLMForConditionalGeneration | None = None
    note: str = ""
    has_visual: bool = True


def smollm2_mllm() -> UniTokMLLMForConditionalGeneration:
    """Build an LLM of SmolLM2-135M's size with 8 codebooks of 4096 and 256 positions, and a small stand-in tokenizer."""
    visual = UniTokConfig.preset("tiny", image_size=256, codebook_size=4096)
    config = UniTokMLLMConfig(text_config=SMOLLM2, visual_config=visual, image_token_id=SMOLLM2.vocab_size)
    return UniTokMLLMForConditionalGeneration(config)


def load_subject(settings: Settings) -> Subject:
    """Load or build the model, in float32 except for a 7B LLM's weights. Jobs cast it to the dtype in the settings."""
    torch.manual_seed(0)
    if settings.folder:
        is_tokenizer = isinstance(AutoConfig.from_pretrained(settings.folder), UniTokConfig)
        model_class = UniTokModel if is_tokenizer else UniTokMLLMForConditionalGeneration
        model = model_class.from_pretrained(settings.folder, dtype=torch.float32).to(settings.device).eval()
        return Subject(model) if is_tokenizer else Subject(model.visual, model)
    with torch.device(settings.device):
        if settings.preset == "large":
            return Subject(UniTokModel(UniTokConfig.preset("large")).eval(), note="random weights")
        if settings.preset == "smollm2":
            mllm = smollm2_mllm()
        else:
            llm = AutoModelForCausalLM.from_config(LLAMA_2_7B, dtype=getattr(torch, settings.dtype))
            mllm = UniTokMLLMForConditionalGeneration.from_parts(llm, UniTokModel(UniTokConfig.preset("large")))
    return Subject(mllm.visual, mllm.eval(), "random weights", has_visual=settings.preset != "smollm2")


def photographs() -> list[Image.Image]:
    """Load six photographs that scikit-image and scikit-learn ship."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    arrays = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket(), *load_sample_images().images]
    return [Image.fromarray(array) for array in arrays]


def pixels_of_photographs(image_size: int) -> torch.Tensor:
    """Load the photographs as pixels (6, 3, H, W) in [-1, 1]."""
    processor = UniTokImageProcessorPil(size={"height": image_size, "width": image_size})
    return processor(photographs(), mode="reconstruct")["pixel_values"]


def repeat_to(rows: torch.Tensor, batch: int) -> torch.Tensor:
    """Repeat the rows cyclically, up to `batch` of them."""
    return rows[torch.arange(batch, device=rows.device) % len(rows)]


def random_ids(config: UniTokMLLMConfig, *shape: int) -> torch.Tensor:
    """Sample random token ids, above the special ones."""
    return torch.randint(10, min(1000, config.text_config.vocab_size), shape)
