"""The verification report: what its page says, that its numbers are the data's, and that no name can break it."""

import math
import re
import shlex
import string
import xml.etree.ElementTree as ET
from dataclasses import replace
from datetime import UTC, datetime
from fractions import Fraction
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scipy
import torch
from helpers import bad, call
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from radiotag import markup, report
from radiotag.errors import RadiotagError, printable
from radiotag.keys import load_key, new_key, save_key
from radiotag.networks import marking_weights, save_checkpoint
from radiotag.public import Checked, Conditions, public_half
from radiotag.verification import Calibration, ClassResult, Finding

NAMES = ("ant", "bee", "cat")
CREATED = datetime(2031, 2, 3, 4, 5, tzinfo=UTC)
COMMAND = ("radiotag", "verify", "my model.pt", "--key", "k.safetensors")
UNIFORM = Calibration(
    n=1000, ks_p=0.028, rank=7, histogram=(103, 95, 110, 88, 101, 97, 109, 99, 96, 102), tail=(103, 12, 1, 0),
    tail_p=0.5,
)  # fmt: skip
BEST = replace(UNIFORM, histogram=(60,) * 9 + (460,), tail=(60, 5, 0, 0), tail_p=1.0)
SKEWED = replace(UNIFORM, ks_p=1e-9, tail_p=0.0, histogram=(280,) + (80,) * 9, tail=(280, 70, 20, 5))
VOID = {"meta"}  # the only elements on the page that have no end


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A key of three named classes, and a suspect: the marking network with a head of chance."""
    root = tmp_path_factory.mktemp("place")
    key = new_key(*marking_weights("builtin"), NAMES)
    save_key(root / "k.safetensors", key)
    network = key.network()
    network.module.fc = nn.Linear(network.module.fc.in_features, 3)
    save_checkpoint(root / "model.pt", network.module, replace(network.spec, classes=3, class_names=NAMES))
    return root


@pytest.fixture(scope="module")
def key(place):
    return load_key(place / "k.safetensors")


def finding(**more):
    base = {
        "path": "model.pt", "sha256": "0f" * 32, "architecture": "resnet10", "log10_p": -5.7,
        "log10_p_corrected": -5.42, "detected": True, "paper_log10_p": -1.25, "mean_cosine": 0.1234,
        "pattern_cosine": 0.2, "alignment_r2": 0.53, "classes_used": 3, "sets": 1, "first_classes": 3,
        "method": "white-box", "warnings": (),
    }  # fmt: skip
    return Finding(**{**base, **more})


def black_box(**more):
    nothing = dict.fromkeys(("paper_log10_p", "mean_cosine", "pattern_cosine", "alignment_r2"))
    return finding(**nothing, method="black-box", decoys=23, **more)


def results(log10_p, names=None, carrier=None):
    return tuple(
        ClassResult(name=names and names[i], output=i, carrier=i + 7 if carrier is None else carrier, log10_p=value)
        for i, value in enumerate(log10_p)
    )


NOTHING = Conditions(checked=Checked(), data="synthetic", digest=None, images=None, options={"manifest": None})


def text_of(key, *findings, alpha=1e-4, command=COMMAND, conditions=NOTHING, controls=()):
    page = report.Page(
        findings=findings, key=key, alpha=alpha, command=command, created=CREATED, conditions=conditions,
        controls=controls,
    )  # fmt: skip
    return report.html(page)


class Tree(HTMLParser):
    """Builds the page's tree, and fails where a tag is not closed, or not in its turn."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.builder, self.open = ET.TreeBuilder(), []
        self.feed(page)
        self.close()
        assert not self.open
        self.root = self.builder.close()

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        self.builder.start(tag, dict(attrs))
        self.open.append(tag)
        if tag in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.builder.end(tag)

    def handle_data(self, data):
        if self.open:
            self.builder.data(data)


def tree(page):
    return Tree(page).root


def words(node):
    """The text of a part of a page, its spaces as a browser shows them."""
    return " ".join("".join(node.itertext()).split())


def facts_of(root):
    """Name → value of every table of names and values; the last one counts."""
    return {words(row[0]): words(row[1]) for row in root.iter("tr") if len(row) == 2 and row[0].get("scope") == "row"}


def numbers_of(root):
    """The rows of numbers of every other table."""
    return [[words(cell) for cell in row] for row in root.iter("tr") if row[0].tag == "td"]


# ---------------------------------------------------------------- numbers in words


@pytest.mark.parametrize(
    ("log10_p", "shown"), [(-0.3, "0.501"), (0, "1.000"), (-4, "1.0 × 10^-4"), (-1234.56, "2.8 × 10^-1235")]
)
def test_probabilities_as_people_write_them(log10_p, shown):
    assert report.probability(log10_p) == shown


@pytest.mark.parametrize(
    ("log10_p", "said"),
    [
        (0.0, "Most models without"), (math.log10(0.7), "Most models without"), (-0.3, "About every second model"),
        (math.log10(0.45), "About every second model"), (math.log10(1 / 3), "About every third model"),
        (math.log10(0.2), "About every fifth model"), (math.log10(0.101), "About every tenth model"),
        (-1.0, "at most once in 10 times"), (-2.0, "at most once in 100 times"), (-4.0, "at most once in 10,000 times"),
        (-5.42, "at most once in 260,000 times"), (-6.42, "at most once in 2.6 million times"),
        (-8.9, "at most once in 790 million times"), (-9.0, "at most once in 10^9 times"),
        (math.log10(1e-26), "at most once in 10^26 times"), (-1234.56, "at most once in 10^1234 times"),
    ],
)  # fmt: skip
def test_the_sentence_of_known_p_values(log10_p, said):
    assert said in report.sentence(log10_p)


@given(st.floats(-330, -1))
def test_the_sentence_never_makes_chance_rarer_than_it_is(log10_p):
    said = re.fullmatch(r"once in (10\^)?([\d.,]+)( million)? times", report.frequency(log10_p))
    value = Fraction(said[2].replace(",", ""))
    if said[1]:
        assert value <= -log10_p + 1e-8 and -log10_p < value + 1
    else:
        times = value * (10**6 if said[3] else 1)
        assert math.log10(times) <= -log10_p + 1e-8
        assert -log10_p < math.log10(times * Fraction(11, 10)) + 1e-8  # two digits
        assert len(said[2].replace(",", "").replace(".", "").strip("0")) <= 2


@given(st.floats(-0.9999, 0))
def test_the_sentence_of_a_p_value_that_says_nothing_is_the_nearest_whole_number(log10_p):
    said, times = report.sentence(log10_p), 10**-log10_p
    count = [i for i, name in enumerate(report.ORDINALS, 2) if f"every {name} model" in said] or [1]
    assert abs(count[0] - times) <= 0.5 + 1e-9


@pytest.mark.parametrize(("alpha", "said"), [(1e-4, "0.0001"), (0.05, "0.05"), (0.5, "0.5"), (1e-9, "1.0 × 10^-9")])
def test_thresholds_as_people_write_them(alpha, said):
    assert report.share(alpha) == said


@given(st.integers(-3000, 3000))
def test_raised_powers_keep_their_value(power):
    raised = report.raised(f"2.6 × 10^{power} of 3")
    back = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
    assert raised.removeprefix("2.6 × 10").removesuffix(" of 3").translate(back) == str(power)
    assert not set(raised) & {"^"}


# ---------------------------------------------------------------- the page


def everything():
    classes = results((-3.5, -0.2, -1.0), NAMES)
    return [
        finding(classes=classes, calibration=UNIFORM, warnings=("careful",)),
        finding(path="c.pt", detected=False, log10_p_corrected=-0.3, classes=results((-9.0,) * 60), calibration=SKEWED),
        finding(path="one.pt", alignment_r2=None, paper_log10_p=None, classes=results((-4.0, -0.1), carrier=0)),
    ]


@pytest.mark.parametrize("findings", [everything(), [black_box(), black_box(path="b.pt")], [finding()]])
def test_the_page_is_well_formed_and_says_what_it_is(key, findings):
    page = text_of(key, *findings)
    assert page.startswith('<!DOCTYPE html>\n<html lang="en">')
    root = tree(page)
    assert [part.tag for part in root] == ["head", "body"]
    assert "radiotag" in words(root.find("head/title"))
    levels = [int(part.tag[1]) for part in root.iter() if re.fullmatch("h[1-6]", part.tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b <= a + 1 for a, b in pairwise(levels))
    assert [part for part in root.iter("table") if not list(part.iter("th"))] == []
    assert all(part.get("scope") in {"row", "col"} for part in root.iter("th"))
    assert all(part.find("title") is not None for part in root.iter("svg") if part.get("role") == "img")


@pytest.mark.parametrize("findings", [everything(), [black_box()]])
def test_the_page_loads_nothing_and_runs_nothing(key, findings):
    page = text_of(key, *findings).lower()
    for sign in ("http:", "https:", "//", "src=", "href=", "url(", "@import", "<script", "<link", "<img", "javascript"):
        assert sign not in page, sign
    root = tree(page)
    assert not [name for part in root.iter() for name in part.keys() if name.startswith("on")]  # noqa: SIM118
    (policy,) = (part.get("content") for part in root.iter("meta") if "http-equiv" in part.keys())  # noqa: SIM118
    assert policy.startswith("default-src 'none'")


def test_the_style_serves_paper_and_telephones_and_the_eye():
    for said in ("@page { size: A4", "@media print", "break-inside: avoid", "@media (max-width", "overflow-x: auto"):
        assert said in markup.CSS, said
    assert markup.CSS.count("{") == markup.CSS.count("}")
    fill = re.findall(r"(?:[^-]color|fill): (#\w+)", markup.CSS)
    assert fill and min(contrast(colour) for colour in fill) > 7  # AAA of the web's guidelines


def contrast(colour):
    """With white, as the Web Content Accessibility Guidelines define it."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    values = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return 1.05 / (0.05 + float(np.dot(linear, (0.2126, 0.7152, 0.0722))))


def test_a_report_is_a_whole_page_that_no_name_can_break(key, tmp_path):
    bad_name = "a<b>[red]\x1b[31m\u202e\n&amp;\"'</td>.pt"
    shown = (
        finding(path=bad_name, architecture="</table><script>x", warnings=("[bold]careful<br>",), log10_p=-1234.56,
                log10_p_corrected=-1234.2, classes=results((-3.0, -1.0, -0.5), ("<i>", "a\x00b\x1b", "]]>&lt;"))),
        finding(path="c.pt", detected=False),
    )  # fmt: skip
    path = tmp_path / "page.html"
    report.write(
        path,
        report.Page(findings=shown, key=key, alpha=1e-4, command=("x", "<&\x1b"), created=CREATED, conditions=NOTHING),
    )
    page = path.read_text(encoding="utf-8")
    root = tree(page)
    said = words(root)
    for part in ("MARK DETECTED", "no evidence", "[red]", "[bold]careful<br>", "10⁻¹²³⁵", "Holm", "</table><script>x"):
        assert part in said, part
    assert [words(part) for part in root.iter("h3")][:2] == [printable(bad_name), "c.pt"]
    assert {row[0] for row in numbers_of(root)} == {"<i>", r"a\x00b\x1b", "]]>&lt;"}
    assert not set(page) & {chr(i) for i in range(32) if chr(i) != "\n"} and "\u202e" not in page
    assert "<script" not in page and "<i>" not in page and "a<b>" not in page


def test_any_text_of_strangers_comes_out_as_text(key):
    @settings(max_examples=100, deadline=None)
    @given(st.text(st.characters(exclude_categories=()), max_size=40))
    def attempt(name):
        page = text_of(key, finding(path=name, architecture=name, classes=results((-1.0,), (name,))))
        page.encode()
        cells = ["".join(cell.itertext()) for cell in tree(page).iter("td")]
        assert cells.count(printable(name)) >= 3

    attempt()


def test_text_is_made_harmless_wherever_it_stands():
    made = markup.element(
        "p", "a\x1b", "b\n", markup.element("b", "\x00"), "c\x07", "d\u2028", class_="x", text_anchor="end"
    )
    assert "".join(made.itertext()) == r"a\x1bb\n\x00c\x07d\u2028"
    assert made.attrib == {"class": "x", "text-anchor": "end"}
    assert markup.verbatim("one\x1b\ntwo\n\n").text == "one\\x1b\ntwo"


# ---------------------------------------------------------------- what it says


def test_the_page_begins_with_the_verdict_in_one_plain_sentence(key):
    root = tree(text_of(key, finding(), alpha=1e-4))
    assert words(root.find(".//h1")) == "Was this model trained on the marked data?"
    article = words(root.find(".//article"))
    assert article == (
        "model.pt MARK DETECTED A model without the marked data comes this far at most once in 260,000 times."
    )
    said = words(root)
    assert said.index("once in 260,000") < said.index("What was tested")
    assert "the corrected p-value is at most 0.0001 (once in 10,000 times)" in said
    assert "suspects were tested together" not in said and "it changes nothing" in said
    assert "does not mean that the marked data were not used" not in said


def test_several_suspects_each_have_a_verdict_and_the_correction_is_explained(key):
    findings = [finding(), finding(path="c.pt", detected=False, log10_p_corrected=-0.3, warnings=("one", "two"))]
    root = tree(text_of(key, *findings, alpha=0.001))
    first, second = (words(part) for part in root.iter("article"))
    assert "MARK DETECTED" in first and "no evidence" not in first
    assert "no evidence" in second and "About every second model" in second and "2 warnings below" in second
    said = words(root)
    assert words(root.find(".//h1")).startswith("Were these models")
    assert (
        "2 suspects were tested together" in said and "wrong accusation among all of them stays at most 0.001" in said
    )
    assert "does not mean that the marked data were not used" in said


def test_what_was_tested_is_told_in_full(key):
    shown = finding(warnings=("careful", "look"), sha256="0123456789abcdef" * 4)
    root = tree(text_of(key, shown))
    found = facts_of(root)
    expected = {
        "File": "model.pt", "SHA-256": "0123456789abcdef" * 4, "Network": "resnet10", "Method": "white-box",
        "Classes used": "3", "log10 p": "-5.70", "p, corrected": "3.8 × 10⁻⁶ (MARK DETECTED)", "Alignment R²": "0.53",
        "Warnings": "careful look", "Fingerprint": f"sha256:{key.fingerprint}", "Date": "2031-02-03 04:05 UTC",
    }  # fmt: skip
    tables = [dict(facts_of(part)) for part in root.iter("table")]
    found = tables[0] | {name: value for table in tables[1:] for name, value in table.items() if name not in tables[0]}
    for name, value in expected.items():
        assert found[name] == value, name
    assert found["log10 p, corrected"].startswith("-5.42")
    assert found["The paper's statistic"].startswith("log10 p = -1.25 (information only")
    assert found["Mean cosine, features"].startswith("+0.1234") and found["Mean cosine, patterns"].startswith("+0.2000")
    for part in ("radiotag ", "Python ", f"torch {torch.__version__}", f"scipy {scipy.__version__}"):
        assert part in found["Versions"]


def test_missing_numbers_are_words(key):
    root = tree(text_of(key, finding(alignment_r2=None, paper_log10_p=None, pattern_cosine=None)))
    found = facts_of(root.findall(".//table")[0])
    assert found["Alignment R²"].startswith("none")
    assert (
        found["The paper's statistic"].startswith("not computed") and found["Mean cosine, patterns"] == "not computed"
    )
    assert "None" not in words(root)


def test_chance_moves_a_mean_cosine_as_far_as_the_page_says(key):
    """Of unit vectors, drawn: the mean cosine over three classes has the standard deviation shown beside it."""
    found = facts_of(tree(text_of(key, finding())))
    draw = np.random.default_rng(1)
    for name, size in (("features", key.carriers.shape[1]), ("patterns", key.patterns.shape[1])):
        drawn = draw.standard_normal((4000, 3, size))
        means = (drawn[..., 0] / np.linalg.norm(drawn, axis=2)).mean(1)
        assert float(found[f"Mean cosine, {name}"].split("±")[1].strip(" )")) == pytest.approx(means.std(), rel=0.05)


def test_the_public_half_the_fingerprint_and_the_command_are_whole(key):
    command = ("radiotag", "verify", "it's; rm -rf $HOME", "--key", "k.safetensors", "--report", "a b.html")
    root = tree(text_of(key, finding(), command=command))
    public, repeat = ("".join(part.itertext()) for part in root.iter("pre"))
    assert public == public_half(key).rstrip("\n")
    assert repeat == shlex.join(command) and shlex.split(repeat) == list(command)
    assert f"sha256:{key.fingerprint}" in [part.text for part in root.iter("code")]
    said = words(root)
    assert "the owner has to show, by a time stamp or a witness" in said
    assert "not the probability that the suspect is innocent" in said
    for condition in report.VOIDS:
        assert condition.rstrip(",")[1:] in said
    for meaning in (report.NULL, report.STATISTICS[key.statistic], f"{key.statistic}:"):
        assert meaning in said


def test_a_black_box_report_speaks_of_black_box_alone(key):
    page = text_of(key, black_box(classes_used=3), black_box(path="b.pt", classes_used=2))
    said = words(tree(page))
    for part in ("black-box", "23 decoys", "48 times", "24³", "24²", "counted exactly", report.BLACK_BOX):
        assert part in said, part
    assert f"cannot be below {report.raised(report.probability(-3 * math.log10(24)))}" in said
    assert f"cannot be below {24**-2:.3f}" in said
    found = facts_of(next(tree(page).iter("table")))
    assert found["Decoy keys"] == "23" and found["Questions"] == "48 for each image"
    quoted = words(next(tree(page).iter("pre")))
    rest = said.replace(quoted, "").lower()
    for part in ("cosine", "alignment", "aligned", "r²", "white-box", "paper", "calibrat", "ridge", "none:"):
        assert part not in rest, part


def test_a_black_box_report_counts_the_sets_of_classes(key):
    """p is the smallest of the sets', multiplied by their number, and so is what it cannot be below."""
    said = words(tree(text_of(key, black_box(classes_used=3, sets=2))))
    assert f"cannot be below {report.raised(report.probability(math.log10(2) - 3 * math.log10(24)))}" in said
    assert report.NESTED in said and "Of all classes together, the p-value is the share" in said
    assert report.NESTED not in words(tree(text_of(key, black_box(classes_used=3))))


def test_a_white_box_report_names_the_classes_of_the_strongest_set(key):
    rows = dict(zip(range(3), NAMES, strict=True))
    some = tuple(ClassResult(name=name, output=i, carrier=i, log10_p=-1.0) for i, name in rows.items())
    first = [rows[row] for row in key.class_order[:2]]
    said = words(tree(text_of(key, finding(classes=some, sets=2, first_classes=2))))
    assert f"The strongest set is that of the first 2: {', '.join(first)}." in said and report.NESTED in said
    assert "The strongest set is that of all classes." in words(tree(text_of(key, finding(classes=some, sets=2))))
    assert "strongest set is" not in words(tree(text_of(key, finding(classes=some))))


def test_a_white_box_report_speaks_of_no_questions(key):
    said = words(tree(text_of(key, *everything()))).lower()
    for part in ("decoy", "black-box", "question"):
        assert part not in said, part


# ---------------------------------------------------------------- charts


def drawing(node):
    """(labels, values shown, bar lengths in per cent, {line name: its place}) of a chart."""
    inner = node.find("svg")
    texts = [part for part in node if part.tag == "text"]
    labels = [part.find("title").text for part in texts if part.find("title") is not None]
    shown = [part.text for part in texts if part.find("title") is None]
    lengths = [float(part.get("width").rstrip("%")) for part in inner.iter("rect")]
    places = [part.get("x1") for part in inner.iter("line")]
    assert places == [part.get("x2") for part in inner.iter("line")]
    names = [part.text for part in inner.iter("text")]
    return labels, shown, lengths, dict(zip(names, (float(x.rstrip("%")) for x in places), strict=True))


def charts(root):
    return [part for part in root.iter("svg") if part.get("role") == "img"]


@pytest.mark.parametrize("log10_p", [(-0.3, -12.5, 0.0), (-0.1, -0.2, -0.9)])
def test_bars_of_evidence_are_as_long_as_the_numbers(key, log10_p):
    root = tree(text_of(key, finding(classes=results(log10_p, NAMES))))
    (chart,) = charts(root)
    labels, shown, lengths, lines = drawing(chart)
    order = sorted(range(3), key=lambda i: log10_p[i])
    assert labels == [NAMES[i] for i in order]
    assert shown == [f"{abs(log10_p[i]):.2f}" for i in order]
    unit = lines["p = 0.05"] / math.log10(20)  # per cent a power of ten
    assert lines["p = 0.5"] == pytest.approx(unit * math.log10(2), abs=0.01)
    assert lengths == pytest.approx([unit * -log10_p[i] for i in order], rel=0.01, abs=0.01)
    assert max(*lengths, *lines.values()) <= 100
    rows = numbers_of(root)
    assert rows == [
        [NAMES[i], str(i), str(i + 7), f"{log10_p[i]:.2f}", report.raised(report.probability(log10_p[i]))]
        for i in order
    ]


def test_bars_stand_one_under_the_other_within_the_chart(key):
    (chart,) = charts(tree(text_of(key, finding(classes=results((-1.0, -2.0, -3.0))))))
    tops = [float(part.get("y")) for part in chart.find("svg").iter("rect")]
    heights = [float(part.get("height")) for part in chart.find("svg").iter("rect")]
    assert all(a + h <= b for (a, b), h in zip(pairwise(tops), heights, strict=False))
    assert tops[-1] + heights[-1] <= float(chart.find("svg").get("height")) < float(chart.get("height"))
    assert chart.get("width") == "100%" and "viewBox" not in chart.attrib  # text keeps its size at any width
    left, width = (float(chart.find("svg").get(name).rstrip("%")) for name in ("x", "width"))
    assert left + width < 90  # the values stand to the right


def test_of_a_thousand_classes_the_strongest_and_the_weakest_are_shown(key):
    values = -np.random.default_rng(2).exponential(size=1000)
    names = [f"class number {i}" for i in range(1000)]
    root = tree(text_of(key, finding(classes=results(values, names), classes_used=1000)))
    order = np.argsort(values, kind="stable")
    ends = [names[i] for i in order[:20]], [names[i] for i in order[-20:]]
    assert [drawing(chart)[0] for chart in charts(root)] == list(ends)
    assert len({tuple(drawing(chart)[3].items()) for chart in charts(root)}) == 1  # on one scale
    rows = numbers_of(root)
    assert [row[0] for row in rows[:20] + rows[21:]] == ends[0] + ends[1]
    assert "960 classes" in rows[20][0]
    assert "Of 1,000 classes the 20 strongest and the 20 weakest are shown" in words(root)
    forty = tree(text_of(key, finding(classes=results(values[:40], names[:40]))))
    assert len(numbers_of(forty)) == 40 and len(charts(forty)) == 1


def test_outputs_of_one_marked_class_are_told_from_classes(key):
    said = words(tree(text_of(key, finding(classes=results((-4.0, -0.1), carrier=0), calibration=BEST))))
    assert "every output was compared with the same carrier" in said and "all 2 outputs" in said
    assert "weighs bars together" not in said and "chance alone: 0 ±" not in said
    assert "no excess of small p-values" in said and "uniform distribution" not in said
    assert "at most about 100 are expected in each but the last" in said


def test_one_class_alone_is_no_best_of_many(key):
    said = words(tree(text_of(key, finding(classes=results((-4.0,), NAMES), classes_used=1, calibration=UNIFORM))))
    assert "weighs bars together" in said and "chance alone: 0 ±" in said and "uniform distribution" in said


@given(st.text(max_size=60))
def test_labels_are_cut_to_the_room_there_is(name):
    short, whole = markup.shortened(name), printable(name)
    assert short == whole or (short.endswith("…") and whole.startswith(short[:-1]))
    assert len(short) <= markup.LABEL
    if whole.isascii():
        assert (short == whole) == (len(whole) <= markup.LABEL)
    assert len(markup.shortened("山" * 40)) <= 1 + markup.LABEL // 2


@pytest.mark.parametrize(("name", "short"), [("a" * 17, "a" * 17), ("a" * 18, "a" * 16 + "…"), ("山" * 8, "山" * 8)])
def test_labels_fill_the_room_there_is(name, short):
    assert markup.shortened(name) == short


# ---------------------------------------------------------------- calibration


def test_the_histogram_is_the_calibrations(key):
    root = tree(text_of(key, finding(calibration=UNIFORM)))
    (chart,) = charts(root)
    labels, shown, lengths, lines = drawing(chart)
    assert labels[0] == "0.0-0.1" and labels[-1] == "0.9-1.0" and len(labels) == 10
    assert shown == [str(count) for count in UNIFORM.histogram]
    (place,) = lines.values()
    assert list(lines) == ["expected: 100"]
    assert lengths == pytest.approx([place * count / 100 for count in UNIFORM.histogram], abs=0.02)
    assert max(*lengths, place) <= 100
    assert numbers_of(root) == [
        ["p ≤ 0.1", "103", "100"], ["p ≤ 0.01", "12", "10"], ["p ≤ 0.001", "1", "1"], ["p ≤ 0.0001", "0", "0.1"],
    ]  # fmt: skip
    said = words(root)
    for part in ("1,000 null keys", "differences of about 19 are ordinary", "rank 7 of 1,001"):
        assert part in said, part
    assert (
        "Kolmogorov-Smirnov p = 0.028: compatible with a uniform distribution, as it must be (alarm below 0.001)"
        in said
    )


def test_the_terminal_says_the_same_in_the_same_words(key):
    said = words(tree(text_of(key, finding(calibration=UNIFORM))))
    lines = report.histogram(UNIFORM)
    assert all(isinstance(line, str) and "\n" not in line for line in lines)
    counts = [int(line.split()[-1]) for line in lines[1:11]]
    assert counts == list(UNIFORM.histogram)
    bars = [line.count("#") for line in lines[1:11]]
    assert bars == [round(50 * count / 110) for count in counts]
    assert "p ≤ 0.01: 12 (10)" in lines[11]
    assert len(lines) == 16 and all(line in said for line in lines[12:])


@pytest.mark.parametrize(
    ("ks_p", "tail_p", "alarms"), [(0.0009, 0.5, 1), (0.5, 0.0009, 1), (0.001, 0.001, 0), (0.0, 0.0, 2)]
)
def test_a_calibration_that_fails_is_told_at_the_verdict(key, ks_p, tail_p, alarms):
    found = replace(UNIFORM, ks_p=ks_p, tail_p=tail_p)
    root = tree(text_of(key, finding(calibration=found)))
    assert ("raises an alarm: do not trust" in words(root.find(".//article"))) == (alarms > 0)
    assert words(root).count("NOT uniform: do not trust this p-value") == alarms
    assert " ".join(report.histogram(found)).count("NOT uniform") == alarms
    assert report.trusted(found) == (alarms == 0)


def test_without_a_calibration_the_page_says_how_to_make_one(key):
    assert "Not done. --calibrate 1000" in words(tree(text_of(key, finding())))


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize("name", ["page.svg", "page.pdf", "page", ".html", "page.HTM"])
def test_a_report_of_another_kind_is_refused_with_the_name_to_give_it(name, tmp_path):
    with pytest.raises(RadiotagError, match="a report is an HTML page") as caught:
        report.check(tmp_path / name)
    hinted = caught.value.hint.removeprefix("name it ")
    report.check(tmp_path / hinted)
    assert hinted.endswith(".html") and set(hinted) <= set(string.ascii_letters + ".")


def test_reports_are_not_written_over_others_nor_in_other_formats(place, tmp_path):
    (tmp_path / "page.html").write_text("mine")
    for name in ("page.html", "page.svg", "page.pdf", "nowhere/page.html"):
        error = bad("verify", place / "model.pt", "--key", place / "k.safetensors", "--report", tmp_path / name).err
        assert name in error
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "mine"


@pytest.mark.usefixtures("few_synthetic")
def test_the_command_writes_the_page_of_what_it_found(place, tmp_path):
    page = tmp_path / "evidence.html"
    options = ("verify", place / "model.pt", "--key", place / "k.safetensors", "--calibrate", 60, "--report", page)
    result = call(*options, "--json")
    assert result.code == 3 and result.json["report"] == str(page)
    (suspect,) = result.json["suspects"]
    root = tree(page.read_text(encoding="utf-8"))
    said, found = words(root), facts_of(root.findall(".//table")[0])
    assert found["File"] == str(place / "model.pt") and found["SHA-256"] == suspect["sha256"]
    assert float(found["log10 p"]) == pytest.approx(suspect["log10_p"], abs=0.005)
    for part in ("60 null keys", "Null hypothesis", load_key(place / "k.safetensors").fingerprint, "no evidence"):
        assert part in said
    assert "".join(list(root.iter("pre"))[-1].itertext()) == shlex.join(["radiotag", *map(str, options), "--json"])
    assert suspect["calibration"]["histogram"] == [int(n) for n in drawing(charts(root)[-1])[1]]
    assert page.stat().st_size < 200_000


@pytest.mark.usefixtures("few_synthetic")
def test_a_report_that_cannot_be_written_costs_no_verdict(place, tmp_path, monkeypatch):
    def full(*_, **__):
        raise RadiotagError("cannot write it: no space", "make room")

    monkeypatch.setattr("radiotag.report.write_atomically", full)
    options = ("verify", place / "model.pt", "--key", place / "k.safetensors", "--report", tmp_path / "r.html")
    result = call(*options, "--json")
    assert result.code == 1
    assert "log10_p" in result.json["suspects"][0] and "report" not in result.json
    assert (result.json["error"], result.json["hint"]) == ("cannot write it: no space", "make room")
    assert "hint: make room" in result.err


def test_the_pages_code_knows_no_terminal():
    for name in ("report.py", "markup.py"):
        assert "rich" not in Path(report.__file__).with_name(name).read_text().split("import ", 1)[1].lower()


@pytest.mark.parametrize(
    ("log10_p", "said"), [(-17.2, "LOOK MARKED under this key"), (-0.3, "they do not look marked"), (None, None)]
)
def test_the_page_says_whether_the_images_look_marked(key, log10_p, said):
    shown = text_of(key, finding(images_log10_p=log10_p))
    assert ("Images shown" in shown) is (said is not None) and (said or "") in shown


def test_the_page_tells_what_was_checked_of_a_control(key):
    shown = text_of(key, finding(), controls=[finding(path="clean.pt", log10_p=-0.25, detected=False)])
    assert "clean.pt: log10 p = -0.25" in shown.replace("−", "-")
    assert "NOT CHECKED against a publication" in shown
