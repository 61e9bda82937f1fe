"""Merge a trained LoRA adapter, and the parts trained with it, into the weights of its base model.

python -m training.merge_lora runs/vqa/adapter runs/vqa/merged
"""

import os
from pathlib import Path
from typing import Annotated

import torch
import typer
from peft import PeftConfig, PeftModel

from training.arguments import check_source
from training.checkpoints import check_file
from training.errors import one_line_errors
from training.release import FLOAT_TYPES, save_release
from unitok_mllm import UniTokMLLMForConditionalGeneration, UniTokMLLMProcessor
from unitok_mllm.outputs import check_whole_folder
from unitok_mllm.typer_apps import script_app


app = script_app(help=__doc__)


def base_of(adapter: str | os.PathLike) -> str:
    """Return the folder or hub name of the base model that an adapter names.

    Raises:
        ValueError: the adapter's config is broken, or names none.
    """
    config = Path(adapter, "adapter_config.json")
    check_file(config)
    try:
        base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{config} is no config of an adapter: {error}") from error
    if not base:
        raise ValueError(f"{config} names no base model: give --base")
    return base


def load_with_adapter(adapter: str | os.PathLike, base: str = "") -> PeftModel:
    """Load an adapter and its base model, in float32.

    Args:
        adapter: folder of the adapter.
        base: folder of the base model; "" for the one that the adapter names.
    """
    adapter = Path(adapter)
    model = UniTokMLLMForConditionalGeneration.from_pretrained(base or base_of(adapter))
    return PeftModel.from_pretrained(model, adapter).eval()


@app.command()
def merge_lora(
    adapter: Annotated[Path, typer.Argument(help="folder of the adapter")],
    folder: Annotated[Path, typer.Argument(help="folder to write the merged model to")],
    base: str = typer.Option("", help="folder of the base model, instead of the one that the adapter names"),
    dtype: str = typer.Option("float16", help="dtype of the stored weights"),
) -> None:
    """Write base + ADAPTER to FOLDER, for AutoModelForImageTextToText and AutoProcessor, without peft."""
    if not (adapter / "adapter_config.json").is_file():
        raise typer.BadParameter(f"no adapter in {adapter}: it has no adapter_config.json")
    if dtype not in FLOAT_TYPES:
        raise typer.BadParameter(f"dtype must be one of {', '.join(FLOAT_TYPES)}, got {dtype}")
    check_whole_folder(folder, replaces_model=True)
    check_source("--base", base or base_of(adapter))
    model = load_with_adapter(adapter, base).merge_and_unload()
    save_release(model, UniTokMLLMProcessor.from_pretrained(adapter), folder, getattr(torch, dtype))
    print(f"merged into {folder}")


if __name__ == "__main__":
    one_line_errors()(app)()
