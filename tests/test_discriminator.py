"""The discriminator of the tokenizer's training: its features, its heads, and what is refused."""

import pytest
import torch

from training.augment import blur, diff_augment, draw_augmentation
from training.discriminator import FeatureDiscriminator
from training.losses import LossArguments
from training.perceptual import FrozenFeatures


DEPTHS = (0, 2, 5)
SIZE = 64  # 4 x 4 patches


@pytest.fixture
def discriminator() -> FeatureDiscriminator:
    return FeatureDiscriminator(FrozenFeatures("test_vit", SIZE, DEPTHS, pretrained=False))


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.rand(2, 3, SIZE, SIZE) * 2 - 1


def test_features_are_the_blocks_outputs_with_the_class_token_added(discriminator, pictures):
    features = discriminator.features
    backbone = features.backbone
    mean, std = (torch.tensor(backbone.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    hidden_states = backbone.patch_embed((pictures / 2 + 0.5 - mean) / std)
    hidden_states = backbone.norm_pre(backbone._pos_embed(hidden_states))
    for depth, block in enumerate(backbone.blocks):
        hidden_states = block(hidden_states)
        if depth in DEPTHS:
            expected = (hidden_states[:, 1:] + hidden_states[:, :1]).transpose(1, 2)
            torch.testing.assert_close(features(pictures)[DEPTHS.index(depth)], expected)


def test_logits_depend_on_each_depth_and_on_those_below_it(discriminator, pictures):
    before = discriminator(pictures).unflatten(1, (len(DEPTHS), -1))
    for number, depth in enumerate(DEPTHS):
        block = discriminator.features.backbone.blocks[depth]
        hook = block.register_forward_hook(lambda module, inputs, output: output + torch.randn_like(output))
        moved = (discriminator(pictures).unflatten(1, (len(DEPTHS), -1)) - before).abs().amax(dim=(0, 2))
        hook.remove()
        assert (moved[:number] == 0).all() and (moved[number:] > 1e-3).all(), depth


def test_a_head_sees_four_neighbours_around_a_circle(discriminator):
    head = discriminator.heads[0].eval()
    features = torch.randn(1, discriminator.features.channels[0], 20, requires_grad=True)
    head[1][1].register_forward_hook(lambda module, inputs, output: inputs[0])  # GroupNorm mixes all positions
    head[0][1].register_forward_hook(lambda module, inputs, output: inputs[0])
    head(features)[0, 0, 1].backward()
    seen = features.grad.abs().sum(dim=(0, 1)).nonzero().flatten().tolist()
    assert seen == [0, 1, 2, 3, 4, 5, 17, 18, 19]


def test_only_heads_learn_and_images_get_gradients(discriminator, pictures):
    pictures.requires_grad_()
    discriminator.train()(pictures).mean().backward()
    assert pictures.grad.abs().sum() > 0
    trained = {name for name, p in discriminator.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained and trained == {name for name, _ in discriminator.named_parameters() if name.startswith("heads.")}
    assert not discriminator.features.backbone.training


def test_a_transformer_sees_the_largest_multiple_of_its_patches():
    features = FrozenFeatures("test_vit", 70, (5,), pretrained=False)
    assert features(torch.zeros(1, 3, 70, 70))[0].shape[2] == 16  # 4 x 4 of 16 pixels, not 70 / 16
    with pytest.raises(ValueError, match="8 is below the patch size 16"):
        FrozenFeatures("test_vit", 8, (5,), pretrained=False)


def test_a_convolutional_backbone_works_too(pictures):
    discriminator = FeatureDiscriminator(FrozenFeatures("test_resnet", SIZE, (1, 2), pretrained=False))
    first, second = discriminator.features(pictures)
    assert discriminator(pictures).shape == (2, first.shape[2] + second.shape[2])
    assert (discriminator(pictures) - discriminator(-pictures)).abs().min() > 0


def test_colours_by_hand():
    images = torch.tensor([0.2, 0.4, 0.9]).view(1, 3, 1, 1).expand(1, 3, 16, 16).clone()
    images[:, :, :8] *= 2
    draws = torch.full((1, 7), 0.5)
    draws[:, :3] = torch.tensor([0.8, 0.25, 0.9])  # 0.3 brighter, half the saturation, 1.4 times the contrast
    mean = 0.75 + 0.3  # of a row of means 1.0 and a row of means 0.5
    expected = 0.5 + 0.3 + (torch.tensor([0.2, 0.4, 0.9]) - 0.5) * 0.5  # the lower half
    torch.testing.assert_close(diff_augment(images, draws)[0, :, -1, 0], mean + 1.4 * (expected - mean))


def test_shift_and_cutout_by_hand():
    images = torch.arange(1.0, 257).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    draws = torch.full((1, 7), 0.5)
    draws[:, 3:] = torch.tensor([0.0, 0.999, 0.25, 0.75])  # 2 of 16 pixels down and left; centre at (4, 12)
    expected = torch.zeros(16, 16)
    expected[2:, :-2] = images[0, 0, :-2, 2:]
    expected[3:6, 11:14] = 0  # round(0.2 * 16) = 3
    torch.testing.assert_close(diff_augment(images, draws)[0, 0], expected)


def test_images_are_shifted_before_their_colours_change_and_blanked_after_it():
    draws = torch.full((1, 7), 0.5)
    draws[:, 0], draws[:, 2], draws[:, 3] = 0.9, 0.0, 0.0  # 0.4 brighter, half the contrast, 2 of 16 rows down
    augmented = diff_augment(torch.ones(1, 3, 16, 16), draws)[0, 0]
    mean = 14 / 16 + 0.4
    expected = torch.tensor([(0.4 + mean) / 2, (1.4 + mean) / 2]).repeat_interleave(torch.tensor([2, 14]))
    expected = expected[:, None].repeat(1, 16)
    expected[7:10, 7:10] = 0
    torch.testing.assert_close(augmented, expected)


def test_augmentation_is_differentiable_and_the_same_for_the_same_draws(pictures):
    draws = draw_augmentation(2)
    pictures.requires_grad_()
    augmented = diff_augment(pictures, draws)
    torch.testing.assert_close(diff_augment(pictures, draws), augmented)
    assert not torch.allclose(diff_augment(pictures, draw_augmentation(2)), augmented)
    direction = torch.randn_like(pictures)
    augmented.backward(torch.ones_like(augmented))
    change = diff_augment(pictures.detach() + direction, draws).sum() - augmented.detach().sum()  # it is affine
    torch.testing.assert_close((pictures.grad * direction).sum(), change, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(("size", "sigma"), [(256, 9.58), (64, 9.58 / 4)])
def test_blur_spreads_by_its_sigma_in_both_directions(size, sigma):
    images = torch.zeros(1, 3, size, size)
    images[..., size // 2, size // 2] = 1
    blurred = blur(images, LossArguments().blur_sigma(0.375, size))[0, 0].double()
    offsets = (torch.arange(size) - size // 2).double()
    for weights in (blurred.sum(dim=0), blurred.sum(dim=1)):
        assert (weights @ offsets.square()).sqrt().item() == pytest.approx(sigma, rel=2e-3)


def test_blur_keeps_the_mean_and_fades_to_nothing():
    images = torch.zeros(1, 3, 33, 33)
    images[:, :, 16, 16] = 1
    blurred = blur(images, 2.0)
    assert blurred.sum().item() == pytest.approx(3, rel=1e-4)
    assert blurred[0, 0, 16, 16].item() == pytest.approx(1 / (2 * torch.pi * 4), rel=0.01)  # of a 2-D Gaussian
    assert blur(images, 0.0) is images
