"""Other people's tools, unmodified, on this project's models: the library's pipelines and server, trl, LLaVA, peft,
accelerate, torchao, bitsandbytes, and torch's compiler and exporter. `docs/other_tools.md` shows them to users."""

import base64
import copy
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from io import BytesIO
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, infer_auto_device_map
from conftest import enliven
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    TextStreamer,
    TorchAoConfig,
    pipeline,
)
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from eval.easy_vqa import PAIRS, answer_questions, draw
from training.easy_vqa import load
from unitok_mllm import UniTokMLLMForConditionalGeneration, UniTokModel, UniTokVisionModel


pytestmark = pytest.mark.full


ANSWERS = {"red": "a red circle", "blue": "the blue shape", "white": "yes", "black": "no"}
QUESTION = "what is the shape?"


def sample(color: str) -> dict:
    """A picture with a question and an answer, in the conversational form that trl documents."""
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWERS[color]}]
    return {"images": [Image.new("RGB", (30, 30), color)], "messages": messages}


def chat(color: str) -> list[dict]:
    picture = {"type": "image", "image": Image.new("RGB", (30, 30), color)}
    return [{"role": "user", "content": [picture, {"type": "text", "text": QUESTION}]}]


def ask(model, processor, color: str, device: str = "cpu", **options) -> torch.Tensor:
    """The ids of a greedy answer, (1, T)."""
    inputs = processor.apply_chat_template(chat(color), add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = model.generate(**inputs.to(device), do_sample=False, **{"max_new_tokens": 12, **options})
    return ids[:, inputs["input_ids"].shape[1] :].cpu()


@torch.no_grad()
def behaviour(model, processor, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """An answer about a picture, a guided drawing's codes, its pixels, and a picture's codes."""
    answer = ask(model, processor, "red", device, min_new_tokens=6, max_new_tokens=6)
    prompt = processor(text=["a red circle", "blue"], generation_mode="image").to(device)
    codes = model.generate(**prompt, generation_mode="image", guidance_scale=2.0, seed=3)
    pictures = torch.linspace(-1, 1, 2 * 3 * 48 * 48, device=device).view(2, 3, 48, 48).sin()
    outputs = (answer, codes, model.decode_images(codes), model.encode_images(pictures))
    return tuple(output.cpu() for output in outputs)


def changed(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


# --- the library's pipelines ---


def drawing(model, processor, inputs, **options) -> bytes:
    codes = model.generate(**inputs, generation_mode="image", **options)
    return processor.post_process_multimodal_output(model.decode_images(codes), generation_mode="image")[0].tobytes()


def test_the_any_to_any_pipeline_draws_what_generate_draws(lively_mllm, processor):
    pipe = pipeline("any-to-any", model=lively_mllm, processor=processor, device="cpu")
    options = {"seed": 3, "guidance_scale": 2.0}
    expected = {
        text: drawing(lively_mllm, processor, processor(text=text, generation_mode="image"), **options)
        for text in ("a red circle", "blue")
    }
    of_images = {"generation_mode": "image", "generate_kwargs": options}
    told = pipe("blue", **of_images, processor_kwargs={"generation_mode": "image"})
    assert [record["generated_image"].tobytes() for record in told] == [expected["blue"]]
    with pytest.raises(ValueError, match="for a pipeline, processor_kwargs=.'generation_mode': 'image'."):
        pipe("blue", **of_images)

    for name, ids in processor.config_prompt_ids().items():
        setattr(lively_mllm.config, name, ids)
    assert pipe("blue", **of_images)[0]["generated_image"].tobytes() == expected["blue"]
    several = pipe([{"text": text} for text in expected], **of_images)
    assert {r[0]["input_text"]: r[0]["generated_image"].tobytes() for r in several} == expected
    with pytest.raises(ValueError, match="give a pipeline several prompts as"):
        pipe(list(expected), **of_images)
    with_picture = processor(
        text=processor.apply_chat_template(chat("red"), add_generation_prompt=True),
        images=[Image.new("RGB", (30, 30), "red")],
        generation_mode="image",
    )
    drawn = pipe(chat("red"), **of_images)[0]["generated_image"].tobytes()
    assert drawn == drawing(lively_mllm, processor, with_picture, **options)


def test_a_generation_config_is_honoured_or_refused_by_name_where_an_image_is_drawn(lively_mllm, processor):
    inputs = processor(text="blue", generation_mode="image")
    config = GenerationConfig(do_sample=False, max_new_tokens=3, eos_token_id=2)
    by_config = drawing(lively_mllm, processor, inputs, generation_config=config)
    assert by_config == drawing(lively_mllm, processor, inputs, do_sample=False)
    with pytest.raises(ValueError, match=r"does not know these options of the generation_config: \['num_beams'\]"):
        drawing(lively_mllm, processor, inputs, generation_config=GenerationConfig(num_beams=3))
    with pytest.raises(TypeError, match="num_beams"):
        drawing(lively_mllm, processor, inputs, num_beams=3)


def test_the_image_text_to_text_pipeline_answers_what_generate_answers(lively_mllm, processor, capsys):
    pipe = pipeline("image-text-to-text", model=lively_mllm, processor=processor, device="cpu")
    expected = {
        color: processor.decode(ask(lively_mllm, processor, color, max_new_tokens=6)[0], skip_special_tokens=True)
        for color in ("red", "blue")
    }
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    assert pipe(text=chat("red"), **options)[0]["generated_text"] == expected["red"]
    several = pipe(text=[chat(color) for color in expected], **options, batch_size=2)
    assert [records[0]["generated_text"] for records in several] == list(expected.values())
    capsys.readouterr()
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    pipe(text=chat("blue"), **options, generate_kwargs={"streamer": streamer})
    assert capsys.readouterr().out.strip() == expected["blue"].strip()
    any_pipe = pipeline("any-to-any", model=lively_mllm, processor=processor, device="cpu")
    assert any_pipe(chat("red"), **options)[0]["generated_text"] == expected["red"]


# --- the library's server ---


def test_servers_are_told_the_placeholders_of_an_image(processor):
    inputs = processor(text="<image> yes", images=[Image.new("RGB", (30, 70))], return_mm_token_type_ids=True)
    told = processor._get_num_multimodal_tokens(image_sizes=[(70, 30), (5, 5)])
    placeholders = int((inputs["input_ids"] == processor.image_token_id).sum())
    assert told["num_image_tokens"] == [placeholders, placeholders] and told["num_image_patches"] == [1, 1]
    assert inputs["mm_token_type_ids"].sum() == placeholders
    assert processor._get_num_multimodal_tokens()["num_image_tokens"] is None


def test_engines_find_the_places_and_the_features_of_images(processor, lively_mllm, tmp_path):
    """What the Transformers backends of vLLM (from transformers 5.15) and SGLang ask for."""
    pictures = [Image.new("RGB", (30, 70)), Image.new("RGB", (5, 5))]
    inputs = processor(text="<image> or <image>?", images=pictures, return_text_replacement_offsets=True)
    (offsets,) = inputs["text_replacement_offsets"]
    assert [entry["type"] for entry in offsets] == ["image", "image"]
    for entry in offsets:
        ids = processor.tokenizer(entry["replacement"], add_special_tokens=False).input_ids
        assert ids.count(processor.image_token_id) == max(map(ids.count, ids)) == 9
    lively_mllm.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["auto_map"]
    code, model = "modeling_unitok_mllm", "UniTokMLLMForConditionalGeneration"
    assert auto_map == {
        "AutoConfig": "configuration_unitok.UniTokMLLMConfig",
        "AutoModel": f"{code}.UniTokMLLMModel",
        "AutoModelForImageTextToText": f"{code}.{model}",
        "AutoModelForMultimodalLM": f"{code}.{model}",
    }
    base = AutoModel.from_pretrained(tmp_path, attn_implementation={"text_config": "eager"})
    assert base.get_decoder().config._attn_implementation == "eager"
    features = base.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    embeds, _ = lively_mllm.embed(inputs["input_ids"], inputs["pixel_values"])
    places = inputs["input_ids"][0] == processor.image_token_id
    torch.testing.assert_close(features.reshape(-1, features.shape[-1]), embeds[0, places])


@pytest.mark.slow  # the server takes about 20 s to start
@pytest.mark.parametrize("kind", ["shipped", "saved"])
def test_transformers_serve_answers_about_a_picture(kind, tmp_path):
    folder = "unitok_mllm/checkpoints/tiny"
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    expected = processor.decode(ask(model, processor, "red")[0], skip_special_tokens=True)
    if kind == "saved":
        folder = str(tmp_path)
        model.save_pretrained(folder), processor.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    png = BytesIO()
    Image.new("RGB", (30, 30), "red").save(png, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    request = {"model": folder, "messages": [{"role": "user", "content": content}], "temperature": 0}

    def post(**body) -> str:
        data, kind = json.dumps({**request, **body}).encode(), {"Content-Type": "application/json"}
        address = f"http://127.0.0.1:{port}/v1/chat/completions"
        with urllib.request.urlopen(urllib.request.Request(address, data, kind), timeout=120) as answer:
            return answer.read().decode()

    program = Path(sys.executable).parent / "transformers"
    options = ["--trust-remote-code", "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    server = subprocess.Popen([program, "serve", folder, *options], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                answer = post(max_tokens=12)
                break
            except urllib.error.HTTPError:
                raise
            except urllib.error.URLError:
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(1)
        assert json.loads(answer)["choices"][0]["message"]["content"] == expected
        chunks = [json.loads(line[6:]) for line in post(max_tokens=12, stream=True).splitlines() if line]
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected
    finally:
        server.terminate()
        server.communicate(timeout=60)


# --- trl ---


def test_trl_learns_from_the_very_tokens_of_inference(processor):
    collate = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True, max_length=512)
    batch = collate([sample(color) for color in ANSWERS])
    assert batch["pixel_values"].shape == (4, 3, 48, 48)
    for row, (color, answer) in enumerate(ANSWERS.items()):
        prompt = processor.apply_chat_template(chat(color), add_generation_prompt=True, tokenize=True)[0]
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        assert torch.equal(ids[: len(prompt)], prompt)
        assert processor.decode(ids[len(prompt) :]) == f" {answer}</s>"
        targets = batch["labels"][row] != -100
        assert torch.equal(batch["labels"][row][targets], ids[len(prompt) :])
    # prompts and completions are rendered first, and only the template can then write BOS
    processor.chat_template = "{{ bos_token }}" + processor.chat_template
    split = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    rows = [sample(color) for color in ANSWERS]
    rows = [{"images": r["images"], "prompt": r["messages"][:1], "completion": r["messages"][1:]} for r in rows]
    again = split(rows)
    for key in ("input_ids", "attention_mask", "labels", "pixel_values"):
        assert torch.equal(again[key], batch[key]), key
    assert torch.equal(collate([sample(color) for color in ANSWERS])["input_ids"], batch["input_ids"])


@pytest.mark.parametrize("lora", [False, True])
def test_trl_trains_the_model_to_answer_and_leaves_the_visual_tokenizer_alone(lively_mllm, processor, tmp_path, lora):
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=20 if lora else 14,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        assistant_only_loss=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    rows = [sample(color) for color in ANSWERS]
    with torch.no_grad():
        batch = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)(copy.deepcopy(rows))
        first = lively_mllm(**batch).loss.item()
    before = {name: tensor.clone() for name, tensor in lively_mllm.state_dict().items()}
    adapter = LoraConfig(r=8, target_modules=r"language_model\..*_proj", modules_to_save=["embedder"])
    trainer = SFTTrainer(
        lively_mllm,
        arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        peft_config=adapter if lora else None,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(first, rel=1e-3)  # what trl computes is what the model itself calls its loss
    assert losses[-1] < 0.2 * losses[0]
    model = trainer.model.merge_and_unload() if lora else trainer.model
    model.eval()
    parts = {name.split(".")[0] for name in changed(before, model)}
    assert parts == {"language_model", "embedder"}
    assert not any("quantizer" in name for name in changed(before, model))
    answers = [processor.decode(ask(model, processor, c)[0], skip_special_tokens=True).strip() for c in ANSWERS]
    assert answers == list(ANSWERS.values())

    if not lora:
        trainer.save_model(str(tmp_path / "saved"))
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
        again = AutoProcessor.from_pretrained(tmp_path / "saved")
        assert torch.equal(ask(loaded, again, "red"), ask(model, processor, "red"))


# --- LLaVA ---


def test_stock_llava_learns_to_answer_through_a_frozen_saved_tower(
    llama_config, visual_tokenizer, processor, tmp_path
):
    enliven(visual_tokenizer.vision_model, 2).save_pretrained(tmp_path / "tower")
    config = LlavaConfig(
        vision_config=visual_tokenizer.config.vision_config,
        text_config=llama_config,
        image_token_index=processor.image_token_id,
        image_seq_length=9,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    llava = enliven(LlavaForConditionalGeneration(config))
    llava.model.vision_tower = UniTokVisionModel.from_pretrained(tmp_path / "tower").requires_grad_(False).eval()
    frozen = {name: tensor.clone() for name, tensor in llava.model.vision_tower.state_dict().items()}
    batch = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)([sample(c) for c in ANSWERS])
    optimizer = torch.optim.AdamW([p for p in llava.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = llava(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert not changed(frozen, llava.model.vision_tower)
    answers = [processor.decode(ask(llava.eval(), processor, c)[0], skip_special_tokens=True).strip() for c in ANSWERS]
    assert answers == list(ANSWERS.values())


# --- peft ---


@torch.no_grad()
def test_an_adapter_of_the_llm_gives_the_same_logits_by_every_route(lively_mllm, processor, tmp_path):
    lively_mllm.save_pretrained(tmp_path / "base")
    batch = DataCollatorForVisionLanguageModeling(processor)([sample(color) for color in ANSWERS])
    batch["image_targets"] = torch.tensor([False, True, True, False])
    lora = LoraConfig(target_modules=r"language_model\..*_proj", init_lora_weights=False)
    model = get_peft_model(lively_mllm, lora).eval()
    with model.disable_adapter():
        plain = model(**batch)
    adapted = model(**batch)
    assert (adapted.logits - plain.logits).abs().max() > 0.1
    assert (adapted.image_logits - plain.image_logits).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")

    def load_base() -> UniTokMLLMForConditionalGeneration:
        return UniTokMLLMForConditionalGeneration.from_pretrained(tmp_path / "base").eval()

    with_adapter = load_base()
    with_adapter.load_adapter(str(tmp_path / "adapter"))
    wrapped = PeftModel.from_pretrained(load_base(), tmp_path / "adapter").eval()
    for name, other in (
        ("load_adapter", with_adapter),
        ("from_pretrained", wrapped),
        ("merged", PeftModel.from_pretrained(load_base(), tmp_path / "adapter").merge_and_unload()),
        ("merged itself", model.merge_and_unload()),
    ):
        output = other(**batch)
        torch.testing.assert_close(output.logits, adapted.logits, rtol=1e-5, atol=1e-5, msg=name)
        torch.testing.assert_close(output.image_logits, adapted.image_logits, rtol=1e-5, atol=1e-5, msg=name)


def test_an_adapter_reaches_the_attention_projections_too(visual_tokenizer, images):
    before = visual_tokenizer.vision_model.encode_features(images)
    lora = LoraConfig(target_modules=r".*quant_proj\.attn\.qkv", init_lora_weights=False)
    adapted = get_peft_model(visual_tokenizer, lora)
    assert (adapted.base_model.model.vision_model.encode_features(images) - before).abs().max() > 1e-4


# --- accelerate ---


def test_a_model_kept_partly_on_disk_answers_and_draws_as_one_in_memory(lively_mllm, processor, tmp_path):
    expected = behaviour(lively_mllm, processor)
    lively_mllm.save_pretrained(tmp_path / "model")
    model = UniTokMLLMForConditionalGeneration.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": lively_mllm.get_memory_footprint() // 2},
        offload_folder=tmp_path / "offload",
    )
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    for output, value in zip(behaviour(model, processor), expected):
        assert torch.equal(output, value)


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch_model"])
def test_offloading_by_hand_changes_nothing(lively_mllm, processor, tmp_path, how):
    expected = behaviour(lively_mllm, processor)
    if how == "cpu_offload":
        cpu_offload(lively_mllm, execution_device=torch.device("cpu"))
    elif how == "disk_offload":
        disk_offload(lively_mllm, tmp_path, execution_device=torch.device("cpu"))
    else:
        places = {"language_model": "cpu", "visual": "disk", "embedder": "disk", "depth_head": "disk"}
        dispatch_model(lively_mllm, places, main_device="cpu", offload_dir=tmp_path)
    assert lively_mllm.visual.vision_model.quantizer.codebooks.device.type == "meta"
    for output, value in zip(behaviour(lively_mllm, processor), expected):
        assert torch.equal(output, value)
    assert lively_mllm.visual.vision_model.quantizer.codebooks.device.type == "meta"  # and gone again


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_no_block_with_a_shortcut_is_split_over_devices(family, llama_config, visual_tokenizer):
    sizes = {name: value for name, value in llama_config.to_dict().items() if name != "model_type"}
    config = AutoConfig.for_model(family, **sizes)
    model = UniTokMLLMForConditionalGeneration.from_parts(
        AutoModelForCausalLM.from_config(config), visual_tokenizer, embedder_dim=40, embedder_heads=2
    )
    kinds = (
        "DecoderLayer",
        "EncoderLayer",
        "Block",
        "MbConvLNBlock",
        "UniTokMBConvBlock",
        "UniTokAttentionProjection",
    )
    blocks = [name for name, module in model.named_modules() if type(module).__name__.endswith(kinds)]
    assert len(blocks) == 2 + 3 + 1 + 3 + 2 + 3 + 2 + 3  # LLM, depth, text tower, encoder, decoder, three projections
    for percent in range(5, 100, 5):
        places = infer_auto_device_map(
            model,
            {"cpu": model.get_memory_footprint() * percent // 100, "disk": 2**30},
            no_split_module_classes=list(model._no_split_modules),
        )
        assert not [place for place in places if place.startswith(tuple(f"{block}." for block in blocks))]


@pytest.mark.gpu
def test_a_model_split_over_gpu_and_cpu_answers_and_draws_as_one_on_the_gpu(lively_mllm, processor, tmp_path):
    lively_mllm.save_pretrained(tmp_path)
    expected = behaviour(lively_mllm.to("cuda"), processor, "cuda")
    model = UniTokMLLMForConditionalGeneration.from_pretrained(
        tmp_path, device_map="auto", max_memory={0: 2**20, "cpu": 2**30}
    )
    assert set(model.hf_device_map.values()) == {0, "cpu"}
    answer, codes, pixels, read = behaviour(model, processor, "cuda")
    assert torch.equal(answer, expected[0]) and torch.equal(codes, expected[1]) and torch.equal(read, expected[3])
    torch.testing.assert_close(pixels, expected[2])


# --- 8-bit weights ---


def int8(skip: list[str] | None) -> TorchAoConfig:
    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skip)


@torch.no_grad()
def test_int8_weights_leave_what_is_read_as_it_was(lively_mllm, processor, images, tmp_path):
    lively_mllm.save_pretrained(tmp_path / "model")
    config = int8(["visual", "language_model.lm_head"])
    model = UniTokMLLMForConditionalGeneration.from_pretrained(tmp_path / "model", quantization_config=config)
    linear = {n: type(m.weight).__name__ for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, kind in linear.items():
        assert (kind == "Int8Tensor") == (not name.startswith("visual.") and "lm_head" not in name), name
    assert model.embedder.quantizer.codebooks.dtype == torch.float32
    assert torch.equal(model.encode_images(images), lively_mllm.encode_images(images))
    batch = DataCollatorForVisionLanguageModeling(processor)([sample(color) for color in ANSWERS])
    batch["image_targets"] = torch.ones(4, dtype=torch.bool)
    for name in ("logits", "image_logits"):
        exact, rounded = lively_mllm(**batch)[name], model(**batch)[name]
        error = (rounded - exact).std() / exact.std()
        assert 0 < error < 0.05, (name, error)
    model.save_pretrained(tmp_path / "int8")
    loaded = UniTokMLLMForConditionalGeneration.from_pretrained(tmp_path / "int8")
    for output, value in zip(behaviour(loaded, processor), behaviour(model, processor)):
        assert torch.equal(output, value)


@pytest.mark.gpu
@torch.no_grad()
def test_bitsandbytes_int8_leaves_what_is_read_as_it_was(lively_mllm, processor, images, tmp_path):
    lively_mllm.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["visual", "language_model.lm_head"])
    model = UniTokMLLMForConditionalGeneration.from_pretrained(tmp_path, quantization_config=config, device_map="auto")
    exact = lively_mllm.to("cuda")
    assert model.language_model.model.layers[0].mlp.up_proj.weight.dtype == torch.int8
    assert torch.equal(model.encode_images(images.cuda()), exact.encode_images(images.cuda()))
    batch = DataCollatorForVisionLanguageModeling(processor)([sample(color) for color in ANSWERS]).to("cuda")
    logits = exact(**batch).logits
    assert (model(**batch).logits - logits).std() < 0.1 * logits.std()


@pytest.mark.slow
@pytest.mark.parametrize(
    "skip", [["visual", "language_model.lm_head"], ["language_model.lm_head"]], ids=["LLM", "everything"]
)
@torch.no_grad()
def test_the_shipped_model_keeps_its_answers_and_drawings_with_int8_weights(skip):
    folder = "unitok_mllm/checkpoints/tiny"
    processor = AutoProcessor.from_pretrained(folder)
    exact = AutoModelForImageTextToText.from_pretrained(folder).eval()
    rounded = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=int8(skip)).eval()
    samples = load("test")[:200]
    questions = [one.questions[0] for one in samples]
    pixels = processor.image_processor([Image.open(one.image).convert("RGB") for one in samples])["pixel_values"]
    captions = [f"a {color} {shape}" for color, shape in PAIRS]
    answers, drawings, read = [], [], []
    for model in (exact, rounded):
        read.append(model.encode_images(pixels))
        answers.append(answer_questions(model, processor, [q for q, _ in questions], read[-1]))
        options = {"guidance_scale": 3.0, "plausibility": 0.0, "temperature": 0.7, "top_k": 20}
        drawings.append(draw(model, processor, captions, list(range(len(PAIRS))), **options))
    texts = [processor.image_sample(caption) for caption in captions]
    whole = processor(text=texts, images=[Image.new("RGB", (64, 64))] * len(texts))
    forced = {"input_ids": whole["input_ids"], "attention_mask": whole["attention_mask"], "image_codes": drawings[0]}
    targets = torch.ones(len(texts), dtype=torch.bool)
    likeliest = [model(**forced, image_targets=targets).image_logits.argmax(dim=-1) for model in (exact, rounded)]
    truths = [truth for _, truth in questions]
    figures = {
        "codes read": (read[0] == read[1]).float().mean().item(),
        "equal answers": sum(a == b for a, b in zip(*answers)) / len(truths),
        "right before": sum(a.strip() == t for a, t in zip(answers[0], truths)) / len(truths),
        "right after": sum(a.strip() == t for a, t in zip(answers[1], truths)) / len(truths),
        "likeliest code, teacher-forced": (likeliest[0] == likeliest[1]).float().mean().item(),
        "codes drawn": (drawings[0] == drawings[1]).float().mean().item(),
        "drawings equal": (drawings[0] == drawings[1]).flatten(1).all(dim=1).float().mean().item(),
    }
    print("\n", {name: round(value, 4) for name, value in figures.items()})
    assert figures["equal answers"] >= 0.97 and figures["right after"] >= figures["right before"] - 0.02
    assert figures["likeliest code, teacher-forced"] >= 0.95
    assert figures["codes read"] >= (1.0 if "visual" in skip else 0.9)


# --- torch.compile, torch.export ---


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) to codes (B, K, L)."""

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.tokenizer.encode(pixel_values)


class Decoder(Encoder):
    """Codes (B, K, L) to pixels (B, 3, H, W)."""

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        return self.tokenizer.decode(codes)


@pytest.fixture(params=[Encoder, Decoder])
def part_and_inputs(request, tokenizer_config, images) -> tuple[nn.Module, torch.Tensor]:
    torch._dynamo.reset()
    tokenizer_config.vision_config.num_hidden_layers = tokenizer_config.decoder_layers = 1
    tokenizer_config.vision_config.stage_depths = (1, 1)
    tokenizer_config.text_config = None
    inputs = images if request.param is Encoder else torch.randint(0, 32, (4, 4, 9))
    return request.param(UniTokModel(tokenizer_config).eval()), inputs


@torch.no_grad()
def test_encoder_and_decoder_compile_to_one_graph(part_and_inputs):
    part, inputs = part_and_inputs
    compiled = torch.compile(part, backend="aot_eager", fullgraph=True)  # raises at a graph break
    torch.testing.assert_close(compiled(inputs), part(inputs), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_encoder_and_decoder_export_with_any_batch_size_and_load_again(part_and_inputs, tmp_path):
    part, inputs = part_and_inputs
    program = torch.export.export(part, (inputs[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "part.pt2")
    loaded = torch.export.load(tmp_path / "part.pt2").module()
    for batch_size in (1, 2, 4):
        expected = part(inputs[:batch_size])
        torch.testing.assert_close(program.module()(inputs[:batch_size]), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loaded(inputs[:batch_size]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@torch.no_grad()
def test_inductor_gives_the_same_codes_pixels_logits_and_drawings(lively_mllm, processor, images):
    torch._dynamo.reset()
    visual, codes = lively_mllm.visual, lively_mllm.encode_images(images)
    assert torch.equal(torch.compile(Encoder(visual), fullgraph=True)(images), codes)
    pixels = torch.compile(Decoder(visual), fullgraph=True)(codes)
    torch.testing.assert_close(pixels, visual.decode(codes), rtol=1e-4, atol=1e-5)
    batch = DataCollatorForVisionLanguageModeling(processor)([sample(color) for color in ANSWERS])
    logits = lively_mllm(**batch).logits
    torch.testing.assert_close(torch.compile(lively_mllm)(**batch).logits, logits, rtol=1e-4, atol=1e-4)
    prompt = processor(text="a red circle", generation_mode="image")
    drawn = lively_mllm.generate(**prompt, generation_mode="image", seed=3)
    lively_mllm.get_decoder().compile(dynamic=True)
    assert torch.equal(lively_mllm.generate(**prompt, generation_mode="image", seed=3), drawn)


@pytest.mark.slow
def test_a_compiled_training_step_has_the_gradients_of_an_eager_one(lively_mllm, processor):
    torch._dynamo.reset()
    batch = dict(DataCollatorForVisionLanguageModeling(processor)([sample(color) for color in ANSWERS]))
    batch |= {"image_codes": lively_mllm.encode_images(batch.pop("pixel_values"))}
    batch |= {"image_targets": torch.tensor([True, False, True, False])}
    lively_mllm(**batch).loss.backward()
    expected = {name: p.grad for name, p in lively_mllm.named_parameters() if p.grad is not None}
    assert len(expected) > 30
    lively_mllm.zero_grad()
    lively_mllm.compile()
    lively_mllm(**batch).loss.backward()
    for name, parameter in lively_mllm.named_parameters():
        torch.testing.assert_close(parameter.grad, expected.get(name), rtol=1e-3, atol=1e-5)
