"""What a results folder holds and what is left to do, told from the folder alone: no store, no engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from autointerp.jobs.gate import merged
from autointerp.jobs.plan import Items, read_plan
from autointerp.jobs.progress import span
from autointerp.jobs.score_controls import sampled
from autointerp.jobs.shards import LEASE_EXPIRY_S, Leases
from autointerp.results.folder import STAGES, Method, ResultsFolder, Stage, shard_name
from autointerp.results.write import Marker, read_markers

_RATE_WINDOW_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class MethodStatus:
    """State of one explainer, or of one scorer of an explainer's rows."""

    stage: str
    method: str
    """Folder name."""
    explainer: str | None
    model: str
    num_shards: int
    num_done: int
    num_partial: int
    num_leased: int
    """Shards that a live worker holds now."""
    num_latents: int
    num_finished: int
    rows_by_status: Mapping[str, int]
    failures: Mapping[str, int]
    """Latents by what went wrong."""
    unscored: Mapping[str, int]
    """Single examples without a verdict, by status."""
    errors: Mapping[str, int]
    """Failed requests, by kind of error; also those that were answered later."""
    num_sent: int
    num_logged: int
    num_failed: int
    usage: Mapping[str, int]
    seconds: float
    """Working time of all workers."""
    shards_per_hour: float | None
    """Over the last hour of work; None before two shards are done."""
    eta_s: float | None

    @property
    def num_left(self) -> int:
        """Shards that are neither done nor partial nor held."""
        return max(self.num_shards - self.num_done - self.num_partial - self.num_leased, 0)


@dataclass(frozen=True, kw_only=True)
class Status:
    """State of a results folder."""

    path: str
    store_id: str
    num_planned: int
    num_requested: int
    num_plan_shards: int
    methods: tuple[MethodStatus, ...]

    @property
    def is_complete(self) -> bool:
        """Whether every planned latent has final rows of every method that was started."""
        return all(method.num_done == method.num_shards for method in self.methods)

    def text(self) -> str:
        """Return the state for people, a few lines per method."""
        lines = [
            f"{self.path}: {self.num_planned} latents planned in {self.num_plan_shards} shards, {self.num_requested} of them "
            "to score"
        ]
        for method in self.methods:
            lines += ["", *_lines(method)]
        if not self.methods:
            lines.append("nothing was started yet")
        return "\n".join(lines)


def status(path: Path | str, *, lease_expiry_s: float = LEASE_EXPIRY_S) -> Status:
    """Return the state of the results folder at `path`.

    Raises: StoreError when there is none, or a part of it is damaged.
    """
    folder = ResultsFolder.open(path)
    plan = read_plan(folder)
    leases = Leases(folder.leases, expiry_s=lease_expiry_s)
    items = {stage: plan.items(stage) for stage in STAGES}
    methods = []
    for stage in STAGES:
        for method in folder.methods(stage):
            num = method.settings.get("num_sampled")
            scope = sampled(plan, num, seed=int(method.settings["selection"]["seed"])) if num is not None else None
            theirs = items[stage] if scope is None else plan.items(stage, scope)
            methods.append(_method_status(folder, stage, method, theirs, leases))
    return Status(
        path=str(folder.path),
        store_id=str(folder.identity()["store_id"]),
        num_planned=len(items["explain"]),
        num_requested=len(items["score"]),
        num_plan_shards=len(plan.shards),
        methods=tuple(methods),
    )


def _method_status(folder: ResultsFolder, stage: Stage, method: Method, items: Items, leases: Leases) -> MethodStatus:
    markers = read_markers(folder, stage, method.label)
    # A control that is run on a sample finishes a shard with its share of the shard's latents.
    wanted = {shard: items.num_wanted_in(shard) for shard in items.wanted_shards}
    done = [m for shard, m in markers.items() if shard in wanted and (m.is_done or m.num_finished >= wanted[shard] > 0)]
    is_done = {marker.shard for marker in done}
    open_shards = [shard for shard in wanted if shard not in is_done]
    leased = [shard for shard in open_shards if leases.held_by_others(f"{stage}/{method.label}/{shard_name(shard)}")]
    rows: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    unscored: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    usage: dict[str, int] = {}
    for marker in markers.values():
        rows.update(marker.rows_by_status)
        failures.update(marker.failures)
        unscored.update(marker.unscored)
        errors.update(marker.errors)
        usage = merged(usage, marker.usage)
    rate = _rate(done)
    left = len(open_shards)
    return MethodStatus(
        stage=stage,
        method=method.label,
        explainer=method.explainer,
        model=method.model,
        num_shards=len(wanted),
        num_done=len(done),
        num_partial=sum(shard in open_shards and shard not in leased for shard in markers),
        num_leased=len(leased),
        num_latents=items.num_wanted,
        num_finished=sum(marker.num_finished for marker in markers.values()),
        rows_by_status=dict(sorted(rows.items())),
        failures=dict(sorted(failures.items())),
        unscored=dict(sorted(unscored.items())),
        errors=dict(sorted(errors.items())),
        num_sent=sum(marker.num_sent for marker in markers.values()),
        num_logged=sum(marker.num_logged for marker in markers.values()),
        num_failed=sum(marker.num_failed for marker in markers.values()),
        usage=usage,
        seconds=sum(marker.seconds for marker in markers.values()),
        shards_per_hour=rate,
        eta_s=left / rate * 3600 if rate and left else (0.0 if not left else None),
    )


def _rate(done: list[Marker]) -> float | None:
    """Shards per hour over the last hour of work, all workers together; breaks between runs do not count."""
    if len(done) < 2:
        return None
    times = sorted(marker.finished_at for marker in done)
    recent = [t for t in times if t >= times[-1] - _RATE_WINDOW_S]
    if len(recent) > 1 and recent[-1] > recent[0]:
        return (len(recent) - 1) / (recent[-1] - recent[0]) * 3600
    seconds = sum(marker.seconds for marker in done)
    return len(done) / seconds * 3600 if seconds else None


def _lines(method: MethodStatus) -> list[str]:
    of = f" of {method.explainer}" if method.explainer else ""
    lines = [
        f"{method.stage} {method.method}{of} ({method.model})",
        f"  shards      {method.num_done} of {method.num_shards} done, {method.num_partial} partial, "
        f"{method.num_leased} in work, {method.num_left} left",
        f"  latents    {method.num_finished} of {method.num_latents}",
    ]
    if method.rows_by_status:
        lines.append("  rows       " + ", ".join(f"{n} {name}" for name, n in method.rows_by_status.items()))
    if method.num_sent or method.num_logged:
        tokens = method.usage
        lines.append(
            f"  requests   {method.num_sent} sent, {method.num_failed} failed, {method.num_logged} from the log; tokens: "
            f"{tokens.get('prompt_tokens', 0)} prompt ({tokens.get('cached_tokens', 0)} cached), "
            f"{tokens.get('output_tokens', 0)} output"
        )
    for title, counts in (("failures", method.failures), ("no verdict", method.unscored), ("errors", method.errors)):
        if counts:
            lines.append(f"  {title:<11}" + ", ".join(f"{n} {name}" for name, n in counts.items()))
    if method.shards_per_hour and method.num_done < method.num_shards:
        eta = f", {span(method.eta_s)} left" if method.eta_s is not None else ""
        lines.append(f"  speed      {method.shards_per_hour:.1f} shards/h{eta}")
    return lines
