"""The library's common tests of models and configs on the towers, the tokenizer, the backbone and the MLLM."""

import unittest

import torch
from transformers.testing_utils import require_torch, torch_device

from unitok_mllm import (
    UniTokConfig,
    UniTokDepthConfig,
    UniTokMLLMConfig,
    UniTokMLLMForConditionalGeneration,
    UniTokMLLMModel,
    UniTokModel,
    UniTokVisionConfig,
    UniTokVisionModel,
)

from ...generation.test_utils import GenerationTesterMixin
from ...test_configuration_common import ConfigTester
from ...test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor


VISION = {
    "image_size": 32,
    "stem_width": 8,
    "stage_dims": (8, 16),
    "stage_depths": (1, 1),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_codebooks": 4,
    "codebook_size": 16,
    "quantizer_dim": 16,
    "projection_dim": 20,
}
CLIP = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "projection_dim": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "hidden_act": "gelu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def check_checkpointing(test, model_class, loss, without=()):
    """Same gradients with and without checkpointing, and every parameter has one."""
    config, inputs = test.model_tester.prepare_config_and_inputs_for_common()
    model = model_class(config).train()
    gradients = []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        loss(model(**inputs)).backward()
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        test.assertEqual(missing, list(without))
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


class UniTokVisionModelTester:
    def __init__(self, parent, batch_size=3, is_training=True):
        self.parent = parent
        self.batch_size = batch_size
        self.is_training = is_training
        self.image_size = VISION["image_size"]
        self.num_channels = 3
        self.patch_size = 16
        self.hidden_size = VISION["hidden_size"]
        self.num_hidden_layers = VISION["num_hidden_layers"]
        self.num_attention_heads = VISION["num_attention_heads"]
        self.seq_length = (self.image_size // 16) ** 2

    def get_config(self):
        return UniTokVisionConfig(**VISION)

    def prepare_config_and_inputs_for_common(self):
        pixel_values = floats_tensor([self.batch_size, 3, self.image_size, self.image_size]) * 2 - 1
        return self.get_config(), {"pixel_values": pixel_values}


@require_torch
class UniTokVisionModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (UniTokVisionModel,)
    test_resize_embeddings = False
    test_can_init_all_missing_weights_before_2023 = True  # no copyright line to read a year from
    has_attentions = False  # timm's blocks give none

    @unittest.skip("timm's blocks recompute by timm's own switch; see test_checkpointing_gradients")
    def test_gradient_checkpointing_enable_disable(self):
        pass

    def test_model_get_set_embeddings(self):  # as in every vision model's tests
        model = UniTokVisionModel(self.model_tester.get_config())
        self.assertIsInstance(model.get_input_embeddings(), torch.nn.Module)

    @unittest.skip("No loss: a tower")
    def test_training(self):
        pass

    @unittest.skip("No loss: a tower; see test_checkpointing_gradients")
    def test_training_gradient_checkpointing(self):
        pass

    @unittest.skip("No loss: a tower")
    def test_training_gradient_checkpointing_use_reentrant_false(self):
        pass

    @unittest.skip("No loss: a tower")
    def test_training_gradient_checkpointing_use_reentrant_true(self):
        pass

    def test_checkpointing_gradients(self):
        check_checkpointing(
            self,
            UniTokVisionModel,
            lambda output: output.last_hidden_state.square().mean() + output.pooler_output.mean(),
            without=["quantizer.codebooks"],  # straight-through
        )

    def setUp(self):
        self.model_tester = UniTokVisionModelTester(self)
        self.config_tester = ConfigTester(self, config_class=UniTokVisionConfig, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()


class UniTokModelTester(UniTokVisionModelTester):
    """With a text tower, as the released checkpoints have it."""

    def __init__(self, parent, **kwargs):
        super().__init__(parent, **kwargs)
        self.text_seq_length = 7

    def get_config(self):
        return UniTokConfig(vision_config=dict(VISION), text_config=dict(CLIP))

    def prepare_config_and_inputs_for_common(self):
        pixel_values = floats_tensor([self.batch_size, 3, self.image_size, self.image_size]) * 2 - 1
        input_ids = ids_tensor([self.batch_size, self.text_seq_length], CLIP["vocab_size"] - 3) + 3
        input_ids[:, -1] = 2
        return self.get_config(), {
            "pixel_values": pixel_values,
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
        }


@require_torch
class UniTokModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (UniTokModel,)
    test_resize_embeddings = False
    test_can_init_all_missing_weights_before_2023 = True
    has_attentions = False

    @unittest.skip(
        "The library has no initialisation for a CLIP text tower's missing weights in a model of custom code"
    )
    def test_can_init_all_missing_weights(self):
        pass

    def test_model_get_set_embeddings(self):
        model = UniTokModel(self.model_tester.get_config())
        self.assertIsInstance(model.get_input_embeddings(), torch.nn.Module)

    @unittest.skip("No `loss`: several named losses; see test_checkpointing_gradients")
    def test_training(self):
        pass

    @unittest.skip("No `loss`")
    def test_training_gradient_checkpointing(self):
        pass

    @unittest.skip("No `loss`")
    def test_training_gradient_checkpointing_use_reentrant_false(self):
        pass

    @unittest.skip("No `loss`")
    def test_training_gradient_checkpointing_use_reentrant_true(self):
        pass

    @unittest.skip("A tokenizer has no `hidden_states` of its own")
    def test_hidden_states_output(self):
        pass

    @unittest.skip("A tokenizer has no `hidden_states` of its own")
    def test_retain_grad_hidden_states_attentions(self):
        pass

    def test_checkpointing_gradients(self):
        def loss(output):
            return (
                output.reconstruction.square().mean()
                + output.vq_loss
                + (output.image_embeds @ output.text_embeds.T * output.logit_scale).square().mean()
            )

        check_checkpointing(self, UniTokModel, loss)

    _is_composite = True
    additional_model_inputs = ["input_ids", "attention_mask"]

    def setUp(self):
        self.model_tester = UniTokModelTester(self)
        self.config_tester = ConfigTester(self, config_class=UniTokConfig, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()


class UniTokMLLMModelTester:
    def __init__(self, parent, batch_size=3, seq_length=13, is_training=True):
        self.parent = parent
        self.batch_size = batch_size
        self.seq_length = seq_length
        self.is_training = is_training
        self.pad_token_id, self.boi_token_id, self.eoi_token_id, self.image_token_id = 0, 3, 4, 5
        self.num_image_tokens = (VISION["image_size"] // 16) ** 2
        self.image_size = VISION["image_size"]
        self.num_channels = 3
        self.vocab_size = LLAMA["vocab_size"]
        self.hidden_size = LLAMA["hidden_size"]
        self.num_hidden_layers = LLAMA["num_hidden_layers"]
        self.num_attention_heads = LLAMA["num_attention_heads"]

    def get_config(self):
        return UniTokMLLMConfig(
            text_config=dict(LLAMA),
            visual_config={"vision_config": dict(VISION), "text_config": dict(CLIP)},
            depth_config={"num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 3},
            embedder_dim=20,
            embedder_heads=2,
            boi_token_id=self.boi_token_id,
            eoi_token_id=self.eoi_token_id,
            image_token_id=self.image_token_id,
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        pixel_values = floats_tensor([self.batch_size, 3, self.image_size, self.image_size]) * 2 - 1
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 30) + 6
        input_ids[:, 0] = self.boi_token_id
        input_ids[:, 1 : 1 + self.num_image_tokens] = self.image_token_id
        input_ids[:, 1 + self.num_image_tokens] = self.eoi_token_id
        return config, {
            "pixel_values": pixel_values,
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids).to(torch_device),
            "labels": input_ids,
        }


class UniTokMLLMTests:
    """What the tests of the backbone and of the whole MLLM share."""

    skip_test_image_features_output_shape = True  # it looks for the width in `vision_config`, which is deeper here
    _is_composite = True
    additional_model_inputs = ["pixel_values"]
    test_can_init_all_missing_weights_before_2023 = True

    model_tester_class = None

    def setUp(self):
        # the SDPA tests fill a smaller batch up to 7 with rows that have no placeholders
        batch_size = 7 if "matches_sdpa_inference" in self._testMethodName else 3
        self.model_tester = (self.model_tester_class or UniTokMLLMModelTester)(self, batch_size=batch_size)
        if "generate" in self._testMethodName or "assisted" in self._testMethodName:
            self.model_tester.image_token_id = 120  # beyond the vocabulary, so that it cannot be an answer
        if "raining" not in self._testMethodName:  # with labels there is no cache
            whole = self.model_tester.prepare_config_and_inputs_for_common

            def without_labels():
                config, inputs = whole()
                inputs.pop("labels", None)
                return config, inputs

            self.model_tester.prepare_config_and_inputs_for_common = without_labels
        self.config_tester = ConfigTester(self, config_class=UniTokMLLMConfig, has_text_modality=False)

    def test_inputs_embeds(self):  # as in every vision-language model's tests: images go with ids
        whole = self.model_tester.prepare_config_and_inputs_for_common

        def text_alone():
            config, inputs = whole()
            inputs.pop("pixel_values", None)
            inputs["input_ids"][inputs["input_ids"] == self.model_tester.image_token_id] = 40
            return config, inputs

        self.model_tester.prepare_config_and_inputs_for_common = text_alone
        super().test_inputs_embeds()

    def test_config(self):
        self.config_tester.run_common_tests()

    @unittest.skip(
        "The library has no initialisation for a CLIP text tower's missing weights in a model of custom code"
    )
    def test_can_init_all_missing_weights(self):
        pass

    @unittest.skip("The tower's encoder (timm's ViTamin) gives no attention weights, and says so when asked for them")
    def test_get_image_features_attentions(self):
        pass


@require_torch
class UniTokMLLMModelTest(UniTokMLLMTests, ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (UniTokMLLMForConditionalGeneration,)


@require_torch
class UniTokBackboneTest(UniTokMLLMTests, ModelTesterMixin, unittest.TestCase):
    """The model without its heads."""

    all_model_classes = (UniTokMLLMModel,)
    all_generative_model_classes = ()

    def setUp(self):
        super().setUp()
        with_labels = self.model_tester.prepare_config_and_inputs_for_common

        def without_labels():
            config, inputs = with_labels()
            inputs.pop("labels", None)
            return config, inputs

        self.model_tester.prepare_config_and_inputs_for_common = without_labels

    @unittest.skip("No loss: a backbone")
    def test_training(self):
        pass

    test_training_gradient_checkpointing = test_training_gradient_checkpointing_use_reentrant_false = test_training
    test_training_gradient_checkpointing_use_reentrant_true = test_training


class UniTokTextTester(UniTokMLLMModelTester):
    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        del inputs["pixel_values"]
        inputs["input_ids"] = inputs["labels"] = (
            ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 30) + 6
        )
        return config, inputs


@unittest.skip("The texts have no images")
def no_images(self):
    pass


class UniTokMLLMTextTest(UniTokMLLMModelTest):
    """Texts without images."""

    test_get_image_features_output_0 = test_get_image_features_output_1 = test_get_image_features_output_2 = no_images
    test_get_image_features_hidden_states = test_get_image_features_pooler_output = no_images

    model_tester_class = UniTokTextTester
    has_attentions = False


class UniTokTiedTester(UniTokMLLMModelTester):
    """An LLM whose output layer is its embeddings, as many small ones have it."""

    def get_config(self):
        config = super().get_config().to_dict()
        config["text_config"]["tie_word_embeddings"] = True
        return UniTokMLLMConfig(**config)


class UniTokMLLMTiedTest(UniTokMLLMModelTest):
    model_tester_class = UniTokTiedTester


class UniTokDepthConfigTest(unittest.TestCase):
    def test_config(self):
        self.model_tester = None
        ConfigTester(
            self, config_class=UniTokDepthConfig, has_text_modality=False, hidden_size=24, num_attention_heads=3
        ).run_common_tests()
