"""The exact black-box test: a suspect's answers to images with the patterns of the true key and of decoy keys.

Each image is shown twice under each key: with its class's pattern added, and with the pattern subtracted. A suspect
that learnt from the marked data is surer of the first than of the second under the true key, and under no other key.
What any pattern costs any network cancels. Under the null hypothesis the true carriers are one more draw like the
decoys', so the rank of the true key among them is uniform, whatever the suspect (`radioactive.resampled_log_p`). Only
answers are needed: logits, probabilities or top-1 labels. So a suspect behind an API can be tested by exported files.

The queries contain patterns only. The rest of a mark moves any network under any key, which would only add noise.
A pattern may also have a natural effect on any classifier of these classes. This effect is measured on the marking
network, if it knows the classes, and subtracted.
"""

import hashlib
import hmac
import json
import math
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from radiotag import plainjson
from radiotag.cosines import PATTERN_DIMENSION, pattern_images
from radiotag.errors import RadiotagError
from radiotag.files import write_atomically
from radiotag.images import png
from radiotag.keys import Key, prefixed
from radiotag.networks import Network, resized
from radiotag.radioactive import Floats, Marking, l2_radius, uniform_carriers
from radiotag.suspect import Batching, finite_rows, log_probabilities

QUERIES_FORMAT = 2  # version of the file of queries
DECOYS, MOST_DECOYS = 23, 99_999
IMAGES = 480  # shown under each key, at most, and at most EACH per class
EACH = 48
MOST_QUESTIONS = 10**7  # in a file of queries
QUESTIONS = 180_000  # in total, about: a single class needs so many decoys that few images can be shown under each
LARGEST = 256  # pixels on the longer side of a query
QUERY = Marking(min_psnr=28.0)  # dB: queries need not be imperceptible, only equally strong under all keys
SURE = 1e-4  # probabilities are kept this far from 0 and 1, so that one confident mistake does not outweigh a class


class OfAnotherKey(RadiotagError):
    """A file of queries belongs to another key, or to another version of radiotag."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Queries:
    """N images to be shown, with patterns added and subtracted, under K + 1 keys. Key 0 is the true one.

    This is as secret as the key, because it tells the true key's names from the decoys'.
    """

    images: tuple[Tensor, ...]  # [N] (3, H, W) uint8, unmarked
    rows: tuple[int, ...]  # (N,) carrier row of each image
    labels: tuple[str, ...]  # (N,) class of each image
    names: tuple[tuple[str, ...], ...]  # [2(K + 1)][N] by HMAC; row 2k adds the pattern of key k, 2k + 1 subtracts it

    @property
    def decoys(self) -> int:
        """K, the number of decoy keys."""
        return len(self.names) // 2 - 1

    @property
    def digest(self) -> str:
        """SHA-256 over all names in order, hexadecimal: it commits to which question is which, and reveals nothing."""
        return hashlib.sha256("".join(name for row in self.names for name in row).encode()).hexdigest()


def question_names(
    key: Key, images: Sequence[Tensor], rows: Sequence[int], labels: Sequence[str], decoys: int
) -> tuple[tuple[str, ...], ...]:
    """[2(K + 1)][N] names: HMAC of the key's secret over the row of questions, the image, its class and its carrier.

    Nobody can tell a name's key without the secret, and nobody can relabel a question after its answer is in: if any
    image, class, carrier or number changes, or a question is left out, all names change.
    """
    described = [
        prefixed(str(i).encode(), str(row).encode(), label.encode("utf-8", "surrogateescape"),
                 str(tuple(image.shape)).encode(), image.contiguous().numpy().tobytes())
        for i, (image, row, label) in enumerate(zip(images, rows, labels, strict=True))
    ]  # fmt: skip
    contents = [hashlib.sha256(part).digest() for part in described]
    whole = hashlib.sha256(b"".join(contents)).digest()  # so that no question can be left out, either
    secret = hmac.digest(key.secret, f"questions\0{decoys}\0".encode() + whole, "sha256")
    return tuple(
        tuple(hmac.digest(secret, f"{number}\0".encode() + content, "sha256").hex()[:32] for content in contents)
        for number in range(2 * (decoys + 1))
    )


def decoy_patterns(key: Key, number: int) -> Tensor:
    """(C, m) patterns of a decoy key, drawn like the true ones; number 0 is the true key itself.

    Decoys follow from the key's secret by a hash (SHAKE-256), so that nobody can draw others until the result suits.
    """
    if number == 0:
        return key.patterns
    stream = hashlib.shake_256(key.secret + f"decoy\0{number}".encode())
    return uniform_carriers(len(key.patterns), PATTERN_DIMENSION, stream.digest)


def shown(queries: Queries, key: Key, number: int) -> list[Tensor]:
    """The N images (3, H, W) uint8 of one row of names (`number`): a key's pattern added or subtracted."""
    patterns, sign = decoy_patterns(key, number // 2), 1 - 2 * (number % 2)
    shift_of: dict[tuple[int, ...], Tensor] = {}  # by class and image size, which most images share
    images = []
    for image, row in zip(queries.images, queries.rows, strict=True):
        class_and_size = (row, *image.shape[1:])
        if class_and_size not in shift_of:
            shift = pattern_images(patterns[row][None], *image.shape[1:])[0]
            shift_of[class_and_size] = sign * l2_radius(image, QUERY) / max(float(shift.norm()), 1e-9) * shift
        images.append((image + shift_of[class_and_size]).round().clamp(0, 255).to(torch.uint8))
    return images


def choose_images(labels: Sequence[str], images: int = IMAGES) -> list[int]:
    """Positions of the images to show: the first images of each class, equally many of each, at most EACH."""
    classes = sorted(set(labels))
    per_class = max(1, min(EACH, images // len(classes)))
    counts = dict.fromkeys(classes, 0)
    positions = []
    for i, label in enumerate(labels):
        if counts[label] < per_class:
            counts[label] += 1
            positions.append(i)
    return positions


def decoys_needed(classes: int, alpha: float) -> int:
    """The number of decoys for which p can reach alpha: the smallest K ≥ DECOYS with (K + 1)^classes ≥ 1.05 / alpha."""
    return max(DECOYS, min(MOST_DECOYS, math.ceil(math.pow(1.05 / alpha, 1 / classes) - 1e-9) - 1))


def make(key: Key, pixels: Sequence[Tensor], rows: Sequence[int], labels: Sequence[str], decoys: int) -> Queries:
    """Queries from images (3, H, W) uint8 (`shrunk`), their carrier rows and classes. RadiotagError if too many."""
    if (questions := 2 * (decoys + 1) * len(rows)) > MOST_QUESTIONS:
        told = f"{decoys:,} decoys and {len(rows):,} images make {questions:,} questions, more than {MOST_QUESTIONS:,}"
        raise RadiotagError(told, "ask with fewer --decoys, or name the classes marked with --marked MANIFEST")
    names = question_names(key, pixels, rows, labels, decoys)
    return Queries(images=tuple(pixels), rows=tuple(rows), labels=tuple(labels), names=names)


def shrunk(image: Tensor) -> Tensor:
    """(3, H, W) float in [0, 255] → uint8 with at most LARGEST pixels on the longer side."""
    height, width = image.shape[1:]
    scale, image = LARGEST / max(height, width), image.round()
    if scale < 1:
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        image = F.interpolate(image[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
    return image.round().clamp(0, 255).to(torch.uint8)


# ---------------------------------------------------------------- the file of queries


def cache_path(key_path: Path, key: Key, queries: Queries) -> Path:
    """The file for queries, beside the key's file; its name depends on key, images, their classes and the decoys."""
    asked = [QUERIES_FORMAT, key.fingerprint, queries.decoys, list(queries.rows), list(queries.labels)]
    digest = hashlib.sha256(json.dumps(asked).encode())
    for image in queries.images:
        digest.update(f"\0{tuple(image.shape)}\0".encode() + image.contiguous().numpy().tobytes())
    return key_path.with_name(f"{key_path.stem}.queries-{digest.hexdigest()[:16]}.safetensors")


def save_queries(path: Path, queries: Queries, key: Key) -> None:
    """Write the queries atomically, readable by their owner only (0600)."""
    tensors = {f"{i}": image for i, image in enumerate(queries.images)}
    metadata = {
        "format": QUERIES_FORMAT, "fingerprint": key.fingerprint, "rows": queries.rows, "labels": queries.labels,
        "decoys": queries.decoys,
    }  # fmt: skip
    write_atomically(path, safetensors.torch.save(tensors, {"radiotag": json.dumps(metadata)}), mode=0o600)


def load_queries(path: Path, key: Key) -> Queries:
    """Read a file of queries. RadiotagError if it is damaged, OfAnotherKey if it belongs to another key."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = plainjson.parse((file.metadata() or {})["radiotag"])
            belongs = metadata["format"] == QUERIES_FORMAT and metadata["fingerprint"] == key.fingerprint
            rows, labels, decoys = metadata["rows"], metadata["labels"], metadata.get("decoys", 1)
            if belongs:
                _check_queries(rows, labels, decoys, key)
            images = tuple(file.get_tensor(f"{i}") for i in range(len(rows))) if belongs else ()
        if any(image.dtype != torch.uint8 or image.dim() != 3 or len(image) != 3 for image in images):
            raise ValueError("its images are none")
        if any(not 1 <= side <= LARGEST for image in images for side in image.shape[1:]):
            raise ValueError("its images are of no size that was asked with")
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise RadiotagError(f"{path} is damaged: {error}", "remove it, it will be made again") from error
    if not belongs:
        raise OfAnotherKey(f"{path} belongs to another key or version", "remove it, it will be made again")
    return make(key, images, rows, labels, decoys)


def _check_queries(rows: Any, labels: Any, decoys: Any, key: Key) -> None:
    """ValueError for a description that no file of this key's queries has."""
    if type(decoys) is not int or not 1 <= decoys <= MOST_DECOYS or not isinstance(rows, list):
        raise ValueError("its number of decoys, or its rows are damaged")
    if not 1 <= len(rows) <= IMAGES + len(key.carriers) or 2 * (decoys + 1) * len(rows) > MOST_QUESTIONS:
        raise ValueError("its numbers of decoys or images are damaged")
    if not all(type(row) is int and 0 <= row < len(key.carriers) for row in rows):
        raise ValueError("its rows are damaged")
    if not isinstance(labels, list) or len(labels) != len(rows) or not all(isinstance(name, str) for name in labels):
        raise ValueError("its classes are damaged")


def check_export(folder: Path) -> None:
    """RadiotagError for a folder that has files: the suspect would be asked about them, too."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RadiotagError(f"{folder} exists", "choose another folder for --export, or remove it")


def export(queries: Queries, key: Key, folder: Path, progress: Callable[[int, int], None] = lambda *_: None) -> int:
    """Write every query as a PNG under its name; returns the number of files. RadiotagError if that fails.

    Nothing tells the true key from a decoy: not the names, their order, the time stamps or the layout of the files.
    """
    check_export(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows, count = list(enumerate(queries.names)), sum(map(len, queries.names))
    secrets.SystemRandom().shuffle(rows)  # a folder may list its files in the order of writing
    for done, (number, names) in enumerate(rows, 1):
        for name, image in zip(names, shown(queries, key, number), strict=True):
            path = folder / f"{name}.png"
            write_atomically(path, png(image.permute(1, 2, 0).numpy()))
            os.utime(path, (0, 0))
        progress(done * len(names), count)
    return count


# ---------------------------------------------------------------- answers


@torch.no_grad()
def ask(suspect: Network, queries: Queries, key: Key, batching: Batching) -> Tensor:
    """The suspect's probabilities for all queries, (2(K + 1), N, C') float64 on the CPU, at its own input size.

    Answers that are not finite are NaN. FloatingPointError if none is finite.
    """
    device, size, count = suspect.device, suspect.spec.image_size, len(queries.names) * len(queries.rows)
    images = (image for number in range(len(queries.names)) for image in shown(queries, key, number))
    answers: list[Tensor] = []
    while batch := list(islice(images, batching.size)):
        pixels = torch.cat([resized(image[None].float() / 255, size) for image in batch])
        answers.append(log_probabilities(suspect(pixels.to(device)).cpu().double()).exp())
        batching.tell("questions", min(count, len(answers) * batching.size), count)
    whole = torch.cat(answers)
    if not bool(finite_rows(whole).any()):
        raise FloatingPointError("its outputs are not finite for any image")
    return whole.view(len(queries.names), len(queries.rows), -1)


def pattern_effects(
    queries: Queries,
    answers: Tensor,
    pairs: Sequence[tuple[int, int]],
    baseline: Tensor | None = None,
    marker_names: Sequence[str] = (),
) -> Floats:
    """The values (K + 1, C) for `resampled_log_p`: how much surer the suspect is with a pattern added than subtracted.

    There is one column per (output, carrier row) pair, with the difference of the mean logits of the right class.
    answers: probabilities (2(K + 1), N, C'), NaN for missing answers. baseline: the marking network's
    (2(K + 1), N, C''); its difference is subtracted for the classes that it names. A class without answers under some
    key is left out, a rule that treats all keys alike. RadiotagError if no class is left.
    """
    rows = torch.tensor(queries.rows)
    if baseline is not None and bool(((answers == answers.round()) | answers.isnan()).all()):
        # The suspect answers with labels only, so the marking network must, too.
        baseline = F.one_hot(baseline.argmax(2), baseline.shape[2]).double()
    columns = []
    for output, row in pairs:
        column = _difference(answers[:, rows == row, output])
        if column.isnan().any():
            continue
        name = queries.labels[queries.rows.index(row)]
        if baseline is not None and name in marker_names and bool(column.min() < column.max()):
            # A constant column says nothing about the keys, and must stay constant.
            column = column - _difference(baseline[:, rows == row, marker_names.index(name)])
        columns.append(column)
    if not columns:
        raise RadiotagError("no class was answered for under every key", "answer all of the exported images")
    values: Floats = torch.stack(columns, 1).numpy()
    return values


def _difference(probabilities: Tensor) -> Tensor:
    """(2(K + 1), n) probabilities → (K + 1,): mean logit with each key's pattern added minus subtracted."""
    mean = probabilities.clamp(SURE, 1 - SURE).logit().nanmean(1)
    return mean[0::2] - mean[1::2]
