"""Options and streams of answers that are text with images in them; what they hold is in test_generation_unitok."""

import inspect
from dataclasses import fields
from queue import Empty
from threading import Thread

import pytest
import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation import SuppressTokensLogitsProcessor

from unitok_mllm import UniTokImageStreamer, generation_unitok
from unitok_mllm.drawing_unitok import UniTokDrawingOptions
from unitok_mllm.fast_drawing_unitok import UniTokDrawingParts
from unitok_mllm.interleaved_unitok import IMAGE_OPTIONS, TEXT_OPTIONS


BOI, EOI, IMAGE, EOS, L = 3, 4, 5, 2, 9
PICTURE = [BOI, *[IMAGE] * L, EOI]
RED, BLUE = 50, 51  # some tokens of text


class Say(LogitsProcessor):
    """Leaves the model one token at each place of the answer, images not counted, and the last one ever after."""

    def __init__(self, prompt_length: int, *tokens: int):
        self.prompt_length, self.tokens = prompt_length, tokens

    def __call__(self, input_ids, scores):
        new = input_ids[:, self.prompt_length :]
        place = int((new != IMAGE).sum() - (new == EOI).sum())
        token = self.tokens[min(place, len(self.tokens) - 1)]
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([token]), 0.0)


class EndAfter(StoppingCriteria):
    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.fixture
def answer(lively_mllm, processor):
    """The new ids and the number of images of the answer to "draw"; with `say`, the answer is scripted."""

    def answer(say=None, text="draw", **options):
        inputs = dict(processor(text=text, generation_mode="interleaved"))
        if say is not None:
            options["logits_processor"] = LogitsProcessorList([Say(inputs["input_ids"].shape[1], *say)])
        options = {"do_sample": False, "max_new_tokens": 8, "image_options": {"seed": 0}} | options
        output = lively_mllm.generate(**inputs, generation_mode="interleaved", **options)
        return output.sequences[0].tolist(), len(output.image_codes[0])

    return answer


# Each option of `generate` is honoured or refused

REFUSED = {
    **{"max_length": 9, "min_length": 3, "num_beams": 2, "early_stopping": True, "length_penalty": 0.5},
    **{"num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    **{"output_attentions": True, "output_hidden_states": True, "use_mtp": True, "encoder_repetition_penalty": 1.5},
    **{"encoder_no_repeat_ngram_size": 2, "exponential_decay_length_penalty": (3, 1.5), "begin_suppress_tokens": [9]},
    **{"forced_bos_token_id": 9, "token_healing": True, "guidance_scale": 2.0, "decoder_start_token_id": 1},
    **{"watermarking_config": {"bias": 2.0}, "is_assistant": True, "num_assistant_tokens": 3},
    **{"num_assistant_tokens_schedule": "heuristic", "assistant_confidence_threshold": 0.7},
    **{"prompt_lookup_num_tokens": 2, "max_matching_ngram_size": 3, "assistant_early_exit": 1},
    **{"assistant_lookbehind": 3, "target_lookbehind": 3, "assistant_ensemble_weight": 0.3, "speculation_type": "x"},
    **{"continuous_batching_config": {}, "low_memory": True, "penalty_alpha": 0.5, "dola_layers": "low"},
    **{"diversity_penalty": 0.5, "num_beam_groups": 2, "constraints": [1], "force_words_ids": [[9]]},
    # arguments that are not fields of a `GenerationConfig`
    **{"synced_gpus": True, "assistant_model": "a model", "negative_prompt_ids": torch.ones(1, 2)},
    **{"negative_prompt_attention_mask": torch.ones(1, 2), "custom_generate": "a recipe", "trust_remote_code": True},
    **{"assistant_tokenizer": "a tokenizer"},
}


def test_every_option_of_the_library_is_sorted():
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
    arguments = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "inputs", "kwargs"}
    popped = {"tokenizer", "assistant_tokenizer", "trust_remote_code"}
    assert TEXT_OPTIONS | REFUSED.keys() == fields | arguments | popped and not TEXT_OPTIONS & REFUSED.keys()


@pytest.mark.parametrize("name", [*REFUSED, "cache", "position_ids", "max_new_token", "text_alone_input_ids"])
@pytest.mark.filterwarnings("ignore")
def test_options_that_an_answer_with_images_cannot_honour_are_refused_by_name(answer, name):
    with pytest.raises(ValueError, match=f"generation_mode='interleaved' does not take {name}="):
        answer(**{name: REFUSED.get(name, 3)})


def test_what_is_refused_says_what_to_do_instead(answer, lively_mllm):
    for name, hint in (("num_return_sequences", "repeat the prompt"), ("guidance_scale", "image_options has one")):
        with pytest.raises(ValueError, match=f"does not take {name}=2: {hint}"):
            answer(**{name: 2})
    with pytest.raises(ValueError, match="does not take cache_implementation='paged'"):
        answer(cache_implementation="paged")
    with pytest.raises(ValueError, match="does not take num_beams=2"):
        answer(generation_config=GenerationConfig(num_beams=2))
    with pytest.raises(ValueError, match="image_options does not take 'num_return_sequences'; known: cuda_graph, do_"):
        answer(image_options={"num_return_sequences": 2})
    defaults = {"num_beams": 1, "num_return_sequences": 1, "output_scores": False, "length_penalty": None}
    assert answer(**defaults) == answer(**dict.fromkeys(REFUSED)) == answer()
    lively_mllm.generation_config.max_length = 200  # Llama's folders have one
    assert len(answer()[0]) == 8


def test_an_answer_prepares_the_model_once_for_all_its_images(answer, monkeypatch):
    prepared = []

    def prepare_drawing(model):
        prepared.append(model)
        return UniTokDrawingParts(model)

    monkeypatch.setattr(generation_unitok, "prepare_drawing", prepare_drawing)
    assert answer((RED, BOI, BOI, BLUE, EOS)) == ([RED, *PICTURE, *PICTURE, BLUE, EOS], 2)
    assert len(prepared) == 1
    answer((RED, BLUE, EOS))
    assert len(prepared) == 1


def test_images_are_drawn_with_the_options_of_the_model_or_of_the_calls_config(lively_mllm, processor):
    inputs = processor(text="draw", generation_mode="interleaved")
    say = LogitsProcessorList([Say(inputs["input_ids"].shape[1], BOI, EOS)])

    def drawn(images, **options):
        options |= {"image_options": {"seed": 0, **images}, "do_sample": False, "logits_processor": say}
        return lively_mllm.generate(**inputs, **options, generation_mode="interleaved").image_codes[0].tolist()

    own, others = {"guidance_scale": 3.0, "top_k": 5}, {"guidance_scale": 3.0, "top_k": 2}
    expected = drawn(own), drawn(others), drawn({})
    assert expected[0] != expected[1] != expected[2] != expected[0]
    lively_mllm.set_image_generation(**own)
    assert drawn({}) == expected[0] and drawn({"guidance_scale": 1.0, "top_k": 0}) == expected[2]
    assert drawn({"top_k": 2}) == expected[1]
    assert drawn({}, generation_config=GenerationConfig(image_generation={"top_k": 2})) == expected[1]
    first = LogitsProcessorList([SuppressTokensLogitsProcessor(list(range(1, 32)))])
    assert set(drawn({"logits_processor": first})[0][0]) == {0}
    with pytest.raises(ValueError, match="does not take image_generation="):
        drawn({}, image_generation=own)


def test_the_options_of_images_are_those_of_drawing(lively_mllm):
    parameters = set(inspect.signature(lively_mllm.generate_image_codes).parameters) - {"options"}
    parameters |= {field.name for field in fields(UniTokDrawingOptions)}
    prompts = {name for name in parameters if name.endswith(("input_ids", "attention_mask"))}
    ours = {"pixel_values", "image_codes", "num_return_sequences", "num_positions", "parts", "generation_config"}
    ours |= {"image_guidance_scale"}  # edits alone have the prompts for it
    ours |= {"candidates", "return_dict_in_generate"}  # no text says what is to be seen in one of several images
    assert IMAGE_OPTIONS == parameters - prompts - ours


HONOURED = {
    "bos_token_id": {"bos_token_id": 7},
    "pad_token_id": {"pad_token_id": 7},
    "temperature": {"do_sample": True, "temperature": 9.0},
    "do_sample, top_k": {"do_sample": True, "top_k": 3},
    "top_p": {"do_sample": True, "top_p": 0.2},
    "min_p": {"do_sample": True, "min_p": 0.5},
    "top_h": {"do_sample": True, "top_h": 0.2},
    "typical_p": {"do_sample": True, "typical_p": 0.2},
    "epsilon_cutoff": {"do_sample": True, "epsilon_cutoff": 0.01},
    "eta_cutoff": {"do_sample": True, "eta_cutoff": 0.01},
    "renormalize_logits": {"do_sample": True, "renormalize_logits": True},
    "remove_invalid_values": {"remove_invalid_values": True},
    "repetition_penalty": {"repetition_penalty": 9.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "use_cache": {"use_cache": False},
    "cache_implementation": {"cache_implementation": "static"},
    "prefill_chunk_size": {"prefill_chunk_size": 2},
    "compile_config, disable_compile": {"disable_compile": True},
    "forced_eos_token_id": {"forced_eos_token_id": EOS},
    "generation_config": {"generation_config": GenerationConfig(repetition_penalty=9.0)},
}


@pytest.mark.parametrize("name", HONOURED)
@pytest.mark.filterwarnings("ignore")
def test_without_images_options_do_what_they_do_to_text(lively_mllm, processor, name):
    inputs = processor(text="what is the shape?", generation_mode="interleaved")
    prompt, length = {name: inputs[name] for name in ("input_ids", "attention_mask")}, inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 6} | HONOURED[name]
    no_boi = LogitsProcessorList([SuppressTokensLogitsProcessor([IMAGE, BOI])])
    torch.manual_seed(1)
    expected = lively_mllm.generate(**prompt, **options, logits_processor=no_boi)[0, length:]
    torch.manual_seed(1)
    output = lively_mllm.generate(**inputs, **options, generation_mode="interleaved", max_images=0)
    assert output.sequences[0].tolist() == expected.tolist()


def test_without_images_options_about_tokens_do_what_they_do_to_text(answer):
    first, second, *_ = answer(max_images=0)[0]
    for options, expected in (
        ({"suppress_tokens": [first]}, lambda ids: first not in ids),
        ({"bad_words_ids": [[first, second]]}, lambda ids: ids[0] == first and ids[1] != second),
        ({"sequence_bias": [[[RED], 99.0]]}, lambda ids: ids == [RED] * 8),
        ({"eos_token_id": [EOS, second]}, lambda ids: ids == [first, second]),
        ({"eos_token_id": first}, lambda ids: ids == [first]),
        ({"prefix_allowed_tokens_fn": lambda row, ids: [RED + row]}, lambda ids: ids == [RED] * 8),
        ({"max_time": 0.0}, lambda ids: ids == [first]),
        ({"max_new_tokens": 3}, lambda ids: len(ids) == 3),
        ({"generation_config": GenerationConfig(suppress_tokens=[first])}, lambda ids: first not in ids),
        ({"generation_config": GenerationConfig(max_new_tokens=3), "max_new_tokens": None}, lambda ids: len(ids) == 3),
    ):
        new = answer(max_images=0, **options)[0]
        assert expected(new), (options, new)
    with pytest.raises(ValueError, match="tokenizer"):
        answer(stop_strings=["a"])


# With images, they mean the whole answer


def test_the_least_length_keeps_no_image_from_being_opened(answer):
    say = (RED, BOI, EOS)
    assert answer(say) == ([RED, *PICTURE, EOS], 1)
    assert answer(say, min_new_tokens=2) == ([RED, *PICTURE, EOS], 1)
    new, images = answer(sequence_bias=[[[EOS], 99.0], [[BOI], 98.0]], min_new_tokens=3, max_images=1)
    assert images == 1 and new[: len(PICTURE)] == PICTURE and new.index(EOS) == len(new) - 1 == len(PICTURE) + 2


def test_the_longest_length_counts_all_the_text(answer):
    assert answer((RED, BOI, BLUE), max_new_tokens=5) == ([RED, *PICTURE, BLUE, BLUE, BLUE], 1)
    assert answer((RED, BOI), max_new_tokens=2, max_images=9) == ([RED, *PICTURE], 1)
    assert answer((RED, BOI), max_new_tokens=3, max_images=9) == ([RED, *PICTURE, *PICTURE], 2)


def test_an_answer_ends_where_it_is_told_to_even_at_the_opening_of_an_image(answer, processor):
    prompt = processor(text="draw").input_ids.shape[1]
    say = (RED, BOI, BLUE, EOS)
    for length, expected in (
        (prompt + 1, ([RED], 0)),
        (prompt + 2, ([RED], 0)),  # as the image would open
        (prompt + 2 + len(PICTURE), ([RED, *PICTURE, BLUE], 1)),
    ):
        assert answer(say, stopping_criteria=StoppingCriteriaList([EndAfter(length)])) == expected
    assert answer(say, stopping_criteria=[EndAfter(prompt + 1)]) == ([RED], 0)
    assert answer((BOI, RED), max_time=0.0) == ([], 0)
    assert answer((RED, BOI, BLUE, EOS), eos_token_id=[EOS, BLUE]) == ([RED, *PICTURE, BLUE], 1)
    assert answer((RED, BOI, BLUE, EOS), eos_token_id=[EOS, BOI]) == ([RED, BOI], 0)
    stops = {"stop_strings": [processor.decode([BLUE])], "tokenizer": processor.tokenizer}
    assert answer((RED, BOI, BLUE, BLUE), **stops) == ([RED, *PICTURE, BLUE], 1)


def test_suppressed_tokens_stay_so_behind_images(answer):
    biased = {"sequence_bias": [[[RED], 99.0], [[BLUE], 98.0], [[BOI], 97.0]]}
    assert answer(**biased, suppress_tokens=[RED], max_new_tokens=2) == ([BLUE, BLUE], 0)
    assert answer(**biased, suppress_tokens=[RED, BLUE], max_new_tokens=2, max_images=1)[1] == 1
    new, _ = answer(**biased, suppress_tokens=[RED, BLUE], max_new_tokens=3, max_images=1)
    assert RED not in new and BLUE not in new and new[: len(PICTURE)] == PICTURE and new.count(BOI) == 1


def test_tokens_are_allowed_by_the_row(lively_mllm, processor):
    inputs = processor(text=["draw", "what is the shape?"], generation_mode="interleaved")
    output = lively_mllm.generate(
        **inputs, generation_mode="interleaved", max_new_tokens=2, prefix_allowed_tokens_fn=lambda row, _: [RED + row]
    )
    assert [ids.tolist() for ids in output.sequences] == [[RED, RED], [BLUE, BLUE]]


def test_each_row_has_its_unconditional_prompt_and_its_seed(lively_mllm, processor):
    texts, nulls = ["draw", "a red circle", "what?"], ["", "a blue shape", "no, the red one"]
    rows = [processor(text=text, generation_mode="interleaved") for text in texts]
    null = processor(text=[f"{text}<boi>" for text in nulls])
    inputs = dict(processor(text=texts, generation_mode="interleaved"))
    biased = {"sequence_bias": [[[BOI], 99.0]], "max_new_tokens": 2, "max_images": 2, "do_sample": False}
    options = {"generation_mode": "interleaved", **biased}
    image_options = {"guidance_scale": 3.0, "seed": [5, 6, 7]}
    unconditional = {f"unconditional_{name}": null[name] for name in ("input_ids", "attention_mask")}
    together = lively_mllm.generate(**(inputs | unconditional), **options, image_options=image_options)
    for row, alone in enumerate(rows):
        own = processor(text=f"{nulls[row]}<boi>")
        one = {f"unconditional_{name}": own[name] for name in ("input_ids", "attention_mask")}
        expected = lively_mllm.generate(
            **(dict(alone) | one), **options, image_options={**image_options, "seed": 5 + row}
        )
        assert len(expected.image_codes[0]) == 2
        assert torch.equal(together.image_codes[row], expected.image_codes[0])
    shared = lively_mllm.generate(**inputs, **options, image_options=image_options)
    assert not torch.equal(shared.image_codes[1], together.image_codes[1])
    two = {name: value[:2] for name, value in unconditional.items()}
    with pytest.raises(ValueError, match="Got 2 unconditional prompts for a batch of 3"):
        lively_mllm.generate(**(inputs | two), **options, image_options=image_options)


# Streams


def in_thread(model, **options) -> tuple[Thread, list]:
    """A started thread that generates, and the list that its result or its error goes to."""
    results = []

    def work():
        try:
            results.append(model.generate(generation_mode="interleaved", **options))
        except Exception as error:
            results.append(error)

    thread = Thread(target=work)
    thread.start()
    return thread, results


def test_streams_show_the_whole_answer_and_end_once(lively_mllm, processor):
    inputs = dict(processor(text="draw", generation_mode="interleaved"))
    script = LogitsProcessorList([Say(inputs["input_ids"].shape[1], RED, BOI, BLUE, BOI, BLUE, EOS)])
    text = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    images = UniTokImageStreamer(lively_mllm, processor, every=L, timeout=60)
    options = {"logits_processor": script, "do_sample": False, "image_options": {"seed": 0}}
    thread, results = in_thread(
        lively_mllm, **inputs, **options | {"streamer": text, "image_options": {"seed": 0, "streamer": images}}
    )
    words, frames = "".join(text), list(images)
    thread.join()
    (output,) = results
    assert output.sequences[0].tolist() == [RED, *PICTURE, BLUE, *PICTURE, BLUE, EOS]
    assert words == processor.decode([RED, BLUE, BLUE])
    decoded = lively_mllm.decode_images(output.image_codes[0])
    pictures = processor.post_process_multimodal_output(decoded, generation_mode="image")
    assert [frame for (frame,) in frames] == pictures
    assert text.text_queue.empty() and images._queue.empty()
    without = lively_mllm.generate(**inputs, generation_mode="interleaved", **options)
    assert torch.equal(without.image_codes[0], output.image_codes[0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_beams": 3}, "does not take num_beams"),
        ({"max_images": -1}, "max_images at least 0"),
        ({"image_options": {"guidance_scale": 0.5}}, "guidance_scale must be at least 1"),
    ],
)
def test_streams_end_whatever_is_raised(lively_mllm, processor, options, message):
    inputs = dict(processor(text="draw", generation_mode="interleaved"))
    script = LogitsProcessorList([Say(inputs["input_ids"].shape[1], RED, BOI)])
    text = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60)
    images = UniTokImageStreamer(lively_mllm, processor, timeout=60)
    image_options = {**options.pop("image_options", {}), "streamer": images}
    thread, results = in_thread(
        lively_mllm, **inputs, **options, image_options=image_options, streamer=text, logits_processor=script
    )
    "".join(text)
    with pytest.raises(ValueError, match=message):
        list(images)
    thread.join()
    assert isinstance(results[0], ValueError) and message in str(results[0])


def test_an_answer_without_an_image_ends_the_images_stream(answer, lively_mllm, processor):
    images = UniTokImageStreamer(lively_mllm, processor, timeout=60)
    assert answer((RED, EOS), image_options={"streamer": images}) == ([RED, EOS], 0)
    assert list(images) == []
    with pytest.raises(Empty):
        images._queue.get(block=False)


def test_a_stopped_drawing_ends_the_answer_before_it(answer, lively_mllm, processor):
    images = UniTokImageStreamer(lively_mllm, processor, timeout=60)
    images.stop()
    assert answer((RED, BOI, BLUE), image_options={"streamer": images}) == ([RED], 0)


def test_a_streamer_shows_one_answer(lively_mllm, processor):
    inputs = processor(text=["draw", "draw"], generation_mode="interleaved")
    text = TextIteratorStreamer(processor.tokenizer, timeout=60)
    with pytest.raises(ValueError, match="A streamer shows the answer to one prompt, got 2"):
        lively_mllm.generate(**inputs, generation_mode="interleaved", streamer=text)
    assert "".join(text) == ""


def test_every_prompt_of_a_batch_ends_where_it_was_told_to(lively_mllm, processor):
    """An end token of the caller's own holds for all prompts of an interleaved batch."""
    inputs = processor(text=["a red circle", "blue"], generation_mode="interleaved")
    options = {"do_sample": False, "max_new_tokens": 12, "max_images": 0, "eos_token_id": list(range(300))}
    output = lively_mllm.generate(**inputs, generation_mode="interleaved", **options)
    assert [len(sequence) for sequence in output.sequences] == [1, 1]
