"""Make what the package holds: the built-in marking network from a checkpoint, and images inverted from it.

`withstands` measures how long a network takes to read, what share of held-out images it classifies right, and what
share of 500 of them still when they are attacked.

    mkdir -p both/train && cp -r cifar10/train/* tiny-imagenet-100/train/* both/train
    radiotag train-demo both/train -o both.pt --arch resnet10 --epochs 8 --seed 1 --image-size 32 --stem small
    radiotag train-demo both/train -o marker.pt --init both.pt --robust --epochs 6 --lr 0.05 --seed 1
    python tests/benchmarks/pack_builtin.py network marker.pt
    python tests/benchmarks/pack_builtin.py images
    python tests/benchmarks/pack_builtin.py withstands marker.pt both/val

The weights are rounded to int8, a quarter of the bytes. The images are what the rounded network makes of dead leaves
when they are moved towards its classes and the statistics of its batch normalisation, with one thread (another number
rounds differently).
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from radiotag.images import png
from radiotag.networks import BUILTIN, load_network, pack, to_metadata
from radiotag.synthetic import INVERTED, dead_leaves
from radiotag.training import accuracy, load_folder

STEPS, BATCH, COUNT, SEED = 150, 100, 400, 7


def network(checkpoint: Path) -> None:
    trained = load_network(checkpoint)
    metadata = {"radiotag": json.dumps(to_metadata(trained.spec), sort_keys=True)}
    BUILTIN.write_bytes(safetensors.torch.save(pack(trained.module.state_dict()), metadata))
    print(f"{BUILTIN}: {BUILTIN.stat().st_size / 1e6:.2f} MB")


def images() -> None:
    torch.set_num_threads(1)
    model, differences = load_network(BUILTIN).eval(), []

    def compare(layer: nn.BatchNorm2d, inputs: tuple[Tensor], _: Tensor) -> None:
        mean, variance = inputs[0].mean((0, 2, 3)), inputs[0].var((0, 2, 3), unbiased=False)
        wanted = layer.running_var.clamp_min(1e-3)
        far = ((mean - layer.running_mean) ** 2 / wanted).mean()
        differences.append(far + ((variance / wanted).clamp_min(1e-4).log() ** 2).mean())

    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(compare)
    generator, found = torch.Generator().manual_seed(SEED), []
    for start in range(0, COUNT, BATCH):
        labels = torch.arange(start, start + BATCH) % model.spec.classes
        x = (dead_leaves(BATCH, 32, seed=SEED + start).float() / 255).requires_grad_()
        optimiser = torch.optim.Adam([x])
        for step in range(STEPS):
            optimiser.param_groups[0]["lr"] = 0.04 * min(1, (step + 1) / 10) * (1 - step / STEPS) + 1e-4
            shifts = torch.randint(-2, 3, (2,), generator=generator).tolist()
            view = torch.roll(x, shifts, (2, 3))
            view = view.flip(3) if torch.rand(1, generator=generator) < 0.5 else view
            differences.clear()
            loss = F.cross_entropy(model(view), labels) + 5 * sum(differences) / len(differences)
            loss = loss + (x[:, :, 1:] - x[:, :, :-1]).square().mean() + (x[..., 1:] - x[..., :-1]).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                x.clamp_(0, 1)
        found.append((x.detach() * 255).round().to(torch.uint8))
        print(f"{start + BATCH} of {COUNT} images, loss {loss.item():.3f}", flush=True)
    write_sheet(torch.cat(found))


def write_sheet(tiles: Tensor) -> None:
    """(400, 3, 32, 32) as one picture of 20 x 20 tiles."""
    rows = tiles.numpy().reshape(20, 20, 3, 32, 32).transpose(0, 3, 1, 4, 2)
    INVERTED.write_bytes(png(np.ascontiguousarray(rows.reshape(640, 640, 3))))
    print(f"{INVERTED}: {INVERTED.stat().st_size / 1e6:.2f} MB")


def withstands(checkpoint: Path, held_out: Path) -> None:
    """Ten steps up the loss, each of a quarter of the L2 distance allowed, pixels in [0, 1]."""
    started = time.monotonic()
    model = load_network(checkpoint).eval()
    took = time.monotonic() - started
    data = load_folder(held_out, model.spec.image_size, model.spec.class_names)
    print(f"read in {took:.2f} s; {accuracy(model, data):.2%} of {len(data.labels)} images")
    chosen = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(0))[:500]
    x, y = data.images[chosen].float() / 255, data.labels[chosen]  # (500, 3, S, S), (500,)
    for radius in (0.25, 0.5):
        moved = x
        for _ in range(10):
            at = moved.clone().requires_grad_()
            (uphill,) = torch.autograd.grad(F.cross_entropy(model(at), y, reduction="sum"), at)
            step = moved - x + radius / 4 * F.normalize(uphill.flatten(1), dim=1).view_as(x)
            length = step.flatten(1).norm(dim=1).clamp_min(radius).view(-1, 1, 1, 1)
            moved = (x + step * radius / length).clamp(0, 1)
        with torch.no_grad():
            right = (model(moved).argmax(1) == y).float().mean().item()
        print(f"L2 distance {radius}: {right:.1%} of {len(y)} images")


if __name__ == "__main__":
    {"network": network, "images": images, "withstands": withstands}[sys.argv[1]](*map(Path, sys.argv[2:]))
