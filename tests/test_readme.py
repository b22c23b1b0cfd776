"""What the README and the measurements' text say is what was measured, and the README's commands exist."""

import json
import math
import re
import statistics
from pathlib import Path

import pytest

from radiotag import demo
from radiotag.radioactive import STATISTIC

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXT = README + (ROOT / "tests/benchmarks/README.md").read_text(encoding="utf-8")  # the summary and all of it
PROSE, ROWS = " ".join(TEXT.split()), TEXT.replace("*", "").splitlines()
RESULTS = json.loads((ROOT / "tests/benchmarks/results/evidence.json").read_text(encoding="utf-8"))
ALONE = json.loads((ROOT / "tests/benchmarks/results/features_alone.json").read_text(encoding="utf-8"))
PAPER = json.loads((ROOT / "tests/benchmarks/results/paper.json").read_text(encoding="utf-8"))
MARKING = json.loads((ROOT / "tests/benchmarks/results/marking.json").read_text(encoding="utf-8"))
NETWORKS = json.loads((ROOT / "tests/benchmarks/results/networks.json").read_text(encoding="utf-8"))
BEFORE = json.loads((ROOT / "tests/benchmarks/results/bare_before.json").read_text(encoding="utf-8"))
TESTS = ("bare", "real", "black-box", "originals")


def minus(value, digits=2):
    return f"{value:.{digits}f}".replace("-", "−")


def statistic(verdict):
    """Of the statistic that gave a verdict; radiotag 0.1, which knew one only, did not always record it."""
    return "present" if verdict.get("statistic") == STATISTIC else "former"


def newest(runs):
    """(version, runs) of the present statistic, where there are any, else of the former one."""
    present = [run for run in runs if statistic(run["real"]) == "present"]
    return ("present", present) if present else ("former", list(runs))


def row_of_all(run):
    share = f"{100 * run['fraction']:.0f} %" + "".join(f" of {name}" for name in run.get("classes", ()))
    paper, clean = run["suspect, real"]["paper_log10_p"], [run.get(f"clean, {test}") for test in TESTS]
    return [
        share, str(run["train"]["epochs"]), f"{run['seed']}" + (f", key {run['owner']}" if run.get("owner") else ""),
        statistic(run["suspect, real"]),
        f"{100 * run['train']['accuracy']:.2f} %",
        *(minus(found["log10_p"]) if found else "" for found in (run.get(f"suspect, {test}") for test in TESTS)),
        minus(paper),
        " / ".join(minus(test["log10_p"]) for test in clean) if all(clean) else "",
    ]  # fmt: skip


@pytest.mark.parametrize("run", RESULTS["runs"], ids=lambda run: " ".join(row_of_all(run)[:3]))
def test_every_row_of_the_table_is_a_measurement(run):
    assert f"| {' | '.join(row_of_all(run))} |" in ROWS


def test_the_other_figures_are_measurements_too():
    run = next(run for run in RESULTS["runs"] if run["fraction"] == 0.1 and "train clean" in run)
    assert f"Its accuracy is {100 * run['train clean']['accuracy']:.2f} %" in PROSE
    assert f"p = {run['clean, bare']['calibration']['ks_p']:.2f}" in PROSE
    fresh = next(run for run in RESULTS["runs"] if (run["fraction"], run["seed"]) == (0.1, 3))
    assert fresh["mark"]["skipped"] == 0
    assert f"Marking {fresh['mark']['marked']:,} images took {fresh['mark']['seconds']:.0f} s" in PROSE
    assert f"training a suspect {fresh['train']['seconds']:,.0f} s" in PROSE
    assert f"a black-box one {fresh['suspect, black-box']['seconds']:.0f} s" in PROSE
    psnr = [run["psnr_median"] for run in RESULTS["runs"]]
    assert f"PSNR median {min(psnr):.1f} to {max(psnr):.1f} dB" in PROSE
    every = [run for run in RESULTS["runs"] if not run.get("classes") and statistic(run["suspect, real"]) == "former"]
    tenth, few, fewer = ([run for run in every if run["fraction"] == q] for q in (0.1, 0.02, 0.01))
    cosines = [f"{each['suspect, real']['pattern_cosine']:.2f}" for each in (tenth[0], *few)]
    assert "pattern is {} at 10 %, and {} at 2 % after six epochs, {} after sixteen".format(*cosines) in PROSE
    shares = [f"{each['suspect, bare']['log10_p'] / each['suspect, real']['log10_p']:.0%}" for each in tenth]
    assert f"there is {', '.join(shares[:-1])} and {shares[-1]} of".replace("%", " %") in PROSE
    middle = [minus(statistics.median(each[f"suspect, {test}"]["log10_p"] for each in fewer)) for test in TESTS]
    told = "medians {} without data, {} with it, {} black-box, {} with the originals".format(*middle)
    assert told in PROSE
    assert f"a verification {fresh['suspect, bare']['seconds']:.0f} s without data" in PROSE
    assert f"and {fresh['suspect, real']['seconds']:.0f} s with it" in PROSE
    taught = next(run for run in RESULTS["runs"] if "train student" in run)
    gave = [minus(taught[f"student, {test}"]["log10_p"]) for test in TESTS]
    assert "{} without data, {} with it, {} black-box, {} with the originals; its".format(*gave) in PROSE
    assert f"originals; its accuracy is {100 * taught['train student']['accuracy']:.2f} %" in PROSE
    before = (minus(run["suspect, bare"]["log10_p"]) for run in BEFORE["runs"])
    assert "Before, seed 2 had {}, and {} at 2 %".format(*before) in PROSE
    bare, real = (ALONE["steps"][f"radioactive, {images}"]["log10_p"] for images in ("synthetic", "real"))
    assert f"gave {minus(bare)} without data and {minus(real)} with it" in PROSE
    size = demo.Size()
    assert RESULTS["demo"]["marked"] == size.images * size.fraction
    assert f"{RESULTS['demo']['marked']} of {size.images} marked ({RESULTS['demo']['psnr_median']:.1f} dB)" in README
    for name in ("clean", "radioactive"):
        line = next(line for line in README.splitlines() if line.startswith(f"{name}.pt"))
        assert f"{RESULTS['demo'][name]['log10_p']:.2f}" in line
        assert f"{RESULTS['demo'][name]['accuracy']:.1%}" in line


def test_what_is_told_first_is_measured():
    every = (run for run in RESULTS["runs"] if statistic(run["suspect, real"]) == "present")
    (run,) = (run for run in every if not run["classes"])
    left = (minus(run[f"suspect, {test}"]["log10_p"]) for test in ("real", "bare", "black-box"))
    told = "left log10 p = {} in a network trained from scratch, {} where verification had no data, and {} black-box ("
    assert told.format(*left) in " ".join(README.split()) and run["fraction"] == 0.1 and not run["classes"]
    before = (minus(run["contrasted"][test]["log10_p"]) for test in ("real", "bare"))
    assert "(one run; {} and {} before the last change of the statistic".format(*before) in PROSE
    assert not run["machine"]["bfloat16"] and "--network builtin" in run["keygen"]["command"]


def test_one_image_in_a_hundred_leaves_what_is_said():
    every, spread = ([run for run in RESULTS["runs"] if bool(run.get("classes")) == one] for one in (True, False))
    assert all((run["fraction"], len(run["classes"]), run["mark"]["marked"]) == (0.1, 1, 500) for run in every)
    owners, present = (
        [run for run in every if statistic(run["suspect, real"]) == version] for version in ("former", "present")
    )
    found = [[run[f"suspect, {test}"]["log10_p"] for run in present] for test in ("bare", "real")]
    least = list(map(statistics.median, found))
    assert "By what ships: medians {} without data and {} with it.".format(*map(minus, least)) in PROSE
    assert [sum(value > -4 for value in values) for values in found] == [3, 1] and least[1] < -4  # "p below 1e-4"
    before = [statistics.median(run["contrasted"][test]["log10_p"] for run in present) for test in ("bare", "real")]
    assert "radiotag 0.2 had {} and {}, because".format(*map(minus, before)) in PROSE
    cosines = [statistics.median(run["suspect, real"]["pattern_cosine"] for run in runs) for runs in (present, owners)]
    assert "the cosine with the pattern is {:.2f} for {:.2f} with data".format(*cosines) in PROSE
    spread = [run for run in spread if run["fraction"] == 0.01]
    middle = [
        statistics.median(run[f"suspect, {test}"]["log10_p"] for run in runs)
        for runs in (owners, spread) for test in ("bare", "real")
    ]  # fmt: skip
    told = "medians {} without data and {} with it, where 500 images of all classes leave {} and {}."
    assert told.format(*map(minus, middle)) in PROSE
    *most, last = (minus(run["later, bare"]["log10_p"]) for run in owners)
    assert f"{', '.join(most)} and {last} with those in the column" in PROSE
    assert len(owners) == len(present) == 5
    missed = [[run["owner"] for run in owners if run[f"suspect, {test}"]["log10_p"] > -4] for test in ("bare", "real")]
    assert list(map(len, missed)) == [1, 1] and missed[0] != missed[1]  # "One of the five …, and another"
    asked = [run["suspect, black-box"] for run in owners]
    assert f"the median is {minus(statistics.median(found['log10_p'] for found in asked))}" in PROSE
    assert sum(found["log10_p"] > -2 for found in asked) == 1  # "one of the five is not found"
    assert sum(found["log10_p"] <= -4 for found in asked) == 2  # "two of the five reach 1e-4"
    earlier = [(run["owner"], found["images"], minus(found["log10_p"])) for run in owners
               for found in run.get("earlier, black-box", ())]  # fmt: skip
    assert earlier == [("1", 12, "−4.02"), ("1", 9, "−4.02"), ("2", 12, "−0.60")]
    assert f"up to {max(found['seconds'] for found in asked):.0f} s)" in PROSE
    assert {found["decoys"] for found in asked} == {10_499}
    assert f"the least there is: {minus(-math.log10(10_500))}" in PROSE
    (both,) = (found for found in asked if found["threads"] == 2)
    assert f"it took {both['seconds']:.0f} s on two cores" in PROSE and both["seconds"] < 300


def formula(found):
    """log10 p of a suspect whose class vectors all have the mean cosines."""
    squares = 512 * found["mean_cosine"] * abs(found["mean_cosine"])
    squares += 51 * found["pattern_cosine"] * abs(found["pattern_cosine"])
    return -found["classes_used"] * squares / (2 * math.log(10))


def expected():
    """(classes, images a class, share, epochs) → verdicts of the present statistic, with real images."""
    found: dict = {}
    for run in RESULTS["runs"]:
        classes, epochs = "1 of 10" if run.get("classes") else "10", str(run["train"]["epochs"])
        names = classes, "5,000", f"{100 * run['fraction']:.0f} %", epochs
        found.setdefault(names, []).append(run["suspect, real"])
    for run in PAPER["runs"]:
        if re.match(r"(100 classes, )?scratch/\d", run["experiment"]):
            classes = 100 if "100 classes" in run["experiment"] else 10
            names = str(classes), f"{run['images'] // classes:,}", f"{100 * run['share']:.0f} %", str(run["epochs"])
            found.setdefault(names, []).append(run["real"])
    present = {names: [run for run in runs if statistic(run) == "present"] for names, runs in found.items()}
    return {names: runs for names, runs in present.items() if runs}


def row_expected(names, runs):
    m, n = (statistics.median(run[f"{kind}_cosine"] for run in runs) for kind in ("mean", "pattern"))
    middle = (statistics.median(map(formula, runs)), statistics.median(run["log10_p"] for run in runs))
    return [
        *names,
        str(len(runs)),
        *(f"{x:.3f}".replace("-", "−") for x in (m, n)),
        *(f"{x:.1f}".replace("-", "−") for x in middle),
    ]


@pytest.mark.parametrize("names", expected(), ids=" ".join)
def test_what_to_expect_follows_from_the_runs_and_the_formula(names):
    cells = row_expected(names, expected()[names])
    assert f"| {' | '.join(cells)} |" in README.replace("*", "").splitlines()


def test_the_recipes_for_marking_are_measurements():
    rows = {}
    for run in MARKING["runs"]:
        alone = len(set(run["suspect"].split("+"))) == 1
        rows.setdefault((alone or run["suspect"], run["recipe"], run["psnr"]), []).append(run)
    shown = [re.sub(r": ¾[^|]*(?= \|)|\*", "", line) for line in TEXT.splitlines()]
    for (_, recipe, _), runs in rows.items():
        psnr, seconds = (statistics.median(run[name] for run in runs) for name in ("psnr_median", "seconds_per_image"))
        found = " / ".join(minus(run["real"]["log10_p"]) for run in runs)
        assert f"| {recipe} | {psnr:.1f} dB | {found} | {1e3 * seconds:.0f} |" in shown
    for psnr in (34, 37, 40):
        ours, papers = (
            statistics.mean(
                run["real"]["log10_p"] for run in MARKING["runs"] if (run["recipe"], run["psnr"]) == (name, psnr)
            )
            for name in ("radiotag", "paper")
        )
        assert ours / papers >= 6
    ours = {(run["psnr"], run["seed"]): [] for run in MARKING["runs"] if run["recipe"] == "radiotag"}
    for run in MARKING["runs"]:
        if run["recipe"] == "radiotag":
            ours[run["psnr"], run["seed"]].append(minus(run["real"]["log10_p"]))
    same, keys = (ours[40, 5][1], ours[40, 6][1]), ours[34, 6]
    assert (
        "the same marks left {} in one suspect and {} in another, and two keys {} and {}.".format(*same, *keys) in PROSE
    )
    several = {run["seed"]: run["accuracy"] for run in MARKING["runs"] if "paper@37" in run["suspect"]}
    accuracy = " and ".join(f"{100 * value:.2f} %" for value in several.values())
    assert f"(accuracy {accuracy})" in PROSE
    second = next(run["second"] for run in MARKING["runs"] if run["recipe"] == "two networks")
    assert f"knows {100 * second['accuracy']:.2f} % of the test images" in PROSE


SHARES = {
    "head": "head only", "scratch": "from scratch",
    "100 classes, head": "100 classes, head only", "100 classes, scratch": "100 classes, from scratch",
}  # fmt: skip
NAMED = {"other data/tiny-imagenet-100": "marked by a network of Tiny ImageNet alone",
         "other data/cifar10": "100 classes, marked by a network of CIFAR-10 alone"}  # fmt: skip
BY_SHARE: dict = {}
OTHERS: dict = {}
for each in PAPER["runs"]:
    experiment = each["experiment"].split(", key")[0]
    table, row = experiment.split("/")
    row = NAMED.get(experiment, row)
    if table in SHARES or "100 classes" in table + row:
        name = SHARES.get(table, row if "100 classes" in row else f"100 classes, {row}")
        BY_SHARE.setdefault((name, f"{100 * each['share']:.0f} %"), []).append(each)
    else:
        OTHERS.setdefault(f"digits, {row}" if table == "another set" else row, []).append(each)
BY_SHARE = {(*name, version): runs for name, (version, runs) in ((name, newest(BY_SHARE[name])) for name in BY_SHARE)}
OTHERS = {name: newest(runs)[1] for name, runs in OTHERS.items()}
OTHERS["resnet10, nothing else"] = BY_SHARE["from scratch", "10 %", "present"]  # what the others are compared with


def cells_of(runs):
    tests = ("bare", "log10_p"), ("real", "log10_p"), ("real", "paper_log10_p")
    middle = [statistics.median(run[test][number] for run in runs) for test, number in tests]
    return f"{100 * statistics.median(run['accuracy'] for run in runs):.2f} %", *map(minus, middle)


@pytest.mark.parametrize("name", BY_SHARE, ids=" ".join)
def test_every_row_by_share_is_measured(name):
    runs = BY_SHARE[name]
    assert f"| {' | '.join((*name, str(len(runs)), *cells_of(runs)))} |" in ROWS
    wanted = (20_000 if "100 classes" in name[0] else 10_000, 16) if "head" not in name[0] else (0, 4)
    assert {(run["images"], run["epochs"]) for run in runs} == {wanted}
    assert len({run["experiment"] for run in runs}) == len(runs)


def test_the_null_is_measured():
    """The clean suspect under 20,000 fresh keys: none of its p-values may be smaller more often than it says."""
    run = next(run for run in PAPER["runs"] if run["experiment"] == "scratch/clean, key 2")
    for test, title in (("bare", "no `--data`"), ("real", "`--data cifar10/test`")):
        found = run[test]["calibration"]
        assert (found["n"], len(found["tail"]), run["share"]) == (20_000, 4, 0)
        cells = (title, *(f"{count:,}" for count in found["tail"]), f"{found['tail_p']:.2f}", f"{found['ks_p']:.2f}")
        assert f"| {' | '.join(cells)} |" in TEXT
        assert min(found["tail_p"], found["ks_p"]) > 0.001


def test_what_a_mark_costs_is_measured():
    marked, clean = (f"{100 * BY_SHARE['from scratch', f'{q} %', 'present'][0]['accuracy']:.2f} %" for q in (10, 0))
    others = (
        f"{100 * next(run for run in PAPER['runs'] if run['experiment'] == name)['accuracy']:.2f} %"
        for name in ("scratch/10%", "scratch/clean")
    )
    told = f"it knows {marked} of the test images, and {clean} where none is marked; under the other key"
    assert "{} (former statistic) {} and {}.".format(told, *others) in PROSE


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_suspect_is_a_measurement(name):
    (run,) = OTHERS[name]
    assert f"| {' | '.join((name, *cells_of([run])))} |" in ROWS and statistic(run["real"]) == "present"
    images = 0 if name.startswith("digits") else 10_000  # all there are
    assert (run["share"], run["images"], run["epochs"], run["seed"]) == (0.1, images, 16, 2)


def test_what_survives_leaves_as_little_doubt_as_is_said():
    (average,), (before,) = OTHERS["averaged"], OTHERS["resnet10, nothing else"]
    other = next(run for run in PAPER["runs"] if run["experiment"] == "survives/averaged")
    survivors = {
        name: runs[0] for name, runs in OTHERS.items() if "survives/" in runs[0]["experiment"] and name != "averaged"
    }
    left = [run[test]["log10_p"] for run in survivors.values() for test in ("bare", "real")]
    assert len(survivors) == 14
    accuracy = "{:.2f} % of the test images instead of {:.2f} %"
    told = "leaves least: {}, and {} under another key by radiotag 0.1's statistic, which is nothing"
    least = [run["real"]["log10_p"] for run in (average, other)]
    assert told.format(*map(minus, least)) in PROSE and least[0] < -4 < least[1]
    assert accuracy.format(100 * average["accuracy"], 100 * before["accuracy"]) in PROSE
    assert max(left) < -6  # "p below 1e-6"
    stay = survivors["JPEG files stay JPEG"]
    kept = [minus(run[test]["log10_p"]) for run in (stay, before) for test in ("real", "bare")]
    told = "at quality 75, {} with real images and {} without are left of the {} and {} of the same marks as PNG"
    assert told.format(*kept) in PROSE
    taken = stay["not given back"]
    lost = (minus(taken[test]["log10_p"]) for test in ("real", "bare"))
    told = "Before, what the encoder takes was not given back, which left PSNR {:.1f} dB for {:.1f}, and {} and {}."
    assert told.format(taken["psnr"], stay["psnr"], *lost) in PROSE


def test_what_other_architectures_leave_is_said():
    names = "resnet10, nothing else", "resnet18", "vgg11_bn", "densenet121", "mobilenet_v3_large"
    runs = [OTHERS[name][0] for name in names]
    said = "real images a resnet10 has {}, a resnet18 {}, a vgg11_bn {}, a densenet121 {}, and a mobilenet_v3_large {},"
    assert said.format(*(minus(run["real"]["log10_p"]) for run in runs)) in PROSE
    least = min(run["bare"]["log10_p"] for run in runs[2:])
    assert f"without them the last three have {minus(least)} or more" in PROSE
    names = "100 classes, from scratch", "100 classes, vgg11_bn", "100 classes, mobilenet_v3_large"
    hundred = [BY_SHARE[name, "10 %", "present"][0] for name in names]
    said = "where a resnet10 has {}, a vgg11_bn has {} and a mobilenet_v3_large {}, and without real images neither"
    assert said.format(*(minus(run["real"]["log10_p"]) for run in hundred)) in PROSE
    assert min(run["bare"]["log10_p"] for run in hundred[1:]) > -4


DEVELOPMENT = ("architectures/vgg11_bn", "architectures/densenet121", "architectures/mobilenet_v3_large", "scratch/10%",
               "head/1%", "head/2%", "head/20%")  # fmt: skip


def row_compared(run):
    table, row = run["experiment"].split(", key")[0].split("/")
    star = " *" if f"{table}/{row}" in DEVELOPMENT else ""
    names = f"{SHARES.get(table, row)}{star}", f"{100 * run['share']:.0f} %"
    values = (minus(found[test]["log10_p"]) for test in ("bare", "real") for found in (run["before"], run))
    return [*names, *values]


@pytest.mark.parametrize("run", [run for run in PAPER["runs"] if "before" in run], ids=lambda run: run["experiment"])
def test_the_same_suspects_by_both_statistics(run):
    assert f"| {' | '.join(row_compared(run))} |" in TEXT.replace("**", "").splitlines()
    for test in ("bare", "real"):
        before, after = (found[test] for found in (run["before"], run))
        assert (before["statistic"], after["statistic"]) == ("response+ridge+pattern", STATISTIC)
        assert before["sha256"] == after["sha256"]
        assert before["command"] == after["command"].removesuffix(" --calibrate 20000")


def row_of_more(name, run):
    values = (minus(found[test]["log10_p"]) for test in ("bare", "real") for found in (run["fewer images"], run))
    return [*name[:2], *values]


@pytest.mark.parametrize("name", [name for name in BY_SHARE if "100 classes" in name[0]], ids=" ".join)
def test_what_more_images_of_many_classes_left_is_said(name):
    (run,) = BY_SHARE[name]
    assert f"| {' | '.join(row_of_more(name, run))} |" in TEXT.replace("**", "").splitlines()
    for test in ("bare", "real"):
        fewer, more = run["fewer images"][test], run[test]
        assert (fewer["sha256"], fewer["command"]) == (more["sha256"], more["command"])
        assert fewer["statistic"] == more["statistic"] == STATISTIC and more["radiotag"] == "0.3.1"


def test_every_suspect_that_was_looked_at_is_compared():
    compared = {run["experiment"].split(", key")[0] for run in PAPER["runs"] if "before" in run}
    assert set(DEVELOPMENT) < compared and "scratch/5%" in compared
    gained = {
        test: {run["experiment"].split(",")[0] for run in PAPER["runs"] if "before" in run and run["share"]
               and run[test]["log10_p"] < run["before"][test]["log10_p"]}
        for test in ("bare", "real")
    }  # fmt: skip
    marked = {name for name in compared if name != "scratch/clean"}
    assert marked == gained["bare"]
    assert marked - gained["real"] == {"head/1%", "head/2%"}
    tenth = [run for run in PAPER["runs"] if run["experiment"].startswith("scratch/10%") and "before" not in run]
    others = " and ".join(minus(run["real"]["log10_p"]) for run in tenth)
    assert f"two others left {others} by the former statistic" in PROSE
    (lucky,) = (run["before"]["real"] for run in PAPER["runs"] if run["experiment"] == "scratch/10%, key 2")
    shares = [run["real"]["log10_p"] / lucky["log10_p"] for run in tenth]
    assert "two others left some 70 % of its log10 p" in PROSE and all(0.65 < share < 0.75 for share in shares)


def test_what_the_last_step_changed_is_said():
    """The pattern or both, where radiotag 0.2 took both."""
    moved: dict = {True: [], False: []}
    for run in (*PAPER["runs"], *(run for run in RESULTS["runs"] if not run.get("classes"))):
        for test, before in run.get("contrasted", {}).items():
            after = run.get("fewer images", run)[test] if "experiment" in run else run[f"suspect, {test}"]
            assert (before["statistic"], after["statistic"]) == ("contrasted response+ridge+pattern", STATISTIC)
            assert before["sha256"] == after["sha256"]
            if run.get("share", run.get("fraction")):
                moved["head" in run.get("experiment", "")].append(after["log10_p"] - before["log10_p"])
    assert (len(moved[True]), len(moved[False])) == (10, 54)
    least, middle, most = (minus(value(moved[False])) for value in (min, statistics.median, max))
    head = (minus(value(moved[True])) for value in (min, max))
    assert f"from scratch by {least} to {most} (median {middle})" in PROSE
    assert "those whose last layer alone was trained by {} to {}".format(*head) in PROSE


def test_what_data_unknown_to_the_network_left_is_said():
    (run,), (unknown,) = (OTHERS[name] for name in ("digits, resnet10", NAMED["other data/tiny-imagenet-100"]))
    left = (minus(unknown[test]["log10_p"]) for test in ("real", "bare"))
    assert "alone, left {} with real images and {} without (a resnet10; one run)".format(*left) in PROSE
    left = (minus(run[test]["log10_p"]) for test in ("bare", "real"))
    assert "has {} without data and {} with it. Their black ground".format(*left) in PROSE
    assert f"(PSNR {run['psnr']:.1f} dB, where 34 are allowed)" in PROSE
    assert f"told apart ({100 * run['accuracy']:.2f} %)" in PROSE


def test_what_another_architecture_did_not_show_is_said():
    found = [run for run in NETWORKS["runs"] if run["arch"] == "regnet_y_400mf"]
    assert (len(found), {run["images"] for run in found}) == (9, {10_000})
    assert f"it learnt {100 * found[0]['accuracy']:.2f} % of the test images" in PROSE
    assert f"the lowest log10 p of the nine is {minus(min(run['real']['log10_p'] for run in found))}" in PROSE


@pytest.mark.parametrize("name", NETWORKS["networks"])
def test_the_card_shows_what_each_candidate_left(name):
    card = (ROOT / "radiotag/builtin.md").read_text(encoding="utf-8")
    shown = next(line for line in card.splitlines() if line.startswith(f"| {name} |"))
    assert [cell.strip() for cell in shown.strip("|").split("|")][3:] == [
        f"{100 * NETWORKS['networks'][name]['accuracy']:.2f} %",
        *(
            " / ".join(
                minus(run["real"]["log10_p"]) for run in NETWORKS["runs"]
                if (run["network"], run["data"], run["arch"]) == (name, data, "resnet18")
            )
            for data in ("cifar10", "tiny-imagenet-100")
        ),
    ]  # fmt: skip


def test_the_card_shows_what_a_robust_network_does():
    card, found = (ROOT / "radiotag/builtin.md").read_text(encoding="utf-8"), NETWORKS["robust"]
    rows, prose = card.splitlines(), " ".join(card.split())
    for name in ("built-in", "longer", "robust"):
        runs = [[r for r in found["runs"] if (r["network"], r["arch"]) == (name, a)] for a in ("resnet10", "resnet18")]
        assert [len(each) for each in runs] == [2, 2]
        cells = [f"{100 * found['networks'][name]['accuracy']:.2f} %", " / ".join(f"{r['gain']:.2f}" for r in runs[0])]
        for each in runs:
            cells.append(" / ".join(minus(r["real"]["log10_p"]) for r in each))
            cells.append(" / ".join(minus(r["real"]["mean_cosine"], 3) for r in each))
        assert any(line.startswith(f"| {name} |") and line.endswith(f"| {' | '.join(cells)} |") for line in rows)
    robust, plain = (f"{100 * found['networks'][name]['withstood']['0.25']:.0f} %" for name in ("robust", "built-in"))
    assert (
        f"on {robust} of 500 test images when these are attacked so (ten steps), the built-in network on {plain}."
        in prose
    )


@pytest.mark.parametrize(
    ("experiment", "title"),
    [
        ("scratch/10%", "resnet10"), ("scratch/2%", "resnet10, 2 % marked"), ("scratch/clean", "resnet10, none marked"),
        *((f"architectures/{a}", a) for a in ("resnet18", "vgg11_bn", "densenet121", "mobilenet_v3_large")),
        ("survives/cropped", "cropped"), ("survives/averaged", "averaged"),
    ],
)  # fmt: skip
def test_the_card_shows_the_patterns_with_either_network(experiment, title):
    cells, name, card = [title], f"{experiment}, key 2", (ROOT / "radiotag/builtin.md").read_text(encoding="utf-8")
    rows = [row for row in NETWORKS["robust"]["contrast"] if row["experiment"] == name]
    found = {(row["network"], row["test"]): f"{row['pattern_cosine']:.3f}" for row in rows}
    for test in ("bare", "real"):
        (run,) = (r for r in PAPER["runs"] if r["experiment"] == name and statistic(r[test]) == "present")
        cells += [f"{run[test]['pattern_cosine']:.3f}", found["robust", test]]
    assert f"| {' | '.join(cells)} |" in card.splitlines()
    if title in {"resnet18", "vgg11_bn"}:
        more = (found["more robust", test] for test in ("bare", "real"))
        assert "{} and {} of the ".format(*more) + title in " ".join(card.split())


def test_larger_images_are_measured():
    runs = MARKING["large"]
    assert [(run["images"], run["side"], run["fraction"], run["psnr"]) for run in runs] == [(20_000, 224, 0.1, 40)] * 2
    assert "log10 p with these: {} and {}".format(*(minus(run["real"]["log10_p"]) for run in runs)) in PROSE
    assert "patterns {:.3f} and {:.3f})".format(*(run["real"]["pattern_cosine"] for run in runs)) in PROSE
    assert f"knows {100 * runs[0]['accuracy']:.2f} % of the held-out images" in PROSE
    assert f"median {statistics.mean(run['psnr_median'] for run in runs):.1f} dB" in PROSE


def test_speed_and_scale_are_measurements():
    speed, scale = MARKING["speed"], MARKING["scale"]
    for name, title in (("cifar", "of CIFAR-10, built-in network"), ("photos", "photographs, ResNet-18 of 224 pixels")):
        each = speed[name]
        cells = (
            f"{each['images']:,} {title}", f"{each['plain_seconds']:.0f} s, {each['plain_psnr']:.1f} dB",
            f"{each['seconds']:.0f} s, {each['psnr']:.1f} dB", f"{each['ratio']:.1f}",
        )  # fmt: skip
        assert f"| {' | '.join(cells)} |" in TEXT.splitlines()
    steps = (f"{MARKING['step'][name]['ratio']:.2f} times" for name in ("cifar", "photos"))
    assert (
        "takes {} as long as a bare pass forward and back to the input on the small images, {} on".format(*steps)
        in PROSE
    )
    large, small = scale["200000"], scale["2000"]
    assert f"is planned in {large['plan_seconds']:.0f} s" in PROSE
    assert f"takes {large['mark_seconds']:.0f} s, to find them done {large['again_seconds']:.0f} s" in PROSE
    assert f"{large['megabytes']:.0f} MB of memory at most, against {small['megabytes']:.0f} MB" in PROSE


def test_the_three_lines_stand_as_promised():
    for line in (
        "radiotag keygen",
        "radiotag mark ./imgs --key k.safetensors",
        "radiotag verify model.pt --key k.safetensors",
    ):
        assert any(shown.split("#")[0].strip() == line for shown in README.splitlines())
