"""Many-to-many with an encoder and a decoder, as a chatbot: a remark goes in, an answer comes out."""

from __future__ import annotations

from typing import Any

from unrolled.demo.baselines import ngram_perplexity
from unrolled.demo.road import Road, Row, model_name, spread
from unrolled.evaluation import evaluate_examples
from unrolled.kinds import Written
from unrolled.prediction import predict

__all__ = ["run"]

_SETTINGS: dict[str, Any] = {
    "input.unit": "char", "output.unit": "char", "cell": "gru", "hidden": 224, "layers": 1, "dropout": 0.4,
    "input.embedding": 96, "output.embedding": 96, "bidirectional": True, "attention": "general", "batch_size": 32,
    "lr": 3e-3, "average": 0.99, "epochs": 8,
}  # fmt: skip
_SHORT: dict[str, Any] = {**_SETTINGS, "hidden": 96, "dropout": 0.3, "batch_size": 64, "epochs": 2}

_OWN = ("안녕", "오늘 너무 피곤해", "배고프다", "여자친구랑 헤어졌어", "주말에 뭐 할까?", "고마워")


def run(road: Road) -> None:
    """Train on question and answer, and answer others. It must beat a unigram model of the answers; a trigram model,
    which has not read the question either, is shown beside it."""
    learn, test = road.rows("train.tsv.xz"), road.rows("test.tsv.xz")
    print(
        f"Korean remarks and answers to them (Chatbot_data_for_Korean): {len(learn):,} pairs to learn from, "
        f"{len(test):,} held out."
    )
    model = road.learn_examples(
        road.data / "train.tsv.xz", road.data / "valid.tsv.xz", input="text:question", output="text:answer",
        **(_SHORT if road.short else _SETTINGS),
    )  # fmt: skip
    road.show_curve("perplexity", "perplexity per symbol of other answers")

    figures = evaluate_examples(model, road.data / "test.tsv.xz", watcher=road.watcher)
    written = model.ends.output
    assert isinstance(written, Written)
    vocabulary = written.vocabulary
    ids = [[vocabulary.encode(str(row["answer"])) for row in part] for part in (learn, test)]
    unigram, trigram = (ngram_perplexity(ids[0], ids[1], order, len(vocabulary)) for order in (1, 3))
    rows = [
        Row("unigram: how frequent each symbol is", (unigram,), must=True),
        Row("trigram of the answers", (trigram,)),
        Row(model_name(model), (figures["perplexity"],)),
    ]
    road.show_scores("Perplexity of held-out answers", ("",), rows, (".2f",), smaller=True)
    print(f"To the letter as in the data: {figures['exact']:.1%} of its answers.")

    print("\nHeld-out remarks, what the model answers (>) and what stands in the data (=); then some of our own:")
    shown = [test[i] for i in spread(6, len(test))]
    remarks = [str(row["question"]) for row in shown] + list(_OWN)
    wanted: list[str | None] = [*(str(row["answer"]) for row in shown), *(None for _ in _OWN)]
    for remark, answer, right in zip(remarks, predict(model, remarks), wanted, strict=True):
        print(f"  {remark}\n    > {answer.text}" + (f"\n    = {right}" if right else ""))
    road.finish(
        'unrolled predict {out} "심심해" --n-best 3',
        'unrolled predict {out} "심심해" --temperature 0.7 --seed 2      # another answer with each seed',
        "unrolled predict {out}      # reads what you type, line by line",
    )
