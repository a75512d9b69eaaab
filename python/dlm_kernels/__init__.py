"""Kernels for diffusion language models on CPU (C++), NVIDIA GPU (Triton) and TPU (Pallas); plain XLA elsewhere.

The operations are those of `__all__`; `masks` builds attention masks, `explain` tells which kernel a call takes, and
`export_checks` what jax.export has to be told.
"""

from dlm_kernels import cpu_kernels, masks
from dlm_kernels.ops.attention import attention
from dlm_kernels.ops.cross_entropy import masked_cross_entropy
from dlm_kernels.ops.divergence import masked_divergence
from dlm_kernels.ops.experts import mix_experts
from dlm_kernels.ops.explain import explain
from dlm_kernels.ops.export import export_checks
from dlm_kernels.ops.guidance import combine_guidance, mix_guidance
from dlm_kernels.ops.lm_head import PackedHead, lm_head_scores, pack_lm_head
from dlm_kernels.ops.matmul import matmul
from dlm_kernels.ops.soft_embedding import soft_embedding
from dlm_kernels.ops.truncation import truncate_logits
from dlm_kernels.ops.unmask import TokenScores, UnmaskResult, score_tokens, unmask_step, unmask_topk

__version__ = "0.1.0"

cpu_kernels.register()

__all__ = [
    "PackedHead",
    "TokenScores",
    "UnmaskResult",
    "attention",
    "combine_guidance",
    "explain",
    "export_checks",
    "lm_head_scores",
    "masked_cross_entropy",
    "masked_divergence",
    "masks",
    "matmul",
    "mix_experts",
    "mix_guidance",
    "pack_lm_head",
    "score_tokens",
    "soft_embedding",
    "truncate_logits",
    "unmask_step",
    "unmask_topk",
]
