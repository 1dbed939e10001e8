"""The code of the pages runs as pasted, and says what is true."""

import re
from pathlib import Path

import torch

PAGES = Path(__file__).parent.parent / ".ci" / "docs"


def run(page):
    """Runs the code blocks of a page one after the other and returns what they define."""
    namespace = {"__name__": page}
    for block in re.findall(r"```python\n(.*?)```", (PAGES / f"{page}.md").read_text(), re.DOTALL):
        exec(block, namespace)
    return namespace


def test_modules():
    """LoRA trains its factors alone, on a base that stays as it is and shared."""
    found = run("modules")
    assert set(found["params"]) == {"a", "b"}
    assert found["params"]["a"].shape == (3, 2, 16)
    assert found["buffers"] == {}
    assert found["loss"].shape == (3,)
    assert (found["loss"] < 1.2).all()
    assert torch.equal(found["model"].b.count_nonzero(), torch.tensor(8))
