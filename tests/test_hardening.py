"""What nobody should hand in, and what nobody should do: each gives what it should, or one clear error."""

import base64
import dataclasses
import io
import itertools
import json
import math
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset as wds
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors.torch import load_file, save_file
from test_train_tokenizer import small_model, trainer_of
from transformers import PreTrainedConfig, TrainingArguments
from transformers.models.llama import LlamaTokenizer
from typer.testing import CliRunner, Result

from training import train_mllm, train_tokenizer
from training.arguments import TRUSTED, parse_yaml_and_command_line
from training.checkpoints import newest_checkpoint
from training.codes import CodeStore, write_metadata, write_shard
from training.data import MLLMCollator, MLLMDataset, SampleTexts, Source
from training.errors import one_line_errors
from training.files import ImageStore, UnusableSample, decode_image, load_sample_image, read_rows, write_atomically
from training.image_text_data import ImageTextStream, check_shards
from training.mllm_trainer import MLLMTrainer, set_visual_aside
from training.release import save_release, write_folder
from unitok_mllm import (
    UniTokConfig,
    UniTokDepthConfig,
    UniTokImageProcessor,
    UniTokMLLMConfig,
    UniTokMLLMForConditionalGeneration,
    UniTokMLLMProcessor,
    UniTokVisionConfig,
    cli,
    image_processing_unitok,
    inference,
)
from unitok_mllm.image_processing_unitok import load_image


ROOT = Path(__file__).parents[1]
BOS, EOS, BOI, EOI, IMAGE = 1, 2, 3, 4, 5
K, L, V = 4, 9, 32
GIB = 2**30


@pytest.fixture
def folder(tmp_path, lively_mllm, processor) -> Path:
    """A saved MLLM."""
    lively_mllm.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "picture.png"
    Image.effect_noise((40, 30), 90).convert("RGB").save(path)
    return path


def run(*args: object) -> Result:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def failure(*args: object) -> str:
    """The one line that a command fails with."""
    result = run(*args)
    assert result.exit_code == 2 and result.stdout == "", (result.output, result.exception)
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("seed ")]
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


# --- images ---


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_odd_and_malformed_images_are_read_or_refused_in_bounded_time_and_memory(count):
    """In a process of its own: a crash, a hang and the memory are those of the images alone."""
    command = [sys.executable, str(Path(__file__).with_name("mutations.py")), str(count)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120 + count // 10)
    assert ended.returncode == 0, ended.stderr[-2000:]
    report = json.loads(ended.stdout.splitlines()[-1])
    print(f"\n{'':22}{'read':>7}{'refused':>9}")
    for kind, outcomes in report["counts"].items():
        print(f"{kind:22}{outcomes['read']:7}{outcomes['refused']:9}")
    print(
        f"slowest {report['slowest'][0]:.1f} s (number {report['slowest'][1]}), memory {report['memory'] / GIB:.2f} GiB"
    )
    assert report["num_wrong"] == 0, report["wrong"]
    assert sum(sum(outcomes.values()) for outcomes in report["counts"].values()) == count
    assert report["counts"]["decompression bomb"]["read"] == -(-(count - 999) // 2500)
    assert report["counts"].pop("intact")["refused"] == 0
    assert min(min(outcomes.values()) for outcomes in report["counts"].values()) > 0
    assert report["memory"] < 3 * GIB and report["slowest"][0] < 30


def test_a_picture_is_the_same_as_a_path_as_bytes_and_as_a_url(picture):
    data = picture.read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    expected = load_image(picture).tobytes()
    for source in (str(picture), data, url, Image.open(picture), Image.open(io.BytesIO(data))):
        assert load_image(source).tobytes() == expected
    assert decode_image(data).tobytes() == expected
    processor = UniTokImageProcessor(size=48)
    assert torch.equal(processor([data, url]).pixel_values, processor([picture, picture]).pixel_values)


@pytest.mark.parametrize(
    "source, message",
    [
        (b"", "cannot read image '0 bytes': cannot identify"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "cannot identify"),
        ("http://no such host/a.png", "cannot read image 'http://no such host/a.png': .*URL can't contain"),
        ("a\0b.png", "cannot read image .*null"),
        (Image.new("RGB", (0, 3)), "expected a non-empty array of pixels, got 'RGB image of 0x3'"),
        (Image.new("F", (3, 3), math.nan), "cannot read image 'F image of 3x3': pixel values contain NaN"),
        (3, "cannot read image '3': expected str"),
    ],
)
def test_what_is_no_picture_is_named(source, message):
    with pytest.raises(ValueError, match=message):
        load_image(source)


def test_a_name_given_is_the_name_in_errors():
    with pytest.raises(ValueError, match="cannot read image 'shard 7, cat.jpg': cannot identify"):
        load_image(b"no picture", "shard 7, cat.jpg")
    with pytest.raises(UnusableSample, match="cannot read image 'cat.jpg'"):
        decode_image(b"no picture", "cat.jpg")


def test_a_url_gives_no_more_than_its_share(monkeypatch, picture):
    monkeypatch.setattr(image_processing_unitok, "URL_BYTES", 100)
    with pytest.raises(ValueError, match="cannot read image 'data:image/png.*: more than 100 bytes"):
        load_image("data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode())


def test_one_function_opens_every_picture_from_outside():
    """The others read what a package or this project itself has written."""
    opens = {
        str(path.relative_to(ROOT))
        for package in ("unitok_mllm", "training", "eval")
        for path in (ROOT / package).rglob("*.py")
        if "Image.open(" in path.read_text(encoding="utf-8")
    }
    own = {f"training/{name}.py" for name in ("prepare_data", "emoji", "model_card")}
    own |= {"eval/judge.py", "eval/text_to_image.py"}
    assert opens == {"unitok_mllm/image_processing_unitok.py", *own}


# --- weights and configs ---


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


def test_damaged_weights_are_refused_by_name(folder):
    path = folder / "model.safetensors"
    whole = load_file(path)
    for damage, data in damaged_weights(path.read_bytes(), np.random.default_rng(0)).items():
        path.write_bytes(data)
        with pytest.raises(ValueError, match="^cannot load the model in .*model: .*(model.safetensors|weights)"):
            cli.load(folder)
            pytest.fail(damage)
    for name, shape in (
        ("embedder.fc1.weight", (64, 41)),
        ("depth_head.head.bias", ()),
        ("visual.decoder.norm.bias", (1,)),
    ):
        save_file(whole | {name: torch.zeros(shape)}, path, {"format": "pt"})
        with pytest.raises(ValueError, match=f"do not fit its config: .*mismatched_keys.*{name}"):
            cli.load(folder)
    save_file({name: value for name, value in whole.items() if "norm" not in name}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="do not fit its config: .*missing_keys.*norm"):
        cli.load(folder)


@pytest.mark.parametrize(
    "part, name, value",
    [
        ("text_config", "vocab_size", 4_000_000),
        ("text_config", "num_hidden_layers", 900),
        ("text_config", "intermediate_size", 10_000_000),
        ("depth_config", "hidden_size", 60_000),
    ],
)
def test_a_config_far_larger_than_the_weights_is_refused_before_memory_is_taken(folder, part, name, value):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config[part][name] = value
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"its config asks for \d+ parameters, its weights hold \d+"):
        cli.load(folder)


@pytest.mark.parametrize("config_class", [UniTokVisionConfig, UniTokConfig, UniTokDepthConfig, UniTokMLLMConfig])
def test_absurd_values_in_a_config_are_refused_with_field_and_value(config_class):
    own = config_class.__annotations__.keys() & {field.name for field in dataclasses.fields(config_class)}
    assert len(own) >= 4
    for name, value in itertools.product(sorted(own), (-1, 10**15, -math.inf, math.inf, math.nan, "much")):
        with pytest.raises(StrictDataclassError) as error:
            config_class(**{name: value})
        assert name in str(error.value) and str(value) in str(error.value), (name, value, str(error.value))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: UniTokVisionConfig(stage_dims=(160, -5)), r"stage_dims \(\(160, -5\)\) is not between 1 and 65536"),
        (lambda: UniTokVisionConfig(stage_depths=(0, 4)), r"stage_depths \(\(0, 4\)\) is not between 1 and 1000"),
        (lambda: UniTokVisionConfig(image_size=2**20), r"image_size \(1048576\) is not between 16 and 16384"),
        (lambda: UniTokConfig(text_config={"vocab_size": 10**12}), r"text_config.vocab_size \(1000000000000\)"),
        (lambda: UniTokConfig(text_config={"num_hidden_layers": -3}), r"text_config.num_hidden_layers \(-3\)"),
        (lambda: UniTokDepthConfig(hidden_act="grelu"), r"hidden_act \('grelu'\) is no activation"),
        (
            lambda: UniTokDepthConfig(hidden_size=100, num_attention_heads=3),
            r"hidden_size \(100\) is not a multiple of num_attention_heads \(3\)",
        ),
        (lambda: UniTokMLLMConfig(boi_token_id=32000, image_token_id=5), r"boi_token_id \(32000\) is not .* 31999"),
        (
            lambda: UniTokMLLMConfig(depth_config={"num_attention_heads": 7}),
            r"hidden_size \(4096\) is not a multiple of num_attention_heads \(7\)",
        ),
        (
            lambda: UniTokMLLMConfig(text_config={"model_type": "llama", "vocab_size": 0}),
            r"text_config.vocab_size \(0\) is not between 1 and 4194304",
        ),
    ],
)
def test_parts_and_lists_of_a_config_are_checked_too(build: Callable[[], PreTrainedConfig], message):
    with pytest.raises(StrictDataclassError, match=message):
        build()


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
def test_a_hostile_config_ends_in_one_line(folder, part, values, message):
    assert message in failure("generate", "red", "--model", changed_config(folder, part, **values))


def test_pickled_weights_load_without_being_executed_or_are_refused(folder, tmp_path, lively_mllm):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    model, _ = cli.load(folder)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items() if name in state)

    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    for content in ({"a": Attack()}, [1, 2], "words"):
        torch.save(content, folder / "pytorch_model.bin")
        assert "cannot load the model in" in failure("generate", "red", "--model", folder)
    (folder / "pytorch_model.bin").write_bytes(b"no weights")
    assert "cannot load the model in" in failure("generate", "red", "--model", folder)
    assert not (tmp_path / "executed").exists()
    torch.save(state, folder / "stored.bin")
    with (
        zipfile.ZipFile(folder / "stored.bin") as stored,
        zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for member in stored.infolist():
            archive.writestr(member.filename, bytes(10**8) if member.filename.endswith("/0") else stored.read(member))
    (folder / "stored.bin").unlink()
    assert "says to hold" in failure("generate", "red", "--model", folder)


def test_tables_computed_from_a_config_and_weights_in_pickles_count_before_memory_is_taken(folder):
    state = load_file(folder / "model.safetensors")
    gpt = {"model_type": "gptj", "vocab_size": 300, "n_embd": 64, "n_layer": 1, "n_head": 4, "rotary_dim": 8}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    changed_config(folder, None, text_config=gpt | {"n_positions": 10**8})
    with pytest.raises(ValueError, match=r"its config asks for tables of 80000\d{4} numbers beside \d+ parameters"):
        cli.load(folder)
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    changed_config(folder, "text_config", intermediate_size=10_000_000)
    with pytest.raises(ValueError, match=r"its config asks for \d+ parameters, its weights hold \d+"):
        cli.load(folder)


@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences"])
@pytest.mark.parametrize("value", [10**6, 0, -1])
def test_a_generation_config_that_asks_for_too_much_is_refused(folder, name, value):
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    (folder / "generation_config.json").write_text(json.dumps(generation | {name: value}), encoding="utf-8")
    assert name in failure("generate", "red", "--model", folder)


def test_weights_that_are_not_finite_are_refused_by_name(folder):
    state = load_file(folder / "model.safetensors")
    for value in (math.nan, math.inf):
        changed = state | {"embedder.fc1.weight": torch.full_like(state["embedder.fc1.weight"], value)}
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        assert "its weight embedder.fc1.weight is not finite" in failure("generate", "red", "--model", folder)


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
def test_a_hostile_chat_template_ends_in_one_line(folder, monkeypatch, template, message):
    monkeypatch.setattr(inference, "TEMPLATE_SECONDS", 1)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    assert message in failure("generate", "red", "--model", folder)


def test_what_is_no_regular_file_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "fifo.png")
    for path in (tmp_path / "fifo.png", tmp_path / "link.png", "/dev/zero", tmp_path):
        with pytest.raises(ValueError, match=f"cannot read image '{path}': not a regular file"):
            load_image(path)
        with pytest.raises(UnusableSample, match="not a regular file"):
            load_sample_image(Path(path))


# --- codes and tables ---


METADATA = {"format": "parquet", "variants": 1, "num_codebooks": K, "codebook_size": V, "num_positions": L}


def code_folder(folder: Path, **changes) -> Path:
    """A folder with one shard of one image."""
    metadata = METADATA | {"num_shards": 1} | changes
    write_metadata(folder, METADATA | {"num_shards": 1, "format": metadata["format"]})
    (folder / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
    suffix = "tar" if metadata["format"] == "webdataset" else "parquet"
    write_shard(folder / f"000000.{suffix}", {"a.png": torch.arange(K * L).view(1, K, L) % V})
    return folder


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": "zip"}, "format is parquet or webdataset, got 'zip'"),
        ({"variants": 0}, "variants is an integer from 1 to .*, got 0"),
        ({"num_codebooks": -4}, "num_codebooks .* got -4"),
        ({"codebook_size": "32"}, "codebook_size .* got '32'"),
        ({"num_positions": 10**12}, "num_positions .* got 1000000000000"),
        ({"num_positions": 9.5}, "num_positions .* got 9.5"),
        ({"num_shards": None}, "num_shards .* got None"),
        ({"num_shards": True}, "num_shards .* got True"),
    ],
)
def test_settings_of_codes_that_cannot_be_are_named(tmp_path, changes, message):
    code_folder(tmp_path)
    (tmp_path / "metadata.json").write_text(json.dumps(METADATA | {"num_shards": 1} | changes), encoding="utf-8")
    with pytest.raises(ValueError, match=f"metadata.json is broken: {message}"):
        CodeStore(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\xff"])
def test_settings_of_codes_that_are_no_settings_are_named(tmp_path, content):
    code_folder(tmp_path)
    (tmp_path / "metadata.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="metadata.json is broken: "):
        CodeStore(tmp_path)


def test_broken_parquet_shards_are_named(tmp_path):
    shard = code_folder(tmp_path) / "000000.parquet"
    data = shard.read_bytes()
    for size in (0, 3, len(data) // 2, len(data) - 1):
        shard.write_bytes(data[:size])
        with pytest.raises(ValueError, match="000000.parquet is broken: "):
            CodeStore(tmp_path)
    for columns in ({"key": ["a"]}, {"key": ["a"], "codes": [3]}, {"key": [1], "codes": [b""]}):
        pq.write_table(pa.table(columns), shard)
        with pytest.raises(
            ValueError, match="000000.parquet has the columns key .* expected key string, codes binary"
        ):
            CodeStore(tmp_path)
    for number, codes in enumerate((b"", b"123", bytes(2 * K * L - 2), None)):
        table = pa.table({"key": ["a.png"], "codes": pa.array([codes], pa.binary())})
        pq.write_table(table, shard)
        os.utime(shard, (number, number))  # or the library would know the file
        with pytest.raises(ValueError, match=f"codes of a.png in {tmp_path}"):
            CodeStore(tmp_path)["a.png"]


def test_broken_tar_shards_and_what_lies_in_them_are_named(tmp_path):
    shard = code_folder(tmp_path, format="webdataset") / "000000.tar"
    data = shard.read_bytes()
    for size in (0, 100, 700):
        shard.write_bytes(data[:size])
        with pytest.raises(ValueError, match="cannot read .*000000.tar: "):
            CodeStore(tmp_path)
        with pytest.raises(ValueError, match="cannot read .*000000.tar: "):
            ImageStore(str(shard))
    good = np.zeros((1, K, L), np.uint16)
    for array, message in (
        (good.astype(np.float32), "are float32, not integers"),
        (good.astype(bool), "are bool, not integers"),
        (good.astype(np.int64) - 1, "go down to -1"),
        (good + V, f"reach {V}, but there are {V} in a codebook"),
        (good[:, :-1], r"are \(1, 3, 9\), expected \(1, 4, 9\)"),
        (good[0], r"are \(4, 9\), expected \(1, 4, 9\)"),
        (np.zeros(0, np.uint16), r"are \(0,\), expected"),
    ):
        with wds.TarWriter(str(shard)) as writer:
            writer.write({"__key__": "a.png", "npy": array})
        with pytest.raises(ValueError, match=f"The codes of a.png in .*000000.tar {message}"):
            CodeStore(tmp_path)["a.png"]
    objects = io.BytesIO()
    np.save(objects, np.array([{"a": 1}]), allow_pickle=True)
    archive = io.BytesIO()
    np.savez_compressed(archive, codes=np.zeros(10**6, np.uint16))
    large = io.BytesIO()
    np.lib.format.write_array_header_1_0(large, {"descr": "<u2", "fortran_order": False, "shape": (10**15,)})
    for content in (b"", b"none", objects.getvalue(), archive.getvalue(), large.getvalue()):
        with wds.TarWriter(str(shard), encoder=False) as writer:
            writer.write({"__key__": "a.png", "npy": content})
        with pytest.raises(ValueError, match="cannot read the codes of a.png in .*000000.tar: "):
            CodeStore(tmp_path)["a.png"]


@pytest.mark.parametrize(
    "name, content",
    [
        ("rows.json", b"[{"),
        ("rows.json", b"\xff\xfe"),
        ("rows.json", b'{"image": "a.png"}'),
        ("rows.json", b"[1, 2]"),
        ("rows.jsonl", b'{"image": "a.png"}\n{"ima'),
        ("rows.jsonl", b"\xff\xfe\x00"),
        ("rows.parquet", b""),
        ("rows.parquet", b"PAR1 none PAR1"),
    ],
)
def test_broken_tables_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"data file .*{name}"):
        read_rows(tmp_path / name)


# --- prompts ---


ODD_TEXTS = {
    "empty": "",
    "control characters": "a\x00b\x07\x1b[31m\r\n\t\x7f\u0085",
    "right to left": "\u202eمربع أحمر \u05d0\u05d3\u05d5\u05dd\u202c",
    "joined and astral": "👩‍👩‍👧‍👦 e\u0301 \U000f1234",
    "placeholder": "is <image> an <image><image>?",
    "special tokens": "<s>red</s><boi>blue<eoi><pad> <boi><image><eoi>",
}


@pytest.mark.parametrize("name", ODD_TEXTS)
def test_odd_texts_are_plain_text_by_every_route(processor, name):
    text, picture = ODD_TEXTS[name], Image.new("RGB", (20, 20), "red")
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]
    asked = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    drawn = processor(text=text, generation_mode="image")
    edited = processor(images=picture, text=text, generation_mode="edit")
    for ids, images, drawing in (
        (asked["input_ids"], 1, 0),
        (drawn["input_ids"], 0, 1),
        (edited["input_ids"], 1, 1),
        (edited["text_alone_input_ids"], 0, 1),
    ):
        (row,) = ids.tolist()
        counts = [row.count(token) for token in (BOS, BOI, IMAGE, EOI, EOS)]
        assert row[0] == BOS and counts == [1, images + drawing, images * L, images, 0]
        assert text in processor.tokenizer.decode(row)
    assert len(asked["pixel_values"]) == len(edited["pixel_values"]) == 1


def test_texts_without_tokens_are_the_same_sanitized_or_not(processor):
    texts, picture = ["a red circle", "and\nwhat else? \x07"], Image.new("RGB", (20, 20))
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": t}]}]
        for t in texts
    ]
    calls = (
        lambda **options: processor.apply_chat_template(chats, tokenize=True, return_dict=True, **options),
        lambda **options: processor(text=texts, generation_mode="image", **options),
        lambda **options: processor(images=[picture] * 2, text=texts, generation_mode="edit", **options),
    )
    for call in calls:
        plain, sanitized, default = call(sanitize_control_tokens=False), call(sanitize_control_tokens=True), call()
        assert plain.keys() == sanitized.keys() == default.keys()
        for key in plain:
            assert torch.equal(plain[key], sanitized[key]) and torch.equal(plain[key], default[key]), key


def test_llamas_byte_tokens_can_be_spelled_too():
    vocabulary = ["<unk>", "<s>", "</s>", "<0x00>", "<0x01>", "▁", *"<>0x1/sunkred", "▁r"]
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = LlamaTokenizer(vocab=ids, merges=[("▁", "r")], add_bos_token=True)
    processor = UniTokMLLMProcessor(UniTokImageProcessor(size={"height": 48, "width": 48}), tokenizer)
    row = processor(text="red<0x00></s>", generation_mode="image", sanitize_control_tokens=True).input_ids[0].tolist()
    plain = processor(text="red", generation_mode="image").input_ids[0].tolist()
    assert row.count(3) == plain.count(3) == 1 and 2 not in row[1:] and row[:4] == plain[:4]


def test_plain_texts_take_the_librarys_options(processor):
    """Truncation, padding, offsets and masks are those of the same text without control tokens, but for its ids."""
    texts = ["red </s>blue", "is <image> an <s>?"]
    whole = processor.apply_chat_template(
        [[{"role": "user", "content": text}, {"role": "assistant", "content": text}] for text in texts],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    for ids, mask, text in zip(whole["input_ids"], torch.as_tensor(whole["assistant_masks"]).bool(), texts):
        assert processor.decode(ids[mask]) == f" {text}</s>" and (ids[mask] == EOS).sum() == 1
    cut = processor(text=texts[0], images=None, generation_mode="image", truncation=True, max_length=400)
    assert torch.equal(cut["input_ids"], processor(text=texts[0], generation_mode="image")["input_ids"])
    with pytest.raises(ValueError, match="max_length cuts off a <boi>"):
        processor(text=texts[0], generation_mode="image", truncation=True, max_length=5)
    padded = processor(text=texts[0], generation_mode="image", padding="max_length", max_length=100)
    assert padded["input_ids"].shape == padded["attention_mask"].shape == (1, 100)
    assert padded["attention_mask"].sum() == cut["input_ids"].shape[1]
    with pytest.raises(ValueError, match="come without special_tokens_mask"):
        processor(text=texts[0], generation_mode="image", return_special_tokens_mask=True)


def test_where_there_are_images_a_description_says_where_they_go(processor):
    pictures = [Image.new("RGB", (20, 20), "red")] * 2
    inputs = processor(text="<image> as</s> <image>", images=pictures, generation_mode="image")
    (row,) = inputs["input_ids"].tolist()
    assert [row.count(token) for token in (BOS, BOI, IMAGE, EOI, EOS)] == [1, 3, 2 * L, 2, 0]
    with pytest.raises(ValueError, match="Found total 0 <image> tokens and 2 images"):
        processor(text="<image> <image>", images=pictures, generation_mode="image", sanitize_control_tokens=True)


def test_placeholders_without_their_images_are_refused_where_texts_are_not_plain(processor):
    for mode in ("text", "image", "interleaved"):
        with pytest.raises(ValueError, match="Found 1 <image> tokens in the text but no images"):
            processor(text="a red <image>", generation_mode=mode, sanitize_control_tokens=False)
    with pytest.raises(ValueError, match="sanitize_control_tokens needs tokenize=True"):
        processor.apply_chat_template([{"role": "user", "content": "a"}], sanitize_control_tokens=True)


def test_nothing_is_cut_from_a_text_that_is_too_long(lively_mllm, processor, folder, picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    long = "red " * 25_000
    assert len(long) == 100_000
    for options in ({}, {"sanitize_control_tokens": True}):
        inputs = processor(text=long, generation_mode="image", **options)
        assert long in processor.tokenizer.decode(inputs["input_ids"][0])
        message = rf"prompt is too long: {inputs['input_ids'].shape[1]} tokens, and 9 to follow, .* 256 positions"
        with pytest.raises(ValueError, match=message):
            lively_mllm.generate(**inputs, generation_mode="image")
    inputs = processor(text=long)
    for mode in ("text", "interleaved"):
        with pytest.raises(ValueError, match=r"prompt is too long: .* and 1 to follow"):
            lively_mllm.generate(**inputs, generation_mode=mode, max_new_tokens=1)
    assert "prompt is too long" in failure("generate", long, "--model", folder)
    assert "prompt is too long" in failure("ask", picture, long, "--model", folder)
    assert "prompt is too long" in failure("edit", picture, long, "--model", folder)


@pytest.mark.parametrize("name", ["right to left", "special tokens"])
def test_odd_texts_on_the_command_line(folder, picture, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    text, model = ODD_TEXTS[name], ("--model", folder)
    for args in (
        ("ask", picture, text, "--max-new-tokens", 2),
        ("generate", text, "--seed", 1),
        ("edit", picture, text),
    ):
        result = run(*args, *model)
        assert result.exit_code == 0, (args, result.output, result.exception)
    assert Image.open("unitok-drawing.png").size == Image.open("unitok-edit.png").size == (48, 48)


# --- threads ---


def test_two_threads_get_what_they_get_alone(lively_mllm, processor):
    picture = Image.effect_noise((40, 30), 90).convert("RGB")
    requests = []
    for text, guidance in (("a red circle", 3.0), ("what is the blue shape?", 1.0)):
        inputs = processor(text=[text, "red"], generation_mode="image")
        requests.append({**inputs, "generation_mode": "image", "seed": [3, 4], "guidance_scale": guidance})
        asked = processor(text=f"<image> {text}", images=picture)
        requests.append({**asked, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False})
    alone = [lively_mllm.generate(**request) for request in requests]
    with ThreadPoolExecutor(2) as pool:
        order = [0, 1, 2, 3, 3, 2, 1, 0, 0, 2, 1, 3] * 2
        together = list(pool.map(lambda number: lively_mllm.generate(**requests[number]), order))
    assert not torch.equal(alone[0], alone[2])
    for number, result in zip(order, together):
        assert torch.equal(result, alone[number]), number


def test_a_thread_that_computes_losses_leaves_one_that_generates_alone(lively_mllm, processor):
    asked = {**processor(text="what is red?"), "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    alone, learned = lively_mllm.generate(**asked), processor(text="a red circle")

    def losses() -> list[float]:
        options = {"labels": learned["input_ids"], "logits_at_targets": True}
        return [lively_mllm(**learned, **options).loss.item() for _ in range(20)]

    with ThreadPoolExecutor(1) as pool:
        computed = pool.submit(losses)
        for _ in range(20):
            assert torch.equal(lively_mllm.generate(**asked), alone)
        assert len({*computed.result()}) == 1


# --- a full disk, and a kill ---


@contextmanager
def full_disk(free: int):
    """Within it, a file that grows beyond `free` bytes gives an OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def killed_at(event: int, work: Callable[[], None]) -> bool:
    """Runs `work` in a process of its own, which kills itself when it opens, moves or removes a file for the
    `event`-th time (from 1); whether that happened."""
    names = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree"}
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    count = itertools.count(1)
    sys.addaudithook(lambda name, _: name in names and next(count) == event and os.kill(os.getpid(), signal.SIGKILL))
    try:
        work()
    finally:
        os._exit(0)


def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new_one(tmp_path):
    def writer(text: str) -> Callable[[Path], None]:
        return lambda folder: (
            [(folder / name).write_text(text, encoding="utf-8") for name in ("config.json", "model.safetensors")]
            and None
        )

    target = tmp_path / "release"
    old, new, newest = ({"config.json": t, "model.safetensors": t} for t in (b"old", b"new", b"newest"))
    seen = []
    for event in itertools.count(1):
        shutil.rmtree(tmp_path)
        write_folder(target, writer("old"))
        if not killed_at(event, lambda: write_folder(target, writer("new"))):
            break
        found = contents(target if target.exists() else target.with_name(".release.old"))
        assert found in (old, new), event
        seen.append(found == new)
        with pytest.raises(ZeroDivisionError):
            write_folder(target, lambda _: 1 / 0)
        assert contents(target) == found  # whatever was left lying about
        write_folder(target, writer("newest"))
        assert contents(tmp_path) == {f"release/{name}": text for name, text in newest.items()}
    assert contents(target) == new and len(seen) >= 6 and {False, True} == {*seen}


def test_a_kill_while_codes_are_written_leaves_whole_shards(tmp_path):
    codes = {"b.png": torch.ones(1, K, L, dtype=torch.long)}
    for format, suffix in (("parquet", "parquet"), ("webdataset", "tar")):
        store = code_folder(tmp_path / format, format=format)
        shard, before = store / f"000000.{suffix}", contents(store)
        for event in itertools.count(1):
            was_killed = killed_at(event, partial(write_shard, shard, codes))
            if not was_killed:
                break
            assert shard.read_bytes() == before[shard.name] and list(CodeStore(store)) == ["a.png"]
        assert event > 1 and list(CodeStore(store)) == ["b.png"]


def test_a_kill_while_a_report_is_written_leaves_the_old_or_the_new_one(tmp_path):
    path = tmp_path / "report.json"
    for event in itertools.count(1):
        write_atomically(path, b'{"old": 1}')
        if not killed_at(event, lambda: write_atomically(path, b'{"new": 2}')):
            break
        assert json.loads(path.read_text(encoding="utf-8")) == {"old": 1}
    assert event > 2 and json.loads(path.read_text(encoding="utf-8")) == {"new": 2}


def test_a_full_disk_leaves_codes_and_reports_as_they_were(tmp_path):
    many = {f"{i}.png": torch.randint(V, (1, K, L)) for i in range(2000)}
    for format, suffix in (("parquet", "parquet"), ("webdataset", "tar")):
        store = code_folder(tmp_path / format, format=format)
        before = contents(store)
        with full_disk(30_000), pytest.raises(OSError, match="File too large"):
            write_shard(store / f"000000.{suffix}", many)
        assert contents(store) == before
        with full_disk(30_000), pytest.raises(OSError, match="File too large"):
            write_shard(store / f"000001.{suffix}", many)
        assert contents(store) == before
    path = tmp_path / "report.json"
    write_atomically(path, b"old")
    with full_disk(1000), pytest.raises(OSError, match="File too large"):
        write_atomically(path, bytes(2000))
    assert path.read_bytes() == b"old"


def test_a_full_disk_leaves_the_old_release_and_gives_its_room_back(lively_mllm, processor, tmp_path):
    target = tmp_path / "release"
    save_release(lively_mllm, processor, target, torch.float32)
    before = contents(tmp_path)
    assert len(before["release/model.safetensors"]) > 200_000
    for free in (1000, 100_000):  # not even the config, and not the weights
        with full_disk(free), pytest.raises(Exception, match="File too large"):
            save_release(lively_mllm, processor, target, torch.float32)
        assert contents(tmp_path) == before
    save_release(lively_mllm, processor, target, torch.float32)
    assert UniTokMLLMForConditionalGeneration.from_pretrained(target).num_parameters() == lively_mllm.num_parameters()


def test_a_full_disk_leaves_the_tokenizer_training_its_last_checkpoint(tmp_path):
    options = {"max_steps": 4, "save_steps": 2, "save_total_limit": 1, "dataloader_num_workers": 0}
    trainer = trainer_of(tmp_path, {}, small_model(), **options)
    saved = trainer._save_checkpoint

    def save() -> None:
        with full_disk(10**9 if trainer.step < 4 else 20_000):
            saved()

    trainer._save_checkpoint = save
    with pytest.raises(Exception, match="File too large"):
        trainer.train()
    assert {path.name for path in tmp_path.glob("*checkpoint*")} == {"checkpoint-2"}
    resumed = trainer_of(tmp_path, {}, small_model(), resume=True, **options)
    assert resumed.step == 2
    resumed.train()
    assert {path.name for path in tmp_path.glob("*checkpoint*")} == {"checkpoint-4"}


def test_a_full_disk_leaves_the_mllm_training_its_last_checkpoint(tmp_path, lively_mllm, processor):
    (tmp_path / "text.jsonl").write_text('{"text": "what is red"}\n' * 8, encoding="utf-8")
    data = MLLMDataset([Source(str(tmp_path / "text.jsonl"), "text")], SampleTexts(processor, 50))
    set_visual_aside(lively_mllm)
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "report_to": "none"}
    options |= {"per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True}
    options |= {"dataloader_pin_memory": False, "remove_unused_columns": False}

    class Trainer(MLLMTrainer):
        free = 10**9

        def _save_checkpoint(self, model, trial):
            with full_disk(10**9 if self.state.global_step < 4 else self.free):
                super()._save_checkpoint(model, trial)

    def trainer() -> Trainer:
        collator = MLLMCollator(processor.tokenizer.pad_token_id, (K, L))
        arguments = TrainingArguments(output_dir=str(tmp_path / "run"), **options)
        return Trainer(model=lively_mllm, args=arguments, train_dataset=data, data_collator=collator)

    first = trainer()
    first.free = 20_000
    with pytest.raises(Exception, match="File too large"):
        first.train()
    whole = {path.parent.name for path in (tmp_path / "run").glob("checkpoint-*/whole")}
    assert whole == {"checkpoint-2"}
    second = trainer()
    second.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert second.state.global_step == 4
    whole = {path.parent.name for path in (tmp_path / "run").glob("checkpoint-*/whole")}
    assert whole == {"checkpoint-4"}


# --- trainings ---


@dataclasses.dataclass
class Options:
    output_dir: str = "runs"
    datasets: list[dict] = dataclasses.field(default_factory=list)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"- output_dir: a", "is a list, expected names and values"),
        (b"just words", "is a str, expected names and values"),
        (b"output_dir: [", "is no YAML"),
        (b"output_dir: \xff", "is no YAML"),
        (b"[" * 5000, "is no YAML"),
        (b"output_dir: !!python/object/apply:os.system ['touch executed']", "is no YAML"),
        (b"output_folder: a", "no 'output_folder': did you mean 'output_dir'"),
    ],
)
def test_a_config_that_is_none_is_named_in_one_line(tmp_path, monkeypatch, capsys, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        one_line_errors()(parse_yaml_and_command_line)((Options,), ["config.yaml"])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert ended.value.code == 2 and "config.yaml" in line and message in line
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize("content", [b"", b"\n\n", b"[" * 100_000, b'{"a":' * 100_000], ids=range(4))
def test_tables_without_rows_or_nested_without_end_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot read the data file .*{name}: ."):
        read_rows(tmp_path / name)


HOSTILE_ROWS = [
    ("conversations", {"image": 3}),
    ("conversations", {"image": {"path": "a.png"}}),
    ("conversations", {"image": [["a.png"]]}),
    ("conversations", {"image": ["a.png", None]}),
    ("conversations", {"image": "/dev/zero"}),
    ("conversations", {"conversations": "words"}),
    ("conversations", {"conversations": [3]}),
    ("conversations", {"conversations": [{"from": "human"}]}),
    ("conversations", {"conversations": [{"from": ["human"], "value": "a"}]}),
    ("conversations", {"conversations": None}),
    ("captions", {"caption": 3}),
    ("captions", {"caption": None}),
    ("captions", {"image": 3.5}),
    ("text", {"text": ["red"]}),
    ("text", {"text": None}),
]


@pytest.mark.parametrize("kind, change", HOSTILE_ROWS, ids=str)
def test_rows_that_are_not_what_they_should_be_are_broken_samples(tmp_path, processor, picture, kind, change):
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
    row = {"image": picture.name, "conversations": turns, "caption": "red", "text": "a red circle"}
    texts, rng = SampleTexts(processor, 250), np.random.default_rng(0)
    for content, is_good in ((row, True), (row | change, False)):
        (tmp_path / "rows.json").write_text(json.dumps([content]), encoding="utf-8")
        source = Source(str(tmp_path / "rows.json"), kind)
        if is_good:
            assert len(source.sample(0, texts, 0.0, rng)["input_ids"])
            continue
        with pytest.raises(UnusableSample, match="named by texts, not by|cannot be|'/dev/zero': not a regular file"):
            source.sample(0, texts, 0.0, rng)


def test_shards_that_are_commands_need_a_config_that_is_trusted(tmp_path, monkeypatch):
    monkeypatch.delenv(TRUSTED, raising=False)
    check_shards(["a.tar", "/data/a.tar", "file:a.tar", "http://a/b.tar", "https://a/b.tar", r"C:\a.tar"])
    commands = [
        "pipe:touch executed",
        "PIPE:touch executed",
        "gs://a/b.tar",
        "s3://a",
        "ais://a",
        "htgs://a",
        "hf://a",
    ]
    for shard in commands:
        with pytest.raises(ValueError, match=f"the shard '{shard}' is the output of a command: trust the config by"):
            check_shards(["a.tar", shard])
    with pytest.raises(ValueError, match="the shard 'pipe:cat a' is the output of a command"):
        ImageTextStream("{pipe:cat a,b.tar}", None, seed=0, samples_per_epoch=1)
    (tmp_path / "config.yaml").write_text("datasets: [{shards: 'pipe:cat a'}]", encoding="utf-8")
    monkeypatch.setenv(TRUSTED, "")  # restored in the end
    parse_yaml_and_command_line((Options,), [str(tmp_path / "config.yaml")])
    assert not os.environ[TRUSTED]
    (options,) = parse_yaml_and_command_line((Options,), [str(tmp_path / "config.yaml"), "--trust_config"])
    check_shards([source["shards"] for source in options.datasets])


@pytest.mark.parametrize("main", [train_mllm.main, train_tokenizer.main], ids=lambda main: main.__module__)
def test_an_output_folder_that_cannot_be_is_found_out_before_anything_is_loaded(tmp_path, main):
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    config = {"output_dir": str(tmp_path / "file/run"), "use_cpu": True, "bf16": False, "report_to": []}
    config |= {"model": "nowhere"} if main is train_mllm.main else {"init_from": "nowhere", "text_tokenizer": "none"}
    (tmp_path / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="cannot write to the output folder .*file/run: Not a directory"):
        main([str(tmp_path / "config.yaml")])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_steps": -5}, "max_steps must be at least 1, got -5"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"learning_rate": math.nan}, "learning_rate .nan."),
        ({"learning_rate": -1e-3}, "learning_rate .-0.001."),
        ({"weight_decay": math.inf}, "weight_decay .inf."),
        ({"num_train_epochs": 0}, "num_train_epochs"),
    ],
    ids=str,
)
def test_numbers_that_train_nothing_are_refused_before_anything_is_loaded(tmp_path, options, message):
    config = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "report_to": [], "model": "nowhere"}
    arguments = [argument for name, value in options.items() for argument in (f"--{name}", str(value))]
    (tmp_path / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        train_mllm.main([str(tmp_path / "config.yaml"), *arguments])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("main", [train_mllm.main, train_tokenizer.main], ids=lambda main: main.__module__)
def test_a_training_on_nothing_is_refused_before_anything_is_loaded(tmp_path, main, monkeypatch):
    config = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "bf16": False, "report_to": [], "datasets": []}
    config |= {"model": "."} if main is train_mllm.main else {"text_tokenizer": "."}
    (tmp_path / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setattr(f"{main.__module__}.build_model", None)
    with pytest.raises(ValueError, match="There is nothing to train on: `datasets` is empty"):
        main([str(tmp_path / "config.yaml")])


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
    with pytest.raises(ValueError, match="none of the 2 checkpoints in .* is whole: .*checkpoint-4/optimizer.pt"):
        newest_checkpoint(tmp_path, "whole")
    assert newest_checkpoint(tmp_path / "nowhere", "whole") is None


def test_a_tokenizer_training_goes_on_from_before_a_truncated_checkpoint(tmp_path):
    options = {"max_steps": 4, "save_steps": 1, "save_total_limit": 2, "dataloader_num_workers": 0}
    trainer = trainer_of(tmp_path, {}, small_model(), **options)
    trainer.train()
    end = {name: value.clone() for name, value in trainer.tokenizer.module.state_dict().items()}
    state = tmp_path / "checkpoint-4/state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    resumed = trainer_of(tmp_path, {}, small_model(), resume=True, **options)
    assert resumed.step == 3
    resumed.train()
    assert all(torch.equal(value, end[name]) for name, value in resumed.tokenizer.module.state_dict().items())


# --- sampling ---


EXTREME = [
    {"temperature": 1e-6},
    {"temperature": 1e-30},
    {"temperature": 1e30},
    {"temperature": 1e-30, "guidance_scale": 1e6},
    {"temperature": 1e-30, "guidance_scale": 1e6, "top_k": 2, "top_p": 0.5},
    {"top_k": 1},
    {"top_k": V + 1},
    {"top_k": 10**9},
    {"top_p": 1e-30},
    {"top_p": 1},
    {"top_p": 1 - 1e-12},
    {"guidance_scale": 1e6},
    {"guidance_scale": 1e6, "do_sample": False},
    {"seed": 2**200},
    {"seed": np.int64(7)},
    {"seed": [0, 2**64]},
]
IMPOSSIBLE = [
    *(("temperature", value) for value in (0, -1.0, math.nan, math.inf, -math.inf, 1e-300)),
    *(("top_k", value) for value in (-1, 2.5, math.nan)),
    *(("top_p", value) for value in (0, -0.5, 1.1, math.nan, math.inf)),
    *(("guidance_scale", value) for value in (0, -3.0, 1.1e6, math.nan, math.inf)),
    *(("image_guidance_scale", value) for value in (0, math.nan, math.inf)),
    *(("seed", value) for value in (-1, 1.5, math.nan, "one", [3, -4], [1, None])),
    *(("num_return_sequences", value) for value in (0, -1)),
    *(("num_positions", value) for value in (0, -1)),
]


@pytest.mark.parametrize("options", EXTREME, ids=str)
def test_extreme_sampling_gives_codes(lively_mllm, processor, options):
    inputs = processor(text=["a red circle", "blue"], generation_mode="image")
    options = {"generation_mode": "image", "seed": 5, **options}
    codes = lively_mllm.generate(**inputs, **options)
    assert codes.shape == (2, K, L) and 0 <= codes.min() and codes.max() < V
    assert torch.equal(lively_mllm.generate(**inputs, **options), codes)
    if options.get("temperature", 1) <= 1e-6 or options.get("top_k") == 1 or options.get("top_p", 1) == 1e-30:
        greedy = {"do_sample": False, "guidance_scale": options.get("guidance_scale", 1.0)}
        assert torch.equal(lively_mllm.generate(**inputs, generation_mode="image", **greedy), codes)
    pixels = lively_mllm.decode_images(codes)
    assert pixels.shape == (2, 3, 48, 48) and (pixels.abs() <= 1).all()


@pytest.mark.parametrize("name, value", IMPOSSIBLE, ids=str)
def test_impossible_sampling_is_refused_with_option_and_value(lively_mllm, processor, name, value):
    inputs = processor(text=["a red circle", "blue"], generation_mode="image")
    with pytest.raises(ValueError) as error:
        lively_mllm.generate(**inputs, generation_mode="image", **{name: value})
    assert name in str(error.value) and str(value) in str(error.value)


def test_the_commands_refuse_what_the_model_refuses_and_take_what_it_takes(folder, picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = {"temperature", "top_k", "top_p", "guidance_scale", "seed", "num_return_sequences"}
    renamed = {"guidance_scale": "guidance", "num_return_sequences": "count"}
    for name, value in IMPOSSIBLE:
        if name in kept and not isinstance(value, list):
            option = renamed.get(name, name).replace("_", "-")
            message = failure("generate", "red", f"--{option}", value, "--model", folder)
            assert option in message.replace("_", "-") and str(value) in message, (option, value, message)
    for option, value in (
        ("guidance", math.nan),
        ("image-guidance", math.inf),
        ("image-guidance", 0),
        ("guidance", 1e7),
    ):
        message = failure("edit", picture, "make it red", f"--{option}", value, "--model", folder)
        assert option in message.replace("_", "-") and f"got {value}" in message
    assert list(tmp_path.glob("unitok*")) == []
    for options in (("--temperature", 1e-30, "--guidance", 1e6), ("--top-k", 10**9, "--seed", 2**200)):
        assert run("generate", "red", *options, "--model", folder).exit_code == 0
    assert len(list(tmp_path.glob("unitok-drawing*.png"))) == 2


def test_every_prompt_of_a_batch_ends_where_it_was_told_to(lively_mllm, processor):
    """An end token of the caller's own holds for all prompts of an interleaved batch."""
    inputs = processor(text=["a red circle", "blue"], generation_mode="interleaved")
    options = {"do_sample": False, "max_new_tokens": 12, "max_images": 0, "eos_token_id": list(range(300))}
    output = lively_mllm.generate(**inputs, generation_mode="interleaved", **options)
    assert [len(sequence) for sequence in output.sequences] == [1, 1]
