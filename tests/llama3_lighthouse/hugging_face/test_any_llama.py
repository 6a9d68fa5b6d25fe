"""Llamas of any architecture: logits, training, export and generation against transformers."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from torchtitan.models.llama3_lighthouse.checkpoints.model_folder import files_to_keep, write_files
from torchtitan.models.llama3_lighthouse.checkpoints.record import (
    CheckpointRecord,
    read_record,
    write_record,
)
from torchtitan.models.llama3_lighthouse.evaluation.inference import (
    load_trained_model,
    model_arguments,
)
from torchtitan.models.llama3_lighthouse.hugging_face.export import export_checkpoint
from torchtitan.models.llama3_lighthouse.hugging_face.import_model import import_model
from torchtitan.models.llama3_lighthouse.model.loss import build_loss
from torchtitan.models.llama3_lighthouse.model.model import LighthouseTransformer

N = 64


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


def some_tokens(vocabulary: int, seed: int, length: int = N) -> torch.Tensor:
    return torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(seed))


def close(ours: Path, folder: Path, vocabulary: int, seed: int) -> None:
    """Check that a checkpoint and a folder have the same logits."""
    tokens = some_tokens(vocabulary, seed)
    with torch.no_grad():
        expected = loaded(folder)(tokens).logits
        actual = load_trained_model(ours).model(tokens)
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def trained(step: Path, output: Path) -> Path:
    """The checkpoint after two optimizer steps, the first of them under Lighthouse attention."""
    config = load_trained_model(step).config
    config.lighthouse.dense_layers = []
    args = model_arguments(config)
    assert args.vocab_size < 16384 and not args.chunked_loss
    model = LighthouseTransformer(args)
    dcp.load(state := model.state_dict(), checkpoint_id=str(step), no_dist=True)
    model.load_state_dict(state)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    tokens = some_tokens(args.vocab_size, 7, N + 1)
    for attention in ("lighthouse", "dense", "dense"):
        model.use_attention(attention)
        loss = build_loss(config)(model(tokens[:, :-1]), tokens[:, 1:]) / N / 2
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(each.grad is not None for each in model.parameters())
        if len(losses) < 3:
            optimizer.step()
    assert losses[2] < losses[1]
    path = output / "checkpoint/step-2"
    write_record(path, CheckpointRecord(2, 1, config.to_dict()))
    write_files(path, files_to_keep(config))
    dcp.save(model.state_dict(), checkpoint_id=str(path), no_dist=True)
    return path


def generated(model: Any, tokens: torch.Tensor, count: int, stop: list[int]) -> list[int]:
    """Greedy continuation by forward passes over the whole sequence."""
    start = tokens.shape[1]
    for _ in range(count):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
        if tokens[0, -1].item() in stop:
            break
    return tokens[0, start:].tolist()


@pytest.mark.parametrize("seed", range(20))
def test_drawn_architecture(tmp_path: Path, seed: int) -> None:
    config = drawn(seed)
    folder = written(tmp_path / "folder", config, seed)
    step = import_model(folder, tmp_path / "run", report=lambda line: None)
    assert read_record(step).config["model"]["hf_folder"] == str(folder)
    vocabulary = config["vocab_size"]
    close(step, folder, vocabulary, seed)

    # The round trip changes no bit of a weight and no entry.
    export_checkpoint(step, tmp_path / "again", report=lambda line: None)
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert ("lm_head.weight" in after) is not config["tie_word_embeddings"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "again/config.json").read_text()) == config

    later = trained(step, tmp_path / "trained")
    # The checkpoint alone says what the model is.
    (folder / "config.json").rename(folder / "elsewhere")
    export_checkpoint(later, tmp_path / "exported", report=lambda line: None)
    assert json.loads((tmp_path / "exported/config.json").read_text()) == config
    close(later, tmp_path / "exported", vocabulary, seed + 100)
    theirs, prompt = loaded(tmp_path / "exported"), some_tokens(vocabulary, 3, 9)[:1]
    assert not any(
        torch.equal(tensor, before[name])
        for name, tensor in load_file(tmp_path / "exported/model.safetensors").items()
    )
    stop = config["eos_token_id"]
    stop = stop if isinstance(stop, list) else [stop]
    with torch.no_grad():
        expected = generated(load_trained_model(later).model, prompt, 12, stop)
        actual = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
    assert actual[0, 9:].tolist() == expected
