"""The evaluation on easy-VQA, end to end on a tiny random model and the benchmark's own images."""

import json
import math
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import HfArgumentParser

import unitok_mllm
from eval import easy_vqa as evaluation
from eval import text_to_image
from eval.judge import (
    UNKNOWN,
    Judge,
    augment,
    judge_accuracy,
    judge_images,
    judge_loss,
    load_judge,
    load_labels,
    load_pixels,
    save_judge,
    train_judge,
)
from training.easy_vqa import COLORS, SHAPES, load
from training.losses import psnr


pytestmark = pytest.mark.full


@pytest.fixture
def folder(mllm, processor, tmp_path):
    """The folder of a model with drawing options of its own."""
    path = tmp_path / "model"
    mllm.set_image_generation(guidance_scale=3.0, temperature=0.7, top_k=9)
    mllm.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture
def arguments(folder, tmp_path):
    """A small evaluation of everything, with a judge that has learned nothing."""
    save_judge(Judge(), tmp_path / "judge.safetensors")
    paths = ["--model", str(folder), "--output", str(tmp_path / "out.json")]
    paths += ["--judge", str(tmp_path / "judge.safetensors")]
    return [*paths, "--limit", "2", "--samples", "1", "--batch-size", "16", "--device", "cpu"]


def test_drawing_options_are_the_models_own_where_the_command_line_leaves_them_open(folder, tmp_path):
    own = evaluation.Settings(model=str(folder))
    assert own.drawing == {"guidance_scale": 3.0, "plausibility": 0.0, "temperature": 0.7, "top_k": 9, "top_p": 1.0}
    assert evaluation.Settings(model=str(folder), guidance=1.5, top_p=0.5).sampling == (
        "guidance 1.5, temperature 0.7, top-k 9, top-p 0.5"
    )
    (folder / "generation_config.json").unlink()
    assert evaluation.Settings(model=str(folder)).drawing == own.drawing | {"top_k": 20}  # of new models
    (tmp_path / "prompts.txt").write_text("a circle", encoding="utf-8")
    shipped = str(Path(unitok_mllm.__file__).parent / "checkpoints/tiny")
    for settings in (
        evaluation.Settings(model=shipped),
        text_to_image.Settings(model=shipped, prompts=str(tmp_path / "prompts.txt"), output=str(tmp_path / "out")),
    ):
        assert settings.drawing == own.drawing | {"guidance_scale": 5.0, "plausibility": 0.1, "top_k": 20}


def test_psnr_is_that_of_the_hand_computation():
    pixels = torch.zeros(2, 3, 4, 4)
    reconstruction = torch.full_like(pixels, 0.5)
    reconstruction[1] = 3.0  # clamped to 1
    assert psnr(reconstruction, pixels).tolist() == pytest.approx([20 * math.log10(2 / 0.5), 20 * math.log10(2)])


@pytest.mark.parametrize("given", ["Yes", " yes ", "yes.", "YES. ", "yes\n"])
def test_answers_are_normalized(given):
    assert evaluation.normalize_answer(given) == "yes"


def test_right_answers_are_counted_for_each_kind():
    counts = evaluation.count_right(["Yes.", "no", "red", "a circle", ""], ["yes", "yes", "red", "circle", "no"])
    assert counts["all"] == {"accuracy": 0.4, "right": 2, "questions": 5}
    assert counts["yes/no"] == {"accuracy": 1 / 3, "right": 1, "questions": 3}
    assert counts["color"] == {"accuracy": 1.0, "right": 1, "questions": 1}
    assert counts["shape"] == {"accuracy": 0.0, "right": 0, "questions": 1}
    assert set(evaluation.count_right(["no"], ["no"])) == {"all", "yes/no"}


def test_answers_in_batches_are_those_of_plain_generation(mllm, processor):
    samples = load("test")[:2]
    rows = [(sample, question) for sample in samples for question, _ in sample.questions[:4]]
    pixels = processor.image_processor([str(sample.image) for sample, _ in rows])["pixel_values"]
    answers = evaluation.answer_questions(
        mllm, processor, [question for _, question in rows], mllm.encode_images(pixels), batch_size=3
    )
    for (sample, question), answer in zip(rows, answers):
        content = [{"type": "image", "path": str(sample.image)}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        generated = mllm.generate(**inputs, do_sample=False, max_new_tokens=evaluation.MAX_ANSWER_TOKENS)
        expected = processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == expected
    assert len(set(answers)) > 1


def test_a_drawing_depends_on_its_seed_alone(mllm, processor):
    captions = ["a red circle", "a blue rectangle", "a teal triangle", "a red circle", "a red circle"]
    seeds = [5, 6, 7, 5, 8]
    together = evaluation.draw(mllm, processor, captions, seeds, batch_size=5, guidance_scale=3.0)
    in_pairs = evaluation.draw(mllm, processor, captions, seeds, batch_size=2, guidance_scale=3.0)
    assert torch.equal(together, in_pairs)
    assert torch.equal(together[0], together[3])
    assert not torch.equal(together[0], together[4])


def test_labels_are_what_the_questions_tell():
    samples = {sample.caption: sample for sample in load("test")}
    labels = load_labels([samples[caption] for caption in ("a red circle", "a gray shape", "a triangle", "a shape")])
    assert labels.tolist() == [
        [COLORS.index("red"), SHAPES.index("circle")],
        [COLORS.index("gray"), UNKNOWN],
        [UNKNOWN, SHAPES.index("triangle")],
        [UNKNOWN, UNKNOWN],
    ]


def test_judge_learns_the_same_under_the_same_seed_and_is_loaded_as_it_was(tmp_path):
    samples = load("train")[:48]
    pixels, labels = load_pixels(samples), load_labels(samples)
    assert pixels.shape == (48, 3, 64, 64) and pixels.min() >= -1 and 0 < pixels.max() <= 1
    before = torch.get_rng_state()
    model, again = (train_judge(pixels, labels, epochs=12, batch_size=16) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert judge_loss(model, pixels, labels) < 0.5 * judge_loss(Judge().eval(), pixels, labels)
    for one, other in zip(model.state_dict().values(), again.state_dict().values()):
        assert torch.equal(one, other)

    save_judge(model, tmp_path / "new" / "judge.safetensors")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["judge.safetensors"]
    loaded = load_judge(tmp_path / "new" / "judge.safetensors")
    for one, other in zip(judge_images(model, pixels), judge_images(loaded, pixels)):
        assert torch.equal(one, other)


def test_unknown_labels_neither_teach_nor_count():
    model, pixels = Judge().eval(), torch.rand(3, 3, 64, 64)
    judge_loss(model, pixels, torch.full((3, 2), UNKNOWN)).backward()
    assert not any(parameter.grad.any() for parameter in model.parameters())

    colors, shapes = judge_images(model, pixels)
    labels = torch.stack([colors, shapes], dim=1)
    labels[1, 0], labels[2, 1] = UNKNOWN, (shapes[2] + 1) % len(SHAPES)
    assert judge_accuracy(model, pixels, labels) == {
        "images": 2,
        "both": 0.5,
        "color": 1.0,
        "shape": pytest.approx(2 / 3),
    }


def test_augmentation_moves_pixels_and_invents_none():
    pixels = torch.arange(64.0).reshape(1, 1, 8, 8).expand(4, 3, 8, 8)
    augmented = augment(pixels)
    assert augmented.shape == pixels.shape and set(augmented.unique().tolist()) <= set(range(64))


def test_contact_sheet_frames_what_is_wrong():
    pictures = [Image.new("RGB", (32, 32), "blue")] * 48
    sheet = evaluation.contact_sheet(pictures, [False] + [True] * 47, samples=2)
    assert sheet.getpixel((60, 24)) == (255, 0, 0) and sheet.getpixel((130, 24)) == (255, 255, 255)
    assert sheet.getpixel((63, 27)) == sheet.getpixel((133, 27)) == (0, 0, 255)


@pytest.mark.attack
def test_finished_parts_outlive_an_interruption_and_are_not_measured_again(arguments, tmp_path, monkeypatch, capsys):
    def interrupted(self):
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.Evaluation, "text_to_image", interrupted)
        with pytest.raises(SystemExit, match="the same command goes on") as end:
            evaluation.main(arguments)
        assert end.value.code == 143
    output = tmp_path / "out.json"
    first = json.loads(output.read_text(encoding="utf-8"))["parts"]
    assert list(first) == ["reconstruction", "vqa"]

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.Evaluation, "reconstruction", interrupted)
        patch.setattr(evaluation.Evaluation, "vqa", interrupted)
        evaluation.main(arguments)
        second = json.loads(output.read_text(encoding="utf-8"))["parts"]
        evaluation.main([*arguments, "--guidance", "1"])
        printed = capsys.readouterr()
        assert "24 drawings" in printed.out
        assert "text_to_image was measured with other settings or versions and is not kept" in printed.err
    third = json.loads(output.read_text(encoding="utf-8"))["parts"]
    assert first == {name: second[name] for name in first} == {name: third[name] for name in first}
    assert (second["text_to_image"]["settings"]["guidance"], third["text_to_image"]["settings"]["guidance"]) == (3, 1)
    with Image.open(tmp_path / "out.png") as sheet:
        assert sheet.size[0] > sheet.size[1] / 3
    report = json.loads(output.read_text(encoding="utf-8"))
    names = ["PSNR", "codes in use", "answers right", "edits right", "drawings right"]
    names.append("drawings that fill their box as the shape does")
    assert [number["metric"] for number in report["numbers"]] == names
    (drawings,) = [number for number in report["numbers"] if number["metric"] == "drawings right"]
    assert drawings["protocol"]["sampling"] == "guidance 1, temperature 0.7, top-k 9, top-p 1"
    assert drawings["protocol"]["split"] == "24 pairs of colour and shape, 1 drawings each"
    evaluation.main([*arguments, "--no_resume", "--skip", "text_to_image,edit"])  # at a stretch
    fresh = json.loads(output.read_text(encoding="utf-8"))["parts"]
    assert {name: part | {"seconds": 0} for name, part in fresh.items()} == {
        name: part | {"seconds": 0} for name, part in first.items()
    }


def test_report_holds_numbers_that_can_be_had_directly(arguments, mllm, processor, tmp_path):
    evaluation.main([*arguments, "--skip", "text_to_image,edit"])
    report = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    samples = load("test")[:2]
    pixels = processor.image_processor([str(sample.image) for sample in samples])["pixel_values"]
    codes = mllm.encode_images(pixels)
    error = (mllm.decode_images(codes) - pixels).square().mean(dim=(1, 2, 3))
    used = [len(set(codes[:, k].flatten().tolist())) for k in range(codes.shape[1])]
    part = report["parts"]["reconstruction"]
    assert part["psnr_mean_of_images_db"] == pytest.approx((10 * (4 / error).log10()).mean().item(), rel=1e-4)
    assert part["psnr_of_mean_error_db"] == pytest.approx(10 * math.log10(4 / error.mean().item()), rel=1e-4)
    assert part["codebook_usage_percent"] == pytest.approx(100 * sum(used) / len(used) / 32)
    assert report["parts"]["vqa"]["accuracy"]["all"]["questions"] == sum(len(s.questions) for s in samples)
    assert report["parts"]["vqa"]["prompt"].endswith("USER: <image>\n{question} ASSISTANT:")
    protocol = {
        "split": "test, first 2 images",
        "prompt": "{question}",
        "sampling": "greedy",
        "images": "understand, 48x48",
        "reference": "the split's answers",
        "tool": "exact match",
    }
    share = report["parts"]["vqa"]["accuracy"]["all"]["accuracy"]
    assert [number["metric"] for number in report["numbers"]] == ["PSNR", "codes in use", "answers right"]
    assert report["numbers"][2]["value"] == 100 * share and report["numbers"][2]["protocol"] == protocol
    assert report["versions"].keys() == {"torch", "transformers", "unitok_mllm", "easy-vqa"}


def test_edits_are_judged_by_the_new_color_and_the_old_shape(arguments, mllm, processor, tmp_path):
    evaluation.main([*arguments, "--skip", "reconstruction,vqa,text_to_image"])
    part = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["parts"]["edit"]
    (settings,) = HfArgumentParser(evaluation.Settings).parse_args_into_dataclasses(arguments)
    judge, labels = load_judge(settings.judge), load_labels(load("test")[:2])
    assert part["images"] == (labels != UNKNOWN).all(dim=1).sum() > 0
    right = 0
    for place, (sample, (color, shape)) in enumerate(zip(load("test")[:2], labels.tolist())):
        if UNKNOWN in (color, shape):
            continue
        wanted = random.Random(place).choice([c for c in range(len(COLORS)) if c != color])
        inputs = processor(images=str(sample.image), text=f"make it {COLORS[wanted]}", generation_mode="edit")
        pixels = mllm.decode_images(mllm.generate(**inputs, generation_mode="image", do_sample=False))
        verdict = torch.cat(judge_images(judge, evaluation.Evaluation.for_judge(pixels))).tolist()
        right += verdict == [wanted, shape]
    assert part["both"] == pytest.approx(right / part["images"])


def test_changed_weights_are_measured_anew(arguments, folder, mllm):
    before = evaluation.folder_digest(folder)
    mllm.get_output_embeddings().weight.data.mul_(2)
    mllm.save_pretrained(folder)
    assert evaluation.folder_digest(folder) != before


def test_missing_judge_is_trained_and_announced(arguments, tmp_path, monkeypatch, capsys):
    (tmp_path / "judge.safetensors").unlink()
    made = Judge().eval()
    monkeypatch.setattr(evaluation, "make_judge", lambda path: made)
    (settings,) = HfArgumentParser(evaluation.Settings).parse_args_into_dataclasses(arguments)
    assert evaluation.Evaluation(settings).judge is made
    assert "There is no judge" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "no/such/folder"], "no model in no/such/folder: it has no config.json"),
        (["--skip", "vqa,drawing"], "cannot skip drawing; the parts are reconstruction, vqa, text_to_image, edit"),
        (["--limit", "0"], "limit must be at least 1, got 0"),
        (["--guidance", "0.5"], "guidance_scale must be at least 1"),
        (["--edit_guidance", "0.5"], "edit_guidance (0.5) is not between 1 and 1000000.0"),
    ],
)
def test_errors_take_one_line(arguments, options, message):
    with pytest.raises(SystemExit) as error:
        evaluation.main([*arguments, *options])
    assert str(error.value).startswith("error: ") and message in str(error.value) and "\n" not in str(error.value)
