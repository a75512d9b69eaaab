"""NumPy float64 oracles: the definition of each operation, written for reading."""
