"""Networks and the files they come in: building, recognising and safely reading any torchvision classifier.

A suspect's file is hostile input. Nothing here unpickles code: PyTorch files are read with `weights_only=True`, and
what a file says of itself (architecture, sizes, names) is checked before it is believed.
"""

import importlib.util
import inspect
import json
import math
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from radiotag import RadiotagError
from radiotag.images import write_atomically

SMALL_IMAGE = 64  # pixels; up to here the stem is the small-image one
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # fallback, stated when used
BUILTIN = Path(__file__).with_name("builtin.safetensors")
State = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What is needed, beside the weights, to run a network as it was trained."""

    architecture: str
    classes: int
    small_stem: bool  # 3×3 convolution and half the stock reduction: a stock stem leaves a 1×1 map at 32 pixels
    image_size: int  # pixels, square
    mean: tuple[float, ...]  # of pixels in [0, 1], one a channel
    std: tuple[float, ...]
    class_names: tuple[str, ...] | None = None


class Network(nn.Module):
    """A classifier with its input convention: takes pixels in [0, 1], resizes and normalises them itself."""

    def __init__(self, module: nn.Module, spec: Spec) -> None:
        super().__init__()
        self.module, self.spec = module.eval().requires_grad_(False), spec
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, -1, 1, 1), persistent=False)
        self.head: nn.Linear | None = None

    def prepare(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] → the network's input (B, 3, S, S)."""
        size = self.spec.image_size
        if pixels.shape[-2:] != (size, size):
            pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)
        return ((pixels - self.mean) / self.std).contiguous(memory_format=torch.channels_last)  # type: ignore[operator]

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] → logits (B, C)."""
        logits: Tensor = self.module(self.prepare(pixels))
        return logits

    def features(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] → penultimate features (B, d): what enters the last linear layer."""
        if self.head is None:
            raise RadiotagError(f"{self.spec.architecture} does not end in a linear layer")
        caught: list[Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
        try:
            self(pixels)
        finally:
            handle.remove()
        return caught[-1].flatten(1)

    @property
    def dimension(self) -> int:
        """Number of penultimate features d."""
        if self.head is None:
            raise RadiotagError(f"{self.spec.architecture} does not end in a linear layer")
        return self.head.in_features


@torch.no_grad()
def find_head(network: Network) -> nn.Linear | None:
    """The linear layer whose output is the network's output, found by running it; None if there is none."""
    calls: list[tuple[nn.Linear, Tensor]] = []
    layers = [m for m in network.modules() if isinstance(m, nn.Linear)]
    hooks = [m.register_forward_hook(lambda m, _, out: calls.append((m, out))) for m in layers]
    size = network.spec.image_size
    try:
        logits = network(torch.full((2, 3, size, size), 0.5, device=next(network.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    if not calls or not isinstance(logits, Tensor) or calls[-1][1].shape != logits.shape:
        return None
    return calls[-1][0] if torch.equal(calls[-1][1], logits) else None


# ---------------------------------------------------------------- building


@cache
def architectures() -> tuple[str, ...]:
    """Every torchvision classifier, and resnet10: one basic block a stage, for two cores."""
    names = torchvision.models.list_models(module=torchvision.models)
    return ("resnet10", *sorted(names))


def build(spec: Spec) -> nn.Module:
    """The untrained network of a spec, in PyTorch's default initialisation (global generator)."""
    name = spec.architecture
    if name not in architectures():
        raise RadiotagError(f"unknown architecture '{name}'", "use a torchvision classifier's name, resnet18 for one")
    options: dict[str, Any] = {}
    if name in {"googlenet", "inception_v3"}:
        options = {"init_weights": True, "aux_logits": False}
    if name.startswith("vit_"):
        options = {"image_size": spec.image_size}
    try:
        if name == "resnet10":
            module: nn.Module = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=spec.classes)
        else:
            module = torchvision.models.get_model(name, weights=None, num_classes=spec.classes, **options)
    except (RuntimeError, ValueError) as error:  # ViT: image size not a multiple of the patch
        raise RadiotagError(f"{name} cannot be built for {spec.image_size} pixels: {error}") from error
    if spec.small_stem and not name.startswith("vit_"):
        shrink_stem(module)
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def shrink_stem(module: nn.Module) -> None:
    """Turn a stock stem into one for small images: half its reduction, 3×3 kernel, no first max-pool."""
    convolution = next(name for name, m in module.named_modules() if isinstance(m, nn.Conv2d))
    pool = next((name for name, m in module.named_modules() if isinstance(m, nn.MaxPool2d)), None)
    old = module.get_submodule(convolution)
    assert isinstance(old, nn.Conv2d)
    stride = max(1, min(2, old.stride[0]) if pool else old.stride[0] // 2)
    if pool:
        _replace(module, pool, nn.Identity())
    if old.kernel_size[0] > 3 or stride != old.stride[0]:
        new = nn.Conv2d(old.in_channels, old.out_channels, 3, stride, 1, bias=old.bias is not None)
        nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
        _replace(module, convolution, new)


def _replace(module: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, new)


def small_stem(image_size: int) -> bool:
    """Whether networks for this input size (pixels) take the small-image stem by default."""
    return image_size <= SMALL_IMAGE


def from_state(state: Mapping[str, Tensor], spec: Spec, *, builder: Callable[..., Any] | None = None) -> Network:
    """A network with these weights, loaded strictly. Raises RadiotagError where they do not fit."""
    module = build(spec) if builder is None else _call_builder(builder, spec)
    wanted = module.state_dict()
    full = {**{k: v for k, v in wanted.items() if k.endswith("num_batches_tracked")}, **state}
    try:
        module.load_state_dict(full, strict=True)
    except RuntimeError as error:
        line = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise RadiotagError(f"the weights do not fit {spec.architecture}: {line[:200]}", "name it with --arch") from error
    network = Network(module, spec)
    network.head = find_head(network)
    return network


def _call_builder(builder: Callable[..., Any], spec: Spec) -> nn.Module:
    takes = inspect.signature(builder).parameters
    module = builder(num_classes=spec.classes) if "num_classes" in takes else builder()
    if not isinstance(module, nn.Module):
        raise RadiotagError(f"{spec.architecture} returned {type(module).__name__}, not a torch.nn.Module")
    return module


def builder_from(argument: str) -> Callable[..., Any]:
    """The function named by FILE.py:FUNCTION, from the user's own Python file (which is run)."""
    file, _, function = argument.rpartition(":")
    path = Path(file)
    loader = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or loader is None or loader.loader is None:
        raise RadiotagError(f"cannot read {file}", "--arch takes a torchvision name or FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise RadiotagError(f"{file} has no function '{function}'", "--arch takes FILE.py:FUNCTION")
    return getattr(module, function)  # type: ignore[no-any-return]


# ---------------------------------------------------------------- recognising


def recognise(state: Mapping[str, Tensor], classes: int) -> tuple[str, bool, int | None] | None:
    """(architecture, small stem, ViT's input size) whose tensors have these names and shapes; None if unknown."""
    shapes = _shapes(state)
    image_size = _vit_image_size(state)
    for name in architectures():
        if name.startswith("vit_") != (image_size is not None):
            continue
        spec = Spec(architecture=name, classes=classes, small_stem=False, image_size=image_size or 224, mean=(), std=())
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # initialising tensors without storage is pointless, and said so
            try:
                module = build(spec)
            except (RadiotagError, RuntimeError):
                continue
        stock = _shapes(module.state_dict())
        if stock == shapes:
            return name, False, image_size
        if stock.keys() == shapes.keys():
            shrink_stem(module.to("meta"))
            if _shapes(module.state_dict()) == shapes:
                return name, True, image_size
    return None


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in state.items() if not k.endswith("num_batches_tracked")}


def _vit_image_size(state: Mapping[str, Tensor]) -> int | None:
    position, patch = state.get("encoder.pos_embedding"), state.get("conv_proj.weight")
    if position is None or patch is None:
        return None
    return round(math.sqrt(max(position.shape[1] - 1, 1))) * int(patch.shape[-1])


# ---------------------------------------------------------------- checkpoints


def read_checkpoint(path: Path) -> tuple[State, dict[str, Any]]:
    """Tensors and radiotag's own metadata ({} if none) of a .pt/.pth/.th/.safetensors file. Runs nothing of it."""
    if not path.is_file():
        raise RadiotagError(f"no such file: {path}")
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise RadiotagError(f"cannot read {path}: {error.strerror}") from error
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return _read_safetensors(path)
    return _read_torch(path, head)


def _read_safetensors(path: Path) -> tuple[State, dict[str, Any]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = json.loads((file.metadata() or {}).get("radiotag", "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise RadiotagError(f"{path} is not a whole safetensors file: {error}") from error
    return clean_state(state, path), metadata if isinstance(metadata, dict) else {}


def _read_torch(path: Path, head: bytes) -> tuple[State, dict[str, Any]]:
    if head.startswith(b"PK"):
        _refuse_programs(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # weights_only raises many kinds; each means the same to a user
        reason = "holds a pickle that is more than weights" if "weights_only" in str(error) else "is not a whole file"
        raise RadiotagError(
            f"{path} {reason}; it was not run",
            "save the bare weights: torch.save(model.state_dict(), FILE), or a safetensors file",
        ) from error
    metadata = content.get("radiotag", {}) if isinstance(content, dict) else {}
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise RadiotagError(f"{path} holds no state dict", "save model.state_dict()")
    return clean_state(content, path), metadata if isinstance(metadata, dict) else {}


def _refuse_programs(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise RadiotagError(f"{path} is truncated or damaged: {error}") from error
    if any("/code/" in name or name.endswith("constants.pkl") for name in names):
        raise RadiotagError(
            f"{path} is a TorchScript program, which is not run",
            "save the bare weights: torch.save(model.state_dict(), FILE)",
        )


def clean_state(content: Mapping[Any, Any], path: Path) -> State:
    """The tensors alone, wrapper prefixes stripped, int8 weights unpacked; all finite, or RadiotagError."""
    state = {str(k): v for k, v in content.items() if isinstance(v, Tensor) and v.layout == torch.strided}
    for prefix in ("module.", "_orig_mod.", "module."):
        if state and all(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    state = unpack(state)
    if not state:
        raise RadiotagError(f"{path} holds no weights", "save model.state_dict()")
    broken = next((k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()), None)
    if broken is not None:
        raise RadiotagError(f"{path}: the tensor {broken!r} is not finite", "the training diverged, or the file is damaged")
    return state


def pack(state: Mapping[str, Tensor]) -> State:
    """Weights of two or more dimensions as int8 with a scale per output channel: a quarter of the bytes."""
    packed: State = {}
    for name, value in state.items():
        if value.dim() < 2 or not value.is_floating_point():
            packed[name] = value.contiguous()
            continue
        scale = value.flatten(1).abs().amax(1).clamp_min(1e-12).view(-1, *[1] * (value.dim() - 1)) / 127
        packed[name] = (value / scale).round().to(torch.int8).contiguous()
        packed[f"{name}.scale"] = scale
    return packed


def unpack(state: Mapping[str, Tensor]) -> State:
    """The inverse of `pack`, in float32; leaves what was not packed as it is."""
    scales = {k for k in state if k.endswith(".scale") and k.removesuffix(".scale") in state}
    return {
        k: v.float() * state[f"{k}.scale"] if f"{k}.scale" in scales else v for k, v in state.items() if k not in scales
    }


def spec_from(metadata: Mapping[str, Any]) -> Spec | None:
    """A checked Spec from a checkpoint's own metadata; None where it says nothing usable (it may be hostile)."""
    try:
        names = metadata.get("class_names")
        spec = Spec(
            architecture=str(metadata["architecture"]),
            classes=int(metadata["classes"]),
            small_stem=bool(metadata["small_stem"]),
            image_size=int(metadata["image_size"]),
            mean=tuple(float(v) for v in metadata["mean"]),
            std=tuple(float(v) for v in metadata["std"]),
            class_names=tuple(str(n) for n in names) if names else None,
        )
    except (KeyError, TypeError, ValueError):
        return None
    sane = 1 <= spec.image_size <= 2048 and 1 <= spec.classes <= 10**6 and len(spec.mean) == len(spec.std) == 3
    sane = sane and all(map(math.isfinite, spec.mean)) and all(1e-6 < s < 1e6 for s in spec.std)
    sane = sane and (spec.class_names is None or len(spec.class_names) == spec.classes)
    return spec if sane else None


def load(
    path: Path,
    *,
    architecture: str | None = None,
    image_size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Network:
    """Read a checkpoint into a runnable network; options override what the file says or what is recognised."""
    state, metadata = read_checkpoint(path)
    said = spec_from(metadata)
    classes = said.classes if said else _output_size(state)
    builder = builder_from(architecture) if architecture and ":" in architecture else None
    if said is None or (architecture and architecture != said.architecture):
        name, stem, size = _resolve(state, classes, architecture, path)
    else:
        name, stem, size = said.architecture, said.small_stem, said.image_size
    size = image_size or size or 224
    spec = Spec(
        architecture=name,
        classes=classes,
        small_stem=stem,
        image_size=size,
        mean=mean or (said.mean if said else IMAGENET_MEAN),
        std=std or (said.std if said else IMAGENET_STD),
        class_names=said.class_names if said else None,
    )
    try:
        return from_state(state, spec, builder=builder)
    except RadiotagError as error:
        raise RadiotagError(f"{path}: {error}", error.hint) from error


def _resolve(
    state: State, classes: int, architecture: str | None, path: Path
) -> tuple[str, bool, int | None]:
    if architecture and ":" in architecture:
        return architecture, False, None
    found = recognise(state, classes)
    if architecture is None and found is None:
        raise RadiotagError(f"{path}: unknown architecture", "name it with --arch NAME or --arch FILE.py:FUNCTION")
    if found is None or (architecture and architecture != found[0]):
        assert architecture
        return architecture, False, None
    name, stem, size = found
    return name, stem, size or (32 if stem else None)


def _output_size(state: State) -> int:
    """Rows of the last weight matrix: the number of classes of every torchvision classifier."""
    weights = [v for k, v in state.items() if k.endswith("weight") and v.dim() >= 2]
    return int(weights[-1].shape[0]) if weights else 1


def to_metadata(spec: Spec) -> dict[str, Any]:
    """A spec as plain values, for a checkpoint or a key."""
    return {name: getattr(spec, name) for name in Spec.__slots__}


def save_checkpoint(path: Path, module: nn.Module, spec: Spec, extra: Mapping[str, Any] | None = None) -> None:
    """Write a checkpoint whole or not at all: weights-only .pt, or .safetensors (which takes no `extra`)."""
    state = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    metadata = json.loads(json.dumps(to_metadata(spec)))
    if path.suffix == ".safetensors":
        import safetensors.torch

        data = safetensors.torch.save(state, metadata={"radiotag": json.dumps(metadata, sort_keys=True)})
    else:
        import io

        buffer = io.BytesIO()
        torch.save({"model": state, "radiotag": metadata, **(extra or {})}, buffer)
        data = buffer.getvalue()
    write_atomically(path, data)
