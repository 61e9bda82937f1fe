"""The ranking of drawings by the tokenizer's text and image embeddings."""

import pytest
import torch

from unitok_mllm.inference import pictures_of, text_tower_inputs
from unitok_mllm.ranking_unitok import choose_drawings, score_drawings


TEXTS = ["a red circle", "what is the blue shape?"]


@pytest.fixture
def draw(lively_mllm, processor):
    """Drawings of the two texts, or of others, with all that is known of them."""

    def draw(texts=TEXTS, **options):
        inputs = processor(text=texts, generation_mode="image")
        options = {"seed": 3, "return_dict_in_generate": True} | options
        return lively_mllm.generate(**inputs, generation_mode="image", **options)

    return draw


def test_the_best_candidates_come_back_best_first(draw, lively_mllm):
    samples = draw(num_return_sequences=5).codes.unflatten(0, (2, 5))
    output = draw(candidates=5, num_return_sequences=2)
    assert torch.equal(output.candidate_codes, samples)  # candidate j is sample j
    order = output.candidate_scores.argsort(dim=1, descending=True)
    assert torch.equal(output.chosen, order[:, :2]) and not torch.equal(order[0], order[1])
    rows = torch.arange(2)[:, None]
    assert torch.equal(output.codes, samples[rows, order[:, :2]].flatten(0, 1))
    assert torch.equal(output.scores, output.candidate_scores.sort(dim=1, descending=True).values[:, :2].flatten())
    assert torch.equal(draw(candidates=5, num_return_sequences=2, return_dict_in_generate=False), output.codes)


def test_scores_are_cosines_of_the_tokenizers_own_embeddings(draw, lively_mllm, processor):
    output, visual = draw(candidates=3), lively_mllm.visual
    texts = visual.get_text_features(**text_tower_inputs(lively_mllm, processor, TEXTS)).pooler_output
    for codes, scores, text in zip(output.candidate_codes, output.candidate_scores, texts):
        tokens = visual.vision_model.embed_codes(codes)
        images = visual.vision_model.projection(visual.vision_model.fc_norm(tokens.mean(dim=1)))
        assert torch.allclose(scores, torch.cosine_similarity(images, text[None]), atol=1e-6)


def test_one_candidate_is_the_plain_drawing_and_is_not_ranked(draw):
    plain, one = draw(), draw(candidates=1)
    assert torch.equal(plain.codes, one.codes) and one.scores is None and one.candidate_scores is None
    assert torch.equal(draw(candidates=4).candidate_codes[:, 0], plain.codes)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_prompts_candidates_do_not_depend_on_the_batch(draw, guidance):
    together = draw(candidates=3, seed=[3, 8], guidance_scale=guidance)
    again = draw(candidates=3, seed=[3, 8], guidance_scale=guidance)
    assert torch.equal(together.candidate_scores, again.candidate_scores)
    for row, (text, seed) in enumerate(zip(TEXTS, (3, 8))):
        alone = draw([text], candidates=3, seed=seed, guidance_scale=guidance)
        assert torch.equal(alone.codes[0], together.codes[row])
        assert torch.equal(alone.candidate_codes[0], together.candidate_codes[row])
        assert torch.allclose(alone.candidate_scores[0], together.candidate_scores[row], atol=1e-6)


def test_equal_scores_keep_the_order_of_the_samples():
    codes = torch.arange(8).view(1, 8, 1, 1)
    output = choose_drawings(codes, torch.tensor([[0.0, 1, 0, 1, 0, 1, 0, 1]]), 6)
    assert output.codes.flatten().tolist() == output.chosen[0].tolist() == [1, 3, 5, 7, 0, 2]
    assert output.candidate_order.tolist() == [[1, 3, 5, 7, 0, 2, 4, 6]]


def test_a_text_that_is_too_long_is_cut_before_its_end(draw, lively_mllm, processor):
    visual, codes = lively_mllm.visual, draw(candidates=2).candidate_codes
    length = visual.config.text_config.max_position_embeddings
    texts = ["red " * 40, "a circle"]
    inputs = processor.ranking_inputs(texts)
    assert inputs["input_ids"].shape[1] > length
    cut = text_tower_inputs(lively_mllm, processor, texts, truncate=True)
    first, second = processor.text_ids(texts)
    assert cut["input_ids"][0].tolist() == [*first[: length - 1], processor.tokenizer.eos_token_id]
    assert cut["input_ids"][1, : len(second)].tolist() == second and cut["attention_mask"][1].sum() == len(second)
    with pytest.raises(ValueError, match=f"text 0 has {len(first)} tokens; the text tower reads {length}"):
        text_tower_inputs(lively_mllm, processor, texts)
    assert torch.equal(score_drawings(visual, codes, **inputs), score_drawings(visual, codes, **cut))


def test_the_models_own_number_of_candidates_counts_where_there_is_a_text(draw, lively_mllm, processor):
    expected = draw(candidates=3)
    lively_mllm.set_image_generation(candidates=3)
    assert torch.equal(draw().candidate_scores, expected.candidate_scores)
    assert draw(candidates=1).scores is None
    inputs = processor(text=TEXTS, generation_mode="image")
    without = {name: value for name, value in inputs.items() if not name.startswith("ranking_")}
    codes = lively_mllm.generate(**without, generation_mode="image", seed=3)
    assert torch.equal(codes, expected.candidate_codes[:, 0])


def test_edits_are_ranked_by_a_description_alone(lively_mllm, processor, picture):
    def inputs(**options):
        return {**processor(images=str(picture), text="make it red", generation_mode="edit", **options), "seed": 0}

    asked = {"generation_mode": "image", "candidates": 3, "return_dict_in_generate": True}
    with pytest.raises(ValueError, match="needs ranking_input_ids.* describe the result in ranking_text"):
        lively_mllm.generate(**inputs(), **asked)
    output = lively_mllm.generate(**inputs(ranking_text="a red circle"), **asked)
    texts = processor.ranking_inputs(["a red circle"])
    scores = score_drawings(lively_mllm.visual, output.candidate_codes, **texts)
    assert torch.equal(output.candidate_scores, scores)
    assert len(pictures_of(lively_mllm, processor, output.codes)) == 1


def test_a_conversation_is_ranked_by_what_the_user_asked_last(processor):
    chat = [
        {"role": "user", "content": "a blue circle"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [{"type": "text", "text": "a red"}, {"type": "text", "text": " <image> circle"}]},
    ]
    options = {"tokenize": True, "return_dict": True, "processor_kwargs": {"generation_mode": "image"}}
    ids = processor.apply_chat_template(chat, **options)["ranking_input_ids"]
    assert ids.tolist() == processor.text_ids(["a red <image> circle"])
    chat = [{"role": "user", "content": [{"type": "image", "image": torch.zeros(3, 48, 48)}]}, chat[0]]
    options["sanitize_control_tokens"] = False  # or the picture's place would be text
    assert "ranking_input_ids" not in processor.apply_chat_template(chat, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"candidates": 0}, "candidates must be an integer of at least 1, got 0"),
        ({"candidates": 2.5}, "candidates must be an integer of at least 1, got 2.5"),
        ({"candidates": 2, "num_return_sequences": 3}, r"at least num_return_sequences \(3\), got 2"),
        ({"candidates": 2, "num_positions": 4}, "ranked as whole images: num_positions must be None, got 4"),
        ({"candidates": 2, "ranking_input_ids": torch.tensor([[1, 2]])}, "Got 1 texts to rank by, but 2 prompts"),
        (
            {"candidates": 2, "ranking_input_ids": torch.tensor([[1, 5]] * 2)},
            "reads the ids of another text tokenizer",
        ),
    ],
)
def test_what_cannot_be_ranked_is_refused(lively_mllm, processor, options, message):
    inputs = {**processor(text=TEXTS, generation_mode="image"), **options}
    with pytest.raises(ValueError, match=message):
        lively_mllm.generate(**inputs, generation_mode="image")


def test_a_model_without_a_text_tower_says_so_before_it_draws(draw, lively_mllm):
    def drawn(codes):
        raise AssertionError("something was drawn")

    lively_mllm.visual.config.text_config = lively_mllm.visual.text_model = None
    with pytest.raises(ValueError, match="has no text tower"):
        draw(candidates=2, streamer=type("Streamer", (), {"put": staticmethod(drawn), "end": lambda self: None})())
    assert draw().scores is None


def test_stopped_candidates_are_not_ranked(draw):
    output = draw(candidates=3, stopping_criteria=[lambda codes, scores: torch.ones(len(codes), dtype=torch.bool)])
    assert output.codes.shape[0] == 2 and output.codes.shape[-1] == 1 and output.scores is None


@pytest.mark.parametrize("mode", [None, "text", "interleaved"])
def test_a_text_to_rank_by_is_for_drawings(processor, mode):
    with pytest.raises(ValueError, match="ranking_text is for drawings and edits"):
        processor(text="a red circle", generation_mode=mode, ranking_text="red")
