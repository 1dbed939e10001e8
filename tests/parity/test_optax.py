"""The goldens are still what optax says."""

import json

import pytest

from tests.asserts import close
from tests.parity.make_goldens import GOLDENS, trajectories
from tests.parity.test_goldens import tensors

pytestmark = pytest.mark.parity


def test_goldens_are_current():
    """Made anew, every step is as recorded."""
    pytest.importorskip("optax")
    recorded = json.loads(GOLDENS.read_text())["trajectories"]
    new = trajectories()
    assert recorded.keys() == new.keys()
    for name, steps in recorded.items():
        for step, now in zip(steps, new[name], strict=True):
            close(tensors(now), tensors(step), rtol=1e-9)
