"""torch's attention masks as key intervals, which most of them are."""

import torch

from dlm_kernels import masks


def intervals(mask, heads, queries, keys):
    """A mask of scaled_dot_product_attention as `masks.KeyIntervals` where it can be one, else as a boolean mask.

    mask: bool, True where a query sees a key, or float, 0 there and elsewhere -inf or below half of its dtype's least number; of a
    shape that broadcasts to [B, N, T, S]. It can be one where the heads' axis is of size 1 or expanded, and no query sees more than
    two runs of keys; its values are looked at for that, for which a GPU is waited for. Raises ValueError for other dtypes and other
    numbers.
    """
    if not mask.is_floating_point() and mask.dtype != torch.bool:
        raise ValueError(f"mask: expected bool, or 0 where a query sees a key and -inf elsewhere, got dtype {mask.dtype}")
    # Along an axis that was expanded all is the same memory: at each layer of a model it would be looked at for every query.
    seen = mask[tuple(slice(1) if stride == 0 else slice(None) for stride in mask.stride())]
    if mask.is_floating_point():
        numbers, seen = seen, seen == 0
        if not (seen | (numbers <= torch.finfo(mask.dtype).min / 2)).all():
            raise ValueError("mask: expected bool, or 0 where a query sees a key and -inf elsewhere, got other numbers")
    mask = seen.expand(mask.shape)
    lead = (1,) * (4 - mask.dim())
    shape, seen = (*lead, *mask.shape), seen.reshape(*lead, *seen.shape)
    fits = len(shape) == 4 and all(mine in (1, other) for mine, other in zip(shape[1:], (heads, queries, keys)))
    if not fits or seen.shape[1] != 1 or 0 in (*shape, queries, keys):
        return mask
    padded = torch.nn.functional.pad(seen[:, 0].expand(-1, -1, keys), (1, 1))
    edges = padded[..., 1:] != padded[..., :-1]  # where a run begins, and in turn where it ends
    count = edges.sum(-1, dtype=torch.int32)
    most = count.max()
    if most > 4:
        return mask
    ends = torch.full((*count.shape, 4), keys, dtype=torch.int32, device=mask.device)  # what no run needs is empty
    ends[torch.arange(4, device=mask.device) < count[..., None]] = edges.nonzero()[:, -1].int()
    ends = ends.expand(shape[0], queries, -1).unbind(-1)
    return masks.KeyIntervals(*(ends if most > 2 else ends[:2]))
