"""The tiny configurations, models and tokenizers that all tests share. Sizes differ (K, V, L, dims) so that a mixed-up
axis cannot go unnoticed."""

import asyncio
import copy
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.utils import logging
from web_runs import collect

from training.release import save_release
from training.text_tokenizer import train_text_tokenizer
from unitok_mllm import (
    UniTokConfig,
    UniTokImageProcessor,
    UniTokMLLMForConditionalGeneration,
    UniTokMLLMProcessor,
    UniTokModel,
)
from unitok_mllm.serving import UniTokEngine
from unitok_mllm.shared_engine import running
from unitok_mllm.web_model import SharedModel


sys.path.insert(0, str(Path(__file__).parent))  # reference_weights

FIXTURES = Path(__file__).parent / "fixtures"
IMAGE_SIZE = 48  # 3 x 3 positions
THREADS = torch.get_num_threads()

# Who starts the tests in the background or under nohup has them ignore signals, which scripts then do too, by design.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _same_start(request):
    """One seed, the library's warnings on (the command line turns them off), and one thread: on tiny tensors several
    are slower, many times so on a busy machine."""
    set_seed(0)
    logging.set_verbosity_warning()
    torch.set_num_threads(THREADS if request.node.get_closest_marker("slow") else 1)


@pytest.fixture
def fresh_accelerator() -> None:
    """No accelerator of another test."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def tokenizer_config() -> UniTokConfig:
    return UniTokConfig(
        vision_config={
            "image_size": IMAGE_SIZE,
            "stem_width": 8,
            "stage_dims": (8, 16),
            "stage_depths": (1, 2),
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_codebooks": 4,
            "codebook_size": 32,
            "quantizer_dim": 24,
            "projection_dim": 20,
        },
        text_config={
            "vocab_size": 300,
            "hidden_size": 32,
            "intermediate_size": 64,
            "projection_dim": 20,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
            "hidden_act": "gelu",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    )


@pytest.fixture
def visual_tokenizer(tokenizer_config) -> UniTokModel:
    return UniTokModel(tokenizer_config).eval()


@pytest.fixture(scope="session")
def text_tokenizer() -> PreTrainedTokenizerFast:
    return train_text_tokenizer(["what is the blue shape? a red circle", "USER: ASSISTANT: yes no"], vocab_size=300)


@pytest.fixture
def processor(text_tokenizer) -> UniTokMLLMProcessor:
    image_processor = UniTokImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    own = copy.deepcopy(text_tokenizer)  # tests may add tokens
    return UniTokMLLMProcessor(image_processor, own, boi_token="<boi>", eoi_token="<eoi>")


@pytest.fixture
def llama_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


@pytest.fixture
def mllm(llama_config, visual_tokenizer, processor) -> UniTokMLLMForConditionalGeneration:
    return UniTokMLLMForConditionalGeneration.from_parts(
        LlamaForCausalLM(llama_config),
        visual_tokenizer,
        depth_config={"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 3},
        embedder_dim=40,
        embedder_heads=2,
        **processor.config_token_ids() | {"image_prompt_ids": None, "unconditional_prompt_ids": None},
    ).eval()


def enliven(model: torch.nn.Module, factor: float = 5) -> torch.nn.Module:
    """Multiplies the freshly drawn matrices around the tokenizer, so that outputs depend visibly on every input."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and not name.startswith("visual."):
                parameter.mul_(factor)
    return model


@pytest.fixture
def lively_mllm(mllm) -> UniTokMLLMForConditionalGeneration:
    return enliven(mllm)


@pytest.fixture
def saved_mllm(tmp_path, lively_mllm, processor) -> Path:
    """The folder of an MLLM and its processor."""
    lively_mllm.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def picture(tmp_path) -> Path:
    """A file of noise, 40x30."""
    path = tmp_path / "picture.png"
    Image.effect_noise((40, 30), 90).convert("RGB").save(path)
    return path


@pytest.fixture
def images() -> torch.Tensor:
    """Four different images, (4, 3, 48, 48) in [-1, 1]."""
    return torch.rand(4, 3, IMAGE_SIZE, IMAGE_SIZE) * 2 - 1


def mirrored_and_shifted(pixels: torch.Tensor) -> dict[tuple[bool, int, int], torch.Tensor]:
    """(3, H, W), plain and mirrored, moved by up to a pixel with its border repeated: by (mirrored, row, column)."""
    height, width = pixels.shape[1:]
    views = {}
    for mirrored in (False, True):
        padded = torch.nn.functional.pad(pixels.flip(-1) if mirrored else pixels, (1, 1, 1, 1), mode="replicate")
        for y in range(3):
            for x in range(3):
                views[mirrored, y, x] = padded[:, y : y + height, x : x + width]
    return views


@pytest.fixture
def start(tmp_path, mllm, processor) -> Path:
    """A saved MLLM to train on."""
    save_release(enliven(mllm), processor, tmp_path / "start", torch.float32)
    return tmp_path / "start"


@pytest.fixture
def data(tmp_path) -> dict[str, dict]:
    """A source of each kind, by name."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()
    captions, conversations = [], []
    for i in range(8):
        picture = Image.fromarray(rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8))
        picture.save(folder / f"{i}.png")
        captions.append({"image": f"{i}.png", "caption": f"a red circle {i}"})
        turns = [{"from": "human", "value": "<image>\nwhat is this?"}, {"from": "gpt", "value": f"a blue shape {i}"}]
        conversations.append({"image": f"{i}.png", "conversations": turns})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions), encoding="utf-8")
    (folder / "conversations.json").write_text(json.dumps(conversations), encoding="utf-8")
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"what is red {i}"}) + "\n" for i in range(8)), encoding="utf-8"
    )
    return {
        "read": {"path": f"{folder}/conversations.json"},
        "caption": {"path": f"{folder}/captions.jsonl", "type": "captions"},
        "draw": {"path": f"{folder}/captions.jsonl", "type": "captions", "task": "draw"},
        "text": {"path": f"{folder}/text.jsonl", "type": "text"},
    }


@pytest.fixture
def shared(lively_mllm, processor) -> SharedModel:
    """A model that the web page's visitors share."""
    return SharedModel(UniTokEngine(lively_mllm, max_rows=2, max_length=256), processor)


@pytest.fixture
def run(shared) -> Iterator[Callable[[Coroutine], Any]]:
    """Run coroutines while the engine of `shared` works."""
    engine = running(shared.engine, drop=True)
    with asyncio.Runner() as runner:
        runner.run(engine.__aenter__())
        yield runner.run
        runner.run(engine.__aexit__(None, None, None))


@pytest.fixture
def shown(run) -> Callable[[AsyncIterator], list]:
    """What a visitor sees of an answer or a drawing."""
    return lambda items: [item for item in run(collect(items)) if not isinstance(item, int)]
