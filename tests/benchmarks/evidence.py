"""Evidence against the share marked, on CIFAR-10: white-box with and without real images, and black-box.

    python tests/benchmarks/evidence.py run cifar10.zip --work bench-out --fraction 0.1 --seed 2 --clean
    python tests/benchmarks/evidence.py table --work bench-out --json evidence.json

`cifar10.zip` holds cifar10/{train,test}/CLASS/*.jpg. `run` makes a key of its own, marks the share, trains one suspect
from scratch (its seed is not the marking network's) and verifies it; with --clean it trains, once a seed, the same
network on the unmarked data and tests that with the key, and with 1,000 fresh keys. Every step is a command line of
radiotag, skipped if its result lies in the work folder, so an interrupted run goes on (trainings from their last
epoch). `table` gathers all runs. OMP_NUM_THREADS=1 lets two runs share two cores.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
import torchvision

from radiotag import __version__
from radiotag.manifest import read_manifest

EPOCHS = 6
TESTS = {"bare": "", "real": " --data ../cifar10/test", "black-box": " --data ../cifar10/test --black-box"}


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


def once(a: argparse.Namespace) -> None:
    work = a.work / (f"q{a.fraction:g}-seed{a.seed}" + (f"-epochs{a.epochs}" if a.epochs != EPOCHS else ""))
    work.mkdir(parents=True, exist_ok=True)
    if not (a.work / "cifar10").exists():
        zipfile.ZipFile(a.data).extractall(a.work)
    log, train = work / "log.json", f"--arch {a.arch} --epochs {a.epochs} --seed {a.seed} --resume"
    result = {"fraction": a.fraction, "seed": a.seed, "threads": torch.get_num_threads()}
    result["keygen"] = step(log, "keygen", "keygen -o k.safetensors --classes 10")
    marked = "mark ../cifar10/train -o marked --key k.safetensors --format png"
    result["mark"] = step(log, "mark", f"{marked} --fraction {a.fraction:g}")
    psnr = [row["psnr"] for row in read_manifest(work / "marked.manifest.jsonl")[1].values() if "psnr" in row]
    result["psnr_median"] = statistics.median(psnr)
    result["train"] = step(log, "train", f"train-demo marked -o suspect.pt {train} --val ../cifar10/test")
    suspects = {"suspect": "suspect.pt"}
    if a.clean:
        suspects["clean"] = f"../clean-seed{a.seed}.pt"
        command = f"train-demo cifar10/train -o clean-seed{a.seed}.pt {train} --val cifar10/test"
        result["train clean"] = step(a.work / f"clean-seed{a.seed}.json", "train", command)
    for name, model in suspects.items():
        for test, options in TESTS.items():
            check = " --calibrate 1000" if (name, test) == ("clean", "bare") else ""
            answer = step(log, f"verify {name} {test}", f"verify {model} --key k.safetensors{options}{check}")
            result[f"{name}, {test}"] = {**answer["suspects"][0], "command": answer["command"],
                                         "seconds": answer["seconds"]}  # fmt: skip
    result["versions"] = {"radiotag": __version__, "torch": torch.__version__, "torchvision": torchvision.__version__,
                          "python": platform.python_version()}  # fmt: skip
    result["machine"] = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    (work / "result.json").write_text(json.dumps(result, indent=1, sort_keys=True))
    shutil.rmtree(work / "marked", ignore_errors=True)  # tens of thousands of copies a run


def table(a: argparse.Namespace) -> None:
    runs = [json.loads(path.read_text()) for path in sorted(a.work.glob("q*/result.json"))]
    runs.sort(key=lambda run: (-run["fraction"], run["train"]["epochs"], run["seed"]))
    print(
        f"{'q':>5}{'epochs':>7}{'seed':>5}{'PSNR':>6}{'accuracy':>9}{'bare':>8}{'real':>8}{'black-box':>10}{'paper':>7}{'clean':>20}"
    )
    for run in runs:
        found = [run[f"suspect, {test}"]["log10_p"] for test in TESTS]
        clean = [f"{run[f'clean, {test}']['log10_p']:.2f}" for test in TESTS if f"clean, {test}" in run]
        paper = run["suspect, real"]["paper_log10_p"]
        print(
            f"{run['fraction']:>5.0%}{run['train']['epochs']:>7}{run['seed']:>5}{run['psnr_median']:>6.1f}{run['train']['accuracy']:>9.2%}"
            f"{found[0]:>8.2f}{found[1]:>8.2f}{found[2]:>10.2f}{paper:>7.2f}{' / '.join(clean):>20}"
        )
    if a.json:
        demo = {"demo": json.loads(a.demo.read_text())} if a.demo else {}
        a.json.write_text(json.dumps({"runs": runs, **demo}, indent=1, sort_keys=True) + "\n")


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
    one.add_argument("--clean", action="store_true")
    every = commands.add_parser("table")
    every.set_defaults(call=table)
    every.add_argument("--json", type=Path, default=None)
    every.add_argument("--demo", type=Path, default=None, help="what `radiotag train-demo --json` printed")
    for part in (one, every):
        part.add_argument("--work", type=Path, default=Path("bench-out"))
    a = parser.parse_args()
    a.call(a)


if __name__ == "__main__":
    main()
