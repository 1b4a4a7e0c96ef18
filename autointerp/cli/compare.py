"""``autointerp compare``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("compare")
@click.argument("first")
@click.argument("second")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the table as parquet.")
def command(first: str, second: str, out: Path | None) -> None:
    r"""Say by how much two methods differ on the same latents, with an interval.

    A side is FOLDER or FOLDER:FIELD=VALUE,...; fields are coder, explainer, scorer, judge, prompt, control, negatives, metric
    and scorer_id. A second side without a folder takes the first one's folder and fields, its own put over them.

    \b
    Two explainers:    autointerp compare results/gpt2:explainer=default :explainer=lexical
    Two of one name:   autointerp compare results/gpt2:explainer=lexical-8ce2ea75 :explainer=lexical-be8c7d3d
    Against control:   autointerp compare results/gpt2 :control=shuffled
    Two judges:        autointerp compare results/gpt2:judge=MODEL-A :judge=MODEL-B
    Two folders:       autointerp compare results/a results/b
    """
    from autointerp.studies.compare import compare, comparison_table

    frame = compare(first, second)
    if out is not None:
        frame.to_parquet(out, index=False)
    click.echo(comparison_table(frame), nl=False)
