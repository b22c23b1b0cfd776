"""Networks and their files: building, recognising and safely reading any torchvision classifier.

A suspect's file is hostile input. This module never unpickles code: PyTorch files are read with `weights_only=True`,
or where they name other classes, as inert objects (`radiotag.inert`). A file's metadata (architecture, sizes, names)
are checked before they are used.
"""

import contextlib
import functools
import importlib.util
import inspect
import io
import json
import math
import mmap
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, TypeGuard, cast

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.vgg import VGG

from radiotag import plainjson
from radiotag.errors import RadiotagError, first_line, out_of_memory
from radiotag.files import write_atomically
from radiotag.foreign import HEAD, file_kind, kind_of
from radiotag.inert import Inert, load_inert
from radiotag.pickles import TooLarge, check_pickles
from radiotag.programs import grown, read_archive
from radiotag.weights import COUNTERS, Found, state_dicts, versions

SMALL_IMAGE = 64  # pixels; networks for inputs up to this size get the small-image stem by default
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # fallback; its use is reported
BUILTIN = Path(__file__).with_name("builtin.safetensors")
LEGACY_PICKLES = 5  # in a file of torch.save before 1.6: magic number, protocol, system, content, storages
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # extra heads of GoogLeNet and Inception, only used for training
OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")  # old names, used by torchvision's weight files
BARE = "save the bare weights: torch.save(model.state_dict(), FILE), or a safetensors file"
NO_CLASSIFIER = "radiotag tests image classifiers alone; if it is one, name it with --arch FILE.py:FUNCTION"
CHECKPOINTS = "a checkpoint of train-demo or of a torchvision classifier"  # what keygen accepts as a marking network
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt"}
DEVICES = ("auto", "cpu", "cuda", "mps")
SHELLS = {getattr(torch, "float4_e2m1fn_x2", None)}  # types that PyTorch stores but cannot convert
State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """Everything except the weights that is needed to run a network as it was trained."""

    architecture: str
    classes: int
    small_stem: bool  # 3×3 convolution and half the stock reduction; a stock stem leaves a 1×1 map at 32 pixels
    image_size: int  # pixels, square
    mean: tuple[float, ...]  # for pixels in [0, 1], one per channel
    std: tuple[float, ...]
    class_names: tuple[str, ...] | None = None


def channels_first(rgb: NDArray[Any]) -> Tensor:
    """(H, W, 3) → (3, H, W) float."""
    return torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1), dtype=np.float32))


def resized(pixels: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) → (B, 3, size, size) like Pillow's bilinear filter; the same tensor if it already has this size."""
    if pixels.shape[-2:] == (size, size):
        return pixels
    return F.interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)


class Network(nn.Module):
    """A classifier with its input convention: it takes pixels in [0, 1], and resizes and normalises them itself."""

    def __init__(self, module: nn.Module, spec: Spec, *, own_layout: bool = False) -> None:
        """own_layout: keep PyTorch's default memory layout, which modules that use `.view` need."""
        super().__init__()
        self.layout = torch.contiguous_format if own_layout else torch.channels_last
        self.module, self.spec = module.eval().requires_grad_(False), spec
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, -1, 1, 1), persistent=False)
        self.head: nn.Linear | None = None
        self.assumed = False  # input size and normalisation are guessed, because the file has none
        self.taken = ""  # what of its file was taken, if that holds more than one network

    def prepare(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] → the network's input (B, 3, S, S)."""
        pixels = resized(pixels, self.spec.image_size)
        return ((pixels - self.mean) / self.std).contiguous(memory_format=self.layout)  # type: ignore[operator]

    def normalise_by(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Take another normalisation, for pixels in [0, 1]."""
        self.spec = replace(self.spec, mean=tuple(mean), std=tuple(std))
        self.get_buffer("mean").copy_(torch.tensor(mean).view(1, -1, 1, 1))
        self.get_buffer("std").copy_(torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] → logits (B, C)."""
        logits: Tensor = self.module(self.prepare(pixels))
        return logits

    def features(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] → penultimate features (B, d): the input of the last linear layer.

        RadiotagError if the network does not end in a linear layer.
        """
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
    def device(self) -> torch.device:
        """The device on which the network computes."""
        return self.get_buffer("mean").device

    @property
    def dimension(self) -> int:
        """Number of penultimate features d. RadiotagError if the network does not end in a linear layer."""
        if self.head is None:
            raise RadiotagError(f"{self.spec.architecture} does not end in a linear layer")
        return self.head.in_features


def available_device(name: str) -> str:
    """The device of a name in DEVICES, the best there is for "auto". RadiotagError if it is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return "cuda" if there["cuda"] else "mps" if there["mps"] else "cpu"
    kind = name.split(":", maxsplit=1)[0]  # cuda:1 for one
    if not there.get(kind, False):
        raise RadiotagError(f"the device '{name}' is not available", f"use one of {', '.join(DEVICES)}")
    return name


def mixed_precision(device: str) -> torch.autocast:
    """Compute convolutions and matrix products in bfloat16 on processors with matrix instructions for it (AMX).

    This is for marking and training on the CPU. It takes little more than half of the time there, and marks are as
    strong. With vector instructions alone (AVX-512) it saves nothing, and doubles the time of some networks.
    Verification always computes in full precision.
    """
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    native = device == "cpu" and capabilities.get("amx_bf16", False)
    return torch.autocast("cpu", torch.bfloat16, enabled=native)


@torch.no_grad()
def find_head(network: Network) -> tuple[nn.Linear | None, int]:
    """The linear layer whose output is the network's output (None if there is none), and the number of outputs.

    The function runs the network. RadiotagError if it cannot run at its input size, or returns no class scores.
    """
    calls: list[tuple[nn.Linear, Tensor]] = []
    layers = [m for m in network.modules() if isinstance(m, nn.Linear)]
    hooks = [m.register_forward_hook(lambda m, _, out: calls.append((m, out))) for m in layers]
    size = network.spec.image_size
    try:
        logits = network(torch.full((2, 3, size, size), 0.5, device=network.device))
    except Exception as error:  # the image is too small for the strides, or a user's module raises anything
        message = f"{network.spec.architecture} does not run at {size} pixels: {first_line(error)}"
        raise RadiotagError(message, "give the size that it was trained at: --image-size S") from error
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        message = f"{network.spec.architecture} gives {shape} of two images, not a row of class scores each"
        raise RadiotagError(message, "name a function whose network returns logits, (images, classes)")
    is_output = calls and calls[-1][1].shape == logits.shape and torch.equal(calls[-1][1], logits)
    return calls[-1][0] if is_output else None, logits.shape[1]


# ---------------------------------------------------------------- building


def architectures() -> tuple[str, ...]:
    """All torchvision classifiers, and resnet10, which has one basic block per stage and suits small machines."""
    names = torchvision.models.list_models(module=torchvision.models)
    return ("resnet10", *sorted(names))


def build(spec: Spec) -> nn.Module:
    """The untrained network of a spec, with PyTorch's default initialisation (global generator).

    RadiotagError for an unknown architecture, or one that cannot have the image size.
    """
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
    except (RuntimeError, ValueError, AssertionError) as error:  # ViT: image size not a multiple of the patch
        raise RadiotagError(f"{name} cannot be built for {spec.image_size} pixels: {error}") from error
    if spec.small_stem and not name.startswith("vit_"):
        shrink_stem(module)
    return module.to(memory_format=torch.channels_last)


def shrink_stem(module: nn.Module) -> None:
    """Replace a stock stem by one for small images: half the reduction, 3×3 kernel, no first max-pool.

    A VGG already has such a stem. It loses the 49 copies of its 1×1 map (at 32 pixels), with 100 million weights.
    """
    if isinstance(module, VGG):
        module.avgpool, module.classifier[0] = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 4096)
        return
    convolution = next(name for name, m in module.named_modules() if isinstance(m, nn.Conv2d))
    pool = next((name for name, m in module.named_modules() if isinstance(m, nn.MaxPool2d)), None)
    stock = module.get_submodule(convolution)
    assert isinstance(stock, nn.Conv2d)
    stride = max(1, min(2, stock.stride[0]) if pool else stock.stride[0] // 2)
    if pool:
        module.set_submodule(pool, nn.Identity())
    if stock.kernel_size[0] > 3 or stride != stock.stride[0]:
        small = nn.Conv2d(stock.in_channels, stock.out_channels, 3, stride, 1, bias=stock.bias is not None)
        nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
        module.set_submodule(convolution, small)


def from_state(state: Mapping[str, Tensor], spec: Spec, *, builder: Callable[..., Any] | None = None) -> Network:
    """A network with these weights, loaded strictly. RadiotagError if they do not fit."""
    module = _skeleton(spec) if builder is None else _call_builder(builder, spec)
    full = module.state_dict()  # keep this object: it holds versions, which MNASNet requires
    types = {k: v.dtype for k, v in full.items()}
    for name in [k for k in types if not k.endswith("num_batches_tracked")]:
        del full[name]
    weights = state if builder else _without_auxiliary(state)
    full.update({k: v.detach().to(types.get(k, v.dtype), copy=True) for k, v in weights.items()})
    try:
        module.load_state_dict(full, strict=True, assign=True)
    except RuntimeError as error:
        message = f"the weights do not fit {spec.architecture}: {first_line(error)}"
        raise RadiotagError(message, "name it with --arch") from error
    if builder is None:
        module = module.to(memory_format=torch.channels_last)
    network = Network(module, spec, own_layout=builder is not None)
    network.head, outputs = find_head(network)
    if builder and outputs != spec.classes:
        network.spec = replace(spec, classes=outputs, class_names=None)
    return network


def wrap_module(
    module: nn.Module,
    *,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Network:
    """Wrap a module in memory with its input convention. The module itself is set to evaluation mode.

    image_size: pixels, square; mean and std: for pixels in [0, 1]. The defaults are those of ImageNet, and `assumed` is
    set. RadiotagError if the module does not return class scores.
    """
    spec = Spec(
        architecture=type(module).__name__,
        classes=1,
        small_stem=False,
        image_size=image_size or 224,
        mean=tuple(mean or IMAGENET_MEAN),
        std=tuple(std or IMAGENET_STD),
    )
    network = Network(module, spec, own_layout=True)
    network.head, classes = find_head(network)
    network.spec = replace(spec, classes=classes)
    network.assumed = not (image_size and mean and std)
    return network


def _call_builder(builder: Callable[..., Any], spec: Spec) -> nn.Module:
    parameters = inspect.signature(builder).parameters
    passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())  # def resnet18(**kwargs), as is common
    try:
        if "num_classes" in parameters:
            module = builder(num_classes=spec.classes)
        else:
            module = _build_either_way(builder, spec.classes) if passes_on else builder()
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise RadiotagError(f"{spec.architecture} failed: {reason}", _way_out(spec.architecture, parameters)) from error
    if not isinstance(module, nn.Module):
        raise RadiotagError(f"{spec.architecture} returned {type(module).__name__}, not a torch.nn.Module")
    return module.float()


def _way_out(architecture: str, parameters: Mapping[str, inspect.Parameter]) -> str:
    """What to do about a function that failed: most lack the arguments that its author gave it."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind not in kinds and n != "num_classes"]
    if not needed:
        return "fix the function, or name another one"
    file, _, function = architecture.rpartition(":")
    given = ", ".join(f"{name}=…" for name in needed)
    stem = Path(file).stem
    return (
        f"write net.py beside it, with its values (from {stem} import {function}; def net(): return "
        f"{function}({given})), and give --arch net.py:net"
    )


def _build_either_way(builder: Callable[..., Any], classes: int) -> object:
    try:
        return builder(num_classes=classes)
    except TypeError:  # the function that gets **kwargs does not accept this one
        return builder()


def builder_from(argument: str) -> Callable[..., Any]:
    """The function named by FILE.py:FUNCTION. This runs the user's Python file. RadiotagError if that fails."""
    file, _, function = argument.rpartition(":")
    path = Path(file)
    root, name = _package(path)
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise RadiotagError(f"cannot read {file}", "--arch takes a torchvision name or FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(root))  # for modules beside it
    try:
        if "." in name:
            importlib.import_module(name.rpartition(".")[0])  # its package, which relative imports start from
        sys.modules[name] = module  # dataclasses look up their module there
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise RadiotagError(f"{file} failed: {reason}", "--arch takes a file that can be imported") from error
    finally:
        sys.path.pop(0)
    if not callable(getattr(module, function, None)):
        raise RadiotagError(f"{file} has no function '{function}'", "--arch takes FILE.py:FUNCTION")
    return getattr(module, function)  # type: ignore[no-any-return]


def _package(path: Path) -> tuple[Path, str]:
    """The folder from which a Python file is imported, and its module's name, with its packages if it lies in some."""
    folder = path.resolve().parent
    root, names = folder, list[str]()
    while (root / "__init__.py").is_file() and root != root.parent:
        root, names = root.parent, [root.name, *names]
    if not names:
        return folder, f"radiotag_arch_{path.stem}"
    return root, ".".join([*names, path.stem])


# ---------------------------------------------------------------- recognising


class _WithoutStorage(TorchFunctionMode):
    """Build networks in milliseconds, without random numbers: weights have shapes, but no storage.

    `torch.device("meta")` would fail for RegNet, because it also applies to numbers from which RegNet computes widths.
    """

    def __torch_function__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        name, values = getattr(func, "__name__", ""), dict(kwargs or {})
        if func is torch.empty:
            values["device"] = "meta"
        initialises = name.endswith("_") and not name.startswith("_") and name != "requires_grad_"
        if initialises and (
            name in {"normal_", "uniform_"} or (args and isinstance(args[0], Tensor) and args[0].is_meta)
        ):
            return args[0] if args else values["tensor"]
        return func(*args, **values)


def _skeleton(spec: Spec) -> nn.Module:
    """The network of a spec, with parameters without storage."""
    with _WithoutStorage():
        return build(spec)


def _stock_shapes(name: str, stem: bool, image_size: int) -> Shapes:
    """The shapes of an architecture's tensors for one class, in the network's own order."""
    spec = Spec(architecture=name, classes=1, small_stem=stem, image_size=image_size, mean=(), std=())
    return _shapes(_skeleton(spec).state_dict())


def _size(name: str) -> int:
    """Number of parameters for 1000 classes, as published by torchvision."""
    if name == "resnet10":
        return 5_418_792
    return int(torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"])


def _family(name: str) -> str:
    return "torchvision.models.resnet" if name == "resnet10" else torchvision.models.get_model_builder(name).__module__


def recognise(
    state: Mapping[str, Tensor], stock_shapes: Callable[[str, bool, int], Shapes] | None = None
) -> tuple[str, bool, int | None] | None:
    """(architecture, small stem, input size of a ViT) with these names and shapes of tensors; None if unknown.

    Candidates are tried by their number of parameters, closest first, so that few are built. If the first or last
    tensor of a candidate has another name, its whole family (a module of torchvision) is skipped.
    """
    shapes, stock_shapes = _shapes(_without_auxiliary(state)), stock_shapes or _stock_shapes
    count = sum(math.prod(shape) for name, shape in shapes.items() if "running_" not in name)
    image_size = _vit_image_size(state)
    excluded = set()
    for name in sorted(architectures(), key=lambda name: abs(_size(name) - count)):
        if name.startswith("vit_") != (image_size is not None) or _family(name) in excluded:
            continue
        try:
            stock = stock_shapes(name, False, image_size or 224)
        except RadiotagError:  # a ViT with another patch size
            continue
        names = list(stock)
        if names[0] not in shapes or names[-1] not in shapes:
            excluded.add(_family(name))
        elif stock.keys() == shapes.keys():
            for stem in (False, True)[: 1 if image_size else 2]:
                if _same(shapes, stock_shapes(name, stem, image_size or 224)):
                    return name, stem, image_size
    return None


def _same(shapes: Shapes, stock: Shapes) -> bool:
    """Whether the shapes equal `stock`, except for the number of classes."""
    head = _head_name(stock)
    rows = shapes[head][:1]
    by_class = (head, head.removesuffix("weight") + "bias")
    expected = {k: (*rows, *v[1:]) if k in by_class else v for k, v in stock.items()}
    return shapes == expected


def _head_name(shapes: Shapes) -> str:
    """The last weight matrix in a network's own order; in all torchvision classifiers its rows are the classes."""
    return [name for name, shape in shapes.items() if len(shape) >= 2][-1]


def _shapes(state: Mapping[str, Tensor]) -> Shapes:
    return {k: tuple(v.shape) for k, v in state.items() if not k.endswith("num_batches_tracked")}


def _without_auxiliary(state: Mapping[str, Tensor]) -> State:
    return {k: v for k, v in state.items() if not k.startswith(AUXILIARY)}


def _vit_image_size(state: Mapping[str, Tensor]) -> int | None:
    position, patch = state.get("encoder.pos_embedding"), state.get("conv_proj.weight")
    if position is None or patch is None or position.dim() != 3 or patch.dim() != 4:
        return None
    return round(math.sqrt(max(position.shape[1] - 1, 1))) * int(patch.shape[-1]) or None


# ---------------------------------------------------------------- checkpoints


def check_file(path: Path) -> None:
    """RadiotagError if there is no file at this path."""
    if path.is_dir():
        inside = sorted(found.name for found in path.iterdir() if found.suffix in WEIGHT_SUFFIXES)
        hint = f"give the file with its weights: {path / inside[0]}" if inside else "give the file with its weights"
        raise RadiotagError(f"{path} is a folder", hint)
    if not path.is_file():
        raise RadiotagError(f"{path} is not a file" if path.exists() else f"no such file: {path}", "check the path")


def read_checkpoint(path: Path) -> tuple[State, dict[str, Any]]:
    """Tensors and radiotag's metadata ({} if none) of a .pt/.pth/.th/.pt2/.safetensors file.

    No code in the file is ever run. RadiotagError for a file that cannot be read safely or holds no state dict.
    """
    found, metadata = _read_file(path)
    return clean_state(found[0].values, path), metadata


def _read_file(path: Path) -> tuple[list[Found], dict[str, Any]]:
    """The state dicts in a file, the likeliest first, and radiotag's metadata."""
    try:
        check_file(path)
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise RadiotagError(f"cannot read {path}: {error.strerror}", "check the file and its permissions") from error
    if (kind := file_kind(head)) and head[8:9] != b"{":
        raise RadiotagError(f"{path} is {kind[0]}", kind[1])
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return _read_safetensors(path)
    return _read_torch(path, head)


def _read_safetensors(path: Path) -> tuple[list[Found], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = plainjson.parse((file.metadata() or {}).get("radiotag", "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, ValueError, TypeError, AttributeError, RuntimeError, OSError) as error:
        raise RadiotagError(f"{path} is not a whole safetensors file: {first_line(error)}", "copy it again") from error
    return [Found("", state)], metadata if isinstance(metadata, dict) else {}


def _read_torch(path: Path, head: bytes) -> tuple[list[Found], dict[str, Any]]:
    content: Any
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = read_archive(path) if head.startswith(b"PK") else _read_pickles(path)
        _refuse_growth(content, path)
        found = state_dicts(content)
    except RadiotagError:
        raise
    except TooLarge as error:
        raise grown(path) from error
    except Exception as error:  # weights_only raises many types, which mean the same to a user
        if out_of_memory(error):  # caused by the machine, not by the file
            raise
        reason = "holds a pickle that is more than weights" if "weights_only" in str(error) else "is not a whole file"
        raise RadiotagError(f"{path} {reason}; it was not run", BARE) from error
    if not found:
        raise RadiotagError(f"{path} holds no weights", "save model.state_dict()")
    metadata = content.get("radiotag", {}) if isinstance(content, dict) else {}
    return found, metadata if isinstance(metadata, dict) else {}


def _is_tampered(value: object) -> bool:
    return isinstance(value, dict) and not getattr(value, "__dict__", {}).keys() <= {"_metadata"}  # state dicts have it


def _refuse_growth(content: object, path: Path) -> None:
    """RadiotagError if tensors, nested at any depth, are larger than their file."""
    pending, seen, sizes = [content], set[int](), dict[int, int]()
    while pending:
        value = pending.pop()
        if _is_usable(value):
            storage = Tensor.untyped_storage(value)
            sizes[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict | list | tuple | set | Inert) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, Inert):
                pending += [value.state, value.items, value.parts]
            else:
                pending += dict.values(value) if isinstance(value, dict) else value
            if _is_tampered(value):
                raise ValueError("a mapping whose methods the file has replaced")
    if sum(sizes.values()) > path.stat().st_size:
        raise grown(path)


def _read_pickles(path: Path) -> Any:
    """Read a file of PyTorch before 1.6: pickles, followed by the weights."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        # A mapped file cannot return more bytes than it has.
        if check_pickles(cast(IO[bytes], mapped), LEGACY_PICKLES, len(mapped)):
            return torch.load(file, map_location="cpu", weights_only=True)
        return load_inert(io.BytesIO(mapped))  # PyTorch would read a file as a tar archive if it can, but no buffer


def _without(state: State, prefixes: Iterable[str]) -> State:
    """Remove each of these prefixes in turn from the names, if all names have it."""
    for prefix in prefixes:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def clean_state(content: Mapping[Any, Any], path: Path) -> State:
    """The tensors in float32, without wrapper prefixes, int8 weights unpacked. RadiotagError unless all are finite."""
    plain = Tensor.detach  # not v.detach(): a file can put attributes of any name on a tensor
    state = {k: plain(v).as_subclass(Tensor) for k, v in content.items() if isinstance(k, str) and _is_usable(v)}
    parts = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in state.values()}
    if sum(v.numel() * v.element_size() for v in state.values()) > 4 * sum(parts.values()) + 2**26:
        raise RadiotagError(f"{path}: its tensors are larger than what is stored of them", "save the weights again")
    state.pop("n_averaged", None)  # added by PyTorch's AveragedModel
    state = _without(state, ("module.", "_orig_mod.", "module."))
    state = {OLD_DENSENET.sub(r"\1\2", k): v.float() if v.is_floating_point() else v for k, v in state.items()}
    state = unpack(state)
    if not state:
        raise RadiotagError(f"{path} holds no weights", "save model.state_dict()")
    broken = next((k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()), None)
    if broken is not None:
        message = f"{path}: the tensor {broken!r} is not finite"
        raise RadiotagError(message, "the training diverged, or the file is damaged")
    return state


def _is_usable(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a plain tensor of real numbers, not sparse, nested, quantised, complex or without storage."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    return not (value.is_nested or value.is_quantized or value.dtype.is_complex or value.dtype in SHELLS)


def pack(state: Mapping[str, Tensor]) -> State:
    """Store weights of two or more dimensions as int8 with a scale per output channel: a quarter of the bytes."""
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
    """The inverse of `pack`, in float32. Other tensors stay as they are."""
    packed = {k for k, v in state.items() if v.dtype == torch.int8 and v.dim() >= 2 and f"{k}.scale" in state}
    packed = {k for k in packed if state[f"{k}.scale"].shape == (len(state[k]), *[1] * (state[k].dim() - 1))}
    scales = {f"{k}.scale" for k in packed}
    return {k: v.float() * state[f"{k}.scale"] if k in packed else v for k, v in state.items() if k not in scales}


def spec_from(metadata: Mapping[str, Any]) -> Spec | None:
    """A checked Spec from a checkpoint's metadata, which may be hostile; None if they are unusable."""
    try:
        names = metadata.get("class_names")
        if not isinstance(metadata["architecture"], str) or not (names is None or _are_names(names)):
            return None
        if not all(isinstance(metadata[name], list | tuple) and len(metadata[name]) == 3 for name in ("mean", "std")):
            return None
        spec = Spec(
            architecture=metadata["architecture"],
            classes=int(metadata["classes"]),
            small_stem=bool(metadata["small_stem"]),
            image_size=int(metadata["image_size"]),
            mean=tuple(float(v) for v in metadata["mean"]),
            std=tuple(float(v) for v in metadata["std"]),
            class_names=tuple(names) if names else None,
        )
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError):
        return None
    sane = 1 <= spec.image_size <= 2048 and 1 <= spec.classes <= 10**6
    sane = sane and all(map(math.isfinite, spec.mean)) and all(1e-6 < s < 1e6 for s in spec.std)
    sane = sane and (spec.class_names is None or len(spec.class_names) == spec.classes)
    return spec if sane else None


def _are_names(names: object) -> bool:
    return isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)


def load_network(
    path: Path,
    *,
    architecture: str | None = None,
    image_size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    largest: int | None = None,
) -> Network:
    """Read a checkpoint into a runnable network. Options override the file's metadata and what is recognised.

    RadiotagError for a file that cannot be read or run, and for one that asks for images of more than `largest` pixels:
    the network never runs at such a size unless `image_size` allows it.
    """
    found, metadata = _read_file(path)
    described = spec_from(metadata)
    builder = builder_from(architecture) if architecture and ":" in architecture else None
    try:
        state, taken = _choose(found, path, _fit(architecture, builder, described))
        if described is None or (architecture and architecture != described.architecture):
            spec = _guess(state, architecture, builder, image_size or (described.image_size if described else None))
            spec = replace(spec, mean=described.mean, std=described.std) if described else spec
            names = described.class_names if described and described.classes == spec.classes else None
            spec = replace(spec, class_names=names)
        else:
            spec = described
        spec = replace(spec, image_size=image_size or spec.image_size, mean=mean or spec.mean, std=std or spec.std)
        if largest and spec.image_size > max(largest, image_size or 0):
            hint = f"if that is right, allow it: --image-size {spec.image_size}"
            raise RadiotagError(f"it asks for images of {spec.image_size} pixels", hint)
        network = from_state(state, spec, builder=builder)
    except RadiotagError as error:
        raise RadiotagError(f"{path}: {error}", error.hint) from error
    network.assumed, network.taken = described is None, taken
    return network


def _fit(
    architecture: str | None, builder: Callable[..., Any] | None, described: Spec | None
) -> Callable[[State], bool]:
    """The test whether tensors are those of a network: of the one described or named, or of any that is known."""
    if builder is not None or architecture in architectures():
        spec = Spec(architecture=architecture or "", classes=2, small_stem=False, image_size=224, mean=(), std=())
        names = _shapes((_call_builder(builder, spec) if builder else _skeleton(spec)).state_dict()).keys()
        return lambda state: _shapes(state if builder else _without_auxiliary(state)).keys() == names
    if described is not None:
        return lambda _: True
    stock = functools.cache(_stock_shapes)  # for this file alone
    return lambda state: recognise(state, stock) is not None


def _choose(found: Sequence[Found], path: Path, fits: Callable[[State], bool]) -> tuple[State, str]:
    """The tensors of the first network in a file that fits, else its likeliest ones; and what was taken, if it matters.

    RadiotagError for tensors that are not finite.
    """
    for one in found:
        state = clean_state(one.values, path)
        for version in versions(state):
            if fits(version):
                left = sum(name.rpartition(".")[2] not in COUNTERS for name in state) - len(version)
                return version, _taken(one, found, left)
    return clean_state(found[0].values, path), ""


def _taken(one: Found, found: Sequence[Found], left: int) -> str:
    """What was taken from a file that holds more than one network."""
    others = [f"'{other.place}'" for other in found if other is not one and 2 * other.size >= one.size]
    text = f"the weights are those under '{one.place}', not {', '.join(others)}" if others else ""
    rest = f"{left} of its tensors are not of the network" if left > 0 else ""
    return "; ".join(part for part in (text, rest) if part)


def _guess(state: State, architecture: str | None, builder: Callable[..., Any] | None, image_size: int | None) -> Spec:
    """The Spec of a network without metadata, from its tensors and, if given, its architecture."""
    stem, size, recognised = False, None, None
    if builder is None:
        recognised = recognise(state)
        if recognised and architecture in (None, recognised[0]):
            architecture, stem, size = recognised
    if architecture is None:
        if kind := kind_of(state):
            raise RadiotagError(f"it looks like {kind}, not an image classifier", NO_CLASSIFIER)
        raise RadiotagError("unknown architecture", "name it with --arch NAME or --arch FILE.py:FUNCTION")
    usual_size, mean, std = published_input(architecture)
    size = size or image_size or (32 if stem else usual_size)
    spec = Spec(architecture=architecture, classes=2, small_stem=stem, image_size=size, mean=mean, std=std)
    if builder is None:
        return replace(spec, classes=_output_size(state, _stock_shapes(architecture, stem, size)))
    two, three = (_shapes(_call_builder(builder, replace(spec, classes=n)).state_dict()) for n in (2, 3))
    heads = [k for k, shape in two.items() if shape != three.get(k) and k in state and state[k].dim() > 0]
    return replace(spec, classes=len(state[heads[-1]]) if heads else 1)


def _output_size(state: State, order: Iterable[str]) -> int:
    """Number of rows of the last weight matrix in the network's own order; a file may have another order."""
    shapes = _shapes({name: state[name] for name in order if name in state})
    return max(1, shapes[_head_name(shapes)][0]) if any(len(shape) >= 2 for shape in shapes.values()) else 1


def published_input(name: str) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """(image size, mean, std) of an architecture's published weights; ImageNet's defaults if there are none."""
    if name == "resnet10" or name not in architectures():
        return 224, IMAGENET_MEAN, IMAGENET_STD
    transforms = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    if name in {"googlenet", "inception_v3"}:  # from TensorFlow; torchvision's builders apply it in `transform_input`
        return int(transforms.crop_size[0]), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    return int(transforms.crop_size[0]), tuple(transforms.mean), tuple(transforms.std)


def to_metadata(spec: Spec) -> dict[str, Any]:
    """A spec as JSON returns it, with lists for tuples, so that written and read metadata compare equal."""
    return dict(json.loads(json.dumps(asdict(spec))))


def save_checkpoint(path: Path, module: nn.Module, spec: Spec, extra: Mapping[str, Any] | None = None) -> None:
    """Write a checkpoint atomically: a weights-only .pt, or .safetensors (which ignores `extra`)."""
    state = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    if path.suffix == ".safetensors":
        data = safetensors.torch.save(state, metadata={"radiotag": json.dumps(to_metadata(spec), sort_keys=True)})
    else:
        buffer = io.BytesIO()
        torch.save({"model": state, "radiotag": to_metadata(spec), **(extra or {})}, buffer)
        data = buffer.getvalue()
    write_atomically(path, data)


# ---------------------------------------------------------------- marking networks


def marking_weights(name: str) -> tuple[State, dict[str, Any], int]:
    """(weights as stored, spec as plain values, dimension) for `builtin`, a torchvision name, or a checkpoint's path.

    For a torchvision name, that model's default weights are loaded through torchvision's cache. RadiotagError if there
    is no such network, or if it does not end in a linear layer.
    """
    if name == "builtin":
        network = load_network(BUILTIN)
        weights = pack(network.module.state_dict())  # a quarter of the bytes, and exactly the shipped numbers
    elif name in architectures():
        network = _pretrained(name)
        weights = dict(network.module.state_dict())
    elif Path(name).is_file():
        try:
            network = load_network(Path(name))
        except RadiotagError as error:
            needs_option = "--arch" in error.hint or "--image-size" in error.hint  # options that keygen does not have
            raise RadiotagError(str(error), f"give {CHECKPOINTS}" if needs_option else error.hint) from error
        weights = dict(network.module.state_dict())
    else:
        raise RadiotagError(f"no network '{name}'", f"use builtin, a torchvision classifier's name, or {CHECKPOINTS}")
    return weights, to_metadata(network.spec), network.dimension


def _pretrained(name: str) -> Network:
    hint = f"use --network builtin, or fetch the weights elsewhere and give their file: --network {name}.pth"
    if name == "resnet10":
        raise RadiotagError("resnet10 has no published weights", hint)
    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # torch reports downloads on stdout, which is for results
            state = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise RadiotagError(f"the weights of {name} cannot be downloaded: {error}", hint) from error
    size, mean, std = published_input(name)
    classes = len(weights.meta["categories"])
    spec = Spec(architecture=name, classes=classes, small_stem=False, image_size=size, mean=mean, std=std)
    return from_state(clean_state(state, Path(name)), spec)
