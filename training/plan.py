"""Plan a training before any GPU is booked: parameters, FLOPs, memory under each ZeRO stage, and days.

    python -m training.plan tokenizer --preset large --samples 1.28e9 --gpus 256
    python -m training.plan mllm --llm llama-2-7b --visual large --samples 60e6 --gpus 64 --text-length 128
    python -m training.plan check

Models are built without memory, and one training step runs on tensors with shapes but without values. Counted are the
FLOPs of its matrix products and convolutions, forward and backward, with unmasked attention as usual for MFU.
`training.planning.memory` describes what counts as memory. `check` compares such predictions with real steps.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from training.arguments import mapping
from training.errors import one_line_errors
from training.planning.check import run_check
from training.planning.memory import Run
from training.planning.trainings import LLMS, TRAINED_PARTS, Plan, plan_mllm, plan_tokenizer
from unitok_mllm.configuration_unitok import UniTokVisionConfig
from unitok_mllm.outputs import check_output_file
from unitok_mllm.typer_apps import OneLineErrors, script_app


def markdown_table(*columns: str) -> Table:
    """Create an empty Markdown table whose columns are right-aligned, except for the first."""
    table = Table(box=box.MARKDOWN)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def show(plan: Plan, output: Path | None) -> None:
    """Print the plan's tables, and write the plan as JSON."""
    console, run = Console(width=119, highlight=False), plan.run
    parts = markdown_table("part", "parameters, M", "trained, M", "forward, GFLOPs", "training step, GFLOPs")
    for part in plan.parts:
        step = "" if part.step is None else f"{part.step / 1e9:,.1f}"
        parts.add_row(
            part.name,
            f"{part.parameters / 1e6:,.1f}",
            f"{part.trainable / 1e6:,.1f}",
            f"{part.forward / 1e9:,.1f}",
            step,
        )
    parts.add_row("one sample", "", "", f"{plan.forward_flops / 1e9:,.1f}", f"{plan.step_flops / 1e9:,.1f}")
    memory = markdown_table(
        "sharding", "states, GiB", "activations, GiB", "GPU, GiB", "CPU, GiB", "sent, GiB", "fits", "largest batch"
    )
    for row in plan.memory:
        numbers = [f"{value:,.1f}" for value in (row.states, row.activations, row.total, row.cpu, row.communication)]
        memory.add_row(row.stage, *numbers, "yes" if row.fits else "no", str(row.largest_batch))
    console.print(plan.title, parts, *plan.notes, memory, sep="\n")
    console.print("States, activations and their sum are those of a GPU; CPU: of a machine; sent: by a GPU in a step.")
    stage = "no stage fits" if plan.stage is None else f"first stage that fits: {plan.stage}"
    console.print(f"With {run.batch_per_gpu} samples a GPU of {run.gpu_memory:g} GiB, {stage}.")
    console.print(
        f"{plan.days:.3g} days = {run.samples:.3g} samples x {plan.step_flops:.4g} FLOPs "
        f"/ ({run.gpus} GPUs x {run.gpu_flops:.4g} FLOP/s x MFU {run.mfu:g}) / 86400 s"
    )
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(asdict(plan), indent=2) + "\n", encoding="utf-8")


app = script_app(cls=OneLineErrors, no_args_is_help=True, help=__doc__)
Samples = Annotated[float, typer.Option(help="Samples in the whole training, such as 1.28e9.")]
GPUs = Annotated[int, typer.Option(help="Total number of GPUs.")]
TrainedParts = Annotated[list[str], typer.Option(help="A part that is trained; repeat for several.")]
GPUMemory = Annotated[float, typer.Option(help="Memory of one GPU, in GiB.")]
GPUFlops = Annotated[
    float, typer.Option(help="Peak FLOP/s of one GPU, by its data sheet; the default is an H100's in bf16.")
]
MFU = Annotated[float, typer.Option(help="Share of the peak FLOP/s that training reaches (MFU).")]
GPUsPerNode = Annotated[int, typer.Option(help="GPUs per machine.")]
Batch = Annotated[int, typer.Option(max=2**14, help="Samples per GPU and step.")]
Checkpointing = Annotated[
    bool, typer.Option(help="Recompute activations in the backward pass (gradient checkpointing).")
]


def json_output(path: Path | None) -> Path | None:
    """Check in advance that the file can be written."""
    if path is not None:
        check_output_file(path)
    return path


JSONFile = Annotated[
    Path | None, typer.Option("--json", callback=json_output, help="Also write the plan to this JSON file.")
]


def vision_fields(text: str) -> dict:
    """Parse fields of a vision config, from YAML (or JSON) such as "{image_size: 512}".

    Raises:
        typer.BadParameter: the text is not a mapping, or has an unknown field.
    """
    try:
        values = mapping(text)
    except argparse.ArgumentTypeError as error:
        raise typer.BadParameter(str(error)) from error
    if unknown := values.keys() - {field.name for field in fields(UniTokVisionConfig)}:
        raise typer.BadParameter(f"A vision config has no {', '.join(sorted(map(str, unknown)))}.")
    return values


@app.command("tokenizer")
def tokenizer_command(
    samples: Samples,
    gpus: GPUs,
    preset: Annotated[str, typer.Option(help="large, base, tiny, or a folder.")] = "large",
    gpu_memory: GPUMemory = 80.0,
    gpu_flops: GPUFlops = 989e12,
    mfu: MFU = 0.4,
    gpus_per_node: GPUsPerNode = 8,
    batch_per_gpu: Batch = 64,
    perceptual: Annotated[bool, typer.Option(help="With LPIPS.")] = True,
    gan: Annotated[bool, typer.Option(help="With the discriminator.")] = True,
    gan_start: Annotated[
        float, typer.Option(help="Share of the training after which the discriminator is switched on.")
    ] = 0.375,
    ema: Annotated[bool, typer.Option(help="With a running average of the weights.")] = True,
    gradient_checkpointing: Checkpointing = False,
    vision_overrides: Annotated[
        dict,
        typer.Option(
            parser=vision_fields, help="Fields of the vision config to override, such as '{image_size: 512}'."
        ),
    ] = "{}",
    json_file: JSONFile = None,
) -> None:
    """Plan the visual tokenizer's training."""
    run = Run(samples, gpus, gpu_memory, gpu_flops, mfu, batch_per_gpu, gpus_per_node)
    show(
        plan_tokenizer(preset, run, perceptual, gan, gan_start, ema, gradient_checkpointing, **vision_overrides),
        json_file,
    )


@app.command("mllm")
def mllm_command(
    samples: Samples,
    gpus: GPUs,
    llm: Annotated[
        str, typer.Option(help=f"A preset ({', '.join(LLMS)}), or a folder of an LLM or an MLLM.")
    ] = "llama-2-7b",
    visual: Annotated[str, typer.Option(help="large, base, tiny, or a folder.")] = "large",
    text_length: Annotated[int, typer.Option(max=2**20, help="Text tokens per sample.")] = 128,
    images: Annotated[int, typer.Option(max=1024, help="Images per sample.")] = 1,
    drawn: Annotated[
        int | None, typer.Option(help="How many of these images are targets.", show_default="all")
    ] = None,
    trainable: TrainedParts = list(TRAINED_PARTS),  # noqa: B006
    lora_rank: Annotated[
        int, typer.Option(min=0, max=2**14, help="Rank of LoRA on the LLM; 0 for full fine-tuning.")
    ] = 0,
    online_codes: Annotated[bool, typer.Option(help="Encode the images during training.")] = False,
    gpu_memory: GPUMemory = 80.0,
    gpu_flops: GPUFlops = 989e12,
    mfu: MFU = 0.4,
    gpus_per_node: GPUsPerNode = 8,
    batch_per_gpu: Batch = 4,
    gradient_checkpointing: Checkpointing = False,
    json_file: JSONFile = None,
) -> None:
    """Plan a training of the unified MLLM."""
    run = Run(samples, gpus, gpu_memory, gpu_flops, mfu, batch_per_gpu, gpus_per_node)
    plan = plan_mllm(
        llm,
        visual,
        run,
        text_length,
        images,
        drawn,
        tuple(trainable),
        lora_rank,
        online_codes,
        gradient_checkpointing,
    )
    show(plan, json_file)


@app.command("check")
def check_command(
    batch: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Number of timed steps.")] = 3,
    json_file: JSONFile = None,
) -> None:
    """Compare predictions with a few real training steps of the tiny models, on this machine's CPU."""
    # a process for each model, so that its peak memory is that of one model
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        checks = list(pool.map(run_check, ("tokenizer", "mllm"), (batch, batch), (steps, steps)))
    table = markdown_table("", *[check.model for check in checks])
    rows = {
        "samples a step": lambda check: check.batch,
        "GFLOPs a step, predicted": lambda check: f"{check.predicted_flops / 1e9:.3f}",
        "GFLOPs a step, counted": lambda check: f"{check.counted_flops / 1e9:.3f}",
        "seconds a step": lambda check: f"{check.seconds:.3f}",
        "GFLOP/s achieved": lambda check: f"{check.achieved_flops / 1e9:.1f}",
        "MFU, of the matrix product's FLOP/s": lambda check: f"{check.mfu:.1%}",
        "MiB of states, predicted": lambda check: f"{check.predicted_states:.1f}",
        "MiB of memory growth, measured": lambda check: f"{check.measured_growth:.1f}",
    }
    for name, value in rows.items():
        table.add_row(name, *[str(value(check)) for check in checks])
    Console(width=119).print(table)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps([asdict(check) for check in checks], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    one_line_errors()(app)()
