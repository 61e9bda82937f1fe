"""The contrastive loss of several accumulated batches together, as GradCache computes it (arXiv 2101.06983)."""

from collections.abc import Callable
from functools import partial

import torch

from training.checkpoints import random_state
from training.losses import contrastive_loss
from training.sharding import TrainedNetwork
from unitok_mllm.modeling_unitok import UniTokOutput


def whole_batch_contrastive(
    network: TrainedNetwork, batches: list[dict[str, torch.Tensor]]
) -> list[tuple[torch.Tensor, Callable[[UniTokOutput], torch.Tensor]]]:
    """Compute the contrastive loss of all accumulated batches together.

    A first pass without gradients embeds all batches. The gradients of the loss at these embeddings are then
    backpropagated in each batch's own pass.

    Args:
        network: the tokenizer.
        batches: batches of `pixel_values` and `input_ids`, on the network's device.

    Returns:
        For each batch, the random state of its pass, and a function of the pass's output that returns the loss of
        the whole step with the gradient of this batch's share.
    """
    device = batches[0]["pixel_values"].device
    states, outputs = [], []
    with torch.no_grad():
        for batch in batches:
            states.append(random_state(device))
            outputs.append(network.wrapped(batch["pixel_values"], batch["input_ids"], with_reconstruction=False))
    embeds = [torch.cat([output[name] for output in outputs]) for name in ("image_embeds", "text_embeds")]
    inputs = [value.float().requires_grad_() for value in (*embeds, outputs[0].logit_scale)]
    with torch.enable_grad():
        loss = contrastive_loss(*inputs)
        *gradients, of_scale = torch.autograd.grad(loss, inputs)
    loss = loss.detach()

    def share(index: int, output: UniTokOutput) -> torch.Tensor:
        images, texts = (gradient.chunk(len(batches))[index] for gradient in gradients)
        products = (images * output.image_embeds.float()).sum() + (texts * output.text_embeds.float()).sum()
        product = len(batches) * products + (of_scale * output.logit_scale.float()).sum()
        return loss + (product - product.detach())

    return [(state, partial(share, index)) for index, state in enumerate(states)]
