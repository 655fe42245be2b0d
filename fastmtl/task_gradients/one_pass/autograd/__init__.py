"""Layers whose weight gradient comes apart by task: plain forward passes, and in the backward pass `[R, ...]` rows of
each parameter where torch would give their sum.

Every function takes the parameters as plain values and after them `targets`, stand-ins that receive the rows: for each
parameter one `[R, ...]` tensor (`form` STACKED), R tensors (`form` R: the task copies of a computed parameter), or
none (`form` 0: the parameter is not in a bank and gets its own gradient). Inside `plain_gradients()` the parameters
get their plain gradient instead: the sum over the samples, weighted as the cotangents are.

Source: task t's gradient of a shared weight is the weight gradient over task t's samples (docs/guides/one-pass.md).
"""
