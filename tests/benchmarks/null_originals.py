"""The null of `verify --data --marked`: each fresh key chooses the originals that it asks with, as `mark` does.

    python tests/benchmarks/null_originals.py model.pt cifar10.zip --work bench-out --keys 20000

Here a key decides twice: it draws its carriers, and it picks the images that would carry its patterns among the hardest
of each class. So the class vectors are computed anew for every key, from gradients that are computed once: what the
package computes of one key's choice is compared with the package's own path first. `model.pt` knows the ten classes of
CIFAR-10; other owners may have marked what it was trained on.
"""

import argparse
import contextlib
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from evidence import machine, subset, unpacked
from null import DOCUMENT, NAMES, TABLES, counted
from tables import FOLDER, write
from torch import Tensor, nn

from radiotag import suspect as science
from radiotag.keys import Key, new_key
from radiotag.networks import Network, State, load_network, marking_weights
from radiotag.pairing import Pairing, Records, pair
from radiotag.plan import choose_hardest
from radiotag.probes import FolderImages
from radiotag.radioactive import evidence
from radiotag.ranking import NOTHING, POOL, by_hardness, features_of
from radiotag.suspect import Batching, ClassVectors, Reference, Suspect, aligned_rows, class_vectors

IMAGES, SHARE = 3000, 0.25  # of these images, equally many of each class; 75 of a class are asked with
NAME = "a manifest's classes, originals"


class Gradients(NamedTuple):
    """Of one network, for each image and output."""

    columns: Tensor  # (C',) the place of an output in the others, -1 for none
    directions: Tensor  # (N, C, d)
    patterns: Tensor  # (N, C, m)


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """All that is computed once: of the images that any key may choose, in the order of the folder."""

    reference: Reference
    suspect: Suspect
    ranked: dict[str, list[str]]  # class → paths, hardest first
    places: dict[str, int]  # path → place
    gradients: dict[nn.Module, Gradients]  # of both networks


def known(model: Path, folder: Path) -> Known:
    """Rank the images, and compute what both networks answer to those that may be chosen."""
    key, images, network = new_key(*marking_weights("builtin"), NAMES), FolderImages(folder), load_network(model)
    marker, every = key.network(), torch.stack([images.read(i) / 255 for i in range(len(images.labels))])
    features = features_of(marker, iter(every), len(every), 256, lambda _: None)
    ranked = by_hardness(dict(zip(images.paths, images.labels, strict=True)), features)
    may_be = {path for paths in ranked.values() for path in paths[: round(POOL * SHARE * len(paths))]}
    chosen = [i for i, path in enumerate(images.paths) if path in may_be]
    reference = Reference(marker, every[chosen], [images.labels[i] for i in chosen])
    suspect, usable = science.ask(network, reference, Batching())
    assert usable is reference, "images with answers that are not finite would be left out"
    names = marker.spec.class_names or ()
    return Known(
        reference=reference, suspect=suspect, ranked=ranked,
        places={images.paths[i]: place for place, i in enumerate(chosen)},
        gradients={
            network: gradients(marker, network, reference.pixels, range(len(NAMES))),
            marker: gradients(marker, marker, reference.pixels, [names.index(name) for name in NAMES]),
        },
    )  # fmt: skip


def gradients(marker: Network, network: Network, pixels: Tensor, outputs: Sequence[int]) -> Gradients:
    """What `gradient_responses` sums up, of N images and some outputs."""
    batching, parts = Batching(), []
    with science._forward_mode():
        for output in outputs:
            asked = ((x, torch.full((len(x), 1), output)) for x in batching.split(pixels, ""))
            found = [science._gradients(marker, network, *one) for one in asked]
            parts.append([torch.cat(each) for each in zip(*found, strict=True)])
    directions, patterns = (torch.cat(each, 1) for each in zip(*parts, strict=True))
    columns = torch.full((max(outputs) + 1,), -1)
    columns[list(outputs)] = torch.arange(len(outputs))
    return Gradients(columns, directions, patterns)


def asked(known: Known, key: Key, *, looked_up: bool = True) -> tuple[Pairing, ClassVectors]:
    """The class vectors by the originals that this key would choose, as `verification.examine` computes them."""
    wanted = {name: round(SHARE * len(paths)) for name, paths in known.ranked.items()}
    choice = choose_hardest(key, known.ranked, wanted, NOTHING)
    places = torch.tensor(sorted(known.places[path] for path in choice.patterned))
    reference, (network, answers, psi) = known.reference, known.suspect
    shown = reference.pixels[places]
    if looked_up:
        shown = places.double().view(-1, 1, 1, 1)  # in place of pixels: all that is computed of them is looked up
    some = Reference(reference.marker, shown, [reference.labels[i] for i in places.tolist()])
    some._features = reference.features(Batching())[places]
    suspect = Suspect(network, answers[places], None if psi is None else psi[places])
    pairing = pair(key, suspect, some.labels, Records())
    compared = pairing.compared(reference.marker.spec.class_names or (), others=key.by_every_class)
    with contextlib.ExitStack() as stack:
        if looked_up:
            stack.enter_context(mock.patch.object(science, "_gradients", partial(look_up, known)))
            stack.enter_context(mock.patch.object(science, "aligned_rows", without_the_papers))
        return pairing, class_vectors(some, suspect, compared, Batching(size=4096))


def look_up(
    known: Known, marker: Network, network: nn.Module, places: Tensor, outputs: Tensor
) -> tuple[Tensor, Tensor]:
    """In place of `suspect._gradients`."""
    at, found = places[:, 0, 0, 0].long()[:, None], known.gradients[network]
    return found.directions[at, found.columns[outputs]], found.patterns[at, found.columns[outputs]]


def without_the_papers(phi: Tensor, psi: Tensor, weight: Tensor, ridge: float) -> tuple[Tensor, float]:
    """In place of `suspect.aligned_rows`: the paper's least squares take most of the time, and are not tested here."""
    return aligned_rows(phi, psi, weight, ridge) if ridge else (torch.zeros(len(weight), phi.shape[1]).double(), 0.0)


def null_key(number_: int, marking: tuple[State, dict[str, Any], int]) -> Key:
    """A key that marked nothing, with a marking network as `marking_weights` gives it."""

    def entropy(count: int) -> bytes:
        return hashlib.shake_256(f"{NAME}{number_}".encode()).digest(count)

    return new_key(*marking, NAMES, entropy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a classifier of CIFAR-10")
    parser.add_argument("data", type=Path, help="cifar10.zip")
    parser.add_argument("--work", type=Path, default=Path("bench-out"))
    parser.add_argument("--keys", type=int, default=20_000)
    parser.add_argument("--json", type=Path, default=FOLDER / "null.json")
    a = parser.parse_args()
    started, folder = time.monotonic(), a.work / subset(a.work, unpacked(a.data, a.work).name, IMAGES)
    every, marking = known(a.model, folder), marking_weights("builtin")
    for number_ in range(3):
        by_package, here = (asked(every, null_key(number_, marking), looked_up=how) for how in (False, True))
        assert by_package[0] == here[0]
        torch.testing.assert_close(by_package[1].features, here[1].features)
        torch.testing.assert_close(by_package[1].pattern, here[1].pattern)
    found = np.empty(a.keys)
    for number_ in range(a.keys):
        key = null_key(number_, marking)
        pairing, vectors = asked(every, key)
        vectors = ClassVectors(features=vectors.features, pattern=vectors.pattern)
        found[number_] = evidence(vectors, pairing.rows, key.carriers, key.patterns).log_p
        if number_ % 1000 == 0:
            print(number_, f"{time.monotonic() - started:.0f} s", flush=True)
    done = json.loads(a.json.read_text()) if a.json.exists() else {}
    done[NAME] = counted(np.exp(found), conservative=False) | {"seconds": time.monotonic() - started, **machine()}
    a.json.write_text(json.dumps(done, indent=1, sort_keys=True) + "\n")
    if a.json.resolve() == FOLDER / "null.json":
        write(DOCUMENT, TABLES)
    print(NAME, done[NAME]["tail"])


if __name__ == "__main__":
    main()
