"""Which images should carry marks: those that are hard to tell from other classes.

An easy image teaches a network nothing after a few epochs. A hard one keeps asking for whatever tells its class, and a
mark does. The marking network need not know the classes: a ridge classifier is fitted to its features of the data set's
own images, and each image is judged by a classifier that was fitted without it. The order depends on images, labels and
the public marking network alone, never on a suspect; carriers stay a fresh uniform draw.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from radiotag.keys import PATTERNED
from radiotag.networks import Network, resized
from radiotag.radioactive import padded

FOLDS = 5
PENALTY = 0.1  # of the ridge classifier, relative to the mean variance of the features
ENOUGH = 0.1  # of a class: more marks go to further classes
POOL = 2  # as many hard images are in question as are marked
TOGETHER = 4096  # images whose scores are in memory at once


class Choice(NamedTuple):
    """Relative paths of the images to mark, and of those among them that carry their class's pattern."""

    marked: frozenset[str]
    patterned: frozenset[str]

    def __or__(self, other: "Choice") -> "Choice":
        return Choice(self.marked | other.marked, self.patterned | other.patterned)


NOTHING = Choice(frozenset(), frozenset())


def allot(sizes: Mapping[str, int], fraction: float, *, spread: bool) -> dict[str, int]:
    """How many images of each class are marked; sizes: class → its images, in the key's secret order of classes.

    `fraction` is the share of the whole data set. What a network learns of a mark grows with the share of its class, so
    that few marks say more in few classes: below ENOUGH, the first classes of the order get this share each. With
    `spread`, or above, each class gets the same share, and one image at least.
    """
    if spread or fraction >= ENOUGH:
        return {name: _part(size, fraction) for name, size in sizes.items()}
    budget, found = _part(sum(sizes.values()), fraction), {}
    for name, size in sizes.items():
        found[name] = min(budget, _part(size, ENOUGH))
        budget -= found[name]
    return found


def _part(size: int, share: float) -> int:
    return min(size, max(1, round(share * size))) if share > 0 else 0


def choose_hard(ranked: Sequence[str], images: int, earlier: Choice, order: Callable[[str], bytes]) -> Choice:
    """Choose a number of one class's images, hardest first. `order` is the key's secret order of paths.

    The patterns go to images that the secret picks among the POOL times as many hardest: an exact ranking, which
    anybody could repeat, would tell which images to average. The other marks go to any image. What was chosen earlier
    stays so, and counts.
    """
    patterns = min(images, _part(len(ranked), PATTERNED))
    hard = sorted(ranked[: POOL * patterns], key=order)[:patterns]
    marked = [path for path in ranked if path in earlier.marked]
    patterned = [path for path in marked if path in earlier.patterned]
    room = max(0, min(patterns - len(patterned), images - len(marked)))
    fresh = [path for path in hard if path not in earlier.marked][:room]
    others = sorted(frozenset(ranked) - earlier.marked - frozenset(fresh), key=order)
    rest = others[: max(0, images - len(marked) - len(fresh))]
    return Choice(frozenset((*marked, *fresh, *rest)), frozenset((*patterned, *fresh)))


def by_hardness(labels: Mapping[str, str], features: Tensor) -> dict[str, list[str]]:
    """Class → paths, hardest first. labels: path → class; features: (N, d) in the same order, NaN for unread images."""
    names = {name: number for number, name in enumerate(sorted(set(labels.values())))}
    readable = features.isfinite().all(1)  # (N,)
    numbers = torch.tensor([names[label] for label in labels.values()])
    folds = torch.tensor([fold(path) for path in labels])
    found = torch.full((len(features),), torch.inf, dtype=torch.float64)
    if bool(readable.any()):
        found[readable] = margins(features[readable], numbers[readable], folds[readable])
    ranked: dict[str, list[str]] = {name: [] for name in names}
    for _, path in sorted(zip(found.tolist(), labels, strict=True)):
        ranked[labels[path]].append(path)
    return ranked


@torch.no_grad()
def features_of(
    network: Network, images: Iterable[Tensor | None], count: int, batch_size: int, tell: Callable[[int], None]
) -> Tensor:
    """The features φ (count, d) float16 of whole images (3, H, W) in [0, 255], NaN for those that cannot be read.

    tell(done) reports progress. 200,000 images take 200 MB.
    """
    found = torch.full((count, network.dimension), torch.nan, dtype=torch.float16)
    numbered, size = enumerate(images), network.spec.image_size
    while batch := list(islice(numbered, batch_size)):
        usable = [(i, image) for i, image in batch if image is not None]
        if usable:
            pixels = padded(torch.cat([resized(image[None] / 255, size) for _, image in usable]))
            phi = network.features(pixels.to(network.device))[: len(usable)].cpu()
            found[[i for i, _ in usable]] = phi.clamp(-60_000, 60_000).half()
        tell(batch[-1][0] + 1)
    return found


def fold(path: str) -> int:
    """The fold of an image, by its path alone: images added later change no other image's fold."""
    return hashlib.sha256(os.fsencode(path)).digest()[0] % FOLDS


def margins(features: Tensor, labels: Tensor, folds: Tensor) -> Tensor:
    """How surely images are told from other classes: (N, d) features φ, (N,) labels, (N,) folds → (N,) float64.

    The score of an image's own class less that of its strongest rival, by the ridge classifier of the other folds.
    There are two classes at least. Memory grows with d² and with d times the number of classes, not with N.
    """
    classes = int(labels.max()) + 1
    sums = [_Sums(features.shape[1], classes) for _ in range(FOLDS)]
    for part, target, number in _blocks(features, labels, folds):
        for i in range(FOLDS):
            sums[i].add(part[number == i], target[number == i])
    weights = [_Sums.total([s for j, s in enumerate(sums) if j != i]).solve() for i in range(FOLDS)]
    found = []
    for part, target, number in _blocks(features, labels, folds):
        margin = torch.empty(len(part), dtype=torch.float64)
        for i, (matrix, bias) in enumerate(weights):
            mine = number == i
            scores = part[mine] @ matrix + bias  # (n, C)
            own = scores.gather(1, target[mine, None])[:, 0]
            rival = scores.scatter(1, target[mine, None], -torch.inf).amax(1)
            margin[mine] = own - rival
        found.append(margin)
    return torch.cat(found)


def _blocks(features: Tensor, labels: Tensor, folds: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for start in range(0, len(features), TOGETHER):
        block = slice(start, start + TOGETHER)
        yield features[block].double(), labels[block], folds[block]


class _Sums:
    """What a ridge regression of class membership on features needs to know of some images."""

    def __init__(self, dimension: int, classes: int) -> None:
        self.count = 0
        self.features = torch.zeros(dimension, dtype=torch.float64)
        self.members = torch.zeros(classes, dtype=torch.float64)
        self.gram = torch.zeros(dimension, dimension, dtype=torch.float64)
        self.products = torch.zeros(classes, dimension, dtype=torch.float64)

    def add(self, features: Tensor, labels: Tensor) -> None:
        self.count += len(features)
        self.features += features.sum(0)
        self.members += torch.bincount(labels, minlength=len(self.members))
        self.gram += features.T @ features
        self.products.index_add_(0, labels, features)

    @staticmethod
    def total(parts: Sequence["_Sums"]) -> "_Sums":
        whole = _Sums(len(parts[0].features), len(parts[0].members))
        for part in parts:
            for name in ("count", "features", "members", "gram", "products"):
                setattr(whole, name, getattr(whole, name) + getattr(part, name))
        return whole

    def solve(self) -> tuple[Tensor, Tensor]:
        """The classifier's matrix (d, C) and bias (C,)."""
        n = max(1, self.count)
        mean, share = self.features / n, self.members / n
        gram = self.gram / n - torch.outer(mean, mean)
        gram.diagonal().add_(PENALTY * float(gram.diagonal().mean()) + 1e-12)
        matrix = torch.linalg.solve(gram, self.products.T / n - torch.outer(mean, share))
        return matrix, share - mean @ matrix
