"""What a command says: lines for people, one JSON object for programs, errors with a way out, a progress bar."""

import json
import os
import re
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

import typer

from radiotag import __version__
from radiotag.errors import RadiotagError, out_of_memory, printable
from radiotag.processes import launched

if TYPE_CHECKING:
    from rich.progress import Progress

DETECTED, ERROR, NO_EVIDENCE, INTERRUPTED = 0, 1, 3, 130  # exit codes; 2 is a usage error
SCHEMA = 1
LABEL = 13  # columns of a result's label
AGAIN = {
    "mark": "run the same command again: what is done is kept",
    "train-demo": "with DATA, go on from the last whole epoch with --resume",
}


def _print(stream: TextIO, *lines: str) -> None:
    """Print lines that no file or class name can disturb; on a terminal they are wrapped at words."""
    width = shutil.get_terminal_size().columns if stream.isatty() else 0
    print("\n".join(part for line in lines for part in wrapped(printable(line), width)), file=stream, flush=True)


def wrapped(line: str, width: int) -> list[str]:
    """A line in lines of a width at most, wrapped between words; 0 leaves it whole, and so do tables.

    What follows a label is indented below itself. A command goes on after a backslash, so that it can be copied. A word
    that is too long, such as a fingerprint, stays whole on a line of its own.
    """
    label, text = (line[:LABEL], line[LABEL:]) if re.match(rf".{{{LABEL - 1}}} \S", line) else ("", line)
    if not width or len(line) <= width or "  " in text:
        return [line]
    command = bool(label) and text.startswith("radiotag ")
    room, lines = max(20, width - 2 * command), [label]
    for word in map(shlex.quote, shlex.split(text)) if command else text.split(" "):
        gap = " " if lines[-1].strip() and lines[-1] != label else ""
        if len(lines[-1]) + len(gap) + len(word) <= room or not lines[-1].strip():
            lines[-1] += gap + word
        else:
            indent = LABEL if label and LABEL + len(word) <= room else 2 if label else 0
            lines.append(" " * indent + word)
    return [f"{part} \\" for part in lines[:-1]] + lines[-1:] if command else [part.rstrip() for part in lines]


@dataclass
class Report:
    """What a command says: lines for people, one object for programs."""

    command: str
    as_json: bool
    quiet: bool
    mute: bool = False  # in the launcher's other processes until the plan is made: the first tells of the same errors
    started: float = field(default_factory=time.monotonic)

    def note(self, text: str) -> None:
        """Something on the way: stderr."""
        if not self.quiet:
            _print(sys.stderr, text)

    def say(self, *lines: str) -> None:
        """Results: stdout."""
        if not self.quiet and not self.as_json:
            # A reader who has seen enough closes the pipe: that is noticed here, not at the interpreter's end.
            _print(sys.stdout, *lines)

    def give(self, **values: Any) -> None:
        """The JSON object, if it was asked for."""
        if self.as_json:
            seconds = round(time.monotonic() - self.started, 3)
            base = {"schema": SCHEMA, "command": self.command, "version": __version__}
            print(json.dumps({**base, **values, "seconds": seconds}), flush=True)

    def problem(self, message: str, hint: str) -> None:
        """Something that went wrong, and the way out: stderr always."""
        _print(sys.stderr, f"error: {message}")
        if hint:
            _print(sys.stderr, f"hint: {hint}")

    def fail(self, message: str, hint: str) -> None:
        """What ends a command: the error, and the JSON object."""
        if not self.mute:
            self.problem(message, hint)
            self.give(error=message, hint=hint)


def is_aside() -> bool:
    """Whether this is one of the launcher's processes and not the first, which speaks for all."""
    return launched()[0] > 0


@contextmanager
def reporting(command: str, as_json: bool, quiet: bool) -> Iterator[Report]:
    """Map what goes wrong to one message and an exit code, in one place."""
    aside = command == "mark" and is_aside()  # a cluster's nodes have a rank whatever they run
    report = Report(command, as_json and not aside, quiet or aside, mute=aside)
    try:
        yield report
    except BrokenPipeError:  # whoever reads the results has enough of them
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
        raise typer.Exit(ERROR) from None
    except RadiotagError as error:
        _debug()
        report.fail(str(error), error.hint)
        raise typer.Exit(ERROR) from None
    except KeyboardInterrupt:
        report.fail("interrupted", AGAIN.get(command, "run the same command again"))
        raise typer.Exit(INTERRUPTED) from None
    except OSError as error:
        _debug()
        report.fail(f"{error.filename or 'system'}: {error.strerror or error}", "check the path, permissions and space")
        raise typer.Exit(ERROR) from None
    except Exception as error:
        if isinstance(error, typer.Exit) or hasattr(error, "format_message"):  # an exit code, a usage error
            raise
        _debug()
        report.fail(*_unforeseen(error))
        raise typer.Exit(ERROR) from None


def _unforeseen(error: Exception) -> tuple[str, str]:
    text = str(error).strip()
    if out_of_memory(error):
        return "out of memory", "use a smaller --batch-size"
    first = f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
    return f"this should not happen: {first}", "run it again with RADIOTAG_DEBUG=1 and report what it prints"


def _debug() -> None:
    if os.environ.get("RADIOTAG_DEBUG") == "1":
        traceback.print_exc()


@contextmanager
def progress_bar(report: Report, unit: str) -> Iterator["Progress"]:
    """A progress bar on stderr; a pipe or a dumb terminal gets none."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False, markup=False)
    hidden = report.quiet or not console.is_terminal or console.is_dumb_terminal
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit + "  {task.fields[detail]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=hidden, transient=True) as bar:
        yield bar
