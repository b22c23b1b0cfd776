"""What may be expected of a plan: only what was measured, and never more."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import good
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from radiotag import expectation, synthetic
from radiotag.expectation import Look, Measured, expected, looks, measured

ROWS = [
    Measured(data="A", size=32, classes=10, images=10_000, marked=1000, share=0.1, suspect="net", keys=3, log10_p=-9.0),
    Measured(data="A", size=32, classes=10, images=10_000, marked=200, share=0.1, suspect="net", keys=3, log10_p=-2.0),
    Measured(data="B", size=160, classes=10, images=9_000, marked=900, share=0.1, suspect="deep", keys=3, log10_p=-5.0),
]
SMALL = Look(32, False)


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    monkeypatch.setattr(expectation, "measured", lambda: ROWS)


def plan(images, fraction, classes=10):
    """Class → images, and class → marked, alike in all classes."""
    sizes = dict.fromkeys(map(str, range(classes)), images // classes)
    return sizes, {name: round(fraction * size) for name, size in sizes.items()}


@pytest.mark.parametrize(("images", "fraction", "size", "found"), [
    (10_000, 0.1, 32, -9.0), (10_000, 0.5, 32, -9.0), (50_000, 0.1, 32, -9.0), (5_000, 0.1, 40, -9.0),
    (9_000, 0.1, 160, -5.0), (9_000, 0.1, 224, -5.0),
    (4_000, 0.1, 32, None), (10_000, 0.1, 64, None), (10_000, 0.1, 500, None), (9_000, 0.05, 160, None),
])  # fmt: skip
def test_a_plan_is_expected_to_give_what_a_like_one_gave(images, fraction, size, found):
    assert expected(*plan(images, fraction), Look(size, False)).log10_p == found


def test_few_marks_count_by_the_share_of_the_classes_that_have_them():
    alone = {str(c): 1000 for c in range(10)}
    dense = expected(alone, {**dict.fromkeys(alone, 0), "0": 100, "1": 100}, SMALL)
    spread = expected(alone, dict.fromkeys(alone, 20), SMALL)
    assert dense.log10_p == -2.0 and "likely nothing" in dense.reason
    assert dense.advice == "mark 800 more: --fraction 0.1"
    assert spread.log10_p is None and "likely nothing" in spread.reason


def test_where_as_many_are_marked_as_suffice_the_advice_is_fewer_classes():
    sizes = dict.fromkeys(map(str, range(10)), 1000)
    found = expected(sizes, {**dict.fromkeys(sizes, 0), "0": 1000}, SMALL)  # as many as the first row, in one class
    assert found.log10_p == -9.0
    everywhere = expected(dict.fromkeys(sizes, 20_000), dict.fromkeys(sizes, 1000), SMALL)
    assert (everywhere.log10_p, everywhere.advice) == (None, "mark 10,000 more: --fraction 0.1")


def test_the_suspect_that_told_least_of_the_same_marks_is_named_too(monkeypatch):
    monkeypatch.setattr(expectation, "measured", lambda: [*ROWS, replace(ROWS[0], suspect="wide", log10_p=-1.5)])
    found = expected(*plan(10_000, 0.1), SMALL)
    assert found.log10_p == -9.0 and found.reason.endswith("a net trained from scratch; about -1.5 in a wide")


def test_marks_in_a_tiny_class_do_not_count_for_those_elsewhere():
    sizes = {**dict.fromkeys("012345678", 5555), "tiny": 5}
    marked = {**dict.fromkeys("012345678", 111), "tiny": 1}  # two in a hundred, and one of five
    assert expected(sizes, marked, SMALL).log10_p is None


@pytest.mark.parametrize("spread", [False, True])
def test_to_leave_out_spread_is_advised_only_who_gave_it(monkeypatch, spread):
    monkeypatch.setattr(expectation, "measured", lambda: ROWS[:1])
    sizes = {**dict.fromkeys("012345678", 500), "large": 15_500}
    marked = {**dict.fromkeys("012345678", 150), "large": 700}  # a tenth of all, a third of them in a sparse class
    found = expected(sizes, marked, SMALL, spread=spread)
    assert found.log10_p is None
    assert found.advice == ("leave out --spread, so that fewer classes are marked" if spread else "")


def test_what_marks_more_than_was_measured_is_not_told_that_nothing_is_likely(monkeypatch):
    monkeypatch.setattr(expectation, "measured", lambda: [replace(ROWS[2], log10_p=-2.0)])
    assert expected(*plan(9000, 0.1), Look(160, False)).reason.startswith("likely nothing")
    more = expected(*plan(9000, 0.5), Look(160, False))
    assert more.log10_p is None and more.reason.startswith("not measured; less, 900 of 9,000 images of B")


@pytest.mark.parametrize(("images", "marked", "look", "said"), [
    ({"": 1000}, {"": 100}, SMALL, "not measured for a single class"),
    ({"a": 10, "b": 10}, {"a": 0, "b": 0}, SMALL, "nothing is marked"),
    ({"a": 10, "b": 10}, {"a": 1, "b": 1}, None, "unknown, as the first image cannot be read"),
    ({"a": 10, "b": 10}, {"a": 1, "b": 1}, SMALL, "not measured for 20 images of 32 pixels in 2 classes"),
    ({"a": 9, "b": 9}, {"a": 1, "b": 1}, Look(28, True), "not measured for 18 grey images of 28 pixels in 2 classes"),
])  # fmt: skip
def test_where_nothing_was_measured_nothing_is_promised(images, marked, look, said):
    found = expected(images, marked, look)
    assert (found.log10_p, found.reason, found.advice) == (None, said, "")


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=30), st.floats(0, 1), st.integers(1, 2000), st.randoms())
def test_more_is_never_expected_than_was_measured_with_no_more_marks(sizes, fraction, size, draw):
    images = {str(i): n for i, n in enumerate(sizes)}
    marked = {name: round(fraction * n) if draw.random() < 0.7 else 0 for name, n in images.items()}
    found = expected(images, marked, Look(size, False))
    total, count = sum(images.values()), sum(marked.values())
    allowed = [
        row.log10_p for row in ROWS if count / total >= 0.94 * row.marked / row.images and total >= row.images / 2
    ]
    assert found.log10_p is None or found.log10_p in allowed
    assert found.log10_p is None or (2 / 3 - 0.01 < size / 32 < 1.51) or (2 / 3 - 0.01 < size / 160 < 1.51)


def test_what_is_no_image_looks_like_nothing():
    file, grey = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, "PNG")
    Image.new("L", (20, 30)).save(grey, "PNG")
    assert (looks(file.getvalue()), looks(grey.getvalue())) == (Look(30, False), Look(20, True))
    assert [looks(data) for data in (b"", b"no image", file.getvalue()[:20])] == [None] * 3


@pytest.mark.parametrize("row", measured(), ids=lambda row: f"{row.data}-{row.marked}-{row.suspect}")
def test_what_ships_was_measured_with_several_keys(row):
    assert row.keys >= 3 and row.log10_p <= 0 < row.marked <= row.images and 0 < row.share <= 1


def test_mark_tells_what_to_expect_before_the_work_and_after(tmp_path):
    pixels, _ = synthetic.demo_images(8, 32, seed=1)
    images = tmp_path / "imgs"
    synthetic.write_folder(images, pixels, torch.arange(8) % 2, ("a", "b"))
    key = tmp_path / "k.safetensors"
    good("keygen", "-o", key, "--classes", 2)
    dry = good("mark", images, "--key", key, "--dry-run")
    assert "expect       not measured for 8 images of 32 pixels in 2 classes" in dry.out
    assert good("mark", images, "--key", key, "--dry-run", "--json").json["expected_log10_p"] is None
    done = good("mark", images, "--key", key, "--steps", 1)
    assert "expect       not measured with --steps 1" in done.out


def test_a_plan_like_a_measured_one_is_told_its_figure(tmp_path, monkeypatch):
    row = {
        "data": "A",
        "size": 32,
        "classes": 2,
        "images": 8,
        "marked": 8,
        "share": 1.0,
        "suspect": "net",
        "keys": 3,
        "log10_p": -7.25,
    }
    (tmp_path / "measured.json").write_text(json.dumps([row]))
    monkeypatch.setattr(expectation, "measured", measured)
    monkeypatch.setattr(expectation.resources, "files", lambda _: Path(tmp_path))
    assert expected({"a": 4, "b": 4}, {"a": 4, "b": 4}, SMALL).log10_p == -7.25
