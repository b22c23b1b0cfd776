"""The README's two tables: "Will it work for me?" and what the demonstration shows, from the measured results.

    python tests/benchmarks/verdicts.py

The rules, the same for every case. All measured suspects of the case count, each with its key; a key counts as found
at log10 p ≤ −4, the least that `verify` accepts by default.

    yes        every key was found, and there were at least three
    mostly     not every key was found, or there were fewer; but the median log10 p is −4 or lower
    not shown  otherwise, or nothing was measured

Of the white-box tests the one with real images (`--data`) counts. A case is defined by settings alone: no suspect is
left out because of its figure. Suspects that were marked or judged by earlier versions of radiotag do not count.
"""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from tables import DETECTED, ROOT, Makers, Results, Run, lines, log_p, percent, write

DOCUMENT = ROOT / "README.md"
ENOUGH = 3  # keys, for a yes
ARCHITECTURES = {"resnet18": "ResNet-18", "resnet50": "ResNet-50", "vgg11_bn": "VGG-11", "densenet121": "DenseNet-121",
                 "mobilenet_v3_large": "MobileNetV3"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a reader has, the log10 p that were measured of it, and what they are of."""

    title: str
    found: dict[str, list[float]]  # by what was measured
    note: str = ""


def verdict(values: list[float]) -> str:
    """What the rules say of a case's log10 p."""
    if not values or statistics.median(values) > DETECTED:
        return "not shown"
    return "yes" if max(values) <= DETECTED and len(values) >= ENOUGH else "mostly"


def counted(values: list[float]) -> str:
    return f"{sum(value <= DETECTED for value in values)} of {len(values)}"


def whole(results: Results, fraction: float) -> list[Run]:
    """Suspects of all of CIFAR-10, this share of every class marked."""
    return [run for run in results["evidence"]["runs"] if run["fraction"] == fraction and not run["classes"]]


def named(results: Results, prefix: str) -> list[float]:
    """With real images, of the experiments of this name (and other keys)."""
    runs = (run for run in results["paper"]["runs"] if run["experiment"].partition(", ")[0] == prefix)
    return [run["real"]["log10_p"] for run in runs]


def log_ps(runs: Iterable[Run], test: str = "real") -> list[float]:
    return [run[f"suspect, {test}"]["log10_p"] for run in runs]


def of(runs: list[Run], *architectures: str) -> list[Run]:
    return [run for run in runs if run["train"]["architecture"] in architectures]


def confirmed(results: Results, data: str, fraction: float, *architectures: str) -> list[float]:
    """With real images, of the confirmatory runs of this data and share; of some architectures, or all."""
    runs = [run for run in results["confirmed"]["runs"] if (run["data"], run["fraction"]) == (data, fraction)]
    return log_ps(of(runs, *architectures) if architectures else runs)


def other_architectures(results: Results) -> dict[str, list[float]]:
    """A tenth marked: of 10,000 images; where only earlier versions tried, of all 50,000 and of 100 classes, too."""
    found: dict[str, list[float]] = {}
    for arch, name in ARCHITECTURES.items():
        if again := confirmed(results, "cifar10", 0.1, arch):
            found[name] = again
            continue
        hundred = [
            run["real"]["log10_p"] for run in results["paper"]["runs"]
            if run["experiment"] == f"100 classes, architectures/{arch}"
        ]  # fmt: skip
        found[name] = named(results, f"architectures/{arch}") + log_ps(of(whole(results, 0.1), arch)) + hundred
    return found


def cases(results: Results) -> list[Case]:
    """All cases, in the README's order."""
    one_class = [run for run in results["evidence"]["runs"] if run["classes"]]
    tenth, hundredth = (of(whole(results, share), "resnet10") for share in (0.1, 0.01))
    return [
        Case(title="Ten classes of small photos, a tenth of each marked", found={
            "CIFAR-10": log_ps(tenth) + named(results, "scratch/10%"),
            "the same, marked by a network of other images": named(results, "other data/tiny-imagenet-100"),
        }),
        Case(title="One class of ten, a tenth of it marked", found={"CIFAR-10": log_ps(one_class)}),
        Case(title="One image in a hundred of some 50,000, in few classes", found={
            "CIFAR-10": confirmed(results, "cifar10", 0.01),
            "a hundred classes": confirmed(results, "tiny-imagenet-100", 0.01),
        }),
        Case(title="One image in a hundred, in every class", found={
            "CIFAR-10": log_ps(hundredth) + named(results, "scratch/1%"),
            "a hundred classes": [
                run["real"]["log10_p"] for run in results["paper"]["runs"]
                if run["experiment"] == "100 classes, scratch/1%"
            ],
        }),
        Case(title="Another architecture than the marking network's", found=other_architectures(results)),
        Case(title="Photographs of 160 pixels in ten classes, a tenth of each marked", found={
            "Imagenette": confirmed(results, "imagenette-160", 0.1),
        }),
        Case(title="A model behind an API, a tenth marked", found={
            "built-in architecture": log_ps(tenth, "black-box"),
            "others": log_ps(of(whole(results, 0.1), *ARCHITECTURES), "black-box"),
        }),
        Case(title="Generative models, embeddings, detectors", found={}, note="out of scope"),
    ]  # fmt: skip


def will_it_work(results: Results) -> list[str]:
    rows = []
    for case in cases(results):
        measured = "; ".join(f"{name} {counted(values)}" for name, values in case.found.items())
        values = [value for some in case.found.values() for value in some]
        rows.append([case.title, f"**{verdict(values)}**", measured or case.note or "not measured yet"])
    return lines(("Your case", "Verdict", "Keys found, of those tried"), rows)


def demonstration(results: Results) -> list[str]:
    """The two models of `radiotag train-demo`."""
    demo = results["evidence"]["demo"]
    trained = {"clean": "none marked", "radioactive": f"{demo['marked']} of {demo['images']} marked"}
    rows = []
    for name, images in trained.items():
        model = demo[name]
        said = "mark detected" if model["detected"] else "no evidence"
        rows.append([f"{name}.pt", images, percent(model["accuracy"], 1), log_p(model["log10_p"]), said])
    return lines(("model", "images", "accuracy", "log10 p", "verdict"), rows)


TABLES: Makers = {"will it work": will_it_work, "demonstration": demonstration}

if __name__ == "__main__":
    write(DOCUMENT, TABLES)
