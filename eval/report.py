"""One HTML page of the evaluation scripts' results, with published numbers.

    python -m eval.report runs/easy_vqa.json runs/emoji.json runs/claims/claims.json --output report.html

It reads any JSON or JSON lines. A result is recognised by its `benchmark`, or by keys that only one tool writes. Files
of an unknown kind are also shown as tables. The page begins with the `numbers` of each evaluation and ends with
digests. Numbers are rounded and shares are shown as percent; the tooltip has the full value. Pictures that a result
names, or that lie next to it under its name (`easy_vqa.png`, `easy_vqa-*.png`; `sheet.png`), are embedded: the page
needs no other file.

A published number (`published.yaml`) is shown next to a result if their protocols (`eval.protocol`) agree: the same
data, measured in the same way. If only the procedure differs, the page says how.
"""

import base64
import glob
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from jinja2 import Environment

from eval._common import versions
from eval.protocol import Published, differences, read_published
from training.errors import one_line_errors
from training.files import write_atomically
from unitok_mllm.outputs import check_output_file
from unitok_mllm.typer_apps import script_app


ABOUT = ("settings", "versions", "prompt", "prompts", "measured", "configs", "config", "runs")  # shown folded
LONG = 30  # rows; longer tables are folded
WIDE = 12  # columns; wider tables are transposed
DIGEST = re.compile(r"(.*_)?(sha256|digest)|key")
SHARE = re.compile(r"(accuracy|exact_match|f1|top\d|both|color|shape|pope)(_.*)?")  # of 1, where in [0, 1]
PERCENT = re.compile(r".*_percent(_each)?")
NUMBER_KEYS = {"benchmark", "metric", "value", "unit", "protocol"}
PNG = b"\x89PNG\r\n\x1a\n"

TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { max-width: 76rem; margin: 2rem auto; padding: 0 1.5rem; background: #fff; color: #1c2127;
       font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.3rem; border-bottom: 2px solid #e1e4e8; margin-top: 3rem; }
h3, h4 { font-size: 1rem; margin: 1.2rem 0 .4rem; } p, .source { color: #57606a; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .2rem .7rem; border-bottom: 1px solid #e1e4e8;
         max-width: 34rem; overflow-wrap: anywhere; white-space: pre-wrap; }
th { background: #f4f5f7; font-weight: 600; } td.number { text-align: right; white-space: nowrap; }
img { max-width: 100%; border: 1px solid #e1e4e8; } summary { cursor: pointer; color: #57606a; margin: .6rem 0; }
@media print { body { margin: 0; font-size: 11px; } h2, h3, h4 { break-after: avoid; } tr, img { break-inside: avoid; }
  .scroll { overflow: visible; } details::details-content { content-visibility: visible; block-size: auto; } }
</style>
</head>
<body>
{% macro show(block) %}
{% if block.title %}<h3>{{ block.title }}</h3>{% endif %}
{% if block.folded %}<details><summary>{{ block.rows | length }} rows</summary>{% endif %}
<div class="scroll"><table>
{% if block.columns %}<tr>{% for name in block.columns %}<th>{{ name }}</th>{% endfor %}</tr>{% endif %}
{% for row in block.rows %}<tr>{% for cell in row -%}
<td{% if cell.number %} class="number"{% endif %}{% if cell.full %} title="{{ cell.full }}"{% endif %}>{{ cell.text }}</td>
{%- endfor %}</tr>
{% endfor %}</table></div>
{% if block.folded %}</details>{% endif %}
{% endmacro %}
<h1>{{ title }}</h1>
{% if results.rows %}{{ show(results) }}{% endif %}
<ul>{% for section in sections %}<li><a href="#result-{{ loop.index }}">{{ section.title }}</a></li>{% endfor %}</ul>
{% for section in sections %}
<h2 id="result-{{ loop.index }}">{{ section.title }}</h2>
<p>{{ section.path }}</p>
{% if section.refused %}<h4>Published, but not to be compared</h4>
<ul>{% for line in section.refused %}<li>{{ line }}</li>{% endfor %}</ul>{% endif %}
{% for block in section.measured %}{{ show(block) }}{% endfor %}
{% for name, uri in section.pictures %}<h4>{{ name }}</h4><img src="{{ uri }}" alt="{{ name }}">{% endfor %}
{% if section.about %}<details><summary>How it was measured</summary>
{% for block in section.about %}{{ show(block) }}{% endfor %}</details>{% endif %}
{% endfor %}
{% if digests.rows %}<h2>Digests</h2>{{ show(digests) }}{% endif %}
<p>{{ footer }}</p>
</body>
</html>
"""


@dataclass
class Cell:
    """A table's cell: its text, and its full text if that is longer."""

    text: str
    full: str = ""
    number: bool = False


@dataclass
class Block:
    """A table. Without columns, the first column has names."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    may_fold: bool = True

    @property
    def folded(self) -> bool:
        return self.may_fold and len(self.rows) > LONG


@dataclass
class Section:
    """One result.

    Attributes:
        title: title of the result.
        path: path of the file.
        results: a row for each of the result's `numbers`: name, value, and published numbers of the same protocol.
        refused: published numbers of the same benchmark with other protocols, and the differences.
        measured: tables of the other values.
        about: tables of settings and versions, see ABOUT.
        digests: rows of names and digests.
        pictures: name and data URI of each picture.
    """

    title: str
    path: str
    results: list[list[Cell]]
    refused: list[str]
    measured: list[Block]
    about: list[Block]
    digests: list[list[Cell]]
    pictures: list[tuple[str, str]]


def is_number(value: Any) -> bool:
    """Return whether a value of a result is a number; booleans are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_spread(value: Any) -> bool:
    """Return whether a value is a mean with its standard deviation, which fits into one cell."""
    return isinstance(value, dict) and {"mean", "std"} <= value.keys() and is_number(value["mean"])


def is_flat(value: Any) -> bool:
    """Return whether a value fits into one cell."""
    if isinstance(value, list):
        return all(not isinstance(item, dict | list) for item in value)
    return not isinstance(value, dict) or is_spread(value)


def short(number: float) -> str:
    """Format a number with four digits; whole numbers stay unchanged."""
    return str(number) if isinstance(number, int) else f"{number:.0f}" if abs(number) >= 1e4 else f"{number:.4g}"


def percent(value: float, full: float) -> Cell:
    """Build the cell of a percentage, with the original value in the tooltip."""
    return Cell(f"{value:.1f}%", str(full), number=True)


def to_cell(value: Any, path: str = "") -> Cell:
    """Build the cell of a flat value. Some names mark shares, which are shown as percentages."""
    names = path.split(" · ")
    if value is None or value == []:
        return Cell("-")
    if is_number(value) and PERCENT.fullmatch(names[-1]):
        return percent(value, value)
    if isinstance(value, float) and 0 <= value <= 1 and any(map(SHARE.fullmatch, names)):
        return percent(100 * value, value)
    if is_number(value):
        return Cell(short(value), "" if short(value) == str(value) else str(value), number=True)
    if is_spread(value):
        deviation = "" if value["std"] is None else f" ± {short(value['std'])}"
        return Cell(short(value["mean"]) + deviation, json.dumps(value, ensure_ascii=False), number=True)
    if isinstance(value, list):
        text = ", ".join(to_cell(item, path).text for item in value)
        full = ", ".join(map(str, value))
        return Cell(text, "" if full == text else full)
    return Cell(str(value))


def flattened(row: dict) -> dict[str, Any]:
    """Flatten nested dicts and join their names. Lists of dicts are not flattened."""
    flat = {}
    for name, value in row.items():
        if isinstance(value, dict) and not is_spread(value):
            flat |= {f"{name} · {inner}": item for inner, item in flattened(value).items()}
        else:
            flat[str(name)] = value
    return flat


def to_blocks(value: Any, title: str = "") -> list[Block]:
    """Convert any JSON value to tables, the most deeply nested last.

    A list of dicts, or a dict of similar dicts (see `are_alike`), becomes one table with a row for each dict. Other
    dicts become a table with a row for each flat value, and separate tables for the other values.
    """
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return matrix([flattened(item) for item in value], title)
    if isinstance(value, dict) and not is_spread(value):
        if are_alike(list(value.values())):
            return matrix([{"": str(name)} | flattened(item) for name, item in value.items()], title)
        flat = {str(name): item for name, item in value.items() if is_flat(item)}
        blocks = (
            [Block(title, [], [[Cell(name), to_cell(item, f"{title} · {name}")] for name, item in flat.items()])]
            if flat
            else []
        )
        for name, item in value.items():
            if not is_flat(item):
                blocks += to_blocks(item, f"{title} · {name}" if title else str(name))
        return blocks
    if is_flat(value):
        return [Block(title, [], [[to_cell(value, title)]])]
    return [block for i, item in enumerate(value, start=1) for block in to_blocks(item, f"{title} {i}".strip())]


def are_alike(values: list) -> bool:
    """Return whether the values are several dicts that share at least half of the names of their flat values."""
    if len(values) < 2 or not all(isinstance(item, dict) and not is_spread(item) for item in values):
        return False
    names = [{name for name, item in flattened(row).items() if is_flat(item)} for row in values]
    return 2 * len(set.intersection(*names)) >= len(set.union(*names)) > 0


def without(value: Any, is_apart: Callable[[str, Any], bool], apart: dict[str, Any], path: str = "") -> Any:
    """Move the entries for which `is_apart` is true, at any depth of nested dicts, to `apart` under their paths."""
    if not isinstance(value, dict):
        return value
    rest = {}
    for name, item in value.items():
        inner = f"{path} · {name}" if path else str(name)
        if is_apart(str(name), item):
            apart[inner] = item
        else:
            rest[name] = without(item, is_apart, apart, inner)
    return rest


def is_digest(name: str, value: Any) -> bool:
    """Return whether a value of a result is a digest, judging by its name."""
    return isinstance(value, str) and bool(DIGEST.fullmatch(name))


def is_numbers(name: str, value: Any) -> bool:
    """Return whether a value is a list of entries of `eval.protocol.number`."""
    return (
        name == "numbers"
        and isinstance(value, list)
        and all(isinstance(one, dict) and NUMBER_KEYS <= one.keys() for one in value)
    )


def matrix(rows: list[dict], title: str) -> list[Block]:
    """Build one table of the flat rows (transposed if it is wide), and tables of the lists of dicts."""
    columns = list(dict.fromkeys(name for row in rows for name, item in row.items() if is_flat(item)))
    cells = [
        [to_cell(row[name], f"{title} · {name}") if name in row else Cell("") for name in columns] for row in rows
    ]
    if len(columns) > WIDE:
        blocks = [Block(title, [], [[Cell(name), *column] for name, column in zip(columns, zip(*cells))])]
    else:
        blocks = [Block(title, columns, cells)]
    for i, row in enumerate(rows, start=1):
        for name, item in row.items():
            if not is_flat(item):
                blocks += to_blocks(item, " · ".join(filter(None, (title, row.get("") or str(i), name))))
    return blocks


def read_result(path: Path) -> Any:
    """Read a JSON file, or a file with one JSON value per line.

    Raises:
        ValueError: the file does not exist, or has another format; the message names it.
    """
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise ValueError(f"there is no result file {path} ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
    except json.JSONDecodeError as error:
        lines = [line for line in text.splitlines() if line.strip()]
        try:
            return [json.loads(line) for line in lines] if len(lines) > 1 else json.loads(text)
        except json.JSONDecodeError:
            raise ValueError(f"{path} is not JSON: {error}") from error


def title_of(result: Any, path: Path) -> str:
    """Return the title of a result: its `benchmark`, the tool that its keys identify, or the file's name."""
    if isinstance(result, dict) and isinstance(result.get("benchmark"), str):
        return ("text to image, " if "drawn_with" in result else "") + result["benchmark"]
    if isinstance(result, dict) and isinstance(result.get("results"), dict) and {"configs", "n-shot"} & result.keys():
        return f"lmms-eval: {', '.join(result['results'])}"
    rows = result if isinstance(result, list) else [result]
    if rows and all(isinstance(row, dict) and {"job", "seconds"} <= row.keys() for row in rows):
        return "speed"
    return path.stem


def strings(value: Any) -> list[str]:
    """Iterate over all strings in a JSON value."""
    if isinstance(value, dict | list):
        return [text for item in (value.values() if isinstance(value, dict) else value) for text in strings(item)]
    return [value] if isinstance(value, str) else []


def pictures(result: Any, path: Path) -> list[tuple[str, str]]:
    """Return name and data URI of each PNG that the result names, or that is next to it under the same name.

    Raises:
        ValueError: one of the files is not a PNG.
    """
    found = [
        path.with_suffix(".png"),
        path.with_name("sheet.png"),
        *sorted(path.parent.glob(f"{glob.escape(path.stem)}-*.png")),
    ]
    for text in strings(result):
        if text.endswith(".png") and len(text) < 1000:
            found += [Path(text), path.parent / text]
    files = {file.resolve(): file for file in found if file.is_file()}
    uris = []
    for file in files:
        data = file.read_bytes()
        if not data.startswith(PNG):
            raise ValueError(f"{file} is not a PNG file")
        uris.append((file.name, f"data:image/png;base64,{base64.b64encode(data).decode()}"))
    return uris


def value_cell(value: float, unit: str) -> Cell:
    """Build the cell of a measured or published number, with its unit."""
    if unit == "%":
        return percent(value, value)
    cell = to_cell(value)
    return Cell(f"{cell.text} {unit}".strip(), cell.full, number=True)


def compare(number: dict, published: list[Published]) -> tuple[list[list[Cell]], list[str]]:
    """Build the rows that compare a number with published ones, and a line for each that is not comparable."""
    name = [Cell(f"{number['benchmark']}, {number['metric']}"), Cell(number["protocol"]["split"])]
    here = [*name, value_cell(number["value"], number["unit"])]
    rows, refused = [], []
    for one in published:
        if (one.benchmark, one.metric) != (number["benchmark"], number["metric"]):
            continue
        theirs = value_cell(one.value, one.unit)
        if reasons := differences(number["protocol"], one):
            title = f"{one.benchmark}, {one.metric}: {theirs.text}, {one.system} ({one.source})"
            refused.append(f"{title}. Differs: {'; '.join(reasons)}.")
        else:
            rows.append([*here, theirs, Cell(one.system), Cell(one.source)])
    return rows or [[*here, Cell(""), Cell(""), Cell("")]], refused


def to_section(path: Path, published: list[Published]) -> Section:
    """Build the section of a result; for errors see `read_result` and `pictures`."""
    result = read_result(path)
    title = title_of(result, path)
    digests, numbers, about, results, refused = {}, {}, {}, [], []
    rest = without(without(result, is_digest, digests), is_numbers, numbers)
    rest = without(rest, lambda name, _: name in ABOUT, about)
    if isinstance(rest, dict):
        rest.pop("benchmark", None)  # shown as the heading
    for number in numbers.get("numbers", []):
        rows, lines = compare(number, published)
        results += [[Cell(title), *row] for row in rows]
        refused += lines
    protocols = [{"": f"{one['benchmark']}, {one['metric']}", **one["protocol"]} for one in numbers.get("numbers", [])]
    return Section(
        title=title,
        path=str(path),
        results=results,
        refused=refused,
        measured=to_blocks(rest),
        about=(to_blocks(protocols, "Protocol") if protocols else []) + to_blocks(about),
        digests=[[Cell(title), Cell(name), Cell(value)] for name, value in digests.items()],
        pictures=pictures(result, path),
    )


def make_report(paths: list[Path], title: str) -> str:
    """Build the HTML page.

    Raises:
        ValueError: see `read_result` and `pictures`.
    """
    published = read_published()
    sections = [to_section(path, published) for path in paths]
    rows = [row for section in sections for row in section.results]
    columns = ["result", "number", "of", "here", "published", "system", "source"]
    if not any(row[4].text for row in rows):
        columns, rows = columns[:4], [row[:4] for row in rows]
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE)
    return page.render(
        title=title,
        results=Block("", columns, rows, may_fold=False),
        sections=sections,
        digests=Block("", ["result", "name", "digest"], [row for section in sections for row in section.digests]),
        footer="Page made with " + ", ".join(f"{name} {version}" for name, version in versions().items()),
    )


app = script_app(help=__doc__)


@app.command()
def main(
    results: Annotated[list[Path], typer.Argument(help="JSON files with results.")],
    output: Annotated[Path, typer.Option(help="HTML file for the page.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Measured and published",
) -> None:
    """Write one HTML page of results, with published numbers."""
    check_output_file(output)
    page = make_report(results, title)
    write_atomically(output, page.encode())
    print(f"{len(results)} results are in {output}")


if __name__ == "__main__":
    one_line_errors()(app)()
