"""A suspect's answers to queries, from a function or from a CSV or JSON file: labels, probabilities or logits."""

import csv
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radiotag import plainjson
from radiotag.blackbox import Queries, shown
from radiotag.errors import RadiotagError
from radiotag.keys import Key
from radiotag.suspect import Batching, finite_rows

NOT_FINITE = "{} answers are not finite: they were left out"
KEPT = 1000  # outputs that are looked at, at most, if there are not more classes: those that a class has most often


class NotAnswered(RadiotagError):
    """A file of predictions answers none of the queries, which may belong to another export."""


def ask_function(classify: Callable[[Any], Any], queries: Queries, key: Key, batching: Batching) -> Tensor:
    """A function's answers to all queries: (2(K + 1), N, C') probabilities.

    `classify` takes a (B, H, W, 3) uint8 array of images of one size. It returns an array-like of (B, C') probabilities
    or logits, or of (B,) labels, class names or numbers. Answers that are not finite are NaN. RadiotagError for other
    shapes, FloatingPointError if no answer is finite.
    """
    images = (image for number in range(len(queries.names)) for image in shown(queries, key, number))
    all_answers: list[NDArray[Any]] = []
    done, count = 0, len(queries.names) * len(queries.rows)
    for batch in _batches(images, batching.size):
        all_answers.append(_answer(classify(batch), len(batch)))
        if all_answers[-1].shape[1:] != all_answers[0].shape[1:]:
            shapes = f"{all_answers[0].shape[1:]} and then {all_answers[-1].shape[1:]}"
            raise RadiotagError(f"the suspect's answers differ in shape: {shapes}", "return one kind of answer")
        done += len(batch)
        batching.tell("questions", done, count)
    whole = np.concatenate(all_answers)
    if whole.ndim == 1:
        names, labels = np.unique(whole.astype(str), return_inverse=True)
        values = _one_hot(labels, np.tile(queries.rows, len(queries.names)), len(names))
    else:
        values = torch.from_numpy(whole.astype(np.float64))
    if not bool(finite_rows(values).any()):
        raise FloatingPointError("its outputs are not finite for any image")
    return to_probabilities(values, "the suspect").view(len(queries.names), len(queries.rows), -1)


def _batches(images: Iterable[Tensor], size: int) -> Iterator[NDArray[np.uint8]]:
    """(3, H, W) images in their order → (B, H, W, 3), at most `size` of one shape; all of them might fill memory."""
    for _, same_shape in groupby(images, lambda image: image.shape):
        while batch := list(islice(same_shape, size)):
            yield torch.stack(batch).permute(0, 2, 3, 1).contiguous().numpy()


def _answer(answer: Any, images: int) -> NDArray[Any]:
    """What a suspect returned for some images: (B, C') numbers or (B,) labels. RadiotagError for anything else."""
    hint = "return (images, classes) numbers, or one label an image"
    try:
        plain = answer.detach().float().cpu() if isinstance(answer, Tensor) and answer.is_floating_point() else answer
        array = np.asarray(plain.cpu() if isinstance(plain, Tensor) else plain)
    except ValueError as error:
        raise RadiotagError(f"the suspect answers with no array: {error}", hint) from error
    if array.ndim not in (1, 2) or len(array) != images:
        raise RadiotagError(f"the suspect answers {images} images with an array of shape {array.shape}", hint)
    if array.ndim == 2 and (array.dtype.kind not in "biuf" or array.shape[1] == 0):
        raise RadiotagError(f"the suspect answers with rows of {array.dtype}, {array.shape[1]} an image", hint)
    if array.ndim == 1 and array.dtype.kind not in "biuUSO":
        told = f"the suspect answers with one number an image, of {array.dtype}"
        raise RadiotagError(told, "return (images, 1) for a single class, and labels as whole numbers or names")
    return array


def read_answers(path: Path, queries: Queries) -> tuple[Tensor, list[str]]:
    """Read a file of predictions: ((2(K + 1), N, C') probabilities with NaN for missing answers, warnings).

    CSV: a header with `file` first, then either `label` or one column per class (see `to_probabilities`). JSON: an
    object of file → label, list of numbers, or object of class → number. RadiotagError names the row that is wrong;
    NotAnswered if no query is answered.
    """
    rows = _read_json(path) if path.suffix.lower() == ".json" else _read_csv(path, queries.labels)
    positions = {name: (k, i) for k, names in enumerate(queries.names) for i, name in enumerate(names)}
    answered: dict[str, Any] = {}
    unknown = 0
    for file, value in rows:
        name = Path(file).stem
        if name not in positions:
            unknown += 1
        elif answered.setdefault(name, value) != value:
            raise RadiotagError(f"{path} answers {file} twice, and differently", "keep one answer per image")
    if not answered:
        raise NotAnswered(f"{path} answers none of this key's exported images", "name them as they were exported")
    warnings = [f"{unknown} answers are for files that were not exported, and ignored"] if unknown else []
    if len(answered) < len(positions):
        warnings.append(f"{len(positions) - len(answered)} of {len(positions)} exported images have no answer")
    names = _output_names(answered.values(), path)
    places = [positions[name] for name in answered]
    found = _probabilities(answered, names, np.array([queries.rows[i] for _, i in places]), path)
    if broken := int(found.isnan().any(1).sum()):
        warnings.append(NOT_FINITE.format(broken))
    answers = torch.full((len(queries.names), len(queries.rows), found.shape[1]), float("nan"), dtype=torch.float64)
    which = torch.tensor(places)
    answers[which[:, 0], which[:, 1]] = found
    return answers, warnings


def _probabilities(answered: dict[str, Any], names: Sequence[str], rows: NDArray[Any], path: Path) -> Tensor:
    """(n, C') probabilities of the n answers that were given; `rows` (n,) are the classes of their images.

    Memory grows with the file, not with its square: of more than KEPT outputs, only some are kept.
    """
    column = {name: i for i, name in enumerate(names)}
    if isinstance(next(iter(answered.values())), str):
        labels = np.array([column[value] for value in answered.values()])
        return to_probabilities(_one_hot(labels, rows, len(names)), str(path))
    for name, value in answered.items():  # before there is a table of them all
        if len(value) != len(names):
            raise _incomplete(f"{path}: {name}", len(names))
    table = torch.stack([_numbers(value, column, f"{path}: {name}") for name, value in answered.items()])
    if not bool(finite_rows(table).any()):
        raise RadiotagError(f"{path}: no answer is finite", "write probabilities or logits")
    probabilities = to_probabilities(table, str(path))
    if len(names) <= KEPT:
        return probabilities
    means = np.stack([probabilities[torch.from_numpy(rows == row)].nanmean(0).numpy() for row in np.unique(rows)])
    means = np.nan_to_num(means)
    ranks = np.argsort(np.argsort(-means, axis=1, kind="stable"), axis=1).min(0)
    return probabilities[:, torch.from_numpy(_best(ranks, len(means)))]


def _one_hot(labels: NDArray[Any], rows: NDArray[Any], count: int) -> Tensor:
    """(n, C') float64 from labels (n,) in range(count) and the classes `rows` (n,) of their images.

    C' is `count`; if that is more than KEPT, only labels that some class has most often have a column, whatever the
    key of the question, and an answer with another label is zeros.
    """
    columns = np.arange(count)
    if count > KEPT:
        pairs, times = np.unique(np.stack([rows, labels]), axis=1, return_counts=True)
        pairs = pairs[:, np.lexsort((pairs[1], -times, pairs[0]))]  # by class, most frequent first
        starts = np.searchsorted(pairs[0], pairs[0])
        ranks = np.full(count, count)
        np.minimum.at(ranks, pairs[1], np.arange(len(starts)) - starts)
        columns = _best(ranks, len(np.unique(rows)))
    place = np.full(count, -1)
    place[columns] = np.arange(len(columns))
    values, found = torch.zeros(len(labels), len(columns), dtype=torch.float64), torch.from_numpy(place[labels])
    given = found >= 0
    values[given, found[given]] = 1
    return values


def _best(ranks: NDArray[Any], classes: int) -> NDArray[Any]:
    """The outputs of the lowest ranks, in their order."""
    return np.sort(np.argsort(ranks, kind="stable")[: max(KEPT, classes)])


def _read_csv(path: Path, classes: Sequence[str]) -> list[tuple[str, Any]]:
    """(file, its label or its numbers by column); a single column holds numbers if its name is a class."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RadiotagError(f"cannot read {path}: {error}", "give a CSV or JSON file") from error
    if not lines or len(lines[0]) < 2:
        raise RadiotagError(f"{path} has no header", "begin it with: file,label or file and one column per class")
    header = lines[0]
    if len(set(header)) < len(header):
        repeated = Counter(header).most_common(1)[0][0]
        raise RadiotagError(f"{path} has two columns {repeated!r}", "name each class once")
    rows: list[tuple[str, Any]] = []
    for number, line in enumerate(lines[1:], 2):
        if not line:
            continue
        if len(line) != len(header):
            counts = f"{len(line)} columns, the header has {len(header)}"
            raise RadiotagError(f"{path}, line {number}: {counts}", "write as many as the header has")
        if len(header) == 2 and header[1] not in classes:
            rows.append((line[0], line[1].strip()))
            continue
        try:
            rows.append((line[0], dict(zip(header[1:], map(float, line[1:]), strict=True))))
        except ValueError as error:
            hint = "write numbers, one per class, or labels in one column called label"
            raise RadiotagError(f"{path}, line {number}: {error}", hint) from error
    return rows


def _read_json(path: Path) -> list[tuple[str, Any]]:
    try:
        data = plainjson.parse(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RadiotagError(f"cannot read {path}: {error}", "give a CSV or JSON file") from error
    if not isinstance(data, dict):
        raise RadiotagError(f"{path} is not an object of file names", 'write {"FILE": ANSWER, ...}')
    rows = []
    for file, value in data.items():
        plain = {str(i): v for i, v in enumerate(value)} if isinstance(value, list) else value
        if isinstance(plain, dict):
            numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in plain.values())
            if not plain or not numbers:
                raise RadiotagError(f"{path}: the answer for {file} is not made of numbers", "write one per class")
            plain = {name: float(v) for name, v in plain.items()}
        elif isinstance(plain, bool) or not isinstance(plain, str | int):
            raise RadiotagError(f"{path}: the answer for {file} is neither a label nor numbers", "write one of them")
        rows.append((file, plain if isinstance(plain, dict) else str(plain)))
    return rows


def _output_names(values: Iterable[Any], path: Path) -> tuple[str, ...]:
    """The names of the suspect's outputs in a fixed order: all numbers from 0 (to 999), or the names in the answers."""
    values = list(values)
    kinds = {isinstance(value, dict) for value in values}
    if len(kinds) > 1:
        raise RadiotagError(f"{path} mixes labels and numbers", "give one kind of answer")
    names = {name for value in values for name in (value if isinstance(value, dict) else [value])}
    numbered = all(name.isdecimal() and name.isascii() and len(name) < 9 for name in names)
    if numbered and max(map(int, names)) < 1000:
        return tuple(map(str, range(max(map(int, names)) + 1)))
    return tuple(sorted(names, key=int) if numbered else sorted(names))


def _numbers(value: dict[str, float], column: dict[str, int], source: str) -> Tensor:
    """(C',) numbers of one answer. RadiotagError if numbers are missing."""
    if value.keys() != column.keys():
        raise _incomplete(source, len(column))
    return torch.tensor([value[name] for name in column], dtype=torch.float64)


def _incomplete(source: str, count: int) -> RadiotagError:
    return RadiotagError(f"{source} needs {count} numbers", "answer for every class, or for none")


def to_probabilities(answers: Tensor, source: str) -> Tensor:
    """(…, C') answers → probabilities. The answers are numbers from 0 to 1, per cent, or else logits.

    An answer that is not finite becomes NaN. The kind is determined for all answers together. Taken alone, an answer
    that rounding left with a sum of 0.97 would look like logits.
    """
    answers = answers.masked_fill(~answers.isfinite().all(-1, keepdim=True), math.nan)
    rows = answers[~answers.isnan().any(-1)]  # (n, C')
    smallest, largest, median_sum = (float(x) for x in (rows.min(), rows.max(), rows.sum(1).median()))
    if answers.shape[-1] == 1 and smallest >= 0 and 1.01 < largest < 101:
        raise RadiotagError(f"{source}: one number an image, up to {largest:g}", "write probabilities, from 0 to 1")
    if answers.shape[-1] == 1:  # a sigmoid's
        return answers.clamp(0, 1) if smallest > -0.01 and largest < 1.01 else answers.sigmoid()
    # With room for rounded numbers and single precision.
    if smallest > -0.01 and (largest < 1.01 or (largest < 101 and abs(median_sum - 100) < 5)):
        shares = answers.clamp(min=0)
        return shares / shares.sum(-1, keepdim=True).clamp(min=1e-300)  # an answer may be zeros only
    return answers.softmax(-1)
