"""Users' mistakes in any script: one line that names the mistake, and exit code 2."""

import argparse
import importlib
import json
import math
import os
import shlex
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import typer
from accelerate import Accelerator
from mllm_runs import write_config
from PIL import Image
from safetensors.torch import save_file
from test_imports import SCRIPTS
from transformers import TrainingArguments

from eval._common import read_result
from training import train_mllm, train_tokenizer
from training.arguments import Parser, check_source, parse_yaml_and_command_line, use_cpu_of
from training.emoji import STYLES, Emoji
from training.errors import check_keys, one_line_errors, underscored
from training.interrupts import ENDS, Interrupted, StopRequest
from training.tokenizer_arguments import TokenizerTrainingArguments
from training.train_mllm import MLLMArguments
from training.train_tokenizer import TokenizerArguments
from unitok_mllm.devices import find_device


ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "unitok_mllm/checkpoints/tiny")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def line_of(capsys, main, *args) -> str:
    """What a script that a user called wrongly says: one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(*args)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("error", [ValueError("a\nb"), OSError("a b"), FloatingPointError("a  b")])
def test_what_a_user_can_mend_takes_one_line(error, capsys):
    def main():
        raise error

    assert line_of(capsys, one_line_errors()(main)) == "error: a b\n"


def test_bugs_keep_their_traceback():
    with pytest.raises(KeyError):
        one_line_errors()(lambda: {}["a"])()


@pytest.mark.parametrize("text, said", [("", "It goes on.\n"), ("Step 3 is kept.", "Step 3 is kept.\n")])
def test_ctrl_c_ends_in_one_line(text, said, capsys):
    @one_line_errors("It goes on.")
    def main():
        raise KeyboardInterrupt(*[text] * bool(text))

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130 and capsys.readouterr().err == f"\n{said}"


@pytest.mark.parametrize("number", ENDS, ids=lambda number: number.name)
@pytest.mark.parametrize("with_typer", [False, True])
@pytest.mark.attack
def test_every_signal_that_ends_a_script_is_ctrl_c(number, with_typer, capsys):
    before, app = {end: signal.getsignal(end) for end in ENDS}, typer.Typer()

    @app.command()
    def command():
        os.kill(os.getpid(), number)
        pytest.fail("goes on")

    main = one_line_errors("It goes on.")(app if with_typer else command)
    with pytest.raises(SystemExit) as end:
        main([]) if with_typer else main()
    assert end.value.code == 128 + number and capsys.readouterr().err == "\nIt goes on.\n"
    assert {end: signal.getsignal(end) for end in ENDS} == before


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        one_line_errors()(lambda: os.kill(os.getpid(), signal.SIGHUP))()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_scripts_run_in_other_threads_too():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(one_line_errors()(lambda: 3)).result() == 3


@pytest.mark.attack
def test_the_second_signal_does_not_wait_for_the_step(capsys):
    with StopRequest(Accelerator(cpu=True)) as stopping:
        assert not stopping.is_due()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.is_due() and "once more: at once" in capsys.readouterr().err
        with pytest.raises(Interrupted) as at_once:
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted) as after_the_step:
            stopping.stop()
    assert (at_once.value.number, after_the_step.value.number) == (signal.SIGINT, signal.SIGTERM)


def test_typer_errors_take_one_line_too(capsys):
    app = typer.Typer()

    @app.command()
    def command(name: str, count: int = 1):
        if count > 2:
            raise ValueError("too many")
        if count < 0:
            raise KeyboardInterrupt
        raise typer.Exit(count - 1)

    main = one_line_errors()(app)
    assert line_of(capsys, main, ["a", "--cuont", "2"]).startswith("error: No such option: --cuont")
    assert "Missing argument 'name'" in line_of(capsys, main, [])
    assert line_of(capsys, main, ["a", "--count", "3"]) == "error: too many\n"
    for count in (1, 2):
        with pytest.raises(SystemExit) as end:
            main(["a", "--count", str(count)])
        assert end.value.code == count - 1
    with pytest.raises(SystemExit) as end:
        main(["a", "--count", "-1"])
    assert end.value.code == 130 and capsys.readouterr().err == "\nInterrupted. The same command begins again.\n"


@pytest.mark.parametrize(
    "script",
    [
        *(
            f"eval.{name}"
            for name in "claims easy_vqa emoji judge reconstruction speed text_to_image vqa zero_shot".split()
        ),
        "training.train_mllm",
        "training.train_tokenizer",
    ],
)
def test_a_help_says_what_the_script_does_and_gives_a_command(script, capsys):
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0 and f"\n\n{module.__doc__.splitlines()[0]}\n\n" in printed
    (command,) = printed.rpartition("\nexample:\n")[2].strip().splitlines()
    assert command.startswith(f"python -m {script}") and command in module.__doc__


@pytest.mark.parametrize("name", ["easy_vqa", "emoji", "reconstruction", "speed", "text_to_image", "vqa", "zero_shot"])
def test_every_evaluation_refuses_a_missing_model_a_device_and_a_batch_of_none(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("table.json").write_text("[]", encoding="utf-8")
    module = importlib.import_module(f"eval.{name}")
    needed = {
        "text_to_image": ["--prompts", "prompts.txt", "--output", "out"],
        "reconstruction": ["--images", "pictures"],
        "zero_shot": ["--dataset", "easy-vqa"],
        "emoji": ["--data", str(tmp_path)],
    }.get(name, [])
    if name == "emoji":
        Path(module.TABLE).write_text("[]", encoding="utf-8")
    assert "no model in runs/nothing: " in line_of(capsys, module.main, [*needed, "--model", "runs/nothing"])
    needed += ["--model", TINY]
    said = line_of(capsys, module.main, [*needed, "--device", "gpu"])
    assert "there is no device 'gpu' here; there is auto, cpu" in said
    option = "--runs" if name == "speed" else "--batch_size"
    assert "must be at least 1" in line_of(capsys, module.main, [*needed, option, "0"])
    said = line_of(capsys, module.main, [*needed, "--modle", "x"])
    assert said == "error: the command line has no '--modle': did you mean '--model'?\n"


def train(capsys, name: str, *args: str) -> str:
    return line_of(capsys, one_line_errors()(importlib.import_module(f"training.train_{name}").main), list(args))


@pytest.fixture
def config(tmp_path) -> str:
    """A training of the shipped model on no data at all."""
    return str(write_config(tmp_path / "run.yaml", Path(TINY), []))


@pytest.mark.parametrize(
    "options, said",
    [
        ("--trainabel embedder", "the command line has no '--trainabel': did you mean '--trainable'?"),
        (
            "--trainable embedder,depth_head",
            "Separate the names in trainable by spaces on the command line, got 'embedder,depth_head'",
        ),
        ("--lora r=16", "argument --lora: expected a mapping such as '{name: value}', got 'r=16'"),
        ("--lr_scheduler_kwargs [3]", "scheduler-kwargs: expected a mapping such as '{name: value}', got '[3]'"),
        (
            "--gradient_checkpointing_kwargs '{'",
            "checkpointing-kwargs: expected a mapping such as '{name: value}', got '{'",
        ),
        ("--accelerator_config '{'", "accelerator-config: expected a mapping such as '{name: value}', got '{'"),
        ("--deepspeed '{a'", "argument --deepspeed: expected a mapping such as '{name: value}', got '{a'"),
        ("--lora '{rank:16}'", "lora has no 'rank:16'; it has "),
        ("--per_device_train_batch_size 0", "per_device_train_batch_size must be at least 1, got 0"),
        ("--deepspeed nothing.json", "deepspeed: there is no file nothing.json"),
        ("--model runs/nothing", "model: there is no folder runs/nothing"),
        ("--device gpu", "there is no device 'gpu' here; there is auto, cpu"),
        ("--datasets '{path: x.json, typ: text}'", "the data set x.json has no 'typ': did you mean 'type'?"),
        ("--datasets '{type: text}'", "A data set has no path: {'type': 'text'}"),
        ("--lora '{rr: 16}'", "lora has no 'rr': did you mean 'r'?"),
        (
            "--sample_questions '{image: a.png, qestion: what}'",
            "a sample question has no 'qestion': did you mean 'question'?",
        ),
        ("--sample_questions '{image: a.png}'", "A sample question must have an image and a question"),
        ("--sample_options '{guidance: 3}'", "sample_options has no 'guidance': did you mean 'guidance_scale'?"),
        ("--card '{licence: mit}'", "card has no 'licence': did you mean 'license'?"),
        ("--depth_config '{hiden_size: 3}'", "depth_config has no 'hiden_size': did you mean 'hidden_size'?"),
        (
            "--llm_config '{model_type: llama, hiden_size: 3}'",
            "llm_config has no 'hiden_size': did you mean 'hidden_size'?",
        ),
        ("--llm_config '{model_type: lama}'", "llm_config needs a model_type that transformers knows, got 'lama'"),
        ("--card '{license: [mit]}'", "license of the card must be a text, got ['mit']"),
        ("--card '{tags: [3]}'", "tags of the card must be a text or a list of texts, got [3]"),
        ("--lora '{r: x}'", "r of lora must be an integer of at least 1, got 'x'"),
        ("--lora '{r: 0}'", "r of lora must be an integer of at least 1, got 0"),
        ("--lora '{lora_dropout: 3}'", "lora_dropout of lora must be a number from 0 to 1, got 3"),
        ("--lora '{lora_alpha: [3]}'", "lora_alpha of lora must be a number from 0 to 1e+06, got [3]"),
        (
            "--learning_rates '{embedder: -1e-3}'",
            "learning_rates of embedder must be a number from 0 to 1e+06, got '-1e-3'",
        ),
        (
            "--learning_rates '{embedder: .nan}'",
            "learning_rates of embedder must be a number from 0 to 1e+06, got nan",
        ),
        ("--warmup_steps nan", "warmup_steps (nan) is not between 0.0 and 1000000.0"),
        ("--adam_beta2 2", "adam_beta2 (2.0) is not between 0.0 and "),
        ("--adam_epsilon nan", "adam_epsilon (nan) is not between 0.0 and 1.0"),
        ("--dataloader_num_workers -1", "dataloader_num_workers (-1) is not between 0 and 1024"),
        ("--datasets '{path: 3}'", "path of a data set must be a text, got 3"),
        (
            "--sample_questions '{image: 3, question: a}'",
            "must have an image and a question, both texts, got {'image': 3",
        ),
        (
            "--datasets '{path: row.jsonl, type: captions}' --sample_questions '{image: no.png, question: a}'",
            "cannot read image 'no.png'",
        ),
        (
            "--datasets '{path: row.jsonl, type: captions}' --resume_from_checkpoint runs/none",
            "runs/none is not a checkpoint: it has no trainer_state.json",
        ),
        ("--seed -1", "seed (-1) is not between 0 and 4294967295"),
        ("--save_steps -2", "save_steps (-2.0) is not between 1e-12 and "),
        ("--save_total_limit 0", "save_total_limit (0) is not between 1e-12 and "),
        ("--deepspeed list.json", "list.json has a list, expected a mapping of names to values"),
        ("--deepspeed cut.json", "cut.json is not valid JSON: "),
        (
            "--datasets '{path: row.jsonl, type: captions}' --push_to_hub --hub_model_id a/b/c",
            "Repo id must be in the form",
        ),
        ("--caption_dropout 3", "caption_dropout (3.0) is not between 0.0 and 1.0"),
        ("--attn_implementation sdap", "attn_implementation has no 'sdap': did you mean 'sdpa'?"),
        ("--embedder_heads 3", "embedder_dim (1024) is not a multiple of embedder_heads (3)."),
        ("--embedder_dim 0", "embedder_dim (0) is not between 1 and "),
        ("--depth_config '{hidden_size: 64, num_attention_heads: 3}'", "hidden_size (64) is not a multiple of num_"),
        ("--sample_prompts a --sample_options '{top_k: -3}'", "top_k must be at least 0 (0: all codes), got -3."),
        ("--learning_rates '{embeder: 1}'", "learning_rates has no 'embeder': did you mean 'embedder'?"),
        ("--trainable embeder", "trainable has no 'embeder': did you mean 'embedder'?"),
        (
            "--datasets '{path: row.json, type: captions}'",
            "row.json: none of the 1 rows that were tried can be used: cannot read image 'a.png'",
        ),
        (
            "--datasets '{path: rows.json, type: captions}' --max_length 10",
            "rows.json: none of the 100 rows that were tried can be used: max_length 10 would cut through an image",
        ),
        (
            "--datasets '{path: text.json, type: text, weight: 1}' '{path: text.json, type: text}'",
            "Give all sources of `datasets` a weight, or none of them.",
        ),
        ("stray", "unexpected argument stray: it belongs to no option"),
    ],
)
@pytest.mark.attack
def test_a_wrong_mllm_training_ends_in_one_line(options, said, config, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[3]", encoding="utf-8")
    Path("cut.json").write_text('{"a": ', encoding="utf-8")
    Path("row.jsonl").write_text('{"image": "a.png", "caption": "a"}\n', encoding="utf-8")
    for name, rows in {"row": [{"image": "a.png", "caption": "a"}], "text": [{"text": "a red circle"}]}.items():
        Path(f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    Path("rows.json").write_text(json.dumps([{"image": "a.png", "caption": "a"}] * 250), encoding="utf-8")
    monkeypatch.setattr(train_mllm, "build_model", None)
    assert said in train(capsys, "mllm", config, *shlex.split(options))


@pytest.mark.parametrize(
    "options, said",
    [
        ("--init_open_clip ViTamin-L256", "open_clip has no 'ViTamin-L256': did you mean 'ViTamin-L-256'?"),
        (
            "--init_open_clip ViTamin-L-256 --init_open_clip_weights no.pt",
            "init_open_clip_weights is a file or a tag of ViTamin-L-256's (datacomp1b), not 'no.pt'",
        ),
    ],
)
def test_a_wrong_tokenizer_training_ends_in_one_line(options, said, capsys, tmp_path, monkeypatch):
    config = {"output_dir": str(tmp_path / "run"), "bf16": False, "datasets": [{"kind": "folder"}]}
    (tmp_path / "run.yaml").write_text(json.dumps(config | {"text_tokenizer": TINY}), encoding="utf-8")
    monkeypatch.setattr(train_tokenizer, "build_model", None)
    assert said in train(capsys, "tokenizer", str(tmp_path / "run.yaml"), *shlex.split(options))


@pytest.mark.parametrize(
    "text, said",
    [
        ("modle: x", "has no 'modle': did you mean 'model'?"),
        ("model: [x", "is not valid YAML: "),
        ("just words", "has a str, expected a mapping of names to values"),
    ],
)
@pytest.mark.attack
def test_a_typo_in_a_config_ends_in_one_line(text, said, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    for name in ("mllm", "tokenizer"):
        line = train(capsys, name, str(tmp_path / "run.yaml"))
        assert said in line or name == "tokenizer" and "run.yaml has no 'modle'" in line
    assert "there is no file nothing.yaml" in train(capsys, "mllm", "nothing.yaml")


def test_dicts_come_from_the_command_line_too(config):
    options = ["--lora", '{"r": 16}', "--depth_config", "{hidden_size: 32}", "--card", '{"license": "mit"}']
    options += [
        "--model",
        "",
        "--visual_model",
        "v",
        "--llm",
        "l",
        "--trainable",
        "embedder",
        "--datasets",
        "{path: a.json}",
        '{"path": "b.json", "weight": 2}',
    ]
    options += ["--lr_scheduler_kwargs", '{"num_cycles": 2}', "--accelerator_config", '{"even_batches": false}']
    arguments, training_arguments = parse_yaml_and_command_line((MLLMArguments, TrainingArguments), [config, *options])
    assert training_arguments.lr_scheduler_kwargs == {"num_cycles": 2}
    assert not training_arguments.accelerator_config.even_batches
    assert (arguments.lora, arguments.depth_config) == ({"r": 16}, {"hidden_size": 32})
    assert arguments.card == {"license": "mit"}
    assert arguments.datasets == [{"path": "a.json"}, {"path": "b.json", "weight": 2}]
    (tokenizer,) = Parser(TokenizerArguments).parse(["--vision_overrides", "{image_size: 32}"])
    assert tokenizer.vision_overrides == {"image_size": 32}


def test_a_negated_option_says_what_it_negates(capsys):
    for negated, name in (("--no_bf16", "bf16"), ("--no-ema-warmup", "ema_warmup")):
        (action,) = (a for a in Parser(TokenizerTrainingArguments)._actions if negated in a.option_strings)
        assert action.help == f"the same as --{name} false"
        (training,) = Parser(TokenizerTrainingArguments).parse([negated])
        assert getattr(training, name) is False


def test_a_training_takes_a_device_too(config, tmp_path):
    kinds = (MLLMArguments, TrainingArguments)
    for options, use_cpu in (["--use_cpu", "false"], False), (["--device", "cpu", "--use_cpu", "false"], True):
        _, training_arguments = parse_yaml_and_command_line(kinds, [config, *options])
        assert training_arguments.use_cpu is use_cpu
    with open(config, "a", encoding="utf-8") as file:
        file.write("device: cpu\nuse_cpu: false\n")
    _, training_arguments = parse_yaml_and_command_line(kinds, [config])
    assert training_arguments.use_cpu


def test_one_accelerator_of_several_is_chosen_by_the_environment(monkeypatch):
    assert use_cpu_of("auto") == use_cpu_of("") == [] and use_cpu_of("cpu") == ["--use_cpu", "True"]
    monkeypatch.setattr("training.arguments.find_device", torch.device)
    assert use_cpu_of("cuda") == ["--use_cpu", "False"]
    with pytest.raises(ValueError, match="got cuda:1: set CUDA_VISIBLE_DEVICES=1 instead"):
        use_cpu_of("cuda:1")


def test_devices_are_found_by_name():
    assert find_device() == find_device("") == find_device("auto")
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto", torch.device("meta")) == torch.device("meta")
    with pytest.raises(ValueError, match="there is no device 'cuda:99' here; there is auto, cpu"):
        find_device("cuda:99")


def test_a_misspelt_size_of_the_tower_is_refused():
    with pytest.raises(ValueError, match="vision_overrides has no 'image_sise': did you mean 'image_size'?"):
        TokenizerArguments(vision_overrides={"image_sise": 32})
    with pytest.raises(ValueError, match="text_overrides has no 'hidden_sise': did you mean 'hidden_size'?"):
        TokenizerArguments(text_overrides={"hidden_sise": 32})
    with pytest.raises(ValueError, match="a thing has no 'zzz'; it has a, b."):
        check_keys("a thing", ["zzz"], ["a", "b"])


def test_names_that_are_no_folder_are_told_from_those_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    check_source("llm", "")
    check_source("text_tokenizer", "runs", is_model=False)
    with pytest.raises(ValueError, match="^llm: no model in runs: it has no config.json$"):
        check_source("llm", "runs")
    Path("runs/release").mkdir()
    Path("runs/release/config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="^llm: no model in runs: it has no config.json; runs/release has one$"):
        check_source("llm", "runs")
    check_source("llm", "runs/release")
    with pytest.raises(ValueError, match="^llm: there is no folder runs/nothing$"):
        check_source("llm", "runs/nothing")
    with pytest.raises(ValueError, match="there is no folder some/llm, and the hub has none of that name: .*offline"):
        check_source("llm", "some/llm")


def main_of(script: str):
    """What `python -m SCRIPT` runs, as a function of its arguments."""
    module = importlib.import_module(script)
    if app := module.__dict__.get("app"):
        return one_line_errors()(app)
    return module.main if script.startswith("eval.") else one_line_errors()(module.main)


def commands(script: str) -> dict[str, list]:
    """The parameters of a script's commands, by their words: those of typer, or the actions of argparse."""
    module, found = importlib.import_module(script), {}
    if app := module.__dict__.get("app"):
        group = typer.main.get_command(app)
        return {name: command.params for name, command in getattr(group, "commands", {"": group}).items()}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(argparse.ArgumentParser, "print_help", lambda self: found.setdefault("", self._actions))
        module.main(["--help"])
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_says_what_it_is_and_takes_dashes_and_underscores(script):
    for parameters in commands(script).values():
        assert [
            option.dest if hasattr(option, "dest") else option.name for option in parameters if not option.help
        ] == []
        names = {name for option in parameters for name in getattr(option, "option_strings", ()) if name[:2] == "--"}
        assert {name.replace("_", "-") for name in names} | {underscored(name) for name in names} == names
    if not script.startswith(("training.train_", "eval.claims")) and (app := sys.modules[script].__dict__.get("app")):
        assert typer.main.get_command(app).context_settings["token_normalize_func"]("max_shift") == "max-shift"


@pytest.mark.parametrize("script", sorted(set(SCRIPTS) - {"eval.vqa_score"}))  # which can import nothing of ours
def test_an_unknown_option_of_any_script_is_named_in_one_line(script, capsys, tmp_path):
    (tmp_path / "empty.yaml").write_text("", encoding="utf-8")
    for command in commands(script):
        first = [command] if command else []
        if script in ("training.train_mllm", "training.train_tokenizer", "eval.claims"):
            first = [str(tmp_path / "empty.yaml")]
        said = line_of(capsys, main_of(script), [*first, "--outputt", "x"])
        assert "--outputt" in said


@pytest.mark.parametrize(
    "script, words, said",
    [
        ("training.merge_lora", "none out", "no adapter in none: it has no adapter_config.json"),
        ("training.extend_vocabulary", "data/none out --captions no.jsonl", "MODEL: there is no folder data/none"),
        (
            "training.extract_codes",
            "no.jsonl out --visual-model none",
            "no model in none: it has no .safetensors file",
        ),
        ("training.extract_codes", f"no.jsonl out --visual_model {TINY}", "There is no data file no.jsonl"),
        (
            "training.extract_codes",
            f"no.jsonl out --visual-model {TINY} --batch_size 0",
            "'--batch-size': Input should",
        ),
        (
            "training.extract_codes",
            f"no.jsonl out --visual-model {TINY} --device gpu",
            "there is no device 'gpu' here",
        ),
        ("training.merge_lora", "broken out", "broken/adapter_config.json is broken: "),
        ("training.merge_lora", "listed out", "listed/adapter_config.json is no config of an adapter: "),
        ("training.merge_lora", "unknown out", "unknown/adapter_config.json is no config of an adapter: "),
        ("training.merge_lora", "adapter out", "adapter/adapter_config.json names no base model: give --base"),
        ("training.model_card", "none", "no model in none: it has no config.json"),
        ("training.model_card", "none --private", "--private has no effect without --push_to_hub: leave it out"),
        ("training.model_card", "none --push_to_hub a/b/c", "Repo id must be in the form"),
        ("training.model_card", "none --license=", "license of the card must be a text, got ''"),
        (
            "training.prepare_data",
            "easy-vqa out --category x",
            "--style and --size have no effect without emoji: leave them out",
        ),
        (
            "training.extend_vocabulary",
            "adapter out --captions no.jsonl",
            "MODEL: no model in adapter: it has no config.",
        ),
        ("training.prepare_data", "easyvqa out", "the data set must be easy-vqa, emoji or python-docs, got 'easyvqa'"),
        ("training.text_tokenizer", "out --captions no.jsonl", "There is no data file no.jsonl"),
        ("training.text_tokenizer", "out --vocab_size 3", "--vocab-size 3 is below 262"),
        (
            "training.plan",
            "tokenizer --preset huge --samples 9 --gpus 1",
            "Unknown preset 'huge'; known: large, base,",
        ),
        ("training.plan", "mllm --llm none --samples 9 --gpus 1", "Unknown LLM 'none': no folder with a config.json"),
        ("training.text_tokenizer", "out --vocab_size 99999999999", "--vocab-size 99999999999 is above 1048576"),
        ("training.text_tokenizer", "out --captions empty.json", "empty.json has no rows."),
        (
            "training.extend_vocabulary",
            f"{TINY} out --captions uncaptioned.json",
            "Row 1 of uncaptioned.json has no text under 'caption'.",
        ),
        ("training.extend_vocabulary", "broken out --captions empty.json", "broken/config.json is broken: "),
        (
            "training.extract_codes",
            f"no.jsonl out --visual-model {TINY} --max_broken_share nan",
            "'--max-broken-share': Input should be less than or equal to 1, got nan",
        ),
        (
            "training.extract_codes",
            f"no.jsonl out --visual-model {TINY} --workers 5000",
            "'--workers': Input should be less than or equal to 1024, got 5000",
        ),
        ("eval.report", "no.json", "there is no result file no.json"),
        ("eval.report", "deep.json", "deep.json is nested too deeply"),
        ("eval.judge", "--seed -1", "seed (-1) is not between 0 and "),
        ("eval.serving", "--max_rows 0", "max_rows (0) is not between 2 and "),
        ("eval.serving", "--port 70000", "port (70000) is not between 1 and 65535"),
        ("eval.serving", "--clients 4 0", "clients ([4, 0]) is not between 1 and "),
        ("eval.serving", "--model none", "no model in none: it has no config.json"),
        (
            "eval.emoji",
            f"--model {TINY} --data data",
            "data needs emoji that are held out and others, it has 0 of one",
        ),
        ("eval.emoji", f"--model {TINY} --data broken", "broken/emoji.json is no table of emoji ("),
        ("eval.judge", "--epochs 0", "epochs must be at least 1, got 0"),
        ("eval.llm_families", "lama", "the library's list of causal LMs has no 'lama': did you mean 'llama'?"),
        ("eval.image_loss_share", "--runs 0", "'--runs': Input should be greater than or equal to 1"),
        ("eval.image_loss_share", "--share 2", "'--share': Input should be less than or equal to 1"),
        ("eval.vqa_score", "no.json x", "there is no file no.json"),
        (
            "eval.easy_vqa",
            f"--model {TINY} --skip vqa;edit",
            "cannot skip vqa;edit; the parts are reconstruction, vqa,",
        ),
        ("eval.easy_vqa", f"--model {TINY} --temperature 0", "temperature must be above 0"),
        ("eval.vqa", f"--model {TINY} --dtype fp32", "dtype must be one of auto, float32, "),
        ("eval.speed", "--batches 1,2", "argument --batches: invalid int value: '1,2'"),
        ("eval.text_to_image", f"--model {TINY} --prompts no.txt --output out", "no.txt"),
        ("eval.zero_shot", f"--model {TINY} --images none", "there is no image folder none"),
        ("eval.reconstruction", f"--model {TINY} --images none --skip rfid,lpips", "there is no folder none"),
        (
            "training.plan",
            "tokenizer --samples 9 --gpus 1 --vision-overrides [",
            "'--vision-overrides': expected a mapping such as '{name: value}', got '['",
        ),
        (
            "training.plan",
            f"tokenizer --samples 9 --gpus 1 --vision-overrides {'[' * 1000}",
            "'--vision-overrides': expected a mapping such as '{name: value}', got '[[",
        ),
        (
            "training.plan",
            "tokenizer --samples 9 --gpus 1 --vision-overrides {3:,a:}",
            "'--vision-overrides': A vision config has no 3, a.",
        ),
        ("eval.easy_vqa", f"--model {TINY} --edit_guidance nan", "edit_guidance (nan) is not between 1 and 1000000"),
        ("eval.easy_vqa", f"--model {TINY} --edit_image_guidance inf", "edit_image_guidance (inf) is not between 1"),
        (
            "eval.easy_vqa",
            f"--model {TINY} --skip edit,vqa,text_to_image,reconstruction",
            "--skip edit,vqa,text_to_image,reconstruction leaves nothing to measure: keep one of the parts",
        ),
        (
            "eval.easy_vqa",
            f"--model {TINY} --judge {TINY}/model.safetensors",
            "/model.safetensors): Error(s) in loading state_dict for Judge: ",
        ),
        ("eval.easy_vqa", f"--model {TINY} --judge empty.json", "judge needs weights of eval.judge (empty.json): "),
        ("eval.vqa", f"--model {TINY} --seed -1", "seed (-1) is not between 0 and 4294967295"),
        (
            "eval.text_to_image",
            f"--model {TINY} --prompts no.txt --output out --fid_size -1",
            "fid_size (-1) is not between 0 and 16384",
        ),
        (
            "eval.zero_shot",
            f"--model {TINY} --dataset emoji --data data",
            "data has 0 names of emoji: there is nothing",
        ),
        ("eval.zero_shot", f"--model {TINY} --dataset easy-vqa --workers 5000", "workers (5000) is not between 0 and"),
        (
            "eval.zero_shot",
            f"--model {TINY} --dataset easy-vqa --text_tokenizer data/none",
            "text_tokenizer: there is no folder data/none",
        ),
        (
            "eval.zero_shot",
            f"--model {TINY} --dataset easy-vqa --text_tokenizer data",
            "--text_tokenizer data has no tokenizer_config.json: give the folder of a tokenizer",
        ),
        (
            "eval.zero_shot",
            f"--model {TINY} --dataset easy-vqa --pretrained no.pt",
            "--pretrained no.pt has no effect without --system open_clip: leave it out",
        ),
        (
            "eval.zero_shot",
            f"--system clip --model {TINY} --dataset easy-vqa --image_mode classify",
            "--image_mode classify has no effect without --system unitok: leave it out",
        ),
        (
            "eval.zero_shot",
            f"--model {TINY} --dataset easy-vqa --templates simple",
            "--templates simple has no effect without --images: leave it out",
        ),
        (
            "eval.zero_shot",
            f"--model {TINY} --dataset easy-vqa --data data",
            "--data data has no effect without --dataset emoji: leave it out",
        ),
        (
            "eval.zero_shot",
            "--system clip --model none --dataset easy-vqa",
            "model: there is no folder none, and the hub has none of that name: ",
        ),
        (
            "eval.zero_shot",
            f"--model {TINY} --dataset easy-vqa --limit 1 --output other.json",
            "other.json is not a result of this evaluation. Remove it, or choose another output",
        ),
        (
            "eval.zero_shot",
            f"--model {TINY} --dataset easy-vqa --limit 1 --output tensors.json",
            "tensors.nearest.safetensors is not a result of this evaluation. Remove it, or choose another output",
        ),
        (
            "eval.text_to_image",
            f"--model {TINY} --prompts prompts.txt --output other",
            "other/results.json is not a result of this evaluation. Remove it, or choose another output",
        ),
        (
            "eval.reconstruction",
            "--system diffusers --model none --images none",
            "model: there is no folder none, and the hub has none of that name: ",
        ),
        ("eval.reconstruction", f"--model {TINY} --images none --workers 5000", "workers (5000) is not between 0 and"),
        (
            "eval.reconstruction",
            f"--model {TINY} --images none --image_size 160000",
            "image_size (160000) is not between 16 and 16384",
        ),
        (
            "eval.reconstruction",
            f"--model {TINY} --images none --skip rfid,psnr,ssim,lpips,codes",
            "--skip rfid,psnr,ssim,lpips,codes leaves nothing to measure: keep one of the metrics",
        ),
        (
            "eval.reconstruction",
            f"--model {TINY} --images none --subfolder vae",
            "--subfolder vae has no effect without --system diffusers: leave it out",
        ),
        (
            "eval.reconstruction",
            f"--model {TINY} --images data --split test --image_column picture --config a",
            "--split test --image_column picture --config a has no effect: data is no Hugging Face data set. Leave it out",
        ),
        (
            "eval.reconstruction",
            f"--model {TINY} --images none.tar --split test",
            "--split test has no effect: none.tar is no Hugging Face data set. Leave it out",
        ),
        ("eval.reconstruction", f"--model {TINY} --images none --max_broken_share 2", "max_broken_share (2.0) is not"),
    ],
)
def test_what_is_missing_or_wrong_ends_any_script_in_one_line(script, words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, text in (("data", "[]"), ("broken", "[3")):
        Path(folder).mkdir()
        Path(folder, "emoji.json").write_text(text, encoding="utf-8")
        Path(folder, "config.json").write_text(text, encoding="utf-8")
    adapters = {"broken": "{", "listed": "[3]", "unknown": '{"peft_type": "LORE"}', "adapter": '{"peft_type": "LORA"}'}
    for folder, text in adapters.items():
        Path(folder).mkdir(exist_ok=True)
        Path(folder, "adapter_config.json").write_text(text, encoding="utf-8")
    Path("empty.json").write_text("[]", encoding="utf-8")
    Path("deep.json").write_text("[" * 100_000, encoding="utf-8")
    Path("other").mkdir()
    for name in ("other.json", "other/results.json"):
        Path(name).write_text('{"part": {}}', encoding="utf-8")
    save_file({"nearest": torch.zeros(1, 5)}, "tensors.nearest.safetensors")
    Path("prompts.txt").write_text("a red circle\n", encoding="utf-8")
    Path("uncaptioned.json").write_text('[{"image": "a.png"}]', encoding="utf-8")
    if script == "eval.vqa_score":
        with pytest.raises(SystemExit) as end:
            importlib.import_module(script).main(words.split())
        assert end.value.code == 2 and capsys.readouterr().err == f"error: {said}\n"
    else:
        assert said in line_of(capsys, main_of(script), words.split())


@pytest.mark.parametrize(
    "script, words",
    [
        ("training.extract_codes", f"no.jsonl file/x --visual-model {TINY}"),
        ("training.merge_lora", f"adapter file/x --base {TINY}"),
        ("training.extend_vocabulary", f"{TINY} file/x --captions no.jsonl"),
        ("training.text_tokenizer", "file/x"),
        ("training.prepare_data", "easy-vqa file/x"),
        ("training.prepare_data", "emoji new --packages file/x"),
        ("training.plan", "tokenizer --samples 9 --gpus 1 --json file/x.json"),
        ("training.plan", "check --json file/x.json"),
        ("eval.easy_vqa", f"--model {TINY} --output file/x.json"),
        ("eval.easy_vqa", f"--model {TINY} --judge file/x.safetensors"),
        ("eval.emoji", f"--model {TINY} --output file/x.json"),
        ("eval.judge", "--output file/x.safetensors"),
        ("eval.reconstruction", f"--model {TINY} --images . --output file/x.json"),
        ("eval.reconstruction", f"--model {TINY} --images . --save_images file/x"),
        ("eval.report", "no.json --output file/x.html"),
        ("eval.llm_families", "llama --output file/x.md"),
        ("eval.serving", "--output file/x.json"),
        ("eval.speed", "--output file/x.json"),
        ("eval.text_to_image", f"--model {TINY} --prompts no.txt --output file/x"),
        ("eval.vqa", f"--model {TINY} --output file/x.json"),
        ("eval.zero_shot", f"--model {TINY} --dataset easy-vqa --output file/x.json"),
    ],
)
@pytest.mark.attack
def test_an_output_that_cannot_be_written_is_found_out_before_any_work(script, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("no folder", encoding="utf-8")
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")
    said = line_of(capsys, main_of(script), words.split())
    assert said.startswith("error: cannot write to ") and said.endswith(f": {tmp_path}/file is not a folder\n")
    assert sorted(os.listdir()) == ["adapter", "file"]


@pytest.mark.parametrize("script", ["training.merge_lora", "training.extend_vocabulary"])
@pytest.mark.attack
def test_a_folder_that_is_no_model_is_not_replaced_by_one(script, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")
    Path("link").symlink_to("nowhere")
    first, options = ("adapter", ("--base", TINY)) if "lora" in script else (TINY, ("--captions", "no.jsonl"))
    for folder, said in (
        ("adapter", "cannot write adapter: it is not an empty folder or a model"),
        (".", "cannot write .: it is a link, or a folder in use"),
        ("..", "cannot write ..: it is a link, or a folder in use"),
        ("link", "cannot write link: it is a link, or a folder in use"),
    ):
        assert line_of(capsys, main_of(script), [first, folder, *options]) == f"error: {said}\n"
    assert sorted(os.listdir()) == ["adapter", "link"]


@pytest.mark.parametrize(
    "script, words, written",
    [
        ("eval.easy_vqa", "--output out.json", "out.json"),
        ("eval.emoji", "--data photos --output out.json", "out.json"),
        ("eval.reconstruction", "--images photos --skip rfid,lpips --output out.json", "out.json"),
        ("eval.text_to_image", "--prompts prompts.txt --output out", "out/results.json"),
        ("eval.text_to_image", "--prompts prompts.txt --output out", "out/settings.json"),
        ("eval.zero_shot", "--dataset easy-vqa --output out.json", "out.json"),
        ("eval.zero_shot", "--dataset easy-vqa --output out.json", "out.nearest.safetensors"),
    ],
)
@pytest.mark.attack
def test_a_truncated_result_is_named_before_any_work(script, words, written, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "out"):
        Path(folder).mkdir()
    Image.new("RGB", (64, 64)).save("photos/0.png")
    Path("prompts.txt").write_text("a red circle\n", encoding="utf-8")
    rows = [Emoji("0.png", "rose", style, "any", style == "twitter") for style in STYLES]
    for row in rows:
        Path("photos", row.image).parent.mkdir(parents=True)
        Path("photos", row.image).touch()
    Path("photos/emoji.json").write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")
    monkeypatch.setattr(f"{script}.load_model", None, raising=False)
    Path(written).write_text('{"parts": {"vqa"', encoding="utf-8")
    said = line_of(capsys, main_of(script), ["--model", TINY, *words.split()])
    assert said.startswith(f"error: {written} is broken: ")
    assert said.endswith("Remove it, or choose another output\n")


@pytest.mark.attack
def test_a_result_of_something_else_is_refused(tmp_path):
    path = tmp_path / "out.json"
    assert read_result(path, "parts") == {}
    for text in ("[]", "3", '{"part": {}}', "null"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(
            ValueError, match="out.json is not a result of this evaluation. Remove it, or choose another"
        ):
            read_result(path, "parts")
    path.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(ValueError, match="out.json is broken: .* Remove it, or choose another output$"):
        read_result(path, "parts")
    path.write_text('{"parts": {}}', encoding="utf-8")
    assert read_result(path, "parts") == {"parts": {}}


EVALUATIONS = ("easy_vqa", "emoji", "reconstruction", "speed", "text_to_image", "vqa", "zero_shot", "judge", "claims")


@pytest.mark.parametrize("name", EVALUATIONS)
def test_ctrl_c_ends_every_evaluation_in_one_line_that_says_how_to_go_on(name, capsys, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    module = importlib.import_module(f"eval.{name}")
    for parse in ("parse_settings", "parse_yaml_and_command_line"):
        monkeypatch.setattr(module, parse, stop, raising=False)
    with pytest.raises(SystemExit) as end:
        module.main([])
    said = capsys.readouterr().err
    assert end.value.code == 130 and said.startswith("\nInterrupted. ") and said.count("\n") == 2
    assert "the same command" in said.lower()


@pytest.mark.parametrize("main", [train_mllm.main, train_tokenizer.main], ids=lambda main: main.__module__)
@pytest.mark.attack
def test_an_output_folder_that_cannot_be_is_found_out_before_anything_is_loaded(tmp_path, main):
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    config = {"output_dir": str(tmp_path / "file/run"), "use_cpu": True, "bf16": False, "report_to": []}
    config |= {"model": "nowhere"} if main is train_mllm.main else {"init_from": "nowhere", "text_tokenizer": "none"}
    (tmp_path / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="cannot write to .*file/run: .*/file is not a folder"):
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
@pytest.mark.attack
def test_numbers_that_train_nothing_are_refused_before_anything_is_loaded(tmp_path, options, message):
    config = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "report_to": [], "model": "nowhere"}
    arguments = [argument for name, value in options.items() for argument in (f"--{name}", str(value))]
    (tmp_path / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        train_mllm.main([str(tmp_path / "config.yaml"), *arguments])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("main", [train_mllm.main, train_tokenizer.main], ids=lambda main: main.__module__)
@pytest.mark.attack
def test_a_training_on_nothing_is_refused_before_anything_is_loaded(tmp_path, main, monkeypatch):
    config = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "bf16": False, "report_to": [], "datasets": []}
    config |= {"model": TINY} if main is train_mllm.main else {"text_tokenizer": "."}
    (tmp_path / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setattr(f"{main.__module__}.build_model", None)
    with pytest.raises(ValueError, match="There is no training data: `datasets` is empty"):
        main([str(tmp_path / "config.yaml")])
