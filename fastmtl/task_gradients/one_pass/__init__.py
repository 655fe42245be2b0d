"""Following the samples of a batch through a forward pass: which axis of every tensor carries them.

`tags` says what is known of a tensor, `rules` how each torch function hands that on, `layers` what is done where a
parameter meets samples, `mode` is the torch function mode that sees every call, `block` one batch with its backward
pass.
"""
