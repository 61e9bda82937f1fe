"""The judge: an independent classifier, a small CNN that names colour and shape in an easy-VQA picture.

It shares nothing with the models that it judges, and learns from the train split alone. Colours and shapes that the
questions about an image leave open are not part of its loss. Training takes about a minute on two CPU cores.

python -m eval.judge --output runs/judge.safetensors
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from eval._common import parse_settings, weights_needed
from training.easy_vqa import COLORS, SHAPES, Sample, load
from training.errors import one_line_errors
from training.files import write_atomically
from unitok_mllm.configuration_unitok import check_ranges
from unitok_mllm.outputs import check_output_file


IMAGE_SIZE = 64
EPOCHS = 8
MAX_SHIFT = 4  # pixels, in augmentation
UNKNOWN = -100  # label of a colour or shape that the questions leave open


class Judge(nn.Module):
    """Five 3x3 convolutions, each followed by a max pooling, and one linear head each for colour and shape."""

    def __init__(self):
        super().__init__()
        widths = (3, 16, 32, 64, 64, 128)
        self.features = nn.Sequential(
            *[
                nn.Sequential(
                    nn.Conv2d(inside, outside, 3, padding=1, bias=False),
                    nn.BatchNorm2d(outside),
                    nn.ReLU(),
                    nn.MaxPool2d(2),
                )
                for inside, outside in zip(widths, widths[1:])
            ]
        )
        self.color_head = nn.Linear(widths[-1], len(COLORS))
        self.shape_head = nn.Linear(widths[-1], len(SHAPES))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute logits over COLORS (N, 8) and SHAPES (N, 3) of images (N, 3, 64, 64) in [-1, 1]."""
        features = self.features(pixels).mean(dim=(2, 3))
        return self.color_head(features), self.shape_head(features)


def load_pixels(samples: list[Sample]) -> torch.Tensor:
    """Load the samples' images, (N, 3, 64, 64) in [-1, 1], float32."""
    images = np.stack([np.asarray(Image.open(sample.image).convert("RGB")) for sample in samples])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def load_labels(samples: list[Sample]) -> torch.Tensor:
    """Return indices into COLORS and SHAPES, (N, 2), int64; UNKNOWN for what the questions leave open."""

    def find(words: tuple[str, ...], caption: str) -> int:
        return next((i for i, word in enumerate(words) if word in caption.split()), UNKNOWN)

    return torch.tensor([[find(COLORS, s.caption), find(SHAPES, s.caption)] for s in samples])


def augment(pixels: torch.Tensor) -> torch.Tensor:
    """Mirror half of the images (N, 3, H, W), and shift all of them by the same few pixels."""
    is_mirrored = torch.rand(len(pixels)) < 0.5
    pixels = torch.where(is_mirrored[:, None, None, None], pixels.flip(-1), pixels)
    top, left = torch.randint(2 * MAX_SHIFT + 1, (2,)).tolist()
    padded = F.pad(pixels, [MAX_SHIFT] * 4, mode="replicate")
    return padded[:, :, top : top + pixels.shape[2], left : left + pixels.shape[3]]


def judge_loss(model: Judge, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the cross-entropy of colour plus that of shape, per image; unknown labels count as 0."""
    losses = [
        F.cross_entropy(logits, target, ignore_index=UNKNOWN, reduction="sum")
        for logits, target in zip(model(pixels), labels.unbind(dim=1))
    ]
    return sum(losses) / len(pixels)


def train_judge(
    pixels: torch.Tensor,
    labels: torch.Tensor,
    epochs: int = EPOCHS,
    batch_size: int = 64,
    learning_rate: float = 4e-3,
    seed: int = 0,
) -> Judge:
    """Train a judge from scratch on a CPU; the same seed gives the same judge.

    Args:
        pixels: images, (N, 3, 64, 64) in [-1, 1].
        labels: labels, (N, 2), see `load_labels`.
        epochs: passes over the images.
        batch_size: images per batch.
        learning_rate: peak learning rate.
        seed: seed of initialisation, order and augmentation.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Judge().to(memory_format=torch.channels_last)  # twice as fast
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
        steps = epochs * -(-len(pixels) // batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
        with tqdm(total=steps, desc="training the judge") as bar:
            for _ in range(epochs):
                for rows in torch.randperm(len(pixels)).split(batch_size):
                    loss = judge_loss(model, augment(pixels[rows]), labels[rows])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                    bar.update()
    return model.eval()


def save_judge(model: Judge, path: str | Path) -> None:
    """Write the weights as safetensors."""
    write_atomically(path, save({name: tensor.contiguous() for name, tensor in model.state_dict().items()}))


def load_judge(path: str | Path) -> Judge:
    """Load a judge in eval mode, on the CPU, from the weights of `save_judge`.

    Raises:
        ValueError: the file holds something else; the message names it, and what to do.
    """
    model = Judge()
    with weights_needed(
        "judge", f"weights of eval.judge ({path})", "another file as --judge, one that is missing to train it"
    ):
        model.load_state_dict(load_file(path))
    return model.eval()


@torch.no_grad()
def judge_images(model: Judge, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Classify images (N, 3, 64, 64) in [-1, 1]: indices into COLORS and SHAPES, (N,) each, int64."""
    verdicts = [torch.stack([logits.argmax(dim=1) for logits in model(chunk)]) for chunk in pixels.split(256)]
    return tuple(torch.cat(verdicts, dim=1))


def judge_accuracy(model: Judge, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, float | int]:
    """Compute the judge's accuracy, in [0, 1], on images (N, 3, 64, 64) with labels (N, 2).

    Returns:
        `color` and `shape`, each over the images with that label; `both`, over the images with both labels; and their
        number, `images`.
    """
    is_known, is_right = labels != UNKNOWN, torch.stack(judge_images(model, pixels), dim=1) == labels
    has_both = is_known.all(dim=1)
    return {
        "images": int(has_both.sum()),
        "both": is_right[has_both].all(dim=1).float().mean().item(),
        "color": is_right[is_known[:, 0], 0].float().mean().item(),
        "shape": is_right[is_known[:, 1], 1].float().mean().item(),
    }


def make_judge(path: str | Path, epochs: int = EPOCHS, seed: int = 0) -> Judge:
    """Train a judge on the train split, print its accuracy on the test split, and save it."""
    train, test = load("train"), load("test")
    model = train_judge(load_pixels(train), load_labels(train), epochs=epochs, seed=seed)
    accuracy = judge_accuracy(model, load_pixels(test), load_labels(test))
    print(
        f"The judge is right about {accuracy['both']:.2%} of the {accuracy['images']} test images whose colour and "
        f"shape are known (colour {accuracy['color']:.2%}, shape {accuracy['shape']:.2%}); saved to {path}."
    )
    save_judge(model, path)
    return model


@dataclass
class JudgeArguments:
    """Options of the judge's training."""

    output: str = field(default="runs/judge.safetensors", metadata={"help": "file for the weights"})
    epochs: int = field(default=EPOCHS, metadata={"help": "passes over the 4000 train images"})
    seed: int = field(default=0, metadata={"help": "seed of initialisation, order and augmentation"})

    def __post_init__(self):
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")
        check_ranges(self, seed=(0, 2**63 - 1))
        check_output_file(self.output)


@one_line_errors()
def main(argv: list[str] | None = None) -> None:
    arguments = parse_settings(JudgeArguments, argv, __doc__)
    make_judge(arguments.output, arguments.epochs, arguments.seed)


if __name__ == "__main__":
    main()
