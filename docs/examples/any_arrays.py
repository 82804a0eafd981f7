# %% [markdown]
# # The same script on CPU, CuPy and torch arrays
#
# One function, which names no array library. It is run with NumPy arrays, with PyTorch tensors where PyTorch is installed,
# and with CuPy arrays where a CUDA device works. Everything is drawn on the host from one seed, so all of them start
# from the same bits, and what differs in the end is rounding.

# %%
from importlib.util import find_spec

import numpy as np

from anyarray_linear import Adam, Device, Linear, ReLU, Sequential, SoftmaxCrossEntropy, evaluate, fit
from anyarray_linear.datasets import load_digits, split
from anyarray_linear.testing import usable_devices


# %%
def train(device: Device) -> tuple[float, float, Linear]:
    """The last loss, the accuracy on unseen digits and the first layer of a training on `device`."""
    X, y, X_test, y_test = split(*load_digits())
    place = {"dtype": "float32", "device": device}
    model = Sequential(Linear(64, 64, seed=0, **place), ReLU(), Linear(64, 10, seed=1, **place))
    loss = SoftmaxCrossEntropy()
    history = fit(model, X, y, loss=loss, optimizer=Adam(2e-3), epochs=10, seed=0, progress=False)
    return history.rows[-1]["loss"], evaluate(model, X_test, y_test, loss=loss)["accuracy"], model[0]


# %% [markdown]
# Where to? `usable_devices` are the CPU and each CUDA device that has proved to work. Of an array that is there already,
# `Device.of` says where it is; so this is how a device of any other library is had.

# %%
devices = usable_devices()
if find_spec("torch"):
    import torch

    devices.append(Device.of(torch.zeros(1)))

results = {}
for device in devices:
    last_loss, accuracy, layer = train(device)
    results[str(device)] = last_loss, accuracy, device.to_numpy(layer.W)
    kind = f"{type(layer.W).__module__}.{type(layer.W).__name__}"
    print(f"{device!s:<10} {kind:<14} loss {last_loss:.6f}, accuracy {accuracy:.2%}")

# %% [markdown]
# How far apart are they after 230 steps? float32 has a precision of 6e-8, and training amplifies what rounding leaves.

# %%
loss_here, accuracy_here, W_here = results["cpu"]
for name, (last_loss, _, W) in results.items():
    apart = float(np.abs(W - W_here).max())
    print(f"{name:<10} loss differs by {abs(last_loss - loss_here):.1e}, weights by {apart:.1e} at most")
