"""Distillation's loss: the divergence of a student's head from its teacher's, forward and with gradients."""

import jax.numpy as jnp
import numpy as np

import dlm_kernels
from bench import harness, oracles, peers
from bench.harness import Case


def case(name, rows, d, v, dtype, masked=0.5, backward=False, **options):
    """Hidden states [1, R, D] and weights [V, D] of both models; the share `masked` of the rows has a loss."""

    def inputs(rng):
        def model():
            return harness.normal(rng, (1, rows, d), dtype), harness.normal(rng, (v, d), dtype, 3 / d**0.5)

        weights = (rng.permutation(rows) < masked * rows) / (masked * rows)
        return *model(), *model(), jnp.asarray(weights, jnp.float32)[None]

    def loss(*arrays, implementation):
        return dlm_kernels.masked_divergence(*arrays, implementation=implementation)

    contenders = harness.ours(loss)
    if backward:
        contenders = harness.with_gradients(contenders)
    around = peers.with_gradients if backward else peers.no_grad
    contenders |= peers.of_torch(_torch_loss, compiled=options.get("headline"), around=around)
    active = int(masked * rows)
    size = jnp.dtype(dtype).itemsize
    return Case(
        "divergence",
        f"{name}, {rows} x {d} x {v}, {masked:.0%} masked, {dtype}{', backward' if backward else ''}",
        inputs,
        contenders,
        read=2 * size * d * (v + active),
        written=size * d * (v + rows) * backward,
        # Backward has two products of its own; a kernel that makes the logits anew to keep none does more than it must.
        flops=2 * active * d * v * (4 if backward else 2),
        dtype=dtype,
        oracle=None if backward else _oracle,
        tolerance=1e-4 if dtype == "float32" else 2e-2,
        **options,
    )


def _oracle(*arrays):
    return oracles.divergence(*map(np.asarray, arrays))


def _torch_loss(hidden, weight, target_hidden, target_weight, weights):
    """Only the rows that have a loss go through the heads, as a careful training loop has it."""
    import torch

    rows = weights[0] != 0
    # Their number depends on data, where torch.compile ends a graph: so before all else, which then is one.
    hidden, target_hidden, weights = hidden[0, rows], target_hidden[0, rows], weights[0, rows]
    log_q = torch.nn.functional.log_softmax((hidden @ weight.T).float(), -1)
    log_p = torch.nn.functional.log_softmax((target_hidden @ target_weight.T).float(), -1)
    loss = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return (weights * loss).sum()


def cases():
    return [
        case("shipped", 2048, 256, 4096, "float32", backward=True, quick=True, headline=True),
        case("MDLM", 512, 768, 50258, "float32", backward=True),
        case("LLaDA-8B slice", 256, 4096, 32768, "bfloat16"),
        *(
            case(name, 4096, d, v, "bfloat16", backward=True, full=True)
            for name, d, v in (("LLaDA-8B", 4096, 126464), ("SDAR-4B", 2560, 151936))
        ),
    ]


test_divergence, pytest_generate_tests = harness.microbenchmark(cases)
