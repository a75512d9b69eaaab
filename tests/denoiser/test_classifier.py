"""The classifier tells texts apart; its guidance is the derivative it claims to be, and moves what is written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_kernels import cli, masks
from dlm_kernels.denoiser import checkpoint, classifier, generate, model, sampler

WANTED = ["def add(a, b):\n    return a + b\n" * 30]
UNWANTED = ["class Stack:\n    def push(self, x):\n        self.items.append(x)\n" * 20]


def padded(start, length):
    """Positions and mask of rows that are padded on the left."""
    start = np.repeat(np.asarray(start, np.int32)[:, None], length, 1)
    column = np.arange(length, dtype=np.int32)[None]
    return dict(positions=column - start, mask=masks.KeyIntervals(jnp.asarray(start), jnp.full(start.shape, length)))


PROMPTS = ["def", "class Stack", "x", "return", "self.", "a + b"]


@pytest.fixture(scope="module")
def loaded(saved):
    return checkpoint.load(saved, dtype=jnp.float32)


@pytest.fixture(scope="module")
def fitted(loaded):
    return classifier.fit(loaded, WANTED, UNWANTED, length=16, strength=1e-3)


def test_it_tells_the_texts_apart(loaded, fitted):
    config, params, tokenizer = loaded
    found, right = fitted
    assert right > 0.8
    for text, sign in ((WANTED[0], 1), (UNWANTED[0], -1)):
        tokens = np.array(tokenizer.encode(text).ids[5:53]).reshape(3, 16)
        hidden = model.hidden_states(config, params, tokens)
        p = np.exp(classifier.log_p(found, hidden, np.ones(tokens.shape, bool)))
        assert (sign * (p - 0.5) > 0).all()


def test_the_direction_is_the_derivative_by_the_embedding(config, params, random):
    """Against finite differences, of rows with padding, which neither is read nor moves."""
    tokens = random.integers(3, config.vocab, (2, 7)).astype(np.int32)
    where, seen = padded([0, 2], 7), np.arange(7) >= np.array([[0], [2]])
    made = classifier.Classifier(jnp.asarray(random.normal(size=config.d_model), jnp.float32), jnp.float32(0.3))
    ours = np.asarray(classifier.direction(config, params, made, tokens, seen, **where))

    @jax.jit
    def log_p(embedded):
        return classifier.log_p(made, model.hidden_states(config, params, tokens, embedded=embedded, **where), seen).sum()

    embedded = params["embed"][tokens]
    for row, place in ((0, 3), (1, 5)):
        step = np.zeros(embedded.shape, np.float32)
        step[row, place] = random.normal(size=config.d_model)
        difference = (log_p(embedded + 3e-4 * step) - log_p(embedded - 3e-4 * step)) / 6e-4
        np.testing.assert_allclose((ours * step).sum(), difference, rtol=0.03, atol=0.02)
    assert not ours[1, :2].any() and ours[1, 2:].any()


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_guidance_makes_what_is_written_more_wanted(guidance, loaded, fitted):
    config, params, tokenizer = loaded
    found, _ = fitted

    def written(scale):
        options = dict(classifier=found, classifier_scale=scale, guidance=guidance, length=12, block=6, steps=3, exact=True)
        made = generate.generate(loaded, PROMPTS, **options)
        tokens = made.decoded.tokens
        seen = tokens != config.pad_id
        hidden = model.hidden_states(config, params, tokens, **padded(seen.argmax(1), tokens.shape[1]))
        return made.texts, np.asarray(classifier.log_p(found, hidden, seen))

    texts, plain = written(0.0)
    assert texts == generate.generate(
        loaded, PROMPTS, guidance=guidance, length=12, block=6, steps=3, exact=True
    ).texts
    # To first order only, and from a model that says little: more wanted on the whole, not in every row.
    assert written(10.0)[1].mean() > plain.mean() + 0.1 and written(-10.0)[1].mean() < plain.mean() - 0.1


def test_rows_are_computed_some_at_a_time(loaded, monkeypatch):
    """Of 16 tokens and 5 rows at most, as if all at once; and none before both lists are known to have some."""
    taken, states = [], classifier._mean_states

    def watched(config, implementation, params, tokens):
        taken.append(len(tokens))
        return states(config, implementation, params, tokens)

    monkeypatch.setattr(classifier, "_mean_states", watched)
    given = (16, 2, 0, None)
    whole = classifier._features(loaded, WANTED, UNWANTED, *given)
    assert min(taken) > 15
    monkeypatch.setattr(classifier, "TOKENS", 5 * 16 + 9)
    for ours, expected in zip(classifier._features(loaded, WANTED, UNWANTED, *given), whole):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    assert max(taken[4:]) == 5
    taken.clear()
    with pytest.raises(ValueError, match="^wanted: expected at least 16 tokens, got 0"):
        classifier.fit(loaded, [], UNWANTED, length=16)
    assert not taken


def test_the_command_fits_saves_and_uses_it(saved, tmp_path, capsys):
    (tmp_path / "good.py").write_text(WANTED[0])
    (tmp_path / "bad.py").write_text(UNWANTED[0])
    out = tmp_path / "classifier.safetensors"
    files = ("--wanted", str(tmp_path / "good.py"), "--unwanted", str(tmp_path / "bad.py"))
    assert cli.main(["classify", str(out), "--model", str(saved), "--length", "16", *files]) == 0
    assert "% of the rows that it was fitted to right" in capsys.readouterr().out
    texts = []
    for scale in ("0", "40"):
        guided = ("--classifier", str(out), "--classifier-scale", scale, "--temperature", "0")
        assert cli.main(["generate", "class", "--model", str(saved), "--block", "8", "--exact", *guided]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1]
    assert cli.main(["classify", str(out), "--model", str(saved), "--length", "9999", *files]) == 2
    assert "unwanted: expected at least 9999 tokens" in capsys.readouterr().err


def test_bad_arguments(config, params, fitted, tmp_path):
    given = dict(block=4, steps=2)
    tokens = np.full((1, 8), config.mask_id, np.int32)
    with pytest.raises(ValueError, match="classifier, classifier_scale: expected both or neither"):
        sampler.decode(config, params, tokens, classifier_scale=1.0, **given)
    untied = config.__class__(**(config.to_dict() | {"tie_embeddings": False}))
    with pytest.raises(ValueError, match="classifier: expected a model whose head is its embedding"):
        sampler.decode(untied, params, tokens, classifier=fitted[0], classifier_scale=1.0, **given)
    for weight, bias in ((jnp.ones(5), jnp.zeros(1)), (jnp.ones(24), jnp.zeros(0)), (jnp.ones(24), jnp.zeros(2))):
        classifier.save(tmp_path / "c", classifier.Classifier(weight, bias))
        with pytest.raises(ValueError, match=r"expected a bias and a weight of shape \[24\]"):
            classifier.load(tmp_path / "c", config)
