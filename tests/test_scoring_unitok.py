"""Log-likelihoods of given answers and images, against the model's own logits."""

import pytest
import torch
from PIL import Image
from transformers import MambaConfig, MambaForCausalLM

from training.data import SampleTexts
from unitok_mllm import UniTokMLLMForConditionalGeneration
from unitok_mllm.inference import answer_ids, choose_answers, conversation


CHOICES = ["red", "a blue circle", "what is the red shape? no"]
QUESTIONS = ["what is the shape?", "yes"]


@pytest.fixture
def pictures():
    return [Image.effect_noise((40, 30), sigma).convert("RGB") for sigma in (40, 90)]


@pytest.fixture
def asked(processor, pictures):
    """The two questions as a batch, padded on the left."""
    chats = [conversation(question, picture) for question, picture in zip(QUESTIONS, pictures)]
    inputs = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert 0 in inputs["attention_mask"]
    return inputs


def test_scores_of_answers_are_the_training_losses(lively_mllm, processor, pictures, asked):
    targets = answer_ids(processor, CHOICES).expand(2, -1, -1)
    scores = lively_mllm.score(**asked, target_ids=targets)
    texts, pixel_values = SampleTexts(processor, max_length=256), asked["pixel_values"]
    for i, (question, picture) in enumerate(zip(QUESTIONS, pictures)):
        for j, choice in enumerate(CHOICES):
            turns = conversation(question, picture) + [{"role": "assistant", "content": choice}]
            sample = texts.conversation(turns)
            ids, labels = sample["input_ids"][None], sample["labels"][None]
            with torch.no_grad():
                output = lively_mllm(input_ids=ids, labels=labels, pixel_values=pixel_values[i : i + 1])
            assert scores.num_targets[i, j] == output.num_text_targets
            assert -scores.means[i, j] == pytest.approx(output.text_loss.item(), rel=1e-4)
            expected = -output.text_loss * output.num_text_targets
            assert scores.log_likelihoods[i, j] == pytest.approx(expected.item(), rel=1e-4)
    assert len(set(scores.num_targets[0].tolist())) == 3


def test_scores_of_images_are_the_training_losses(lively_mllm, processor, images):
    lively_mllm.config.image_loss_z_weight = 0.0
    codes = lively_mllm.encode_images(images).view(2, 2, 4, 9)
    captions, texts = ["a red circle", "what is the blue shape?"], SampleTexts(processor, max_length=256)
    inputs = processor(text=captions, generation_mode="image")
    prompts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    scores = lively_mllm.score(**prompts, target_codes=codes)
    assert torch.equal(scores.num_targets, torch.full((2, 2), 4 * 9))
    for i, caption in enumerate(captions):
        sample = texts.drawing(caption)
        for j in range(2):
            inputs = {"input_ids": sample["input_ids"][None], "image_targets": sample["image_targets"]}
            with torch.no_grad():
                loss = lively_mllm(**inputs, image_codes=codes[i, j : j + 1]).image_loss
            assert -scores.means[i, j] == pytest.approx(loss.item(), rel=1e-4)


def test_a_batch_of_unequal_lengths_and_a_shared_prompt_change_nothing(lively_mllm, processor, asked):
    targets = answer_ids(processor, CHOICES)
    together = lively_mllm.score(**asked, target_ids=targets.expand(2, -1, -1)).log_likelihoods
    for i in range(2):
        own = asked["attention_mask"][i].bool()
        prompt = {"input_ids": asked["input_ids"][i : i + 1, own], "pixel_values": asked["pixel_values"][i : i + 1]}
        for j, target in enumerate(targets):
            alone = lively_mllm.score(**prompt, target_ids=target[target != -100][None, None]).log_likelihoods
            assert torch.allclose(alone[0, 0], together[i, j], rtol=1e-4)


def test_an_llm_with_a_state_runs_the_prompt_with_each_answer(visual_tokenizer, processor):
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    language_model = MambaForCausalLM(MambaConfig(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0))
    parts = {"embedder_dim": 40, "embedder_heads": 2, "depth_config": {"num_hidden_layers": 1, "hidden_size": 48}}
    parts["depth_config"]["num_attention_heads"] = 3
    model = UniTokMLLMForConditionalGeneration.from_parts(
        language_model, visual_tokenizer, **parts, **processor.config_token_ids()
    ).eval()
    prompt, targets = processor(text="what is the blue shape?")["input_ids"], answer_ids(processor, CHOICES)
    scores = model.score(prompt, target_ids=targets[None])
    for j, target in enumerate(targets):
        ids = torch.cat([prompt[0], target[target != -100]])[None]
        with torch.no_grad():
            output = model(input_ids=ids, labels=ids.masked_fill(torch.arange(ids.shape[1]) < prompt.shape[1], -100))
        assert -scores.means[0, j] == pytest.approx(output.text_loss.item(), rel=1e-4)


def test_the_likeliest_answer_is_chosen_by_the_sum_or_by_the_mean(lively_mllm, processor, pictures, asked):
    questions = list(zip(pictures, QUESTIONS))
    scores = lively_mllm.score(**asked, target_ids=answer_ids(processor, CHOICES).expand(2, -1, -1))
    for by_length, values in ((False, scores.log_likelihoods), (True, scores.means)):
        chosen, given = choose_answers(lively_mllm, processor, questions, CHOICES, by_length)
        assert torch.equal(given, values)
        assert chosen == [CHOICES[i] for i in values.argmax(dim=1)]
    assert not torch.equal(scores.log_likelihoods.argsort(), scores.means.argsort())


@pytest.mark.parametrize(
    "targets, message",
    [
        ({}, "exactly one of target_ids and target_codes"),
        ({"target_ids": torch.ones(1, 1, 2, dtype=torch.long)}, r"shape \(1, 1, 2\) for 2 prompts"),
        ({"target_ids": torch.ones(2, 2, dtype=torch.long)}, r"shape \(2, 2\) for 2 prompts"),
        ({"target_codes": torch.ones(2, 1, 4, 9, dtype=torch.long)}, "must end with the token that opens it"),
        ({"target_ids": torch.ones(2, 1, 300, dtype=torch.long)}, "The prompt is too long"),
    ],
)
def test_what_cannot_be_scored_is_refused(lively_mllm, asked, targets, message):
    with pytest.raises(ValueError, match=message):
        lively_mllm.score(**asked, **targets)


def test_a_placeholder_is_no_answer(lively_mllm, processor, asked):
    targets = torch.full((2, 1, 1), processor.image_token_id)
    with pytest.raises(ValueError, match="target_ids contain an image placeholder"):
        lively_mllm.score(**asked, target_ids=targets)


@pytest.mark.parametrize("answers", [[], ["red", " "]])
def test_an_empty_answer_is_no_choice(processor, answers):
    with pytest.raises(ValueError, match="expected at least one answer to choose from, and none empty"):
        answer_ids(processor, answers)
