"""The transformer that every system evaluates: checkpoints of known shapes, one forward pass, and its plaintext.

A checkpoint is a directory as published ones are (config.json, model.safetensors, tokenizer.json), so that `tacet` reads the
same weights. `python model.py SHAPE DIR` writes one with random weights.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Tensors = dict[str, np.ndarray]
# A layer's matrices as (inputs, outputs), biases and norms, by short names: q, qb, ..., n1, n1b.
Layer = dict[str, Any]

# Words that the tokeniser of a random checkpoint knows: w1 is token 1, and so on.
WORDS = 1000


@dataclass(frozen=True)
class Sizes:
    """Sizes of a transformer; `family` is bert (norm after each half of a layer) or gpt2 (norm before, causal)."""

    family: str
    layers: int
    hidden: int
    heads: int
    vocab: int
    positions: int


SHAPES = {
    "minilm": Sizes("bert", 6, 384, 12, 30522, 512),
    "bert-base": Sizes("bert", 12, 768, 12, 30522, 512),
    "gpt2": Sizes("gpt2", 12, 768, 12, 50257, 1024),
}


class Ops(Protocol):
    """What differs between systems; x is (rows, hidden), scores are (heads, rows, rows)."""

    def split(self, x: Any, heads: int) -> Any: ...  # (rows, hidden) -> (heads, rows, hidden / heads)
    def merge(self, x: Any) -> Any: ...  # the way back
    def swap(self, x: Any) -> Any: ...  # the last two axes
    def softmax(self, scores: Any) -> Any: ...  # over the last axis
    def gelu(self, x: Any) -> Any: ...
    def norm(self, x: Any, weight: Any, bias: Any) -> Any: ...  # of each row


def attention(x: Any, l: Layer, heads: int, mask: Any, ops: Ops) -> Any:
    """Multi-head attention; queries are scaled by their weights, `mask` is added to scores where there is one."""
    q, k, v = (ops.split(x @ l[n] + l[n + "b"], heads) for n in "qkv")
    scores = q @ ops.swap(k)
    if mask is not None:
        scores = scores + mask
    return ops.merge(ops.softmax(scores) @ v) @ l["o"] + l["ob"]


def mlp(x: Any, l: Layer, ops: Ops) -> Any:
    """The layer's second half."""
    return ops.gelu(x @ l["up"] + l["upb"]) @ l["down"] + l["downb"]


def forward(x: Any, layers: list[Layer], final: Layer, heads: int, mask: Any, ops: Ops) -> Any:
    """An encoder's hidden states (rows, hidden); of a decoder, which has a `final` norm and head, the last row's logits."""
    for l in layers:
        if not final:
            x = ops.norm(x + attention(x, l, heads, None, ops), l["n1"], l["n1b"])
            x = ops.norm(x + mlp(x, l, ops), l["n2"], l["n2b"])
        else:
            x = x + attention(ops.norm(x, l["n1"], l["n1b"]), l, heads, mask, ops)
            x = x + mlp(ops.norm(x, l["n2"], l["n2b"]), l, ops)
    return ops.norm(x[-1:], final["n"], final["nb"]) @ final["head"] if final else x


class Plain:
    """The operations in f64."""

    def split(self, x: np.ndarray, heads: int) -> np.ndarray:
        return x.reshape(len(x), heads, -1).transpose(1, 0, 2)

    def merge(self, x: np.ndarray) -> np.ndarray:
        return x.transpose(1, 0, 2).reshape(x.shape[1], -1)

    def swap(self, x: np.ndarray) -> np.ndarray:
        return x.swapaxes(1, 2)

    def softmax(self, scores: np.ndarray) -> np.ndarray:
        e = np.exp(scores - scores.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    def gelu(self, x: np.ndarray) -> np.ndarray:
        return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2

    def norm(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        c = x - x.mean(-1, keepdims=True)
        return c / np.sqrt((c * c).mean(-1, keepdims=True) + 1e-12) * weight + bias


@dataclass
class Query:
    """A checkpoint and one embedded text: what a client would share with the parties."""

    sizes: Sizes
    layers: list[Layer]
    final: Layer
    x: np.ndarray
    mask: np.ndarray | None

    @staticmethod
    def load(directory: Path, tokens: int) -> Query:
        """Reads the checkpoint and embeds the token ids that `tacet bench` takes."""
        s, t = sizes(directory), read(directory / "model.safetensors")
        ids = [1 + i * 37 % 900 for i in range(tokens)]
        if s.family == "bert":
            at = "embeddings.{}_embeddings.weight".format
            x = t[at("word")][ids] + t[at("position")][:tokens] + t[at("token_type")][0]
            x = Plain().norm(x, t["embeddings.LayerNorm.weight"], t["embeddings.LayerNorm.bias"])
            return Query(s, [bert_layer(t, i, s) for i in range(s.layers)], {}, x.astype(np.float32), None)
        x = t["wte.weight"][ids] + t["wpe.weight"][:tokens]
        final = {"n": t["ln_f.weight"], "nb": t["ln_f.bias"], "head": np.ascontiguousarray(t["wte.weight"].T)}
        # Far below every score, and well inside every system's fixed point.
        mask = np.triu(np.full((tokens, tokens), -1000, np.float32), 1)
        return Query(s, [gpt2_layer(t, i, s) for i in range(s.layers)], final, x, mask)

    def plaintext(self) -> np.ndarray:
        """The forward pass in f64."""
        wide = lambda l: {k: v.astype(np.float64) for k, v in l.items()}
        layers = [wide(l) for l in self.layers]
        return forward(self.x.astype(np.float64), layers, wide(self.final), self.sizes.heads, self.mask, Plain())

    def accuracy(self, got: np.ndarray) -> dict[str, float]:
        """Of a result: its largest error, and the cosine to plaintext of the mean over rows (an encoder's embedding)."""
        want = self.plaintext()
        a, b = got.astype(np.float64).mean(0), want.mean(0)
        norms = float(np.linalg.norm(a) * np.linalg.norm(b))
        return {"max_error": float(np.abs(got - want).max()), "cosine": float(a @ b) / norms if norms else 0.0}


def bert_layer(t: Tensors, i: int, s: Sizes) -> Layer:
    """Layer `i` of a BERT checkpoint."""
    at, l = f"encoder.layer.{i}.", {}
    for short, name in {
        "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
        "o": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense",
    }.items():  # fmt: skip
        l[short], l[short + "b"] = np.ascontiguousarray(t[at + name + ".weight"].T), t[at + name + ".bias"]
    for short, name in {"n1": "attention.output.LayerNorm", "n2": "output.LayerNorm"}.items():
        l[short], l[short + "b"] = t[at + name + ".weight"], t[at + name + ".bias"]
    return scaled(l, s)


def gpt2_layer(t: Tensors, i: int, s: Sizes) -> Layer:
    """Layer `i` of a GPT-2 checkpoint, whose matrices are (inputs, outputs) already."""
    at, l = f"h.{i}.", {}
    for n, w, b in zip("qkv", *(np.split(t[at + f"attn.c_attn.{k}"], 3, -1) for k in ("weight", "bias"))):
        l[n], l[n + "b"] = np.ascontiguousarray(w), b
    for short, name in {"o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj", "n1": "ln_1", "n2": "ln_2"}.items():
        l[short], l[short + "b"] = t[at + name + ".weight"], t[at + name + ".bias"]
    return scaled(l, s)


def scaled(l: Layer, s: Sizes) -> Layer:
    """Moves attention's 1 / sqrt(d) into the queries' weights: free for everyone."""
    for n in ("q", "qb"):
        l[n] = l[n] / np.float32(math.sqrt(s.hidden // s.heads))
    return l


def sizes(directory: Path) -> Sizes:
    """Sizes by config.json."""
    c = json.loads((directory / "config.json").read_text())
    if c["model_type"] == "bert":
        n = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings")
    elif c["model_type"] == "gpt2":
        n = ("n_layer", "n_embd", "n_head", "vocab_size", "n_positions")
    else:
        raise SystemExit(f"{directory}: {c['model_type']} is neither bert nor gpt2")
    return Sizes(c["model_type"], *(c[k] for k in n))


def read(path: Path) -> Tensors:
    """Tensors of a safetensors file in F32; others are left out."""
    raw = np.memmap(path, np.uint8, "r")
    (size,) = struct.unpack("<Q", raw[:8].tobytes())
    header, body = json.loads(raw[8 : 8 + size].tobytes()), raw[8 + size :]
    return {
        name: body[slice(*t["data_offsets"])].view("<f4").reshape(t["shape"])
        for name, t in header.items()
        if name != "__metadata__" and t["dtype"] == "F32"
    }


def names(s: Sizes) -> dict[str, tuple[tuple[int, ...], float]]:
    """Shape of each tensor of a checkpoint, and the value around which its elements lie."""
    d, t = s.hidden, {}

    def pair(name: str, *shape: int, bias: int, centre: float = 0.0) -> None:
        t[name + ".weight"], t[name + ".bias"] = (shape, centre), ((bias,), 0.0)

    if s.family == "gpt2":
        t |= {"wte.weight": ((s.vocab, d), 0.0), "wpe.weight": ((s.positions, d), 0.0)}
        for at in (f"h.{i}." for i in range(s.layers)):
            for name, inputs, outputs in (
                ("attn.c_attn", d, 3 * d), ("attn.c_proj", d, d), ("mlp.c_fc", d, 4 * d), ("mlp.c_proj", 4 * d, d),
            ):  # fmt: skip
                pair(at + name, inputs, outputs, bias=outputs)
            for name in ("ln_1", "ln_2"):
                pair(at + name, d, bias=d, centre=1.0)
        pair("ln_f", d, bias=d, centre=1.0)
        return t
    for name, rows in (("word", s.vocab), ("position", s.positions), ("token_type", 2)):
        t[f"embeddings.{name}_embeddings.weight"] = ((rows, d), 0.0)
    pair("embeddings.LayerNorm", d, bias=d, centre=1.0)
    for at in (f"encoder.layer.{i}." for i in range(s.layers)):
        for name, outputs, inputs in (
            ("attention.self.query", d, d), ("attention.self.key", d, d), ("attention.self.value", d, d),
            ("attention.output.dense", d, d), ("intermediate.dense", 4 * d, d), ("output.dense", d, 4 * d),
        ):  # fmt: skip
            pair(at + name, outputs, inputs, bias=outputs)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            pair(at + name, d, bias=d, centre=1.0)
    return t


def config(s: Sizes) -> dict[str, Any]:
    """config.json of a random checkpoint."""
    if s.family == "gpt2":
        return {
            "model_type": "gpt2", "n_embd": s.hidden, "n_layer": s.layers, "n_head": s.heads, "n_positions": s.positions,
            "vocab_size": s.vocab, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
            "tie_word_embeddings": True,
        }  # fmt: skip
    return {
        "model_type": "bert", "hidden_size": s.hidden, "num_hidden_layers": s.layers, "num_attention_heads": s.heads,
        "intermediate_size": 4 * s.hidden, "max_position_embeddings": s.positions, "type_vocab_size": 2,
        "vocab_size": s.vocab, "layer_norm_eps": 1e-12, "hidden_act": "gelu", "position_embedding_type": "absolute",
    }  # fmt: skip


def write(s: Sizes, directory: Path) -> None:
    """Writes a random checkpoint, the same every time; config.json comes last and says that it is whole."""
    directory.mkdir(parents=True, exist_ok=True)
    vocab = {"[UNK]": 0} | {f"w{i}": i for i in range(1, WORDS)}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
    }  # fmt: skip
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    header, end = {}, 0
    for name, (shape, _) in names(s).items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(1)
    with open(directory / "model.safetensors", "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for shape, centre in names(s).values():
            out.write((centre + 0.02 * random.standard_normal(shape, np.float32)).astype("<f4").tobytes())
    (directory / "config.json").write_text(json.dumps(config(s)))


if __name__ == "__main__":
    write(SHAPES[sys.argv[1]], Path(sys.argv[2]))
