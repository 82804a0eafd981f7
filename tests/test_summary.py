"""The table of a model: what it counts, and how it marks what is shared, frozen or not known."""

from __future__ import annotations

from anyarray_linear import GELU, LayerNorm, Linear, ReLU, Sequential


class Own:
    def forward(self, X):
        return X, None

    def gradients(self, dZ, cache, *, needs_dX=True):
        return dZ, {}

    def backward(self, dZ, cache, *, accumulate=False, needs_dX=True):
        return dZ

    def parameters(self):
        return {}

    def to(self, device=None, dtype=None):
        return self

    def __call__(self, X):
        return X


def test_a_shared_a_frozen_and_an_unknown_layer(backend):
    options = {"device": backend.device, "dtype": "float32"}
    shared = Linear(4, 4, seed=0, **options)
    frozen = LayerNorm(4, **options)
    frozen.trainable = False
    model = Sequential(shared, GELU(), Sequential(shared, frozen), Own(), ReLU(), Linear(4, 2, bias=False, seed=1, **options))
    head, *rows, end = model.summary().splitlines()
    assert head.split() == ["layer", "output", "parameters", "bytes", "device"]
    device = str(backend.device)
    assert [row.split() for row in rows] == [
        ["0", "Linear", "(...,", "4)", "20", "80", device], ["1", "GELU", "(...,", "4)"],
        ["2.0", "Linear", "(that", "of", "0", "again)", "(...,", "4)"],
        ["2.1", "LayerNorm", "(frozen)", "(...,", "4)", "8", "32", device],
        ["3", "Own", "(...,", "?)"], ["4", "ReLU", "(...,", "?)"], ["5", "Linear", "(...,", "2)", "8", "32", device],
    ]  # fmt: skip
    assert end == "36 parameters, 8 of them frozen; 144 bytes"
    assert len({line.find("(...") for line in rows}) == 1
