"""A suspect's answers to exported questions, as a file of them: CSV or JSON, labels, probabilities or logits."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from radiotag.blackbox import Queries, shown
from radiotag.errors import RadiotagError
from radiotag.keys import Key
from radiotag.suspect import Batching


class NotAnswered(RadiotagError):
    """A file of predictions that answers none of some queries: they may be of another export."""


def ask_function(classify: Callable[[Any], Any], queries: Queries, key: Key, batching: Batching) -> Tensor:
    """A function's answers to all queries: (2(K + 1), N, C') probabilities.

    `classify` is given (B, H, W, 3) uint8 arrays, images of one size. It returns an array-like of (B, C') probabilities
    or logits, or of (B,) labels, class names or numbers. RadiotagError for anything else.
    """
    images = (image for number in range(len(queries.names)) for image in shown(queries, key, number))
    given: list[NDArray[Any]] = []
    done, count = 0, len(queries.names) * len(queries.rows)
    for batch in _batches(images, batching.size):
        given.append(_answer(classify(batch), len(batch)))
        if given[-1].shape[1:] != given[0].shape[1:]:
            shapes = f"{given[0].shape[1:]} and then {given[-1].shape[1:]}"
            raise RadiotagError(f"the suspect's answers differ in shape: {shapes}", "return one kind of answer")
        done += len(batch)
        batching.tell("questions", done, count)
    whole = np.concatenate(given)
    if whole.ndim == 1:
        _, labels = np.unique(whole.astype(str), return_inverse=True)
        numbers = F.one_hot(torch.from_numpy(labels)).double()
    else:
        numbers = torch.from_numpy(whole.astype(np.float64))
    if not bool(numbers.isfinite().all()):
        raise FloatingPointError("its outputs are not finite for some images")
    return to_probabilities(numbers, "the suspect").view(len(queries.names), len(queries.rows), -1)


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
    """A file of predictions: ((2(K + 1), N, C') probabilities with NaN for what is missing, warnings).

    CSV: a header with `file` first, then either `label` or one column a class (see `to_probabilities`). JSON: an object
    of file → label, list of numbers, or object of class → number. RadiotagError names the row that is wrong.
    """
    rows = _read_json(path) if path.suffix.lower() == ".json" else _read_csv(path, queries.labels)
    known = {name: (k, i) for k, names in enumerate(queries.names) for i, name in enumerate(names)}
    given: dict[str, Any] = {}
    unknown = 0
    for file, value in rows:
        name = Path(file).stem
        if name not in known:
            unknown += 1
        elif given.setdefault(name, value) != value:
            raise RadiotagError(f"{path} answers {file} twice, and differently", "keep one answer an image")
    if not given:
        raise NotAnswered(f"{path} answers none of this key's exported images", "name them as they were exported")
    warnings = [f"{unknown} answers are for files that were not exported, and ignored"] if unknown else []
    if len(given) < len(known):
        warnings.append(f"{len(known) - len(given)} of {len(known)} exported images have no answer")
    names = _output_names(given.values(), path)
    place = {name: i for i, name in enumerate(names)}
    answers = torch.full((len(queries.names), len(queries.rows), len(names)), float("nan"), dtype=torch.float64)
    for name, value in given.items():
        answers[known[name]] = _numbers(value, place, f"{path}: {name}")
    return to_probabilities(answers, str(path)), warnings


def _read_csv(path: Path, classes: Sequence[str]) -> list[tuple[str, Any]]:
    """Each file with its label, or with the numbers of its columns: of a single one, if that is called as a class."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RadiotagError(f"cannot read {path}: {error}", "give a CSV or JSON file") from error
    if not lines or len(lines[0]) < 2:
        raise RadiotagError(f"{path} has no header", "begin it with: file,label or file and one column a class")
    header = lines[0]
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise RadiotagError(f"{path} has two columns {twice!r}", "name each class once")
    found: list[tuple[str, Any]] = []
    for number, line in enumerate(lines[1:], 2):
        if not line:
            continue
        if len(line) != len(header):
            columns = f"{len(line)} columns, the header has {len(header)}"
            raise RadiotagError(f"{path}, line {number}: {columns}", "write as many as the header has")
        if len(header) == 2 and header[1] not in classes:
            found.append((line[0], line[1].strip()))
            continue
        try:
            found.append((line[0], dict(zip(header[1:], map(float, line[1:]), strict=True))))
        except ValueError as error:
            hint = "write numbers, one a class, or labels in one column called label"
            raise RadiotagError(f"{path}, line {number}: {error}", hint) from error
    return found


def _whole(digits: str) -> int:
    if len(digits) > 300:
        raise ValueError("a number of more than 300 digits")
    return int(digits)


def _read_json(path: Path) -> list[tuple[str, Any]]:
    try:
        data = json.loads(path.read_bytes(), parse_int=_whole)
    except (OSError, ValueError, RecursionError) as error:
        raise RadiotagError(f"cannot read {path}: {error}", "give a CSV or JSON file") from error
    if not isinstance(data, dict):
        raise RadiotagError(f"{path} is not an object of file names", 'write {"FILE": ANSWER, ...}')
    rows = []
    for file, value in data.items():
        plain = {str(i): v for i, v in enumerate(value)} if isinstance(value, list) else value
        if isinstance(plain, dict):
            numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in plain.values())
            if not plain or not numbers:
                raise RadiotagError(f"{path}: the answer for {file} is not made of numbers", "write one a class")
            plain = {name: float(v) for name, v in plain.items()}
        elif isinstance(plain, bool) or not isinstance(plain, str | int):
            raise RadiotagError(f"{path}: the answer for {file} is neither a label nor numbers", "write one of them")
        rows.append((file, plain if isinstance(plain, dict) else str(plain)))
    return rows


def _output_names(values: Iterable[Any], path: Path) -> tuple[str, ...]:
    """The suspect's outputs in one order: as numbered, up to a thousand, or those that some answer names."""
    values = list(values)
    kinds = {isinstance(value, dict) for value in values}
    if len(kinds) > 1:
        raise RadiotagError(f"{path} mixes labels and numbers", "give one kind of answer")
    names = {name for value in values for name in (value if isinstance(value, dict) else [value])}
    numbered = all(name.isdecimal() and name.isascii() and len(name) < 9 for name in names)
    if numbered and max(map(int, names)) < 1000:
        return tuple(map(str, range(max(map(int, names)) + 1)))
    return tuple(sorted(names, key=int) if numbered else sorted(names))


def _numbers(value: Any, place: dict[str, int], where: str) -> Tensor:
    """(C',) numbers as given; of a label, one and zeros."""
    if isinstance(value, str):
        return F.one_hot(torch.tensor(place[value]), len(place)).double()
    numbers = torch.tensor([float(value.get(name, float("nan"))) for name in place], dtype=torch.float64)
    if len(value) != len(place) or not bool(numbers.isfinite().all()):
        raise RadiotagError(f"{where} needs {len(place)} numbers, all finite", "answer for every class, or for none")
    return numbers


def to_probabilities(answers: Tensor, source: str) -> Tensor:
    """(…, C') probabilities of what a whole file holds: numbers from 0 to 1, per cent, or else logits.

    For all answers alike: one by one, an answer that was rounded to a sum of 0.97 would pass for logits.
    """
    given = answers[~answers.isnan().any(-1)]  # (n, C')
    least, most, usual = (float(x) for x in (given.min(), given.max(), given.sum(1).median()))
    if answers.shape[-1] == 1 and least >= 0 and 1.01 < most < 101:
        raise RadiotagError(f"{source}: one number an image, up to {most:g}", "write probabilities, from 0 to 1")
    if answers.shape[-1] == 1:  # a sigmoid's
        return answers.clamp(0, 1) if least > -0.01 and most < 1.01 else answers.sigmoid()
    if least > -0.01 and (most < 1.01 or (most < 101 and abs(usual - 100) < 5)):  # as rounded, in single precision
        shares = answers.clamp(min=0)
        return shares / shares.sum(-1, keepdim=True).clamp(min=1e-300)  # an answer may be all zeros
    return answers.softmax(-1)
