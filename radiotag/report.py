"""The page that a lawyer reads: what was tested, the null hypothesis, what came out and what would void it."""

import io
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from radiotag import __version__
from radiotag.calibration import TAIL, Calibration
from radiotag.errors import RadiotagError, printable
from radiotag.files import write_atomically
from radiotag.keys import STATISTICS, Key
from radiotag.radioactive import NULL
from radiotag.verification import VOIDS, Finding

WIDTH = 118  # characters
BLACK_BOX = (
    "place of the true key among its decoys in how much surer the suspect is of images with the key's pattern added "
    "than taken away, class by class; exact resampling"
)


def check(path: Path) -> None:
    """RadiotagError, before minutes are spent, for a suffix that no page has or a folder that is not there."""
    if path.suffix.lower() not in {".html", ".svg"}:
        raise RadiotagError(f"{path} is neither .html nor .svg", "name the report so")
    if not path.parent.is_dir():
        raise RadiotagError(f"{path} lies in no folder that exists", "make the folder, or name another --report")


def write(path: Path, findings: Sequence[Finding], key: Key, alpha: float) -> None:
    """Write the page as HTML or SVG, by the suffix (Rich's own export)."""
    console = Console(record=True, file=io.StringIO(), width=WIDTH, force_terminal=True, color_system="truecolor")
    console.print(page(findings, key, alpha))
    title = "radiotag: verification of suspects"
    page_text = console.export_svg(title=title) if path.suffix.lower() == ".svg" else console.export_html()
    write_atomically(path, page_text.encode())


def page(findings: Sequence[Finding], key: Key, alpha: float) -> RenderableType:
    """Everything the report says, as one renderable."""
    parts: list[RenderableType] = [
        Text("radiotag: was this model trained on the marked data?", style="bold"),
        Text(f"radiotag {__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"),
        Text(),
        _results(findings),
        Text(),
        _facts(findings, key, alpha),
    ]
    for finding in findings:
        if finding.calibration:
            parts += [
                Text(),
                Text(f"{printable(finding.path)} under fresh keys", style="bold"),
                *histogram(finding.calibration),
            ]
    return Group(*parts)


def _results(findings: Sequence[Finding]) -> Table:
    table = Table(title="Suspects", title_justify="left")
    for column in ("suspect", "network", "method", "classes", "log10 p", "corrected", "corrected p", "verdict"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(
            *map(Text, (
                printable(finding.path), finding.architecture, finding.method, str(finding.classes_used),
                f"{finding.log10_p:.2f}", f"{finding.log10_p_corrected:.2f}", probability(finding.log10_p_corrected),
            )),
            Text("MARK DETECTED", style="bold") if finding.detected else Text("no evidence"),
        )  # fmt: skip
    return table


def probability(log10_p: float) -> str:
    """A p-value as people write it, however small: 10^-1234 has no float."""
    if log10_p > -3:
        return f"{10**log10_p:.3f}"
    exponent = math.floor(log10_p)
    mantissa = round(10 ** (log10_p - exponent), 1)
    return f"{mantissa:.1f} × 10^{exponent}" if mantissa < 10 else f"1.0 × 10^{exponent + 1}"


def _facts(findings: Sequence[Finding], key: Key, alpha: float) -> Table:
    table = Table(show_header=False, title="What the numbers mean", title_justify="left")
    table.add_column(overflow="fold", max_width=36)
    table.add_column(overflow="fold")
    methods = {finding.method for finding in findings}
    statistic = f"{key.statistic}: {STATISTICS[key.statistic]} (declared in the key)"
    rows = [
        ("null hypothesis", NULL),
        ("p-value", "the probability, if the null hypothesis is true, of evidence at least as strong as was found"),
        ("statistic", statistic if methods == {"white-box"} else BLACK_BOX),
        ("correction", f"Holm's, over {len(findings)} suspect{'s' * (len(findings) > 1)} tested together"),
        ("threshold", f"detected if the corrected p is at most {alpha:g}"),
        ("key fingerprint", f"sha256:{key.fingerprint}"),
        ("what voids it", " ".join(VOIDS)),
    ]
    rows += [(f"SHA-256 of {finding.path}", finding.sha256) for finding in findings]
    rows += [(f"warning, {finding.path}", warning) for finding in findings for warning in finding.warnings]
    for name, value in rows:
        table.add_row(Text(printable(name)), Text(printable(value)))
    return table


def histogram(found: Calibration) -> list[Text]:
    """Lines of a bar chart of p under fresh keys, in plain characters."""
    widest = max(found.histogram)
    lines = [
        Text(f"{i / 10:.1f}-{(i + 1) / 10:.1f}  {'#' * round(50 * count / widest):<50}  {count}")
        for i, count in enumerate(found.histogram)
    ]
    uniform = min(found.ks_p, found.tail_p) >= 0.001
    verdict = "as it must be" if uniform else "NOT uniform: do not trust this p-value"
    tail = (f"p ≤ {level:g}: {count} ({level * found.n:g})" for level, count in zip(TAIL, found.tail, strict=True))
    return [
        Text("p        fresh keys"),
        *lines,
        Text(f"found (and expected): {', '.join(tail)}; as many or more by luck: p = {found.tail_p:.3f}"),
        Text(f"{found.n} fresh keys: Kolmogorov-Smirnov p = {found.ks_p:.3f} ({verdict})"),
        Text(f"the true key has rank {found.rank} of {found.n + 1} (1: the smallest p)"),
    ]
