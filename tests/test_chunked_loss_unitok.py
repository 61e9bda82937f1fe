"""Losses in chunks: they and their gradients equal those of the whole."""

import copy

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_layers import GradientCheckpointingLayer

from unitok_mllm.chunked_loss_unitok import loss_in_chunks


ONCE = "The gradient of a loss in chunks can be computed only once."


class Tower(nn.Module):
    """A table and a frozen layer around a trained one, with a layer that no input reaches."""

    def __init__(self):
        super().__init__()
        self.table, self.frozen, self.head = nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7)
        self.idle = nn.Linear(5, 5)
        self.frozen.requires_grad_(False)

    def loss(self, states, targets):
        logits = self.head(torch.tanh(self.frozen(states + self.table(targets.roll(1, dims=-1)))))
        return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="sum")


def gradients(module, states, targets, chunk_size, factor=3.0):
    """The loss, and the gradients of `factor` times it."""
    module, states = copy.deepcopy(module), states.detach().clone().requires_grad_(states.requires_grad)
    loss = loss_in_chunks(module, module.loss, states, targets, chunk_size)
    (factor * loss).backward()
    return loss.detach(), {"states": states.grad} | {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("trained", ["both", "states", "module"])
@pytest.mark.parametrize("chunk_size", [1, 4, 10, 100])
def test_loss_and_gradients_are_those_of_the_whole(trained, chunk_size):
    module = Tower().requires_grad_(trained != "states")
    states, targets = torch.randn(10, 3, 5, requires_grad=trained != "module"), torch.randint(7, (10, 3))
    loss, grads = gradients(module, states, targets, chunk_size)
    whole = module.loss(states, targets)
    (3 * whole).backward()
    expected = {"states": states.grad} | {name: p.grad for name, p in module.named_parameters()}
    torch.testing.assert_close(loss, whole.detach(), rtol=1e-6, atol=0)
    assert {name for name, grad in grads.items() if grad is None} == {n for n, g in expected.items() if g is None}
    for name, grad in expected.items():
        if grad is not None:
            torch.testing.assert_close(grads[name], grad, rtol=1e-5, atol=1e-6, msg=name)


def test_a_flop_counter_counts_the_chunks():
    module, states, targets = Tower().head, torch.randn(10, 5, requires_grad=True), torch.randint(7, (10,))

    def loss_of(states, targets):
        return F.cross_entropy(module(states), targets, reduction="sum")

    with FlopCounterMode(display=False) as counter:
        loss_in_chunks(module, loss_of, states, targets, 4).backward()
    assert counter.get_total_flops() == 3 * 2 * 10 * 5 * 7  # forward, and backward to states and weights


def test_under_autocast_the_gradients_are_those_of_the_whole_up_to_its_rounding():
    module, states, targets = Tower(), torch.randn(10, 3, 5, requires_grad=True), torch.randint(7, (10, 3))
    with torch.autocast("cpu", torch.bfloat16):
        loss, grads = gradients(module, states, targets, 4)
        whole, expected = gradients(module, states, targets, 10)
    torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)
    for name in ("states", "head.weight", "table.weight"):
        torch.testing.assert_close(grads[name], expected[name], rtol=2e-2, atol=2e-2, msg=name)


def test_without_gradients_the_chunks_add_up():
    module, states, targets = Tower(), torch.randn(10, 3, 5), torch.randint(7, (10, 3))
    with torch.no_grad():
        torch.testing.assert_close(
            loss_in_chunks(module, module.loss, states, targets, 3), module.loss(states, targets)
        )
    module.requires_grad_(False)
    assert not loss_in_chunks(module, module.loss, states, targets, 3).requires_grad


def test_a_second_backward_pass_is_refused():
    module, states = Tower(), torch.randn(10, 5, requires_grad=True)
    loss = loss_in_chunks(module, module.loss, states, torch.randint(7, (10,)), 3)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=ONCE):
        loss.backward()


class Training(nn.Module):
    """The loss as the output of a module, as DDP needs it."""

    def __init__(self, tower):
        super().__init__()
        self.tower = tower

    def forward(self, states, targets):
        return loss_in_chunks(self.tower, self.tower.loss, states, targets, 3)


def test_ddp_gets_every_gradient():
    tower, states, targets = Tower(), torch.randn(10, 3, 5), torch.randint(7, (10, 3))
    tower.idle.requires_grad_(False)
    expected = gradients(tower, states, targets, 100, factor=1.0)[1]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(Training(tower))
        for _ in range(2):  # a second pass fails if the first has left a gradient out
            tower.zero_grad()
            parallel(states, targets).backward()
    finally:
        dist.destroy_process_group()
    for name in ("head.weight", "head.bias", "table.weight"):
        torch.testing.assert_close(tower.get_parameter(name).grad, expected[name], rtol=1e-5, atol=1e-6)


class Layer(GradientCheckpointingLayer):
    pass


@pytest.mark.parametrize("why", ["hook", "bfloat16", "checkpointing"])
def test_chunks_are_left_out_where_they_are_not_exact_or_save_nothing(why):
    module, states = Tower(), torch.randn(10, 5, requires_grad=True)
    if why == "hook":
        module.head.register_forward_hook(lambda *args: None)
    elif why == "bfloat16":
        module.bfloat16()
        states = states.detach().bfloat16().requires_grad_()
    else:
        module.layer = Layer()
        module.layer.gradient_checkpointing = True
    loss = loss_in_chunks(module, module.loss, states, torch.randint(7, (10,)), 3)
    loss.backward(retain_graph=True)
    loss.backward()  # an ordinary graph
