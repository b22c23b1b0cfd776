"""Golden bytes: two versions of radiotag mark the same files alike, and find the same p-values in the same suspects.

    python tests/benchmarks/golden.py BEFORE AFTER --work bench-out --json tests/benchmarks/results/golden.json

BEFORE and AFTER are checkouts. All commands run as a user runs them, in a process each. The version before draws the
demonstration (images, held-out images, a key, a clean and a radioactive model); both versions then mark and verify.
Marked files and manifests must be equal to the byte, numbers to 1e-9.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tables
import torch
from PIL import Image

NUMBERS = ("log10_p", "log10_p_corrected", "paper_log10_p", "mean_cosine", "pattern_cosine", "alignment_r2")
TOLERANCE = 1e-9


def radiotag(checkout: Path, *arguments: object, cwd: Path) -> dict:
    """Run a command of a checkout and return its JSON."""
    env = os.environ | {"PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "radiotag", *map(str, arguments), "--json", "-q"]
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if result.returncode not in (0, 3):
        raise SystemExit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return json.loads(result.stdout)


def tree_hash(place: Path) -> str:
    """SHA-256 over the names and bytes of a file or of all files in a folder."""
    digest = hashlib.sha256()
    for path in [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(place)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def both(
    before: Path, after: Path, arguments: Sequence[object], work: Path, outputs: Sequence[Path] | None = None
) -> list[dict]:
    """Run a command of two checkouts side by side and return the JSON of each."""
    given = [[*arguments, *(["-o", output.name] if output else [])] for output in outputs or (None, None)]
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(radiotag, c, *a, cwd=work) for c, a in zip((before, after), given, strict=True)]
        return [run.result() for run in runs]


# ---------------------------------------------------------------- what is marked


def draw_formats(images: Path, target: Path) -> None:
    """A folder of the demonstration's images in other formats, depths and sizes."""
    kinds = {
        "a.jpg": ("RGB", 32, {"quality": 75}), "b.jpg": ("L", 64, {"quality": 90}), "c.png": ("P", 48, {}),
        "d.png": ("RGBA", 100, {}), "e.webp": ("RGB", 96, {"quality": 80}), "f.tif": ("RGB", 40, {}),
        "g.bmp": ("RGB", 33, {}), "h.png": ("L", 128, {}), "i.jpg": ("CMYK", 64, {}), "j.jpg": ("RGB", 260, {}),
    }  # fmt: skip
    for folder in sorted(path for path in images.iterdir() if path.is_dir())[:2]:
        (target / folder.name).mkdir(parents=True)
        for source, (name, (mode, side, options)) in zip(sorted(folder.iterdir()), kinds.items(), strict=False):
            picture = Image.open(source).convert("RGB").resize((side, side + 7), Image.Resampling.BICUBIC)
            picture.convert(mode).save(target / folder.name / name, **options)


def draw_shard(images: Path, target: Path) -> None:
    """A tar shard in WebDataset's layout, of a few images of each class."""
    with tarfile.open(target, "w") as tar:
        for label, folder in enumerate(sorted(path for path in images.iterdir() if path.is_dir())):
            for number, path in enumerate(sorted(folder.iterdir())[:6]):
                (cls := target.with_suffix(".cls")).write_text(f"{label}")
                tar.add(path, f"{label}{number:03d}.png")
                tar.add(cls, f"{label}{number:03d}.cls")
                cls.unlink()


def marked_alike(before: Path, after: Path, work: Path) -> list[dict]:
    """Mark the same data with both versions."""
    draw_formats(work / "demo/images", work / "formats")
    draw_shard(work / "demo/images", work / "shard.tar")
    radiotag(before, "keygen", "-o", "unnamed.safetensors", "--classes", "12", cwd=work)
    rows = []
    for source, key, options in (
        ("demo/images", "demo/k.safetensors", ("--fraction", "0.1")),
        ("formats", "unnamed.safetensors", ()),
        ("formats", "unnamed.safetensors", ("--format", "png", "--epsilon", "6", "--seed", "3")),
        ("shard.tar", "unnamed.safetensors", ("--fraction", "0.5")),
    ):
        places = [work / f"{name}-{len(rows)}{Path(source).suffix}" for name in ("before", "after")]
        both(before, after, ["mark", source, "--key", key, *options], work, places)
        hashes = [(tree_hash(p), tree_hash(p.with_name(p.name + ".manifest.jsonl"))) for p in places]
        rows.append({
            "command": f"mark {source} {' '.join(options)}".strip(), "equal": hashes[0] == hashes[1],
            "sha256": hashes[0][0], "manifest_sha256": hashes[0][1],
        })  # fmt: skip
    return rows


# ---------------------------------------------------------------- what is verified


def strip_names(source: Path, target: Path, order: list[int] | None = None) -> None:
    """A state dict without a word on itself; its outputs in another order, if one is given."""
    state = torch.load(source, weights_only=True)["model"]
    if order:
        state = state | {name: state[name][order] for name in ("fc.weight", "fc.bias")}
    torch.save(state, target)


def verified_alike(before: Path, after: Path, work: Path) -> list[dict]:
    """Verify the same suspects with both versions, by every kind of test."""
    demo, size = work / "demo", ("--image-size", "32")
    strip_names(demo / "radioactive.pt", work / "bare.pt")
    strip_names(demo / "radioactive.pt", work / "permuted.pt", [3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    strip_names(demo / "radioactive.pt", work / "fewer.pt", [0, 1, 2, 3, 4])
    other = ("train-demo", "demo/images-marked", "-o", "vgg.pt", "--arch", "vgg11_bn", "--epochs", "1")
    radiotag(before, *other, cwd=work)
    key, unnamed, data = "demo/k.safetensors", "unnamed.safetensors", ("--data", "demo/held-out")
    marked = ("--marked", "demo/images-marked.manifest.jsonl")
    rows = []
    for arguments in (
        ("demo/clean.pt", "demo/radioactive.pt", "--key", key),
        ("demo/radioactive.pt", "vgg.pt", "--key", key, *data),
        ("demo/radioactive.pt", "--key", key, *marked, "--calibrate", "200"),
        ("bare.pt", "--key", key, *size),
        ("permuted.pt", "fewer.pt", "--key", key, *data, *size),
        ("demo/radioactive.pt", "--key", unnamed),
        ("demo/radioactive.pt", "--key", unnamed, *data),
        ("demo/radioactive.pt", "--key", key, "--black-box", "--decoys", "2", *data),
        ("demo/radioactive.pt", "--key", key, "--black-box", "--decoys", "1", *data, *marked),
    ):
        old, new = both(before, after, ["verify", *arguments], work)
        worst = max(
            difference(a.get(name), b.get(name))
            for a, b in zip(old["suspects"], new["suspects"], strict=True)
            for name in NUMBERS
        )
        same = all(a["warnings"] == b["warnings"] for a, b in zip(old["suspects"], new["suspects"], strict=True))
        rows.append({
            "command": f"verify {' '.join(arguments)}", "difference": worst, "warnings_equal": same,
            "equal": worst <= TOLERANCE and old.get("calibration") == new.get("calibration"),
            "log10_p": [suspect["log10_p"] for suspect in old["suspects"]],
        })  # fmt: skip
    return rows


def difference(a: float | None, b: float | None) -> float:
    """How far apart two numbers are; without end where one of them is missing."""
    if a is None or b is None:
        return 0.0 if a is b else float("inf")
    return abs(a - b)


def golden(results: tables.Results) -> list[str]:
    """Each command, and whether both versions did the same."""
    rows = [
        (f"`{row['command']}`", "equal" if row["equal"] else "DIFFERENT", f"{row.get('difference', 0):.0e}")
        for row in results["golden"]["rows"]
    ]
    return tables.lines(("command", "files or p-values", "largest difference of a number"), rows)


TABLES, DOCUMENT = {"golden": golden}, tables.BENCHMARKS


def main() -> None:
    """Compare two checkouts, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--work", type=Path, default=Path("bench-out/golden"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    before, after = options.before.resolve(), options.after.resolve()
    if not (work / "demo/radioactive.pt").exists():
        radiotag(before, "train-demo", "-o", "demo", cwd=work)
    rows = [*marked_alike(before, after, work), *verified_alike(before, after, work)]
    for row in rows:
        print(f"{'equal' if row['equal'] else 'DIFFERENT':<10}{row.get('difference', 0):<9.1e}{row['command']}")
    revisions = [
        subprocess.run(["git", "-C", str(place), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        for place in (before, after)
    ]
    found = {
        "before": revisions[0].stdout.strip(), "after": revisions[1].stdout.strip(), "rows": rows,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()},
    }  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(0 if all(row["equal"] for row in rows) else 1)


if __name__ == "__main__":
    main()
