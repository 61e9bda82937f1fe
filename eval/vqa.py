"""Measures a model on the benchmarks of lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval), and on easy-VQA.

python -m eval.vqa --model FOLDER --tasks easy_vqa,vqav2_val,gqa,textvqa_val,pope,mme --output runs/vqa.json
torchrun --nproc_per_node 8 -m eval.vqa --model FOLDER --tasks vqav2_val --batch_size 32 --dtype bfloat16

`python -m lmms_eval --tasks list` names all tasks. Data come from their hub, except easy-VQA's; some tasks (MM-Vet) ask
a judge behind an API, see lmms-eval. The JSON is written after each task, answers are kept next to it
(`runs/vqa.answers.0.jsonl`) batch by batch: the same command goes on where it was cut off.
"""

import difflib
import functools
import importlib.metadata
import json
import sys
import time
from argparse import Namespace
from dataclasses import asdict, dataclass, field
from numbers import Real
from pathlib import Path

from accelerate import PartialState
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from PIL import ImageFile
from tenacity import RetryError

from eval._common import check_model_folder, folder_digest, parse_settings, versions, write_atomically
from eval.easy_vqa import read_finished
from eval.lmms.models.unitok_mllm import UniTokMLLM, UniTokMLLMChat


ImageFile.LOAD_TRUNCATED_IMAGES = False  # which lmms-eval's import has turned on for the whole process
DECISIVE = ("model", "limit", "gen_kwargs", "force_simple", "dtype", "seed")


@dataclass
class Settings:
    """The command line.

    Raises:
        ValueError: a value out of its range, a folder that is no model, or a task that is not there.
    """

    model: str = field(default="unitok_mllm/checkpoints/tiny", metadata={"help": "folder of model and processor"})
    tasks: str = field(default="easy_vqa", metadata={"help": "names of tasks or groups, with commas between"})
    output: str = field(default="runs/vqa.json", metadata={"help": "where the numbers go"})
    batch_size: int = field(default=8, metadata={"help": "questions at a time, in each process"})
    limit: int | None = field(default=None, metadata={"help": "only the first so many questions of each task"})
    gen_kwargs: str = field(default="", metadata={"help": "over the tasks' own: max_new_tokens=32,num_beams=3"})
    force_simple: bool = field(
        default=False, metadata={"help": "images, then text, whatever messages a task has; for multiple choice"}
    )
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, ...; auto: the folder's"})
    seed: int = field(default=0, metadata={"help": "of sampled answers and of a task's own random choices"})
    device: str = field(default="", metadata={"help": "cpu, cuda, ...; an accelerator if there is one"})

    def __post_init__(self):
        check_model_folder(self.model)
        for name in ("batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        known = task_manager().all_tasks
        for name in self.task_names:
            if name not in known:
                near = ", ".join(difflib.get_close_matches(name, known)) or "python -m lmms_eval --tasks list"
                raise ValueError(f"lmms-eval has no task {name!r}; see {near}")

    @property
    def task_names(self) -> list[str]:
        return list(dict.fromkeys(self.tasks.split(",")))


class TaskError(ValueError):
    """A task that cannot be run here."""


@functools.cache
def task_manager() -> TaskManager:
    """lmms-eval's tasks and ours."""
    folder = str(Path(__file__).parent / "lmms" / "tasks")
    return TaskManager("WARNING", include_path=folder, model_name="unitok_mllm")


def metrics(values: dict) -> dict[str, float]:
    """The numbers among what lmms-eval says of a task, "accuracy,none" named "accuracy"."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if isinstance(value, Real) and "_stderr_cl" not in name
    }


def run_task(name: str, settings: Settings, model: UniTokMLLM) -> dict | None:
    """One task or group, on all processes; what the JSON says of it, on the first.

    Raises:
        TaskError: the task's data cannot be had, or it cannot be asked in this way.
    """
    output = str(Path(settings.output).with_suffix(""))  # where a task writes answers for a benchmark's own server
    try:
        results = simple_evaluate(
            model=model,
            tasks=[name],
            batch_size=settings.batch_size,
            limit=settings.limit,
            gen_kwargs=settings.gen_kwargs or None,
            task_manager=task_manager(),
            log_samples=False,
            cli_args=Namespace(output_path=output, process_with_media=False, reasoning_tags=None),
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
        )
    except RetryError as error:
        raise TaskError(f"task {name}: {error.last_attempt.exception()}") from error
    except AssertionError as error:
        raise TaskError(f"task {name}: {error} (multiple choice needs --force_simple)") from error
    if results is None:
        return None
    counts = results["n-samples"]
    return {
        "questions": {task: count["effective"] for task, count in counts.items()},
        "metrics": {task: metrics(values) for task, values in results["results"].items()},
        "prompt": {task: model.prompts[task] for task in counts},
        "generation_kwargs": {task: results["configs"][task].get("generation_kwargs") for task in counts},
    }


def evaluate(settings: Settings) -> dict:
    """Runs the tasks that are not in the output yet with these settings; returns what is known after the last."""
    digest = folder_digest(settings.model)
    wanted = {name: getattr(settings, name) for name in DECISIVE} | {"model_sha256": digest}
    model = (UniTokMLLM if settings.force_simple else UniTokMLLMChat)(
        settings.model,
        batch_size=settings.batch_size,
        device=settings.device,
        dtype=settings.dtype,
        answers=str(Path(settings.output).with_suffix(".answers")),
        fingerprint=json.dumps({**wanted, "limit": None}, sort_keys=True),
    )
    report = {
        "benchmark": "lmms-eval",
        "settings": asdict(settings),
        "versions": versions() | {"lmms_eval": importlib.metadata.version("lmms_eval")},
        "device": str(model.device),
        "processes": model.world_size,
        "parts": read_finished(settings.output, dict.fromkeys(settings.task_names, wanted)),
    }
    PartialState().wait_for_everyone()  # all processes have read the output before one writes it
    for name in settings.task_names:
        if name not in report["parts"]:
            start = time.perf_counter()
            part = run_task(name, settings, model)
            if part is not None:
                seconds = round(time.perf_counter() - start, 1)
                report["parts"][name] = {"settings": wanted, "seconds": seconds, **part}
                write_atomically(settings.output, json.dumps(report, indent=2).encode())
    return report


def table(report: dict) -> str:
    """The report in a few lines, for people."""
    lines = [f"{'task':28}{'questions':>10}  {'metric':32}{'value':>10}{'error':>10}"]
    for part in report["parts"].values():
        for task, values in part["metrics"].items():
            for name, value in values.items():
                if "_stderr" not in name:
                    metric, _, filter_name = name.partition(",")
                    error = values.get(f"{metric}_stderr" + f",{filter_name}" * bool(filter_name))
                    error = "" if error is None else f"{error:.4f}"
                    lines.append(f"{task:28}{part['questions'].get(task, ''):>10}  {name:32}{value:>10.4f}{error:>10}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(Settings, argv)
    try:
        report = evaluate(settings)
    except TaskError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted. The same command goes on from here.")
    if PartialState().is_main_process:
        print(table(report))
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
