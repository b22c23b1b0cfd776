"""How a suspect takes its images, where its file does not say: its batch norms remember what they saw in training.

Tensors tell no stride, no pooling and no normalisation. A ResNet with a 3×3 stem has the same shapes with a stride of
1, as most people train it on CIFAR, and with one of 2. A network that is rebuilt wrongly knows little, and shows no
mark. But each batch norm holds the mean and the variance of its input in training. The convention under which images
come nearest to them is the suspect's own. The choice reads the suspect and the images alone: no label, no key.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

from radiotag.networks import SMALL_IMAGE, Network
from radiotag.normalisation import CONVENTIONS
from radiotag.suspect import Batching

IMAGES, LARGE_IMAGES = 64, 16  # shown, small and large ones: enough for means over images and places
NEARER = 0.7  # another convention counts if the distance is at most this part of the assumed one's
CLOSE = 0.3  # a right convention gives 0.01 on images like the suspect's, 0.2 on synthetic ones
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))  # mean and standard deviation, as is usual there
STEMS = ((2, False), (1, False), (1, True), (2, True))  # stride of the first convolution, whether a max-pool follows


class Convention(NamedTuple):
    """How images reach the first layers."""

    mean: tuple[float, ...]  # for pixels in [0, 1]
    std: tuple[float, ...]
    stem: tuple[int, bool] | None  # of STEMS; None where it is not in question

    def __str__(self) -> str:
        mean, std = (",".join(f"{value:.3g}" for value in values) for values in (self.mean, self.std))
        stem = ""
        if self.stem:
            stem = f", a stem of stride {self.stem[0]} {'with' if self.stem[1] else 'without'} max-pooling"
        return f"mean {mean}, std {std}{stem}"


def settle_convention(
    network: Network, pixels: Tensor, batching: Batching, *, fixed_normalisation: bool, fixed_stem: bool
) -> list[str]:
    """Give a suspect the convention that its batch norms remember; pixels (N, 3, H, W) in [0, 1].

    What is fixed stays. Nothing is done for a suspect whose file states its convention, or that has no batch norms.
    Returns a warning if another convention than the assumed one is taken, or if none comes near.
    """
    shown = pixels[some(len(pixels), network.spec.image_size)]
    if not network.assumed or (nearest := distance(network, shown, batching)) is None:
        return []
    assumed = best = Convention(network.spec.mean, network.spec.std, None if fixed_stem else stem_of(network))
    start = nearest
    for candidate in dict.fromkeys(candidates(assumed, fixed_normalisation=fixed_normalisation)):
        if candidate == assumed:
            continue
        take(network, candidate)
        found = distance(network, shown, batching)
        if found is not None and found < min(nearest, NEARER * start):
            nearest, best = found, candidate
    take(network, best)
    network.assumed = nearest > CLOSE
    if best != assumed:
        told = best if best.stem != assumed.stem else best._replace(stem=None)
        return [f"its batch norms fit another convention than the usual one, which was used: {told}"]
    return []


def some(count: int, size: int) -> slice:
    """Which of so many images are shown to a suspect of this size (pixels): some at even intervals."""
    images = IMAGES if size <= SMALL_IMAGE else LARGE_IMAGES
    step = max(1, count // images)
    return slice(0, step * images, step)


def candidates(assumed: Convention, *, fixed_normalisation: bool) -> Iterator[Convention]:
    """All conventions that are in question."""
    normalisations: Sequence[tuple[tuple[float, ...], tuple[float, ...]]] = [(assumed.mean, assumed.std)]
    if not fixed_normalisation:
        normalisations = [*normalisations, *CONVENTIONS, CIFAR10]
    for stem in STEMS if assumed.stem else [None]:
        yield from (Convention(mean, std, stem) for mean, std in normalisations)


def stem_of(network: Network) -> tuple[int, bool] | None:
    """The stem of a ResNet with a 3×3 convolution, whose stride and pooling its tensors do not tell; else None."""
    module = network.module
    if not isinstance(module, ResNet) or module.conv1.kernel_size != (3, 3):
        return None
    return int(module.conv1.stride[0]), isinstance(module.maxpool, nn.MaxPool2d)


def take(network: Network, convention: Convention) -> None:
    """Change a network to a convention."""
    network.normalise_by(convention.mean, convention.std)
    if convention.stem is not None:
        module = network.module
        assert isinstance(module, ResNet)
        stride, pools = convention.stem
        module.conv1.stride = (stride, stride)
        module.maxpool = nn.MaxPool2d(3, 2, 1) if pools else nn.Identity()


@torch.no_grad()
def distance(network: Network, pixels: Tensor, batching: Batching) -> float | None:
    """How far the inputs of the batch norms are from those in training; None without batch norms, or if not finite.

    The divergence of two normal distributions, of the images' mean and variance from the remembered ones: its median
    over the channels of a layer, and the mean over the layers. Channels that are dead in training count little so.
    """
    with _moments(network) as moments:
        for batch in batching.split(pixels, "conventions"):
            network(batch.to(network.device))
    found = [value for layer, sums in moments.items() if (value := _divergence(layer, sums)) is not None]
    mean = sum(found) / len(found) if found else math.nan
    return mean if math.isfinite(mean) else None


@contextmanager
def _moments(network: Network) -> Iterator[dict[nn.BatchNorm2d, list[Tensor]]]:
    """Count, sums and sums of squares by channel of each batch norm's inputs, while the network runs."""
    sums: dict[nn.BatchNorm2d, list[Tensor]] = {}

    def add(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.BatchNorm2d)
        x = inputs[0].double().movedim(1, 0).flatten(1)  # (C, n)
        seen = [torch.tensor(float(x.shape[1])), x.sum(1).cpu(), x.square().sum(1).cpu()]
        sums[layer] = [a + b for a, b in zip(sums[layer], seen, strict=True)] if layer in sums else seen

    layers = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None]
    hooks = [layer.register_forward_pre_hook(add) for layer in layers]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def _divergence(layer: nn.BatchNorm2d, sums: Sequence[Tensor]) -> float | None:
    """Median over the channels of the Kullback–Leibler divergence of normal distributions, in nats."""
    count, total, squares = sums
    assert layer.running_mean is not None and layer.running_var is not None
    mean = total / count  # (C,)
    variance = (squares / count - mean.square()).clamp_min(1e-12)
    before = layer.running_var.cpu().double().clamp_min(1e-12)
    ratio = variance / before
    far = ((mean - layer.running_mean.cpu().double()).square() / before + ratio - 1 - ratio.log()) / 2
    value = float(far.median())
    return value if math.isfinite(value) else None
