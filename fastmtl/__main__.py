"""The command line: `fastmtl bench`, `fastmtl tune`, `fastmtl info`; the same through `python -m fastmtl`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from fastmtl._version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    from fastmtl.benchmarks.runner import cli
    from fastmtl.benchmarks.tuning import cli as tuning

    parser = argparse.ArgumentParser(prog="fastmtl", description="Fused kernels for multi-task learning in PyTorch.")
    parser.add_argument("--version", action="version", version=f"fastmtl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    bench = commands.add_parser("bench", help="measure this machine against naive PyTorch and the peers")
    cli.add_arguments(bench)
    tune = commands.add_parser("tune", help="measure which way is the fastest on this machine: a minute or two")
    tuning.add_arguments(tune)
    commands.add_parser("info", help="what was built, what was found, and why a backend is off")
    options = parser.parse_args(argv)
    if options.command == "bench":
        return cli.run(options)
    if options.command == "tune":
        return tuning.run(options)
    from fastmtl import info

    try:
        return info.main()
    except BrokenPipeError:  # `fastmtl info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
