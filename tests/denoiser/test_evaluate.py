"""What `evaluate`, `compare` and the commands around them refuse, and how the command ends when it is cut short."""

import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
import xml.etree.ElementTree

import numpy as np
import pytest

from dlm_kernels import cli
from dlm_kernels.denoiser import checkpoint, compare, data, evaluate, plot, train

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
    assert cli._students(shipped, None).keys() == {*compare.STUDENTS}
    assert cli._students(loaded, None) == cli._students(loaded, []) == {}
    with pytest.raises(ValueError, match="--students: expected another name than teacher"):
        cli._students(loaded, ["teacher"])
    ways = [compare._named(way) for way in compare.DECODERS.values()]
    assert sum(not names for names in ways) == len(ways) - 3


def test_an_empty_text_does_not_parse():
    assert evaluate.parse_share(["", "\n", "x = 1", "# x"]) == evaluate.parse_share(["", "", "x = 1", "x"], unfinished=True) == 0.5


def test_texts_that_are_too_short_are_refused_first(loaded, monkeypatch):
    monkeypatch.setattr(train, "loss", None)  # nothing is computed before
    with pytest.raises(ValueError, match=r"texts: expected at least 8192 tokens, got \d+"):
        evaluate.report(loaded, [TEXT])
    with pytest.raises(ValueError, match=r"texts: expected at least 129 tokens, got \d+"):
        evaluate.infilling(loaded, [TEXT])
    with pytest.raises(ValueError, match="texts: expected more than 5 tokens, got 5"):
        evaluate.rows_of(np.arange(5), 1, 5, np.random.default_rng(0))
    with pytest.raises(ValueError, match="texts: expected a top-level function among them, got none"):
        evaluate.held_out_headers(["x = 1\n"], 5)


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


def test_info_tells_what_it_is_told_to_take(command):
    _, out, _ = command("info", "--implementation", "xla")
    assert "\nattention: xla\n" in out


@pytest.mark.parametrize("message", ["", "stopped after step 3"])
def test_an_interrupt_is_one_line(message, command, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt(*[message] * bool(message))

    monkeypatch.setattr(cli, "_info", interrupted)
    assert command("info") == (130, "", f"dlm-kernels: {message or 'stopped'}\n")


def test_a_reader_that_has_enough_is_no_error():
    """Neither where the pipe breaks while it is written to nor at the end, when what is buffered leaves."""
    package = str(pathlib.Path(cli.__file__).parents[1])
    code = "import sys; from dlm_kernels import cli; cli._info = lambda _: print('x' * {}); sys.exit(cli.main(['info']))"
    for count in (10, 100000):
        process = subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {package!r}); " + code.format(count)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait() == 128 + signal.SIGPIPE and "dlm-kernels" not in said and "BrokenPipe" not in said


def test_layers_beside_a_checkpoint_are_those_of_it(command, saved, texts, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "files", lambda: texts)
    status, _, err = command("train", str(tmp_path / "out"), "--initial", str(saved), "--layers", "7", "--steps", "1")
    assert status == 2 and f"config: expected the layers {json.loads((saved / 'config.json').read_text())['layers']} of" in err
    assert not (tmp_path / "out").exists()
