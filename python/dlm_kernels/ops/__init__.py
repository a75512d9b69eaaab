"""Public operations: signature, checks, choice of implementation, gradient, batching, sharding."""
