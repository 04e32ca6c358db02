#!/usr/bin/env python3
"""Runs Tacet and its peers on the same checkpoints, in turn, and prints one table.

    ./setup.sh                                       # once: the peers' environments, beside this file
    ./compare.py                                     # MiniLM's shape, 32 tokens
    ./compare.py --shapes minilm:32,bert-base:128 --only tacet,spu --repeat 3 --output figures.json
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PYTHONS = {"spu": HERE / ".venv-spu/bin/python", "crypten": HERE / ".venv-crypten/bin/python"}
# System -> script, its arguments, what it is called in the table.
PEERS = {
    "spu": ("spu", ["--weights", "secret"], "SPU, ABY3, secret weights"),
    "spu-public": ("spu", ["--weights", "public"], "SPU, ABY3, public weights"),
    "crypten": ("crypten", ["--weights", "secret"], "CrypTen, first party trusted, secret weights"),
    "crypten-public": ("crypten", ["--weights", "public"], "CrypTen, first party trusted, public weights"),
    "crypten-ttp": ("crypten", ["--weights", "public", "--provider", "TTP"], "CrypTen, third party, public weights"),
}
SYSTEMS = ["tacet", *PEERS]
BESIDE, AHEAD = "Tacet, dealt while it runs", "Tacet, dealt ahead"


class Failed(Exception):
    """Why a run gave nothing."""


@dataclass
class Row:
    """What one system took for one shape; times in seconds, one of each run."""

    shape: str
    tokens: int
    system: str
    version: str = "-"
    seconds: list[float] = field(default_factory=list)
    bytes: int | None = None
    rounds: int | None = None
    cosine: float | None = None
    max_error: float | None = None
    compile_s: float | None = None
    peak_mb: float | None = None
    failed: str | None = None

    def take(self, run: dict[str, Any]) -> None:
        """Adds a run; of what is not a time the worst is kept, or the last where it is a count."""
        self.seconds.append(run["seconds"])
        self.version, self.bytes, self.rounds = run["version"], run["bytes"], run["rounds"]
        for key, worst in (("cosine", min), ("max_error", max), ("compile_s", max), ("peak_mb", max)):
            values = [v for v in (getattr(self, key), run.get(key)) if v is not None]
            setattr(self, key, worst(values) if values else None)


def output_of(command: list[str], timeout: float) -> str:
    """What a command prints; it and its processes end after `timeout` seconds."""
    try:
        p = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=HERE
        )  # fmt: skip
    except OSError as e:
        raise Failed(f"{command[0]}: {e.strerror}: see README.md for what builds it") from e
    try:
        out, err = p.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as e:
        raise Failed(f"no result after {timeout:.0f} s") from e
    finally:
        # Parties are processes of their own.
        try:
            os.killpg(p.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    if p.returncode != 0:
        raise Failed((err.strip().splitlines() or [f"exit status {p.returncode}"])[-1][:200])
    return out


def last_json(text: str) -> dict[str, Any]:
    """The last line that is an object."""
    lines = [l for l in text.splitlines() if l.startswith("{")]
    if not lines:
        raise Failed("no result was printed")
    return json.loads(lines[-1])


def checkpoint(shape: str) -> Path:
    """The directory of a shape, written once, or of a model that is named by its directory."""
    if (Path(shape) / "config.json").is_file():
        return Path(shape).resolve()
    directory = HERE / ".models" / shape
    if not (directory / "config.json").is_file():
        python = next((p for p in PYTHONS.values() if p.is_file()), None)
        if python is None:
            raise SystemExit("no environment is here yet: run ./setup.sh first")
        print(f"writing random weights of {shape}", file=sys.stderr)
        output_of([str(python), "model.py", shape, str(directory)], 600)
    return directory


def tacet(binary: str, model: Path, tokens: int, timeout: float, check: bool) -> list[dict[str, Any]]:
    """Runs of Tacet: dealt while it runs and, of an encoder, dealt ahead. Both are medians of five queries and of three seconds of them
    at least, a prompt's of five prompts; one before them is not counted.

    `check` also embeds a text and compares it with plaintext in f64, which takes long for a large model.
    """
    report = last_json(
        output_of([binary, "bench", "--model", str(model), "--tokens", str(tokens), "--decode", "2", "--json"], timeout)
    )
    run = {
        "version": output_of([binary, "--version"], 10).split()[-1],
        "bytes": sum(report["cost"]["dealt_bytes"]) + 2 * report["cost"]["opened_bytes"],
        "rounds": report["cost"]["rounds"],
        "peak_mb": max(p["peak_mb"] for p in report["parties"]),
    }
    if report.get("generation"):
        return [run | {"system": BESIDE, "seconds": report["generation"]["prefill_s"]}]
    if check:
        # The same token ids as the peers', where the checkpoint's words are numbered; elsewhere these are longer.
        words = tokens if model.parent == HERE / ".models" else tokens // 4
        text = " ".join(f"w{1 + i * 37 % 900}" for i in range(words))
        embed = [binary, "embed", "--local", "--check", "--deadline", "600", "--model", str(model), "--text", text]
        run["cosine"] = last_json(output_of(embed, timeout))["cosine"]
    totals = ((BESIDE, report["dealt_beside"]["total_s"]), (AHEAD, report["dealt_ahead"]["total_s"]))
    return [run | {"system": name, "seconds": s} for name, s in totals]


def peer(name: str, model: Path, tokens: int, timeout: float) -> list[dict[str, Any]]:
    """A run of a peer."""
    kind, arguments, shown = PEERS[name]
    command = [str(PYTHONS[kind]), f"{kind}_shape.py", "--model", str(model), "--tokens", str(tokens), *arguments]
    return [last_json(output_of(command, timeout)) | {"system": shown}]


def machine() -> dict[str, Any]:
    """Where this runs, and how busy it is."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [l.split(": ", 1)[1] for l in lines if l.startswith("model name")]
    return {"processor": names[0] if names else "unknown", "cores": os.cpu_count(), "load": os.getloadavg()[0]}


def measured(case: tuple[str, int], args: argparse.Namespace) -> list[Row]:
    """Rows of one shape: each system runs once a turn, so that whatever else the machine does falls on all alike."""
    shape, tokens = case
    model, rows = checkpoint(shape), {}
    for turn in range(args.repeat):
        for name in args.only:
            shown = BESIDE if name == "tacet" else PEERS[name][2]
            row = rows.setdefault(shown, Row(Path(shape).name, tokens, shown))
            if row.failed:
                continue
            start = time.monotonic()
            try:
                runs = (
                    tacet(args.tacet, model, tokens, args.timeout, turn == 0)
                    if name == "tacet"
                    else peer(name, model, tokens, args.timeout)
                )
                for run in runs:
                    rows.setdefault(run["system"], Row(Path(shape).name, tokens, run["system"])).take(run)
                said = ", ".join(f"{r['seconds']:.2f} s" for r in runs)
            except Failed as e:
                row.failed = said = str(e)
            took = time.monotonic() - start
            print(f"{shape}:{tokens} turn {turn + 1} {name}: {said} ({took:.0f} s with its start)", file=sys.stderr)
    return list(rows.values())


def table(rows: list[Row]) -> str:
    """Markdown; `x Tacet` compares medians with Tacet's dealt while it runs."""
    out = [
        "| shape | tokens | system | version | seconds (range) | x Tacet | MB in all | rounds | cosine | compile s | peak MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    base = {(r.shape, r.tokens): statistics.median(r.seconds) for r in rows if r.system == BESIDE and r.seconds}
    show = lambda v, f: "-" if v is None else format(v, f)
    for r in rows:
        if r.failed or not r.seconds:
            out.append(f"| {r.shape} | {r.tokens} | {r.system} | {r.version} | failed: {r.failed} | | | | | | |")
            continue
        median, of = statistics.median(r.seconds), base.get((r.shape, r.tokens))
        cells = [
            r.shape, str(r.tokens), r.system, r.version,
            f"{median:.2f} ({min(r.seconds):.2f} - {max(r.seconds):.2f})", show(of and median / of, ".1f"),
            show(r.bytes and r.bytes / 1e6, ",.0f"), show(r.rounds, ",d"),
            show(r.cosine, ".5f") + (" (wrong)" if r.cosine is not None and r.cosine < 0.98 else ""),
            show(r.compile_s, ".1f"), show(r.peak_mb, ",.0f"),
        ]  # fmt: skip
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def main() -> None:
    """Measures and prints."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", default="minilm:32", help="SHAPE:TOKENS,...; minilm, bert-base, gpt2 or a model's directory")
    p.add_argument("--repeat", type=int, default=3, help="runs of each system; the median is reported")
    p.add_argument("--only", default=",".join(SYSTEMS), help="systems, of %(default)s")
    p.add_argument("--timeout", type=float, default=1800, help="seconds that one run may take")
    p.add_argument("--tacet", default=str(HERE.parents[1] / "target/release/tacet"), help="the command")
    p.add_argument("--output", type=Path, help="where rows go as JSON, after each shape")
    args = p.parse_args()
    # Commands run in this file's folder; a bare name is looked for on the PATH.
    args.tacet = str(Path(args.tacet).resolve()) if "/" in args.tacet else args.tacet
    args.only = args.only.split(",")
    if unknown := set(args.only) - set(SYSTEMS):
        p.error(f"--only {','.join(sorted(unknown))}: systems are {', '.join(SYSTEMS)}")
    cases = [(shape, int(tokens or 32)) for shape, _, tokens in (c.partition(":") for c in args.shapes.split(","))]
    before, rows = machine(), []
    for case in cases:
        rows += measured(case, args)
        if args.output:
            report = {"before": before, "after": machine(), "rows": [asdict(r) for r in rows]}
            args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{before['processor']}, {before['cores']} cores, load {before['load']:.1f} before, {machine()['load']:.1f} after\n")
    print(table(rows))


if __name__ == "__main__":
    main()
