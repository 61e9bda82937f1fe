"""Configs of trainings: malformed ones are refused by name, and those that may run commands need trust."""

import dataclasses
import os

import pytest

from training.arguments import TRUSTED, parse_yaml_and_command_line
from training.errors import one_line_errors
from training.image_text_data import ImageTextStream, check_shards


pytestmark = pytest.mark.attack


@dataclasses.dataclass
class Options:
    output_dir: str = "runs"
    datasets: list[dict] = dataclasses.field(default_factory=list)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"- output_dir: a", "has a list, expected a mapping of names to values"),
        (b"just words", "has a str, expected a mapping of names to values"),
        (b"output_dir: [", "is not valid YAML"),
        (b"output_dir: \xff", "is not valid YAML"),
        (b"[" * 5000, "is not valid YAML"),
        (b"output_dir: !!python/object/apply:os.system ['touch executed']", "is not valid YAML"),
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
        with pytest.raises(ValueError, match=f"the shard '{shard}' is the output of a command: trust the config with"):
            check_shards(["a.tar", shard])
    with pytest.raises(ValueError, match="the shard 'pipe:cat a' is the output of a command"):
        ImageTextStream("{pipe:cat a,b.tar}", None, seed=0, samples_per_epoch=1)
    (tmp_path / "config.yaml").write_text("datasets: [{shards: 'pipe:cat a'}]", encoding="utf-8")
    monkeypatch.setenv(TRUSTED, "")  # restored in the end
    parse_yaml_and_command_line((Options,), [str(tmp_path / "config.yaml")])
    assert not os.environ[TRUSTED]
    (options,) = parse_yaml_and_command_line((Options,), [str(tmp_path / "config.yaml"), "--trust_config"])
    check_shards([source["shards"] for source in options.datasets])
