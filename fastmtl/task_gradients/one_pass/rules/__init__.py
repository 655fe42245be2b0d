"""How each torch function hands the axis of the samples on: one file for each family of functions, and their table.

A rule takes a `TorchCall` that has run and carries samples, and answers what is known of its results. What has no rule
is unknown: nothing is ever guessed from a size.
"""
