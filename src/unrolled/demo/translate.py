"""Many-to-many with an encoder and a decoder: an English sentence goes in, a Korean one comes out."""

from __future__ import annotations

from typing import Any

from unrolled.demo.baselines import NearestNeighbour, most_frequent, text_figures
from unrolled.demo.road import Road, Row, model_name, spread
from unrolled.evaluation import evaluate_examples
from unrolled.prediction import predict

__all__ = ["run"]

_SETTINGS: dict[str, Any] = {
    "input.unit": "subword", "output.unit": "subword", "input.max_vocabulary": 1200, "output.max_vocabulary": 1500,
    "input.embedding": 96, "output.embedding": 128, "cell": "gru", "hidden": 160, "layers": 1, "dropout": 0.4,
    "bidirectional": True, "attention": "general", "output.label_smoothing": 0.1, "batch_size": 32, "lr": 3e-3,
    "average": 0.99, "epochs": 16,
}  # fmt: skip
_SHORT: dict[str, Any] = {**_SETTINGS, "hidden": 128, "epochs": 6}
_FIGURES = ("chrf", "bleu", "exact")


def run(road: Road) -> None:
    """Train on sentence pairs and translate others. It must beat the most frequent translation; that of the most
    similar sentence is shown beside it."""
    learn, test = road.rows("train.jsonl.xz"), road.rows("test.jsonl.xz")
    print(
        f"English sentences and Korean ones from Tatoeba (CC BY 2.0 FR, each pair names its authors): {len(learn):,} "
        f"pairs to learn from, {len(test):,} English sentences held out. That is few for a translator."
    )
    model = road.learn_examples(
        road.data / "train.jsonl.xz", road.data / "valid.jsonl.xz", input="text:en", output="text:ko",
        **(_SHORT if road.short else _SETTINGS),
    )  # fmt: skip
    road.show_curve("perplexity", "perplexity per Korean symbol of other sentences")

    figures = evaluate_examples(model, road.data / "test.jsonl.xz", watcher=road.watcher)
    english, korean = [str(row["en"]) for row in learn], [str(row["ko"]) for row in learn]
    nearest, usual = NearestNeighbour(english, korean), most_frequent(korean)
    near = [nearest.answer(row["en"]) for row in test]
    expected = [row["ko"] for row in test]
    rows = [
        Row("always the most frequent translation", text_figures([usual] * len(test), expected, _FIGURES), must=True),
        Row("that of the most similar sentence", text_figures(near, expected, _FIGURES)),
        Row(model_name(model), tuple(figures[name] for name in _FIGURES)),
    ]
    road.show_scores("Held-out score", ("chrF", "BLEU", "exact"), rows, (".1f", ".1f", ".1%"))
    gain = rows[2].figures[0] - rows[1].figures[0]
    print(f"Against looking up the most similar sentence that is {gain:+.1f} chrF.")

    print("\nHeld-out sentences, what the model writes (>), and what stands in Tatoeba (=):")
    shown = [test[i] for i in spread(8, len(test))]
    for row, answer in zip(shown, predict(model, [row["en"] for row in shown]), strict=True):
        print(f"  {row['en']}\n    > {answer.text}\n    = {' / '.join(row['ko'])}")
    road.finish(
        'unrolled predict {out} "I like music." --n-best 3',
        "unrolled evaluate {out} {data}/test.jsonl.xz --beam 1      # greedy",
        "unrolled train PAIRS.tsv --input text:ko --output text:en --out my-translator/",
    )
