"""The same work without fastmtl: as people write it, as well as plain PyTorch can, and by peers."""
