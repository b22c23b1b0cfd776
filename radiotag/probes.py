"""The unmarked images that suspects are shown: synthetic ones, a folder's, or arrays in memory."""

import hashlib
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from radiotag.cosines import pattern_coefficients
from radiotag.errors import BrokenImage, RadiotagError, none_readable
from radiotag.files import file_hash
from radiotag.images import decode
from radiotag.listing import list_folder
from radiotag.manifest import marked_hashes, marked_rows
from radiotag.networks import SMALL_IMAGE, Network, channels_first, resized
from radiotag.suspect import (
    FEW_IMAGES,
    MANY_IMAGES,
    Batching,
    ClassVectors,
    Reference,
    center_over_classes,
    whitening,
)
from radiotag.synthetic import dead_leaves, inverted

ALIGNMENT_IMAGES = 2000  # upper limit for the alignment of two feature spaces; with many classes, up to MANY_IMAGES
ENOUGH_ORIGINALS = FEW_IMAGES  # of marked images, of a class
SYNTHETIC_SEED = 20200702  # fixed, so that the images cannot be chosen after seeing a suspect
LARGE_INPUT = 448  # pixels; beyond this size fewer images are used
Tell = Callable[[str, int, int], None]  # (activity, number done, total)


def at_most(images: int, size: int) -> int:
    """A number of images, reduced if their size (pixels) is above LARGE_INPUT, so that they fit in memory."""
    return min(images, round(images * (LARGE_INPUT / size) ** 2))


def synthetic_images(size: int) -> Tensor:
    """(N, 3, size, size) float in [0, 1], the same for every suspect: dead leaves, with inverted images if small."""
    if size > SMALL_IMAGE:
        return dead_leaves(at_most(ALIGNMENT_IMAGES // 2, size), size, seed=SYNTHETIC_SEED).float().div_(255)
    from_network = resized(inverted()[: ALIGNMENT_IMAGES // 5].float() / 255, size).clamp(0, 1)
    leaves = dead_leaves(ALIGNMENT_IMAGES - len(from_network), size, seed=SYNTHETIC_SEED).float() / 255
    return torch.cat([leaves, from_network])


# ---------------------------------------------------------------- real images


class UnmarkedImages(Protocol):
    """Real images that a suspect is shown; they must be unmarked."""

    name: str  # for messages
    labels: Sequence[str]  # class names, "" for none
    paths: Sequence[str]  # as in a manifest
    broken: list[str]  # paths of those that could not be read

    def digests(self) -> list[str]:
        """SHA-256 of each image's content, hexadecimal."""

    def read(self, i: int) -> Tensor:
        """Image i, (3, H, W) float in [0, 255]."""


class FolderImages:
    """A folder's images. RadiotagError for reading a marked one.

    Marked images are known from the given manifest, and from manifests beside the folder or beside its parents.
    """

    def __init__(self, folder: Path, manifest: Path | None = None) -> None:
        items, _, _ = list_folder(folder)
        self.folder, self.name = folder, str(folder)
        self.labels: Sequence[str] = [item.label for item in items]
        self.paths: Sequence[str] = [item.path.as_posix() for item in items]
        self.broken: list[str] = []
        self._digests: list[str] | None = None
        self._marked = marked_hashes(marked_rows(manifest))
        for parent in (folder, *folder.resolve().parents, folder.resolve()):
            manifest_path = parent.with_name(f"{parent.name}.manifest.jsonl") if parent.name else parent
            self._marked |= marked_hashes(marked_rows(manifest_path if manifest_path.is_file() else None))

    def digests(self) -> list[str]:
        """SHA-256 of each file, hexadecimal; each file is read once."""
        if self._digests is None:
            self._digests = [file_hash(self.folder / path) for path in self.paths]
        return self._digests

    def read(self, i: int) -> Tensor:
        """Image i, (3, H, W) float in [0, 255]. BrokenImage if it cannot be read."""
        path = self.folder / self.paths[i]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BrokenImage(f"cannot read {path}: {error.strerror}", "replace or remove the file") from error
        if hashlib.sha256(data).hexdigest() in self._marked:
            raise RadiotagError(
                f"{path} is marked: aligning on marked images would void the p-value",
                "give --data a folder of unmarked images, or leave it out",
            )
        return channels_first(decode(data, str(path)).rgb)


class ArrayImages:
    """Images in memory: (N, 3, H, W) uint8, and their class names."""

    def __init__(self, images: Tensor, labels: Sequence[str]) -> None:
        self.name, self._images = "the images given", images
        self.labels: Sequence[str] = labels
        self.paths: Sequence[str] = [str(i) for i in range(len(images))]
        self.broken: list[str] = []

    def digests(self) -> list[str]:
        """SHA-256 of each image's pixels, hexadecimal."""
        return [hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest() for image in self._images]

    def read(self, i: int) -> Tensor:
        """Image i, (3, H, W) float in [0, 255]."""
        return self._images[i].float()


class SomeImages:
    """Some of the images."""

    def __init__(self, whole: UnmarkedImages, chosen: Sequence[int]) -> None:
        self.name, self._whole, self._chosen = whole.name, whole, chosen
        self.broken = whole.broken
        self.labels: Sequence[str] = [whole.labels[i] for i in chosen]
        self.paths: Sequence[str] = [whole.paths[i] for i in chosen]

    def digests(self) -> list[str]:
        """SHA-256 of each image's content, hexadecimal."""
        every = self._whole.digests()
        return [every[i] for i in self._chosen]

    def read(self, i: int) -> Tensor:
        """Image i, (3, H, W) float in [0, 255]."""
        return self._whole.read(self._chosen[i])


def readable(data: UnmarkedImages, i: int) -> Tensor | None:
    """Image i, (3, H, W) float in [0, 255]; None if it cannot be read, which is noted."""
    try:
        return data.read(i)
    except BrokenImage:
        if data.paths[i] not in data.broken:
            data.broken.append(data.paths[i])
        return None


def originals(data: UnmarkedImages, manifest: Path | None) -> UnmarkedImages:
    """Of each class, the originals of the images that carry its pattern, by their content; of others, all images.

    What a suspect trained from scratch has learnt of a mark, it answers most clearly at what it was trained on. Fewer
    originals of a class than ENOUGH_ORIGINALS are left to chance, so that all its images serve. The manifest was
    written before the suspect was made, and knows nothing of it.
    """
    sources = {row["sha256_in"] for row in marked_rows(manifest) if row.get("pattern", True)}
    mine = [digest in sources for digest in data.digests()] if sources else [False] * len(data.labels)
    count = Counter(label for label, original in zip(data.labels, mine, strict=True) if original)
    classes = {label for label, originals_of_it in count.items() if originals_of_it >= ENOUGH_ORIGINALS}
    chosen = [i for i, label in enumerate(data.labels) if mine[i] or label not in classes]
    return SomeImages(data, chosen) if classes else data


def class_means(reference: Reference, names: Sequence[str], batching: Batching) -> ClassVectors:
    """The vectors of the images themselves, one row per class: the means of their features and low frequencies.

    Whoever shows marked images as unmarked shows it here. The parts that classes share are removed, and directions in
    which images vary most get less weight, as in a suspect's vectors.
    """
    labels = torch.tensor([names.index(name) if name in names else -1 for name in reference.labels])
    chosen, labels = labels >= 0, labels[labels >= 0]
    phi = reference.features(batching)[chosen]  # (N, d)
    waves = pattern_coefficients(reference.pixels[chosen])  # (N, m)
    return ClassVectors(
        features=_whitened_means(phi, labels, len(names)), pattern=_whitened_means(waves, labels, len(names))
    )


def _whitened_means(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """(N, d) values of N labelled images → (C, d): their means over each class, centred and whitened."""
    count = torch.bincount(labels, minlength=classes).clamp_min(1)[:, None]  # (C, 1)
    means = values.new_zeros(classes, values.shape[1]).index_add_(0, labels, values) / count
    deviations = values - means[labels]
    return center_over_classes(means) @ whitening(deviations.T @ deviations / max(1, len(deviations)))


def spread_over_classes(labels: Sequence[str], interval: int) -> list[int]:
    """Positions (sorted) of one of `interval` images, of every class alike, in whatever order they lie."""
    by_class = sorted(range(len(labels)), key=labels.__getitem__)  # stable
    return sorted(by_class[::interval])


def even_over_classes(labels: Sequence[str], limit: int) -> list[int]:
    """Positions (sorted) of `limit` images, or of all: of every class as many up to one, or all that it has."""
    by_class: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        by_class.setdefault(label, []).append(i)
    sizes = {name: len(places) for name, places in by_class.items()}
    each = bisect_right(range(1, limit + 1), limit, key=lambda each: sum(min(size, each) for size in sizes.values()))
    counts = {name: min(each, size) for name, size in sizes.items()}
    larger = [name for name, size in sizes.items() if size > each]
    more = min(len(larger), limit - sum(counts.values()))  # which do not suffice for one more of every class
    counts |= {larger[number * len(larger) // more]: each + 1 for number in range(more)}
    taken = list[int]()
    for name, places in by_class.items():
        taken += (places[number * len(places) // counts[name]] for number in range(counts[name]))
    return sorted(taken)


def real_images(data: UnmarkedImages, size: int, tell: Tell, *, evenly: bool = True) -> tuple[Tensor, list[str]]:
    """(N, 3, size, size) in [0, 1] and class names of at most ALIGNMENT_IMAGES images.

    If the images are small and have many classes, the limit is FEW_IMAGES per class, up to MANY_IMAGES. evenly: of
    every class as many; else of large classes more, as keys of versions up to 0.9 declare. What cannot be read is left
    out; RadiotagError if nothing can.
    """
    per_class = FEW_IMAGES if size <= SMALL_IMAGE else 0
    limit = max(at_most(ALIGNMENT_IMAGES, size), min(MANY_IMAGES, per_class * len(set(data.labels))))
    interval = max(1, math.ceil(len(data.labels) / limit))
    chosen = even_over_classes(data.labels, limit) if evenly else spread_over_classes(data.labels, interval)
    images, labels = [], []
    for done, i in enumerate(chosen, 1):
        if (image := readable(data, i)) is not None:
            images.append(resized(image[None] / 255, size))  # one by one: not all full-size images fit in memory
            labels.append(data.labels[i])
        tell("reading images", done, len(chosen))
    if not images:
        raise none_readable(data.name, data.broken[0])
    return torch.cat(images).clamp_(0, 1), labels


class References:
    """The reference for each input size. Only the last is cached: most suspects of a run have the same size."""

    def __init__(self, marker: Network, data: UnmarkedImages | None, *, evenly: bool = True) -> None:
        self.marker, self.data, self.evenly = marker, data, evenly
        self._last: Reference | None = None

    def at(self, size: int, tell: Tell) -> Reference:
        """The reference with images of (size, size) pixels."""
        if self._last is None or self._last.pixels.shape[3] != size:
            self._last = None  # frees its images before new ones are made
            if self.data is None:
                tell("drawing images", 0, 1)
                self._last = Reference(self.marker, synthetic_images(size))
            else:
                shown, labels = real_images(self.data, size, tell, evenly=self.evenly)
                self._last = Reference(self.marker, shown, labels, self.data.name)
        return self._last
