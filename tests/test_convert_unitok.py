"""Conversion of original checkpoints, compared with outputs of the original program; bad files are refused."""

import math
import os
import pickle
import re
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from original_checkpoints import FIXTURES, reference_state, tokenizer_checkpoint, write_mllm_folder
from reference_weights import reference_image
from tokenizers import Tokenizer, models
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from unitok_mllm import cli
from unitok_mllm.convert_unitok import ConversionError, convert_mllm, convert_tokenizer, load_original_tokenizer
from unitok_mllm.drawing_unitok import IMAGE_GENERATION


NUM_BASE_TENSORS = 287
IMAGE = 320  # the placeholder's id in the converted MLLM: the first behind the text tokenizer's vocabulary


@pytest.fixture(scope="module")
def base_checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("original") / "base.pth"
    torch.save(tokenizer_checkpoint(reference_state("tokenizer_base_depth2"), "vitamin_base"), path)
    return path


@pytest.fixture(scope="module")
def small_state():
    """The base tokenizer's tensors, an eighth as wide: quick to write and to read."""
    return reference_state("tokenizer_base_depth2", shrink=8)


@pytest.fixture
def small_checkpoint(small_state):
    return tokenizer_checkpoint(dict(small_state), "vitamin_base")


def saved(checkpoint, folder):
    torch.save(checkpoint, folder / "tokenizer.pth")
    return folder / "tokenizer.pth"


# --- agreement with the original program ---


def check_tokenizer(folder, name):
    """Compares a converted tokenizer with all that the original program gave for the same weights and inputs."""
    recorded = np.load(FIXTURES / f"{name}.npz")
    model = AutoModel.from_pretrained(folder)
    tower = model.vision_model
    images = torch.from_numpy(np.stack([reference_image(256, seed) for seed in (0, 1)]))
    with torch.no_grad():
        encoder_features = tower.encoder(images)
        features = tower.quant_proj(encoder_features)
        codes = model.encode(images)
        pixels = model.decode(torch.from_numpy(recorded["indices"].astype(np.int64)))
        quantized = tower.quantizer.train()(features, with_entropy=True)
        floats = {
            "encoder_features": encoder_features[:, ::16, ::32],
            "quant_proj": features[:, ::4],
            "reconstruction": pixels[:, :, ::4, ::4],
            "reconstruction_mean": pixels.mean(dim=(2, 3)),
            "image_embeds": model.get_image_features(images).pooler_output,
            "text_embeds": model.get_text_features(torch.from_numpy(recorded["text_ids"])).pooler_output,
        }
        scalars = {
            "vq_loss": quantized.vq_loss,
            "entropy_loss": quantized.entropy_loss,
            "codebook_usage": tower.quantizer.codebook_usage,
        }
    assert {*floats, *scalars, "indices", "text_ids"} == set(recorded.files)
    assert (codes.numpy() == recorded["indices"]).mean() >= 0.999
    for part, value in floats.items():
        np.testing.assert_allclose(value.numpy(), recorded[part], rtol=0, atol=1e-3, err_msg=part)
    for part, value in scalars.items():
        np.testing.assert_allclose(value.item(), recorded[part], rtol=1e-4, err_msg=part)


def test_converted_base_tokenizer_agrees_with_the_original(base_checkpoint, tmp_path):
    report = convert_tokenizer(str(base_checkpoint), str(tmp_path))
    zeros = ("encoder.pos_embed", "quant_proj.attn.zero_k_bias", "post_quant_proj.attn.zero_k_bias")
    assert report.left_out == dict.fromkeys(zeros, "zero by construction")
    assert report.used + len(report.left_out) == NUM_BASE_TENSORS
    check_tokenizer(tmp_path, "tokenizer_base_depth2")


@pytest.mark.slow
def test_converted_large_tokenizer_agrees_with_the_original(tmp_path):
    path = saved(tokenizer_checkpoint(reference_state("tokenizer_large"), "vitamin_large"), tmp_path)
    report = convert_tokenizer(path, tmp_path / "converted")
    assert report.used + len(report.left_out) == 1335
    check_tokenizer(tmp_path / "converted", "tokenizer_large")


@pytest.fixture(scope="module")
def llama_tokenizer():
    """320 whole-word tokens, the openers and closers of an image at ids 3 and 4, no image token."""
    words = ["<unk>", "<s>", "</s>", "<0x00>", "<0x01>", *(f"word{i}" for i in range(5, 320))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


@pytest.fixture(scope="module")
def mllm_folder(base_checkpoint, llama_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mllm")
    source, target = folder / "original", folder / "converted"
    state = reference_state("mllm_tiny")
    state["model.vision_tokenizer.encoder.norm.weight"] = torch.ones(3)
    write_mllm_folder(source, state, llama_tokenizer)
    report = convert_mllm(str(source), str(base_checkpoint), str(target))
    assert report.used + len(report.left_out) == len(state) + NUM_BASE_TENSORS
    assert "a copy" in report.left_out["model.vision_tokenizer.encoder.norm.weight"]
    return target


@pytest.fixture(scope="module")
def converted_mllm(mllm_folder):
    return AutoModelForImageTextToText.from_pretrained(mllm_folder)


@pytest.fixture(scope="module")
def recorded():
    arrays = np.load(FIXTURES / "mllm_tiny.npz")
    return {
        name: torch.from_numpy(array.astype(np.int64) if array.dtype == np.int16 else array)
        for name, array in ((name, arrays[name]) for name in arrays.files)
    }


def expanded(recorded):
    """The recorded batch with each -200 made into 256 placeholders: ids, labels and attention mask, (2, 272)."""
    rows = []
    for row in zip(recorded["input_ids"], recorded["labels"], recorded["attention_mask"].long()):
        (at,) = (row[0] == -200).nonzero()[0].tolist()
        rows.append(
            [
                torch.cat([part[:at], torch.full((256,), fill), part[at + 1 :]])
                for part, fill in zip(row, (IMAGE, -100, 1))
            ]
        )
    return [torch.stack(parts) for parts in zip(*rows)]


@pytest.mark.parametrize("kind, rows", [("mixed", [0, 1]), ("understanding", [0]), ("generation", [1])])
def test_converted_mllm_has_the_originals_losses_and_logits(converted_mllm, recorded, kind, rows):
    input_ids, labels, attention_mask = (part[rows] for part in expanded(recorded))
    with torch.no_grad():
        output = converted_mllm(
            input_ids,
            attention_mask=attention_mask,
            image_codes=recorded["codes"][rows],
            image_targets=torch.tensor([row == 1 for row in rows]),
            labels=labels,
        )
    torch.testing.assert_close(output.loss, recorded[f"{kind}_loss"], rtol=1e-4, atol=0)
    real = attention_mask[:, ::8].bool()
    logits = output.logits[:, ::8, ::4]
    torch.testing.assert_close(logits[real], recorded[f"{kind}_logits"][real], rtol=0, atol=1e-3)


def test_converted_embedder_gives_the_originals_embeddings(converted_mllm, recorded):
    with torch.no_grad():
        embeddings = converted_mllm.embedder(recorded["codes"])[:, ::8]
    torch.testing.assert_close(embeddings, recorded["image_embeddings"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("scale", [1, 5])
def test_converted_mllm_draws_the_originals_codes(converted_mllm, recorded, scale):
    codes = converted_mllm.generate(
        recorded["prompt"][None],
        generation_mode="image",
        do_sample=False,
        num_positions=24,
        guidance_scale=float(scale),
        unconditional_input_ids=recorded["uncond_prompt"][None],
    )
    assert torch.equal(codes, recorded[f"gen_codes_cfg{scale}"])


def test_converted_mllm_writes_the_originals_text(converted_mllm, recorded):
    image = torch.full((256,), IMAGE)
    prompt = torch.cat([recorded["text_prefix"], image, recorded["text_suffix"]])[None]
    tokens = converted_mllm.generate(
        prompt, image_codes=recorded["codes"][:1], max_new_tokens=16, do_sample=False, eos_token_id=None
    )
    assert torch.equal(tokens[0, prompt.shape[1] :], recorded["text_greedy"])


def test_converted_folder_holds_a_processor_and_the_visual_tokenizer(mllm_folder, converted_mllm, base_checkpoint):
    processor = AutoProcessor.from_pretrained(mllm_folder)
    config = converted_mllm.config
    assert processor.config_token_ids().items() <= vars(config).items()
    assert (config.boi_token_id, config.eoi_token_id, config.image_token_id) == (3, 4, IMAGE)
    assert config.image_prompt_ids[-1] == config.unconditional_prompt_ids[-1] == 3
    assert converted_mllm.generation_config.image_generation == IMAGE_GENERATION
    assert config.text_config.model_type == "llama" and config.text_config.rms_norm_eps == 1e-5
    picture = (reference_image(256, 0).transpose(1, 2, 0) * 127.5 + 127.5).astype(np.uint8)
    inputs = processor(images=picture, text="<image>word7")
    assert inputs["input_ids"].tolist() == [[3, *[IMAGE] * 256, 4, 7]]
    visual, _ = load_original_tokenizer(base_checkpoint)
    with torch.no_grad():
        assert torch.equal(converted_mllm.encode_images(inputs["pixel_values"]), visual.encode(inputs["pixel_values"]))


# --- what a tokenizer checkpoint may look like ---


def test_an_image_processor_is_saved_beside_the_tokenizer(small_checkpoint, tmp_path):
    small_checkpoint["args"]["img_size"] = 128
    convert_tokenizer(saved(small_checkpoint, tmp_path), tmp_path / "converted")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "converted")
    model = AutoModel.from_pretrained(tmp_path / "converted")
    picture = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    assert processor.mode == "reconstruct"
    assert model.encode(processor(picture)["pixel_values"]).shape == (1, 8, 64)


def test_arguments_may_be_a_namespace(small_checkpoint, tmp_path):
    expected, _ = load_original_tokenizer(saved(small_checkpoint, tmp_path))
    small_checkpoint["args"] = Namespace(**small_checkpoint["args"])
    model, _ = load_original_tokenizer(saved(small_checkpoint, tmp_path))
    assert model.config.to_dict() == expected.config.to_dict()


def test_causal_flag_makes_causal_projections(small_checkpoint, tmp_path):
    path = saved(small_checkpoint, tmp_path)
    features = torch.randn(1, 5, 96)
    changed = features.clone()
    changed[:, -1] = torch.randn(96)
    for causal in (True, False):
        convert_tokenizer(path, tmp_path / "converted", causal=causal)
        model = AutoModel.from_pretrained(tmp_path / "converted")
        assert model.config.vision_config.causal_projection is causal
        for projection, width in ((model.vision_model.quant_proj, 96), (model.vision_model.post_quant_proj, 8)):
            before, after = projection(features[..., :width]), projection(changed[..., :width])
            assert torch.allclose(before[:, :-1], after[:, :-1], atol=1e-6) is causal


def test_a_checkpoint_with_linear_projections_converts(small_checkpoint, tmp_path):
    state = small_checkpoint["trainer"]["unitok"]
    for name in [name for name in state if name.startswith(("quant_proj.", "post_quant_proj."))]:
        del state[name]
    weights = {"quant_proj.weight": torch.randn(8, 96), "quant_proj.bias": torch.randn(8)}
    state |= weights | {"post_quant_proj.weight": torch.randn(96, 8), "post_quant_proj.bias": torch.randn(96)}
    report = convert_tokenizer(saved(small_checkpoint, tmp_path), tmp_path / "converted")
    model = AutoModel.from_pretrained(tmp_path / "converted")
    assert model.config.vision_config.quant_proj == "linear" and report.used == len(state) - len(report.left_out)
    features = torch.randn(1, 5, 96)
    expected = features @ weights["quant_proj.weight"].T + weights["quant_proj.bias"]
    torch.testing.assert_close(model.vision_model.quant_proj(features), expected)


def test_a_checkpoint_without_a_text_tower_converts(small_checkpoint, tmp_path):
    state = small_checkpoint["trainer"]["unitok"]
    for name in [name for name in state if name.startswith("text_encoder.") or name == "logit_scale"]:
        del state[name]
    model, report = load_original_tokenizer(saved(small_checkpoint, tmp_path))
    assert model.text_model is None and report.used + len(report.left_out) == len(state)


# --- what is refused, and how ---


def drop(*names):
    return lambda checkpoint: [checkpoint["trainer"]["unitok"].pop(name) for name in names]


def put(name, make):
    def change(checkpoint):
        state = checkpoint["trainer"]["unitok"]
        state[name] = make(state.get(name))

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (drop("encoder.norm.weight"), "encoder.norm.weight"),
        (drop("encoder.blocks.1.mlp.w0.weight"), r"lacks .*encoder.blocks.1.mlp.w0.weight"),
        (drop("decoder.up_conv4.conv2.bias"), r"lacks .*decoder.up_conv4.conv2.bias"),
        (drop("text_encoder.ln_final.weight"), r"lacks .*text_model.*final_layer_norm.weight"),
        (drop("quantizer.codebooks.3.codebook.weight"), "lacks quantizer.codebooks.3.codebook.weight"),
        (drop("quantizer.codebooks.7.vocab_usage"), "lacks quantizer.codebooks.7.vocab_usage"),
        (put("decoder.extra.weight", lambda _: torch.ones(2)), r"unknown .*decoder.extra.weight"),
        (put("decoder.norm.bias", lambda tensor: tensor[1:]), r"does not fit: .*decoder.norm.bias"),
        (put("quantizer.codebooks.2.codebook.weight", lambda tensor: tensor[1:]), "quantizer.codebooks.2.* shape"),
        (put("text_encoder.text_projection", lambda tensor: tensor[0]), "not a UniTok tokenizer checkpoint"),
        (
            put("post_quant_proj.attn.zero_k_bias", lambda tensor: tensor + 1),
            "post_quant_proj.*zero_k_bias is not zero",
        ),
        (
            put("decoder.norm.bias", lambda tensor: tensor / 0),
            "has NaN or infinite numbers in decoder.norm.bias",
        ),
        (
            put("decoder.norm.bias", lambda tensor: tensor.double() + 1e39),
            "not finite in torch.float32, the first is decoder.norm.bias",
        ),
        (put("encoder.pos_embed", lambda _: torch.ones(1, 1, 96)), "encoder.pos_embed is not zero"),
        (lambda checkpoint: checkpoint["args"].update(model="vit_large"), "Only ViTamin tokenizers.*'vit_large'"),
        (lambda checkpoint: checkpoint.pop("args"), "not a UniTok tokenizer checkpoint.*args"),
        (lambda checkpoint: checkpoint.update(trainer={}), "not a UniTok tokenizer checkpoint.*unitok"),
    ],
)
@pytest.mark.attack
def test_a_checkpoint_that_does_not_fit_raises_and_names_the_tensor(small_checkpoint, tmp_path, change, message):
    change(small_checkpoint)
    path = saved(small_checkpoint, tmp_path)
    with pytest.raises(ConversionError, match=f"(?s){message}"):
        convert_tokenizer(path, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("content", [torch.ones(3), [1, 2], {"state_dict": {"weight": torch.ones(3)}}, None, "words"])
@pytest.mark.attack
def test_a_torch_file_of_something_else_raises_and_names_the_file(tmp_path, content):
    with pytest.raises(ConversionError, match="tokenizer.pth is not a UniTok tokenizer checkpoint"):
        load_original_tokenizer(saved(content, tmp_path))


@pytest.mark.parametrize("allow_pickle", [False, True])
@pytest.mark.parametrize("damage", ["text", "truncated", "empty", "missing", "folder"])
@pytest.mark.attack
def test_a_file_that_is_no_torch_file_raises_and_names_the_file(small_checkpoint, tmp_path, damage, allow_pickle):
    path = saved(small_checkpoint, tmp_path)
    if damage == "text":
        path.write_text("a text\nof two lines", encoding="utf-8")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    else:
        path.unlink()
        if damage == "empty":
            path.touch()
        elif damage == "folder":
            path.mkdir()
    with pytest.raises(ConversionError, match="tokenizer.pth is not a torch checkpoint"):
        load_original_tokenizer(path, allow_pickle=allow_pickle)


class Touch:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
@pytest.mark.attack
def test_a_pickle_is_executed_only_with_the_flag(tmp_path, write):
    mark, path = tmp_path / "executed", tmp_path / "tokenizer.pth"
    write({"args": Touch(mark), "trainer": {"unitok": {}}}, path)
    with pytest.raises(
        ConversionError, match="tokenizer.pth is not a torch checkpoint of plain tensors.*--allow-pickle"
    ):
        load_original_tokenizer(path)
    assert not mark.exists()
    with pytest.raises(ConversionError, match="tokenizer.pth is not a "):
        load_original_tokenizer(path, allow_pickle=True)
    assert mark.exists()


SMALL_LLM = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32}


def test_an_mllm_folder_of_pickles_converts_like_one_of_safetensors(small_checkpoint, llama_tokenizer, tmp_path):
    state, tokenizer = reference_state("mllm_tiny", shrink=8), saved(small_checkpoint, tmp_path)
    converted = []
    for as_pickle in (False, True):
        source = write_mllm_folder(tmp_path / f"{as_pickle}", state, llama_tokenizer, as_pickle, **SMALL_LLM)
        convert_mllm(source, tokenizer, tmp_path / "converted")
        converted.append(AutoModelForImageTextToText.from_pretrained(tmp_path / "converted").state_dict())
    assert converted[0].keys() == converted[1].keys()
    assert all(torch.equal(converted[0][name], converted[1][name]) for name in converted[0])
    torch.testing.assert_close(converted[1]["language_model.lm_head.weight"], state["lm_head.weight"])


@pytest.mark.parametrize(
    "damage, message",
    [
        ("no config", r"has no config\.json"),
        ("no weights", r"has neither \*\.safetensors nor pytorch_model\*\.bin"),
        ("cut weights", r"model-00001-of-00002\.safetensors"),
        ("plain llama", "is not a UniTok MLLM: .*multi_embedder"),
        ("no codebook", r"lacks ar_head\.codebooks\.2\.weight"),
        ("extra tensor", r"unknown .*depth_head\.norm\.surplus"),
        ("misshapen tensor", r"does not fit: .*language_model\.lm_head\.weight"),
    ],
)
@pytest.mark.attack
def test_an_mllm_folder_that_does_not_fit_raises(small_checkpoint, llama_tokenizer, tmp_path, damage, message):
    state = reference_state("mllm_tiny", shrink=8)
    if damage == "plain llama":
        state = {name: tensor for name, tensor in state.items() if "multi_embedder" not in name}
    elif damage == "no codebook":
        del state["ar_head.codebooks.2.weight"]
    elif damage == "extra tensor":
        state["ar_head.norm.surplus"] = torch.ones(3)
    elif damage == "misshapen tensor":
        state["lm_head.weight"] = state["lm_head.weight"][1:].clone()
    folder = write_mllm_folder(tmp_path / "original", state, llama_tokenizer, **SMALL_LLM)
    if damage == "no config":
        (folder / "config.json").unlink()
    for path in folder.glob("*.safetensors"):
        if damage == "no weights":
            path.unlink()
        elif damage == "cut weights":
            path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConversionError, match=f"(?s){message}"):
        convert_mllm(folder, saved(small_checkpoint, tmp_path), tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


# --- hostile checkpoints ---


def repeated(tensor: torch.Tensor) -> torch.Tensor:
    """The same shape, of one number that is repeated: a few bytes in a file."""
    return torch.zeros(1).expand(tensor.shape)


NORM = "encoder.norm.weight"
HOSTILE = {
    "no such size": (lambda c: c["args"].update(img_size=10**9), "image_size .1000000000. is not"),
    "a size below 0": (lambda c: c["args"].update(img_size=-256), "image_size .-256. is not"),
    "a size in words": (lambda c: c["args"].update(img_size="256"), "image_size"),
    "NaN as an argument": (lambda c: c["args"].update(vq_beta=math.nan), "vq_beta .nan. is not"),
    "no heads": (lambda c: c["args"].update(text_heads=0), "ZeroDivisionError"),
    "heads that do not fit": (lambda c: c["args"].update(text_heads=5), "heads"),
    "arguments that are none": (lambda c: c.update(args=3), "is not a UniTok tokenizer checkpoint"),
    "a list of tensors": (lambda c: c["trainer"].update(unitok=[1]), "has a list, expected a dict of named tensors"),
    "a text as a tensor": (put(NORM, lambda _: "one"), f"has a str under '{NORM}', expected a named tensor"),
    "a number as a name": (lambda c: c["trainer"]["unitok"].update({3: torch.ones(1)}), "has a Tensor under 3"),
    "a meta tensor": (put(NORM, lambda t: t.to("meta")), f"has the meta tensor {NORM}"),
    "a sparse tensor": (put(NORM, lambda t: t.to_sparse()), f"torch.sparse_coo tensor {NORM}"),
    "a complex tensor": (put(NORM, lambda t: t.to(torch.complex64)), f"complex numbers in {NORM}"),
    "NaN": (put(NORM, lambda t: t * math.nan), f"NaN or infinite numbers in {NORM}"),
    "infinity": (put(NORM, lambda t: t / 0), f"NaN or infinite numbers in {NORM}"),
    "one number repeated": (put(NORM, repeated), f"{NORM} of shape .96,. in only 4 bytes: its numbers are repeated"),
    "no dims": (put(NORM, lambda _: torch.tensor(1.0)), "IndexError"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.attack
def test_hostile_checkpoints_end_in_one_line(small_checkpoint, tmp_path, name):
    change, message = HOSTILE[name]
    change(small_checkpoint)
    source = saved(small_checkpoint, tmp_path)
    with pytest.raises(ConversionError, match=message):
        load_original_tokenizer(source)
    result = CliRunner().invoke(cli.app, ["convert", str(source), "--to", str(tmp_path / "to")])
    assert result.exit_code == 2 and re.fullmatch("error: .*\n", result.stderr), (result.output, result.exception)
    assert not (tmp_path / "to").exists()


@pytest.mark.attack
def test_small_files_that_say_they_are_large_are_refused_unread(
    small_checkpoint, llama_tokenizer, tmp_path, monkeypatch
):
    torch.save({"args": {}, "trainer": {"unitok": {"a": torch.zeros(10**7)}}}, tmp_path / "stored.pth")
    with (
        zipfile.ZipFile(tmp_path / "stored.pth") as stored,
        zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as deflated,
    ):
        for member in stored.infolist():
            deflated.writestr(member.filename, stored.read(member))
    assert (tmp_path / "a.pth").stat().st_size < 100_000
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("read"))
    for allow_pickle in (False, True):
        with pytest.raises(ConversionError, match=r"a.pth has \d+ bytes, but claims to hold 40\d+"):
            load_original_tokenizer(tmp_path / "a.pth", allow_pickle)
    os.mkfifo(tmp_path / "fifo.pth")
    with pytest.raises(ConversionError, match="fifo.pth is not a torch checkpoint: it is not a regular file"):
        load_original_tokenizer(tmp_path / "fifo.pth")


@pytest.mark.attack
def test_a_folder_of_hostile_shards_ends_in_one_line(small_checkpoint, llama_tokenizer, tmp_path):
    tokenizer = saved(small_checkpoint, tmp_path)
    state = reference_state("mllm_tiny")
    for number, (change, message) in enumerate(
        (
            (
                lambda s: s.update({"lm_head.weight": torch.full_like(s["lm_head.weight"], math.nan)}),
                "NaN or infinite",
            ),
            (
                lambda s: s.update({"lm_head.weight": repeated(s["lm_head.weight"])}),
                "its numbers are repeated, not stored",
            ),
            (lambda s: s.update({"lm_head.weight": "text"}), "has a str under"),
        )
    ):
        changed = dict(state)
        change(changed)
        folder = tmp_path / str(number)
        folder.mkdir()
        write_mllm_folder(folder, changed, llama_tokenizer, as_pickle=True)
        with pytest.raises(ConversionError, match=message):
            convert_mllm(folder, tokenizer, tmp_path / "to")
    write_mllm_folder(folder, state, llama_tokenizer, as_pickle=True)
    for config, message in (
        ('{"rope_theta": "x", "hidden_size": 128}', ""),
        ("[" * 100_000, "cannot read the config"),
        ('{"hidden_size": 128, "num_attention_heads": 0}', ""),
    ):
        (folder / "config.json").write_text(config, encoding="utf-8")
        with pytest.raises(ConversionError, match=message):
            convert_mllm(folder, tokenizer, tmp_path / "to")


@pytest.mark.attack
def test_a_target_that_is_a_link_or_in_use_is_refused_before_the_work(small_checkpoint, tmp_path, monkeypatch):
    source = saved(small_checkpoint, tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("read"))
    for target in (".", "..", "../here", "../link", "../link/", "../dangling", str(tmp_path / "here"), "/"):
        result = CliRunner().invoke(cli.app, ["convert", str(source), "--to", target])
        assert result.exit_code == 2 and result.stderr.startswith("error: cannot write "), (target, result.output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "empty", "here", "link", "tokenizer.pth"]
