"""What is refused, and in which words, where it takes a rare file, file system or suspect."""

import errno
import io
import os
import tarfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import encoded, entropy, tree
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from radiotag import api, keys, listing, manifest, shards, verification
from radiotag.answers import read_answers
from radiotag.blackbox import Queries
from radiotag.errors import RadiotagError
from radiotag.images import decode, png
from radiotag.keys import new_key, save_key
from radiotag.pairing import Pairing, Records, pair_unlabelled
from radiotag.probes import synthetic_images
from radiotag.suspect import ClassVectors
from radiotag.synthetic import dead_leaves
from radiotag.verification import VerifyOptions


def small_key(classes):
    return new_key({}, {}, 4, classes, entropy(str(classes)))


# ---------------------------------------------------------------- keys and suspects that do not fit


@pytest.mark.parametrize(
    ("classes", "outputs", "names", "said"),
    [
        (["cat", "dog"], 3, ("emu", "fox", "gnu"), "2 carriers, a suspect of 3 outputs, no class in common"),
        (["cat", "dog"], 3, None, "the key names 2 classes, the suspect has 3 outputs without names"),
        (2, 5, None, "2 carriers, a suspect of 5 outputs, paired in order"),
    ],
)
def test_a_key_that_does_not_fit_a_suspect(classes, outputs, names, said):
    with pytest.raises(RadiotagError, match=said) as error:
        pair_unlabelled(small_key(classes), SimpleNamespace(classes=outputs, class_names=names), Records())
    assert "--data" in error.value.hint


def test_a_key_that_fits_is_paired():
    named = SimpleNamespace(classes=3, class_names=("emu", "dog", "gnu"))
    assert pair_unlabelled(small_key(["cat", "dog"]), named, Records()) == [(1, 1)]
    three = SimpleNamespace(classes=3, class_names=None)
    assert pair_unlabelled(small_key(5), three, Records()) == [(0, 0), (1, 1), (2, 2)]


def warnings_of(left_out=0, **vectors):
    network = SimpleNamespace(assumed=False, taken="", head=vectors.pop("head", "a layer"))
    examined = verification.Examined(
        network, Pairing(outputs=(0, 1), rows=(0, 1)), ClassVectors(features=torch.ones(2, 4), **vectors), left_out
    )
    return verification._warnings(examined, SimpleNamespace(log_p=-99.0), VerifyOptions())


def test_what_weakens_a_test_is_said():
    assert warnings_of(r2=0.1) == []
    assert warnings_of(r2=0.09) == [
        "poor alignment (R² 0.09): a mark may be missed, an accusation is not made likelier"
    ]
    assert warnings_of(left_out=3, r2=0.5) == ["3 answers are not finite: they were left out"]
    assert ["no linear last layer" in warning for warning in warnings_of(head=None)] == [True]


# ---------------------------------------------------------------- keys


def test_a_key_whose_network_is_not_described():
    with pytest.raises(RadiotagError, match="network is not described"):
        small_key(2).network()


@pytest.mark.parametrize("exclusive", [True, False])
def test_a_key_that_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch, exclusive):
    path = tmp_path / "k.safetensors"
    if not exclusive:
        save_key(path, small_key(2))
    before = tree(tmp_path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(keys, "write_atomically", full)
    with pytest.raises(OSError, match="no space"):
        save_key(path, small_key(3), exclusive=exclusive)
    assert tree(tmp_path) == before


# ---------------------------------------------------------------- answers


QUERIES = Queries(images=(), rows=(0,), labels=("ant",), names=(("a",), ("b",)))


def test_predictions_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.csv").write_bytes("file,label\na,é\n".encode("latin-1"))
    for path in (tmp_path, tmp_path / "none.csv", tmp_path / "latin.csv"):
        with pytest.raises(RadiotagError, match=f"cannot read {path}"):
            read_answers(path, QUERIES)


def test_empty_lines_between_predictions_are_passed_over(tmp_path):
    (tmp_path / "p.csv").write_bytes(b"file,label\r\n\r\na.png, 1\r\n\r\nb.png,0\r\n")
    given, told = read_answers(tmp_path / "p.csv", QUERIES)
    assert given.tolist() == [[[0, 1]], [[1, 0]]] and told == []


# ---------------------------------------------------------------- folders and their copies


def folder_of(path, *names):
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(png(np.full((32, 32, 3), 99, np.uint8)))
    return path


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    folder_of(tmp_path / "images", "ant/0.png")
    scandir = os.scandir

    def barred(path):
        if Path(path).name == "ant":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", barred)
    with pytest.raises(RadiotagError, match=r"cannot read .*ant: Permission denied"):
        listing.list_folder(tmp_path / "images")


def test_outputs_and_sources_that_are_none(tmp_path):
    named, flat = small_key(["ant", "bee"]), folder_of(tmp_path / "flat", "0.png")
    with pytest.raises(RadiotagError, match="names its classes, and the folder has none") as error:
        api.mark(flat, named)
    assert "sub-folder" in error.value.hint
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RadiotagError, match="file is a file"):
        api.mark(flat, small_key(1), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(RadiotagError, match="/ has no name"):
        api.marked_name(Path("/"))
    assert api.marked_name(tmp_path / "v1.0").name == "v1.0-marked"


def test_an_image_in_memory_that_cannot_be_marked_is_an_error(monkeypatch):
    monkeypatch.setattr(api, "mark_requests", lambda marker, requests: [[RadiotagError("too flat", "leave it out")]])
    key = api.keygen(classes=1)
    with pytest.raises(RadiotagError, match="too flat"):
        api.mark(np.zeros((1, 32, 32, 3), np.uint8), key)


@pytest.mark.parametrize(("number", "passes"), [(errno.ENOLCK, True), (errno.EACCES, False)])
def test_a_file_system_without_locks_is_worked_on_and_no_other_error_is_hidden(tmp_path, monkeypatch, number, passes):
    def acquire(self, timeout):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(manifest.FileLock, "acquire", acquire)
    done = []

    def work():
        with manifest.locked(tmp_path / "m.jsonl", tmp_path / "out"):
            done.append(True)

    if passes:
        work()
    else:
        with pytest.raises(PermissionError):
            work()
    assert done == [True] * passes


# ---------------------------------------------------------------- shards


def test_a_class_number_beyond_every_key():
    assert len(shards._class_names({"0", "999999"})) == 1_000_000
    with pytest.raises(RadiotagError, match="the class 1000000 is beyond the 1000000 carriers"):
        shards._class_names({"0", "1000000"})


def test_a_member_whose_size_is_not_in_its_header(tmp_path):
    """Such a header cannot be given another size: it would be read as the old one."""
    data = png(np.full((8, 8, 3), 99, np.uint8))
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("0.png")
        info.size, info.pax_headers = len(data), {"size": str(len(data))}
        tar.addfile(info, io.BytesIO(data))
    with pytest.raises(RadiotagError, match="stored sparsely or beyond 8 GiB"):
        shards.list_shards(tmp_path / "s.tar")


@pytest.mark.parametrize(("number", "passes"), [(errno.EXDEV, True), (errno.EROFS, False)])
def test_a_shard_that_cannot_be_moved_to_its_place(tmp_path, monkeypatch, number, passes):
    """On another file system it is written there; whatever else is wrong is told."""
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("empty.txt"))
    target, work, move = tmp_path / "out.tar", tmp_path / "work", Path.replace

    def replace_(self, target):
        if self.name == "shard":
            raise OSError(number, os.strerror(number))
        return move(self, target)

    monkeypatch.setattr(Path, "replace", replace_)
    if passes:
        shards.assemble(tmp_path / "s.tar", [], target, lambda path: None, work)
        assert target.read_bytes() == (tmp_path / "s.tar").read_bytes() and not list(work.iterdir())
    else:
        with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
            shards.assemble(tmp_path / "s.tar", [], target, lambda path: None, work)
        assert not target.exists()


def test_a_shard_that_shrinks_while_it_is_copied():
    new = io.BytesIO()
    shards._copy_until(io.BytesIO(b"abcd"), new, 4)
    assert new.getvalue() == b"abcd"
    with pytest.raises(OSError, match="error"):
        shards._copy_until(io.BytesIO(b"abcd"), io.BytesIO(), 5)


# ---------------------------------------------------------------- images


@pytest.mark.filterwarnings("ignore")
def test_an_image_a_little_beyond_the_largest(monkeypatch):
    """Pillow itself refuses twice as many pixels, and only warns of these."""
    data = png(np.zeros((10, 10, 3), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode(data, "a.png").rgb.shape == (10, 10, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    with pytest.raises(RadiotagError, match=r"a\.png: too many pixels"):
        decode(data, "a.png")


def test_a_text_called_transparency_makes_nothing_transparent():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8))
    text = PngInfo()
    text.add_text("transparency", "none")
    picture = decode(encoded(image, pnginfo=text), "a.png")
    assert picture.mode == "RGB" and picture.plane is None
    assert (picture.rgb == np.asarray(image)).all()


def test_depths_and_layouts_that_cannot_be_kept():
    grey = Image.fromarray(np.arange(12, dtype=np.uint16).reshape(3, 4) * 999)
    assert decode(encoded(grey, "TIFF"), "a.tif").mode == "I;16"
    inverted = encoded(grey, "TIFF", tiffinfo={262: 0})
    with pytest.raises(RadiotagError, match="16-bit TIFF in which 0 is white"):
        decode(inverted, "a.tif")
    plain, text = png(np.zeros((4, 4, 3), np.uint8)), b"tEXta\0b"
    chunk = (3).to_bytes(4) + text + zlib.crc32(text).to_bytes(4)
    assert decode(plain[:33] + chunk + plain[33:], "a.png").mode == "RGB"
    with pytest.raises(RadiotagError, match="a PNG whose header is not where it must be"):
        decode(plain[:8] + chunk + plain[8:], "a.png")


# ---------------------------------------------------------------- synthetic images


def test_large_suspects_are_asked_with_dead_leaves_alone_and_fewer(few_synthetic):
    drawn = synthetic_images(96)
    assert drawn.shape == (10, 3, 96, 96) and 0 <= float(drawn.min()) < float(drawn.max()) <= 1
    assert torch.equal(drawn, dead_leaves(10, 96, seed=20200702).float() / 255)
    assert synthetic_images(32).shape == (20, 3, 32, 32)
    assert len(synthetic_images(896)) == 2  # a quarter of them, rounded: four times the pixels
