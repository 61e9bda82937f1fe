"""UniTok's unified multimodal LLM: one causal LM that reads images and draws them.

See https://arxiv.org/abs/2502.20321, section 3.3. Two kinds of sequences:

    reading   bos ... boi IMG*L eoi ... question ... answer eos
    drawing   bos caption boi IMG*L eoi eos

An image, read or drawn, enters the LLM as the embeddings of its codes. The state before each IMG position of a drawn
image predicts that position's K codes through the depth transformer. All other targets are text.

Differences from the reference code:

- The LLM is any causal LM of transformers, as a whole.
- The embedder's causal attention has a key/value cache while drawing. Each drawn position therefore attends to those
  before it, as in training.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial
from inspect import signature

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from .chunked_loss_unitok import loss_in_chunks
from .configuration_unitok import LEARNED_POSITIONS, UniTokDepthConfig, UniTokMLLMConfig
from .depth_unitok import UniTokDepthTransformer
from .generation_unitok import UniTokGenerationMixin, is_used
from .modeling_unitok import (
    HANDED_DOWN,
    UniTokAttentionProjection,
    UniTokImageFeatures,
    UniTokModel,
    UniTokPreTrainedModel,
    refuse_unknown,
    selected,
)
from .quantization_unitok import UniTokMultiCodebookQuantizer
from .scoring_unitok import UniTokScoringMixin


# LLMs whose logits are their output layer applied to the decoder's states, without scaling or capping.
PLAIN_HEADS = {
    *("arcee", "ernie4_5", "exaone4", "gemma", "glm", "glm4", "gpt_neox", "helium", "lfm2", "llama", "ministral"),
    *("mistral", "nemotron", "olmo", "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3"),
    *("stablelm", "starcoder2"),
}
CHUNK_ROWS = 1024  # text tokens, or codes, whose logits are in memory together


@dataclass
class UniTokMLLMOutput(ModelOutput):
    """Output of `UniTokMLLMForConditionalGeneration.forward`.

    Attributes:
        loss: scalar, the mean over all targets, text tokens and codes; None without labels and `image_targets`.
        logits: (B, T, vocabulary), the LLM's; fewer with `logits_to_keep` or `logits_at_targets`; None for losses
            alone.
        cache: the LLM's key/value cache.
        hidden_states: the LLM's, if asked for.
        attentions: the LLM's attention weights, if asked for and if its attention implementation returns them.
        text_loss: scalar, mean cross-entropy of the text targets; 0 without any.
        image_loss: scalar, mean cross-entropy of all codes of the target images, plus the z-loss; 0 without any.
        num_text_targets: scalar, int64: number of tokens in `text_loss`.
        num_image_targets: scalar, int64: number of codes of the target images, whatever the `image_loss_share`, since the
            mean over a share estimates the mean over all.
        image_logits: (N, L, K, V), for the N target images; None without `image_targets`, or for losses alone.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    text_loss: torch.Tensor | None = None
    image_loss: torch.Tensor | None = None
    num_text_targets: torch.Tensor | None = None
    num_image_targets: torch.Tensor | None = None
    image_logits: torch.Tensor | None = None


class UniTokEmbedder(nn.Module):
    """The embedder: codes to LLM inputs, both for reading and for drawing.

    It looks up frozen code vectors, then applies a causal attention projection, a LayerNorm and two linear layers
    around a GELU. The code vectors are a buffer, so that training the whole module does not change them.

    Args:
        config: sizes of the tokenizer, the embedder and the LLM.
    """

    def __init__(self, config: UniTokMLLMConfig):
        super().__init__()
        vision, llm_width = config.visual_config.vision_config, config.llm_sizes.hidden_size
        self.quantizer = UniTokMultiCodebookQuantizer(
            vision.num_codebooks, vision.codebook_size, vision.quantizer_dim, trainable=False
        )
        self.projection = UniTokAttentionProjection(
            vision.quantizer_dim, config.embedder_dim, config.embedder_heads, causal=True
        )
        self.norm = nn.LayerNorm(config.embedder_dim, eps=1e-6)
        self.fc1 = nn.Linear(config.embedder_dim, llm_width)
        self.fc2 = nn.Linear(llm_width, llm_width)

    def unfreeze_codebooks(self) -> None:
        """Make the code vectors a parameter, to train them. A saved folder loads them frozen again."""
        codebooks = self.quantizer.codebooks
        del self.quantizer.codebooks
        self.quantizer.codebooks = nn.Parameter(codebooks)

    def forward(self, codes: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Embed codes.

        Args:
            codes: (N, K, L), integers in [0, V).
            cache: keys and values of the positions before these. The first call may have a whole prefix, later calls
                have one position.

        Returns:
            (N, L, D).
        """
        features = self.quantizer.decode(codes).to(self.fc1.weight.dtype)
        return self.fc2(F.gelu(self.fc1(self.norm(self.projection(features, cache)))))


class UniTokMLLMModel(UniTokPreTrainedModel):
    """The backbone: a causal LM, the visual tokenizer and the embedder. It maps text and images to the LLM's states.

    The visual tokenizer is frozen: it has no gradient and stays in eval mode.

    Args:
        config: of all parts.
        language_model: a causal LM to use; None to build one from the config.
        visual: a visual tokenizer to use; None to build one from the config.
    """

    config: UniTokMLLMConfig
    config_class = UniTokMLLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    _keys_to_ignore_on_load_unexpected = [r"^depth_head\."]
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: UniTokMLLMConfig,
        language_model: PreTrainedModel | None = None,
        visual: UniTokModel | None = None,
    ):
        super().__init__(config)
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.language_model = language_model
        self.visual = UniTokModel._from_config(config.visual_config) if visual is None else visual
        self.embedder = UniTokEmbedder(config)
        self.visual.requires_grad_(False)
        self.post_init()

    def train(self, mode: bool = True) -> "UniTokMLLMModel":
        super().train(mode)
        self.visual.requires_grad_(False).eval()  # loading makes every parameter trainable, then calls `eval`
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        decoder = self.language_model.get_decoder()
        if decoder is self.language_model or not isinstance(decoder, PreTrainedModel):  # Llama 4, ModernBERT
            return self.language_model.model
        return decoder

    def _positions(self, position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None):
        """Return the positions given. For an LLM that would count padding, derive them from the mask (B, T)."""
        if position_ids is not None or attention_mask is None or attention_mask.dim() != 2:
            return position_ids
        if self.config.text_config.model_type not in LEARNED_POSITIONS:
            return None
        return (attention_mask.long().cumsum(dim=1) - 1).clamp_min(0)

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode images (N, 3, H, W) in [-1, 1] to codes (N, K, L), in chunks; see `UniTokModel.encode`."""
        return self.visual.encode(pixel_values)

    @torch.no_grad()
    def decode_images(self, codes: torch.Tensor, image_size: tuple[int, int] | None = None) -> torch.Tensor:
        """Decode codes (N, K, L) to images (N, 3, H, W) in [-1, 1]; N may be 0. See `UniTokModel.decode`."""
        if len(codes) == 0:
            size = self.config.visual_config.vision_config.image_size
            return torch.zeros(0, 3, *(image_size or (size, size)), dtype=self.dtype, device=codes.device)
        return self.visual.decode(codes, image_size)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        image_codes: torch.Tensor | None = None,
        **kwargs,
    ) -> UniTokImageFeatures | tuple[torch.Tensor, ...]:
        """Compute the embeddings of images for the LLM, from pixels or codes.

        Args:
            pixel_values: (N, 3, H, W) in [-1, 1].
            image_codes: (N, K, L), instead of pixels.
            kwargs: with pixels, `output_hidden_states` of the vision tower; `return_dict=False` for a tuple.

        Raises:
            ValueError: both pixels and codes were given, or neither, or outputs of the tower are asked for with codes.
        """
        if (pixel_values is None) == (image_codes is None):
            given = "not both" if image_codes is not None else "got neither"
            raise ValueError(f"Give either pixel_values or image_codes, {given}.")
        hidden_states = None
        wanted = any(value not in (None, False) for value in kwargs.values())
        if wanted or (image_codes is None and self.visual.vision_model.config.output_hidden_states):
            if image_codes is not None:
                raise ValueError(f"The vision tower, which gives {', '.join(kwargs)}, does not run for image_codes.")
            hidden_states = self.visual.vision_model(pixel_values, **kwargs).hidden_states
        if image_codes is None:
            image_codes = self.encode_images(pixel_values)
        return UniTokImageFeatures(
            last_hidden_state=self.embedder.quantizer.decode(image_codes),
            pooler_output=self.embedder(image_codes),
            hidden_states=hidden_states,
            image_codes=image_codes,
        )

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_codes: torch.Tensor | None = None,
        is_prompt: bool = True,
        image_features: BaseModelOutputWithPooling | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the LLM's inputs: token embeddings, with the images' embeddings at the placeholders.

        The images come as pixels, codes or features.

        Args:
            input_ids: (B, T).
            pixel_values: (N, 3, H, W) in [-1, 1], all images of the batch in the order of their placeholders.
            image_codes: (N, K, L), instead of pixels.
            is_prompt: False to skip the check that a batch without images has no placeholders.
            image_features: the output of `get_image_features`, instead of pixels; or only the rows of these
                placeholders, for a part of a prompt with a part of an image.

        Returns:
            Embeddings (B, T, D), and the codes (N, K, L) or None.

        Raises:
            ValueError: more than one of pixels, codes and features was given, or a row does not have L placeholders
                for each of its images.
        """
        is_image = input_ids == self.config.image_token_id
        inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        if pixel_values is not None or image_codes is not None:
            if image_features is not None:
                raise ValueError("Give images either raw or as mm_encoder_outputs, not both.")
            image_features = self.get_image_features(pixel_values, image_codes, return_dict=True)
        if image_features is None:
            if is_prompt and is_image.any():
                raise ValueError(f"The text has {int(is_image.sum())} image placeholders, but no images were given.")
            if self.training:  # every rank must use every trainable parameter
                unused = self.embedder(input_ids.new_zeros(1, self.embedder.quantizer.num_codebooks, 1))
                inputs_embeds = inputs_embeds + 0.0 * unused.sum().to(inputs_embeds.dtype)
            return inputs_embeds, None
        image_codes = getattr(image_features, "image_codes", None)
        if image_codes is not None:  # whole images
            self.images_per_sample(input_ids, *image_features.pooler_output.shape[:2])
        rows = torch.cat([rows.flatten(0, -2) for rows in image_features.pooler_output]).to(inputs_embeds)
        if not torch.compiler.is_compiling() and is_image.sum() != len(rows):
            raise ValueError(
                f"The text has {int(is_image.sum())} image placeholders, but the images have {len(rows)} positions."
            )
        inputs_embeds = inputs_embeds.masked_scatter(is_image[..., None], rows)
        return inputs_embeds, image_codes

    def images_per_sample(self, input_ids: torch.Tensor, num_images: int, num_positions: int) -> list[int]:
        """Count the images of each row, by its placeholders.

        Args:
            input_ids: (B, T).
            num_images: N, of all rows.
            num_positions: L.

        Raises:
            ValueError: the rows do not have `num_positions` placeholders for each of `num_images` images.
        """
        placeholders = (input_ids == self.config.image_token_id).sum(dim=1)
        if (placeholders % num_positions).any() or placeholders.sum() != num_images * num_positions:
            raise ValueError(
                f"The texts have {placeholders.tolist()} image placeholders, "
                f"but {num_images} images need {num_positions} each."
            )
        return (placeholders // num_positions).tolist()

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_codes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> ModelOutput:
        """Run the LLM without its output layer.

        The arguments are those of `UniTokMLLMForConditionalGeneration.forward` without targets, losses and logits.

        Returns:
            The output of the LLM's decoder: `last_hidden_state` (B, T, D), `cache`, and, if asked for, `hidden_states`
            and `attentions`.

        Raises:
            ValueError: see `embed`.
            TypeError: an argument that the LLM does not know.
        """
        self._check_kwargs(kwargs, cache)
        inputs_embeds, _ = self._inputs_embeds(
            input_ids, inputs_embeds, cache, pixel_values, image_codes, mm_encoder_outputs
        )
        return self.get_decoder()(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=self._positions(position_ids, attention_mask),
            cache=cache,
            use_cache=use_cache,
            **self._output_options(kwargs),
        )

    def _inputs_embeds(self, input_ids, inputs_embeds, cache, pixel_values, image_codes, mm_encoder_outputs):
        """Embed the inputs of `forward`, see `embed`."""
        image_features = (mm_encoder_outputs or {}).get("image")
        if inputs_embeds is None:
            is_prompt = not torch.compiler.is_compiling() and not is_used(cache)
            return self.embed(input_ids, pixel_values, image_codes, is_prompt, image_features)
        if pixel_values is not None or image_codes is not None or image_features is not None:
            raise ValueError("Images go with input_ids, not with inputs_embeds.")
        return inputs_embeds, None

    def _check_kwargs(self, kwargs: dict, cache: Cache | None) -> None:
        """Refuse keyword arguments that neither the LLM nor the library knows.

        With the library's paged caches come more arguments, for its attention; these are not checked.

        Raises:
            TypeError: an argument is not known.
        """
        if not kwargs or torch.compiler.is_compiling() or not (cache is None or isinstance(cache, Cache)):
            return
        known = {
            *HANDED_DOWN,
            *(p for f in (self.forward, self.language_model.forward) for p in signature(f).parameters),
        }
        refuse_unknown(f"{type(self).__name__}.forward", kwargs, known)

    def _output_options(self, kwargs: dict) -> dict:
        """Add the outputs that the config asks for to the LLM's keyword arguments."""
        names = ("output_attentions", "output_hidden_states")
        wanted = {name: True for name in names if kwargs.get(name) is None and getattr(self.config, name)}
        return {**kwargs, **wanted, "return_dict": True}


class UniTokMLLMForConditionalGeneration(UniTokMLLMModel, UniTokGenerationMixin, UniTokScoringMixin):
    """The unified MLLM: the backbone with the LLM's output layer and the depth transformer. It answers and draws.

    `generate` takes `generation_mode`: "image" draws, "interleaved" answers with text and images; without it, text.

    Args:
        config: of all parts.
        language_model: a causal LM to use; None to build one from the config. See `from_parts`.
        visual: a visual tokenizer to use; None to build one from the config.

    Example:
        >>> model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        >>> processor = AutoProcessor.from_pretrained(folder)
        >>> inputs = processor(text="a red circle", generation_mode="image")
        >>> codes = model.generate(**inputs, generation_mode="image", seed=0)  # (1, K, L)
        >>> pixels = model.decode_images(codes)  # (1, 3, H, W)
    """

    output_modalities = ("image", "text")
    accepts_loss_kwargs = True
    _keys_to_ignore_on_load_unexpected = None
    _no_split_modules = [*UniTokPreTrainedModel._no_split_modules, "UniTokDepthTransformer"]

    def __init__(
        self,
        config: UniTokMLLMConfig,
        language_model: PreTrainedModel | None = None,
        visual: UniTokModel | None = None,
    ):
        super().__init__(config, language_model, visual)
        self.depth_head = UniTokDepthTransformer(config)
        self.post_init()

    @property
    def base_model(self) -> UniTokMLLMModel:
        """The backbone with the same parts, for trainers that apply the LLM's output layer themselves."""
        backbone = UniTokMLLMModel.__new__(UniTokMLLMModel)
        parts = {name: part for name, part in self._modules.items() if name != "depth_head"}
        own = {name: value for name, value in vars(self).items() if name != "forward"}  # trl replaces the head's
        backbone.__dict__.update(own, _modules=parts)
        return backbone

    @classmethod
    def from_parts(
        cls,
        language_model: PreTrainedModel,
        visual: UniTokModel,
        depth_config: UniTokDepthConfig | dict | None = None,
        image_generation: dict | None = None,
        **config_kwargs,
    ) -> "UniTokMLLMForConditionalGeneration":
        """Join a causal LM and a visual tokenizer with a new embedder and depth transformer.

        The model uses the modules themselves, not copies.

        Args:
            language_model: any causal LM of transformers, with its weights and generation config.
            visual: a trained tokenizer; its codebooks become the embedder's.
            depth_config: sizes of the depth transformer.
            image_generation: default options of drawing, see `UniTokDrawingOptions`; a good start is
                `drawing_unitok.IMAGE_GENERATION`. None for no guidance, and sampling from all codes.
            config_kwargs: other arguments of `UniTokMLLMConfig`.

        Raises:
            ValueError: the LLM is of a family that cannot be the LLM (`docs/llm_families.md`), or sizes do not fit.

        Example:
            >>> llm = AutoModelForCausalLM.from_pretrained("llm")
            >>> tokenizer = UniTokModel.from_pretrained("tokenizer")
            >>> model = UniTokMLLMForConditionalGeneration.from_parts(llm, tokenizer, **processor.config_token_ids())
        """
        attention = {part: part.config._attn_implementation for part in (language_model, visual)}
        config = UniTokMLLMConfig(
            text_config=language_model.config,
            visual_config=visual.config,
            depth_config=depth_config.to_dict() if isinstance(depth_config, UniTokDepthConfig) else depth_config,
            **config_kwargs,
        )
        for part, implementation in attention.items():
            part.config._attn_implementation = implementation  # composing the config has reset it
        model = cls(config, language_model, visual.eval())
        generation_config = copy.deepcopy(language_model.generation_config)
        suppressed = generation_config.suppress_tokens or []
        generation_config.suppress_tokens = [*suppressed, config.image_token_id]  # a placeholder is no answer
        model.generation_config = generation_config
        if image_generation is not None:
            model.set_image_generation(**image_generation)
        model.embedder.quantizer.load_state_dict(visual.vision_model.quantizer.state_dict())
        return model

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False) -> None:
        """Set the attention implementation, also of the depth transformer, whose layers have their own config."""
        super().set_attn_implementation(attn_implementation, allow_all_kernels)
        self.depth_head.set_attn_implementation(self.config.depth_config._attn_implementation)

    def decode_image_tokens(self, codes: torch.Tensor) -> torch.Tensor:
        """Decode the codes of one image, for the library's any-to-any pipeline.

        Args:
            codes: (K, L).

        Returns:
            (1, 3, H, W) in [-1, 1].

        Raises:
            ValueError: more than one image: the pipeline would label all with the first prompt.
        """
        num_codebooks = self.depth_head.num_codebooks
        if codes.dim() != 2 or len(codes) != num_codebooks:
            raise ValueError(
                f"Expected the {num_codebooks} codes of each position of one image, got {tuple(codes.shape)}: give a "
                'pipeline several prompts as [{"text": ...}, ...] or as conversations, each on its own.'
            )
        return self.decode_images(codes[None])

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_codes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_targets: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_loss_share: float = 1.0,
        logits_at_targets: bool = False,
        losses_alone: bool = False,
        word_loss: bool = False,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs,
    ) -> UniTokMLLMOutput:
        """Run the model on text and images, and compute losses if there are targets.

        Args:
            input_ids: (B, T), `image_token_id` at image positions.
            attention_mask: (B, T), 0 for padding.
            position_ids: (B, T).
            cache: keys and values of the tokens before these.
            inputs_embeds: (B, T, D), instead of `input_ids`, without images.
            pixel_values: (N, 3, H, W) in [-1, 1], all images of the batch; see `embed`.
            image_codes: (N, K, L), instead of pixels.
            mm_encoder_outputs: `{"image": output of get_image_features}`, instead of pixels.
            image_targets: (N,), bool: the images whose codes are targets; None for none.
            labels: (B, T), the ids at text targets, -100 elsewhere. Image positions are never text targets.
            shift_labels: (B, T), instead of `labels`: at each position the id that follows it.
            use_cache: return a cache; ignored with targets.
            logits_to_keep: without targets, the positions of the returned logits: the number of last ones (0 for all),
                indices (M,) or (B, M), or a mask (B, T), bool, for `logits` of (M, vocabulary).
            image_loss_share: share of the target images' positions that the depth transformer runs on, sampled anew at each
                call. Their mean loss is an unbiased estimate of the full image loss, at that share of its time and
                memory. Below 1 there are no `image_logits`.
            logits_at_targets: with labels, compute the LLM's logits only where a text target is predicted. The loss is the
                same, at less time and memory. `logits` is then (M, vocabulary), for M targets.
            losses_alone: with targets, return no logits. The losses and their gradients are the same, at less memory: they
                are computed in chunks, see `chunked_loss_unitok`. A backward pass is then possible only once.
            word_loss: compute only the loss of `_word_loss`, without the LLM's layers and without logits. Needs `input_ids`,
                images and `labels`.
            num_items_in_batch: divisor of the loss, for batches that are parts of a larger one: the number of labels
                other than -100 in the whole, as the library's Trainer counts them. The positions of target images then
                need labels too (any id, such as their placeholder's). Each counts once, with the mean over its K
                codes.
            kwargs: other arguments of the LLM, such as `output_attentions` and `output_hidden_states`.

        Raises:
            ValueError: see `embed`; `image_targets` is not of shape (N,); a target image begins a sequence;
                `image_loss_share` lies outside (0, 1]; `num_items_in_batch` does not count the target images.
            TypeError: an argument that the LLM does not know.
        """
        if not 0 < image_loss_share <= 1:
            raise ValueError(f"image_loss_share must be above 0 and at most 1, got {image_loss_share}.")
        self._check_kwargs(kwargs, cache)
        if inputs_embeds is not None and image_targets is not None:
            raise ValueError("Images go with input_ids, not with inputs_embeds.")
        if word_loss:
            if input_ids is None or labels is None:
                raise ValueError("word_loss needs input_ids, images and labels.")
            text_sum, text_count = self._word_loss(input_ids, position_ids, labels, pixel_values, image_codes)
            text_loss = text_sum / text_count.clamp_min(1)
            return UniTokMLLMOutput(
                loss=text_loss if num_items_in_batch is None else text_sum / num_items_in_batch,
                text_loss=text_loss,
                image_loss=0.0 * text_loss,
                num_text_targets=text_count,
                num_image_targets=torch.zeros_like(text_count),
            )
        inputs_embeds, image_codes = self._inputs_embeds(
            input_ids, inputs_embeds, cache, pixel_values, image_codes, mm_encoder_outputs
        )
        with_loss = labels is not None or shift_labels is not None or image_targets is not None
        options = self._output_options(kwargs)
        if shift_labels is None and labels is not None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        text_labels = shift_labels
        if shift_labels is not None and input_ids is not None:
            is_image = F.pad(input_ids[:, 1:] == self.config.image_token_id, (0, 1))
            text_labels = shift_labels.masked_fill(is_image, -100)
        sparse = text_labels is not None and (logits_at_targets or losses_alone)
        is_target = text_labels != -100 if sparse else None
        if with_loss:
            logits_to_keep, use_cache = 0 if is_target is None else is_target, False
        in_chunks = with_loss and losses_alone and self._has_many(is_target)
        llm = self.get_decoder() if in_chunks else partial(self.language_model, logits_to_keep=logits_to_keep)
        outputs = llm(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=self._positions(position_ids, attention_mask),
            cache=cache,
            use_cache=use_cache,
            **(options | {"output_hidden_states": True} if with_loss else options),
        )
        shared = {
            "logits": None if with_loss and losses_alone else outputs.logits,
            "cache": outputs.cache,
            "hidden_states": selected(outputs.hidden_states, options.get("output_hidden_states")),
            "attentions": outputs.get("attentions"),
        }
        if not with_loss:
            return UniTokMLLMOutput(**shared)
        hidden_states = outputs.hidden_states[-1]
        if in_chunks:
            text_sum, text_count = self._text_loss_in_chunks(hidden_states[is_target], text_labels[is_target])
        else:
            text_sum, text_count = self._text_loss(outputs.logits, text_labels, is_target)
        states, targets = self._depth_inputs(
            hidden_states, input_ids, attention_mask, image_codes, image_targets, image_loss_share
        )
        image_logits = None
        if losses_alone and targets is not None:
            image_mean = self._image_loss_in_chunks(states, targets)
        else:
            image_logits, image_mean = self._image_loss(states, targets)
        image_count = 0 if targets is None else int(image_targets.sum()) * image_codes[0].numel()
        if num_items_in_batch is None:
            loss = (text_sum + image_count * image_mean) / (text_count + image_count).clamp_min(1)
        else:
            positions = image_count // self.depth_head.num_codebooks
            self._check_count(shift_labels, text_count + positions)
            loss = (text_sum + positions * image_mean) / num_items_in_batch
        if targets is None or image_loss_share < 1:
            image_logits = None
        elif image_logits is not None:
            image_logits = image_logits.unflatten(0, (-1, image_codes.shape[-1]))
        return UniTokMLLMOutput(
            loss=loss,
            **shared,
            text_loss=text_sum / text_count.clamp_min(1),
            image_loss=image_mean,
            num_text_targets=text_count,
            num_image_targets=text_count.new_tensor(image_count),
            image_logits=image_logits,
        )

    @staticmethod
    def _check_count(shift_labels: torch.Tensor | None, num_targets: torch.Tensor) -> None:
        """Check that `num_items_in_batch`, a count of labels, counts every target.

        Raises:
            ValueError: there are fewer labels than targets.
        """
        if torch.compiler.is_compiling():
            return
        num_labels = 0 if shift_labels is None else int((shift_labels != -100).sum())
        if num_labels < num_targets:
            raise ValueError(
                f"num_items_in_batch counts labels, of which this batch has {num_labels} for {int(num_targets)} targets: "
                "give the positions of target images labels too (their placeholder's id), or train with "
                "training.train_mllm, which counts codes. (Label smoothing, which takes the labels away, goes with text "
                "alone.)"
            )

    def _word_loss(self, input_ids, position_ids, labels, pixel_values, image_codes):
        """Measure how well the images' embeddings name the text targets that follow them, as a bag of words.

        Each image position gives a distribution over the words of the batch, which are its different text targets: the
        softmax of the dot products of its embedding and the LLM's token embeddings. The loss of a target is the
        negative log of its mean probability over the positions of the images before it, in the same sample. So an
        embedder that is trained by this loss gives the LLM inputs that look like the words of the caption.

        Returns:
            The sum of the losses, and the number of targets that have an image before them.
        """
        embeds = self.get_image_features(pixel_values, image_codes, return_dict=True).pooler_output
        self.images_per_sample(input_ids, *embeds.shape[:2])
        starts = torch.zeros_like(input_ids) if position_ids is None else (position_ids == 0).cumsum(dim=1)
        rows = torch.arange(len(input_ids), device=input_ids.device)[:, None]
        samples = rows * (input_ids.shape[1] + 1) + starts  # a packed row has several
        places = torch.arange(input_ids.numel(), device=input_ids.device).view_as(input_ids)
        is_image = input_ids == self.config.image_token_id
        is_target = (labels != -100) & ~is_image
        words, targets = labels[is_target].unique(return_inverse=True)
        scores = embeds.flatten(0, 1) @ self.get_input_embeddings().weight[words].to(embeds.dtype).T
        scores = scores.float().log_softmax(dim=1).T[targets]  # (targets, image positions)
        is_seen = (samples[is_target][:, None] == samples[is_image]) & (places[is_target][:, None] > places[is_image])
        has_image = is_seen.any(dim=1)
        scores, is_seen = scores[has_image].masked_fill(~is_seen[has_image], -math.inf), is_seen[has_image]
        losses = is_seen.sum(dim=1).log() - scores.logsumexp(dim=1)
        return losses.sum() + 0.0 * embeds.sum(), has_image.sum()

    @staticmethod
    def _text_loss(logits, shift_labels, is_target) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the cross-entropies of the text targets, and count them."""
        if shift_labels is None:
            return 0.0 * logits.float().sum(), logits.new_zeros((), dtype=torch.long)
        if is_target is not None:
            targets = shift_labels[is_target]
        else:
            logits, targets = logits.flatten(0, 1), shift_labels.flatten()
        text_sum = F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")
        return text_sum, (targets != -100).sum()

    def _has_many(self, is_target: torch.Tensor | None) -> bool:
        """Return whether there are so many text targets that chunks of their logits save memory, and the LLM allows it."""
        if is_target is None or self.config.text_config.model_type not in PLAIN_HEADS or torch.compiler.is_compiling():
            return False
        return int(is_target.sum()) > max(CHUNK_ROWS, self.config.llm_sizes.hidden_size // 2)

    def _text_loss_in_chunks(self, states, targets) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the cross-entropies of M text targets from their states (M, D), in chunks, and count them."""
        head = self.get_output_embeddings()

        def loss_of(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(head(states).float(), targets, reduction="sum")

        return loss_in_chunks(head, loss_of, states, targets, CHUNK_ROWS), targets.new_tensor(len(targets))

    def _depth_inputs(self, hidden_states, input_ids, attention_mask, image_codes, image_targets, share):
        """Select what the depth transformer gets for the target images.

        Returns:
            LLM states (P, D) and codes (P, K) of the P positions of all target images, or of a share of them. Without
            target images, any state and None.
        """
        num_images = 0 if image_codes is None else len(image_codes)
        if image_targets is not None and image_targets.shape != (num_images,):
            raise ValueError(
                f"image_targets has shape {tuple(image_targets.shape)}, but there are {num_images} images."
            )
        if image_targets is None or not image_targets.any():
            return hidden_states[:1, 0], None
        image_targets = image_targets.to(device=hidden_states.device, dtype=torch.bool)
        is_image = input_ids == self.config.image_token_id
        is_target = is_image.masked_scatter(is_image, image_targets.repeat_interleave(image_codes.shape[-1]))
        is_token = torch.ones_like(is_target) if attention_mask is None else attention_mask.bool()
        if (is_target & ~F.pad(is_token[:, :-1], (1, 0))).any():
            raise ValueError("A target image begins its sequence: no token before it predicts its first position.")
        targets = image_codes[image_targets].transpose(1, 2).flatten(0, 1)  # (N * L, K)
        states = hidden_states[:, :-1][is_target[:, 1:]]
        if share < 1:
            chosen = torch.randperm(len(targets), device=targets.device)[: max(1, round(share * len(targets)))]
            states, targets = states[chosen], targets[chosen]
        return states, targets

    def _image_loss(self, states, targets) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the depth transformer's logits (P, K, V) and their loss: mean cross-entropy over all codes, plus z-loss.

        Without targets, the loss is 0 times the logits of a placeholder, so that every parameter is used in each pass.
        """
        if targets is None:
            stand_in = torch.zeros(1, self.depth_head.num_codebooks, dtype=torch.long, device=states.device)
            logits = self.depth_head(states, stand_in)
            return logits, 0.0 * logits.float().sum()
        logits = self.depth_head(states, targets)
        values = logits.float()
        cross_entropy = F.cross_entropy(values.flatten(0, 1), targets.flatten())
        z_loss = values.amax(dim=-1).square().mean()
        return logits, cross_entropy + self.config.image_loss_z_weight * z_loss

    def _image_loss_in_chunks(self, states, targets) -> torch.Tensor:
        """Compute the loss of `_image_loss` in chunks, where the activations of a row take more than the gradients."""
        num_positions, num_codebooks = targets.shape

        def loss_of(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return self._image_loss(states, targets)[1] * (len(targets) / num_positions)

        is_worth_it = targets.numel() > 4 * self.depth_head.llama_config.hidden_size
        chunk_size = max(1, CHUNK_ROWS // num_codebooks) if is_worth_it else num_positions
        return loss_in_chunks(self.depth_head, loss_of, states, targets, chunk_size)


__all__ = [
    "UniTokEmbedder",
    "UniTokMLLMForConditionalGeneration",
    "UniTokMLLMModel",
    "UniTokMLLMOutput",
]
