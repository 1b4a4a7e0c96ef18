"""The contrastive explainer: which silent windows it shows, and that none of them is ever scored."""

from dataclasses import replace

import numpy as np
import pytest
from examples_corpus import random_store
from planted import ID, WORDS, planted, resources, run

from autointerp.errors import ConfigError
from autointerp.examples.selection import SelectionConfig, Selector
from autointerp.explainers.contrastive import Contrastive, ContrastiveConfig, hardest, reserved
from autointerp.explainers.default import Default
from autointerp.jobs.methods import build_explainer
from autointerp.llm.fake import FakeEngine
from autointerp.prompts import load_prompt
from autointerp.records import Examples

GOOD = "EXPLANATION: the word path after os."


def explained(latent=None, script=lambda request: GOOD, config=None, **engine):
    fake = FakeEngine(script, **engine)
    [row] = run(Contrastive(ContrastiveConfig(**(config or {}))).explain(latent or planted(), resources(fake)))
    return row, fake


def parts(request):
    """The excerpts under the two headings."""
    active, silent = request.prompt.messages[-1][1].split("It stayed silent in these ")
    return ([line.split(": ", 1)[1] for line in part.splitlines() if line.startswith("Excerpt ")] for part in (active, silent))


def silent_windows(*rows, start=0):
    tokens = np.array([[ID[word] for word in row] for row in rows], np.uint32)
    num, width = tokens.shape
    return Examples(
        tokens=tokens,
        activations=np.zeros(tokens.shape, np.float32),
        lengths=np.full(num, width, np.int32),
        positions=(start + np.arange(num)) * width,
        documents=np.arange(num),
        quantiles=np.full(num, -1, np.int16),
        sources=("random",) * num,
    )


def test_shows_both_under_their_headings():
    row, engine = explained()
    active, silent = parts(engine.requests[0])
    assert (len(active), len(silent)) == (40, 10)
    assert all("<<" in text for text in active) and not any("<<" in text for text in silent)
    assert (row.status, row.text, row.num_examples, row.num_negatives) == ("ok", "the word path after os.", 40, 10)
    assert (row.explainer, row.prompt_id) == ("contrastive", load_prompt("explain/contrastive").prompt_id)
    _, engine = explained(config={"num_negatives": 3})
    assert len(list(parts(engine.requests[0]))[1]) == 3


def test_the_scored_windows_change_nothing():
    latent = planted()
    other = replace(latent, positives=Examples.empty(16), negatives=Examples.empty(16))
    assert explained(latent)[1].requests == explained(other)[1].requests


def test_hardest_first_by_hand():
    """The latent fires on `path` (8 in all) and on ` cat` (2)."""
    width = ["path", " cat", " the", " the"]
    shown = silent_windows(width, width)
    shown = replace(shown, activations=np.array([[4, 1, 0, 0]] * 2, np.float32), sources=("positive",) * 2)
    own = silent_windows([" the"] * 4, [" cat", " cat", " cat", " sat"], ["path", " the", " the", " the"], start=100)
    counted = silent_windows([" cat", "path", " the", " sat"], [" of", " of", " of", " of"], start=200)
    latent = replace(planted(), explain=shown, explain_negatives=own, explain_statistics=shown.joined(counted))
    words = [[WORDS[t] for t in row] for row in hardest(latent, 4).tokens]
    # 10, 8, 2 (a token counts once), 0: of equals the first position.
    assert words == [[" cat", "path", " the", " sat"], ["path", " the", " the", " the"], [" cat"] * 3 + [" sat"], [" the"] * 4]


def test_a_window_in_both_samples_is_shown_once_and_an_activating_one_never():
    latent = planted()
    both = replace(latent, explain_statistics=latent.explain_statistics.joined(latent.explain_negatives))
    assert len(reserved(both)) == len(reserved(latent)) == 110
    assert set(reserved(both).sources) == {"random"} and not reserved(both).activations.any()


@pytest.mark.parametrize("source", ["random", "same_token"])
def test_no_scorer_ever_sees_what_is_shown_whatever_the_counts(source):
    store = random_store(seed=4, num_documents=200, tokens=60, rate=0.02)
    shown, scored = set(), set()
    for num in (10, 40, 100_000):
        counts = {"num_positives": num, "num_negatives": num, "num_explain_negatives": num, "num_statistics": num}
        latent = Selector(store, SelectionConfig.parse({**counts, "window": 8, "min_window": 3, "negatives": [source]})).select(
            "sae", 0
        )
        assert latent.status == "ok"
        shown |= set(hardest(latent, num).documents.tolist())
        scored |= set(latent.negatives.documents.tolist()) | set(latent.positives.documents.tolist())
    assert len(shown) > 20 < len(scored)
    assert not shown & scored


def test_without_silent_windows_nothing_is_asked():
    latent = planted()
    bare = replace(latent, explain_negatives=Examples.empty(16), explain_statistics=latent.explain_statistics.take(range(100)))
    row, engine = explained(bare)
    assert (row.status, row.text, row.num_examples, engine.requests) == ("not_applicable", None, 0, [])


def test_a_small_context_costs_activating_windows():
    row, engine = explained(context_tokens=6500)  # the fake tokenizes by bytes
    active, silent = parts(engine.requests[0])
    assert 5 <= len(active) < 40 and len(silent) == 10
    assert (row.status, row.num_examples, row.num_negatives) == ("ok", len(active), 10)
    row, engine = explained(context_tokens=3000)
    assert (row.status, row.num_examples, row.num_negatives, engine.requests) == ("too_long", 0, 0, [])


def test_configuration():
    built = build_explainer("contrastive", {"num_negatives": 5, "threshold": 0.5})
    assert built.needs.engine and built.identity() != Contrastive().identity() != Default().identity()
    with pytest.raises(ConfigError, match="no prompt with reasoning"):
        build_explainer("contrastive", {"reasoning": True})
    with pytest.raises(ConfigError, match="unknown variable 'num_silent'"):
        build_explainer("default", {"prompt": "explain/contrastive"})
