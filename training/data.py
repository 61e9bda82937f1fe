"""Data of the MLLM's training: questions about images and images from captions, mixed."""

from functools import cache

import torch
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm import trange

from training import easy_vqa
from unitok_mllm import UniTokMLLMProcessor, UniTokModel


IGNORE = -100


@torch.no_grad()
def encode_variants(
    visual: UniTokModel, pixel_values: torch.Tensor, num_variants: int, max_shift: int = 4, batch_size: int = 250
) -> torch.Tensor:
    """The codes of images and of variants of them, each mirrored half of the time and shifted by a few pixels.

    Args:
        pixel_values: (N, 3, H, W) in [-1, 1].
        num_variants: how many for each image; the first is the image itself.
        max_shift: of a variant, in pixels, to each side; the border is repeated.

    Returns:
        (num_variants, N, K, L).
    """
    height, width = pixel_values.shape[2:]
    padded = F.pad(pixel_values, [max_shift] * 4, mode="replicate")
    variants = []
    for variant in trange(num_variants, desc="encoding images"):
        codes = []
        for batch in padded.split(batch_size):
            top = left = max_shift
            if variant:
                top, left = torch.randint(2 * max_shift + 1, (2,)).tolist()
                batch = batch.flip(-1) if torch.rand(()) < 0.5 else batch
            codes.append(visual.encode(batch[:, :, top : top + height, left : left + width]))
        variants.append(torch.cat(codes))
    return torch.stack(variants)


class EasyVQAForMLLM(Dataset):
    """Every question of easy-VQA's train split, and its images to draw from their captions.

    An image may come mirrored and shifted: neither answers nor captions speak of places.

    Args:
        processor: makes the texts; its padding does not matter here.
        visual: makes the codes, once, at the start.
        generation_share: share of the samples that are drawn.
        caption_dropout: share of the captions replaced by the null prompt that guidance uses.
        num_variants: versions of each image, see `encode_variants`.
    """

    def __init__(
        self,
        processor: UniTokMLLMProcessor,
        visual: UniTokModel,
        generation_share: float,
        caption_dropout: float,
        num_variants: int,
    ):
        if not 0 <= generation_share < 1:
            raise ValueError(f"generation_share must be at least 0 and below 1, got {generation_share}.")
        self.processor, self.caption_dropout = processor, caption_dropout
        self.samples = easy_vqa.load("train")
        pixel_values = processor.image_processor([str(sample.image) for sample in self.samples])["pixel_values"]
        self.codes = encode_variants(visual, pixel_values, num_variants)
        self.any_image = str(self.samples[0].image)
        self.questions = [(i, *pair) for i, sample in enumerate(self.samples) for pair in sample.questions]
        self.num_drawn = round(len(self.questions) * generation_share / (1 - generation_share))
        self.reading_text, self.drawing_text = cache(self._reading_text), cache(self._drawing_text)

    def __len__(self) -> int:
        return len(self.questions) + self.num_drawn

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | bool]:
        draws = index >= len(self.questions)
        if draws:
            number = (index - len(self.questions)) % len(self.samples)
            dropped = torch.rand(()) < self.caption_dropout
            input_ids, labels = self.drawing_text(None if dropped else self.samples[number].caption)
        else:
            number, question, answer = self.questions[index]
            input_ids, labels = self.reading_text(question, answer)
        variant = torch.randint(len(self.codes), ())
        return {
            "input_ids": input_ids,
            "labels": labels,
            "image_codes": self.codes[variant, number],
            "image_target": draws,
        }

    def _reading_text(self, question: str, answer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of a turn of question and answer, and labels: the answer alone, as the chat template marks it."""
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        assistant = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        inputs = self.processor.apply_chat_template(
            [user, assistant],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={"images": [self.any_image]},
        )
        input_ids, is_answer = inputs["input_ids"][0], torch.as_tensor(inputs["assistant_masks"])[0].bool()
        if not is_answer.any():
            raise ValueError(f"Nothing to learn from question {question!r} with answer {answer!r}.")
        return input_ids, input_ids.masked_fill(~is_answer, IGNORE)

    def _drawing_text(self, caption: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of a caption (None: the null prompt) and its image, and labels: the image's frame and the end."""
        processor = self.processor
        input_ids = processor(images=self.any_image, text=processor.image_sample(caption))["input_ids"][0]
        is_target = torch.isin(
            input_ids,
            torch.tensor([processor.boi_token_id, processor.eoi_token_id, processor.tokenizer.eos_token_id]),
        )
        return input_ids, input_ids.masked_fill(~is_target, IGNORE)


def collate(samples: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pads on the right, and lines the images up in the order of their samples."""

    def pad(name: str, value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([s[name] for s in samples], batch_first=True, padding_value=value)

    lengths = torch.tensor([len(s["input_ids"]) for s in samples])
    return {
        "input_ids": pad("input_ids", pad_token_id),
        "attention_mask": (torch.arange(lengths.max())[None] < lengths[:, None]).long(),
        "labels": pad("labels", IGNORE),
        "image_codes": torch.stack([s["image_codes"] for s in samples]),
        "image_targets": torch.tensor([s["image_target"] for s in samples]),
    }
