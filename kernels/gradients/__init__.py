"""Triton kernels of the ops on task gradients, and their launchers."""
