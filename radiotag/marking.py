"""Marking a folder or tar shards: plan, mark in batches, write whole files, record each, go on after an interruption.

The manifest is the journal. What it records and what still matches is skipped by the next run; everything else is done
again. An image's mark depends on the key, the settings, its path and its bytes alone, so any interruption, and any
number of processes, gives the same bytes.
"""

import hashlib
import math
import os
import random
import shutil
import stat
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, distributed

from radiotag import manifest, shards
from radiotag.errors import RadiotagError, out_of_memory
from radiotag.files import PART, copy_atomically, file_hash, write_atomically
from radiotag.images import (
    OTHER_SUFFIXES,
    SUFFIXES,
    Item,
    Picture,
    contact_sheet,
    decode,
    encode,
    extension,
    linf,
    psnr,
    roundtrip,
    ssim,
)
from radiotag.keys import Key, choose, image_random, patterned
from radiotag.manifest import MANIFEST_FORMAT, Row, Summary
from radiotag.networks import Network, resized
from radiotag.processes import launched
from radiotag.radioactive import Marking, mark_images, padded

LOSSLESS = {"PNG", "BMP", "TIFF"}
GREY = {"1", "L", "LA", "I;16"}
TOGETHER = 2**24  # pixels optimised at once, at most: some 2 GiB; many photographs are slower together than apart
ENOUGH = 0.95  # of the squared error that a lossy file may have
LOUDEST = 1.5  # times as large as made that a mark is encoded
BEST_PSNR = 100.0  # dB recorded of an image that came out unchanged: JSON has no infinity
ALIKE = 15.0  # dB of a marked image and its source, at least; of two images that differ, some 10
AHEAD = 64  # files copied or checked before they are asked for; of decoded images, which may be large, THREADS
THREADS = max(2, min(8, os.cpu_count() or 2))  # decode, encode and copy beside the optimisation
Pixels = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Every input and what becomes of it, made before anything is written."""

    source: Path
    output: Path
    manifest: Path
    items: tuple[Item, ...]
    rows: dict[str, int]  # class → carrier row
    chosen: frozenset[str]  # relative paths to mark
    others: tuple[Path, ...]  # copied so that the tree is complete
    header: Row  # the manifest's first line
    archive: shards.Archive | None  # where the source is tar shards
    work: Path  # where images are written: the output, or beside it until a shard can be put together


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
    archive, items, names, others = shards.listing(source)
    if archive and key.class_names:
        names = sorted({item.label for item in items})  # not the numbers between them, which no sample has
    if archive and format != "keep":
        raise RadiotagError(f"{source}: the images of a tar shard keep their format", "leave out --format")
    if archive and source.is_file() and (output.is_dir() or output.suffix.lower() != ".tar"):
        raise RadiotagError(f"{output}: a single shard becomes a single shard", "name a .tar file with -o")
    inside = output.resolve().is_relative_to(source.resolve()) or source.resolve().is_relative_to(output.resolve())
    if inside:
        raise RadiotagError(f"{output} and {source} lie in each other", "choose another folder with -o")
    for path in others:
        if _is_secret(source / path):
            raise RadiotagError(f"{source / path} is secret, and would be copied", "keep keys and manifests elsewhere")
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
    work = beside.with_name(f".{beside.name}.staged") if archive else output
    return Plan(
        source=source, output=output, manifest=beside.with_name(beside.name + ".manifest.jsonl"), items=tuple(items),
        rows=carrier_rows(key, names), chosen=chosen, others=tuple(map(Path, others)),
        header=header, archive=archive, work=work,
    )  # fmt: skip


def uninvited(plan: Plan) -> list[str]:
    """Files in the output that are not the source's, by relative path: left by earlier runs, or a user's own."""
    if plan.archive:
        return []
    whole = _with_earlier(plan)
    known = {_output(whole, item) for item in whole.items} | {path.as_posix() for path in plan.others}
    found = ((Path(folder).relative_to(plan.output) / name).as_posix()
             for folder, _, names in os.walk(plan.output) for name in names)  # fmt: skip
    return sorted(name for name in found if name not in known)


def uncounted_classes(plan: Plan) -> list[str]:
    """First-level folders of images none of which is marked: a loader of class folders counts them as classes, too."""
    images = (path for path in plan.others if path.suffix.lower() in SUFFIXES | OTHER_SUFFIXES)
    found = {path.parts[0] for path in images if len(path.parts) > 1} - set(plan.rows)
    return sorted(found) if "" not in plan.rows else []


def unmarked_formats(plan: Plan) -> Counter[str]:
    """How many of the files that are only copied look like images of formats that are not marked, by suffix."""
    found = Counter(path.suffix.lower() for path in plan.others if path.suffix.lower() in OTHER_SUFFIXES)
    return found + plan.archive.unmarked if plan.archive else found


def _is_secret(path: Path) -> bool:
    """Whether a file, of any name, is a key, an index of black-box questions or a manifest: not to be released."""
    try:
        with path.open("rb") as file:
            first = file.read(4096)
        if first.startswith(b"{"):
            line = first.split(b"\n", 1)[0]
            return b'"radiotag"' in line and b'"fingerprint"' in line
        if first[8:9] != b"{":
            return False
        with safe_open(path, framework="pt") as file:
            said = (file.metadata() or {}).get("radiotag", "")
    except (SafetensorError, OSError):
        return False
    return '"statistic"' in said or '"fingerprint"' in said


def carrier_rows(key: Key, names: Sequence[str]) -> dict[str, int]:
    """Which carrier marks which class: by name where the key names its classes, else in sorted order."""
    known = key.class_names
    if known is None or (len(known) == 1 and list(names) == [""]):
        if len(names) > len(key.carriers):
            hint = f"make a larger key: radiotag keygen --classes {len(names)}"
            raise RadiotagError(f"the key has {len(key.carriers)} carriers, the folder {len(names)} classes", hint)
        return {name: row for row, name in enumerate(names)}
    missing = sorted(set(names) - set(known))
    if missing == [""]:
        hint = "put the images into a sub-folder of the class's name, or use a key of one class: keygen --classes 1"
        raise RadiotagError("the key names its classes, and the folder has none", hint)
    if missing:
        hint = "use a key of this folder's classes: radiotag keygen --data SRC -o ANOTHER"
        raise RadiotagError(f"the key does not know the class '{missing[0]}'", hint)
    return {name: known.index(name) for name in names}


def _check_collisions(items: Sequence[Item], chosen: frozenset[str], format: str) -> None:
    if format == "keep":
        return
    targets = Counter(str(extension(i.path, format) if i.path.as_posix() in chosen else i.path) for i in items)
    twice = next((name for name, count in targets.items() if count > 1), None)
    if twice:
        raise RadiotagError(f"two images would both become {twice}", "rename one, or use --format keep")


# ---------------------------------------------------------------- several processes


@dataclass(frozen=True, slots=True)
class Team:
    """The processes that mark together, as PyTorch's launcher started them; alone without it."""

    rank: int = 0
    size: int = 1

    def gather(self, value: Any) -> list[Any]:
        """Wait for all, and learn what each has to say."""
        values: list[Any] = [value]
        if self.size > 1:
            values = [None] * self.size
            try:
                distributed.all_gather_object(values, value)
            except RuntimeError as error:
                raise SystemExit(1) from error  # another process is gone, and says why
        return values


@contextmanager
def team() -> Iterator[Team]:
    """Join the processes that `torchrun` started, by its environment variables, until all is done."""
    rank, size = launched()
    if size == 1:
        yield Team()
        return
    distributed.init_process_group("gloo", timeout=timedelta(days=30))  # one may have hours more to do
    try:
        yield Team(rank, size)
    finally:
        distributed.destroy_process_group()  # its threads, left to the interpreter's end, may abort the process


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
    progress: Callable[[Summary], None] = lambda _: None,
) -> Summary:
    """Carry out a plan, or this process's share of it; `progress(summary)` is called after every file.

    The summary of the first process is of all.
    """
    with (
        team() as together,
        ExitStack() as held,
        _journal(plan, path := manifest.rank_journal(plan.manifest, together.rank), together, force, held) as journal,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        plan = _with_earlier(plan)  # as the first process, which has taken the others' journals in
        mine = plan.items[together.rank :: together.size]
        summary = Summary(images=len(mine))
        todo = _remaining(plan, mine, summary, pool)
        progress(summary)
        others = plan.others[together.rank :: together.size]
        for row in _rows(plan, todo, others, key, marking, device, batch_size, pool):
            summary.add(row)
            _append(journal, row, path)
            progress(summary)
            if strict and row["status"] == "failed":
                raise RadiotagError(row["error"], "mend or remove the file, or leave out --strict")
        if together.rank:
            journal.close()  # a folder that machines share may not show what is open
        skipped = sum(together.gather(summary.skipped))
        if together.rank == 0:
            manifest.merge_journals(plan.manifest, journal)
            wanted = (item.path.as_posix() for item in plan.items)
            summary = manifest.put_in_order(plan.manifest, plan.header, wanted, skipped)
            _finish_archive(plan, summary)
        together.gather(None)
    return summary


def _append(journal: IO[bytes], row: Row, path: Path) -> None:
    try:
        journal.write(manifest.line(row))
        journal.flush()
    except OSError as error:
        with suppress(OSError):
            journal.close()  # which tries to write once more
        hint = "check that the folder is writable and has space; then run the same command again"
        raise RadiotagError(f"cannot write {path}: {error.strerror}", hint) from error


def _journal(plan: Plan, path: Path, together: Team, force: bool, held: ExitStack) -> IO[bytes]:
    """Begin or go on: the first process prepares the folder and says so to the others, each then has its own file.

    The first one's lock is `held` until all is done, shards are put together, too.
    """
    journal, problem = None, None
    if together.rank == 0:
        try:
            plan.manifest.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(manifest.locked(plan.manifest, plan.output))
            journal = _begin(plan, force)
        except RadiotagError as error:
            problem = error
    if any(together.gather(problem is not None)):
        if problem is None:
            raise SystemExit(1)  # the first process says why
        raise problem
    if journal is None:
        manifest.begin(path, plan.header)
        journal = path.open("ab")
    return journal


def _begin(plan: Plan, force: bool) -> IO[bytes]:
    """Open the manifest, new or with what earlier runs did. Refuses what it cannot go on from."""
    _check_begun(plan, force)
    there = plan.manifest.exists()
    if there and force:
        _remove_stale(plan)
    if force or not there:
        for other in manifest.rank_journals(plan.manifest):
            other.unlink()
        manifest.begin(plan.manifest, plan.header)
    journal = plan.manifest.open("r+b")
    try:
        manifest.truncate_torn_line(journal)
        manifest.merge_journals(plan.manifest, journal)
        _sweep(plan)
    except BaseException:
        journal.close()
        raise
    return journal


def check(plan: Plan, force: bool) -> None:
    """RadiotagError for an output that this plan cannot begin or go on with; nothing is written."""
    _check_begun(plan, force)
    if plan.manifest.exists() and not force:
        _check_rows(plan)


def _check_begun(plan: Plan, force: bool) -> None:
    """As `check`, but for the rows, which a run looks at when it has taken other processes' journals in."""
    _check_links(plan)
    if plan.output.is_file() and plan.source.is_dir():
        raise RadiotagError(f"{plan.output} is a file", "choose another -o")
    if force:
        return
    if plan.manifest.exists():
        _check_settings(plan, manifest.read_header(plan.manifest))
    elif plan.output.exists() and (plan.output.is_file() or any(plan.output.iterdir())):
        raise RadiotagError(f"{plan.output} exists and has no manifest", "choose another -o, or overwrite with --force")


def _check_links(plan: Plan) -> None:
    """Refuse to write through links in the output: what lies behind one may be the source."""
    parents = {PurePosixPath(path).parent for path in (*(item.path for item in plan.items), *plan.others)}
    for folder in sorted({place for parent in parents for place in (parent, *parent.parents) if place.name}):
        if plan.archive is None and (plan.output / folder).is_symlink():
            message = f"{plan.output / folder} is a link, and what lies behind it would be overwritten"
            raise RadiotagError(message, "remove the link, or choose another -o")


def _check_settings(plan: Plan, header: Row) -> None:
    for name in plan.header:
        if header.get(name) != plan.header[name]:
            raise RadiotagError(
                f"{plan.output} was begun with {name} {header.get(name)}, not {plan.header[name]}",
                "repeat the earlier setting, choose another -o, or start over with --force",
            )


def _sweep(plan: Plan) -> None:
    """Remove what a killed run left half-written; refuse an output that holds files of an earlier, different run."""
    for folder in {plan.output, plan.work}:
        for part in folder.rglob(".*.part") if folder.is_dir() else ():
            if PART.fullmatch(part.name):
                part.unlink(missing_ok=True)
    _check_rows(plan)


def _check_rows(plan: Plan) -> None:
    _check_images(plan)
    whole = _with_earlier(plan)
    _check_stale(whole)
    _check_strangers(whole)


def _check_stale(plan: Plan) -> None:
    for stale, _ in _stale(plan):
        if stale.exists():
            raise RadiotagError(
                f"{stale} was made by an earlier run, and would not be made by this one",
                "remove it, choose another -o, or start over with --force",
            )


def _check_strangers(plan: Plan) -> None:
    """Refuse to overwrite files that no run recorded, but for what a killed one left: it looks like its source."""
    recorded = manifest.places(plan.manifest)
    for item in plan.items if recorded and not plan.archive else ():
        target = plan.output / _output(plan, item)
        if item.path.as_posix() not in recorded and target.exists() and not _alike(plan.source / item.path, target):
            message = f"{target} was not made by an earlier run, and would be overwritten"
            raise RadiotagError(message, "move it away, choose another -o, or start over with --force")


def _alike(source: Path, target: Path) -> bool:
    """Whether a file is its source's copy, or may be it marked."""
    if _file_hash(source) == _file_hash(target):
        return True
    try:
        before, after = (decode(path.read_bytes(), str(path)).rgb for path in (source, target))
    except (RadiotagError, OSError):
        return False
    return before.shape == after.shape and psnr(before, after) >= ALIKE


def _with_earlier(plan: Plan) -> Plan:
    """The plan, with what earlier runs marked, or meant to, chosen: as images come and go, a share falls on others."""
    if len(plan.chosen) == len(plan.items):
        return plan
    rows = (row for place, row in manifest.read_lines(plan.manifest) if place)
    last = {row["path"]: row.get("status") == "marked" or "chosen" in row for row in rows}
    earlier = {item.path.as_posix() for item in plan.items if last.get(item.path.as_posix())}
    _check_collisions(plan.items, plan.chosen | earlier, plan.header["format"])
    return replace(plan, chosen=plan.chosen | earlier)


def _check_images(plan: Plan) -> None:
    """Refuse to put other images, or other carriers' marks, in the place of an earlier run's.

    One image that is still the same shows that all belong.
    """
    items, same, other = {item.path.as_posix(): item for item in plan.items}, False, False
    for _, row in manifest.read_lines(plan.manifest):
        if not row.keys() >= {"sha256_in", "class", "row"}:
            continue
        carrier = plan.rows.get(row["class"], row["row"])
        if carrier != row["row"]:
            message = f"the class '{row['class']}' was marked with carrier {row['row']}, and now has carrier {carrier}"
            hint = "choose another -o, or start over with --force; a key of keygen --data names its classes"
            raise RadiotagError(message, hint)
        if not same:
            item = items.get(row["path"])
            digest = item and _source_hash(plan, item)
            same = digest == row["sha256_in"]
            other = other or item is None or digest is not None
    if other and not same:
        raise RadiotagError(
            f"{plan.output} was made of other images than are in {plan.source}",
            "choose another -o, or start over with --force",
        )


def _stale(plan: Plan) -> Iterator[tuple[Path, str]]:
    """Files that earlier runs wrote and this one will not, with their hashes."""
    if plan.archive:
        seen = {row["path"].split("/")[0] for place, row in manifest.read_lines(plan.manifest) if place}
        for shard in sorted(seen - set(plan.archive.shards)) if plan.source.is_dir() else ():
            if shards.is_shard(plan.output / shard):
                yield plan.output / shard, ""
        return
    outputs = {_output(plan, item) for item in plan.items} | {path.as_posix() for path in plan.others}
    for _, row in manifest.read_lines(plan.manifest):
        if row.get("status", "failed") != "failed" and row.get("output", row["path"]) not in outputs:
            yield plan.output / row["output"], row.get("sha256_out", "")


def _remove_stale(plan: Plan) -> None:
    try:
        for stale, digest in _stale(plan):
            if not digest or _file_hash(stale) == digest:
                stale.unlink(missing_ok=True)
    except RadiotagError:
        return  # no manifest, or a damaged one, which force is there to overwrite


def _output(plan: Plan, item: Item) -> str:
    """The output's relative path: unmarked images keep their format."""
    return str(extension(item.path, plan.header["format"] if item.path.as_posix() in plan.chosen else "keep"))


def _remaining(plan: Plan, mine: Sequence[Item], summary: Summary, pool: ThreadPoolExecutor) -> list[Item]:
    """The items whose record is missing, or no longer true of the plan, the file that came in or that gone out."""
    found, todo, released = manifest.places(plan.manifest), [], _released(plan)

    def check(image: tuple[Item, Row | None]) -> tuple[Item, Row | None]:
        item, row = image
        return item, row if row and _holds(plan, item, row, released) else None

    with plan.manifest.open("rb") as file:
        places = ((item, found.get(item.path.as_posix())) for item in mine)
        rows = ((item, None if place is None else manifest.row_at(file, place)) for item, place in places)
        for item, row in ahead(pool, check, rows, AHEAD):
            if row:
                summary.add(row)
                summary.skipped += 1
            else:
                todo.append(item)
    return todo


def _holds(plan: Plan, item: Item, row: Row, released: shards.Archive | None) -> bool:
    wanted = ("marked" if item.path.as_posix() in plan.chosen else "copied", plan.rows[item.label])
    if not row.keys() >= {"status", "row", "sha256_in", "sha256_out", "output"}:
        return False
    if (row["status"], row["row"]) != wanted or row["sha256_in"] != _source_hash(plan, item):
        return False
    if plan.archive and row["status"] == "copied":
        return True  # it goes from shard to shard when that is put together
    digest = _file_hash(_staged(plan, row["output"]))
    if digest is None and released:
        digest = hashlib.sha256(_released_bytes(plan, released, row["output"])).hexdigest()
    return bool(row["sha256_out"] == digest)


def _released(plan: Plan) -> shards.Archive | None:
    """The index of shards that an earlier run has put together."""
    return shards.released(plan.output) if plan.archive else None


def _released_bytes(plan: Plan, released: shards.Archive, path: str) -> bytes:
    """An image out of a finished shard; none of it if it is not there."""
    if plan.output.is_file():  # a single shard, which may be called otherwise than its source
        path = path.replace(path.split("/", maxsplit=1)[0], plan.output.name, 1)
    return released.read(PurePosixPath(path)) if path in released.members else b""


def _file_hash(path: Path) -> str | None:
    try:
        return file_hash(path)
    except OSError:
        return None  # missing or unreadable: it will be done again, and then named


def _source_hash(plan: Plan, item: Item) -> str | None:
    if plan.archive:
        return hashlib.sha256(plan.archive.read(item.path)).hexdigest()
    return _file_hash(plan.source / item.path)


def _rows(
    plan: Plan, todo: Sequence[Item], others: Sequence[Path], key: Key, marking: Marking, device: str, batch_size: int,
    pool: ThreadPoolExecutor,
) -> Iterator[Row]:  # fmt: skip
    """Do what is left, and say what was done: first the copies, then the marks."""
    copies = [item for item in todo if item.path.as_posix() not in plan.chosen]
    yield from ahead(pool, partial(_copied, plan), copies, AHEAD)
    _copy_others(plan, others)
    yield from _marked(
        plan, [i for i in todo if i.path.as_posix() in plan.chosen], key, marking, device, batch_size, pool
    )


def ahead(
    pool: ThreadPoolExecutor, work: Callable[[Any], Any], items: Iterable[Any], limit: int
) -> Generator[Any, None, None]:
    """The results of `work` in order, at most `limit` of them computed before they are asked for."""
    waiting: deque[Future[Any]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= limit:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _row(plan: Plan, item: Item, status: str, **more: Any) -> Row:
    path = item.path.as_posix()
    chosen = {"chosen": True} if status == "failed" and path in plan.chosen else {}  # and stays so
    return {"path": path, "class": item.label, "row": plan.rows[item.label], "status": status, **more, **chosen}


def _staged(plan: Plan, relative: str) -> Path:
    """Where an image is written; for a shard under a name that fits whatever its members are called."""
    return plan.work / (hashlib.sha256(os.fsencode(relative)).hexdigest() if plan.archive else relative)


def _target(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _as_source(source: Path, target: Path) -> None:
    """Time stamp and permissions: fresh ones would give the marked files away."""
    found = source.stat()
    target.chmod(stat.S_IMODE(found.st_mode))
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))


def _copied(plan: Plan, item: Item) -> Row:
    source, path = plan.source / item.path, item.path.as_posix()
    if plan.archive:
        digest = _source_hash(plan, item)
        return _row(plan, item, "copied", output=path, sha256_in=digest, sha256_out=digest)
    try:
        target = _target(plan.output / path)
        copy_atomically(source, target)
        _as_source(source, target)
    except RadiotagError as error:
        if _file_hash(source) is not None:
            raise  # the output cannot be written: nothing else will be either
        return _row(plan, item, "failed", error=str(error), hint=error.hint)
    digest = _file_hash(target)
    return _row(plan, item, "copied", output=path, sha256_in=digest, sha256_out=digest)


def _copy_others(plan: Plan, others: Sequence[Path]) -> None:
    for relative in others:
        source, target = plan.source / relative, plan.output / relative
        if source.is_dir():  # an empty one
            target.mkdir(parents=True, exist_ok=True)
        elif _file_hash(source) != _file_hash(target) or not target.exists():
            copy_atomically(source, _target(target))
            _as_source(source, target)


def _finish_archive(plan: Plan, summary: Summary) -> None:
    """Put the shards together from the source's and the marked images, and remove what was kept for that."""
    if plan.archive is None:
        return
    released = _released(plan)
    with plan.manifest.open("rb") as file:
        outputs = {row["path"]: row["output"] for row in (manifest.row_at(file, place) for place in summary.places)}

    def marked(path: str) -> bytes | None:
        if path not in outputs:
            return None
        staged = _staged(plan, outputs[path])
        data = staged.read_bytes() if released is None or staged.is_file() else _released_bytes(plan, released, path)
        if not data:
            raise RadiotagError(f"{path}, marked, is gone from {plan.work}", "run the same command again")
        return data

    for shard, members in plan.archive.by_shard().items():
        target = plan.output / shard if plan.source.is_dir() else plan.output
        shards.assemble(plan.archive.root / shard, members, _target(target), marked, plan.work)
        _as_source(plan.archive.root / shard, target)
    shutil.rmtree(plan.work, ignore_errors=True)


# ---------------------------------------------------------------- images


def _read(plan: Plan, item: Item) -> tuple[Item, bytes, Picture] | Row:
    """Read and decode an image, or say why that cannot be done."""
    source = plan.source / item.path
    try:
        data = plan.archive.read(item.path) if plan.archive else source.read_bytes()
        picture = decode(data, str(source))
        encode(picture, picture.rgb, plan.header["format"])  # what cannot be written costs this image alone
    except OSError as error:
        return _row(plan, item, "failed", error=f"cannot read {source}: {error.strerror}")
    except RadiotagError as error:
        return _row(plan, item, "failed", error=str(error), hint=error.hint)
    return item, data, picture


def _marked(
    plan: Plan,
    items: Sequence[Item],
    key: Key,
    marking: Marking,
    device: str,
    batch_size: int,
    pool: ThreadPoolExecutor,
) -> Iterator[Row]:
    """Gather decoded images into batches that fit in memory and mark them; yields a manifest row an image."""
    network = key.network(device) if items else None
    ready: list[tuple[Item, bytes, Picture]] = []
    pixels = 0
    with closing(ahead(pool, partial(_read, plan), items, THREADS)) as images:
        for image in images:
            if isinstance(image, dict):
                yield image
                continue
            size = image[2].rgb.size // 3
            if network and ready and (len(ready) == batch_size or pixels + size > TOGETHER):
                yield from _mark_batch(plan, ready, key, network, marking, pool)
                ready, pixels = [], 0
            ready.append(image)
            pixels += size
    if network and ready:
        yield from _mark_batch(plan, ready, key, network, marking, pool)


def _mark_batch(
    plan: Plan,
    ready: Sequence[tuple[Item, bytes, Picture]],
    key: Key,
    network: Network,
    marking: Marking,
    pool: ThreadPoolExecutor,
) -> Iterator[Row]:
    """Mark decoded images together and write their files; by halves where memory does not suffice or one fails."""
    format = str(plan.header["format"])
    pictures = [picture for _, _, picture in ready]
    rows = [plan.rows[item.label] for item, _, _ in ready]
    carriers = key.carriers[rows].to(network.device)
    carrying = torch.tensor([patterned(key, item.path.as_posix()) for item, _, _ in ready])
    patterns = key.patterns[rows] * carrying[:, None]
    draws = [image_random(key, item.path.as_posix(), int(plan.header["seed"])) for item, _, _ in ready]
    try:
        marked = mark_pictures(network, pictures, carriers, patterns, draws, marking, format, pool)
    except Exception as error:
        if not isinstance(error, RadiotagError) and (len(ready) == 1 or not out_of_memory(error)):
            raise
        marked, problem = [], str(error)  # the error itself would keep the failed batch's tensors
        hint = error.hint if isinstance(error, RadiotagError) else ""
    if not marked:
        if len(ready) == 1:
            yield _row(plan, ready[0][0], "failed", error=problem, hint=hint)
            return
        for half in (ready[: len(ready) // 2], ready[len(ready) // 2 :]):
            yield from _mark_batch(plan, half, key, network, marking, pool)
        return
    gains = feature_gains(network, pictures, [seen for _, seen in marked], carriers)
    files, seen = zip(*marked, strict=True)
    yield from pool.map(partial(_written, plan), ready, files, seen, gains)


def _written(plan: Plan, image: tuple[Item, bytes, Picture], encoded: bytes, seen: Pixels, gain: float) -> Row:
    item, data, picture = image
    relative = _output(plan, item)
    target = _target(_staged(plan, relative))
    write_atomically(target, encoded)
    if plan.archive is None:
        _as_source(plan.source / item.path, target)
    return _row(
        plan, item, "marked", output=relative, sha256_in=hashlib.sha256(data).hexdigest(),
        sha256_out=hashlib.sha256(encoded).hexdigest(), psnr=round(min(psnr(picture.rgb, seen), BEST_PSNR), 3),
        ssim=round(ssim(picture.rgb, seen), 5), linf=round(linf(picture.rgb, seen), 3), gain=round(gain, 5),
        **({"dropped": picture.dropped} if picture.dropped else {}),
    )  # fmt: skip


def mark_pictures(
    network: Network,
    pictures: Sequence[Picture],
    carriers: Tensor,
    patterns: Tensor,
    draws: Sequence[random.Random],
    marking: Marking,
    format: str,
    pool: ThreadPoolExecutor,
) -> list[tuple[bytes, Pixels]]:
    """Mark decoded images with carriers (B, d), patterns (B, m): each one's file, and pixels (H, W, 3) read from it."""

    def seen(picture: Picture, image: Tensor) -> Tensor:
        return image if _lossless(picture, format) else _tensor(roundtrip(picture, _array(image), format))

    def read_back(images: Sequence[Tensor]) -> list[Tensor]:
        return list(pool.map(seen, pictures, images))

    def finish(picture: Picture, image: Tensor) -> tuple[bytes, Pixels]:
        return _finish(picture, _array(image), marking, format)

    lossy = not all(_lossless(picture, format) for picture in pictures)
    images = [_tensor(picture.rgb) for picture in pictures]
    grey = [picture.mode in GREY for picture in pictures]
    marked = mark_images(network, images, carriers, draws, marking, read_back if lossy else None, patterns, grey)
    return list(pool.map(finish, pictures, marked))


def _lossless(picture: Picture, format: str) -> bool:
    return (format == "png" or picture.format in LOSSLESS) and picture.mode in {"RGB", "RGBA"}


def _finish(picture: Picture, marked: Pixels, marking: Marking, format: str) -> tuple[bytes, Pixels]:
    """Encode; where that leaves less of the mark, enlarge it; where more than the PSNR allows, shrink it.

    An encoder that rounds small changes away (JPEG of low quality) gets the mark so large that the file is changed as
    much as the mark was before, within ±ε; at most half as large again, as fine changes become coarse ones, which show.
    Where encoding alone takes more than half of the squared error that the PSNR allows, the other half is the mark's
    all the same: the format has no better file.
    """
    height, width, _ = picture.rgb.shape
    wanted, lossless, change = marking.psnr(height, width), _lossless(picture, format), marked - picture.rgb
    alone = 0.0 if lossless else _error(picture.rgb, roundtrip(picture, picture.rgb, format))
    allowed = max(10 ** (-wanted / 10), alone + 10 ** (-wanted / 10) / 2)
    target = min(allowed, alone + _error(picture.rgb, marked))
    enough = 0.0 if lossless else ENOUGH * target
    scale, low, high, made, file = 1.0, 0.0, math.inf, math.inf, (b"", marked)
    for _ in range(8):
        data = encode(picture, picture.rgb + np.clip(scale * change, -marking.epsilon, marking.epsilon), format)
        seen = decode(data, picture.name).rgb
        error = _error(picture.rgb, seen)
        if made > allowed or made < error <= allowed:
            made, file = error, (data, seen)
        if enough <= error <= allowed or (scale == LOUDEST and error <= allowed):
            break
        low, high = (low, scale) if error > allowed else (scale, high)
        goal = (allowed if error > allowed else target) - alone
        scale *= 10 ** (-0.01 / 20) * math.sqrt(goal / max(error - alone, goal / 4))
        scale = min(scale, LOUDEST) if low < scale < high else (low + high) / 2
    return file


def _error(a: Pixels, b: Pixels) -> float:
    """Mean squared difference, of pixels in [0, 1]."""
    return 10 ** (-psnr(a, b) / 10)


@torch.no_grad()
def feature_gains(
    network: Network, before: Sequence[Picture], after: Sequence[Pixels], carriers: Tensor
) -> list[float]:
    """⟨φ(x̃) − φ(x), u⟩ of whole images, without augmentation."""
    device, size = network.device, network.spec.image_size

    def phi(arrays: Sequence[Pixels]) -> Tensor:
        whole = torch.cat([resized(_tensor(a)[None], size) for a in arrays])
        return network.features(padded(whole).to(device) / 255)[: len(whole)]  # (B, d)

    gains: list[float] = ((phi(after) - phi([p.rgb for p in before])) * carriers).sum(1).tolist()
    return gains


def _tensor(rgb: Pixels) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1)))


def _array(image: Tensor) -> Pixels:
    array: Pixels = image.permute(1, 2, 0).cpu().numpy()
    return array


def preview(plan: Plan, summary: Summary, path: Path) -> None:
    """Write a sheet of the marked images of lowest, median and highest PSNR."""
    order = sorted(range(summary.marked), key=lambda i: summary.psnr[i])
    picks = sorted({0, len(order) // 2, len(order) - 1}) if order else []
    released = _released(plan)
    sheet = []
    with plan.manifest.open("rb") as file:
        for row in (manifest.row_at(file, summary.places[order[i]]) for i in picks):
            if plan.archive and released:
                before = plan.archive.read(PurePosixPath(row["path"]))
                after = _released_bytes(plan, released, row["output"])
            else:
                before, after = (plan.source / row["path"]).read_bytes(), (plan.output / row["output"]).read_bytes()
            caption = f"{row['path']}  {row['psnr']:.1f} dB"
            sheet.append((decode(before, row["path"]).rgb, decode(after, row["output"]).rgb, caption))
    write_atomically(path, contact_sheet(sheet))
