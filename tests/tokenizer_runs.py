"""A tiny tokenizer, its data and its trainer, for all tests of its training."""

import math
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from accelerate.state import AcceleratorState
from PIL import Image
from torch.utils.data import Dataset

from training.discriminator import FeatureDiscriminator
from training.image_text_data import ImageTextStream, ImageTextTransform
from training.losses import TERMS, LossArguments
from training.perceptual import FrozenFeatures, perceptual_distance
from training.tokenizer_arguments import TokenizerTrainingArguments
from training.tokenizer_trainer import SPEEDS, TokenizerTrainer
from unitok_mllm import UniTokConfig, UniTokImageProcessor, UniTokModel


SIZE = 32
ALL_TERMS = {f"{name}_weight": 1.0 for name in TERMS} | {"gan_start": 0.0, "gan_warmup": 0.0}


class Noise(Dataset):
    """Random pictures with captions of one word, changed at every look."""

    def __init__(self, length: int = 16):
        generator = torch.Generator().manual_seed(0)
        self.pixel_values = torch.rand(length, 3, SIZE, SIZE, generator=generator) * 2 - 1

    def __len__(self) -> int:
        return len(self.pixel_values)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        generator = torch.Generator().manual_seed(1000 * epoch + index)
        pixels = self.pixel_values[index] * torch.rand((), generator=generator)
        return {"pixel_values": pixels, "input_ids": torch.tensor([1, 10 + index, 2, 0])}


class Recorder(TokenizerTrainer):
    """Keeps what is reported, by step, and can kill its own process."""

    die_at = math.inf
    speeds: dict[str, float] = {}  # of the last log

    def __init__(self, *args, **kwargs):
        self.reports = {}
        super().__init__(*args, **kwargs)

    def _report(self, values: dict[str, float]) -> None:
        self.speeds = {name: values.pop(name) for name in SPEEDS if name in values} or self.speeds
        self.reports[self.step] = self.reports.get(self.step, {}) | values
        if self.step == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)


def small_model(**vision_overrides) -> UniTokModel:
    torch.manual_seed(0)
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "stem_width": 8,
        "stage_dims": (8, 16),
    }
    vision |= {"stage_depths": (1, 1), "codebook_size": 16, "image_size": SIZE}
    config = UniTokConfig.preset("tiny", **vision | vision_overrides)
    text = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1}
    for name, value in text.items():
        setattr(config.text_config, name, value)
    return UniTokModel(config)


def trainer_of(
    folder: Path,
    losses: dict,
    model: UniTokModel | None = None,
    dataset=None,
    samples_per_epoch=None,
    eval_dataset=None,
    **arguments,
) -> Recorder:
    losses = LossArguments(**losses)
    networks = {}
    torch.manual_seed(1)
    if losses.perceptual_weight:
        networks["perceptual"] = perceptual_distance("test_resnet", SIZE, pretrained=False)
    if losses.gan_weight:
        networks["discriminator"] = FeatureDiscriminator(FrozenFeatures("test_vit", SIZE, (0, 4), pretrained=False))
    defaults = {"max_steps": 1, "per_device_train_batch_size": 4, "warmup": 0.0, "use_cpu": True, "bf16": False}
    defaults |= {"logging_steps": 1, "learning_rate": 1e-3, "output_dir": str(folder)}
    arguments = TokenizerTrainingArguments(**defaults | arguments)
    dataset = Noise() if dataset is None else dataset
    model = small_model() if model is None else model
    networks |= {"samples_per_epoch": samples_per_epoch, "eval_pixels": Noise(2).pixel_values}
    networks["eval_dataset"] = eval_dataset
    return Recorder(model, arguments, losses, dataset, **networks)


def image_stream(folder: Path, text_tokenizer, shards: tuple[int, ...] = (9,), **options) -> ImageTextStream:
    """Pictures in tar files, so many in each."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for number, length in enumerate(shards):
        with wds.TarWriter(str(folder / f"{number}.tar")) as writer:
            for i in range(length):
                picture = Image.fromarray(generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
                writer.write({"__key__": f"{number}-{i}", "png": picture, "txt": f"{number} {i}"})
    transform = ImageTextTransform(UniTokImageProcessor(size={"height": SIZE, "width": SIZE}), text_tokenizer, 4)
    paths = [str(folder / f"{number}.tar") for number in range(len(shards))]
    return ImageTextStream(paths, transform, seed=0, samples_per_epoch=16, **options)


def train_and_resume(folder: Path, text_tokenizer, ports=(None, None), **options) -> tuple[Recorder, Recorder]:
    """Six steps on a stream, without a break and from the third one on.

    Of several processes, each training needs a port of its own: a network of the last one keeps that one's store open,
    and in it the addresses of the last process group, which the next would take for those of its own.
    """
    trained = []
    for resume, port in zip((False, True), ports):
        if port is not None:
            os.environ["MASTER_PORT"] = str(port)
        stream = image_stream(folder / f"data-{os.environ.get('RANK', 0)}", text_tokenizer, (6, 3, 5), **options)
        arguments = {
            "max_steps": 6,
            "save_steps": 2,
            "save_total_limit": 9,
            "resume": resume,
            "per_device_train_batch_size": 2,
        }
        trainer = trainer_of(folder, {}, dataset=stream, samples_per_epoch=8, **arguments)
        assert trainer.step == (2 if resume else 0)
        trainer.train()
        trained.append(trainer)
        if not resume and trainer.accelerator.is_main_process:
            for step in (4, 6):
                shutil.rmtree(folder / f"checkpoint-{step}")
        while not resume and (folder / "checkpoint-6").exists():
            time.sleep(0.1)
        AcceleratorState._reset_state(reset_partial_state=True)  # the training has ended the process group
    return trained
