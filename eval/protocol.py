"""Protocols: how a number was measured, stored with every measured and published number.

An evaluation's JSON has a list `numbers`, each made by `number`; `published.yaml` has the same for
published numbers, and the command that measures each of them here. `eval.report` compares two numbers only if every field
agrees (`differences`).
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
    """Make one entry of a result's `numbers`.

    Args:
        unit: "%" for values out of 100, "dB", or nothing.
        split: which samples, and how many where that is a choice.
        images: how pictures are prepared before they are read, or how drawings are stored before they are scored.
        tool: what computes the value.
        prompt: the text given to the model, with placeholders in braces; None where it is given none.
        sampling: how answers or pictures are drawn; None where nothing is.
        reference: what outputs are compared with.
    """
    protocol = dict(zip(FIELDS, (split, prompt, sampling, images, reference, tool)))
    return {"benchmark": benchmark, "metric": metric, "value": value, "unit": unit, "protocol": protocol}


@dataclass(frozen=True)
class Published:
    """A published number.

    Attributes:
        source: where the number stands.
        protocol: a value for each of FIELDS, None where a field does not apply to the system; None as a whole where
            the procedure is not known.
        procedure: where the procedure stands.
        command: what measures it here, by the same procedure; "" where the model is not to be had.
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
        ValueError: an entry whose protocol has other fields than FIELDS.
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
