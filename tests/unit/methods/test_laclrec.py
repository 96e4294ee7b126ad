"""LACLRec against its parts worked by hand, and a small world whose noise it must find."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from distrl.contract import Catalog, Damaged
from distrl.data.config import DataConfig
from distrl.data.samples import BatchMaker, Samples
from distrl.methods import build, parse_method
from distrl.methods.laclrec import HELD_OUT_LOSS, chosen_operations
from distrl.methods.mending import marked, mended, mending_figures
from distrl.nn.encoder import in_rows, stack
from distrl.ops.corruption import DELETE, INSERT, KEEP
from distrl.ops.losses import info_nce, next_item_loss, ranking_triplet
from distrl.ops.packing import unpacked
from distrl.ops.ragged import Ragged
from tests.packed import batch_of, pack_rows

NUM_ITEMS, MAX_LEN = 30, 12
SMALL = {"name": "laclrec", "hidden_size": 16, "inner_size": 32, "num_layers": 1, "num_heads": 2}
STILL = {"dropout": 0.0, "attention_dropout": 0.0}


def method(**settings):
    torch.manual_seed(0)
    config = parse_method({**SMALL, **settings})
    return build(config, Catalog(NUM_ITEMS, MAX_LEN)).train()


def made(model, rows, seed=0, **settings):
    """A batch as the stream makes it of whole sequences."""
    config = DataConfig(store_uri="unused", max_len=MAX_LEN, **settings)
    serial = np.arange(len(rows))
    samples = Samples(np.zeros_like(serial), np.zeros_like(serial), serial, Ragged.of(rows))
    return BatchMaker.of(config, model, NUM_ITEMS, seed).make(samples)


ROWS = [[1, 2, 3, 4, 5, 6], [7, 8, 9], [10, 11, 12, 13], [14, 15]]


def mend(rows, operations, inserted=(), **settings):
    packed = pack_rows(rows, MAX_LEN)
    flat = torch.full((packed.items.numel(),), DELETE)
    flat[packed.segment.flatten() >= 0] = torch.tensor(operations)
    missing = torch.tensor(inserted, dtype=torch.int64).reshape(-1, 2)
    given = {"max_len": MAX_LEN, "empty_id": NUM_ITEMS + 1, "scramble": False} | settings
    found = mended(packed, flat, lambda at: missing[: len(at)], **given)
    return [row.tolist() for row in np.split(*_split(found.sequences))]


def _split(packed):
    rows, _ = unpacked(packed)
    return rows.values, rows.offsets[1:-1]


def test_keeping_everything_changes_nothing():
    assert mend([[1, 2, 3], [4]], [KEEP] * 4) == [[1, 2, 3], [4]]


def test_inserted_items_come_in_front_of_their_slot_the_nearest_first():
    assert mend([[1, 2], [4]], [KEEP, INSERT, INSERT], [[8, 9], [7, 0]]) == [[1, 9, 8, 2], [7, 4]]


def test_a_view_that_nothing_is_left_of_becomes_the_mask_token():
    assert mend([[1, 2], [4]], [DELETE, DELETE, KEEP]) == [[NUM_ITEMS + 1], [4]]


def test_a_view_keeps_its_newest_items_where_it_grows_too_long():
    assert mend([[1, 2, 3]], [KEEP, KEEP, INSERT], [[8, 9]], max_len=3) == [[9, 8, 3]]


def test_scrambled_views_lose_repeats_and_order_as_in_the_authors_code():
    rows = [[5, 2, 5, 1], [9, 3], [20, 9, 17, 8, 20]]
    scrambled = mend(rows, [KEEP] * 11, scramble=True)
    assert scrambled == [list(set(row)) for row in rows]
    assert sorted(map(len, scrambled)) == [2, 3, 4]


def test_items_are_generated_for_open_gaps_alone():
    asked = []

    def generate(at):
        asked.extend(at.tolist())
        return torch.full((len(at), 2), 7)

    packed = pack_rows([[1, 2, 3], [4, 5]], MAX_LEN)
    operations = torch.full((packed.items.numel(),), INSERT)
    operations[:2] = torch.tensor([KEEP, DELETE])
    mended(packed, operations, generate, max_len=MAX_LEN, empty_id=NUM_ITEMS + 1, scramble=False)
    assert asked == torch.nonzero(packed.segment.flatten() >= 0)[2:, 0].tolist()
    assert len(asked) == 3


def test_the_damage_of_a_batch_is_undone_by_its_own_labels():
    model = method()
    batch = made(model, ROWS, contrasted_prefixes=3)
    damaged = batch.damaged
    found = mended(
        damaged.sequences,
        damaged.operations.flatten(),
        lambda at: damaged.missing[torch.searchsorted(*_sorted(damaged, at))],
        max_len=MAX_LEN,
        empty_id=NUM_ITEMS + 1,
        scramble=False,
    )
    raw, _ = unpacked(batch.views[1])
    back, _ = unpacked(found.sequences)
    whole = [[*row, int(t)] for row, t in zip(_lists(raw), batch.pair_target, strict=True)]
    assert _lists(back) == whole
    figures = mending_figures(damaged, found)
    assert figures["delete_recall"] == figures["reinserted"] == figures["insert_precision"] == 1.0
    assert figures["false_deletions"] == 0.0


def _sorted(damaged, at):
    rising, order = damaged.anchor_at.sort()
    damaged.missing[:] = damaged.missing[order]
    damaged.anchor_at[:] = rising
    return rising, at


def _lists(rows):
    return [row.tolist() for row in np.split(rows.values, rows.offsets[1:-1])]


@pytest.mark.parametrize("samples", ["all_positions", "prefix"])
def test_anchors_are_where_the_prefixes_end(samples):
    batch = made(method(), ROWS, samples=samples, contrasted_prefixes=2)
    raw = batch.views[1]
    assert batch.clean.items.flatten()[batch.pair_at].tolist() == (
        raw.items.flatten()[raw.last].tolist()
    )
    assert batch.clean.position.flatten()[batch.pair_at].tolist() == (
        raw.position.flatten()[raw.last].tolist()
    )


def test_the_anchor_of_a_prefix_that_a_window_cuts_is_a_pass_over_the_whole_prefix():
    model = method(**STILL, pretrain_epochs=1, triplet="mean")
    rows = [list(range(1, 24)), list(range(5, 20)), [7, 8, 9], [3, 4]]
    batch = made(model, rows, contrasted_prefixes=6)
    raw = batch.views[1]
    seen = batch.clean.position.flatten()[batch.pair_at]
    cut = (seen != raw.position.flatten()[raw.last]).nonzero().flatten()
    assert torch.equal(model._cut(batch), cut)
    assert 0 < len(cut) < batch.num_pairs
    rows_of_cut, _ = unpacked(in_rows(raw, cut))
    rows_of_all, _ = unpacked(raw)
    assert np.array_equal(rows_of_cut.values, rows_of_all.take(cut.numpy()).values)
    torch.manual_seed(3)
    terms = model(batch, model.phases(1)[0]).terms
    torch.manual_seed(3)
    far, near = model._views(batch)
    expected = ranking_triplet(*(model.user_states(pack) for pack in (raw, near, far))).mean()
    assert terms["triplet"].value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_triplet_loss_is_log_2_for_equal_views_and_falls_as_the_near_one_nears():
    anchor, view = torch.randn(5, 4), torch.randn(5, 4)
    torch.testing.assert_close(
        ranking_triplet(anchor, view, view), torch.full((5,), float(np.log(2)))
    )
    nearer = ranking_triplet(anchor, view + 0.1 * anchor, view)
    assert (nearer < np.log(2)).all()
    # Worked by hand: a.n = 1, a.f = 3, softplus(2) = 2.126928.
    value = ranking_triplet(torch.ones(1, 1), torch.ones(1, 1), torch.full((1, 1), 3.0))
    assert value.item() == pytest.approx(2.126928, abs=1e-6)
    assert ranking_triplet(torch.full((1, 1), 1e3), *torch.tensor([[[-1.0]], [[1.0]]])).isfinite()


def test_the_random_view_stands_against_the_learned_one_and_not_against_the_prefix():
    settings = {"pretrain_epochs": 1, "operations": "argmax", "temperature": 0.5}
    model = method(**settings, **STILL)
    with torch.no_grad():
        model.encoder.item_table.weight.mul_(20)
    batch = made(model, ROWS, contrasted_prefixes=3)
    term = model(batch, model.phases(1)[0]).terms["data_contrast"]
    far, near = (model.user_states(view) for view in model._views(batch))
    anchors = model.user_states(batch.views[1])
    expected = info_nce(far, near, temperature=0.5).item()
    assert term.value.item() == pytest.approx(expected, rel=1e-5)
    assert (term.weight, term.unit) == (0.1, "pair")
    for first, second in ((anchors, near), (far, anchors)):
        other = info_nce(first, second, temperature=0.5).item()
        assert other != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(("max_inserted", "is_full"), [(5, {False}), (2, {False, True})])
def test_the_augmenters_loss_is_its_sum_spelled_out(max_inserted, is_full):
    model = method(max_inserted=max_inserted, **STILL)
    damaged = made(model, ROWS, contrasted_prefixes=3).damaged
    # A full gap has no end behind its items.
    assert set((damaged.missing[:, -1] > 0).tolist()) == is_full
    terms = model._augmenter_terms(damaged, 1.0)
    corrector, items = model._corrector, model.encoder.item_vectors
    states = model.encoder(damaged.sequences).flatten(0, 1)
    operation, inserted = [], []
    for slot, label in enumerate(damaged.operations.flatten().tolist()):
        if label >= 0:
            operation.append(
                F.cross_entropy(corrector.operation(states[slot]), torch.tensor(label))
            )
    for at, gap in zip(damaged.anchor_at.tolist(), damaged.missing.tolist(), strict=True):
        target = [item for item in gap if item] + [0]
        for place, wanted in enumerate(target[: corrector.max_inserted]):
            scored = corrector(states[at][None], items[torch.tensor(target[:place]).long()][None])
            logits = corrector.classes(items) @ scored[0, -1]
            inserted.append(F.cross_entropy(logits, torch.tensor(wanted)))
    assert len(inserted) == damaged.count("missing") > 3
    assert len(operation) == damaged.count("token")
    torch.testing.assert_close(terms["operation"].value, torch.stack(operation).mean())
    torch.testing.assert_close(terms["insertion"].value, torch.stack(inserted).mean())


def test_without_its_terms_the_second_stage_is_cross_entropy():
    model = method(data_weight=0.0, triplet_weight=0.0, pretrain_epochs=0, **STILL)
    assert model.num_views == 0
    batch = made(model, ROWS)
    (phase,) = model.phases(0)
    (name,) = (losses := model(batch, phase)).terms
    assert name == "next_item"
    deep = build(
        parse_method({**SMALL, **STILL, "name": "sasrec", "num_layers": 2}),
        Catalog(NUM_ITEMS, MAX_LEN),
    )
    weights = model.encoder.state_dict()
    upper = {f"layers.1.{key}": value for key, value in model.recommender[0].state_dict().items()}
    deep.encoder.load_state_dict({**weights, **upper})
    states = deep.encoder(batch.clean, batch.target_at)
    plain = next_item_loss(states, deep.item_vectors, batch.targets)
    torch.testing.assert_close(losses.terms["next_item"].value, plain)


def test_the_recommender_does_not_see_what_comes_later():
    model = method(**STILL).eval()
    before, after = pack_rows([[1, 2, 3, 4]], MAX_LEN), pack_rows([[1, 2, 3, 9]], MAX_LEN)
    at = torch.arange(3)
    assert torch.equal(model._recommended(before, at), model._recommended(after, at))


@pytest.mark.parametrize(("bidirectional", "sees"), [(False, False), (True, True)])
def test_the_augmenter_sees_what_comes_later_only_where_it_is_told_to(bidirectional, sees):
    model = method(bidirectional=bidirectional, **STILL).eval()
    before, after = pack_rows([[1, 2, 3, 4]], MAX_LEN), pack_rows([[1, 2, 3, 9]], MAX_LEN)
    same = torch.equal(model._mending_states(before)[0, :3], model._mending_states(after)[0, :3])
    assert same != sees


def moved(model, batch, phase):
    model.zero_grad()
    losses = model(batch, phase)
    losses.total(dict.fromkeys(("target", "pair", "token", "missing", "sum"), 1.0)).backward()
    return {
        name
        for name, part in model.parts.items()
        if any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    }


@pytest.mark.parametrize("share_encoder", [True, False])
def test_each_stage_moves_its_own_parts(share_encoder):
    model = method(pretrain_epochs=2, share_encoder=share_encoder)
    batch = made(model, ROWS, contrasted_prefixes=2)
    first, second = model.phases(0)[0], model.phases(2)[0]
    reached = moved(model, batch, first)
    assert reached == set(first.trains)
    assert ("encoder" in first.trains) == share_encoder
    assert moved(model, batch, second) == {"encoder", "recommender"} == set(second.trains)


@pytest.mark.parametrize("share_encoder", [True, False])
def test_an_augmenter_with_an_encoder_of_its_own_does_not_drift(share_encoder):
    model = method(pretrain_epochs=1, share_encoder=share_encoder)
    batch = made(model, ROWS, contrasted_prefixes=2)

    def judged():
        torch.manual_seed(1)
        model.eval()
        figures = model.judged(batch)
        model.train()
        return figures

    before = judged()
    for part in (model.encoder, model.recommender):
        for weights in part.parameters():
            weights.data.add_(torch.randn_like(weights))
    assert (judged() == before) is not share_encoder


@pytest.mark.parametrize(("operation", "learned"), [(KEEP, 1.0), (DELETE, 0.0)])
def test_the_share_of_views_that_are_the_prefix_is_told_of_each_kind(operation, learned):
    model = method().eval()
    with torch.no_grad():
        head = model._corrector.operation
        head.weight.zero_()
        head.bias.copy_(100.0 * F.one_hot(torch.tensor(operation), 3))
    prefixes = [[1, 2, 3], [4, 5], [6], [7, 8]]
    batch = batch_of(prefixes, [4, 6, 7, 9], ([[1, 2, 3], [5, 4], [6], [7]], prefixes), MAX_LEN)
    figures = model.judged(replace(batch, damaged=made(model, ROWS).damaged))
    assert figures["augmenter/random_unchanged_share"] == 0.5
    assert figures["augmenter/learned_unchanged_share"] == learned


def test_joint_stages_are_one_step_over_everything():
    model = method(stages="joint", pretrain_epochs=1)
    (phase,) = model.phases(1)
    batch = made(model, ROWS, contrasted_prefixes=2)
    assert moved(model, batch, phase) == set(phase.trains) == set(model.parts)
    assert set(model(batch, phase).terms) == {
        *("next_item", "data_contrast", "triplet", "operation", "insertion")
    }


def test_the_first_stage_ends_when_the_held_out_loss_stops_falling():
    model = method(pretrain_epochs=9, pretrain_patience=2)
    for epoch, loss in enumerate([3.0, 2.0, 2.5, 2.1]):
        assert [phase.name for phase in model.phases(epoch)] == ["augmenter"]
        assert not model.can_rank(epoch)
        model.heed(epoch, {HELD_OUT_LOSS: loss})
    assert [phase.name for phase in model.phases(4)] == ["recommender"]
    assert model.can_rank(4)
    # What a checkpoint keeps is enough to go on the same way.
    other = method(pretrain_epochs=9, pretrain_patience=2)
    other.load_state_dict(model.state_dict())
    assert [phase.name for phase in other.phases(4)] == ["recommender"]


def test_without_the_augmenter_a_second_random_view_takes_its_place():
    model = method(learned_view=False)
    assert model.num_views == 2
    assert model.corruption is None
    assert "augmenter" not in model.parts
    (phase,) = model.phases(0)
    assert set(model(made(model, ROWS), phase).terms) == {"next_item", "data_contrast", "triplet"}


def test_a_sum_of_triplets_is_the_mean_times_the_pairs():
    rows = {}
    for triplet in ("sum", "mean"):
        model = method(triplet=triplet, pretrain_epochs=1, operations="argmax", **STILL)
        rows[triplet] = model(made(model, ROWS), model.phases(1)[0]).terms["triplet"]
    torch.testing.assert_close(rows["sum"].value, rows["mean"].value * len(ROWS))
    assert rows["sum"].unit == "sum"


@pytest.mark.parametrize("negatives", ["worker", "all_workers"])
def test_a_single_prefix_has_a_triplet_though_it_has_no_contrast(negatives):
    model = method(pretrain_epochs=1, operations="argmax", negatives=negatives, **STILL)
    batch = made(model, ROWS[:1])
    terms = model(batch, model.phases(1)[0]).terms
    far, near = model._views(batch)
    expected = ranking_triplet(*(model.user_states(pack) for pack in (batch.views[1], near, far)))
    assert set(terms) == {"next_item", "triplet"}
    assert terms["triplet"].value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_operations_are_drawn_by_their_probabilities():
    torch.manual_seed(0)
    logits = torch.tensor([0.2, 0.3, 0.5]).log().expand(40_000, 3)
    counts = torch.bincount(chosen_operations(logits, "sample"), minlength=3) / 40_000
    torch.testing.assert_close(counts, torch.tensor([0.2, 0.3, 0.5]), atol=0.01, rtol=0)
    assert (chosen_operations(logits, "argmax") == INSERT).all()
    # The code's rule: a single positive logit always wins, of two positive ones either may.
    one, two = torch.tensor([[-1.0, 2.0, -3.0]]), torch.tensor([[2.0, 1.0, -1.0]])
    rule = "logit_times_uniform"
    assert (chosen_operations(one.expand(500, 3), rule) == DELETE).all()
    share = (chosen_operations(two.expand(40_000, 3), rule) == KEEP).float().mean().item()
    # P(2u > v) = 3/4 for u, v uniform.
    assert share == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("places_added", ["once", "each_step"])
def test_generation_is_the_codes_own_loop(places_added):
    model = method().eval()
    corrector = model._corrector
    with torch.no_grad():
        model.encoder.item_table.weight.mul_(50)
        corrector.places.weight.mul_(25)
        items = model.encoder.item_vectors
        for parameter in corrector.block.parameters():
            if parameter.dim() > 1:
                parameter.mul_(40)
        states = torch.randn(40, 16)
        classes = corrector.classes(items)
        expected = torch.zeros((40, corrector.max_inserted), dtype=torch.int64)
        for row in range(40):
            # The list of inputs, which the authors' code adds the places to as it grows.
            tokens = states[row][None]
            plain = tokens
            for place in range(corrector.max_inserted):
                length = len(tokens)
                tokens = tokens + corrector.places.weight[:length]
                seen = tokens
                if places_added == "once":
                    seen = plain + corrector.places.weight[:length]
                visible = torch.ones(length, length, dtype=torch.bool).tril()
                state = corrector.block(seen[None], visible[None, None])[0, -1]
                chosen = int((classes @ state).argmax())
                if chosen == 0:
                    break
                expected[row, place] = chosen
                tokens = torch.cat([tokens, items[chosen][None]])
                plain = torch.cat([plain, items[chosen][None]])
        found = corrector.generate(states, items, places_added=places_added)
        other = {"once": "each_step", "each_step": "once"}[places_added]
        differs = corrector.generate(states, items, places_added=other)
    assert torch.equal(found, expected)
    assert (expected[:, 1:] > 0).any(), "some gap gets a second item"
    assert not torch.equal(found, differs)


def test_generated_gaps_end_and_hold_no_item_behind_their_end():
    model = method(**STILL).eval()
    with torch.no_grad():
        model._corrector.end.zero_()
    states = torch.randn(50, 16)
    found = model._corrector.generate(states, model.encoder.item_vectors)
    assert found.shape == (50, 5)
    assert ((found[:, 1:] == 0) | (found[:, :-1] != 0)).all()
    assert model._corrector.generate(states[:0], model.encoder.item_vectors).shape == (0, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.5, "delete": 0.4, "insert": 0.3}, "must make 1"),
        ({"keep": 0.0, "delete": 0.5, "insert": 0.5}, "keep=0"),
        ({"pretrain_epochs": 0}, "pretrain_epochs=0 leaves the augmenter untrained"),
    ],
)
def test_probabilities_that_cannot_be_are_named(settings, message):
    with pytest.raises(ValidationError, match=message):
        method(**settings)


def counting(generator, count):
    starts, lengths = generator.integers(1, 20, count), generator.integers(4, 9, count)
    return [list(range(a, a + n)) for a, n in zip(starts, lengths, strict=True)]


def test_planted_items_are_found_in_a_world_with_an_order():
    """Sequences that count upwards, so that an item out of order stands out to who sees it all."""
    model = method(
        keep=0.6,
        delete=0.15,
        insert=0.25,
        bidirectional=True,
        num_layers=2,
        hidden_size=32,
        **STILL,
    )
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = np.random.default_rng(0)
    (phase,) = model.phases(0)
    for step in range(350):
        batch = made(model, counting(generator, 64), seed=step)
        optimizer.zero_grad()
        model(batch, phase).total({"token": 1.0, "missing": 1.0}).backward()
        optimizer.step()
    held_out = made(model.eval(), counting(generator, 300), seed=10_000)
    figures = model.judged(held_out)
    assert figures["augmenter/delete_recall"] > 0.9
    assert figures["augmenter/false_deletions"] < 0.1
    assert figures["augmenter/reinserted_precision"] > 0.6


def test_empty_damage_is_a_loss_of_zero():
    model = method()
    empty = made(model, [])
    assert isinstance(empty.damaged, Damaged)
    losses = model(empty, model.phases(0)[0])
    assert [term.value.item() for term in losses.terms.values()] == [0.0, 0.0]
    assert model(empty, model.phases(50)[0]).terms["next_item"].value.item() == 0.0


def test_views_of_an_empty_side_can_be_stacked():
    model = method()
    batch = batch_of([[1, 2], [3]], [3, 4], ([[1, 2], [3]], [[1, 2], [3]]), MAX_LEN)
    views = model._views(batch)
    assert stack(views).last.shape == (4,)


def test_examples_show_what_is_done_to_each_item():
    packed = pack_rows([[1, 2, 3], [4]], MAX_LEN)
    operations = torch.full((packed.items.numel(),), DELETE)
    operations[packed.segment.flatten() >= 0] = torch.tensor([KEEP, DELETE, INSERT, KEEP])
    settings = {"max_len": MAX_LEN, "empty_id": NUM_ITEMS + 1, "scramble": False}
    found = mended(packed, operations, lambda at: torch.tensor([[8, 9]]), **settings)
    assert marked(packed, found, 2) == [
        [(1, "kept"), (2, "deleted"), (9, "inserted"), (8, "inserted"), (3, "kept")],
        [(4, "kept")],
    ]
    assert marked(packed, found, 1) == marked(packed, found, 2)[:1]
