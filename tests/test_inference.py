"""Loading a damaged or hostile folder: refused by name, before memory is allocated, and without executing anything."""

import json
import math
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import fail

from unitok_mllm import inference
from unitok_mllm.inference import load


pytestmark = pytest.mark.attack


def damaged_weights(data: bytes, rng: np.random.Generator) -> dict[str, bytes]:
    """Files that are no longer what they were, by what was done to them."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    made = {f"cut to {size}": data[:size] for size in (0, 4, 8, 100, 8 + length, len(data) - 1)}
    made |= {f"header of {size}": struct.pack("<Q", size) + data[8:] for size in (0, length - 1, 2**31, 2**64 - 1)}
    huge = header | {"embedder.fc1.weight": header["embedder.fc1.weight"] | {"shape": [2**40, 2**40]}}
    negative = header | {"embedder.fc1.weight": header["embedder.fc1.weight"] | {"shape": [-1, 40]}}
    for name, changed in (("huge", huge), ("negative", negative), ("no", {}), ("list", [])):
        written = json.dumps(changed).encode()
        made[f"{name} shape"] = struct.pack("<Q", len(written)) + written + data[8 + length :]
    for number in range(30):
        place = rng.integers(8, 8 + length)
        other = int(rng.choice([byte for byte in range(32 if number % 3 else 0, 127) if byte != data[place]]))
        made[f"byte {place} is {other}"] = data[:place] + bytes([other]) + data[place + 1 :]
    return made


def test_damaged_weights_are_refused_by_name(saved_mllm):
    path = saved_mllm / "model.safetensors"
    whole = load_file(path)
    for damage, data in damaged_weights(path.read_bytes(), np.random.default_rng(0)).items():
        path.write_bytes(data)
        with pytest.raises(ValueError, match="^cannot load the model in .*model: .*(model.safetensors|weights)"):
            load(saved_mllm)
            pytest.fail(damage)
    for name, shape in (
        ("embedder.fc1.weight", (64, 41)),
        ("depth_head.head.bias", ()),
        ("visual.decoder.norm.bias", (1,)),
    ):
        save_file(whole | {name: torch.zeros(shape)}, path, {"format": "pt"})
        with pytest.raises(ValueError, match=f"do not fit its config: .*mismatched_keys.*{name}"):
            load(saved_mllm)
    save_file({name: value for name, value in whole.items() if "norm" not in name}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="do not fit its config: .*missing_keys.*norm"):
        load(saved_mllm)


@pytest.mark.parametrize(
    "part, name, value",
    [
        ("text_config", "vocab_size", 4_000_000),
        ("text_config", "num_hidden_layers", 900),
        ("text_config", "intermediate_size", 10_000_000),
        ("depth_config", "hidden_size", 60_000),
    ],
)
def test_a_config_far_larger_than_the_weights_is_refused_before_memory_is_taken(saved_mllm, part, name, value):
    config = json.loads((saved_mllm / "config.json").read_text(encoding="utf-8"))
    config[part][name] = value
    (saved_mllm / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"its config asks for \d+ parameters, its weights hold \d+"):
        load(saved_mllm)


def changed_config(folder: Path, part: str | None, **values) -> Path:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (config if part is None else config[part]).update(values)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "part, values, message",
    [
        (None, {"dtype": "floaty16"}, "floaty16"),
        (None, {"quantization_config": {"quant_method": "wishes"}}, "wishes"),
        (None, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "cannot load"),
        (None, {"attn_implementation": "wishful"}, "wishful"),
        ("text_config", {"quantization_config": 3}, "cannot load"),
        ("text_config", {"rope_parameters": {"rope_type": "wrong", "rope_theta": 1.0}}, "wrong"),
        ("text_config", {"rope_parameters": {"rope_type": "yarn", "rope_theta": "x"}}, "cannot load"),
        ("text_config", {"rope_parameters": []}, "rope_parameters"),
        ("text_config", {"model_type": "nothing"}, "nothing"),
        ("text_config", {"hidden_act": "grelu"}, "grelu"),
        ("text_config", {"num_attention_heads": 0}, "cannot load"),
        ("text_config", {"head_dim": -4}, "cannot load"),
        (None, {"boi_token_id": "x"}, "boi_token_id"),
        (None, {"text_config": []}, "text_config"),
        (None, {"model_type": ["unitok_mllm"]}, "model type"),
    ],
    ids=str,
)
def test_a_hostile_config_ends_in_one_line(saved_mllm, part, values, message):
    assert message in fail("generate", "red", "--model", changed_config(saved_mllm, part, **values))


def test_pickled_weights_load_without_being_executed_or_are_refused(saved_mllm, tmp_path, lively_mllm):
    state = load_file(saved_mllm / "model.safetensors")
    (saved_mllm / "model.safetensors").unlink()
    torch.save(state, saved_mllm / "pytorch_model.bin")
    model, _ = load(saved_mllm)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items() if name in state)

    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    for content in ({"a": Attack()}, [1, 2], "words"):
        torch.save(content, saved_mllm / "pytorch_model.bin")
        assert "cannot load the model in" in fail("generate", "red", "--model", saved_mllm)
    (saved_mllm / "pytorch_model.bin").write_bytes(b"no weights")
    assert "cannot load the model in" in fail("generate", "red", "--model", saved_mllm)
    assert not (tmp_path / "executed").exists()
    torch.save(state, saved_mllm / "stored.bin")
    with (
        zipfile.ZipFile(saved_mllm / "stored.bin") as stored,
        zipfile.ZipFile(saved_mllm / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for member in stored.infolist():
            archive.writestr(member.filename, bytes(10**8) if member.filename.endswith("/0") else stored.read(member))
    (saved_mllm / "stored.bin").unlink()
    assert "claims to hold" in fail("generate", "red", "--model", saved_mllm)


def test_tables_computed_from_a_config_and_weights_in_pickles_count_before_memory_is_taken(saved_mllm):
    state = load_file(saved_mllm / "model.safetensors")
    gpt = {"model_type": "gptj", "vocab_size": 300, "n_embd": 64, "n_layer": 1, "n_head": 4, "rotary_dim": 8}
    config = json.loads((saved_mllm / "config.json").read_text(encoding="utf-8"))
    changed_config(saved_mllm, None, text_config=gpt | {"n_positions": 10**8})
    with pytest.raises(ValueError, match=r"its config asks for tables of 80000\d{4} numbers besides \d+ parameters"):
        load(saved_mllm)
    (saved_mllm / "model.safetensors").unlink()
    torch.save(state, saved_mllm / "pytorch_model.bin")
    (saved_mllm / "config.json").write_text(json.dumps(config), encoding="utf-8")
    changed_config(saved_mllm, "text_config", intermediate_size=10_000_000)
    with pytest.raises(ValueError, match=r"its config asks for \d+ parameters, its weights hold \d+"):
        load(saved_mllm)


@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences"])
@pytest.mark.parametrize("value", [10**6, 0, -1])
def test_a_generation_config_that_asks_for_too_much_is_refused(saved_mllm, name, value):
    generation = json.loads((saved_mllm / "generation_config.json").read_text(encoding="utf-8"))
    (saved_mllm / "generation_config.json").write_text(json.dumps(generation | {name: value}), encoding="utf-8")
    assert name in fail("generate", "red", "--model", saved_mllm)


def test_weights_that_are_not_finite_are_refused_by_name(saved_mllm):
    state = load_file(saved_mllm / "model.safetensors")
    for value in (math.nan, math.inf):
        changed = state | {"embedder.fc1.weight": torch.full_like(state["embedder.fc1.weight"], value)}
        save_file(changed, saved_mllm / "model.safetensors", {"format": "pt"})
        assert "its weight embedder.fc1.weight is not finite" in fail("generate", "red", "--model", saved_mllm)


@pytest.mark.parametrize(
    "template, message",
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "takes more than 1 seconds",
        ),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{{ 'a' * 10**14 }}", "cannot load the model in"),
        ("{% for a in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ nothing.of.this }}", "undefined"),
        ("{% for %}", "cannot load the model in"),
        ("{{ raise_exception('never') }}", "never"),
    ],
)
def test_a_hostile_chat_template_ends_in_one_line(saved_mllm, monkeypatch, template, message):
    monkeypatch.setattr(inference, "TEMPLATE_SECONDS", 1)
    (saved_mllm / "chat_template.jinja").write_text(template, encoding="utf-8")
    assert message in fail("generate", "red", "--model", saved_mllm)
