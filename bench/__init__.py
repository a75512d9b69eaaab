"""Benchmarks: how far each kernel is from the physical limit, and from what one would use instead."""
