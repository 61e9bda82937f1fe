"""The UniTok visual tokenizer and its vision tower (https://arxiv.org/abs/2502.20321).

    pixels -> encoder -> quant_proj -> quantizer -> codes
    codes -> post_quant_proj -> semantic embeddings -> mean, norm, projection -> CLIP-style image embedding
                                                    -> decoder -> pixels

`UniTokVisionModel` has everything up to the image embedding. `UniTokModel` adds the decoder and a CLIP text tower. The
encoder is timm's ViTamin.

Differences from the reference code:

- The K sub-codebooks are one (K, V, D) parameter.
- Nearest 2x upsampling followed by a 3x3 convolution is computed as one transposed convolution of the small map, which
  is exact.
- The text tower is transformers' own CLIP text model.

timm takes seconds to import, so it is imported where one of its modules is built.
"""

import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint_sequential
from transformers import Cache, CLIPTextModelWithProjection, PreTrainedModel
from transformers import initialization as init
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import load_state_dict
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .configuration_unitok import UniTokConfig, UniTokVisionConfig
from .quantization_unitok import UniTokMultiCodebookQuantizer, scattered


# UniTok's GeGLU uses the tanh form of GELU, where timm's ViTamin uses the exact one.
GEGLU_ACTIVATION = "gelu_tanh"
MAX_PIXELS = 2**20  # encoded or decoded at a time: 16 images of 256 x 256
LOGIT_SCALE_BOUNDS = (0.0, math.log(100))  # bounds of the parameter, which is a logarithm
# Arguments that the library's models pass on to each of their parts.
HANDED_DOWN = {*TransformersKwargs.__annotations__, "use_cache"}


@dataclass
class UniTokOutput(ModelOutput):
    """Output of `UniTokModel.forward`: the inputs of all training losses.

    Attributes:
        reconstruction: (B, 3, H, W), not clamped to [-1, 1]; None without `with_reconstruction`.
        codes: (B, K, L), int64.
        vq_loss: scalar, float32.
        entropy_loss: scalar, float32; None without `with_entropy`.
        codebook_usage: scalar, percent: the quantizer's running average over training steps.
        image_embeds: (B, projection_dim), of unit length.
        text_embeds: (B, projection_dim), of unit length; None without `input_ids`.
        logit_scale: scalar, the factor of the cosine similarities; None without a text tower.
        reconstruction_embeds: (B, projection_dim), the embedding of the reconstruction; None without
            `with_reconstruction_embeds`.
    """

    reconstruction: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    vq_loss: torch.Tensor | None = None
    entropy_loss: torch.Tensor | None = None
    codebook_usage: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    logit_scale: torch.Tensor | None = None
    reconstruction_embeds: torch.Tensor | None = None


@dataclass
class UniTokImageFeatures(BaseModelOutputWithPooling):
    """Output of an MLLM's `get_image_features`, for N images.

    Attributes:
        last_hidden_state: (N, L, quantizer_dim), the code vectors.
        pooler_output: (N, L, D), the embedder's output, which replaces the embeddings of the images' placeholders.
        hidden_states: those of the vision tower, if asked for.
        image_codes: (N, K, L), int64.
    """

    image_codes: torch.Tensor | None = None


def refuse_unknown(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse keyword arguments that a function does not know.

    Args:
        where: name of the function, for the message.
        given: names of the arguments that it got.
        known: names of the arguments that it takes.

    Raises:
        TypeError: a name is not known. The message suggests a similar one, if there is one.
    """
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{where} got an unexpected keyword argument {name!r}.{hint}")


def selected(hidden_states: tuple[torch.Tensor, ...] | None, wanted: bool | int | list[int] | None):
    """Select the hidden states that `output_hidden_states` asks for.

    Args:
        hidden_states: all of them.
        wanted: True for all, an index or a list of indices (negative ones count from the end), None or False for none.

    Returns:
        A tuple of the same length, None in the place of those not wanted; None for none.
    """
    if hidden_states is None or wanted is None or wanted is False:
        return None
    if wanted is True:
        return hidden_states
    count = len(hidden_states)
    chosen = {index % count for index in ([wanted] if isinstance(wanted, int) else wanted)}
    return tuple(states if index in chosen else None for index, states in enumerate(hidden_states))


def in_chunks(
    function: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor, image_pixels: int, max_pixels: int
) -> torch.Tensor:
    """Apply a function to a batch of images or codes in chunks, so that memory does not grow with the batch.

    Args:
        function: (b, ...) -> (b, ...), for each row by itself.
        batch: (B, ...).
        image_pixels: H * W of one image.
        max_pixels: H * W of all images of a chunk; a chunk has at least one image.

    Returns:
        The results, concatenated: (B, ...).
    """
    if torch.compiler.is_compiling():  # one graph takes the whole batch
        return function(batch)
    chunks = batch.split(max(1, max_pixels // image_pixels))
    return torch.cat([function(chunk) for chunk in chunks]) if len(chunks) > 1 else function(batch)


class UniTokProjectionAttention(nn.Module):
    """Attention of an attention projection, computed at the wider of its input and output widths.

    Widening concatenates the heads. Narrowing averages the heads, and average-pools a head's dims to `out_dim` if they
    differ. Keys have no bias.

    Args:
        in_dim: width of its input.
        out_dim: width of its output.
        num_heads: number of attention heads.
        causal: whether a token attends only to itself and those before it.

    Raises:
        ValueError: the wider width is not a multiple of `num_heads`.
    """

    def __init__(self, in_dim: int, out_dim: int, num_heads: int, causal: bool):
        super().__init__()
        width = max(in_dim, out_dim)
        if width % num_heads:
            raise ValueError(
                f"The attention projection's width ({width}) is not a multiple of its heads ({num_heads})."
            )
        self.out_dim, self.num_heads, self.causal = out_dim, num_heads, causal
        self.narrowing = in_dim > out_dim
        self.qkv = nn.Linear(in_dim, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(out_dim, out_dim)

    def forward(self, hidden_states: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        batch, length, _ = hidden_states.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = self.qkv(hidden_states) + bias
        query, key, value = qkv.view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mask = None
        if cache is not None:
            key, value = cache.update(key, value, 0)
            if cache.is_compileable:  # of a fixed length, not all of it in use
                mask = torch.arange(key.shape[2], device=key.device)[None] < cache.get_seq_length()
        is_causal = self.causal and length > 1
        hidden_states = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=is_causal
        )  # (B, heads, L, dims)
        if self.narrowing:
            hidden_states = F.adaptive_avg_pool1d(hidden_states.mean(dim=1), self.out_dim)
        else:
            hidden_states = hidden_states.transpose(1, 2).flatten(2)
        return self.proj(hidden_states)


class UniTokAttentionProjection(nn.Module):
    """Attention projection: maps tokens to another width by a linear and an attention branch, then applies a GeGLU.

    It is used before and after the quantizer, and in the embedder of an MLLM.

    Args:
        in_dim: width of its input.
        out_dim: width of its output.
        num_heads: attention heads.
        causal: whether a token attends only to itself and those before it.
    """

    def __init__(self, in_dim: int, out_dim: int, num_heads: int, causal: bool):
        super().__init__()
        from timm.models.vitamin import GeGluMlp

        self.norm1 = nn.LayerNorm(in_dim)
        self.attn = UniTokProjectionAttention(in_dim, out_dim, num_heads, causal)
        self.norm3 = nn.LayerNorm(in_dim)
        self.proj = nn.Linear(in_dim, out_dim)
        self.norm2 = nn.LayerNorm(out_dim)
        self.mlp = GeGluMlp(out_dim, 2 * out_dim, act_layer=GEGLU_ACTIVATION)

    def forward(self, hidden_states: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Project tokens.

        Args:
            hidden_states: (B, L, in_dim).
            cache: for causal projections: keys and values of the tokens before these. The first call may have a whole
                prefix, later calls have one token. With a cache of fixed length, all calls have one token.

        Returns:
            (B, L, out_dim).
        """
        attended = self.attn(self.norm1(hidden_states), cache)
        hidden_states = self.proj(self.norm3(hidden_states)) + attended
        return hidden_states + self.mlp(self.norm2(hidden_states))


def quantizer_projection(config: UniTokVisionConfig, in_dim: int, out_dim: int) -> nn.Module:
    """Build the projection before or after the quantizer: linear, or by attention (`config.quant_proj`)."""
    if config.quant_proj == "linear":
        return nn.Linear(in_dim, out_dim)
    return UniTokAttentionProjection(in_dim, out_dim, config.num_attention_heads, config.causal_projection)


def vitamin_encoder(config: UniTokVisionConfig) -> nn.Module:
    """Build timm's ViTamin in any size, without class token, position embedding or head.

    Returns:
        A module (B, 3, H, W) -> (B, L, hidden_size).
    """
    from timm.layers import HybridEmbed
    from timm.models.vision_transformer import VisionTransformer
    from timm.models.vitamin import GeGluMlp, MbConvStages, VitCfg

    stages = MbConvStages(
        VitCfg(
            embed_dim=(*config.stage_dims, config.hidden_size),
            depths=(*config.stage_depths, 1),
            stem_width=config.stem_width,
        ),
        in_chans=config.num_channels,
    )
    stages.num_features = config.hidden_size
    return VisionTransformer(
        img_size=config.image_size,
        patch_size=1,
        in_chans=config.num_channels,
        num_classes=0,
        global_pool="",
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=config.mlp_ratio,
        class_token=False,
        pos_embed="none",
        fc_norm=False,
        dynamic_img_size=True,
        drop_path_rate=config.drop_path_rate,
        weight_init="skip",
        embed_layer=partial(
            HybridEmbed, backbone=stages, proj=False, feature_size=config.image_size // config.patch_size
        ),
        mlp_layer=GeGluMlp,
        act_layer=GEGLU_ACTIVATION,
    )


class UniTokUpsampledConv2d(nn.Conv2d):
    """A nearest 2x upsampling and a 3x3 convolution, computed as one transposed convolution of the small map.

    Each output pixel depends on only 2x2 input pixels. A transposed convolution of stride 2, whose 4x4 kernel sums the
    rows and columns of the 3x3 kernel, therefore gives the same values with 4/9 of the arithmetic.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, in, H, W) -> (B, out, 2 H, 2 W)."""
        sums = self.weight.new_tensor([[0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]])
        kernel = self.weight.flatten(2) @ torch.kron(sums, sums)  # (out, in, 16)
        kernel = kernel.unflatten(2, (4, 4)).transpose(0, 1)
        return F.conv_transpose2d(hidden_states, kernel, self.bias, stride=2, padding=1)


class UniTokUpsampleConv(nn.Module):
    """Nearest 2x upsampling, then a 3x3 convolution."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = UniTokUpsampledConv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(hidden_states)


class UniTokMBConvBlock(nn.Module):
    """Inverted MBConv block of the decoder: 1x1 to 4x the output channels, depthwise 3x3, 1x1, around a shortcut.

    Args:
        in_channels: channels of its input.
        out_channels: channels of its output.
        upsample: double the height and width, between the first two convolutions.
    """

    def __init__(self, in_channels: int, out_channels: int, upsample: bool = False):
        super().__init__()
        from timm.layers import LayerNorm2d

        width = 4 * out_channels
        if upsample:
            self.shortcut = UniTokUpsampleConv(in_channels, out_channels)
        elif in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1)
        else:
            self.shortcut = nn.Identity()
        self.pre_norm = LayerNorm2d(in_channels, eps=1e-6)
        self.conv1_1x1 = nn.Conv2d(in_channels, width, 1)
        self.up = UniTokUpsampleConv(width, width) if upsample else nn.Identity()
        self.conv2_kxk = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.conv3_1x1 = nn.Conv2d(width, out_channels, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        shortcut = self.shortcut(hidden_states)
        hidden_states = self.up(F.gelu(self.conv1_1x1(self.pre_norm(hidden_states))))
        return shortcut + self.conv3_1x1(F.gelu(self.conv2_kxk(hidden_states)))


class UniTokDecoderStem(nn.Module):
    """The last step to pixels: upsample 2x, LayerNorm and GELU, a 3x3 convolution to RGB."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        from timm.layers import LayerNorm2d

        self.conv1 = UniTokUpsampleConv(channels, channels)
        self.norm1 = LayerNorm2d(channels, eps=1e-6)
        self.conv2 = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv2(F.gelu(self.norm1(self.conv1(hidden_states))))


class UniTokDecoder(nn.Module):
    """The decoder, which mirrors the encoder: transformer blocks on the tokens, then four 2x upsamplings to pixels.

    Args:
        config: `decoder_layers` is the number of blocks; all widths are those of `vision_config`.
    """

    def __init__(self, config: UniTokConfig):
        super().__init__()
        from timm.models.vision_transformer import Block
        from timm.models.vitamin import GeGluMlp

        vision = config.vision_config
        self.gradient_checkpointing = False
        self.blocks = nn.Sequential(
            *[
                Block(
                    vision.hidden_size,
                    vision.num_attention_heads,
                    mlp_ratio=vision.mlp_ratio,
                    qkv_bias=True,
                    drop_path=vision.drop_path_rate * i / max(1, config.decoder_layers - 1),
                    norm_layer=partial(nn.LayerNorm, eps=1e-6),
                    act_layer=partial(nn.GELU, approximate="tanh"),
                    mlp_layer=GeGluMlp,
                )
                for i in range(config.decoder_layers)
            ]
        )
        self.norm = nn.LayerNorm(vision.hidden_size, eps=1e-6)
        narrow, wide = vision.stage_dims
        shallow, deep = vision.stage_depths
        self.up_conv1 = UniTokUpsampleConv(vision.hidden_size, wide)
        self.up_conv2 = nn.Sequential(*[UniTokMBConvBlock(wide, wide, upsample=i == 0) for i in range(deep)])
        self.up_conv3 = nn.Sequential(
            *[UniTokMBConvBlock(wide if i == 0 else narrow, narrow, upsample=i == 0) for i in range(shallow)]
        )
        self.up_conv4 = UniTokDecoderStem(narrow, vision.num_channels)

    def forward(self, hidden_states: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        """Decode semantic embeddings.

        Args:
            hidden_states: (B, h * w, hidden_size).
            grid_size: (h, w).

        Returns:
            (B, 3, 16 h, 16 w), not clamped.
        """
        if self.gradient_checkpointing and self.training:
            hidden_states = checkpoint_sequential(self.blocks, len(self.blocks), hidden_states, use_reentrant=False)
        else:
            hidden_states = self.blocks(hidden_states)
        hidden_states = self.norm(hidden_states).transpose(1, 2).unflatten(2, grid_size)
        hidden_states = self.up_conv3(self.up_conv2(self.up_conv1(hidden_states)))
        return self.up_conv4(hidden_states)


def part_prefix(names: Iterable[str], own_names: Iterable[str]) -> str:
    """Return the prefix of this model's weights in the checkpoint of a larger model that contains it.

    Args:
        names: names of the checkpoint's weights.
        own_names: names of this model's weights.

    Returns:
        The prefix with its dot, such as "visual."; "" if the checkpoint is of this model itself.
    """
    own_names, prefixes = set(own_names), Counter()
    for name in names:
        steps = name.split(".")
        suffixes = (".".join(steps[i:]) for i in range(len(steps)))
        prefixes.update(name.removesuffix(suffix) for suffix in suffixes if suffix in own_names)
    return max(prefixes, key=prefixes.get, default="")


class UniTokPreTrainedModel(PreTrainedModel):
    """Initialisation and loading, shared by the tower, the tokenizer and the MLLM."""

    config: UniTokConfig
    base_model_prefix = "unitok"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block", "MbConvLNBlock", "UniTokMBConvBlock", "UniTokAttentionProjection"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
            init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        elif isinstance(module, UniTokMultiCodebookQuantizer):
            if isinstance(module.codebooks, nn.Parameter):
                init.normal_(module.codebooks, std=module.codebooks.shape[-1] ** -0.5)  # about unit length
            else:
                init.copy_(module.codebooks, scattered(module.codebooks.shape, module.codebooks.device))
            init.zeros_(module.usage)
        elif isinstance(module, UniTokProjectionAttention):
            init.zeros_(module.q_bias)
            init.zeros_(module.v_bias)
        elif isinstance(module, UniTokModel) and module.logit_scale is not None:
            init.constant_(module.logit_scale, math.log(1 / 0.07))

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False: all weights here are initialised by the library's functions, which do not touch loaded ones.

        For custom code, the library skips the initialisation of modules whose own weights are loaded. It would then
        skip buffers that these modules fill in their children (in LLMs of the Falcon-H1 family).
        """
        return False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """Load the model, as the library does, from its own folder or from that of a model that contains it.

        Args:
            pretrained_model_name_or_path: folder, or name on the hub.
            output_loading_info: also return the library's dict of missing and unexpected weights.
            args: passed to the library's method.
            kwargs: passed to the library's method.

        Raises:
            ValueError: the folder lacks some of the weights, and `output_loading_info` is False.
        """
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        if output_loading_info:
            return model, info
        if info["missing_keys"] and kwargs.get("state_dict") is None:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(info['missing_keys'])} of the {len(model.state_dict())} "
                f"weights of a {cls.__name__}, {min(info['missing_keys'])} among them."
            )
        return model

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        """Load as the library does; from the folder of a larger model, load the part that is this model."""
        if checkpoint_files is None:
            return PreTrainedModel._load_pretrained_model(
                model, state_dict, checkpoint_files, load_config, *args, **kwargs
            )
        names = [name for file in checkpoint_files for name in load_state_dict(file, map_location="meta")]
        prefix = part_prefix(names, model.state_dict())
        own_mapping = load_config.weight_mapping
        if prefix:
            mapping = [WeightRenaming(rf"^{re.escape(prefix)}", ""), *(own_mapping or [])]
            load_config = replace(load_config, weight_mapping=mapping)
        info, offload_index = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )
        if prefix:
            model._weight_conversions = own_mapping  # saved under its own names, not those of the source
            info.unexpected_keys -= {name for name in names if not name.startswith(prefix)}
        return info, offload_index


class UniTokVisionModel(UniTokPreTrainedModel):
    """The vision tower: pixels to codes and semantic embeddings.

    It can be the vision tower of transformers' models, such as LLaVA (`vision_feature_layer=-1`,
    `vision_feature_select_strategy="full"`). It loads from the folder of a tokenizer, an MLLM or a LLaVA.

    Args:
        config: sizes of the encoder and the quantizer.

    Example:
        >>> tower = UniTokVisionModel.from_pretrained(folder)
        >>> tower.encode(torch.zeros(1, 3, 64, 64)).shape  # of the shipped model
        torch.Size([1, 8, 16])
    """

    config: UniTokVisionConfig
    config_class = UniTokVisionConfig
    base_model_prefix = "vision_model"

    def __init__(self, config: UniTokVisionConfig):
        super().__init__(config)
        self.gradient_checkpointing = False
        self.encoder = vitamin_encoder(config)
        self.quant_proj = quantizer_projection(config, config.hidden_size, config.quantizer_dim)
        self.quantizer = UniTokMultiCodebookQuantizer(
            config.num_codebooks,
            config.codebook_size,
            config.quantizer_dim,
            beta=config.vq_beta,
            entropy_temperature=config.entropy_temperature,
        )
        self.post_quant_proj = quantizer_projection(config, config.quantizer_dim, config.hidden_size)
        self.fc_norm = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.projection = nn.Linear(config.hidden_size, config.projection_dim)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.patch_embed

    def grid_size(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """Return the rows and columns of positions of these pixels.

        Args:
            pixel_values: (B, 3, H, W).

        Raises:
            ValueError: the shape is not (B, 3, H, W), or a side is not a multiple of 16.
        """
        channels, stride = self.config.num_channels, self.config.patch_size
        if pixel_values.dim() != 4 or pixel_values.shape[1] != channels:
            raise ValueError(f"Expected pixel_values of shape (B, {channels}, H, W), got {tuple(pixel_values.shape)}.")
        height, width = pixel_values.shape[2:]
        if height % stride or width % stride or not height or not width:
            raise ValueError(f"The image size {height}x{width} is not a multiple of the stride {stride}.")
        return height // stride, width // stride

    def encode_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Compute the features before quantization: (B, 3, H, W) in [-1, 1] -> (B, L, quantizer_dim)."""
        return self.quant_proj(self._encoder(pixel_values)(pixel_values.to(self.dtype)))

    def _encoder(self, pixel_values: torch.Tensor) -> nn.Module:
        """Check the pixels' size and set the encoder's checkpointing."""
        self.grid_size(pixel_values)
        self.encoder.set_grad_checkpointing(self.gradient_checkpointing and self.training)
        return self.encoder

    def encode(self, pixel_values: torch.Tensor, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
        """Encode pixels (B, 3, H, W) in [-1, 1] to codes (B, K, L), int64, L row-major; see `UniTokModel.encode`."""
        rows, columns = self.grid_size(pixel_values)
        image_pixels = rows * columns * self.config.patch_size**2
        return in_chunks(
            lambda pixels: self.quantizer.encode(self.encode_features(pixels)), pixel_values, image_pixels, max_pixels
        )

    def embed_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Embed codes (B, K, L) as semantic embeddings (B, L, hidden_size)."""
        return self.post_quant_proj(self.quantizer.decode(codes))

    def pool(self, semantic_embeds: torch.Tensor) -> torch.Tensor:
        """Pool semantic embeddings (B, L, hidden_size) to image embeddings (B, projection_dim) of unit length."""
        return F.normalize(self.projection(self.fc_norm(semantic_embeds.mean(dim=1))), dim=-1)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        track_usage: bool = True,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Embed images through their codes, with a straight-through gradient.

        Args:
            pixel_values: (B, 3, H, W) in [-1, 1].
            output_hidden_states: True for all, or the indices of those to return, with None for the others; None for
                the config's setting.
            output_attentions: refused: the encoder's attention returns no weights.
            track_usage: in training, count their codes in the quantizer's usage.
            kwargs: arguments that the library passes to all parts of a model; ignored here.

        Returns:
            `last_hidden_state`: the semantic embeddings (B, L, C), C = hidden_size. `pooler_output`: the image
            embedding (B, projection_dim) of unit length. `hidden_states`, if asked for: the tokens (B, L, C) after
            each block of the encoder, then `last_hidden_state`. (So -1 is the semantic embeddings, and -2 the
            encoder's last tokens before its final norm.)

        Raises:
            ValueError: pixels of another shape, see `grid_size`, or `output_attentions`.
            TypeError: an argument that the library does not know.
        """
        refuse_unknown("UniTokVisionModel.forward", kwargs, HANDED_DOWN | {"pixel_values"})
        if output_attentions:
            raise ValueError("output_attentions: the tower's encoder (timm's ViTamin) gives no attention weights.")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        encoder, states = self._encoder(pixel_values), []
        if output_hidden_states is not False and output_hidden_states != [-1]:
            tokens, states = encoder.forward_intermediates(pixel_values.to(self.dtype), output_fmt="NLC")
        else:
            tokens = encoder(pixel_values.to(self.dtype))
        semantic_embeds = self.post_quant_proj(
            self.quantizer(self.quant_proj(tokens), track_usage=track_usage).features
        )
        return BaseModelOutputWithPooling(
            last_hidden_state=semantic_embeds,
            pooler_output=self.pool(semantic_embeds),
            hidden_states=selected((*states, semantic_embeds), output_hidden_states),
        )


class UniTokModel(UniTokPreTrainedModel):
    """The visual tokenizer: images to codes and back, and images and texts to one embedding space.

    It loads from its own folder, or from that of an MLLM that contains it.

    Args:
        config: sizes; without a `text_config` it has no text tower.

    Example:
        >>> tokenizer = UniTokModel.from_pretrained(folder).eval()
        >>> image_processor = AutoImageProcessor.from_pretrained(folder)
        >>> codes = tokenizer.encode(image_processor(picture)["pixel_values"])  # (1, K, L)
        >>> (reconstruction,) = image_processor.post_process(tokenizer.decode(codes))
    """

    config_class = UniTokConfig
    base_model_prefix = "visual"

    def __init__(self, config: UniTokConfig):
        super().__init__(config)
        self.vision_model = UniTokVisionModel._from_config(config.vision_config)
        self.decoder = UniTokDecoder(config)
        self.text_model = self.logit_scale = None
        if config.text_config is not None:
            self.text_model = CLIPTextModelWithProjection._from_config(config.text_config)
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.get_input_embeddings()

    def encode(self, pixel_values: torch.Tensor, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
        """Encode images to codes.

        Args:
            pixel_values: (B, 3, H, W) in [-1, 1]; H and W are any multiples of 16.
            max_pixels: pixels (H * W of each image) to encode at a time, at least one image. It limits the memory and
                does not change the codes.

        Returns:
            (B, K, L), int64, L = H/16 * W/16, row-major.

        Raises:
            ValueError: another shape, or a side that is not a multiple of 16.
        """
        return self.vision_model.encode(pixel_values, max_pixels)

    def decode(
        self, codes: torch.Tensor, image_size: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS
    ) -> torch.Tensor:
        """Decode codes to images.

        Args:
            codes: (B, K, L), integers in [0, V).
            image_size: (H, W) in pixels; None for a square image.
            max_pixels: pixels (H * W of each image) to decode at a time, at least one image. It limits the memory.

        Returns:
            (B, 3, H, W), clamped to [-1, 1].

        Raises:
            ValueError: L does not match `image_size`, or is not a square number and `image_size` is None.
            IndexError: a code lies outside [0, V), on a CPU.
        """
        grid_size = self._grid_of_codes(codes, image_size)
        image_pixels = math.prod(grid_size) * self.config.vision_config.patch_size**2
        return in_chunks(
            lambda chunk: self.decoder(self.vision_model.embed_codes(chunk), grid_size).clamp(-1, 1),
            codes,
            image_pixels,
            max_pixels,
        )

    def _grid_of_codes(self, codes: torch.Tensor, image_size: tuple[int, int] | None) -> tuple[int, int]:
        length, stride = codes.shape[-1], self.config.vision_config.patch_size
        if image_size is None:
            side = math.isqrt(length)
            if side * side != length:
                raise ValueError(f"{length} positions do not make a square: give image_size=(height, width).")
            return side, side
        height, width = image_size
        if height % stride or width % stride or (height // stride) * (width // stride) != length:
            raise ValueError(f"An image of {height}x{width} with stride {stride} does not have {length} positions.")
        return height // stride, width // stride

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Clamp `logit_scale` to its bounds; to be called after each optimizer step."""
        if self.logit_scale is not None:
            self.logit_scale.clamp_(*LOGIT_SCALE_BOUNDS)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Return the vision tower's output for (B, 3, H, W) in [-1, 1]; see `UniTokVisionModel.forward`.

        `pooler_output` is the image embedding, (B, projection_dim), of unit length.
        """
        return self.vision_model(pixel_values, **kwargs)

    @can_return_tuple
    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Return the text tower's output.

        Args:
            input_ids: (B, T), each row with an end-of-text token.
            attention_mask: (B, T), 0 for padding.
            kwargs: `output_hidden_states`, `output_attentions`.

        Returns:
            `last_hidden_state`: (B, T, text width). `pooler_output`: the text embedding (B, projection_dim), of unit
            length, from the state at the first end-of-text token.

        Raises:
            ValueError: the tokenizer has no text tower.
        """
        if self.text_model is None:
            raise ValueError("This tokenizer has no text tower (its config's text_config is None).")
        output = self.text_model.text_model(input_ids, attention_mask=attention_mask, **kwargs)
        # The library's own pooling takes the largest id of a text for its end wherever eos_token_id is 2.
        ends = (input_ids == self.config.text_config.eos_token_id).int().argmax(dim=1)
        pooled = output.last_hidden_state[torch.arange(len(ends), device=ends.device), ends]
        output.pooler_output = F.normalize(self.text_model.text_projection(pooled), dim=-1)
        return output

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        with_entropy: bool = False,
        with_reconstruction_embeds: bool = False,
        with_reconstruction: bool = True,
        **kwargs,
    ) -> UniTokOutput:
        """Run the training pass: reconstruct and embed images, and embed captions.

        Args:
            pixel_values: (B, 3, H, W) in [-1, 1].
            input_ids: (B, T), the captions; None for no text.
            attention_mask: (B, T), 0 for padding.
            with_entropy: also compute the quantizer's entropy loss.
            with_reconstruction_embeds: also embed the reconstruction (for cross-task consistency).
            with_reconstruction: False to compute only embeddings and codes, without counting the codes in `usage`.
            kwargs: arguments that the library passes to all models; ignored here.

        Returns:
            The inputs of all losses, by name.

        Raises:
            ValueError: pixels of another shape, see `UniTokVisionModel.grid_size`; captions without a text tower; an
                embedding of the reconstruction without one.
            TypeError: an argument that the library does not know.
        """
        refuse_unknown("UniTokModel.forward", kwargs, HANDED_DOWN)
        vision, logit_scale = self.vision_model, self.logit_scale
        if logit_scale is not None and not self.training:  # clamping would zero its gradient outside the bounds
            logit_scale = logit_scale.clamp(*LOGIT_SCALE_BOUNDS)
        grid_size = vision.grid_size(pixel_values)
        if with_reconstruction_embeds and not with_reconstruction:
            raise ValueError("with_reconstruction_embeds needs with_reconstruction.")
        quantized = vision.quantizer(
            vision.encode_features(pixel_values), with_entropy=with_entropy, track_usage=with_reconstruction
        )
        semantic_embeds = vision.post_quant_proj(quantized.features)
        reconstruction = self.decoder(semantic_embeds, grid_size) if with_reconstruction else None
        text_embeds = reconstruction_embeds = None
        if input_ids is not None:
            text_embeds = self.get_text_features(input_ids, attention_mask, return_dict=True).pooler_output
        if with_reconstruction_embeds:
            reconstruction_embeds = vision(
                reconstruction, output_hidden_states=False, track_usage=False, return_dict=True
            ).pooler_output
        return UniTokOutput(
            reconstruction=reconstruction,
            codes=quantized.codes,
            vq_loss=quantized.vq_loss,
            entropy_loss=quantized.entropy_loss,
            codebook_usage=vision.quantizer.codebook_usage,
            image_embeds=vision.pool(semantic_embeds),
            text_embeds=text_embeds,
            logit_scale=None if logit_scale is None else logit_scale.exp(),
            reconstruction_embeds=reconstruction_embeds,
        )


__all__ = ["UniTokImageFeatures", "UniTokModel", "UniTokOutput", "UniTokPreTrainedModel", "UniTokVisionModel"]
