"""The speed benchmark: the naive implementation agrees with the model, and counts agree with hand computations.

Nothing here is timed.
"""

import json
import subprocess
import sys

import psutil
import pytest
import torch
from conftest import enliven
from torch.nn import functional as F

from eval import speed
from eval.speed import run_job
from eval.timing import bounds, jobs, measuring, naive
from eval.timing.measuring import Job, Way, count, difference
from eval.timing.peers import BUILD, EMU3_CODES
from eval.timing.settings import PEERS, Settings
from eval.timing.subjects import Subject, pixels_of_photographs
from eval.timing.training_jobs import training_batch
from training.losses import psnr
from unitok_mllm import UniTokModel


pytestmark = pytest.mark.full


PEAKS = {"GEMM": 1e11, "bandwidth": 1e10}


@pytest.fixture
def settings() -> Settings:
    return Settings(device="cpu", batches=[1, 3], train_batches=[2], runs=1, naive=True)


@pytest.fixture
def folder(visual_tokenizer, tmp_path) -> str:
    """A tokenizer's folder."""
    visual_tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.fixture
def subject(lively_mllm) -> Subject:
    return Subject(lively_mllm.visual, lively_mllm)


@pytest.mark.parametrize("name", ["encode", "decode", "draw", "answer"])
@torch.no_grad()
def test_the_naive_way_gives_the_same_codes_pixels_and_tokens(name, subject, settings):
    all_jobs = list(jobs.JOBS[name](subject, settings))
    assert [job.batch for job in all_jobs] == ([1, 1, 3, 3] if name == "answer" else [1, 3])
    for job in all_jobs:
        fast, slow = job.fast.run(), job.naive.run()
        assert len(fast) == job.batch and fast.shape == slow.shape
        assert name == "answer" or fast.unique().numel() > 1
        assert difference(fast, slow) <= (1e-4 if name == "decode" else 0)


@pytest.mark.parametrize("name", ["train_tokenizer", "train_mllm"])
def test_the_naive_way_gives_the_same_losses_and_training_leaves_the_weights_alone(name, subject, settings):
    before = {key: value.clone() for key, value in subject.mllm.named_parameters()}
    for job in jobs.JOBS[name](subject, settings):
        loss = job.fast.run()
        assert loss > 0.5 and difference(loss, job.naive.run()) < 1e-5
        assert difference(loss, job.fast.run()) < 1e-6  # again, after two updates at a rate of 0
    assert all(torch.equal(value, before[key]) for key, value in subject.mllm.named_parameters())


def test_the_naive_quantizer_trains_alike(visual_tokenizer, images):
    ids = torch.randint(10, 300, (4, 16))
    ids[:, -1] = 2
    gradients = []
    for forward in (visual_tokenizer, lambda *args, **kw: naive.tokenizer_forward(visual_tokenizer, *args, **kw)):
        output = forward(images, input_ids=ids)
        similarity = output.logit_scale * output.image_embeds @ output.text_embeds.T
        (output.vq_loss + output.reconstruction.square().mean() + similarity.trace()).backward()
        gradients.append({n: p.grad.clone() for n, p in visual_tokenizer.named_parameters() if p.grad is not None})
        visual_tokenizer.zero_grad()
    assert gradients[0].keys() == gradients[1].keys() and "vision_model.quantizer.codebooks" in gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def flops(run, trained=None) -> int:
    return count(Way(run), trained, Settings(device="cpu")).flops


def test_flops_are_those_of_a_hand_computation():
    linear, pixels = torch.nn.Linear(3, 5), torch.rand(2, 3)
    assert flops(lambda: linear(pixels)) == 2 * 2 * 3 * 5
    assert flops(lambda: linear(pixels).sum().backward(), linear) == 2 * (2 * 2 * 3 * 5)  # and that of the weight
    if torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        call = torch.ops.mkldnn._linear_pointwise
        assert flops(lambda: call(pixels, packed, linear.bias, "none", [], "")) == 2 * 2 * 3 * 5
    query, key = torch.rand(1, 2, 4, 8), torch.rand(1, 2, 6, 8)
    assert flops(lambda: F.scaled_dot_product_attention(query, key, key)) == 2 * (2 * 2 * 4 * 6 * 8)
    conv, maps = torch.nn.Conv2d(4, 6, 3, padding=1), torch.rand(2, 4, 5, 7)
    assert flops(lambda: naive.upsample(conv, maps)) == 2 * 2 * (10 * 14) * 9 * 4 * 6
    depthwise, maps = torch.nn.Conv2d(4, 4, 3, padding=1, groups=4), torch.rand(1, 4, 5, 5, requires_grad=True)
    assert flops(lambda: depthwise(maps).sum().backward(), depthwise) == 3 * (2 * 25 * 9 * 4)


def test_flops_of_what_is_left_out_do_not_count():
    matrix = torch.rand(4, 4)
    way = Way(lambda: matrix @ matrix @ matrix, less=lambda: matrix @ matrix)
    assert count(way, None, Settings(device="cpu")).flops == 2 * 4**3


def test_naive_decoding_takes_more_arithmetic(visual_tokenizer):
    codes = torch.randint(32, (1, 4, 9))
    assert flops(lambda: naive.decode(visual_tokenizer, codes)) > 1.2 * flops(lambda: visual_tokenizer.decode(codes))


def test_bytes_of_weights_and_training():
    table, head = torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10, bias=False)
    head.weight = table.weight
    linear = torch.nn.Linear(3, 5)
    assert bounds.weight_bytes(table) == 0
    assert bounds.weight_bytes(table, head, head) == 10 * 4 * 4
    assert bounds.weight_bytes(linear.bfloat16()) == 2 * (3 * 5 + 5)
    assert bounds.train_bytes(linear.float()) == 10 * 4 * (3 * 5 + 5)


def test_what_autograd_keeps_is_counted_without_parameters():
    linear, inputs = torch.nn.Linear(3, 5), torch.rand(2, 3)
    assert count(Way(lambda: linear(inputs).sum().backward()), linear, Settings(device="cpu")).kept_bytes == 2 * 3 * 4


def test_bytes_of_drawing_and_answering_are_those_of_a_hand_computation(mllm):
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96 + 2 * 64  # q, keys and values of 2 heads, o, MLP, norms
    llm = 2 * layer + 64
    depth_layer = 4 * 48 * 48 + 3 * 48 * 192 + 2 * 48
    depth = 64 * 48 + 4 * (2 * depth_layer + 48 + 48 * 32 + 32)  # the layers once for each of 4 codes
    attention = 2 * 24 + 24 * 120 + 2 * 40 + 40 * 40 + 40 + 2 * 24 + 24 * 40 + 40
    geglu = 2 * 40 + (2 * 40) + 2 * (40 * 80 + 80) + 80 * 40 + 40
    embedder = attention + geglu + 2 * 40 + 40 * 64 + 64 + 64 * 64 + 64
    token = 2 * 2 * 2 * 16  # 2 layers' keys and values, 2 heads of 16 dims
    assert bounds.cache_bytes(mllm) == 4 * token
    drawing = 3 * (llm + depth) + 2 * embedder + 6 * (5 + 6) * token  # 3 positions, 6 rows, 5 tokens before them
    assert bounds.draw_bytes(mllm, 6, 5, 3) == 4 * drawing
    answering = 2 * (llm + 64 * 300) + 6 * (5 + 6) * token
    assert bounds.answer_bytes(mllm, 6, 5, 3) == 4 * answering


@pytest.mark.parametrize("mix, drawn", [("read", 0), ("half", 2), ("write", 4)])
@pytest.mark.parametrize("packed", [False, True])
def test_training_batches_hold_the_mix_and_their_targets(mllm, mix, drawn, packed):
    batch = training_batch(mllm.config, 4, mix, packed, "cpu")
    assert int(batch["image_targets"].sum()) == drawn and batch["image_codes"].shape == (4, 4, 9)
    assert int(batch["num_tokens"]) == 2 * (32 + 9 + 3) + 2 * (40 + 9 + 3)
    assert batch["input_ids"].shape == ((2, 2 * 52) if packed else (4, 52))  # like lengths together
    targets = 3 * drawn + 8 * (4 - drawn)  # boi, eoi and the last token, or the answer
    assert int((batch["labels"] != -100).sum()) == targets
    assert int((batch["input_ids"] == mllm.config.image_token_id).sum()) == 4 * 9


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_draws_the_codes_of_its_images(name, llama_config):
    build, drawing = BUILD[name]
    model, ids = build(llama_config).eval(), torch.randint(10, 300, (2, 6))
    codes = drawing(model, ids, 5, 3.0)()
    assert codes.shape == (2, 5) and torch.equal(drawing(model, ids, 5, 3.0)(), codes)
    first, last = {"janus": (0, 16384), "emu3": (300, 300 + EMU3_CODES)}[name]
    assert first <= codes.min() and codes.max() < last and codes.unique().numel() > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peer": ["dalle"]}, "no peer dalle: the peers are janus, emu3"),
        ({"peer": ["janus"]}, "peers have the LLM's size of the presets smollm2 and 7b, got tiny"),
    ],
    ids=str,
)
def test_a_peer_that_there_is_not_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Settings(device="cpu", **options)
    assert Settings(device="cpu", preset="smollm2", jobs=["draw"], peer=["janus"]).jobs == ["draw", "draw_janus"]


def test_a_training_batch_of_texts_is_all_targets(mllm):
    batch = training_batch(mllm.config, 4, "text", False, "cpu")
    assert "image_codes" not in batch and int((batch["labels"] != -100).sum()) == int(batch["num_tokens"])


def test_rows_hold_every_field_and_are_lines_of_json(folder, capsys):
    settings = Settings(model=folder, device="cpu", batches=[2], runs=2, naive=True)
    rows = run_job(settings, "decode", PEAKS)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    fast, slow = rows
    assert list(fast) == list(slow) == list(speed.FIELDS)
    assert (fast["job"], fast["batch"], fast["way"], slow["way"]) == ("decode", 2, "fast", "naive")
    assert fast["ratio"] is None and slow["equal"] is True and slow["difference"] < 1e-4
    assert slow["ratio"] == pytest.approx(slow["seconds"] / fast["seconds"], rel=1e-2)
    for row in rows:
        assert row["of_gemm"] == pytest.approx(row["flops"] / row["seconds"] / 1e11, rel=1e-2)
        assert row["of_bandwidth"] == pytest.approx(row["least_bytes"] / row["seconds"] / 1e10, rel=1e-2)
        assert row["throughput"] == pytest.approx(2 / row["seconds"], rel=1e-2)
        assert row["peak_mib"] > row["memory_mib"] >= 0 and row["runs"] == 2
    speed.show(rows)
    assert "decode, naive" in capsys.readouterr().err


def test_least_bytes_of_training_hold_what_autograd_keeps(folder):
    settings = Settings(model=folder, device="cpu", train_batches=[1, 2], runs=1)
    one, two = (row["least_bytes"] for row in run_job(settings, "train_tokenizer", PEAKS))
    weights = sum(p.numel() for p in UniTokModel.from_pretrained(folder).parameters())
    assert 40 * weights < one < two < 2 * one


def test_bfloat16_is_compared_with_float32_on_photographs(folder):
    settings = Settings(model=folder, device="cpu", batches=[1], runs=1, dtype="bfloat16")
    tokenizer = UniTokModel.from_pretrained(folder).eval()
    pixel_values = pixels_of_photographs(48)
    assert pixel_values.shape == (6, 3, 48, 48) and -1 <= pixel_values.min() < -0.9 and 0.9 < pixel_values.max() <= 1
    with torch.no_grad():
        codes = tokenizer.encode(pixel_values)
        pixels = tokenizer.decode(codes)
        tokenizer.bfloat16()
        share = (tokenizer.encode(pixel_values) == codes).float().mean().item()
        decibels = psnr(tokenizer.decode(codes), pixels).mean().item()
    (encoding,), (decoding,) = (run_job(settings, name, PEAKS) for name in ("encode", "decode"))
    assert encoding["codes_equal_to_fp32"] == pytest.approx(share, rel=1e-4) and 0.3 < share <= 1
    assert decoding["psnr_to_fp32"] == pytest.approx(decibels, rel=1e-4) and decibels > 25


def test_fewer_positions_are_drawn_and_the_row_says_so(mllm):
    enliven(mllm)
    (job,) = jobs.draw_jobs(Subject(mllm.visual, mllm), Settings(device="cpu", batches=[2], positions=3, naive=True))
    assert job.detail == "3 positions" and job.least_bytes == bounds.draw_bytes(mllm, 4, jobs.PROMPT_TOKENS, 3)
    with torch.no_grad():
        counted = count(job.fast, None, Settings(device="cpu"))
    assert counted.output.shape == (2, 4, 3)
    llm = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    depth = 64 * 48 + 4 * (2 * (4 * 48 * 48 + 3 * 48 * 192) + 48 * 32)
    products = 2 * 4 * ((jobs.PROMPT_TOKENS + 2) * llm + 3 * depth)  # of 2 prompts in 2 branches
    assert products < counted.flops < 1.25 * products  # attention and embedder come on top


def test_differences():
    codes = torch.tensor([[1, 2, 3, 4]])
    assert difference(codes, torch.tensor([[1, 2, 3, 5]])) == 0.25
    assert difference(torch.tensor([0.5, 1.0]), torch.tensor([0.5, 0.75])) == 0.25
    assert difference(torch.tensor(4.0), torch.tensor(5.0)) == 0.25


def test_median_and_best_of_the_runs_and_no_run_after_the_time_is_up(monkeypatch):
    times = iter([3.0, 1.0, 2.0] * 3)
    monkeypatch.setattr(measuring, "timed", lambda run, device: (next(times), run()))
    job = Job(Way(lambda: torch.ones(1)), 1, 1, "runs/s", counted=False)
    assert measuring.measure(job, True, Settings(device="cpu", runs=3))[0].seconds == 2.0
    job.best = True
    assert measuring.measure(job, True, Settings(device="cpu", runs=3))[0].seconds == 1.0
    (measured,) = measuring.measure(job, True, Settings(device="cpu", runs=3, seconds=3.5))
    assert (measured.runs, measured.seconds) == (2, 1.0)


def test_the_two_ways_are_timed_in_turn(monkeypatch):
    ran = []
    monkeypatch.setattr(measuring, "timed", lambda run, device: (float(len(ran)), run()))
    ways = [Way(lambda name=name: ran.append(name)) for name in ("fast", "naive")]
    job = Job(ways[0], 1, 1, "runs/s", naive=ways[1], counted=False)
    fast, slow = measuring.measure(job, True, Settings(device="cpu", runs=3))
    assert ran == ["fast", "naive"] * 3 and (fast.seconds, slow.seconds) == (2.0, 3.0)


@pytest.mark.parametrize(
    "arguments, error",
    [
        ("--preset huge", "preset is one of tiny, smollm2, large, 7b, got 'huge'"),
        ("--dtype float8", "dtype is one of float32, bfloat16, got 'float8'"),
        ("--jobs encode sing", "no job sing for tiny: its jobs are encode, decode, train_tokenizer, draw, "),
        (
            "--preset large --jobs draw",
            "no job draw for large: its jobs are encode, decode, train_tokenizer, load, import",
        ),
        ("--preset smollm2 --jobs encode", "no job encode for smollm2: its jobs are draw, draw_sampled, answer, "),
        ("--model nowhere", "no model in nowhere: it has no config.json"),
        ("--device tpu", "there is no device 'tpu' here; there is auto, cpu"),
        ("--batches 0", "batches must be at least 1, got [0]"),
        ("--positions -1", "seconds, positions and threads must be at least 0"),
    ],
)
def test_a_bad_command_line_ends_in_one_line_that_names_the_choices(arguments, error):
    with pytest.raises(SystemExit) as raised:
        speed.main(arguments.split())
    assert str(raised.value).startswith(f"error: {error}")


def test_importing_the_package_imports_no_heavy_library():
    package, *others = jobs.import_jobs(Settings(device="cpu"))
    heavy = "none of deepspeed, diffusers, lmms_eval, gradio, peft, datasets, open_clip, timm, wandb"
    assert package.describe(package.fast.run()) == f"imports {heavy}"
    assert [job.detail for job in others] == ["transformers alone", "torchvision alone"]
    assert jobs.import_in_fresh_process("import datasets") == ["datasets"]


@pytest.mark.slow
def test_no_job_outlives_a_killed_benchmark():
    arguments = [sys.executable, "-m", "eval.speed", "--jobs", "draw", "--runs", "1000", "--seconds", "1000"]
    parent = psutil.Popen([*arguments, "--device", "cpu", "--threads", "1"], stdout=subprocess.PIPE)
    assert b"peaks" in parent.stdout.readline()
    children = parent.children(recursive=True)
    assert children
    parent.kill()
    parent.wait()
    gone, alive = psutil.wait_procs(children, timeout=30)
    assert gone and not alive


@pytest.mark.parametrize("processes", ["one", pytest.param("its own", marks=pytest.mark.slow)])
def test_the_whole_program(processes, folder, tmp_path, capfd, monkeypatch):
    if processes == "one":  # each of its own imports torch and transformers anew
        monkeypatch.setattr(speed, "in_own_process", run_job)
    output = tmp_path / "out" / "speed.json"
    arguments = ["--model", folder, "--jobs", "encode", "--batches", "2", "--runs", "1", "--device", "cpu"]
    speed.main([*arguments, "--output", str(output), "--threads", "1"])
    printed = capfd.readouterr()
    result = json.loads(output.read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert result["benchmark"] == "speed" and result["rows"] == rows
    gemm, bandwidth, encode = rows
    assert (gemm["job"], gemm["detail"], gemm["flops"]) == ("peaks", "GEMM", 2 * 2048**3)
    assert (bandwidth["detail"], bandwidth["least_bytes"]) == ("bandwidth", 2**29)
    assert (encode["job"], encode["batch"], encode["threads"]) == ("encode", 2, 1)
    peak = gemm["flops"] / gemm["seconds"]
    assert encode["of_gemm"] == pytest.approx(encode["flops"] / encode["seconds"] / peak, rel=1e-2)
    assert "of bandwidth" in printed.err and "encode" in printed.err


def test_photographs_are_loaded_as_the_tokenizers_training_loads_them(settings):
    for job in jobs.load_jobs(settings):
        pixels = job.fast.run()
        assert pixels.shape == (job.amount, 3, 256, 256) and pixels.std() > 0.3
