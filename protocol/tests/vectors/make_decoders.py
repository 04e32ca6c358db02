"""Makes the tiny decoder checkpoints of this directory, and the logits that Hugging Face transformers computes for them.

    pip install torch==2.15.0 transformers==5.24.0 gguf==0.19.0
    python make_decoders.py

Each folder is a checkpoint as published ones look, and `expected.json` beside it holds token ids and logits of a float64
run (transformers still computes RMS norms and rotary angles in float32, so they are good to about 1e-6). Weights are
rounded to the type they are stored in before that run. Everything is seeded.
"""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
GATED = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=96, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, hidden_act="silu",
             rms_norm_eps=1e-3)
LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)


def randomise(model, seed):
    """Norm weights away from 1, biases away from 0, matrices large enough that rows attend unevenly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            values = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(0.25 * values)
            elif name.endswith("weight"):
                p.copy_(1 + 0.3 * values)
            else:
                p.copy_(0.2 * values)
    return model


def save(name, model, dtype, shard=None):
    """The checkpoint, through the dtype it is stored in, and its logits."""
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.to(dtype).save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    expect(folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64))


def expect(folder, model):
    """The first of some seeded sequences at every position of which the best token leads by a hundredth of the spread."""
    model = model.double().eval()
    for seed in range(10_000):
        generator = torch.Generator().manual_seed(seed)
        tokens = [1] + torch.randint(96, (15,), generator=generator).tolist()
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0]
        top = logits.topk(2, dim=-1).values
        gap = ((top[:, 0] - top[:, 1]) / (top[:, 0] - logits.min(-1).values)).min()
        if gap > 0.01:
            break
    else:
        raise RuntimeError(f"{folder.name}: every sequence has a near tie")
    print(f"{folder.name}: largest {logits.abs().max():.3f}, smallest lead {gap:.4f} of the spread, sequence {seed}")
    rounded = [[round(v, 9) for v in row] for row in logits.tolist()]
    (folder / "expected.json").write_text(json.dumps({"tokens": tokens, "logits": rounded}).replace("], [", "],\n["))


def published(folder, file="config.json", **changes):
    """Older spellings, as most published files have them; a value of None removes the field."""
    path = folder / file
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}, indent=2) + "\n")


def write_gguf(name, source, kind, factors=None):
    """What llama.cpp's converter makes of a Llama checkpoint. Only matrices are quantised, as there."""
    config = json.loads((source / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_name(name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(model.config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(model.config.head_dim)
    writer.add_key_length(model.config.head_dim)
    writer.add_value_length(model.config.head_dim)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(config["vocab_size"])])
    writer.add_token_scores([0.0] * config["vocab_size"])
    writer.add_token_types([1] * config["vocab_size"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    state = model.state_dict()
    for theirs, tensor in state.items():
        if theirs == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        stored = tensor.numpy()
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(theirs.split(".")[-2])
        if heads:
            parts = stored.reshape(config[heads], 2, model.config.head_dim // 2, *stored.shape[1:])
            stored = np.ascontiguousarray(parts.swapaxes(1, 2).reshape(stored.shape))
        wide = stored.ndim > 1 and stored.shape[-1] % 32 == 0
        use = kind if wide else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(stored, use)
        writer.add_tensor(names.get_name(theirs, (".weight", ".bias")), data, raw_dtype=use)
        if use != gguf.GGMLQuantizationType.F32:
            loose = torch.from_numpy(gguf.dequantize(data, use).reshape(stored.shape).astype(np.float32))
            if heads:
                loose = loose.reshape(config[heads], -1, 2, *loose.shape[1:]).transpose(1, 2).reshape(tensor.shape)
            state[theirs].copy_(loose)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expect(folder, model)


def main():
    c = transformers
    f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
    save("llama", randomise(c.LlamaForCausalLM(c.LlamaConfig(**GATED)), 1), f32)
    # The spelling of files before transformers 5.
    published(HERE / "llama", rope_parameters=None, rope_theta=10000.0, dtype=None, torch_dtype="float32")

    llama3 = c.LlamaConfig(**GATED, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True, head_dim=16,
                           tie_word_embeddings=True)
    save("llama3", randomise(c.LlamaForCausalLM(llama3), 2), bf16, shard="20KB")
    old = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    published(HERE / "llama3", rope_parameters=None, rope_theta=500000.0, rope_scaling=old)
    published(HERE / "llama3", "generation_config.json", eos_token_id=[2, 3, 4])

    linear = dict(rope_type="linear", factor=2.0, rope_theta=10000.0)
    smol = c.LlamaConfig(**GATED, rope_parameters=linear, tie_word_embeddings=True)
    save("smollm2", randomise(c.LlamaForCausalLM(smol), 3), bf16)
    published(HERE / "smollm2", is_llama_config=True, rope_interleaved=False, **{"transformers.js_config": {}})

    save("mistral", randomise(c.MistralForCausalLM(c.MistralConfig(**GATED, sliding_window=64)), 4), f16)
    save("qwen2", randomise(c.Qwen2ForCausalLM(c.Qwen2Config(**GATED, tie_word_embeddings=True)), 5), bf16)
    save("qwen3", randomise(c.Qwen3ForCausalLM(c.Qwen3Config(**GATED, head_dim=12)), 6), f16)
    gpt2 = c.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=96, n_inner=64,
                        layer_norm_epsilon=1e-3, bos_token_id=1, eos_token_id=2)
    save("gpt2", randomise(c.GPT2LMHeadModel(gpt2), 7), f32)
    published(HERE / "gpt2", n_ctx=64, task_specific_params={"text-generation": {"do_sample": True}})

    kinds = gguf.GGMLQuantizationType
    write_gguf("gguf-f16", HERE / "llama", kinds.F16)
    write_gguf("gguf-q8_0", HERE / "llama", kinds.Q8_0)
    write_gguf("gguf-q4_0", HERE / "llama", kinds.Q4_0)
    write_gguf("gguf-q4_1", HERE / "llama", kinds.Q4_1)
    # Llama 3's scaling is a tensor of divisors in such a file.
    rotary = AutoModelForCausalLM.from_pretrained(HERE / "llama3").model.rotary_emb.inv_freq
    plain = 1 / 500000.0 ** (torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    write_gguf("gguf-bf16", HERE / "llama3", kinds.BF16, (plain / rotary).float().numpy())


main()
