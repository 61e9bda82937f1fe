"""What `save_pretrained` writes, loaded by a process that cannot import this package."""

import inspect
import os
import shutil
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, RepoUrl
from PIL import Image, ImageDraw
from safetensors.torch import load_file

import unitok_mllm
from training.release import save_release
from unitok_mllm import UniTokMLLMForConditionalGeneration, UniTokMLLMProcessor


SHIPPED = f"{unitok_mllm.__path__[0]}/checkpoints/tiny"
NO_PACKAGE = """
import sys

class NoPackage:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "unitok_mllm":
            raise ImportError("not installed here")

sys.meta_path.insert(0, NoPackage())
"""
LOADER = """
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

folder, remote = sys.argv[1], {"trust_remote_code": True}
results = results_of(
    AutoModelForImageTextToText.from_pretrained(f"{folder}/mllm", **remote).eval(),
    AutoModel.from_pretrained(f"{folder}/mllm", **remote).eval(),
    AutoProcessor.from_pretrained(f"{folder}/mllm", **remote),
    AutoModel.from_pretrained(f"{folder}/tokenizer", **remote).eval(),
    AutoImageProcessor.from_pretrained(f"{folder}/tokenizer", **remote),
    AutoModel.from_pretrained(f"{folder}/tower", **remote).eval(),
)
save_file({name: value.contiguous() for name, value in results.items()}, f"{folder}/results.safetensors")
assert not any(name.split(".")[0] == "unitok_mllm" for name in sys.modules)
"""


def results_of(model, base, processor, tokenizer, image_processor, tower) -> dict[str, torch.Tensor]:
    """An answer, a drawing, states, codes and features of one picture; run here, and as source text elsewhere."""
    picture = torch.arange(3 * 40 * 50, dtype=torch.uint8).view(3, 40, 50)
    inputs = processor(text="a red circle", generation_mode="image")
    drawn = model.generate(**inputs, generation_mode="image", guidance_scale=3.0, seed=0)
    chat = [{"type": "image", "image": picture}, {"type": "text", "text": "what color is the shape?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": chat}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    pixels = image_processor(picture)["pixel_values"]
    with torch.no_grad():
        features = tower(pixels).last_hidden_state
        states = base(**inputs).last_hidden_state
    codes = tokenizer.encode(pixels)
    return {"drawn": drawn, "answer": answer, "codes": codes, "features": features, "states": states}


def save_parts(folder, mllm, processor) -> None:
    """The tokenizer, and its tower, in folders of their own."""
    mllm.visual.save_pretrained(folder / "tokenizer")
    processor.image_processor.save_pretrained(folder / "tokenizer")
    mllm.visual.vision_model.save_pretrained(folder / "tower")


def run_elsewhere(python: Path | str, code: str, folder: Path) -> subprocess.CompletedProcess:
    """Runs code in the folder, with the folder as its argument, without the path to this package."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [python, "-c", code, str(folder)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def assert_equal_results(folder, mllm, processor) -> None:
    results = load_file(folder / "results.safetensors")
    visual, base = mllm.visual, mllm.base_model
    expected = results_of(mllm, base, processor, visual, processor.image_processor, visual.vision_model)
    for name in ("features", "states"):
        torch.testing.assert_close(results.pop(name), expected.pop(name))
    for name, value in expected.items():
        assert torch.equal(results[name], value), name


@pytest.mark.full
def test_folders_load_and_agree_where_the_package_is_not_installed(mllm, processor, tmp_path):
    save_parts(tmp_path, mllm, processor)
    mllm.save_pretrained(tmp_path / "mllm")
    processor.save_pretrained(tmp_path / "mllm")
    run = run_elsewhere(
        sys.executable, NO_PACKAGE + "import torch\n" + inspect.getsource(results_of) + LOADER, tmp_path
    )
    assert run.returncode == 0, run.stderr
    assert_equal_results(tmp_path, mllm, processor)


@pytest.fixture
def fresh_python(tmp_path):
    """The Python of a new, empty environment, which is removed afterwards: it takes gigabytes."""
    venv.create(tmp_path / "venv", with_pip=True)
    yield tmp_path / "venv/bin/python"
    shutil.rmtree(tmp_path / "venv")


@pytest.mark.slow  # installs torch
def test_a_release_loads_and_agrees_in_a_fresh_environment(tmp_path, fresh_python):
    """A new environment with what a user has. Without timm, the error names it; with it, all is as here."""
    mllm = UniTokMLLMForConditionalGeneration.from_pretrained(SHIPPED).eval()
    processor = UniTokMLLMProcessor.from_pretrained(SHIPPED)
    save_release(mllm, processor, tmp_path / "mllm", torch.float32)
    save_parts(tmp_path, mllm, processor)

    def install(*packages: str) -> None:
        wanted = [f"{name}=={version(name).split('+')[0]}" for name in packages]
        subprocess.run([fresh_python, "-m", "pip", "install", "--quiet", *wanted], check=True)

    install("torch", "transformers", "safetensors", "pillow", "accelerate")
    code = "import torch\nimport importlib.util\n" + inspect.getsource(results_of) + LOADER
    code += "assert importlib.util.find_spec('unitok_mllm') is None\n"
    run = run_elsewhere(fresh_python, code, tmp_path)
    assert run.returncode and "timm" in run.stderr.splitlines()[-1], run.stderr

    install("timm")
    run = run_elsewhere(fresh_python, code, tmp_path)
    assert run.returncode == 0, run.stderr
    assert_equal_results(tmp_path, mllm, processor)

    picture = Image.new("RGB", (64, 64), "lavender")
    ImageDraw.Draw(picture).ellipse((20, 16, 44, 40), fill="red")
    picture.save(tmp_path / "photo.jpg")
    card = (tmp_path / "mllm/README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    run = run_elsewhere(fresh_python, card.replace("What is this?", "what shape is present?"), tmp_path)
    assert run.stdout.strip() == "circle", run.stderr
    with Image.open(tmp_path / "drawing.png") as drawing:
        assert drawing.size == (64, 64)


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
