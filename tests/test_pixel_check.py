"""The pixel check tells straight shapes from wobbly ones."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from eval.pixel_check import check_shapes, filled_shares
from training.easy_vqa import COLORS, RGB, SHAPES


def drawing(kind: str, points: list, color: str = "red") -> torch.Tensor:
    picture = Image.new("RGB", (64, 64), (240, 250, 230))
    getattr(ImageDraw.Draw(picture), kind)(points, fill=RGB[color])
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1


SHEAR = [(10, 10), (40, 16), (50, 40), (20, 34)]


@pytest.mark.parametrize(
    ("shape", "kind", "points", "share"),
    [
        ("rectangle", "rectangle", [(10, 20), (39, 29)], 1.0),
        ("rectangle", "polygon", SHEAR, 0.57),
        ("circle", "ellipse", [(10, 10), (40, 40)], 0.785),
        ("circle", "rectangle", [(10, 10), (40, 40)], 1.0),
        ("triangle", "polygon", [(10, 40), (40, 40), (25, 10)], 0.5),
        ("triangle", "ellipse", [(10, 10), (40, 40)], 0.785),
        ("circle", "rectangle", [(-9, -9), (-1, -1)], 0.0),
    ],
    ids=["rectangle", "skewed", "circle", "square", "triangle", "round", "empty"],
)
def test_a_shape_fills_its_box_as_it_should(shape, kind, points, share, request):
    pixels = drawing(kind, points)
    assert filled_shares(pixels, torch.tensor([COLORS.index("red")])).item() == pytest.approx(share, abs=0.04)
    labels = torch.tensor([[COLORS.index("red"), SHAPES.index(shape)]])
    is_right = request.node.callspec.id in SHAPES
    assert check_shapes(pixels, labels) == {"all": float(is_right), shape: float(is_right)}


def test_shares_of_a_batch_are_those_of_its_images_and_another_colour_is_no_shape():
    pixels = torch.cat([drawing("rectangle", [(10, 20), (39, 29)], color) for color in ("blue", "gray", "red")])
    pixels = torch.cat([pixels, drawing("polygon", SHEAR)])
    colors = torch.tensor([COLORS.index(color) for color in ("blue", "gray", "blue", "red")])
    shares = filled_shares(pixels, colors)
    assert torch.equal(shares, torch.cat([filled_shares(p[None], c[None]) for p, c in zip(pixels, colors)]))
    assert shares[:3].tolist() == pytest.approx([1, 1, 0]) and 0.5 < shares[3] < 0.6
    assert check_shapes(pixels[:0], torch.zeros(0, 2, dtype=torch.long)) == {}
