"""What numba compiles: only `building` imports these modules, and only when there is something to compile."""
