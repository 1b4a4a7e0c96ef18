"""The activations-and-logits explainer: which tokens and windows it lists, and that nothing is invented or of another pool."""

from dataclasses import replace

import numpy as np
import pytest
from examples_corpus import ByteVocabulary
from planted import ID, planted, resources, run, windows

from autointerp.errors import ConfigError
from autointerp.explainers.activations_logits import (
    ActivationsLogits,
    ActivationsLogitsConfig,
    peaks,
    promoted_pieces,
    strongest,
)
from autointerp.jobs.methods import build_explainer
from autointerp.llm.fake import FakeEngine
from autointerp.records import Examples

GOOD = 'LABEL: "path" after os.'
PROMOTED = tuple(ID[word] for word in (" join", "_", " join", " the", ">>"))


def a_latent(**changes):
    return replace(planted(), **({"promoted": PROMOTED} | changes))


def explained(latent=None, script=lambda request: GOOD, config=None, **engine):
    fake = FakeEngine(script, **engine)
    [row] = run(ActivationsLogits(ActivationsLogitsConfig(**(config or {}))).explain(latent or a_latent(), resources(fake)))
    return row, fake


def shown(request):
    return request.prompt.messages[-1][1]


def line(request, head):
    return next(text for text in shown(request).splitlines() if text.startswith(head))


def block(rows, values, start=0):
    """Windows of words, with one activation each: (column, value)."""
    tokens = np.array([[ID[word] for word in row] for row in rows], np.uint32)
    activations = np.zeros(tokens.shape, np.float32)
    for row, (column, value) in enumerate(values):
        activations[row, column] = value
    num, width = tokens.shape
    return Examples(
        tokens=tokens,
        activations=activations,
        lengths=np.full(num, width, np.int32),
        positions=(start + np.arange(num)) * width,
        documents=np.arange(num),
        quantiles=np.zeros(num, np.int16),
        sources=("positive",) * num,
    )


def test_the_three_lists_by_hand():
    explain = block([[" the", " cat", " sat"], [" the", " cat", " of"], [" x", " =", " 1"]], [(1, 2.0), (1, 9.0), (2, 5.0)])
    more = block([[" raise", " ValueError", "("]], [(0, -7.0)], start=50)
    latent = a_latent(explain=explain, explain_statistics=more.joined(replace(explain.take([0]), sources=("positive",))))
    row, engine = explained(latent)
    [request] = engine.requests
    # Strongest first, by size: 9, 7, 5, 2; nothing follows the last token of a window.
    assert line(request, "STRONGEST TOKENS:") == 'STRONGEST TOKENS: " cat" (2 times), " raise", " 1"'
    assert line(request, "TOKENS AFTER:") == 'TOKENS AFTER: " of", " ValueError", " sat"'
    assert line(request, "PROMOTED TOKENS:") == 'PROMOTED TOKENS: " join", "_", " the", "> >"'
    excerpts = [text for text in shown(request).splitlines() if text.startswith("Excerpt ")]
    assert excerpts == [
        "Excerpt 1:  the<< cat>> of",
        "Excerpt 2: << raise>> ValueError(",
        "Excerpt 3:  x =<< 1>>",
        "Excerpt 4:  the<< cat>> sat",
    ]
    assert (row.status, row.text, row.num_examples, row.num_negatives) == ("ok", '"path" after os.', 4, 0)


def test_counts_are_bounded_by_the_settings():
    _, engine = explained(config={"num_windows": 6, "num_promoted": 2})
    [request] = engine.requests
    assert shown(request).count("Excerpt ") == 6
    assert line(request, "PROMOTED TOKENS:") == 'PROMOTED TOKENS: " join", "_"'
    assert [float(np.abs(row).max()) for row in strongest(a_latent(), 5).activations] == [4.0] * 5


def test_only_the_explain_pool_is_read():
    others = {name: windows(30, active=True, seed=99, start=9000) for name in ("positives", "validate_positives")}
    others |= {name: windows(30, active=False, seed=98, start=9900) for name in ("negatives", "validate_negatives")}
    assert explained(a_latent(**others))[1].requests == explained()[1].requests


@pytest.mark.parametrize("text", ["LABEL: unclear", "LABEL: Unclear.", 'LABEL: "none"'])
def test_a_model_that_finds_nothing_gets_no_label_of_ours(text):
    row, _ = explained(script=lambda request: text)
    assert (row.status, row.text) == ("not_applicable", None)
    assert row.reason == "the model found nothing that the lists share"


@pytest.mark.parametrize("text", ["LABEL:", "say path", "", "LABEL: " + "x" * 300])
def test_an_unusable_reply_is_no_label(text):
    row, engine = explained(script=lambda request: text)
    assert (row.status, row.text, row.num_attempts) == ("unparseable", None, 2)
    assert "LABEL: followed by one to six words" in shown(engine.requests[1])


def test_without_promoted_tokens_it_says_how_to_make_them():
    with pytest.raises(ConfigError, match="autointerp tables STORE --subject MODEL"):
        explained(planted())


def test_a_split_character_is_shown_whole_or_not():
    euro = "\u20ac".encode()
    vocabulary = ByteVocabulary([b" pay", euro[:1], euro[1:], b" now", b"<s>"], special=(4,))
    examples = replace(
        block([[" the"] * 4], [(1, 3.0)]),
        tokens=np.array([[0, 1, 2, 3]], np.uint32),
    )
    assert peaks(examples, vocabulary) == (["\u20ac"], [" now"])
    assert promoted_pieces([1, 4, 0, 3, 0], vocabulary) == [" pay", " now"]


def test_corpus_text_stays_inside_its_quotes():
    latent = a_latent(promoted=(ID["\n    "], ID[" <<"]))
    _, engine = explained(latent)
    assert line(engine.requests[0], "PROMOTED TOKENS:") == 'PROMOTED TOKENS: "\\n    ", " < <"'


def test_configuration():
    explainer = build_explainer("activations_logits", {})
    assert explainer.needs.logits and explainer.needs.engine
    assert explainer.requests(a_latent(), resources()) == explained()[1].requests
    with pytest.raises(ConfigError, match="no prompt with reasoning"):
        build_explainer("activations_logits", {"reasoning": True})
    with pytest.raises(ConfigError, match="unknown variable 'following'"):
        build_explainer("default", {"prompt": "explain/activations_logits"})
