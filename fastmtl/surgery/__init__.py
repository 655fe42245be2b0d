"""From T task gradients to `.grad`: the Gram matrix, what a method makes of it, and the update.

`gradients` holds what was collected, `solve` is the surgery itself, `accumulate` writes its result, `result` tells of it.
"""
