"""The helpers of `dlm_kernels.torch.masks` give what those of `dlm_kernels.masks` give, as tensors."""

import importlib
import inspect
import pickle

import jax.numpy as jnp
import numpy as np
import pytest

from dlm_kernels import masks

torch = pytest.importorskip("torch", reason="the torch extra is not installed")
ours = importlib.import_module("dlm_kernels.torch.masks")

IDS = [[0, 0, 0, 1, 2, 2, -1, -1], [5, 5, 5, 5, 5, 5, 5, 3]]
CASES = {
    "blocks": lambda m, array: m.block_causal(7, 4, key_length=9, offset=array([2, 0])),
    "blocks of a size that is data": lambda m, array: m.block_causal(7, array(3)),
    "blocks of documents": lambda m, array: m.block_causal(8, 2, segment_ids=array(IDS)),
    "documents": lambda m, array: m.packed(array(IDS)),
    "padding": lambda m, array: m.padding(array([3, 0]), 4, 7, side="left"),
    "padding, lengths as a list": lambda m, array: m.padding([3, 0], 4),
    "BD3-LM's": lambda m, array: m.block_diffusion(5, 2),
    "a cache": lambda m, array: m.cache(3, array([4, 5]), block_start=8, block_stop=np.int64(2**40)),
    "a window": lambda m, array: m.sliding_window(4, array(2), 2**31 - 1, key_length=6, offset=1),
    "an intersection": lambda m, array: m.block_diffusion(4, 2) & m.padding(array([3, 8]), 8),
}


@pytest.mark.parametrize("case", CASES)
def test_they_are_those_of_jax(case):
    mask, expected = CASES[case](ours, torch.tensor), CASES[case](masks, jnp.array)
    assert type(mask) is masks.KeyIntervals
    for name in ("start", "stop", "start2", "stop2"):
        mine, other = getattr(mask, name), getattr(expected, name)
        if other is None:
            assert mine is None
            continue
        assert mine.dtype == torch.int32 and mine.shape == other.shape
        np.testing.assert_array_equal(mine, other)
        mine.zero_()[0, 0] = 1  # memory of its own, at each place
        assert mine.sum() == 1
    np.testing.assert_array_equal(CASES[case](ours, torch.tensor).as_boolean(9), expected.as_boolean(9))


def test_they_are_where_the_first_tensor_is_or_where_they_are_asked_for():
    assert ours.block_causal(4, 2, device="meta").stop.is_meta
    with torch.device("meta"):
        assert ours.block_causal(4, 2).stop.is_meta
        assert ours.padding(torch.tensor([3], device="cpu"), 4).stop.device.type == "cpu"
        assert ours.cache(4, stop=torch.tensor(3, device="cpu")).stop.device.type == "cpu"


@pytest.mark.parametrize("name", [name for name in ours.__all__ if name != "KeyIntervals"])
def test_they_take_and_tell_the_same(name):
    mine, other = getattr(ours, name), getattr(masks, name)
    assert mine.__doc__ == other.__doc__ and pickle.loads(pickle.dumps(mine)) is mine
    *parameters, device = inspect.signature(mine).parameters.values()
    assert parameters == [*inspect.signature(other).parameters.values()] and device.name == "device"


def test_none_is_left_out():
    own = {name for name, x in vars(masks).items() if inspect.isfunction(x) and x.__module__ == masks.__name__}
    assert {name for name in own if name[0] != "_"} - {"bounds", "in_order"} | {"KeyIntervals"} == set(ours.__all__)


def test_what_is_wrong_is_told_as_jax_tells_it():
    with pytest.raises(ValueError, match="block_size: expected at least 1, got 0"):
        ours.block_causal(4, 0)
    with pytest.raises(ValueError, match="lengths: expected an integer or an array of integers, got dtype float32"):
        ours.padding(torch.ones(2), 4)
    with pytest.raises(ValueError, match=r"segment_ids: expected shape \[B, L\], got \[2\]"):
        ours.packed(torch.tensor([1, 1]))
    both = ours.block_causal(4, 2), masks.block_causal(4, 2)
    for mine, other in (both, both[::-1]):
        with pytest.raises(ValueError, match="mask & mask: expected torch tensors on both sides or on neither, got"):
            mine & other
