#!/usr/bin/env python3
"""What a query cannot take less than on one machine, by its counts and by the machine's ceilings: a Markdown table.

    benches/floors.py MODEL_DIR:32 MODEL_DIR:128 --gmacs 40 --wire 1.0 --rtt 30 --aes 7.6

Counts come from `tacet plan --json`. Every operation is taken at the best rate that its kind reaches alone and nothing waits:
linear layers (every evaluator computes all of them), the keystream of what is dealt (its other half, at the dealer and at the
evaluators that expand it), bytes through QUIC, and rounds, each half a round trip. What gates compute is not in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def plan(binary: str, case: str) -> dict[str, Any]:
    """Counts of one query; a case is DIR:TOKENS."""
    model, _, tokens = case.rpartition(":")
    out = subprocess.run([binary, "plan", model, "--tokens", tokens, "--json"], check=True, stdout=subprocess.PIPE).stdout
    return json.loads(out)["cost"] | {"model": Path(model).name, "tokens": tokens}


def row(c: dict[str, Any], a: argparse.Namespace) -> str:
    """Milliseconds: of one core that does one kind alone, and of the query where all parties share `cores`."""
    dealt, opened = sum(c["dealt_bytes"]) / 1e9, 2 * c["opened_bytes"] / 1e9
    linear, keystream, rounds = c["multiplications"] / a.gmacs / 1e9, dealt / a.aes, c["rounds"] * a.rtt / 2e6
    ahead = (2 * linear + opened * a.wire) / a.cores + rounds
    beside = ahead + (2 * keystream + dealt * a.wire) / a.cores
    cells = [
        c["model"], c["tokens"], f"{c['multiplications'] / 1e9:.2f}", f"{dealt * 1e3:.0f}", f"{opened * 1e3:.0f}", str(c["rounds"]),
        *(f"{1e3 * v:.0f}" for v in (linear, keystream, dealt * a.wire, opened * a.wire, rounds, ahead, beside)),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("cases", nargs="+", metavar="DIR:TOKENS")
    p.add_argument("--gmacs", type=float, default=40, help="10^9 multiply-accumulates a second, one core")
    p.add_argument("--wire", type=float, default=1.0, help="processor seconds that both ends of a link spend on a GB")
    p.add_argument("--rtt", type=float, default=30, help="microseconds of a round trip")
    p.add_argument("--aes", type=float, default=7.6, help="GB/s of AES-128-CTR, one core")
    p.add_argument("--cores", type=int, default=2, help="that all parties share")
    p.add_argument("--tacet", default=str(ROOT / "target/release/tacet"), help="the command")
    args = p.parse_args()
    print("| model | tokens | G MAC | dealt MB | opened MB | rounds | linear ms | keystream ms | dealt wire ms | opened wire ms |", end="")
    print(" rounds ms | floor ahead ms | floor beside ms |\n|" + " --- |" * 13)
    for case in args.cases:
        print(row(plan(args.tacet, case), args))


if __name__ == "__main__":
    main()
