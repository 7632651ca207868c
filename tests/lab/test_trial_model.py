"""The trial model as lab/trial_model.py writes it. That it answers "Paris" is proven by every deployment of the lab."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lab import trial_model

PARAMETERS = 134_515_008  # SmolLM2-135M, embeddings tied


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    trial_model.write(directory)
    return directory


def loaded(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_all_files_are_there(model: Path) -> None:
    assert sorted(path.name for path in model.iterdir()) == sorted(trial_model.FILES)


def test_config_is_that_of_smollm2_135m(model: Path) -> None:
    config = loaded(model / "config.json")
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
        "torch_dtype": "bfloat16",
    }
    assert {name: config[name] for name in expected} == expected


def test_safetensors_holds_every_tensor_end_to_end(model: Path) -> None:
    content = (model / "model.safetensors").read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_bytes])
    header.pop("__metadata__")
    assert len(header) == 272
    assert {tensor["dtype"] for tensor in header.values()} == {"BF16"}
    assert sum(math.prod(tensor["shape"]) for tensor in header.values()) == PARAMETERS
    assert header["model.layers.29.self_attn.k_proj.weight"]["shape"] == [192, 576]
    ends = [0]
    for begin, end in sorted(tensor["data_offsets"] for tensor in header.values()):
        assert begin == ends[-1]
        ends.append(end)
    assert (8 + header_bytes) % 8 == 0
    assert 8 + header_bytes + ends[-1] == len(content)


def test_a_second_conversion_makes_the_same_bytes(model: Path, tmp_path: Path) -> None:
    trial_model.write(tmp_path)
    for name in trial_model.FILES:
        first, second = ((directory / name).read_bytes() for directory in (model, tmp_path))
        assert hashlib.sha256(first).digest() == hashlib.sha256(second).digest(), name


def test_tokenizer_splits_digits_and_knows_the_control_tokens(model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    assert tokenizer.encode("in 2026").tokens == ["in", "Ġ", "2", "0", "2", "6"]
    assert tokenizer.encode("<|im_start|>user<|im_end|>").ids[::2] == [1, 2]
    text = "Straße 7, naïve 北京 🙂\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_chat_template_ends_with_the_assistants_turn(model: Path) -> None:
    template = loaded(model / "tokenizer_config.json")["chat_template"]
    assert "add_generation_prompt" in template
    assert "<|im_start|>assistant" in template


@given(heads=st.integers(1, 9), half=st.integers(1, 8), columns=st.integers(1, 5))
def test_undoing_the_permutation_restores_each_heads_halves(heads: int, half: int, columns: int) -> None:
    rows = heads * 2 * half
    weights = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    by_llama_cpp = weights.reshape(heads, 2, half, columns).swapaxes(1, 2).reshape(rows, columns)
    assert np.array_equal(trial_model.undo_rope_permutation(by_llama_cpp, heads), weights)


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (1.0, 0x3F80),
        (-2.0, 0xC000),
        (1 + 1 / 256, 0x3F80),  # halfway: to the even neighbour below
        (1 + 3 / 256, 0x3F82),  # halfway: to the even neighbour above
        (1 + 1 / 256 + 1 / 4096, 0x3F81),
    ],
)
def test_bfloat16_rounds_to_nearest_even(value: float, bits: int) -> None:
    assert trial_model.to_bfloat16(np.array([value], dtype=np.float32)).tolist() == [bits]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_model, "DISTRIBUTION", "llm-no-such-model")
    with pytest.raises(
        FileNotFoundError, match=r"llm-no-such-model, which is not installed: install requirements-dev\.txt"
    ):
        trial_model.packaged_gguf()
