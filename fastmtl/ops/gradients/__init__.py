"""Ops on the gradients of T tasks: the Gram matrix, weighted sums, PCGrad and its random order."""
