"""The commands as a user runs them: real files, real processes, kill -9.

Most cases call `cli.main` in this process. What needs a process of its own is forked from one that has imported torch
already (`Forks`), so that a case costs milliseconds; a few start `python -m radiotag` afresh.
"""

import contextlib
import hashlib
import json
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import typer
from helpers import (
    bad,
    brute_ssim,
    call,
    digest,
    environment,
    good,
    leftovers,
    measured_psnr,
    pixels,
    tree,
    wait_for_files,
)
from PIL import Image
from PIL.JpegImagePlugin import get_sampling
from safetensors import safe_open
from torch import nn
from torchvision.models import WeightsEnum

from radiotag import __version__, batches, cli, demo, keys, networks, probes, synthetic, terminal, training
from radiotag import suspect as suspect_module
from radiotag.errors import RadiotagError
from radiotag.keys import load_key
from radiotag.manifest import Summary, locked, marked_hashes, marked_rows, read_manifest
from radiotag.networks import Network, load_network, save_checkpoint

COMMANDS = ("keygen", "mark", "train-demo", "verify")
NAMES = ("ant", "bee", "cat")
HEAVY = ("torch", "torchvision", "scipy", "numpy", "PIL", "safetensors")
ESCAPE = "\x1b"
COMMON = {"schema", "command", "version", "seconds"}
MARK_KEYS = COMMON | {
    *("fingerprint", "output", "manifest", "images", "marked", "copied", "skipped", "failed", "public", "classes"),
    *("psnr_median", "psnr_p5", "psnr_min", "ssim_median", "ssim_min", "linf_max", "feature_gain_mean"),
    *("formats_unmarked", "further_pictures_dropped", "unmarkable", "stale_indexes", "unchanged", "expected_log10_p"),
}
SUSPECT_KEYS = {
    *("path", "architecture", "detected", "log10_p", "log10_p_corrected", "paper_log10_p", "mean_cosine"),
    *("pattern_cosine", "sha256", "images_log10_p", "sets", "first_classes"),
    *("alignment_r2", "classes_used", "classes", "method", "warnings"),
}


# ---------------------------------------------------------------- running


def spawn(*arguments, cwd, **env):
    """Run `python -m radiotag` afresh."""
    return subprocess.run(
        [sys.executable, "-m", "radiotag", *map(str, arguments)],
        cwd=cwd, env=environment(**env), capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip


# ---------------------------------------------------------------- what the tests work on


def write_images(folder, count=12, size=32, seed=1, names=NAMES):
    images, _ = synthetic.demo_images(count, size, seed=seed)
    synthetic.write_folder(folder, images, torch.arange(count) % len(names), names)
    return folder


@dataclass(frozen=True)
class World:
    root: Path
    imgs: Path  # 12 images of 32 pixels in 3 classes
    clean: Path  # 12 others
    few: Path  # 6 more, to align with
    key: Path  # names the classes
    numbered: Path  # counts 3 classes
    model: Path  # resnet10, one epoch on imgs
    trained: dict  # what train-demo said


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    imgs, clean = write_images(root / "imgs"), write_images(root / "clean", seed=2)
    few = write_images(root / "few", count=6, seed=3)
    key, numbered, model = root / "k.safetensors", root / "n.safetensors", root / "model.pt"
    good("keygen", "-o", key, "--data", imgs)
    good("keygen", "-o", numbered, "--classes", 3)
    train = ("train-demo", imgs, "-o", model, "--arch", "resnet10", "--epochs", 1, "--val", clean, "--json")
    return World(root, imgs, clean, few, key, numbered, model, good(*train).json)


def rows_of(output):
    return read_manifest(output.with_name(output.name + ".manifest.jsonl"))[1]


def mark(world, output, *more, source=None, key=None):
    """Mark quickly: two steps."""
    return call("mark", source or world.imgs, "--key", key or world.key, "-o", output, "--steps", 2, *more)


def fingerprint_of(key):
    return load_key(key).fingerprint


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"], *([c, "--help"] for c in COMMANDS)])
def test_help_and_version_import_nothing_heavy(arguments):
    script = (
        "import sys\n"
        "from radiotag import cli\n"
        "try:\n    cli.main()\n"
        "except SystemExit as stop:\n"
        f"    print('HEAVY', [m for m in {HEAVY} if m in sys.modules], stop.code)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment(), capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[-1] in {"HEAVY [] 0", "HEAVY [] None"}
    assert len(run.stdout.splitlines()) > 1
    assert run.stderr == ""
    assert ESCAPE not in run.stdout


@pytest.mark.parametrize("width", [24, 40, 80, 200])
def test_lines_are_wrapped_at_words_and_commands_can_be_copied(width):
    print_ = "sha256:" + "0123456789abcdef" * 4
    command = "radiotag verify 'my model.pt' b.pt --key k.safetensors --data held-out --report evidence.html"
    lines = [f"fingerprint  {print_}", f"next         {command}", "error: a rather long message of several words",
             "model           trained on          accuracy   log10 p  verdict"]  # fmt: skip
    shown = [terminal.wrapped(line, width) for line in lines]
    assert sum(part.split()[-1] == print_ for part in shown[0]) == 1  # whole, whatever the width
    copied = "\n".join(shown[1]).removeprefix("next")
    assert shlex.split(copied.replace("\\\n", " ")) == shlex.split(command)
    assert " ".join(part.strip() for part in shown[2]) == lines[2]
    assert shown[3] == [lines[3]]  # a table stays one
    for part in (*shown[1], *shown[2]):
        words = [word for word in part.split() if word != "\\"]
        assert len(part) <= width or len(words) <= 2, part
    assert [terminal.wrapped(line, 0) for line in lines] == [[line] for line in lines]  # a pipe gets whole lines


def test_the_short_options_say_the_same():
    assert call("-V").out == call("--version").out == f"radiotag {__version__}\n"
    assert good("mark", "-h").out == good("mark", "--help").out
    for command in COMMANDS:
        assert command in good("--help").out


def help_of(command):
    """The help in one line, without the boxes around its panels."""
    return " ".join(re.sub("[─│╭╮╰╯]", " ", good(command, "--help").out).split())


def options_of(command):
    """(parameter, its text in the help) of every option."""
    parameters = [p for p in typer.main.get_command(cli.app).commands[command].params if p.param_type_name == "option"]
    text = help_of(command).split("Show this message and exit.")[1]
    starts = {p.name: next(m.start() for m in re.finditer(re.escape(p.opts[0]) + r"(?= )", text)) for p in parameters}
    ends = [*sorted(starts.values())[1:], text.index("Examples:")]
    texts = dict(zip(sorted(starts, key=starts.get), zip(sorted(starts.values()), ends, strict=True), strict=True))
    return [(p, text[slice(*texts[p.name])]) for p in parameters]


UNITS = {
    "--classes": "number", "--fraction": "share", "--epsilon": "of 255", "--min-psnr": "dB", "--steps": "steps",
    "--seed": "of ", "--batch-size": "images", "--epochs": "passes", "--image-size": "pixels", "--lr": "learning rate",
    "--alpha": "corrected p", "--crops": "share", "--decoys": "keys", "--calibrate": "null keys",
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_in_the_help_has_a_unit_a_range_and_a_default(command):
    numbers = [(p, text) for p, text in options_of(command) if "<=x" in text or "x>=" in text or p.opts[0] in UNITS]
    assert numbers
    for parameter, text in numbers:
        name = parameter.opts[0]
        assert UNITS[name] in text, text
        assert "default: " in text, text
        assert "<=x" in text or "x>=" in text, text


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_is_in_panels_and_shows_no_type_of_the_programs_own(command):
    text = good(command, "--help").out
    panels = {"keygen": {"Key"}, "mark": {"Key", "Marking", "Quality"}, "train-demo": {"Training"},
              "verify": {"Key", "Suspect", "Evidence", "Black-box"}}[command]  # fmt: skip
    for panel in panels | {"Output"} | ({"Runtime"} if command != "keygen" else set()):
        assert re.search(rf"^╭─ {panel} ─", text, re.MULTILINE), panel
    assert "range>" not in text and "<bool>" not in text.split("Show this message")[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained_and_two_examples_are_given(command):
    for parameter, text in options_of(command):
        assert parameter.help, text
    examples = help_of(command).split("Examples:")[1]
    assert examples.count(f"radiotag {command}") == (4 if command == "verify" else 2)


@pytest.mark.parametrize(
    "arguments",
    [
        ["keygen", "--classes", "0"],
        ["keygen", "--no-such-option"],
        ["keygen", "--classes", "3", "--data", "imgs"],
        ["mark", "imgs"],
        ["mark", "imgs", "--key", "k", "--fraction", "1.5"],
        ["train-demo", "imgs", "--epochs", "many"],
        ["train-demo", "--epochs", "2"],  # of the demonstration, which has its own
        ["train-demo", "--crops", "0.25", "--seed", "3"],
        ["verify", "--key", "k"],
        ["verify", "m.pt", "--key", "k", "--alpha", "0"],
        ["verify", "m.pt", "--key", "k", "--decoys", "7"],
        ["verify", "--key", "k", "--predictions", "a.csv", "--data", "imgs"],
        ["no-such-command"],
    ],
)
def test_usage_errors_exit_with_2_and_speak_as_all_errors_do(arguments):
    result = bad(*arguments, code=2)
    assert result.err.splitlines()[-1].endswith("--help")
    answer = bad(*arguments, "--json", code=2).json
    assert answer["schema"] == 1
    assert answer["error"] in result.err
    assert answer["hint"].startswith("radiotag")
    assert answer["error"][0].islower()


# ---------------------------------------------------------------- keygen


def test_keygen_writes_a_secret_and_a_public_half(tmp_path):
    key, public = tmp_path / "k.safetensors", tmp_path / "k.pub"
    old = os.umask(0o002)
    try:
        result = good("keygen", "-o", key, "--classes", 7, "--json")
    finally:
        os.umask(old)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(public.stat().st_mode) == 0o644
    answer = result.json
    named = ("key", "public", "classes", "dimension", "network", "statistic", "fingerprint", "commitment", "beacon")
    assert set(answer) == COMMON | {*named}
    assert (answer["key"], answer["public"], answer["classes"]) == (str(key), str(public), 7)
    assert answer["network"] == "builtin"
    assert answer["statistic"] == keys.STATISTIC
    assert tuple(load_key(key).carriers.shape) == (7, answer["dimension"])
    assert f"sha256:{answer['fingerprint']}" in public.read_text()
    assert answer["fingerprint"] == fingerprint_of(key)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["k.pub", "k.safetensors"]


def test_nobody_draws_a_key_again(forks, tmp_path):
    """In processes of their own: in this one, keys come of the test's name."""
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for path in paths:
        assert forks.run("keygen", "-o", path, "--classes", 3).code == 0
    first, second = map(load_key, paths)
    assert first.secret != second.secret
    assert not (first.carriers == second.carriers).any() and not (first.patterns == second.patterns).any()


def test_a_cluster_s_rank_silences_nothing_but_mark(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert good("keygen", "-o", tmp_path / "k.safetensors", "--json").json["command"] == "keygen"
    assert "no.pt" in bad("verify", tmp_path / "no.pt", "--key", tmp_path / "k.safetensors").err


def test_a_rank_of_something_else_than_pytorch_s_launcher_does_not_wait(world, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert mark(world, tmp_path / "out", "--json").json["marked"] == 12


def test_keygen_takes_the_defaults_and_ends_with_the_next_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = good("keygen")
    assert "1000 classes" in result.out
    assert result.out.splitlines()[-1].endswith("radiotag mark ./imgs --key k.safetensors")
    assert f"sha256:{fingerprint_of(Path('k.safetensors'))}" in result.out


@pytest.mark.parametrize("there", ["k.safetensors", "k.pub"])
def test_keygen_overwrites_nothing_without_force(tmp_path, there):
    (tmp_path / there).write_text("mine")
    result = bad("keygen", "-o", tmp_path / "k.safetensors", "--classes", 2)
    assert there in result.err
    assert "--force" in result.err
    assert tree(tmp_path) == {there: hashlib.sha256(b"mine").hexdigest()}
    good("keygen", "-o", tmp_path / "k.safetensors", "--classes", 2, "--force")
    assert stat.S_IMODE((tmp_path / "k.safetensors").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "k.pub").stat().st_mode) == 0o644


def test_keygen_does_not_overwrite_the_key_with_its_public_half(tmp_path):
    bad("keygen", "-o", tmp_path / "k.pub", "--classes", 2)
    assert list(tmp_path.iterdir()) == []


def test_keygen_into_a_folder_that_is_not_there(tmp_path):
    assert "missing" in bad("keygen", "-o", tmp_path / "missing" / "k.safetensors", "--classes", 2).err


def test_two_keys_differ(world):
    a, b = load_key(world.key), load_key(world.numbered)
    assert a.secret != b.secret
    assert not torch.equal(a.carriers, b.carriers)


def test_keygen_takes_class_names_from_a_folder(world, tmp_path):
    assert load_key(world.key).class_names == list(NAMES)
    assert load_key(world.numbered).class_names is None
    shutil.copytree(world.imgs / "ant", tmp_path / "flat")
    assert "no class sub-folders" in bad("keygen", "-o", tmp_path / "k", "--data", tmp_path / "flat").err
    assert "no such folder" in bad("keygen", "-o", tmp_path / "k", "--data", tmp_path / "none").err
    assert not (tmp_path / "k").exists()


def test_keygen_on_a_trained_network(world, tmp_path):
    key = tmp_path / "own.safetensors"
    answer = good("keygen", "-o", key, "--network", world.model, "--classes", 3, "--json").json
    assert answer["network"] == str(world.model)
    theirs, ours = load_network(world.model).module.state_dict(), load_key(key).network().module.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert mark(world, tmp_path / "out", key=key).code == 0


def test_keygen_with_a_network_that_is_not_there(tmp_path):
    assert "no network 'nonsense'" in bad("keygen", "-o", tmp_path / "k", "--network", "nonsense").err
    (tmp_path / "broken.pt").write_bytes(b"PK\3\4 not a checkpoint")
    assert "broken.pt" in bad("keygen", "-o", tmp_path / "k", "--network", tmp_path / "broken.pt").err
    torch.save({"weight": torch.ones(2, 3)}, tmp_path / "other.pt")
    unknown = bad("keygen", "-o", tmp_path / "k", "--network", tmp_path / "other.pt").err
    assert "a checkpoint of train-demo" in unknown and "--arch" not in unknown  # which keygen has not
    assert not (tmp_path / "k").exists()


def test_keygen_offline_names_both_ways_out(tmp_path, monkeypatch):
    def offline(*_, **__):
        print("Downloading: ...")  # as torch does, on stdout
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(WeightsEnum, "get_state_dict", offline)
    result = bad("keygen", "-o", tmp_path / "k.safetensors", "--network", "resnet18")
    assert (result.out, "resnet18" in result.err) == ("", True)
    assert "--network builtin" in result.err
    assert "--network resnet18.pth" in result.err
    assert not (tmp_path / "k.safetensors").exists()


def test_a_key_that_others_can_read_is_refused(world, tmp_path):
    key = shutil.copy(world.key, tmp_path / "k.safetensors")
    Path(key).chmod(0o644)
    for arguments in (("mark", world.imgs, "-o", tmp_path / "out"), ("verify", world.model)):
        assert f"hint: chmod 600 {key}" in bad(*arguments, "--key", key).err
        public = bad(*arguments, "--key", world.key.with_suffix(".pub")).err
        assert "hint: give the secret half" in public
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [None, b"", b"garbage", b'\x08\0\0\0\0\0\0\0{"a":1}'])
def test_what_is_not_a_key_is_refused(world, tmp_path, content):
    key = tmp_path / "k.safetensors"
    if content is not None:
        key.write_bytes(content)
        key.chmod(0o600)
    for arguments in (("mark", world.imgs, "-o", tmp_path / "out"), ("verify", world.model)):
        assert "radiotag keygen" in bad(*arguments, "--key", key).err


# ---------------------------------------------------------------- the way through


def test_the_whole_way_in_processes_of_their_own(world, tmp_path):
    """keygen, mark, verify as a shell runs them; one fingerprint everywhere; plain text, results on stdout alone."""
    shutil.copytree(world.imgs, tmp_path / "imgs")
    shutil.copy(world.model, tmp_path / "model.pt")
    made = spawn("keygen", cwd=tmp_path)
    marked = spawn("mark", "./imgs", "--key", "k.safetensors", cwd=tmp_path)
    asked = ("verify", "model.pt", "--key", "k.safetensors", "--data", world.few, "--alpha", "1e-12")  # no luck
    verified = spawn(*asked, cwd=tmp_path)
    assert (made.returncode, marked.returncode, verified.returncode) == (0, 0, 3), (made, marked, verified)
    printed = fingerprint_of(tmp_path / "k.safetensors")
    for text in (made.stdout, marked.stdout, verified.stdout, (tmp_path / "k.pub").read_text()):
        assert f"sha256:{printed}" in text
    header, rows = read_manifest(tmp_path / "imgs-marked.manifest.jsonl")
    assert header["fingerprint"] == printed
    assert len(rows) == 12
    assert "radiotag mark" in made.stdout.splitlines()[-1]
    assert "radiotag verify" in marked.stdout.splitlines()[-1]
    assert "radiotag verify" in verified.stdout.splitlines()[-1]
    for run in (made, marked, verified):
        assert ESCAPE not in run.stdout + run.stderr
        assert "Warning" not in run.stderr


@pytest.mark.slow
def test_the_three_lines_exactly_as_written(world, tmp_path):
    shutil.copytree(world.imgs, tmp_path / "imgs")
    shutil.copy(world.model, tmp_path / "model.pt")
    assert spawn("keygen", cwd=tmp_path).returncode == 0
    assert spawn("mark", "./imgs", "--key", "k.safetensors", cwd=tmp_path).returncode == 0
    assert spawn("verify", "model.pt", "--key", "k.safetensors", cwd=tmp_path).returncode == 3


# ---------------------------------------------------------------- mark


def test_mark_makes_a_drop_in_replacement(world, tmp_path):
    """Everything about one run with the defaults, read back from disk by other code."""
    source = shutil.copytree(world.imgs, tmp_path / "imgs")
    (source / "notes.txt").write_text("not an image")
    (source / "ant" / "deep").mkdir()
    shutil.copy(source / "ant" / "00000.png", source / "ant" / "deep" / "x.png")
    os.utime(source / "bee" / "00001.png", ns=(10**18, 10**18 + 7))
    before = tree(source)
    result = good("mark", source, "--key", world.key, "--json")
    output, answer = tmp_path / "imgs-marked", result.json
    assert set(answer) == MARK_KEYS
    assert answer["fingerprint"] == fingerprint_of(world.key)
    assert (answer["images"], answer["marked"], answer["copied"], answer["skipped"]) == (13, 13, 0, 0)
    assert answer["failed"] == []
    assert tree(source) == before
    after = tree(output)
    assert after.keys() == before.keys()
    assert {name for name in before if before[name] == after[name]} == {"notes.txt"}
    psnr = [measured_psnr(source / name, output / name) for name in before if name.endswith(".png")]
    linf = [np.abs(pixels(source / n) - pixels(output / n)).max() for n in before if n.endswith(".png")]
    assert min(psnr) >= 34
    assert max(linf) <= 10
    assert answer["psnr_min"] == pytest.approx(min(psnr), abs=1e-3)
    assert answer["psnr_median"] == pytest.approx(np.median(psnr), abs=1e-3)
    assert answer["psnr_p5"] == pytest.approx(np.percentile(psnr, 5), abs=1e-3)
    similar = [brute_ssim(pixels(source / n), pixels(output / n)) for n in before if n.endswith(".png")]
    assert answer["ssim_median"] == pytest.approx(np.median(similar), abs=1e-5)
    assert answer["ssim_min"] == pytest.approx(min(similar), abs=1e-5)
    assert answer["linf_max"] == max(linf)
    assert answer["feature_gain_mean"] > 0.02
    for name in before:
        assert (output / name).stat().st_mtime_ns == (source / name).stat().st_mtime_ns
        assert stat.S_IMODE((output / name).stat().st_mode) == stat.S_IMODE((source / name).stat().st_mode)


def test_the_manifest_tells_everything_of_each_image(world, tmp_path):
    output = tmp_path / "out"
    assert mark(world, output).code == 0
    manifest = tmp_path / "out.manifest.jsonl"
    assert stat.S_IMODE(manifest.stat().st_mode) == 0o600
    header, rows = read_manifest(manifest)
    assert header["fingerprint"] == fingerprint_of(world.key)
    assert list(rows) == [p.relative_to(world.imgs).as_posix() for p in sorted(world.imgs.rglob("*.png"))]
    for path, row in rows.items():
        label = path.split("/")[0]
        assert (row["class"], row["row"], row["status"]) == (label, NAMES.index(label), "marked")
        assert row["sha256_in"] == digest(world.imgs / path)
        assert row["sha256_out"] == digest(output / row["output"])
        assert row["psnr"] == pytest.approx(measured_psnr(world.imgs / path, output / path), abs=1e-3)
        assert row["linf"] == np.abs(pixels(world.imgs / path) - pixels(output / path)).max()
        assert isinstance(row["gain"], float)


def test_a_key_without_names_takes_its_rows_in_sorted_order(world, tmp_path):
    assert mark(world, tmp_path / "out", key=world.numbered).code == 0
    assert {(row["class"], row["row"]) for row in rows_of(tmp_path / "out").values()} == {
        ("ant", 0),
        ("bee", 1),
        ("cat", 2),
    }


def test_the_fraction_holds_in_each_class_and_the_rest_is_copied(world, tmp_path):
    output = tmp_path / "out"
    answer = mark(world, output, "--fraction", 0.5, "--json").json
    assert (answer["marked"], answer["copied"]) == (6, 6)
    rows = rows_of(output)
    for name in NAMES:
        statuses = sorted(row["status"] for row in rows.values() if row["class"] == name)
        assert statuses == ["copied"] * 2 + ["marked"] * 2
    for path, row in rows.items():
        assert (digest(output / path) == digest(world.imgs / path)) == (row["status"] == "copied")
        assert (output / path).stat().st_mtime_ns == (world.imgs / path).stat().st_mtime_ns
    chosen = {frozenset(p for p in rows if rows[p]["status"] == "marked")}
    for i in range(3):  # two keys choose alike once in 216
        good("keygen", "-o", tmp_path / f"{i}.safetensors", "--classes", 3)
        mark(world, tmp_path / f"{i}", "--fraction", 0.5, key=tmp_path / f"{i}.safetensors")
        others = rows_of(tmp_path / f"{i}")
        chosen.add(frozenset(p for p in others if others[p]["status"] == "marked"))
    assert len(chosen) > 1


def test_a_fraction_of_nothing_copies_all(world, tmp_path):
    answer = mark(world, tmp_path / "out", "--fraction", 0, "--json").json
    assert (answer["marked"], answer["copied"], answer["psnr_min"]) == (0, 12, None)
    assert tree(tmp_path / "out") == tree(world.imgs)
    again = mark(world, tmp_path / "out", "--fraction", 0).out
    assert "nothing is marked" in again and "release" not in again


def test_the_limits_are_kept(world, tmp_path):
    mark(world, tmp_path / "a", "--epsilon", 3, "--min-psnr", 38)
    for path in tree(world.imgs):
        assert np.abs(pixels(world.imgs / path) - pixels(tmp_path / "a" / path)).max() <= 3
        assert measured_psnr(world.imgs / path, tmp_path / "a" / path) >= 38


def test_dry_run_writes_nothing(world, tmp_path):
    result = good(
        "mark", world.imgs, "--key", world.key, "-o", tmp_path / "out", "--dry-run", "--fraction", 0.5, "--preview",
        tmp_path / "sheet.png",
    )  # fmt: skip
    assert "would mark 6 of 12 images" in result.out
    following = result.out.splitlines()[-1]
    assert "--fraction 0.5" in following and str(tmp_path / "out") in following and "--dry-run" not in following
    assert "ant: 2 of 4 images" in result.out
    assert list(tmp_path.iterdir()) == []
    answer = mark(world, tmp_path / "out", "--dry-run", "--json", "--fraction", 0.5).json
    assert answer.keys() >= MARK_KEYS
    assert answer["dry_run"] is True
    assert answer["would_mark"] == 6
    assert list(tmp_path.iterdir()) == []


def test_dry_run_knows_what_is_stale(world, tmp_path):
    source = shutil.copytree(world.imgs, tmp_path / "imgs")
    mark(world, tmp_path / "out", source=source)
    (source / "ant" / "00000.png").unlink()
    assert "would not be made by this one" in mark(world, tmp_path / "out", "--dry-run", source=source).err


def test_dry_run_refuses_what_a_run_would(world, marked_once):
    for more in (["--dry-run"], []):
        result = mark(world, marked_once, "--fraction", 0.25, *more)
        assert result.code == 1
        assert "was begun with fraction 1.0, not 0.25" in result.err


def test_the_preview_shows_original_marked_and_difference(world, tmp_path):
    sheet = tmp_path / "sheet.png"
    assert mark(world, tmp_path / "out", "--preview", sheet).code == 0
    with Image.open(sheet) as image:
        assert image.format == "PNG"
        assert image.width >= 3 * 32


def test_the_preview_takes_no_picture_s_place(world, tmp_path):
    source, sheet = shutil.copytree(world.imgs, tmp_path / "imgs"), tmp_path / "sheet.png"
    before = tree(source)
    for place in (source / "ant" / "00000.png", source / "new.png", tmp_path / "out" / "new.png"):
        assert "lies in the data" in mark(world, tmp_path / "out", "--preview", place, source=source).err
    for place in (tmp_path / "no" / "sheet.png", tmp_path / "sheet.jpg"):
        result = mark(world, tmp_path / "out", "--preview", place)
        assert f"cannot write {place}" in result.err
        assert not (tmp_path / "out").exists()
    sheet.write_text("mine")
    assert "or remove it" in mark(world, tmp_path / "out", "--preview", sheet, source=source).err
    assert tree(source) == before
    assert sheet.read_text() == "mine"
    assert not (tmp_path / "out").exists()


def photo(seed=0, size=(48, 40)):
    image, _ = synthetic.demo_images(1, max(size), seed=seed)
    return Image.fromarray(image[0].permute(1, 2, 0).numpy()).resize(size)


def test_images_leave_in_the_format_they_came_in(world, tmp_path):
    folder = tmp_path / "imgs" / "ant"
    folder.mkdir(parents=True)
    photo().save(folder / "a.jpg", quality=87)
    photo().save(folder / "b.jpeg", quality=60, subsampling=0)
    photo().save(folder / "c.webp", quality=90)
    photo().save(folder / "d.tif")
    photo().save(folder / "e.bmp")
    photo().convert("L").save(folder / "f.png")
    result = good("mark", tmp_path / "imgs", "--key", world.key, "--steps", 2, "--json").json
    assert (result["marked"], result["failed"]) == (6, [])
    for name in tree(folder):
        with Image.open(folder / name) as before, Image.open(tmp_path / "imgs-marked" / "ant" / name) as after:
            assert (after.format, after.mode, after.size) == (before.format, before.mode, before.size)
            if before.format == "JPEG":
                assert after.quantization == before.quantization
                assert get_sampling(after) == get_sampling(before)
    for name, row in rows_of(tmp_path / "imgs-marked").items():
        seen = measured_psnr(tmp_path / "imgs" / name, tmp_path / "imgs-marked" / name)
        assert row["psnr"] == pytest.approx(seen, abs=1e-3)


def test_png_out_whatever_came_in(world, tmp_path):
    folder = tmp_path / "imgs" / "ant"
    folder.mkdir(parents=True)
    for i in range(4):
        photo(i).save(folder / f"{i}.jpg", quality=87)
    answer = good("mark", tmp_path / "imgs", "--key", world.key, "--steps", 2, "--format", "png", "--json").json
    output = tmp_path / "imgs-marked" / "ant"
    assert answer["marked"] == 4
    assert sorted(p.name for p in output.iterdir()) == [f"{i}.png" for i in range(4)]
    assert all(np.abs(pixels(folder / f"{i}.jpg") - pixels(output / f"{i}.png")).max() <= 10 for i in range(4))
    photo().save(folder / "0.png")
    assert (
        "two images would both become" in mark(world, tmp_path / "o", "--format", "png", source=tmp_path / "imgs").err
    )


def test_names_of_every_kind_survive(world, tmp_path):
    folder = tmp_path / "imgs" / "ünï çlass"
    folder.mkdir(parents=True)
    names = ["a b.png", "new\nline.png", "日本.png", "--help.png", "$(x).png", "UPPER.PNG"]
    with contextlib.suppress(OSError):
        photo().save(folder / os.fsdecode(b"\xff.png"))
        names.append(os.fsdecode(b"\xff.png"))
    for name in names:
        photo().save(folder / name)
    key = tmp_path / "a key.safetensors"
    good("keygen", "-o", key, "--data", tmp_path / "imgs")
    result = good("mark", tmp_path / "imgs", "--key", key, "--steps", 1)
    assert {p.name for p in (tmp_path / "imgs-marked" / "ünï çlass").iterdir()} == set(names)
    assert result.out.splitlines()[-1].endswith(f"--key '{key}'")
    assert good("mark", tmp_path / "imgs", "--key", key, "--steps", 1, "--json").json["skipped"] == len(names)
    (folder / "new\nline.png").write_bytes(b"broken")
    broken = call("mark", tmp_path / "imgs", "--key", key, "--steps", 1)
    assert broken.code == 1
    assert "new\\nline.png" in broken.err


def test_a_flat_folder_is_one_class(world, tmp_path):
    source = shutil.copytree(world.imgs / "ant", tmp_path / "flat")
    result = mark(world, tmp_path / "out", source=source, key=world.numbered)
    assert result.code == 0
    assert result.out.splitlines()[-1].endswith(f"--key {world.numbered} --marked {tmp_path / 'out.manifest.jsonl'}")
    assert {(row["class"], row["row"]) for row in rows_of(tmp_path / "out").values()} == {("", 0)}


def test_other_files_are_copied(world, tmp_path):
    source = shutil.copytree(world.imgs, tmp_path / "imgs")
    (source / "labels.csv").write_text("a,b")
    (source / ".hidden").write_text("h")
    (source / "ant" / "sub").mkdir()
    (source / "ant" / "sub" / "readme").write_text("r")
    (source / "later" / "on").mkdir(parents=True)
    assert mark(world, tmp_path / "out", source=source).code == 0
    assert (tmp_path / "out" / "later" / "on").is_dir()
    for name in ("labels.csv", ".hidden", "ant/sub/readme"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
        assert (tmp_path / "out" / name).stat().st_mtime_ns == (source / name).stat().st_mtime_ns


def test_marked_files_and_copies_have_their_sources_permissions(world, tmp_path):
    source = shutil.copytree(world.imgs, tmp_path / "imgs")
    for i, path in enumerate(sorted(source.rglob("*.png"))):
        path.chmod((0o640, 0o604, 0o444)[i % 3])
    assert mark(world, tmp_path / "out", "--fraction", 0.5, source=source).code == 0
    for path in source.rglob("*.png"):
        made = tmp_path / "out" / path.relative_to(source)
        assert made.stat().st_mode == path.stat().st_mode


def test_images_that_are_only_copied_are_counted(world, tmp_path):
    source = shutil.copytree(world.imgs, tmp_path / "imgs")
    for name in ("a.gif", "b.GIF", "c.ppm"):
        photo().save(source / "ant" / name)
    for more in ([], ["--dry-run"]):
        text = mark(world, tmp_path / "out", *more, source=source).out
        assert "copied unmarked, though they look like images: .gif 2, .ppm 1" in text
    answer = mark(world, tmp_path / "out", "--json", source=source).json
    assert answer["formats_unmarked"] == {".gif": 2, ".ppm": 1}
    assert (answer["images"], (tmp_path / "out" / "ant" / "b.GIF").exists()) == (12, True)


def test_a_telephones_jpeg_is_marked_and_what_it_lacks_is_said(world, tmp_path):
    source = shutil.copytree(world.imgs, tmp_path / "imgs")
    photo().save(source / "ant" / "phone.jpg", "MPO", save_all=True, append_images=[photo(1)])
    assert "1 marked files lack what lay behind the picture" in mark(world, tmp_path / "out", source=source).out
    answer = mark(world, tmp_path / "out", "--json", source=source).json
    assert (answer["marked"], answer["skipped"], answer["further_pictures_dropped"]) == (13, 13, 1)


def test_folders_named_as_splits_are_no_classes_if_they_hold_some(world, tmp_path):
    for split in ("train", "val"):
        shutil.copytree(world.imgs, tmp_path / "imgs" / split)
        shutil.copytree(world.imgs / "ant", tmp_path / "flat" / split)
    assert "classes      3 (ant, bee, cat)" in mark(world, tmp_path / "out", "--dry-run", source=tmp_path / "imgs").out
    asked = mark(world, tmp_path / "out", "--dry-run", source=tmp_path / "flat", key=world.numbered)
    assert "the classes are train, val: give one" in asked.err


def broken_source(world, folder):
    """A good folder with a truncated PNG, a text that calls itself an image, and a BMP that cannot be written again."""
    source = shutil.copytree(world.imgs, folder)
    whole = (source / "ant" / "00000.png").read_bytes()
    (source / "ant" / "00000.png").write_bytes(whole[: len(whole) // 2])
    (source / "bee" / "text.jpg").write_text("no image")
    return source


def test_a_broken_image_is_recorded_and_the_rest_marked(world, tmp_path):
    source = broken_source(world, tmp_path / "imgs")
    result = mark(world, tmp_path / "out", "--json", source=source)
    assert result.code == 1
    answer = result.json
    assert set(answer) == MARK_KEYS | {"error", "hint"}
    assert (answer["images"], answer["marked"]) == (13, 11)
    assert sorted(f["path"] for f in answer["failed"]) == ["ant/00000.png", "bee/text.jpg"]
    assert all(set(f) == {"path", "error", "hint"} for f in answer["failed"])
    assert "ant/00000.png" in result.err
    assert result.err.count("hint: ") == 2
    assert rows_of(tmp_path / "out")["ant/00000.png"]["status"] == "failed"
    assert not (tmp_path / "out" / "ant" / "00000.png").exists()
    text = mark(world, tmp_path / "out", source=source)
    assert text.code == 1
    assert "2 failed" in text.out
    assert f"2 of the images MISSING from {tmp_path / 'out'}" in text.out and "release" not in text.out
    shutil.copy(world.imgs / "ant" / "00000.png", source / "ant" / "00000.png")
    (source / "bee" / "text.jpg").unlink()
    mended = mark(world, tmp_path / "out", "--json", source=source)
    assert mended.code == 0
    assert (mended.json["marked"], mended.json["skipped"]) == (12, 11)


def test_an_image_that_cannot_be_written_again_is_one_failure_too(world, tmp_path):
    source = shutil.copytree(world.imgs, tmp_path / "imgs")
    head = b"BM" + struct.pack("<IHHI", 138 + 64, 0, 0, 138) + struct.pack("<IiiHHI", 124, 4, 4, 1, 32, 3)
    masks = struct.pack("<5I4I", 64, 0, 0, 0, 0, 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    (source / "bee" / "alpha.bmp").write_bytes((head + masks).ljust(138, b"\0") + bytes(range(64)))
    with Image.open(source / "bee" / "alpha.bmp") as image:
        assert image.mode == "RGBA"
    answer = mark(world, tmp_path / "out", "--json", source=source).json
    assert [f["path"] for f in answer["failed"]] == ["bee/alpha.bmp"]
    assert answer["marked"] == 12


def unmarkable_source(world, folder):
    """A good folder, and four sound pictures that cannot be marked as they are."""
    source = shutil.copytree(world.imgs, folder)
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(source / "ant" / "really.jpg", "GIF")
    frames[0].save(source / "ant" / "film.webp", "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    (source / "bee" / "picture.png").write_bytes(b"\0\0\0\x1cftypavif" + bytes(40))
    Image.fromarray(np.full((9, 9), 300, np.int32)).save(source / "bee" / "deep.tif")
    return source


def test_what_cannot_be_marked_is_named_or_copied_and_counted_by_kind(world, tmp_path):
    source, output = unmarkable_source(world, tmp_path / "imgs"), tmp_path / "out"
    failed = mark(world, tmp_path / "failed", "--json", source=source)
    assert failed.code == 1 and failed.json["unmarkable"] == {} and failed.json["marked"] == 12
    strange = {"ant/really.jpg", "ant/film.webp", "bee/picture.png", "bee/deep.tif"}
    assert {row["path"] for row in failed.json["failed"]} == strange
    assert all("--on-unmarkable copy" in row["hint"] for row in failed.json["failed"])
    answer = mark(world, output, "--json", "--on-unmarkable", "copy", source=source).json
    assert (answer["marked"], answer["copied"], answer["failed"]) == (12, 4, [])
    kinds = answer["unmarkable"]
    assert {"a GIF": 1, "several frames": 1, "an AVIF": 1}.items() <= kinds.items() and sum(kinds.values()) == 4
    for name in strange:
        assert (output / name).read_bytes() == (source / name).read_bytes()
    again = mark(world, output, "--json", "--on-unmarkable", "copy", source=source).json
    assert again["skipped"] == 16 and again["unmarkable"] == kinds
    text = mark(world, output, source=source)  # what is done stays done
    assert text.code == 0 and "copied, as they cannot be marked: a GIF 1" in text.out
    (source / "bee" / "picture.png").write_bytes((world.imgs / "bee" / "00001.png").read_bytes())
    mended = mark(world, output, "--json", "--on-unmarkable", "copy", source=source).json
    assert (mended["marked"], mended["copied"], mended["skipped"]) == (13, 3, 15)


def test_what_is_excluded_is_copied_and_makes_no_class(world, tmp_path):
    source, output = shutil.copytree(world.imgs, tmp_path / "imgs"), tmp_path / "out"
    shutil.copytree(source / "ant", source / "previews")
    shutil.copy(source / "bee" / "00001.png", source / "bee" / "00001_thumb.png")
    more = ["--exclude", "previews/*", "--exclude", "*_thumb.png"]
    answer = mark(world, output, "--json", *more, source=source).json
    assert (answer["images"], answer["marked"], sorted(answer["classes"])) == (12, 12, sorted(NAMES))
    for path in [*(source / "previews").iterdir(), source / "bee" / "00001_thumb.png"]:
        assert (output / path.relative_to(source)).read_bytes() == path.read_bytes()
    assert mark(world, output, "--json", *more[2:], *more[:2], source=source).json["skipped"] == 12  # in any order
    other = mark(world, output, *more[:2], source=source)
    assert other.code == 1 and "was begun with exclude" in other.err
    none = mark(world, tmp_path / "other", "--exclude", "*.gif", source=source)
    assert none.code == 1 and "no image fits --exclude '*.gif'" in none.err


def test_lists_of_checksums_are_named_as_they_no_longer_fit(world, tmp_path):
    source = shutil.copytree(world.imgs, tmp_path / "imgs")
    stale = ["SHA256SUMS", "ant/md5sum.txt", "checksums.csv", "manifest-sha256.txt", "ant/0.png.sha256"]
    for name in [*stale, "shards.txt", "idx.json", "README.md"]:
        (source / name).write_text("0 ant/00000.png")
    result = mark(world, tmp_path / "out", "--json", source=source)
    assert result.json["stale_indexes"] == sorted(stale, key=lambda name: name.split("/"))
    assert "they list files that are marked: " in mark(world, tmp_path / "out", source=source).out


def test_what_is_broken_is_not_copied(world, tmp_path):
    source = broken_source(world, tmp_path / "imgs")
    answer = mark(world, tmp_path / "out", "--json", "--on-unmarkable", "copy", source=source).json
    assert len(answer["failed"]) == 2 and answer["copied"] == 0 and answer["unmarkable"] == {}
    assert "fail or copy" in bad("mark", source, "--key", world.key, "--on-unmarkable", "skip", code=2).err


@pytest.mark.parametrize("kind", ["keep", "png"])
def test_what_cannot_be_marked_is_copied_into_any_format(world, tmp_path, kind):
    source, output = unmarkable_source(world, tmp_path / "imgs"), tmp_path / "out"
    for _ in range(2):  # and the second run finds its own files
        answer = mark(world, output, "--json", "--on-unmarkable", "copy", "--format", kind, source=source).json
        assert (answer["marked"], answer["copied"], answer["failed"]) == (12, 4, [])
        assert (output / "bee" / "deep.tif").read_bytes() == (source / "bee" / "deep.tif").read_bytes()


def test_strict_stops_at_the_first_broken_image(world, tmp_path):
    source = broken_source(world, tmp_path / "imgs")
    result = mark(world, tmp_path / "out", "--strict", "--batch-size", 1, source=source)
    assert result.code == 1
    assert "error: " in result.err
    assert "--strict" in result.err
    assert result.out == ""
    assert not (tmp_path / "out" / "cat").exists()


def test_an_image_that_no_mark_fits_in_still_gives_valid_json(world, tmp_path):
    folder = tmp_path / "imgs" / "ant"
    folder.mkdir(parents=True)
    Image.new("1", (32, 32), 1).save(folder / "white.png")
    result = mark(world, tmp_path / "out", "--json", source=tmp_path / "imgs")
    assert result.code == 0
    assert (folder / "white.png").read_bytes() == (tmp_path / "out" / "ant" / "white.png").read_bytes()
    rows = marked_rows(tmp_path / "out.manifest.jsonl")
    assert len(rows) == 1 and not marked_hashes(rows)  # an original is not refused for looking as marked
    assert "Infinity" not in result.out + (tmp_path / "out.manifest.jsonl").read_text()


# ---------------------------------------------------------------- mark: refusals


def test_folders_that_cannot_be_marked(world, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no images" in mark(world, tmp_path / "out", source=tmp_path / "empty").err
    assert "no such folder" in mark(world, tmp_path / "out", source=tmp_path / "missing").err
    assert "not a folder" in mark(world, tmp_path / "out", source=world.model).err
    for inside in (world.imgs / "out", world.imgs, world.root):
        assert "lie in each other" in mark(world, inside).err
    assert tree(tmp_path) == {}


def test_a_folder_that_is_someone_else_s_is_not_written_into(world, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    result = mark(world, tmp_path / "out")
    assert result.code == 1
    assert "no manifest" in result.err
    assert tree(tmp_path) == {"out/mine.txt": hashlib.sha256(b"mine").hexdigest()}
    assert mark(world, tmp_path / "out", "--force").code == 0
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_an_empty_output_folder_and_the_current_one_will_do(world, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert mark(world, Path()).code == 0
    assert (tmp_path / "out.manifest.jsonl").exists()
    assert len(tree(tmp_path / "out")) == 12
    assert mark(world, Path(), "--json").json["skipped"] == 12


def test_what_is_not_a_manifest_is_not_gone_on_from(world, tmp_path):
    for text in ("hello\n", "", "[1]\n", '{"radiotag": 99}\n', '{"radiotag": 1}\n3\n', '{"radiotag": 1}\n{"a": 1}\n'):
        (tmp_path / "out.manifest.jsonl").write_text(text)
        result = mark(world, tmp_path / "out")
        assert result.code == 1, text
        assert "not a radiotag manifest" in result.err
    assert not (tmp_path / "out").exists()
    assert mark(world, tmp_path / "out", "--force").code == 0


def test_keys_that_do_not_fit_the_folder(world, tmp_path):
    good("keygen", "-o", tmp_path / "two.safetensors", "--classes", 2)
    few = mark(world, tmp_path / "out", key=tmp_path / "two.safetensors")
    assert few.code == 1
    assert "radiotag keygen --classes 3" in few.err
    source = shutil.copytree(world.imgs, tmp_path / "imgs")
    shutil.move(source / "cat", source / "dog")
    lacks = mark(world, tmp_path / "out", source=source)
    assert lacks.code == 1
    assert "'dog'" in lacks.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [["--format", "jpeg"], ["--device", "tpu"]])
def test_words_that_are_no_choice(world, tmp_path, more):
    assert more[1] in bad("mark", world.imgs, "--key", world.key, "-o", tmp_path / "out", *more, code=2).err


# ---------------------------------------------------------------- mark: going on


def test_a_second_run_skips_everything(world, tmp_path):
    first = mark(world, tmp_path / "out", "--fraction", 0.5, "--json").json
    before, inodes = tree(tmp_path), {p: p.stat().st_ino for p in (tmp_path / "out").rglob("*.png")}
    second = mark(world, tmp_path / "out", "--fraction", 0.5, "--json").json
    assert second["skipped"] == 12
    changing = {"seconds", "skipped"}
    assert {k: v for k, v in second.items() if k not in changing} == {
        k: v for k, v in first.items() if k not in changing
    }
    assert tree(tmp_path) == before
    assert {p: p.stat().st_ino for p in (tmp_path / "out").rglob("*.png")} == inodes
    assert "12 done earlier" in mark(world, tmp_path / "out", "--fraction", 0.5).out


@pytest.mark.parametrize(
    ("name", "value"),
    [("fraction", 0.5), ("epsilon", 5.0), ("min_psnr", 40.0), ("format", "png"), ("seed", 7), ("steps", 3)],
)
def test_another_setting_is_an_error_that_names_it(world, marked_once, name, value):
    before = tree(marked_once.parent)
    option = {"steps": []}.get(name, [f"--{name.replace('_', '-')}", value])
    steps = value if name == "steps" else 2
    result = bad("mark", world.imgs, "--key", world.key, "-o", marked_once, "--steps", steps, *option)
    assert f"{name} " in result.err
    assert str(value) in result.err
    assert "--force" in result.err
    assert tree(marked_once.parent) == before


@pytest.fixture(scope="module")
def marked_once(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("marked") / "out"
    assert mark(world, output).code == 0
    return output


def test_another_key_is_an_error_that_names_both(world, marked_once):
    result = mark(world, marked_once, key=world.numbered)
    assert result.code == 1
    assert fingerprint_of(world.key) in result.err
    assert fingerprint_of(world.numbered) in result.err


def test_force_starts_over(world, tmp_path):
    mark(world, tmp_path / "out", "--fraction", 0.5)
    assert mark(world, tmp_path / "out", "--force", "--json", key=world.numbered).json["skipped"] == 0
    mark(world, tmp_path / "fresh" / "out", key=world.numbered)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh" / "out")
    assert digest(tmp_path / "out.manifest.jsonl") == digest(tmp_path / "fresh" / "out.manifest.jsonl")


def test_force_leaves_nothing_of_the_earlier_run(world, tmp_path):
    """Otherwise 0.png would stand beside 0.jpg, and the data set would be doubled."""
    folder = tmp_path / "imgs" / "ant"
    folder.mkdir(parents=True)
    for i in range(3):
        photo(i).save(folder / f"{i}.jpg")
    mark(world, tmp_path / "out", "--format", "png", source=tmp_path / "imgs")
    (tmp_path / "out" / "ant" / "mine.png").write_text("mine")
    assert mark(world, tmp_path / "out", "--force", source=tmp_path / "imgs").code == 0
    assert sorted(tree(tmp_path / "out")) == ["ant/0.jpg", "ant/1.jpg", "ant/2.jpg", "ant/mine.png"]


def test_what_changed_is_done_again_and_nothing_else(world, tmp_path):
    source, output = shutil.copytree(world.imgs, tmp_path / "imgs"), tmp_path / "out"
    mark(world, output, source=source)
    before = tree(output)
    shutil.copy(world.clean / "ant" / "00000.png", source / "ant" / "00000.png")
    assert mark(world, output, "--json", source=source).json["skipped"] == 11
    after = tree(output)
    assert {name for name in before if before[name] != after[name]} == {"ant/00000.png"}
    (output / "bee" / "00001.png").unlink()
    (output / "cat" / "00002.png").write_text("tampered with")
    assert mark(world, output, "--json", source=source).json["skipped"] == 10
    assert tree(output) == after


@pytest.mark.parametrize("fraction", [1, 0.5])
def test_other_images_of_the_same_names_do_not_take_an_outputs_place(world, tmp_path, fraction):
    """Else a data set that reuses a folder would cost the owner the manifest of the one before."""
    source, output = shutil.copytree(world.imgs, tmp_path / "imgs"), tmp_path / "out"
    mark(world, output, "--fraction", fraction, source=source)
    before, recorded = tree(output), digest(tmp_path / "out.manifest.jsonl")
    for path in source.rglob("*.png"):
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    result = mark(world, output, "--fraction", fraction, source=source)
    assert result.code == 1
    assert f"error: {output} was made of other images than are in {source}" in result.err
    assert (tree(output), digest(tmp_path / "out.manifest.jsonl")) == (before, recorded)
    assert mark(world, output, "--fraction", fraction, "--force", source=source).code == 0
    assert tree(output).keys() == before.keys()
    assert not set(tree(output).values()) & set(before.values())


def test_a_grown_folder_ends_as_if_it_had_been_whole_at_once(world, tmp_path):
    """A class that sorts last, and further images of the others, change no carrier."""
    source, output = shutil.copytree(world.imgs, tmp_path / "imgs"), tmp_path / "out"
    good("keygen", "-o", tmp_path / "k4.safetensors", "--classes", 4)
    settings = {"source": source, "key": tmp_path / "k4.safetensors"}
    mark(world, output, "--choose", "random", **settings)
    for i, path in enumerate(sorted(world.clean.rglob("*.png"))):
        shutil.copy(path, source / path.relative_to(world.clean).with_name(f"new{i}.png"))
    shutil.copytree(world.clean / "bee", source / "zebra")
    assert mark(world, output, "--choose", "random", **settings).code == 0
    mark(world, tmp_path / "fresh" / "out", "--choose", "random", **settings)
    assert tree(output) == tree(tmp_path / "fresh" / "out")
    assert digest(tmp_path / "out.manifest.jsonl") == digest(tmp_path / "fresh" / "out.manifest.jsonl")


def test_what_the_source_no_longer_has_is_named(world, tmp_path):
    source, output = shutil.copytree(world.imgs, tmp_path / "imgs"), tmp_path / "out"
    mark(world, output, source=source)
    (source / "ant" / "00000.png").unlink()
    result = mark(world, output, source=source)
    assert result.code == 1
    assert str(output / "ant" / "00000.png") in result.err
    assert (output / "ant" / "00000.png").exists()
    assert mark(world, output, "--force", source=source).code == 0
    assert tree(output).keys() == tree(source).keys()


def test_a_second_run_at_the_same_time_is_refused(world, marked_once):
    before = tree(marked_once.parent)
    with locked(marked_once.with_name("out.manifest.jsonl"), marked_once):
        for more in ([], ["--force"]):
            result = mark(world, marked_once, *more)
            assert result.code == 1
            assert "another radiotag" in result.err
    assert tree(marked_once.parent) == before


@pytest.mark.parametrize("begun", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_of_runs_that_begin_together_one_goes_on(world, tmp_path, begun):
    """Whether the output is new or not: a cluster may start the same command on all of its nodes."""
    mark(world, tmp_path / "calm" / "out", "--choose", "random")
    expected = tree(tmp_path / "calm" / "out")
    if begun:
        source = broken_source(world, tmp_path / "imgs")
        mark(world, tmp_path / "out", "--strict", "--choose", "random", source=source)
    command = [
        sys.executable,
        "-m",
        "radiotag",
        "mark",
        world.imgs,
        "-o",
        tmp_path / "out",
        "-k",
        world.key,
        "--steps",
        2,
        "--choose",
        "random",
    ]
    runs = [subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [run.communicate()[1] for run in runs]
    codes = sorted(run.returncode for run in runs)
    assert codes[0] == 0, said
    assert all(code == 0 or "another radiotag is marking into" in text for run, text in zip(runs, said, strict=True)
               for code in [run.returncode])  # fmt: skip
    assert tree(tmp_path / "out") == expected
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith((".lock", ".part"))]


def test_a_torn_manifest_line_is_passed_over_twice(world, tmp_path):
    """A power cut tears the last line; the next run must not write on behind it, for it may be cut off too."""
    output, manifest = tmp_path / "out", tmp_path / "out.manifest.jsonl"
    mark(world, output, "--choose", "random")
    whole = manifest.read_text()
    manifest.write_text("\n".join(whole.split("\n")[:4]) + '\n{"class": "ant", "pa')
    strict = mark(world, output, "--strict", "--choose", "random", source=broken_source(world, tmp_path / "imgs"))
    assert strict.code == 1  # ended in the middle, after it had written to the manifest
    again = mark(world, output, "--choose", "random")
    assert again.code == 0, again.err
    assert manifest.read_text() == whole


def test_stale_temporary_files_are_removed_and_no_others(world, tmp_path):
    output = tmp_path / "out"
    mark(world, output)
    manifest = (tmp_path / "out.manifest.jsonl").read_bytes()
    mine = [output / "my.part", output / ".short.part", tmp_path / ".aaaaaaaaaaaaaaaa.part", tmp_path / "b.part"]
    stale = [output / "ant" / ".0123456789abcdef.part", output / ".0123456789abcdef.part"]
    for path in (*mine, *stale):
        path.write_text("half")
    stale.append(tmp_path / f".{hashlib.sha256(b'out.manifest.jsonl').hexdigest()[:16]}.part")
    stale[-1].write_bytes(manifest[:-9])
    assert mark(world, output).code == 0
    assert all(path.exists() for path in mine)
    assert not any(path.exists() for path in stale)


def undisturbed(world, folder, *settings):
    good("mark", world.imgs, "--key", world.key, "-o", folder / "out", *settings)
    return tree(folder)


def kill_and_go_on(world, forks, folder, rounds, expected, settings, draw):
    """Kill a run several times, each time further on, then let it end; everything must be as if nothing had been."""
    command = ("mark", world.imgs, "--key", world.key, "-o", folder / "out", *settings, "--batch-size", 1)
    killed = 0
    for step in range(1, rounds + 1):
        begun = forks.start(*command)
        wait_for_files(folder / "out", 12 * step // (rounds + 1))
        time.sleep(draw.uniform(0, 0.05))
        with contextlib.suppress(ProcessLookupError):
            os.kill(begun[0], signal.SIGKILL)
        killed += forks.end(begun).code == -signal.SIGKILL
        for path in (folder / "out").rglob("*.png"):
            assert digest(path) == expected[path.relative_to(folder).as_posix()], "a file appeared that is not whole"
    assert killed > rounds // 2
    last = forks.run(*command, "--json")
    assert last.code == 0, last.err
    assert tree(folder) == expected
    assert leftovers(folder) == []
    return last.json


def test_kill_9_and_go_on(world, forks, tmp_path):
    settings = ("--steps", 3, "--fraction", 0.75)
    expected = undisturbed(world, tmp_path / "calm", *settings)
    (tmp_path / "killed").mkdir()
    last = kill_and_go_on(world, forks, tmp_path / "killed", 3, expected, settings, random.Random(1))
    assert last["skipped"] > 0


@pytest.mark.slow
def test_kill_9_many_times(world, forks, tmp_path):
    draw = random.Random(time.time_ns())
    settings = ("--steps", 3)
    expected = undisturbed(world, tmp_path / "calm", *settings)
    for attempt in range(4):
        (tmp_path / str(attempt)).mkdir()
        kill_and_go_on(world, forks, tmp_path / str(attempt), 5, expected, settings, draw)


@pytest.mark.slow
def test_kill_9_of_a_process_of_its_own(world, tmp_path):
    expected = undisturbed(world, tmp_path / "calm", "--steps", 3)
    command = [sys.executable, "-m", "radiotag", "mark", world.imgs, "--key", world.key, "-o", tmp_path / "k" / "out"]
    command = [*map(str, command), "--steps", "3", "--batch-size", "2"]
    for count in (0, 3, 7):
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_files(tmp_path / "k" / "out", count) if count else time.sleep(1)
        process.kill()
        process.wait()
    assert subprocess.run(command, env=environment(), capture_output=True, check=False).returncode == 0
    assert tree(tmp_path / "k") == expected


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])  # by the user; by a launcher whose other process died
def test_interrupted(world, forks, tmp_path, how):
    settings = ("--steps", 3)
    expected = undisturbed(world, tmp_path / "calm", *settings)
    command = ("mark", world.imgs, "--key", world.key, "-o", tmp_path / "cut" / "out", *settings, "--batch-size", 1)
    begun = forks.start(*command, "--json")
    wait_for_files(tmp_path / "cut" / "out", 3)
    os.kill(begun[0], how)
    result = forks.end(begun)
    assert result.code == 130
    assert "error: interrupted" in result.err
    assert "run the same command again" in result.json["hint"]
    assert "Traceback" not in result.err
    assert leftovers(tmp_path / "cut") == []
    again = forks.run(*command, "--json").json
    assert 2 <= again["skipped"] < 12  # the third file may have come before its record
    assert tree(tmp_path / "cut") == expected


def test_the_batch_size_changes_no_byte(world, tmp_path):
    source = write_images(tmp_path / "imgs", count=20)
    for i in range(2):
        photo(i, (40, 56)).save(source / "ant" / f"photo{i}.jpg", quality=85)  # other sizes in the same batches
    trees = []
    for size in (1, 5, 64):
        assert mark(world, tmp_path / str(size) / "out", "--batch-size", size, source=source).code == 0
        trees.append(tree(tmp_path / str(size)))
    assert trees[0] == trees[1] == trees[2]


def test_out_of_memory_halves_the_batch_and_changes_no_byte(world, tmp_path, monkeypatch):
    import torch

    assert mark(world, tmp_path / "roomy" / "out").code == 0
    real, sizes = batches.mark_pictures, []

    def cramped(marker, requests):
        sizes.append(len(requests))
        if len(requests) > 3:
            raise torch.OutOfMemoryError("no memory")
        return real(marker, requests)

    monkeypatch.setattr(batches, "mark_pictures", cramped)
    assert mark(world, tmp_path / "cramped" / "out").code == 0
    assert max(sizes) > 3 >= min(sizes)
    assert tree(tmp_path / "cramped") == tree(tmp_path / "roomy")


def test_an_image_that_cannot_be_written_marked_costs_that_image_alone(world, tmp_path, monkeypatch):
    """Of what is only found while its batch is optimised, too."""
    assert mark(world, tmp_path / "whole" / "out").code == 0
    real = batches.mark_pictures

    def failing(marker, requests):
        if any(request.picture.name.endswith("ant/00003.png") for request in requests):
            raise RadiotagError("ant/00003.png cannot be written")
        return real(marker, requests)

    monkeypatch.setattr(batches, "mark_pictures", failing)
    result = mark(world, tmp_path / "out", "--json")
    assert (result.code, result.json["marked"], len(result.json["failed"])) == (1, 11, 1)
    assert result.json["failed"][0]["path"] == "ant/00003.png"
    monkeypatch.undo()
    assert mark(world, tmp_path / "out").code == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole" / "out")


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_one_tells_of_a_usage_error(world, tmp_path, rank):
    launched = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    command = [sys.executable, "-m", "radiotag", "mark", "imgs", "--key", "k", "--format", "jpg", "--json"]
    done = subprocess.run(command, check=False, env=os.environ | launched, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout.count('"error"') == done.stderr.count("error:") == 1 - rank


def test_what_is_secret_is_not_copied_with_the_data(world, tmp_path):
    for name in ("k.safetensors", "k.txt"):
        source = shutil.copytree(world.imgs, tmp_path / name / "imgs")
        key = shutil.copy2(world.key, source / name)
        error = mark(world, tmp_path / "out", source=source, key=key).err
        assert f"{key} lies in {source}" in error and "hint: " in error
    old = mark(world, tmp_path / "old", "--json").json["manifest"]
    found = {"other.safetensors": world.key.read_bytes(), "old.manifest.jsonl": Path(old).read_bytes()}
    found |= {"c": found["other.safetensors"], "notes.txt": found["old.manifest.jsonl"]}
    with safe_open(world.key, framework="pt") as file:
        said = {"radiotag": file.metadata()["radiotag"]}
    empty = json.dumps({"__metadata__": said}).encode()
    size = next(size for size in range(2570, 10**7, 65536) if size >= len(empty))  # its bytes hold a line break
    found["d"] = struct.pack("<Q", size) + empty.ljust(size)
    assert b"\n" in found["d"][:8]
    for name, data in found.items():
        source = shutil.copytree(world.imgs, tmp_path / f"with {name}" / "imgs")
        (source / "ant" / name).write_bytes(data)
        assert f"{source / 'ant' / name} is secret" in mark(world, tmp_path / "out", source=source).err
    source = shutil.copytree(world.imgs, tmp_path / "weights" / "imgs")
    shutil.copy2(networks.BUILTIN, source / "weights.safetensors")  # a model is no secret
    (source / "train.manifest.jsonl").write_text('{"image": "ant/00000.png"}\n')  # of other software
    assert mark(world, tmp_path / "out", source=source).code == 0
    assert (tmp_path / "out" / "weights.safetensors").exists()


def test_a_link_to_a_folder_is_marked_beside_the_link(world, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "imgs").symlink_to(world.imgs)
    settings = ("--key", world.key, "--steps", 1, "--json")
    assert good("mark", tmp_path / "elsewhere" / "imgs", *settings).json["output"] == str(
        tmp_path / "elsewhere" / "imgs-marked"
    )
    assert not world.imgs.with_name("imgs-marked").exists()


@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "RGB"])
def test_a_grey_image_is_marked_as_strongly_as_it_may_be_and_stays_grey(world, tmp_path, mode):
    """Its file holds no colour, in which most of a mark would be lost. Where it could hold some, a tint would show."""
    for path in sorted(world.imgs.rglob("*.png")):
        grey = Image.open(path).convert("L")
        if mode == "I;16":
            grey = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
        place = tmp_path / "imgs" / path.relative_to(world.imgs)
        place.parent.mkdir(parents=True, exist_ok=True)
        grey.convert(mode).save(place) if mode in {"LA", "RGB"} else grey.save(place)
    result = call("mark", tmp_path / "imgs", "--key", world.key, "--json")
    assert result.code == 0, result.err
    answer = result.json
    assert 34 <= answer["psnr_min"] <= answer["psnr_median"] < 34.5
    for path in (tmp_path / "imgs").rglob("*.png"):
        with (
            Image.open(path) as before,
            Image.open(tmp_path / "imgs-marked" / path.relative_to(tmp_path / "imgs")) as f,
        ):
            assert f.mode == before.mode
            assert f.mode != "RGB" or np.ptp(np.asarray(f), axis=2).max() == 0


def test_a_file_that_cannot_keep_the_psnr_is_refused_by_name(world, tmp_path):
    """--min-psnr is a promise: what writing again alone would spoil is left out, and said."""
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    (tmp_path / "imgs" / "ant").mkdir(parents=True)
    Image.fromarray(noise).save(tmp_path / "imgs" / "ant" / "a.jpg", quality=60)
    photo(3).save(tmp_path / "imgs" / "ant" / "b.png")
    result = call("mark", tmp_path / "imgs", "--key", world.key, "--min-psnr", 45, "--json")
    (failed,) = result.json["failed"]
    assert result.code == 1 and failed["path"] == "ant/a.jpg" and "less than --min-psnr allows" in failed["error"]
    assert "--format png" in failed["hint"] and "--min-psnr" in failed["hint"]
    assert result.json["marked"] == 1 and result.json["psnr_min"] >= 45


@pytest.mark.parametrize("levels", [1, 64])
def test_a_palette_with_too_few_colours_becomes_full_colour(world, tmp_path, levels):
    place = tmp_path / "imgs" / "ant" / "a.png"
    place.parent.mkdir(parents=True)
    before = photo(2, (64, 64)).quantize(256)
    before.save(place, transparency=bytes(255 - i % levels * 3 for i in range(256)))
    result = good("mark", tmp_path / "imgs", "--key", world.key, "--steps", 4)
    marked = tmp_path / "imgs-marked" / "ant" / "a.png"
    with Image.open(marked) as after:
        mode, rgb = after.mode, np.asarray(after.convert("RGBA")).astype(float)
    with Image.open(place) as source:
        expected = np.asarray(source.convert("RGBA")).astype(float)
    assert np.array_equal(rgb[..., 3], expected[..., 3])
    assert 10 * np.log10(255**2 / np.mean((rgb[..., :3] - expected[..., :3]) ** 2)) >= 34
    assert ("1 marked files have no palette" in result.out) == (mode != "P")
    assert levels == 1 or mode == "RGBA"


def test_what_an_encoder_takes_of_a_mark_is_given_back_within_the_psnr(world, tmp_path):
    folder = tmp_path / "imgs" / "ant"
    folder.mkdir(parents=True)
    for i in range(240):
        photo(i, (32, 32)).save(folder / f"{i}.jpg", quality=30)
    more = "--key", world.key, "--steps", 8, "--fraction", 0.1, "--json"  # so few all carry the pattern
    kept, png = (
        good("mark", tmp_path / "imgs", "-o", tmp_path / format, "--format", format, *more).json
        for format in ("keep", "png")
    )
    assert kept["marked"] == png["marked"] == 24
    assert kept["psnr_min"] >= 34
    assert kept["psnr_median"] < png["psnr_median"] + 0.8  # by writing alone the file would have 1.5 dB more, at least


def test_the_seed_changes_the_marks(world, tmp_path):
    mark(world, tmp_path / "a")
    mark(world, tmp_path / "b", "--seed", 1)
    a, b = tree(tmp_path / "a"), tree(tmp_path / "b")
    assert all(a[name] != b[name] for name in a)


# ---------------------------------------------------------------- train-demo


def train(world, output, *more, data=None):
    return call("train-demo", data or world.imgs, "-o", output, "--arch", "resnet10", "--epochs", 1, *more)


def test_train_demo_tells_what_it_made(world):
    answer = world.trained
    assert set(answer) == COMMON | {"model", "architecture", "classes", "epochs", "accuracy"}
    assert (answer["model"], answer["architecture"]) == (str(world.model), "resnet10")
    assert (answer["classes"], answer["epochs"]) == (3, 1)
    assert 0 <= answer["accuracy"] <= 1
    network = load_network(world.model)
    assert network.spec.class_names == NAMES
    assert network.spec.image_size == 32
    held_out = training.load_folder(world.clean, 32, NAMES)
    assert answer["accuracy"] == training.accuracy(network, held_out)


def test_train_demo_overwrites_nothing_and_ends_with_the_next_command(world, tmp_path):
    model = tmp_path / "a model.pt"
    first = train(world, model)
    assert first.code == 0, first.err
    assert first.out.splitlines()[-1].endswith(f"radiotag verify '{model}' --key k.safetensors")
    assert "not measured" in first.out
    before = digest(model)
    refused = train(world, model)
    assert refused.code == 1
    assert "--resume" in refused.err
    assert "--force" in refused.err
    assert digest(model) == before
    assert train(world, model, "--force", "--seed", 1).code == 0
    assert digest(model) != before


def test_train_demo_goes_on_as_if_undisturbed(world, tmp_path):
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    command = ("--arch", "resnet10", "--batch-size", 6)
    good("train-demo", world.imgs, "-o", whole, *command, "--epochs", 2)
    good("train-demo", world.imgs, "-o", cut, *command, "--epochs", 2)
    assert training.Recipe().epochs != 2
    result = call("train-demo", world.imgs, "-o", cut, *command, "--epochs", 2, "--resume", "--json")
    assert result.code == 0, result.err
    assert result.json["accuracy"] is None
    assert digest(cut) == digest(whole)
    other = call("train-demo", world.imgs, "-o", cut, *command, "--epochs", 3, "--resume", "--seed", 5)
    assert other.code == 1
    assert "seed" in other.err


def test_train_demo_interrupted_goes_on_to_the_same_model(world, forks, tmp_path):
    command = ("train-demo", world.imgs, "--arch", "resnet10", "--batch-size", 4, "--epochs", 4)
    assert forks.run(*command, "-o", tmp_path / "whole.pt").code == 0
    begun = forks.start(*command, "-o", tmp_path / "cut.pt")
    deadline = time.monotonic() + 120
    while not (tmp_path / "cut.pt").exists():
        assert time.monotonic() < deadline, "no epoch ends"
        time.sleep(0.002)
    os.kill(begun[0], signal.SIGINT)
    cut = forks.end(begun)
    assert cut.code == 130
    assert "--resume" in cut.err
    resumed = forks.run(*command, "-o", tmp_path / "cut.pt", "--resume")
    assert resumed.code == 0, resumed.err
    theirs, ours = (load_network(tmp_path / name).module.state_dict() for name in ("whole.pt", "cut.pt"))
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_train_demo_trains_the_head_alone(world, tmp_path):
    head = tmp_path / "head.pt"
    result = train(world, head, "--init", world.model, "--head-only", data=world.clean)
    assert result.code == 0, result.err
    before, after = load_network(world.model).module.state_dict(), load_network(head).module.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"fc.weight", "fc.bias"}
    assert "--init" in bad("train-demo", world.imgs, "-o", tmp_path / "m.pt", "--head-only").err


def test_train_demo_starts_from_a_model_of_other_classes(world, tmp_path):
    data = write_images(tmp_path / "two", count=6, names=("x", "y"))
    more = ("--init", world.model, "--image-size", 24, "--json")
    answer = train(world, tmp_path / "m.pt", *more, data=data).json
    assert (answer["classes"], answer["architecture"]) == (2, "resnet10")
    spec = load_network(tmp_path / "m.pt").spec
    assert spec.class_names == ("x", "y") and spec.image_size == 24


def test_train_demo_takes_crops_of_larger_images(world, tmp_path):
    data = tmp_path / "photos"
    for i, name in enumerate(("x", "y", "x", "y")):
        (data / name).mkdir(parents=True, exist_ok=True)
        photo(i, (90, 70)).save(data / name / f"{i}.png")
    more = ("--image-size", 32, "--crops", 0.25, "--val", data, "--json")
    result = train(world, tmp_path / "m.pt", *more, data=data)
    assert result.code == 0, result.err
    assert load_network(tmp_path / "m.pt").spec.image_size == 32 and 0 <= result.json["accuracy"] <= 1
    assert train(world, tmp_path / "n.pt", "--image-size", 32, data=data).code == 0
    cropped, shifted = (load_network(tmp_path / name).module.state_dict()["fc.weight"] for name in ("m.pt", "n.pt"))
    assert not torch.equal(cropped, shifted)
    again = call("train-demo", data, "-o", tmp_path / "m.pt", "--arch", "resnet10", "--epochs", 2, "--resume")
    assert again.code == 1 and "is of another training" in again.err
    assert "--crops" in bad("train-demo", data, "-o", tmp_path / "o.pt", "--crops", 0, code=2).err


def test_train_demo_learns_from_a_teacher(world, tmp_path):
    assert train(world, tmp_path / "student.pt", "--teacher", world.model).code == 0
    assert train(world, tmp_path / "labels.pt").code == 0
    student, other = (
        load_network(tmp_path / name).module.state_dict()["fc.weight"] for name in ("student.pt", "labels.pt")
    )
    assert not torch.equal(student, other)


def test_train_demo_trains_a_marking_network_that_withstands_changes(world, tmp_path):
    answer = train(world, tmp_path / "robust.pt", "--robust", "--json").json
    assert answer["architecture"] == "resnet10"
    robust, plain = (load_network(path).module.state_dict() for path in (tmp_path / "robust.pt", world.model))
    assert not torch.equal(robust["fc.weight"], plain["fc.weight"])
    assert torch.load(tmp_path / "robust.pt", weights_only=True)["recipe"]["robust"] is True
    good("keygen", "-o", tmp_path / "k.safetensors", "--network", tmp_path / "robust.pt")
    for more in (["--teacher", world.model], ["--init", world.model, "--head-only"]):
        assert "--robust" in bad("train-demo", world.imgs, "-o", tmp_path / "m.pt", "--robust", *more, code=2).err


def test_train_demo_writes_safetensors(world, tmp_path):
    model = tmp_path / "m.safetensors"
    assert train(world, model).code == 0
    theirs, ours = load_network(world.model).module.state_dict(), load_network(model).module.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert load_network(model).spec == load_network(world.model).spec
    assert call("verify", model, "--key", world.key, "--data", world.few).code == 3
    assert "resume" in train(world, model, "--resume").err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--arch", "resnet9000"], "resnet9000"),
        (["--stem", "tiny"], "tiny"),
        (["--init", "missing.pt"], "missing.pt"),
        (["--teacher", "missing.pt"], "missing.pt"),
        (["--val", "missing"], "missing"),
    ],
)
def test_train_demo_refuses(world, tmp_path, more, said):
    code = 2 if more[0] == "--stem" else 1  # a word that is no choice is a usage error
    result = bad("train-demo", world.imgs, "-o", tmp_path / "m.pt", "--epochs", 1, *more, code=code)
    assert said in result.err
    assert not (tmp_path / "m.pt").exists()


def test_train_demo_on_what_is_no_data(world, tmp_path):
    assert "no such folder" in bad("train-demo", tmp_path / "none", "-o", tmp_path / "m.pt").err
    result = bad("train-demo", world.imgs, "-o", tmp_path / "none" / "m.pt")
    assert f"there is no folder {tmp_path / 'none'}" in result.err
    assert "reading" not in result.err
    shutil.copytree(world.clean, tmp_path / "val")
    shutil.move(tmp_path / "val" / "cat", tmp_path / "val" / "dog")
    assert "'dog'" in train(world, tmp_path / "m.pt", "--val", tmp_path / "val").err


# ---------------------------------------------------------------- the demonstration

SUSPECT_AND_MODEL = SUSPECT_KEYS | {"model", "accuracy"}


def small_demonstration(monkeypatch, size, alignment, gradients):
    real = demo.run
    monkeypatch.setattr(demo, "run", lambda *a, **k: real(*a, **k, size=size))
    monkeypatch.setattr(probes, "ALIGNMENT_IMAGES", alignment)
    monkeypatch.setattr(suspect_module, "GRADIENTS", gradients)


def test_the_demonstration_makes_everything(tmp_path, monkeypatch):
    """Far too small to detect anything: it is the way through that is tested."""
    small_demonstration(monkeypatch, demo.Size(images=20, held_out=10, fraction=0.5, epochs=1), 30, 80)
    monkeypatch.chdir(tmp_path)
    result = call("train-demo")
    assert result.code == 0, result.err
    folder = tmp_path / "radiotag-demo"
    assert {p.name for p in folder.iterdir()} == demo.MADE
    lines = result.out.splitlines()
    assert lines[0].split() == ["model", "trained", "on", "accuracy", "log10", "p", "verdict"]
    assert lines[1].startswith("clean.pt")
    assert lines[2].startswith("radioactive.pt")
    assert "10 of 20 marked" in lines[2]
    assert f"sha256:{fingerprint_of(folder / 'k.safetensors')}" in result.out
    assert lines[-1].startswith("next: radiotag verify radiotag-demo/radioactive.pt")
    assert "--force" in bad("train-demo").err
    (folder / "mine.txt").write_text("mine")
    assert "mine.txt" in bad("train-demo", "--force").err
    assert (folder / "images").is_dir()


@pytest.mark.slow
def test_the_demonstration_shows_the_mark(tmp_path):
    answer = call("train-demo", "-o", tmp_path / "demo", "--json").json
    about = {"key", "fingerprint", "images", "marked", "psnr_median"}
    assert set(answer) == COMMON | {"clean", "radioactive"} | about
    for name in ("clean", "radioactive"):
        assert set(answer[name]) == SUSPECT_AND_MODEL
        assert answer[name]["model"] == str(tmp_path / "demo" / f"{name}.pt")
        assert answer[name]["accuracy"] > 0.15
    assert (answer["images"], answer["marked"]) == (1500, 750)
    assert answer["psnr_median"] >= 34
    assert answer["clean"]["detected"] is False
    assert answer["radioactive"]["detected"] is True
    assert answer["radioactive"]["log10_p"] < -4


def test_the_demonstration_by_force_spares_what_is_not_its_own(tmp_path):
    (tmp_path / "images" / "holiday").mkdir(parents=True)
    (tmp_path / "images" / "holiday" / "me.jpg").write_text("me")
    assert "holiday" in bad("train-demo", "-o", tmp_path, "--force").err
    assert tree(tmp_path).keys() == {"images/holiday/me.jpg"}


def test_the_demonstration_by_force_spares_a_key_of_the_user_s(tmp_path):
    good("keygen", "-o", tmp_path / "k.safetensors", "--classes", 2)
    before = tree(tmp_path)
    assert "k.safetensors" in bad("train-demo", "-o", tmp_path, "--force").err
    assert tree(tmp_path) == before


# ---------------------------------------------------------------- verify


@pytest.fixture(scope="module")
def clean_result(world):
    return verify(world, world.model, more=["--json"])


def verify(world, *models, more=(), key=None):
    return call("verify", *models, "--key", key or world.key, "--data", world.few, *more)


@pytest.fixture(scope="module")
def radioactive_model(world):
    """The marking network itself, with a last layer of three rows that lean towards the carriers."""
    secret = load_key(world.key)
    marker = secret.network()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(secret.carriers.shape, generator=generator) / secret.carriers.shape[1] ** 0.5
    head = nn.Linear(secret.carriers.shape[1], len(NAMES))
    head.weight = nn.Parameter(rows + 10 * secret.carriers)
    marker.module.fc = head
    spec = replace(marker.spec, classes=len(NAMES), class_names=NAMES)
    save_checkpoint(world.root / "radioactive.pt", Network(marker.module, spec).module, spec)
    return world.root / "radioactive.pt"


def test_a_model_that_carries_the_mark_is_detected(world, radioactive_model):
    result = verify(world, radioactive_model, more=["--json"])
    assert result.code == 0, result.err
    answer = result.json
    (suspect,) = answer["suspects"]
    assert answer["detected"] is True
    assert suspect["detected"] is True
    assert suspect["log10_p"] <= -4
    assert suspect["paper_log10_p"] < -1  # six images align little
    assert suspect["mean_cosine"] > 0.1  # four standard deviations of the mean of three under the null
    assert abs(suspect["pattern_cosine"]) < 0.5  # its head knows nothing of patterns
    text = verify(world, radioactive_model)
    assert text.code == 0
    assert "MARK DETECTED" in text.out
    other = verify(world, radioactive_model, key=world.numbered)
    assert other.code == 3
    assert "no evidence" in other.out


def test_a_clean_model_gives_no_evidence_and_all_the_keys(world, clean_result):
    result = clean_result
    assert result.code == 3
    answer = result.json
    conditions = {"checked", "data", "options", "controls"}
    assert set(answer) == COMMON | {"fingerprint", "alpha", "statistic", "detected", "suspects"} | conditions
    assert answer["fingerprint"] == fingerprint_of(world.key)
    assert (answer["alpha"], answer["detected"]) == (1e-4, False)
    (suspect,) = answer["suspects"]
    assert set(suspect) == SUSPECT_KEYS
    assert (suspect["path"], suspect["sha256"]) == (str(world.model), digest(world.model))
    assert (suspect["architecture"], suspect["classes_used"], suspect["method"]) == ("resnet10", 3, "white-box")
    assert suspect["log10_p"] == suspect["log10_p_corrected"]
    assert suspect["warnings"] == [] or "alignment" in suspect["warnings"][0]


def test_verify_tells_people_what_the_number_means(world):
    text = verify(world, world.model).out
    for part in ("no evidence", "resnet10", "alignment R²", "classes used", "log10 p", "mean cosine", "null  "):
        assert part in text
    assert keys.STATISTIC in text
    assert f"sha256:{fingerprint_of(world.key)}" in text
    assert "before the suspect" in text
    assert text.splitlines()[-1].startswith("next ")


def test_several_suspects_are_corrected(world, radioactive_model, clean_result):
    result = verify(world, world.model, radioactive_model, more=["--json"])
    assert result.code == 3
    answer = result.json
    assert answer["detected"] is False
    clean, guilty = answer["suspects"]
    assert [clean["detected"], guilty["detected"]] == [False, True]
    assert guilty["log10_p_corrected"] == pytest.approx(guilty["log10_p"] + np.log10(2))
    assert clean["log10_p_corrected"] == pytest.approx(max(clean["log10_p"], guilty["log10_p_corrected"]))
    assert all(s["log10_p_corrected"] >= s["log10_p"] for s in answer["suspects"])
    assert clean["log10_p"] == clean_result.json["suspects"][0]["log10_p"]  # whoever else is tested


def test_alpha_moves_the_verdict_and_not_the_number(world, clean_result):
    (a,) = clean_result.json["suspects"]
    (b,) = verify(world, world.model, more=["--json", "--alpha", 0.5]).json["suspects"]
    assert a["log10_p"] == b["log10_p"]
    assert b["detected"] == (b["log10_p"] <= np.log10(0.5))


def test_synthetic_images_serve_where_there_are_no_others(world, radioactive_model, few_synthetic):
    assert call("verify", radioactive_model, "--key", world.key).code == 0
    assert call("verify", world.model, "--key", world.key).code == 3


def test_a_manifest_restricts_the_classes(world, radioactive_model, tmp_path, few_synthetic):
    source = tmp_path / "imgs"
    shutil.copytree(world.imgs / "bee", source / "bee")
    shutil.copytree(world.imgs / "cat", source / "cat")
    mark(world, tmp_path / "out", source=source)
    manifest = tmp_path / "out.manifest.jsonl"
    answer = call("verify", radioactive_model, "--key", world.key, "--marked", manifest, "--json").json
    assert answer["suspects"][0]["classes_used"] == 2
    assert answer["detected"] is True
    assert answer["suspects"][0]["sets"] == 1  # which classes are marked is known, so that nothing is chosen
    page = tmp_path / "page.html"
    call("verify", radioactive_model, "--key", world.key, "--marked", manifest, "--report", page)
    assert "needs no correction for a choice among sets" in page.read_text()
    every = call("verify", radioactive_model, "--key", world.key, "--json").json["suspects"][0]
    assert (every["classes_used"], every["sets"]) == (3, 3)
    foreign = verify(world, radioactive_model, more=["--marked", manifest], key=world.numbered)
    assert foreign.code == 1
    assert fingerprint_of(world.key) in foreign.err
    assert fingerprint_of(world.numbered) in foreign.err
    assert verify(world, world.model, more=["--marked", tmp_path / "none"]).code == 1
    assert verify(world, world.model, more=["--marked", world.model]).code == 1


def test_marked_images_are_refused_for_the_alignment(world, marked_once, tmp_path):
    manifest = marked_once.with_name("out.manifest.jsonl")
    moved = shutil.copytree(marked_once, tmp_path / "elsewhere")
    for data, more in (
        (marked_once, []),
        (marked_once / "ant", []),
        (moved, ["--marked", manifest]),
    ):
        result = bad("verify", world.model, "--key", world.key, "--data", data, *more)
        assert "is marked" in result.err
        assert "unmarked" in result.err


def test_the_current_folder_can_be_the_data(world, monkeypatch, marked_once):
    monkeypatch.chdir(world.few)
    assert call("verify", world.model, "--key", world.key, "--data", ".").code == 3
    monkeypatch.chdir(marked_once / "ant")
    assert "is marked" in bad("verify", world.model, "--key", world.key, "--data", ".").err


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize("form", ["pickle", "torch", "nested"])
def test_a_hostile_pickle_is_not_run(world, tmp_path, form):
    sprung, suspect = tmp_path / "sprung", tmp_path / "suspect.pt"
    trap = Trap(sprung)
    if form == "pickle":
        suspect.write_bytes(pickle.dumps(trap))
    else:
        nested = {"model": load_network(world.model).module.state_dict(), "x": trap}
        torch.save(nested if form == "nested" else trap, suspect)
    answer = call("verify", suspect, "--key", world.key, "--data", world.few, "--json").json
    assert not sprung.exists()
    assert answer["command"] == "verify"
    if form == "nested":  # the weights are read, and the trap beside them does nothing
        assert answer["suspects"][0]["architecture"] == "resnet10"
    else:
        assert answer.keys() >= {"schema", "command", "version", "error", "hint"}
        assert str(suspect) in answer["error"] and answer["hint"]
    pickle.loads(pickle.dumps(trap))
    assert sprung.exists()  # the trap works


def test_files_that_are_no_models(world, tmp_path):
    whole = world.model.read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.safetensors").write_bytes(world.key.read_bytes()[:1000])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("cut.pt", "cut.safetensors", "empty.pt", "text.pt", "other.pt", "list.pt", "missing.pt", "."):
        result = bad("verify", tmp_path / name, "--key", world.key, "--data", world.few)
        assert str(tmp_path) in result.err
    assert "--arch" in bad("verify", tmp_path / "other.pt", "--key", world.key).err


def test_one_bad_suspect_among_good_ones_is_an_error(world, tmp_path):
    assert verify(world, world.model, tmp_path / "missing.pt", more=["--json"]).json["error"]


def test_a_network_from_the_user_s_own_file(world, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def net(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "                         nn.Linear(16, num_classes))\n"
        "def broken():\n"
        "    raise ValueError('no')\n"
    )
    network = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "m.pth")
    own = f"{tmp_path / 'mine.py'}:net"
    assert "--arch" in verify(world, tmp_path / "m.pth").err
    result = verify(world, tmp_path / "m.pth", more=["--arch", own, "--image-size", 32, "--json"])
    assert f"note: --arch runs the code in {own.rpartition(':')[0]}" in result.err
    assert result.code == 3, result.err
    (suspect,) = result.json["suspects"]
    assert suspect["architecture"] == own
    assert suspect["classes_used"] == 3
    assert any("assumed" in warning for warning in suspect["warnings"])
    told = ["--mean", "0.5,0.5,0.5", "--std", "0.2,0.2,0.2"]
    sure = verify(world, tmp_path / "m.pth", more=["--arch", own, "--image-size", 32, *told, "--json"]).json
    assert not any("assumed" in warning for warning in sure["suspects"][0]["warnings"])
    for wrong in (
        f"{tmp_path / 'mine.py'}:none",
        f"{tmp_path / 'none.py'}:net",
        f"{tmp_path / 'mine.py'}:broken",
        "x9",
    ):
        assert verify(world, tmp_path / "m.pth", more=["--arch", wrong]).code == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:No complete tensor")
def test_a_program_is_verified_as_its_weights_are(world, tmp_path):
    module, example = load_network(world.model).module.eval(), torch.rand(2, 3, 32, 32)
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    torch.jit.save(torch.jit.trace(module, example), tmp_path / "script.pt")
    torch.export.save(torch.export.export(module, (example,)), tmp_path / "export.pt2")
    found = verify(world, *(tmp_path / name for name in ("weights.pt", "script.pt", "export.pt2")), more=["--json"])
    weights, script, export = ({**suspect, "path": "", "sha256": ""} for suspect in found.json["suspects"])
    assert weights == script == export
    assert weights["architecture"] == "resnet10"


@pytest.mark.parametrize(
    "more", [["--mean", "garbage"], ["--mean", "1,2"], ["--std", "0,1,1"], ["--std", "nan,1,1"], ["--mean", "inf,0,0"]]
)
def test_a_normalisation_that_is_none(world, more):
    result = bad("verify", world.model, "--key", world.key, *more, "--json", code=2)
    assert result.json["schema"] == 1
    assert more[0] in result.json["error"]


def test_a_key_of_other_classes_does_not_fit(world, tmp_path):
    good("keygen", "-o", tmp_path / "two.safetensors", "--classes", 2)
    result = verify(world, world.model, key=tmp_path / "two.safetensors")
    assert result.code == 1
    assert "does not fit" in result.err


# ---------------------------------------------------------------- how all of them speak


def test_quiet_says_nothing(world, forks, tmp_path, radioactive_model):
    for arguments in (
        ("keygen", "-o", tmp_path / "k.safetensors", "--classes", 3),
        ("mark", world.imgs, "--key", tmp_path / "k.safetensors", "-o", tmp_path / "out", "--steps", 1),
        ("train-demo", world.imgs, "-o", tmp_path / "m.pt", "--arch", "resnet10", "--epochs", 1),
        ("verify", radioactive_model, "--key", world.key, "--data", world.few),
    ):
        result = forks.run(*arguments, "-q")
        assert (result.code, result.out, result.err) == (0, "", ""), arguments[0]
    failed = forks.run("keygen", "-o", tmp_path / "k.safetensors", "-q")
    assert failed.err.startswith("error: ")
    found = forks.run("verify", radioactive_model, "--key", world.key, "--data", world.few, "-q", "--json")
    assert found.json["detected"] is True
    assert found.err == ""


def test_progress_goes_to_stderr_and_results_to_stdout(world, forks, tmp_path):
    command = ("mark", world.imgs, "--key", world.key, "-o", tmp_path / "out", "--steps", 1)
    result = forks.run(*command)
    assert "planning" in result.err
    assert "planning" not in result.out
    assert ESCAPE not in result.out + result.err
    assert len(result.out.splitlines()) == 11


def on_terminal(world, forks, tmp_path, **env):
    """What a terminal gets to see of mark's stderr."""
    import pty

    master, slave = pty.openpty()
    try:
        command = ("mark", world.imgs, "--key", world.key, "-o", tmp_path / "out", "--steps", 1, "--batch-size", 4)
        begun = forks.start(*command, err=os.ttyname(slave), **env)
        os.set_blocking(master, False)
        code = forks.end(begun).code
        seen = b""
        with contextlib.suppress(BlockingIOError):
            while block := os.read(master, 65536):
                seen += block
        assert code == 0, seen.decode()
    finally:
        os.close(slave)
        os.close(master)
    return seen.decode()


def test_a_terminal_gets_a_progress_bar_and_colour_only_if_it_wants(world, forks, tmp_path):
    colours = re.compile(r"\x1b\[[0-9;]*(3[0-9]|4[0-9]|9[0-9])[0-9;]*m")
    plain = on_terminal(world, forks, tmp_path / "a", TERM="xterm-256color", NO_COLOR="1")
    assert "images" in plain
    assert "PSNR" in plain
    assert plain.count("planning") > 1  # the bar shows it, too
    assert not colours.search(plain)
    dumb = on_terminal(world, forks, tmp_path / "b", TERM="dumb")
    assert ESCAPE not in dumb
    assert "planning" in dumb


def test_the_rate_counts_from_where_marking_begins(monkeypatch):
    now, pace, summary = 1000.0, cli._Pace(), Summary(images=20)
    monkeypatch.setattr(cli.time, "monotonic", lambda: now)
    marked = {"status": "marked", "psnr": 40.0, "ssim": 1.0, "linf": 1.0, "gain": 0.0}
    for row in (marked, marked, {"status": "copied"}):  # as an earlier run left them, and a copy
        summary.add(row)
        summary.skipped += row is marked
        assert pace.told(summary) == ""
        now += 500
    assert pace.told(summary) == ""  # the first step begins
    now, summary.under_way = now + 2, 5.0
    assert pace.told(summary) == "2.5/s  PSNR 40.0 dB"
    now += 2
    for _ in range(8):
        summary.add(marked)
    assert pace.told(summary) == "2.0/s  PSNR 40.0 dB"


def test_a_terminal_that_knows_only_ascii(world, forks, tmp_path):
    run = spawn("keygen", "-o", tmp_path / "k.safetensors", "--classes", 3, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert run.returncode == 0, run.stderr
    assert "fingerprint" in run.stdout


def test_names_from_strangers_cannot_steer_the_terminal(world, tmp_path):
    source = shutil.copytree(world.imgs, tmp_path / "imgs")
    (source / "ant" / "\x1b[31mred\r.png").write_bytes(b"broken")
    result = mark(world, tmp_path / "out", source=source)
    assert result.code == 1
    assert ESCAPE not in result.err
    assert "\\x1b[31mred\\r.png" in result.err


def test_the_debug_variable_shows_the_traceback(world, tmp_path, monkeypatch):
    assert "Traceback" not in call("verify", tmp_path / "none.pt", "--key", world.key).err
    monkeypatch.setenv("RADIOTAG_DEBUG", "1")
    result = call("verify", tmp_path / "none.pt", "--key", world.key)
    assert "Traceback" in result.err
    assert "error: " in result.err


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 GB")])
def test_out_of_memory_says_what_to_do(world, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("radiotag.batches.mark_images", fail)
    result = bad("mark", world.imgs, "--key", world.key, "-o", tmp_path / "out")
    assert "out of memory" in result.err
    assert "--batch-size" in result.err


def test_what_nobody_foresaw_is_told_in_json_too(world, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("radiotag.batches.mark_images", fail)
    result = bad("mark", world.imgs, "--key", world.key, "-o", tmp_path / "out", "--json")
    assert "RuntimeError: first line" in result.json["error"]
    assert "RADIOTAG_DEBUG=1" in result.json["hint"]


def test_a_full_disk_is_named(world, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", str(tmp_path / "out" / "x"))

    monkeypatch.setattr("radiotag.stores.copy_atomically", full)
    assert "No space left" in mark(world, tmp_path / "out", "--fraction", 0.5).err


@pytest.mark.parametrize("more", [{}, pytest.param({"PYTHONUNBUFFERED": "1"}, marks=pytest.mark.slow)])
def test_who_has_read_enough_is_no_error(world, tmp_path, more):
    command = [sys.executable, "-m", "radiotag", "mark", world.imgs, "--key", world.key, "-o", tmp_path / "out"]
    with subprocess.Popen(
        [*map(str, command), "--dry-run"],
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.close()
        assert process.stderr.read().splitlines() == ["planning …"]
    assert process.returncode == 1
