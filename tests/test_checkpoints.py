"""The search for the newest intact checkpoint."""

import pytest
import torch
from safetensors.torch import save_file

from training.checkpoints import newest_checkpoint


pytestmark = pytest.mark.attack


def test_a_truncated_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, caplog):
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"a": torch.zeros(1000)}, folder / "model.safetensors")
        torch.save({"step": step, "b": torch.zeros(1000)}, folder / "optimizer.pt")
        (folder / "state.json").write_text('{"step": 2}', encoding="utf-8")
        (folder / "whole").touch()
    assert newest_checkpoint(tmp_path, "whole").name == "checkpoint-4" and not caplog.records
    for name in ("model.safetensors", "optimizer.pt", "state.json"):
        path = tmp_path / "checkpoint-4" / name
        data = path.read_bytes()
        for cut in (data[:-1], data[: len(data) // 2], b"", bytes(len(data))):
            path.write_bytes(cut)
            caplog.clear()
            assert newest_checkpoint(tmp_path, "whole").name == "checkpoint-2"
            assert f"checkpoint-4/{name} is broken: " in caplog.text and "the checkpoint before it" in caplog.text
        path.write_bytes(data)
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}/optimizer.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 2 checkpoints in .* is complete: .*checkpoint-4/optimizer.pt"):
        newest_checkpoint(tmp_path, "whole")
    assert newest_checkpoint(tmp_path / "nowhere", "whole") is None
