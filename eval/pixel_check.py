"""The pixel check: does a drawn shape fill its bounding box as the true shape does?

The judge (`eval.judge`) always names a shape, however it wobbles. A rectangle fills all of its box, a circle pi / 4, a
triangle half. Pixels blur these shares: among the first 1500 pictures of easy-VQA's train split they are 1.00 for all 454
rectangles, 0.79 to 0.87 for 455 circles, and 0.52 to 0.63 for 425 triangles. `FILLS` are the limits.
"""

import torch

from training.easy_vqa import COLORS, RGB, SHAPES


FILLS = {"circle": (0.70, 0.88), "rectangle": (0.88, 1.0), "triangle": (0.45, 0.67)}
SOLID = 0.75  # opacity that some pixel of a shape has
NOISE = 0.1  # opacity of the shape's colour below which a pixel is background


def filled_shares(pixels: torch.Tensor, colors: torch.Tensor) -> torch.Tensor:
    """Compute the share of a shape's bounding box that the shape fills.

    A pixel's share of the shape is its opacity between the background, which is the median of the border, and the shape's
    colour. The box's sides are sums of the largest opacities of the rows and of the columns, so that blurred edges count by
    what is left of them.

    Args:
        pixels: images, (N, 3, H, W) in [-1, 1].
        colors: indices of the shapes' colours in COLORS, (N,).

    Returns:
        (N,), float32; 0 where no pixel has the colour. At most 1 but for rounding.
    """
    rgb = torch.tensor([RGB[color] for color in COLORS], dtype=torch.float32) / 127.5 - 1
    border = torch.cat([pixels[:, :, [0, -1]].flatten(2), pixels[:, :, :, [0, -1]].flatten(2)], dim=2)
    background, color = border.median(dim=2).values[:, :, None, None], rgb[colors][:, :, None, None]
    difference = color - background
    opacity = ((pixels - background) * difference).sum(1) / difference.square().sum(1).clamp_min(1e-6)
    opacity = ((opacity - NOISE) / (1 - 2 * NOISE)).clamp(0, 1)  # (N, H, W)
    height, width = (opacity.amax(dim=dim).sum(dim=1) for dim in (2, 1))
    shares = opacity.sum(dim=(1, 2)) / (height * width).clamp_min(1e-6)
    return shares.where(opacity.amax(dim=(1, 2)) > SOLID, 0)


def check_shapes(pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Compute the share of images that pass the check.

    Args:
        pixels: images, (N, 3, H, W) in [-1, 1].
        labels: indices into COLORS and SHAPES, (N, 2).

    Returns:
        `all`, and each shape by name if there are images of it, in [0, 1]. Empty without images.
    """
    if not len(pixels):
        return {}
    shares = filled_shares(pixels, labels[:, 0])
    limits = torch.tensor([FILLS[shape] for shape in SHAPES])[labels[:, 1]]
    passed = ((limits[:, 0] <= shares) & (shares <= limits[:, 1] + 1e-4)).float()
    found = {shape: passed[labels[:, 1] == i] for i, shape in enumerate(SHAPES)}
    return {"all": passed.mean().item()} | {shape: of.mean().item() for shape, of in found.items() if len(of)}
