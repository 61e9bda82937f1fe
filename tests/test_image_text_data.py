"""Images and captions for the tokenizer's training: folders, data sets and streams that resume."""

import gzip
import io
import json
import logging
import tarfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import count, islice
from threading import Thread

import datasets
import numpy as np
import pytest
import torch
import webdataset as wds
from conftest import IMAGE_SIZE, mirrored_and_shifted
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from training.image_text_data import ImageTextTransform, build_image_text_dataset, decode_image, random_numbers
from unitok_mllm import UniTokImageProcessor


SIZE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
EXIF_ORIENTATION, ROTATED_90 = 0x0112, 6


def picture(number: int) -> Image.Image:
    """Noise whose grey levels lie just above 10 times its number."""
    noise = np.random.default_rng(number).integers(0, 10, (50, 64, 3))
    return Image.fromarray((10 * number + noise).astype(np.uint8))


def numbers(samples) -> list[int]:
    """Which pictures these are."""
    return [int((sample["pixel_values"].mean() + 1) * 127.5 / 10) for sample in samples]


def png(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "png", **options)
    return file.getvalue()


def equal(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in ("pixel_values", "input_ids"))


def epoch_of(dataset, epoch: int = 0, workers: int = 0) -> list[dict]:
    dataset.set_epoch(epoch)
    return list(DataLoader(dataset, batch_size=None, num_workers=workers))


@pytest.fixture
def transform(text_tokenizer) -> ImageTextTransform:
    return ImageTextTransform(UniTokImageProcessor(size=SIZE, mode="reconstruct"), text_tokenizer, 12)


@pytest.fixture
def folder(tmp_path):
    """Eight pictures with captions, in a .jsonl and beside them."""
    (tmp_path / "images").mkdir()
    rows = []
    for i in range(8):
        picture(i).save(tmp_path / f"images/{i}.png")
        (tmp_path / f"images/{i}.txt").write_text(f"red {i}", encoding="utf-8")
        rows.append({"image": f"images/{i}.png", "caption": f"red {i}"})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


@pytest.fixture
def build(folder, transform):
    def build(max_broken_share=0.01, seed=0, **options):
        source = {"kind": "folder", "path": f"{folder}/train.jsonl"} | options
        return build_image_text_dataset(source, transform, seed, max_broken_share)

    return build


# --- transform ---


@pytest.mark.parametrize("mode", ["reconstruct", "understand", "classify"])
def test_without_changes_pixels_are_the_image_processors(text_tokenizer, mode):
    processor = UniTokImageProcessor(size=SIZE, mode=mode)
    transform = ImageTextTransform(processor, text_tokenizer, 12)
    sample = transform(picture(3), "a red circle", torch.Generator())
    assert torch.equal(sample["pixel_values"], processor(picture(3))["pixel_values"][0])
    ids = text_tokenizer("a red circle")["input_ids"] + [text_tokenizer.eos_token_id]
    assert sample["input_ids"].tolist() == ids + [text_tokenizer.pad_token_id] * (12 - len(ids))


def test_a_caption_that_is_cut_keeps_its_end_token(transform, text_tokenizer):
    caption = "what is the blue shape? " * 5
    uncut = text_tokenizer(caption)["input_ids"]
    assert len(uncut) > 12
    assert transform.encode(caption).tolist() == uncut[:11] + [text_tokenizer.eos_token_id]


def test_an_end_token_that_the_tokenizer_adds_itself_comes_once(text_tokenizer):
    class Closing:
        eos_token_id, pad_token_id = text_tokenizer.eos_token_id, text_tokenizer.pad_token_id

        def __call__(self, text, truncation, max_length, split_special_tokens):
            ids = text_tokenizer(text, truncation=True, max_length=max_length - 1)["input_ids"]
            return {"input_ids": ids + [self.eos_token_id]}

    transforms = [ImageTextTransform(UniTokImageProcessor(size=SIZE), t, 12) for t in (Closing(), text_tokenizer)]
    for caption in ("red", "what is the blue shape? " * 5):
        assert torch.equal(*(transform.encode(caption) for transform in transforms))


@pytest.mark.attack
def test_a_caption_that_spells_control_tokens_is_text(transform, text_tokenizer):
    ids = transform.encode("a </s>").tolist()
    end = text_tokenizer.eos_token_id
    assert ids.count(end) == 1 and text_tokenizer.decode(ids[: ids.index(end)]) == "<s>a </s>"


def test_shifts_repeat_the_border_and_mirroring_happens_half_of_the_time(text_tokenizer):
    processor = UniTokImageProcessor(size=SIZE)
    transform = ImageTextTransform(processor, text_tokenizer, 12, horizontal_flip=True, max_shift=1)
    pixels = processor(picture(2))["pixel_values"][0]
    candidates = mirrored_and_shifted(pixels)
    drawn, generator = [], torch.Generator().manual_seed(0)
    for _ in range(100):
        changed = transform(picture(2), "red", generator)["pixel_values"]
        drawn += [name for name, candidate in candidates.items() if torch.equal(candidate, changed)]
    assert len(drawn) == 100 and set(drawn) == set(candidates)
    assert 30 < sum(mirrored for mirrored, _, _ in drawn) < 70


def test_a_random_crop_keeps_nine_tenths_of_the_area(text_tokenizer):
    columns, rows = np.meshgrid(np.linspace(0, 255, 120), np.linspace(0, 255, 100))
    image = Image.fromarray(np.stack([columns, rows, rows], axis=-1).astype(np.uint8))  # levels tell the place
    processor = UniTokImageProcessor(size=SIZE, mode="reconstruct")  # which would crop it once more
    transform = ImageTextTransform(processor, text_tokenizer, 12, random_crop=True)
    areas = []
    for seed in range(20):
        pixels = transform(image, "red", torch.Generator().manual_seed(seed))["pixel_values"]
        assert torch.equal(pixels, transform(image, "red", torch.Generator().manual_seed(seed))["pixel_values"])
        left, right = pixels[0, :, 0].mean(), pixels[0, :, -1].mean()
        top, bottom = pixels[1, 0].mean(), pixels[1, -1].mean()
        areas.append(float((right - left) * (bottom - top)) / 4)
    assert 0.85 < min(areas) < 0.95 and max(areas) <= 1  # the outermost pixels' centres lie a little inside


def test_a_random_crop_is_resized_bicubically(text_tokenizer):
    image = picture(3)
    processor = UniTokImageProcessor(size=SIZE, mode="reconstruct")
    transform = ImageTextTransform(processor, text_tokenizer, 12, random_crop=True)
    pixels = transform(image, "red", torch.Generator().manual_seed(0))["pixel_values"]
    with random_numbers(int(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(0)))):
        top, left, height, width = v2.RandomResizedCrop(1, scale=(0.9, 1.0)).make_params([image]).values()
    cut = image.crop((left, top, left + width, top + height)).resize(
        (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC
    )
    expected = torch.from_numpy(np.array(cut)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)


def test_a_transform_leaves_the_random_numbers_of_others_alone(transform):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    transform(picture(1), "red", torch.Generator())
    assert torch.equal(torch.rand(3), expected)


def test_a_text_tokenizer_without_an_end_and_a_negative_shift_are_refused(transform):
    class Endless:
        eos_token_id, pad_token_id = None, 0

    with pytest.raises(ValueError, match="needs an end token"):
        ImageTextTransform(transform.image_processor, Endless(), 12)
    with pytest.raises(ValueError, match="max_shift must be at least 0 pixels, got -1"):
        ImageTextTransform(transform.image_processor, transform.text_tokenizer, 12, max_shift=-1)


def test_image_bytes_come_upright():
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = ROTATED_90
    turned = picture(1).transpose(Image.Transpose.ROTATE_90)
    assert ImageOps.grayscale(decode_image(png(turned, exif=exif))).size == picture(1).size
    assert np.array_equal(decode_image(png(turned, exif=exif)), picture(1))


# --- folder and hf sources ---


def test_the_kinds_of_folders_and_data_sets_give_the_same_samples(folder, build, transform):
    expected = [transform(picture(i), f"red {i}", torch.Generator()) for i in range(8)]
    table = datasets.Dataset.from_dict(
        {
            "id": range(8),
            "picture": [str(folder / f"images/{i}.png") for i in range(8)],
            "text": [f"red {i}" for i in range(8)],
        }
    )
    paths = table.cast_column("picture", datasets.Image())
    paths.save_to_disk(folder / "saved")
    datasets.DatasetDict({"held_out": table}).save_to_disk(folder / "saved_dict")
    (folder / "hub").mkdir()
    with_bytes = [{"bytes": png(picture(i)), "path": None} for i in range(8)]
    table = table.remove_columns("picture").add_column("picture", with_bytes)
    table.cast_column("picture", datasets.Image()).to_parquet(folder / "hub/train.parquet")
    (folder / "captioned").mkdir()
    rows = [{"image": str(folder / f"images/{i}.png"), "caption": f"red {i}"} for i in range(8)]
    (folder / "captioned/captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    columns = {"kind": "hf", "image_column": "picture", "caption_column": "text"}
    for options in (
        {},
        {"path": f"{folder}/images"},
        {"path": f"{folder}/captioned"},
        {"path": f"{folder}/saved", **columns},
        {"path": f"{folder}/saved_dict", "split": "held_out", **columns},
        {"path": f"{folder}/hub", **columns},
    ):
        dataset = build(**options)
        assert len(dataset) == 8
        assert all(equal(a, b) for a, b in zip(dataset, expected, strict=True)), options
    with pytest.raises(ValueError, match=r"has the columns \['id', 'text', 'picture'\], but no caption, image"):
        build(kind="hf", path=f"{folder}/hub")


def test_sources_are_joined_repeated_and_have_their_own_changes(folder, build, transform):
    source = {"kind": "folder", "path": f"{folder}/train.jsonl"}
    (folder / "few.jsonl").write_text(
        (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()[5], encoding="utf-8"
    )
    few = {"kind": "folder", "path": f"{folder}/few.jsonl", "repeat": 3, "max_shift": 5}
    dataset = build_image_text_dataset([source, few], transform, 0)
    assert numbers(dataset) == [0, 1, 2, 3, 4, 5, 6, 7, 5, 5, 5]
    assert equal(dataset[5], build()[5]) and not transform.max_shift
    assert len({dataset[i]["pixel_values"].numpy().tobytes() for i in (5, 8, 9, 10)}) == 4
    with pytest.raises(IndexError, match="index 11 of 11"):
        dataset[11]


def test_a_sample_depends_on_seed_epoch_and_index_alone(build):
    options = {"horizontal_flip": True, "max_shift": 5}
    first, second = ([build(**options)[epoch, i] for i in range(8)] for epoch in range(2))
    assert not any(equal(a, b) for a, b in zip(first, second))
    assert not equal(first[0], build(seed=1, **options)[0, 0])
    dataset = build(**options)
    for workers in (0, 1, 2):
        torch.manual_seed(workers)
        for epoch, expected in enumerate((first, second)):
            samples = epoch_of(dataset, epoch, workers)
            assert all(equal(a, b) for a, b in zip(samples, expected, strict=True))
    loader = DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True)
    for epoch, expected in enumerate((first, second)):
        dataset.set_epoch(epoch)
        assert all(equal(a, b) for a, b in zip(loader, expected, strict=True))


def test_a_source_in_memory_gives_the_same_samples_and_is_read_once(folder, build):
    changes = {"horizontal_flip": True, "max_shift": 2, "repeat": 2}
    plain, kept = build(**changes), build(**changes, in_memory=True)
    expected = [plain[epoch, index] for epoch in range(3) for index in range(16)]
    for image in folder.glob("images/*.png"):
        assert kept[0, int(image.stem)]["input_ids"].shape == (12,)
        image.unlink()
    samples = [kept[epoch, index] for epoch in range(3) for index in range(16)]
    assert all(equal(a, b) for a, b in zip(samples, expected))
    again = build(**changes, in_memory=True)  # as another training in this process would
    assert all(equal(again[2, index], b) for index, b in enumerate(expected[-16:]))
    with pytest.raises(ValueError, match="in_memory keeps processed pixels: it does not work with random_crop"):
        build(in_memory=True, random_crop=True)


def test_the_next_readable_sample_takes_a_broken_ones_place(folder, build, caplog):
    (folder / "images/2.png").write_bytes(b"no picture")
    (folder / "images/7.png").unlink()
    (folder / "images/3.txt").write_text(" ", encoding="utf-8")
    dataset = build(max_broken_share=1)
    assert numbers(dataset) == [0, 1, 3, 3, 4, 5, 6, 0]
    assert dataset.broken.seen == 10 and dataset.broken.broken == 2
    assert "images/2.png in row 2 of" in caplog.text and "images/7.png in row 7 of" in caplog.text
    assert numbers(build(max_broken_share=1, path=f"{folder}/images"))[2:4] == [4, 4]
    assert "expected a caption, got ' '" in caplog.text


@pytest.mark.attack
def test_rows_without_an_image_or_a_caption_are_broken(folder, build):
    rows = [{"image": "images/1.png", "caption": "red"}, {"image": "images/2.png"}, {"caption": "blue"}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    dataset = build(max_broken_share=1)
    assert numbers(dataset) == [1, 1, 1] and dataset.broken.broken == 3


@pytest.mark.parametrize(
    "change", [{"image": 3}, {"image": ["images/2.png"]}, {"image": {"path": "a"}}, {"caption": 3}, {"caption": ["a"]}]
)
@pytest.mark.attack
def test_rows_that_are_no_texts_are_broken(folder, build, change):
    rows = [{"image": "images/1.png", "caption": "red"}, {"image": "images/2.png", "caption": "blue"} | change]
    (folder / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    dataset = build(max_broken_share=1, path=f"{folder}/train.json")
    assert numbers(dataset) == [1, 1] and dataset.broken.broken == 1
    assert "image and caption must be strings, got" in dataset.broken.last[0]


@pytest.mark.attack
def test_too_many_broken_samples_stop_the_run(folder, build):
    (folder / "images/2.png").write_bytes(b"no picture")
    dataset = build(repeat=20)  # judged after 100 looks: 9 go over the 8 files, the broken one and the next twice
    with pytest.raises(ValueError, match=r"11 of 100 samples are broken, more than 1.00%.*images/2.png in row 2 of"):
        list(dataset)
    assert len(list(build(max_broken_share=0.2, repeat=20))) == 160
    with pytest.raises(ValueError, match="1 of 8 samples are broken"):
        list(build())
    for i in range(8):
        (folder / f"images/{i}.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="None of the 8 samples can be read"):
        build(max_broken_share=1)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "video"}, "kind must be one of folder, hf, webdataset, got 'video'"),
        ({"flip": True}, "a folder source has no 'flip'"),
        ({"kind": "webdataset"}, "a webdataset source has no 'path'"),
        ({"horizontal_flp": True}, "no 'horizontal_flp': did you mean 'horizontal_flip'"),
        ({"repeat": 0}, "repeat must be at least 1, got 0"),
    ],
)
def test_a_source_with_wrong_options_is_refused(build, changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_streams_stand_alone_and_empty_folders_are_refused(folder, build, transform):
    stream = {"kind": "webdataset", "shards": "{0..1}.tar", "samples_per_epoch": 3}
    for sources in ([], [stream, stream], [stream, {"kind": "folder", "path": f"{folder}/images"}]):
        with pytest.raises(ValueError, match="one webdataset, or any number of other kinds"):
            build_image_text_dataset(sources, transform, 0)
    for wrong in ({"samples_per_epoch": 0}, {"shuffle": -1}, {"shards": []}):
        with pytest.raises(ValueError, match="at least 1 shard, .* got [012] shards, [03] and (1000|-1)"):
            build_image_text_dataset(stream | wrong, transform, 0)
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no images"):
        build(path=f"{folder}/empty")


# --- webdataset sources ---


@pytest.fixture
def shards(tmp_path):
    """Twenty pictures in five tar files of four, as PNG, JPEG or WebP."""
    for shard in range(5):
        with wds.TarWriter(str(tmp_path / f"{shard}.tar")) as writer:
            for i in range(4 * shard, 4 * shard + 4):
                suffix = ("png", "jpg", "webp")[i % 3]
                file = io.BytesIO()
                Image.new("RGB", (50, 64), (10 * i + 5,) * 3).save(file, {"jpg": "jpeg"}.get(suffix, suffix))
                writer.write({"__key__": f"{i:04d}", suffix: file.getvalue(), "txt": f"red {i}"})
    return tmp_path


@pytest.fixture
def stream(shards, transform):
    def stream(max_broken_share=0.01, **options):
        source = {"kind": "webdataset", "shards": f"{shards}/{{0..4}}.tar", "samples_per_epoch": 20} | options
        return build_image_text_dataset(source, transform, 0, max_broken_share)

    return stream


def over_nodes(monkeypatch, dataset, workers: int, epoch: int = 0) -> list[list[int]]:
    """What each of two nodes gets."""
    given = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        given.append(numbers(epoch_of(dataset, epoch, workers)))
    return given


@pytest.mark.parametrize("workers", [0, 3])
def test_an_exact_epoch_has_each_sample_once_over_nodes_and_workers(stream, monkeypatch, workers):
    epochs = [over_nodes(monkeypatch, stream(), workers, epoch) for epoch in (0, 1, 0)]
    for epoch in epochs:
        assert all(epoch) and sorted(epoch[0] + epoch[1]) == list(range(20))
    assert epochs[0] == epochs[2] != epochs[1]


def test_a_streams_order_is_that_of_the_shards_only_without_a_buffer(stream):
    unshuffled = numbers(stream(shuffle=0))
    assert unshuffled != list(range(20))
    assert all(unshuffled[i : i + 4] == list(range(unshuffled[i], unshuffled[i] + 4)) for i in range(0, 20, 4))
    assert any(a // 4 != b // 4 for a, b in zip(numbers(stream())[:4], numbers(stream())[1:4]))


def test_a_stream_gives_captions_with_their_images(stream, transform):
    for sample, number in zip(stream(), numbers(stream())):
        assert torch.equal(sample["input_ids"], transform.encode(f"red {number}"))


def test_a_resampled_stream_draws_shards_of_its_own_in_each_lane_and_reads_them_to_the_end(stream, monkeypatch):
    lanes = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        dataset = stream(resampled=True, shuffle=0, samples_per_epoch=3)
        samples = islice(DataLoader(dataset, batch_size=4, num_workers=2), 20)
        batches = [numbers([{"pixel_values": pixels} for pixels in batch["pixel_values"]]) for batch in samples]
        lanes += [batches[::2], batches[1::2]]
    assert all(shard == list(range(shard[0], shard[0] + 4)) and shard[0] % 4 == 0 for lane in lanes for shard in lane)
    assert all(len({shard[0] for shard in lane}) > 2 for lane in lanes) and len(set(map(str, lanes))) == 4
    dataset.set_epoch(1)
    assert numbers(islice(dataset, 8)) == lanes[2][0] + lanes[2][1]  # which has no epochs


def test_every_sample_comes_though_epochs_are_shorter_than_shards(stream):
    dataset, seen = stream(resampled=True, samples_per_epoch=3, shuffle=6), []
    for epoch in range(40):
        dataset.set_epoch(epoch)
        for sample in islice(dataset, 3):
            dataset.record(sample["stream_position"])
            seen.append(sample)
    assert set(numbers(seen)) == set(range(20))
    assert numbers(seen) == numbers(islice(stream(resampled=True, shuffle=6), 120))


def used_batches(dataset, workers: int, how_many: int) -> list[dict]:
    """The next batches of two, epoch after epoch, each of them recorded."""
    batches, loader = [], DataLoader(dataset, batch_size=2, num_workers=workers, drop_last=True)
    for epoch in count(dataset.epoch):
        dataset.set_epoch(epoch)
        for batch in loader:
            dataset.record(batch["stream_position"][-1])
            batches.append(batch)
            if len(batches) == how_many:
                return batches


@pytest.mark.parametrize("resampled", [False, True])
@pytest.mark.parametrize(("workers", "world"), [(0, 1), (0, 2), (2, 1), (2, 2)])
def test_a_stream_goes_on_exactly_where_it_was(tmp_path, stream, monkeypatch, resampled, workers, world):
    for shard in range(5):
        with wds.TarWriter(str(tmp_path / f"{shard}.tar")) as writer:
            for i in range(4 * shard, 4 * shard + 4):
                writer.write({"__key__": f"{i:04d}", "png": png(picture(i)), "txt": f"red {i}"})
    monkeypatch.setenv("WORLD_SIZE", str(world))
    options = {"resampled": resampled, "shuffle": 3, "horizontal_flip": True, "max_shift": 5}
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        whole = used_batches(stream(**options), workers, 9)  # beyond an epoch, of two processes
        for used in (4,) if workers else range(1, 9):
            before, after = stream(**options), stream(**options)
            used_batches(before, workers, used)
            after.load_state_dict(json.loads(json.dumps(before.state_dict()), object_hook=with_lanes))
            for a, b in zip(used_batches(after, workers, 9 - used), whole[used:], strict=True):
                assert equal(a, b) and torch.equal(a["stream_position"], b["stream_position"])
    assert not equal(whole[0], whole[1])


def with_lanes(values: dict) -> dict:
    return {int(key) if key.isdecimal() else key: value for key, value in values.items()}


@pytest.mark.attack
def test_broken_samples_of_a_stream_are_named_and_skipped(stream, shards, caplog):
    with wds.TarWriter(str(shards / "1.tar")) as writer:
        writer.write({"__key__": "0004", "jpg": b"no picture", "txt": "red"})
        writer.write({"__key__": "0005", "jpg": png(picture(5))})
        writer.write({"__key__": "0006", "txt": "red"})
        writer.write({"__key__": "0007", "jpg": png(picture(7)), "txt": "red 7"})
    assert sorted(numbers(stream(max_broken_share=1))) == [0, 1, 2, 3, *range(7, 20)]
    for name, reason in (
        ("0004", "cannot read image"),
        ("0005", "expected a caption, got"),
        ("0006", "the sample has no image"),
    ):
        assert f"{name} of {shards}/1.tar: {reason}" in caplog.text
    with pytest.raises(ValueError, match="3 of 20 samples are broken, more than 1.00%.*1.tar"):
        list(stream())
    with pytest.raises(ValueError, match=r"of 1\d\d samples are broken"):
        epoch_of(stream(resampled=True, samples_per_epoch=1000), workers=1)


@pytest.mark.attack
def test_a_shard_that_breaks_off_is_skipped_and_a_missing_one_stops_the_run(stream, shards, caplog):
    with tarfile.open(shards / "2.tar") as archive:
        third = archive.getmember("0010.jpg").offset_data
    (shards / "2.tar").write_bytes((shards / "2.tar").read_bytes()[: third + 10])
    dataset = stream(max_broken_share=0.1)
    with caplog.at_level(logging.WARNING):
        assert sorted(numbers(dataset)) == [*range(10), *range(12, 20)]
    assert dataset.broken.broken in (1, 2) and "2.tar" in caplog.text
    (shards / "3.tar").unlink()
    with pytest.raises(FileNotFoundError, match="3.tar"):
        list(stream())


def test_shards_of_a_web_address_give_the_same_samples_and_missing_ones_are_skipped(stream, shards, caplog):
    handler = partial(SimpleHTTPRequestHandler, directory=shards)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert numbers(stream(shards=f"{address}/{{0..4}}.tar")) == numbers(stream())
        dataset = stream(shards=f"{address}/{{4..5}}.tar", max_broken_share=0.3)
        assert sorted(numbers(dataset)) == [*range(16, 20)] and dataset.broken.broken == 1
        server.shutdown()
    assert "skipping the rest of a shard" in caplog.text and f"{address}/5.tar" in caplog.text


@pytest.mark.attack
def test_compressed_shards_are_read_and_bombs_among_them_skipped(stream, shards, caplog, monkeypatch):
    for name in ("0.tar", "1.tar"):
        (shards / name).write_bytes(gzip.compress((shards / name).read_bytes()))
    assert sorted(numbers(stream())) == [*range(20)]
    monkeypatch.setattr("training.shards.FREE", 2**20)
    with tarfile.open(shards / "2.tar", "w:gz") as archive:
        bomb = tarfile.TarInfo("0008.png")
        bomb.size = 2**25
        archive.addfile(bomb, io.BytesIO(bytes(2**25)))
    assert sorted(numbers(stream(max_broken_share=0.1))) == [*range(8), *range(12, 20)]
    assert f"it expands to more than 32 times its size {shards}/2.tar" in caplog.text


def test_fewer_shards_than_processes_are_refused(stream, shards, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(ValueError, match="5 shards are too few for 6 processes"):
        list(stream())
