import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import funcsam as fs

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PERCENT = ("test_error", "noisy_fit")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_quickstart_trains_a_model(capsys):
    """The README's Python runs as pasted, and ends with a model that works."""
    namespace = {}
    for block in blocks("python"):
        exec(block, namespace)
    loss, accuracy = re.search(r"loss (\S+), test accuracy (\S+)%", capsys.readouterr().out).groups()
    assert float(loss) < 0.1
    assert float(accuracy) > 90


def test_every_chain_of_the_table_can_be_built():
    """Every chain in the table of orders is an expression that gives a Transform."""
    chains = re.findall(r"^\| `((?:chain|partition)\((?!\.\.\.|labels)[^`]+\))` \|", README, re.MULTILINE)
    assert len(chains) >= 13
    for text in chains:
        assert isinstance(eval(text, vars(fs) | {"r": 0.05, "d": 5e-4, "lr": 0.1}), fs.Transform)


def test_every_transform_has_a_row():
    """Every exported function is named in the README."""
    exported = {name for name in fs.__all__ if name[0].islower()}
    assert {name for name in exported if not re.search(rf"`[^`]*\b{name}\b[^`]*`", README)} == set()


def test_the_base_import_needs_torch_and_optree_only():
    """Importing the library brings in nothing of the extras."""
    code = (
        "import sys, torch, optree; before = set(sys.modules); import funcsam; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert set(eval(out)) - {"torch", "optree"} == {"funcsam"}


def between(name):
    return re.search(rf"<!-- {name} -->\n(.*?)<!-- end of {name} -->", README, re.DOTALL).group(1)


def test_the_results_are_those_of_the_committed_run():
    """The table of the main job is what its committed results say."""
    run = json.loads((ROOT / "notebooks" / "comparison.json").read_text())
    for name, final in run["final"].items():
        cells = [f"{100 * final[key]['mean']:.1f} ± {100 * final[key]['standard_error']:.1f}" for key in PERCENT]
        rise = f"{final['sharpness']['mean']:.4f} ± {final['sharpness']['standard_error']:.4f}"
        row = f"| `{name}` | {' | '.join(cells)} | {rise} | {final['ratio']:.2f} |"
        assert row in between("results")
    assert f"torch {run['versions']['torch']}" in between("results")
    assert f"{run['settings']['seeds']} seeds" in between("results")


def test_the_runs_on_cifar10_are_the_committed_ones():
    """Both tables of two regimes are what the committed results say; so is what the data were."""
    for name in ("augmented", "memorised"):
        run = json.loads((ROOT / "notebooks" / f"cifar10-{name}.json").read_text())
        assert run["settings"]["copy"] != "official"
        assert "a JPEG copy" in between("cifar10")
        for optimizer, final in run["final"].items():
            cells = [f"{100 * final[key]['mean']:.1f} ± {100 * final[key]['standard_error']:.1f}" for key in PERCENT]
            assert f"| {name} | `{optimizer}` | {' | '.join(cells)} | {final['ratio']:.2f} |" in between("cifar10")


BENCHMARKS = [("steps", "benchmark"), ("ensembles", "ensembles"), ("communication", "communication")]


@pytest.mark.parametrize(("name", "section"), BENCHMARKS)
def test_the_benchmarks_are_the_committed_runs(name, section):
    """The tables of costs are what the benchmarks print of their committed results."""
    folder = ROOT / "tests" / "benchmarks"
    command = [sys.executable, folder / f"{name}.py", "--table", folder / "results" / f"{name}-cpu.json"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert table.strip() in between(section)
