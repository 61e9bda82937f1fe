"""Encodes images once, with UniTok's visual tokenizer, for trainings that then need not open them.

    python -m training.extract_codes data/train.json data/codes --visual-model runs/tokenizer/release
    torchrun --nproc_per_node 8 -m training.extract_codes "data/{00000..00099}.tar" data/codes --visual-model ...

The images are divided into shards, and the shards among the processes.  A run that broke off goes on with the shards
that are missing, in any number of processes.  `training.codes.CodeStore` reads the result.
"""

import hashlib
import json
import os
import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import datasets
import torch
import typer
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from training.codes import shard_path, write_metadata, write_shard
from training.data import ImageStore, read_rows
from training.image_text_data import IMAGE_SUFFIXES, BrokenSamples, augmentation, random_numbers, sample_seed
from unitok_mllm import UniTokModel
from unitok_mllm.image_processing_unitok import DECODE_ERRORS, MODES, UniTokImageProcessor


class Format(str, Enum):
    parquet = "parquet"
    webdataset = "webdataset"


Mode = Enum("Mode", {mode: mode for mode in MODES}, type=str)


def image_keys(data: str, image_folder: str = "") -> tuple[list[str], ImageStore]:
    """The images that some data names, each once, in the order of the data, and where they are.

    Args:
        data: a .json, .jsonl or .parquet file whose rows have an `image` (a path, or a list of them); or a folder of
            images; or tar files, `{00..15}.tar` for many.
        image_folder: the folder, or tar files, that the rows' paths lie in; without it, the file's own folder.

    Raises:
        FileNotFoundError, ValueError: the data does not exist, or names no image.
    """
    if data.endswith(".tar"):
        store = ImageStore(data)
        keys = [name for name in store.members if name.lower().endswith(IMAGE_SUFFIXES)]
    elif Path(data).is_dir():
        store = ImageStore(data)
        files = (path for path in Path(data).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        keys = sorted(path.relative_to(data).as_posix() for path in files)
    else:
        rows = read_rows(Path(data))
        if isinstance(rows, datasets.Dataset):
            rows = rows.select_columns([name for name in rows.column_names if name == "image"])
        store = ImageStore(image_folder or str(Path(data).parent))
        named = (row.get("image") or [] for row in rows)
        keys = list(dict.fromkeys(key for names in named for key in ([names] if isinstance(names, str) else names)))
    if not keys:
        raise ValueError(f"{data} names no image.")
    return keys, store


def file_digest(paths: list[Path]) -> str:
    """SHA-256 over the contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


class ImageVariants(Dataset):
    """Images by number: their key, and `variants` views (variants, 3, H, W) in [-1, 1], or the error of a broken one.

    View 0 is the image itself; another one is changed by `augment` with numbers drawn from (seed, key, variant).
    """

    def __init__(
        self,
        keys: list[str],
        store: ImageStore,
        image_processor: UniTokImageProcessor,
        augment: nn.Module,
        variants: int,
        seed: int,
    ):
        self.keys, self.store, self.image_processor = keys, store, image_processor
        self.augment, self.variants, self.seed = augment, variants, seed

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor | str]:
        key = self.keys[index]
        try:
            pixels = self.image_processor(self.store[key])["pixel_values"][0]
        except DECODE_ERRORS as error:
            return key, str(error)
        views = [pixels]
        for variant in range(1, self.variants):
            with random_numbers(sample_seed(self.seed, key, variant)):
                views.append(self.augment(pixels))
        return key, torch.stack(views)


app = typer.Typer(help=__doc__, add_completion=False)


@app.command()
def main(
    data: Annotated[str, typer.Argument(help="captions, conversations, a folder of images, or tar files")],
    out: Annotated[Path, typer.Argument(help="folder for the codes")],
    visual_model: Annotated[Path, typer.Option(help="folder of a visual tokenizer, or of an MLLM")],
    image_folder: Annotated[str, typer.Option(help="that the data's paths lie in: a folder, or tar files")] = "",
    variants: Annotated[int, typer.Option(min=1, help="codes of an image: itself, and changed ones")] = 1,
    mirror: Annotated[bool, typer.Option(help="mirror half of the changed ones")] = False,
    max_shift: Annotated[int, typer.Option(min=0, help="pixels that changed ones are shifted by at most")] = 0,
    format: Annotated[Format, typer.Option(help="of the shards")] = Format.parquet,
    mode: Annotated[Mode, typer.Option(help="of the image processor")] = Mode.understand,
    batch_size: Annotated[int, typer.Option(min=1, help="images that are encoded at a time")] = 64,
    shard_size: Annotated[int, typer.Option(min=1, help="images of a shard")] = 4096,
    workers: Annotated[int, typer.Option(min=0, help="processes that decode images, for each that encodes")] = 4,
    device: Annotated[str, typer.Option(help="such as cuda:0", show_default="a GPU where there is one")] = "",
    bf16: Annotated[bool, typer.Option(help="encode in bfloat16; the search for codes stays float32")] = False,
    seed: int = 0,
    max_broken_share: Annotated[float, typer.Option(help="of a process's images; more of them stop it")] = 0.01,
) -> None:
    """Writes the codes of the images that DATA names to OUT."""
    if variants > 1 and not mirror and not max_shift:
        raise ValueError(f"{variants} variants would be the same: mirror them, or give a max_shift.")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    weights = sorted(visual_model.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"There is no model in {visual_model}: it has no .safetensors file.")
    keys, store = image_keys(data, image_folder)
    model = UniTokModel.from_pretrained(visual_model, dtype=torch.bfloat16 if bf16 else torch.float32)
    model = model.to(device).eval()
    config = model.config.vision_config
    num_shards = -(-len(keys) // shard_size)
    metadata = {
        "visual_model": visual_model.resolve().name,
        "weights_sha256": file_digest(weights),
        "image_size": config.image_size,
        "num_codebooks": config.num_codebooks,
        "codebook_size": config.codebook_size,
        "num_positions": config.num_positions,
        "mode": mode.value,
        "variants": variants,
        "mirror": mirror,
        "max_shift": max_shift,
        "seed": seed,
        "bf16": bf16,
        "format": format.value,
        "shard_size": shard_size,
        "num_shards": num_shards,
        "num_images": len(keys),
        "keys_sha256": hashlib.sha256(json.dumps(keys).encode()).hexdigest(),
    }
    write_metadata(out, metadata)

    shards = range(rank, num_shards, world_size)
    paths = {shard: shard_path(out, shard, metadata) for shard in shards}
    ranges = {
        shard: range(shard * shard_size, min((shard + 1) * shard_size, len(keys)))
        for shard in shards
        if not paths[shard].is_file()
    }
    batches = {
        shard: [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
        for shard, images in ranges.items()
    }
    size = {"height": config.image_size, "width": config.image_size}
    image_processor = UniTokImageProcessor(mode=mode.value, size=size)
    augment = augmentation(image_processor, mirror, max_shift)
    loader = DataLoader(
        ImageVariants(keys, store, image_processor, augment, variants, seed),
        batch_sampler=[batch for of_shard in batches.values() for batch in of_shard],
        num_workers=workers,
        collate_fn=list,
    )
    loaded = iter(loader)
    total = sum(len(images) for images in ranges.values())
    broken = BrokenSamples(max_broken_share)
    bar = tqdm(total=total, unit="image", disable=rank > 0)
    start = time.perf_counter()
    for shard, of_shard in batches.items():
        codes = {}
        for _ in of_shard:
            codes |= encode(model, next(loaded), broken)
            bar.update(batch_size)
        write_shard(paths[shard], codes)
    bar.close()
    broken.judge()
    rate = total / (time.perf_counter() - start)
    print(f"process {rank}: {total} images in {len(ranges)} shards, {broken.broken} broken, {rate:.0f} images/s")


@torch.inference_mode()
def encode(model: UniTokModel, images: list[tuple[str, torch.Tensor | str]], broken: BrokenSamples) -> dict:
    """Codes (variants, K, L) of a batch of `ImageVariants` by key, on the CPU; broken ones are counted and left out."""
    views = {}
    for key, pixels in images:
        if isinstance(pixels, str):
            broken.count_broken(key, pixels)
        else:
            broken.count()
            views[key] = pixels
    if not views:
        return {}
    batch = torch.stack(list(views.values())).to(model.device)  # (B, variants, 3, H, W)
    codes = torch.stack([model.encode(variant) for variant in batch.unbind(1)], dim=1)
    return dict(zip(views, codes.cpu()))


if __name__ == "__main__":
    app()
