"""Public halves: what an owner publishes before the data, and what anybody can check a result against.

`keygen` writes the key's half, `mark` writes the marked set's, which repeats the key's and commits to more: the table
of classes and carriers, the manifest, and held-out images to verify with. Neither reveals anything secret. Published
or time-stamped before a suspect was made, they leave their owner no choice that he could make after seeing it.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from radiotag import plainjson
from radiotag.errors import RadiotagError
from radiotag.files import file_hash
from radiotag.keys import Key, weights_digest
from radiotag.manifest import rank_journals, recorded_classes, recorded_rows
from radiotag.probes import UnmarkedImages

PUBLIC_FORMAT = 2
TITLE = f"radiotag public key, format {PUBLIC_FORMAT}"
MARKED_TITLE = f"radiotag public key of a marked set, format {PUBLIC_FORMAT}"
LONGEST = 2**26  # characters
QUESTIONS = "the exported questions"  # what was shown, where answers to them are tested
REPUBLISH = "give the files that belong to this public half, or leave out --public"


# ---------------------------------------------------------------- writing


def public_half(key: Key) -> str:
    """The text to publish before the data: it commits to the key and to the test of suspects."""
    return "\n".join((TITLE, *_key_lines(key), f"date: {key.metadata['created']} (the owner's word)", ""))


def _key_lines(key: Key) -> list[str]:
    network = key.metadata["network"]
    names = json.dumps(key.class_names, ensure_ascii=False) if key.class_names else "none (no third party can tell)"
    return [
        f"fingerprint: sha256:{key.fingerprint}",
        f"commitment: sha256:{key.commitment}",
        f"beacon: {json.dumps(key.beacon)}",
        f"classes: {len(key.carriers)}",
        f"class names: {names}",
        f"dimension: {key.carriers.shape[1]}",
        f"network: {network['architecture']}, {network['image_size']} px, sha256:{weights_digest(key.weights).hex()}",
        f"statistic: {key.statistic}",
    ]


def marked_half(key: Key, manifest: Path, rows: dict[str, int], held_out: UnmarkedImages | None, date: str) -> str:
    """The text to publish with a marked set: it commits to the manifest, and to which class has which carrier."""
    lines = [
        MARKED_TITLE,
        *_key_lines(key),
        f"carriers: {json.dumps(rows, ensure_ascii=False)}",
        f"manifest: sha256:{file_hash(manifest)}",
        f"date: {date} (the owner's word)",
    ]
    if held_out is not None:
        lines.insert(-1, f"held-out: sha256:{images_digest(held_out)}, {len(held_out.labels)} images")
    return "\n".join((*lines, ""))


def images_digest(images: UnmarkedImages) -> str:
    """SHA-256 over the classes and contents of images, hexadecimal; order and file names do not count."""
    digest = hashlib.sha256()
    for label, content in sorted(zip(images.labels, images.digests(), strict=True)):
        name = label.encode("utf-8", "surrogateescape")
        digest.update(len(name).to_bytes(8, "big") + name + bytes.fromhex(content))
    return digest.hexdigest()


# ---------------------------------------------------------------- reading and checking


@dataclass(frozen=True, slots=True, kw_only=True)
class Public:
    """What a public half says."""

    path: Path
    fingerprint: str
    carriers: dict[str, int] | None  # class → row, of a marked set
    manifest: str | None  # SHA-256
    held_out: str | None  # SHA-256 of the set of images


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What of a test was compared with a publication. None: not checked, or not used."""

    public: str | None = None  # the file
    key: bool | None = None
    classes: bool | None = None  # which class has which carrier is committed
    manifest: bool | None = None
    data: bool | None = None  # synthetic images, or those that were committed
    chosen: tuple[str, ...] = ()  # what the person who ran the test chose freely


def read_public(path: Path) -> Public:
    """Read a public half. RadiotagError for what is none."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
        lines = text.split("\n")  # not splitlines: a class's name may hold other separators
        if len(text) > LONGEST or len(lines) > 1000 or not lines or lines[0] not in {TITLE, MARKED_TITLE}:
            raise ValueError("its first line is another")
        values = dict(line.split(": ", 1) for line in lines[1:] if line)
        if len(values) < sum(map(bool, lines[1:])):
            raise ValueError("a line is there twice")
        carriers = _table(values["carriers"]) if "carriers" in values else None
        return Public(
            path=path, fingerprint=_digest(values["fingerprint"]), carriers=carriers,
            manifest=_digest(values["manifest"]) if "manifest" in values else None,
            held_out=_digest(values["held-out"]) if "held-out" in values else None,
        )  # fmt: skip
    except OSError as error:
        raise RadiotagError(f"cannot read {path}: {error.strerror}", "check the path") from error
    except (ValueError, KeyError) as error:
        hint = "give k.pub, from keygen, or SRC-marked.pub, from mark"
        raise RadiotagError(f"{path} is no public half of a key: {error}", hint) from error


def _digest(text: str) -> str:
    value = text.split(",", maxsplit=1)[0].removeprefix("sha256:")
    if len(bytes.fromhex(value)) != 32:
        raise ValueError(f"{text!r} is no SHA-256")
    return value


def _table(text: str) -> dict[str, int]:
    table = plainjson.parse(text)
    if not isinstance(table, dict) or not all(type(row) is int and row >= 0 for row in table.values()):
        raise ValueError("its carriers are no table")
    if len(set(table.values())) < len(table):
        raise ValueError("two of its classes have one carrier")
    return table


def check(
    public: Public | None, key: Key, manifest: Path | None, data: UnmarkedImages | None, chosen: Sequence[str]
) -> Checked:
    """Compare what a test uses with a public half. RadiotagError for whatever differs or was not published.

    `chosen` names the options that shape a result. Without a public half nothing is compared, which the result says.
    """
    if public is None:
        return Checked(chosen=(*(["data"] if data else []), *(["manifest"] if manifest else []), *chosen))
    if public.fingerprint != key.fingerprint:
        told = f"{public.path} is of the key sha256:{public.fingerprint}, this is sha256:{key.fingerprint}"
        raise RadiotagError(told, REPUBLISH)
    if public.carriers is None and key.class_names is None:
        told = f"{public.path} does not say which class has which carrier, as the key names no classes"
        raise RadiotagError(told, "give the marked set's public half, SRC-marked.pub")
    table, named = public.carriers or {}, key.named_rows
    if max(table.values(), default=0) >= len(key.carriers):
        raise RadiotagError(f"{public.path} names more carriers than the key has", REPUBLISH)
    flat = len(named) == 1 and table == {"": 0}  # a folder without classes may be marked with a key of one
    if named and not flat and any(named.get(name) != row for name, row in table.items()):
        raise RadiotagError(f"{public.path} pairs classes and carriers otherwise than the key", REPUBLISH)
    if manifest is not None:
        _check_manifest(public, manifest)
    if data is not None and not _is_committed(public, manifest, data):
        what = "differ from the held-out images" if public.held_out else "are not among what was published"
        hint = "leave out --data, or give all originals with --marked, or images committed to by mark --held-out DIR"
        raise RadiotagError(f"the images in {data.name} {what}: {public.path}", hint)
    left = [("manifest", public.manifest and not manifest), ("held-out images", public.held_out and not data)]
    return Checked(
        public=str(public.path), key=True, classes=True, manifest=True if manifest else None, data=True,
        chosen=(*(f"no {what}" for what, left_out in left if left_out), *chosen),
    )  # fmt: skip


def _is_committed(public: Public, manifest: Path | None, data: UnmarkedImages) -> bool:
    """Whether these are the held-out images, or all originals that a manifest, already compared, records."""
    if public.held_out is not None and images_digest(data) == public.held_out:
        return True
    rows = recorded_rows(manifest) if manifest else ()
    return sorted((row["class"], row["sha256_in"]) for row in rows if "sha256_in" in row) == sorted(
        zip(data.labels, data.digests(), strict=True)
    )


def _check_manifest(public: Public, manifest: Path) -> None:
    if public.manifest is None:
        raise RadiotagError(f"{public.path} says nothing about a manifest", "give the marked set's SRC-marked.pub")
    if file_hash(manifest) != public.manifest:
        raise RadiotagError(f"{manifest} is not the manifest that {public.path} commits to", REPUBLISH)
    if journals := rank_journals(manifest):  # they would count as rows of the manifest, and were not published
        raise RadiotagError(f"{journals[0]} is not published", "move it away, or finish that run and publish its half")
    rows = recorded_classes(manifest)
    if any(public.carriers is None or public.carriers.get(name) != row for name, row in rows.items()):
        raise RadiotagError(f"{manifest} pairs classes and carriers otherwise than {public.path}", REPUBLISH)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """Under what conditions suspects were tested: all that shaped a result beside key and suspects."""

    checked: Checked
    data: str  # synthetic images, or where the real ones come from
    digest: str | None  # SHA-256 of the real images, None for synthetic ones
    images: int | None  # how many real images there are
    options: dict[str, Any]  # as plain values


def of_questions(conditions: Conditions) -> Conditions:
    """The conditions of a test by exported questions: nobody compared the images that were exported with anything."""
    return replace(conditions, data=QUESTIONS, checked=replace(conditions.checked, data=None))


def as_json(conditions: Conditions) -> dict[str, Any]:
    """Plain values for `--json`: what was checked, the data, and the options."""
    checked = asdict(conditions.checked)
    data = {"kind": conditions.data, "digest": conditions.digest, "images": conditions.images}
    return {"checked": checked | {"chosen": list(checked["chosen"])}, "data": data, "options": conditions.options}


def told(conditions: Conditions) -> list[tuple[str, str]]:
    """(what, state) of each condition in plain words, for people."""
    checked = conditions.checked
    where = f"as published in {checked.public}" if checked.public else "not compared with a publication"
    if conditions.data == QUESTIONS:
        data = f"{QUESTIONS}: their images are the choice of whoever exported them, and none of them was compared"
    elif conditions.digest is None:
        data = "synthetic images, the same for every suspect"
    else:
        choice = "as committed there" if checked.data else "the choice of whoever ran the test"
        data = f"{conditions.images} images of {conditions.data}, sha256:{conditions.digest}: {choice}"
    lines = [("checked", f"key, classes and carriers {where}"), ("data", data)]
    if checked.manifest is None and "manifest" in checked.chosen:
        lines.append(("manifest", "the choice of whoever ran the test: it was not compared with a publication"))
    options = [name for name in checked.chosen if name not in {"data", "manifest"}]
    return [*lines, *([("chosen", f"by whoever ran the test: {', '.join(options)}")] if options else [])]
