"""Networks that are replicated, or sharded by DeepSpeed's ZeRO (stages 1 to 3, with CPU offload) or by FSDP2.

The interface to the parameters is the same for every kind of sharding:

* `parts` returns this process's shards, for elementwise arithmetic. A running average of them is sharded as the
  weights are.
* `read` and `write` access a whole parameter, or a whole moment of its optimizer. Checkpoints store whole tensors by
  name, and can be resumed with any kind of sharding and any number of processes.

The weights always are float32; bf16 is used by autocast only. With ZeRO's own bf16, codebooks would be rounded, and
the steps of the running average would be too small to change it.
"""

import json
import os
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel


MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


class TrainedNetwork:
    """A network with its AdamW and its schedule, replicated on each process (DistributedDataParallel).

    Args:
        accelerator: accelerator of the training.
        module: network to train in place.
        build_optimizer: function of the module that builds its optimizer, after any sharding of the parameters.
        build_schedule: function of the optimizer and of `last_epoch` (as in PyTorch's schedules) that builds the
            learning-rate schedule.
        max_grad_norm: norm to which gradients are clipped.

    Attributes:
        module: the network.
        wrapped: the network for training passes.
        inference: the network for passes without gradients. If `is_sharded`, all processes must run the same number of
            them.
        optimizer: the optimizer, whose `param_groups` have the options of each group.
        schedule: the learning-rate schedule.
        updates: number of optimizer steps so far.
    """

    is_sharded = False

    def __init__(
        self,
        accelerator: Accelerator,
        module: nn.Module,
        build_optimizer: Callable[[nn.Module], AdamW],
        build_schedule: Callable[..., LambdaLR],
        max_grad_norm: float,
    ):
        self.accelerator, self.module, self.max_grad_norm = accelerator, module, max_grad_norm
        self._shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        self._build(build_optimizer)
        self._build_schedule = build_schedule
        self._start_after(0)

    def _build(self, build_optimizer: Callable[[nn.Module], AdamW]) -> None:
        self._adamw = build_optimizer(self.module)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.module, self._adamw)
        self.inference = self.module

    def _start_after(self, updates: int) -> None:
        """Set the number of updates, and the learning rates that follow them."""
        self.updates, self.schedule = updates, self._build_schedule(self._adamw, last_epoch=updates - 1)

    def backward(self, loss: torch.Tensor) -> None:
        """Backpropagate the loss of one accumulated batch."""
        self.accelerator.backward(loss)

    def update(self) -> torch.Tensor | None:
        """Clip and apply the gradients if the current batch is the last one of its step.

        Returns:
            The norm of the gradients before clipping; None for any other batch.
        """
        if not self.accelerator.sync_gradients:
            return None
        norm = self._step()
        self.schedule.step()
        self.updates += 1
        return norm

    def _step(self) -> torch.Tensor:
        norm = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _clip(self) -> torch.Tensor:
        return self.accelerator.clip_grad_norm_(self.module.parameters(), self.max_grad_norm)

    @torch.no_grad()
    def parts(self) -> dict[str, torch.Tensor]:
        """Return this process's shard of each parameter. The next pass uses what is written into it."""
        return {name: parameter.data for name, parameter in self.module.named_parameters()}

    def part_of(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Return this process's shard of a whole tensor that has the shape of the parameter `name`."""
        return value

    @torch.no_grad()
    def read(self, name: str, moment: str | None = None) -> torch.Tensor:
        """Return a whole parameter, or a whole moment of its optimizer; every process must call it.

        Args:
            name: name of the parameter.
            moment: one of `MOMENTS`, which are 0 before the first update; None for the parameter itself.
        """
        parameter = self._parameter(name)
        if moment is None:
            return parameter.data
        return self._state_of(parameter)[moment] if self.updates else torch.zeros_like(parameter)

    @torch.no_grad()
    def write(self, name: str, value: torch.Tensor, moment: str | None = None) -> None:
        """Write what `read` returns. Every process must call it with the same tensor."""
        parameter = self._parameter(name)
        (parameter.data if moment is None else self._state_of(parameter)[moment]).copy_(value)

    def clamp(self, name: str, low: float, high: float) -> None:
        """Clamp a parameter; every process must call it."""
        self._parameter(name).data.clamp_(low, high)

    def _parameter(self, name: str) -> nn.Parameter:
        return self.module.get_parameter(name)

    def _state_of(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return AdamW's state of a parameter; create it with zero moments if there was no update yet."""
        state = self.optimizer.state[parameter]
        if not state:
            state |= {"step": torch.tensor(0.0)} | {moment: torch.zeros_like(parameter) for moment in MOMENTS}
        return state

    def _whole(self, moment: str | None = None) -> dict[str, torch.Tensor]:
        named = {}
        for name, parameter in self.module.named_parameters():
            if moment is None or parameter.requires_grad:
                value = self.read(name, moment)
                if self.accelerator.is_main_process:
                    named[name] = value.detach().to("cpu", copy=True)
        return named

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Gather weights and buffers; every process must call it.

        Returns:
            Whole CPU tensors by name on the main process; an empty dict on the others.
        """
        weights = self._whole()
        persistent = self.module.state_dict().keys() if weights else ()
        return weights | {
            name: b.to("cpu", copy=True) for name, b in self.module.named_buffers() if name in persistent
        }

    def moments(self) -> dict[str, torch.Tensor]:
        """Gather the optimizer's moments as `state_dict` does, under `MOMENT.PARAMETER`; empty before an update."""
        if not self.updates:
            return {}
        return {f"{moment}.{name}": value for moment in MOMENTS for name, value in self._whole(moment).items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load weights and buffers from `state_dict`; every process must call it.

        Raises:
            KeyError: a parameter is missing.
        """
        for name, _ in self.module.named_parameters():
            self.write(name, state[name])
        buffers = dict(self.module.named_buffers())
        for name in buffers.keys() & state.keys():
            buffers[name].copy_(state[name])

    def load_optimizer(self, state: dict) -> None:
        """Load the state dict of an unsharded optimizer, which older checkpoints have."""
        self._adamw.load_state_dict(state)
        self._start_after(max((int(of_one["step"]) for of_one in self._adamw.state.values()), default=0))

    def load_moments(self, moments: Mapping[str, torch.Tensor], updates: int) -> None:
        """Load the result of `moments` after `updates` updates; every process must call it.

        Raises:
            KeyError: a moment is missing.
        """
        self._start_after(updates)
        for moment in MOMENTS if updates else ():
            for name, parameter in self.module.named_parameters():
                if parameter.requires_grad:
                    self.write(name, moments[f"{moment}.{name}"], moment)
        for state in self._adamw.state.values():
            state["step"].fill_(updates)


class ZeroNetwork(TrainedNetwork):
    """A network of which DeepSpeed shards the optimizer's moments (stage 1), the gradients (2) and the weights (3).

    Args:
        config: DeepSpeed's config, see `zero_config`.
    """

    def __init__(self, *args, config: dict, **kwargs):
        self.config, self.stage = config, config["zero_optimization"]["stage"]
        self.is_sharded = self.stage == 3
        super().__init__(*args, **kwargs)

    def _build(self, build_optimizer: Callable[[nn.Module], AdamW]) -> None:
        import deepspeed  # takes seconds

        ensure_process_group()
        give_scalars_a_dim(self.module)
        module = self.accelerator.prepare_model(self.module, evaluation_mode=True)  # autocast
        self.optimizer = self._adamw = build_optimizer(module)
        self.wrapped, self.zero, *_ = deepspeed.initialize(model=module, optimizer=self.optimizer, config=self.config)
        self.inference = self.wrapped if self.is_sharded else module
        self._make_states()

    def backward(self, loss: torch.Tensor) -> None:
        self.wrapped.backward(loss)

    def update(self) -> torch.Tensor | None:
        self.wrapped.step()  # counts the accumulated batches itself
        if not self.accelerator.sync_gradients:
            return None
        self.schedule.step()
        self.updates += 1
        return torch.as_tensor(self.wrapped.get_global_grad_norm(), device=self.accelerator.device)

    @torch.no_grad()
    def parts(self) -> dict[str, torch.Tensor]:
        if self.stage < 3:
            return super().parts()
        self.zero.empty_partition_cache()  # drop gathered copies, which a write would make stale
        return {name: parameter.ds_tensor.data for name, parameter in self.module.named_parameters()}

    def part_of(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if self.stage < 3:
            return value
        part = torch.zeros_like(self._parameter(name).ds_tensor, dtype=value.dtype)  # the last shard is padded
        first = dist.get_rank() * part.numel()
        mine = value.flatten()[first : first + part.numel()]
        part[: mine.numel()].copy_(mine)
        return part

    @torch.no_grad()
    def read(self, name: str, moment: str | None = None) -> torch.Tensor:
        from deepspeed import utils, zero

        parameter = self._parameter(name)
        if moment is not None:
            value = utils.safe_get_full_optimizer_state(parameter, moment)
        elif self.stage < 3:
            value = parameter.data
        else:
            with zero.GatheredParameters([parameter]):
                value = parameter.data.clone()
        return value.reshape(self._shapes[name])

    @torch.no_grad()
    def write(self, name: str, value: torch.Tensor, moment: str | None = None) -> None:
        from deepspeed import utils

        parameter, part = self._parameter(name), self.part_of(name, value)
        if moment is not None:
            if self.stage < 3:
                utils.safe_set_full_optimizer_state(parameter, part, moment)
            else:
                utils.safe_set_local_optimizer_state(parameter, part, moment)
            return
        self.parts()[name].copy_(part)
        if parameter.requires_grad:
            set_exact = utils.safe_set_full_fp32_param if self.stage < 3 else utils.safe_set_local_fp32_param
            set_exact(parameter, part)

    def clamp(self, name: str, low: float, high: float) -> None:
        value = self.read(name)
        if not low <= value.item() <= high:
            self.write(name, value.clamp(low, high))

    def _make_states(self) -> None:
        """Create AdamW's states of the flat partitions, which it would otherwise create in its first step.

        DeepSpeed looks for all of them after the first group's step, when those of the other groups would be missing.
        """
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if self.stage == 3:
            for partition in self.zero.fp32_partitioned_groups_flat:
                self._state_of(partition)
            return
        for parameters, partition in zip(self.zero.bit16_groups, self.zero.single_partition_of_fp32_groups):
            self._state_of(partition)
            lazy_init_hp_params_optimizer_state(parameters, partition, self.optimizer.state)


class FSDPNetwork(TrainedNetwork):
    """A network whose weights, gradients and moments are sharded by FSDP2, in one unit per block."""

    is_sharded = True

    def _build(self, build_optimizer: Callable[[nn.Module], AdamW]) -> None:
        ensure_process_group()
        give_scalars_a_dim(self.module)
        self.wrapped = self.inference = self.accelerator.prepare_model(self.module, evaluation_mode=True)  # autocast
        mesh = init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        for block in blocks_of(self.module):
            fully_shard(block, mesh=mesh)
        fully_shard(self.module, mesh=mesh)
        self._units = [part for part in self.module.modules() if isinstance(part, FSDPModule)]
        self.optimizer = self._adamw = build_optimizer(self.module)

    def backward(self, loss: torch.Tensor) -> None:
        self.module.set_requires_gradient_sync(self.accelerator.sync_gradients)
        super().backward(loss)

    def _clip(self) -> torch.Tensor:
        return nn.utils.clip_grad_norm_(self.module.parameters(), self.max_grad_norm).full_tensor()

    def _parameter(self, name: str) -> nn.Parameter:
        self._release()
        return super()._parameter(name)

    def _release(self) -> None:
        """Free the unsharded parameters that a pass without gradients leaves behind."""
        for unit in self._units:
            unit.reshard()

    @torch.no_grad()
    def parts(self) -> dict[str, torch.Tensor]:
        self._release()
        return {name: parameter.detach().to_local() for name, parameter in self.module.named_parameters()}

    def part_of(self, name: str, value: torch.Tensor) -> torch.Tensor:
        return self._shard(name, value).to_local()

    def _shard(self, name: str, value: torch.Tensor) -> DTensor:
        parameter = self._parameter(name)
        value = value.to(self.accelerator.device).reshape(parameter.shape)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)

    @torch.no_grad()
    def read(self, name: str, moment: str | None = None) -> torch.Tensor:
        return super().read(name, moment).full_tensor().reshape(self._shapes[name])

    @torch.no_grad()
    def write(self, name: str, value: torch.Tensor, moment: str | None = None) -> None:
        super().write(name, self._shard(name, value), moment)

    def _whole(self, moment: str | None = None) -> dict[str, torch.Tensor]:
        self._release()
        return super()._whole(moment)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        self._release()
        super().load_state_dict(state)


class WeightAverage:
    """Exponential moving average of a network's weights, sharded as they are. Buffers are not averaged.

    As a context manager, it exchanges the network's weights with the average, for evaluation, saving and loading.

    Args:
        network: network whose current weights are the initial average.

    Attributes:
        parts: this process's shard of each average, by the parameter's name.
    """

    def __init__(self, network: TrainedNetwork):
        self.network = network
        self.start()

    def start(self) -> None:
        """Restart the average from the network's current weights."""
        self.parts = {name: part.clone() for name, part in self.network.parts().items()}

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Update the average with the network's weights: average = decay * average + (1 - decay) * weights."""
        torch._foreach_lerp_(list(self.parts.values()), list(self.network.parts().values()), 1 - decay)

    @torch.no_grad()
    def write(self, name: str, where: torch.Tensor, value: torch.Tensor) -> None:
        """Replace elements of an average.

        Args:
            name: name of the parameter.
            where: mask of the elements to replace, in the parameter's whole shape.
            value: new values, in the same shape.
        """
        where, value = (self.network.part_of(name, tensor) for tensor in (where, value))
        self.parts[name].copy_(torch.where(where, value, self.parts[name]))

    def __enter__(self) -> None:
        """Exchange the network's weights with the average."""
        self._exchange()

    def __exit__(self, *error) -> None:
        self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, part in self.network.parts().items():
            weights = part.clone()
            part.copy_(self.parts[name])
            self.parts[name].copy_(weights)


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """List a model's blocks (transformer and convolution blocks), the units of sharding and of recomputation."""
    return [module for module in model.modules() if type(module).__name__ in model._no_split_modules]


def checkpoint_blocks(model: PreTrainedModel, share: float) -> None:
    """Recompute the activations of some of a model's blocks in the backward pass (gradient checkpointing).

    Args:
        model: model whose blocks are changed in place, see `blocks_of`.
        share: share of the blocks, in [0, 1], spread evenly over the model.
    """
    for index, block in enumerate(blocks_of(model)):
        if int((index + 1) * share) > int(index * share):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def give_scalars_a_dim(module: nn.Module) -> None:
    """Reshape scalar parameters to (1,): neither DeepSpeed nor FSDP2 supports scalars."""
    for parameter in module.parameters():
        if not parameter.ndim:
            parameter.data = parameter.data.reshape(1)


def ensure_process_group() -> None:
    """Create the process group of a single process, if no launcher has created one."""
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def zero_config(
    path: str | os.PathLike, batch_size: int, accumulation_steps: int, num_processes: int, max_grad_norm: float
) -> dict:
    """Read a DeepSpeed config, and fill in its "auto" values.

    Args:
        path: path of the JSON file.
        batch_size: samples per process in a forward pass.
        accumulation_steps: forward passes per optimizer step.
        num_processes: number of processes of the training.
        max_grad_norm: norm to which gradients are clipped.

    Returns:
        The config for `deepspeed.initialize`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a ZeRO config, or contradicts the training's own options.
    """
    with open(path, encoding="utf-8") as file:
        try:
            config = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is not a JSON file: {error}") from error
    zero = config.get("zero_optimization", {}) if isinstance(config, dict) else {}
    if zero.get("stage") not in (1, 2, 3):
        raise ValueError(f"{path}: zero_optimization.stage must be 1, 2 or 3, got {zero.get('stage')}.")
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise ValueError(f"{path}: {section} is set by the training's own options: leave this section out.")
    for section in ("bf16", "fp16"):
        if config.pop(section, {}).get("enabled", False) not in ("auto", False):
            raise ValueError(f"{path}: {section} would round the weights. They stay float32; --bf16 sets autocast.")
    for section in ("offload_param", "offload_optimizer"):
        if (device := zero.get(section, {}).get("device", "cpu")) not in ("cpu", "none"):
            raise ValueError(f"{path}: {section} to {device!r} is not supported, only to the CPU.")
    own = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "train_batch_size": batch_size * accumulation_steps * num_processes,
        "gradient_clipping": max_grad_norm,
    }
    for name, value in own.items():
        if config.get(name, "auto") not in ("auto", value):
            raise ValueError(f"{path}: {name} is {config[name]}, but the training's options say {value}.")
    return config | own | {"zero_force_ds_cpu_optimizer": False}  # the optimizer is torch's AdamW
