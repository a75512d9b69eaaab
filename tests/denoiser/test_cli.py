"""The command, from its arguments to what it prints, on a tiny random model."""

import dataclasses
import functools
import io
import json
import pathlib
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import rich.console

import dlm_kernels
from dlm_kernels import cli, commands, cpu_kernels
from dlm_kernels.denoiser import (
    checkpoint,
    correct,
    data,
    distill,
    generate,
    html,
    losses,
    model,
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
    assert numbers["implementation"].keys() == {"attention", "lm_head_scores", "unmask_topk"}


def test_generate_json_tells_the_implementations_that_ran(command):
    options = ("--steps", "2", "--block", "6", "--length", "6", "--json", "--implementation", "xla", "--guidance", "2")
    found = json.loads(command("generate", "def add(", *options)[1])["implementation"]
    assert found == dict.fromkeys(["attention", "mix_guidance", "lm_head_scores", "unmask_topk"], "xla")


def test_the_likeliest_alone_at_any_temperature(command):
    options = ("generate", "def add(", "--steps", "1", "--block", "6", "--length", "6", "--exact", "--json", "--temperature")
    greedy, hot, single, nucleus = (
        json.loads(command(*options, *more)[1])
        for more in (["0"], ["9"], ["9", "--top-k", "1"], ["9", "--top-p", "1e-6"])
    )
    assert greedy["text"] == single["text"] == nucleus["text"] != hot["text"]
    assert single["implementation"].keys() == {"attention", "truncate_logits", "score_tokens", "unmask_topk"}


def test_infill_keeps_the_text_around(command, saved):
    status, out, _ = command(
        "generate", "--infill", r"def add(a, b):\n    <mask:5@2.>\n    return c", "--steps", "5", "--json"
    )
    numbers = json.loads(out)
    assert status == 0 and numbers["tokens"] == 5 and numbers["passes"] == 5
    assert numbers["text"].startswith("def add(a, b):\n    ") and numbers["text"].endswith("\n    return c")


def test_a_length_below_the_block_takes_a_quarter_of_it(command):
    numbers = json.loads(command("generate", "def add(", "--length", "8", "--exact", "--json")[1])
    assert (numbers["tokens"], numbers["passes"]) == (8, 2)


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
    # Guided too, by a block that fills alone; one token alone is not.
    guided = ("--negative-prompt", "y", "--guidance-final", "1")
    options = ("--block", "6", "--steps", "1", "--temperature", "0", "--eos-bias", "1e4", *guided, "--html", str(path))
    assert command("generate", "x", *options)[0] == 0
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
        ("--infill", "<mask:4>", "--length", "9"): "--length, --exact: expected none with holes such as <mask:20>, which say their",
        ("x = <mask:4>", "--exact"): "--length, --exact: expected none with holes such as <mask:20>, which say their length",
        ("def", "--drafts", "1", "--drafter", "student-2"): "--drafter: expected a student of the model's shape, got ",
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
    for word in ("device:", "instruction set of the CPU kernels:", "million parameters"):
        assert word in out
    of_arrays = {name for name in dlm_kernels.__all__ if name.islower()} - {"explain", "export_checks", "masks", "pack_lm_head"}
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
    # Of the second row also what stands behind its first hole, without which a row that begins with one would not be guided.
    for row in (0, 1):
        assert (other[row, board.start[row] :] == config.mask_id).all() and start[row] == board.start[row]
        assert (other[row, : start[row]] == config.pad_id).all()
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


def test_a_terminal_lower_than_the_text_shows_what_is_written(saved):
    """And no more than the terminal can take back, from which what is above has gone."""
    config, _, tokenizer = checkpoint.load(saved)
    ids = tokenizer.encode("".join(f"x = {i}\n" for i in range(30))).ids
    tokens = np.array([ids])
    console = rich.console.Console(file=io.StringIO(), force_terminal=True, width=40, height=8)
    shown = view.View(config, tokenizer, console)

    def seen(last):
        """The lines where a pass writes the token `last`, which others wrote before."""
        revealed = np.where(np.arange(len(ids)) == last, 1, np.where(np.arange(len(ids)) > last, 0, -1))[None]
        group = shown.render(tokens, revealed, np.ones(tokens.shape), np.int32(2))
        lines = console.render_lines(shown.fitting(group), pad=False)
        return ["".join(segment.text for segment in line) for line in lines if line]

    begins = [i for i, word in enumerate(words(tokenizer, ids)) if word.startswith("x")]
    assert seen(begins[20]) == [*(f"x = {i}" for i in range(15, 21)), "pass 2"]
    assert seen(begins[2]) == [*(f"x = {i}" for i in range(6)), "pass 2"]


def test_newlines_and_tabs_in_any_text():
    names = ("prompt", "infill", "ban", "require", "style", "negative_prompt")
    written = [word for name in names[1:] for word in (f"--{name.replace('_', '-')}", r"a\nb\tc")]
    options = cli._parser().parse_args(["generate", r"a\nb\tc", *written])
    for name in names:
        assert getattr(options, name) in ("a\nb\tc", ["a\nb\tc"])
    assert cli._parser().parse_args(["correct", r"a\nb\tc"]).text == "a\nb\tc"
    # Code has them as two characters too, and other backslashes.
    assert cli._parser().parse_args(["correct", r'print("\\n\d")']).text == r'print("\n\d")'


def test_numbers_below_zero():
    for value in ("-2", "-.5", "-3e38", "-1.5e-3"):
        options = cli._parser().parse_args(["generate", "x", "--eos-bias", value, "--guidance-interval", value, "1"])
        assert options.eos_bias == float(value) and options.guidance_interval == [float(value), 1.0]


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


def test_train_and_distill_on_ones_own_texts(command, texts, monkeypatch, tmp_path):
    """And on nothing else; a student is measured on what is held out, or not at all."""
    learnt, measured = [], []
    monkeypatch.setattr(data, "files", None)
    for run in (train, distill):
        monkeypatch.setattr(run, "run", lambda *_, seed_texts, **__: learnt.append([text for _, text, _ in seed_texts]))
    monkeypatch.setattr(distill, "distance", lambda teacher, students, texts, **_: measured.append(texts) or (1.0, 0.5))
    for name, text, _ in texts:
        (tmp_path / name).write_text(text)
    own = ("--steps", "1", "--length", "16", "--texts", str(tmp_path / "b.py"), str(tmp_path / "a.py"))
    assert command("train", str(tmp_path / "trained"), *own)[0] == 0
    distilled = ("distill", str(tmp_path / "student"), *own)
    assert command(*distilled)[:2] == (0, "") and not measured
    status, out, _ = command(*distilled, "--held-out", str(tmp_path / "c.py"))
    assert (status, out) == (0, "nats a token from the teacher, on held-out text: 1.000 before, 0.500 now\n")
    assert learnt == 3 * [[texts[1][1], texts[0][1]]] and measured == [[texts[2][1]]]


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
    loss, teachers = (float(losses.uniform_loss(config, p, rows, jax.random.key(1))) for p in (params, before))
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


def test_info_tells_what_it_is_told_to_take(command, monkeypatch):
    """Where the extension cannot be loaded too."""
    monkeypatch.setattr(cpu_kernels, "unavailable", lambda: "it cannot be loaded")
    status, out, _ = command("info", "--implementation", "xla")
    assert status == 0 and "\nattention: xla\n" in out and "instruction set" not in out


@pytest.mark.parametrize("message", ["", "stopped after step 3"])
def test_an_interrupt_is_one_line(message, command, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt(*[message] * bool(message))

    monkeypatch.setattr(commands, "run_info", interrupted)
    assert command("info") == (130, "", f"dlm-kernels: {message or 'stopped'}\n")


def test_an_interrupt_does_not_wait_for_what_python_cannot_stop():
    code = """
import sys
import numpy as np
from dlm_kernels import cli, commands

def compute(*_, **__):
    print("computing", flush=True)
    try:
        np.linalg.svd(np.random.default_rng(0).normal(size=(4000, 4000)))
    finally:
        print("computed", flush=True)

commands.generate.generate = compute
sys.exit(cli.main(["generate", "x"]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "computing\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130 and out == "" and err.endswith("dlm-kernels: stopped\n")


def test_what_is_asked_for_and_never_done_is_refused(command, tmp_path):
    evaluate = ["evaluate", "--files", "1"]
    for arguments, expected in (
        (["generate", "x", "--ban", "return None"], "--ban: expected one that a single token contains, got 'return None'"),
        (["generate", "x", "--html", ""], "--html: expected a file in a folder that is there, got "),
        (["generate", "x", "--drafts", "2", "--drafter", ""], "no checkpoint is there"),
        ([*evaluate, "--students", "student-8"], "--students: expected --by-steps with it"),
        ([*evaluate, "--decoding", "--students", "student-8"], "--students: expected --by-steps with it"),
        ([*evaluate, "--markdown"], "--markdown: expected --decoding, --by-steps or --control with it"),
        ([*evaluate, "--control", "--steps", "8"], "--steps: expected none of --decoding, --by-steps and --control with it"),
    ):
        status, _, err = command(*arguments)
        assert status == 2 and expected in err, err


def test_scores_of_nothing_are_an_error(command):
    status, _, err = command("generate", "def f(", "--length", "8", "--guidance", "1e38")
    assert status == 2 and "dlm-kernels: the model's scores are NaN" in err


def test_a_reader_that_has_enough_is_no_error():
    """Neither where the pipe breaks while it is written to nor at the end, when what is buffered leaves."""
    package = str(pathlib.Path(cli.__file__).parents[1])
    code = "from dlm_kernels import cli, commands; commands.run_info = lambda _: print('x' * {}); sys.exit(cli.main(['info']))"
    for count in (10, 100000):
        process = subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {package!r}); " + code.format(count)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait() == 128 + signal.SIGPIPE and "dlm-kernels" not in said and "BrokenPipe" not in said


def test_a_closed_stream_is_nobody_who_reads(saved, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["info", "--model", str(saved)]) == 0
    assert cli.main(["info", "--model", "nowhere"]) == 2


def test_layers_beside_a_checkpoint_are_those_of_it(command, saved, texts, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "files", lambda: texts)
    status, _, err = command("train", str(tmp_path / "out"), "--initial", str(saved), "--layers", "7", "--steps", "1")
    assert status == 2 and f"config: expected the layers {json.loads((saved / 'config.json').read_text())['layers']} of" in err
    assert not (tmp_path / "out").exists()
