"""From T task gradients to `.grad`: the Gram matrix, what a method makes of it, and the update.

`gradients` holds what was collected, `solve` is the surgery itself, `accumulate` writes what comes of it, and `result`
tells of it.
"""
