"""Verifying suspects: unmarked images to ask them with, outputs paired with carriers, a verdict with its caveats."""

import glob
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from scipy import optimize, stats
from torch import Tensor

from radiotag import blackbox
from radiotag.errors import RadiotagError, out_of_memory
from radiotag.files import file_hash
from radiotag.images import decode, scan
from radiotag.keys import Key, fresh_carriers
from radiotag.manifest import Row, rank_journals, read_header, read_manifest
from radiotag.networks import Network, check_file, load, resized
from radiotag.radioactive import (
    ALIGNMENT_IMAGES,
    FEW,
    MANY,
    SMALL,
    Rows,
    evidence,
    holm,
    log_answers,
    output_unknown,
    resampled_log_p,
    suspect_rows,
)
from radiotag.synthetic import dead_leaves, inverted

LOG10 = math.log(10)
T = TypeVar("T")
SYNTHETIC_SEED = 20200702  # fixed: images chosen after seeing a suspect would be one more thing to choose
LARGEST_INPUT = 640  # pixels that a suspect's own file may ask for: time and memory grow with their square
POOR_R2 = 0.1
PAIRED = (
    "outputs, classes and carriers were paired in order, or by names in the suspect's file: unless that is certain, "
    "give --marked, and --data in sub-folders of all classes"
)
LARGE_INPUT = 448  # pixels; of larger ones fewer images are taken
TAIL = (0.1, 0.01, 0.001, 0.0001)  # p-values of fresh keys are counted up to each
ENOUGH = 5  # images a class that may contradict what a suspect's file says of its outputs
VOIDS = (
    "the p-value holds only if the key was made before the suspect (publish its fingerprint before the data),",
    "if the images used for alignment are unmarked, and if no other key, suspect, statistic or options were tried",
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
class Calibration:
    """The same suspect under fresh keys: their p-values must be uniform, whatever the suspect."""

    n: int
    ks_p: float  # Kolmogorov–Smirnov, against the uniform law; of Bonferroni's p, against any below it
    rank: int  # of the true key among the n + 1, from 1: the smallest p-value
    histogram: tuple[int, ...]  # counts of p in ten equal bins
    tail: tuple[int, ...]  # how many p are at most each of TAIL
    tail_p: float  # of so many or more there, the least of the binomial p-values, corrected (Bonferroni)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassResult:
    """One class's part of a finding."""

    name: str | None
    output: int  # of the suspect
    carrier: int  # row of the key's carriers
    log10_p: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One suspect's result. Logarithms are to base 10."""

    path: str
    sha256: str  # of the suspect's file
    architecture: str
    log10_p: float
    log10_p_corrected: float  # Holm, over the suspects of this run
    detected: bool
    paper_log10_p: float | None
    mean_cosine: float | None  # with the feature carriers
    pattern_cosine: float | None  # with the patterns
    alignment_r2: float | None
    classes_used: int
    method: str  # white-box or black-box
    warnings: tuple[str, ...]
    calibration: Calibration | None = None
    decoys: int | None = None  # keys beside the true one, black-box
    classes: tuple[ClassResult, ...] = ()  # white-box


def at_most(images: int, size: int) -> int:
    """So many images, or fewer of a size at which they would not fit in memory."""
    return min(images, round(images * (LARGE_INPUT / size) ** 2))


@lru_cache(maxsize=2)  # half a gigabyte at 224 pixels
def synthetic_images(size: int) -> Tensor:
    """(N, 3, size, size) float in [0, 1], the same for every suspect: dead leaves, and inverted images if small."""
    if size > SMALL:
        return dead_leaves(at_most(ALIGNMENT_IMAGES // 2, size), size, seed=SYNTHETIC_SEED).float().div_(255)
    others = resized(inverted()[: ALIGNMENT_IMAGES // 5].float() / 255, size).clamp(0, 1)
    leaves = dead_leaves(ALIGNMENT_IMAGES - len(others), size, seed=SYNTHETIC_SEED).float() / 255
    return torch.cat([leaves, others])


def marked_rows(manifest: Path | None) -> list[Row]:
    """What a manifest, and what an interrupted run of several processes left beside it, records of marked images.

    Nothing without one.
    """
    return [row for row in _recorded(manifest) if row["status"] == "marked"] if manifest else []


def _recorded(manifest: Path) -> list[Row]:
    return [row for journal in (manifest, *rank_journals(manifest)) for row in read_manifest(journal)[1].values()]


def marked_hashes(rows: Iterable[Row]) -> frozenset[str]:
    """SHA-256 of every marked file; one that came out as it went in, as an image of two colours may, is none."""
    return frozenset(row["sha256_out"] for row in rows if row["sha256_out"] != row.get("sha256_in"))


def unmarked_images(
    folder: Path,
    marked: frozenset[str],
    fit: Callable[[Tensor], Tensor],
    first: frozenset[str] | None = None,
    most: int = ALIGNMENT_IMAGES,
    each: int = 0,
) -> tuple[list[Tensor], list[str]]:
    """What `fit` makes of (3, H, W) float images in [0, 255], and class names: at most so many, evenly taken.

    Or as many as there are `each` of a class, up to MANY; or, with paths to take `first`, as many as black-box queries
    need: a suspect remembers the images it was shown.
    Raises RadiotagError if one of them is marked (by `marked`, or by a manifest beside it or a folder above).
    """
    for place in (folder, *folder.resolve().parents, folder.resolve()):
        beside = place.with_name(f"{place.name}.manifest.jsonl") if place.name else place
        marked = marked | marked_hashes(marked_rows(beside if beside.is_file() else None))
    items, classes, _ = scan(folder)
    most = max(most, min(MANY, each * len(classes)))
    if first is not None:
        items.sort(key=lambda item: item.path.as_posix() not in first)  # stable
        chosen = [items[i] for i in blackbox.choose_images([item.label for item in items])]
    else:
        chosen = items[:: max(1, math.ceil(len(items) / most))]
    images = []
    for item in chosen:
        path = folder / item.path
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() in marked:
            raise RadiotagError(
                f"{path} is marked: aligning on marked images would void the p-value",
                "give --data a folder of unmarked images, or leave it out",
            )
        image = torch.from_numpy(np.ascontiguousarray(decode(data, str(path)).rgb.transpose(2, 0, 1)))
        images.append(fit(image))  # at once: two thousand photographs would not fit in memory
    return images, [item.label for item in chosen]


@lru_cache(maxsize=4)  # for the next suspect
def real_images(folder: Path, size: int, marked: frozenset[str]) -> tuple[Tensor, tuple[str, ...]]:
    """(N, 3, size, size) in [0, 1] and class names of unmarked images: see `unmarked_images`."""
    most, each = at_most(ALIGNMENT_IMAGES, size), FEW if size <= SMALL else 0
    images, labels = unmarked_images(folder, marked, lambda image: resized(image[None] / 255, size), None, most, each)
    return torch.cat(images).clamp_(0, 1), tuple(labels)


def marked_classes(key: Key, manifest: Path) -> dict[str, int]:
    """Class → carrier row of what a manifest records as marked. RadiotagError if another key marked it."""
    header = read_header(manifest)
    if header.get("fingerprint") != key.fingerprint:
        raise RadiotagError(
            f"{manifest} was made with key {header.get('fingerprint')}, this is {key.fingerprint}",
            "give the key that marked the folder",
        )
    return {row["class"]: int(row["row"]) for row in marked_rows(manifest)}


def pair_classes(key: Key, suspect: Network, manifest: Path | None) -> list[tuple[int, int]]:
    """(suspect output, carrier row) pairs without labelled images: by name where both have names, else in order.

    Where a single class was marked, every output is paired with its carrier: which one it became is not known. With a
    manifest only the classes marked there are used. Raises RadiotagError if key and suspect do not fit.
    """
    theirs, ours, outputs = suspect.spec.class_names, key.class_names, suspect.spec.classes
    marked = marked_classes(key, manifest) if manifest else None
    if (marked is not None and set(marked) == {""}) or (len(key.carriers) == 1 and not (ours and theirs)):
        pairs = [(output, 0) for output in range(outputs)]
    elif marked is not None and manifest:
        rows = {row["class"]: int(row["row"]) for row in _recorded(manifest)}
        numbered = all(name == str(row) for name, row in rows.items())  # a shard's classes, of which some may be absent
        names = rows if numbered and not theirs else {name: i for i, name in enumerate(theirs or sorted(rows))}
        pairs = [(names[name], row) for name, row in sorted(marked.items()) if names.get(name, outputs) < outputs]
    elif ours and theirs:
        pairs = [(theirs.index(name), row) for row, name in enumerate(ours) if name in theirs]
    elif ours and len(ours) != outputs:
        raise RadiotagError(
            f"the key names {len(ours)} classes, the suspect has {outputs} outputs without names",
            "give --data with labelled, unmarked images, or name the classes marked with --marked MANIFEST",
        )
    else:
        pairs = [(i, i) for i in range(min(outputs, len(key.carriers) + 1))]
    if not pairs or max(row for _, row in pairs) >= len(key.carriers):
        raise RadiotagError(
            f"the key does not fit: {len(key.carriers)} carriers, a suspect of {outputs} outputs, "
            f"{'no class in common' if not pairs else 'paired in order'}",
            "give --data with labelled, unmarked images, or name the classes marked with --marked MANIFEST",
        )
    return pairs


def class_rows(
    key: Key, found: Sequence[str], manifest: Path | None, theirs: Sequence[str] | None = None
) -> dict[str, int]:
    """Carrier row of each class of labelled images: the manifest's, the key's by name, or as `mark` numbers them.

    A key without names numbers a folder's classes in sorted order; the suspect's names, `theirs`, tell of classes that
    the images lack. Empty for images of no known class.
    """
    if manifest:
        known = marked_classes(key, manifest)
    elif key.class_names is not None:
        known = {name: row for row, name in enumerate(key.class_names)}
    else:
        whole = theirs is not None and set(found) <= set(theirs) and len(theirs) <= len(key.carriers)
        order = sorted(theirs if theirs and whole else set(found))
        if len(order) > len(key.carriers):
            raise RadiotagError(
                f"the key does not fit: {len(key.carriers)} carriers, images of {len(order)} classes",
                "name the classes marked with --marked MANIFEST, or use the key that marked the data",
            )
        known = {name: row for row, name in enumerate(order)}
    return {name: known[name] for name in sorted(set(found)) if name in known}


def _named_outputs(suspect: Network, key: Key, names: Sequence[str]) -> list[int] | None:
    """The outputs of some classes by the names in the suspect's file, else in the usual sorted order; or None."""
    for order in (suspect.spec.class_names, key.class_names, names):
        if order and len(order) == suspect.spec.classes and set(names) <= set(order):
            return [list(order).index(name) for name in names]
    return None


def match_outputs(means: Tensor, named: Sequence[int] | None = None) -> list[int]:
    """Which output is which class: (L, C') mean probabilities of each class's images → one a class, no two the same.

    Hungarian assignment, of the largest sum. It looks at the suspect and at unmarked images alone, never at a carrier.
    `named` is what the suspect's file says: it is believed of each class unless the images contradict it, by twice as
    much. A class that gets no more than chance, and is not named, has none: −1.
    """
    rows, columns = optimize.linear_sum_assignment(-means.numpy())
    best = [-1] * len(means)
    for row, column in zip(rows, columns, strict=True):
        best[row] = int(column) if float(means[row, column]) > 1 / max(2, means.shape[1]) else -1
    found = list(best)
    for row, output in enumerate(named or ()):
        if best[row] < 0 or float(means[row, output]) >= 0.5 * float(means[row, best[row]]):
            found[row] = output
    while twice := {output for output in found if output >= 0 and found.count(output) > 1}:
        found = [best[row] if output in twice else output for row, output in enumerate(found)]
    return found


def mean_answers(answers: Tensor, found: Sequence[str], names: Sequence[str]) -> Tensor:
    """(L, C') mean probabilities of the images of each name, of log-probabilities (N, C')."""
    probabilities = answers.exp()
    return torch.stack([probabilities[[label == name for label in found]].mean(0) for name in names])


def labelled_pairs(
    key: Key, suspect: Network, answers: Tensor, found: Sequence[str], rows: dict[str, int]
) -> tuple[list[tuple[int, int]], tuple[str, ...]]:
    """(suspect output, carrier row) pairs, and names, of the classes of labelled images that the suspect knows."""
    told = _named_outputs(suspect, key, list(rows))
    outputs = told if min(map(found.count, rows)) < ENOUGH else None
    if outputs is None:
        outputs = match_outputs(mean_answers(answers, found, list(rows)), told)
    known = {name: output for name, output in zip(rows, outputs, strict=True) if output >= 0}
    return [(output, rows[name]) for name, output in known.items()], tuple(known)


def examine(
    path: Path,
    key: Key,
    marker: Network,
    options: Options,
    data: Path | None,
    manifest: Path | None,
    batch_size: int,
) -> tuple[Network, Rows, bool]:
    """Load a suspect and compute its class vectors; True if their pairing with carriers rests on order or its file.

    The carriers play no part in it. `batch_size`: of this try, where memory did not suffice for the options'.

    Raises RadiotagError, and FloatingPointError where the suspect's outputs or features are not finite.
    """
    suspect = load_suspect(path, options)
    size = max(suspect.spec.image_size, marker.spec.image_size)
    theirs = suspect.spec.class_names
    pixels = synthetic_images(size)
    found: tuple[str, ...] = ()
    if data is not None:
        pixels, found = real_images(data.absolute(), size, marked_hashes(marked_rows(manifest)))
    answers = log_answers(suspect, pixels, batch_size)  # (N, C')
    rows = class_rows(key, [name for name in found if name], manifest, theirs)
    if rows:
        pairs, names = labelled_pairs(key, suspect, answers, found, rows)
        if not pairs:
            raise RadiotagError(f"{path} knows none of the classes in {data}", "check --image-size, --mean and --std")
        labels, told = positions(found, names), tuple(sorted({*found} - {""}))
        every = told if 1 < len(told) <= suspect.spec.classes else theirs or ()
    else:
        pairs, labels = pair_classes(key, suspect, manifest), None
        every = theirs or (tuple(key.class_names) if key.class_names else ())
        names = tuple(every[output] for output, _ in pairs) if len(every) == suspect.spec.classes else ()
    known = marker.spec.class_names or ()
    own = [known.index(name) for name in names] if names and set(names) <= set(known) else None
    others = [known.index(name) for name in dict.fromkeys(every) if name in known and name not in {*names, *rows}]
    numbered = key.class_names is None and manifest is None and set(theirs or ()) != set(found)  # in sorted order
    vectors = suspect_rows(
        marker, suspect, pixels, pairs, batch_size, labels=labels, own=own, others=others, answers=answers
    )
    guessed = (labels is None or (numbered and len(key.carriers) > 1)) and not output_unknown(vectors)
    return suspect, vectors, guessed


@contextmanager
def _naming(path: Path, *others: Path | None) -> Iterator[None]:
    """Say of which suspect an error is, unless it is of one of the other files."""
    try:
        yield
    except FloatingPointError as error:
        hint = "check --image-size, --mean and --std, or leave the file out"
        raise RadiotagError(f"{path}: {error}", hint) from error
    except RadiotagError as error:
        if any(os.fspath(place) in str(error) for place in (path, *others) if place):
            raise
        raise RadiotagError(f"{path}: {error}", error.hint) from error


def _in_memory(call: Callable[[int], T], batch_size: int) -> T:
    """What `call` gives with this batch size, or with half of it, and again, where memory does not suffice."""
    while True:
        try:
            return call(batch_size)
        except Exception as error:
            if batch_size == 1 or not out_of_memory(error):
                raise
        batch_size //= 2  # the failed call's tensors are gone with its error


def load_suspect(path: Path, options: Options) -> Network:
    """Read a suspect's file, hostile input, as weights alone."""
    return load(
        path, architecture=options.architecture, image_size=options.image_size, mean=options.mean, std=options.std,
        largest=LARGEST_INPUT,
    ).to(options.device)  # fmt: skip


def check_suspects(paths: Sequence[Path], options: Options) -> None:
    """Read each of several: one that cannot be read would cost the minutes that were spent on those before it."""
    for path in paths:
        check_file(path)
    for path in paths if len(paths) > 1 else ():
        load_suspect(path, options)


@lru_cache(maxsize=4)  # the same tensor for the next suspect, so that what is computed of it is kept, too
def positions(found: tuple[str, ...], names: tuple[str, ...]) -> Tensor:
    """The classes' positions in `names`, (N,); −1 for images of others, which serve the alignment alone."""
    place = {name: i for i, name in enumerate(names)}
    return torch.tensor([place.get(name, -1) for name in found])


def calibrate(rows: Rows, key: Key, log_p: float, count: int) -> Calibration:
    """The suspect's p-values under `count` fresh keys, which follow from the secret key by a hash (SHAKE-256).

    They must be uniform. Kolmogorov and Smirnov's test hardly sees the few smallest, by which suspects are accused:
    these are counted. Where the best of many outputs counts, corrected for the choice, p is larger than it need be, and
    small ones must not be too many.
    """
    rows, seed = replace(rows, paper=None), key.secret + b"calibrate"  # nobody asks for the paper's under fresh keys
    fresh = []
    for number in range(count):
        carriers, patterns = fresh_carriers(key, hashlib.shake_256(seed + number.to_bytes(8, "big")).digest)
        fresh.append(evidence(rows, carriers, patterns).log_p)
    p = np.exp(fresh)
    tail = [int((p <= level).sum()) for level in TAIL]
    return Calibration(
        n=count,
        ks_p=float(stats.kstest(p, "uniform", alternative="greater" if output_unknown(rows) else "two-sided").pvalue),
        rank=1 + sum(value <= log_p for value in fresh),
        histogram=tuple(np.histogram(p, bins=10, range=(0, 1))[0].tolist()),
        tail=tuple(tail),
        tail_p=min(1.0, len(TAIL) * float(stats.binom.sf(np.array(tail) - 1, count, TAIL).min())),
    )


# ---------------------------------------------------------------- the two tests


def verify(
    paths: Sequence[Path],
    key: Key,
    options: Options,
    *,
    data: Path | None = None,
    manifest: Path | None = None,
    alpha: float = 1e-4,
    calibration: int = 0,
    progress: Callable[[Path], None] = lambda _: None,
) -> list[Finding]:
    """Test every suspect with the key's declared statistic; the verdict is on the Holm-corrected p-value."""
    check_suspects(paths, options)
    marker = key.network(options.device)
    results = []
    for path in paths:
        progress(path)
        with _naming(path, data, manifest):
            asked = partial(examine, path, key, marker, options, data, manifest)
            suspect, rows, guessed = _in_memory(asked, options.batch_size)
            found = evidence(rows, key.carriers, key.patterns)
        warnings = _warnings(suspect, rows, options)
        if guessed and found.log_p > math.log(alpha):
            warnings.append(PAIRED)
        finding = Finding(
            path=os.fspath(path),
            sha256=file_hash(path),
            architecture=suspect.spec.architecture,
            log10_p=found.log_p / LOG10,
            log10_p_corrected=found.log_p / LOG10,
            detected=False,
            paper_log10_p=None if found.paper_log_p is None else found.paper_log_p / LOG10,
            mean_cosine=found.mean_cosine,
            pattern_cosine=found.pattern_cosine,
            alignment_r2=rows.r2,
            classes_used=len(found.per_class),
            method="white-box",
            warnings=tuple(warnings),
            calibration=calibrate(rows, key, found.log_p, calibration) if calibration else None,
        )
        results.append(finding)
    return corrected(results, alpha)


def corrected(findings: Sequence[Finding], alpha: float) -> list[Finding]:
    """Holm's correction over all suspects, and the verdicts."""
    log_p = holm([finding.log10_p * LOG10 for finding in findings])
    return [
        replace(finding, log10_p_corrected=value / LOG10, detected=value <= math.log(alpha))
        for finding, value in zip(findings, log_p, strict=True)
    ]


def prepare_queries(
    key: Key, key_path: Path, data: Path, manifest: Path | None, decoys: int | None, alpha: float = 1e-4
) -> blackbox.Queries:
    """The queries for labelled, unmarked images: read back if they were made before, else made and kept.

    Without a number of decoys there are as many as it takes for a p-value of alpha: thousands for a single class.
    """
    marked = marked_rows(manifest)
    sources = frozenset(row["path"] for row in marked)
    images, found = unmarked_images(data.absolute(), marked_hashes(marked), blackbox.shrunk, sources)
    rows = class_rows(key, found, manifest)
    kept = [i for i, name in enumerate(found) if name in rows]
    if not kept:
        raise RadiotagError(f"{data} holds no class that the key knows", "give --data with the marked classes")
    decoys = decoys or blackbox.decoys_needed(len({found[i] for i in kept}), alpha)
    most = min(blackbox.IMAGES, blackbox.QUESTIONS // (2 * decoys + 2))
    kept = [kept[i] for i in blackbox.choose_images([found[i] for i in kept], most)]
    pixels = [images[i] for i in kept]
    carriers = [rows[found[i]] for i in kept]
    path = blackbox.cache_path(key_path, key, pixels, carriers, decoys)
    if path.exists():
        return blackbox.load(path, key)
    queries = blackbox.make(pixels, carriers, [found[i] for i in kept], decoys)
    blackbox.save(path, queries, key)
    return queries


def verify_black_box(
    paths: Sequence[Path],
    queries: blackbox.Queries,
    key: Key,
    options: Options,
    *,
    alpha: float = 1e-4,
    progress: Callable[[Path], None] = lambda _: None,
) -> list[Finding]:
    """Test every suspect by its answers alone: see `blackbox`."""
    check_suspects(paths, options)
    own = own_answers(queries, key, options)
    findings = []
    for path in paths:
        progress(path)
        suspect = load_suspect(path, options)
        with _naming(path):
            answers = _in_memory(partial(blackbox.ask, suspect, queries, key), options.batch_size)
        assumed = _assumed(suspect, options)
        findings.append(black_box_finding(path, suspect.spec.architecture, queries, answers, own, assumed, alpha))
    return corrected(findings, alpha)


def own_answers(queries: blackbox.Queries, key: Key, options: Options) -> tuple[Tensor, tuple[str, ...]]:
    """The marking network's answers to the queries, and the names of its classes."""
    marker = key.network(options.device)
    answers = _in_memory(partial(blackbox.ask, marker, queries, key), options.batch_size)
    return answers, marker.spec.class_names or ()


def verify_predictions(path: Path, key: Key, key_path: Path, options: Options, *, alpha: float = 1e-4) -> list[Finding]:
    """Test a suspect by a file of its answers to exported queries, which lie beside the key."""
    kept = sorted(key_path.parent.glob(f"{glob.escape(key_path.stem)}.queries-*.safetensors"))
    if not kept:
        raise RadiotagError(
            f"no queries lie beside {key_path}", "make them first: radiotag verify --black-box --export DIR --data DIR"
        )
    failure: RadiotagError | None = None
    for place in kept:
        try:
            queries = blackbox.load(place, key)
            answers, warnings = blackbox.read_answers(path, queries)
        except (blackbox.NotAnswered, blackbox.OfAnotherKey) as error:
            failure = error
            continue
        return corrected(
            [black_box_finding(path, "unknown", queries, answers, own_answers(queries, key, options), warnings, alpha)],
            alpha,
        )
    raise failure or RadiotagError(f"{path} answers nothing")


def black_box_finding(
    path: Path,
    architecture: str,
    queries: blackbox.Queries,
    answers: Tensor,
    own: tuple[Tensor, tuple[str, ...]],
    warnings: Sequence[str],
    alpha: float,
) -> Finding:
    """The finding from (2(K + 1), N, C') answers. The outputs are matched on the answers under all keys alike."""
    rows = sorted(set(queries.rows))
    images = torch.tensor(queries.rows)
    means = torch.stack([answers[:, images == row].flatten(0, 1).nanmean(0) for row in rows]).nan_to_num()
    pairs = [(output, row) for output, row in zip(match_outputs(means), rows, strict=True) if output >= 0]
    if not pairs:
        raise RadiotagError(f"{path} knows none of the classes", "check --image-size, --mean and --std, and the images")
    values = blackbox.evidence(queries, answers, pairs, *own)
    log10_p, least = resampled_log_p(values) / LOG10, -values.shape[1] * math.log10(len(values))
    if least > math.log10(alpha):
        used = f"{queries.decoys} decoys and {values.shape[1]} of the classes"
        warnings = [*warnings, f"p cannot be below {10**least:.1e} with {used}: ask with more --decoys"]
    return Finding(
        path=os.fspath(path), sha256=file_hash(path), architecture=architecture,
        log10_p=log10_p, log10_p_corrected=log10_p, detected=False, paper_log10_p=None, mean_cosine=None,
        pattern_cosine=None, alignment_r2=None, classes_used=values.shape[1], method="black-box",
        warnings=tuple(warnings), decoys=queries.decoys,
    )  # fmt: skip


def _assumed(suspect: Network, options: Options) -> list[str]:
    if suspect.assumed and not (options.mean and options.std and options.image_size):
        size = suspect.spec.image_size
        return [f"input size ({size} px) and normalisation are assumed: give --image-size, --mean and --std"]
    return []


def _warnings(suspect: Network, rows: Rows, options: Options) -> list[str]:
    found = _assumed(suspect, options)
    if rows.r2 is not None and rows.r2 < POOR_R2:
        found.append(f"poor alignment (R² {rows.r2:.2f}): a mark may be missed, an accusation is not made likelier")
    if suspect.head is None:
        found.append("no linear last layer: the response alone is used, and the paper's statistic cannot be")
    if output_unknown(rows):
        found.append(f"one class was marked: the best of {len(rows.classes)} outputs counts, corrected for the choice")
    return found


def as_json(finding: Finding) -> dict[str, Any]:
    """Plain values for `--json`."""
    plain = asdict(finding)
    del plain["classes"]
    if finding.method == "white-box":
        del plain["decoys"]
    if finding.calibration is None:
        del plain["calibration"]
    return plain
