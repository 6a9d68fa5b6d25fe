"""Runs of Qwen 3: both stages, meshes, activation checkpointing, dry run and the refused scorer.

``test_any_llama.py`` compares logits, export and generation with transformers.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import SMALL, Run, arguments
from llamas import loaded, written
from safetensors.torch import load_file
from small_model import build
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan.models.llama3_lighthouse.checkpoints.model_folder import model_arguments_of
from torchtitan.models.llama3_lighthouse.checks.configuration import check_config
from torchtitan.models.llama3_lighthouse.dry_run import dry_run
from torchtitan.models.llama3_lighthouse.evaluation.inference import (
    load_trained_model,
    model_arguments,
    parse_over,
)
from torchtitan.models.llama3_lighthouse.hugging_face.export import export_checkpoint
from torchtitan.models.llama3_lighthouse.hugging_face.import_model import import_model
from torchtitan.models.llama3_lighthouse.infra.activation_checkpoint import (
    apply_lighthouse_checkpoint,
)
from torchtitan.models.llama3_lighthouse.job_config import ActivationCheckpoint, JobConfig
from torchtitan.models.llama3_lighthouse.memory_estimate import activation_bytes
from torchtitan.models.llama3_lighthouse.model.flavors import flavors
from torchtitan.models.llama3_lighthouse.model.model import LighthouseTransformer

TIED: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu",
    "vocab_size": 320, "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True, "rope_theta": 1000000, "max_position_embeddings": 512,
    "attention_bias": False, "use_sliding_window": False, "sliding_window": None,
    "max_window_layers": 3, "bos_token_id": 256, "eos_token_id": 257, "torch_dtype": "float32",
}  # fmt: skip
SETTINGS = {
    "lighthouse.dense_layers": [0], "lighthouse.dense_from_step": 1, "training.steps": 3,
    "lighthouse.scorer": "gla", "training.global_batch_size": 2, "checkpoint.interval": 2,
    "optimizer.lr": 2e-4, "optimizer.eps": 1e-6, "lr_scheduler.warmup_steps": 1,
}  # fmt: skip
NORM = "layers.1.attention.q_norm.weight"


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation == torch.ops.aten.mm.default
        return operation(*args, **(kwargs or {}))


def configured(folder: Path, **changed: Any) -> JobConfig:
    flags = {"model.hf_folder": str(folder)} | {k.replace("__", "."): changed[k] for k in changed}
    return parse_over(None, arguments(SMALL | SETTINGS | flags))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("qwen") / "folder", TIED)


@pytest.fixture(scope="module")
def on_one(qwen: Path, tmp_path_factory) -> Path:
    """A run in one process, from the folder's weights."""
    place = tmp_path_factory.mktemp("one")
    import_model(qwen, place / "dump", ["--training.seq_len", "512"])
    run = Run(place, SETTINGS | {"model.hf_folder": qwen}).succeed()
    assert run.steps().keys() == {1, 2, 3}
    return place


def test_trains_in_both_stages_and_loads_in_transformers(
    qwen: Path, on_one: Path, tmp_path: Path
) -> None:
    export_checkpoint(on_one / "dump", tmp_path / "exported")
    assert json.loads((tmp_path / "exported/config.json").read_text()) == TIED
    before, after = (load_file(f / "model.safetensors") for f in (qwen, tmp_path / "exported"))
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    tokens = torch.randint(320, (1, 200))
    with torch.no_grad():
        expected = loaded(tmp_path / "exported")(tokens).logits
        actual = load_trained_model(on_one / "dump").model(tokens)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_resumes_to_the_same_bits(qwen: Path, on_one: Path, tmp_path: Path) -> None:
    shutil.copytree(on_one / "dump", tmp_path / "dump")
    shutil.rmtree(tmp_path / "dump/checkpoint/step-3")
    run = Run(tmp_path, SETTINGS | {"model.hf_folder": qwen}).succeed()
    assert max(run.steps()) == 3
    whole, resumed = (
        load_trained_model(path / "dump/checkpoint/step-3").model.state_dict()
        for path in (on_one, tmp_path)
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_trains_alike_in_a_pipeline(tmp_path: Path) -> None:
    folder = written(tmp_path / "folder", TIED | {"tie_word_embeddings": False})
    step = import_model(folder, tmp_path / "imported", ["--training.seq_len", "512"])
    settings = SETTINGS | {
        "model.hf_folder": folder, "checkpoint.initial_load_path": step,
        "training.local_batch_size": 2,
    }  # fmt: skip
    pipeline = {"parallelism.pipeline_parallel_degree": 2}
    states = []
    for several, processes in (({}, 1), (pipeline, 2)):
        place = tmp_path / str(processes)
        place.mkdir()
        Run(place, settings | several, processes=processes).succeed()
        states.append(load_trained_model(place / "dump").model.state_dict())
    one, two = states
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=2e-5)


def test_extends_as_its_authors_do(qwen: Path, tmp_path: Path) -> None:
    # The length that Qwen 3 is scaled from is not its max_position_embeddings.
    scaling = "yarn factor=4 original_max_position_embeddings=256"
    step = import_model(qwen, tmp_path / "imported", ["--model.rope_scaling", scaling])
    export_checkpoint(step, tmp_path / "exported")
    expected = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 256}
    config = json.loads((tmp_path / "exported/config.json").read_text())
    assert config == TIED | {"rope_scaling": expected, "max_position_embeddings": 1024}
    tokens = torch.randint(320, (1, 1000))
    with torch.no_grad():
        logits = load_trained_model(step, max_seq_len=1000).model(tokens)
        theirs, unscaled = (loaded(path)(tokens).logits for path in (tmp_path / "exported", qwen))
    torch.testing.assert_close(logits, theirs, rtol=0, atol=1e-4)
    assert (logits - unscaled).abs().max() > 1e-2


@pytest.mark.parametrize(
    "kind",
    [
        "fsdp",
        "tensor-checkpointed",
        pytest.param("fsdp-compiled", marks=pytest.mark.slow),
    ],
)
def test_trains_alike_on_two_ranks(qwen: Path, on_one: Path, tmp_path: Path, kind: str) -> None:
    import_model(qwen, tmp_path / "dump", ["--training.seq_len", "512"])
    several = {"parallelism.tensor_parallel_degree": 2} if kind.startswith("tensor") else {}
    if kind.endswith("ed"):
        several |= {"activation_checkpoint.mode": "lighthouse"}
    if kind.endswith("compiled"):
        several |= {"compile.enable": True}
    Run(tmp_path, SETTINGS | several | {"model.hf_folder": qwen}, processes=2).succeed()
    start, one, two = (
        load_trained_model(path).model.state_dict()
        for path in (on_one / "dump/checkpoint/step-0", on_one / "dump", tmp_path / "dump")
    )
    assert start.keys() == one.keys() == two.keys()
    # The norms' weight is one for all heads, and has gradients from both ranks' heads.
    assert (one[NORM] - start[NORM]).abs().max() > 1e-4
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=2e-5)


def test_initial_weights(qwen: Path) -> None:
    model = build(args=model_arguments(configured(qwen)))
    assert torch.equal(model.state_dict()[NORM], torch.ones(16))


@pytest.mark.parametrize("attention", ["lighthouse", "dense"])
def test_rows_have_the_precision_of_autocast(qwen: Path, attention: str) -> None:
    # One process trains under autocast, with norms whose weights are in float32.
    model = build(args=model_arguments(configured(qwen)))
    model.use_attention(attention)
    inner, seen = model.layers["1"].attention.inner_attention, []
    inner.register_forward_pre_hook(lambda module, rows: seen.extend(each.dtype for each in rows))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randint(320, (1, 512))).float().logsumexp(-1).sum().backward()
    assert seen == [torch.bfloat16] * 3


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_weights_come_from_the_folder_without_an_import(
    qwen: Path, tmp_path: Path, tensor_parallel: int
) -> None:
    settings = {
        "model.hf_folder": qwen, "checkpoint.initial_load_path": qwen, "training.steps": 1,
        "checkpoint.initial_load_in_hf": True, "optimizer.lr": 0.0,
        "parallelism.tensor_parallel_degree": tensor_parallel,
    }  # fmt: skip
    # Both meshes have two ranks: sharded by FSDP, or divided.
    Run(tmp_path, SETTINGS | settings, processes=2).succeed()
    step = import_model(qwen, tmp_path / "imported")
    found, expected = (
        load_trained_model(path).model.state_dict() for path in (tmp_path / "dump", step)
    )
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("attention", ["lighthouse", "dense"])
@pytest.mark.parametrize("keep_products", [(), ("wq", "wk", "wv", "w1")])
def test_checkpointing_keeps_what_it_says(
    qwen: Path, attention: str, keep_products: tuple[str, ...]
) -> None:
    args = model_arguments(configured(qwen))
    section = ActivationCheckpoint(mode="lighthouse", keep_products=list(keep_products))
    tokens, gradients, products = torch.randint(320, (1, 512)), [], []
    for checkpointed in (False, True):
        model = build(args=args)
        model.use_attention(attention)
        if checkpointed:
            apply_lighthouse_checkpoint(model, section)
        with Products() as seen:
            model(tokens).logsumexp(-1).sum().backward()
        gradients.append([each.grad for each in model.parameters()])
        products.append(seen.count)
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    # Two of three layers are sparse. Their norms need the products of wq and wk, not that of wv.
    kept = 3 * len(keep_products) - (2 if attention == "lighthouse" and keep_products else 0)
    assert products[1] - products[0] == 3 * 6 - kept
    # The dry run counts these products too: 64, 32, 32 and 100 columns of two bytes.
    bare = ActivationCheckpoint(mode="lighthouse", keep_products=[])
    more, less = (activation_bytes(args, 512, 512, each, attention) for each in (section, bare))
    unneeded = 2 * 32 if attention == "lighthouse" else 0
    assert more - less == (512 * 2 * (3 * 228 - unneeded) if keep_products else 0)


def test_dry_run_counts_what_is_there(qwen: Path) -> None:
    config = configured(qwen, training__global_batch_size=2)
    whole = sum(each.numel() for each in loaded(qwen).parameters())
    assert f"{qwen}, {whole:,} parameters" in dry_run(config, 1)
    args = model_arguments_of(config)
    flops = 6 * whole + 3 * 12 * 4 * 16 * (512 + 1) / 2
    assert args.get_nparams_and_flops(LighthouseTransformer(args), 512)[1] == pytest.approx(flops)


def test_norms_are_no_scores(qwen: Path, tmp_path: Path) -> None:
    message = "lighthouse.scorer = 'norm' ranks positions .* 'qwen3' .*pass --lighthouse.scorer gla"

    def checked(**changed: Any) -> None:
        settings = {"lighthouse__scorer": "norm", "job__dump_folder": tmp_path / "dump"} | changed
        check_config(configured(qwen, **settings), flavors)

    with pytest.raises(ValueError, match=message):
        checked()
    stages = {"lighthouse__schedule": ["lighthouse until=2", "dense"]}
    with pytest.raises(ValueError, match=f"stage 'lighthouse until=2': {message}"):
        checked(**stages, lighthouse__dense_from_step=10000)
    # A model that selects nothing scores nothing.
    checked(lighthouse__stage="dense")
    checked(lighthouse__dense_layers=[0, 1, 2])
    checked(lighthouse__attention="window", lighthouse__window=64)
    for scorer in ("gla", "dilated", "random"):
        checked(lighthouse__scorer=scorer)
    args = model_arguments(configured(qwen, lighthouse__scorer="norm", lighthouse__stage="dense"))
    model = LighthouseTransformer(args)
    with pytest.raises(ValueError, match=message):
        model.use_attention("lighthouse")
    model.use_method(dataclasses.replace(args, lighthouse=args.lighthouse, window=64))
    model.use_attention("lighthouse")


def test_norms_are_nearly_equal(qwen: Path) -> None:
    # The reason for which the scorer is refused, beside a Llama whose norms differ.
    spread = []
    for args in (model_arguments(configured(qwen)), model_arguments(configured(""))):
        model = build(args=args)
        inner = model.layers["1"].attention.inner_attention
        rows: list[torch.Tensor] = []
        inner.register_forward_pre_hook(lambda module, given, rows=rows: rows.extend(given[:2]))
        with torch.no_grad():
            model(torch.randint(256, (1, 512)))
        norms = [each.norm(dim=-1) for each in rows]
        spread.append(max((each.std(dim=2) / each.mean(dim=2)).max().item() for each in norms))
    assert spread[0] < 1e-3 < 0.05 < spread[1]
