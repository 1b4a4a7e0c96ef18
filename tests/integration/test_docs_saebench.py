"""The commands of docs/methods/saebench.md explain as they say: SAEBench's windows, marks and order, then its 14 texts."""

import re
import shlex
from pathlib import Path

import numpy as np

from autointerp.cli.explain import command as explain_command
from autointerp.cli.options import resolve
from autointerp.cli.score import command as score_command
from autointerp.examples.pools import EXPLAIN
from autointerp.examples.render import highlight
from autointerp.examples.selection import Selector
from autointerp.jobs.explain import ExplainConfig
from autointerp.jobs.methods import build_explainer, build_scorer
from autointerp.protocols import Resources
from autointerp.store import open_store
from tests.integration.test_jobs_store import build_store

PAGE = Path(__file__).parents[2] / "docs" / "methods" / "saebench.md"
[BLOCK] = re.findall(r"^```\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
EXPLAIN_LINE, SCORE_LINE = (shlex.split(line)[2:] for line in BLOCK.replace("\\\n", " ").splitlines())


def test_the_commands_explain_and_score_as_the_page_says(tmp_path):
    path = build_store(tmp_path / "store", power=8)
    given = explain_command.make_context("explain", EXPLAIN_LINE).params
    values = resolve("explain", None, given["settings"], {"store": path, "results": tmp_path / "r"})
    config = ExplainConfig.parse(values)
    explainer = build_explainer(config.explainer, config.options)
    [name] = score_command.make_context("score", SCORE_LINE).params["scorers"]
    scorer = build_scorer(name, {})
    selector = Selector(open_store(path), config.selection)
    tokens, vocabulary = selector.store.tokens, selector.store.vocabulary
    places, num_weaker = [], 0
    for latent in range(6):
        found = selector.select("sae", latent)
        [request] = explainer.requests(found, Resources(vocabulary=vocabulary, seed=0))
        positions, values = selector.store.coder("sae").activations(latent)
        strength = dict(zip(positions.tolist(), np.abs(values).tolist(), strict=True))
        lines, peaks = [], []
        for nth, (start, length) in enumerate(zip(found.explain.positions, found.explain.lengths, strict=True), start=1):
            window = [strength.get(position, 0) for position in range(start, start + length)]
            marks = np.array(window) > 0.01 * max(window)
            lines.append(f"Excerpt {nth}: {highlight(vocabulary, tokens[start : start + length], marks)}")
            peaks.append(max(window))
            places.append(int(np.argmax(window)))
            assert length <= 21
        told = request.prompt.messages[-1][1]
        assert len(lines) == 15 and "\n".join(lines) in told and "strength:" not in told
        active, pools = selector.pools("sae", latent)
        ranked = sorted(active.strength[pools.active_pool == EXPLAIN].tolist(), reverse=True)
        assert peaks == sorted(peaks, reverse=True) and peaks[:10] == ranked[:10] and set(peaks) <= set(ranked)
        num_weaker += peaks[10:] != ranked[10:15]
        items = scorer.items(scorer.judged(found, None, 0), 0)
        assert len(items) == 14 and max(len(item.tokens) for item in items) == 21
    assert num_weaker >= 5
    # Elsewhere the context ends within 10 tokens.
    assert np.mean(np.array(places) == 10) > 0.55
