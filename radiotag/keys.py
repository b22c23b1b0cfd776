"""Secret keys: their content, files and public halves, and the random choices that only a key's owner can repeat."""

import hashlib
import hmac
import json
import os
import random
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from radiotag.cosines import PATTERN_DIMENSION
from radiotag.errors import RadiotagError
from radiotag.files import write_atomically
from radiotag.networks import Network, State, from_state, spec_from, unpack
from radiotag.radioactive import uniform_carriers

KEY_FORMAT = 1  # version of key files
STATISTIC = "contrasted pattern or pattern+response+ridge"  # what new keys declare
STATISTICS = {
    STATISTIC: "the sum of two unit vectors, response and ridge alignment (the latter at half weight without labelled "
    "images), and the whitened pattern; what the classes share and a reference classifier's response are removed "
    "from each; Stouffer over the classes of each; the smaller of the pattern's p and Fisher's of both, corrected for "
    "the choice"
}
NEW_KEY = "radiotag keygen makes a new key, to mark with (it proves nothing of models that exist)"
PATTERNED = 0.25  # share of a class with the pattern: if all had it, networks would learn it and not the pictures


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A secret key: everything that marking and verification need, and nothing else."""

    carriers: Tensor  # (C, d) float32, unit rows: u
    patterns: Tensor  # (C, m) float32, unit rows: v
    secret: bytes  # 32 bytes that determine which images are marked and how they are augmented
    weights: State  # of the marking network, as stored (int8 weights come with a scale)
    metadata: dict[str, Any]  # format, statistic, network (a Spec), class_names or None
    fingerprint: str  # SHA-256 over all of the above, hexadecimal
    path: Path | None = field(default=None, compare=False)  # the file that it was read from or written to

    @property
    def class_names(self) -> list[str] | None:
        """Names in carrier order; None if the key only counts its classes."""
        names: list[str] | None = self.metadata["class_names"]
        return names

    @property
    def statistic(self) -> str:
        """The declared verification statistic."""
        return str(self.metadata["statistic"])

    def network(self, device: str = "cpu") -> Network:
        """The marking network φ, ready to run."""
        spec = spec_from(self.metadata["network"])
        if spec is None:
            raise RadiotagError("the key's marking network is not described")
        return from_state(unpack(self.weights), spec).to(device)


def null_carriers(key: Key, digest: Callable[[int], bytes]) -> tuple[Tensor, Tensor]:
    """Carriers (C, d) and patterns (C, m) of a null key, shaped as this key's; digest(n) returns n random bytes."""
    (classes, dimension), split = key.carriers.shape, 8 * key.carriers.numel()
    stream = digest(split + 8 * key.patterns.numel())
    carriers = uniform_carriers(classes, dimension, lambda _: stream[:split])
    return carriers, uniform_carriers(classes, PATTERN_DIMENSION, lambda _: stream[split:])


def new_key(
    weights: State,
    network: dict[str, Any],
    dimension: int,
    classes: int | Sequence[str],
    entropy: Callable[[int], bytes] = os.urandom,
) -> Key:
    """Draw a key for a marking network of d = `dimension` features; RadiotagError for less than one class.

    weights: as stored; network: its Spec as plain values; classes: their number, or their names in carrier order.
    """
    names = None if isinstance(classes, int) else list(classes)
    count = classes if isinstance(classes, int) else len(classes)
    if count < 1:
        raise RadiotagError("a key needs at least one class")
    metadata = {"format": KEY_FORMAT, "statistic": STATISTIC, "network": network, "class_names": names}
    metadata = json.loads(json.dumps(metadata))  # as it is read from the file: without tuples
    carriers, patterns = (uniform_carriers(count, d, entropy) for d in (dimension, PATTERN_DIMENSION))
    secret = entropy(32)
    hexdigest = fingerprint(carriers, patterns, secret, weights, metadata)
    return Key(
        carriers=carriers, patterns=patterns, secret=secret, weights=weights, metadata=metadata, fingerprint=hexdigest
    )


def fingerprint(carriers: Tensor, patterns: Tensor, secret: bytes, weights: State, metadata: dict[str, Any]) -> str:
    """SHA-256 over canonical content, not file bytes: it commits to the carriers and reveals nothing about them."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted({**weights, "carriers": carriers, "patterns": patterns}.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    digest.update(secret)
    return digest.hexdigest()


def public_half(key: Key) -> str:
    """The text to publish before the data: it commits to the key and to the test of suspects."""
    network = key.metadata["network"]
    return (
        f"radiotag public key, format {key.metadata['format']}\n"
        f"fingerprint: sha256:{key.fingerprint}\n"
        f"classes: {len(key.carriers)}\n"
        f"dimension: {key.carriers.shape[1]}\n"
        f"network: {network['architecture']}, {network['image_size']} px\n"
        f"statistic: {key.statistic}\n"
    )


def save_key(path: Path, key: Key, *, exclusive: bool = True) -> None:
    """Write the key file atomically, readable by its owner only (0600). RadiotagError if that fails.

    exclusive: refuse to overwrite an existing file.
    """
    tensors = {f"network.{name}": tensor.contiguous() for name, tensor in key.weights.items()}
    tensors["carriers"], tensors["patterns"] = key.carriers, key.patterns
    tensors["secret"] = torch.tensor(list(key.secret), dtype=torch.uint8)
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
    """Read a key file. RadiotagError if it is missing, readable by others, damaged or of another version."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = json.loads((file.metadata() or {})["radiotag"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        carriers, patterns = tensors.pop("carriers"), tensors.pop("patterns", torch.empty(0, PATTERN_DIMENSION))
        secret = bytes(tensors.pop("secret").tolist())
        _check_content(metadata, carriers, patterns, secret)
        if os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise RadiotagError(f"{path} can be read by others", f"chmod 600 {path}")
    except FileNotFoundError as error:
        raise RadiotagError(f"no key at {path}", f"check the path; {NEW_KEY}") from error
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        reason = "it is a folder" if path.is_dir() else str(error)
        hint = "give the secret half: --key k.safetensors" if path.suffix == ".pub" else f"check the path; {NEW_KEY}"
        raise RadiotagError(f"{path} is not a radiotag key: {reason}", hint) from error
    if metadata.get("format") != KEY_FORMAT:
        raise RadiotagError(f"{path} is of a format that this version does not know", "pip install -U radiotag")
    if metadata.get("statistic") not in STATISTICS:
        declared = f"{path} declares the statistic {metadata.get('statistic')!r}, which this version does not compute"
        raise RadiotagError(declared, "use the version of radiotag that made the key: 0.1 or 0.2")
    weights = {name.removeprefix("network."): tensor for name, tensor in tensors.items()}
    hexdigest = fingerprint(carriers, patterns, secret, weights, metadata)
    return Key(
        carriers=carriers, patterns=patterns, secret=secret, weights=weights, metadata=metadata, fingerprint=hexdigest,
        path=path,
    )  # fmt: skip


def _check_content(metadata: Any, carriers: Tensor, patterns: Tensor, secret: bytes) -> None:
    """KeyError or ValueError for a damaged key file. Other formats are not checked."""
    if not isinstance(metadata, dict):
        raise ValueError("its description is no mapping")
    if metadata.get("format") != KEY_FORMAT:
        return
    names, _ = metadata["class_names"], metadata["network"]
    unit = all(
        rows.dim() == 2 and bool(((rows.double().norm(dim=1) - 1).abs() < 1e-3).all()) for rows in (carriers, patterns)
    )
    fits = unit and patterns.shape == (len(carriers), PATTERN_DIMENSION)
    if not fits or len(secret) != 32 or (names is not None and len(names) != len(carriers)):
        raise ValueError("its carriers or its secret are damaged")


def choose(key: Key, paths: Sequence[str], fraction: float) -> set[str]:
    """Choose round(fraction·n) of one class's n paths to mark, at least one unless the fraction is 0.

    The order in which paths are taken follows from the secret.
    """
    count = min(len(paths), max(1, round(fraction * len(paths)))) if fraction > 0 else 0
    return set(sorted(paths, key=lambda path: _order(key, path))[:count])


def patterned(key: Key, path: str) -> bool:
    """Whether a marked image carries its class's pattern: about PATTERNED of all do, which `choose` takes first."""
    return int.from_bytes(_order(key, path)[:8]) < PATTERNED * 2**64


def _order(key: Key, path: str) -> bytes:
    """Uniform bytes that follow from the secret and the path alone, not from other files in the folder."""
    return hmac.digest(key.secret, os.fsencode(path), "sha256")


def image_random(key: Key, path: str, seed: int) -> random.Random:
    """The generator of one image's augmentations; it depends on the secret, the path and the seed alone."""
    return random.Random(hmac.digest(key.secret, f"augment\0{seed}\0".encode() + os.fsencode(path), "sha256"))
