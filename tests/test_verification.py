"""Verification: outputs matched with classes, the black-box test and calibration."""

import csv
import itertools
import json
import math
import shutil
import stat
from collections import Counter
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import bad, call, good
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import nn

from radiotag import blackbox, calibration, networks, probes, synthetic, verification
from radiotag.answers import read_answers
from radiotag.blackbox import pattern_effects
from radiotag.calibration import TAIL, calibrate
from radiotag.cosines import pattern_images
from radiotag.errors import RadiotagError, out_of_memory
from radiotag.images import decode, png
from radiotag.keys import AGAINST_ALL, AS_ONE, load_key, new_key, save_key
from radiotag.manifest import marked_hashes, marked_rows, read_manifest
from radiotag.networks import load_network, marking_weights, save_checkpoint
from radiotag.pairing import Records, marked_classes, match_outputs, pair_unlabelled
from radiotag.probes import ArrayImages, FolderImages, References, even_over_classes, real_images, spread_over_classes
from radiotag.radioactive import resampled_log_p
from radiotag.report import histogram
from radiotag.suspect import Batching, ClassVectors, class_vectors
from radiotag.suspect import features as feature_vectors
from radiotag.verification import VerifyOptions

NAMES = ("ant", "bee", "cat")


def quiet(*_):
    """A progress callback that does nothing."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A key of three named classes beside 24 unmarked images of theirs."""
    root = tmp_path_factory.mktemp("place")
    images, labels = synthetic.demo_images(80, 32, seed=3)
    synthetic.write_folder(root / "few", images[labels < 3], labels[labels < 3], NAMES)
    save_key(root / "k.safetensors", new_key(*marking_weights("builtin"), NAMES))
    return root


def suspect(place, name, order, names=None, classes=None, lean=0.0):
    """The marking network with a head that knows the classes by their mean features, at the outputs of `order`."""
    key = load_key(place / "k.safetensors")
    network = key.network()
    pixels, found = real_images(FolderImages(place / "few"), 32, quiet)
    features = feature_vectors(network, pixels, Batching()).float()
    center = features.mean(0)
    head = nn.Linear(features.shape[1], classes or len(order))
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        for row, output in enumerate(order):
            if output is not None:
                mean = features[[label == NAMES[row] for label in found]].mean(0) - center
                head.weight[output] = 9 * mean / mean.square().sum() + lean * key.carriers[row]
                head.bias[output] = -4.5 - head.weight[output] @ center
    network.module.fc = head
    spec = replace(network.spec, classes=head.out_features, class_names=names)
    save_checkpoint(place / name, network.module, spec)
    return place / name


def verify(place, *models, more=()):
    return call("verify", *models, "--key", place / "k.safetensors", "--json", *more)


# ---------------------------------------------------------------- matching


@pytest.mark.parametrize(("classes", "outputs"), [(3, 3), (2, 5), (4, 3), (1, 6)])
def test_matching_is_the_best_of_all_assignments(classes, outputs):
    generator = torch.Generator().manual_seed(classes)
    for _ in range(20):
        means = torch.rand(classes, outputs, generator=generator, dtype=torch.float64)
        found = match_outputs(means)
        used = [output for output in found if output >= 0]
        assert len(set(used)) == len(used)
        small, large = sorted((classes, outputs))
        every = itertools.permutations(range(large), small)
        best = max(sum(float((means if classes <= outputs else means.T)[i, o]) for i, o in enumerate(p)) for p in every)
        total = sum(float(means[row, output]) for row, output in enumerate(found) if output >= 0)
        assert total <= best + 1e-12
        dropped = min(classes, outputs) - len(used)
        assert total >= best - dropped / outputs - 1e-12  # what is no better than chance is left out


def test_names_are_believed_unless_the_images_contradict_them():
    sure = torch.eye(3, dtype=torch.float64) * 0.8 + 0.1
    assert match_outputs(sure, [0, 1, 2]) == [0, 1, 2]
    assert match_outputs(sure, [1, 2, 0]) == [0, 1, 2]
    two = torch.eye(4, dtype=torch.float64) * 0.7 + 0.075
    assert match_outputs(two, [1, 0, 2, 3]) == [0, 1, 2, 3]  # class by class: half of the names are right
    torn = torch.tensor([[0.9, 0.05, 0.05], [0.5, 0.4, 0.1], [0.1, 0.1, 0.8]], dtype=torch.float64)
    assert match_outputs(torn, [1, 0, 2]) == [0, 1, 2]  # no output is two classes'
    vague = torch.full((3, 3), 0.33, dtype=torch.float64)
    assert match_outputs(vague, [2, 0, 1]) == [2, 0, 1]


@cache
def key_and_marker(place):
    key = load_key(place / "k.safetensors")
    return key, key.network()


def examine(path, key, folder, marker=None, manifest=None):
    """Everything computed from a suspect before any carrier is read."""
    images, options = FolderImages(folder) if folder else None, VerifyOptions(manifest=manifest)
    references = References(marker or key.network(), images)
    network, batching = verification.load_suspect(path, options), Batching()
    reference = references.at(verification.input_size(network, references), batching.tell)
    return verification.examine(network, key, reference, verification.records(key, images, options), batching)


def rows_by_carrier(place, path):
    key, marker = key_and_marker(place)
    _, pairing, vectors, _ = examine(path, key, place / "few", marker)
    return dict(zip(pairing.rows, vectors.features, strict=True))


def test_permuted_extra_and_missing_outputs_are_no_obstacle(place):
    plain = rows_by_carrier(place, suspect(place, "plain.pt", (0, 1, 2), NAMES))
    permuted = rows_by_carrier(place, suspect(place, "permuted.pt", (2, 0, 1)))
    lying = rows_by_carrier(place, suspect(place, "lying.pt", (2, 0, 1), NAMES))
    wider = rows_by_carrier(place, suspect(place, "wider.pt", (4, 1, 3), classes=6))
    assert set(plain) == set(permuted) == set(lying) == set(wider) == {0, 1, 2}
    for row in range(3):
        for other in (permuted, lying):
            assert float(torch.cosine_similarity(plain[row], other[row], dim=0)) > 0.9999  # sums in another order
        alike = [float(torch.cosine_similarity(plain[row], wider[other], dim=0)) for other in range(3)]
        assert alike[row] == max(alike) > 0.5  # three outputs more in the softmax; chance would give 0.04
    fewer = rows_by_carrier(place, suspect(place, "fewer.pt", (1, None, 0), classes=2))
    assert set(fewer) == {0, 2}


def test_outputs_that_are_not_finite_are_an_error_that_names_the_file(place, tmp_path):
    path = place / "overflows.pt"
    network = load_network(suspect(place, "unnamed.pt", (0, 1, 2)))
    network.module.fc.weight.data.fill_(3e38)
    save_checkpoint(path, network.module, network.spec)
    result = bad("verify", path, "--key", place / "k.safetensors", "--data", place / "few")
    assert "overflows.pt: its outputs are not finite" in result.err and "--mean" in result.err
    key = tmp_path / "k.safetensors"  # queries are kept beside it
    save_key(key, load_key(place / "k.safetensors"))
    again = bad("verify", path, "--key", key, "--data", place / "few", "--black-box", "--decoys", 4)
    assert "overflows.pt: its outputs are not finite" in again.err


@pytest.mark.parametrize("more", [[], ["--black-box"]])
def test_a_suspect_that_cannot_be_read_is_told_before_another_is_examined(place, tmp_path, more):
    shutil.copy(place / "k.safetensors", tmp_path)  # queries are kept beside it
    sound, broken = suspect(place, "plain.pt", (0, 1, 2), NAMES), tmp_path / "broken.pt"
    broken.write_bytes(sound.read_bytes()[:-1000])
    asked = ["verify", sound, broken, "--key", tmp_path / "k.safetensors", "--data", place / "few", *more]
    result = bad(*asked)
    assert "broken.pt" in result.err and "examining" not in result.err
    broken.unlink()
    assert "no such file" in bad(*asked).err


@pytest.mark.parametrize("more", [[], ["--black-box", "--decoys", 4]])
def test_images_that_cannot_be_read_are_left_out_and_named(place, tmp_path, more):
    shutil.copy(place / "k.safetensors", tmp_path)  # queries are kept beside it
    shutil.copytree(place / "few", tmp_path / "few")
    model, paths = suspect(place, "plain.pt", (0, 1, 2), NAMES), sorted((tmp_path / "few").rglob("*.png"))
    asked = ["verify", model, "--key", tmp_path / "k.safetensors", "--data", tmp_path / "few", *more]
    first = call(*asked)
    assert first.code == 3 and "cannot be read" not in first.out + first.err
    paths[0].write_bytes(paths[0].read_bytes()[:60])
    paths[-1].write_bytes(b"")
    names = ", ".join(path.relative_to(tmp_path / "few").as_posix() for path in (paths[0], paths[-1]))
    result = call(*asked)
    assert f"2 images of {tmp_path / 'few'} cannot be read, and left out: {names}" in " ".join(
        (result.out + result.err).split()
    )
    for path in paths:
        path.write_bytes(b"")
    assert f"none of the images of {tmp_path / 'few'} can be read" in bad(*asked).err


def test_who_finds_nothing_is_told_that_the_order_was_a_guess(place, few_synthetic):
    unnamed, named = suspect(place, "unnamed.pt", (0, 1, 2)), suspect(place, "plain.pt", (0, 1, 2), NAMES)
    told = [verify(place, model).json["suspects"][0] for model in (unnamed, named)]
    told.append(verify(place, unnamed, more=["--data", place / "few"]).json["suspects"][0])
    shutil.copytree(place / "few" / NAMES[0], place / "flat", dirs_exist_ok=True)  # images of no known class
    told.append(verify(place, unnamed, more=["--data", place / "flat"]).json["suspects"][0])
    told.append(verify(place, suspect(place, "leaning.pt", (0, 1, 2), lean=20)).json["suspects"][0])
    assert told[4]["detected"]
    guessed = [any("paired in order" in warning for warning in one["warnings"]) for one in told]
    assert guessed == [True, True, False, True, False]  # a hostile file may name its classes as it likes


def test_who_finds_nothing_is_told_that_the_classes_were_numbered_by_what_there_was(place, tmp_path):
    """A key without names numbers classes in sorted order: one that only the suspect's file names may shift it."""
    for count in (3, 5):
        good("keygen", "-o", tmp_path / f"{count}.safetensors", "--classes", count)
    # Of five classes, which three are these?
    every = (3, NAMES, False), (5, NAMES, True), (5, ("aardvark", *NAMES), True), (5, None, True)
    for count, names, warned in every:
        model = suspect(place, "numbered.pt", (0, 1, 2), names, classes=len(names or NAMES))
        options = ("--key", tmp_path / f"{count}.safetensors", "--data", place / "few", "--json")
        (found,) = call("verify", model, *options).json["suspects"]
        assert any("paired in order" in warning for warning in found["warnings"]) is warned


def test_numbered_classes_of_shards_are_outputs_and_those_of_folders_are_counted():
    """Shards name their classes by number: 11 is output 11, even if 10 is absent. A folder's are sorted as text."""
    key = new_key(*marking_weights("builtin"), 12)
    spec = SimpleNamespace(class_names=None, classes=12)
    for rows, expected in (
        ({"2": 2, "11": 11}, [(2, 2), (11, 11)]),
        ({"11": 0, "2": 1}, [(0, 0), (1, 1)]),
    ):
        assert sorted(pair_unlabelled(key, spec, Records(marked=rows, recorded=rows))) == expected


def test_a_flat_folder_is_tested_on_every_output_and_corrected(place, tmp_path):
    flat, key = tmp_path / "flat", tmp_path / "k.safetensors"
    flat.mkdir()
    for path in (place / "few" / "bee").iterdir():
        (flat / path.name).write_bytes(path.read_bytes())
    good("keygen", "-o", key, "--classes", 1)
    good("mark", flat, "--key", key, "-o", tmp_path / "out", "--steps", 1)
    model = suspect(place, "plain.pt", (0, 1, 2), NAMES)
    manifest = tmp_path / "out.manifest.jsonl"
    for more in ([], ["--marked", manifest]):
        answer = call("verify", model, "--key", key, "--json", "--data", flat, *more).json["suspects"][0]
        assert answer["classes_used"] == 3
        assert any("corrected for the choice" in warning for warning in answer["warnings"])


@pytest.mark.parametrize("real", [False, True])
def test_of_few_marked_classes_the_vectors_are_those_beside_all_others(place, tmp_path, few_synthetic, real):
    """A manifest of one marked class: it is tested as if all had been compared, and alone."""
    key = load_key(place / "k.safetensors")
    model, data = suspect(place, "plain.pt", (0, 1, 2), NAMES), place / "few" if real else None
    lines = [{"radiotag": 1, "fingerprint": key.fingerprint}]
    lines += [{"path": name, "class": name, "row": row, "status": "marked" if row == 1 else "copied"}
              for row, name in enumerate(NAMES)]  # fmt: skip
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (_, every, vectors, _), (_, pairing, alone, _) = (
        examine(model, key, data, manifest=manifest) for manifest in (None, tmp_path / "m.jsonl")
    )
    assert every.rows == (0, 1, 2) and pairing.rows == (1,) and pairing.names == ("bee",)
    for part in ("features", "pattern", "paper"):
        torch.testing.assert_close(getattr(alone, part), getattr(vectors, part)[1:2])
    before = replace(key, metadata=key.metadata | {"statistic": AS_ONE})
    _, pairing, lonely, _ = examine(model, before, data, manifest=tmp_path / "m.jsonl")
    assert pairing.rows == (1,) and not torch.allclose(lonely.pattern, alone.pattern)


def test_a_key_of_one_named_class_is_tested_on_that_class_alone(place):
    """An owner of few images marks a single class; nothing is chosen, so nothing is corrected."""
    key = new_key(*marking_weights("builtin"), NAMES[1:2])
    for model in (suspect(place, "plain.pt", (0, 1, 2), NAMES), suspect(place, "permuted.pt", (2, 0, 1))):
        _, pairing, vectors, _ = examine(model, key, place / "few")
        assert pairing.rows == (0,) and len(vectors.features) == 1
        every = rows_by_carrier(place, model)
        near = {row: float(torch.cosine_similarity(vectors.features[0], every[row], dim=0)) for row in every}
        # not the same to the last bit: an ordinary classifier of one class has no other classes to tell it from
        assert near.pop(1) > 0.95 and max(near.values()) < 0.5


@pytest.mark.parametrize("data", [False, True])
def test_of_the_classes_that_are_not_compared_those_count_that_the_suspect_knows(
    place, monkeypatch, few_synthetic, data
):
    """φ answers for a network that knows what the suspect does, and not for its own hundred other classes."""
    theirs, seen = ("bird", "cat", "airplane", "ant"), {}
    model = suspect(place, "known.pt", (3, None, 1), theirs, classes=4)

    def captured(reference, suspect, classes, batching):
        seen.update(known=classes.marker_outputs, besides=classes.marker_besides)
        return class_vectors(reference, suspect, classes, batching)

    monkeypatch.setattr(verification, "class_vectors", captured)
    key = new_key(*marking_weights("builtin"), ["cat"])
    marker = key.network()
    known = marker.spec.class_names

    def names_seen(path, folder):
        examine(path, key, folder, marker)
        return [[known[output] for output in seen[name]] for name in ("known", "besides")]

    if not data:
        assert names_seen(model, None) == [["cat"], ["bird", "airplane"]]
        return
    shutil.copytree(place / "few" / "cat", place / "alone" / "cat", dirs_exist_ok=True)
    assert names_seen(model, place / "alone") == [["cat"], ["bird", "airplane"]]  # the images name no others
    for ours, its in (("ant", "truck"), ("bee", "ship"), ("cat", "cat")):
        shutil.copytree(place / "few" / ours, place / "three" / its, dirs_exist_ok=True)
    for names in (None, theirs[:3]):  # what the images name the suspect has answered to
        nameless = suspect(place, "nameless.pt", (0, 1, 2), names)
        assert names_seen(nameless, place / "three") == [["cat"], ["ship", "truck"]]
    key = new_key(*marking_weights("builtin"), ["cat", "ship", "truck"])
    fewer = suspect(place, "few.pt", (1, None, 0), classes=2)  # knows no ship
    assert names_seen(fewer, place / "three") == [["cat", "truck"], []]


def test_every_class_is_shown_in_whatever_order_the_images_lie():
    """Labels of arrays may be periodic: even intervals of the images would show one class alone."""
    labels = [f"c{i % 10}" for i in range(10_000)]
    _, names = real_images(ArrayImages(torch.zeros(10_000, 3, 2, 2, dtype=torch.uint8), labels), 2, quiet)
    assert Counter(names) == dict.fromkeys(labels, 200)
    assert spread_over_classes(["b", "a", "b", "a", "b"], 2) == [0, 1, 4]
    assert even_over_classes(labels, 2000) == spread_over_classes(labels, 5)
    assert spread_over_classes(["a", "a", "a", "b", "b"], 2) == [0, 2, 4]  # a folder's, at even intervals


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=60), st.integers(1, 50))
def test_of_every_class_as_many_images_are_shown_as_the_limit_allows(labels, limit):
    chosen = even_over_classes(labels, limit)
    assert chosen == sorted(set(chosen)) and len(chosen) <= limit
    assert len(chosen) == min(limit, len(labels))
    sizes, shown = Counter(labels), Counter(labels[i] for i in chosen)
    most = max(shown.values())
    assert all(min(most - 1, size) <= shown[name] <= min(most, size) for name, size in sizes.items())


def test_of_a_marked_class_its_originals_are_not_lost_among_the_images_of_the_others():
    labels = ["marked"] * 500 + ["other"] * 5000 + ["another"] * 5000
    images = ArrayImages(torch.zeros(10_500, 3, 2, 2, dtype=torch.uint8), labels)
    assert Counter(real_images(images, 2, quiet)[1]) == {"marked": 500, "other": 750, "another": 750}
    before = Counter(real_images(images, 2, quiet, evenly=False)[1])  # of versions up to 0.9
    assert before["marked"] < 100


@pytest.mark.parametrize(("size", "images"), [(32, 60), (64, 60), (65, 30)])
def test_of_many_classes_more_images_are_shown(tmp_path, monkeypatch, size, images):
    for name in "abcdefghijkl":
        (tmp_path / name).mkdir()
        for i in range(10):
            (tmp_path / name / f"{i}.png").write_bytes(png(np.full((4, 4, 3), i, np.uint8)))
    monkeypatch.setattr(probes, "ALIGNMENT_IMAGES", 30)
    monkeypatch.setattr(probes, "FEW_IMAGES", 5)
    pixels, names = real_images(FolderImages(tmp_path), size, quiet)
    assert len(pixels) == len(names) == images
    assert {names.count(name) for name in "abcdefghijkl"} <= {images // 12, -(-images // 12)}
    monkeypatch.setattr(probes, "MANY_IMAGES", 40)
    assert len(real_images(FolderImages(tmp_path), size, quiet)[1]) == min(images, 40)


# ---------------------------------------------------------------- black-box


@pytest.fixture(scope="module")
def asked(place):
    """Two suspects asked with four decoys."""
    one, two = suspect(place, "one.pt", (0, 1, 2), NAMES), suspect(place, "two.pt", (1, 2, 0), lean=2.0)
    return verify(place, one, two, more=["--black-box", "--data", place / "few", "--decoys", 4])


def test_black_box_says_what_it_did(place, asked):
    assert asked.code == 3
    assert (
        "3 classes, 24 images with and without the patterns of the true key and of 4 decoys: 240 questions" in asked.err
    )
    answer = asked.json
    assert answer["statistic"] == "black-box"
    for found in answer["suspects"]:
        assert (found["method"], found["classes_used"], found["decoys"]) == ("black-box", 3, 4)
        assert found["mean_cosine"] is found["paper_log10_p"] is found["alignment_r2"] is None
        assert -3 * np.log10(5) - 1e-9 <= found["log10_p"] <= 0
    (kept,) = place.glob("k.queries-*.safetensors")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    before = kept.read_bytes()
    again = verify(place, place / "one.pt", more=["--black-box", "--data", place / "few", "--decoys", 4])
    assert again.json["suspects"][0]["log10_p"] == answer["suspects"][0]["log10_p"]
    assert kept.read_bytes() == before
    text = call("verify", place / "one.pt", "--key", place / "k.safetensors", "--black-box", "--decoys", 4,
                "--data", place / "few").out  # fmt: skip
    assert "4 decoys" in text and "exact resampling" in text


def test_decoys_are_other_keys_that_nobody_can_draw_again(place):
    key, other = load_key(place / "k.safetensors"), new_key(*marking_weights("builtin"), NAMES)
    drawn = [blackbox.decoy_patterns(k, n) for k in (key, other) for n in range(3)]
    assert torch.equal(drawn[0], key.patterns)
    for a, b in itertools.combinations(drawn, 2):
        assert not (a == b).any()
    assert torch.equal(blackbox.decoy_patterns(key, 2), drawn[2])
    for patterns in drawn:
        assert patterns.shape == key.patterns.shape
        assert patterns.norm(dim=1).tolist() == pytest.approx([1] * 3, abs=1e-6)


def test_queries_are_the_image_with_and_without_its_pattern(place):
    key = load_key(place / "k.safetensors")
    images = [torch.full((3, 20, 24), 128, dtype=torch.uint8), torch.full((3, 600, 300), 90, dtype=torch.uint8)]
    images = [blackbox.shrunk(image.float()) for image in images]
    queries = blackbox.make(key, images, [2, 0], ["cat", "ant"], decoys=1)
    assert [len(queries.names), len({name for row in queries.names for name in row})] == [4, 8]
    assert queries.images[1].shape == (3, 256, 128)
    for number in range(4):
        patterns, sign = blackbox.decoy_patterns(key, number // 2), (1, -1)[number % 2]
        for image, row, seen in zip(queries.images, (2, 0), blackbox.shown(queries, key, number), strict=True):
            shift = pattern_images(patterns[row][None], *image.shape[1:])[0]
            expected = 255 * 10 ** (-28 / 20) * sign * shift / shift.square().mean().sqrt()
            assert np.abs((seen.double() - image.double() - expected).numpy()).max() <= 0.51


def pattern_reader(answers, strength):
    """A suspect's probabilities, where it has learnt the true key's patterns: surer with them, less sure without."""
    moved = answers.clamp(1e-3, 1 - 1e-3).logit()
    moved[0] += strength
    moved[1] -= strength
    return moved.sigmoid()


def test_a_suspect_that_learnt_the_patterns_is_found(place, asked):
    key = load_key(place / "k.safetensors")
    queries = blackbox.load_queries(next(place.glob("k.queries-*.safetensors")), key)
    answers = blackbox.ask(verification.load_suspect(place / "one.pt", VerifyOptions()), queries, key, Batching())
    pairs = [(0, 0), (1, 1), (2, 2)]
    found = [resampled_log_p(pattern_effects(queries, pattern_reader(answers, s), pairs)) for s in (-5, 5)]
    assert found == pytest.approx([0, -3 * np.log(5)])


def test_what_patterns_do_by_nature_is_taken_off():
    """A suspect that answers as the marking network does, however oddly, is the same under every key."""
    generator = torch.Generator().manual_seed(0)
    own = torch.rand(8, 6, 3, generator=generator, dtype=torch.float64)
    queries = blackbox.Queries(images=(), rows=(0, 0, 0, 1, 1, 1), labels=("a",) * 3 + ("b",) * 3, names=())
    values = pattern_effects(queries, own, [(2, 0), (0, 1)], own, ("b", "x", "a"))
    assert np.abs(values).max() < 1e-12
    plain = pattern_effects(queries, own, [(2, 0), (0, 1)])
    half = pattern_effects(queries, own, [(2, 0), (0, 1)], own, ("x", "y", "a"))
    assert (half[:, 1] == plain[:, 1]).all() and np.abs(half[:, 0]).max() < 1e-12
    labels = torch.nn.functional.one_hot(own.argmax(2), 3).double()
    assert np.abs(pattern_effects(queries, labels, [(2, 0), (0, 1)], own, ("b", "x", "a"))).max() < 1e-12


def test_images_to_ask_with_are_shared_evenly():
    labels = ["a"] * 60 + ["b"] * 3 + ["c"] * 60
    assert blackbox.choose_images(labels) == [*range(48), 60, 61, 62, *range(63, 111)]
    assert blackbox.choose_images(labels, images=6) == [0, 1, 60, 61, 63, 64]
    assert len(blackbox.choose_images([str(i % 1000) for i in range(5000)])) == 1000


@pytest.mark.parametrize(("classes", "alpha"), [(1, 1e-2), (1, 1e-4), (2, 1e-4), (3, 1e-9), (10, 1e-4), (1000, 1e-4)])
def test_there_are_as_many_decoys_as_alpha_needs(classes, alpha):
    decoys = blackbox.decoys_needed(classes, alpha)
    assert decoys >= 23
    assert (decoys + 1.0) ** -classes < alpha
    assert decoys == 23 or float(decoys) ** -classes > alpha / 1.05 * (1 - 1e-9)  # and no more than that
    assert blackbox.decoys_needed(1, 1e-30) == blackbox.MOST_DECOYS


def test_one_class_is_asked_with_many_decoys_and_few_images(place, monkeypatch):
    monkeypatch.setattr(blackbox, "QUESTIONS", 700)
    key = new_key(*marking_weights("builtin"), NAMES[:1])
    queries = verification.prepare_queries(key, FolderImages(place / "few"), VerifyOptions(alpha=0.01))
    assert (len(queries.names), len(queries.rows)) == (2 * 105, 3)  # 630 questions
    assert set(queries.labels) == {"ant"}
    ours = suspect(place, "plain.pt", (0, 1, 2), NAMES)
    (found,) = verification.verify_black_box([ours], queries, key, VerifyOptions(alpha=0.01))
    assert found.classes_used == 1 and found.warnings == ()
    assert found.log10_p == pytest.approx(np.log10(round(105 * 10**found.log10_p) / 105))  # a place among 105
    (found,) = verification.verify_black_box([ours], queries, key, VerifyOptions(alpha=0.001))
    assert found.warnings == ("p cannot be below 9.5e-03 with 104 decoys and 1 of the classes: ask with more --decoys",)


def test_black_box_asks_first_with_the_originals_of_what_was_published(place, tmp_path, monkeypatch):
    monkeypatch.setattr(blackbox, "EACH", 2)
    good(
        "mark", place / "few", "--key", place / "k.safetensors", "-o", tmp_path / "out", "--steps", 1, "--fraction", 0.2
    )
    manifest, key = tmp_path / "out.manifest.jsonl", load_key(place / "k.safetensors")
    marked = {path: row for path, row in read_manifest(manifest)[1].items() if row["status"] == "marked"}
    assert len(marked) == 6  # two of the eight of each class

    def shown(manifest):
        images = FolderImages(place / "few", manifest)
        queries = verification.choose_queries(key, images, VerifyOptions(manifest=manifest, decoys=2))
        return {image.numpy().tobytes() for image in queries.images}

    originals = [decode((place / "few" / path).read_bytes(), path).rgb.transpose(2, 0, 1) for path in marked]
    assert shown(manifest) == {image.astype(np.uint8).tobytes() for image in originals}
    assert shown(None) != shown(manifest)


def test_black_box_takes_a_manifests_classes_as_one_set_if_the_key_declares_it(place, tmp_path, monkeypatch):
    monkeypatch.setattr(blackbox, "EACH", 1)
    good("mark", place / "few", "--key", place / "k.safetensors", "-o", tmp_path / "out", "--steps", 1)
    manifest, key = tmp_path / "out.manifest.jsonl", load_key(place / "k.safetensors")
    before = replace(key, metadata=key.metadata | {"statistic": AGAINST_ALL})
    model = suspect(place, "plain.pt", (0, 1, 2), NAMES)

    def tested(key, manifest):
        options = VerifyOptions(manifest=manifest, alpha=1e-5)
        queries = verification.choose_queries(key, FolderImages(place / "few", manifest), options)
        (found,) = verification.verify_black_box([model], queries, key, options)
        return found.sets, queries.decoys

    assert tested(key, manifest) == (1, blackbox.decoys_needed(3, 1e-5))
    for key_, manifest_ in ((key, None), (before, None), (before, manifest)):
        assert tested(key_, manifest_) == (3, blackbox.decoys_needed(3, 1e-5 / 3))  # 1, 2 and 3 classes


def test_black_box_without_an_answer_for_some_keys():
    queries = blackbox.Queries(images=(), rows=(0, 0, 1), labels=("a", "a", "b"), names=())
    answers = torch.full((6, 3, 2), float("nan"), dtype=torch.float64)
    answers[0::2, 0, 0], answers[2::2, 1, 0], answers[1::2, :2, 0], answers[1:, 2, 1] = 0.5, 0.9, 0.2, 0.9
    values = pattern_effects(queries, answers, [(0, 0), (1, 1)])  # the second class lacks the true key's answer
    half, more = np.log(4.0), np.log(36.0)  # logits of 0.5, 0.9 and 0.2
    assert values[:, 0] == pytest.approx([half, (half + more) / 2, (half + more) / 2])
    assert values.shape == (3, 1)
    with pytest.raises(RadiotagError, match="under every key"):
        pattern_effects(queries, answers, [(1, 1)])


def test_black_box_is_uniform_for_a_suspect_that_knows_nothing_of_the_keys():
    """Probabilities as a suspect might give them, the same law under every key; partly unanswered."""
    generator, p = torch.Generator().manual_seed(0), []
    rows = tuple(i % 3 for i in range(12))
    for _ in range(400):
        level = torch.rand(12, 1, generator=generator, dtype=torch.float64)
        answers = torch.rand(12, 12, 3, generator=generator, dtype=torch.float64) ** 3 * level
        answers[torch.rand(12, 12, generator=generator) < 0.1] = float("nan")
        values = pattern_effects(
            blackbox.Queries(images=(), rows=rows, labels=("",) * 12, names=()), answers, [(0, 0), (1, 1), (2, 2)]
        )
        p.append(resampled_log_p(values))
    p = np.exp(p)
    for a in (0.5, 0.2, 0.05):
        assert abs((p <= a).sum() - 400 * a) < 4 * np.sqrt(400 * a * (1 - a)) + 2


# ---------------------------------------------------------------- a suspect that is elsewhere


@pytest.fixture(scope="module")
def exported(place, asked):
    result = good("verify", "--key", place / "k.safetensors", "--black-box", "--data", place / "few", "--decoys", 4,
                  "--export", place / "questions", "--json")  # fmt: skip
    assert result.json["images"] == 240
    return place / "questions"


@pytest.fixture(scope="module")
def answers(place, exported):
    """The first suspect's answer to each exported file, read without radiotag."""
    network = verification.load_suspect(place / "one.pt", VerifyOptions())
    files = sorted(exported.iterdir())
    pixels = torch.stack([torch.from_numpy(decode(f.read_bytes(), f.name).rgb.transpose(2, 0, 1).copy())
                          for f in files])  # fmt: skip
    with torch.no_grad():
        return {f.name: p.tolist() for f, p in zip(files, network(pixels / 255).double().softmax(1), strict=True)}


def queries_of(place):
    return blackbox.load_queries(next(place.glob("k.queries-*.safetensors")), load_key(place / "k.safetensors"))


def test_nothing_in_an_export_tells_true_from_decoy(place, exported):
    files = sorted(exported.iterdir())
    assert len(files) == 240
    assert all(len(f.stem) == 32 and f.suffix == ".png" and f.stat().st_mtime == 0 for f in files)
    queries = queries_of(place)
    true = {*queries.names[0], *queries.names[1]}
    ranks = [i for i, f in enumerate(files) if f.stem in true]
    assert len(ranks) == 48 and 80 < np.mean(ranks) < 160  # 119.5 ± 9: spread over the order of names
    assert bad("verify", "--key", place / "k.safetensors", "--black-box", "--data", place / "few", "--decoys", 4,
               "--export", exported).err.count(f"error: {exported} exists") == 1  # fmt: skip


def write_csv(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def predictions(place, path):
    return call("verify", "--key", place / "k.safetensors", "--predictions", path, "--json")


def test_answers_from_elsewhere_are_tested_as_those_from_here(place, asked, answers, tmp_path):
    expected = asked.json["suspects"][0]["log10_p"]
    probabilities = write_csv(tmp_path / "p.csv", ["file", *NAMES], [[f, *p] for f, p in answers.items()])
    told = predictions(place, probabilities).json
    assert told["data"] == {"kind": "the exported questions", "digest": None, "images": None}
    logits = tmp_path / "l.json"
    logits.write_text(json.dumps({f: [float(np.log(x)) + 3 for x in p] for f, p in answers.items()}))
    for path in (probabilities, logits):
        found = predictions(place, path)
        assert found.code == 3, found.err
        assert found.json["suspects"][0]["log10_p"] == pytest.approx(expected, abs=1e-6)
        assert found.json["suspects"][0]["method"] == "black-box"


@pytest.mark.parametrize("scale", [1, 100])
def test_rounded_answers_are_all_read_alike(place, answers, tmp_path, scale):
    """Rounded or cut down, probabilities seldom sum to one: a sum of 0.97 makes no logits of them."""
    cut = {f: [np.floor(100 * x) / 100 for x in p] for f, p in answers.items()}
    first, second = list(cut)[:2]
    cut[first], cut[second] = [1.0000001, 0, 0], [0.5, 0.3, 0.17]  # the first in single precision
    assert min(map(sum, cut.values())) < 0.985
    given, exact = tmp_path / "cut.json", tmp_path / "exact.json"
    exact.write_text(json.dumps({f: [x / sum(p) for x in p] for f, p in cut.items()}))
    given.write_text(json.dumps({f: [scale * x for x in p] for f, p in cut.items()}))
    found = [predictions(place, path).json["suspects"][0]["log10_p"] for path in (given, exact)]
    assert found[0] == pytest.approx(found[1], abs=1e-9)


def test_a_single_number_an_image_is_a_sigmoid_s(place, answers, tmp_path):
    """As a file's only output is; divided by its own sum, every answer would be 1."""
    shares = {f: p[1] for f, p in answers.items()}
    two = write_csv(tmp_path / "two.csv", ["file", "ant", "bee"], [[f, 1 - p, p] for f, p in shares.items()])
    one = write_csv(tmp_path / "one.csv", ["file", "bee"], [[f, p] for f, p in shares.items()])
    logits = tmp_path / "logits.json"
    logits.write_text(json.dumps({f: [math.log(max(p, 1e-9) / max(1 - p, 1e-9))] for f, p in shares.items()}))
    read = [read_answers(path, queries_of(place))[0] for path in (two, one, logits)]
    for single in read[1:]:
        assert single.shape[-1] == 1
        assert torch.allclose(single[..., 0], read[0][..., 1], atol=1e-6)
    cent = write_csv(tmp_path / "cent.csv", ["file", "bee"], [[f, 100 * p] for f, p in shares.items()])
    with pytest.raises(RadiotagError, match="one number an image"):  # per cent, or logits?
        read_answers(cent, queries_of(place))
    named = write_csv(
        tmp_path / "named.csv", ["file", "prediction"], [[f, NAMES[int(p > 0.5)]] for f, p in shares.items()]
    )
    assert read_answers(named, queries_of(place))[0].shape[-1] == 2  # a label, whatever its column is called


def test_a_suspect_that_does_not_react_has_no_evidence_whatever_the_marking_network_answers(place, answers, tmp_path):
    labels = write_csv(tmp_path / "same.csv", ["file", *NAMES], [[f, 0.8, 0.1, 0.1] for f in answers])
    found = pattern_effects(
        queries_of(place), read_answers(labels, queries_of(place))[0], [(0, 0)],
        torch.rand(10, 12, 3, dtype=torch.float64), NAMES,
    )  # fmt: skip
    assert resampled_log_p(found) == 0


def test_queries_lie_beside_a_key_of_any_name_and_those_of_another_key_are_passed_over(place, answers, tmp_path):
    odd = tmp_path / "k[1].safetensors"
    shutil.copy(place / "k.safetensors", odd)
    for path in place.glob("k.queries-*.safetensors"):
        shutil.copy(path, tmp_path / path.name.replace("k.", "k[1].", 1))
    save_key(tmp_path / "k.safetensors", new_key(*marking_weights("builtin"), NAMES))
    other, queries = load_key(tmp_path / "k.safetensors"), queries_of(place)
    blackbox.save_queries(tmp_path / "k[1].queries-0000000000000000.safetensors", queries, other)
    path = write_csv(tmp_path / "p.csv", ["file", *NAMES], [[f, *p] for f, p in answers.items()])
    found = call("verify", "--key", odd, "--predictions", path, "--json")
    assert found.code == 3, found.err
    assert found.json["suspects"][0]["log10_p"] == predictions(place, path).json["suspects"][0]["log10_p"]


def test_labels_alone_will_do_by_name_or_number(place, answers, tmp_path):
    best = {f: int(np.argmax(p)) for f, p in answers.items()}
    named = write_csv(tmp_path / "n.csv", ["file", "label"], [[f, f"class {c}"] for f, c in best.items()])
    numbered = tmp_path / "n.json"
    numbered.write_text(json.dumps(best))
    found = [predictions(place, path).json["suspects"][0]["log10_p"] for path in (named, numbered)]
    assert found[0] == pytest.approx(found[1])
    assert -3 * np.log10(5) - 1e-9 <= found[0] <= 0


def test_a_label_may_be_any_number(place, answers, tmp_path):
    """A single large number from the suspect must not fill memory with outputs that have no answers."""
    best = {f: 10_000_000 * int(np.argmax(p)) for f, p in answers.items()}
    (tmp_path / "n.json").write_text(json.dumps(best))
    (tmp_path / "small.json").write_text(json.dumps({f: label // 10_000_000 for f, label in best.items()}))
    found = [predictions(place, tmp_path / name).json["suspects"][0]["log10_p"] for name in ("n.json", "small.json")]
    assert found[0] == pytest.approx(found[1])


def test_an_export_is_written_in_no_order_that_tells(place, tmp_path, monkeypatch):
    queries = queries_of(place)
    rows = {name: number for number, names in enumerate(queries.names) for name in names}
    orders, key = set(), load_key(place / "k.safetensors")
    for attempt in range(4):
        written = []
        monkeypatch.setattr(blackbox, "write_atomically", lambda path, data, kept=written: kept.append(path))
        monkeypatch.setattr(blackbox.os, "utime", lambda *_: None)
        blackbox.export(queries, key, tmp_path / f"{attempt}")
        orders.add(tuple(dict.fromkeys(rows[path.stem] for path in written)))
        assert len(written) == len(rows)
    assert len(orders) > 1 and tuple(range(len(queries.names))) not in orders  # fails once in 10! of tries


def test_partial_and_foreign_answers_are_counted(place, answers, tmp_path):
    some = list(answers.items())[:220]
    rows = [[f"sub/{f}", *p] for f, p in some] + [["other.png", 1, 0, 0], [some[0][0], *some[0][1]]]
    path = write_csv(tmp_path / "p.csv", ["file", *NAMES], rows)
    warnings = predictions(place, path).json["suspects"][0]["warnings"]
    assert warnings == ["1 answers are for files that were not exported, and ignored",
                        "20 of 240 exported images have no answer",
                        "p cannot be below 2.4e-02 with 4 decoys and 3 of the classes: ask with more "
                        "--decoys"]  # fmt: skip


def test_numbers_that_are_not_finite_are_left_out_and_counted(place, answers, tmp_path):
    whole = write_csv(tmp_path / "w.csv", ["file", *NAMES], [[file, *p] for file, p in answers.items()])
    rows = [[file, *(("inf", *p[1:]) if i in (3, 50) else p)] for i, (file, p) in enumerate(answers.items())]
    found = predictions(place, write_csv(tmp_path / "p.csv", ["file", *NAMES], rows)).json["suspects"][0]
    assert "2 answers are not finite: they were left out" in found["warnings"]
    assert found["log10_p"] == pytest.approx(predictions(place, whole).json["suspects"][0]["log10_p"], abs=0.7)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "header"),
        ("file,label\nother.png,ant\n", "none of this key's"),
        ("file,ant,bee\nFIRST,0.5,x\n", "line 2"),
        ("file,ant,bee\nFIRST,0.5\n", "line 2"),
        ("file,ant,bee\nFIRST,0.5,nan\n", "finite"),
        ("file,label\nFIRST,ant\nFIRST,bee\n", "twice"),
        ("[1, 2]", "not an object"),
        ('{"FIRST": true}', "neither"),
        ('{"FIRST": {"ant": "x"}}', "numbers"),
        ('{"FIRST": []}', "numbers"),
        ('{"FIRST": [0.5, 0.5], "SECOND": 1}', "mixes"),
        ('{"FIRST": [0.5, 0.5], "SECOND": [1]}', "needs 2 numbers"),
        ('{"FIRST": [1' + "0" * 400 + "]}", "more than 300 digits"),
        ('{"FIRST": ' + "[" * 100_000, "cannot read"),
        ("file,a,a\nFIRST,1,0", "two columns 'a'"),
        ("{", "cannot read"),
    ],
)
def test_malformed_answers_are_named(place, exported, tmp_path, content, said):
    first, second = sorted(f.name for f in exported.iterdir())[:2]
    path = tmp_path / ("a.json" if content[:1] in "{[" and content else "a.csv")
    path.write_text(content.replace("FIRST", first).replace("SECOND", second))
    result = bad("verify", "--key", place / "k.safetensors", "--predictions", path)
    assert said in result.err and str(path) in result.err


def test_predictions_need_an_export(place, tmp_path):
    good("keygen", "-o", tmp_path / "k.safetensors", "--classes", 3)
    (tmp_path / "a.csv").write_text("file,label\nx.png,1\n")
    result = bad("verify", "--key", tmp_path / "k.safetensors", "--predictions", tmp_path / "a.csv")
    assert "--export" in result.err
    damaged = tmp_path / "k.queries-0.safetensors"
    damaged.write_bytes(b"no")
    assert str(damaged) in bad("verify", "--key", tmp_path / "k.safetensors", "--predictions", tmp_path / "a.csv").err


@pytest.mark.parametrize(
    "more",
    [
        ["--black-box"], ["--export", "d"], ["m.pt", "--predictions", "p.csv"], ["m.pt", "--black-box"],
        ["--export", "d", "--predictions", "p.csv", "--black-box", "--data", "x"],
        ["m.pt", "--black-box", "--data", "x", "--calibrate", "5"],
    ],
)  # fmt: skip
def test_combinations_that_mean_nothing(more):
    bad("verify", "--key", "k", *more, code=2)


@pytest.mark.parametrize(
    "idle",
    [("--arch", "resnet18"), ("--image-size", 32), ("--mean", "0,0,0"), ("--std", "1,1,1"), ("--control", "c.pt")],
)
def test_no_option_is_passed_over_where_the_suspect_is_elsewhere(idle):
    exporting = ("--export", "d", "--black-box", "--data", "x")
    for what in (exporting, ("--predictions", "p.csv")):
        assert f"leave out {idle[0]}" in bad("verify", "--key", "k", *what, *idle, code=2).err
    assert "leave out --report" in bad("verify", "--key", "k", *exporting, "--report", "r.html", code=2).err
    asked = bad("verify", "--key", "k", "--predictions", "p.csv", "--data", "x", "--decoys", 9, code=2).err
    assert "leave out --data and --decoys" in asked


def test_a_manifest_without_a_mark_is_said_to_be_one(place, tmp_path):
    path = suspect(place, "plain.pt", (0, 1, 2), NAMES)
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(
        json.dumps({"radiotag": 1, "fingerprint": load_key(place / "k.safetensors").fingerprint}) + "\n"
    )
    for data in ((), ("--data", place / "few"), ("--data", place / "few", "--black-box")):
        said = bad("verify", path, "--key", place / "k.safetensors", "--marked", manifest, *data).err
        assert f"{manifest} records no marked image" in said


def test_more_questions_than_a_file_may_hold_are_refused_before_they_are_written():
    key, image = new_key({}, {}, 4, 51), torch.zeros(3, 8, 8, dtype=torch.uint8)
    with pytest.raises(RadiotagError, match="10,200,000 questions, more than 10,000,000") as error:
        blackbox.make(key, [image] * 51, range(51), [str(i) for i in range(51)], 99_999)
    assert "--decoys" in error.value.hint


# ---------------------------------------------------------------- calibration


def test_calibration_shows_a_uniform_law_and_the_true_keys_place(place):
    model = suspect(place, "plain.pt", (0, 1, 2), NAMES)
    result = verify(place, model, more=["--data", place / "few", "--calibrate", 100])
    answer = result.json
    found = answer["calibration"]
    assert found == answer["suspects"][0]["calibration"]
    assert found["n"] == 100 and sum(found["histogram"]) == 100
    assert min(found["ks_p"], found["tail_p"]) > 1e-4
    assert found["tail"][0] == found["histogram"][0] and found["tail"] == sorted(found["tail"], reverse=True)
    assert 1 <= found["rank"] <= 101
    p = 10 ** answer["suspects"][0]["log10_p"]
    assert found["rank"] / 101 < p + 0.25  # corrected for the choice among three sets, p is larger than it need be
    again = verify(place, model, more=["--data", place / "few", "--calibrate", 100]).json["calibration"]
    assert again == found  # fresh keys follow from the secret one: nobody draws until they suit


JUDGED = SimpleNamespace(log_p=0.0, sets=1)


def test_calibration_where_the_best_of_many_outputs_counts_asks_for_no_more_than_it_must():
    """Bonferroni's p is 1 for a third of all keys: this is not uniform, but no reason for distrust."""
    key = new_key(*marking_weights("builtin"), 1)
    generator = torch.Generator().manual_seed(1)
    draw = torch.randn(10, 512, generator=generator).double(), torch.randn(10, 51, generator=generator).double()
    vectors = ClassVectors(features=draw[0], pattern=draw[1])
    found = calibrate(vectors, (0,) * 10, key, JUDGED, 300)
    assert found.histogram[-1] > 60 and found.ks_p > 0.001
    guilty = replace(vectors, pattern=draw[1] + 9 * key.patterns.double())  # fresh keys know nothing of this one
    assert calibrate(guilty, (0,) * 10, key, JUDGED, 300).ks_p > 0.001


def test_calibration_finds_too_many_small_p_values(monkeypatch):
    """A test whose p is half of the true one: with one output, and if the best of many counts."""
    key = new_key(*marking_weights("builtin"), 1)
    real = calibration.evidence
    monkeypatch.setattr(
        calibration, "evidence", lambda *given: replace(real(*given), log_p=real(*given).log_p + np.log(0.5))
    )
    for classes in ((0,), (0,) * 10):
        draw = [torch.randn(len(classes), size, dtype=torch.float64) for size in (512, 51)]
        assert calibrate(ClassVectors(features=draw[0], pattern=draw[1]), classes, key, JUDGED, 600).ks_p < 1e-6


@pytest.mark.parametrize("many", [0, 4])
def test_calibration_counts_the_smallest_p_values(monkeypatch, many):
    """A test that is wrong for one key in 500, with p near 0: the Kolmogorov–Smirnov test cannot see that."""
    key = new_key(*marking_weights("builtin"), 1)
    p = (np.random.default_rng(5).permutation(2000) + 0.5) / 2000
    p[:many] = 1e-5
    answers = iter(p)
    monkeypatch.setattr(calibration, "evidence", lambda *_: SimpleNamespace(log_p=float(np.log(next(answers)))))
    found = calibrate(ClassVectors(features=torch.ones(1, 512)), (0,), key, JUDGED, 2000)
    assert found.ks_p > 0.99
    assert found.tail == tuple((p <= level).sum() for level in (0.1, 0.01, 0.001, 0.0001))
    exact = [binomtest(count, 2000, level, "greater").pvalue for count, level in zip(found.tail, TAIL, strict=True)]
    assert found.tail_p == pytest.approx(min(1, 4 * min(exact)))
    said = " ".join(histogram(found))
    assert ("NOT uniform" in said) == (many > 0)
    assert f"p ≤ 0.01: {found.tail[1]} (20)" in said


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (MemoryError(), True), (torch.OutOfMemoryError("any"), True), (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"), True), (RuntimeError("shape mismatch"), False),
    ],
)  # fmt: skip
def test_what_says_that_memory_does_not_suffice(error, full):
    assert out_of_memory(error) is full


def test_errors_of_the_images_do_not_blame_the_suspect(place):
    model = suspect(place, "plain.pt", (0, 1, 2), NAMES)
    error = bad("verify", model, "--key", place / "k.safetensors", "--data", place / "nowhere").err
    assert f"{place / 'nowhere'}" in error and "plain.pt" not in error.split("\nerror: ")[-1]


def test_an_interrupted_run_of_several_processes_tells_of_its_images_too(place, tmp_path):
    good("mark", place / "few", "-o", tmp_path / "out", "--key", place / "k.safetensors", "--steps", 1)
    manifest = tmp_path / "out.manifest.jsonl"
    header, *rows = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join([header, *rows[:5]]))
    (tmp_path / "out.manifest.jsonl.rank1").write_text("".join([header, *rows[5:]]))
    key = load_key(place / "k.safetensors")
    assert marked_classes(key, manifest) == {"ant": 0, "bee": 1, "cat": 2}
    assert len(marked_hashes(marked_rows(manifest))) == len(rows)
    only = tmp_path / "only" / "cat"
    shutil.copytree(tmp_path / "out" / "cat", only)
    shutil.copy2(manifest, tmp_path / "only.manifest.jsonl")
    shutil.copy2(tmp_path / "out.manifest.jsonl.rank1", tmp_path / "only.manifest.jsonl.rank1")
    with pytest.raises(RadiotagError, match="is marked"):
        real_images(FolderImages(tmp_path / "only"), 32, quiet)


def test_batches_are_halved_until_memory_suffices(place, monkeypatch):
    model, sizes, real = suspect(place, "plain.pt", (0, 1, 2), NAMES), [], verification.class_vectors

    def small(*given):
        sizes.append(given[3].size)
        if given[3].size > 12:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*given)

    key, data = load_key(place / "k.safetensors"), FolderImages(place / "few")
    (whole,) = verification.verify([model], key, VerifyOptions(), data)
    monkeypatch.setattr(verification, "class_vectors", small)
    (found,) = verification.verify([model], key, VerifyOptions(batch_size=50), data)
    assert sizes == [50, 25, 12] and found.log10_p == pytest.approx(whole.log10_p, abs=1e-4)
    with pytest.raises(torch.OutOfMemoryError):
        monkeypatch.setattr(verification, "class_vectors", lambda *_: small(*[None] * 3, Batching(size=13)))
        verification.verify([model], key, VerifyOptions(batch_size=1), data)


@pytest.mark.parametrize("option", [(), ("--image-size", "64")])
def test_a_suspect_does_not_choose_how_much_memory_is_used(place, option, monkeypatch):
    """A file may ask for images of any size; a user who trusts it must say so."""
    model = suspect(place, "plain.pt", (0, 1, 2), NAMES)
    network = load_network(model)
    save_checkpoint(place / "vast.pt", network.module, replace(network.spec, image_size=2048))
    real, sizes = networks.find_head, []
    monkeypatch.setattr(networks, "find_head", lambda n: sizes.append(n.spec.image_size) or real(n))
    if option:
        verify(place, place / "vast.pt", more=["--data", place / "few", *option])
    else:
        error = bad("verify", place / "vast.pt", "--key", place / "k.safetensors").err
        assert "vast.pt: it asks for images of 2048 pixels" in error and "--image-size 2048" in error
    assert 2048 not in sizes and (not option or 64 in sizes)
