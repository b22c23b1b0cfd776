"""The marking run: carry out a plan in batches, write files atomically, record each, continue after interruptions.

The manifest is the journal. A later run skips each image whose record still matches the files, and does all others
again. An image's mark depends only on the key, the settings, its path and its bytes. Interruptions and the number of
processes therefore do not change the output.
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
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import IO, Any

from torch import Tensor

from radiotag import manifest
from radiotag.batches import Marked, Marker, Request, fits, mark_requests, request_for, with_room
from radiotag.errors import RadiotagError, Unmarkable
from radiotag.files import fill_atomically, hash_or_none, write_atomically
from radiotag.images import Picture, contact_sheet, decode, encode, linf, psnr, sample_of, ssim
from radiotag.listing import Item
from radiotag.manifest import QUALITY, Row, Summary
from radiotag.networks import resized
from radiotag.plan import (
    Plan,
    check_begun,
    check_rows,
    choose_ranked,
    files_of_images,
    is_settled,
    replaced_files,
    stale_files,
    with_earlier,
)
from radiotag.probes import FolderImages
from radiotag.processes import Team, team
from radiotag.public import marked_half
from radiotag.ranking import by_hardness, features_of
from radiotag.reduction import shrunk
from radiotag.stores import copy_other_file

BEST_PSNR = 100.0  # dB, recorded for an unchanged image: JSON has no infinity
FILES_AHEAD = 64  # files copied or checked in advance; decoded images may be large, and of these only THREADS
THREADS = max(2, min(8, os.cpu_count() or 2))  # decode, encode and copy beside the optimisation


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """The state that all steps of a run share."""

    plan: Plan
    pool: ThreadPoolExecutor
    summary: Summary  # of this process's share
    progress: Callable[[Summary], None]

    def tell(self, under_way: float = 0.0) -> None:
        """Report progress; `under_way` counts the images' worth of steps done in the current batch."""
        self.summary.under_way = under_way
        self.progress(self.summary)


def run(plan: Plan, progress: Callable[[Summary], None] = lambda _: None) -> Summary:
    """Carry out a plan, or this process's share of it; `progress(summary)` is called after every file.

    The first process returns the summary of all processes. RadiotagError for an output that the plan does not fit, and
    for one that cannot be written.
    """
    with (
        team() as processes,
        _journal(plan, processes) as journal,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        plan = with_earlier(plan)  # after the first process has merged all journals, so that all agree
        plan = _settle(plan, processes, journal, pool, progress)
        share = slice(processes.rank, None, processes.size)
        items, other_files = plan.items[share], plan.other_files[share]
        state = _Run(plan=plan, pool=pool, summary=Summary(images=len(items)), progress=progress)
        for row in _process(state, _remaining(state, items), other_files):
            _record(state, journal, row)
        return _finish(state, processes, journal)


def _record(state: _Run, journal: IO[bytes], row: Row) -> None:
    state.summary.add(row)
    _append(journal, row)
    state.progress(state.summary)
    if state.plan.options.strict and row["status"] == "failed":
        raise RadiotagError(row["error"], "repair or remove the file, or leave out --strict")


def _append(journal: IO[bytes], row: Row) -> None:
    try:
        journal.write(manifest.line(row))
        journal.flush()
    except OSError as error:
        with suppress(OSError):
            journal.close()  # close() tries to write again
        hint = "check that the folder is writable and has space; then run the same command again"
        raise RadiotagError(f"cannot write {journal.name}: {error.strerror}", hint) from error


def _finish(state: _Run, processes: Team, journal: IO[bytes]) -> Summary:
    """Wait for all processes; the first one merges their journals and completes the output."""
    plan, summary = state.plan, state.summary
    if processes.rank:
        journal.close()  # on a shared folder, other machines may not see an open file
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
    held_out = FolderImages(plan.options.held_out) if plan.options.held_out else None
    today = datetime.now(UTC).date().isoformat()
    text = marked_half(plan.key, plan.manifest, plan.rows, held_out, today)
    data = text.encode("utf-8", "surrogateescape")
    if plan.public.is_file() and _without_date(plan.public.read_bytes()) == _without_date(data):
        return  # it commits to the same, and may have been time-stamped
    # A killed run's file is removed by the next run, as its name is always the same.
    fill_atomically(plan.public, lambda file: file.write(data), 0o644, manifest.hidden(plan.public, "part"))


def _without_date(half: bytes) -> list[bytes]:
    return [line for line in half.splitlines() if not line.startswith(b"date: ")]


# ---------------------------------------------------------------- which images


def _settle(
    plan: Plan, processes: Team, journal: IO[bytes], pool: ThreadPoolExecutor, progress: Callable[[Summary], None]
) -> Plan:
    """Choose hard images, and write the choice to the journal before the first mark: a later run repeats it.

    Copies of images that are now to be marked go, if their names will be others.
    """
    chosen = plan if is_settled(plan) else _choose_ranked(plan, processes, pool, progress)
    if processes.rank == 0:
        _remove_replaced(chosen)  # before the choice is written: its rows take the place of the copies'
        for item in chosen.items:
            if chosen.marks(item) and not plan.marks(item):
                _append(journal, _row(chosen, item, "chosen"))
    processes.gather(None)
    return chosen


def _choose_ranked(plan: Plan, processes: Team, pool: ThreadPoolExecutor, progress: Callable[[Summary], None]) -> Plan:
    """Each process computes the features of its share; then all know all, and choose the same."""
    mine = plan.items[processes.rank :: processes.size]
    summary = Summary(images=len(plan.items))

    def tell(done: int) -> None:
        summary.ranked = min(len(plan.items), done * processes.size)
        progress(summary)

    network = plan.key.network(plan.options.device)
    with closing(prefetch(pool, partial(_seen, plan, network.spec.image_size), mine, THREADS)) as images:
        found = features_of(network, images, len(mine), plan.options.batch_size, tell)
    shares = processes.gather(found)
    features = shares[0].new_empty(len(plan.items), shares[0].shape[1])
    for rank, share in enumerate(shares):
        features[rank :: processes.size] = share
    labels = {item.path.as_posix(): item.label for item in plan.items}
    return choose_ranked(plan, by_hardness(labels, features))


def _seen(plan: Plan, size: int, item: Item) -> Tensor | None:
    """A whole image at the network's size, (3, S, S) in [0, 1]; None for one that cannot be read.

    The marking will tell of that one.
    """
    try:
        image = shrunk(decode(plan.store.read(item.path), str(plan.source / item.path)).rgb)
    except (RadiotagError, OSError):
        return None
    return resized(image[None] / 255, size)[0]


# ---------------------------------------------------------------- the journal


@contextmanager
def _journal(plan: Plan, processes: Team) -> Iterator[IO[bytes]]:
    """Begin or continue a run. The first process prepares the folder; then each process opens its own journal.

    The first process holds the lock until everything is done, including the assembly of shards.
    """
    with ExitStack() as stack:
        journal, problem = None, None
        if processes.rank == 0:
            try:
                plan.manifest.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(manifest.locked(plan.manifest, plan.output))
                journal = _begin(plan)
            except RadiotagError as error:
                problem = error
        if any(processes.gather(problem is not None)):
            raise problem or SystemExit(1)  # the first process reports the reason
        if journal is None:
            path = manifest.rank_journal(plan.manifest, processes.rank)
            manifest.begin(path, plan.header)
            journal = path.open("ab")
        yield stack.enter_context(journal)


def _begin(plan: Plan) -> IO[bytes]:
    """Open the manifest, new or with the rows of earlier runs. RadiotagError if the run cannot continue it."""
    check_begun(plan)
    exists, force = plan.manifest.exists(), plan.options.force
    if exists and force:
        _remove_stale(plan)
    if force or not exists:
        for rank_journal in manifest.rank_journals(plan.manifest):
            rank_journal.unlink()
        manifest.begin(plan.manifest, plan.header)
    journal = plan.manifest.open("r+b")
    try:
        manifest.truncate_torn_line(journal)
        manifest.merge_journals(plan.manifest, journal)
        plan.store.remove_parts()
        check_rows(plan)
    except BaseException:
        journal.close()
        raise
    return journal


def _remove_stale(plan: Plan) -> None:
    """Remove what an earlier run made and this one will not make; of an unsettled choice, all: names may change."""
    settled = plan.options.format == "keep" or is_settled(plan)
    try:
        files = chain(stale_files(plan), replaced_files(plan)) if settled else files_of_images(plan)
        for stale, digest in files:
            if not digest or hash_or_none(stale) == digest:
                stale.unlink(missing_ok=True)
    except RadiotagError:
        return  # the manifest is missing or damaged, and `force` overwrites it


def _remove_replaced(plan: Plan) -> None:
    for copy, digest in replaced_files(plan):
        if hash_or_none(copy) not in {digest, None}:
            hint = "move it away, choose another -o, or start over with --force"
            raise RadiotagError(f"{copy} was changed, and its image is now to be marked under another name", hint)
        copy.unlink(missing_ok=True)


# ---------------------------------------------------------------- remaining work


def _remaining(state: _Run, items: Sequence[Item]) -> list[Item]:
    """The items without a record, or whose record no longer matches the plan, the source's file or the output's."""
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
    """Whether a row records what the plan requires, and still matches the files."""
    if not row.keys() >= {"status", "row", "sha256_in", "sha256_out", "output"}:
        return False
    if row["status"] == "marked" and not row.keys() >= set(QUALITY):
        return False
    expected = "marked" if plan.marks(item) and "unmarkable" not in row else "copied", plan.rows[item.label]
    if (row["status"], row["row"]) != expected or row["sha256_in"] != plan.store.hash(item.path):
        return False
    return plan.store.is_written(row)


def prefetch(
    pool: ThreadPoolExecutor, work: Callable[[Any], Any], items: Iterable[Any], limit: int
) -> Generator[Any, None, None]:
    """Yield the results of `work` in order, computing at most `limit` of them in advance."""
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


# ---------------------------------------------------------------- the work: one row per image


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Decoded:
    item: Item
    digest: str  # SHA-256 of the source's file
    picture: Picture
    palette: bool  # whether its file has one


def _process(state: _Run, todo: Sequence[Item], other_files: Sequence[PurePosixPath]) -> Iterator[Row]:
    """Process the remaining items, first copies, then marks; yield a row for each."""
    plan = state.plan
    copies = [item for item in todo if not plan.marks(item)]
    yield from prefetch(state.pool, partial(_copy_image, plan), copies, FILES_AHEAD)
    for path in other_files:
        copy_other_file(plan.source / path, plan.output / path)
    yield from _mark_all(state, [item for item in todo if plan.marks(item)])


def _row(plan: Plan, item: Item, status: str, **values: Any) -> Row:
    more = {"chosen": True} if status == "failed" and plan.marks(item) else {}  # so that a later run chooses it again
    path = item.path.as_posix()
    if plan.options.choose == "hard" and plan.marks(item):
        more["pattern"] = path in plan.choice.patterned
    return {"path": path, "class": item.label, "row": plan.rows[item.label], "status": status, **values, **more}


def _failed(plan: Plan, item: Item, error: RadiotagError) -> Row:
    """The row of an image that cannot be marked: failed; or copied, if it is sound and the plan wants that."""
    if not isinstance(error, Unmarkable):
        return _row(plan, item, "failed", error=str(error), hint=error.hint)
    if plan.options.on_unmarkable == "fail":
        return _row(plan, item, "failed", error=str(error), hint=f"{error.hint}; or copy it: --on-unmarkable copy")
    row = _copy_image(plan, item)
    return row if row["status"] == "failed" else {**row, "unmarkable": error.kind, "chosen": True}


def _copy_image(plan: Plan, item: Item) -> Row:
    try:
        digest = plan.store.copy(item.path)
    except RadiotagError as error:
        if plan.store.hash(item.path) is not None:
            raise  # the output cannot be written, so nothing else would succeed
        return _failed(plan, item, error)
    return _row(plan, item, "copied", output=item.path.as_posix(), sha256_in=digest, sha256_out=digest)


def _mark_all(state: _Run, items: Sequence[Item]) -> Iterator[Row]:
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
            if not fits([decoded.picture for decoded in batch], image.picture, state.plan.options.batch_size):
                yield from _mark_batch(plan, marker, batch)
                batch = []
            batch.append(image)
    if batch:
        yield from _mark_batch(plan, marker, batch)


def _read(plan: Plan, item: Item) -> _Decoded | Row:
    """Read and decode an image; a failed row if that is not possible."""
    name = plan.source / item.path
    try:
        data = plan.store.read(item.path)
        picture = decode(data, str(name))
        sample = sample_of(picture)
        encode(sample, sample.rgb, plan.options.format)  # if it cannot be written, only this image fails
        palette = picture.mode == "P"
        picture = with_room(picture, plan.options.format, plan.options.marking)
    except OSError as error:
        return _row(plan, item, "failed", error=f"cannot read {name}: {error.strerror}")
    except RadiotagError as error:
        return _failed(plan, item, error)
    return _Decoded(item=item, digest=hashlib.sha256(data).hexdigest(), picture=picture, palette=palette)


def _mark_batch(plan: Plan, marker: Marker, batch: Sequence[_Decoded]) -> Iterator[Row]:
    """Mark decoded images together and write their files; yield each row after its file is written."""
    images = iter(batch)
    for results in mark_requests(marker, [_request(plan, image) for image in batch]):
        yield from marker.pool.map(partial(_write, plan), islice(images, len(results)), results)


def _request(plan: Plan, image: _Decoded) -> Request:
    item = image.item
    path, row = item.path.as_posix(), plan.rows[item.label]
    carries = path in plan.choice.patterned
    return request_for(plan.key, image.picture, path, row, seed=plan.options.seed, patterned=carries)


def _write(plan: Plan, image: _Decoded, result: Marked | RadiotagError) -> Row:
    if isinstance(result, RadiotagError):
        return _failed(plan, image.item, result)
    target, before, after = plan.target(image.item), image.picture.rgb, result.pixels
    plan.store.write(image.item.path, target, result.file)
    return _row(
        plan, image.item, "marked", output=target, sha256_in=image.digest,
        sha256_out=hashlib.sha256(result.file).hexdigest(), psnr=round(min(psnr(before, after), BEST_PSNR), 3),
        ssim=round(ssim(before, after), 5), linf=round(linf(before, after), 3), gain=round(result.gain, 5),
        **({"dropped": image.picture.dropped} if image.picture.dropped else {}),
        **({"full_chroma": True} if image.picture.full_chroma and plan.options.format == "keep" else {}),
        **({"full_colour": True} if _became_full_colour(plan, image, result) else {}),
    )  # fmt: skip


def _became_full_colour(plan: Plan, image: _Decoded, result: Marked) -> bool:
    """Whether a palette's colours were too few for the marked image."""
    return image.palette and plan.options.format == "keep" and decode(result.file, image.picture.name).mode != "P"


# ---------------------------------------------------------------- the preview


def preview(plan: Plan, summary: Summary, path: Path) -> None:
    """Write a contact sheet of the marked images with lowest, median and highest PSNR."""
    order = sorted(range(summary.marked), key=lambda i: summary.psnr[i])
    picks = sorted({0, len(order) // 2, len(order) - 1}) if order else []
    plan.store.open_output()
    with plan.manifest.open("rb") as file:
        rows = [manifest.row_at(file, summary.places[order[i]]) for i in picks]
    write_atomically(path, contact_sheet([_pair_for_sheet(plan, row) for row in rows]))


def _pair_for_sheet(plan: Plan, row: Row) -> tuple[Any, Any, str]:
    original, marked = plan.store.read(PurePosixPath(row["path"])), plan.store.read_output(row["output"])
    caption = f"{row['path']}  {row['psnr']:.1f} dB"
    return decode(original, row["path"]).rgb, decode(marked, row["output"]).rgb, caption
