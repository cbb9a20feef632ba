"""Every benchmark, one after the other: python -m benchmarks [--quick] [NAME ...]

Exits with 1 if one of them does.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
QUICK = {
    "encode_text": ["--megabytes", "2", "--runs", "1"],
    "bptt": ["--quick"],
    "native": ["--quick"],
    "language_model": ["--quick"],
    "examples": ["--quick"],
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(QUICK)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: do they run?")
    given = parser.parse_args()
    unknown = set(given.names) - set(QUICK)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}: choose from {', '.join(QUICK)}")
    failed = []
    for name in given.names or QUICK:
        print(f"\n######## {name}", flush=True)
        began = time.monotonic()
        command = [sys.executable, str(HERE / f"{name}.py"), *(QUICK[name] if given.quick else [])]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
        print(f"######## {name}: {time.monotonic() - began:.0f} s", flush=True)
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nnone failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
