"""The commands. Thin: each turns flags into one call of the Python API. torch is imported inside the commands only,
so that `--help` answers at once."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unrolled.errors import ConfigError, UnrolledError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["app", "demo", "doctor", "evaluate", "generate", "main", "train"]

app = typer.Typer(
    name="unrolled",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="""Recurrent sequence models: train them fast on the CPU you have, and have them write.

    [bold]A first round[/bold]

      unrolled demo                             see all of it, in two minutes
      unrolled train my.txt --out my/           learn a text
      unrolled evaluate my/ other.txt           how well is another predicted?
      unrolled generate my/ --prompt "Once "    have it write
    """,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"unrolled {version('unrolled')}")
        except PackageNotFoundError:
            typer.echo("unrolled, from a folder that is not installed as a package")
        raise typer.Exit


@app.callback()
def _unrolled(
    version: Annotated[
        bool,
        typer.Option("--version", metavar="", help="Show the version and exit.", is_eager=True, callback=_show_version),
    ] = False,
) -> None: ...


_MODEL, _BPTT, _OPTIMISER, _RUN = "Model", "Time (BPTT)", "Optimiser", "Run"


def _opt(help: str, panel: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **more)


@app.command(no_args_is_help=True)
def train(
    texts: Annotated[list[Path], typer.Argument(help="Files (.txt, .txt.gz, .txt.xz, UTF-8) or folders of them.")],
    out: Annotated[Path, _opt("The model folder to write.", _RUN, "--out", "-o")],
    cell: Annotated[str | None, _opt("rnn, rnn_relu, lstm (default) or gru.", _MODEL)] = None,
    hidden: Annotated[int | None, _opt("Size of the hidden state vector (512).", _MODEL)] = None,
    layers: Annotated[int | None, _opt("How many cells are stacked (2).", _MODEL)] = None,
    unit: Annotated[
        str | None, _opt("What one step reads: char (default), jamo (Hangul letters), word, subword.", _MODEL)
    ] = None,
    embedding: Annotated[int | None, _opt("Learned vectors of this size in place of one-hot input.", _MODEL)] = None,
    dropout: Annotated[float | None, _opt("Share of values dropped between layers (0.3).", _MODEL)] = None,
    window: Annotated[
        str | None, _opt("How many steps back the gradient goes (128), or 'full' for full BPTT.", _BPTT)
    ] = None,
    stride: Annotated[int | None, _opt("How many steps one update moves on (= window).", _BPTT)] = None,
    batch_size: Annotated[int | None, _opt("How many places of the text are read at once (64).", _BPTT)] = None,
    documents: Annotated[
        str | None, _opt("Where the state starts anew: file (default), line or paragraph.", _BPTT)
    ] = None,
    epochs: Annotated[int | None, _opt("How often the whole text is read (10).", _OPTIMISER)] = None,
    steps: Annotated[int | None, _opt("Stop after so many updates, if that is sooner.", _OPTIMISER)] = None,
    lr: Annotated[float | None, _opt("Learning rate (2e-3).", _OPTIMISER)] = None,
    optimizer: Annotated[str | None, _opt("adamw (default) or sgd.", _OPTIMISER)] = None,
    schedule: Annotated[str | None, _opt("cosine (default), plateau or constant.", _OPTIMISER)] = None,
    clip: Annotated[float | None, _opt("Largest gradient norm (1.0).", _OPTIMISER)] = None,
    average: Annotated[float | None, _opt("Average the weights with this decay, e.g. 0.998.", _OPTIMISER)] = None,
    patience: Annotated[int | None, _opt("Stop after so many validations without a better one.", _OPTIMISER)] = None,
    precision: Annotated[str | None, _opt("fp32 (default) or bf16.", _OPTIMISER)] = None,
    valid: Annotated[
        list[Path] | None,
        _opt("Validate on this file, again for more (else on the text's last 10 %).", _RUN, metavar="<path>"),
    ] = None,
    errors: Annotated[str | None, _opt("strict (default), or replace bytes that are not UTF-8.", _RUN)] = None,
    seed: Annotated[int | None, _opt("Random seed (1).", _RUN)] = None,
    device: Annotated[str | None, _opt("auto (default), cpu or cuda.", _RUN)] = None,
    init_from: Annotated[Path | None, _opt("Start from the weights of this model folder.", _RUN)] = None,
    config: Annotated[Path | None, _opt("Settings from a YAML file; flags come on top.", _RUN)] = None,
    set_: Annotated[
        list[str] | None,
        _opt("Any setting by its dotted name, e.g. core.init=orthogonal.", _RUN, "--set", metavar="KEY=VALUE"),
    ] = None,
    resume: Annotated[bool, _opt("Go on from where the model in --out stopped.", _RUN, "--resume", metavar="")] = False,
    force: Annotated[bool, _opt("Replace the model in --out.", _RUN, "--force", metavar="")] = False,
    dump_config: Annotated[
        bool, _opt("Print all settings, resolved and explained, and do nothing.", _RUN, "--dump-config", metavar="")
    ] = False,
) -> None:
    """Learn a text: a language model that predicts the next symbol.

    Examples:

      unrolled train shakespeare.txt --out shakespeare/

      unrolled train novels/ --out ko/ --unit jamo --hidden 512 --layers 2 --epochs 20

      unrolled train shakespeare.txt --out shakespeare/ --resume --epochs 30

    Ctrl-C saves; --resume goes on as if nothing had happened. The folder keeps the best weights by validation loss.
    """
    from unrolled.config import explain, parse_override

    plain = {
        "cell": cell, "hidden": hidden, "layers": layers, "unit": unit, "embedding": embedding, "dropout": dropout,
        "window": _window(window), "stride": stride, "batch_size": batch_size, "documents": documents,
        "epochs": epochs, "steps": steps, "lr": lr, "optimizer": optimizer, "schedule": schedule, "clip": clip,
        "average": average, "patience": patience, "precision": precision, "errors": errors, "seed": seed,
        "device": device, "init_from": None if init_from is None else str(init_from),
    }  # fmt: skip
    settings = {name: value for name, value in plain.items() if value is not None}
    for override in set_ or []:
        for section, values in parse_override(override).items():
            settings.update({f"{section}.{key}": value for key, value in values.items()})

    from unrolled.training import prepare_config

    if dump_config:
        typer.echo(explain(prepare_config(out, config, resume=resume, **settings)), nl=False)
        return

    from unrolled.progress import open_bar
    from unrolled.training import train as run

    run(texts, out, config=config, valid=valid, resume=resume, force=force, watcher=open_bar(), **settings)
    typer.echo(f"now try: unrolled generate {shlex.quote(str(out))}    (--prompt TEXT: how it shall begin)", err=True)


def _window(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.lstrip("-").isdigit() else text


@app.command(no_args_is_help=True)
def evaluate(
    model: Annotated[Path, typer.Argument(help="A model folder.")],
    texts: Annotated[list[Path], typer.Argument(help="Files or folders to predict.")],
    lanes: Annotated[
        int, typer.Option(help="Read the text at so many places at once: faster, and almost the same figure.")
    ] = 1,
    errors: Annotated[str | None, typer.Option(help="strict, or replace bytes that are not UTF-8.")] = None,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="One JSON object on standard output.")] = False,
) -> None:
    """How well a model predicts a text: cross-entropy per character in nats and bits, and perplexity.

    Lower is better. A text that the model was trained on says little: keep one aside.

    Examples:

      unrolled evaluate shakespeare/ other.txt

      unrolled evaluate shakespeare/ plays/ --lanes 32 --json
    """
    from unrolled.checkpoints import load
    from unrolled.evaluation import evaluate as run
    from unrolled.progress import open_bar

    result = run(load(model), texts, lanes=lanes, errors=errors, watcher=open_bar()).to_dict()
    if as_json:
        typer.echo(json.dumps(result))
        return
    names = {
        "nats_per_char": "nats per character",
        "bits_per_char": "bits per character",
        "perplexity": "perplexity per symbol",
        "nats_per_unit": "nats per symbol",
        "characters": "characters",
        "units": "symbols predicted",
        "unknown": "unknown symbols",
        "seconds": "seconds",
    }
    _table({label: _figure(result[key]) for key, label in names.items()})
    if result["unknown"]:
        share = f"{result['unknown']:,} symbols of the text"
        typer.echo(f"note: the model never saw {share}; all count as one, so the figures flatter it", err=True)


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"


def _table(rows: Mapping[str, str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    Console(highlight=False).print(table)


@app.command(no_args_is_help=True)
def generate(
    model: Annotated[Path, typer.Argument(help="A model folder.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What comes before; '-' reads standard input.")] = "",
    length: Annotated[int, typer.Option(help="How many characters to write.")] = 400,
    temperature: Annotated[float, typer.Option(help="Below 1 safer, above 1 wilder; 0 takes the likeliest.")] = 1.0,
    greedy: Annotated[
        bool, typer.Option("--greedy", metavar="", help="Always the likeliest symbol (temperature 0).")
    ] = False,
    top_k: Annotated[int | None, typer.Option(help="Choose among the k likeliest symbols.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Choose among the likeliest that together reach p.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: recently written symbols become rarer.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed writes the same text.")] = None,
    stop: Annotated[str | None, typer.Option(help="End before this string.")] = None,
    echo: Annotated[bool, typer.Option("--echo/--no-echo", metavar="", help="Print the prompt first.")] = True,
) -> None:
    """Have a model write; the text appears as it is made.

    Examples:

      unrolled generate shakespeare/ --prompt "ROMEO:" --temperature 0.8

      unrolled generate ko/ --prompt "나는 " --length 100 --seed 1
    """
    from unrolled.checkpoints import load
    from unrolled.decoding import generate as run

    if greedy and temperature not in (1.0, 0.0):
        raise ConfigError(f"--greedy is --temperature 0: leave --temperature {temperature} out, or --greedy")
    text = sys.stdin.read() if prompt == "-" else prompt
    pieces = run(
        load(model),
        text,
        length=length,
        temperature=0.0 if greedy else temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
    )
    if echo:
        sys.stdout.write(text)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()  # a reader who has gone is noticed here and not while Python shuts down


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the model folder goes.")] = Path("demo-shakespeare"),
    short: Annotated[bool, typer.Option("--short", metavar="", help="A quarter of the time, a weaker model.")] = False,
    force: Annotated[bool, typer.Option("--force", metavar="", help="Replace the model in --out.")] = False,
) -> None:
    """All of it in one go on Shakespeare, about two minutes on two cores: train, measure, write.

    Example: unrolled demo --out demo/
    """
    from unrolled.demo import run_demo
    from unrolled.progress import open_bar

    run_demo(out, short=short, force=force, watcher=open_bar())


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="One JSON object on standard output.")] = False,
) -> None:
    """Versions, threads, device, and which path runs and why.

    Example, for a bug report: unrolled doctor --json
    """
    from unrolled.doctor import examine

    found = examine()
    if as_json:
        typer.echo(json.dumps(found))
    else:
        _table(found)


# click's, which older versions of typer import and newer ones bring along; typer exports the class below it only.
_UsageError: Any = typer.BadParameter.__base__


def main() -> None:
    """The command line; a mistake of the user's is one line on stderr and exit code 2."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # Korean and other text whatever the locale says
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        # typer gives 130 after Ctrl-C, and goes in silence where the reader of a pipe has gone (| head).
        sys.exit(app(standalone_mode=False))
    except UnrolledError as error:
        message = str(error)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help, which typer has printed
            sys.exit(2)
        wrong, context = error.format_message(), error.ctx
        see = f" (see: {context.command_path} --help)" if context else ""
        message = wrong[0].lower() + wrong[1:].removesuffix(".") + see
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
