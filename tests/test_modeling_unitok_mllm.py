"""The unified MLLM: losses, embeddings, masks, saving and loading."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaForCausalLM, logging
from transformers.testing_utils import CaptureLogger

from unitok_mllm import UniTokMLLMForConditionalGeneration, UniTokMLLMModel, UniTokModel, modeling_unitok_mllm


K, L, V = 4, 9, 32
BOS, EOS, BOI, EOI, IMAGE = 1, 2, 3, 4, 5
PICTURE = [BOI, *[IMAGE] * L, EOI]


class Sample(NamedTuple):
    ids: list[int]
    num_text_targets: int  # the last tokens
    image_targets: tuple[bool, ...]


SAMPLES = {
    "text": Sample([BOS, 20, 21, 22, 40, 41, EOS], 3, ()),
    "read": Sample([BOS, *PICTURE, 30, *PICTURE, 32, 42, 43, 44, EOS], 4, (False, False)),
    "write": Sample([BOS, 50, 51, *PICTURE, EOS], 2, (True,)),
    "mixed": Sample([BOS, *PICTURE, 60, 61, *PICTURE, EOS], 1, (False, True)),
}
BATCHES = [("text",), ("read",), ("write",), ("mixed",), ("text", "read"), tuple(SAMPLES)]


def make_batch(names, side="left"):
    """Model inputs of some samples; each has image codes of its own, the same in every batch."""
    length = max(len(SAMPLES[name].ids) for name in names)
    rows, masks, labels, codes, targets = [], [], [], [], []
    for name in names:
        ids, num_text_targets, image_targets = SAMPLES[name]
        pad = (length - len(ids), 0) if side == "left" else (0, length - len(ids))
        rows.append(F.pad(torch.tensor(ids), pad))
        masks.append(F.pad(torch.ones(len(ids), dtype=torch.long), pad))
        answer = torch.tensor([-100] * (len(ids) - num_text_targets) + ids[-num_text_targets:])
        labels.append(F.pad(answer, pad, value=-100))
        generator = torch.Generator().manual_seed(len(ids))
        codes.append(torch.randint(V, (len(image_targets), K, L), generator=generator))
        targets += image_targets
    batch = {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks), "labels": torch.stack(labels)}
    if targets:
        batch |= {"image_codes": torch.cat(codes), "image_targets": torch.tensor(targets)}
    return batch


def counts(names):
    """The numbers of text targets and of target codes."""
    samples = [SAMPLES[name] for name in names]
    return sum(s.num_text_targets for s in samples), sum(K * L * sum(s.image_targets) for s in samples)


def clone(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors}


def differing(before, after):
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def gradients(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
@pytest.mark.parametrize("names", BATCHES, ids="+".join)
def test_loss_is_the_token_weighted_mean_of_text_and_image_loss(lively_mllm, names):
    batch = make_batch(names)
    output = lively_mllm(**batch)
    text_count, image_count = counts(names)

    next_labels = batch["labels"][:, 1:]
    log_probs = output.logits[:, :-1].double().log_softmax(dim=-1)
    text_sum = -sum(log_probs[b, t, next_labels[b, t]] for b, t in (next_labels != -100).nonzero().tolist())
    torch.testing.assert_close(output.text_loss.double(), text_sum / text_count, rtol=1e-5, atol=0)

    image_loss = torch.zeros(()).double()
    if image_count:
        logits = output.image_logits.double()  # (N, L, K, V)
        targets = batch["image_codes"][batch["image_targets"]].transpose(1, 2)  # (N, L, K)
        cross_entropy = -logits.log_softmax(dim=-1).gather(-1, targets[..., None]).mean()
        image_loss = cross_entropy + 5e-5 * (logits.max(dim=-1).values ** 2).mean()
    torch.testing.assert_close(output.image_loss.double(), image_loss, rtol=1e-5, atol=0)
    total = (text_sum + image_count * image_loss) / (text_count + image_count)
    torch.testing.assert_close(output.loss.double(), total, rtol=1e-5, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_each_sample_what_it_gets_alone(lively_mllm, side):
    batch = make_batch(SAMPLES, side)
    together = lively_mllm(**batch)
    total, image_logits = 0.0, []
    for b, name in enumerate(SAMPLES):
        alone = lively_mllm(**make_batch([name]))
        total += alone.loss * sum(counts([name]))
        kept = batch["attention_mask"][b].bool()
        torch.testing.assert_close(together.logits[b, kept], alone.logits[0], rtol=1e-4, atol=1e-4)
        if alone.image_logits is not None:
            image_logits.append(alone.image_logits)
    torch.testing.assert_close(together.image_logits, torch.cat(image_logits), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together.loss, total / sum(counts(SAMPLES)), rtol=1e-5, atol=0)


@torch.no_grad()
def test_labels_at_image_positions_are_no_text_targets(lively_mllm):
    batch = make_batch(SAMPLES)
    expected = lively_mllm(**batch)
    batch["labels"] = torch.where(batch["input_ids"] == IMAGE, IMAGE, batch["labels"])
    assert torch.equal(lively_mllm(**batch).text_loss, expected.text_loss)


@torch.no_grad()
def test_the_depth_head_reads_the_state_before_each_position(lively_mllm):
    batch = make_batch(SAMPLES)
    output = lively_mllm(**batch, output_hidden_states=True)
    states, starts = output.hidden_states[-1], []
    for b, row in enumerate(batch["input_ids"].tolist()):
        starts += [(b, t) for t in range(len(row)) if row[t] == IMAGE and row[t - 1] == BOI]
    drawn = [i for i, is_target in enumerate(batch["image_targets"]) if is_target]
    assert len(starts) == 5 and drawn == [2, 4]
    for n, i in enumerate(drawn):
        b, start = starts[i]
        codes = batch["image_codes"][i].T  # (L, K)
        expected = torch.cat(
            [lively_mllm.depth_head(states[b, start + p - 1][None], codes[p][None]) for p in range(L)]
        )
        torch.testing.assert_close(output.image_logits[n], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 1000}, {"frozen": True}], ids=str)
def test_losses_alone_and_their_gradients_are_the_same_in_chunks(lively_mllm, monkeypatch, options):
    monkeypatch.setattr(modeling_unitok_mllm, "CHUNK_ROWS", 20)  # of 64 text tokens and 432 codes
    options, batch = dict(options), make_batch([*SAMPLES] * 6)
    if options.pop("frozen", False):
        lively_mllm.requires_grad_(False)
        lively_mllm.embedder.requires_grad_(True)
    batch["labels"] = torch.where(batch["input_ids"] == IMAGE, IMAGE, batch["labels"])  # for the number of items
    results = []
    for losses_alone in (False, True):
        lively_mllm.zero_grad()
        output = lively_mllm(**batch, **options, losses_alone=losses_alone)
        (7 * output.loss).backward(retain_graph=True)
        grads = {n: p.grad.clone() for n, p in lively_mllm.named_parameters() if p.grad is not None}
        results.append((output, grads))
    (whole, expected), (alone, grads) = results
    assert alone.logits is None and alone.image_logits is None
    for name in ("loss", "text_loss", "image_loss", "num_text_targets", "num_image_targets"):
        torch.testing.assert_close(alone[name], whole[name], rtol=1e-6, atol=0, msg=name)
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6 * grad.abs().max().item(), msg=name)
    for loss in (alone.text_loss, alone.image_loss):
        with pytest.raises(RuntimeError, match="can be computed only once"):  # both were computed in chunks
            loss.backward(retain_graph=True)


def test_losses_alone_of_few_targets_are_those_with_logits(lively_mllm):
    for names in BATCHES:
        batch = make_batch(names)
        whole, alone = lively_mllm(**batch), lively_mllm(**batch, losses_alone=True)
        torch.testing.assert_close(alone.loss, whole.loss, rtol=1e-6, atol=0)
        assert alone.logits is None and alone.image_logits is None
    assert lively_mllm(**batch | {"labels": None, "image_targets": None}, losses_alone=True).logits is not None


def test_the_image_loss_on_a_share_of_the_positions_is_unbiased(lively_mllm):
    batch = make_batch(["mixed", "write"])
    lively_mllm(**batch).image_loss.backward()
    head = lively_mllm.depth_head.head.weight
    whole, gradient = lively_mllm(**batch), head.grad.clone()
    num_positions = len(whole.image_logits) * L
    # a third of the positions, drawn as a partition: the mean over it is exactly the whole
    values, summed = [], torch.zeros_like(gradient)
    order = torch.randperm(num_positions)
    for third in order.chunk(3):
        lively_mllm.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randperm", lambda n, device=None, third=third: third)
            output = lively_mllm(**batch, image_loss_share=1 / 3)
        assert output.image_logits is None
        output.image_loss.backward()
        values.append(output.image_loss.item())
        summed += head.grad
    assert len(set(values)) == 3
    assert sum(values) / 3 == pytest.approx(whole.image_loss.item(), rel=1e-5)
    torch.testing.assert_close(summed / 3, gradient, rtol=1e-4, atol=1e-7)
    drawn = torch.stack([lively_mllm(**batch, image_loss_share=0.1).image_loss.detach() for _ in range(200)])
    error = drawn.std() / len(drawn) ** 0.5
    assert abs(drawn.mean() - whole.image_loss) < 4 * error
    with pytest.raises(ValueError, match="image_loss_share must be above 0 and at most 1, got 0"):
        lively_mllm(**batch, image_loss_share=0)


def test_the_word_loss_compares_images_with_the_words_that_follow_them(lively_mllm):
    batch = make_batch(["read", "text", "mixed"], side="right")
    output = lively_mllm(**batch, word_loss=True)
    embeds = lively_mllm.embedder(batch["image_codes"])  # two images of the first sample, two of the last
    table = lively_mllm.get_input_embeddings().weight
    words = sorted({42, 43, 44, 40, 41, EOS})  # of all samples of the batch
    probabilities = (embeds @ table[words].T).softmax(dim=-1)
    seen = {word: probabilities[:2, :, words.index(word)].mean() for word in (42, 43, 44, EOS)}
    expected = -sum(p.log() for p in seen.values()) - probabilities[2:, :, words.index(EOS)].mean().log()
    assert output.num_text_targets == 5 and output.logits is None  # none of the text's, which has no image
    torch.testing.assert_close(output.loss, expected / 5)
    output.loss.backward()
    assert {name.partition(".")[0] for name, p in lively_mllm.named_parameters() if p.grad is not None} == {
        "embedder",
        "language_model",
    }
    with pytest.raises(ValueError, match="word_loss needs input_ids, images and labels"):
        lively_mllm(input_ids=batch["input_ids"], image_codes=batch["image_codes"], word_loss=True)


@torch.no_grad()
def test_the_word_loss_of_packed_samples_is_that_of_padded_ones(lively_mllm):
    batch = make_batch(["read", "mixed"], side="right")
    padded = lively_mllm(**batch, word_loss=True)
    is_token = batch["attention_mask"].bool()
    packed = {name: batch[name][is_token][None] for name in ("input_ids", "labels")}
    packed["position_ids"] = torch.cat([torch.arange(n) for n in is_token.sum(dim=1).tolist()])[None]
    packed |= {name: batch[name] for name in ("image_codes", "image_targets")}
    torch.testing.assert_close(lively_mllm(**packed, word_loss=True).loss, padded.loss)


@torch.no_grad()
def test_an_image_changes_what_follows_it_and_nothing_before(lively_mllm):
    batch = make_batch(["read"])
    before = lively_mllm(**batch).logits[0]
    batch["image_codes"][1] = batch["image_codes"][1].roll(1, dims=0)
    difference = (lively_mllm(**batch).logits[0] - before).abs().amax(dim=-1)
    second_image = len(PICTURE) + 3  # its first position
    assert difference[:second_image].max() == 0 and difference[second_image:].min() > 0.01


@torch.no_grad()
def test_pixels_and_their_codes_are_one_input(lively_mllm, images):
    batch = make_batch(["mixed", "read"])
    batch["image_codes"] = lively_mllm.encode_images(images)
    from_codes = lively_mllm(**batch)
    del batch["image_codes"]
    from_pixels = lively_mllm(**batch, pixel_values=images)
    assert torch.equal(from_codes.logits, from_pixels.logits)
    assert torch.equal(from_codes.image_logits, from_pixels.image_logits)
    flipped = lively_mllm(**batch, pixel_values=images.flip(0))
    assert not torch.allclose(flipped.logits[:, -4:], from_pixels.logits[:, -4:], atol=0.01)


CODES = torch.zeros(2, K, L, dtype=torch.long)
ONE_PICTURE = torch.tensor([[BOS, *PICTURE, EOS]])
BAD_INPUTS = {
    "both pixels and codes": ({"pixel_values": torch.zeros(1, 3, 48, 48), "image_codes": CODES[:1]}, "not both"),
    "too many images": ({"image_codes": CODES}, r"have \[9\] image placeholders, but 2 images need 9 each"),
    "images of another size": ({"image_codes": CODES[:1, :, :4]}, r"have \[9\] .* 1 images need 4 each"),
    "too few images": ({"input_ids": torch.tensor([PICTURE * 3]), "image_codes": CODES}, r"have \[27\] .* 2 images"),
    "an image over two samples": (
        {
            "input_ids": torch.tensor([[BOI, *[IMAGE] * 12], [BOI, *[IMAGE] * 6, 20, 20, 20, 20, 20, 20]]),
            "image_codes": CODES,
        },
        r"have \[12, 6\] image placeholders, but 2 images need 9 each",
    ),
    "no images": ({}, "9 image placeholders, but no images were given"),
    "no placeholders": ({"input_ids": torch.tensor([[BOS, 20]]), "image_codes": CODES}, r"have \[0\] .* 2 images"),
    "too many targets": (
        {"image_codes": CODES[:1], "image_targets": torch.tensor([True, False])},
        r"image_targets has shape \(2,\), but there are 1 images",
    ),
    "targets without images": (
        {"input_ids": torch.tensor([[BOS, 20]]), "image_targets": torch.tensor([True])},
        r"image_targets has shape \(1,\), but there are 0 images",
    ),
    "a target begins its sequence": (
        {"input_ids": torch.tensor([[IMAGE] * L]), "image_codes": CODES[:1], "image_targets": torch.tensor([True])},
        "begins its sequence",
    ),
    "a target begins after padding": (
        {
            "input_ids": torch.tensor([[0, 0] + [IMAGE] * L]),
            "attention_mask": torch.tensor([[0, 0] + [1] * L]),
            "image_codes": CODES[:1],
            "image_targets": torch.tensor([True]),
        },
        "begins its sequence",
    ),
    "images with embeddings": (
        {"input_ids": None, "inputs_embeds": torch.zeros(1, 4, 64), "image_codes": CODES},
        "not with inputs_embeds",
    ),
}


@pytest.mark.parametrize("inputs, message", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_inputs_that_do_not_fit_together_raise(mllm, inputs, message):
    with pytest.raises(ValueError, match=message):
        mllm(**{"input_ids": ONE_PICTURE, **inputs})


@pytest.mark.parametrize("names", BATCHES, ids="+".join)
def test_a_training_step_moves_all_that_is_trained_and_nothing_frozen(mllm, images, names):
    batch = make_batch(names)
    if (codes := batch.get("image_codes")) is not None and len(codes) <= len(images):
        batch["pixel_values"] = images[: len(codes)]
        del batch["image_codes"]
    mllm.train()
    trained = clone((n, p) for n, p in mllm.named_parameters() if p.requires_grad)
    frozen = clone((n, t) for n, t in mllm.state_dict().items() if n not in trained)
    optimizer = torch.optim.AdamW([p for p in mllm.parameters() if p.requires_grad], lr=1e-3, weight_decay=0)
    assert {name for name, grad in gradients(mllm, batch).items() if grad is None} == set()
    optimizer.step()

    assert not differing(frozen, mllm.state_dict()) and not mllm.visual.training
    assert {n for n in frozen if not n.startswith("visual.")} == {
        "embedder.quantizer.codebooks",
        "embedder.quantizer.usage",
    }
    unused = set()  # with gradients all the same, of value 0
    if names in BATCHES[:2] + BATCHES[4:5]:
        unused |= {name for name in trained if name.startswith("depth_head.")}
    if names == ("text",):
        unused |= {name for name in trained if name.startswith("embedder.")}
    assert differing(trained, mllm.state_dict()) == set(trained) - unused


def test_codebooks_train_once_unfrozen_and_are_saved(mllm, tmp_path):
    mllm.train().embedder.unfreeze_codebooks()
    parameters = dict(mllm.named_parameters())
    gradient = gradients(mllm, make_batch(["read"]))["embedder.quantizer.codebooks"]
    assert gradient.abs().sum(dim=(1, 2)).min() > 0
    torch.optim.SGD(parameters.values(), lr=1.0).step()
    mllm.save_pretrained(tmp_path)
    loaded = UniTokMLLMForConditionalGeneration.from_pretrained(tmp_path)
    codebooks = mllm.embedder.quantizer.codebooks
    assert torch.equal(loaded.embedder.quantizer.codebooks, codebooks)
    assert not torch.equal(loaded.visual.vision_model.quantizer.codebooks, codebooks)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("frozen_llm", [False, True])
def test_gradient_checkpointing_leaves_the_gradients_as_they_are(lively_mllm, use_reentrant, frozen_llm):
    lively_mllm.train()
    lively_mllm.language_model.requires_grad_(not frozen_llm)
    batch = make_batch(SAMPLES)
    expected = gradients(lively_mllm, batch)
    calls = []
    for part in ("language_model.model", "depth_head"):
        mlp = lively_mllm.get_submodule(f"{part}.layers.0.mlp")
        mlp.register_forward_pre_hook(lambda *_, part=part: calls.append(part))
    lively_mllm.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    actual = gradients(lively_mllm, batch)
    assert {part: calls.count(part) for part in calls} == {"language_model.model": 2, "depth_head": 2}
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_trains_and_draws(mllm, images, dtype, autocast):
    batch = make_batch(SAMPLES)
    expected = mllm(**batch).loss
    mllm.train()
    if not autocast:
        mllm.to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        output = mllm(**batch)
        torch.testing.assert_close(output.loss, expected, rtol=0.02, atol=0)
        assert output.loss.dtype == torch.float32
        output.loss.backward()
        mllm.eval()
        prompt = torch.tensor([[BOS, *PICTURE, 20, BOI]])
        codes = mllm.generate(prompt, pixel_values=images[:1], generation_mode="image", seed=0)
        assert codes.shape == (1, K, L) and mllm.decode_images(codes).isfinite().all()
    assert all(p.grad.isfinite().all() for p in mllm.parameters() if p.requires_grad)


def test_from_parts_takes_over_weights_codebooks_and_generation_config(llama_config, visual_tokenizer):
    llm = LlamaForCausalLM(llama_config)
    llm.generation_config = GenerationConfig(eos_token_id=[2, 77], pad_token_id=0, max_new_tokens=7)
    weights = clone(llm.state_dict().items())
    model = UniTokMLLMForConditionalGeneration.from_parts(
        llm, visual_tokenizer, embedder_dim=40, embedder_heads=2, image_token_id=IMAGE
    )
    assert not differing(weights, model.language_model.state_dict())
    assert torch.equal(model.embedder.quantizer.codebooks, visual_tokenizer.vision_model.quantizer.codebooks)
    assert model.generation_config.eos_token_id == [2, 77] and model.generation_config.max_new_tokens == 7
    assert model.generation_config.suppress_tokens == [IMAGE] and llm.generation_config.suppress_tokens is None
    assert "image_generation" not in vars(model.generation_config)
    assert not any(p.requires_grad for p in model.visual.parameters())


LOAD_AND_RUN = """
import sys
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
)
import unitok_mllm

folder, picture = sys.argv[1:3]
torch.set_num_threads(1)
processor = AutoProcessor.from_pretrained(folder)
inputs = processor(text="<image> what is it?", images=Image.open(picture))
assert torch.equal(AutoImageProcessor.from_pretrained(folder)(picture).pixel_values, inputs.pixel_values)
prompt = processor(text="a red circle", generation_mode="image")
backbone = AutoModel.from_pretrained(folder)
assert type(backbone) is unitok_mllm.UniTokMLLMModel and not backbone.training
results = {"backbone": backbone(**inputs).last_hidden_state.detach()}
for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model = auto.from_pretrained(folder)
    assert type(model) is unitok_mllm.UniTokMLLMForConditionalGeneration and not model.training
    codes = model.generate(**prompt, generation_mode="image", guidance_scale=3.0, seed=1)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    results[auto.__name__] = (model(**inputs).logits.detach(), codes, trainable)
torch.save(results, sys.argv[3])
"""


def test_a_saved_folder_gives_the_same_bits_in_a_fresh_process(lively_mllm, processor, tmp_path):
    picture, results, root = tmp_path / "picture.png", tmp_path / "results.pt", Path(__file__).parents[1]
    Image.effect_noise((40, 60), 80).convert("RGB").save(picture)
    for part in (lively_mllm, processor):
        part.save_pretrained(tmp_path / "folder")
    command = [sys.executable, "-c", LOAD_AND_RUN, tmp_path / "folder", picture, results]
    subprocess.run(command, cwd=root, check=True)

    inputs = processor(text="<image> what is it?", images=Image.open(picture))
    prompt = processor(text="a red circle", generation_mode="image")
    logits = lively_mllm(**inputs).logits
    codes = lively_mllm.generate(**prompt, generation_mode="image", guidance_scale=3.0, seed=1)
    trainable = [name for name, parameter in lively_mllm.named_parameters() if parameter.requires_grad]
    loaded = torch.load(results)
    assert torch.equal(loaded.pop("backbone"), lively_mllm(**inputs, output_hidden_states=True).hidden_states[-1])
    assert len(loaded) == 2
    for name, values in loaded.items():
        assert torch.equal(values[0], logits) and torch.equal(values[1], codes) and values[2] == trainable, name


def test_the_tokenizer_loads_out_of_the_folder_alone(mllm, images, tmp_path):
    mllm.save_pretrained(tmp_path)
    tokenizer, info = UniTokModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(tokenizer.encode(images), mllm.encode_images(images))


def test_the_backbone_alone_loads_saves_and_gives_the_heads_states(lively_mllm, processor, images, tmp_path):
    inputs = processor(text=["<image> what is it?"] * 2, images=list((images[:2] + 1) / 2))
    states = lively_mllm(**inputs, output_hidden_states=True).hidden_states
    view = lively_mllm.base_model
    assert type(view) is UniTokMLLMModel and view.visual is lively_mllm.visual
    assert {name.split(".")[0] for name, _ in view.named_parameters()} == {"language_model", "visual", "embedder"}
    lively_mllm.save_pretrained(tmp_path / "whole")
    backbone, info = UniTokMLLMModel.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for model in (view, backbone):
        output = model(**inputs, output_hidden_states=True, output_attentions=False)
        assert torch.equal(output.last_hidden_state, states[-1]) and len(output.hidden_states) == len(states)
    backbone.save_pretrained(tmp_path / "backbone")
    _, info = UniTokMLLMForConditionalGeneration.from_pretrained(tmp_path / "backbone", output_loading_info=True)
    assert info["missing_keys"] and all(name.startswith("depth_head.") for name in info["missing_keys"])


@torch.no_grad()
def test_the_caches_old_name_is_heard(lively_mllm, processor, images):
    inputs = processor(text="<image> what is it?", images=(images[:1] + 1) / 2)
    whole = lively_mllm(**inputs).logits
    for model, read in ((lively_mllm, lambda o: o.logits), (lively_mllm.base_model, lambda o: o.last_hidden_state)):
        cache = model(**inputs, use_cache=True).cache
        cache.crop(-1)
        options = {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": inputs["attention_mask"]}
        with pytest.warns(FutureWarning, match="past_key_values"):
            old = read(model(**options, past_key_values=copy.deepcopy(cache)))
        torch.testing.assert_close(old, read(model(**options, cache=cache)))
    torch.testing.assert_close(lively_mllm(**options, cache=None).logits.shape, whole[:, -1:].shape)


def test_hidden_states_and_attentions_come_as_asked_for(lively_mllm, processor, images):
    inputs = processor(text="<image> what is it?", images=(images[:1] + 1) / 2)
    labels = inputs["input_ids"]
    everything = lively_mllm(**inputs, output_hidden_states=True).hidden_states
    for extra in ({}, {"labels": labels}):
        assert lively_mllm(**inputs, **extra).hidden_states is None
        some = lively_mllm(**inputs, **extra, output_hidden_states=[0, -1]).hidden_states
        assert [state is None for state in some] == [
            index not in (0, len(everything) - 1) for index in range(len(some))
        ]
        torch.testing.assert_close((some[0], some[-1]), (everything[0], everything[-1]))
    lively_mllm.set_attn_implementation("eager")
    output = lively_mllm(**inputs, output_attentions=True)
    length = labels.shape[1]
    assert [tuple(a.shape[2:]) for a in output.attentions] == [(length, length)] * (len(everything) - 1)
    torch.testing.assert_close(output.attentions[0].sum(dim=-1), torch.ones_like(output.attentions[0][..., 0]))
    generated = lively_mllm.generate(
        **inputs, max_new_tokens=3, output_attentions=True, output_hidden_states=True, return_dict_in_generate=True
    )
    assert len(generated.attentions) == len(generated.hidden_states) == 3
    lively_mllm.config.output_hidden_states = lively_mllm.config.output_attentions = True
    output = lively_mllm(**inputs)
    assert len(output.hidden_states) == len(everything) and len(output.attentions) == len(everything) - 1


def test_the_loss_comes_first_and_the_output_counts_its_targets(lively_mllm):
    batch = make_batch(["read", "write"])
    output = lively_mllm(**batch)
    first = lively_mllm(**batch, return_dict=False)[0]
    assert list(output)[0] == "loss" and torch.equal(first, output.loss)
    placeholders = batch["input_ids"] == lively_mllm.config.image_token_id
    targets = batch["labels"].masked_fill(placeholders, -100)[:, 1:] != -100
    assert output.num_text_targets == targets.sum()
    assert output.num_image_targets == batch["image_targets"].sum() * batch["image_codes"][0].numel()
    means, counts = (
        torch.stack([output[f"{name}_loss"] for name in ("text", "image")]),
        torch.stack([output[f"num_{name}_targets"] for name in ("text", "image")]),
    )
    torch.testing.assert_close(output.loss, (means * counts).sum() / counts.sum())
    ignored = lively_mllm.config.keys_to_ignore_at_inference
    assert set(ignored) >= {"cache", "text_loss", "image_loss", "num_text_targets", "num_image_targets"}


def test_a_misspelt_argument_is_refused_with_its_nearest_neighbour(lively_mllm, processor, images):
    inputs = processor(text="<image> what is it?", images=(images[:1] + 1) / 2)
    for model in (lively_mllm, lively_mllm.base_model):
        with pytest.raises(TypeError, match="'image_code'.*Did you mean 'image_codes'"):
            model(**inputs, image_code=None)


def test_every_attention_implementation_gives_the_same_losses_and_depth_logits(lively_mllm):
    batch = make_batch(["read", "write"])
    outputs = {}
    for name in ("sdpa", "eager"):
        lively_mllm.set_attn_implementation(name)
        assert lively_mllm.depth_head.layers[0].self_attn.config._attn_implementation == name
        outputs[name] = lively_mllm(**batch)
    torch.testing.assert_close(outputs["eager"].image_logits, outputs["sdpa"].image_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs["eager"].loss, outputs["sdpa"].loss)


def test_parts_of_a_batch_add_up_to_the_whole_by_the_count_of_labels(lively_mllm):
    def labelled(names):
        """With labels at the positions of images, as they are counted."""
        batch = make_batch(names)
        is_image = batch["input_ids"] == IMAGE
        return batch | {"labels": torch.where(is_image, IMAGE, batch["labels"])}

    names = ["read", "write", "mixed", "text"]
    whole = labelled(names)
    count = (whole["labels"][:, 1:] != -100).sum()
    loss = lively_mllm(**whole, num_items_in_batch=count).loss
    parts = [lively_mllm(**labelled([name]), num_items_in_batch=count).loss for name in names]
    torch.testing.assert_close(sum(parts), loss)
    output = lively_mllm(**whole)
    positions = output.num_image_targets // K
    assert positions == 2 * L
    expected = (output.text_loss * output.num_text_targets + output.image_loss * positions) / count
    torch.testing.assert_close(loss, expected)
    unlabelled = make_batch(["write"])
    with pytest.raises(ValueError, match="num_items_in_batch counts labels, of which this batch has 2 for 11 targets"):
        lively_mllm(**unlabelled, num_items_in_batch=count)
    unlabelled.pop("labels")
    with pytest.raises(ValueError, match="Label smoothing"):
        lively_mllm(**unlabelled, num_items_in_batch=count)


def test_tied_embeddings_stay_tied_and_are_saved_once(llama_config, visual_tokenizer, processor, tmp_path):
    llama_config.tie_word_embeddings = True
    model = UniTokMLLMForConditionalGeneration.from_parts(
        LlamaForCausalLM(llama_config),
        visual_tokenizer,
        embedder_dim=40,
        embedder_heads=2,
        **processor.config_token_ids(),
    ).eval()
    model.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "lm_head" in name]
    loaded, info = UniTokMLLMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    batch = make_batch(SAMPLES)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_missing_and_unknown_weights_are_reported_by_name(mllm, tmp_path):
    mllm.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["depth_head.tail.weight"] = weights.pop("depth_head.head.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with CaptureLogger(logging.get_logger("transformers.modeling_utils")) as log:
        _, info = UniTokMLLMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"depth_head.head.weight"}
    assert set(info["unexpected_keys"]) == {"depth_head.tail.weight"}
    assert "depth_head.head.weight" in log.out and "depth_head.tail.weight" in log.out


def test_lora_trains_saves_reloads_and_merges_with_embedder_and_depth_head(lively_mllm, tmp_path):
    lively_mllm.save_pretrained(tmp_path / "base")
    lora = LoraConfig(
        target_modules=r"language_model\..*\.(q_proj|v_proj)",
        modules_to_save=["embedder", "depth_head"],
        init_lora_weights=False,
    )
    model = get_peft_model(lively_mllm, lora).train()
    frozen = clone((n, t) for n, t in model.state_dict().items() if "lora_" not in n and "modules_to_save" not in n)
    codebooks = clone((n, t) for n, t in model.state_dict().items() if "quantizer" in n)
    trained = clone((n, p) for n, p in model.named_parameters() if p.requires_grad)
    assert {n.split(".")[2] for n in trained} == {"language_model", "embedder", "depth_head"}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for names in (["text"], SAMPLES):
        assert {name for name, grad in gradients(model, make_batch(names)).items() if grad is None} == set()
    optimizer.step()
    assert differing(trained, model.state_dict()) == set(trained)
    assert not differing(frozen, model.state_dict()) and not differing(codebooks, model.state_dict())

    model.eval().save_pretrained(tmp_path / "adapter")
    prompt = {"input_ids": torch.tensor([[BOS, 20, 21, BOI]]), "generation_mode": "image", "seed": 3}
    batch = make_batch(SAMPLES)
    logits, codes = model(**batch).image_logits, model.generate(**prompt)
    base = UniTokMLLMForConditionalGeneration.from_pretrained(tmp_path / "base")
    assert not torch.allclose(base(**batch).image_logits, logits, atol=0.01)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(loaded(**batch).image_logits, logits) and torch.equal(loaded.generate(**prompt), codes)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(**batch).image_logits, logits, rtol=1e-4, atol=1e-4)
