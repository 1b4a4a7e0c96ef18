"""Which controls a command means."""

import pytest

from autointerp.errors import ConfigError
from autointerp.jobs.controls import Control, parse_controls


def test_of_every_coder_or_of_one():
    found = parse_controls(["random-coder", "reinit-subject:b", "random-coder:a"], ["a", "b"], seed=0)
    assert found == [
        Control("random-coder", "a", "a-random"),
        Control("random-coder", "b", "b-random"),
        Control("reinit-subject", "b", "b-reinit"),
    ]
    assert [control.name for control in parse_controls(["random-coder"], ["a"], seed=7)] == ["a-random7"]
    assert parse_controls([], ["a"], seed=0) == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("random-coder:saa", "is of a coder that is not given; did you mean 'sae'"),
        ("random", "control 'random' is not known; did you mean 'random-coder'"),
        ("reinit-subject", "would be named 'sae-reinit', which is a coder's name"),
    ],
)
def test_what_is_no_control(text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        parse_controls([text], ["sae", "sae-reinit"], seed=0)
