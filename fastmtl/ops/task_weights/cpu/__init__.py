"""The CPU's half of the ops with per-task weights: which calls of torch and of the C++ a batch becomes."""
