"""UniTok's claim in miniature: more sub-codebooks under one total vocabulary, and joint training without conflict.

    python -m eval.claims training/configs/claims.yaml
    python -m eval.claims training/configs/claims.yaml --steps 20 --search_steps 10 --seeds 0 --codebooks 1 8

The same tokenizer is trained with K = 1, 2, 4, 8 sub-codebooks of `total_codes` / K codes each. The width before
quantization, the data and their order, the steps and the batch are the same.

1. Search: for each K, every setting in `candidates` (dead-code revival, learning rates, ...) is tried once for
   `search_steps`. The one with the highest PSNR on the `validation` images becomes this K's setting.
2. Comparison: each K is trained with its setting for `steps`, once for each seed, and measured on the `held_out`
   images. The largest K is also trained for reconstruction alone (`contrastive_weight` 0) and for captions alone (no
   reconstruction term).

Each run is measured by three metrics:

- PSNR of reconstructions, with two baselines: each image painted in its own mean colour, and the mean training image.
- Zero-shot accuracy, if captions are easy-VQA's 24 pairs of colour and shape: an image of a red circle counts as right
  if "a red circle" is the nearest of the 24 texts.
- Code usage: the percentage of all codes that occur in the held-out images.

PSNR on the validation images during training shows whether `steps` were enough.

The paper (https://arxiv.org/abs/2502.20321) reports at its size: with a total of 16384, each doubling of the
sub-codebooks from 1 to 8 improves rFID and ImageNet accuracy (Table 8), and joint training reconstructs slightly
better than reconstruction alone, rFID 0.72 and 0.82 (Table 6). Its Table 8 trains each tokenizer for one of the two
(rFID without captions, accuracy without reconstruction). Here, with captions, both are measured on one tokenizer.

A run's folder is `<output_dir>/runs/<name>`. It holds the config, checkpoints during training, the tokenizer, and
`result.json`. The name ends with a digest of every setting the result depends on: the same command resumes a killed
run, and other settings get runs of their own. After each run, `claims.json`, `claims.md` and `claims.png` are updated
with the finished runs of this command. `--processes 2` trains each tokenizer in two processes, which divide the batch.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import yaml

from eval._common import read_result, versions
from eval.claims_metrics import baselines, measure, validation_curve
from eval.claims_plan import WITHOUT_EFFECT, ClaimsArguments, Plan, Run
from eval.claims_report import aggregate, plot, search_table, table, validation_psnr
from training import train_tokenizer
from training.arguments import parse_yaml_and_command_line
from training.errors import one_line_errors
from training.files import whole_checkpoints, write_atomically
from training.losses import LossArguments
from training.run_folder import claim_folder
from training.tokenizer_arguments import TokenizerTrainingArguments
from training.tokenizer_trainer import STATE
from training.train_tokenizer import TokenizerArguments


BENCHMARK = "sub-codebooks under one total vocabulary"


def train(run: Run, folder: Path, claims: ClaimsArguments, training: TokenizerTrainingArguments) -> dict:
    """Train a run, or resume it, and write the tokenizer to `folder / "release"`.

    Raises:
        subprocess.CalledProcessError: one of several processes failed.
    """
    config = run.settings["training"] | {name: vars(training)[name] for name in WITHOUT_EFFECT}
    config |= {"output_dir": str(folder), "resume": True}
    config["per_device_train_batch_size"] = claims.batch_size // claims.processes
    path = folder / "config.yaml"
    write_atomically(path, yaml.safe_dump(config, sort_keys=False).encode())
    first_step, start = max(whole_checkpoints(folder, STATE), default=0), time.perf_counter()
    if claims.processes == 1:
        try:
            train_tokenizer.main([str(path)])
        except KeyboardInterrupt as interrupt:
            interrupt.args = ()  # its message is about resuming the other script
            raise
    else:
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(claims.processes)]
        command = [sys.executable, "-m", *launcher, "-m", "training.train_tokenizer", str(path)]
        with subprocess.Popen(command) as process:
            try:
                code = process.wait()
            except KeyboardInterrupt:
                process.terminate()  # its processes then write a checkpoint
                raise
        if code:
            raise subprocess.CalledProcessError(code, command)
    return {"resumed_from_step": first_step, "training_seconds": round(time.perf_counter() - start, 1)}


def finish(run: Run, folder: Path, claims: ClaimsArguments, trained: dict, device: torch.device) -> None:
    """Measure a trained run, write its `result.json`, and remove its checkpoints."""
    start, steps = time.perf_counter(), run.settings["training"]["max_steps"]
    measured = measure(
        folder / "release", run.settings["measured"], claims.limit, claims.batch_size, device, run.supervision
    )
    result = {
        "run": run.name,
        "stage": run.stage,
        "codebooks": run.num_codebooks,
        "codebook_size": run.codebook_size,
        "bits_per_position": run.bits,
        "supervision": run.supervision,
        "candidate": run.candidate,
        "seed": run.seed,
        "images_trained_on": steps * claims.batch_size,
        **trained,
        "evaluation_seconds": round(time.perf_counter() - start, 1),
        **measured,
        "validation_curve": validation_curve(folder),
        "settings": run.settings,
        "versions": versions(),
        "device": str(device),
        "processes": claims.processes,
        "threads": torch.get_num_threads(),
    }
    write_atomically(folder / "result.json", json.dumps(result, indent=2).encode())
    for checkpoint in whole_checkpoints(folder, STATE).values():
        shutil.rmtree(checkpoint)


def choose(claims: ClaimsArguments, results: list[dict]) -> dict[int, str]:
    """Choose, for each K, the candidate with the highest validation PSNR; on a tie, the first one."""
    if len(claims.candidates) == 1:
        return dict.fromkeys(claims.codebooks, *claims.candidates)
    by_k = {k: [result for result in results if result["codebooks"] == k] for k in claims.codebooks}
    return {k: max(tried, key=validation_psnr)["candidate"] for k, tried in by_k.items()}


def finished(output_dir: Path, runs: list[Run]) -> list[dict]:
    """Return the results of the finished runs; for errors see `read_result`."""
    results = (read_result(output_dir / "runs" / run.name / "result.json") for run in runs)
    return [result for result in results if result]


def summarize(
    output_dir: Path, searched: list[Run], compared: list[Run], claims: ClaimsArguments, without_tokenizer: dict
) -> dict:
    """Write `claims.json`, `claims.md` and `claims.png` for the finished runs."""
    search, results = finished(output_dir, searched), finished(output_dir, compared)
    rows = aggregate(results)
    report = {
        "benchmark": BENCHMARK,
        "settings": asdict(claims),
        "versions": versions(),
        "prompt": "a {color} {shape}",
        "rows": rows,
        "baselines_psnr_db": without_tokenizer,
        "choice": {str(run.num_codebooks): run.candidate for run in compared},
        "missing_runs": [run.name for run in (*searched, *compared) if not is_finished(output_dir, run)],
        "seconds": round(sum(one["training_seconds"] + one["evaluation_seconds"] for one in (*search, *results)), 1),
        "search": search,
        "runs": results,
    }
    title = f"{claims.total_codes} codes in all, {claims.steps} steps of {claims.batch_size} images"
    text = f"{title}; mean ± standard deviation\n\n{table(rows, without_tokenizer)}\n" if rows else ""
    if search:
        text += f"\nSearch, {claims.search_steps} steps, on validation images\n\n{search_table(search)}\n"
    write_atomically(output_dir / "claims.json", json.dumps(report, indent=2).encode())
    write_atomically(output_dir / "claims.md", text.encode())
    if rows:
        image = plot(rows, without_tokenizer, f"{title}; mean and standard deviation over seeds")
        write_atomically(output_dir / "claims.png", image)
    return report


def is_finished(output_dir: Path, run: Run) -> bool:
    """Return whether a run has a result."""
    return (output_dir / "runs" / run.name / "result.json").is_file()


def compare(
    claims: ClaimsArguments,
    tokenizer: TokenizerArguments,
    losses: LossArguments,
    training: TokenizerTrainingArguments,
) -> dict:
    """Train and measure the runs that have no result yet, one after another.

    Returns:
        The content of `claims.json`.

    Raises:
        ValueError: see `Plan`; also if this script was started in several processes.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("Start this script without torchrun: --processes sets the processes of each training.")
    plan, output_dir = Plan(claims, tokenizer, losses, training), Path(training.output_dir)
    claim_folder(output_dir)
    accelerator = None if training.use_cpu else torch.accelerator.current_accelerator(check_available=True)

    earlier = {path.parent.name for path in (output_dir / "runs").glob("*/config.yaml")}

    def do(run: Run, about: str) -> None:
        folder = output_dir / "runs" / run.name
        is_done = is_finished(output_dir, run)
        print(f"{about}, {run.name} ({run.candidate}): {'is there' if is_done else 'starts'}", flush=True)
        if not is_done:
            trained = train(run, folder, claims, training)
            finish(run, folder, claims, trained, accelerator or torch.device("cpu"))

    searched, compared = plan.search(), []
    for number, run in enumerate(searched, start=1):
        do(run, f"search, run {number} of {len(searched)}")
        summarize(output_dir, searched, compared, claims, {})
    without_tokenizer = baselines(claims, tokenizer)
    compared = plan.comparison(choose(claims, finished(output_dir, searched)))
    if others := earlier - {run.name for run in (*searched, *compared)}:
        print(f"{len(others)} runs in {output_dir / 'runs'} are of other settings: they are left as they are")
    for number, run in enumerate(compared, start=1):
        do(run, f"comparison, run {number} of {len(compared)}")
        summarize(output_dir, searched, compared, claims, without_tokenizer)
    return summarize(output_dir, searched, compared, claims, without_tokenizer)


@one_line_errors("Interrupted. Finished runs are kept; the same command goes on from there.")
def main(argv: list[str] | None = None) -> None:
    types = (ClaimsArguments, TokenizerArguments, LossArguments, TokenizerTrainingArguments)
    report = compare(*parse_yaml_and_command_line(types, argv, __doc__))
    print(table(report["rows"], report["baselines_psnr_db"]))


if __name__ == "__main__":
    main()
