"""Ways of decoding side by side on held-out function headers: passes, speed, and how good what they write is."""

import numpy as np

from dlm_kernels.denoiser import evaluate, generate, losses

IN_BLOCKS = dict(attend="blocks", cache=True)
# Ways to write from left to right, with keys and values cached; the second is in blocks of 16, 4 passes each.
IN_ORDER = {
    "left to right": dict(block=1, steps=1, **IN_BLOCKS),
    "blocks of 16": dict(block=16, steps=4, **IN_BLOCKS),
}
STUDENTS = ("student-8", "student-2")  # of the model that comes with the package
# Options of `generate.generate`, and with "model" who decodes. The first is autoregression by the same model.
DECODERS = {
    "one token at a time": IN_ORDER["left to right"],
    "blocks of 16, 4 passes each": IN_ORDER["blocks of 16"],
    "32 passes": dict(steps=32),
    "32 passes, dual cache": dict(steps=32, cache=True),
    "32 passes, dual cache renewed every 4": dict(steps=32, cache=True, refresh=4),
    "32 steps, 3 drafts": dict(steps=32, drafts=3),
    "32 steps, student-8 drafting 3": dict(steps=32, drafts=3, drafter="student-8"),
    "above 0.5": dict(threshold=0.5),
    "factor 4": dict(factor=4.0),
    "entropy budget 8": dict(entropy_budget=8.0),
    "32 passes, guidance 2": dict(steps=32, guidance=2.0),
    "guidance 2, once a block": dict(steps=32, guidance=2.0, guidance_refresh=64),
    "guidance 2 falling to 1": dict(steps=32, guidance=2.0, guidance_final=1.0),
    "guidance 2 while half is masked": dict(steps=32, guidance=2.0, guidance_interval=(0.5, 1.0)),
    "guidance 2, A-CFG 0.3": dict(steps=32, guidance=2.0, adaptive=0.3),
    "32 passes, editing above 0.5": dict(steps=32, edit_threshold=0.5),
    "32 passes, a fifth remasked": dict(steps=32, remask=0.2),
    "32 passes, ReMDM cap 0.1": dict(steps=32, remask=0.1, remask_rule="cap"),
    "8 passes": dict(steps=8),
    "8 passes, then at most 16 that edit above 0.5": dict(steps=8, edit_threshold=0.5, edit_passes=16),
    "student-8, 8 passes": dict(steps=8, model="student-8"),
    "2 passes": dict(steps=2),
    "student-2, 2 passes": dict(steps=2, model="student-2"),
}


def written(models, name, way, headers, *, length, implementation=None):
    """(Generation, numbers) of `length` greedy tokens after each of the headers, in one batch; numbers: see `judged`."""
    made = generate.generate(models[name], headers, length=length, exact=True, implementation=implementation, **way)
    return made, judged(models, [made], length=length, implementation=implementation)


def same_tokenizer(a, b):
    """Of two models (config, params, tokenizer)."""
    return a[2] is b[2] or a[2].to_str() == b[2].to_str()


def judged(models, made, *, length, implementation=None):
    """What the `length` last tokens of each row of some Generations are worth, by the first of the models.

    parse_share: of the texts, their last and perhaps unfinished line left out; beginning_share: with those that could go on, whose
    docstring or bracket is open where they are cut; teacher_bits_per_token: how probable the judge finds what was written, from
    left to right, where low is fluent or repetitive; distinct_share tells which: of a text's tokens those that are the first of
    their kind. Raises ValueError where the models' tokenizers differ: the judge would take ids for other words.
    """
    judge, *_ = models.values()
    for name, model in models.items():
        if not same_tokenizer(model, judge):
            raise ValueError(f"models: expected {name} to have the tokenizer of {next(iter(models))}, who judges, got another")
    texts = [text for one in made for text in one.texts]
    rows = [row for one in made for row in one.decoded.tokens]
    width = max(map(len, rows))
    tokens = np.array([np.pad(row, (width - len(row), 0), constant_values=judge[0].pad_id) for row in rows])
    lines = [text.rpartition("\n")[0] for text in texts]
    return {
        "parse_share": evaluate.parse_share(lines),
        "beginning_share": evaluate.parse_share(lines, unfinished=True),
        "teacher_bits_per_token": evaluate.left_to_right_bits(judge, tokens, length, implementation=implementation),
        "distinct_share": float(np.mean([len(set(row)) / length for row in tokens[:, -length:].tolist()])),
    }


def decoding(models, texts, *, prompts=64, length=64, decoders=None, report=None, implementation=None):
    """What each of `decoders` takes and gives: a list of dicts, a row each; report(row) is called as they come.

    models: {name: model}; the first decodes where no "model" is named. decoders: default those of DECODERS whose models are there;
    a drafter has the shape of whom it drafts for. passes and tokens_per_second: the mean over the headers, each at batch 1;
    times_first: that speed over the first decoder's. The rest: see `judged`. Raises ValueError, before anything is decoded, for a
    judge that attends by blocks.
    """
    losses.check_blocks(next(iter(models.values()))[0])
    headers = evaluate.held_out_headers(texts, prompts)
    if decoders is None:
        decoders = {name: way for name, way in DECODERS.items() if _named(way) <= models.keys()}
    named = set().union(*map(_named, decoders.values()))
    if not named <= models.keys():
        raise ValueError(f"models: expected {sorted(named)} among them, whom the ways to decode name, got {list(models)}")
    first = next(iter(models))
    for way in decoders.values():
        name, drafter = way.get("model", first), way.get("drafter")
        if drafter and models[drafter][0] != models[name][0]:
            raise ValueError(f"models: expected {drafter} to have the shape of {name}, for whom it drafts, got another")
    rows = []
    for decoder, way in decoders.items():
        way = dict(block=length) | way
        name = way.pop("model", first)
        if "drafter" in way:
            way["drafter"] = models[way["drafter"]][1]
        options = dict(length=length, exact=True, implementation=implementation, **way)
        singly = [generate.generate(models[name], [header], **options) for header in headers]
        passes, tokens, seconds = (sum(getattr(made, n) for made in singly) for n in ("passes", "tokens", "seconds"))
        row = {"decoder": decoder, "passes": round(passes / len(headers), 1), "tokens_per_pass": round(tokens / passes, 2)}
        row["tokens_per_second"] = tokens / seconds
        row["times_first"] = row["tokens_per_second"] / rows[0]["tokens_per_second"] if rows else 1.0
        rows.append(row | judged(models, singly, length=length, implementation=implementation))
        if report:
            report(rows[-1])
    return rows


def _named(way):
    return {way[role] for role in ("model", "drafter") if role in way}


def by_steps(models, texts, *, steps=(32, 8, 2), prompts=64, cases=256, length=64, report=None, implementation=None):
    """What a model and its students write in few passes: a list of dicts, a row for each model and number of steps.

    The first rows are the first model's, IN_ORDER: one token a pass, and block after block. hole_of_8 and hole_of_4: see
    `evaluate.infilling`, in as many passes as there are tokens at most. The rest: see `judged`. report(row) is called as they
    come. Raises ValueError as `decoding`.
    """
    losses.check_blocks(next(iter(models.values()))[0])
    headers = evaluate.held_out_headers(texts, prompts)
    options = dict(implementation=implementation)
    first, bits, holes = next(iter(models)), {}, {}
    ways = [(first, name, way) for name, way in IN_ORDER.items()]
    ways += [(name, count, dict(block=length, steps=count)) for name in models for count in steps]
    rows = []
    for name, count, way in ways:
        made, numbers = written(models, name, way, headers, length=length, **options)
        row = {"model": name, "steps": count, "passes": made.passes} | numbers
        if count not in IN_ORDER:
            if name not in bits:
                bits[name] = evaluate.bits_per_byte(models[name], texts, **options)
            row["bits_per_byte"] = bits[name]
            for hole in (8, 4):
                fill = dict(cases=cases, hole=hole, steps=min(count, hole))
                key = (name, *fill.values())
                if key not in holes:
                    holes[key] = evaluate.infilling(models[name], texts, **fill, **options)
                row[f"hole_of_{hole}"] = holes[key]
        rows.append(row)
        if report:
            report(row)
    return rows


_JUDGED_HEAD = "| parses / so far | bits/token | distinct |\n" + "|---" * 8 + "|"
STEPS_HEAD = "| model | passes | bits/byte | hole of 4 | hole of 8 " + _JUDGED_HEAD
DECODING_HEAD = "| decoder | passes | tokens/pass | tokens/s | x first " + _JUDGED_HEAD


def line(row):
    """A row of `by_steps` or `decoding` in Markdown, below STEPS_HEAD or DECODING_HEAD."""
    if "decoder" in row:
        cells = [row["decoder"], row["passes"], f"{row['tokens_per_pass']:.1f}", f"{row['tokens_per_second']:.0f}"]
        cells.append(f"{row['times_first']:.2f}")
    else:
        filled = [row.get(f"hole_of_{hole}") for hole in (4, 8)]
        filled = [f"{h['token_accuracy']:.1%} / {h['exact_match']:.1%}" if h else "–" for h in filled]
        bits = f"{row['bits_per_byte']:.3f}" if "bits_per_byte" in row else "–"
        cells = [f"{row['model']}, {row['steps']}" if row["steps"] in IN_ORDER else row["model"], row["passes"], bits, *filled]
    cells.append(f"{row['parse_share']:.0%} / {row['beginning_share']:.0%}")
    cells += [f"{row['teacher_bits_per_token']:.2f}", f"{row['distinct_share']:.0%}"]
    return "| " + " | ".join(map(str, cells)) + " |"
