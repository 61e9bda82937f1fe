"""Generation of text, images and edits: guidance, sampling, caches, batches and streaming."""

import inspect
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    StaticCache,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)
from transformers.utils import logging

from unitok_mllm import UniTokMLLMForConditionalGeneration, fast_drawing_unitok
from unitok_mllm.drawing_unitok import IMAGE_GENERATION, UniTokDrawingOptions, sample_codes


K, L, V = 4, 9, 32
BOI, EOI, IMAGE, EOS = 3, 4, 5, 2
TEXTS = ["a red circle", "blue", "what is the yellow shape over there? a red circle"]
QUESTIONS = ["<image> what is the shape? <image> and this?", "yes", "a <image>"]  # 2, 0 and 1 of three images


@pytest.fixture
def pictures(images):
    return list((images + 1) / 2)


@pytest.fixture
def ask(lively_mllm, processor, pictures):
    """New tokens, always six, for some of the questions; returns a list of lists."""

    def ask(which=(0, 1, 2), **options):
        images = [[pictures[:2], [], pictures[2:3]][i] for i in which]
        inputs = processor(text=[QUESTIONS[i] for i in which], images=images if any(images) else None)
        options = {"do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6} | options
        return lively_mllm.generate(**inputs, **options)[:, inputs.input_ids.shape[1] :].tolist()

    return ask


@pytest.fixture
def draw(lively_mllm, processor):
    """Codes (N, K, L) for descriptions."""

    def draw(texts=TEXTS, images=None, **options):
        inputs = processor(text=texts, images=images, generation_mode="image")
        return lively_mllm.generate(**inputs, **{"generation_mode": "image", "seed": 0, **options})

    return draw


@torch.no_grad()
def teacher_forced_logits(model, prompt, codes, prefix="", history=None):
    """The depth head's logits (N, L, K, V) for drawn codes behind their prompts; `prefix` picks the branch."""
    ids, mask = prompt[f"{prefix}input_ids"], prompt[f"{prefix}attention_mask"]
    ids, mask = ids.repeat(len(codes) // len(ids), 1), mask.repeat(len(codes) // len(mask), 1)
    past = codes[:0] if history is None else history
    return model(
        input_ids=torch.cat([ids, ids.new_full((len(codes), L), IMAGE)], dim=1),
        attention_mask=torch.cat([mask, mask.new_ones(len(codes), L)], dim=1),
        image_codes=torch.cat([past, codes]),
        image_targets=torch.arange(len(past) + len(codes)) >= len(past),
    ).image_logits


# Text


def test_unequal_questions_in_a_batch_get_the_answers_they_get_alone(ask):
    together = ask()
    assert together == [ask([i])[0] for i in range(3)]
    assert len({tuple(answer) for answer in together}) == 3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 1, "num_return_sequences": 3},
    ],
)
def test_beams_and_return_sequences_keep_images_with_their_question(ask, options):
    together = ask(**options)
    assert together == [answer for i in range(3) for answer in ask([i], **options)]
    assert together == ask(**options, use_cache=False)
    if options.get("do_sample"):
        assert together == [answer for answer in ask() for _ in range(3)]


def test_the_answer_depends_on_the_image_and_on_sampling_options(ask, pictures):
    answer = ask()
    pictures[0], pictures[2] = pictures[2], pictures[0]
    other = ask()
    assert (answer[0] != other[0], answer[1] == other[1], answer[2] != other[2]) == (True, True, True)
    sampled = ask(do_sample=True, temperature=3.0, top_k=50, top_p=0.95, repetition_penalty=1.1)
    assert sampled != other


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_answering_with_too_few_or_too_many_images_raises(lively_mllm, processor, images, count, num_beams):
    inputs = processor(text="<image> or <image>", images=list(images[:2] / 2 + 0.5))
    inputs["pixel_values"] = images[:count]
    with pytest.raises(ValueError, match=rf"have \[18.*\] image placeholders, but {count}.* images need 9 each"):
        lively_mllm.generate(**inputs, num_beams=num_beams, max_new_tokens=2)


def test_images_of_another_size_stay_with_their_question(lively_mllm, processor, pictures):
    small = {"images_kwargs": {"size": {"height": 32, "width": 32}}}  # 4 positions where the config says 9
    options = {"num_beams": 2, "min_new_tokens": 5, "max_new_tokens": 5}
    together = processor(text=["<image>a<image>", "b<image>"], images=pictures[:3], **small)
    alone = processor(text="<image>a<image>", images=pictures[:2], **small)
    assert (alone.input_ids == IMAGE).sum() == 8
    expected = lively_mllm.generate(**alone, **options)[0, -5:]
    assert torch.equal(lively_mllm.generate(**together, **options)[0, -5:], expected)


# Images


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_greedy_codes_are_the_teacher_forced_argmax_under_guidance(lively_mllm, processor, draw, guidance_scale):
    codes = draw(do_sample=False, guidance_scale=guidance_scale)
    prompt = processor(text=TEXTS, generation_mode="image")
    cond = teacher_forced_logits(lively_mllm, prompt, codes)
    uncond = teacher_forced_logits(lively_mllm, prompt, codes, "unconditional_")
    guided = uncond + guidance_scale * (cond - uncond)
    assert torch.equal(guided.argmax(dim=-1).transpose(1, 2), codes)
    assert not torch.equal(draw(do_sample=False, guidance_scale=3.0), codes)


@pytest.mark.parametrize("plausibility", [0.7, 0.95])
def test_guidance_chooses_among_the_plausible_codes_alone(lively_mllm, processor, draw, plausibility):
    options = {"guidance_scale": 5.0, "plausibility": plausibility}
    codes = draw(do_sample=False, **options)
    prompt = processor(text=TEXTS, generation_mode="image")
    cond = teacher_forced_logits(lively_mllm, prompt, codes)
    uncond = teacher_forced_logits(lively_mllm, prompt, codes, "unconditional_")
    guided = uncond + 5 * (cond - uncond)
    probs = cond.softmax(dim=-1)
    guided[probs < plausibility * probs.amax(dim=-1, keepdim=True)] = -torch.inf
    assert torch.equal(guided.argmax(dim=-1).transpose(1, 2), codes)
    assert not torch.equal(draw(do_sample=False, guidance_scale=5.0), codes)

    codes = draw(num_return_sequences=4, **options)
    assert torch.equal(draw(num_return_sequences=4, use_cache=False, **options), codes)
    prompt = processor(text=[text for text in TEXTS for _ in range(4)], generation_mode="image")
    probs = teacher_forced_logits(lively_mllm, prompt, codes).softmax(dim=-1)
    drawn = probs.gather(-1, codes.transpose(1, 2)[..., None])
    assert (drawn >= (plausibility - 1e-4) * probs.amax(dim=-1, keepdim=True)).all()


def test_the_ends_of_plausibility_are_plain_guidance_and_no_guidance(draw):
    assert torch.equal(draw(guidance_scale=5.0, plausibility=0), draw(guidance_scale=5.0))
    assert torch.equal(draw(guidance_scale=5.0, plausibility=1), draw(do_sample=False))
    assert not torch.equal(draw(do_sample=False, guidance_scale=5.0), draw(do_sample=False))


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("do_sample", [False, True])
def test_cache_batch_and_order_do_not_change_a_picture(draw, guidance_scale, do_sample):
    options = {"guidance_scale": guidance_scale, "do_sample": do_sample}
    codes = draw(**options, seed=[5, 6, 7])
    assert codes.shape == (3, K, L) and codes.dtype == torch.long
    assert torch.equal(draw(**options, seed=[5, 6, 7], use_cache=False), codes)
    assert torch.equal(draw(TEXTS[::-1], **options, seed=[7, 6, 5]), codes.flip(0))
    for text, seed, expected in zip(TEXTS, (5, 6, 7), codes):
        assert torch.equal(draw([text], **options, seed=seed)[0], expected)
    assert torch.equal(draw(**options, seed=[5, 6, 7], num_positions=4), codes[..., :4])


@pytest.mark.parametrize(
    "options", [{"do_sample": False}, {"guidance_scale": 3.0, "top_k": 5, "num_return_sequences": 2}]
)
def test_caches_of_fixed_length_draw_the_same(monkeypatch, draw, options):
    expected = draw(**options)
    lengths = []

    def static_cache(model, max_length):
        lengths.append(max_length)
        return StaticCache(config=model.config.text_config, max_cache_len=max_length)

    monkeypatch.setattr(fast_drawing_unitok, "static_cache", static_cache)
    monkeypatch.setattr(fast_drawing_unitok, "UniTokCudaGraph", lambda step: step)
    assert torch.equal(draw(**options), expected)
    assert len(lengths) == 1 and lengths[0] > L + 20
    assert torch.equal(draw(**options, num_positions=1), expected[..., :1])
    assert torch.equal(draw(**options, cuda_graph=False), expected)
    assert len(lengths) == 2


def test_inference_mode_draws_the_same_and_leaves_the_model_trainable(draw, lively_mllm):
    expected = draw(guidance_scale=3.0)
    with torch.inference_mode():
        assert torch.equal(draw(guidance_scale=3.0), expected)
    assert torch.equal(draw(guidance_scale=3.0), expected)
    codes = torch.zeros(1, K, L, dtype=torch.long)
    lively_mllm.embedder(codes).sum().backward()
    assert lively_mllm.embedder.fc2.weight.grad.norm() > 0


@pytest.mark.parametrize("guidance_scale, branches", [(1, 1), (1.0, 1), (3.0, 2)])
def test_each_image_token_takes_one_step_of_everything(lively_mllm, draw, guidance_scale, branches):
    calls = {"llm": [], "embedder": [], "depth": []}
    depth_layer = lively_mllm.depth_head.layers[1]
    parts = {"llm": lively_mllm.get_decoder().layers[0], "depth": depth_layer.self_attn.q_proj}
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda _, args, name=name: calls[name].append(tuple(args[0].shape[:2])))
    lively_mllm.embedder.register_forward_pre_hook(lambda _, args: calls["embedder"].append(tuple(args[0].shape)))
    draw(guidance_scale=guidance_scale)
    rows, prompt_length = 3 * branches, calls["llm"][0][1]
    assert calls["llm"] == [(rows, prompt_length)] + [(rows, 1)] * (L - 1) and prompt_length > 20
    assert calls["embedder"] == [(3, K, 1)] * (L - 1)
    assert calls["depth"] == [(rows, depth_layer.hidden_size)] * (K * L)


def test_guidance_1_ignores_the_unconditional_prompt(lively_mllm, processor, draw):
    prompt = processor(text=TEXTS, generation_mode="image")
    ids = prompt["input_ids"]
    plain = lively_mllm.generate(ids, attention_mask=prompt["attention_mask"], generation_mode="image", seed=0)
    assert torch.equal(plain, draw(guidance_scale=1.0))


def test_a_long_unconditional_prompt_pads_the_descriptions_instead(lively_mllm, processor, draw):
    prompt = processor(text=TEXTS, generation_mode="image")
    short = {name: value[1:2, -12:] for name, value in prompt.items() if not name.startswith("uncond")}
    assert short["input_ids"].shape[1] < prompt["unconditional_input_ids"].shape[1]
    options = {"generation_mode": "image", "do_sample": False, "guidance_scale": 5.0}
    unconditional = {name: value for name, value in prompt.items() if name.startswith("uncond")}
    codes = lively_mllm.generate(**short, **unconditional, **options)
    cond = teacher_forced_logits(lively_mllm, short, codes)
    uncond = teacher_forced_logits(lively_mllm, prompt, codes, "unconditional_")
    assert torch.equal((uncond + 5 * (cond - uncond)).argmax(dim=-1).transpose(1, 2), codes)


def test_seeds_belong_to_the_prompt_and_the_sample(draw):
    codes = draw(seed=[1, 2, 1], num_return_sequences=5).unflatten(0, (3, 5))
    fewer = draw(seed=[1, 2, 1], num_return_sequences=3, guidance_scale=1).unflatten(0, (3, 3))
    assert torch.equal(fewer, codes[:, :3])
    assert torch.equal(draw(TEXTS[1:2], seed=2, num_return_sequences=2), codes[1, :2])
    assert torch.equal(draw(seed=4), draw(seed=[4, 4, 4]))
    assert len({tuple(sample.flatten().tolist()) for sample in codes.flatten(0, 1)}) == 15


def test_without_a_seed_the_global_generator_decides(draw):
    torch.manual_seed(3)
    first, second = draw(seed=None), draw(seed=None)
    torch.manual_seed(3)
    assert torch.equal(draw(seed=None), first) and not torch.equal(first, second)
    state = torch.get_rng_state()
    draw(seed=1)
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_temperature_divides_the_logits(lively_mllm, draw):
    codes = draw(temperature=2.0)
    assert not torch.equal(draw(), codes)
    for parameter in lively_mllm.depth_head.head.parameters():
        parameter.div_(2)
    assert torch.equal(draw(), codes)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_narrowest_sampling_is_greedy(draw, options, guidance_scale):
    greedy = draw(do_sample=False, guidance_scale=guidance_scale)
    assert torch.equal(draw(**options, guidance_scale=guidance_scale), greedy)
    assert not torch.equal(draw(guidance_scale=guidance_scale), greedy)


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.5}])
def test_top_k_and_top_p_keep_to_the_likeliest_codes(lively_mllm, processor, draw, options):
    codes = draw(num_return_sequences=4, **options)
    prompt = processor(text=[text for text in TEXTS for _ in range(4)], generation_mode="image")
    probs = teacher_forced_logits(lively_mllm, prompt, codes).softmax(dim=-1)
    drawn = probs.gather(-1, codes.transpose(1, 2)[..., None])
    above = torch.where(probs > drawn, probs, 0)
    if "top_k" in options:
        assert (above > 0).sum(dim=-1).max() == 2
    else:
        assert 0.3 < above.sum(dim=-1).max() < 0.5


def test_sample_codes_inverts_the_distribution_and_never_draws_the_impossible():
    logits = torch.randn(V) * 2
    impossible = [0, 1, 13, 30, 31]
    logits[impossible] = -torch.inf
    n = 20_000
    noise = (torch.arange(n) + 0.5) / n
    counts = sample_codes(logits.expand(n, V), noise).bincount(minlength=V)
    assert (counts - n * logits.softmax(dim=-1)).abs().max() < 1.1
    assert counts[impossible].sum() == 0
    ends = torch.tensor([0.0, 1 - 2**-24])
    assert sample_codes(logits.expand(2, V), ends).tolist() == [2, 29]


def test_an_image_in_the_prompt_changes_the_picture(lively_mllm, processor, draw, images, pictures):
    texts = ["like <image> but blue", "red", "<image> and <image>"]
    options = {"do_sample": False, "guidance_scale": 1.0}
    codes = draw(texts, images=pictures[:3], **options)
    prompt = processor(text=texts, images=pictures[:3], generation_mode="image")
    assert (prompt["input_ids"] == IMAGE).sum(dim=1).tolist() == [L, 0, 2 * L]
    alone = [draw(texts[:1], pictures[:1], **options), draw(texts[1:2], **options)]
    alone += [draw(texts[2:], pictures[1:3], **options)]
    assert torch.equal(codes, torch.cat(alone))
    swapped = draw(texts, images=[pictures[3], *pictures[1:3]], **options)
    assert (swapped != codes).flatten(1).any(dim=1).tolist() == [True, False, False]

    history = lively_mllm.encode_images(prompt["pixel_values"][:1])
    first = processor(text=texts[:1], images=pictures[:1], generation_mode="image")
    logits = teacher_forced_logits(lively_mllm, first, codes[:1], history=history)
    assert torch.equal(logits.argmax(dim=-1).transpose(1, 2), codes[:1])
    repeated = draw(texts, images=pictures[:3], num_return_sequences=2, guidance_scale=2.0, top_k=1)
    guided = draw(texts, images=pictures[:3], guidance_scale=2.0, do_sample=False)
    assert torch.equal(repeated, guided.repeat_interleave(2, dim=0))


BAD_OPTIONS = [
    ({"guidance_scale": 0.5}, "guidance_scale must be at least 1 .*got 0.5"),
    ({"guidance_scale": -2.0}, "guidance_scale must be at least 1 .*got -2.0"),
    ({"temperature": 0.0}, "temperature must be above 0 .*got 0.0"),
    ({"top_k": -1}, "top_k must be at least 0 .*got -1"),
    ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
    ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
    ({"seed": [1, 2]}, "2 seeds for 3 prompts"),
    ({"num_return_sequences": 0}, "num_return_sequences must be at least 1, got 0"),
    ({"num_positions": 0}, "num_positions must be at least 1, got 0"),
    ({"input_ids": torch.tensor([[1, 20, BOI, 4]] * 3)}, r"must end with the token that opens an image \(3\)"),
    ({"guidance_scale": 2.0, "unconditional_input_ids": None}, "needs unconditional_input_ids"),
    (
        {"guidance_scale": 2.0, "unconditional_input_ids": torch.tensor([[1, BOI]] * 2)},
        "2 unconditional prompts for a batch of 3",
    ),
    ({"generation_mode": "video"}, "generation_mode is 'text', 'image' or 'interleaved', got 'video'"),
]


@pytest.mark.parametrize("options, message", BAD_OPTIONS, ids=[str(message) for _, message in BAD_OPTIONS])
def test_options_out_of_range_raise(mllm, processor, options, message):
    inputs = dict(processor(text=TEXTS, generation_mode="image"))
    if "input_ids" in options:
        del inputs["attention_mask"]
    if "unconditional_input_ids" in options:
        del inputs["unconditional_attention_mask"]
    with pytest.raises(ValueError, match=message):
        mllm.generate(**{**inputs, "generation_mode": "image", **options})


# Options: the call's, its generation config's, the model's


OWN = {"guidance_scale": 3.0, "temperature": 0.5, "top_k": 7}


@pytest.fixture
def text_options(lively_mllm):
    """Such as an LLM's folder has; drawing passes them over."""
    lively_mllm.generation_config.update(temperature=0.6, top_p=0.9, do_sample=True)


def test_what_a_call_leaves_open_is_the_models(text_options, lively_mllm, draw):
    expected, plain = draw(**OWN), draw()
    lively_mllm.set_image_generation(**OWN)
    assert torch.equal(draw(), expected) and not torch.equal(plain, expected)
    assert torch.equal(draw(guidance_scale=1.0, temperature=1.0, top_k=0), plain)
    lively_mllm.set_image_generation(do_sample=False)
    assert torch.equal(draw(), draw(do_sample=False)) and torch.equal(draw(do_sample=True), plain)


def test_a_generation_config_counts_between_the_call_and_the_model(text_options, lively_mllm, draw):
    def expected(**options):
        return draw(**OWN | options)

    lively_mllm.generation_config.update(top_k=9)
    results = {"call": expected(top_k=3), "nested": expected(top_k=4), "beside": expected(top_k=5), "own": expected()}
    assert len({codes.numpy().tobytes() for codes in results.values()}) == 4
    lively_mllm.set_image_generation(**OWN)
    nested = GenerationConfig(image_generation={"top_k": 4}, top_k=5)
    assert torch.equal(draw(generation_config=nested, top_k=3), results["call"])
    assert torch.equal(draw(generation_config=nested), results["nested"])
    assert torch.equal(draw(generation_config=GenerationConfig(top_k=5)), results["beside"])
    assert torch.equal(draw(generation_config=lively_mllm.generation_config), results["own"])


def test_options_of_drawing_are_saved_with_the_model_and_leave_text_as_it_is(lively_mllm, ask, draw, tmp_path):
    answers = ask(), ask(do_sample=True, temperature=2.0)
    expected = draw(**OWN)
    torch.manual_seed(0)
    lively_mllm.set_image_generation(**OWN)
    assert ask() == answers[0]
    lively_mllm.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text(encoding="utf-8"))["image_generation"] == OWN
    again = UniTokMLLMForConditionalGeneration.from_pretrained(tmp_path)
    assert again.generation_config.image_generation == OWN
    again.save_pretrained(tmp_path / "again")
    assert GenerationConfig.from_pretrained(tmp_path / "again").image_generation == OWN
    assert torch.equal(draw(), expected)


def test_the_shipped_model_has_options_of_its_own():
    folder = Path(fast_drawing_unitok.__file__).parent / "checkpoints" / "tiny"
    config = GenerationConfig.from_pretrained(folder)
    own = IMAGE_GENERATION | {"guidance_scale": 5.0, "plausibility": 0.1}
    assert config.image_generation == own and config.temperature is None and config.top_k is None


def test_the_models_guidance_is_left_out_where_there_is_no_prompt_for_it(lively_mllm, processor, draw, caplog):
    expected = draw(temperature=0.5, top_k=7)
    lively_mllm.set_image_generation(**OWN)
    prompt = {name: value for name, value in processor(text=TEXTS, generation_mode="image").items() if name[0] != "u"}
    options = {**prompt, "generation_mode": "image", "seed": 0}
    logging.get_logger("unitok_mllm").addHandler(caplog.handler)
    assert torch.equal(lively_mllm.generate(**options), expected)
    assert "without the model's own guidance_scale of 3.0: there is no prompt for it" in caplog.text
    for asked in ({"guidance_scale": 3.0}, {"generation_config": GenerationConfig(guidance_scale=3.0)}):
        with pytest.raises(ValueError, match="guidance_scale above 1 needs unconditional_input_ids"):
            lively_mllm.generate(**options, **asked)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"guidance": 3.0}, "image_generation has no 'guidance': did you mean 'guidance_scale'?"),
        ({"seed": 1}, "image_generation has no 'seed': known: guidance_scale, image_guidance_scale, plausibility, do"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"temperature": "warm"}, "temperature must be above 0 .* got 'warm'"),
        ([3], r"image_generation must be a dict of drawing options, got \[3\]"),
    ],
)
def test_an_entry_that_drawing_cannot_honour_is_refused(lively_mllm, draw, options, message):
    if isinstance(options, dict):
        with pytest.raises(ValueError, match=message):
            lively_mllm.set_image_generation(**options)
    lively_mllm.generation_config.image_generation = options
    with pytest.raises(ValueError, match=message):
        draw()
    with pytest.raises(ValueError, match="image_generation belongs in a generation_config"):
        lively_mllm.generate(torch.tensor([[1, 20]]), image_generation={"top_k": 3})


class Note(LogitsProcessor):
    """Notes what it is given, and adds to the logits of some codes."""

    def __init__(self, bias=0.0):
        self.bias, self.seen = torch.zeros(V).index_fill(0, torch.tensor([3, 17]), bias), []

    def __call__(self, input_ids, scores):
        self.seen.append((input_ids, scores))
        return scores + self.bias


@pytest.mark.parametrize("options", [{"do_sample": False}, {"guidance_scale": 3.0, "top_k": 5}])
def test_logits_processors_see_the_codes_so_far_and_the_guided_logits(lively_mllm, processor, draw, options):
    expected, note = draw(**options), Note()
    assert torch.equal(draw(**options, logits_processor=[note]), expected)
    flat = expected.transpose(1, 2).flatten(1)  # position after position
    assert all(torch.equal(ids, flat[:, :n]) for n, (ids, _) in enumerate(note.seen)) and len(note.seen) == K * L
    prompt = processor(text=TEXTS, generation_mode="image")
    cond = teacher_forced_logits(lively_mllm, prompt, expected)
    uncond = teacher_forced_logits(lively_mllm, prompt, expected, "unconditional_")
    guided = uncond + options.get("guidance_scale", 1.0) * (cond - uncond)
    seen = torch.stack([scores for _, scores in note.seen], dim=1).unflatten(1, (L, K))
    torch.testing.assert_close(seen, guided, rtol=1e-3, atol=1e-3)
    assert draw(**options, logits_processor=[Note(1e4)]).unique().tolist() in ([3], [17], [3, 17])


def test_a_processor_that_leaves_no_code_is_told_so(draw):
    with pytest.raises(ValueError, match="leaves no code to draw after 0 codes"):
        draw(logits_processor=[SuppressTokensLogitsProcessor(list(range(V)))])


def test_stopping_criteria_end_a_drawing_when_all_its_rows_are_stopped(draw):
    expected, seen = draw(), []

    def stop(input_ids, scores, **kwargs):
        seen.append(input_ids)
        return torch.tensor([n == len(seen) for n in (5, 2, 3)])

    codes = draw(stopping_criteria=[stop])
    assert torch.equal(codes, expected[..., :5])
    assert torch.equal(seen[-1], codes.transpose(1, 2).flatten(1)) and len(seen) == 5
    assert draw(stopping_criteria=StoppingCriteriaList([MaxTimeCriteria(0.0)])).shape[-1] == 1


def test_progress_is_shown_on_stderr_and_only_if_asked_for(draw, capsys):
    draw()
    assert capsys.readouterr() == ("", "")
    draw(progress=True)
    shown = capsys.readouterr()
    assert shown.out == "" and "drawing" in shown.err


def test_drawn_codes_become_pictures(lively_mllm, processor, draw):
    pixels = lively_mllm.decode_images(draw())
    assert pixels.min() >= -1 and pixels.max() <= 1
    pictures = processor.post_process_multimodal_output(pixels, generation_mode="image")
    assert [type(picture) for picture in pictures] == [Image.Image] * 3
    restored = processor.image_processor(pictures).pixel_values
    assert (restored - pixels).abs().max() <= 1 / 255 + 1e-6


# Edits


INSTRUCTIONS = ["make it blue", "what is the shape? a circle there", "red"]


@pytest.fixture
def edit(lively_mllm, processor, pictures):
    def edit(which=(0, 1, 2), **options):
        images = [[[pictures[0]], pictures[1:3], [pictures[3]]][i] for i in which]
        inputs = processor(images=images, text=[INSTRUCTIONS[i] for i in which], generation_mode="edit")
        return lively_mllm.generate(**inputs, **{"generation_mode": "image", "seed": 0, **options})

    return edit


def test_an_edit_is_led_away_from_the_picture_alone_and_from_the_words_alone(lively_mllm, processor, edit, pictures):
    scales = {"guidance_scale": 3.0, "image_guidance_scale": 2.0}
    codes = edit(**scales, do_sample=False)
    images = [[pictures[0]], pictures[1:3], [pictures[3]]]
    prompt = processor(images=images, text=INSTRUCTIONS, generation_mode="edit")
    logits = []
    for prefix in ("", "unconditional_", "text_alone_"):
        rows = []
        for i in range(3):  # one at a time, so that each row's images come in its own order
            row = {k: v[i : i + 1] for k, v in prompt.items() if k != "pixel_values"}
            history = lively_mllm.encode_images(prompt["pixel_values"])[[[0], [1, 2], [3]][i]]
            history = history[:0] if prefix == "text_alone_" else history
            rows.append(teacher_forced_logits(lively_mllm, row, codes[i : i + 1], prefix, history))
        logits.append(torch.cat(rows))
    full, picture_alone, words_alone = logits
    guided = full + 2.0 * (full - picture_alone) + 1.0 * (full - words_alone)
    assert torch.equal(guided.argmax(dim=-1).transpose(1, 2), codes)
    for other in ({}, {"guidance_scale": 3.0}, {"image_guidance_scale": 2.0}):
        assert not torch.equal(edit(**other, do_sample=False), codes)


@pytest.mark.parametrize("do_sample", [False, True])
def test_cache_and_batch_do_not_change_an_edit(edit, do_sample):
    options = {"guidance_scale": 3.0, "image_guidance_scale": 2.0, "do_sample": do_sample}
    codes = edit(**options, seed=[5, 6, 7])
    assert torch.equal(edit(**options, seed=[5, 6, 7], use_cache=False), codes)
    for i in range(3):
        assert torch.equal(edit([i], **options, seed=5 + i)[0], codes[i])
    twice = edit(**options, seed=[5, 6, 7], num_return_sequences=2)
    assert torch.equal(twice[::2], codes)


def test_a_prompt_for_an_edit_ends_where_the_image_begins(processor, pictures):
    inputs = processor(images=pictures[0], text="make it blue", generation_mode="edit")
    image = "<boi>" + L * "<image>" + "<eoi>\n"
    assert processor.decode(inputs["input_ids"][0]).endswith(f"USER: {image}make it blue ASSISTANT: <boi>")
    null = processor.decode(inputs["unconditional_input_ids"][0])
    assert null.endswith(f"USER: {image}<unconditional> ASSISTANT: <boi>")
    assert processor.decode(inputs["text_alone_input_ids"][0]).endswith("USER: make it blue ASSISTANT: <boi>")
    for images, text, message in (
        (None, "make it blue", "needs images"),
        (pictures[:2], "make it blue", r"Got 2 images \(or groups of them\) for 1 instructions"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(images=images, text=text, generation_mode="edit")


def test_guidance_against_the_words_alone_needs_them(draw):
    with pytest.raises(ValueError, match="image_guidance_scale above 1 needs text_alone_input_ids"):
        draw(image_guidance_scale=2.0)
    with pytest.raises(ValueError, match="image_guidance_scale must be at least 1"):
        draw(image_guidance_scale=0.5)


# Text with images in it


class Script(LogitsProcessor):
    """Leaves the model only the scripted token at some lengths of the new text (images not counted)."""

    def __init__(self, prompt_length: int, tokens: dict[int, int]):
        self.prompt_length, self.tokens = prompt_length, tokens

    def __call__(self, input_ids, scores):
        new = input_ids[:, self.prompt_length :]
        place = int((new != IMAGE).sum() - (new == EOI).sum())
        token = self.tokens.get(place)
        if token is None:
            scores = scores.clone()
            scores[:, [BOI, EOI, EOS]] = -torch.inf
            return scores
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([token]), 0.0)


def test_where_the_model_opens_an_image_it_draws_one_and_goes_on(lively_mllm, processor, pictures):
    inputs = processor(text="a <image> blue", images=pictures[0], generation_mode="interleaved")
    length = inputs["input_ids"].shape[1]
    script = LogitsProcessorList([Script(length, {3: BOI, 6: BOI, 8: EOS})])
    image_options = {"guidance_scale": 2.0, "seed": 4}
    options = {"generation_mode": "interleaved", "do_sample": False, "image_options": image_options}
    output = lively_mllm.generate(**inputs, **options, logits_processor=script)
    (new,), (codes,) = output.sequences, output.image_codes
    image = [BOI, *[IMAGE] * L, EOI]
    assert new[3 : 3 + L + 2].tolist() == image and new[-1] == EOS
    assert codes.shape == (2, K, L) and (new == IMAGE).sum() == 2 * L and len(new) == 9 + 2 * (L + 1)

    # each piece is what the other modes make of everything before it
    known = lively_mllm.encode_images(inputs["pixel_values"])
    unconditional = {k: v for k, v in inputs.items() if k.startswith("unconditional")}
    whole = torch.cat([inputs["input_ids"][0], new])[None]
    for n, opened in enumerate((whole[0, length:] == BOI).nonzero().flatten() + length):
        drawn = lively_mllm.generate(
            whole[:, : opened + 1],
            image_codes=torch.cat([known, codes[:n]]),
            generation_mode="image",
            **unconditional,
            guidance_scale=2.0,
            seed=4 + n,
        )
        assert torch.equal(drawn[0], codes[n])
    start = length + 3 + L + 2  # behind the first image
    text = lively_mllm.generate(
        whole[:, :start],
        image_codes=torch.cat([known, codes[:1]]),
        do_sample=False,
        max_new_tokens=2,
        logits_processor=script,
    )
    assert text[0, start:].tolist() == whole[0, start : start + 2].tolist()

    pixels = [lively_mllm.decode_images(codes)]
    (parts,) = processor.post_process_multimodal_output(output, generation_mode="interleaved", pixel_values=pixels)
    kinds = [part["type"] for part in parts]
    assert kinds in (["text", "image", "text", "image", "text"], ["text", "image", "text", "image"])
    assert all(part["image"].size == (48, 48) for part in parts if part["type"] == "image")
    words = processor.decode(new[:3], skip_special_tokens=True).strip()
    assert parts[0]["text"] == words
    again = processor.apply_chat_template(
        [{"role": "user", "content": "draw"}, {"role": "assistant", "content": parts}]
    )
    assert again.count("<image>") == 2


def test_interleaved_answers_in_a_batch_are_those_alone_and_without_images_those_of_the_text_mode(
    lively_mllm, processor, pictures
):
    images = [pictures[:2], [], pictures[2:3]]
    options = {"do_sample": False, "max_new_tokens": 6}
    inputs = processor(text=QUESTIONS, images=images, generation_mode="interleaved")
    output = lively_mllm.generate(**inputs, **options, generation_mode="interleaved", max_images=0)
    assert [len(codes) for codes in output.image_codes] == [0, 0, 0]
    pixels = [lively_mllm.decode_images(codes) for codes in output.image_codes]
    answers = processor.post_process_multimodal_output(output, generation_mode="interleaved", pixel_values=pixels)
    texts = [text.strip() for text in processor.batch_decode(output.sequences, skip_special_tokens=True)]
    assert answers == [[{"type": "text", "text": text}] if text else [] for text in texts]
    for i, new in enumerate(output.sequences):
        alone = processor(text=QUESTIONS[i], images=images[i] or None)
        expected = lively_mllm.generate(**alone, **options, suppress_tokens=[IMAGE, BOI])
        assert new.tolist() == expected[0, alone["input_ids"].shape[1] :].tolist()
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1 and max_images at least 0, got 0 and 4"):
        lively_mllm.generate(**inputs, generation_mode="interleaved", max_new_tokens=0)


def test_no_more_images_than_allowed(lively_mllm, processor):
    inputs = processor(text="draw", generation_mode="interleaved")
    always = LogitsProcessorList([SuppressTokensLogitsProcessor([t for t in range(300) if t not in (BOI, 50)])])
    output = lively_mllm.generate(
        **inputs, generation_mode="interleaved", max_new_tokens=6, max_images=2, logits_processor=always
    )
    assert len(output.image_codes[0]) <= 2
    assert (output.sequences[0] == BOI).sum() == len(output.image_codes[0])


def test_a_draft_model_of_another_size_gives_the_greedy_answer_about_images(
    lively_mllm, llama_config, visual_tokenizer, processor, pictures
):
    llama_config.hidden_size, llama_config.intermediate_size = 32, 48
    draft = UniTokMLLMForConditionalGeneration.from_parts(
        LlamaForCausalLM(llama_config),
        visual_tokenizer,
        embedder_dim=40,
        embedder_heads=2,
        **processor.config_token_ids(),
    )
    for image_inputs in ({}, {"image_codes": lively_mllm.encode_images(2 * pictures[0][None] - 1)}):
        inputs = dict(processor(text="<image> what is it?", images=pictures[:1]))
        if image_inputs:
            inputs.pop("pixel_values")
        options = {**inputs, **image_inputs, "max_new_tokens": 8, "do_sample": False}
        expected = lively_mllm.generate(**options)
        for assistant in (draft, lively_mllm):
            assert torch.equal(lively_mllm.generate(**options, assistant_model=assistant), expected)


def test_a_prompt_with_images_goes_through_in_chunks(lively_mllm, processor, pictures):
    inputs = processor(
        text=["<image> and <image> alike?", "<image>what"], images=[pictures[:2], pictures[1:2]], padding_side="left"
    )
    expected = lively_mllm.generate(**inputs, max_new_tokens=5)
    for size in (1, 7, 64):
        assert torch.equal(lively_mllm.generate(**inputs, max_new_tokens=5, prefill_chunk_size=size), expected), size


def test_a_repetition_penalty_on_the_prompt_skips_image_placeholders(lively_mllm, processor, pictures):
    inputs = processor(text="<image> what is it?", images=pictures[:1])
    lively_mllm.config.image_token_id = beyond = lively_mllm.config.text_config.vocab_size + 7
    inputs["input_ids"][inputs["input_ids"] == IMAGE] = beyond
    plain = lively_mllm.generate(**inputs, max_new_tokens=8, output_scores=True, return_dict_in_generate=True)
    favoured = lively_mllm.generate(
        **inputs, max_new_tokens=1, encoder_repetition_penalty=2.0, output_scores=True, return_dict_in_generate=True
    )
    before, after = plain.scores[0][0], favoured.scores[0][0]
    words = inputs["input_ids"][inputs["input_ids"] != beyond].unique()
    expected = before.clone()
    expected[words] = torch.where(before[words] < 0, before[words] / 2, before[words] * 2)
    torch.testing.assert_close(after, expected)
    for name in ("repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"):
        lively_mllm.generate(**inputs, max_new_tokens=3, **{name: 2 if "size" in name else 2.0})


def test_continuous_batching_answers_texts_as_generate_does(lively_mllm, processor):
    prompts = [processor(text=text)["input_ids"][0].tolist() for text in ("what is it?", "is it red or blue", "a")]
    options = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)  # by default it fills the memory
    served = lively_mllm.generate_batch(
        prompts, generation_config=options, continuous_batching_config=small, progress_bar=False
    )
    assert len(served) == len(prompts)
    for prompt, answer in zip(prompts, served.values()):
        alone = lively_mllm.generate(torch.tensor([prompt]), generation_config=options)
        assert answer.generated_tokens == alone[0, len(prompt) :].tolist()


@pytest.mark.slow  # the compiler takes half a minute
def test_a_step_with_a_static_cache_compiles_as_one_graph(lively_mllm, processor, pictures):
    inputs = processor(text="<image> what is it?", images=pictures[:1])
    expected = lively_mllm.generate(**inputs, max_new_tokens=4, do_sample=False)
    cache = StaticCache(config=lively_mllm.config.text_config, max_cache_len=64)
    step = torch.compile(lively_mllm.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        logits = lively_mllm(**inputs, cache=cache).logits[:, -1]
        tokens, position = [], inputs["input_ids"].shape[1]
        for offset in range(4):
            tokens.append(logits.argmax(dim=-1))
            position_ids = torch.tensor([[position + offset]])
            logits = step(input_ids=tokens[-1][None], position_ids=position_ids, cache=cache).logits[:, -1]
    assert torch.equal(torch.stack(tokens, dim=1), expected[:, position:])


def test_an_answer_ends_at_a_stop_string(ask, processor):
    (answer,) = ask(which=[1], min_new_tokens=0)
    words = [processor.tokenizer.decode([token]) for token in answer]
    place = next(i for i, word in enumerate(words) if word.strip().isascii() and word not in words[:i])
    (stopped,) = ask(which=[1], min_new_tokens=0, stop_strings=[words[place]], tokenizer=processor.tokenizer)
    assert stopped == answer[: place + 1]


def test_none_means_the_default(lively_mllm, processor):
    inputs = processor(text="a red circle", generation_mode="image")
    arguments = inspect.signature(lively_mllm.generate_image_codes).parameters.keys() - {*inputs, "options"}
    options = dict.fromkeys(
        (*arguments, *(field.name for field in fields(UniTokDrawingOptions) if field.name != "seed"))
    )
    assert {"temperature", "top_k", "top_p", "guidance_scale", "do_sample", "num_return_sequences"} <= options.keys()
    expected = lively_mllm.generate(**inputs, generation_mode="image", seed=1)
    assert torch.equal(lively_mllm.generate(**inputs, generation_mode="image", seed=1, **options), expected)


def test_a_module_given_to_from_pretrained_is_no_option_of_generation(mllm, visual_tokenizer, tmp_path):
    mllm.set_image_generation(guidance_scale=2.0)
    mllm.save_pretrained(tmp_path)
    loaded = UniTokMLLMForConditionalGeneration.from_pretrained(tmp_path, visual=visual_tokenizer)
    assert loaded.visual is visual_tokenizer
    assert loaded.generation_config.to_dict() == mllm.generation_config.to_dict()


@pytest.mark.attack
def test_two_threads_get_what_they_get_alone(lively_mllm, processor):
    picture = Image.effect_noise((40, 30), 90).convert("RGB")
    requests = []
    for text, guidance in (("a red circle", 3.0), ("what is the blue shape?", 1.0)):
        inputs = processor(text=[text, "red"], generation_mode="image")
        requests.append({**inputs, "generation_mode": "image", "seed": [3, 4], "guidance_scale": guidance})
        asked = processor(text=f"<image> {text}", images=picture)
        requests.append({**asked, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False})
    alone = [lively_mllm.generate(**request) for request in requests]
    with ThreadPoolExecutor(2) as pool:
        order = [0, 1, 2, 3, 3, 2, 1, 0, 0, 2, 1, 3] * 2
        together = list(pool.map(lambda number: lively_mllm.generate(**requests[number]), order))
    assert not torch.equal(alone[0], alone[2])
    for number, result in zip(order, together):
        assert torch.equal(result, alone[number]), number


def test_a_thread_that_computes_losses_leaves_one_that_generates_alone(lively_mllm, processor):
    asked = {**processor(text="what is red?"), "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    alone, learned = lively_mllm.generate(**asked), processor(text="a red circle")

    def losses() -> list[float]:
        options = {"labels": learned["input_ids"], "logits_at_targets": True}
        return [lively_mllm(**learned, **options).loss.item() for _ in range(20)]

    with ThreadPoolExecutor(1) as pool:
        computed = pool.submit(losses)
        for _ in range(20):
            assert torch.equal(lively_mllm.generate(**asked), alone)
        assert len({*computed.result()}) == 1


EXTREME = [
    {"temperature": 1e-6},
    {"temperature": 1e-30},
    {"temperature": 1e30},
    {"temperature": 1e-30, "guidance_scale": 1e6},
    {"temperature": 1e-30, "guidance_scale": 1e6, "top_k": 2, "top_p": 0.5},
    {"top_k": 1},
    {"top_k": V + 1},
    {"top_k": 10**9},
    {"top_p": 1e-30},
    {"top_p": 1},
    {"top_p": 1 - 1e-12},
    {"plausibility": 1e-300},
    {"plausibility": 1, "guidance_scale": 1e6},
    {"guidance_scale": 1e6},
    {"guidance_scale": 1e6, "do_sample": False},
    {"seed": 2**200},
    {"seed": np.int64(7)},
    {"seed": [0, 2**64]},
]
IMPOSSIBLE = [
    *(("temperature", value) for value in (0, -1.0, math.nan, math.inf, -math.inf, 1e-300)),
    *(("top_k", value) for value in (-1, 2.5, math.nan)),
    *(("top_p", value) for value in (0, -0.5, 1.1, math.nan, math.inf)),
    *(("plausibility", value) for value in (-0.1, 1.1, math.nan)),
    *(("guidance_scale", value) for value in (0, -3.0, 1.1e6, math.nan, math.inf)),
    *(("image_guidance_scale", value) for value in (0, math.nan, math.inf)),
    *(("seed", value) for value in (-1, 1.5, math.nan, "one", [3, -4], [1, None])),
    *(("num_return_sequences", value) for value in (0, -1)),
    *(("num_positions", value) for value in (0, -1)),
]


@pytest.mark.parametrize("options", EXTREME, ids=str)
@pytest.mark.attack
def test_extreme_sampling_gives_codes(lively_mllm, processor, options):
    inputs = processor(text=["a red circle", "blue"], generation_mode="image")
    options = {"generation_mode": "image", "seed": 5, **options}
    codes = lively_mllm.generate(**inputs, **options)
    assert codes.shape == (2, K, L) and 0 <= codes.min() and codes.max() < V
    assert torch.equal(lively_mllm.generate(**inputs, **options), codes)
    if options.get("temperature", 1) <= 1e-6 or options.get("top_k") == 1 or options.get("top_p", 1) == 1e-30:
        greedy = {"do_sample": False, "guidance_scale": options.get("guidance_scale", 1.0)}
        assert torch.equal(lively_mllm.generate(**inputs, generation_mode="image", **greedy), codes)
    pixels = lively_mllm.decode_images(codes)
    assert pixels.shape == (2, 3, 48, 48) and (pixels.abs() <= 1).all()


@pytest.mark.parametrize("name, value", IMPOSSIBLE, ids=str)
@pytest.mark.attack
def test_impossible_sampling_is_refused_with_option_and_value(lively_mllm, processor, name, value):
    inputs = processor(text=["a red circle", "blue"], generation_mode="image")
    with pytest.raises(ValueError) as error:
        lively_mllm.generate(**inputs, generation_mode="image", **{name: value})
    assert name in str(error.value) and str(value) in str(error.value)
