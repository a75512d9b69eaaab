"""Training runs: a resume after a kill, and what a run refuses to destroy or to ignore."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import dlm_kernels
from dlm_kernels.denoiser import checkpoint, data, model, train
from dlm_kernels.denoiser.config import DenoiserConfig

TRAIN = """
    import json, sys, time
    import jax
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_platforms", "cpu")
    from dlm_kernels.denoiser import train
    from dlm_kernels.denoiser.config import DenoiserConfig

    def report(progress):
        print(progress["step"], flush=True)
        time.sleep(0.2)

    config, settings, out, texts = json.loads(sys.argv[1])
    train.run(DenoiserConfig(**config), train.TrainConfig(**settings), out, seed_texts=texts, report=report)
"""


def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path, texts):
    """Every step saves; the kill comes some steps in, from outside, without a warning."""
    config = dict(layers=1, d_model=16, heads=2, kv_heads=1, head_size=8, ffn=24, vocab=300)
    settings = dict(rows=2, length=16, steps=9, save_every=0.0)
    package = str(pathlib.Path(dlm_kernels.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(TRAIN), json.dumps([config, settings, str(tmp_path / "killed"), texts])],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])},
    )
    while int(process.stdout.readline()) < 4:
        pass
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    config, settings, steps = DenoiserConfig(**config), train.TrainConfig(**settings), []
    train.run(config, settings, tmp_path / "whole", seed_texts=texts)
    train.run(config, settings, tmp_path / "killed", seed_texts=texts, report=lambda p: steps.append(p["step"]))
    assert 3 < steps[0] < 9 and steps[-1] == 9
    a, b = (safetensors.numpy.load_file(tmp_path / out / "state.safetensors") for out in ("whole", "killed"))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_training_learns_and_can_go_on_from_a_checkpoint(tmp_path, texts):
    config = DenoiserConfig(layers=1, d_model=16, heads=2, kv_heads=1, head_size=8, ffn=24, vocab=300)
    losses = []
    settings = train.TrainConfig(rows=4, length=16, steps=150, learning_rate=2e-2, average=0.9)
    train.run(config, settings, tmp_path / "first", seed_texts=texts, report=lambda p: losses.append(p["loss"]))
    assert losses[-1] < 0.7 * losses[0]
    more = []
    settings = train.TrainConfig(rows=4, length=16, steps=2, learning_rate=0.0)
    train.run(config, settings, tmp_path / "more", initial=tmp_path / "first", seed_texts=texts, report=more.append)
    assert more[0]["loss"] < 0.7 * losses[0]
    first, second = (checkpoint.load(tmp_path / out, dtype=jnp.float32)[1] for out in ("first", "more"))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


SMALL = DenoiserConfig(layers=1, d_model=16, heads=2, kv_heads=1, head_size=8, ffn=24, vocab=300)
FEW = dict(rows=2, length=16, steps=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, texts):
    """The directory of a run of one step; a test that changes it takes a copy."""
    out = tmp_path_factory.mktemp("run") / "out"
    train.run(SMALL, train.TrainConfig(**FEW), out, seed_texts=texts)
    return out


@pytest.fixture
def copied(trained, tmp_path):
    return pathlib.Path(shutil.copytree(trained, tmp_path / "copied"))


def test_a_run_goes_on_with_its_own_tokenizer_and_config(copied, texts):
    """Whichever would be made of the texts, and with no config given; it clears away what a killed save left."""
    other = data.train_tokenizer([text.replace("self", "this") for _, text, _ in texts], 300)
    assert other.to_str() != (copied / "tokenizer.json").read_text()
    (copied / "tokenizer.json").write_text(other.to_str())
    before = (copied / "tokenizer.json").read_bytes(), (copied / "config.json").read_bytes()
    files = [path.name for path in copied.iterdir()]
    for name in ("state", "model"):
        (copied / f"{name}.safetensors.0123abcd.partial").write_bytes(b"what a killed save left")
    train.run(None, train.TrainConfig(**FEW | dict(steps=2)), copied, seed_texts=texts)
    assert ((copied / "tokenizer.json").read_bytes(), (copied / "config.json").read_bytes()) == before
    assert sorted(path.name for path in copied.iterdir()) == sorted(files)
    with pytest.raises(ValueError, match="config: expected the layers 1 of .*copied, got 7"):
        train.run(dataclasses.replace(SMALL, layers=7), train.TrainConfig(**FEW), copied, seed_texts=texts)
    (copied / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="expected a tokenizer.json"):
        train.run(SMALL, train.TrainConfig(**FEW), copied, seed_texts=texts)


def test_what_a_run_would_destroy_or_ignore_is_refused(trained, copied, saved, texts, tmp_path):
    settings, new = train.TrainConfig(**FEW), tmp_path / "new"
    with pytest.raises(ValueError, match="initial: expected another directory than the one that is written"):
        train.run(None, settings, copied, initial=copied / ".." / "copied", seed_texts=texts)
    with pytest.raises(ValueError, match="config: expected the layers 1 of .*, got 7"):
        train.run(dataclasses.replace(SMALL, layers=7), settings, new, initial=trained, seed_texts=texts)
    with pytest.raises(ValueError, match="initial: expected the tokenizer of the run that goes on"):
        (copied / "tokenizer.json").write_text(data.train_tokenizer(["def f():"], 300).to_str())
        train.run(None, settings, copied, initial=trained, seed_texts=texts)
    (copied / "state.safetensors").unlink()
    with pytest.raises(ValueError, match="out: expected a directory without a model, or with a run's state beside it"):
        train.run(SMALL, settings, copied, seed_texts=texts)
    with pytest.raises(ValueError, match="texts: expected at least one, got none"):
        train.run(SMALL, settings, new, seed_texts=[])
    with pytest.raises(ValueError, match="out: expected another name than of a model that .*, got student-8; ./student-8 is none"):
        train.run(SMALL, settings, "student-8", seed_texts=[])
    assert not new.exists()


@pytest.mark.parametrize(
    "given, message",
    [(dict(vocab=258), "vocab: expected at least 259, of all bytes and the special tokens, got 258"),
     (dict(eos_id=0), "pad_id, eos_id, mask_id: expected (0, 1, 2), as of `data.train_tokenizer`, got (0, 0, 2)"),
     (dict(mask_id=7), "pad_id, eos_id, mask_id: expected (0, 1, 2), as of `data.train_tokenizer`, got (0, 1, 7)")],
)  # fmt: skip
def test_a_config_that_its_tokenizer_cannot_be_of_is_refused(given, message, texts):
    with pytest.raises(ValueError, match=re.escape(message)):
        train.prepare(dataclasses.replace(SMALL, **given), texts)
    assert train.prepare(dataclasses.replace(SMALL, vocab=259), texts)[0].get_vocab_size() == 259


@pytest.mark.parametrize("others", [["config.json"], ["tokenizer.json"], ["config.json", "tokenizer.json"]])
def test_what_describes_another_programs_model_stays(others, texts, tmp_path):
    for name in others:
        (tmp_path / name).write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="out: expected a directory without a model, or with a run's state beside it"):
        train.run(SMALL, train.TrainConfig(**FEW), tmp_path, seed_texts=texts)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(others, '{"model_type": "bert"}')


@pytest.mark.parametrize("written", [1, 2])
def test_a_run_that_was_killed_in_its_first_save_begins_anew(written, texts, tmp_path, monkeypatch):
    """After one or two of its files, neither of them the state."""
    write, paths = checkpoint.write_atomic, []

    def killed(path, content):
        if len(paths) == written:
            raise OSError("killed")
        paths.append(path)
        write(path, content)

    monkeypatch.setattr(checkpoint, "write_atomic", killed)
    with pytest.raises(OSError, match="killed"):
        train.run(SMALL, train.TrainConfig(**FEW), tmp_path, seed_texts=texts)
    assert len(list(tmp_path.iterdir())) == written and not (tmp_path / "state.safetensors").exists()
    monkeypatch.setattr(checkpoint, "write_atomic", write)
    train.run(SMALL, train.TrainConfig(**FEW), tmp_path, seed_texts=texts)


@pytest.mark.parametrize("name, began, other", [("rows", 2, 3), ("length", 16, 8), ("seed", 0, 1), ("uniform_share", 0.0, 1.0)])
def test_a_run_goes_on_only_with_what_it_learns_from(name, began, other, copied, texts):
    before = (copied / "state.safetensors").read_bytes()
    with pytest.raises(ValueError, match=f"^{name}: expected {began}, with which the run in .*copied began, got {other}$"):
        train.run(None, train.TrainConfig(**FEW | dict(steps=2) | {name: other}), copied, seed_texts=texts)
    assert (copied / "state.safetensors").read_bytes() == before


def test_a_run_goes_on_only_with_its_texts(copied, texts, monkeypatch):
    """Whatever they are called, and whatever is held out; one that was begun before runs remembered them goes on with any."""
    more = train.TrainConfig(**FEW | dict(steps=2))
    other = [(name, text.replace("self", "this"), held_out) for name, text, held_out in texts]
    monkeypatch.setattr(data, "files", lambda: texts[:1])
    before = (copied / "state.safetensors").read_bytes()
    for given, count in ((other, 2), (texts[:2][::-1], 2), (None, 1)):
        with pytest.raises(ValueError, match=f"^texts: expected 2 whose SHA-256 .*copied began, got {count} whose SHA-256"):
            train.run(None, more, copied, seed_texts=given)
    assert (copied / "state.safetensors").read_bytes() == before
    renamed = [(f"moved/{name}", text, held_out) for name, text, held_out in texts if not held_out]
    train.run(None, more, copied, seed_texts=renamed)
    path = copied / "state.safetensors"
    state, progress = checkpoint.read(path), checkpoint.load_progress(path)
    assert progress["step"] == 2
    del progress["learns"]["texts"]
    safetensors.numpy.save_file(state, path, {"progress": json.dumps(progress)})
    train.run(None, train.TrainConfig(**FEW | dict(steps=3)), copied, seed_texts=other)
    assert checkpoint.load_progress(path)["step"] == 3


@pytest.mark.parametrize("given", [["def f():"], "def f():", [("a", "b")], [("a", b"b", False)]])
def test_texts_of_another_form_are_refused(given, tmp_path):
    with pytest.raises(ValueError, match=r"seed_texts: expected \(name, text, held out\?\) of each, as `data.read` gives, got "):
        train.run(SMALL, train.TrainConfig(**FEW), tmp_path / "out", seed_texts=given)


def test_numpys_numbers_are_saved(tmp_path, texts):
    """Those of the config, and those that a run remembers."""
    config = dataclasses.replace(SMALL, layers=np.int64(1))
    numbers = dict(rows=np.int64(2), length=np.int32(16), steps=np.int64(1), seed=np.int64(0), block_share=np.float32(1))
    train.run(config, train.TrainConfig(**numbers), tmp_path / "out", seed_texts=texts)
    train.run(SMALL, train.TrainConfig(**FEW | dict(block_share=1.0)), tmp_path / "out", seed_texts=texts)
    assert checkpoint.load(tmp_path / "out")[0] == SMALL


def test_a_run_goes_on_only_from_what_it_began_with(trained, texts, tmp_path):
    """Wherever that lies. One that was begun before runs remembered it goes on with any."""
    config, params, tokenizer = checkpoint.load(trained)
    checkpoint.save(tmp_path / "other", config, {name: 2 * x for name, x in params.items()}, tokenizer)
    shutil.copytree(trained, tmp_path / "moved")
    few, more = (train.TrainConfig(**FEW | dict(steps=steps)) for steps in (1, 2))
    out = tmp_path / "out"
    train.run(None, few, out, initial=trained, seed_texts=texts)
    for initial, got in ((tmp_path / "other", "one whose .*"), (None, "None")):
        with pytest.raises(ValueError, match=f"^initial: expected one whose embedding's SHA-256 .* began, got {got}$"):
            train.run(None, more, out, initial=initial, seed_texts=texts)
    train.run(None, few, out, initial=tmp_path / "moved", seed_texts=texts)
    state, progress = checkpoint.read(out / "state.safetensors"), checkpoint.load_progress(out / "state.safetensors")
    del progress["learns"]["initial"]
    safetensors.numpy.save_file(state, out / "state.safetensors", {"progress": json.dumps(progress)})
    train.run(None, more, out, initial=tmp_path / "other", seed_texts=texts)
    assert checkpoint.load_progress(out / "state.safetensors")["step"] == 2


@pytest.mark.parametrize("metadata, message", [
    (None, "expected a state of training"), ({"progress": "[1]"}, "expected a state of training"), ({"progress": "x"}, "Expecting"),
])  # fmt: skip
def test_a_foreign_state_is_refused(metadata, message, copied, texts):
    safetensors.numpy.save_file({"x": np.zeros(2)}, copied / "state.safetensors", metadata)
    with pytest.raises(ValueError, match=f"state.safetensors: {message}"):
        train.run(SMALL, train.TrainConfig(**FEW), copied, seed_texts=texts)


def test_a_run_that_diverges_saves_nothing_of_it(copied, texts, tmp_path):
    """Neither before its first save nor over one; what it says tells the two apart."""
    settings = train.TrainConfig(**FEW | dict(steps=9, learning_rate=1e30, weight_decay=1e30, save_every=0.0))
    with pytest.raises(FloatingPointError, match="the update of step 0 is not finite; nothing was saved"):
        train.run(SMALL, settings, tmp_path / "new", seed_texts=texts)
    assert not (tmp_path / "new").exists()
    before = (copied / "state.safetensors").read_bytes()
    with pytest.raises(FloatingPointError, match="the update of step 1 is not finite; what was saved before is in "):
        train.run(SMALL, settings, copied, seed_texts=texts)
    assert (copied / "state.safetensors").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_saves_its_step(number, copied, texts):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt, match="stopped after step 2, which is saved in .*copied; the same command goes on"):
        settings = train.TrainConfig(**FEW | dict(steps=9))
        train.run(SMALL, settings, copied, seed_texts=texts, report=lambda _: signal.raise_signal(number))
    with safetensors.safe_open(copied / "state.safetensors", framework="numpy") as file:
        assert json.loads(file.metadata()["progress"])["step"] == 2
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_single_step_trains(trained):
    """Its learning rate is that of the step's middle, for at the beginning of a run it is 0."""
    state = checkpoint.read(trained / "state.safetensors")
    begun = jax.jit(model.init, static_argnums=0)(SMALL, jax.random.key(0))
    assert any((state[f"['params']['{name}']"] != array).any() for name, array in begun.items())


def test_without_optax_it_says_what_to_install(monkeypatch, tmp_path, texts):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"training needs the optax package: pip install 'dlm_kernels\[train\]'"):
        train.run(DenoiserConfig(), train.TrainConfig(steps=1), tmp_path / "out", seed_texts=texts)
    assert not (tmp_path / "out").exists()
