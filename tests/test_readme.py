"""What the README says is what was measured, and its commands exist."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "tests/benchmarks/results/from_scratch.json").read_text(encoding="utf-8"))


def minus(value, digits=2):
    return f"{value:.{digits}f}".replace("-", "−")


@pytest.mark.parametrize("suspect", ["clean", "radioactive"])
@pytest.mark.parametrize("images", ["synthetic", "real"])
def test_every_row_of_the_table_is_a_measurement(suspect, images):
    found, model = RESULTS["steps"][f"{suspect}, {images}"], RESULTS["steps"][suspect]
    row = next(line for line in README.splitlines() if line.startswith(f"| {suspect} | {images}"))
    cells = [cell.strip(" *") for cell in row.strip("|").split("|")]
    accuracy = f"{100 * model['accuracy']:.2f} %"
    assert cells[2:] == [accuracy, minus(found["log10_p"]), minus(found["paper_log10_p"])]


def test_the_other_figures_are_measurements_too():
    mark, null = RESULTS["steps"]["mark"], RESULTS["null"]
    assert f"PSNR median {mark['psnr_median']:.1f} dB" in README
    assert f"p = {null['ks_p']:.2f}" in README
    assert f"Marking took {mark['seconds']:.0f} s" in README
    assert f"{RESULTS['steps']['radioactive']['seconds']:,.0f} s on one core" in README
    for name in ("clean", "radioactive"):
        line = next(line for line in README.splitlines() if line.startswith(f"{name}.pt"))
        assert f"{RESULTS['demo'][f'{name}_log10_p']:.2f}" in line
        assert f"{RESULTS['demo'][f'{name}_accuracy']:.1%}" in line


def test_the_three_lines_stand_as_promised():
    for line in (
        "radiotag keygen",
        "radiotag mark ./imgs --key k.safetensors",
        "radiotag verify model.pt --key k.safetensors",
    ):
        assert any(shown.split("#")[0].strip() == line for shown in README.splitlines())
