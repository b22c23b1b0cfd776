"""The verification report: one HTML page for a lawyer, an editor or an opposing expert.

The page is one file: it loads nothing, runs nothing and needs no colour. It begins with how often chance alone would
look the same; the rest says what was tested, how, and under which conditions the result holds.
"""

import math
import platform
import re
import shlex
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy
import scipy
import torch
import torchvision

from radiotag import __version__
from radiotag.calibration import TAIL, Calibration
from radiotag.errors import RadiotagError
from radiotag.files import write_atomically
from radiotag.keys import STATISTICS, Key
from radiotag.markup import Bar, chart, document, element, facts, group, numbers, paragraph, verbatim
from radiotag.public import Conditions, public_half, told
from radiotag.radioactive import NULL
from radiotag.verification import LOOKS_MARKED, VOIDS, ClassResult, Finding

ALARM = 0.001  # if a calibration's p-value is below this, the suspects' p-values cannot be trusted
SHOWN = 20  # strongest and weakest classes to show if there are more than twice as many
BLACK_BOX = (
    "rank of the true key among its decoys, by how much surer the suspect is of images with the key's pattern added "
    "than subtracted, class by class; exact resampling"
)
BLACK_BOX_VOIDS = (
    VOIDS[0],
    "if the images asked about are unmarked, and if no other key, suspect, decoys, questions or options were tried",
)
WHITE_BOX_HOW = (
    "The test is white-box: the suspect's weights were read, and its response to unmarked images was measured. "
    "Nothing in its file was run."
)
BLACK_BOX_HOW = "The test is black-box: the suspect was asked about images, and nothing but its answers was used."
COMBINED = (
    "The verdict weighs bars together: many that lean a little the same way weigh as much as a few that lean "
    "strongly. The key declares how they are combined, and p is not their product."
)
BEST = (
    "One class was marked, and which output it became is not known: every output was compared with the same carrier. "
    "The strongest alone counts, its p-value multiplied by the number of outputs."
)
NESTED = (
    "Few marks are laid into few classes, the first ones of an order that follows from the key. So the key's first 1, "
    "2, 5, … classes were tested, and all; the strongest of these sets counts, its p-value multiplied by their number."
)
AS_ONE = (
    "The manifest names the marked classes. So these were tested all together, as one set, and p needs no correction "
    "for a choice among sets."
)
ORDINALS = ("second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """The content of a report."""

    findings: Sequence[Finding]  # of one run, all white-box or all black-box
    controls: Sequence[Finding] = ()  # models known to be clean, tested under the same key
    conditions: Conditions
    key: Key
    alpha: float
    command: Sequence[str]  # repeats the test: the program and its arguments
    created: datetime

    @property
    def black_box(self) -> bool:
        """Whether the suspects were tested by their answers alone."""
        return all(finding.method == "black-box" for finding in self.findings)


def check(path: Path) -> None:
    """RadiotagError for a name without .html or a missing folder, before minutes are spent on the test."""
    if path.suffix.lower() != ".html":
        raise RadiotagError(f"a report is an HTML page: {path} is not", f"name it {path.stem or 'report'}.html")
    if not path.parent.is_dir():
        raise RadiotagError(f"{path} lies in no folder that exists", "make the folder, or name another --report")


def write(path: Path, page: Page) -> None:
    """Write the page atomically. RadiotagError if it cannot be written."""
    write_atomically(path, html(page).encode())


def html(page: Page) -> str:
    """Return the whole page as text."""
    sections = (_verdicts, _tested, _answers, _evidence, _calibrations, _key, _meaning, _checks, _voids, _repeat)
    main = element("main", *(part for section in sections for part in section(page)))
    return document(f"{_title(page)} Verification report by radiotag", _header(page), main)


# ---------------------------------------------------------------- numbers in words


def probability(log10_p: float) -> str:
    """Write a p-value for readers, however small: 10^-1234 has no float."""
    if log10_p > -3:
        return f"{10**log10_p:.3f}"
    exponent = math.floor(log10_p)
    mantissa = round(10 ** (log10_p - exponent), 1)
    return f"{mantissa:.1f} × 10^{exponent}" if mantissa < 10 else f"1.0 × 10^{exponent + 1}"


def frequency(log10_p: float) -> str:
    """Say how often chance reaches a p-value, with two digits, rounded so that it is never called rarer than it is.

    >>> frequency(-5.42), frequency(-26.3)
    ('once in 260,000 times', 'once in 10^26 times')
    """
    exponent = math.floor(-log10_p + 1e-9)  # logarithms are rounded: 26 may be 25.999999999999996
    if exponent >= 9:
        return f"once in 10^{exponent} times"
    step = 10 ** max(0, exponent - 1)
    times = int(10**-log10_p * (1 + 1e-9)) // step * step
    return f"once in {times / 1e6:g} million times" if exponent >= 6 else f"once in {times:,} times"


def sentence(log10_p: float) -> str:
    """Say in one plain sentence what a corrected p-value means."""
    times = 10 ** min(-log10_p, 300.0)  # a larger exponent has no float and is not needed here
    if times < 1.5:
        return "Most models without the marked data come this far."
    if times < 10:
        return f"About every {ORDINALS[round(times) - 2]} model without the marked data comes this far."
    return f"A model without the marked data comes this far at most {frequency(log10_p)}."


def _plain(p: float) -> str:
    return probability(math.log10(max(p, 1e-300)))


def share(alpha: float) -> str:
    """Write a threshold for readers: 0.0001."""
    return f"{alpha:.10f}".rstrip("0") if alpha >= 1e-6 else probability(math.log10(alpha))


def raised(text: str) -> str:
    """Write powers such as 10^-4 with a raised −4, in characters that stay correct when they are copied."""
    return re.sub(r"\^(-?\d+)", lambda match: match[1].translate(SUPERSCRIPTS), text)


# ---------------------------------------------------------------- results


def _title(page: Page) -> str:
    asked = "Was this model" if len(page.findings) == 1 else "Were these models"
    return f"{asked} trained on the marked data?"


def _header(page: Page) -> ET.Element:
    return element(
        "header",
        element("h1", _title(page)),
        paragraph(f"Verification report by radiotag {__version__}, {_date(page)}", class_="small"),
        paragraph(
            "The owner of a data set changed some of its images imperceptibly, by a secret key: they are marked. "
            "A model that is trained on marked images keeps a trace of the key. This report says whether that trace "
            "was found, how often chance alone would look the same, and on what conditions that holds.",
        ),
    )


def _date(page: Page) -> str:
    return f"{page.created:%Y-%m-%d %H:%M} {page.created.tzname() or ''}".rstrip()


def _verdicts(page: Page) -> list[ET.Element]:
    notes = [
        paragraph(
            raised(
                f"A mark counts as detected where the corrected p-value is at most {share(page.alpha)} "
                f"({frequency(math.log10(page.alpha))})."
            ),
        )
    ]
    if len(page.findings) > 1:
        notes.append(paragraph(_holm(page)))
    if not all(finding.detected for finding in page.findings):
        notes.append(
            paragraph(
                "No evidence does not mean that the marked data were not used: too few of them, or a training that "
                "kept too little of them, leave no trace that this test can see.",
            )
        )
    return [element("h2", "Verdict"), *(_verdict(finding) for finding in page.findings), *notes]


def _holm(page: Page) -> str:
    return (
        f"{len(page.findings)} suspects were tested together, which gives chance more occasions: Holm's correction "
        f"raises each p-value so that the risk of even one wrong accusation among all of them stays at most "
        f"{raised(share(page.alpha))}."
    )


def _verdict(finding: Finding) -> ET.Element:
    parts = [
        element("h3", element("code", finding.path)),
        paragraph(_verdict_word(finding), class_="verdict"),
        paragraph(raised(sentence(finding.log10_p_corrected))),
    ]
    if not finding.detected:
        parts.append(paragraph("That is not rare enough for an accusation.", class_="small"))
    if finding.calibration and not trusted(finding.calibration):
        parts.append(paragraph(element("strong", "The calibration below raises an alarm: do not trust this.")))
    if finding.warnings:
        count = len(finding.warnings)
        pointer = f"{count} warning{'s' * (count > 1)} below, under “What was tested”."
        parts.append(paragraph(pointer, class_="small"))
    return element("article", *parts, class_="detected" if finding.detected else "undetected")


def _tested(page: Page) -> list[ET.Element]:
    how, method_facts = WHITE_BOX_HOW, _white_box_facts
    if page.black_box:
        how, method_facts = BLACK_BOX_HOW, _black_box_facts
    tables = []
    for finding in page.findings:
        warnings = _list(finding.warnings) if finding.warnings else "none"
        tables.append(facts([*_common_facts(finding, page), *method_facts(finding, page), ("Warnings", warnings)]))
    return [element("h2", "What was tested"), paragraph(how), *tables]


def _common_facts(finding: Finding, page: Page) -> list[tuple[str, str | ET.Element]]:
    several = len(page.findings) > 1
    corrected = f"for {len(page.findings)} suspects" if several else "one suspect was tested: nothing to correct"
    return [
        ("File", element("code", finding.path)),
        ("SHA-256", element("code", finding.sha256)),
        ("Network", finding.architecture),
        ("Method", finding.method),
        ("Classes used", f"{finding.classes_used:,}"),
        ("log10 p", f"{finding.log10_p:z.2f}"),
        ("log10 p, corrected", f"{finding.log10_p_corrected:z.2f} ({corrected})"),
        ("p, corrected", raised(f"{probability(finding.log10_p_corrected)} ({_verdict_word(finding)})")),
    ]


def _list(texts: Sequence[str]) -> ET.Element:
    return element("ul", *(element("li", text) for text in texts))


def _verdict_word(finding: Finding) -> str:
    return "MARK DETECTED" if finding.detected else "no evidence"


def _white_box_facts(finding: Finding, page: Page) -> list[tuple[str, str | ET.Element]]:
    r2 = "none: the network was not aligned" if finding.alignment_r2 is None else f"{finding.alignment_r2:.2f}"
    paper = "not computed" if finding.paper_log10_p is None else f"log10 p = {finding.paper_log10_p:.2f}"
    dimension = page.key.carriers.shape[1], page.key.patterns.shape[1]
    return [
        ("Mean cosine, features", _cosine(finding.mean_cosine, dimension[0], finding)),
        ("Mean cosine, patterns", _cosine(finding.pattern_cosine, dimension[1], finding)),
        ("Alignment R²", r2),
        ("The paper's statistic", f"{paper} (information only: it does not count towards the verdict)"),
    ]


def _cosine(cosine: float | None, dimension: int, finding: Finding) -> str:
    """Show a mean cosine and its standard deviation under the null hypothesis for independent classes."""
    if cosine is None:
        return "not computed"
    if best_counts(finding):
        return f"{cosine:+.4f} (of all outputs)"
    return f"{cosine:+.4f} (chance alone: 0 ± {1 / math.sqrt(dimension * finding.classes_used):.4f})"


def _black_box_facts(finding: Finding, page: Page) -> list[tuple[str, str | ET.Element]]:
    decoys = finding.decoys or 0
    return [
        ("Decoy keys", f"{decoys:,}"),
        ("Questions", f"{2 * (decoys + 1):,} for each image"),
    ]


def _answers(page: Page) -> list[ET.Element]:
    if not page.black_box:
        return []
    parts = [element("h2", "How the answers were counted")]
    asked = {(1 + (finding.decoys or 0), finding.classes_used, finding.sets) for finding in page.findings}
    for keys, classes, sets in sorted(asked):
        smallest = math.log10(sets) - classes * math.log10(keys)
        every = "Of all classes together, the" if sets > 1 else "The"
        parts.append(
            paragraph(
                raised(
                    f"The suspect was shown each image {2 * keys:,} times: under each of {keys:,} keys, the true one "
                    f"and {keys - 1:,} decoys drawn as it was, once with the key's faint pattern added and once with "
                    f"it taken away. How much surer it is of the first than of the second is compared among the keys, "
                    f"in each of {classes:,} classes. Without the marked data the true key is one key among {keys:,}, "
                    f"so that all {keys:,}^{classes} ways to name a key for each class are equally likely. {every} "
                    f"p-value is the share of them that speak at least as strongly as the true key does, counted "
                    f"exactly. It cannot be below {probability(smallest)} with so many keys and classes."
                ),
            )
        )
        parts += [paragraph(NESTED)] if sets > 1 else []
    return parts


# ---------------------------------------------------------------- evidence per class


def best_counts(finding: Finding) -> bool:
    """Whether one class was marked and the best of several outputs counts: all are compared with one carrier."""
    return len(finding.classes) > 1 and len({result.carrier for result in finding.classes}) == 1


def is_corrected(finding: Finding) -> bool:
    """Whether p is the best of several tests, corrected for the choice, and so larger than it need be."""
    return best_counts(finding) or finding.sets > 1


def _evidence(page: Page) -> list[ET.Element]:
    with_classes = [finding for finding in page.findings if finding.classes]
    if not with_classes:
        return []
    how = (
        "Each bar is −log10 p: a bar of 3 means that chance alone comes so far once in 1,000 times. In a model without "
        "the marked data half of the bars end before the line p = 0.5, and 19 of 20 before the line p = 0.05. "
    )
    parts = [
        element("h2", "Evidence per class"),
        paragraph(how + (BEST if any(map(best_counts, with_classes)) else COMBINED)),
        *(paragraph(NESTED) for _ in range(any(finding.sets > 1 for finding in with_classes))),
        *(paragraph(AS_ONE) for _ in range(_as_one(page))),
    ]
    for finding in with_classes:
        parts += [element("h3", element("code", finding.path))] if len(page.findings) > 1 else []
        parts += _class_evidence(finding, page.key)
    return parts


def _as_one(page: Page) -> bool:
    """Whether a manifest spared the sets of classes that the key declares."""
    by_manifest = page.conditions.options.get("manifest") is not None
    return by_manifest and page.key.tested_order(by_manifest=False) != page.key.tested_order(by_manifest=True)


def _strongest_set(finding: Finding, key: Key) -> list[str]:
    """Which set of classes gave the p-value, if there were several."""
    if finding.sets == 1:
        return []
    in_order = sorted(finding.classes, key=lambda result: key.class_order.index(result.carrier))
    names = [_label(result) for result in in_order[: finding.first_classes]]
    if len(names) == len(in_order):
        return ["The strongest set is that of all classes."]
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return [f"The strongest set is that of the first {len(names):,}: {', '.join(names[:SHOWN])}{more}."]


def _class_evidence(finding: Finding, key: Key) -> list[ET.Element]:
    ordered = sorted(finding.classes, key=lambda result: result.log10_p)
    noun, count = ("outputs" if best_counts(finding) else "classes"), len(ordered)
    ends, notes = [(f"all {count} {noun}", ordered)], _strongest_set(finding, key)
    if count > 2 * SHOWN:
        ends = [(f"the {SHOWN} strongest {noun}", ordered[:SHOWN]), (f"the {SHOWN} weakest {noun}", ordered[-SHOWN:])]
        notes.append(f"Of {count:,} {noun} the {SHOWN} strongest and the {SHOWN} weakest are shown.")
    top = max(2.0, -1.05 * ordered[0].log10_p)
    figures = [_class_figure(name, results, top) for name, results in ends]
    return [*map(paragraph, notes), *figures, _class_table([results for _, results in ends], noun, count)]


def _class_figure(name: str, classes: Sequence[ClassResult], top: float) -> ET.Element:
    bars = [Bar(label=_label(result), value=-result.log10_p, shown=f"{abs(result.log10_p):.2f}") for result in classes]
    lines = [(-math.log10(p), f"p = {p:g}") for p in (0.05, 0.5)]
    title = f"Evidence (−log10 p), {name}"
    return element("figure", element("figcaption", title), chart(title, bars, lines, top))


def _label(result: ClassResult) -> str:
    return f"output {result.output}" if result.name is None else result.name


def _class_table(ends: Sequence[Sequence[ClassResult]], noun: str, count: int) -> ET.Element:
    groups = []
    for i, classes in enumerate(ends):
        if i:
            hidden = f"… {count - 2 * SHOWN:,} {noun} between these are not shown …"
            groups.append(element("tbody", element("tr", element("td", hidden, colspan="5", class_="gap"))))
        groups.append(group(_class_cells(result) for result in classes))
    return numbers(("class", "output", "carrier", "log10 p", "p"), groups, f"The same {noun} in numbers")


def _class_cells(result: ClassResult) -> Sequence[str]:
    name = "(not named)" if result.name is None else result.name
    p = raised(probability(result.log10_p))
    return name, str(result.output), str(result.carrier), f"{result.log10_p:z.2f}", p


# ---------------------------------------------------------------- calibration


def trusted(calibration: Calibration) -> bool:
    """Whether the p-values of null keys raise no alarm."""
    return min(calibration.ks_p, calibration.tail_p) >= ALARM


def histogram(calibration: Calibration, best: bool = False) -> list[str]:
    """Return the calibration as lines of plain text with the same words as the page; `best`: see `is_corrected`."""
    widest = max(1, *calibration.histogram)
    bars = [
        f"{name}  {'#' * round(50 * count / widest):<50}  {count}"
        for name, count in zip(_bins(), calibration.histogram, strict=True)
    ]
    tail = ", ".join(f"{level}: {count} ({expected})" for level, count, expected in _tail(calibration))
    return ["p        null keys", *bars, f"found (and expected): {tail}", *calibration_words(calibration, best)]


def _tail(calibration: Calibration) -> list[tuple[str, str, str]]:
    """Return for each level of p the number of null keys found up to it, and the expected number."""
    counted = zip(TAIL, calibration.tail, strict=True)
    return [(f"p ≤ {level:g}", f"{count:,}", f"{level * calibration.n:,.10g}") for level, count in counted]


def _bins() -> list[str]:
    return [f"{i / 10:.1f}-{(i + 1) / 10:.1f}" for i in range(10)]


def calibration_words(calibration: Calibration, best: bool = False) -> list[str]:
    """Explain a calibration, one sentence per line; `best`: see `is_corrected`."""
    alike = "no excess of small p-values" if best else "compatible with a uniform distribution"
    words = {True: f"{alike}, as it must be", False: "NOT uniform: do not trust this p-value"}
    tail = "luck gives as many small p-values, or more, with"
    p_values = (("Kolmogorov-Smirnov", calibration.ks_p), (tail, calibration.tail_p))
    return [
        f"{calibration.n:,} null keys, drawn as the true key was but never used to mark, were tried on the same suspect"
        + (": p is corrected for the best of several tests, and may be larger than it need be" if best else ""),
        *(f"{name} p = {_plain(p)}: {words[p >= ALARM]} (alarm below {ALARM})" for name, p in p_values),
        f"the true key has rank {calibration.rank:,} of {calibration.n + 1:,} (1: the smallest p; any rank is as "
        "likely as any other without the marked data)",
    ]


def _calibrations(page: Page) -> list[ET.Element]:
    if page.black_box:
        return []
    parts = [element("h2", "Calibration: is the p-value right?")]
    calibrated = [finding for finding in page.findings if finding.calibration]
    if not calibrated:
        return [*parts, paragraph("Not done. --calibrate 1000 tries 1,000 null keys on the same suspects.")]
    parts.append(
        paragraph(
            "The test is tried with keys that marked nothing. Whatever the suspect, their small p-values must come no "
            "more often than they say: one in ten is at most 0.1, one in a hundred at most 0.01."
        )
    )
    for finding in calibrated:
        parts += [element("h3", element("code", finding.path))] if len(page.findings) > 1 else []
        parts += _calibration(finding)
    return parts


def _calibration(finding: Finding) -> list[ET.Element]:
    calibration = finding.calibration
    if calibration is None:
        return []
    expected = calibration.n / 10
    bars = [
        Bar(label=name, value=count, shown=f"{count:,}")
        for name, count in zip(_bins(), calibration.histogram, strict=True)
    ]
    title = f"p-values of {calibration.n:,} null keys, counted in ten bins"
    ordinary = f"differences of about {0.6 * calibration.n**0.5:,.0f} are ordinary"
    expects = f"{expected:,.10g} are expected in each, and {ordinary}"
    name = f"expected: {expected:,.10g}"
    if is_corrected(finding):
        name = f"expected: at most {expected:,.10g}"
        expects = f"at most about {expected:,.10g} are expected in each but the last"
    words = [raised(text) for text in calibration_words(calibration, is_corrected(finding))]
    figure = chart(title, bars, [(expected, name)], 1.05 * max(expected, *calibration.histogram))
    return [
        element("figure", element("figcaption", f"{title}; {expects}"), figure),
        numbers(
            ("p-value", "found", "expected"), [group(_tail(calibration))], "How many null keys reach small p-values"
        ),
        _list(words),
    ]


# ---------------------------------------------------------------- the key, and the meaning of the numbers


def _key(page: Page) -> list[ET.Element]:
    declared = "the statistic below is declared for another test, of the suspect's weights, which was not made"
    if not page.black_box:
        declared = f"{page.key.statistic}: {STATISTICS[page.key.statistic]} (declared in the key)"
    return [
        element("h2", "The key"),
        facts([
            ("Fingerprint", element("code", f"sha256:{page.key.fingerprint}")),
            ("Statistic", f"{BLACK_BOX} ({declared})" if page.black_box else declared),
        ]),
        paragraph("The public half of the key commits its owner to the key without giving it away. It reads:"),
        verbatim(public_half(page.key)),
        paragraph(
            "The date of its publication is not for this report to say: the owner has to show, by a time stamp or a "
            "witness, that this text was public before the suspect was trained."
        ),
    ]  # fmt: skip


def _meaning(page: Page) -> list[ET.Element]:
    special = [] if page.black_box else [
        ("Mean cosine", "how far the suspect leans in the key's secret directions, from −1 to 1, on average over its "
         "classes; small values can be strong evidence, for chance alone stays close to 0"),
        ("Alignment R²", "how well the features of the key's marking network explain the suspect's, 1 at best; a poor "
         "alignment may miss a mark, and does not make an accusation likelier"),
        ("The paper's statistic", "of Sablayrolles, Douze, Schmid and Jégou, “Radioactive data: tracing through "
         "training”, ICML 2020, for comparison: the key declares another, so the two may differ widely"),
    ]  # fmt: skip
    rows = [
        ("Null hypothesis", NULL),
        ("p-value", "the probability, if the null hypothesis is true, of evidence at least as strong as was found; it "
         "is not the probability that the suspect is innocent"),
        ("log10 p", "the p-value as a power of ten: −4 is one in 10,000, and one less is ten times rarer"),
        ("Correction", _holm(page) if len(page.findings) > 1 else "Holm's, over 1 suspect: it changes nothing"),
        ("Threshold", f"detected if the corrected p is at most {raised(share(page.alpha))}"),
        *special,
    ]  # fmt: skip
    return [element("h2", "What the numbers mean"), facts(rows)]


def _checks(page: Page) -> list[ET.Element]:
    """The steps by which anybody checks a claim, each with what the program found."""
    rows = [
        ("Published before the suspect existed", "for the owner to show: a time stamp on the public half"),
        ("Key", _state(page.conditions.checked.key, "is the one published", page)),
        ("Carriers", "checked: they follow from the key's seed, so nobody could choose them"),
        ("Drawn once", _drawn(page)),
        ("Classes and carriers", _state(page.conditions.checked.classes, "are paired as published", page)),
        ("Manifest", _manifest_state(page)),
        *((name.capitalize(), text) for name, text in told(page.conditions) if name in {"data", "chosen"}),
        ("Images shown", _images(page)),
        ("Questions", _questions(page)),
        ("Controls", _controls(page)),
        ("Other looks", "for the owner to tell: p has to be multiplied by the number of tests made with this key"),
        ("Lineage", "a model fine-tuned or distilled from a guilty one is detected, too; models alike depend on luck"),
    ]
    return [element("h2", "How to check this claim"), facts([row for row in rows if row[1]])]


def _state(checked: bool | None, what: str, page: Page) -> str:
    return f"checked: {what} in {page.conditions.checked.public}" if checked else "NOT CHECKED against a publication"


def _drawn(page: Page) -> str:
    if page.key.beacon is not None:
        return f"the beacon {page.key.beacon!r} went into the carriers: check that the seed's commitment is older"
    return "not shown: the best of N keys has a p up to N times smaller than it says; a beacon would end that"


def _manifest_state(page: Page) -> str:
    if page.conditions.options.get("manifest") is None:
        return "none was used"
    return _state(page.conditions.checked.manifest, "is the one published", page)


def _images(page: Page) -> str:
    """What the images' own test for marks gave; nothing for synthetic images, or if no class was known."""
    found = [finding.images_log10_p for finding in page.findings if finding.images_log10_p is not None]
    if not found:
        return ""
    if min(found) <= LOOKS_MARKED:
        return f"LOOK MARKED under this key (log10 p = {min(found):.2f}): the result is void"
    return f"checked: they do not look marked themselves (log10 p = {min(found):.2f})"


def _questions(page: Page) -> str:
    digests = {finding.questions for finding in page.findings if finding.questions}
    return "".join(f"sha256:{digest}: compare with what was published at the export" for digest in sorted(digests))


def _controls(page: Page) -> str:
    shown = ", ".join(f"{control.path}: log10 p = {control.log10_p:.2f}" for control in page.controls)
    return shown or "no model known to be clean was tested beside (--control)"


def _voids(page: Page) -> list[ET.Element]:
    conditions = " ".join(BLACK_BOX_VOIDS if page.black_box else VOIDS)
    return [
        element("h2", "What would void this result"),
        paragraph(f"{conditions[:1].upper()}{conditions[1:]}."),
        paragraph("These are facts about what people did: the owner has to show them, for no computation can."),
    ]


def _command(words: Sequence[str]) -> ET.Element:
    """Quote a command for a shell; lines break only between words."""
    parts = [part for word in words for part in (" ", element("span", shlex.quote(word), class_="word"))]
    return element("pre", *parts[1:])


def _repeat(page: Page) -> list[ET.Element]:
    modules = (("torch", torch), ("torchvision", torchvision), ("scipy", scipy), ("numpy", numpy))
    versions = [f"radiotag {__version__}", f"Python {platform.python_version()}"]
    versions += [f"{name} {module.__version__}" for name, module in modules]
    return [
        element("h2", "How to repeat the test"),
        _command(page.command),
        paragraph(
            "This takes the same files and the secret key, which is for nobody but an expert whom both sides trust. "
            "It writes this page again where --report names another file."
        ),
        facts([("Versions", ", ".join(versions)), ("Date", _date(page))]),
    ]
