"""LoRA and QLoRA in the MLLM's training: what is trained, adapters that are loaded, resumed and merged."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mllm_runs import ENVIRONMENT, LORA, ROOT, built, changed, evaluations, losses, write_config
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from training.merge_lora import app as merge_lora_app
from training.merge_lora import load_with_adapter
from training.mllm_trainer import is_under
from training.train_mllm import main
from unitok_mllm import UniTokMLLMForConditionalGeneration, UniTokMLLMProcessor


FRESH_PROCESS = """
import sys
from PIL import Image
from training.merge_lora import load_with_adapter
from unitok_mllm import UniTokMLLMProcessor

adapter, picture, question = sys.argv[1:]
model, processor = load_with_adapter(adapter), UniTokMLLMProcessor.from_pretrained(adapter)
turn = {"role": "user", "content": [{"type": "image", "path": picture}, {"type": "text", "text": question}]}
inputs = processor.apply_chat_template([turn], tokenize=True, return_dict=True, add_generation_prompt=True)
ids = model.generate(**inputs, max_new_tokens=32, do_sample=False)[:, inputs["input_ids"].shape[1] :]
sys.stdout.write(processor.batch_decode(ids, skip_special_tokens=True)[0].strip())
"""


@pytest.mark.full
def test_an_adapter_answers_in_a_fresh_process_as_it_did_in_training(tmp_path, start, data):
    pictures = Path(data["read"]["path"]).parent
    question = {"image": str(pictures / "0.png"), "question": "what is this?"}
    options = {"max_steps": 30, "sample_questions": [question]} | LORA
    main([str(write_config(tmp_path / "run.yaml", start, [data["read"]], **options))])
    (trained,) = json.loads((tmp_path / "run/samples/step-30.json").read_text(encoding="utf-8"))["answers"]
    command = [sys.executable, "-c", FRESH_PROCESS, tmp_path / "run/adapter", *question.values()]
    fresh = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert fresh.stdout == trained["answer"] and "blue shape" in trained["answer"]


def test_lora_trains_the_llm_beside_whole_parts_and_merges(tmp_path, start, data):
    sources = [data["read"], data["draw"]]
    config = write_config(tmp_path / "run.yaml", start, sources, max_steps=3, **LORA)
    main([str(config)])
    adapter, release = tmp_path / "run/adapter", tmp_path / "run/release"
    weights = load_file(adapter / "adapter_model.safetensors")
    assert {name.split(".")[2] for name in weights} == {"language_model", "embedder", "depth_head"}
    assert not any("lm_head" in name or "visual" in name for name in weights)
    lora = {name for name in weights if "lora_" in name}
    assert len(lora) == 2 * 7 * 2  # A and B of seven layers in two blocks

    names = changed(start, release)
    linear = {f"{n}_proj.weight" for n in ("q", "k", "v", "o", "gate", "up", "down")}
    in_llm = {name for name in names if name.startswith("language_model")}
    assert in_llm and all(name.split(".", 5)[-1] in linear for name in in_llm) and len(in_llm) == 14
    assert {name.split(".")[0] for name in names} == {"language_model", "embedder", "depth_head"}

    reloaded, merged = load_with_adapter(adapter), UniTokMLLMForConditionalGeneration.from_pretrained(release)
    processor = UniTokMLLMProcessor.from_pretrained(adapter)
    assert isinstance(reloaded, PeftModel)
    inputs = processor(images=Image.new("RGB", (60, 60), "red"), text="<image> what is this?")
    with torch.no_grad():
        logits = [model(**inputs).logits for model in (reloaded, merged)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    codes = reloaded.generate(**processor(text="red", generation_mode="image"), generation_mode="image", seed=0)
    assert codes.shape == (1, 4, 9)


@pytest.mark.parametrize(
    "trainable",
    [
        ["depth_head.layers"],
        ["depth_head.layers.1.mlp", "depth_head.head.weight", "embedder.norm", "embedder.norm.weight"],
        ["language_model.lm_head", "language_model.model.norm", "language_model.model.embed_tokens"],
    ],
)
def test_lora_trains_any_prefix_saves_reloads_resumes_and_merges(tmp_path, start, data, trainable):
    options = LORA | {"trainable": trainable, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    config = write_config(tmp_path / "run.yaml", start, [data["read"], data["draw"]], **options)
    main([str(config)])
    release, adapter = tmp_path / "run/release", tmp_path / "run/adapter"
    before = load_file(start / "model.safetensors")
    named = {name for name in before if any(is_under(name, prefix) for prefix in trainable)}
    in_lora = {name for name in before if ".layers." in name and "_proj.weight" in name and "language" in name}
    assert len(in_lora) == 14 and changed(start, release) == named | in_lora

    uninterrupted = losses(tmp_path / "run")
    main([str(config), "--resume_from_checkpoint", str(tmp_path / "run/checkpoint-2")])
    np.testing.assert_allclose(losses(tmp_path / "run"), uninterrupted, rtol=1e-6)
    assert changed(start, release) == named | in_lora

    merged = tmp_path / "merged"
    CliRunner().invoke(merge_lora_app, [str(adapter), str(merged), "--dtype", "float32"], catch_exceptions=False)
    assert not changed(release, merged)
    processor = UniTokMLLMProcessor.from_pretrained(adapter)
    inputs = processor(images=Image.new("RGB", (60, 60), "red"), text="<image> what is this?")
    inputs["image_targets"] = torch.tensor([True])
    models = load_with_adapter(adapter), UniTokMLLMForConditionalGeneration.from_pretrained(release)
    with torch.no_grad():
        first, second = (model(**inputs) for model in models)
    torch.testing.assert_close(first.logits, second.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first.image_logits, second.image_logits, rtol=1e-4, atol=1e-4)


def test_lora_refuses_what_it_cannot_train_whole(tmp_path, start, data):
    for prefix, message in (
        (
            "language_model.model",
            r"lora trains language_model.model.layers.0.self_attn.q_proj: take language_model.model",
        ),
        ("language_model.model.layers.1.mlp.up_proj.weight", "lora trains language_model.model.layers.1.mlp.up_proj"),
        ("depth_head.nothing", "matches no parameter"),
    ):
        with pytest.raises(ValueError, match=message):
            main([str(write_config(tmp_path / "run.yaml", start, [data["read"]], **LORA | {"trainable": [prefix]}))])
    config = json.loads((start / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["tie_word_embeddings"] = True
    (start / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = load_file(start / "model.safetensors")
    del weights["language_model.lm_head.weight"]
    save_file(weights, start / "model.safetensors", {"format": "pt"})
    tied = LORA | {"trainable": ["language_model.model.embed_tokens"]}
    with pytest.raises(ValueError, match="the LLM's embeddings and output are one tied weight"):
        main([str(write_config(tmp_path / "run.yaml", start, [data["read"]], **tied))])


def test_lora_on_joined_parts_keeps_its_base(tmp_path, start, data, mllm, processor):
    mllm.language_model.save_pretrained(tmp_path / "llm")
    processor.tokenizer.save_pretrained(tmp_path / "llm")
    parts = {"model": "", "visual_model": str(start), "llm": str(tmp_path / "llm"), "embedder_dim": 40}
    parts |= {"embedder_heads": 2, "boi_token": "<boi>", "eoi_token": "<eoi>"}
    main([str(write_config(tmp_path / "run.yaml", start, [data["read"]], max_steps=2, **parts, **LORA))])
    names = {name.split(".")[0] for name in changed(tmp_path / "run/base", tmp_path / "run/release")}
    assert names == {"language_model", "embedder"}  # nothing was drawn
    base = load_file(tmp_path / "run/base/model.safetensors")
    for name, weight in mllm.language_model.state_dict().items():
        assert torch.equal(base[f"language_model.{name}"], weight), name


def test_qlora_trains_over_four_bits(tmp_path, start, data):
    bits = pytest.importorskip("bitsandbytes", reason="needs the extra `qlora`")
    config = write_config(
        tmp_path / "run.yaml",
        start,
        [data["read"], data["draw"]],
        max_steps=3,
        load_in_4bit=True,
        eval_datasets=[data["read"], data["draw"]],
        eval_strategy="steps",
        eval_steps=3,
        **LORA,
    )
    start_of_run, _ = built(config)
    in_four_bits = {n for n, m in start_of_run.named_modules() if isinstance(m, bits.nn.Linear4bit)}
    assert len(in_four_bits) == 14 and all(name.startswith("language_model.model.layers") for name in in_four_bits)
    main([str(config)])
    names = changed(start, tmp_path / "run/release")
    assert {name.split(".")[0] for name in names} == {"language_model", "embedder", "depth_head"}
    (_, *first), *_, (_, *last) = losses(tmp_path / "run")
    assert first[0] > last[0] and first[1] > last[1]

    # what is released is what was trained, but for the bfloat16 that it was computed in
    check = {"eval_datasets": [data["read"], data["draw"]], "eval_strategy": "steps", "eval_on_start": True}
    (trained,) = evaluations(tmp_path / "run")
    CliRunner().invoke(merge_lora_app, [f"{tmp_path}/run/adapter", f"{tmp_path}/merged"], catch_exceptions=False)
    unquantized = ["--base", str(start)]
    CliRunner().invoke(merge_lora_app, [f"{tmp_path}/run/adapter", f"{tmp_path}/other", *unquantized])
    differences = {}
    for name in ("run/release", "merged", "other"):
        config = write_config(tmp_path / "check.yaml", tmp_path / name, [data["text"]], max_steps=1, **check)
        main([str(config)])
        released = evaluations(tmp_path / "check")[0]
        differences[name] = abs(released[0] / trained[0] - 1)
    assert differences["run/release"] < 2e-4 and differences["merged"] < 2e-4 < 1e-3 < differences["other"]
