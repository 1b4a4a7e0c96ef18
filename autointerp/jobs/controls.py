"""Controls of a coder: siblings in the same store, over the same tokens, that no training stands behind.

``random-coder`` reads the same vectors through random directions; ``reinit-subject`` is the same coder on a subject whose
weights are drawn anew; ``reinit-matched`` is that, with the vectors brought to the mean and spread they have in the trained
subject: in vectors of another size a coder sees little but its own biases. A score of a trained coder's latents means something
only as far as it exceeds what its controls score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autointerp.errors import ConfigError, nearest

RANDOM_CODER, REINIT_SUBJECT, REINIT_MATCHED = "random-coder", "reinit-subject", "reinit-matched"
KINDS = {RANDOM_CODER: "random", REINIT_SUBJECT: "reinit", REINIT_MATCHED: "reinit-matched"}
"""Kind of control -> what its name ends in."""


@dataclass(frozen=True)
class Control:
    """One control of one coder."""

    kind: str
    of: str
    """Name of the coder."""
    name: str
    """``CODER-random``, ``CODER-reinit`` or ``CODER-reinit-matched``, with the seed at the end where it is not 0."""


def parse_controls(texts: Sequence[str], coders: Sequence[str], *, seed: int) -> list[Control]:
    """Return the controls named by ``KIND`` (of every coder) or ``KIND:CODER``, each once.

    Raises: ConfigError for an unknown kind or coder, or a name that a coder has already.
    """
    found: dict[str, Control] = {}
    for text in texts:
        kind, colon, of = text.partition(":")
        if kind not in KINDS:
            raise ConfigError(f"control {text!r} is not known; {nearest(kind, KINDS)}, alone or with :CODER")
        if colon and of not in coders:
            raise ConfigError(f"control {text!r} is of a coder that is not given; {nearest(of, coders)}")
        for coder in [of] if colon else coders:
            name = f"{coder}-{KINDS[kind]}{seed or ''}"
            if name in coders:
                raise ConfigError(f"the control {text!r} would be named {name!r}, which is a coder's name; rename the coder")
            found[name] = Control(kind, coder, name)
    return list(found.values())
