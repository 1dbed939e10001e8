"""Makes the small copy of CIFAR-10 beside this file out of a whole one: real images, the official layout.

    python tests/data/make_cifar10.py FOLDER      where FOLDER holds cifar-10-batches-py

It takes the first two images of each class from every file: 100 for training, 20 for tests.
"""

import pickle
import sys
from pathlib import Path

import numpy as np

PER_CLASS = 2


def chosen(labels):
    """Returns the places of the first images of each class, in the order of the file."""
    labels = np.asarray(labels)
    return sorted(int(place) for k in range(10) for place in np.flatnonzero(labels == k)[:PER_CLASS])


def main(source, target):
    target.mkdir(parents=True, exist_ok=True)
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        record = pickle.loads((source / name).read_bytes(), encoding="bytes")
        places = chosen(record[b"labels"])
        small = {
            b"batch_label": record[b"batch_label"],
            b"labels": [record[b"labels"][place] for place in places],
            b"data": record[b"data"][places],
            b"filenames": [record[b"filenames"][place] for place in places],
        }
        (target / name).write_bytes(pickle.dumps(small, protocol=4))
    meta = pickle.loads((source / "batches.meta").read_bytes(), encoding="bytes")
    meta[b"num_cases_per_batch"] = 10 * PER_CLASS
    (target / "batches.meta").write_bytes(pickle.dumps(meta, protocol=4))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]) / "cifar-10-batches-py", Path(__file__).parent / "cifar-10-batches-py")
