"""Ours against peers, and against the limit of the machine: `python -m benchmarks` in a clone. Not in the wheel.

How it measures, on a machine that others use too:

- Each contestant computes in a process of its own, so that no two thread pools meet; while one computes, the others are
  stopped (SIGSTOP), for the threads of some spin while they wait. Variables that tell OpenBLAS another processor than there
  is are not handed on to these processes.
- What a contestant computes is compared with ours before it is timed.
- A round asks every contestant once, in an order that rotates from round to round. The answer is the fastest of three
  bursts of at least 20 ms, after a quarter of a burst unmeasured: a disturbance only ever adds time.
- All of it is repeated in several runs, each with new processes. The figure is the median over the rounds of all runs, its
  spread the quartiles; a ratio is theirs / ours, of medians.
- Training steps have a learning rate of 1e-7. One batch trained to saturation ends in denormal moments, and then the time
  of these is measured.
"""
