"""``coder check``: whether a coder is read right, by what it does on a subject and a corpus."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autointerp.coders.coder import CoderSpec
from autointerp.config import Config
from autointerp.errors import InputError
from autointerp.jobs.coder_checks import Check, coder_checks
from autointerp.jobs.readings import CoderConfig, reading_of, target_of
from autointerp.subject.corpus import Corpus, CorpusConfig
from autointerp.subject.fidelity import Fidelity, Site, measure
from autointerp.subject.model import load_subject


class CheckConfig(Config):
    """What to check, and on what."""

    source: str
    """The coder; see `coders.load`."""
    subject: str
    hookpoint: str | None = None
    """By default what the coder's files say."""
    corpus: CorpusConfig = CorpusConfig(num_tokens=16_384)
    device: str = "auto"
    dtype: str = "auto"
    batch_tokens: int = 2048


@dataclass(frozen=True)
class CheckReport:
    """Where the coder was put, what was measured, and every check."""

    spec: CoderSpec
    site: Site
    fidelity: Fidelity
    checks: tuple[Check, ...]

    @property
    def failed(self) -> list[Check]:
        """The checks that were not met."""
        return [check for check in self.checks if check.is_passed is False]


def check_coder(config: CheckConfig | Mapping[str, Any]) -> CheckReport:
    """Put the coder on the subject, run the corpus through both, and apply the checks of `jobs.coder_checks`.

    Raises: InputError when the coder does not fit the subject, or does not say what it predicts.
    """
    if not isinstance(config, CheckConfig):
        config = CheckConfig.parse(config, where="coder check")
    subject = load_subject(config.subject, device=config.device, dtype=config.dtype)
    reading = reading_of(CoderConfig(name="coder", source=config.source, hookpoint=config.hookpoint), subject)
    spec = reading.coder.spec
    if not spec.reconstructs:
        raise InputError(f"{config.source} was not made to reconstruct anything, so there is nothing to check")
    target = target_of(reading, subject)
    if spec.is_transcoder and target is None:
        raise InputError(f"the files of {config.source} do not say which module's output it predicts, so it cannot be checked")
    site = Site(reading.hookpoint, target or reading.hookpoint)
    subject.check_width(reading.hookpoint, spec.d_in, what=f"coder {config.source}")
    corpus = Corpus(config.corpus, subject.tokenizer, num_embeddings=subject.num_embeddings, mark_template=False)
    contexts = list(corpus.contexts())
    found = measure(subject, reading.coder.to(subject.device), site, contexts, batch_tokens=config.batch_tokens)
    return CheckReport(spec, site, found, tuple(coder_checks(spec, found)))
