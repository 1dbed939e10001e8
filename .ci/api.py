"""Compares the public names and signatures with those of the last tag: `python .ci/api.py`, anywhere in the repository.

A name that is gone, and a call that no longer works, must be named in the changelog under "Unreleased".
"""

import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

SURFACE = """
import inspect, json, funcsam
modules = {"funcsam": funcsam}
modules |= {f"funcsam.{n}": getattr(funcsam, n) for n in funcsam.__all__ if inspect.ismodule(getattr(funcsam, n))}
def parameters(x):
    try:
        found = inspect.signature(x).parameters.values()
    except (TypeError, ValueError):
        return None
    return [[p.name, p.kind.name, p.default is p.empty] for p in found]
names = {f"{place}.{n}": getattr(m, n) for place, m in modules.items() for n in getattr(m, "__all__", ())}
print(json.dumps({name: parameters(x) if callable(x) else None for name, x in names.items()}))
"""


def surface(folder: Path) -> dict[str, list | None]:
    """Lists the public names of the package in a folder with the parameters of their calls."""
    command = [sys.executable, "-c", SURFACE]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if found.returncode:
        sys.exit(found.stderr)
    return json.loads(found.stdout.splitlines()[-1])


def breaks(old: dict[str, list | None], new: dict[str, list | None]) -> dict[str, str]:
    """Says of every name whose calls may fail what has changed."""
    found = {}
    for name, before in old.items():
        if name not in new:
            found[name] = "is gone"
            continue
        now = new[name]
        if before is None or now is None:
            continue
        kinds = {p: kind for p, kind, _ in now}
        places = [p for p, kind, _ in now if kind == "POSITIONAL_OR_KEYWORD"]
        for place, (parameter, kind, _) in enumerate(before):
            if kinds.get(parameter) != kind:
                lost = parameter not in kinds
                found[name] = f"no longer takes `{parameter}`" if lost else f"takes `{parameter}` in another way"
            elif kind == "POSITIONAL_OR_KEYWORD" and places.index(parameter) != place:
                found[name] = f"takes `{parameter}` in another place"
        own = {p for p, *_ in before}
        for parameter, kind, required in now:
            if parameter not in own and required and not kind.startswith("VAR_"):
                found[name] = f"needs `{parameter}`"
    return found


def git(*arguments: str) -> bytes:
    """Returns the output of a git command, which is empty where it fails."""
    return subprocess.run(["git", *arguments], capture_output=True).stdout


def main() -> None:
    """Ends with 1 where a break is not in the changelog."""
    tag = git("describe", "--tags", "--abbrev=0").decode().strip()
    if not tag:
        print("API: there is no tag to compare with.")
        return
    root = Path(git("rev-parse", "--show-toplevel").decode().strip())
    with tempfile.TemporaryDirectory() as folder:
        archive = io.BytesIO(git("-C", str(root), "archive", tag, "funcsam"))
        with tarfile.open(fileobj=archive) as files:
            files.extractall(folder, filter="data")
        found = breaks(surface(Path(folder)), surface(root))
    log = (root / "CHANGELOG.md").read_text()
    unreleased = re.search(r"^## Unreleased\n(.*?)(?=^## |\Z)", log, re.DOTALL | re.MULTILINE)
    said = unreleased.group(1) if unreleased else ""
    silent = {name: what for name, what in found.items() if not re.search(rf"`[^`]*\b{name.split('.')[-1]}\b", said)}
    for name, what in found.items():
        print(f"{name} {what} since {tag}{'; the changelog does not say so' if name in silent else ''}.")
    print(f"API: {len(found)} changes since {tag} can break a call.")
    sys.exit(bool(silent))


if __name__ == "__main__":
    main()
