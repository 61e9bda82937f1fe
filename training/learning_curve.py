"""The learning curve of a run: losses and PSNR over its steps, from its own logs."""

import io
import json
import os
from collections import defaultdict
from pathlib import Path


HISTORY = "history.jsonl"  # of the tokenizer's training
TRAINER_STATE = "trainer_state.json"
PANELS = {  # title: names in the logs
    "PSNR (dB)": ("psnr", "eval_psnr"),
    "losses": ("l1", "l2", "vq", "contrastive", "text_loss", "image_loss", "eval_text_loss", "eval_image_loss"),
}

Curves = dict[str, list[tuple[int, float]]]


def read_curves(folder: str | os.PathLike) -> Curves:
    """Read the logs of a run of either training.

    Args:
        folder: `output_dir` of the run.

    Returns:
        (step, value) pairs in order of the steps, for every name in the logs. A step that was logged again after an
        interruption counts once, with the last value.

    Raises:
        ValueError: the folder has no logs.
    """
    folder = Path(folder)
    if (folder / HISTORY).is_file():
        lines = [json.loads(line) for line in (folder / HISTORY).read_text(encoding="utf-8").splitlines()]
    elif (folder / TRAINER_STATE).is_file():
        lines = json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))["log_history"]
    else:
        raise ValueError(f"{folder} has no logs of a training: neither {HISTORY} nor {TRAINER_STATE}")
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for line in lines:
        for name in line.keys() - {"step"}:
            curves[name][line["step"]] = line[name]
    return {name: sorted(values.items()) for name, values in curves.items()}


def plot_curves(runs: dict[str, Curves]) -> bytes:
    """Plot PSNR and losses over the steps, a row of panels for each run.

    Args:
        runs: curves of `read_curves` by title.

    Returns:
        The bytes of a PNG.

    Raises:
        ValueError: none of the known names is in a run's logs.
    """
    from matplotlib.figure import Figure  # of the extra `eval`

    shown = {}
    for title, curves in runs.items():
        known = {panel: [name for name in names if name in curves] for panel, names in PANELS.items()}
        shown[title] = {panel: names for panel, names in known.items() if names}
        if not shown[title]:
            raise ValueError(f"the logs of {title} have neither losses nor PSNR")
    columns = max(map(len, shown.values()))
    figure = Figure(figsize=(4 * columns, 3 * len(runs)), dpi=110, layout="constrained")
    grid = figure.subplots(len(runs), columns, squeeze=False)
    for axes, (title, of_run) in zip(grid, shown.items()):
        for axis in axes[len(of_run) :]:
            axis.set_axis_off()
        for axis, (panel, names) in zip(axes, of_run.items()):
            for name in names:
                steps, values = zip(*runs[title][name])
                axis.plot(steps, values, ".-" if name.startswith("eval_") else "-", markersize=4, label=name)
            if panel == "losses":
                axis.set_yscale("log")
            axis.set_title(f"{title}: {panel}", fontsize=9)
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
