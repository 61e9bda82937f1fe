"""The image processors: both backends, every mode, hostile pictures."""

import base64
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers import AutoImageProcessor, PreTrainedConfig
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from training import files
from training.files import UnusableSample, decode_image
from unitok_mllm import image_processing_unitok
from unitok_mllm.image_processing_unitok import UniTokImageProcessor, UniTokImageProcessorPil, load_image


ROOT = Path(__file__).parents[1]
GIB = 2**30
FIXTURE = Path(__file__).parent / "fixtures" / "preprocess_china.npz"
MODES = ("understand", "reconstruct", "classify")
TURNS = {  # EXIF orientation -> what a camera did to the upright picture
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.fixture(params=[UniTokImageProcessor, UniTokImageProcessorPil], ids=["torchvision", "pil"])
def backend(request):
    return request.param


def levels(pixel_values):
    """[-1, 1] -> grey levels 0..255."""
    return np.round((np.asarray(pixel_values) + 1) * 127.5).astype(int)


def as_is(backend, image, **kwargs):
    """The grey levels (H, W, 3) that a 64x64 picture enters with: this mode neither resizes nor crops it."""
    return levels(backend(mode="classify", size=64)(image, **kwargs).pixel_values)[0].transpose(1, 2, 0)


def quadrants():
    """An upright 64x64 picture that no turn or flip leaves unchanged."""
    pixels = np.empty((64, 64, 3), np.uint8)
    pixels[:32, :32], pixels[:32, 32:], pixels[32:, :32], pixels[32:, 32:] = (200, 30, 40), (30, 180, 60), 25, 230
    return pixels


def ramp():
    """0..255 over a 64x64 grey picture."""
    return np.arange(64 * 64).reshape(64, 64) // 16


@pytest.fixture(scope="module")
def china():
    return load_sample_image("china.jpg").copy()


# --- the three modes ---


@pytest.mark.parametrize("mode", MODES)
def test_agrees_with_the_reference_preprocessing(backend, mode, china):
    expected = np.load(FIXTURE)[mode].astype(int)
    pixel_values = backend(mode=mode)(Image.fromarray(china)).pixel_values
    assert pixel_values.dtype == torch.float32 and pixel_values.shape == (1, 3, 256, 256)
    assert pixel_values.abs().max() <= 1
    error = np.abs(levels(pixel_values)[0, :, ::4, ::4] - expected)
    assert error.max() <= 1 if backend is UniTokImageProcessorPil else error.mean() <= 2


def test_mode_of_the_call_overrides_the_constructor(backend, china):
    processor = backend(mode="classify", size=64)
    outputs = {mode: processor(china, mode=mode).pixel_values for mode in MODES}
    assert torch.equal(processor(china).pixel_values, outputs["classify"])
    assert torch.equal(backend(size=64)(china).pixel_values, outputs["understand"])
    assert not torch.equal(outputs["classify"], outputs["reconstruct"])


def test_unknown_mode_and_impossible_size_are_named(backend, china):
    message = "unknown mode 'sharpen', expected one of understand, reconstruct, classify"
    for attempt in (lambda: backend(mode="sharpen"), lambda: backend()(china, mode="sharpen")):
        with pytest.raises(ValueError, match=message):
            attempt()
    for attempt in (lambda: backend(size={"height": 256, "width": 250}), lambda: backend()(china, size=(256, 250))):
        with pytest.raises(ValueError, match=r"'width': 250\} must be a height and a width divisible by 16"):
            attempt()
    with pytest.raises(ValueError, match="'shortest_edge': 256"):
        backend(size={"shortest_edge": 256})
    assert backend(size=56, patch_size=14)(china).pixel_values.shape == (1, 3, 56, 56)


def test_understand_pads_to_the_target_aspect_ratio(backend):
    white = np.full((64, 64, 3), 255, np.uint8)
    wide = levels(backend(size=64)(white[:32]).pixel_values)[0]
    assert (wide[:, 0].T == (122, 116, 104)).all() and (wide[:, -1].T == (122, 116, 104)).all()
    assert (wide[:, 17:47] == 255).all()
    on_wide_target = levels(backend(size={"height": 32, "width": 64})(white).pixel_values)[0]
    assert (on_wide_target[:, :, 0].T == (122, 116, 104)).all()
    assert (on_wide_target[:, :, 17:47] == 255).all()


# a 450x300 picture covers the zoomed 64x32 target as soon as its width does: 72 and 72 * 300 // 450, 64 and 42
@pytest.mark.parametrize(
    ("mode", "resample", "width", "height"),
    [("reconstruct", Image.Resampling.LANCZOS, 72, 48), ("classify", Image.Resampling.BICUBIC, 64, 42)],
)
def test_cover_and_crop_on_a_non_square_target(backend, mode, resample, width, height, china):
    picture = Image.fromarray(china[:300, :450])
    left, top = (width - 64) // 2, (height - 32) // 2
    expected = np.asarray(picture.resize((width, height), resample).crop((left, top, left + 64, top + 32)))
    got = levels(backend(mode=mode, size={"height": 32, "width": 64})(picture).pixel_values)[0].transpose(1, 2, 0)
    assert np.abs(got - expected).max() <= (0 if backend is UniTokImageProcessorPil else 2)


@pytest.mark.attack
def test_too_elongated_a_picture_is_refused_before_it_fills_the_memory(backend):
    strip = Image.new("RGB", (60_000, 1))
    for mode in MODES:
        with pytest.raises(ValueError, match=f"60000x1 picture is too elongated: {mode} would make it"):
            backend(mode=mode)(strip)


def test_options_are_honoured(backend, china):
    processor = backend(mode="classify", size=64)
    nearest = processor(china, resample=Image.Resampling.NEAREST).pixel_values
    assert set(np.unique(levels(nearest))) <= set(np.unique(china))
    assert not torch.equal(nearest, processor(china).pixel_values)
    untouched = processor(china, do_resize=False, do_normalize=False).pixel_values[0]
    assert torch.allclose(untouched * 255, torch.from_numpy(china).permute(2, 0, 1).float(), atol=1e-3)
    as_numpy = processor(china, return_tensors="np").pixel_values
    assert isinstance(as_numpy, np.ndarray) and as_numpy.dtype == np.float32
    assert np.array_equal(as_numpy, processor(china).pixel_values.numpy())


# --- values and containers ---


@pytest.mark.parametrize("mode", MODES)
def test_every_container_of_a_picture_gives_the_same_values(backend, mode, china):
    processor = backend(mode=mode, size=64)
    expected = processor(Image.fromarray(china)).pixel_values
    tensor = torch.from_numpy(china).permute(2, 0, 1)
    for image in (
        *(china, china.transpose(2, 0, 1), china[::-1][::-1], tensor, tensor.permute(1, 2, 0), tensor.long()),
        *(china / 255, (china / 255).astype(np.float32), tensor / 255, tensor.float(), china.astype(np.float64)),
        *(china.astype(np.uint16) * 257, china.astype(np.int32) * 257, china / 255 * 1.0005),
    ):
        assert torch.equal(processor(image).pixel_values, expected)
    assert torch.equal(processor(china[None].repeat(2, 0)).pixel_values, expected.repeat(2, 1, 1, 1))


@pytest.mark.parametrize("do_rescale", [True, False])
def test_unit_range_floats_are_never_rescaled(backend, do_rescale):
    processor = backend(size=64, do_rescale=do_rescale)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        pixel_values = processor(torch.full((3, 64, 64), 0.25, dtype=dtype)).pixel_values
        assert torch.allclose(pixel_values, torch.tensor(-0.5), atol=1 / 255)
    assert torch.equal(processor(np.zeros((64, 64, 3))).pixel_values, -torch.ones(1, 3, 64, 64))
    assert torch.equal(processor(np.ones((64, 64, 3))).pixel_values, torch.ones(1, 3, 64, 64))


def test_do_rescale_false_keeps_the_values(backend):
    image = np.full((64, 64, 3), 200, np.uint8)
    processor = backend(size=64, do_rescale=False)
    for values in (image, image.astype(np.float32)):
        assert (processor(values, do_normalize=False).pixel_values == 200).all()
        assert (processor(values).pixel_values == 399).all()  # (200 - 0.5) / 0.5


def test_a_black_8_bit_picture_is_not_taken_for_unit_range(backend):
    assert torch.allclose(backend(size=64)(np.ones((64, 64, 3), np.uint8)).pixel_values, torch.tensor(2 / 255 - 1))


def test_mixed_batches_keep_their_order(backend, tmp_path):
    def grey(level):
        return np.full((level, 40, 3), level, np.uint8)  # every picture has its own size

    Image.fromarray(grey(20)).save(tmp_path / "a.png")
    images = [str(tmp_path / "a.png"), Image.fromarray(grey(30)), [grey(40), torch.from_numpy(grey(50))]]
    images.append(np.full((2, 3, 64, 48), 60, np.uint8))  # a batch within the list
    images.append(np.full((64, 48), 70, np.uint8))
    pixel_values = backend(mode="classify", size=64)(images).pixel_values
    assert levels(pixel_values)[:, 1, 32, 32].tolist() == [20, 30, 40, 50, 60, 60, 70]


def test_array_layouts(backend):
    grey = ramp().astype(np.uint8)
    for image in (grey, grey[None], grey[..., None]):
        assert (as_is(backend, image) == grey[..., None]).all()
    ambiguous = np.stack([np.full((3, 64), level, np.uint8) for level in (0, 100, 250)], axis=-1)[:, :3]  # (3, 3, 3)
    processor = backend(mode="classify", size=64)
    assert (levels(processor(ambiguous, input_data_format="channels_last").pixel_values)[0, 1] == 100).all()
    assert (levels(processor(ambiguous, input_data_format="channels_first").pixel_values)[0, :, 32, 0] == 0).all()


@pytest.mark.parametrize("scale", [1, 255])
def test_alpha_of_arrays_is_composited_on_white(backend, scale):
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[:32] = (200, 100, 0, 102)
    image = rgba if scale == 1 else rgba / 255
    expected = np.full((64, 64, 3), 255)
    expected[:32] = (233, 193, 153)  # 255 - 0.4 * (255 - colour)
    assert np.abs(as_is(backend, image) - expected).max() <= 1


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((8, 8, 3), math.nan), r"images\[1\]: pixel values contain NaN or infinity"),
        (torch.full((3, 8, 8), math.inf), r"images\[1\]: pixel values contain NaN or infinity"),
        (np.linspace(-1, 1, 192).reshape(8, 8, 3), r"images\[1\]: pixel values span \[-1, 1\], expected \[0, 1\]"),
        (np.full((8, 8, 3), 300.0), r"images\[1\]: pixel values span \[300, 300\]"),
        (np.full((8, 8, 3), 70_000), r"images\[1\]: pixel values span \[70000, 70000\]"),
        (np.zeros((8, 8, 5), np.uint8), r"images\[1\]: expected \(H, W\).*got \(8, 8, 5\)"),
        (np.zeros((8, 8, 3), bool), r"images\[1\]: expected a non-empty array of integers or floats, got bool"),
        (np.zeros((0, 8, 3), np.uint8), r"images\[1\]: expected a non-empty array"),
        (Image.new("RGB", (0, 8)), r"images\[1\]: expected a non-empty array"),
        (None, r"images\[1\]: cannot read image 'None': expected str.*not NoneType"),
    ],
)
@pytest.mark.attack
def test_bad_images_are_refused_with_their_position(backend, image, message):
    with pytest.raises(ValueError, match=message):
        backend(size=64)([np.zeros((8, 8, 3), np.uint8), image])


@pytest.mark.parametrize("images", [[], [[], []], np.zeros((0, 3, 8, 8))])
def test_no_image_is_an_error(backend, images):
    with pytest.raises(ValueError, match="expected at least one image, got an empty list"):
        backend()(images)


# --- files ---


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def as_shot(orientation):
    upright = Image.fromarray(quadrants())
    return upright if TURNS[orientation] is None else upright.transpose(TURNS[orientation])


def save_exif_jpeg(path):
    as_shot(6).save(path, "JPEG", exif=exif(6), quality=100, subsampling=0)
    return quadrants()


def save_exif_webp(path):
    as_shot(8).save(path, "WEBP", exif=exif(8), lossless=True)
    return quadrants()


def save_exif_tiff(path):
    as_shot(5).save(path, "TIFF", exif=exif(5))
    return quadrants()


def save_rgba(path):
    alpha = ramp()[..., None].astype(np.uint8)
    Image.fromarray(np.concatenate([quadrants(), alpha], axis=-1)).save(path, "PNG")
    return 255 - alpha / 255 * (255.0 - quadrants())


def save_grey_alpha(path):
    Image.merge("LA", [Image.new("L", (64, 64), 55), Image.fromarray(ramp().astype(np.uint8))]).save(path, "PNG")
    return np.repeat(255 - ramp()[..., None] / 255 * 200, 3, axis=-1)


def save_transparent_palette(path):
    index = np.zeros((64, 64), np.uint8)
    index[16:] = 1
    image = Image.frombytes("P", (64, 64), index.tobytes())
    image.putpalette([10, 200, 30, 250, 0, 120])
    image.save(path, "PNG", transparency=0)
    return np.where(index[..., None] == 0, 255, (250, 0, 120))


def save_palette(path):
    Image.fromarray(quadrants()).quantize(4).save(path, "PNG")
    return quadrants()


def save_cmyk(path):
    inks = np.concatenate([255 - quadrants(), np.zeros((64, 64, 1), np.uint8)], axis=-1)
    Image.frombytes("CMYK", (64, 64), inks.tobytes()).save(path, "TIFF")
    return quadrants()


def save_grey(path):
    Image.fromarray(ramp().astype(np.uint8)).save(path, "PNG")
    return np.repeat(ramp()[..., None], 3, axis=-1)


def save_one_bit(path):
    Image.fromarray(ramp() > 100).save(path, "PNG")
    return np.repeat(ramp()[..., None] > 100, 3, axis=-1) * 255


def save_16_bit(path):
    Image.fromarray((ramp() * 257).astype(np.uint16)).save(path, "PNG")
    return np.repeat(ramp()[..., None], 3, axis=-1)


def save_16_bit_in_32(path):
    Image.fromarray((ramp() * 257).astype(np.int32)).save(path, "TIFF")
    return np.repeat(ramp()[..., None], 3, axis=-1)


def save_float(path):
    Image.fromarray((ramp() / 255).astype(np.float32)).save(path, "TIFF")
    return np.repeat(ramp()[..., None], 3, axis=-1)


def animation(file_format, **options):
    def save(path):
        frames = [Image.new("RGB", (64, 64), color) for color in ((200, 30, 40), (30, 40, 200))]
        frames[0].save(path, file_format, save_all=True, append_images=frames[1:], duration=100, **options)
        return np.broadcast_to((200, 30, 40), (64, 64, 3))

    return save


FILES = {
    "exif.jpg": save_exif_jpeg,
    "exif.webp": save_exif_webp,
    "exif.tiff": save_exif_tiff,
    "rgba.png": save_rgba,
    "grey_alpha.png": save_grey_alpha,
    "transparent_palette.png": save_transparent_palette,
    "palette.png": save_palette,
    "cmyk.tiff": save_cmyk,
    "grey.png": save_grey,
    "one_bit.png": save_one_bit,
    "16_bit.png": save_16_bit,
    "16_bit_in_32.tiff": save_16_bit_in_32,
    "float.tiff": save_float,
    "animated.gif": animation("GIF"),
    "animated.png": animation("PNG"),
    "animated.webp": animation("WEBP", lossless=True),
}
ROUTES = {
    "str": str,
    "path": Path,
    "pil": Image.open,
    "loaded": load_image,
    "loaded_twice": lambda path: load_image(load_image(path)),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("file", FILES)
def test_every_kind_of_file_enters_alike_on_every_route(backend, file, route, tmp_path):
    expected = FILES[file](tmp_path / file)
    assert np.abs(as_is(backend, ROUTES[route](tmp_path / file)) - expected).max() <= 1.5


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation_is_applied_exactly_once(backend, orientation, tmp_path):
    path = tmp_path / "photo.png"
    as_shot(orientation).save(path, exif=exif(orientation))
    processor = backend(mode="classify", size=64)
    fetched = processor.fetch_images([str(path), [path]])
    with Image.open(path) as photo:
        for image in (str(path), photo, fetched[0], fetched[1][0], processor.fetch_images(photo)):
            assert (as_is(backend, image) == quadrants()).all()
        assert photo.getexif().get(0x0112) == orientation  # the caller's picture is left as it was


def test_images_from_a_data_url(backend):
    buffer = io.BytesIO()
    Image.new("RGBA", (64, 64), (10, 20, 30, 0)).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    assert (as_is(backend, url) == 255).all()


def save_truncated(path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-1500])


BAD_FILES = {
    "truncated.jpg": (save_truncated, "truncated"),
    "truncated.png": (save_truncated, "truncated"),
    "text.png": (lambda path: path.write_text("not a picture", encoding="utf-8"), "cannot identify image file"),
    "empty.gif": (lambda path: path.write_bytes(b""), "cannot identify image file"),
    "missing.png": (lambda path: None, "No such file"),
    "folder.png": (lambda path: path.mkdir(), "not a regular file"),
}


@pytest.mark.parametrize("file", BAD_FILES)
@pytest.mark.attack
def test_unreadable_files_are_named(backend, file, tmp_path):
    save, reason = BAD_FILES[file]
    save(tmp_path / file)
    processor = backend(size=64)
    for source in (str(tmp_path / file), tmp_path / file):
        for attempt in (load_image, processor, processor.fetch_images):
            with pytest.raises(ValueError, match=f"cannot read image '.*{file}'.*{reason}") as raised:
                attempt(source)
            assert raised.value.__cause__ is not None


@pytest.mark.attack
def test_truncated_pillow_images_are_named_or_counted(backend, tmp_path):
    save_truncated(tmp_path / "cut.jpg")
    good = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match=r"images\[1\]: cannot read image '.*cut.jpg': .*truncated"):
        backend(size=64)([good, Image.open(tmp_path / "cut.jpg")])
    in_memory = Image.open(io.BytesIO((tmp_path / "cut.jpg").read_bytes()))
    with pytest.raises(ValueError, match=r"images\[2\]: cannot read image 'RGB image of 64x64': .*truncated"):
        backend(size=64)([good, good, in_memory])


@pytest.mark.attack
def test_decompression_bombs_are_refused_by_name(backend, tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"cannot read image '.*bomb.png': Image size \(4096 pixels\) exceeds limit"):
        backend(size=64)(tmp_path / "bomb.png")


def test_integers_beyond_16_bits_are_refused(backend):
    with pytest.raises(ValueError, match=r"cannot read image 'I image of 64x64': pixel values span \[0, 100000\]"):
        load_image(Image.fromarray(np.linspace(0, 100_000, 4096).astype(np.int32).reshape(64, 64)))


# --- back to pictures ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_post_process_clamps_and_rounds(backend, dtype):
    column = torch.tensor([-3.0, -1.0, -0.75, 0.0, 0.5, 1.0, 1.5], dtype=dtype)
    pixels = torch.stack([column, -column, torch.zeros_like(column)])[None, :, :, None]  # (1, 3, 7, 1)
    (image,) = backend().post_process(pixels.requires_grad_())
    assert image.mode == "RGB" and image.size == (1, 7)
    assert np.asarray(image)[:, 0, 0].tolist() == [0, 0, 32, 128, 191, 255, 255]
    assert np.asarray(image)[:, 0, 1].tolist() == [255, 255, 223, 128, 64, 0, 0]


def test_post_process_refuses_what_is_no_picture(backend):
    for pixels in (torch.zeros(3, 8, 8), torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"expected floats of shape \(B, 3, H, W\), got torch"):
            backend().post_process(pixels)
    with pytest.raises(ValueError, match="pixels contain NaN"):
        backend().post_process(torch.full((1, 3, 8, 8), math.nan))


def test_reconstruct_round_trip(backend, china):
    picture = Image.fromarray(china)
    processor = backend(mode="reconstruct")
    first, second = processor.post_process(processor([picture, picture]).pixel_values)
    expected = np.asarray(picture.resize((431, 288), Image.Resampling.LANCZOS).crop((88, 16, 344, 272))).astype(int)
    assert first.size == (256, 256) and first.tobytes() == second.tobytes()
    assert np.abs(np.asarray(first) - expected).max() <= 1


# --- saving and loading ---


def test_save_and_load(backend, tmp_path, china):
    processor = backend(mode="reconstruct", size={"height": 64, "width": 96}, do_rescale=False)
    processor.save_pretrained(tmp_path)
    loaded = backend.from_pretrained(tmp_path)
    assert type(loaded) is backend and loaded.to_dict() == processor.to_dict()
    assert (loaded.mode, loaded.size.width, loaded.patch_size) == ("reconstruct", 96, 16)
    assert torch.equal(loaded(china).pixel_values, processor(china).pixel_values)
    assert backend.from_pretrained(tmp_path, mode="classify").mode == "classify"


def test_auto_class_loads_either_backend(backend, tmp_path):
    class ThrowawayConfig(PreTrainedConfig):
        model_type = "unitok_throwaway"

    classes = {"torchvision": UniTokImageProcessor, "pil": UniTokImageProcessorPil}
    AutoImageProcessor.register(ThrowawayConfig, image_processor_classes=classes)
    try:
        backend(mode="classify", size=64).save_pretrained(tmp_path)
        for name, expected in {**classes, None: UniTokImageProcessor}.items():
            loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=name)
            assert type(loaded) is expected and loaded.mode == "classify" and loaded.size.height == 64
    finally:
        del IMAGE_PROCESSOR_MAPPING._extra_content[ThrowawayConfig]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I", "CMYK"])
def test_a_picture_of_any_mode_is_shrunk_while_it_is_read(tmp_path, mode):
    ramp = Image.linear_gradient("L").resize((1000, 400))
    if mode.startswith("I"):
        picture = Image.fromarray(np.asarray(ramp).astype(np.uint16 if mode == "I;16" else np.int32) * 257)
    else:
        picture = ramp.convert("1", dither=Image.Dither.NONE) if mode == "1" else ramp.convert(mode)
    path = tmp_path / ("picture.tif" if mode in ("I", "CMYK") else "picture.png")
    picture.save(path)
    with Image.open(path) as opened:
        assert opened.mode == mode
    shrunk, whole = load_image(path, max_side=100), load_image(path)
    assert shrunk.size == (100, 40)
    expected = np.asarray(whole.resize((100, 40)), float)
    assert np.abs(np.asarray(shrunk, float) - expected).mean() < 2


@pytest.mark.parametrize(
    "count", [pytest.param(1000, marks=pytest.mark.full), pytest.param(10_000, marks=pytest.mark.slow)]
)
@pytest.mark.attack
def test_odd_and_malformed_images_are_read_or_refused_in_bounded_time_and_memory(count):
    """In a process of its own: a crash, a hang and the memory are those of the images alone."""
    command = [sys.executable, str(Path(__file__).with_name("mutations.py")), str(count)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120 + count // 10)
    assert ended.returncode == 0, ended.stderr[-2000:]
    report = json.loads(ended.stdout.splitlines()[-1])
    print(f"\n{'':22}{'read':>7}{'refused':>9}")
    for kind, outcomes in report["counts"].items():
        print(f"{kind:22}{outcomes['read']:7}{outcomes['refused']:9}")
    print(
        f"slowest {report['slowest'][0]:.1f} s (number {report['slowest'][1]}), memory {report['memory'] / GIB:.2f} GiB"
    )
    assert report["num_wrong"] == 0, report["wrong"]
    assert sum(sum(outcomes.values()) for outcomes in report["counts"].values()) == count
    assert report["counts"]["decompression bomb"]["read"] == -(-(count - 999) // 2500)
    assert report["counts"].pop("intact")["refused"] == 0
    assert min(min(outcomes.values()) for outcomes in report["counts"].values()) > 0
    assert report["memory"] < 3 * GIB and report["slowest"][0] < 30


def test_a_picture_is_the_same_as_a_path_as_bytes_and_as_a_url(picture):
    data = picture.read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    expected = load_image(picture).tobytes()
    for source in (str(picture), data, url, Image.open(picture), Image.open(io.BytesIO(data))):
        assert load_image(source).tobytes() == expected
    assert decode_image(data).tobytes() == expected
    processor = UniTokImageProcessor(size=48)
    assert torch.equal(processor([data, url]).pixel_values, processor([picture, picture]).pixel_values)


@pytest.mark.parametrize(
    "source, message",
    [
        (b"", "cannot read image '0 bytes': cannot identify"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "cannot identify"),
        ("http://no such host/a.png", "cannot read image 'http://no such host/a.png': .*URL can't contain"),
        ("a\0b.png", "cannot read image .*null"),
        (Image.new("RGB", (0, 3)), "expected a non-empty array of pixels, got 'RGB image of 0x3'"),
        (Image.new("F", (3, 3), math.nan), "cannot read image 'F image of 3x3': pixel values contain NaN"),
        (3, "cannot read image '3': expected str"),
    ],
)
@pytest.mark.attack
def test_what_is_no_picture_is_named(source, message):
    with pytest.raises(ValueError, match=message):
        load_image(source)


def test_a_name_given_is_the_name_in_errors():
    with pytest.raises(ValueError, match="cannot read image 'shard 7, cat.jpg': cannot identify"):
        load_image(b"no picture", "shard 7, cat.jpg")
    with pytest.raises(UnusableSample, match="cannot read image 'cat.jpg'"):
        decode_image(b"no picture", "cat.jpg")


@pytest.mark.attack
def test_a_url_gives_no_more_than_its_share(monkeypatch, picture):
    monkeypatch.setattr(image_processing_unitok, "URL_BYTES", 100)
    with pytest.raises(ValueError, match="cannot read image 'data:image/png.*: more than 100 bytes"):
        load_image("data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode())


def test_one_function_opens_every_picture_from_outside():
    """The others read what a package or this project itself has written."""
    opens = {
        str(path.relative_to(ROOT))
        for package in ("unitok_mllm", "training", "eval")
        for path in (ROOT / package).rglob("*.py")
        if "Image.open(" in path.read_text(encoding="utf-8")
    }
    own = {f"training/{name}.py" for name in ("prepare_data", "emoji", "model_card")}
    own |= {"eval/judge.py", "eval/text_to_image.py"}
    assert opens == {"unitok_mllm/image_processing_unitok.py", *own}


@pytest.mark.attack
def test_what_is_no_regular_file_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "fifo.png")
    for path in (tmp_path / "fifo.png", tmp_path / "link.png", "/dev/zero", tmp_path):
        with pytest.raises(ValueError, match=f"cannot read image '{path}': not a regular file"):
            load_image(path)
        with pytest.raises(UnusableSample, match="not a regular file"):
            files.load_sample_image(Path(path))
