"""SRA-CL against its parts worked by hand, on each base."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distrl.contract import Catalog, Losses
from distrl.data.beside import read_beside
from distrl.data.config import DataConfig
from distrl.data.plan import Ledger
from distrl.data.samples import BatchMaker
from distrl.data.store import manifest_hash
from distrl.data.stream import local_batches
from distrl.methods import build, parse_method
from distrl.nn.encoder import stack
from distrl.ops.losses import one_way_info_nce
from tests.neighbor_store import LONGEST, neighbor_store

LENGTHS = [5, 12, 7, 20, 4, 6, 9, 8, 11]
NUM_ITEMS, MAX_LEN, E, K = len(LENGTHS) * LONGEST, 8, 4, 3
SMALL = {"hidden_size": 8, "inner_size": 16, "dropout": 0.0}
BASES = {
    "sasrec": {"name": "sasrec", "num_layers": 1, "attention_dropout": 0.0, **SMALL},
    "cl4srec": {"name": "cl4srec", "num_layers": 1, "attention_dropout": 0.0, **SMALL},
    "mclrec": {
        "name": "mclrec",
        "num_layers": 1,
        "attention_dropout": 0.0,
        "model_weight": 0.1,
        "steps_per_batch": 3,
        **SMALL,
    },
    "gru4rec": {"name": "gru4rec", **SMALL},
}


def method(base="sasrec", **settings):
    torch.manual_seed(0)
    given = {"synthesizer_dropout": 0.0, "text_size": E} | settings
    config = parse_method({"name": "sracl", "base": BASES[base], **given})
    return build(config, Catalog(NUM_ITEMS, MAX_LEN))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("near") / "store"
    return folder, *neighbor_store(folder, LENGTHS, k=K, max_len=MAX_LEN, dimension=E)


def batch_for(store, model, **settings):
    folder, manifest, _, _ = store
    config = DataConfig(
        store_uri=str(folder),
        neighbors="near",
        num_neighbors=K,
        max_len=MAX_LEN,
        batch_size=100,
        contrasted_prefixes=2,
        **settings,
    )
    maker = BatchMaker.of(config, model, NUM_ITEMS, 0, read_beside(config, manifest))
    ledger = Ledger(manifest_hash(manifest))
    ((batch, _),) = local_batches(manifest, config, maker, epochs=1, ledger=ledger)
    return batch


def symmetric(first, second):
    """NT-Xent restated anchor by anchor."""
    views, count, total = torch.cat([first, second]), len(first), 0.0
    for i in range(2 * count):
        scores = {j: float(views[i] @ views[j]) for j in range(2 * count) if j != i}
        partner = (i + count) % (2 * count)
        total += np.log(sum(np.exp(s - scores[partner]) for s in scores.values()))
    return total / (2 * count)


@pytest.mark.parametrize("base", BASES)
def test_it_adds_both_losses_wherever_the_base_moves_its_encoder_and_nothing_else(store, base):
    model = method(base)
    batch = batch_for(store, model)
    names = []
    for phase in model.phases(0):
        own = {"next_item", "data_contrast", "model_contrast", "margin"}
        terms = model(batch, phase).terms
        names.append(phase.name)
        moves = "encoder" in phase.trains
        assert ("synthesizer" in phase.trains) == moves
        assert set(terms) - own == ({"inter_user", "intra_user"} if moves else set())
        if moves:
            assert terms["inter_user"].weight == terms["intra_user"].weight == 0.1
    assert names == [phase.name for phase in model.base.phases(0)]
    held = [id(p) for part in model.parts.values() for p in part.parameters()]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_the_values_are_those_of_the_definition(store):
    model = method().eval()
    batch = batch_for(store, model)
    terms = model(batch, model.phases(0)[0]).terms
    found, encoder = batch.neighbors, model.base.encoder
    with torch.no_grad():
        anchors = encoder.last_states(found.anchors)
        neighbors = encoder.last_states(found.sequences)
        layer = model.synthesizer
        kept, made = [], []
        for pair in range(len(anchors)):
            rows = [row for row in found.of_pair[pair].tolist() if row >= 0]
            if not rows:
                continue
            q = layer.project(found.text[pair])
            c = [layer.project(found.neighbor_text[row]) for row in rows]
            e = torch.stack([layer.attend(torch.cat([q, one])) for one in c]).flatten()
            p = F.leaky_relu(e, 0.2).softmax(dim=0)
            kept.append(pair)
            made.append((p[:, None] * neighbors[rows]).sum(dim=0))
        assert 2 < len(kept) < len(anchors), "some prefix has no neighbors"
        expected = symmetric(anchors[kept].double(), torch.stack(made).double())
        first, second = (encoder.last_states(view) for view in batch.semantic_views)
    assert terms["inter_user"].value.item() == pytest.approx(expected, rel=1e-5)
    assert terms["intra_user"].value.item() == pytest.approx(
        symmetric(first.double(), second.double()), rel=1e-5
    )


def test_the_papers_inter_user_loss_goes_one_way():
    anchor = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    positive = torch.tensor([[2.0, 1.0], [1.0, 0.0]])
    # Scores are [[2, 1], [1, 0]]: log(1 + e^-1) for the first anchor, log(1 + e) for the second.
    expected = (np.log1p(np.exp(-1)) + np.log1p(np.exp(1))) / 2
    value = one_way_info_nce(anchor, positive, temperature=1.0)
    assert value.item() == pytest.approx(expected, rel=1e-6)
    alike = torch.tensor([[True, True], [True, True]])
    assert one_way_info_nce(anchor, positive, temperature=1.0, alike=alike).item() == 0.0
    with pytest.raises(ValueError, match="at least 2 sequences"):
        one_way_info_nce(anchor[:1], positive[:1], temperature=1.0)


def test_the_inter_user_loss_reaches_synthesizer_neighbors_and_anchors(store):
    model = method(intra_weight=0.0)
    batch = batch_for(store, model)
    terms = model(batch, model.phases(0)[0]).terms
    Losses({"inter_user": terms["inter_user"]}).total({"pair": 1.0}).backward()
    layer, table = model.synthesizer, model.base.encoder.item_table
    assert layer.project.weight.grad.abs().sum() > 0
    assert layer.attend.weight.grad.abs().sum() > 0
    moved = set(table.weight.grad.abs().sum(dim=1).nonzero().flatten().tolist())
    found = batch.neighbors
    anchors = set(found.anchors.items.unique().tolist()) - {0}
    only_neighbors = set(found.sequences.items.unique().tolist()) - {0} - anchors
    assert only_neighbors & moved
    assert anchors & moved


def trained(store, settings):
    """Loss of every step, and the weights after the last, with dropout and Adam at work."""
    torch.manual_seed(0)
    model = build(parse_method(settings), Catalog(NUM_ITEMS, MAX_LEN)).train()
    optimizers = {
        name: torch.optim.Adam(part.parameters(), lr=0.01) for name, part in model.parts.items()
    }
    batch, losses = batch_for(store, model), []
    assert batch.neighbors is None
    assert batch.semantic_views is None
    for step in range(3):
        for number, phase in enumerate(model.phases(0)):
            torch.manual_seed(10 * step + number)
            model.zero_grad()
            loss = model(batch, phase).total({"target": 1.0, "pair": 1.0})
            loss.backward()
            for part in phase.trains:
                optimizers[part].step()
            losses.append(loss.item())
    return losses, [weights.detach().clone() for weights in model.parameters()]


@pytest.mark.parametrize("base", BASES)
def test_with_both_weights_at_zero_it_is_the_base_to_the_bit(store, base):
    plain = BASES[base] | {name: 0.5 for name in BASES[base] if name.endswith("dropout")}
    added = {"name": "sracl", "base": plain, "inter_weight": 0, "intra_weight": 0}
    (ours, our_weights), (bare, bare_weights) = trained(store, added), trained(store, plain)
    assert ours == bare
    assert len(set(ours)) == len(ours)
    assert all(torch.equal(a, b) for a, b in zip(our_weights, bare_weights, strict=True))


def test_random_encodes_one_neighbor_of_each_prefix_and_mean_all(store):
    model = method(synthesizer="random").train()
    found = batch_for(store, model).neighbors
    assert "synthesizer" not in model.parts
    assert found.of_pair.shape[1] == 1
    there = found.of_pair >= 0
    assert set(there.flatten().tolist()) == {True, False}
    assert torch.equal(model._weights(found), there.float())
    states = torch.randn(len(found.neighbor_text), model.base.item_vectors.shape[1])
    made = model._synthesized(found, states)
    assert torch.equal(made, states[found.of_pair[:, 0].clamp(min=0)] * there)
    every = batch_for(store, method()).neighbors
    assert len(found.neighbor_text) < len(every.neighbor_text)
    assert torch.equal(there.any(dim=1), (every.of_pair >= 0).any(dim=1))
    there = every.of_pair >= 0
    share = method(synthesizer="mean")._weights(every)
    count = there.sum(dim=1, keepdim=True).clamp(min=1)
    assert torch.equal(share, there.float() / count)


def test_one_pair_alone_has_no_semantic_terms_and_evaluation_needs_no_text(store):
    model = method()
    batch = batch_for(store, model)
    states = model.user_states(batch.clean)
    assert torch.equal(states, model.base.user_states(batch.clean))
    assert model.item_vectors is not None
    views = model.view_states(batch)
    assert set(views) == {"semantic", "synthesized"}
    assert len(views["semantic"][0]) == batch.num_pairs


def test_a_stack_with_more_neighbors_than_segments_keeps_segments_apart(store):
    model = method()
    batch = batch_for(store, model)
    found = batch.neighbors
    packs = [found.sequences, found.anchors]
    stacked = stack(packs)
    rows = [pack.segment.amax(dim=1) for pack in packs]
    assert len(found.sequences.last) > int(rows[0].max()) + 1
    assert int(stacked.segment[: len(rows[0])].max()) < int(
        stacked.segment[len(rows[0]) :][stacked.segment[len(rows[0]) :] >= 0].min()
    )
