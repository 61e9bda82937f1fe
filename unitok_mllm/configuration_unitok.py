"""Configurations of the UniTok visual tokenizer and of the unified multimodal LLM.

Paper: UniTok, https://arxiv.org/abs/2502.20321. Letters used throughout the package: B batch, K sub-codebooks, V codes
in each sub-codebook, L image positions (height/16 * width/16, row-major), C hidden size of the tower, D hidden size of
the LLM.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from difflib import get_close_matches

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, CLIPTextConfig, GenerationConfig, LlamaConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)


# Inclusive limits: far above any trained model, far below what would exhaust the memory.
WIDTH, DEPTH, VOCABULARY = (1, 2**16), (0, 1000), (1, 2**22)
SHARE, WEIGHT, ABOVE_ZERO = (0.0, 1.0), (0.0, 1e6), (1e-12, 1e12)
# Inclusive range of each field, by model type. For a CLIP text tower and an LLM, only the fields used here.
RANGES = {
    "unitok_vision_model": {
        "image_size": (16, 2**14),
        "num_channels": WIDTH,
        "stem_width": WIDTH,
        "stage_dims": WIDTH,
        "stage_depths": (1, DEPTH[1]),
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "mlp_ratio": (ABOVE_ZERO[0], 64),
        "quantizer_dim": WIDTH,
        "projection_dim": WIDTH,
        "vq_beta": WEIGHT,
        "entropy_temperature": ABOVE_ZERO,
        "drop_path_rate": SHARE,
        "initializer_range": WEIGHT,
    },
    "unitok": {"decoder_layers": DEPTH, "initializer_range": WEIGHT},
    "clip_text_model": {
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "projection_dim": WIDTH,
        "max_position_embeddings": WIDTH,
        "vocab_size": VOCABULARY,
        "num_hidden_layers": DEPTH,
    },
    "unitok_depth": {
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": WIDTH,
        "num_key_value_heads": WIDTH,
        "rms_norm_eps": SHARE,
        "rope_theta": ABOVE_ZERO,
        "initializer_range": WEIGHT,
    },
    "unitok_mllm": {
        "embedder_dim": WIDTH,
        "image_token_id": (0, 2**31 - 1),
        "image_loss_z_weight": WEIGHT,
        "initializer_range": WEIGHT,
    },
    "llm": {"vocab_size": VOCABULARY, "hidden_size": WIDTH},
}


def check_ranges(config: object, prefix: str = "", **ranges: tuple[float, float]) -> None:
    """Check that each field (or list item) lies in its inclusive range; None passes.

    Args:
        config: the object with the fields.
        prefix: text before a field's name in the message.
        ranges: lowest and highest value of each field.

    Raises:
        ValueError: a value lies outside its range, or is NaN.
    """
    for name, (least, most) in ranges.items():
        value = getattr(config, name)
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if not all(number is None or least <= number <= most for number in numbers):
            raise ValueError(f"{prefix}{name} ({value}) is not between {least} and {most}.")


# Fields that the library, its trainers and its quantizers add to any config, besides those of `PreTrainedConfig`.
LIBRARY_FIELDS = frozenset(GenerationConfig()._get_default_generation_params()) | {
    *("_attn_implementation", "_attn_implementation_internal", "_experts_implementation_internal", "_name_or_path"),
    *("attn_implementation", "auto_map", "bos_token_id", "custom_pipelines", "decoder_start_token_id"),
    *("distributed_config", "eos_token_id", "experts_implementation", "fusion_config", "is_decoder", "model_type"),
    *("name_or_path", "num_labels", "output_attentions", "pad_token_id", "per_layer_config", "quantization_config"),
    *("tie_word_embeddings", "tokenizer_class", "torch_dtype", "transformers_weights", "use_cache"),
}


class UniTokPreTrainedConfig(PreTrainedConfig):
    """Base class of the configs: refuses misspelt fields, and loads from the folder of a model that contains it."""

    def __post_init__(self, **kwargs):
        # The library keeps unknown fields, and its other versions write more. A name close to a field is a mistake.
        unknown = [
            name for name in kwargs.keys() - LIBRARY_FIELDS if get_close_matches(name, self.own_fields(), 1, 0.8)
        ]
        if unknown:
            raise TypeError(
                f"{type(self).__name__} got unexpected arguments: {', '.join(sorted(unknown))}. "
                f"It takes {', '.join(self.own_fields())}."
            )
        super().__post_init__(**kwargs)

    @classmethod
    def own_fields(cls) -> list[str]:
        """List the fields that the library's configs do not have."""
        return [field.name for field in fields(cls) if field.name not in PreTrainedConfig.__annotations__]

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Read a folder's config, as the library does; if this config is a part of it, at any depth, return the part.

        Raises:
            ValueError: the folder has a model of another type, without a part of this type.
        """
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if cls.model_type:
            own = next((part for part in _parts(config_dict) if part.get("model_type") == cls.model_type), None)
            if own is None:
                raise ValueError(
                    f"{pretrained_model_name_or_path} has a model of type {config_dict.get('model_type')!r}, with "
                    f"none of type {cls.model_type!r} in it."
                )
            config_dict = own
        return config_dict, kwargs


def _parts(config_dict: dict) -> Iterator[dict]:
    """Iterate over a config's dict and the dicts in it, outer ones first."""
    level = [config_dict]
    while level:
        yield from level
        level = [value for part in level for value in part.values() if isinstance(value, dict)]


@strict
class UniTokVisionConfig(UniTokPreTrainedConfig):
    """The vision tower: a ViTamin encoder, the multi-codebook quantizer, and the projections around it.

    The defaults are the released `large` model; `UniTokConfig.preset` names the others.

    Args:
        image_size: height and width of the images, in pixels; a multiple of 16.
        num_channels: colour channels.
        stem_width: channels of the stem.
        stage_dims: channels of the two MBConv stages.
        stage_depths: blocks of the two MBConv stages.
        hidden_size: C, width of the transformer after the stages.
        num_hidden_layers: blocks of the transformer.
        num_attention_heads: attention heads of each block.
        mlp_ratio: GeGLU width over `hidden_size`.
        num_codebooks: K.
        codebook_size: V, at most 65536.
        quantizer_dim: dims of a token before quantization, split evenly over the K sub-codebooks.
        quant_proj: "attention" (the paper's attention projection) or "linear".
        causal_projection: whether the attention projections are causal (the first release, February 2025) or full
            (the release of April 2025).
        projection_dim: dims of the CLIP-style image embedding.
        vq_beta: weight of the commitment term of the VQ loss.
        entropy_temperature: softmax temperature of the entropy loss.
        drop_path_rate: stochastic depth in the transformer blocks, in training.
        initializer_range: standard deviation of initial weights.

    Raises:
        ValueError: an impossible geometry, or a value outside its range; the message names both numbers.
    """

    model_type = "unitok_vision_model"
    base_config_key = "vision_config"
    patch_size = 16

    image_size: int = 256
    num_channels: int = 3
    stem_width: int = 160
    stage_dims: list[int] | tuple[int, ...] = (160, 320)
    stage_depths: list[int] | tuple[int, ...] = (2, 4)
    hidden_size: int = 1024
    num_hidden_layers: int = 31
    num_attention_heads: int = 16
    mlp_ratio: float | int = 2.0
    num_codebooks: int = 8
    codebook_size: int = 4096
    quantizer_dim: int = 64
    quant_proj: str = "attention"
    causal_projection: bool = False
    projection_dim: int = 768
    vq_beta: float | int = 0.25
    entropy_temperature: float | int = 0.01
    drop_path_rate: float | int = 0.0
    initializer_range: float = 0.02

    def validate_architecture(self):
        if self.image_size <= 0 or self.image_size % self.patch_size:
            raise ValueError(f"image_size ({self.image_size}) is not a multiple of the stride ({self.patch_size}).")
        if self.num_codebooks <= 0 or self.quantizer_dim % self.num_codebooks:
            raise ValueError(
                f"quantizer_dim ({self.quantizer_dim}) is not a multiple of num_codebooks ({self.num_codebooks})."
            )
        if self.num_attention_heads <= 0 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) is not a multiple of "
                f"num_attention_heads ({self.num_attention_heads})."
            )
        if not 0 < self.codebook_size <= 2**16:
            raise ValueError(f"codebook_size ({self.codebook_size}) is not between 1 and 65536: codes are uint16.")
        if len(self.stage_dims) != 2 or len(self.stage_depths) != 2:
            raise ValueError(
                f"A ViTamin has two convolution stages, got stage_dims {self.stage_dims} "
                f"and stage_depths {self.stage_depths}."
            )
        if self.quant_proj not in ("attention", "linear"):
            raise ValueError(f"quant_proj is 'attention' or 'linear', got {self.quant_proj!r}.")
        check_ranges(self, **RANGES["unitok_vision_model"])

    @property
    def num_positions(self) -> int:
        """L, the positions of one image of `image_size`."""
        return (self.image_size // self.patch_size) ** 2


@strict
class UniTokConfig(UniTokPreTrainedConfig):
    """The whole tokenizer: vision tower, decoder (which mirrors the tower), and an optional CLIP text tower.

    Args:
        vision_config: a `UniTokVisionConfig`, or its dict.
        text_config: a `CLIPTextConfig`, or its dict; None for a tokenizer without a text tower.
        decoder_layers: transformer blocks of the decoder; None for as many as the encoder has.
        initializer_range: standard deviation of initial weights.

    Raises:
        ValueError: a value outside its range, or towers of different `projection_dim`.

    Example:
        >>> UniTokConfig.preset("tiny", image_size=128).vision_config.num_positions
        64
    """

    model_type = "unitok"
    base_config_key = "visual_config"
    sub_configs_defaults = {
        "vision_config": UniTokVisionConfig,
        "text_config": SubConfigSpec(config_class=CLIPTextConfig, optional=True),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    decoder_layers: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.decoder_layers is None:
            self.decoder_layers = self.vision_config.num_hidden_layers

    def validate_architecture(self):
        check_ranges(self, **RANGES["unitok"])
        if self.text_config is not None:
            check_ranges(self.text_config, "text_config.", **RANGES["clip_text_model"])
        if self.text_config is not None and self.text_config.projection_dim != self.vision_config.projection_dim:
            raise ValueError(
                f"The text tower's projection_dim ({self.text_config.projection_dim}) is not the vision tower's "
                f"({self.vision_config.projection_dim})."
            )

    @classmethod
    def preset(cls, name: str, text_overrides: dict | None = None, **vision_overrides) -> "UniTokConfig":
        """Make the config of a known size: `large` and `base` (the paper's), `tiny` (64 px, trains on a laptop).

        Args:
            name: name of the size.
            text_overrides: fields of the text config to override.
            vision_overrides: fields of the vision config to override.

        Raises:
            ValueError: an unknown name.
        """
        if name not in PRESETS:
            raise ValueError(f"Unknown preset {name!r}; known: {', '.join(PRESETS)}.")
        vision, text = PRESETS[name]
        return cls(vision_config={**vision, **vision_overrides}, text_config={**text, **(text_overrides or {})})


_CLIP_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_attention_heads": 12,
    "hidden_act": "gelu",
}
PRESETS = {
    "large": ({}, _CLIP_TEXT),
    "base": (
        {
            "stem_width": 128,
            "stage_dims": (128, 256),
            "hidden_size": 768,
            "num_hidden_layers": 14,
            "num_attention_heads": 12,
        },
        _CLIP_TEXT,
    ),
    "tiny": (
        {
            "image_size": 64,
            "stem_width": 32,
            "stage_dims": (32, 64),
            "stage_depths": (1, 2),
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "codebook_size": 512,
            "projection_dim": 128,
        },
        {
            "vocab_size": 512,
            "hidden_size": 128,
            "intermediate_size": 512,
            "projection_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "hidden_act": "gelu",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
}


@strict
class UniTokDepthConfig(UniTokPreTrainedConfig):
    """The depth transformer that predicts the K codes of one image position, one after the other.

    Its layers are Llama's, with RoPE positions 0..K-1.

    Args:
        hidden_size: width of the layers; None for the LLM's. If they differ, a linear layer maps the LLM's states.
        intermediate_size: width of the feed-forward layers; None for the LLM's if the hidden sizes agree, else for 4
            times `hidden_size`.
        num_hidden_layers: number of layers; 0 predicts each code from its input alone.
        num_attention_heads: attention heads; None for heads of 64 dims (one head if the width is below 64).
        num_key_value_heads: key/value heads; None for as many as attention heads.
        rms_norm_eps: epsilon of the RMSNorms.
        rope_theta: base of the rotary frequencies.
        hidden_act: activation of the feed-forward layers.
        initializer_range: standard deviation of initial weights.

    Raises:
        ValueError: an impossible geometry, a value outside its range, or an option of Llama that these layers do not
            have.
    """

    model_type = "unitok_depth"
    base_config_key = "depth_config"

    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int = 3
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    rms_norm_eps: float | int = 1e-5
    rope_theta: float | int = 10000.0
    hidden_act: str = "silu"
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        llama = {field.name: field.default for field in fields(LlamaConfig)}
        for name in kwargs.keys() & llama.keys() - LIBRARY_FIELDS - PreTrainedConfig.__annotations__.keys():
            if kwargs[name] is not None and kwargs[name] != llama[name]:
                raise ValueError(
                    f"The depth transformer does not take {name} ({kwargs[name]!r}): its layers are plain Llama layers."
                )
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        check_ranges(self, **RANGES["unitok_depth"])
        for whole, part in (
            ("hidden_size", "num_attention_heads"),
            ("num_attention_heads", "num_key_value_heads"),
        ):
            size, count = getattr(self, whole), getattr(self, part)
            if size is not None and count is not None and size % count:
                raise ValueError(f"{whole} ({size}) is not a multiple of {part} ({count}).")
        if self.hidden_size is not None and self.num_attention_heads is not None:
            if self.hidden_size // self.num_attention_heads % 2:
                raise ValueError(
                    f"hidden_size ({self.hidden_size}) over num_attention_heads ({self.num_attention_heads}) is odd; "
                    "RoPE rotates pairs of dims."
                )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act ({self.hidden_act!r}) is not an activation function of transformers.")

    def llama_config(self, num_codebooks: int) -> LlamaConfig:
        """The `LlamaConfig` from which the layers are built."""
        return LlamaConfig(
            vocab_size=1,
            bos_token_id=None,
            eos_token_id=None,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            rms_norm_eps=self.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            max_position_embeddings=num_codebooks,
            hidden_act=self.hidden_act,
        )


@dataclass(frozen=True)
class LLMSizes:
    """Sizes of an LLM, under the same names for all families.

    Attributes:
        hidden_size: width of its input embeddings and of its output states.
        intermediate_size: width of its feed-forward layers; 4 times `hidden_size` if its config names none.
        vocab_size: number of tokens.
        max_positions: length of the longest sequence; None for no limit.
    """

    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_positions: int | None


# Names of each size in the families of transformers. The first one that a config has as a number is used.
_SIZE_NAMES = {
    "hidden_size": ("word_embed_proj_dim", "hidden_size"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "dff"),
    "vocab_size": ("vocab_size",),
    "max_positions": ("max_position_embeddings", "max_seq_len", "max_target_positions"),
}


# Families that count positions from the left edge, padding included, unless position_ids are given.
LEARNED_POSITIONS = {
    *("bert", "bert-generation", "big_bird", "biogpt", "electra", "ernie", "gpt2", "gpt_bigcode", "gpt_neo"),
    *("megatron-bert", "rembert", "roc_bert", "xglm"),
}
_OFFSET = "its positions start behind the padding token's"
_NO_CACHE = "it has no key/value cache of the library's kind"
_NO_POSITIONS = "it takes no positions, and counts padding"
# Families that cannot be the LLM, with the reason; see `docs/llm_families.md`.
UNSUITABLE_LLMS = {
    **dict.fromkeys(("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta"), _OFFSET),
    **dict.fromkeys(("xlm-roberta-xl", "xmod"), _OFFSET),
    **dict.fromkeys(("minimax", "openai-gpt", "recurrent_gemma", "reformer", "rwkv", "xlm", "xlnet"), _NO_CACHE),
    **dict.fromkeys(("trocr", "whisper"), _NO_POSITIONS),
    **dict.fromkeys(
        ("deepseek_v4", "gemma3n_text", "gemma4_text", "gemma4_unified_text"),
        "its layers take token ids beside embeddings",
    ),
    **dict.fromkeys(("musicgen_decoder", "musicgen_melody_decoder"), "it has one output layer for each codebook"),
    **dict.fromkeys(("emu3_text_model", "mllama_text_model"), "the library cannot load it from its own config"),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "it is a draft model, without keys of its own"),
    **dict.fromkeys(("ctrl", "doge", "moshi"), "what it computes with its cache is not what it computes without"),
    "blt": "it takes bytes",
    "cpmant": "it takes no embeddings",
    "git": "it expects an image encoder of its own",
    "xlstm": "it has no mask for padding",
}


def check_llm(config: PreTrainedConfig) -> None:
    """Refuse LLMs that cannot be the LLM of a UniTok MLLM.

    Raises:
        ValueError: its family cannot be the LLM; the message gives the reason.
    """
    reason = UNSUITABLE_LLMS.get(config.model_type)
    if config.is_encoder_decoder or config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        reason = "it is half of an encoder-decoder"
    elif reason is None and getattr(config, "is_decoder", True) is False:
        reason = "it looks ahead: its config needs is_decoder=True"
    if reason is not None:
        raise ValueError(f"A {config.model_type!r} cannot be the LLM: {reason}.")


def llm_sizes(config: PreTrainedConfig) -> LLMSizes:
    """Read the sizes of an LLM from its config.

    Raises:
        ValueError: the config has no hidden size or no vocabulary size.
    """
    sizes = {
        size: next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)
        for size, names in _SIZE_NAMES.items()
    }
    for size in ("hidden_size", "vocab_size"):
        if sizes[size] is None:
            raise ValueError(f"The LLM's config ({type(config).__name__}) has no {size}.")
    return LLMSizes(**{**sizes, "intermediate_size": sizes["intermediate_size"] or 4 * sizes["hidden_size"]})


@strict
class UniTokMLLMConfig(UniTokPreTrainedConfig):
    """The unified multimodal LLM: any causal LM, the visual tokenizer, the embedder and the depth transformer.

    Args:
        text_config: the LLM's own config, or its dict with `model_type`; any causal LM of transformers.
        visual_config: a `UniTokConfig`, or its dict.
        depth_config: a `UniTokDepthConfig`, or its dict. Sizes left out follow the LLM.
        embedder_dim: width of the embedder's causal attention projection.
        embedder_heads: attention heads of that projection.
        boi_token_id: the token that opens an image.
        eoi_token_id: the token that closes an image.
        image_token_id: the placeholder at image positions. It is never looked up, so it may lie beyond the LLM's
            vocabulary.
        image_loss_z_weight: weight of the z-loss (mean squared maximal logit) in the image loss.
        image_prompt_ids: the tokens that turn a description into a prompt for an image, the opening token last.
            Drawing adds them to prompts that do not open an image (those of the library's pipelines). With None, such
            a prompt is an error.
        unconditional_prompt_ids: the null prompt of guidance, for calls without one. With None, such a call is an
            error.
        initializer_range: standard deviation of initial weights.
        tie_word_embeddings: whether the LLM's input and output embeddings are one weight.

    Raises:
        ValueError: an LLM that cannot be the LLM, token ids that coincide, or a value outside its range.
    """

    model_type = "unitok_mllm"
    keys_to_ignore_at_inference = [
        "cache",
        "text_loss",
        "image_loss",
        "num_text_targets",
        "num_image_targets",
        "image_logits",
    ]
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "visual_config": UniTokConfig,
        "depth_config": UniTokDepthConfig,
    }

    text_config: dict | PreTrainedConfig | None = None
    visual_config: dict | PreTrainedConfig | None = None
    depth_config: dict | PreTrainedConfig | None = None
    embedder_dim: int = 1024
    embedder_heads: int = 16
    boi_token_id: int = 3
    eoi_token_id: int = 4
    image_token_id: int = 32000
    image_loss_z_weight: float | int = 5e-5
    image_prompt_ids: list[int] | None = None
    unconditional_prompt_ids: list[int] | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_llm(self.text_config)
        depth, text = self.depth_config, llm_sizes(self.text_config)
        same_width = depth.hidden_size in (None, text.hidden_size)
        if depth.hidden_size is None:
            depth.hidden_size = text.hidden_size
        if depth.intermediate_size is None:
            depth.intermediate_size = text.intermediate_size if same_width else 4 * depth.hidden_size
        if depth.num_attention_heads is None:
            depth.num_attention_heads = max(1, depth.hidden_size // 64)
        if depth.num_key_value_heads is None:
            depth.num_key_value_heads = depth.num_attention_heads

    def validate_architecture(self):
        if self.embedder_heads <= 0 or self.embedder_dim % self.embedder_heads:
            raise ValueError(
                f"embedder_dim ({self.embedder_dim}) is not a multiple of embedder_heads ({self.embedder_heads})."
            )
        if len({self.boi_token_id, self.eoi_token_id, self.image_token_id}) != 3:
            raise ValueError(
                f"boi_token_id ({self.boi_token_id}), eoi_token_id ({self.eoi_token_id}) and "
                f"image_token_id ({self.image_token_id}) must differ."
            )
        check_ranges(self.text_config, "text_config.", num_hidden_layers=DEPTH)
        check_ranges(self.llm_sizes, "text_config.", **RANGES["llm"])
        in_vocabulary = (0, self.llm_sizes.vocab_size - 1)
        ids = ("boi_token_id", "eoi_token_id", "image_prompt_ids", "unconditional_prompt_ids")
        check_ranges(self, **RANGES["unitok_mllm"], **dict.fromkeys(ids, in_vocabulary))
        for name in ("image_prompt_ids", "unconditional_prompt_ids"):
            ids = getattr(self, name)
            if ids is not None and ids[-1:] != [self.boi_token_id]:
                raise ValueError(f"{name} ({ids}) must end with boi_token_id ({self.boi_token_id}).")
        self.depth_config.validate_architecture()  # sizes left out have been filled in by now

    def save_pretrained(self, save_directory, **kwargs):
        """Save the config, as the library does; its `auto_map` gets all Auto classes of the model, for servers."""
        auto_map = vars(self).get("auto_map") or {}
        if name := auto_map.get("AutoModelForImageTextToText"):
            auto_map["AutoModelForMultimodalLM"] = name
            auto_map["AutoModel"] = f"{name.rpartition('.')[0]}.UniTokMLLMModel"
        super().save_pretrained(save_directory, **kwargs)

    @property
    def llm_sizes(self) -> LLMSizes:
        """The LLM's sizes, see `llm_sizes`."""
        return llm_sizes(self.text_config)

    @property
    def num_image_positions(self) -> int:
        """L, the positions of one image in the sequence."""
        return self.visual_config.vision_config.num_positions


# Programs that look a model up by its name (the library's pipelines and server) find this one like the library's own.
for _names in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
    _names[UniTokMLLMConfig.model_type] = "UniTokMLLMForConditionalGeneration"

__all__ = ["UniTokConfig", "UniTokDepthConfig", "UniTokMLLMConfig", "UniTokVisionConfig"]
