"""torch.compile takes the operations with gradients into its graph, where they give what they give outside of it, bit for bit.

On CPU tensors, and what runs on CUDA tensors: on CPU tensors too in Triton's interpreter, by `make test-gpu` on CUDA tensors.
"""

import functools
import importlib
import os

import jax.numpy as jnp
import numpy as np
import pytest

from dlm_kernels import masks

DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
torch = pytest.importorskip("torch", reason="the torch extra is not installed")
adapter = importlib.import_module("dlm_kernels.torch")
compiled = importlib.import_module("dlm_kernels.torch.compiled")
torch_masks = importlib.import_module("dlm_kernels.torch.masks")

B, L, V, D = 2, 5, 40, 16
CASES = {
    "attention": "attention",
    "a product": "matmul",
    "a mixture of experts": "mix_experts",
    "the loss": "masked_cross_entropy",
    "the divergence": "masked_divergence",
    "the soft embedding": "soft_embedding",
    "the soft embedding by chunks": "soft_embedding",
}


def arguments(case, length=L):
    """By name. All floats are learnt but a few."""
    torch.manual_seed(0)
    hidden, weight, weights = torch.randn(B, length, D), torch.randn(V, D), torch.rand(length, B).T
    soft = dict(hidden=hidden, weight=weight, logits_soft_cap=3.0)
    given = {
        "attention": dict(query=hidden[:, :, None], key=hidden[:, :, None] + 1, value=torch.randn(B, length, 1, D), scale=0.3),
        "a product": dict(x=hidden, weight=weight.T),
        "a mixture of experts": dict(
            x=hidden.mT.contiguous().mT, gate=torch.randn(4, D, 24) / 4, up=torch.randn(4, D, 24) / 4, down=torch.randn(4, 24, D),
            expert=torch.randint(4, (B, length, 3)), weight=torch.rand(B, length, 3), activation="gelu",
        ),
        "the loss": dict(hidden=hidden, weight=weight, targets=torch.randint(V, (B, length)), weights=weights, logits_soft_cap=9),
        "the divergence": dict(
            hidden=hidden, weight=weight, target_hidden=torch.randn(B, length, 24), target_weight=torch.randn(V, 24),
            weights=weights, reduction="none",
        ),
        "the soft embedding": soft | dict(temperature=0.7),
        "the soft embedding by chunks": soft | dict(embedding=torch.randn(V, 24), temperature=torch.tensor(0.7)),
    }[case]  # fmt: skip
    frozen = ("up", "target_hidden", "target_weight")
    for name, x in given.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point() and name not in frozen:
            given[name] = x.detach().requires_grad_()
    return given


def same_in_a_graph(eager, made, given):
    learnt = [x for x in given.values() if getattr(x, "requires_grad", False)]
    results = [run(**given) for run in (eager, made)]
    cotangent = torch.randn(results[0].shape)
    mine, other = (torch.autograd.grad(out, learnt, cotangent.to(out.dtype)) for out in results)
    assert len(learnt) > 1 and all(x.abs().max() > 0 for x in mine)
    torch.testing.assert_close(mine, other, rtol=0, atol=0)
    assert results[1].is_contiguous()  # which the graph counts on
    with torch.no_grad():  # as the graph's own forward runs
        torch.testing.assert_close(results[1].detach(), eager(**given), rtol=0, atol=0)


@pytest.fixture(autouse=True)
def no_graphs():
    torch.compiler.reset()  # it compiles a function for only so many kinds of arguments


def by_triton(case):
    """What runs on CUDA tensors, and a node of it alone, which has another name than the package's, of both."""
    native = importlib.import_module("dlm_kernels.torch.native")
    operation = functools.partial(getattr(native, CASES[case]))
    operation.__name__ = "of_triton_" + case.replace(" ", "_")
    return operation, torch.compile(getattr(compiled, CASES[case])(operation), backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("case", CASES)
def test_what_runs_on_cuda_tensors_too(case):
    """Around the kernels it is torch's autograd, which torch leaves out of what an operation of its library runs."""
    with torch.device(DEVICE):
        same_in_a_graph(*by_triton(case), arguments(case))


def test_a_target_that_requires_a_gradient_has_one_of_zeros():
    with torch.device(DEVICE):
        given = arguments("the divergence")
        target = given["target_hidden"].requires_grad_()
        by_triton("the divergence")[1](**given).sum().backward()
    assert not target.grad.any() and given["hidden"].grad.any()


def test_attention_with_a_mask_where_tensors_on_a_gpu_go():
    with torch.device(DEVICE):
        given, mask = arguments("attention"), torch.arange(L) < 3
        masked = functools.partial(adapter.attention, mask=mask)
        same_in_a_graph(masked, torch.compile(masked, backend="aot_eager", fullgraph=True), given)


@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients_are_the_eager_ones_in_one_graph_for_all_shapes(case):
    operation = getattr(adapter, CASES[case])
    made = torch.compile(operation, backend="aot_eager", fullgraph=True, dynamic=True)
    same_in_a_graph(operation, made, arguments(case))
    with torch.compiler.set_stance("fail_on_recompile"):
        same_in_a_graph(operation, made, arguments(case, L + 4))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_keeps_attention_in_its_graph(backend):
    """Results and gradients are the eager ones, bit for bit, whatever the mask, which only the run looks at."""
    torch.manual_seed(0)
    stop = torch.tensor([[3] * 9, [9] * 9])
    two = masks.KeyIntervals(torch.zeros_like(stop), stop, stop + 2, stop + 4)
    keys = torch.arange(9)
    combs = (keys % 2 == 0).expand(9, 9)  # no two runs of keys: a boolean mask to XLA
    inputs = [torch.randn(2, 9, n, 16).requires_grad_() for n in (4, 2, 2)]

    def layer(query, key, value, mask):
        out, lse = adapter.attention(2 * query, key, value, mask=mask, scale=0.3, return_lse=True)
        return out * torch.sigmoid(lse).mT[..., None]

    made = torch.compile(layer, backend=backend, fullgraph=True)
    for mask in (None, masks.KeyIntervals(torch.zeros_like(stop), stop), two, keys < 7, combs):
        results = [run(*inputs, mask) for run in (layer, made)]
        np.testing.assert_array_equal(*(x.detach() for x in results))
        gradients = [torch.autograd.grad((x * torch.arange(16)).sum(), inputs) for x in results]
        for mine, other in zip(*gradients):
            assert mine.abs().max() > 0
            np.testing.assert_array_equal(mine, other)


def test_torch_compile_takes_numbers_of_numpy():
    def run(x):
        scale = 1 / np.sqrt(x.shape[-1] + 3)
        return adapter.attention(x, x, x, scale=scale)[:, :, 0] + adapter.soft_embedding(x[:, :, 0], x[0, :, 0], temperature=scale)

    x = torch.randn(1, 5, 1, 8)
    np.testing.assert_array_equal(torch.compile(run, backend="eager", fullgraph=True)(x), run(x))


@pytest.mark.parametrize(
    "case, other",
    {
        "attention": dict(start=torch.arange(L) < 3, stop=None, start2=None, stop2=None),
        "a mixture of experts": {},
        "the loss": {},
        "the divergence": {},
        "the soft embedding": dict(embedding=None, temperature=None, number=0.7),
    }.items(),
)
def test_they_are_operations_of_torchs_library(case, other):
    operation = getattr(torch.ops.dlm_kernels, CASES[case])
    torch.library.opcheck(operation, (), arguments(case) | other, atol=0, rtol=0)


def test_torch_compile_breaks_its_graph_for_arrays_of_jax():
    x, mask = torch.randn(1, 5, 1, 8), masks.padding(jnp.array([3]), 5)
    made = torch.compile(lambda x: adapter.attention(x, x, x, mask=mask) + 1, backend="eager")(x)
    np.testing.assert_array_equal(made, adapter.attention(x, x, x, mask=mask) + 1)
    given = arguments("the loss") | dict(weights=jnp.ones((B, L)))
    made = torch.compile(lambda hidden: adapter.masked_cross_entropy(**given | dict(hidden=hidden)), backend="eager")
    assert made(given["hidden"]) == adapter.masked_cross_entropy(**given)


def attend(x, causal, padding):
    return adapter.attention(2 * x, x, x, mask=causal & padding) + 1


def test_torch_compile_breaks_its_graph_for_a_mask_that_a_model_builds():
    def model(x, lengths):
        causal = torch_masks.block_causal(x.shape[1], 4, offset=lengths - 3)
        return attend(x, causal, torch_masks.padding(lengths, x.shape[1]))

    x, lengths = torch.randn(2, 8, 1, 8), torch.tensor([3, 8])
    made = torch.compile(model, backend="aot_eager", dynamic=True)(x, lengths)
    np.testing.assert_array_equal(made, model(x, lengths))
    whole = masks.block_causal(8, 4, offset=jnp.array([0, 5])) & masks.padding(jnp.array([3, 8]), 8)
    np.testing.assert_array_equal(made, adapter.attention(2 * x, x, x, mask=whole) + 1)


def test_torch_compile_takes_masks_from_outside_into_its_one_graph():
    """What combines them and what shows them too."""
    x, causal, padding = torch.randn(2, 8, 1, 8), torch_masks.block_causal(8, 4), torch_masks.padding([3, 8], 8, side="left")
    made = torch.compile(attend, backend="aot_eager", fullgraph=True)
    np.testing.assert_array_equal(made(x, causal, padding), attend(x, causal, padding))
    shown = torch.compile(lambda mask: mask.as_boolean(8), backend="aot_eager", fullgraph=True)(causal & padding)
    expected = (masks.block_causal(8, 4) & masks.padding(jnp.array([3, 8]), 8, side="left")).as_boolean(8)
    np.testing.assert_array_equal(shown, expected)


def test_torch_compile_breaks_its_graph_around_the_other_operations():
    """All around: from torch 2.11 the results that it looks into come back empty."""
    traced = []

    def backend(graph, _):
        traced.extend(getattr(node.target, "__name__", node.target) for node in graph.graph.nodes if node.op.startswith("call"))
        return graph

    def step(logits, tokens):
        token = adapter.score_tokens(2 * logits).token - 1
        return adapter.unmask_step(adapter.truncate_logits(logits), tokens, mask_id=30, num_unmask=3).tokens + token

    logits, tokens = torch.randn(2, 7, 31), torch.full((2, 7), 30)
    np.testing.assert_array_equal(torch.compile(step, backend=backend)(logits, tokens), step(logits, tokens))
    assert sorted(traced) == ["add", "mul", "sub"]


def test_a_model_is_exported():
    class Layer(torch.nn.Module):
        def forward(self, x, gate, down, expert, weight):
            x = adapter.attention(x, x, x)[:, :, 0]
            return adapter.mix_experts(x, gate, gate, down, expert, weight=weight)

    def inputs(length):
        gate, down, expert = torch.randn(4, D, 24), torch.randn(4, 24, D), torch.randint(4, (B, length, 3))
        return torch.randn(B, length, 1, D), gate, down, expert, torch.rand(B, length, 3)

    length, given = torch.export.Dim("length"), inputs(L + 4)
    shapes = {1: length}, None, None, {1: length}, {1: length}
    program = torch.export.export(Layer(), inputs(L), dynamic_shapes=shapes)
    np.testing.assert_array_equal(program.module()(*given), Layer()(*given))


@pytest.mark.parametrize(
    "case, wrong, message",
    [
        ("attention", dict(query=torch.ones(2, 5, 16)), r"query: expected shape \[B, T, N, H\], got \[2, 5, 16\]"),
        ("a mixture of experts", dict(activation="relu"), "activation: expected one of 'silu', 'gelu', got 'relu'"),
        ("a mixture of experts", dict(weight=torch.ones(2, 5, 4)), r"weight: expected shape \[2, 5, 3\]"),
        ("the loss", dict(reduction="mean"), "reduction: expected one of 'sum', 'none', got 'mean'"),
        ("the soft embedding", dict(temperature=0), "temperature: expected a number above 0, got 0"),
    ],
)
def test_what_is_wrong_is_told_as_without_a_graph(case, wrong, message):
    made = torch.compile(getattr(adapter, CASES[case]), backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match=message):
        made(**arguments(case) | wrong)
