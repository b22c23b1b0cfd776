"""What a third party checks: attacks on the evidence of honest keys, each with an innocent suspect.

Every attack here made a detection of radiotag 0.4 out of chance. Now either the attempt is refused, or its p-values
over many keys are those of chance.
"""

import hashlib
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import bad, call, entropy, good
from PIL import Image
from scipy import stats

from radiotag import api, blackbox, keys, public, synthetic
from radiotag.answers import NotAnswered, read_answers
from radiotag.errors import RadiotagError
from radiotag.images import png
from radiotag.keys import KEY_FORMAT, key_from, load_key, new_key, null_carriers, save_key
from radiotag.networks import marking_weights
from radiotag.plan import MarkOptions
from radiotag.probes import ArrayImages, FolderImages, class_means, real_images
from radiotag.public import Checked, check, images_digest, public_half, read_public
from radiotag.radioactive import evidence
from radiotag.suspect import Batching, ClassVectors, Reference
from radiotag.verification import images_log10_p

NAMES = ("ant", "bee", "cat")
KEYS = 200


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images, a key of their classes, their marked copy with its public half, and held-out images committed to."""
    root = tmp_path_factory.mktemp("place")
    images, labels = synthetic.demo_images(60, 32, seed=5)
    synthetic.write_folder(root / "imgs", images[labels < 3], labels[labels < 3], NAMES)
    images, labels = synthetic.demo_images(60, 32, seed=6)
    synthetic.write_folder(root / "held-out", images[labels < 3], labels[labels < 3], NAMES)
    good("keygen", "-o", root / "k.safetensors", "--data", root / "imgs")
    good(
        "mark", root / "imgs", "--key", root / "k.safetensors", "--steps", 1, "--held-out", root / "held-out",
        "--fraction", 0.5,
    )  # fmt: skip
    return root


@pytest.fixture(scope="module")
def model(place):
    """A suspect of the unmarked images."""
    path = place / "m.pt"
    good("train-demo", place / "imgs", "-o", path, "--arch", "resnet10", "--epochs", 1, "--batch-size", 6)
    return path


@pytest.fixture(scope="module")
def released(place):
    """Marked images (N, 32, 32, 3) of the key, and their labels."""
    images, labels = synthetic.demo_images(900, 32, seed=8)
    images, labels = images[labels < 3].numpy(), [NAMES[label] for label in labels[labels < 3]]
    marked = api.mark(images, place / "k.safetensors", labels=labels, options=MarkOptions(steps=1))
    return np.moveaxis(marked.images, 1, -1), labels


@pytest.fixture(scope="module")
def innocent():
    """An innocent suspect's vectors: anything that was computed without the carriers."""
    rng = np.random.default_rng(3)
    common = rng.standard_normal(512)
    features = torch.from_numpy(common + rng.standard_normal((10, 512)))
    return ClassVectors(features=features, pattern=torch.from_numpy(rng.standard_normal((10, 51))))


def honest_keys(count, classes=10):
    metadata = {
        "format": KEY_FORMAT, "statistic": keys.STATISTIC, "network": {}, "dimension": 512, "classes": classes,
        "class_names": None, "beacon": None, "created": "2026-01-01",
    }  # fmt: skip
    return [key_from(entropy(f"honest {i}")(32), {}, metadata) for i in range(count)]


def few_small(log_p):
    """No more p-values at or below each level than chance allows once in a million."""
    for level in (0.1, 0.01, 1e-3):
        assert (np.asarray(log_p) <= np.log(level)).sum() <= stats.binom.isf(1e-6, len(log_p), level)


# ---------------------------------------------------------------- 1. a pairing chosen afterwards


def test_what_follows_from_a_commitment_is_chance_and_what_is_chosen_is_not(innocent):
    fixed, chosen = [], []
    for key in honest_keys(KEYS, classes=40):
        fixed.append(evidence(innocent, range(10), key.carriers, key.patterns).log_p)
        cosines = torch.nn.functional.normalize(innocent.features, dim=1) @ key.carriers.double().T  # (10, 40)
        best = cosines.argmax(1).tolist()  # a folder's names decided so in radiotag 0.4
        chosen.append(evidence(innocent, best, key.carriers, key.patterns).log_p)
    few_small(fixed)
    assert np.median(chosen) < np.log(1e-3)  # the attack is worth closing


def test_a_third_party_takes_no_key_that_pairs_by_order(tmp_path, place):
    good("keygen", "-o", tmp_path / "k.safetensors", "--classes", 40)
    key, half = load_key(tmp_path / "k.safetensors"), read_public(tmp_path / "k.pub")
    with pytest.raises(RadiotagError, match="names no classes"):
        check(half, key, None, None, ())
    good("mark", place / "imgs", "--key", tmp_path / "k.safetensors", "-o", tmp_path / "out", "--steps", 1)
    assert check(read_public(tmp_path / "out.pub"), key, None, None, ()).classes  # the marked set's half commits


def test_a_publication_with_more_carriers_than_the_key_is_refused(place):
    key, half = load_key(place / "k.safetensors"), read_public(place / "imgs-marked.pub")
    with pytest.raises(RadiotagError, match="names more carriers than the key has"):
        check(replace(half, carriers={"ant": 3}), key, None, None, ())


def test_held_out_images_that_lack_a_class_are_paired_as_published(tmp_path, place, model):
    """The key names no classes, and the images shown begin with the second one."""
    weights = torch.load(model, weights_only=True)
    weights["radiotag"]["class_names"] = None
    torch.save(weights, nameless := tmp_path / "nameless.pt")
    some = tmp_path / "held-out"
    shutil.copytree(place / "held-out", some, ignore=lambda _, names: [name for name in names if name == NAMES[0]])
    good("keygen", "-o", tmp_path / "k.safetensors", "--classes", len(NAMES))
    options = ("--key", tmp_path / "k.safetensors")
    good("mark", place / "imgs", *options, "-o", tmp_path / "out", "--steps", 1, "--held-out", some)
    found = call("verify", nameless, *options, "--data", some, "--public", tmp_path / "out.pub", "--json").json
    assert found["checked"]["classes"] and found["checked"]["data"]
    assert [(one["name"], one["carrier"]) for one in found["suspects"][0]["classes"]] == [("bee", 1), ("cat", 2)]


def test_a_table_that_contradicts_the_keys_names_is_refused(place):
    key, half = load_key(place / "k.safetensors"), read_public(place / "imgs-marked.pub")
    with pytest.raises(RadiotagError, match="pairs classes and carriers otherwise than the key"):
        check(replace(half, carriers={"ant": 1, "bee": 0, "cat": 2}), key, None, None, ())


def test_a_flat_folder_s_half_goes_with_a_key_of_one_named_class(tmp_path, place):
    shutil.copytree(place / "imgs" / "ant", tmp_path / "flat")
    shutil.copytree(tmp_path / "flat", tmp_path / "sorted" / "ant")
    good("keygen", "-o", tmp_path / "k.safetensors", "--data", tmp_path / "sorted")
    good("mark", tmp_path / "flat", "--key", tmp_path / "k.safetensors", "-o", tmp_path / "out", "--steps", 1)
    half, key = read_public(tmp_path / "out.pub"), load_key(tmp_path / "k.safetensors")
    assert half.carriers == {"": 0} and key.class_names == ["ant"]
    assert check(half, key, tmp_path / "out.manifest.jsonl", None, ()).classes


def test_what_lies_beside_a_published_manifest_is_not_published(place, tmp_path):
    """A journal of another process would add marked classes, and originals to ask with."""
    key, half = load_key(place / "k.safetensors"), read_public(place / "imgs-marked.pub")
    manifest = shutil.copy(place / "imgs-marked.manifest.jsonl", tmp_path / "m.jsonl")
    check(half, key, manifest, None, ())
    header, row, *_ = manifest.read_text().splitlines()
    manifest.with_name("m.jsonl.rank1").write_text(f"{header}\n{row}\n")
    with pytest.raises(RadiotagError, match=r"m\.jsonl\.rank1 is not published"):
        check(half, key, manifest, None, ())


def test_to_leave_out_what_was_published_is_a_choice_that_is_told(place):
    key, half = load_key(place / "k.safetensors"), read_public(place / "imgs-marked.pub")
    assert check(half, key, None, None, ("mean",)).chosen == ("no manifest", "no held-out images", "mean")
    manifest, held_out = place / "imgs-marked.manifest.jsonl", FolderImages(place / "held-out")
    assert check(half, key, manifest, None, ()).chosen == ("no held-out images",)
    assert check(half, key, manifest, held_out, ()).chosen == ()


def test_questions_with_other_carriers_than_those_published_are_refused(tmp_path, place, model):
    """They were exported without the publication, and begin with the second class."""
    some = tmp_path / "held-out"
    shutil.copytree(place / "held-out", some, ignore=lambda _, names: [name for name in names if name == NAMES[0]])
    key = tmp_path / "k.safetensors"
    good("keygen", "-o", key, "--classes", len(NAMES))
    good("mark", place / "imgs", "--key", key, "-o", tmp_path / "out", "--steps", 1)
    good("verify", "--key", key, "--black-box", "--data", some, "--decoys", 1, "--export", tmp_path / "questions")
    names = sorted(path.name for path in (tmp_path / "questions").iterdir() if path.suffix == ".png")
    (tmp_path / "a.csv").write_text("file,label\n" + "".join(f"{name},{i % 3}\n" for i, name in enumerate(names)))
    asked = ("verify", "--key", key, "--predictions", tmp_path / "a.csv")
    assert call(*asked).code == 3
    assert "pair classes and carriers otherwise" in bad(*asked, "--public", tmp_path / "out.pub").err


@pytest.mark.parametrize("change", ["class", "row", "path twice", "left out", "other key"])
def test_a_manifest_that_is_not_the_published_one_is_refused(place, tmp_path, change):
    lines = (place / "imgs-marked.manifest.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    if change == "class":
        for row in rows[1:]:
            row["class"] = {"ant": "bee", "bee": "ant"}.get(row["class"], row["class"])
    elif change == "row":
        rows[1]["row"] = 2
    elif change == "path twice":
        rows.append(rows[1])
    elif change == "left out":
        rows = [rows[0], *(row for row in rows[1:] if row["class"] != "cat")]
    else:
        rows[0]["fingerprint"] = "0" * 64
    forged = tmp_path / "m.jsonl"
    forged.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
    key = load_key(place / "k.safetensors")
    with pytest.raises(RadiotagError):
        check(read_public(place / "imgs-marked.pub"), key, forged, None, ())


def test_the_published_manifest_is_taken(place):
    key, half = load_key(place / "k.safetensors"), read_public(place / "imgs-marked.pub")
    checked = check(half, key, place / "imgs-marked.manifest.jsonl", FolderImages(place / "held-out"), ())
    assert checked == Checked(public=str(half.path), key=True, classes=True, manifest=True, data=True)
    with pytest.raises(RadiotagError, match="says nothing about a manifest"):
        check(read_public(place / "k.pub"), key, place / "imgs-marked.manifest.jsonl", None, ())


# ---------------------------------------------------------------- 2. images curated


def test_images_that_were_not_committed_are_refused_and_said_to_be_a_choice(place, tmp_path):
    key, half = load_key(place / "k.safetensors"), read_public(place / "imgs-marked.pub")
    for name in NAMES:
        (tmp_path / "some" / name).mkdir(parents=True)
        for path in sorted((place / "held-out" / name).iterdir())[:3]:
            (tmp_path / "some" / name / path.name).write_bytes(path.read_bytes())
    with pytest.raises(RadiotagError, match="differ from the held-out images"):
        check(half, key, None, FolderImages(tmp_path / "some"), ())
    with pytest.raises(RadiotagError, match="are not among what was published"):
        check(read_public(place / "k.pub"), key, None, FolderImages(place / "held-out"), ())
    assert check(None, key, None, FolderImages(tmp_path / "some"), ("mean",)).chosen == ("data", "mean")


def test_the_digest_of_images_is_of_their_classes_and_contents(tmp_path):
    pixels = torch.arange(4 * 3 * 4 * 4, dtype=torch.int32).view(4, 3, 4, 4).to(torch.uint8)
    digest = images_digest(ArrayImages(pixels, ["a", "a", "b", "b"]))
    assert digest == images_digest(ArrayImages(pixels[[1, 0, 3, 2]], ["a", "a", "b", "b"]))
    others = [(pixels, ["a", "b", "a", "b"]), (pixels, ["aa", "", "b", "b"]), (pixels[:3], ["a", "a", "b"])]
    assert len({digest, *(images_digest(ArrayImages(*other)) for other in others)}) == 4
    for name, place in (("x", "one"), ("y", "two")):
        (tmp_path / place / "a").mkdir(parents=True)
        (tmp_path / place / "a" / f"{name}.png").write_bytes(png(pixels[0].permute(1, 2, 0).numpy()))
    assert images_digest(FolderImages(tmp_path / "one")) == images_digest(FolderImages(tmp_path / "two"))


@pytest.mark.parametrize("kept", ["copied", pytest.param("JPEG", marks=pytest.mark.slow)])
def test_marked_images_shown_as_unmarked_are_noticed(place, model, released, tmp_path, few_synthetic, kept):
    """Copied and saved again, they are in no manifest's list; a suspect's guilt would hide behind them."""
    for i, (pixels, label) in enumerate(zip(*released, strict=True)):
        target = tmp_path / "disguised" / label / f"{i}.{'jpg' if kept == 'JPEG' else 'png'}"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(target, quality=95)
    more = ["--black-box", "--decoys", 3] if kept == "JPEG" else []
    given = ["verify", model, "--key", place / "k.safetensors", "--json", *more, "--data"]
    disguised, honest = (call(*given, folder) for folder in (tmp_path / "disguised", place / "held-out"))
    assert disguised.json["suspects"][0]["images_log10_p"] < -4 < honest.json["suspects"][0]["images_log10_p"]
    warned = ["look marked" in " ".join(each.json["suspects"][0]["warnings"]) for each in (disguised, honest)]
    assert warned == [True, False]


def test_the_images_own_test_is_exact(place):
    """Under keys that never touched them, unmarked images have uniform p-values."""
    key = load_key(place / "k.safetensors")
    pixels, labels = real_images(FolderImages(place / "held-out"), 32, lambda *_: None)
    reference = Reference(key.network(), pixels, labels)
    vectors = class_means(reference, NAMES, Batching())
    nulls = [null_carriers(key, hashlib.shake_256(number.to_bytes(8)).digest) for number in range(1000)]
    found = [evidence(vectors, range(3), *null).log_p for null in nulls]
    assert stats.kstest(np.exp(found), "uniform").pvalue > 1e-4
    other = replace(key, carriers=nulls[0][0], patterns=nulls[0][1])
    rows = {"ant": 0, "bee": 1, "cat": 2}
    assert images_log10_p(reference, rows, other, Batching()) * np.log(10) == pytest.approx(found[0])
    assert images_log10_p(reference, {}, key, Batching()) is None
    one = Reference(key.network(), pixels, [""] * len(labels))
    assert np.isfinite(images_log10_p(one, {"": 0}, key, Batching()))


# ---------------------------------------------------------------- 3. carriers that were not drawn at random


def test_carriers_of_an_owners_own_model_cannot_be_put_into_a_key(place, tmp_path, innocent):
    """Set to a clean model's class vectors, they accused other people's models of the same classes."""
    from safetensors import safe_open
    from safetensors.torch import save

    with safe_open(place / "k.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    own = torch.nn.functional.normalize(innocent.features[:3], dim=1).float()
    for more in ({"carriers": own}, {"carriers": own, "patterns": innocent.pattern[:3].float()}, {"x": own}):
        (tmp_path / "k.safetensors").write_bytes(save({**tensors, **more}, metadata))
        (tmp_path / "k.safetensors").chmod(0o600)
        assert "which no key has" in bad("keygen", "--show", tmp_path / "k.safetensors").err


def test_seeds_give_an_innocent_model_chance_and_no_more(innocent):
    few_small([evidence(innocent, range(10), key.carriers, key.patterns).log_p for key in honest_keys(5 * KEYS)])


def test_a_beacon_changes_all_carriers_and_keeps_the_commitment(place, tmp_path):
    good("keygen", "-o", tmp_path / "b.safetensors", "--committed", place / "k.safetensors", "--beacon", "block 900000")
    before, after = load_key(place / "k.safetensors"), load_key(tmp_path / "b.safetensors")
    assert (before.commitment, before.class_names) == (after.commitment, after.class_names)
    assert not (before.carriers == after.carriers).any() and before.fingerprint != after.fingerprint
    assert 'beacon: "block 900000"' in (tmp_path / "b.pub").read_text()
    again = ["keygen", "-o", tmp_path / "c.safetensors", "--committed", tmp_path / "b.safetensors", "--beacon", "x"]
    assert "has a beacon already" in bad(*again).err
    assert "--beacon" in bad("keygen", "-o", tmp_path / "c.safetensors", "--committed", place / "k.safetensors").err


# ---------------------------------------------------------------- 4. questions relabelled


def test_questions_cannot_be_relabelled_after_their_answers(tmp_path):
    """The names in the index were random: a permutation of them made −13.8 of noise."""
    key = new_key(*marking_weights("builtin"), NAMES)
    images = list(torch.randint(0, 256, (6, 3, 16, 16), generator=torch.Generator().manual_seed(1)).to(torch.uint8))
    rows, labels = [0, 0, 1, 1, 2, 2], ["ant", "ant", "bee", "bee", "cat", "cat"]
    queries = blackbox.make(key, images, rows, labels, decoys=3)
    assert len({name for names in queries.names for name in names}) == 8 * 6
    answers = {name: 1 for names in queries.names for name in names}
    (tmp_path / "a.json").write_text(json.dumps(answers))
    read_answers(tmp_path / "a.json", queries)
    forgeries = [
        blackbox.make(key, images, rows[::-1], labels[::-1], decoys=3),
        blackbox.make(key, images[::-1], rows, labels, decoys=3),
        blackbox.make(key, images, rows, labels, decoys=4),
        blackbox.make(key, images[:4], rows[:4], labels[:4], decoys=3),  # a class left out
        blackbox.make(new_key(*marking_weights("builtin"), NAMES), images, rows, labels, decoys=3),
    ]
    assert len({queries.digest, *(forged.digest for forged in forgeries)}) == 6
    for forged in forgeries:
        with pytest.raises(NotAnswered):
            read_answers(tmp_path / "a.json", forged)
    blackbox.save_queries(tmp_path / "q.safetensors", queries, key)
    assert blackbox.load_queries(tmp_path / "q.safetensors", key).names == queries.names
    assert queries.names[0][0].encode() not in (tmp_path / "q.safetensors").read_bytes()  # nothing there to permute


# ---------------------------------------------------------------- the public half


def test_a_public_half_reads_back_and_what_is_none_is_refused(place, tmp_path):
    half, key = read_public(place / "imgs-marked.pub"), load_key(place / "k.safetensors")
    assert half.fingerprint == key.fingerprint and half.carriers == {"ant": 0, "bee": 1, "cat": 2}
    assert half.held_out == images_digest(FolderImages(place / "held-out"))
    text = (place / "k.pub").read_text()
    assert text == public_half(key) and read_public(place / "k.pub").manifest is None
    table = (place / "imgs-marked.pub").read_text().replace('carriers: {"ant": 0', 'carriers: {"ant": -1')
    for wrong in ("", "hello\n", text.replace("format 2", "format 9"), text.replace("fingerprint", "print"), table,
                  table.replace('"ant": -1', '"ant": 1'), text.replace(key.fingerprint, "xyz"),
                  text + "no colon\n"):  # fmt: skip
        (tmp_path / "x.pub").write_text(wrong)
        with pytest.raises(RadiotagError, match=r"x\.pub"):
            read_public(tmp_path / "x.pub")
    with pytest.raises(RadiotagError, match="cannot read"):
        read_public(tmp_path / "absent.pub")


def test_a_lost_public_half_is_written_again_and_another_is_left_alone(place, tmp_path):
    key = new_key(*marking_weights("builtin"), NAMES)
    save_key(tmp_path / "k.safetensors", key)
    shown = good("keygen", "--show", tmp_path / "k.safetensors")
    assert (tmp_path / "k.pub").read_text() == public_half(key) and str(tmp_path / "k.pub") in shown.out
    assert public_half(key).splitlines() == shown.out.splitlines()[:-1]
    (tmp_path / "k.pub").write_text("mine")
    good("keygen", "--show", tmp_path / "k.safetensors")
    assert (tmp_path / "k.pub").read_text() == "mine"


def test_verify_says_what_was_checked(place, model, few_synthetic, tmp_path):
    given = ["verify", model, "--key", place / "k.safetensors", "--json"]
    bare = call(*given).json
    assert bare["checked"]["public"] is None and bare["data"] == {"kind": "synthetic", "digest": None, "images": None}
    published = call(*given, "--public", place / "k.pub", "--control", model)
    assert published.code == 3, published.err
    assert published.json["checked"]["key"] and published.json["checked"]["classes"]
    (control,) = published.json["controls"]
    assert control["log10_p"] == published.json["suspects"][0]["log10_p"]
    data = ["--data", place / "held-out", "--image-size", 32]
    chosen = call(*given, *data).json
    assert chosen["checked"]["chosen"] == ["data", "image_size"] and chosen["data"]["images"] == 18
    assert chosen["options"]["image_size"] == 32
    assert "are not among" in bad(*given, *data, "--public", place / "k.pub").err
    committed = call(*given, *data, "--public", place / "imgs-marked.pub").json
    assert committed["checked"]["data"] and committed["data"]["digest"] == chosen["data"]["digest"]
    originals = shutil.copytree(place / "imgs", tmp_path / "originals")
    mine = ["--data", originals, "--marked", place / "imgs-marked.manifest.jsonl"]
    mine += ["--public", place / "imgs-marked.pub"]
    by_manifest = call(*given, *mine).json
    assert by_manifest["checked"]["data"] is True and by_manifest["data"]["digest"] != committed["data"]["digest"]
    next(originals.rglob("*.png")).unlink()  # all of them, or it is a choice
    assert "differ from the held-out images" in bad(*given, *mine).err
    other = tmp_path / "other"
    good("keygen", "-o", other.with_suffix(".safetensors"), "--data", place / "imgs")
    assert "is of the key" in bad(*given, "--public", other.with_suffix(".pub")).err


def test_conditions_in_words_name_each_choice():
    checked = Checked(chosen=("data", "manifest", "mean"))
    conditions = public.Conditions(checked=checked, data="./x", digest="ab", images=7, options={})
    lines = dict(public.told(conditions))
    assert "choice of whoever ran the test" in lines["data"] and "mean" in lines["chosen"]
    assert "not compared with a publication" in lines["checked"] and "manifest" in lines
    published = replace(conditions, checked=Checked(public="k.pub", key=True, classes=True, data=True))
    assert "as committed there" in dict(public.told(published))["data"]
    exported = public.of_questions(replace(published, data="synthetic images", digest=None, images=None))
    assert exported.checked.data is None and exported.checked.key
    assert "the choice of whoever exported them" in dict(public.told(exported))["data"]


def test_a_digest_never_needs_what_it_commits_to():
    """SimpleNamespace stands for images of any kind: only classes and contents are asked for."""
    images = SimpleNamespace(labels=["a"], digests=lambda: ["00" * 32])
    assert len(images_digest(images)) == 64
