"""Marking decoded images in batches that fit in memory, and encoding each so that its file keeps the mark.

This module does not use folders, plans or manifests: its input is pictures, its output is files and their pixels.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from radiotag.bands import bands, sampled
from radiotag.errors import RadiotagError, Unmarkable, out_of_memory
from radiotag.images import GREY, Picture, Pixels, decode, encode, finer, psnr, roundtrip, sample_of
from radiotag.keys import Key, image_random
from radiotag.networks import Network, channels_first, resized
from radiotag.radioactive import ImageToMark, Marking, mark_images, padded
from radiotag.reduction import Change, Reduced, enlarged, mean_square, reduced, reduction, shrunk

LOSSLESS = {"PNG", "BMP", "TIFF"}
PIXELS_TOGETHER = 2**24  # most pixels per batch, about 2 GiB; many photographs together are slower than one by one
NEAR_TARGET = 0.95  # of the target squared error: a lossy file with this much is accepted
NEAR_SAMPLE = 0.9  # the same for a large image, whose scale some of its rows have told
BESIDES_SAMPLE = 0.998  # of that scale: the other rows may hold more
LARGEST_SCALE = 1.5  # largest factor by which a mark is enlarged before encoding
ROOM = 0.25  # of the squared error that the PSNR allows: the least that writing again must leave to a mark
TRIALS = 8  # encodings per image to find the scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """Everything that is the same for all images to mark."""

    network: Network
    marking: Marking
    pool: ThreadPoolExecutor  # encodes and decodes beside the optimisation
    format: str = "keep"  # or "png"
    on_step: Callable[[float], None] = lambda _: None  # called before each step with the images' worth of steps done


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """An image and the data of its mark."""

    picture: Picture
    carrier: Tensor  # (d,)
    pattern: Tensor  # (m,); zeros for no pattern
    draw: random.Random  # generator of its augmentations; only copies are used, because a split batch starts again


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Marked:
    """A marked image."""

    file: bytes
    pixels: Pixels  # as read from the file
    gain: float  # of its feature along the carrier


def request_for(key: Key, picture: Picture, path: str, row: int, *, seed: int, patterned: bool) -> Request:
    """The request for an image: the carrier of its class, its pattern if it is `patterned`, and its random crops."""
    pattern = key.patterns[row]
    return Request(
        picture=picture,
        carrier=key.carriers[row],
        pattern=pattern if patterned else torch.zeros_like(pattern),
        draw=image_random(key, path, seed),
    )


def fits(batch: Sequence[Picture], picture: Picture, batch_size: int) -> bool:
    """Whether a picture can be added to a batch; any picture fits in an empty one."""
    pixels = sum(other.rgb.size // 3 for other in (*batch, picture))
    return not batch or (len(batch) < batch_size and pixels <= PIXELS_TOGETHER)


def mark_requests(marker: Marker, requests: Sequence[Request]) -> Iterator[list[Marked | RadiotagError]]:
    """Mark images together, or by halves if memory is insufficient or one fails. Yields results in order, in parts."""
    try:
        files = mark_pictures(marker, requests)
    except Exception as error:
        if not isinstance(error, RadiotagError) and (len(requests) == 1 or not out_of_memory(error)):
            raise
        # Keep only the message: the error itself would hold the failed batch's tensors.
        told = str(error), getattr(error, "hint", "")
        files, failure = [], Unmarkable(*told, error.kind) if isinstance(error, Unmarkable) else RadiotagError(*told)
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
    """Mark decoded images; returns each one's file and its pixels (H, W, 3) as decoded from the file."""
    marking, format, steps = marker.marking, marker.format, itertools.count()
    pictures = [request.picture for request in requests]
    copies = [reduced(p.rgb) if reduction(*p.rgb.shape[:2]) > 1 else None for p in pictures]
    as_it_is = [small is not None or _lossless(p, format) for small, p in zip(copies, pictures, strict=True)]

    def seen(picture: Picture, image: Tensor, same: bool) -> Tensor:
        return image if same else channels_first(roundtrip(picture, _array(image), format))

    def read_back(images: Sequence[Tensor]) -> list[Tensor]:
        marker.on_step(len(pictures) * next(steps) / marking.steps)
        return list(images) if all(as_it_is) else list(marker.pool.map(seen, pictures, images, as_it_is))

    def finish(picture: Picture, small: Reduced | None, image: Tensor) -> tuple[bytes, Pixels]:
        return _encode_mark(picture, _change(picture, small, image), marking, format)

    images = [
        ImageToMark(
            image=channels_first(request.picture.rgb) if small is None else small.image, carrier=request.carrier,
            pattern=request.pattern, draw=copy(request.draw), grey=_grey(request.picture),
            mask=None if small is None else small.mask,
        )
        for request, small in zip(requests, copies, strict=True)
    ]  # fmt: skip
    marked = mark_images(marker.network, images, marking, read_back)
    return list(marker.pool.map(finish, pictures, copies, marked))


def _change(picture: Picture, small: Reduced | None, marked: Tensor) -> Change:
    """What a mark adds to some rows of a picture."""
    if small is not None:
        return enlarged(small, marked)
    change = np.subtract(_array(marked), picture.rgb, dtype=np.float32)
    return lambda rows: change[rows]


def _grey(picture: Picture) -> bool:
    """Whether an image shows no colour; on a black and white photograph, even one stored as RGB, any tint shows."""
    parts = (picture.rgb[rows] for rows in bands(*picture.rgb.shape[:2]))
    return picture.mode in GREY or all(bool((part == part[..., :1]).all()) for part in parts)


def _lossless(picture: Picture, format: str) -> bool:
    return (format == "png" or picture.format in LOSSLESS) and picture.mode in {"RGB", "RGBA"}


def _encode_mark(picture: Picture, change: Change, marking: Marking, format: str) -> tuple[bytes, Pixels]:
    """Encode a marked image; enlarge the mark if encoding weakens it, shrink it if the PSNR would become too low.

    Some encoders round small changes away (JPEG of low quality). Then the mark is enlarged, within ±ε, until it
    changes the file as much as it changed the image before encoding. The factor is at most LARGEST_SCALE, because such
    encoders turn fine changes into coarse ones, which are visible. Of a large image, some rows tell where to begin.
    RadiotagError if no file keeps the PSNR.
    """
    sample, limits = sample_of(picture), _Limits(_allowed(picture, marking), marking.epsilon, format)
    scale = 1.0
    if sample is not picture:
        few = np.concatenate([change(rows) for rows in sampled(*picture.rgb.shape[:2])])
        scale = _fitted(sample, lambda rows: few[rows], limits).scale * BESIDES_SAMPLE
    found = _fitted(picture, change, limits, scale)
    if found.error > limits.allowed:
        better = finer(picture) if format == "keep" else None
        if better is None:
            raise _too_coarse(picture, found.error)
        return _encode_mark(better, change, marking, format)
    return found.file or encode(picture, found.pixels, format), found.pixels


class _Limits(NamedTuple):
    """What a marked file must keep, and its format."""

    allowed: float  # squared error for pixels scaled to [0, 1]
    epsilon: float
    format: str


class _Fit(NamedTuple):
    """A file with a scaled mark."""

    scale: float
    error: float
    file: bytes  # empty for a lossless format: the pixels tell all
    pixels: Pixels  # as read from the file


def _fitted(picture: Picture, change: Change, limits: _Limits, scale: float = 1.0) -> _Fit:
    """The file with the best scale of a change, tried from the one given."""
    allowed, epsilon, format = limits
    codec_error, lossless = _codec_error(picture, format), _lossless(picture, format)
    target = min(allowed, codec_error + mean_square(change, *picture.rgb.shape[:2]) / 255**2)
    near = NEAR_TARGET if scale == 1.0 else NEAR_SAMPLE
    sufficient = 0.0 if lossless else near * target
    if codec_error >= allowed:
        return _Fit(0.0, codec_error, b"", picture.rgb)
    low, high = 0.0, math.inf
    best = _Fit(scale, math.inf, b"", picture.rgb)
    for trial in range(TRIALS):
        data, seen = b"", _composed(picture, change, scale, epsilon)
        if not lossless:
            data = encode(picture, seen, format)
            seen = decode(data, picture.name).rgb
        error = _error(picture.rgb, seen)
        if best.error > allowed or best.error < error <= allowed:
            best = _Fit(scale, error, data, seen)
        if sufficient <= error <= allowed or (scale == LARGEST_SCALE and error <= allowed):
            break
        low, high = (low, scale) if error > allowed else (scale, high)
        goal = (allowed if error > allowed else target) - codec_error
        scale *= 10 ** (-0.01 / 20) * math.sqrt(goal / max(error - codec_error, goal / 4))
        # A coarse encoder's error has steps, before which this would creep: the second half of the trials bisects.
        creeps = trial >= TRIALS // 2 and math.isfinite(high)
        scale = min(scale, LARGEST_SCALE) if low < scale < high and not creeps else (low + high) / 2
    return best


def _composed(picture: Picture, change: Change, scale: float, epsilon: float) -> Pixels:
    """The pixels with a change, scaled, within ±ε; rounded as its file will hold them, if it has 8 bits."""
    height, width, _ = picture.rgb.shape
    out = np.empty((height, width, 3), np.uint8) if picture.depth == 8 else np.empty((height, width, 3), np.float32)
    for rows in bands(height, width):
        found = picture.rgb[rows] + np.clip(scale * change(rows), -epsilon, epsilon)
        out[rows] = np.rint(np.clip(found, 0, 255)) if picture.depth == 8 else found
    return out


def with_room(picture: Picture, format: str, marking: Marking) -> Picture:
    """The picture in a coding of its format that leaves room for a mark. RadiotagError if there is none.

    Writing a file again may cost more than the PSNR allows, before anything is marked: few colours among many levels of
    alpha, for one.
    """
    found: Picture | None = picture
    while found is not None:
        if (error := _codec_error(sample_of(found), format)) <= (1 - ROOM) * _allowed(picture, marking):
            return found
        found = finer(found) if format == "keep" else None
    raise _too_coarse(picture, error)


def _too_coarse(picture: Picture, error: float) -> Unmarkable:
    kind = f"{picture.format} that leaves no room for a mark"
    told = f"written again as {picture.format} it has {-10 * math.log10(error):.1f} dB, less than --min-psnr allows"
    hint = "write PNG files instead: --format png, or give a lower --min-psnr"
    return Unmarkable(f"{picture.name}: {told}", hint, kind)


def _codec_error(picture: Picture, format: str) -> float:
    """The squared error of writing a picture again."""
    return 0.0 if _lossless(picture, format) else _error(picture.rgb, roundtrip(picture, picture.rgb, format))


def _allowed(picture: Picture, marking: Marking) -> float:
    """The squared error that the minimum PSNR allows."""
    height, width, _ = picture.rgb.shape
    return float(10 ** (-marking.psnr(height, width) / 10))


def _error(a: Pixels, b: Pixels) -> float:
    """Mean squared difference for pixels scaled to [0, 1]."""
    return 10 ** (-psnr(a, b) / 10)


@torch.no_grad()
def feature_gains(network: Network, requests: Sequence[Request], after: Sequence[Pixels]) -> list[float]:
    """⟨φ(x̃) − φ(x), u⟩ of each whole image, without augmentation."""
    device, size = network.device, network.spec.image_size
    carriers = torch.stack([request.carrier for request in requests]).to(device)  # (B, d)

    def phi(images: Sequence[Pixels]) -> Tensor:
        pixels = torch.cat([resized(shrunk(image)[None], size) for image in images])
        return network.features(padded(pixels).to(device) / 255)[: len(pixels)]  # (B, d)

    gains: list[float] = ((phi(after) - phi([request.picture.rgb for request in requests])) * carriers).sum(1).tolist()
    return gains


def _array(image: Tensor) -> Pixels:
    array: Pixels = image.permute(1, 2, 0).cpu().numpy()
    return array
