"""The same operations on torch tensors."""
