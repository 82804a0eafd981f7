"""The library as scikit-learn estimators, so that a pipeline or a grid search trains on a GPU without PyTorch.

`LinearNetClassifier` and `LinearNetRegressor` are networks of linear layers behind scikit-learn's interface. Parameters and
fitted attributes have the names of `MLPClassifier` where they mean the same. What is different:

- `device`: where to compute, as `select_device` takes it; NumPy data are moved there batch by batch, and results come back.
  `None`: where `X` is. That is the CPU, or under `sklearn.config_context(array_api_dispatch=True)` wherever the arrays are:
  CuPy arrays train on their card, torch tensors on their device, and results are of the same library and device. (For
  that, scikit-learn wants SCIPY_ARRAY_API=1 in the environment before Python starts.)
- `dtype`: what to compute in; `None` is float32 for a float32 or float16 `X`, else float64. Most GPUs are many times
  faster in float32.
- `solver` is one of this library's optimizers, and `weight_decay` theirs; there is no `alpha`, which MLPClassifier divides
  by the number of samples.
- Labels may be several per sample, and `X` sparse. Weights of samples and classes are factors in a batch's mean; training by
  mini-batches has no more than that to promise, so two samples of weight 1 are not one of weight 2 to the last bit.
- `init`: how the first weights are drawn, see `Linear`; `"auto"` is as MLPClassifier draws them, biases too.
"""

try:
    import sklearn as _  # noqa: F401
except ImportError as error:
    raise ImportError('this needs scikit-learn; pip install "anyarray_linear[sklearn]"') from error

from .classifier import LinearNetClassifier
from .regressor import LinearNetRegressor

__all__ = ["LinearNetClassifier", "LinearNetRegressor"]
