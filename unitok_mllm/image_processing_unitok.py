"""The image processors: images to `pixel_values` in [-1, 1], and back.

Two backends differ only in their resize: `UniTokImageProcessor` (torchvision, tensors on any device) and
`UniTokImageProcessorPil` (Pillow and numpy, the exact filters of the released models). Both have the three modes of
the released models (UniTok, arXiv 2502.20321):

- `understand`: pad to the target's aspect ratio, centred, then bilinear resize. The whole picture stays visible.
- `reconstruct`: LANCZOS resize to cover 1.125 times the target (288 for 256), then centre crop.
- `classify`: bicubic resize to cover the target, then centre crop.
"""

import math
import os
import stat
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from io import BytesIO
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs


# mode -> (filter, how far the resized picture exceeds the target before the centre crop; None: pad instead of crop)
MODES = {
    "understand": (PILImageResampling.BILINEAR, None),
    "reconstruct": (PILImageResampling.LANCZOS, 1.125),
    "classify": (PILImageResampling.BICUBIC, 1.0),
}
PAD_COLOR = (122, 116, 104)
CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
MAX_PIXELS = 2**28  # of a padded or resized picture: a very elongated one would otherwise exhaust the memory
RANGE_TOLERANCE = 1e-3  # rounding noise allowed around [0, 1] and [0, 255] in float arrays
URL_TIMEOUT = 30  # seconds
URL_BYTES = 2**28  # largest file that a URL may return
PROGRAM_FORMATS = ("EPS",)  # Pillow passes these to another program, which is unsafe for pictures of unknown origin
# what Pillow raises on missing, truncated or corrupt data
DECODE_ERRORS = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError),
    *(AssertionError, RuntimeError, MemoryError, struct.error, zlib.error),
)


def load_image(
    source: str | os.PathLike | bytes | Image.Image,
    name: str = "",
    *,
    formats: Sequence[str] | None = None,
    max_side: int | None = None,
) -> Image.Image:
    """Read an image as an upright 8-bit RGB picture. The package opens every external picture with this function.

    The EXIF orientation is applied and removed, so that a second call changes nothing. Transparency is composited on
    white. 16-bit greyscale is scaled to 8 bits. The first frame of an animated file is read, and the current frame of a
    Pillow image.

    Args:
        source: a local path, an http(s) or `data:image/` URL, the bytes of a file, or a Pillow image of any mode (not
            changed).
        name: name for error messages; by default the path, or the mode and size of an image without one.
        formats: the formats to read, by Pillow's names; None for all that Pillow reads without another program.
        max_side: shrink a picture whose longer side exceeds it, in pixels, as early as its format allows, to save
            memory. A Pillow image is not shrunk.

    Returns:
        A Pillow image of mode RGB.

    Raises:
        ValueError: the source is missing, truncated, empty, not an image, not a regular file (a FIFO, a device), of a
            format that needs another program (EPS), or beyond Pillow's decompression-bomb limit. The message names
            it.
    """
    if isinstance(source, Image.Image):
        has_file = isinstance(source, ImageFile.ImageFile) and source.filename
        name = name or (source.filename if has_file else f"{source.mode} image of {source.width}x{source.height}")
        with _named_errors(name):
            picture = _to_upright_rgb(source)
    else:
        name = name or (f"{len(source)} bytes" if isinstance(source, bytes) else str(source)[:200])
        with _named_errors(name), Image.open(_file_of(source), formats=_formats(formats)) as image:
            picture = _to_upright_rgb(_shrink(image, max_side) if max_side else image)
    if not (picture.width and picture.height):
        raise ValueError(f"expected a non-empty array of pixels, got {name!r}, {picture.width}x{picture.height}")
    return picture


def picture_size(source: str | os.PathLike | bytes, *, formats: Sequence[str] | None = None) -> tuple[int, int]:
    """Read width and height from a file's header, without decoding. Arguments and errors are those of `load_image`."""
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)[:200]
    with _named_errors(name), Image.open(_file_of(source), formats=_formats(formats)) as image:
        return image.size


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (*DECODE_ERRORS, Image.DecompressionBombError, HTTPException) as error:
        raise ValueError(f"cannot read image {name!r}: {error or type(error).__name__}") from error


def _shrink(image: Image.Image, max_side: int) -> Image.Image:
    """Shrink an opened picture to a longer side of `max_side`; a JPEG is decoded no larger than needed."""
    if max(image.size) <= max_side:
        return image
    if image.mode in ("1", "P", "PA") or "transparency" in image.info:  # averaging palette indices is meaningless
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if image.mode.startswith("I;16"):  # which Pillow 12 cannot resize
        image = image.convert("I")
    image.thumbnail((max_side, max_side))
    return image


def _file_of(source: str | os.PathLike | bytes) -> str | bytes | BytesIO:
    """Return what Pillow can open: a path, or the bytes of a URL or a file."""
    if isinstance(source, bytes):
        return BytesIO(source)
    path = os.fspath(source)
    if not str(path).startswith(("http://", "https://", "data:image/")):
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO would block forever
            raise ValueError("not a regular file")
        return path
    with urlopen(path, timeout=URL_TIMEOUT) as response:
        data = response.read(URL_BYTES + 1)
    if len(data) > URL_BYTES:
        raise ValueError(f"more than {URL_BYTES} bytes")
    return BytesIO(data)


def _formats(wanted: Sequence[str] | None) -> list[str]:
    """List the formats that this version of Pillow reads without another program, or those of them that are wanted."""
    Image.init()
    return [name for name in Image.ID if name not in PROGRAM_FORMATS and (wanted is None or name in wanted)]


def _to_upright_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_to_8_bits(_check_range(np.asarray(image))))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _check_range(pixels: np.ndarray) -> np.ndarray:
    """Convert pixels of any real dtype to uint8 (0..255), or to float32 if they are floats in [0, 1].

    uint16, and other integers above 255, are read as 16-bit. Other floats are read as 0..255 and rounded.
    """
    if pixels.dtype.kind not in "uif" or pixels.size == 0:
        raise ValueError(f"expected a non-empty array of integers or floats, got {pixels.dtype} {pixels.shape}")
    if pixels.dtype == np.uint8:
        return pixels
    low, high = float(pixels.min()), float(pixels.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("pixel values contain NaN or infinity")
    is_float = pixels.dtype.kind == "f"
    is_16_bit = pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2 or not is_float and high > 255
    tolerance = RANGE_TOLERANCE if is_float else 0
    if low < -tolerance or high > (65535 if is_16_bit else 255) + tolerance:
        raise ValueError(
            f"pixel values span [{low:g}, {high:g}], expected [0, 1] or [0, 255] for floats, "
            "[0, 255] or [0, 65535] for integers"
        )
    if is_float and high <= 1 + tolerance:
        return pixels.astype(np.float32).clip(0, 1)
    return np.round(pixels / 257 if is_16_bit else pixels).clip(0, 255).astype(np.uint8)


def _to_8_bits(image: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """Convert uint8, or floats in [0, 1], to uint8."""
    if image.dtype in (np.uint8, torch.uint8):
        return image
    levels = (image * 255).round()
    return levels.to(torch.uint8) if isinstance(levels, torch.Tensor) else levels.astype(np.uint8)


def _pad(image: np.ndarray | torch.Tensor, height: int, width: int) -> np.ndarray | torch.Tensor:
    """Centre `image`, uint8 (3, H, W), on a (3, height, width) canvas of the pad colour."""
    shape = (3, height, width)
    canvas = image.new_empty(shape) if isinstance(image, torch.Tensor) else np.empty(shape, image.dtype)
    for channel, level in zip(canvas, PAD_COLOR, strict=True):
        channel[:] = level
    top, left = (height - image.shape[1]) // 2, (width - image.shape[2]) // 2
    canvas[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return canvas


def _flatten(images: Any) -> list:
    is_batch = isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim > 3
    if is_batch or isinstance(images, (list, tuple)):
        return [image for group in images for image in _flatten(group)]
    return [images]


class UniTokImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    mode (`str`, defaults to `"understand"`): `"understand"`, `"reconstruct"` or `"classify"`.
    patch_size (`int`, defaults to 16): height and width of `size` must be multiples of it.
    """

    mode: str
    patch_size: int


class UniTokImageProcessorMixin:
    """Common part of the two backends. The module's docstring explains the modes.

    A call takes one image, or any nesting of lists, tuples and 4-D batches, of mixed sizes. An image is a path, a URL,
    the bytes of a file, a Pillow image, an array or a tensor: (H, W), (C, H, W) or (H, W, C) with 1, 3 or 4 channels
    (C first if both readings fit). Values are integers in 0..255, 16-bit integers, floats in [0, 1] (never rescaled)
    or floats in 0..255. All are rounded to the 8 bits of a picture file, so that a picture gives the same values in
    any form.

    It returns a `BatchFeature` with `pixel_values` (B, 3, height, width), float32 in [-1, 1].

    The mode decides between padding and cropping. `resample` overrides its filter. `do_rescale=False` keeps values in
    0..255. `do_resize=False` keeps the picture's own size.

    Attributes:
        mode: "understand", "reconstruct" or "classify".
        size: height and width of the result, in pixels, multiples of `patch_size`.
        patch_size: the tokenizer's stride, in pixels.

    Raises:
        ValueError: an unknown mode; a size that is not a multiple of `patch_size`; no image; an image that cannot be
            read, or has NaN, infinite or out-of-range values (the message gives its position in the batch); a picture
            too elongated to be padded or to cover the target.
    """

    valid_kwargs = UniTokImageProcessorKwargs
    mode = "understand"
    size = SizeDict(height=256, width=256)
    patch_size = 16
    do_resize = True
    do_rescale = True
    do_normalize = True
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)
    return_tensors = "pt"

    @classmethod
    def get_image_processor_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """Read a folder's settings, as the library does.

        Raises:
            ValueError: the folder has another class of image processor.
        """
        settings, kwargs = super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
        kind = settings.get("image_processor_type", cls.__name__)
        if not kind.startswith("UniTokImageProcessor"):
            raise ValueError(f"{pretrained_model_name_or_path} holds a {kind}, not a UniTokImageProcessor.")
        return settings, kwargs

    def fetch_images(self, images: Any) -> Any:
        """Replace every path, URL and file's bytes in `images` by the upright RGB picture, keeping the nesting."""
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image) for image in images]
        return load_image(images) if isinstance(images, (str, os.PathLike, bytes)) else images

    def post_process(self, pixels: torch.Tensor) -> list[Image.Image]:
        """Turn decoded `pixels` (B, 3, H, W), any float dtype in [-1, 1] (clamped), into B Pillow RGB images.

        Raises:
            ValueError: `pixels` has another shape, an integer dtype or NaN values.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            raise ValueError(f"expected floats of shape (B, 3, H, W), got {pixels.dtype} {tuple(pixels.shape)}")
        if pixels.isnan().any():
            raise ValueError("pixels contain NaN")
        levels = ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return [Image.fromarray(image) for image in levels.permute(0, 2, 3, 1).cpu().numpy()]

    def _standardize_kwargs(self, mode: str, patch_size: int, **kwargs) -> dict:
        kwargs = super()._standardize_kwargs(**kwargs)
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}, expected one of {', '.join(MODES)}")
        height, width = kwargs["size"].height or 0, kwargs["size"].width or 0
        if min(height, width) < 1 or height % patch_size or width % patch_size:
            raise ValueError(f"size {dict(kwargs['size'])} must be a height and a width divisible by {patch_size}")
        return {"mode": mode, "patch_size": patch_size, **kwargs}

    def _validate_preprocess_kwargs(self, mode: str, resample: PILImageResampling | None = None, **kwargs):
        # the library requires a filter; None here means the mode's own
        super()._validate_preprocess_kwargs(resample=MODES[mode][0] if resample is None else resample, **kwargs)

    def _prepare_image_like_inputs(self, images: Any, *args, **kwargs) -> list[np.ndarray] | list[torch.Tensor]:
        images = _flatten(images)
        if not images:
            raise ValueError("expected at least one image, got an empty list")
        prepared = []
        for position, image in enumerate(images):
            try:
                prepared.append(self.process_image(image, **kwargs))
            except ValueError as error:
                raise ValueError(f"images[{position}]: {error}") from error
        return prepared

    def process_image(self, image: Any, input_data_format: str | None = None, **kwargs) -> np.ndarray:
        """Copy one raw image to RGB (3, H, W), uint8 in 0..255 or float32 in [0, 1]."""
        if isinstance(image, torch.Tensor):
            image = image.detach().cpu()
            image = (image.float() if image.is_floating_point() else image).numpy()
        elif not isinstance(image, np.ndarray):
            image, input_data_format = np.asarray(load_image(image)), "channels_last"

        pixels = image[None] if image.ndim == 2 else image
        if image.ndim == 3:
            layout = input_data_format or ("channels_first" if image.shape[0] in CHANNELS else "channels_last")
            pixels = image if layout == "channels_first" else np.moveaxis(image, -1, 0)
        if pixels.ndim != 3 or pixels.shape[0] not in CHANNELS:
            raise ValueError(f"expected (H, W), (C, H, W) or (H, W, C) with C in {CHANNELS}, got {image.shape}")

        pixels = _check_range(pixels)
        if pixels.shape[0] == 4:  # composite on white
            white = 255 if pixels.dtype == np.uint8 else 1
            blended = white - pixels[3:] / np.float32(white) * (white - pixels[:3])
            pixels = np.round(blended).astype(np.uint8) if white == 255 else blended
        return np.array(np.broadcast_to(pixels, (3, *pixels.shape[1:])), order="C")

    def _fit(self, image, mode: str, size: SizeDict, resample: PILImageResampling | None):
        """Resize (3, H, W) to (3, size.height, size.width), by the mode's rule."""
        (height, width), (default_resample, zoom) = image.shape[1:], MODES[mode]
        resample = default_resample if resample is None else resample
        if zoom is None:  # the smallest canvas of the target's aspect ratio that holds the picture
            rows = max(height, round(width * size.height / size.width))
            columns = max(width, round(height * size.width / size.height))
        else:  # the smallest picture of the source's aspect ratio that covers the zoomed target
            cover_height, cover_width = round(size.height * zoom), round(size.width * zoom)
            rows = max(cover_height, cover_width * height // width)
            columns = max(cover_width, cover_height * width // height)
        if rows * columns > MAX_PIXELS:
            raise ValueError(f"a {width}x{height} picture is too elongated: {mode} would make it {columns}x{rows}")

        if zoom is None:
            return self.resize(_pad(image, rows, columns), size=size, resample=resample)
        image = self.resize(image, size=SizeDict(height=rows, width=columns), resample=resample)
        top, left = round((rows - size.height) / 2), round((columns - size.width) / 2)
        return image[:, top : top + size.height, left : left + size.width]

    def _preprocess(
        self,
        images: list[np.ndarray] | list[torch.Tensor],
        mode: str,
        size: SizeDict,
        do_resize: bool,
        resample: PILImageResampling | None,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | list[float],
        image_std: float | list[float],
        return_tensors: str | None,
        **kwargs,
    ) -> BatchFeature:
        pixel_values = []
        for image in images:
            is_unit_range = image.dtype not in (np.uint8, torch.uint8)
            image = _to_8_bits(image)
            if do_resize:
                image = self._fit(image, mode, size, resample)
            unscaled_factor = rescale_factor if do_rescale else 1.0
            image = self.rescale(image, 1 / 255 if is_unit_range else unscaled_factor)  # float32
            pixel_values.append(self.normalize(image, image_mean, image_std) if do_normalize else image)
        return BatchFeature(data={"pixel_values": pixel_values}, tensor_type=return_tensors)


class UniTokImageProcessor(UniTokImageProcessorMixin, TorchvisionBackend):
    """Image processor with the torchvision backend. On a GPU, LANCZOS becomes bicubic.

    It computes on `device`, by default the device of a tensor. Inputs, output and errors: `UniTokImageProcessorMixin`.

    Example:
        >>> image_processor = UniTokImageProcessor(mode="reconstruct", size={"height": 256, "width": 256})
        >>> image_processor(["a.png", "b.png"])["pixel_values"].shape
        torch.Size([2, 3, 256, 256])
    """

    def process_image(self, image: Any, device: torch.device | str | None = None, **kwargs) -> torch.Tensor:
        """Copy one raw image to RGB (3, H, W), uint8 in 0..255 or float32 in [0, 1], on `device`."""
        if device is None and isinstance(image, torch.Tensor):
            device = image.device
        return torch.from_numpy(super().process_image(image, **kwargs)).to(device)


class UniTokImageProcessorPil(UniTokImageProcessorMixin, PilBackend):
    """Image processor with the Pillow backend, on the CPU. It equals the released model's preprocessing exactly.

    Inputs, output and errors: `UniTokImageProcessorMixin`.
    """


__all__ = ["UniTokImageProcessor", "UniTokImageProcessorPil", "load_image"]
