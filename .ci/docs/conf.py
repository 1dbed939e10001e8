"""Builds the documentation: `python -m sphinx -W --keep-going -b html .ci/docs FOLDER`."""

import shutil
from pathlib import Path

import funcsam

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

project = "funcsam"
author = "The funcsam developers"
project_copyright = "The funcsam developers"
version = release = funcsam.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

# Notebooks are committed with their outputs. They need no scripts of other sites.
nb_execution_mode = "off"
nb_ipywidgets_js = {}

nitpicky = True
nitpick_ignore = [("py:class", "torch.Tensor"), ("py:class", "funcsam.core.types.P")]
default_role = "code"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_use_rtype = False
add_module_names = False

pygments_dark_style = "github-dark"
html_theme = "furo"
html_title = f"funcsam {release}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_theme_options = {
    "source_repository": "https://github.com/funcsam/funcsam/",
    "source_branch": "main",
    "source_directory": ".ci/docs/",
}


def _copy_notebooks() -> None:
    """Puts the committed notebooks and pictures where sphinx reads pages from."""
    target = HERE / "notebooks"
    target.mkdir(exist_ok=True)
    for path in (ROOT / "notebooks").iterdir():
        if path.suffix in (".ipynb", ".png"):
            shutil.copy(path, target / path.name)


def _indented_as_code(app, what, name, obj, options, lines):
    """Sets the indented examples of docstrings as code."""
    out, inside = [], False
    for k, line in enumerate(lines):
        indented = line.startswith("    ") and not lines[k - 1].strip() if k else False
        if indented and not inside and out and not out[-1].strip():
            before = next((text for text in reversed(out) if text.strip()), "")
            if not before.lstrip().startswith((":", "..", "-", "*")) and not before.startswith("    "):
                out += ["::", ""]
                inside = True
        if line.strip() and not line.startswith("    "):
            inside = False
        out.append(line)
    lines[:] = out


def setup(app):
    """Is called by sphinx."""
    _copy_notebooks()
    app.connect("autodoc-process-docstring", _indented_as_code, priority=400)
