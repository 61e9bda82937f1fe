"""The README: its examples run, its outline and its citation hold."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
import torch
import yaml
from original_checkpoints import reference_state, tokenizer_checkpoint
from PIL import Image, ImageDraw

import unitok_mllm


pytestmark = pytest.mark.full


ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
# servers, which test_web.py and test_api.py run, and an original MLLM, which test_convert_unitok.py has
NOT_RUN = ("unitok-mllm serve", "unitok-mllm api", "unitok-mllm convert original-mllm/")


def examples(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_examples_run_as_written_and_the_shipped_model_answers_right(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = examples("python")
    exec(example, {})
    assert capsys.readouterr().out.split() == ["red"]
    assert Image.open("circle.png").size == (64, 64)


def test_the_citation_has_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (citation["title"], citation["version"]) == (project["name"], project["version"])
    assert project["version"] == unitok_mllm.__version__
    paper = citation["preferred-citation"]
    assert f"title   = {{{paper['title']}}}" in README.read_text(encoding="utf-8")


def test_the_outline_is_kept():
    lines = README.read_text(encoding="utf-8").splitlines()
    headings = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    assert headings == [
        *("Install", "Ask and draw", "How it works", "Models", "Command line", "Fine-tune", "Results", "Limits"),
        *("Documentation", "Citation"),
    ]
    assert len(lines) <= 150


@pytest.fixture
def wheel_python(tmp_path) -> Path:
    """The Python of an environment that has the built wheel, and of everything else what is installed here."""
    source, environment = tmp_path / "source", tmp_path / "venv"
    shutil.copytree(ROOT / "unitok_mllm", source / "unitok_mllm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path / "wheels", source], check=True
    )
    shutil.rmtree(source)
    venv.create(environment, symlinks=True)
    python = environment / "bin/python"
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout.strip())
    # of that folder the `.pth` files are not read, and so not the one by which the checkout is installed
    (packages / "installed_here.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


@pytest.mark.slow  # builds a wheel and an environment, and runs each command in a process of its own
def test_examples_run_from_a_wheel_outside_of_the_checkout(tmp_path, wheel_python):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    picture = Image.new("RGB", (64, 64), "lavender")
    ImageDraw.Draw(picture).ellipse((20, 16, 44, 40), fill="red")
    picture.save(folder / "photo.jpg")
    state = reference_state("tokenizer_base_depth2", shrink=8)
    torch.save(tokenizer_checkpoint(state, "vitamin_base"), folder / "unitok_tokenizer.pth")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{wheel_python.parent}{os.pathsep}{environment['PATH']}"

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    (example,) = examples("python")
    answer, place = run(wheel_python, "-c", example + "\nprint(unitok_mllm.__file__)").splitlines()
    assert answer.strip() == "red" and place.startswith(str(tmp_path / "venv"))
    assert Image.open(folder / "circle.png").size == (64, 64)

    (block,) = (block for block in examples("bash") if block.startswith("unitok-mllm"))
    outputs = {line.split("#")[0].strip(): "" for line in block.splitlines() if not line.startswith(NOT_RUN)}
    for command in outputs:
        outputs[command] = run("bash", "-c", command)
    assert outputs['unitok-mllm ask photo.jpg "what shape is present?"'] == "circle\n"
    made = {path.name for path in folder.iterdir()}
    assert {"unitok-demo.png", "unitok-drawing-4.png", "unitok-edit.png", "photo_reconstruction.png"} <= made
    assert (folder / "unitok-large/config.json").is_file()
