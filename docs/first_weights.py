"""Which first weights serve best: the test scores of `train` with each `--init`, over nine files and five seeds.

`python docs/first_weights.py [FOLDER]` makes the files (it needs scikit-learn), trains with all other options left as they
are, and prints a line per file: accuracy, or R² of a number. It takes about ten minutes on one core.
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
from sklearn import datasets

from anyarray_linear.cli import main

INITS = ("he_normal", "he_uniform", "xavier_normal", "xavier_uniform", "lecun_normal", "pytorch")
SEEDS = range(5)


def make(folder: Path) -> list[Path]:
    """The files: five that come with scikit-learn and four that are made up."""
    rng = np.random.default_rng(0)
    data = {name: getattr(datasets, f"load_{name}")(return_X_y=True)
            for name in ("iris", "wine", "breast_cancer", "digits", "diabetes")}  # fmt: skip
    data["imbalanced"] = datasets.make_classification(
        2000, 12, n_informative=6, weights=[0.9, 0.07, 0.03], n_classes=3, random_state=0
    )
    X, y = datasets.make_classification(
        8000, 54, n_informative=14, n_redundant=4, n_classes=7, n_clusters_per_class=4, class_sep=1.4, random_state=1,
        weights=[0.36, 0.49, 0.06, 0.01, 0.02, 0.03, 0.03],
    )  # fmt: skip
    X[:, 20:] = X[:, 20:] > 0.8  # most columns of forest covers are 0 or 1
    data["covtype_like"] = X, y
    N = 8000  # skewed columns, a map, and a cap, as house prices have them
    A = rng.gamma(2, 1, (N, 8))
    north, east = rng.normal(size=(2, N))
    price = 1.5 * np.log1p(A[:, 0]) + np.sin(2 * north) * np.cos(1.5 * east) + 0.4 * A[:, 1] / (1 + A[:, 2])
    price += -0.3 * np.minimum(A[:, 3], 2) * (north > 0) + 0.25 * rng.normal(size=N)
    A[:, 6], A[:, 7] = north, east
    data["california_like"] = A, np.minimum(price, 4.5)
    data["friedman"] = datasets.make_friedman1(1500, 10, noise=1.0, random_state=0)
    for name, (X, y) in data.items():
        np.savez(folder / f"{name}.npz", X=X, y=y)
    return [folder / f"{name}.npz" for name in data]


def score(data: Path, init: str, seed: int, folder: Path) -> float:
    """Of the model of the best epoch, on the samples that nothing was chosen by."""
    out = folder / f"{data.stem}-{init}-{seed}"
    options = ["--data", str(data), "--init", init, "--seed", str(seed), "--out", str(out), "--device", "cpu"]
    with (
        mock.patch.object(sys, "argv", ["anyarray-linear", "train", *options]),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.suppress(SystemExit),
    ):
        main()
    test = json.loads((out / "summary.json").read_text())["test"]
    return float(test.get("accuracy", test.get("r2")))


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    found: dict[str, list[float]] = {init: [] for init in INITS}
    print(f"{'':16}", *(f"{init:>14}" for init in INITS))
    for data in make(folder):
        for init in INITS:
            found[init].append(statistics.mean(score(data, init, seed, folder) for seed in SEEDS))
        print(f"{data.stem:16}", *(f"{found[init][-1]:14.4f}" for init in INITS), flush=True)
    print(f"{'mean':16}", *(f"{statistics.mean(found[init]):14.4f}" for init in INITS))
