"""Synthetic images: dead leaves and inverted images as a substitute for photographs, and a demo set of ten classes.

Dead leaves (Matheron 1968; Lee, Mumford and Huang 2001; as training images: Baradad et al. 2021) are opaque shapes
dropped onto each other, with radii of density r^-3. This scale-free occlusion gives photographs their edges and their
1/f amplitude spectrum. Dead leaves suffice to align and probe networks, but not to replace photographs in training.

Image i depends on (seed, i, size) alone, not on the count, so a larger count only appends images. Other versions of
NumPy or Pillow may draw slightly different pixels: store images that must stay the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

Array = np.ndarray[Any, np.dtype[Any]]
Rng = np.random.Generator

INVERTED = Path(__file__).with_name("inverted.png")
VERTICES = 48  # of each polygon: enough for a disc of the image's size to look round
SHAPES = ("disc", "square", "triangle", "cross", "ring")
PATTERNS = ("plain", "striped")
CLASS_NAMES = tuple(f"{pattern}-{shape}" for shape in SHAPES for pattern in PATTERNS)
# Luminance, blue-yellow, red-green: the principal axes of the colours of natural scenes (Ruderman et al. 1998).
COLOUR_AXES = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaves:
    """n shapes from bottom to top; coordinates run over [-1, 1] on both axes, colours over [0, 1]."""

    outlines: Array  # (n, VERTICES, 2)
    colours: Array  # (n, 3) at the leaf's centre
    shading: Array  # (n, 2) brightness per unit of length
    offsets: Array  # (n,) that cancel a leaf's shading at its centre
    waves: Array  # (n, 2) radians per unit of length
    phases: Array  # (n,)
    swings: Array  # (n, 3) colour amplitude of the wave
    grain: Array  # (n,) standard deviation of the surface noise

    def on_top(self, other: Self) -> Self:
        """Return all leaves, with these ones on top of the others."""
        names = [field.name for field in fields(self)]
        return type(self)(**{name: np.concatenate([getattr(other, name), getattr(self, name)]) for name in names})


def _polygon(corners: Array) -> Array:
    """Return a (k, 2) outline as (VERTICES, 2) by repeating corners, so that all outlines fit in one array."""
    return corners[np.arange(VERTICES) * len(corners) // VERTICES]


def _regular(corners: int) -> Array:
    """Return the (corners, 2) regular polygon of radius 1."""
    angles = 2 * np.pi * np.arange(corners) / corners
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _cross() -> Array:
    quarter = np.array([[1, -0.3], [1, 0.3], [0.3, 0.3]])
    turns = [np.array([[c, s], [-s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
    return np.concatenate([quarter @ turn for turn in turns])


def _ring() -> Array:
    """Return a keyhole outline: around the rim, through a cut of zero width, and back around the hole."""
    circle = _regular(VERTICES // 2 - 1)
    rim = np.concatenate([circle, circle[:1]])
    return np.concatenate([rim, 0.5 * rim[::-1]])


OUTLINES = np.stack([_polygon(c) for c in (_regular(VERTICES), _regular(4), _regular(3), _cross(), _ring())])


def _place(outlines: Array, radii: Array, centres: Array, angles: Array) -> Array:
    """Scale unit outlines (n, VERTICES, 2) by radii (n, 2), turn them by angles (n,), move them to centres (n, 2)."""
    cos, sin = np.cos(angles), np.sin(angles)
    turn = np.stack([cos, sin, -sin, cos], axis=1).reshape(-1, 2, 2)
    return np.asarray((outlines * radii[:, None]) @ turn + centres[:, None])


def _colours(rng: Rng, count: int, contrast: float) -> Array:
    """Draw (count, 3) colours of one scene: a common light and tint, and leaves that differ mostly in luminance."""
    scene = rng.normal((0.48 * np.sqrt(3), 0, 0), (0.18, 0.07, 0.03))
    leaves = rng.laplace(0, 1, (count, 3)) * (0.3, 0.1, 0.05) * contrast
    return (scene + leaves) @ COLOUR_AXES


def _surface(rng: Rng, outlines: Array, colours: Array, size: int, contrast: float) -> Leaves:
    """Give each leaf linear shading, and some leaves waves or grain."""
    n = len(outlines)
    shading = rng.normal(0, 0.25 * contrast, (n, 2))
    directions, pixel = rng.uniform(0, np.pi, n), 2 / size
    wavelengths = 3 * pixel * np.exp(rng.uniform(0, np.log(max(0.5 / (3 * pixel), 2)), n))
    swings = rng.normal(0, (0.1, 0.03, 0.02), (n, 3)) @ COLOUR_AXES * (rng.random((n, 1)) < 0.4)
    light = rng.normal(0, 0.08, 2)  # the same for all of these leaves
    return Leaves(
        outlines=outlines,
        colours=colours,
        shading=shading + light,
        offsets=-(shading * outlines.mean(axis=1)).sum(axis=1),
        waves=np.stack([np.cos(directions), np.sin(directions)], axis=1) * (2 * np.pi / wavelengths)[:, None],
        phases=rng.uniform(0, 2 * np.pi, n),
        swings=swings * contrast,
        grain=rng.exponential(0.05 * contrast, n) * (rng.random(n) < 0.4),
    )


def _scatter(rng: Rng, size: int, contrast: float) -> Leaves:
    """Drop discs, ellipses and rectangles until they cover the canvas about 2.5 times."""
    smallest, largest = rng.uniform(min(max(4 / size, 0.05), 0.25), 0.25), 1.0  # busy scenes and calm ones
    # E[r^2] under the density r^-3 gives the number of leaves, of mean area 2.6 r^2, for the canvas's 4 units of area.
    mean_square = 2 * np.log(largest / smallest) / (smallest**-2 - largest**-2)
    n = int(2.5 * 4 / (2.6 * mean_square)) + 1
    radii = (smallest**-2 - rng.random(n) * (smallest**-2 - largest**-2)) ** -0.5
    aspects = np.exp(rng.uniform(-0.5, 0.5, n) * (rng.random(n) < 0.7))
    kinds, angles = rng.integers(0, 2, n), rng.uniform(0, 2 * np.pi, n)
    radii2 = np.stack([radii * aspects, radii / aspects], axis=1)
    outlines = _place(OUTLINES[kinds], radii2, rng.uniform(-1.2, 1.2, (n, 2)), angles)
    return _surface(rng, outlines, _colours(rng, n, contrast), size, contrast)


def _render(rng: Rng, leaves: Leaves, size: int) -> Array:
    """Paint leaves as (size, size, 3) floats: flat colours averaged from twice the size, textures at the size."""
    canvas = Image.new("I", (2 * size, 2 * size))  # zeros: leaf 0 fills what the others leave open
    pen = ImageDraw.Draw(canvas)
    for i, outline in enumerate(((leaves.outlines + 1) * size - 0.5).reshape(-1, 2 * VERTICES).tolist()):
        pen.polygon(outline, fill=i)
    fine = np.asarray(canvas)
    flat = leaves.colours.astype(np.float32)
    corners = [flat.take(fine[row::2, column::2], axis=0) for row in (0, 1) for column in (0, 1)]
    image = (corners[0] + corners[1] + corners[2] + corners[3]) / 4
    return image + _texture(rng, leaves, fine[::2, ::2])


def _texture(rng: Rng, leaves: Leaves, top: Array) -> Array:
    """Return what shading, waves and grain add to the colours, (size, size, 3); top (size, size) numbers leaves."""
    size = len(top)
    x = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    columns = (*leaves.shading.T, leaves.offsets, *leaves.waves.T, leaves.phases, leaves.grain)
    shade_x, shade_y, offset, wave_x, wave_y, phase, grain = (c.astype(np.float32).take(top) for c in columns)
    wave = np.sin(wave_x * x + wave_y * x[:, None] + phase)
    shade = shade_x * x + shade_y * x[:, None] + offset + grain * rng.standard_normal((size, size), np.float32)
    swing = leaves.swings.astype(np.float32).take(top, axis=0)
    return np.asarray(wave[..., None] * swing + shade[..., None])


def _develop(rng: Rng, image: Array) -> Array:
    """(size, size, 3) → uint8 (3, size, size): expose, sometimes defocus, and add sensor noise."""
    exposed = (image - 0.5) * rng.uniform(0.7, 1.2) + 0.5 + rng.normal(0, 0.06)
    picture = Image.fromarray((exposed * 255).clip(0, 255).astype(np.uint8))
    if rng.random() < 0.5:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.7)))
    noisy = np.asarray(picture) + rng.uniform(0.5, 5) * rng.standard_normal(image.shape, np.float32)
    return noisy.round().clip(0, 255).astype(np.uint8).transpose(2, 0, 1)


def _objects(rng: Rng, label: int, size: int) -> Leaves:
    """Draw one to three objects of a class; they are smaller if there are more."""
    kind, pattern = divmod(label, len(PATTERNS))
    n = int(rng.integers(1, 4))
    radii = rng.uniform(0.5, 0.7, (n, 1)) * np.exp(rng.normal(0, 0.06, (n, 2))) * (1.25, 0.9, 0.75)[n - 1]
    # Spread around the centre, so that they hide only a part of each other.
    bearings = rng.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(n) / n + rng.normal(0, 0.2, n)
    distances = rng.uniform(0, 0.4, (n, 1)) + (0.3 if n > 1 else 0)
    centres = distances * np.stack([np.cos(bearings), np.sin(bearings)], axis=1)
    angles = rng.uniform(0, 2 * np.pi, n)
    outlines = _place(OUTLINES[[kind] * n], radii, centres, angles)
    leaves = _surface(rng, outlines, _colours(rng, n, 1.5), size, 0.5)
    return (
        _stripe(rng, leaves, radii, size)
        if PATTERNS[pattern] == "striped"
        else replace(leaves, swings=np.zeros((n, 3)))
    )


def _stripe(rng: Rng, leaves: Leaves, radii: Array, size: int) -> Leaves:
    """Paint n leaves of radii (n, 2) with strong stripes, about two or more per radius and wide enough for pixels."""
    n = len(radii)
    wavelengths = np.maximum(radii.mean(axis=1) * rng.uniform(0.35, 0.55, n), 3.5 * 2 / size)
    directions = rng.uniform(0, 2 * np.pi, n)
    waves = np.stack([np.cos(directions), np.sin(directions)], axis=1) * (2 * np.pi / wavelengths)[:, None]
    swings = (rng.uniform(0.3, 0.6, (n, 1)) * (1, 0, 0) + rng.normal(0, (0, 0.1, 0.05), (n, 3))) @ COLOUR_AXES
    # Half-way to grey, so that no half of a stripe becomes black or white.
    return replace(leaves, colours=(leaves.colours + 0.5) / 2, waves=waves, swings=swings)


def _occluder(rng: Rng, size: int) -> Leaves:
    """Draw one leaf that may cover a part of the objects."""
    radii, centre = rng.uniform(0.2, 0.4, (1, 2)), rng.uniform(-0.8, 0.8, (1, 2))
    outline = _place(OUTLINES[rng.integers(0, 2, 1)], radii, centre, rng.uniform(0, 2 * np.pi, 1))
    return _surface(rng, outline, _colours(rng, 1, 1.0), size, 1.0)


def _stack(draw: Callable[[Rng, int], Array], count: int, size: int, seed: int, stream: int) -> torch.Tensor:
    """Return draw(rng, i) for i < count as (count, 3, size, size), with a separate generator for each image."""
    images = np.empty((count, 3, size, size), np.uint8)
    for i in range(count):
        # The spawn key makes the images, and the two functions below, independent under one seed.
        images[i] = draw(np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream, i))), i)
    return torch.from_numpy(images)


def dead_leaves(count: int, size: int, *, seed: int) -> torch.Tensor:
    """Draw dead-leaves images: uint8 (count, 3, size, size), image i the same for every count.

    >>> dead_leaves(2, 32, seed=0).shape
    torch.Size([2, 3, 32, 32])
    """

    def draw(rng: Rng, _: int) -> Array:
        return _develop(rng, _render(rng, _scatter(rng, size, 1.0), size))

    return _stack(draw, count, size, seed, 0)


def inverted() -> torch.Tensor:
    """Inverted images of the built-in network: uint8 (400, 3, 32, 32), its classes in turn.

    tests/benchmarks/pack_builtin.py made them from dead leaves, by gradient descent on the network's statistics (Yin et
    al. 2020, "Dreaming to Distill"). They contain no picture of a data set.
    """
    with Image.open(INVERTED) as sheet:
        pixels = np.asarray(sheet)  # (20 * 32, 20 * 32, 3)
    tiles = pixels.reshape(20, 32, 20, 32, 3).transpose(0, 2, 4, 1, 3)
    return torch.from_numpy(tiles.reshape(400, 3, 32, 32).copy())


def demo_images(count: int, size: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw labelled images of CLASS_NAMES: uint8 (count, 3, size, size) and int64 (count,), classes in turn.

    Shape and pattern determine the class. Colour, place, size, angle, number, light and background are independent.
    """
    labels = torch.arange(count) % len(CLASS_NAMES)

    def draw(rng: Rng, i: int) -> Array:
        leaves = _objects(rng, i % len(CLASS_NAMES), size).on_top(_scatter(rng, size, 0.25))
        if rng.random() < 1 / 3:
            leaves = _occluder(rng, size).on_top(leaves)
        return _develop(rng, _render(rng, leaves, size))

    return _stack(draw, count, size, seed, 1), labels


def write_folder(target: Path, images: torch.Tensor, labels: torch.Tensor, names: Sequence[str]) -> None:
    """Write uint8 images (n, 3, h, w) as target/CLASS/NNNNN.png, numbered across the classes."""
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        folder = target / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:05d}.png")
