"""Committed tokens are corrupted and come back; frozen ones stay wrong; a text that is right stays as it is."""

import jax.numpy as jnp
import numpy as np
import pytest

from dlm_kernels import cli
from dlm_kernels.denoiser import checkpoint, correct, data, train
from dlm_kernels.denoiser.config import DenoiserConfig


@pytest.fixture(scope="module")
def trained(tmp_path_factory, texts):
    """A model that knows its few texts by heart, and has seen errors in them; and rows of those texts."""
    config = DenoiserConfig(layers=2, d_model=32, heads=2, kv_heads=1, head_size=16, ffn=48, vocab=300)
    out = tmp_path_factory.mktemp("trained")
    settings = train.TrainConfig(
        rows=8, length=16, steps=600, learning_rate=1e-2, average=0.9, error_share=0.1, weight_decay=0.0
    )
    train.run(config, settings, out, seed_texts=texts)
    config, params, tokenizer = checkpoint.load(out, dtype=jnp.float32)
    (stream, _) = train.prepare(config, texts, tokenizer)[1]
    return config, params, stream[: 24 * 16].reshape(24, 16)


def test_corrupted_tokens_are_repaired(trained):
    """Two wrong tokens in each of 24 rows, which are padded on the left by 0 to 5."""
    config, params, rows = trained
    random = np.random.default_rng(0)
    wrong = rows.copy()
    for column in (6, 11):
        wrong[:, column] = random.permutation(rows.reshape(-1))[:24]
    start = np.arange(24) % 6
    padded = np.where(np.arange(16) < start[:, None], config.pad_id, wrong)
    intact = np.where(np.arange(16) < start[:, None], config.pad_id, rows)
    bad = padded != intact
    fixed = correct.correct(config, params, padded, threshold=0.6, start=start)
    repaired = (np.asarray(fixed.tokens) == intact)[bad].mean()
    assert bad.sum() > 30 and repaired > 0.75
    assert (np.asarray(fixed.tokens) == intact)[~bad].mean() > 0.95
    np.testing.assert_array_equal(fixed.changed, np.asarray(fixed.tokens) != padded)
    assert 2 <= fixed.passes <= 8
    frozen = correct.correct(config, params, padded, threshold=0.6, start=start, editable=np.arange(16) != 6 * np.ones((24, 1)))
    np.testing.assert_array_equal(np.asarray(frozen.tokens)[:, 6], padded[:, 6])
    for passes, threshold in ((0, 0.0), (5, 1.0)):
        same = correct.correct(config, params, padded, passes=passes, threshold=threshold, start=start)
        np.testing.assert_array_equal(same.tokens, padded)
        assert same.passes == min(passes, 1)


def test_columns_outside_are_nobodys_and_masks_stay(trained):
    config, params, rows = trained
    board = rows[:3].copy()
    board[:, 5] = config.mask_id
    within = dict(start=2, stop=13, threshold=0.3)
    fixed = np.asarray(correct.correct(config, params, board, **within).tokens)
    assert (fixed[:, 5] == config.mask_id).all()
    other = board.copy()
    other[:, :2] = other[:, 13:] = 9
    np.testing.assert_array_equal(np.asarray(correct.correct(config, params, other, **within).tokens)[:, 2:13], fixed[:, 2:13])


def test_what_is_never_written_and_what_is_outside_stays(trained):
    """By a model that is sure of nothing, which takes the first token that it may."""
    config, params, rows = trained
    unsure = params | {"final_norm": params["final_norm"] * 0}
    fixed = np.asarray(correct.correct(config, unsure, rows[:3], threshold=0.0, passes=1, start=2, stop=13).tokens)
    expected = rows[:3].copy()
    expected[:, 2:13] = 1 + max(config.mask_id, config.pad_id, config.eos_id)
    np.testing.assert_array_equal(fixed, expected)


def test_the_command_repairs_a_text(trained, texts, tmp_path, capsys):
    config, params, _ = trained
    tokenizer = data.train_tokenizer([text for _, text, held_out in texts if not held_out], 300)
    checkpoint.save(tmp_path, config, params, tokenizer)
    right = "class Stack:\\n    def push(self, x):"
    wrong = right.replace("Stack:", "Stack.").replace("self", "return")

    def command(text):
        assert cli.main(["correct", text, "--model", str(tmp_path), "--threshold", "0.6"]) == 0
        captured = capsys.readouterr()
        return captured.out.removesuffix("\n").replace("\n", "\\n"), captured.err

    text, said = command(wrong)
    assert text == right and "2 tokens replaced" in said and "'.' by ':'" in said
    assert command(wrong.replace(".", "<keep>.</keep>"))[0] == right.replace("Stack:", "Stack.")
    assert cli.main(["correct", "", "--model", str(tmp_path)]) == 2


def test_what_is_kept_is_read_as_if_it_were_not(trained, texts, monkeypatch):
    """Whose marks cut tokens in two, which stay whole and are frozen; so is every token of a character of several bytes."""
    config, params, _ = trained
    tokenizer = data.train_tokenizer([text for _, text, held_out in texts if not held_out], 300)
    given = {}

    def unchanged(config, params, tokens, *, editable):
        given.update(tokens=tokens[0], editable=editable[0])
        return correct.Corrected(jnp.asarray(tokens), editable & False, 0)

    monkeypatch.setattr(correct, "correct", unchanged)
    plain = "def push(self, x): é"
    marked = plain.replace("push(self", "pu<keep>sh(se</keep>lf").replace("é", "<keep>é</keep>")
    assert correct.correct_text((config, params, tokenizer), marked) == (plain, [], 0)
    encoded = tokenizer.encode(plain)
    np.testing.assert_array_equal(given["tokens"], encoded.ids)
    frozen = [begin < 11 and 6 < end or plain[begin:end] == "é" for begin, end in encoded.offsets]
    np.testing.assert_array_equal(~given["editable"], frozen)
    assert any(begin < 6 < end or begin < 11 < end for begin, end in encoded.offsets)


def test_bad_arguments(trained):
    config, params, rows = trained
    with pytest.raises(ValueError, match=r"tokens: expected shape \[B, L\]"):
        correct.correct(config, params, rows[0])
    with pytest.raises(ValueError, match=r"editable: expected tokens' shape \[24, 16\], got \[16\]"):
        correct.correct(config, params, rows, editable=np.ones(16, bool))
