"""What batch norms remember of a suspect's input: stem, pooling and normalisation."""

import copy

import pytest
import torch
from helpers import call, good
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from radiotag import synthetic, verification
from radiotag.conventions import CLOSE, STEMS, Convention, distance, settle_convention, some, stem_of, take
from radiotag.networks import IMAGENET_MEAN, IMAGENET_STD, load_network, wrap_module
from radiotag.suspect import Batching
from radiotag.verification import VerifyOptions

HALF, RAW = ((0.5,) * 3, (0.5,) * 3), ((0.0,) * 3, (1.0,) * 3)


def pictures(count, seed):
    images, _ = synthetic.demo_images(count, 32, seed=seed)
    return images.float() / 255


def trained(stem, mean, std, seed=0):
    """A ResNet of a 3×3 stem whose batch norms have seen images in this way; its weights are random."""
    torch.manual_seed(seed)
    module = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
    module.conv1 = nn.Conv2d(3, 64, 3, stem[0], 1, bias=False)
    module.maxpool = nn.MaxPool2d(3, 2, 1) if stem[1] else nn.Identity()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the plain mean
            nn.init.uniform_(layer.bias, -0.5, 0.5)
    module.train()
    with torch.no_grad():
        for part in pictures(192, seed=1).split(64):
            module((part - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
    return module.eval()


@pytest.fixture(scope="module")
def cifar_net():
    """As most people train a ResNet on CIFAR."""
    return trained((1, False), *HALF)


def rebuilt(module, path):
    torch.save(module.state_dict(), path)
    return load_network(path)


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("normalisation", [HALF, RAW])
def test_stem_and_normalisation_are_found_from_the_tensors_alone(tmp_path, stem, normalisation):
    module = trained(stem, *normalisation)
    network = rebuilt(module, tmp_path / "m.pt")
    assert network.assumed
    told = settle_convention(network, pictures(200, 5), Batching(), fixed_normalisation=False, fixed_stem=False)
    assert stem_of(network) == stem and not network.assumed
    assert (network.spec.mean, network.spec.std) == (tuple(normalisation[0]), tuple(normalisation[1]))
    assert len(told) == 1 and (f"stride {stem[0]}" in told[0]) == (stem != (2, False))  # which is the usual one
    x = pictures(8, 6)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in normalisation)
    with torch.no_grad():
        torch.testing.assert_close(network(x), module((x - mean) / std), rtol=1e-3, atol=1e-3)


def test_what_the_caller_states_stays(tmp_path, cifar_net):
    network = rebuilt(cifar_net, tmp_path / "m.pt")
    settle_convention(network, pictures(200, 5), Batching(), fixed_normalisation=True, fixed_stem=True)
    assert (network.spec.mean, stem_of(network)) == (IMAGENET_MEAN, (2, False))
    network.normalise_by(*HALF)
    settle_convention(network, pictures(200, 5), Batching(), fixed_normalisation=True, fixed_stem=False)
    assert (network.spec.std, stem_of(network)) == (HALF[1], (1, False))


def test_a_right_assumption_is_kept_and_not_warned_of(tmp_path):
    network = rebuilt(trained((2, False), IMAGENET_MEAN, IMAGENET_STD), tmp_path / "m.pt")
    assert settle_convention(network, pictures(99, 5), Batching(), fixed_normalisation=False, fixed_stem=False) == []
    assert (network.spec.mean, stem_of(network), network.assumed) == (IMAGENET_MEAN, (2, False), False)


def test_an_input_unlike_all_conventions_stays_assumed(tmp_path):
    odd = trained((2, False), (3.0, -2.0, 9.0), (0.01, 5.0, 0.3))
    network = rebuilt(odd, tmp_path / "m.pt")
    settle_convention(network, pictures(99, 5), Batching(), fixed_normalisation=False, fixed_stem=False)
    assert network.assumed and distance(network, pictures(99, 5), Batching()) > CLOSE


def test_nothing_is_asked_of_a_suspect_that_states_its_input_or_has_no_batch_norms(cifar_net):
    plain = wrap_module(nn.Sequential(nn.Flatten(), nn.Linear(3072, 4)), image_size=32)
    assert plain.assumed and distance(plain, pictures(9, 5), Batching()) is None
    settled = settle_convention(plain, pictures(9, 5), Batching(), fixed_normalisation=False, fixed_stem=False)
    assert settled == [] and plain.assumed
    stated = wrap_module(copy.deepcopy(cifar_net), image_size=32, mean=(0.1, 0.2, 0.3), std=(1, 1, 1))
    assert settle_convention(stated, pictures(9, 5), Batching(), fixed_normalisation=False, fixed_stem=False) == []
    assert stated.spec.mean == (0.1, 0.2, 0.3) and stem_of(stated) == (1, False)


def test_the_distance_is_the_divergence_of_two_normal_distributions():
    """By torch.distributions; in whatever batches the images come."""
    module = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    module[0].running_mean, module[0].running_var = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.1, 0.3])
    network = wrap_module(module, image_size=32, mean=(0, 0, 0), std=(1, 1, 1))
    x = pictures(50, 5)
    seen = torch.distributions.Normal(x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0).sqrt())
    before = torch.distributions.Normal(module[0].running_mean, module[0].running_var.sqrt())
    expected = float(torch.distributions.kl_divergence(seen, before).median())
    for size in (50, 7):
        assert distance(network, x, Batching(size=size)) == pytest.approx(expected, rel=1e-4)


def test_a_suspect_that_overflows_is_left_as_it_is(tmp_path, cifar_net):
    broken = copy.deepcopy(cifar_net)
    broken.conv1.weight.data.mul_(1e30)
    network = rebuilt(broken, tmp_path / "m.pt")
    settle_convention(network, pictures(50, 5), Batching(), fixed_normalisation=False, fixed_stem=False)
    assert network.assumed


def test_images_are_taken_at_even_intervals():
    assert list(range(1000))[some(1000, 32)] == list(range(0, 960, 15)) and list(range(9))[some(9, 32)] == list(
        range(9)
    )
    assert len(list(range(1000))[some(1000, 224)]) == 16


def test_verify_rebuilds_the_network_as_it_was_trained(tmp_path, cifar_net):
    """As a user runs it, on a file of tensors alone: white-box and black-box."""
    torch.save(cifar_net.state_dict(), tmp_path / "m.pt")
    images, labels = synthetic.demo_images(20, 32, seed=5)
    synthetic.write_folder(tmp_path / "imgs", images, labels, [f"c{i}" for i in range(10)])
    good("keygen", "-o", tmp_path / "k.safetensors", "--data", tmp_path / "imgs")
    asked = ("verify", tmp_path / "m.pt", "--key", tmp_path / "k.safetensors", "--json")
    for more in (("--data", tmp_path / "imgs"), ("--data", tmp_path / "imgs", "--black-box", "--decoys", 1)):
        result = call(*asked, *more)
        if result.code == 1:
            assert "knows none of the classes" in result.err  # its weights are random
            continue
        warnings = result.json["suspects"][0]["warnings"]
        assert any("a stem of stride 1 without max-pooling" in warning for warning in warnings), warnings
        assert not any("assumed" in warning for warning in warnings)
    assert verification.settle_input(
        load_network(tmp_path / "m.pt"), pictures(99, 5), VerifyOptions(), True, Batching()
    )


def test_a_convention_is_taken_whole(tmp_path, cifar_net):
    network = rebuilt(cifar_net, tmp_path / "m.pt")
    take(network, Convention((0.0,) * 3, (1.0,) * 3, (1, True)))
    assert stem_of(network) == (1, True) and network.spec.mean == (0.0,) * 3
    assert float(network.get_buffer("std").max()) == 1
