"""Export to Hugging Face's format, the model that transformers loads, and import."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import DEBUG, SMALL, TRAINED, Run, arguments
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lighthouse_commands.main import main
from torchtitan.models.llama3_lighthouse.checkpoints.record import (
    CheckpointRecord,
    read_record,
    write_record,
)
from torchtitan.models.llama3_lighthouse.data.tokenizer import BOS, BOS_ID, EOS, EOS_ID, PAD
from torchtitan.models.llama3_lighthouse.evaluation.inference import (
    TrainedModel,
    load_trained_model,
    model_arguments,
    parse_over,
)
from torchtitan.models.llama3_lighthouse.hugging_face.export import export_checkpoint
from torchtitan.models.llama3_lighthouse.hugging_face.format import architecture
from torchtitan.models.llama3_lighthouse.hugging_face.import_model import import_model
from torchtitan.models.llama3_lighthouse.model.flavors import flavors
from torchtitan.models.llama3_lighthouse.model.model import LighthouseTransformer

LENGTH = 65536
# Multi-head and grouped-query attention.
FLAVORS = {"15M": (0, 7), "debugmodel": (0, 5)}
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def write_checkpoint(folder: Path, last_lighthouse_step: int | None = 2, **changed) -> Path:
    """Step 3 of a model with random weights: norms away from 1, and attention far from uniform."""
    flags = (
        SMALL | {"training.seq_len": LENGTH} | {k.replace("__", "."): changed[k] for k in changed}
    )
    config = parse_over(None, arguments(flags))
    torch.manual_seed(0)
    with torch.no_grad():
        model = LighthouseTransformer(model_arguments(config))
        model.init_weights()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            if "wq" in name or "wk" in name:
                parameter.mul_(5)
    path = folder / "step-3"
    write_record(path, CheckpointRecord(3, last_lighthouse_step, config.to_dict()))
    dcp.save(model.state_dict(), checkpoint_id=str(path), no_dist=True)
    return path


class Exported(NamedTuple):
    """A checkpoint at ``path``, its export in ``folder``, and the models that they load as."""

    path: Path
    folder: Path
    ours: TrainedModel
    theirs: LlamaForCausalLM


@pytest.fixture(scope="module", params=FLAVORS)
def exported(request, tmp_path_factory) -> Exported:
    folder = tmp_path_factory.mktemp(request.param)
    path = write_checkpoint(
        folder, model__flavor=request.param, lighthouse__dense_layers=FLAVORS[request.param]
    )
    export_checkpoint(path, folder / "exported")
    return Exported(path, folder / "exported", load_trained_model(path), load(folder / "exported"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def load(folder: Path, **options) -> LlamaForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval().requires_grad_(False)
    assert isinstance(model, LlamaForCausalLM)
    return model


def random_tokens(length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, EOS_ID, (1, length), generator=torch.Generator().manual_seed(seed))


def logits_at(model: LlamaForCausalLM, tokens: torch.Tensor, positions: torch.Tensor):
    # With a mask given, a gap between positions is not taken for the end of a sequence.
    return model(tokens, position_ids=positions, attention_mask=torch.ones_like(tokens)).logits


def test_logits(exported: Exported) -> None:
    ours, theirs = exported.ours.model, exported.theirs
    assert theirs.dtype == torch.float32
    tokens = random_tokens(1024, seed=1)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


def test_logits_at_far_positions(exported: Exported) -> None:
    ours, theirs = exported.ours.model, exported.theirs
    tokens = random_tokens(512, seed=2)
    positions = torch.randint(0, LENGTH, (1, 512), generator=torch.Generator().manual_seed(3))
    positions = positions.sort().values
    expected = ours(tokens, positions=positions)
    actual = logits_at(theirs, tokens, positions)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)

    # The scaling of RoPE matters: without it, logits differ.
    config = LlamaConfig.from_pretrained(exported.folder)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
    unscaled = logits_at(load(exported.folder, config=config), tokens, positions)
    assert (unscaled - expected).abs().max() > 0.1


@pytest.mark.slow
def test_generation_is_greedy(exported: Exported) -> None:
    trained, theirs = exported.ours, exported.theirs
    tokenizer = AutoTokenizer.from_pretrained(exported.folder)
    prompt = tokenizer("def attention(", return_tensors="pt")
    tokens = prompt["input_ids"]
    assert tokens[0].tolist() == trained.tokenizer.encode("def attention(", add_bos=True)
    for _ in range(30):
        following = trained.model(tokens)[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, following], dim=1)
        if following.item() == EOS_ID:
            break
    generated = theirs.generate(**prompt, max_new_tokens=30, do_sample=False)
    assert generated.tolist() == tokens.tolist()


def test_configuration(exported: Exported) -> None:
    folder, model = exported.folder, exported.ours.model
    config = json.loads((folder / "config.json").read_text())
    args = model.model_args
    assert config["intermediate_size"] == model.layers["0"].feed_forward.w1.weight.shape[0]
    assert config["num_attention_heads"] == args.n_heads
    assert config["num_key_value_heads"] == (args.n_kv_heads or args.n_heads)
    assert config["max_position_embeddings"] == LENGTH
    assert config["vocab_size"] == 320
    assert config["tie_word_embeddings"] is False
    assert LlamaConfig.from_pretrained(folder).rope_parameters == ROPE
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1
    generation = json.loads((folder / "generation_config.json").read_text())
    ids = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": 258}
    assert generation == ids
    assert {name: config[name] for name in ids} == ids


def test_8b_is_llama_3_1() -> None:
    """The published model's configuration, which any 8B checkpoint must be read with."""
    known = architecture(flavors["8B"])
    published = dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=500000.0,
        rope_scaling={key: value for key, value in ROPE.items() if key != "rope_theta"},
    )  # fmt: skip
    assert {key: known[key] for key in published} == published


def test_round_trip_is_exact(exported: Exported, tmp_path: Path) -> None:
    before, folder = exported.ours, exported.folder
    step = import_model(folder, tmp_path / "back")
    assert step == tmp_path / "back/checkpoint/step-0"
    after = load_trained_model(tmp_path / "back", max_seq_len=8)
    assert after.config.model.flavor == before.config.model.flavor
    assert after.config.training.seq_len == LENGTH
    assert after.config.lighthouse.tokenizer == "byte"
    assert read_record(step).last_lighthouse_step == 0
    expected = before.model.state_dict()
    actual = after.model.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    # An import had no Lighthouse step, so it can be exported.
    export_checkpoint(step, tmp_path / "again")
    first, again = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_shards_and_bfloat16(checkpoint: Path, tmp_path: Path) -> None:
    lines = []
    export_checkpoint(checkpoint, tmp_path / "whole", report=lines.append)
    assert len(lines) == 1
    export_checkpoint(
        checkpoint, tmp_path / "shards", None, torch.bfloat16, False, 2e6, lines.append
    )
    index = json.loads((tmp_path / "shards/model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) == len(lines) - 1 > 3
    for file in files:
        held = load_file(tmp_path / "shards" / file)
        assert set(held) == {n for n, where in index["weight_map"].items() if where == file}
        assert sum(tensor.nbytes for tensor in held.values()) <= 2e6
    half = load(tmp_path / "shards")
    assert half.dtype == torch.bfloat16
    halved = half.state_dict()
    for name, tensor in load(tmp_path / "whole").state_dict().items():
        assert torch.equal(halved[name], tensor.bfloat16()), name
    import_model(tmp_path / "shards", tmp_path / "back", dtype=torch.float32)
    back = load_trained_model(tmp_path / "back", max_seq_len=8).model.state_dict()
    for name, tensor in load_trained_model(checkpoint, max_seq_len=8).model.state_dict().items():
        assert torch.equal(back[name], tensor.bfloat16().float()), name


def test_stored_dtype_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    state = load_trained_model(checkpoint, dtype=torch.bfloat16, max_seq_len=8).model.state_dict()
    write_record(tmp_path / "step-3", read_record(checkpoint))
    dcp.save(state, checkpoint_id=str(tmp_path / "step-3"), no_dist=True)
    export_checkpoint(tmp_path, tmp_path / "exported")
    weights = load_file(tmp_path / "exported/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert torch.equal(weights["lm_head.weight"], state["output.weight"])


@pytest.fixture(scope="module")
def byte_folder(checkpoint: Path) -> Path:
    export_checkpoint(checkpoint, checkpoint.parent / "bytes")
    return checkpoint.parent / "bytes"


TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.lists(st.sampled_from([BOS, EOS, PAD, " ", "\n\n", "\x00", "é", "don't", "😀", "\ufffd"]))
    .map("".join),
)  # fmt: skip


def test_byte_tokenizer(byte_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(byte_folder)
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id] == [BOS_ID, EOS_ID]

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(TEXTS)
    def ids_are_bytes(text: str) -> None:
        assert tokenizer.encode(text) == [BOS_ID, *text.encode()]
        assert tokenizer.decode(list(text.encode()), skip_special_tokens=True) == text

    ids_are_bytes()


@pytest.mark.parametrize("with_configuration", [True, False])
def test_hugging_face_tokenizer(tmp_path: Path, with_configuration: bool) -> None:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    assets = tmp_path / "assets"
    assets.mkdir()
    tokenizer.save(str(assets / "tokenizer.json"))
    if with_configuration:
        names = {"bos_token": "<s>", "eos_token": "</s>"}
        content = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
        (assets / "tokenizer_config.json").write_text(json.dumps(content))
    flags = {"lighthouse__tokenizer": "hf", "model__hf_assets_path": assets}
    path = write_checkpoint(tmp_path, training__seq_len=512, **flags)
    export_checkpoint(path, tmp_path / "exported")

    ours = load_trained_model(path).tokenizer
    theirs = AutoTokenizer.from_pretrained(tmp_path / "exported")
    for text in ("def f(x): return 'é'", " \n\t<s>a</s>  b", Path(__file__).read_text()):
        assert theirs.encode(text) == ours.encode(text)
    config = json.loads((tmp_path / "exported/config.json").read_text())
    expected = (0, 1) if with_configuration else (None, None)
    assert (config["bos_token_id"], config["eos_token_id"]) == expected
    import_model(tmp_path / "exported", tmp_path / "back")
    # The run has the tokenizer of its own.
    shutil.rmtree(tmp_path / "exported")
    back = load_trained_model(tmp_path / "back")
    assert back.config.lighthouse.tokenizer == "hf"
    assert back.tokenizer.encode("def f(x)") == ours.encode("def f(x)")


def export_fails(message: str, *arguments, **options) -> None:
    with pytest.raises(ValueError, match=message):
        export_checkpoint(*arguments, **options)


def test_export_refuses(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "exported"
    for last, message in ((3, "train on with --lighthouse.stage dense"), (None, "does not say")):
        path = write_checkpoint(tmp_path / str(last), last, training__seq_len=512)
        export_fails(f"{message}.*--allow-lighthouse", path, output)
        assert not output.exists()
        export_checkpoint(path, tmp_path / f"allowed-{last}", allow_lighthouse=True)
        assert (tmp_path / f"allowed-{last}/config.json").is_file()
    (path / "lighthouse.json").unlink()
    export_fails("does not say.*--allow-lighthouse", path, output)
    export_fails("--job.config_file FILE", path, output, allow_lighthouse=True)
    flags = arguments(SMALL)
    export_checkpoint(path, output, flags, allow_lighthouse=True)

    before = (output / "config.json").read_text()
    export_fails("is not overwritten; name a new folder", checkpoint, output)
    assert (output / "config.json").read_text() == before
    export_fails("no complete checkpoint", tmp_path / "nothing", tmp_path / "other")
    flavor = ["--model.flavor", "15M"]
    export_fails("of another model.*set model.flavor", checkpoint, tmp_path / "other", flavor)
    export_fails("--max-shard-gb 0 must be", checkpoint, tmp_path / "other", max_shard_size=0)
    # Nothing half-written stays, not even in an empty folder of the user's.
    (tmp_path / "other").mkdir()
    export_fails("of another model", checkpoint, tmp_path / "other", flavor)
    assert not list((tmp_path / "other").iterdir())
    assert not list(tmp_path.glob(".other*"))
    export_checkpoint(checkpoint, tmp_path / "other")


def stranger(folder: Path, **changed) -> Path:
    """A Llama that transformers made, with the sizes of 'debugmodel' unless ``changed``."""
    sizes = dict(
        vocab_size=320, hidden_size=256, intermediate_size=704, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, rope_parameters=ROPE,
        max_position_embeddings=16384, bos_token_id=BOS_ID, eos_token_id=EOS_ID,
    )  # fmt: skip
    torch.manual_seed(4)
    model = LlamaForCausalLM(LlamaConfig(**(sizes | changed)))
    for name, parameter in model.named_parameters():
        parameter.data.uniform_(0.5, 1.5) if "norm" in name else parameter.data.mul_(4)
    model.save_pretrained(folder, max_shard_size="5MB")
    return folder


def test_import_of_a_stranger(tmp_path: Path) -> None:
    folder = stranger(tmp_path / "stranger")
    assert len(list(folder.glob("*.safetensors"))) > 2
    import_model(folder, tmp_path / "run")
    trained = load_trained_model(tmp_path / "run")
    assert trained.config.training.seq_len == 16384
    tokens = random_tokens(700, seed=5)
    expected = load(folder)(tokens).logits
    torch.testing.assert_close(trained.model(tokens), expected, rtol=0, atol=1e-4)

    file = Path(__file__).parents[3] / "train_configs/debug_cpu.toml"
    step = import_model(folder, tmp_path / "configured", ["--job.config_file", str(file)])
    assert read_record(step).config["lighthouse"]["dense_from_step"] == 30


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"intermediate_size": 640}, "intermediate_size is 640, not 704"),
        ({"num_attention_heads": 8, "head_dim": 32}, "num_attention_heads is 8, not 4"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2, not 6"),
        ({"rope_parameters": {**ROPE, "factor": 32.0}}, "rope_scaling is .*32.0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_scaling is None"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06, not 1e-05"),
    ],
)
def test_import_refuses_another_model_than_the_file_names(
    tmp_path: Path, changed: dict, message: str
) -> None:
    folder = stranger(tmp_path / "stranger", **changed)
    file = str(Path(__file__).parents[3] / "train_configs/debug_cpu.toml")
    given = ["--job.config_file", file]
    with pytest.raises(ValueError, match=f"'debugmodel' but .*another model: .*{message}"):
        import_model(folder, tmp_path / "run", given)
    assert not (tmp_path / "run").exists()
    length = ["--lighthouse.dense_layers", "0", "--model.hf_folder", str(folder)]
    import_model(folder, tmp_path / "run", given + length)


def test_import_refuses_broken_folders(byte_folder: Path, tmp_path: Path) -> None:
    def fails(message: str, folder: Path, overrides: list[str] | None = None) -> None:
        with pytest.raises(ValueError, match=message):
            import_model(folder, tmp_path / "run", overrides)

    fails("holds no config.json", tmp_path)
    folder = stranger(tmp_path / "stranger")
    fails("'15M' but .* is another model: hidden_size", folder, ["--model.flavor", "15M"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen2"}))
    fails("model_type = 'qwen2' cannot be trained here; pass a model whose type", folder)
    # A config.json that says other sizes than the weights have.
    (folder / "config.json").write_text((byte_folder / "config.json").read_text())
    stranger(tmp_path / "wide", intermediate_size=640)
    (tmp_path / "wide/config.json").write_text((byte_folder / "config.json").read_text())
    fails(r"has shape \(256, 640\), not \(256, 704\)", tmp_path / "wide")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"]["lm_head.weight"]
    lost = sorted(set(index["weight_map"].values()))[0]
    (folder / lost).rename(folder / "elsewhere")
    fails(f"holds no {lost}", folder)
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != lost}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    fails("lacks [0-9]+ tensors of a model of type 'llama'", folder)


def test_commands(checkpoint: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def call(command: str, source: Path, output: Path, *line: str) -> None:
        main([command, str(source), "--output", str(output), *line])

    flags = ["--dtype", "bfloat16", "--training.seq_len", "4096", "--max-shard-gb", "0.003"]
    call("export-hf", checkpoint, tmp_path / "exported", *flags)
    assert "model-00001-of-00004.safetensors (1 of 4): " in capsys.readouterr().out
    config = json.loads((tmp_path / "exported/config.json").read_text())
    assert (config["torch_dtype"], config["max_position_embeddings"]) == ("bfloat16", 4096)
    # A scaling has a length of its own, and transformers may take its factor from it.
    call("export-hf", checkpoint, tmp_path / "scaled", "--training.seq_len", "4096",
         "--model.rope_scaling", "yarn factor=3 original_max_position_embeddings=2048")  # fmt: skip
    scaled = json.loads((tmp_path / "scaled/config.json").read_text())
    assert scaled["max_position_embeddings"] == 3 * 2048
    call("import-hf", tmp_path / "exported", tmp_path / "run", "--dtype", "float32")
    assert capsys.readouterr().out.endswith(f"Wrote {tmp_path}/run/checkpoint/step-0\n")
    weights = load_trained_model(tmp_path / "run", dtype=torch.bfloat16).model.output.weight
    expected = load_trained_model(checkpoint, dtype=torch.bfloat16).model.output.weight
    assert torch.equal(weights, expected)

    with pytest.raises(SystemExit, match="^Error: .*is not overwritten"):
        call("export-hf", checkpoint, tmp_path / "exported")
    with pytest.raises(SystemExit, match="^Error: .*holds no config.json"):
        call("import-hf", checkpoint, tmp_path / "other")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(SystemExit, match=r"safetensors.* -e '\.\[export\]'"):
        call("export-hf", checkpoint, tmp_path / "other")


def run_command(name: str, source: Path, output: Path, *line: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lighthouse_commands.main", name, str(source)]
    command += ["--output", str(output), *line]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of a Lighthouse step and a dense one."""
    folder = tmp_path_factory.mktemp("run")
    steps = {**DEBUG, "lighthouse.dense_from_step": 1, "training.steps": 2}
    steps["checkpoint.interval"] = 1
    Run(folder, steps).succeed()
    return folder / "dump"


@pytest.mark.slow
def test_export_of_a_run(run: Path, tmp_path: Path) -> None:
    refused = run_command("export-hf", run / "checkpoint/step-1", tmp_path / "exported")
    assert refused.returncode == 1
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("Error: ")]
    assert "--allow-lighthouse" in line
    done = run_command("export-hf", run, tmp_path / "exported", "--training.seq_len", "1024")
    assert done.returncode == 0, done.stderr
    assert "model.safetensors (1 of 1)" in done.stdout
    assert load(tmp_path / "exported").config.max_position_embeddings == 1024
    tokens = random_tokens(TRAINED["training.seq_len"], seed=6)
    expected = load_trained_model(run / "checkpoint/step-2").model(tokens)
    actual = load(tmp_path / "exported")(tokens).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_training_from_an_import(run: Path, tmp_path: Path) -> None:
    """A run in the import's folder and a run that is pointed to it take the same steps."""
    run_command("export-hf", run, tmp_path / "exported")
    done = run_command("import-hf", tmp_path / "exported", tmp_path / "there/dump")
    assert done.returncode == 0, done.stderr
    step = tmp_path / "there/dump/checkpoint/step-0"
    assert str(step) in done.stdout
    steps = {**DEBUG, "training.steps": 2, "lighthouse.dense_from_step": 1}
    there = Run(tmp_path / "there", steps).succeed()
    (tmp_path / "elsewhere").mkdir()
    elsewhere = Run(tmp_path / "elsewhere", {**steps, "checkpoint.initial_load_path": step})
    elsewhere.succeed()
    for first, second in zip(there.steps().values(), elsewhere.steps().values(), strict=True):
        assert first["loss"] == second["loss"]
    # They differ from the steps of a model from scratch, which begins at chance.
    scratch = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert there.steps()[1]["loss"] != scratch["loss_metrics/global_avg_loss"]
    record = read_record(tmp_path / "there/dump/checkpoint/step-2")
    assert (record.last_lighthouse_step, record.dense_steps) == (1, 1)
