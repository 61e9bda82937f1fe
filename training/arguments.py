"""Command lines of the training scripts: one YAML file, then `--name value` for whatever should differ from it."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser

from unitok_mllm.processing_unitok import VICUNA_SYSTEM


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


def parse_yaml_and_command_line(dataclass_types: tuple, argv: list[str] | None = None) -> tuple:
    """Reads `CONFIG.yaml [--name value ...]` into instances of the dataclasses; the command line wins.

    Raises:
        SystemExit: no config was given, it does not exist, or it has a key that no dataclass knows.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(dataclass_types)
    if not argv or argv[0] in ("-h", "--help"):
        parser.parse_args(["--help"])
    if not Path(argv[0]).is_file():
        parser.error(f"the first argument is a YAML config; there is no file {argv[0]}")
    values = yaml.safe_load(Path(argv[0]).read_text()) or {}
    known = {action.dest for action in parser._actions}
    if unknown := sorted(values.keys() - known):
        parser.error(f"{argv[0]} has unknown keys: {', '.join(unknown)}")
    parser.set_defaults(use_cpu=not torch.accelerator.is_available())  # or bf16 is refused where there is no GPU
    parser.set_defaults(**values)
    return parser.parse_args_into_dataclasses(args=argv[1:])
