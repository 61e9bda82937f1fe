"""The script that trains the tokenizer: its config, its data, its start from open_clip, and its release."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizer_runs import small_model
from torch import nn
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from training.arguments import parse_yaml_and_command_line
from training.errors import one_line_errors
from training.files import whole_checkpoints
from training.losses import LossArguments
from training.progress import ExpectedTime
from training.tokenizer_arguments import TokenizerTrainingArguments
from training.tokenizer_trainer import STATE
from training.train_tokenizer import (
    TokenizerArguments,
    build_datasets,
    build_model,
    check_text_tokenizer,
    load_open_clip,
    main,
)
from unitok_mllm import UniTokConfig, UniTokImageProcessor, UniTokModel


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
CONFIGS = Path(__file__).parent.parent / "training" / "configs"


@pytest.mark.parametrize("beside", [{"vision_overrides": {"image_size": 32}}, {"init_open_clip": "ViTamin-L-256"}])
def test_a_tokenizer_to_start_from_takes_no_config_and_no_weights_beside_it(beside, text_tokenizer):
    with pytest.raises(ValueError, match="init_from .a. has its own .*(ViTamin|32)"):
        build_model(TokenizerArguments(init_from="a", **beside), text_tokenizer)


def test_a_fresh_text_tower_is_as_large_as_the_text_tokenizer_and_finds_its_ends(text_tokenizer):
    texts = copy.deepcopy(text_tokenizer)
    texts.add_tokens([f"<word{i}>" for i in range(700 - len(texts))])
    texts.add_special_tokens({"eos_token": "<end>"})
    model = build_model(TokenizerArguments(), texts)
    check_text_tokenizer(texts, model.config)
    text = model.config.text_config
    assert (text.vocab_size, text.bos_token_id, text.eos_token_id, text.pad_token_id) == (701, 1, 700, 0)
    ids = texts(["a red circle<end>", "a blue<word3><end>"], padding=True, padding_side="right", return_tensors="pt")
    longer = torch.cat([ids["input_ids"], torch.full((2, 3), 5)], dim=1)
    features = [model.get_text_features(i).pooler_output for i in (ids["input_ids"], longer)]
    torch.testing.assert_close(*features)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"init_open_clip_weights": "b.pt"}, "init_open_clip_weights is b.pt, but init_open_clip names no model"),
        ({"hub_model_id": "a/b/c"}, "Repo id must be"),
        ({"eval_datasets": [{"kind": "webdataset", "resampled": True}]}, "An evaluation set must end"),
        ({"datasets": {"kind": "folder"}}, "datasets must be of type list"),
    ],
)
def test_tokenizer_arguments_that_contradict_each_other_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        TokenizerArguments(**wrong)


def small_open_clip(tmp_path: Path) -> nn.Module:
    """open_clip's ViTamin-S with a small text tower, and every tensor random."""
    config = open_clip.get_model_config("ViTamin-S")
    config["text_cfg"] |= {"context_length": 9, "vocab_size": 60, "width": 64, "heads": 2, "layers": 2}
    config["vision_cfg"]["timm_drop_path"] = 0.0
    path = tmp_path / "ViTamin-S-small.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    open_clip.add_model_config(path)
    clip = open_clip.create_model(path.stem).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return clip


def test_towers_from_open_clip_give_open_clips_features(tmp_path):
    clip = small_open_clip(tmp_path)
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    vision = {"image_size": 224, "stem_width": 64, "stage_dims": (64, 128), "stage_depths": (2, 4), "hidden_size": 384}
    vision |= {"num_attention_heads": 6, "num_hidden_layers": len(clip.visual.trunk.blocks), "projection_dim": 384}
    text = {"vocab_size": 60, "hidden_size": 64, "intermediate_size": 256, "projection_dim": 384}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 9, "hidden_act": "gelu"}
    text |= {"bos_token_id": 58, "eos_token_id": 59}
    model = UniTokModel(UniTokConfig(vision_config=vision, text_config=text, decoder_layers=1)).eval()
    report = load_open_clip(model, "ViTamin-S-small", str(tmp_path / "clip.pt"))
    assert report.used + len(report.left_out) == len(clip.state_dict())
    assert list(report.left_out) == ["visual.trunk.pos_embed"]
    assert model.logit_scale == clip.logit_scale

    input_ids = torch.tensor([[58, 5, 6, 59, 0, 0, 0, 0, 0], [58, 7, 8, 9, 10, 59, 0, 0, 0]])
    pixels = torch.rand(1, 3, 224, 224) * 2 - 1
    trunk, encoder = clip.visual.trunk, model.vision_model.encoder
    nn.init.zeros_(trunk.pos_embed)  # what UniTok lacks
    with torch.no_grad():
        texts = clip.encode_text(input_ids, normalize=True)
        torch.testing.assert_close(model.get_text_features(input_ids).pooler_output, texts, rtol=1e-4, atol=1e-5)
        encoder.norm = nn.Identity()  # what open_clip lacks
        ours, exact_gelu = encoder(pixels), trunk.forward_features(pixels)
        assert (ours - exact_gelu).norm() < 0.01 * exact_gelu.norm()
        for block in trunk.blocks:
            block.mlp.act = nn.GELU(approximate="tanh")
        torch.testing.assert_close(ours, trunk.forward_features(pixels), rtol=1e-3, atol=1e-4)
        pooled = nn.functional.normalize(model.vision_model.projection(model.vision_model.fc_norm(ours.mean(dim=1))))
        torch.testing.assert_close(pooled, clip.encode_image(pixels, normalize=True), rtol=1e-3, atol=1e-4)

    with pytest.raises(ValueError, match=r"visual\.trunk\..* does not fit: the tokenizer has"):
        load_open_clip(small_model(), "ViTamin-S-small", str(tmp_path / "clip.pt"))


@pytest.fixture
def captioned_folder(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    generator = np.random.default_rng(0)
    lines = []
    for i in range(9):
        Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "caption": "a red circle"}) + "\n")
    (folder / "train_captions.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "train_captions.jsonl"


def test_the_script_trains_on_a_folder_reports_and_releases(tmp_path, captioned_folder, text_tokenizer):
    text_tokenizer.save_pretrained(tmp_path / "text")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
vision_overrides: {{image_size: 32, hidden_size: 32, num_attention_heads: 2, num_hidden_layers: 1}}
text_tokenizer: {tmp_path / "text"}
datasets:
  - {{kind: folder, path: {captioned_folder}, repeat: 2, horizontal_flip: true, max_shift: 1}}
contrastive_weight: 0.1
perceptual_weight: 1.0
perceptual_backbone: test_resnet
perceptual_pretrained: false
gan_weight: 0.1
gan_start: 0.5
discriminator_backbone: test_vit
discriminator_depths: [0, 3]
discriminator_pretrained: false
output_dir: {tmp_path / "run"}
num_train_epochs: 1
per_device_train_batch_size: 6
logging_steps: 1
report_to: [tensorboard]
use_cpu: true
card: {{license: mit}}
""",
        encoding="utf-8",
    )
    main([str(config), "--learning_rate", "1e-3"])
    release = tmp_path / "run" / "release"
    model = AutoModel.from_pretrained(release)
    pixels = AutoImageProcessor.from_pretrained(release)(str(captioned_folder.parent / "0.png"))["pixel_values"]
    assert model.decode(model.encode(pixels)).shape == (1, 3, 32, 32)
    assert AutoTokenizer.from_pretrained(release).eos_token_id == model.config.text_config.eos_token_id
    assert list(whole_checkpoints(tmp_path / "run", STATE)) == [3]  # 18 images in batches of 6
    events = EventAccumulator(str(tmp_path / "run" / "tokenizer")).Reload()
    assert {"l1", "perceptual", "gan", "discriminator", "psnr", "eval_psnr"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("l1")] == [1, 2, 3]
    assert events.Tags()["images"] == ["reconstructions"]
    card = ModelCard.load(release / "README.md")
    assert card.data.license == "mit" and card.data.pipeline_tag == "image-feature-extraction"
    assert f"| `{captioned_folder}` | kind folder, repeat 2, horizontal_flip True, max_shift 1 |" in card.text
    assert "| steps | 3 |\n| samples in a step | 6 |\n| learning rate | 0.001 |\n" in card.text
    assert "bf16 autocast" in card.text and "grad_norm" not in card.text
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text("utf-8").splitlines()]
    for name in ("l1", "eval_codebook_usage"):
        logged = [(line["step"], line[name]) for line in history if name in line]
        assert logged == [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)], name
    for name in ("l1", "gan", "eval_psnr"):
        assert f"| {name} | {events.Scalars(name)[-1].value:.4g} |" in card.text


def test_ctrl_c_says_how_to_go_on_after_what_is_trained(
    tmp_path, captioned_folder, text_tokenizer, caplog, capsys, monkeypatch
):
    text_tokenizer.save_pretrained(tmp_path / "text")
    caplog.set_level("INFO")
    broken = captioned_folder.parent / "0.png"
    broken.write_bytes(broken.read_bytes()[:100])

    class Interrupted(ExpectedTime):
        def __call__(self, step):
            super().__call__(step)
            if step == self.total_steps - 1 and self.total_steps > 8:
                raise KeyboardInterrupt

    monkeypatch.setattr("training.tokenizer_trainer.ExpectedTime", Interrupted)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
vision_overrides: {{image_size: 32, hidden_size: 32, num_attention_heads: 2, num_hidden_layers: 1}}
text_tokenizer: {tmp_path / "text"}
datasets: [{{kind: folder, path: {captioned_folder}}}]
max_broken_share: 0.5
perceptual_weight: 0
gan_weight: 0
output_dir: {tmp_path / "run"}
per_device_train_batch_size: 4
save_steps: 7
bf16: false
use_cpu: true
""",
        encoding="utf-8",
    )
    with pytest.raises(SystemExit) as end:
        one_line_errors()(main)([str(config), "--max_steps", "9"])
    said = f"Interrupted. The same command with --resume true goes on from {tmp_path}/run/checkpoint-7.\n"
    assert end.value.code == 130 and capsys.readouterr().err.endswith(said)
    assert re.search(r"training the tokenizer: [\d.]+ M parameters at learning rate 0.0005", caplog.text)
    assert "9 steps of 4 images, 0 of them done; after a few more: the time that they take" in caplog.text
    assert re.search(r"[\d.]+ s a step: the other 3 take about 0:00:\d\d, evaluations aside", caplog.text)
    main([str(config), "--output_dir", str(tmp_path / "other"), "--max_steps", "2"])
    release = tmp_path / "other/release"
    assert re.search(r"broken samples that were skipped: \d; they are named above", caplog.text)
    last = caplog.records[-1].getMessage()
    assert last == f"the tokenizer is in {release}; try it: unitok-mllm reconstruct IMAGE --model {release}"


@pytest.mark.parametrize("size", ["tiny", "base", "large"])
def test_configs_are_read_and_the_large_ones_hold_the_released_recipe(size):
    arguments, losses, training = parse_yaml_and_command_line(
        (TokenizerArguments, LossArguments, TokenizerTrainingArguments), [f"{CONFIGS}/tokenizer_{size}.yaml"]
    )
    assert arguments.preset == size and len(arguments.datasets) == (2 if size == "tiny" else 1)
    if size != "tiny":
        weights = {"l1": 0.2, "l2": 1, "perceptual": 1, "vq": 1, "gan": 0.4, "contrastive": 1}
        assert losses.weights(0.5) == weights | {"entropy": 0, "consistency": 0}
        assert (training.learning_rate, training.weight_decay, training.max_grad_norm) == (5e-4, 0.02, 10)
        assert (training.adam_epsilon, training.discriminator_adam_epsilon) == (1e-6, 1e-6)
        assert (training.warmup, training.discriminator_warmup) == (0.01, 0.03)
        assert (losses.gan_start, losses.gan_warmup, losses.gan_consistency_weight) == (0.375, 0.03, 4)
        assert losses.blur_sigma(losses.gan_start, 256) == 9.58
        assert (training.ema_decay, training.ema_decay_after(78_124)) == (0.9999, 78_125 / 78_134)
        assert UniTokConfig.preset(size, **arguments.vision_overrides).vision_config.drop_path_rate == 0.1


def test_sources_that_do_not_go_together_are_refused(text_tokenizer, captioned_folder):
    data = UniTokImageProcessor(size={"height": 32, "width": 32}), text_tokenizer, 16, 0
    folder = {"kind": "folder", "path": str(captioned_folder)}
    stream = {"kind": "webdataset", "shards": "{00..01}.tar", "samples_per_epoch": 10}
    for sources in ([], [folder, stream]):
        with pytest.raises(ValueError, match="one webdataset, or any number of other kinds"):
            build_datasets(sources, *data)
    dataset, samples = build_datasets([folder, folder], *data)
    assert len(dataset) == 18 and samples is None


def test_a_text_tokenizer_of_another_kind_is_refused(text_tokenizer):
    config = UniTokConfig.preset("tiny")
    check_text_tokenizer(text_tokenizer, config)
    config.text_config.eos_token_id = 7
    with pytest.raises(ValueError, match="ends texts with 2; the text tower has 512 and looks for 7"):
        check_text_tokenizer(text_tokenizer, config)
