"""Models of any architecture: logits, training, export and generation against transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from llamas import drawn, drawn_qwen3, loaded, written
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
from torchtitan.models.llama3_lighthouse.hugging_face.format import model_state
from torchtitan.models.llama3_lighthouse.hugging_face.import_model import import_model
from torchtitan.models.llama3_lighthouse.job_config import JobConfig, Model
from torchtitan.models.llama3_lighthouse.memory_estimate import product_widths
from torchtitan.models.llama3_lighthouse.model.architecture import (
    described_arguments,
)
from torchtitan.models.llama3_lighthouse.model.loss import build_loss
from torchtitan.models.llama3_lighthouse.model.model import LighthouseTransformer
from torchtitan.models.llama3_lighthouse.model.state_dict_adapter import LighthouseStateDictAdapter

N = 64


def some_tokens(vocabulary: int, seed: int, length: int = N) -> torch.Tensor:
    return torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(seed))


def checked(ours: Path, theirs: Any, vocabulary: int, seed: int) -> Any:
    """The model of a checkpoint, after a check that its logits are those of transformers."""
    tokens = some_tokens(vocabulary, seed)
    found = load_trained_model(ours)
    with torch.no_grad():
        expected, actual = theirs(tokens).logits, found.model(tokens)
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    return found


def trained(step: Path, config: JobConfig, output: Path) -> Path:
    """The checkpoint after two optimizer steps, the first of them under Lighthouse attention."""
    config.lighthouse.dense_layers = []
    if model_arguments(config).attention_class.norms_heads:
        with torch.device("meta"):
            model = LighthouseTransformer(model_arguments(config))
        with pytest.raises(ValueError, match="scorer = 'norm' ranks .* type 'qwen3' .*scorer gla"):
            model.use_attention("lighthouse")
        config.lighthouse.scorer = "gla"
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


# Among these seeds are all model types, scalings, spellings, head widths and kinds of other entries
# of the 20 and the 8.
QUICK = {drawn: (0, 2, 3, 5, 7, 8, 11, 12, 13, 14, 15, 18), drawn_qwen3: (0, 2, 3, 5, 6, 7)}


@pytest.mark.parametrize(
    ("draw", "seed"),
    [
        pytest.param(draw, seed, marks=() if seed in QUICK[draw] else pytest.mark.slow)
        for draw, count in ((drawn, 20), (drawn_qwen3, 8))
        for seed in range(count)
    ],
)
def test_drawn_architecture(
    tmp_path: Path, draw: Callable[[int], dict[str, Any]], seed: int
) -> None:
    config = draw(seed)
    folder = written(tmp_path / "folder", config, seed)
    step = import_model(folder, tmp_path / "run", report=lambda line: None)
    assert read_record(step).config["model"]["hf_folder"] == str(folder)
    vocabulary = config["vocab_size"]
    args = described_arguments(Model(), config, "config.json")
    with torch.device("meta"):
        block = LighthouseTransformer(args).layers["0"]
    linear = {**dict(block.attention.named_modules()), **dict(block.feed_forward.named_modules())}
    widths = {name: linear[name].out_features for name in ("wq", "wk", "wv", "wo", "w1", "w3")}
    assert product_widths(args) == widths

    before_training = checked(step, loaded(folder), vocabulary, seed)

    # The round trip changes no bit of a weight and no entry.
    export_checkpoint(step, tmp_path / "again", report=lambda line: None)
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert ("lm_head.weight" in after) is not config["tie_word_embeddings"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "again/config.json").read_text()) == config

    later = trained(step, before_training.config, tmp_path / "trained")
    # The checkpoint alone says what the model is.
    (folder / "config.json").rename(folder / "elsewhere")
    export_checkpoint(later, tmp_path / "exported", report=lambda line: None)
    assert json.loads((tmp_path / "exported/config.json").read_text()) == config
    theirs, prompt = loaded(tmp_path / "exported"), some_tokens(vocabulary, 3, 9)[:1]
    ours = checked(later, theirs, vocabulary, seed + 100)
    assert not any(
        torch.equal(tensor, before[name])
        for name, tensor in load_file(tmp_path / "exported/model.safetensors").items()
    )
    stop = config["eos_token_id"]
    stop = stop if isinstance(stop, list) else [stop]
    with torch.no_grad():
        expected = generated(ours.model, prompt, 12, stop)
        for use_cache in (True, False):
            actual = theirs.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False,
                pad_token_id=0, use_cache=use_cache,
            )  # fmt: skip
            assert actual[0, 9:].tolist() == expected


# The published config.json of each family, from public facts, without entries that nothing reads.
LLAMA_2 = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5,
    "rope_scaling": None, "tie_word_embeddings": False, "vocab_size": 32000,
    "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2, "pretraining_tp": 1,
    "torch_dtype": "float16", "use_cache": True, "initializer_range": 0.02,
}  # fmt: skip
LLAMA_3 = LLAMA_2 | {
    "attention_bias": False, "attention_dropout": 0.0, "intermediate_size": 14336,
    "num_key_value_heads": 8, "rope_theta": 500000.0, "vocab_size": 128256,
    "max_position_embeddings": 8192, "bos_token_id": 128000, "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}  # fmt: skip
ROPE_3_1 = {
    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3",
}  # fmt: skip
LLAMA_3_1 = LLAMA_3 | {
    "max_position_embeddings": 131072, "mlp_bias": False, "rope_scaling": ROPE_3_1,
    "eos_token_id": [128001, 128008, 128009],
}  # fmt: skip
QWEN_3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama 2 7B": (LLAMA_2, 6_738_415_616),
    "Llama 3 8B": (LLAMA_3, 8_030_261_248),
    "Llama 3.1 8B": (LLAMA_3_1, 8_030_261_248),
    "Llama 3.2 1B": (
        LLAMA_3_1 | {
            "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192,
            "num_hidden_layers": 16, "rope_scaling": ROPE_3_1 | {"factor": 32.0},
            "tie_word_embeddings": True, "eos_token_id": 128001,
        },
        1_235_814_400,
    ),
    "SmolLM2 135M": (
        LLAMA_3 | {
            "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 100000,
            "rope_interleaved": False, "tie_word_embeddings": True, "vocab_size": 49152,
            "bos_token_id": 0, "eos_token_id": 0, "is_llama_config": True,
        },
        134_515_008,
    ),
    "TinyLlama 1.1B": (
        LLAMA_2 | {
            "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
            "num_key_value_heads": 4, "max_position_embeddings": 2048, "torch_dtype": "float32",
        },
        1_100_048_384,
    ),
    "Mistral 7B v0.3": (
        {
            "architectures": ["MistralForCausalLM"], "model_type": "mistral",
            "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
            "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
            "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0,
            "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "use_cache": True, "vocab_size": 32768,
        },
        7_248_023_552,
    ),
    "Mistral Nemo 12B": (
        {
            "architectures": ["MistralForCausalLM"], "model_type": "mistral", "head_dim": 128,
            "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
            "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 14336,
            "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 40,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0,
            "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "use_cache": True, "vocab_size": 131072,
        },
        12_247_782_400,
    ),
    "DeepSeek R1 Distill Llama 8B": (
        LLAMA_3_1 | {"eos_token_id": 128001},
        8_030_261_248,
    ),
    "Qwen3 0.6B": (QWEN_3, 596_049_920),
    "Qwen3 8B": (
        QWEN_3 | {
            "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
            "num_attention_heads": 32, "tie_word_embeddings": False, "max_window_layers": 36,
        },
        8_190_735_360,
    ),
    "Yi 6B": (
        LLAMA_2 | {
            "num_key_value_heads": 4, "rope_theta": 5000000.0, "vocab_size": 64000,
            "torch_dtype": "bfloat16",
        },
        6_061_035_520,
    ),
}  # fmt: skip


def scaled_down(config: dict[str, Any]) -> dict[str, Any]:
    """A model of the same kind, heads, rotary embedding and entries, which fits a test's memory.

    Its widths are a sixteenth or less. It has two layers and a vocabulary of 400.
    """
    dim = config["hidden_size"] // 16
    own = {"head_dim": config["head_dim"] // 16} if "head_dim" in config else {}
    return config | own | {
        "hidden_size": dim, "intermediate_size": config["intermediate_size"] // 32,
        "num_hidden_layers": 2, "vocab_size": 400, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": "float32",
    }  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_families(tmp_path: Path, name: str) -> None:
    config, parameters = PUBLISHED[name]
    # The whole model has the published number of parameters, each tensor in transformers' shape.
    args = described_arguments(Model(), config, name)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    ours = LighthouseStateDictAdapter(args, None).to_hf(model_state(args))
    shapes = {key: tensor.shape for key, tensor in theirs.named_parameters()}
    assert {key: tensor.shape for key, tensor in ours.items()} == shapes
    assert sum(tensor.numel() for tensor in ours.values()) == parameters

    small = scaled_down(config)
    folder = written(tmp_path / "folder", small)
    step = import_model(folder, tmp_path / "run", report=lambda line: None)
    whole = load_trained_model(step)
    tokens = some_tokens(400, 1, 96)[:1]
    places = torch.Generator().manual_seed(2)
    positions = torch.randint(0, config["max_position_embeddings"], (1, 96), generator=places)
    positions = positions.sort().values
    with torch.no_grad():
        # A mask keeps gaps between positions from being taken for the end of a sequence.
        expected = loaded(folder)(
            tokens, position_ids=positions, attention_mask=torch.ones_like(tokens)
        ).logits
        actual = whole.model(tokens, positions=positions)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    export_checkpoint(step, tmp_path / "again", report=lambda line: None)
    assert json.loads((tmp_path / "again/config.json").read_text()) == small
