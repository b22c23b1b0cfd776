"""Verifying suspects: unmarked images to ask them with, outputs paired with carriers, a verdict with its caveats."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from radiotag import RadiotagError
from radiotag.images import decode, scan
from radiotag.marking import read_manifest
from radiotag.networks import Network, load
from radiotag.radioactive import ALIGNMENT_IMAGES, Evidence, Key, Rows, evidence, holm, suspect_rows
from radiotag.synthetic import dead_leaves

LOG10 = math.log(10)
SYNTHETIC_SEED = 20200702  # fixed: images chosen after seeing a suspect would be one more thing to choose
POOR_R2 = 0.1
VOIDS = (
    "the p-value holds only if the key was made before the suspect (publish its fingerprint before the data),",
    "if the images used for alignment are unmarked, and if this key, suspect and statistic are the only ones tried",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to read suspects, for all of them alike."""

    architecture: str | None = None
    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    device: str = "cpu"
    batch_size: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One suspect's result. Logarithms are to base 10."""

    path: str
    architecture: str
    log10_p: float
    log10_p_corrected: float  # Holm, over the suspects of this run
    detected: bool
    paper_log10_p: float | None
    mean_cosine: float
    alignment_r2: float | None
    classes_used: int
    method: str
    warnings: tuple[str, ...]


@cache
def synthetic_images(size: int) -> Tensor:
    """(N, 3, size, size) float in [0, 1]: dead leaves, the same for every suspect."""
    count = ALIGNMENT_IMAGES if size <= 64 else ALIGNMENT_IMAGES // 2
    return dead_leaves(count, size, seed=SYNTHETIC_SEED).float() / 255


def marked_hashes(manifest: Path) -> set[str]:
    """SHA-256 of every marked file that a manifest records."""
    return {row["sha256_out"] for row in read_manifest(manifest)[1].values() if row["status"] == "marked"}


def real_images(folder: Path, size: int, marked: set[str]) -> tuple[Tensor, list[str]]:
    """(N, 3, size, size) in [0, 1] and class names of unmarked images, at most ALIGNMENT_IMAGES, evenly taken.

    Raises RadiotagError if one of them is marked (by `marked`, or by a manifest beside it or a folder above).
    """
    for place in (folder.absolute(), *folder.resolve().parents, folder.resolve()):
        beside = place.with_name(f"{place.name}.manifest.jsonl") if place.name else place
        marked = marked | (marked_hashes(beside) if beside.is_file() else set())
    items, _, _ = scan(folder)
    step = max(1, math.ceil(len(items) / ALIGNMENT_IMAGES))
    images, labels = [], []
    for item in items[::step]:
        path = folder / item.path
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() in marked:
            raise RadiotagError(
                f"{path} is marked: aligning on marked images would void the p-value",
                "give --data a folder of unmarked images, or leave it out",
            )
        rgb = torch.from_numpy(np.ascontiguousarray(decode(data, str(path)).rgb.transpose(2, 0, 1))) / 255
        images.append(F.interpolate(rgb[None], (size, size), mode="bilinear", antialias=True))
        labels.append(item.label)
    return torch.cat(images).clamp_(0, 1), labels


def pair_classes(key: Key, suspect: Network, manifest: Path | None) -> list[tuple[int, int]]:
    """(suspect output, carrier row) pairs: by name where both name their classes, else in order.

    With a manifest only the classes marked there are used. Raises RadiotagError if key and suspect do not fit.
    """
    theirs, ours, outputs = suspect.spec.class_names, key.class_names, suspect.spec.classes
    if manifest:
        header, rows = read_manifest(manifest)
        if header.get("fingerprint") != key.fingerprint:
            raise RadiotagError(
                f"{manifest} was made with key {header.get('fingerprint')}, this is {key.fingerprint}",
                "give the key that marked the folder",
            )
        marked = {row["class"]: int(row["row"]) for row in rows.values() if row["status"] == "marked"}
        order = {name: i for i, name in enumerate(sorted({row["class"] for row in rows.values()}))}
        names = {name: i for i, name in enumerate(theirs)} if theirs else order
        pairs = [(names[name], row) for name, row in sorted(marked.items()) if names.get(name, outputs) < outputs]
    elif ours and theirs:
        pairs = [(theirs.index(name), row) for row, name in enumerate(ours) if name in theirs]
    elif ours and len(ours) != outputs:
        raise RadiotagError(
            f"the key names {len(ours)} classes, the suspect has {outputs} outputs without names",
            "name the classes marked with --marked MANIFEST",
        )
    else:
        pairs = [(i, i) for i in range(min(outputs, len(key.carriers) + 1))]
    if not pairs or max(row for _, row in pairs) >= len(key.carriers):
        raise RadiotagError(
            f"the key does not fit: {len(key.carriers)} carriers, a suspect of {outputs} outputs, "
            f"{'no class in common' if not pairs else 'paired in order'}",
            "name the classes marked with --marked MANIFEST, or use the key that marked the data",
        )
    return pairs


def examine(
    path: Path, key: Key, marker: Network, options: Options, data: Path | None, manifest: Path | None
) -> tuple[Network, Rows]:
    """Load a suspect and compute its class vectors. The carriers play no part in it."""
    suspect = load(
        path, architecture=options.architecture, image_size=options.image_size, mean=options.mean, std=options.std
    ).to(options.device)
    pairs = pair_classes(key, suspect, manifest)
    size = max(suspect.spec.image_size, marker.spec.image_size)
    names = suspect.spec.class_names or tuple(key.class_names or ())
    labels, own = None, None
    if data is None:
        pixels = synthetic_images(size)
    else:
        pixels, found = real_images(data, size, marked_hashes(manifest) if manifest else set())
        pixels, labels = labelled(pixels, found, [names[output] for output, _ in pairs] if names else None)
    known = marker.spec.class_names or ()
    if names and all(names[output] in known for output, _ in pairs):
        own = [known.index(names[output]) for output, _ in pairs]
    return suspect, suspect_rows(marker, suspect, pixels, pairs, options.batch_size, labels=labels, own=own)


def labelled(pixels: Tensor, found: Sequence[str], names: Sequence[str] | None) -> tuple[Tensor, Tensor | None]:
    """Images with their classes' positions in `names`; all of them and None where a class has no image or no name."""
    if names is None or not set(names) <= set(found):
        return pixels, None
    keep = [i for i, name in enumerate(found) if name in names]
    return pixels[keep], torch.tensor([names.index(found[i]) for i in keep])


def verify(
    paths: Sequence[Path],
    key: Key,
    options: Options,
    *,
    data: Path | None = None,
    manifest: Path | None = None,
    alpha: float = 1e-4,
    progress: Callable[[Path], None] = lambda _: None,
) -> list[Finding]:
    """Test every suspect with the key's declared statistic; the verdict is on the Holm-corrected p-value."""
    for path in paths:  # before minutes are spent on the others
        if not path.is_file():
            raise RadiotagError(f"{path} is not a file" if path.exists() else f"no such file: {path}", "check the path")
    marker = key.network(options.device)
    results: list[tuple[Path, Network, Rows, Evidence]] = []
    for path in paths:
        progress(path)
        suspect, rows = examine(path, key, marker, options, data, manifest)
        results.append((path, suspect, rows, evidence(rows, key.carriers)))
    corrected = holm([found.log_p for *_, found in results])
    return [
        Finding(
            path=os.fspath(path),
            architecture=suspect.spec.architecture,
            log10_p=found.log_p / LOG10,
            log10_p_corrected=adjusted / LOG10,
            detected=adjusted <= math.log(alpha),
            paper_log10_p=None if found.paper_log_p is None else found.paper_log_p / LOG10,
            mean_cosine=found.mean_cosine,
            alignment_r2=rows.r2,
            classes_used=len(found.per_class),
            method="white-box",
            warnings=tuple(_warnings(suspect, rows, options)),
        )
        for (path, suspect, rows, found), adjusted in zip(results, corrected, strict=True)
    ]


def _warnings(suspect: Network, rows: Rows, options: Options) -> list[str]:
    found = []
    if suspect.assumed and not (options.mean and options.std and options.image_size):
        size = suspect.spec.image_size
        found.append(f"input size ({size} px) and normalisation are assumed: give --image-size, --mean and --std")
    if rows.r2 is not None and rows.r2 < POOR_R2:
        found.append(f"poor alignment (R² {rows.r2:.2f}): a mark may be missed, an accusation is not made likelier")
    if suspect.head is None:
        found.append("no linear last layer: the response alone is used, and the paper's statistic cannot be")
    return found


def as_json(finding: Finding) -> dict[str, Any]:
    """Plain values for `--json`."""
    plain = {name: getattr(finding, name) for name in Finding.__slots__}
    return dict(json.loads(json.dumps(plain)))
