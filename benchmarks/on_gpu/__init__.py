"""Everything that wants a card, in eight minutes: `python -m benchmarks.on_gpu FOLDER` on a machine with one NVIDIA card.

The parts run in the order of their worth, each in processes of its own and for so long at most as it is given. What they
find is in `FOLDER/results.json` as soon as they find it, as a table in `FOLDER/report.md`; what they print, in
`FOLDER/log.txt`.

It runs from an unpacked tree, without network and without an installation: what the machine has not is taken from wheels
that were carried along, with `--wheels DIR`. On the CPU stand-in for CUDA it runs too, with small models, and tells counts
instead of times: `report.md` says so.
"""
