"""Train a classifier on a folder, as a user of the data would: plain SGD with random crops and flips.

The data pipeline is one uint8 tensor in memory with augmentation in batches, which is enough for a few million small
images. The order and augmentation of an epoch depend on (seed, epoch) alone, so a resumed training gives the same
result as an uninterrupted one.
"""

import math
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torchvision.transforms.v2.functional import center_crop, resize

from radiotag import radioactive
from radiotag.errors import BrokenImage, RadiotagError, first_line, none_readable
from radiotag.images import Pixels, decode
from radiotag.listing import list_folder
from radiotag.networks import (
    SMALL_IMAGE,
    Network,
    Spec,
    build,
    find_head,
    load_network,
    mixed_precision,
    save_checkpoint,
    to_metadata,
)

RADIUS = 0.0045  # root mean square of the changes in robust training, for pixels in [0, 1]: 0.25 in L2 at 32 pixels
IN_MEMORY = 6 * 2**30  # bytes of decoded images; more are mapped from a temporary file


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to train. The defaults reach about 85 % on CIFAR-10 with resnet10 in ten epochs."""

    epochs: int = 10
    batch_size: int = 128
    lr: float = 0.1  # peak, for batches of 128; scaled linearly with the batch
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.2  # share of the steps in which the rate rises linearly; then it falls linearly to zero
    seed: int = 0
    head_only: bool = False
    robust: bool = False  # train on `adversarial_examples`
    crops: float = 1.0  # least share of an image's area in `random_resized_crops`; 1: `augment` instead


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Course:
    """The options of a training other than network, images and recipe."""

    teacher: Network | None = None  # the network learns its outputs instead of the labels
    validation: "Dataset | None" = None
    output: Path | None = None  # written after every epoch
    resume: bool = False  # continue from `output` if it exists
    device: str = "cpu"
    progress: Callable[[int, float, float], None] = lambda *_: None  # (epoch, share of the epoch done, running loss)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Labelled images."""

    images: Tensor  # (N, 3, S, S) uint8; for random resized crops larger than the network's input
    labels: Tensor  # (N,) int64
    names: tuple[str, ...]  # of the classes, in label order
    broken: tuple[str, ...] = ()  # paths of images that could not be read, and are left out

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names; None for a flat folder, whose class has none."""
        return self.names if self.names != ("",) else None


def load_folder(source: Path, image_size: int | None, names: tuple[str, ...] | None = None) -> Dataset:
    """Decode a folder of class sub-folders; each image is resized and centre-cropped to S×S pixels.

    image_size: S; None for their `natural_size`. What cannot be read is left out. RadiotagError for a class that is not
    in `names`, and where nothing can be read.
    """
    items, folder_names, _ = list_folder(source)
    names = names or tuple(folder_names)
    unknown = sorted({item.label for item in items} - set(names))
    if unknown:
        raise RadiotagError(f"{source}: the class '{unknown[0]}' is not one of the model's")
    size = image_size or natural_size(source)
    images, labels, broken = _empty_images(len(items), size), list[int](), list[str]()
    for item in items:
        if (rgb := _readable(source / item.path)) is None:
            broken.append(item.path.as_posix())
            continue
        picture = Image.fromarray(np.rint(rgb).astype(np.uint8))
        picture = center_crop(resize(picture, [size]), [size])  # bilinear, antialiased
        images[len(labels)] = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        labels.append(names.index(item.label))
    if not labels:
        raise none_readable(str(source), items[0].path.as_posix())
    return Dataset(images=images[: len(labels)], labels=torch.tensor(labels), names=names, broken=tuple(broken))


def _readable(path: Path) -> Pixels | None:
    """An image's pixels, (H, W, 3) in [0, 255]; None if it cannot be read."""
    try:
        return decode(path.read_bytes(), str(path)).rgb
    except (BrokenImage, OSError):
        return None


def natural_size(source: Path) -> int:
    """Suitable input size (pixels) for a folder's images: the first readable one's short side up to 64, else 224."""
    short = _short_side(source)
    return short if short <= SMALL_IMAGE else 224


def _short_side(source: Path) -> int:
    items, _, _ = list_folder(source)
    for item in items:
        if (rgb := _readable(source / item.path)) is not None:
            return int(min(rgb.shape[:2]))
    raise none_readable(str(source), items[0].path.as_posix())


def _empty_images(count: int, size: int) -> Tensor:
    shape = (count, 3, size, size)
    if math.prod(shape) <= IN_MEMORY:
        return torch.empty(shape, dtype=torch.uint8)
    with tempfile.NamedTemporaryFile(prefix="radiotag-") as file:  # deleted at once; the mapping keeps it alive
        return torch.from_numpy(np.memmap(file.name, dtype=np.uint8, mode="w+", shape=shape))


def size_to_crop(source: Path, image_size: int, least: float) -> int:
    """The size (pixels) to load a folder at, to take crops of at least this share of the area from its images.

    The smallest crop has `image_size` pixels if the first image is large enough. Smaller images are not scaled up.
    """
    if least == 1:
        return image_size
    return max(image_size, min(_short_side(source), math.ceil(image_size / math.sqrt(least))))


def random_resized_crops(images: Tensor, size: int, least: float, generator: torch.Generator) -> Tensor:
    """(B, 3, T, T) uint8 → (B, 3, S, S) float in [0, 1]: a crop of a share of each image's area, flipped or not.

    size: S in pixels; least: the smallest share, in (0, 1]. The usual augmentation for photographs.
    """
    draw = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
    marking = radioactive.Marking(crop_scale=(least, 1.0))
    height, width = images.shape[2:]
    views = [
        radioactive.augment(image.float(), radioactive.random_crop(height, width, draw, marking), size)
        for image in images
    ]
    return torch.stack(views).div_(255).clamp_(0, 1)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 3, S, S) uint8 → float in [0, 1]: reflected padding of S/8, then a random crop and flip per image."""
    batch, _, size, _ = images.shape
    pad = min(max(1, size // 8), size - 1)  # of a single pixel, nothing can be reflected
    padded = F.pad(images.float() / 255, (pad,) * 4, mode="reflect")  # (B, 3, S+2p, S+2p)
    top, left = torch.randint(0, 2 * pad + 1, (2, batch, 1), generator=generator)
    steps = torch.arange(size)
    columns = left + steps  # (B, S)
    flip = torch.rand((batch, 1), generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    rows = (top + steps)[:, None, :, None]  # (B, 1, S, 1)
    index = torch.arange(batch)[:, None, None, None]
    return padded[index, torch.arange(3)[None, :, None, None], rows, columns[:, None, None, :]]


def adversarial_examples(network: nn.Module, pixels: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 3, S, S) in [0, 1] → images moved up the loss by at most RADIUS: one step from a random point in that ball.

    A network trained on these (Madry et al., ICLR 2018; one step: Wong et al., ICLR 2020) responds along directions
    that other networks share (Springer et al., NeurIPS 2021, on attacks that transfer). Suspects of other architectures
    therefore learn its marks better. Batch normalisation works as in training, but keeps its running statistics.
    """
    radius = RADIUS * math.sqrt(pixels[0].numel())
    start = F.normalize(torch.randn(pixels.shape, generator=generator).flatten(1), dim=1)  # (B, 3·S·S)
    start = radius * start * torch.rand((len(pixels), 1), generator=generator)
    change = start.view(pixels.shape).to(pixels)  # (B, 3, S, S)
    moved = (pixels + change).requires_grad_()
    with _statistics_kept(network):
        loss = F.cross_entropy(network(moved).float(), labels, reduction="sum")
        (g,) = torch.autograd.grad(loss, moved)
    change = change + radius * F.normalize(g.flatten(1), dim=1).view_as(g)
    length = change.flatten(1).norm(dim=1).clamp_min(radius).view(-1, 1, 1, 1)  # (B, 1, 1, 1)
    examples: Tensor = (pixels + change * radius / length).clamp(0, 1)
    return examples.detach()


@contextmanager
def _statistics_kept(network: nn.Module) -> Iterator[None]:
    layers = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, before, strict=True):
            layer.momentum = momentum


def new_network(
    architecture: str, data: Dataset, *, stem: bool | None, seed: int, image_size: int | None = None
) -> Network:
    """A new network for these images, normalised by their statistics; the weights depend on the seed alone.

    image_size: of its input, in pixels; None for the images' own.
    """
    step = max(1, len(data.images) // 5000, data.images.numel() // 2**28)  # at most 1 GiB of floats
    sample = data.images[::step].float() / 255
    size = image_size or int(data.images.shape[-1])
    spec = Spec(
        architecture=architecture,
        classes=len(data.names),
        small_stem=size <= SMALL_IMAGE if stem is None else stem,
        image_size=size,
        mean=tuple(round(float(v), 4) for v in sample.mean((0, 2, 3))),
        std=tuple(max(0.01, round(float(v), 4)) for v in sample.std((0, 2, 3))),
        class_names=data.class_names,
    )
    with _seeded(seed, "cpu"):  # torchvision initialises from the global generator
        return Network(build(spec), spec)


def initialised_from(path: Path, data: Dataset, *, seed: int, image_size: int | None = None) -> Network:
    """The network of a checkpoint for this data; a new last layer if the number of classes differs.

    image_size: of its input, in pixels; None for the images' own.
    RadiotagError if it needs a new last layer but does not end in a linear layer.
    """
    network = load_network(path, image_size=image_size or int(data.images.shape[-1]))
    names = data.class_names
    if network.spec.classes == len(data.names):
        network.spec = replace(network.spec, class_names=names)
        return network
    if network.head is None:
        message = f"{path} does not end in a linear layer, so its classes cannot be changed"
        raise RadiotagError(message, "choose another --init, or data with its classes")
    network.spec = replace(network.spec, classes=len(data.names), class_names=names)
    with _seeded(seed, "cpu"):
        fresh = nn.Linear(network.head.in_features, len(data.names))
    name = next(n for n, m in network.module.named_modules() if m is network.head)
    network.module.set_submodule(name, fresh.requires_grad_(False))
    network.head = fresh
    return network


def train(network: Network, data: Dataset, recipe: Recipe, course: Course | None = None) -> float | None:
    """Train in place. Returns the accuracy on the validation images in [0, 1], or None without them.

    RadiotagError if images, teacher or an earlier checkpoint do not fit, and if the training diverges.
    """
    course = course or Course()
    _check_fit(network, data, recipe, course)
    network.to(course.device)
    if course.teacher:
        course.teacher.to(course.device)
    network.head, _ = find_head(network)
    if recipe.head_only and network.head is None:
        raise RadiotagError(f"{network.spec.architecture} does not end in a linear layer", "leave out --head-only")
    trained = network.head if recipe.head_only and network.head else network.module
    trained.requires_grad_(True)
    optimiser = _optimiser(trained, recipe)
    first = _resume(course.output, network, optimiser, recipe) if course.resume and course.output else 0
    steps = len(_batches(torch.arange(len(data.images)), recipe))
    schedule = one_cycle(optimiser, recipe, recipe.epochs * steps, first * steps) if first < recipe.epochs else None
    for epoch in range(first, recipe.epochs):
        trained.train()
        with _seeded(recipe.seed * 100003 + epoch, course.device):  # dropout draws from the global generator
            _epoch(network, data, recipe, epoch, course, schedule)
        network.eval()
        if course.output:
            extra = {"optimiser": optimiser.state_dict(), "epoch": epoch + 1, "recipe": asdict(recipe)}
            save_checkpoint(course.output, network.module, network.spec, extra)
    network.eval().requires_grad_(False)
    return accuracy(network, course.validation, course.device) if course.validation else None


def _check_fit(network: Network, data: Dataset, recipe: Recipe, course: Course) -> None:
    teacher = course.teacher
    if len(data.images) < 2 or recipe.batch_size < 2:
        raise RadiotagError("training takes two images a batch, at least", "add images, or raise --batch-size")
    if teacher and teacher.spec.classes != network.spec.classes:
        counts = f"{teacher.spec.classes} and {network.spec.classes} classes"
        raise RadiotagError(f"teacher and student differ: {counts}", "train the student on a folder of as many classes")
    if teacher and teacher.spec.class_names not in (None, network.spec.class_names):
        hint = "train the student on a folder of the teacher's classes"
        raise RadiotagError("teacher and student name their classes differently", hint)


def one_cycle(optimiser: torch.optim.Optimizer, recipe: Recipe, steps: int, done: int = 0) -> OneCycleLR:
    """The learning rate for `steps` steps, `done` of them before: linearly up in the warm-up, then down to zero."""
    warm_steps = max(1, round(recipe.warmup * steps))
    schedule = OneCycleLR(
        optimiser,
        max_lr=[recipe.lr * recipe.batch_size / 128] * len(optimiser.param_groups),
        total_steps=steps + 1,  # so that the last step's rate is not zero
        pct_start=max(2, warm_steps) / (steps + 1),  # OneCycleLR cannot rise in a single step
        div_factor=warm_steps,  # the first step's rate, as if the rate rose from zero
        anneal_strategy="linear",
        cycle_momentum=False,
    )
    if done:
        schedule.load_state_dict({**schedule.state_dict(), "last_epoch": done - 1, "_step_count": done + 1})
        schedule.step()
    return schedule


def _optimiser(trained: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    parameters = [p for p in trained.parameters() if p.requires_grad]
    decayed = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": recipe.weight_decay}]
    undecayed = [p for p in parameters if p.dim() <= 1]  # biases and normalisation are not decayed
    groups = decayed + ([{"params": undecayed, "weight_decay": 0.0}] if undecayed else [])
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=True)


@contextmanager
def _seeded(seed: int, device: str) -> Iterator[None]:
    """Seed the global generators within the context, and restore their states afterwards."""
    with torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []):
        torch.manual_seed(seed)
        yield


def _resume(output: Path, network: Network, optimiser: torch.optim.SGD, recipe: Recipe) -> int:
    """Load the state of an interrupted training and return its number of epochs done; 0 if there is none."""
    if not output.exists():
        return 0
    hint = "choose another -o, or leave out --resume"
    if output.suffix == ".safetensors":
        raise RadiotagError(f"{output} holds no optimiser state", "resume from a .pt checkpoint")
    try:
        content = torch.load(output, map_location="cpu", weights_only=True)
        saved = asdict(Recipe()) | content["recipe"]  # earlier versions may lack settings
        _refuse_another(asdict(recipe) | {"epochs": 0}, saved | {"epochs": 0})
        _refuse_another(to_metadata(network.spec), content["radiotag"])
        network.module.load_state_dict(content["model"])
        optimiser.load_state_dict(content["optimiser"])
        return int(content["epoch"])
    except RadiotagError as error:
        raise RadiotagError(f"{output} is of another training: {error}", hint) from error
    except Exception as error:  # a damaged or foreign file raises many types
        message = f"{output} is not a checkpoint of this training: {first_line(error)}"
        raise RadiotagError(message, hint) from error


def _refuse_another(wanted: dict[str, Any], saved: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if saved.get(name) != value:
            raise RadiotagError(f"its {name} is {saved.get(name)}, not {value}"[:200])


def _batches(order: Tensor, recipe: Recipe) -> list[Tensor]:
    """Split positions of images into batches of at least two, as batch normalisation needs."""
    return [batch for batch in torch.split(order, recipe.batch_size) if len(batch) > 1]


def _epoch(
    network: Network, data: Dataset, recipe: Recipe, epoch: int, course: Course, schedule: OneCycleLR | None
) -> None:
    assert schedule is not None
    optimiser, device = schedule.optimizer, course.device
    generator = torch.Generator().manual_seed(recipe.seed * 100003 + epoch)
    batches = _batches(torch.randperm(len(data.images), generator=generator), recipe)
    average = math.nan
    for i, batch in enumerate(batches):
        pixels = _views(data.images[batch], network.spec.image_size, recipe.crops, generator).to(device)
        labels = data.labels[batch].to(device)
        with mixed_precision(device):
            pixels = adversarial_examples(network, pixels, labels, generator) if recipe.robust else pixels
            loss = _loss(network, pixels, labels, course.teacher)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise RadiotagError("the training diverged", "use a lower --lr or another --seed")
        average = value if i == 0 else 0.98 * average + 0.02 * value
        course.progress(epoch, (i + 1) / len(batches), average)


def _views(images: Tensor, size: int, crops: float, generator: torch.Generator) -> Tensor:
    return augment(images, generator) if crops == 1 else random_resized_crops(images, size, crops, generator)


def _loss(network: Network, pixels: Tensor, labels: Tensor, teacher: Network | None) -> Tensor:
    logits = network(pixels).float()
    if teacher is None:
        return F.cross_entropy(logits, labels)
    with torch.no_grad():
        soft = teacher(pixels).float().softmax(1)  # a student sees nothing of the suspect but its outputs
    return F.cross_entropy(logits, soft)


@torch.no_grad()
def accuracy(network: Network, data: Dataset, device: str = "cpu", batch_size: int = 256) -> float:
    """Share of correctly classified images, in [0, 1]."""
    network.to(device)
    hits = 0
    for images, labels in zip(torch.split(data.images, batch_size), torch.split(data.labels, batch_size), strict=True):
        hits += int((network(images.to(device).float() / 255).argmax(1).cpu() == labels).sum())
    return hits / len(data.images)
