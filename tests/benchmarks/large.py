"""What a large photograph takes to mark, by one or more checkouts, side by side: processor time, memory, PSNR.

    python tests/benchmarks/large.py run before=CHECKOUT after=. --work bench-out
    python tests/benchmarks/large.py table

The photographs are drawn here: smooth areas, edges, textures and the noise of a sensor. Each is marked by a process of
its own on one thread; loading the libraries counts.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from evidence import machine
from PIL import Image
from tables import BENCHMARKS, FOLDER, Makers, Results, lines, number, write

from radiotag.synthetic import dead_leaves

DOCUMENT = BENCHMARKS
SIZES = {"24 megapixels": (4000, 6000)}


def draw(path: Path, height: int, width: int) -> None:
    """A photograph: objects large and small, with noise."""
    leaves = dead_leaves(2, 512, seed=3).float()  # (2, 3, 512, 512)
    large = F.interpolate(leaves[:1], (height, width), mode="bicubic")[0]
    small = leaves[1].repeat(1, -(-height // 512), -(-width // 512))[:, :height, :width]
    noise = torch.from_numpy(np.random.default_rng(0).normal(0, 3, (1, height, width)).astype(np.float32))
    pixels = (0.6 * large + 0.4 * small + noise).clamp_(0, 255).to(torch.uint8)
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(path, quality=92)


def used(checkout: Path, *arguments: str) -> dict[str, Any]:
    """Processor seconds, seconds and peak memory (MiB) of one command line of a checkout, and what it says."""
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}
    started, command = time.monotonic(), [sys.executable, "-m", "radiotag", *arguments]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    said = process.stdout.read()
    _, _, usage = os.wait4(process.pid, 0)
    process.stdout.close()
    found = {"cpu": usage.ru_utime + usage.ru_stime, "seconds": time.monotonic() - started}
    answer = json.loads(said) if "--json" in arguments else {}
    more = {name: answer[name] for name in ("psnr_median", "failed", "version") if name in answer}
    return {**found, "mebibytes": usage.ru_maxrss / 1024, **more}


def run(checkouts: dict[str, Path], work: Path) -> dict[str, Any]:
    """Every size by every checkout in turn."""
    work.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = {}
    for name, checkout in checkouts.items():
        key = work / f"{name}.safetensors"
        if not key.exists():
            used(checkout, "keygen", "-o", str(key), "--classes", "1")
    for size, (height, width) in SIZES.items():
        folder = work / size.replace(" ", "-")
        folder.mkdir(exist_ok=True)
        # In a process of its own: a child's peak memory is at least what its parent held when it was begun.
        drawing = multiprocessing.get_context("spawn").Process(target=draw, args=(folder / "a.jpg", height, width))
        drawing.start()
        drawing.join()
        for name, checkout in checkouts.items():
            out, key = work / f"{name}-{height}", str(work / f"{name}.safetensors")
            found = used(checkout, "mark", str(folder), "--key", key, "-o", str(out), "--force", "--json")
            rows.setdefault(size, {})[name] = found
            print(size, name, found, flush=True)
    return {"rows": rows, **machine()}


def table(results: Results) -> list[str]:
    found = results["large"]["rows"]
    heads = ("photograph, JPEG", "version", "processor, s", "memory, GiB", "PSNR")
    rows = [
        (
            size, one["version"], number(one["cpu"], 1), number(one["mebibytes"] / 1024, 1),
            f"{number(one['psnr_median'], 1)} dB",
        )
        for size in SIZES
        for one in sorted(found[size].values(), key=lambda one: one["cpu"], reverse=True)
    ]  # fmt: skip
    return lines(heads, rows)


TABLES: Makers = {"large photographs": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("checkouts", nargs="*", help="NAME=FOLDER, earlier ones first")
    parser.add_argument("--work", type=Path, default=Path("bench-out"))
    parser.add_argument("--json", type=Path, default=FOLDER / "large.json")
    a = parser.parse_args()
    if a.command == "run":
        checkouts = {name: Path(folder) for name, _, folder in (pair.partition("=") for pair in a.checkouts)}
        a.json.write_text(json.dumps(run(checkouts, a.work), indent=1, sort_keys=True) + "\n")
    if a.json.resolve() == FOLDER / "large.json":
        write(DOCUMENT, TABLES)


if __name__ == "__main__":
    main()
