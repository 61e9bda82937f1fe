"""Every public class on every kind of folder: it loads what the folder holds, or raises an error that says why not."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    CLIPImageProcessor,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from unitok_mllm import (
    UniTokConfig,
    UniTokDepthConfig,
    UniTokImageProcessor,
    UniTokImageProcessorPil,
    UniTokMLLMConfig,
    UniTokMLLMForConditionalGeneration,
    UniTokMLLMProcessor,
    UniTokModel,
    UniTokVisionConfig,
    UniTokVisionModel,
)


HELD = {  # by folder: the parts in it, as attributes of the model that it was saved from
    "mllm": {UniTokMLLMForConditionalGeneration: "", UniTokModel: "visual", UniTokVisionModel: "visual.vision_model"},
    "tokenizer": {UniTokModel: "", UniTokVisionModel: "vision_model"},
    "tower": {UniTokVisionModel: ""},
    "llava": {UniTokVisionModel: "model.vision_tower"},
    "foreign": {},
}


@pytest.fixture
def folder_and_model(request, mllm, llama_config, tmp_path):
    kind = request.param
    visual = mllm.visual
    config = LlavaConfig(
        vision_config=visual.config.vision_config,
        text_config=llama_config,
        image_token_index=5,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    if kind == "llava":
        model = LlavaForConditionalGeneration(config)
    else:
        models = {"mllm": mllm, "tokenizer": visual, "tower": visual.vision_model}
        model = models[kind] if kind in models else LlamaForCausalLM(llama_config)
    model.save_pretrained(tmp_path)
    return tmp_path, model


@pytest.mark.parametrize("model_class", [UniTokMLLMForConditionalGeneration, UniTokModel, UniTokVisionModel])
@pytest.mark.parametrize(("folder_and_model", "kind"), [(kind, kind) for kind in HELD], indirect=["folder_and_model"])
def test_a_model_has_the_weights_of_the_folder_or_there_is_an_error(folder_and_model, kind, model_class, tmp_path):
    folder, model = folder_and_model
    if model_class not in HELD[kind]:
        with pytest.raises(ValueError, match=f"none of type '{model_class.config_class.model_type}' in it"):
            model_class.from_pretrained(folder)
        with pytest.raises(ValueError, match="has a model of type"):
            model_class.config_class.from_pretrained(folder)
        return
    loaded, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    expected = model.get_submodule(HELD[kind][model_class])
    assert type(loaded) is model_class is type(expected)
    assert loaded.config.to_diff_dict().keys() >= {"model_type"}
    assert loaded.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    loaded.save_pretrained(tmp_path / "again")  # what was a part is saved as a whole
    again, info = model_class.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("folder_and_model", "auto_class"),
    [("mllm", AutoModelForMultimodalLM), ("tower", AutoModel), ("llava", AutoModelForImageTextToText)],
    indirect=["folder_and_model"],
)
def test_an_auto_class_gives_the_model_that_was_saved(folder_and_model, auto_class):
    folder, model = folder_and_model
    loaded = auto_class.from_pretrained(folder)
    assert type(loaded) is type(model)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("folder_and_model", ["mllm"], indirect=True)
def test_a_config_is_that_of_the_folder_at_any_depth(folder_and_model):
    folder, model = folder_and_model
    for config_class, config in (
        (UniTokMLLMConfig, model.config),
        (UniTokConfig, model.config.visual_config),
        (UniTokVisionConfig, model.config.visual_config.vision_config),
        (UniTokDepthConfig, model.config.depth_config),
    ):
        loaded = config_class.from_pretrained(folder).to_dict()
        for name in config_class.__annotations__:
            if not name.endswith("config"):
                value = config.to_dict()[name]
                assert loaded[name] == (list(value) if isinstance(value, tuple) else value), name


@pytest.mark.parametrize("folder_and_model", ["mllm", "tower"], indirect=True)
def test_a_folder_that_lacks_weights_is_an_error_that_names_them(folder_and_model):
    folder, model = folder_and_model
    state = model.state_dict()
    lost = next(name for name in state if name.endswith("quant_proj.proj.weight"))
    del state[lost]
    model.save_pretrained(folder, state_dict=state)
    with pytest.raises(
        ValueError, match=rf"lacks 1 of the \d+ weights of a {type(model).__name__}, {lost} among them"
    ):
        type(model).from_pretrained(folder)


@pytest.mark.parametrize(
    "any_class",
    [UniTokMLLMForConditionalGeneration, UniTokModel, UniTokVisionModel, UniTokConfig, UniTokMLLMProcessor]
    + [UniTokImageProcessor, UniTokImageProcessorPil, AutoModel, AutoModelForImageTextToText],
)
def test_an_empty_folder_is_an_error(any_class, tmp_path):
    with pytest.raises((OSError, ValueError)):
        any_class.from_pretrained(tmp_path)


@pytest.mark.parametrize("image_class", [UniTokImageProcessor, UniTokImageProcessorPil])
def test_an_image_processor_is_that_of_the_folder_or_there_is_an_error(image_class, processor, tmp_path):
    processor.image_processor.mode = "classify"
    processor.save_pretrained(tmp_path / "mllm")
    processor.image_processor.save_pretrained(tmp_path / "tokenizer")
    for name in ("mllm", "tokenizer"):
        loaded = image_class.from_pretrained(tmp_path / name)
        assert loaded.mode == "classify" and loaded.size == processor.image_processor.size
    CLIPImageProcessor().save_pretrained(tmp_path / "foreign")
    with pytest.raises(ValueError, match="holds a CLIPImageProcessor"):
        image_class.from_pretrained(tmp_path / "foreign")
