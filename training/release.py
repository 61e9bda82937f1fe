"""Released model folders: written atomically, with all weights checked."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from training.model_card import TrainingRun, write_release_card
from unitok_mllm import UniTokMLLMForConditionalGeneration, UniTokMLLMProcessor


FLOAT_TYPES = ("float32", "float16", "bfloat16")  # dtypes of stored weights


def write_folder(folder: str | os.PathLike, write: Callable[[Path], None]) -> None:
    """Write a folder atomically: `write` fills a new folder next to it, which then replaces it.

    If `write` is interrupted, `folder` stays unchanged; after an error, the new folder is removed. (A kill between the
    two renames leaves the old folder as `.<name>.old`, which the next call restores.)

    Args:
        folder: the folder to write or replace.
        write: function that writes the files into the folder it is given.
    """
    folder = Path(folder)
    unfinished, old = (folder.with_name(f".{folder.name}.{state}") for state in ("unfinished", "old"))
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        write(unfinished)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        unfinished.rename(folder)
        shutil.rmtree(old)
    else:
        unfinished.rename(folder)


def check_weight(name: str, value: torch.Tensor, exact: torch.Tensor | None = None) -> None:
    """Check that a weight can be released.

    Args:
        name: name of the weight.
        value: the weight in the dtype in which it is stored.
        exact: the weight before the cast, if there was one.

    Raises:
        ValueError: the weight is empty or not finite, or the cast made it so; the message names it.
    """
    if not value.numel():
        raise ValueError(f"The weight {name} is empty.")
    if value.isfinite().all():
        return
    if exact is None:
        raise ValueError(f"The weight {name} is not finite.")
    raise ValueError(
        f"The weight {name} reaches {exact.abs().max():g}, but {value.dtype} ends at {torch.finfo(value.dtype).max:g}: "
        "store it in bfloat16 or float32."
    )


def save_release(
    model: UniTokMLLMForConditionalGeneration,
    processor: UniTokMLLMProcessor,
    folder: str | os.PathLike,
    dtype: torch.dtype = torch.float16,
    state_dict: dict[str, torch.Tensor] | None = None,
    run: TrainingRun | None = None,
) -> None:
    """Save the MLLM with its processor and its model card. The weights load in float32 by default.

    Args:
        model: the MLLM.
        processor: the processor of the MLLM.
        folder: the folder to write or replace.
        dtype: dtype of the stored weights.
        state_dict: the weights, if those of the model itself are sharded (ZeRO-3).
        run: facts about the training, for the card.

    Raises:
        ValueError: a weight is missing, empty, not finite, or too large for the dtype.
    """
    folder = Path(folder)
    state_dict = dict(model.state_dict() if state_dict is None else state_dict)
    if missing := model.state_dict().keys() - state_dict.keys():
        raise ValueError(f"{len(missing)} weights are missing, {min(missing)} first.")
    stored: dict[tuple, torch.Tensor] = {}  # keeps tied weights tied
    for name, value in state_dict.items():
        check_weight(name, value)
        if value.is_floating_point():
            state_dict[name] = stored.setdefault((value.data_ptr(), value.shape), value.to("cpu", dtype))
            check_weight(name, state_dict[name], value)

    def write(unfinished: Path) -> None:
        model.save_pretrained(unfinished, state_dict=state_dict)
        processor.save_pretrained(unfinished)
        config = unfinished / "config.json"
        config.write_text(
            re.sub(r'"dtype": "b?float16"', '"dtype": "float32"', config.read_text(encoding="utf-8")), encoding="utf-8"
        )
        write_release_card(unfinished, folder, run)

    write_folder(folder, write)
