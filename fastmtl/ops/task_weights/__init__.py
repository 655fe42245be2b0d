"""Ops for batches in which each sample has the weights of its task, `W + s_t * Delta_t`, and for sorting them."""
