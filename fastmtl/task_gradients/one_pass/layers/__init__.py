"""What runs where parameters of the bank meet samples: the same layer, whose weight gradient comes apart by task.

A layer takes the tracker, as the small `LayerTracker` of `protocol`, and the `TorchCall` that is about to run. It runs
the call by the functions of `autograd`, and answers the result with what is known of it.
"""
