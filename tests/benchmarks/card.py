"""The tables of the built-in network's card, radiotag/builtin.md, from results/networks.json.

    python tests/benchmarks/card.py

The runs were made by `marking.py evidence --network` (and `paper.py`); their command lines are in the results file.
"""

import statistics

from tables import ROOT, Makers, Results, Run, lines, log_p, median, number, percent, slashed, write

DOCUMENT = ROOT / "radiotag/builtin.md"
SUSPECTS = ("resnet10", "resnet18")
OWNERS = ("gain", "resnet10: log10 p", "mean cosine", "resnet18: log10 p", "mean cosine")


def of(runs: list[Run], **wanted: object) -> list[Run]:
    """The runs of these settings."""
    return [run for run in runs if all(run[name] == value for name, value in wanted.items())]


def log_ps(runs: list[Run]) -> str:
    return slashed(log_p(run["real"]["log10_p"]) for run in runs)


def owners(runs: list[Run], network: str) -> list[str]:
    """The gain, then log10 p and mean cosine in each of two suspects, of all owners who marked by a network."""
    first, second = (of(runs, network=network, arch=arch) for arch in SUSPECTS)
    cells = [slashed(number(run["gain"]) for run in first)]
    for found in (first, second):
        cells += [log_ps(found), slashed(number(run["real"]["mean_cosine"], 3) for run in found)]
    return cells


def facts(results: Results) -> list[str]:
    """The built-in network's own figures."""
    found = results["networks"]["robust"]["networks"]["built-in"]
    rows = [
        ("accuracy on the 15,000 test images of both sets", percent(found["accuracy"])),
        ("accuracy as stored", percent(found["stored"]["accuracy"])),
        ("right on 500 test images that are attacked, as below", percent(found["withstood"]["0.25"], 0)),
        ("training, after `both`, on one core with bfloat16", f"{number(found['seconds'] / 60, 0)} minutes"),
        ("size", f"{number((ROOT / 'radiotag/builtin.safetensors').stat().st_size / 1e6)} MB"),
        ("read in", f"{number(found['stored']['seconds to read'])} s"),
    ]
    return lines(("the built-in network", "measured"), rows)


def candidates(results: Results) -> list[str]:
    """Marking networks among which the first was chosen."""
    trained = {"narrow": ("CIFAR-10", "8"), "t32": ("Tiny ImageNet, 32 px", "20"),
               "t64": ("Tiny ImageNet, 64 px", "20"), "both": ("both, 32 px", "8")}  # fmt: skip
    networks, runs = results["networks"]["networks"], results["networks"]["runs"]
    rows = []
    for name, about in trained.items():
        found = (of(runs, network=name, data=data, arch="resnet18") for data in ("cifar10", "tiny-imagenet-100"))
        rows.append([name, *about, percent(networks[name]["accuracy"]), *map(log_ps, found)])
    heads = "network", "trained on", "epochs", "accuracy", "suspects on CIFAR-10", "suspects on Tiny ImageNet"
    return lines(heads, rows)


def robust(results: Results) -> list[str]:
    """Two more epochs, on plain images or on adversarial ones."""
    found = results["networks"]["robust"]
    trained = {"both": "as above", "longer": "two more epochs", "robust": "two more epochs, on attacked images"}
    rows = (
        [name, about, percent(found["networks"][name]["accuracy"]),
         percent(found["networks"][name]["withstood"]["0.25"], 0), *owners(found["runs"], name)]
        for name, about in trained.items()
    )  # fmt: skip
    return lines(("network", "trained", "accuracy", "attacked", *OWNERS), rows)


def reference(results: Results) -> list[str]:
    """The patterns' mean cosine, by which network's answers are taken off the suspect's."""
    titles = {"scratch/10%": "resnet10", **{f"architectures/{name}": name for name in (
        "resnet18", "vgg11_bn", "densenet121", "mobilenet_v3_large")},
        "scratch/2%": "resnet10, 2 % marked", "survives/cropped": "cropped", "survives/averaged": "averaged",
        "scratch/clean": "resnet10, none marked"}  # fmt: skip
    found = {
        (row["experiment"], row["test"], row["network"]): number(row["pattern_cosine"], 3)
        for row in results["networks"]["robust"]["contrast"]
    }
    order = [(test, network) for test in ("bare", "real") for network in ("both", "robust")]
    rows = ([title, *(found[name, *which] for which in order)] for name, title in titles.items())
    return lines(("suspect", "no `--data`: both", "robust", "`--data`: both", "robust"), rows)


def shipped(results: Results) -> list[str]:
    """The built-in network beside the one before it."""
    runs = results["networks"]["robust"]["shipped"]
    return lines(("network", *OWNERS), ([name, *owners(runs, name)] for name in ("both", "built-in")))


def same_key(results: Results) -> list[str]:
    """The same key with either network."""
    again = results["networks"]["robust"]["same key"]["rows"]
    rows = []
    for name, arch in (("scratch/10%", "resnet10"), ("architectures/vgg11_bn", "vgg11_bn")):
        for test, title in (("bare", "no `--data`"), ("real", "`--data`")):
            (now,) = of(results["paper"]["runs"], experiment=name)
            by = {row["verified_by"]: row["log10_p"] for row in of(again, experiment=name, test=test)}
            rows.append([f"{arch}, {title}", *map(log_p, (by["both"], by["built-in"], now[test]["log10_p"]))])
    heads = ("suspect", "`both` marks and verifies", "`both` marks, the built-in network verifies",
             "the built-in network does both")  # fmt: skip
    return lines(heads, rows)


def head_only(results: Results) -> list[str]:
    """Suspects that keep the marking network's features."""
    before = {run["experiment"]: run for run in results["networks"]["robust"]["head only"]["rows"]}
    now = {run["experiment"]: run for run in results["paper"]["runs"] if run["experiment"] in before}
    heads = [name.replace("/", ", ").replace("%", " %").replace("head, ", "") for name in before]
    rows = ([title, *(log_p(runs[name]["real"]["log10_p"]) for name in before)]
            for title, runs in (("both", before), ("built-in", now)))  # fmt: skip
    return lines(("the last layer alone, marked", *heads), rows)


def architectures(results: Results) -> list[str]:
    """Other marking networks, two owners each."""
    known = results["networks"]["robust"]["networks"]
    found = results["networks"]["robust"]["architectures"]
    networks = {**known, **found["networks"]}
    names = ("both", "built-in", "from the start", "googlenet")
    rows = []
    for name in names:
        took = 1e3 * median(of(found["runs"], network=name), "seconds_per_image")
        accuracy = percent(networks[name]["accuracy"])
        rows.append([name, accuracy, *owners(found["runs"], name), number(took, 0)])
    return lines(("network", "accuracy", *OWNERS, "ms an image"), rows)


def several_owners(results: Results, pairs: list[tuple[str, int]]) -> list[str]:
    """Marking networks by name and seed, several owners each: all their log10 p, and means."""
    rows = []
    for name, seed in pairs:
        runs = of(results["networks"]["robust"]["architectures"]["several owners"], network=name, seed=seed)
        cells = [name, number(statistics.mean(run["gain"] for run in runs))]
        for arch in SUSPECTS:
            found = of(runs, arch=arch)
            cells += [log_ps(found), number(statistics.mean(run["real"]["mean_cosine"] for run in found), 3)]
        rows.append(cells)
    return lines(("network", *OWNERS), rows)


def five_owners(results: Results) -> list[str]:
    pairs = [("built-in", 41), ("from the start", 41), ("built-in", 51), ("longer from the start", 51)]
    return several_owners(results, pairs)


def three_owners(results: Results) -> list[str]:
    return several_owners(results, [("built-in", 61), ("shufflenet_v2_x1_0", 61)])


def sizes(results: Results) -> list[str]:
    """Crops and the network's input, at both ends of the images' sizes."""
    networks = {"builtin": "built-in, 32 pixels", "wide": "wide, 64 pixels"}
    recipes = {"features alone": "40 to 100 %", "features, crops of 10 to 100 %": "10 to 100 %",
               "features, crops of 2 to 25 %": "2 to 25 %"}  # fmt: skip
    rows = []
    for network, title in networks.items():
        for recipe, crops in recipes.items():
            cells = [title, crops]
            for side in (224, 32):
                (run,) = of(results["networks"]["sizes"], network=network, recipe=recipe, side=side)
                cells += [log_p(run["real"]["log10_p"]), number(run["real"]["mean_cosine"], 3)]
                cells.append(number(1e3 * run["seconds_per_image"], 0))
            rows.append(cells)
    heads = ("network, input", "crops", "224 pixels: log10 p", "mean cosine", "ms",
             "32 pixels: log10 p", "mean cosine", "ms")  # fmt: skip
    return lines(heads, rows)


TABLES: Makers = {
    "facts": facts, "candidates": candidates, "robust": robust, "reference": reference, "built-in": shipped,
    "same key": same_key, "head only": head_only, "architectures": architectures, "five owners": five_owners,
    "three owners": three_owners, "sizes": sizes,
}  # fmt: skip

if __name__ == "__main__":
    write(DOCUMENT, TABLES)
