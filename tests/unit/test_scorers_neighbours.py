"""Windows that a neighbouring latent lent keep its activations; no scorer may take them for the latent's own."""

from dataclasses import replace

import numpy as np
import pytest
from planted import explained, planted, resources, run, windows
from test_scorers_hostile import bos, obedient

from autointerp.jobs.methods import build_scorer
from autointerp.llm.fake import FakeEngine
from autointerp.records import Text
from autointerp.scorers import REGISTRY
from autointerp.scorers.delphi import DelphiFuzzing
from autointerp.scorers.fuzzing import Fuzzing
from autointerp.scorers.intruder import Intruder

PLACE, WIDTH = 9, 32


class Constant:
    id = "constant"

    def embed(self, texts):
        return np.eye(1, 4).repeat(len(texts), axis=0)


def lent(*, everywhere=()):
    """A latent with 20 windows of a neighbour that fires on token 9, more strongly than the latent ever does."""
    block = windows(20, active=False, seed=9, start=8000, width=WIDTH)
    activations = np.zeros((20, WIDTH), np.float32)
    activations[:, PLACE] = 7
    for row in everywhere:
        activations[row] = 7
    negatives = replace(block, activations=activations, sources=("neighbour_decoder",) * 20)
    return replace(planted(num=20, width=WIDTH), negatives=negatives)


@pytest.mark.parametrize("name", REGISTRY)
def test_a_lent_window_is_a_negative_whatever_fires_there(name):
    engine = FakeEngine(lambda request: bos(request) if isinstance(request.prompt, Text) else obedient(request))
    given = replace(resources(engine), embedder=Constant())
    result = run(build_scorer(name, {}).score(lent(), explained("os.path"), given))
    negatives = [verdict for verdict in result.verdicts if verdict.source == "neighbour_decoder"]
    assert len(negatives) >= 10 and not any(verdict.truth for verdict in negatives)
    assert name != "simulation" or {value for verdict in negatives for value in verdict.truths} == {0.0}
    assert [score.negatives for score in result.scores if score.is_headline] == ["neighbour_decoder"]


def test_marks_are_the_neighbours_own_and_never_the_whole_window_but_as_delphi_has_it():
    latent = lent(everywhere=(4,))
    shown = {
        "fuzzing": [item.mask for item in Fuzzing().items(latent, 0) if not item.truth],
        "delphi_fuzzing": [item.mask for item in DelphiFuzzing().items(latent, 0) if not item.truth],
        "intruder": [task.mask for task in Intruder().items(latent, 0)],
    }
    for name, masks in shown.items():
        own = [np.flatnonzero(mask).tolist() == [PLACE] for mask in masks]
        assert [i for i, is_own in enumerate(own) if not is_own] == [4], name
        assert masks[4].all() if name == "delphi_fuzzing" else 0 < masks[4].sum() < WIDTH // 2, name


def test_a_silent_window_beside_lent_ones_is_not_marked_as_a_whole():
    """delphi looks at the first negative alone, and then marks every token of the silent ones that follow."""
    latent = lent()
    activations = latent.negatives.activations.copy()
    activations[3:6] = 0
    mixed = replace(latent.negatives, activations=activations, sources=("neighbour_decoder", "random") * 10)
    latent = replace(latent, negatives=mixed)
    for scorer in (Fuzzing(), DelphiFuzzing(), Intruder()):
        items = [item for item in scorer.items(latent, 0) if not item.truth]
        assert all(0 < items[i].mask.sum() < WIDTH // 2 for i in range(3, 6)), scorer.name
