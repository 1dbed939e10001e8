"""The tests run the notebooks in their fast mode, one thread each."""

import os

os.environ.setdefault("FUNCSAM_FAST", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
