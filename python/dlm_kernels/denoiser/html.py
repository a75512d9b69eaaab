"""A page that replays decoding pass by pass, beside the same model writing one token at a time. It needs nothing else."""

import json

import numpy as np

from dlm_kernels.denoiser import checkpoint, generate
from dlm_kernels.denoiser.text import words

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>dlm-kernels: decoding, pass by pass</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 80em; padding: 0 1em; background: #16181d; color: #ddd }
  main { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.5em }
  pre { font: 14px/1.55 ui-monospace, monospace; background: #0e0f13; border-radius: 8px; padding: 1em; white-space: pre-wrap;
        overflow-wrap: anywhere; min-height: 16em }
  input { width: 100%; margin: 1em 0 }
  .mask { color: #444 } .given { color: #8ab4f8 } .new { background: #333; border-radius: 3px } small { color: #999 }
</style>
<h1>Decoding, pass by pass</h1>
<p>Each token takes the colour of its confidence, from red (0) to green (1); what the pass shown wrote is on grey; what was given
is blue. Both columns are one model: on the left it denoises blocks, on the right it writes one token a pass, with a key cache.</p>
<input type="range" id="pass" min="0" value="0" aria-label="pass"> <button id="play">play</button>
<main></main>
<script type="application/json" id="data">DATA</script>
<script>
const runs = JSON.parse(document.getElementById("data").textContent);
const slider = document.getElementById("pass"), main = document.querySelector("main");
slider.max = Math.max(...runs.map(run => run.passes.length));
const columns = runs.map(run => {
  const column = main.appendChild(document.createElement("section"));
  return { run, head: column.appendChild(document.createElement("h2")), note: column.appendChild(document.createElement("small")),
           text: column.appendChild(document.createElement("pre")) };
});
function show(at) {
  for (const { run, head, note, text } of columns) {
    const pass = Math.min(at, run.passes.length);
    const mask = { word: "\\u2591\\u2591", style: "mask" };
    const cells = run.given.map(word => word === null ? mask : { word, style: "given" });
    run.passes.slice(0, pass).forEach((writes, i) => writes.forEach(([place, word, sure]) => {
      if (sure === null) cells[place] = { ...cells[place], word };
      else cells[place] = word === null ? mask : { word, style: i === pass - 1 ? "new" : "", sure };
    }));
    text.replaceChildren(...cells.map(({ word, style, sure }) => {
      const span = document.createElement("span");
      span.textContent = word;
      span.className = style;
      if (sure !== undefined) {
        span.style.color = `hsl(${Math.round(120 * Math.max(sure, 0))} 70% 60%)`;  // neg_entropy is below 0
        span.title = sure.toFixed(3);
      }
      return span;
    }));
    head.textContent = `${run.name}: pass ${pass} of ${run.passes.length}`;
    note.textContent = `${run.tokens} tokens, ${run.seconds.toFixed(2)} s, ${Math.round(run.tokens / run.seconds)} tokens/s`;
  }
}
slider.addEventListener("input", () => show(Number(slider.value)));
// page.html#12 opens at pass 12.
function open() {
  slider.value = Number(location.hash.slice(1)) || 0;
  show(Number(slider.value));
}
addEventListener("hashchange", open);
let timer;
document.getElementById("play").addEventListener("click", () => {
  clearInterval(timer);
  slider.value = 0;
  timer = setInterval(() => {
    if (Number(slider.value) >= Number(slider.max)) clearInterval(timer);
    slider.value = Number(slider.value) + 1;
    show(Number(slider.value));
  }, 120);
});
open();
</script></html>
"""


def write(path, model, prompt, result, frames, options):
    """Writes the page of a generation of one prompt; `frames` are its passes' Decoded, `options` what `generate` was given.

    Decodes the prompt once more for the right column, one token a pass (block 1, block-causal, cached), with the same sampling and
    the same control, but for what is about the passes of a block; after random tokens too from masks, at the temperature that the
    left column begins with.
    """
    kept = (
        "length", "temperature", "top_p", "top_k", "seed", "banned", "required", "style", "exact", "guidance",
        "guidance_final", "negative_prompt", "adaptive", "classifier", "classifier_scale", "logit_bias", "eos_bias",
        "implementation",
    )  # fmt: skip
    if options.get("noise_budget") is not None:
        options = dict(temperature=generate.HEAT) | options
    options = {name: options[name] for name in kept if name in options}
    singly = []
    one_by_one = generate.generate(
        model, [prompt], block=1, steps=1, attend="blocks", cache=True, on_pass=singly.append, **options
    )
    runs = [run(model, "Block by block", result, frames), run(model, "Token by token", one_by_one, singly)]
    # `<` could end the script element that the data stands in.
    content = PAGE.replace("DATA", json.dumps(runs).replace("<", "\\u003c"))
    checkpoint.write_atomic(path, content.encode())


def run(model, name, result, frames):
    """One column: the given words and for each pass what it wrote, [[place, word, confidence], ...]; the word of a mask is null.

    A character's bytes may be several tokens, so a token may show another word though a pass wrote beside it only: there the
    confidence is null.
    """
    config, _, tokenizer = model
    begin = int(result.board.start[0])

    def shown(tokens):
        return [None if t == config.mask_id else word for t, word in zip(tokens, words(tokenizer, tokens))]

    before = result.board.tokens[0, begin:].tolist()
    given = old = shown(before)
    passes = []
    for frame in frames:
        tokens, sure = np.asarray(frame.tokens)[0, begin:].tolist(), np.nan_to_num(np.asarray(frame.confidence)[0, begin:])
        new, writes = shown(tokens), []
        for place, token in enumerate(tokens):
            wrote = token != before[place]
            if wrote or new[place] != old[place]:
                writes.append([place, new[place], round(float(sure[place]), 4) if wrote else None])
        passes.append(writes)
        before, old = tokens, new
    return {"name": name, "given": given, "passes": passes, "tokens": result.tokens, "seconds": result.seconds}
