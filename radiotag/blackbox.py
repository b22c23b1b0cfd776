"""The exact black-box test: images under the true key's patterns and under decoys', and a suspect's answers to them.

Each image is shown twice under each key, with its class's pattern added and taken away. A suspect that learnt from the
marked data is surer of the first than of the second under the true key, and under no other; what any pattern costs any
network cancels. Under the null the true carriers are one more draw like the decoys', so the true key's place among them
is uniform, whatever the suspect: see `radioactive.resampled_log_p`. Only answers are needed, be they logits,
probabilities or top-1 labels, so that a suspect behind an interface can be asked with exported files.

The patterns alone are asked for: what else a mark does to an image moves any network, under any key, and would only
blur the difference. What a pattern does by nature to any classifier of these classes is measured on the marking
network, where it knows them, and taken off.
"""

import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from radiotag.cosines import PATTERN_DIMENSION, pattern_images
from radiotag.errors import RadiotagError
from radiotag.files import write_atomically
from radiotag.images import png
from radiotag.keys import Key
from radiotag.networks import Network, resized
from radiotag.radioactive import Floats, Marking, l2_radius, uniform_carriers
from radiotag.suspect import Batching, log_probabilities

QUERIES_FORMAT = 1  # of the file of queries
DECOYS, MOST_DECOYS = 23, 99_999
IMAGES = 480  # in all, at most EACH a class: what is asked under each key
EACH = 48
QUESTIONS = 180_000  # in all, about: one class takes so many decoys that few of its images can be shown under each
LARGEST = 256  # pixels on the longer side of a query
QUERY = Marking(min_psnr=28.0)  # dB: queries need not be imperceptible, only alike under all keys
SURE = 1e-4  # probabilities are kept this far from 0 and 1: one sure mistake does not outweigh a class


class OfAnotherKey(RadiotagError):
    """Queries of another key, or of another version of radiotag."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Queries:
    """N images to be shown, with and without, under K + 1 keys; key 0 is the true one: this is as secret as the key."""

    images: tuple[Tensor, ...]  # [N] (3, H, W) uint8, unmarked
    rows: tuple[int, ...]  # (N,) carrier row of each image
    labels: tuple[str, ...]  # (N,) its class
    names: tuple[tuple[str, ...], ...]  # [2(K + 1)][N] random; row 2k with the pattern of key k, 2k + 1 without

    @property
    def decoys(self) -> int:
        """K, the number of keys beside the true one."""
        return len(self.names) // 2 - 1


def decoy_patterns(key: Key, number: int) -> Tensor:
    """(C, m) patterns of a decoy key, drawn as the true ones were; number 0 is the true key itself.

    Decoys follow from the key's secret by a hash (SHAKE-256), so that nobody can draw others until they suit.
    """
    if number == 0:
        return key.patterns
    stream = hashlib.shake_256(key.secret + f"decoy\0{number}".encode())
    return uniform_carriers(len(key.patterns), PATTERN_DIMENSION, stream.digest)


def shown(queries: Queries, key: Key, number: int) -> list[Tensor]:
    """The N images (3, H, W) uint8 of one row of names: a key's pattern added, or taken away."""
    patterns, sign = decoy_patterns(key, number // 2), 1 - 2 * (number % 2)
    shifts: dict[tuple[int, ...], Tensor] = {}  # one of each class and size: most images share theirs
    found = []
    for image, row in zip(queries.images, queries.rows, strict=True):
        place = (row, *image.shape[1:])
        if place not in shifts:
            shift = pattern_images(patterns[row][None], *image.shape[1:])[0]
            shifts[place] = sign * l2_radius(image, QUERY) / max(float(shift.norm()), 1e-9) * shift
        found.append((image + shifts[place]).round().clamp(0, 255).to(torch.uint8))
    return found


def choose_images(labels: Sequence[str], images: int = IMAGES) -> list[int]:
    """Positions of the images to ask with: the first of each class, as many of each, EACH at most."""
    classes = sorted(set(labels))
    each = max(1, min(EACH, images // len(classes)))
    taken = dict.fromkeys(classes, 0)
    positions = []
    for i, label in enumerate(labels):
        if taken[label] < each:
            taken[label] += 1
            positions.append(i)
    return positions


def decoys_needed(classes: int, alpha: float) -> int:
    """Decoys with which p can just fall below alpha: the least K ≥ DECOYS with (K + 1)^classes ≥ 1.05 / alpha."""
    return max(DECOYS, min(MOST_DECOYS, math.ceil(math.pow(1.05 / alpha, 1 / classes) - 1e-9) - 1))


def make(pixels: Sequence[Tensor], rows: Sequence[int], labels: Sequence[str], decoys: int) -> Queries:
    """Queries of images (3, H, W) uint8 (`shrunk`), their carrier rows and classes, with fresh random names."""
    names = tuple(tuple(secrets.token_hex(16) for _ in pixels) for _ in range(2 * (decoys + 1)))
    return Queries(images=tuple(pixels), rows=tuple(rows), labels=tuple(labels), names=names)


def shrunk(image: Tensor) -> Tensor:
    """(3, H, W) float in [0, 255] → uint8, of at most LARGEST pixels on the longer side."""
    height, width = image.shape[1:]
    share, image = LARGEST / max(height, width), image.round()
    if share < 1:
        size = (max(1, round(height * share)), max(1, round(width * share)))
        image = F.interpolate(image[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
    return image.round().clamp(0, 255).to(torch.uint8)


# ---------------------------------------------------------------- the file of queries


def cache_path(key_path: Path, key: Key, queries: Queries) -> Path:
    """Where the queries of a key, images and number of decoys are kept: beside the key."""
    digest = hashlib.sha256(
        f"{QUERIES_FORMAT}\0{key.fingerprint}\0{queries.decoys}\0{list(queries.rows)}".encode()
    )
    for image in queries.images:
        digest.update(f"\0{tuple(image.shape)}\0".encode() + image.contiguous().numpy().tobytes())
    return key_path.with_name(f"{key_path.stem}.queries-{digest.hexdigest()[:16]}.safetensors")


def save_queries(path: Path, queries: Queries, key: Key) -> None:
    """Write the queries, readable by their owner only."""
    tensors = {f"{i}": image for i, image in enumerate(queries.images)}
    described = {
        "format": QUERIES_FORMAT, "fingerprint": key.fingerprint, "rows": queries.rows, "labels": queries.labels,
        "names": queries.names,
    }  # fmt: skip
    write_atomically(path, safetensors.torch.save(tensors, {"radiotag": json.dumps(described)}), mode=0o600)


def load_queries(path: Path, key: Key) -> Queries:
    """Read the queries back. RadiotagError if they are damaged or another key's."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            described = json.loads((file.metadata() or {})["radiotag"])
            rows, labels = tuple(described["rows"]), tuple(described["labels"])
            names = tuple(map(tuple, described["names"]))
            images = tuple(file.get_tensor(f"{i}") for i in range(len(rows)))
        known = described["format"] == QUERIES_FORMAT and described["fingerprint"] == key.fingerprint
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise RadiotagError(f"{path} is damaged: {error}", "remove it, it will be made again") from error
    if not known:
        raise OfAnotherKey(f"{path} belongs to another key or version", "remove it, it will be made again")
    return Queries(images=images, rows=rows, labels=labels, names=names)


def check_export(folder: Path) -> None:
    """RadiotagError for a folder that is not new or empty: other questions in it would be answered, too."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RadiotagError(f"{folder} exists", "choose another folder for --export, or remove it")


def export(
    queries: Queries, key: Key, folder: Path, progress: Callable[[int, int], None] = lambda *_: None
) -> int:
    """Write every query as a PNG under its random name; returns how many.

    Nothing in a name, its order, a time stamp or the file's layout tells the true key from a decoy.
    """
    check_export(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows, count = list(enumerate(queries.names)), sum(map(len, queries.names))
    secrets.SystemRandom().shuffle(rows)  # a folder may list its files as they came
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
    """The suspect's probabilities on all queries: (2(K + 1), N, C') float64 on the CPU; images at its own size."""
    device, size, count = suspect.device, suspect.spec.image_size, len(queries.names) * len(queries.rows)
    images = (image for number in range(len(queries.names)) for image in shown(queries, key, number))
    answers: list[Tensor] = []
    while part := list(islice(images, batching.size)):
        pixels = torch.cat([resized(image[None].float() / 255, size) for image in part])
        answers.append(log_probabilities(suspect(pixels.to(device)).cpu().double()).exp())
        batching.tell("questions", min(count, len(answers) * batching.size), count)
    return torch.cat(answers).view(len(queries.names), len(queries.rows), -1)


def pattern_effects(
    queries: Queries,
    answers: Tensor,
    pairs: Sequence[tuple[int, int]],
    usual: Tensor | None = None,
    marker_names: Sequence[str] = (),
) -> Floats:
    """What `resampled_log_p` tests: (K + 1, C), for (output, row) pairs: how much surer with a pattern than without.

    The difference of the right class's mean logits. answers (2(K + 1), N, C') are probabilities, NaN where there is no
    answer. `usual` (2(K + 1), N, C'') are the marking network's: its difference is taken off for classes that it names.
    A class that some key has no answer for is left out, which looks at all keys alike.
    """
    rows = torch.tensor(queries.rows)
    if usual is not None and bool(((answers == answers.round()) | answers.isnan()).all()):  # labels against labels
        usual = F.one_hot(usual.argmax(2), usual.shape[2]).double()
    columns = []
    for output, row in pairs:
        column = _difference(answers[:, rows == row, output])
        if column.isnan().any():
            continue
        name = queries.labels[queries.rows.index(row)]
        if usual is not None and name in marker_names and bool(column.min() < column.max()):  # else it says nothing
            column = column - _difference(usual[:, rows == row, marker_names.index(name)])
        columns.append(column)
    if not columns:
        raise RadiotagError("no class was answered for under every key", "answer all of the exported images")
    values: Floats = torch.stack(columns, 1).numpy()
    return values


def _difference(right: Tensor) -> Tensor:
    """(2(K + 1), n) probabilities → (K + 1,): mean logit with each key's pattern less that without."""
    mean = right.clamp(SURE, 1 - SURE).logit().nanmean(1)
    return mean[0::2] - mean[1::2]
