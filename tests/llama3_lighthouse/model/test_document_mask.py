"""Documents do not see each other through the whole model, in every stage."""

from dataclasses import replace

import pytest
import torch
from document_cases import positions_of, random_layout
from small_model import FOUR_LAYERS, N, build
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.components.loss import IGNORE_INDEX

from lighthouse.documents import gathered_documents
from lighthouse.geometry import PyramidGeometry
from torchtitan.models.llama3_lighthouse.data.documents import (
    DocumentLayout,
    model_options,
    without_idle_masks,
)
from torchtitan.models.llama3_lighthouse.infra.activation_checkpoint import (
    DOCUMENTS,
    SELECTION,
    WINDOW,
    apply_lighthouse_checkpoint,
)
from torchtitan.models.llama3_lighthouse.job_config import ActivationCheckpoint, Lighthouse
from torchtitan.models.llama3_lighthouse.model.model import LighthouseTransformer

BESIDE = replace(
    FOUR_LAYERS, lighthouse=replace(FOUR_LAYERS.lighthouse, combine="finest", window=24)
)
ALONE = replace(FOUR_LAYERS, window=24)
STAGES = {
    "lighthouse": (BESIDE, "lighthouse"),
    "window": (ALONE, "lighthouse"),
    "dense": (BESIDE, "dense"),
}
SPAN = FOUR_LAYERS.lighthouse.coarsest_span
PRODUCT = torch.ops.aten.mm.default


def model_of(stage: str) -> LighthouseTransformer:
    args, attention = STAGES[stage]
    model = build(args=args)
    model.use_attention(attention)
    return model


def drawn(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
    """Tokens and documents [2, N]; a row has two documents at least."""
    generator = torch.Generator().manual_seed(seed)
    documents = random_layout(2, N, SPAN, generator)
    while any(len(positions_of(documents, row)) < 2 for row in range(2)):
        documents = random_layout(2, N, SPAN, generator)
    return torch.randint(0, 320, (2, N), generator=generator), documents, generator


def losses_and_gradients(
    model: LighthouseTransformer,
    tokens: torch.Tensor,
    options: dict[str, torch.Tensor],
    places: list[slice],
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Logits; gradients of a loss over one document of each row, for weights and embeddings."""
    rows = []
    hook = model.tok_embeddings.register_forward_hook(
        lambda module, given, out: rows.append(out) or out.retain_grad()
    )
    logits = model(tokens, **options)
    hook.remove()
    loss = sum(logits[row, place].logsumexp(-1).sum() for row, place in enumerate(places))
    model.zero_grad()
    loss.backward()
    return logits.detach(), [p.grad.clone() for p in model.parameters()], rows[0].grad


@pytest.mark.parametrize("positions", ["run_on", "restart"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("seed", [1, 2])
def test_no_token_changes_logits_or_gradients_of_another_document(stage, positions, seed) -> None:
    """To the last bit, with the selection made anew."""
    tokens, documents, generator = drawn(seed)
    options = model_options(documents, Lighthouse(document_positions=positions))
    model = model_of(stage)
    kept = []
    for row in range(2):
        places = positions_of(documents, row)
        kept.append(places[int(torch.randint(len(places), (), generator=generator))])
    others = torch.ones(2, N, dtype=torch.bool)
    for row, place in enumerate(kept):
        others[row, place] = False
    changed = torch.where(others, torch.randint(0, 320, (2, N), generator=generator), tokens)

    logits, weights, embeddings = losses_and_gradients(model, tokens, options, kept)
    again, weights_again, embeddings_again = losses_and_gradients(model, changed, options, kept)
    assert not torch.equal(logits[others], again[others])
    assert torch.equal(logits[~others], again[~others])
    assert (embeddings[others] == 0).all() and (embeddings_again[others] == 0).all()
    assert torch.equal(embeddings[~others], embeddings_again[~others])
    assert (embeddings[~others] != 0).any()
    assert any((gradient != 0).any() for gradient in weights)
    # The embedding's gradient has rows of the changed tokens, which are all zero.
    assert all(map(torch.equal, weights, weights_again))
    # Without masks they are seen.
    without = model(changed)
    assert not torch.equal(model(tokens)[~others], without[~others])


@pytest.mark.parametrize("stage", STAGES)
def test_positions_that_run_on_or_restart_differ_by_rounding(stage: str) -> None:
    """Attention and selection read differences of positions alone."""
    tokens, documents, _ = drawn(3)
    model = model_of(stage).double()
    with torch.no_grad():
        run_on, restart = (
            model(tokens, **model_options(documents, Lighthouse(document_positions=name)))
            for name in ("run_on", "restart")
        )
    # The table of angles and the rotation are in float32.
    torch.testing.assert_close(run_on, restart, rtol=0, atol=2e-5)
    assert not torch.equal(run_on, restart)


@pytest.mark.parametrize("stage", ["window", "dense"])
def test_a_document_is_as_if_alone(stage: str) -> None:
    tokens, documents, _ = drawn(4)
    model = model_of(stage)
    options = model_options(documents, Lighthouse(document_positions="restart"))
    with torch.no_grad():
        packed = model(tokens, **options)
        for row in range(2):
            for place in positions_of(documents, row):
                alone = model(tokens[row : row + 1, place])
                torch.testing.assert_close(packed[row, place], alone[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("positions", ["run_on", "restart"])
@pytest.mark.parametrize("stage", STAGES)
def test_one_document_changes_nothing(stage: str, positions: str) -> None:
    """Neither loss nor gradients, so training leaves the masks out."""
    tokens, model = drawn(5)[0], model_of(stage)
    given = {"input": tokens, "documents": torch.zeros(2, N, dtype=torch.int32)}
    results = []
    for inputs in (given, without_idle_masks(given, None)):
        options = model_options(inputs.get("documents"), Lighthouse(document_positions=positions))
        assert bool(options) == (inputs is given)
        model.zero_grad()
        logits = model(inputs["input"], **options)
        cross_entropy(logits.flatten(0, 1)[:-1], tokens.flatten()[1:]).backward()
        results.append([logits.detach(), *(x.grad.clone() for x in model.parameters())])
    for with_masks, without in zip(*results, strict=True):
        torch.testing.assert_close(with_masks, without, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_padding_takes_no_part_in_the_loss(stage: str) -> None:
    """It gets no gradient. In a window and in dense attention its tokens do not matter at all."""
    generator = torch.Generator().manual_seed(8)
    lengths = torch.randint(1, 40, (40,), generator=generator)
    tokens = torch.randint(0, 320, (int(lengths.sum()) + N + 1,), generator=generator)
    layout = DocumentLayout(N, SPAN)
    found = layout.lay_out(tokens.numpy(), lengths.cumsum(0).tolist())
    padding = found.labels == IGNORE_INDEX
    assert padding.sum() == found.padding > 0
    losses = []
    for inputs in (found.inputs, found.inputs.masked_fill(padding, 7)):
        model, rows = model_of(stage), []
        model.tok_embeddings.register_forward_hook(
            lambda module, given, out, rows=rows: rows.append(out) or out.retain_grad()
        )
        logits = model(inputs[None], **model_options(found.documents[None], Lighthouse()))
        losses.append(cross_entropy(logits[0], found.labels, reduction="sum"))
        losses[-1].backward()
        gradient = rows[0].grad[0]
        assert (gradient[padding] == 0).all() and (gradient[~padding] != 0).any(dim=1).all()
    assert stage == "lighthouse" or torch.equal(*losses)


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[object, int] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.counts[operation] = self.counts.get(operation, 0) + 1
        return operation(*args, **(kwargs or {}))

    def of(self, operations: set) -> int:
        return sum(self.counts.get(operation, 0) for operation in operations)


@pytest.mark.parametrize("products", [[], ["wq", "wk", "wv", "wo", "w1", "w3"]])
@pytest.mark.parametrize("stage", STAGES)
def test_mode_lighthouse_keeps_attention_within_documents(stage: str, products: list) -> None:
    tokens, documents, _ = drawn(6)
    options = model_options(documents, Lighthouse())
    reference, model = model_of(stage), model_of(stage)
    apply_lighthouse_checkpoint(
        model, ActivationCheckpoint(mode="lighthouse", keep_products=products)
    )
    reference(tokens, **options).logsumexp(-1).sum().backward()
    with Operations() as operations:
        model(tokens, **options).logsumexp(-1).sum().backward()
    for one, other in zip(reference.parameters(), model.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    # Layers 0 and 3 are dense. Beside the selection there are two attentions in each layer.
    counts = {"lighthouse": (2, 4, 2), "window": (2, 2, 0), "dense": (4, 0, 0)}
    assert tuple(map(operations.of, (DOCUMENTS, WINDOW, SELECTION))) == counts[stage]


@pytest.mark.parametrize("stage", STAGES)
def test_flops_count_pairs_within_documents(stage: str) -> None:
    args, attention = STAGES[stage]
    _, documents, _ = drawn(7)

    def pairs(layout: torch.Tensor, window: int) -> float:
        places = [place for row in range(2) for place in positions_of(layout, row)]
        lengths = [place.stop - place.start for place in places]
        return sum(min(t + 1, window) for n in lengths for t in range(n)) / 2

    one = torch.zeros_like(documents)
    assert args.flops_saved_by_masks(one, attention) == 0
    places = gathered_documents(documents, PyramidGeometry(args.lighthouse, N))
    sparse = {"lighthouse": pairs(documents, 24) + pairs(places, N), "window": pairs(documents, 24)}
    all_pairs = 2 * pairs(documents, N) + 2 * sparse.get(stage, pairs(documents, N))
    left = args.flops_per_token(0, N, attention) - args.flops_saved_by_masks(documents, attention)
    assert left == pytest.approx(12 * args.attention_width * all_pairs / N)
