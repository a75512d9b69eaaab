"""Random numbers of JAX's threefry generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), in NumPy."""

import numpy as np

ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)


def threefry2x32(key, counter):
    """key, counter: pairs of uint32 arrays. Returns a pair of uint32 arrays: 20 rounds, a key injected after every fourth."""
    first, second = (np.asarray(word, np.uint32) for word in key)
    keys = first, second, first ^ second ^ np.uint32(0x1BD11BDA)
    x, y = np.asarray(counter[0], np.uint32) + first, np.asarray(counter[1], np.uint32) + second
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x = x + y
            y = ((y << np.uint32(rotation)) | (y >> np.uint32(32 - rotation))) ^ x
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x, y


def uniform(key_data, counter_row, v):
    """float32 [R, V]: row r is row counter_row[r] of jax.random.uniform(key_data[r], [any, V], minval=tiny), to the bit."""
    counter = counter_row.astype(np.uint64)[:, None] * np.uint64(v) + np.arange(v, dtype=np.uint64)
    words = (counter >> np.uint64(32)).astype(np.uint32), (counter & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    x, y = threefry2x32((key_data[:, :1], key_data[:, 1:]), words)
    # 23 random bits as the mantissa of a number in [1, 2).
    unit = (((x ^ y) >> np.uint32(9)) | np.uint32(0x3F800000)).view(np.float32) - np.float32(1)
    tiny = np.finfo(np.float32).tiny
    return np.maximum(tiny, unit * (np.float32(1) - tiny) + tiny)


def gumbel(key_data, counter_row, v):
    """float64 [R, V]: -log(-log(uniform))."""
    return -np.log(-np.log(uniform(key_data, counter_row, v).astype(np.float64)))
