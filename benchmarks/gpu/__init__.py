"""What a first run on a GPU machine asks, beside the suites (docs/kernels/first-gpu-run.md)."""
