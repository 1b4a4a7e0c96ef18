"""Which coder reads what: the coders of a `cache` call on their hookpoints, and the controls made of them.

Coder and hookpoint are a :class:`~autointerp.subject.recorder.Reading`; a control of the subject carries a subject of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from autointerp.coders.inputs import Matched
from autointerp.coders.load import load_coder
from autointerp.coders.random_coder import random_coder
from autointerp.config import Config
from autointerp.errors import InputError
from autointerp.jobs.controls import RANDOM_CODER, REINIT_MATCHED, Control
from autointerp.store.manifest import CoderRecord
from autointerp.subject.corpus import Context
from autointerp.subject.model import Subject
from autointerp.subject.neurons import KIND as NEURONS
from autointerp.subject.neurons import neurons
from autointerp.subject.recorder import Reading, Recorder
from autointerp.subject.reinit import reinitialised

CONTROL_CONTEXTS = 32
"""Contexts on which what a control must match is measured."""


class CoderConfig(Config):
    """One coder and where it reads."""

    name: str
    """Short, unique within the store; a folder name."""
    source: str
    """Folder, hub id, ``directions:FILE``, ``module:function``, see `coders.load`; ``neurons:MODULE``, `subject.neurons`."""
    hookpoint: str | None = None
    """``MODULE.PATH[@in|@out]``; by default what the coder's files say."""


def reading_of(config: CoderConfig, subject: Subject) -> Reading:
    """Return the coder, reading through the rules of its hook, and the full name of the hookpoint it reads.

    Raises: InputError when no file says it, or the subject has no such hookpoint.
    """
    if config.source.startswith(f"{NEURONS}:"):
        coder = neurons(subject, config.source)
        if config.hookpoint is not None:
            raise InputError(f"coder {config.name!r} names the module it reads itself; leave @@{config.hookpoint} out")
        assert coder.spec.hookpoint is not None
        return Reading(coder, coder.spec.hookpoint)
    coder = load_coder(config.source, hookpoint=config.hookpoint)
    hookpoint = config.hookpoint or coder.spec.hookpoint
    if hookpoint is None:
        raise InputError(
            f"the files of coder {config.name!r} do not say which hookpoint it reads; "
            f"give one as {config.name}={config.source}@@HOOKPOINT"
        )
    try:
        found = subject.published(hookpoint, default_side="in" if coder.spec.is_transcoder else "out")
    except InputError as error:
        raise InputError(f"coder {config.name!r}: {error}") from None
    return Reading(coder.reading_through(*found.inputs), found.hookpoint)


def record_of(reading: Reading, subject: Subject, *, control_of: str | None = None) -> CoderRecord:
    """Return what the store keeps of a coder; `control_of` names the coder that it is a control of."""
    spec = reading.coder.spec
    return CoderRecord(
        digest=spec.digest,
        width=spec.width,
        hookpoints=(reading.hookpoint,),
        target=target_of(reading, subject),
        activation=spec.activation,
        k=spec.k,
        reading=dict(spec.reading),
        format=spec.format,
        source=spec.source,
        revision=spec.revision,
        d_in=spec.d_in,
        d_out=spec.d_out,
        is_transcoder=spec.is_transcoder,
        control_of=control_of,
        labels=spec.labels,
    )


def target_of(reading: Reading, subject: Subject) -> str | None:
    """Return the full name of what a transcoder predicts: where its files name the module it reads, that module's output."""
    spec = reading.coder.spec
    if spec.target is None:
        return None
    module, at, _ = spec.target.rpartition("@")
    if spec.hookpoint is not None and at and module == spec.hookpoint.rpartition("@")[0]:
        return f"{reading.hookpoint.rpartition('@')[0]}@out"
    try:
        return subject.resolve(spec.target)
    except InputError:
        return None


class ControlMaker:
    """Makes controls of coders that are loaded; the subject's untrained twin is made once."""

    def __init__(
        self, subject: Subject, *, seed: int, contexts: Sequence[Context], recorder: Callable[[Mapping[str, Reading]], Recorder]
    ) -> None:
        """`contexts`: what a control must match is measured on these; `recorder` runs readings on them."""
        self._subject, self._seed, self._contexts, self._recorder = subject, seed, contexts, recorder
        self._untrained: Subject | None = None

    def make(self, control: Control, reading: Reading, *, source: str, k: int | None = None) -> Reading:
        """Return the control of a coder that was loaded from `source`; `k` of a random coder, where it is known already."""
        if control.kind == RANDOM_CODER:
            k = reading.coder.spec.k or k or self._measured_k(reading)
            return Reading(random_coder(reading.coder, k=k, seed=self._seed), reading.hookpoint)
        untrained = self._untrained = self._untrained or reinitialised(self._subject, seed=self._seed)
        coder = neurons(untrained, source) if source.startswith(f"{NEURONS}:") else reading.coder
        drawn: dict[str, Any] = {"weights": "drawn anew", "seed": self._seed}
        if control.kind == REINIT_MATCHED:
            drawn["matched_on_contexts"] = CONTROL_CONTEXTS
        coder = replace(coder, spec=replace(coder.spec, reading={**coder.spec.reading, "subject": drawn}))
        made = Reading(coder, reading.hookpoint, untrained)
        if control.kind == REINIT_MATCHED:
            return replace(made, coder=coder.reading_through(self._matching(reading, made)))
        return made

    def _matching(self, trained: Reading, untrained: Reading) -> Matched:
        """Return the rule that gives the untrained subject's vectors the mean and spread of the trained one's."""
        moments = self._recorder({"trained": trained, "untrained": untrained}).moments(self._contexts)
        (wanted_mean, wanted), (mean, spread) = moments["trained"], moments["untrained"]
        if not spread:
            raise InputError(f"hookpoint {untrained.hookpoint} has one and the same vector on every token of the new weights")
        return Matched(mean_D=mean, wanted_mean_D=wanted_mean, scale=wanted / spread)

    def _measured_k(self, reading: Reading) -> int:
        """Return the mean number of active latents of a coder over the kept tokens, at least 1."""
        recorder = self._recorder({"coder": reading})
        total = sum(len(acts.latents) for _, found in recorder.batches(self._contexts) for acts in found)
        return max(1, round(total / max(1, recorder.num_kept(self._contexts))))
