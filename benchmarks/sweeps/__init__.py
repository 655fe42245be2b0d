"""Checks over many models that take longer than a test may."""
