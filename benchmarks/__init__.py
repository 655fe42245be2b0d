"""Benchmarks of fastmtl against plain PyTorch and its peers, installed as `fastmtl.benchmarks`.

`fastmtl bench` runs them. A benchmark is data (`registry.Case`); one runner serves all of them.
"""
