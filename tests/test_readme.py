"""The documents' tables are what was measured, and what the README tells to type exists."""

import copy
import importlib
import re
import shlex
import statistics
import sys
from pathlib import Path

import pytest
import typer

from radiotag import cli, demo
from radiotag.keys import CONTRASTED, STATISTICS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/benchmarks"))  # the programs import each other so
tables = importlib.import_module("tables")

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in (
    "README.md", "tests/benchmarks/README.md", "radiotag/builtin.md")}  # fmt: skip
PROGRAMS = {name: importlib.import_module(name) for name in tables.PROGRAMS}
TABLES = [(program, name) for program, module in PROGRAMS.items() for name in module.TABLES]
MEASURED = tables.load_results()
EVIDENCE, PAPER = MEASURED["evidence"]["runs"], MEASURED["paper"]["runs"]
MARKING, NETWORKS = MEASURED["marking"], MEASURED["networks"]
THREATS = "| who, and when | what he could choose | what radiotag does | what is left |"
SHIPPED = "0.4"  # the version whose built-in network ships


# ---------------------------------------------------------------- the tables


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_tables_are_what_was_measured(program):
    module = PROGRAMS[program]
    text = module.DOCUMENT.read_text(encoding="utf-8")
    assert tables.filled(text, module.TABLES, MEASURED) == text, f"run python tests/benchmarks/{program}.py"


def remeasured(value, name=""):
    """The same results with other figures: all but those that only say what was measured."""
    if isinstance(value, dict):
        return {key: remeasured(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [remeasured(inner, name) for inner in value]
    settings = {"fraction", "share", "psnr"}
    return 3 * value + 1 if isinstance(value, float) and name not in settings else value


@pytest.mark.parametrize(("program", "name"), TABLES)
def test_a_table_whose_results_changed_is_noticed(program, name):
    make, document = PROGRAMS[program].TABLES[name], PROGRAMS[program].DOCUMENT
    house = {name: {key: 3 * value + 1 for key, value in shape.items()} for name, shape in MEASURED["house"].items()}
    golden = {"rows": [row | {"equal": False} for row in MEASURED["golden"]["rows"]]}
    changed = remeasured(MEASURED) | {"house": house, "golden": golden}  # of whole numbers
    assert make(changed) != make(MEASURED)
    text = document.read_text(encoding="utf-8")
    assert tables.filled(text, {name: make}, changed) != text


def test_one_changed_figure_is_noticed():
    changed = copy.deepcopy(MEASURED)
    (run,) = (run for run in changed["paper"]["runs"] if run["experiment"] == "architectures/resnet50")
    run["real"]["log10_p"] -= 0.1
    text = tables.BENCHMARKS.read_text(encoding="utf-8")
    assert tables.filled(text, PROGRAMS["paper"].TABLES, changed) != text


def test_every_table_is_written_by_a_program():
    for document, text in DOCUMENTS.items():
        names = re.findall(r"<!-- table: (.*) -->", text)
        assert sorted(names) == sorted(name for p, name in TABLES if ROOT / document == PROGRAMS[p].DOCUMENT)
        by_hand = re.sub(r"<!-- table: .*? -->.*?<!-- end of table -->", "", text, flags=re.DOTALL)
        heads = re.findall(r"^(\|.*)\n\|-", by_hand, re.MULTILINE)  # what the network is; who could do what
        assert heads == {"radiotag/builtin.md": heads[:1], "README.md": [THREATS]}.get(document, []), document


def test_a_table_needs_its_place_once():
    for text in ("", 2 * "<!-- table: a -->\n<!-- end of table -->\n"):
        with pytest.raises(ValueError, match="places for the table 'a'"):
            tables.filled(text, {"a": lambda results: []}, {})


def test_figures_look_alike():
    shown = [tables.log_p(value) for value in (-3.999, -4.0, -12.344, 0.5, None)]
    assert shown == ["−4.00", "**−4.00**", "**−12.34**", "0.50", ""]
    assert (tables.percent(0.1234), tables.number(12345.6, 0), tables.number(-0.5)) == ("12.34 %", "12,346", "−0.50")


# ---------------------------------------------------------------- the results


def version(run):
    """Of radiotag, whose built-in network marked and whose statistic judged."""
    return ".".join(run["versions"]["radiotag"].split(".")[:2])


def test_all_runs_are_of_the_declared_statistic():
    later = [run for run in PAPER if run["experiment"].startswith("evades/")]
    rest = [run for run in PAPER if run not in later]
    assert {run[test]["statistic"] for run in PAPER for test in ("bare", "real") if test in run} == {CONTRASTED}
    assert {version(run) for run in (*rest, *EVIDENCE, *MARKING["large"])} == {SHIPPED}
    assert {version(run) for run in later} == {"0.5"}
    assert {version(MARKING[name]) for name in ("speed", "step", "scale")} == {SHIPPED}


def test_what_mark_expects_is_what_was_measured():
    program = PROGRAMS["evidence"]
    assert program.PACKAGE.read_text(encoding="utf-8") == program.as_package_data(MEASURED)
    runs = MEASURED["confirmed"]["runs"]
    assert {run["suspect, real"]["statistic"] for run in runs} <= STATISTICS.keys() - {CONTRASTED}
    assert len({program.place(run) for run in runs}) == len(runs)


def test_every_experiment_is_there_once():
    names = [run["experiment"] for run in PAPER]
    assert len(set(names)) == len(names)
    places = [PROGRAMS["evidence"].place(run) for run in EVIDENCE]
    assert len(set(places)) == len(places)


def test_the_demonstration_is_a_run_of_it():
    size, run = demo.Size(), MEASURED["evidence"]["demo"]
    assert (run["marked"], run["images"]) == (size.images * size.fraction, size.images) and version(run) == SHIPPED


def test_what_the_three_commands_print_is_a_run_of_them():
    run = MEASURED["evidence"]["commands"]
    (suspect,) = run["verify"]["suspects"]
    for said in (
        f"fingerprint  sha256:{run['keygen']['fingerprint'][:12]}…",
        f"({suspect['architecture']}, {suspect['classes_used']} classes used,",
        f" used, alignment R² {suspect['alignment_r2']:.2f})",
        f"MARK DETECTED: log10 p = {suspect['log10_p']:.2f} (threshold p ≤ 0.0001)",
    ):
        assert said in README
    assert run["verify"]["fingerprint"] == run["keygen"]["fingerprint"]


@pytest.mark.parametrize("seed", [2, 3])
def test_the_null_is_measured(seed):
    """Clean suspects under 20,000 fresh keys: none of their p-values may be smaller more often than it says."""
    (run,) = (run for run in PAPER if run["seed"] == seed and run["experiment"].startswith("scratch/clean"))
    for test in ("bare", "real"):
        found = run[test]["calibration"]
        assert (found["n"], len(found["tail"]), run["share"]) == (20_000, 4, 0)
        assert min(found["tail_p"], found["ks_p"]) > 0.001


def test_the_clean_models_are_clean():
    clean = [run for run in EVIDENCE if "clean, bare" in run]
    for run in clean:
        assert run["clean, bare"]["calibration"]["ks_p"] > 0.001
        assert min(run[f"clean, {test}"]["log10_p"] for test in PROGRAMS["evidence"].TESTS) > tables.DETECTED
    assert clean


def test_the_rows_by_share_are_of_one_kind():
    for (name, _), runs in PROGRAMS["paper"].grouped(MEASURED)[0].items():
        wanted = (20_000 if "100 classes" in name else 10_000, 16) if "head" not in name else (0, 4)
        assert {(run["images"], run["epochs"]) for run in runs} == {wanted}


def test_the_rows_of_what_survives_are_of_one_kind():
    """Rows of several keys share these; a tenth is marked of 10,000 images but where the row says otherwise."""
    rows = PROGRAMS["paper"].survivors(MEASURED)
    for name, runs in rows.items():
        images = 0 if name.startswith("digits") else 10_000  # all there are
        share = 0.2 if name.endswith(", 20 % marked") else 0.1
        assert {(run["share"], run["images"], run["epochs"]) for run in runs} == {(share, images, 16)}
        assert [run["seed"] for run in runs] == [2, 3, 4][: len(runs)]
    survives = [runs for runs in rows.values() if runs[0]["experiment"].startswith("survives/")]
    assert (len(survives), {len(runs) for runs in survives}) == (16, {2})  # keys


def test_what_survives_leaves_no_doubt():
    """What the README says: each of these changes leaves p far below 1e-4, but averaged weights."""
    rows = PROGRAMS["paper"].survivors(MEASURED)
    for name, runs in rows.items():
        if runs[0]["experiment"].startswith("survives/") and "averaged" not in name:
            assert max(statistics.median(run[test]["log10_p"] for run in runs) for test in ("bare", "real")) < -6


def test_one_class_is_five_owners():
    runs = [run for run in EVIDENCE if run["classes"]]
    assert [(run["fraction"], len(run["classes"]), run["mark"]["marked"]) for run in runs] == [(0.1, 1, 500)] * 5
    assert {run["suspect, black-box"]["decoys"] for run in runs} == {10_499}


def test_marks_by_radiotag_beat_the_papers():
    for psnr in (34, 37, 40):
        ours, papers = (
            statistics.mean(
                run["real"]["log10_p"] for run in MARKING["runs"] if (run["recipe"], run["psnr"]) == (name, psnr)
            )
            for name in ("radiotag", "paper")
        )
        assert ours / papers >= 6


def test_larger_images_are_two_owners():
    runs = [(run["images"], run["side"], run["fraction"], run["psnr"]) for run in MARKING["large"]]
    assert runs == [(20_000, 224, 0.1, 40)] * 2


def test_the_cards_comparisons_have_as_many_owners_as_it_says():
    robust = NETWORKS["robust"]
    for runs, names in (
        (robust["runs"], ("both", "longer", "robust")), (robust["shipped"], ("both", "built-in")),
        (robust["architectures"]["runs"], ("both", "built-in", "from the start", "googlenet")),
    ):  # fmt: skip
        pairs = [(name, arch) for name in names for arch in ("resnet10", "resnet18")]
        assert [len(PROGRAMS["card"].of(runs, network=name, arch=arch)) for name, arch in pairs] == [2] * len(pairs)
    for seed, owners in ((41, 5), (51, 5), (61, 3)):
        several = PROGRAMS["card"].of(robust["architectures"]["several owners"], seed=seed)
        places = [(run["network"], run["arch"]) for run in several]
        assert len(set(places)) == 4 and {places.count(place) for place in places} == {owners}


def test_the_cards_sizes_are_of_one_kind():
    names = "side", "images", "psnr", "arch", "epochs", "fraction"
    found = [tuple(run[name] for name in names) for run in NETWORKS["sizes"]]
    wanted = [(224, 20_000, 40, "resnet10", 16, 0.1), (32, 10_000, 34, "resnet10", 16, 0.1)]
    assert sorted(found) == sorted(6 * wanted)


def test_the_cards_head_only_rows_are_of_the_same_experiments():
    before = [run["experiment"] for run in NETWORKS["robust"]["head only"]["rows"]]
    assert [name for name in before if "100 classes" not in name] == [f"head/{q}%" for q in (1, 2, 5, 10, 20)]
    assert len(before) == 7 and set(before) <= {run["experiment"] for run in PAPER}
    assert {run["real"]["statistic"] for run in NETWORKS["robust"]["head only"]["rows"]} == {CONTRASTED}


def test_what_another_architecture_did_not_show_is_measured():
    found = [run for run in NETWORKS["runs"] if run["arch"] == "regnet_y_400mf"]
    assert (len(found), {run["images"] for run in found}) == (9, {10_000})
    assert min(run["real"]["log10_p"] for run in found) > tables.DETECTED


# ---------------------------------------------------------------- what the texts tell to type


def commands(text):
    """Every command line of radiotag in the shell blocks of a text, and within its sentences, split as a shell does."""
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|;|\|", re.sub(r"\s#.*", "", line)):
                words = shlex.split(part)
                at = next((i for i, word in enumerate(words) if Path(word).name == "radiotag"), None)
                if at is not None:
                    yield words[at + 1 :]
    for line in re.findall(r"`radiotag ([a-z][^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        yield shlex.split(line)


KNOWN = typer.main.get_command(cli.app).commands
TYPED = [words for text in DOCUMENTS.values() for words in commands(text)]


@pytest.mark.parametrize("words", TYPED, ids=" ".join)
def test_every_command_of_the_texts_exists(words):
    options = {name for parameter in KNOWN[words[0]].params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words[1:] if word.startswith("-")} <= options


def test_the_three_lines_stand_as_promised():
    for line in (
        "radiotag keygen",
        "radiotag mark ./imgs --key k.safetensors",
        "radiotag verify model.pt --key k.safetensors",
    ):
        assert any(shown.split("#")[0].strip() == line for shown in README.splitlines())


def sentences(text):
    """A text without code, tables, headings, links' targets and the numbers of lists."""
    marked = r"```.*?```", r"<!-- table: .*?<!-- end of table -->", r"<!--.*?-->"
    for code in (*marked, r"^#.*?$", r"^\d+\. ", r"\]\(.*?\)"):
        text = re.sub(code, "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`]*`", "CODE", text)


def test_the_readme_is_read_in_five_minutes():
    code_and_tables = r"```.*?```|^\|[^\n]*$|<!--.*?-->"  # these are looked up, not read
    prose = re.sub(code_and_tables, " ", README, flags=re.DOTALL | re.MULTILINE)
    assert len(prose.split()) <= 1600
    figures = re.findall(r"(?<![A-Za-z\d.,])\d[\d.,]*", sentences(README))
    assert len(figures) <= 10, figures


def anchors(text):
    """What GitHub calls the headings of a text."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_link_leads_nowhere(document):
    for link in re.findall(r"\]\(([^)]+)\)", DOCUMENTS[document]):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (ROOT / document).parent / path if path else ROOT / document
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_test_command_is_marked():
    """The continuous integration reads it there: one line in a block of its own, right after the marker."""
    assert re.search(r"^<!-- test command -->\n```sh\n[^\n]+\n```$", README, re.MULTILINE)


def test_the_python_example_runs_as_written(few_synthetic, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(example.splitlines()) <= 12
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("(20, 32, 32, 3) [") and "nan" in " ".join(printed)
    assert printed[-1].endswith(" False")
