"""Training's progress: a bar on the terminal, and a line of JSON every few steps in log.jsonl."""

import json
import pathlib

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dlm_kernels.denoiser import checkpoint

LINE_EVERY = 20  # steps
BEGIN = '{"step": '  # of every line


class Bar:
    """Call it with what `train.run` reports; use it in a `with` statement, which raises ValueError where another's log.jsonl is."""

    def __init__(self, out):
        self.out, self.log = pathlib.Path(out), None
        columns = (
            BarColumn(),
            TextColumn("{task.percentage:.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        self.bar = Progress(*columns, console=Console(stderr=True))
        self.task = self.bar.add_task("compiling", total=1.0)
        self.first = None

    def __enter__(self):
        _lines(self.out / "log.jsonl")  # before the first step, which compiles
        self.bar.start()
        return self

    def __exit__(self, error, *_):
        if self.first is None and error is None:
            self.bar.update(self.task, completed=1.0, description=f"{self.out}: had all its steps; more of them, or minutes, go on")
        self.bar.stop()
        if self.log:
            self.log.close()

    def __call__(self, progress):
        if self.first is None:
            self.first, self.log = progress, self._open(progress["step"])
        seconds = progress["seconds"] - self.first["seconds"]
        speed = (progress["tokens"] - self.first["tokens"]) / seconds if seconds else 0.0
        done = progress["share"] - self.first["share"]
        left = seconds * (1 - progress["share"]) / done if done else 0.0
        text = f"step {progress['step']}  loss {progress['loss']:.3f}  {speed:.0f} tokens/s  {left / 60:.0f} min left"
        self.bar.update(self.task, completed=progress["share"], description=text)
        if progress["step"] % LINE_EVERY == 0 or progress["share"] == 1:
            self.log.write(json.dumps(progress | {"tokens_per_second": round(speed, 1)}) + "\n")
            self.log.flush()

    def _open(self, step):
        """log.jsonl, not before there is something to tell. A run that goes on from its last save comes by some steps again."""
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / "log.jsonl"
        before = _lines(path)
        checkpoint.write_atomic(path, "".join(line + "\n" for line in before if json.loads(line)["step"] < step).encode())
        return open(path, "a")


def _lines(path):
    """Of the log there, but for a last one of which a kill left a part. ValueError where another program wrote one."""
    content = path.read_bytes() if path.exists() else b""
    *lines, part = content.decode(errors="replace").split("\n")
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            values = None
        if not isinstance(values, dict) or not {"step", "tokens_per_second"} <= values.keys():
            raise ValueError(f"{path}: expected the log of a run, got the line {line[:80]!r}")
    if not BEGIN.startswith(part[: len(BEGIN)]):
        raise ValueError(f"{path}: expected the log of a run, got the line {part[:80]!r}")
    return lines
