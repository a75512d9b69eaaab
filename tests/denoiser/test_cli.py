"""The command, from its arguments to what it prints, on a tiny random model."""

import dataclasses
import functools
import json
import re
import xml.etree.ElementTree

import jax
import numpy as np
import pytest
import rich.console

import dlm_kernels
from dlm_kernels import cli, masks
from dlm_kernels.denoiser import (
    checkpoint,
    compare,
    correct,
    data,
    evaluate,
    generate,
    html,
    model,
    plot,
    sampler,
    train,
    view,
)
from dlm_kernels.denoiser.text import words

SHIPPED = ("teacher", "student-8", "student-2")


def test_generate_json(command):
    status, out, _ = command("generate", "def add(", "--steps", "3", "--block", "6", "--length", "12", "--json")
    numbers = json.loads(out)
    assert status == 0
    assert numbers["text"].startswith("def add(")
    assert 1 <= numbers["tokens"] <= 12 and 1 <= numbers["passes"] <= 6
    assert numbers["tokens_per_pass"] == pytest.approx(numbers["tokens"] / numbers["passes"], abs=1e-3)
    assert numbers["seconds"] > 0 and numbers["tokens_per_second"] > 0
    assert numbers["implementation"].keys() == {"attention", "mix_guidance", "lm_head_scores", "unmask_topk"}


def test_infill_keeps_the_text_around(command, saved):
    status, out, _ = command(
        "generate", "--infill", r"def add(a, b):\n    <mask:5@2>\n    return c", "--steps", "5", "--json"
    )
    numbers = json.loads(out)
    assert status == 0 and numbers["tokens"] == 5 and numbers["passes"] == 5
    assert numbers["text"].startswith("def add(a, b):\n    ") and numbers["text"].endswith("\n    return c")


def test_drafts_give_the_same_text_in_no_more_passes(command, saved):
    options = ("generate", "def add(", "--block", "6", "--steps", "6", "--json", "--temperature", "0")
    plain, drafted = (json.loads(command(*options, *more)[1]) for more in ((), ("--drafts", "3")))
    assert drafted["text"] == plain["text"] and drafted["passes"] <= plain["passes"] == 6
    # The model as its own drafter is right about the next step, every time; only the first pass has no guess yet.
    student = json.loads(command(*options, "--drafts", "1", "--drafter", str(saved))[1])
    assert student["text"] == plain["text"] and student["passes"] == 4
    assert "drafter: expected drafts" in command(*options, "--drafter", str(saved))[2]
    status, _, err = command(*options, "--drafts", "3", "--cache")
    assert status == 2 and "drafts: goes with steps and greedy decoding alone" in err


def test_banned_text_does_not_come(command):
    options = ("generate", "def add(", "--block", "6", "--steps", "3", "--json", "--exact")
    free = json.loads(command(*options)[1])
    assert free["tokens"] == 6
    letter = next(c for c in free["text"].removeprefix("def add(") if c.isprintable())
    banned = json.loads(command(*options, "--ban", letter)[1])
    assert banned["tokens"] == 6 and letter not in banned["text"].removeprefix("def add(")


def test_html_replays_every_pass(command, tmp_path):
    """Playing the page's data back gives the text that was printed, in both columns every hole is written."""
    path = tmp_path / "out.html"
    options = ("--block", "6", "--steps", "3", "--exact", "--html", str(path), "--json")
    numbers = json.loads(command("generate", "x</script>", *options)[1])
    page = path.read_text()
    content = page.split('id="data">')[1].split("</script>")[0]
    assert "<" not in content  # nothing there can end the script element, whatever a token holds
    blocks, singly = json.loads(content)
    for run, passes in ((blocks, numbers["passes"]), (singly, 6)):
        words = list(run["given"])
        assert len(run["passes"]) == passes and words.count(None) == 6
        holes, written = {place for place, word in enumerate(words) if word is None}, set()
        for writes in run["passes"]:
            for place, word, sure in writes:
                words[place] = word
                if sure is not None:  # else a neighbour of what was written shows another word
                    written.add(place)
                    assert 0 < sure <= 1
        assert None not in words and written == holes
        if run is blocks:
            assert "".join(words) == numbers["text"]
    assert "http" not in page  # self-contained


def test_html_shows_what_is_masked_anew(saved):
    loaded, frames = checkpoint.load(saved, dtype=np.float32), []
    made = generate.generate(loaded, ["x"], length=12, block=12, steps=6, exact=True, remask=0.5, on_pass=frames.append)
    column = html.run(loaded, "blocks", made, frames)
    cells = list(column["given"])
    for writes, frame in zip(column["passes"], frames, strict=True):
        for place, word, _ in writes:
            cells[place] = word
        assert cells.count(None) == (np.asarray(frame.tokens) == loaded[0].mask_id).sum()
    assert any(word is None for writes in column["passes"] for _, word, _ in writes)


def test_html_steers_both_columns(command, tmp_path):
    """Here to write nothing but end-of-text."""
    path = tmp_path / "out.html"
    command("generate", "x", "--block", "6", "--steps", "1", "--temperature", "0", "--eos-bias", "1e4", "--html", str(path))
    runs = json.loads(path.read_text().split('id="data">')[1].split("</script>")[0])
    assert [run["tokens"] for run in runs] == [1, 1]


def test_the_same_seed_gives_the_same_text(command):
    options = ("--temperature", "1.0", "--block", "6", "--implementation", "xla", "--guidance", "1.5")
    texts = [command("generate", "def add(", *options, "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_errors_are_one_line(command):
    status, out, err = command("generate")
    assert (status, out) == (2, "") and err == "dlm-kernels: expected a prompt or --infill, one of them\n"
    for arguments, message in {
        ("--infill", "def"): "--infill: expected a hole such as <mask:20> in it, got 'def'",
        ("def", "--length", "-1"): "length: expected an int of at least 1, got -1",
        ("def", "--temperature", "-1"): "temperature: expected at least 0, got -1.0",
        ("def", "--classifier", "missing"): "missing",
    }.items():
        status, out, err = command("generate", *arguments)
        assert (status, out) == (2, "") and message in err and err.count("\n") == 1
    status, _, err = command("generate", "x", "--block", "0", "--length", "6")
    assert (status, err) == (2, "dlm-kernels: block: expected an int of at least 1, got 0\n")
    status, _, err = command("generate", "x", "--steps", "0")
    assert (status, err) == (2, "dlm-kernels: steps: expected at least 1, got 0\n")
    with pytest.raises(SystemExit):
        command("nonsense")


def test_info_names_every_operation(command):
    status, out, _ = command("info")
    assert status == 0
    for word in ("device:", "million parameters"):
        assert word in out
    of_arrays = {name for name in dlm_kernels.__all__ if name.islower()} - {"explain", "masks", "pack_lm_head"}
    for name in {*of_arrays, "gradient of attention", "gradient of masked_cross_entropy"}:
        assert f"\n{name}: " in out


def test_canvas_of_ragged_prompts_and_holes(saved):
    config, _, tokenizer = checkpoint.load(saved)
    board = generate.canvas(config, tokenizer, ["def", "a<mask:2>b<mask:1>"], 3)
    def_, a, b = (tokenizer.encode(text).ids for text in ("def", "a", "b"))
    rows = [[*def_, *[config.mask_id] * 3], [*a, *[config.mask_id] * 2, *b, config.mask_id]]
    assert board.tokens.shape == (2, 32)
    for tokens, start, first, row, given in zip(board.tokens, board.start, board.first, rows, (def_, a)):
        np.testing.assert_array_equal(tokens[start:], row)
        assert (tokens[:start] == config.pad_id).all() and first - start == len(given)
    other, start = generate.without_prompt(config, board)
    assert (other[0, board.start[0] :] == config.mask_id).all() and start[0] == board.start[0]
    ids = tokenizer.encode("ab").ids
    other, start = generate.without_prompt(config, board, ids)
    np.testing.assert_array_equal(other[1, start[1] : board.first[1]], ids)
    assert (other[1, : start[1]] == config.pad_id).all()
    # Of a prompt that is all holes too, for which columns are added.
    board = generate.canvas(config, tokenizer, [f"<mask:{generate.BUCKET}>"], 3, before=len(ids))
    other, start = generate.without_prompt(config, board, ids)
    np.testing.assert_array_equal(other[0, start[0] : board.first[0]], ids)
    assert (other[0, board.first[0] :] == config.mask_id).sum() == generate.BUCKET


def test_rows_of_a_batch_are_what_they_are_alone(saved):
    model = checkpoint.load(saved, dtype=np.float32)
    prompts = ["def add(a, b):", "class"]
    together = generate.generate(model, prompts, length=6, block=6, steps=3)
    for prompt, text in zip(prompts, together.texts):
        assert generate.generate(model, [prompt], length=6, block=6, steps=3).texts == [text]


@pytest.mark.parametrize("marks", ["", "<mask:6>"])
def test_a_row_draws_alike_in_any_batch(marks, saved):
    """Whatever the block, which here is wider than a row, and the canvas of a longer one."""
    model = checkpoint.load(saved, dtype=np.float32)
    prompts = ["def add(" + marks, "x = 1\n" * 12 + marks]
    options = dict(length=6, block=48, steps=2, temperature=1.0, seed=3, exact=True)
    together = generate.generate(model, prompts, **options)
    assert together.decoded.tokens.shape[1] > 48
    assert generate.generate(model, prompts[:1], **options).texts == together.texts[:1]


def test_rows_of_a_batch_draw_for_themselves(saved):
    options = dict(length=6, block=6, steps=3, temperature=1.0)
    first, second = generate.generate(checkpoint.load(saved, dtype=np.float32), ["def add("] * 2, **options).texts
    assert first != second


def test_the_view_shows_every_kind_of_token(saved):
    config, _, tokenizer = checkpoint.load(saved)
    word = tokenizer.encode("def").ids[0]
    shown = view.View(config, tokenizer)
    tokens = np.array([[config.pad_id, word, word, config.mask_id, config.eos_id]])
    group = shown.render(tokens, np.array([[-1, -1, 0, -1, 0]]), np.array([[1, 1, 0.95, 1, 0.5]]), np.int32(1))
    text = group.renderables[0]
    assert text.plain == tokenizer.decode([word]) * 2 + "░░"
    assert [str(span.style) for span in text.spans] == ["default", "green reverse", "bright_black"]
    assert view.colour(float("nan")) == "red"


def test_characters_of_several_tokens_are_shown_whole(saved):
    """In the view, and on the page; an unfinished one is no harm."""
    config, _, tokenizer = checkpoint.load(saved)
    said = "x = 'é→𝄞 \ufffd'\n"
    ids = tokenizer.encode(said).ids
    assert len(ids) > len(said) and tokenizer.decode(ids) == said
    shown = words(tokenizer, ids)
    assert len(shown) == len(ids) and "".join(shown) == said
    assert max(map(len, shown)) < 4 and {"é", "→", "𝄞"} < set(shown)
    for end in range(len(ids)):
        assert "".join(words(tokenizer, ids[:end])) == tokenizer.decode(ids[:end])
    ones = np.ones((1, len(ids)))
    assert view.View(config, tokenizer).render(np.array([ids]), ones, ones, np.int32(1)).renderables[0].plain == said


def test_the_terminal_shows_each_pass(command, monkeypatch):
    """And then the text as a pipe has it, without the style that the view shows as it was read."""
    arguments = ("generate", "def add(", "--block", "6", "--steps", "3", "--exact", "--style", "class")
    piped = command(*arguments)[1]
    terminal = functools.partial(rich.console.Console, force_terminal=True, width=200)
    monkeypatch.setattr(rich.console, "Console", terminal)
    status, out, err = command(*arguments)
    *frames, last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out).split("def add(")[1:]
    assert status == 0 and err.startswith("6 tokens in 3 passes")
    shown = [(re.search(r"pass (\d)", frame)[1], frame.count("░░")) for frame in frames]
    assert list(dict.fromkeys(shown)) == [("1", 4), ("2", 2), ("3", 0)]
    assert "def add(" + last == piped and not frames[-1].endswith("class")


def test_newlines_and_tabs_in_any_text():
    names = ("prompt", "infill", "ban", "require", "style", "negative_prompt")
    written = [word for name in names[1:] for word in (f"--{name.replace('_', '-')}", r"a\nb\tc")]
    options = cli._parser().parse_args(["generate", r"a\nb\tc", *written])
    for name in names:
        assert getattr(options, name) in ("a\nb\tc", ["a\nb\tc"])
    assert cli._parser().parse_args(["correct", r"a\nb\tc"]).text == "a\nb\tc"


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
    monkeypatch.setattr(train, "loss", lambda config, params, tokens, key, **_: jax.random.uniform(key))
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
    status, out, _ = command("evaluate", "--steps", "2")
    blocks = {f"bits_per_byte_in_blocks_of_{size}": size for size in (4, 16, 64)}
    expected = {"held_out_bytes": len(text), "bits_per_byte": None, "autoregressive_bits_per_byte": 1} | blocks
    expected |= {"correction_at_0.7": 0.7, "correction_at_0.9": 0.9}
    expected |= {"hole_of_1": [1, 1], "hole_of_4": [4, 2], "hole_of_8": [8, 2]}
    assert status == 0 and json.loads(out) == expected


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


def test_train_and_distill(command, saved, texts, monkeypatch, tmp_path):
    """What they leave is a model that decodes, and a log; a student is told apart from its teacher."""
    monkeypatch.setattr(data, "files", lambda: texts)
    few = ("--steps", "2", "--rows", "2", "--length", "16")
    trained, student = str(tmp_path / "trained"), str(tmp_path / "student")
    assert command("train", trained, "--initial", str(saved), *few)[0] == 0
    assert json.loads((tmp_path / "trained" / "log.jsonl").read_text())["step"] == 2
    status, out, _ = command("distill", student, "--student-steps", "1", "--teacher-steps", "2", "--learning-rate", "0.1", *few)
    assert status == 0 and re.fullmatch(r"nats a token from the teacher, on held-out text: (\S+) before, (?!\1)\S+ now\n", out)
    for folder in (trained, student):
        made = generate.generate(checkpoint.load(folder, dtype=np.float32), ["def add("], length=6, block=6)
        assert made.texts[0].startswith("def add(")


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


def test_bits_from_left_to_right(saved):
    """Each of the last tokens given those before it and nothing after, whatever padding stands in front."""
    config, params, tokenizer = checkpoint.load(saved, dtype=np.float32)
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


@pytest.mark.parametrize("name", SHIPPED)
def test_the_models_that_come_with_the_package(name):
    """Small, whole, and better than a guess: they know what Python cannot do without."""
    folder = checkpoint.SHIPPED if name == "teacher" else checkpoint.find(name)
    files = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "MODEL_CARD.md"} == files.keys()
    assert sum(path.stat().st_size for path in checkpoint.SHIPPED.rglob("*")) < 40e6
    loaded = checkpoint.load(folder, dtype=np.float32)
    holes = {
        "for i<mask:1> range(10):\n    print(i)\n": " in",
        "import os\n<mask:1> sys\n": "import",
        "class Stack:\n    def push(self<mask:1> x):\n        self.items.append(x)\n": ",",
        "def main(argv<mask:1>\n    return 1\n": "):",
        "if x is<mask:1> None:\n    return x\n": " not",
        "try:\n    x = 1\nexcept ValueError<mask:1>\n    pass\n": ":",
        "def f(self):\n    return<mask:1>._items\n": " self",
    }
    filled = generate.generate(loaded, list(holes), steps=1).texts
    right = [text == prompt.replace("<mask:1>", word) for text, (prompt, word) in zip(filled, holes.items())]
    assert sum(right) >= 6, filled


def test_the_model_for_random_tokens():
    """It knows better than the teacher what stood where tokens are random, and writes on from a prompt without a mask."""
    renoise, teacher = (checkpoint.load(where, dtype=np.float32) for where in (checkpoint.find("renoise"), checkpoint.SHIPPED))
    config, params, tokenizer = renoise
    assert config == dataclasses.replace(teacher[0], self_conditioning=True)
    text = next(text for _, text, held_out in data.files() if held_out)
    rows = np.array(tokenizer.encode(text).ids[:512], np.int32).reshape(8, 64)
    before = model.init(config, jax.random.key(0)) | teacher[1]
    loss, teachers = (float(train.uniform_loss(config, p, rows, jax.random.key(1))) for p in (params, before))
    assert loss < teachers - 0.5
    made = generate.generate(renoise, ["def f(x):"], length=16, block=16, noise_budget=0.1, exact=True)
    assert made.tokens == 16 and not (made.decoded.tokens == config.mask_id).any()


def test_the_model_corrects_what_python_cannot_mean():
    loaded = checkpoint.load(dtype=np.float32)
    loop = "for i in range(10):\n    print(i)\n"
    method = "class Stack:\n    def push(self, x):\n        self.items.append(x)\n"
    for right, a, b in ((loop, " in", " on"), (method, ", x", ". x")):
        text, changes, _ = correct.correct_text(loaded, right.replace(a, b), threshold=0.7)
        assert text == right and len(changes) == 1
