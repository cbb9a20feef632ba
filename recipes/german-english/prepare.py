"""Captions in two languages as tables of the columns de and en: train.tsv, valid.tsv and test_2016_flickr.tsv."""

from __future__ import annotations

import gzip
from pathlib import Path


def prepare(data: Path, out: Path) -> None:
    """Line by line, white space as one blank."""
    for part, name in (("train", "train"), ("val", "valid"), ("test_2016_flickr", "test_2016_flickr")):
        texts = (gzip.decompress((data / f"{part}.{language}.gz").read_bytes()) for language in ("de", "en"))
        columns = ([" ".join(line.split()) for line in text.decode("utf-8").strip("\n").split("\n")] for text in texts)
        rows = [f"{de}\t{en}\n" for de, en in zip(*columns, strict=True)]
        (out / f"{name}.tsv").write_text("de\ten\n" + "".join(rows), "utf-8", newline="\n")
