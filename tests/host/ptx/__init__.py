"""PTX, as nvcc and Triton write it, in C++ that runs on the host: see translate.py."""
