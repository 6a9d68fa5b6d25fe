"""The dry run, and the Slurm script that launches a run."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torchtitan.models.llama3 import Transformer

from torchtitan.models.llama3_lighthouse.description import ending
from torchtitan.models.llama3_lighthouse.dry_run import dry_run
from torchtitan.models.llama3_lighthouse.errors import UserValueError
from torchtitan.models.llama3_lighthouse.job_config import JobConfig, LighthouseConfigManager
from torchtitan.models.llama3_lighthouse.model.flavors import flavors

ROOT = Path(__file__).parents[2]


def parse(tmp_path: Path, name: str, *line: str) -> JobConfig:
    """The configuration of a file in train_configs/, with overrides."""
    line = ["--job.config_file", str(ROOT / f"train_configs/{name}.toml"), *line]
    return LighthouseConfigManager().parse_args([*line, "--job.dump_folder", str(tmp_path)])


def test_dry_run_of_the_papers_longest(tmp_path: Path) -> None:
    text = dry_run(parse(tmp_path, "paper_530m_1m_cp8"), 32)
    assert "32 processes = 4 FSDP x 8 context parallel\n" in text
    assert "4 sequences of 1,048,576 tokens, 4,194,304 tokens a step in 1 pass;" in text
    with torch.device("meta"):
        total = sum(p.numel() for p in Transformer(flavors["530M"]).parameters())
    # The size of every parameter is a multiple of 32.
    assert f"131,072 tokens a pass in 2 chunks, {total // 32:,} parameters" in text
    assert "S = 65,536 of 1,048,576 positions, 8,192 on each rank; 32 strata, 2 in each" in text
    assert "127,997 of 128,256 vocabulary rows, 49.4% of the parameters, never see a token" in text
    assert "16,000: 1 to 10,000 in the Lighthouse stage, then dense; 67,108,864,000 tokens" in text
    assert "each rank, estimated: 24.0 GiB Lighthouse, 28.9 GiB dense; 0.25 for weights" in text
    # The test of the ring at this size says where these numbers come from.
    assert "sends 939,524,096 bytes of keys, values and gradients, and 24,576 bytes of" in text


def test_dry_run_says_what_ranks_send_only_under_context_parallelism(tmp_path: Path) -> None:
    """Tensor parallelism halves a rank's heads, and so the bytes that it sends."""
    sent = []
    for tensor in (1, 2):
        line = ["--parallelism.context_parallel_degree", "2",
                "--parallelism.tensor_parallel_degree", f"{tensor}"]  # fmt: skip
        text = dry_run(parse(tmp_path, "debug_cpu", *line), 4)
        (found,) = re.findall(r"sends ([\d,]+) bytes of keys.*, and ([\d,]+) bytes of seam", text)
        sent.append([int(number.replace(",", "")) for number in found])
    assert sent[0] == [2 * number for number in sent[1]] and min(sent[1]) > 0
    assert "bytes" not in dry_run(parse(tmp_path, "debug_cpu"), 2)


def test_dry_run_says_what_ranks_send_in_each_stage(tmp_path: Path) -> None:
    line = ["--parallelism.context_parallel_degree", "2", "--lighthouse.schedule"]

    def rings(*stages: str) -> list[str]:
        text = dry_run(parse(tmp_path, "debug_schedule_cpu", *line, ",".join(stages)), 2)
        return re.findall(r"^ring +(.+)$", text, re.MULTILINE)

    alone = "each rank sends 2,359,296 bytes of keys, values and gradients, and 8,192 bytes of seam"
    (found,) = rings("dense until=9 seq_len=4096", "lighthouse until=18", "dense")
    assert found.startswith(alone)
    # S is half as long.
    half = "lighthouse until=9 seq_len=4096 top_k=64 picks_per_stratum=16"
    first, second = rings(half, "lighthouse until=18", "dense until=27", "lighthouse last")
    assert first.startswith("in stage 1, each rank sends 1,179,648 bytes of keys,")
    assert second.startswith(f"in stage 2 and stage 4, {alone}")
    assert not rings("dense until=9 seq_len=4096", "dense")


def test_dry_run_says_what_share_of_the_run_a_stage_takes(tmp_path: Path) -> None:
    def shares(*stages: str) -> list[tuple[int, int]]:
        line = ["--lighthouse.schedule", ",".join(stages)]
        text = dry_run(parse(tmp_path, "short_to_lighthouse_98k", *line), 1)
        found = re.findall(r"^stage .* (\d+)% of the run's FLOPs and about (\d+)% of", text, re.M)
        assert len(found) == len(stages)
        return [(int(flops), int(time)) for flops, time in found]

    short = "seq_len=8192 top_k=128"
    (flops, time), rest = shares(f"lighthouse until=8000 {short}", "dense seq_len=8192")
    assert rest == (100 - flops, 100 - time)
    # The passes over memory, which Lighthouse has more of, take time and no FLOPs. The guide has
    # both shares over those of the dense stage, 0.56 and 0.67.
    assert (flops, time) == (36, 40)
    assert shares("dense until=4000", "dense") == [(25, 25), (75, 75)]


def test_the_guide_quotes_a_dry_run(tmp_path: Path) -> None:
    guide = (ROOT / "docs/guides/training.md").read_text()
    (schedule,) = re.findall(r'--dry-run \\\n +--lighthouse.schedule "(.+)"', guide)
    line = ["--lighthouse.schedule", schedule]
    text = dry_run(parse(tmp_path, "short_to_lighthouse_98k", *line), 1)
    quoted = re.findall(r"^stage .+$", guide, re.MULTILINE)
    assert len(quoted) == 3 and quoted == re.findall(r"^stage .+$", text, re.MULTILINE)


def test_dry_run_of_a_pipeline(tmp_path: Path) -> None:
    line = ["--parallelism.pipeline_parallel_degree", "2", "--training.local_batch_size", "2"]
    text = dry_run(parse(tmp_path, "debug_cpu", *line), 4)
    assert "4 processes = 2 FSDP x 2 pipeline parallel" in text
    # The first pipeline stage has the embedding and half of the layers, in two shards.
    whole, mine = (
        int(number.replace(",", "")) for number in re.findall(r"([\d,]+) parameters\b", text)
    )
    assert 0.2 * whole < mine < 0.3 * whole


def test_dry_run_says_what_offloading_needs(tmp_path: Path) -> None:
    line = ["--activation_checkpoint.offload_inputs"]
    text = dry_run(parse(tmp_path, "paper_530m_98k", *line), 1)
    # 30 inputs of 192 MiB, rounded up to 256.
    assert "needs GPUs (CUDA); a rank pins 7.50 GiB on its host" in text


def test_dry_run_of_one_process(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config, environment = parse(folder, "debug_cpu"), dict(os.environ)
    assert "\nmesh          1 process\n" in dry_run(config, 1)
    assert not folder.exists()
    assert dict(os.environ) == environment


def test_dry_run_names_the_checkpoint_that_a_run_goes_on_from(tmp_path: Path) -> None:
    """Its steps may have been dense, although the lines on all steps say otherwise."""

    def line(*overrides: str) -> list[str]:
        text = dry_run(parse(tmp_path, "debug_cpu", *overrides), 1)
        return re.findall(r"^resume +(.+)$", text, re.MULTILINE)

    def save(step: int) -> None:
        (folder / f"step-{step}").mkdir(parents=True)
        (folder / f"step-{step}/.metadata").touch()

    folder = tmp_path / "checkpoint"
    assert not line()
    other = ["--checkpoint.initial_load_path", str(tmp_path)]
    assert line(*other) == [f"starts from the weights of {tmp_path}"]
    whole = [*other, "--checkpoint.no-initial_load_model_only"]
    assert line(*whole) == [f"starts from {tmp_path}"]
    assert not line(*other, "--checkpoint.create_seed_checkpoint")
    # A seed checkpoint was not trained.
    save(0)
    assert not line()
    save(2)
    save(4)
    words = "stay as they were trained, also where stages named here are others"
    assert line() == line(*other) == [f"goes on from {folder}/step-4: steps 1 to 4 {words}"]
    # The run would overwrite step 4, and is refused.
    refused = ["--checkpoint.load_step", "2"]
    assert not line(*refused)
    warning = f"\nwarning       checkpoint.load_step = 2 but {folder} goes up to step 4, which"
    assert warning in dry_run(parse(tmp_path, "debug_cpu", *refused), 1)
    assert line("--checkpoint.load_step", "2", "--checkpoint.load_only") == [
        f"goes on from {folder}/step-2: steps 1 to 2 {words}"
    ]
    assert not line("--checkpoint.no-enable")


def test_dry_run_says_what_text_is_read_and_whether_it_is_there(tmp_path: Path) -> None:
    def lines(*overrides: str) -> list[str]:
        text = dry_run(parse(tmp_path, "debug_cpu", *overrides), 1)
        return re.findall(r"^(?:text|warning) +(.+)$", text, re.MULTILINE)

    folder = tmp_path / "text"
    local = ["--training.dataset", "c4_local", "--training.dataset_path", str(folder)]
    held_out = ["--validation.enable", "--validation.seq_len", "8192", "--validation.dataset"]
    assert lines() == ["python_stdlib"]
    assert lines(*held_out, "c4")[0] == "python_stdlib; held out: c4"
    read, warning = lines(*local)
    assert read == f"c4_local from {folder}"
    assert warning.startswith(f"training.dataset_path = '{folder}' is not a folder; pass --")
    folder.mkdir()
    (folder / "a.txt").touch()
    assert lines(*local) == [f"c4_local from {folder}"]
    _, warning = lines(*local, *held_out, "c4_local", "--validation.dataset_path", str(folder))
    assert warning.startswith(f"validation.dataset_path = '{folder}' has no validation split")


def test_ending_says_what_comes_next(tmp_path: Path) -> None:
    config = parse(tmp_path, "debug_cpu")
    first, second = ending(config, 45, 15, "dense", 192.3)
    assert (
        first
        == f"Finished step 45 of 45: 15 steps in 3:12; checkpoint {tmp_path}/checkpoint/step-45"
    )
    assert re.fullmatch(rf"Next: \S*lighthouse export-hf {tmp_path} --output FOLDER", second)
    assert "--lighthouse.stage dense" in ending(config, 45, 1, "lighthouse", 1.0)[1]
    # Both together are refused.
    scheduled = parse(tmp_path, "debug_schedule_cpu", "--lighthouse.schedule", "lighthouse last")
    following = ending(scheduled, 45, 1, "lighthouse", 1.0)[1]
    assert "with a dense stage at the end of lighthouse.schedule and a larger" in following
    assert "--lighthouse.stage" not in following
    (already,) = ending(config, 45, 0, "", 1.0)
    assert already.startswith("Already at step 45 of 45: nothing to train; pass --training.steps")
    # The text ran out, so the last save is of an earlier step.
    assert ending(config, 44, 3, "dense", 1.0) == ["Finished step 44 of 45: 3 steps in 0:01"]


@pytest.mark.parametrize(
    ("processes", "line", "message"),
    [
        (
            12,
            [],
            r"needs a multiple of 8 processes \(context_parallel_degree 8\), and this run has 12",
        ),
        (32, ["--lighthouse.top_k", "1024"], "must divide the strata"),
        (32, ["--training.global_batch_size", "6"], "training.global_batch_size = 6 must be a"),
        (32, ["--lighthouse.data_streams", "6"], "lighthouse.data_streams = 6 must be"),
    ],
)
def test_dry_run_refuses_what_cannot_run(tmp_path: Path, processes, line, message) -> None:
    with pytest.raises(ValueError, match=message):
        dry_run(parse(tmp_path, "paper_530m_1m_cp8", *line), processes)


def test_dry_run_passes_on_what_torchtitan_refuses(tmp_path: Path) -> None:
    line = ["--parallelism.pipeline_parallel_degree", "2", "--training.local_batch_size", "2"]
    line += ["--parallelism.pipeline_parallel_layers_per_stage", "1"]
    with pytest.raises(UserValueError, match="torchtitan refuses the configuration: "):
        dry_run(parse(tmp_path, "debug_cpu", *line), 2)


def test_slurm_script_launches_every_node(tmp_path: Path) -> None:
    """Stand-ins for Slurm's commands launch on two nodes; a later launch fails and is requeued."""
    shutil.copy(ROOT / "scripts/slurm/train.sbatch", tmp_path)
    scripts = {
        "scontrol": '[[ "$1" == requeue ]] && echo "requeued $2" || printf "node1\\nnode2\\n"',
        "srun": 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || exit; done',
        "run_train.sh": 'echo "$NODE_RANK/$NNODES $NGPU $MASTER_ADDR $CONFIG_FILE $*"; exit $FAIL',
    }
    for name, body in scripts.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "7",
        "CONFIG_FILE": "a.toml", "FAIL": "0",
    }  # fmt: skip

    def submit(**changed: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "train.sbatch", "--training.steps", "5"]
        return subprocess.run(
            command, cwd=tmp_path, env={**environment, **changed}, text=True, capture_output=True
        )

    done = submit()
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{node}/2 8 node1 a.toml --training.steps 5" for node in (0, 1)
    ]
    failed = submit(FAIL="1")
    assert failed.returncode != 0 and "requeued 7" in failed.stdout
    assert "requeued" not in submit(FAIL="1", SLURM_RESTART_COUNT="3").stdout
    # A run that has saved goes on as often as it is stopped.
    saved = submit(FAIL="75", SLURM_RESTART_COUNT="3")
    assert saved.returncode == 75 and "requeued 7" in saved.stdout
