"""The commands of docs/methods/saebench.md explain as they say: SAEBench's windows, marks and order, then its 14 texts."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from autointerp import load_explanations, load_scores
from autointerp.cli.main import cli
from autointerp.examples.pools import EXPLAIN
from autointerp.examples.render import highlight
from autointerp.examples.selection import SelectionConfig, Selector
from autointerp.llm.fake import FakeEngine, prompt_text
from autointerp.results.load import load_examples
from autointerp.store import open_store
from tests.integration.test_jobs_store import build_store

PAGE = Path(__file__).parents[2] / "docs" / "methods" / "saebench.md"
[BLOCK] = re.findall(r"^```\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
COMMANDS = [shlex.split(line) for line in BLOCK.replace("\\\n", " ").splitlines()]
SENT = []


class Scripted(FakeEngine):
    """Says that the first two texts fit; keeps what it was asked."""

    def __init__(self, config):
        super().__init__(self.reply)

    def reply(self, request):
        SENT.append(request.prompt.messages[-1][1])
        return "1, 2" if "EXPLANATION:" not in prompt_text(request) else "EXPLANATION: names of things"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return build_store(tmp_path_factory.mktemp("saebench") / "store", power=8)


def test_the_commands_explain_and_score_as_the_page_says(store, tmp_path):
    SENT.clear()
    names = {"STORE": store, "RESULTS": tmp_path / "r", "ENGINE": f"{__name__}:Scripted", "random:1000": "random:12"}
    for program, *arguments in COMMANDS:
        assert program == "autointerp"
        result = CliRunner().invoke(cli, [str(names.get(word, word)) for word in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    explained = [text for text in SENT if text.startswith("The feature responded in these 15 excerpts")]
    assert explained and len(explained) == len([text for text in SENT if "Excerpt 1:" in text])
    assert all(re.findall(r"^(Excerpt|strength)", text, re.MULTILINE) == ["Excerpt"] * 15 for text in explained)
    asked = [text for text in SENT if text.startswith("Description:")]
    assert asked and {len(re.findall(r"^Text \d+:", text, re.MULTILINE)) for text in asked} == {14}
    scores = load_scores(tmp_path / "r").query("is_headline and status == 'ok'")
    assert set(scores["scorer"]) == {"saebench"} and (scores["num_scored"] == 14).all()

    # What was shown, from the flat arrays.
    selector = Selector(open_store(store), SelectionConfig(window=21, centred="middle"))
    tokens, vocabulary = selector.store.tokens, selector.store.vocabulary
    shown = load_examples(tmp_path / "r").query("pool == 'explain'")
    done = load_explanations(tmp_path / "r").query("status == 'ok'")["latent"].tolist()
    assert len(done) >= 8
    places, num_below = [], []
    for latent in done:
        positions, values = selector.store.coder("sae").activations(latent)
        strength = dict(zip(positions.tolist(), np.abs(values).tolist(), strict=True))
        found = []
        for row in shown[shown["latent"] == latent].itertuples():
            window = [strength.get(position, 0) for position in range(row.position, row.position + len(row.pieces))]
            marks = np.array(window) > 0.01 * max(window)
            found.append((max(window), highlight(vocabulary, tokens[row.position : row.position + len(window)], marks)))
            places.append(int(np.argmax(window)))
            assert len(window) <= 21
        found.sort(key=lambda one: -one[0])
        lines = "\n".join(f"Excerpt {nth}: {text}" for nth, (_, text) in enumerate(found, start=1))
        assert any(lines in text for text in explained)
        peaks = [peak for peak, _ in found]
        active, pools = selector.pools("sae", latent)
        mine = active.take(np.flatnonzero(pools.active_pool == EXPLAIN))
        ranked = sorted(mine.strength.tolist(), reverse=True)
        if len(set(mine.text.tolist())) == len(mine):  # of windows that say the same one stands
            assert peaks[:10] == ranked[:10] and set(peaks) <= set(ranked)
            num_below.append(peaks[10:] != ranked[10:15])
    assert sum(num_below) >= 4
    # Elsewhere the document or the context ends within 10 tokens.
    assert np.mean(np.array(places) == 10) > 0.55
