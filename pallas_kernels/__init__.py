"""TPU kernels in Pallas, a file per operation."""
