"""Marking a folder: plan, mark in batches, write whole files, record each in a manifest, go on after an interruption.

The manifest is the journal: its first line says how the folder is marked, each further line is written after the file
it speaks of. What it records and what still matches is skipped by the next run; everything else is done again. An
image's mark depends on the key, the settings, its path and its bytes alone, so any interruption gives the same bytes.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from radiotag import RadiotagError
from radiotag.images import (
    Item,
    Picture,
    contact_sheet,
    copy_atomically,
    decode,
    encode,
    extension,
    file_hash,
    linf,
    psnr,
    roundtrip,
    scan,
    write_atomically,
)
from radiotag.networks import Network, resized
from radiotag.radioactive import Key, Marking, choose, default_psnr, image_random, mark_images, patterned

MANIFEST_FORMAT = 1
LOSSLESS = {"PNG", "BMP", "TIFF"}
TOGETHER = 2**24  # pixels optimised at once, at most: some 2 GiB; many photographs are slower together than apart
PART = re.compile(r"\.[0-9a-f]{16}\.part")  # what a file is called while it is written
BEST_PSNR = 100.0  # dB recorded of an image that came out unchanged: JSON has no infinity
Pixels = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Every input and what becomes of it, made before anything is written."""

    source: Path
    output: Path
    manifest: Path
    items: tuple[Item, ...]
    names: tuple[str, ...]
    rows: dict[str, int]  # class → carrier row
    chosen: frozenset[str]  # relative paths to mark
    others: tuple[Path, ...]  # copied so that the tree is complete
    header: dict[str, Any]  # the manifest's first line


@dataclass(slots=True, kw_only=True)
class Summary:
    """What a run did; `rows` are the manifest's, by path."""

    images: int
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: int = 0

    def with_status(self, status: str) -> list[dict[str, Any]]:
        """The rows of one status: marked, copied or failed."""
        return [row for row in self.rows.values() if row["status"] == status]


def plan(
    source: Path,
    output: Path,
    key: Key,
    marking: Marking,
    *,
    fraction: float = 1.0,
    format: str = "keep",
    seed: int = 0,
) -> Plan:
    """Pair every input with its output and choose what is marked. Raises RadiotagError before anything is touched."""
    items, names, others = scan(source)
    inside = output.resolve().is_relative_to(source.resolve()) or source.resolve().is_relative_to(output.resolve())
    if inside:
        raise RadiotagError(f"{output} and {source} lie in each other", "choose another folder with -o")
    by_class: dict[str, list[str]] = {}
    for item in items:
        by_class.setdefault(item.label, []).append(item.path.as_posix())
    chosen = frozenset(p for paths in by_class.values() for p in choose(key, paths, fraction))
    _check_collisions(items, chosen, format)
    settings = {name: getattr(marking, name) for name in ("epsilon", "min_psnr", "steps")}
    header = {
        "radiotag": MANIFEST_FORMAT, "fingerprint": key.fingerprint, "fraction": fraction, "format": format,
        "seed": seed, **settings,
    }  # fmt: skip
    beside = output if output.name else output.absolute()
    return Plan(
        source=source, output=output, manifest=beside.with_name(beside.name + ".manifest.jsonl"), items=tuple(items),
        names=tuple(names), rows=carrier_rows(key, names), chosen=chosen, others=tuple(map(Path, others)),
        header=header,
    )  # fmt: skip


def carrier_rows(key: Key, names: Sequence[str]) -> dict[str, int]:
    """Which carrier marks which class: by name where the key names its classes, else in sorted order."""
    known = key.class_names
    if known is None or (len(known) == 1 and list(names) == [""]):
        if len(names) > len(key.carriers):
            hint = f"make a larger key: radiotag keygen --classes {len(names)}"
            raise RadiotagError(f"the key has {len(key.carriers)} carriers, the folder {len(names)} classes", hint)
        return {name: row for row, name in enumerate(names)}
    missing = sorted(set(names) - set(known))
    if missing:
        raise RadiotagError(f"the key does not know the class '{missing[0]}'", "make one: radiotag keygen --data DIR")
    return {name: known.index(name) for name in names}


def _check_collisions(items: Sequence[Item], chosen: frozenset[str], format: str) -> None:
    if format == "keep":
        return
    targets = Counter(str(extension(i.path, format) if i.path.as_posix() in chosen else i.path) for i in items)
    twice = next((name for name, count in targets.items() if count > 1), None)
    if twice:
        raise RadiotagError(f"two images would both become {twice}", "rename one, or use --format keep")


# ---------------------------------------------------------------- manifest


def read_manifest(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(header, rows by path) of a manifest; a torn last line, left by a power cut, is passed over."""
    rows: dict[str, dict[str, Any]] = {}
    header: dict[str, Any] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines[:-1]):  # what follows the last newline is not a whole line
            row = json.loads(line)
            if number == 0:
                header = dict(row)
            else:
                rows[row["path"]] = dict(row)
    except OSError as error:
        raise RadiotagError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RadiotagError(f"{path} is not a radiotag manifest: {error}") from error
    if header.get("radiotag") != MANIFEST_FORMAT:
        raise RadiotagError(f"{path} is not a radiotag manifest")
    return header, rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, sort_keys=True) + "\n"


def _begin(plan: Plan, force: bool) -> dict[str, dict[str, Any]]:
    """Rows of earlier runs; a fresh manifest where there was none, or by force. Refuses what it cannot go on from."""
    rows: dict[str, dict[str, Any]] = {}
    if plan.manifest.exists():
        with plan.manifest.open("rb") as file:
            _lock(file, plan.output)  # force is no licence to mark beside another run
            try:
                header, rows = read_manifest(plan.manifest)
            except RadiotagError:
                if not force:
                    raise
                header = {}
            if force:
                write_atomically(plan.manifest, _line(plan.header).encode(), mode=0o600)
                return rows
        differing = [name for name in plan.header if header.get(name) != plan.header[name]]
        if differing:
            name = differing[0]
            raise RadiotagError(
                f"{plan.output} was begun with {name} {header.get(name)}, not {plan.header[name]}",
                "repeat the earlier setting, choose another -o, or start over with --force",
            )
        return rows
    if plan.output.exists() and not force and (not plan.output.is_dir() or any(plan.output.iterdir())):
        raise RadiotagError(f"{plan.output} exists and has no manifest", "choose another -o, or overwrite with --force")
    plan.manifest.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(plan.manifest, _line(plan.header).encode(), mode=0o600)  # it tells marked from unmarked
    return rows


def _lock(file: IO[Any], output: Path) -> None:
    """Hold the manifest for this process; a second run into the same folder is refused."""
    try:
        import fcntl
    except ImportError:  # not POSIX: no lock, files still appear whole
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RadiotagError(
            f"another radiotag is marking into {output}", "wait for it, or choose another -o"
        ) from error
    except OSError:  # a file system without locks
        return


def _mend(journal: IO[bytes]) -> None:
    """Cut a torn last line off, which would spoil the next one."""
    data = journal.read()
    journal.truncate(data.rfind(b"\n") + 1)
    journal.seek(0, os.SEEK_END)


def _sweep(plan: Plan, earlier: dict[str, dict[str, Any]], force: bool) -> None:
    """Remove what a killed run left half-written, and by force what an earlier one wrote and this one does not."""
    for part in plan.output.rglob(".*.part"):
        if PART.fullmatch(part.name):
            part.unlink(missing_ok=True)
    first = _line(plan.header).encode()
    for part in plan.manifest.parent.glob(".*.part"):  # a folder that others may be writing to
        if PART.fullmatch(part.name) and part.is_file() and _starts_with(part, first):
            part.unlink(missing_ok=True)
    outputs = {_output(plan, item) for item in plan.items} | {path.as_posix() for path in plan.others}
    for row in earlier.values():
        if row["status"] == "failed" or row["output"] in outputs:
            continue
        stale = plan.output / row["output"]
        if force and _file_hash(stale) == row["sha256_out"]:
            stale.unlink(missing_ok=True)
        elif not force and stale.exists():
            raise RadiotagError(
                f"{stale} was made by an earlier run, and would not be made by this one",
                "remove it, choose another -o, or start over with --force",
            )


def _starts_with(path: Path, first: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(first)) == first


def _output(plan: Plan, item: Item) -> str:
    """The output's relative path: unmarked images keep their format."""
    return str(extension(item.path, plan.header["format"] if item.path.as_posix() in plan.chosen else "keep"))


# ---------------------------------------------------------------- the run


def run(
    plan: Plan,
    key: Key,
    marking: Marking,
    *,
    device: str = "cpu",
    batch_size: int = 64,
    force: bool = False,
    strict: bool = False,
    progress: Callable[[int, Summary], None] = lambda *_: None,
) -> Summary:
    """Carry out a plan; `progress(images done, summary)` is called after every file."""
    earlier = _begin(plan, force)
    summary = Summary(images=len(plan.items))
    with plan.manifest.open("r+b") as journal:
        _lock(journal, plan.output)
        _mend(journal)
        _sweep(plan, earlier, force)
        todo = list(_remaining(plan, {} if force else earlier, summary))
        progress(len(summary.rows), summary)
        for item in todo:
            if item.path.as_posix() not in plan.chosen:
                _record(_copied(plan, item), journal, summary, strict)
                progress(len(summary.rows), summary)
        _copy_others(plan)
        for row in _marked(
            plan, [i for i in todo if i.path.as_posix() in plan.chosen], key, marking, device, batch_size
        ):
            _record(row, journal, summary, strict)
            progress(len(summary.rows), summary)
        ordered = [summary.rows[item.path.as_posix()] for item in plan.items]
        write_atomically(plan.manifest, "".join(map(_line, [plan.header, *ordered])).encode(), mode=0o600)
    return summary


def _remaining(plan: Plan, done: dict[str, dict[str, Any]], summary: Summary) -> Iterator[Item]:
    """The items whose record is missing, or no longer true of the plan, the file that came in or that gone out."""
    for item in plan.items:
        path = item.path.as_posix()
        row = done.get(path)
        wanted = ("marked" if path in plan.chosen else "copied", plan.rows[item.label])
        kept = row and (row["status"], row["row"]) == wanted and row["sha256_in"] == _file_hash(plan.source / path)
        if row and kept and row["sha256_out"] == _file_hash(plan.output / row["output"]):
            summary.rows[path] = row
            summary.skipped += 1
        else:
            yield item


def _record(row: dict[str, Any], journal: IO[bytes], summary: Summary, strict: bool) -> None:
    summary.rows[row["path"]] = row
    journal.write(_line(row).encode())
    journal.flush()
    if strict and row["status"] == "failed":
        raise RadiotagError(row["error"], "mend or remove the file, or leave out --strict")


def _file_hash(path: Path) -> str | None:
    try:
        return file_hash(path)
    except OSError:
        return None  # missing or unreadable: it will be done again, and then named


def _row(plan: Plan, item: Item, status: str, **more: Any) -> dict[str, Any]:
    path = item.path.as_posix()
    return {"path": path, "class": item.label, "row": plan.rows[item.label], "status": status, **more}


def _target(plan: Plan, relative: str) -> Path:
    target = plan.output / relative
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _same_time(source: Path, target: Path) -> None:
    times = source.stat()
    os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))  # a fresh time stamp would give the marked files away


def _copied(plan: Plan, item: Item) -> dict[str, Any]:
    source, path = plan.source / item.path, item.path.as_posix()
    try:
        target = _target(plan, path)
        copy_atomically(source, target)
        _same_time(source, target)
    except RadiotagError as error:
        if _file_hash(source) is not None:
            raise  # the output cannot be written: nothing else will be either
        return _row(plan, item, "failed", error=str(error))
    digest = _file_hash(target)
    return _row(plan, item, "copied", output=path, sha256_in=digest, sha256_out=digest)


def _copy_others(plan: Plan) -> None:
    for relative in plan.others:
        source, target = plan.source / relative, plan.output / relative
        if _file_hash(source) != _file_hash(target) or not target.exists():
            copy_atomically(source, _target(plan, relative.as_posix()))
            _same_time(source, target)


def _marked(
    plan: Plan, items: Sequence[Item], key: Key, marking: Marking, device: str, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Decode images into batches that fit in memory and mark them; yields a manifest row an image."""
    network = key.network(device) if items else None
    ready: list[tuple[Item, bytes, Picture]] = []
    for item in items:
        source = plan.source / item.path
        try:
            data = source.read_bytes()
            picture = decode(data, str(source))
            encode(picture, picture.rgb, plan.header["format"])  # what cannot be written costs this image alone
        except OSError as error:
            yield _row(plan, item, "failed", error=f"cannot read {source}: {error.strerror}")
            continue
        except RadiotagError as error:
            yield _row(plan, item, "failed", error=str(error))
            continue
        pixels = sum(other.rgb.size // 3 for _, _, other in ready) + picture.rgb.size // 3
        if network and ready and (len(ready) == batch_size or pixels > TOGETHER):
            yield from _mark_batch(plan, ready, key, network, marking)
            ready = []
        ready.append((item, data, picture))
    if network and ready:
        yield from _mark_batch(plan, ready, key, network, marking)


def _mark_batch(
    plan: Plan, ready: Sequence[tuple[Item, bytes, Picture]], key: Key, network: Network, marking: Marking
) -> Iterator[dict[str, Any]]:
    """Mark decoded images together, or by halves where memory does not suffice, and write their files."""
    format = str(plan.header["format"])
    pictures = [picture for _, _, picture in ready]
    rows = [plan.rows[item.label] for item, _, _ in ready]
    carriers = key.carriers[rows].to(network.get_buffer("mean").device)
    carrying = torch.tensor([patterned(key, item.path.as_posix()) for item, _, _ in ready])
    patterns = key.patterns[rows] * carrying[:, None]
    draws = [image_random(key, item.path.as_posix(), int(plan.header["seed"])) for item, _, _ in ready]
    try:
        marked = mark_pictures(network, pictures, carriers, patterns, draws, marking, format)
    except torch.OutOfMemoryError:
        if len(ready) == 1:
            raise
        for half in (ready[: len(ready) // 2], ready[len(ready) // 2 :]):
            yield from _mark_batch(plan, half, key, network, marking)
        return
    gains = feature_gains(network, pictures, [seen for _, seen in marked], carriers)
    for (item, data, picture), (encoded, seen), gain in zip(ready, marked, gains, strict=True):
        relative = _output(plan, item)
        target = _target(plan, relative)
        write_atomically(target, encoded)
        _same_time(plan.source / item.path, target)
        yield _row(
            plan, item, "marked", output=relative, sha256_in=hashlib.sha256(data).hexdigest(),
            sha256_out=hashlib.sha256(encoded).hexdigest(), psnr=round(min(psnr(picture.rgb, seen), BEST_PSNR), 3),
            linf=round(linf(picture.rgb, seen), 3), gain=round(gain, 5),
        )  # fmt: skip


def mark_pictures(
    network: Network,
    pictures: Sequence[Picture],
    carriers: Tensor,
    patterns: Tensor,
    draws: Sequence[Any],
    marking: Marking,
    format: str,
) -> list[tuple[bytes, Pixels]]:
    """Mark decoded images: (file bytes, pixels (H, W, 3) as read back from them) of each."""

    def read_back(i: int, image: Tensor) -> Tensor:
        if _lossless(pictures[i], format):
            return image
        return _tensor(roundtrip(pictures[i], _array(image), format))

    images = [_tensor(picture.rgb) for picture in pictures]
    marked = mark_images(network, images, carriers, draws, marking, read_back, patterns)
    return [_finish(picture, _array(m), marking, format) for picture, m in zip(pictures, marked, strict=True)]


def _lossless(picture: Picture, format: str) -> bool:
    return (format == "png" or picture.format in LOSSLESS) and picture.mode in {"RGB", "RGBA"}


def _finish(picture: Picture, marked: Pixels, marking: Marking, format: str) -> tuple[bytes, Pixels]:
    """Encode; where rounding or the encoder cost more than the PSNR allows, shrink the mark until it holds."""
    height, width, _ = picture.rgb.shape
    wanted = default_psnr(height, width) if marking.min_psnr is None else marking.min_psnr
    scale = 1.0
    for _ in range(8):
        data = encode(picture, picture.rgb + scale * (marked - picture.rgb), format)
        seen = decode(data, picture.name).rgb
        short = wanted - psnr(picture.rgb, seen)
        if short <= 0:
            break
        scale *= 10 ** (-(short + 0.01) / 20)
    return data, seen


@torch.no_grad()
def feature_gains(
    network: Network, before: Sequence[Picture], after: Sequence[Pixels], carriers: Tensor
) -> list[float]:
    """⟨φ(x̃) − φ(x), u⟩ of whole images, without augmentation."""
    device, size = network.get_buffer("mean").device, network.spec.image_size

    def phi(arrays: Sequence[Pixels]) -> Tensor:
        whole = [resized(_tensor(a)[None], size) for a in arrays]
        missing = -len(whole) % 16  # as in marking: full batches, so that the numbers do not depend on the batch size
        padded = F.pad(torch.cat(whole), (0, 0, 0, 0, 0, 0, 0, missing))
        return network.features(padded.to(device) / 255)[: len(whole)]  # (B, d)

    gains: list[float] = ((phi(after) - phi([p.rgb for p in before])) * carriers).sum(1).tolist()
    return gains


def _tensor(rgb: Pixels) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1)))


def _array(image: Tensor) -> Pixels:
    array: Pixels = image.permute(1, 2, 0).cpu().numpy()
    return array


def preview(plan: Plan, summary: Summary, path: Path) -> None:
    """Write a sheet of the marked images of lowest, middle and highest PSNR."""
    rows = sorted(summary.with_status("marked"), key=lambda row: float(row["psnr"]))
    picks = sorted({0, len(rows) // 4, len(rows) // 2, 3 * len(rows) // 4, len(rows) - 1}) if rows else []
    sheet = []
    for row in (rows[i] for i in picks):
        before, after = plan.source / row["path"], plan.output / row["output"]
        pair = [decode(file.read_bytes(), str(file)).rgb for file in (before, after)]
        sheet.append((pair[0], pair[1], f"{row['path']}  {row['psnr']:.1f} dB"))
    write_atomically(path, contact_sheet(sheet))
