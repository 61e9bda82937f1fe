"""The evaluation on emoji resumes where it was stopped, but only with the same settings."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from test_model_card import emoji_data

from eval import emoji as evaluation


pytestmark = pytest.mark.full


@pytest.fixture
def arguments(mllm, processor, tmp_path) -> list[str]:
    for part in (mllm, processor):
        part.save_pretrained(tmp_path / "model")
    paths = ["--model", str(tmp_path / "model"), "--data", str(emoji_data(tmp_path / "emoji"))]
    return [*paths, "--device", "cpu"]


def parts(path: Path) -> dict:
    """Those of a report, without their seconds."""
    found = json.loads(path.read_text(encoding="utf-8"))["parts"]
    return {part: {name: value | {"seconds": 0} for name, value in sets.items()} for part, sets in found.items()}


@pytest.mark.attack
def test_a_signal_keeps_finished_parts_and_the_same_command_goes_on(arguments, tmp_path, monkeypatch, capsys):
    drawing, measured = evaluation.Evaluation.drawing, []

    def told(self, numbers):
        measured.append(numbers)
        if len(measured) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return drawing(self, numbers)

    command = [*arguments, "--output", str(tmp_path / "told.json")]
    evaluation.main([*arguments, "--output", str(tmp_path / "whole.json")])
    monkeypatch.setattr(evaluation.Evaluation, "drawing", told)
    with pytest.raises(SystemExit, match="Finished parts are kept; the same command goes on from there") as end:
        evaluation.main(command)
    assert end.value.code == 143 and list(parts(tmp_path / "told.json")["drawing"]) == ["seen"]
    with monkeypatch.context() as patch:
        patch.setattr(evaluation.Evaluation, "reconstruction", None)
        patch.setattr(evaluation.Evaluation, "naming", None)
        evaluation.main(command)
    assert len(measured) == 3 and parts(tmp_path / "told.json") == parts(tmp_path / "whole.json")
    whole, report = (json.loads((tmp_path / f"{name}.json").read_text("utf-8")) for name in ("whole", "told"))
    assert report["numbers"] == whole["numbers"]
    assert "anew" not in capsys.readouterr().err
    evaluation.main([*command, "--top_k", "3"])
    assert "told.json was measured with another top_k: it is measured anew" in capsys.readouterr().err
    assert len(measured) == 5
    torch.manual_seed(0)
    picture = next((tmp_path / "emoji/images/google").iterdir())
    os.utime(picture, (1, 1))
    evaluation.main([*command, "--top_k", "3"])
    assert "another data_sha256" in capsys.readouterr().err and len(measured) == 7
