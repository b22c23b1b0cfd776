"""The Python face of radiotag: what the commands do, on folders and on what a researcher holds in memory."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from radiotag import keys, verification
from radiotag.errors import RadiotagError
from radiotag.files import write_atomically
from radiotag.keys import Key, new_key, public_half, save_key
from radiotag.networks import marking_weights
from radiotag.probes import ArrayImages, FolderImages
from radiotag.verification import Finding, Model, Options, Progress

PathLike = str | os.PathLike[str]
Labels = Sequence[str] | Sequence[int] | ArrayLike
One = PathLike | nn.Module | Callable[..., Any]  # suspect


def load_key(path: PathLike) -> Key:
    """Read a secret key file. RadiotagError if it is missing, readable by others, damaged or of another version."""
    return keys.load_key(Path(path))


def keygen(
    output: PathLike | None = None,
    *,
    network: str = "builtin",
    classes: int | Sequence[str] = 1000,
    force: bool = False,
) -> Key:
    """Make a secret key; with `output`, write it (0600) and its public half beside it (OUTPUT.pub).

    network: "builtin", the name of a torchvision classifier, or a checkpoint's path. classes: how many carriers, or the
    classes' names. RadiotagError for what exists already (unless `force`), and for a network that is not there.

    >>> import radiotag
    >>> key = radiotag.keygen(classes=["cat", "dog"])
    >>> key.carriers.shape, key.class_names
    (torch.Size([2, 512]), ['cat', 'dog'])
    """
    if output is None:
        return new_key(*marking_weights(network), classes)
    path = Path(output)
    public = _check_names(path, force)
    key = new_key(*marking_weights(network), classes)
    save_key(path, key, exclusive=not force)
    write_atomically(public, public_half(key).encode(), mode=0o644)
    return replace(key, path=path)


def _check_names(path: Path, force: bool) -> Path:
    """The public half's path. RadiotagError for names that a key cannot have."""
    if not path.name or path.is_dir():
        raise RadiotagError(f"{path} is a folder", "name a file with -o")
    public = path.with_suffix(".pub")
    if public == path:
        raise RadiotagError(f"{path} is the public half's name", "name the key otherwise, k.safetensors for one")
    for place in (path, public):
        if place.exists() and not force:
            raise RadiotagError(f"{place} exists", "choose another name with -o, or overwrite it with --force")
    return public


# ---------------------------------------------------------------- verify


@overload
def verify(
    suspect: One, key: Key | PathLike, data: Any = ..., *,
    labels: Labels | None = ..., options: Options | None = ..., progress: Progress = ...,
) -> Finding: ...  # fmt: skip


@overload
def verify(
    suspect: list[Any] | tuple[Any, ...], key: Key | PathLike, data: Any = ..., *,
    labels: Labels | None = ..., options: Options | None = ..., progress: Progress = ...,
) -> list[Finding]: ...  # fmt: skip


def verify(
    suspect: Any,
    key: Key | PathLike,
    data: PathLike | ArrayLike | Tensor | None = None,
    *,
    labels: Labels | None = None,
    options: Options | None = None,
    progress: Progress = lambda *_: None,
) -> Finding | list[Finding]:
    """Test whether a suspect was trained on data marked with a key; for a list of suspects p is corrected (Holm).

    suspect: a model file's path, an `nn.Module` that takes normalised images and returns logits (its normalisation and
    input size stand in `options`; it is copied, not changed), or, for the black-box test, a function of (B, H, W, 3)
    uint8 arrays that returns (B, C) probabilities or logits, or (B,) labels.
    data: real, unmarked images: a folder of class sub-folders, or uint8 (N, H, W, 3) or (N, 3, H, W), with `labels`,
    class names or numbers. Without data the suspect is asked with synthetic images.
    RadiotagError for what cannot be read or tested.

    >>> import radiotag, torch
    >>> key = radiotag.keygen(classes=3)
    >>> model = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(48, 3))
    >>> options = radiotag.Options(image_size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    >>> radiotag.verify(model, key, options=options).detected
    False
    """
    options = options or Options()
    many = isinstance(suspect, list | tuple)
    models: list[Model] = [
        Path(one) if isinstance(one, str | os.PathLike) else one for one in (suspect if many else [suspect])
    ]
    secret = key if isinstance(key, Key) else load_key(key)
    images: FolderImages | ArrayImages | None = None
    if isinstance(data, str | os.PathLike):
        images = FolderImages(Path(data), options.manifest)
    elif data is not None:
        pixels = as_images(data)
        names, secret = class_labels(labels, secret, len(pixels))
        images = ArrayImages(pixels, names)
    if not options.black_box:
        findings = verification.verify(models, secret, options, images, progress)
    elif images is None:
        raise RadiotagError("the black-box test asks with real images", "give data and labels")
    else:
        queries = verification.prepare_queries(secret, images, options)
        findings = verification.verify_black_box(models, queries, secret, options, progress)
    return findings if many else findings[0]


# ---------------------------------------------------------------- arrays


def as_images(images: Any) -> Tensor:
    """uint8 (N, H, W, 3) or (N, 3, H, W), an array or a tensor → a uint8 tensor (N, 3, H, W)."""
    given = images if isinstance(images, Tensor) else torch.from_numpy(np.ascontiguousarray(images))
    if given.dtype != torch.uint8 or given.dim() != 4 or 3 not in (given.shape[1], given.shape[3]):
        shape = f"{given.dtype} {tuple(given.shape)}".removeprefix("torch.")
        raise RadiotagError(f"images are uint8, (N, H, W, 3) or (N, 3, H, W), not {shape}", "convert them first")
    return given.cpu() if given.shape[1] == 3 else given.cpu().permute(0, 3, 1, 2).contiguous()


def class_labels(labels: Any, key: Key, count: int) -> tuple[list[str], Key]:
    """The class name of each of `count` images ("" without labels), and the key under which the names mean carriers.

    Numbers are rows of the key: its names, or, of a key without names, the numbers themselves.
    RadiotagError where labels and images, or labels and key, do not fit.
    """
    if labels is None:
        return [""] * count, key
    plain = labels.tolist() if isinstance(labels, Tensor | np.ndarray) else list(labels)
    if len(plain) != count:
        raise RadiotagError(f"there are {count} images and {len(plain)} labels", "give one label an image")
    if all(isinstance(label, str) for label in plain):
        return plain, key
    rows = [int(label) for label in plain]
    names = key.class_names or [str(row) for row in range(len(key.carriers))]
    if not 0 <= min(rows) <= max(rows) < len(names):
        numbers = f"labels run from {min(rows)} to {max(rows)}, the key has {len(names)} classes"
        raise RadiotagError(numbers, "number the classes from 0, or make a larger key")
    return [names[row] for row in rows], replace(key, metadata={**key.metadata, "class_names": names})
