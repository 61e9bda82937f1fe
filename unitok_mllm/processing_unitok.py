"""Text and images to model inputs, and model outputs to text and pictures.

Each "<image>" in a text becomes what the model sees: the opening token, one placeholder for each image position, the
closing token.  A chat template puts conversations into that form.
"""

import re

import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.utils.chat_template_utils import _CONTROL_TOKEN_START, mark_control_tokens


GENERATION_SUFFIX = " Generate an image based on this description."
UNCONDITIONAL_PROMPT = "<unconditional>"

# vicuna_v1 of the released model: turns end with " " and "</s>", the answers (marked as such) are what is learned.
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
_CHAT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] if messages[0]['content'] is string else messages[0]['content'][0]['text'] }}{{ ' ' }}"
    "{% set messages = messages[1:] %}{% else %}{{ SYSTEM }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' }}{% else %}{{ 'ASSISTANT:' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ ' ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ eos_token }}{% endgeneration %}"
    "{% else %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def vicuna_chat_template(system: str = VICUNA_SYSTEM) -> str:
    """The vicuna_v1 chat template with this system line (which ends with its separator) as the default."""
    return _CHAT_TEMPLATE.replace("SYSTEM", repr(system))


class UniTokMLLMProcessor(ProcessorMixin):
    """An image processor and a text tokenizer for `UniTokMLLMForConditionalGeneration`.

    Args:
        image_processor: a `UniTokImageProcessor`; its size fixes how many positions an image has.
        tokenizer: the LLM's tokenizer. An image token it lacks is added (the LLM needs no row for it).
        chat_template: a Jinja template; None for vicuna_v1.
        boi_token, eoi_token: the tokens that open and close an image; they must be in the vocabulary.
        image_token: the placeholder, in texts and at image positions.

    Raises:
        ValueError: `boi_token` or `eoi_token` is not in the vocabulary.
    """

    text_kwargs = {"padding": True, "return_tensors": "pt"}
    images_kwargs = {"return_tensors": "pt"}

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template: str | None = None,
        boi_token: str = "<0x00>",
        eoi_token: str = "<0x01>",
        image_token: str = "<image>",
        **kwargs,
    ):
        for name, token in (("boi_token", boi_token), ("eoi_token", eoi_token)):
            if token not in tokenizer.get_vocab():
                raise ValueError(
                    f"{name} {token!r} is not in the tokenizer's vocabulary; add it to tokenizer and LLM."
                )
        # ids of known tokens stay; as special tokens they are found in a text, which Llama's byte tokens are not
        tokenizer.add_tokens([boi_token, eoi_token, image_token], special_tokens=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        tokenizer.padding_side = "left"  # prompts of unequal length end together
        self.boi_token, self.eoi_token, self.image_token = boi_token, eoi_token, image_token
        self.boi_token_id, self.eoi_token_id, self.image_token_id = tokenizer.convert_tokens_to_ids(
            [boi_token, eoi_token, image_token]
        )
        super().__init__(image_processor, tokenizer, chat_template=chat_template or vicuna_chat_template())

    def config_token_ids(self) -> dict[str, int]:
        """The token ids that a `UniTokMLLMConfig` of this processor's model needs."""
        return {
            "boi_token_id": self.boi_token_id,
            "eoi_token_id": self.eoi_token_id,
            "image_token_id": self.image_token_id,
        }

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """What one image is in the text: opening token, L placeholders, closing token."""
        height, width = image_inputs["pixel_values"][image_idx].shape[-2:]
        stride = self.image_processor.patch_size
        positions = (height // stride) * (width // stride)
        return self.boi_token + self.image_token * positions + self.eoi_token

    def apply_chat_template(self, conversation, *args, processor_kwargs: dict | None = None, **kwargs):
        """As the library's, but a tokenized conversation begins with the BOS that the tokenizer adds, unless the
        template writes it, also where the caller asks for no special tokens (trl does, for templates that write it).
        """
        options = {name: value for name, value in (processor_kwargs or {}).items() if name != "add_special_tokens"}
        return super().apply_chat_template(conversation, *args, processor_kwargs=options, **kwargs)

    def prepare_inputs_layout(self, images=None, text=None, **kwargs):
        images, text, *others = super().prepare_inputs_layout(images=images, text=text, **kwargs)
        if isinstance(images, list) and all(isinstance(group, list) and not group for group in images):
            images = None
        if text == []:
            raise ValueError("text is an empty list.")
        options = {**kwargs, **kwargs.get("text_kwargs", {})}
        bos = self.tokenizer.bos_token
        if text and bos and options.get("add_special_tokens", True) and bos in self.tokenizer("").tokens():
            text = [sample.removeprefix(bos) for sample in text]  # a chat template may have written it already
        return images, text, *others

    def validate_inputs(self, images=None, text=None, **kwargs):
        super().validate_inputs(images=images, text=text, **kwargs)
        if text is not None and isinstance(images, list) and images and isinstance(images[0], (list, tuple)):
            expected, given = [sample.count(self.image_token) for sample in text], [len(group) for group in images]
            if expected != given:
                raise ValueError(f"The texts have {expected} {self.image_token} tokens, but got {given} images.")

    def _check_special_mm_tokens(self, text, text_inputs, modalities):
        super()._check_special_mm_tokens(text, text_inputs, modalities)
        for token, token_id in ((self.boi_token, self.boi_token_id), (self.eoi_token, self.eoi_token_id)):
            for sample, ids in zip(text, text_inputs["input_ids"]):
                written = sample.count(token) - sample.count(_CONTROL_TOKEN_START + token)
                if list(ids).count(token_id) < written:
                    raise ValueError(f"The max_length cuts off a {token} of the text: it would cut through an image.")

    def __call__(self, images=None, text=None, generation_mode: str = "text", **kwargs) -> BatchFeature:
        """Makes model inputs.

        Args:
            images: all images of the texts in order, flat or one list for each text; whatever the image processor
                takes.
            text: one text or several, with "<image>" where an image goes. In image mode, a description each.
            generation_mode: "text": `input_ids`, `attention_mask` and `pixel_values` for an answer.
                "image": prompts that end where the image begins, and `unconditional_input_ids` and
                `unconditional_attention_mask` for guidance.
                "interleaved": as "text", with `unconditional_...` too, for the images of the answer.
                "edit": the same as "image" from images and an instruction for each text: a turn of the chat template that an
                image answers. For guidance, `unconditional_...` hold the images with the null prompt, and
                `text_alone_...` the instructions without images.
            sanitize_control_tokens: take "<image>" and all other tokens of the model's own that a description or an
                instruction spells as plain text. In the other two modes the chat template has to tell them from its
                own first: `apply_chat_template(..., tokenize=True, sanitize_control_tokens=True)`.
            kwargs: options of the tokenizer and the image processor.

        Raises:
            ValueError: another mode, no text (in image mode) or an empty list of texts, images and placeholders that do not pair up, or a
                `max_length` that would cut through an image.
        """
        if generation_mode == "text":
            return self._encode(images, text, **kwargs)
        if generation_mode not in ("image", "interleaved", "edit"):
            raise ValueError(f"generation_mode is 'text', 'image', 'interleaved' or 'edit', got {generation_mode!r}.")
        if text is None:
            raise ValueError(f"generation_mode={generation_mode!r} needs a text.")
        texts = [text] if isinstance(text, str) else list(text)
        if kwargs.get("sanitize_control_tokens") and generation_mode != "interleaved":
            texts = mark_control_tokens(texts, self._control_tokens())
        if generation_mode == "edit":
            return self._edit_inputs(images, texts, **kwargs)
        if generation_mode == "image":
            texts = [self.image_prompt(t) for t in texts]
        inputs = self._encode(images, texts, **kwargs)
        unconditional = self._encode(None, [UNCONDITIONAL_PROMPT + self.boi_token], **kwargs)
        return BatchFeature(
            {**inputs, **{f"unconditional_{name}": unconditional[name] for name in ("input_ids", "attention_mask")}}
        )

    def _control_tokens(self) -> re.Pattern:
        """Matches every token that is more than text to the model."""
        tokens = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))

    def _encode(self, images, text, sanitize_control_tokens: bool | None = None, **kwargs) -> BatchFeature:
        """The library's call. With `sanitize_control_tokens`, for which it needs a template that writes the BOS, it is
        given none, and the BOS and the padding are added here."""
        if not sanitize_control_tokens:
            return super().__call__(images=images, text=text, **kwargs)
        options = {**self.text_kwargs, **kwargs.pop("text_kwargs", {})}
        names = ("padding", "max_length", "pad_to_multiple_of", "return_tensors", "add_special_tokens", "truncation")
        options |= {name: kwargs.pop(name) for name in names if name in kwargs}
        if options.pop("truncation", False):
            raise ValueError("sanitize_control_tokens does not go with truncation.")
        bos = self.tokenizer.bos_token
        adds_bos = options.pop("add_special_tokens", True) and bos and bos in self.tokenizer("").tokens()
        unpadded = {"add_special_tokens": False, "padding": False, "return_tensors": None}
        marked = {"sanitize_control_tokens": True, "text_kwargs": unpadded}
        inputs = dict(super().__call__(images=images, text=text, **kwargs, **marked))
        rows = [[self.tokenizer.bos_token_id] * bool(adds_bos) + row for row in inputs.pop("input_ids")]
        inputs.pop("attention_mask")
        return BatchFeature({**self.tokenizer.pad({"input_ids": rows}, **options), **inputs})

    def _edit_inputs(self, images, texts: list[str], **kwargs) -> BatchFeature:
        if images is None:
            raise ValueError("generation_mode='edit' needs images: those that the texts say what to do with.")
        groups = self.image_processor.fetch_images(images)
        groups = groups if isinstance(groups, (list, tuple)) else [groups]
        groups = [list(group) if isinstance(group, (list, tuple)) else [group] for group in groups]
        if len(groups) != len(texts):
            raise ValueError(f"Got {len(groups)} images (or groups of them) for {len(texts)} instructions.")
        counts = [len(group) for group in groups]
        inputs = self._encode(groups, [self.edit_prompt(t, n) for t, n in zip(texts, counts)], **kwargs)
        null = self._encode(groups, [self.edit_prompt(UNCONDITIONAL_PROMPT, n) for n in counts], **kwargs)
        text_alone = self._encode(None, [self.edit_prompt(t, 0) for t in texts], **kwargs)
        for prefix, other in (("unconditional", null), ("text_alone", text_alone)):
            inputs |= {f"{prefix}_{name}": other[name] for name in ("input_ids", "attention_mask")}
        return BatchFeature(dict(inputs))

    def edit_prompt(self, instruction: str, num_images: int) -> str:
        """The user's turn, images first, up to where the image that answers it begins."""
        content = [{"type": "image"}] * num_images + [{"type": "text", "text": instruction}]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "image"}]}]
        return self.apply_chat_template(turns).rsplit(self.image_token, 1)[0] + self.boi_token

    def image_prompt(self, description: str) -> str:
        """The prompt whose continuation is an image of what `description` says."""
        return description + GENERATION_SUFFIX + self.boi_token

    def image_sample(self, description: str | None) -> str:
        """A training text: an image drawn from its description, or from the null prompt where that is None."""
        prompt = UNCONDITIONAL_PROMPT if description is None else description + GENERATION_SUFFIX
        return prompt + self.image_token + self.tokenizer.eos_token

    def post_process_multimodal_output(
        self,
        generated_outputs: torch.Tensor,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **kwargs,
    ) -> list[str] | list[Image.Image]:
        """Token ids (B, T) to texts, or decoded pixels to pictures, or both to the parts of answers.

        Args:
            generated_outputs: token ids; with `generation_mode="image"` pixels (B, 3, H, W); with "interleaved" what
                `generate` returned.
            pixel_values: with "interleaved", the decoded images of each answer, (N, 3, H, W) each.

        Returns:
            Texts; or pictures; or for each answer what a conversation's `content` holds: {"type": "text", "text": ...}
            and {"type": "image", "image": ...} in order.
        """
        if generation_mode == "image":
            return self.image_processor.post_process(generated_outputs)
        if generation_mode == "interleaved":
            return [self._parts(*answer) for answer in zip(generated_outputs.sequences, kwargs["pixel_values"])]
        return super().post_process_multimodal_output(
            generated_outputs, skip_special_tokens=skip_special_tokens, generation_mode=generation_mode, **kwargs
        )

    def _parts(self, sequence: torch.Tensor, pixel_values: torch.Tensor) -> list[dict]:
        """An answer's ids (T,) and its images (N, 3, H, W) -> its texts and pictures in order."""
        pictures = iter(self.image_processor.post_process(pixel_values)) if len(pixel_values) else iter(())
        parts, words = [], []
        for token in [*sequence.tolist(), self.boi_token_id]:
            if token != self.boi_token_id:
                words.append(token)
                continue
            if text := self.tokenizer.decode(words, skip_special_tokens=True).strip():
                parts.append({"type": "text", "text": text})
            words = []
            if picture := next(pictures, None):
                parts.append({"type": "image", "image": picture})
        return parts


__all__ = ["GENERATION_SUFFIX", "UNCONDITIONAL_PROMPT", "UniTokMLLMProcessor", "vicuna_chat_template"]
