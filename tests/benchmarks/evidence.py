"""Evidence against the share marked, on any data set: white-box with and without real images, and black-box.

    python tests/benchmarks/evidence.py run cifar10.zip --work bench-out --fraction 0.1 --seed 2 --clean
    python tests/benchmarks/evidence.py table --work bench-out

`cifar10.zip` holds cifar10/{train,test}/CLASS/*.jpg; `val` may stand for `test`. With --images N, as many images
of each class are taken, N in all. --size, --crops and --stem are those of the suspects' training. `run` makes a key of
its own, marks the share, trains one suspect from scratch (its seed is not the marking network's) and verifies it; with
--keys N, N owners mark a share of all images each, each of what those before left unmarked, and the one suspect is
tested for each of them; with --classes K, the share is of K classes alone, the next K for each owner; with --clean it
trains the same network on the unmarked data and tests that with the key, and with 1,000 fresh keys; with --student it
trains another network on the unmarked data and the suspect's outputs.
Every step is a command line of radiotag, skipped if its result lies in the work folder, so an interrupted run goes on
(trainings from their last epoch). `table` gathers all runs in results/evidence.json, the confirmatory ones with `--json
results/confirmed.json`; it keeps those of other work folders that the file holds, writes this program's tables into the
README beside it, and what `mark` expects into the package. With an empty work folder it does the last alone.
OMP_NUM_THREADS=1 lets two runs share two cores.
"""

import argparse
import fcntl
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from tables import (
    BENCHMARKS,
    DETECTED,
    FOLDER,
    ROOT,
    Makers,
    Results,
    Run,
    lines,
    load_results,
    log_p,
    median,
    number,
    percent,
    slashed,
    write,
)

from radiotag import __version__
from radiotag.manifest import read_manifest
from radiotag.networks import mixed_precision
from radiotag.ranking import ENOUGH

DOCUMENT = BENCHMARKS
DATA = {"cifar10": ("CIFAR-10", 32), "tiny-imagenet-100": ("Tiny ImageNet", 64), "imagenette-160": ("Imagenette", 160)}
ENOUGH_KEYS = 3  # before anything is promised
PACKAGE = ROOT / "radiotag" / "measured.json"
EPOCHS = 6
TESTS = {
    "bare": "",
    "real": " --data {held}",
    "black-box": " --data {held} --black-box",
    "originals": " --data {train} --marked {manifest} --black-box",  # of what was published
}
COMMANDS = {**TESTS, "real originals": " --data {train} --marked {manifest}"}  # what there is since version 0.8, too


def step(log: Path, name: str, command: str) -> dict:
    """Run one command line of radiotag in the log's folder, unless the log has its result."""
    done = json.loads(log.read_text()) if log.exists() else {}
    if name not in done:
        print(f"+ radiotag {command}", flush=True)
        arguments = [sys.executable, "-m", "radiotag", *shlex.split(command), "--json"]
        out = subprocess.run(arguments, cwd=log.parent, stdout=subprocess.PIPE, text=True, check=False).stdout
        done[name] = {**json.loads(out), "command": f"radiotag {command}"}
        if "error" in done[name]:
            raise SystemExit(f"{name}: {done[name]['error']}")
        log.write_text(json.dumps(done, indent=1, sort_keys=True))
    return done[name]


def unpacked(archive: Path, work: Path) -> Path:
    """The folder that a data set's archive holds, under its own name, in the work folder."""
    if not (work / archive.stem).exists():
        zipfile.ZipFile(archive).extractall(work)
    return work / archive.stem


def shared(work: Path, name: str, make: Callable[[Path], object]) -> str:
    """Make a file or folder of the work folder once, by the first of several runs; returns its name."""
    (work / name).parent.mkdir(parents=True, exist_ok=True)
    with (work / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (work / f"{name}.done").exists():
            make(work / name)
            (work / f"{name}.done").touch()
    return name


def subset(work: Path, data: str, images: int, skip: int = 0) -> str:
    """Some of the training images, as many of each class, or all of them; relative to the work folder."""
    if not images:
        return f"{data}/train"

    def copy(target: Path) -> None:
        classes = sorted((work / data / "train").iterdir())
        for folder in classes:
            each = images // len(classes)
            (target / folder.name).mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.iterdir())[skip // len(classes) :][:each]:
                shutil.copyfile(path, target / folder.name / path.name)

    return shared(work, f"sets/{data}-n{images}" + (f"-from{skip}" if skip else ""), copy)


def once(a: argparse.Namespace) -> None:
    work = a.work / name_of(a)
    work.mkdir(parents=True, exist_ok=True)
    folder = unpacked(a.data, a.work)
    held = "test" if (folder / "test").is_dir() else "val"
    files = {"train": f"../{subset(a.work, folder.name, a.images)}", "held": f"../{folder.name}/{held}"}
    log = work / "log.json"

    def train(source: str, output: str, seed: int, more: str = "") -> str:
        recipe = f"--arch {a.arch} --epochs {a.epochs} --seed {seed} {shape(a)}--resume --val {files['held']}"
        return f"train-demo {source} -o {output} {recipe}{more}"

    owners = [""] if a.keys == 1 else [str(number) for number in range(1, a.keys + 1)]
    results = {owner: owned(a, work, log, files["train"], place, owner) for place, owner in enumerate(owners)}
    alone = len(owners) == 1 and not a.classes
    source = "marked" if alone else together(work, files["train"], owners)
    trained = {"train": step(log, "train", train(source, "suspect.pt", a.seed))}
    if a.clean:
        trained["train clean"] = step(log, "train clean", train(files["train"], "clean.pt", a.seed))
    if a.student:
        command = train(files["train"], "student.pt", a.seed + 100, " --teacher suspect.pt")
        trained["train student"] = step(log, "train student", command)
    suspects = {"suspect": "suspect.pt"}
    suspects |= {"clean": "clean.pt"} if a.clean else {}
    suspects |= {"student": "student.pt"} if a.student else {}
    for owner, result in results.items():
        whole = result | trained | verified(a, suspects, log, owner, files) | machine()
        (work / f"result{owner}.json").write_text(json.dumps(whole, indent=1, sort_keys=True))
    for path in [*work.glob("marked*/"), *work.glob("part*/"), *work.glob("whole/")]:
        shutil.rmtree(path)  # tens of thousands of copies a run


def name_of(a: argparse.Namespace) -> str:
    """The name of a run's folder, of all that tells it from others."""
    parts = [f"q{a.fraction:g}-seed{a.seed}", *shape(a).replace("--", "").split()]
    parts += [a.data.stem] if a.data.stem != "cifar10" else []
    parts += [a.arch] if a.arch != "resnet10" else []
    parts += [f"epochs{a.epochs}"] if a.epochs != EPOCHS else []
    parts += [a.format] if a.format != "png" else []
    counts = {"images": a.images, "keys": a.keys - 1 and a.keys, "classes": a.classes}
    return "-".join([*parts, *(f"{name}{count}" for name, count in counts.items() if count)])


def shape(a: argparse.Namespace) -> str:
    """The options of a training that say how it sees its images."""
    options = {"image-size": a.size, "crops": a.crops, "stem": a.stem}
    return "".join(f"--{name} {value} " for name, value in options.items() if value)


def owned(a: argparse.Namespace, work: Path, log: Path, source: str, place: int, owner: str) -> dict:
    """About an owner's marks: in images that no owner before him marked, or in classes that are all he has."""
    every = sorted(path.name for path in (a.work / a.data.stem / "train").iterdir())
    mine = every[place * a.classes : (place + 1) * a.classes]
    before = [str(number) for number in range(1, place + 1)]
    images = part(work, source, mine or every, before, f"part{owner}") if mine or before else source
    share = a.fraction if mine else a.fraction / (1 - place * a.fraction)  # of what is left
    made = step(log, f"keygen{owner}", f"keygen -o k{owner}.safetensors --data {images} --network builtin")
    command = f"mark {images} -o marked{owner} --key k{owner}.safetensors --format {a.format} --fraction {share:g}"
    mark = step(log, f"mark{owner}", command)
    psnr = [r["psnr"] for r in read_manifest(work / f"marked{owner}.manifest.jsonl")[1].values() if "psnr" in r]
    return {
        "fraction": a.fraction, "seed": a.seed, "classes": mine, "owner": owner, "data": a.data.stem,
        "keygen": made, "mark": mark, "psnr_median": statistics.median(psnr),
        "images": sum(path.is_file() for path in (work / source).rglob("*")),  # of all owners
    }  # fmt: skip


def marks(work: Path, owner: str) -> dict[str, str]:
    """Path → name in the output of the images that an owner marked."""
    rows = read_manifest(work / f"marked{owner}.manifest.jsonl")[1].values()
    return {row["path"]: row["output"] for row in rows if row["status"] == "marked"}


def part(work: Path, source: str, classes: list[str], before: list[str], name: str) -> str:
    """A copy of some classes' images, without those that owners before marked."""
    if not (work / name).exists() and not (work / f"marked{name.removeprefix('part')}.pub").exists():
        for each in classes:
            shutil.copytree(work / source / each, work / name / each)
        for path in (path for owner in before for path in marks(work, owner)):
            (work / name / path).unlink(missing_ok=True)
    return name


def together(work: Path, source: str, owners: list[str]) -> str:
    """All images, those marked in place of their originals."""
    whole = work / "whole"
    if not whole.exists() and (work / f"marked{owners[0]}").exists():  # not if the images were removed
        shutil.copytree(work / source, work / "whole.part", dirs_exist_ok=True)
        for owner in owners:
            for path, output in marks(work, owner).items():
                (work / "whole.part" / path).unlink()
                shutil.copyfile(work / f"marked{owner}" / output, work / "whole.part" / output)
        (work / "whole.part").rename(whole)
    return "whole"


def machine() -> dict:
    versions = {"radiotag": __version__, "torch": torch.__version__, "torchvision": torchvision.__version__}
    cores = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
             "threads": torch.get_num_threads()}  # fmt: skip
    with mixed_precision("cpu"):
        cores["bfloat16"] = torch.is_autocast_enabled("cpu")
    return {"versions": {**versions, "python": platform.python_version()}, "machine": cores}


def verdict(answer: dict) -> dict:
    """What `verify` said of its only suspect, with the command, the statistic and the time."""
    return {**answer["suspects"][0], **{name: answer[name] for name in ("command", "statistic", "seconds")}}


def verified(a: argparse.Namespace, suspects: dict[str, str], log: Path, owner: str, files: dict[str, str]) -> dict:
    """Tests of every suspect under this owner's key."""
    found = {}
    for name, model in suspects.items():
        for test in a.tests:
            check = " --calibrate 1000" if (name, test) == ("clean", "bare") and owner in {"", "1"} else ""
            command = f"verify {model} --key k{owner}.safetensors{COMMANDS[test]}{check}"
            command = command.format(manifest=f"marked{owner}.manifest.jsonl", **files)
            found[f"{name}, {test}"] = verdict(step(log, f"verify{owner} {name} {test}", command))
    return found


def place(run: dict) -> tuple:
    """What tells one run from another, in the order of the table."""
    arch, names = run["train"]["architecture"], (bool(run.get("classes")), -run["fraction"], run["train"]["epochs"])
    which = run.get("data", "cifar10"), whole_of(run), crops_of(run), tuple(run.get("classes") or ())
    return (arch != "resnet10", arch, *names, run["seed"], run.get("owner", ""), *which)


def whole_of(run: dict) -> int:
    """How many images the suspect was trained on; an owner after the first marks what those before left."""
    return int(run.get("images", run["mark"]["images"]))


def crops_of(run: dict) -> str:
    """The least share of a random resized crop; empty if the suspect was trained on small shifts."""
    words = run["train"]["command"].split()
    return words[words.index("--crops") + 1] if "--crops" in words else ""


def table(a: argparse.Namespace) -> None:
    """Gather the work folder's runs in the results, and write the tables."""
    runs = [json.loads(path.read_text()) for path in a.work.glob("q*/result*.json")]
    before = json.loads(a.json.read_text()) if a.json.exists() else {"runs": []}
    made = set(map(place, runs))
    runs += [run for run in before["runs"] if place(run) not in made]  # of other work folders
    runs.sort(key=place)
    demo = {"demo": json.loads(a.demo.read_text()) | machine()} if a.demo else {}
    a.json.write_text(json.dumps({**before, "runs": runs, **demo}, indent=1, sort_keys=True) + "\n")
    if a.json.resolve() in {FOLDER / "evidence.json", FOLDER / "confirmed.json"}:
        write(DOCUMENT, TABLES)
        PACKAGE.write_text(as_package_data(load_results()), encoding="utf-8")


# ---------------------------------------------------------------- the tables

HEADS = ("no `--data`", "`--data`", "black-box, held-out", "black-box, originals")  # of TESTS


def left(run: Run, suspect: str) -> list[str]:
    """log10 p of a suspect by each test; empty where it was not made."""
    return [log_p(run[f"{suspect}, {test}"]["log10_p"]) if f"{suspect}, {test}" in run else "" for test in TESTS]


def all_of_cifar10(results: Results) -> list[str]:
    """Every run."""
    rows = []
    for run in results["evidence"]["runs"]:
        share = percent(run["fraction"], 0) + "".join(f" of {name}" for name in run["classes"])
        clean = left(run, "clean")
        rows.append([
            run["train"]["architecture"], share, str(run["train"]["epochs"]),
            f"{run['seed']}" + (f", key {run['owner']}" if run["owner"] else ""), percent(run["train"]["accuracy"]),
            *left(run, "suspect"), log_p(run["suspect, real"]["paper_log10_p"]), slashed(clean) if all(clean) else "",
        ])  # fmt: skip
    heads = ("suspect", "q", "epochs", "seed", "accuracy", *HEADS, "the paper's statistic", "clean: the four tests")
    return lines(heads, rows)


def whole_tenth(results: Results) -> Run:
    """The run of a tenth of every class, with a clean model and a student beside the suspect."""
    (run,) = (run for run in results["evidence"]["runs"] if "train student" in run)
    return dict(run)


def distillation(results: Results) -> list[str]:
    run = whole_tenth(results)
    names = {"suspect": "train", "student": "train student", "clean": "train clean"}
    rows = ([name, percent(run[trained]["accuracy"]), *left(run, name)] for name, trained in names.items())
    return lines(("model", "accuracy", *HEADS), rows)


def few_images(results: Results) -> list[str]:
    """500 marked images: of one class, or of all."""
    rows = []
    for title, one_class in (("10 % of one class of ten", True), ("1 % of every class", False)):
        runs = [
            run for run in results["evidence"]["runs"]
            if run["mark"]["marked"] == 500 and bool(run["classes"]) is one_class
        ]  # fmt: skip
        cells = [title, str(len(runs))]
        for test in TESTS:
            name = f"suspect, {test}"
            measured = [run for run in runs if name in run]
            found = sum(run[name]["log10_p"] <= DETECTED for run in measured)
            cells.append(f"{log_p(median(measured, name, 'log10_p'))} ({found})" if measured else "")
        rows.append(cells)
    return lines(("marked", "keys", *HEADS), rows)


def seconds(results: Results) -> list[str]:
    run = whole_tenth(results)
    steps = {
        f"marking {run['mark']['marked']:,} images": run["mark"], "training a suspect": run["train"],
        **{f"verifying, {title}": run[f"suspect, {test}"] for test, title in zip(TESTS, HEADS, strict=True)},
    }  # fmt: skip
    return lines(("step", "seconds"), ([name, number(step["seconds"], 0)] for name, step in steps.items()))


def groups(results: Results) -> list[list[Run]]:
    """The confirmatory runs, those of the same images, share, suspects and version together, by keys."""
    found: dict[tuple, list[Run]] = {}
    for run in sorted(results["confirmed"]["runs"], key=place):
        training = run["train"]["architecture"], run["train"]["epochs"], crops_of(run)
        group = run["data"], whole_of(run), run["fraction"], *training, "images" in run, version_of(run)
        found.setdefault(group, []).append(run)
    return list(found.values())


def confirmed(results: Results) -> list[str]:
    """Medians over the keys of each group."""
    rows = []
    for runs in groups(results):
        run = runs[0]
        figures = [
            log_p(median(runs, f"suspect, {test}", "log10_p"))
            if all(f"suspect, {test}" in one for one in runs) else "" for test in TESTS
        ]  # fmt: skip
        rows.append([
            DATA[run["data"]][0], f"{run['mark']['marked']:,} of {whole_of(run):,}",
            run["train"]["architecture"], str(run["train"]["epochs"]), percent(median(runs, "train", "accuracy"), 1),
            owners_of(run, len(runs)), version_of(run), *figures[:3],
            log_p(median(runs, "suspect, real originals", "log10_p"))
            if all("suspect, real originals" in one for one in runs) else "",
            slashed(log_p(one["suspect, real"]["log10_p"]) for one in runs),
            slashed(
                log_p(one["suspect, real originals"]["log10_p"]) for one in runs if "suspect, real originals" in one
            ),
            number(median(runs, "suspect, real", "paper_log10_p")),
        ])  # fmt: skip
    heads = (
        "images",
        "marked",
        "suspect",
        "epochs",
        "accuracy",
        "owners",
        "version",
        *HEADS[:3],
        "`--data` originals `--marked`",
        "`--data`, each key",
        "originals, each key",
        "the paper's statistic",
    )
    return lines(heads, rows)


def version_of(run: Run) -> str:
    """The version of radiotag that made the key, and so declared the statistic."""
    return str(run["keygen"]["version"]).removesuffix(".0")


def owners_of(run: Run, count: int) -> str:
    """How many owners marked the suspect's images, and whether some marked those that others had marked."""
    if count == 1:
        return "1"
    return f"{count}, apart" if "images" in run else f"{count}, in turn"


def expectations(results: Results) -> list[dict]:
    """The rows of `measured.json`, by which `mark` tells what to expect: three keys at least."""
    rows = []
    for runs in groups(results):
        run, (name, size) = runs[0], DATA[runs[0]["data"]]
        if len(runs) >= ENOUGH_KEYS:
            rows.append({
                "data": name, "size": size, "classes": len(run["mark"]["classes"]), "images": whole_of(run),
                "marked": run["mark"]["marked"], "share": max(run["fraction"], ENOUGH),
                "suspect": run["train"]["architecture"], "keys": len(runs),
                "log10_p": round(median(runs, "suspect, real", "log10_p"), 2),
            })  # fmt: skip
    return rows


def as_package_data(results: Results) -> str:
    return json.dumps(expectations(results), indent=1) + "\n"


TABLES: Makers = {
    "confirmed": confirmed, "all of CIFAR-10": all_of_cifar10, "seconds": seconds, "distillation": distillation,
    "few images": few_images,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run")
    one.set_defaults(call=once)
    one.add_argument("data", type=Path)
    one.add_argument("--fraction", type=float, default=0.1)
    one.add_argument("--seed", type=int, default=2)
    one.add_argument("--arch", default="resnet10")
    one.add_argument("--epochs", type=int, default=EPOCHS)
    one.add_argument("--keys", type=int, default=1, help="owners, each of whom marks a share of the same images")
    one.add_argument("--classes", type=int, default=0, help="an owner's, each of its own; 0: all of all owners")
    one.add_argument("--images", type=int, default=0, help="as many of each class, these in all; 0: all images")
    one.add_argument("--size", type=int, default=0, help="pixels of the suspect's input; 0: the images' own")
    one.add_argument("--crops", type=float, default=0.0, help="least share of the area; else small shifts")
    one.add_argument("--stem", default="", help="small or stock; else as the size asks")
    one.add_argument("--format", default="png", help="of the marked files")
    one.add_argument("--tests", nargs="+", choices=list(COMMANDS), default=list(TESTS))
    one.add_argument("--clean", action="store_true")
    one.add_argument("--student", action="store_true", help="teach another network by the suspect, on unmarked images")
    every = commands.add_parser("table")
    every.set_defaults(call=table)
    every.add_argument("--json", type=Path, default=FOLDER / "evidence.json", help="of others, no table is written")
    every.add_argument("--demo", type=Path, default=None, help="what `radiotag train-demo --json` printed")
    for part in (one, every):
        part.add_argument("--work", type=Path, default=Path("bench-out"))
    a = parser.parse_args()
    a.call(a)


if __name__ == "__main__":
    main()
