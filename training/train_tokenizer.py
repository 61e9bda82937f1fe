"""Train a UniTok visual tokenizer (https://arxiv.org/abs/2502.20321) with every term of its loss.

python -m training.train_tokenizer training/configs/tokenizer_tiny.yaml
torchrun --nproc_per_node 8 -m training.train_tokenizer training/configs/tokenizer_large.yaml
torchrun --nproc_per_node 8 -m training.train_tokenizer training/configs/tokenizer_large.yaml \\
    --deepspeed training/configs/deepspeed/zero2.json
accelerate launch --num_machines 8 ... -m training.train_tokenizer training/configs/tokenizer_large.yaml

`--deepspeed` shards the tokenizer by ZeRO, `--fsdp true` by FSDP2; so does the config file of `accelerate launch`.
`--resume true` resumes from the newest checkpoint, and the losses continue as if the run had not been interrupted. The
sharding and the number of processes may change. Only a webdataset stream needs the same number of processes and workers;
with another one, resuming is refused.
"""

import logging
import os
import re
from dataclasses import dataclass, field, fields
from itertools import islice

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from huggingface_hub.utils import validate_repo_id
from torch.utils.data import Dataset, IterableDataset
from transformers import AutoTokenizer, CLIPTextConfig, PreTrainedTokenizerBase

from training.arguments import (
    check_arguments,
    check_datasets,
    check_open_clip,
    check_source,
    parse_yaml_and_command_line,
)
from training.discriminator import FeatureDiscriminator
from training.errors import check_keys, one_line_errors
from training.files import how_to_go_on
from training.image_text_data import ImageTextTransform, build_image_text_dataset
from training.losses import LossArguments
from training.model_card import TrainingRun, check_metadata, push_release
from training.perceptual import FrozenFeatures, perceptual_distance
from training.run_folder import claim_folder
from training.tokenizer_arguments import TokenizerTrainingArguments
from training.tokenizer_trainer import STATE, TokenizerTrainer
from unitok_mllm import UniTokConfig, UniTokModel
from unitok_mllm.configuration_unitok import SHARE, UniTokVisionConfig
from unitok_mllm.convert_unitok import TOKENIZER_KEYS, ConversionReport
from unitok_mllm.image_processing_unitok import UniTokImageProcessor


logger = logging.getLogger(__name__)
OPEN_CLIP_KEYS = (
    (r"^visual\.trunk\.fc_norm\.", "vision_model.fc_norm."),
    (r"^visual\.trunk\.", "vision_model.encoder."),
    (r"^visual\.head\.proj\.weight$", "vision_model.projection.weight"),
    (r"^text\.", "text_encoder."),
    *TOKENIZER_KEYS,
)
GRID_IMAGES = 16


@dataclass
class TokenizerArguments:
    """The tokenizer to train, and its data. Each field's help text explains it."""

    preset: str = field(
        default="tiny",
        metadata={
            "help": "preset of UniTokConfig: large, base or tiny; the text tower takes the text tokenizer's vocabulary"
        },
    )
    vision_overrides: dict = field(
        default_factory=dict, metadata={"help": "fields of the preset's vision config to override"}
    )
    text_overrides: dict = field(
        default_factory=dict, metadata={"help": "fields of the preset's text config to override"}
    )
    init_from: str = field(default="", metadata={"help": "folder of a tokenizer to start from, instead of a preset"})
    init_open_clip: str = field(
        default="", metadata={"help": "open_clip model to take the two towers from, such as ViTamin-L-256"}
    )
    init_open_clip_weights: str = field(
        default="", metadata={"help": "weights of that model: a file, or one of open_clip's tags"}
    )
    text_tokenizer: str = field(default="", metadata={"help": "folder or hub name of the text tokenizer"})
    datasets: list[dict] = field(
        default_factory=list,
        metadata={
            "help": "sources of images and captions (YAML only), see training.image_text_data; each may set "
            "random_crop, horizontal_flip and max_shift"
        },
    )
    eval_datasets: list[dict] = field(
        default_factory=list,
        metadata={
            "help": "sources to evaluate, whose first images the grids show; empty for the first images of `datasets`"
        },
    )
    image_mode: str = field(default="reconstruct", metadata={"help": "mode of the image processor"})
    max_broken_share: float = field(
        default=0.01, metadata={"help": "share of broken samples above which the run stops"}
    )
    card: dict = field(
        default_factory=dict,
        metadata={"help": "front matter of the release's model card: {license: mit, datasets: [owner/name]} ..."},
    )
    hub_model_id: str = field(default="", metadata={"help": "hub repository to push the release to"})

    def __post_init__(self):
        check_arguments(self, max_broken_share=SHARE)
        check_keys("vision_overrides", self.vision_overrides, UniTokVisionConfig.own_fields())
        check_keys("text_overrides", self.text_overrides, [option.name for option in fields(CLIPTextConfig)])
        check_metadata(self.card)
        if self.hub_model_id:
            validate_repo_id(self.hub_model_id)
        if self.init_open_clip_weights and not self.init_open_clip:
            raise ValueError(
                f"init_open_clip_weights is {self.init_open_clip_weights}, but init_open_clip names no model."
            )
        if endless := [source for source in self.eval_datasets if source.get("resampled")]:
            raise ValueError(f"An evaluation set must end, which a resampled stream does not: {endless}.")


def load_open_clip(model: UniTokModel, name: str, weights: str) -> ConversionReport:
    """Copy both towers of an open_clip ViTamin-CLIP into a tokenizer.

    CLIP's final norm and projection become those of the image embedding. The quantizer, its projections, the encoder's
    last norm and the decoder, which CLIP does not have, stay unchanged. CLIP's position embedding is left out, since
    UniTok's encoder has none. (In the transformer blocks, UniTok's GELU is the tanh approximation, open_clip's is
    exact.)

    Args:
        model: tokenizer to change in place.
        name: name of the open_clip model, such as "ViTamin-L-256".
        weights: a file, or one of open_clip's tags for this model.

    Returns:
        The number of tensors used, and the names of those left out.

    Raises:
        ValueError: open_clip has no such model, or a tensor has no counterpart or another shape.
    """
    import open_clip  # optional, from the extra `train`

    try:
        source = open_clip.create_model(name, pretrained=weights or None, require_pretrained=True).state_dict()
    except RuntimeError as error:  # an unknown name, or missing weights
        raise ValueError(f"open_clip cannot load {name!r}: {error!s:.200}") from error
    target, report = model.state_dict(), ConversionReport()
    with torch.no_grad():
        model.vision_model.projection.bias.zero_()
    for name, tensor in source.items():
        if name == "visual.trunk.pos_embed":
            report.left_out[name] = "UniTok's encoder has no position embedding"
            continue
        ours = name
        for pattern, replacement in OPEN_CLIP_KEYS:
            ours = re.sub(pattern, replacement, ours)
        parts = {ours: tensor.T if ours == "text_model.text_projection.weight" else tensor}
        if ".self_attn.in_proj_" in ours:
            parts = {ours.replace("in_proj_", f"{x}_proj."): part for x, part in zip("qkv", tensor.chunk(3))}
        for key, part in parts.items():
            if key not in target or target[key].shape != part.shape:
                have = tuple(target[key].shape) if key in target else "no such tensor"
                raise ValueError(f"{name} {tuple(part.shape)} does not fit: the tokenizer has {have} ({key}).")
            target[key].copy_(part)
        report.used += 1
    return report


def build_model(arguments: TokenizerArguments, text_tokenizer: PreTrainedTokenizerBase) -> UniTokModel:
    """Load a tokenizer from a folder, or build a new one, optionally with the towers of an open_clip model.

    A new text tower has one embedding per token of the text tokenizer. open_clip's text tower keeps its own
    vocabulary.

    Raises:
        ValueError: a folder is given together with options that it would override.
    """
    overrides = arguments.vision_overrides | arguments.text_overrides
    if arguments.init_from and (arguments.init_open_clip or overrides):
        raise ValueError(
            f"init_from ({arguments.init_from}) has its own config and weights: leave out init_open_clip "
            f"({arguments.init_open_clip}) and overrides ({overrides})."
        )
    if arguments.init_from:
        return UniTokModel.from_pretrained(arguments.init_from, dtype=torch.float32)
    text = {"vocab_size": max(text_tokenizer.get_vocab().values()) + 1}
    text |= {name: getattr(text_tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = arguments.text_overrides if arguments.init_open_clip else text | arguments.text_overrides
    model = UniTokModel(UniTokConfig.preset(arguments.preset, text, **arguments.vision_overrides))
    if arguments.init_open_clip:
        print(load_open_clip(model, arguments.init_open_clip, arguments.init_open_clip_weights))
    return model


def check_text_tokenizer(text_tokenizer: PreTrainedTokenizerBase, config: UniTokConfig) -> None:
    """Check that a text tokenizer's ids fit the text tower, which looks up embeddings and finds the end token by them.

    Raises:
        ValueError: there is no text tower, the end tokens differ, or the tower has too few embeddings.
    """
    text = config.text_config
    if text is None:
        raise ValueError("The tokenizer to start from has no text tower for the captions.")
    if text_tokenizer.eos_token_id != text.eos_token_id or len(text_tokenizer) > text.vocab_size:
        raise ValueError(
            f"The text tokenizer has {len(text_tokenizer)} tokens and ends texts with {text_tokenizer.eos_token_id}; "
            f"the text tower has {text.vocab_size} and looks for {text.eos_token_id}."
        )


def build_datasets(
    sources: list[dict],
    image_processor: UniTokImageProcessor,
    text_tokenizer: PreTrainedTokenizerBase,
    max_text_length: int,
    seed: int,
    max_broken_share: float = 0.01,
) -> tuple[Dataset, int | None]:
    """Build one data set of all sources.

    Returns:
        The data set, and the number of samples in an epoch if it is a stream, else None.

    Raises:
        ValueError: there is no source, or a stream is one of several sources.
    """
    is_stream = any(source.get("kind") == "webdataset" for source in sources)
    transform = ImageTextTransform(image_processor, text_tokenizer, max_text_length)
    dataset = build_image_text_dataset(sources, transform, seed, max_broken_share)
    return dataset, sources[0]["samples_per_epoch"] if is_stream else None


def build_networks(losses: LossArguments, image_size: int) -> dict[str, torch.nn.Module]:
    """Build the networks that the terms with a weight need, as keyword arguments of `TokenizerTrainer`."""
    networks = {}
    if losses.perceptual_weight:
        networks["perceptual"] = perceptual_distance(
            losses.perceptual_backbone, image_size, losses.perceptual_pretrained, losses.perceptual_checkpoint
        )
    if losses.gan_weight:
        features = FrozenFeatures(
            losses.discriminator_backbone,
            image_size,
            losses.discriminator_depths,
            losses.discriminator_pretrained,
            losses.discriminator_checkpoint,
        )
        networks["discriminator"] = FeatureDiscriminator(features)
    return networks


def first_images(dataset: Dataset, count: int) -> torch.Tensor:
    """Load the first `count` images, or all if there are fewer: (count, 3, H, W) in [-1, 1]."""
    indices = range(min(count, len(dataset))) if not isinstance(dataset, IterableDataset) else None
    samples = islice(dataset, count) if indices is None else (dataset[i] for i in indices)
    return torch.stack([sample["pixel_values"] for sample in samples])


def main(argv: list[str] | None = None) -> None:
    arguments, losses, training = parse_yaml_and_command_line(
        (TokenizerArguments, LossArguments, TokenizerTrainingArguments), argv, __doc__
    )
    if not arguments.text_tokenizer:
        raise ValueError("text_tokenizer is empty: give the folder of a text tokenizer, or its name on the hub.")
    if arguments.init_from and training.codebook_start != "random":
        raise ValueError(
            f"codebook_start is {training.codebook_start}, but the codebooks come from {arguments.init_from}."
        )
    training.take_launchers()
    logging.basicConfig(level=logging.INFO if PartialState(cpu=training.use_cpu).is_main_process else logging.ERROR)
    set_seed(training.seed)
    claim_folder(training.output_dir, int(os.environ.get("RANK", 0)) == 0)
    check_source("text_tokenizer", arguments.text_tokenizer, is_model=False)
    check_source("init_from", arguments.init_from)
    check_datasets(arguments.datasets)
    if arguments.init_open_clip:
        check_open_clip(arguments.init_open_clip, arguments.init_open_clip_weights, "init_open_clip_weights")
    with PartialState(cpu=training.use_cpu).local_main_process_first():  # download hub files only once
        text_tokenizer = AutoTokenizer.from_pretrained(arguments.text_tokenizer)
        model = build_model(arguments, text_tokenizer)
        networks = build_networks(losses, model.config.vision_config.image_size)
    check_text_tokenizer(text_tokenizer, model.config)
    size = {"height": model.config.vision_config.image_size, "width": model.config.vision_config.image_size}
    image_processor = UniTokImageProcessor(mode=arguments.image_mode, size=size)
    max_text_length = model.config.text_config.max_position_embeddings
    data = image_processor, text_tokenizer, max_text_length, training.seed, arguments.max_broken_share
    train_dataset, samples_per_epoch = build_datasets(arguments.datasets, *data)
    eval_dataset = build_datasets(arguments.eval_datasets, *data)[0] if arguments.eval_datasets else None
    started_from = [name for name in (arguments.init_from, arguments.init_open_clip) if name]
    trainer = TokenizerTrainer(
        model,
        training,
        losses,
        train_dataset,
        image_processor,
        text_tokenizer,
        samples_per_epoch,
        eval_pixels=first_images(train_dataset if eval_dataset is None else eval_dataset, GRID_IMAGES),
        eval_dataset=eval_dataset,
        run=TrainingRun(started_from, arguments.datasets, arguments.card),
        **networks,
    )
    try:
        trainer.train()
    except KeyboardInterrupt as interrupt:
        interrupt.args = (how_to_go_on(trainer.output_dir, STATE, "the same command with --resume true"),)
        raise
    release = trainer.output_dir / "release"
    logger.info("the tokenizer is in %s; try it: unitok-mllm reconstruct IMAGE --model %s", release, release)
    if arguments.hub_model_id and trainer.accelerator.is_main_process:
        print(push_release(trainer.output_dir / "release", arguments.hub_model_id))


if __name__ == "__main__":
    one_line_errors()(main)()
