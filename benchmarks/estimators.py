"""Our scikit-learn estimators against MLPClassifier and MLPRegressor, at equal settings: `python -m benchmarks.estimators`.

Both train the same network for the same epochs on the same standardised float32 rows, by Adam with the same rate and
batches, without a penalty; the first weights are of the same distribution. For each data set: the score on a quarter of the
rows that is held out (accuracy, or R2), and the seconds of `fit`, in turns, each the median over the seeds. Needs
scikit-learn.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from typing import Any

import numpy as np
from sklearn import datasets
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.preprocessing import StandardScaler

from anyarray_linear.interop.sklearn import LinearNetClassifier, LinearNetRegressor

SETS: dict[str, tuple[Any, bool, int, int]] = {  # what makes it, whether it has classes, epochs, seeds
    "digits (1,797 x 64)": (lambda: datasets.load_digits(return_X_y=True), True, 50, 5),
    "wine (178 x 13)": (lambda: datasets.load_wine(return_X_y=True), True, 100, 5),
    "breast cancer (569 x 30)": (lambda: datasets.load_breast_cancer(return_X_y=True), True, 50, 5),
    "diabetes (442 x 10)": (lambda: datasets.load_diabetes(return_X_y=True), False, 300, 5),
    "synthetic classes (20,000 x 40)": (
        lambda: datasets.make_classification(20_000, 40, n_informative=15, n_classes=5, random_state=0), True, 20, 3),
    "synthetic numbers (100,000 x 30)": (
        lambda: datasets.make_friedman1(100_000, 30, noise=1.0, random_state=0), False, 5, 3),
}  # fmt: skip


def measured(name: str) -> tuple[list[float], list[float], list[float], list[float]]:
    """Our scores and seconds, and theirs, for each seed."""
    make, classes, epochs, seeds = SETS[name]
    X, y = make()
    X = StandardScaler().fit_transform(X).astype(np.float32)
    y = y if classes else ((y - y.mean()) / y.std()).astype(np.float32)
    results: tuple[list[float], ...] = ([], [], [], [])
    for seed in range(seeds):
        X_fit, X_test, y_fit, y_test = train_test_split(X, y, random_state=seed, stratify=y if classes else None)
        same = {
            "hidden_layer_sizes": (100,), "max_iter": epochs, "tol": 0.0, "n_iter_no_change": epochs, "random_state": seed,
            "batch_size": min(200, len(y_fit)), "learning_rate_init": 1e-3,
        }  # fmt: skip
        ours = (LinearNetClassifier if classes else LinearNetRegressor)(**same)
        theirs = (MLPClassifier if classes else MLPRegressor)(alpha=0.0, **same)
        for i, model in enumerate((ours, theirs)):
            began = time.perf_counter()
            model.fit(X_fit, y_fit)
            results[2 * i + 1].append(time.perf_counter() - began)
            results[2 * i].append(model.score(X_test, y_test))
    return results  # type: ignore[return-value]


def main() -> None:
    """Print the table, a line as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="data sets whose name has this in it")
    only = parser.parse_args().only
    warnings.simplefilter("ignore", ConvergenceWarning)
    rng = np.random.default_rng(0)  # compiled and imported before anything is timed
    LinearNetClassifier((5,), max_iter=1).fit(rng.random((400, 3), np.float32), np.arange(400) % 2)
    LinearNetRegressor((5,), max_iter=1).fit(rng.random((400, 3), np.float32), rng.random(400, np.float32))
    print("| | score, ours | MLP | seconds, ours | MLP | MLP / ours |")
    print("|---|---|---|---|---|---|")
    for name in SETS:
        if only in name:
            scores, seconds, their_scores, their_seconds = map(statistics.median, measured(name))
            ratio = their_seconds / seconds
            print(
                f"| {name} | {scores:.3f} | {their_scores:.3f} | {seconds:.2f} | {their_seconds:.2f} | {ratio:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
