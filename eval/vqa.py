"""Measure a model on the benchmarks of lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval), and on easy-VQA.

python -m eval.vqa --model FOLDER --tasks easy_vqa,vqav2_val,gqa,textvqa_val,pope,mme --output runs/vqa.json
python -m eval.vqa --model FOLDER --tasks llava_textvqa,llava_gqa,llava_pope,llava_mme,llava_mmvet --output runs/vqa.json
torchrun --nproc_per_node 8 -m eval.vqa --model FOLDER --tasks vqav2_val --batch_size 32 --dtype bfloat16

`python -m lmms_eval --tasks list` lists all tasks. Those called `llava_...` are ours (`eval/lmms/tasks/llava`): they
ask and score as LLaVA v1.5 does, which is how UniTok's published numbers were measured. `llava_vqav2_testdev` and
`llava_mmvet` write the file for the benchmark's own server. Data comes from lmms-eval's hub, except easy-VQA's. Some
of lmms-eval's own tasks (mmvet) call a judge behind an API, see lmms-eval.

The JSON is written after each task. Answers are saved next to it batch by batch (`runs/vqa.answers.0.jsonl`), and the
same command resumes from there.
"""

import difflib
import functools
import importlib.metadata
import json
import time
from argparse import Namespace
from dataclasses import asdict, dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import PartialState
from PIL import ImageFile
from tenacity import RetryError

from eval._common import parse_settings, read_result, versions
from eval.protocol import number
from training.errors import check_keys, one_line_errors
from training.files import folder_digest, write_atomically
from training.release import FLOAT_TYPES
from unitok_mllm.configuration_unitok import ABOVE_ZERO, SHARE, WEIGHT, check_ranges
from unitok_mllm.devices import AUTO, DEVICE_HELP, find_device
from unitok_mllm.inference import check_model
from unitok_mllm.outputs import check_output_file


if TYPE_CHECKING:
    from lmms_eval.tasks import TaskManager

    from eval.lmms.models.unitok_mllm import UniTokMLLM

TEST_DEV = "llava_vqav2_testdev"
SCORES = {  # by data set: the benchmark's name, and of each of lmms-eval's metrics its name, what 1 is worth, and a unit
    "easy_vqa": ("easy-VQA", {"accuracy": ("answers right", 100, "%")}),
    "textvqa": ("TextVQA", {"exact_match": ("accuracy", 100, "%")}),
    "vqav2": ("VQAv2", {"exact_match": ("accuracy", 100, "%")}),
    "gqa": ("GQA", {"exact_match": ("accuracy", 100, "%")}),
    "pope": ("POPE", {"pope_f1_score": ("F1", 100, "%"), "f1": ("F1", 100, "%")}),
    "mme": ("MME", {"mme_perception_score": ("perception", 1, "")}),
    "mmvet": ("MM-Vet", {"gpt_eval_score": ("score", 1, "%")}),
}
MOST = 2**31 - 1
GEN_KWARGS = {  # numbers in `gen_kwargs`: type, least and most; of 0 and 1, false and true too
    **dict.fromkeys(("do_sample", "early_stopping"), (int, 0, 1)),
    **dict.fromkeys(("max_new_tokens", "max_gen_toks", "num_beams"), (int, 1, MOST)),
    **dict.fromkeys(("min_new_tokens", "top_k", "no_repeat_ngram_size"), (int, 0, MOST)),
    **dict.fromkeys(("top_p", "min_p"), (Real, *SHARE)),
    "temperature": (Real, *WEIGHT),
    "length_penalty": (Real, -1e6, 1e6),
    "repetition_penalty": (Real, *ABOVE_ZERO),
}
DECISIVE = ("model", "limit", "gen_kwargs", "force_simple", "dtype", "seed")


@dataclass
class Settings:
    """The command line.

    Raises:
        ValueError: a value is out of its range, the folder holds no model, or there is no such task.
    """

    model: str = field(default="unitok_mllm/checkpoints/tiny", metadata={"help": "folder of model and processor"})
    tasks: str = field(default="easy_vqa", metadata={"help": "names of tasks or groups, separated by commas"})
    output: str = field(default="runs/vqa.json", metadata={"help": "JSON file for the results"})
    batch_size: int = field(default=8, metadata={"help": "questions per batch in each process"})
    limit: int | None = field(
        default=None, metadata={"help": "number of questions of each task, the first ones; default: all"}
    )
    gen_kwargs: str = field(
        default="", metadata={"help": "generation options that override the tasks' own: max_new_tokens=32,num_beams=3"}
    )
    vqav2_questions: str = field(
        default="",
        metadata={"help": f"for {TEST_DEV}: path of v2_OpenEnded_mscoco_test2015_questions.json, from visualqa.org"},
    )
    force_simple: bool = field(
        default=False, metadata={"help": "make each prompt of the images, then the text (needed for multiple choice)"}
    )
    dtype: str = field(
        default="auto", metadata={"help": "dtype to load the model in: float32, bfloat16, ...; auto for the folder's"}
    )
    seed: int = field(default=0, metadata={"help": "seed of sampled answers and of the tasks' random choices"})
    device: str = field(default=AUTO, metadata={"help": DEVICE_HELP})

    def __post_init__(self):
        find_device(self.device)
        check_model(self.model)
        check_output_file(self.output)
        for name in ("batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        check_ranges(self, seed=(0, 2**32 - 1))
        if self.dtype not in ("auto", *FLOAT_TYPES):
            raise ValueError(f"dtype must be one of auto, {', '.join(FLOAT_TYPES)}, got {self.dtype!r}")
        known = task_manager().all_tasks
        for name in self.task_names:
            if name not in known:
                near = ", ".join(difflib.get_close_matches(name, known)) or "python -m lmms_eval --tasks list"
                raise ValueError(f"lmms-eval has no task {name!r}; see {near}")
        check_gen_kwargs(self.gen_kwargs)
        if self.vqav2_questions and not Path(self.vqav2_questions).is_file():
            raise ValueError(f"there is no file {self.vqav2_questions} (--vqav2_questions)")
        if TEST_DEV in self.task_names and not self.vqav2_questions:
            raise ValueError(
                f"{TEST_DEV} needs --vqav2_questions v2_OpenEnded_mscoco_test2015_questions.json (from visualqa.org): "
                "the server wants a file with all of its questions"
            )

    @property
    def task_names(self) -> list[str]:
        return list(dict.fromkeys(self.tasks.split(",")))


class TaskError(ValueError):
    """A task cannot be run."""


@functools.cache
def task_manager() -> "TaskManager":
    """Build lmms-eval's task manager, with the tasks of this project added."""
    from lmms_eval.tasks import TaskManager  # slow: keep `--help` quick

    folder = str(Path(__file__).parent / "lmms" / "tasks")
    return TaskManager("WARNING", include_path=folder, model_name="unitok_mllm")


def check_gen_kwargs(text: str) -> None:
    """Check generation options `NAME=VALUE,...`.

    Raises:
        ValueError: an option is unknown, or its value of another type or out of its range.
    """
    from lmms_eval.utils import simple_parse_args_string

    try:
        options = simple_parse_args_string(text)
    except ValueError as error:
        raise ValueError(f"gen_kwargs must be NAME=VALUE, separated by commas, got {text!r}") from error
    check_keys("gen_kwargs", options, (*GEN_KWARGS, "until"))
    for name, value in options.items():
        if name == "until":
            if not isinstance(value, str):
                raise ValueError(f"until of gen_kwargs must be a text, got {value!r}")
        elif (name, value) != ("early_stopping", "never"):
            kind, least, most = GEN_KWARGS[name]
            if not isinstance(value, kind) or not least <= value <= most:
                kind = "an integer" if kind is int else "a number"
                raise ValueError(f"{name} of gen_kwargs must be {kind} from {least:g} to {most:g}, got {value!r}")


def metrics(values: dict) -> dict[str, float]:
    """Return the numbers in lmms-eval's results of a task, by name; "accuracy,none" becomes "accuracy"."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if isinstance(value, Real) and "_stderr_cl" not in name
    }


def prompt(config: dict) -> str:
    """Return a task's prompt, with {question} in place of the question."""
    options = config.get("lmms_eval_specific_kwargs") or {}
    tokens = "\nReference OCR token: {OCR tokens}" if options.get("ocr") else ""
    return f"{options.get('pre_prompt', '')}{{question}}{tokens}{options.get('post_prompt', '')}"


def sampling(config: dict) -> str:
    """Describe how a task's answers are sampled."""
    from eval.lmms.models.unitok_mllm import generation_options

    options, _ = generation_options(config.get("generation_kwargs") or {})
    names = ("temperature", "top_p", "top_k", "num_beams") if options["do_sample"] else ("num_beams",)
    rest = [f"{name} {options[name]:g}" for name in names if options.get(name) not in (None, 1)]
    return ", ".join(["sampling" if options["do_sample"] else "greedy", *rest])


def numbers(results: dict, settings: Settings, model: "UniTokMLLM") -> list[dict]:
    """Return the scores that lmms-eval measured, with their protocols (`eval.protocol`)."""
    found, image_processor = [], model.processor.image_processor
    size = f"{image_processor.size['width']}x{image_processor.size['height']}"
    for task, values in results["results"].items():
        configs = [results["configs"][part] for part in results["group_subtasks"].get(task) or [task]]
        config = configs[0]
        benchmark, scores = SCORES.get(Path(config["dataset_path"]).name.partition("-")[0].lower(), ("", {}))
        split = ", ".join(part["test_split"].strip() for part in configs)
        metadata = config.get("metadata")
        own_tool = metadata.get("tool") if isinstance(metadata, dict) else None
        for metric, value in metrics(values).items():
            if metric in scores:
                title, scale, unit = scores[metric]
                found.append(
                    number(
                        benchmark,
                        title,
                        scale * value,
                        unit,
                        split=split if settings.limit is None else f"{split}, first {settings.limit}",
                        prompt=prompt(config),
                        sampling=sampling(config),
                        images=f"{image_processor.mode}, {size}",
                        reference="the split's answers",
                        tool=own_tool or f"lmms-eval's {metric} of {task}",
                    )
                )
    return found


def run_task(name: str, settings: Settings, model: "UniTokMLLM") -> dict | None:
    """Run one task or group on all processes.

    Returns:
        Its entry in the JSON file on the main process; None on the others.

    Raises:
        TaskError: the task's data is not available, or the task cannot be run with these settings.
    """
    from lmms_eval.evaluator import simple_evaluate

    ImageFile.LOAD_TRUNCATED_IMAGES = False  # importing lmms-eval turns it on for the whole process
    output = str(Path(settings.output).with_suffix(""))  # for the file of answers
    try:
        results = simple_evaluate(
            model=model,
            tasks=[name],
            batch_size=settings.batch_size,
            limit=settings.limit,
            gen_kwargs=settings.gen_kwargs or None,
            task_manager=task_manager(),
            log_samples=False,
            cli_args=Namespace(
                output_path=output,
                vqav2_questions=settings.vqav2_questions,
                process_with_media=False,
                reasoning_tags=None,
            ),
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
        )
    except RetryError as error:
        raise TaskError(f"task {name}: {error.last_attempt.exception()}") from error
    except AssertionError as error:
        raise TaskError(f"task {name}: {error} (multiple choice needs --force_simple)") from error
    except ValueError as error:
        raise TaskError(f"task {name}: {error}") from error
    if results is None:
        return None
    counts = results["n-samples"]
    return {
        "questions": {task: count["effective"] for task, count in counts.items()},
        "numbers": numbers(results, settings, model),
        "metrics": {task: metrics(values) for task, values in results["results"].items()},
        "prompt": {task: model.prompts[task] for task in counts},
        "generation_kwargs": {task: results["configs"][task].get("generation_kwargs") for task in counts},
    }


def read_finished(output: str, wanted: dict) -> dict[str, dict]:
    """Read the tasks that an earlier run has finished.

    Raises:
        TaskError: a task was run with other settings.
    """
    parts = read_result(output, "parts").get("parts", {})
    for name, part in parts.items():
        if changed := [
            f"{key} was {part['settings'].get(key)}, now {value}"
            for key, value in wanted.items()
            if part["settings"].get(key) != value
        ]:
            raise TaskError(f"{output} has {name} of other settings ({'; '.join(changed)}): give another --output")
    return parts


def evaluate(settings: Settings) -> dict:
    """Run the tasks that are missing from the output, and return the complete report.

    Raises:
        TaskError: see `run_task` and `read_finished`.
    """
    from eval.lmms.models.unitok_mllm import UniTokMLLM, UniTokMLLMChat

    digest = folder_digest(settings.model)
    wanted = {name: getattr(settings, name) for name in DECISIVE} | {"model_sha256": digest}
    finished = read_finished(settings.output, wanted)
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
        "numbers": [one for part in finished.values() for one in part.get("numbers", [])],
        "parts": finished,
    }
    PartialState().wait_for_everyone()  # all processes must read the output before one writes it
    for name in settings.task_names:
        if name not in report["parts"]:
            start = time.perf_counter()
            part = run_task(name, settings, model)
            if part is not None:
                seconds = round(time.perf_counter() - start, 1)
                report["numbers"] += part["numbers"]
                report["parts"][name] = {
                    "settings": wanted,
                    "versions": report["versions"],
                    "seconds": seconds,
                    **part,
                }
                write_atomically(settings.output, json.dumps(report, indent=2).encode())
    return report


def table(report: dict) -> str:
    """Format the report as a few readable lines."""
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


@one_line_errors("Interrupted. The same command goes on from here.")
def main(argv: list[str] | None = None) -> None:
    report = evaluate(parse_settings(Settings, argv, __doc__))
    if PartialState().is_main_process:
        print(table(report))
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
