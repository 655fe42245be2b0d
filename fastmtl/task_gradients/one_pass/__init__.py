"""The task gradients of a batch in which every sample has one task, from one forward and one backward pass.

The samples of the batch are followed through the forward pass: `sample_axis` says what is known of a tensor, `rules`
how each torch function hands that on, `layers` and `attention` what is done where a parameter meets samples, `tracker`
is the torch function mode that sees every call. `batch` is one batch with its backward pass, which delivers to `bank`;
`context` is the block around them.
"""
