"""The masked-diffusion training loss behind the LM head, forward and with gradients."""

import jax.numpy as jnp
import numpy as np

import dlm_kernels
from bench import harness, oracles, peers
from bench.harness import Case


def case(name, rows, d, v, dtype, masked=0.5, backward=False, **options):
    """hidden [1, R, D], weight [V, D]; the share `masked` of the rows has a loss."""

    def inputs(rng):
        weights = np.where(rng.permutation(rows) < masked * rows, 1 / masked, 0).astype(np.float32)
        return (
            harness.normal(rng, (1, rows, d), dtype),
            harness.normal(rng, (v, d), dtype, 3 / d**0.5),
            jnp.asarray(rng.integers(0, v, (1, rows)), jnp.int32),
            jnp.asarray(weights)[None],
        )

    def loss(hidden, weight, targets, weights, implementation):
        return dlm_kernels.masked_cross_entropy(hidden, weight, targets, weights, implementation=implementation)

    contenders = harness.ours(loss)
    if backward:
        contenders = harness.with_gradients(contenders)
    around = peers.with_gradients if backward else peers.no_grad
    contenders |= peers.of_torch(_torch_loss, compiled=options.get("headline"), around=around)
    active = int(masked * rows)
    size = jnp.dtype(dtype).itemsize
    return Case(
        "cross_entropy",
        f"{name}, {rows} x {d} x {v}, {masked:.0%} masked, {dtype}{', backward' if backward else ''}",
        inputs,
        contenders,
        read=size * d * (v + active),
        written=size * d * (v + rows) * backward,
        # Backward has two products of its own; a kernel that makes the logits anew to keep none does more than it must.
        flops=2 * active * d * v * (3 if backward else 1),
        dtype=dtype,
        oracle=None if backward else _oracle,
        tolerance=1e-4 if dtype == "float32" else 2e-2,
        **options,
    )


def _oracle(*arrays):
    return oracles.cross_entropy(*map(np.asarray, arrays))


def _torch_loss(hidden, weight, targets, weights):
    """Only the rows that have a loss go through the head, as a careful training loop has it."""
    import torch

    rows = weights[0] != 0
    # Their number depends on data, where torch.compile ends a graph: so before all else, which then is one.
    hidden, targets, weights = hidden[0, rows], targets[0, rows], weights[0, rows]
    logits = (hidden @ weight.T).float()
    loss = torch.nn.functional.cross_entropy(logits, targets.long(), reduction="none")
    return (weights * loss).sum()


def cases():
    return [
        case("MDLM", 512, 768, 50258, "float32", quick=True, headline=True),
        case("MDLM", 512, 768, 50258, "float32", backward=True, headline=True),
        case("LLaDA-8B slice", 128, 4096, 32768, "float32", backward=True),
        case("LLaDA-8B slice", 256, 4096, 32768, "bfloat16"),
        *(
            case(name, rows, d, v, "bfloat16", backward=backward, full=True)
            for name, d, v in (("LLaDA-8B", 4096, 126464), ("SDAR-4B", 2560, 151936))
            for rows in (4096, 8192)
            for backward in (False, True)
        ),
    ]


test_cross_entropy, pytest_generate_tests = harness.microbenchmark(cases)
