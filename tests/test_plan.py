"""The training planner against hand computations, DeepSpeed's estimators and real steps; DeepSpeed configs; launchers."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, TrainingArguments
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config
from typer.testing import CliRunner

from training import plan
from training.planning.check import check_training
from training.planning.counting import Cost, count_parameters, list_parts, measure, without_values
from training.planning.memory import (
    STAGES,
    TOKENIZER_STAGES,
    Run,
    communication_bytes,
    float32_state_bytes,
    plan_memory,
    state_bytes,
)
from training.planning.trainings import (
    TOKENIZER_PARTS,
    mllm_batch,
    mllm_loss,
    plan_mllm,
    plan_tokenizer,
    tokenizer_batch,
    tokenizer_loss,
)
from unitok_mllm import UniTokConfig, UniTokMLLMForConditionalGeneration, UniTokModel


ROOT = Path(plan.__file__).parent.parent
ZERO = ROOT / "training" / "configs" / "deepspeed"
RUN = Run(samples=1e6, gpus=8)


@pytest.fixture
def folder(mllm, tmp_path) -> str:
    """The config of a tiny MLLM."""
    mllm.config.save_pretrained(tmp_path / "mllm")
    return str(tmp_path / "mllm")


def run_cli(*args):
    return CliRunner().invoke(plan.app, [str(arg) for arg in args])


# parameters


def test_large_tokenizer_has_its_known_parameters():
    large = without_values(lambda: UniTokModel(UniTokConfig.preset("large")))
    parts = list_parts(large, TOKENIZER_PARTS, Cost(0, 0, 0, {}))
    assert count_parameters(large) == (820_297_668, 820_297_668)
    assert sum(part.parameters for part in parts) == 820_297_668 - 1  # the logit scale
    assert {part.name: round(part.parameters / 1e6, 1) for part in parts} == {
        "encoder": 332.3,
        "quantizer and projections": 11.1,
        "image embedding": 0.8,
        "decoder": 352.4,
        "text tower": 123.7,
    }


@pytest.fixture(scope="module")
def seven_billion():
    return plan_mllm("llama-2-7b", "large", RUN, text_length=128)


def test_llama_and_its_depth_head(seven_billion):
    llm, embedder, depth, visual = seven_billion.parts
    assert llm.parameters == llm.trainable == 6_738_415_616
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert depth.parameters == 3 * layer + 4096 + 7 * 4096 * 4096 + (4096 + 1) * 4096
    assert (visual.parameters, visual.trainable) == (820_297_668, 0)
    assert embedder.trainable == embedder.parameters  # its codebooks are a buffer


def test_llm_flops_are_those_of_the_hand_formula(seven_billion):
    llm, _, depth, _ = seven_billion.parts
    positions, width, layers = 128 + 258, 4096, 32
    matrices = llm.parameters - 32000 * width - (2 * layers + 1) * width  # without embeddings and norms
    assert llm.forward == 2 * matrices * positions + layers * 4 * positions**2 * width
    assert 3 * llm.forward == pytest.approx(6 * matrices * positions, rel=0.02)  # 6 N T has no attention: 1.5% here
    matrices = depth.parameters - 7 * 4096 * width - 7 * width - 4096
    assert depth.forward == 256 * (2 * matrices * 8 + 3 * 4 * 8**2 * width)
    assert seven_billion.step_flops == pytest.approx(3 * seven_billion.forward_flops, rel=1e-3)


def test_shared_weights_are_counted_once(llama_config):
    llama_config.tie_word_embeddings = True
    real, abstract = LlamaForCausalLM(llama_config), without_values(lambda: LlamaForCausalLM(llama_config))
    assert count_parameters(abstract) == count_parameters(real)
    assert abstract.lm_head.weight is abstract.model.embed_tokens.weight


# FLOPs and activations


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_convolutions_gradients_take_twice_its_flops(kind, groups):
    layer, images = kind(8, 8, 3, groups=groups), torch.rand(2, 8, 9, 9, requires_grad=True)
    cost = measure(lambda: layer(images).sum(), layer, batch=2)
    places = 7**2 if kind is nn.Conv2d else 9**2
    assert cost.forward == 2 * places * 8 * (8 // groups) * 3**2
    assert cost.backward == 2 * cost.forward
    assert measure(lambda: layer(images.detach()).sum(), layer, batch=2).backward == cost.forward


def test_activations_are_what_autograd_keeps():
    model = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 2))
    cost = measure(lambda: model(torch.rand(3, 4)).sum(), model, batch=3)
    assert cost.activations == 4 * (4 + 16 + 16)  # inputs of each layer, in fp32
    assert (cost.forward, cost.backward) == (2 * (4 * 16 + 16 * 2), 2 * (4 * 16 + 2 * 16 * 2))


def test_prediction_equals_a_real_step_of_the_tokenizer(tokenizer_config):
    inputs = tokenizer_batch(tokenizer_config, 2)
    real, abstract = (
        UniTokModel(tokenizer_config).train(),
        without_values(lambda: UniTokModel(tokenizer_config)).train(),
    )
    counted = measure(lambda: tokenizer_loss(real, inputs), real, 2)
    assert measure(lambda: tokenizer_loss(abstract, inputs), abstract, 2) == counted
    assert 0 < counted.forward < counted.backward


@pytest.mark.parametrize(("images", "drawn"), [(0, 0), (1, 0), (1, 1), (2, 1)])
def test_prediction_equals_a_real_step_of_the_mllm(mllm, images, drawn):
    inputs = mllm_batch(mllm.config, 2, 5, images, drawn)
    abstract = without_values(lambda: UniTokMLLMForConditionalGeneration(mllm.config)).train()
    predicted = measure(lambda: mllm_loss(abstract, inputs), abstract, 2)
    counted = measure(lambda: mllm.train()(**inputs).loss, mllm, 2)
    assert (predicted.forward, predicted.backward) == (counted.forward, counted.backward)
    assert predicted.activations == pytest.approx(
        counted.activations, rel=0.05
    )  # masks and picked positions come on top


def test_check_runs_what_it_predicts(tokenizer_config):
    check = check_training(
        "name",
        lambda: UniTokModel(tokenizer_config),
        tokenizer_loss,
        tokenizer_loss,
        lambda size: tokenizer_batch(tokenizer_config, size),
        batch=2,
        steps=1,
    )
    assert check.predicted_flops == check.counted_flops > 0
    assert check.achieved_flops == pytest.approx(check.predicted_flops / check.seconds)
    assert check.mfu > 0
    parameters = count_parameters(UniTokModel(tokenizer_config))[0]
    assert check.predicted_states == 16 * parameters / 2**20


def test_checkpointing_trades_computation_for_memory(folder):
    plain, frugal = (plan_mllm(folder, folder, RUN, 100, gradient_checkpointing=g) for g in (False, True))
    again = frugal.step_flops - plain.step_flops
    layers = plain.parts[0].forward + plain.parts[2].forward  # the LLM's and the depth head's
    # a forward pass of them, short of their output matrices and of what follows the last tensor that is needed
    assert 0.5 * layers < again < layers
    assert frugal.memory[0].activations < 0.7 * plain.memory[0].activations
    assert frugal.memory[0].states == plain.memory[0].states


@pytest.mark.full
def test_tokenizers_losses_are_counted_on_top(folder, tokenizer_config):
    bare = plan_tokenizer(folder, RUN, perceptual=False, gan=False, ema=False)
    full = plan_tokenizer(folder, RUN, gan_start=0.25)
    vgg, discriminator = full.parts[-2:]
    assert full.parts[:-2] == bare.parts
    assert sum(part.forward for part in bare.parts) == pytest.approx(bare.forward_flops, rel=1e-3)
    # a little less than three times: the upsampling kernels are sums of weights, and the sums are no parameters
    assert bare.step_flops == pytest.approx(3 * bare.forward_flops, rel=0.04)
    assert vgg.trainable == 0 and vgg.parameters == 14_714_688 + 1472  # VGG-16's convolutions, LPIPS's weights
    assert vgg.forward == pytest.approx(2 * 2 * 15.35e9 * (48 / 224) ** 2, rel=0.01)  # two images, 15.35 GMAC at 224
    assert vgg.step == pytest.approx(1.5 * vgg.forward, rel=0.01)
    assert discriminator.trainable == 5 * (384 * 384 * 10 + 2 * 3 * 384 + 384 + 1)  # heads; DINOv2 itself is frozen
    assert discriminator.parameters - discriminator.trainable == pytest.approx(21.6e6, rel=0.01)
    assert full.step_flops == pytest.approx(bare.step_flops + vgg.step + 0.75 * discriminator.step)
    assert bare.memory[0].activations < full.memory[0].activations
    frozen = vgg.parameters + discriminator.parameters - discriminator.trainable
    other = (
        4 * count_parameters(UniTokModel(tokenizer_config))[0] / RUN.gpus + 4 * frozen + 16 * discriminator.trainable
    )
    assert full.memory[3].states - bare.memory[3].states == pytest.approx(other / 2**30)


# what is trained


def test_frozen_parts_cost_less(folder):
    everything = plan_mllm(folder, folder, RUN, 40)
    align = plan_mllm(folder, folder, RUN, 40, trainable=("embedder",))
    assert [part.trainable > 0 for part in align.parts] == [False, True, False, False]
    assert align.forward_flops == everything.forward_flops
    assert everything.step_flops == pytest.approx(3 * align.forward_flops, rel=0.02)
    # backward through the frozen LLM to its inputs, but no gradient of its weights
    assert 2 * align.forward_flops < align.step_flops < 2.3 * align.forward_flops
    assert align.memory[0].states < 0.6 * everything.memory[0].states


def test_lora_trains_its_adapters_alone(folder, llama_config):
    adapted = plan_mllm(folder, folder, RUN, 40, trainable=("embedder",), lora_rank=4)
    adapters = 2 * 4 * ((64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 96))  # of two layers
    assert adapted.parts[0].trainable == adapters
    assert adapted.parts[0].parameters == count_parameters(LlamaForCausalLM(llama_config))[0] + adapters


def test_codes_made_online_cost_the_encoders_forward(folder, visual_tokenizer):
    stored, online = (plan_mllm(folder, folder, RUN, 40, online_codes=o) for o in (False, True))
    tower, pixels = visual_tokenizer.vision_model, torch.zeros(1, 3, 48, 48)
    encoder = measure(lambda: tower.encode_features(pixels), tower, 1).forward
    assert online.parts[-1].forward == online.parts[-1].step == encoder > 0
    assert online.forward_flops == stored.forward_flops + encoder
    assert online.step_flops == stored.step_flops + encoder


# memory


def test_states_are_deepspeeds_own_estimates():
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    p, layer = 7_000_000_000, 131_072_000
    cpu, gpu = estimate_zero2_model_states_mem_needs(p, 8, 4, cpu_offload=False)
    assert state_bytes("2", p, 0, layer, 32, 8) == (gpu, cpu)
    for stage, offload in (("3", False), ("3, offload", True)):
        cpu, gpu, _ = estimate_zero3_model_states_mem_needs(p, layer, 8, 4, offload, offload)
        assert state_bytes(stage, p, 0, layer, 32, 8) == (gpu, cpu)


def test_states_scale_with_the_stage_and_the_gpus():
    p, layer = 10**9, 10**7
    alone = [state_bytes(stage, p, 0, layer, 1, 1)[0] for stage in STAGES]
    assert alone == [20 * p, 20 * p, 20 * p, 18 * p + 4 * layer, 4 * layer]
    many = [state_bytes(stage, p, 0, layer, 64, 8)[0] for stage in STAGES]
    assert many == [20 * p, 4 * p + 16 * p // 64, 2 * p + 18 * p // 64, 18 * p // 64 + 4 * layer, 4 * layer]


def test_states_of_the_tokenizer_stay_float32_under_every_sharding():
    p, unit = 10**9, 10**7
    alone, many = (
        [float32_state_bytes(stage, p, unit, gpus, min(gpus, 8), average=True) for stage in TOKENIZER_STAGES]
        for gpus in (1, 64)
    )
    assert alone == [(24 * p, 0)] * 3 + [(24 * p + 8 * unit, 0), (8 * unit, 24 * p), (20 * p + 8 * unit, 0)]
    sharded = [(12 * p + 12 * p // 64, 0), (8 * p + 16 * p // 64, 0), (24 * p // 64 + 8 * unit, 0)]
    assert many == [(24 * p, 0), *sharded, (8 * unit, 24 * p // 8), (20 * p // 64 + 8 * unit, 0)]


def test_communication_grows_with_the_stage():
    sent = [communication_bytes(stage, 10, 2, gpus=4, weight_bytes=2) for stage in TOKENIZER_STAGES]
    assert sent == [60, 45, 45, 66, 66, 66]
    assert communication_bytes("3", 10, 2, gpus=1, weight_bytes=2) == 0


def test_frozen_parameters_take_their_weights_alone():
    grown = [
        (a - b, c - d)
        for (a, c), (b, d) in (
            (state_bytes(s, 10**9, 8 * 10**6, 0, 8, 4), state_bytes(s, 10**9, 0, 0, 8, 4)) for s in STAGES
        )
    ]
    assert grown == [(16 * 10**6, 0)] * 3 + [(2 * 10**6, 0), (0, 8 * 10**6)]


def test_what_fits():
    model = nn.Linear(2**14, 2**14, bias=False, device="meta")  # 2^28 parameters: 5 GiB of states in stage 0
    rows = plan_memory(model, Run(1, 4, gpu_memory=10, batch_per_gpu=8), activations=2**29, other=2**28)
    zero, one = rows[:2]
    assert (zero.states, zero.activations, zero.total, zero.fits) == (5.25, 4, 9.25, False)
    assert zero.largest_batch == 7  # 90% of 10 GiB is 5.25 GiB and 7.5 times 0.5 GiB
    assert (one.states, one.total, one.fits) == (1 + 1 + 0.25, 6.25, True)
    assert one.largest_batch == 13


def test_the_first_stage_that_fits_is_named(seven_billion):
    assert [row.fits for row in seven_billion.memory] == [False, True, True, True, True]
    assert seven_billion.stage == "1"


# days


def test_days_are_exact():
    assert (
        Run(samples=3e9, gpus=16, gpu_flops=1e15, mfu=0.25).days(1.152e12) == 3e9 * 1.152e12 / (16 * 0.25e15) / 86400
    )
    assert Run(samples=86400, gpus=2, gpu_flops=1e12, mfu=0.5, gpus_per_node=1).days(1e12) == 1.0


# errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpus": 0}, "gpus must be a finite number above 0, got 0"),
        ({"gpus": 12}, r"gpus \(12\) is not a multiple of gpus_per_node \(8\)"),
        ({"samples": -1}, "samples must be a finite number above 0, got -1"),
        ({"samples": float("nan")}, "samples .* got nan"),
        ({"gpu_flops": float("inf")}, "gpu_flops .* got inf"),
        ({"mfu": 1.5}, "mfu is a share, at most 1, got 1.5"),
        ({"batch_per_gpu": 0}, "batch_per_gpu .* got 0"),
    ],
)
def test_absurd_runs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Run(**{"samples": 1e6, "gpus": 8} | change)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan_tokenizer("huge", RUN), "Unknown preset 'huge'"),
        (lambda: plan_tokenizer("tiny", RUN, gan_start=2), "gan_start .* got 2"),
        (lambda: plan_mllm("llama-9", "tiny", RUN, 8), "Unknown LLM 'llama-9': .*llama-2-7b"),
        (lambda: plan_mllm("llama-2-7b", "huge", RUN, 8), "Unknown preset 'huge'"),
        (lambda: plan_mllm("llama-2-7b", "tiny", RUN, 0), "text_length 0"),
        (lambda: plan_mllm("llama-2-7b", "tiny", RUN, 8, images=1, drawn=2), "images 1, drawn 2"),
        (lambda: plan_mllm("llama-2-7b", "tiny", RUN, 8, trainable=("visual",)), "unknown parts visual"),
    ],
)
def test_unknown_names_and_numbers_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# command line


def test_command_line_prints_and_writes_the_plan(folder, tmp_path):
    options = ("--samples", 1e7, "--gpus", 4, "--mfu", 0.5, "--gpu-flops", 1e14, "--text-length", 40)
    result = run_cli("mllm", "--llm", folder, "--visual", folder, *options, "--json", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert written["days"] == 1e7 * written["step_flops"] / (4 * 1e14 * 0.5) / 86400
    assert written["run"]["gpus_per_node"] == 4 and len(written["memory"]) == 5
    assert f"{written['days']:.3g} days = 1e+07 samples" in result.output
    assert (
        f"| one sample       |               |            | {written['forward_flops'] / 1e9:15,.1f} |" in result.output
    )


def test_other_sizes_than_a_presets_are_planned(tmp_path):
    sizes = {"image_size": 128, "num_codebooks": 4, "codebook_size": 1024, "hidden_size": 128}
    own = UniTokConfig.preset("tiny", **sizes)
    own.save_pretrained(tmp_path / "own")
    options = ("--samples", 1e6, "--gpus", 8, "--no-gan", "--no-perceptual", "--batch-per-gpu", 1)
    plan_file = tmp_path / "plan.json"
    changes = ("--vision-overrides", json.dumps(sizes))
    result = run_cli("tokenizer", *options, "--preset", "tiny", *changes, "--json", plan_file)
    assert result.exit_code == 0, result.output
    parts = json.loads(plan_file.read_text(encoding="utf-8"))["parts"]
    total, _ = count_parameters(without_values(lambda: UniTokModel(own)))
    assert sum(part["parameters"] for part in parts) == total - 1  # the logit scale
    result = run_cli("tokenizer", *options, "--preset", tmp_path / "own", "--vision-overrides", "{image_size: 64}")
    assert result.exit_code == 2 and "has its own sizes: image_size would have no effect" in result.stderr
    for wrong, message in (("{image_sizes: 64}", "no image_sizes"), ("[1]", "expected a mapping such as")):
        result = run_cli("tokenizer", *options, "--preset", "tiny", "--vision-overrides", wrong)
        assert result.exit_code == 2 and message in result.stderr


def test_command_line_errors_are_one_line():
    for args, message in (
        (("tokenizer", "--preset", "huge", "--samples", 1, "--gpus", 8), "Unknown preset 'huge'"),
        (("mllm", "--samples", 1, "--gpus", 1, "--text-length", 10**12), "equal to 1048576, got 1000000000000"),
        (("mllm", "--samples", 1, "--gpus", 1, "--batch-per-gpu", 10**12), "equal to 16384, got 1000000000000"),
        (("mllm", "--samples", 1, "--gpus", 0), "gpus must be a finite number above 0, got 0."),
    ):
        result = run_cli(*args)
        assert result.exit_code == 2 and result.stderr.startswith("error: ") and message in result.stderr
        assert result.stderr.count("\n") == 1 and result.stdout == ""


# DeepSpeed configs


@pytest.mark.parametrize(
    ("name", "stage", "offload"),
    [("zero1", 1, False), ("zero2", 2, False), ("zero3", 3, False), ("zero3_offload", 3, True)],
)
def test_deepspeed_config_is_complete(name, stage, offload, mllm, tmp_path):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    path = str(ZERO / f"{name}.json")
    assert HfDeepSpeedConfig(path).is_zero3() == (stage == 3)
    config = HfTrainerDeepSpeedConfig(path)
    assert config.is_offload() == offload and config.get_value("zero_optimization.stage") == stage
    arguments = TrainingArguments(
        str(tmp_path), bf16=True, use_cpu=True, max_grad_norm=10.0, per_device_train_batch_size=3
    )
    config.trainer_config_process(arguments)
    config.trainer_config_finalize(arguments, mllm, num_training_steps=10)
    unset_hf_deepspeed_config()
    filled = config.config
    assert "auto" not in json.dumps(filled)
    assert filled["bf16"]["enabled"] is True and filled["gradient_clipping"] == 10.0
    assert filled["train_micro_batch_size_per_gpu"] == 3 and filled["communication_data_type"] == "fp32"
    zero = DeepSpeedZeroConfig(**filled["zero_optimization"])  # refuses unknown keys
    assert zero.gather_16bit_weights_on_model_save == (stage == 3)
    for part in (zero.offload_optimizer, zero.offload_param):
        assert (part is not None and part.device == "cpu" and part.pin_memory) == offload


# launching


def readme_commands() -> list[list[str]]:
    blocks = re.findall(
        r"```bash\n(.*?)```", (ROOT / "training" / "launch" / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def test_launch_commands_name_files_that_exist():
    commands = readme_commands()
    assert [command[0] for command in commands] == ["torchrun", "torchrun", "deepspeed", "sbatch"]
    for argument in (argument for command in commands for argument in command):
        if "/" in argument:
            assert (ROOT / argument).is_file()
        if argument.startswith("training."):
            assert (ROOT / argument.replace(".", "/")).with_suffix(".py").is_file()


def test_hostfile_and_the_deepspeed_command(monkeypatch):
    from deepspeed.launcher.runner import fetch_hostfile, parse_args

    monkeypatch.chdir(ROOT)
    arguments = parse_args(readme_commands()[2][1:])
    assert fetch_hostfile(arguments.hostfile) == {"node1": 8, "node2": 8}
    assert arguments.module and arguments.no_local_rank and arguments.user_script == "training.train_mllm"
    assert arguments.user_args[0].endswith(".yaml")


def test_slurm_script_starts_torchrun_on_every_node(tmp_path):
    for name, answer in (("scontrol", "printf 'n7\\nn8\\n'"), ("srun", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{answer}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_NODELIST": "n[7-8]", "JOB_NUM_NODES": "2", "GPUS_ON_NODE": "8", "JOB_ID": "42"}
    result = subprocess.run(
        ["bash", str(ROOT / "training" / "launch" / "slurm.sh"), "training.train_mllm", "a b.yaml"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"} | {f"SLURM_{name}": value for name, value in slurm.items()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split("\n")[0] == (
        "torchrun --max-restarts 3 --nnodes 2 --nproc_per_node 8 --rdzv_id 42 --rdzv_backend c10d --rdzv_endpoint n7:29500 "
        "-m training.train_mllm a b.yaml"
    )
