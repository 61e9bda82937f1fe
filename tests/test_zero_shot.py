"""Zero-shot classification, end to end: random models of all three systems, the shipped one, real and drawn images."""

import json
import os
import re
import signal
import socket
from dataclasses import asdict
from pathlib import Path

import open_clip
import pytest
import torch
from accelerate import PartialState
from conftest import IMAGE_SIZE
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.multiprocessing import start_processes
from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor
from transformers.models.clip import CLIPTokenizer

from eval import zero_shot
from eval.zero_shot_benchmarks import class_folders, colored_shapes
from training.emoji import Emoji, read_table
from training.text_tokenizer import train_text_tokenizer
from unitok_mllm import UniTokImageProcessor, UniTokModel
from unitok_mllm.image_processing_unitok import load_image


pytestmark = pytest.mark.full


SHIPPED = "unitok_mllm/checkpoints/tiny"
NUM_EMOJI = 20


@pytest.fixture
def unitok_folder(visual_tokenizer, text_tokenizer, tmp_path) -> str:
    """A random tokenizer's folder, as its training releases it."""
    folder = tmp_path / "unitok"
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    for part in (visual_tokenizer, text_tokenizer, UniTokImageProcessor(size=size, mode="reconstruct")):
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def clip_folder(tmp_path) -> str:
    """A random transformers CLIP, with a tokenizer that spells."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocab = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={"vocab_size": len(vocab), "max_position_embeddings": 24, **ids, **size},
        vision_config={"image_size": 32, "patch_size": 8, **size},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        CLIPTokenizer({token: i for i, token in enumerate(vocab)}, []),
    ).save_pretrained(tmp_path / "clip")
    return str(tmp_path / "clip")


@pytest.fixture
def open_clip_folder(tmp_path) -> str:
    """A random open_clip model, smaller than any of its list, in the layout of its hub."""
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1}
    text = {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    mean_and_std = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    folder = tmp_path / "open_clip"
    folder.mkdir()
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": mean_and_std}), encoding="utf-8"
    )
    return f"local-dir:{folder}"


@pytest.fixture
def emoji_folder(tmp_path) -> Path:
    """Pictures of noise in the place of ten emoji in both styles, the last three held out in one."""
    folder, rows = tmp_path / "emoji", []
    for style in ("google", "twitter"):
        (folder / "images" / style).mkdir(parents=True)
        for i, name in enumerate(
            ("rose", "pizza", "frog", "fire", "cactus", "trophy", "rainbow", "cat", "fish", "bus")
        ):
            rows.append(Emoji(f"{i}.png", name, style, "any", held_out=style == "twitter" and i > 6))
            noise = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8).numpy()
            Image.fromarray(noise).save(folder / rows[-1].image)
    (folder / "emoji.json").write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")
    return folder


@pytest.fixture
def run(tmp_path):
    """Runs the script on the CPU; returns its report and its tensors."""

    def run(*options: str, output: str = "out") -> tuple[dict, dict[str, torch.Tensor]]:
        file = tmp_path / f"{output}.json"
        zero_shot.main([*options, "--output", str(file), "--use_cpu", "--workers", "0"])
        return json.loads(file.read_text(encoding="utf-8")), load_file(file.with_suffix(".nearest.safetensors"))

    return run


def settings(**values) -> zero_shot.Settings:
    return zero_shot.Settings(**{"dataset": "easy-vqa", "use_cpu": True, **values})


def shapes(limit: int) -> tuple[list[Image.Image], list[str], torch.Tensor]:
    """Pictures and labels of easy-VQA as the script takes them with this limit, and the 24 prompts."""
    benchmark = colored_shapes().limited(limit)
    prompts = [f"a {name}" for name in benchmark.classes]
    return [load_image(image) for image in benchmark.images], prompts, torch.tensor(benchmark.labels)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_class_embeddings_are_the_hand_computed_ones(unitok_folder, visual_tokenizer, text_tokenizer, batch_size):
    PartialState(cpu=True)
    system = zero_shot.UniTokSystem(settings(model=unitok_folder), torch.device("cpu"))
    classes, templates = ("red circle", "blue shape", "bus"), ("a {}".format, "what is the {}?".format)
    expected = []
    for name in classes:
        total = 0
        for template in templates:
            ids = torch.tensor([[*text_tokenizer(template(name))["input_ids"], 2]])
            features = visual_tokenizer.get_text_features(ids).pooler_output[0]
            total = total + features / features.norm()
        expected.append(total / total.norm())
    embeds = zero_shot.class_embeddings(system, classes, templates, batch_size)
    torch.testing.assert_close(embeds, torch.stack(expected).detach())


def test_constructed_case_is_counted():
    classifier = torch.eye(8)[:7]  # 7 classes in 8 dims
    images = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3, 0], [1, 2, 3, 4, 5, 6, 7, 0], [0, 0, 0, 0, 0, 0, 0, 1]])
    nearest = zero_shot.nearest_classes(images, classifier)
    assert nearest.tolist() == [[0, 1, 2, 3, 4], [6, 5, 4, 3, 2], [0, 1, 2, 3, 4]]
    assert zero_shot.accuracy(nearest, torch.tensor([0, 2, 5])) == {"images": 3, "top1": 1 / 3, "top5": 2 / 3}
    assert zero_shot.confusions(nearest, torch.tensor([0, 2, 2]), "abcdefg") == [
        {"class": "c", "taken_for": "g", "images": 1},
        {"class": "c", "taken_for": "a", "images": 1},
    ]
    assert zero_shot.nearest_classes(images, classifier[:3]).tolist()[0] == [0, 1, 2]


def test_clip_agrees_with_its_logits_per_image(clip_folder, run):
    report, tensors = run("--system", "clip", "--model", clip_folder, "--dataset", "easy-vqa", "--limit", "24")
    pictures, prompts, labels = shapes(24)
    processor = CLIPProcessor.from_pretrained(clip_folder)
    inputs = processor(text=prompts, images=pictures, padding=True, return_tensors="pt")
    logits = CLIPModel.from_pretrained(clip_folder)(**inputs).logits_per_image
    assert torch.equal(tensors["nearest"].long(), logits.topk(5).indices)
    assert len(tensors["nearest"].unique(dim=0)) > 1
    assert report["parts"]["test"]["top1"] == (logits.argmax(dim=1) == labels).double().mean().item()
    assert report["prompts"] == ["a {}"] and report["images"] == 24 and report["classes"] == 24
    assert report["preprocessing"] == "CLIPImageProcessor, 32x32"


def test_open_clip_agrees_with_its_own_classifier(open_clip_folder, run):
    options = ["--system", "open_clip", "--model", open_clip_folder, "--dataset", "easy-vqa", "--limit", "12"]
    _, tensors = run(*options)
    model, preprocess = open_clip.create_model_from_pretrained(open_clip_folder)
    classes = colored_shapes().classes
    tokenizer = open_clip.get_tokenizer(open_clip_folder)
    expected = open_clip.build_zero_shot_classifier(model.eval(), tokenizer, classes, ["a {}"])
    torch.testing.assert_close(tensors["classifier"], expected.T)
    with torch.no_grad():
        features = model.encode_image(torch.stack([preprocess(picture) for picture in shapes(12)[0]]))
    assert torch.equal(tensors["nearest"].long(), (features @ expected).topk(5).indices)
    assert len(tensors["nearest"].unique(dim=0)) > 1


def test_shipped_model_names_shapes_the_same_in_batches_of_any_size(run):
    report, tensors = run("--model", SHIPPED, "--dataset", "easy-vqa", "--limit", "21", "--batch_size", "7")
    _, one_by_one = run(
        "--model", SHIPPED, "--dataset", "easy-vqa", "--limit", "21", "--batch_size", "1", output="one"
    )
    assert torch.equal(tensors["nearest"], one_by_one["nearest"])

    pictures, prompts, labels = shapes(21)
    model = UniTokModel.from_pretrained(SHIPPED).eval()
    tokenizer, image_processor = AutoTokenizer.from_pretrained(SHIPPED), AutoImageProcessor.from_pretrained(SHIPPED)
    texts = tokenizer([prompt + tokenizer.eos_token for prompt in prompts], padding_side="right", padding=True)
    with torch.no_grad():
        text_features = model.get_text_features(torch.tensor(texts["input_ids"])).pooler_output
        similarity = (
            model.get_image_features(image_processor(pictures)["pixel_values"]).pooler_output @ text_features.T
        )
    assert torch.equal(tensors["nearest"].long(), similarity.topk(5).indices)
    right = (similarity.argmax(dim=1) == labels).sum().item()
    assert right >= 17  # of all 888 images: 92.3%
    assert report["parts"]["test"]["top1"] == right / 21
    assert report["preprocessing"] == "UniTokImageProcessor, understand, 64x64"
    assert report["numbers"][0] == {
        "benchmark": "easy-VQA, 24 pairs of colour and shape",
        "metric": "zero-shot top-1",
        "value": 100 * right / 21,
        "unit": "%",
        "protocol": {
            "split": "test, 21 of 888 images",
            "prompt": "a {}",
            "sampling": None,
            "images": "UniTokImageProcessor, understand, 64x64",
            "reference": "24 classes",
            "tool": "nearest mean text embedding",
        },
    }


def test_imagenet_has_the_names_of_open_clip_and_photographs_are_cropped(unitok_folder, tmp_path, run):
    pictures = [Image.fromarray(torch.randint(0, 256, (40, 60, 3), dtype=torch.uint8).numpy()) for _ in range(4)]
    for number in range(1000):
        folder = tmp_path / "val" / f"n{number * 7:08}"
        folder.mkdir(parents=True)
        pictures[number // 250].save(folder / "a.JPEG", quality=95)
    options = ["--model", unitok_folder, "--images", str(tmp_path / "val"), "--limit", "4"]
    report, tensors = run(*options, "--templates", "simple", "--batch_size", "512")
    assert tensors["classifier"].shape == (1000, 20) and len(report["prompts"]) == 7
    assert report["prompts"][0] == "itap of a {}."
    protocol = report["numbers"][0]["protocol"]
    assert (report["numbers"][0]["benchmark"], protocol["split"]) == ("ImageNet", "validation, 4 of 1000 images")
    assert (protocol["prompt"], protocol["images"]) == (
        "simple (7 templates)",
        "UniTokImageProcessor, classify, 48x48",
    )

    system = zero_shot.UniTokSystem(settings(model=unitok_folder), torch.device("cpu"))
    goldfish = zero_shot.class_embeddings(system, ["goldfish"], open_clip.SIMPLE_IMAGENET_TEMPLATES, 7)
    torch.testing.assert_close(tensors["classifier"][1:2], goldfish)
    files = [str(tmp_path / "val" / f"n{number * 7:08}" / "a.JPEG") for number in (0, 250, 500, 750)]
    pixels = system.image_processor(files, mode="classify")["pixel_values"]
    expected = zero_shot.nearest_classes(system.embed_images(pixels), tensors["classifier"])
    assert torch.equal(tensors["nearest"].long(), expected)
    assert report["parts"]["validation"] == {
        **zero_shot.accuracy(expected, torch.tensor([0, 250, 500, 750])),
        "most_frequent_confusions": zero_shot.confusions(
            expected, torch.tensor([0, 250, 500, 750]), open_clip.IMAGENET_CLASSNAMES
        ),
    }


@pytest.fixture
def own_folder(tmp_path) -> Path:
    """Three classes of a user's own, pictures in folders below them too."""
    for i, name in enumerate(("red_circle", "red_circle", "blue square", "fire-engine/deep")):
        path = tmp_path / "own" / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(0, 256, (60, 40, 3), dtype=torch.uint8).numpy()).save(path)
    return tmp_path / "own"


def test_folders_are_named_after_their_classes(unitok_folder, own_folder, run, capsys):
    options = ["--model", unitok_folder, "--images", str(own_folder)]
    report, tensors = run(*options)
    assert report["benchmark"] == "zero-shot classification, own" and report["classes"] == 3
    system = zero_shot.UniTokSystem(settings(dataset="", images="any", model=unitok_folder), torch.device("cpu"))
    names = ["blue square", "fire-engine", "red circle"]
    classifier = zero_shot.class_embeddings(system, names, open_clip.OPENAI_IMAGENET_TEMPLATES, 64)
    torch.testing.assert_close(tensors["classifier"], classifier)
    files = [own_folder / name for name in ("blue square/2.png", "fire-engine/deep/3.png", "red_circle/0.png")]
    files.append(own_folder / "red_circle/1.png")
    pixels = system.image_processor([str(file) for file in files], mode="classify")["pixel_values"]
    nearest = zero_shot.nearest_classes(system.embed_images(pixels), tensors["classifier"])
    assert torch.equal(tensors["nearest"].long(), nearest)
    right = (nearest[:, 0] == torch.tensor([0, 1, 2, 2])).double().mean().item()
    assert report["parts"]["all"]["top1"] == right and report["parts"]["all"]["top5"] == 1
    assert report["numbers"][0]["protocol"]["prompt"] == "openai (80 templates)"
    assert "zero-shot classification, own: 3 classes, 80 prompts each" in capsys.readouterr().out

    plain, _ = run(*options, "--templates", "a {}", output="plain")
    assert plain["prompts"] == ["a {}"] and plain["numbers"][0]["protocol"]["prompt"] == "a {}"

    Image.new("RGB", (50, 50), "red").save(files[0])  # a changed picture is looked at again, the others are not
    seen, embed_images = [], zero_shot.UniTokSystem.embed_images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            zero_shot.UniTokSystem,
            "embed_images",
            lambda self, pixels: seen.append(len(pixels)) or embed_images(self, pixels),
        )
        run(*options)
    assert seen == [1]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda own: (own / "stray.png").write_bytes(b"x"), "own/stray.png lies in no class's folder"),
        (lambda own: (own / "void").mkdir(), "own/void has no images"),
        (lambda own: (own / "red_circle").rename(own / "blue_square"), "has two folders for the class 'blue square'"),
        (
            lambda own: [path.rename(own / f"n0000000{i}") for i, path in enumerate(sorted(own.iterdir()))],
            "has 3 synsets, ImageNet has 1000: name the folders of other classes by words",
        ),
        (
            lambda own: [path.rename(own / "red_circle" / str(i)) for i, path in enumerate(own.glob("[bf]*"))],
            "has one class, 'red circle': there is nothing to choose",
        ),
    ],
)
def test_folders_that_name_no_classes_are_refused(own_folder, change, message):
    change(own_folder)
    with pytest.raises(ValueError, match=message):
        class_folders(str(own_folder), "openai")


def test_emoji_are_counted_apart_and_prompted_by_their_captions(unitok_folder, emoji_folder, run, capsys):
    report, tensors = run("--model", unitok_folder, "--dataset", "emoji", "--data", str(emoji_folder))
    pictures = read_table(emoji_folder)
    assert report["prompts"] == [pictures[0].caption.replace("rose", "{}"), pictures[-1].caption.replace("bus", "{}")]
    labels = torch.arange(NUM_EMOJI) % 10
    held_out = torch.tensor([picture.held_out for picture in pictures])
    for part, rows in (("seen", ~held_out), ("held_out", held_out)):
        right = tensors["nearest"][rows] == labels[rows, None]
        assert report["parts"][part]["images"] == {"seen": 17, "held_out": 3}[part]
        assert report["parts"][part]["top5"] == right.any(dim=1).double().mean().item()
    assert report["preprocessing"] == "UniTokImageProcessor, reconstruct, 48x48"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("zero-shot classification, emoji of two styles: 10 classes, 2 prompts each")
    assert lines[3].split() == [
        "held_out",
        "3",
        *(f"{report['parts']['held_out'][name]:.2%}" for name in ("top1", "top5")),
    ]


def test_broken_image_is_named_and_costs_no_finished_work(
    unitok_folder, emoji_folder, run, monkeypatch, tmp_path, capsys
):
    options = ["--model", unitok_folder, "--dataset", "emoji", "--data", str(emoji_folder), "--batch_size", "3"]
    expected, tensors = run(*options, output="whole")
    broken = emoji_folder / "images" / "twitter" / "3.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:500])
    (emoji_folder / "images" / "twitter" / "4.png").rename(tmp_path / "4.png")
    total = len(tensors["nearest"])
    said = (
        rf"2 of {total} images are broken, at most 1.00% may be: .*twitter/3\.png: .*; .*twitter/4\.png: cannot read"
    )
    with pytest.raises(SystemExit, match=said):
        run(*options)
    report, _ = run(*options, "--max_broken_share", "0.2", output="rest")
    assert [Path(name).name for name in report["broken"]] == ["3.png", "4.png"]
    assert sum(part["images"] for part in report["parts"].values()) == total - 2
    split = next(one["protocol"]["split"] for one in report["numbers"] if " of " in one["protocol"]["split"])
    assert re.fullmatch(r"\w+, \d+ of \d+ images", split)
    printed = capsys.readouterr()
    assert "2 broken images left out: " in printed.out and printed.err.count("skipping ") == 4
    done = load_file(tmp_path / "out.nearest.safetensors")["nearest"]
    assert (done[:, 0] < 0).nonzero().flatten().tolist() == [13, 14]

    broken.write_bytes(whole)
    (tmp_path / "4.png").rename(emoji_folder / "images" / "twitter" / "4.png")
    embedded, embed_images = [], zero_shot.UniTokSystem.embed_images
    with monkeypatch.context() as patch:
        patch.setattr(zero_shot, "class_embeddings", None)
        patch.setattr(
            zero_shot.UniTokSystem,
            "embed_images",
            lambda self, pixels: embedded.append(len(pixels)) or embed_images(self, pixels),
        )
        report, resumed = run(*options)
    assert embedded == [2] and torch.equal(resumed["nearest"], tensors["nearest"])
    assert report["parts"] == expected["parts"]

    with monkeypatch.context() as patch:
        patch.setattr(zero_shot, "SYSTEMS", dict.fromkeys(zero_shot.SYSTEMS))  # nothing is loaded
        assert run(*options)[0] == report
    rows = json.loads((emoji_folder / "emoji.json").read_text(encoding="utf-8"))
    (emoji_folder / "emoji.json").write_text(
        json.dumps(rows[:19]), encoding="utf-8"
    )  # one picture less, which leaves the names
    with monkeypatch.context() as patch:
        patch.setattr(zero_shot.UniTokSystem, "embed_images", None)
        assert run(*options)[0]["images"] == 19
    (emoji_folder / "emoji.json").write_text(json.dumps(rows), encoding="utf-8")
    assert run(*options, "--image_mode", "understand")[0]["preprocessing"] == "UniTokImageProcessor, understand, 48x48"


def one_of_two(rank: int, port: int, arguments: list[str]) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        os.environ[name] = str(rank)
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    PartialState._reset_state()
    zero_shot.main(arguments)


def test_two_processes_give_what_one_gives(unitok_folder, emoji_folder, run, tmp_path, capfd):
    options = ["--model", unitok_folder, "--dataset", "emoji", "--data", str(emoji_folder), "--batch_size", "4"]
    report, tensors = run(*options)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    output = tmp_path / "two.json"
    arguments = [*options, "--output", str(output), "--use_cpu", "--workers", "1"]
    start_processes(one_of_two, (port, arguments), nprocs=2, start_method="fork")  # spawned ones import all anew
    of_two, both = (
        load_file(output.with_suffix(".nearest.safetensors")),
        json.loads(output.read_text(encoding="utf-8")),
    )
    assert torch.equal(of_two["nearest"], tensors["nearest"]) and len(tensors["nearest"].unique(dim=0)) > 1
    torch.testing.assert_close(of_two["classifier"], tensors["classifier"])
    assert both["parts"] == report["parts"] and both["measured"] == report["measured"]
    assert capfd.readouterr().out.count("top-1") == 2  # the single one's table, and one of the two's


def test_mistakes_are_shown(unitok_folder, emoji_folder, run, tmp_path):
    report, tensors = run("--model", unitok_folder, "--dataset", "emoji", "--data", str(emoji_folder))
    wrong = (tensors["nearest"][:, 0] != torch.arange(NUM_EMOJI) % 10).sum().item()
    assert sum(row["images"] for part in report["parts"].values() for row in part["most_frequent_confusions"]) == wrong
    with Image.open(tmp_path / "out.png") as sheet:
        assert sheet.width > 8 * 128 and sheet.height > 128 * (wrong // 8)


def test_text_tower_gets_the_tokenizer_it_was_trained_with(unitok_folder, tokenizer_config, tmp_path):
    own, text = settings(model=unitok_folder), tokenizer_config.text_config
    image_processor = AutoImageProcessor.from_pretrained(unitok_folder)
    ids = zero_shot.text_encoder(own, text, image_processor)(["a red circle", "what " * 20])
    assert ids.shape == (2, 16) and ids[0, 0] == 1 and ids[1, -1] == 2 and (ids == 2).sum(dim=1).tolist() == [1, 1]

    text.vocab_size, text.eos_token_id, text.max_position_embeddings = 49408, 49407, 77  # as a converted one
    ids = zero_shot.text_encoder(own, text, image_processor)(["a red circle"])
    assert torch.equal(ids, open_clip.get_tokenizer("ViT-B-32")(["a red circle"]))
    train_text_tokenizer(["a"], vocab_size=300).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="end texts with token 49407.*text, which ends them with 2"):
        zero_shot.text_encoder(
            settings(model=unitok_folder, text_tokenizer=str(tmp_path / "text")), text, image_processor
        )


def test_model_without_a_text_tower_or_of_another_kind_is_refused(unitok_folder, clip_folder, tokenizer_config):
    tokenizer_config.text_config = None
    UniTokModel(tokenizer_config).save_pretrained(unitok_folder)
    for system, model, message in (
        ("unitok", unitok_folder, "unitok has no text tower"),
        ("unitok", clip_folder, "clip is a clip model, not a unitok or unitok_mllm one"),
        ("clip", unitok_folder, "unitok is a unitok model, not a clip one"),
    ):
        with pytest.raises(ValueError, match=message):
            zero_shot.SYSTEMS[system](settings(system=system, model=model), torch.device("cpu"))


@pytest.mark.parametrize(
    "folders, message",
    [
        (None, "there is no image folder"),
        (["red", "blue"], "val has no images"),
    ],
)
def test_wrong_image_folders_are_named(tmp_path, run, folders, message):
    for name in folders or []:
        (tmp_path / "val" / name).mkdir(parents=True)
    with pytest.raises(SystemExit, match=message):
        run("--images", str(tmp_path / "val"))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--dataset", "easy-vqa", "--model", "no/such"], "no model in no/such"),
        (
            ["--dataset", "easy-vqa", "--system", "siglip"],
            "system must be one of unitok, clip, open_clip, got 'siglip'",
        ),
        (["--dataset", "cifar"], "dataset must be one of easy-vqa, emoji, got 'cifar'"),
        ([], "give either --images FOLDER or --dataset NAME"),
        (["--images", "a", "--dataset", "emoji"], "give either --images FOLDER or --dataset NAME"),
        (
            ["--images", "a", "--templates", "none"],
            "templates must be openai, simple, or a prompt with one {} in it, got 'none'",
        ),
        (["--images", "a", "--image_mode", "crop"], "image_mode must be one of understand, reconstruct, classify"),
        (["--dataset", "easy-vqa", "--batch_size", "0"], "batch_size and limit must be at least 1"),
        (["--dataset", "emoji", "--data", "no/such"], "no/such has no emoji.json: python -m training.prepare_data"),
        (["--dataset", "easy-vqa", "--system", "clip", "--model", "./no/such"], "no/such"),
        (
            ["--dataset", "easy-vqa", "--system", "open_clip", "--model", "ViT-0"],
            "open_clip has no 'ViT-0': did you mean 'ViT-",
        ),
        (
            ["--dataset", "easy-vqa", "--system", "open_clip", "--model", "ViT-S-32", "--pretrained", "no.pt"],
            "pretrained is a file or a tag of ViT-S-32's (none), not 'no.pt'",
        ),
    ],
)
def test_errors_say_what_is_wrong(run, options, message):
    with pytest.raises(SystemExit) as error:
        run(*options)
    assert str(error.value).startswith("error: ") and message in str(error.value)


@pytest.mark.attack
def test_a_signal_keeps_what_is_classified_and_the_same_command_goes_on(unitok_folder, run, monkeypatch, capsys):
    options = ["--model", str(unitok_folder), "--dataset", "easy-vqa", "--limit", "8", "--batch_size", "1"]
    expected, tensors = run(*options, output="whole")
    embed_images, embedded = zero_shot.UniTokSystem.embed_images, []

    def told(self, pixels):
        embedded.append(len(pixels))
        if len(embedded) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return embed_images(self, pixels)

    monkeypatch.setattr(zero_shot.UniTokSystem, "embed_images", told)
    monkeypatch.setattr(zero_shot, "BATCHES_PER_SAVE", 2)
    with pytest.raises(SystemExit, match="The same command goes on from what is done") as end:
        run(*options)
    assert end.value.code == 143
    report, resumed = run(*options)
    assert len(embedded) == 6 + 4  # two batches of two were kept
    assert report["parts"] == expected["parts"] and torch.equal(resumed["nearest"], tensors["nearest"])
    assert "anew" not in capsys.readouterr().err
    run(*options, "--image_mode", "classify")
    assert "was measured with another image_mode: it is measured anew" in capsys.readouterr().err
