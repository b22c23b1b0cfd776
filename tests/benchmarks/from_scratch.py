"""From-scratch detection on CIFAR-10: mark a share, train a clean and a radioactive suspect, verify both.

The null is checked with fresh keys on the clean suspect.

    python tests/benchmarks/from_scratch.py cifar10.zip --work bench-out --fraction 0.1 --epochs 6 --seed 2

`cifar10.zip` holds cifar10/{train,test}/CLASS/*.jpg. Every step is a command line of radiotag, skipped if its result
lies in the work folder, so an interrupted run goes on (trainings from their last epoch). Prints a table and writes
JSON. On two cores, set OMP_NUM_THREADS=1 to train both suspects side by side (--side-by-side).
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torchvision
from scipy import stats

from radiotag import __version__, radioactive, verification
from radiotag.marking import read_manifest

NULL_KEYS = 1000


class Run:
    """Command lines and what they took, kept in one JSON file of the work folder."""

    def __init__(self, work: Path) -> None:
        self.work, self.log = work, work / "log.json"
        self.done = json.loads(self.log.read_text()) if self.log.exists() else {}

    def start(self, name: str, command: str) -> subprocess.Popen[str] | None:
        if name in self.done:
            return None
        print(f"+ radiotag {command}", flush=True)
        arguments = [sys.executable, "-m", "radiotag", *shlex.split(command), "--json"]
        return subprocess.Popen(arguments, cwd=self.work, stdout=subprocess.PIPE, text=True)

    def finish(self, name: str, command: str, process: subprocess.Popen[str] | None) -> dict:
        if process is not None:
            out, _ = process.communicate()
            result = json.loads(out)
            if "error" in result:
                raise SystemExit(f"{name}: {result['error']}")
            self.done[name] = result
            self.log.write_text(json.dumps(self.done, indent=1, sort_keys=True))
        return {**self.done[name], "command": f"radiotag {command}"}

    def __call__(self, name: str, command: str) -> dict:
        return self.finish(name, command, self.start(name, command))


def null_check(work: Path, key_path: Path, suspect: Path, count: int = NULL_KEYS) -> dict:
    """p-values of a clean suspect under fresh keys: only the carriers change, so the vectors are computed once."""
    key = radioactive.load_key(key_path)
    _, rows = verification.examine(suspect, key, key.network(), verification.Options(), None, None)
    generator = np.random.default_rng(0)
    classes, dimension = len(key.carriers), key.carriers.shape[1]
    p, paper = [], []
    for _ in range(count):
        found = radioactive.evidence(rows, radioactive.uniform_carriers(classes, dimension, generator.bytes))
        p.append(float(np.exp(found.log_p)))
        paper.append(float(np.exp(found.paper_log_p or 0.0)))
    return {
        "keys": count, "ks_p": float(stats.kstest(p, "uniform").pvalue),
        "ks_p_paper": float(stats.kstest(paper, "uniform").pvalue), "smallest": min(p),
        "below_0.01": sum(v < 0.01 for v in p),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("bench-out"))
    parser.add_argument("--fraction", type=float, default=0.1)
    parser.add_argument("--format", default="png")
    parser.add_argument("--arch", default="resnet10")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--side-by-side", action="store_true")
    parser.add_argument("--json", type=Path, default=None)
    a = parser.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    if not (a.work / "cifar10").exists():
        zipfile.ZipFile(a.data).extractall(a.work)
    run, started = Run(a.work), time.time()
    key = run("keygen", "keygen -o k.safetensors --classes 10")
    mark = run(
        "mark",
        f"mark cifar10/train -o marked --key k.safetensors --fraction {a.fraction} --format {a.format} "
        "--preview preview.png",
    )
    train = f"--arch {a.arch} --epochs {a.epochs} --seed {a.seed} --val cifar10/test --resume"
    commands = {"clean": f"train-demo cifar10/train -o clean.pt {train}",
                "radioactive": f"train-demo marked -o radioactive.pt {train}"}  # fmt: skip
    running = {}
    for name, command in commands.items():
        running[name] = run.start(name, command)
        if not a.side_by_side:
            run.finish(name, command, running[name])
            running[name] = None
    models = {name: run.finish(name, command, running[name]) for name, command in commands.items()}
    findings = {}
    for name in commands:
        for alignment, option in (("synthetic", ""), ("real", " --data cifar10/test")):
            command = f"verify {name}.pt --key k.safetensors{option}"
            answer = run(f"verify {name} {alignment}", command)
            seconds = {"command": answer["command"], "seconds": answer["seconds"]}
            findings[f"{name}, {alignment}"] = {**answer["suspects"][0], **seconds}
    null = null_check(a.work, a.work / "k.safetensors", a.work / "clean.pt")
    psnr = [row["psnr"] for row in read_manifest(a.work / "marked.manifest.jsonl")[1].values() if "psnr" in row]
    print(f"\nq {a.fraction:.0%}, {mark['marked']} images marked, PSNR median {statistics.median(psnr):.1f} dB")
    print(f"{'suspect, alignment':<26}{'accuracy':>9}{'log10 p':>9}{'paper':>9}{'cosine':>9}{'R2':>6}")
    for name, found in findings.items():
        accuracy = models[name.split(",")[0]]["accuracy"]
        print(
            f"{name:<26}{accuracy:>9.2%}{found['log10_p']:>9.2f}{found['paper_log10_p']:>9.2f}"
            f"{found['mean_cosine']:>9.4f}{found['alignment_r2']:>6.2f}"
        )
    print(f"null: {null['keys']} fresh keys on the clean suspect, Kolmogorov-Smirnov p {null['ks_p']:.2f}")
    result = {
        "arguments": {k: str(v) for k, v in vars(a).items() if k not in {"data", "work", "json"}},
        "steps": {"keygen": key, "mark": mark, **models, **findings}, "null": null,
        "psnr_5th_percentile": float(np.percentile(psnr, 5)),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                    "threads": torch.get_num_threads()},
        "versions": {"radiotag": __version__, "torch": torch.__version__, "torchvision": torchvision.__version__,
                     "numpy": np.__version__, "python": platform.python_version()},
        "seconds_this_run": round(time.time() - started, 1),
    }  # fmt: skip
    (a.json or a.work / "from_scratch.json").write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
