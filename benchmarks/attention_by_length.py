"""What attention does for a translation, by the length of the sentence, and where it looks.

    python benchmarks/attention_by_length.py [--multi30k DIR] [--models DIR] [--out FILE.json]
    python benchmarks/attention_by_length.py --short --models DIR          a minute, the made-up language alone
    python benchmarks/attention_by_length.py --from benchmarks/results/attention.json     tables and plots anew

The same translator is trained three times, equal in everything but `--attention`: `none` hands the decoder the
encoder's last state and nothing else, `dot` adds the weighted sum of all its states, `strongest` the one state of the
greatest weight. One language is made up: every sentence is said in reverse. English to Korean learns from the sentences
of Tatoeba that ship with the package; German to English, if DIR is given, from Multi30k's files in it (see
recipes/german-english). Each model is that of its best epoch on the validation sentences; the test sentences are
translated once, by beam search of width 5, and scored by the number of words in the source.

Models that stand in --models (default: runs/attention) already are used as they are. Writes
benchmarks/results/attention.json, the tables in docs/attention.md and its Korean version, and the plots in docs/img.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from bptt import replace_between, save_plot
from machine import describe, examine

import unrolled
from unrolled.config import resolve
from unrolled.data import open_data
from unrolled.decoding import BeamSettings
from unrolled.demo.road import DATA as SHIPPED
from unrolled.kinds import Answer
from unrolled.kinds.scores import TextScore
from unrolled.prediction import Searching, longest, predict
from unrolled.progress import open_bar
from unrolled.trace import record
from unrolled.trace.looking import alignments, entropy, monotonicity, overlooked, pharaoh

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
RESULTS = HERE / "results" / "attention.json"

WAYS = ("none", "dot", "strongest")

COMMON: dict[str, Any] = {
    "input.unit": "subword", "output.unit": "subword", "cell": "gru", "layers": 1, "bidirectional": True,
    "dropout": 0.4, "output.label_smoothing": 0.1, "precision": "bf16", "seed": 1,
}  # fmt: skip
PAIRS: dict[str, dict[str, Any]] = {
    "made-up": {
        "ends": ("here", "there"), "edges": [2, 4, 6, 8, 99], "figure": "chrf",
        "settings": {
            "input.unit": "word", "output.unit": "word", "input.embedding": 32, "output.embedding": 32,
            "bidirectional": False, "hidden": 48, "dropout": 0.0, "output.label_smoothing": 0.0, "precision": "fp32",
            "batch_size": 16, "lr": 0.01, "warmup": 5, "epochs": 16, "valid_every": 10_000,
        },
    },
    "en-ko": {
        "ends": ("en", "ko"), "edges": [1, 4, 5, 6, 7, 8, 99], "figure": "chrf",
        "settings": {
            "input.max_vocabulary": 1200, "output.max_vocabulary": 1500, "input.embedding": 96, "output.embedding": 128,
            "hidden": 128, "batch_size": 32, "lr": 3e-3, "average": 0.99, "epochs": 10,
        },
    },
    "de-en": {
        "ends": ("de", "en"), "edges": [1, 9, 11, 13, 16, 99], "figure": "bleu",
        "settings": {
            "input.max_vocabulary": 2500, "output.max_vocabulary": 1500, "input.embedding": 96,
            "output.embedding": 96, "hidden": 128, "batch_size": 64, "lr": 3e-3, "average": 0.99, "epochs": 6,
        },
    },
}  # fmt: skip
MULTI30K = 10_000
"""So many of its 29,000 training captions are learnt from, the first ones: three trainings of all would take long."""

_TATOEBA = "CC BY 2.0 FR, tatoeba.org {}"
SHOWN: dict[str, list[dict[str, Any]]] = {
    "en-ko": [
        {
            "en": "I met Tom in the library.",
            "ko": "난 톰을 도서관에서 만났어.",
            "attribution": _TATOEBA.format("#6812263 (CK) & #8375030 (Eunhee)"),
        },
        {
            "en": "We solved that problem in a week.",
            "ko": "우리는 그 문제를 일주일 안에 해결했다.",
            "attribution": _TATOEBA.format("#3321174 (CK) & #8543993 (okja)"),
        },
        {
            "en": "I'm going to Australia next year.",
            "ko": "나는 내년에 호주에 간다.",
            "attribution": _TATOEBA.format("#2712940 (CK) & #5526650 (raining211)"),
        },
        {
            "en": "I want to meet Tom's parents.",
            "ko": "나는 톰의 부모를 만나고 싶어.",
            "attribution": _TATOEBA.format("#6227757 (CK) & #8355846 (Eunhee)"),
        },
        {
            "en": "I know Tom is a lazy kid.",
            "ko": "난 톰이 게으른 애라는 걸 알고 있어.",
            "attribution": _TATOEBA.format("#7521648 (CK) & #8366858 (Eunhee)"),
        },
    ],
    "de-en": [
        {
            "de": "Ein Junge, der einen roten Hut trägt, spielt mit einem Hund.",
            "en": "A boy who is wearing a red hat is playing with a dog.",
        },
        {
            "de": "Auf der Straße steht eine Frau, die ein Kind in den Armen hält.",
            "en": "On the street stands a woman who is holding a child in her arms.",
        },
    ],
}
"""Sentences, each chosen before its map was seen: of the test part of Tatoeba, and two German ones of our own."""


def experiment(given: argparse.Namespace, out: Path | None) -> dict[str, Any]:
    """Everything, or one pair of languages, beside what `out` has of the others."""
    results: dict[str, Any] = {"machine": examine(), "pairs": {}}
    if given.pair and out is not None and out.exists():
        results = json.loads(out.read_text("utf-8"))
    parts: dict[str, list[dict[str, Any]]]
    for name, pair in PAIRS.items():
        if name not in ([given.pair] if given.pair else PAIRS) or (given.short and name != "made-up"):
            continue
        if name == "made-up":
            parts = made_up()
        elif name == "en-ko":
            parts = shipped()
        elif given.multi30k:
            parts = multi30k(given.multi30k)
        else:
            print("German to English is left out: --multi30k DIR names the folder with its data")
            continue
        source, target = pair["ends"]
        found = results["pairs"][name] = {
            "settings": COMMON | pair["settings"], "figure": pair["figure"],
            "sizes": {part: len(rows) for part, rows in parts.items()}, "ways": {}, "shown": [],
        }  # fmt: skip
        models = {}
        for way in WAYS:
            folder = given.models / f"{name}-{way}"
            began = time.monotonic()
            if not (folder / "model.safetensors").exists():
                unrolled.train(
                    parts["train"], folder, valid=parts["valid"], input=f"text:{source}", output=f"text:{target}",
                    attention=way, watcher=open_bar(), **found["settings"],
                )  # fmt: skip
            models[way] = model = unrolled.load(folder)
            seconds = time.monotonic() - began
            found["ways"][way] = {
                "weights": sum(p.numel() for p in model.parameters()), "train_seconds": round(seconds),
                **judge(model, parts["test"], pair), **({} if way == "none" else looks(model, parts["test"], pair)),
            }  # fmt: skip
            told = {key: value for key, value in found["ways"][way].items() if key != "lengths"}
            print(f"{name} {way}: {json.dumps(told)}", flush=True)
        found["shown"] = [show(models, sentence, pair) for sentence in SHOWN.get(name, parts["test"][:1])]
    return results


def made_up() -> dict[str, list[dict[str, Any]]]:
    """A language of twelve words, in which every sentence is said in reverse."""
    words = [(f"{a}{b}", f"{b}{a}{b}") for a in "가나다라" for b in "고노도"]
    draw = random.Random(1)
    rows = []
    for _ in range(700):
        chosen = [draw.choice(words) for _ in range(draw.randint(2, 9))]
        rows.append({"here": " ".join(a for a, _ in chosen), "there": " ".join(b for _, b in reversed(chosen))})
    return {"train": rows[:600], "valid": rows[600:620], "test": rows[620:]}


def shipped() -> dict[str, list[dict[str, Any]]]:
    """The pairs of Tatoeba within the package. In the validation and test part a sentence has all its translations."""
    folder = SHIPPED / "translate"
    return {part: list(open_data(folder / f"{part}.jsonl.xz", resolve())) for part in ("train", "valid", "test")}


def multi30k(data: Path) -> dict[str, list[dict[str, Any]]]:
    """The files of the recipe german-english."""
    import tempfile

    sys.path.insert(0, str(HERE.parent / "recipes"))
    from run import find_data, load_prepare, read_recipe

    recipe = HERE.parent / "recipes" / "german-english"
    find_data(read_recipe(recipe), data)
    with tempfile.TemporaryDirectory() as folder:
        load_prepare(recipe)(data, Path(folder))
        names = {"train": "train", "valid": "valid", "test": "test_2016_flickr"}
        parts = {part: list(open_data(Path(folder) / f"{name}.tsv", resolve())) for part, name in names.items()}
    return {**parts, "train": parts["train"][:MULTI30K]}


# ---------------------------------------------------------------------------------------------- measuring


def judge(model: Any, rows: list[dict[str, Any]], pair: dict[str, Any]) -> dict[str, Any]:
    """BLEU and chrF of the test, whole and by the number of words in the source."""
    source, target = pair["ends"]
    buckets = {edges: TextScore() for edges in pairwise(pair["edges"])}
    whole = TextScore()
    searching = Searching(BeamSettings(beam=5, max_length=longest))
    answers = predict(model, [row[source] for row in rows], searching=searching)
    for row, answer in zip(rows, answers, strict=True):
        words = len(str(row[source]).split())
        said = Answer(answer.value, answer.text)
        whole.add(said, row[target])
        next(score for (low, high), score in buckets.items() if low <= words < high).add(said, row[target])
    told = {key: whole.figures()[key] for key in ("bleu", "chrf", "exact", "examples")}
    lengths = [
        {"from": low, "below": high, **{key: figures[key] for key in ("bleu", "chrf", "examples")}}
        for (low, high), score in buckets.items()
        for figures in [score.figures()]
    ]
    return {**told, "lengths": lengths}


def looks(model: Any, rows: list[dict[str, Any]], pair: dict[str, Any], count: int = 200) -> dict[str, float]:
    """Means over some test sentences, the decoder reading the words that are right: how spread attention is, in bits;
    how many pieces of the source no step looked at; how often it does not go back."""
    source, target = pair["ends"]
    spread, left, forward = [], [], []
    for row in rows[:: max(1, len(rows) // count)]:
        right = row[target] if isinstance(row[target], str) else row[target][0]
        attention = record(model, row[source], expected=right).attention[:-1]
        spread.append(float(entropy(attention).mean()))
        left.append(len(overlooked(attention)) / attention.shape[1])
        forward.append(monotonicity(attention))
    return {
        "entropy": statistics.fmean(spread), "overlooked": statistics.fmean(left),
        "monotonicity": statistics.fmean(forward),
    }  # fmt: skip


def by_words(pieces: Sequence[str]) -> tuple[list[str], torch.Tensor]:
    """Pieces put together to words: the words, and a matrix [words, pieces], 1 where the piece is the word's."""
    words, places = list[str](), list[int]()
    for piece in pieces:
        if not words or piece[:1].isspace():
            words.append("")
        words[-1] += piece
        places.append(len(words) - 1)
    return [word.strip() for word in words], torch.nn.functional.one_hot(torch.tensor(places)).T.float()


def show(models: dict[str, Any], sentence: dict[str, Any], pair: dict[str, Any]) -> dict[str, Any]:
    """One sentence: what each model makes of it, and where attention looks when the right words are written."""
    source, target = pair["ends"]
    shown: dict[str, Any] = {**sentence, "translations": {}, "looks": {}}
    searching = Searching(BeamSettings(beam=5, max_length=longest))
    for way, model in models.items():
        (answer,) = predict(model, [sentence[source]], searching=searching)
        shown["translations"][way] = answer.text
        if way == "none":
            continue
        trace = record(model, sentence[source], expected=sentence[target])
        read, columns = by_words(trace.read)
        written, rows = by_words(trace.written[:-1])
        attention = (rows / rows.sum(1, keepdim=True)) @ trace.attention[:-1] @ columns.T
        assert (len(written), len(read)) == (len(sentence[target].split()), len(sentence[source].split()))
        shown["looks"][way] = {
            "attention": [[round(weight, 3) for weight in row] for row in attention.tolist()],
            "pharaoh": pharaoh(alignments(attention)), "monotonicity": monotonicity(attention),
            "entropy": float(entropy(attention).mean()),
        }  # fmt: skip
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--multi30k", type=Path, metavar="DIR", help="the folder with Multi30k's files, for German")
    parser.add_argument("--models", type=Path, default=Path("runs/attention"), help="(default: runs/attention)")
    parser.add_argument("--pair", choices=PAIRS, help="this one alone; results of the other one stay")
    parser.add_argument(
        "--short", action="store_true", help="the made-up language alone; neither docs nor results change"
    )
    parser.add_argument("--out", type=Path, help="(default: benchmarks/results/attention.json; none with --short)")
    parser.add_argument("--docs", type=Path, help="the folder to write to (default: docs; none with --short)")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE.json", help="use these results")
    given = parser.parse_args(arguments)
    docs = given.docs or (None if given.short else DOCS)
    if given.source:
        write_docs(json.loads(given.source.read_text("utf-8")), docs or DOCS)
        return 0
    print(describe(examine()) + "\n")
    out = given.out or (None if given.short else RESULTS)
    results = experiment(given, out)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")
        print(f"written: {out}")
    if docs is not None:
        write_docs(results, docs)
    return 0


# ------------------------------------------------------------------------------------------ tables and plots

_WORDS: dict[str, dict[str, Any]] = {
    "attention.md": {
        "made-up": "Made-up language, chrF", "en-ko": "English to Korean, chrF", "de-en": "German to English, BLEU",
        "about": "{processor}, torch {torch}, beam 5. Number of test sentences by the number of words in the source: "
        "{counts}.",
        "whole": "all",
        "looks": "| | attention | entropy, bits | pieces overlooked | in the source's order |",
        "sentence": "**{number}.** {source} → {target}{attribution}",
        "said": "| | writes | alignment (source-target) | in order | entropy, bits |",
    },
    "attention.ko.md": {
        "made-up": "지어낸 언어, chrF", "en-ko": "영어 → 한국어, chrF", "de-en": "독일어 → 영어, BLEU",
        "about": "{processor}, torch {torch}, 빔 5. 원문의 단어 수에 따른 평가 문장의 수: {counts}.",
        "whole": "전체",
        "looks": "| | attention | 엔트로피(비트) | 보지 않은 조각 | 원문의 순서대로 |",
        "sentence": "**{number}.** {source} → {target}{attribution}",
        "said": "| | 번역 | 정렬(원문-번역문) | 순서대로 | 엔트로피(비트) |",
    },
}  # fmt: skip


def write_docs(results: dict[str, Any], docs: Path) -> None:
    """The tables between the marks of both pages, and the plots."""
    for name, words in _WORDS.items():
        page = docs / name
        text = page.read_text("utf-8")
        for key, table in (("scores", scores_table), ("looks", looks_table), ("sentences", sentences_table)):
            text = replace_between(text, f"attention:{key}", table(results, words), page)
        page.write_text(text, "utf-8")
        print(f"written: {page}")
    plot_lengths(results, docs / "img" / "attention-by-length.svg")
    heat_maps(results, docs / "img" / "attention-maps.svg")


def spans(lengths: Sequence[dict[str, Any]]) -> list[str]:
    """What each bucket of lengths is called: 4, 5–6, 7+."""
    *closed, last = lengths
    names = [f"{b['from']}–{b['below'] - 1}" if b["below"] - b["from"] > 1 else str(b["from"]) for b in closed]
    return [*names, f"{last['from']}+"]


def scores_table(results: dict[str, Any], words: dict[str, Any]) -> str:
    machine, parts = results["machine"], []
    for name, pair in results["pairs"].items():
        lengths = pair["ways"]["none"]["lengths"]
        heads = spans(lengths)
        counts = ", ".join(f"{head}: {bucket['examples']}" for head, bucket in zip(heads, lengths, strict=True))
        lines = [
            words["about"].format(processor=machine["processor"], torch=machine["torch"], counts=counts),
            "",
            f"| {words[name]} | {words['whole']} | " + " | ".join(heads) + " |",
            "|---|" + "---:|" * (len(heads) + 1),
        ]
        figure = pair["figure"]
        for way, found in pair["ways"].items():
            values = [found[figure], *(bucket[figure] for bucket in found["lengths"])]
            lines.append(f"| `{way}` | " + " | ".join(f"{value:.1f}" for value in values) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def looks_table(results: dict[str, Any], words: dict[str, Any]) -> str:
    lines = [words["looks"], "|---|---|---:|---:|---:|"]
    for name, pair in results["pairs"].items():
        for way, found in pair["ways"].items():
            if "entropy" in found:
                shares = [f"{found[key]:.0%}".replace("%", " %") for key in ("overlooked", "monotonicity")]
                head = words[name].split(",")[0]
                lines.append(f"| {head} | `{way}` | {found['entropy']:.2f} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def sentences_table(results: dict[str, Any], words: dict[str, Any]) -> str:
    parts, number = [], 0
    for name, pair in results["pairs"].items():
        source, target = PAIRS[name]["ends"]
        for shown in pair["shown"] if name in SHOWN else ():
            number += 1
            attribution = f" ({shown['attribution']})" if "attribution" in shown else ""
            head = words["sentence"].format(
                number=number, source=shown[source], target=shown[target], attribution=attribution
            )
            lines = [head, "", words["said"], "|---|---|---|---:|---:|"]
            for way, text in shown["translations"].items():
                look = shown["looks"].get(way)
                figures = ["", "", ""]
                if look is not None:
                    order = f"{look['monotonicity']:.0%}".replace("%", " %")
                    figures = [f"`{look['pharaoh']}`", order, f"{look['entropy']:.2f}"]
                lines.append(f"| `{way}` | {text} | " + " | ".join(figures) + " |")
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import font_manager

    # What draws Hangul is added by its file: matplotlib's list of fonts may be older than the font.
    hangul = [path for path in font_manager.findSystemFonts() if re.search(r"NotoSansCJK-Regular|NanumGothic\.", path)]
    for path in hangul[:1]:
        font_manager.fontManager.addfont(path)
    names = [font.name for font in font_manager.fontManager.ttflist if font.fname in hangul[:1]]
    mpl.rcParams.update({"font.family": ["DejaVu Sans", *names], "font.size": 10})
    # Glyphs are paths: what fonts the reader has does not matter.
    mpl.rcParams.update({"svg.hashsalt": "attention", "svg.fonttype": "path"})
    return plt


def plot_lengths(results: dict[str, Any], path: Path) -> None:
    """A panel a pair of languages: the score of each way against the length of the source."""
    plt = _pyplot()
    count = len(results["pairs"])
    figure, panels = plt.subplots(1, count, figsize=(5.2 * count, 4), layout="constrained", squeeze=False)
    styles = {"none": ("#c44536", "o", "-"), "dot": ("#1f6f8b", "s", "-"), "strongest": ("#e0a030", "^", "--")}
    for axes, (name, pair) in zip(panels[0], results["pairs"].items(), strict=True):
        for way, found in pair["ways"].items():
            color, marker, line = styles[way]
            scores = [bucket[pair["figure"]] for bucket in found["lengths"]]
            axes.plot(scores, color=color, marker=marker, linestyle=line, linewidth=2, label=f"attention {way}")
        heads = spans(found["lengths"])
        axes.set_xticks(range(len(heads)), heads)
        axes.set(xlabel="words in the source", title=_WORDS["attention.md"][name])
        axes.set_ylim(0, None)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    save_plot(figure, path)


def heat_maps(results: dict[str, Any], path: Path) -> None:
    """A panel a sentence, a row a word that is written."""
    plt = _pyplot()
    shown = [(name, sentence) for name, pair in results["pairs"].items() if name in SHOWN for sentence in pair["shown"]]
    rows = -(-len(shown) // 4)
    figure, panels = plt.subplots(rows, 4, figsize=(16, 4.5 * rows), layout="constrained", squeeze=False)
    for number, (axes, (name, sentence)) in enumerate(zip(panels.flat, shown, strict=False), 1):
        source, target = (sentence[end].split() for end in PAIRS[name]["ends"])
        weights = sentence["looks"]["dot"]["attention"]
        axes.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(source)), source, rotation=45, ha="left", rotation_mode="anchor")
        axes.set_yticks(range(len(target)), target)
        axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
        axes.set_xlabel(f"{number}")
        for u, row in enumerate(weights):
            for s, weight in enumerate(row):
                if weight >= 0.1:
                    color = "white" if weight > 0.6 else "black"
                    axes.text(s, u, f"{weight:.1f}", ha="center", va="center", color=color, fontsize=8)
    for axes in panels.flat[len(shown) :]:
        axes.set_axis_off()
    save_plot(figure, path)


if __name__ == "__main__":
    sys.exit(main())
