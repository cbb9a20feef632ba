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

__all__ = [
    "app",
    "compare",
    "demo",
    "doctor",
    "evaluate",
    "generate",
    "inspect",
    "main",
    "picture",
    "predict",
    "train",
]

app = typer.Typer(
    name="unrolled",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="""Recurrent sequence models: train them fast on the CPU you have. What goes in and what comes out decide
    the form.

    [bold]A first round[/bold]

      unrolled demo                             see all of it, in two minutes
      unrolled train my.txt --out my/           learn a text
      unrolled evaluate my/ other.txt           how well is another predicted?
      unrolled generate my/ --prompt "Once "    have it write
      unrolled inspect my/ "Once upon a time"   look inside: a page to open in a browser

    [bold]Labels, numbers, translations[/bold]

      unrolled train reviews.tsv --input text:document --output label:label --out reviews/
      unrolled evaluate reviews/ test.tsv
      unrolled predict reviews/ "재미있는 영화였어요"
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


_ENDS, _MODEL, _BPTT, _OPTIMISER, _RUN = "What goes in and out", "Model", "Time (BPTT)", "Optimiser", "Run"


def _opt(help: str, panel: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **more)


@app.command(no_args_is_help=True)
def train(
    data: Annotated[
        list[Path],
        typer.Argument(
            help="Texts (.txt, .gz, .xz, folders); or a table: TSV, CSV, JSONL, Parquet, CoNLL, packed or not."
        ),
    ],
    out: Annotated[Path, _opt("The model folder to write.", _RUN, "--out", "-o")],
    input: Annotated[
        str | None,
        _opt(
            "text (default), image, video, series or vector, and its columns: text:document.",
            _ENDS,
            metavar="KIND:COLUMN",
        ),
    ] = None,
    output: Annotated[
        str | None,
        _opt(
            "next (default), label, labels (one a step), number, numbers or text, and its columns: label:label.",
            _ENDS,
            metavar="KIND:COLUMN",
        ),
    ] = None,
    group: Annotated[
        str | None, _opt("Column that tells which rows are one series or video.", _ENDS, metavar="COLUMN")
    ] = None,
    horizon: Annotated[int | None, _opt("How many steps ahead a series is forecast (24).", _ENDS)] = None,
    skip_bad: Annotated[
        bool, _opt("Leave out examples that cannot be read, and list them.", _ENDS, "--skip-bad", metavar="")
    ] = False,
    cell: Annotated[str | None, _opt("rnn, rnn_relu, lstm (default) or gru.", _MODEL)] = None,
    hidden: Annotated[int | None, _opt("Size of the hidden state vector (512).", _MODEL)] = None,
    layers: Annotated[int | None, _opt("How many cells are stacked (2).", _MODEL)] = None,
    unit: Annotated[
        str | None, _opt("What one step reads: char (default), jamo (Hangul letters), word, subword.", _MODEL)
    ] = None,
    embedding: Annotated[int | None, _opt("Learned vectors of this size in place of one-hot input.", _MODEL)] = None,
    dropout: Annotated[float | None, _opt("Share of values dropped between layers (0.3).", _MODEL)] = None,
    bidirectional: Annotated[
        bool,
        _opt("Read in both directions; what needs the future cannot stream.", _MODEL, "--bidirectional", metavar=""),
    ] = False,
    pooling: Annotated[
        str | None, _opt("What a label is told from: last state (default), mean, max or attention.", _MODEL)
    ] = None,
    attention: Annotated[
        str | None, _opt("How a decoder looks back: dot (default), general, additive, strongest, none.", _MODEL)
    ] = None,
    window: Annotated[
        str | None, _opt("How many steps back the gradient goes (128), or 'full' for full BPTT.", _BPTT)
    ] = None,
    stride: Annotated[int | None, _opt("How many steps one update moves on (= window).", _BPTT)] = None,
    batch_size: Annotated[
        int | None, _opt("How many examples, or places of a text, are read at once (64).", _BPTT)
    ] = None,
    max_tokens: Annotated[int | None, _opt("Most steps, padding counted, in a batch of examples.", _BPTT)] = None,
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
        _opt("Validate on this file, again for more (else on a tenth of the data).", _RUN, metavar="<path>"),
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
    no_report: Annotated[
        bool, _opt("Write no report.html into --out at the end.", _RUN, "--no-report", metavar="")
    ] = False,
    dump_config: Annotated[
        bool, _opt("Print all settings, resolved and explained, and do nothing.", _RUN, "--dump-config", metavar="")
    ] = False,
) -> None:
    """Learn from a text, or from a table of examples: what goes in and what comes out decide the form.

    Examples:

      unrolled train shakespeare.txt --out shakespeare/                       a language model

      unrolled train reviews.tsv --input text:document --output label:label --out reviews/

      unrolled train pairs.tsv --input text:source --output text:target --out translator/

      unrolled train en.conllu --input text --output labels:upos --out tagger/

      unrolled train power.csv --input series:OT,HUFL --output next --horizon 24 --out power/

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
        "group": group, "horizon": horizon, "skip_bad": skip_bad or None, "bidirectional": bidirectional or None,
        "pooling": pooling, "attention": attention, "max_tokens": max_tokens,
    }  # fmt: skip
    settings = {name: value for name, value in plain.items() if value is not None}
    for override in set_ or []:
        for section, values in parse_override(override).items():
            settings.update({f"{section}.{key}": value for key, value in values.items()})

    from unrolled.training import prepare_config

    if dump_config:
        typer.echo(
            explain(prepare_config(out, config, input=input, output=output, resume=resume, **settings)), nl=False
        )
        return

    from unrolled.progress import open_bar
    from unrolled.training import train as run

    model = run(
        data,
        out,
        input=input,
        output=output,
        config=config,
        valid=valid,
        resume=resume,
        force=force,
        watcher=open_bar(),
        report=not no_report,
        **settings,
    )
    folder = shlex.quote(str(out))
    if model.config.output.kind != "next":
        given = "a text, a file, or lines on standard input" if model.config.input.kind == "text" else "files"
        typer.echo(f"now try: unrolled predict {folder} ...    ({given})", err=True)
    elif model.config.input.kind == "text":
        typer.echo(f"now try: unrolled generate {folder}    (--prompt TEXT: how it shall begin)", err=True)
    else:
        typer.echo(f"now try: unrolled predict {folder} FILE    (what comes after the series in it)", err=True)


def _window(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.lstrip("-").isdigit() else text


_SEARCH = "Writing text"


@app.command(no_args_is_help=True)
def predict(
    model: Annotated[Path, typer.Argument(help="A model folder.")],
    inputs: Annotated[list[str] | None, typer.Argument(help="Texts or files; none: lines of standard input.")] = None,
    input: Annotated[
        str | None, typer.Option(help="Columns of a table, if not those of training.", metavar="KIND:COLUMN")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="A JSON object a line, with scores.")] = False,
    batch_size: Annotated[int, typer.Option(help="How many are computed side by side.")] = 64,
    beam: Annotated[int, _opt("Hypotheses kept at each step (5); 1 is greedy.", _SEARCH)] = 5,
    n_best: Annotated[int, _opt("Write the best n of them (1).", _SEARCH)] = 1,
    length_penalty: Annotated[float, _opt("Above 0 favours longer texts (1.0).", _SEARCH)] = 1.0,
    min_length: Annotated[int, _opt("Fewest symbols (0).", _SEARCH)] = 0,
    max_length: Annotated[int | None, _opt("Most symbols (twice the input's and 50).", _SEARCH)] = None,
    block_ngram: Annotated[int, _opt("Write no run of so many symbols twice (0: off).", _SEARCH)] = 0,
    prefix: Annotated[str, _opt("What every text shall begin with.", _SEARCH)] = "",
    temperature: Annotated[float | None, _opt("Draw at random, below 1 safer, in place of searching.", _SEARCH)] = None,
    top_k: Annotated[int | None, _opt("Draw among the k likeliest.", _SEARCH)] = None,
    top_p: Annotated[float | None, _opt("Draw among the likeliest that together reach p.", _SEARCH)] = None,
    seed: Annotated[int, _opt("Of the drawing (1).", _SEARCH)] = 1,
    replace_unknown: Annotated[
        bool, _opt("Copy the source word looked at most for an unknown word.", _SEARCH, "--replace-unknown", metavar="")
    ] = False,
) -> None:
    """What a model says about inputs: one line out for each line, file or row in.

    Examples:

      unrolled predict reviews/ "재미있는 영화였어요"

      unrolled predict translator/ sentences.txt --beam 5 --n-best 3 --json

      cat sentences.txt | unrolled predict tagger/

      unrolled predict captions/ photo.png
    """
    from unrolled.checkpoints import load
    from unrolled.decoding import BeamSettings, Sampling
    from unrolled.prediction import Searching, given_values, longest
    from unrolled.prediction import predict as run

    drawn = None
    if temperature is not None or top_k is not None or top_p is not None:
        drawn = Sampling(temperature=1.0 if temperature is None else temperature, top_k=top_k, top_p=top_p)
    searching = Searching(
        BeamSettings(
            beam=beam,
            length_penalty=length_penalty,
            n_best=n_best,
            min_length=min_length,
            max_length=longest if max_length is None else max_length,
            block_ngram=block_ngram,
        ),
        sampling=drawn,
        seed=seed,
        prefix=prefix,
        replace_unknown=replace_unknown,
    )
    loaded = load(model)
    waiting = not inputs and sys.stdin.isatty()
    values = given_values(loaded, inputs or (line.rstrip("\r\n") for line in sys.stdin), input=input, lines=not inputs)
    for answer in run(loaded, values, searching=searching, batch_size=batch_size, at_once=1 if waiting else 1024):
        if as_json:
            typer.echo(json.dumps({"output": answer.value, **answer.details}, ensure_ascii=False))
        else:
            for best in answer.details.get("n_best", [{"text": answer.text}]):
                typer.echo(" ".join(best["text"].splitlines()))  # a line out for each in
        sys.stdout.flush()


@app.command(no_args_is_help=True)
def evaluate(
    model: Annotated[Path, typer.Argument(help="A model folder.")],
    data: Annotated[list[Path], typer.Argument(help="Texts to predict, or a table with inputs and outputs.")],
    lanes: Annotated[
        int, typer.Option(help="Read a text at so many places at once: faster, and almost the same figure.")
    ] = 1,
    errors: Annotated[str | None, typer.Option(help="strict, or replace bytes that are not UTF-8.")] = None,
    input: Annotated[str | None, typer.Option(help="Columns, if not those of training.", metavar="KIND:COLUMN")] = None,
    output: Annotated[str | None, typer.Option(help="The same of the output.", metavar="KIND:COLUMN")] = None,
    beam: Annotated[int, typer.Option(help="Hypotheses kept at each step where text is written; 1 is greedy.")] = 5,
    length_penalty: Annotated[float, typer.Option(help="Of written text: above 0 favours longer ones.")] = 1.0,
    block_ngram: Annotated[int, typer.Option(help="Of written text: no run of so many symbols twice (0: off).")] = 0,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", metavar="", help="Leave out examples that cannot be read, and list them.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="One JSON object on standard output.")] = False,
) -> None:
    """How well a model does: of running text, the cross-entropy per character; of examples, accuracy, F1, BLEU, errors.

    Data that the model was trained on says little: keep some aside.

    Examples:

      unrolled evaluate shakespeare/ plays/ --lanes 32 --json

      unrolled evaluate reviews/ test.tsv
    """
    from unrolled.checkpoints import load
    from unrolled.decoding import BeamSettings
    from unrolled.evaluation import evaluate_examples, evaluate_text
    from unrolled.model import LanguageModel
    from unrolled.prediction import Searching, expect_answers, longest
    from unrolled.progress import open_bar

    loaded = load(model)
    if not isinstance(loaded, LanguageModel):
        figures = evaluate_examples(
            expect_answers(loaded),
            data,
            searching=Searching(
                BeamSettings(beam=beam, length_penalty=length_penalty, block_ngram=block_ngram, max_length=longest)
            ),
            input=input,
            output=output,
            skip_bad=skip_bad,
            watcher=open_bar(),
        )
        _report(figures, as_json)
        return
    result = evaluate_text(loaded, data, lanes=lanes, errors=errors, watcher=open_bar()).to_dict()
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


def _report(figures: Mapping[str, Any], as_json: bool) -> None:
    from unrolled.kinds.scores import render

    if as_json:
        typer.echo(json.dumps(figures, ensure_ascii=False))
        return
    shown = {key.replace("_", " "): value for key, value in figures.items()}
    simple = {"naive": "naive answer", "last": "if nothing changed", "trivial": "trivial answer"}
    for name, told in simple.items():  # what always the same simple answer would reach
        shown |= {f"{key}, {told}": value for key, value in (figures.get(name) or {}).items()}
    _table({key: _figure(value) for key, value in shown.items() if isinstance(value, int | float)})
    for line in render(figures):
        typer.echo(line)


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


_PAGE = "The page"


@app.command(no_args_is_help=True)
def inspect(
    model: Annotated[Path, typer.Argument(help="A model folder, or a trace that was saved.")],
    text: Annotated[
        str | None, typer.Argument(help="What it shall read: a text or a file; none: an example it has, or writes.")
    ] = None,
    out: Annotated[Path, _opt("The page to write (report.html).", _PAGE, "--out", "-o")] = Path("report.html"),
    target: Annotated[str | None, _opt("What should come out: label(s), or the text written.", _PAGE)] = None,
    steps: Annotated[int | None, _opt("Read at most so many steps (300 of a running text).", _PAGE)] = None,
    show: Annotated[
        list[str] | None,
        _opt(
            "Only this: answer, unrolled, attention, next, states, units, gradient, learning, samples; again for more.",
            _PAGE,
            metavar="SECTION",
        ),
    ] = None,
    trace: Annotated[Path | None, _opt("Save what was recorded as this file, too.", _PAGE)] = None,
    input: Annotated[
        str | None, typer.Option(help="Columns of a table, if not those of training.", metavar="KIND:COLUMN")
    ] = None,
) -> None:
    """Look inside a model: one page with what it said and how sure it was, where it looked, its states, single units,
    how far its gradient reaches and how it was trained. It opens without a network.

    Examples:

      unrolled inspect translator/ "Ein Mann sitzt auf einer Bank." --out report.html

      unrolled inspect shakespeare/ play.txt --steps 500 --out report.html --trace play.trace

      unrolled inspect play.trace --show states --show gradient --out states.html
    """
    from unrolled.report import expect_place, given
    from unrolled.report import inspect as run

    for place in (out, trace):
        if place is not None:
            expect_place(place)
    if target is not None and text is None:
        raise ConfigError("--target: give the text that it belongs to, too")
    example = None if text is None else given(text, input=input)
    report = run(model, example, expected=target, steps=steps, show=show or ())
    if trace is not None:
        from unrolled.trace import save_trace

        if not report.traces:
            raise ConfigError("--trace: nothing was read, so that there is no trace to save: give a text or a file")
        save_trace(next(iter(report.traces.values())), trace)
    report.save(out)
    if not report.traces:
        typer.echo("note: nothing was read: give a text or a file to see what happens inside", err=True)
    typer.echo(f"{out}: open it in a browser", err=True)


@app.command(no_args_is_help=True)
def compare(
    first: Annotated[Path, typer.Argument(help="A model folder.", metavar="A")],
    second: Annotated[Path, typer.Argument(help="Another.", metavar="B")],
    text: Annotated[str | None, typer.Argument(help="What both shall read: a text or a file.")] = None,
    out: Annotated[Path, _opt("The page to write (compare.html).", _PAGE, "--out", "-o")] = Path("compare.html"),
    target: Annotated[str | None, _opt("What should come out.", _PAGE)] = None,
    steps: Annotated[int | None, _opt("Read at most so many steps (300 of a running text).", _PAGE)] = None,
) -> None:
    """Two models side by side on one page: the settings that differ, their learning curves, how far their gradients
    reach, and what each makes of the same input.

    Example:

      unrolled compare lstm/ gru/ "To be, or not to be" --out compare.html
    """
    from unrolled.report import compare as run
    from unrolled.report import expect_place, given

    expect_place(out)
    if target is not None and text is None:
        raise ConfigError("--target: give the text that it belongs to, too")
    run(first, second, None if text is None else given(text), expected=target, steps=steps).save(out)
    typer.echo(f"{out}: open it in a browser", err=True)


@app.command()
def demo(
    name: Annotated[
        str,
        typer.Argument(
            metavar="[NAME]",
            help="shakespeare (a language model), sentiment (film reviews), translate (English to Korean), chat, "
            "caption (pictures to their names) or frames (a label at each frame).",
            show_default=False,
        ),
    ] = "shakespeare",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where the model folder goes (demo-NAME).", show_default=False)
    ] = None,
    short: Annotated[bool, typer.Option("--short", metavar="", help="A quarter of the time, a weaker model.")] = False,
    force: Annotated[bool, typer.Option("--force", metavar="", help="Replace the model in --out.")] = False,
) -> None:
    """All of it in one go, about two minutes on two cores: train, measure beside baselines, see the answers.

    Each demo is one of the forms, on data that ships with the package; plain `unrolled demo` is Shakespeare.

    Examples:

      unrolled demo --out demo/

      unrolled demo sentiment --short
    """
    from unrolled.demo import run_demo
    from unrolled.progress import open_bar

    run_demo(name, out, short=short, force=force, watcher=open_bar())


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


@app.command(no_args_is_help=True)
def picture(
    model: Annotated[Path, typer.Argument(help="A model folder.")],
    text: Annotated[str, typer.Argument(help="What it shall read: a text, or the file of an image, video or series.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture to write, SVG.")] = Path("picture.svg"),
    rolled: Annotated[bool, typer.Option("--rolled", metavar="", help="One step and a loop.")] = False,
    start: Annotated[int | None, typer.Option(help="The first step to show, from 0.", show_default=False)] = None,
    steps: Annotated[int, typer.Option(help="How many steps are shown at most.")] = 8,
) -> None:
    """Draw the network unrolled in time, with what it read, held and said at each step.

    Example: unrolled picture translator/ "Ein Mann sitzt auf einer Bank." --out bank.svg
    """
    from unrolled.checkpoints import load
    from unrolled.picture import Picture
    from unrolled.trace import record

    Picture.of(record(load(model), text), rolled=rolled, start=start, steps=steps).save(out)
    typer.echo(f"{out}: open it in a browser", err=True)


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
