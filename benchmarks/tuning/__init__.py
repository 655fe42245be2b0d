"""`fastmtl tune`: measures which way is the fastest on this machine and writes the table that the ops read.

`probes.py` is what is measured, `choose.py` makes limits of times, `cli.py` is the command; see
docs/kernels/tuning.md.
"""
