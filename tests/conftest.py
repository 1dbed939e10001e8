"""Profiles of Hypothesis, one thread, and a fresh compiler for every test that compiles."""

import os

import pytest
import torch
from hypothesis import Phase, settings

settings.register_profile("dev", max_examples=25, deadline=None)
settings.register_profile("ci", settings.get_profile("ci"), max_examples=100)
settings.register_profile("nightly", max_examples=2000, deadline=None)
# a test that falls need not say with which small example
settings.register_profile("fast", settings.get_profile("ci"), max_examples=10, phases=(Phase.explicit, Phase.generate))
settings.load_profile(os.getenv("HYPOTHESIS_PROFILE", "ci" if os.getenv("CI") else "dev"))

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_compiler(request):
    if request.node.get_closest_marker("compile"):
        torch._dynamo.reset()
