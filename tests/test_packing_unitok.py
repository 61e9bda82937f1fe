"""Packed linear layers give what the layers give, and leave the module alone."""

import pytest
import torch
from torch import nn

from unitok_mllm.packing_unitok import UniTokPackedLinear, pack_linears


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (3, 24), (2, 5, 24), (0, 24)])
def test_a_packed_layer_gives_what_the_layer_gives(shape, bias, dtype):
    linear = nn.Linear(24, 40, bias=bias).to(dtype)
    inputs = torch.randn(shape).to(dtype)
    with torch.no_grad():
        packed = pack_linears(linear, min_weights=0)
        assert isinstance(packed, UniTokPackedLinear)
        torch.testing.assert_close(packed(inputs), linear(inputs))


def test_everything_but_the_linear_layers_is_shared_and_the_module_stays_as_it_is():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(nn.Sequential(shared, nn.LayerNorm(8)), nn.Dropout(), shared).eval()
    before = dict(model.named_modules())
    packed = pack_linears(model, min_weights=0)
    assert dict(model.named_modules()) == before
    assert packed[0][0] is packed[2] and isinstance(packed[2], UniTokPackedLinear)
    assert packed[0][1] is model[0][1] and packed[1] is model[1]
    inputs = torch.randn(3, 8)
    torch.testing.assert_close(packed(inputs), model(inputs))
    with torch.no_grad():
        shared.weight.zero_()  # no change reaches a packed copy; the next one has it
    assert packed(inputs).std() > 0
    torch.testing.assert_close(pack_linears(model, min_weights=0)(inputs), model(inputs))


def test_small_layers_are_left_alone():
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 255))
    packed = pack_linears(model)
    assert isinstance(packed[0], UniTokPackedLinear) and packed[1] is model[1]


def test_what_cannot_be_packed_is_left_alone():
    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda module, args, output: output + 1)
    for module in (
        hooked,
        nn.Linear(4, 4).half(),
        nn.Linear(4, 4, device="meta"),
        nn.Conv2d(3, 4, 1),
        nn.LayerNorm(4),
    ):
        assert pack_linears(module, min_weights=0) is module
    with torch.autocast("cpu", torch.bfloat16):
        linear = nn.Linear(4, 4)
        assert pack_linears(linear, min_weights=0) is linear
