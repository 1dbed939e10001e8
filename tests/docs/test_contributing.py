"""The four steps of CONTRIBUTING.md, taken: the laws run on the new member, and notice a wrong one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def step(name):
    return re.search(rf"<!-- {name} -->\n```python\n(.*?)```", TEXT, re.DOTALL).group(1)


@pytest.fixture
def tree(tmp_path):
    """A copy of the library and its laws, with the member of CONTRIBUTING.md."""
    ignore = shutil.ignore_patterns("__pycache__", "data", "benchmarks", "accelerator")
    for name in ("funcsam", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "funcsam" / "family" / "mean_sam.py").write_text(step("file"))
    zoo, package = tmp_path / "tests" / "zoo.py", tmp_path / "funcsam" / "__init__.py"
    zoo.write_text(zoo.read_text().replace("\nZOO = [\n", f"\nZOO = [\n    {step('registry').strip()},\n", 1))
    text = package.read_text().replace("__all__ = [\n", '__all__ = [\n    "mean_sam",\n', 1)
    package.write_text(
        text.replace("from funcsam.family.sam import", f"{step('export')}from funcsam.family.sam import", 1)
    )
    return tmp_path


def laws(tree):
    """Runs the laws on the member, and returns pytest's last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/laws", "-k", "mean_sam or zoo"]
    environment = os.environ | {"HYPOTHESIS_PROFILE": "fast", "PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    return done.stdout.strip().splitlines()[-1]


def test_the_laws_run_on_a_new_member(tree):
    """The skeleton passes every law that it claims."""
    found = re.search(r"(\d+) passed", laws(tree))
    assert found is not None
    assert int(found.group(1)) > 40


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("tree.scale(0.5,", "tree.scale(0.6,"), ("plain_ascent(rho)", "plain_ascent(-1 * 0.25)")],
    ids=["formula", "ascent"],
)
def test_the_laws_notice_a_wrong_member(tree, right, wrong):
    """A wrong skeleton fails."""
    file = tree / "funcsam" / "family" / "mean_sam.py"
    assert file.read_text().count(right) == 1
    file.write_text(file.read_text().replace(right, wrong))
    assert "failed" in laws(tree) or "error" in laws(tree)


def test_the_fast_tests_can_be_selected():
    """The files of the fast command exist, and so does its profile."""
    command = re.search(r"^HYPOTHESIS_PROFILE=(\w+) pytest -n 2 (.*)$", TEXT, re.MULTILINE)
    assert command.group(1) in (ROOT / "tests" / "conftest.py").read_text()
    assert [name for name in command.group(2).split() if not (ROOT / name).exists()] == []
