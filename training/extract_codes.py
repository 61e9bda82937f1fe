"""Encode images once with UniTok's visual tokenizer, so that trainings need not open them.

    python -m training.extract_codes data/train.json data/codes --visual-model runs/tokenizer/release
    torchrun --nproc_per_node 8 -m training.extract_codes "data/{00000..00099}.tar" data/codes --visual-model ...
    ... --ray-workers 16          # on a Ray cluster (extra `ray`), see docs/serving.md

The images are divided into shards, and the shards among the processes. After an interrupted run, the same command writes
the missing shards, with any number of processes. `training.codes.CodeStore` reads the result.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, StrEnum
from pathlib import Path
from typing import Annotated

import datasets
import torch
import typer
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from training.codes import shard_path, write_metadata, write_shard
from training.errors import one_line_errors
from training.files import IMAGE_SUFFIXES, MOST_WORKERS, BrokenSamples, ImageStore, read_rows
from training.image_text_data import augmentation, random_numbers, sample_seed
from training.ray_jobs import run_jobs
from training.run_folder import claim_folder
from unitok_mllm import UniTokConfig, UniTokModel
from unitok_mllm.devices import AUTO, DEVICE_HELP, find_device
from unitok_mllm.image_processing_unitok import DECODE_ERRORS, MODES, UniTokImageProcessor
from unitok_mllm.packing_unitok import pack_linears
from unitok_mllm.typer_apps import script_app


logger = logging.getLogger(__name__)


class Format(StrEnum):
    """Kinds of shards that codes are written to."""

    parquet = "parquet"
    webdataset = "webdataset"


Mode = Enum("Mode", {mode: mode for mode in MODES}, type=str)


def image_keys(data: str, image_folder: str = "") -> tuple[list[str], ImageStore]:
    """List the images that the data names, each once and in the order of the data.

    Args:
        data: a .json, .jsonl or .parquet file whose rows have an `image` (a path, or a list of paths); or a folder of
            images; or tar files, `{00..15}.tar` for many, whose images are named as in `ImageStore`.
        image_folder: folder or tar files to which the rows' paths are relative; "" for the file's own folder.

    Returns:
        The keys of the images, and the store to load them from.

    Raises:
        FileNotFoundError: the data does not exist.
        ValueError: the data names no image, or has a name that is in several shards.
    """
    if data.endswith(".tar"):
        store = ImageStore(data)
        keys = [name for name in store.names if name.lower().endswith(IMAGE_SUFFIXES)]
    elif Path(data).is_dir():
        store = ImageStore(data)
        files = (path for path in Path(data).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        keys = sorted(path.relative_to(data).as_posix() for path in files)
    else:
        rows = read_rows(Path(data))
        if isinstance(rows, datasets.Dataset):
            rows = rows.select_columns([name for name in rows.column_names if name == "image"])
        store = ImageStore(image_folder or str(Path(data).parent))
        named = (row.get("image") for row in rows)
        lists = (names if isinstance(names, list) else [names] for names in named if names)
        names = [name for one in lists for name in one]
        keys = list(dict.fromkeys(name for name in names if isinstance(name, str)))
        if others := [name for name in names if not isinstance(name, str)]:
            logger.warning("skipping %d images that are named by no text, such as %.80r", len(others), others[0])
        store.check_names(keys)
    if not keys:
        raise ValueError(f"{data} names no images.")
    return keys, store


def file_digest(paths: Iterable[str | os.PathLike]) -> str:
    """Compute the SHA-256 of the contents of files."""
    paths = [Path(path) for path in paths]
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


class ImageVariants(Dataset):
    """Data set of images: key and views (variants, 3, H, W) in [-1, 1], or the error message of a broken image.

    View 0 is the image itself. The others are augmented with random numbers that depend on (seed, key, variant).

    Args:
        keys: keys of the images.
        store: store to load them from.
        image_processor: image processor of the visual tokenizer.
        augment: augmentation of processed pixels.
        variants: number of views of each image.
        seed: seed of the augmentation.
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


@dataclass
class Batch:
    """A batch of `ImageVariants`: pixels of the readable images, (B, variants, 3, H, W), and errors of the others."""

    keys: list[str]
    pixel_values: torch.Tensor
    errors: dict[str, str]


def collate(images: list[tuple[str, torch.Tensor | str]]) -> Batch:
    """Stack images in the worker, so that only one tensor is sent to the main process."""
    errors = {key: value for key, value in images if isinstance(value, str)}
    views = {key: value for key, value in images if key not in errors}
    pixel_values = torch.stack([*views.values()]) if views else torch.empty(0)
    return Batch(list(views), pixel_values, errors)


app = script_app(help=__doc__)


@app.command()
def main(
    data: Annotated[str, typer.Argument(help="captions, conversations, a folder of images, or tar files")],
    out: Annotated[Path, typer.Argument(help="folder for the codes")],
    visual_model: Annotated[Path, typer.Option(help="folder of a visual tokenizer, or of an MLLM")],
    image_folder: Annotated[str, typer.Option(help="folder or tar files that the data's paths are relative to")] = "",
    variants: Annotated[
        int, typer.Option(min=1, help="variants of each image: the image itself, and augmented ones")
    ] = 1,
    mirror: Annotated[bool, typer.Option(help="mirror half of the augmented variants")] = False,
    max_shift: Annotated[int, typer.Option(min=0, help="largest shift of augmented variants, in pixels")] = 0,
    format: Annotated[Format, typer.Option(help="format of the shards")] = Format.parquet,
    mode: Annotated[Mode, typer.Option(help="mode of the image processor")] = Mode.understand,
    batch_size: Annotated[int, typer.Option(min=1, help="images encoded at a time")] = 64,
    shard_size: Annotated[int, typer.Option(min=1, help="images per shard")] = 4096,
    workers: Annotated[
        int, typer.Option(min=0, max=MOST_WORKERS, help="image-decoding processes for each encoding process")
    ] = 4,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = AUTO,
    bf16: Annotated[bool, typer.Option(help="encode in bfloat16; the search for codes stays float32")] = False,
    seed: Annotated[int, typer.Option(help="seed of mirroring and shifts")] = 0,
    max_broken_share: Annotated[
        float, typer.Option(min=0, max=1, help="share of broken images above which a process stops")
    ] = 0.01,
    ray_workers: Annotated[int, typer.Option(min=0, help="number of Ray workers; 0 to encode in this process")] = 0,
) -> None:
    """Write the codes of the images that DATA names to OUT."""
    if variants > 1 and not mirror and not max_shift:
        raise ValueError(f"{variants} variants would be the same: mirror them, or give a max_shift.")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ray_workers and world_size > 1:
        raise ValueError("--ray-workers starts its own processes: run it without torchrun")
    if not ray_workers:
        find_device(device)
    weights = sorted(visual_model.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"no model in {visual_model}: it has no .safetensors file")
    claim_folder(out, rank == 0)
    keys, store = image_keys(data, image_folder)
    config = UniTokConfig.from_pretrained(visual_model).vision_config
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

    todo = []
    for shard in range(rank, num_shards, world_size):
        path = shard_path(out, shard, metadata).absolute()
        if not path.is_file():
            todo.append((str(path), shard * shard_size, min((shard + 1) * shard_size, len(keys))))
    arguments = {
        "visual_model": str(visual_model.absolute()),
        "data": str(Path(data).absolute()),
        "image_folder": str(Path(image_folder).absolute()) if image_folder else "",
        "device": device,
        "augmentations": {"horizontal_flip": mirror, "max_shift": max_shift},
        **{"mode": mode.value, "variants": variants, "seed": seed, "bf16": bf16},
        **{"batch_size": batch_size, "workers": workers, "max_broken_share": max_broken_share},
    }
    start, title = time.perf_counter(), f"{ray_workers} workers" if ray_workers else f"process {rank}"
    if ray_workers:
        seen = broken = 0
        with tqdm(total=sum(stop - first for _, first, stop in todo), unit="image") as bar:
            for one in run_jobs("training.extract_codes:Extractor", arguments, todo, ray_workers):
                seen, broken = seen + one["seen"], broken + one["broken"]
                bar.update(one["seen"])
    else:
        counts = Extractor(**arguments, named=(keys, store)).write(todo, show_progress=rank == 0)
        seen, broken = counts.seen, counts.broken
    rate = seen / (time.perf_counter() - start)
    print(f"{title}: {seen} images, {broken} of them broken, {rate:.1f} images/s; the rest was there")


class Extractor:
    """A visual tokenizer and the images that it encodes, in one process.

    Args:
        named: result of `image_keys`, if it is known already. The other arguments are those of the command line.

    Raises:
        ValueError: see `image_keys` and `find_device`.
    """

    def __init__(
        self,
        visual_model: str,
        data: str,
        image_folder: str,
        device: str,
        bf16: bool,
        mode: str,
        augmentations: dict,
        variants: int,
        seed: int,
        batch_size: int,
        workers: int,
        max_broken_share: float,
        named: tuple[list[str], ImageStore] | None = None,
    ):
        automatic = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else None
        model = UniTokModel.from_pretrained(visual_model, dtype=torch.bfloat16 if bf16 else torch.float32)
        self.model = pack_linears(model.to(find_device(device, automatic)).eval())
        side = model.config.vision_config.image_size
        image_processor = UniTokImageProcessor(mode=mode, size={"height": side, "width": side})
        augment = augmentation(image_processor, **augmentations)
        keys, store = named or image_keys(data, image_folder)
        self.images = ImageVariants(keys, store, image_processor, augment, variants, seed)
        self.batch_size, self.workers, self.max_broken_share = batch_size, workers, max_broken_share

    def write(self, shards: list[tuple[str, int, int]], show_progress: bool = False) -> BrokenSamples:
        """Write shards, each given as its path, the index of its first image, and the index after its last image."""
        ranges = {Path(path): range(start, stop) for path, start, stop in shards}
        sizes = self.batch_size, self.workers, self.max_broken_share
        return write_shards(self.model, self.images, ranges, *sizes, show_progress=show_progress)

    def __call__(self, shard: tuple[str, int, int]) -> dict:
        """Write a shard, unless it exists, as a Ray job. Return the numbers of images read and broken."""
        counts = self.write([] if Path(shard[0]).is_file() else [shard])
        return {"seen": counts.seen, "broken": counts.broken}


def write_shards(
    model: UniTokModel,
    images: ImageVariants,
    shards: dict[Path, range],
    batch_size: int,
    workers: int,
    max_broken_share: float,
    show_progress: bool,
) -> BrokenSamples:
    """Encode the images of each shard, and write the shards. No batch crosses a shard's boundary.

    Returns:
        The numbers of images and of broken images so far.

    Raises:
        ValueError: too many images are broken; the current shard is not written.
    """
    batches = {path: [of[i : i + batch_size] for i in range(0, len(of), batch_size)] for path, of in shards.items()}
    loader = DataLoader(
        images,
        batch_sampler=[batch for of_shard in batches.values() for batch in of_shard],
        num_workers=workers,
        collate_fn=collate,
    )
    loaded = iter(loader)
    total = sum(map(len, shards.values()))
    broken = BrokenSamples(max_broken_share, minimum=min(100, total))
    with tqdm(total=total, unit="image", disable=not show_progress) as bar:
        for path, of_shard in batches.items():
            codes = {}
            for batch in of_shard:
                codes |= encode(model, next(loaded), broken)
                bar.update(len(batch))
            write_shard(path, codes)
    return broken


@torch.inference_mode()
def encode(model: UniTokModel, batch: Batch, broken: BrokenSamples) -> dict[str, torch.Tensor]:
    """Encode images to codes (variants, K, L), on the CPU, by key. Broken images are counted and left out."""
    for key, error in batch.errors.items():
        broken.count_broken(key, error)
    for _ in batch.keys:
        broken.count()
    if not batch.keys:
        return {}
    views = batch.pixel_values.to(model.device).unbind(1)
    codes = torch.stack([model.encode(pixels) for pixels in views], dim=1)
    return dict(zip(batch.keys, codes.cpu()))


if __name__ == "__main__":
    one_line_errors("Interrupted. Whole shards are kept; the same command goes on with the others.")(app)()
