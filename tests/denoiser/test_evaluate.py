"""What `evaluate` and `compare` measure, and what they refuse to."""

import dataclasses
import functools
import json
import xml.etree.ElementTree

import jax
import numpy as np
import pytest

from dlm_kernels import commands, masks
from dlm_kernels.denoiser import (
    checkpoint,
    compare,
    data,
    evaluate,
    generate,
    losses,
    model,
    plot,
    sampler,
    train,
)

TEXT = "def mul(a, b):\n    return a * b\n\n"


@pytest.fixture(scope="module")
def loaded(saved):
    return checkpoint.load(saved, dtype=np.float32)


def test_students_have_the_tokenizer_of_their_judge(loaded):
    config, params, _ = loaded
    other = (config, params, data.train_tokenizer(["def f():"], 300))
    with pytest.raises(ValueError, match="models: expected other to have the tokenizer of teacher, who judges, got another"):
        compare.judged({"teacher": loaded, "other": other}, [], length=4)


def test_a_drafter_of_another_shape_is_refused_before_the_first_row(loaded):
    config, params, tokenizer = loaded
    other = (dataclasses.replace(config, layers=1), params, tokenizer)
    decoders = {"one": dict(block=1, steps=1), "drafts": dict(block=4, steps=2, drafts=1, drafter="other")}
    rows = []
    with pytest.raises(ValueError, match="models: expected other to have the shape of teacher, for whom it drafts, got another"):
        compare.decoding({"teacher": loaded, "other": other}, [TEXT], decoders=decoders, report=rows.append)
    assert not rows


def test_students_of_the_shipped_model_are_compared_with_none_but_it(loaded):
    shipped = checkpoint.load(dtype=np.float32)
    assert commands.students(shipped, None).keys() == {*compare.STUDENTS}
    assert commands.students(loaded, None) == commands.students(loaded, []) == {}
    with pytest.raises(ValueError, match="--students: expected another name than teacher"):
        commands.students(loaded, ["teacher"])
    ways = [compare._named(way) for way in compare.DECODERS.values()]
    assert sum(not names for names in ways) == len(ways) - 3


def test_an_empty_text_does_not_parse():
    assert evaluate.parse_share(["", "\n", "x = 1", "# x"]) == evaluate.parse_share(["", "", "x = 1", "x"], unfinished=True) == 0.5


def test_texts_that_are_too_short_are_refused_first(loaded, monkeypatch):
    monkeypatch.setattr(losses, "loss", None)  # nothing is computed before
    with pytest.raises(ValueError, match=r"texts: expected at least 8192 tokens, got \d+"):
        evaluate.report(loaded, [TEXT])
    with pytest.raises(ValueError, match=r"texts: expected at least 129 tokens, got \d+"):
        evaluate.infilling(loaded, [TEXT])
    with pytest.raises(ValueError, match="texts: expected more than 5 tokens, got 5"):
        evaluate.rows_of(np.arange(5), 1, 5, np.random.default_rng(0))
    with pytest.raises(ValueError, match="texts: expected a top-level function among them, got none"):
        evaluate.held_out_headers(["x = 1\n"], 5)


def test_a_model_that_attends_by_blocks_is_refused_first(loaded, texts, tmp_path):
    """A token sees the masks behind it in its block: no one pass says what it has learnt of blocks of another size."""
    config, params, tokenizer = by_blocks = dataclasses.replace(loaded[0], block_size=4), *loaded[1:]
    expected = "config: expected a model that attends to all, .* got one that attends by its own, of 4"
    for measure in (evaluate.report, lambda model, texts: compare.decoding({"a": model}, texts)):
        with pytest.raises(ValueError, match=expected):
            measure(by_blocks, [TEXT * 300])
    with pytest.raises(ValueError, match=expected):
        compare.by_steps({"a": by_blocks}, [TEXT])
    with pytest.raises(ValueError, match=expected):
        losses.block_states(config, params, np.zeros((1, 8), np.int32), np.zeros((1, 8), np.int32), 4)
    settings = train.TrainConfig(steps=1, rows=2, length=16, block_share=1e-9)
    with pytest.raises(ValueError, match=expected):
        train.run(config, settings, tmp_path / "out", seed_texts=texts)


def test_a_plot_of_many_models_with_any_name():
    names = ["teacher", *map(str, range(8)), "runs/R&D<1>"]
    row = dict(parse_share=0.1, teacher_bits_per_token=1.0, hole_of_4={"token_accuracy": 0.2})
    rows = [row | dict(model=name, steps=steps, passes=steps) for name in names for steps in (8, 2)]
    picture = xml.etree.ElementTree.fromstring(plot.steps_svg(rows))
    shapes = [element.tag.split("}")[1] for element in picture]
    assert shapes.count("polyline") == 30 and "runs/R&D<1>" in [element.text for element in picture]
    entries = [e for e in picture if e.tag.endswith("text")][-11:]
    assert len({(e.get("x"), e.get("y")) for e in entries}) == 11
    assert max(float(e.get("y")) for e in entries) < float(picture.get("height"))


def test_evaluate_measures_what_it_says(saved):
    """A model that knows nothing has log2(vocabulary) bits per token, and fills next to nothing right."""
    config, params, tokenizer = checkpoint.load(saved, dtype=np.float32)
    uniform = params | {"final_norm": params["final_norm"] * 0}
    text = "def mul(a, b):\n    return a * b\n" * 30
    tokens = len(tokenizer.encode(text).ids) + 1
    for block_size in (None, 1):
        bits = evaluate.bits_per_byte(
            (config, uniform, tokenizer), [text], block_size=block_size, rows=2, length=32, draws=1
        )
        # The ratio that divides a row's losses is that of its masks, so without knowledge every draw is the mean.
        assert bits == pytest.approx(np.log2(config.vocab) * tokens / len(text), rel=1e-4)
    scores = evaluate.infilling((config, uniform, tokenizer), [text], cases=4, hole=4, length=32, steps=2)
    assert scores["token_accuracy"] < 0.5 and scores["exact_match"] == 0


def test_each_row_is_masked_by_draws_of_its_own(saved, monkeypatch):
    """Two batches of two draws each: four keys."""
    loaded, text = checkpoint.load(saved, dtype=np.float32), "x = 1\n" * 60
    monkeypatch.setattr(losses, "loss", lambda config, params, tokens, key, **_: jax.random.uniform(key))
    stream = data.stream(loaded[2], [text], loaded[0].eos_id)
    length = len(stream) // 4
    bits = evaluate.bits_per_byte(loaded, [text], rows=2, length=length, draws=2)
    nats = np.mean([jax.random.uniform(jax.random.fold_in(jax.random.key(1), i)) for i in range(4)])
    assert bits == pytest.approx(nats * len(stream) / np.log(2) / len(text), rel=1e-5)


def test_holes_are_filled_in_as_many_passes_as_asked_for(saved, monkeypatch):
    """Wherever in its row a hole is, it is one block."""
    passes, decode = [], sampler.decode
    monkeypatch.setattr(sampler, "decode", lambda *x, **options: passes.append(decode(*x, **options)) or passes[-1])
    loaded = checkpoint.load(saved, dtype=np.float32)
    evaluate.infilling(loaded, ["x = 1\n" * 60], cases=3, hole=4, length=18, steps=2)
    assert passes[0].passes == 2


def test_evaluate_reports_each_measure(command, monkeypatch, texts):
    text = texts[2][1] * 400  # as many tokens as correction takes
    monkeypatch.setattr(data, "files", lambda: [*texts[:2], ("held", text, True)])
    monkeypatch.setattr(evaluate, "bits_per_byte", lambda *_, block_size=None, **__: block_size)
    monkeypatch.setattr(evaluate, "correction", lambda *_, threshold, **__: threshold)
    monkeypatch.setattr(evaluate, "infilling", lambda *_, hole, steps, **__: [hole, steps])
    status, out, err = command("evaluate", "--steps", "2")
    blocks = {f"bits_per_byte_in_blocks_of_{size}": size for size in (4, 16, 64)}
    expected = {"held_out_bytes": len(text), "bits_per_byte": None, "autoregressive_bits_per_byte": 1} | blocks
    expected |= {"correction_at_0.7": 0.7, "correction_at_0.9": 0.9}
    expected |= {"hole_of_1": [1, 1], "hole_of_4": [4, 2], "hole_of_8": [8, 2]}
    assert status == 0 and json.loads(out) == expected
    assert err == "".join(f"{name}: {json.dumps(number)}\n" for name, number in expected.items())


def test_evaluate_measures_on_ones_own_texts(command, monkeypatch, tmp_path, texts):
    """On each of them, unless --files says how many."""
    measured = []
    monkeypatch.setattr(data, "files", None)
    monkeypatch.setattr(evaluate, "report", lambda model, texts, **_: measured.append(texts))
    for name, text, _ in texts:
        (tmp_path / name).write_text(text)
    for more in ([], ["--files", "2"]):
        assert command("evaluate", "--held-out", str(tmp_path), *more)[0] == 0
    assert measured == [[text for _, text, _ in texts], [text for _, text, _ in texts[:2]]]


def test_correction_counts_what_is_changed(saved):
    """A model that is sure of nothing changes nothing, or with no threshold everything, to its first token but three."""
    config, params, tokenizer = checkpoint.load(saved, dtype=np.float32)
    uniform = (config, params | {"final_norm": params["final_norm"] * 0}, tokenizer)
    texts = ["def mul(a, b):\n    return a * b\n" * 30]
    options = dict(share=0.2, rows=6, length=20)
    assert evaluate.correction(uniform, texts, **options) == {"repaired": 0.0, "noticed": 0.0, "damaged": 0.0}
    everything = evaluate.correction(uniform, texts, threshold=0.0, passes=1, **options)
    assert everything["noticed"] == everything["damaged"] == 1.0 and everything["repaired"] == 0.0
    with pytest.raises(ValueError, match="share: expected enough of 120 tokens"):
        evaluate.correction(uniform, texts, **(options | {"share": 0.0}))


def test_texts_are_judged_alike_one_by_one_and_together(saved):
    """However long their prompts are."""
    model = checkpoint.load(saved, dtype=np.float32)
    headers, options = ["def mul(a, b):", "def add(a, b):\n    return" * 5], dict(length=4, exact=True, block=4, steps=2)
    singly = [generate.generate(model, [header], **options) for header in headers]
    assert len({made.decoded.tokens.shape for made in singly}) == 2
    _, together = compare.written({"teacher": model}, "teacher", dict(block=4, steps=2), headers, length=4)
    assert compare.judged({"teacher": model}, singly, length=4) == pytest.approx(together, rel=1e-5)


def test_decoders_side_by_side(saved):
    model = checkpoint.load(saved, dtype=np.float32)
    decoders = {
        "one": dict(block=1, steps=1, attend="blocks", cache=True),
        "block": dict(block=4, steps=2),
        "drafts": dict(block=4, steps=2, drafts=1, drafter="other"),
        "other": dict(block=4, steps=2, model="other"),
    }
    found = []
    options = dict(prompts=2, length=4, decoders=decoders, report=found.append)
    text = "def mul(a, b):\n    return a * b\n\n" * 9
    table = compare.decoding({"teacher": model, "other": model}, [text], **options)
    assert found == table
    one, block, drafts, other = table
    assert one["passes"] == 4 and one["tokens_per_pass"] == 1 and one["times_first"] == 1
    assert block["passes"] == 2 and block["tokens_per_pass"] == 2
    assert block["times_first"] == block["tokens_per_second"] / one["tokens_per_second"]
    assert 1 <= drafts["passes"] <= 2
    for name in ("parse_share", "beginning_share", "teacher_bits_per_token", "distinct_share"):
        assert drafts[name] == block[name] == other[name]
    lines = [compare.DECODING_HEAD.splitlines()[0], *map(compare.line, table)]
    assert len({line.count("|") for line in lines}) == 1 and lines[1].startswith("| one | 4.0 | 1.0 |")


@pytest.mark.parametrize("markdown", [False, True])
def test_evaluate_prints_rows_as_they_come(markdown, command, saved, monkeypatch, tmp_path):
    """In Markdown the rows are the output, without they are progress, and JSON the output."""
    few = {name: compare.DECODERS[name] for name in ("one token at a time", "student-8, 8 passes")}
    monkeypatch.setattr(compare, "decoding", functools.partial(compare.decoding, decoders=few, length=8))
    monkeypatch.setattr(checkpoint, "find", lambda name: saved)
    status, out, err = command("evaluate", "--decoding", "--prompts", "2", *["--markdown"] * markdown)
    rows = out if markdown else err
    assert status == 0 and rows.startswith(compare.DECODING_HEAD + "\n| one token at a time | 8.0 | 1.0 | ")
    assert len(rows.splitlines()) == 4
    if not markdown:
        assert [row["decoder"] for row in json.loads(out)] == list(few)


def test_a_model_and_its_student_by_steps(saved):
    """The same model twice gives the same rows; a student's bits are its own, the judge of what it writes is the teacher."""
    config, params, tokenizer = checkpoint.load(saved, dtype=np.float32)
    other = (config, params | {"final_norm": params["final_norm"] * 0.5}, tokenizer)
    text = "def mul(a, b):\n    return a * b\n\n" * 300
    models = {"teacher": (config, params, tokenizer), "same": (config, params, tokenizer), "other": other}
    found = []
    rows = compare.by_steps(models, [text], steps=(4, 2), prompts=3, cases=8, length=8, report=found.append)
    assert found == rows
    singly = [("teacher", 8), ("teacher", 4)]
    assert [(row["model"], row["passes"]) for row in rows] == singly + [(m, n) for m in models for n in (4, 2)]
    for a, b in zip(rows[2:4], rows[4:6]):
        assert a == b | {"model": "teacher"}
    assert rows[2]["bits_per_byte"] != rows[6]["bits_per_byte"] and "bits_per_byte" not in rows[0]
    lines = [compare.STEPS_HEAD.splitlines()[0], *map(compare.line, rows)]
    assert len({line.count("|") for line in lines}) == 1 and lines[1].startswith("| teacher, left to right | 8 |")
    assert f"| {rows[2]['bits_per_byte']:.3f} |" in lines[3]
    picture = xml.etree.ElementTree.fromstring(plot.steps_svg(rows))
    shapes = [element.tag.split("}")[1] for element in picture]
    # Three panels: a line a model, a dot a measurement, and one in the legend; left to right has no holes to fill.
    assert (shapes.count("polyline"), shapes.count("circle"), shapes.count("rect")) == (9, 3 * 6 + 3, 4)
    heights = [float(dot.get("cy")) for dot in picture if dot.tag.endswith("circle")][:6]
    accuracy = [row["hole_of_4"]["token_accuracy"] for row in rows[2:]]
    assert np.corrcoef(heights, accuracy)[0, 1] < -0.999 if len(set(accuracy)) > 1 else len(set(heights)) == 1
    assert all(0 <= row["parse_share"] <= 1 and 1 / 8 <= row["distinct_share"] <= 1 for row in rows)


@pytest.mark.parametrize("shifted", [False, True])
def test_bits_from_left_to_right(shifted, saved):
    """Each of the last tokens given those before it and nothing after, whatever padding stands in front."""
    config, params, tokenizer = checkpoint.load(saved, dtype=np.float32)
    config = dataclasses.replace(config, shifted=shifted)
    row = np.array([9, 14, 31, 17, 22, 60], np.int32)
    expected = []
    for i in range(3, 6):
        seen = np.where(np.arange(6) < i, row, config.mask_id)
        hidden = model.hidden_states(config, params, seen[None], mask=masks.block_causal(6, 1))
        logits = np.asarray(hidden @ model.head_weight(config, params).T, np.float64)[0, i]
        expected.append(np.log2(np.exp(logits).sum()) - logits[row[i]] / np.log(2))
    padded = np.stack([np.concatenate([np.full(4, config.pad_id), row]), np.concatenate([row[:4], row])]).astype(np.int32)
    bits = evaluate.left_to_right_bits((config, params, tokenizer), padded[:1], 3)
    assert bits == pytest.approx(np.mean(expected), rel=1e-5)
    assert evaluate.left_to_right_bits((config, params, tokenizer), padded, 3) != pytest.approx(bits, rel=1e-3)


def test_parse_share_and_headers():
    assert evaluate.parse_share(["x = 1", "def f(:", "a\0b", "def f():\n    pass"]) == 0.5
    cut = 'def f():\n    """A text', "def f():\n    x = g(1,", "if x:", "x = )", "def f(:\n    pass", "def f():\n    x = 1\n  y"
    assert evaluate.parse_share(cut) == 0 and evaluate.parse_share(cut, unfinished=True) == 0.5
    texts = ["def f(a):\n    pass\n\n\ndef g(b):\n    pass\n"] * 2
    assert evaluate.held_out_headers(texts, 3) == ["def f(a):", "def g(b):", "def f(a):"]
    assert evaluate.held_out_headers(["import os\n\ndef f(a):\n    pass\n\nclass A:\n    pass\n"], 5) == ["def f(a):"]
