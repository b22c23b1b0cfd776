"""Marking a data set as planned: mark in batches, write whole files, record each, go on after an interruption.

The manifest is the journal. What it records and what still matches is skipped by the next run; everything else is done
again. An image's mark depends on the key, the settings, its path and its bytes alone, so any interruption, and any
number of processes, gives the same bytes.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, Any

from radiotag import manifest
from radiotag.batches import Marked, Marker, Request, fits, mark_requests, request_for
from radiotag.errors import RadiotagError
from radiotag.files import hash_or_none, write_atomically
from radiotag.images import Picture, contact_sheet, decode, encode, linf, psnr, ssim
from radiotag.listing import Item
from radiotag.manifest import Row, Summary
from radiotag.plan import Plan, check_begun, check_rows, stale_files, with_earlier
from radiotag.probes import FolderImages
from radiotag.processes import Team, team
from radiotag.public import marked_half
from radiotag.stores import copy_other_file

BEST_PSNR = 100.0  # dB recorded of an image that came out unchanged: JSON has no infinity
FILES_AHEAD = 64  # copied or checked before they are asked for; of decoded images, which may be large, THREADS
THREADS = max(2, min(8, os.cpu_count() or 2))  # decode, encode and copy beside the optimisation


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What the steps of a run share."""

    plan: Plan
    pool: ThreadPoolExecutor
    summary: Summary  # of this process's share
    progress: Callable[[Summary], None]

    def tell(self, under_way: float = 0.0) -> None:
        """Say how far it is."""
        self.summary.under_way = under_way
        self.progress(self.summary)


def run(plan: Plan, progress: Callable[[Summary], None] = lambda _: None) -> Summary:
    """Carry out a plan, or this process's share of it; `progress(summary)` is called after every file.

    The summary of the first process is of all.
    """
    with (
        team() as processes,
        _journal(plan, processes) as journal,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        plan = with_earlier(plan)  # as the first process, which has merged the others' journals
        share = slice(processes.rank, None, processes.size)
        items, other_files = plan.items[share], plan.other_files[share]
        state = _Run(plan=plan, pool=pool, summary=Summary(images=len(items)), progress=progress)
        for row in _rows(state, _remaining(state, items), other_files):
            _record(state, journal, row)
        return _finished(state, processes, journal)


def _record(state: _Run, journal: IO[bytes], row: Row) -> None:
    state.summary.add(row)
    _append(journal, row)
    state.progress(state.summary)
    if state.plan.options.strict and row["status"] == "failed":
        raise RadiotagError(row["error"], "mend or remove the file, or leave out --strict")


def _append(journal: IO[bytes], row: Row) -> None:
    try:
        journal.write(manifest.line(row))
        journal.flush()
    except OSError as error:
        with suppress(OSError):
            journal.close()  # which tries to write once more
        hint = "check that the folder is writable and has space; then run the same command again"
        raise RadiotagError(f"cannot write {journal.name}: {error.strerror}", hint) from error


def _finished(state: _Run, processes: Team, journal: IO[bytes]) -> Summary:
    """Wait for all processes; the first one merges what they did, and completes the output."""
    plan, summary = state.plan, state.summary
    if processes.rank:
        journal.close()  # a folder that machines share may not show what is open
    skipped = sum(processes.gather(summary.skipped))
    if processes.rank == 0:
        manifest.merge_journals(plan.manifest, journal)
        order = (item.path.as_posix() for item in plan.items)
        summary = manifest.put_in_order(plan.manifest, plan.header, order, skipped)
        with plan.manifest.open("rb") as file:
            plan.store.finish(manifest.row_at(file, place) for place in summary.places)
        _publish(plan)
    processes.gather(None)
    return summary


def _publish(plan: Plan) -> None:
    """Write the marked set's public half."""
    held_out = FolderImages(plan.options.held_out, plan.manifest) if plan.options.held_out else None
    today = datetime.now(UTC).date().isoformat()
    text = marked_half(plan.key, plan.manifest, plan.rows, held_out, today)
    write_atomically(plan.public, text.encode("utf-8", "surrogateescape"), mode=0o644)


# ---------------------------------------------------------------- the journal


@contextmanager
def _journal(plan: Plan, processes: Team) -> Iterator[IO[bytes]]:
    """Begin or go on: the first process prepares the folder and says so to the others, each then has its own file.

    The first one's lock is held until all is done, until shards are put together, too.
    """
    with ExitStack() as held:
        journal, problem = None, None
        if processes.rank == 0:
            try:
                plan.manifest.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(manifest.locked(plan.manifest, plan.output))
                journal = _begin(plan)
            except RadiotagError as error:
                problem = error
        if any(processes.gather(problem is not None)):
            raise problem or SystemExit(1)  # the first process says why
        if journal is None:
            path = manifest.rank_journal(plan.manifest, processes.rank)
            manifest.begin(path, plan.header)
            journal = path.open("ab")
        yield held.enter_context(journal)


def _begin(plan: Plan) -> IO[bytes]:
    """Open the manifest, new or with what earlier runs did. Refuses what it cannot go on from."""
    check_begun(plan)
    there, force = plan.manifest.exists(), plan.options.force
    if there and force:
        _remove_stale(plan)
    if force or not there:
        for journal in manifest.rank_journals(plan.manifest):
            journal.unlink()
        manifest.begin(plan.manifest, plan.header)
    opened = plan.manifest.open("r+b")
    try:
        manifest.truncate_torn_line(opened)
        manifest.merge_journals(plan.manifest, opened)
        plan.store.remove_parts()
        check_rows(plan)
    except BaseException:
        opened.close()
        raise
    return opened


def _remove_stale(plan: Plan) -> None:
    try:
        for stale, digest in stale_files(plan):
            if not digest or hash_or_none(stale) == digest:
                stale.unlink(missing_ok=True)
    except RadiotagError:
        return  # no manifest, or a damaged one, which force is there to overwrite


# ---------------------------------------------------------------- what is left to do


def _remaining(state: _Run, items: Sequence[Item]) -> list[Item]:
    """The items whose record is missing, or no longer true of the plan, the file that came in or that gone out."""
    plan, summary, todo = state.plan, state.summary, []
    place_of = manifest.places(plan.manifest)
    plan.store.open_output()

    def check(recorded: tuple[Item, Row | None]) -> tuple[Item, Row | None]:
        item, row = recorded
        return item, row if row and row_is_current(plan, item, row) else None

    with plan.manifest.open("rb") as file:
        places = ((item, place_of.get(item.path.as_posix())) for item in items)
        rows = ((item, None if place is None else manifest.row_at(file, place)) for item, place in places)
        for item, row in prefetch(state.pool, check, rows, FILES_AHEAD):
            if row:
                summary.add(row)
                summary.skipped += 1
                state.tell()
            else:
                todo.append(item)
    state.tell()
    return todo


def row_is_current(plan: Plan, item: Item, row: Row) -> bool:
    """Whether what a row records is what the plan wants, and still true of the files."""
    if not row.keys() >= {"status", "row", "sha256_in", "sha256_out", "output"}:
        return False
    wanted = "marked" if plan.marks(item) else "copied", plan.rows[item.label]
    if (row["status"], row["row"]) != wanted or row["sha256_in"] != plan.store.hash(item.path):
        return False
    return plan.store.is_written(row)


def prefetch(
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


# ---------------------------------------------------------------- the work, a row an image


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Decoded:
    item: Item
    digest: str  # SHA-256 of the source's file
    picture: Picture


def _rows(state: _Run, todo: Sequence[Item], other_files: Sequence[PurePosixPath]) -> Iterator[Row]:
    """Do what is left, and say what was done: first the copies, then the marks."""
    plan = state.plan
    copies = [item for item in todo if not plan.marks(item)]
    yield from prefetch(state.pool, partial(_copied, plan), copies, FILES_AHEAD)
    for path in other_files:
        copy_other_file(plan.source / path, plan.output / path)
    yield from _marked(state, [item for item in todo if plan.marks(item)])


def _row(plan: Plan, item: Item, status: str, **more: Any) -> Row:
    chosen = {"chosen": True} if status == "failed" and plan.marks(item) else {}  # and stays so
    path = item.path.as_posix()
    return {"path": path, "class": item.label, "row": plan.rows[item.label], "status": status, **more, **chosen}


def _failed(plan: Plan, item: Item, error: RadiotagError) -> Row:
    return _row(plan, item, "failed", error=str(error), hint=error.hint)


def _copied(plan: Plan, item: Item) -> Row:
    try:
        digest = plan.store.copy(item.path)
    except RadiotagError as error:
        if plan.store.hash(item.path) is not None:
            raise  # the output cannot be written: nothing else will be either
        return _failed(plan, item, error)
    return _row(plan, item, "copied", output=item.path.as_posix(), sha256_in=digest, sha256_out=digest)


def _marked(state: _Run, items: Sequence[Item]) -> Iterator[Row]:
    """Mark images in batches that fit in memory."""
    if not items:
        return
    plan = state.plan
    batch: list[_Decoded] = []
    marker = Marker(
        network=plan.key.network(state.plan.options.device), marking=plan.options.marking, pool=state.pool,
        format=plan.options.format, on_step=state.tell,
    )  # fmt: skip
    with closing(prefetch(state.pool, partial(_read, plan), items, THREADS)) as images:
        for image in images:
            if isinstance(image, dict):
                yield image
                continue
            if not fits([each.picture for each in batch], image.picture, state.plan.options.batch_size):
                yield from _mark_batch(plan, marker, batch)
                batch = []
            batch.append(image)
    if batch:
        yield from _mark_batch(plan, marker, batch)


def _read(plan: Plan, item: Item) -> _Decoded | Row:
    """Read and decode an image, or say why that cannot be done."""
    name = plan.source / item.path
    try:
        data = plan.store.read(item.path)
        picture = decode(data, str(name))
        encode(picture, picture.rgb, plan.options.format)  # what cannot be written costs this image alone
    except OSError as error:
        return _row(plan, item, "failed", error=f"cannot read {name}: {error.strerror}")
    except RadiotagError as error:
        return _failed(plan, item, error)
    return _Decoded(item=item, digest=hashlib.sha256(data).hexdigest(), picture=picture)


def _mark_batch(plan: Plan, marker: Marker, batch: Sequence[_Decoded]) -> Iterator[Row]:
    """Mark decoded images together and write their files; each row comes when its file is written."""
    images = iter(batch)
    for results in mark_requests(marker, [_request(plan, image) for image in batch]):
        yield from marker.pool.map(partial(_written, plan), islice(images, len(results)), results)


def _request(plan: Plan, image: _Decoded) -> Request:
    item = image.item
    return request_for(plan.key, image.picture, item.path.as_posix(), plan.rows[item.label], plan.options.seed)


def _written(plan: Plan, image: _Decoded, result: Marked | RadiotagError) -> Row:
    if isinstance(result, RadiotagError):
        return _failed(plan, image.item, result)
    target, before, after = plan.target(image.item), image.picture.rgb, result.pixels
    plan.store.write(image.item.path, target, result.file)
    return _row(
        plan, image.item, "marked", output=target, sha256_in=image.digest,
        sha256_out=hashlib.sha256(result.file).hexdigest(), psnr=round(min(psnr(before, after), BEST_PSNR), 3),
        ssim=round(ssim(before, after), 5), linf=round(linf(before, after), 3), gain=round(result.gain, 5),
        **({"dropped": image.picture.dropped} if image.picture.dropped else {}),
    )  # fmt: skip


# ---------------------------------------------------------------- a sheet to look at


def preview(plan: Plan, summary: Summary, path: Path) -> None:
    """Write a sheet of the marked images of lowest, median and highest PSNR."""
    order = sorted(range(summary.marked), key=lambda i: summary.psnr[i])
    picks = sorted({0, len(order) // 2, len(order) - 1}) if order else []
    plan.store.open_output()
    with plan.manifest.open("rb") as file:
        rows = [manifest.row_at(file, summary.places[order[i]]) for i in picks]
    write_atomically(path, contact_sheet([_compared(plan, row) for row in rows]))


def _compared(plan: Plan, row: Row) -> tuple[Any, Any, str]:
    before, after = plan.store.read(PurePosixPath(row["path"])), plan.store.read_output(row["output"])
    caption = f"{row['path']}  {row['psnr']:.1f} dB"
    return decode(before, row["path"]).rgb, decode(after, row["output"]).rgb, caption
