"""Which images carry marks: the ranking against an oracle, the choice's rules, and runs that repeat it."""

import hashlib
import json
import random
import shutil

import numpy as np
import pytest
import torch
from helpers import call, good, tree
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from radiotag import api, ranking, synthetic
from radiotag.keys import new_key, order, patterned
from radiotag.manifest import read_manifest
from radiotag.networks import marking_weights
from radiotag.plan import MarkOptions
from radiotag.probes import FolderImages, originals
from radiotag.ranking import NOTHING, Choice, allot, by_hardness, choose_hard, features_of, fold, margins

NAMES = ("ant", "bee", "cat")


def secret_order(path):
    return hashlib.sha256(path.encode()).digest()


# ---------------------------------------------------------------- margins


def oracle(features, labels, folds):
    """Ridge regression of class membership, by least squares on stacked equations, fold by fold."""
    x, classes = features.numpy().astype(float), int(labels.max()) + 1
    found = np.zeros(len(x))
    for number in range(ranking.FOLDS):
        rest, mine = folds.numpy() != number, folds.numpy() == number
        mean = x[rest].mean(0)
        centred, targets = x[rest] - mean, np.eye(classes)[labels[rest].numpy()]
        penalty = ranking.PENALTY * (centred**2).sum() / x.shape[1]
        stacked = np.vstack([centred, np.sqrt(penalty) * np.eye(x.shape[1])])
        wanted = np.vstack([targets - targets.mean(0), np.zeros((x.shape[1], classes))])
        scores = (x[mine] - mean) @ np.linalg.lstsq(stacked, wanted)[0] + targets.mean(0)
        for place, row in zip(np.flatnonzero(mine), scores, strict=True):
            own = row[labels[place]]
            row[labels[place]] = -np.inf
            found[place] = own - row.max()
    return found


@pytest.mark.parametrize("together", [7, 4096])
def test_margins_are_those_of_a_ridge_classifier_that_left_the_image_out(monkeypatch, together):
    monkeypatch.setattr(ranking, "TOGETHER", together)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    features = torch.randn(90, 6, generator=generator) + 2 * torch.eye(3, 6)[labels] + 1
    folds = torch.randint(0, ranking.FOLDS, (90,), generator=generator)
    assert margins(features, labels, folds).numpy() == pytest.approx(oracle(features, labels, folds), abs=1e-9)


def test_an_image_does_not_vouch_for_itself():
    """One image with a feature of its own: a classifier that had seen it would know it for sure."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    features = torch.randn(60, 5, generator=generator)
    features[:, 4] = 0
    features[7, 4] = 1000
    found = margins(features, labels, torch.arange(60) % ranking.FOLDS)
    assert abs(float(found[7])) < 3


def test_mislabelled_images_come_first():
    generator = torch.Generator().manual_seed(1)
    truth = torch.arange(300) % 3
    features = torch.randn(300, 8, generator=generator) + 4 * torch.eye(3, 8)[truth]
    labels = {f"{i}.png": NAMES[(int(truth[i]) + (i < 9)) % 3] for i in range(300)}
    ranked = by_hardness(labels, features)
    wrong = {f"{i}.png" for i in range(9)}
    assert wrong == {path for paths in ranked.values() for path in paths[: sum(p in wrong for p in paths)]}


def test_few_images_and_unread_ones_are_ranked_all_the_same():
    assert by_hardness({"a": "x", "b": "y"}, torch.full((2, 4), torch.nan)) == {"x": ["a"], "y": ["b"]}
    features = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    features[1] = torch.nan
    ranked = by_hardness({"a": "x", "b": "x", "c": "x", "d": "y", "e": "y"}, features)
    assert sorted(ranked["x"]) == ["a", "b", "c"] and ranked["x"][-1] == "b" and sorted(ranked["y"]) == ["d", "e"]


def test_folds_follow_from_paths_alone():
    found = [fold(f"cat/{i}.png") for i in range(1000)]
    assert set(found) == set(range(ranking.FOLDS)) and min(map(found.count, set(found))) > 150
    assert fold("cat/\udcff.png") in range(ranking.FOLDS)


# ---------------------------------------------------------------- the choice


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 60), share=st.floats(0, 1), more=st.integers(0, 30), raised=st.integers(0, 30),
       seed=st.integers(0, 99))  # fmt: skip
def test_what_was_chosen_stays_and_the_rest_follows_the_rules(n, share, more, raised, seed):
    ranked, images = [f"{i}.png" for i in range(n)], round(share * n)
    first = choose_hard(ranked, images, NOTHING, secret_order)
    patterns = min(images, max(1, round(0.25 * n)))
    assert (len(first.marked), len(first.patterned)) == (images, patterns)
    assert first.patterned <= first.marked <= set(ranked)
    assert first.patterned <= set(ranked[: ranking.POOL * patterns])
    draw = random.Random(seed)  # a run that was killed wrote a part of its choice down
    part = Choice(*(frozenset(path for path in sorted(paths) if draw.random() < 0.5) for paths in first))
    part = Choice(part.marked, part.patterned & part.marked)
    if part.patterned == first.patterned & part.marked:
        assert choose_hard(ranked, images, part, secret_order) == first
    grown = [*(f"new{i}.png" for i in range(more)), *ranked]
    draw.shuffle(grown)
    wanted = min(len(grown), images + raised)
    later = choose_hard(grown, wanted, first, secret_order)
    assert first.marked <= later.marked and first.patterned <= later.patterned
    assert not (later.patterned - first.patterned) & first.marked  # an image is not marked twice
    assert len(later.marked) == wanted
    assert choose_hard(ranked, images, first, secret_order) == first


def test_few_marks_go_into_the_first_classes():
    sizes = {"c": 500, "a": 1000, "b": 300}
    assert allot(sizes, 0.01, spread=False) == {"c": 18, "a": 0, "b": 0}
    assert allot(sizes, 0.05, spread=False) == {"c": 50, "a": 40, "b": 0}
    assert allot(sizes, 0.1, spread=False) == allot(sizes, 0.1, spread=True) == {"c": 50, "a": 100, "b": 30}
    assert allot(sizes, 0.01, spread=True) == {"c": 5, "a": 10, "b": 3}
    assert allot(sizes, 0, spread=False) == allot(sizes, 0, spread=True) == {"c": 0, "a": 0, "b": 0}
    assert allot({"": 3}, 0.01, spread=False) == {"": 1}


@given(sizes=st.lists(st.integers(1, 400), min_size=1, max_size=30), a=st.floats(0, 1), b=st.floats(0, 1))
def test_a_higher_fraction_takes_nothing_away(sizes, a, b):
    named = {str(i): size for i, size in enumerate(sizes)}
    low, high = (allot(named, share, spread=False) for share in sorted((a, b)))
    assert all(0 <= low[name] <= high[name] + 1 and high[name] <= named[name] for name in named)
    if max(a, b) < ranking.ENOUGH:
        wanted = max(1, round(max(a, b) * sum(sizes))) if max(a, b) > 0 else 0
        assert sum(high.values()) <= wanted


def test_hard_images_are_chosen_as_the_secret_decides():
    key, other = (new_key(*marking_weights("builtin"), NAMES) for _ in range(2))
    ranked = [f"cat/{i}.png" for i in range(1000)]
    mine = choose_hard(ranked, 100, NOTHING, lambda path: order(key, path))
    its = choose_hard(ranked, 100, NOTHING, lambda path: order(other, path))
    assert mine.marked <= set(ranked[:200]) and 20 < len(mine.marked & its.marked) < 80  # half of 200, twice


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of three classes, some of whose images are labelled wrongly, and a key of its classes."""
    root = tmp_path_factory.mktemp("place")
    images, labels = synthetic.demo_images(120, 32, seed=5)
    synthetic.write_folder(root / "imgs", images[labels < 3], labels[labels < 3], NAMES)
    for i, path in enumerate(sorted((root / "imgs" / "ant").iterdir())[:2]):
        path.rename(root / "imgs" / "bee" / f"wrong{i}.png")
    good("keygen", "-o", root / "k.safetensors", "--data", root / "imgs")
    return root


def mark(place, output, *more, source=None):
    return call(
        "mark", source or place / "imgs", "--key", place / "k.safetensors", "-o", output, "--steps", 1, "--json", *more
    )


def marked_paths(output):
    rows = read_manifest(output.with_name(f"{output.name}.manifest.jsonl"))[1].values()
    return {row["path"] for row in rows if row["status"] == "marked"}


def test_a_run_marks_hard_images_and_records_which_carry_the_pattern(place, tmp_path):
    assert mark(place, tmp_path / "out", "--fraction", 0.15).code == 0
    rows = read_manifest(tmp_path / "out.manifest.jsonl")[1].values()
    assert all(row["pattern"] for row in rows if row["status"] == "marked")
    assert not any("pattern" in row for row in rows if row["status"] == "copied")
    assert mark(place, tmp_path / "other", "--fraction", 0.15, "--choose", "random").code == 0
    assert marked_paths(tmp_path / "out") != marked_paths(tmp_path / "other")
    whole = mark(place, tmp_path / "whole").json
    rows = read_manifest(tmp_path / "whole.manifest.jsonl")[1].values()
    assert whole["marked"] == len(rows) and 0 < sum(row["pattern"] for row in rows) < len(rows) / 2


@pytest.mark.parametrize("choose", ["hard", "random"])
def test_raising_the_fraction_marks_more_and_keeps_what_was_marked(place, tmp_path, choose):
    assert mark(place, tmp_path / "out", "--choose", choose, "--fraction", 0.12).code == 0
    before = {path: (tmp_path / "out" / path).read_bytes() for path in marked_paths(tmp_path / "out")}
    assert mark(place, tmp_path / "out", "--choose", choose, "--fraction", 0.4).json["marked"] > 2 * len(before)
    assert {path: (tmp_path / "out" / path).read_bytes() for path in before} == before
    assert before.keys() < marked_paths(tmp_path / "out")
    assert "was begun with fraction 0.4, not 0.12" in mark(place, tmp_path / "out", "--fraction", 0.12).err


@pytest.mark.parametrize("choose", ["hard", "random"])
def test_the_dry_run_counts_what_stays_marked_of_earlier_runs(place, tmp_path, choose):
    source = shutil.copytree(place / "imgs", tmp_path / "imgs")
    given = ("--choose", choose, "--fraction", 0.5)
    had = mark(place, tmp_path / "out", *given, source=source).json["marked"]
    for path in sorted((tmp_path / "imgs" / "cat").iterdir()):
        if path.relative_to(source).as_posix() not in marked_paths(tmp_path / "out"):
            path.unlink()
            (tmp_path / "out" / path.relative_to(source)).unlink()
    told = mark(place, tmp_path / "out", *given, "--dry-run", source=source).json["would_mark"]
    done = mark(place, tmp_path / "out", *given, source=source)
    assert (told, done.code) == (done.json["marked"], 0) and told >= had


def test_originals_of_patterned_images_are_asked_alone_and_other_classes_as_before(place, tmp_path, monkeypatch):
    out, manifest = tmp_path / "out", tmp_path / "out.manifest.jsonl"
    assert mark(place, out, "--fraction", 0.05).code == 0  # of few classes
    patterned_paths = {row["path"] for row in read_manifest(manifest)[1].values() if row.get("pattern")}
    classes = {path.split("/")[0] for path in patterned_paths}
    assert patterned_paths and classes < set(NAMES)
    data = FolderImages(place / "imgs", manifest)
    assert originals(data, manifest) is data  # too few
    monkeypatch.setattr("radiotag.probes.ENOUGH_ORIGINALS", 1)
    found = originals(data, manifest)
    kept = [i for i, path in enumerate(data.paths) if path in patterned_paths or data.labels[i] not in classes]
    assert list(found.paths) == [data.paths[i] for i in kept] and list(found.labels) == [data.labels[i] for i in kept]
    assert found.digests() == [data.digests()[i] for i in kept]
    assert all(torch.equal(found.read(n), data.read(i)) for n, i in enumerate(kept))
    assert originals(data, None) is data
    for path in patterned_paths:  # known by content, not by name: a held-out set may name its images alike
        to = tmp_path / "held" / path
        to.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(Image.open(place / "imgs" / path)) ^ 1).save(to)
    held = FolderImages(tmp_path / "held", manifest)
    assert originals(held, manifest) is held


def as_jpeg(place, target):
    for path in (place / "imgs").rglob("*.png"):
        to = target / path.relative_to(place / "imgs").with_suffix(".jpg")
        to.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).save(to, quality=95)
    return target


@pytest.mark.parametrize("choose", ["hard", "random"])
@pytest.mark.parametrize("force", [False, True])
def test_no_original_stays_beside_its_marked_version_of_another_format(place, tmp_path, choose, force):
    """The one less the other is the mark."""
    source = as_jpeg(place, tmp_path / "imgs")
    given = ("--format", "png", "--choose", choose)
    assert mark(place, tmp_path / "out", *given, "--fraction", 0.2, source=source).code == 0
    more = ["--force"] if force else []
    again = mark(place, tmp_path / "out", *given, "--fraction", 0.6, *more, source=source)
    assert again.code == 0, again.err
    names = [path.relative_to(tmp_path / "out").with_suffix("") for path in (tmp_path / "out").rglob("*.*")]
    assert len(names) == len(set(names)) == len(list(source.rglob("*.jpg")))


def test_a_copy_that_somebody_changed_is_not_removed(place, tmp_path):
    source = as_jpeg(place, tmp_path / "imgs")
    assert mark(place, tmp_path / "out", "--format", "png", "--fraction", 0.2, source=source).code == 0
    for path in (tmp_path / "out").rglob("*.jpg"):
        path.write_bytes(path.read_bytes() + b"mine")
    refused = mark(place, tmp_path / "out", "--format", "png", "--fraction", 0.9, source=source)
    assert refused.code == 1 and "was changed, and its image is now to be marked" in refused.err
    assert all(path.read_bytes().endswith(b"mine") for path in (tmp_path / "out").rglob("*.jpg"))


def test_what_cannot_end_well_is_refused_before_anything_is_ranked(place, tmp_path, monkeypatch):
    monkeypatch.setattr("radiotag.marking_run.features_of", None)
    lost = mark(place, tmp_path / "out", "--held-out", tmp_path / "nowhere")
    assert lost.code == 1 and "nowhere" in lost.err
    source = shutil.copytree(place / "imgs", tmp_path / "imgs")
    twin = next((source / "cat").iterdir())
    Image.open(twin).save(twin.with_suffix(".jpg"))
    for more in (["--dry-run"], []):
        refused = mark(place, tmp_path / "out", "--format", "png", "--fraction", 0.1, *more, source=source)
        assert refused.code == 1 and "two images would both become" in refused.err
    assert not list(tmp_path.glob("out*"))


def test_photographs_are_made_small_one_by_one_before_they_are_ranked(place, tmp_path, monkeypatch):
    """A batch of them at full size would not fit into memory."""
    shapes = []

    def look(network, images, *more):
        images = list(images)
        shapes.extend(image.shape for image in images)
        return features_of(network, images, *more)

    monkeypatch.setattr("radiotag.marking_run.features_of", look)
    source = shutil.copytree(place / "imgs", tmp_path / "imgs")
    for path in source.rglob("*.png"):
        Image.open(path).resize((150, 90)).save(path)
    assert mark(place, tmp_path / "out", "--fraction", 0.1, source=source).code == 0
    assert set(shapes) == {(3, 32, 32)}


def test_adding_images_keeps_what_was_marked(place, tmp_path):
    source = shutil.copytree(place / "imgs", tmp_path / "imgs")
    assert mark(place, tmp_path / "out", "--fraction", 0.2, source=source).code == 0
    before = {path: (tmp_path / "out" / path).read_bytes() for path in marked_paths(tmp_path / "out")}
    images, labels = synthetic.demo_images(60, 32, seed=6)
    synthetic.write_folder(tmp_path / "more", images[labels < 3], labels[labels < 3], NAMES)
    for path in (tmp_path / "more").rglob("*.png"):
        shutil.copyfile(path, source / path.parent.name / f"new{path.name}")
    again = mark(place, tmp_path / "out", "--fraction", 0.2, source=source)
    assert again.code == 0, again.err
    after = marked_paths(tmp_path / "out")
    assert before.keys() < after
    assert {path: (tmp_path / "out" / path).read_bytes() for path in before} == before


def test_a_choice_that_a_killed_run_wrote_down_is_kept_without_ranking_again(place, tmp_path, monkeypatch):
    assert mark(place, tmp_path / "calm", "--fraction", 0.3).code == 0
    assert mark(place, tmp_path / "out", "--fraction", 0.3).code == 0
    path = tmp_path / "out.manifest.jsonl"
    lines = path.read_text().splitlines()
    rows = [json.loads(line) for line in lines[1:]]
    kept = ("path", "class", "row", "pattern")
    chosen = [{name: row[name] for name in kept} | {"status": "chosen"} for row in rows if row["status"] == "marked"]
    path.write_text("\n".join([lines[0], *map(json.dumps, chosen)]) + "\n")
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr("radiotag.marking_run.features_of", None)  # nothing is ranked
    assert mark(place, tmp_path / "out", "--fraction", 0.3).code == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "calm")
    assert path.read_bytes() == (tmp_path / "calm.manifest.jsonl").read_bytes()


def test_of_one_class_any_image_is_marked(place, tmp_path, monkeypatch):
    """Nothing is told from another class; a ranking by name would give the marked images away."""
    monkeypatch.setattr("radiotag.marking_run.features_of", None)  # nothing is ranked
    good("keygen", "-o", tmp_path / "k.safetensors", "--classes", 1)
    source = shutil.copytree(place / "imgs" / "cat", tmp_path / "flat")
    given = ("mark", source, "--key", tmp_path / "k.safetensors", "--steps", 1, "--fraction", 0.5)
    good(*given, "-o", tmp_path / "one")
    good(*given, "-o", tmp_path / "two", "--choose", "random")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    good(*given, "-o", tmp_path / "one")  # goes on


def test_another_way_to_choose_does_not_go_on_with_a_folder(place, tmp_path):
    assert mark(place, tmp_path / "out", "--fraction", 0.2, "--choose", "random").code == 0
    assert "begun with choose random, not hard" in mark(place, tmp_path / "out", "--fraction", 0.2).err
    assert mark(place, tmp_path / "x", "--choose", "odd").code == 2


def test_arrays_are_chosen_as_their_files_are(place, tmp_path):
    from radiotag.images import decode

    paths = sorted((place / "imgs").rglob("*.png"))
    images = np.stack([decode(path.read_bytes(), "x").rgb.astype(np.uint8) for path in paths])
    labels = [path.parent.name for path in paths]
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        (tmp_path / "named" / label).mkdir(parents=True, exist_ok=True)
        synthetic_path = tmp_path / "named" / label / f"{i:07d}.png"
        synthetic_path.write_bytes(api.png(image))
    options = MarkOptions(steps=1, fraction=0.2)
    marked = api.mark(images, place / "k.safetensors", labels=labels, options=options)
    assert mark(place, tmp_path / "out", "--fraction", 0.2, source=tmp_path / "named").code == 0
    chosen = {f"{labels[i]}/{i:07d}.png" for i in np.flatnonzero(marked.chosen)}
    assert chosen == marked_paths(tmp_path / "out")


def test_at_random_the_pattern_follows_from_the_key_alone():
    key = new_key(*marking_weights("builtin"), NAMES)
    paths = [f"cat/{i}.png" for i in range(40)]
    from radiotag.plan import choose_at_random

    choice = choose_at_random(key, {"cat": paths}, {"cat": 40})
    assert choice.marked == set(paths) and choice.patterned == {path for path in paths if patterned(key, path)}
