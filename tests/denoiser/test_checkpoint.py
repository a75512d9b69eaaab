"""Checkpoints come back as they were, are refused where they do not fit, and are written whole or not at all."""

import json
import os
import re

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models

from dlm_kernels.denoiser import checkpoint
from dlm_kernels.denoiser.config import DenoiserConfig


def test_a_checkpoint_comes_back_as_it_was(tmp_path, saved):
    config, params, tokenizer = checkpoint.load(saved, dtype=jnp.float32)
    checkpoint.save(tmp_path, config, params, tokenizer, dtype=jnp.float32)
    loaded_config, loaded, loaded_tokenizer = checkpoint.load(tmp_path)
    assert loaded_config == config and loaded_tokenizer.to_str() == tokenizer.to_str()
    assert loaded.keys() == params.keys()
    for name in params:
        np.testing.assert_array_equal(loaded[name], params[name])


def test_a_checkpoint_that_does_not_fit_is_refused(config, tmp_path, saved):
    its, params, tokenizer = checkpoint.load(saved)
    checkpoint.save(tmp_path, its, {n: x for n, x in params.items() if n != "layers.0.up"}, tokenizer)
    with pytest.raises(ValueError, match="layers.0.up"):
        checkpoint.load(tmp_path)
    checkpoint.save(tmp_path, its, params | {"final_norm": jnp.ones(7)}, tokenizer)
    with pytest.raises(ValueError, match=r"final_norm: expected shape \(24,\), got \(7,\)"):
        checkpoint.load(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint"):
        checkpoint.load(tmp_path / "nowhere")
    checkpoint.save_state(tmp_path / "state", {"a": jnp.ones(3)}, {"step": 1})
    with pytest.raises(ValueError, match="a.*expected shape"):
        checkpoint.load_state(tmp_path / "state", {"a": jnp.ones(4)})
    checkpoint.save(tmp_path, config, params, tokenizer)
    with pytest.raises(ValueError, match="expected a tokenizer of at most 53 ids, got 300"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        ([], "expected a JSON object, got []"),
        ("a", "expected a JSON object, got 'a'"),
        ({"pad_id": "x"}, "pad_id: expected an int of at least 0, got 'x'"),
        ({"mask_id": 1}, "mask_id: expected another id than pad_id and eos_id, got 1"),
        ({"rope_theta": "x"}, "rope_theta: expected at least 1, got x"),
        ({"rope_theta": float("nan")}, "rope_theta: expected at least 1, got nan"),
        ({"qk_norm": "no"}, "qk_norm: expected true or false, got 'no'"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(content, message, tmp_path):
    if isinstance(content, dict):
        content = DenoiserConfig().to_dict() | content
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer.json").write_text(Tokenizer(models.BPE()).to_str())
    with pytest.raises(ValueError, match=re.escape(f"config.json: {message}")):
        checkpoint.load(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    checkpoint.write_atomic(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
