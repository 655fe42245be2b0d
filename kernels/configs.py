"""Tile sizes of the Triton kernels."""
