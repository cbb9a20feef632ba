"""Many-to-one: a film review goes in, whether its writer liked the film comes out."""

from __future__ import annotations

from typing import Any

from unrolled.demo.baselines import NaiveBayes, most_frequent
from unrolled.demo.road import Road, Row, model_name, spread
from unrolled.evaluation import evaluate_examples
from unrolled.kinds import Answer
from unrolled.kinds.scores import LabelScore
from unrolled.prediction import predict

__all__ = ["run"]

_SETTINGS: dict[str, Any] = {
    "cell": "gru", "hidden": 128, "layers": 1, "embedding": 96, "bidirectional": True, "pooling": "max",
    "dropout": 0.3, "batch_size": 64, "lr": 3e-3, "epochs": 4,
}  # fmt: skip
_SHORT: dict[str, Any] = {**_SETTINGS, "hidden": 64, "epochs": 2}

_OWN = ("두 시간이 어떻게 갔는지 모르겠다", "돈이 아깝다", "기대 안 했는데 울었네요", "배우는 좋은데 이야기가 지루함")


def run(road: Road) -> None:
    """Train on reviews and judge others. It must beat the most frequent label; naive Bayes is shown beside it."""
    learn, test = road.rows("train.tsv.xz"), road.rows("test.tsv.xz")
    print(
        f"Korean film reviews (NSMC) of 5 to 50 characters: {len(learn):,} to learn from, {len(test):,} held out, "
        "each negative or positive."
    )
    model = road.learn_examples(
        road.data / "train.tsv.xz", road.data / "valid.tsv.xz", input="text:document", output="label:label",
        **(_SHORT if road.short else _SETTINGS),
    )  # fmt: skip
    road.show_curve("accuracy", "share of right answers to 1,000 other reviews")

    figures = evaluate_examples(model, road.data / "test.tsv.xz", watcher=road.watcher)
    labels = [row["label"] for row in learn]
    usual = most_frequent(labels)
    bayes = NaiveBayes([row["document"] for row in learn], labels)
    rows = [
        Row(f"always {usual}", _scores([usual] * len(test), test), must=True),
        Row("naive Bayes on the characters", _scores([bayes.answer(row["document"]) for row in test], test)),
        Row(model_name(model), (figures["accuracy"], figures["macro_f1"])),
    ]
    road.show_scores("Held-out score", ("accuracy", "macro F1"), rows, (".1%", ".3f"))
    gain = 100 * (rows[2].figures[0] - rows[1].figures[0])
    print(
        f"Counting characters, in whatever order, gets far; reading them in order is {abs(gain):.1f} points "
        f"{'better' if gain > 0 else 'worse'}."
    )

    print("\nHeld-out reviews (x: wrong), and some written for this demo:")
    shown = [test[i] for i in spread(8, len(test))]
    texts = [str(row["document"]) for row in shown] + list(_OWN)
    wanted: list[str | None] = [*(str(row["label"]) for row in shown), *(None for _ in _OWN)]
    for text, answer, label in zip(texts, predict(model, texts), wanted, strict=True):
        sure = max(answer.details["scores"].values())
        print(f"  {' ' if label in (None, answer.value) else 'x'} {answer.value:<8} {sure:>4.0%}  {text}")
    road.finish(
        'unrolled predict {out} "재미있는 영화였어요" "배우가 아깝다" --json',
        "unrolled evaluate {out} {data}/test.tsv.xz      # with the table of confusions",
        "unrolled train YOUR.tsv --input text:COLUMN --output label:COLUMN --out my-labels/",
    )


def _scores(answers: list[str], test: list[dict[str, Any]]) -> tuple[float, float]:
    score = LabelScore(sorted({row["label"] for row in test}))
    for answer, row in zip(answers, test, strict=True):
        score.add(Answer(answer, answer), row["label"])
    figures = score.figures()
    return figures["accuracy"], figures["macro_f1"]
