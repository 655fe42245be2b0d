"""What compiled GPU kernels look like, read without a GPU, and the times that this predicts."""
