"""Deterministic stand-in weights and inputs, so that two programs can be compared without a download.

Every tensor is drawn from a generator seeded with the CRC-32 of its own name, so any program that knows a
checkpoint's key names and shapes can rebuild the exact same checkpoint on any machine.
"""

import re
import zlib

import numpy as np


ZERO = ("zero_k_bias", "vocab_usage", "pos_embed")
TABLE = re.compile(r"(codebook|codebooks\.\d+|token_embedding|embed_tokens)\.weight$|positional_embedding$")


def reference_tensor(name: str, shape) -> np.ndarray:
    """The float32 tensor that stands for the checkpoint entry `name` of this `shape`."""
    shape = tuple(shape)
    last = name.rsplit(".", 1)[-1]
    if last in ZERO:
        return np.zeros(shape, np.float32)
    if last == "logit_scale":
        return np.asarray(np.log(1 / 0.07), np.float32)
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    if len(shape) < 2:
        return 1 + 0.1 * x if last == "weight" else 0.05 * x
    if TABLE.search(name):
        return x
    return (x / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def reference_image(size: int = 256, seed: int = 0) -> np.ndarray:
    """A smooth RGB image in [-1, 1], float32, (3, size, size)."""
    y, x = np.meshgrid(np.linspace(0, 1, size), np.linspace(0, 1, size), indexing="ij")
    channels = [
        np.sin(2 * np.pi * ((c + 1 + seed) * x + (c + 2) * y * y) + c)
        * np.cos(2 * np.pi * (2 * x * y + 0.3 * c * seed))
        for c in range(3)
    ]
    return np.stack(channels).astype(np.float32)
