"""Each case in a process of its own, without the heavy imports of the package."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unitok_mllm import child


pytestmark = pytest.mark.attack


SCRIPT = """
import importlib.util, pathlib, sys, threading, time
spec = importlib.util.spec_from_file_location("child", sys.argv[1])
child = importlib.util.module_from_spec(spec)
spec.loader.exec_module(child)
child.PATIENCE = 1

def work(folder):
    folder = pathlib.Path(folder)
    (folder / "drawing.png").write_text("1")
{work}

print("code", child.run_in_folder(work, "kept-"), flush=True)
"""
WRITES_FOR_EVER = """
    def write():
        for number in range(10**9):
            folder.mkdir(exist_ok=True)
            (folder / f"{number}.png").write_text("1")
    threading.Thread(target=write).start()
    print("ready", flush=True)
    time.sleep(60)
"""
IGNORES = """
    import signal
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    print("ready", flush=True)
    while True:
        time.sleep(1)
"""


def start(work: str, temporary: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT.replace("{work}", work), child.__file__]
    environment = os.environ | {"TMPDIR": str(temporary)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("work", [WRITES_FOR_EVER, IGNORES], ids=["writing", "ignoring"])
@pytest.mark.parametrize("to_all", [False, True], ids=["to the parent", "to both, twice"])
def test_a_signal_ends_it_and_leaves_nothing(tmp_path, number, work, to_all):
    process = start(work, tmp_path)
    assert process.stdout.readline() == "ready\n" and len(list(tmp_path.glob("kept-*"))) == 1
    for _ in range(2 if to_all else 1):
        os.killpg(process.pid, number) if to_all else process.send_signal(number)
    assert ended(process) == (0, "code 0\n", "") and list(tmp_path.iterdir()) == []


def test_it_ends_when_the_parent_is_killed(tmp_path):
    process = start('    print("ready", flush=True)\n    time.sleep(60)', tmp_path)
    process.stdout.readline()
    process.kill()
    ended(process)
    deadline = time.monotonic() + 30
    while list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "work, code, out, err",
    [
        ("    pass", 0, "code 0\n", ""),
        ("    sys.exit(2)", 0, "code 2\n", ""),
        ("    sys.exit('no')", 0, "code 1\n", ""),
        ("    1 / 0", 0, "code 1\n", "ZeroDivisionError"),
        ("    import os; os.kill(os.getpid(), 9)", 1, "", "ValueError: the process was ended by SIGKILL"),
        ("    import tempfile; print(tempfile.gettempdir() == str(folder))", 0, "True\ncode 0\n", ""),
    ],
)
def test_how_it_ends_by_itself(tmp_path, work, code, out, err):
    result = ended(start(work, tmp_path))
    assert result[:2] == (code, out) and err in result[2] and list(tmp_path.iterdir()) == []
