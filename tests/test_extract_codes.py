"""The extraction of codes: its output, its options, and interrupted runs that resume."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import webdataset as wds
from conftest import IMAGE_SIZE, mirrored_and_shifted
from PIL import Image
from typer.testing import CliRunner

from training import extract_codes
from training.codes import CodeStore, write_metadata, write_shard
from training.errors import one_line_errors
from training.extract_codes import app, image_keys
from unitok_mllm import UniTokImageProcessor, UniTokModel


SIZE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
K, V, L = 4, 32, (IMAGE_SIZE // 16) ** 2
NAMES = [f"images/{i}.png" for i in range(10)]


@pytest.fixture
def folder(tmp_path, visual_tokenizer) -> Path:
    """Ten pictures, captions that name some of them twice, and a visual tokenizer."""
    visual_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for name in NAMES:
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / name)
    rows = [{"image": name, "caption": "red"} for name in (*NAMES, *NAMES[:3])]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


@pytest.fixture
def extract(folder, monkeypatch):
    """Runs the command line in this process; gives the codes' folder."""

    def extract(out: str, *options: str, data: str = "captions.jsonl", rank: int = 0, world_size: int = 1) -> Path:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        arguments = [f"{folder}/{data}", f"{folder}/{out}", "--visual-model", f"{folder}/model", *options]
        arguments += ["--workers", "0", "--device", "cpu", "--batch-size", "2", "--shard-size", "3"]
        CliRunner().invoke(app, arguments, catch_exceptions=False)
        return folder / out

    return extract


def processed(folder: Path, mode: str = "understand") -> torch.Tensor:
    return UniTokImageProcessor(size=SIZE, mode=mode)([str(folder / name) for name in NAMES])["pixel_values"]


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


# --- extraction ---


@pytest.mark.parametrize("mode", ["understand", "reconstruct"])
def test_codes_are_those_of_the_processed_images(folder, extract, visual_tokenizer, mode):
    store = CodeStore(extract("codes", "--mode", mode))
    expected = visual_tokenizer.encode(processed(folder, mode))
    assert list(store) == NAMES and len(store) == 10  # each once, though the data names three twice
    for name, codes in zip(NAMES, expected):
        assert torch.equal(store[name], codes[None])
    assert store.metadata["num_codebooks"] == K and store.metadata["codebook_size"] == V
    assert store.metadata["num_positions"] == L and store.metadata["image_size"] == IMAGE_SIZE
    assert store.metadata["mode"] == mode and store.metadata["variants"] == 1


def test_variants_are_mirrored_and_shifted_images(folder, extract, visual_tokenizer):
    store = CodeStore(extract("codes", "--variants", "7", "--mirror", "--max-shift", "1"))
    seen = set()
    for name, pixels in zip(NAMES, processed(folder)):
        views = mirrored_and_shifted(pixels)
        codes = dict(zip(views, visual_tokenizer.encode(torch.stack(list(views.values())))))
        assert torch.equal(store[name][0], codes[False, 1, 1])
        for variant in store[name][1:]:
            matching = {view for view, expected in codes.items() if torch.equal(expected, variant)}
            assert matching
            seen |= matching
    assert {mirrored for mirrored, _, _ in seen} == {False, True} and len(seen) > 9
    again = CodeStore(extract("again", "--variants", "7", "--mirror", "--max-shift", "1", data="images"))
    assert not torch.equal(again["3.png"][1:], store["images/3.png"][1:])  # drawn anew: another key
    assert torch.equal(again["3.png"][0], store["images/3.png"][0])


def test_the_formats_hold_the_same_codes_and_webdataset_reads_its_own(extract):
    options = "--variants", "2", "--max-shift", "2"
    parquet = CodeStore(extract("parquet", *options))
    tar = CodeStore(extract("webdataset", *options, "--format", "webdataset"))
    assert list(tar) == list(parquet)
    assert all(torch.equal(tar[name], parquet[name]) for name in NAMES)
    samples = list(wds.WebDataset(f"{tar.folder}/{{000000..000003}}.tar", shardshuffle=False).decode())
    assert [f"{sample['__key__']}.png" for sample in samples] == NAMES
    assert all(np.array_equal(s["png.npy"], parquet[name]) for s, name in zip(samples, NAMES))
    assert samples[0]["png.npy"].dtype == np.uint16
    row = pq.read_table(parquet.folder / "000001.parquet").to_pylist()[1]
    assert row["key"] == NAMES[4] and row["codes"] == samples[4]["png.npy"].tobytes()


def test_every_kind_of_data_names_the_same_images(folder, extract):
    expected = CodeStore(extract("codes"))
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "red"}]
    rows = [{"image": NAMES[0]}, {"image": NAMES[:4]}, {}, *({"image": name} for name in NAMES[2:])]
    (folder / "data").mkdir()
    (folder / "data/talk.json").write_text(
        json.dumps([row | {"conversations": turns} for row in rows]), encoding="utf-8"
    )
    with wds.TarWriter(f"{folder}/00.tar") as first, wds.TarWriter(f"{folder}/01.tar") as second:
        for i, name in enumerate(NAMES):
            sample = {"__key__": name.removesuffix(".png"), "png": (folder / name).read_bytes(), "txt": "red"}
            (first if i < 5 else second).write(sample)
    talk = CodeStore(extract("talk", "--image-folder", str(folder), data="data/talk.json"))
    tar = CodeStore(extract("tar", data="{00..01}.tar"))
    talk_in_tar = CodeStore(extract("both", "--image-folder", f"{folder}/{{00..01}}.tar", data="data/talk.json"))
    for store in (talk, tar, talk_in_tar):
        assert list(store) == NAMES and all(torch.equal(store[name], expected[name]) for name in NAMES)
    images = CodeStore(extract("folder", data="images"))
    assert list(images) == [Path(name).name for name in NAMES]
    assert all(torch.equal(images[Path(name).name], expected[name]) for name in NAMES)


def test_equal_names_in_several_shards_keep_their_own_codes(folder, extract, visual_tokenizer):
    expected = visual_tokenizer.encode(processed(folder))
    for shard in range(2):
        with wds.TarWriter(f"{folder}/0{shard}.tar") as writer:
            for i in range(3):
                writer.write({"__key__": str(i), "png": (folder / NAMES[3 * shard + i]).read_bytes()})
    store = CodeStore(extract("codes", data="{00..01}.tar"))
    assert list(store) == [f"0{shard}.tar/{i}.png" for shard in range(2) for i in range(3)]
    assert all(torch.equal(codes[0], expected[i]) for i, codes in enumerate(store.values()))
    (folder / "rows.jsonl").write_text(json.dumps({"image": "1.png"}), encoding="utf-8")
    with pytest.raises(ValueError, match="1.png is in 2 shards of .*name it 00.tar/1.png or 01.tar/1.png"):
        image_keys(f"{folder}/rows.jsonl", f"{folder}/{{00..01}}.tar")


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_equal_stems_with_other_endings_keep_their_own_codes(folder, extract, visual_tokenizer, format):
    (folder / "stems").mkdir()
    colors = {"a.jpg": "red", "a.png": "blue", "a.webp": "green"}
    for name, color in colors.items():
        Image.new("RGB", (40, 50), color).save(folder / "stems" / name)
    store = CodeStore(extract("codes", "--format", format, data="stems"))
    assert list(store) == list(colors)
    for name in colors:
        pixels = UniTokImageProcessor(size=SIZE)([str(folder / "stems" / name)])["pixel_values"]
        assert torch.equal(store[name], visual_tokenizer.encode(pixels))


def test_data_without_images_is_refused(folder):
    (folder / "text.json").write_text(json.dumps([{"text": "red"}]), encoding="utf-8")
    (folder / "text.jsonl").write_text(json.dumps({"text": "red"}) + "\n", encoding="utf-8")
    for data in ("text.json", "text.jsonl", "model"):
        with pytest.raises(ValueError, match=f"{data} names no image"):
            image_keys(f"{folder}/{data}")
    with pytest.raises(FileNotFoundError, match="no data file .*missing.jsonl"):
        image_keys(f"{folder}/missing.jsonl")


@pytest.mark.attack
def test_images_that_are_named_by_no_text_are_skipped(folder, caplog):
    images = [NAMES[0], 3, {"path": NAMES[1]}, [NAMES[2], None, 4.5], [[NAMES[3]]], None, NAMES[4]]
    (folder / "odd.json").write_text(json.dumps([{"image": image} for image in images]), encoding="utf-8")
    keys, _ = image_keys(f"{folder}/odd.json")
    assert keys == [NAMES[0], NAMES[2], NAMES[4]]
    assert "skipping 5 images that are named by no text, such as 3" in caplog.text


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_processes_share_the_work_and_a_broken_off_run_is_gone_on_with(folder, extract, format):
    options = "--variants", "2", "--mirror", "--format", format
    alone = contents(extract("alone", *options))
    assert len(alone) == 5  # four shards of three or fewer images
    out = extract("shared", *options, rank=1, world_size=2)
    assert len(list(out.iterdir())) == 3
    with pytest.raises(ValueError, match="lacks 2 of its 4 shards, 000000.*the extraction is not finished"):
        CodeStore(out)
    assert contents(extract("shared", *options, rank=0, world_size=2)) == alone

    first, *others = sorted(path for path in out.iterdir() if path.name.startswith("0"))
    first.unlink()
    first.with_name(f".{first.name}.unfinished").write_bytes(b"broken off")
    others[0].write_bytes(b"not touched")
    extract("shared", *options)
    assert contents(out) == alone | {others[0].name: b"not touched"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.attack
def test_a_signal_leaves_whole_shards_and_the_same_command_goes_on(folder, extract, monkeypatch, capsys, number):
    alone, encode, told = contents(extract("alone")), extract_codes.encode, []

    def interrupted(*args):
        told.append(args)
        if len(told) == 4:  # in the middle of the second shard
            os.kill(os.getpid(), number)
        return encode(*args)

    command = [f"{folder}/captions.jsonl", f"{folder}/out", "--visual-model", f"{folder}/model", "--workers", "0"]
    command += ["--device", "cpu", "--batch-size", "2", "--shard-size", "3"]
    with monkeypatch.context() as patch:
        patch.setattr(extract_codes, "encode", interrupted)
        with pytest.raises(SystemExit) as end:
            one_line_errors("It goes on.")(app)(command)
    assert end.value.code == 128 + number and "\nIt goes on.\n" in capsys.readouterr().err
    done = contents(folder / "out")
    assert done.items() < alone.items() and sorted(done) == ["000000.parquet", "metadata.json"]
    extract("out")
    assert contents(folder / "out") == alone


@pytest.mark.slow
def test_torchrun_gives_the_same_files_as_one_process(folder, extract):
    alone = contents(extract("alone", "--variants", "2", "--mirror"))
    arguments = [f"{folder}/captions.jsonl", f"{folder}/shared", "--visual-model", f"{folder}/model", "--variants=2"]
    arguments += ["--mirror", "--workers=1", "--device=cpu", "--batch-size=2", "--shard-size=3"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*launcher, "-m", "training.extract_codes", *arguments], check=True)
    assert contents(folder / "shared") == alone


def test_other_settings_in_the_same_folder_are_refused(folder, extract):
    before = contents(extract("codes"))
    with pytest.raises(ValueError, match="codes has codes of other settings: mode understand .now classify"):
        extract("codes", "--mode", "classify")
    model = UniTokModel.from_pretrained(folder / "model")
    model.vision_model.quantizer.codebooks.data.mul_(-1)
    model.save_pretrained(folder / "model")
    with pytest.raises(ValueError, match="other settings: weights_sha256"):
        extract("codes")
    with pytest.raises(ValueError, match="other settings: keys_sha256 .*num_images 10 .now 1., num_shards 4 .now 1."):
        (folder / "captions.jsonl").write_text(json.dumps({"image": NAMES[0]}) + "\n", encoding="utf-8")
        extract("codes")
    assert contents(folder / "codes") == before
    with pytest.raises(ValueError, match="2 variants would be the same"):
        extract("new", "--variants", "2")
    with pytest.raises(ValueError, match="no model in .*images"):
        extract("new", "--visual-model", f"{folder}/images")


@pytest.mark.attack
def test_broken_images_are_named_and_left_out_up_to_a_share(folder, extract, caplog):
    expected = CodeStore(extract("whole"))
    (folder / NAMES[4]).write_bytes((folder / NAMES[4]).read_bytes()[:300])
    (folder / NAMES[9]).unlink()
    store = CodeStore(extract("codes", "--max-broken-share", "0.2"))
    assert list(store) == [name for name in NAMES if name not in (NAMES[4], NAMES[9])]
    assert all(torch.equal(codes, expected[name]) for name, codes in store.items())
    assert f"skipping {NAMES[4]}" in caplog.text and f"skipping {NAMES[9]}" in caplog.text
    with pytest.raises(KeyError, match="no codes of image images/4.png in .*codes, which has 8 images"):
        store[NAMES[4]]
    for _ in range(2):  # a second run does not get through either
        with pytest.raises(ValueError, match="broken, more than 1.00%.*images/9.png"):
            extract("strict")


# --- the store ---


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
@pytest.mark.attack
def test_a_store_checks_what_it_reads(tmp_path, format):
    metadata = {"format": format, "variants": 2, "num_codebooks": 3, "codebook_size": 70, "num_positions": 4}
    good = torch.randint(70, (2, 3, 4))
    high = good.clone()
    high[1, 2, 3] = 70
    write_metadata(tmp_path, metadata | {"num_shards": 1})
    suffix = {"parquet": "parquet", "webdataset": "tar"}[format]
    long_key = "a/" * 150 + "é.png"
    write_shard(tmp_path / f"000000.{suffix}", {long_key: good, "high": high, "few": good[:1]})
    store = CodeStore(tmp_path)
    assert len(store) == 3 and long_key in store and "b" not in store
    assert store[long_key].dtype == torch.int64 and torch.equal(store[long_key], good)
    with pytest.raises(ValueError, match="codes of high in .* reach 70, but there are 70 in a codebook"):
        store["high"]
    with pytest.raises(ValueError, match=r"codes of few in .* are \(.*\), expected \(2, 3, 4\)"):
        store["few"]
    with pytest.raises(KeyError, match="no codes of image b in"):
        store["b"]


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_codes_of_an_image_in_two_shards_are_refused(tmp_path, format):
    names = {"variants": 1, "num_codebooks": 2, "codebook_size": 9, "num_positions": 2}
    write_metadata(tmp_path, {"format": format, "num_shards": 2} | names)
    for shard in range(2):
        suffix = {"parquet": "parquet", "webdataset": "tar"}[format]
        write_shard(tmp_path / f"00000{shard}.{suffix}", {"a.png": torch.full((1, 2, 2), shard)})
    with pytest.raises(ValueError, match="has codes of a.png twice"):
        CodeStore(tmp_path)


def test_codes_up_to_65535_are_kept(tmp_path):
    codes = torch.tensor([0, 4095, 32768, 65535]).view(1, 2, 2)
    names = {"variants": 1, "num_codebooks": 2, "codebook_size": 2**16, "num_positions": 2}
    write_metadata(tmp_path, {"format": "parquet", "num_shards": 1} | names)
    write_shard(tmp_path / "000000.parquet", {"a": codes})
    assert torch.equal(CodeStore(tmp_path)["a"], codes)


def test_a_folder_without_codes_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="There are no codes in .*nowhere"):
        CodeStore(tmp_path / "nowhere")
