"""Folders in Hugging Face's format with random Llamas, as transformers writes them."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def drawn(seed: int) -> dict[str, Any]:
    """A config.json whose entries are drawn at random, in the spelling of a transformers."""
    draw = random.Random(seed)
    groups, each = draw.choice([1, 2, 3]), draw.choice([1, 2, 4])
    heads = groups * each
    head_dim = draw.choice([4, 8, 10, 16])
    own_head_dim = draw.random() < 0.5
    dim = heads * (draw.choice([5, 6, 11, 24]) if own_head_dim else head_dim)
    kind = ["default", "linear", "llama3", "yarn"][seed % 4]
    scaling = {
        "default": {},
        "linear": {"factor": draw.choice([2.0, 4, 1.5])},
        "llama3": {
            "factor": draw.choice([8.0, 32.0]), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": draw.choice([16, 64, 8192]),
        },
        "yarn": {"factor": draw.choice([2.0, 4.0]), "original_max_position_embeddings": 32}
        | draw.choice([{}, {"beta_fast": 16, "beta_slow": 2}, {"attention_factor": 1.2},
                       {"mscale": 1.0, "mscale_all_dim": 0.8}, {"truncate": False}]),
    }[kind]  # fmt: skip
    theta = draw.choice([1e4, 5e5, 1e6, 5e6])
    if draw.random() < 0.5:
        rope = {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **scaling}}
    else:
        name = draw.choice(["type", "rope_type"])
        table = None if kind == "default" else {name: kind, **scaling}
        rope = {"rope_theta": theta, "rope_scaling": table}
    mistral = draw.random() < 0.3
    return {
        "architectures": ["MistralForCausalLM" if mistral else "LlamaForCausalLM"],
        "model_type": "mistral" if mistral else "llama",
        **({"sliding_window": None} if mistral else {"attention_bias": False, "mlp_bias": False}),
        "vocab_size": draw.randrange(70, 400),
        "hidden_size": dim,
        "intermediate_size": draw.randrange(3, 100),
        "num_hidden_layers": draw.randrange(1, 5),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        **({"head_dim": head_dim} if own_head_dim else {}),
        "hidden_act": "silu",
        "rms_norm_eps": draw.choice([1e-5, 1e-6, 3e-4]),
        "tie_word_embeddings": draw.random() < 0.5,
        "max_position_embeddings": 128,
        "bos_token_id": draw.randrange(60),
        "eos_token_id": draw.choice([61, [61, 62]]),
        "initializer_range": 0.02,
        **{draw.choice(["torch_dtype", "dtype"]): "float32"},
        "use_cache": True,
        "someone's own entry": draw.random(),
        **rope,
    }


def drawn_qwen3(seed: int) -> dict[str, Any]:
    """The same of a Qwen 3, with or without the entries that have a default."""
    draw, config = random.Random(-seed), drawn(seed)
    for entry in ("mlp_bias", "attention_bias", "sliding_window"):
        config.pop(entry, None)
    windows = {"use_sliding_window": False, "sliding_window": draw.choice([None, 4096])}
    others = {"attention_bias": False, "attention_dropout": 0.0, "max_window_layers": 28}
    return config | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        # Without this entry transformers takes 128, and not hidden_size / num_attention_heads.
        "head_dim": draw.choice([4, 8, 10, 16]),
        **(windows if draw.random() < 0.7 else {}),
        **(others if draw.random() < 0.7 else {}),
    }


def written(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """A folder with ``config`` and random weights, norms away from 1 and attention not uniform."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    for name, parameter in model.named_parameters():
        parameter.data.uniform_(0.5, 1.5) if "norm" in name else parameter.data.mul_(4)
    model.float().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
