"""The recipes: their configs are valid, their data is checked, and the runner goes from data to figures."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import re
import sys
import tarfile
import wave
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from unrolled.cells import cell_names
from unrolled.cli import app
from unrolled.config import load_config, resolve
from unrolled.demo.road import DATA as SHIPPED
from unrolled.storage import read_json, write_json

RECIPES = Path(__file__).parents[1] / "recipes"
NAMES = sorted(path.parent.name for path in RECIPES.glob("*/recipe.yaml"))


def load_runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipes_run", RECIPES / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runner = load_runner()


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_whole(name: str) -> None:
    recipe = runner.read_recipe(RECIPES / name)
    assert set(recipe) == {"data", "train", "test", "models", "figures"}
    assert callable(runner.load_prepare(RECIPES / name))
    readme = (RECIPES / name / "README.md").read_text("utf-8")
    for wanted in recipe["data"]:
        for file, sha256 in wanted.items():
            assert re.fullmatch("[0-9a-f]{64}", sha256), file
            assert sha256 in readme, f"{file}: the README gives another sha256"
    assert f"recipes/run.py {name} --data" in readme
    assert f"({name}/README.md)" in (RECIPES / "README.md").read_text("utf-8")
    for config in recipe["models"].values():
        resolve(load_config(RECIPES / name / config), cells=cell_names())


def test_recipes_are_found() -> None:
    assert runner.recipe_names() == NAMES
    assert {"shakespeare", "korean-language-model"} <= set(NAMES)


def test_korean_recipes_differ_in_the_unit_alone() -> None:
    char, jamo = (yaml.safe_load((RECIPES / "korean-language-model" / f"{unit}.yaml").read_text("utf-8"))
                  for unit in ("char", "jamo"))  # fmt: skip
    assert (char["input"].pop("unit"), jamo["input"].pop("unit")) == ("char", "jamo")
    assert char == jamo


def prepared(name: str, data: Path, out: Path) -> dict[str, str]:
    """What the recipe's prepare.py makes of the files in `data`, by name."""
    out.mkdir()
    runner.load_prepare(RECIPES / name)(data, out)
    return {path.name: path.read_text("utf-8") for path in sorted(out.iterdir())}


def write_packed(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pack = lzma.compress if name.endswith(".xz") else gzip.compress
        (folder / name).write_bytes(pack(text.encode()))


def test_shipped_text_is_the_recipes_data(tmp_path: Path) -> None:
    recipe = runner.read_recipe(RECIPES / "shakespeare")
    assert runner.find_data(recipe, SHIPPED)
    made = prepared("shakespeare", SHIPPED, tmp_path / "out")
    train, valid = (made[name].encode() for name in ("train.txt", "valid.txt"))
    assert hashlib.sha256(train + valid).hexdigest() == recipe["data"][0]["input.txt"]
    assert (len(train), len(valid)) == (1_003_854, 111_540)
    assert set(train) >= set(valid)


def test_chapters_are_held_out_whole(tmp_path: Path) -> None:
    refs = [f"{book} {chapter}:{verse}" for book in ("Genesis", "Ruth") for chapter in range(1, 41) for verse in (1, 2)]
    table = "\n".join(["ref\ten\tko", *(f"{ref}\tenglish\t{ref}" for ref in refs), ""])
    write_packed(tmp_path, {"verses.tsv.xz": table})
    made = prepared("korean-language-model", tmp_path, tmp_path / "out")
    train, valid = (made[name].splitlines() for name in ("train.txt", "valid.txt"))
    assert [ref for ref in refs if ref in set(train)] == train  # in order
    assert sorted(train + valid) == sorted(refs)
    assert {ref.split(":")[0] for ref in train}.isdisjoint({ref.split(":")[0] for ref in valid})
    assert 0 < len(valid) < len(refs) / 3


@pytest.mark.parametrize("name", ["english-tags", "korean-tags"])
def test_tags_are_unpacked(name: str, tmp_path: Path) -> None:
    parts = {part: f"{part}\tNOUN\tNN\n.\tPUNCT\t.\n\n나\tPRON\tNP\n\n" for part in ("train", "dev", "test")}
    write_packed(tmp_path, {f"{part}.tsv.xz": text for part, text in parts.items()})
    assert prepared(name, tmp_path, tmp_path / "out") == {f"{part}.conll": parts[part] for part in sorted(parts)}


def test_reviews_are_held_out_by_their_ids(tmp_path: Path) -> None:
    header = "id\tdocument\tlabel\trating\tdate\tmovie_id\n"
    train = header + "".join(f"{n}\t{n}번 좋다\t{n % 2}\t9\t13.06.14\t1\n" for n in range(600)) + "600\t \t1\t9\t\t1\n"
    write_packed(tmp_path, {"train.tsv.xz": train, "test.tsv.xz": header + "7\t별로\t0\t1\t13.06.14\t2\n"})
    made = prepared("korean-reviews", tmp_path, tmp_path / "out")
    assert made["test.tsv"] == "document\tlabel\n별로\t0\n"
    learnt, held_out = (made[part].splitlines()[1:] for part in ("train.tsv", "valid.tsv"))
    assert set(learnt) | set(held_out) == {f"{n}번 좋다\t{n % 2}" for n in range(600)}  # and no blank one
    assert len(learnt) + len(held_out) == 600
    assert 5 < len(held_out) < 50  # of a thirtieth


def test_sentences_that_are_judged_are_not_learnt(tmp_path: Path) -> None:
    parts = {"train": "1 good .\n0 bad .\n1 so so\n0 no .\n", "dev": "1 so so\n", "test": "1 no .\n0 worse\n"}
    write_packed(tmp_path, {f"stsa.binary.{part}.txt.gz": text for part, text in parts.items()})
    assert prepared("english-sentiment", tmp_path, tmp_path / "out") == {
        "test.tsv": "sentence\tlabel\nno .\t1\nworse\t0\n",
        "train.tsv": "sentence\tlabel\ngood .\t1\nbad .\t0\n",
        "valid.tsv": "sentence\tlabel\nso so\t1\n",
    }


def test_captions_stand_side_by_side(tmp_path: Path) -> None:
    texts = {"de": "Ein \tHund.\nZwei Männer \n", "en": "A dog.\nTwo men\n"}
    files = {f"{part}.{of}.gz": text for part in ("train", "val", "test_2016_flickr") for of, text in texts.items()}
    write_packed(tmp_path, files)
    table = "de\ten\nEin Hund.\tA dog.\nZwei Männer\tTwo men\n"
    names = ("test_2016_flickr.tsv", "train.tsv", "valid.tsv")
    assert prepared("german-english", tmp_path, tmp_path / "out") == dict.fromkeys(names, table)


def test_frames_are_told_from_the_spine(tmp_path: Path) -> None:
    coordinates = [f"{point}{axis}" for point in ("lh", "rh", "h", "s", "lw", "rw") for axis in "xyz"]
    raw = [*coordinates, "timestamp", "phase"]
    points = dict.fromkeys(raw, "1") | {"hx": "3", "lhx": "5", "rwz": "-1"}  # the head is 2 above the spine
    files = {}
    for number, video in enumerate(("a1", "a2", "a3", "b1", "b3", "c1", "c3")):
        phases = ["Hold"] * 4 + ["Preparação"] + ["Rest"] * (243 + number)
        rows = [",".join(points[name] if name != "phase" else phase for name in raw) for phase in phases]
        mark, end = ("\ufeff", "\r\n") if video == "b1" else ("", "\n")  # some files differ
        files[f"raw/{video}_raw.csv.gz"] = mark + end.join([",".join(raw), *rows, ""])
        moves = [",".join([*(f"{n}e-3" for n in range(1, 33)), "D"])] * (len(phases) - 4)
        header = ",".join([*map(str, range(1, 33)), "Phase"])
        files[f"processed/{video}_va3.csv.gz"] = ("\r" if video == "a1" else "\n").join([header, *moves])
    write_packed(tmp_path, files)
    made = {name: [line.split(",") for line in text.splitlines()]
            for name, text in prepared("gesture-phases", tmp_path, tmp_path / "out").items()}  # fmt: skip
    header, first, *_ = made["test.csv"]
    assert header == ["piece", *raw[:6], *raw[12:18], *(f"v{n}" for n in range(1, 33)), "phase"]
    assert dict(zip(header, first, strict=True)) == {
        **dict.fromkeys(header[1:13], "0.00000"), "piece": "a3-0", "lhx": "2.00000", "rwz": "-1.00000",
        **{f"v{n}": f"{n}e-3" for n in range(1, 33)}, "phase": "Preparation",
    }  # fmt: skip
    assert [len(made[part]) - 1 for part in ("test.csv", "valid.csv")] == [246, 250]  # whole
    pieces = [row[0] for row in made["train.csv"][1:]]
    assert {piece: pieces.count(piece) for piece in pieces if piece.startswith("a1")} == {
        "a1-0": 200, "a1-40": 200, "a1-44": 200
    }  # fmt: skip


def test_stick_figures_are_films_of_the_positions_beside_them(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    pytest.importorskip("PIL.Image")
    coordinates = [f"{point}{axis}" for point in ("lh", "rh", "h", "s", "lw", "rw") for axis in "xyz"]
    raw = [*coordinates, "timestamp", "phase"]
    points = dict.fromkeys(raw, "1") | {"hy": "-1", "lhx": "-1", "rhx": "3", "rhy": "-1"}  # the head is 2 above
    files = {}
    for number, video in enumerate(("a1", "a2", "a3", "b1", "b3", "c1", "c3")):
        phases = ["Hold"] * 4 + ["Preparação"] + ["Rest"] * (215 + number)
        rows = [",".join(points[name] if name != "phase" else phase for name in raw) for phase in phases]
        files[f"raw/{video}_raw.csv.gz"] = "\n".join([",".join(raw), *rows])
    write_packed(tmp_path, files)
    out = tmp_path / "out"
    out.mkdir()
    runner.load_prepare(RECIPES / "stick-figures")(tmp_path, out)
    tables = {part: [line.split(",") for line in (out / f"{part}.csv").read_text("utf-8").splitlines()]
              for part in ("train", "valid", "test")}  # fmt: skip
    header, first, second, *_ = tables["test"]
    assert header == ["film", "hx", "hy", "lwx", "lwy", "lhx", "lhy", "rwx", "rwy", "rhx", "rhy", "phase"]
    numbers = [0, -1, 0, 0, -1, 0, 0, 0, 1, -1]
    assert first == ["films/a3-0.mp4", *(f"{number:.5f}" for number in numbers), "Preparation"]
    assert second[-1] == "Rest"
    films = [row[0] for rows in tables.values() for row in rows[1:]]
    pieces = {film: films.count(film) for film in films}
    assert pieces["films/a3-0.mp4"] == 218
    assert pieces["films/c3-0.mp4"] == 222
    assert {film: count for film, count in pieces.items() if "a2" in film} == {
        "films/a2-0.mp4": 200, "films/a2-17.mp4": 200
    }  # fmt: skip
    for film, count in pieces.items():
        with av.open(str(out / film)) as opened:
            frames = [frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)]
        assert len(frames) == count, film
        at = {"head": (64, 34), "left": (24, 74), "right": (104, 34), "nothing": (24, 34)}
        assert {point: (frames[-1][y, x] > 90).tolist() for point, (x, y) in at.items()} == {
            "head": [False, True, False], "left": [False, False, True], "right": [True, False, False],
            "nothing": [False, False, False],
        }, film  # fmt: skip


def test_stick_figures_are_split_as_the_gesture_phases_are() -> None:
    of: dict[str, Any] = {name: runner.load_prepare(RECIPES / name) for name in ("stick-figures", "gesture-phases")}
    stick, phases = (prepare.__globals__ for prepare in of.values())
    assert all(stick[name] == phases[name] for name in ("VIDEOS", "PHASES", "FRAMES", "STRIDE"))


def test_gestures_beside_held_out_ones_are_not_learnt(tmp_path: Path) -> None:
    (tmp_path / "point_history_labels.csv").write_text("\ufeffStop\r\nMove\r\n", "utf-8")
    rows = [f"{label}," + ",".join([str(n)] * 32) for n in range(1100) for label in (0, 1)]
    write_packed(tmp_path, {"point_history.csv.gz": "\r\n".join(rows)})
    made = prepared("hand-gestures", tmp_path, tmp_path / "out")
    numbers = {
        part: [int(line.split(",")[1]) for line in text.splitlines()[1:] if line.startswith("Move,")]
        for part, text in made.items()
    }
    assert made["test.csv"].startswith("gesture,x1,y1,x2,")
    assert numbers["valid.csv"] == list(range(400, 500))
    assert numbers["test.csv"] == list(range(900, 1000))
    assert numbers["train.csv"] == [*range(384), *range(516, 884), *range(1016, 1100)]


def test_series_are_cut_in_order(tmp_path: Path) -> None:
    hours = [f"2016-07-01 {n},{n}" for n in range(20 * 720 + 100)]
    write_packed(tmp_path, {"ETTh1.csv.xz": "\n".join(["date,OT", *hours])})
    made = prepared("power-forecast", tmp_path, tmp_path / "out")
    numbers = {part: [int(line.split(",")[1]) for line in text.splitlines()[1:]] for part, text in made.items()}
    assert numbers == {
        "train.csv": list(range(8640)),
        "valid.csv": list(range(8640 - 24, 11520)),
        "test.csv": list(range(11520 - 24, 14400)),
    }
    write_packed(tmp_path, {"exchange_rate.txt.gz": "\n".join(f"{n},1,1,1,1,1,1,1" for n in range(100))})
    made = prepared("exchange-forecast", tmp_path, tmp_path / "out2")
    numbers = {part: [int(line.split(",")[0]) for line in text.splitlines()[1:]] for part, text in made.items()}
    parts = {"train.csv": range(60), "valid.csv": range(53, 80), "test.csv": range(73, 100)}
    assert numbers == {part: list(days) for part, days in parts.items()}


def test_answers_to_one_question_stay_together(tmp_path: Path) -> None:
    pairs = [(f"질문 {n}", f"답 {n} {k}") for n in range(200) for k in (1, 2)]
    rows = [f'"{question}","{answer}, 네 ",0' for question, answer in pairs]
    write_packed(tmp_path, {"ChatbotData.csv.gz": "\n".join(["Q,A,label", *rows])})
    made = prepared("korean-chatbot", tmp_path, tmp_path / "out")
    lines = {part: text.splitlines()[1:] for part, text in made.items()}
    assert sorted(chain(*lines.values())) == sorted(f"{question}\t{answer}, 네" for question, answer in pairs)
    asked = {part: {line.split("\t")[0] for line in lines[part]} for part in lines}
    assert sum(map(len, asked.values())) == 200
    assert all(asked.values())
    (tmp_path / "kor.txt").write_text("".join(f"{q}\t{a}\tby x\n" for q, a in pairs), "utf-8")
    made = prepared("english-korean", tmp_path, tmp_path / "out2")
    lines = {part: text.splitlines()[1:] for part, text in made.items()}
    assert sorted(chain(*lines.values())) == sorted("\t".join(pair) for pair in pairs)
    asked = {part: {line.split("\t")[0] for line in lines[part]} for part in lines}
    assert sum(map(len, asked.values())) == 200
    assert len(asked["test.tsv"]) > len(asked["valid.tsv"]) > 0


def test_one_style_of_emoji_is_never_seen(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    header = "index\thexcode\temoji\tgroup\ten\tko\ten_tags\tko_tags\thas\n"
    styles = ("noto", "twemoji", "openmoji", "fluent-flat")
    rows = [f"{n}\t1F{n:03}\tx\tfood\tname {n}\t이름 {n}\t\t\t{','.join(styles[: 4 - (n == 49)])}" for n in range(50)]
    (tmp_path / "captions.tsv").write_text(header + "\n".join(rows) + "\n", "utf-8")
    for style in styles:
        sheet = image.new("RGB", (48 * 48, 96), "white")
        sheet.paste("red", (48, 48, 96, 96))  # emoji 49
        sheet.save(tmp_path / f"sheet_{style}.png")
    out = tmp_path / "out"
    out.mkdir()
    runner.load_prepare(RECIPES / "emoji-names")(tmp_path, out)
    made = {part: (out / f"{part}.tsv").read_text("utf-8").splitlines() for part in ("train", "valid", "test")}
    assert made["test"][:2] == ["file\ten\tko\tgroup", "pictures/openmoji-0.png\tname 0\t이름 0\tfood"]
    assert len(made["test"]) == 51
    assert not any("openmoji" in row for row in made["train"] + made["valid"])
    assert all("fluent-flat" in row for row in made["valid"][1:])
    assert 0 < len(made["valid"]) - 1 < 25
    assert len(made["train"]) + len(made["valid"]) - 2 == 149
    with image.open(out / "pictures" / "noto-49.png") as picture:
        assert picture.size == (48, 48)
        assert picture.getcolors() == [(48 * 48, (255, 0, 0))]


def recording(samples: np.ndarray) -> bytes:
    """A .wav file of 8 kHz."""
    content = io.BytesIO()
    with wave.open(content, "wb") as sound:
        sound.setparams((1, 2, 8000, len(samples), "NONE", ""))
        sound.writeframes(samples.astype("<i2").tobytes())
    return content.getvalue()


def test_each_speaker_of_digits_is_in_one_part_alone(tmp_path: Path) -> None:
    time = np.arange(4000) / 8000
    tone = np.round(9000 * np.sin(2 * np.pi * 1000 * time) * np.linspace(0, 1, len(time)))  # louder and louder
    said = {
        f"{digit}_{speaker}_{number}.wav": recording(tone * (1 + digit) / 4 if number else tone[:150])
        for digit in range(3)
        for speaker in ("george", "theo", "yweweler", "lucas")
        for number in (0, 19)
    }
    with tarfile.open(tmp_path / "recordings_00-19.tar.xz", "w:xz") as tar:
        for name, content in {**dict(reversed(said.items())), "README.md": b"no recording"}.items():
            member = tarfile.TarInfo(f"recordings/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    out = tmp_path / "out"
    out.mkdir()
    runner.load_prepare(RECIPES / "spoken-digits")(tmp_path, out)
    tables = {part: (out / f"{part}.csv").read_text("utf-8").splitlines() for part in ("train", "valid", "test")}
    assert {lines.pop(0) for lines in tables.values()} == {"file,digit"}
    heard = {
        part: {re.fullmatch(r"spectra/\d_(\w+?)_\d+(_[\d.]+)?\.npy,\d", line)[1] for line in lines}  # type: ignore[index]
        for part, lines in tables.items()
    }
    assert heard == {"train": {"george", "lucas"}, "valid": {"theo"}, "test": {"yweweler"}}
    assert tables["test"][:3] == [f"spectra/{name}.npy,{name[0]}" for name in
                                  ("0_yweweler_0", "0_yweweler_19", "1_yweweler_0")]  # fmt: skip
    assert tables["train"][:3] == [f"spectra/0_george_0{warp}.npy,0" for warp in ("", "_0.88", "_1.12")]
    assert [len(lines) for lines in tables.values()] == [3 * 2 * 2 * 3, 3 * 2, 3 * 2]
    every = [line.split(",") for lines in tables.values() for line in lines]
    assert all(Path(file).name.startswith(f"{digit}_") for file, digit in every)
    assert {path.name for path in (out / "spectra").iterdir()} == {Path(file).name for file, _ in every}

    # A window of 25 ms each 10 ms, and of each band how loud it is beside its mean: the same however loud the whole is.
    short, whole, louder = (np.load(out / "spectra" / f"{name}.npy") for name in
                            ("0_theo_0", "0_theo_19", "2_theo_19"))  # fmt: skip
    assert (whole.dtype, whole.shape, short.shape) == (np.float32, (1 + (4000 - 200) // 80, 32), (1, 32))
    assert not short.any(), "one window is its own mean"
    np.testing.assert_allclose(whole.mean(0), 0, atol=1e-5)
    names = runner.load_prepare(RECIPES / "spoken-digits").__globals__
    bands = {warp: int(np.argmax(names["mel_bands"](warp)[:, 32])) for warp in names["WARPS"]}  # 1,000 Hz: 32 of 256
    assert bands[1.12] < bands[1.0] < bands[0.88], "what is as high lies lower in a voice of which all lies higher"
    tone = bands[1.0]
    assert whole[-1, tone] - whole[1, tone] > 4
    np.testing.assert_allclose(louder[2:, tone], whole[2:, tone], atol=0.02)  # samples are rounded


def test_photographs_are_parted_by_their_names(tmp_path: Path) -> None:
    names = [f"{n:04}.jpg" for n in range(1000)]
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for name in names[::-1]:
            (tmp_path / name).write_bytes(name.encode())
            tar.add(tmp_path / name, name)
    rows = [f'{name}\tA "Dog" , number {n} of\u00a0{k} .' for n, name in enumerate(names) for k in range(5)]
    (tmp_path / "captions.tsv").write_text("\n".join(["image\tcaption", *rows]) + "\n", "utf-8")
    out = tmp_path / "out"
    out.mkdir()
    runner.load_prepare(RECIPES / "flickr-captions")(tmp_path, out)
    assert (out / "photographs" / "0007.jpg").read_bytes() == b"0007.jpg"
    learnt = (out / "train.tsv").read_text("utf-8").splitlines()
    assert learnt[0] == "file\tcaption"
    assert learnt[6] == "photographs/0001.jpg\ta dog , number 1 of 0"
    assert len(learnt) == 1 + 5 * 800
    made = {
        part: [json.loads(line) for line in (out / f"{part}.jsonl").read_text("utf-8").splitlines()]
        for part in ("learnt", "valid", "test")
    }
    first = {part: [row["file"][-8:-4] for row in rows][::99] for part, rows in made.items()}
    assert first == {"learnt": ["0000", "0099"], "valid": ["0800", "0899"], "test": ["0900", "0999"]}
    shown = {part: {row["file"] for row in rows} for part, rows in made.items()}
    trained_on = {line.partition("\t")[0] for line in learnt[1:]}
    assert shown["learnt"] < trained_on
    assert trained_on | shown["valid"] | shown["test"] == {f"photographs/{name}" for name in names}
    assert len(trained_on) + len(shown["valid"]) + len(shown["test"]) == len(names), "one is in two parts"
    assert made["test"][1] == {
        "file": "photographs/0901.jpg", "caption": [f"a dog , number 901 of {k}" for k in range(5)]
    }  # fmt: skip


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A recipe of its own in `small/`, its data in `data/`."""
    folder, data = tmp_path / "small", tmp_path / "data"
    folder.mkdir()
    data.mkdir()
    text = "".join(f"{n} is {n * n}, and that is that.\n" for n in range(100))
    (data / "numbers.txt").write_text(text, "utf-8")
    recipe = {
        "data": [{"numbers.txt.xz": "0" * 64, "numbers.txt": hashlib.sha256(text.encode()).hexdigest()}],
        "train": ["train.txt", "--valid", "valid.txt"],
        "test": ["valid.txt"],
        "models": {"gru": "gru.yaml"},
        "figures": ["nats_per_char", "characters"],
    }
    (folder / "prepare.py").write_text(
        "def prepare(data, out):\n"
        "    text = (data / 'numbers.txt').read_text('utf-8')\n"
        "    (out / 'train.txt').write_text(text[:2000], 'utf-8')\n"
        "    (out / 'valid.txt').write_text(text[2000:], 'utf-8')\n",
        "utf-8",
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    config = {
        "core": {"cell": "gru", "hidden": 16, "layers": 1},
        "training": {"window": 16, "batch_size": 4, "steps": 30, "warmup": 0, "lr": 0.02},
    }
    (folder / "gru.yaml").write_text(yaml.safe_dump(config), "utf-8")
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`python recipes/run.py ...`; the exit code."""

    def main(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
        code: int = runner.main()
        return code

    return main


def test_runner_goes_from_data_to_figures(
    small: Path, tmp_path: Path, call: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert call(small, "--data", tmp_path / "data", "--out", out, "--set", "training.seed=7") == 0
    result = json.loads((out / "result.json").read_text("utf-8"))
    model = result["models"]["gru"]
    text = (tmp_path / "data" / "numbers.txt").read_text("utf-8")
    assert (out / "train.txt").read_text("utf-8") + (out / "valid.txt").read_text("utf-8") == text
    assert model["evaluation"]["characters"] == len((out / "valid.txt").read_text("utf-8")) - 1
    assert 0 < model["evaluation"]["nats_per_char"] < 3.5  # 30 updates from ln(22)
    assert model["weights"] > 0
    assert model["config"]["training"]["seed"] == 7
    log = (out / "gru" / "train.log").read_text("utf-8")
    assert log.splitlines()[0] == f"$ {model['commands'][0]}"
    assert "valid" in log
    screen = capfd.readouterr().out
    assert all(f"$ {command}" in screen for command in model["commands"])
    assert f"$ cd {out}\n" in screen
    assert result["data"] == {"numbers.txt": hashlib.sha256(text.encode()).hexdigest()}
    shown = f"gru: nats_per_char {model['evaluation']['nats_per_char']:.4f}, characters {len(text) - 2001}; trained "
    assert shown in screen

    # What is there is not overwritten unasked.
    assert call(small, "--data", tmp_path / "data", "--out", out) == 2
    assert "holds a model: go on with it (--resume)" in capfd.readouterr().err
    assert (out / "gru" / "train.log").read_text("utf-8") == log


def test_a_resumed_training_took_as_long_as_all_its_parts(
    small: Path, tmp_path: Path, call: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, clock, stopped = tmp_path / "out", 1000.0, 0

    def follow(command: list[str], folder: Path, log: TextIO) -> None:
        """Takes 100 s; if `stopped`, Ctrl-C comes after so many updates."""
        nonlocal clock
        clock += 100
        more = ["--set", f"training.steps={stopped}"] if stopped else []
        done = CliRunner().invoke(app, [*command, "--no-report", *more])
        assert done.exit_code == 0, done.output
        if stopped:
            raise KeyboardInterrupt

    def told() -> list[str]:
        return [line for line in (out / "gru" / "train.log").read_text("utf-8").splitlines() if line.startswith("# ")]

    def go_on(*more: str) -> float:
        assert call(small, "--data", tmp_path / "data", "--out", out, *more) == 0
        seconds: float = json.loads((out / "result.json").read_text("utf-8"))["models"]["gru"]["train_seconds"]
        return seconds

    out.mkdir()
    monkeypatch.chdir(out)
    monkeypatch.setattr(runner, "follow", follow)
    monkeypatch.setattr(runner, "capture", lambda command, folder: "{}")
    monkeypatch.setattr(runner.time, "monotonic", lambda: clock)
    stopped = 10
    assert call(small, "--data", tmp_path / "data", "--out", out) == 130
    assert told() == ["# trained for 100.0 s so far"]
    stopped = 20
    assert call(small, "--data", tmp_path / "data", "--out", out, "--resume") == 130
    assert told()[1:] == ["# trained for 200.0 s so far"]
    stopped = 0
    assert go_on("--resume") == 300
    assert go_on("--resume") == 300, "there was nothing left to do"

    # Killed, it could not say how long it took: what training counted up to its last checkpoint is known.
    (out / "gru" / "train.log").unlink()
    state = out / "gru" / "checkpoints" / "0000000030" / "state.json"
    content = read_json(state, "checkpoint")
    write_json(state, "checkpoint", {**content, "position": {**content["position"], "seconds": 250.0}})
    assert go_on("--resume", "--set", "training.steps=40") == 350
    assert go_on("--force") == 100


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner prepares, and trains nothing."""
    monkeypatch.setattr(runner, "train_and_evaluate", lambda *_: {"evaluation": {}, "train_seconds": 0.0})


@pytest.mark.usefixtures("untrained")
def test_files_that_are_prepared_are_kept(
    small: Path, tmp_path: Path, call: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    program = (small / "prepare.py").read_text("utf-8")
    (small / "prepare.py").write_text(
        f"{program}    (out / 'more').mkdir(exist_ok=True)\n    (out / 'more' / 'count.txt').open('a').write('x')\n",
        "utf-8",
    )

    def times(*more: str) -> int:
        """How often the files have been prepared."""
        assert call(small, "--data", data, "--out", out, *more) == 0
        return len((out / "more" / "count.txt").read_text("utf-8"))

    assert times() == 1
    assert "prepared: train.txt, valid.txt\n" in capfd.readouterr().out
    assert times("--resume") == 1
    assert "prepared before: train.txt, valid.txt\n" in capfd.readouterr().out
    assert times("--force") == 2, "all is to be made anew"
    (out / "valid.txt").unlink()
    assert times("--resume") == 3
    (out / "prepared.json").unlink()
    assert times("--resume") == 4, "it was interrupted: nobody knows what is whole"
    with (small / "prepare.py").open("a", encoding="utf-8") as file:
        file.write("    # made in another way\n")
    assert times("--resume") == 5
    assert times("--resume") == 5


@pytest.mark.usefixtures("untrained")
def test_a_preparation_that_is_interrupted_is_done_again(small: Path, tmp_path: Path, call: Callable[..., int]) -> None:
    out, program = tmp_path / "out", (small / "prepare.py").read_text("utf-8")
    arguments = (small, "--data", tmp_path / "data", "--out", out)
    assert call(*arguments) == 0
    (small / "prepare.py").write_text(program.replace("text[2000:]", "1 / 0"), "utf-8")
    with pytest.raises(ZeroDivisionError):
        call(*arguments, "--force")
    assert not (out / "prepared.json").exists()
    (small / "prepare.py").write_text(program, "utf-8")
    (out / "train.txt").write_text("half", "utf-8")
    assert call(*arguments, "--resume") == 0
    assert len((out / "train.txt").read_text("utf-8")) == 2000


def test_other_data_is_refused(
    small: Path, tmp_path: Path, call: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    (data / "numbers.txt").write_text("another text\n", "utf-8")
    assert call(small, "--data", data, "--out", out) == 2
    error = capfd.readouterr().err
    found = hashlib.sha256(b"another text\n").hexdigest()
    expected = runner.read_recipe(small)["data"][0]["numbers.txt"]
    assert error == (
        f"error: {data / 'numbers.txt'} is not the file that this recipe was made with: its sha256 is {found}, "
        f"expected {expected}. Get it from the source that the recipe's README.md names\n"
    )
    assert not out.exists()
    (data / "numbers.txt").unlink()
    assert call(small, "--data", data, "--out", out) == 2
    assert f"{data} has no numbers.txt or numbers.txt.xz" in capfd.readouterr().err


def test_unknown_names_are_refused(
    small: Path, tmp_path: Path, call: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert call("shakespear", "--data", tmp_path) == 2
    assert f"no recipe 'shakespear': choose from {', '.join(NAMES)}" in capfd.readouterr().err
    assert call(small, "--data", tmp_path / "data", "--model", "lstm", "--out", tmp_path / "out") == 2
    assert "no model 'lstm': choose from gru" in capfd.readouterr().err


def test_a_command_that_fails_is_told(
    small: Path, tmp_path: Path, call: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    code = call(small, "--data", tmp_path / "data", "--out", tmp_path / "out", "--set", "core.hiden=8")
    assert code == 2
    screen = capfd.readouterr()
    assert "did you mean" in screen.out
    assert "it failed with exit code 2: unrolled train" in screen.err


def test_figures_within_figures_are_told() -> None:
    evaluation = {"accuracy": 0.94947, "examples": 25094, "naive": {"mase": 1.0}, "r2": None}
    told = runner.told(evaluation, ["accuracy", "examples", "naive.mase", "r2", "bleu"])
    assert told == "accuracy 0.9495, examples 25,094, naive.mase 1.0000"
