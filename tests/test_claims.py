"""The comparison of numbers of sub-codebooks: its plan, its averages, and a small one from end to end."""

import io
import json
import math
import os
import signal
import statistics
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoImageProcessor

from eval import claims
from eval.claims import choose, main
from eval.claims_metrics import CLASSES, baselines, validation_curve, zero_shot
from eval.claims_plan import ClaimsArguments, Plan
from eval.claims_report import GAINED, aggregate, plot, search_table, table, validation_psnr
from training.arguments import parse_yaml_and_command_line
from training.easy_vqa import load
from training.losses import LossArguments
from training.tokenizer_arguments import TokenizerTrainingArguments
from training.train_tokenizer import TokenizerArguments
from unitok_mllm import UniTokConfig, UniTokImageProcessor, UniTokModel


pytestmark = [pytest.mark.full, pytest.mark.usefixtures("fresh_accelerator")]


CONFIG = Path(__file__).parent.parent / "training" / "configs" / "claims.yaml"
TYPES = (ClaimsArguments, TokenizerArguments, LossArguments, TokenizerTrainingArguments)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Plans the comparison of the shipped config, with options of the command line; every K's choice is "revival"."""
    monkeypatch.chdir(tmp_path)
    values = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    for path in (*values["validation"].values(), *values["held_out"].values()):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("{}", encoding="utf-8")

    def planned(*options: str) -> list:
        arguments = parse_yaml_and_command_line(TYPES, [str(CONFIG), *options])
        return Plan(*arguments).comparison(dict.fromkeys(arguments[0].codebooks, "revival"))

    return planned


@pytest.fixture
def config(tmp_path, text_tokenizer):
    """A comparison that takes seconds: 12 images to train on, 5 held out, of which one has no colour."""
    text_tokenizer.save_pretrained(tmp_path / "text")
    samples = {"train": load("train")[:12], "test": load("test")[:4]}
    unclear = next(sample for sample in load("test")[4:] if sample.caption not in CLASSES)
    samples["test"].append(unclear)
    samples["validation"] = load("train")[12:15]
    for split, rows in samples.items():
        lines = [json.dumps({"image": str(sample.image), "caption": sample.caption}) + "\n" for sample in rows]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    vision = {"image_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"stem_width": 8, "stage_dims": [8, 16], "stage_depths": [1, 1]}
    values = {
        "steps": 2,
        "batch_size": 4,
        "total_codes": 64,
        "codebooks": [8],
        "seeds": [0],
        "search_steps": 1,
        "candidates": {"plain": {}, "revival": {"codebook_start": "data", "revive_dead_codes": 1}},
        "validation": {"validation images": str(tmp_path / "validation.jsonl")},
        "held_out": {"test images": str(tmp_path / "test.jsonl")},
        "output_dir": str(tmp_path / "out"),
        "vision_overrides": vision,
        "text_tokenizer": str(tmp_path / "text"),
        "datasets": [{"kind": "folder", "path": str(tmp_path / "train.jsonl")}],
        "use_cpu": True,
        "bf16": False,
        "save_steps": 1,
        "eval_steps": 1,
    }
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def result(k: int, seed: int, decibels: float | None, accuracy: float | None, supervision: str = "joint") -> dict:
    shot = None if accuracy is None else {"images": 8, "right": 8 * accuracy, "accuracy": accuracy}
    sets = {"test": {"images": 8, "psnr_db": decibels, "codes_used_percent": 75.0 + seed, "zero_shot": shot}}
    curve = [{"step": step, "psnr_db": 10.0 + seed + step, "codes_used_percent": 50.0} for step in (3, 6, 8)]
    return {
        "codebooks": k,
        "codebook_size": 64 // k,
        "bits_per_position": k * math.log2(64 // k),
        "supervision": supervision,
        "candidate": "plain",
        "seed": seed,
        "training_seconds": 100.0 + seed,
        "resumed_from_step": seed // 2,
        "validation_curve": curve,
        "sets": sets,
    }


RESULTS = [
    result(8, 0, 24.0, 0.5),
    result(1, 0, 20.0, 0.25),
    result(1, 1, 21.0, 0.5),
    result(1, 2, 25.0, 0.75),
    result(8, 0, 26.0, None, "reconstruction"),
    result(8, 0, None, 1.0, "captions"),
]
BASELINES = {"mean colour": {"test": 16.0}, "mean image": {"test": 9.0}}


def test_the_runs_differ_in_the_split_of_the_codes_and_in_nothing_else(runs):
    planned = runs()
    assert [(run.num_codebooks, run.supervision) for run in planned[:6]] == [
        *((k, "joint") for k in (1, 2, 4, 8)),
        (8, "reconstruction"),
        (8, "captions"),
    ]
    assert [run.seed for run in planned] == [0] * 6 + [1] * 6 + [2] * 6
    assert len({run.name for run in planned}) == 18
    shapes = {}
    for run in planned[:6]:
        assert run.num_codebooks * run.codebook_size == 1024
        training = run.settings["training"]
        config = UniTokConfig.preset(training["preset"], training["text_overrides"], **training["vision_overrides"])
        with torch.device("meta"):
            model = UniTokModel(config)
        shapes[run.num_codebooks] = {name: tuple(p.shape) for name, p in model.named_parameters()}
        codebooks = shapes[run.num_codebooks].pop("vision_model.quantizer.codebooks")
        assert codebooks == (run.num_codebooks, 1024 // run.num_codebooks, 64 // run.num_codebooks)
        same = {name: value for name, value in run.settings["training"].items() if name != "vision_overrides"}
        first = {name: value for name, value in planned[0].settings["training"].items() if name != "vision_overrides"}
        without_pixels = {"l1_weight": 0.0, "l2_weight": 0.0, "perceptual_weight": 0.0}
        changes = {"joint": {}, "reconstruction": {"contrastive_weight": 0.0}, "captions": without_pixels}
        assert same == first | changes[run.supervision]
    assert shapes[1] == shapes[2] == shapes[4] == shapes[8]
    assert [run.bits for run in planned[:4]] == [10, 18, 32, 56]


def test_every_candidate_is_tried_on_the_validation_images_for_each_k_and_the_best_is_each_ones_own(runs):
    arguments = parse_yaml_and_command_line(TYPES, [str(CONFIG), "--codebooks", "1", "8"])
    candidates = arguments[0].candidates
    assert candidates["plain"] == {} and len(candidates) > 2
    plan = Plan(*arguments)
    search = plan.search()
    assert [(run.candidate, run.num_codebooks) for run in search] == [(name, k) for name in candidates for k in (1, 8)]
    for run in search:
        training = run.settings["training"]
        assert training.items() >= candidates[run.candidate].items()
        assert training["max_steps"] == arguments[0].search_steps and training["seed"] == arguments[0].search_seed
        assert run.settings["measured"] == arguments[0].validation and run.supervision == "joint"
    tried = [
        result(k, 100, decibels, 0.5) | {"candidate": name}
        for name, pair in {"plain": (20.0, 22.0), "revival": (21.0, 21.5), "revival, rotation": (21.0, 22.0)}.items()
        for k, decibels in zip((1, 8), pair)
    ]
    choice = choose(arguments[0], tried)
    assert choice == {1: "revival", 8: "plain"}  # the first of equals
    lines = search_table(tried).splitlines()
    assert lines[0].split("|")[1:-1][1].strip() == "1 x 64" and "22.00 dB, 175.0%" in lines[2]
    compared = plan.comparison(choice)
    assert {(run.num_codebooks, run.candidate) for run in compared} == {(1, "revival"), (8, "plain")}
    assert compared[0].settings["training"]["revive_dead_codes"] == candidates["revival"]["revive_dead_codes"] > 0
    assert compared[1].settings["training"]["revive_dead_codes"] == 0
    assert all(run.settings["measured"] == arguments[0].held_out for run in compared)


def test_a_single_candidate_needs_no_search(runs):
    arguments = parse_yaml_and_command_line(TYPES, [str(CONFIG)])
    arguments[0].candidates = {"only": {"revive_dead_codes": 7}}
    plan, choice = Plan(*arguments), choose(arguments[0], [])
    assert plan.search() == [] and choice == dict.fromkeys((1, 2, 4, 8), "only")
    assert {run.settings["training"]["revive_dead_codes"] for run in plan.comparison(choice)} == {7}


def test_sources_other_than_folders_and_evaluation_sets_of_the_trainings_are_refused(runs):
    arguments = parse_yaml_and_command_line(TYPES, [str(CONFIG)])
    arguments[1].eval_datasets = arguments[1].datasets
    with pytest.raises(ValueError, match="Give the validation sets in validation, not in eval_datasets"):
        Plan(*arguments)
    arguments[1].datasets = [{"kind": "hf", "path": "owner/name"}]
    with pytest.raises(ValueError, match="The datasets must be of kind folder, got hf"):
        Plan(*arguments)


def test_a_candidate_with_an_unknown_option_is_refused(runs):
    arguments = parse_yaml_and_command_line(TYPES, [str(CONFIG)])
    arguments[0].candidates["typo"] = {"revive": 7, "learning_rate": 1e-3}
    with pytest.raises(ValueError, match="The candidate 'typo' sets unknown options: revive"):
        Plan(*arguments)


@pytest.mark.parametrize("options", [7, "revive_dead_codes: 7", None, ["revive_dead_codes"]])
def test_a_candidate_that_is_no_dict_is_refused(config, capsys, options):
    values = yaml.safe_load(Path(config).read_text(encoding="utf-8")) | {"candidates": {"odd": options}}
    Path(config).write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        main([config])
    said = f"error: The candidate 'odd' must be a mapping of options to values, got {options!r}.\n"
    assert end.value.code == 2 and capsys.readouterr().err == said


def test_validation_psnr_is_the_mean_over_images_not_over_sets():
    sets = {"a": {"images": 1, "psnr_db": 20.0}, "b": {"images": 3, "psnr_db": 24.0}}
    assert validation_psnr({"sets": sets}) == 23.0


def test_a_step_repeated_after_a_break_counts_once(tmp_path):
    lines = [
        {"step": step, "eval_psnr": psnr, "eval_codebook_usage": 1.0} for step, psnr in ((2, 9.0), (4, 9.5), (4, 10.0))
    ]
    lines.insert(1, {"step": 2, "loss": 1.0})
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert [(point["step"], point["psnr_db"]) for point in validation_curve(tmp_path)] == [(2, 9.0), (4, 10.0)]


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
        (("--codebooks", "3"), r"total_codes \(1024\) is not a multiple of 3 sub-codebooks"),
        (("--codebooks", "128"), r"quantizer_dim \(64\) is not a multiple of num_codebooks \(128\)"),
        (("--steps", "0"), "steps must be at least 1, got 0"),
        (("--seeds", "-1"), r"limit and seeds must be at least 0, got 0, 3 and \[-1\]"),
        (("--max_steps", "5", "--seed", "1"), "Set steps, seeds and batch_size instead of max_steps, seed"),
        (("--processes", "5"), r"batch_size \(16\) is not a multiple of 5 processes"),
        (("--search_steps", "0"), "search_steps must be at least 1, got 0"),
        (("--init_from", "folder"), "Every run starts from new weights"),
    ],
)
def test_settings_that_cannot_be_are_refused(runs, options, message):
    with pytest.raises(ValueError, match=message):
        runs(*options)


def test_a_held_out_set_that_is_missing_is_named(runs):
    Path("runs/data/easy-vqa/test_captions.jsonl").unlink()
    with pytest.raises(SystemExit, match="error: The held_out set 'easy-VQA test' is not there: runs/data/easy-vqa/"):
        main([str(CONFIG)])


def test_it_is_not_to_be_started_in_several_processes(runs, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="error: Start this script without torchrun: --processes sets"):
        main([str(CONFIG)])


def test_averages_are_those_of_the_hand_computation():
    one, captions, joint, reconstruction = rows = aggregate(RESULTS)
    assert [(row["codebooks"], row["supervision"]) for row in rows] == [
        (1, "joint"),
        (8, "captions"),
        (8, "joint"),
        (8, "reconstruction"),
    ]
    assert one["seeds"] == [0, 1, 2] and one["bits_per_position"] == 6 and joint["bits_per_position"] == 24
    decibels, accuracy = one["metrics"]["PSNR (dB), test"], one["metrics"]["zero-shot (%), test"]
    assert decibels["mean"] == pytest.approx(22.0) and decibels["values"] == [20.0, 21.0, 25.0]
    assert decibels["std"] == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert (accuracy["mean"], accuracy["std"]) == (pytest.approx(50.0), pytest.approx(25.0))
    assert one["metrics"]["codes used (%), test"]["mean"] == 76.0
    assert one["metrics"][GAINED]["values"] == [2.0] * 3  # from step 6 to step 8
    assert one["curve"] == {3: 14.0, 6: 17.0, 8: 19.0}
    assert one["metrics"]["training, seconds"]["values"] == [100.0, 101.0]  # the third run was resumed
    assert joint["metrics"]["PSNR (dB), test"] == {"mean": 24.0, "std": None, "values": [24.0]}
    assert "zero-shot (%), test" not in reconstruction["metrics"]
    assert "PSNR (dB), test" not in captions["metrics"] and GAINED not in captions["metrics"]
    lines = table(rows, BASELINES).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0][4:-1] == [
        *("PSNR (dB), test", "zero-shot (%), test", "codes used (%), test", GAINED, "training, seconds"),
    ]
    assert cells[2] == ["(mean colour)", "-", "-", "-", "16.00", *["-"] * 5]
    assert cells[3] == ["(mean image)", "-", "-", "-", "9.00", *["-"] * 5]
    assert cells[4] == [
        *("1 x 64", "6", "joint", "plain", "22.00 ± 2.65", "50.00 ± 25.00", "76.00 ± 1.00", "2.00 ± 0.00"),
        *("100 ± 1", "0 1 2"),
    ]
    assert cells[5][4:6] == ["-", "100.00"] and cells[7][4:6] == ["26.00", "-"]


def test_the_plot_has_a_panel_for_each_metric_but_the_cost_and_one_for_the_curves():
    few, many = (Image.open(io.BytesIO(plot(aggregate(rows), BASELINES, "t"))) for rows in (RESULTS[4:5], RESULTS))
    assert few.format == "PNG" and many.width == pytest.approx(4 / 3 * few.width, abs=2)  # 3 and 4 panels


def test_baselines_are_those_of_a_loop_over_the_images(config, tmp_path):
    claims, tokenizer, *_ = parse_yaml_and_command_line(TYPES, [config])
    pixels = {}
    for split in ("train", "test"):
        rows = map(json.loads, (tmp_path / f"{split}.jsonl").read_text(encoding="utf-8").splitlines())
        size = {"height": 32, "width": 32}
        processor = UniTokImageProcessor(mode=tokenizer.image_mode, size=size)
        pixels[split] = [processor(Image.open(row["image"]))["pixel_values"][0] for row in rows]
    mean_image = sum(pixels["train"]) / len(pixels["train"])
    decibels = {"mean colour": [], "mean image": []}
    for image in pixels["test"]:
        colour = torch.stack([channel.mean() for channel in image])[:, None, None]
        for kind, painted in (("mean colour", colour), ("mean image", mean_image)):
            decibels[kind].append(10 * math.log10(4 / (painted - image).square().mean().item()))
    expected = {kind: {"test images": pytest.approx(statistics.mean(values))} for kind, values in decibels.items()}
    assert baselines(claims, tokenizer) == expected


def test_zero_shot_counts_the_images_whose_own_class_is_nearest():
    classes = torch.eye(len(CLASSES))
    captions = [CLASSES[3], "a shape", CLASSES[5], CLASSES[0]]
    embeds = classes[[3, 7, 4, 0]]
    assert zero_shot(embeds, classes, captions) == {"images": 3, "right": 2, "accuracy": 2 / 3}
    assert zero_shot(embeds[1:2], classes, captions[1:2]) is None


@pytest.mark.attack
def test_a_killed_comparison_goes_on_and_a_finished_one_is_not_repeated(config, tmp_path, capsys, monkeypatch):
    measure, calls, step = claims.measure, [], claims.train_tokenizer.TokenizerTrainer._train_on

    def told_in_the_first_step(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(claims.train_tokenizer.TokenizerTrainer, "_train_on", told_in_the_first_step)
        with pytest.raises(SystemExit, match="^\nInterrupted. Finished runs are kept") as end:
            main([config])
    assert end.value.code == 143 and len(list((tmp_path / "out/runs").glob("*/checkpoint-1/state.pt"))) == 1

    def killed_at_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return measure(*arguments)

    monkeypatch.setattr(claims, "measure", killed_at_the_third)
    with pytest.raises(SystemExit, match="Finished runs are kept"):
        main([config])
    monkeypatch.undo()
    paths = sorted((tmp_path / "out" / "runs").glob("*/result.json"))
    times = {path: path.stat().st_mtime_ns for path in paths}
    assert [path.parent.name.split("-seed")[0] for path in paths] == ["search-k8-joint"] * 2
    assert len(json.loads((tmp_path / "out" / "claims.json").read_text(encoding="utf-8"))["missing_runs"]) == 0

    main([config])
    assert {path: path.stat().st_mtime_ns for path in paths} == times
    report = json.loads((tmp_path / "out" / "claims.json").read_text(encoding="utf-8"))
    assert report["missing_runs"] == []
    tried = {run["candidate"]: validation_psnr(run) for run in report["search"]}
    assert list(tried) == ["plain", "revival"] and report["choice"] == {"8": max(tried, key=tried.get)}
    joint, reconstruction, captions = report["runs"]
    supervisions = ["joint", "reconstruction", "captions"]
    assert [run["supervision"] for run in report["runs"]] == supervisions and len(report["rows"]) == 3
    assert [run["resumed_from_step"] for run in report["search"] + report["runs"]] == [1, 0, 2, 0, 0]
    assert reconstruction["sets"]["test images"]["zero_shot"] is None
    assert captions["sets"]["test images"]["psnr_db"] is None
    shown = table(report["rows"], report["baselines_psnr_db"])
    assert capsys.readouterr().out.rstrip().endswith(shown.splitlines()[-1])
    text = (tmp_path / "out" / "claims.md").read_text(encoding="utf-8")
    assert shown in text and search_table(report["search"]) in text
    assert Image.open(tmp_path / "out" / "claims.png").format == "PNG"

    monkeypatch.setattr(claims.train_tokenizer, "main", None)  # would be called if anything were trained again
    main([config])
    assert json.loads((tmp_path / "out" / "claims.json").read_text(encoding="utf-8")) == report

    folder = tmp_path / "out" / "runs" / joint["run"]
    assert not list(folder.glob("checkpoint-*"))
    tokenizer = UniTokModel.from_pretrained(folder / "release").eval()
    assert tokenizer.vision_model.quantizer.codebooks.shape == (8, 8, 8)

    def measured(split: str) -> tuple[float, float]:
        """PSNR (dB), and percentage of all codes that the images are encoded with."""
        lines = (tmp_path / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        images = [json.loads(line)["image"] for line in lines]
        pixels = AutoImageProcessor.from_pretrained(folder / "release")(images)["pixel_values"]
        codes = tokenizer.encode(pixels)
        errors = (tokenizer.decode(codes) - pixels).square().flatten(1).mean(dim=1)
        used = sum(len(codes[:, k].unique()) for k in range(8))
        return (10 * torch.log10(4 / errors)).mean().item(), 100 * used / 64

    held_out = joint["sets"]["test images"]
    assert held_out["images"] == 5 and held_out["zero_shot"]["images"] == 4
    assert (held_out["psnr_db"], held_out["codes_used_percent"]) == pytest.approx(measured("test"), abs=1e-4)
    assert [point["step"] for point in joint["validation_curve"]] == [1, 2]
    last = joint["validation_curve"][-1]
    assert (last["psnr_db"], last["codes_used_percent"]) == pytest.approx(measured("validation"), abs=1e-4)


def test_an_image_that_cannot_be_read_is_named(config, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"nothing")
    (tmp_path / "test.jsonl").write_text(
        json.dumps({"image": "broken.png", "caption": CLASSES[0]}) + "\n", encoding="utf-8"
    )
    with pytest.raises(ValueError, match=r"broken.png in row 0 of .*test.jsonl"):
        baselines(*parse_yaml_and_command_line(TYPES, [config])[:2])
