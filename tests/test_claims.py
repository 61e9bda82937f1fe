"""The comparison of numbers of sub-codebooks: its plan, its averages, and a small one from end to end."""

import io
import json
import math
import statistics
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from transformers import AutoImageProcessor

from eval import claims
from eval.claims import CLASSES, ClaimsArguments, aggregate, main, metrics, plan, plot, table, zero_shot
from training.arguments import parse_yaml_and_command_line
from training.easy_vqa import load
from training.losses import LossArguments
from training.tokenizer_trainer import TokenizerTrainingArguments
from training.train_tokenizer import TokenizerArguments
from unitok_mllm import UniTokConfig, UniTokModel


CONFIG = Path(__file__).parent.parent / "training" / "configs" / "claims.yaml"
TYPES = (ClaimsArguments, TokenizerArguments, LossArguments, TokenizerTrainingArguments)


@pytest.fixture(autouse=True)
def _no_accelerator_of_another_test():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Plans the runs of the shipped config, with options of the command line."""
    monkeypatch.chdir(tmp_path)
    for path in yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["held_out"].values():
        Path(path).parent.mkdir(parents=True)
        Path(path).write_text("{}", encoding="utf-8")
    return lambda *options: plan(*parse_yaml_and_command_line(TYPES, [str(CONFIG), *options]))


@pytest.fixture
def config(tmp_path, text_tokenizer):
    """A comparison that takes seconds: 12 images to train on, 5 held out, of which one has no colour."""
    text_tokenizer.save_pretrained(tmp_path / "text")
    samples = {"train": load("train")[:12], "test": load("test")[:4]}
    unclear = next(sample for sample in load("test")[4:] if sample.caption not in CLASSES)
    samples["test"].append(unclear)
    for split, rows in samples.items():
        lines = [json.dumps({"image": str(sample.image), "caption": sample.caption}) + "\n" for sample in rows]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    vision = {"image_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"stem_width": 8, "stage_dims": [8, 16], "stage_depths": [1, 1]}
    values = {
        "steps": 2,
        "batch_size": 4,
        "total_codes": 64,
        "codebooks": [1, 8],
        "seeds": [0],
        "held_out": {"test images": str(tmp_path / "test.jsonl")},
        "output_dir": str(tmp_path / "out"),
        "vision_overrides": vision,
        "text_tokenizer": str(tmp_path / "text"),
        "datasets": [{"kind": "folder", "path": str(tmp_path / "train.jsonl")}],
        "use_cpu": True,
        "bf16": False,
        "save_steps": 1,
    }
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def result(k: int, seed: int, decibels: float, accuracy: float | None, supervision: str = "joint") -> dict:
    shot = None if accuracy is None else {"images": 8, "right": 8 * accuracy, "accuracy": accuracy}
    sets = {"test": {"images": 8, "psnr_db": decibels, "codes_used_percent": 50.0, "zero_shot": shot}}
    return {
        "codebooks": k,
        "codebook_size": 64 // k,
        "bits_per_position": k * math.log2(64 // k),
        "supervision": supervision,
        "seed": seed,
        "codebook_usage_percent": 75.0 + seed,
        "training_seconds": 100.0 + seed,
        "resumed_from_step": seed // 2,
        "held_out": sets,
    }


RESULTS = [
    result(8, 0, 24.0, 0.5),
    result(1, 0, 20.0, 0.25),
    result(1, 1, 21.0, 0.5),
    result(1, 2, 25.0, 0.75),
    result(8, 0, 26.0, None, "reconstruction"),
]


def test_the_runs_differ_in_the_split_of_the_codes_and_in_nothing_else(runs):
    planned = runs()
    assert [(run.num_codebooks, run.supervision) for run in planned[:5]] == [
        *((k, "joint") for k in (1, 2, 4, 8)),
        (8, "reconstruction"),
    ]
    assert [run.seed for run in planned] == [0] * 5 + [1] * 5 + [2] * 5
    assert len({run.name for run in planned}) == 15
    shapes = {}
    for run in planned[:5]:
        assert run.num_codebooks * run.codebook_size == 4096
        config = UniTokConfig.preset(
            run.settings["training"]["preset"], **run.settings["training"]["vision_overrides"]
        )
        with torch.device("meta"):
            model = UniTokModel(config)
        shapes[run.num_codebooks] = {name: tuple(p.shape) for name, p in model.named_parameters()}
        codebooks = shapes[run.num_codebooks].pop("vision_model.quantizer.codebooks")
        assert codebooks == (run.num_codebooks, 4096 // run.num_codebooks, 64 // run.num_codebooks)
        same = {name: value for name, value in run.settings["training"].items() if name != "vision_overrides"}
        first = {name: value for name, value in planned[0].settings["training"].items() if name != "vision_overrides"}
        assert same == first | ({"contrastive_weight": 0.0} if run.supervision == "reconstruction" else {})
    assert shapes[1] == shapes[2] == shapes[4] == shapes[8]
    assert [run.bits for run in planned[:4]] == [12, 22, 40, 72]


def test_a_run_is_named_after_all_that_its_result_hangs_on(runs):
    names = [run.name for run in runs("--seeds", "0", "--codebooks", "8")]
    assert names == [run.name for run in runs("--logging_steps", "7") if run.name in names]
    for options in (("--steps", "5"), ("--limit", "3"), ("--batch_size", "4"), ("--learning_rate", "1e-4")):
        assert not {*names} & {run.name for run in runs(*options)}, options
    Path(yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["held_out"]["easy-VQA test"]).write_text(
        "{} ", encoding="utf-8"
    )
    assert not {*names} & {run.name for run in runs()}


@pytest.mark.parametrize(
    "options, message",
    [
        (("--codebooks", "3"), r"total_codes \(4096\) is not a multiple of 3 sub-codebooks"),
        (("--codebooks", "128"), r"quantizer_dim \(64\) is not a multiple of num_codebooks \(128\)"),
        (("--steps", "0"), "steps must be at least 1, got 0"),
        (("--seeds", "-1"), r"limit and seeds must be at least 0, got 0 and \[-1\]"),
        (("--max_steps", "5", "--seed", "1"), "Set steps, seeds and batch_size instead of max_steps, seed"),
        (("--processes", "5"), r"batch_size \(48\) is not a multiple of 5 processes"),
        (("--init_from", "folder"), "Every run starts from fresh weights"),
    ],
)
def test_settings_that_cannot_be_are_refused(runs, options, message):
    with pytest.raises(ValueError, match=message):
        runs(*options)


def test_a_held_out_set_that_is_missing_is_named(runs):
    Path("runs/data/emoji/test_captions.jsonl").unlink()
    with pytest.raises(SystemExit, match="error: The held-out set 'emoji held out' is not there: runs/data/emoji/"):
        main([str(CONFIG)])


def test_it_is_not_to_be_started_in_several_processes(runs, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="error: Start it once, without torchrun: --processes says how many"):
        main([str(CONFIG)])


def test_averages_are_those_of_the_hand_computation():
    one, joint, reconstruction = aggregate(RESULTS)
    assert [(row["codebooks"], row["supervision"]) for row in (one, joint, reconstruction)] == [
        (1, "joint"),
        (8, "joint"),
        (8, "reconstruction"),
    ]
    assert one["seeds"] == [0, 1, 2] and one["bits_per_position"] == 6 and joint["bits_per_position"] == 24
    decibels, accuracy = one["metrics"]["PSNR (dB), test"], one["metrics"]["zero-shot (%), test"]
    assert decibels["mean"] == pytest.approx(22.0) and decibels["values"] == [20.0, 21.0, 25.0]
    assert decibels["std"] == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert (accuracy["mean"], accuracy["std"]) == (pytest.approx(50.0), pytest.approx(25.0))
    assert one["metrics"]["codes in use (%)"]["mean"] == 76.0
    assert one["metrics"]["training, seconds"]["values"] == [100.0, 101.0]  # the third run was resumed
    assert joint["metrics"]["PSNR (dB), test"] == {"mean": 24.0, "std": None, "values": [24.0]}
    assert "zero-shot (%), test" not in reconstruction["metrics"]
    lines = table([one, joint, reconstruction]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        *("1 x 64", "6", "joint", "22.00 ± 2.65", "50.00 ± 25.00", "76.00 ± 1.00", "100 ± 1", "0 1 2"),
    ]
    assert [cell.strip() for cell in lines[4].split("|")[1:-1]][3:5] == ["26.00", "-"]


def test_the_plot_has_a_panel_for_each_metric_but_the_cost():
    few, many = (Image.open(io.BytesIO(plot(aggregate(rows), "title"))) for rows in (RESULTS[4:], RESULTS))
    assert few.format == "PNG" and many.width == pytest.approx(1.5 * few.width, abs=2)  # 2 and 3 panels


def test_zero_shot_counts_the_images_whose_own_class_is_nearest():
    classes = torch.eye(len(CLASSES))
    captions = [CLASSES[3], "a shape", CLASSES[5], CLASSES[0]]
    embeds = classes[[3, 7, 4, 0]]
    assert zero_shot(embeds, classes, captions) == {"images": 3, "right": 2, "accuracy": 2 / 3}
    assert zero_shot(embeds[1:2], classes, captions[1:2]) is None


def test_a_killed_comparison_goes_on_and_a_finished_one_is_not_repeated(config, tmp_path, capsys, monkeypatch):
    measure, calls = claims.measure, []

    def killed_at_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(claims, "measure", killed_at_the_third)
    with pytest.raises(SystemExit, match="Finished runs are kept"):
        main([config])
    monkeypatch.undo()
    paths = sorted((tmp_path / "out" / "runs").glob("*/result.json"))
    times = {path: path.stat().st_mtime_ns for path in paths}
    assert [path.parent.name[:9] for path in paths] == ["k1-joint-", "k8-joint-"]
    assert len(json.loads((tmp_path / "out" / "claims.json").read_text(encoding="utf-8"))["missing_runs"]) == 1

    main([config])
    assert {path: path.stat().st_mtime_ns for path in paths} == times
    report = json.loads((tmp_path / "out" / "claims.json").read_text(encoding="utf-8"))
    assert report["missing_runs"] == [] and len(report["runs"]) == len(report["rows"]) == 3
    third = report["runs"][2]
    assert third["supervision"] == "reconstruction" and third["resumed_from_step"] == 2
    assert [run["resumed_from_step"] for run in report["runs"][:2]] == [0, 0]
    assert third["held_out"]["test images"]["zero_shot"] is None
    assert capsys.readouterr().out.rstrip().endswith(table(report["rows"]).splitlines()[-1])
    assert table(report["rows"]) in (tmp_path / "out" / "claims.md").read_text(encoding="utf-8")
    assert Image.open(tmp_path / "out" / "claims.png").format == "PNG"

    monkeypatch.setattr(claims.train_tokenizer, "main", None)  # would be called if anything were trained again
    main([config])
    assert json.loads((tmp_path / "out" / "claims.json").read_text(encoding="utf-8")) == report

    first = report["runs"][0]
    folder = tmp_path / "out" / "runs" / first["run"]
    assert not list(folder.glob("checkpoint-*"))
    tokenizer = UniTokModel.from_pretrained(folder / "release").eval()
    quantizer = tokenizer.vision_model.quantizer
    assert quantizer.codebooks.shape == (1, 64, 64)
    images = [json.loads(line)["image"] for line in (tmp_path / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    pixels = AutoImageProcessor.from_pretrained(folder / "release")(images)["pixel_values"]
    codes = tokenizer.encode(pixels)
    errors = (tokenizer.decode(codes) - pixels).square().flatten(1).mean(dim=1)
    held_out = first["held_out"]["test images"]
    assert held_out["images"] == 5 and held_out["zero_shot"]["images"] == 4
    assert held_out["psnr_db"] == pytest.approx((10 * torch.log10(4 / errors)).mean().item(), abs=1e-4)
    assert held_out["codes_used_percent"] == pytest.approx(100 * len(codes.unique()) / 64)
    assert first["codebook_usage_percent"] == pytest.approx(quantizer.codebook_usage.item())
    assert report["rows"][0]["metrics"]["PSNR (dB), test images"]["mean"] == statistics.mean(
        [metrics(first)["PSNR (dB), test images"]]
    )


def test_an_image_that_cannot_be_read_is_named(config, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"nothing")
    (tmp_path / "test.jsonl").write_text(
        json.dumps({"image": "broken.png", "caption": CLASSES[0]}) + "\n", encoding="utf-8"
    )
    with pytest.raises(SystemExit, match=r"error: broken.png in row 0 of .*test.jsonl"):
        main([config, "--codebooks", "1"])
