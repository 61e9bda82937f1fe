"""The lock on an output folder, and folders that cannot be written."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from training import run_folder
from training.errors import one_line_errors
from training.run_folder import claim_folder
from unitok_mllm.inference import SHIPPED_MODEL


pytestmark = pytest.mark.attack


SCRIPT = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("run_folder", sys.argv[1])
run_folder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run_folder)
run_folder.claim_folder(sys.argv[2])
print("held", flush=True)
time.sleep(60)
"""


def other_run(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, run_folder.__file__, str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL], ids=lambda end: end.name)
def test_a_second_run_is_told_who_holds_the_folder_until_that_ends(tmp_path, end):
    first = other_run(tmp_path / "new/run")
    assert first.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=rf"the output folder .*new/run is in use by process {first.pid}$"):
        claim_folder(tmp_path / "new/run")
    claim_folder(tmp_path / "new/run", is_main=False)
    first.send_signal(end)
    first.communicate(timeout=60)
    claim_folder(tmp_path / "new/run")
    claim_folder(tmp_path / "new/run")  # by the same process
    second = other_run(tmp_path / "new/run")
    _, errors = second.communicate(timeout=60)
    assert f"is in use by process {os.getpid()}\n" in errors and list((tmp_path / "new/run").iterdir()) == []


def test_what_cannot_be_an_output_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("a file", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot write to .*/file: .*/file is not a folder"):
        claim_folder(tmp_path / "file")
    with pytest.raises(ValueError, match="cannot write to .*/file/run: .*/file is not a folder"):
        claim_folder(tmp_path / "file/run")
    with pytest.raises(
        ValueError, match="cannot write to /proc/run: /proc is not writable "
    ):  # nobody may write there
        claim_folder("/proc/run")


def test_without_the_systems_list_another_run_has_no_name(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "LOCKS", tmp_path / "none")
    first = other_run(tmp_path / "run")
    assert first.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="run is in use by another run$"):
        claim_folder(tmp_path / "run")
    first.kill()
    first.communicate(timeout=60)


MLLM = {"model": "none", "text_tokenizer": ""}
CLAIMS = {"candidates": {"plain": {}}, "validation": {"a": "."}, "held_out": {"b": "."}}


@pytest.mark.parametrize(
    "script", ["training.train_mllm", "training.train_tokenizer", "training.extract_codes", "eval.claims"]
)
def test_a_second_run_of_any_script_is_refused_before_anything_is_loaded(tmp_path, script, capsys):
    first, module = other_run(tmp_path / "run"), importlib.import_module(script)
    config = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "bf16": False, "text_tokenizer": "none"}
    config |= {"training.train_mllm": MLLM, "eval.claims": CLAIMS}.get(script, {})
    (tmp_path / "run.yaml").write_text(json.dumps(config), encoding="utf-8")
    words = [str(tmp_path / "run.yaml")]
    if script == "training.extract_codes":
        words = ["no.jsonl", str(tmp_path / "run"), "--visual-model", str(SHIPPED_MODEL)]
    assert first.stdout.readline() == "held\n"
    with pytest.raises(SystemExit) as end:
        one_line_errors()(module.__dict__.get("app", module.main))(words)
    said = f"error: the output folder {tmp_path}/run is in use by process {first.pid}\n"
    assert end.value.code == 2 and capsys.readouterr().err == said
    first.kill()
    first.communicate(timeout=60)
