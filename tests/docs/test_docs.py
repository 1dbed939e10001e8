"""The pages: their code runs as it stands, every public name has an example, the site needs no other site."""

import ast
import contextlib
import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import torch

import funcsam as fs

ROOT = Path(__file__).parents[2]
DOCS = ROOT / ".ci" / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "notebooks" not in page.parts)
MODULES = {"funcsam": fs} | {f"funcsam.{n}": m for n, m in vars(fs).items() if n in fs.__all__ and inspect.ismodule(m)}


def code(page):
    """Returns the code of a page, one block below the other."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("page", [page for page in PAGES if code(page)], ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    """All blocks run, in order, in one namespace."""
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code(page), str(page), "exec"), {"__name__": page.stem})


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent.name in ("howto", "methods") and p.stem != "index"])
def test_how_to_pages_and_methods_check_what_they_say(page):
    """Their code ends in something that can fail."""
    assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(code(page))))


def called(text, names):
    """Lists the ids of what code calls, as far as it can be found without running it: `f(...)`, `fs.f(...)`."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(ast.unparse(node), names)
    for node in ast.walk(tree):
        function = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if re.fullmatch(r"[\w.]+", function):
            with contextlib.suppress(NameError, AttributeError):  # a variable of the page, or a method of one
                yield id(eval(function, names))


def doctests():
    """Yields the examples of each docstring of the library, and the names that they see."""
    for info in pkgutil.walk_packages(fs.__path__, "funcsam."):
        if not info.name.startswith(("funcsam.__main__", "funcsam.cli", "funcsam.studies")):
            for test in doctest.DocTestFinder().find(importlib.import_module(info.name)):
                yield "".join(example.source for example in test.examples), dict(test.globs)


def test_every_public_function_has_an_example():
    """Each is called in the code of a page or in a doctest; a function of torch of the same name does not count."""
    examples = [(code(page), {}) for page in PAGES] + list(doctests())
    seen = {found for text, names in examples for found in called(text, names)}
    missing = []
    for place, module in MODULES.items():
        for name in module.__all__:
            x = getattr(module, name)
            if inspect.ismodule(x) or (isinstance(x, type) and issubclass(x, tuple)):
                continue
            if id(x) not in seen:
                missing.append(f"{place}.{name}")
    assert missing == []


def test_docstrings_call_functions_that_exist():
    """Every call `fs.some.name(...)` that stands in a source file is of something that can be called."""
    calls = {
        (str(file.relative_to(ROOT)), name)
        for file in sorted((ROOT / "funcsam").rglob("*.py"))
        for name in re.findall(r"\bfs\.([\w.]+)\(", file.read_text())
    }
    assert len(calls) > 20
    wrong = []
    for file, name in sorted(calls):
        found = fs
        for part in name.split("."):
            found = getattr(found, part, None)
        if not callable(found):
            wrong.append((file, name))
    assert wrong == []


def test_every_public_name_is_in_the_reference():
    """The page of the API lists every name below its own module, and no other."""
    listed, place = [], ""
    for kind, name in re.findall(r"^\.\. (\w+):: ([\w.]+)", (DOCS / "api.md").read_text(), re.MULTILINE):
        if kind == "currentmodule":
            place = name
        elif kind in ("autoclass", "autofunction"):
            listed.append(f"{place}.{name}")
    public = {f"{place}.{name}": getattr(module, name) for place, module in MODULES.items() for name in module.__all__}
    assert sorted(listed) == sorted(name for name, x in public.items() if not inspect.ismodule(x))


def test_every_page_is_in_the_index():
    """No page is hidden from readers."""
    lists = "\n".join(page.read_text() for page in PAGES if "{toctree}" in page.read_text())
    names = {page.stem for page in PAGES} - {"index"}
    assert {name for name in names if not re.search(rf"^(?:\w+/)?{name}$", lists, re.MULTILINE)} == set()


@pytest.mark.xdist_group("site")
def test_the_site_is_whole(tmp_path):
    """It builds without a warning, and takes no script, style, font or picture from another site."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", DOCS, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    foreign = re.compile(
        r"""<(?:script|img|iframe|source)[^>]+src=["'](?:https?:)?//|<link[^>]+href=["'](?:https?:)?//"""
    )
    assert [page.name for page in tmp_path.rglob("*.html") if foreign.search(page.read_text())] == []
    styles = [page for page in tmp_path.rglob("*.css") if re.search(r"url\(['\"]?https?:|@import", page.read_text())]
    assert styles == []
