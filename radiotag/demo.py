"""A demonstration of the method in minutes: key, marked images, a clean and a radioactive model, both verified."""

import math
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radiotag import marking_run, networks, synthetic, training, verification
from radiotag.api import keygen
from radiotag.errors import RadiotagError
from radiotag.plan import MarkOptions, make_plan
from radiotag.probes import FolderImages

CLASSES = synthetic.CLASS_NAMES
MADE = {
    *("images", "held-out", "images-marked", "images-marked.manifest.jsonl", "preview.png"),
    *("k.safetensors", "k.pub", "clean.pt", "radioactive.pt"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The size of a demonstration; the default takes some minutes on two cores."""

    images: int = 1500
    held_out: int = 1000
    pixels: int = 32
    fraction: float = 0.5  # if all of so few images were marked, networks would learn the marks and not the pictures
    steps: int = 12
    epochs: int = 3  # of fine-tuning; from scratch, so few images teach a network neither the classes nor the mark
    batch_size: int = 32
    lr: float = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The files of a demonstration and its results."""

    folder: Path
    key: Path
    fingerprint: str
    marked: int
    images: int
    psnr: float  # dB, median
    accuracy: tuple[float, float]  # clean, radioactive
    findings: tuple[verification.Finding, verification.Finding]


def run(
    folder: Path, *, device: str = "cpu", seed: int = 0, size: Size | None = None, note: Callable[[str], None]
) -> Result:
    """Run a new demonstration in `folder`. RadiotagError if it holds files of anything else."""
    size = size or Size()
    _clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    note(f"1/5 drawing {size.images} images of {len(CLASSES)} classes")
    _draw(folder / "images", size.images, size.pixels, seed=2 * seed)
    _draw(folder / "held-out", size.held_out, size.pixels, seed=2 * seed + 1)
    note("2/5 making a key, marking the images")
    key = keygen(folder / "k.safetensors", classes=CLASSES)
    mark_options = MarkOptions(steps=size.steps, fraction=size.fraction, device=device)
    plan = make_plan(folder / "images", folder / "images-marked", key, mark_options)
    summary = marking_run.run(plan)
    marking_run.preview(plan, summary, folder / "preview.png")
    paths, accuracy = [], []
    held_out = training.load_folder(folder / "held-out", size.pixels)
    for number, (name, images) in enumerate((("clean", "images"), ("radioactive", "images-marked")), 3):
        note(f"{number}/5 fine-tuning the built-in network: a {name} model")
        paths.append(folder / f"{name}.pt")
        accuracy.append(_train(folder / images, held_out, paths[-1], size, seed, device))
    note("5/5 verifying both")
    options = verification.VerifyOptions(device=device)
    findings = verification.verify(paths, key, options, FolderImages(folder / "held-out"))
    return Result(
        folder=folder, key=folder / "k.safetensors", fingerprint=key.fingerprint, marked=summary.marked,
        images=size.images, psnr=summary.statistics()["psnr_median"] or math.nan,
        accuracy=(accuracy[0], accuracy[1]), findings=(findings[0], findings[1]),
    )  # fmt: skip


def _clear(folder: Path) -> None:
    """Remove an earlier demonstration. RadiotagError if the folder holds other files, which may be the user's.

    A demonstration makes its images first, so a key without images comes from somewhere else.
    """
    if (folder / "k.safetensors").exists() and not (folder / "images").is_dir():
        raise RadiotagError(f"{folder} holds k.safetensors, which no demonstration made", "choose another -o")
    for parent, expected in ((folder, MADE), (folder / "images", set(CLASSES))):
        other = sorted({path.name for path in parent.iterdir()} - expected) if parent.is_dir() else []
        if other:
            raise RadiotagError(f"{parent} holds {other[0]}, which no demonstration made", "choose another -o")
    shutil.rmtree(folder, ignore_errors=True)


def _draw(target: Path, count: int, pixels: int, *, seed: int) -> None:
    images, labels = synthetic.demo_images(count, pixels, seed=seed)
    synthetic.write_folder(target, images, labels, CLASSES)


def _train(folder: Path, held_out: training.Dataset, output: Path, size: Size, seed: int, device: str) -> float:
    data = training.load_folder(folder, size.pixels)
    network = training.initialised_from(networks.BUILTIN, data, seed=seed + 1)
    recipe = training.Recipe(epochs=size.epochs, batch_size=size.batch_size, lr=size.lr, seed=seed + 1)
    course = training.Course(validation=held_out, output=output, device=device)
    return training.train(network, data, recipe, course) or 0.0


def lines(result: Result) -> list[str]:
    """The lines that the demonstration prints at its end: a table, and the next command."""
    table = [f"{'model':<16}{'trained on':<38}{'accuracy':>9}{'log10 p':>10}  verdict"]
    marked = f"images, {result.marked} of {result.images} marked ({result.psnr:.1f} dB)"
    rows = zip(
        ("clean.pt", "radioactive.pt"), ("images, none marked", marked), result.accuracy, result.findings, strict=True
    )
    for name, data, accuracy, finding in rows:
        verdict = "mark detected" if finding.detected else "no evidence"
        table.append(f"{name:<16}{data:<38}{accuracy:>9.1%}{finding.log10_p:>10.2f}  {verdict}")
    model, held_out = (str(result.folder / name) for name in ("radioactive.pt", "held-out"))
    return [
        *table,
        f"everything is in {result.folder}/ (preview.png shows original | marked | difference)",
        f"key sha256:{result.fingerprint}",
        "next: " + shlex.join(["radiotag", "verify", model, "--key", str(result.key), "--data", held_out]),
    ]


def as_json(result: Result) -> dict[str, Any]:
    """The result as plain values, for `--json`."""
    models = {
        name: {"model": finding.path, "accuracy": accuracy, **verification.as_json(finding)}
        for name, accuracy, finding in zip(("clean", "radioactive"), result.accuracy, result.findings, strict=True)
    }
    totals = {"images": result.images, "marked": result.marked, "psnr_median": result.psnr}
    return {**models, **totals, "key": str(result.key), "fingerprint": result.fingerprint}
