"""Odd and malformed images, the same ones for the same seed, and what the image processor makes of them.

    python tests/mutations.py 1000        # what became of the first 1000, as JSON

Every number stands for one image, whatever came before it. It is a small crop of a real photograph or a real drawing,
in some format and mode, changed in one of the ways of `KINDS`, and comes as a path, as bytes or as a Pillow image.
"""

import faulthandler
import io
import json
import os
import resource
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import easy_vqa
import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from sklearn.datasets import load_sample_image

from unitok_mllm import UniTokImageProcessor


SIZE = 48
MODES = ("understand", "reconstruct", "classify")
SIDES = (0, 1, 2, 255, 2**15 - 1, 2**15, 2**16 - 1, 2**16, 2**24, 2**31 - 1, 2**32 - 1)
SHAPES = ((0, 5), (5, 0), (0, 0), (1, 1), (1, 300), (300, 1), (3, 1001))
LONGEST = ((1, 60_000), (60_000, 1))  # as long as can be read, and slow


@cache
def pictures() -> dict[str, Image.Image]:
    """Real pictures, in every mode that Pillow has a conversion to."""
    photo = Image.fromarray(load_sample_image("china.jpg")).resize((80, 53))
    folder = Path(easy_vqa.__file__).parent / "data/test/images"
    drawing = Image.open(folder / "7.png").convert("RGBA")
    drawing.putalpha(ImageOps.invert(drawing.convert("L")))
    grey = np.asarray(photo.convert("L"))
    lab = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    rgb_to_lab = ImageCms.buildTransform(lab[1], lab[0], "RGB", "LAB")
    made = {mode: photo.convert(mode) for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "RGBX", "I", "F")}
    made |= {mode: drawing.convert(mode) for mode in ("RGBA", "LA", "RGBa", "PA")}
    made["La"] = made["LA"].convert("La")
    made["LAB"] = ImageCms.applyTransform(photo, rgb_to_lab)
    made["I;16"] = Image.fromarray(grey.astype(np.uint16) * 257)
    made["P, transparent"] = drawing.convert("P")
    made["P, transparent"].info["transparency"] = 3
    return made


@cache
def files() -> dict[str, bytes]:
    """The pictures as files: every format with every mode that it takes, animated ones, and one with an orientation."""
    made, frames = {}, [pictures()[mode].convert("RGB") for mode in ("1", "L", "P")]
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"turned": {"exif": exif}, "animated": {"save_all": True, "append_images": frames}, "plain": {}}
    extra = {"TIFF": {"lzw": {"compression": "tiff_lzw"}}, "JPEG": {"progressive": {"progressive": True}}}
    extra["WEBP"] = {"lossless": {"lossless": True}}
    for file_format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        for mode, picture in pictures().items():
            for name, how in {**options, **extra.get(file_format, {})}.items():
                if name in ("animated", "turned") and mode != "RGB":
                    continue
                file = io.BytesIO()
                try:
                    picture.save(file, file_format, **how)
                    Image.open(file).load()
                except (OSError, ValueError, KeyError):
                    continue  # no such mode or second frame, or not to be read back (Pillow 12: YCbCr in TIFF)
                made[f"{file_format} {mode} {name}"] = file.getvalue()
    return made


def png(width: int, height: int, rows: bytes, depth: int = 1, color: int = 0) -> bytes:
    """A PNG file with this header and these (compressed) rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@cache
def bombs() -> list[bytes]:
    """A few kilobytes each that claim, or hold, hundreds of millions of pixels; the last one is let through."""
    white = io.BytesIO()
    Image.new("1", (30_000, 30_000), 1).save(white, "TIFF", compression="group4")
    gif = io.BytesIO()
    Image.new("L", (1, 1)).save(gif, "GIF")
    huge_gif = gif.getvalue()[:6] + struct.pack("<HH", 65_535, 65_535) + gif.getvalue()[10:]
    sides = ((60_000, 60_000), (2**31 - 1, 2**31 - 1), (14_000, 13_000), (12_000, 12_000))
    packed = zlib.compress(bytes((14_000 // 8 + 1) * 13_000), 9)
    return [white.getvalue(), huge_gif, *(png(*side, packed) for side in sides)]


def with_sides(data: bytes, rng: np.random.Generator) -> bytes:
    """The file with other sides in its header."""
    width, height = (int(rng.choice(SIDES)) for _ in range(2))
    data = bytearray(data)
    if data[1:4] == b"PNG":
        struct.pack_into(">II", data, 16, width, height)
        struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    elif data[:3] == b"GIF":
        struct.pack_into("<HH", data, 6, width & 0xFFFF, height & 0xFFFF)
    elif data[:2] == b"BM":
        struct.pack_into("<II", data, 18, width, height)
    elif data[:2] == b"\xff\xd8":
        start = next(i for i in (data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) if i >= 0)
        struct.pack_into(">HH", data, start + 5, height & 0xFFFF, width & 0xFFFF)
    elif data[:2] == b"II":
        (directory,) = struct.unpack_from("<I", data, 4)
        (count,) = struct.unpack_from("<H", data, directory)
        for place in range(directory + 2, directory + 2 + 12 * count, 12):
            (tag,) = struct.unpack_from("<H", data, place)
            if tag in (256, 257):
                struct.pack_into("<HII", data, place + 2, 4, 1, width if tag == 256 else height)
    else:  # WebP: three kinds of headers, at one place
        struct.pack_into("<II", data, 24, width, height)
    return bytes(data)


def truncated(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: rng.integers(len(data))]


def flipped(data: bytes, rng: np.random.Generator) -> bytes:
    """Up to 16 bytes are others, half of the time all in the first 128."""
    data = bytearray(data)
    last = len(data) if rng.random() < 0.5 else min(128, len(data))
    for place in rng.integers(last, size=rng.integers(1, 17)):
        data[place] = rng.integers(256)
    return bytes(data)


def spliced(data: bytes, rng: np.random.Generator) -> bytes:
    """A piece of another file lies in this one, or in place of a piece, or a piece comes twice or not at all."""
    other = list(files().values())[rng.integers(len(files()))]
    other = data if rng.random() < 0.3 else other
    start, end = sorted(rng.integers(len(data) + 1, size=2))
    first, last = sorted(rng.integers(len(other) + 1, size=2))
    return data[:start] + other[first:last] + data[end if rng.random() < 0.5 else start :]


def odd_picture(rng: np.random.Generator) -> Image.Image:
    """A Pillow image of any mode, and often of an odd shape or with an orientation."""
    name, picture = list(pictures().items())[rng.integers(len(pictures()))]
    picture = picture.copy()
    if rng.random() < 0.5 and name != "LAB":
        shapes = LONGEST if rng.random() < 0.02 else SHAPES
        picture = Image.new(picture.mode, shapes[rng.integers(len(shapes))])
    if rng.random() < 0.3:
        picture.getexif()[0x0112] = int(rng.integers(12))
    return picture


KINDS: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    "intact": lambda data, rng: data,
    "truncated": truncated,
    "bytes changed": flipped,
    "spliced": spliced,
    "sides in the header": with_sides,
    "decompression bomb": lambda data, rng: bombs()[rng.integers(len(bombs()) - 1)],
}
SHARES = {
    "intact": 0.1,
    "truncated": 0.22,
    "bytes changed": 0.3,
    "spliced": 0.2,
    "sides in the header": 0.06,
    "decompression bomb": 0.02,
    "mode or shape": 0.1,
}
LET_THROUGH = 2500  # one in so many is as large a file as Pillow opens without complaint


def image(number: int) -> tuple[str, bytes | Image.Image]:
    """The kind, and the file's content or the Pillow image, of a number."""
    rng = np.random.default_rng(number)
    if number % LET_THROUGH == 999:
        return "decompression bomb", bombs()[-1]
    kind = str(rng.choice(list(SHARES), p=list(SHARES.values())))
    if kind == "mode or shape":
        return kind, odd_picture(rng)
    data = list(files().values())[rng.integers(len(files()))]
    return kind, KINDS[kind](data, rng)


def source(number: int, made: bytes | Image.Image, folder: Path) -> tuple[str | bytes | Image.Image, str]:
    """The image as a path, as bytes or as a Pillow image that nobody has read yet, and what errors must name."""
    if isinstance(made, Image.Image):
        return made, f"{made.width}x{made.height}"
    if number % 3 == 0:
        path = folder / f"number-{number % 8}.img"
        path.write_bytes(made)
        return str(path), path.name
    if number % 3 == 1:
        return made, f"{len(made)} bytes"
    try:
        opened = Image.open(io.BytesIO(made))
    except Exception:  # whoever opens an image alone gets Pillow's errors
        return made, f"{len(made)} bytes"
    return opened, f"{opened.width}x{opened.height}"


def peak_memory() -> int:
    """The most bytes that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check(count: int, first: int = 0) -> dict:
    """What became of the images of `count` numbers: by kind, how many were `read` and `refused`, the slowest's seconds
    and number, the growth of the most memory held (bytes), and up to 20 of what should not have been."""
    processors = {mode: UniTokImageProcessor(size={"height": SIZE, "width": SIZE}, mode=mode) for mode in MODES}
    counts, wrong, slowest, folder = Counter(), [], (0.0, -1), Path(tempfile.mkdtemp())
    files(), bombs()
    before = peak_memory()
    for number in range(first, first + count):
        kind, made = image(number)
        given, name = source(number, made, folder)
        os.write(2, f"{number} {kind}\n".encode())  # where a crash happens
        start = time.perf_counter()
        try:
            pixels = processors[MODES[number // 3 % 3]](given)["pixel_values"]
            outcome = "read"
            if pixels.shape != (1, 3, SIZE, SIZE) or not (pixels.abs() <= 1).all():
                wrong.append(f"{number} ({kind}): {tuple(pixels.shape)} in [{pixels.min()}, {pixels.max()}]")
        except Exception as error:
            outcome = "refused"
            is_named = any(words in str(error) for words in ("cannot read image", "non-empty array")) and name in str(
                error
            )
            is_ours = is_named or "too elongated" in str(error)
            if type(error) is not ValueError or not is_ours or "\n" in str(error):
                wrong.append(f"{number} ({kind}): {type(error).__name__}: {error}")
        slowest = max(slowest, (time.perf_counter() - start, number))
        counts[kind, outcome] += 1
    by_kind = {kind: {o: counts[kind, o] for o in ("read", "refused")} for kind in SHARES}
    return {
        "counts": by_kind,
        "slowest": slowest,
        "memory": peak_memory() - before,
        "wrong": wrong[:20],
        "num_wrong": len(wrong),
    }


if __name__ == "__main__":
    faulthandler.enable()
    warnings.simplefilter("ignore")  # Pillow's, about what it has mended
    torch.set_num_threads(1)
    print(json.dumps(check(*map(int, sys.argv[1:]))))
