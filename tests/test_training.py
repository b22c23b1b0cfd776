"""The data pipeline against slow oracles; a training that repeats itself bit for bit, interrupted or not."""

import math
import random
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from radiotag import synthetic, training
from radiotag.errors import RadiotagError
from radiotag.images import png
from radiotag.networks import Network, Spec, build, load_network, read_checkpoint, save_checkpoint
from radiotag.training import (
    Course,
    Dataset,
    Recipe,
    accuracy,
    augment,
    initialised_from,
    load_folder,
    natural_size,
    new_network,
    random_resized_crops,
    size_to_crop,
    train,
)

RECIPE = Recipe(epochs=3, batch_size=8, lr=0.4, seed=5)


def dataset(count=20, classes=3, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return Dataset(images=images, labels=torch.arange(count) % classes, names=tuple("abcdefghij"[:classes]))


def fresh(data, architecture="shufflenet_v2_x0_5", seed=1):
    return new_network(architecture, data, stem=None, seed=seed)


def weights(network):
    return {k: v.clone() for k, v in network.module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- augmentation and schedule


def reflected(i, size):
    """Index i of a row that is mirrored at its ends, the end pixels not repeated."""
    return -i if i < 0 else 2 * (size - 1) - i if i >= size else i


@pytest.mark.parametrize("size", [1, 5, 8, 16, 24])
def test_augment_is_a_crop_of_the_reflected_image_and_a_flip(size):
    images = dataset(40, size=size).images
    found = augment(images, generator(3))
    pad, draws = min(max(1, size // 8), size - 1), generator(3)
    offsets = torch.randint(0, 2 * pad + 1, (2, len(images), 1), generator=draws)
    flips = torch.rand((len(images), 1), generator=draws) < 0.5
    assert 5 < int(flips.sum()) < 35
    for i, image in enumerate(images.numpy()):
        top, left = (int(offsets[axis, i]) - pad for axis in (0, 1))
        slow = np.empty((3, size, size), np.float32)
        for y in range(size):
            for x in range(size):
                column = size - 1 - x if flips[i] else x
                slow[:, y, x] = image[:, reflected(y + top, size), reflected(column + left, size)] / np.float32(255)
        np.testing.assert_allclose(found[i].numpy(), slow, rtol=1e-6)


def test_augment_reaches_every_place_and_both_flips():
    """Without knowing its draws: an image of all different pixels shows where each crop came from."""
    size, pad = 8, 1
    image = torch.arange(3 * size * size, dtype=torch.uint8).view(1, 3, size, size).expand(400, -1, -1, -1)
    padded = np.pad(image[0].numpy(), ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
    crops = {}
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            crop = padded[:, top : top + size, left : left + size]
            crops[crop.tobytes()] = (top, left, False)
            crops[crop[:, :, ::-1].tobytes()] = (top, left, True)
    seen = [crops[row.numpy().tobytes()] for row in (augment(image, generator()) * 255).round().to(torch.uint8)]
    assert set(seen) == set(crops.values())
    assert 150 < sum(flip for _, _, flip in seen) < 250


def test_augment_depends_on_its_generator_alone():
    images = dataset().images
    torch.manual_seed(1)
    first = augment(images, generator(7))
    torch.manual_seed(2)
    assert torch.equal(first, augment(images, generator(7)))
    assert not torch.equal(first, augment(images, generator(8)))
    assert first.dtype == torch.float32
    assert 0 <= first.min() <= first.max() <= 1


@pytest.mark.parametrize("least", [0.08, 0.25, 1.0])
def test_random_resized_crops_are_pieces_of_the_image_of_the_stated_area_and_shape(least):
    """An image whose pixels tell their own place shows where each crop came from, without knowing its draws."""
    count, large, size = 200, 120, 48
    place = torch.linspace(0, 238, large).round()  # two grey levels a pixel
    ramps = torch.stack([place.expand(large, -1), place[:, None].expand(-1, large), torch.zeros(large, large)])
    images = ramps.to(torch.uint8).expand(count, -1, -1, -1)
    views = random_resized_crops(images, size, least, generator())
    assert views.shape == (count, 3, size, size) and views.dtype == torch.float32
    assert 0 <= views.min() <= views.max() <= 1
    inner = views[:, :, 8:-8, 8:-8] * 255 / 2  # places in pixels of the image; away from the borders of the crop
    across = (inner[:, 0, :, -1] - inner[:, 0, :, 0]).mean(1) / (size - 17) * size  # (B,) width of the crop, signed
    down = (inner[:, 1, -1] - inner[:, 1, 0]).mean(1) / (size - 17) * size
    assert down.min() > 0
    assert (60 < (across < 0).sum() < 140) or least == 1
    share, ratio = (across.abs() * down) / large**2, across.abs() / down
    assert share.min() > least * 0.93 - 0.002 and share.max() < 1.05
    assert share.min() < least + 0.08 and share.max() > 0.9  # the whole range
    assert ratio.min() > 0.72 and ratio.max() < 1.39
    assert least == 1 or (ratio.min() < 0.8 and ratio.max() > 1.25)
    centres = inner[:, :2].mean((2, 3))  # (B, 2)
    assert least == 1 or bool((centres.std(0) > 5).all())


def test_random_resized_crops_depend_on_their_generator_alone():
    images = dataset(size=20).images
    torch.manual_seed(1)
    first = random_resized_crops(images, 16, 0.25, generator(7))
    torch.manual_seed(2)
    assert torch.equal(first, random_resized_crops(images, 16, 0.25, generator(7)))
    assert not torch.equal(first, random_resized_crops(images, 16, 0.25, generator(8)))


@pytest.mark.parametrize(("sides", "least", "loaded"), [
    ((160, 160), 0.25, 160), ((500, 400), 0.25, 256), ((500, 400), 0.08, 400), ((100, 90), 0.25, 128),
    ((500, 400), 1.0, 128),
])  # fmt: skip
def test_images_are_loaded_as_large_as_their_crops_need(sides, least, loaded, tmp_path):
    Image.new("RGB", sides).save(tmp_path / "i.png")
    assert size_to_crop(tmp_path, 128, least) == loaded


def rates(recipe, steps, done=0):
    """The rate of each remaining step, as a training uses it."""
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    schedule, seen = training.one_cycle(optimiser, recipe, steps, done), []
    for _ in range(steps - done):
        seen.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    return seen


@pytest.mark.parametrize("warmup", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 10, 100])
def test_the_learning_rate_climbs_and_falls_linearly(steps, warmup):
    recipe = Recipe(lr=0.1, batch_size=64, warmup=warmup)
    seen = rates(recipe, steps)
    top = int(np.argmax(seen))
    assert len(seen) == steps and max(seen) == pytest.approx(0.05) and min(seen) > 0
    assert top == pytest.approx(warmup * steps, abs=1.5)
    for part in (seen[: top + 1], seen[top + 1 :]):
        assert np.ptp(np.diff(part)) < 1e-9 if len(part) > 2 else True
    assert seen[:top] == sorted(seen[:top]) and seen[top:] == sorted(seen[top:], reverse=True)
    for done in range(1, steps):
        assert rates(recipe, steps, done) == pytest.approx(seen[done:])


# ---------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path):
    """Images of several sizes in two classes; every pixel identifies its file."""
    rng = np.random.default_rng(0)
    for name, width, height in (
        ("cat/b.png", 40, 30), ("cat/a.png", 30, 40), ("bird/x/z.png", 16, 16), ("bird/y.png", 21, 90),
        ("cat/c.png", 10, 12),
    ):  # fmt: skip
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return tmp_path / "data"


ORDER = ["bird/x/z.png", "bird/y.png", "cat/a.png", "cat/b.png", "cat/c.png"]


@pytest.mark.parametrize("size", [16, 25])
def test_load_folder_resizes_the_short_side_and_crops_the_centre(folder, size):
    data = load_folder(folder, size)
    assert data.names == ("bird", "cat")
    assert data.labels.tolist() == [0, 0, 1, 1, 1]
    assert data.images.shape == (5, 3, size, size)
    for image, name in zip(data.images, ORDER, strict=True):
        picture = Image.open(folder / name)
        short = min(picture.size)
        width, height = (side * size // short for side in picture.size)  # as torchvision's Resize and CenterCrop
        resized = picture.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (round((side - size) / 2) for side in (width, height))
        expected = np.asarray(resized)[top : top + size, left : left + size]
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_images_of_the_right_size_are_not_touched(folder):
    exact = np.asarray(Image.open(folder / "bird/x/z.png"))
    assert np.array_equal(load_folder(folder, 16).images[0].permute(1, 2, 0).numpy(), exact)
    assert load_folder(folder, None).images.shape[-1] == 16  # the first image's own size


@pytest.mark.parametrize(("sides", "size"), [((32, 32), 32), ((64, 300), 64), ((65, 65), 224), ((500, 400), 224)])
def test_the_natural_size(sides, size, tmp_path):
    Image.new("RGB", sides).save(tmp_path / "i.png")
    assert natural_size(tmp_path) == size


def test_labels_follow_the_given_names(folder):
    data = load_folder(folder, 8, ("dog", "cat", "bird"))
    assert data.labels.tolist() == [2, 2, 1, 1, 1]
    with pytest.raises(RadiotagError, match="the class 'bird' is not one of the model's"):
        load_folder(folder, 8, ("dog", "cat"))


def test_a_flat_folder_is_one_class(folder):
    data = load_folder(folder / "cat", 8)
    assert (data.names, data.labels.tolist()) == (("",), [0, 0, 0])
    assert fresh(data).spec.class_names is None


def test_large_sets_lie_in_a_file_and_are_equal(folder, monkeypatch, tmp_path):
    expected = load_folder(folder, 16)
    monkeypatch.setattr(training, "IN_MEMORY", 0)
    spool = tmp_path / "spool"
    spool.mkdir()
    monkeypatch.setattr(training.tempfile, "tempdir", str(spool))
    mapped = []
    memmap = np.memmap
    monkeypatch.setattr(np, "memmap", lambda *a, **k: mapped.append(memmap(*a, **k)) or mapped[-1])
    data = load_folder(folder, 16)
    assert [m.shape for m in mapped] == [(5, 3, 16, 16)]
    assert torch.equal(data.images, expected.images)
    assert list(spool.iterdir()) == []  # gone from the folder while still in use
    assert torch.equal(augment(data.images, generator()), augment(expected.images, generator()))


def test_broken_and_missing_folders_are_errors(tmp_path):
    with pytest.raises(RadiotagError, match="no such folder"):
        load_folder(tmp_path / "missing", 16)
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(RadiotagError, match=r"bad\.png"):
        load_folder(tmp_path, 16)
    with pytest.raises(RadiotagError, match=r"bad\.png"):
        natural_size(tmp_path)


def test_images_that_cannot_be_read_are_left_out_and_named(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.png").write_bytes(png(np.full((20, 24, 3), 10 * i, np.uint8)))
    sound = load_folder(tmp_path, None)
    (tmp_path / "a" / "0.png").write_bytes(b"no image")
    (tmp_path / "b" / "1.png").write_bytes(b"")
    data = load_folder(tmp_path, None)
    assert data.broken == ("a/0.png", "b/1.png") and data.names == ("a", "b") and sound.broken == ()
    assert data.labels.tolist() == [0, 0, 1, 1] and data.images.shape == (4, 3, 20, 20)
    assert torch.equal(data.images, sound.images[[1, 2, 3, 5]])


# ---------------------------------------------------------------- networks for a data set


def test_a_new_network_is_normalised_by_the_data_and_depends_on_the_seed_alone():
    data = dataset(30, size=24)
    torch.manual_seed(1)
    network, state = fresh(data), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left as it was
    torch.manual_seed(2)
    assert same(weights(network), weights(fresh(data)))
    assert not same(weights(network), weights(fresh(data, seed=2)))
    values = data.images.double().numpy() / 255
    assert network.spec.mean == pytest.approx(values.mean((0, 2, 3)), abs=1e-4)
    assert network.spec.std == pytest.approx(values.std((0, 2, 3)), abs=1e-4)
    assert network.spec.class_names == ("a", "b", "c")
    assert (network.spec.classes, network.spec.image_size, network.spec.small_stem) == (3, 24, True)


def test_a_student_takes_no_teacher_that_names_its_classes_otherwise():
    data, teacher = dataset(classes=3), fresh(dataset(classes=3))
    teacher.spec = replace(teacher.spec, class_names=("z", "y", "x"))
    with pytest.raises(RadiotagError, match="name their classes differently"):
        train(fresh(data), data, Recipe(epochs=1), Course(teacher=teacher))


def test_the_stem_follows_the_size_unless_it_is_given():
    large = dataset(2, size=72)
    assert not fresh(large).spec.small_stem
    assert new_network("resnet10", large, stem=True, seed=0).spec.small_stem
    assert new_network("resnet10", large, stem=True, seed=0).module.conv1.kernel_size == (3, 3)


def test_constant_images_give_no_division_by_zero():
    data = replace(dataset(4), images=torch.full((4, 3, 16, 16), 128, dtype=torch.uint8))
    assert fresh(data).spec.std == (0.01, 0.01, 0.01)


def test_starting_from_a_checkpoint_of_other_classes_makes_the_head_anew(tmp_path):
    old = fresh(dataset(classes=3))
    save_checkpoint(tmp_path / "m.pt", old.module, old.spec)
    data = dataset(classes=5)
    network = initialised_from(tmp_path / "m.pt", data, seed=4)
    assert (network.spec.classes, network.spec.class_names) == (5, tuple("abcde"))
    before, after = weights(old), weights(network)
    changed = {k for k in before if not torch.equal(before[k], after[k])} if before.keys() == after.keys() else None
    assert changed == {"fc.weight", "fc.bias"}
    assert after["fc.weight"].shape == (5, 1024)
    assert same(after, weights(initialised_from(tmp_path / "m.pt", data, seed=4)))
    assert not same(after, weights(initialised_from(tmp_path / "m.pt", data, seed=5)))
    x = torch.rand(2, 3, 16, 16, generator=generator())
    logits = network.features(x) @ after["fc.weight"].T + after["fc.bias"]
    torch.testing.assert_close(logits, network(x))
    train(network, data, replace(RECIPE, epochs=1), Course(output=tmp_path / "new.pt"))
    assert load_network(tmp_path / "new.pt").spec == network.spec


def test_starting_from_a_checkpoint_of_the_same_classes_keeps_everything(tmp_path):
    old = fresh(dataset(classes=3))
    save_checkpoint(tmp_path / "m.pt", old.module, old.spec)
    network = initialised_from(tmp_path / "m.pt", replace(dataset(classes=3), names=("x", "y", "z")), seed=4)
    assert same(weights(old), weights(network))
    assert network.spec == replace(old.spec, class_names=("x", "y", "z"))


def test_starting_from_a_checkpoint_for_images_of_another_size_looks_at_those(tmp_path):
    """Not after resizing them to the size that it was first trained on."""
    old, data = fresh(dataset(classes=3)), dataset(classes=3, size=32)
    save_checkpoint(tmp_path / "m.pt", old.module, old.spec)
    network = initialised_from(tmp_path / "m.pt", data, seed=4)
    assert same(weights(old), weights(network)) and network.spec == replace(old.spec, image_size=32)
    pixels = data.images / 255
    assert torch.equal(network(pixels), load_network(tmp_path / "m.pt", image_size=32)(pixels))
    assert not torch.equal(network(pixels), load_network(tmp_path / "m.pt")(pixels))


def test_squeezenet_cannot_change_its_classes(tmp_path):
    old = fresh(dataset(), "squeezenet1_1")
    save_checkpoint(tmp_path / "m.pt", old.module, old.spec)
    with pytest.raises(RadiotagError, match="does not end in a linear layer"):
        initialised_from(tmp_path / "m.pt", dataset(classes=5), seed=0)
    with pytest.raises(RadiotagError, match="does not end in a linear layer") as error:
        train(old, dataset(), replace(RECIPE, head_only=True))
    assert "--head-only" in error.value.hint


# ---------------------------------------------------------------- training


def test_training_repeats_itself_and_depends_on_the_seed():
    data = dataset()
    results = []
    for noise, seed in ((1, 5), (2, 5), (3, 6)):
        network = fresh(data)
        torch.manual_seed(noise)
        random.seed(noise)
        state = torch.get_rng_state()
        train(network, data, replace(RECIPE, epochs=1, seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
        results.append(weights(network))
        assert not network.module.training
        assert not any(p.requires_grad for p in network.parameters())
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("shufflenet_v2_x0_5", {}), ("shufflenet_v2_x0_5", {"robust": True}), ("mobilenet_v3_small", {"robust": True}),
        ("mobilenet_v3_small", {"crops": 0.25}),  # this one has dropout
    ],
)  # fmt: skip
def test_a_resumed_training_repeats_an_undisturbed_one(architecture, changes, tmp_path):
    data, recipe = dataset(), replace(RECIPE, **changes)
    torch.manual_seed(1)
    whole = fresh(data, architecture)
    train(whole, data, recipe, Course(output=tmp_path / "whole.pt"))
    path, epochs = tmp_path / "m.pt", []

    def interrupt(epoch, share, loss):
        if epoch == 1 and share > 0.5:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(fresh(data, architecture), data, recipe, Course(output=path, progress=interrupt))
    assert not same(read_checkpoint(path)[0], weights(whole))
    network = fresh(data, architecture)
    torch.manual_seed(99)  # another process, where the global generator is elsewhere
    train(network, data, recipe, Course(output=path, resume=True, progress=lambda epoch, *_: epochs.append(epoch)))
    assert sorted(set(epochs)) == [1, 2]
    assert same(weights(network), weights(whole))
    assert same(read_checkpoint(path)[0], read_checkpoint(tmp_path / "whole.pt")[0])


def test_resuming_what_is_done_or_not_begun(tmp_path):
    data, path = dataset(), tmp_path / "m.pt"
    first = fresh(data)
    train(first, data, replace(RECIPE, epochs=1), Course(output=path, resume=True))  # nothing there: starts
    before = path.read_bytes()
    again = fresh(data, seed=9)
    train(again, data, replace(RECIPE, epochs=1), Course(output=path, resume=True))
    assert same(weights(first), weights(again))
    assert path.read_bytes() == before
    train(again, data, replace(RECIPE, epochs=2), Course(output=path, resume=True))  # more epochs are no contradiction
    assert torch.load(path, weights_only=True)["epoch"] == 2


def test_a_training_that_an_earlier_version_began_goes_on(tmp_path):
    data, path = dataset(), tmp_path / "m.pt"
    train(fresh(data), data, replace(RECIPE, epochs=1), Course(output=path))
    content = torch.load(path, weights_only=True)
    del content["recipe"]["robust"]
    torch.save(content, path)
    with pytest.raises(RadiotagError, match="its robust is False, not True"):
        train(fresh(data), data, replace(RECIPE, epochs=2, robust=True), Course(output=path, resume=True))
    train(fresh(data), data, replace(RECIPE, epochs=2), Course(output=path, resume=True))
    assert torch.load(path, weights_only=True)["epoch"] == 2


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A checkpoint after one of three epochs, as bytes."""
    path, data = tmp_path_factory.mktemp("interrupted") / "m.pt", dataset()

    def interrupt(epoch, share, loss):
        if epoch == 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(fresh(data), data, RECIPE, Course(output=path, progress=interrupt))
    return path.read_bytes()


@pytest.mark.parametrize(
    ("architecture", "data", "recipe", "message"),
    [
        ("mobilenet_v3_small", {}, {}, "its architecture is shufflenet_v2_x0_5, not mobilenet_v3_small"),
        ("shufflenet_v2_x0_5", {"classes": 5}, {}, "its classes is 3, not 5"),
        ("shufflenet_v2_x0_5", {"size": 32}, {}, "its image_size is 16, not 32"),
        ("shufflenet_v2_x0_5", {"seed": 1}, {}, "its mean is"),
        ("shufflenet_v2_x0_5", {}, {"lr": 0.2}, "its lr is 0.4, not 0.2"),
        ("shufflenet_v2_x0_5", {}, {"seed": 6}, "its seed is 5, not 6"),
        ("shufflenet_v2_x0_5", {}, {"batch_size": 10}, "its batch_size is 8, not 10"),
        ("shufflenet_v2_x0_5", {}, {"head_only": True}, "its head_only is False, not True"),
    ],
)
def test_resuming_another_training_names_the_difference(interrupted, architecture, data, recipe, message, tmp_path):
    path = tmp_path / "m.pt"
    path.write_bytes(interrupted)
    images = dataset(**data)
    with pytest.raises(RadiotagError, match=rf"m\.pt is of another training: {message}") as error:
        train(fresh(images, architecture), images, replace(RECIPE, **recipe), Course(output=path, resume=True))
    assert "--resume" in error.value.hint
    assert path.read_bytes() == interrupted


def test_resuming_from_what_is_no_checkpoint_is_an_error(interrupted, tmp_path):
    data, path = dataset(4), tmp_path / "m.pt"
    network = fresh(data)

    def refused(message):
        with pytest.raises(RadiotagError, match=message) as error:
            train(network, data, RECIPE, Course(output=path, resume=True))
        assert "\n" not in str(error.value)
        assert error.value.hint

    for content in (b"", b"text", interrupted[:1000], interrupted[:-100]):
        path.write_bytes(content)
        refused(r"m\.pt is not a checkpoint of this training")
    for value in ([1], {}, network.module.state_dict(), {"recipe": 5, "radiotag": 5}):
        torch.save(value, path)
        refused(r"m\.pt is not a checkpoint of this training")
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, network.module, network.spec)
    refused("holds no optimiser state")
    path = tmp_path
    refused("is not a checkpoint")


def test_a_checkpoint_is_written_after_every_epoch(tmp_path):
    data, path, network, found = dataset(), tmp_path / "m.pt", fresh(dataset()), []

    def watch(epoch, share, loss):
        if epoch and not found[epoch:]:
            found.append(torch.load(path, weights_only=True)["epoch"])
        elif not found:
            found.append(path.exists())

    train(network, data, RECIPE, Course(output=path, progress=watch))
    assert found == [False, 1, 2]
    loaded = load_network(path)
    assert loaded.spec == network.spec
    assert same(weights(loaded), weights(network))
    save_checkpoint(tmp_path / "bare.safetensors", network.module, network.spec)
    assert same(weights(load_network(tmp_path / "bare.safetensors")), weights(network))


def test_progress_counts_up_to_one_in_every_epoch():
    seen = []
    data = dataset(17)  # a batch of one is left out: batch normalisation cannot take it
    train(fresh(data), data, replace(RECIPE, epochs=2), Course(progress=lambda *step: seen.append(step)))
    assert [(epoch, share) for epoch, share, _ in seen] == [(0, 0.5), (0, 1.0), (1, 0.5), (1, 1.0)]
    assert all(0 < loss < 20 for *_, loss in seen)


def test_a_step_is_pytorchs_own(monkeypatch):
    """One epoch of one batch, without augmentation, against the textbook: cross-entropy and Nesterov's SGD."""
    data = dataset(6, size=32)
    network = fresh(data, "resnet10")  # in float32, deeper networks of chance blow rounding errors up
    reference = fresh(data, "resnet10").module.train().requires_grad_(True)
    monkeypatch.setattr(training, "augment", lambda images, _: images.float() / 255)
    monkeypatch.setattr(training, "mixed_precision", lambda _: nullcontext())  # as a processor without bfloat16 does
    train(network, data, replace(RECIPE, epochs=1))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (network.spec.mean, network.spec.std))
    F.cross_entropy(reference((data.images.float() / 255 - mean) / std), data.labels).backward()
    rate = RECIPE.lr * 8 / 128
    for name, parameter in reference.named_parameters():
        decay = 5e-4 * parameter.detach() * (parameter.dim() > 1)
        gradient = parameter.grad + decay
        expected = parameter.detach() - rate * (gradient + 0.9 * gradient)
        torch.testing.assert_close(network.module.get_parameter(name), expected, rtol=1e-4, atol=2e-6)


def test_an_attack_is_the_gradients_step_from_a_random_point_of_the_ball():
    data = dataset(40)
    pixels = data.images.float() / 255 * 0.8 + 0.1  # nothing is clipped
    network = fresh(data, "resnet10").train().requires_grad_(True)
    before, radius = weights(network), training.RADIUS * math.sqrt(3 * 16 * 16)
    change = training.adversarial_examples(network, pixels, data.labels, generator()) - pixels
    assert network.training and all(layer.momentum == 0.1 for layer in network.modules() if hasattr(layer, "momentum"))
    after = weights(network)
    assert all(torch.equal(before[k], after[k]) for k in before if not k.endswith("num_batches_tracked"))
    assert all(parameter.grad is None for parameter in network.parameters())
    length = change.flatten(1).norm(dim=1)
    assert length.max() < 1.0001 * radius and length.min() > 0.5 * radius
    draws = generator()  # the same random points, and each image's step by itself
    start = torch.randn(pixels.shape, generator=draws)
    start = start / start.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * radius
    moved = (pixels + start * torch.rand((40, 1), generator=draws).view(-1, 1, 1, 1)).requires_grad_()
    F.cross_entropy(network(moved), data.labels).backward()
    for i in range(40):
        step = moved[i].detach() - pixels[i] + radius * moved.grad[i] / moved.grad[i].norm()
        torch.testing.assert_close(change[i], step * min(1.0, radius / float(step.norm())), rtol=1e-3, atol=1e-6)
    dark = training.adversarial_examples(network, torch.zeros_like(pixels), data.labels, generator())
    assert 0 <= float(dark.min()) < float(dark.max()) <= radius


@pytest.mark.slow
def test_robust_training_withstands_more(monkeypatch):
    monkeypatch.setattr(training, "RADIUS", 0.03)
    images, labels = synthetic.demo_images(200, 16, seed=0)
    data = Dataset(images=images, labels=labels, names=synthetic.CLASS_NAMES)
    lost = []
    for robust in (False, True):
        network = fresh(data, "resnet10")
        train(network, data, Recipe(epochs=8, batch_size=20, robust=robust))
        pixels = images.float() / 255
        harder = training.adversarial_examples(network, pixels, labels, generator())
        with torch.no_grad():
            lost.append(F.cross_entropy(network(harder), labels) - F.cross_entropy(network(pixels), labels))
    assert lost[1] < 0.5 * lost[0], lost


def test_head_only_changes_the_head_alone():
    data = dataset()
    network = fresh(data)
    before = weights(network)
    train(network, data, replace(RECIPE, epochs=2, head_only=True))
    after = weights(network)
    assert {k for k in before if not torch.equal(before[k], after[k])} == {"fc.weight", "fc.bias"}  # nor BN statistics


def test_a_tiny_batch_or_data_set_is_an_error_not_a_training_of_nothing():
    data = dataset()
    for images, recipe in ((dataset(1), RECIPE), (data, replace(RECIPE, batch_size=1))):
        with pytest.raises(RadiotagError, match="two images a batch"):
            train(fresh(images), images, recipe)


def test_a_network_that_cannot_take_the_images_is_an_error():
    network = pooled()
    network.module.fc = nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 3))
    with pytest.raises(RadiotagError, match="pooled does not run at 16 pixels"):
        train(network, dataset(4), RECIPE)


def test_divergence_is_an_error_and_keeps_the_last_checkpoint(tmp_path):
    data = dataset()
    network = fresh(data)
    train(network, data, replace(RECIPE, epochs=1), Course(output=tmp_path / "m.pt"))
    before = (tmp_path / "m.pt").read_bytes()
    with pytest.raises(RadiotagError, match="diverged") as error:
        train(network, data, replace(RECIPE, lr=1e30), Course(output=tmp_path / "m.pt"))
    assert "--lr" in error.value.hint
    assert (tmp_path / "m.pt").read_bytes() == before


class Pooled(nn.Module):
    """Classifies by colour: enough to learn, and small enough to learn at once."""

    def __init__(self, classes=3):
        super().__init__()
        self.fc = nn.Linear(3, classes)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


def coloured(count=60, seed=0):
    """Images of one dominant colour, which is the label."""
    data = dataset(count, seed=seed)
    images = (data.images // 4).clone()
    images[torch.arange(count), data.labels] += 120
    return replace(data, images=images)


def pooled(seed=0):
    torch.manual_seed(seed)
    spec = Spec(architecture="pooled", classes=3, small_stem=False, image_size=16, mean=(0.3,) * 3, std=(0.2,) * 3)
    return Network(Pooled(), spec)


def test_a_student_learns_its_teacher_and_not_the_labels():
    data = coloured()
    teacher, student = pooled(), pooled(1)
    teacher.module.load_state_dict({"fc.weight": 3 * torch.eye(3)[[1, 2, 0]], "fc.bias": torch.zeros(3)})
    before = weights(teacher)
    assert accuracy(teacher, replace(data, labels=(data.labels + 2) % 3)) == 1.0  # it is always wrong
    train(student, data, Recipe(epochs=15, batch_size=16, lr=4.0), Course(teacher=teacher))
    pixels = data.images.float() / 255
    assert torch.equal(student(pixels).argmax(1), teacher(pixels).argmax(1))
    assert accuracy(student, data) == 0.0
    divergence = F.kl_div(student(pixels).log_softmax(1), teacher(pixels).softmax(1), reduction="batchmean")
    assert divergence < 0.02  # it matches probabilities, not just the winner
    assert same(before, weights(teacher))


def test_teacher_and_student_must_have_the_same_classes():
    data = dataset(classes=5)
    with pytest.raises(RadiotagError, match="3 and 5 classes"):
        train(fresh(data), data, RECIPE, Course(teacher=pooled()))


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_accuracy_counts(batch_size):
    data, network = coloured(20), pooled(3)
    hits = sum(
        int(network(image[None].float() / 255)[0].argmax()) == int(label)
        for image, label in zip(data.images, data.labels, strict=True)
    )
    assert 0 < hits < 20
    assert accuracy(network, data, batch_size=batch_size) == hits / 20


def test_train_returns_the_accuracy_on_held_out_images_or_none():
    data, held_out = coloured(), coloured(30, seed=9)
    network = pooled()
    assert accuracy(network, held_out) < 1
    found = train(network, data, Recipe(epochs=20, batch_size=16, lr=4.0), Course(validation=held_out))
    assert found == accuracy(network, held_out) == 1.0
    assert train(pooled(), data, Recipe(epochs=1)) is None


def test_the_demo_images_can_be_learnt():
    images, labels = synthetic.demo_images(200, 16, seed=0)
    data = Dataset(images=images, labels=labels, names=synthetic.CLASS_NAMES)
    losses = []
    network = fresh(data, "resnet10")
    recipe = Recipe(epochs=10, batch_size=20, lr=0.1)
    found = train(network, data, recipe, Course(validation=data, progress=lambda *step: losses.append(step[2])))
    assert losses[0] > 0.8 * math.log(10)
    assert losses[-1] < 0.8 * math.log(10)  # chance is log 10
    assert found > 0.4


def test_a_built_network_of_any_kind_trains_for_a_step():
    data = dataset(4, size=32)
    for name in ("shufflenet_v2_x0_5", "squeezenet1_1", "regnet_x_400mf"):
        network = fresh(data, name)
        before = weights(network)
        train(network, data, replace(RECIPE, epochs=1))
        after = weights(network)
        moved = [k for k in before if not torch.equal(before[k], after[k])]
        assert len(moved) > 0.8 * sum("num_batches" not in k for k in before)
        assert build(network.spec).state_dict().keys() == after.keys()
