"""Fréchet inception distance (https://arxiv.org/abs/1706.08500) of two sets of picture files, by one of two tools.

`torch-fidelity` scales pictures inside its Inception, as TensorFlow did; `clean-fid` (https://arxiv.org/abs/2104.11222)
scales them before, by Pillow's bicubic filter, which is how MJHQ-30K is measured. Their numbers differ.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor

from eval._common import weights_needed
from unitok_mllm.image_processing_unitok import load_image


TOOLS = {"torch-fidelity": "torch_fidelity", "clean-fid": "cleanfid"}  # and their modules
REFERENCE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LAYER = "2048"  # of torch-fidelity's Inception v3: the last pooling
CLEAN_WEIGHTS = "inception-2015-12-05.pt"  # under this name clean-fid looks for its Inception


def reference_pictures(folder: str) -> list[Path]:
    """List the pictures in a folder and its subfolders, sorted.

    Raises:
        ValueError: the folder does not exist, or has fewer than two pictures.
    """
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in REFERENCE_SUFFIXES)
    if len(paths) < 2:
        raise ValueError(f"FID needs at least 2 pictures ({', '.join(REFERENCE_SUFFIXES)}) in {folder}: {len(paths)}")
    return paths


def load_inception(
    tool: str,
    weights: str,
    device: str | torch.device = "cpu",
    layer: str = LAYER,
    metric: str = "fid",
    remedy: str = "--inception_weights FILE",
) -> torch.nn.Module:
    """Load the tool's Inception network.

    Args:
        tool: one of TOOLS.
        weights: the tool's own file of weights; "" to download it.
        device: device to load it to.
        layer: layer of torch-fidelity's network.
        metric: name of the metric, for error messages.
        remedy: what the user should give, for error messages.

    Raises:
        ValueError: the weights are missing, are of another network, or cannot be downloaded.
    """
    if tool == "clean-fid":
        from cleanfid.downloads_helper import inception_url as url
    else:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as url
    with weights_needed(metric, f"Inception's weights for {tool} ({weights or url})", remedy):
        if tool == "clean-fid":
            return _clean_inception(weights).to(device).eval()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        if weights:  # check them first: torch-fidelity unpickles anything in the file
            torch.load(weights, map_location="meta", weights_only=True)
        return FeatureExtractorInceptionV3(
            "inception-v3-compat", [layer], feature_extractor_weights_path=weights or None, verbose=False
        ).to(device)


def _clean_inception(weights: str) -> torch.nn.Module:
    from cleanfid.inception_torchscript import InceptionV3W

    if weights and Path(weights).name != CLEAN_WEIGHTS:
        raise ValueError(f"clean-fid needs its weights in a file called {CLEAN_WEIGHTS}")
    folder = Path(weights).parent if weights else Path(torch.hub.get_dir(), "checkpoints")
    folder.mkdir(parents=True, exist_ok=True)
    return InceptionV3W(str(folder), download=not weights)


class PictureFiles(Dataset):
    """Picture files as (3, H, W) uint8, for torch-fidelity.

    Args:
        paths: paths of the files.
        size: side in pixels to which all pictures are scaled and centre-cropped; 0 if all have the same size.
    """

    def __init__(self, paths: list[Path], size: int = 0):
        self.paths, self.size = paths, (size, size) if size else load_image(paths[0]).size
        self.is_scaled = bool(size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = load_image(self.paths[index])
        if self.is_scaled:
            image = ImageOps.fit(image, self.size, Image.Resampling.BICUBIC)
        elif image.size != self.size:
            raise ValueError(
                f"{self.paths[index]} is {image.size}, but {self.paths[0]} is {self.size}: set --fid_size to scale them"
            )
        return pil_to_tensor(image)


def fid(
    pictures: PictureFiles,
    reference: PictureFiles,
    tool: str = "torch-fidelity",
    weights: str = "",
    batch_size: int = 64,
    device: str | torch.device = "cpu",
) -> float:
    """Compute the Fréchet inception distance of two sets of pictures.

    Args:
        pictures: pictures to measure.
        reference: reference pictures.
        tool: one of TOOLS.
        weights: see `load_inception`.
        batch_size: pictures per batch.
        device: device to run on.

    Raises:
        ValueError: a picture is broken or of another size (the message names it), or see `load_inception`.
    """
    if tool == "clean-fid":
        return clean_fid(pictures, reference, load_inception(tool, weights, device), batch_size, device)
    import torch_fidelity

    metrics = torch_fidelity.calculate_metrics(
        input1=pictures,
        input2=reference,
        fid=True,
        feature_layer_fid=LAYER,
        feature_extractor_weights_path=weights or None,
        batch_size=batch_size,
        cuda=torch.device(device).type == "cuda",
    )
    return metrics[torch_fidelity.KEY_METRIC_FID]


@torch.no_grad()
def clean_fid(
    pictures: PictureFiles,
    reference: PictureFiles,
    network: torch.nn.Module,
    batch_size: int,
    device: str | torch.device,
) -> float:
    """Compute FID with clean-fid's resizing and formula; its network maps (B, 3, 299, 299) in [0, 255] to (B, D)."""
    from cleanfid.fid import frechet_distance
    from cleanfid.resize import build_resizer

    resize, statistics = build_resizer("clean"), []

    def batch_of(images: list[torch.Tensor]) -> torch.Tensor:
        rows = [torch.from_numpy(resize(image.permute(1, 2, 0).numpy())) for image in images]
        return torch.stack(rows).permute(0, 3, 1, 2)

    for files in (pictures, reference):
        batches = DataLoader(files, batch_size, collate_fn=batch_of)
        features = np.concatenate([network(batch.to(device)).cpu().numpy() for batch in batches])
        statistics += [features.mean(axis=0), np.cov(features, rowvar=False)]
    return float(frechet_distance(*statistics))
