"""The task gradients of a batch in which every sample has one task, from one forward and one backward pass.

The samples of the batch are followed through the forward pass. `tracker` is the torch function mode that sees every
call; `sample_axis` says what is known of a tensor, `rules` how each torch function hands that on, `layers` what is done
where a parameter meets samples, `autograd` how its gradient comes apart by task. `batch` is one batch with its backward
pass, which returns what it collected to `bank`; `context` is the block around them.
"""
