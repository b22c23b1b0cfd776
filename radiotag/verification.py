"""Verification: each suspect is shown images, paired with carriers, tested, and given a verdict with its caveats."""

import copy
import glob
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from radiotag import blackbox
from radiotag.answers import NOT_FINITE, NotAnswered, ask_function, read_answers
from radiotag.calibration import Calibration, calibrate
from radiotag.conventions import settle_convention, some
from radiotag.errors import RadiotagError, broken_warnings, none_readable, out_of_memory
from radiotag.files import file_hash
from radiotag.keys import Key
from radiotag.manifest import marked_rows, recorded_classes
from radiotag.networks import Network, check_file, load_network, resized, wrap_module
from radiotag.normalisation import better_normalisation
from radiotag.pairing import Pairing, Records, class_rows, marked_classes, match_outputs, pair
from radiotag.probes import References, UnmarkedImages, class_means, originals, readable
from radiotag.public import read_public
from radiotag.radioactive import (
    Evidence,
    bonferroni,
    evidence,
    holm,
    nested_sizes,
    output_unknown,
    resampled_log_p,
)
from radiotag.suspect import Batching, ClassVectors, Reference, ask, class_vectors

LOG10 = math.log(10)
T = TypeVar("T")
Progress = Callable[[str, str, int, int], None]  # (suspect, activity, number done, total)
Classify = Callable[[NDArray[np.uint8]], Any]  # (B, H, W, 3) images → (B, C') numbers or (B,) labels
Model = Path | nn.Module | Classify  # a suspect; a function can only be tested as a black box
POOR_R2 = 0.1
LOOKS_MARKED = -4.0  # log10 p of images that were given as unmarked
LARGEST_UNASKED = 640  # pixels, the most that a suspect's file may ask for: time and memory grow with the square
ASSUMED_PAIRING = (
    "outputs, classes and carriers were paired in order, or by names in the suspect's file: unless that is certain, "
    "give --marked, and --data in sub-folders of all classes"
)
VOIDS = (
    "the p-value holds only if the key was made before the suspect (publish its fingerprint before the data),",
    "if the images used for alignment are unmarked, and if no other key, suspect, statistic or options were tried",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """How all suspects are read and tested."""

    architecture: str | None = None  # of the suspects; None: recognised from the tensors
    image_size: int | None = None  # pixels, square; None: from the file, else the architecture's usual one
    mean: tuple[float, ...] | None = None  # the suspects' normalisation for pixels in [0, 1]
    std: tuple[float, ...] | None = None
    manifest: Path | None = None  # of the marked data: only the classes marked there are tested
    public: Path | None = None  # key, manifest, classes and data must be those published here
    alpha: float = 1e-4  # a mark is detected if the corrected p-value is at most this
    calibrate: int = 0  # number of null keys to test the same suspects with
    black_box: bool = False  # use only the suspects' answers to real images
    decoys: int | None = None  # decoy keys of the black-box test; None: as many as a p-value of alpha needs
    device: str = "cpu"
    batch_size: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassResult:
    """The result of one compared class: its output, its carrier, and its p-value."""

    name: str | None  # None if unknown
    output: int  # of the suspect
    carrier: int  # row in the key
    log10_p: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One suspect's result. Logarithms are to base 10."""

    path: str
    sha256: str  # of the suspect, see `suspect_digest`
    architecture: str
    log10_p: float
    log10_p_corrected: float  # Holm, over the suspects of this run
    detected: bool
    paper_log10_p: float | None
    mean_cosine: float | None  # with the feature carriers
    pattern_cosine: float | None  # with the patterns
    alignment_r2: float | None
    classes_used: int
    sets: int  # of classes that were tested: the key's first 1, 2, 5, … and all; 1: all together, and nothing else
    first_classes: int  # how many classes the strongest set holds
    method: str  # white-box or black-box
    warnings: tuple[str, ...]
    calibration: Calibration | None = None
    decoys: int | None = None  # number of decoy keys; black-box only
    questions: str | None = None  # SHA-256 over the questions' names; black-box only
    images_log10_p: float | None = None  # of the real images themselves: small if they are marked
    classes: tuple[ClassResult, ...] = ()  # white-box only


# ---------------------------------------------------------------- reading suspects


def load_suspect(model: Model, options: VerifyOptions) -> Network:
    """Read a suspect's file, which may be hostile, as weights only; or copy a module that the caller holds.

    RadiotagError for what cannot be read, and for a function.
    """
    if isinstance(model, nn.Module):
        own = copy.deepcopy(model).float()  # as a file's weights; the caller's stays in training, if it was
        return wrap_module(own, image_size=options.image_size, mean=options.mean, std=options.std).to(options.device)
    if not isinstance(model, Path):
        hint = "give data and labels, and options=VerifyOptions(black_box=True)"
        raise RadiotagError(f"{suspect_name(model)} is a function: its weights cannot be tested", hint)
    return load_network(
        model, architecture=options.architecture, image_size=options.image_size, mean=options.mean, std=options.std,
        largest=LARGEST_UNASKED,
    ).to(options.device)  # fmt: skip


def check_suspects(models: Sequence[Model], options: VerifyOptions) -> None:
    """RadiotagError for a file that cannot be read, before minutes are spent on the suspects before it."""
    paths = [model for model in models if isinstance(model, Path)]
    for path in paths:
        check_file(path)
    for path in paths if len(models) > 1 else ():
        load_suspect(path, options)


def suspect_name(model: Model) -> str:
    """A suspect's name: its path, or the name of its module's class or of its function."""
    if isinstance(model, Path):
        return os.fspath(model)
    return type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", type(model).__name__)


def suspect_digest(model: Model) -> str:
    """SHA-256 of a suspect's file, or of the names, types, shapes and values of a module; "" for a function."""
    if isinstance(model, Path):
        return file_hash(model)
    digest = hashlib.sha256()
    for name, value in model.state_dict().items() if isinstance(model, nn.Module) else ():
        if not isinstance(value, Tensor):  # a module's extra state may be anything, and is no weight
            continue
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest() if isinstance(model, nn.Module) else ""


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the suspect's name before an error's message, unless the message already names it."""
    try:
        yield
    except FloatingPointError as error:
        hint = "check --image-size, --mean and --std, or leave the file out"
        raise RadiotagError(f"{name}: {error}", hint) from error
    except RadiotagError as error:
        is_word = name.isidentifier()  # of the message's own, it may be: better named twice than not at all
        if not is_word and re.search(rf"(?<![\w/.-]){re.escape(name)}(?![\w/-])", str(error)):
            raise
        raise RadiotagError(f"{name}: {error}", error.hint) from error


def _in_memory(call: Callable[[Batching], T], batching: Batching) -> T:
    """The result of `call`; the batch size is halved until memory is sufficient."""
    while True:
        try:
            return call(batching)
        except Exception as error:
            if batching.size == 1 or not out_of_memory(error):
                raise
        batching = replace(batching, size=batching.size // 2)  # the failed call's tensors are gone with its error


def _batching(name: str, options: VerifyOptions, progress: Progress) -> Batching:
    def tell(activity: str, done: int, total: int) -> None:
        progress(name, activity, done, total)

    return Batching(size=options.batch_size, tell=tell)


# ---------------------------------------------------------------- the white-box test


class Examined(NamedTuple):
    """Everything that is computed from one suspect before the test reads any carrier."""

    network: Network
    pairing: Pairing
    vectors: ClassVectors
    left_out: int  # images for which the suspect is not finite


def input_size(network: Network, references: References) -> int:
    """The size (pixels) of the images for a suspect: the larger one of its own input and the marking network's."""
    return max(network.spec.image_size, references.marker.spec.image_size)


def records(key: Key, data: UnmarkedImages | None, options: VerifyOptions) -> Records:
    """What manifest, publication and images say about classes and carriers: the same for every suspect.

    RadiotagError for another key's manifest, and for one without a mark.
    """
    marked = marked_classes(key, options.manifest) if options.manifest else None
    if marked is not None and not marked:
        hint = "give the manifest of the folder that was published"
        raise RadiotagError(f"{options.manifest} records no marked image", hint)
    published = read_public(options.public).carriers if options.public else None
    classes = tuple(sorted({*data.labels} - {""})) if data else ()
    return Records(
        marked=marked, recorded=recorded_classes(options.manifest) if options.manifest else None,
        against_all=key.against_all, published=published, classes=classes,
    )  # fmt: skip


def examine(network: Network, key: Key, reference: Reference, recorded: Records, batching: Batching) -> Examined:
    """Show a suspect images, pair its outputs with classes and carriers, and compute its class vectors.

    RadiotagError if it knows none of the classes, FloatingPointError if it is not finite for most of the images.
    """
    suspect, usable = ask(network, reference, batching)
    pairing = pair(key, suspect, usable.labels, recorded)
    tested = pairing.tested(recorded)
    if not tested:
        raise RadiotagError(f"it knows none of the classes in {reference.name}", "check --image-size, --mean and --std")
    compared = pairing.compared(
        reference.marker.spec.class_names or (), others=key.by_every_class, few=key.few_photographs
    )
    vectors = class_vectors(usable, suspect, compared, batching)
    left_out = len(reference.pixels) - len(usable.pixels)
    return Examined(network, pairing.only(tested), vectors.only(tested), left_out)


def settle_input(
    network: Network, pixels: Tensor, options: VerifyOptions, from_file: bool, batching: Batching
) -> list[str]:
    """Give a suspect without metadata the convention for its input that its batch norms remember.

    from_file: whether it was rebuilt from a file's tensors; a module's stem is as its code says.
    """
    stated = bool(options.mean or options.std)
    fixed_stem = not from_file or ":" in (options.architecture or "")
    return settle_convention(network, pixels, batching, fixed_normalisation=stated, fixed_stem=fixed_stem)


def settle_normalisation(
    network: Network, reference: Reference, options: VerifyOptions, batching: Batching
) -> list[str]:
    """Give a suspect another normalisation if labelled images show that its own is false, unless the caller stated it.

    Returns a warning then.
    """
    found = better_normalisation(network, reference.pixels, reference.labels, batching)
    if found is None:
        return []
    text = f"it knows {found.known_as_stated:.0%} of the images with the normalisation stated, {found.known:.0%} with"
    if options.mean or options.std:
        return [f"{text} {found}: --mean and --std may be wrong"]
    network.normalise_by(found.mean, found.std)
    return [f"{text} {found}, which was used"]


def images_log10_p(reference: Reference, rows: dict[str, int], key: Key, batching: Batching) -> float | None:
    """log10 p of the images' own class means, which are marked if it is small; None for images without known classes.

    rows: class → carrier row. The p-value is exact, like a suspect's.
    """
    if not rows:
        return None
    vectors = class_means(reference, list(rows), batching)
    alive = bool(vectors.features.any()) or (vectors.pattern is not None and bool(vectors.pattern.any()))
    if not alive:
        return None
    return evidence(vectors, list(rows.values()), key.carriers, key.patterns).log_p / LOG10


def _disguised(log10_p: float | None) -> list[str]:
    """A warning about images that look marked."""
    if log10_p is None or log10_p > LOOKS_MARKED:
        return []
    return [f"the images shown look marked under this key (log10 p {log10_p:.1f}), which voids the result: show others"]


def verify(
    models: Sequence[Model],
    key: Key,
    options: VerifyOptions,
    data: UnmarkedImages | None = None,
    progress: Progress = lambda *_: None,
) -> list[Finding]:
    """Test every suspect with the key's declared statistic; the verdict follows from the Holm-corrected p-value.

    `data` are real, unmarked images to show; without them, images are synthetic. Where enough originals of marked
    images are among them, by the manifest, their classes are asked with these alone. RadiotagError names a suspect that
    cannot be tested.
    """
    check_suspects(models, options)
    shown = data and originals(data, options.manifest)
    references = References(key.network(options.device), shown, evenly=key.against_all)
    recorded, findings = records(key, data, options), []
    for model in models:
        name = suspect_name(model)
        batching = _batching(name, options, progress)
        with _naming(name):
            network = load_suspect(model, options)
        reference = references.at(input_size(network, references), batching.tell)
        with _naming(name):
            settle = partial(settle_input, network, reference.pixels, options, isinstance(model, Path))
            restated = _in_memory(settle, batching)
            restated += _in_memory(partial(settle_normalisation, network, reference, options), batching)
            examined = _in_memory(partial(examine, network, key, reference, recorded), batching)
            paired = examined.pairing.rows
            order = key.tested_order(by_manifest=options.manifest is not None)
            result = evidence(examined.vectors, paired, key.carriers, key.patterns, order)
        rows = examined.pairing.image_rows(reference.labels)
        own = _in_memory(partial(images_log10_p, reference, rows, key), batching)
        finding = _white_box_finding(model, examined, result, options)
        told = (
            *_disguised(own),
            *restated,
            *(broken_warnings(data.broken, data.name) if data else ()),
            *finding.warnings,
        )
        finding = replace(finding, images_log10_p=own, warnings=told)
        if options.calibrate:
            arguments = examined.vectors, examined.pairing.rows, key, result, options.calibrate, batching.tell
            finding = replace(finding, calibration=calibrate(*arguments))
        findings.append(finding)
    return corrected(findings, options.alpha)


def _white_box_finding(model: Model, examined: Examined, result: Evidence, options: VerifyOptions) -> Finding:
    return Finding(
        path=suspect_name(model),
        sha256=suspect_digest(model),
        architecture=examined.network.spec.architecture,
        log10_p=result.log_p / LOG10,
        log10_p_corrected=result.log_p / LOG10,
        detected=False,
        paper_log10_p=None if result.paper_log_p is None else result.paper_log_p / LOG10,
        mean_cosine=result.mean_cosine,
        pattern_cosine=result.pattern_cosine,
        alignment_r2=examined.vectors.r2,
        classes_used=len(result.per_class),
        sets=result.sets,
        first_classes=result.first_classes,
        method="white-box",
        warnings=tuple(_warnings(examined, result, options)),
        classes=_class_results(examined.pairing, result),
    )


def _class_results(pairing: Pairing, result: Evidence) -> tuple[ClassResult, ...]:
    return tuple(
        ClassResult(
            name=pairing.names[i] if pairing.names else None,
            output=pairing.outputs[i],
            carrier=pairing.rows[i],
            log10_p=log_p / LOG10,
        )
        for i, log_p in zip(result.compared, result.per_class, strict=True)
    )


def corrected(findings: Sequence[Finding], alpha: float) -> list[Finding]:
    """Add Holm's correction over all suspects, and the verdicts."""
    log_p = holm([finding.log10_p * LOG10 for finding in findings])
    return [
        replace(finding, log10_p_corrected=value / LOG10, detected=value <= math.log(alpha))
        for finding, value in zip(findings, log_p, strict=True)
    ]


def _assumed_input(network: Network, options: VerifyOptions) -> list[str]:
    if network.assumed and not (options.mean and options.std and options.image_size):
        size = network.spec.image_size
        return [f"input size ({size} px) and normalisation are assumed: give --image-size, --mean and --std"]
    return []


def _warnings(examined: Examined, result: Evidence, options: VerifyOptions) -> list[str]:
    network, pairing, vectors, left_out = examined
    texts = _assumed_input(network, options) + ([network.taken] if network.taken else [])
    if left_out:
        texts.append(NOT_FINITE.format(left_out))
    if vectors.r2 is not None and vectors.r2 < POOR_R2:
        texts.append(f"poor alignment (R² {vectors.r2:.2f}): a mark may be missed, an accusation is not made likelier")
    if vectors.pattern is not None and not vectors.pattern.any():
        texts.append(
            "no gradient is finite and above zero: only the last layer's alignment counts; --black-box with --data "
            "needs no gradient"
        )
    if network.head is None:
        texts.append("no linear last layer: the response alone is used, and the paper's statistic cannot be")
    if output_unknown(pairing.rows):
        texts.append(f"one class was marked: the best of {len(pairing.rows)} outputs counts, corrected for the choice")
    if pairing.assumed and result.log_p > math.log(options.alpha):
        texts.append(ASSUMED_PAIRING)
    return texts


# ---------------------------------------------------------------- the black-box test


class MarkerAnswers(NamedTuple):
    """The marking network's answers to the queries, and the names of its classes."""

    probabilities: Tensor  # (2(K + 1), N, C'')
    names: tuple[str, ...]


def choose_queries(key: Key, data: UnmarkedImages, options: VerifyOptions) -> blackbox.Queries:
    """Choose images for the queries, and make the queries under random names.

    The images are labelled originals without a mark. Those whose marked copies were released come first. The default
    number of decoys is as many as a p-value of alpha needs: thousands for a single class. Images that cannot be read
    are left out, and noted in `data`. RadiotagError if no image has a class that the key knows, or if one is marked.
    """
    marked = {row["path"] for row in marked_rows(options.manifest)}  # a suspect remembers its training images best
    order = sorted(range(len(data.labels)), key=lambda i: data.paths[i] not in marked)  # stable
    order = [order[i] for i in blackbox.choose_images([data.labels[i] for i in order])]
    recorded = replace(records(key, data, options), against_all=False)  # nothing is asked about unmarked classes
    rows = class_rows(key, [data.labels[i] for i in order], recorded)
    pictures = {i: blackbox.shrunk(image) for i in order if (image := readable(data, i)) is not None}  # none marked
    if not pictures:
        raise none_readable(data.name, data.broken[0])
    order = [i for i in order if i in pictures and data.labels[i] in rows]
    if not order:
        raise RadiotagError(f"{data.name} holds no class that the key knows", "give --data with the marked classes")
    classes = len({data.labels[i] for i in order})
    sets = len(_asked_sets(classes, key, options))
    decoys = options.decoys or blackbox.decoys_needed(classes, options.alpha / sets)
    limit = min(blackbox.IMAGES, blackbox.QUESTIONS // (2 * decoys + 2))
    order = [order[i] for i in blackbox.choose_images([data.labels[i] for i in order], limit)]
    labels = [data.labels[i] for i in order]
    return blackbox.make(key, [pictures[i] for i in order], [rows[name] for name in labels], labels, decoys)


def prepare_queries(key: Key, data: UnmarkedImages, options: VerifyOptions) -> blackbox.Queries:
    """`choose_queries`, cached beside the key's file if the key has one."""
    queries = choose_queries(key, data, options)
    if key.path is None:
        return queries
    path = blackbox.cache_path(key.path, key, queries)
    if path.exists():
        return blackbox.load_queries(path, key)
    blackbox.save_queries(path, queries, key)
    return queries


def verify_black_box(
    models: Sequence[Model],
    queries: blackbox.Queries,
    key: Key,
    options: VerifyOptions,
    progress: Progress = lambda *_: None,
) -> list[Finding]:
    """Test every suspect by its answers alone (see `blackbox`). RadiotagError names one that cannot be tested."""
    check_suspects(models, options)
    baseline, shown = marker_answers(queries, key, options, progress), asked_about(queries, key, options)
    own = _asked_log10_p(queries, shown, key, options, progress)
    findings = []
    for model in models:
        name, architecture, assumed = suspect_name(model), "unknown", list[str]()
        with _naming(name):
            if isinstance(model, Path | nn.Module):
                network, batching = load_suspect(model, options), _batching(name, options, progress)
                size = network.spec.image_size
                pictures = queries.images[some(len(queries.images), size)]
                pixels = torch.cat([resized(picture[None].float() / 255, size) for picture in pictures])
                settle = partial(settle_input, network, pixels, options, isinstance(model, Path))
                assumed = _in_memory(settle, batching)
                assumed += _in_memory(partial(settle_normalisation, network, shown, options), batching)
                architecture, assumed = network.spec.architecture, _assumed_input(network, options) + assumed
                answers = _ask_all(name, network, queries, key, options, progress)
            else:
                answers = ask_function(model, queries, key, _batching(name, options, progress))
            if broken := int(answers.isnan().any(2).sum()):
                assumed = [*assumed, NOT_FINITE.format(broken)]
            finding = _black_box_finding(name, queries, answers, baseline, key, options)
        findings.append(replace(
            finding, sha256=suspect_digest(model), architecture=architecture, images_log10_p=own,
            warnings=(*_disguised(own), *assumed, *finding.warnings),
        ))  # fmt: skip
    return corrected(findings, options.alpha)


def asked_about(queries: blackbox.Queries, key: Key, options: VerifyOptions) -> Reference:
    """The images of the questions, without any pattern, at the marking network's size."""
    marker = key.network(options.device)
    pixels = torch.cat([resized(image[None].float() / 255, marker.spec.image_size) for image in queries.images])
    return Reference(marker, pixels, queries.labels)


def _asked_log10_p(
    queries: blackbox.Queries, shown: Reference, key: Key, options: VerifyOptions, progress: Progress
) -> float | None:
    rows = dict(zip(queries.labels, queries.rows, strict=True))
    return _in_memory(partial(images_log10_p, shown, rows, key), _batching("the images", options, progress))


def _ask_all(
    name: str, network: Network, queries: blackbox.Queries, key: Key, options: VerifyOptions, progress: Progress
) -> Tensor:
    batching = _batching(name, options, progress)
    return _in_memory(partial(blackbox.ask, network, queries, key), batching)


def marker_answers(
    queries: blackbox.Queries, key: Key, options: VerifyOptions, progress: Progress = lambda *_: None
) -> MarkerAnswers:
    """The answers to the queries of the marking network, which has seen no mark."""
    marker = key.network(options.device)
    answers = _ask_all("the marking network", marker, queries, key, options, progress)
    return MarkerAnswers(answers, marker.spec.class_names or ())


def _published_rows(key: Key, options: VerifyOptions) -> dict[str, int] | None:
    """Class → carrier row by the public half, or by the key's names, to which it commits, too."""
    if options.public is None:
        return None
    table = read_public(options.public).carriers
    return key.named_rows if table is None else table


def verify_predictions(
    path: Path, key: Key, options: VerifyOptions, progress: Progress = lambda *_: None
) -> list[Finding]:
    """Test a suspect by a file of its answers to exported queries. The queries are read from beside the key's file.

    RadiotagError if there are no queries, or if the file answers none of them or is malformed.
    """
    key_path = key.path or Path("k.safetensors")
    query_files = sorted(key_path.parent.glob(f"{glob.escape(key_path.stem)}.queries-*.safetensors"))
    if not query_files:
        raise RadiotagError(
            f"no queries lie beside {key_path}", "make them first: radiotag verify --black-box --export DIR --data DIR"
        )
    failure: RadiotagError | None = None
    published = _published_rows(key, options)
    for query_file in query_files:
        try:
            queries = blackbox.load_queries(query_file, key)
            answers, warnings = read_answers(path, queries)
        except (NotAnswered, blackbox.OfAnotherKey) as error:
            failure = error
            continue
        pairs = set(zip(queries.labels, queries.rows, strict=True))
        if published is not None and not pairs <= published.items():
            differ = f"the questions of {query_file} pair classes and carriers otherwise than {options.public}"
            raise RadiotagError(differ, "export them with the same --public")
        finding = _black_box_finding(
            os.fspath(path), queries, answers, marker_answers(queries, key, options, progress), key, options
        )
        own = _asked_log10_p(queries, asked_about(queries, key, options), key, options, progress)
        told = (*_disguised(own), *warnings, *finding.warnings)
        finding = replace(finding, sha256=file_hash(path), images_log10_p=own, warnings=told)
        return corrected([finding], options.alpha)
    raise failure or RadiotagError(f"{path} answers nothing")


def _asked_sets(classes: int, key: Key, options: VerifyOptions) -> list[int]:
    """The sizes of the sets of first classes that the black-box test takes together."""
    as_one = key.black_box_as_one and options.manifest is not None
    return nested_sizes(classes) if key.nested and not as_one else [classes]


def _black_box_finding(
    name: str, queries: blackbox.Queries, answers: Tensor, baseline: MarkerAnswers, key: Key, options: VerifyOptions
) -> Finding:
    """The finding from (2(K + 1), N, C') answers. Outputs are matched to classes by the answers under all keys."""
    rows = sorted(set(queries.rows), key=key.class_order.index if key.nested else None)
    images = torch.tensor(queries.rows)
    means = torch.stack([answers[:, images == row].flatten(0, 1).nanmean(0) for row in rows]).nan_to_num()
    pairs = [(output, row) for output, row in zip(match_outputs(means), rows, strict=True) if output >= 0]
    if not pairs:
        raise RadiotagError(f"{name} knows none of the classes", "check --image-size, --mean and --std, and the images")
    values = blackbox.pattern_effects(queries, answers, pairs, *baseline)  # (K + 1, C)
    sizes = _asked_sets(values.shape[1], key, options)
    nested = np.array([resampled_log_p(values[:, :size]) for size in sizes])
    log10_p = bonferroni(nested) / LOG10
    smallest = math.log10(len(sizes)) - values.shape[1] * math.log10(len(values))
    warnings = []
    if smallest > math.log10(options.alpha):
        counts = f"{queries.decoys} decoys and {values.shape[1]} of the classes"
        warnings.append(f"p cannot be below {10**smallest:.1e} with {counts}: ask with more --decoys")
    return Finding(
        path=name, sha256="", architecture="unknown", log10_p=log10_p, log10_p_corrected=log10_p, detected=False,
        paper_log10_p=None, mean_cosine=None, pattern_cosine=None, alignment_r2=None, classes_used=values.shape[1],
        sets=len(sizes),
        first_classes=sizes[int(nested.argmin())],
        method="black-box", warnings=tuple(warnings), decoys=queries.decoys, questions=queries.digest,
    )  # fmt: skip


def as_json(finding: Finding) -> dict[str, Any]:
    """The finding as plain values, for `--json`."""
    plain = asdict(finding)
    if finding.method == "white-box":
        del plain["decoys"], plain["questions"]
    else:
        del plain["classes"]
    if finding.calibration is None:
        del plain["calibration"]
    return plain
