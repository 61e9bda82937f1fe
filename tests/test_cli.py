"""The command line, on a random model in a temporary folder."""

import json
import math
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import easy_vqa
import numpy as np
import pytest
import torch
from PIL import Image
from test_generation_unitok import IMPOSSIBLE
from test_processing_unitok import ODD_TEXTS
from transformers import LlamaConfig, LlamaForCausalLM, set_seed
from typer.testing import CliRunner, Result

import unitok_mllm
from unitok_mllm import UniTokConfig, UniTokImageProcessor, UniTokMLLMForConditionalGeneration, UniTokModel, cli, sheet
from unitok_mllm.drawing_unitok import MAX_GUIDANCE
from unitok_mllm.processing_unitok import UniTokMLLMProcessor


SIZE = 48
REPOSITORY = Path(unitok_mllm.__file__).parent.parent


def small_config(**overrides) -> UniTokConfig:
    config = UniTokConfig.preset(
        "tiny",
        image_size=SIZE,
        stem_width=8,
        stage_dims=(8, 16),
        stage_depths=(1, 1),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_codebooks=4,
        codebook_size=32,
        quantizer_dim=24,
    )
    return UniTokConfig(vision_config=config.vision_config, text_config=None, **overrides)


@pytest.fixture(scope="session")
def models(tmp_path_factory, text_tokenizer) -> Path:
    """A folder with `mllm` and the visual `tokenizer` in it."""
    set_seed(0)
    folder = tmp_path_factory.mktemp("models")
    image_processor = UniTokImageProcessor(size={"height": SIZE, "width": SIZE})
    processor = UniTokMLLMProcessor(image_processor, text_tokenizer, boi_token="<boi>", eoi_token="<eoi>")
    language_model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=2,
            initializer_range=0.3,  # answers that depend on the question and the image
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    visual = UniTokModel(small_config())
    mllm = UniTokMLLMForConditionalGeneration.from_parts(
        language_model,
        visual,
        depth_config={"num_hidden_layers": 1, "hidden_size": 32},
        embedder_dim=32,
        embedder_heads=2,
        **processor.config_token_ids(),
    )
    for name, model, its_processor in (
        ("mllm", mllm, processor),
        ("tokenizer", visual, image_processor),
    ):
        model.save_pretrained(folder / name)
        its_processor.save_pretrained(folder / name)
    return folder


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "shapes.png"
    noisy_image(96, 64).save(path)
    return path


def noisy_image(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def run(*args: object) -> Result:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def succeed(*args: object) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(*args: object) -> str:
    """The one line of a failure."""
    result = run(*args)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("seed ")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) > 15
    return lines[0].removeprefix("error: ")


def run_process(*args: object, cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "unitok_mllm.cli", *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


# help and version


@pytest.mark.parametrize("command", ["demo", "reconstruct", "ask", "generate", "edit", "convert", "serve"])
def test_help(command):
    text = " ".join(succeed(command, "--help").replace("│", " ").split())  # lines are wrapped
    assert "Usage" in text and command in text
    if command != "convert":
        assert "the model shipped" in text


def test_version():
    assert succeed("--version") == f"unitok-mllm {unitok_mllm.__version__}\n"


def test_shipped_model_is_the_default():
    assert cli.SHIPPED_MODEL == Path(unitok_mllm.__file__).parent / "checkpoints" / "tiny"


@pytest.mark.parametrize(
    "words, said",
    [
        ("generate circle --tempreture 1", "No such option: --tempreture (Possible options: --temperature)"),
        ("generat circle", "No such command 'generat'. Did you mean 'generate'?"),
        ("ask", "Missing argument 'IMAGE'."),
        (
            "generate circle --count many",
            "Invalid value for '--count': Input should be a valid integer, unable to pars",
        ),
        (
            "generate circle --top_k -1",
            "Invalid value for '--top-k': Input should be greater than or equal to 0, got -1",
        ),
    ],
)
def test_a_wrong_command_line_takes_one_line(words, said):
    assert fail(*words.split()).startswith(said)


def test_ctrl_c_takes_one_line(models, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "draw_codes", interrupted)
    result = run("generate", "a circle", "--top_k", "3", "--model", models / "mllm")
    assert result.exit_code == 130
    assert result.stderr.endswith("\nInterrupted. The same command begins again.\n")


# reconstruct


def test_reconstruct_several_images(workplace, models, picture):
    square = workplace / "square.png"
    noisy_image(SIZE, SIZE).save(square)
    lines = succeed("reconstruct", picture, square, "--output", "new/out", "--model", models / "mllm").splitlines()
    assert [line.split()[0] for line in lines] == [
        "new/out/shapes_reconstruction.png",
        "new/out/square_reconstruction.png",
    ]
    assert all("PSNR" in line and line.endswith("36 codes") for line in lines)
    assert Image.open("new/out/shapes_reconstruction.png").size == (2 * SIZE, SIZE * 64 // 96)  # without padding
    assert Image.open("new/out/square_reconstruction.png").size == (2 * SIZE, SIZE)


def test_reconstruct_is_the_tokenizers(workplace, models):
    image = noisy_image(SIZE, SIZE)
    image.save("square.png")
    line = succeed("reconstruct", "square.png", "--model", models / "tokenizer")
    pair = np.asarray(Image.open("square_reconstruction.png"))
    original, reconstruction = pair[:, :SIZE], pair[:, SIZE:]
    assert (original == np.asarray(image)).all()  # of the model's own size: as it is

    model, processor = cli.load(models / "tokenizer", tokenizer_only=True)
    pixel_values = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = model.decode(model.encode(pixel_values.to(model.device)))
    assert (reconstruction == np.asarray(processor.post_process(expected)[0])).all()
    error = np.square(original.astype(float) - reconstruction).mean()
    assert f"PSNR {10 * np.log10(255**2 / error):.2f} dB" in line


def test_reconstruct_does_not_overwrite(workplace, models, picture):
    names = [succeed("reconstruct", picture, "--model", models / "tokenizer").split()[0] for _ in range(2)]
    assert names == ["shapes_reconstruction.png", "shapes_reconstruction-1.png"]
    assert Path(names[0]).read_bytes() == Path(names[1]).read_bytes()


def test_psnr_of_equal_pictures_is_infinite():
    assert cli.psnr(noisy_image(8, 8), noisy_image(8, 8)) == float("inf")


@pytest.mark.parametrize("size", [(48, 48), (96, 64), (10, 30), (200, 30)])
def test_picture_area_is_the_processors(size):
    white = Image.new("RGB", size, "white")
    pixels = UniTokImageProcessor(size={"height": SIZE, "width": SIZE})(white)["pixel_values"][0]
    left, top, right, bottom = cli.picture_area(size, (SIZE, SIZE))
    rows, columns = (pixels.mean(dim=0) > 0.5).nonzero(as_tuple=True)  # the padding is grey
    seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert all(abs(int(a) - b) <= 1 for a, b in zip(seen, (left, top, right, bottom)))


# ask


def direct_answer(folder: Path, image: Image.Image, question: str, max_new_tokens: int, **options) -> str:
    model, processor = cli.load(folder)
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True, **options
    ).to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_ask_prints_the_answer_alone(workplace, models, picture):
    answer = succeed("ask", picture, "what is it?", "--model", models / "mllm", "--max-new-tokens", 5)
    assert answer.strip() == direct_answer(models / "mllm", Image.open(picture), "what is it?", 5) != ""


@pytest.mark.parametrize(("name", "mode"), [("a.webp", "RGB"), ("b.png", "RGBA"), ("c.jpg", "CMYK"), ("d.gif", "P")])
def test_ask_takes_any_image(workplace, models, name, mode):
    noisy_image(30, 50).convert(mode).save(name)
    assert succeed("ask", name, "what is it?", "--model", models / "mllm", "--max-new-tokens", 2).strip()


def test_ask_chooses_among_answers(models, picture):
    options = ("--choices", "red, a blue circle,no", "--model", models / "mllm")
    result = run("ask", picture, "what color?", *options)
    assert result.exit_code == 0, result.stderr
    scores = {name: float(score) for name, score in re.findall(r"(.+): (-[\d.]+)", result.stderr)}
    assert list(scores) == ["red", "a blue circle", "no"]
    assert result.stdout == f"{max(scores, key=scores.get)}\n"
    assert fail("ask", picture, "what?", "--choices", "red,,blue") == "one of the choices is empty: 'red,,blue'"
    assert fail("ask", picture, "what?", "--by-length") == "--by-length needs --choices"


# generate


def test_generate_is_reproducible_and_overwrites_nothing(workplace, models):
    options = ("--count", 2, "--seed", 7, "--model", models / "mllm")
    first, second = (succeed("generate", "a red circle", *options).split() for _ in range(2))
    assert first == ["unitok-drawing.png", "unitok-drawing-1.png"]
    assert second == ["unitok-drawing-2.png", "unitok-drawing-3.png"]
    contents = [Path(name).read_bytes() for name in first + second]
    assert contents[:2] == contents[2:] and contents[0] != contents[1]
    assert Image.open(first[0]).size == (SIZE, SIZE)
    single = succeed("generate", "a red circle", "--seed", 7, "--model", models / "mllm", "--output", "one.png")
    difference = np.asarray(Image.open(single.strip()), int) - np.asarray(Image.open(first[0]), int)
    assert np.abs(difference).max() <= 1  # a sample does not depend on how many there are, but for rounding


def test_generate_passes_every_option_on(workplace, models, monkeypatch):
    seen = {}
    generate = UniTokMLLMForConditionalGeneration.generate_image_codes
    monkeypatch.setattr(
        UniTokMLLMForConditionalGeneration,
        "generate_image_codes",
        lambda self, *args, **kwargs: seen.update(kwargs) or generate(self, *args, **kwargs),
    )
    options = {"guidance": 2.5, "plausibility": 0.25, "temperature": 0.5, "top-k": 9, "top-p": 0.75, "seed": 3}
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    succeed("generate", "a red circle", *flags, "--model", models / "mllm")
    expected = {"guidance_scale": 2.5, "plausibility": 0.25, "temperature": 0.5, "top_k": 9, "top_p": 0.75, "seed": 3}
    assert {name: seen[name] for name in expected} == expected


def test_generate_keeps_the_best_candidates_and_shows_all(workplace, models, saved_mllm):
    options = ("--candidates", 4, "--count", 2, "--seed", 7, "--sheet", "all.png", "--model", saved_mllm)
    result = run("generate", "a red circle", *options)
    assert result.exit_code == 0, result.stderr
    lines = re.findall(r"sample (\d): (-?[\d.]+)", result.stderr)
    scores = [float(score) for _, score in lines]
    assert sorted(number for number, _ in lines) == list("1234") and scores == sorted(scores, reverse=True)
    kept = [Image.open(path).info for path in result.stdout.split()]
    assert [(info["sample"], info["score"]) for info in kept] == [(f"{n} of 4", score) for n, score in lines[:2]]
    assert Image.open("all.png").width > 4 * 128
    every = ("--count", 4, "--seed", 7, "--model", saved_mllm, "--output", "every.png")
    plain = [np.asarray(Image.open(path), int) for path in succeed("generate", "a red circle", *every).split()]
    for path, (number, _) in zip(result.stdout.split(), lines):
        assert np.abs(np.asarray(Image.open(path), int) - plain[int(number) - 1]).max() <= 1
    few = ("--candidates", 2, "--count", 3, "--model", saved_mllm)
    assert fail("generate", "a red circle", *few) == "cannot keep 3 of only 2 candidates"
    message = fail("generate", "a red circle", "--sheet", "all.png", "--model", saved_mllm)
    assert message == "--sheet shows candidates: set --candidates to at least 2"
    message = fail("generate", "a circle", "--candidates", 2, "--model", models / "mllm")
    assert "the model's visual tokenizer has no text tower" in message


def test_generate_draws_anew_without_a_seed(workplace, models):
    results = [run("generate", "a red circle", "--model", models / "mllm") for _ in range(2)]
    seeds = [result.stderr.split("seed ")[1].split()[0] for result in results]
    assert seeds[0] != seeds[1]
    again = succeed("generate", "a red circle", "--seed", seeds[1], "--model", models / "mllm").strip()
    assert Path(again).read_bytes() == Path(results[1].stdout.strip()).read_bytes()


def test_drawings_go_into_a_new_folder_with_their_seed_in_the_file_and_on_the_screen(workplace, models):
    options = ("--count", 2, "--seed", 7, "--guidance", 2, "--model", models / "mllm")
    result = run("generate", "a boat \u26f5", "--output", "new/deep/boat.png", *options)
    assert result.exit_code == 0 and "seed 7\n" in result.stderr
    files = result.stdout.split()
    assert files == ["new/deep/boat.png", "new/deep/boat-1.png"]
    for number, file in enumerate(files, start=1):
        with Image.open(file) as picture:
            assert picture.text == {
                "prompt": "a boat \u26f5",
                "sample": f"{number} of 2",
                "guidance_scale": "2.0",
                "plausibility": "0.0",
                "temperature": "0.7",
                "top_k": "20",
                "top_p": "1.0",
                "seed": "7",
            }


# edit


def test_edit_is_the_models(workplace, models, picture):
    mllm = UniTokMLLMForConditionalGeneration.from_pretrained(models / "mllm").eval()
    processor = UniTokMLLMProcessor.from_pretrained(models / "mllm")
    scales = ("--guidance", 2, "--image-guidance", 1.5)
    out = succeed("edit", picture, "make it blue", *scales, "--model", models / "mllm").strip()
    assert out == "unitok-edit.png"
    inputs = processor(images=Image.open(picture), text="make it blue", generation_mode="edit")
    codes = mllm.generate(
        **inputs, generation_mode="image", do_sample=False, guidance_scale=2, image_guidance_scale=1.5
    )
    (expected,) = processor.post_process_multimodal_output(mllm.decode_images(codes), generation_mode="image")
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(expected))
    assert succeed("edit", picture, "make it blue", "--model", models / "mllm").strip() == "unitok-edit-1.png"


def test_edit_needs_words_and_a_picture(workplace, models, picture):
    assert fail("edit", picture, "  ") == "the instruction is empty"
    Path("text.png").write_text("no image", encoding="utf-8")
    assert "text.png" in fail("edit", "text.png", "make it blue", "--model", models / "mllm")
    assert "image" in fail("edit", picture, "make it blue", "--image-guidance", 0.5, "--model", models / "mllm")


# demo


def test_demo_shows_the_models_answers(workplace, models):
    out = succeed("demo", "--images", 3, "--seed", 1, "--model", models / "mllm", "--output", "sheet.png")
    assert out.splitlines()[-1] == "picture: sheet.png"
    assert "reconstructions: 3, 36 codes each, mean PSNR" in out
    for line in ("it draws: 24", "it draws emoji: 12", "it recolors: 8"):
        assert f"{line} pairs of pictures" in out
    width, height = Image.open("sheet.png").size
    assert 1500 < width < 2500 and 2000 < height < 3000

    right = 0
    for path, rows in sheet.choose_questions(easy_vqa, 3, 1).items():
        for question, truth in rows:
            answer = direct_answer(models / "mllm", Image.open(path), question, 8)
            right += answer == truth
            assert f"{'right' if answer == truth else 'WRONG'}  {question} {answer}" in out
    assert f"answers: {right} of 9 right" in out


def test_demo_questions_are_of_the_benchmark():
    chosen = sheet.choose_questions(easy_vqa, 5, 0)
    paths = {path: number for number, path in easy_vqa.get_test_image_paths().items()}
    rows = set(zip(*easy_vqa.get_test_questions()))
    assert len(chosen) == 5 and chosen != sheet.choose_questions(easy_vqa, 5, 1)
    assert chosen == sheet.choose_questions(easy_vqa, 5, 0)
    for path, questions in chosen.items():
        assert len(questions) == 3
        assert all((question, answer, paths[path]) in rows for question, answer in questions)


def test_sheet_marks_right_and_wrong_answers():
    def marks(answer: str) -> tuple[bool, bool]:
        reading = sheet.Reading(
            noisy_image(8, 8), noisy_image(8, 8), 9.0, [sheet.Answer("is it red?" * 30, answer, "yes")]
        )
        colors = {color for _, color in sheet.make_sheet("title", "", [reading], []).getcolors(1 << 24)}
        return (0x1A, 0x98, 0x50) in colors, (0xD7, 0x30, 0x27) in colors

    assert marks("yes") == (True, False)
    assert marks("no") == marks("") == marks("yes " * 99) == (False, True)


def test_demo_without_easy_vqa(workplace, models, monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    assert "pip install 'unitok_mllm[demo]'" in fail("demo", "--model", models / "mllm")


# convert


@pytest.fixture
def original(tmp_path_factory) -> tuple[Path, UniTokModel]:
    """An original tokenizer checkpoint, and the model that it holds."""
    model = UniTokModel(small_config()).eval()
    state = {name.removeprefix("vision_model."): tensor for name, tensor in model.state_dict().items()}
    for ours, theirs in (("quantizer.codebooks", "codebook.weight"), ("quantizer.usage", "vocab_usage")):
        tensors = state.pop(ours)
        state |= {f"quantizer.codebooks.{i}.{theirs}": tensor for i, tensor in enumerate(tensors)}
    path = tmp_path_factory.mktemp("original") / "tokenizer.pth"
    torch.save({"args": {"model": "vitamin_base", "img_size": SIZE}, "trainer": {"unitok": state}}, path)
    return path, model


def test_convert_tokenizer(workplace, original):
    source, model = original
    (workplace / "new").mkdir()  # an empty folder will do
    out = succeed("convert", source, "--to", "new")
    assert "tensors used, 0 left out" in out
    assert os.listdir(workplace) == ["new"]
    converted, _ = cli.load(Path("new"), tokenizer_only=True)
    pixels = torch.rand(1, 3, SIZE, SIZE) * 2 - 1
    assert torch.equal(converted.cpu().float().encode(pixels), model.encode(pixels))
    assert not converted.config.vision_config.causal_projection
    succeed("convert", source, "--to", "causal", "--causal")
    assert cli.load(Path("causal"), tokenizer_only=True)[0].config.vision_config.causal_projection


def test_convert_mllm_gets_both_sources(workplace, models, original, monkeypatch):
    calls = []

    def convert_mllm(source, tokenizer, folder, allow_pickle):
        calls.append((source, tokenizer, allow_pickle))
        folder.mkdir()
        (folder / "config.json").touch()
        return "a report"

    monkeypatch.setattr(unitok_mllm.convert_unitok, "convert_mllm", convert_mllm)
    out = succeed("convert", models, "--tokenizer", original[0], "--to", "new", "--allow-pickle")
    assert out == "a report\n" and calls == [(models, original[0], True)]
    assert os.listdir(workplace) == ["new"] and os.listdir("new") == ["config.json"]


def test_convert_leaves_nothing_behind(workplace, original, models, picture):
    source = original[0]
    (workplace / "full").mkdir()
    (workplace / "full" / "mine.txt").touch()
    (workplace / "empty").mkdir()
    (workplace / "empty.pth").touch()
    incomplete = torch.load(source)
    del incomplete["trainer"]["unitok"]["fc_norm.weight"]
    torch.save(incomplete, "incomplete.pth")
    before = sorted(workplace.rglob("*"))

    assert "not an empty folder" in fail("convert", source, "--to", "full")
    assert "is not a folder" in fail("convert", source, "--to", "nowhere/new")
    assert "does not exist" in fail("convert", "nowhere.pth", "--to", "new")
    assert "fc_norm.weight" in fail("convert", "incomplete.pth", "--to", "new")
    assert "fc_norm.weight" in fail("convert", "incomplete.pth", "--to", "empty")
    for name in (picture, "empty.pth"):
        assert str(name) in fail("convert", name, "--to", "new")
        assert str(name) in fail("convert", name, "--to", "new", "--allow-pickle")
    assert "--tokenizer" in fail("convert", models / "mllm", "--to", "new")
    assert "--tokenizer" in fail("convert", source, "--tokenizer", source, "--to", "new")
    assert "--causal" in fail("convert", models / "mllm", "--tokenizer", source, "--to", "new", "--causal")
    assert "model" in fail("convert", models / "mllm", "--tokenizer", source, "--to", "new")
    assert "empty has no" in fail("convert", "empty", "--tokenizer", source, "--to", "new")
    assert sorted(workplace.rglob("*")) == before


# errors


@pytest.mark.parametrize("command", ["ask", "generate", "demo", "reconstruct"])
def test_unknown_model(workplace, picture, command):
    args = {"ask": [picture, "what?"], "generate": ["a circle"], "demo": [], "reconstruct": [picture]}[command]
    assert "no model in nowhere" in fail(command, *args, "--model", "nowhere")
    assert os.listdir(workplace) == []


@pytest.mark.parametrize(
    "flaw", ["not json", "a list", "no type", "other type", "bad geometry", "sizes", "no weights"]
)
@pytest.mark.attack
def test_broken_model(workplace, models, picture, flaw):
    folder = shutil.copytree(models / "mllm", workplace / "broken")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    vision = config["visual_config"]["vision_config"]
    if flaw == "not json":
        (folder / "config.json").write_text("{", encoding="utf-8")
    elif flaw == "no weights":
        (folder / "model.safetensors").write_bytes(b"none")
    else:
        if flaw == "a list":
            config = []
        elif flaw == "no type":
            del config["model_type"]
        elif flaw == "other type":
            config["model_type"] = "llama"
        elif flaw == "bad geometry":
            vision["image_size"] = SIZE + 1
        elif flaw == "sizes":
            vision["codebook_size"] = 16
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    expected = {"other type": "'llama'", "bad geometry": "49", "sizes": "codebooks"}.get(flaw, "cannot load the model")
    assert expected in fail("ask", picture, "what?", "--model", folder)
    assert expected in fail("reconstruct", picture, "--model", folder)


def test_missing_weights_are_no_model(workplace, models, picture):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(models / "mllm", workplace / "broken")
    state = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if k != "embedder.fc2.weight"}, folder / "model.safetensors", {"format": "pt"}
    )
    assert "embedder.fc2.weight" in fail("ask", picture, "what?", "--model", folder)


def test_tokenizer_answers_no_questions(models, picture):
    assert "'unitok'" in fail("ask", picture, "what?", "--model", models / "tokenizer")


def test_bad_image(workplace, models, picture, monkeypatch):
    Path("text.png").write_text("no image", encoding="utf-8")
    model = ("--model", models / "mllm")
    assert "nowhere.png" in fail("ask", "nowhere.png", "what?", *model)
    assert "nowhere.png" in fail("reconstruct", "nowhere.png", *model)
    assert "text.png" in fail("ask", "text.png", "what?", *model)
    with monkeypatch.context() as patch:
        patch.setattr(cli, "load", None)
        assert "text.png" in fail("reconstruct", picture, "text.png", *model)
    assert os.listdir() == ["text.png"]


@pytest.mark.parametrize("text", ["", "  \n"])
def test_empty_text(models, picture, text):
    assert fail("ask", picture, text, "--model", models / "mllm") == "the question is empty"
    assert fail("generate", text, "--model", models / "mllm") == "the prompt is empty"


def test_question_with_an_image_placeholder_is_plain_text(models, picture):
    answer = succeed("ask", picture, "is <image> red?", "--model", models / "mllm", "--max-new-tokens", 6)
    image = Image.open(picture)
    assert answer.strip() == direct_answer(models / "mllm", image, "is <image> red?", 6, sanitize_control_tokens=True)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("guidance", 0.5),
        ("guidance", "much"),
        ("guidance", "nan"),
        ("guidance", "inf"),
        ("temperature", 0),
        ("temperature", "nan"),
        ("top-p", 0),
        ("top-p", 1.5),
        ("top-k", -1),
        ("count", 0),
        ("seed", -1),
    ],
)
def test_bad_sampling_option(workplace, models, option, value):
    message = fail("generate", "a circle", f"--{option}", value, "--model", models / "mllm")
    assert option in message.replace("_", "-")
    assert os.listdir(workplace) == []


@pytest.mark.parametrize("command", ["demo", "generate circle", "edit PICTURE blue"])
def test_a_guidance_beyond_the_models_is_refused_before_the_model_is_loaded(picture, monkeypatch, command):
    monkeypatch.setattr(cli, "load", None)
    words = command.replace("PICTURE", str(picture)).split()
    assert cli.MAX_GUIDANCE == MAX_GUIDANCE
    for option in ("--guidance", "--image-guidance")[: 1 + ("edit" in command)]:
        for value in ("1e7", "inf", "nan", "0.5"):
            assert fail(*words, option, value).startswith(f"Invalid value for '{option}': Input should be ")


def test_bad_number_of_tokens(models, picture):
    assert "max-new-tokens" in fail("ask", picture, "what?", "--max-new-tokens", 0, "--model", models / "mllm")


def test_unwritable_output(workplace, models, picture):
    Path("file").touch()
    model = ("--model", models / "mllm")
    for command in (["generate", "a circle"], ["demo"]):
        assert "file is not a folder" in fail(*command, "--output", "file/a.png", *model)
        assert "must end in .png" in fail(*command, "--output", "a.xyz", *model)
    assert "file" in fail("reconstruct", picture, "--output", "file", *model)


def test_bugs_are_not_hidden(models, picture, monkeypatch):
    monkeypatch.setattr(cli, "answer_questions", lambda *args: 1 / 0)
    assert isinstance(run("ask", picture, "what?", "--model", models / "mllm").exception, ZeroDivisionError)


@pytest.mark.parametrize(
    "command, option, said",
    [
        ("api", "--host=", "the host is empty: 127.0.0.1 is this machine alone, 0.0.0.0 lets others in"),
        ("api", "--max-rows=1e9", "Invalid value for '--max-rows': Input should be a valid integer, unable to parse"),
        ("api", "--max-length=9999999", "Input should be less than or equal to 1048576, got 9999999"),
        ("api", "--host=192.0.2.1", "cannot listen on host 192.0.2.1, port 8000: "),
        ("api", "--host=a..b", "cannot listen on host a..b, port 8000: "),
        ("api", "--host=\udcff", "port 8000: encoding of hostname failed"),
        ("api", "--timeout=inf", "timeout must be a finite number, got inf"),
        ("api", "--name=", "the name is empty"),
        ("api", "--api-key-file=none", "cannot read the API key in none: "),
        ("api", "--api-key-file=.", "cannot read the API key in .: "),
        ("api", "--api-key-file=latin", "cannot read the API key in latin: "),
        ("api", "--api-key-file=empty", "empty has no key."),
        (
            "api",
            "--allow-url=https://example.org/",
            "Invalid value for '--allow-url': expected a host's name such as ",
        ),
        ("serve", "--host=192.0.2.1", "cannot listen on host 192.0.2.1, port 7860: "),
        ("serve", "--allow-host=example.org:80", "without scheme, port or path, got example.org:80"),
        ("serve", "--proxy=nginx", "or network, or several with commas between them, got nginx"),
    ],
)
def test_a_server_refuses_its_options_before_its_model_is_loaded(workplace, monkeypatch, command, option, said):
    monkeypatch.setattr(cli, "load", None)
    Path("latin").write_bytes("schlüssel".encode("latin-1"))
    Path("empty").write_text("\n", encoding="utf-8")
    assert said in fail(command, option)


@pytest.mark.parametrize("command", ["api", "serve"])
def test_a_server_refuses_a_port_that_is_taken_before_its_model_is_loaded(monkeypatch, command):
    monkeypatch.setattr(cli, "load", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert fail(command, "--port", port).startswith(f"cannot listen on host 127.0.0.1, port {port}: ")


# real processes


def test_process_answers_on_stdout_alone(workplace, models, picture):
    result = run_process(
        "ask", picture, "what is it?", "--model", models / "mllm", "--max-new-tokens", 4, cwd=workplace
    )
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.strip() == direct_answer(models / "mllm", Image.open(picture), "what is it?", 4)


def test_process_fails_in_one_line(workplace, models):
    result = run_process("generate", "a circle", "--top-p", 3, "--seed", 1, "--model", models / "mllm", cwd=workplace)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "error: top_p must be above 0 and at most 1, got 3.0.\n"


def test_env_prints_what_a_bug_report_needs():
    result = CliRunner().invoke(cli.app, ["env"])
    lines = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert result.exit_code == 0 and lines["python"] == platform.python_version()
    assert lines["torch"] == torch.__version__.partition("+")[0] or lines["torch"] == torch.__version__
    assert {"unitok_mllm", "transformers", "gradio", "deepspeed", "CPUs", "threads"} <= lines.keys()


def test_nothing_is_cut_from_a_text_that_is_too_long(
    lively_mllm, processor, saved_mllm, picture, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    long = "red " * 25_000
    assert len(long) == 100_000
    for options in ({}, {"sanitize_control_tokens": True}):
        inputs = processor(text=long, generation_mode="image", **options)
        assert long in processor.tokenizer.decode(inputs["input_ids"][0])
        message = rf"prompt is too long: its {inputs['input_ids'].shape[1]} tokens and 9 more .* 256 positions"
        with pytest.raises(ValueError, match=message):
            lively_mllm.generate(**inputs, generation_mode="image")
    inputs = processor(text=long)
    for mode in ("text", "interleaved"):
        with pytest.raises(ValueError, match=r"prompt is too long: .* and 1 more"):
            lively_mllm.generate(**inputs, generation_mode=mode, max_new_tokens=1)
    assert "prompt is too long" in fail("generate", long, "--model", saved_mllm)
    assert "prompt is too long" in fail("ask", picture, long, "--model", saved_mllm)
    assert "prompt is too long" in fail("edit", picture, long, "--model", saved_mllm)


@pytest.mark.parametrize("name", ["right to left", "special tokens"])
@pytest.mark.attack
def test_odd_texts_on_the_command_line(saved_mllm, picture, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    text, model = ODD_TEXTS[name], ("--model", saved_mllm)
    for args in (
        ("ask", picture, text, "--max-new-tokens", 2),
        ("generate", text, "--seed", 1),
        ("edit", picture, text),
    ):
        result = run(*args, *model)
        assert result.exit_code == 0, (args, result.output, result.exception)
    assert Image.open("unitok-drawing.png").size == Image.open("unitok-edit.png").size == (48, 48)


def test_the_commands_refuse_what_the_model_refuses_and_take_what_it_takes(saved_mllm, picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = {"plausibility", "temperature", "top_k", "top_p", "guidance_scale", "seed", "num_return_sequences"}
    renamed = {"guidance_scale": "guidance", "num_return_sequences": "count"}
    for name, value in IMPOSSIBLE:
        if name in kept and not isinstance(value, list):
            option = renamed.get(name, name).replace("_", "-")
            message = fail("generate", "red", f"--{option}", value, "--model", saved_mllm)
            assert option in message.replace("_", "-") and str(value) in message, (option, value, message)
    for option, value in (
        ("guidance", math.nan),
        ("image-guidance", math.inf),
        ("image-guidance", 0),
        ("guidance", 1e7),
    ):
        message = fail("edit", picture, "make it red", f"--{option}", value, "--model", saved_mllm)
        assert option in message.replace("_", "-") and f"got {value}" in message
    assert list(tmp_path.glob("unitok*")) == []
    for options in (("--temperature", 1e-30, "--guidance", 1e6), ("--top-k", 10**9, "--seed", 2**200)):
        assert run("generate", "red", *options, "--model", saved_mllm).exit_code == 0
    assert len(list(tmp_path.glob("unitok-drawing*.png"))) == 2
