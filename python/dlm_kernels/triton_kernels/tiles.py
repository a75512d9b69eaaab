"""The fastest tiles, written by `python -m bench tune` on GPUs; none has been measured yet."""

# (kernel, compute capability, the arguments of the kernel's own choice): (constants, warps, stages).
MEASURED = {
}
