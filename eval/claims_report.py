"""Tables and plots of `eval.claims`: means over seeds of the metrics of finished runs."""

import io
import statistics

from matplotlib.figure import Figure

from eval.claims_plan import CAPTIONS, JOINT, RECONSTRUCTION


SECONDS = "training, seconds"
GAINED = "validation PSNR (dB) gained in the last quarter"


def validation_psnr(result: dict) -> float:
    """Return the mean PSNR (dB) over all images of a search run's sets."""
    sets = result["sets"].values()
    return sum(one["images"] * one["psnr_db"] for one in sets) / sum(one["images"] for one in sets)


def metrics(result: dict) -> dict[str, float]:
    """Return the metrics of one run that are averaged over seeds, under the names in tables and plots.

    The training time is left out if the run was interrupted.
    """
    sets, curve = result["sets"], result["validation_curve"]
    numbers = {f"PSNR (dB), {name}": one["psnr_db"] for name, one in sets.items() if one["psnr_db"] is not None}
    numbers |= {
        f"zero-shot (%), {name}": 100 * one["zero_shot"]["accuracy"] for name, one in sets.items() if one["zero_shot"]
    }
    numbers |= {f"codes used (%), {name}": one["codes_used_percent"] for name, one in sets.items()}
    earlier = [point["psnr_db"] for point in curve if point["step"] <= 0.75 * curve[-1]["step"]]
    if earlier and result["supervision"] != CAPTIONS:
        numbers[GAINED] = curve[-1]["psnr_db"] - earlier[-1]
    return numbers | ({} if result["resumed_from_step"] else {SECONDS: result["training_seconds"]})


def aggregate(results: list[dict]) -> list[dict]:
    """Compute mean and sample standard deviation over the seeds of each setting (None for a single seed).

    Returns:
        A row for each (codebooks, supervision), sorted by codebooks. Its `metrics` have `mean`, `std` and the `values`
        by name; its `curve` is the mean validation PSNR (dB) by step, at the steps that all seeds have.
    """
    groups: dict[tuple, list[dict]] = {}
    for result in results:
        groups.setdefault((result["codebooks"], result["supervision"]), []).append(result)
    rows = []
    for (k, supervision), group in sorted(groups.items()):
        columns = [metrics(result) for result in group]
        names = dict.fromkeys(name for column in columns for name in column)
        values = {name: [column[name] for column in columns if name in column] for name in names}
        curves = [{point["step"]: point["psnr_db"] for point in result["validation_curve"]} for result in group]
        shared = set.intersection(*(set(curve) for curve in curves))
        rows.append(
            {
                "codebooks": k,
                "codebook_size": group[0]["codebook_size"],
                "bits_per_position": group[0]["bits_per_position"],
                "supervision": supervision,
                "candidate": group[0]["candidate"],
                "seeds": [result["seed"] for result in group],
                "metrics": {
                    name: {
                        "mean": statistics.mean(numbers),
                        "std": statistics.stdev(numbers) if len(numbers) > 1 else None,
                        "values": numbers,
                    }
                    for name, numbers in values.items()
                },
                "curve": {step: statistics.mean(curve[step] for curve in curves) for step in sorted(shared)},
            }
        )
    return rows


def metric_names(rows: list[dict]) -> list[str]:
    """List the metrics of all rows in order of first appearance, the cost last."""
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    return sorted(names, key=lambda name: name == SECONDS)


def markdown(cells: list[list[str]]) -> str:
    """Format an aligned Markdown table; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    rows = [cells[0], ["-" * width for width in widths], *cells[1:]]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows)


def table(rows: list[dict], without_tokenizer: dict[str, dict[str, float]]) -> str:
    """Format the results as Markdown: the baselines, then mean ± standard deviation over seeds.

    Args:
        without_tokenizer: see `baselines`.
    """
    names = metric_names(rows)
    cells = [["codebooks", "bits", "trained for", "setting", *names, "seeds"]]
    for kind, decibels in without_tokenizer.items():
        shown = {f"PSNR (dB), {name}": f"{value:.2f}" for name, value in decibels.items()}
        cells.append([f"({kind})", "-", "-", "-", *(shown.get(name, "-") for name in names), "-"])
    for row in rows:
        shown = []
        for name in names:
            value = row["metrics"].get(name)
            digits = 0 if name == SECONDS else 2
            spread = "" if value is None or value["std"] is None else f" ± {value['std']:.{digits}f}"
            shown.append("-" if value is None else f"{value['mean']:.{digits}f}{spread}")
        shape = f"{row['codebooks']} x {row['codebook_size']}"
        about = [shape, f"{row['bits_per_position']:g}", row["supervision"], row["candidate"]]
        cells.append([*about, *shown, " ".join(map(str, row["seeds"]))])
    return markdown(cells)


def search_table(results: list[dict]) -> str:
    """Format the search as Markdown: validation PSNR (dB) and used codes of each candidate (row) and K (column)."""
    shapes = {r["codebooks"]: f"{r['codebooks']} x {r['codebook_size']}" for r in results}
    shown = {
        (r["candidate"], r["codebooks"]): f"{validation_psnr(r):.2f} dB, "
        + ", ".join(f"{one['codes_used_percent']:.1f}%" for one in r["sets"].values())
        for r in results
    }
    names = dict.fromkeys(candidate for candidate, _ in shown)
    rows = [[name, *(shown.get((name, k), "-") for k in sorted(shapes))] for name in names]
    return markdown([["setting", *(shapes[k] for k in sorted(shapes))], *rows])


def plot(rows: list[dict], without_tokenizer: dict[str, dict[str, float]], title: str) -> bytes:
    """Plot each metric over the number of sub-codebooks, and the validation PSNR over the steps.

    Error bars are standard deviations, and lines are baselines.

    Returns:
        The bytes of a PNG.
    """
    names = [name for name in metric_names(rows) if name not in (SECONDS, GAINED)]
    figure = Figure(figsize=(3.6 * (len(names) + 1), 3.6), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=10)
    *axes, curves = figure.subplots(1, len(names) + 1, squeeze=False)[0]
    for axis, name in zip(axes, names):
        for supervision, marker in ((JOINT, "o-"), (RECONSTRUCTION, "s"), (CAPTIONS, "^")):
            points = [row for row in rows if row["supervision"] == supervision and name in row["metrics"]]
            if points:
                values = [row["metrics"][name] for row in points]
                spread = [value["std"] or 0 for value in values]
                means = [value["mean"] for value in values]
                axis.errorbar(
                    [row["codebooks"] for row in points], means, yerr=spread, fmt=marker, capsize=4, label=supervision
                )
        for (kind, decibels), style in zip(without_tokenizer.items(), ("--", ":")):
            for set_name, value in decibels.items():
                if name == f"PSNR (dB), {set_name}":
                    axis.axhline(value, color="gray", linestyle=style, label=kind)
        axis.set_xscale("log", base=2)
        shapes = {row["codebooks"]: f"{row['codebooks']}x{row['codebook_size']}" for row in rows}
        axis.set_xticks(list(shapes), list(shapes.values()))
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("sub-codebooks x codes")
    for row in rows:
        if row["supervision"] != CAPTIONS:
            label = f"{row['codebooks']}x{row['codebook_size']}, {row['supervision']}"
            curves.plot(list(row["curve"]), list(row["curve"].values()), ".-", label=label)
    curves.set_title("PSNR (dB), validation", fontsize=9)
    curves.set_xlabel("step")
    for axis in (*axes, curves):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
