"""The unified multimodal LLM of UniTok (https://arxiv.org/abs/2502.20321, section 3.3): one causal LM that reads images
and draws them.

    reading   bos ... boi IMG*L eoi ... question ... answer eos
    drawing   bos caption boi IMG*L eoi eos

An image, read or drawn, enters the LLM as the embeddings of its codes.  The state before each IMG position of a drawn
image predicts that position's K codes through the depth transformer; every other target is plain text.

Differences from the reference code: the LLM is any causal LM of transformers, held whole; the embedder's causal
attention keeps a key/value cache while drawing, so that a drawn code group sees the groups before it, as in training.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_unitok import UniTokDepthConfig, UniTokMLLMConfig
from .depth_unitok import UniTokDepthTransformer
from .generation_unitok import UniTokGenerationMixin
from .modeling_unitok import UniTokAttentionProjection, UniTokModel, UniTokPreTrainedModel
from .quantization_unitok import UniTokMultiCodebookQuantizer


@dataclass
class UniTokMLLMOutput(ModelOutput):
    """What `UniTokMLLMForConditionalGeneration.forward` returns.

    Attributes:
        loss: scalar, the mean of the two below weighted by their numbers of targets; only with `labels` or
            `image_targets`.
        text_loss: scalar, mean cross-entropy of the text targets; 0 where there are none.
        image_loss: scalar, mean cross-entropy of all codes of the target images, plus the z-loss; 0 where there are
            none.
        logits: (B, T or logits_to_keep, vocabulary), the LLM's; see also `logits_at_targets`.
        image_logits: (N, L, K, V), of the N target images; only with `image_targets`.
        cache: the LLM's key/value cache.
        hidden_states: the LLM's, where asked for.
    """

    loss: torch.Tensor | None = None
    text_loss: torch.Tensor | None = None
    image_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    image_logits: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


@contextmanager
def _only_at(output_embeddings: nn.Module, chosen: torch.Tensor | None) -> Iterator[None]:
    """Inside, the output embeddings see (1, M, D) of their (B, T, D): the M positions chosen, (B, T); all for None.

    Other threads that use the model meanwhile are left alone.
    """
    if chosen is None:
        yield
        return
    owner = get_ident()

    def choose(_, args):
        return (args[0][chosen][None], *args[1:]) if get_ident() == owner else args

    handle = output_embeddings.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()


class UniTokEmbedder(nn.Module):
    """Codes to LLM inputs, for reading and for drawing alike.

    Frozen code vectors (a buffer: whatever trains the whole module leaves them alone), a causal attention projection,
    then a LayerNorm and two linear layers around a GELU.
    """

    def __init__(self, config: UniTokMLLMConfig):
        super().__init__()
        vision, llm_width = config.visual_config.vision_config, config.llm_sizes.hidden_size
        self.quantizer = UniTokMultiCodebookQuantizer(vision.num_codebooks, vision.codebook_size, vision.quantizer_dim)
        del self.quantizer.codebooks
        shape = vision.num_codebooks, vision.codebook_size, vision.quantizer_dim // vision.num_codebooks
        self.quantizer.register_buffer("codebooks", torch.randn(shape))
        self.projection = UniTokAttentionProjection(
            vision.quantizer_dim, config.embedder_dim, config.embedder_heads, causal=True
        )
        self.norm = nn.LayerNorm(config.embedder_dim, eps=1e-6)
        self.fc1 = nn.Linear(config.embedder_dim, llm_width)
        self.fc2 = nn.Linear(llm_width, llm_width)

    def unfreeze_codebooks(self) -> None:
        """Makes the code vectors a parameter, for a training to come; a saved folder loads frozen again."""
        codebooks = self.quantizer.codebooks
        del self.quantizer.codebooks
        self.quantizer.codebooks = nn.Parameter(codebooks)

    def forward(self, codes: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Codes (N, K, L) -> (N, L, D). With a `cache`, the codes go on from those already seen, one at a time."""
        features = self.quantizer.decode(codes).to(self.fc1.weight.dtype)
        return self.fc2(F.gelu(self.fc1(self.norm(self.projection(features, cache)))))


class UniTokBackbone:
    """The model without the LLM's output layer, for trainers that apply that layer themselves (trl does).

    Called with `input_ids`, `attention_mask` and images, see `UniTokMLLMForConditionalGeneration.embed`, it returns what
    the LLM's decoder does: `last_hidden_state` (B, T, D).
    """

    _tp_plan = _pp_plan = None

    def __init__(self, model: "UniTokMLLMForConditionalGeneration"):
        self.model = model

    def __call__(self, input_ids, attention_mask=None, pixel_values=None, image_codes=None, **kwargs):
        inputs_embeds, _ = self.model.embed(input_ids, pixel_values, image_codes)
        return self.model.get_decoder()(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)


class UniTokMLLMForConditionalGeneration(UniTokPreTrainedModel, UniTokGenerationMixin):
    """A causal LM, the visual tokenizer, the embedder and the depth transformer: one folder does everything.

    The visual tokenizer is frozen: it takes no gradient and stays in eval mode.
    """

    config_class = UniTokMLLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    output_modalities = ("image", "text")
    accepts_loss_kwargs = False
    _no_split_modules = [*UniTokPreTrainedModel._no_split_modules, "UniTokDepthTransformer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: UniTokMLLMConfig,
        language_model: PreTrainedModel | None = None,
        visual: UniTokModel | None = None,
    ):
        """Builds every part but the two that may be given, see `from_parts`."""
        super().__init__(config)
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.language_model = language_model
        self.visual = UniTokModel._from_config(config.visual_config) if visual is None else visual
        self.embedder = UniTokEmbedder(config)
        self.depth_head = UniTokDepthTransformer(config)
        self.visual.requires_grad_(False)
        self.post_init()

    @classmethod
    def from_parts(
        cls,
        language_model: PreTrainedModel,
        visual: UniTokModel,
        depth_config: UniTokDepthConfig | dict | None = None,
        **config_kwargs,
    ) -> "UniTokMLLMForConditionalGeneration":
        """Joins a causal LM and a visual tokenizer, whose modules it takes over, with a fresh embedder and depth head.

        Args:
            language_model: any causal LM of transformers, weights and generation config included.
            visual: a trained tokenizer; its codebooks become the embedder's.
            depth_config: sizes of the depth transformer.
            config_kwargs: other arguments of `UniTokMLLMConfig`.
        """
        attention = {part: part.config._attn_implementation for part in (language_model, visual)}
        config = UniTokMLLMConfig(
            text_config=language_model.config,
            visual_config=visual.config,
            depth_config=depth_config.to_dict() if isinstance(depth_config, UniTokDepthConfig) else depth_config,
            **config_kwargs,
        )
        for part, implementation in attention.items():
            part.config._attn_implementation = implementation  # becoming part of a config resets it
        model = cls(config, language_model, visual.eval())
        generation_config = copy.deepcopy(language_model.generation_config)
        suppressed = generation_config.suppress_tokens or []
        generation_config.suppress_tokens = [*suppressed, config.image_token_id]  # a placeholder is no answer
        model.generation_config = generation_config
        model.embedder.quantizer.load_state_dict(visual.vision_model.quantizer.state_dict())
        return model

    def train(self, mode: bool = True) -> "UniTokMLLMForConditionalGeneration":
        super().train(mode)
        self.visual.requires_grad_(False).eval()  # loading makes every parameter trainable, then calls `eval`
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    @property
    def base_model(self) -> UniTokBackbone:
        return UniTokBackbone(self)

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) in [-1, 1] -> codes (N, K, L)."""
        return self.visual.encode(pixel_values)

    @torch.no_grad()
    def decode_images(self, codes: torch.Tensor, image_size: tuple[int, int] | None = None) -> torch.Tensor:
        """Codes (N, K, L) -> (N, 3, H, W) in [-1, 1], also for no images; see `UniTokModel.decode`."""
        if len(codes) == 0:
            size = self.config.visual_config.vision_config.image_size
            return torch.zeros(0, 3, *(image_size or (size, size)), dtype=self.dtype, device=codes.device)
        return self.visual.decode(codes, image_size)

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_codes: torch.Tensor | None = None,
        is_prompt: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The LLM's inputs: token embeddings, and at the image placeholders those of the images' codes.

        Args:
            input_ids: (B, T).
            pixel_values: (N, 3, H, W), all the batch's images in the order of their placeholders; or
            image_codes: (N, K, L), their codes.
            is_prompt: False to skip the check that a batch without images has no placeholders.

        Returns:
            Embeddings (B, T, D), and the codes (N, K, L) or None.

        Raises:
            ValueError: both kinds of images were given, or the placeholders of each row are not L for each of its
                images.
        """
        if pixel_values is not None:
            if image_codes is not None:
                raise ValueError("Give either pixel_values or image_codes, not both.")
            image_codes = self.encode_images(pixel_values)
        is_image = input_ids == self.config.image_token_id
        inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        if image_codes is None:
            if is_prompt and is_image.any():
                raise ValueError(f"The text has {int(is_image.sum())} image placeholders, but no images were given.")
            if self.training:  # every rank must use every trainable parameter
                unused = self.embedder(input_ids.new_zeros(1, self.embedder.quantizer.num_codebooks, 1))
                inputs_embeds = inputs_embeds + 0.0 * unused.sum().to(inputs_embeds.dtype)
            return inputs_embeds, None
        image_embeds = self.embedder(image_codes).to(inputs_embeds)
        self.images_per_sample(input_ids, *image_embeds.shape[:2])
        return inputs_embeds.masked_scatter(is_image[..., None], image_embeds), image_codes

    def images_per_sample(self, input_ids: torch.Tensor, num_images: int, num_positions: int) -> list[int]:
        """How many of the images belong to each row of `input_ids` (B, T).

        Raises:
            ValueError: the rows' placeholders are not `num_positions` for each of `num_images` images.
        """
        placeholders = (input_ids == self.config.image_token_id).sum(dim=1)
        if (placeholders % num_positions).any() or placeholders.sum() != num_images * num_positions:
            raise ValueError(
                f"The texts have {placeholders.tolist()} image placeholders, "
                f"but {num_images} images need {num_positions} each."
            )
        return (placeholders // num_positions).tolist()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_codes: torch.Tensor | None = None,
        image_targets: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_loss_share: float = 1.0,
        logits_at_targets: bool = False,
        **kwargs,
    ) -> UniTokMLLMOutput:
        """One pass over text and images.

        Args:
            input_ids: (B, T), `image_token_id` at image positions; or `inputs_embeds`, (B, T, D), without images.
            attention_mask: (B, T), 0 at padding.
            pixel_values or image_codes: all the batch's images, see `embed`.
            image_targets: (N,), bool: which of the images are to be drawn; None for none of them.
            labels: (B, T), the ids at text targets, -100 elsewhere; image positions are never text targets.
            logits_to_keep: how many of the last positions' logits to return (0: all), without labels.
            image_loss_share: the share of the target images' positions, drawn anew each time, that the depth
                transformer is run on: its mean over them is an unbiased estimate of the whole image loss, for that
                share of its time and memory. Below 1 there are no `image_logits`.
            logits_at_targets: with labels, compute the LLM's logits only where a text target is predicted: the same
                loss, without the time and memory of all others. `logits` is then (M, vocabulary), for M targets.

        Raises:
            ValueError: see `embed`; or `image_targets` that are not N, or begin a sequence; or a share outside (0, 1].
        """
        if not 0 < image_loss_share <= 1:
            raise ValueError(f"image_loss_share must be above 0 and at most 1, got {image_loss_share}.")
        if inputs_embeds is None:
            is_prompt = cache is None or cache.get_seq_length() == 0
            inputs_embeds, image_codes = self.embed(input_ids, pixel_values, image_codes, is_prompt)
        elif pixel_values is not None or image_codes is not None or image_targets is not None:
            raise ValueError("Images go with input_ids, not with inputs_embeds.")
        with_loss = labels is not None or image_targets is not None
        output_hidden_states = kwargs.pop("output_hidden_states", False)
        if labels is not None and input_ids is not None:
            labels = labels.masked_fill(input_ids == self.config.image_token_id, -100)
        is_target = F.pad(labels[:, 1:] != -100, (0, 1)) if labels is not None and logits_at_targets else None
        with _only_at(self.get_output_embeddings(), is_target):
            outputs = self.language_model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=cache,
                use_cache=False if with_loss else use_cache,
                logits_to_keep=0 if with_loss else logits_to_keep,
                output_hidden_states=with_loss or output_hidden_states,
                return_dict=True,
                **{key: value for key, value in kwargs.items() if key != "return_dict"},
            )
        logits = outputs.logits if is_target is None else outputs.logits.squeeze(0)
        result = UniTokMLLMOutput(
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states if output_hidden_states else None,
        )
        if not with_loss:
            return result
        text_sum, text_count = self._text_loss(logits, labels, is_target)
        image_logits, targets = self._image_logits(
            outputs.hidden_states[-1], input_ids, attention_mask, image_codes, image_targets, image_loss_share
        )
        image_mean = self._image_loss(image_logits, targets)
        image_count = 0 if targets is None else int(image_targets.sum()) * image_codes[0].numel()
        result.loss = (text_sum + image_count * image_mean) / (text_count + image_count).clamp_min(1)
        result.text_loss = text_sum / text_count.clamp_min(1)
        result.image_loss = image_mean
        if targets is not None and image_loss_share == 1:
            result.image_logits = image_logits.unflatten(0, (-1, image_codes.shape[-1]))
        return result

    @staticmethod
    def _text_loss(logits, labels, is_target) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the cross-entropies of the text targets, and their number."""
        if labels is None:
            return 0.0 * logits.float().sum(), logits.new_zeros((), dtype=torch.long)
        if is_target is None:
            logits, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        else:
            targets = labels[:, 1:][is_target[:, :-1]]
        text_sum = F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")
        return text_sum, (targets != -100).sum()

    def _image_logits(self, hidden_states, input_ids, attention_mask, image_codes, image_targets, share):
        """Depth logits (N * L, K, V) of the N target images and their codes (N * L, K), or of a share of the N * L.

        Without target images, the logits of a stand-in and None, so that every parameter is used all the same.
        """
        num_images = 0 if image_codes is None else len(image_codes)
        if image_targets is not None and image_targets.shape != (num_images,):
            raise ValueError(
                f"image_targets has shape {tuple(image_targets.shape)}, but there are {num_images} images."
            )
        if image_targets is None or not image_targets.any():
            stand_in = image_codes.new_zeros if image_codes is not None else hidden_states.new_zeros
            codes = stand_in((1, self.depth_head.num_codebooks), dtype=torch.long)
            return self.depth_head(hidden_states[:1, 0], codes), None
        image_targets = image_targets.to(device=hidden_states.device, dtype=torch.bool)
        is_image = input_ids == self.config.image_token_id
        is_target = is_image.masked_scatter(is_image, image_targets.repeat_interleave(image_codes.shape[-1]))
        is_token = torch.ones_like(is_target) if attention_mask is None else attention_mask.bool()
        if (is_target & ~F.pad(is_token[:, :-1], (1, 0))).any():
            raise ValueError(
                "A target image begins its sequence: the first code group has nothing to be predicted from."
            )
        targets = image_codes[image_targets].transpose(1, 2).flatten(0, 1)  # (N * L, K)
        states = hidden_states[:, :-1][is_target[:, 1:]]
        if share < 1:
            chosen = torch.randperm(len(targets), device=targets.device)[: max(1, round(share * len(targets)))]
            states, targets = states[chosen], targets[chosen]
        return self.depth_head(states, targets), targets

    def _image_loss(self, image_logits, targets) -> torch.Tensor:
        """Mean cross-entropy over all codes plus the z-loss."""
        logits = image_logits.float()
        if targets is None:
            return 0.0 * logits.sum()
        cross_entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        z_loss = logits.amax(dim=-1).square().mean()
        return cross_entropy + self.config.image_loss_z_weight * z_loss


__all__ = ["UniTokEmbedder", "UniTokMLLMForConditionalGeneration", "UniTokMLLMOutput"]
