"""The engine: each request gets the same results as alone, whatever runs at the same time."""

import random
from collections.abc import Callable
from concurrent.futures import CancelledError
from functools import partial
from unittest import mock

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from eval.llm_families import join, tiny_llm
from unitok_mllm import engine_graphs, serving
from unitok_mllm.cuda_graph_unitok import UniTokCudaGraph
from unitok_mllm.serving import QueueFull, UniTokEngine


@pytest.fixture
def picture() -> Image.Image:
    return Image.new("RGB", (48, 48), "tomato")


def run(engine: UniTokEngine, steps: int | None = None) -> None:
    while engine.num_waiting or engine.num_running:
        engine.step()
        if steps is not None and (steps := steps - 1) == 0:
            return


WORDS = "a red circle and some blue what is this shape yes no".split()


def drawing_of(seed: int, processor, picture) -> tuple[dict, dict]:
    """Inputs and options of a drawing or an edit."""
    choose = random.Random(seed)
    text = " ".join(choose.choices(WORDS, k=choose.randint(1, 12)))
    if choose.random() < 0.3:
        inputs = processor(text=text, images=picture, generation_mode="edit")
    else:
        inputs = processor(text=text, generation_mode="image")
    options = {
        "guidance_scale": choose.choice([1.0, 2.0, 5.0]),
        "plausibility": choose.choice([0.0, 0.3]),
        "temperature": choose.choice([0.7, 1.0]),
        "top_k": choose.choice([0, 5]),
        "top_p": choose.choice([1.0, 0.9]),
        "do_sample": choose.random() < 0.8,
        "num_positions": choose.randint(1, 9),
        "seed": seed,
    }
    if "text_alone_input_ids" in inputs:
        options["image_guidance_scale"] = choose.choice([1.0, 1.5])
    return inputs, options


def question_of(seed: int, processor, picture) -> tuple[dict, dict]:
    choose = random.Random(seed)
    text = " ".join(choose.choices(WORDS, k=choose.randint(1, 12)))
    content = [{"type": "text", "text": text}]
    if choose.random() < 0.7:
        content.insert(0, {"type": "image", "image": picture})
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    options = {
        "max_new_tokens": choose.randint(1, 12),
        "do_sample": choose.random() < 0.5,
        "temperature": choose.choice([0.7, 1.3]),
        "repetition_penalty": choose.choice([1.0, 1.2]),
    }
    return inputs, options


def check_random_arrivals(engine: UniTokEngine, processor, picture, num_requests: int) -> None:
    """Let requests of all kinds arrive at random moments, cancel some, and compare the others with the model alone."""
    lively_mllm, max_rows = engine.model, engine.max_rows
    choose, futures, told = random.Random(0), {}, {}
    waiting = [(kind, seed) for kind in ("draw", "answer") for seed in range(num_requests)]
    choose.shuffle(waiting)
    while waiting or engine.num_waiting or engine.num_running:
        for _ in range(choose.randint(0, 3)):
            if waiting:
                kind, seed = waiting.pop()
                told[kind, seed] = []
                of_kind = drawing_of if kind == "draw" else question_of
                inputs, options = of_kind(seed, processor, picture)
                call = engine.draw if kind == "draw" else engine.answer
                options = options if kind == "draw" else options | {"seed": seed}
                futures[kind, seed] = call(inputs, told[kind, seed].append, **options)
        if choose.random() < 0.1:
            choose.choice(list(futures.values())).cancel()
        engine.step()
    cancelled = {request for request, future in futures.items() if future.cancelled()}
    assert 0 < len(cancelled) < num_requests and len(engine._free) == max_rows
    for kind, seed in futures.keys() - cancelled:
        result = futures[kind, seed].result(0)
        if kind == "draw":
            inputs, options = drawing_of(seed, processor, picture)
            (expected,) = lively_mllm.generate_image_codes(**inputs, **options)
        else:
            inputs, options = question_of(seed, processor, picture)
            torch.manual_seed(seed)
            expected = lively_mllm.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        assert torch.equal(result, expected), (kind, seed)
        assert torch.equal(torch.stack(told[kind, seed], dim=-1), expected)


@pytest.mark.parametrize("max_rows", [3, 16])
def test_each_request_gets_what_it_gets_alone(lively_mllm, processor, picture, max_rows):
    engine = UniTokEngine(lively_mllm, max_rows=max_rows, max_length=256, prefill_tokens=20)
    check_random_arrivals(engine, processor, picture, num_requests=20)


# --- recorded steps ---


class Operators(TorchDispatchMode):
    """Record the operators that run in this context, to run them again on the values that tensors have then."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **kwargs or {})
        if isinstance(output, bool | int | float):
            raise RuntimeError(f"{function} reads the values of a tensor.")
        self.calls.append((function, args, kwargs or {}, output))
        return output

    def run_again(self, inputs: dict[torch.Tensor, torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        """Run all with other inputs, and return what was `output` when they were recorded."""
        known = dict(inputs)

        def now(value):
            return tree_map(lambda leaf: known.get(leaf, leaf) if torch.is_tensor(leaf) else leaf, value)

        for function, args, kwargs, old in self.calls:
            new = function(*now(args), **now(kwargs))
            known.update((a, b) for a, b in zip(tree_leaves(old), tree_leaves(new)) if torch.is_tensor(a))
        return known[output]


class OperatorGraph(UniTokCudaGraph):
    """A CUDA graph's stand-in on a CPU: records the operators of a step, and replays them without its Python code.

    As in a CUDA graph, shapes and Python values are those of the recording, and reading a tensor's value is an error.
    """

    def _record(self, inputs: tuple[torch.Tensor, ...]) -> None:
        self.inputs, self.graph, self.num_replays = [tensor.clone() for tensor in inputs], self, 0
        with Operators() as self.operators, mock.patch("torch.compiler.is_compiling", lambda: True):
            self.recorded = self.function(*self.inputs)  # as on CUDA, no check of the codes

    def replay(self) -> None:
        self.output = self.operators.run_again(dict(zip(self.inputs, self.inputs)), self.recorded)
        self.num_replays += 1


@pytest.fixture
def recording_engine(monkeypatch, lively_mllm) -> Callable[..., UniTokEngine]:
    """Make engines whose steps are recorded, as on CUDA."""
    monkeypatch.setattr(serving, "can_record", lambda model: True)
    monkeypatch.setattr(engine_graphs, "UniTokCudaGraph", OperatorGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return partial(UniTokEngine, lively_mllm)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_recorded_steps_give_each_request_what_it_gets_alone(
    recording_engine, lively_mllm, processor, picture, attention
):
    lively_mllm.set_attn_implementation(attention)
    engine = recording_engine(max_rows=3, max_length=200, prefill_tokens=20)
    check_random_arrivals(engine, processor, picture, num_requests=8)
    graphs = engine._recorded.graphs
    assert {tuple(shape) for kind, *shape in graphs if kind == "llm"} <= {
        (n, end) for n in (1, 2, 4) for end in (64, 128, 200)
    }
    assert {key for key in graphs if key[0] != "llm"} <= {
        (kind, n) for kind in ("depth", "embedder") for n in (1, 2, 4)
    }
    num_replays = {key[0]: 0 for key in graphs}
    for (kind, *_), steps in graphs.items():
        num_replays[kind] += sum(step.num_replays for step in steps if step.graph is not None)
    assert len(num_replays) == 3 and all(num_replays.values())


def test_added_rows_of_recorded_steps_change_no_slot(recording_engine, processor):
    """Three rows run, in steps of four, while the fourth slot holds the prompt of an earlier question."""
    engine = recording_engine(max_rows=4, max_length=64)
    answers = [engine.answer(processor(text="yes no"), max_new_tokens=4, do_sample=False) for _ in range(4)]
    run(engine)
    inputs = processor(text="red", generation_mode="image")
    for seed in range(3):
        engine.draw(inputs, guidance_scale=1.0, seed=seed)
    engine.step()
    (free,) = engine._free
    memory = [memory for layer in engine._cache.layers for memory in (layer.keys, layer.values)]
    before = [slots[free].clone() for slots in memory]
    run(engine)
    assert ("llm", 4, 64) in engine._recorded.graphs
    assert all(torch.equal(slots[free], held) for slots, held in zip(memory, before))
    assert all(held.any() for held in before) and len({tuple(answer.result(0).tolist()) for answer in answers}) == 1


def test_no_steps_are_recorded_on_a_cpu_or_where_it_is_not_wanted(recording_engine, lively_mllm, monkeypatch):
    assert recording_engine(max_rows=2, cuda_graph=False)._recorded is None
    monkeypatch.undo()
    assert UniTokEngine(lively_mllm, max_rows=2)._recorded is None


# --- what requests share, and their order ---


def test_samples_of_one_seed_are_those_of_one_call(lively_mllm, processor):
    engine = UniTokEngine(lively_mllm, max_rows=8, max_length=64)
    inputs = processor(text="a red circle", generation_mode="image")
    futures = [engine.draw(inputs, sample=j, seed=3, guidance_scale=2.0) for j in range(3)]
    run(engine)
    expected = lively_mllm.generate_image_codes(**inputs, seed=3, guidance_scale=2.0, num_return_sequences=3)
    assert torch.equal(torch.stack([future.result() for future in futures]), expected)


@pytest.mark.parametrize("do_sample", [False, True])
def test_answers_with_images_are_those_of_generate(lively_mllm, processor, picture, do_sample):
    """The opening of an image is made likely, so that there are some."""
    options = {"max_new_tokens": 8, "do_sample": do_sample, "sequence_bias": [[[processor.boi_token_id], 6.0]]}
    image_options = {"guidance_scale": 2.0, "temperature": 0.8}
    engine = UniTokEngine(lively_mllm, max_rows=4, max_length=256)
    requests, futures, told = [], [], []
    for seed, text in enumerate(("draw red", "what is this blue", "yes")):
        requests.append(processor(text=text, generation_mode="interleaved"))
        told.append([])
        futures.append(
            engine.interleaved(
                requests[-1], told[-1].append, seed=seed, max_images=2, image_options=image_options, **options
            )
        )
    run(engine)
    num_images = 0
    for seed, (inputs, future) in enumerate(zip(requests, futures)):
        torch.manual_seed(seed)
        expected = lively_mllm.generate_interleaved(
            **inputs, max_images=2, image_options=image_options | {"seed": seed}, **options
        )
        ids, codes = future.result(0)
        assert torch.equal(ids, expected.sequences[0]) and torch.equal(codes, expected.image_codes[0])
        groups = torch.stack([item for item in told[seed] if item.ndim == 1], dim=-1)
        assert torch.equal(groups, torch.cat(list(codes), dim=-1))
        num_images += len(codes)
    assert num_images > 1


def test_a_cancelled_answer_with_images_leaves(lively_mllm, processor):
    engine = UniTokEngine(lively_mllm, max_rows=2, max_length=256)
    inputs = processor(text="red", generation_mode="interleaved")
    future = engine.interleaved(inputs, max_new_tokens=50, sequence_bias=[[[processor.boi_token_id], 60.0]])
    for _ in range(6):
        engine.step()
    assert engine.num_running == 1 and future.cancel()
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (0, 0)


def test_a_question_about_the_same_picture_goes_on_from_the_keys_of_another(lively_mllm, processor, picture):
    """Also while that other one is still running."""
    engine = UniTokEngine(lively_mllm, max_rows=3, max_length=256)
    futures, reused = [], []
    for text in ("what is this", "a blue shape", "a blue shape"):
        content = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        futures.append((inputs, engine.answer(inputs, max_new_tokens=5, do_sample=False)))
        engine.step()
        reused.append(engine.num_positions_reused)
    run(engine)
    first, second = (inputs["input_ids"][0] for inputs, _ in futures[:2])
    length = min(len(first), len(second))
    common = int((first[:length] == second[:length]).cumprod(0).sum())
    assert common > 9
    assert reused == [0, common, common + len(second) - 1]
    for inputs, future in futures:
        expected = lively_mllm.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert torch.equal(future.result(), expected[0, inputs["input_ids"].shape[1] :])


def test_a_long_prompt_does_not_hold_up_a_drawing(lively_mllm, processor):
    engine = UniTokEngine(lively_mllm, max_rows=4, max_length=256, prefill_tokens=16)
    groups = []
    engine.draw(processor(text="red", generation_mode="image"), groups.append, guidance_scale=1.0, seed=0)
    while not groups:
        engine.step()
    engine.answer(processor(text=" ".join(WORDS)), max_new_tokens=1)
    for _ in range(4):
        before = len(groups)
        engine.step()
        assert len(groups) == before + 1  # its next position, in each step that the prompt takes


def test_requests_are_admitted_in_order_and_a_cancelled_one_makes_room_at_once(lively_mllm, processor):
    engine = UniTokEngine(lively_mllm, max_rows=2, max_length=64, max_queue=2)
    inputs = processor(text="red", generation_mode="image")
    first, second = (engine.draw(inputs, guidance_scale=g, seed=0) for g in (2.0, 2.0))  # two rows each
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (1, 1)
    third = engine.draw(inputs, guidance_scale=1.0, seed=0)  # would fit, but came later
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        engine.draw(inputs, guidance_scale=1.0)
    assert first.cancel()
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (1, 1)
    run(engine)
    assert second.done() and third.done()
    with pytest.raises(CancelledError):
        first.result()


def test_what_can_never_run_is_refused(lively_mllm, processor):
    engine = UniTokEngine(lively_mllm, max_rows=1, max_length=60)
    inputs = processor(text="red", generation_mode="image")
    with pytest.raises(ValueError, match="needs 2 rows, but the batch has 1"):
        engine.draw(inputs, guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"needs \d+ positions, but a row has 60"):
        engine.answer(processor(text="red"), max_new_tokens=100)
    with pytest.raises(ValueError, match="no beam search"):
        engine.answer(processor(text="red"), num_beams=2, max_new_tokens=2)
    with pytest.raises(ValueError, match="top_k must be at least 0"):
        engine.draw(inputs, top_k=-1)
    with pytest.raises(ValueError, match="max_rows must be at least 1, got 0"):
        UniTokEngine(lively_mllm, max_rows=0)
    with pytest.raises(ValueError, match="max_length must be at most the LLM's 256 positions, got 257"):
        UniTokEngine(lively_mllm, max_length=257)
    engine.stop()
    with pytest.raises(QueueFull, match="stopping"):
        engine.draw(inputs, guidance_scale=1.0)


@pytest.mark.parametrize("family", ["mamba", "falcon_h1", "mistral", "bloom", "mpt"])
def test_an_llm_that_cannot_be_batched_gives_each_request_what_it_gets_alone(processor, picture, family):
    """A recurrent state, one beside keys and values, a sliding window, linear biases."""
    model = join(tiny_llm(family))
    engine = UniTokEngine(model, max_rows=4, max_length=256, prefill_tokens=4)
    assert not engine.is_batched
    requests = [(drawing_of, seed) for seed in range(4)] + [(question_of, seed) for seed in range(4)]
    futures = []
    for of_kind, seed in requests:
        inputs, options = of_kind(seed, processor, picture)
        call = engine.draw if of_kind is drawing_of else engine.answer
        futures.append(call(inputs, **options | {"seed": seed}))
        engine.step()
    run(engine)
    for (of_kind, seed), future in zip(requests, futures):
        inputs, options = of_kind(seed, processor, picture)
        if of_kind is drawing_of:
            (expected,) = model.generate_image_codes(**inputs, **options)
        else:
            torch.manual_seed(seed)
            expected = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        assert torch.equal(future.result(0), expected), (of_kind, seed)
    assert engine.num_positions_reused == 0


def test_an_answer_whose_images_do_not_fit_ends_in_an_error_and_holds_up_nobody(lively_mllm, processor):
    options = {"sequence_bias": [[[processor.boi_token_id], 60.0]], "max_new_tokens": 9, "max_images": 9}
    for sizes, guidance, message in (
        ({"max_rows": 1, "max_length": 256}, 2.0, "needs 2 rows, but the batch has 1"),
        ({"max_rows": 2, "max_length": 60}, 1.0, r"needs \d+ positions, but a row has 60"),
    ):
        engine = UniTokEngine(lively_mllm, **sizes)
        inputs = processor(text="red", generation_mode="interleaved")
        answer = engine.interleaved(inputs, image_options={"guidance_scale": guidance}, **options)
        drawing = engine.draw(processor(text="red", generation_mode="image"), guidance_scale=1.0)
        run(engine)
        with pytest.raises(ValueError, match=message):
            answer.result(0)
        assert drawing.result(0).shape == (4, 9)


def test_an_error_of_a_step_ends_what_runs_and_nothing_else(lively_mllm, processor, monkeypatch):
    engine = UniTokEngine(lively_mllm, max_rows=2, max_length=256)
    answer = engine.interleaved(processor(text="red", generation_mode="interleaved"), max_new_tokens=5)
    with monkeypatch.context() as patch:
        patch.setattr(lively_mllm.language_model.lm_head, "forward", lambda states: 1 / 0)
        engine.stop()
        engine.run()
    with pytest.raises(ZeroDivisionError):
        answer.result(0)


def test_a_stop_finishes_or_drops_what_was_submitted(lively_mllm, processor):
    inputs = processor(text="red", generation_mode="image")
    for drop in (False, True):
        engine = UniTokEngine(lively_mllm, max_rows=2, max_length=64)
        futures = [engine.draw(inputs, guidance_scale=2.0) for _ in range(2)]
        engine.step()
        engine.stop(drop)
        engine.run()
        assert [future.cancelled() for future in futures] == [drop] * 2
        assert (engine.num_running, engine.num_waiting) == (0, 0)
