"""Linear layers in oneDNN's layout give the same results as before, and the original module is unchanged."""

import peft
import pytest
import torch
from torch import nn

from unitok_mllm import fast_drawing_unitok
from unitok_mllm.packing_unitok import UniTokPackedLinear, pack_linears


NO_BF16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN computes bfloat16 from AVX-512 on"
)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=NO_BF16)])
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


def test_whatever_reads_a_layers_weight_finds_it():
    linear = nn.Linear(24, 40)
    packed = pack_linears(linear, min_weights=0)
    assert packed.weight is linear.weight and packed.bias is linear.bias
    assert (packed.in_features, packed.out_features) == (24, 40) and isinstance(packed, nn.Linear)
    assert packed.state_dict().keys() == linear.state_dict().keys()


LAYERS = r"language_model\..*_proj"
ADAPTERS = {
    "LoRA": peft.LoraConfig(target_modules=LAYERS),
    "DoRA": peft.LoraConfig(target_modules=LAYERS, use_dora=True),
    "rsLoRA": peft.LoraConfig(target_modules=LAYERS, use_rslora=True),
    "PiSSA": peft.LoraConfig(target_modules=LAYERS, init_lora_weights="pissa"),
    "AdaLoRA": peft.AdaLoraConfig(target_modules=LAYERS, total_step=10),
    "IA3": peft.IA3Config(target_modules=LAYERS, feedforward_modules=r".*down_proj"),
    "LoHa": peft.LoHaConfig(target_modules=LAYERS),
    "LoKr": peft.LoKrConfig(target_modules=LAYERS),
    "OFT": peft.OFTConfig(target_modules=LAYERS, oft_block_size=8),
    "BOFT": peft.BOFTConfig(target_modules=LAYERS, boft_block_size=8),
    "HRA": peft.HRAConfig(target_modules=LAYERS),
    "VeRA": peft.VeraConfig(target_modules=r".*(gate|up)_proj"),  # layers of one shape
    "FourierFT": peft.FourierFTConfig(target_modules=LAYERS, n_frequency=16),
    "MiSS": peft.MissConfig(target_modules=LAYERS, r=8),
    "RandLoRA": peft.RandLoraConfig(target_modules=LAYERS),
    "RoAd": peft.RoadConfig(target_modules=LAYERS, group_size=8),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_model_with_an_adapter_draws_the_codes_of_its_plain_layers(lively_mllm, processor, adapter, monkeypatch):
    model = peft.get_peft_model(lively_mllm, ADAPTERS[adapter]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))  # an adapter that does something
    inputs = processor(text="a red circle", generation_mode="image")
    packed = []

    def pack(module):
        packed.append(pack_linears(module, min_weights=0))
        return packed[-1]

    def draw(pack):
        monkeypatch.setattr(fast_drawing_unitok, "pack_linears", pack)
        return model.generate(**inputs, generation_mode="image", do_sample=False)

    assert torch.equal(draw(pack), draw(lambda module: module))
    assert any(isinstance(module, UniTokPackedLinear) for module in packed[0].modules())
