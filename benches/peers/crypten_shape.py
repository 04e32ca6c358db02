"""One evaluation by CrypTen: two parties over the loopback interface. Prints a line of JSON.

CrypTen's own settings throughout: ring Z_2^64, 16 fraction bits, exp, reciprocal and inverse root by its iterations, GELU by
its `erf`. Multiplication triples come from the first party (TFP, the default: that party knows them) or from a third
process (TTP).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing as mp
import os
import resource
import tempfile
import time
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import crypten
import crypten.communicator as comm
import torch
from crypten.config import cfg
from model import Query, forward

PARTIES = 2


class Private:
    """The operations on shared tensors."""

    def split(self, x: Any, heads: int) -> Any:
        return x.reshape(x.size(0), heads, -1).permute(1, 0, 2)

    def merge(self, x: Any) -> Any:
        return x.permute(1, 0, 2).reshape(x.size(1), -1)

    def swap(self, x: Any) -> Any:
        return x.transpose(1, 2)

    def softmax(self, scores: Any) -> Any:
        return scores.softmax(-1)

    def gelu(self, x: Any) -> Any:
        return x * ((x / math.sqrt(2)).erf() + 1) / 2

    def norm(self, x: Any, weight: Any, bias: Any) -> Any:
        c = x - x.mean(-1, keepdim=True)
        return c * (c.square().mean(-1, keepdim=True) + 1e-5).inv_sqrt() * weight + bias


def party(rank: int, args: argparse.Namespace, meeting: str, pipe: Connection) -> None:
    """One party: shares or takes shares, evaluates, gives the result, seconds, bytes, rounds and megabytes."""
    os.environ |= {
        "WORLD_SIZE": str(PARTIES), "RANK": str(rank), "RENDEZVOUS": f"file://{meeting}", "DISTRIBUTED_BACKEND": "gloo",
        "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    # All parties share this machine's cores.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // PARTIES))
    cfg.mpc.provider = args.provider
    if rank == PARTIES:
        # It has work only while the parties evaluate: all that it counts is theirs.
        cfg.communicator.verbose = True
        crypten.mpc.provider.TTPServer()
        pipe.send(comm.get().get_communication_stats()["bytes"])
        return
    crypten.init()
    query = Query.load(args.model, args.tokens)
    secret = lambda a: crypten.cryptensor(torch.from_numpy(a.copy()), src=0)
    weight = secret if args.weights == "secret" else lambda a: torch.from_numpy(a.copy())
    layers = [{k: weight(v) for k, v in l.items()} for l in query.layers]
    final = {k: weight(v) for k, v in query.final.items()}
    mask = None if query.mask is None else torch.from_numpy(query.mask)
    x, group = secret(query.x), comm.get()
    cfg.communicator.verbose = True
    group.barrier()
    group.reset_communication_stats()
    start = time.perf_counter()
    y = forward(x, layers, final, query.sizes.heads, mask, Private())
    seconds, counted = time.perf_counter() - start, group.get_communication_stats()
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    pipe.send((y.get_plain_text().numpy(), seconds, counted["bytes"], counted["rounds"], peak_mb))
    crypten.uninit()


def main() -> None:
    """Starts the parties, and checks what they give."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--tokens", type=int, default=32)
    p.add_argument("--weights", choices=("secret", "public"), default="secret")
    p.add_argument("--provider", choices=("TFP", "TTP"), default="TFP")
    args = p.parse_args()
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, parties = [], []
        for rank in range(PARTIES + (args.provider == "TTP")):
            ours, theirs = context.Pipe()
            pipes.append(ours)
            parties.append(context.Process(target=party, args=(rank, args, f"{folder}/meet", theirs), daemon=True))
            parties[-1].start()
            theirs.close()
        results, seconds, counted, rounds, peaks = zip(*(pipe.recv() for pipe in pipes[:PARTIES]))
        # Each process counts what it sends and what it receives.
        counted_bytes = sum(counted) + sum(pipe.recv() for pipe in pipes[PARTIES:])
        for process in parties:
            process.join()
    print(
        json.dumps(
            {
                "system": "crypten", "version": version("crypten"), "seconds": max(seconds),
                "bytes": int(counted_bytes / 2), "rounds": max(rounds), "peak_mb": max(peaks),
                **Query.load(args.model, args.tokens).accuracy(results[0]),
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
