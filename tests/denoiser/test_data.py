"""What models learn from: texts, units, batches, and a tokenizer that loses nothing."""

import re

import numpy as np
import pytest
from tokenizers import Tokenizer

from dlm_kernels.denoiser import data


def test_text_survives_the_tokenizer(texts):
    tokenizer = data.train_tokenizer([text for _, text, _ in texts], 300)
    text = "def f(x):\n\n\treturn 'ünïcode', x ** 2  # 😀\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    text = "MASK = '<|mask|>' + '<|eos|>'\n"
    assert min(tokenizer.encode(text).ids) == 1
    for read in (Tokenizer.from_str(tokenizer.to_str()), tokenizer):
        ids = data.literal(read).encode(text).ids
        assert min(ids) > 2 and read.decode(ids) == text
    tokenizer.encode_special_tokens = False
    tokenizer.add_special_tokens(["<|im_end|>"])
    assert tokenizer.token_to_id("<|im_end|>") in data.literal(tokenizer).encode("x<|im_end|>").ids


def test_units_lose_no_text_and_keep_decorators():
    text = "import os\n\n\n@cache\n@other(1)\ndef f():\n    pass\n\n\nclass A:\n    def g(self):\n        pass\n"
    pieces = data.units(text)
    assert "".join(pieces) == text
    assert pieces[1].startswith("@cache\n@other(1)\ndef f") and pieces[2].startswith("class A")
    assert data.units("@cache\nasync def f():\n    pass\nx = 1\ndef g(): pass") == [
        "@cache\nasync def f():\n    pass\nx = 1\n", "def g(): pass",
    ]  # fmt: skip


def test_the_split_depends_on_the_path_alone():
    found = data.files()
    held_out = [name for name, _, held in found if held]
    assert held_out == [name for name, _, _ in found if data.is_held_out(name)]
    assert 0.01 < len(held_out) / len(found) < 0.05


def test_batches_are_a_function_of_seed_and_step():
    streams = [np.arange(1000, dtype=np.int32), np.arange(2000, 2500, dtype=np.int32)]
    batches = data.Batches(streams, 4, 10, 0)
    rows = np.concatenate([batches[step] for step in range(batches.per_epoch)])
    assert (np.diff(rows, axis=1) == 1).all()
    assert len(np.unique(rows)) == rows.size  # an epoch shows nothing twice
    later = batches[batches.per_epoch + 3]
    np.testing.assert_array_equal(data.Batches(streams, 4, 10, 0)[batches.per_epoch + 3], later)
    with pytest.raises(ValueError, match=r"texts: expected streams of at least 20 tokens each, twice the length, got \[15\]"):
        data.Batches([np.arange(15)], 1, 10, 0)


def test_ones_own_files_and_folders_are_read(tmp_path):
    """Whole, in their order, a folder's sorted; what is hidden, empty or of another kind stays out, unless it is named itself."""
    written = {"b.py": "b", "a/c.md": "c", "d.txt": "d", "e.rst": "e", ".venv/f.py": "f", "g.py": " \n"}
    for name, text in written.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    folder = [(str(tmp_path / name), written[name], False) for name in ("a/c.md", "b.py", "d.txt")]
    assert data.read([tmp_path]) == folder
    named = data.read([str(tmp_path / "e.rst"), tmp_path / "d.txt", tmp_path])
    assert [text for _, text, _ in named] == ["e", "d", "c", "b"]
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.txt: expected UTF-8, got "):
        data.read([tmp_path])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.read([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: expected files in it that end in \.py, \.txt, \.md, got none"):
        data.read([tmp_path / "empty"])


@pytest.mark.parametrize("texts, got", [("def f():", "'def f():'"), (["x", 1], "['x', 1]"), ("x" * 999, f"'{'x' * 79}")])
def test_one_text_is_no_list_of_its_characters(texts, got):
    with pytest.raises(ValueError, match=f"^texts: expected a list of texts, got {re.escape(got)}$"):
        data.stream(data.train_tokenizer(["x"], 300), texts, 1)
