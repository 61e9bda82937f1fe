"""Trains a UniTok visual tokenizer: L1, L2, VQ, optional entropy, and contrastive losses.

python -m training.train_tokenizer training/configs/tokenizer_tiny.yaml
torchrun --nproc_per_node 2 -m training.train_tokenizer training/configs/tokenizer_tiny.yaml
"""

from dataclasses import dataclass, field

import torch
from torch.utils.data import Dataset
from transformers import AutoTokenizer, TrainingArguments

from training import easy_vqa
from training.arguments import parse_yaml_and_command_line
from training.losses import psnr, tokenizer_losses, weighted_total
from training.trainer import NamedLossesTrainer
from unitok_mllm import UniTokConfig, UniTokImageProcessor, UniTokModel


@dataclass
class TokenizerArguments:
    """What the tokenizer's training needs beyond the Trainer's own arguments."""

    preset: str = field(default="tiny", metadata={"help": "a preset of UniTokConfig: large, base or tiny"})
    text_tokenizer: str = field(default="", metadata={"help": "folder of the text tokenizer"})
    l1_weight: float = field(default=0.2, metadata={"help": "weight of mean |reconstruction - image|"})
    l2_weight: float = field(default=1.0, metadata={"help": "weight of the mean squared error"})
    vq_weight: float = field(default=1.0, metadata={"help": "weight of the quantizer's loss"})
    entropy_weight: float = field(default=0.0, metadata={"help": "weight of the quantizer's entropy loss"})
    contrastive_weight: float = field(default=1.0, metadata={"help": "weight of the image-text contrastive loss"})


class CaptionedImages(Dataset):
    """easy-VQA's train images, preprocessed once, each mirrored half of the time, with their captions' ids."""

    def __init__(self, processor: UniTokImageProcessor, text_tokenizer, config: UniTokConfig):
        samples = easy_vqa.load("train")
        self.pixel_values = processor([str(s.image) for s in samples])["pixel_values"]
        end = text_tokenizer.eos_token
        self.text = text_tokenizer(
            [s.caption + end for s in samples],
            padding="max_length",
            padding_side="right",
            max_length=config.text_config.max_position_embeddings,
            return_tensors="pt",
        )["input_ids"]

    def __len__(self) -> int:
        return len(self.pixel_values)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pixels = self.pixel_values[index]
        if torch.rand(()) < 0.5:
            pixels = pixels.flip(-1)
        return {"pixel_values": pixels, "input_ids": self.text[index]}


class TokenizerTrainer(NamedLossesTrainer):
    """Adds up the weighted losses of a `UniTokModel`."""

    def __init__(self, *args, weights: dict[str, float], **kwargs):
        super().__init__(*args, **kwargs)
        self.weights = weights

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        output = model(**inputs, with_entropy=self.weights["entropy"] > 0)
        losses = tokenizer_losses(output, inputs["pixel_values"])
        self.record(losses | {"psnr": psnr(output.reconstruction.detach(), inputs["pixel_values"]).mean()})
        self.record({"codebook_usage": output.codebook_usage})
        total = weighted_total(losses, self.weights)
        return (total, output) if return_outputs else total


def main(argv: list[str] | None = None) -> None:
    arguments, training_arguments = parse_yaml_and_command_line((TokenizerArguments, TrainingArguments), argv)
    config = UniTokConfig.preset(arguments.preset)
    image_size = config.vision_config.image_size
    processor = UniTokImageProcessor(size={"height": image_size, "width": image_size})
    text_tokenizer = AutoTokenizer.from_pretrained(arguments.text_tokenizer)
    torch.manual_seed(training_arguments.seed)
    trainer = TokenizerTrainer(
        model=UniTokModel(config),
        args=training_arguments,
        train_dataset=CaptionedImages(processor, text_tokenizer, config),
        processing_class=processor,
        weights={name: getattr(arguments, f"{name}_weight") for name in ("l1", "l2", "vq", "entropy", "contrastive")},
    )
    trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
