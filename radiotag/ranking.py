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
import torch.nn.functional as F
from torch import Tensor

from radiotag.keys import PATTERNED
from radiotag.networks import Network
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
    """The features φ (count, d) float16 of images (3, S, S) in [0, 1], NaN for those that cannot be read (None).

    S is the network's size: as many photographs of a camera's size would not fit into memory. 200,000 images' features
    take 200 MB. tell(done) reports progress.
    """
    found = torch.full((count, network.dimension), torch.nan, dtype=torch.float16)
    numbered = enumerate(images)
    while batch := list(islice(numbered, batch_size)):
        usable = [(i, image) for i, image in batch if image is not None]
        if usable:
            pixels = padded(torch.stack([image for _, image in usable]))
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
    size, classes = features.shape[1] + 1, int(labels.max()) + 1
    gram = torch.zeros(FOLDS, size, size, dtype=torch.float64)
    products = torch.zeros(FOLDS, classes, size, dtype=torch.float64)
    for part, target, number in _blocks(features, labels, folds):
        for i in range(FOLDS):
            mine = part[number == i]
            gram[i] += mine.T @ mine
            products[i].index_add_(0, target[number == i], mine)
    others = [torch.arange(FOLDS) != i for i in range(FOLDS)]
    weights = [ridge_classifier(gram[rest].sum(0), products[rest].sum(0)) for rest in others]
    found = []
    for part, target, number in _blocks(features, labels, folds):
        margin = torch.empty(len(part), dtype=torch.float64)
        for i, matrix in enumerate(weights):
            mine = number == i
            scores = part[mine] @ matrix  # (n, C)
            own = scores.gather(1, target[mine, None])[:, 0]
            rival = scores.scatter(1, target[mine, None], -torch.inf).amax(1)
            margin[mine] = own - rival
        found.append(margin)
    return torch.cat(found)


def _blocks(features: Tensor, labels: Tensor, folds: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(n, d + 1) features and a one for the bias, (n,) labels, (n,) folds of some images at a time."""
    for start in range(0, len(features), TOGETHER):
        block = slice(start, start + TOGETHER)
        yield F.pad(features[block].double(), (0, 1), value=1.0), labels[block], folds[block]


def ridge_classifier(gram: Tensor, products: Tensor) -> Tensor:
    """The ridge regression of class membership on features, both centred: (d + 1, C), the bias in the last row.

    With X (N, d + 1), features and ones, and Y (N, C), ones for the classes: gram = XᵀX, products = YᵀX (C, d + 1).
    """
    gram, products = gram / gram[-1, -1].clamp_min(1), products / gram[-1, -1].clamp_min(1)
    mean, share = gram[-1, :-1], products[:, -1]
    scatter = gram[:-1, :-1] - torch.outer(mean, mean)
    scatter.diagonal().add_(PENALTY * float(scatter.diagonal().mean()) + 1e-12)
    matrix = torch.linalg.solve(scatter, products[:, :-1].T - torch.outer(mean, share))  # (d, C)
    return torch.cat([matrix, (share - mean @ matrix)[None]])
