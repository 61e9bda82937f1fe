"""Comparison of a few real training steps on this machine with their prediction."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
from torch import nn

from training.planning.counting import count_parameters, measure, without_values
from training.planning.trainings import mllm_batch, mllm_loss, tokenizer_batch, tokenizer_loss
from unitok_mllm import UniTokConfig, UniTokMLLMConfig, UniTokMLLMForConditionalGeneration, UniTokModel
from unitok_mllm.inference import SHIPPED_MODEL


def gemm_flops(size: int = 1536, runs: int = 10) -> float:
    """Measure the FLOP/s of this machine's fp32 matrix product: the best of several runs."""
    matrix, times = torch.rand(size, size), []
    for _ in range(runs):
        start = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


@dataclass
class Check:
    """A few real training steps (fp32, AdamW), compared with their prediction.

    Attributes:
        model: name of the model.
        batch: samples per step.
        predicted_flops: FLOPs of one step, counted on tensors without values.
        counted_flops: FLOPs of one real step.
        seconds: median duration of a step, from the forward pass to the optimizer.
        achieved_flops: FLOP/s of the steps.
        mfu: `achieved_flops` as a share of the FLOP/s of this machine's matrix product.
        predicted_states: MiB of weights, gradients and moments.
        measured_growth: MiB by which the process's memory grew.
    """

    model: str
    batch: int
    predicted_flops: float
    counted_flops: float
    seconds: float
    achieved_flops: float
    mfu: float
    predicted_states: float
    measured_growth: float


def check_training(
    name: str,
    build: Callable[[], nn.Module],
    abstract_loss: Callable[[nn.Module, dict], torch.Tensor],
    real_loss: Callable[[nn.Module, dict], torch.Tensor],
    make_inputs: Callable[[int], dict],
    batch: int,
    steps: int,
) -> Check:
    """Predict the cost of a model's training step, run the step, and compare.

    Args:
        name: name of the model.
        build: function that builds the model.
        abstract_loss: function that computes the loss of a batch on a model without values.
        real_loss: function that computes it on a real model.
        make_inputs: function that makes a batch of a given number of samples.
        batch: samples per step.
        steps: number of timed steps, after one that is not timed.
    """
    inputs = make_inputs(batch)
    abstract = without_values(build).train()
    predicted = measure(lambda: abstract_loss(abstract, inputs), abstract, 1)
    total, trainable = count_parameters(abstract)
    before = psutil.Process().memory_info().rss
    model = build().train()
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)

    def train_step(inputs: dict) -> float:
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=False)
        real_loss(model, inputs).backward()
        optimizer.step()
        return time.perf_counter() - start

    train_step(make_inputs(1))  # hardly any activations
    growth = psutil.Process().memory_info().rss - before
    times = [train_step(inputs) for _ in range(steps + 1)][1:]
    counted = measure(lambda: real_loss(model, inputs), model, 1)
    seconds, flops = statistics.median(times), predicted.forward + predicted.backward
    return Check(
        model=name,
        batch=batch,
        predicted_flops=flops,
        counted_flops=counted.forward + counted.backward,
        seconds=seconds,
        achieved_flops=flops / seconds,
        mfu=flops / seconds / gemm_flops(),
        predicted_states=(16 * trainable + 4 * (total - trainable)) / 2**20,
        measured_growth=growth / 2**20,
    )


def run_check(name: str, batch: int, steps: int) -> Check:
    """Run the check for the tiny "tokenizer" or for an "mllm" of the shipped model's sizes, both with new weights."""
    if name == "tokenizer":
        config = UniTokConfig.preset("tiny")
        return check_training(
            "tokenizer, tiny",
            lambda: UniTokModel(config),
            tokenizer_loss,
            tokenizer_loss,
            lambda size: tokenizer_batch(config, size),
            batch,
            steps,
        )
    mllm_config = UniTokMLLMConfig.from_pretrained(SHIPPED_MODEL)
    return check_training(
        "MLLM, tiny",
        lambda: UniTokMLLMForConditionalGeneration(mllm_config),
        mllm_loss,
        lambda model, inputs: model(**inputs).loss,
        lambda size: mllm_batch(mllm_config, size, text_length=46, images=1, drawn=1),
        batch,
        steps,
    )
