"""Triton kernels of the ops with per-task weights, and their launchers."""
