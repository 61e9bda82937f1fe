"""Training data of the MLLM: conversations, captions and texts from files, mixed by weight.

A source is one entry of a config's `datasets`:

    type: conversations            # LLaVA's format: {"image": path or list of paths, "conversations": [{"from", "value"}]}
    path: data/train.json          # .json (a list), .jsonl or .parquet
    images: data                   # a folder, or tar shards "shards/{00..15}.tar"; without it, the file's own folder
    weight: 2.0                    # relative share of the samples; without weights, each row of all sources comes once

    type: captions                 # {"image", "caption"}
    path: data/train_captions.jsonl
    codes: data/codes              # output of `training.extract_codes`, used instead of the image files
    task: draw                     # draw: predict the image from its caption; read: the caption from the image
    prompt: Describe the image.    # for `read`: a question in the chat template; without it, just image and caption
    mode: reconstruct              # mode of the image processor; extracted codes must have the same

    type: text                     # {"text"}
    path: data/text.jsonl

Without `mode`, samples that only draw pictures use crops (`reconstruct`). All others use whole pictures
(`understand`), also for the result of an edit.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from jinja2 import TemplateError
from torch.utils.data import Dataset
from transformers.utils.chat_template_utils import render_jinja_template

from training.arguments import check_datasets, checked_number
from training.codes import CodeStore
from training.files import BrokenSamples, ImageStore, UnusableSample, read_rows
from unitok_mllm import UniTokMLLMProcessor
from unitok_mllm.configuration_unitok import ABOVE_ZERO
from unitok_mllm.image_processing_unitok import MODES
from unitok_mllm.processing_unitok import UNCONDITIONAL_PROMPT


IGNORE = -100
ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
    **{"system": "system", "developer": "system"},
}
UNUSED_OPTIONS = {  # options that a type of source does not have
    "conversations": ("task", "prompt"),
    "captions": (),
    "text": ("images", "codes", "task", "prompt", "mode"),
}


class SampleTexts:
    """Encode samples to token ids and targets, in exactly the format of the processor's inputs for inference.

    Control tokens spelled in a text ("</s>", "<image>", ...) are encoded as plain text.

    Args:
        processor: the model's processor, whose chat template must mark the assistant's words with `{% generation %}`.
        max_length: maximum number of tokens in a sample. Longer ones are truncated, but never within an image.

    Raises:
        ValueError: the chat template does not mark the assistant's words.
    """

    def __init__(self, processor: UniTokMLLMProcessor, max_length: int):
        size, stride = processor.image_processor.size, processor.image_processor.patch_size
        self.num_positions = (size["height"] // stride) * (size["width"] // stride)
        self.processor, self.max_length = processor, max_length
        self.image = processor.boi_token + self.num_positions * processor.image_token + processor.eoi_token
        self.chat_template = processor.chat_template.replace(processor.image_token, self.image)
        if "{% generation %}" not in self.chat_template:
            raise ValueError("The chat template does not mark the assistant's words with {% generation %}.")

    def conversation(self, messages: list[dict]) -> dict[str, torch.Tensor]:
        """Encode turns in transformers' format. The assistant's turns are targets, including their pictures.

        Raises:
            UnusableSample: the chat template cannot express the turns, or see `_encode`.
        """
        special_tokens = self.processor.tokenizer.special_tokens_map
        messages = self.processor.mark_conversation(messages)
        try:
            (text,), (spans,) = render_jinja_template(
                [messages], chat_template=self.chat_template, return_assistant_tokens_mask=True, **special_tokens
            )
        except TemplateError as error:
            raise UnusableSample(str(error)) from error
        return self._encode(text, spans)

    def drawing(self, caption: str | None) -> dict[str, torch.Tensor]:
        """Encode an image to draw from its caption; None stands for the null prompt of classifier-free guidance."""
        caption = None if caption is None else self.processor.mark_plain(caption)
        prompt, end = self.processor.image_sample(caption).rsplit(self.processor.image_token, 1)
        return self._encode(prompt + self.image + end, [(len(prompt), len(prompt + self.image + end))])

    def reading(self, caption: str) -> dict[str, torch.Tensor]:
        """Encode an image followed directly by its caption, which is the target."""
        text = self.image + self.processor.mark_plain(caption) + self.processor.tokenizer.eos_token
        return self._encode(text, [(len(self.image), len(text))])

    def plain(self, text: str) -> dict[str, torch.Tensor]:
        """Encode a text, all of which is a target."""
        text = self.processor.mark_plain(text) + self.processor.tokenizer.eos_token
        return self._encode(text, [(0, len(text))])

    def _encode(self, text: str, target_spans: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """Encode a text with image tokens.

        Args:
            text: the text, with all special tokens.
            target_spans: character ranges of the targets.

        Returns:
            `input_ids` and `labels` (T,), int64, and `image_targets` (N,), bool: whether each image is in a target
            span.

        Raises:
            UnusableSample: truncation to `max_length` would cut an image, or leaves no target.
        """
        ids, offsets = self.processor.encode_text(text)
        starts, ends = np.array(offsets).T
        is_target = np.zeros(len(starts), dtype=bool)
        for start, end in target_spans:
            is_target |= (starts < end) & (ends > start)
        input_ids, is_target = torch.tensor(ids), torch.from_numpy(is_target)
        is_image = input_ids == self.processor.image_token_id
        if len(input_ids) > self.max_length:
            if is_image[self.max_length - 1 :].any():
                raise UnusableSample(f"max_length {self.max_length} would cut through an image of {text[:80]!r}")
            input_ids, is_target, is_image = (t[: self.max_length] for t in (input_ids, is_target, is_image))
        labels = input_ids.masked_fill(~is_target | is_image, IGNORE)
        if (labels[1:] == IGNORE).all():
            raise UnusableSample(f"nothing to learn in {text[:80]!r}")
        whole, rest = divmod(int(is_image.sum()), self.num_positions)
        if rest:
            raise UnusableSample(f"{self.processor.image_token} in the text {text[:80]!r}")
        image_targets = is_target[is_image].view(whole, self.num_positions)[:, 0]
        return {"input_ids": input_ids, "labels": labels, "image_targets": image_targets}


CHECKED_ROWS = 100  # rows of each source to try before a training
COLUMNS = {"conversations": "conversations", "captions": "caption", "text": "text"}  # text column of each type


@dataclass
class Source:
    """One entry of `datasets`, see the module's docstring.

    Raises:
        ValueError: a value is not allowed, the type of source does not have an option, or the file has no rows.
    """

    path: str
    type: str = "conversations"
    images: str = ""
    codes: str = ""
    task: str = "read"
    prompt: str = ""
    mode: str = ""
    weight: float | None = None

    def __post_init__(self):
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name != "weight" and not isinstance(value, str):
                raise ValueError(f"{option.name} of a data set must be a text, got {value!r}.")
        if self.type not in UNUSED_OPTIONS:
            raise ValueError(f"type must be one of {', '.join(UNUSED_OPTIONS)}, got {self.type!r} for {self.path}.")
        if self.task not in ("read", "draw"):
            raise ValueError(f"task must be read or draw, got {self.task!r} for {self.path}.")
        if self.mode not in ("", *MODES):
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r} for {self.path}.")
        if self.weight is not None:
            self.weight = checked_number(f"weight of {self.path}", self.weight, *ABOVE_ZERO)
        unused = UNUSED_OPTIONS[self.type] + (("prompt",) if self.task == "draw" else ())
        for name in unused + (("images",) if self.codes else ()):
            if getattr(self, name) != getattr(type(self), name):
                what = f"type {self.type}, task {self.task}" + (", with codes" if self.codes else "")
                raise ValueError(f"{self.path} ({what}) has no use for {name} {getattr(self, name)!r}.")
        self.rows = read_rows(Path(self.path))
        if not len(self.rows):
            raise ValueError(f"{self.path} has no rows.")
        self.store = None
        if self.codes:
            self.store = CodeStore(self.codes)
            if self.mode or self.type == "captions":
                self._mode(self.task == "draw")
        elif self.type != "text":
            self.store = ImageStore(self.images or str(Path(self.path).parent))

    def _mode(self, draws_only: bool) -> str:
        """Return the image processor's mode for the pictures of a sample.

        Raises:
            ValueError: the codes were extracted in another mode.
        """
        mode = self.mode or ("reconstruct" if draws_only else "understand")
        if self.codes and (theirs := self.store.metadata.get("mode")) != mode:
            raise ValueError(
                f"{self.codes} has codes of pictures in the mode {theirs!r}, but {self.path} takes {mode!r}: extract "
                f"codes with --mode {mode}, or give that source `mode: {theirs}`."
            )
        return mode

    def sample(self, index: int, texts: SampleTexts, caption_dropout: float, rng: np.random.Generator) -> dict:
        """Convert a row to a sample.

        Args:
            index: index of the row.
            texts: encoder of the texts.
            caption_dropout: see `MLLMDataset`.
            rng: source of randomness for the dropout and the choice of a variant of codes.

        Returns:
            `input_ids` and `labels` (T,), `image_targets` (N,) and a list of N `images`. An image is either the codes
            (K, L) of one of its extracted variants, or pixels (3, H, W).

        Raises:
            UnusableSample: the row or one of its pictures is broken, or see `SampleTexts`.
            ValueError: the codes were extracted in another mode.
        """
        row = self.rows[index]
        check_row(row, COLUMNS[self.type])
        if self.type == "text":
            return texts.plain(row["text"]) | {"images": []}
        names = row.get("image") or []
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UnusableSample(f"images must be named by texts, got {row['image']!r:.100}")
        if self.type == "captions" and len(names) != 1:
            raise UnusableSample(f"a caption belongs to one image, but `image` is {row.get('image')!r}")
        draws_only = self.task == "draw"
        if self.type == "conversations":
            messages = to_messages(row["conversations"], texts.processor.image_token, len(names))
            shown_to = {m["role"] for m in messages for part in m["content"] if part["type"] == "image"}
            draws_only = shown_to == {"assistant"}
            messages, names = drop_conditions(messages, names, caption_dropout, rng)
            encoded = texts.conversation(messages)
        elif self.task == "draw":
            encoded = texts.drawing(None if rng.random() < caption_dropout else row["caption"])
        elif self.prompt:
            question = [{"type": "image"}, {"type": "text", "text": self.prompt}]
            answer = [{"type": "text", "text": row["caption"]}]
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            encoded = texts.conversation(turns)
        else:
            encoded = texts.reading(row["caption"])
        if len(encoded["image_targets"]) != len(names):
            places = len(encoded["image_targets"])
            raise UnusableSample(f"its text has {places} image placeholders, but its `image` names {names or 'none'}")
        mode = self._mode(draws_only) if names else ""
        return encoded | {"images": [self._image(name, mode, texts.processor, rng) for name in names]}

    def check_samples(self, texts: SampleTexts) -> None:
        """Check that at least one of up to 100 rows, evenly spaced, can be used.

        Raises:
            ValueError: none of them can, and the message gives the reason of the last one; or see `sample`.
        """
        rows = np.unique(np.linspace(0, len(self.rows) - 1, CHECKED_ROWS, dtype=int)).tolist()
        for row in rows:
            try:
                self.sample(row, texts, 0.0, np.random.default_rng(0))
            except UnusableSample as error:
                reason = error
            else:
                return
        raise ValueError(f"{self.path}: none of the {len(rows)} rows that were tried can be used: {reason}")

    def _image(self, name: str, mode: str, processor: UniTokMLLMProcessor, rng: np.random.Generator) -> torch.Tensor:
        if isinstance(self.store, CodeStore):
            try:
                variants = self.store[name]
            except KeyError as error:
                raise UnusableSample(str(error)) from error
            return variants[rng.integers(len(variants))]
        picture = self.store[name]
        try:
            return processor.image_processor(picture, mode=mode, return_tensors="pt")["pixel_values"][0]
        except ValueError as error:  # an unsuitable shape
            raise UnusableSample(f"{name}: {error}") from error


def check_row(row: dict, column: str) -> None:
    """Check that a row's column is a text or, for conversations, a list of turns.

    Raises:
        UnusableSample: the column is missing or has another type.
    """
    value = row.get(column)
    turns = value if column == "conversations" else [{"from": "", "value": value}]
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)
        for turn in turns
    ):
        raise UnusableSample(f"{column} cannot be {value!r:.100}")


def to_messages(turns: list[dict], image_token: str, num_images: int) -> list[dict]:
    """Convert LLaVA's turns to transformers' format. Each `image_token` in a turn's text becomes an image.

    Args:
        turns: dicts of `from` and `value`.
        image_token: placeholder of an image.
        num_images: number of image files in the sample.

    Raises:
        UnusableSample: a turn has an unknown `from`, or the number of images differs from `num_images`.
    """
    messages = []
    for turn in turns:
        if turn["from"] not in ROLES:
            raise UnusableSample(f"a turn is from {turn['from']!r}; known: {', '.join(ROLES)}")
        content = []
        for i, text in enumerate(turn["value"].split(image_token)):
            content += [{"type": "image"}] * (i > 0)
            text = text.removeprefix("\n") if i else text
            content += [{"type": "text", "text": text}] if text else []
        messages.append({"role": ROLES[turn["from"]], "content": content})
    marked = sum(part["type"] == "image" for message in messages for part in message["content"])
    if marked != num_images:
        raise UnusableSample(f"{marked} {image_token} in the turns, but {num_images} image files")
    return messages


def drop_conditions(
    messages: list[dict], names: list[str], share: float, rng: np.random.Generator
) -> tuple[list[dict], list[str]]:
    """Classifier-free-guidance dropout for conversations answered only by images. Others are not changed.

    Args:
        messages: turns in transformers' format.
        names: names of their images, in order.
        share: probability that the null prompt replaces the user's words, and the equal probability that the user's
            pictures are left out instead.
        rng: source of randomness.

    Returns:
        The turns, and the names of the images that are left in them.
    """
    answers = [part["type"] for message in messages if message["role"] == "assistant" for part in message["content"]]
    chance = rng.random() if set(answers) == {"image"} else 1.0
    if chance >= 2 * share:
        return messages, names
    dropped, left = "text" if chance < share else "image", iter(names)
    new_messages, new_names = [], []
    for message in messages:
        kept = []
        for part in message["content"]:
            name = next(left) if part["type"] == "image" else None
            if message["role"] != "user" or part["type"] != dropped:
                kept.append(part)
                new_names += [name] if name else []
        if message["role"] == "user" and dropped == "text":
            kept.append({"type": "text", "text": UNCONDITIONAL_PROMPT})
        new_messages.append({**message, "content": kept})
    return new_messages, new_names


class MLLMDataset(Dataset):
    """Several sources, mixed by weight.

    Sample `i` depends only on the seed and on `i`: neither resuming nor the number of processes or workers changes the
    samples. Each pass over a source has its own shuffled order.

    Args:
        sources: the sources, at least one.
        texts: encoder of the texts.
        num_samples: number of samples; None for the number of rows of all sources.
        seed: seed of the mixture, the orders and the dropout.
        caption_dropout: share of the captions of images to draw that are replaced by the null prompt. For
            conversations see `drop_conditions`.
        max_broken_share: see `BrokenSamples`.

    Raises:
        ValueError: there are no sources, or only some of them have a weight.
    """

    def __init__(
        self,
        sources: list[Source],
        texts: SampleTexts,
        num_samples: int | None = None,
        seed: int = 0,
        caption_dropout: float = 0.1,
        max_broken_share: float = 0.01,
    ):
        check_datasets(sources)
        if len({s.weight is None for s in sources}) > 1:
            raise ValueError("Give all sources of `datasets` a weight, or none of them.")
        weights = np.array([len(s.rows) if s.weight is None else s.weight for s in sources], dtype=float)
        num_samples = num_samples or sum(len(s.rows) for s in sources)
        self.sources, self.texts, self.seed = sources, texts, seed
        self.caption_dropout, self.broken = caption_dropout, BrokenSamples(max_broken_share)
        bounds = np.round(num_samples * np.cumsum(weights) / weights.sum()).astype(int)
        counts = np.diff(bounds, prepend=0)
        self.choices = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sources)), counts))
        self.ranks = np.empty(num_samples, dtype=int)  # index of the sample within its source
        for number, count in enumerate(counts):
            self.ranks[self.choices == number] = np.arange(count)
        self.orders: dict[int, tuple[int, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.choices)

    def _row(self, number: int, rank: int) -> int:
        """Return the row at index `rank` of the shuffled passes over source `number`."""
        passes, place = divmod(rank, len(self.sources[number].rows))
        known, order = self.orders.get(number, (None, None))
        if known != passes:
            rng = np.random.default_rng((self.seed, 1, number, passes))
            order = rng.permutation(len(self.sources[number].rows))
            self.orders[number] = passes, order
        return int(order[place])

    def __getitem__(self, index: int) -> dict:
        """Return a sample, see `Source.sample`. An unusable row is named in the log, and the next row replaces it.

        Raises:
            ValueError: too many rows are unusable, see `BrokenSamples`.
        """
        number = self.choices[index]
        source, row = self.sources[number], self._row(number, int(self.ranks[index]))
        rng = np.random.default_rng((self.seed, 2, index))
        while True:
            try:
                sample = source.sample(row, self.texts, self.caption_dropout, rng)
            except UnusableSample as error:
                self.broken.count_broken(f"row {row} of {source.path}", error)
                row = (row + 1) % len(source.rows)
            else:
                self.broken.count()
                return sample


@dataclass
class MLLMCollator:
    """Collate samples into a batch, either padded on the right, or packed with several samples in a row.

    A packed batch has `position_ids` that restart with each sample, and no `attention_mask`. transformers then keeps
    attention within each sample.

    Args:
        pad_token_id: token id of the padding.
        code_shape: shape of an image's codes, (K, L).
        pack_to: number of tokens in a packed row; 0 for one sample per row.
        one_row: whether to pack everything into one row without padding, as flash attention requires.
        no_targets: token ids that are never targets.
    """

    pad_token_id: int
    code_shape: tuple[int, int]
    pack_to: int = 0
    one_row: bool = False
    no_targets: tuple[int, ...] = ()

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        """Collate samples of `Source.sample`.

        Returns:
            `input_ids` and `labels` (B, T), `attention_mask` or `position_ids` (B, T), and the scalar `num_tokens`,
            which does not count padding. With images also `image_codes` (N, K, L) and `image_targets` (N,). The M
            images given as pixels are in `pixel_values` (M, 3, H, W), and their indices among the N in `pixel_places`
            (M,).
        """
        rows = self._rows(samples)
        samples = [sample for row in rows for sample in row]
        batch = {
            "input_ids": self._pad([torch.cat([s["input_ids"] for s in row]) for row in rows], self.pad_token_id),
            "num_tokens": torch.tensor(sum(len(s["input_ids"]) for s in samples)),
        }
        width = batch["input_ids"].shape[1]
        lengths = torch.tensor([sum(len(s["input_ids"]) for s in row) for row in rows])
        if self.pack_to or self.one_row:
            for sample in samples:
                sample["labels"] = sample["labels"].clone()
                sample["labels"][0] = IGNORE  # the first token of a sample has no context
            positions = [[*(torch.arange(len(s["input_ids"])) for s in row)] for row in rows]
            filled = [torch.cat([*p, torch.arange(width - n)]) for p, n in zip(positions, lengths.tolist())]
            batch["position_ids"] = torch.stack(filled)
        else:
            batch["attention_mask"] = (torch.arange(width)[None] < lengths[:, None]).long()
        batch["labels"] = self._pad([torch.cat([s["labels"] for s in row]) for row in rows], IGNORE)
        if self.no_targets:
            is_excluded = torch.isin(batch["labels"], torch.tensor(self.no_targets))
            batch["labels"] = batch["labels"].masked_fill(is_excluded, IGNORE)
        images = [image for sample in samples for image in sample["images"]]
        if images:
            is_pixels = torch.tensor([image.is_floating_point() for image in images])
            blank = torch.zeros(self.code_shape, dtype=torch.long)
            batch["image_codes"] = torch.stack([blank if p else i for i, p in zip(images, is_pixels.tolist())])
            batch["image_targets"] = torch.cat([s["image_targets"] for s in samples])
            if is_pixels.any():
                batch["pixel_places"] = is_pixels.nonzero().squeeze(1)
                batch["pixel_values"] = torch.stack([images[i] for i in batch["pixel_places"].tolist()])
        return batch

    def _rows(self, samples: list[dict]) -> list[list[dict]]:
        if self.one_row:
            return [samples]
        if not self.pack_to:
            return [[sample] for sample in samples]
        rows, room = [], []
        for sample in sorted(samples, key=lambda s: -len(s["input_ids"])):
            length = len(sample["input_ids"])
            fitting = next((i for i, free in enumerate(room) if free >= length), None)
            if fitting is None:
                rows.append([])
                room.append(self.pack_to)
                fitting = -1
            rows[fitting].append(sample)
            room[fitting] -= length
        return rows

    @staticmethod
    def _pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
