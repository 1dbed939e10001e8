"""The `funcsam` command: bad input gets one line on stderr and exit code 2, never a traceback."""

import importlib.util
import os
import sys
import time
from collections.abc import Sequence

NEEDS = ("typer", "rich", "sklearn", "matplotlib", "numpy")
BAD_INPUT = 2
DELAY = 10.0
"""Seconds that every rank but the first waits before it prints: torchrun ends all processes when one of them ends, and
the first prints the same line."""


def _complain(text: str) -> int:
    if os.environ.get("RANK", "0") != "0":
        time.sleep(DELAY)
    print(" ".join(text.split()), file=sys.stderr)
    return BAD_INPUT


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    Args:
        arguments: What follows `funcsam` on the command line; `None` takes it from there.
    """
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        return _complain(f'funcsam: {", ".join(missing)} must be installed, try: pip install "funcsam[compare]"')
    import typer

    from funcsam.studies import looking
    from funcsam.studies.errors import StudyError

    try:
        code = typer.main.get_command(looking.app).main(arguments, prog_name="funcsam", standalone_mode=False)
    except StudyError as error:
        return _complain(str(error))
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        message = getattr(error, "format_message", None)  # a usage error, of click or of typer's copy of it
        if message is None:
            raise
        where = getattr(getattr(error, "ctx", None), "command_path", "funcsam")
        return _complain(f"funcsam: {message()} Try: {where} --help")
    return code if isinstance(code, int) else 0


def main() -> None:
    """Runs the command and exits."""
    sys.exit(run())
