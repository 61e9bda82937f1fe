"""Convert original UniTok checkpoints into folders that the Auto classes load.

A tokenizer `.pth` is `{"args": {...}, "trainer": {"unitok": {name: tensor}}}`. An original MLLM is a Llama folder with
`model.multi_embedder.*` and `ar_head.*` beside the LLM's own keys. Widths and depths are read from the tensors' shapes.
Every tensor is used or listed in the report. Pickles are read with `weights_only=True`, and executed only with
`allow_pickle`.
"""

import json
import os
import pickle
import re
import zipfile
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, CLIPTextConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from .configuration_unitok import UniTokConfig, UniTokDepthConfig, UniTokMLLMConfig, UniTokVisionConfig
from .drawing_unitok import IMAGE_GENERATION
from .image_processing_unitok import UniTokImageProcessor
from .modeling_unitok import UniTokModel
from .modeling_unitok_mllm import UniTokMLLMForConditionalGeneration
from .processing_unitok import UniTokMLLMProcessor


StateDict = dict[str, torch.Tensor]

# Original key -> our key, for tensors that are only renamed.
TOKENIZER_KEYS = (
    (r"^(encoder|quant_proj|post_quant_proj|fc_norm|projection)\.", r"vision_model.\1."),
    (r"^text_encoder\.token_embedding\.weight$", "text_model.text_model.embeddings.token_embedding.weight"),
    (r"^text_encoder\.positional_embedding$", "text_model.text_model.embeddings.position_embedding.weight"),
    (r"^text_encoder\.ln_final\.", "text_model.text_model.final_layer_norm."),
    (r"^text_encoder\.text_projection$", "text_model.text_projection.weight"),
    (r"^text_encoder\.transformer\.resblocks\.(\d+)\.", r"text_model.text_model.encoder.layers.\1."),
    (r"(text_model\..*)\.ln_(\d)\.", r"\1.layer_norm\2."),
    (r"(text_model\..*)\.attn\.", r"\1.self_attn."),
    (r"(text_model\..*)\.mlp\.c_fc\.", r"\1.mlp.fc1."),
    (r"(text_model\..*)\.mlp\.c_proj\.", r"\1.mlp.fc2."),
)
MLLM_KEYS = (
    (r"^model\.multi_embedder\.attn_projection\.", "embedder.projection."),
    (r"^model\.multi_embedder\.mm_projector\.0\.", "embedder.norm."),
    (r"^model\.multi_embedder\.mm_projector\.1\.", "embedder.fc1."),
    (r"^model\.multi_embedder\.mm_projector\.3\.", "embedder.fc2."),
    (r"^ar_head\.linear_head\.", "depth_head.head."),
    (r"^ar_head\.(layers|norm)\.", r"depth_head.\1."),
    (r"^(model|lm_head)\.", r"language_model.\1."),
)
MAX_COMPUTED = 2**27  # numbers of a model that are computed from its config, such as position tables
# exceptions of config and model classes for an impossible config
CONFIG_ERRORS = (
    *(LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError, StrictDataclassError),
)
ALWAYS_ZERO = re.compile(r"(^encoder\.pos_embed|\.zero_k_bias)$")
UNUSED = re.compile(r"(^model\.vision_tokenizer\.|\.rotary_emb\.inv_freq$)")


class ConversionError(ValueError):
    """The source cannot be converted. The message names the file or tensor and the reason."""


@dataclass
class ConversionReport:
    """The tensors of a source that were used and left out. `str` of it is a readable summary.

    Attributes:
        used: number of tensors used.
        left_out: names of the tensors left out, with the reason.
    """

    used: int = 0
    left_out: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.used} tensors used, {len(self.left_out)} left out"]
        return "\n".join(lines + [f"  {name}: {why}" for name, why in self.left_out.items()])


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def check_archive(path: str | os.PathLike) -> None:
    """Refuse a compressed archive before any of it is read.

    torch does not compress its files. A compressed one could expand to any size in memory.

    Raises:
        ConversionError: the archive claims more than twice the bytes of its file, or it is not a regular file.
    """
    path = Path(path)
    if not path.is_file():
        raise ConversionError(f"{path} is not a torch checkpoint: it is not a regular file.")
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        held = sum(member.file_size for member in archive.infolist())
    if held > 2 * path.stat().st_size:
        raise ConversionError(f"{path} has {path.stat().st_size} bytes, but claims to hold {held}.")


def check_tensors(state: object, source: str | os.PathLike) -> None:
    """Check that a state dict has only weights: named tensors, dense, real and finite, each number stored.

    Args:
        state: any object that was read from a checkpoint.
        source: its path, for the message.

    Raises:
        ConversionError: an entry is something else; the message names it.
    """
    if not isinstance(state, dict):
        raise ConversionError(f"{source} has a {type(state).__name__}, expected a dict of named tensors.")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ConversionError(f"{source} has a {type(value).__name__} under {name!r}, expected a named tensor.")
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            kind = "meta" if value.is_meta else "quantized" if value.is_quantized else str(value.layout)
            raise ConversionError(f"{source} has the {kind} tensor {name}, expected a dense one.")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ConversionError(
                f"{source} has {name} of shape {tuple(value.shape)} in only {value.untyped_storage().nbytes()} bytes: "
                "its numbers are repeated, not stored."
            )
        if value.is_complex() or not value.isfinite().all():
            raise ConversionError(
                f"{source} has {'complex' if value.is_complex() else 'NaN or infinite'} numbers in {name}."
            )


def read_pickle(path: str | os.PathLike, allow_pickle: bool = False) -> object:
    """Read a torch checkpoint without executing its pickle.

    Args:
        path: the file.
        allow_pickle: execute the pickle if the file does not load otherwise.

    Raises:
        ConversionError: the file is not a torch checkpoint, is compressed, or loads only by executing its pickle while
            `allow_pickle` is False.
    """
    path = Path(path)
    check_archive(path)
    try:
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not allow_pickle:
            raise ConversionError(
                f"{path} is not a torch checkpoint of plain tensors. If you trust it, allow its pickle to be executed "
                f"with --allow-pickle. ({_first_line(error)})"
            ) from error
    except Exception as error:  # the unpickler may raise anything on other kinds of files
        raise ConversionError(f"{path} is not a torch checkpoint: {_first_line(error)}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise ConversionError(f"{path} is not a torch checkpoint: {_first_line(error)}") from error


def _rename(key: str, patterns: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in patterns:
        key = re.sub(pattern, replacement, key)
    return key


def _stack(state: StateDict, prefix: str, suffix: str, count: int) -> torch.Tensor:
    """Remove `prefix.0.suffix` to `prefix.(count - 1).suffix` from `state`, and stack them."""
    names = [f"{prefix}.{i}.{suffix}" for i in range(count)]
    for name in names:
        if name not in state:
            raise ConversionError(f"The checkpoint lacks {name}.")
        if state[name].shape != state[names[0]].shape:
            raise ConversionError(
                f"{name} has the shape {tuple(state[name].shape)}, {names[0]} has {tuple(state[names[0]].shape)}."
            )
    return torch.stack([state.pop(name) for name in names])


def _count_layers(state: StateDict, prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def _take_zeros(state: StateDict, report: ConversionReport) -> None:
    """Remove tensors that are zero by construction. The model has no place for them, so a non-zero one is an error."""
    for name in [name for name in state if ALWAYS_ZERO.search(name)]:
        if state.pop(name).any():
            raise ConversionError(f"{name} is not zero as in every released checkpoint; this model cannot hold it.")
        report.left_out[name] = "zero by construction"


def _load_exactly(model: PreTrainedModel, state: StateDict) -> None:
    """Load the state dict. Missing, unexpected, misshapen or non-finite tensors are errors that name them."""
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ConversionError(f"The checkpoint does not fit: {error}") from error
    if missing or unexpected:
        raise ConversionError(
            f"The checkpoint lacks {missing or 'nothing'} and has unknown {unexpected or 'nothing'}."
        )
    broken = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise ConversionError(f"{len(broken)} tensors are not finite in {model.dtype}, the first is {broken[0]}.")


def _built(model_class: type[PreTrainedModel], config: PreTrainedConfig, state: StateDict) -> PreTrainedModel:
    """Build a model with these weights, in eval mode. Their number is checked before any memory is allocated."""
    try:
        with torch.device("meta"):
            empty = model_class(config)
    except CONFIG_ERRORS as error:
        raise ConversionError(f"The checkpoint's config is impossible: {error!r}") from error
    needed = empty.num_parameters() + sum(map(torch.numel, empty.buffers()))
    held = sum(map(torch.numel, state.values()))
    if needed > 2 * held + MAX_COMPUTED:
        raise ConversionError(f"The config asks for {needed} weights, the checkpoint has {held}.")
    with init.no_init_weights():
        model = model_class(config).eval()
    _load_exactly(model, state)
    return model


def tokenizer_config(args: dict, state: StateDict) -> UniTokConfig:
    """Derive the config from the tensors and arguments of an original tokenizer checkpoint.

    Raises:
        ConversionError: the encoder is not a ViTamin.
        KeyError: a tensor or an argument is missing.
    """
    hidden_size = state["encoder.norm.weight"].shape[0]
    stages = "encoder.patch_embed.backbone.stages"
    codebook_size, codebook_dim = state["quantizer.codebooks.0.codebook.weight"].shape
    num_codebooks = _count_layers(state, "quantizer.codebooks.")
    if not str(args.get("model", "")).startswith("vitamin"):
        raise ConversionError(f"Only ViTamin tokenizers are known, not {args.get('model')!r}.")
    vision = UniTokVisionConfig(
        image_size=args["img_size"],
        stem_width=state["encoder.patch_embed.backbone.stem.conv1.weight"].shape[0],
        stage_dims=[state[f"{stages}.{i}.0.conv3_1x1.weight"].shape[0] for i in range(2)],
        stage_depths=[_count_layers(state, f"{stages}.{i}.") for i in range(2)],
        hidden_size=hidden_size,
        num_hidden_layers=_count_layers(state, "encoder.blocks."),
        num_attention_heads=hidden_size // 64,  # of every ViTamin
        num_codebooks=num_codebooks,
        codebook_size=codebook_size,
        quantizer_dim=num_codebooks * codebook_dim,
        quant_proj="attention" if "quant_proj.attn.qkv.weight" in state else "linear",
        causal_projection=bool(args.get("causal_projection", False)),
        projection_dim=state["projection.weight"].shape[0],
        vq_beta=args.get("vq_beta", 0.25),
    )
    text = None
    if "text_encoder.text_projection" in state:
        layers = "text_encoder.transformer.resblocks."
        text_width, projection_dim = state["text_encoder.text_projection"].shape
        vocab_size = state["text_encoder.token_embedding.weight"].shape[0]
        text = CLIPTextConfig(
            vocab_size=vocab_size,
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
            hidden_size=text_width,
            intermediate_size=state[f"{layers}0.mlp.c_fc.weight"].shape[0],
            projection_dim=projection_dim,
            num_hidden_layers=_count_layers(state, layers),
            num_attention_heads=args["text_heads"],
            max_position_embeddings=state["text_encoder.positional_embedding"].shape[0],
            hidden_act="gelu",
        )
    return UniTokConfig(vision_config=vision, text_config=text, decoder_layers=_count_layers(state, "decoder.blocks."))


def tokenizer_state_dict(state: StateDict, report: ConversionReport) -> StateDict:
    """Convert an original tokenizer's tensors to the names and layouts of `UniTokModel`.

    Args:
        state: the original state dict; it does not change.
        report: the counts and names of the tensors are added to it.
    """
    state = dict(state)
    report.used += len(state)
    _take_zeros(state, report)
    report.used -= len(report.left_out)
    codebooks = "quantizer.codebooks"
    num_codebooks = _count_layers(state, f"{codebooks}.")
    converted = {
        "vision_model.quantizer.codebooks": _stack(state, codebooks, "codebook.weight", num_codebooks),
        "vision_model.quantizer.usage": _stack(state, codebooks, "vocab_usage", num_codebooks),
    }
    for name, tensor in state.items():
        new_name = _rename(name, TOKENIZER_KEYS)
        if ".self_attn.in_proj_" in new_name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                converted[new_name.replace("in_proj_", f"{letter}_proj.")] = part
        else:
            converted[new_name] = tensor.T if new_name == "text_model.text_projection.weight" else tensor
    return converted


def load_original_tokenizer(
    source: str | os.PathLike, allow_pickle: bool = False, causal: bool = False
) -> tuple[UniTokModel, ConversionReport]:
    """Load an original tokenizer `.pth`.

    Args:
        source: the file.
        allow_pickle: execute the file's pickle if it does not load otherwise.
        causal: the checkpoint is of the first release (February 2025), whose attention projections are causal.

    Returns:
        The tokenizer in eval mode, and a report on its tensors.

    Raises:
        ConversionError: the file is not such a checkpoint.
    """
    source = Path(source)
    checkpoint = read_pickle(source, allow_pickle)
    try:
        args, state = checkpoint["args"], checkpoint["trainer"]["unitok"]
        args = dict(vars(args) if isinstance(args, Namespace) else args)
        check_tensors(state, source)
        config = tokenizer_config(args | {"causal_projection": causal}, state)
        report = ConversionReport()
        converted = tokenizer_state_dict(state, report)
    except ConversionError:
        raise
    except CONFIG_ERRORS as error:
        raise ConversionError(
            f"{source} is not a UniTok tokenizer checkpoint ({{'args', 'trainer': {{'unitok': ...}}}}): {error!r}"
        ) from error
    return _built(UniTokModel, config, converted), report


def _image_processor(config: UniTokVisionConfig, mode: str) -> UniTokImageProcessor:
    return UniTokImageProcessor(mode=mode, size={"height": config.image_size, "width": config.image_size})


def convert_tokenizer(
    source: str | os.PathLike, folder: str | os.PathLike, allow_pickle: bool = False, causal: bool = False
) -> ConversionReport:
    """Convert an original tokenizer `.pth` to a folder with config, safetensors and image processor.

    Args:
        source: the `.pth` file.
        folder: the folder to write.
        allow_pickle: see `load_original_tokenizer`.
        causal: see `load_original_tokenizer`.

    Returns:
        A report on the tensors.

    Raises:
        ConversionError: the source is not an original tokenizer checkpoint.

    Example:
        >>> print(convert_tokenizer("unitok_tokenizer.pth", "unitok-large"))
    """
    source, folder = Path(source), Path(folder)
    model, report = load_original_tokenizer(source, allow_pickle, causal)
    model.save_pretrained(folder)
    _image_processor(model.config.vision_config, "reconstruct").save_pretrained(folder)
    return report


def _read_shards(source: Path, allow_pickle: bool) -> StateDict:
    safetensors, pickles = sorted(source.glob("*.safetensors")), sorted(source.glob("pytorch_model*.bin"))
    if not safetensors and not pickles:
        raise ConversionError(f"{source} has neither *.safetensors nor pytorch_model*.bin files.")
    state: StateDict = {}
    for path in safetensors or pickles:
        try:
            shard = load_file(path) if safetensors else read_pickle(path, allow_pickle)
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{path} does not hold named tensors: {error}") from error
        check_tensors(shard, path)
        state |= shard
    return state


def mllm_state_dict(state: StateDict, visual: UniTokModel, report: ConversionReport) -> StateDict:
    """Convert an original MLLM's tensors to the names and layouts of `UniTokMLLMForConditionalGeneration`.

    Args:
        state: the original state dict; it does not change.
        visual: the converted visual tokenizer, whose weights are added.
        report: the counts and names of the tensors are added to it.
    """
    state = dict(state)
    for name in [name for name in state if UNUSED.search(name)]:
        del state[name]
        report.left_out[name] = "a copy of the visual tokenizer, or computed from the config"
    zeros_before = len(report.left_out)
    report.used += len(state)
    _take_zeros(state, report)
    report.used -= len(report.left_out) - zeros_before
    codebooks, num_codebooks = "model.multi_embedder.quantizer.codebooks", visual.config.vision_config.num_codebooks
    converted = {
        "embedder.quantizer.codebooks": _stack(state, codebooks, "codebook.weight", num_codebooks),
        "embedder.quantizer.usage": _stack(state, codebooks, "vocab_usage", num_codebooks),
        "depth_head.embeddings.weight": _stack(state, "ar_head.codebooks", "weight", num_codebooks - 1).flatten(0, 1),
    }
    converted |= {_rename(name, MLLM_KEYS): tensor for name, tensor in state.items()}
    return converted | {f"visual.{name}": tensor for name, tensor in visual.state_dict().items()}


def convert_mllm(
    source: str | os.PathLike, tokenizer: str | os.PathLike, folder: str | os.PathLike, allow_pickle: bool = False
) -> ConversionReport:
    """Convert an original MLLM folder and its tokenizer `.pth` to one folder with model and processor.

    Args:
        source: the original MLLM's folder.
        tokenizer: the `.pth` file of its visual tokenizer.
        folder: the folder to write.
        allow_pickle: see `load_original_tokenizer`.

    Returns:
        A report on the tensors of both.

    Raises:
        ConversionError: one of the sources is not an original checkpoint.
    """
    source, tokenizer, folder = Path(source), Path(tokenizer), Path(folder)
    visual, report = load_original_tokenizer(tokenizer, allow_pickle)
    if not (source / "config.json").is_file():
        raise ConversionError(f"{source} has no config.json.")
    try:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        text_config = AutoConfig.for_model("llama", **{k: v for k, v in config.items() if k != "model_type"})
        text_tokenizer = AutoTokenizer.from_pretrained(source)
    except (*CONFIG_ERRORS, OSError) as error:
        raise ConversionError(f"cannot read the config or the tokenizer in {source}: {error}") from error
    state = _read_shards(source, allow_pickle)
    boi_token, eoi_token = text_tokenizer.convert_ids_to_tokens([3, 4])
    # otherwise "<0x00>" in a text would not be read as the byte token
    text_tokenizer.add_tokens([boi_token, eoi_token], special_tokens=True)
    processor = UniTokMLLMProcessor(
        image_processor=_image_processor(visual.config.vision_config, "understand"),
        tokenizer=text_tokenizer,
        boi_token=boi_token,
        eoi_token=eoi_token,
    )
    try:
        report = ConversionReport(report.used, report.left_out)
        embedder_dim = state["model.multi_embedder.attn_projection.proj.weight"].shape[0]
        depth_config = UniTokDepthConfig(
            num_hidden_layers=_count_layers(state, "ar_head.layers."),
            hidden_size=text_config.hidden_size,
            intermediate_size=text_config.intermediate_size,
            num_attention_heads=text_config.num_attention_heads,
            num_key_value_heads=text_config.num_key_value_heads,
            rms_norm_eps=text_config.rms_norm_eps,
        )
        converted = mllm_state_dict(state, visual, report)
        model_config = UniTokMLLMConfig(
            text_config=text_config,
            visual_config=visual.config,
            depth_config=depth_config,
            embedder_dim=embedder_dim,
            **processor.config_token_ids(),
        )
    except KeyError as error:
        raise ConversionError(f"{source} is not a UniTok MLLM: it has no {error}.") from error
    except CONFIG_ERRORS as error:
        raise ConversionError(f"{source} is not a UniTok MLLM: {error!r}") from error
    model = _built(UniTokMLLMForConditionalGeneration, model_config, converted)
    model.set_image_generation(**IMAGE_GENERATION)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return report


__all__ = ["ConversionError", "ConversionReport", "convert_mllm", "convert_tokenizer", "load_original_tokenizer"]
