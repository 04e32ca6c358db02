"""One evaluation by SecretFlow-SPU: three processes, ABY3 over the loopback interface. Prints a line of JSON.

Settings are those of PUMA's published benchmark: ring Z_2^64, 18 fraction bits, exp by five squarings and cut off below -14,
GELU in four pieces, one reciprocal a row of softmax.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import re
import resource
import socket
import tempfile
import time
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import spu
from model import Plain, Query, forward
from spu import libspu
from spu.utils import frontend

PARTIES = 3
SECRET, PUBLIC = libspu.Visibility.VIS_SECRET, libspu.Visibility.VIS_PUBLIC


class Private(Plain):
    """The operations as SPU is given them; the rest is as in plaintext."""

    def softmax(self, scores: jax.Array) -> jax.Array:
        x = scores - scores.max(-1, keepdims=True)
        e = jnp.exp(x) * (x > -14)
        return e / e.sum(-1, keepdims=True)

    def gelu(self, x: jax.Array) -> jax.Array:
        """Zero, a cubic, a sextic and the identity, by PUMA (arXiv 2307.12533, section 4.1)."""
        below4, below, above = x < -4.0, x < -1.95, x > 3.0
        x2 = x * x
        x3, x4 = x * x2, x2 * x2
        left = -0.011034134030615728 * x3 - 0.11807612951181953 * x2 - 0.42226581151983866 * x - 0.5054031199708174
        middle = (
            0.0018067462606141187 * (x3 * x3) - 0.037688200365904236 * x4 + 0.3603292692789629 * x2 + 0.5 * x
            + 0.008526321541038084
        )  # fmt: skip
        return above * x + (below4 ^ below) * left + (below ^ above ^ True) * middle

    def norm(self, x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
        c = x - x.mean(-1, keepdims=True)
        return c * jax.lax.rsqrt((c * c).mean(-1, keepdims=True) + 1e-5) * weight + bias


def runtime() -> libspu.RuntimeConfig:
    """What the parties are set to."""
    c = libspu.RuntimeConfig(libspu.ProtocolKind.ABY3, libspu.FieldType.FM64, 18)
    c.fxp_exp_iters = 5
    # It also counts what goes over the links.
    c.enable_pphlo_profile = True
    return c


def party(rank: int, ports: list[int], log: str, pipe: Connection) -> None:
    """One party: takes the program and its shares, evaluates, gives its shares of the result, seconds and megabytes."""
    options = libspu.logging.LogOptions()
    options.enable_console_logger, options.system_log_path = False, log
    libspu.logging.setup_logging(options)
    desc = libspu.link.Desc()
    desc.recv_timeout_ms = 600_000
    for i, port in enumerate(ports):
        desc.add_party(f"party{i}", f"127.0.0.1:{port}")
    link = libspu.link.create_brpc(desc, rank)
    runner = spu.Runtime(link, runtime())
    executable = libspu.Executable()
    executable.ParseFromString(pipe.recv())
    for name in executable.input_names:
        runner.set_var(name, pipe.recv())
    link.barrier()
    start = time.perf_counter()
    runner.run(executable)
    seconds = time.perf_counter() - start
    pipe.send([runner.get_var(n) for n in executable.output_names])
    pipe.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
    link.barrier()


def counted(log: Path) -> tuple[int, int]:
    """Bytes and messages that a party sent, by its log."""
    found = re.findall(r"Link details: total send bytes (\d+), .* send actions (\d+)", log.read_text())
    if len(found) != 1:
        raise SystemExit(f"{log} has {len(found)} lines of link details where one was expected")
    return int(found[0][0]), int(found[0][1])


def free_ports() -> list[int]:
    """Ports that were free a moment ago."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(PARTIES)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def compiled(query: Query, weights: libspu.Visibility) -> tuple[libspu.Executable, list[np.ndarray], list[Any]]:
    """The program, its inputs one after another, and who may see each."""

    def evaluate(x: jax.Array, layers: list, final: dict) -> jax.Array:
        return forward(x, layers, final, query.sizes.heads, query.mask, Private())

    arguments = [query.x, query.layers, query.final]
    flat = jax.tree_util.tree_leaves(arguments)
    visibility = [SECRET] + [weights] * (len(flat) - 1)
    options = libspu.CompilerOptions()
    options.enable_optimize_denominator_with_broadcast = True
    names = [f"in{i}" for i in range(len(flat))]
    outputs = lambda out: [f"out{i}" for i in range(len(out))]
    executable, _ = frontend.compile(
        frontend.Kind.JAX, evaluate, arguments, {}, names, visibility, outputs, copts=options
    )  # fmt: skip
    return executable, flat, visibility


def plain_seconds(query: Query) -> float:
    """The same pass in f32, in the clear, by XLA: the best of three."""
    pass_ = jax.jit(lambda x, l, f: forward(x, l, f, query.sizes.heads, query.mask, Private()))
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        pass_(query.x, query.layers, query.final).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    """Compiles, shares, evaluates, checks."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--tokens", type=int, default=32)
    p.add_argument("--weights", choices=("secret", "public"), default="secret")
    args = p.parse_args()
    query = Query.load(args.model, args.tokens)
    plain_s = plain_seconds(query)
    start = time.perf_counter()
    executable, flat, visibility = compiled(query, SECRET if args.weights == "secret" else PUBLIC)
    compile_s = time.perf_counter() - start
    io, context = spu.Io(PARTIES, runtime()), mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as logs:
        ports, pipes, parties = free_ports(), [], []
        for rank in range(PARTIES):
            ours, theirs = context.Pipe()
            parties.append(context.Process(target=party, args=(rank, ports, f"{logs}/{rank}", theirs), daemon=True))
            parties[-1].start()
            theirs.close()
            pipes.append(ours)
        # They read only after they have met.
        for pipe in pipes:
            pipe.send(executable.SerializeToString())
        for value, may_see in zip(flat, visibility, strict=True):
            for pipe, share in zip(pipes, io.make_shares(np.asarray(value), may_see), strict=True):
                pipe.send(share)
        results = [pipe.recv() for pipe in pipes]
        seconds, peaks = zip(*(pipe.recv() for pipe in pipes), strict=True)
        for process in parties:
            process.join()
        sent = [counted(Path(logs) / str(rank)) for rank in range(PARTIES)]
    result = io.reconstruct([shares[0] for shares in results])
    print(
        json.dumps(
            {
                "system": "spu", "version": version("spu"), "seconds": max(seconds), "bytes": sum(b for b, _ in sent),
                "rounds": max(n for _, n in sent), "compile_s": compile_s, "plain_s": plain_s, "peak_mb": max(peaks),
                **query.accuracy(result),
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
