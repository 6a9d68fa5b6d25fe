"""Models of transformers train under Lighthouse: Trainer, FSDP, recomputation, compilation."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from launch import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import Dataset
from transformers import LlamaConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers_models import METHOD, SIZE, WITH_WINDOW, build, tokens

import lighthouse.attention
import lighthouse.transformers as module
from lighthouse import LighthouseConfig, Selection
from lighthouse.transformers import register

STEPS = 10


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Each test begins with these settings, and leaves none behind."""
    register(WITH_WINDOW, dense_layers=[1])
    yield
    module._registered = None


@contextmanager
def selections() -> Iterator[list[Selection]]:
    """The selections that layers make, in the order in which they make them."""
    made: list[Selection] = []
    select = lighthouse.attention.select_entries

    def spy(*arguments: Any) -> Selection:
        made.append(select(*arguments))
        return made[-1]

    with patch.object(lighthouse.attention, "select_entries", spy):
        yield made


@pytest.mark.parametrize("method", [METHOD, WITH_WINDOW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_repeats_the_selection(
    method: LighthouseConfig, dtype: torch.dtype, reentrant: bool
) -> None:
    register(method, dense_layers=[1])
    model, rows = build().to(dtype).train(), tokens()
    gradients = []
    for recomputed in (False, True):
        model.zero_grad()
        if recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with selections() as made:
            model(rows, labels=rows, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        assert len(made) == (4 if recomputed else 2)
    # The backward pass recomputes the last layer first.
    for first, again in zip(made[:2], reversed(made[2:]), strict=True):
        assert torch.equal(first.index, again.index) and torch.equal(first.slot, again.slot)
    assert not torch.equal(made[0].index, made[1].index)
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


def test_key_value_heads_are_never_repeated() -> None:
    def repeat(*_: Any) -> None:
        pytest.fail("key-value heads were repeated")

    model, rows = build(), tokens()
    with (
        patch("transformers.integrations.sdpa_attention.repeat_kv", repeat),
        patch("transformers.models.llama.modeling_llama.repeat_kv", repeat),
    ):
        # Layer 1 is dense.
        model(rows, labels=rows).loss.backward()
        model.set_attn_implementation("eager")
        with pytest.raises(pytest.fail.Exception, match="were repeated"):
            model(rows)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_into_one_graph(backend: str) -> None:
    # One layer under Lighthouse and one dense.
    model, rows = build(LlamaConfig(**SIZE | {"num_hidden_layers": 2})).train(), tokens()
    torch.compiler.reset()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    found = compiled(rows, labels=rows, use_cache=False)
    expected = twin(rows, labels=rows, use_cache=False)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
    found.loss.backward()
    expected.loss.backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


class Rows(Dataset):
    """Rows of random tokens."""

    def __init__(self, count: int, seed: int) -> None:
        self.rows = tokens(count, seed=seed)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


@pytest.mark.parametrize("recompute", [False, True])
def test_trainer_trains_twenty_steps_through_both_stages(recompute: bool, tmp_path: Path) -> None:
    model = build(seed=3)
    calls, losses = [], []
    for stage in ("lighthouse", "sdpa"):
        model.set_attn_implementation(stage)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / stage), max_steps=STEPS, per_device_train_batch_size=2,
            learning_rate=3e-3, logging_steps=1, save_steps=5, report_to=[], use_cpu=True,
            eval_strategy="steps", eval_steps=5, gradient_checkpointing=recompute,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=Rows(4, 1), eval_dataset=Rows(2, 2))
        with selections() as made:
            trainer.train()
        calls.append(len(made))
        losses += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 2
        # A run that ended early goes on from its checkpoint.
        again = Trainer(model, arguments, train_dataset=Rows(4, 1), eval_dataset=Rows(2, 2))
        again.train(resume_from_checkpoint=str(tmp_path / stage / "checkpoint-5"))
        assert again.state.global_step == STEPS
    # Two layers of three select, twice a step if recomputed; two evaluations have one batch each.
    assert calls == [2 * STEPS * (2 if recompute else 1) + 2 * 2, 0]
    assert len(losses) == 2 * STEPS
    assert losses[-1] < losses[STEPS - 1] < losses[0]


def losses_of(model: PreTrainedModel, rows: torch.Tensor, steps: int = 6) -> list[float]:
    """Losses of steps in both stages, averaged over the ranks if there are several."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        if step == steps // 2:
            model.set_attn_implementation("sdpa")
        loss = model(rows, labels=rows, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        losses.append(mean.item())
    return losses


def sharded_worker(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    register(WITH_WINDOW, dense_layers=[1])
    mesh = init_device_mesh("cpu", (2,))
    losses = []
    for recompute in (False, True):
        model = build().train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        losses.append(losses_of(model, tokens(4)[rank::2]))
    if rank == 0:
        torch.save(losses, folder / "losses.pt")
    dist.destroy_process_group()


def test_sharded_over_two_ranks_the_losses_are_those_of_one(free_port: int, tmp_path: Path) -> None:
    """With and without recomputation, in one launch."""
    run_ranks(sharded_worker, free_port, tmp_path, processes=2)
    alone = losses_of(build().train(), tokens(4))
    for sharded in torch.load(tmp_path / "losses.pt"):
        torch.testing.assert_close(sharded, alone, rtol=0, atol=1e-5)
        assert sharded[-1] < sharded[0] - 0.1
