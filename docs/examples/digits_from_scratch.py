# %% [markdown]
# # Digits from scratch
#
# Handwritten digits, learned with nothing but the layer's two functions and plain updates; then the same with the pieces
# that the package has for it. Run it as a script, or cell by cell in an editor that knows `# %%`.

# %%
import sys
from pathlib import Path

import numpy as np

from anyarray_linear import (
    Adam,
    Linear,
    ReLU,
    Sequential,
    SoftmaxCrossEntropy,
    evaluate,
    fit,
    linear_backward,
    linear_forward,
)
from anyarray_linear.datasets import load_digits, split
from anyarray_linear.testing import gradcheck

OUT = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
X, y, X_test, y_test = split(*load_digits())
print(f"{len(X)} images of 8x8 pixels to learn from, {len(X_test)} to test on")

# %% [markdown]
# ## One layer, by hand
#
# `Z = X W^T + b` has a column per digit. Softmax turns a row of `Z` into probabilities `P`, and the loss is the mean of
# `-log P` of the right digit. Its gradient by `Z` is `(P - one_hot) / N`: the loss is a mean, so the `1 / N` is here, and
# the layer only sums.

# %%
W, b = np.zeros((10, 64), dtype=np.float32), np.zeros((1, 10), dtype=np.float32)
one_hot = np.eye(10, dtype=np.float32)[y]
N = np.float32(len(X))

for _step in range(300):
    Z = linear_forward(X, W, b)
    E = np.exp(Z - Z.max(axis=1, keepdims=True))  # the maximum goes: exp must not overflow
    P = E / E.sum(axis=1, keepdims=True)
    dZ = (P - one_hot) / N
    _, dW, db = linear_backward(dZ, X, W, needs_dX=False)  # nobody needs the gradient by the images
    W -= 0.5 * dW
    b -= 0.5 * db

one_layer = float(np.mean(linear_forward(X_test, W, b).argmax(axis=1) == y_test))
print(f"one layer, 300 steps of plain gradient descent: {one_layer:.1%} of the test images")

# %% [markdown]
# Zeros are a fine start for one layer. With a hidden layer they are not: all its units would get the same gradient and stay
# the same for ever. That is what initializers are for.
#
# ## Two layers
#
# A container keeps what backward will need, and hands it back in reverse.

# %%
model = Sequential(Linear(64, 64, dtype="float32", seed=0), ReLU(), Linear(64, 10, dtype="float32", seed=1))
loss, optimizer = SoftmaxCrossEntropy(), Adam(lr=3e-3)
rng = np.random.default_rng(0)

for _epoch in range(20):
    order = rng.permutation(len(X))
    for start in range(0, len(X), 64):
        rows = order[start : start + 64]
        Z, caches = model.forward(X[rows])
        value, cache = loss.forward(Z, y[rows])
        _, gradients = model.gradients(loss.backward(cache), caches, needs_dX=False)
        optimizer.step(model, gradients)

two_layers = evaluate(model, X_test, y_test, loss=loss)["accuracy"]
print(f"two layers, 20 epochs of Adam: {two_layers:.1%}")

# %% [markdown]
# Are those gradients right? Finite differences say so, in float64, whatever the layers are.

# %%
small = Sequential(Linear(5, 4, seed=2), ReLU(), Linear(4, 3, seed=3))
errors = gradcheck(small, np.random.default_rng(1).normal(size=(8, 5)))
print("relative errors of the gradients:", {name: float(f"{error:.0e}") for name, error in errors.items()})

# %% [markdown]
# ## The same with `fit`
#
# The loop above is what `fit` does, with validation, checkpoints, and a stop at NaN around it.

# %%
model = Sequential(Linear(64, 64, dtype="float32", seed=0), ReLU(), Linear(64, 10, dtype="float32", seed=1))
fit(model, X, y, loss=loss, optimizer=Adam(lr=3e-3), epochs=20, batch_size=64, progress=False)
with_fit = evaluate(model, X_test, y_test, loss=loss)["accuracy"]
print(f"fit, 20 epochs: {with_fit:.1%}")

# %% [markdown]
# ## What the first layer looks for
#
# A row of the one layer's `W` is an image: where ink speaks for the digit (orange) and where against it (violet).

# %%
from matplotlib.figure import Figure  # noqa: E402

figure = Figure(figsize=(8, 3.6), layout="constrained")
limit = float(np.abs(W).max())
for digit, axes in enumerate(figure.subplots(2, 5).ravel()):
    axes.imshow(W[digit].reshape(8, 8), cmap="PuOr_r", vmin=-limit, vmax=limit)
    axes.set_title(str(digit))
    axes.axis("off")
figure.savefig(OUT / "digits_from_scratch.png", dpi=120)
print(f"{OUT / 'digits_from_scratch.png'} shows the weights")
