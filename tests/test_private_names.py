"""Private names of other libraries that are used here: after an upgrade, a test names those that are gone."""

import argparse
import ast
import importlib.util
import inspect
import os
from collections import namedtuple
from pathlib import Path

import accelerate.hooks
import pytest
import torch
from datasets import Dataset
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    core_model_loading,
)
from transformers.integrations import WandbCallback
from transformers.utils import chat_template_utils

from training.mllm_trainer import MLLMTrainer
from unitok_mllm import (
    UniTokImageProcessor,
    UniTokImageProcessorPil,
    UniTokMLLMForConditionalGeneration,
    UniTokMLLMProcessor,
)
from unitok_mllm.modeling_unitok import UniTokPreTrainedModel


ROOT = Path(__file__).parents[1]
ATEN, ONEDNN = torch.ops.aten, torch.ops.mkldnn
# The name, and something of the library's that has it.
ATTRIBUTES = {
    "_CONTROL_TOKEN_END": lambda: chat_template_utils,
    "_CONTROL_TOKEN_START": lambda: chat_template_utils,
    "_actions": argparse.ArgumentParser,
    "_attn_implementation": LlamaConfig,
    "_can_compile_fullgraph": lambda: LlamaModel,
    "_compiled_call_impl": lambda: torch.nn.Module,
    "_exit": lambda: os,
    "_fingerprint": lambda: Dataset.from_dict({"a": [1]}),
    "_forward_hooks": torch.nn.Module,
    "_forward_pre_hooks": torch.nn.Module,
    "_foreach_lerp_": lambda: torch,
    "_from_config": lambda: PreTrainedModel,
    "_from_model_config": GenerationConfig,
    "_get_default_generation_params": lambda: GenerationConfig,
    "_is_mkldnn_bf16_supported": lambda: ONEDNN,
    "_linear_pointwise": lambda: ONEDNN,
    "_modules": torch.nn.Module,
    "_name_or_path": LlamaConfig,
    "_no_split_modules": lambda: PreTrainedModel,
    "_prepare_generation_config": lambda: GenerationMixin,
    "_prepare_inputs": lambda: MLLMTrainer.__base__,
    "_reorder_linear_weight": lambda: ONEDNN,
    "_replace": lambda: namedtuple("Row", "a"),
    "_scaled_dot_product_flash_attention_for_cpu": lambda: ATEN,
    "_scaled_dot_product_flash_attention_for_cpu_backward": lambda: ATEN,
}
# Class attributes by which a model says what it can do, and fields of any config.
DECLARED = {
    PreTrainedModel: {
        "_keys_to_ignore_on_load_unexpected",
        "_no_split_modules",
        "_supports_attention_backend",
        "_supports_flash_attn",
        "_supports_flex_attn",
        "_supports_sdpa",
    },
    LlamaConfig: {"_attn_implementation_internal", "_experts_implementation_internal", "_name_or_path"},
}
# Asked for by name, or set by the library itself: its source has them.
IN_SOURCE = {
    "_hf_hook": accelerate.hooks.add_hook_to_module,
    "_queue": "gradio.blocks",  # slow to import
    "_tokenizer": PreTrainedTokenizerFast.backend_tokenizer.fget,
    "_wandb": WandbCallback,
    "_weight_conversions": core_model_loading,
}
# Private methods that a class here overrides; one that its base lost would never be called.
OVERRIDDEN = {
    UniTokMLLMForConditionalGeneration: {
        "_expand_inputs_for_generation",
        "_get_logits_processor",
        "_prepare_multimodal_encoder_kwargs_for_generation",
    },
    UniTokPreTrainedModel: {"_init_weights", "_load_pretrained_model"},
    UniTokMLLMProcessor: {"_check_special_mm_tokens", "_normalize_conversations"},
    UniTokImageProcessor: {"_preprocess", "_standardize_kwargs", "_validate_preprocess_kwargs"},
    UniTokImageProcessorPil: {"_prepare_image_like_inputs"},
    MLLMTrainer: {
        "_get_num_items_in_batch",
        "_get_train_sampler",
        "_issue_warnings_after_load",
        "_load_from_checkpoint",
        "_maybe_log_save_evaluate",
        "_save_checkpoint",
    },
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_private_name_is_still_there(name):
    assert hasattr(ATTRIBUTES[name](), name), f"{name} is gone: {users(name)}"


@pytest.mark.parametrize("name", IN_SOURCE)
def test_a_private_name_is_still_in_the_source(name):
    assert name in source(IN_SOURCE[name]), f"{name} is gone: {users(name)}"


def source(owner) -> str:
    """The source of a class or a function, or without an import that of a module, given by its name."""
    if not isinstance(owner, str):
        return inspect.getsource(owner)
    package, _, module = owner.partition(".")
    if (spec := importlib.util.find_spec(package)) is None:
        pytest.skip(f"{package} is not installed")
    return Path(spec.origin).with_name(f"{module}.py").read_text(encoding="utf-8")


def users(name: str) -> str:
    files = [path for folder in ("unitok_mllm", "training", "eval") for path in (ROOT / folder).rglob("*.py")]
    return ", ".join(str(path.relative_to(ROOT)) for path in files if name in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("own", OVERRIDDEN, ids=lambda own: own.__name__)
def test_a_private_method_that_is_overridden_is_still_the_librarys(own):
    for name in OVERRIDDEN[own]:
        classes = [one for one in own.__mro__ if name in vars(one)]
        ours = [one for one in classes if one.__module__.startswith(("unitok_mllm", "training"))]
        assert ours and len(classes) > len(ours), f"{own.__name__}.{name} overrides nothing any more"


@pytest.mark.parametrize("owner", DECLARED, ids=lambda owner: owner.__name__)
def test_a_private_attribute_that_is_declared_is_still_the_librarys(owner):
    library = owner() if owner is LlamaConfig else owner
    assert {name for name in DECLARED[owner] if not hasattr(library, name)} == set()


def test_every_private_name_of_a_library_is_listed():
    """Names that a file uses and does not define itself, even if another file defines one of the same name."""
    private, strings = set(), set()
    for path in (path for folder in ("unitok_mllm", "training", "eval") for path in (ROOT / folder).rglob("*.py")):
        used, defined = set(), set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Attribute(attr=name, ctx=ast.Store(), value=ast.Name(id="self")):
                    defined.add(name)
                case ast.Attribute(attr=name) | ast.keyword(arg=str(name)):
                    used.add(name)
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                    defined.add(name)
                case ast.ClassDef(name=name):
                    defined.add(name)
                case ast.ImportFrom():
                    used.update(alias.name for alias in node.names)
                case ast.Constant(value=str(text)):
                    strings.add(text)
        private |= {name for name in used - defined if name.startswith("_") and not name.startswith("__")}
    own, listed = {"_check_room", "_common"}, ATTRIBUTES.keys() | IN_SOURCE.keys()
    assert private - own <= listed <= private | strings


OVERRIDING = [
    *(f"unitok_mllm.{name}" for name in "generation_unitok image_processing_unitok modeling_unitok".split()),
    *("unitok_mllm.modeling_unitok_mllm", "unitok_mllm.processing_unitok", "training.mllm_trainer"),
]


@pytest.mark.parametrize("module", OVERRIDING)
def test_every_private_method_or_attribute_that_is_overridden_is_listed(module):
    listed = set().union(*OVERRIDDEN.values(), *DECLARED.values())
    for _, own in inspect.getmembers(importlib.import_module(module), inspect.isclass):
        if own.__module__ == module:
            bases = [base for base in own.__mro__[1:] if not base.__module__.startswith(("unitok_mllm", "training"))]
            private = {name for name in vars(own) if name.startswith("_") and not name.startswith("__")}
            private.discard("_auto_class")  # the library sets it, see `registration`
            assert {name for name in private if any(name in vars(base) for base in bases)} <= listed, own


def test_weights_stay_as_they_are_where_torch_lost_the_operators_of_onednn(monkeypatch):
    from unitok_mllm import packing_unitok

    linear = torch.nn.Sequential(torch.nn.Linear(300, 300))
    assert packing_unitok.pack_linears(linear) is not linear
    monkeypatch.setattr(packing_unitok, "ONEDNN_OPERATORS", (*packing_unitok.ONEDNN_OPERATORS, "_gone"))
    assert packing_unitok.pack_linears(linear) is linear
