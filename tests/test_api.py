"""The Python face: what the commands do, on what a researcher holds in memory."""

import inspect
import json
import stat
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
from helpers import call, environment, good, leftovers, pixels, tree
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from torch import nn

import radiotag
from radiotag import MarkOptions, RadiotagError, VerifyOptions, answers, api, pairing, synthetic
from radiotag.blackbox import Queries
from radiotag.cosines import pattern_images
from radiotag.keys import Key, patterned
from radiotag.manifest import read_manifest
from radiotag.networks import Network, marking_weights, save_checkpoint
from radiotag.suspect import Batching
from radiotag.verification import as_json, suspect_digest

NAMES = ("ant", "bee", "cat")
MEAN, STD = (0.5, 0.5, 0.5), (0.2, 0.3, 0.25)  # the normalisation of the suspects here
HELD = VerifyOptions(image_size=32, mean=MEAN, std=STD)
QUICK = MarkOptions(steps=2)
NORMALISED = ("--mean", "0.5,0.5,0.5", "--std", "0.2,0.3,0.25", "--image-size", 32)


# ---------------------------------------------------------------- what the tests work on


def pictures(count, seed):
    """Faint textures on grey (N, 32, 32, 3), each a little more of its class's colour; and the classes, in turn."""
    drawn, _ = synthetic.demo_images(count, 32, seed=seed)
    images = 128 + 0.1 * (drawn.numpy().transpose(0, 2, 3, 1) - 128.0)
    labels = np.arange(count) % 3
    images[np.arange(count), :, :, labels] += 24
    return images.round().clip(0, 255).astype(np.uint8), labels


def write_pngs(folder, images, names):
    """Images as CLASS/NNNNNNN.png, by their places in the whole array."""
    for i, (image, name) in enumerate(zip(images, names, strict=True)):
        path = folder / name / f"{i:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def reader(patterns, outputs=None):
    """A classifier by colour that is also moved by patterns (C, m): what learning from marked images comes to.

    outputs: which output each class has, in order by default; the others answer nothing.
    """
    outputs = list(range(len(patterns))) if outputs is None else outputs
    layer = nn.Linear(3 * 32 * 32, max(outputs) + 1)
    colours = torch.eye(3)[torch.arange(len(patterns)) % 3][:, :, None, None].expand(-1, 3, 32, 32) / 1024
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[outputs] = (10 * colours + 0.5 * pattern_images(patterns, 32, 32)).flatten(1).float()
        layer.bias.fill_(-9)
        layer.bias[outputs] = 0
    return nn.Sequential(nn.Flatten(), layer)


def logits_of(module):
    """The module as a function of uint8 images (B, H, W, 3), as it would stand behind an interface."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

    def classify(images):
        assert images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3
        with torch.no_grad():
            return module((torch.from_numpy(images).permute(0, 3, 1, 2).contiguous() / 255 - mean) / std).numpy()

    return classify


@dataclass(frozen=True)
class World:
    root: Path
    images: np.ndarray  # (12, 32, 32, 3)
    names: list  # their classes
    folder: Path  # the same images as files
    key: Key  # names the classes
    path: Path  # its file
    marked: nn.Module  # a suspect that reads the key's patterns
    clean: nn.Module  # one that reads another key's
    file: Path  # the weights of the first
    builder: str  # for --arch


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    images, labels = pictures(12, seed=3)
    names = [NAMES[label] for label in labels]
    folder = write_pngs(root / "images", images, names)
    key = radiotag.keygen(root / "k.safetensors", classes=NAMES)
    marked, clean = reader(key.patterns), reader(radiotag.keygen(classes=NAMES).patterns)
    torch.save(marked.state_dict(), root / "marked.pt")
    (root / "mine.py").write_text(
        "from torch import nn\n"
        "def net(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))\n"
    )
    return World(
        root, images, names, folder, key, root / "k.safetensors", marked, clean, root / "marked.pt",
        f"{root / 'mine.py'}:net",
    )  # fmt: skip


def command(world, *more):
    """What `radiotag verify` says of the suspect's file."""
    asked = ("verify", world.file, "--key", world.path, "--arch", world.builder, *NORMALISED, "--json")
    return good(*asked, *more).json["suspects"][0]


# ---------------------------------------------------------------- the package


def test_importing_the_package_loads_nothing_heavy():
    heavy = "[name for name in ('torch', 'torchvision', 'scipy', 'numpy', 'PIL', 'safetensors') if name in sys.modules]"
    code = f"import sys, radiotag; dir(radiotag); radiotag.RadiotagError; radiotag.__version__; print(*{heavy}, 'end')"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["end"]


def test_the_package_names_what_it_has_and_nothing_else():
    public = {"keygen", "mark", "verify", "load_key", "MarkOptions", "VerifyOptions", "RadiotagError", "__version__"}
    assert set(radiotag.__all__) == public <= set(dir(radiotag))
    assert radiotag.mark is api.mark and radiotag.VerifyOptions is VerifyOptions
    with pytest.raises(AttributeError, match="'radiotag' has no attribute 'embed'"):
        radiotag.embed  # noqa: B018
    assert not hasattr(radiotag, "torch")


def test_the_signatures_are_those_that_callers_rely_on():
    expected = {
        "load_key": "(path)",
        "keygen": "(output=None, *, network='builtin', classes=1000, beacon=None, committed=None, force=False)",
        "mark": "(source, key, output=None, *, labels=None, options=None, progress)",
        "verify": "(suspect, key, data=None, *, labels=None, options=None, progress)",
    }
    for name, told in expected.items():
        function = getattr(radiotag, name)
        signature = inspect.signature(function)
        bare = [
            p.replace(annotation=p.empty, default=p.empty if p.name == "progress" else p.default)
            for p in signature.parameters.values()
        ]
        assert str(inspect.Signature(bare)) == told
        assert signature.parameters.keys() | {"return"} == get_type_hints(function).keys()
        assert "RadiotagError" in function.__doc__
    mark_options = "fraction epsilon min_psnr steps format seed device batch_size force strict"
    verify_options = "architecture image_size mean std manifest alpha calibrate black_box decoys device batch_size"
    assert {field.name for field in fields(MarkOptions)} >= set(mark_options.split())
    assert {field.name for field in fields(VerifyOptions)} >= set(verify_options.split())


# ---------------------------------------------------------------- keygen


def test_a_key_is_written_as_the_command_writes_it(tmp_path):
    key = radiotag.keygen(tmp_path / "k.safetensors", classes=NAMES)
    assert sorted(tree(tmp_path)) == ["k.pub", "k.safetensors"] and leftovers(tmp_path) == []
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("k.safetensors", "k.pub")]
    assert modes == [0o600, 0o644]
    read = radiotag.load_key(str(tmp_path / "k.safetensors"))
    assert read.fingerprint == key.fingerprint and read.path == key.path == tmp_path / "k.safetensors"
    assert read.class_names == key.class_names == list(NAMES)
    assert torch.equal(read.carriers, key.carriers) and torch.equal(read.patterns, key.patterns)
    assert f"fingerprint: sha256:{key.fingerprint}\n" in (tmp_path / "k.pub").read_text()
    good("keygen", "-o", tmp_path / "c.safetensors", "--classes", 3)
    lines = [(tmp_path / f"{name}.pub").read_text().splitlines() for name in "kc"]
    differ = {a.split(":")[0] for a, b in zip(*lines, strict=True) if a != b}
    assert differ == {"fingerprint", "commitment", "class names"}


def test_a_key_in_memory_is_written_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    key = radiotag.keygen(classes=np.int64(2))
    assert (key.path, key.class_names, len(key.carriers)) == (None, None, 2)
    assert key.fingerprint != radiotag.keygen(classes=2).fingerprint
    assert tree(tmp_path) == {}
    assert radiotag.keygen(classes=np.array(["b", "a"])).class_names == ["b", "a"]


def test_a_key_on_a_network_of_one_s_own(world, leaning):
    module, path, options = leaning
    key = radiotag.keygen(network=path, classes=3)
    assert key.network().spec.mean == options.mean
    assert torch.equal(key.network().module.fc.weight, module.fc.weight)
    assert (radiotag.mark(world.images[:2], key, options=QUICK).psnr >= 34).all()


@pytest.mark.parametrize("there", ["k.safetensors", "k.pub"])
def test_a_key_replaces_nothing_unless_forced(tmp_path, there):
    (tmp_path / there).write_text("mine")
    with pytest.raises(RadiotagError, match=f"{there} exists"):
        radiotag.keygen(tmp_path / "k.safetensors", classes=1)
    assert (tmp_path / there).read_text() == "mine" and len(tree(tmp_path)) == 1
    radiotag.keygen(tmp_path / "k.safetensors", classes=1, force=True)
    assert len(radiotag.load_key(tmp_path / "k.safetensors").carriers) == 1
    assert stat.S_IMODE((tmp_path / "k.safetensors").stat().st_mode) == 0o600


def test_a_key_that_appears_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    def slowly(network):
        (tmp_path / "k.safetensors").write_text("another's")
        return marking_weights(network)

    monkeypatch.setattr(api, "marking_weights", slowly)
    with pytest.raises(RadiotagError, match=r"cannot create .*k.safetensors"):
        radiotag.keygen(tmp_path / "k.safetensors", classes=1)
    assert (tmp_path / "k.safetensors").read_text() == "another's" and len(tree(tmp_path)) == 1


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (0, "at least one class"),
        ([], "at least one class"),
        ("cat", "a list of names, not 'cat'"),  # would be three classes: c, a and t
        (range(3), "a list of names"),
        (["cat", ""], "a list of names"),
        (["cat", "dog", "cat"], "two classes are called 'cat'"),  # which would share a carrier
    ],
)
def test_classes_that_make_no_key(tmp_path, classes, said):
    with pytest.raises(RadiotagError, match=said):
        radiotag.keygen(tmp_path / "k.safetensors", classes=classes)
    assert tree(tmp_path) == {}


def test_files_that_are_no_keys(tmp_path):
    (tmp_path / "k").write_text("no key")
    for path, said in ((tmp_path / "none", "no key at"), (tmp_path / "k", "not a radiotag key")):
        with pytest.raises(RadiotagError, match=said):
            radiotag.load_key(path)
    for path in (tmp_path, tmp_path / "k.pub", tmp_path / "none" / "k.safetensors"):
        with pytest.raises(RadiotagError):
            radiotag.keygen(path, classes=1)
    with pytest.raises(RadiotagError, match="'none'"):
        radiotag.keygen(network="none", classes=1)


# ---------------------------------------------------------------- mark: images in memory


def measured_psnr(before, after):
    """Of (N, H, W, 3) images, one by one, from the definition."""
    error = np.mean((before.astype(float) - after.astype(float)) ** 2, axis=(1, 2, 3))
    return 10 * np.log10(255**2 / error)


def forms(images):
    """The same images as a researcher may hold them: with how to bring a result back to an array (N, H, W, 3)."""
    first = images.transpose(0, 3, 1, 2)
    frozen = images.copy()
    frozen.setflags(write=False)
    return {
        "array": (images, lambda x: x),
        "channels first": (first.copy(), lambda x: x.transpose(0, 2, 3, 1)),
        "a view": (np.moveaxis(first.copy(), 1, 3), lambda x: x),
        "mirrored": (images[:, :, ::-1].copy()[:, :, ::-1], lambda x: x),
        "read-only": (frozen, lambda x: x),
        "tensor": (torch.from_numpy(images.copy()), lambda x: x.numpy()),
        "tensor, channels first": (torch.from_numpy(first.copy()), lambda x: x.permute(0, 2, 3, 1).numpy()),
        "tensor, channels first in form alone": (torch.from_numpy(images.copy()).permute(0, 3, 1, 2),
                                                 lambda x: x.permute(0, 2, 3, 1).numpy()),
        "list": (list(images), lambda x: x),
    }  # fmt: skip


@pytest.fixture(scope="module")
def marked(world):
    """Eight of the twelve images marked."""
    return radiotag.mark(world.images, world.key, labels=world.names, options=replace(QUICK, fraction=0.7))


def test_marks_are_within_their_limits_and_nothing_else_changes(world, marked):
    before, after = world.images, marked.images
    assert after.dtype == np.uint8 and after.shape == before.shape
    assert marked.chosen.dtype == bool and marked.chosen.sum() == 9  # three of the four of each class
    assert (after[~marked.chosen] == before[~marked.chosen]).all()
    psnr = measured_psnr(before[marked.chosen], after[marked.chosen])
    assert psnr.min() >= 34 and psnr.max() < 40
    assert marked.psnr[marked.chosen] == pytest.approx(psnr, abs=1e-9)
    assert np.isnan(marked.psnr[~marked.chosen]).all()
    assert np.abs(after.astype(int) - before).max() == 10


@pytest.mark.parametrize("form", list(forms(np.zeros((1, 1, 1, 3), np.uint8))))
def test_images_come_back_as_they_were_given(world, marked, form):
    source, back = forms(world.images)[form]
    result = radiotag.mark(source, world.path, labels=world.names, options=replace(QUICK, fraction=0.7)).images
    assert type(result) is (torch.Tensor if form.startswith("tensor") else np.ndarray)
    assert tuple(result.shape) == np.shape(source)
    assert (back(result) == marked.images).all()
    for original in (world.images, back(source)):  # untouched
        assert (np.asarray(original) == pictures(12, seed=3)[0]).all()


def test_images_get_the_very_marks_that_their_files_get(world, tmp_path):
    """The key chooses by path: which images, which of them carry the pattern, and the crops."""
    images, labels = pictures(24, seed=5)
    names = [NAMES[label] for label in labels]
    folder, out = write_pngs(tmp_path / "images", images, names), tmp_path / "out"
    good("mark", folder, "--key", world.path, "-o", out, "--steps", 2, "--fraction", 0.75, "--seed", 7)
    options = replace(QUICK, fraction=0.75, seed=7)
    result = radiotag.mark(images, world.key, labels=names, options=options)
    _, rows = read_manifest(tmp_path / "out.manifest.jsonl")
    paths = [f"{name}/{i:07d}.png" for i, name in enumerate(names)]
    assert len({patterned(world.key, path) for path in paths}) == 2  # some have it, and some have not
    for i, path in enumerate(paths):
        assert (pixels(out / path) == result.images[i]).all(), path
        assert rows[path]["status"] == ("marked" if result.chosen[i] else "copied")
        if result.chosen[i]:
            assert rows[path]["psnr"] == round(result.psnr[i], 3)


def test_the_options_are_those_of_the_command(world):
    images = world.images[:6]

    def changed(**more):
        options = MarkOptions(**({"steps": 2} | more))
        result = radiotag.mark(images, world.key, labels=world.names[:6], options=options)
        return result.images.astype(int) - images

    usual = changed()
    assert (changed() == usual).all()
    assert (changed(batch_size=1) == usual).all()
    assert (changed(batch_size=4) == usual).all()
    for more in ({"seed": 1}, {"steps": 3}, {"epsilon": 4}, {"min_psnr": 38}):
        assert (changed(**more) != usual).any(), more
    assert np.abs(changed(epsilon=4)).max() == 4
    faint = changed(min_psnr=38)
    assert measured_psnr(images, images + faint).min() >= 38
    assert not changed(fraction=0).any()
    assert [changed(fraction=f).any(axis=(1, 2, 3)).sum() for f in (0.1, 0.5, 1)] == [3, 3, 6]


def test_large_images_are_marked_few_at_a_time(world, monkeypatch):
    """As the command does: sixty-four photographs together would fill the memory, and be slower."""
    monkeypatch.setattr(api, "PIXELS_TOGETHER", 3 * 32 * 32)
    told = []

    def progress(summary):
        told.append((summary.done, summary.images))

    radiotag.mark(world.images[:8], world.key, labels=world.names[:8], options=QUICK, progress=progress)
    assert told == [(3, 8), (6, 8), (8, 8)]


def test_labels_may_be_names_or_numbers_of_any_kind(world):
    numbers = [NAMES.index(name) for name in world.names[:6]]

    def marks(labels):
        return radiotag.mark(world.images[:6], world.key, labels=labels, options=QUICK).images

    expected = marks(world.names[:6])
    kinds = (np.array(world.names[:6]), tuple(world.names[:6]), numbers, np.array(numbers, np.uint8),
             torch.tensor(numbers), list(torch.tensor(numbers)))  # fmt: skip
    for labels in kinds:
        assert (marks(labels) == expected).all(), labels
    assert (marks([2, 1, 0, 2, 1, 0]) != expected).any()


def test_numbers_are_the_carriers_of_a_key_without_names(world):
    """Of absent classes, too: 2 would be the second carrier if the classes were counted as a folder's are."""
    few = world.images[:2]
    numbered = radiotag.keygen(classes=4)
    named = replace(numbered, metadata={**numbered.metadata, "class_names": ["0", "1", "2", "3"]})
    result, expected = (radiotag.mark(few, key, labels=labels, options=QUICK).images
                        for key, labels in ((numbered, [0, 2]), (named, ["0", "2"])))  # fmt: skip
    assert (result == expected).all()
    sorted_names = radiotag.mark(few, numbered, labels=["0", "2"], options=QUICK).images  # as a folder's
    assert (sorted_names[0] == result[0]).all() and (sorted_names[1] != result[1]).any()


def test_images_without_labels_are_one_class(world, tmp_path):
    key = radiotag.keygen(tmp_path / "one.safetensors", classes=1)
    result = radiotag.mark(world.images[:4], key, options=QUICK)
    flat = write_pngs(tmp_path / "flat", world.images[:4], ["."] * 4)
    good("mark", flat, "--key", key.path, "-o", tmp_path / "out", "--steps", 2)
    for i in range(4):
        assert (pixels(tmp_path / "out" / f"{i:07d}.png") == result.images[i]).all()


def bad_images():
    images = np.zeros((4, 32, 32, 3), np.uint8)
    return [
        (images.astype(np.float32), "not float32"),
        (images.astype(np.int64), "not int64"),
        (torch.zeros(4, 3, 32, 32), "not float32"),
        (images[..., 0], r"not uint8 \(4, 32, 32\)"),
        (images[..., :1], r"not uint8 \(4, 32, 32, 1\)"),
        (images[0], r"not uint8 \(32, 32, 3\)"),
        (np.zeros((4, 32, 32, 4), np.uint8), r"not uint8 \(4, 32, 32, 4\)"),
        (images[:0], "no images"),
        (torch.zeros(0, 3, 32, 32, dtype=torch.uint8), "no images"),
        (images[:, :0], "no images"),
        ([], r"not float64 \(0,\)"),
        ([images[0], images[0, :20]], "the images are no array"),
        (["a.png"], "not <U5"),
        (None, "not object"),
    ]


@pytest.mark.parametrize(("images", "said"), bad_images())
def test_images_of_another_kind_are_refused_clearly(world, images, said):
    with pytest.raises(RadiotagError, match=said) as error:
        radiotag.mark(images, world.key, labels=[0] * 4, options=QUICK)
    assert error.value.hint
    if images is not None:  # then synthetic images are asked with
        with pytest.raises(RadiotagError, match=said):
            radiotag.verify(world.clean, world.key, images, labels=[0] * 4, options=HELD)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, 1], "4 images and 2 labels"),
        ([], "4 images and 0 labels"),
        ("aaaa", "4 images and 4 labels"),
        ([0, 1, 2, 3], "from 0 to 3, the key has 3 classes"),
        ([-1, 0, 1, 2], "from -1 to 2"),
        (["ant", "bee", "cat", "dog"], "does not know the class 'dog'"),
        ([0, "bee", 1, 2], "class names, or whole numbers"),
        ([0.5, 1, 1, 2], "class names, or whole numbers"),  # 0.5 is no class, and not class 0
        (np.eye(4), "class names, or whole numbers"),
        (torch.tensor(2), "class names, or whole numbers"),
        ([None] * 4, "class names, or whole numbers"),
        (None, "names its classes, and the images have no labels"),
    ],
)
def test_labels_that_do_not_fit_are_refused_clearly(world, labels, said):
    with pytest.raises(RadiotagError, match=said) as error:
        radiotag.mark(world.images[:4], world.key, labels=labels, options=QUICK)
    assert error.value.hint


def test_a_key_of_fewer_classes_is_refused(world):
    with pytest.raises(RadiotagError, match="the key has 2 carriers"):
        radiotag.mark(world.images, radiotag.keygen(classes=2), labels=world.names, options=QUICK)


@pytest.mark.parametrize(
    "more",
    [
        {"fraction": 10}, {"fraction": -0.1}, {"fraction": float("nan")}, {"epsilon": 0.03}, {"min_psnr": 100},
        {"steps": 0}, {"batch_size": 0}, {"seed": -1}, {"format": "jpeg"},
    ],
)  # fmt: skip
def test_options_that_the_command_would_not_take(world, more):
    """Ten for ten per cent would mark everything, and 0.03 of 255 next to nothing."""
    with pytest.raises(RadiotagError, match=next(iter(more))):
        radiotag.mark(world.images, world.key, labels=world.names, options=MarkOptions(**more))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_computed_wherever_it_is_called(world, mode):
    expected = radiotag.mark(world.images[:2], world.key, labels=[0, 1], options=QUICK).images
    asked = world.clean, world.key, world.images
    options = {"labels": world.names, "options": HELD}
    log10_p = radiotag.verify(*asked, **options).log10_p
    with mode():
        made_here = torch.from_numpy(world.images[:2].copy()).clone()
        assert (radiotag.mark(made_here, world.key, labels=[0, 1], options=QUICK).images.numpy() == expected).all()
        assert radiotag.verify(*asked, **options).log10_p == log10_p
        assert torch.is_grad_enabled() is False


# ---------------------------------------------------------------- mark: folders


def test_a_folder_is_marked_as_the_command_marks_it(world, tmp_path):
    good("mark", world.folder, "--key", world.path, "-o", tmp_path / "a" / "out", "--steps", 2, "--fraction", 0.5)
    told = []
    result = radiotag.mark(
        str(world.folder), world.path, tmp_path / "b" / "out", options=replace(QUICK, fraction=0.5),
        progress=lambda summary: told.append(summary.done),
    )  # fmt: skip
    assert (result.output, result.manifest) == (tmp_path / "b" / "out", tmp_path / "b" / "out.manifest.jsonl")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert result.summary.marked == 6 and told[-1] == 12


def test_the_output_lies_beside_the_source_if_it_is_not_named(world, tmp_path):
    source = write_pngs(tmp_path / "mine", world.images[:3], world.names[:3])
    assert radiotag.mark(source, world.key, options=QUICK).output == tmp_path / "mine-marked"
    with pytest.raises(RadiotagError, match="was begun with steps 2"):
        radiotag.mark(source, world.key, options=MarkOptions(steps=3))
    radiotag.mark(source, world.key, options=MarkOptions(steps=3, force=True))


def test_what_fails_in_a_folder_is_an_error(world, tmp_path):
    source = write_pngs(tmp_path / "mine", world.images[:3], world.names[:3])
    (source / "ant" / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(RadiotagError, match=r"1 images failed, first .*broken.png"):
        radiotag.mark(source, world.key, options=QUICK)
    key = radiotag.keygen(source / "k.safetensors", classes=NAMES)
    with pytest.raises(RadiotagError, match="would be copied with it"):
        radiotag.mark(source, key, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_arguments_that_would_be_passed_over_are_refused(world, tmp_path):
    with pytest.raises(RadiotagError, match="labels are for images in memory"):
        radiotag.mark(world.folder, world.key, tmp_path / "out", labels=world.names)
    with pytest.raises(RadiotagError, match="returned, not written"):
        radiotag.mark(world.images, world.key, tmp_path / "out", labels=world.names)
    for data in (None, world.folder):
        with pytest.raises(RadiotagError, match="labels are for images in memory"):
            radiotag.verify(world.clean, world.key, data, labels=world.names, options=HELD)
    assert tree(tmp_path) == {}


# ---------------------------------------------------------------- verify: modules


class Viewing(nn.Module):
    """As many published networks are written: `.view` takes no other memory layout than PyTorch's own."""

    def __init__(self, module):
        super().__init__()
        self.layer, self.dropout = module[1], nn.Dropout(0.5)

    def forward(self, x):
        return self.layer(self.dropout(x).view(len(x), -1))


@pytest.fixture(scope="module")
def by_command(world):
    """What the command says, asking with the folder's images."""
    return command(world, "--data", world.folder)


def plain(finding):
    """A finding as the command's JSON has it."""
    return json.loads(json.dumps(as_json(finding)))


def test_a_module_is_tested_as_its_file_is(world, by_command):
    finding = radiotag.verify(world.marked, world.key, world.folder, options=HELD)
    own = {name: by_command[name] for name in ("path", "architecture", "sha256")}
    assert finding.detected and finding.log10_p < -10
    assert abs(finding.log10_p - by_command["log10_p"]) < 1e-9
    assert plain(finding) | own == by_command
    file = radiotag.verify(str(world.file), world.path, world.folder, options=replace(HELD, architecture=world.builder))
    assert plain(file) == by_command


def test_images_in_memory_are_asked_as_their_files_are(world, by_command):
    files = sorted(world.folder.rglob("*.png"))  # in the folder's order
    images, names = np.stack([pixels(path).astype(np.uint8) for path in files]), [path.parent.name for path in files]
    by_number = [NAMES.index(name) for name in names]
    for data, labels in ((images, names), (torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), by_number)):
        finding = radiotag.verify(world.marked, world.key, data, labels=labels, options=HELD)
        assert abs(finding.log10_p - by_command["log10_p"]) < 1e-9
        assert [each.name for each in finding.classes] == list(NAMES)


def test_a_clean_module_gives_no_evidence(world, few_synthetic):
    for data, labels in ((None, None), (world.images, world.names)):
        found = [
            radiotag.verify(module, world.key, data, labels=labels, options=HELD)
            for module in (world.marked, world.clean)
        ]
        assert [each.detected for each in found] == [True, False]
        assert found[1].log10_p > -3


def state_of(module):
    """All of a module that a test of it might change, values included."""
    modes = [(name, part.training) for name, part in module.named_modules()]
    own = [
        (name, id(value), value.detach().clone(), value.requires_grad, value.dtype, value.stride(), value.device)
        for name, value in (*module.named_parameters(), *module.named_buffers())
    ]
    return modes, own, [len(part._forward_hooks) for part in module.modules()]


def same_state(a, b):
    bits = all(x[:2] == y[:2] and x[3:] == y[3:] and torch.equal(x[2], y[2]) for x, y in zip(a[1], b[1], strict=True))
    return a[0] == b[0] and a[2] == b[2] and bits


@pytest.fixture(scope="module")
def leaning(world):
    """The marking network with a last layer that leans towards the carriers: batch normalisation, and a buffer of no
    dimension; its file; its normalisation."""
    network = world.key.network()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(world.key.carriers.shape, generator=generator) / world.key.carriers.shape[1] ** 0.5
    network.module.fc = nn.Linear(world.key.carriers.shape[1], len(NAMES))
    network.module.fc.weight.data = rows + 10 * world.key.carriers
    spec = replace(network.spec, classes=len(NAMES), class_names=None)
    path = world.root / "leaning.pt"
    save_checkpoint(path, Network(network.module, spec).module, spec)
    return network.module, path, VerifyOptions(image_size=32, mean=spec.mean, std=spec.std)


def test_a_deep_module_is_tested_as_its_file_is_and_not_changed(world, leaning):
    module, path, options = leaning
    asked = ("verify", path, "--key", world.path, "--data", world.folder, "--json")
    expected = good(*asked).json["suspects"][0]["log10_p"]
    module.requires_grad_(True).train()
    module.bn1.eval()  # as one freezes a layer's statistics
    before, drawn = state_of(module), torch.get_rng_state()
    finding = radiotag.verify(module, world.key, world.folder, options=options)
    assert finding.detected and abs(finding.log10_p - expected) < 1e-9
    assert same_state(before, state_of(module)) and torch.equal(drawn, torch.get_rng_state())
    assert len(finding.sha256) == 64 and finding.architecture == "ResNet"
    compiled = radiotag.verify(torch.compile(module, backend="eager"), world.key, world.folder, options=options)
    assert compiled.log10_p == finding.log10_p
    plain_layout = module.to(memory_format=torch.contiguous_format)
    assert abs(radiotag.verify(plain_layout, world.key, world.folder, options=options).log10_p - expected) < 1e-3
    assert plain_layout.conv1.weight.is_contiguous()


def test_the_digest_is_of_names_kinds_and_every_value(world):
    first = reader(world.key.patterns)
    other = reader(world.key.patterns)
    other[1].bias.data[2] += 1e-6
    modules = (first, reader(world.key.patterns).double(), Viewing(first), other, nn.BatchNorm2d(3))
    assert len({suspect_digest(module) for module in modules}) == 5
    assert suspect_digest(first) == suspect_digest(reader(world.key.patterns)) != ""
    assert suspect_digest(logits_of(first)) == ""
    asked = {"labels": world.names, "options": HELD}
    assert radiotag.verify(first, world.key, world.images, **asked).sha256 == suspect_digest(first)


def test_a_module_that_views_its_input_in_training_or_in_half_precision(world):
    asked = {"labels": world.names, "options": HELD}
    expected = radiotag.verify(world.marked, world.key, world.images, **asked).log10_p
    viewing = Viewing(world.marked)
    assert viewing.training  # its dropout would change every answer
    assert radiotag.verify(viewing, world.key, world.images, **asked).log10_p == expected
    assert viewing.training
    assert radiotag.verify(viewing.eval(), world.key, world.images, **asked).log10_p == expected
    double = reader(world.key.patterns).double()
    assert radiotag.verify(double, world.key, world.images, **asked).log10_p == expected
    assert double[1].weight.dtype == torch.float64
    half = radiotag.verify(reader(world.key.patterns).bfloat16(), world.key, world.images, **asked)
    assert half.log10_p == pytest.approx(expected, rel=0.02) and half.log10_p != expected


def test_the_normalisation_counts_and_is_warned_of_where_it_is_assumed(world):
    asked = world.clean, world.key, world.images
    told, other, guessed = (
        radiotag.verify(*asked, labels=world.names, options=options)
        for options in (HELD, replace(HELD, std=[0.1, 0.5, 0.2]), VerifyOptions(image_size=32))
    )
    assert not any("assumed" in warning for warning in told.warnings)
    assert other.mean_cosine != told.mean_cosine
    assert any("assumed" in warning for warning in guessed.warnings)


def test_several_suspects_are_corrected_for_their_number(world, by_command):
    one = radiotag.verify([world.marked], world.key, world.folder, options=HELD)
    assert len(one) == 1 and one[0].log10_p_corrected == one[0].log10_p
    file = replace(HELD, architecture=world.builder)
    found = radiotag.verify((world.marked, world.clean, world.file), world.key, world.folder, options=file)
    assert [each.detected for each in found] == [True, False, True]
    assert [each.path for each in found] == ["Sequential", "Sequential", str(world.file)]
    least = min(found[0].log10_p, found[2].log10_p)
    assert found[0].log10_p_corrected == pytest.approx(least + np.log10(3), abs=1e-6)
    assert found[1].log10_p_corrected == found[1].log10_p  # the last step of Holm's


def test_progress_is_told_of_each_suspect(world, few_synthetic):
    told = []
    radiotag.verify([world.marked, Viewing(world.clean)], world.key, options=HELD, progress=lambda *x: told.append(x))
    assert {name for name, *_ in told} == {"Sequential", "Viewing"}
    assert all(0 <= done <= of for _, _, done, of in told)


def test_numbered_labels_are_the_outputs_of_a_suspect_by_number(world):
    """Their names sort as text, and some are absent: the carriers and the outputs must be 0, 2 and 11 all the same."""
    key = radiotag.keygen(classes=20)
    numbers = [0, 2, 11]
    labels = [numbers[NAMES.index(name)] for name in world.names]
    module = reader(key.patterns[numbers], numbers)
    assert module[1].out_features == 12
    finding = radiotag.verify(module, key, world.images, labels=labels, options=HELD)
    assert finding.detected
    assert [(each.output, each.carrier) for each in finding.classes] == [(0, 0), (11, 11), (2, 2)]
    asked = radiotag.verify(module, key, world.images, labels=labels, options=replace(HELD, black_box=True, decoys=4))
    assert asked.log10_p == pytest.approx(LEAST)


def test_few_images_of_numbered_classes_are_paired_by_number():
    """Of fewer than five images a class the order of the outputs is believed: that is the order of the numbers."""
    key = radiotag.keygen(classes=1000)
    numbers = [str(i) for i in range(12)]
    _, named = api.class_labels(list(range(12)), key, 12)
    spec = replace(key.network().spec, classes=12, class_names=None)
    assert pairing._named_outputs(named, spec, sorted(numbers)) == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    assert pairing._named_outputs(key, spec, sorted(numbers)) == list(range(12))  # a folder's, as loaders sort them
    assert pairing._named_outputs(named, replace(spec, classes=11), sorted(numbers)) is None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"mean": 0.5}, "mean is three numbers"),
        ({"mean": (0.5, 0.5)}, "mean is three numbers"),
        ({"std": (0.2, 0, 0.2)}, "std is three numbers"),
        ({"std": (0.2, float("nan"), 0.2)}, "std is three numbers"),
        ({"alpha": 0}, "alpha"),
        ({"alpha": 5}, "alpha"),
        ({"alpha": 1e-320}, "alpha"),
        ({"image_size": 0}, "image_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"calibrate": -1}, "calibrate"),
        ({"decoys": 4}, "decoys are of the black-box test"),
        ({"calibrate": 9, "black_box": True}, "white-box"),
        ({"black_box": True}, "asks with real images"),
        ({"manifest": "none.jsonl"}, "cannot read none.jsonl"),
    ],
)
def test_options_of_verification_that_mean_nothing(world, few_synthetic, more, said):
    with pytest.raises(RadiotagError, match=said):
        radiotag.verify(world.clean, world.key, options=replace(HELD, **more))


def test_a_module_without_a_linear_last_layer_is_tested_by_its_gradients(world):
    layer = nn.Conv2d(3, 3, 32)
    layer.weight.data, layer.bias.data = world.marked[1].weight.data.view(3, 3, 32, 32), world.marked[1].bias.data
    asked = world.key, world.images
    finding = radiotag.verify(nn.Sequential(layer, nn.Flatten()), *asked, labels=world.names, options=HELD)
    assert finding.detected and finding.paper_log10_p is None and finding.alignment_r2 is None
    assert any("no linear last layer" in warning for warning in finding.warnings)


class Rounded(nn.Module):
    """A first layer without slope."""

    def forward(self, x):
        return x.round(decimals=1)


class Squeezed(nn.Module):
    """A layer that forgets a batch of one."""

    def forward(self, x):
        return x.squeeze()


class Changed(nn.Module):
    """A module with other answers than its own."""

    def __init__(self, module, change):
        super().__init__()
        self.module, self.change = module, change

    def forward(self, x):
        return self.change(self.module(x))

    def get_extra_state(self):
        return {"steps": 7}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize("change", [torch.detach, lambda y: (1000 * y).long(), lambda y: (y == y.max()).float()])
def test_a_module_without_gradients_can_be_tested_by_its_answers_alone(world, change):
    data = (world.images, world.names)
    module = Changed(world.marked, change)
    with pytest.raises(RadiotagError, match="Changed: its answers have no gradient") as error:
        radiotag.verify(module, world.key, data[0], labels=data[1], options=HELD)
    assert "--black-box" in error.value.hint
    if change is torch.detach:
        asked = replace(HELD, black_box=True)
        assert radiotag.verify(module, world.key, data[0], labels=data[1], options=asked).detected


def test_a_module_whose_gradients_are_nowhere_finite_is_refused(world):
    module = Changed(world.marked, lambda y: y + 1 + (0 * y).sqrt())  # the square root of 0 has no slope
    with pytest.raises(RadiotagError, match="or their gradients are not finite") as error:
        radiotag.verify(module, world.key, world.images, labels=world.names, options=HELD)
    assert "--black-box" in error.value.hint


def test_a_module_whose_last_layer_alone_answers_is_warned_of(world):
    """Its images are rounded: no gradient, but the last layer's alignment counts."""
    layer = nn.Linear(48, 3)
    module = nn.Sequential(Rounded(), nn.AvgPool2d(8), nn.Flatten(), layer)
    finding = radiotag.verify(module, world.key, world.images, labels=world.names, options=HELD)
    assert finding.alignment_r2 is not None
    assert any("only the last layer's alignment counts" in warning for warning in finding.warnings)


def test_a_module_that_squeezes_is_asked_with_several_images(world):
    images, labels = pictures(60, seed=9)  # enough to look for another normalisation
    module = nn.Sequential(nn.AvgPool2d(32), Squeezed(), nn.Linear(3, 3))
    radiotag.verify(module, world.key, images, labels=[NAMES[label] for label in labels], options=HELD)


@pytest.mark.parametrize("name", ["Sequential", "it", "images"])
def test_a_module_that_knows_none_of_the_classes(world, name):
    """Its name may be a part of the message, or the name of the folder of images."""
    dull = type(name, (nn.Sequential,), {})(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    nn.init.zeros_(dull[1].weight)
    nn.init.zeros_(dull[1].bias)
    with pytest.raises(RadiotagError, match=f"^{name}: it knows none of the classes in the images given") as error:
        radiotag.verify(dull, world.key, world.images, labels=world.names, options=HELD)
    assert "--mean" in error.value.hint
    with pytest.raises(RadiotagError, match=f"^{name}: it knows none of the classes in {world.folder}"):
        radiotag.verify(dull, world.key, world.folder, options=HELD)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_what_is_no_suspect(world):
    traced = torch.jit.trace(world.clean, torch.zeros(1, 3, 32, 32))
    headless = nn.Conv2d(3, 3, 3)
    for suspect, said in (
        ([], "no suspect"),
        (world.clean.state_dict(), "not OrderedDict"),
        (3, "not int"),
        (traced, "from its file"),
        (headless, "Conv2d gives"),
        (logits_of(world.clean), "classify is a function"),
        (world.root / "none.pt", "none.pt"),
    ):
        with pytest.raises(RadiotagError, match=said) as error:
            radiotag.verify(suspect, world.key, world.images, labels=world.names, options=HELD)
        assert error.value.hint


# ---------------------------------------------------------------- verify: black-box


BLACK_BOX = replace(HELD, black_box=True, decoys=4, alpha=0.05)
LEAST = -3 * np.log10(5) + np.log10(3)  # four decoys, three classes in three nested sets


def ask(world, suspect, options=BLACK_BOX, labels=None):
    names = world.names if labels is None else labels
    return radiotag.verify(suspect, world.key, world.images, labels=names, options=options)


def test_a_function_that_learnt_the_patterns_is_found_with_the_usual_options(world):
    options = VerifyOptions(black_box=True)
    found = ask(world, [logits_of(world.clean), logits_of(world.marked)], options=options)
    assert [(each.method, each.classes_used, each.decoys) for each in found] == [("black-box", 3, 31)] * 2
    assert found[1].log10_p == pytest.approx(-3 * np.log10(32) + np.log10(3)) and found[0].log10_p > -3
    assert not found[1].detected  # of two suspects: 1.8e-4
    assert ask(world, logits_of(world.marked), options=options).detected


def test_a_function_is_tested_as_the_module_and_as_its_file_are(world):
    """The queries' names are random, and nothing else: the statistic is the same in every way, of a clean suspect, too.

    Of that p is no round number, as it is where the true key is the first in every class, or where nothing is found.
    """
    others = (reader(radiotag.keygen(classes=NAMES).patterns) for _ in range(100))
    clean = next(other for other in others if LEAST < ask(world, logits_of(other)).log10_p < -1e-3)
    torch.save(clean.state_dict(), world.root / "clean.pt")
    asked = ("--key", world.path, "--arch", world.builder, *NORMALISED, "--data", world.folder, "--black-box",
             "--decoys", 4, "--alpha", 0.05, "--json")  # fmt: skip
    result = call("verify", world.file, world.root / "clean.pt", *asked)
    expected = [each["log10_p"] for each in result.json["suspects"]]
    assert expected[0] == pytest.approx(LEAST) and LEAST < expected[1] < -1e-3
    for suspects in ([world.marked, clean], [logits_of(world.marked), logits_of(clean)]):
        for options in (BLACK_BOX, replace(BLACK_BOX, batch_size=5)):
            found = ask(world, suspects, options=options)
            assert [each.log10_p for each in found] == pytest.approx(expected, abs=1e-9)
            assert [each.detected for each in found] == [each["detected"] for each in result.json["suspects"]]


def test_answers_of_every_kind_are_read_alike(world):
    logits = logits_of(world.clean)
    expected = ask(world, logits).log10_p
    shares = [
        lambda x: torch.from_numpy(logits(x)).softmax(1).numpy(),
        lambda x: (100 * torch.from_numpy(logits(x)).softmax(1)).tolist(),
        lambda x: torch.from_numpy(logits(x)).requires_grad_() * 1,
    ]
    assert [each.log10_p for each in ask(world, shares)] == pytest.approx([expected] * 3, abs=1e-4)
    assert abs(ask(world, lambda x: torch.from_numpy(logits(x)).bfloat16()).log10_p - expected) < 0.3


def test_labels_alone_tell_by_number_as_by_name(world):
    """Which names they are does not matter: the images tell which is which."""
    logits = logits_of(world.marked)
    ways = [
        lambda x: logits(x).argmax(1),
        lambda x: logits(x).argmax(1).tolist(),
        lambda x: torch.from_numpy(logits(x)).argmax(1),
        lambda x: [NAMES[i] for i in logits(x).argmax(1)],
        lambda x: np.array(["third", "first", "second"])[logits(x).argmax(1)],
        lambda x: logits_of(world.clean)(x).argmax(1),
        lambda x: ["ant"] * len(x),
    ]
    found = [each.log10_p for each in ask(world, ways)]
    assert found[:5] == pytest.approx([LEAST] * 5)
    assert LEAST < found[5] <= 0 and found[6] == 0


def test_a_single_output_is_a_sigmoid_s(world):
    """Whether one class is there, of which alone there are images."""
    logits = logits_of(world.marked)
    ways = [lambda x: logits(x)[:, :1], lambda x: torch.from_numpy(logits(x)[:, :1]).sigmoid().numpy()]
    options = replace(BLACK_BOX, decoys=40)
    found = radiotag.verify(ways, world.key, world.images[::3], labels=["ant"] * 4, options=options)
    assert [each.log10_p for each in found] == pytest.approx([-np.log10(41)] * 2)
    assert [each.detected for each in found] == [True, True]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda x: None, r"array of shape \(\)"),
        (lambda x: {"ant": 1}, r"array of shape \(\)"),
        (lambda x: np.zeros((len(x) - 1, 3)), "array of shape"),
        (lambda x: np.zeros((len(x), 3, 1)), "array of shape"),
        (lambda x: np.zeros((len(x), 0)), "rows of float64, 0 an image"),
        (lambda x: [["ant", "bee"]] * len(x), "rows of <U3, 2 an image"),
        (lambda x: [[1.0]] * (len(x) - 1) + [[1.0, 2.0]], "no array"),
        (lambda x: np.zeros((len(x), 2 + len(x) // 64)), r"differ in shape: \(3,\) and then \(2,\)"),
        (lambda x: np.zeros((len(x), 3) if len(x) == 64 else len(x), int), r"differ in shape: \(3,\) and then \(\)"),
        (lambda x: x.mean((1, 2, 3)) / 255, "one number an image, of float64"),  # which are no labels
        (lambda x: np.full((len(x), 3), np.nan), "<lambda>: its outputs are not finite"),
        (lambda x: np.where(x.mean((1, 2, 3)) > 0, np.inf, 0.0)[:, None].repeat(3, 1), "not finite"),
        (lambda x: np.zeros((len(x), 3)), "<lambda> knows none of the classes"),
    ],
)
def test_answers_that_are_none_are_refused_clearly(world, answer, said):
    with pytest.raises(RadiotagError, match=said) as error:
        ask(world, answer)
    assert error.value.hint


def test_answers_that_are_not_finite_are_left_out_and_counted(world):
    logits, seen = logits_of(world.marked), []

    def sometimes(images):
        answers = np.array(logits(images))
        answers[len(seen) :: 9] = np.inf
        seen.append(1)
        return answers

    found = ask(world, sometimes)
    assert any("answers are not finite: they were left out" in warning for warning in found.warnings)
    assert found.log10_p == pytest.approx(ask(world, logits).log10_p, abs=1.5)


def test_what_a_function_raises_itself_is_not_hidden(world):
    def classify(images):
        raise ConnectionError("the interface is down")

    with pytest.raises(ConnectionError, match="is down"):
        ask(world, classify)


def test_questions_are_drawn_as_they_are_asked(world, monkeypatch):
    """All of those about photographs together, of one class under thousands of decoys, would take 35 GB."""
    drawn, sizes, told = [], [], []
    shown = answers.shown

    def counted(queries, key, number):
        drawn.append(number)
        return shown(queries, key, number)

    def classify(images):
        sizes.append((len(images), len(drawn)))
        return logits_of(world.clean)(images)

    monkeypatch.setattr(answers, "shown", counted)
    options = replace(BLACK_BOX, batch_size=16, decoys=3)  # 8 × 12 questions
    radiotag.verify(
        classify, world.key, world.images, labels=world.names, options=options,
        progress=lambda name, what, done, of: told.append((name, done, of)),
    )  # fmt: skip
    assert [size for size, _ in sizes] == [16] * 6 and sizes[0][1] == 2  # 2 × 12 images for the first 16
    asked = [(done, of) for name, done, of in told if name == "classify"]
    assert asked == [(16 * i, 96) for i in range(1, 7)]


def test_images_of_several_sizes_are_asked_in_batches_of_one(world):
    images = tuple(torch.full((3, *size), 99, dtype=torch.uint8) for size in ((8, 9), (8, 9), (7, 9), (8, 9)))
    names = tuple(tuple(f"{k}/{i}" for i in range(4)) for k in range(4))
    queries = Queries(images=images, rows=(0,) * 4, labels=("ant",) * 4, names=names)
    shapes = []

    def classify(batch):
        shapes.append(batch.shape)
        return batch.astype(int).sum((1, 2, 3))[:, None] % 7 + np.arange(2)

    given = answers.ask_function(classify, queries, world.key, Batching())
    assert given.shape == (4, 4, 2) and set(shapes) == {(n, 8, 9, 3) for n in (1, 2, 3)} | {(1, 7, 9, 3)}
    assert sum(shape[0] for shape in shapes) == 16


def test_images_without_a_known_class_cannot_be_asked_with(world):
    for labels in (["emu"] * 12, [""] * 12):
        with pytest.raises(RadiotagError, match="holds no class that the key knows"):
            ask(world, world.marked, labels=labels)


# ---------------------------------------------------------------- arrays and labels, of any kind


small = st.integers(1, 5)


@st.composite
def arrays(draw):
    """uint8 images of either layout, arrays or tensors."""
    count, height, width = draw(small), draw(small), draw(small)
    shape = draw(st.sampled_from([(count, height, width, 3), (count, 3, height, width)]))
    made = draw(hnp.arrays(np.uint8, shape))
    return torch.from_numpy(made) if draw(st.booleans()) else made


@settings(max_examples=100, deadline=None)
@given(arrays())
def test_the_layout_goes_round(images):
    inside = api.as_images(images)
    assert inside.dtype == torch.uint8 and inside.dim() == 4 and inside.shape[1] == 3
    back = api.like(images, inside)
    assert type(back) is type(images) and back.shape == images.shape and bool((back == images).all())
    if images.shape[1] != 3:  # else either way of reading it might be meant: channels first is assumed
        assert np.array_equal(inside[0, :, 0, 0], np.asarray(images)[0, 0, 0])


@settings(max_examples=100, deadline=None)
@given(numbers=st.lists(st.integers(-2, 7), min_size=1, max_size=8), named=st.booleans())
def test_numbers_are_rows_of_the_key(world, numbers, named):
    key = world.key if named else replace(world.key, metadata={**world.key.metadata, "class_names": None})
    if not all(0 <= number < 3 for number in numbers):
        with pytest.raises(RadiotagError, match="the key has 3 classes"):
            api.class_labels(numbers, key, len(numbers))
        return
    found = [api.class_labels(kind(numbers), key, len(numbers)) for kind in (list, np.array, torch.tensor)]
    for names, meant in found:
        assert [meant.class_names.index(name) for name in names] == numbers
        assert names == [NAMES[i] if named else str(i) for i in numbers]
        assert meant.fingerprint == key.fingerprint and torch.equal(meant.carriers, key.carriers)
    assert key.class_names == (list(NAMES) if named else None)  # the caller's stays as it was


@settings(max_examples=50, deadline=None)
@given(names=st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=5), count=st.integers(0, 6))
def test_names_are_taken_as_they_are(world, names, count):
    if count != len(names):
        with pytest.raises(RadiotagError, match=f"{count} images and {len(names)} labels"):
            api.class_labels(names, world.key, count)
        return
    assert api.class_labels(names, world.key, count) == (names, world.key)
