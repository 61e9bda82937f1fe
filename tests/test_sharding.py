"""The tokenizer's training under DDP, ZeRO and FSDP2: equal to one process, and checkpoints that go from any to any."""

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from tokenizer_runs import ALL_TERMS, Noise, Recorder, small_model, trainer_of
from torch import multiprocessing
from torch.distributed.tensor import DTensor
from transformers import AutoModel

from training.losses import TERMS
from training.planning.memory import float32_state_bytes
from training.sharding import ZeroNetwork, zero_config
from training.tokenizer_arguments import TokenizerTrainingArguments


pytestmark = pytest.mark.usefixtures("fresh_accelerator")

ZERO = Path(__file__).parents[1] / "training/configs/deepspeed"
SHARDINGS = {"ddp": {}, "fsdp": {"fsdp": True}}
SHARDINGS |= {path.stem: {"deepspeed": str(path)} for path in sorted(ZERO.glob("*.json"))}
QUICK = ("fsdp",)
STEPS = 20
# a small rate, since the nearest code and the sign of an error jump: rounding errors do not stay small for long
OPTIONS = {"learning_rate": 1e-4, "adam_epsilon": 1e-4, "codebook_start": "data", "revive_dead_codes": 7}
OPTIONS |= {"max_steps": STEPS, "save_steps": 10, "eval_steps": 10, "gradient_accumulation_steps": 2}


def train(folder: Path, num_processes: int, sharding: str = "ddp", resume: bool = False) -> Recorder:
    options = OPTIONS | SHARDINGS[sharding] | {"per_device_train_batch_size": 4 // num_processes, "resume": resume}
    trainer = trainer_of(folder, ALL_TERMS, eval_dataset=Noise(7), **options)
    trainer.train()
    return trainer


def bytes_held(trainer: Recorder) -> int:
    """The bytes of the tokenizer's weights, moments, ZeRO's copies and the average in this process."""
    network = trainer.tokenizer
    states = [value for state in network.optimizer.state.values() for value in state.values() if value.ndim]
    held = [*network.parts().values(), *states, *trainer.ema.parts.values()]
    if isinstance(network, ZeroNetwork):
        zero = network.zero
        held += zero.fp32_partitioned_groups_flat if network.stage == 3 else zero.single_partition_of_fp32_groups
    return sum((part.to_local() if isinstance(part, DTensor) else part).nbytes for part in held)


def _process(rank: int, folder: str, port: int, sharding: str, resume: bool) -> None:
    torch.set_num_threads(1)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in environment.items()} | {"MASTER_ADDR": "localhost"}
    trainer = train(Path(folder), 2, sharding, resume)
    (Path(folder) / f"bytes-{rank}.json").write_text(json.dumps(bytes_held(trainer)), encoding="utf-8")
    if not rank:
        (Path(folder) / "reports.json").write_text(json.dumps(trainer.reports), encoding="utf-8")


def train_two(folder: Path, sharding: str, resume: bool = False) -> dict[int, dict[str, float]]:
    """Train in two processes, and return the reports by step."""
    with socket.create_server(("localhost", 0)) as listener:
        port = listener.getsockname()[1]
    multiprocessing.start_processes(_process, (str(folder), port, sharding, resume), 2, start_method="forkserver")
    reports = json.loads((folder / "reports.json").read_text(encoding="utf-8"))
    return {int(step): values for step, values in reports.items()}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModel.from_pretrained(folder / "release").state_dict()


def check_equal(folder: Path, reports: dict, expected_folder: Path, expected: dict, steps: range) -> None:
    """Check losses, evaluations and released weights against those of another run."""
    assert list(reports) == list(steps)
    for step in steps:
        names = [
            name for name in expected[step] if name in TERMS or name.startswith(("eval", "disc", "psnr", "revived"))
        ]
        shown, wanted = ({name: run[step][name] for name in names} for run in (reports, expected))
        assert shown == pytest.approx(wanted, rel=1e-3, abs=1e-4), step
        assert reports[step]["loss"] == pytest.approx(
            expected[step]["loss"], rel=0.05, abs=0.01
        )  # steered by the GAN's
    weights, start = weights_of(expected_folder), small_model().state_dict()
    assert max((value - start[name]).abs().max() for name, value in weights.items()) > 1e-3
    for name, value in weights_of(folder).items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-5, msg=name)


def as_of_step_10(source: Path, folder: Path) -> Path:
    """Copy a run as it was when it was killed after its first checkpoint."""
    shutil.copytree(source / "checkpoint-10", folder / "checkpoint-10")
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[Path, dict[int, dict[str, float]]]:
    """One process, without a break."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("sharding") / "one"
    return folder, train(folder, 1).reports


@pytest.mark.full
@pytest.mark.parametrize(
    "sharding", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SHARDINGS]
)
def test_two_processes_train_like_one_which_goes_on_from_their_checkpoint(tmp_path, one, sharding):
    check_equal(tmp_path / "two", train_two(tmp_path / "two", sharding), *one, range(1, STEPS + 1))
    count = sum(parameter.numel() for parameter in small_model().parameters())
    stage = {"ddp": "0", "fsdp": "FSDP2", "zero3_offload": "3"}.get(sharding, sharding[-1])
    whole, _ = float32_state_bytes(stage, count, 0, gpus=2, gpus_per_node=2, average=True)
    not_held = {"0": 2 * 4 * count, "1": 4 * count}.get(
        stage, 4 * count / 2
    )  # gradients, and buckets without sharding
    for rank in range(2):
        held = json.loads((tmp_path / "two" / f"bytes-{rank}.json").read_text(encoding="utf-8"))
        assert held + not_held == pytest.approx(whole, rel=0.03)  # parts are padded, and not all of one size
    folder = as_of_step_10(tmp_path / "two", tmp_path / "resumed")
    check_equal(folder, train(folder, 1, resume=True).reports, *one, range(11, STEPS + 1))


@pytest.mark.slow  # two processes, as above
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_two_processes_go_on_from_the_checkpoint_of_one(tmp_path, one, sharding):
    folder = as_of_step_10(one[0], tmp_path / "resumed")
    check_equal(folder, train_two(folder, sharding, resume=True), *one, range(11, STEPS + 1))


@pytest.mark.slow  # compiles for a minute
def test_compiled_parts_give_the_same_losses(tmp_path):
    reports = []
    for compiled in (False, True):
        AcceleratorState._reset_state(reset_partial_state=True)
        options = OPTIONS | {"max_steps": 4, "compile": compiled}
        trainer = trainer_of(tmp_path / str(compiled), ALL_TERMS, **options)
        trainer.train()
        reports.append(trainer.reports)
    assert type(trainer.tokenizer.module.decoder)._compiled_call_impl is None
    assert trainer.tokenizer.module.decoder._compiled_call_impl is not None
    for step, expected in reports[0].items():
        assert reports[1][step] == pytest.approx(expected, rel=1e-3, abs=1e-4), step
    assert weights_of(tmp_path / "True").keys() == weights_of(tmp_path / "False").keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a JSON file"),
        ("[]", "zero_optimization.stage must be 1, 2 or 3, got None"),
        ('{"zero_optimization": {"stage": 0}}', "must be 1, 2 or 3, got 0"),
        ('{"zero_optimization": {"stage": 1}, "optimizer": {}}', "optimizer is set by the training's own options"),
        ('{"zero_optimization": {"stage": 1}, "bf16": {"enabled": true}}', "bf16 would round the weights"),
        ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}', "offload_param to 'nvme' is not"),
        ('{"zero_optimization": {"stage": 1}, "gradient_clipping": 1}', "gradient_clipping is 1, but .* say 10.0"),
    ],
)
def test_configs_of_deepspeed_that_ask_for_something_else_are_refused(tmp_path, content, message):
    path = tmp_path / "zero.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"zero\.json.*{message}"):
        zero_config(path, 4, 2, 2, 10.0)


def test_what_is_auto_in_a_config_is_filled_in():
    config = zero_config(ZERO / "zero2.json", 4, 2, 8, 10.0)
    sizes = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "train_batch_size": 64}
    assert config.items() >= (sizes | {"gradient_clipping": 10.0}).items() and "bf16" not in config


def test_the_sharding_of_accelerates_launcher_is_taken(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    arguments = TokenizerTrainingArguments()
    with pytest.raises(ValueError, match="without a deepspeed_config_file"):
        arguments.take_launchers()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "zero2.json")
    arguments.take_launchers()
    assert arguments.deepspeed == "zero2.json" and not arguments.fsdp
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    arguments = TokenizerTrainingArguments()
    arguments.take_launchers()
    assert arguments.fsdp and "ACCELERATE_USE_FSDP" not in os.environ
    with pytest.raises(ValueError, match="are alternative ways of sharding"):
        TokenizerTrainingArguments(deepspeed="zero2.json", fsdp=True)
