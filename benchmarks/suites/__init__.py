"""The cases of each suite: what is measured, on which inputs, against what."""
