"""How many photographs to ask without labels: the same suspect and keys, before version 0.11 and since.

    python tests/benchmarks/photographs.py run bench-out/RUN --name "resnet10, 96 pixels"
    python tests/benchmarks/photographs.py table

RUN is a folder that `evidence.py run` has left: a suspect and keys. The two statistics take turns, in one
process; a key's carriers stay as they are, so the figures show what the statistic alone does. They are development
figures: the number of photographs was chosen in view of them.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from evidence import machine
from tables import BENCHMARKS, FOLDER, Makers, Results, lines, log_p, number, slashed, write

from radiotag.keys import AGAINST_ALL, STATISTIC, Key, load_key
from radiotag.verification import VerifyOptions, verify

DOCUMENT = BENCHMARKS
KINDS = {"before 0.11": AGAINST_ALL, "since 0.11": STATISTIC}
TEST = "no `--data`"


def measured(model: Path, key: Key) -> dict[str, float]:
    """log10 p, mean cosine with the patterns, and seconds of one verification."""
    started = time.perf_counter()
    (found,) = verify([model], key, VerifyOptions())
    seconds = time.perf_counter() - started
    return {"log10_p": found.log10_p, "pattern_cosine": found.pattern_cosine or 0.0, "seconds": round(seconds, 1)}


def run(folder: Path) -> dict[str, Any]:
    """Every key of a run, by both statistics."""
    every: dict[str, Any] = {}
    for path in sorted(folder.glob("k*.safetensors")):
        for kind, statistic in KINDS.items():
            key = load_key(path)
            key = replace(key, metadata=key.metadata | {"statistic": statistic})
            found = measured(folder / "suspect.pt", key)
            every.setdefault(kind, []).append(found)
            print(path.name, kind, found, flush=True)
    return {"tests": {TEST: every}, **machine()}


def table(results: Results) -> list[str]:
    heads = ("suspect", "test", "statistic", "each key", "mean cosine with the patterns", "seconds")
    rows = [
        (
            name, test, kind, slashed(log_p(one["log10_p"]) for one in found),
            number(statistics.mean(one["pattern_cosine"] for one in found), 3),
            number(statistics.median(one["seconds"] for one in found), 0),
        )
        for name, suspect in results["photographs"].items()
        for test, kinds in suspect["tests"].items()
        for kind, found in kinds.items()
    ]  # fmt: skip
    return lines(heads, rows)


TABLES: Makers = {"photographs asked": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("folder", type=Path, nargs="?", help="of a run of evidence.py")
    parser.add_argument("--name", default="a suspect", help="the suspect, for the table")
    parser.add_argument("--json", type=Path, default=FOLDER / "photographs.json")
    a = parser.parse_args()
    if a.command == "run":
        torch.set_num_threads(1)
        done = json.loads(a.json.read_text()) if a.json.exists() else {}
        done[a.name] = run(a.folder)
        a.json.write_text(json.dumps(done, indent=1, sort_keys=True) + "\n")
    if a.json.resolve() == FOLDER / "photographs.json":
        write(DOCUMENT, TABLES)


if __name__ == "__main__":
    main()
