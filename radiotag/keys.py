"""Secret keys: their content, files and public halves, and the random choices that only a key's owner can repeat.

A key's file holds a seed of 32 bytes, the marking network and a description. Everything secret follows from these by
SHAKE-256: carriers, patterns, and which images are marked. So nobody can choose a carrier: `load_key` derives them,
and refuses a file that holds any. One attack remains: to draw many keys and to keep the best of N, which makes p
smaller by a factor of N at most. A beacon ends it: a public random value that did not exist when the seed's commitment
was published.
"""

import hashlib
import hmac
import json
import os
import random
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from radiotag import plainjson
from radiotag.cosines import PATTERN_DIMENSION
from radiotag.errors import RadiotagError
from radiotag.files import write_atomically
from radiotag.networks import Network, State, from_state, spec_from, unpack
from radiotag.radioactive import uniform_carriers

KEY_FORMAT = 2  # version of key files
CONTRASTED = "contrasted pattern or pattern+response+ridge"
NESTED = f"nested {CONTRASTED}"
EVERY_CLASS = f"{NESTED}, by images of every class"
AS_ONE = f"{EVERY_CLASS}, a manifest's classes as one"
AGAINST_ALL = f"{AS_ONE}, against all that it records"
STATISTIC = f"{AGAINST_ALL}, few photographs"  # what new keys declare
_CONTRASTED = (
    "the sum of two unit vectors, response and ridge alignment (the latter at half weight without labelled images), "
    "and the whitened pattern; what the classes share and a reference classifier's response are removed from each; "
    "Stouffer over the classes of each; the smaller of the pattern's p and Fisher's of both, corrected for the choice"
)
_NESTED = (
    f"{_CONTRASTED}; so of the first 1, 2, 5, 10, … classes of an order that only the key knows, and of all: the "
    "smallest p, times the number of these sets"
)
_EVERY_CLASS = (
    f"{_NESTED}; response and pattern are each the sum of two unit vectors, from a class's own images and from as many "
    "of the others"
)
_AS_ONE = (
    f"{_EVERY_CLASS}; where a manifest names the marked classes, these alone are tested, as one set, which takes no "
    "correction"
)
_AGAINST_ALL = (
    f"{_AS_ONE}; what the classes share is that of all classes which the manifest records; if images are too many, as "
    "many of every class are shown"
)
STATISTICS = {  # in the order of the versions that declared them
    CONTRASTED: _CONTRASTED,
    NESTED: _NESTED,
    EVERY_CLASS: _EVERY_CLASS,
    AS_ONE: _AS_ONE,
    AGAINST_ALL: _AGAINST_ALL,
    STATISTIC: f"{_AGAINST_ALL}; without labelled images, suspects with an input of more than 64 pixels are asked with "
    "fewer images; a manifest's classes are one set, too, where answers alone are tested",
}
NEW_KEY = "radiotag keygen makes a new key, to mark with (it proves nothing of models that exist)"
DECLARED = ("format", "statistic", "network", "dimension", "classes", "class_names", "beacon")  # carriers follow
LARGEST = 1_000_000  # classes, or dimensions
MOST_NUMBERS = 2**27  # in all carriers: 21,841 classes of 4096 dimensions, and a gigabyte while they are drawn
PATTERNED = 0.25  # share of a class with the pattern: if all had it, networks would learn it and not the pictures


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A secret key: everything that marking and verification need, and nothing else."""

    seed: bytes  # 32 bytes from which all that is secret follows
    weights: State  # of the marking network, as stored (int8 weights come with a scale)
    metadata: dict[str, Any]  # format, statistic, network (a Spec), dimension, classes, class_names, beacon, created
    fingerprint: str  # SHA-256 over all of the above, hexadecimal
    carriers: Tensor  # (C, d) float32, unit rows: u
    patterns: Tensor  # (C, m) float32, unit rows: v
    secret: bytes  # 32 bytes that determine which images are marked and how they are augmented
    class_order: tuple[int, ...]  # carrier rows in a secret order: few marks go into the first classes
    path: Path | None = field(default=None, compare=False)  # the file that it was read from or written to

    @property
    def class_names(self) -> list[str] | None:
        """Names in carrier order; None if the key only counts its classes."""
        names: list[str] | None = self.metadata["class_names"]
        return names

    @property
    def named_rows(self) -> dict[str, int]:
        """Class → carrier row; empty if the key only counts its classes."""
        return {name: row for row, name in enumerate(self.class_names or ())}

    @property
    def nested(self) -> bool:
        """Whether the declared statistic tests the first classes of the order alone, too."""
        return self._declares(NESTED)

    @property
    def by_every_class(self) -> bool:
        """Whether the declared statistic asks images of the other classes, too, what would make them a class's."""
        return self._declares(EVERY_CLASS)

    @property
    def against_all(self) -> bool:
        """Whether a manifest's marked classes are compared with all that it records, by as many images of each."""
        return self._declares(AGAINST_ALL)

    @property
    def few_photographs(self) -> bool:
        """Whether suspects of photographs are asked with few images, if there are no labelled ones."""
        return self._declares(STATISTIC)

    @property
    def black_box_as_one(self) -> bool:
        """Whether the black-box test, too, takes a manifest's classes as one set."""
        return self._declares(STATISTIC)

    def _declares(self, statistic: str) -> bool:
        """Whether the declared statistic is this one, or a later one, which does the same and more."""
        order = list(STATISTICS)
        return order.index(self.statistic) >= order.index(statistic)

    def tested_order(self, *, by_manifest: bool) -> tuple[int, ...] | None:
        """The order whose first classes are tested alone, too; None if the statistic tests all together.

        by_manifest: whether a manifest names the classes that are marked.
        """
        return self.class_order if self.nested and not (by_manifest and self._declares(AS_ONE)) else None

    @property
    def statistic(self) -> str:
        """The declared verification statistic."""
        return str(self.metadata["statistic"])

    @property
    def beacon(self) -> str | None:
        """The public random value that went into the carriers, if one did."""
        value: str | None = self.metadata["beacon"]
        return value

    @property
    def commitment(self) -> str:
        """SHA-256 of the seed, hexadecimal: published before a beacon, it shows that the seed was not chosen after."""
        return hashlib.sha256(self.seed).hexdigest()

    def network(self, device: str = "cpu") -> Network:
        """The marking network φ, ready to run. RadiotagError if it is not described, or its weights do not fit."""
        return _network(self.weights, self.metadata).to(device)


def null_carriers(key: Key, digest: Callable[[int], bytes]) -> tuple[Tensor, Tensor]:
    """Carriers (C, d) and patterns (C, m) of a null key, shaped as this key's; digest(n) returns n random bytes."""
    (classes, dimension), split = key.carriers.shape, 8 * key.carriers.numel()
    stream = digest(split + 8 * key.patterns.numel())
    carriers = uniform_carriers(classes, dimension, lambda _: stream[:split])
    return carriers, uniform_carriers(classes, PATTERN_DIMENSION, lambda _: stream[split:])


# ---------------------------------------------------------------- what follows from a seed


def prefixed(*parts: bytes) -> bytes:
    """Byte strings joined so that no two lists of them give the same bytes: each comes after its length."""
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def weights_digest(weights: State) -> bytes:
    """SHA-256 over all tensors of a network: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        values = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        digest.update(prefixed(name.encode(), str(tensor.dtype).encode(), str(tuple(tensor.shape)).encode(), values))
    return digest.digest()


def derive(seed: bytes, network: bytes, metadata: dict[str, Any], purpose: str, count: int) -> bytes:
    """`count` bytes for one purpose, by SHAKE-256 over the seed and all that the key declares before it is used.

    `network` is the `weights_digest` of the marking network.
    """
    declared = {name: metadata[name] for name in DECLARED}
    absorbed = prefixed(b"radiotag", purpose.encode(), seed, network, _canonical(declared))
    return hashlib.shake_256(absorbed).digest(count)


def fingerprint(seed: bytes, network: bytes, metadata: dict[str, Any]) -> str:
    """SHA-256 over all content of a key, hexadecimal; not over file bytes. It reveals nothing about the seed."""
    return hashlib.sha256(prefixed(seed, network, _canonical(metadata))).hexdigest()


def key_from(seed: bytes, weights: State, metadata: dict[str, Any], path: Path | None = None) -> Key:
    """The key of a seed, a network and a description: all else is derived."""
    classes, dimension = metadata["classes"], metadata["dimension"]
    network = weights_digest(weights)
    carriers, patterns = (
        uniform_carriers(classes, size, partial(derive, seed, network, metadata, purpose))
        for purpose, size in (("carriers", dimension), ("patterns", PATTERN_DIMENSION))
    )
    return Key(
        seed=seed, weights=weights, metadata=metadata, fingerprint=fingerprint(seed, network, metadata),
        carriers=carriers, patterns=patterns, secret=derive(seed, network, metadata, "images", 32), path=path,
        class_order=_permutation(classes, derive(seed, network, metadata, "classes", 8 * classes)),
    )  # fmt: skip


def _permutation(count: int, stream: bytes) -> tuple[int, ...]:
    """range(count) in the order of uniform numbers of 8 bytes each; equal ones, which are rare, stay as they are."""
    numbers = np.frombuffer(stream, dtype=">u8")
    return tuple(np.argsort(numbers, kind="stable").tolist())


def new_key(
    weights: State,
    network: dict[str, Any],
    dimension: int,
    classes: int | Sequence[str],
    entropy: Callable[[int], bytes] = os.urandom,
    beacon: str | None = None,
) -> Key:
    """Draw a key for a marking network of d = `dimension` features. RadiotagError for classes that a key cannot have.

    weights: as stored; network: its Spec as plain values; classes: their number, or their names in carrier order.
    """
    names = None if isinstance(classes, int) else list(classes)
    metadata = {
        "format": KEY_FORMAT, "statistic": STATISTIC, "network": network, "dimension": dimension,
        "classes": classes if isinstance(classes, int) else len(classes), "class_names": names, "beacon": beacon,
        "created": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip
    metadata = json.loads(json.dumps(metadata))  # as it is read from the file: without tuples
    if metadata["classes"] < 1:
        raise RadiotagError("a key needs at least one class")
    if metadata["classes"] * dimension > MOST_NUMBERS:
        raise RadiotagError(f"{metadata['classes']} carriers of {dimension} numbers are too many", "give fewer classes")
    if names is not None and len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RadiotagError(f"the class '{twice}' is there twice", "give each class one name")
    return key_from(entropy(32), weights, metadata)


def with_beacon(key: Key, beacon: str | None) -> Key:
    """The key of the same seed, network and classes with a beacon. RadiotagError without one, or if it has one."""
    if not beacon:
        raise RadiotagError("a committed seed is used once, with a beacon", "add --beacon TEXT")
    if key.beacon is not None:
        raise RadiotagError("that key has a beacon already", "give the key that was published without one")
    return key_from(key.seed, key.weights, {**key.metadata, "beacon": beacon})


# ---------------------------------------------------------------- key files


def save_key(path: Path, key: Key, *, exclusive: bool = True) -> None:
    """Write the key file atomically, readable by its owner only (0600). RadiotagError if that fails.

    exclusive: refuse to overwrite an existing file.
    """
    tensors = {f"network.{name}": tensor.contiguous() for name, tensor in key.weights.items()}
    tensors["seed"] = torch.tensor(list(key.seed), dtype=torch.uint8)
    metadata = {"radiotag": json.dumps(key.metadata, sort_keys=True)}
    if exclusive:
        try:
            path.touch(mode=0o600, exist_ok=False)
        except OSError as error:
            raise RadiotagError(f"cannot create {path}: {error.strerror}", "choose another name with -o") from error
    try:
        write_atomically(path, safetensors.torch.save(tensors, metadata), mode=0o600)
    except BaseException:
        if exclusive:
            path.unlink(missing_ok=True)
        raise


def load_key(path: Path) -> Key:
    """Read a key file. RadiotagError if it is missing, readable by others, damaged or of another version.

    Refused, too, is a file that holds anything beside seed, network and description, and a network that cannot run.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = plainjson.parse((file.metadata() or {})["radiotag"])
            _check_format(path, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        seed = bytes(tensors.pop("seed").tolist())
        _check_content(metadata, tensors, seed)
        if os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise RadiotagError(f"{path} can be read by others", f"chmod 600 {path}")
    except FileNotFoundError as error:
        raise RadiotagError(f"no key at {path}", f"check the path; {NEW_KEY}") from error
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = "it is a folder" if path.is_dir() else str(error)
        hint = "give the secret half: --key k.safetensors" if path.suffix == ".pub" else f"check the path; {NEW_KEY}"
        raise RadiotagError(f"{path} is not a radiotag key: {reason}", hint) from error
    weights = {name.removeprefix("network."): tensor for name, tensor in tensors.items()}
    try:
        _check_network(weights, metadata)
    except RadiotagError as error:
        raise RadiotagError(f"{path} is not a radiotag key: {error}", f"check the path; {NEW_KEY}") from error
    return key_from(seed, weights, metadata, path)


def _check_format(path: Path, metadata: Any) -> None:
    """RadiotagError for a key of another version; ValueError for a description that is none."""
    if not isinstance(metadata, dict):
        raise ValueError("its description is no mapping")
    if metadata.get("format") == 1:
        made = f"{path} was made by radiotag 0.4 or earlier, whose carriers an owner could choose"
        raise RadiotagError(made, f"verify with that version: pip install 'radiotag<0.5'; {NEW_KEY}")
    if metadata.get("format") != KEY_FORMAT:
        raise RadiotagError(f"{path} is of a format that this version does not know", "pip install -U radiotag")
    if metadata.get("statistic") not in STATISTICS:
        declared = f"{path} declares the statistic {metadata.get('statistic')!r}, which this version does not compute"
        raise RadiotagError(declared, "use the version of radiotag that made the key")


def _check_content(metadata: dict[str, Any], tensors: State, seed: bytes) -> None:
    """KeyError, TypeError or ValueError for a damaged key file, or for one that holds what no key has."""
    if metadata.keys() != {*DECLARED, "created"}:
        raise ValueError("its description has other entries than a key's")
    names, classes, dimension = metadata["class_names"], metadata["classes"], metadata["dimension"]
    if not all(type(value) is int and 1 <= value <= LARGEST for value in (classes, dimension)):
        raise ValueError("its numbers of classes and dimensions are damaged")
    if names is not None and (
        not isinstance(names, list) or not all(isinstance(name, str) for name in names)
        or len(names) != classes or len(set(names)) < len(names)
    ):  # fmt: skip
        raise ValueError("its class names are damaged, or one is there twice")
    if classes * dimension > MOST_NUMBERS or not isinstance(metadata["network"], dict):
        raise ValueError("its carriers are too many, or its network is not described")
    if not isinstance(metadata["beacon"], str | None) or not isinstance(metadata["created"], str):
        raise ValueError("its beacon or its date is damaged")
    if len(seed) != 32:
        raise ValueError("its seed is damaged")
    strange = next((name for name in tensors if not name.startswith("network.")), None)
    if strange is not None:
        raise ValueError(f"it holds {strange!r}, which no key has: carriers follow from the seed")


def _network(weights: State, metadata: dict[str, Any]) -> Network:
    spec = spec_from(metadata["network"])
    if spec is None:
        raise RadiotagError("the key's marking network is not described")
    return from_state(unpack(weights), spec)


def _check_network(weights: State, metadata: dict[str, Any]) -> None:
    """RadiotagError for a marking network that does not fit, is not finite, or whose class rows tell nothing apart."""
    if any(value.is_floating_point() and not value.isfinite().all() for value in weights.values()):
        raise RadiotagError("its network's weights are not finite")
    network = _network(weights, metadata)
    if network.head is None or network.dimension != metadata["dimension"]:
        raise RadiotagError(f"its network has not {metadata['dimension']} features")
    rows = network.head.weight.detach().double()
    spread = rows - rows.mean(0) if len(rows) > 1 else rows
    if not bool((spread.norm(dim=1) > 1e-6 * rows.norm(dim=1).max()).all()):
        raise RadiotagError("its network's class rows are degenerate")


# ---------------------------------------------------------------- choices


def choose(key: Key, paths: Sequence[str], count: int) -> set[str]:
    """Choose `count` of one class's paths to mark. The order in which they are taken follows from the secret."""
    return set(sorted(paths, key=lambda path: order(key, path))[:count])


def patterned(key: Key, path: str) -> bool:
    """Whether a marked image carries its class's pattern: about PATTERNED of all do, which `choose` takes first."""
    return int.from_bytes(order(key, path)[:8]) < PATTERNED * 2**64


def order(key: Key, path: str) -> bytes:
    """Uniform bytes that follow from the secret and the path alone, not from other files in the folder."""
    return hmac.digest(key.secret, os.fsencode(path), "sha256")


def image_random(key: Key, path: str, seed: int) -> random.Random:
    """The generator of one image's augmentations; it depends on the secret, the path and the seed alone."""
    return random.Random(hmac.digest(key.secret, f"augment\0{seed}\0".encode() + os.fsencode(path), "sha256"))
