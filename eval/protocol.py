"""Protocols: how a number was measured, stored with every measured and published number.

The JSON of an evaluation has a list `numbers`, whose entries come from `number`. `published.yaml` has the same fields
for published numbers, and the command that measures each of them with this project. `eval.report` compares two numbers
only if all fields agree (`differences`).
"""

from dataclasses import dataclass
from pathlib import Path

import yaml


PUBLISHED = Path(__file__).with_name("published.yaml")
FIELDS = ("split", "prompt", "sampling", "images", "reference", "tool")


def number(
    benchmark: str,
    metric: str,
    value: float,
    unit: str = "",
    *,
    split: str,
    images: str,
    tool: str,
    prompt: str | None = None,
    sampling: str | None = None,
    reference: str | None = None,
) -> dict:
    """Build one entry of a result's `numbers`.

    Args:
        benchmark: name of the benchmark.
        metric: name of the metric.
        value: the number.
        unit: "%" for values out of 100, "dB", or "".
        split: the samples, with their number if it is a choice.
        images: preprocessing of pictures before they are read, or format of drawings when they are scored.
        tool: the program that computes the value.
        prompt: text given to the model, with placeholders in braces; None if there is none.
        sampling: how answers or pictures are sampled; None if nothing is sampled.
        reference: what outputs are compared with; None if that does not apply.
    """
    protocol = dict(zip(FIELDS, (split, prompt, sampling, images, reference, tool)))
    return {"benchmark": benchmark, "metric": metric, "value": value, "unit": unit, "protocol": protocol}


@dataclass(frozen=True)
class Published:
    """A published number.

    Attributes:
        source: publication of the number.
        protocol: value of each of FIELDS, None for a field that does not apply to the system; None if the procedure is
            unknown.
        procedure: publication of the procedure.
        command: command that measures it here by the same procedure; "" if the model is not available.
    """

    benchmark: str
    metric: str
    unit: str
    value: float
    system: str
    source: str
    protocol: dict[str, str | None] | None
    procedure: str
    command: str


def read_published() -> list[Published]:
    """Read the numbers of `published.yaml`.

    Raises:
        ValueError: the protocol of an entry has other fields than FIELDS.
    """
    numbers = []
    for entry in yaml.safe_load(PUBLISHED.read_text(encoding="utf-8")):
        protocol = entry["protocol"]
        if protocol is not None and set(protocol) != set(FIELDS):
            raise ValueError(f"{entry['benchmark']} has {', '.join(protocol)}, expected {', '.join(FIELDS)}")
        shared = {name: entry.get(name, "") for name in ("benchmark", "metric", "unit", "procedure", "command")}
        numbers += [Published(**shared, protocol=protocol, **one) for one in entry["numbers"]]
    return numbers


def differences(measured: dict[str, str | None], published: Published) -> list[str]:
    """List the differences that prevent a comparison with a published number; [] for none.

    A field that does not apply to the published system is not compared.
    """
    if published.protocol is None:
        return [f"its procedure is not known ({published.procedure})"]
    return [
        f"{name}: here {measured[name]!r}, published {published.protocol[name]!r}"
        for name in FIELDS
        if published.protocol[name] not in (None, measured[name])
    ]
