"""What the image `test-cuda` runs: the doctor's verdict on the card, then the tests, with the arguments given."""

import os
import sys

from anyarray_linear.arrays import doctor

steps = doctor.examine()
for step in steps:
    print(f"CUDA: {step.name}: {step.found}")
print(f"To cure it: {steps[-1].cure}" if steps[-1].cure else "CUDA: a kernel and a matrix product ran.", flush=True)

# not pytest.main: the doctor has loaded CuPy into this process, and tests look at what the package itself loads
os.execv(sys.executable, [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--pyargs", *sys.argv[1:]])
