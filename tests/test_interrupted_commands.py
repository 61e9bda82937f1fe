"""Real processes, ended by real signals as a terminal, a scheduler or a shutdown sends them; the same command resumes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from mllm_runs import losses, write_config
from PIL import Image
from safetensors.torch import load_file
from test_model_card import emoji_data

from eval.judge import Judge, save_judge
from training.easy_vqa import load
from training.files import whole_checkpoints
from training.mllm_trainer import WHOLE
from training.tokenizer_trainer import STATE


pytestmark = pytest.mark.attack


ROOT = Path(__file__).parents[1]
OF_THE_PROCESS = re.compile(  # in a result: times, and what was there before
    r".*seconds?(/.*)?|data_wait_share|decode_ms|drawn|resumed_from_step"
)


class Script:
    """A script in a group of processes of its own, in its own folder; what it says goes to a file there."""

    def __init__(self, folder: Path, *command: object):
        folder.mkdir(exist_ok=True)
        self.log = folder / "log.txt"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *map(str, command)],
                cwd=folder,
                env=environment | {"HF_HUB_OFFLINE": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def wait_until(self, is_time: Callable[[str], bool]) -> None:
        """Until that is true of what it has said."""
        deadline = time.monotonic() + 200
        while not is_time(self.said):
            assert self.process.poll() is None and time.monotonic() < deadline, self.said[-3000:]
            time.sleep(0.01)

    def end(self, number: signal.Signals, to_all: bool) -> str:
        """A signal to the process alone or, as from a terminal, to all of the group; what the script says.

        It ends with the signal's code, without a traceback, and leaves no process behind.
        """
        os.killpg(self.process.pid, number) if to_all else self.process.send_signal(number)
        self.process.wait(timeout=100)
        assert self.process.returncode == 128 + number and "Traceback" not in self.said, self.said[-3000:]
        with pytest.raises(ProcessLookupError):
            os.killpg(self.process.pid, 0)
        return self.said

    def finish(self) -> None:
        assert self.process.wait(timeout=400) == 0, self.said[-3000:]


@dataclass
class Command:
    """A command whose outputs lie in the folder where it is run.

    Attributes:
        words: after `python -m`.
        progress: how much is done, of the folder and of what this process has said; grows.
        said: the line that the interrupted command ends with, a regular expression.
    """

    words: list[object]
    progress: Callable[[Path, str], int]
    said: str = "Interrupted. .*[Tt]he same command goes on.*"


def of_the_result(value: object) -> object:
    """A result without what belongs to the process."""
    if isinstance(value, dict):
        return {key: of_the_result(one) for key, one in value.items() if not OF_THE_PROCESS.fullmatch(key)}
    return [of_the_result(one) for one in value] if isinstance(value, list) else value


def results(folder: Path) -> dict[str, object]:
    """The contents of all files that a command has written, without times and without what belongs to the process."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.suffix == ".safetensors":
            found[path] = of_the_result({name: value.tolist() for name, value in load_file(path).items()})
        elif path.name == "trainer_state.json":
            found[path] = losses(path.parent)
        elif path.suffix in (".png", ".parquet"):
            found[path] = path.read_bytes()
        elif path.suffix in (".json", ".jsonl"):
            text = path.read_text(encoding="utf-8")
            rows = text.splitlines() if path.suffix == ".jsonl" else [text]
            found[path] = [of_the_result(json.loads(row)) for row in rows if row]
    parts = {path.relative_to(folder): value for path, value in found.items()}
    return {str(path): value for path, value in parts.items() if not str(path).partition("checkpoint-")[1]}


@pytest.fixture
def model(tmp_path, lively_mllm, processor) -> Path:
    for part in (lively_mllm, processor):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def captions(tmp_path) -> Path:
    """A table of easy-VQA's pictures and captions."""
    lines = [json.dumps({"image": str(one.image), "caption": one.caption}) + "\n" for one in load("train")[:100]]
    (tmp_path / "captions.jsonl").write_text("".join(lines), encoding="utf-8")
    return tmp_path / "captions.jsonl"


def mllm_training(fixture) -> Command:
    tmp_path = fixture("tmp_path")
    model = fixture("model")
    captions = fixture("captions")
    sources = [{"path": str(captions), "type": "captions"}]
    sources.append(sources[0] | {"task": "draw"})
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 12, "save_total_limit": 1, "output_dir": "run"}
    options |= {"disable_tqdm": False}
    config = write_config(tmp_path / "run.yaml", model, sources, dataloader_num_workers=2, **options)
    return Command(
        ["training.train_mllm", config],
        lambda folder, _: max(whole_checkpoints(folder / "run", WHOLE), default=0),
        r"Interrupted. The same command goes on from run/checkpoint-\d+.",
    )


def tokenizer_training(fixture) -> Command:
    tmp_path = fixture("tmp_path")
    text_tokenizer = fixture("text_tokenizer")
    captions = fixture("captions")
    text_tokenizer.save_pretrained(tmp_path / "text")
    config = {
        "vision_overrides": {
            "image_size": 32,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
        },
        "text_tokenizer": str(tmp_path / "text"),
        "datasets": [{"kind": "folder", "path": str(captions), "max_shift": 1}],
        "perceptual_weight": 0,
        "gan_weight": 0,
        "output_dir": "run",
        "per_device_train_batch_size": 8,
        "dataloader_num_workers": 2,
        "max_steps": 30,
        "save_steps": 5,
        "save_total_limit": 1,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return Command(
        ["training.train_tokenizer", tmp_path / "run.yaml", "--resume", "true"],
        lambda folder, _: max(whole_checkpoints(folder / "run", STATE), default=0),
        r"Interrupted. The same command with --resume true goes on from run/checkpoint-\d+.",
    )


def extraction(fixture) -> Command:
    model = fixture("model")
    captions = fixture("captions")
    options = ["--visual-model", model, "--batch-size", "2", "--shard-size", "10", "--workers", "2"]
    return Command(
        ["training.extract_codes", captions, "codes", *options],
        lambda folder, _: len(list((folder / "codes").glob("*.parquet"))),
    )


def easy_vqa(fixture) -> Command:
    tmp_path = fixture("tmp_path")
    model = fixture("model")
    save_judge(Judge(), tmp_path / "judge.safetensors")
    options = ["--model", model, "--judge", tmp_path / "judge.safetensors", "--limit", "4", "--samples", "1"]
    return Command(
        ["eval.easy_vqa", *options, "--batch-size", "1", "--output", "out.json"],
        lambda folder, _: len(parts(folder / "out.json")),
    )


def emoji(fixture) -> Command:
    tmp_path = fixture("tmp_path")
    model = fixture("model")
    return Command(
        ["eval.emoji", "--model", model, "--data", emoji_data(tmp_path / "emoji"), "--output", "out.json"],
        lambda folder, _: sum(map(len, parts(folder / "out.json").values())),
    )


def text_to_image(fixture) -> Command:
    tmp_path = fixture("tmp_path")
    model = fixture("model")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue shape\n", encoding="utf-8")
    return Command(
        [*"eval.text_to_image --output out --samples 12 --batch-size 1 --model".split(), model]
        + ["--prompts", tmp_path / "prompts.txt"],
        lambda folder, _: len(list((folder / "out/images").glob("*.png"))),
    )


def bar(_: Path, said: str) -> int:
    """How many images a progress bar has counted last."""
    counts = re.findall(r"images: +\d+%\S* +(\d+)/", said)
    return int(counts[-1]) if counts else 0


def reconstruction(fixture) -> Command:
    model = fixture("model")
    photos = fixture("photos")
    options = ["--model", model, "--images", photos, "--skip", "rfid,lpips", "--workers", "2", "--batch-size", "2"]
    return Command(["eval.reconstruction", *options, "--output", "out.json"], bar)


def zero_shot(fixture) -> Command:
    visual_folder = fixture("visual_folder")
    options = ["--model", visual_folder, "--dataset", "easy-vqa", "--batch-size", "1", "--workers", "2"]
    return Command(["eval.zero_shot", *options, "--limit", "60", "--output", "out.json"], bar)


def vqa(fixture) -> Command:
    model = fixture("model")
    options = ["--model", model, "--limit", "60", "--batch-size", "1", "--output", "out.json"]
    return Command(
        ["eval.vqa", *options],
        lambda folder, _: sum(len(path.read_bytes().splitlines()) for path in folder.glob("out.answers.*.jsonl")),
    )


def claims(fixture) -> Command:
    tmp_path = fixture("tmp_path")
    captions = fixture("captions")
    fixture("text_tokenizer").save_pretrained(tmp_path / "text")
    vision = {"image_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"stem_width": 8, "stage_dims": [8, 16], "stage_depths": [1, 1]}
    values = {
        "steps": 6,
        "batch_size": 4,
        "total_codes": 64,
        "codebooks": [8],
        "seeds": [0],
        "search_steps": 6,
        "candidates": {"plain": {}, "revival": {"codebook_start": "data", "revive_dead_codes": 1}},
        "validation": {"validation images": str(captions)},
        "held_out": {"test images": str(captions)},
        "output_dir": "out",
        "vision_overrides": vision,
        "text_tokenizer": str(tmp_path / "text"),
        "datasets": [{"kind": "folder", "path": str(captions)}],
        "use_cpu": True,
        "bf16": False,
        "save_steps": 1,
        "eval_steps": 3,
    }
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return Command(
        ["eval.claims", tmp_path / "claims.yaml"],
        lambda folder, _: len(list(folder.glob("out/runs/*/result.json"))),
    )


def parts(path: Path) -> dict:
    """Those of a report, if there is one."""
    return json.loads(path.read_text(encoding="utf-8"))["parts"] if path.is_file() else {}


@pytest.fixture
def photos(tmp_path) -> Path:
    (tmp_path / "photos").mkdir()
    for number in range(100):
        pixels = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"photos/{number:03d}.png")
    return tmp_path / "photos"


@pytest.fixture
def visual_folder(tmp_path, visual_tokenizer, text_tokenizer, processor) -> Path:
    for part in (visual_tokenizer, text_tokenizer, processor.image_processor):
        part.save_pretrained(tmp_path / "visual")
    return tmp_path / "visual"


COMMANDS = (mllm_training, tokenizer_training, extraction, easy_vqa, emoji, text_to_image, reconstruction)
COMMANDS += (zero_shot, vqa, claims)


@pytest.mark.slow  # four processes, each of which imports torch
@pytest.mark.parametrize("make", COMMANDS, ids=lambda make: make.__name__)
def test_what_is_done_stays_and_the_same_command_goes_on(make, tmp_path, request):
    command, told = make(request.getfixturevalue), tmp_path / "told"
    done = partial(command.progress, told)
    for number in (signal.SIGTERM, signal.SIGINT):
        before, script = done(""), Script(told, *command.words)
        script.wait_until(lambda said, before=before: done(said) > before)
        said = script.end(number, to_all=number == signal.SIGINT)
        assert re.fullmatch(command.said, said.splitlines()[-1]), said[-3000:]
    Script(told, *command.words).finish()
    Script(tmp_path / "whole", *command.words).finish()
    found, expected = results(told), results(tmp_path / "whole")
    assert found.keys() == expected.keys() and not [name for name in expected if found[name] != expected[name]]


@pytest.mark.slow
def test_the_second_signal_ends_a_training_in_the_middle_of_its_step(tmp_path, request):
    command = mllm_training(request.getfixturevalue)
    script = Script(tmp_path / "told", *command.words, "--gradient_accumulation_steps", "1000")
    script.wait_until(lambda said: "the time that they take" in said)
    time.sleep(2)  # into the step
    script.process.send_signal(signal.SIGHUP)
    script.wait_until(lambda said: "Stopping after this step, with a checkpoint; once more: at once." in said)
    said = script.end(signal.SIGTERM, to_all=False)
    assert said.endswith("\nInterrupted before the first checkpoint in run: the same command begins anew.\n")
    assert not list((tmp_path / "told/run").glob("checkpoint-*"))


@pytest.mark.slow
def test_a_signal_leaves_no_half_a_judge(tmp_path):
    command = "eval.judge", "--epochs", "1", "--output", "judge.safetensors"
    script = Script(tmp_path / "told", *command)
    script.wait_until(lambda said: "judge" in said)
    assert script.end(signal.SIGHUP, to_all=True).endswith("\nInterrupted. The same command begins again.\n")
    assert not (tmp_path / "told/judge.safetensors").exists()


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="what a process has loaded stands in /proc")
@pytest.mark.parametrize("module", ["training.train_tokenizer", "eval.reconstruction"])
def test_ctrl_c_while_libraries_are_imported_ends_in_one_line(tmp_path, module):
    script = Script(tmp_path, module, "--help")
    maps = Path(f"/proc/{script.process.pid}/maps")
    script.wait_until(lambda said: "numpy" in maps.read_text(encoding="utf-8"))
    assert script.end(signal.SIGINT, to_all=True) == "\nInterrupted. The same command begins again.\n"
