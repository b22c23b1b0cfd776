"""What the README and the measurements' text say is what was measured, and the README's commands exist."""

import json
import math
import re
import statistics
from pathlib import Path

import pytest

from radiotag import demo
from radiotag.keys import STATISTIC

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CARD = (ROOT / "radiotag/builtin.md").read_text(encoding="utf-8")
CARD_PROSE = " ".join(CARD.split())
TEXT = README + (ROOT / "tests/benchmarks/README.md").read_text(encoding="utf-8")  # the summary and all of it
PROSE, ROWS = " ".join(TEXT.split()), TEXT.replace("*", "").splitlines()
RESULTS = json.loads((ROOT / "tests/benchmarks/results/evidence.json").read_text(encoding="utf-8"))
PAPER = json.loads((ROOT / "tests/benchmarks/results/paper.json").read_text(encoding="utf-8"))
MARKING = json.loads((ROOT / "tests/benchmarks/results/marking.json").read_text(encoding="utf-8"))
NETWORKS = json.loads((ROOT / "tests/benchmarks/results/networks.json").read_text(encoding="utf-8"))
BY_NAME = {run["experiment"]: run for run in PAPER["runs"]}
OF_RESNET10 = [run for run in RESULTS["runs"] if run["train"]["architecture"] == "resnet10"]
TESTS = ("bare", "real", "black-box", "originals")
SHIPPED = "0.4"  # the version whose built-in network ships


def minus(value, digits=2):
    return f"{value:.{digits}f}".replace("-", "−")


def version(run):
    """Of radiotag, whose built-in network marked and whose statistic judged."""
    return ".".join(run["versions"]["radiotag"].split(".")[:2])


def row_of_all(run):
    share = f"{100 * run['fraction']:.0f} %" + "".join(f" of {name}" for name in run.get("classes", ()))
    paper, clean = run["suspect, real"]["paper_log10_p"], [run.get(f"clean, {test}") for test in TESTS]
    return [
        run["train"]["architecture"], share, str(run["train"]["epochs"]),
        f"{run['seed']}" + (f", key {run['owner']}" if run.get("owner") else ""),
        f"{100 * run['train']['accuracy']:.2f} %",
        *(minus(found["log10_p"]) if found else "" for found in (run.get(f"suspect, {test}") for test in TESTS)),
        minus(paper),
        " / ".join(minus(test["log10_p"]) for test in clean) if all(clean) else "",
    ]  # fmt: skip


@pytest.mark.parametrize("run", RESULTS["runs"], ids=lambda run: " ".join(row_of_all(run)[:4]))
def test_every_row_of_the_table_is_a_measurement(run):
    assert f"| {' | '.join(row_of_all(run))} |" in ROWS


def a_tenth_marked():
    """The run of a tenth of all classes, by what ships."""
    (run,) = (run for run in OF_RESNET10 if run["fraction"] == 0.1 and not run["classes"])
    return run


def test_the_other_figures_are_measurements_too():
    run = a_tenth_marked()
    assert f"Its accuracy is {100 * run['train clean']['accuracy']:.2f} %" in PROSE
    assert f"p = {run['clean, bare']['calibration']['ks_p']:.2f}" in PROSE
    assert run["mark"]["skipped"] == 0
    assert f"Marking {run['mark']['marked']:,} images took {run['mark']['seconds']:.0f} s" in PROSE
    assert f"training a suspect {run['train']['seconds']:,.0f} s" in PROSE
    assert f"a verification {run['suspect, bare']['seconds']:.0f} s without data" in PROSE
    assert f"and {run['suspect, real']['seconds']:.0f} s with it" in PROSE
    assert f"a black-box one {run['suspect, black-box']['seconds']:.0f} s" in PROSE
    psnr = [run["psnr_median"] for run in RESULTS["runs"]]
    assert f"PSNR median {min(psnr):.1f} to {max(psnr):.1f} dB" in PROSE
    gave = [minus(run[f"student, {test}"]["log10_p"]) for test in TESTS]
    assert "{} without data, {} with it, {} black-box, {} with the originals; its".format(*gave) in PROSE
    assert f"nothing but such a model's answers has log10 p = {gave[1]} (" in PROSE
    assert f"originals; its accuracy is {100 * run['train student']['accuracy']:.2f} %" in PROSE


def test_what_falls_short_is_said():
    (shorter, longer), fewer = ([run for run in OF_RESNET10 if run["fraction"] == q] for q in (0.02, 0.01))
    left = (minus(run["suspect, real"]["log10_p"]) for run in (shorter, longer))
    assert "left {} with real images in a suspect of six epochs and {} in one of sixteen".format(*left) in PROSE
    names = [("from scratch", "2 %"), *(("head only", f"{q} %") for q in (1, 2, 5, 10))]
    few, one, two, head, tenth = (cells_of(BY_SHARE[name])[2] for name in names)
    assert {len(BY_SHARE[name]) for name in names} == {3}  # as the text says
    assert f"and 10,000 images left {few} (the median of three keys)" in PROSE
    told = f"built-in network's features, 1 % left {one}, 2 % {two} and 5 % {head} (medians of three keys; "
    assert told in PROSE
    (hundred,) = BY_SHARE["100 classes, from scratch", "1 %"]
    assert f"nor does 1 % of 100 classes ({minus(hundred['real']['log10_p'])})." in PROSE
    names = ("vgg11_bn", "densenet121", "mobilenet_v3_large", "resnet50", "averaged", "digits, resnet10")
    assert "a vgg11_bn, a densenet121, a mobilenet_v3_large (medians of three keys) and a resnet50 (one)" in PROSE
    assert "in averaged weights (two) and of handwritten digits (three)" in PROSE
    assert [len(OTHERS[name]) for name in names] == [3, 3, 3, 1, 2, 3]
    assert min(statistics.median(run["real"]["log10_p"] for run in OTHERS[name]) for name in names) > -4
    told = f"has {tenth} where a tenth of CIFAR-10 was marked, and {head} where a twentieth was (medians of three keys)"
    assert told in PROSE
    middle = [minus(statistics.median(each[f"suspect, {test}"]["log10_p"] for each in fewer)) for test in TESTS]
    assert "medians {} without data, {} with it, {} black-box, {} with the originals".format(*middle) in PROSE


def test_the_demonstration_is_a_run_of_it():
    size = demo.Size()
    assert RESULTS["demo"]["marked"] == size.images * size.fraction and version(RESULTS["demo"]) == SHIPPED
    assert f"{RESULTS['demo']['marked']} of {size.images} marked ({RESULTS['demo']['psnr_median']:.1f} dB)" in README
    for name in ("clean", "radioactive"):
        line = next(line for line in README.splitlines() if line.startswith(f"{name}.pt"))
        assert f"{RESULTS['demo'][name]['log10_p']:.2f}" in line
        assert f"{RESULTS['demo'][name]['accuracy']:.1%}" in line


def test_what_is_told_first_is_measured():
    run = a_tenth_marked()
    left = (minus(run[f"suspect, {test}"]["log10_p"]) for test in ("real", "bare", "black-box"))
    told = "left log10 p = {} in a network trained from scratch, {} where verification had no data, and {} black-box,"
    assert told.format(*left) in " ".join(README.split()) and "--network builtin" in run["keygen"]["command"]
    found = run["suspect, black-box"]
    assert found["log10_p"] == pytest.approx(-10 * math.log10(found["decoys"] + 1))  # "the least that its decoys allow"
    assert f"{minus(found['log10_p'])} is the least that {found['decoys']} decoys allow" in PROSE


def test_one_image_in_a_hundred_leaves_what_is_said():
    every = [run for run in RESULTS["runs"] if run["classes"]]
    assert all((run["fraction"], len(run["classes"]), run["mark"]["marked"]) == (0.1, 1, 500) for run in every)
    assert len(every) == 5
    values = [[run[f"suspect, {test}"]["log10_p"] for run in every] for test in TESTS[:3]]
    middle = list(map(statistics.median, values))
    assert "medians {} without data, {} with it, and {} black-box".format(*map(minus, middle)) in PROSE
    assert max(middle[:2]) < -4  # "p below 1e-4"
    assert [sum(value > -4 for value in some) for some in values] == [2, 1, 4]  # "one of the five stays above"
    asked = [run["suspect, black-box"] for run in every]
    assert {found["decoys"] for found in asked} == {10_499}
    assert f"the least there is: {minus(-math.log10(10_500))}" in PROSE
    assert f"up to {max(found['seconds'] for found in asked):.0f} s" in PROSE


def formula(found):
    """log10 p of a suspect whose class vectors all have the mean cosines."""
    squares = 512 * found["mean_cosine"] * abs(found["mean_cosine"])
    squares += 51 * found["pattern_cosine"] * abs(found["pattern_cosine"])
    return -found["classes_used"] * squares / (2 * math.log(10))


def expected():
    """(classes, images a class, share, epochs) → verdicts of what ships, with real images."""
    found: dict = {}
    for run in OF_RESNET10:
        classes, epochs = "1 of 10" if run["classes"] else "10", str(run["train"]["epochs"])
        names = classes, "5,000", f"{100 * run['fraction']:.0f} %", epochs
        found.setdefault(names, []).append(run["suspect, real"])
    for run in PAPER["runs"]:
        if re.match(r"(100 classes, )?scratch/\d", run["experiment"]):
            classes = 100 if "100 classes" in run["experiment"] else 10
            names = str(classes), f"{run['images'] // classes:,}", f"{100 * run['share']:.0f} %", str(run["epochs"])
            found.setdefault(names, []).append(run["real"])
    return found


def row_expected(names, runs):
    m, n = (statistics.median(run[f"{kind}_cosine"] for run in runs) for kind in ("mean", "pattern"))
    middle = (statistics.median(map(formula, runs)), statistics.median(run["log10_p"] for run in runs))
    cosines, decimals = (f"{x:.3f}".replace("-", "−") for x in (m, n)), (minus(x, 1) for x in middle)
    return [*names, str(len(runs)), *cosines, *decimals]


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
    table, row = re.sub(r", (seed|key) \d$", "", each["experiment"]).split("/")
    row = NAMED.get(f"{table}/{row}", row)
    if table in SHARES or "100 classes" in table + row:
        name = SHARES.get(table, row if "100 classes" in row else f"100 classes, {row}")
        BY_SHARE.setdefault((name, f"{100 * each['share']:.0f} %"), []).append(each)
    else:
        OTHERS.setdefault(f"digits, {row}" if table == "another set" else row, []).append(each)
OTHERS["resnet10"] = BY_SHARE["from scratch", "10 %"]
OTHERS["resnet10, nothing else"] = OTHERS["resnet10"][:2]  # the keys of what survives


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


def test_all_rows_are_of_the_declared_statistic():
    assert {run[test]["statistic"] for run in PAPER["runs"] for test in ("bare", "real")} == {STATISTIC}
    assert {version(run) for run in (*PAPER["runs"], *RESULTS["runs"])} == {SHIPPED}


@pytest.mark.parametrize("seed", [2, 3])
def test_the_null_is_measured(seed):
    """Clean suspects under 20,000 fresh keys: none of their p-values may be smaller more often than it says."""
    (run,) = (run for run in PAPER["runs"] if run["seed"] == seed and run["experiment"].startswith("scratch/clean"))
    for test, title in (("bare", "no `--data`"), ("real", "`--data cifar10/test`")):
        found = run[test]["calibration"]
        assert (found["n"], len(found["tail"]), run["share"]) == (20_000, 4, 0)
        cells = (f"seed {seed}, {title}", *(f"{count:,}" for count in found["tail"]))
        assert f"| {' | '.join(cells)} | {found['tail_p']:.2f} | {found['ks_p']:.2f} |" in TEXT
        assert min(found["tail_p"], found["ks_p"]) > 0.001


def test_what_a_mark_costs_is_measured():
    marked, clean = (
        " and ".join(f"{100 * BY_NAME[f'scratch/{name}{seed}']['accuracy']:.2f} %" for seed in ("", ", seed 3"))
        for name in ("10%", "clean")
    )
    assert f"they know {marked} of the test images, and {clean} where none is marked (two seeds)" in PROSE


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_suspect_is_a_measurement(name):
    runs = OTHERS[name]
    assert f"| {' | '.join((name, str(len(runs)), *cells_of(runs)))} |" in ROWS
    images = 0 if name.startswith("digits") else 10_000  # all there are
    share = 0.2 if name.endswith(", 20 % marked") else 0.1
    assert {(run["share"], run["images"], run["epochs"]) for run in runs} == {(share, images, 16)}
    assert [run["seed"] for run in runs] == [2, 3, 4][: len(runs)]


def test_what_survives_leaves_as_little_doubt_as_is_said():
    survivors = {n: runs for n, runs in OTHERS.items() if "survives/" in runs[0]["experiment"] and "average" not in n}
    assert (len(survivors), {len(runs) for runs in survivors.values()}) == (14, {2})  # keys
    left = [
        statistics.median(run[t]["log10_p"] for run in runs) for runs in survivors.values() for t in ("bare", "real")
    ]
    assert max(left) < -6 and "each leave p below 1e-6 where a tenth was marked (medians of two keys)" in PROSE
    before, jpeg = (cells_of(OTHERS[name])[2:0:-1] for name in ("resnet10, nothing else", "JPEG files stay JPEG"))
    told = "at quality 75, {} with real images and {} without are left of the {} and {} of the same marks as PNG"
    assert told.format(*jpeg, *before) in PROSE


def test_what_averaging_leaves_is_said():
    names = "resnet10, nothing else", "averaged", "averaged, 20 % marked"
    whole, average, fifth = every = [OTHERS[name] for name in names]
    assert [[run["seed"] for run in runs] for runs in every] == [[2, 3]] * 3
    assert f"leaves least: {cells_of(average)[2]} with real images, which is nothing to accuse with" in PROSE
    pattern = [statistics.median(run["real"]["pattern_cosine"] for run in runs) for runs in (whole, average)]
    told = "the mean cosine with the patterns falls from {:.2f} to {:.2f}, and log10 p goes with its square"
    assert told.format(*pattern) in PROSE
    assert f"Where a fifth was marked, {cells_of(fifth)[2]} is left, and {cells_of(fifth)[1]} without them" in PROSE
    assert f"The average knew {cells_of(average)[0]} of the test images instead of {cells_of(whole)[0]}" in PROSE


def test_what_other_architectures_leave_is_said():
    names = "resnet10", "resnet18", "vgg11_bn", "densenet121", "mobilenet_v3_large", "resnet50"
    assert [len(OTHERS[name]) for name in names] == [3, 3, 3, 3, 3, 1]  # keys
    accuracy, _, left = zip(*(cells_of(OTHERS[name])[:3] for name in names), strict=True)
    said = "a resnet10 has {}, a resnet18 {}, a vgg11_bn {}, a densenet121 {}, a mobilenet_v3_large {}, and a resnet50"
    assert said.format(*left) + f", which learnt {accuracy[-1]} of the test images, {left[-1]} (" in PROSE
    left = (minus(BY_NAME["scratch/10%, seed 4"][test]["log10_p"]) for test in ("real", "bare"))
    assert 'a third left {} with real images and {} without where "nothing else" was done'.format(*left) in PROSE
    every = {
        run["train"]["architecture"]: run["suspect, real"]["log10_p"] for run in RESULTS["runs"] if run["seed"] == 5
    }
    told = "a tenth left {} in a vgg11_bn, {} in a densenet121, and {} in a mobilenet_v3_large. Of 100 classes"
    names = "vgg11_bn", "densenet121", "mobilenet_v3_large"
    assert told.format(*(minus(every[name]) for name in names)) in PROSE
    names = "100 classes, from scratch", "100 classes, vgg11_bn", "100 classes, mobilenet_v3_large"
    hundred = [BY_SHARE[name, "10 %"][0] for name in names]
    said = "where a resnet10 has {}, a vgg11_bn has {} and a mobilenet_v3_large {}, and without real images {} and {}"
    bare = (minus(run["bare"]["log10_p"]) for run in hundred[1:])
    assert said.format(*(minus(run["real"]["log10_p"]) for run in hundred), *bare) in PROSE


def test_what_data_unknown_to_the_network_left_is_said():
    _, bare, real, _ = cells_of(OTHERS[NAMED["other data/tiny-imagenet-100"]])
    assert f"alone, left {real} with real images and {bare} without (a resnet10; medians of three keys)" in PROSE
    _, bare, real, _ = cells_of(BY_SHARE[NAMED["other data/cifar10"], "10 %"])
    assert f"by a network that knows CIFAR-10's classes alone, left {real} and {bare} (one). But" in PROSE
    digits, deeper = (OTHERS[f"digits, {name}"] for name in ("resnet10", "resnet18"))
    accuracy, bare, real, _ = cells_of(digits)
    told = f"a resnet10 from scratch has {bare} without data and {real} with it, a resnet18 {{}} and {{}} (medians of "
    assert told.format(*cells_of(deeper)[1:3]) in PROSE
    assert f"(PSNR {statistics.median(run['psnr'] for run in digits):.1f} dB, where 34 are allowed)" in PROSE
    assert f"told apart ({accuracy}) without it" in PROSE


def test_what_another_architecture_did_not_show_is_said():
    found = [run for run in NETWORKS["runs"] if run["arch"] == "regnet_y_400mf"]
    assert (len(found), {run["images"] for run in found}) == (9, {10_000})
    assert f"it learnt {100 * found[0]['accuracy']:.2f} % of the test images" in PROSE
    assert f"the lowest log10 p of the nine is {minus(min(run['real']['log10_p'] for run in found))}" in PROSE


CROPS = {"features alone": "40", "features, crops of 10 to 100 %": "10", "features, crops of 2 to 25 %": "2"}


@pytest.mark.parametrize("recipe", CROPS)
@pytest.mark.parametrize(("network", "title"), [("builtin", "built-in, 32 pixels"), ("wide", "wide, 64 pixels")])
def test_the_card_shows_what_other_crops_and_inputs_leave(network, title, recipe):
    cells = [title, f"{CROPS[recipe]} to {25 if '25' in recipe else 100} %"]
    for side, images, psnr in ((224, 20_000, 40), (32, 10_000, 34)):
        key = (network, recipe, side, images, psnr, "resnet10", 16, 0.1)
        names = "network", "recipe", "side", "images", "psnr", "arch", "epochs", "fraction"
        (run,) = (run for run in NETWORKS["sizes"] if tuple(run[name] for name in names) == key)
        cells += [minus(run["real"]["log10_p"]), minus(run["real"]["mean_cosine"], 3)]
        cells.append(f"{1e3 * run['seconds_per_image']:.0f}")
    assert f"| {' | '.join(cells)} |" in CARD.splitlines()
    wide = NETWORKS["robust"]["networks"]["wide"]
    assert f"it knows {100 * wide['accuracy']:.2f} % of the test images). Each of six owners" in CARD_PROSE


@pytest.mark.parametrize("name", NETWORKS["networks"])
def test_the_card_shows_what_each_candidate_left(name):
    shown = next(line for line in CARD.splitlines() if line.startswith(f"| {name} |"))
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


def cells_of_network(every, name):
    """Gain, and in each of two suspects log10 p and mean cosine, of two owners who marked by it."""
    runs = [[r for r in every if (r["network"], r["arch"]) == (name, arch)] for arch in ("resnet10", "resnet18")]
    assert [len(each) for each in runs] == [2, 2]
    cells = [" / ".join(f"{r['gain']:.2f}" for r in runs[0])]
    for each in runs:
        cells.append(" / ".join(minus(r["real"]["log10_p"]) for r in each))
        cells.append(" / ".join(minus(r["real"]["mean_cosine"], 3) for r in each))
    return cells


def test_the_card_shows_what_a_robust_network_does():
    found = NETWORKS["robust"]
    rows = CARD.splitlines()
    for name in ("both", "longer", "robust"):
        cells = [f"{100 * found['networks'][name]['accuracy']:.2f} %", *cells_of_network(found["runs"], name)]
        assert any(line.startswith(f"| {name} |") and line.endswith(f"| {' | '.join(cells)} |") for line in rows)
    shipped = found["networks"]["built-in"]
    stored = shipped["stored"]
    told = f"| Accuracy | {100 * shipped['accuracy']:.2f} % on the 15,000 test images of both, "
    assert told + f"{100 * stored['accuracy']:.2f} % as stored |" in CARD
    assert f"5.02 MB, read in {stored['seconds to read']:.2f} s |" in CARD
    assert round((ROOT / "radiotag/builtin.safetensors").stat().st_size / 1e6, 2) == 5.02
    assert f"({shipped['seconds'] / 60:.0f} minutes on one core with bfloat16)" in CARD
    names = "robust", "both", "built-in"
    robust, plain, ours = (f"{100 * found['networks'][name]['withstood']['0.25']:.0f} %" for name in names)
    assert f"It is right on {ours} of the images attacked so." in CARD_PROSE
    for name in ("both", "built-in"):
        assert f"| {' | '.join((name, *cells_of_network(found['shipped'], name)))} |" in rows
    assert f"on {robust} of 500 test images when these are attacked so (ten steps), `both` on {plain}." in CARD_PROSE


def test_the_card_shows_what_other_networks_left():
    robust = NETWORKS["robust"]
    found = robust["architectures"]
    for name in ("both", "built-in", "from the start", "googlenet"):
        accuracy = {**robust["networks"], **found["networks"]}[name]["accuracy"]
        cells = name, f"{100 * accuracy:.2f} %", *cells_of_network(found["runs"], name)
        assert f"| {' | '.join(cells)} |" in CARD.splitlines()
    both, ours = (
        [
            statistics.mean(
                run["real"]["mean_cosine"] for run in [*robust["shipped"], *found["runs"]]
                if (run["network"], run["arch"]) == (name, arch)
            )
            for arch in ("resnet10", "resnet18")
        ]
        for name in ("both", "built-in")
    )  # fmt: skip
    told = "averages {:.3f} in a resnet10 and {:.3f} in a resnet18, that of the built-in network {:.3f} and {:.3f}:"
    assert told.format(*both, *ours) in CARD_PROSE
    slow, fast = (
        1e3 * statistics.median(run["seconds_per_image"] for run in found["runs"] if run["network"] == name)
        for name in ("googlenet", "built-in")
    )
    assert f"({slow:.0f} ms an image for {fast:.0f})" in CARD
    small = found["networks"]["shufflenet_v2_x1_0"]
    told = f"as the googlenet, in {small['seconds'] / 60:.0f} minutes; it knows {100 * small['accuracy']:.2f} % of the"
    assert told in CARD_PROSE
    longer = found["networks"]["longer from the start"]
    assert f"{longer['seconds'] / 60:.0f} minutes on one core beside other work" in CARD_PROSE
    assert f"it knows {100 * longer['accuracy']:.2f} % of the test images" in CARD_PROSE


@pytest.mark.parametrize(
    ("name", "seed", "owners"),
    [
        ("built-in", 41, 5), ("from the start", 41, 5), ("built-in", 51, 5), ("longer from the start", 51, 5),
        ("built-in", 61, 3), ("shufflenet_v2_x1_0", 61, 3),
    ],
)  # fmt: skip
def test_the_card_shows_what_several_owners_left(name, seed, owners):
    found = NETWORKS["robust"]["architectures"]
    every = [run for run in found["several owners"] if (run["network"], run["seed"]) == (name, seed)]
    cells = [name, f"{statistics.mean(run['gain'] for run in every):.2f}"]
    for arch in ("resnet10", "resnet18"):
        runs = [run for run in every if run["arch"] == arch]
        cells.append(" / ".join(minus(run["real"]["log10_p"]) for run in runs))
        cells.append(minus(statistics.mean(run["real"]["mean_cosine"] for run in runs), 3))
        assert len(runs) == owners
    assert f"| {' | '.join(cells)} |" in CARD.splitlines()


def test_the_card_shows_what_a_robust_network_costs():
    before = {run["experiment"]: run for run in NETWORKS["robust"]["head only"]["rows"]}
    ours = {run["experiment"]: run for run in PAPER["runs"] if run["experiment"] in before}
    assert [name for name in before if "100 classes" not in name] == [f"head/{q}%" for q in (1, 2, 5, 10, 20)]
    assert len(before) == len(ours) == 7 and {run["real"]["statistic"] for run in before.values()} == {STATISTIC}
    for title, runs in (("both", before), ("built-in", ours)):
        cells = title, *(minus(runs[name]["real"]["log10_p"]) for name in before)
        assert f"| {' | '.join(cells)} |" in CARD.splitlines()


@pytest.mark.parametrize("test", ["bare", "real"])
@pytest.mark.parametrize("experiment", ["scratch/10%", "architectures/vgg11_bn"])
def test_the_card_shows_what_either_network_leaves_with_the_same_key(experiment, test):
    rows = (row for row in NETWORKS["robust"]["same key"]["rows"] if row["experiment"] == experiment)
    found = {row["verified_by"]: minus(row["log10_p"]) for row in rows if row["test"] == test}
    (run,) = (run for run in PAPER["runs"] if run["experiment"] == experiment)
    title = experiment.split("/")[1].replace("10%", "resnet10") + (", `--data`" if test == "real" else ", no `--data`")
    cells = title, found["both"], found["built-in"], minus(run[test]["log10_p"])
    assert f"| {' | '.join(cells)} |" in CARD.splitlines()


@pytest.mark.parametrize(
    ("experiment", "title"),
    [
        ("scratch/10%", "resnet10"), ("scratch/2%", "resnet10, 2 % marked"), ("scratch/clean", "resnet10, none marked"),
        *((f"architectures/{a}", a) for a in ("resnet18", "vgg11_bn", "densenet121", "mobilenet_v3_large")),
        ("survives/cropped", "cropped"), ("survives/averaged", "averaged"),
    ],
)  # fmt: skip
def test_the_card_shows_the_patterns_with_either_network(experiment, title):
    rows = [row for row in NETWORKS["robust"]["contrast"] if row["experiment"] == experiment]
    found = {(row["network"], row["test"]): f"{row['pattern_cosine']:.3f}" for row in rows}
    cells = [title, *(found[network, test] for test in ("bare", "real") for network in ("both", "robust"))]
    assert f"| {' | '.join(cells)} |" in CARD.splitlines()
    if title in {"resnet18", "vgg11_bn"}:
        more = (found["more robust", test] for test in ("bare", "real"))
        assert "{} and {} of the ".format(*more) + title in CARD_PROSE


def test_larger_images_are_measured():
    runs = MARKING["large"]
    assert [(run["images"], run["side"], run["fraction"], run["psnr"]) for run in runs] == [(20_000, 224, 0.1, 40)] * 2
    assert {version(run) for run in runs} == {SHIPPED}
    assert "log10 p with these: {} and {}".format(*(minus(run["real"]["log10_p"]) for run in runs)) in PROSE
    assert "patterns {:.3f} and {:.3f})".format(*(run["real"]["pattern_cosine"] for run in runs)) in PROSE
    assert f"knows {100 * runs[0]['accuracy']:.2f} % of the held-out images" in PROSE
    assert f"median {statistics.mean(run['psnr_median'] for run in runs):.1f} dB" in PROSE


def test_speed_and_scale_are_measurements():
    speed, scale = MARKING["speed"], MARKING["scale"]
    assert {version(MARKING[name]) for name in ("speed", "step", "scale")} == {SHIPPED}
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
