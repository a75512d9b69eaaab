"""The table of mechanisms, as its command gives it, for a tiny random model."""

import dataclasses
import functools
import json

import numpy as np
import pytest

from dlm_kernels import cli
from dlm_kernels.denoiser import checkpoint, data, evaluate, generate, mechanisms

FUNCTIONS = "def mul(a, b):\n    return a * b\n\n\ndef push(self, x):\n    self.append(x)\n\n\ndef add(a):\n    return a + 1\n\n\n"
CLASSES = "class Stack:\n    def push(self, x):\n        self.items.append(x)\n"
FILES = [
    (f"{package}/{name}.py", text * count, held_out)
    for package, text in (("asyncio", FUNCTIONS), ("tkinter", CLASSES))
    for name, count, held_out in (("a", 5, False), ("b", 5, True))
] + [("c.py", FUNCTIONS * 200, True)]
LENGTH = 8


def test_the_table(saved, monkeypatch, capsys):
    """Each row says of the mechanism that it names what is counted here once more; of renoise, which knows nothing, it is known."""
    config, params, tokenizer = checkpoint.load(saved, dtype=np.float32)
    # Less sharp, and with an end-of-text that a bias can bring about.
    params |= {"final_norm": params["final_norm"] * 0.7, "embed": params["embed"].at[config.eos_id].multiply(-1)}
    teacher, other = (config, params, tokenizer), dataclasses.replace(config, self_conditioning=True)
    soft = {f"soft.{name}": params[f"layers.0.{name}"] for name in ("ffn_norm", "gate", "up", "down")}
    nothing = params | soft | {"final_norm": params["final_norm"] * 0}
    loaded = {"renoise": (other, nothing, tokenizer)}
    monkeypatch.setattr(checkpoint, "load", lambda name, **_: loaded.get(str(name), teacher))
    monkeypatch.setattr(checkpoint, "find", lambda name=None: str(name or checkpoint.SHIPPED))
    monkeypatch.setattr(data, "files", lambda: FILES)
    monkeypatch.setattr(mechanisms, "control", functools.partial(mechanisms.control, length=LENGTH))
    assert cli.main(["evaluate", "--control", "--prompts", "6"]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert err.splitlines() == [*mechanisms.HEAD.splitlines(), *map(mechanisms.line, rows)]
    table = {(row["mechanism"], row["measured"].partition(",")[0]): (row["without"], row["with"]) for row in rows}
    assert len(table) == len(rows)

    texts = [text for _, text, held_out in FILES if held_out]
    headers = evaluate.held_out_headers(texts, 6)

    def tokens(**way):
        return generate.generate(teacher, headers, length=LENGTH, block=LENGTH, **way).decoded.tokens

    def share(text, **way):
        return np.mean([text in tokenizer.decode(row) for row in tokens(exact=True, **way)[:, -LENGTH:].tolist()])

    lengths = [(tokens(eos_bias=bias)[:, -LENGTH:] != config.pad_id).sum(1).mean() for bias in (0.0, 2.0, 4.0)]
    assert lengths[0] > lengths[1] > lengths[2]
    for bias, shorter in ((2, lengths[1]), (4, lengths[2])):
        assert table[f"`--eos-bias {bias}`", "mean length in tokens"] == (lengths[0], shorter)
    plain, measured = share("self"), "share of texts with `self`"
    assert 0 < plain < 1
    assert table["`--style CLASS`, whose methods use `self`", measured] == (plain, share("self", style=mechanisms.CLASS))
    for scale in (2, 4):
        away = share("self", negative_prompt="self", guidance=float(scale))
        assert table[f"`--negative-prompt self --guidance {scale}`", measured] == (plain, away)
    marks, halves = "<mask:4@4><mask:4@1>", {"first": slice(-8, -4), "second": slice(-4, None)}
    made = generate.generate(teacher, [header + marks for header in headers], block=LENGTH, negative_prompt="self")
    for which, part in halves.items():
        both = [
            np.mean(["self" in tokenizer.decode(row) for row in rows[:, part].tolist()])
            for rows in (tokens(exact=True), made.decoded.tokens)
        ]
        mechanism = f"`--negative-prompt self --infill HEADER{marks}`"
        assert table[mechanism, f"share with `self` in the {which} half"] == tuple(both)
    assert table["`--ban self`", measured] == (plain, 0)
    assert table['`--require "return None"`', "share of texts with `return None`"] == (0, 1)

    bits = evaluate.left_to_right_bits(teacher, tokens(exact=True), LENGTH)
    assert 0.5 < table["`classify`, asyncio against tkinter", "share of held-out rows right"][1] <= 1
    for scale in (10, 20):
        mechanism = f"`--classifier FILE --classifier-scale {scale}`"
        before, after = table[mechanism, "mean probability of wanted"]
        assert 0 < before < after < 1
        assert table[mechanism, "bits/token"][0] == pytest.approx(bits, rel=1e-5)
    for threshold in (0.5, 0.7, 0.9):
        expected, mechanism = evaluate.correction(teacher, texts, threshold=threshold), f"`correct --threshold {threshold}`"
        assert table[mechanism, "share of wrong tokens repaired"] == (None, expected["repaired"])
        assert table[mechanism, "share of right tokens changed"] == (None, expected["damaged"])
    before, after = table["`--model renoise`", "nats/token where 0-100% are random"]
    assert after == pytest.approx(np.log(config.vocab), rel=1e-4) and before != pytest.approx(after, rel=1e-2)
    mechanism = "`--model renoise --noise-budget 0.1`"
    assert table[mechanism, "passes"] == (LENGTH // 4, 48)
    assert table[mechanism, "bits/token"][0] == pytest.approx(bits, rel=1e-5) and table[mechanism, "bits/token"][1] > bits


def test_what_cannot_be_measured_is_refused_before_the_first_row(saved, monkeypatch):
    loaded = checkpoint.load(saved, dtype=np.float32)
    monkeypatch.setattr(generate, "generate", None)
    with pytest.raises(ValueError, match="models: expected a renoise of the teacher's shape"):
        mechanisms.control({"teacher": loaded, "renoise": loaded}, [FUNCTIONS])
    other = dataclasses.replace(loaded[0], self_conditioning=True), *loaded[1:]
    with pytest.raises(ValueError, match="texts: expected at least 8192 tokens, got"):
        mechanisms.control({"teacher": loaded, "renoise": other}, [FUNCTIONS])
