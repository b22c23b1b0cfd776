"""Keys: their files, their public half, and the choices that only they can repeat."""

import dataclasses
import hashlib
import json
import math
import os
import random
import stat

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import (
    SPEC,
    Toy,
    binomial_limits,
    entropy,
    linear,
    small_weights,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from radiotag import keys as keys_module
from radiotag.cosines import pattern_images
from radiotag.errors import RadiotagError
from radiotag.keys import (
    choose,
    fingerprint,
    image_random,
    key_from,
    load_key,
    new_key,
    patterned,
    save_key,
    weights_digest,
)
from radiotag.networks import build, pack, save_checkpoint, to_metadata
from radiotag.public import public_half
from radiotag.radioactive import evidence
from radiotag.suspect import Batching, ClassVectors, ComparedClasses, Reference, ask, class_vectors

unhurried = settings(deadline=None)  # the machine may be busy


# ---------------------------------------------------------------- keys


TINY = dataclasses.replace(SPEC, architecture="shufflenet_v2_x0_5")  # the smallest network with a linear head


def tiny_weights():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return dict(build(TINY).state_dict())


@pytest.fixture(scope="module")
def tiny():
    return tiny_weights()


@pytest.fixture
def key(tiny):
    return new_key(tiny, to_metadata(TINY), 1024, ["cat", "dog", "emu"])


@pytest.fixture
def bare():
    """A key whose network nobody runs: two small tensors."""
    return new_key(small_weights(), to_metadata(SPEC), 4, ["cat", "dog", "emu"])


@pytest.fixture
def key_file(key, tmp_path):
    save_key(tmp_path / "my.key", key)
    return tmp_path / "my.key"


def print_of(key):
    return fingerprint(key.seed, weights_digest(key.weights), key.metadata)


def test_key_returns_from_its_file_as_it_was(key, key_file):
    loaded = load_key(key_file)
    assert torch.equal(loaded.carriers, key.carriers) and loaded.carriers.dtype == torch.float32
    assert torch.equal(loaded.patterns, key.patterns) and loaded.path == key_file
    assert loaded.secret == key.secret and len(key.secret) == 32 and loaded.seed == key.seed
    assert loaded.weights.keys() == key.weights.keys()
    for name, tensor in key.weights.items():
        assert loaded.weights[name].dtype == tensor.dtype
        assert torch.equal(loaded.weights[name], tensor)
    assert loaded.fingerprint == key.fingerprint == print_of(loaded)
    assert loaded.class_names == key.class_names == ["cat", "dog", "emu"]
    assert loaded.statistic == key.statistic == keys_module.STATISTIC
    assert loaded.metadata == key.metadata


def test_key_may_only_count_its_classes(tiny, tmp_path):
    key = new_key(tiny, to_metadata(TINY), 1024, 5)
    save_key(tmp_path / "k", key)
    assert tuple(key.carriers.shape) == (5, 1024) and load_key(tmp_path / "k").class_names is None
    for none in (0, []):
        with pytest.raises(RadiotagError, match="at least one class"):
            new_key(small_weights(), {}, 6, none)


def test_two_keys_share_nothing():
    first, second = (new_key(small_weights(), {}, 64, 3) for _ in range(2))
    assert first.secret != second.secret and first.fingerprint != second.fingerprint
    assert not (first.carriers == second.carriers).any()


def test_key_file_is_for_its_owner_alone(key, tmp_path):
    before = os.umask(0)
    try:
        save_key(tmp_path / "k", key)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["k"]


def test_key_is_not_written_over_another(key, key_file):
    before, other = key_file.read_bytes(), new_key(key.weights, to_metadata(TINY), 1024, 3)
    with pytest.raises(RadiotagError, match=r"my\.key") as caught:
        save_key(key_file, other)
    assert caught.value.hint and key_file.read_bytes() == before
    save_key(key_file, other, exclusive=False)
    assert load_key(key_file).fingerprint == other.fingerprint
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600


def test_key_that_cannot_be_written_leaves_nothing(key, tmp_path, monkeypatch):
    with pytest.raises(RadiotagError, match="absent"):
        save_key(tmp_path / "absent" / "k", key)

    def full(*_, **__):
        raise RadiotagError("disk full")

    monkeypatch.setattr(keys_module, "write_atomically", full)
    with pytest.raises(RadiotagError, match="disk full"):
        save_key(tmp_path / "k", key)
    assert list(tmp_path.iterdir()) == []


def test_public_half_commits_and_tells_no_secret(bare):
    text = public_half(bare)
    lines = dict(line.split(": ", 1) for line in text.splitlines()[1:])
    assert lines.pop("fingerprint") == f"sha256:{bare.fingerprint}"
    assert lines.pop("commitment") == f"sha256:{hashlib.sha256(bare.seed).hexdigest()}"
    assert lines.pop("date") == f"{bare.metadata['created']} (the owner's word)"
    assert lines.pop("network").startswith("resnet10, 32 px, sha256:")
    assert json.loads(lines.pop("class names")) == bare.class_names and json.loads(lines.pop("beacon")) is None
    assert lines == {"classes": "3", "dimension": "4", "statistic": bare.statistic}
    assert text == public_half(dataclasses.replace(bare, carriers=-bare.carriers, secret=bytes(32)))


# ---------------------------------------------------------------- what follows from the seed


def stream(key, purpose, count):
    """Independent of the code under test: SHAKE-256 over parts, each after its length of eight bytes."""
    parts = [b"network"]
    digest = hashlib.sha256()
    for name in sorted(key.weights):
        tensor = key.weights[name]
        values = bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())
        for part in (name.encode(), str(tensor.dtype).encode(), str(tuple(tensor.shape)).encode(), values):
            digest.update(len(part).to_bytes(8, "big") + part)
    declared = {k: v for k, v in key.metadata.items() if k != "created"}
    text = json.dumps(declared, sort_keys=True, separators=(",", ":")).encode()
    parts = [b"radiotag", purpose.encode(), key.seed, digest.digest(), text]
    return hashlib.shake_256(b"".join(len(p).to_bytes(8, "big") + p for p in parts)).digest(count)


def test_all_that_is_secret_follows_from_the_seed(bare):
    assert bare.secret == stream(bare, "images", 32)
    for rows, purpose in ((bare.carriers, "carriers"), (bare.patterns, "patterns")):
        bits = np.frombuffer(stream(bare, purpose, 8 * rows.numel()), np.uint64) >> np.uint64(12)
        gaussian = stats.norm.ppf((bits + 0.5) / 2.0**52).reshape(rows.shape)
        expected = gaussian / np.linalg.norm(gaussian, axis=1, keepdims=True)
        assert rows.numpy() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("change", ["seed", "network", "class_names", "beacon", "weights", "statistic"])
def test_carriers_change_with_all_that_is_declared(bare, change):
    seed, weights, metadata = bare.seed, bare.weights, dict(bare.metadata)
    if change == "seed":
        seed = bytes(32)
    elif change == "weights":
        name = next(iter(weights))
        weights = {**weights, name: nudged(weights[name], 0)}
    else:
        others = {"network": {}, "class_names": ["dog", "cat", "emu"], "beacon": "x", "statistic": "s"}
        metadata[change] = others[change]
    other = key_from(seed, weights, metadata)
    assert not (other.carriers == bare.carriers).any() and not (other.patterns == bare.patterns).any()
    assert other.secret != bare.secret and other.fingerprint != bare.fingerprint
    assert (other.commitment == bare.commitment) == (change != "seed")  # a beacon keeps the commitment


def test_carriers_do_not_depend_on_the_date(bare):
    """It is the owner's word: it must give him nothing to try."""
    later = key_from(bare.seed, bare.weights, {**bare.metadata, "created": "2099-01-01"})
    assert torch.equal(later.carriers, bare.carriers) and later.fingerprint != bare.fingerprint


def test_carriers_of_a_seed_are_uniform():
    """Over 2,000 seeds each coordinate is as one of a uniform unit vector: its square is Beta(1/2, 3/2) in R^4."""
    keys = [key_from(bytes([i % 256, i // 256]) * 16, {}, {**META, "classes": 1}) for i in range(2000)]
    squares = np.array([key.carriers[0].double().square().numpy() for key in keys])
    for column in squares.T:
        assert stats.kstest(column, stats.beta(0.5, 1.5).cdf).pvalue > 1e-3


META = {
    "format": keys_module.KEY_FORMAT, "statistic": keys_module.STATISTIC, "network": {}, "dimension": 4, "classes": 3,
    "class_names": None, "beacon": None, "created": "2026-01-01",
}  # fmt: skip


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o601])
def test_key_open_to_others_is_refused(key_file, mode):
    key_file.chmod(mode)
    with pytest.raises(RadiotagError) as caught:
        load_key(key_file)
    assert str(key_file) in str(caught.value)
    assert f"chmod 600 {key_file}" in caught.value.hint
    key_file.chmod(0o400)
    load_key(key_file)


def refused(path, data):
    path.write_bytes(data)
    path.chmod(0o600)
    with pytest.raises(RadiotagError) as caught:
        load_key(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint
    return caught.value


def test_damaged_key_is_refused(key_file):
    data = key_file.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        refused(key_file, data[:length])
    refused(key_file, entropy("garbage")(4096))
    refused(key_file, b"not a key\n")


def test_missing_key_is_named(tmp_path):
    with pytest.raises(RadiotagError, match="nowhere") as caught:
        load_key(tmp_path / "nowhere.key")
    assert "keygen" in caught.value.hint
    (tmp_path / "folder").mkdir(mode=0o700)
    with pytest.raises(RadiotagError, match="folder"):
        load_key(tmp_path / "folder")


def test_other_safetensors_file_is_no_key(key, tmp_path):
    path = tmp_path / "other.safetensors"
    refused(path, safetensors.torch.save({"carriers": key.carriers}))
    refused(path, safetensors.torch.save(small_weights(), {"format": "pt"}))
    save_checkpoint(path, nn.Linear(4, 3), SPEC)
    refused(path, path.read_bytes())


def key_bytes(key, metadata, **tensors):
    content = {f"network.{name}": tensor.contiguous() for name, tensor in key.weights.items()}
    content |= {"seed": torch.tensor(list(key.seed), dtype=torch.uint8), **tensors}
    return safetensors.torch.save(content, {"radiotag": json.dumps(metadata)})


def test_other_formats_are_refused(key, tmp_path):
    path = tmp_path / "k"
    error = refused(path, key_bytes(key, {**key.metadata, "format": 1}))
    assert "0.4 or earlier" in str(error) and "radiotag<0.5" in error.hint
    refused(path, key_bytes(key, {**key.metadata, "format": keys_module.KEY_FORMAT + 1}))
    for declared in ("response+ridge+pattern", "contrasted response+ridge+pattern"):
        error = refused(path, key_bytes(key, {**key.metadata, "statistic": declared}))
        assert f"'{declared}'" in str(error)  # what a key declared is not replaced by something else
    path.write_bytes(key_bytes(key, key.metadata))
    assert load_key(path).carriers.shape == (3, 1024)  # the helper's other files differ in one thing each


def test_a_key_of_radiotag_0_4_is_told_so(tmp_path):
    metadata = {"format": 1, "statistic": keys_module.STATISTIC, "network": {}, "class_names": None}
    tensors = {"carriers": torch.eye(4), "patterns": torch.eye(4), "secret": torch.zeros(32, dtype=torch.uint8)}
    error = refused(tmp_path / "k", safetensors.torch.save(tensors, {"radiotag": json.dumps(metadata)}))
    assert "an owner could choose" in str(error)


@pytest.mark.parametrize(
    "metadata", [[1], "key", 3, None, {"format": keys_module.KEY_FORMAT, "statistic": keys_module.STATISTIC}]
)
def test_key_whose_metadata_are_not_a_keys_is_refused(key, tmp_path, metadata):
    refused(tmp_path / "k", key_bytes(key, metadata))


@pytest.mark.parametrize(
    "change",
    [
        {"class_names": ["cat", "cat", "emu"]}, {"class_names": ["cat", "dog"]}, {"class_names": "cde"},
        {"class_names": [1, 2, 3]}, {"classes": 0}, {"classes": True}, {"classes": 10**9}, {"classes": 4},
        {"dimension": 1023}, {"dimension": 1e3}, {"beacon": 5}, {"created": None}, {"more": 1}, {"network": {}},
    ],
    ids=str,
)  # fmt: skip
def test_key_whose_description_does_not_fit_is_refused(key, tmp_path, change):
    refused(tmp_path / "k", key_bytes(key, key.metadata | change))


def test_key_with_deep_json_is_refused(key, tmp_path):
    content = {"seed": torch.zeros(32, dtype=torch.uint8)}
    refused(tmp_path / "k", safetensors.torch.save(content, {"radiotag": "[" * 100_000}))


@pytest.mark.parametrize("case", [
    "float seed", "scalar seed", "short seed", "carriers", "patterns", "secret", "infinite", "nan", "alike", "zero",
    "unknown weight", "missing weight",
])  # fmt: skip
def test_key_whose_tensors_are_not_a_keys_is_refused(key, tmp_path, case):
    head, other = key.weights["fc.weight"], torch.full((5,), 0.5)
    tensors = {
        "float seed": {"seed": torch.rand(32)}, "scalar seed": {"seed": torch.tensor(5, dtype=torch.uint8)},
        "short seed": {"seed": torch.arange(31, dtype=torch.uint8)}, "carriers": {"carriers": key.carriers},
        "patterns": {"patterns": key.patterns}, "secret": {"secret": torch.zeros(32, dtype=torch.uint8)},
        "infinite": {"network.fc.weight": head * math.inf}, "nan": {"network.fc.bias": torch.full((3,), math.nan)},
        "alike": {"network.fc.weight": head[:1].expand(3, -1).contiguous()}, "zero": {"network.fc.weight": 0 * head},
        "unknown weight": {"network.other": other}, "missing weight": {},
    }[case]  # fmt: skip
    if case == "missing weight":
        key = dataclasses.replace(key, weights={k: v for k, v in key.weights.items() if k != "conv5.0.weight"})
    refused(tmp_path / "k", key_bytes(key, key.metadata, **tensors))


def nudged(tensor, index):
    changed = tensor.clone()
    flat = changed.view(-1)
    flat[index] = torch.nextafter(flat[index], flat[index] + 1) if flat.is_floating_point() else flat[index] ^ 1
    return changed


def test_fingerprint_commits_to_every_single_value(bare):
    key, prints = bare, [bare.fingerprint]
    for i in range(32):
        seed = bytes(b ^ (1 if i == j else 0) for j, b in enumerate(key.seed))
        prints.append(print_of(dataclasses.replace(key, seed=seed)))
    for name, tensor in key.weights.items():
        for i in range(tensor.numel()):
            prints.append(print_of(dataclasses.replace(key, weights={**key.weights, name: nudged(tensor, i)})))
    for name, tensor in key.weights.items():
        rest = {k: v for k, v in key.weights.items() if k != name}
        changes = [rest, {**rest, "x" + name: tensor}, {**rest, name: tensor.reshape(1, *tensor.shape)}]
        prints += [print_of(dataclasses.replace(key, weights=weights)) for weights in changes]
    network = key.metadata["network"]
    changes = [{"format": 9}, {"statistic": "x"}, {"class_names": None}, {"class_names": ["cat", "emu", "dog"]}]
    changes += [{"beacon": "x"}, {"created": "x"}, {"dimension": 5}, {"classes": 4}]
    changes += [{"network": {**network, name: "changed"}} for name in network]
    prints += [print_of(dataclasses.replace(key, metadata={**key.metadata, **change})) for change in changes]
    assert len(set(prints)) == len(prints) > 32 + 24 + 2 + 1 + 12 + 3
    assert all(len(p) == 64 and int(p, 16) >= 0 for p in prints)


def test_fingerprint_takes_bytes_not_numbers(bare):
    key = bare
    weights = {**key.weights, "fc.weight": key.weights["fc.weight"].view(torch.uint8)}
    assert print_of(dataclasses.replace(key, weights=weights)) != key.fingerprint


def test_fingerprint_does_not_depend_on_order_or_memory_layout(bare):
    key = bare

    def backwards(mapping):
        return {k: backwards(v) if isinstance(v, dict) else v for k, v in reversed(mapping.items())}

    weights = backwards(key.weights)
    weights["conv.weight"] = weights["conv.weight"].to(memory_format=torch.channels_last)
    other = dataclasses.replace(key, weights=weights, metadata=backwards(key.metadata))
    assert list(other.metadata) != list(key.metadata)
    assert print_of(other) == key.fingerprint


def test_no_two_contents_have_one_fingerprint():
    """With parts joined without their lengths, text could pass for bytes, and one tensor for two."""
    one, two = {"a": torch.tensor([1, 2], dtype=torch.uint8)}, {"a": torch.tensor([1], dtype=torch.uint8)}
    two["b"] = torch.tensor([2], dtype=torch.uint8)
    seeds = [(bytes(32), one), (bytes(32), two), (bytes(31), one), (bytes(32), {"a\0": one["a"]})]
    assert len({fingerprint(seed, weights_digest(weights), META) for seed, weights in seeds}) == len(seeds)


def test_int8_weights_survive_and_run(network, tmp_path):
    key = new_key(pack(network.module.state_dict()), to_metadata(SPEC), 512, 3)
    save_key(tmp_path / "k", key)
    assert (tmp_path / "k").stat().st_size < 1.1 * sum(p.numel() for p in network.parameters()) + 100_000
    before, after = key.network(), load_key(tmp_path / "k").network()
    assert after.dimension == 512 and after.spec == SPEC
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(before.features(x), after.features(x))
        exact = network.features(x)
        assert (after.features(x) - exact).norm() < 0.05 * exact.norm()


# ---------------------------------------------------------------- choosing, and the images' generators


PATHS = [f"class/{i:04}.png" for i in range(200)]
names = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8), unique=True, max_size=40)


@pytest.fixture(scope="module")
def keys():
    return [new_key({}, {}, 4, 2) for _ in range(2)]


@unhurried
@given(paths=names, a=st.integers(0, 50), b=st.integers(0, 50), shuffle=st.randoms(use_true_random=False))
def test_choice_is_nested_and_of_the_asked_size(keys, paths, a, b, shuffle):
    small, large = (choose(keys[0], paths, count) for count in sorted((a, b)))
    for count, chosen in zip(sorted((a, b)), (small, large), strict=True):
        assert len(chosen) == min(count, len(paths)) and chosen <= set(paths)
    assert small <= large
    mixed = list(paths)
    shuffle.shuffle(mixed)
    assert choose(keys[0], mixed, a) == choose(keys[0], paths, a)
    assert choose(keys[0], paths, len(paths)) == set(paths)


def test_choice_is_the_keys_alone(keys):
    first, second = (choose(key, PATHS, 100) for key in keys)
    low, high = stats.hypergeom.ppf([1e-9, 1 - 1e-9], 200, 100, 100)
    assert low <= len(first & second) <= high  # as two independent halves overlap
    assert choose(dataclasses.replace(keys[0], carriers=keys[1].carriers), PATHS, 100) == first


def test_choice_depends_on_nothing_but_each_path():
    """Over keys, every path is chosen equally often, wherever it stands in the listing."""
    counts = dict.fromkeys(PATHS[:10], 0)
    for i in range(2000):
        key = dataclasses.replace(new_key({}, {}, 2, 1), secret=hashlib.sha256(bytes([i % 256, i // 256])).digest())
        for path in choose(key, PATHS[:10], 3):
            counts[path] += 1
    assert sum(counts.values()) == 6000
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_undecodable_names_are_chosen_and_drawn(keys):
    paths = [os.fsdecode(b"caf\xe9.png"), os.fsdecode(b"\xff\xfe"), "café.png"]
    assert any("\udce9" in path for path in paths)
    assert choose(keys[0], paths, 3) == set(paths)
    draws = {image_random(keys[0], path, 0).random() for path in paths}
    assert len(draws) == 3


def test_image_generator_depends_on_key_path_and_seed(keys):
    cases = [(k, path, seed) for k in keys for path in ("a", "b", "2/a", "/a") for seed in (0, 1, 12)]
    draws = [tuple(image_random(*case).random() for _ in range(3)) for case in cases]
    assert len({d[0] for d in draws}) == len(cases)
    random.seed(5)
    other = dataclasses.replace(keys[0], carriers=keys[1].carriers, weights=small_weights(), metadata={"x": 1})
    again = [image_random(other, "a", 12), image_random(keys[0], "a", 12)]
    expected = draws[cases.index((keys[0], "a", 12))]
    for _ in range(3):  # in turns: they share no state
        random.random()
        assert len({g.random() for g in again}) == 1
    assert tuple(g.random() for g in [image_random(keys[0], "a", 12)]) == expected[:1]


def test_the_pattern_goes_to_a_quarter_that_is_chosen_first(key):
    paths = [f"cat/{i}.png" for i in range(4000)]
    carrying = {path for path in paths if patterned(key, path)}
    low, high = binomial_limits(4000, 0.25)
    assert low <= len(carrying) <= high
    assert choose(key, paths, 800) < carrying < choose(key, paths, 1200)
    other = new_key(small_weights(), {}, 4, 3)
    assert abs(sum(patterned(other, path) for path in carrying) / len(carrying) - 0.25) < 0.08


def test_a_key_of_this_format_gives_the_same_carriers_for_ever():
    """Frozen: a key's file outlives the version that made it, and all of it follows from these bytes."""
    metadata = {
        "format": 2, "statistic": "pattern or pattern+response+ridge", "network": {"architecture": "toy"},
        "dimension": 5, "classes": 2, "class_names": ["cat", "dog"], "beacon": "block 900000", "created": "2026-11-30",
    }  # fmt: skip
    weights = {
        "fc.weight": torch.arange(10, dtype=torch.float32).view(2, 5), "fc.bias": torch.zeros(2), "n": torch.tensor(3)
    }  # fmt: skip
    key = key_from(bytes(range(32)), weights, metadata)
    assert key.fingerprint == "2ff6cd6a86fe1c3866522f970a4b0ce55b15b44049966ef0296e0865e121ac52"
    assert key.commitment == "630dcd2966c4336691125448bbb25b4ff412a49c732db2c8abc1b8581bd710dd"
    assert key.secret.hex() == "0d208c98a752a3259f3b9d63905849dd8033c65f32f0889df2ad37c0be172e18"
    carriers = [[-0.4535, 0.6507, 0.4278, -0.0341, 0.4321], [-0.0887, 0.2539, 0.5818, 0.3989, -0.6558]]
    assert key.carriers.numpy() == pytest.approx(np.array(carriers), abs=6e-5)
    assert key.patterns[:, :3].numpy() == pytest.approx(
        np.array([[-0.0640, -0.1947, 0.0356], [0.0204, -0.0405, -0.1175]]), abs=6e-5
    )
    names = [f"cat/{i}.png" for i in range(8)]
    assert sorted(choose(key, names, 2)) == [name for name in names if patterned(key, name)] == names[2:4]


def test_every_class_is_as_likely_to_come_first():
    first = [new_key({}, {}, 2, 5).class_order for _ in range(1000)]
    assert all(sorted(order) == list(range(5)) for order in first)
    assert stats.chisquare(np.bincount([order[0] for order in first], minlength=5)).pvalue > 1e-4


@pytest.mark.parametrize(
    ("statistic", "order", "log10_p"),
    [
        ("contrasted pattern or pattern+response+ridge", (0, 5, 1, 3, 6, 2, 4), -4.30019402905722),
        ("nested contrasted pattern or pattern+response+ridge", (5, 4, 2, 3, 6, 0, 1), -16.012192159330972),
        (
            "nested contrasted pattern or pattern+response+ridge, by images of every class",
            (5, 2, 3, 4, 0, 1, 6),
            -17.12766068146324,
        ),
        (
            "nested contrasted pattern or pattern+response+ridge, by images of every class, "
            "a manifest's classes as one",
            (0, 5, 4, 1, 2, 6, 3),
            -18.249141295732,
        ),
        (
            "nested contrasted pattern or pattern+response+ridge, by images of every class, "
            "a manifest's classes as one, against all that it records",
            (1, 2, 0, 3, 6, 4, 5),
            -15.928352278665594,
        ),
    ],
)
def test_every_statistic_that_a_released_key_declares_stays_computable(statistic, order, log10_p):
    """Frozen: class vectors that lean towards the pattern of the class that comes first."""
    metadata = {
        "format": 2, "statistic": statistic, "network": {"architecture": "toy"}, "dimension": 16, "classes": 7,
        "class_names": None, "beacon": None, "created": "2026-11-30",
    }  # fmt: skip
    key = key_from(bytes(range(32)), {"w": torch.zeros(1)}, metadata)
    features, pattern = (torch.sin(torch.arange(7 * n, dtype=torch.float64).view(7, n) * 1.7) for n in (16, 51))
    pattern[order[0]] += 9 * key.patterns[order[0]].double()
    vectors = ClassVectors(features=features, pattern=pattern)
    found = evidence(vectors, range(7), key.carriers, key.patterns, key.tested_order(by_manifest=False))
    assert key.class_order == order and set(keys_module.STATISTICS) >= {statistic}
    assert found.log_p / math.log(10) == pytest.approx(log10_p, rel=1e-5)


def test_with_a_manifest_no_choice_of_classes_is_left_to_correct_for():
    """Since 0.9: keys of earlier versions declared the sets of first classes, with a manifest and without."""
    keys = {
        statistic: dataclasses.replace(key, metadata=key.metadata | {"statistic": statistic})
        for key in [new_key({}, {}, 4, 7)]
        for statistic in keys_module.STATISTICS
    }
    for statistic, key in keys.items():
        assert (key.tested_order(by_manifest=False) is None) == (statistic == keys_module.CONTRASTED)
        late = {keys_module.AS_ONE, keys_module.AGAINST_ALL, keys_module.STATISTIC}
        together = statistic in {keys_module.CONTRASTED, *late}
        assert (key.tested_order(by_manifest=True) is None) == together


@pytest.mark.parametrize(
    ("statistic", "size", "log10_p"),
    [
        (keys_module.CONTRASTED, 8, -10.6773655930039),
        (keys_module.NESTED, 8, -5.062176915011999),
        (keys_module.EVERY_CLASS, 8, -8.581338582515672),
        (keys_module.AS_ONE, 8, -6.431603071738701),
        (keys_module.AGAINST_ALL, 8, -5.981117695478295),
        (keys_module.STATISTIC, 8, -9.886894887850048),
        (keys_module.AGAINST_ALL, 66, -39.74198299144221),
        (keys_module.STATISTIC, 66, -35.81483831095968),
    ],
)
def test_the_same_suspect_gives_the_same_p_for_ever(statistic, size, log10_p):
    """Frozen: key, suspect and images from fixed numbers, through all that is computed of a suspect."""
    metadata = {
        "format": 2, "statistic": statistic, "network": {"architecture": "toy"}, "dimension": 6, "classes": 3,
        "class_names": None, "beacon": None, "created": "2026-11-30",
    }  # fmt: skip
    key = key_from(bytes(range(32)), {"w": torch.zeros(1)}, metadata)
    numbers, images = 3 * size**2, 40 if size == 8 else 900
    waves = torch.sin(torch.arange(6 * numbers, dtype=torch.float64).view(6, numbers)).float()
    marker = Toy(linear(waves), torch.eye(3, 6))
    mark = pattern_images(key.patterns, size, size).flatten(1).float()  # (3, 192) or more
    suspect = Toy(linear(torch.cat([waves[3:], mark])), torch.cat([torch.eye(3), 3 * torch.eye(3)], 1))
    pixels = torch.cos(torch.arange(images * numbers, dtype=torch.float64) ** 1.5).view(images, 3, size, size)
    pixels, labels = (pixels.float() + 1) / 2, tuple(i % 3 for i in range(images)) if size == 8 else None
    classes = ComparedClasses(outputs=(0, 1, 2), labels=labels, others=key.by_every_class, few=key.few_photographs)
    asked, reference = ask(suspect, Reference(marker, pixels), Batching())
    order = key.tested_order(by_manifest=True)
    found = evidence(class_vectors(reference, asked, classes), range(3), key.carriers, key.patterns, order)
    assert found.log_p / math.log(10) == pytest.approx(log10_p, rel=1e-4)
