"""The terms of the tokenizer's loss: values, gradients, and sums over processes."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.nn import functional as F
from transformers.initialization import no_init_weights

from training.losses import (
    TERMS,
    LossArguments,
    NearestRowLoss,
    adaptive_gan_weight,
    consistency_loss,
    contrastive_loss,
    discriminator_losses,
    psnr,
    tokenizer_losses,
)
from training.perceptual import FeatureDistance, FrozenFeatures, VGGDistance, perceptual_distance
from unitok_mllm.modeling_unitok import UniTokOutput


def test_psnr_of_a_known_error():
    pixels = torch.zeros(2, 3, 4, 4)
    reconstruction = torch.stack([pixels[0] + 0.2, pixels[1] - 3])  # the second is clamped to -1
    torch.testing.assert_close(psnr(reconstruction, pixels), torch.tensor([20.0, 10 * math.log10(4)]))
    assert psnr(pixels.double(), pixels.double()).tolist() == [100.0] * len(pixels)


def test_contrastive_loss_by_hand():
    images, texts = torch.eye(2), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # logits 2 * [[1, 0.6], [0, 0.8]]: rows are images, columns texts
    rows = (math.log(1 + math.exp(1.2 - 2)) + math.log(1 + math.exp(0 - 1.6))) / 2
    columns = (math.log(1 + math.exp(0 - 2)) + math.log(1 + math.exp(1.2 - 1.6))) / 2
    loss = contrastive_loss(images, texts, torch.tensor(2.0))
    assert loss.item() == pytest.approx((rows + columns) / 2, rel=1e-6)


@pytest.mark.parametrize("most", [1, 20, 2**22])
def test_the_contrastive_loss_in_chunks_is_open_clips(monkeypatch, most):
    import open_clip  # not at the top: the processes of other tests would import it too

    monkeypatch.setattr(NearestRowLoss, "MAX_SIMILARITIES", most)
    results = []
    for loss_of in (contrastive_loss, open_clip.ClipLoss()):
        torch.manual_seed(0)
        inputs = [torch.randn(7, 5, requires_grad=True) for _ in range(2)] + [torch.tensor(3.0, requires_grad=True)]
        loss = loss_of(*inputs)
        results.append([loss, *torch.autograd.grad(2 * loss, inputs)])
    torch.testing.assert_close(*results)


def test_consistency_loss_pulls_the_reconstruction_only():
    reconstruction = torch.tensor([[0.6, 0.8], [1.0, 0.0]], requires_grad=True)
    original = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    loss = consistency_loss(reconstruction, original)
    loss.backward()
    assert loss.item() == pytest.approx(1 - 0.3)
    torch.testing.assert_close(reconstruction.grad, -original.detach() / 2)
    assert original.grad is None


def test_every_term_counts_with_its_own_weight():
    pixels = torch.zeros(1, 3, 2, 2)
    output = UniTokOutput(
        reconstruction=torch.full_like(pixels, 0.5),
        vq_loss=torch.tensor(3.0),
        entropy_loss=torch.tensor(-2.0),
        image_embeds=torch.tensor([[1.0, 0.0]]),
        text_embeds=torch.tensor([[0.0, 1.0]]),
        logit_scale=torch.tensor(10.0),
        reconstruction_embeds=torch.tensor([[0.8, 0.6]]),
    )
    weights = {"l1": 1, "l2": 10, "perceptual": 100, "vq": 1e3, "entropy": 1e4, "contrastive": 1e5, "consistency": 1e6}
    total, values = tokenizer_losses(output, pixels, weights, perceptual=lambda a, b: (a - b).sum())
    expected = {"l1": 0.5, "l2": 0.25, "perceptual": 6, "vq": 3, "entropy": -2, "contrastive": 0, "consistency": 0.2}
    assert {name: value.item() for name, value in values.items()} == pytest.approx(expected)
    assert total.item() == pytest.approx(sum(weights[name] * value for name, value in expected.items()))


def test_weights_start_and_the_gan_grows():
    losses = LossArguments(l1_weight=0.2, perceptual_weight=2.0, perceptual_start=0.5, gan_weight=0.4)
    assert losses.weights(0.49)["perceptual"] == 0 and losses.weights(0.5)["perceptual"] == 2
    assert losses.weights(0)["l1"] == 0.2
    assert [losses.weights(p)["gan"] for p in (0, 0.375, 0.39, 0.405, 1)] == pytest.approx([0, 0, 0.2, 0.4, 0.4])
    assert losses.weights(0).keys() == set(TERMS)


def test_the_blur_fades_over_two_warm_ups_of_the_gan():
    losses = LossArguments(gan_weight=0.4)
    sigmas = [losses.blur_sigma(progress, 256) for progress in (0, 0.375, 0.39, 0.405, 0.42, 0.435, 1)]
    assert sigmas == pytest.approx([9.58, 9.58, 0.75 * 9.58, 0.5 * 9.58, 0.25 * 9.58, 0, 0])
    assert losses.blur_sigma(0.39, 64) == pytest.approx(0.75 * 9.58 / 4)
    assert LossArguments(gan_warmup=0.0).blur_sigma(0.375, 256) == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        *(
            ({f"{name}_weight": value}, f"{name}_weight .{value}. is not")
            for name in TERMS
            for value in (-1.0, math.nan)
        ),
        *(({f"{name}_start": value}, f"{name}_start .{value}. is not") for name in TERMS for value in (1.0, math.nan)),
        ({"gan_warmup": 1.5}, "gan_warmup .1.5. is not"),
        ({"gan_blur": -1.0}, "gan_blur .-1.0. is not"),
        ({"gan_consistency_weight": math.inf}, "gan_consistency_weight .inf. is not"),
        ({"discriminator_depths": []}, r"discriminator_depths must be .* got \[\]"),
        ({"discriminator_depths": [2, 5, 2]}, "discriminator_depths must be at least one depth, and all different"),
        ({"discriminator_depths": [-1]}, "discriminator_depths"),
        ({"l1_weight": None}, "l1_weight must be of type float, got None"),
        ({"l1_weight": "1"}, "l1_weight must be of type float, got '1'"),
        ({"perceptual_pretrained": 1}, "perceptual_pretrained must be of type bool, got 1"),
        ({"l1_weight": True}, "l1_weight must be of type float, got True"),
        ({f"{name}_weight": 0.0 for name in TERMS}, "All weights of the loss are 0"),
        ({"gan_weight": 1.0, "l1_weight": 0.0, "l2_weight": 0.0}, "l1, l2, perceptual, .* have no weight"),
        (
            {"consistency_weight": 0.5, "contrastive_weight": 0.0},
            "without the contrastive term all image embeddings may collapse",
        ),
        ({"consistency_weight": 0.5, "contrastive_start": 0.1}, "from 0.0 on, contrastive_weight 1.0 from 0.1 on"),
        ({"perceptual_checkpoint": "vgg.pth"}, "perceptual_checkpoint is vgg.pth, but perceptual_weight is 0"),
        ({"discriminator_checkpoint": "dino.pth"}, "discriminator_checkpoint is dino.pth, but gan_weight is 0"),
    ],
)
def test_losses_that_cannot_be_meant_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        LossArguments(**wrong)


@pytest.mark.parametrize(("gan_scale", "expected"), [(2, 2.5), (1e9, 0.015), (1e-9, 1e4)])
def test_adaptive_weight_is_the_clamped_ratio_of_gradient_norms(gan_scale, expected):
    last_layer = nn.Conv2d(1, 1, 1)
    inputs = torch.tensor([3.0, 4.0]).view(1, 1, 1, 2).requires_grad_()
    reconstruction_gradient = inputs.detach() / 5  # that of the weight is 9 / 5 + 16 / 5
    gan_gradient = gan_scale * torch.tensor([1 / 3, 0]).view_as(inputs)  # and 1
    weight = adaptive_gan_weight(reconstruction_gradient, gan_gradient, inputs, last_layer)
    assert weight.item() == pytest.approx(expected) and not weight.requires_grad


def test_adaptive_weight_is_that_of_autograd_at_the_weight():
    last_layer, inputs, other = nn.Conv2d(4, 3, 3, padding=1), torch.randn(2, 4, 6, 6), torch.randn(2, 3, 6, 6)
    output = last_layer(inputs)
    losses = (output - other).abs().mean(), (output * other).mean()
    norms = [torch.autograd.grad(loss, last_layer.weight, retain_graph=True)[0].norm() for loss in losses]
    gradients = [torch.autograd.grad(loss, output, retain_graph=True)[0] for loss in losses]
    torch.testing.assert_close(adaptive_gan_weight(*gradients, inputs, last_layer), norms[0] / norms[1])


def test_discriminator_losses_by_hand():
    real, fake = torch.full((2, 3, 8, 8), 0.25), torch.full((2, 3, 8, 8), -0.5)
    draws = torch.full((2, 7), 0.5)  # contrast, saturation and brightness unchanged, no shift, the centre blanked
    draws[:, 0] = 0.75  # but 0.25 brighter
    hidden = 1 - 2 * 2 / 64  # cutout: a square of round(0.2 * 8) pixels
    total, values = discriminator_losses(lambda x: x.mean(dim=(1, 2, 3))[:, None], real, fake, draws, 4.0)
    real_logit, fake_logit = 0.5 * hidden, -0.25 * hidden
    hinge = (1 - real_logit) + (1 + fake_logit)
    consistency = (real_logit - 0.25) ** 2 + (fake_logit + 0.5) ** 2
    assert values["discriminator"].item() == pytest.approx(hinge)
    assert values["discriminator_consistency"].item() == pytest.approx(consistency, rel=1e-5)
    assert total.item() == pytest.approx(hinge + 4 * consistency)


def test_hinge_stops_beyond_the_margin():
    real, fake, draws = torch.ones(1, 3, 8, 8), -torch.ones(1, 3, 8, 8), torch.full((1, 7), 0.5)
    _, values = discriminator_losses(lambda x: 5 * x.mean(dim=(1, 2, 3))[:, None], real, fake, draws, 0.0)
    assert values["discriminator"].item() == 0


def test_feature_distance_is_lpips_without_learned_weights(images):
    distance = perceptual_distance("test_resnet", 48, pretrained=False)
    assert isinstance(distance, FeatureDistance)
    others = images.flip(0)
    expected = 0
    with torch.no_grad():
        for a, b in zip(distance.features(images), distance.features(others)):
            cosine = F.cosine_similarity(a, b, dim=1)
            expected += (2 - 2 * cosine).mean()
    torch.testing.assert_close(distance(images, others), expected, rtol=1e-3, atol=1e-5)
    assert distance(images, images) == 0
    images.requires_grad_()
    distance(images, others).backward()
    assert images.grad.abs().sum() > 0 and all(p.grad is None for p in distance.parameters())


def test_frozen_features_load_a_file_and_stay_in_eval_mode(tmp_path):
    source = FrozenFeatures("test_resnet", 48, pretrained=False)
    torch.save(source.backbone.state_dict(), tmp_path / "weights.pth")
    loaded = FrozenFeatures("test_resnet", 48, checkpoint=str(tmp_path / "weights.pth")).train()
    pixels = torch.rand(1, 3, 48, 48)
    for a, b in zip(source(pixels), loaded(pixels), strict=True):
        torch.testing.assert_close(a, b)
    assert not any(module.training for module in loaded.modules())


def test_vgg_distance_is_lpips_with_the_weights_of_a_file(tmp_path, images):
    lpips = pytest.importorskip("lpips")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with no_init_weights():  # the initialisation of VGG's classifier takes seconds
        reference = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        for parameter in reference.net.parameters():
            parameter.copy_(0.05 * torch.randn_like(parameter))
        state = {f"features.{name.partition('.')[2]}": p for name, p in reference.net.state_dict().items()}
        torch.save(state, tmp_path / "vgg.pth")
        distance = VGGDistance(checkpoint=str(tmp_path / "vgg.pth"))
        with pytest.raises(ValueError, match=r"other.pth is not a VGG-16.*features.0.bias"):
            VGGDistance(checkpoint=str(tmp_path / "other.pth"))
    torch.testing.assert_close(distance(images, -images), reference(images, -images).mean())


def _distributed_terms(images: torch.Tensor, texts: torch.Tensor) -> list[torch.Tensor]:
    """The terms that compare processes: contrastive loss, its gradients, and the adaptive weight."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"image": nn.Linear(5, 4), "text": nn.Linear(6, 4)})
    model.scale = nn.Parameter(torch.tensor(7.0))
    embeds = F.normalize(model["image"](images), dim=1), F.normalize(model["text"](texts), dim=1)
    layer = nn.Conv2d(5, 4, 1)
    outputs = layer(images[:, :, None, None])
    gan_loss, l2_loss = outputs.mean(), outputs.square().mean()
    gradients = [torch.autograd.grad(loss, outputs, retain_graph=True)[0] for loss in (l2_loss, gan_loss)]
    weight = adaptive_gan_weight(*gradients, images[:, :, None, None], layer)
    loss = contrastive_loss(*embeds, model.scale)
    loss.backward()
    return [loss.detach(), weight, *[parameter.grad for parameter in model.parameters()]]


def _process(rank: int, folder: str, images: torch.Tensor, texts: torch.Tensor) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = _distributed_terms(images.chunk(2)[rank], texts.chunk(2)[rank])
    for result in results:  # what DistributedDataParallel does with gradients
        dist.all_reduce(result)
        result /= 2
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path):
    images, texts = torch.randn(6, 5), torch.randn(6, 6)
    expected = _distributed_terms(images, texts)
    multiprocessing.start_processes(_process, (str(tmp_path), images, texts), nprocs=2, start_method="forkserver")
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected)
    assert all(gradient.abs().sum() > 1e-3 for gradient in expected)
