"""Every form from a table to a model folder to answers: its name, that it learns, resumes and answers alike."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import unrolled
from unrolled.checkpoints import checkpoint_steps, load, read_checkpoint, read_config
from unrolled.config import resolve, to_dict
from unrolled.decoding import BeamSettings
from unrolled.errors import ConfigError, DataError, ModelError, TrainingError
from unrolled.evaluation import evaluate_examples
from unrolled.model import form_of
from unrolled.prediction import Searching, given_values, longest, predict
from unrolled.progress import Silent
from unrolled.storage import write_yaml
from unrolled.training import prepare_config

GOOD, BAD = ["좋다", "good", "fine", "great", "재미"], ["싫다", "bad", "awful", "poor", "최악"]
PLAIN = ["the", "a", "film", "story", "was", "and", "very", "much", "영화"]

TINY: dict[str, Any] = {
    "hidden": 24, "layers": 1, "dropout": 0.0, "lr": 0.02, "warmup": 5, "batch_size": 16, "keep_memory": False,
    "embedding": 16,
}  # fmt: skip


def rows(n: int, seed: int = 0) -> list[dict[str, str]]:
    """Reviews with a label, a tag for each word, the words in reverse, and how many there are."""
    draw = random.Random(seed)
    made = []
    for _ in range(n):
        label = draw.randrange(2)
        words = [draw.choice(PLAIN) for _ in range(draw.randint(1, 5))]
        words.insert(draw.randint(0, len(words)), draw.choice([BAD, GOOD][label]))
        tags = ["P" if word in GOOD else "N" if word in BAD else "O" for word in words]
        made.append({
            "text": " ".join(words), "label": ["no", "yes"][label], "tags": " ".join(tags),
            "target": " ".join(words[::-1]), "number": str(len(words)),
        })  # fmt: skip
    return made


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Lines(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)


FORMS = {
    "label": ({"output": "label"}, {"unit": "word", "epochs": 4}, "accuracy", 0.95),
    "pooled": ({"output": "label"}, {"unit": "word", "epochs": 4, "pooling": "max", "bidirectional": True},
               "accuracy", 0.95),
    "labels": ({"output": "labels:tags"}, {"unit": "word+char", "epochs": 4}, "accuracy", 0.97),
    "labels of characters": ({"output": "labels:tags"}, {"unit": "char", "epochs": 8, "hidden": 32}, "accuracy", 0.9),
    "number": ({"output": "number"}, {"unit": "word", "epochs": 12, "cell": "gru"}, "r2", 0.8),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_forms_learn(name: str, tmp_path: Path) -> None:
    ends, settings, figure, enough = FORMS[name]
    model = unrolled.train(rows(400), tmp_path / "m", input="text:text", **ends, **{**TINY, **settings})
    figures = unrolled.evaluate(model, rows(100, seed=1))
    assert figures[figure] > enough, figures
    assert figures["examples"] == 100


def test_reversing_a_sentence_takes_attention(tmp_path: Path) -> None:
    settings = {**TINY, "unit": "word", "epochs": 25, "cell": "gru", "hidden": 48, "output.embedding": 32, "lr": 0.01}
    train, test = rows(600), rows(60, seed=1)
    scores = {}
    for attention in ("dot", "none"):
        model = unrolled.train(
            train, tmp_path / attention, input="text:text", output="text:target", attention=attention, **settings
        )
        scores[attention] = unrolled.evaluate(model, test)["exact"]
    assert scores["dot"] > 0.6, scores
    assert scores["dot"] > scores["none"] + 0.2, scores


# --------------------------------------------------------------------------------------------- the name of a form


@pytest.mark.parametrize(
    "given, asked, more, name",
    [
        ("text", "next", {}, "text -> next: many-to-many, aligned, autoregressive (language model)"),
        ("series", "next", {}, "series -> next: many-to-many, aligned, autoregressive (forecasting)"),
        ("text", "label", {}, "text -> label: many-to-one (sentiment)"),
        ("video", "label", {}, "video -> label: many-to-one (activity)"),
        ("series", "number", {}, "series -> number: many-to-one (regression)"),
        ("image", "label", {}, "image -> label: one-to-one (picture classification)"),
        ("vector", "number", {}, "vector -> number: one-to-one (regression)"),
        ("image", "text", {}, "image -> text: one-to-many (captioning)"),
        ("vector", "text", {}, "vector -> text: one-to-many (captioning)"),
        ("text", "labels", {}, "text -> labels: many-to-many, aligned, no delay (tagging)"),
        ("text", "labels", {"core": {"bidirectional": True}},
         "text -> labels: many-to-many, aligned, both directions (tagging)"),
        ("video", "labels", {}, "video -> labels: many-to-many, aligned, no delay (frame-level video)"),
        ("text", "text", {}, "text -> text: many-to-many, encoder-decoder with dot attention (translation, chatbot)"),
        ("text", "text", {"output": {"attention": "none"}},
         "text -> text: many-to-many, encoder-decoder without attention (translation, chatbot)"),
        ("image", "label", {"input": {"rows": True}}, "image -> label: many-to-one (picture classification)"),
    ],
)  # fmt: skip
def test_the_form_has_the_notes_name(given: str, asked: str, more: dict[str, Any], name: str) -> None:
    assert str(form_of(resolve({"input": {"kind": given}, "output": {"kind": asked}}, more))) == name


@pytest.mark.parametrize(
    "given, asked", [("image", "next"), ("vector", "labels"), ("image", "numbers"), ("video", "next")]
)
def test_ends_without_a_form_are_refused(given: str, asked: str) -> None:
    with pytest.raises(ConfigError, match=r"output\.kind: "):
        form_of(resolve({"input": {"kind": given}, "output": {"kind": asked}}))


def test_the_first_line_of_a_training_names_the_form_and_the_split_is_told(tmp_path: Path) -> None:
    watcher = Lines()
    unrolled.train(rows(50), tmp_path / "m", input="text", output="label", watcher=watcher, **{**TINY, "steps": 2})
    assert "5 of 50 examples, drawn at random, are held out" in watcher.said[0]
    assert watcher.said[1] == "text -> label: many-to-one (sentiment)"


# ------------------------------------------------------------------------------------------------------- law 7


@pytest.mark.parametrize("output", ["label", "text:target", "labels:tags"])
def test_resumed_is_never_interrupted(output: str, tmp_path: Path) -> None:
    """Weights, optimiser, order of examples and dropout go on bit for bit, over the end of an epoch too."""
    settings = {**TINY, "unit": "word", "dropout": 0.3, "batch_size": 8, "max_tokens": 60, "average": 0.9}
    settings["scheduled_sampling"] = 0.3 if output.startswith("text") else 0.0
    data = rows(60)

    def train(out: str, steps: int, **more: Any) -> None:
        more = {**settings, "steps": steps, "schedule": "constant", "save_every": 1, **more}
        unrolled.train(data, tmp_path / out, input="text", output=output, **more)

    train("whole", 13)
    train("parts", 4)
    train("parts", 10, resume=True)
    train("parts", 13, resume=True)
    last = [read_checkpoint(tmp_path / name, checkpoint_steps(tmp_path / name)[-1]) for name in ("whole", "parts")]
    assert last[0].tensors.keys() == last[1].tensors.keys()
    for name, tensor in last[0].tensors.items():
        assert torch.equal(tensor, last[1].tensors[name]), name
    with pytest.raises(TrainingError, match="the training text is not the one"):
        unrolled.train(data[:-1], tmp_path / "parts", input="text", output=output, resume=True, steps=20)


def test_a_saved_model_answers_the_same(tmp_path: Path) -> None:
    model = unrolled.train(rows(40), tmp_path / "m", input="text", output="labels:tags", **{**TINY, "steps": 3})
    unrolled.save(model, tmp_path / "copy")
    texts = ["a good film", "싫다"]
    answers = [
        list(predict(m, texts)) for m in (model, unrolled.load(tmp_path / "m"), unrolled.load(tmp_path / "copy"))
    ]
    assert answers[0] == answers[1] == answers[2]


# ------------------------------------------------------------------------------------------------------- answers


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One of each output over text, barely trained."""
    folder = tmp_path_factory.mktemp("models")
    outputs = {"label": "label", "labels": "labels:tags", "number": "number", "text": "text:target"}
    return {
        name: unrolled.train(rows(60), folder / name, input="text", output=output, unit="word", **{**TINY, "steps": 20})
        for name, output in outputs.items()
    }


@pytest.mark.parametrize("kind", ["label", "labels", "number", "text"])
def test_answers_do_not_depend_on_the_batch(kind: str, models: dict[str, Any]) -> None:
    """Law 9, and 2: in the order of the inputs, the same one by one."""
    texts = [row["text"] for row in rows(33, seed=5)]
    together = [answer.value for answer in predict(models[kind], texts, batch_size=16)]
    alone = [answer.value for text in texts for answer in predict(models[kind], [text])]
    if kind == "number":
        assert together == pytest.approx(alone, rel=1e-5)
    else:
        assert together == alone


def test_beam_one_is_greedy_and_its_score_the_models_own(models: dict[str, Any]) -> None:
    model = models["text"]
    (answer,) = predict(model, ["a good film"], searching=Searching(BeamSettings(beam=1)))
    example = [{"text": "a good film", "target": answer.text}]
    figures = unrolled.evaluate(model, example)
    steps = len(answer.text.split()) + 1
    assert -figures["loss"] * steps == pytest.approx(answer.details["log_probability"], rel=1e-4)


def test_n_best_are_different_and_sorted(models: dict[str, Any]) -> None:
    (answer,) = predict(models["text"], ["a good film"], searching=Searching(BeamSettings(beam=6, n_best=4)))
    best = answer.details["n_best"]
    assert len({b["text"] for b in best}) == 4
    assert [b["score"] for b in best] == sorted((b["score"] for b in best), reverse=True)
    assert answer.text == best[0]["text"]


def test_unknown_words_are_copied_from_the_source(models: dict[str, Any]) -> None:
    model = models["text"]
    with torch.no_grad():
        model.writer.bias[0] += 50  # it writes nothing but <unk>
    try:
        searching = Searching(BeamSettings(beam=2, max_length=4), replace_unknown=True)
        (answer,) = predict(model, ["good zzz"], searching=searching)
    finally:
        with torch.no_grad():
            model.writer.bias[0] -= 50
    assert set(answer.text.split()) <= {"good", "zzz"}
    assert answer.text


# ----------------------------------------------------------------------------------------------- the command line


def run(*arguments: object, given: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "unrolled", *map(str, arguments)]
    return subprocess.run(command, input=given, capture_output=True, text=True, encoding="utf-8", check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reviews as a TSV file, and a classifier `m` and a translator `t` trained on it by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    names = list(rows(1)[0])
    for name, made in (("train.tsv", rows(80)), ("test.tsv", rows(20, seed=2))):
        lines = ["\t".join(names), *("\t".join(row.values()) for row in made)]
        (folder / name).write_text("\n".join(lines) + "\n", "utf-8")
    flags = ["--unit", "word", "--hidden", 16, "--layers", 1, "--embedding", 8, "--steps", 12, "--batch-size", 8]
    done = run(
        "train", folder / "train.tsv", "--input", "text:text", "--output", "label:label", "--out", folder / "m", *flags
    )
    assert done.returncode == 0, done.stderr
    assert "text -> label: many-to-one" in done.stderr
    assert f"now try: unrolled predict {folder / 'm'} ...    (a text, a file, or lines on" in done.stderr
    done = run(
        "train", folder / "train.tsv", "--input", "text:text", "--output", "text:target", "--out", folder / "t", *flags
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_evaluate_prints_figures_or_json(folder: Path) -> None:
    figures = json.loads(run("evaluate", folder / "m", folder / "test.tsv", "--json").stdout)
    assert {"accuracy", "macro_f1", "micro_f1", "examples", "loss", "confusion", "seconds"} <= set(figures)
    assert figures["examples"] == 20
    shown = run("evaluate", folder / "m", folder / "test.tsv").stdout
    assert f"{figures['accuracy']:.4f}" in shown
    assert "yes" in shown, "the confusion table names the labels"
    figures = json.loads(run("evaluate", folder / "t", folder / "test.tsv", "--json").stdout)
    assert {"bleu", "chrf", "perplexity", "signature", "examples"} <= set(figures)


def test_evaluate_judges_what_predict_writes(folder: Path) -> None:
    """With the same settings of the search, whatever they are."""
    model = load(folder / "t")
    data = folder / "test.tsv"
    found = []
    for flags, settings in (
        (["--length-penalty", 0], {"length_penalty": 0.0}),
        (["--length-penalty", 9], {"length_penalty": 9.0}),
        (["--block-ngram", 1], {"block_ngram": 1}),
    ):
        found.append(json.loads(run("evaluate", folder / "t", data, *flags, "--beam", 3, "--json").stdout)["chrf"])
        searching = Searching(BeamSettings(beam=3, max_length=longest, **settings))
        assert found[-1] == pytest.approx(evaluate_examples(model, data, searching=searching)["chrf"], abs=1e-9)
    assert found[2] not in found[:2], "a flag does something"


def test_predict_takes_texts_files_and_lines(folder: Path) -> None:
    texts = ["a good film", "최악", "very very bad"]
    (folder / "texts.txt").write_text("\n".join(texts) + "\n", "utf-8")
    by_argument = run("predict", folder / "m", *texts)
    assert by_argument.returncode == 0, by_argument.stderr
    lines = by_argument.stdout.splitlines()
    assert len(lines) == 3
    assert set(lines) <= {"yes", "no"}
    assert run("predict", folder / "m", folder / "texts.txt").stdout.splitlines() == lines
    assert run("predict", folder / "m", given="\n".join(texts) + "\n").stdout.splitlines() == lines
    assert len(run("predict", folder / "m", folder / "test.tsv").stdout.splitlines()) == 20
    objects = [json.loads(line) for line in run("predict", folder / "m", *texts, "--json").stdout.splitlines()]
    assert [o["output"] for o in objects] == lines
    assert all(sum(o["scores"].values()) == pytest.approx(1) for o in objects)
    n_best = run("predict", folder / "t", "a good film", "--beam", 4, "--n-best", 3).stdout.splitlines()
    assert len(n_best) == 3


MISTAKES = {
    "a missing column": (["train", "train.tsv", "--input", "text:txet", "--output", "label", "--out", "x"],
                         "did you mean 'text'"),
    "an unknown kind": (["train", "train.tsv", "--input", "txt", "--output", "label", "--out", "x"],
                        "--input: unknown kind 'txt': did you mean 'text'"),
    "an empty cell": (["train", "empty.tsv", "--input", "text", "--output", "label", "--out", "x"],
                      "empty.tsv, line 3: the text is empty"),
    "an empty label": (["train", "nolabel.tsv", "--input", "text", "--output", "label", "--out", "x"],
                       "nolabel.tsv, line 3: the label is empty"),
    "one class only": (["train", "one.tsv", "--input", "text", "--output", "label", "--out", "x"],
                       "expected at least two different ones in the training part, got only one, 'yes'"),
    "tags of another length": (["train", "tags.tsv", "--input", "text", "--output", "labels:tags", "--out", "x"],
                               "tags.tsv, line 3: expected an output for each of the 2 steps, got 1"),
    "a number that is none": (["train", "numbers.tsv", "--input", "text", "--output", "number", "--out", "x"],
                              "expected a number, got '"),
    "ends without a form": (["train", "train.tsv", "--input", "vector", "--output", "labels", "--out", "x"],
                            "a vector is one step"),
    "another form for generate": (["generate", "m"], "this model is text -> label: many-to-one"),
    "no beam": (["predict", "t", "good", "--beam", "0"], "beam: expected at least 1"),
    "an empty source sentence": (["predict", "t", ""], "input 1: the text is empty"),
    "nothing but unknown words": (["predict", "t", "qqq www"], "only symbols that the model never saw"),
    "a missing file": (["train", "nowhere.tsv", "--input", "text", "--output", "label", "--out", "x"], "nowhere.tsv"),
    "evaluate without the output": (["evaluate", "m", "texts-only.tsv"], "label"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    Path("empty.tsv").write_text("text\tlabel\na\tyes\n\tno\nb\tno\nc\tyes\n" * 1)
    Path("nolabel.tsv").write_text("text\tlabel\na\tyes\nb\t\nb\tno\nc\tyes\n")
    Path("one.tsv").write_text("text\tlabel\na\tyes\nb\tyes\nc\tyes\n")
    Path("tags.tsv").write_text("text\ttags\na b\tO O\na b\tO\nc\tX\n")
    Path("numbers.tsv").write_text("text\tnumber\na\t1\nb\t2\nc\tX\nd\tY\n")
    Path("texts-only.tsv").write_text("text\tother\na b\tO O\na b\tO\nc\tX\n")
    arguments, said = MISTAKES[name]
    done = run(*arguments, *(["--set", "data.valid_fraction=0.3"] if arguments[0] == "train" else []))
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert said in line
    assert "Traceback" not in done.stderr
    assert not Path("x").exists(), "nothing half written"


def test_labels_never_seen_in_training_are_counted_and_named(folder: Path) -> None:
    (folder / "other.tsv").write_text("text\tlabel\ngood\tyes\nbad\tmaybe\n", "utf-8")
    figures = json.loads(run("evaluate", folder / "m", folder / "other.tsv", "--json").stdout)
    assert figures["unseen"] == 1
    assert figures["unseen_labels"] == {"maybe": 1}


def test_lines_of_a_text_file_are_inputs_whatever_the_column_was_called(tmp_path: Path) -> None:
    table = [{"document": row["text"], "label": row["label"]} for row in rows(20)]
    model = unrolled.train(
        table, tmp_path / "m", input="text:document", output="label:label", hidden=8, layers=1, steps=2
    )
    lines = ["good", '"bad', "너무 좋아"]
    (tmp_path / "lines.txt").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    assert list(given_values(model, [str(tmp_path / "lines.txt")])) == lines
    (tmp_path / "table.tsv").write_text("document\tlabel\ngood\tyes\n", "utf-8")
    assert list(given_values(model, [str(tmp_path / "table.tsv")])) == ["good"]


def test_nothing_is_learnt_from_where_all_examples_are_bad(tmp_path: Path) -> None:
    table = [{"file": f"{number}.png", "label": "ab"[number % 2]} for number in range(5)]
    with pytest.raises(DataError, match=r"^no example can be used; the first: .*cannot read .*\d.png: No such file"):
        unrolled.train(table, tmp_path / "m", input="image:file", output="label:label", skip_bad=True)
    assert not (tmp_path / "m").exists()


def test_bad_examples_are_skipped_if_asked(folder: Path, tmp_path: Path) -> None:
    (folder / "holes.tsv").write_text("text\tlabel\n" + "good\tyes\nbad\tno\n" * 20 + "\tyes\n", "utf-8")
    flags = ["--hidden", 8, "--layers", 1, "--steps", 2, "--out", tmp_path / "m", "--skip-bad"]
    done = run("train", folder / "holes.tsv", "--input", "text", "--output", "label", *flags)
    assert done.returncode == 0, done.stderr
    assert "holes.tsv, line 42: the text is empty" in done.stderr
    (folder / "more.tsv").write_text("text\tlabel\n" + "\tyes\n" * 12 + "good\tyes\nbad\tno\n", "utf-8")
    done = run("evaluate", tmp_path / "m", folder / "more.tsv", "--skip-bad")
    assert [line.split(": the")[0] for line in done.stderr.splitlines() if line.startswith("left out")] == [
        *(f"left out: {folder / 'more.tsv'}, line {line}" for line in range(2, 12)),
        "left out: 2 more",
    ]
    done = run("train", folder / "more.tsv", "--valid", folder / "holes.tsv", "--input", "text", "--output", "label",
               "--force", *flags)  # fmt: skip
    assert "left out: 2 more" in done.stderr


def test_a_language_model_does_not_predict_labels(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat.\n" * 60)
    model = unrolled.train(text, tmp_path / "m", hidden=8, layers=1, window=8, batch_size=4, steps=2, keep_memory=False)
    with pytest.raises(ModelError, match="this is a language model"):
        list(predict(model, ["a"]))


def test_a_language_model_can_be_the_start_of_a_classifier(tmp_path: Path) -> None:
    """`--init-from`: reader and core are its own, the writer is new."""
    text = tmp_path / "text.txt"
    text.write_text("".join(row["text"] + "\n" for row in rows(200)), "utf-8")
    settings = {"hidden": 16, "layers": 1, "embedding": 8, "keep_memory": False}
    first = unrolled.train(text, tmp_path / "lm", window=8, batch_size=4, steps=5, **settings)
    second = unrolled.train(
        rows(40), tmp_path / "m", input="text", output="label", init_from=str(tmp_path / "lm"), lr=1e-30, steps=1,
        keep_memory=False,
    )  # fmt: skip
    theirs, ours = dict(first.named_parameters()), dict(second.named_parameters())
    for name in ours:
        if name.startswith(("reader.", "core.")):
            assert torch.equal(ours[name], theirs[name]), name
    assert second.config.core.hidden == 16


def test_word_vectors_are_read_where_words_have_one(tmp_path: Path) -> None:
    path = tmp_path / "vectors.txt"
    path.write_text("3 4\ngood 1 2 3 4\nBad 4 3 2 1\nnowhere 0 0 0 1\n")
    watcher = Lines()
    model = unrolled.train(
        rows(60), tmp_path / "m", input="text", output="label", unit="word", vectors=str(path), watcher=watcher,
        **{**TINY, "embedding": 4, "lr": 1e-30, "steps": 1},
    )  # fmt: skip
    table, vocabulary = model.reader.table, model.ends.input.vocabulary
    number = int(vocabulary.encode("good")[0])
    scaled = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert torch.nn.functional.cosine_similarity(table[number], scaled, dim=0) > 0.9999
    assert any("vectors for" in line for line in watcher.said)
    with pytest.raises(ConfigError, match=r"set input\.embedding=4"):
        unrolled.train(
            rows(60),
            tmp_path / "n",
            input="text",
            output="label",
            unit="word",
            vectors=str(path),
            **{**TINY, "steps": 1},
        )


def test_data_from_python_may_be_any_iterable(tmp_path: Path) -> None:
    class Dataset:
        """As Hugging Face's."""

        def __init__(self, made: list[dict[str, str]]) -> None:
            self.made = made
            self.column_names = list(made[0])

        def __len__(self) -> int:
            return len(self.made)

        def __getitem__(self, i: Any) -> Any:
            if isinstance(i, slice):
                return {name: [row[name] for row in self.made[i]] for name in self.column_names}
            return self.made[i]

    weights = []
    for k, data in enumerate((rows(30), iter(rows(30)), Dataset(rows(30)))):
        model = unrolled.train(data, tmp_path / str(k), input="text", output="label", **{**TINY, "steps": 2})
        weights.append([p.clone() for p in model.parameters()])
    for other in weights[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights[0], other, strict=True))


def test_an_empty_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        unrolled.train([], tmp_path / "m", input="text", output="label")


@pytest.mark.parametrize("unit", ["word", "char", "word+char"])
def test_labels_stream_with_no_delay(unit: str, tmp_path: Path) -> None:
    """Law 1: fed step by step, a model gives at each step what it gives to the whole, at once."""
    settings = {**TINY, "unit": unit, "steps": 5, "layers": 2}
    model = unrolled.train(rows(40), tmp_path / "m", input="text", output="labels:tags", **settings)
    text = model.ends.input
    steps = text.collate([text.encode(value) for value in ("a good film", "싫다 very much 영화")])
    state, streamed = model.begin(batch=2), []
    with torch.inference_mode():
        for t in range(int(steps.lengths.max())):
            grids = [x[t : t + 1] for x in steps.tensors[: 2 if unit == "word+char" else 1]]
            one = steps._replace(tensors=(*grids, *steps.tensors[len(grids) :]), ends=None, words=None)
            scores, state = model.step(one, state)
            streamed.append(scores)
        hidden = model.core(model.reader(*steps.tensors), lengths=steps.lengths).outputs
        whole = model.writer.at(hidden)
    for b, length in enumerate(steps.lengths.tolist()):
        assert torch.equal(torch.stack(streamed)[:length, b], whole[:length, b])


def test_what_needs_the_future_cannot_stream(tmp_path: Path) -> None:
    settings = {**TINY, "steps": 1, "bidirectional": True}
    model = unrolled.train(rows(40), tmp_path / "m", input="text", output="labels:tags", **settings)
    text = model.ends.input
    with pytest.raises(ModelError, match="bidirectional core needs the whole sequence"):
        model.step(text.collate([text.encode("a")]), model.begin())
    model = unrolled.train(rows(40), tmp_path / "n", input="text", output="label", **{**TINY, "steps": 1})
    with pytest.raises(ModelError, match="one answer to the whole input"):
        model.begin()


# ---------------------------------------------------------------------------------- numbers, pictures and films


def test_a_label_a_frame_from_a_table_with_groups(tmp_path: Path) -> None:
    """`--input series:x,y --output labels:phase --group video`: the sign of a sum so far, which takes a memory."""
    draw = random.Random(0)
    lines = ["video,x,y,phase"]
    for v in range(40):
        total = 0.0
        for _ in range(draw.randint(5, 12)):
            x, y = draw.choice([-1, 1]), draw.gauss(0, 1)
            total += x
            lines.append(f"v{v},{x},{y:.3f},{'up' if total > 0 else 'down'}")
    (tmp_path / "frames.csv").write_text("\n".join(lines) + "\n")
    model = unrolled.train(
        tmp_path / "frames.csv", tmp_path / "m", input="series:x,y", output="labels:phase", group="video",
        **{**TINY, "epochs": 30, "embedding": None},
    )  # fmt: skip
    assert str(model.form) == "series -> labels: many-to-many, aligned, no delay (a label per step)"
    figures = unrolled.evaluate(model, tmp_path / "frames.csv")
    assert figures["accuracy"] > 0.9, figures
    assert figures["examples"] == 40


def test_a_series_is_forecast_from_the_command_line(tmp_path: Path) -> None:
    """A wave of twelve steps: far better than no change, and no worse than a season ago."""
    import math

    lines = ["OT", *(f"{10 + math.sin(2 * math.pi * t / 12):.4f}" for t in range(600))]
    (tmp_path / "power.csv").write_text("\n".join(lines) + "\n")
    flags = ["--hidden", 16, "--layers", 1, "--dropout", 0, "--window", 24, "--horizon", 6, "--epochs", 8, "--lr", 0.02]
    ends = ["--input", "series:OT", "--output", "next"]
    done = run("train", tmp_path / "power.csv", *ends, *flags, "--out", tmp_path / "m", "--batch-size", 8)
    assert done.returncode == 0, done.stderr
    assert "series -> next: many-to-many, aligned, autoregressive (forecasting)" in done.stderr
    figures = json.loads(run("evaluate", tmp_path / "m", tmp_path / "power.csv", "--json").stdout)
    assert figures["mase"] < 0.2 * figures["naive"]["mase"]
    assert "last" not in figures  # without a season it is the naive one
    (line,) = run("predict", tmp_path / "m", tmp_path / "power.csv").stdout.splitlines()
    found = [float(step) for step in line.split("; ")]
    assert found == pytest.approx([10 + math.sin(2 * math.pi * t / 12) for t in range(600, 606)], abs=0.25)


def picture(tall: bool, at: int) -> Any:
    import numpy as np
    from PIL import Image

    pixels = np.full((16, 16, 3), 255, np.uint8)
    pixels[(slice(2, 14), slice(at, at + 3)) if tall else (slice(at, at + 3), slice(2, 14))] = 0
    return Image.fromarray(pixels)


def test_pictures_are_named_and_described(tmp_path: Path) -> None:
    """image -> text, one core, fed its words or zeros; image -> label."""
    pytest.importorskip("PIL")
    lines = ["file\tcaption\tlabel"]
    for at in range(2, 12):
        for tall in (True, False):
            picture(tall, at).save(tmp_path / f"{tall}{at}.png")
            lines.append(f"{tall}{at}.png\t{'tall bar' if tall else 'flat one'}\t{'tall' if tall else 'flat'}")
    (tmp_path / "captions.tsv").write_text("\n".join(lines * 1) + "\n")
    settings = {**TINY, "size": 16, "features": 16, "epochs": 60, "batch_size": 8, "lr": 0.005,
                "embedding": None}  # fmt: skip
    for feed in ("word", "zeros"):
        model = unrolled.train(
            tmp_path / "captions.tsv", tmp_path / feed, input="image:file", output="text:caption",
            **{**settings, "output.unit": "word", "feed": feed},
        )  # fmt: skip
        assert "one-to-many" in str(model.form)
        figures = unrolled.evaluate(model, tmp_path / "captions.tsv")
        assert figures["exact"] > 0.9, figures
    (answer,) = predict(model, [tmp_path / "True5.png"])
    assert answer.text == "tall bar"
    model = unrolled.train(
        tmp_path / "captions.tsv", tmp_path / "label", input="image:file", output="label:label", **settings
    )
    assert unrolled.evaluate(model, tmp_path / "captions.tsv")["accuracy"] > 0.9
    (tmp_path / "True5.png").write_bytes(b"no picture")
    unrolled.train(
        tmp_path / "captions.tsv", tmp_path / "bad", input="image:file", output="label:label", skip_bad=True,
        **{**settings, "steps": 1},
    )  # fmt: skip
    with pytest.raises(DataError, match=r"captions\.tsv, line 8: .*True5\.png"):
        unrolled.evaluate(model, tmp_path / "captions.tsv")
    assert unrolled.evaluate(model, tmp_path / "captions.tsv", skip_bad=True)["left_out"] == 1


@pytest.mark.parametrize(
    "kind, rule", [("image", "set input.features (now 128) in its place"), ("vector", "leave it out")]
)
def test_words_read_by_the_core_that_writes_them_have_no_size_of_their_own(
    kind: str, rule: str, tmp_path: Path
) -> None:
    ends: dict[str, Any] = {"input": f"{kind}:x", "output": "text:caption"}
    with pytest.raises(ConfigError) as caught:
        prepare_config(tmp_path, **ends, **{"output.embedding": 64})
    assert str(caught.value) == (
        f"output.embedding: one core reads the {kind} and then the words that it writes, whose vectors are as long as "
        f"the {kind}'s: {rule}; got 64"
    )
    # What --dump-config writes can be given back, and so can the size that it has.
    assert prepare_config(tmp_path, to_dict(prepare_config(tmp_path, **ends))).output.embedding == 256
    if kind == "image":
        prepare_config(tmp_path, **ends, features=64, **{"output.embedding": 64})
        rows = {"input.rows": True, "output.embedding": 64}  # a decoder of its own
        assert prepare_config(tmp_path, **ends, **rows).output.embedding == 64


def test_models_saved_with_another_size_of_words_still_load(tmp_path: Path) -> None:
    table = [{"v": [float(number), 1.0], "caption": "tall bar"} for number in range(20)]
    settings = {**TINY, "steps": 2, "embedding": None}
    unrolled.train(table, tmp_path / "m", input="vector:v", output="text:caption", **settings)
    stored = tmp_path / "m" / "config.yaml"
    saved = to_dict(read_config(tmp_path / "m"))
    write_yaml(stored, "config", {**saved, "output": {**saved["output"], "embedding": 64}})
    model = unrolled.load(tmp_path / "m")
    assert model.config.output.embedding == 64
    assert len(list(predict(model, [[1.0, 1.0]]))) == 1
    unrolled.train(table, tmp_path / "m", resume=True, steps=3)


def test_films_are_labelled_frame_by_frame(tmp_path: Path) -> None:
    """A row a frame: rows of one file are one film. Bright or dark, seen at once; one direction, so no delay."""
    av = pytest.importorskip("av")
    import numpy as np

    draw = random.Random(1)
    lines = ["file,phase"]
    for v in range(8):
        phases = [draw.choice(["light", "dark"]) for _ in range(10)]
        with av.open(str(tmp_path / f"{v}.mp4"), "w") as film:
            stream = film.add_stream("mpeg4", rate=10)
            stream.width = stream.height = 32
            stream.pix_fmt = "yuv420p"
            for phase in phases:
                pixels = np.full((32, 32, 3), 220 if phase == "light" else 30, np.uint8)
                film.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            film.mux(stream.encode())
        lines += [f"{v}.mp4,{phase}" for phase in phases]
    (tmp_path / "clips.csv").write_text("\n".join(lines) + "\n")
    settings = {**TINY, "size": 8, "features": 8, "epochs": 30, "batch_size": 2, "lr": 0.01, "embedding": None}
    model = unrolled.train(
        tmp_path / "clips.csv", tmp_path / "m", input="video:file", output="labels:phase", **settings
    )
    assert str(model.form) == "video -> labels: many-to-many, aligned, no delay (frame-level video)"
    figures = unrolled.evaluate(model, tmp_path / "clips.csv")
    assert figures["accuracy"] > 0.9, figures
    assert figures["tokens"] == 80


def test_films_are_labelled_by_where_something_is(tmp_path: Path) -> None:
    """`--set input.places=4`: a dot is to the left or to the right. The folder read back says the same."""
    av = pytest.importorskip("av")
    import numpy as np

    draw = random.Random(1)
    lines = ["file,side"]
    for v in range(8):
        sides = [draw.choice(["left", "right"]) for _ in range(10)]
        with av.open(str(tmp_path / f"{v}.mp4"), "w") as film:
            stream = film.add_stream("mpeg4", rate=10)
            stream.width = stream.height = 32
            stream.pix_fmt = "yuv420p"
            for side in sides:
                pixels = np.full((32, 32, 3), 30, np.uint8)
                top, left = draw.randrange(2, 22), draw.randrange(2, 8) + (14 if side == "right" else 0)
                pixels[top : top + 8, left : left + 8] = 220
                film.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            film.mux(stream.encode())
        lines += [f"{v}.mp4,{side}" for side in sides]
    (tmp_path / "clips.csv").write_text("\n".join(lines) + "\n")
    settings = {**TINY, "size": 16, "places": 4, "epochs": 15, "batch_size": 2, "lr": 0.01, "embedding": None}
    model = unrolled.train(tmp_path / "clips.csv", tmp_path / "m", input="video:file", output="labels:side", **settings)
    assert unrolled.evaluate(model, tmp_path / "clips.csv")["accuracy"] > 0.9
    films = [str(tmp_path / f"{v}.mp4") for v in range(8)]
    said, again = (unrolled.predict(one, films) for one in (model, unrolled.load(tmp_path / "m")))
    assert [one.value for one in said] == [one.value for one in again]


def test_a_treebank_is_read_by_its_words(tmp_path: Path) -> None:
    """`--input text --output labels:upos` on CoNLL-U: the words as they are cut, not those between spaces."""
    sentence = "# text = Good film!\n1\tGood\t_\tADJ{0}\n2\tfilm\t_\tNOUN{0}\n3\t!\t_\tPUNCT{0}\n\n".format("\t_" * 6)
    (tmp_path / "en.conllu").write_text(sentence * 20, "utf-8")
    model = unrolled.train(
        tmp_path / "en.conllu", tmp_path / "m", input="text", output="labels:upos", unit="word+char",
        **{**TINY, "steps": 2},
    )  # fmt: skip
    assert unrolled.evaluate(model, tmp_path / "en.conllu")["tokens"] == 60
