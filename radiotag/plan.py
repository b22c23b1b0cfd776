"""The plan of a marking run: every input with its output, made and checked before anything is written.

The plan refuses secrets among the files, names that would become equal, and an output of earlier runs that this run
cannot continue.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError, safe_open

from radiotag import manifest
from radiotag.errors import RadiotagError
from radiotag.expectation import Expectation, expected, looks
from radiotag.files import hash_or_none
from radiotag.images import OTHER_SUFFIXES, SUFFIXES, decode, extension, psnr
from radiotag.keys import Key, choose, order, patterned
from radiotag.listing import Item, list_folder
from radiotag.manifest import MANIFEST_FORMAT, Row
from radiotag.radioactive import Marking
from radiotag.ranking import NOTHING, Choice, allot, choose_hard
from radiotag.stores import Store, open_store

INDEX = re.compile(  # files of checksums (BagIt's among them), and indexes of shards
    r"(?:sha|md)\d+(?:sums?)?(?:\.txt)?|checksums?.*|.*\.(?:sha\d+|md5|sfv|idx|tfindex)|(?:tag)?manifest-(?:sha|md)\d+\.txt",
    re.IGNORECASE,
)
EARLIER: dict[str, object] = {"choose": "random", "spread": True, "exclude": []}  # settings that were not recorded
ALIKE_PSNR = 15.0  # dB; a marked image and its source have more, two different images have about 10


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkOptions:
    """How a data set is marked."""

    # The manifest records these settings; a run that continues an earlier one must have the same.
    fraction: float = 1.0  # of the whole data set
    epsilon: float = 10.0  # largest change of a pixel, in units of 1/255
    min_psnr: float | None = None  # dB, minimum of each marked image; None: by the image's size
    steps: int = 20  # gradient steps per image
    format: str = "keep"  # or "png"
    seed: int = 0  # of the random crops
    spread: bool = False  # mark every class alike; otherwise few marks go into few classes
    choose: str = "hard"  # which images: those that the marking network finds hard, or "random"
    exclude: tuple[str, ...] = ()  # patterns of images that are only copied
    # The following settings change no byte of the output.
    device: str = "cpu"
    batch_size: int = 64  # images optimised together
    force: bool = False  # overwrite an existing output
    held_out: Path | None = None  # unmarked images that the public half commits to, for verification
    strict: bool = False  # stop at the first image that cannot be marked
    on_unmarkable: str = "fail"  # or "copy": images that are sound, but cannot be marked and written as they were

    @property
    def marking(self) -> Marking:
        """How single images are marked."""
        return Marking(epsilon=self.epsilon, min_psnr=self.min_psnr, steps=self.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Every input of a marking run and its output."""

    store: Store
    key: Key = field(repr=False)  # secret
    options: MarkOptions
    manifest: Path
    rows: dict[str, int]  # class → carrier row
    choice: Choice  # relative paths to mark; of hard images, what is settled before they are ranked

    @property
    def public(self) -> Path:
        """The marked set's public half, beside the manifest."""
        return self.manifest.with_name(self.manifest.name.removesuffix(".manifest.jsonl") + ".pub")

    @property
    def source(self) -> Path:
        """The data set."""
        return self.store.source

    @property
    def output(self) -> Path:
        """Its marked copy."""
        return self.store.output

    @property
    def items(self) -> list[Item]:
        """The images of the source."""
        return self.store.listing.items

    @property
    def other_files(self) -> list[PurePosixPath]:
        """Files that are copied so that the tree is complete."""
        return self.store.listing.other_files

    @property
    def header(self) -> Row:
        """The manifest's first line."""
        names = ("fraction", "format", "seed", "epsilon", "min_psnr", "steps", "choose", "spread")
        settings = {name: getattr(self.options, name) for name in names} | {"exclude": sorted(self.options.exclude)}
        return {"radiotag": MANIFEST_FORMAT, "fingerprint": self.key.fingerprint, **settings}

    def marks(self, item: Item) -> bool:
        """Whether an image is to be marked; otherwise it is copied."""
        return item.path.as_posix() in self.choice.marked

    def by_class(self) -> dict[str, list[str]]:
        """Class → relative paths of its images."""
        return by_class((item.path.as_posix(), item.label) for item in self.items)

    def sizes(self) -> dict[str, int]:
        """Class → number of its images."""
        return dict(Counter(item.label for item in self.items))

    def wanted(self) -> dict[str, int]:
        """Class → how many images this run's fraction asks for."""
        return allotted(self.key, self.sizes(), self.rows, self.options)

    def expectation(self, failed: Iterable[Row] = ()) -> Expectation:
        """What the test may be expected to find, by what was measured; the first image stands for all.

        failed: rows of images that could not be marked.
        """
        usual = MarkOptions()
        names = ("epsilon", "min_psnr", "steps", "choose")
        if other := [name for name in names if getattr(self.options, name) != getattr(usual, name)]:
            given = " ".join(f"--{name.replace('_', '-')} {getattr(self.options, name)}" for name in other)
            return Expectation(log10_p=None, reason=f"not measured with {given}")
        lost, wanted = Counter(row["class"] for row in failed if row.get("chosen")), self.wanted()
        marked = {name: count - lost[name] for name, count in wanted.items()}
        try:
            look = looks(self.store.read(self.items[0].path))
        except (RadiotagError, OSError):
            look = None
        return expected(self.sizes(), marked, look, spread=self.options.spread)

    def target(self, item: Item) -> str:
        """An image's relative path in the output: unmarked images keep their format."""
        return str(extension(item.path, self.options.format if self.marks(item) else "keep"))

    def targets(self) -> set[str]:
        """Relative paths of all files that the output will hold."""
        return {self.target(item) for item in self.items} | {path.as_posix() for path in self.other_files}


def make_plan(source: Path, output: Path, key: Key, options: MarkOptions) -> Plan:
    """Pair every input with its output and choose the images to mark. RadiotagError before anything is written."""
    store = open_store(source, output, options.exclude)
    items, names, other_files = store.listing
    store.check_options(options.format)
    if output.resolve().is_relative_to(source.resolve()) or source.resolve().is_relative_to(output.resolve()):
        raise RadiotagError(f"{output} and {source} lie in each other", "choose another folder with -o")
    for path in other_files:
        if _is_secret(source / path):
            raise RadiotagError(f"{source / path} is secret, and would be copied", "keep keys and manifests elsewhere")
    paths = by_class((item.path.as_posix(), item.label) for item in items)
    rows = carrier_rows(key, sorted(paths) if key.class_names else names)  # named: no numbers of absent classes
    wanted = allotted(key, {name: len(members) for name, members in paths.items()}, rows, options)
    ranked = options.choose == "hard" and len(paths) > 1  # of one class, nothing is told from another
    choice = NOTHING if ranked else choose_at_random(key, paths, wanted)
    possible = {item.path.as_posix() for item in items} if ranked else choice.marked  # before anything is ranked
    _check_collisions(items, possible, options.format)
    if options.held_out:
        list_folder(options.held_out)  # the public half is written last
    named_output = output if output.name else output.absolute()
    return Plan(
        store=store, key=key, options=options, rows=rows, choice=choice,
        manifest=named_output.with_name(named_output.name + ".manifest.jsonl"),
    )  # fmt: skip


def by_class(images: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """(path, class) of images → class → paths."""
    found: dict[str, list[str]] = {}
    for path, label in images:
        found.setdefault(label, []).append(path)
    return found


def allotted(key: Key, sizes: dict[str, int], rows: dict[str, int], options: MarkOptions) -> dict[str, int]:
    """Class → how many of its images to mark; rows: class → carrier. Few marks go into few classes (`allot`)."""
    place = {row: number for number, row in enumerate(key.class_order)}
    in_order = {name: sizes[name] for name in sorted(sizes, key=lambda name: place[rows[name]])}
    return allot(in_order, options.fraction, spread=options.spread or not key.nested)


def choose_at_random(key: Key, paths: dict[str, list[str]], wanted: dict[str, int]) -> Choice:
    """So many images of each class (class → paths), as the key's secret decides."""
    marked = frozenset(path for name, members in paths.items() for path in choose(key, members, wanted[name]))
    return Choice(marked, frozenset(path for path in marked if patterned(key, path)))


def choose_hardest(key: Key, ranked: dict[str, list[str]], wanted: dict[str, int], earlier: Choice) -> Choice:
    """So many hard images of each class (class → paths, hardest first), beside what was chosen earlier."""
    found = [choose_hard(paths, wanted[name], earlier, partial(order, key)) for name, paths in ranked.items()]
    return Choice(*(frozenset(chain.from_iterable(parts)) for parts in zip(*found, strict=True)))


def choose_ranked(plan: Plan, ranked: dict[str, list[str]]) -> Plan:
    """The plan with its fraction of hard images chosen; ranked: class → paths, hardest first."""
    choice = plan.choice | choose_hardest(plan.key, ranked, plan.wanted(), plan.choice)
    _check_collisions(plan.items, choice.marked, plan.options.format)
    return replace(plan, choice=choice)


def is_settled(plan: Plan) -> bool:
    """Whether no image has to be ranked: the choice is random, or earlier runs have made it."""
    wanted, had = plan.wanted(), plan.choice.marked
    return plan.options.choose == "random" or all(
        len(had.intersection(paths)) >= wanted[name] for name, paths in plan.by_class().items()
    )


def _is_secret(path: Path) -> bool:
    """Whether a file, by content, is a key, a file of black-box queries or a manifest, which must not be released."""
    try:
        with path.open("rb") as file:
            start = file.read(4096)
        if start.startswith(b"{"):
            line = start.split(b"\n", 1)[0]
            return b'"radiotag"' in line and b'"fingerprint"' in line
        if start[8:9] != b"{":
            return False
        with safe_open(path, framework="pt") as tensors:
            metadata = (tensors.metadata() or {}).get("radiotag", "")
    except (SafetensorError, OSError):
        return False
    return '"statistic"' in metadata or '"fingerprint"' in metadata


def carrier_rows(key: Key, names: Sequence[str]) -> dict[str, int]:
    """Class → carrier row: by name if the key has names, else in order. RadiotagError for a class without carrier."""
    key_names = key.class_names
    if key_names is None or (len(key_names) == 1 and list(names) == [""]):
        if len(names) > len(key.carriers):
            hint = f"make a larger key: radiotag keygen --classes {len(names)}"
            raise RadiotagError(f"the key has {len(key.carriers)} carriers, the folder {len(names)} classes", hint)
        return {name: row for row, name in enumerate(names)}
    missing = sorted(set(names) - set(key_names))
    if missing == [""]:
        hint = "put the images into a sub-folder of the class's name, or use a key of one class: keygen --classes 1"
        raise RadiotagError("the key names its classes, and the folder has none", hint)
    if missing:
        hint = "use a key of this folder's classes: radiotag keygen --data SRC -o ANOTHER"
        raise RadiotagError(f"the key does not know the class '{missing[0]}'", hint)
    return {name: key_names.index(name) for name in names}


def _check_collisions(items: Sequence[Item], chosen: AbstractSet[str], format: str) -> None:
    if format == "keep":
        return
    targets = Counter(str(extension(i.path, format) if i.path.as_posix() in chosen else i.path) for i in items)
    repeated = next((name for name, count in targets.items() if count > 1), None)
    if repeated:
        raise RadiotagError(f"two images would both become {repeated}", "rename one, or use --format keep")


# ---------------------------------------------------------------- warnings about a plan


def unexpected_files(plan: Plan) -> list[str]:
    """Relative paths of files in the output that do not belong there: left by earlier runs, or added by a user."""
    output_files = set(plan.store.output_files())
    return sorted(output_files - with_earlier(plan).targets()) if output_files else []


def uncounted_classes(plan: Plan) -> list[str]:
    """First-level folders whose images are all copied only: loaders of class folders count them as classes, too."""
    images = (path for path in plan.other_files if path.suffix.lower() in SUFFIXES | OTHER_SUFFIXES)
    folders = {path.parts[0] for path in images if len(path.parts) > 1}
    return sorted(folders - {item.path.parts[0] for item in plan.items}) if "" not in plan.rows else []


# ---------------------------------------------------------------- the output of earlier runs


def check(plan: Plan) -> None:
    """RadiotagError for an output that this plan can neither begin nor continue; nothing is written."""
    check_begun(plan)
    if plan.manifest.exists() and not plan.options.force:
        check_rows(plan)


def check_begun(plan: Plan) -> None:
    """Like `check` without the rows: a run checks those after it has merged other processes' journals."""
    _check_links(plan)
    if plan.output.is_file() and plan.source.is_dir():
        raise RadiotagError(f"{plan.output} is a file", "choose another -o")
    if plan.options.force:
        return
    if plan.manifest.exists():
        _check_settings(plan, manifest.read_header(plan.manifest))
    elif plan.output.exists() and (plan.output.is_file() or any(plan.output.iterdir())):
        raise RadiotagError(f"{plan.output} exists and has no manifest", "choose another -o, or overwrite with --force")


def check_rows(plan: Plan) -> None:
    """RadiotagError for an output that holds files of an earlier, different run."""
    _check_images(plan)
    extended = with_earlier(plan)
    _check_stale(extended)
    _check_strangers(extended)


def with_earlier(plan: Plan) -> Plan:
    """The plan that also marks the images that earlier runs marked or chose.

    When images are added or removed, a fraction of a class covers other images; those marked before must stay marked.
    """
    carries = {  # path → whether it carries the pattern, None if it is not to be marked; whole rows would fill memory
        row["path"]: row.get("pattern", False) if row["status"] in {"marked", "chosen"} or "chosen" in row else None
        for row in _recorded(plan)
    }
    paths = {item.path.as_posix() for item in plan.items}
    marked = {path for path, pattern in carries.items() if pattern is not None and path in paths}
    at_random = plan.options.choose == "random"
    had = {path for path in marked if (patterned(plan.key, path) if at_random else carries[path])}
    choice = plan.choice | Choice(frozenset(marked), frozenset(had))
    _check_collisions(plan.items, choice.marked, plan.options.format)
    return replace(plan, choice=choice)


def to_mark(plan: Plan) -> dict[str, int]:
    """Class → how many of its images will be marked in the end; those that earlier runs marked stay so."""
    begun = plan.manifest.exists() and not plan.options.force
    wanted, had = plan.wanted(), (with_earlier(plan) if begun else plan).choice.marked
    return {name: max(wanted[name], len(had.intersection(paths))) for name, paths in plan.by_class().items()}


def stale_files(plan: Plan) -> Iterator[tuple[Path, str]]:
    """Files that earlier runs wrote and this run will not write, with their SHA-256 ("" if unknown)."""
    rows = (row for row in _recorded(plan) if not _is_replaced(plan, row) and "unmarkable" not in row)
    return plan.store.stale(rows, plan.targets())


def replaced_files(plan: Plan) -> Iterator[tuple[Path, str]]:
    """Like `stale_files`, copies of images that are now to be marked, under names with another suffix.

    Whoever had both could subtract one from the other.
    """
    return plan.store.stale((row for row in _recorded(plan) if _is_replaced(plan, row)), plan.targets())


def files_of_images(plan: Plan) -> Iterator[tuple[Path, str]]:
    """Like `stale_files`, all images that earlier runs wrote."""
    return plan.store.stale(_recorded(plan), {path.as_posix() for path in plan.other_files})


def indexes(plan: Plan) -> list[str]:
    """Paths of other files that list sizes, places or checksums, which the marked files no longer have."""
    return [path.as_posix() for path in plan.other_files if INDEX.fullmatch(path.name)]


def _is_replaced(plan: Plan, row: Row) -> bool:
    return row["status"] == "copied" and row["path"] in plan.choice.marked and "unmarkable" not in row


def _recorded(plan: Plan) -> Iterator[Row]:
    """The rows of the manifest in order; the last row of each path counts."""
    return (row for _, row in manifest.read_rows(plan.manifest))


def _check_links(plan: Plan) -> None:
    """Refuse to write through symbolic links in the output: a link may lead to the source."""
    parents = {path.parent for path in (*(item.path for item in plan.items), *plan.other_files)}
    for target in sorted({folder for parent in parents for folder in (parent, *parent.parents) if folder.name}):
        folder = plan.store.output_file(target)
        if folder and folder.is_symlink():
            message = f"{folder} is a link, and what lies behind it would be overwritten"
            raise RadiotagError(message, "remove the link, or choose another -o")


def _check_settings(plan: Plan, recorded: Row) -> None:
    """Refuse to go on with other settings; the fraction may be raised."""
    for name, value in plan.header.items():
        before = recorded.get(name, EARLIER.get(name))
        more = name == "fraction" and isinstance(before, float) and before < value  # what was marked stays so
        if before != value and not more:
            raise RadiotagError(
                f"{plan.output} was begun with {name} {before}, not {value}",
                "repeat the earlier setting, choose another -o, or start over with --force",
            )


def _check_images(plan: Plan) -> None:
    """Refuse to replace an earlier run's images by other images, or by marks of other carriers.

    A single unchanged image is enough to show that the source is the same data set.
    """
    items, any_same, any_other = {item.path.as_posix(): item for item in plan.items}, False, False
    for row in _recorded(plan):
        if not row.keys() >= {"sha256_in", "class", "row"}:
            continue
        _check_carrier(plan, row)
        if not any_same:
            item = items.get(row["path"])
            digest = item and plan.store.hash(item.path)
            any_same = digest == row["sha256_in"]
            any_other = any_other or item is None or digest is not None
    if any_other and not any_same:
        raise RadiotagError(
            f"{plan.output} was made of other images than are in {plan.source}",
            "choose another -o, or start over with --force",
        )


def _check_carrier(plan: Plan, row: Row) -> None:
    carrier = plan.rows.get(row["class"], row["row"])
    if carrier != row["row"]:
        message = f"the class '{row['class']}' was marked with carrier {row['row']}, and now has carrier {carrier}"
        hint = "choose another -o, or start over with --force; a key of keygen --data names its classes"
        raise RadiotagError(message, hint)


def _check_stale(plan: Plan) -> None:
    for stale, _ in stale_files(plan):
        if stale.exists():
            raise RadiotagError(
                f"{stale} was made by an earlier run, and would not be made by this one",
                "remove it, choose another -o, or start over with --force",
            )


def _check_strangers(plan: Plan) -> None:
    """Refuse to overwrite files that no run recorded, unless they look like their source, which a killed run leaves."""
    recorded = {row["path"] for row in _recorded(plan) if row["status"] != "chosen"}
    for item in plan.items if recorded else ():
        target = plan.store.output_file(plan.target(item))
        if target is None or item.path.as_posix() in recorded or not target.exists():
            continue
        if not _alike(plan.source / item.path, target):
            message = f"{target} was not made by an earlier run, and would be overwritten"
            raise RadiotagError(message, "move it away, choose another -o, or start over with --force")


def _alike(source: Path, target: Path) -> bool:
    """Whether a file is a copy of its source, or may be its marked version."""
    if hash_or_none(source) == hash_or_none(target):
        return True
    try:
        before, after = (decode(path.read_bytes(), str(path)).rgb for path in (source, target))
    except (RadiotagError, OSError):
        return False
    return before.shape == after.shape and psnr(before, after) >= ALIKE_PSNR
