"""Which of several ways is the fastest on this machine: numbers that `fastmtl tune` measured, and where they lie.

`table.py` is a table as a value and as a file, `processor.py` says which machine it is of, `search.py` finds the one
that is used. `docs/kernels/tuning.md` explains the numbers. Nothing here computes or measures:
`benchmarks/tuning` does.
"""
