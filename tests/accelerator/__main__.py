"""The `funcsam` command with a device `standin` beside the CPU, to see a whole run on an accelerator without one.

    PYTHONPATH=. python -m tests.accelerator compare --device standin --no-compile --out /tmp/run ...

What stays behind on the CPU is refused, in training, evaluation, checkpoints and pictures alike, and so is float64. It
needs g++ and ninja, takes half a minute to build, and is no part of the tests. Second derivatives of convolutions
(`measure` of a Wide ResNet) hang on it, why is not known.
"""

import sys
import tempfile
from pathlib import Path

from funcsam import cli
from tests import accelerator

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        accelerator.register(Path(folder))
        sys.exit(cli.run(sys.argv[1:]))
