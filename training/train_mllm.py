"""Trains the unified MLLM on a mix of visual question answering and text-to-image.

    python -m training.train_mllm training/configs/mllm_tiny.yaml
    torchrun --nproc_per_node 2 -m training.train_mllm training/configs/mllm_tiny.yaml

The folder `<output_dir>/release` is what `AutoModelForImageTextToText` and `AutoProcessor` load.
"""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainingArguments

from training.arguments import parse_yaml_and_command_line
from training.data import EasyVQAForMLLM, collate
from training.trainer import NamedLossesTrainer
from unitok_mllm import UniTokImageProcessor, UniTokMLLMForConditionalGeneration, UniTokMLLMProcessor, UniTokModel
from unitok_mllm.processing_unitok import VICUNA_SYSTEM, vicuna_chat_template


@dataclass
class MLLMArguments:
    """What the MLLM's training needs beyond the Trainer's own arguments."""

    visual_model: str = field(default="", metadata={"help": "folder of a trained UniTok tokenizer"})
    text_tokenizer: str = field(default="", metadata={"help": "folder of the text tokenizer"})
    llm: str = field(default="", metadata={"help": "folder or hub name of a causal LM to start from"})
    llm_config: dict | None = field(default=None, metadata={"help": "without llm: the config of a fresh causal LM"})
    depth_config: dict | None = field(default=None, metadata={"help": "sizes of the depth transformer"})
    embedder_dim: int = field(default=1024, metadata={"help": "width of the embedder's attention projection"})
    embedder_heads: int = field(default=16, metadata={"help": "its heads"})
    train_codebooks: bool = field(default=False, metadata={"help": "train the embedder's copy of the codebooks too"})
    caption_dropout: float = field(default=0.1, metadata={"help": "share of captions replaced by the null prompt"})
    generation_share: float = field(default=0.3, metadata={"help": "share of samples that draw instead of answer"})
    image_variants: int = field(default=1, metadata={"help": "versions of each image, mirrored and shifted"})
    text_loss_weight: float = field(
        default=0.0,
        metadata={"help": "weight of the text loss against the image loss; 0: by their numbers of targets"},
    )
    system_line: str = field(default=VICUNA_SYSTEM, metadata={"help": "system line of the vicuna_v1 chat template"})
    boi_token: str = field(default="<0x00>", metadata={"help": "the token that opens an image"})
    eoi_token: str = field(default="<0x01>", metadata={"help": "the token that closes an image"})


class MLLMTrainer(NamedLossesTrainer):
    """Logs both losses of the MLLM; with a `text_loss_weight` above 0, that share replaces the token counts' one."""

    def __init__(self, *args, text_loss_weight: float = 0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.text_loss_weight = text_loss_weight

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        output = model(**inputs)
        self.record({"text_loss": output.text_loss, "image_loss": output.image_loss})
        loss, weight = output.loss, self.text_loss_weight
        if weight:
            loss = weight * output.text_loss + (1 - weight) * output.image_loss
        return (loss, output) if return_outputs else loss


def build_processor(arguments: MLLMArguments, image_size: int) -> UniTokMLLMProcessor:
    return UniTokMLLMProcessor(
        UniTokImageProcessor(size={"height": image_size, "width": image_size}),
        AutoTokenizer.from_pretrained(arguments.text_tokenizer),
        chat_template=vicuna_chat_template(arguments.system_line),
        boi_token=arguments.boi_token,
        eoi_token=arguments.eoi_token,
    )


def build_language_model(arguments: MLLMArguments) -> PreTrainedModel:
    if arguments.llm:
        return AutoModelForCausalLM.from_pretrained(arguments.llm, dtype=torch.float32)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**arguments.llm_config))


def save_release(model: PreTrainedModel, processor: UniTokMLLMProcessor, folder: Path) -> None:
    """Saves weights in half precision with everything that loading needs; they load in float32 unless told otherwise."""
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text().replace('"float16"', '"float32"'))
    config_path.write_text(json.dumps(config, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    arguments, training_arguments = parse_yaml_and_command_line((MLLMArguments, TrainingArguments), argv)
    torch.manual_seed(training_arguments.seed)
    visual = UniTokModel.from_pretrained(arguments.visual_model).eval()
    processor = build_processor(arguments, visual.config.vision_config.image_size)
    dataset = EasyVQAForMLLM(
        processor, visual, arguments.generation_share, arguments.caption_dropout, arguments.image_variants
    )
    model = UniTokMLLMForConditionalGeneration.from_parts(
        build_language_model(arguments),
        visual,
        depth_config=arguments.depth_config,
        embedder_dim=arguments.embedder_dim,
        embedder_heads=arguments.embedder_heads,
        **processor.config_token_ids(),
    )
    if arguments.train_codebooks:
        model.embedder.unfreeze_codebooks()
    trainer = MLLMTrainer(
        model=model,
        args=training_arguments,
        train_dataset=dataset,
        data_collator=partial(collate, pad_token_id=processor.tokenizer.pad_token_id),
        processing_class=processor,
        text_loss_weight=arguments.text_loss_weight,
    )
    trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint)
    trainer.save_state()
    if trainer.is_world_process_zero():
        save_release(model, processor, Path(training_arguments.output_dir) / "release")


if __name__ == "__main__":
    main()
