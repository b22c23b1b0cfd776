"""The Python face of radiotag: what the commands do, on folders and on what a researcher holds in memory."""

import math
import operator
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from radiotag import keys, verification
from radiotag.batches import PIXELS_TOGETHER, Marker, Request, mark_requests, request_for
from radiotag.errors import RadiotagError
from radiotag.files import write_atomically
from radiotag.images import Pixels, decode, png
from radiotag.images import psnr as image_psnr
from radiotag.keys import Key, new_key, save_key, with_beacon
from radiotag.manifest import Summary
from radiotag.marking_run import THREADS, run
from radiotag.networks import Network, available_device, channels_first, marking_weights, resized
from radiotag.plan import (
    MarkOptions,
    Plan,
    allotted,
    by_class,
    carrier_rows,
    choose_at_random,
    choose_hardest,
    make_plan,
)
from radiotag.probes import ArrayImages, FolderImages, UnmarkedImages
from radiotag.public import Checked, Conditions, check, images_digest, public_half, read_public
from radiotag.ranking import NOTHING, Choice, by_hardness, features_of
from radiotag.verification import Finding, Model, Progress, VerifyOptions

PathLike = str | os.PathLike[str]
Labels = Sequence[str] | Sequence[int] | ArrayLike
One = PathLike | nn.Module | Callable[..., Any]  # suspect


def load_key(path: PathLike) -> Key:
    """Read a secret key file. RadiotagError if it is missing, readable by others, damaged or of another version."""
    return keys.load_key(Path(path))


def keygen(
    output: PathLike | None = None,
    *,
    network: PathLike = "builtin",
    classes: int | Sequence[str] = 1000,
    beacon: str | None = None,
    committed: Key | None = None,
    force: bool = False,
) -> Key:
    """Make a secret key; with `output`, write it (0600) and its public half beside it (OUTPUT.pub).

    network: "builtin", the name of a torchvision classifier, or a checkpoint's path. classes: how many carriers, or the
    classes' names. beacon: a public random value that did not exist when the commitment of an earlier key, `committed`,
    was published: the new key is that key with the beacon added.
    RadiotagError for what exists already (unless `force`), for a network that is not there, and for names that are not
    those of different classes.

    >>> import radiotag
    >>> key = radiotag.keygen(classes=["cat", "dog"])
    >>> key.carriers.shape, key.class_names
    (torch.Size([2, 512]), ['cat', 'dog'])
    """
    path = None if output is None else Path(output)
    public = None if path is None else _check_names(path, force)
    wanted = _number_or_names(classes)
    if committed is not None:
        key = with_beacon(committed, beacon)
    else:
        key = new_key(*marking_weights(os.fspath(network)), wanted, beacon=beacon)
    if path is None or public is None:
        return key
    save_key(path, key, exclusive=not force)
    write_atomically(public, public_half(key).encode(), mode=0o644)
    return replace(key, path=path)


def show(path: PathLike) -> tuple[Key, str, Path | None]:
    """A key, everything public about it, and where its lost public half was written again, if it was lost."""
    key, public = load_key(path), Path(path).with_suffix(".pub")
    text = public_half(key)
    if public.exists() or public == Path(path):
        return key, text, None
    write_atomically(public, text.encode(), mode=0o644)
    return key, text, public


def _number_or_names(classes: int | Sequence[str]) -> int | list[str]:
    """What `keygen` is given as classes, NumPy's kinds of numbers and names among it, in plain kinds."""
    if isinstance(classes, Integral):
        return int(classes)
    names = [classes] if isinstance(classes, str) else [*classes]  # type: ignore[misc]
    if isinstance(classes, str) or not all(isinstance(name, str) and name for name in names):
        raise RadiotagError(f"classes are a number or a list of names, not {classes!r}", "give a list of strings")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RadiotagError(f"two classes are called '{twice}'", "name each class once")
    return [str(name) for name in names]


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


# ---------------------------------------------------------------- mark


class MarkedFolder(NamedTuple):
    """A data set's marked copy on disk."""

    output: Path  # to be released
    manifest: Path  # which images are marked: to be kept secret
    summary: Summary


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MarkedImages:
    """Marked images in memory."""

    images: Any  # uint8, of the kind and the layout that was given; those that are not marked are unchanged
    chosen: NDArray[np.bool_]  # (N,) which are marked: to be kept secret
    psnr: NDArray[np.float64]  # (N,) dB; NaN where nothing was marked


@overload
def mark(
    source: PathLike, key: Key | PathLike, output: PathLike | None = ..., *,
    options: MarkOptions | None = ..., progress: Callable[[Summary], None] = ...,
) -> MarkedFolder: ...  # fmt: skip


@overload
def mark(
    source: NDArray[np.uint8] | Tensor, key: Key | PathLike, *,
    labels: Labels | None = ..., options: MarkOptions | None = ..., progress: Callable[[Summary], None] = ...,
) -> MarkedImages: ...  # fmt: skip


@torch.inference_mode(False)  # gradients are needed, wherever this is called
def mark(
    source: Any,
    key: Key | PathLike,
    output: PathLike | None = None,
    *,
    labels: Labels | None = None,
    options: MarkOptions | None = None,
    progress: Callable[[Summary], None] = lambda _: None,
) -> MarkedFolder | MarkedImages:
    """Mark a data set: a folder or tar shards, whose marked copy is written, or images in memory.

    source: a path, or uint8 images (N, H, W, 3) or (N, 3, H, W), an array or a tensor, with `labels`, class names or
    numbers; without labels they are one class. output: SRC-marked by default. An image in memory gets the mark that a
    PNG file CLASS/NNNNNNN.png of its class and number would get. Labels that are numbers are the key's carriers, even
    if some are absent; a folder's classes take the carriers in sorted order, unless the key names them.
    RadiotagError for what cannot be marked; nothing is ever changed in place.

    >>> import numpy as np, radiotag
    >>> images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    >>> key = radiotag.keygen(classes=2)
    >>> marked = radiotag.mark(images, key, labels=[0, 1, 0, 1], options=radiotag.MarkOptions(fraction=0.5, steps=2))
    >>> marked.images.shape, int(marked.chosen.sum()), bool(np.nanmin(marked.psnr) > 33.9)
    ((4, 32, 32, 3), 2, True)
    """
    options = options or MarkOptions()
    _check_options(options)
    options = replace(options, device=available_device(options.device))
    secret = key if isinstance(key, Key) else load_key(key)
    if not isinstance(source, str | os.PathLike):
        if output is not None:
            raise RadiotagError("images in memory are returned, not written", "leave output out, or give a folder")
        return _mark_arrays(source, secret, labels, options, progress)
    if labels is not None:
        raise RadiotagError("labels are for images in memory", "sort the images of a folder into class sub-folders")
    plan = plan_marking(Path(source), secret, Path(output) if output else None, options)
    summary = run(plan, progress)
    if summary.failed:
        row = summary.failed[0]
        raise RadiotagError(f"{len(summary.failed)} images failed, first {row['error']}", row.get("hint", ""))
    return MarkedFolder(plan.output, plan.manifest, summary)


def plan_marking(source: Path, key: Key, output: Path | None, options: MarkOptions) -> Plan:
    """What marking a data set on disk would do. RadiotagError before anything is touched."""
    output = output or marked_name(source if source.name not in {"", ".."} else source.resolve())
    if key.path and key.path.resolve().is_relative_to(source.resolve()):
        raise RadiotagError(f"{key.path} lies in {source}, and would be copied with it", "keep the key elsewhere")
    return make_plan(source, output, key, options)


def marked_name(source: Path) -> Path:
    """SRC-marked, which for a tar file still ends in .tar."""
    stem, suffix = (source.stem, source.suffix) if source.is_file() else (source.name, "")
    if not stem:
        raise RadiotagError(f"{source} has no name to build the output's on", "name the output with -o")
    return source.with_name(f"{stem}-marked{suffix}")


def _mark_arrays(
    source: Any, key: Key, labels: Labels | None, options: MarkOptions, progress: Callable[[Summary], None]
) -> MarkedImages:
    given = as_array(source)
    pixels = as_images(given)  # (N, 3, H, W)
    names, key = class_labels(labels, key, len(pixels))
    if labels is None and key.class_names and len(key.class_names) > 1:
        hint = "give labels, or use a key of one class: keygen(classes=1)"
        raise RadiotagError("the key names its classes, and the images have no labels", hint)
    rows = carrier_rows(key, sorted(set(names)))
    paths = [f"{name}/{i:07d}.png".lstrip("/") for i, name in enumerate(names)]
    network = key.network(options.device)
    wanted = allotted(key, dict(Counter(names)), rows, options)
    choice = _choose(network, pixels, dict(zip(paths, names, strict=True)), wanted, key, options)
    places = [i for i, path in enumerate(paths) if path in choice.marked]
    marked, psnr = pixels.clone(), np.full(len(pixels), np.nan)
    together = max(1, min(options.batch_size, PIXELS_TOGETHER // pixels[0, 0].numel()))
    with ThreadPoolExecutor(THREADS) as pool:
        marker = Marker(network=network, marking=options.marking, pool=pool, format="png")
        for start in range(0, len(places), together):
            batch = places[start : start + together]
            pictures = [decode(png(pixels[i].permute(1, 2, 0).numpy()), paths[i]) for i in batch]
            requests = [
                request_for(
                    key, picture, paths[i], rows[names[i]], seed=options.seed, patterned=paths[i] in choice.patterned
                )
                for i, picture in zip(batch, pictures, strict=True)
            ]
            for i, request, seen in zip(batch, requests, _marked_pixels(marker, requests), strict=True):
                marked[i] = channels_first(seen).round_().to(torch.uint8)
                psnr[i] = image_psnr(request.picture.rgb, seen)
            progress(Summary(images=len(places), done=start + len(batch)))
    return MarkedImages(images=like(given, marked), chosen=np.isin(np.arange(len(pixels)), places), psnr=psnr)


def _choose(
    network: Network, pixels: Tensor, labels: dict[str, str], wanted: dict[str, int], key: Key, options: MarkOptions
) -> Choice:
    """The choice of images (N, 3, H, W) to mark; labels: path → class, in their order; wanted: class → how many."""
    if options.choose == "random" or len(wanted) == 1:
        return choose_at_random(key, by_class(labels.items()), wanted)
    images = (resized(image[None].float() / 255, network.spec.image_size)[0] for image in pixels)
    found = features_of(network, images, len(pixels), options.batch_size, lambda _: None)
    return choose_hardest(key, by_hardness(labels, found), wanted, NOTHING)


def _marked_pixels(marker: Marker, requests: Sequence[Request]) -> list[Pixels]:
    """The pixels (H, W, 3) of marked images. RadiotagError for the first that cannot be marked."""
    results = [result for part in mark_requests(marker, requests) for result in part]
    for result in results:
        if isinstance(result, RadiotagError):
            raise result
    return [result.pixels for result in results if not isinstance(result, RadiotagError)]


# ---------------------------------------------------------------- verify


@overload
def verify(
    suspect: One, key: Key | PathLike, data: Any = ..., *,
    labels: Labels | None = ..., options: VerifyOptions | None = ..., progress: Progress = ...,
) -> Finding: ...  # fmt: skip


@overload
def verify(
    suspect: list[Any] | tuple[Any, ...], key: Key | PathLike, data: Any = ..., *,
    labels: Labels | None = ..., options: VerifyOptions | None = ..., progress: Progress = ...,
) -> list[Finding]: ...  # fmt: skip


@torch.inference_mode(False)  # gradients are needed, wherever this is called
def verify(
    suspect: Any,
    key: Key | PathLike,
    data: PathLike | ArrayLike | Tensor | None = None,
    *,
    labels: Labels | None = None,
    options: VerifyOptions | None = None,
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
    >>> options = radiotag.VerifyOptions(image_size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    >>> radiotag.verify(model, key, options=options).detected
    False
    """
    options = _plain_options(options or VerifyOptions())
    many = isinstance(suspect, list | tuple)
    models = [_plain_suspect(one) for one in (suspect if many else [suspect])]
    secret = key if isinstance(key, Key) else load_key(key)
    if not models:
        raise RadiotagError("there is no suspect", "give a model, or a list of them")
    images, secret = unmarked_images(data, labels, secret, options)
    check_public(secret, images, options)
    if not options.black_box:
        findings = verification.verify(models, secret, options, images, progress)
    elif images is None:
        raise RadiotagError("the black-box test asks with real images", "give data and labels")
    else:
        queries = verification.prepare_queries(secret, images, options)
        findings = verification.verify_black_box(models, queries, secret, options, progress)
    return findings if many else findings[0]


def _plain_suspect(suspect: Any) -> Model:
    """A suspect in the form that is tested; a compiled module runs none of the hooks that its features are read with.

    RadiotagError for what is no suspect.
    """
    if isinstance(suspect, str | os.PathLike):
        return Path(suspect)
    if isinstance(suspect, torch.jit.ScriptModule):
        raise RadiotagError("TorchScript is tested from its file", "write it with torch.jit.save, and give the path")
    if not callable(suspect):
        kind = type(suspect).__name__
        raise RadiotagError(f"a suspect is a path, a module or a function, not {kind}", "load weights into a module")
    model: Model = getattr(suspect, "_orig_mod", suspect)
    return model


def unmarked_images(
    data: Any, labels: Labels | None, key: Key, options: VerifyOptions
) -> tuple[UnmarkedImages | None, Key]:
    """The images that suspects are shown, and the key under which their labels mean carriers."""
    if data is None or isinstance(data, str | os.PathLike):
        if labels is not None:
            raise RadiotagError("labels are for images in memory", "give the images, too, or leave labels out")
        return None if data is None else FolderImages(Path(data), options.manifest), key
    pixels = as_images(data)
    names, key = class_labels(labels, key, len(pixels))
    return ArrayImages(pixels, names), key


FREE = ("architecture", "image_size", "mean", "std", "decoys")  # options that shape a result


def check_public(key: Key, images: UnmarkedImages | None, options: VerifyOptions) -> Checked:
    """Compare a test with the publication in `options.public`. RadiotagError where anything differs."""
    chosen = tuple(name for name in FREE if getattr(options, name) is not None)
    public = read_public(options.public) if options.public else None
    return check(public, key, options.manifest, images, chosen)


def conditions(key: Key, images: UnmarkedImages | None, options: VerifyOptions) -> Conditions:
    """Under which conditions a test is made, compared with the publication. RadiotagError where anything differs."""
    return Conditions(
        checked=check_public(key, images, options),
        data=images.name if images else "synthetic",
        digest=images_digest(images) if images else None,
        images=len(images.labels) if images else None,
        options={name: getattr(options, name) for name in (*FREE, "black_box", "alpha", "calibrate")}
        | {"manifest": str(options.manifest) if options.manifest else None},
    )


# ---------------------------------------------------------------- options

CHOICES = {"choose": ("hard", "random"), "format": ("keep", "png"), "on_unmarkable": ("fail", "copy")}
RANGES: dict[str, tuple[float, float]] = {  # as the commands allow
    "fraction": (0, 1), "epsilon": (0.1, 255), "min_psnr": (10, 80), "steps": (1, 10_000), "seed": (0, math.inf),
    "image_size": (1, 2048), "alpha": (1e-300, 0.5), "calibrate": (0, 1_000_000), "decoys": (1, 99_999),
    "batch_size": (1, 4096),
}  # fmt: skip


def _check_options(options: MarkOptions | VerifyOptions) -> None:
    """RadiotagError for values that the commands would not take."""
    for name, (least, most) in RANGES.items():
        value = getattr(options, name, None)
        if value is not None and not least <= value <= most:
            raise RadiotagError(f"{name} is {value:g}, and should be from {least:g} to {most:g}", "correct options")
    for name, words in CHOICES.items():
        if (word := getattr(options, name, words[0])) not in words:
            raise RadiotagError(f"{name} is '{word}', and should be {' or '.join(words)}", "correct options")


def _plain_options(options: VerifyOptions) -> VerifyOptions:
    """The options in plain kinds. RadiotagError for values, and for combinations, that mean nothing."""
    _check_options(options)
    if options.calibrate and options.black_box:
        raise RadiotagError("calibrate is for the white-box test", "leave it out: black-box counts its null exactly")
    if options.decoys and not options.black_box:
        raise RadiotagError("decoys are of the black-box test", "set black_box=True, or leave decoys out")
    manifest = None if options.manifest is None else Path(options.manifest)
    public = None if options.public is None else Path(options.public)
    mean, std = _triple(options, "mean"), _triple(options, "std")
    device = available_device(options.device)
    return replace(options, manifest=manifest, public=public, mean=mean, std=std, device=device)


def _triple(options: VerifyOptions, name: str) -> tuple[float, ...] | None:
    given = getattr(options, name)
    if given is None:
        return None
    values = tuple(np.ravel(given).tolist())
    if len(values) != 3 or not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0):
        raise RadiotagError(f"{name} is three numbers, of pixels in [0, 1], not {given}", "(0.5, 0.5, 0.5) for one")
    return values


# ---------------------------------------------------------------- arrays


def as_array(images: Any) -> Tensor | NDArray[Any]:
    """What a caller holds, a list of images for one, as a tensor or an array."""
    if isinstance(images, Tensor):
        return images
    try:
        return np.asarray(images)
    except ValueError as error:
        raise RadiotagError(f"the images are no array: {error}", "give images of one size") from error


def as_images(images: Any) -> Tensor:
    """uint8 (N, H, W, 3) or (N, 3, H, W), an array or a tensor → a uint8 tensor (N, 3, H, W)."""
    held = as_array(images)
    kind, shape = str(held.dtype).removeprefix("torch."), tuple(held.shape)
    if kind != "uint8" or len(shape) != 4 or 3 not in (shape[1], shape[3]):
        raise RadiotagError(f"images are uint8, (N, H, W, 3) or (N, 3, H, W), not {kind} {shape}", "convert them first")
    if 0 in shape:
        raise RadiotagError(f"there are no images in {shape}", "give at least one")
    given = held.cpu() if isinstance(held, Tensor) else torch.from_numpy(np.require(held, requirements=["C", "W"]))
    return given if shape[1] == 3 else given.permute(0, 3, 1, 2).contiguous()


def like(given: Tensor | NDArray[Any], images: Tensor) -> Any:
    """(N, 3, H, W) → the layout, the kind and the device of the images that were given."""
    laid = images if given.shape[1] == 3 else images.permute(0, 2, 3, 1).contiguous()
    return laid.to(given.device) if isinstance(given, Tensor) else laid.numpy()


def class_labels(labels: Any, key: Key, count: int) -> tuple[list[str], Key]:
    """The class name of each of `count` images ("" without labels), and the key under which the names mean carriers.

    Numbers are rows of the key: its names, or, of a key without names, the numbers themselves.
    RadiotagError where labels and images, or labels and key, do not fit.
    """
    if labels is None:
        return [""] * count, key
    try:
        plain = labels.tolist() if isinstance(labels, Tensor | np.ndarray) else list(labels)
        named = all(isinstance(label, str) for label in plain)
        rows = [] if named else [operator.index(label) for label in plain]
    except TypeError as error:
        raise RadiotagError(f"labels are class names, or whole numbers: {error}", "give one an image") from error
    if isinstance(labels, str) or len(plain) != count:
        raise RadiotagError(f"there are {count} images and {len(plain)} labels", "give one label an image")
    if named:
        return [str(label) for label in plain], key
    names = key.class_names or [str(row) for row in range(len(key.carriers))]
    if not 0 <= min(rows) <= max(rows) < len(names):
        numbers = f"labels run from {min(rows)} to {max(rows)}, the key has {len(names)} classes"
        raise RadiotagError(numbers, "number the classes from 0, or make a larger key")
    return [names[row] for row in rows], replace(key, metadata={**key.metadata, "class_names": names})
