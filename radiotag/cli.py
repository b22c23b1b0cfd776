"""The command line: it parses, calls and prints. Nothing heavy is imported before a command runs."""

import io
import math
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from radiotag import __version__
from radiotag.errors import RadiotagError, broken_warnings
from radiotag.processes import launched
from radiotag.terminal import AGAIN, DETECTED, ERROR, NO_EVIDENCE, Report, is_aside, progress_bar, reporting

if TYPE_CHECKING:
    from radiotag.blackbox import Queries
    from radiotag.expectation import Expectation
    from radiotag.keys import Key
    from radiotag.manifest import Summary
    from radiotag.plan import MarkOptions, Plan
    from radiotag.probes import UnmarkedImages
    from radiotag.public import Conditions
    from radiotag.verification import Finding, VerifyOptions
    from radiotag.verification import Progress as ShowProgress

SHOWN = 5  # names of classes
UNNAMED = (
    "note         the key names no classes: it is your private tool until `mark` writes the set's public half; "
    "with --data ./imgs it names them"
)
MENDED = f"mend or remove them, and {AGAIN['mark']}"

app = typer.Typer(
    name="radiotag",
    help="Mark an image data set imperceptibly; prove later, with an exact p-value, that a model was trained on it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="In three lines:\n\nradiotag keygen\n\nradiotag mark ./imgs --key k.safetensors\n\n"
    "radiotag verify model.pt --key k.safetensors\n\n"
    "Exit codes: 0 done (verify: detected), 1 error, 2 usage, 3 no evidence, 130 interrupted.",
)


def examples(*commands: str) -> str:
    """The end of a command's help, a paragraph each."""
    return "\n\n".join(("Examples:", *commands))


# Options in the help's panels.
key_option = partial(typer.Option, rich_help_panel="Key")
marking_option = partial(typer.Option, rich_help_panel="Marking")
quality_option = partial(typer.Option, rich_help_panel="Quality")
training_option = partial(typer.Option, rich_help_panel="Training")
suspect_option = partial(typer.Option, rich_help_panel="Suspect")
evidence_option = partial(typer.Option, rich_help_panel="Evidence")
black_box_option = partial(typer.Option, rich_help_panel="Black-box")
runtime_option = partial(typer.Option, rich_help_panel="Runtime")
output_option = partial(typer.Option, rich_help_panel="Output")

KeyOption = Annotated[
    Path, key_option("--key", "-k", metavar="FILE", readable=False, help="the secret key file, from keygen")
]
JsonOption = Annotated[
    bool, output_option("--json", metavar="", help="print one JSON object on stdout, also on failure")
]
QuietOption = Annotated[bool, output_option("--quiet", "-q", metavar="", help="print nothing but errors (and --json)")]
ForceOption = Annotated[bool, output_option("--force", metavar="", help="overwrite what exists")]
DeviceOption = Annotated[str, runtime_option(metavar="auto|cpu|cuda|mps", help="where to compute")]


def choose_device(name: str) -> str:
    """The device that `--device` names, or the best there is; RadiotagError if it is not there."""
    from radiotag.networks import DEVICES, available_device

    if name not in DEVICES:
        raise typer.BadParameter(f"--device is one of {', '.join(DEVICES)}, not {name}")
    return available_device(name)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"radiotag {__version__}")
        raise typer.Exit


@app.callback()
def radiotag(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Mark an image data set imperceptibly; prove later, with an exact p-value, that a model was trained on it."""


# ---------------------------------------------------------------- keygen


@app.command(epilog=examples("radiotag keygen", "radiotag keygen -o cats.safetensors --data ./imgs --network resnet18"))
def keygen(
    network: Annotated[
        str, key_option(metavar="builtin|NAME|FILE", help="marking network: built in, torchvision's, or a checkpoint")
    ] = "builtin",
    classes: Annotated[
        int | None,
        key_option(min=1, max=1_000_000, metavar="N", help="number of carriers, one a class", show_default="1000"),
    ] = None,
    data: Annotated[
        Path | None, key_option(metavar="DIR", help="take class names from this folder's sub-folders instead")
    ] = None,
    beacon: Annotated[
        str | None,
        key_option(metavar="TEXT", help="a public random value that came after --committed was published"),
    ] = None,
    committed: Annotated[
        Path | None, key_option(metavar="KEY", help="with --beacon: the earlier key, whose seed was committed")
    ] = None,
    show: Annotated[
        Path | None, output_option(metavar="KEY", help="print all that is public about a key; restore a lost .pub")
    ] = None,
    output: Annotated[Path, output_option("--output", "-o", metavar="FILE", help="the key file")] = Path(
        "k.safetensors"
    ),
    force: ForceOption = False,
    json_: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make a secret key, and its public fingerprint.

    Publish or time-stamp the fingerprint (the .pub file) before the data:
    it proves that the key came first.
    """
    with reporting("keygen", json_, quiet) as report:
        if data and classes:
            raise typer.BadParameter("--classes and --data both say how many carriers: give one of them")
        if committed and (data or classes or network != "builtin"):
            raise typer.BadParameter("--committed has network and classes: leave out --network, --classes and --data")
        from radiotag import api
        from radiotag.stores import list_dataset

        if show:
            _show(report, show)
            return
        names = [name for name in list_dataset(data).names if name] if data else None
        if data and not names:
            raise RadiotagError(f"{data} has no class sub-folders", "leave out --data, or give a folder of folders")
        report.note("making a key …")
        earlier = api.load_key(committed) if committed else None
        key = api.keygen(
            output, network=network, classes=names or classes or 1000, beacon=beacon, committed=earlier, force=force
        )
        public, dimension = output.with_suffix(".pub"), key.carriers.shape[1]
        described = key.metadata["network"]
        shown = f"{described['architecture']}, {described['image_size']} px"
        report.say(
            f"key          {output} (keep it secret)",
            f"public half  {public} (publish it before the data)",
            f"fingerprint  sha256:{key.fingerprint}",
            *([] if key.class_names else [UNNAMED]),
            f"carriers     {len(key.carriers)} classes × {dimension} dimensions, network {network} ({shown})",
            f"next         radiotag mark ./imgs --key {shlex.quote(str(output))}",
        )
        report.give(
            key=str(output), public=str(public), classes=len(key.carriers), dimension=dimension, network=network,
            statistic=key.statistic, fingerprint=key.fingerprint, commitment=key.commitment, beacon=key.beacon,
        )  # fmt: skip


def _show(report: Report, path: Path) -> None:
    from radiotag import api

    key, text, written = api.show(path)
    report.say(*text.splitlines(), *([f"written      {written}"] if written else []))
    report.give(key=str(path), fingerprint=key.fingerprint, commitment=key.commitment, beacon=key.beacon, public=text)


# ---------------------------------------------------------------- mark


@app.command(
    epilog=examples(
        "radiotag mark ./imgs --key k.safetensors",
        "radiotag mark ./imgs -k k.safetensors --fraction 0.1 --preview sheet.png",
    )
)
def mark(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="folder of class sub-folders, of images, or of tar shards")
    ],
    key: KeyOption,
    fraction: Annotated[
        float,
        marking_option(
            min=0.0, max=1.0, metavar="SHARE", help="share of all images to mark; below 0.1, of few classes"
        ),
    ] = 1.0,
    spread: Annotated[
        bool, marking_option("--spread", metavar="", help="mark every class alike, however few marks there are")
    ] = False,
    choose: Annotated[
        str, marking_option(metavar="hard|random", help="mark images that are hard to tell from other classes, or any")
    ] = "hard",
    steps: Annotated[int, marking_option(min=1, max=10_000, metavar="N", help="gradient steps an image")] = 20,
    seed: Annotated[int, marking_option(min=0, metavar="N", help="seed of the random crops")] = 0,
    held_out: Annotated[
        Path | None, marking_option(metavar="DIR", help="unmarked images to commit to now, and to verify with later")
    ] = None,
    exclude: Annotated[
        list[str] | None, marking_option(metavar="GLOB", help="images that are only copied; may be given several times")
    ] = None,
    strict: Annotated[
        bool, marking_option("--strict", metavar="", help="stop at the first image that cannot be marked")
    ] = False,
    on_unmarkable: Annotated[
        str, marking_option(metavar="fail|copy", help="sound images of a kind that cannot be marked without loss")
    ] = "fail",
    epsilon: Annotated[
        float,
        quality_option(min=0.1, max=255.0, metavar="LEVELS", help="largest change of a pixel, of 255, before encoding"),
    ] = 10.0,
    min_psnr: Annotated[
        float | None,
        quality_option(
            min=10.0,
            max=80.0,
            metavar="DB",
            help="dB that each mark keeps, beside what a lossy format costs",
            show_default="34 up to 64 pixels, 40 from 224",
        ),
    ] = None,
    format_: Annotated[
        str, quality_option("--format", metavar="keep|png", help="keep each image's format, or write PNG")
    ] = "keep",
    preview: Annotated[
        Path | None, quality_option(metavar="FILE.png", help="write a sheet of original | marked | difference × 10")
    ] = None,
    device: DeviceOption = "auto",
    batch_size: Annotated[int, runtime_option(min=1, max=4096, metavar="N", help="images optimised together")] = 64,
    output: Annotated[
        Path | None, output_option("--output", "-o", metavar="DIR", help="the marked folder", show_default="SRC-marked")
    ] = None,
    dry_run: Annotated[bool, output_option("--dry-run", metavar="", help="show the plan, write nothing")] = False,
    force: ForceOption = False,
    json_: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write a marked copy of a folder; the source is not touched.

    Images that are not chosen are copied byte for byte.
    An interrupted run goes on where it stopped.
    The manifest beside the output tells marked from unmarked: keep it secret.
    """
    with reporting("mark", json_, quiet) as report:
        if format_ not in {"keep", "png"}:
            raise typer.BadParameter(f"--format is keep or png, not {format_}")
        if choose not in {"hard", "random"}:
            raise typer.BadParameter(f"--choose is hard or random, not {choose}")
        if on_unmarkable not in {"fail", "copy"}:
            raise typer.BadParameter(f"--on-unmarkable is fail or copy, not {on_unmarkable}")
        report.note("planning …")
        from radiotag.plan import MarkOptions

        options = MarkOptions(
            fraction=fraction, epsilon=epsilon, min_psnr=min_psnr, steps=steps, format=format_, seed=seed,
            device=choose_device(device), batch_size=batch_size, force=force, strict=strict, held_out=held_out,
            choose=choose, spread=spread, on_unmarkable=on_unmarkable, exclude=tuple(exclude or ()),
        )  # fmt: skip
        plan = _mark_plan(report, source, output, key, options)
        _check_preview(plan, preview, force)
        _note_classes(report, plan)
        if dry_run:
            _tell_plan(report, plan)
            return
        report.mute = False
        if (count := launched()[1]) > 1:  # a cluster may set RANK and WORLD_SIZE for other ends
            report.note(f"one of {count} processes, by RANK and WORLD_SIZE: waits for the others")
        summary = _mark_run(report, plan)
        if not is_aside():  # the first process tells of all images
            _tell_marked(report, plan, summary, key, preview)


def _mark_plan(report: Report, source: Path, output: Path | None, key: Path, options: "MarkOptions") -> "Plan":
    from radiotag import api

    with progress_bar(report, "images") as bar:
        bar.add_task("planning", total=None, detail="")
        return api.plan_marking(source, api.load_key(key), output, options)


def _note_classes(report: Report, plan: "Plan") -> None:
    from radiotag.listing import SPLITS
    from radiotag.plan import uncounted_classes

    if plan.rows.keys() <= SPLITS and len(plan.rows) > 1:
        report.note(f"the classes are {', '.join(plan.rows)}: give one of these folders if they hold the classes")
    if loose := uncounted_classes(plan):
        report.note(f"no image in {loose[0]}/ can be marked: a loader of class folders counts it as a class, too")


def _tell_plan(report: Report, plan: "Plan") -> None:
    from radiotag.manifest import Summary
    from radiotag.plan import check, to_mark

    check(plan)
    expected, wanted = plan.expectation(), to_mark(plan)
    report.say(*_plan_lines(plan, wanted, expected))
    nothing_yet = Summary(images=len(plan.items))
    report.give(**_mark_json(plan, nothing_yet, expected, dry_run=True, would_mark=sum(wanted.values())))


def _mark_run(report: Report, plan: "Plan") -> "Summary":
    from radiotag.marking_run import run

    with progress_bar(report, "images") as bar:
        task, pace = bar.add_task("marking", total=len(plan.items), detail=""), _Pace()

        def show(summary: "Summary") -> None:
            done = summary.done + summary.under_way
            if summary.ranked:
                bar.update(task, description="ranking", total=summary.images, completed=summary.ranked)
            else:
                told = pace.told(summary)
                bar.update(task, description="marking", total=summary.images, completed=done, detail=told)

        return run(plan, show)


@dataclass
class _Pace:
    """How fast images are marked, counted from when the first one is begun: copies and planning take another time."""

    began: float = 0.0
    earlier: int | None = None  # marked by earlier runs

    def told(self, summary: "Summary") -> str:
        """For the progress bar."""
        if self.earlier is None or summary.done == summary.skipped:
            self.earlier = summary.marked
        marked, now = summary.marked - self.earlier + summary.under_way, time.monotonic()
        if not marked:
            self.began = now
            return ""
        psnr = summary.psnr[-64:]
        rate = f"{marked / max(1e-3, now - self.began):.1f}/s"
        return rate + (f"  PSNR {sum(psnr) / len(psnr):.1f} dB" if psnr else "")


def _tell_marked(report: Report, plan: "Plan", summary: "Summary", key: Path, preview: Path | None) -> None:
    from radiotag import marking_run

    expected = plan.expectation([*summary.failed, *summary.unmarkable])
    for row in summary.failed:
        report.problem(row["error"], row.get("hint", ""))
    try:
        report.say(*_mark_lines(plan, summary, expected, key))
    finally:  # the sheet is made even if nobody reads
        if preview:
            marking_run.preview(plan, summary, preview)
    if summary.failed:
        message = f"{len(summary.failed)} of the images failed and are {plan.store.failed_are}"
        report.give(**_mark_json(plan, summary, expected, error=message, hint=MENDED))
        raise typer.Exit(ERROR)
    report.give(**_mark_json(plan, summary, expected))


def _check_preview(plan: "Plan", preview: Path | None, force: bool) -> None:
    """A sheet must not take a user's picture's place, nor go with the data."""
    if preview is None:
        return
    place = preview.resolve()
    if any(place.is_relative_to(folder.resolve()) for folder in (plan.source, plan.output)):
        raise RadiotagError(f"{preview} lies in the data", "put the preview elsewhere")
    if preview.suffix.lower() != ".png" or not place.parent.is_dir():
        raise RadiotagError(f"cannot write {preview}", "name a .png file in a folder that exists")
    if preview.exists() and not force:
        raise RadiotagError(f"{preview} exists", "choose another name for --preview, or remove it")


def _plan_lines(plan: "Plan", wanted: dict[str, int], expected: "Expectation") -> list[str]:
    lines = [f"{name or plan.source.name}: {wanted[name]} of {size} images" for name, size in plan.sizes().items()]
    return [
        f"would mark {sum(wanted.values())} of {len(plan.items)} images into {plan.output}, less what is done already",
        *(f"  {line}" for line in lines),
        _classes_line(plan),
        *_unmarked_lines(plan),
        _expect_line(expected),
        f"next         {shlex.join(['radiotag', *(word for word in sys.argv[1:] if word != '--dry-run')])}",
    ]


def _classes_line(plan: "Plan") -> str:
    names = [name for name in plan.sizes() if name]
    shown = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
    return f"classes      {len(names)} ({shown})" if names else "classes      none: all images are of one"


def _unmarked_lines(plan: "Plan") -> list[str]:
    counts = ", ".join(f"{suffix} {count}" for suffix, count in sorted(plan.store.unmarked_formats().items()))
    return [f"warning      copied unmarked, though they look like images: {counts}"] if counts else []


def _expect_line(expected: "Expectation") -> str:
    found = "" if expected.log10_p is None else f"log10 p about {expected.log10_p:.1f}, "
    advice = f" ({expected.advice})" if expected.advice else ""
    return f"expect       {found}{expected.reason}{advice}"


def _mark_json(plan: "Plan", summary: "Summary", expected: "Expectation", **more: Any) -> dict[str, Any]:
    from radiotag.plan import indexes

    failed = [{name: row.get(name, "") for name in ("path", "error", "hint")} for row in summary.failed]
    return {
        "public": str(plan.public), "classes": plan.rows,
        "fingerprint": plan.key.fingerprint, "output": str(plan.output), "manifest": str(plan.manifest),
        "images": len(plan.items), "marked": summary.marked, "copied": summary.copied, "skipped": summary.skipped,
        "failed": failed, "formats_unmarked": dict(plan.store.unmarked_formats()),
        "further_pictures_dropped": summary.dropped, "unchanged": summary.unchanged,
        "unmarkable": dict(_kinds(summary)), "stale_indexes": indexes(plan),
        "expected_log10_p": expected.log10_p,
        **summary.statistics(), **more,
    }  # fmt: skip


def _beyond_epsilon(plan: "Plan", numbers: dict[str, float | None]) -> str:
    """Why the largest change may be above --epsilon."""
    epsilon = plan.options.epsilon
    beyond = (numbers["linf_max"] or 0) > epsilon + 1
    return f" (--epsilon {epsilon:g} holds before encoding; lossy formats and palettes add theirs)" if beyond else ""


def _mark_lines(plan: "Plan", summary: "Summary", expected: "Expectation", key: Path) -> list[str]:
    failed = len(summary.failed)
    return [
        f"marked       {summary.marked} of {len(plan.items)} images, {summary.copied} copied, {failed} failed"
        + (f" ({summary.skipped} done earlier)" if summary.skipped else ""),
        _classes_line(plan),
        f"output       {plan.output}",
        f"manifest     {plan.manifest} (keep it secret)",
        f"public half  {plan.public} (publish or time-stamp it before the data)",
        f"key          sha256:{plan.key.fingerprint}",
        *(_quality_lines(plan, summary) if summary.marked else ()),
        *([_expect_line(expected)] if summary.marked else ()),
        *_unmarked_lines(plan),
        *(f"warning      copied, as they cannot be marked: {kind} {count}" for kind, count in _kinds(summary)),
        *_mark_warnings(plan, summary),
        *_after_marking(plan, summary, key),
    ]


def _kinds(summary: "Summary") -> list[tuple[str, int]]:
    """(kind, number) of the images that were copied because they cannot be marked."""
    return sorted(Counter(row["unmarkable"] for row in summary.unmarkable).items())


def _quality_lines(plan: "Plan", summary: "Summary") -> list[str]:
    numbers = summary.statistics()
    return [
        f"quality      PSNR median {numbers['psnr_median']:.1f} dB, lowest twentieth {numbers['psnr_p5']:.1f} dB, "
        f"lowest {numbers['psnr_min']:.1f} dB; SSIM median {numbers['ssim_median']:.3f}, "
        f"lowest {numbers['ssim_min']:.3f}",
        f"strength     largest change {numbers['linf_max']:.0f} of 255{_beyond_epsilon(plan, numbers)}; features moved "
        f"{numbers['feature_gain_mean']:.3f} along the carriers (mean, as a reader of the files sees it)",
    ]


def _mark_warnings(plan: "Plan", summary: "Summary") -> Iterator[str]:
    from radiotag.plan import indexes, unexpected_files

    if stale := indexes(plan):
        names = ", ".join(stale[:SHOWN]) + (", …" if len(stale) > SHOWN else "")
        yield f"warning      copied as they were, though they list files that are marked: {names}: make them again"
    if summary.dropped:
        yield f"warning      {summary.dropped} marked files lack what lay behind the picture (gain map, depth, film)"
    if summary.full_chroma:
        yield (
            f"warning      {summary.full_chroma} marked JPEGs have chroma at full resolution: theirs (4:4:0 or 4:1:1) "
            "cannot be written, and those that are copied keep it"
        )
    if summary.full_colour:
        yield f"warning      {summary.full_colour} marked files have no palette: 256 colours were too few"
    if summary.unchanged:
        yield f"warning      {summary.unchanged} of the marked images came out unchanged: no room for a mark"
    if strange := unexpected_files(plan):
        yield f"warning      files in {plan.output} that are not the source's: {len(strange)}, such as {strange[0]}"


def _after_marking(plan: "Plan", summary: "Summary", key: Path) -> list[str]:
    if failed := len(summary.failed):
        return [f"next         {failed} of the images {plan.store.failed_where} {plan.output}: {MENDED}"]
    if not summary.marked:
        return ["next         nothing is marked: raise --fraction"]
    flat = f" --marked {shlex.quote(str(plan.manifest))}" if plan.rows.keys() == {""} else ""
    later = f"radiotag verify model.pt --key {shlex.quote(str(key))}{flat}"
    return [f"next         release {plan.output}", f"later        {later}"]


# ---------------------------------------------------------------- train-demo


@app.command(
    name="train-demo",
    epilog=examples("radiotag train-demo", "radiotag train-demo ./imgs-marked -o model.pt --arch resnet18"),
)
def train_demo(
    context: typer.Context,
    data: Annotated[
        Path | None, typer.Argument(metavar="DATA", help="folder of class sub-folders; none: the demonstration")
    ] = None,
    arch: Annotated[str, training_option(metavar="NAME", help="torchvision classifier, or resnet10")] = "resnet18",
    epochs: Annotated[int, training_option(min=1, max=100_000, metavar="N", help="passes over the data")] = 10,
    image_size: Annotated[
        int | None,
        training_option(
            min=1,
            max=2048,
            metavar="PIXELS",
            help="the network's input in pixels",
            show_default="the checkpoint's, or the images' own",
        ),
    ] = None,
    lr: Annotated[
        float, training_option(min=1e-8, max=100.0, metavar="RATE", help="peak learning rate of SGD for batches of 128")
    ] = 0.1,
    val: Annotated[Path | None, training_option(metavar="DIR", help="held-out images, for the accuracy")] = None,
    init: Annotated[Path | None, training_option(metavar="FILE", help="start from this checkpoint")] = None,
    head_only: Annotated[
        bool, training_option("--head-only", metavar="", help="train the last layer alone (needs --init)")
    ] = False,
    teacher: Annotated[
        Path | None, training_option(metavar="FILE", help="learn this model's outputs instead of the labels")
    ] = None,
    crops: Annotated[
        float,
        training_option(
            min=0.01,
            max=1.0,
            metavar="SHARE",
            help="random resized crops of at least this share of the area, as for photographs; 1: small shifts",
        ),
    ] = 1.0,
    robust: Annotated[
        bool,
        training_option(
            "--robust", metavar="", help="for a marking network: withstand small changes; half as slow again"
        ),
    ] = False,
    stem: Annotated[
        str, training_option(metavar="auto|small|stock", help="first layers; auto: small up to 64 pixels")
    ] = "auto",
    seed: Annotated[
        int, training_option(min=0, max=2**63 - 1, metavar="N", help="seed of weights, order and crops")
    ] = 0,
    resume: Annotated[bool, runtime_option("--resume", metavar="", help="go on from the checkpoint at -o")] = False,
    device: DeviceOption = "auto",
    batch_size: Annotated[int, runtime_option(min=2, max=65536, metavar="N", help="images a step")] = 128,
    output: Annotated[
        Path | None,
        output_option(
            "--output",
            "-o",
            metavar="FILE",
            help="the checkpoint",
            show_default="model.pt; of the demonstration, radiotag-demo/",
        ),
    ] = None,
    force: ForceOption = False,
    json_: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a classifier as someone who found the data would; or, with no DATA, show the whole method in minutes."""
    with reporting("train-demo", json_, quiet) as report:
        if data is None:
            _refuse_training_options(context)
            _demonstrate(report, output or Path("radiotag-demo"), choose_device(device), force, seed)
            return
        target = output or Path("model.pt")
        if target.exists() and not (force or resume):
            raise RadiotagError(f"{target} exists", "go on with --resume, overwrite with --force, or choose another -o")
        if not target.absolute().parent.is_dir():  # known now, and not after the first epoch
            raise RadiotagError(f"cannot write {target}: there is no folder {target.parent}", "make it, or change -o")
        if head_only and init is None:
            raise RadiotagError("--head-only needs a trained network", "give one with --init FILE")
        if robust and (head_only or teacher):
            raise typer.BadParameter("--robust trains all layers, on labels: leave out --head-only and --teacher")
        if stem not in {"auto", "small", "stock"}:
            raise typer.BadParameter(f"--stem is auto, small or stock, not {stem}")
        from radiotag import networks, training

        report.note("reading images …")
        first = networks.load_network(init) if init else None
        size = image_size or (first.spec.image_size if first else training.natural_size(data))
        images = training.load_folder(data, training.size_to_crop(data, size, crops))
        recipe = training.Recipe(
            epochs=epochs, batch_size=batch_size, lr=lr, seed=seed, head_only=head_only, robust=robust, crops=crops
        )
        small = None if stem == "auto" else stem == "small"
        network = (
            training.initialised_from(init, images, seed=seed, image_size=size)
            if init
            else training.new_network(arch, images, stem=small, seed=seed, image_size=size)
        )
        held_out = training.load_folder(val, size, images.names) if val else None
        for folder, loaded in ((data, images), (val, held_out)):
            _note_broken(report, loaded.broken if loaded else (), str(folder))
        taught = networks.load_network(teacher) if teacher else None
        with training_progress(report, epochs) as show:
            course = training.Course(
                teacher=taught, validation=held_out, output=target, resume=resume, device=choose_device(device),
                progress=show,
            )  # fmt: skip
            reached = training.train(network, images, recipe, course)
        shown = "not measured (no --val)" if reached is None else f"{reached:.2%}"
        report.say(
            f"model        {target} ({network.spec.architecture}, {len(images.names)} classes, "
            f"{network.spec.image_size} px, {epochs} epochs, seed {seed})",
            f"accuracy     {shown}",
            f"next         radiotag verify {shlex.quote(str(target))} --key k.safetensors",
        )
        report.give(
            model=str(target), architecture=network.spec.architecture, classes=len(images.names), epochs=epochs,
            accuracy=reached,
        )  # fmt: skip


@contextmanager
def training_progress(report: Report, epochs: int) -> Iterator[Callable[[int, float, float], None]]:
    """A progress bar over all epochs, with the running loss."""
    with progress_bar(report, "%") as bar:
        task = bar.add_task("training", total=100 * epochs, detail="")

        def show(epoch: int, share: float, loss: float) -> None:
            detail = f"epoch {epoch + 1}/{epochs}  loss {loss:.3f}"
            bar.update(task, completed=int(100 * (epoch + share)), detail=detail)

        yield show


def _refuse_training_options(context: typer.Context) -> None:
    """The demonstration has a recipe of its own: nothing that was asked for is ignored."""
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        given = source is not None and source.name == "COMMANDLINE"
        if given and name not in {"seed", "device", "output", "force", "json_", "quiet"}:
            raise typer.BadParameter(f"{parameter.opts[0]} is for training on images of yours: name their folder")


def _demonstrate(report: Report, folder: Path, device: str, force: bool, seed: int) -> None:
    from radiotag import demo

    if folder.exists() and not force:
        raise RadiotagError(f"{folder} exists", "choose another folder with -o, or start over with --force")
    result = demo.run(folder, device=device, seed=seed, note=report.note)
    report.say(*demo.lines(result))
    report.give(**demo.as_json(result))


# ---------------------------------------------------------------- verify


@app.command(
    epilog=examples(
        "radiotag verify model.pt --key k.safetensors",
        "radiotag verify a.pt b.safetensors -k k.safetensors --data ./held-out --report evidence.html",
        "radiotag verify -k k.safetensors --black-box --data ./held-out --export questions",
        "radiotag verify -k k.safetensors --predictions answers.csv",
    )
)
def verify(
    key: KeyOption,
    models: Annotated[
        list[Path] | None, typer.Argument(metavar="MODEL", help="suspects: .pt, .pth, .th, .safetensors or .pt2")
    ] = None,
    arch: Annotated[
        str | None,
        suspect_option(
            metavar="NAME|FILE.py:FUNCTION", help="the suspect's network, if not recognised; a FILE.py is run"
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        suspect_option(
            min=1,
            max=2048,
            metavar="PIXELS",
            help="its input in pixels",
            show_default="the file's, else its architecture's",
        ),
    ] = None,
    mean: Annotated[str | None, suspect_option(metavar="R,G,B", help="its normalisation, of pixels in 0..1")] = None,
    std: Annotated[str | None, suspect_option(metavar="R,G,B", help="its normalisation, of pixels in 0..1")] = None,
    data: Annotated[
        Path | None,
        evidence_option(
            metavar="DIR",
            help="unmarked images to ask with; labelled by sub-folders, they match classes",
            show_default="synthetic images",
        ),
    ] = None,
    public: Annotated[
        Path | None,
        evidence_option(metavar="FILE.pub", help="key, manifest, classes and data must be those published here"),
    ] = None,
    control: Annotated[
        list[Path] | None,
        evidence_option(metavar="CLEAN", help="a model known to be clean, tested beside; can be repeated"),
    ] = None,
    marked: Annotated[
        Path | None, evidence_option(metavar="MANIFEST", help="use this manifest's classes, and refuse its images")
    ] = None,
    alpha: Annotated[
        float,
        evidence_option(min=1e-300, max=0.5, metavar="P", help="detected if the corrected p is at most this"),
    ] = 1e-4,
    calibrate: Annotated[
        int,
        evidence_option(min=0, max=1_000_000, metavar="N", help="null keys to test the same suspect with, as a check"),
    ] = 0,
    black_box: Annotated[
        bool,
        black_box_option("--black-box", metavar="", help="test by the suspect's answers to images of --data alone"),
    ] = False,
    decoys: Annotated[
        int | None,
        black_box_option(
            min=1, max=99_999, metavar="K", help="decoy keys beside the true one", show_default="23, or as alpha needs"
        ),
    ] = None,
    export: Annotated[
        Path | None, black_box_option(metavar="DIR", help="write the questions for a suspect that is elsewhere")
    ] = None,
    predictions: Annotated[
        Path | None, black_box_option(metavar="FILE.csv|.json", help="that suspect's answers to the exported questions")
    ] = None,
    device: DeviceOption = "auto",
    batch_size: Annotated[int, runtime_option(min=1, max=4096, metavar="N", help="images computed together")] = 64,
    report_: Annotated[
        Path | None, output_option("--report", metavar="FILE.html", help="write the result as a page, too")
    ] = None,
    force: ForceOption = False,
    json_: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Test whether models were trained on data marked with this key; exit 0 if all were detected, 3 if not.

    A suspect's file is hostile input: it is read as weights alone, not run.
    --arch FILE.py:FUNCTION runs that file: name only code that you trust.
    There is no --seed: a choice made after seeing a suspect would void p.
    """
    with reporting("verify", json_, quiet) as report:
        of_suspects = {"--arch": arch, "--image-size": image_size, "--mean": mean, "--std": std, "--control": control}
        _check_elsewhere(models, export, predictions, {
            "--export": {**of_suspects, "--report": report_},
            "--predictions": {**of_suspects, "--data": data, "--marked": marked, "--decoys": decoys},
        })  # fmt: skip
        _check_verify(black_box, export, predictions, calibrate, data, decoys)
        from radiotag import report as pages
        from radiotag import verification
        from radiotag.blackbox import check_export
        from radiotag.keys import load_key

        if export:
            check_export(export)
        if report_:
            pages.check(report_)
            if report_.exists() and not force:
                raise RadiotagError(f"{report_} exists", "choose another name, or overwrite it with --force")
        secret = load_key(key)
        if arch and ":" in arch:
            report.note(f"note: --arch runs the code in {arch.rpartition(':')[0]}")
        options = verification.VerifyOptions(
            architecture=arch, image_size=image_size, mean=_triple(mean, "--mean"), std=_triple(std, "--std"),
            manifest=marked, public=public, alpha=alpha, calibrate=calibrate, black_box=black_box, decoys=decoys,
            device=choose_device(device), batch_size=batch_size,
        )  # fmt: skip
        if export and data:
            _export(report, secret, data, options, export)
            return
        with examining(report) as progress:
            asked_for = Asked(models=models or [], controls=control or [], data=data, predictions=predictions)
            tested = _test(report, asked_for, secret, options, progress)
        problem = _write_page(report, report_, tested, secret, options) if report_ else None
        _tell(report, tested, secret, options, report_, problem)
        if problem:
            raise typer.Exit(ERROR)
        raise typer.Exit(DETECTED if all(finding.detected for finding in tested.findings) else NO_EVIDENCE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tested:
    """What came of a verification, and under what conditions."""

    findings: "list[Finding]"
    controls: "list[Finding]"  # models known to be clean, under the same key
    conditions: "Conditions"


def _test(report: Report, asked: "Asked", secret: "Key", options: "VerifyOptions", progress: "ShowProgress") -> Tested:
    from radiotag import api, verification
    from radiotag.public import of_questions

    images, _ = api.unmarked_images(asked.data, None, secret, options)
    conditions = api.conditions(secret, images, options)
    if asked.predictions:
        findings = verification.verify_predictions(asked.predictions, secret, options, progress)
        return Tested(findings=findings, controls=[], conditions=of_questions(conditions))
    if options.black_box and images:
        queries = _queries(report, secret, images, options)
        test = partial(verification.verify_black_box, queries=queries, key=secret, options=options, progress=progress)
    else:
        test = partial(verification.verify, key=secret, options=options, data=images, progress=progress)
    findings = test([*asked.controls, *asked.models])  # in one run, which draws and reads the images once
    controls, suspects = (
        verification.corrected(part, options.alpha)
        for part in (findings[: len(asked.controls)], findings[len(asked.controls) :])
    )
    return Tested(findings=suspects, controls=controls, conditions=conditions)


def _write_page(
    report: Report, path: Path, tested: Tested, secret: "Key", options: "VerifyOptions"
) -> RadiotagError | None:
    """Write the page; where that fails, the verdict of an hour is told all the same."""
    from radiotag import report as pages

    command, created = ["radiotag", *sys.argv[1:]], datetime.now(UTC)
    page = pages.Page(
        findings=tested.findings, controls=tested.controls, conditions=tested.conditions, key=secret,
        alpha=options.alpha, command=command, created=created,
    )  # fmt: skip
    try:
        pages.write(path, page)
    except RadiotagError as error:
        report.problem(str(error), error.hint)
        return error
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a verification is to look at."""

    models: list[Path]
    controls: list[Path]
    data: Path | None
    predictions: Path | None


def _check_elsewhere(
    models: list[Path] | None, export: Path | None, predictions: Path | None, idle: dict[str, dict[str, Any]]
) -> None:
    """Suspects that are elsewhere: a usage error for what means nothing. `idle`: the options that either ignores."""
    if bool(models) == bool(export or predictions):
        raise typer.BadParameter(
            "give one or more MODELs, or --export or --predictions instead of them"
            if not models
            else "--export and --predictions are for a suspect that is elsewhere: leave MODEL out"
        )
    if export and predictions:
        raise typer.BadParameter("--export comes first, --predictions when the answers are there: give one of them")
    for name, why in (("--export", "asks nobody yet"), ("--predictions", "answers what was exported")):
        given = [option for option, value in idle[name].items() if value]
        if given and (export if name == "--export" else predictions):
            raise typer.BadParameter(f"{name} {why}: leave out {' and '.join(given)}")


def _check_verify(
    black_box: bool, export: Path | None, predictions: Path | None, calibrate: int, data: Path | None,
    decoys: int | None,
) -> None:  # fmt: skip
    """Combinations of the black-box test that mean nothing; a usage error each."""
    if decoys and not black_box:
        raise typer.BadParameter("--decoys are of the black-box test: add --black-box, or leave it out")
    if export and not black_box:
        raise typer.BadParameter("--export needs --black-box")
    if black_box and not predictions and data is None:
        raise typer.BadParameter("--black-box needs --data DIR: unmarked images in class sub-folders")
    if calibrate and (black_box or predictions):
        raise typer.BadParameter("--calibrate is for the white-box test: black-box counts its null out exactly")


def _note_broken(report: Report, paths: Sequence[str], where: str) -> None:
    for text in broken_warnings(paths, where):
        report.note(f"warning: {text}")


def _queries(report: Report, secret: "Key", images: "UnmarkedImages", options: "VerifyOptions") -> "Queries":
    from radiotag import verification

    queries = verification.prepare_queries(secret, images, options)
    report.note(
        f"black-box: {len(set(queries.rows))} classes, {len(queries.rows)} images with and without the patterns of the "
        f"true key and of {queries.decoys} decoys: {len(queries.rows) * len(queries.names)} questions a suspect"
    )
    _note_broken(report, images.broken, images.name)
    return queries


def _export(report: Report, secret: "Key", data: Path, options: "VerifyOptions", folder: Path) -> None:
    from radiotag import api, blackbox
    from radiotag.probes import FolderImages

    images = FolderImages(data, options.manifest)
    api.check_public(secret, images, options)
    queries = _queries(report, secret, images, options)
    with progress_bar(report, "images") as bar:
        task = bar.add_task("exporting", total=None, detail="")
        count = blackbox.export(queries, secret, folder, lambda done, of: bar.update(task, completed=done, total=of))
    report.say(
        f"exported     {count} images to {folder} (which is which is kept beside the key)",
        "ask          the suspect for a label or its probabilities on each; write file,label or file,CLASS,CLASS,...",
        f"questions    sha256:{queries.digest} (publish it before the answers are in)",
        f"key          sha256:{secret.fingerprint}",
        "note         this key is spent against whoever sees the questions: they show its patterns",
        f"next         radiotag verify --key {shlex.quote(str(secret.path))} --predictions answers.csv",
    )
    report.give(fingerprint=secret.fingerprint, export=str(folder), images=count, questions=queries.digest)


@contextmanager
def examining(report: Report) -> Iterator["ShowProgress"]:
    """A progress bar of what is done with each suspect; where there is none, a line for each suspect."""
    told: set[str] = set()
    with progress_bar(report, "") as bar:
        task = bar.add_task("examining", total=None, detail="")

        def show(suspect: str, what: str, done: int, of: int) -> None:
            if suspect not in told:
                told.add(suspect)
                report.note(f"examining {suspect} …")
            bar.update(task, description=f"{Path(suspect).name}: {what}", completed=done, total=of)

        yield show


def _tell(
    report: Report, tested: Tested, secret: "Key", options: "VerifyOptions", page: Path | None,
    problem: RadiotagError | None,
) -> None:  # fmt: skip
    from radiotag import report as pages
    from radiotag import verification
    from radiotag.public import told
    from radiotag.radioactive import NULL

    findings = tested.findings
    for finding in findings:
        report.say(*_finding_lines(finding, options.alpha, len(findings)))
        if finding.calibration:
            report.say(*pages.histogram(finding.calibration, pages.is_corrected(finding)), "")
    white = all(finding.method == "white-box" for finding in findings)
    holds_if, unless = verification.VOIDS if white else pages.BLACK_BOX_VOIDS
    report.say(
        *_control_lines(tested.controls),
        f"null         {NULL}",
        f"statistic    {f'{secret.statistic}, declared in the key' if white else pages.BLACK_BOX}",
        f"key          sha256:{secret.fingerprint}",
        *(f"{what:<12} {state}" for what, state in told(tested.conditions)),
        f"note         {holds_if} {unless}",
        *_advice(findings),
        f"report       {'not written' if problem else page}"
        if page
        else f"next         {shlex.join(['radiotag', *sys.argv[1:]])} --report evidence.html",
    )
    report.give(**_verify_json(tested, secret, options, page, problem))


def _control_lines(controls: "list[Finding]") -> list[str]:
    lines = [
        f"control      {control.path}, known to be clean: log10 p = {control.log10_p:.2f} under the same key"
        for control in controls
    ]
    if any(control.detected for control in controls):
        lines.append("warning      a model known to be clean is detected: do not trust this key, or that it is clean")
    return lines


def _verify_json(
    tested: Tested, secret: "Key", options: "VerifyOptions", page: Path | None, problem: RadiotagError | None
) -> dict[str, Any]:
    from radiotag import public, verification

    suspects = [verification.as_json(finding) for finding in tested.findings]
    calibrations = [suspect["calibration"] for suspect in suspects if "calibration" in suspect]
    white = all(finding.method == "white-box" for finding in tested.findings)
    return {
        "fingerprint": secret.fingerprint, "alpha": options.alpha,
        "statistic": secret.statistic if white else "black-box",
        "detected": all(finding.detected for finding in tested.findings),
        "suspects": suspects,
        "controls": [verification.as_json(control) for control in tested.controls],
        **public.as_json(tested.conditions),
        **({"calibration": calibrations[0]} if len(calibrations) == 1 else {}),
        **({"report": str(page)} if page and not problem else {}),
        **({"error": str(problem), "hint": problem.hint} if problem else {}),
    }  # fmt: skip


def _advice(findings: "list[Finding]") -> list[str]:
    """What may find more, where nothing was found; each further look is one more test, which has to be told."""
    missed = [finding for finding in findings if not finding.detected]
    if not missed:
        return []
    tries = []
    blind = [finding for finding in missed if finding.method == "white-box" and finding.images_log10_p is None]
    if blind:
        tries.append("--data DIR with real, unmarked images of the marked classes")
    if any(finding.method == "black-box" for finding in missed):
        tries += ["more --decoys and more images in --data", "probabilities, where only labels were answered"]
    tries.append("next time more marks: a larger --fraction, of fewer classes")
    return [
        f"try          {'; '.join(tries)}",
        "             report every look you take: the best of several p-values is none",
    ]


def _triple(text: str | None, option: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        values = tuple(float(v) for v in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or not all(map(math.isfinite, values)) or (option == "--std" and min(values) <= 0):
        raise typer.BadParameter(f"{option} takes three numbers R,G,B, such as 0.5,0.5,0.5")
    return values


def _finding_lines(finding: "Finding", alpha: float, count: int) -> list[str]:
    verdict = "MARK DETECTED" if finding.detected else "no evidence"
    corrected = f", corrected for {count} suspects {finding.log10_p_corrected:.2f}" if count > 1 else ""
    how, more = f"black-box, {finding.decoys} decoys", ""
    if finding.method == "white-box":
        how = "alignment R² " + ("none" if finding.alignment_r2 is None else f"{finding.alignment_r2:.2f}")
        more = f", mean cosine {finding.mean_cosine:+.4f}, of patterns {finding.pattern_cosine:+.4f}"
    lines = [
        f"suspect      {finding.path} ({finding.architecture}, {finding.classes_used} classes used, {how})",
        f"verdict      {verdict}: log10 p = {finding.log10_p:.2f}{corrected} (threshold p ≤ {alpha:g}){more}",
    ]
    if finding.sets > 1:
        strongest = f"the first {finding.first_classes} of {finding.classes_used} classes, in the key's order"
        lines.append(f"strongest    {strongest}, of {finding.sets} nested sets; p is corrected for the choice")
    if finding.method == "white-box":
        paper = "none" if finding.paper_log10_p is None else f"{finding.paper_log10_p:.2f}"
        lines.append(f"paper's test log10 p = {paper} (information only)")
    return [*lines, *(f"warning      {warning}" for warning in finding.warnings), ""]


def main() -> None:
    """The entry point: usage errors, too, are told as `error:` and `hint:`, and in JSON where it was asked for."""
    arguments = sys.argv[1:]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends us as Ctrl-C does: a message, exit code 130
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without × and ≤ is no reason to fail
    if not arguments:
        app()
    try:
        sys.exit(app(standalone_mode=False))
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        command = next((a for a in arguments if not a.startswith("-")), "")
        known = command in {"keygen", "mark", "train-demo", "verify"}
        message = error.format_message().strip().rstrip(".")
        Report(command, "--json" in arguments, True, mute=command == "mark" and is_aside()).fail(
            message[:1].lower() + message[1:], f"radiotag {command} --help" if known else "radiotag --help"
        )
        sys.exit(error.exit_code if hasattr(error, "exit_code") else 2)
