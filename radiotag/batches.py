"""Marking decoded images together: in batches that fit in memory, each image encoded so that its file keeps the mark.

Nothing here knows of folders, plans or manifests: pictures come in, files and their pixels come out.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radiotag.errors import RadiotagError, out_of_memory
from radiotag.images import Picture, decode, encode, psnr, roundtrip
from radiotag.keys import Key, image_random, patterned
from radiotag.networks import Network, resized
from radiotag.radioactive import ImageToMark, Marking, mark_images, padded

LOSSLESS = {"PNG", "BMP", "TIFF"}
GREY = {"1", "L", "LA", "I;16"}
PIXELS_TOGETHER = 2**24  # optimised at once, at most: some 2 GiB; many photographs are slower together than apart
NEAR_TARGET = 0.95  # of the squared error that a lossy file may have: so much is enough
LARGEST_SCALE = 1.5  # times as large as made that a mark is encoded
TRIALS = 8  # encodings of an image, to find the scale
Pixels = NDArray[np.float32]  # (H, W, 3) in [0, 255]


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """How images are marked."""

    network: Network
    marking: Marking
    pool: ThreadPoolExecutor  # encodes and decodes beside the optimisation
    format: str = "keep"  # or "png"
    on_step: Callable[[float], None] = lambda _: None  # told before each step: how many images' worth of them is done


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """An image and what is put into it."""

    picture: Picture
    carrier: Tensor  # (d,)
    pattern: Tensor  # (m,); zeros for none
    draw: random.Random  # of its augmentations; a copy is drawn from, as a half of a batch begins anew


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Marked:
    """A marked image."""

    file: bytes
    pixels: Pixels  # as read from the file
    gain: float  # of its feature along the carrier


def request_for(key: Key, picture: Picture, path: str, row: int, seed: int) -> Request:
    """What an image gets: its class's carrier, the pattern if the key chose it to carry that, its own random crops."""
    pattern = key.patterns[row]
    return Request(
        picture=picture,
        carrier=key.carriers[row],
        pattern=pattern if patterned(key, path) else torch.zeros_like(pattern),
        draw=image_random(key, path, seed),
    )


def fits(batch: Sequence[Picture], picture: Picture, batch_size: int) -> bool:
    """Whether a picture can be marked together with a batch of others."""
    pixels = sum(each.rgb.size // 3 for each in (*batch, picture))
    return not batch or (len(batch) < batch_size and pixels <= PIXELS_TOGETHER)


def mark_requests(marker: Marker, requests: Sequence[Request]) -> Iterator[list[Marked | RadiotagError]]:
    """Mark images together, by halves where memory does not suffice or one fails; all results, in order, in parts."""
    try:
        files = mark_pictures(marker, requests)
    except Exception as error:
        if not isinstance(error, RadiotagError) and (len(requests) == 1 or not out_of_memory(error)):
            raise
        # The error itself would keep the failed batch's tensors.
        files, failure = [], RadiotagError(str(error), getattr(error, "hint", ""))
    if files:
        gains = feature_gains(marker.network, requests, [pixels for _, pixels in files])
        yield [Marked(file=f, pixels=p, gain=gain) for (f, p), gain in zip(files, gains, strict=True)]
    elif len(requests) == 1:
        yield [failure]
    else:
        half = len(requests) // 2
        yield from mark_requests(marker, requests[:half])
        yield from mark_requests(marker, requests[half:])


def mark_pictures(marker: Marker, requests: Sequence[Request]) -> list[tuple[bytes, Pixels]]:
    """Mark decoded images: each one's file, and its pixels (H, W, 3) as read from that."""
    marking, format, steps = marker.marking, marker.format, itertools.count()
    pictures = [request.picture for request in requests]
    lossless = all(_lossless(picture, format) for picture in pictures)

    def seen(picture: Picture, image: Tensor) -> Tensor:
        return image if _lossless(picture, format) else _tensor(roundtrip(picture, _array(image), format))

    def read_back(images: Sequence[Tensor]) -> list[Tensor]:
        marker.on_step(len(pictures) * next(steps) / marking.steps)
        return list(images) if lossless else list(marker.pool.map(seen, pictures, images))

    def finish(picture: Picture, image: Tensor) -> tuple[bytes, Pixels]:
        return _encoded(picture, _array(image), marking, format)

    given = [
        ImageToMark(
            image=_tensor(request.picture.rgb), carrier=request.carrier, pattern=request.pattern,
            draw=copy(request.draw), grey=request.picture.mode in GREY,
        )
        for request in requests
    ]  # fmt: skip
    marked = mark_images(marker.network, given, marking, read_back)
    return list(marker.pool.map(finish, pictures, marked))


def _lossless(picture: Picture, format: str) -> bool:
    return (format == "png" or picture.format in LOSSLESS) and picture.mode in {"RGB", "RGBA"}


def _encoded(picture: Picture, marked: Pixels, marking: Marking, format: str) -> tuple[bytes, Pixels]:
    """Encode; where that leaves less of the mark, enlarge it; where more than the PSNR allows, shrink it.

    An encoder that rounds small changes away (JPEG of low quality) gets the mark so large that the file is changed as
    much as the mark was before, within ±ε; at most half as large again, as fine changes become coarse ones, which show.
    Where encoding alone takes more than half of the squared error that the PSNR allows, the other half is the mark's
    all the same: the format has no better file.
    """
    height, width, _ = picture.rgb.shape
    wanted, lossless, change = marking.psnr(height, width), _lossless(picture, format), marked - picture.rgb
    alone = 0.0 if lossless else _error(picture.rgb, roundtrip(picture, picture.rgb, format))
    allowed = max(10 ** (-wanted / 10), alone + 10 ** (-wanted / 10) / 2)
    target = min(allowed, alone + _error(picture.rgb, marked))
    enough = 0.0 if lossless else NEAR_TARGET * target
    scale, low, high, made, file = 1.0, 0.0, math.inf, math.inf, (b"", marked)
    for _ in range(TRIALS):
        data = encode(picture, picture.rgb + np.clip(scale * change, -marking.epsilon, marking.epsilon), format)
        seen = decode(data, picture.name).rgb
        error = _error(picture.rgb, seen)
        if made > allowed or made < error <= allowed:
            made, file = error, (data, seen)
        if enough <= error <= allowed or (scale == LARGEST_SCALE and error <= allowed):
            break
        low, high = (low, scale) if error > allowed else (scale, high)
        goal = (allowed if error > allowed else target) - alone
        scale *= 10 ** (-0.01 / 20) * math.sqrt(goal / max(error - alone, goal / 4))
        scale = min(scale, LARGEST_SCALE) if low < scale < high else (low + high) / 2
    return file


def _error(a: Pixels, b: Pixels) -> float:
    """Mean squared difference, of pixels in [0, 1]."""
    return 10 ** (-psnr(a, b) / 10)


@torch.no_grad()
def feature_gains(network: Network, requests: Sequence[Request], after: Sequence[Pixels]) -> list[float]:
    """⟨φ(x̃) − φ(x), u⟩ of whole images, without augmentation."""
    device, size = network.device, network.spec.image_size
    carriers = torch.stack([request.carrier for request in requests]).to(device)  # (B, d)

    def phi(arrays: Sequence[Pixels]) -> Tensor:
        whole = torch.cat([resized(_tensor(a)[None], size) for a in arrays])
        return network.features(padded(whole).to(device) / 255)[: len(whole)]  # (B, d)

    gains: list[float] = ((phi(after) - phi([request.picture.rgb for request in requests])) * carriers).sum(1).tolist()
    return gains


def _tensor(rgb: Pixels) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1)))


def _array(image: Tensor) -> Pixels:
    array: Pixels = image.permute(1, 2, 0).cpu().numpy()
    return array
