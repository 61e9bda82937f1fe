"""The guides run as written: `python` and `bash` blocks are executed in order, in a folder of their own with the
repository's folders in it; of `text` blocks (commands that need weights, data or GPUs) the options are checked."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import typer
from original_checkpoints import reference_state, tokenizer_checkpoint
from PIL import Image
from transformers import AutoTokenizer, TrainingArguments

from training.codes import CodeStore
from unitok_mllm import UniTokModel, cli
from unitok_mllm.inference import answer_questions, load


pytestmark = pytest.mark.full


ROOT = Path(__file__).parents[1]
GUIDES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
SLOW = ("train_a_tokenizer.md", "own_llm.md", "finetune_on_questions.md")  # train for minutes
BLOCK = re.compile(r"```(python|bash|text)\n(.*?)```", re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("training", "eval", "unitok_mllm"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": "."}
    return subprocess.run(
        ["bash", "-e", "-c", command], env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )


def known_options(command: list[str]) -> tuple[set[str], list[str]]:
    """The options that a command has, and those that it is given."""
    if command[0] == "unitok-mllm":
        parsed, given = typer.main.get_command(cli.app).commands[command[1]], command[2:]
    else:
        start = next(i for i, word in enumerate(command) if re.fullmatch(r"(training|eval)\.\w+", word))
        module, given = importlib.import_module(command[start]), command[start + 1 :]
        parsed = typer.main.get_command(module.app) if hasattr(module, "app") else module
    if hasattr(parsed, "params"):
        known = {option.lstrip("-") for parameter in parsed.params for option in parameter.opts}
    else:
        names = ("Settings", "MLLMArguments", "TokenizerArguments", "LossArguments", "TokenizerTrainingArguments")
        classes = [vars(module)[name] for name in names if name in vars(module)]
        classes += [TrainingArguments] if "MLLMArguments" in vars(module) else []
        known = {field.name for settings in classes for field in fields(settings)}
    return known, [word.removeprefix("--") for word in given if word.startswith("--")]


def check_other_tools(names: dict) -> None:
    """The LLaVA guide's tower is the model's own, the pipelines do what the model does, the exported encoder too."""
    visual, tower = names["model"].visual, names["tower"]
    state = visual.vision_model.state_dict()
    assert tower.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in tower.state_dict().items())
    pixels = names["processor"].image_processor(names["picture"])["pixel_values"]
    expected = names["llava"].model.multi_modal_projector(visual.vision_model(pixels).last_hidden_state)
    torch.testing.assert_close(torch.stack(list(names["features"].pooler_output)), expected)
    assert names["answer"][0]["generated_text"].strip() == "red"
    assert torch.equal(names["codes"], visual.encode(names["pixels"]))


def check_questions(names: dict) -> None:
    """The model that was trained on the pictures' sizes tells them apart."""
    model, processor = load(Path("runs/sizes/release"), device="cpu")
    rows = json.loads(Path("data/conversations.json").read_text(encoding="utf-8"))
    pictures = [Image.open(f"data/{row['image']}") for row in rows]
    answers = answer_questions(model, processor, [(picture, "how large is it?") for picture in pictures], 8)
    right = sum(answer == row["conversations"][1]["value"] for answer, row in zip(answers, rows))
    assert right >= 28, answers


def check_captions(names: dict) -> None:
    """The new words are tokens, the codes are the new tokenizer's, and the model that draws has it as its own."""
    model, processor = load(Path("runs/my-model/release"), device="cpu")
    tokenizer = UniTokModel.from_pretrained("runs/my-tokenizer/release")
    assert len(processor.tokenizer.tokenize("a purple ellipse")) == 3
    assert len(AutoTokenizer.from_pretrained("unitok_mllm/checkpoints/tiny").tokenize("a purple ellipse")) > 3
    state, own = tokenizer.state_dict(), model.visual.state_dict()
    assert state.keys() == own.keys()
    for name, value in own.items():
        stored = state[name].half().float() if value.is_floating_point() else state[name]  # the MLLM's are in float16
        assert torch.equal(value, stored), name
    shipped = UniTokModel.from_pretrained("unitok_mllm/checkpoints/tiny").state_dict()
    assert not torch.equal(state["vision_model.projection.weight"], shipped["vision_model.projection.weight"])
    store, pictures = CodeStore("data/codes"), [Image.open(f"data/images/{number}.png") for number in range(32)]
    codes = tokenizer.encode(processor.image_processor(pictures, mode="reconstruct")["pixel_values"])
    stored = torch.stack([store[f"images/{number}.png"][0] for number in range(32)])
    assert (stored == codes).float().mean() > 0.99  # but for rounding
    with Image.open("unitok-drawing.png") as drawing:
        assert drawing.size == (64, 64) and drawing.text["prompt"] == "a purple ellipse"


CHECKS = {
    "other_tools.md": check_other_tools,
    "finetune_on_questions.md": check_questions,
    "finetune_on_captions.md": check_captions,
}


@pytest.mark.parametrize(
    "guide", [pytest.param(guide, marks=pytest.mark.slow) if guide in SLOW else guide for guide in GUIDES]
)
def test_guide_runs_as_written(guide, folder):
    if guide == "released_weights.md":  # in place of the download: the same tensors, each dimension an eighth
        state = reference_state("tokenizer_base_depth2", shrink=8)
        torch.save(tokenizer_checkpoint(state, "vitamin_base"), "unitok_tokenizer.pth")
    names = {}
    for language, block in BLOCK.findall((ROOT / "docs" / guide).read_text(encoding="utf-8")):
        if language == "python":
            exec(block, names)
        elif language == "bash":
            result = run(block)
            assert result.returncode == 0, (block, result.stderr[-3000:])
    if guide in CHECKS:
        CHECKS[guide](names)


@pytest.mark.parametrize("guide", GUIDES)
def test_commands_that_are_not_run_have_only_known_options(guide):
    text = (ROOT / "docs" / guide).read_text(encoding="utf-8")
    for language, block in BLOCK.findall(text):
        for line in block.splitlines() if language == "text" else ():
            known, given = known_options(shlex.split(line))
            assert set(given) <= known, line


def test_links_lead_somewhere():
    documents = [
        path for folder in ("docs", "training", "eval", "unitok_mllm") for path in (ROOT / folder).rglob("*.md")
    ]
    for path in (*ROOT.glob("*.md"), *documents):
        for target in re.findall(r"""(?:\]\(|src=")([^)#"]+)""", path.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), (path.name, target)
