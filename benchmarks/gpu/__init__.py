"""What a first run on a GPU machine asks, beside the suites (docs/first-gpu-run.md)."""
