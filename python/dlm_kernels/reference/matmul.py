"""A product of rows and a weight, in float64."""

import numpy as np


def matmul(x, weight):
    """x [R,D]; weight [D,F]. Returns float64 [R,F]."""
    return np.asarray(x, np.float64) @ np.asarray(weight, np.float64)
