import re
from pathlib import Path

from PIL import Image


README = Path(__file__).parent.parent / "README.md"


def test_examples_run_as_written_and_the_shipped_model_answers_right(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(examples) == 4
    names = {}
    exec("\n".join(examples), names)
    assert "red" in capsys.readouterr().out.split()
    assert Image.open("triangle.png").size == (64, 64)
    assert names["loss"].item() > 0
