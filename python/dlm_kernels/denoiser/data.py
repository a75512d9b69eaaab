"""Text to learn from: the source of the standard library, which every machine with Python has, or one's own files.

A file of the library belongs to the held-out part by a hash of its path, so the split is the same everywhere and in every run.
"""

import hashlib
import pathlib
import re
import sysconfig

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from dlm_kernels.denoiser import limits

PAD, EOS, MASK = "<|pad|>", "<|eos|>", "<|mask|>"
HELD_OUT_ONE_IN = 40
SUFFIXES = (".py", ".txt", ".md")  # of the files that `read` reads in a folder
# Tables and generated text would teach hexadecimal digits; tests are a language of their own.
LEFT_OUT = {
    "__pycache__", "site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib-dynload", "msilib",
}  # fmt: skip
# A newline takes its indentation with it; a word takes the space before it.
PIECE = r"\n[ \t]*| ?[A-Za-z_]+| ?[0-9]| ?[^\sA-Za-z_0-9]+|\s"
DEFINITION = re.compile(r"^(def |async def |class )", re.MULTILINE)
UNIT = re.compile(rf"^(?=@)|(?={DEFINITION.pattern})", re.MULTILINE)


def files():
    """[(path relative to the library, text, held out?)] of the standard library, sorted by path."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if LEFT_OUT & set(path.relative_to(root).parts[:-1]) or path.name.startswith("_sysconfigdata"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            found.append((name, text, is_held_out(name)))
    return found


def read(paths):
    """[(path, text, False)] of one's own UTF-8 files, in their order, and of all in folders that end in SUFFIXES, sorted by path.

    What is empty, and what is hidden in a folder, is left out. Raises ValueError for another encoding, and for a folder without
    such files.
    """
    found = {}
    for path in map(pathlib.Path, paths):
        inside = [path]
        if path.is_dir():
            inside = sorted(
                file for file in path.rglob("*")
                if file.suffix in SUFFIXES and file.is_file() and not any(part[0] == "." for part in file.relative_to(path).parts)
            )  # fmt: skip
            if not inside:
                raise ValueError(f"{path}: expected files in it that end in {', '.join(SUFFIXES)}, got none")
        for file in inside:
            try:
                found[str(file)] = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}: expected UTF-8, got {error}") from None
    return [(name, text, False) for name, text in found.items() if text.strip()]


def is_held_out(name):
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % HELD_OUT_ONE_IN == 0


def train_tokenizer(texts, vocab):
    """A byte-level BPE tokenizer of `vocab` entries; pad, eos and mask are ids 0, 1 and 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[PAD, EOS, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def literal(tokenizer):
    """The tokenizer, which from now on reads `<|mask|>` in a text as these eight characters: text comes back as it was.

    Its file cannot say so. One with other special tokens than `train_tokenizer` gives stays as it is: chats are written with them.
    """
    if {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()} == {0: PAD, 1: EOS, 2: MASK}:
        tokenizer.encode_special_tokens = True
    return tokenizer


def units(text):
    """`text` cut before every top-level definition: what a prompt that opens with `def` should end."""
    starts = [0, *(m.start() for m in UNIT.finditer(text)), len(text)]
    pieces = [text[a:b] for a, b in zip(starts, starts[1:])]
    joined = []
    for piece in pieces:
        # A decorator's own cut must not part it from what it decorates.
        if joined and joined[-1].startswith("@") and not DEFINITION.search(joined[-1]):
            joined[-1] += piece
        elif piece.strip():
            joined.append(piece)
    return joined


def stream(tokenizer, documents, eos_id):
    """All documents' tokens in one int32 array, each document followed by `eos_id`. ValueError where there is none."""
    limits.texts(texts=documents)
    if not documents:
        raise ValueError("texts: expected at least one, got none")
    encodings = tokenizer.encode_batch(documents, add_special_tokens=False)  # as `text.encode`
    ids = [encoding.ids + [eos_id] for encoding in encodings]
    return np.concatenate([np.asarray(x, np.int32) for x in ids])


class Batches:
    """Packed training rows: `batches[step]` is int32 [rows, length], a function of the seed and the step alone.

    Each epoch cuts every stream at a new offset and shuffles the rows, so that a kill loses no place to come back to.
    """

    def __init__(self, streams, rows, length, seed):
        self.streams, self.rows, self.length, self.seed = streams, rows, length, seed
        if any(len(s) < 2 * length for s in streams):
            got = [len(s) for s in streams]
            raise ValueError(f"texts: expected streams of at least {2 * length} tokens each, twice the length, got {got}")
        self.per_epoch = sum((len(s) - length) // length for s in streams) // rows
        if self.per_epoch == 0:
            raise ValueError(f"rows: expected a batch that the data can fill, got {rows} rows of {length} tokens")
        self._epoch, self._order = -1, None

    def __getitem__(self, step):
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        chosen = self._order[index * self.rows : (index + 1) * self.rows]
        return np.stack([self.streams[s][start : start + self.length] for s, start in chosen])

    def _shuffled(self, epoch):
        random = np.random.default_rng([self.seed, epoch])
        places = []
        for i, s in enumerate(self.streams):
            offset = int(random.integers(0, self.length))
            starts = np.arange(offset, len(s) - self.length + 1, self.length)[: (len(s) - self.length) // self.length]
            places.append(np.stack([np.full_like(starts, i), starts], axis=1))
        places = np.concatenate(places)
        return places[random.permutation(len(places))]


def segments(tokens, eos_id):
    """int32 ids of the documents in packed rows [B, L]; an eos belongs to the document it ends."""
    ends = tokens == eos_id
    return ends.cumsum(axis=1) - ends
