"""A live view in the terminal of the canvas being unmasked."""

import concurrent.futures
import queue
import threading
import time

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.segment import SegmentLines
from rich.text import Text

from dlm_kernels.denoiser.text import words

FRAME_SECONDS = 0.08  # a frame stays this long at least: a small model's passes are faster than the eye
COLOURS = ((0.9, "green"), (0.6, "yellow"), (0.3, "dark_orange"), (0.0, "red"))  # by confidence, at least


def in_background(work):
    """A Future of work(), by a thread: within XLA the main one would not hear Ctrl-C. See `cli.main` for what ends it then."""
    future = concurrent.futures.Future()

    def run():
        try:
            future.set_result(work())
        except BaseException as error:  # of the caller, who asks for the result
            future.set_exception(error)

    threading.Thread(target=run, name="decoding", daemon=True).start()
    return future


class View:
    """Shows what decoding writes, pass by pass, while it runs in another thread: it never waits for the terminal."""

    def __init__(self, config, tokenizer, console=None):
        self.config, self.tokenizer, self.console = config, tokenizer, console or Console()
        self.frames = queue.SimpleQueue()

    def on_pass(self, decoded):
        self.frames.put([np.asarray(field) for field in decoded])

    def watch(self, work):
        """Calls work() and shows its passes; returns its result when both are over."""
        running = in_background(work)
        with Live(Text("compiling"), console=self.console, auto_refresh=False, transient=True) as live:
            while not (running.done() and self.frames.empty()):
                try:
                    frame = self.frames.get(timeout=FRAME_SECONDS)
                except queue.Empty:
                    continue
                live.update(self.fitting(self.render(*frame)), refresh=True)
                time.sleep(FRAME_SECONDS)
            return running.result()

    def render(self, tokens, revealed, confidence, passes):
        rows = []
        for row in range(len(tokens)):
            text = Text()
            shown = words(self.tokenizer, np.asarray(tokens[row]).tolist())
            for token, word, at, sure in zip(tokens[row], shown, revealed[row], confidence[row]):
                if token == self.config.mask_id:
                    text.append("░░", "bright_black")
                else:
                    text.append(word, "default" if at < 0 else colour(sure) + (" reverse" if at == passes - 1 else ""))
            rows.append(text)
        return Group(*rows, Text(f"pass {int(passes)}", "bright_black"))

    def fitting(self, group):
        """Of what `render` gives the lines that the terminal has room for, down to the last that the pass wrote in, and the count.

        Of more, Live would show the first ones, and could not take back at the end what has left the terminal.
        """
        *lines, passes = self.console.render_lines(group, pad=False)
        room = max(self.console.height - 2, 1)
        new = [i for i, line in enumerate(lines) if any(segment.style and segment.style.reverse for segment in line)]
        end = max(new[-1] + 1, room) if new else len(lines)
        return SegmentLines([*lines[max(end - room, 0) : end], passes], new_lines=True)


def colour(confidence):
    """The terminal colour of a confidence; NaN is as unsure as 0."""
    return next((name for least, name in COLOURS if confidence >= least), COLOURS[-1][1])
