"""Large photographs: what their reduced copies leave is what marking them whole leaves, in bounded memory."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from radiotag import bands as rows
from radiotag import batches, images, reduction
from radiotag.keys import new_key
from radiotag.networks import marking_weights
from radiotag.radioactive import Marking, texture_mask, visibility_mask

sizes = st.integers(1, 9000)


def photograph(height, width, seed=0):
    """(H, W, 3) uint8: smooth areas, edges and fine texture in places."""
    draw = np.random.default_rng(seed)
    coarse = ndimage.zoom(draw.uniform(0, 255, (height // 50 + 2, width // 50 + 2, 3)), (50, 50, 1), order=1)
    coarse = coarse[:height, :width]
    fine = ndimage.gaussian_filter(draw.normal(0, 60, (height, width, 1)), (1, 1, 0))  # grey: JPEG keeps it
    textured = ndimage.gaussian_filter(draw.normal(0, 1, (height, width, 1)), (40, 40, 0)) > 0
    return np.clip(coarse + fine * textured, 0, 255).astype(np.uint8)


@pytest.fixture
def large(monkeypatch):
    """Images of a few hundred pixels a side are large."""
    monkeypatch.setattr(rows, "LARGE", 2**18)
    monkeypatch.setattr(rows, "SAMPLE", 2**16)
    monkeypatch.setattr(reduction, "LARGE", 2**18)
    monkeypatch.setattr(reduction, "COPY", 2**16)


@pytest.fixture(scope="module")
def key():
    return new_key(*marking_weights("builtin"), 1)


def encoded(pixels, format, **options):
    file = BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def marked(key, data, *, patterned=True, format="keep"):
    picture = batches.with_room(images.decode(data, "photograph"), format, Marking())
    request = batches.request_for(key, picture, "a", 0, seed=0, patterned=patterned)
    with ThreadPoolExecutor(2) as pool:
        marker = batches.Marker(network=key.network(), marking=Marking(), pool=pool, format=format)
        (result,) = (result for part in batches.mark_requests(marker, [request]) for result in part)
    return picture.rgb.astype(np.float64), result


@given(sizes, sizes, st.integers(1, 40))
def test_bands_hold_each_row_once(height, width, multiple):
    parts = list(rows.bands(height, width, multiple))
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])] and parts[-1].stop == height
    assert all((part.stop - part.start) % multiple == 0 for part in parts[:-1])
    assert all((part.stop - part.start) * width <= rows.BAND or part.stop - part.start <= multiple for part in parts)


@given(sizes, sizes, st.sampled_from([rows.FEW, rows.EACH]))
def test_a_sample_is_the_whole_of_a_small_image_and_part_of_a_large_one(height, width, each):
    parts = rows.sampled(height, width, each)
    taken = sum(part.stop - part.start for part in parts)
    if height * width <= rows.LARGE:
        assert parts == [slice(0, height)]
    elif len(parts) > 1:
        assert taken * width <= rows.SAMPLE and all(part.stop - part.start == each for part in parts)
        assert all(part.start % each == 0 for part in parts)  # as encoders divide the whole
        assert all(a.stop <= b.start for a, b in pairwise(parts)) and parts[-1].stop <= height


@given(st.integers(1, 40_000), st.integers(1, 40_000))
def test_a_copy_is_reduced_by_whole_pixels_and_stays_a_photograph(height, width):
    k = reduction.reduction(height, width)
    if height * width <= reduction.LARGE:
        assert k == 1
    elif k > 1:
        assert height * width / k**2 >= reduction.COPY and min(height, width) / k >= reduction.SHORTEST


@pytest.mark.parametrize("size", [(601, 799), (800, 640)])
def test_a_copy_holds_the_means_of_blocks_and_of_the_whole_mask(large, size):
    pixels = photograph(*size)
    copy, k = reduction.reduced(pixels), reduction.reduction(*size)
    whole = torch.from_numpy(pixels).permute(2, 0, 1).float()
    assert k == 2 and copy.image.shape == (3, -(-size[0] // 2), -(-size[1] // 2))
    assert copy.image[:, 7, 9].numpy() == pytest.approx(whole[:, 14:16, 18:20].mean((1, 2)).numpy(), abs=1e-3)
    assert copy.image[:, -1, 3].numpy() == pytest.approx(whole[:, 2 * ((size[0] - 1) // 2) :, 6:8].mean((1, 2)).numpy())
    mask = texture_mask(whole)
    assert torch.equal(mask, visibility_mask(whole))
    assert copy.full_mask == pytest.approx(255 * mask[0].numpy(), abs=0.51)  # across the borders of bands, too
    assert float(copy.mask[0, 7, 9]) == pytest.approx(float(mask[0, 14:16, 18:20].square().mean().sqrt()), rel=1e-5)
    assert torch.equal(reduction.shrunk(pixels), copy.image)


def test_an_enlarged_change_is_the_same_in_any_bands(large):
    copy = reduction.reduced(photograph(601, 799))
    change = reduction.enlarged(copy, copy.image + torch.randn(copy.image.shape, generator=torch.Generator()))
    whole = change(slice(0, 601))
    assert whole.shape == (601, 799, 3) and np.isfinite(whole).all()
    for part in (slice(0, 1), slice(3, 200), slice(200, 601), slice(600, 601)):
        assert np.array_equal(change(part), whole[part])


def test_nothing_is_added_where_a_copy_did_not_change(large):
    copy = reduction.reduced(photograph(601, 799))
    assert not reduction.enlarged(copy, copy.image.clone())(slice(0, 601)).any()


@pytest.mark.parametrize("patterned", [True, False])
def test_a_mark_by_a_reduced_copy_is_that_of_the_whole(large, key, monkeypatch, patterned):
    data = encoded(photograph(600, 800), "PNG")
    before, by_copy = marked(key, data, patterned=patterned)
    monkeypatch.setattr(reduction, "LARGE", 2**30)
    monkeypatch.setattr(rows, "LARGE", 2**30)
    _, whole = marked(key, data, patterned=patterned)
    ours, theirs = by_copy.pixels - before, whole.pixels - before
    assert images.psnr(before, by_copy.pixels) == pytest.approx(images.psnr(before, whole.pixels), abs=0.5)
    assert float((ours * theirs).sum()) > 0.98 * np.linalg.norm(ours) * np.linalg.norm(theirs)
    assert by_copy.gain == pytest.approx(whole.gain, rel=0.1) and whole.gain > 0.01
    assert np.abs(ours).max() <= 10


@pytest.mark.parametrize(("format", "options"), [("JPEG", {"quality": 90}), ("JPEG", {"quality": 40}), ("WEBP", {})])
def test_large_lossy_photographs_keep_the_least_psnr(large, key, format, options):
    before, result = marked(key, encoded(photograph(600, 800), format, **options))
    assert np.array_equal(images.decode(result.file, "x").rgb, result.pixels)
    assert 40 <= images.psnr(before, result.pixels) < 46


def test_a_large_grey_photograph_stays_grey(large, key):
    grey = photograph(600, 800)[..., 0]
    _, result = marked(key, encoded(grey, "PNG"))
    assert Image.open(BytesIO(result.file)).mode == "L"
    before, result = marked(key, encoded(np.repeat(grey[..., None], 3, 2), "PNG"))
    assert (result.pixels == result.pixels[..., :1]).all() and (result.pixels != before).any()


def test_memory_for_a_large_photograph_is_bounded(tmp_path):
    """24 megapixels took 3.6 GB: no more than a few copies of a byte a sample may be held."""
    Image.fromarray(np.tile(photograph(1000, 1000), (4, 6, 1))).save(tmp_path / "a.jpg", quality=90)
    code = f"""
import resource, sys
import torch, torchvision
from concurrent.futures import ThreadPoolExecutor
from radiotag import batches, images
from radiotag.keys import new_key
from radiotag.networks import marking_weights
from radiotag.radioactive import Marking
torch.set_num_threads(1)
key = new_key(*marking_weights("builtin"), 1)
data = open({str(tmp_path / "a.jpg")!r}, "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with ThreadPoolExecutor(1) as pool:
    marker = batches.Marker(network=key.network(), marking=Marking(steps=2), pool=pool)
    request = batches.request_for(key, images.decode(data, "a"), "a", 0, seed=0, patterned=True)
    [result] = next(batches.mark_requests(marker, [request]))
assert len(result.file) > 10**6, result
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 24 * 30  # MiB: 30 bytes a pixel
