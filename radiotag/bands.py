"""Bands of rows: large images are handled some rows at a time, so that memory stays bounded, or sampled by rows."""

from collections.abc import Iterator

LARGE = 2**22  # pixels; larger images are marked through a reduced copy, and measured by sampled rows
BAND = 2**18  # pixels handled at a time: what is computed of them stays in the processor's cache
SAMPLE = 2**20  # pixels of the rows that stand for a large image, about
FEW = 8  # rows of a band where each pixel is measured by itself
EACH = 64  # rows of one of these bands: encoders code 16 together, and smooth colours across them


def bands(height: int, width: int, multiple: int = 1) -> Iterator[slice]:
    """The rows of an image in bands of about BAND pixels, whose heights are multiples of a number, but for the last."""
    step = max(1, BAND // max(1, width * multiple)) * multiple
    for top in range(0, height, step):
        yield slice(top, min(top + step, height))


def sampled(height: int, width: int, each: int = EACH) -> list[slice]:
    """Evenly spaced bands, `each` rows high, that stand for a large image; all rows of another."""
    count, places = max(1, SAMPLE // (width * each)), height // each
    if height * width <= LARGE or count >= places:
        return [slice(0, height)]
    starts = ((2 * i + 1) * places // (2 * count) * each for i in range(count))
    return [slice(top, top + each) for top in starts]
