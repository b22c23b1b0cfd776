"""What the test may be expected to find: looked up among measured data sets, before the work is done.

`measured.json` holds what came out where it was measured: the median over several keys, for models trained from scratch
and tested with real images. A plan is compared with the measured data sets of like size and number of classes in which
no larger share was marked than it will mark. Where nothing like it was measured, nothing is expected.
"""

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import NamedTuple

from PIL import Image

from radiotag.images import GREY

LIKE_SIZE, LIKE_CLASSES = 1.5, 2.0  # ratios up to which image sizes and numbers of classes are alike
FEWER_IMAGES = 0.5  # of a measured data set's: what smaller sets teach is unknown
MORE = 1.5  # times the measured share: a plan that marks so much more may give more
ABOUT = 0.95  # a plan that marks this part of what was measured marks as much
LIKELY = -4.0  # log10 p that a detection takes by default (--alpha)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One data set, marked under several keys, and what a model trained on it from scratch gave."""

    data: str
    size: int  # of the images, pixels
    classes: int
    images: int
    marked: int  # in all classes together
    share: float  # of a class, where it is marked
    suspect: str  # architecture
    keys: int
    log10_p: float  # median over the keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """What may be expected, and how that is known."""

    log10_p: float | None  # None where nothing like the plan was measured
    reason: str
    advice: str = ""  # how more could be expected


def measured() -> list[Measured]:
    """Everything that was measured."""
    text = resources.files("radiotag").joinpath("measured.json").read_text(encoding="utf-8")
    return [Measured(**row) for row in json.loads(text)]


class Look(NamedTuple):
    """What an image looks like, as far as it matters here."""

    size: int  # pixels of the short side
    grey: bool  # the file holds no colour


def looks(data: bytes) -> Look | None:
    """What an image file looks like; None if it cannot be read."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return Look(min(image.size), image.mode in GREY)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def expected(
    images: Mapping[str, int], marked: Mapping[str, int], look: Look | None, *, spread: bool = False
) -> Expectation:
    """What the test may be expected to find of a plan.

    images, marked: class → number of its images, and how many of them are marked; look: of an image; spread: whether
    the owner asked for marks in every class.
    """
    fraction = sum(marked.values()) / max(1, sum(images.values()))
    alike = [row for row in measured() if look and not look.grey and _is_like(row, images, look.size)]
    if not (fraction and len(images) > 1 and alike):
        return Expectation(log10_p=None, reason=_unknown(images, marked, look))
    reached = [row for row in alike if _marks_as_much(row, images, marked)]
    best = min(reached, key=lambda row: row.log10_p, default=None)
    if best is None:
        reason = "likely nothing: less is marked than was ever found"
        return Expectation(log10_p=None, reason=reason, advice=_advice(alike, images, marked, spread))
    found = f"{best.marked:,} of {best.images:,} images of {best.data}, a {best.suspect} trained from scratch"
    if best.log10_p <= LIKELY:
        weakest = max((row for row in reached if _same_marks(row, best)), key=lambda row: row.log10_p)
        less = f"; about {weakest.log10_p:.1f} in a {weakest.suspect}" if weakest.log10_p > best.log10_p else ""
        return Expectation(log10_p=best.log10_p, reason=f"as with {found}{less}")
    if fraction > MORE * best.marked / best.images:
        return Expectation(log10_p=None, reason=f"not measured; less, {found}, left log10 p {best.log10_p:.1f}")
    reason, advice = f"likely nothing, as with {found}", _advice(alike, images, marked, spread)
    return Expectation(log10_p=best.log10_p, reason=reason, advice=advice)


def _same_marks(row: Measured, other: Measured) -> bool:
    return (row.data, row.images, row.marked) == (other.data, other.images, other.marked)


def _is_like(row: Measured, images: Mapping[str, int], size: int) -> bool:
    classes = _ratio(row.classes, len(images)) <= LIKE_CLASSES
    return classes and _ratio(row.size, size) <= LIKE_SIZE and sum(images.values()) >= FEWER_IMAGES * row.images


def _unknown(images: Mapping[str, int], marked: Mapping[str, int], look: Look | None) -> str:
    """Why nothing is expected."""
    if not any(marked.values()):
        return "nothing is marked"
    if len(images) == 1:
        return "not measured for a single class"
    if look is None:
        return "unknown, as the first image cannot be read"
    kind = "grey images" if look.grey else "images"
    return f"not measured for {sum(images.values()):,} {kind} of {look.size} pixels in {len(images)} classes"


def _marks_as_much(row: Measured, images: Mapping[str, int], marked: Mapping[str, int]) -> bool:
    """Whether a plan marks as large a share of its images as was measured, in classes as densely marked."""
    dense = [count for name, count in marked.items() if count and count >= ABOUT * row.share * images[name]]
    return sum(dense) >= ABOUT * row.marked / row.images * sum(images.values())


def _advice(alike: list[Measured], images: Mapping[str, int], marked: Mapping[str, int], spread: bool) -> str:
    """How many images more would be found, by the smallest measured share that was."""
    total, count = sum(images.values()), sum(marked.values())
    enough = [math.ceil(row.marked / row.images * total) for row in alike if row.log10_p <= LIKELY]
    if not enough:
        return ""
    if min(enough) > count:
        return f"mark {min(enough) - count:,} more: --fraction {math.ceil(1000 * min(enough) / total) / 1000:g}"
    return "leave out --spread, so that fewer classes are marked" if spread else ""


def _ratio(a: float, b: float) -> float:
    return max(a, b) / max(1e-9, min(a, b))
