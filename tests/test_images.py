"""Images of every layout, compared with the files that they were made from."""

import io
from functools import partial

import datasets
import numpy as np
import pytest
import torch
import webdataset
from accelerate import PartialState
from PIL import Image

from eval.images import UnreadableImage, choose, deal_out, load_batches, open_images, processed
from unitok_mllm import UniTokImageProcessorPil


COLORS = {"dog/b.png": "red", "cat/a.png": "blue", "dog/A.jpeg": "lime", "cat/nested/c.PNG": "white"}
IN_ORDER = ["cat/a.png", "cat/nested/c.PNG", "dog/A.jpeg", "dog/b.png"]


def png(color: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (20, 24), color).save(data, format="png")
    return data.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Class folders with one color an image (PNG data whatever the ending), and files that are none."""
    for name, color in COLORS.items():
        (tmp_path / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "val" / name).write_bytes(png(color))
    (tmp_path / "val/cat/readme.txt").write_text("no image", encoding="utf-8")
    (tmp_path / "val/cat/._a.png").write_text("hidden", encoding="utf-8")
    return tmp_path / "val"


@pytest.fixture
def image_processor():
    return UniTokImageProcessorPil(mode="reconstruct", size={"height": 16, "width": 16})


def colors(images) -> list[str]:
    names = {"red": (255, 0, 0), "blue": (0, 0, 255), "lime": (0, 255, 0), "white": (255, 255, 255)}
    by_value = {value: name for name, value in names.items()}
    return [by_value[images[i].getpixel((3, 3))] for i in range(len(images))]


def test_class_folders_give_sorted_names_and_labels(folder):
    images = open_images(str(folder))
    assert images.names == IN_ORDER
    assert (images.labels, images.class_names) == ([0, 0, 1, 1], ["cat", "dog"])
    assert colors(images) == [COLORS[name] for name in IN_ORDER]


def test_a_folder_with_images_at_its_top_has_no_classes(folder):
    images = open_images(str(folder / "cat"))
    assert (images.names, images.labels, images.class_names) == (["a.png", "nested/c.PNG"], None, None)


def test_digest_changes_with_names_and_contents(folder):
    before = open_images(str(folder)).digest()
    assert open_images(str(folder)).digest() == before
    (folder / "dog/b.png").write_bytes(png("red") + b" ")
    changed = open_images(str(folder)).digest()
    (folder / "dog/b.png").rename(folder / "dog/c.png")
    assert len({before, changed, open_images(str(folder)).digest()}) == 3


@pytest.mark.parametrize("labelled", [True, False])
def test_shards_keep_their_order_and_labels(tmp_path, labelled):
    for shard, names in enumerate((["x", "sub/y"], ["x"])):
        with webdataset.TarWriter(str(tmp_path / f"{shard}.tar")) as writer:
            for name in names:
                sample = {"__key__": name, "png": png("red" if "x" in name else "blue"), "txt": "a caption"}
                writer.write(sample | ({"cls": 10 * shard + len(name)} if labelled else {}))
    images = open_images(f"{tmp_path}/{{0..1}}.tar")
    assert images.names == ["0.tar/x.png", "0.tar/sub/y.png", "1.tar/x.png"]
    assert images.labels == ([1, 5, 11] if labelled else None)
    assert colors(images) == ["red", "blue", "red"]
    assert open_images(f"{tmp_path}/*.tar").names == images.names


def test_saved_data_sets_with_and_without_splits(tmp_path):
    rows = {"image": [Image.new("RGB", (20, 20), c) for c in ("red", "blue")], "label": [1, 0]}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["sky", "rose"]))
    data = datasets.Dataset.from_dict(rows, features)
    data.save_to_disk(tmp_path / "one")
    images = open_images(f"{tmp_path}/one")
    assert (images.names, images.labels) == (["row/00000000", "row/00000001"], [1, 0])
    assert images.class_names == ["sky", "rose"] and colors(images) == ["red", "blue"]

    datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(tmp_path / "two")
    images = open_images(f"{tmp_path}/two", split="test")
    assert (images.names, colors(images)) == (["test/00000000"], ["blue"])
    with pytest.raises(ValueError, match="has the splits train, test, but no 'validation'"):
        open_images(f"{tmp_path}/two", split="validation")
    with pytest.raises(ValueError, match="has the columns image, label, but no picture"):
        open_images(f"{tmp_path}/one", image_column="picture")
    with pytest.raises(
        ValueError, match=r"^--config b has no effect: .*/one is no data set on the hub. Leave it out$"
    ):
        open_images(f"{tmp_path}/one", config="b")


def test_errors_name_what_is_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no images \(.jpg"):
        open_images(f"{tmp_path}/empty")
    with pytest.raises(ValueError, match="there is no folder .*/nowhere; a data set on the hub needs a split"):
        open_images(f"{tmp_path}/nowhere")
    with pytest.raises(FileNotFoundError, match="there is no shard .*/1.tar"):
        (tmp_path / "0.tar").touch()
        open_images(f"{tmp_path}/{{0..1}}.tar")
    (tmp_path / "0.tar").write_bytes(b"no tar file at all")
    with pytest.raises(ValueError, match="cannot read .*/0.tar"):
        open_images(f"{tmp_path}/0.tar")


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_are_named_or_passed_over(folder, image_processor, workers):
    (folder / "cat/nested/c.PNG").write_bytes(png("white")[:50])
    Image.new("1", (1, 2_000_000)).save(folder / "dog/A.jpeg", format="png")
    images = open_images(str(folder))
    with pytest.raises(UnreadableImage, match="^cat/nested/c.PNG: cannot read image"):
        images[1]
    with pytest.raises(UnreadableImage, match="^cat/nested/c.PNG: cannot read image"):
        list(load_batches(images, partial(processed, image_processor), [0, 1, 2, 3], 2, workers))
    first, second = load_batches(
        images, partial(processed, image_processor), [0, 1, 2, 3], 2, workers, skip_broken=True
    )
    assert (first.indices, list(first.broken), second.indices, list(second.broken)) == ([0], [1], [3], [2])
    assert second.broken[2].startswith("dog/A.jpeg: ") and "too elongated" in second.broken[2]
    assert torch.equal(second.pixel_values, image_processor(images[3])["pixel_values"])
    (nothing,) = load_batches(images, partial(processed, image_processor), [1], 2, workers, skip_broken=True)
    assert nothing.indices == [] and nothing.pixel_values.shape == (0,)


def test_batches_are_what_the_processor_makes_of_each_image(folder, image_processor):
    images = open_images(str(folder))
    for index in range(4):
        noise = np.random.default_rng(index).integers(0, 256, (30, 20 + index, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / images.names[index], format="png")
    pixels = torch.cat(
        [b.pixel_values for b in load_batches(images, partial(processed, image_processor), [3, 0, 2], batch_size=2)]
    )
    assert torch.equal(pixels, torch.cat([image_processor(images[i])["pixel_values"] for i in (3, 0, 2)]))


def test_images_are_chosen_evenly_and_dealt_out_once():
    assert choose(10, None) == list(range(10)) == choose(10, 99)
    assert choose(10, 4) == [0, 2, 5, 7]
    assert deal_out([4, 5, 6], PartialState()) == [4, 5, 6]
