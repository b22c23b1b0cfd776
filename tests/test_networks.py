"""Every torchvision classifier is rebuilt from its tensors alone; a file can only fail, with a clear error."""

import argparse
import collections
import copy
import json
import math
import pickle
import re
import struct
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from helpers import Bomb
from PIL import Image
from torch import nn

from radiotag import networks
from radiotag.errors import RadiotagError
from radiotag.networks import (
    Network,
    Spec,
    architectures,
    build,
    builder_from,
    find_head,
    from_state,
    load_network,
    pack,
    read_checkpoint,
    recognise,
    save_checkpoint,
    shrink_stem,
    spec_from,
    to_metadata,
    unpack,
)
from radiotag.weights import Found

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
SPEC = Spec(
    architecture="mnasnet0_5", classes=3, small_stem=False, image_size=32, mean=MEAN, std=STD,
    class_names=("a", "b", "c"),
)  # fmt: skip
FAMILIES = {  # name: (pixels, features), one of each of torchvision's modules
    "alexnet": (64, 4096),
    "convnext_tiny": (32, 768),
    "densenet121": (32, 1024),
    "efficientnet_b0": (32, 1280),
    "googlenet": (32, 1024),
    "inception_v3": (75, 2048),
    "maxvit_t": (224, 512),
    "mnasnet0_5": (32, 1280),
    "mobilenet_v2": (32, 1280),
    "mobilenet_v3_small": (32, 1024),
    "regnet_x_400mf": (32, 400),
    "regnet_y_400mf": (32, 440),
    "resnet18": (32, 512),
    "resnext50_32x4d": (32, 2048),
    "shufflenet_v2_x0_5": (32, 1024),
    "swin_t": (32, 768),
    "swin_v2_t": (32, 768),
    "vgg11_bn": (32, 4096),
    "vit_b_32": (64, 768),
    "wide_resnet50_2": (32, 2048),
}
LARGE = {"vgg11_bn", "alexnet", "vit_b_32", "maxvit_t", "wide_resnet50_2", "resnext50_32x4d", "swin_t"}


def original(name, classes=7, **options):
    """torchvision's own network, whose running statistics keep its signals alive and betray a forgotten buffer."""
    if name in {"googlenet", "inception_v3"}:
        options = {"init_weights": False, "aux_logits": False, **options}
    torch.manual_seed(0)
    module = torchvision.models.get_model(name, weights=None, num_classes=classes, **options).eval()
    if name.startswith("vit"):  # its head starts at zero
        nn.init.normal_(module.heads.head.weight, std=0.02)
    normalisers = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    for layer in normalisers:
        layer.momentum = 1.0
        layer.train()
    if normalisers:
        with torch.no_grad():
            module(normalised(pixels(FAMILIES.get(name, (32, 0))[0], 6, seed=1)))
    for layer in normalisers:
        layer.momentum = 0.1
    return module.eval().requires_grad_(False)


def pixels(size, count=3, seed=0):
    return torch.rand((count, 3, size, size), generator=torch.Generator().manual_seed(seed))


def normalised(x):
    return (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def meta_state(name, classes=7, small=False, image_size=224):
    return networks._skeleton(
        Spec(architecture=name, classes=classes, small_stem=small, image_size=image_size, mean=MEAN, std=STD)
    ).state_dict()


@pytest.fixture(scope="module")
def small():
    """A trained-like small network: (its torchvision module, its state)."""
    module = original("mnasnet0_5", 3)
    return module, module.state_dict()


def saved(tmp_path, content, name="model.pt", **options):
    path = tmp_path / name
    torch.save(content, path, **options)
    return path


def same_network(network, module, size=32):
    """In float64, so that a random network does not amplify rounding errors."""
    x = pixels(size).double()
    expected = copy.deepcopy(module).double()(normalised(x))
    assert expected.std(0).max() > 1e-3 * expected.abs().max()  # constant outputs would make this pass
    torch.testing.assert_close(copy.deepcopy(network).double()(x), expected, rtol=1e-6, atol=1e-6)


def with_weights(module, state):
    other = copy.deepcopy(module)
    full = other.state_dict()  # keeps the version that MNASNet asks for
    full.update(state)
    other.load_state_dict(full)
    return other


def loads(path, **options):
    return load_network(path, **{"image_size": 32, "mean": MEAN, "std": STD, **options})


# ---------------------------------------------------------------- every architecture


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LARGE)) for n in FAMILIES])
def test_a_family_is_rebuilt_from_its_tensors(name, monkeypatch):
    size, dimension = FAMILIES[name]
    module = original(name, **({"image_size": size} if name.startswith("vit") else {}))
    state = module.state_dict()
    monkeypatch.setattr(networks, "_read_file", lambda path: ([Found("", state)], {}))  # files have tests of their own
    network = loads(Path("x.pt"), image_size=size)
    assert network.spec.architecture == name
    assert network.spec.classes == 7
    assert network.dimension == dimension == network.head.in_features
    x, network, module = pixels(size).double(), network.double(), module.double()
    torch.testing.assert_close(network(x), module(normalised(x)), rtol=1e-6, atol=1e-6)
    assert network(x).std(0).max() > 1e-3 * network(x).abs().max()
    head = [key for key, value in state.items() if value.dim() == 2 and len(value) == 7][-1]
    bias = state.get(head.removesuffix("weight") + "bias", torch.zeros(7)).double()
    features = network.features(x)
    assert features.shape == (3, dimension)
    torch.testing.assert_close(features @ state[head].double().T + bias, network(x))


def test_squeezenet_has_no_linear_head(monkeypatch):
    module = original("squeezenet1_1")
    monkeypatch.setattr(networks, "_read_file", lambda path: ([Found("", module.state_dict())], {}))
    network = loads(Path("x.pt"))
    assert network.head is None
    same_network(network, module)
    with pytest.raises(RadiotagError, match="squeezenet1_1 does not end in a linear layer"):
        network.features(pixels(32))
    with pytest.raises(RadiotagError, match="does not end in a linear layer"):
        _ = network.dimension


def test_architectures_are_all_of_torchvision():
    assert set(architectures()) == {"resnet10", *torchvision.models.list_models(module=torchvision.models)}


def test_every_architecture_is_recognised():
    for name in architectures():
        shapes = networks._stock_shapes(name, False, 224)
        size = 224 if name.startswith("vit_") else None
        state = {k: torch.empty(shape, device="meta") for k, shape in sorted(shapes.items(), reverse=True)}
        assert recognise(state) == (name, False, size)


@pytest.mark.parametrize("classes", [1, 2, 1000])
@pytest.mark.parametrize("name", ["resnet10", "vit_b_16", "maxvit_t", "squeezenet1_0", "mobilenet_v3_small"])
def test_any_number_of_classes_is_recognised(name, classes):
    state = meta_state(name, classes)
    found = (name, False, 224 if name.startswith("vit_") else None)
    assert recognise(state) == found


def test_the_skeleton_has_the_shapes_of_the_real_network_and_draws_no_random_numbers():
    for name in ("regnet_x_400mf", "swin_v2_t", "mobilenet_v3_small", "googlenet"):
        before = torch.get_rng_state()
        skeleton = networks._shapes(meta_state(name))
        assert torch.equal(torch.get_rng_state(), before)
        real = {k: tuple(v.shape) for k, v in original(name).state_dict().items() if "num_batches" not in k}
        assert skeleton == real
        assert list(skeleton) == list(real)


@pytest.mark.parametrize("name", ["efficientnet_v2_s", "inception_v3"])
def test_recognition_builds_few_networks(name, monkeypatch):
    """Each takes a tenth of a second: the candidates come by their number of parameters, a family at a time."""
    state, built, real = meta_state(name), [], networks._skeleton
    monkeypatch.setattr(networks, "_skeleton", lambda spec: built.append(spec.architecture) or real(spec))
    monkeypatch.setattr(networks, "_stock_shapes", networks._stock_shapes.__wrapped__)  # without the tests' cache
    assert recognise(state)[0] == name
    assert name in built and len(built) < 15, built


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "vit_b_32"])
def test_a_tensor_too_many_too_few_or_of_another_shape_is_not_recognised(name):
    state = meta_state(name)
    middle = list(state)[len(state) // 2 // 2 * 2]
    assert recognise({**state, "extra.weight": torch.empty(3, 3)}) is None
    assert recognise({k: v for k, v in state.items() if k != middle}) is None
    assert recognise({**state, middle: torch.empty(1, 2, 3)}) is None
    assert recognise({}) is None


def test_the_published_number_of_parameters_orders_the_candidates():
    for name in ("resnet10", "resnet18", "vit_b_16", "swin_t", "regnet_y_400mf"):
        skeleton = build_meta(name, 1000)
        assert networks._size(name) == sum(p.numel() for p in skeleton.parameters())


def build_meta(name, classes):
    spec = Spec(architecture=name, classes=classes, small_stem=False, image_size=224, mean=MEAN, std=STD)
    return networks._skeleton(spec)


def test_families_share_their_first_and_last_tensor():
    """What recognise() relies on when it leaves a whole family out."""
    ends = {}
    for name in architectures():
        names = list(networks._stock_shapes(name, False, 224))
        ends.setdefault(networks._family(name), set()).add((names[0], names[-1]))
    assert all(len(found) == 1 for found in ends.values())
    assert len(ends) > 12


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_stock_files_with_auxiliary_heads_load(name, monkeypatch):
    size = FAMILIES[name][0]
    module = original(name, 11, aux_logits=True)
    state = module.state_dict()
    assert any(key.startswith(networks.AUXILIARY) for key in state)
    monkeypatch.setattr(networks, "_read_file", lambda path: ([Found("", state)], {}))
    network = loads(Path("x.pt"), image_size=size)
    assert (network.spec.architecture, network.spec.classes) == (name, 11)
    same_network(network, module, size)
    assert networks.published_input(name)[0] == {"googlenet": 224, "inception_v3": 299}[name]


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_the_published_input_of_networks_from_tensorflow_is_what_transform_input_does(name):
    """A pretrained GoogLeNet takes ImageNet-normalised pixels and undoes that itself; a state dict cannot say so."""
    module = original(name, transform_input=True)
    size, mean, std = networks.published_input(name)
    x = pixels(size, 1)
    imagenet = (x - torch.tensor(networks.IMAGENET_MEAN).view(1, 3, 1, 1)) / torch.tensor(networks.IMAGENET_STD).view(
        1, 3, 1, 1
    )
    ours = (x - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    torch.testing.assert_close(module._transform_input(imagenet), ours, rtol=1e-5, atol=1e-5)


def test_published_inputs_are_those_of_torchvision_and_used_for_a_bare_file(tmp_path, small):
    assert networks.published_input("efficientnet_b3")[0] == 300
    assert networks.published_input("efficientnet_v2_l") == (480, (0.5,) * 3, (0.5,) * 3)
    assert networks.published_input("resnet18") == (224, networks.IMAGENET_MEAN, networks.IMAGENET_STD)
    network = load_network(saved(tmp_path, small[1]))
    assert network.assumed
    assert network.spec == Spec(
        architecture="mnasnet0_5", classes=3, small_stem=False, image_size=224, mean=networks.IMAGENET_MEAN,
        std=networks.IMAGENET_STD,
    )  # fmt: skip


def test_old_densenet_names_load(tmp_path):
    module = original("densenet121")
    state = {k.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): v for k, v in module.state_dict().items()}
    assert any("denselayer1.norm.1." in key for key in state)
    same_network(loads(saved(tmp_path, state)), module)


@pytest.mark.parametrize("size", [32, 64, 96, 384])
def test_a_vit_tells_its_input_size(size):
    state = meta_state("vit_b_32", image_size=size)
    assert recognise(state) == ("vit_b_32", False, size)


@pytest.mark.slow
@pytest.mark.parametrize("name", architectures())
def test_every_architecture_runs_with_real_weights(name):
    """At 224 pixels, with torchvision's own module beside it."""
    if name in {"regnet_y_128gf", "vit_h_14"}:
        pytest.skip("2.5 GB of weights")
    spec = Spec(architecture=name, classes=7, small_stem=False, image_size=224, mean=MEAN, std=STD)
    if name == "resnet10":
        torch.manual_seed(0)
        module = build(spec).eval().requires_grad_(False)
    else:
        module = original(name)
    network = from_state(module.state_dict(), spec).double()  # in float32, a random network blows rounding errors up
    x = pixels(224, 2).double()
    expected = module.double()(normalised(x))
    torch.testing.assert_close(network(x), expected, rtol=1e-6, atol=1e-6)
    if name.startswith("squeezenet"):
        assert network.head is None
        return
    bias = 0 if network.head.bias is None else network.head.bias
    features = network.features(x)
    assert features.shape == (2, network.dimension)
    torch.testing.assert_close(features @ network.head.weight.T + bias, expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- the network's own input


def test_forward_resizes_as_pillow_does_and_normalises():
    network = Network(nn.Identity(), SPEC)
    x = pixels(50, 1)
    channels = [Image.fromarray(c.numpy()).resize((32, 32), Image.Resampling.BILINEAR) for c in x[0]]
    expected = normalised(torch.from_numpy(np.stack([np.asarray(c) for c in channels]))[None])
    torch.testing.assert_close(network(x), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(network(x[..., :32, :32]), normalised(x[..., :32, :32]))


@pytest.mark.parametrize(
    ("able", "device", "used"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, "cpu", True),
        ({"avx512_bf16": True}, "cpu", False),  # slower there than full precision, or no faster
        ({"avx512_f": True}, "cpu", False),
        ({"amx_bf16": True}, "cuda", False),
    ],
)
def test_bfloat16_is_used_where_it_saves_time(able, device, used, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    with networks.mixed_precision(device):
        dtype = (torch.eye(2) @ torch.eye(2)).dtype
    assert dtype == (torch.bfloat16 if used else torch.float32)
    assert (torch.eye(2) @ torch.eye(2)).dtype == torch.float32


def test_a_torch_that_does_not_tell_its_capabilities_is_not_asked(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    with networks.mixed_precision("cpu"):
        assert (torch.eye(2) @ torch.eye(2)).dtype == torch.float32


def test_features_leave_no_hook_and_the_network_frozen(small):
    network = from_state(small[1], SPEC)
    network.features(pixels(32))
    assert not network.head._forward_pre_hooks
    assert not network.module.training
    assert not any(p.requires_grad for p in network.parameters())


def test_features_carry_gradients_to_the_pixels(small):
    x = pixels(32).requires_grad_(True)
    from_state(small[1], SPEC).features(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_loaded_weights_are_copies(small):
    state = {k: v.clone() for k, v in small[1].items()}
    network = from_state(state, SPEC)
    for parameter in network.module.parameters():
        parameter.add_(1)
    assert all(torch.equal(v, small[1][k]) for k, v in state.items())


def test_find_head_takes_the_layer_that_makes_the_output():
    class Two(nn.Module):
        def __init__(self, change):
            super().__init__()
            self.last = nn.Linear(4, 3)  # registered first, called last
            self.first = nn.Linear(3, 4)
            self.change = change

        def forward(self, x):
            return self.last(self.first(x.mean((2, 3)))) * self.change

    network = Network(Two(1), SPEC)
    assert find_head(network) == (network.module.last, 3)
    assert find_head(Network(Two(2), SPEC)) == (None, 3)
    assert find_head(Network(nn.Flatten(), SPEC)) == (None, 3 * 32 * 32)


# ---------------------------------------------------------------- small images


SMALL = (
    *("resnet18", "densenet121", "mobilenet_v3_small", "convnext_tiny", "efficientnet_b0"),
    *("shufflenet_v2_x1_0", "regnet_y_400mf", "swin_t", "googlenet"),
)


def last_side(module):
    """Side of the map that the classifier averages, at 32 pixels."""
    sides = []
    kinds = (nn.Conv2d, nn.AdaptiveAvgPool2d, nn.LayerNorm)
    pooled = [m for m in module.modules() if isinstance(m, nn.AdaptiveAvgPool2d)]
    watched = pooled[-1:] or [m for m in module.modules() if isinstance(m, kinds)][-1:]
    hooks = [m.register_forward_hook(lambda m, inputs, out: sides.append(inputs[0].shape)) for m in watched]
    if not pooled:  # DenseNet and ShuffleNet average by a function: their last normalised or convolved map
        last = [m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))][-1]
        hooks = [last.register_forward_hook(lambda m, inputs, out: sides.append(out.shape))]
    with torch.no_grad():
        output = module.eval()(pixels(32, 2))
    for hook in hooks:
        hook.remove()
    assert output.shape == (2, 7)
    assert sides[-1][2] == sides[-1][3]
    return sides[-1][2]


@pytest.mark.parametrize("name", SMALL)
def test_the_small_stem_leaves_a_larger_map(name):
    spec = Spec(architecture=name, classes=7, small_stem=False, image_size=32, mean=MEAN, std=STD)
    stock, module = networks._skeleton(spec), networks._skeleton(networks.replace(spec, small_stem=True))
    before = {k: tuple(v.shape) for k, v in stock.state_dict().items()}
    after = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    assert before.keys() == after.keys()
    real = [m.to_empty(device="cpu") for m in (stock, module)]
    for part in (p for m in real for p in (*m.parameters(), *m.buffers()) if p.is_floating_point()):
        part.data.fill_(0.01)
    for part in (b for m in real for k, b in m.named_buffers() if k.endswith("relative_position_index")):
        part.zero_()
    sides = [last_side(m) for m in real]
    assert sides[1] == 2 * sides[0]
    found = recognise(networks._skeleton(networks.replace(spec, small_stem=True)).state_dict())
    assert found == (name, before != after, None)


def test_the_small_stem_is_initialised_and_its_kernel_is_three():
    torch.manual_seed(0)
    module = original("resnet18")
    shrink_stem(module)
    assert module.conv1.weight.shape == (64, 3, 3, 3)
    assert float(module.conv1.weight.detach().std()) == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.1)
    assert isinstance(module.maxpool, nn.Identity)


def test_a_vgg_for_small_images_keeps_its_stem_and_has_no_copies_of_its_map():
    module = original("vgg11_bn").eval()
    kernel, reduction = module.features[0].weight, sum(isinstance(m, nn.MaxPool2d) for m in module.modules())
    shrink_stem(module)
    assert module.features[0].weight is kernel and reduction == 5
    assert sum(isinstance(m, nn.MaxPool2d) for m in module.modules()) == 5
    assert sum(p.numel() for p in module.parameters()) < 32e6
    with torch.no_grad():
        seen = module.features(pixels(32, 2)).flatten(1)  # (2, 512): the map is of one place
        assert torch.allclose(module(pixels(32, 2)), module.classifier(seen), atol=1e-5)
    assert recognise(module.state_dict()) == ("vgg11_bn", True, None)


def test_a_small_stem_file_runs_at_32_pixels_by_default(tmp_path):
    spec = Spec(architecture="resnet10", classes=4, small_stem=True, image_size=32, mean=MEAN, std=STD)
    module = build(spec).eval()
    network = load_network(saved(tmp_path, module.state_dict()), mean=MEAN, std=STD)
    assert network.spec == spec
    with torch.no_grad():
        same_network(network, module)


# ---------------------------------------------------------------- formats


def _prefixed(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


def _defaults(state):
    found = collections.defaultdict(list)
    found.update(state)
    return found


WRAPPERS = {
    "bare": lambda s: s,
    "ordered": OrderedDict,
    "model": lambda s: {"model": s, "epoch": 3, "args": {"lr": 0.1}},
    "state_dict": lambda s: {"epoch": 3, "state_dict": s, "best_acc1": 12.5},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer": {"state": {}, "param_groups": []}},
    "parallel": lambda s: {f"module.{k}": v for k, v in s.items()},
    "compiled": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "compiled parallel": lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
    "parallel compiled": lambda s: {"model": {f"_orig_mod.module.{k}": v for k, v in s.items()}},
    "parameters": lambda s: {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in s.items()},
    "shuffled": lambda s: dict(sorted(s.items(), reverse=True)),
    "no counters": lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
    "trainer's, compiled": lambda s: {"state_dict": {f"model._orig_mod.{k}": v for k, v in s.items()}},
    "net": lambda s: {"net": s, "acc": 90.0},
    "model_ema": lambda s: {"epoch": 3, "model_ema": {"n_averaged": torch.tensor(7), **_prefixed(s, "module.")}},
    "averaged": lambda s: {"n_averaged": torch.tensor(7), **_prefixed(s, "module.")},
    "with other values": lambda s: {**s, "epoch": 3, "names": ["a"], "none": None, 5: "five"},
    "double": lambda s: {k: v.double() if v.is_floating_point() else v for k, v in s.items()},
    "arguments": lambda s: {"model": s, "args": argparse.Namespace(lr=0.1, out=Path("/x"))},
    "NumPy's numbers": lambda s: {"state_dict": s, "best_acc1": np.float64(71), "history": np.arange(9.0)},
    "a trainer's": lambda s: {
        "state_dict": {**_prefixed(s, "model."), "loss.weight": torch.ones(10)}, "hyper_parameters": {"d": Path("/x")},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best": torch.tensor(1.0)}}, "loops": {"fit": {}},
    },
    "any name": lambda s: {"network": s, "epoch": 1},
    "two levels": lambda s: {"checkpoint": {"params": s}, "meta": {"lr": 0.1}},
    "default dictionary": lambda s: {"model": _defaults(s)},
    "list": lambda s: {"state_dict": [s]},
    "prefix": lambda s: _prefixed(s, "backbone."),
    "prefixes": lambda s: {"state_dict": _prefixed(s, "module.model.backbone.")},
    "parallel inside": lambda s: {re.sub(r"^layers", "layers.module", k): v for k, v in s.items()},
    "profiled": lambda s: {**s, "total_ops": torch.zeros(1), "layer1.total_params": torch.zeros(1)},
    "dropout": lambda s: {k.replace("classifier.1", "classifier.1.2"): v for k, v in s.items()},
    "prefix, dropout": lambda s: {f"net.{k}".replace("classifier.1", "classifier.1.2"): v for k, v in s.items()},
    "optimiser": lambda s: {
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(10**6)}}, "param_groups": [{"lr": 0.1}]}, "weights": s,
    },
    "weight-normalised": lambda s: {
        **{k: v for k, v in s.items() if k != "classifier.1.weight"},
        "classifier.1.weight_v": 3 * s["classifier.1.weight"],
        "classifier.1.weight_g": s["classifier.1.weight"].norm(dim=1, keepdim=True),
    },
    "averaged beside": lambda s: {"ema": {k: torch.zeros_like(v) for k, v in s.items()}, "raw": s},
    "teacher beside": lambda s: _prefixed({k: v + 1 for k, v in s.items()}, "teacher.") | _prefixed(s, "student."),
}  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_state_dicts_load_however_they_are_wrapped(wrapper, tmp_path, small):
    same_network(loads(saved(tmp_path, WRAPPERS[wrapper](small[1]))), small[0])


@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.th", "m"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_load_under_every_suffix_and_in_both_formats(name, zipped, tmp_path, small):
    path = saved(tmp_path, small[1], name, _use_new_zipfile_serialization=zipped)
    assert path.read_bytes().startswith(b"PK") == zipped
    same_network(loads(path), small[0])


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt"])  # known by content too
def test_safetensors_load(name, tmp_path, small):
    path = tmp_path / name
    safetensors.torch.save_file(small[1], path)
    network = loads(path)
    assert network.spec.classes == 3  # though the file lists its tensors in another order
    same_network(network, small[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_half_precision_runs_in_float32(dtype, suffix, tmp_path, small):
    halved = {k: v.to(dtype) if v.is_floating_point() else v for k, v in small[1].items()}
    path = tmp_path / f"m{suffix}"
    safetensors.torch.save_file(halved, path) if suffix == ".safetensors" else torch.save(halved, path)
    network = loads(path)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert {v.dtype for v in read_checkpoint(path)[0].values()} == {torch.float32, torch.int64}
    assert all(torch.equal(v, halved[k].to(v.dtype)) for k, v in network.module.state_dict().items())
    same_network(network, with_weights(small[0], halved))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_save_checkpoint_gives_the_spec_back(suffix, tmp_path, small):
    path = tmp_path / f"m{suffix}"
    save_checkpoint(path, small[0], SPEC)
    network = load_network(path)
    assert network.spec == SPEC
    assert not network.assumed
    same_network(network, small[0])
    assert read_checkpoint(path)[1] == json.loads(json.dumps(to_metadata(SPEC)))
    assert loads(path, image_size=48).spec.image_size == 48
    assert load_network(path, mean=(0.1, 0.2, 0.3)).spec.mean == (0.1, 0.2, 0.3)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_extra_values_travel_in_a_torch_file(tmp_path, small):
    save_checkpoint(tmp_path / "m.pt", small[0], SPEC, {"epoch": 4})
    assert torch.load(tmp_path / "m.pt", weights_only=True)["epoch"] == 4
    assert load_network(tmp_path / "m.pt").spec == SPEC


@pytest.mark.parametrize("spread", [1e-8, 1.0, 1e6])
def test_packing_errs_by_half_a_step_of_each_row(spread):
    generator = torch.Generator().manual_seed(0)
    rows = torch.logspace(-3, 0, 6).view(-1, 1, 1, 1) * spread
    state = {
        "conv.weight": torch.randn(6, 4, 3, 3, generator=generator) * rows,
        "fc.weight": torch.randn(5, 8, generator=generator) * spread,
        "zero.weight": torch.zeros(3, 3),
        "fc.bias": torch.randn(5, generator=generator),
        "count": torch.tensor(7),
    }
    packed = pack(state)
    assert {k for k, v in packed.items() if v.dtype == torch.int8} == {"conv.weight", "fc.weight", "zero.weight"}
    back = unpack(packed)
    assert back.keys() == state.keys()
    for name, value in state.items():
        if value.dim() < 2:
            assert torch.equal(back[name], value)
            continue
        bound = value.flatten(1).abs().amax(1) / 254  # per output channel
        error = (back[name] - value).flatten(1).abs().amax(1)
        assert (error <= bound * 1.001 + 1e-14).all()
        assert back[name].dtype == torch.float32
    assert sum(v.numel() * v.element_size() for v in pack({"w": torch.randn(64, 64)}).values()) == 64 * 64 + 4 * 64
    assert all(torch.equal(v, back[k]) for k, v in unpack(pack(back)).items() if v.dim() < 2)


def test_a_packed_checkpoint_loads_as_the_shipped_network_does(tmp_path, small):
    packed = pack(small[1])
    path = tmp_path / "builtin.safetensors"
    metadata = {"radiotag": json.dumps(to_metadata(SPEC), sort_keys=True)}
    safetensors.torch.save_file(packed, path, metadata)
    network = load_network(path)
    assert network.spec == SPEC
    exact = unpack(packed)
    assert all(torch.equal(v, exact[k].to(v.dtype)) for k, v in network.module.state_dict().items())
    same_network(network, with_weights(small[0], exact))


def test_only_what_was_packed_is_unpacked():
    state = {
        "a": torch.ones(3, 2), "a.scale": torch.full((3, 1), 2.0),  # not int8: a parameter's own name
        "b": torch.ones(3, 2, dtype=torch.int8), "b.scale": torch.ones(1, 10**6),  # would blow up by broadcasting
        "c": torch.ones(3, 2, dtype=torch.int8),
    }  # fmt: skip
    assert unpack(state).keys() == state.keys()
    assert torch.equal(unpack(state)["a"], torch.ones(3, 2))


# ---------------------------------------------------------------- hostile files


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["alone", "beside", "inside", "metadata", "plain pickle"])
def test_a_pickle_is_never_run(where, zipped, tmp_path, small):
    target = tmp_path / "created"
    bomb = Bomb(target)
    content = {
        "alone": bomb,
        "beside": {**small[1], "optimizer": bomb},
        "inside": {"model": {**small[1], "x": [bomb]}},
        "metadata": {"model": small[1], "radiotag": {"architecture": bomb}},
        "plain pickle": bomb,
    }[where]
    if where == "plain pickle":
        path = tmp_path / "m.pt"
        path.write_bytes(pickle.dumps(content))
    else:
        path = saved(tmp_path, content, _use_new_zipfile_serialization=zipped)
    if where in {"alone", "plain pickle"}:
        with pytest.raises(RadiotagError, match=r"m\w*\.pt holds (a pickle that is more than|no) weights"):
            load_network(path)
    else:
        same_network(loads(path), small[0])
    assert not target.exists()
    pickle.loads(pickle.dumps(bomb))  # the bomb does work
    assert target.exists()


@pytest.mark.parametrize("method", ["get", "values", "keys"])  # pickling itself needs `items`
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_mapping_whose_methods_are_replaced_is_refused(method, depth, tmp_path, small):
    state = OrderedDict(small[1])
    state.__dict__[method] = 5
    with pytest.raises(RadiotagError, match="is not a whole file"):
        load_network(saved(tmp_path, [state, {"model": state}, {"model": {"state_dict": state}}][depth]))


def test_metadata_that_only_claims_to_be_long_is_not_counted_through(tmp_path, small):
    """Three numbers; a file of one kilobyte may claim to hold 10^13."""
    metadata = to_metadata(SPEC) | {"mean": torch.zeros(1).expand(10**13)}
    assert spec_from(metadata) is None
    assert load_network(saved(tmp_path, {"model": small[1], "radiotag": metadata})).assumed


def test_names_that_are_no_text_are_passed_over(tmp_path):
    """As text, a tuple of references to one long string takes a thousand times the file's memory, or no end."""
    deep = ()
    for _ in range(900):
        deep = (deep,)
    with pytest.raises(RadiotagError, match="holds no weights"):
        load_network(saved(tmp_path, {("a" * 9, 5): torch.ones(2, 2), deep: torch.ones(2, 2)}))


@pytest.mark.filterwarnings("ignore::UserWarning")  # nested tensors are a prototype
def test_tensors_that_cannot_be_converted_are_none(tmp_path):
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    with pytest.raises(RadiotagError, match="holds no weights"):
        load_network(saved(tmp_path, {"a": nested}))
    header = json.dumps({"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(2))
    with pytest.raises(RadiotagError, match=r"m\.safetensors"):
        load_network(tmp_path / "m.safetensors")


def test_a_whole_module_is_read_as_its_weights(tmp_path, small):
    """Of a pickled module the tensors are taken, under the names of its state dict; its class is never looked up."""
    for zipped in (True, False):
        module = copy.deepcopy(small[0])
        module.register_buffer("scratch", torch.ones(3), persistent=False)
        path = saved(tmp_path, {"epoch": 1, "net": module}, _use_new_zipfile_serialization=zipped)
        same_network(loads(path), small[0])


def archive(path, names, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in names.items():
            file.writestr(name, data)
    return path


@pytest.mark.parametrize("entry", ["model/constants.pkl", "model/code/__torch__.py", "model/archive_format"])
def test_programs_of_nothing_are_refused(entry, tmp_path):
    path = archive(tmp_path / "m.pt", {"model/data.pkl": b"x", "model/version": b"3", entry: b"x"})
    with pytest.raises(RadiotagError, match=r"m\.pt is not a whole file"):
        read_checkpoint(path)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, small):
    path = archive(tmp_path / "m.pt", {"m/data.pkl": b"0" * 10**6}, zipfile.ZIP_DEFLATED)
    with pytest.raises(RadiotagError, match="unpacks to more than itself"):
        read_checkpoint(path)


def test_tensors_that_only_claim_to_be_large_are_refused(tmp_path):
    views = {"a": torch.zeros(1).expand(10**12)}
    path = saved(tmp_path, views)
    assert path.stat().st_size < 10**5
    with pytest.raises(RadiotagError, match="larger than what is stored"):
        read_checkpoint(path)


def test_views_of_one_storage_are_no_obstacle(tmp_path):
    base = torch.arange(12.0)
    state, _ = read_checkpoint(saved(tmp_path, {"a": base, "b": base.view(3, 4), "c": base[:4]}))
    assert torch.equal(state["b"], base.view(3, 4))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "scripted", "exported"])
def test_truncated_files_are_refused(kind, tmp_path, small):
    path = tmp_path / ("m.safetensors" if kind == "safetensors" else "m.pt")
    if kind == "safetensors":
        safetensors.torch.save_file(small[1], path)
    elif kind == "scripted":
        torch.jit.save(torch.jit.script(small[0]), path)
    elif kind == "exported":
        torch.export.save(torch.export.export(small[0], (pixels(32, 2),)), path)
    else:
        torch.save(small[1], path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 16, 40, 1000, len(whole) // 2, len(whole) - 50, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(RadiotagError, match=r"m\.\w+ (is|holds)"):
            load_network(path)
    path.write_bytes(whole)
    same_network(loads(path), small[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "scripted", "exported"])
def test_damaged_files_fail_with_one_kind_of_error(kind, tmp_path, small):
    path = tmp_path / ("m.safetensors" if kind == "safetensors" else "m.pt")
    tensors = {"a.weight": torch.ones(3, 4), "b": torch.ones(5)}
    if kind == "safetensors":
        safetensors.torch.save_file(tensors, path)
    elif kind == "scripted":
        torch.jit.save(torch.jit.script(nn.Linear(3, 4)), path)
    elif kind == "exported":
        torch.export.save(torch.export.export(nn.Linear(3, 4), (torch.ones(1, 3),)), path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for position in random.integers(0, len(data), 3):
            data[position] = random.integers(0, 256)
        path.write_bytes(bytes(data))
        try:
            read_checkpoint(path)
        except RadiotagError:
            refused += 1
    assert refused > 15  # the rest of the changes fell upon numbers and padding


CONTENTS = {
    "text": b"hello world\n" * 9,
    "brace": b"01234567{ not json",
    "picture": b"\x89PNG\r\n\x1a\n" + bytes(50),
    "zeros": bytes(1000),
    "huge header": struct.pack("<Q", 2**62) + b"{}",
    "list": pickle.dumps([1, 2]),
    "empty": b"",
}


@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
@pytest.mark.parametrize("content", CONTENTS)
def test_other_files_are_refused_by_name(name, content, tmp_path):
    (tmp_path / name).write_bytes(CONTENTS[content])
    with pytest.raises(RadiotagError) as error:
        load_network(tmp_path / name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_unreadable_paths_are_named(tmp_path, monkeypatch):
    with pytest.raises(RadiotagError, match=r"no such file: .*missing\.pt"):
        read_checkpoint(tmp_path / "missing.pt")
    with pytest.raises(RadiotagError, match="is a folder"):
        read_checkpoint(tmp_path)
    with pytest.raises(RadiotagError, match=r"cannot read .*x{300}"):
        read_checkpoint(tmp_path / ("x" * 300))
    (tmp_path / "m.pt").touch()

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(RadiotagError, match=r"cannot read .*m\.pt: Permission denied"):
        read_checkpoint(tmp_path / "m.pt")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_that_are_not_finite_are_refused(value, suffix, tmp_path, small):
    state = {k: v.clone() for k, v in small[1].items()}
    state["layers.0.weight"].view(-1)[5] = value
    path = tmp_path / f"m{suffix}"
    safetensors.torch.save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    with pytest.raises(RadiotagError, match=r"'layers\.0\.weight' is not finite"):
        load_network(path)


@pytest.mark.parametrize(
    "content",
    [[1, 2], {"a": 1}, {"model": {}}, {}, torch.ones(3), {"state_dict": {"a": "b"}}, "x", None, {"model": [1]}],
    ids=str,
)
def test_files_without_weights_are_refused(content, tmp_path):
    with pytest.raises(RadiotagError, match=r"holds no (weights|state dict)"):
        load_network(saved(tmp_path, content))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_without_plain_numbers_are_left_out(tmp_path):
    odd = {
        "sparse": torch.eye(3).to_sparse(), "complex": torch.ones(2, dtype=torch.complex64),
        "meta": torch.empty(3, device="meta"), "good": torch.ones(2),
        "quantised": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    }  # fmt: skip
    assert read_checkpoint(saved(tmp_path, odd))[0].keys() == {"good"}


LIES = {
    "huge image": {"image_size": 10**9},
    "no image": {"image_size": 0},
    "infinite image": {"image_size": math.inf},
    "endless image": {"image_size": 10**400},
    "nan mean": {"mean": [math.nan, 0.5, 0.5]},
    "endless mean": {"mean": [10**400, 0.5, 0.5]},
    "two means": {"mean": [0.5, 0.5]},
    "text mean": {"mean": "abc"},
    "no std": {"std": [0, 0, 0]},
    "names of numbers": {"class_names": [1, 2, 3]},
    "names of another count": {"class_names": ["a"]},
    "one name": {"class_names": "abc"},
    "class count as text": {"classes": "many"},
    "no classes": {"classes": 0},
    "architecture of numbers": {"architecture": 18},
    "architecture list": {"architecture": ["mnasnet0_5"]},
    "tensor size": {"image_size": torch.ones(3)},
    "tensor names": {"class_names": torch.ones(3)},
    "tensor architecture": {"architecture": torch.ones(3)},
}


@pytest.mark.parametrize("lie", LIES)
def test_nonsense_in_metadata_is_ignored(lie, tmp_path, small):
    metadata = {**to_metadata(SPEC), **LIES[lie]}
    assert spec_from(metadata) is None
    network = loads(saved(tmp_path, {"model": small[1], "radiotag": metadata}))
    assert network.spec.class_names is None
    assert network.assumed
    same_network(network, small[0])


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("field", ["architecture", "classes", "small_stem", "image_size", "mean", "std", "class_names"])
@pytest.mark.parametrize("value", [nested(3000), None, {}, b"x", {"a": nested(50)}, -1, [[[1]]] * 3], ids=range(7))
def test_metadata_of_any_type_never_raises(field, value):
    spec = spec_from({**to_metadata(SPEC), field: value})
    assert spec is None or spec_from(to_metadata(spec)) == spec
    assert spec_from({k: v for k, v in to_metadata(SPEC).items() if k != field}) in (
        None,
        networks.replace(SPEC, class_names=None),
    )


@pytest.mark.parametrize("metadata", [nested(50), 7, "text", None, {}, {"radiotag": {}}])
def test_metadata_that_is_no_dictionary_is_ignored(metadata, tmp_path, small):
    path = saved(tmp_path, {"model": small[1], "radiotag": metadata})
    same_network(loads(path), small[0])


@pytest.mark.parametrize(
    "text", ["{", "[" * 100_000, "[1]", '{"image_size": 1e999}', '{"classes": 1' + "0" * 5000 + "}"]
)
def test_hostile_json_is_refused_or_ignored(text, tmp_path, small):
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(small[1], path, {"radiotag": text})
    try:
        network = loads(path)
    except RadiotagError as error:
        assert "m.safetensors is not a whole safetensors file" in str(error)
        assert text not in {"[1]", '{"image_size": 1e999}'}
    else:
        same_network(network, small[0])


FALSE = {
    "path": ({"architecture": "../../x"}, "unknown architecture '../../x'"),
    "unknown": ({"architecture": "resnet19"}, "unknown architecture 'resnet19'"),
    "another": ({"architecture": "resnet18"}, "the weights do not fit resnet18"),
    "more classes": ({"classes": 10**6, "class_names": None}, "the weights do not fit mnasnet0_5: .*1000000"),
    "too small": ({"architecture": "alexnet"}, "the weights do not fit alexnet"),
}


@pytest.mark.parametrize("lie", FALSE)
def test_false_metadata_is_an_error_that_names_the_file(lie, tmp_path, small):
    change, message = FALSE[lie]
    path = saved(tmp_path, {"model": small[1], "radiotag": {**to_metadata(SPEC), **change}})
    with pytest.raises(RadiotagError, match=f"model.pt: {message}") as error:
        load_network(path)
    assert "\n" not in str(error.value)


def test_metadata_cannot_name_a_file_to_run(tmp_path, small, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text("import pathlib\npathlib.Path('created').touch()\ndef f(): pass\n")
    path = saved(tmp_path, {"model": small[1], "radiotag": {**to_metadata(SPEC), "architecture": "evil.py:f"}})
    with pytest.raises(RadiotagError, match="unknown architecture"):
        load_network(path)
    assert not Path("created").exists()
    with pytest.raises(RadiotagError):
        load_network(path, architecture="evil.py:f")  # the user's own word
    assert Path("created").exists()


def test_a_lie_about_classes_costs_no_memory(tmp_path):
    """A VGG with a million classes would take 16 GB if it were built before the comparison."""
    spec = networks.replace(SPEC, architecture="vgg11", classes=10**6, class_names=None)
    path = saved(tmp_path, {"model": {"features.0.weight": torch.ones(64, 3, 3, 3)}, "radiotag": to_metadata(spec)})
    start = time.process_time()
    with pytest.raises(RadiotagError, match="do not fit vgg11"):
        load_network(path)
    assert time.process_time() - start < 2


def test_an_input_size_that_a_network_cannot_take_is_an_error(tmp_path):
    path = saved(tmp_path, meta_zeros("shufflenet_v2_x0_5"))
    assert load_network(path, image_size=32).spec.image_size == 32
    path = saved(tmp_path, meta_zeros("inception_v3"), "i.pt")
    with pytest.raises(RadiotagError, match=r"i\.pt: inception_v3 does not run at 32 pixels") as error:
        load_network(path, image_size=32)
    assert "--image-size" in error.value.hint


def meta_zeros(name):
    return {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in meta_state(name).items()}


def test_control_characters_in_names_are_kept(tmp_path, small):
    spec = networks.replace(SPEC, class_names=("\x1b[31mred\n", "b\0", "\u202ec"))
    save_checkpoint(tmp_path / "m.pt", small[0], spec)
    assert load_network(tmp_path / "m.pt").spec.class_names == spec.class_names


@pytest.mark.parametrize("shape", [(), (5,), (5, 5), (0,), (1, 0, 3), (1, 2, 3, 4, 5)])
def test_tensors_of_odd_shapes_are_unknown(shape, tmp_path, small):
    with pytest.raises(RadiotagError, match="unknown architecture"):
        load_network(saved(tmp_path, {**small[1], "classifier.1.weight": torch.ones(shape)}))
    vit = {"encoder.pos_embedding": torch.ones(shape), "conv_proj.weight": torch.ones(shape)}
    with pytest.raises(RadiotagError, match="unknown architecture"):
        load_network(saved(tmp_path, vit))
    with pytest.raises(RadiotagError, match="do not fit mnasnet0_5"):
        load_network(saved(tmp_path, {**small[1], "layers.1.weight": torch.ones(3, *shape)}), architecture="mnasnet0_5")


def test_naming_the_wrong_architecture_is_an_error(tmp_path, small):
    path = saved(tmp_path, small[1])
    with pytest.raises(RadiotagError, match=r"model\.pt: the weights do not fit resnet18: Missing key") as error:
        load_network(path, architecture="resnet18")
    assert "--arch" in error.value.hint
    for name in ("resnet999", "net.py", "../x"):
        with pytest.raises(RadiotagError, match="unknown architecture"):
            load_network(path, architecture=name)
    with pytest.raises(RadiotagError, match="cannot be built for 33 pixels"):
        build(networks.replace(SPEC, architecture="vit_b_32", image_size=33))


def test_naming_the_right_architecture_overrides_metadata(tmp_path, small):
    wrong = {**to_metadata(SPEC), "architecture": "resnet18"}
    network = load_network(saved(tmp_path, {"model": small[1], "radiotag": wrong}), architecture="mnasnet0_5")
    assert network.spec == SPEC  # and the input convention is still the file's
    same_network(network, small[0])


# ---------------------------------------------------------------- the user's own Python file

PUBLISHED = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import nn
import beside

@dataclass
class Config:
    width: int = 6

class Net(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.linear = nn.Linear(Config().width, num_classes)
        self.conv = nn.Conv2d(3, 6, 3, 2)
    def forward(self, x):
        return self.linear(torch.relu(self.conv(x)).mean((2, 3)))

class Renamed(Net):
    def __init__(self, outputs=5):
        super().__init__(outputs)

def with_argument(num_classes): return Net(num_classes)
def without_argument(): return Net(5)
def with_more(**kwargs): return Net(**kwargs)
def with_other(**kwargs): return Renamed(**kwargs)
def half(): return Net(5).half()
def raising(): raise ValueError("no such luck")
def leaving(): raise SystemExit(0)
def nothing(): return None
def scored():
    net = Net(5)
    net.forward = lambda x: Net.forward(net, x).log_softmax(1)
    return net
def two():
    net = Net(5)
    net.forward = lambda x: (Net.forward(net, x), x)
    return net
def summed():
    net = Net(5)
    net.forward = lambda x: Net.forward(net, x).sum(1)
    return net
number = 5
"""


@pytest.fixture
def published(tmp_path):
    (tmp_path / "net.py").write_text(PUBLISHED)
    (tmp_path / "beside.py").touch()
    return tmp_path / "net.py"


class Own(nn.Module):
    """The network that net.py builds, written a second time."""

    def __init__(self, classes):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 6, 3, 2), nn.Linear(6, classes)

    def forward(self, x):
        return self.linear(torch.relu(self.conv(x)).mean((2, 3)))


def own_net(classes=5):
    torch.manual_seed(0)
    module = Own(classes).requires_grad_(False)
    return module.state_dict(), module


@pytest.mark.parametrize(
    "function", ["with_argument", "without_argument", "with_more", "with_other", "Net", "Renamed", "half"]
)
def test_a_network_from_the_users_own_file(function, published, tmp_path):
    state, forward = own_net()
    path = saved(tmp_path, state)
    network = loads(path, architecture=f"{published}:{function}")
    assert network.spec.architecture == f"{published}:{function}"
    assert (network.spec.classes, network.dimension) == (5, 6)
    same_network(network, forward)
    logits = network.features(pixels(32)) @ state["linear.weight"].T + state["linear.bias"]
    torch.testing.assert_close(logits, network(pixels(32)))


def test_a_network_that_ends_otherwise_still_tells_its_outputs(published, tmp_path):
    state, forward = own_net()
    network = loads(saved(tmp_path, state), architecture=f"{published}:scored")
    assert (network.spec.classes, network.head) == (5, None)
    expected = forward(network.prepare(pixels(32))).log_softmax(1)
    torch.testing.assert_close(network(pixels(32)), expected)


@pytest.mark.parametrize(("function", "gives"), [("two", "tuple"), ("summed", r"\(2,\)")])
def test_a_network_that_gives_no_scores_is_refused(function, gives, published, tmp_path):
    path = saved(tmp_path, own_net()[0])
    with pytest.raises(RadiotagError, match=rf"net\.py:{function} gives {gives} of two images") as error:
        load_network(path, architecture=f"{published}:{function}")
    assert "logits" in error.value.hint


@pytest.mark.parametrize("function", ["with_argument", "Net"])
def test_the_number_of_classes_is_found_in_the_tensors(function, published, tmp_path):
    state, forward = own_net(9)
    same_network(loads(saved(tmp_path, state), architecture=f"{published}:{function}"), forward)
    with pytest.raises(RadiotagError, match=r"do not fit .*net\.py:without_argument"):
        loads(tmp_path / "model.pt", architecture=f"{published}:without_argument")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("{folder}/missing.py:f", "cannot read .*missing.py"),
        ("{folder}:f", "cannot read"),
        ("{folder}/net.py:missing", "has no function 'missing'"),
        ("{folder}/net.py:number", "has no function 'number'"),
        ("{folder}/net.py:", "has no function ''"),
        ("{folder}/net.py:raising", "failed: ValueError: no such luck"),
        ("{folder}/net.py:leaving", "failed: SystemExit"),
        ("{folder}/net.py:nothing", "returned NoneType, not a torch.nn.Module"),
        ("{folder}/broken.py:f", "failed: SyntaxError"),
        ("{folder}/script.py:f", "failed: SystemExit"),
        ("{folder}/wants.py:f", "failed: ModuleNotFoundError: No module named 'nowhere'"),
        ("{folder}/text.txt:f", "cannot read .*text.txt"),
    ],
)
def test_a_file_that_gives_no_network_is_an_error(argument, message, published, tmp_path):
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "script.py").write_text("import sys\nsys.exit(2)\n")
    (tmp_path / "wants.py").write_text("import nowhere\n")
    (tmp_path / "text.txt").write_text("text")
    path = saved(tmp_path, own_net()[0])
    with pytest.raises(RadiotagError, match=message):
        load_network(path, architecture=argument.format(folder=tmp_path))


def test_builder_from_leaves_the_search_path_alone(published):
    import sys

    before = list(sys.path)
    assert builder_from(f"{published}:Net")(num_classes=2).linear.out_features == 2
    assert sys.path == before


@pytest.mark.parametrize("name", ["model", "net"])
def test_a_network_that_its_trainer_kept_under_a_name(tmp_path, name):
    """Stripped where the architecture is recognised, and left to a user's own module that has that name, too."""
    (tmp_path / "own.py").write_text(
        "import torchvision\nfrom torch import nn\n\n\nclass Own(nn.Module):\n    def __init__(self, num_classes=10):\n"
        f"        super().__init__()\n        self.{name} = torchvision.models.resnet18(num_classes=num_classes)\n\n"
        f"    def forward(self, x):\n        return self.{name}(x)\n"
    )
    module = torchvision.models.resnet18(num_classes=5)
    torch.save({"state_dict": {f"{name}.{k}": v for k, v in module.state_dict().items()}}, tmp_path / "m.ckpt")
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    plain = load_network(tmp_path / "m.ckpt", image_size=64)
    own = load_network(tmp_path / "m.ckpt", architecture=f"{tmp_path / 'own.py'}:Own", image_size=64)
    assert plain.spec.classes == own.spec.classes == 5
    assert torch.allclose(plain(pixels), own(pixels), atol=1e-5)  # in another order of memory


# ---------------------------------------------------------------- marking networks


def test_marking_weights_of_a_checkpoint(tmp_path, small):
    save_checkpoint(tmp_path / "m.pt", small[0], SPEC)
    weights, spec, dimension = networks.marking_weights(str(tmp_path / "m.pt"))
    assert (spec_from(spec), dimension) == (SPEC, 1280)
    assert all(torch.equal(v, small[1][k]) for k, v in weights.items())
    with pytest.raises(RadiotagError, match="no network 'nonsense'"):
        networks.marking_weights("nonsense")
    with pytest.raises(RadiotagError, match="resnet10 has no published weights"):
        networks.marking_weights("resnet10")


@pytest.mark.parametrize("name", ["googlenet", "resnet18"])
def test_marking_weights_of_a_torchvision_name(name, monkeypatch):
    """A stand-in for the download: the same kind of state dict as the published file holds."""
    module = original(name, 1000, **({"aux_logits": True} if name == "googlenet" else {}))
    state = module.state_dict()
    enumeration = torchvision.models.get_model_weights(name)
    monkeypatch.setattr(enumeration, "get_state_dict", lambda *_, **__: state)
    monkeypatch.setattr(networks, "published_input", lambda _: (32, MEAN, STD))
    weights, spec, dimension = networks.marking_weights(name)
    assert spec["architecture"] == name
    assert spec["classes"] == 1000
    assert dimension == FAMILIES[name][1]
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in weights.items())


def test_a_failed_download_says_the_ways_out(monkeypatch):
    def fail(*_, **__):
        raise OSError("no network here")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", fail)
    with pytest.raises(RadiotagError, match="resnet18 cannot be downloaded: no network here") as error:
        networks.marking_weights("resnet18")
    assert "--network builtin" in error.value.hint
    assert "--network resnet18.pth" in error.value.hint


# ---------------------------------------------------------------- networks of the user's own


def test_a_network_inside_a_package_with_relative_imports(tmp_path, published):
    models = tmp_path / "project" / "models"
    models.mkdir(parents=True)
    for folder in (models, models.parent):
        (folder / "__init__.py").write_text("")
    (models / "parts.py").write_text(published.read_text())
    (models / "nets.py").write_text("from .parts import Net\n\ndef small(num_classes): return Net(num_classes)\n")
    state, forward = own_net()
    same_network(loads(saved(tmp_path, state), architecture=f"{models / 'nets.py'}:small"), forward)


def test_a_function_that_wants_more_than_classes_is_told_how_to_be_wrapped(tmp_path, published):
    published.write_text(published.read_text() + "\ndef deep(depth, width, num_classes=10): return Net(num_classes)\n")
    with pytest.raises(RadiotagError, match="missing 2 required positional arguments") as error:
        load_network(saved(tmp_path, own_net()[0]), architecture=f"{published}:deep")
    assert "deep(depth=…, width=…)" in error.value.hint and "--arch net.py:net" in error.value.hint


def test_a_network_that_views_its_maps_as_rows_runs(tmp_path):
    """As PyTorch's own tutorial does: a network that is not ours keeps the usual order in memory."""
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Module):\n    def __init__(self, num_classes=10):\n"
        "        super().__init__()\n        self.conv = nn.Conv2d(3, 6, 3, 2)\n"
        "        self.fc = nn.Linear(6 * 15 * 15, num_classes)\n"
        "    def forward(self, x):\n        return self.fc(self.conv(x).view(len(x), -1))\n"
    )
    module = builder_from(f"{tmp_path / 'net.py'}:Net")(num_classes=4)
    path = saved(tmp_path, {"state_dict": _prefixed(module.state_dict(), "module.net.")})  # wrapped, too
    network = loads(path, architecture=f"{tmp_path / 'net.py'}:Net")
    assert network.spec.classes == 4
    same_network(network, module)


def test_what_was_taken_of_a_file_of_several_networks_is_said(tmp_path, small):
    optimiser = {"state": {0: {"m": torch.ones(9)}}}
    path = saved(tmp_path, {"model": small[1], "model_ema": small[1], "optimizer": optimiser})
    assert loads(path).taken == "the weights are those under 'model', not 'model_ema'"
    path = saved(tmp_path, {**_prefixed(small[1], "net."), "loss.weight": torch.ones(3), "total_ops": torch.zeros(1)})
    assert loads(path).taken == "1 of its tensors are not of the network"
    assert loads(saved(tmp_path, {"state_dict": small[1]})).taken == ""
