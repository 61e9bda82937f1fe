"""Tests that need a CUDA device: recorded drawing steps, and agreement with the CPU's results."""

import threading

import numpy as np
import pytest
import torch
from original_checkpoints import FIXTURES, reference_state, tokenizer_checkpoint
from reference_weights import reference_image
from test_modeling_unitok_mllm import SAMPLES, gradients, make_batch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from training.losses import psnr
from unitok_mllm.convert_unitok import convert_tokenizer
from unitok_mllm.cuda_graph_unitok import UniTokCudaGraph, static_cache
from unitok_mllm.serving import UniTokEngine


pytestmark = pytest.mark.gpu
TEXTS = ["a red circle", "blue", "what is the yellow shape over there? a red circle"]
SHIPPED = "unitok_mllm/checkpoints/tiny"


@pytest.fixture(autouse=True)
def exact_float32():
    """No TF32, which would round the products of float32 numbers."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def draw(lively_mllm, processor, images):
    model = lively_mllm.to("cuda")

    def draw(edit=False, **options):
        pictures = {"images": [[image] for image in (images[:3] + 1) / 2]} if edit else {}
        inputs = processor(text=TEXTS, generation_mode="edit" if edit else "image", **pictures).to("cuda")
        return model.generate(**inputs, generation_mode="image", **{"seed": 0, **options})

    return draw


# --- recorded steps ---


def replay_counted(graphs):
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph):
        graphs.append(graph)
        replay(graph)

    return counted


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "guidance_scale": 5.0},
        {"guidance_scale": 3.0, "top_k": 5, "num_return_sequences": 2, "progress": True},
        {"temperature": 0.5, "top_p": 0.9, "seed": [5, 6, 7]},
        {"edit": True, "guidance_scale": 3.0, "image_guidance_scale": 1.5},
    ],
)
def test_recorded_steps_draw_what_launched_ones_do(monkeypatch, draw, options):
    graphs = []
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", replay_counted(graphs))
    recorded = draw(**options)
    assert len(graphs) == recorded.shape[-1] - 2  # all but the prompt's and the first step
    assert torch.equal(draw(**options, cuda_graph=False), recorded)
    assert torch.equal(draw(**options, use_cache=False), recorded)
    assert len(graphs) == recorded.shape[-1] - 2
    assert len(recorded.unique()) > 10


def test_the_engine_gives_each_request_the_same_with_and_without_recorded_steps(monkeypatch, lively_mllm, processor):
    """Its thread records while other threads use the device."""
    model, graphs = lively_mllm.to("cuda"), []
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", replay_counted(graphs))

    def served(cuda_graph: bool) -> list[torch.Tensor]:
        engine = UniTokEngine(model, max_rows=5, max_length=200, prefill_tokens=16, cuda_graph=cuda_graph)
        futures = []
        for seed in range(6):
            text = TEXTS[seed % len(TEXTS)]
            drawing = processor(text=text, generation_mode="image")
            futures.append(engine.draw(drawing, seed=seed, guidance_scale=1.0 + seed % 3, temperature=0.8, top_k=5))
            futures.append(engine.answer(processor(text=text), seed=seed, max_new_tokens=12, do_sample=seed > 2))
        thread = threading.Thread(target=engine.run)
        thread.start()
        while thread.is_alive() and not futures[-1].done():
            model.decode_images(torch.zeros(1, *futures[0].result().shape, dtype=torch.long, device="cuda"))
        engine.stop()
        thread.join()
        return [future.result(0).cpu() for future in futures]

    recorded = served(cuda_graph=True)
    num_replays = len(graphs)
    launched = served(cuda_graph=False)
    assert num_replays > 50 and len(graphs) == num_replays
    assert all(map(torch.equal, recorded, launched))
    for seed in range(6):
        inputs = processor(text=TEXTS[seed % len(TEXTS)], generation_mode="image").to("cuda")
        options = {"seed": seed, "guidance_scale": 1.0 + seed % 3, "temperature": 0.8, "top_k": 5}
        assert torch.equal(model.generate_image_codes(**inputs, **options)[0].cpu(), recorded[2 * seed])


def test_what_cannot_be_recorded_is_launched_with_a_warning():
    def looks(numbers):
        return numbers * 2 if numbers.sum().item() > 0 else numbers

    graph, numbers = UniTokCudaGraph(looks), torch.ones(3, device="cuda")
    assert graph(numbers).tolist() == [2, 2, 2]
    with pytest.warns(UserWarning, match="No CUDA graph could be recorded"):
        assert graph(numbers + 1).tolist() == [4, 4, 4]
    assert graph(-numbers).tolist() == [-1, -1, -1]


def test_a_recorded_function_takes_new_values_and_returns_its_own_memory():
    total = torch.zeros(2, device="cuda")

    def add(numbers):
        return total.add_(numbers)

    graph = UniTokCudaGraph(add)
    outputs = [graph(torch.full((2,), float(n), device="cuda")) for n in (1, 10, 100)]
    assert [output.tolist() for output in outputs[1:]] == [[11, 11], [111, 111]]


def test_no_recording_where_weights_move(lively_mllm, tmp_path):
    assert static_cache(lively_mllm, 50) is None
    assert static_cache(lively_mllm.to("cuda"), 50).get_max_length() == 50
    lively_mllm.save_pretrained(tmp_path)
    split = type(lively_mllm).from_pretrained(tmp_path, device_map="auto", max_memory={0: 2**20, "cpu": 2**30})
    assert static_cache(split, 50) is None


# --- the same results as on a CPU, and as the original program's ---


def test_the_tokenizer_gives_the_originals_codes_and_pixels(tmp_path):
    name = "tokenizer_base_depth2"
    torch.save(tokenizer_checkpoint(reference_state(name), "vitamin_base"), tmp_path / "base.pth")
    convert_tokenizer(tmp_path / "base.pth", tmp_path / "base")
    model, recorded = AutoModel.from_pretrained(tmp_path / "base").to("cuda"), np.load(FIXTURES / f"{name}.npz")
    images = torch.from_numpy(np.stack([reference_image(256, seed) for seed in (0, 1)])).to("cuda")
    indices = torch.from_numpy(recorded["indices"].astype(np.int64)).to("cuda")
    with torch.no_grad():
        assert (model.encode(images) == indices).float().mean() > 0.999
        pixels = model.decode(indices)
        torch.testing.assert_close(
            pixels[:, :, ::4, ::4].cpu(), torch.from_numpy(recorded["reconstruction"]), rtol=0, atol=1e-3
        )
        rounded = model.to(torch.bfloat16)
        assert psnr(rounded.decode(indices).float(), pixels).min() > 30


def test_the_shipped_model_draws_as_on_a_cpu():
    processor = AutoProcessor.from_pretrained(SHIPPED)
    model = AutoModelForImageTextToText.from_pretrained(SHIPPED).eval()
    prompts = processor(text=["a red circle", "a blue triangle", "a teal rectangle"], generation_mode="image")
    options = {"generation_mode": "image", "do_sample": False, "guidance_scale": 2.0}
    codes = model.generate(**prompts, **options)
    pictures = model.decode_images(codes)
    model = model.to("cuda")
    assert (model.generate(**prompts.to("cuda"), **options).cpu() == codes).float().mean() > 0.99
    torch.testing.assert_close(model.decode_images(codes.to("cuda")).cpu(), pictures, rtol=0, atol=1e-3)
    model = model.to(torch.bfloat16)
    assert psnr(model.decode_images(codes.to("cuda")).float().cpu(), pictures).min() > 30
    drawn = model.generate(**prompts.to("cuda"), **options)
    assert torch.equal(drawn, model.generate(**prompts.to("cuda"), **options, cuda_graph=False))


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_gradients_are_those_of_a_cpu(lively_mllm, attention):
    batch = make_batch(SAMPLES)
    expected = {name: gradient.clone() for name, gradient in gradients(lively_mllm, batch).items()}
    model = lively_mllm.to("cuda")  # takes the gradients along
    model.language_model.set_attn_implementation(attention)
    for name, gradient in gradients(model, {key: value.to("cuda") for key, value in batch.items()}).items():
        torch.testing.assert_close(
            gradient.cpu(), expected[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_in_bfloat16_a_compiled_step_gives_the_gradients_of_an_eager_one(lively_mllm):
    model = lively_mllm.to("cuda")
    batch = {key: value.to("cuda") for key, value in make_batch(SAMPLES).items()}
    exact = gradients(model, batch)
    with torch.autocast("cuda", torch.bfloat16):
        eager = gradients(model, batch)
        model.compile()
        compiled = gradients(model, batch)
    for name, gradient in exact.items():
        for other in (eager[name], compiled[name]):
            assert (other - gradient).norm() < 0.1 * gradient.norm(), name
