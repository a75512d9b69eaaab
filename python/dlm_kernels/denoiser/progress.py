"""Training's progress: a bar on the terminal, and a line of JSON every few steps in log.jsonl."""

import json
import pathlib

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

LINE_EVERY = 20  # steps


class Bar:
    """Call it with what `train.run` reports; use it in a `with` statement."""

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
        before = path.read_text().splitlines(keepends=True) if path.exists() else []
        log = open(path, "w")
        log.writelines(line for line in before if _step(line) < step)
        return log


def _step(line):
    """Of a line of the log; infinity where a kill left a part of one."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")
