"""Every causal LM that transformers knows, at a tiny size, as the LLM of this model: does it read, draw and learn?

    python -m eval.llm_families --output docs/llm_families.md

Each family's config is its default one with small sizes and one layer of each kind. The checks: text logits equal the
bare LLM's; a picture changes them; answers and drawings are the same with and without a cache, alone and in a padded
batch; a drawing's codes are the likeliest of a teacher-forced pass over prompt and image; every trainable parameter gets
a gradient; a saved folder loads and gives the same outputs.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, set_seed
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from training.errors import CommandLine, check_keys, one_line_errors
from training.files import write_atomically
from unitok_mllm import UniTokConfig, UniTokMLLMConfig, UniTokMLLMForConditionalGeneration, UniTokModel
from unitok_mllm.configuration_unitok import check_llm
from unitok_mllm.outputs import check_output_file


BOS, EOS, BOI, EOI, IMAGE = 1, 2, 3, 4, 5
SIZES = {
    64: "hidden_size d_model n_embd emb_dim word_embed_proj_dim embedding_size input_embedding_size embedding_dim "
    "output_embedding_size lru_width attention_hidden_size dim_model_base",
    96: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim dff d_inner dim_ff ffn_hidden_size n_inner "
    "feed_forward_size intermediate_size_mlp dense_intermediate_size shared_intermediate_size",
    32: "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size q_lora_rank kv_lora_rank "
    "shared_experts_intermediate_size moe_shared_expert_intermediate_size o_lora_rank",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads linear_num_heads index_n_heads "
    "linear_num_value_heads num_experts n_routed_experts num_local_experts moe_num_experts",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_query_groups moe_k "
    "num_experts_per_tok num_experts_per_token moe_topk type_vocab_size eos_token_id",
    16: "head_dim v_head_dim qk_head_dim kv_channels d_head dim_head linear_key_head_dim linear_value_head_dim "
    "linear_head_dim swa_head_dim index_head_dim attention_head_size query_pre_attn_scalar mamba_headdim "
    "state_size mamba_d_state ssm_state_size mamba_d_head mamba_head_dim router_hidden_size",
    8: "qk_rope_head_dim qk_nope_head_dim rotary_dim sliding_window sliding_window_size window_size chunk_size "
    "attention_window_size local_attention keep_window_size mamba_n_heads n_mamba_heads mamba_num_heads adapter_rank "
    "time_step_rank mamba_dt_rank mamba_chunk_size hidden_size_per_layer_input laurel_rank",
    300: "vocab_size unpadded_vocab_size vocab_size_per_layer_input",
    256: "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length max_target_positions",
    1: "n_group num_expert_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts n_groups "
    "mamba_n_groups mamba_ngroups first_k_dense_replace bos_token_id",
    0: "num_kv_shared_layers num_nextn_predict_layers pad_token_id",
}
FAMILIES = [family for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if family != UniTokMLLMConfig.model_type]
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
DEPTHS = (
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers num_decoder_layers "
    "num_blocks"
).split()

KINDS = ("layer_types", "layers_block_type", "block_types", "attn_layers", "mlp_layer_types", "indexer_types")
OVERRIDES = {
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 128},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "plbart": {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "xmod": {"default_language": "en_XX"},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 16]},
    "whisper": {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(family: str) -> PreTrainedConfig:
    """Shrink the default config of a family to small sizes and one layer of each kind."""
    config = AutoConfig.for_model(family).get_text_config(decoder=True)
    fields, depth = config.to_dict(), config.num_hidden_layers
    of_layers = {k: v for k, v in fields.items() if isinstance(v, (list, tuple)) and len(v) == depth > 4}
    kinds = next((of_layers[name] for name in KINDS if name in of_layers), [None] * depth)
    kept = sorted({kinds.index(kind) for kind in kinds} | {0, depth - 1})
    changed = {k: SMALL[k] for k, v in fields.items() if k in SMALL and isinstance(v, int) and not isinstance(v, bool)}
    if "qk_rope_head_dim" in fields and "head_dim" in changed:
        changed["head_dim"] = SMALL["qk_rope_head_dim"]
    if "kv_lora_rank" in fields and "num_key_value_heads" in changed:
        changed["num_key_value_heads"] = SMALL["num_attention_heads"]
    if fields.get("is_decoder") is False:
        changed["is_decoder"] = True
    changed |= {name: len(kept) for name in DEPTHS if name in fields}
    changed |= {name: [column[i] for i in kept] for name, column in of_layers.items()}
    return type(config)(**{**changed, **OVERRIDES.get(family, {})})


def tiny_llm(family: str) -> PreTrainedModel:
    """Build a random LLM of a family, with larger weights than usual, so that outputs depend on all inputs."""
    config = tiny_config(family)
    set_seed(0)
    llm = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])(config)
    return enliven(llm.float()).eval()


@torch.no_grad()
def enliven(module: torch.nn.Module) -> torch.nn.Module:
    """Scale up the freshly initialised matrices, so that outputs depend measurably on every input."""
    for parameter in module.parameters():
        if parameter.ndim == 2:
            parameter.mul_(5)
    return module


def join(llm: PreTrainedModel) -> UniTokMLLMForConditionalGeneration:
    """Join the LLM with a new tokenizer for pictures of 48 pixels, an embedder and a depth transformer."""
    vision = {"image_size": 48, "stem_width": 8, "stage_dims": (8, 16), "stage_depths": (1, 2), "hidden_size": 64}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_codebooks": 4, "codebook_size": 32}
    visual = UniTokModel(UniTokConfig(vision_config={**vision, "quantizer_dim": 24, "projection_dim": 20}))
    model = UniTokMLLMForConditionalGeneration.from_parts(
        llm,
        visual,
        depth_config={"num_hidden_layers": 2},
        embedder_dim=40,
        embedder_heads=2,
        boi_token_id=BOI,
        eoi_token_id=EOI,
        image_token_id=IMAGE,
    )
    enliven(model.embedder), enliven(model.depth_head)
    return model.eval()


L, K = 9, 4
SHORT, LONG = [BOS, 17, 23, 8], [BOS, 41, 12, 250, 33, 99, 7, 64, 201, 15, 77]


def padded(*rows: list[int]) -> dict[str, torch.Tensor]:
    """Stack rows of ids, padded on the left."""
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


class Disagreement(Exception):
    """Two ways to compute the same value gave different results."""


def same(what: str, one: torch.Tensor, other: torch.Tensor) -> None:
    """Check that two results are equal: floats up to 1e-3 of the largest value, integers exactly.

    Raises:
        Disagreement: the results differ; the message begins with `what`.
    """
    if one.shape != other.shape or not torch.isfinite(one.float()).all():
        raise Disagreement(f"{what}: {tuple(one.shape)}, {tuple(other.shape)}, or not finite")
    if one.is_floating_point():
        error = ((one - other).abs().max() / other.abs().max()).item()
        if error > 1e-3:
            raise Disagreement(f"{what}: off by {error:.2g} of the largest")
    elif not torch.equal(one, other):
        raise Disagreement(f"{what}: {(one != other).float().mean():.0%} differ")


@torch.no_grad()
def check_reading(llm: PreTrainedModel, model: UniTokMLLMForConditionalGeneration) -> None:
    """Check that text logits equal the LLM's, a picture changes them, and answers do not depend on cache or batch."""
    codes = torch.randint(32, (3, K, L))
    text = {"input_ids": torch.tensor([LONG])}
    same("text logits against the bare LLM", model(**text).logits, llm(**text).logits)
    image = [BOI, *[IMAGE] * L, EOI]
    rows = [[BOS, *image, 40, *image, 61, 9], [BOS, 8, *image, 30]]
    chat = padded(*rows)
    read = model(**chat, image_codes=codes).logits
    other = model(**chat, image_codes=codes.flip(0)).logits
    if not (read[:, -1] - other[:, -1]).abs().amax() > 1e-3:
        raise Disagreement("a picture does not change the logits behind it")
    alone = model(torch.tensor([rows[1]]), image_codes=codes[2:]).logits
    same("logits in a padded batch", read[1, -1], alone[0, -1])
    options = {"do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6}
    answers = model.generate(**chat, image_codes=codes, **options)
    same("answers without a cache", model.generate(**chat, image_codes=codes, use_cache=False, **options), answers)
    one = model.generate(torch.tensor([rows[1]]), image_codes=codes[2:], **options)
    same("answers in a padded batch", one[0, -6:], answers[1, -6:])


@torch.no_grad()
def check_drawing(model: UniTokMLLMForConditionalGeneration) -> None:
    """Check that drawings do not depend on cache or batch, and are the likeliest codes of a teacher-forced pass."""
    history = torch.randint(32, (1, K, L))
    prompts = [[BOS, 8, BOI, *[IMAGE] * L, EOI, 30, BOI], [*SHORT, BOI]]
    unconditional = padded([BOS, 9, BOI])
    options = {"generation_mode": "image", "image_codes": history, "guidance_scale": 3.0, "do_sample": False}
    options |= {f"unconditional_{name}": value for name, value in unconditional.items()}
    codes = model.generate(**padded(*prompts), **options)
    same("drawings without a cache", model.generate(**padded(*prompts), use_cache=False, **options), codes)
    alone = model.generate(torch.tensor([prompts[1]]), **options | {"image_codes": None})
    same("drawings in a batch", alone[0], codes[1])
    branches = []
    for rows, known in ((prompts, history), ([unconditional["input_ids"][0].tolist()] * 2, history[:0])):
        inputs = padded(*([*row, *[IMAGE] * L] for row in rows))
        drawn = torch.arange(len(known) + 2) >= len(known)
        output = model(**inputs, image_codes=torch.cat([known, codes]), image_targets=drawn)
        branches.append(output.image_logits)
    guided = branches[1] + 3 * (branches[0] - branches[1])
    same("drawings against a teacher-forced pass", guided.argmax(dim=-1).transpose(1, 2), codes)


def check_training(model: UniTokMLLMForConditionalGeneration) -> None:
    """Check that a few steps lower the loss, and change every trainable parameter outside the LLM."""
    image = [BOI, *[IMAGE] * L, EOI]
    batch = padded([BOS, *image, 40, 61, EOS], [*LONG, *image, EOS])
    batch |= {"image_codes": torch.randint(32, (2, K, L)), "image_targets": torch.tensor([False, True])}
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :6] = -100
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model.train()(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    still = [n for n, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[n])]
    if not losses[-1] < losses[0]:
        raise Disagreement(f"the loss went from {losses[0]:.3g} to {losses[-1]:.3g}")
    if any(not name.startswith("language_model.") for name in still):
        raise Disagreement(f"not trained: {still}")


@torch.no_grad()
def check_saving(model: UniTokMLLMForConditionalGeneration) -> None:
    """Check that a saved model loads and gives the same logits."""
    inputs = {
        "input_ids": torch.tensor([[*SHORT, BOI, *[IMAGE] * L, EOI]]),
        "image_codes": torch.randint(32, (1, K, L)),
    }
    with tempfile.TemporaryDirectory() as folder:
        model.eval().save_pretrained(folder)
        loaded = UniTokMLLMForConditionalGeneration.from_pretrained(folder).eval()
    same("logits of the loaded folder", loaded(**inputs).logits, model(**inputs).logits)


def outcome(family: str) -> str:
    """Try a family. Return "works", "refused: ..." with the config's error, or the failed check and its error."""
    not_tried = "not tried: no tiny one runs on its own ({}: {:.90})"
    try:
        llm = tiny_llm(family)
    except Exception as error:  # an error of transformers, caused by the tiny config
        return not_tried.format(type(error).__name__, " ".join(str(error).split()))
    try:
        check_llm(llm.config)
    except ValueError as error:
        return f"refused: {str(error).rsplit('cannot be the LLM: ')[-1]}"
    try:
        llm.generate(torch.tensor([LONG]), max_new_tokens=2, do_sample=False)
    except Exception as error:
        return not_tried.format(type(error).__name__, " ".join(str(error).split()))
    model = join(llm)
    for name, check in (
        ("reading", lambda: check_reading(llm, model)),
        ("drawing", lambda: check_drawing(model)),
        ("saving", lambda: check_saving(model)),
        ("training", lambda: check_training(model)),
    ):
        try:
            check()
        except Exception as error:  # any error: go on with the other families
            return f"fails at {name}: {' '.join(str(error).split())[:120]}"
    return "works"


HEADER = """# LLM families

Every causal LM that transformers {version} lists, at a tiny size with fresh weights on a CPU, as the LLM of this model.
"works": it reads, draws (with a cache as without, alone as in a padded batch, as in a teacher-forced pass), learns, and
is loaded from a saved folder. Those refused are refused by name when the model is built. Written by

```sh
python -m eval.llm_families --output docs/llm_families.md
```

{works} of {total} work.

| family | outcome |
|---|---|
"""


@one_line_errors()
def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=FAMILIES, help="model types; default: all")
    parser.add_argument(
        "--output", type=Path, default=Path("docs/llm_families.md"), help="where the table goes (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    check_keys("the library's list of causal LMs", arguments.families, FAMILIES)
    check_output_file(arguments.output)
    logging.set_verbosity_error()
    outcomes = {}
    for family in arguments.families:
        outcomes[family] = outcome(family)
        print(f"{family}: {outcomes[family]}", flush=True)
    works = sum(result == "works" for result in outcomes.values())
    header = HEADER.format(version=transformers.__version__, works=works, total=len(outcomes))
    rows = [f"| {family} | {result.replace('|', '/')} |" for family, result in outcomes.items()]
    write_atomically(arguments.output, (header + "\n".join(rows) + "\n").encode())


if __name__ == "__main__":
    main()
