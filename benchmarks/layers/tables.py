"""The results of `native.py` as tables of Markdown, long and short, and the pages that hold them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

__all__ = ["long_table", "shown_cost", "shown_ratio", "write_pages"]

BEGIN, END = "<!-- native:begin -->", "<!-- native:end -->"
ROOT = Path(__file__).resolve().parents[2]

# Each is replaced wherever it stands, so the longer ones come first.
_KOREAN = {
    "peak memory of forward + backward": "순방향과 역방향의 최대 메모리",
    "forward + backward": "순방향과 역방향",
    "calls and torch's products in turn": "호출과 torch 행렬 곱을 번갈아",
    "each alone, added up": "따로 잰 시간의 합",
    "CPU time in the second after a call": "호출 뒤 1초 동안의 CPU 시간",
    "LSTM of 2 layers in both directions": "양방향 2층 LSTM",
    "recurrence alone": "순환 부분만",
    "the machine's limit": "이 컴퓨터의 한계",
    "steps in one call": "스텝을 한 번에 호출",
    "one step": "한 스텝",
    "generating 2,000 characters, LSTM of 2 layers": "2,000글자 생성, 2층 LSTM",
    "a loop over torch.nn": "torch.nn으로 쓴 반복문",
    "in 5 % of the tape": "테이프의 5 %만으로",
    "the whole tape": "테이프 전체",
    "on denormal numbers": "비정규 수에서",
    "on ordinary numbers": "보통 수에서",
    "ragged": "길이가 제각각",
    "frozen": "freeze 상태",
    "packed": "packed",
}
_HEADS = {
    "README.md": "| work | against | how many times as good; hidden / batch: median (smallest–largest) |",
    "README.ko.md": "| 작업 | 비교 대상 | 몇 배인가; hidden / batch: 중앙값 (최소–최대) |",
}


def write_pages(results: dict[str, Any], root: Path = ROOT) -> None:
    """The long table into benchmarks/README.md, the short one into the READMEs that have a place for it."""
    place(root / "benchmarks" / "README.md", long_table(results))
    for name in _HEADS:
        page = root / name
        if BEGIN in page.read_text("utf-8"):
            place(page, short_table(results, name))


def place(page: Path, table: str) -> None:
    """Put a table between the marks of a page."""
    text = page.read_text("utf-8")
    pattern = re.compile(rf"(?<={BEGIN}\n).*?(?={END})", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise SystemExit(f"{page}: expected {BEGIN} and {END} once, each on a line of its own")
    page.write_text(pattern.sub(lambda _: table + "\n", text), "utf-8")
    print(f"written: {page}")


def about(results: dict[str, Any]) -> str:
    machine = results["machine"]
    limits = ", ".join(f"{name} {value / 1e9:,.0f}" for name, value in results["limits"].items() if value is not None)
    return (
        f"{machine['processor']}, {results['threads']} threads, torch {machine['torch']}; limit in GFLOP/s: "
        f"{limits or 'not measured'}. {results['rounds']} rounds of {results['seconds']:g} s a side; a ratio is the "
        "median of the rounds, with the smallest and largest; above 1 unrolled is better."
    )


def long_table(results: dict[str, Any]) -> str:
    """Every row, with what was reached of the machine's limit."""
    lines = [
        about(results), "",
        "| work | H / B | against | unrolled | the other | ratio | floor (aim) | GFLOP/s | of the limit |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for row in results["table"]:
        start = f"| {row['work']} | {row['size']} | {row['against']} |"
        if "missing" in row:
            lines.append(f"{start} | | not measured: {row['missing']} | {goal(row)} | | |")
            continue
        ours, peer = (shown_cost(row[side]["median"], row["unit"]) for side in ("ours", "peer"))
        rate = f"{row['gflops']:,.3g}" if "gflops" in row else ""
        share = f"{row['share']:.0%}" if row.get("share") is not None else ""
        lines.append(f"{start} {ours} | {peer} | {shown_ratio(row)} | {goal(row)} | {rate} | {share} |")
    return "\n".join(lines)


def short_table(results: dict[str, Any], page: str) -> str:
    """The rows that have a floor, the sizes of each on one line."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in results["table"]:
        if row["floor"] is not None and "missing" not in row:
            found.setdefault((row["work"], row["against"]), []).append(f"{row['size']}: {shown_ratio(row)}")
    lines = [_HEADS[page], "|---|---|---|"]
    for key, sizes in found.items():
        work, against = (korean(text) if page.endswith(".ko.md") else text for text in key)
        lines.append(f"| {work} | {against} | {', '.join(sizes)} |")
    return "\n".join(lines)


def korean(text: str) -> str:
    for english, translated in _KOREAN.items():
        text = text.replace(english, translated)
    return text


def shown_cost(value: float, unit: str) -> str:
    """Seconds or bytes as one reads them."""
    if unit == "B":
        return f"{value / 2**20:,.1f} MiB"
    return f"{value * 1e6:,.1f} µs" if value < 1e-3 else f"{value * 1e3:,.1f} ms" if value < 1 else f"{value:,.2f} s"


def shown_ratio(row: dict[str, Any]) -> str:
    """Median and spread, in bold if it is below its floor."""
    ratio = row["ratio"]
    missed = row["floor"] is not None and ratio["median"] < row["floor"]
    median = f"**{ratio['median']:.2f}x**" if missed else f"{ratio['median']:.2f}x"
    return f"{median} ({ratio['min']:.2f}–{ratio['max']:.2f})"


def goal(row: dict[str, Any]) -> str:
    floor, aim = (None if row[name] is None else f"{row[name]:.2f}x" for name in ("floor", "aim"))
    return f"{floor or '–'} ({aim})" if aim else floor or ""
