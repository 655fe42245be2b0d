"""What the Triton kernels of both families need: launching, pointer tables, the interpreter, building ahead of time."""
