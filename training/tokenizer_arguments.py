"""Options of the visual tokenizer's training loop: length, learning rates, sharding and outputs."""

import os
from dataclasses import dataclass, field

from training.arguments import BELOW_ONE, check_arguments
from training.files import MOST_WORKERS
from unitok_mllm.configuration_unitok import ABOVE_ZERO, SHARE, WEIGHT


TRACKERS = ("tensorboard", "wandb")
CODEBOOK_STARTS = ("random", "data")


@dataclass
class TokenizerTrainingArguments:
    """Options of the training loop: length, learning rates, sharding and outputs. Each field's help text explains it."""

    output_dir: str = field(
        default="runs/tokenizer", metadata={"help": "folder for checkpoints, samples, trackers' files and the release"}
    )
    num_train_epochs: int = field(default=1, metadata={"help": "passes over the data"})
    max_steps: int = field(
        default=0, metadata={"help": "number of optimizer steps; if above 0, it overrides num_train_epochs"}
    )
    per_device_train_batch_size: int = field(default=64, metadata={"help": "images per process and forward pass"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "forward passes per optimizer step"})
    learning_rate: float = field(default=5e-4, metadata={"help": "learning rate of the tokenizer after the warm-up"})
    adam_beta1: float = field(default=0.9, metadata={"help": "beta 1 of the tokenizer's AdamW"})
    adam_beta2: float = field(default=0.95, metadata={"help": "beta 2 of the tokenizer's AdamW"})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "epsilon of the tokenizer's AdamW"})
    weight_decay: float = field(default=0.02, metadata={"help": "weight decay of parameters with 2 or more dims"})
    warmup: float = field(default=0.01, metadata={"help": "share of the steps with linear warm-up"})
    final_learning_rate: float = field(
        default=0.1, metadata={"help": "learning rate at the end of the cosine, as a share of learning_rate"}
    )
    max_grad_norm: float = field(default=10.0, metadata={"help": "gradients are clipped to this norm"})
    ema_decay: float = field(default=0.9999, metadata={"help": "decay of the average of the weights that is released"})
    ema_warmup: bool = field(
        default=True,
        metadata={"help": "limit the decay to (1 + n) / (10 + n) after n steps; false for a constant decay"},
    )
    discriminator_learning_rate: float = field(
        default=2e-5, metadata={"help": "learning rate of the discriminator after its warm-up"}
    )
    discriminator_warmup: float = field(
        default=0.03, metadata={"help": "warm-up from the GAN's start, as a share of all steps"}
    )
    discriminator_beta1: float = field(default=0.5, metadata={"help": "beta 1 of the discriminator's AdamW"})
    discriminator_beta2: float = field(default=0.9, metadata={"help": "beta 2 of the discriminator's AdamW"})
    discriminator_adam_epsilon: float = field(default=1e-6, metadata={"help": "epsilon of the discriminator's AdamW"})
    discriminator_weight_decay: float = field(
        default=0.2, metadata={"help": "weight decay of the discriminator's parameters with 2 or more dims"}
    )
    codebook_start: str = field(
        default="random",
        metadata={"help": "initial codebooks: random, or data (k-means of the first batches' features)"},
    )
    revive_dead_codes: int = field(
        default=0, metadata={"help": "steps after which unused codes are moved to features; 0 for never"}
    )
    rotation_trick: bool = field(
        default=False,
        metadata={"help": "rotate the gradient through the quantizer (rotation trick) instead of copying it"},
    )
    codebook_learning_rate: float = field(
        default=0.0,
        metadata={"help": "learning rate of the codebooks, which then have no weight decay; 0 for learning_rate"},
    )
    bf16: bool = field(
        default=True, metadata={"help": "autocast to bfloat16; weights, quantizer and losses stay float32"}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "recompute the blocks' activations in the backward pass, which saves memory"}
    )
    gradient_checkpointing_share: float = field(
        default=1.0, metadata={"help": "share of the blocks that gradient_checkpointing recomputes"}
    )
    compile: bool = field(
        default=False,
        metadata={"help": "torch.compile the encoder, decoder and discriminator; not with ZeRO-3 or FSDP"},
    )
    deepspeed: str = field(
        default="",
        metadata={"help": "DeepSpeed config to shard the tokenizer, such as training/configs/deepspeed/zero2.json"},
    )
    fsdp: bool = field(default=False, metadata={"help": "shard the tokenizer with FSDP2"})
    whole_batch_negatives: bool = field(
        default=False,
        metadata={
            "help": "compute the contrastive loss over all accumulated batches of a step, not over each one; costs one "
            "more forward pass of the two towers"
        },
    )
    use_cpu: bool = field(
        default=False,
        metadata={"help": "train on the CPU even if there is an accelerator"},
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "image-reading processes per training process"})
    seed: int = field(default=0, metadata={"help": "seed of weights, order and augmentation"})
    logging_steps: int = field(default=0, metadata={"help": "steps between logs; 0 for fifty logs in all"})
    eval_steps: int = field(
        default=1000, metadata={"help": "steps between evaluations, with grids of reconstructions"}
    )
    save_steps: int = field(default=1000, metadata={"help": "steps between checkpoints"})
    save_total_limit: int = field(default=2, metadata={"help": "number of checkpoints to keep, the newest ones"})
    resume: bool = field(default=False, metadata={"help": "resume from the newest checkpoint, if there is one"})
    report_to: list[str] = field(default_factory=list, metadata={"help": "trackers to log to: tensorboard, wandb"})

    def __post_init__(self):
        rates = {"learning_rate": ABOVE_ZERO, "beta1": BELOW_ONE, "beta2": BELOW_ONE, "adam_epsilon": (1e-30, 1)}
        rates |= {"weight_decay": WEIGHT, "warmup": SHARE}
        ranges = {f"discriminator_{name}": limits for name, limits in rates.items()}
        ranges |= {name.replace("beta", "adam_beta"): limits for name, limits in rates.items()}
        ranges |= {"final_learning_rate": SHARE, "max_grad_norm": ABOVE_ZERO, "ema_decay": BELOW_ONE}
        ranges |= {"codebook_learning_rate": WEIGHT, "revive_dead_codes": (0, 2**40)}
        ranges |= {"gradient_checkpointing_share": SHARE}
        ranges |= {
            "max_steps": (0, 2**40),
            "logging_steps": (0, 2**40),
            "dataloader_num_workers": (0, MOST_WORKERS),
            "seed": (0, 2**31),
        }
        check_arguments(self, **ranges)
        counts = ("per_device_train_batch_size", "gradient_accumulation_steps", "eval_steps")
        for name in (*counts, "save_steps", "save_total_limit", "num_train_epochs"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {vars(self)[name]}.")
        if self.codebook_start not in CODEBOOK_STARTS:
            raise ValueError(f"codebook_start must be {' or '.join(CODEBOOK_STARTS)}, got {self.codebook_start!r}.")
        if unknown := set(self.report_to) - set(TRACKERS):
            raise ValueError(f"report_to may name {' and '.join(TRACKERS)}, got {', '.join(sorted(unknown))}.")
        if self.deepspeed and self.fsdp:
            raise ValueError(f"deepspeed ({self.deepspeed}) and fsdp are alternative ways of sharding: choose one.")
        if self.fsdp and self.compile:
            raise ValueError("compile is not supported with fsdp.")

    def take_launchers(self) -> None:
        """Read the sharding from the environment variables that `accelerate launch` sets from its config file.

        Raises:
            ValueError: the config file asks for DeepSpeed without a `deepspeed_config_file`.
        """
        if os.environ.pop("ACCELERATE_USE_DEEPSPEED", "false") == "true" and not self.deepspeed:
            path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
            if path == "none":
                raise ValueError("The config of accelerate uses DeepSpeed without a deepspeed_config_file: add one.")
            self.deepspeed = path
        self.fsdp |= os.environ.pop("ACCELERATE_USE_FSDP", "false") == "true"

    def ema_decay_after(self, steps: int) -> float:
        """Return the decay of the weight average for the update that follows `steps` updates."""
        return min(self.ema_decay, (1 + steps) / (10 + steps)) if self.ema_warmup else self.ema_decay
