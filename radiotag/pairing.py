"""The pairing of a suspect's outputs with classes and carriers: by names, by order, or by labelled images.

This module counts carriers and never reads their values: a pairing that depended on them would void the p-value.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from scipy import optimize
from torch import Tensor

from radiotag.errors import RadiotagError
from radiotag.keys import Key
from radiotag.manifest import read_lines, recorded_classes
from radiotag.networks import Spec
from radiotag.radioactive import output_unknown
from radiotag.suspect import ComparedClasses, Suspect

ENOUGH_IMAGES = 5  # per class, needed to overrule what a suspect's file says about its outputs
MISFIT = "give --data with labelled, unmarked images, or name the classes marked with --marked MANIFEST"


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """What is known of classes and carriers beside the key and the suspect."""

    marked: Mapping[str, int] | None = None  # class → carrier row by a manifest: only classes marked there are tested
    recorded: Mapping[str, int] | None = None  # of all that the manifest records
    against_all: bool = False  # whether the recorded classes without a mark are compared, too, to see what they share
    published: Mapping[str, int] | None = None  # class → carrier row, by the public half of the marked data
    classes: tuple[str, ...] = ()  # of all images given, of which a suspect may be shown some

    @property
    def compared(self) -> Mapping[str, int] | None:
        """Class → carrier row of the manifest's classes that are compared; None without a manifest."""
        return self.recorded if self.against_all else self.marked


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairing:
    """A suspect's outputs, the carriers that they are compared with, and the names of the classes if known."""

    outputs: tuple[int, ...]  # of the suspect, one per class
    rows: tuple[int, ...]  # the carrier row of each output
    names: tuple[str, ...] = ()  # of these classes; empty if unknown
    besides: tuple[str, ...] = ()  # further classes that the suspect knows
    labels: tuple[int, ...] | None = None  # (N,) of the images: positions in `outputs`, −1 for other classes
    assumed: bool = False  # it relies on order, or on the suspect's file alone

    def compared(self, marker_names: Sequence[str], *, others: bool, few: bool = False) -> ComparedClasses:
        """The pairing without its carriers, plus the marking network's outputs for the same classes.

        others: whether images of other classes are asked, too; few: whether of photographs without labels few
        are asked.
        """
        position = {name: i for i, name in enumerate(marker_names)}
        complete = bool(self.names) and set(self.names) <= position.keys()
        return ComparedClasses(
            outputs=self.outputs,
            labels=self.labels,
            marker_outputs=tuple(position[name] for name in self.names) if complete else None,
            marker_besides=tuple(position[name] for name in self.besides if name in position) if complete else (),
            others=others,
            few=few,
        )

    def tested(self, records: Records) -> list[int]:
        """Positions of the classes that are tested: all, or those that a manifest records as marked."""
        rows = None if records.marked is None else set(records.marked.values())
        return [i for i, row in enumerate(self.rows) if rows is None or row in rows]

    def only(self, positions: Sequence[int]) -> "Pairing":
        """The pairing of some of its classes; the others are known besides."""
        place = {old: new for new, old in enumerate(positions)}
        left = tuple(name for i, name in enumerate(self.names) if i not in place)
        return replace(
            self,
            outputs=tuple(self.outputs[i] for i in positions),
            rows=tuple(self.rows[i] for i in positions),
            names=tuple(self.names[i] for i in positions) if self.names else (),
            besides=(*left, *self.besides),
            labels=None if self.labels is None else tuple(place.get(label, -1) for label in self.labels),
        )

    def image_rows(self, labels: Sequence[str]) -> dict[str, int]:
        """Class → carrier row of the labelled images; images of no class are of the only class that was marked."""
        if self.labels is not None:
            return dict(zip(self.names, self.rows, strict=True))
        return {"": self.rows[0]} if "" in labels and len(set(self.rows)) == 1 else {}


def pair(key: Key, suspect: Suspect, labels: Sequence[str], records: Records) -> Pairing:
    """Pair a suspect's outputs with carriers; labels (N,) are the images' class names ("" for none), or empty.

    If some labels are classes that the key knows, the images decide which output is which class. RadiotagError if key
    and suspect do not fit. The pairing is empty if the suspect knows none of the images' classes.
    """
    spec, named = suspect.network.spec, [name for name in labels if name]
    if named and (rows := class_rows(key, named, records, spec.class_names)):
        return _pair_labelled(key, suspect, labels, records, rows)
    pairs = pair_unlabelled(key, spec, records)
    class_names = spec.class_names or (tuple(key.class_names) if key.class_names else ())
    names = tuple(class_names[output] for output, _ in pairs) if len(class_names) == spec.classes else ()
    return Pairing(
        outputs=tuple(output for output, _ in pairs),
        rows=tuple(row for _, row in pairs),
        names=names,
        besides=tuple(name for name in dict.fromkeys(class_names) if name not in names),
        assumed=not output_unknown([row for _, row in pairs]),
    )


# ---------------------------------------------------------------- with a manifest


def marked_classes(key: Key, manifest: Path) -> dict[str, int]:
    """Class → carrier row of the images that a manifest records as marked. RadiotagError for another key's manifest."""
    _, header = next(read_lines(manifest))
    if header.get("fingerprint") != key.fingerprint:
        raise RadiotagError(
            f"{manifest} was made with key {header.get('fingerprint')}, this is {key.fingerprint}",
            "give the key that marked the folder",
        )
    return recorded_classes(manifest, len(key.carriers), marked=True)


# ---------------------------------------------------------------- without labelled images


def pair_unlabelled(key: Key, spec: Spec, records: Records) -> list[tuple[int, int]]:
    """(suspect output, carrier row) pairs without labelled images: by name if both sides have names, else in order.

    If a single class was marked, every output is paired with its carrier, because it is not known which output the
    class became. With a manifest, only its classes are used. RadiotagError if key and suspect do not fit.
    """
    pairs = _unlabelled_pairs(key, spec, records)
    if not pairs or max(row for _, row in pairs) >= len(key.carriers):
        how = "paired in order" if pairs else "no class in common"
        sizes = f"{len(key.carriers)} carriers, a suspect of {spec.classes} outputs"
        raise RadiotagError(f"the key does not fit: {sizes}, {how}", MISFIT)
    return pairs


def _unlabelled_pairs(key: Key, spec: Spec, records: Records) -> list[tuple[int, int]]:
    suspect_names, key_names, by_manifest = spec.class_names, key.class_names, records.marked is not None
    every = (records.recorded if by_manifest else None if key_names else records.published) or {}
    compared = every if records.compared is None else records.compared
    marked = every if records.marked is None else records.marked
    if marked.keys() == {""} or (len(key.carriers) == 1 and not (key_names and suspect_names)):
        return [(output, 0) for output in range(spec.classes)]
    if every and (by_manifest or not suspect_names or every.keys() & set(suspect_names)):
        return _pairs_of_records(key, spec, compared, every)
    if key_names and suspect_names:
        return [(suspect_names.index(name), row) for row, name in enumerate(key_names) if name in suspect_names]
    if key_names and len(key_names) != spec.classes:
        counts = f"the key names {len(key_names)} classes, the suspect has {spec.classes} outputs without names"
        raise RadiotagError(counts, MISFIT)
    return [(i, i) for i in range(min(spec.classes, len(key.carriers) + 1))]


def _pairs_of_records(
    key: Key, spec: Spec, compared: Mapping[str, int], every: Mapping[str, int]
) -> list[tuple[int, int]]:
    """Pairs of the compared classes: outputs by the suspect's names, or by the key's, else in sorted order of all."""
    named_by_row = all(name == str(row) for name, row in every.items())  # as in shards; some classes may be absent
    of_key = key.class_names if key.class_names and len(key.class_names) == spec.classes else None
    if named_by_row and not spec.class_names:
        outputs = dict(every)
    else:
        outputs = {name: i for i, name in enumerate(spec.class_names or of_key or sorted(every))}
    return [
        (outputs[name], row) for name, row in sorted(compared.items()) if outputs.get(name, spec.classes) < spec.classes
    ]


# ---------------------------------------------------------------- with labelled images


def class_rows(
    key: Key, labels: Sequence[str], records: Records, suspect_names: Sequence[str] | None = None
) -> dict[str, int]:
    """Class → carrier row for labelled images, by the manifest, the key's names or what was published.

    Else the key numbers a folder's classes as `mark` does, in sorted order. The suspect's names may add classes that
    the images lack. The result is empty if the images have no class that the key knows.
    """
    if records.compared is not None:
        all_rows = dict(records.compared)
    elif key.class_names is not None:
        all_rows = key.named_rows
    elif records.published is not None:
        all_rows = dict(records.published)
    else:
        all_rows = _rows_in_order(key, {*labels, *records.classes} - {""}, suspect_names)
    return {name: all_rows[name] for name in sorted(set(labels)) if name in all_rows}


def _rows_in_order(key: Key, labels: set[str], suspect_names: Sequence[str] | None) -> dict[str, int]:
    complete = suspect_names is not None and labels <= set(suspect_names) and len(suspect_names) <= len(key.carriers)
    order = sorted(suspect_names if suspect_names and complete else labels)
    if len(order) > len(key.carriers):
        raise RadiotagError(
            f"the key does not fit: {len(key.carriers)} carriers, images of {len(order)} classes",
            "name the classes marked with --marked MANIFEST, or use the key that marked the data",
        )
    return {name: row for row, name in enumerate(order)}


def _pair_labelled(
    key: Key, suspect: Suspect, labels: Sequence[str], records: Records, rows: dict[str, int]
) -> Pairing:
    """Pair the outputs and carriers of those classes of the labelled images that the suspect knows."""
    spec, image_classes = suspect.network.spec, tuple(sorted({*labels} - {""}))
    outputs = dict(zip(rows, _outputs(key, suspect, labels, rows), strict=True))
    outputs = {name: output for name, output in outputs.items() if output >= 0}
    names = tuple(outputs)
    known_names = image_classes if 1 < len(image_classes) <= spec.classes else spec.class_names or ()
    position = {name: i for i, name in enumerate(names)}
    every = {*image_classes, *records.classes} - {""}
    fewer = len(every) < len(key.carriers)  # where more classes were marked, their order was another
    named_alike = set(spec.class_names or ()) == every
    unrecorded = key.class_names is None and records.marked is None and records.published is None
    by_order = unrecorded and (fewer or not named_alike)
    carrier_rows = [rows[name] for name in names]
    return Pairing(
        outputs=tuple(outputs.values()),
        rows=tuple(carrier_rows),
        names=names,
        besides=tuple(name for name in dict.fromkeys(known_names) if name not in {*names, *rows}),
        labels=tuple(position.get(name, -1) for name in labels),
        assumed=by_order and len(key.carriers) > 1 and not output_unknown(carrier_rows),
    )


def _outputs(key: Key, suspect: Suspect, labels: Sequence[str], rows: dict[str, int]) -> list[int]:
    """The output of each class in `rows`; −1 if the suspect does not know the class."""
    named = _named_outputs(key, suspect.network.spec, list(rows))
    if named is not None and min(map(list(labels).count, rows)) < ENOUGH_IMAGES:
        return named
    return match_outputs(mean_probabilities(suspect.log_probabilities, labels, list(rows)), named)


def _named_outputs(key: Key, spec: Spec, names: Sequence[str]) -> list[int] | None:
    """The outputs of some classes, by the names in the suspect's file or the key, or in sorted order; else None."""
    numbers = [str(number) for number in range(spec.classes)]  # which do not sort as their names do
    counted = key.class_names is not None and key.class_names[: spec.classes] == numbers
    for order in (spec.class_names, key.class_names, numbers if counted else names):
        if order and len(order) == spec.classes and set(names) <= set(order):
            return [list(order).index(name) for name in names]
    return None


def mean_probabilities(log_probabilities: Tensor, labels: Sequence[str], names: Sequence[str]) -> Tensor:
    """(L, C') mean probabilities over the images of each of L names, from log-probabilities (N, C')."""
    probabilities = log_probabilities.exp()
    return torch.stack([probabilities[[label == name for label in labels]].mean(0) for name in names])


def match_outputs(means: Tensor, named: Sequence[int] | None = None) -> list[int]:
    """(L, C') mean probabilities of each class's images → one output per class, no two the same.

    The Hungarian assignment maximises the sum. `named` are the outputs by the suspect's file: each one is believed
    unless the images give another output more than twice its probability. A class has no output (−1) if its probability
    is not above chance and it is not named.
    """
    classes, columns = optimize.linear_sum_assignment(-means.numpy())
    best = [-1] * len(means)
    for row, column in zip(classes, columns, strict=True):
        best[row] = int(column) if float(means[row, column]) > 1 / max(2, means.shape[1]) else -1
    outputs = list(best)
    for row, output in enumerate(named or ()):
        if best[row] < 0 or float(means[row, output]) >= 0.5 * float(means[row, best[row]]):
            outputs[row] = output
    while repeated := {output for output in outputs if output >= 0 and outputs.count(output) > 1}:
        outputs = [best[row] if output in repeated else output for row, output in enumerate(outputs)]
    return outputs
