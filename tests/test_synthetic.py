"""Synthetic images: reproducible one by one, natural in their statistics; classes not given away."""

import numpy as np
import pytest
import torch
from PIL import Image

from radiotag import networks, synthetic
from radiotag.synthetic import CLASS_NAMES, dead_leaves, demo_images, write_folder


@pytest.fixture(scope="module")
def leaves():
    return dead_leaves(160, 64, seed=3)


@pytest.fixture(scope="module")
def demo():
    return demo_images(1000, 32, seed=4)


def test_images_are_bytes_of_the_asked_shape(leaves, demo):
    images, labels = demo
    assert (leaves.dtype, tuple(leaves.shape)) == (torch.uint8, (160, 3, 64, 64))
    assert (images.dtype, tuple(images.shape)) == (torch.uint8, (1000, 3, 32, 32))
    assert (labels.dtype, tuple(labels.shape)) == (torch.int64, (1000,))
    assert leaves.min() == images.min() == 0
    assert leaves.max() == images.max() == 255


@pytest.mark.parametrize("size", [1, 8, 33])
def test_any_size_and_no_images_at_all(size):
    assert dead_leaves(2, size, seed=0).shape == demo_images(2, size, seed=0)[0].shape == (2, 3, size, size)
    assert dead_leaves(0, size, seed=0).shape == demo_images(0, size, seed=0)[0].shape == (0, 3, size, size)


def test_image_depends_on_seed_and_index_alone(leaves, demo):
    state = np.random.get_state()[1].copy(), torch.get_rng_state()
    assert torch.equal(dead_leaves(7, 64, seed=3), leaves[:7])
    images, labels = demo_images(13, 32, seed=4)
    assert torch.equal(images, demo[0][:13])
    assert torch.equal(labels, demo[1][:13])
    assert np.array_equal(np.random.get_state()[1], state[0])
    assert torch.equal(torch.get_rng_state(), state[1])


@pytest.mark.parametrize("draw", [dead_leaves, lambda *a, **k: demo_images(*a, **k)[0]])
def test_no_two_seeds_or_indices_share_an_image(draw):
    # 2**32 + 1 and (1, 1) must not meet, as they would if seed and index were joined into one list of 32-bit words.
    images = torch.cat([draw(20, 32, seed=seed) for seed in (0, 1, 2**32, 2**32 + 1)]).flatten(1).float()
    assert torch.pdist(images).min() / images.shape[1] ** 0.5 > 15  # root mean square, in grey levels


def test_negative_seed_is_refused():
    with pytest.raises(ValueError, match="non-negative"):
        dead_leaves(1, 16, seed=-1)


def radial_power(images):
    """Mean power of the luminance at every whole frequency below Nyquist: (size // 2 - 1,)."""
    grey = images.double().mean(1)
    window = torch.hann_window(grey.shape[-1], periodic=False, dtype=torch.float64)
    centred = (grey - grey.mean((1, 2), keepdim=True)) * window * window[:, None]
    power = torch.fft.fft2(centred).abs().square().mean(0)
    f = torch.fft.fftfreq(grey.shape[-1], 1 / grey.shape[-1])
    ring = (f.square() + f[:, None].square()).sqrt().round()
    return torch.stack([power[ring == r].mean() for r in range(1, grey.shape[-1] // 2)])


def slope(images):
    power = radial_power(images)
    return np.polyfit(np.log(np.arange(2, len(power) + 1)), np.log(power.numpy())[1:], 1)[0]


def test_power_spectrum_is_that_of_photographs(leaves):
    assert -3.2 < slope(leaves) < -1.2
    shuffled = leaves.flatten(2)[:, :, torch.randperm(64 * 64, generator=torch.Generator().manual_seed(0))]
    assert abs(slope(shuffled.view_as(leaves))) < 0.3  # the measure itself: noise is white


def test_edges_at_all_scales(leaves):
    grey = leaves.float().mean(1)
    for step in (1, 2, 4, 8):
        jumps = (grey[:, :, step:] - grey[:, :, :-step]).flatten()
        jumps = jumps - jumps.mean()
        kurtosis = jumps.pow(4).mean() / jumps.pow(2).mean() ** 2
        assert kurtosis > 4  # 3 for any Gaussian texture, whatever its spectrum


def test_brightness_and_colour_vary_and_channels_agree(leaves):
    means = leaves.float().mean((2, 3))
    assert means.mean(0).sub(120).abs().max() < 25
    assert means.mean(1).std() > 20
    assert (means[:, 0] - means[:, 2]).std() > 10
    between = torch.corrcoef(leaves.float().transpose(0, 1).flatten(1))
    assert between.min() > 0.5  # as in photographs; independent channels would give 0
    assert between[0, 2] < 0.97  # and grey images 1


def test_labels_take_turns(demo):
    assert len(set(CLASS_NAMES)) == 10
    assert torch.bincount(demo[1]).tolist() == [100] * 10
    assert demo_images(23, 8, seed=0)[1].tolist() == [i % 10 for i in range(23)]


def test_no_near_duplicates_within_a_class(demo):
    images, labels = demo
    for label in range(10):
        rows = images[labels == label].flatten(1).float()
        assert torch.pdist(rows).min() / rows.shape[1] ** 0.5 > 15


def nearest_mean_accuracy(features, labels):
    """Accuracy on the second half of the nearest class mean of the first half."""
    half = len(labels) // 2
    means = torch.stack([features[:half][labels[:half] == label].mean(0) for label in labels.unique()])
    return (torch.cdist(features[half:], means).argmin(1) == labels[half:]).double().mean().item()


def test_pixels_and_colour_do_not_give_the_class_away(demo):
    images, labels = demo[0].float(), demo[1]
    assert nearest_mean_accuracy(images.flatten(1), labels) < 0.2
    assert nearest_mean_accuracy(torch.cat([images.mean((2, 3)), images.std((2, 3))], 1), labels) < 0.25


def test_pattern_shows(demo):
    images, labels = demo[0].float().mean(1), demo[1] % 2
    bends = (
        images[:, 1:-1, 1:-1] * 4
        - images[:, 2:, 1:-1]
        - images[:, :-2, 1:-1]
        - images[:, 1:-1, 2:]
        - images[:, 1:-1, :-2]
    )
    assert nearest_mean_accuracy(bends.abs().mean((1, 2))[:, None].log(), labels) > 0.7


@pytest.mark.parametrize(
    ("name", "area"),
    [("disc", np.pi), ("square", 2), ("triangle", 0.75 * 3**0.5), ("cross", 2.04), ("ring", 0.75 * np.pi)],
)
def test_shape_covers_its_area(name, area):
    outline = synthetic.OUTLINES[synthetic.SHAPES.index(name)][None] * 0.8
    ground, rng = np.zeros_like(outline), np.random.default_rng(0)
    colours = np.array([[0.0, 0, 0], [1, 1, 1]])
    leaves = synthetic._surface(rng, np.concatenate([ground, outline]), colours, 100, 0.0)
    leaves.shading[:] = 0
    painted = synthetic._render(rng, leaves, 100)
    assert painted.mean() * 4 == pytest.approx(0.64 * area, rel=0.04)
    assert set(np.unique(painted[..., 0] * 4)) <= {0, 1, 2, 3, 4}  # four samples a pixel
    assert painted[50, 50, 0] == (name != "ring")


def test_folder_holds_the_same_pixels(tmp_path):
    images, labels = demo_images(12, 16, seed=0)
    write_folder(tmp_path / "train", images, labels, CLASS_NAMES)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert files == sorted(f"train/{CLASS_NAMES[i % 10]}/{i:05d}.png" for i in range(12))
    for i, image in enumerate(images):
        with Image.open(tmp_path / "train" / CLASS_NAMES[i % 10] / f"{i:05d}.png") as opened:
            assert np.array_equal(np.asarray(opened), image.permute(1, 2, 0))


def test_folder_refuses_labels_that_do_not_match(tmp_path):
    with pytest.raises(ValueError, match="shorter"):
        write_folder(tmp_path, torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), ["a"])


def test_the_inverted_images_are_what_the_built_in_network_takes_for_its_classes():
    images = synthetic.inverted()
    assert images.dtype == torch.uint8
    assert images.shape == (400, 3, 32, 32)
    with torch.no_grad():
        answers = networks.load_network(networks.BUILTIN)(images.float() / 255).argmax(1)
    assert (answers == torch.arange(400) % 110).float().mean() > 0.95
    assert len({image.numpy().tobytes() for image in images}) == 400
