"""A results folder as the stages write it, with texts that try to break out of whatever shows them."""

import inspect
import re
import textwrap

import numpy as np

from autointerp import tables
from autointerp.digest import digest, generator, short
from autointerp.records import Explanation, Score, Verdict

HOSTILE = [
    "</script><script>document.documentElement.dataset.pwned = 1</script>",
    '<img src=x onerror="document.documentElement.dataset.pwned = 1">',
    '" onmouseover="document.documentElement.dataset.pwned = 1" x="',
    "{{ 7 * 7 }}{% raw %}<!--",
    "\u202egnp.exe\u202c \u2067rtl\u2069 \u200b\ufeff",
    "\x1b[2J\x1b]0;owned\x07 \x9b31m \x00 bell\x07 back\x08",
    "a\u0301\u0302\u0303\u0304\u0305\u0306\u0307\u0308\u0309 \u05e9\u05dc\u05d5\u05dd \U0001f469\u200d\U0001f4bb",
    "'; DROP TABLE latents; --\u2028\u2029",
]
PIECES = re.findall(r"\n|\t| *\w+| +|[^\w\s]", inspect.getsource(textwrap))
WINDOW = 32
QUANTILES = 5
JUDGE = "Qwen/Qwen3-8B"
SELECTION = digest("selection")
SCORERS = ("detection", "fuzzing")


def build(folder, *, coders=("sae", "transcoder"), num_latents=24, num_shards=3, windows=20, control=True, density=False):
    """Write plan, explanations, scores, verdicts and examples; return the latents of each coder.

    Of each coder, the latent at index 0 is hostile, 1 has too few examples, 2 is unparseable, 3 has unknown pools, and the
    last is only planned.
    """
    keys = [(coder, 7 * i + 3) for coder in coders for i in range(num_latents)]
    shards = [keys[i::num_shards] for i in range(num_shards)]
    rows = [{"shard": n, "coder": c, "latent": i, "purpose": "requested"} for n, shard in enumerate(shards) for c, i in shard]
    rows += [{"shard": num_shards, "coder": coders[0], "latent": 100_000, "purpose": "partner"}]
    tables.write_parquet(
        folder / "plan" / "part-000000.parquet", tables.PLAN.empty_table().from_pylist(rows, schema=tables.PLAN)
    )
    for number, shard in enumerate(shards):
        _shard(folder, f"shard-{number:06d}.parquet", sorted(shard), num_latents, windows, control, density)
    return {coder: [i for c, i in keys if c == coder] for coder in coders}


def _shard(folder, name, keys, num_latents, windows, control, density):
    explanations = {"default": [], "lexical": []}
    scores, verdicts, examples = {}, {}, []
    for coder, latent in keys:
        index = (latent - 3) // 7
        if index == num_latents - 1:
            continue
        random = generator("report test", coder, latent)
        rows = _examples(coder, latent, index, random, windows)
        if index not in (1, 2):
            examples.extend(rows)
        for explainer in explanations:
            row = _explanation(coder, latent, index, explainer)
            explanations[explainer].append(row)
            label = f"{explainer}-{short(row.explainer_id)}"
            for scorer in SCORERS:
                for under in (None, "shuffled") if control else (None,):
                    judged, graded = _judged(rows, row, scorer, under, index, random)
                    method = f"{scorer}{'-' + under if under else ''}-{short(graded[0].scorer_id)}"
                    scores.setdefault((label, method), []).extend(graded)
                    verdicts.setdefault((label, method), []).extend(judged)
    for explainer, rows in explanations.items():
        label = f"{explainer}-{short(digest(explainer))}"
        table = tables.explanations_table(rows)
        if density:
            rates = [10.0 ** -(2 + 3 * ((row.latent - 3) // 7) / num_latents) for row in rows]
            table = table.set_column(table.schema.get_field_index("density"), "density", [rates])
        tables.write_parquet(folder / "explanations" / label / name, table)
    for (label, method), rows in scores.items():
        tables.write_parquet(folder / "scores" / label / method / name, tables.scores_table(rows))
    for (label, method), rows in verdicts.items():
        tables.write_parquet(folder / "verdicts" / label / method / name, tables.verdicts_table(rows))
    tables.write_parquet(
        folder / "examples" / f"selection-{short(SELECTION)}" / name,
        tables.EXAMPLES.empty_table().from_pylist(examples, schema=tables.EXAMPLES),
    )


def _explanation(coder, latent, index, explainer):
    status = {1: "too_few_examples", 2: "unparseable"}.get(index, "ok")
    text = f"The word after an opening bracket in code that wraps text, number {index}; mostly in argument lists of functions."
    if explainer == "lexical":
        text = f"Fires on the token ' {PIECES[index * 5].strip() or 'self'}', most often after 'self.'"
    if index == 0:
        text = " | ".join(HOSTILE)
    return Explanation(
        coder=coder,
        latent=latent,
        explainer=explainer,
        explainer_id=digest(explainer),
        selection_id=SELECTION,
        status=status,
        text=text if status == "ok" else None,
        rule='{"token": "<b>self</b>"}' if explainer == "lexical" and status == "ok" else None,
        model=JUDGE if explainer == "default" else None,
        prompt_id=digest("prompt") if explainer == "default" else None,
        num_examples=40,
        num_attempts=1,
        explanation_id=digest([coder, latent, explainer]),
    )


def _examples(coder, latent, index, random, windows):
    rows = []
    blocks = [("explain", "positive"), ("score", "positive"), ("score", "random")]
    for pool, source in blocks:
        for i in range(windows):
            start = int(random.integers(0, len(PIECES) - WINDOW))
            pieces = list(PIECES[start : start + WINDOW])
            if index == 0:
                pieces[3:5] = [HOSTILE[i % len(HOSTILE)], ""]
            activations = np.zeros(WINDOW, np.float32)
            quantile = -1
            if source == "positive":
                quantile = i * QUANTILES // windows
                for at in {4, *random.integers(0, WINDOW, 2).tolist()}:
                    activations[at] = (QUANTILES - quantile) * 2 + float(random.random())
            rows.append(
                {
                    "coder": coder,
                    "latent": latent,
                    "selection_id": SELECTION,
                    "pool": pool,
                    "source": source,
                    "quantile": quantile,
                    "position": len(rows) * 100_000 + start,
                    "document": 17 + i,
                    "disjoint": _disjoint(index),
                    "text": "".join(pieces),
                    "pieces": pieces,
                    "activations": activations.tolist(),
                }
            )
    return rows


def _disjoint(index):
    return "unknown" if index == 3 else "context" if index == 4 else "document"


def _judged(examples, explanation, scorer, control, index, random):
    judge = "rule" if explanation.explainer == "lexical" else JUDGE
    scorer_id = digest([explanation.explainer, scorer, judge, control])
    common = {
        "coder": explanation.coder,
        "latent": explanation.latent,
        "scorer": scorer,
        "scorer_id": scorer_id,
        "control": control,
        "explanation_id": explanation.explanation_id if control is None else digest("partner"),
    }
    shared = common | {
        "base_id": digest([explanation.explainer, scorer, judge, None]),
        "selection_id": SELECTION,
        "judge": judge,
        "explainer": explanation.explainer,
        "negatives": "random",
        "disjoint": _disjoint(index),
        "ci_method": "mover_wilson",
    }
    if explanation.status != "ok":
        empty = {"value": None, "ci_low": None, "ci_high": None, "chance": None, "num_scored": 0, "quantile": None}
        row = Score(**shared, **empty, metric="balanced_accuracy", is_headline=True, status=explanation.status)
        return [], [row]
    skill = 0.5 if control else 0.6 + 0.38 * ((index * 7) % 10) / 10
    asked = [row for row in examples if row["pool"] == "score"]
    verdicts = []
    for i, row in enumerate(asked):
        truth = row["source"] == "positive"
        drop = 0.05 * row["quantile"] if truth else 0
        lost = i == 5 and scorer == "fuzzing"
        right = bool(random.random() < skill - drop)
        verdicts.append(
            Verdict(
                **common,
                example_idx=i,
                position=row["position"],
                document=row["document"],
                source=row["source"],
                quantile=row["quantile"],
                truth=truth,
                answer=None if lost else truth == right,
                probability=None if lost else float(random.random()),
                status="unparseable" if lost else "ok",
            )
        )
    scored = [v for v in verdicts if v.answer is not None]
    tpr, tnr = (float(np.mean([v.answer == v.truth for v in scored if v.truth == t])) for t in (True, False))
    lost = {"unparseable": len(verdicts) - len(scored)} if len(scored) < len(verdicts) else {}

    def metric(name, value, **more):
        values = {"is_headline": False, "quantile": None, "chance": 0.5} | more
        low, high = max(0.0, value - 0.09), min(1.0, value + 0.06)
        return Score(
            **shared,
            **values,
            metric=name,
            status="ok",
            value=value,
            ci_low=low,
            ci_high=high,
            num_scored=len(scored),
            unscored=lost,
        )

    rows = [metric("balanced_accuracy", (tpr + tnr) / 2, is_headline=True), metric("tnr", tnr), metric("tpr", tpr)]
    for quantile in range(QUANTILES):
        hits = [v.answer for v in scored if v.quantile == quantile]
        rows.append(metric("tpr", float(np.mean(hits)) if hits else 0.0, quantile=quantile, chance=None))
    return verdicts, rows
