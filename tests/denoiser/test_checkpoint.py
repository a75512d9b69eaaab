"""Checkpoints come back as they were, are refused where they do not fit, and are written whole or not at all."""

import json
import os
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models

from dlm_kernels.denoiser import checkpoint, generate
from dlm_kernels.denoiser.config import DenoiserConfig


def test_a_checkpoint_comes_back_as_it_was(tmp_path, saved):
    config, params, tokenizer = checkpoint.load(saved, dtype=jnp.float32)
    checkpoint.save(tmp_path, config, params, tokenizer, dtype=jnp.float32)
    loaded_config, loaded, loaded_tokenizer = checkpoint.load(tmp_path)
    assert loaded_config == config and loaded_tokenizer.to_str() == tokenizer.to_str()
    assert loaded.keys() == params.keys()
    for name in params:
        np.testing.assert_array_equal(loaded[name], params[name])


def test_models_that_come_with_the_package_are_known_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named, shipped = checkpoint.load("student-8"), checkpoint.load(checkpoint.SHIPPED / "student-8")
    assert named[0] == shipped[0] and (named[1]["embed"] == shipped[1]["embed"]).all()
    assert checkpoint.described("student-8")[0] == shipped[0] and not checkpoint.published("student-8")
    message = "^GSAI-ML/LLaDA: no checkpoint is there; expected a directory with config.json, for nothing is downloaded$"
    with pytest.raises(ValueError, match=message):
        checkpoint.load("GSAI-ML/LLaDA")
    with pytest.raises(ValueError, match="^student-8: no checkpoint is there"):  # a path is a path
        checkpoint.load(pathlib.Path("student-8"))


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


def test_ids_of_a_tokenizer_with_a_gap(tmp_path, saved):
    """None is beyond the embeddings, where an id would read another token's, and each is found by its text."""
    config, params, tokenizer = checkpoint.load(saved)
    told = json.loads(tokenizer.to_str())
    moved = max(told["model"]["vocab"], key=len)
    told["model"]["vocab"][moved] = config.vocab
    tokenizer = Tokenizer.from_str(json.dumps(told))
    assert tokenizer.get_vocab_size() == config.vocab == 300
    assert generate.tokens_with(tokenizer, tokenizer.decode([300])) == [300]
    checkpoint.save(tmp_path, config, params, tokenizer)
    with pytest.raises(ValueError, match="expected a tokenizer of at most 300 ids, got 301"):
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
        ({"rms_norm_eps": [1]}, "rms_norm_eps: expected a number, got [1]"),
        ({"threshold": None}, "threshold: expected a number, got None"),
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


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_one(there, tmp_path):
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    target.parent.mkdir()
    if there:
        target.write_bytes(b"old")
    link.symlink_to(target)
    checkpoint.write_atomic(link, b"new")
    assert link.is_symlink() and target.read_bytes() == b"new" and list(target.parent.iterdir()) == [target]


def test_a_pipe_is_written_into(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    checkpoint.write_atomic(tmp_path / "pipe", b"new")
    assert os.read(reader, 9) == b"new" and (tmp_path / "pipe").is_fifo()
    os.close(reader)


def test_partials_of_a_path_are_removed_and_nothing_else(tmp_path):
    others = ["file", "file.partial", "file.0123.partial", "other.01234567.partial", "file.01234567.partial.txt"]
    for name in ("file.01234567.partial", "file.89abcdef.partial", *others):
        (tmp_path / name).write_bytes(b"")
    checkpoint.remove_partials(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
