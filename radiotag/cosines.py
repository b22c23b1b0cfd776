"""The space of the patterns: low-frequency cosines over the image, in three colours. It is public and uses no key.

A pattern is a vector of R^m. `pattern_images` turns it into an image of any size, `pattern_coefficients` projects an
image onto the space; the two maps are transposes of each other.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy import fft
from torch import Tensor

FREQUENCIES = 6  # of a pattern along each axis: 0 to 5 half-waves over the image
PATTERN_DIMENSION = 3 * (FREQUENCIES * FREQUENCIES // 2 - 1)  # m: three colours, mirror-symmetric, no constant


def _waves(count: int, size: int, step: int) -> Tensor:
    """(count/step, size) float64: every `step`-th cosine of the orthonormal DCT-II; zeros where `size` is too small."""
    return torch.from_numpy(fft.idct(np.eye(count, size)[::step], norm="ortho"))


def pattern_images(patterns: Tensor, height: int, width: int) -> Tensor:
    """(B, m) patterns → (B, 3, H, W) images: sums of cosines, only even ones across, so that a flip changes nothing.

    The coefficients are amplitudes in an orthonormal basis: images of 6 pixels or more have the pattern's norm.
    """
    grid = F.pad(patterns.double().view(len(patterns), 3, -1), (1, 0))  # no constant: normalisation would remove it
    grid = grid.view(len(patterns), 3, FREQUENCIES, FREQUENCIES // 2)
    down, across = _waves(FREQUENCIES, height, 1), _waves(FREQUENCIES, width, 2)
    return torch.einsum("bcij,ih,jw->bchw", grid, down, across)


def tilt(patterns: Tensor, power: float) -> Tensor:
    """(B, m) patterns with each amplitude divided by its frequency to a power; 0 changes nothing.

    The frequency is in half-waves over the image, at least 1. Low frequencies survive random crops of it.
    """
    down = torch.arange(FREQUENCIES, dtype=torch.float64)[:, None]
    across = 2 * torch.arange(FREQUENCIES // 2, dtype=torch.float64)
    frequency = torch.hypot(down, across).flatten()[1:].clamp_min(1)  # (m / 3,)
    return patterns.double() / (frequency**power).repeat(3)


def pattern_coefficients(images: Tensor) -> Tensor:
    """(B, 3, H, W) images → (B, m) float64 coefficients: the transpose of `pattern_images`."""
    down, across = _waves(FREQUENCIES, images.shape[2], 1), _waves(FREQUENCIES, images.shape[3], 2)
    grid = torch.einsum("bchw,ih,jw->bcij", images.cpu().double(), down, across)
    return grid.flatten(2)[:, :, 1:].flatten(1)
