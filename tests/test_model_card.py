"""Model cards, with the results of evaluations that are run here."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, RepoUrl
from PIL import Image
from safetensors.torch import load_file
from transformers.pipelines import PIPELINE_REGISTRY

from eval import easy_vqa, emoji, reconstruction, text_to_image, zero_shot
from training.emoji import Emoji
from training.files import folder_digest
from training.model_card import (
    MARKER,
    TrainingRun,
    check_metadata,
    hardware,
    main,
    push_release,
    training_facts,
    write_release_card,
)
from training.release import save_release
from unitok_mllm import UniTokMLLMForConditionalGeneration, UniTokMLLMProcessor


@pytest.fixture
def release(mllm, processor, tmp_path) -> Path:
    save_release(mllm, processor, tmp_path / "circles" / "release", torch.float32)
    return tmp_path / "circles" / "release"


@pytest.fixture
def photo(tmp_path) -> Path:
    pixels = torch.randint(0, 256, (40, 60, 3), dtype=torch.uint8)
    (tmp_path / "photos").mkdir()
    for name in ("photo.jpg", "other.jpg"):
        Image.fromarray(pixels.numpy()).save(tmp_path / "photos" / name)
    return tmp_path / "photos" / "photo.jpg"


def load(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def test_a_release_has_a_card_of_its_configuration(release):
    card = load(release)
    assert card.data.library_name == "transformers" and card.data.tags == ["unitok", "text-to-image"]
    assert card.data.pipeline_tag in PIPELINE_REGISTRY.get_supported_tasks()
    assert yaml.safe_load(card.data.to_yaml()).keys() == {"library_name", "pipeline_tag", "tags"}
    assert card.text.startswith(f"{MARKER}\n\n# circles\n") and "## Training" not in card.text
    assert "| pictures | 48x48, 9 positions of 4 codes, 32 codes in each sub-codebook |" in card.text
    assert "| LLM | llama, width 64, 2 blocks, 300 tokens |\n| depth transformer | width 48, 2 blocks |" in card.text
    count = sum(value.numel() for value in load_file(release / "model.safetensors").values())
    assert f"| parameters | {count / 1e6:.2f} M (" in card.text and "| stored as | F32 |" in card.text


def run_code(folder: Path, photo: Path, tmp_path: Path, monkeypatch) -> None:
    """Runs what the card says of loading, with the folder's path for its name."""
    monkeypatch.chdir(photo.parent)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = load(folder).text.split("```python\n")[1].split("```")[0]
    exec(code.replace('folder = "circles"', f"folder = {str(folder)!r}"), {})


def test_the_code_of_the_card_answers_and_draws(release, photo, tmp_path, monkeypatch, capsys):
    run_code(release, photo, tmp_path, monkeypatch)
    model = UniTokMLLMForConditionalGeneration.from_pretrained(release).eval()
    processor = UniTokMLLMProcessor.from_pretrained(release)
    chat = [{"type": "image", "image": Image.open(photo)}, {"type": "text", "text": "What is this?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": chat}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert capsys.readouterr().out.strip() == processor.decode(answer, skip_special_tokens=True).strip()
    inputs = processor(text=["a red circle"], generation_mode="image")
    codes = model.generate(**inputs, generation_mode="image", seed=0)
    expected = processor.post_process_multimodal_output(model.decode_images(codes), generation_mode="image")[0]
    with Image.open(photo.parent / "drawing.png") as drawing:
        assert drawing.tobytes() == expected.tobytes()


def test_the_code_of_a_tokenizers_card_reconstructs(visual_tokenizer, processor, photo, tmp_path, monkeypatch):
    folder = tmp_path / "circles"
    visual_tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    write_release_card(folder, folder)
    run_code(folder, photo, tmp_path, monkeypatch)
    pixels = processor.image_processor(Image.open(photo))["pixel_values"]
    expected = processor.image_processor.post_process(visual_tokenizer.decode(visual_tokenizer.encode(pixels)))[0]
    with Image.open(photo.parent / "reconstruction.png") as picture:
        assert picture.tobytes() == expected.tobytes()
    text = load(folder).text
    assert "| text tower | CLIP, width 32, 1 blocks |" in text and "LLM |" not in text


def test_a_run_is_described_and_only_hub_names_go_to_the_front_matter(mllm, processor, tmp_path):
    (tmp_path / "mine").mkdir()
    facts = training_facts(30, 10, 64, 1e-3, 12.3, torch.device("cpu"), 2, "float32")
    run = TrainingRun(
        started_from=[str(tmp_path / "mine"), "owner/llm"],
        datasets=[{"kind": "hf", "path": "owner/data", "split": "train"}, {"path": "a|b.jsonl", "weight": 0.25}],
        metadata={"license": "apache-2.0", "language": ["en"]},
        facts=facts,
        losses={"image_loss": 1.23456},
    )
    save_release(mllm, processor, tmp_path / "release", torch.float16, run=run)
    card = load(tmp_path / "release")
    assert card.data.base_model == ["owner/llm"] and card.data.datasets == ["owner/data"]
    assert card.data.license == "apache-2.0" and card.data.language == ["en"]
    assert f"Started from `{tmp_path / 'mine'}`, `owner/llm`." in card.text
    assert "| `owner/data` | kind hf, split train |\n| `a\\|b.jsonl` | weight 0.25 |" in card.text
    assert "| seconds | 12 (for the last 20 steps: the run was resumed) |" in card.text
    assert f"| hardware | {hardware(torch.device('cpu'), 2)} |" in card.text and "; 2 processes |" in card.text
    assert "| image_loss | 1.235 |" in card.text and "| stored as | F16" in card.text
    with pytest.raises(ValueError, match="card has no 'licence': did you mean 'license'"):
        check_metadata({"licence": "mit"})


def emoji_data(folder: Path) -> Path:
    """Two emoji in two styles, one of them held out in one."""
    rows = []
    for style in ("google", "twitter"):
        (folder / "images" / style).mkdir(parents=True)
        for name in ("rose", "frog"):
            rows.append(Emoji(f"{name}.png", name, style, "any", held_out=(style, name) == ("twitter", "frog")))
            noise = torch.randint(0, 256, (48, 48, 3), dtype=torch.uint8).numpy()
            Image.fromarray(noise).save(folder / rows[-1].image)
    (folder / "emoji.json").write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")
    return folder


def numbers(value) -> set[float]:
    """Every number in a JSON."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return set().union(*map(numbers, value))
    return {value} if isinstance(value, (int, float)) else set()


def test_the_cards_numbers_are_those_of_the_evaluations(release, photo, tmp_path, capsys, caplog):
    digest, files = folder_digest(str(release)), {n: tmp_path / f"{n}.json" for n in ("vqa", "emoji", "psnr", "shot")}
    model, on_cpu = ["--model", str(release)], ["--device", "cpu"]
    limited = ["--limit", "3", "--skip", "text_to_image,edit", "--output", str(files["vqa"])]
    easy_vqa.main([*model, *limited, *on_cpu])
    data = emoji_data(tmp_path / "emoji")
    emoji.main([*model, *on_cpu, "--data", str(data), "--output", str(files["emoji"])])
    images = ["--images", str(photo.parent), "--skip", "rfid,lpips", "--workers", "0", "--output", str(files["psnr"])]
    reconstruction.main([*model, *on_cpu, *images])
    shapes = ["--dataset", "easy-vqa", "--limit", "5", "--use_cpu", "--workers", "0", "--output", str(files["shot"])]
    zero_shot.main([*model, *shapes, "--text_tokenizer", str(release)])
    (tmp_path / "prompts.txt").write_text("a red circle\n", encoding="utf-8")
    drawn = ["--prompts", str(tmp_path / "prompts.txt"), "--samples", "1", "--output", str(tmp_path / "drawn")]
    text_to_image.main([*model, *on_cpu, *drawn])
    files["drawn"] = tmp_path / "drawn" / "results.json"
    result = json.loads(files["drawn"].read_text(encoding="utf-8"))
    result["metrics"]["clip_score"] = {"settings": {"clip": "a/clip"}, "mean": 0.28125, "by_prompt": {}}
    files["drawn"].write_text(json.dumps(result), encoding="utf-8")

    others = json.dumps(result).replace(digest, "0" * 64)
    (tmp_path / "others.json").write_text(others, encoding="utf-8")
    (tmp_path / "speed.json").write_text(json.dumps({"benchmark": "speed", "seconds": 1.0}), encoding="utf-8")
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    (tmp_path / "begun.json").write_text(json.dumps(result | {"metrics": {}}), encoding="utf-8")
    (tmp_path / "old.json").write_text(
        json.dumps({n: v for n, v in result.items() if n != "versions"}), encoding="utf-8"
    )
    extra = [str(tmp_path / f"{name}.json") for name in ("others", "speed", "broken", "none", "begun", "old")]
    before = load(release).text
    main([str(release), "--results", *map(str, files.values()), *extra, "--license", "mit", "--tags", "unitok", "vqa"])
    left_out = [record.getMessage() for record in caplog.records if record.getMessage().startswith("left out: ")]
    reasons = "other weights (SHA-256 000000000000,", "(benchmark: speed)", "cannot read", "cannot read"
    for message, reason in zip(left_out, (*reasons, "has no numbers yet", "has no 'versions'"), strict=True):
        assert reason in message
    assert digest == folder_digest(str(release))

    card, known = load(release), {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items()}
    assert (card.data.license, card.data.model_name, card.data.tags) == ("mit", "circles", ["unitok", "vqa"])
    assert card.text.startswith(before.rstrip())
    found = {
        (r.task_type, r.dataset_type, r.dataset_split, r.metric_name): r.metric_value for r in card.data.eval_results
    }
    parts = known["vqa"]["parts"]
    answers = "visual-question-answering"
    assert found[answers, "easy-vqa", "test", "exact answers, all"] == parts["vqa"]["accuracy"]["all"]["accuracy"]
    name = "reconstruction, PSNR (dB), mean of images"
    assert found["image-to-image", "easy-vqa", "test", name] == parts["reconstruction"]["psnr_mean_of_images_db"]
    parts = known["emoji"]["parts"]
    assert found[answers, "emoji", "held_out", "named exactly"] == parts["naming"]["held_out"]["accuracy"]
    name = "drawing among the five nearest"
    assert found["text-to-image", "emoji", "seen", name] == parts["drawing"]["seen"]["top5"]
    assert found["image-to-image", "photos", None, "ssim"] == known["psnr"]["metrics"]["ssim"]
    top5 = found["zero-shot-image-classification", "easy-vqa", "test", "top5"]
    assert top5 == known["shot"]["parts"]["test"]["top5"]
    assert found["text-to-image", result["benchmark"], None, "clip_score"] == 0.28125
    assert numbers(list(found.values())) <= numbers(list(known.values()))
    assert all(math.isfinite(value) for value in found.values())

    ssim = known["psnr"]["metrics"]["ssim"]
    assert f"| photos | ssim | {ssim:.4g} | images 2, image_size 48 |" in card.text
    assert "| clip_score | 0.2812 | clip a/clip, prompts 1, samples 1, guidance 3.0," in card.text
    assert f"From `shot.json`, measured with torch {torch.__version__}" in card.text

    main([str(release), "--license", "apache-2.0", "--model_name", "shapes"])  # the results stay
    again = load(release)
    assert again.text == card.text and again.data.eval_results == card.data.eval_results
    assert again.data.license == "apache-2.0" and again.data.model_name == "shapes"
    main([str(release), "--results", str(files["shot"])])  # in place of the others
    card = load(release)
    assert len(card.data.eval_results) == 2 and "ssim" not in card.text and card.data.license == "apache-2.0"
    with pytest.raises(SystemExit, match="none of the 6 results can be used"):
        main([str(release), "--results", *extra])
    assert load(release).text == card.text


def test_a_hand_written_card_is_never_overwritten(release, mllm, processor, caplog):
    (release / "README.md").write_text("# My own words", encoding="utf-8")
    save_release(mllm, processor, release, torch.float16)
    assert (release / "README.md").read_text(encoding="utf-8") == "# My own words"
    assert "README.md is hand-written (it has no line '<!-- Written by training.model_card." in caplog.text
    assert load_file(release / "model.safetensors")["depth_head.head.weight"].dtype == torch.float16
    with pytest.raises(SystemExit, match="error: .* is hand-written"):
        main([str(release), "--license", "mit"])
    assert (release / "README.md").read_text(encoding="utf-8") == "# My own words"


def test_a_card_that_fails_leaves_the_old_release(release, mllm, processor, monkeypatch):
    before = {path.name: path.read_bytes() for path in release.iterdir() if path.is_file()}
    monkeypatch.setattr("training.model_card.sizes", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_release(mllm, processor, release, torch.float16)
    assert {path.name: path.read_bytes() for path in release.iterdir() if path.is_file()} == before


def test_folders_without_a_card_get_one_and_others_are_refused(release, processor, tmp_path, llama_config):
    before = (release / "README.md").read_text(encoding="utf-8")
    (release / "README.md").unlink()
    main([str(release)])
    assert (release / "README.md").read_text(encoding="utf-8") == before
    with pytest.raises(SystemExit, match="error: no model in .*: it has no config.json"):
        main([str(tmp_path)])
    llama_config.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="is a llama model; there are cards for unitok_mllm, unitok"):
        main([str(tmp_path)])


class LocalHub(HfApi):
    """Takes the place of the hub: what would reach it stays here."""

    def create_repo(self, repo_id, **kwargs):
        self.created = repo_id, kwargs["private"]
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, **kwargs):
        self.uploaded = repo_id, folder_path


def test_a_release_is_pushed_whole_and_not_without_a_card(release, monkeypatch, capsys):
    hub = LocalHub()
    monkeypatch.setattr("training.model_card.HfApi", lambda token: hub)
    main([str(release), "--push_to_hub", "someone/circles", "--private"])
    assert capsys.readouterr().out.endswith("\nhttps://huggingface.co/someone/circles\n")
    assert hub.created == ("someone/circles", True) and hub.uploaded == ("someone/circles", release)
    (release / "README.md").unlink()
    with pytest.raises(ValueError, match="has no card: python -m training.model_card"):
        push_release(release, "someone/circles")
