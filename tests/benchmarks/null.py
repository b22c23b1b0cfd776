"""The null, for every test that a key declares: p-values of real suspects under keys that never touched them.

    python tests/benchmarks/null.py run model.pt cifar10.zip --work bench-out --keys 200000
    python tests/benchmarks/null.py table

`model.pt` knows the ten classes of CIFAR-10; what it was trained on does not matter, since the keys are drawn here. A
path (PATHS) is a way in which `verify` pairs classes and carriers, and shows images. Its class vectors are computed
once by the package, and each null key is drawn and tested as `verify --calibrate` does. Paths that are done are kept.
"""

import argparse
import hashlib
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from evidence import machine, unpacked
from scipy import stats
from tables import BENCHMARKS, FOLDER, Makers, Results, lines, number, write

from radiotag import blackbox, verification
from radiotag.keys import Key, new_key, null_carriers
from radiotag.networks import Network, load_network, marking_weights
from radiotag.probes import ArrayImages, FolderImages, References, class_means
from radiotag.radioactive import evidence, output_unknown, resampled_log_p
from radiotag.suspect import Batching, ClassVectors
from radiotag.verification import VerifyOptions

LEVELS = (0.1, 0.01, 1e-3, 1e-4, 1e-5)
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DOCUMENT = BENCHMARKS
Vectors = tuple[ClassVectors, tuple[int, ...]]
PATHS = {  # name: (the key's classes, the images: none, labelled or not, what is special)
    "bare": (NAMES, None, ""),
    "bare, classes counted": (10, None, ""),
    "real images": (NAMES, True, ""),
    "real images without labels": (NAMES, False, ""),
    "three classes of ten": (NAMES[2:5], True, ""),
    "one named class": (NAMES[3:4], True, ""),
    "one class, output unknown": (1, None, ""),
    "no linear last layer": (NAMES, True, "headless"),
    "the marking network itself": (NAMES, True, "marker"),
    "the images' own test": (NAMES, True, "images"),
    "nested classes, bare": (NAMES, None, "nested"),
    "nested classes, real images": (NAMES, True, "nested"),
}


def vectors_of(path: str, model: Path, data: Path) -> tuple[Key, Vectors]:
    """A key of a path's shape, and the class vectors that are compared with its carriers."""
    classes, labelled, special = PATHS[path]
    key = new_key(*marking_weights("builtin"), classes)
    images = None if labelled is None else FolderImages(data / "test")
    if images is not None and not labelled:
        pixels = torch.stack([images.read(i).round().to(torch.uint8) for i in range(0, len(images.labels), 5)])
        images = ArrayImages(pixels, [""] * len(pixels))
    references, options, batching = References(key.network(), images), VerifyOptions(), Batching()
    suspect: Network = key.network() if special == "marker" else load_network(model)
    suspect.head = None if special == "headless" else suspect.head
    reference = references.at(verification.input_size(suspect, references), batching.tell)
    if special == "images":
        return key, (class_means(reference, NAMES, batching), tuple(range(10)))
    recorded = verification.records(key, images, options)
    _, pairing, vectors, _ = verification.examine(suspect, key, reference, recorded, batching)
    return key, (vectors, pairing.rows)


def white_box(path: str, model: Path, data: Path, keys: int) -> dict[str, object]:
    key, (vectors, rows) = vectors_of(path, model, data)
    found, seed = np.empty(keys), hashlib.sha256(path.encode()).digest()
    vectors = ClassVectors(features=vectors.features, pattern=vectors.pattern)
    order = key.class_order if PATHS[path][2] == "nested" else None  # else all classes together, as one set of these
    for number_ in range(keys):
        carriers, patterns = null_carriers(key, hashlib.shake_256(seed + number_.to_bytes(8, "big")).digest)
        found[number_] = evidence(vectors, rows, carriers, patterns, order).log_p
    return counted(np.exp(found), conservative=output_unknown(rows) or order is not None)


def black_box(model: Path, data: Path, keys: int, *, labels: bool) -> dict[str, object]:
    """Which key is the true one is drawn anew: by exchangeability, that is the null."""
    key, options = new_key(*marking_weights("builtin"), NAMES), VerifyOptions()
    queries = verification.choose_queries(key, FolderImages(data / "test"), options)
    answers = blackbox.ask(load_network(model), queries, key, Batching())  # (2(K + 1), N, C')
    if labels:
        answers = torch.nn.functional.one_hot(answers.argmax(2), answers.shape[2]).double()
    values = blackbox.pattern_effects(queries, answers, [(row, row) for row in range(10)])  # (K + 1, C)
    rng, found = np.random.default_rng(0), np.empty(keys)
    for number_ in range(keys):
        true = rng.integers(0, len(values), values.shape[1])
        swapped = values.copy()
        swapped[0], swapped[true, range(len(true))] = values[true, range(len(true))], values[0]
        found[number_] = resampled_log_p(swapped)
    return counted(np.exp(found), conservative=True)


def counted(p: np.ndarray, *, conservative: bool) -> dict[str, object]:
    """How many p-values are at most each level, and how probable so many, and so uneven a distribution, are."""
    tail = [int((p <= level).sum()) for level in LEVELS]
    sf = stats.binom.sf(np.array(tail) - 1, len(p), LEVELS)
    return {
        "keys": len(p), "tail": tail, "tail_p": min(1.0, len(LEVELS) * float(sf.min())), "conservative": conservative,
        "ks_p": float(stats.kstest(p, "uniform", alternative="greater" if conservative else "two-sided").pvalue),
    }  # fmt: skip


def run(a: argparse.Namespace) -> None:
    a.work.mkdir(parents=True, exist_ok=True)
    data = unpacked(a.data, a.work)
    done = json.loads(a.json.read_text()) if a.json.exists() else {}
    few = a.keys // 20
    tests = {path: lambda path=path: white_box(path, a.model, data, a.keys) for path in PATHS} | {
        "black-box": lambda: black_box(a.model, data, few, labels=False),
        "black-box, labels alone": lambda: black_box(a.model, data, few, labels=True),
    }
    for name, test in tests.items():
        if name in done:
            continue
        torch.manual_seed(0)
        started = time.monotonic()
        done[name] = test() | {"seconds": time.monotonic() - started, **machine()}
        a.json.write_text(json.dumps(done, indent=1, sort_keys=True) + "\n")
        print(name, done[name]["tail"], flush=True)


# ---------------------------------------------------------------- the table


def null_paths(results: Results) -> list[str]:
    found = results["null"]
    rows = []
    for name, one in found.items():
        counts = (number(count, 0) for count in one["tail"])
        rows.append([name, number(one["keys"], 0), *counts, number(one["tail_p"]), number(one["ks_p"])])
    uniform = [one for one in found.values() if not one["conservative"]]
    keys, total = sum(one["keys"] for one in uniform), np.sum([one["tail"] for one in uniform], axis=0)
    above = min(1.0, len(LEVELS) * float(stats.binom.sf(total - 1, keys, LEVELS).min()))
    rows.append(["all that must be uniform", number(keys, 0), *(number(n, 0) for n in total), number(above), ""])
    rows.append(["expected of these", "", *(number(keys * level, math.ceil(level < 1e-4)) for level in LEVELS), "", ""])
    return lines(("test", "keys", "0.1", "0.01", "0.001", "0.0001", "0.00001", "as many or more", "as uneven"), rows)


TABLES: Makers = {"null of every path": null_paths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    some = commands.add_parser("run")
    some.set_defaults(call=run)
    some.add_argument("model", type=Path, help="a classifier of CIFAR-10")
    some.add_argument("data", type=Path, help="cifar10.zip")
    some.add_argument("--work", type=Path, default=Path("bench-out"))
    some.add_argument("--keys", type=int, default=200_000)
    some.add_argument("--json", type=Path, default=FOLDER / "null.json")
    some = commands.add_parser("table")
    some.set_defaults(call=lambda _: write(DOCUMENT, TABLES))
    a = parser.parse_args()
    a.call(a)


if __name__ == "__main__":
    main()
