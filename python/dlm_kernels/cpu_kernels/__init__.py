"""CPU kernels: registers the FFI targets of csrc with XLA and calls them."""
