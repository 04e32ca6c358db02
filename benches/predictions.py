#!/usr/bin/env python3
"""What `tacet plan` says before anything runs, beside what `tacet bench` then measures on this machine.

    cargo build --release
    python3 benches/predictions.py --model DIR                     # an encoder, three networks
    python3 benches/predictions.py --model DIR --tokens 16         # a decoder: prompt and step

Ratios are predicted over measured. `bench` predicts too, of rates measured before, between and after its queries; where what
else the machine does comes and goes, that is the fairer one. Run nothing else meanwhile.
"""
import argparse
import json
import pathlib
import subprocess

NETWORKS = [[], ["--rtt", "1ms", "--bandwidth", "1Gbit"], ["--rtt", "40ms", "--bandwidth", "100Mbit"]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tacet", default=pathlib.Path(__file__).parent.parent / "target/release/tacet")
    parser.add_argument("--model", required=True, help="a model's directory")
    parser.add_argument("--tokens", default="32,128")
    parser.add_argument("--decode", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--networks", default="0,1,2", help="which of loopback, 1 ms, 40 ms")
    args = parser.parse_args()

    def tacet(*words):
        done = subprocess.run([args.tacet, *map(str, words), "--json"], check=True, capture_output=True, text=True)
        return json.loads(done.stdout)

    print("| network | tokens | what | plan / measured | bench / measured |")
    print("| --- | --- | --- | --- | --- |")
    for network in [NETWORKS[int(n)] for n in args.networks.split(",")]:
        for tokens in args.tokens.split(","):
            plan = lambda *more: tacet("plan", args.model, "--tokens", tokens, *network, *more)["times_shared"]
            first = plan()
            run = ["bench", "--model", args.model, "--tokens", tokens, "--repeat", args.repeat, "--decode", args.decode]
            found = tacet(*run, *network)
            if "generation" in found:
                g, step = found["generation"], plan("--step")
                rows = [
                    ("prompt", first["total_beside_s"], found["predicted"]["total_beside_s"], g["prefill_s"]),
                    ("step", step["total_beside_s"], found["predicted_step"]["total_beside_s"], g["step"]["total_s"]),
                ]
            else:
                rows = [
                    (kind, first[key], found["predicted"][key], found[kind.replace(" ", "_")]["total_s"])
                    for kind, key in [("dealt beside", "total_beside_s"), ("dealt ahead", "total_ahead_s")]
                ]
            for what, planned, predicted, measured in rows:
                cells = " | ".join(f"{p:.3f} / {measured:.3f} ({p / measured:.2f})" for p in (planned, predicted))
                print(f"| {' '.join(network[1::2]) or 'loopback'} | {tokens} | {what} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
