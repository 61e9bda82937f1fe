"""Rebuilds checkpoints in the original program's format from their recorded names and shapes, without a download."""

import json
from pathlib import Path

import torch
from reference_weights import reference_tensor
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast


FIXTURES = Path(__file__).parent / "fixtures"
TOKENIZER_ARGS = {
    "img_size": 256,
    "vocab_size": 32768,
    "vocab_width": 64,
    "num_codebooks": 8,
    "quant_proj": "attn",
    "vq_beta": 0.25,
    "embed_dim": 768,
    "num_query": 0,
    "text_width": 768,
    "text_heads": 12,
    "text_layers": 12,
    "text_vocab_size": 49408,
    "text_context_length": 77,
    "grad_ckpt": False,
    "drop_path": 0.0,
}
MLLM_CONFIG = {
    "_name_or_path": "Llama-2-7b-hf",
    "architectures": ["MiniGeminiLlamaForCausalLM"],
    "model_type": "mini_gemini",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "transformers_version": "4.38.0",
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_start_end": False,
    "tune_mm_mlp_adapter": False,
}


def reference_state(name: str, shrink: int = 1) -> dict[str, torch.Tensor]:
    """The tensors that `fixtures/{name}_keys.json` lists; every dimension that `shrink` divides is divided by it."""
    shapes = json.loads((FIXTURES / f"{name}_keys.json").read_text(encoding="utf-8"))
    return {
        key: torch.tensor(reference_tensor(key, [size if size % shrink else size // shrink for size in shape]))
        for key, shape in shapes.items()
    }


def tokenizer_checkpoint(state: dict[str, torch.Tensor], model: str) -> dict:
    """What an original tokenizer `.pth` holds, as far as it matters here."""
    return {"args": {"model": model, **TOKENIZER_ARGS}, "trainer": {"unitok": state}}


def write_mllm_folder(
    folder: Path, state: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerFast, as_pickle: bool = False, **config
) -> Path:
    """An original MLLM folder; `config` overrides entries of its config.json."""
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(MLLM_CONFIG | config), encoding="utf-8")
    names = sorted(state)
    for shard, part in enumerate((names[::2], names[1::2]), start=1):
        tensors = {name: state[name] for name in part}
        if as_pickle:
            torch.save(tensors, folder / f"pytorch_model-{shard:05}-of-00002.bin")
        else:
            save_file(tensors, folder / f"model-{shard:05}-of-00002.safetensors", metadata={"format": "pt"})
    return folder
