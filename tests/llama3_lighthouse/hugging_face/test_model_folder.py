"""Runs whose model a folder describes: training, resume, meshes, dry run and refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import SMALL, Run, arguments
from llamas import loaded, written
from safetensors.torch import load_file

from torchtitan.models.llama3_lighthouse.checkpoints.model_folder import model_arguments_of
from torchtitan.models.llama3_lighthouse.checks.configuration import check_config, check_launch
from torchtitan.models.llama3_lighthouse.checks.unread import warnings_of
from torchtitan.models.llama3_lighthouse.dry_run import dry_run
from torchtitan.models.llama3_lighthouse.evaluation.inference import (
    load_trained_model,
    parse_over,
)
from torchtitan.models.llama3_lighthouse.hugging_face.export import export_checkpoint
from torchtitan.models.llama3_lighthouse.hugging_face.import_model import import_model
from torchtitan.models.llama3_lighthouse.job_config import JobConfig
from torchtitan.models.llama3_lighthouse.model.flavors import flavors
from torchtitan.models.llama3_lighthouse.model.model import LighthouseTransformer

# Tied embeddings, heads that are wider than dim / heads, groups, no scaling.
TIED: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "vocab_size": 320, "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True, "rope_theta": 10000.0, "max_position_embeddings": 512,
    "bos_token_id": 256, "eos_token_id": 257, "torch_dtype": "float32",
}  # fmt: skip
SETTINGS = {
    "lighthouse.dense_layers": [0], "lighthouse.dense_from_step": 2, "training.steps": 3,
    "training.global_batch_size": 2, "checkpoint.interval": 2, "optimizer.lr": 1e-3,
    "lr_scheduler.warmup_steps": 1,
}  # fmt: skip


def configured(folder: Path | str, **changed: Any) -> JobConfig:
    flags = {"model.hf_folder": str(folder)} | {k.replace("__", "."): changed[k] for k in changed}
    return parse_over(None, arguments(SMALL | SETTINGS | flags))


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("tied") / "folder", TIED)


def test_trains_on_resumes_without_the_folder_and_refuses_another(
    tied: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(tied, folder)
    settings = SETTINGS | {"model.hf_folder": folder}
    import_model(folder, tmp_path / "dump")
    first = Run(tmp_path, settings).succeed()
    assert first.steps().keys() == {1, 2, 3}
    step = tmp_path / "dump/checkpoint/step-3"
    assert json.loads((step / "config.json").read_text()) == TIED

    # The embedding is stored once, and moved by both of its uses.
    trained = load_trained_model(step)
    assert "output.weight" not in trained.model.state_dict()
    assert trained.model.output.weight is trained.model.tok_embeddings.weight
    before = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(trained.model.output.weight, before)

    shutil.rmtree(folder)
    longer = {"training.steps": 5}
    second = Run(tmp_path, settings | longer).succeed()
    assert second.steps().keys() >= {4, 5}
    assert f"{folder}' is gone; the model is as the copy of its config.json in" in second.log
    export_checkpoint(tmp_path / "dump", tmp_path / "exported")
    assert json.loads((tmp_path / "exported/config.json").read_text()) == TIED
    tokens = torch.randint(320, (1, 40))
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(tmp_path / "exported")(tokens).logits,
            load_trained_model(tmp_path / "dump").model(tokens),
            rtol=0, atol=1e-4,
        )  # fmt: skip

    written(folder, TIED | {"intermediate_size": 90})
    for other, message in (
        ({"training.steps": 6}, "intermediate_size = 90 (checkpoint: 100)"),
        (
            {"training.steps": 6, "model.hf_folder": "", "lighthouse.dense_layers": [0]},
            "hidden_size = 64 (checkpoint: 48)",
        ),
    ):
        refused = Run(tmp_path, settings | other)
        assert refused.wait() != 0
        assert "would make another model of checkpoint" in refused.log
        assert message in refused.log
    shutil.rmtree(folder)
    shutil.copytree(tied, folder)
    refused = Run(tmp_path, settings | {"training.steps": 6, "model.rope_theta": 5e5})
    assert refused.wait() != 0
    assert "rope_theta = 500000.0 (checkpoint: 10000.0)" in refused.log


def test_extending_changes_base_and_scaling_in_another_place(tied: Path, tmp_path: Path) -> None:
    step = import_model(tied, tmp_path / "imported")
    longer = {
        "model.hf_folder": tied, "model.rope_theta": 250000.0,
        "model.rope_scaling": "yarn factor=4", "checkpoint.initial_load_path": step,
        "training.seq_len": 1024, "lighthouse.dense_from_step": 1, "training.steps": 2,
    }  # fmt: skip
    run = Run(tmp_path, SETTINGS | longer).succeed()
    assert "was trained as another model than this run's: rope_theta = 250000.0" in run.log
    export_checkpoint(tmp_path / "dump", tmp_path / "exported")
    config = json.loads((tmp_path / "exported/config.json").read_text())
    scaling = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 512}
    assert config == TIED | {
        "rope_theta": 250000.0, "rope_scaling": scaling, "max_position_embeddings": 2048,
    }  # fmt: skip
    tokens = torch.randint(320, (1, 1000))
    with torch.no_grad():
        expected = loaded(tmp_path / "exported")(tokens).logits
        actual = load_trained_model(tmp_path / "dump").model(tokens)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    # A model that is longer without a scaling keeps all but its length.
    import_model(tied, tmp_path / "again", ["--training.seq_len", "4096"])
    export_checkpoint(tmp_path / "again", tmp_path / "long")
    config = json.loads((tmp_path / "long/config.json").read_text())
    assert config == TIED | {"max_position_embeddings": 4096}


@pytest.mark.parametrize("kind", ["fsdp-chunked", "tensor"])
def test_tied_embeddings_train_alike_on_two_ranks(tied: Path, tmp_path: Path, kind: str) -> None:
    step = import_model(tied, tmp_path / "imported")
    settings = SETTINGS | {
        "model.hf_folder": tied, "optimizer.lr": 2e-4, "optimizer.eps": 1e-6,
        "lighthouse.dense_from_step": 1, "checkpoint.initial_load_path": step,
    }  # fmt: skip
    if kind == "fsdp-chunked":
        settings |= {
            "lighthouse.loss": "chunked",
            "parallelism.fsdp_reshard_after_forward": "always",
        }
    several = {"parallelism.tensor_parallel_degree": 2} if kind == "tensor" else {}
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    Run(tmp_path / "one", settings).succeed()
    Run(tmp_path / "two", settings | several, processes=2).succeed()
    start, one, two = (
        load_trained_model(path).model.state_dict()
        for path in (step, tmp_path / "one/dump", tmp_path / "two/dump")
    )
    assert start.keys() == one.keys() == two.keys()
    assert (one["tok_embeddings.weight"] - start["tok_embeddings.weight"]).abs().max() > 1e-4
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=2e-5)


def test_weights_come_from_the_folder_without_an_import(tied: Path, tmp_path: Path) -> None:
    settings = {
        "model.hf_folder": tied, "checkpoint.initial_load_path": tied, "training.steps": 1,
        "checkpoint.initial_load_in_hf": True, "optimizer.lr": 0.0,
    }  # fmt: skip
    Run(tmp_path, SETTINGS | settings).succeed()
    step = import_model(tied, tmp_path / "imported")
    found, expected = (
        load_trained_model(path).model.state_dict() for path in (tmp_path / "dump", step)
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("length", [4, 77, 2047, 131072])
def test_any_length_is_imported(tied: Path, tmp_path: Path, length: int) -> None:
    shutil.copytree(tied, tmp_path / "folder")
    config = TIED | {"max_position_embeddings": length}
    (tmp_path / "folder/config.json").write_text(json.dumps(config))
    import_model(tmp_path / "folder", tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text()) == config


def test_dry_run_counts_what_is_there(tied: Path, tmp_path: Path) -> None:
    config = configured(tied, training__global_batch_size=2)
    described = dry_run(config, 1)
    args = model_arguments_of(config)
    whole = sum(each.numel() for each in loaded(tied).parameters())
    assert f"{tied}, {whole:,} parameters" in described
    assert (
        f"1 pass in 1 chunk, {whole:,} parameters" in described or f"{whole:,} param" in described
    )
    # Attention over N positions and six FLOPs a parameter, the embedding included as it multiplies.
    n = 512
    flops = 6 * whole + 3 * 12 * 4 * 16 * (n + 1) / 2
    model = LighthouseTransformer(args)
    assert args.get_nparams_and_flops(model, n)[1] == pytest.approx(flops)
    untied = written(tmp_path / "untied", TIED | {"tie_word_embeddings": False})
    more = whole + 320 * 48
    assert f"{more:,} parameters" in dry_run(configured(untied), 1)
    other = model_arguments_of(configured(untied))
    assert other.get_nparams_and_flops(LighthouseTransformer(other), n)[1] == pytest.approx(flops)
    assert flavors["debugmodel"].dim == 256
    # No GPU is needed to learn what two ranks would hold.
    assert f"{whole // 2:,}" in dry_run(configured(tied), 2)
    # Tensor parallelism copies the seven norms, and leaves one embedding, which FSDP gathers once.
    norms = 7 * 48
    divided = configured(tied, parallelism__tensor_parallel_degree=2)
    assert f"{(whole + norms) // 2:,} parameters" in dry_run(divided, 2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "qwen2"}, "model_type = 'qwen2' cannot be trained here; .*or 'qwen3'"),
        (
            {"model_type": "qwen3", "use_sliding_window": True},
            "use_sliding_window = True cannot be",
        ),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias = True cannot be"),
        ({"use_sliding_window": True}, "use_sliding_window = True cannot be trained"),
        ({"attention_bias": True}, "attention_bias = True cannot be trained here; pass a model"),
        ({"mlp_bias": True}, "mlp_bias = True cannot be trained"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' cannot be trained here; .*SwiGLU"),
        ({"sliding_window": 4096}, "sliding_window = 4096 cannot be .*set sliding_window to null"),
        ({"model_type": "mistral"}, "sliding_window = 4096 cannot be trained"),
        # transformers does not read this switch for a Mistral, which has its window all the same.
        (
            {"model_type": "mistral", "sliding_window": 64, "use_sliding_window": False},
            "sliding_window = 64 cannot be trained",
        ),
        (
            {
                "model_type": "qwen3",
                "use_sliding_window": False,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            },
            "layer_types has 'sliding_attention', which cannot be",
        ),
        ({"use_qk_norm": True}, "use_qk_norm = True cannot be trained"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1 .*set it to 0"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_att"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = .*before their quantization"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3 must divide num_attention_heads = 4"),
        ({"head_dim": 15}, "head_dim = 15 must be an even number"),
        ({"hidden_size": "48"}, "hidden_size = '48' must be a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0 must be a whole number of at least 1"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps = -1.0 must be a number between 0 and 1"),
        ({"rope_theta": "big"}, "rope_theta = 'big' must be a number above 1"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "of type 'dynamic', which is not"),
        ({"rope_scaling": {"rope_type": "linear"}}, "type 'linear' lacks factor, which must"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "is of type \\['yarn'\\], which is not"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 10**400}}, "factor = 10+ must be"),
        ({"rope_theta": 10**400}, "rope_theta = 10+ must be"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5 of"),
        ({"model_type": ["llama"]}, "model_type = \\['llama'\\] cannot be trained"),
        ({"layer_types": 5}, "layer_types = 5 must be a list"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor = 0.5 must be"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "beta": 1}}, "has beta = 1, which"),
        ({"rope_scaling": 2}, "rope_scaling must be an object, got 2"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes' must be true or false"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path: Path, changed: dict, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TIED | changed))
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json: .*{message}"):
        check_config(configured(tmp_path, job__dump_folder=tmp_path / "dump"), flavors)
    with pytest.raises(ValueError, match=message):
        import_model(tmp_path, tmp_path / "run")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.hf_folder", "nowhere", "model.hf_folder = 'nowhere' holds no config.json"),
        ("model.rope_scaling", "longer", "model.rope_scaling = 'longer' is not known; use 'none'"),
        ("model.rope_scaling", "linear", "'linear' lacks factor, which must be a number of at"),
        ("model.rope_scaling", " ", "model.rope_scaling = ' ' is not known; use 'none'"),
        ("model.rope_scaling", "yarn factor=2 beta_fast=1 beta_slow=4", "must not be below beta_"),
        ("model.rope_scaling", "yarn factor", "'factor' is no setting"),
        ("model.rope_scaling", "yarn factor=x", "factor = 'x' must be a number"),
        ("model.rope_scaling", "llama3 factor=8 low_freq_factor=5", "must be below"),
        ("model.rope_theta", 0.5, "model.rope_theta = 0.5 must be above 1"),
        ("parallelism.tensor_parallel_degree", 4, "must divide the 2 heads of keys and values of"),
        ("parallelism.pipeline_parallel_degree", 2, "tie_word_embeddings = true"),
        ("lighthouse.dense_layers", [3], "are not layers of model.hf_folder = .*layers 0 to 2"),
    ],
)
def test_settings_are_refused(
    tied: Path, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    changed = {key: value, "training.local_batch_size": 2, "job.dump_folder": tmp_path}
    config = configured(tied, **{k.replace(".", "__"): v for k, v in changed.items()})
    with pytest.raises(ValueError, match=message):
        check_launch(config, flavors, 4)


def test_flavor_beside_a_folder_has_no_effect(tied: Path) -> None:
    found = warnings_of(configured(tied, model__flavor="15M"), 1)
    assert any(line.startswith("model.flavor = '15M' has no effect") for line in found)


def test_sequences_beyond_yarn_get_a_warning(tied: Path) -> None:
    found = {
        factor: [
            line
            for line in warnings_of(
                configured(
                    tied, training__seq_len=2048, model__rope_scaling=f"yarn factor={factor}"
                ),
                1,
            )
            if "yarn factor=4" in line and line.startswith("training.seq_len = 2,048")
        ]
        for factor in (3.5, 4)
    }
    assert [len(lines) for lines in found.values()] == [1, 0]


def test_scalings_of_flavors() -> None:
    config = configured("", model__rope_scaling="none", model__rope_theta=2e6)
    args = model_arguments_of(config)
    assert (args.rope_scaling, args.rope_theta) == ({"rope_type": "default"}, 2e6)
    assert args.dim == flavors["debugmodel"].dim
    assert flavors["debugmodel"].rope_theta == 500000


def test_tied_output_that_differs_is_refused(tied: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = load_file(tied / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    shutil.copytree(tied, tmp_path / "folder")
    file = tmp_path / "folder/model.safetensors"
    save_file(weights | {"lm_head.weight": embedding.clone()}, file, {"format": "pt"})
    import_model(tmp_path / "folder", tmp_path / "run")
    save_file(weights | {"lm_head.weight": embedding + 1}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="'lm_head.weight' differs from 'model.embed_tokens"):
        import_model(tmp_path / "folder", tmp_path / "other")
