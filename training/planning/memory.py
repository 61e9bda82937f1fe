"""Memory per GPU (model states and activations) and communication of a training step under each kind of sharding.

Model states of the MLLM, in bf16 training with Adam, for P trained parameters on N GPUs:

- Stages 2 and 3 are DeepSpeed's own estimates: each trained parameter takes 2 bytes of weights and 18 of gradients and
  optimizer states (2 + 4 + 4 + 8).
- DeepSpeed has no estimate for stages 0 and 1. With the same bytes, stage 0 takes 20 P; stage 1 takes 4 P (weights and
  16-bit gradients) + 16 P / N.
- A frozen parameter takes 2 bytes. Stage 3 divides them by N; with offload they lie in the CPU's memory.

Model states of the tokenizer, in fp32 training with Adam: a parameter takes 4 bytes of weights, 4 of gradients, 8 of
moments, 4 of the running average, and 4 of copies (DistributedDataParallel's buckets or ZeRO's flat weights; FSDP2 has
none). ZeRO-1 shards moments and copies, and ZeRO-2 also gradients. ZeRO-3 and FSDP2 shard everything and gather one
unit at a time.

Communication is what one GPU of N sends in an optimizer step. Each of these amounts is sent (N - 1) / N times:

- Without sharding, all gradients are sent twice (a reduce-scatter and an all-gather).
- In stages 1 and 2, gradients and weights are sent once each.
- In stage 3 and FSDP2, the weights are also gathered again for the backward pass.

Gradients have 4 bytes, weights 2 (MLLM) or 4 (tokenizer).

Activations are all tensors that autograd keeps for the backward pass of a bf16 step, each storage once, without
parameters. Not counted are the workspace of kernels, the layer that checkpointing recomputes, the allocator's
fragments and the CUDA context (10% of the GPU stay free for them), and the fp32 tensors (norms) that autocast keeps
where DeepSpeed does not convert the model to bf16.
"""

import math
from dataclasses import dataclass

from torch import nn

from training.planning.counting import count_parameters


GIB = 2**30
USABLE_MEMORY = 0.9
STAGES = ("0", "1", "2", "3", "3, offload")
TOKENIZER_STAGES = (*STAGES, "FSDP2")


@dataclass
class Run:
    """Amount of training, and its hardware.

    Args:
        samples: number of samples in the whole training.
        gpus: total number of GPUs.
        gpu_memory: memory of one GPU, in GiB.
        gpu_flops: peak FLOP/s of one GPU by its data sheet (989e12: bf16 of an H100 SXM without sparsity).
        mfu: share of `gpu_flops` that training reaches. The recomputation of gradient checkpointing counts as work.
        batch_per_gpu: samples per GPU and step.
        gpus_per_node: GPUs per machine; at most `gpus`.

    Raises:
        ValueError: a value is not a finite number above 0, the MFU is above 1, or `gpus` do not fill the machines.
    """

    samples: float
    gpus: int
    gpu_memory: float = 80.0
    gpu_flops: float = 989e12
    mfu: float = 0.4
    batch_per_gpu: int = 1
    gpus_per_node: int = 8

    def __post_init__(self):
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number above 0, got {value}.")
        if self.mfu > 1:
            raise ValueError(f"mfu is a share, at most 1, got {self.mfu}.")
        self.gpus_per_node = min(self.gpus_per_node, self.gpus)
        if self.gpus % self.gpus_per_node:
            raise ValueError(f"gpus ({self.gpus}) is not a multiple of gpus_per_node ({self.gpus_per_node}).")

    def days(self, flops_per_sample: float) -> float:
        """Compute the duration of the whole training, in days."""
        return self.samples * flops_per_sample / (self.gpus * self.gpu_flops * self.mfu) / 86400


@dataclass
class StageMemory:
    """Memory and communication under one kind of sharding.

    Attributes:
        stage: one of `TOKENIZER_STAGES`.
        states: model states of a GPU, in GiB.
        activations: activations of a GPU, in GiB.
        total: sum of both.
        cpu: model states in the CPU's memory of one machine, in GiB.
        communication: GiB that one GPU sends in an optimizer step.
        fits: whether the total fits into the GPU.
        largest_batch: number of samples per GPU that would fit.
    """

    stage: str
    states: float
    activations: float
    total: float
    cpu: float
    communication: float
    fits: bool
    largest_batch: int


def state_bytes(
    stage: str, trainable: int, frozen: int, largest_layer: int, gpus: int, gpus_per_node: int
) -> tuple[int, int]:
    """Compute the bytes of the MLLM's model states; see the module's docstring.

    Args:
        stage: one of `STAGES`.
        trainable: number of trained parameters.
        frozen: number of the other parameters.
        largest_layer: number of parameters of the largest single module, which stage 3 gathers.
        gpus: total number of GPUs.
        gpus_per_node: GPUs per machine.

    Returns:
        The bytes on one GPU, and in the CPU's memory of one machine.
    """
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    machines = {"num_gpus_per_node": gpus_per_node, "num_nodes": gpus // gpus_per_node}
    if stage in ("0", "1", "2"):
        cpu, gpu = estimate_zero2_model_states_mem_needs(trainable, cpu_offload=False, **machines)
        if stage == "0":
            gpu = 20 * trainable
        elif stage == "1":
            gpu = 4 * trainable + 16 * trainable // gpus
        return gpu + 2 * frozen, cpu
    offload = stage == "3, offload"
    cpu, gpu, _ = estimate_zero3_model_states_mem_needs(
        trainable, largest_layer, cpu_offload=offload, cpu_offload_params=offload, **machines
    )
    share = 2 * frozen // gpus
    return (gpu, cpu + share * gpus_per_node) if offload else (gpu + share, cpu)


def float32_state_bytes(
    stage: str, parameters: int, largest_unit: int, gpus: int, gpus_per_node: int, average: bool
) -> tuple[int, int]:
    """Compute the bytes of the tokenizer's model states; see the module's docstring.

    Args:
        stage: one of `TOKENIZER_STAGES`.
        parameters: number of parameters, all of them trained.
        largest_unit: number of parameters of the largest part that is gathered at a time.
        gpus: total number of GPUs.
        gpus_per_node: GPUs per machine.
        average: whether a running average of the weights is kept.

    Returns:
        The bytes on one GPU, and in the CPU's memory of one machine.
    """
    weights = gradients = copies = 4 * parameters
    moments, kept = 8 * parameters, 4 * parameters * average
    gathered = 8 * largest_unit  # its weights and gradients
    whole, sharded = {
        "0": (weights + gradients + copies + moments + kept, 0),
        "1": (weights + gradients + kept, copies + moments),
        "2": (weights + kept, gradients + copies + moments),
        "3": (gathered, weights + gradients + copies + moments + kept),
        "3, offload": (gathered, weights + gradients + copies + moments + kept),
        "FSDP2": (gathered, weights + gradients + moments + kept),
    }[stage]
    if stage == "3, offload":
        return whole, sharded // gpus * gpus_per_node
    return whole + sharded // gpus, 0


def communication_bytes(stage: str, trainable: int, frozen: int, gpus: int, weight_bytes: int) -> float:
    """Compute the bytes that one GPU sends in an optimizer step; see the module's docstring.

    Args:
        stage: one of `TOKENIZER_STAGES`.
        trainable: number of trained parameters.
        frozen: number of the other parameters.
        gpus: total number of GPUs.
        weight_bytes: bytes of a weight.
    """
    if stage == "0":
        sent = 2 * 4 * trainable
    elif stage in ("1", "2"):
        sent = (4 + weight_bytes) * trainable
    else:
        sent = 4 * trainable + 2 * weight_bytes * (trainable + frozen)
    return sent * (gpus - 1) / gpus


def plan_memory(
    model: nn.Module, run: Run, activations: float, other: float = 0.0, average: bool | None = None
) -> list[StageMemory]:
    """Compute the memory and the communication of every stage.

    Args:
        model: the model; only its parameters' sizes matter.
        run: amount of training, and its hardware.
        activations: bytes of activations of one sample.
        other: further bytes on every GPU, which are not sharded.
        average: whether the tokenizer's training keeps a running average of the weights; None for the MLLM's training.
    """
    total, trainable = count_parameters(model)
    largest = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())
    rows = []
    for stage in STAGES if average is None else TOKENIZER_STAGES:
        if average is None:
            states, cpu = state_bytes(stage, trainable, total - trainable, largest, run.gpus, run.gpus_per_node)
        else:
            states, cpu = float32_state_bytes(stage, total, largest, run.gpus, run.gpus_per_node, average)
        sent = communication_bytes(stage, trainable, total - trainable, run.gpus, 2 if average is None else 4)
        states += other
        usable = USABLE_MEMORY * run.gpu_memory * GIB
        needed = states + run.batch_per_gpu * activations
        rows.append(
            StageMemory(
                stage,
                states / GIB,
                run.batch_per_gpu * activations / GIB,
                needed / GIB,
                cpu / GIB,
                sent / GIB,
                needed <= usable,
                max(0, int((usable - states) // activations)),
            )
        )
    return rows
