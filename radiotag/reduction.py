"""Large photographs are marked through a reduced copy.

A mark is smooth but for the mask that hides it in texture. So it can be computed on a copy of half a megapixel, whose
pixels are means of k × k pixels, enlarged, and laid under the full image's own mask.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from radiotag.bands import FEW, LARGE, bands, sampled
from radiotag.images import Pixels
from radiotag.networks import channels_first
from radiotag.radioactive import texture_mask

COPY = 2**19  # pixels of a reduced copy, at least
SHORTEST = 256  # pixels on the short side of a reduced copy, at least: what depends on the size stays as it is
HALO = 6  # rows beyond a band that the mask of its pixels depends on
Change = Callable[[slice], NDArray[np.float32]]  # rows → (h, W, 3) change of these rows, in units of 1/255


def reduction(height: int, width: int) -> int:
    """The factor k by which an image is reduced along each axis before it is marked; 1 unless it is LARGE."""
    if height * width <= LARGE:
        return 1
    return max(1, min(math.isqrt(height * width // COPY), min(height, width) // SHORTEST))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reduced:
    """A large image's copy, and what it takes to lay the copy's mark over the image."""

    image: Tensor  # (3, h, w) in [0, 255]
    mask: Tensor  # (1, h, w): of a block of pixels, the root of the mean square
    full_mask: NDArray[np.uint8]  # (H, W), in units of 1/255
    factor: int  # k


def reduced(rgb: Pixels) -> Reduced:
    """Reduce an image (H, W, 3) by its `reduction`."""
    height, width, _ = rgb.shape
    k, parts, squares, masks = reduction(height, width), [], [], np.empty((height, width), np.uint8)
    for rows in bands(height, width, k):
        top, bottom = max(0, rows.start - HALO), min(height, rows.stop + HALO)
        seen = channels_first(rgb[top:bottom])  # (3, h, W)
        inner = slice(rows.start - top, rows.stop - top)
        mask = texture_mask(seen)[:, inner]  # (1, h, W)
        masks[rows] = mask[0].mul(255).round_().to(torch.uint8).numpy()
        parts.append(_pooled(seen[:, inner], k))
        squares.append(_pooled(mask.square(), k))
    return Reduced(image=torch.cat(parts, 1), mask=torch.cat(squares, 1).sqrt(), full_mask=masks, factor=k)


def shrunk(rgb: Pixels) -> Tensor:
    """(H, W, 3) → (3, h, w) float in [0, 255]: a large image reduced by its `reduction`, another as it is."""
    height, width, _ = rgb.shape
    k = reduction(height, width)
    if k == 1:
        return channels_first(rgb)
    return torch.cat([_pooled(channels_first(rgb[rows]), k) for rows in bands(height, width, k)], 1)


def _pooled(image: Tensor, k: int) -> Tensor:
    """(C, H, W) → (C, ⌈H/k⌉, ⌈W/k⌉): means of blocks; those at the edge may be smaller."""
    return F.avg_pool2d(image[None], k, ceil_mode=True, count_include_pad=False)[0]


def enlarged(copy: Reduced, moved: Tensor) -> Change:
    """The change of the full image for a copy's marked pixels (3, h, w): as much of it, under the full mask."""
    height, width = copy.full_mask.shape
    bare = (moved - copy.image) / copy.mask  # (3, h, w), smooth
    k = copy.factor

    def rows(wanted: slice) -> NDArray[np.float32]:
        first, last = wanted.start // k, -(-wanted.stop // k)
        around = bare[:, max(0, first - 1) : last + 1]  # a row beyond, to interpolate between
        large = F.interpolate(around[None], scale_factor=float(k), mode="bilinear", align_corners=False)[0]
        above = wanted.start - max(0, first - 1) * k
        large = large[:, above : above + wanted.stop - wanted.start, :width]
        mask = torch.from_numpy(copy.full_mask[wanted]).to(large.dtype) / 255  # (h, W)
        return (large * mask).permute(1, 2, 0).numpy()

    energy, wanted = mean_square(rows, height, width), float((moved - copy.image).square().mean())
    gain = np.float32(math.sqrt(wanted / energy)) if energy > 0 else np.float32(1)
    return lambda part: rows(part) * gain


def mean_square(change: Change, height: int, width: int) -> float:
    """The mean square of a change, in units of 1/255²; of a large image, of some rows."""
    parts = [change(rows) for rows in sampled(height, width, each=FEW)]
    return sum(float(np.square(part, dtype=np.float64).sum()) for part in parts) / sum(part.size for part in parts)
