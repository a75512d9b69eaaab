"""`attention` as a node of torch.compile's graph, into which the compiler does not look: an operation of torch's own library.

The other operations end a model's pass or stand between passes, and break the graph. This one stands in every layer.
"""

from collections.abc import Sequence

import torch

from dlm_kernels import masks


def as_node(eager):
    """`eager`, the operation on tensors, for torch.compile to trace. Its gradient computes the forward anew."""

    @torch.library.custom_op("dlm_kernels::attention", mutates_args=())
    def forward(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Sequence[torch.Tensor],
        scale: float | None,
        logits_soft_cap: float | None,
        implementation: str | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        options = dict(scale=scale, logits_soft_cap=logits_soft_cap, implementation=implementation)
        with torch.no_grad():
            out, lse = eager(query, key, value, mask=_whole(mask), return_lse=True, **options)
        return out.contiguous(), lse.contiguous()

    @forward.register_fake
    def _(query, key, value, mask, *options):
        b, t, n, _ = query.shape
        return query.new_empty(query.shape), query.new_empty((b, n, t), dtype=torch.float32)

    @torch.library.custom_op("dlm_kernels::attention_backward", mutates_args=())
    def backward(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Sequence[torch.Tensor],
        dout: torch.Tensor,
        dlse: torch.Tensor,
        scale: float | None,
        logits_soft_cap: float | None,
        implementation: str | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        options = dict(scale=scale, logits_soft_cap=logits_soft_cap, implementation=implementation)
        arrays = [x.detach().requires_grad_() for x in (query, key, value)]
        with torch.enable_grad():
            results = eager(*arrays, mask=_whole(mask), return_lse=True, **options)
        return tuple(x.contiguous() for x in torch.autograd.grad(results, arrays, (dout, dlse)))

    @backward.register_fake
    def _(query, key, value, *rest):
        return tuple(x.new_empty(x.shape) for x in (query, key, value))

    def keep(ctx, inputs, output):  # by this name it is given
        *arrays, mask, scale, cap, implementation = inputs
        ctx.save_for_backward(*arrays, *mask)
        ctx.options = scale, cap, implementation

    def differentiate(context, dout, dlse):
        query, key, value, *mask = context.saved_tensors
        gradients = backward(query, key, value, mask, dout, dlse, *context.options)
        return *gradients, [None] * len(mask), None, None, None

    forward.register_autograd(differentiate, setup_context=keep)

    def attention(
        query, key, value, *, mask=None, scale=None, logits_soft_cap=None, return_lse=False, implementation=None
    ):
        parts, scale = _parts(mask), None if scale is None else float(scale)
        out, lse = forward(query, key, value, parts, scale, logits_soft_cap, implementation)
        return (out, lse) if return_lse else out

    return attention


def _parts(mask):
    """A mask as a list of tensors, which is what an operation of torch's library can take."""
    if mask is None:
        return []
    ends = (mask.start, mask.stop, mask.start2, mask.stop2) if isinstance(mask, masks.KeyIntervals) else (mask,)
    ends = [x for x in ends if x is not None]
    for x in ends:
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"mask: expected one of tensors under torch.compile, got one of {type(x).__name__}")
    return ends


def _whole(parts):
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else masks.KeyIntervals(*parts)
