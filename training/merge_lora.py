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
from training.errors import one_line_errors
from training.release import FLOAT_TYPES, save_release
from unitok_mllm import UniTokMLLMForConditionalGeneration, UniTokMLLMProcessor
from unitok_mllm.outputs import check_output_folder
from unitok_mllm.typer_apps import script_app


app = script_app(help=__doc__)


def load_with_adapter(adapter: str | os.PathLike, base: str = "") -> PeftModel:
    """Load an adapter and its base model, in float32.

    Args:
        adapter: folder of the adapter.
        base: folder of the base model; "" for the one that the adapter names.
    """
    adapter = Path(adapter)
    base = base or PeftConfig.from_pretrained(adapter).base_model_name_or_path
    return PeftModel.from_pretrained(UniTokMLLMForConditionalGeneration.from_pretrained(base), adapter).eval()


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
    check_output_folder(folder)
    check_source("--base", base or PeftConfig.from_pretrained(adapter).base_model_name_or_path)
    model = load_with_adapter(adapter, base).merge_and_unload()
    save_release(model, UniTokMLLMProcessor.from_pretrained(adapter), folder, getattr(torch, dtype))
    print(f"merged into {folder}")


if __name__ == "__main__":
    one_line_errors()(app)()
