"""On a machine with no GPU, every operation lowers for `cuda` to our kernels, ptxas takes them, and they are kept on disk."""

import json
import os
import pathlib
import subprocess
import sys

EXPECTED = {
    "attention": {"_forward_kernel"},
    "attention of few queries": {"_forward_kernel", "_combine_kernel"},
    "attention gradient": {"_forward_kernel", "_delta_kernel", "_dkdv_kernel", "_dq_kernel"},
    "mix_guidance": {"_mix_kernel"},
    "combine_guidance": {"_combine_kernel"},
    "truncate_logits": {"_truncate_kernel"},
    "score_tokens": {"_score_kernel", "_merge_kernel"},
    "score_tokens at a temperature": {"_score_kernel", "_draw_kernel", "_merge_kernel"},
    "unmask_topk": {"_score_kernel", "_merge_kernel", "_topk_kernel"},
    "unmask_step": {"_score_kernel", "_draw_kernel", "_topk_kernel"},
    "unmask_step under vmap": {"_score_kernel", "_topk_kernel"},
    "lm_head_scores": {"_scores_kernel", "_merge_kernel"},
    "lm_head_scores at a temperature": {"_scores_kernel", "_merge_kernel"},
    "masked_cross_entropy gradient": {"_loss_kernel", "_loss_merge_kernel", "_dlogits_kernel", "_product_kernel"},
    "mix_experts": {"_sort_kernel", "_hidden_kernel", "_down_kernel", "_sum_kernel"},
    "masked_divergence gradient": {
        "_divergence_kernel", "_divergence_merge_kernel", "_divergence_dlogits_kernel", "_product_kernel",
    },
}  # fmt: skip


def exported(cache):
    script = pathlib.Path(__file__).with_name("export_operations.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"JAX_PLATFORMS": "cpu", "DLM_KERNELS_CUDA_ARCH": "90", "TRITON_CACHE_DIR": str(cache)}
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = list(map(json.loads, run.stdout.splitlines()))
    assert {row["operation"]: set(row["kernels"]) for row in rows} == EXPECTED
    assert not [row for row in rows if row["errors"]]
    return rows


def test_every_operation_exports_for_cuda_and_a_second_process_compiles_nothing(tmp_path):
    first, second = exported(tmp_path), exported(tmp_path)
    assert first[0]["made"] == 1 and sum(row["made"] for row in first) >= 20
    # Five chunks share the kernels, but for the first and the last product into the gradient of the hidden states.
    assert [row["made"] for row in first if row["operation"] == "masked_cross_entropy gradient"] == [7]
    assert not [row for row in second if row["made"]]
