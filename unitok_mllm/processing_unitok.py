"""The processor: text and images to model inputs, and model outputs to text and pictures.

Each "<image>" in a text becomes the opening token, one placeholder for each image position, and the closing token. A
chat template converts conversations to such texts.
"""

import re
from collections.abc import Callable
from copy import copy
from functools import wraps

import torch
from jinja2 import TemplateError
from PIL import Image
from tokenizers import Tokenizer
from transformers import BatchFeature, PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData
from transformers.utils.chat_template_utils import _CONTROL_TOKEN_END, _CONTROL_TOKEN_START, mark_control_tokens


GENERATION_SUFFIX = " Generate an image based on this description."
UNCONDITIONAL_PROMPT = "<unconditional>"

# vicuna_v1, the template of the released model: turns end with " " or "</s>". The answers are marked as targets.
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
MARKED = re.compile(f"{_CONTROL_TOKEN_START}(.*?){_CONTROL_TOKEN_END}|[{_CONTROL_TOKEN_START}{_CONTROL_TOKEN_END}]")
PADDING_OPTIONS = (
    "padding",
    "max_length",
    "pad_to_multiple_of",
    "padding_side",
    "return_attention_mask",
    "return_tensors",
)
TEXT_OPTIONS = (*PADDING_OPTIONS, "add_special_tokens", "truncation", "return_offsets_mapping")
PART_TYPES = {
    **dict.fromkeys(("text", "input_text", "output_text"), "text"),
    **dict.fromkeys(("image", "image_url", "input_image"), "image"),
}
_CHAT_TEMPLATE = """\
{%- macro write(content, place, behind_image) -%}
  {%- if content is not defined -%}
    {{- raise_exception(place ~ " has no content.") -}}
  {%- endif -%}
  {%- if content is string -%}{{- content -}}
  {%- else -%}
    {%- for part in content -%}
      {%- if part['type'] in text_types and part['text'] is string -%}{{- part['text'] -}}
      {%- elif part['type'] in image_types -%}{{- image_token ~ behind_image -}}
      {%- elif part['type'] in text_types -%}
        {{- raise_exception(place ~ " has a part of type '" ~ part['type'] ~ "' without a text.") -}}
      {%- else -%}
        {%- set known = (text_types + image_types) | join(', ') -%}
        {{- raise_exception(place ~ " has a part of type '" ~ part['type'] ~ "'; known: " ~ known ~ ".") -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- if tools -%}{{- raise_exception("This chat template has no place for tools.") -}}{%- endif -%}
{%- if documents -%}{{- raise_exception("This chat template has no place for documents.") -}}{%- endif -%}
{%- if not messages -%}{{- raise_exception("The conversation has no turns.") -}}{%- endif -%}
{%- set talk = namespace(has_begun=false) -%}
{%- if messages[0]['role'] not in ['system', 'developer'] -%}{{- default_system -}}{%- endif -%}
{%- for message in messages -%}
  {%- set role = message['role'] -%}
  {%- set place = "Turn " ~ loop.index ~ " (" ~ role ~ ")" -%}
  {%- for key in ['tool_calls', 'function_call', 'reasoning_content'] if message[key] -%}
    {{- raise_exception(place ~ " has " ~ key ~ ", for which this chat template has no place.") -}}
  {%- endfor -%}
  {%- if role in ['system', 'developer'] -%}
    {%- if talk.has_begun -%}
      {{- raise_exception(place ~ " comes too late: its place is before all other turns.") -}}
    {%- endif -%}
    {{- write(message['content'], place, '\\n') ~ ' ' -}}
  {%- elif role == 'user' -%}
    {%- set talk.has_begun = true -%}
    {{- 'USER: ' ~ write(message['content'], place, '\\n') ~ ' ' -}}
  {%- elif role == 'assistant' -%}
    {%- set talk.has_begun = true -%}
    {{- 'ASSISTANT:' -}}
    {% generation %}{{- ' ' ~ write(message['content'], place, '') ~ eos_token -}}{% endgeneration %}
  {%- else -%}
    {{- raise_exception(place ~ " has an unknown role; known: system, developer, user, assistant.") -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""


def vicuna_chat_template(system: str = VICUNA_SYSTEM, image_token: str = "<image>") -> str:
    """Make the vicuna_v1 chat template.

    It knows the roles system or developer (its newer name; before all other turns), user and assistant (in any order),
    and the types of parts in `PART_TYPES`. Anything else in a conversation raises jinja's `TemplateError`, which names
    it.

    Args:
        system: text before a conversation without a system turn, with its separator at the end.
        image_token: the placeholder of an image.
    """
    settings = {
        "text_types": [name for name, kind in PART_TYPES.items() if kind == "text"],
        "image_types": [name for name, kind in PART_TYPES.items() if kind == "image"],
        "image_token": image_token,
        "default_system": system,
    }
    return "".join(f"{{%- set {name} = {value!r} -%}}\n" for name, value in settings.items()) + _CHAT_TEMPLATE


def detached_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Copy a tokenizer so that calls of the copy leave the original's options alone.

    A fast tokenizer stores the padding, truncation and `split_special_tokens` of a call in its backend, where the calls
    of other threads read them. The copy has a backend of its own, which shares the vocabulary: this takes 20 us for 6
    added tokens and 1 ms for 256.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return tokenizer  # stores no options of a call
    shared = tokenizer.backend_tokenizer
    backend = Tokenizer(shared.model)
    backend.normalizer, backend.pre_tokenizer = shared.normalizer, shared.pre_tokenizer
    backend.post_processor, backend.decoder = shared.post_processor, shared.decoder
    backend.add_tokens([token for _, token in sorted(shared.get_added_tokens_decoder().items())])
    copied = copy(tokenizer)
    copied._tokenizer = backend
    return copied


def with_detached_tokenizer(method: Callable) -> Callable:
    """Decorate a method of a processor to encode with a `detached_tokenizer`, so that threads can share the processor.

    Decorated methods that it calls use the same copy.
    """

    @wraps(method)
    def run(self, *args, **kwargs):
        if self._is_detached:
            return method(self, *args, **kwargs)
        processor = copy(self)
        processor.tokenizer, processor._is_detached = detached_tokenizer(self.tokenizer), True
        return method(processor, *args, **kwargs)

    return run


class UniTokMLLMProcessor(ProcessorMixin):
    """The processor of `UniTokMLLMForConditionalGeneration`: an image processor and a text tokenizer.

    Threads can share a processor: its methods do not change the options of its tokenizer.

    Args:
        image_processor: a `UniTokImageProcessor`. Its size determines L, the positions of an image.
        tokenizer: the LLM's tokenizer. A missing image token is added; the LLM needs no embedding for it.
        chat_template: a Jinja template; None for vicuna_v1.
        boi_token: the token that opens an image; it must be in the vocabulary.
        eoi_token: the token that closes an image; it must be in the vocabulary.
        image_token: the placeholder, in texts and at image positions.
        kwargs: not used; saved processors may have more settings.

    Raises:
        ValueError: `boi_token` or `eoi_token` is not in the vocabulary.

    Example:
        >>> processor = AutoProcessor.from_pretrained(folder)
        >>> inputs = processor(text="<image> what color is the shape?", images=picture)
        >>> inputs = processor(text=["a red circle", "a blue triangle"], generation_mode="image")
    """

    text_kwargs = {"padding": True, "return_tensors": "pt"}
    _is_detached = False  # True in the copy for one call, see `with_detached_tokenizer`

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
        # known tokens keep their ids. As special tokens they are found in texts, which Llama's byte tokens are not otherwise
        tokenizer.add_tokens([boi_token, eoi_token, image_token], special_tokens=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        tokenizer.padding_side = "left"  # prompts of unequal length end together
        self.boi_token, self.eoi_token, self.image_token = boi_token, eoi_token, image_token
        self.boi_token_id, self.eoi_token_id, self.image_token_id = tokenizer.convert_tokens_to_ids(
            [boi_token, eoi_token, image_token]
        )
        super().__init__(
            image_processor, tokenizer, chat_template=chat_template or vicuna_chat_template(image_token=image_token)
        )

    def config_token_ids(self) -> dict[str, int | list[int]]:
        """Return the token ids for the `UniTokMLLMConfig` of this processor's model, with `config_prompt_ids`."""
        return {
            "boi_token_id": self.boi_token_id,
            "eoi_token_id": self.eoi_token_id,
            "image_token_id": self.image_token_id,
            **self.config_prompt_ids(),
        }

    @with_detached_tokenizer
    def config_prompt_ids(self) -> dict[str, list[int]]:
        """Return the ids with which a model can draw prompts that were not made for an image (those of pipelines)."""
        tokenizer = self.tokenizer
        return {
            "image_prompt_ids": tokenizer(GENERATION_SUFFIX + self.boi_token, add_special_tokens=False).input_ids,
            "unconditional_prompt_ids": tokenizer(UNCONDITIONAL_PROMPT + self.boi_token).input_ids,
        }

    def _get_num_multimodal_tokens(self, image_sizes: list[tuple[int, int]] | None = None, **kwargs) -> MultiModalData:
        """Count the placeholders of images of these sizes (height, width), for servers, before inputs are made."""
        if image_sizes is None:
            return MultiModalData()
        size, stride = kwargs.get("size") or self.image_processor.size, self.image_processor.patch_size
        positions = (size["height"] // stride) * (size["width"] // stride)
        counts = [positions] * len(image_sizes)
        return MultiModalData(num_image_tokens=counts, num_image_patches=[1] * len(image_sizes))

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """Return the text of one image: opening token, L placeholders, closing token."""
        height, width = image_inputs["pixel_values"][image_idx].shape[-2:]
        stride = self.image_processor.patch_size
        positions = (height // stride) * (width // stride)
        return self.boi_token + self.image_token * positions + self.eoi_token

    def apply_chat_template(
        self,
        conversation,
        *args,
        tokenize: bool = False,
        sanitize_control_tokens: bool | None = None,
        processor_kwargs: dict | None = None,
        **kwargs,
    ):
        """Render or tokenize conversations, as the library does, with three differences.

        - A tokenized conversation begins with the BOS that the tokenizer adds, unless the template writes it. This
          holds also if the caller asks for no special tokens (trl does, for templates that write the BOS).
        - Parts may have the types of OpenAI's interfaces ("input_text", "image_url", ...).
        - Control tokens that texts spell are plain text.

        Args:
            conversation: turns, or a list of conversations.
            tokenize: return model inputs instead of text.
            sanitize_control_tokens: encode special tokens that a text of the conversation spells, such as "<image>",
                as plain text. None for yes with `tokenize`. A rendered text cannot tell them from the template's own.
            processor_kwargs: options of `__call__`.
            args: see the library.
            kwargs: see the library.

        Raises:
            ValueError: the conversation is empty, or the template cannot express something in it (a role, a type of
                part, ...), which is named.
        """
        if not conversation:
            raise ValueError("The conversation has no turns.")
        if sanitize_control_tokens and not tokenize:
            raise ValueError(
                "sanitize_control_tokens needs tokenize=True: a rendered text cannot mark what is plain text."
            )
        options = {name: value for name, value in (processor_kwargs or {}).items() if name != "add_special_tokens"}
        conversations, is_batched = self._normalize_conversations(conversation)
        parts = [part for messages in conversations for turn in messages for part in turn.get("content") or []]
        has_images = any(isinstance(part, dict) and part.get("type") == "image" for part in parts)
        if tokenize and options.get("generation_mode") == "image" and not has_images:
            options.setdefault("ranking_text", [self._last_request(messages) for messages in conversations])
        if tokenize and sanitize_control_tokens is not False:
            options["sanitize_control_tokens"] = True
            conversations = [self.mark_conversation(messages) for messages in conversations]
            kwargs |= {name: self.mark_plain(kwargs[name]) for name in ("tools", "documents") if name in kwargs}
        conversation = conversations if is_batched else conversations[0]
        try:
            return super().apply_chat_template(
                conversation, *args, tokenize=tokenize, processor_kwargs=options, **kwargs
            )
        except TemplateError as error:
            raise ValueError(str(error)) from error

    def _normalize_conversations(self, conversation) -> tuple[list[list[dict]], bool]:
        """Normalise conversations, as the library does, to parts of the types "text" and "image".

        Raises:
            ValueError: a part has another type, or no text or address; the message names it.
        """
        conversations, is_batched = super()._normalize_conversations(conversation)
        for messages in conversations:
            for number, message in enumerate(messages, 1):
                place = f"Turn {number} ({message.get('role')})"
                if "content" not in message and not message.get("tool_calls"):
                    raise ValueError(f"{place} has no content.")
                if isinstance(message.get("content"), (list, tuple)):
                    message["content"] = [self._known_part(part, place) for part in message["content"]]
        return conversations, is_batched

    @staticmethod
    def _last_request(messages: list[dict]) -> str:
        """Return the text of a normalised conversation's last turn of a user; "" if there is none."""
        for message in reversed(messages):
            if message.get("role") == "user":
                content = message.get("content")
                parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
                return "".join(part["text"] for part in parts if part["type"] == "text")
        return ""

    @staticmethod
    def _known_part(part: dict, place: str) -> dict:
        given = part.get("type") if isinstance(part, dict) else type(part).__name__
        kind = PART_TYPES.get(given)
        if kind is None:
            raise ValueError(f"{place} has a part of type {given!r}; known: {', '.join(PART_TYPES)}.")
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise ValueError(f"{place} has a part of type {given!r} without a text.")
            return {**part, "type": "text"}
        if given != "image":  # an "image_url" that has its address is an "image" by now
            if not isinstance(part.get("image_url"), str):
                raise ValueError(f"{place} has a part of type {given!r} without an image_url.")
            return {"type": "image", "url": part["image_url"]}
        if isinstance(part.get("base64"), str) and not part["base64"].startswith("data:"):
            return {**part, "base64": f"data:image/*;base64,{part['base64']}"}
        return part

    def mark_plain(self, text, placeholders: bool = False):
        """Mark the special tokens in a text, so that `encode_text` encodes them as plain text.

        Args:
            text: a string, or lists and dicts of strings (keys are left as they are).
            placeholders: do not mark "<image>", the placeholder of an image.
        """
        tokens = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        if placeholders:
            tokens.discard(self.image_token)
        pattern = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
        return mark_control_tokens(text, re.compile(pattern or "(?!)"))

    def mark_conversation(self, messages: list[dict]) -> list[dict]:
        """Mark the turns of a conversation by `mark_plain`, except the sources of pictures."""

        def marked(value):
            if not isinstance(value, list):
                return self.mark_plain(value)
            return [part if part["type"] == "image" else self.mark_plain(part) for part in value]

        return [
            {key: marked(value) if key == "content" else self.mark_plain(value) for key, value in message.items()}
            for message in messages
        ]

    @with_detached_tokenizer
    def encode_text(self, text: str, add_special_tokens: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode a text. What `mark_plain` marked in it is encoded as plain text, without the marks.

        Args:
            text: the text, with special tokens.
            add_special_tokens: begin with the BOS that the tokenizer adds, unless the text begins with it.

        Returns:
            The token ids, and the range of characters (start, end) of each.
        """
        bos = self.tokenizer.bos_token
        if bos and text.startswith(bos) and self._adds_bos():
            add_special_tokens = False
        marks = [*MARKED.finditer(text)]
        start = marks[0].start() if marks else len(text)
        encoding = self.tokenizer(text[:start], add_special_tokens=add_special_tokens, return_offsets_mapping=True)
        ids, offsets = encoding["input_ids"], list(map(tuple, encoding["offset_mapping"]))
        for mark, end in zip(marks, [*(mark.start() for mark in marks[1:]), len(text)]):
            for (first, last), is_plain in ((mark.span(1), True), ((mark.end(), end), False)):
                if first < last:
                    piece_ids, piece_offsets = self._encode_piece(text[first:last], is_plain)
                    ids += piece_ids
                    offsets += [(first + a, first + b) for a, b in piece_offsets]
        return ids, offsets

    def _encode_piece(self, text: str, is_plain: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode a piece of a text, after a line break, since SentencePiece puts a space before each text."""
        options = {"add_special_tokens": False, "split_special_tokens": is_plain, "return_offsets_mapping": True}
        line_break = self.tokenizer("\n", add_special_tokens=False)["input_ids"]
        encoding = self.tokenizer("\n" + text, **options)
        ids, offsets, count = encoding["input_ids"], encoding["offset_mapping"], len(line_break)
        if ids[:count] == line_break:
            return ids[count:], [(start - 1, end - 1) for start, end in offsets[count:]]
        encoding = self.tokenizer(text, **options)
        return encoding["input_ids"], encoding["offset_mapping"]

    def _adds_bos(self) -> bool:
        bos = self.tokenizer.bos_token
        return bool(bos) and bos in self.tokenizer("").tokens()

    def prepare_inputs_layout(self, images=None, text=None, **kwargs):
        images, text, *others = super().prepare_inputs_layout(images=images, text=text, **kwargs)
        images = None if self._is_empty(images) else images
        if text == []:
            raise ValueError("text is an empty list.")
        options = {**kwargs, **kwargs.get("text_kwargs", {})}
        if text and options.get("add_special_tokens", True) and self._adds_bos():
            written = re.compile(f"^(?:{re.escape(self.tokenizer.bos_token)})+")  # for example by a chat template
            text = [written.sub("", sample) for sample in text]
        return images, text, *others

    @staticmethod
    def _is_empty(images) -> bool:
        return images is None or isinstance(images, list) and all(isinstance(i, list) and not i for i in images)

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

    @with_detached_tokenizer
    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        generation_mode: str | None = None,
        ranking_text: str | list[str] | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Make model inputs.

        Args:
            images: all images of the texts in order, flat or one list for each text, in any form that the image
                processor takes.
            text: one text or several, with "<image>" at the place of an image. In image mode, each is a description;
                in edit mode, an instruction.
            generation_mode: "text" or None for an answer, "image" for a drawing, "interleaved" for an answer with
                images, "edit" for a changed image.
            ranking_text: in image and edit mode, what is to be seen in each drawing, for ranking `candidates`. None for
                the descriptions themselves if there are no images; then instructions do not describe the result, and
                nothing is ranked. Of a conversation it is the last turn of the user.
            sanitize_control_tokens: encode special tokens that a description or an instruction spells as plain text.
                None for yes; but in image mode with images, "<image>" is the place of an image. The other two modes
                take prompts, whose special tokens are tokens. There it means that `apply_chat_template` has marked the
                plain text.
            kwargs: options of the tokenizer and the image processor.

        Returns:
            `input_ids` and `attention_mask` (B, T), and with images `pixel_values` (N, 3, H, W). In image and edit
            mode the prompts end where the image begins. All modes but "text" add `unconditional_input_ids` and
            `unconditional_attention_mask`, the null prompts of guidance; in edit mode these have the images. Edit mode
            also adds `text_alone_input_ids` and `text_alone_attention_mask`, the instructions without images. Where
            there is a text to rank drawings by, image and edit mode add `ranking_input_ids` and
            `ranking_attention_mask`, see `ranking_inputs`.

        Raises:
            ValueError: an unknown mode, no text (in image mode), an empty list of texts, images and placeholders that do
                not match, a `max_length` that would cut through an image, or a `ranking_text` in another mode or not
                one for each text.
        """
        sanitize_control_tokens = kwargs.pop("sanitize_control_tokens", None)
        if ranking_text is not None and generation_mode not in ("image", "edit"):
            raise ValueError(f"ranking_text is for drawings and edits, not for generation_mode={generation_mode!r}.")
        if generation_mode in (None, "text"):
            return self._encode(images, text, sanitize_control_tokens, **kwargs)
        if generation_mode not in ("image", "interleaved", "edit"):
            raise ValueError(f"generation_mode is 'text', 'image', 'interleaved' or 'edit', got {generation_mode!r}.")
        if text is None:
            raise ValueError(f"generation_mode={generation_mode!r} needs a text.")
        texts = [text] if isinstance(text, str) else list(text)
        ranking = self._ranking(texts, ranking_text, generation_mode == "image" and self._is_empty(images))
        if generation_mode != "interleaved" and sanitize_control_tokens is not False:
            has_places = generation_mode == "image" and not (sanitize_control_tokens or self._is_empty(images))
            texts = [self.mark_plain(one, placeholders=has_places) for one in texts]
            sanitize_control_tokens = True
        if generation_mode == "edit":
            edit = self._edit_inputs(images, texts, sanitize_control_tokens, **kwargs)
            return BatchFeature({**edit, **ranking})
        if generation_mode == "image":
            texts = [self.image_prompt(t) for t in texts]
        inputs = self._encode(images, texts, sanitize_control_tokens, **kwargs)
        unconditional = self._encode(None, [UNCONDITIONAL_PROMPT + self.boi_token], **kwargs)
        return BatchFeature(
            {**inputs, **{f"unconditional_{name}": unconditional[name] for name in ("input_ids", "attention_mask")}}
            | ranking
        )

    def _ranking(self, texts: list[str], ranking_text: str | list[str] | None, has_descriptions: bool) -> dict:
        """Return the inputs by which drawings are ranked, or nothing if no text says what is to be seen in them."""
        if ranking_text is None:
            if not (texts and has_descriptions) or self.tokenizer.eos_token_id is None:
                return {}
            ranking_text = texts
        ranking_text = [ranking_text] if isinstance(ranking_text, str) else list(ranking_text)
        if len(ranking_text) != len(texts):
            raise ValueError(f"Got {len(ranking_text)} texts to rank by for {len(texts)} prompts.")
        return {f"ranking_{name}": value for name, value in self.ranking_inputs(ranking_text).items()}

    @with_detached_tokenizer
    def text_ids(self, texts: list[str]) -> list[list[int]]:
        """Encode texts for the visual tokenizer's text tower, each with the end-of-text token; any length.

        Special tokens that a text spells are plain text.
        """
        end, rows = self.tokenizer.eos_token_id, self.tokenizer(texts, split_special_tokens=True)["input_ids"]
        return [row if row[-1:] == [end] else [*row, end] for row in rows]

    def ranking_inputs(self, texts: list[str]) -> BatchFeature:
        """Make the inputs by which drawings are ranked.

        Args:
            texts: B descriptions of what is to be seen.

        Returns:
            `input_ids` and `attention_mask`, (B, T), padded on the right, with the end-of-text token.
        """
        return BatchFeature(
            dict(self.tokenizer.pad({"input_ids": self.text_ids(texts)}, padding_side="right", return_tensors="pt"))
        )

    def _encode(self, images, text, is_marked: bool | None = False, **kwargs) -> BatchFeature:
        """Encode as the library does; offsets, truncation and the BOS also work for texts with marked plain tokens."""
        texts = [text] if isinstance(text, str) else text
        if not is_marked or not texts or not any(MARKED.search(one) for one in texts):
            return super().__call__(images=images, text=text, **kwargs)
        options = {**self.text_kwargs, **kwargs.pop("text_kwargs", {})}
        options |= {name: kwargs.pop(name) for name in TEXT_OPTIONS if name in kwargs}
        padding = {name: options.pop(name) for name in PADDING_OPTIONS if name in options}
        truncation, add_special_tokens = options.pop("truncation", False), options.pop("add_special_tokens", True)
        has_offsets = options.pop("return_offsets_mapping", False)
        has_replacements = kwargs.pop("return_text_replacement_offsets", False)

        unmarked = [MARKED.sub(" ", one) for one in texts]
        options |= {"padding": False, "return_tensors": None}
        outputs = dict(
            super().__call__(
                images=images, text=unmarked, text_kwargs=options, return_text_replacement_offsets=True, **kwargs
            )
        )
        replacements = [place["replacement"] for row in outputs.pop("text_replacement_offsets") for place in row]
        if others := outputs.keys() - {"input_ids", "attention_mask", "pixel_values"}:
            raise ValueError(f"Texts that spell special tokens come without {', '.join(sorted(others))}.")
        texts, places = self.get_text_with_replacements(list(texts), replacements)
        rows, offsets = zip(*(self.encode_text(one, add_special_tokens) for one in texts))
        if truncation not in (False, None, "do_not_truncate"):
            length = padding.get("max_length") or self.tokenizer.model_max_length
            cut = slice(length) if self.tokenizer.truncation_side == "right" else slice(-length, None)
            rows, offsets = [row[cut] for row in rows], [row[cut] for row in offsets]
        self._check_special_mm_tokens(texts, {"input_ids": rows}, ["image"])
        outputs |= self.tokenizer.pad({"input_ids": list(rows)}, **padding)
        if has_offsets:
            is_left = (padding.get("padding_side") or self.tokenizer.padding_side) == "left"
            fill = [[(0, 0)] * (len(ids) - len(row)) for ids, row in zip(outputs["input_ids"], offsets)]
            outputs["offset_mapping"] = [f + row if is_left else row + f for f, row in zip(fill, offsets)]
        if has_replacements:
            outputs["text_replacement_offsets"] = places
        return BatchFeature(outputs)

    def _edit_inputs(self, images, texts: list[str], is_marked: bool, **kwargs) -> BatchFeature:
        if images is None:
            raise ValueError("generation_mode='edit' needs images: those that the texts say what to do with.")
        groups = self.image_processor.fetch_images(images)
        groups = groups if isinstance(groups, (list, tuple)) else [groups]
        groups = [list(group) if isinstance(group, (list, tuple)) else [group] for group in groups]
        if len(groups) != len(texts):
            raise ValueError(f"Got {len(groups)} images (or groups of them) for {len(texts)} instructions.")
        counts = [len(group) for group in groups]
        inputs = self._encode(groups, [self.edit_prompt(t, n) for t, n in zip(texts, counts)], is_marked, **kwargs)
        null = self._encode(groups, [self.edit_prompt(UNCONDITIONAL_PROMPT, n) for n in counts], **kwargs)
        text_alone = self._encode(None, [self.edit_prompt(t, 0) for t in texts], is_marked, **kwargs)
        for prefix, other in (("unconditional", null), ("text_alone", text_alone)):
            inputs |= {f"{prefix}_{name}": other[name] for name in ("input_ids", "attention_mask")}
        return BatchFeature(dict(inputs))

    def edit_prompt(self, instruction: str, num_images: int) -> str:
        """Return the prompt of an edit: the user's turn, images first, up to the beginning of the answering image."""
        content = [{"type": "image"}] * num_images + [{"type": "text", "text": instruction}]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "image"}]}]
        return self.apply_chat_template(turns).rsplit(self.image_token, 1)[0] + self.boi_token

    def image_prompt(self, description: str) -> str:
        """Return the prompt of a drawing, up to the beginning of the image."""
        return description + GENERATION_SUFFIX + self.boi_token

    def image_sample(self, description: str | None) -> str:
        """Return the training text of an image after its description, or after the null prompt if that is None."""
        prompt = UNCONDITIONAL_PROMPT if description is None else description + GENERATION_SUFFIX
        return prompt + self.image_token + self.tokenizer.eos_token

    def post_process_multimodal_output(
        self,
        generated_outputs: torch.Tensor,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **kwargs,
    ) -> list[str] | list[Image.Image]:
        """Convert token ids to texts, decoded pixels to pictures, or both to the parts of answers.

        Args:
            generated_outputs: token ids (B, T); with `generation_mode="image"` pixels (B, 3, H, W) in [-1, 1]; with
                "interleaved" the output of `generate`.
            skip_special_tokens: leave special tokens out of texts.
            generation_mode: None or "text", "image" or "interleaved".
            kwargs: with "interleaved" `pixel_values`, the decoded images of each answer, (N, 3, H, W) each.

        Returns:
            Texts, or pictures. With "interleaved", for each answer the `content` of a conversation's turn:
            `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`, in order.
        """
        if generation_mode == "image":
            return self.image_processor.post_process(generated_outputs)
        if generation_mode == "interleaved":
            return [self._parts(*answer) for answer in zip(generated_outputs.sequences, kwargs["pixel_values"])]
        return super().post_process_multimodal_output(
            generated_outputs, skip_special_tokens=skip_special_tokens, generation_mode=generation_mode, **kwargs
        )

    def _parts(self, sequence: torch.Tensor, pixel_values: torch.Tensor) -> list[dict]:
        """Convert an answer's ids (T,) and its images (N, 3, H, W) to its texts and pictures, in order."""
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
