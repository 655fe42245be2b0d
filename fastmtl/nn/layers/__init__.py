"""Layers of which each task has a part of its own."""
