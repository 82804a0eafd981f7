# %% [markdown]
# # Regression on real data: carbon dioxide on Mauna Loa
#
# `co2.csv` has the monthly means of the weekly measurements by C. D. Keeling and T. P. Whorf (2004), *Atmospheric CO2
# concentrations derived from flask air samples at sites in the SIO network*, in *Trends: A Compendium of Data on Global
# Change*, Carbon Dioxide Information Analysis Center, Oak Ridge National Laboratory, U.S. Department of Energy. The data
# are in the public domain.
#
# A linear layer is linear in its *features*, and these may be anything: here the time, its square, and two harmonics of the
# year. So a straight line, a bend and the seasons are one `Linear(6, 1)`.

# %%
import csv
import sys
from pathlib import Path

import numpy as np

from anyarray_linear import SGD, Adam, Linear, MeanSquaredError, ReLU, Sequential, fit, predict

HERE = Path(__file__).parent if "__file__" in globals() else Path("docs/examples")
OUT = Path(sys.argv[1] if len(sys.argv) > 1 else ".")

with (HERE / "co2.csv").open(encoding="utf-8", newline="") as file:
    rows = [(int(row["year"]) + (int(row["month"]) - 0.5) / 12, float(row["co2"])) for row in csv.DictReader(file)]
time, co2 = np.array(rows).T
known = time < 1992  # the last ten years are to be foretold
print(f"{len(time)} months from {int(time[0])} to {int(time[-1])}; {known.sum()} to learn from")


# %%
def features(time: np.ndarray) -> np.ndarray:
    """`(N, 6)`: time in units of about the data's spread, so that no feature is far larger than another."""
    t, year = (time - 1975) / 10, 2 * np.pi * time
    return np.stack([t, t**2 / 2, np.cos(year), np.sin(year), np.cos(2 * year), np.sin(2 * year)], axis=1)


X, y = features(time), co2[:, None]
shift, scale = y[known].mean(), y[known].std()
target = (y - shift) / scale  # the loss is well scaled, too

# %% [markdown]
# ## The layer, by gradient descent
#
# The loss is a bowl, with one lowest point; full batches and momentum roll into it.

# %%
layer, options = Linear(6, 1, init="zeros"), {"loss": MeanSquaredError(), "progress": False}
fit(layer, X[known], target[known], optimizer=SGD(0.1, momentum=0.9), epochs=500, batch_size=len(X), **options)
answer = predict(layer, X) * scale + shift


def error(answer: np.ndarray, rows: np.ndarray) -> float:
    """Root mean square error in ppm."""
    return float(np.sqrt(np.mean((answer - y)[rows] ** 2)))


def tell(name: str, answer: np.ndarray) -> None:
    print(f"{name}: {error(answer, known):.2f} ppm on what it has seen, {error(answer, ~known):.2f} ppm on the years after")


tell("linear layer", answer)

# %% [markdown]
# Least squares has a formula as well, and both must end at the same place. The largest difference of their weights:

# %%
with_ones = np.hstack([X[known], np.ones((known.sum(), 1))])
exact = np.linalg.lstsq(with_ones, target[known], rcond=None)[0]
difference = float(np.abs(np.hstack([layer.W, layer.b]) - exact.T).max())
print(f"largest difference from the closed form: {difference:.1e}")

# %% [markdown]
# ## A network, for comparison
#
# The same features through a hidden layer fit the past better. Neither knows the future: both go on as the years before did,
# the growth was slower, and which of them comes nearer is luck. A good fit of the past is no reason to trust either.

# %%
network = Sequential(Linear(6, 32, seed=0), ReLU(), Linear(32, 1, seed=1))
fit(network, X[known], target[known], optimizer=Adam(3e-3), epochs=300, batch_size=32, **options)
curved = predict(network, X) * scale + shift
tell("network", curved)

# %%
from matplotlib.figure import Figure  # noqa: E402

figure = Figure(figsize=(9, 6), layout="constrained")
upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
upper.plot(time, co2, ".", color="0.5", markersize=3, label="measured")
upper.plot(time, answer, color="tab:blue", linewidth=1, label="linear layer")
upper.plot(time, curved, color="tab:orange", linewidth=1, label="network")
upper.set_ylabel("CO$_2$ in ppm")
upper.legend()
for values, color in ((answer, "tab:blue"), (curved, "tab:orange")):
    lower.plot(time, values - y, color=color, linewidth=0.8)
lower.set_ylabel("error in ppm")
for axes in (upper, lower):
    axes.axvspan(1992, time[-1], color="0.93")
    axes.grid(alpha=0.3)
figure.savefig(OUT / "co2.png", dpi=120)
print(f"{OUT / 'co2.png'} shows it; the years in grey were foretold")
