"""Kernels for diffusion language models on CPU, GPU and TPU."""

__version__ = "0.1.0"
