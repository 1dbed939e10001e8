"""What is released: the files of the package, its metadata, and the comparison with the last release."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import funcsam as fs

ROOT = Path(__file__).parents[2]
SOURCES = ("funcsam", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff")


def copy(folder):
    """Copies what a package is built from, without what builds and runs leave behind."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(
            source, folder / name, **({"ignore": ignore} if source.is_dir() else {})
        )
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Builds the wheel and the sdist."""
    tree, out = copy(tmp_path_factory.mktemp("tree")), tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree]
    subprocess.run(command, check=True, capture_output=True)
    return out


def files_of_the_tree():
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "funcsam").rglob("*") if path.is_file()}
    return {name for name in found if "__pycache__" not in name}


def test_the_wheel_has_every_file_of_the_package(built):
    """A new folder or a data file is never left behind."""
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == files_of_the_tree()
    assert "funcsam/py.typed" in names


def test_the_sdist_can_be_built_from_and_is_small(built):
    """The source distribution has the package, its licence and its changes, and none of the test data."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert files_of_the_tree() | {"LICENSE", "README.md", "pyproject.toml"} <= names
    assert not [name for name in names if name.startswith("tests/data")]
    assert sdist.stat().st_size < 500_000


def test_the_version_is_said_once():
    """The citation and the changelog are those of the version of the package."""
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {fs.__version__}\n" in citation
    assert f"\n## {fs.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_readme_shows_on_a_package_index():
    """Pictures and links of the README are absolute."""
    links = re.findall(r"\]\(([^)]+)\)|(?:src|href)=\"([^\"]+)\"", (ROOT / "README.md").read_text())
    targets = [first or second for first, second in links]
    assert targets
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []


def test_hooks_are_local():
    """Hooks before a commit need no network."""
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    assert text.count("repo: ") == text.count("repo: local") == 1


def test_the_metadata_name_what_was_run():
    """The classifiers name the Python versions that the package is tested with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"Documentation", "Repository", "Changelog"} <= project["urls"].keys()
    versions = {line.rpartition(":: ")[2] for line in project["classifiers"] if ":: Python :: 3." in line}
    assert versions == {"3.11", "3.13"}


OLD = """
from funcsam import tools
__all__ = ["gone", "one", "kept", "order", "tools", "Box"]
def gone(): ...
def one(x, y=1): ...
def kept(x, *, y=1): ...
def order(x=1, y=2): ...
class Box:
    def __init__(self, size): ...
"""
NEW = """
from funcsam import tools
__all__ = ["one", "kept", "order", "tools", "Box", "new"]
def one(x, z, y=1): ...
def kept(x, w=0, *, y=1, z=2): ...
def order(y=2, x=1): ...
def new(): ...
class Box:
    def __init__(self, length): ...
"""


@pytest.fixture
def repository(tmp_path):
    """A repository with a tagged version of a package, and another version in the working tree."""

    def git(*arguments):
        identity = [
            "-c",
            "user.name=a",
            "-c",
            "user.email=a@b",
            "-c",
            "commit.gpgsign=false",
            "-c",
            "tag.gpgsign=false",
        ]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    package = tmp_path / "funcsam"
    package.mkdir()
    (package / "__init__.py").write_text(OLD)
    (package / "tools.py").write_text('__all__ = ["tool"]\ndef tool(x): ...\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n\n## 0.1.0\n\n- `gone`, `one`\n")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "old")
    return tmp_path, git


def compare(folder):
    command = [sys.executable, ROOT / ".ci" / "api.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_without_a_tag_there_is_nothing_to_compare(repository):
    """The comparison says so, and passes."""
    found = compare(repository[0])
    assert (found.returncode, found.stdout) == (0, "API: there is no tag to compare with.\n")


def test_a_break_must_be_in_the_changelog(repository):
    """Names that are gone and calls that fail are found; they pass where the changelog says them."""
    folder, git = repository
    git("tag", "v0.1.0")
    assert compare(folder).stdout == "API: 0 changes since v0.1.0 can break a call.\n"
    (folder / "funcsam" / "__init__.py").write_text(NEW)
    (folder / "funcsam" / "tools.py").write_text('__all__ = ["tool"]\ndef tool(): ...\n')
    found = compare(folder)
    assert found.returncode == 1
    assert found.stdout.splitlines() == [
        "funcsam.gone is gone since v0.1.0; the changelog does not say so.",
        "funcsam.one needs `z` since v0.1.0; the changelog does not say so.",
        "funcsam.order takes `y` in another place since v0.1.0; the changelog does not say so.",
        "funcsam.Box needs `length` since v0.1.0; the changelog does not say so.",
        "funcsam.tools.tool no longer takes `x` since v0.1.0; the changelog does not say so.",
        "API: 5 changes since v0.1.0 can break a call.",
    ]
    log = "# Changelog\n\n## Unreleased\n\n- Removed `gone`; `one(x, z)`, `order`, `Box` and `tools.tool` changed.\n"
    (folder / "CHANGELOG.md").write_text(log)
    assert compare(folder).returncode == 0


def test_the_public_surface_is_found():
    """The comparison sees the names of the package and of its public modules."""
    spec = importlib.util.spec_from_file_location("api", ROOT / ".ci" / "api.py")
    api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(api)
    found = api.surface(ROOT)
    assert {"funcsam.sam", "funcsam.tree.norm", "funcsam.nn.split", "funcsam.landscape.grid"} <= found.keys()
    assert found["funcsam.sam"] == [["rho", "POSITIONAL_OR_KEYWORD", False]]
