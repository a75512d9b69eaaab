"""Training's progress: a bar on the terminal, and a line of JSON every few steps in log.jsonl."""

import json
import pathlib

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

LINE_EVERY = 20  # steps


class Bar:
    """Call it with what `train.run` reports; use it in a `with` statement."""

    def __init__(self, out):
        self.out = pathlib.Path(out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = open(self.out / "log.jsonl", "a")
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
        self.log.close()

    def __call__(self, progress):
        self.first = self.first or progress
        seconds = progress["seconds"] - self.first["seconds"]
        speed = (progress["tokens"] - self.first["tokens"]) / seconds if seconds else 0.0
        done = progress["share"] - self.first["share"]
        left = seconds * (1 - progress["share"]) / done if done else 0.0
        text = f"step {progress['step']}  loss {progress['loss']:.3f}  {speed:.0f} tokens/s  {left / 60:.0f} min left"
        self.bar.update(self.task, completed=progress["share"], description=text)
        if progress["step"] % LINE_EVERY == 0 or progress["share"] == 1:
            self.log.write(json.dumps(progress | {"tokens_per_second": round(speed, 1)}) + "\n")
            self.log.flush()
