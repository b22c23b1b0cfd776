"""Which output of a suspect is which class is which carrier: from names, from order, or from labelled images.

Carriers are counted here and never looked at: a pairing that depended on them would void the p-value.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy import optimize
from torch import Tensor

from radiotag.errors import RadiotagError
from radiotag.keys import Key
from radiotag.manifest import marked_rows, read_header, recorded_rows
from radiotag.networks import Spec
from radiotag.radioactive import output_unknown
from radiotag.suspect import ComparedClasses, Suspect

ENOUGH_IMAGES = 5  # of a class, to contradict what a suspect's file says of its outputs
MISFIT = "give --data with labelled, unmarked images, or name the classes marked with --marked MANIFEST"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairing:
    """Outputs of a suspect with the carriers that they are compared with, and the classes' names if they are known."""

    outputs: tuple[int, ...]  # of the suspect, one a class
    rows: tuple[int, ...]  # the carrier of each
    names: tuple[str, ...] = ()  # of these classes; none where nobody names them
    besides: tuple[str, ...] = ()  # further classes that the suspect knows
    labels: tuple[int, ...] | None = None  # (N,) of the images: positions in `outputs`, −1 for other classes
    assumed: bool = False  # it rests on order, or on the suspect's file alone

    def compared(self, marker_names: Sequence[str]) -> ComparedClasses:
        """All but the carriers, with the marking network's outputs for the same classes."""
        place = {name: i for i, name in enumerate(marker_names)}
        known = bool(self.names) and set(self.names) <= place.keys()
        return ComparedClasses(
            outputs=self.outputs,
            labels=self.labels,
            marker_outputs=tuple(place[name] for name in self.names) if known else None,
            marker_besides=tuple(place[name] for name in self.besides if name in place) if known else (),
        )


def pair(key: Key, suspect: Suspect, labels: Sequence[str], manifest: Path | None) -> Pairing:
    """Pair a suspect's outputs with carriers; labels (N,) are the images' class names, "" or none at all.

    With labels of classes that the key knows, the images tell which output is which class. RadiotagError if key and
    suspect do not fit; no output at all if the suspect knows none of the images' classes.
    """
    spec = suspect.network.spec
    rows = class_rows(key, [name for name in labels if name], manifest, spec.class_names)
    if rows:
        return _pair_labelled(key, suspect, labels, manifest, rows)
    pairs = pair_unlabelled(key, spec, manifest)
    known = spec.class_names or (tuple(key.class_names) if key.class_names else ())
    names = tuple(known[output] for output, _ in pairs) if len(known) == spec.classes else ()
    return Pairing(
        outputs=tuple(output for output, _ in pairs),
        rows=tuple(row for _, row in pairs),
        names=names,
        besides=tuple(name for name in dict.fromkeys(known) if name not in names),
        assumed=not output_unknown([row for _, row in pairs]),
    )


# ---------------------------------------------------------------- what a manifest says


def marked_classes(key: Key, manifest: Path) -> dict[str, int]:
    """Class → carrier row of what a manifest records as marked. RadiotagError if another key marked it."""
    header = read_header(manifest)
    if header.get("fingerprint") != key.fingerprint:
        raise RadiotagError(
            f"{manifest} was made with key {header.get('fingerprint')}, this is {key.fingerprint}",
            "give the key that marked the folder",
        )
    return {row["class"]: int(row["row"]) for row in marked_rows(manifest)}


# ---------------------------------------------------------------- without labelled images


def pair_unlabelled(key: Key, spec: Spec, manifest: Path | None) -> list[tuple[int, int]]:
    """(suspect output, carrier row) pairs without labelled images: by name where both have names, else in order.

    Where a single class was marked, every output is paired with its carrier: which one it became is not known. With a
    manifest only the classes marked there are used. RadiotagError if key and suspect do not fit.
    """
    pairs = _unlabelled_pairs(key, spec, manifest)
    if not pairs or max(row for _, row in pairs) >= len(key.carriers):
        how = "paired in order" if pairs else "no class in common"
        sizes = f"{len(key.carriers)} carriers, a suspect of {spec.classes} outputs"
        raise RadiotagError(f"the key does not fit: {sizes}, {how}", MISFIT)
    return pairs


def _unlabelled_pairs(key: Key, spec: Spec, manifest: Path | None) -> list[tuple[int, int]]:
    theirs, ours = spec.class_names, key.class_names
    marked = marked_classes(key, manifest) if manifest else {}
    if marked.keys() == {""} or (len(key.carriers) == 1 and not (ours and theirs)):
        return [(output, 0) for output in range(spec.classes)]
    if manifest:
        return _pairs_of_manifest(spec, marked, manifest)
    if ours and theirs:
        return [(theirs.index(name), row) for row, name in enumerate(ours) if name in theirs]
    if ours and len(ours) != spec.classes:
        counts = f"the key names {len(ours)} classes, the suspect has {spec.classes} outputs without names"
        raise RadiotagError(counts, MISFIT)
    return [(i, i) for i in range(min(spec.classes, len(key.carriers) + 1))]


def _pairs_of_manifest(spec: Spec, marked: dict[str, int], manifest: Path) -> list[tuple[int, int]]:
    """The marked classes: outputs by the suspect's names, else in the sorted order of all classes recorded."""
    rows = {row["class"]: int(row["row"]) for row in recorded_rows(manifest)}
    numbered = all(name == str(row) for name, row in rows.items())  # a shard's classes, of which some may be absent
    if numbered and not spec.class_names:
        outputs = rows
    else:
        outputs = {name: i for i, name in enumerate(spec.class_names or sorted(rows))}
    return [
        (outputs[name], row) for name, row in sorted(marked.items()) if outputs.get(name, spec.classes) < spec.classes
    ]


# ---------------------------------------------------------------- with labelled images


def class_rows(
    key: Key, labels: Sequence[str], manifest: Path | None, suspect_names: Sequence[str] | None = None
) -> dict[str, int]:
    """Carrier row of each class of labelled images: the manifest's, the key's by name, or as `mark` numbers them.

    A key without names numbers a folder's classes in sorted order; the suspect's names tell of classes that the images
    lack. Empty for images of no known class.
    """
    if manifest:
        known = marked_classes(key, manifest)
    elif key.class_names is not None:
        known = {name: row for row, name in enumerate(key.class_names)}
    else:
        known = _rows_in_order(key, set(labels), suspect_names)
    return {name: known[name] for name in sorted(set(labels)) if name in known}


def _rows_in_order(key: Key, labels: set[str], suspect_names: Sequence[str] | None) -> dict[str, int]:
    whole = suspect_names is not None and labels <= set(suspect_names) and len(suspect_names) <= len(key.carriers)
    order = sorted(suspect_names if suspect_names and whole else labels)
    if len(order) > len(key.carriers):
        raise RadiotagError(
            f"the key does not fit: {len(key.carriers)} carriers, images of {len(order)} classes",
            "name the classes marked with --marked MANIFEST, or use the key that marked the data",
        )
    return {name: row for row, name in enumerate(order)}


def _pair_labelled(
    key: Key, suspect: Suspect, labels: Sequence[str], manifest: Path | None, rows: dict[str, int]
) -> Pairing:
    """Outputs and carriers of the labelled images' classes that the suspect knows."""
    spec, shown = suspect.network.spec, tuple(sorted({*labels} - {""}))
    outputs = dict(zip(rows, _outputs(key, suspect, labels, rows), strict=True))
    outputs = {name: output for name, output in outputs.items() if output >= 0}
    names = tuple(outputs)
    known = shown if 1 < len(shown) <= spec.classes else spec.class_names or ()
    place = {name: i for i, name in enumerate(names)}
    numbered = key.class_names is None and manifest is None and set(spec.class_names or ()) != set(labels)
    paired = [rows[name] for name in names]
    return Pairing(
        outputs=tuple(outputs.values()),
        rows=tuple(paired),
        names=names,
        besides=tuple(name for name in dict.fromkeys(known) if name not in {*names, *rows}),
        labels=tuple(place.get(name, -1) for name in labels),
        assumed=numbered and len(key.carriers) > 1 and not output_unknown(paired),
    )


def _outputs(key: Key, suspect: Suspect, labels: Sequence[str], rows: dict[str, int]) -> list[int]:
    """The output of each class in `rows`; −1 where the suspect does not know it."""
    told = _named_outputs(key, suspect.network.spec, list(rows))
    if told is not None and min(map(list(labels).count, rows)) < ENOUGH_IMAGES:
        return told
    return match_outputs(mean_probabilities(suspect.log_probabilities, labels, list(rows)), told)


def _named_outputs(key: Key, spec: Spec, names: Sequence[str]) -> list[int] | None:
    """The outputs of some classes by the names in the suspect's file, else in the usual sorted order; or None."""
    numbers = [str(number) for number in range(spec.classes)]  # which do not sort as their names do
    counted = key.class_names is not None and key.class_names[: spec.classes] == numbers
    for order in (spec.class_names, key.class_names, numbers if counted else names):
        if order and len(order) == spec.classes and set(names) <= set(order):
            return [list(order).index(name) for name in names]
    return None


def mean_probabilities(log_probabilities: Tensor, labels: Sequence[str], names: Sequence[str]) -> Tensor:
    """(L, C') mean probabilities of the images of each name, of log-probabilities (N, C')."""
    probabilities = log_probabilities.exp()
    return torch.stack([probabilities[[label == name for label in labels]].mean(0) for name in names])


def match_outputs(means: Tensor, named: Sequence[int] | None = None) -> list[int]:
    """Which output is which class: (L, C') mean probabilities of each class's images → one a class, no two the same.

    Hungarian assignment, of the largest sum. `named` is what the suspect's file says: it is believed of each class
    unless the images contradict it, by twice as much. A class that gets no more than chance, and is not named, has
    none: −1.
    """
    classes, columns = optimize.linear_sum_assignment(-means.numpy())
    best = [-1] * len(means)
    for row, column in zip(classes, columns, strict=True):
        best[row] = int(column) if float(means[row, column]) > 1 / max(2, means.shape[1]) else -1
    outputs = list(best)
    for row, output in enumerate(named or ()):
        if best[row] < 0 or float(means[row, output]) >= 0.5 * float(means[row, best[row]]):
            outputs[row] = output
    while twice := {output for output in outputs if output >= 0 and outputs.count(output) > 1}:
        outputs = [best[row] if output in twice else output for row, output in enumerate(outputs)]
    return outputs
