"""What `save_pretrained` writes, loaded by a process that cannot import this package."""

import os
import subprocess
import sys

import torch
from huggingface_hub import HfApi, RepoUrl
from safetensors.torch import load_file

from unitok_mllm import UniTokMLLMForConditionalGeneration, UniTokMLLMProcessor


LOADER = """
import sys

class NoPackage:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "unitok_mllm":
            raise ImportError("not installed here")

sys.meta_path.insert(0, NoPackage())
import torch
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

folder = sys.argv[1]
remote = {"trust_remote_code": True}
model = AutoModelForImageTextToText.from_pretrained(f"{folder}/mllm", **remote).eval()
processor = AutoProcessor.from_pretrained(f"{folder}/mllm", **remote)
inputs = processor(text="a red circle", generation_mode="image")
drawn = model.generate(**inputs, generation_mode="image", guidance_scale=3.0, seed=0)
tokenizer = AutoModel.from_pretrained(f"{folder}/tokenizer", **remote).eval()
image_processor = AutoImageProcessor.from_pretrained(f"{folder}/tokenizer", **remote)
picture = torch.arange(3 * 40 * 50, dtype=torch.uint8).view(3, 40, 50)
pixels = image_processor(picture)["pixel_values"]
tower = AutoModel.from_pretrained(f"{folder}/tower", **remote).eval()
with torch.no_grad():
    results = {"drawn": drawn, "codes": tokenizer.encode(pixels), "states": tower(pixels).last_hidden_state}
save_file({name: value.contiguous() for name, value in results.items()}, f"{folder}/results.safetensors")
assert not any(name.split(".")[0] == "unitok_mllm" for name in sys.modules)
"""


def save_all(folder, mllm, processor) -> None:
    mllm.save_pretrained(folder / "mllm")
    processor.save_pretrained(folder / "mllm")
    mllm.visual.save_pretrained(folder / "tokenizer")
    processor.image_processor.save_pretrained(folder / "tokenizer")
    mllm.visual.vision_model.save_pretrained(folder / "tower")


def test_folders_load_and_agree_where_the_package_is_not_installed(mllm, processor, tmp_path):
    save_all(tmp_path, mllm, processor)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOADER, str(tmp_path)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results = load_file(tmp_path / "results.safetensors")

    inputs = processor(text="a red circle", generation_mode="image")
    drawn = mllm.generate(**inputs, generation_mode="image", guidance_scale=3.0, seed=0)
    assert torch.equal(results["drawn"], drawn)
    picture = torch.arange(3 * 40 * 50, dtype=torch.uint8).view(3, 40, 50)
    pixels = processor.image_processor(picture)["pixel_values"]
    assert torch.equal(results["codes"], mllm.visual.encode(pixels))
    with torch.no_grad():
        torch.testing.assert_close(results["states"], mllm.visual.vision_model(pixels).last_hidden_state)


class LocalHub(HfApi):
    """Takes the place of the hub: the calls that would reach it leave what they were given here."""

    def __init__(self):
        super().__init__()
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id, **kwargs):
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()


def test_a_push_uploads_weights_code_and_configuration(mllm, processor, tmp_path, monkeypatch):
    hub = LocalHub()
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or it looks for a model card there
    mllm.push_to_hub("someone/unitok")
    assert {"config.json", "modeling_unitok_mllm.py", "generation_unitok.py", "model.safetensors"} <= hub.files.keys()
    processor.push_to_hub("someone/unitok")
    assert {"processing_unitok.py", "processor_config.json", "tokenizer.json"} <= hub.files.keys()
    for name, data in hub.files.items():
        (tmp_path / name).write_bytes(data)
    again = UniTokMLLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    inputs = UniTokMLLMProcessor.from_pretrained(tmp_path)(text="blue", generation_mode="image")
    drawn = [m.generate(**inputs, generation_mode="image", seed=0) for m in (mllm, again)]
    assert torch.equal(*drawn)
