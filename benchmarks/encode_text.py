"""How long a large text takes to become ids, and how much memory: characters and jamo, Korean and English.

    python benchmarks/encode_text.py [--megabytes 100] [--runs 3]

Each run is a process of its own on one thread: reading the file, decoding, counting, hashing and writing the ids. The
peer, on the same file, is the loop that is usually written: a dictionary from each character to its ids. Both must
give the same ids. Exits with 1 if a median is above 10 s (characters) or 15 s (jamo) for 100 MB, or a peak above 1 GB.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from unrolled.data import encode_texts, read_text
from unrolled.vocabulary import Vocabulary, build_vocabulary, vocabulary_from_json

SENTENCES = {
    "Korean": (
        "새벽 다섯 시, 항구의 불빛이 하나둘 꺼지고 갈매기 떼가 방파제 위로 날아올랐다.\n"
        "“값이 왜 이렇게 비싸요?” 하고 묻자 할머니는 웃으며 귤 몇 개를 더 얹어 주셨다.\n"
        "2024년 봄에 심은 앵두나무가 벌써 담장을 넘었으니, 올해는 꽃을 볼 수 있겠지 ㅎㅎ\n"
        "닭 쫓던 개 지붕 쳐다보듯, 그는 떠나는 버스의 뒷모습만 멍하니 바라보았다.\n"
        "끓는 물에 국수를 넣고 찬물을 두 번 부은 뒤, 넓은 그릇에 옮겨 참기름을 뿌린다.\n"
    ),
    "English": (
        "At five in the morning the lights of the harbour went out, and gulls rose over the breakwater.\n"
        '"Why is it so expensive?" she asked, and the old man laughed and added three more tangerines.\n'
        "The cherry we planted in the spring of 2024 has outgrown the wall; this year it may blossom.\n"
        "He stood and watched the bus leave, as a dog watches the hen that made it to the roof.\n"
        "Put the noodles into boiling water, pour in cold water twice, and serve with sesame oil.\n"
    ),
}
SECONDS_PER_100_MB = {"char": 10.0, "jamo": 15.0}
PEAK_BYTES = 1e9


def measure(what: str, path: Path, vocabulary: Vocabulary) -> dict[str, Any]:
    """One run, in this process: seconds, peak memory in bytes, and what the ids were."""
    if what == "encode_texts":
        began = time.perf_counter()
        ids = encode_texts(path, vocabulary).ids
    else:
        known = {vocabulary.decode([index]) for index in range(1, len(vocabulary))}
        syllables = {chr(code) for code in range(0xAC00, 0xD7A4)}
        table = {letter: vocabulary.encode(letter).tobytes() for letter in known | syllables}
        began = time.perf_counter()
        parts = [b"".join(map(table.__getitem__, chunk)) for chunk in read_text(path)]
        ids = np.frombuffer(b"".join(parts), vocabulary.dtype)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak": peak(), "units": len(ids), "ids": hashlib.sha256(ids.data).hexdigest()}


def peak() -> int:
    """Bytes of memory this process had at most. What getrusage tells may be the parent's (Linux counts over exec)."""
    try:
        status = Path("/proc/self/status").read_text("utf-8")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def in_process(what: str, path: Path, vocabulary: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--run", what, str(path), str(vocabulary)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    result: dict[str, Any] = json.loads(subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True).stdout)
    return result


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def spread(runs: list[dict[str, Any]]) -> str:
    seconds = [run["seconds"] for run in runs]
    return f"{statistics.median(seconds):.2f} s [{min(seconds):.2f}, {max(seconds):.2f}]"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=100, help="size of each text, 10^6 bytes (default: 100)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--run", nargs=3, metavar=("WHAT", "TEXT", "VOCABULARY"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        what, text, saved = given.run
        vocabulary = vocabulary_from_json(json.loads(Path(saved).read_text("utf-8")))
        print(json.dumps(measure(what, Path(text), vocabulary)))
        return 0

    print(f"machine: {processor()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}; one thread used")
    print(f"versions: python {platform.python_version()}, numpy {np.__version__}")
    print(
        f"texts: {given.megabytes} MB (10^6 bytes) of UTF-8 each, sentences repeated; median of {given.runs} [min, max]"
    )
    print()
    header = ("text", "unit", "units", "encode_texts", "", "peak", "dictionary loop", "ids", "limits")
    row = "{:8} {:5} {:>8}  {:25} {:>9} {:>7}  {:25} {:7} {}"
    print(row.format(*header))
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for language, sentences in SENTENCES.items():
            path = Path(folder, f"{language}.txt")
            path.write_bytes(sentences.encode() * (given.megabytes * 10**6 // len(sentences.encode())))
            for unit, most in SECONDS_PER_100_MB.items():
                limit = most * given.megabytes / 100
                saved = Path(folder, "vocabulary.json")
                saved.write_text(json.dumps(build_vocabulary(unit, read_text(path)).to_json()), "utf-8")
                ours = [in_process("encode_texts", path, saved) for _ in range(given.runs)]
                peers = [in_process("dictionary", path, saved) for _ in range(given.runs)]
                median, memory = statistics.median(run["seconds"] for run in ours), max(run["peak"] for run in ours)
                same = len({run["ids"] for run in ours + peers}) == 1
                good = same and median <= limit and memory <= PEAK_BYTES
                failed |= not good
                cells = (
                    language,
                    unit,
                    f"{ours[0]['units'] / 1e6:.1f} M",
                    spread(ours),
                    f"{given.megabytes / median:.0f} MB/s",
                    f"{memory / 1e6:.0f} MB",
                    spread(peers),
                    "same" if same else "DIFFER",
                    f"{limit:g} s, {PEAK_BYTES / 1e6:g} MB: {'kept' if good else 'BROKEN'}",
                )
                print(row.format(*cells), flush=True)
            path.unlink()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
