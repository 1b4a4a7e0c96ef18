"""``autointerp cache``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from autointerp.cli.options import bundled_source, resolve, settings_options, token_count
from autointerp.errors import ConfigError


@click.command("cache")
@click.option("--subject", metavar="MODEL", help="Folder or hub id of a causal language model; or bundled:model.")
@click.option("--corpus", metavar="SOURCE", help="stdlib | dataset id | .parquet | .jsonl | .txt | folder.  [default: stdlib]")
@click.option(
    "--coder",
    "--add-coder",
    "coders",
    multiple=True,
    metavar="NAME=SOURCE[@@HOOKPOINT]",
    help="A sparse coder; may be repeated.",
)
@click.option(
    "--control",
    "controls",
    multiple=True,
    metavar="KIND[:NAME]",
    help="random-coder, reinit-subject or reinit-matched, of every coder or of NAME; see below.",
)
@click.option("--tokens", callback=token_count, metavar="N", help="Stop after N tokens: 10M, 500k.  [default: 10M]")
@click.option("--extend-tokens", callback=token_count, metavar="N", help="Let the finished store grow to N tokens; see above.")
@click.option("--ctx-len", type=int, help="Tokens per context.  [default: 256]")
@click.option("--text-column", help="The column with the text.  [default: text]")
@click.option("--messages", metavar="COLUMN", help="A column of chat messages, rendered with the subject's chat template.")
@click.option("--keep-columns", metavar="A,B", help="Columns kept for every document.")
@click.option("--token-filter", help="Activations dropped: bos, special, template, first:N, none.  [default: bos]")
@click.option("--device", help="auto, cpu, cuda, cuda:1, mps.  [default: auto]")
@click.option("--dtype", help="auto, float32, bfloat16, float16; coders always run in float32.  [default: auto]")
@click.option("--device-map", help="Split the subject as accelerate does: auto, or JSON {module: device, cpu or disk}.")
@click.option("--quantization", type=click.Choice(["4bit", "8bit"]), help="Quantise the subject with bitsandbytes.")
@click.option("--memory-budget", metavar="SIZE", help="Memory for activations on their way to disk.  [default: 1GiB]")
@click.option("--coders-per-pass", type=int, metavar="K", help="Most coders in memory at once; see above.  [default: all]")
@click.option("--worker", metavar="I/N", help="This is writer I of N (0-based) of one store; see above.")
@click.option("--force", is_flag=True, default=None, help="Cache coders that do not seem to fit the subject, too.")
@click.option("--out", type=click.Path(path_type=Path), help="The store.  [default: cache/SUBJECT]")
@click.option(
    "--list-hookpoints",
    is_flag=False,
    flag_value="*",
    metavar="[GLOB]",
    help="Only list where the subject can be read: 'layers.*.mlp@in'.",
)
@click.option("--plan", "only_plan", is_flag=True, help="Only say what it would take: disk of the runs and the store, time.")
@settings_options
def command(
    config_file: Path | None,
    settings: tuple[str, ...],
    subject: str | None,
    coders: tuple[str, ...],
    controls: tuple[str, ...],
    keep_columns: str | None,
    list_hookpoints: str | None,
    only_plan: bool,
    **flags: Any,
) -> None:
    r"""Run a subject model over a corpus and record where each latent fires.

    \b
    The bundled model:  autointerp cache --subject bundled:model --coder sae=bundled:sae@@layers.2 --tokens 262k
    Your own:           autointerp cache --subject google/gemma-2-2b --corpus monology/pile-uncopyrighted \\
                          --coder res12=google/gemma-scope-2b-pt-res:layer_12/width_16k/average_l0_82 --tokens 10M
    \b
    A coder's SOURCE: a folder, file or hub id OWNER/REPO[@REVISION][:FOLDER] in a published format, or
      neurons:MODULE[?k=32][&rotate=SEED]   an MLP's neurons: the k largest of a token, optionally in a rotated basis;
                                            MODULE is the MLP (layers.2.mlp) or its down projection
      directions:FILE[?threshold=T]@@HOOKPOINT   probes or steering vectors [number, width] in .safetensors or .npz;
                                            each sign is a latent, active where it exceeds T (default 0)
      module:function                       returns an autointerp.coders.coder.Coder
    \b
    Controls become coders of the same store, named after the coder they are of:
      random-coder     NAME-random  random unit directions, as wide and with as many active latents as the coder
      reinit-subject   NAME-reinit  the same coder on the subject with every weight drawn anew (a second model in memory)
      reinit-matched   NAME-reinit-matched  the same, with the vectors brought to the trained subject's mean and spread
    \b
    A coder's hookpoint (MODULE.PATH@in or @out) is read from its files where they say it; @@HOOKPOINT states it.
    The same command resumes after a kill; with --add-coder (or one more --coder, which is the same) it adds that coder to
    a finished store. Coders that do not fit in memory together: --coders-per-pass K records K of them (each with its
    controls) at a time, and reads the corpus once for every K.
    \b
    More tokens later:  the same command, with every coder and control of the store, and --extend-tokens N
    Several machines:   the same command with --worker 0/N ... --worker N-1/N, each records its share of the runs; then once
                        without --worker, which records what is missing and merges. Folders may also be copied together.
    """
    from autointerp.jobs.cache import CacheConfig, cache, plan_cache

    if list_hookpoints is not None:
        _list_hookpoints(subject, list_hookpoints)
        return
    corpus = {
        "source": flags.pop("corpus"),
        "num_tokens": flags.pop("tokens"),
        "ctx_len": flags.pop("ctx_len"),
        "text_column": flags.pop("text_column"),
        "messages": flags.pop("messages"),
        "keep_columns": keep_columns.split(",") if keep_columns else None,
    }
    given = {name: value for name, value in corpus.items() if value is not None}
    flags |= {"corpus": given, "coders": [_coder(text) for text in coders] or None, "controls": controls}
    if subject is not None:
        flags["subject"] = str(bundled_source(subject))
        flags["out"] = flags["out"] or Path("cache") / Path(subject.removeprefix("bundled:")).name
    values = resolve("cache", config_file, settings, flags)
    config = CacheConfig.parse(values, where="cache")
    click.echo(plan_cache(config).text() if only_plan else f"store: {cache(config)}")


def _coder(text: str) -> dict[str, str]:
    name, equals, rest = text.partition("=")
    if not equals or not name or not rest:
        raise ConfigError(f"--coder {text}: expected NAME=SOURCE, such as sae=EleutherAI/sae-pythia-160m-32k:layers.6")
    source, at, hookpoint = rest.partition("@@")
    coder = {"name": name, "source": str(bundled_source(source))}
    return {**coder, "hookpoint": hookpoint} if at else coder


def _list_hookpoints(subject: str | None, pattern: str) -> None:
    from autointerp.subject.model import load_subject

    if subject is None:
        raise ConfigError("--list-hookpoints needs --subject")
    loaded = load_subject(str(bundled_source(subject)))
    for hookpoint in loaded.hookpoints() if pattern == "*" else loaded.resolve_globs([pattern]):
        click.echo(hookpoint)
