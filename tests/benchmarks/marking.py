"""What a mark is worth at a given PSNR, against how it is made; and how fast it is made.

    python tests/benchmarks/marking.py evidence cifar10.zip --work bench-out --recipe radiotag@34 paper@34 --seed 2
    python tests/benchmarks/marking.py speed cifar10.zip photos --work bench-out
    python tests/benchmarks/marking.py step --work bench-out
    python tests/benchmarks/marking.py scale --work bench-out
    python tests/benchmarks/marking.py table --work bench-out

`evidence` marks a share of CIFAR-10's first images by each of the recipes given (RECIPES), every recipe with a key and
images of its own, trains one suspect from scratch on all of them and verifies it by each key: so recipes are compared
in one suspect. With several marking networks (`--network`) every recipe is made with each. It repeats nothing that lies
in the work folder: suspects of other seeds share the marked images of the first. `--side` enlarges the images for the
marking; suspects see at most 64 pixels of it. `table` gathers the work folder's marks in results/marking.json (`--part`
says in which part of it) and writes this program's tables into the README beside it. The recipe 'two networks' needs a
second one (what `evidence.py run --clean` left, of another seed). `speed` times the plain recipe beside radiotag's on
the same images in one run. `photos` is a folder of photographs, which a ResNet-18 with 224-pixel input marks, of random
weights.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from evidence import machine, unpacked
from PIL import Image
from tables import BENCHMARKS, FOLDER, Makers, Results, Run, lines, log_p, median, number, percent, slashed, write
from torch import Tensor

from radiotag import keys, networks, radioactive, training, verification
from radiotag.cosines import PATTERN_DIMENSION
from radiotag.images import decode
from radiotag.manifest import read_manifest
from radiotag.probes import FolderImages, References
from radiotag.suspect import Batching


@dataclass(frozen=True, kw_only=True)
class Plain:
    """A recipe for the features' mark alone, on a batch of small images; the defaults are the paper's.

    90 steps of SGD at rate 1 on normalised pixels, a tenth of that after each third; equation 6; L∞ ≤ 10. To be
    compared at one PSNR, every recipe is projected to the same L2 ball.
    """

    steps: int = 90
    rule: str = "sgd"  # or "l2", "sign": normalised steps whose lengths decay linearly
    crops: tuple[float, float] | None = (0.4, 1.0)  # of random resized crops; None: the whole image
    shift: int = 0  # pixels of random translation
    noise: float = 0.0  # standard deviation, of 255
    blur: bool = False  # 3 x 3 binomial, half of the time
    loss: str = "features"  # or "response": the network's answer to the mark's direction, which verification reads
    penalties: bool = True  # λ1 = 0.0005, λ2 = 0.01
    second: bool = False  # the loss of a second network too, along the same carrier


L2 = {"steps": 20, "rule": "l2", "penalties": False}
RECIPES: dict[str, radioactive.Marking | Plain] = {
    "radiotag": radioactive.Marking(),
    "features alone": radioactive.Marking(pattern_share=0.0),
    "half pattern": radioactive.Marking(pattern_share=0.5),
    "pattern alone": radioactive.Marking(pattern_share=1.0),
    "features, crops of 10 to 100 %": radioactive.Marking(pattern_share=0.0, crop_scale=(0.1, 1.0)),
    "features, crops of 2 to 25 %": radioactive.Marking(pattern_share=0.0, crop_scale=(0.02, 0.25)),
    "paper": Plain(),
    "90 steps of l2": Plain(steps=90, rule="l2", penalties=False),
    "sign steps": Plain(**{**L2, "rule": "sign"}),
    "whole images": Plain(**L2, crops=None),
    "small crops": Plain(**L2, crops=(0.1, 1.0)),
    "shifts": Plain(**L2, crops=None, shift=4),
    "noise": Plain(**L2, noise=8.0),
    "blur": Plain(**L2, blur=True),
    "response": Plain(**L2, loss="response"),
    "two networks": Plain(**L2, second=True),
}


def view(x: Tensor, recipe: Plain, draws: list[random.Random], size: int) -> Tensor:
    """F of a batch (B, 3, H, W), one draw an image."""
    out = x
    if recipe.crops:
        marking = radioactive.Marking(crop_scale=recipe.crops)
        out = torch.stack(
            [
                radioactive.augment(image, radioactive.random_crop(*image.shape[1:], draw, marking), size)
                for image, draw in zip(x, draws, strict=True)
            ]
        )
    if recipe.shift:
        far = recipe.shift
        padded = F.pad(out, (far,) * 4, mode="reflect")
        places = [(d.randint(0, 2 * far), d.randint(0, 2 * far)) for d in draws]
        h, w = out.shape[2:]
        out = torch.stack([p[:, i : i + h, j : j + w] for p, (i, j) in zip(padded, places, strict=True)])
    if recipe.noise:
        seeds = [torch.Generator().manual_seed(d.getrandbits(62)) for d in draws]
        out = out + recipe.noise * torch.stack([torch.randn(out.shape[1:], generator=g) for g in seeds])
    if recipe.blur:
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        kernel = (row[:, None] * row).expand(3, 1, 3, 3)
        soft = F.conv2d(F.pad(out, (1,) * 4, mode="replicate"), kernel, groups=3)
        out = torch.where(torch.tensor([d.random() < 0.5 for d in draws])[:, None, None, None], soft, out)
    return out


def mark_plainly(
    network: networks.Network,
    x: Tensor,
    u: Tensor,
    recipe: Plain,
    psnr: float,
    draws: list[random.Random],
    second: networks.Network | None = None,
) -> Tensor:
    """A batch (B, 3, H, W) in [0, 255] → marked, with a loop as short as a paper's."""
    delta = torch.zeros_like(x)
    std, size = network.get_buffer("std") * 255, network.spec.image_size
    radius = 255 * 10 ** (-psnr / 20) * math.sqrt(x[0].numel())
    for step in range(recipe.steps):
        delta.requires_grad_()
        states = [d.getstate() for d in draws]
        seen = view((x + delta).clamp(0, 255), recipe, draws, size) / 255
        after = network.features(seen)  # (B, d)
        loss = -(after * u).sum()
        if second:
            loss = loss - (second.features(seen) * u).sum()
        if recipe.loss == "response":  # the network's own gradient along u, at the marked image, moves towards u again
            (uphill,) = torch.autograd.grad((after * u).sum(), seen, create_graph=True)
            loss = -uphill.flatten(1).norm(dim=1).sum() + loss
        if recipe.penalties:
            for draw, state in zip(draws, states, strict=True):
                draw.setstate(state)
            before = network.features(view(x, recipe, draws, size) / 255).detach()
            loss = loss + 0.01 * ((after - before).square().sum(1) + 1e-12).sqrt().sum()
            loss = loss + 0.0005 * (delta / std).square().sum()
        (g,) = torch.autograd.grad(loss, delta)
        with torch.no_grad():
            if recipe.rule == "sgd":
                moved = delta - 0.1 ** (step * 3 // recipe.steps) * g * std**2
            else:
                g = g.sign() if recipe.rule == "sign" else g
                length = 6.0 * 2 * (1 - step / recipe.steps) / (recipe.steps + 1)  # of the ball's radius, 6 in all
                moved = delta - length * radius * g / g.flatten(1).norm(dim=1).clamp_min(1e-20).view(-1, 1, 1, 1)
            far = moved.flatten(1).norm(dim=1).clamp_min(radius).view(-1, 1, 1, 1)
            delta = (moved * radius / far).clamp(-10, 10)
    delta = delta.detach()
    for _ in range(10):  # at rate 1, SGD does not fill the ball: stretch what it found
        short = delta.flatten(1).norm(dim=1).clamp_min(1e-20).view(-1, 1, 1, 1)
        delta = (delta * radius / short).clamp(-10, 10)
    return (x + delta).clamp(0, 255)


def mark_all(
    network: networks.Network,
    x: Tensor,
    key: keys.Key,
    y: Tensor,
    recipe: radioactive.Marking | Plain,
    psnr: float,
    second: networks.Network | None,
) -> Tensor:
    """Mark (N, 3, H, W) uint8 of labels y (N,), image i drawing its augmentations from i."""
    out = []
    for part in torch.split(torch.arange(len(x)), 64):
        images, rows = x[part].float(), y[part]
        draws = [random.Random(f"mark {i}") for i in part.tolist()]
        if isinstance(recipe, Plain):
            marked = mark_plainly(network, images, key.carriers[rows], recipe, psnr, draws, second)
        else:
            settings = dataclasses.replace(recipe, min_psnr=psnr)
            patterns = key.patterns[rows] * (recipe.pattern_share != 0)
            given = [
                radioactive.ImageToMark(image=image, carrier=u, pattern=v, draw=draw)
                for image, u, v, draw in zip(images, key.carriers[rows], patterns, draws, strict=True)
            ]
            marked = torch.stack(radioactive.mark_images(network, given, settings))
        out.append(marked.round().to(torch.uint8))
    return torch.cat(out)


def evidence(a: argparse.Namespace) -> None:
    """Mark by each recipe and network, with a key and images each, train one suspect on all, verify it by each key."""
    recipes = [(*name.partition("@")[::2], network) for name in a.recipe for network in a.network]
    whole = "+".join("@".join(part) for part in ((n, db or "34", *named(m)) for n, db, m in recipes)).replace(" ", "-")
    source = (f"-{a.data.stem}" if a.data.stem != "cifar10" else "") + (f"-{a.side}px" if a.side != 32 else "")
    more = source + (f"-{a.arch}" if a.arch != "resnet10" else "")
    stem = f"mark-{whole}{more}-n{a.images}-q{a.fraction:g}-e{a.epochs}-seed{a.seed}"
    stem = stem if len(stem) < 200 else f"mark-{hashlib.sha256(stem.encode()).hexdigest()[:16]}-seed{a.seed}"
    if (a.work / f"{stem}.json").exists():
        return
    root, model, count = unpacked(a.data, a.work), a.work / f"{stem}.pt", round(a.fraction * a.images)
    data = training.load_folder(root / "train", min(a.side, 64))
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(0))[: a.images]
    x, y = data.images[order].clone(), data.labels[order]
    runs = []
    for place, (name, db, network) in enumerate(recipes):
        mine = slice(place * count, (place + 1) * count)
        marks = "@".join((name, db or "34", *named(network))) + f"-{mine.start}-{mine.stop}-of-{a.images}"
        marks = marks.replace(" ", "-") + source  # whatever the suspect
        key_file, saved = a.work / f"{marks}.safetensors", a.work / f"{marks}.images.pt"
        if not key_file.exists():
            key = keys.new_key(*networks.marking_weights(network), len(data.names))
            keys.save_key(key_file, key)
        if not saved.exists():
            large = scaled(x[mine], a.side)
            marked, about = marked_by(name, float(db or 34), key_file, large, y[mine], a.second)
            torch.save((scaled(marked, x.shape[-1]), about), saved)
        x[mine], about = torch.load(saved)
        by = {"recipe": name, "psnr": float(db or 34), "network": Path(network).stem, "key": key_file.name}
        runs.append(by | about)
    dataset = training.Dataset(images=x, labels=y, names=data.names)
    suspect = training.new_network(a.arch, dataset, stem=x.shape[-1] == 32, seed=a.seed)  # the stock stem saves time
    unseen = next(path for path in (root / "test", root / "val") if path.exists())
    held_out, plan = training.load_folder(unseen, x.shape[-1]), training.Recipe(epochs=a.epochs, seed=a.seed)
    course = training.Course(validation=held_out, output=model, resume=model.exists())
    accuracy = training.train(suspect, dataset, plan, course)
    for i in range(len(a.network)):
        same = runs[i :: len(a.network)]  # what is computed of the suspect is the same for all keys of a network
        for run, verdict in zip(same, verified(model, [a.work / run["key"] for run in same], unseen), strict=True):
            run["real"] = verdict
    shared = {
        "images": a.images, "fraction": a.fraction, "epochs": a.epochs, "seed": a.seed, "accuracy": accuracy,
        "data": a.data.stem, "side": a.side, "arch": a.arch, "suspect": whole, **machine(),
        "command": f"evidence {a.data.name} --images {a.images} --fraction {a.fraction:g} --epochs {a.epochs} "
        f"--seed {a.seed} --arch {a.arch} --side {a.side} --recipe {shlex.join(a.recipe)} "
        f"--network {shlex.join(Path(network).name for network in a.network)}",
    }  # fmt: skip
    (a.work / f"{stem}.json").write_text(json.dumps([run | shared for run in runs], indent=1, sort_keys=True))


def scaled(x: Tensor, side: int) -> Tensor:
    """(N, 3, H, W) uint8 → (N, 3, side, side) uint8."""
    parts = [networks.resized(part.float(), side).round().clamp(0, 255).to(torch.uint8) for part in torch.split(x, 64)]
    return torch.cat(parts)


def named(network: str) -> tuple[str, ...]:
    """The name of a marking network that is not the built-in one."""
    return () if network == "builtin" else (Path(network).stem,)


def marked_by(
    name: str, psnr: float, key_file: Path, x: Tensor, y: Tensor, other: Path | None
) -> tuple[Tensor, dict[str, float]]:
    """Images (N, 3, H, W) uint8 of labels (N,) marked by a recipe, and what that took and gave."""
    key, recipe = keys.load_key(key_file), RECIPES[name]
    network, started = key.network(), time.monotonic()
    second = networks.load_network(other) if isinstance(recipe, Plain) and recipe.second else None
    marked = mark_all(network, x, key, y, recipe, psnr, second)
    seconds = time.monotonic() - started
    error = (marked.float() - x.float()).square().flatten(1).mean(1)
    with torch.no_grad():
        shift = network.features(marked[:500].float() / 255) - network.features(x[:500].float() / 255)
    return marked, {
        "psnr_median": float((10 * torch.log10(255**2 / error.clamp_min(1e-9))).median()),
        "gain": float((shift * key.carriers[y[:500]]).sum(1).mean()), "seconds_per_image": seconds / len(x),
    }  # fmt: skip


def verified(model: Path, key_files: list[Path], held_out: Path) -> list[dict[str, float | None]]:
    """What `verify --data` says under each key; what it computes of the suspect is the same under all of them."""
    owners, options = [keys.load_key(path) for path in key_files], verification.VerifyOptions()
    images = FolderImages(held_out)
    references, recorded = References(owners[0].network(), images), verification.records(owners[0], images, options)
    suspect = verification.load_suspect(model, options)
    reference = references.at(verification.input_size(suspect, references), Batching().tell)
    _, pairing, vectors, _ = verification.examine(suspect, owners[0], reference, recorded, Batching())
    found = [radioactive.evidence(vectors, pairing.rows, key.carriers, key.patterns) for key in owners]
    return [
        {
            "log10_p": one.log_p / math.log(10),
            "paper_log10_p": None if one.paper_log_p is None else one.paper_log_p / math.log(10),
            "mean_cosine": one.mean_cosine, "pattern_cosine": one.pattern_cosine,
        }
        for one in found
    ]  # fmt: skip


def plain_folder(source: Path, output: Path, key_file: Path, psnr: float) -> None:
    """Mark a folder by the paper's recipe as a script would: one image size after another, no overlap, PNG."""
    key = keys.load_key(key_file)
    network = key.network()
    by_size: dict[tuple[int, ...], list[Path]] = {}
    for path in sorted(p for p in source.rglob("*") if p.suffix.lower() in {".jpg", ".jpeg", ".png"}):
        by_size.setdefault(decode(path.read_bytes(), str(path)).rgb.shape, []).append(path)
    for group in by_size.values():
        for at in range(0, len(group), 16):
            files = group[at : at + 16]
            rgb = [torch.from_numpy(decode(p.read_bytes(), str(p)).rgb).permute(2, 0, 1) for p in files]
            draws = [random.Random(str(p)) for p in files]
            rows = [
                sorted(q.name for q in source.iterdir()).index(p.parent.name) if p.parent != source else 0
                for p in files
            ]
            out = mark_plainly(network, torch.stack(rgb), key.carriers[rows], Plain(), psnr, draws)
            for path, image in zip(files, out.round(), strict=True):
                target = output / path.relative_to(source).with_suffix(".png")
                target.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.permute(1, 2, 0).numpy().astype(np.uint8)).save(target)


def quality(source: Path, output: Path) -> float:
    """Median PSNR of a folder's marked PNG files."""
    found = []
    for path in sorted(output.rglob("*.png")):
        (before,) = (p for p in (source / path.relative_to(output)).parent.glob(f"{path.stem}.*"))
        a, b = (decode(p.read_bytes(), str(p)).rgb for p in (before, path))
        found.append(10 * math.log10(255**2 / max(1e-9, float(np.mean((a - b) ** 2)))))
    return float(np.median(found))


def measured(command: list[str]) -> tuple[float, float]:
    """Seconds and megabytes that a command takes."""
    started = time.monotonic()
    _, status, used = os.wait4(subprocess.Popen(command).pid, 0)
    if status:
        raise subprocess.CalledProcessError(status, command)
    return time.monotonic() - started, used.ru_maxrss / 1e3


def timed(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def stock_resnet18(path: Path) -> None:
    """A network for photographs, of random weights: time does not depend on them."""
    spec = networks.Spec(architecture="resnet18", classes=1000, small_stem=False, image_size=224,
                         mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), class_names=None)  # fmt: skip
    torch.manual_seed(1)
    networks.save_checkpoint(path, networks.build(spec), spec)


def step_cost(key: keys.Key, side: int, batch: int, size: int) -> dict:
    """Seconds of a step of marking beside a bare pass forward and back to the input, interleaved; medians of 5.

    Both in the same precision; the batch is of images of one size. A step is the whole work on a batch by the number of
    steps, so that what is done once an image counts, too.
    """
    network = key.network()
    x = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1)) * 255
    u, inputs = key.carriers[:1].expand(batch, -1), torch.rand(batch, 3, size, size)
    settings = radioactive.Marking()

    def bare() -> None:
        z = inputs.clone().requires_grad_()
        with networks.mixed_precision("cpu"):
            features = network.features(z)
        torch.autograd.grad((features.float() * u).sum(), z)

    def marking() -> None:
        none = torch.zeros(PATTERN_DIMENSION)
        given = [
            radioactive.ImageToMark(image=x[i], carrier=u[i], pattern=none, draw=random.Random(i)) for i in range(batch)
        ]
        radioactive.mark_images(network, given, settings)

    bare()
    times = [(timed(bare), timed(marking) / settings.steps) for _ in range(5)]
    one, other = (float(np.median(column)) for column in zip(*times, strict=True))
    return {"batch": batch, "bare_seconds": one, "step_seconds": other, "ratio": other / one}


def speed(a: argparse.Namespace) -> None:
    """The plain recipe beside `radiotag mark --format png`, on photographs and on CIFAR images."""
    command = f"speed {a.data.name} {a.photos.name} --small {a.small} --large {a.large}"
    result: dict = {"command": command, **machine()}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for path in sorted((unpacked(a.data, a.work) / "train").rglob("*.jpg"))[:: 50_000 // a.small]:
            target = work / "cifar" / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
        photos = sorted(a.photos.iterdir())[: a.large]
        (work / "photos").mkdir()
        for path in photos:
            (work / "photos" / path.name).write_bytes(path.read_bytes())
        stock_resnet18(work / "resnet18.pt")
        for name, network, psnr in (("cifar", "builtin", 34.0), ("photos", str(work / "resnet18.pt"), 40.0)):
            file = work / f"{name}.safetensors"
            keygen = [sys.executable, "-m", "radiotag", "keygen", "-q", "-o", str(file), "--network", network]
            subprocess.run([*keygen, "--classes", "10"], check=True)
            mark = f"mark {work / name} --key {file} --format png -q".split()
            source, ours, plain = work / name, work / f"{name}-marked", work / f"{name}-plain"
            seconds = timed(lambda c=mark: subprocess.run([sys.executable, "-m", "radiotag", *c], check=True))
            other = timed(lambda s=source, o=plain, f=file, p=psnr: plain_folder(s, o, f, p))
            rows = read_manifest(work / f"{name}-marked.manifest.jsonl")[1].values()
            result[name] = {
                "images": len(rows), "seconds": seconds, "plain_seconds": other, "ratio": other / seconds,
                "psnr": quality(source, ours), "plain_psnr": quality(source, plain),
            }  # fmt: skip
            print(name, json.dumps(result[name]), flush=True)
    (a.work / "mark-speed.json").write_text(json.dumps(result, indent=1, sort_keys=True))


def rank(a: argparse.Namespace) -> None:
    """What choosing hard images adds to marking a tenth: whole runs with and without, in turn, medians of three."""
    result: dict = {"command": f"rank {a.data.name} {a.photos.name} --small {a.small} --large {a.large}", **machine()}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        stock_resnet18(work / "resnet18.pt")
        small = sorted((unpacked(a.data, a.work) / "train").rglob("*.jpg"))[:: 50_000 // a.small]
        large = sorted(a.photos.iterdir()) * math.ceil(a.large / len(list(a.photos.iterdir())))
        sets = {"cifar": ("builtin", small), "photos": (str(work / "resnet18.pt"), large[: a.large])}
        for name, (network, paths) in sets.items():
            for i, path in enumerate(paths):
                target = work / name / f"class{i % 10}" / f"{i:06d}{path.suffix}"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
            file = work / f"{name}.safetensors"
            program = [sys.executable, "-m", "radiotag"]
            keygen = ["keygen", "-q", "-o", str(file), "--network", network, "--classes", "10"]
            subprocess.run([*program, *keygen], check=True)
            mark = [*program, "mark", str(work / name), "--key", str(file), "-q", "--fraction", "0.1", "--force"]
            took: dict[str, list[float]] = {"hard": [], "random": [], "plan": []}
            for _ in range(3):
                took["plan"].append(measured([*mark, "--dry-run"])[0])
                for choice in ("hard", "random"):
                    took[choice].append(measured([*mark, "--choose", choice])[0])
            hard, random_, plan = (float(np.median(took[each])) for each in ("hard", "random", "plan"))
            result[name] = {
                "images": len(paths), "hard_seconds": hard, "random_seconds": random_, "plan_seconds": plan,
                "share": (hard - random_) / (random_ - plan),  # of the time that marking takes beyond start and plan
            }  # fmt: skip
            print(name, json.dumps(result[name]), flush=True)
    (a.work / "mark-rank.json").write_text(json.dumps(result, indent=1, sort_keys=True))


def step(a: argparse.Namespace) -> None:
    """What a step of marking costs beside a bare pass, on images of CIFAR's size and of photographs'."""
    result: dict = {"command": "step", **machine()}
    with tempfile.TemporaryDirectory() as folder:
        stock_resnet18(Path(folder) / "resnet18.pt")
        sizes = {"cifar": ("builtin", 32, 64, 32), "photos": (f"{folder}/resnet18.pt", 375, 16, 224)}
        for name, (network, side, batch, size) in sizes.items():
            key = keys.new_key(*networks.marking_weights(network), 10)
            result[name] = step_cost(key, side, batch, size)
            print(name, json.dumps(result[name]), flush=True)
    (a.work / "mark-step.json").write_text(json.dumps(result, indent=1, sort_keys=True))


def scale(a: argparse.Namespace) -> None:
    """Plan, mark (one image in 200) and go on in a folder of many small files: seconds, and the memory it took."""
    rng, result = np.random.default_rng(0), {"command": f"scale --files {a.files}", **machine()}
    with tempfile.TemporaryDirectory(dir=a.work) as folder:
        key = Path(folder) / "k.safetensors"
        subprocess.run([sys.executable, "-m", "radiotag", "keygen", "-q", "-o", str(key)], check=True)
        for count in (a.files // 100, a.files):
            source = Path(folder) / str(count)
            for i in range(count):
                target = source / f"class{i % 10}" / f"{i // 1000:04d}" / f"{i:06d}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
                Image.fromarray(pixels).save(target, compress_level=1)
            command = [sys.executable, "-m", "radiotag", "mark", str(source), "--key", str(key), "-q"]
            runs = {"plan": ["--dry-run"], "mark": [], "again": []}
            took = {name: measured([*command, "--fraction", "0.005", *more]) for name, more in runs.items()}
            result[str(count)] = {f"{name}_seconds": seconds for name, (seconds, _) in took.items()}
            result[str(count)]["megabytes"] = max(memory for _, memory in took.values())
            print(count, json.dumps(result[str(count)]), flush=True)
    (a.work / "mark-scale.json").write_text(json.dumps(result, indent=1, sort_keys=True))


def table(a: argparse.Namespace) -> None:
    """Gather the work folder's marks in the results, and write the tables."""
    runs = [run for file in sorted(a.work.glob("mark-*-seed*.json")) for run in json.loads(file.read_text())]
    runs.sort(key=lambda r: (r["images"], r["psnr"], list(RECIPES).index(r["recipe"]), r["seed"]))
    others = {
        name: json.loads((a.work / f"mark-{name}.json").read_text())
        for name in ("speed", "step", "scale", "rank")
        if (a.work / f"mark-{name}.json").exists()
    }
    before = json.loads(a.json.read_text()) if a.json.exists() else {}
    found = {**others, a.part: runs} if runs else others
    a.json.write_text(json.dumps({**before, **found}, indent=1, sort_keys=True) + "\n")
    if a.json == FOLDER / "marking.json":
        write(DOCUMENT, TABLES)


# ---------------------------------------------------------------- the tables

DOCUMENT = BENCHMARKS


def recipes_of(results: Results, kind: str) -> list[str]:
    """One table of recipes: 'one' in a suspect, 'seven' owners' in one, or those of the 'features'."""
    groups: dict[tuple[int, float], list[Run]] = {}
    for run in results["marking"]["runs"]:
        recipes = {part.partition("@")[0] for part in run["suspect"].split("+")}
        which = "one" if len(recipes) == 1 else "features" if "features-alone" in recipes else "seven"
        if which == kind:
            groups.setdefault((list(RECIPES).index(run["recipe"]), run["psnr"]), []).append(run)
    rows = []
    for _, runs in sorted(groups.items()):
        left = slashed(log_p(run["real"]["log10_p"]) for run in runs)
        took = number(1e3 * median(runs, "seconds_per_image"), 0)
        rows.append([runs[0]["recipe"], f"{number(median(runs, 'psnr_median'), 1)} dB", left, took])
    return lines(("recipe", "PSNR", "log10 p", "ms an image"), rows)


def one_recipe(results: Results) -> list[str]:
    return recipes_of(results, "one")


def seven_owners(results: Results) -> list[str]:
    return recipes_of(results, "seven")


def features(results: Results) -> list[str]:
    return recipes_of(results, "features")


def larger(results: Results) -> list[str]:
    """Two owners' marks in images enlarged to the size of photographs."""
    rows = (
        [str(owner), f"{number(run['psnr_median'], 1)} dB", percent(run["accuracy"]), log_p(run["real"]["log10_p"]),
         number(run["real"]["mean_cosine"], 3), number(run["real"]["pattern_cosine"], 3)]
        for owner, run in enumerate(results["marking"]["large"], 1)
    )  # fmt: skip
    return lines(("key", "PSNR", "accuracy", "`--data`", "cosine, features", "cosine, pattern"), rows)


def fast(results: Results) -> list[str]:
    titles = {"cifar": "of CIFAR-10, built-in network", "photos": "photographs, ResNet-18 of 224 pixels"}
    rows = []
    for name, title in titles.items():
        run = results["marking"]["speed"][name]
        plain = f"{number(run['plain_seconds'], 0)} s, {number(run['plain_psnr'], 1)} dB"
        ours = f"{number(run['seconds'], 0)} s, {number(run['psnr'], 1)} dB"
        rows.append([f"{number(run['images'], 0)} {title}", plain, ours, number(run["ratio"], 1)])
    return lines(("images", "paper's recipe", "radiotag", "ratio"), rows)


def steps(results: Results) -> list[str]:
    titles = {"cifar": "of CIFAR-10", "photos": "photographs"}
    rows = []
    for name, title in titles.items():
        run = results["marking"]["step"][name]
        took = (number(1e3 * run[f"{which}_seconds"] / run["batch"], 1) for which in ("bare", "step"))
        rows.append([title, *took, number(run["ratio"])])
    return lines(("images", "a bare pass, ms an image", "a step of marking, ms an image", "ratio"), rows)


def ranked(results: Results) -> list[str]:
    titles = {"cifar": "of CIFAR-10, built-in network", "photos": "photographs, ResNet-18 of 224 pixels"}
    rows = []
    for name, title in titles.items():
        run = results["marking"]["rank"][name]
        took = (f"{number(run[f'{choice}_seconds'], 0)} s" for choice in ("random", "hard"))
        rows.append([f"{number(run['images'], 0)} {title}", *took, percent(run["share"], 0)])
    return lines(("images, a tenth marked", "at random", "hard images", "ranking, of the time for marking"), rows)


def many_files(results: Results) -> list[str]:
    runs = results["marking"]["scale"]
    rows = []
    for count in sorted(filter(str.isdecimal, runs), key=int):
        took = (f"{number(runs[count][f'{part}_seconds'], 0)} s" for part in ("plan", "mark", "again"))
        rows.append([number(int(count), 0), *took, f"{number(runs[count]['megabytes'], 0)} MB"])
    return lines(("files", "planned", "marked", "found done", "memory at most"), rows)


TABLES: Makers = {
    "one recipe": one_recipe, "seven owners": seven_owners, "features": features, "larger images": larger,
    "speed": fast, "steps": steps, "many files": many_files, "ranking": ranked,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("evidence")
    one.set_defaults(call=evidence)
    one.add_argument("data", type=Path)
    one.add_argument("--recipe", nargs="+", default=["radiotag@34"], help="NAME@PSNR, one or more in one suspect")
    one.add_argument("--second", type=Path, help="a checkpoint, for the recipe 'two networks': clean-seedN.pt, say")
    one.add_argument("--network", nargs="+", default=["builtin"], help="marking networks: every recipe by each of them")
    one.add_argument("--arch", default="resnet10", help="of the suspect")
    one.add_argument("--side", type=int, default=32, help="pixels of the images marked; suspects see 64 at most")
    one.add_argument("--images", type=int, default=50_000)
    one.add_argument("--fraction", type=float, default=0.1)
    one.add_argument("--epochs", type=int, default=6)
    one.add_argument("--seed", type=int, default=2)
    timed_ = []
    for name, call, small, large in (("speed", speed, 1000, 120), ("rank", rank, 5000, 480)):
        timed_.append(commands.add_parser(name))
        timed_[-1].set_defaults(call=call)
        timed_[-1].add_argument("data", type=Path)
        timed_[-1].add_argument("photos", type=Path)
        timed_[-1].add_argument("--small", type=int, default=small, help="CIFAR images")
        timed_[-1].add_argument("--large", type=int, default=large, help="photographs")
    bare = commands.add_parser("step")
    bare.set_defaults(call=step)
    large = commands.add_parser("scale")
    large.set_defaults(call=scale)
    large.add_argument("--files", type=int, default=200_000)
    every = commands.add_parser("table")
    every.set_defaults(call=table)
    every.add_argument("--json", type=Path, default=FOLDER / "marking.json", help="another: no table is written")
    every.add_argument("--part", default="runs", help="of the file, for the marks of this work folder")
    for part in (one, *timed_, bare, large, every):
        part.add_argument("--work", type=Path, default=Path("bench-out"))
    a = parser.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    a.call(a)


if __name__ == "__main__":
    main()
