"""torch's attention masks as key intervals, which most of them are."""

import torch

from dlm_kernels import masks


def intervals(mask, queries, keys):
    """A mask of scaled_dot_product_attention as `masks.KeyIntervals` where it can be one, else as a boolean mask.

    mask: bool, True where a query sees a key, or float, 0 there and elsewhere -inf or below half of its dtype's least number; of a
    shape that broadcasts to [B, N, T, S]. It can be one where it is the same for all heads and no query sees more than two runs of
    keys; its values are looked at for that, for which a GPU is waited for. Raises ValueError for other dtypes and other numbers.
    """
    if not mask.is_floating_point() and mask.dtype != torch.bool:
        raise ValueError(f"mask: expected bool, or 0 where a query sees a key and -inf elsewhere, got dtype {mask.dtype}")
    if mask.is_floating_point():
        seen = mask == 0
        if not (seen | (mask <= torch.finfo(mask.dtype).min / 2)).all():
            raise ValueError("mask: expected bool, or 0 where a query sees a key and -inf elsewhere, got other numbers")
        mask = seen
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    fits = len(shape) == 4 and shape[2] in (1, queries) and shape[3] in (1, keys)
    if not fits or shape[1] != 1 or 0 in (*shape, queries, keys):
        return mask
    seen = mask.reshape(shape)[:, 0].expand(-1, queries, keys)
    edges = torch.nn.functional.pad(seen.to(torch.int8), (1, 1)).diff(dim=-1)
    begins, ends = (edges == 1).int(), (edges == -1).int()
    most = begins.sum(-1).max()
    if most > 2:
        return mask
    first = begins.argmax(-1), ends.argmax(-1)
    # Of a row with one run the same again, of one with none an empty one at the end.
    last = (keys - x.flip(-1).argmax(-1) for x in (begins, ends))
    return masks.KeyIntervals(*(x.int() for x in (first if most < 2 else (*first, *last))))
