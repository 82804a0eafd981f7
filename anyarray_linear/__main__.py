"""`python -m anyarray_linear` is the command `anyarray-linear`."""

from .cli import main

if __name__ == "__main__":
    main()
