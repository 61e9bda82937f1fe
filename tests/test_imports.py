"""What is imported when: nothing heavy before the arguments of a command are checked, and nothing that is not needed."""

import enum
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import training


pytestmark = pytest.mark.full  # each starts a process

ROOT = Path(__file__).parents[1]
WATCHED = tuple(
    "PIL datasets deepspeed diffusers easy_vqa fastapi gradio lmms_eval matplotlib numpy open_clip pandas peft pyarrow ray "
    "skimage sklearn tensorboard timm torch transformers wandb".split()
)


def run(program: str, *args: str) -> subprocess.CompletedProcess:
    """Runs a program, which then says last which of the watched packages it has imported."""
    report = f"lambda: print('imported:', *filter(sys.modules.get, {WATCHED}))"
    at_exit = f"import atexit, sys; atexit.register({report})\n"
    command = [sys.executable, "-c", at_exit + program, *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")


def imported(done: subprocess.CompletedProcess) -> set[str]:
    return set(done.stdout.splitlines()[-1].removeprefix("imported:").split())


COMMAND_LINE = "import sys; sys.argv[0] = 'unitok-mllm'; from unitok_mllm.cli import main; main()"


@pytest.mark.parametrize(
    ("command", "code", "expected"),
    [
        ("", 2, "Usage"),
        ("--help", 0, "Usage"),
        ("--version", 0, "unitok-mllm 0"),
        *(
            (f"{name} --help", 0, "Usage")
            for name in "demo reconstruct ask generate edit convert serve api env".split()
        ),
        ("paint", 2, "No such command 'paint'"),
        ("generate circle --colour blue", 2, "No such option: --colour"),
        ("generate circle --temperature 0", 2, "temperature must be above 0, got 0.0"),
        ("generate circle --top-p 2", 2, "top_p must be above 0 and at most 1, got 2.0"),
        ("generate circle --output a.xyz", 2, "must end in .png"),
        ("ask nowhere.png what?", 2, "'nowhere.png' does not exist"),
        ("reconstruct nowhere.png", 2, "'nowhere.png' does not exist"),
        ("reconstruct docs/demo.png --output README.md", 2, "README.md is not a folder"),
        ("edit nowhere.png blue", 2, "'nowhere.png' does not exist"),
        ("convert nowhere.pth --to new", 2, "'nowhere.pth' does not exist"),
        ("ask docs/demo.png what? --model nowhere", 2, "no model in nowhere"),
        ("reconstruct docs/demo.png --model nowhere", 2, "no model in nowhere"),
        ("generate circle --model nowhere", 2, "no model in nowhere"),
        ("edit docs/demo.png blue --model nowhere", 2, "no model in nowhere"),
        ("demo --model nowhere", 2, "no model in nowhere"),
        ("serve --model nowhere", 2, "no model in nowhere"),
        ("api --model nowhere", 2, "no model in nowhere"),
        ("api --host=", 2, "the host is empty"),
    ],
)
def test_arguments_are_checked_before_anything_heavy_is_imported(command, code, expected):
    done = run(COMMAND_LINE, *command.split())
    assert done.returncode == code and expected in done.stdout + done.stderr, done.stderr
    assert imported(done) == set()


def test_ctrl_c_ends_the_command_line_in_one_line_while_it_is_imported(tmp_path):
    script = tmp_path / "unitok-mllm"
    script.write_text("import os, signal, unitok_mllm\nos.kill(os.getpid(), signal.SIGINT)\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert (done.returncode, done.stderr) == (130, b"\nInterrupted. The same command begins again.\n")


def test_an_interrupt_that_a_library_turns_into_an_error_of_its_own_is_one(tmp_path):
    code = """
import os, signal, unitok_mllm.cli as cli

def app():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt as error:
        raise ModuleNotFoundError("Could not import module") from error

cli.app = app
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (130, b"\nInterrupted. The same command begins again.\n")


def test_the_package_alone_imports_nothing():
    assert imported(run("import unitok_mllm")) == set()


def test_its_classes_need_no_more_than_the_librarys_own():
    library = run("from transformers import LlamaModel, AutoProcessor")
    ours = run("from unitok_mllm import UniTokMLLMForConditionalGeneration, UniTokMLLMProcessor")
    assert imported(ours) == imported(library) and "torch" in imported(ours)


def test_drawing_needs_nothing_of_trainings_evaluations_and_servers(tmp_path):
    done = run(COMMAND_LINE, "generate", "a red circle", "--output", str(tmp_path / "circle.png"))
    assert done.returncode == 0, done.stderr
    assert imported(done) == {"PIL", "numpy", "timm", "torch", "transformers"}


SHIPPED = "unitok_mllm/checkpoints/tiny"
USES = {
    "package, then library": f"""
import unitok_mllm
from transformers import AutoConfig, AutoModel, AutoProcessor
assert type(AutoConfig.from_pretrained({SHIPPED!r})) is unitok_mllm.UniTokMLLMConfig
assert type(AutoProcessor.from_pretrained({SHIPPED!r})) is unitok_mllm.UniTokMLLMProcessor
""",
    "a module of the package first": f"""
from unitok_mllm.modeling_unitok import UniTokModel
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoModel
import unitok_mllm
assert UniTokModel is unitok_mllm.UniTokModel
assert AutoModel._model_mapping[unitok_mllm.UniTokConfig] is UniTokModel
config = AutoConfig.from_pretrained({SHIPPED!r})
assert AutoModelForMultimodalLM._model_mapping[type(config)] is unitok_mllm.UniTokMLLMForConditionalGeneration
""",
    "library, then package": f"""
from transformers import AutoConfig
from unitok_mllm import *
import unitok_mllm
assert type(AutoConfig.from_pretrained({SHIPPED!r})) is unitok_mllm.UniTokMLLMConfig
assert [name for name in unitok_mllm.__all__ if name not in globals()] == []
assert set(unitok_mllm.__all__) <= set(dir(unitok_mllm))
""",
}


@pytest.mark.parametrize("use", USES)
def test_the_classes_are_registered_whatever_is_imported_first(use):
    done = run(USES[use])
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_imports_nothing():
    done = run("import unitok_mllm; unitok_mllm.UniTokModle")
    assert "module 'unitok_mllm' has no attribute 'UniTokModle'" in done.stderr
    assert imported(done) == set()


class Choice(enum.StrEnum):
    this = "this"


def test_what_libraries_say_of_no_use_is_left_out(monkeypatch):
    from deepspeed.accelerator import real_accelerator
    from torch.utils import _pytree
    from torch.utils.data import DataLoader

    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    monkeypatch.setattr(real_accelerator, "ds_accelerator", None)
    for name in ("torch.utils._pytree", "DeepSpeed"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [handler])
    with warnings.catch_warnings(record=True) as caught:
        training.quiet_libraries()  # pytest has undone it
        DataLoader([1], num_workers=300)
        warnings.warn("a use", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["a use"]
    _pytree.register_constant(Choice)
    real_accelerator.get_accelerator()
    logging.getLogger("DeepSpeed").warning("a use")
    assert said == ["a use"]
    assert os.environ["LOGURU_LEVEL"] == "INFO"


SCRIPTS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("training", "eval")
    for path in (ROOT / folder).glob("*.py")
    if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
)
RUN_SCRIPT = "import runpy; runpy.run_module(sys.argv[1], run_name='__main__', alter_sys=True)"


@pytest.mark.slow  # most scripts import torch for their help
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_help_of_a_script_needs_nothing_of_its_work(script):
    done = run(f"{RUN_SCRIPT.replace('sys.argv[1]', repr(script))}", "--help")
    assert done.returncode == 0 and "usage" in done.stdout.lower(), done.stderr
    assert imported(done) <= {"PIL", "numpy", "torch", "transformers"}
