"""Cut the data of `unrolled demo` from its sources: python recipes/cut_demo_data.py --data DIR [--out DIR]

DIR holds the source files in the folders that SOURCES names. What is cut how stands in
src/unrolled/demo_data/README.md, and where each source comes from and under which licence in the SOURCE.md beside the
files that are cut. The same sources give the same files, but for how another version of xz or of Pillow packs them: the
README gives the sha256 of what is in them.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import json
import lzma
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

DEMO_DATA = Path(__file__).resolve().parents[1] / "src" / "unrolled" / "demo_data"

SOURCES = {
    "nsmc-raw/train.tsv.xz": "2b2f16e4e0caf387a7ccbcb6c91b3dfeaec2b4e8b5772205e021c5dff347b6a2",
    "nsmc-raw/test.tsv.xz": "afbdf71398cfc656c2acd64f5d7419200a00b0087cb782b780c3432807b88548",
    "tatoeba-kor-eng/kor.txt": "3988edfd32c892ccf4450772bc3a5906ebfcf3c8648f56012df204ddf27b8280",
    "chatbot-ko/ChatbotData.csv.gz": "60ffbbd67b6da55e85c40abda1bc3ccb1d4e8d745eaf4af237eb966d9ff760ba",
    "hand-point-history/point_history.csv.gz": "a2dbee3b1502bed103ceadac30a1c761d26f5821c7b5764cd896bec8ce433a63",
    "hand-point-history/point_history_labels.csv": "44613d84c97aa87fbd2c77f5d557b3d0c4c3b4171ffddbb241dd66a7e5a2462e",
    "emoji-captions/captions.tsv": "53a3719c3da4e93816e48e2840d4d8e8766184b0875026add0d0e0e8770bc434",
    "emoji-captions/sheet_noto.png": "be4503bf858bf3900cab58424f4cad94f09a90e305b11ebde350f8b044a59a48",
    "emoji-captions/sheet_twemoji.png": "b8834602b786c07f6f87155dd9bc33cfe6cce207901734bdfaaa38a7879ed16e",
    "emoji-captions/sheet_fluent-flat.png": "c6cb94fa33a2d161e10b0c3453209981786291c933850bdcb26051c2790f5d27",
}


def read(data: Path, name: str) -> bytes:
    """A source file, unpacked, once its sha256 is that in SOURCES."""
    content = (data / name).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SOURCES[name]:
        sys.exit(f"error: {data / name} is another file than this was made with: its sha256 is {found}")
    unpack = {".gz": gzip.decompress, ".xz": lzma.decompress}.get(Path(name).suffix, bytes)
    return unpack(content)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = text.encode()
    packed = lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
    path.write_bytes(packed)
    shown = path.relative_to(path.parents[1])
    print(f"| `{shown}` | {len(packed):,} | {text.count(chr(10)):,} | `{hashlib.sha256(content).hexdigest()}` |")


def table(header: Sequence[str], rows: Iterable[Sequence[object]], separator: str = "\t") -> str:
    return "".join(separator.join(map(str, row)) + "\n" for row in [header, *rows])


def part_of(text: str, tenths: dict[str, int]) -> str:
    """Which part a text belongs to: its sha256, divided by 20, leaves a rest that decides."""
    rest, after = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 20, 0
    for name, twentieths in tenths.items():
        after += twentieths
        if rest < after:
            return name
    return "train"


# ------------------------------------------------------------------------------------------------- the sets

LABELS = {"0": "negative", "1": "positive"}


def cut_sentiment(data: Path, out: Path) -> None:
    """The first reviews of 5 to 50 characters in either file: 20,000 and 1,000 of train.tsv, 2,000 of test.tsv. What a
    part has in common with one before it is left out of it."""
    seen: set[str] = set()

    def reviews(name: str) -> list[tuple[str, str]]:
        rows = csv.DictReader(io.StringIO(read(data, name).decode()), delimiter="\t", quoting=csv.QUOTE_NONE)
        found = []
        for row in rows:
            text = " ".join(row["document"].split())
            if 5 <= len(text) <= 50 and text not in seen:
                seen.add(text)
                found.append((LABELS[row["label"]], text))
        return found

    first, last = reviews("nsmc-raw/train.tsv.xz"), reviews("nsmc-raw/test.tsv.xz")
    for name, rows in (("train", first[:20_000]), ("valid", first[20_000:21_000]), ("test", last[:2_000])):
        write(out / "sentiment" / f"{name}.tsv.xz", table(("label", "document"), rows))


def cut_translate(data: Path, out: Path) -> None:
    """All pairs; a twentieth of the English sentences to validate, two twentieths to test, told apart by the sha256 of
    the sentence. A sentence's Korean ones stand together, each with its attribution."""
    sentences: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for line in read(data, "tatoeba-kor-eng/kor.txt").decode().splitlines():
        english, korean, attribution = line.split("\t")
        if (korean, attribution) not in sentences[english]:
            sentences[english].append((korean, attribution))
    parts: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for english, pairs in sentences.items():
        part = part_of(english.casefold().strip(" .!?"), {"valid": 1, "test": 2})
        if part == "train":
            rows = [(english, korean, attribution) for korean, attribution in pairs]
        else:
            rows = [(english, [korean for korean, _ in pairs], [attribution for _, attribution in pairs])]
        parts[part] += [json.dumps(dict(zip(("en", "ko", "attribution"), row, strict=True)), ensure_ascii=False) + "\n"
                        for row in rows]  # fmt: skip
    for name, lines in parts.items():
        write(out / "translate" / f"{name}.jsonl.xz", "".join(lines))


def cut_chat(data: Path, out: Path) -> None:
    """All pairs; a twentieth of the questions to validate, a twentieth to test, told apart by the sha256 of the
    question."""
    parts: dict[str, dict[tuple[str, str], None]] = {"train": {}, "valid": {}, "test": {}}
    for row in csv.DictReader(io.StringIO(read(data, "chatbot-ko/ChatbotData.csv.gz").decode())):
        question, answer = (" ".join(row[name].split()) for name in "QA")
        parts[part_of(question.strip(" .!?~"), {"valid": 1, "test": 1})][question, answer] = None
    for name, pairs in parts.items():
        write(out / "chat" / f"{name}.tsv.xz", table(("question", "answer"), pairs))


WINDOW, CLIP, WIDTH, HEIGHT, JUMP = 16, 64, 960, 540, 150


def cut_frames(data: Path, out: Path) -> None:
    """Clips of a fingertip's movement, frame by frame, put together from windows of 16 frames that overlap.

    Each row of the source is a label and 16 places (x, y) as shares of the picture's width and height, counted from the
    first. A window that shares at least two of its movements with the one before, moved on by 1 to 13 frames, goes on
    with its recording. Where a movement is longer than 150 pixels the hand was not found, and the recording is cut
    there. Of each label's frames, in their order, the first 60 % are to train, the next 15 % to validate, the last 25 %
    to test; a recording that goes on from one part into the next loses 16 frames between them, and within a part it is
    cut into clips of 64 frames. What is left over is a clip if it has 16.
    """
    names = read(data, "hand-point-history/point_history_labels.csv").decode("utf-8-sig").split("\n")
    names = [name.strip() for name in names if name.strip()]
    rows = [line.split(",") for line in read(data, "hand-point-history/point_history.csv.gz").decode().split()]
    labels = [int(row[0]) for row in rows]
    places = np.array([row[1:] for row in rows], float).reshape(len(rows), WINDOW, 2)
    moves = np.rint(np.diff(places, axis=1) * (WIDTH, HEIGHT)).astype(int)

    clips: list[tuple[int, list[np.ndarray]]] = []
    for i, window in enumerate(moves):
        shift = None
        if i and labels[i] == labels[i - 1]:
            fits = (s for s in range(1, WINDOW - 2) if (moves[i - 1][s:] == window[:-s]).all())
            shift = next(fits, None)
        if shift is None:
            clips.append((labels[i], list(window)))
        else:
            clips[-1][1].extend(window[-shift:])
    recordings: dict[int, list[np.ndarray]] = defaultdict(list)
    for label, found in clips:
        whole = np.array(found)
        far = np.abs(whole).max(1) > JUMP
        cuts = np.flatnonzero(far)
        recordings[label] += [
            whole[start:end] for start, end in zip([0, *(cuts + 1)], [*cuts, len(whole)], strict=True) if end > start
        ]
    parts: dict[str, list[tuple[object, ...]]] = {"train": [], "valid": [], "test": []}
    number = 0
    for label, of_label in sorted(recordings.items()):
        total, done = sum(map(len, of_label)), 0
        borders = {"train": (0.0, 0.6), "valid": (0.6, 0.75), "test": (0.75, 1.0)}
        for recording in of_label:
            for part, (begin, end) in borders.items():
                first, last = (round(share * total) - done for share in (begin, end))
                piece = recording[max(first + WINDOW if first > 0 else 0, 0) : max(last, 0)]
                for start in range(0, len(piece), CLIP):
                    clip = piece[start : start + CLIP]
                    if len(clip) >= WINDOW:
                        number += 1
                        parts[part] += [(number, x, y, names[label].lower()) for x, y in clip.tolist()]
            done += len(recording)
    for name, lines in parts.items():
        write(out / "frames" / f"{name}.csv.xz", table(("clip", "right", "down", "gesture"), lines, ","))


STYLES = ("noto", "twemoji", "fluent-flat")
GROUPS = ("animals-nature", "food-drink", "travel-places", "activities", "objects")
SIDE, ACROSS, SOURCE_SIDE, SOURCE_ACROSS = 32, 32, 48, 48


def cut_caption(data: Path, out: Path) -> None:
    """The emoji of five groups that all three styles have: their names in two languages, and a sheet of pictures for
    each style, 32 x 32 pixels each (scaled with Lanczos' filter), 32 across, in the order of the names; WebP of quality
    85."""
    import PIL.Image

    rows = csv.DictReader(io.StringIO(read(data, "emoji-captions/captions.tsv").decode()), delimiter="\t")
    kept = [row for row in rows if row["group"] in GROUPS and set(STYLES) <= set(row["has"].split(","))]
    columns = ("emoji", "en", "ko")
    write(out / "caption" / "names.tsv.xz", table(columns, ([row[name] for name in columns] for row in kept)))
    for style in STYLES:
        source = PIL.Image.open(io.BytesIO(read(data, f"emoji-captions/sheet_{style}.png"))).convert("RGB")
        sheet = PIL.Image.new("RGB", (ACROSS * SIDE, -(-len(kept) // ACROSS) * SIDE), "white")
        for number, row in enumerate(kept):
            top, left = (SOURCE_SIDE * place for place in divmod(int(row["index"]), SOURCE_ACROSS))
            picture = source.crop((left, top, left + SOURCE_SIDE, top + SOURCE_SIDE))
            down, right = divmod(number, ACROSS)
            sheet.paste(picture.resize((SIDE, SIDE), PIL.Image.Resampling.LANCZOS), (right * SIDE, down * SIDE))
        path = out / "caption" / f"{style}.webp"
        sheet.save(path, quality=85, method=6)
        pixels = np.asarray(PIL.Image.open(path).convert("RGB"))
        digest = hashlib.sha256(pixels.tobytes()).hexdigest()
        print(f"| `caption/{path.name}` | {path.stat().st_size:,} | {len(kept):,} | `{digest}` (pixels) |")


CUTS = {"sentiment": cut_sentiment, "translate": cut_translate, "chat": cut_chat, "frames": cut_frames,
        "caption": cut_caption}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds the sources' folders")
    parser.add_argument("--out", type=Path, default=DEMO_DATA, help="where the files go (default: the package)")
    parser.add_argument("names", nargs="*", default=list(CUTS), help=f"only these: {', '.join(CUTS)}")
    given = parser.parse_args()
    for name in given.names:
        CUTS[name](given.data, given.out)


if __name__ == "__main__":
    main()
