"""Other libraries' formats and interfaces: ONNX files, scikit-learn estimators. Each module needs its own library only.

PyTorch needs no module: weights go both ways by `save_model` and `load_model`, arrays by `Linear.from_arrays` and
`Device.from_dlpack`.
"""
