"""Memory per GPU (model states and activations) and communication of a training step under each kind of sharding.

- Model states of the MLLM are DeepSpeed's own estimates for its stages 2 and 3, for bf16 training with Adam: 2 bytes of weights
  and 18 of gradients and optimizer (2 + 4 + 4 + 8) for each trained parameter. It has none for stages 0 and 1; with
  the same bytes, on N GPUs: 20 P for stage 0, 4 P + 16 P / N for stage 1 (weights and 16-bit gradients on every GPU).
  A frozen parameter takes 2 bytes (over N in stage 3; in the CPU's memory with offload).
- Model states of the tokenizer are those of fp32 training with Adam: 4 bytes of weights, 4 of gradients and 8 of moments
  for each parameter; 4 more of copies (buckets of DistributedDataParallel, flat weights of ZeRO, none of FSDP2) and 4
  of the average. ZeRO-1 shards moments and copies, ZeRO-2 gradients too; ZeRO-3 and FSDP2 all, and gather one unit.
- Communication is what one GPU of N sends in an optimizer step, (N - 1) / N times: all gradients and weights twice over
  without sharding, and once each in stages 1 and 2; in stage 3 and FSDP2 the weights are gathered for the forward and
  again for the backward pass. Gradients have 4 bytes, and weights 2 (MLLM) or 4 (tokenizer).
- Activations are the bytes of all tensors that autograd keeps for the backward pass of a bf16 step, each storage once,
  parameters aside. Not in it: what kernels need for themselves, the layer that checkpointing computes again, the
  allocator's fragments and the CUDA context, for which 10% of the GPU stay free; and what autocast over fp32 weights
  keeps besides (norms in fp32), where DeepSpeed does not make the model bf16.
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
    """The amount of training, and its hardware.

    Args:
        samples: of the whole training.
        gpus: all GPUs.
        gpu_memory: GiB of one GPU.
        gpu_flops: FLOP/s of one GPU, by its data sheet (989e12: bf16 of an H100 SXM without sparsity).
        mfu: share of `gpu_flops` that the training achieves. The recomputation of gradient checkpointing counts as
            work.
        batch_per_gpu: samples in one step of one GPU.
        gpus_per_node: GPUs of one machine.

    Raises:
        ValueError: a value that is not a finite number above 0, an MFU above 1, or machines that are not full.
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
        """Compute the days of the whole training, at `flops_per_sample`."""
        return self.samples * flops_per_sample / (self.gpus * self.gpu_flops * self.mfu) / 86400


@dataclass
class StageMemory:
    """Memory under one kind of sharding, in GiB per GPU (`cpu`: per machine), and the largest batch per GPU that fits.

    `communication` is in GiB that one GPU sends in an optimizer step.
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
    """Compute the bytes of the model states on one GPU and in one machine's CPU memory; see the module's docstring.

    Args:
        stage: one of `STAGES`.
        trainable: number of trainable parameters.
        frozen: number of the other parameters.
        largest_layer: parameters of the largest single module, which stage 3 gathers.
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
    """Compute `state_bytes` of a training in fp32, see the module's docstring.

    Args:
        stage: one of `TOKENIZER_STAGES`.
        parameters: number of parameters, all of them trained.
        largest_unit: parameters of the largest part that is gathered at a time.
        average: whether there is an average of the weights.
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
    """Compute the bytes that one GPU sends in an optimizer step, see the module's docstring.

    Args:
        stage: one of `TOKENIZER_STAGES`.
        trainable: number of trainable parameters.
        frozen: number of the other parameters.
        gpus: all GPUs.
        weight_bytes: of a weight.
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
        activations: bytes of one sample.
        other: further bytes on every GPU, which are not sharded.
        average: whether an average of the weights is kept, of the tokenizer's training in fp32; None for the MLLM's.
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
