import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import funcsam as fs

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCS = {page.stem: page.read_text() for page in (ROOT / ".ci" / "docs").glob("*.md")}
PERCENT = ("test_error", "noisy_fit")


def read(name):
    return json.loads((ROOT / name).read_text())


def test_the_code_of_the_readme_runs():
    """It runs as pasted, and ends with a model that fits its data."""
    torch.manual_seed(0)
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block, namespace)
    assert namespace["loss"] < 0.5


def test_the_readme_is_short():
    """It fits on a few screens; the rest is on the site."""
    assert len(README.splitlines()) < 160


@pytest.mark.parametrize(("text", "count"), [(README, 5), (DOCS["order"], 13)], ids=["readme", "page"])
def test_every_chain_of_the_tables_can_be_built(text, count):
    """Every chain in a table of orders is an expression that gives a Transform."""
    chains = re.findall(r"^\| `((?:chain|partition)\((?!\.\.\.|labels)[^`]+\))` \|", text, re.MULTILINE)
    assert len(chains) >= count
    for chain in chains:
        assert isinstance(eval(chain, vars(fs) | {"r": 0.05, "d": 5e-4, "lr": 0.1}), fs.Transform)


def test_every_transform_has_a_row():
    """Every exported function is named on the page that has all of funcsam."""
    exported = {name for name in fs.__all__ if name[0].islower()}
    assert {name for name in exported if not re.search(rf"`[^`]*\b{name}\b[^`]*`", DOCS["one-page"])} == set()


def test_the_links_of_the_readme_lead_to_pages():
    """Every page of the site that the README names exists."""
    pages = re.findall(r"https://funcsam\.github\.io/funcsam/([\w/-]+)\.html", README)
    assert len(pages) > 5
    assert [page for page in pages if not (ROOT / ".ci" / "docs" / f"{page}.md").exists()] == []


def test_the_base_import_needs_torch_and_optree_only():
    """Importing the library brings in nothing of the extras."""
    code = (
        "import sys, torch, optree; before = set(sys.modules); import funcsam; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert set(eval(out)) - {"torch", "optree"} == {"funcsam"}


def between(name, text):
    return re.search(rf"<!-- {name} -->\n(.*?)<!-- end of {name} -->", text, re.DOTALL).group(1)


def cells(final):
    return " | ".join(f"{100 * final[key]['mean']:.1f} ± {100 * final[key]['standard_error']:.1f}" for key in PERCENT)


def test_the_results_are_those_of_the_committed_runs():
    """The tables of the main job are what its committed results say."""
    run, measures = read("notebooks/comparison.json"), read("notebooks/measures.json")
    assert measures["settings"].items() >= run["settings"].items()
    short, full = between("results", README), between("results", DOCS["results"])
    for name, final in run["final"].items():
        found = [measures["measures"][what][name] for what in ("largest eigenvalue", "worst case, rho 0.5")]
        curvature, worst = (f"{each['mean']:.2f} ± {each['standard_error']:.2f}" for each in found)
        assert f"| `{name}` | {cells(final)} | {curvature} | {final['ratio']:.2f} |" in short
        rise = f"{final['sharpness']['mean']:.4f} ± {final['sharpness']['standard_error']:.4f}"
        assert f"| `{name}` | {cells(final)} | {curvature} | {worst} | {rise} | {final['ratio']:.2f} |" in full
    assert f"on {measures['examples']} training examples" in " ".join(full.split())
    assert f"({measures['options']['steps']} steps of ascent)" in full
    for text in (short, full):
        assert f"torch {run['versions']['torch']}" in text
        assert f"{run['settings']['seeds']} seeds" in text


def test_the_runs_on_cifar10_are_the_committed_ones():
    """Both tables of two regimes are what the committed results say; so is what the data were."""
    page = between("cifar10", DOCS["results"])
    for name in ("augmented", "memorised"):
        run = read(f"notebooks/cifar10-{name}.json")
        assert run["settings"]["copy"] != "official"
        assert "a JPEG copy" in page
        for optimizer, final in run["final"].items():
            assert f"| {name} | `{optimizer}` | {cells(final)} | {final['ratio']:.2f} |" in page


BENCHMARKS = [("steps", "benchmark"), ("ensembles", "ensembles"), ("communication", "communication")]


@pytest.mark.parametrize(("name", "section"), BENCHMARKS)
def test_the_benchmarks_are_the_committed_runs(name, section):
    """The tables of costs are what the benchmarks print of their committed results."""
    folder = ROOT / "tests" / "benchmarks"
    command = [sys.executable, folder / f"{name}.py", "--table", folder / "results" / f"{name}-cpu.json"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert table.strip() in between(section, DOCS["costs"])


def test_the_costs_of_the_readme_are_those_of_the_benchmark():
    """The ratios to the peer's step are those of the committed run."""
    run = read("tests/benchmarks/results/steps-cpu.json")

    def ratios(row):
        of = [{name: each["ms"]["median"] for name, each in model["rows"].items()} for model in run["models"].values()]
        return [model[row] / model["pytorch_optimizer SAM, eager"] for model in of]

    compiled, eager = ratios("funcsam, compiled step"), ratios("funcsam, eager")
    text = " ".join(README.split())
    assert f"a compiled step takes {min(compiled):.2f} to {max(compiled):.2f} of its time" in text
    assert f"an eager step {min(eager):.2f} to {max(eager):.2f} of it" in text
    assert f"medians of {run['rounds']} interleaved rounds" in text
