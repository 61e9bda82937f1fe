"""Text-to-image benchmarks, end to end on the shipped model."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import cleanfid.fid
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from transformers import AutoProcessor, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from eval import fid as fid_module
from eval import text_to_image as evaluation
from eval.clip_score import clip_scores
from eval.prompts import read_prompts


pytestmark = pytest.mark.full


ROOT = Path(__file__).parents[1]
TINY = ROOT / "unitok_mllm" / "checkpoints" / "tiny"
GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "cow", "count": 2}], "prompt": "a photo of two cows"},
]
FILES = {
    "genai": json.dumps(
        {
            "00000": {"id": "00000", "prompt": "A baker.", "models": {"DALLE_3": [4, 5, 5]}},
            "00007": {"id": "00007", "prompt": "No cat ", "models": {}},
        },
        indent=4,
    ),
    "geneval": "\n".join(map(json.dumps, GENEVAL)) + "\n",
    "mjhq": json.dumps({"0a1b": {"category": "people", "prompt": "a man"}, "9f": {"category": "logo", "prompt": "x"}}),
    "parti": 'Prompt\tCategory\tChallenge\tNote\n"Hi" on a wall\tArts\tBasic\t\r\na corgi\tAnimals\tBasic\tDALL-E\n',
    "text": "\na red circle\n\n  a blue triangle \r\n",
}
PROMPTS = {  # text, picture of sample 0, picture of sample 2, groups
    "genai": [
        ("A baker.", "00000.png", "00000_2.png", ("basic",)),
        ("No cat ", "00007.png", "00007_2.png", ("negation", "advanced")),
    ],
    "geneval": [
        ("a photo of a bench", "00000/samples/0000.png", "00000/samples/0002.png", ("single_object",)),
        ("a photo of two cows", "00001/samples/0000.png", "00001/samples/0002.png", ("counting",)),
    ],
    "mjhq": [
        ("a man", "people/0a1b.png", "people/0a1b_2.png", ("people",)),
        ("x", "logo/9f.png", "logo/9f_2.png", ("logo",)),
    ],
    "parti": [
        ('"Hi" on a wall', "00000.png", "00000_2.png", ("Arts", "Basic")),
        ("a corgi", "00001.png", "00001_2.png", ("Animals", "Basic")),
    ],
    "text": [
        ("a red circle", "00000.png", "00000_2.png", ()),
        ("a blue triangle", "00001.png", "00001_2.png", ()),
    ],
}


def arguments(prompts: Path, output: Path, *options: str) -> list[str]:
    paths = ["--model", str(TINY), "--prompts", str(prompts), "--output", str(output)]
    return [
        *paths,
        "--samples",
        "2",
        "--guidance",
        "5",
        "--temperature",
        "1",
        "--top_k",
        "20",
        "--device",
        "cpu",
        *options,
    ]


def pictures(folder: Path) -> dict[str, bytes]:
    paths = (folder / "images").rglob("*.png")
    return {path.relative_to(folder / "images").as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """Two prompts of GenEval."""
    path = tmp_path_factory.mktemp("prompts") / "evaluation_metadata.jsonl"
    path.write_text(FILES["geneval"], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def drawn(prompts, tmp_path_factory) -> Path:
    """A finished folder of 4 pictures, drawn one by one."""
    output = tmp_path_factory.mktemp("drawn")
    torch.set_num_threads(1)
    evaluation.main(arguments(prompts, output, "--batch_size", "1"))
    return output


@pytest.fixture
def clip_folder(tmp_path) -> Path:
    """A CLIP model that has learned nothing, with the text tokenizer's small vocabulary of letters."""
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary += [f"{letter}</w>" for letter in vocabulary[2:]]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[])
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1}
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**text, **sizes}, vision_config={**sizes, "image_size": 32, "patch_size": 16}, projection_dim=8
    )
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    CLIPProcessor(image_processor, tokenizer).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.mark.parametrize("given", [True, False], ids=["format given", "format found"])
@pytest.mark.parametrize("format", FILES)
def test_each_format_is_read(format, given, tmp_path):
    path = tmp_path / "prompts"
    path.write_bytes(b"\xef\xbb\xbf" + FILES[format].encode())  # a byte order mark is no part of a prompt
    if format == "genai":
        (tmp_path / "genai_skills.json").write_text(
            '{"basic": [0], "negation": [7], "advanced": [7]}', encoding="utf-8"
        )
    found, rows = read_prompts(path, format if given else "")
    assert found == format
    assert [(row.text, row.picture(0), row.picture(2), row.groups) for row in rows] == PROMPTS[format]
    assert [row.metadata for row in rows] == (GENEVAL if format == "geneval" else [None, None])


def test_lines_beside_genai_benchs_skills_are_numbered_as_the_skills_are(tmp_path):
    (tmp_path / "prompts.txt").write_text("A baker.\nTwo cats \n", encoding="utf-8")
    (tmp_path / "genai_skills.json").write_text('{"basic": [1], "advanced": [2], "counting": [2]}', encoding="utf-8")
    format, rows = read_prompts(tmp_path / "prompts.txt")
    assert format == "genai"
    assert [(row.text, row.picture(0, "jpg"), row.groups) for row in rows] == [
        ("A baker.", "00001.jpg", ("basic",)),
        ("Two cats", "00002.jpg", ("advanced", "counting")),
    ]


def test_one_line_of_geneval_is_geneval(tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps(GENEVAL[0]), encoding="utf-8")
    format, (prompt,) = read_prompts(tmp_path / "one.jsonl")
    assert (format, prompt.text) == ("geneval", "a photo of a bench")


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "there is no prompt file"),
        ("", "is empty"),
        ("\n \n", "is empty"),
        ('{"a": {"prompt"', "cannot read the prompt file"),
        ('["a dog"]', "--format names one"),
        ('{"a": {"caption": "a dog"}}', "--format names one"),
        ('{"a": {"id": "a", "prompt": " "}}', "prompt a of"),
        ('{"../a": {"id": "a", "prompt": "dog"}}', "prompt '../a' of"),
    ],
)
def test_unusable_prompt_files_are_named(content, message, tmp_path):
    path = tmp_path / "prompts.any"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(path)
    assert str(path) in str(error.value)


def test_folder_is_laid_out_as_geneval_expects(drawn):
    assert sorted(pictures(drawn)) == [f"0000{i}/samples/000{sample}.png" for i in (0, 1) for sample in (0, 1)]
    assert len(set(pictures(drawn).values())) == 4
    for i, row in enumerate(GENEVAL):
        assert json.loads((drawn / "images" / f"0000{i}" / "metadata.jsonl").read_text(encoding="utf-8")) == row
    results = json.loads((drawn / "results.json").read_text(encoding="utf-8"))
    assert results["benchmark"] == "geneval"
    assert (results["prompts"], results["pictures"], results["drawing"]["drawn"]) == (2, 4, 4)
    assert results["prompt"] == "{prompt} Generate an image based on this description.<boi>"
    assert results["settings"]["guidance"] == 5.0 and results["seed"] == 0 and results["versions"]["torch"]
    with Image.open(drawn / "sheet.png") as sheet:
        assert sheet.width > 4 * 128


def test_pictures_are_those_of_plain_generation(drawn):
    model, processor = evaluation.load_model(str(TINY), "cpu")
    inputs = processor(text=[GENEVAL[1]["prompt"]], generation_mode="image")
    options = {"guidance_scale": 5.0, "temperature": 1.0, "top_k": 20, "seed": evaluation.picture_seed(0, 1, 1)}
    codes = model.generate(**inputs, generation_mode="image", **options)
    (picture,) = processor.image_processor.post_process(model.decode_images(codes))
    assert evaluation.picture_bytes(picture) == pictures(drawn)["00001/samples/0001.png"]


def test_two_processes_and_other_batches_draw_the_same(prompts, drawn, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(20000 + os.getpid() % 20000), "-m", "eval.text_to_image"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += arguments(prompts, tmp_path / "two", "--batch_size", "1")
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    assert pictures(tmp_path / "two") == pictures(drawn)
    results = json.loads((tmp_path / "two" / "results.json").read_text(encoding="utf-8"))
    assert (results["drawing"]["drawn"], results["drawing"]["processes"]) == (4, 2)

    evaluation.main(arguments(prompts, tmp_path / "three", "--batch_size", "3"))
    assert pictures(tmp_path / "three") == pictures(drawn)


@pytest.mark.attack
def test_a_signal_leaves_whole_pictures_and_the_same_command_goes_on(prompts, drawn, tmp_path, monkeypatch):
    draw, batches = evaluation.draw, []

    def told(*args, **options):
        batches.append(args)
        if len(batches) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(*args, **options)

    monkeypatch.setattr(evaluation, "draw", told)
    command = arguments(prompts, tmp_path / "told", "--batch_size", "1")
    with pytest.raises(SystemExit, match="Finished pictures and metrics are kept; the same command goes on") as end:
        evaluation.main(command)
    assert end.value.code == 143
    assert pictures(tmp_path / "told").items() < pictures(drawn).items() and len(pictures(tmp_path / "told")) == 2
    evaluation.main(command)
    assert pictures(tmp_path / "told") == pictures(drawn) and len(batches) == 5


@pytest.mark.attack
def test_only_missing_and_broken_pictures_are_drawn_again(prompts, drawn, tmp_path, capsys):
    before, times = pictures(drawn), {}
    first, second, *others = [drawn / "images" / name for name in sorted(before)]
    first.unlink()
    second.write_bytes(before["00000/samples/0001.png"][:-30])
    for path in others:
        times[path] = path.stat().st_mtime_ns
    evaluation.main(arguments(prompts, drawn, "--batch_size", "3"))  # one of the others is in their batch
    assert pictures(drawn) == before
    assert {path: path.stat().st_mtime_ns for path in others} == times
    assert json.loads((drawn / "results.json").read_text(encoding="utf-8"))["drawing"]["drawn"] == 2
    assert "4 pictures of 2 prompts, 2 drawn" in capsys.readouterr().out


def test_nothing_is_loaded_when_nothing_is_missing_and_a_part_can_be_asked_for(prompts, drawn, monkeypatch):
    monkeypatch.setattr(evaluation, "load_model", None)
    evaluation.main(arguments(prompts, drawn, "--limit", "1"))
    assert json.loads((drawn / "results.json").read_text(encoding="utf-8"))["pictures"] == 2


def test_pictures_of_other_settings_are_refused(prompts, drawn, tmp_path):
    def error(*options: str, output: Path = drawn, file: Path = prompts) -> str:
        with pytest.raises(SystemExit) as stopped:
            evaluation.main(arguments(file, output, *options))
        return str(stopped.value)

    assert "guidance was 5.0, now 2.0" in error("--guidance", "2")
    assert "seed was 0, now 7" in error("--seed", "7")
    (tmp_path / "other.txt").write_text("a photo of a bench", encoding="utf-8")
    assert "format was geneval, now text; prompts_sha256 was" in error(file=tmp_path / "other.txt")
    (tmp_path / "mine" / "images").mkdir(parents=True)
    assert "has images/ but no settings.json" in error(output=tmp_path / "mine")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--prompts", "no/such.json"], "there is no prompt file no/such.json"),
        (["--model", "no/such/folder"], "no model in no/such/folder"),
        (["--format", "coco"], "format must be one of genai, geneval, mjhq, parti, text, got coco"),
        (["--samples", "0"], "samples must be at least 1, got 0"),
        (["--guidance", "0.5"], "guidance_scale must be at least 1"),
        (["--fid_reference", "no/such"], "FID needs at least 2 pictures"),
        (
            ["--fid_reference", "FOLDER", "--inception_weights", "no.pth"],
            "fid needs Inception's weights for torch-fidelity (no.pth): ",
        ),
        (
            ["--fid_reference", "FOLDER", "--fid_tool", "clean-fid", "--inception_weights", "no.pt"],
            "(no.pt): clean-fid needs its weights in a file called inception-2015-12-05.pt. Give --inception_weights",
        ),
        (["--fid_size", "-1"], "fid_size (-1) is not between 0 and 16384"),
        (
            ["--clip", str(TINY)],
            f"cannot load a CLIP model from {TINY}: {TINY} is a unitok_mllm model, not a clip one",
        ),
        (["--fid_tool", "fid"], "fid_tool must be one of torch-fidelity, clean-fid, got fid"),
        (["--image_format", "gif"], "image_format must be one of png, jpg, got gif"),
        (
            ["--clip", "no/clip", "--fid_reference", "FOLDER", "--inception_weights", "no.pth"],
            "cannot load a CLIP model from no/clip: ",
        ),
        (["--vqa_score", "clip-flant5-xxl"], f"--vqa_score needs t2v-metrics, which {sys.executable} has not"),
    ],
)
def test_errors_take_one_line_and_come_before_the_work(options, message, prompts, drawn, tmp_path):
    with pytest.raises(SystemExit) as error:
        options = [str(drawn / "images") if option == "FOLDER" else option for option in options]
        evaluation.main(arguments(prompts, tmp_path / "out", *options))
    assert str(error.value).startswith("error: ") and message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_long_prompts_are_named_or_truncated(tmp_path):
    processor = AutoProcessor.from_pretrained(TINY)
    long = "a red circle and " * 300
    (tmp_path / "long.txt").write_text(f"a red circle\n{long}", encoding="utf-8")
    with pytest.raises(
        SystemExit, match=r"prompt 00001 is too long: its \d+ tokens and the 16 of an image do not fit"
    ):
        evaluation.main(arguments(tmp_path / "long.txt", tmp_path / "out"))
    assert not (tmp_path / "out").exists()

    _, rows = read_prompts(tmp_path / "long.txt")
    for limit in (100, 101, 512):
        short, cut = evaluation.fit_prompts(rows, processor, limit, 16, truncate=True)
        assert short == "a red circle" and rows[1].text.startswith(cut)
        lengths = [
            processor(text=[rows[1].text[:n]], generation_mode="image")["input_ids"].shape[1]
            for n in (len(cut), len(cut) + 10)
        ]
        assert lengths[0] <= limit - 16 < lengths[1]
    with pytest.raises(ValueError, match="prompt 00001 is too long"):
        evaluation.fit_prompts(rows[1:], processor, 20, 16, truncate=True)


def test_clip_score_is_that_of_the_hand_computation(prompts, drawn, clip_folder, monkeypatch):
    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), AutoProcessor.from_pretrained(clip_folder)
    paths = [drawn / "images" / name for name in sorted(pictures(drawn))]
    texts = [row["prompt"] for row in GENEVAL for _ in range(2)]
    cosines = []
    for path, text in zip(paths, texts):
        pixel_values = processor.image_processor(Image.open(path), return_tensors="pt")["pixel_values"]
        input_ids = torch.tensor([processor.tokenizer(text)["input_ids"][:11] + [1]])  # cut to 12
        vision = model.visual_projection(model.vision_model(pixel_values).pooler_output)
        textual = model.text_projection(model.text_model(input_ids).pooler_output)
        cosines.append(torch.cosine_similarity(vision, textual).item())
    assert len(set(cosines)) == 4
    expected = [100 * max(cosine, 0) for cosine in cosines]
    assert clip_scores(paths, texts, str(clip_folder), batch_size=3) == pytest.approx(expected, abs=1e-3)

    model.visual_projection.weight.data.neg_()  # turns all cosines round, so that one of two is above 0
    model.save_pretrained(clip_folder)
    opposite = [100 * max(-cosine, 0) for cosine in cosines]
    assert max(opposite) > 0.1
    evaluation.main(arguments(prompts, drawn, "--clip", str(clip_folder), "--batch_size", "3"))
    results = json.loads((drawn / "results.json").read_text(encoding="utf-8"))["metrics"]["clip_score"]
    assert results["mean"] == pytest.approx(sum(opposite) / 4, abs=1e-3)
    assert results["by_prompt"]["00001"] == pytest.approx(sum(opposite[2:]) / 2, abs=1e-3)
    assert results["by_group"]["counting"] == results["by_prompt"]["00001"]

    monkeypatch.setattr(evaluation, "clip_scores", None)  # a finished metric is kept
    evaluation.main(arguments(prompts, drawn, "--clip", str(clip_folder)))
    assert json.loads((drawn / "results.json").read_text(encoding="utf-8"))["metrics"]["clip_score"] == results


def test_a_missing_clip_model_and_a_broken_picture_are_named(clip_folder, tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=f"cannot load a CLIP model from {tmp_path}"):
        clip_scores([tmp_path / "broken.png"], ["a"], str(tmp_path))
    with pytest.raises(ValueError, match="cannot read image .*broken.png"):
        clip_scores([tmp_path / "broken.png"], ["a"], str(clip_folder))


class RandomInception(FeatureExtractorInceptionV3):
    """As it is before weights are loaded."""

    def load_state_dict(self, state_dict):
        pass


def test_fid_is_that_of_torch_fidelity(prompts, drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(fid_module, "LAYER", "64")  # the first of Inception's layers: a small covariance
    weights = tmp_path / "inception.pth"
    torch.save({}, weights)
    random = RandomInception("random", ["64"], feature_extractor_weights_path=weights)
    torch.save(random.state_dict(), weights)

    reference = tmp_path / "reference" / "deep"
    reference.mkdir(parents=True)
    for i, color in enumerate(("red", "blue", "green")):
        Image.new("RGB", (64, 64), color).save(reference / f"{i}.png")
    options = ["--fid_reference", str(reference.parent), "--inception_weights", str(weights)]
    evaluation.main(arguments(prompts, drawn, *options))
    results = json.loads((drawn / "results.json").read_text(encoding="utf-8"))["metrics"]["fid"]
    expected = torch_fidelity.calculate_metrics(
        input1=str(drawn / "images"),
        input2=str(reference.parent),
        fid=True,
        samples_find_deep=True,
        cuda=False,
        feature_layer_fid="64",
        feature_extractor_weights_path=str(weights),
    )["frechet_inception_distance"]
    assert expected > 0.01 and results["mean"] == pytest.approx(expected, rel=1e-6)
    assert results["reference_pictures"] == 3
    numbers = json.loads((drawn / "results.json").read_text(encoding="utf-8"))["numbers"]
    (number,) = [number for number in numbers if number["metric"] == "FID"]
    assert number == {
        "benchmark": "GenEval",
        "metric": "FID",
        "value": results["mean"],
        "unit": "",
        "protocol": {
            "split": "2 of 2 prompts, 2 a prompt",
            "prompt": "{prompt} Generate an image based on this description.",
            "sampling": "guidance 5, plausibility 0.1, temperature 1, top-k 20, top-p 1",
            "images": "png files, 64x64",
            "reference": "3 pictures of 64x64",
            "tool": "torch-fidelity",
        },
    }

    Image.new("RGB", (64, 64), "black").save(reference / "0.png")  # another reference is measured again
    evaluation.main(arguments(prompts, drawn, *options))
    again = json.loads((drawn / "results.json").read_text(encoding="utf-8"))["metrics"]["fid"]["mean"]
    assert abs(again - results["mean"]) > 0.01


class Layers(torch.nn.Module):
    """In the place of Inception's: 64 colours of 1x1, 4x4 of them, (B, 3, 299, 299) -> (B, 64)."""

    def __init__(self, dims: int):
        super().__init__()
        self.conv, self.pool = torch.nn.Conv2d(3, dims // 16, 7), torch.nn.AdaptiveAvgPool2d((4, 4))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.pool(self.conv(pixels).relu()).flatten(1)


class Network(torch.nn.Module):
    """A file of it is read as clean-fid's Inception."""

    def __init__(self, dims: int):
        super().__init__()
        self.layers = Layers(dims)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.layers(pixels)


@pytest.fixture
def noise(tmp_path) -> tuple[Path, Path]:
    """Two folders of pictures, of 40x40 and of 50x30."""
    for name, shape, count in (("a", (40, 40, 3), 5), ("b", (30, 50, 3), 7)):
        (tmp_path / name).mkdir()
        for i in range(count):
            pixels = torch.randint(0, 256, shape, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    return tmp_path / "a", tmp_path / "b"


def test_clean_fid_is_that_of_clean_fid(noise):
    network = Network(64)
    files = [fid_module.PictureFiles(fid_module.reference_pictures(str(folder))) for folder in noise]
    values = [fid_module.clean_fid(*files, network, batch_size, "cpu") for batch_size in (2, 16)]
    expected = cleanfid.fid.compute_fid(
        *map(str, noise), custom_feat_extractor=network, num_workers=0, device=torch.device("cpu"), verbose=False
    )
    assert expected > 0.01 and values == pytest.approx([expected, expected], rel=1e-4)
    same = fid_module.clean_fid(files[0], files[0], network, 4, "cpu")
    assert abs(same) < 1e-3 * expected


def test_clean_fids_weights_are_read_from_a_file(tmp_path, monkeypatch):
    network = Network(2048).eval()
    file = tmp_path / fid_module.CLEAN_WEIGHTS
    torch.jit.script(network).save(str(file))
    loaded = fid_module.load_inception("clean-fid", str(file))
    pixels = torch.rand(2, 3, 299, 299) * 255
    torch.testing.assert_close(loaded(pixels), network((pixels - 128) / 128))

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(
        ValueError, match=r"fid needs .* clean-fid \(https://.*-12-05.pt\): .*Give --inception_weights"
    ):
        fid_module.load_inception("clean-fid", "")


def test_jpeg_pictures_are_scored_by_clean_fid_under_the_published_sampling(noise, tmp_path, monkeypatch):
    file = tmp_path / fid_module.CLEAN_WEIGHTS
    torch.jit.script(Network(2048)).save(str(file))
    network = Network(64)
    monkeypatch.setattr(fid_module, "load_inception", lambda *_: network)  # few dims: an instant
    meta = tmp_path / "meta_data.json"
    meta.write_text(FILES["mjhq"], encoding="utf-8")
    options = ["--samples", "1", "--guidance", "7", "--temperature", "0.9", "--top_k", "2048", "--top_p", "0.96"]
    options += [
        "--plausibility",
        "0",
        "--image_format",
        "jpg",
        "--fid_reference",
        str(noise[0]),
        "--fid_tool",
        "clean-fid",
    ]
    output = tmp_path / "out"
    evaluation.main(arguments(meta, output, *options, "--fid_size", "64", "--inception_weights", str(file)))
    drawings = sorted((output / "images").rglob("*.jpg"))
    assert [path.relative_to(output / "images").as_posix() for path in drawings] == ["logo/9f.jpg", "people/0a1b.jpg"]
    with Image.open(drawings[0]) as picture:
        assert picture.format == "JPEG" and picture.quantization[0][0] == 8  # of Pillow's default quality, 75
    reference = tmp_path / "scaled"
    reference.mkdir()
    for path in noise[0].iterdir():
        Image.open(path).resize((64, 64), Image.Resampling.BICUBIC).save(reference / path.name)
    expected = cleanfid.fid.compute_fid(
        str(output / "images"),
        str(reference),
        custom_feat_extractor=network,
        num_workers=0,
        device=torch.device("cpu"),
        verbose=False,
    )
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert results["metrics"]["fid"]["mean"] == pytest.approx(expected, rel=1e-4)
    (number,) = results["numbers"]
    assert (number["benchmark"], number["metric"]) == ("MJHQ-30K", "FID")
    assert number["protocol"] == {
        "split": "2 of 2 prompts, 1 a prompt",
        "prompt": "{prompt} Generate an image based on this description.",
        "sampling": "guidance 7, temperature 0.9, top-k 2048, top-p 0.96",
        "images": "jpg files, 64x64",
        "reference": "5 pictures of 64x64",
        "tool": "clean-fid",
    }


def test_pictures_for_fid_are_of_one_size_or_named(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    Image.new("RGB", (8, 8), "red").save(paths[0])
    Image.new("RGB", (8, 6), "blue").save(paths[1])
    with pytest.raises(ValueError, match=r"b.png is \(8, 6\), but .*a.png is \(8, 8\): set --fid_size"):
        fid_module.PictureFiles(paths)[1]
    fitted = fid_module.PictureFiles(paths, size=4)[1]
    assert torch.equal(fitted, torch.tensor([0, 0, 255], dtype=torch.uint8)[:, None, None].expand(3, 4, 4))


def test_vqa_score_is_asked_for_each_picture_and_its_prompt(prompts, drawn, tmp_path, monkeypatch):
    """The package itself cannot be installed beside this project's torch: a stand-in with its interface answers."""
    (tmp_path / "t2v_metrics.py").write_text(
        "import numpy\n"
        "from pathlib import Path\n"
        "def get_score_model(model, device):\n"
        "    assert (model, device) == ('clip-flant5-xxl', 'cpu')\n"
        "    return Scorer()\n"
        "class Scorer:\n"
        "    def batch_forward(self, dataset, batch_size):\n"
        "        rows = [Path(r['images'][0]).stat().st_size + len(r['texts'][0]) for r in dataset]\n"
        "        return numpy.array(rows).reshape(-1, 1, 1) / 2**16\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    evaluation.main(arguments(prompts, drawn, "--vqa_score", "clip-flant5-xxl"))
    results = json.loads((drawn / "results.json").read_text(encoding="utf-8"))["metrics"]["vqa_score"]
    sizes = [len(data) for _, data in sorted(pictures(drawn).items())]
    expected = [sum(sizes[2 * i : 2 * i + 2]) / 2 + len(row["prompt"]) for i, row in enumerate(GENEVAL)]
    assert results["by_prompt"] == {"00000": expected[0] / 2**16, "00001": expected[1] / 2**16}
    numbers = json.loads((drawn / "results.json").read_text(encoding="utf-8"))["numbers"]
    by_metric = {number["metric"]: number for number in numbers if number["metric"].startswith("VQAScore")}
    assert by_metric["VQAScore, counting"]["value"] == expected[1] / 2**16
    assert by_metric["VQAScore"]["protocol"]["tool"] == "VQAScore by clip-flant5-xxl"
