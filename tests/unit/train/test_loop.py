"""The loop without Ray: one process, a tiny store, every step looked at."""

import pytest
import torch

from distrl.contract import Catalog
from distrl.data.config import DataConfig
from distrl.data.plan import Ledger
from distrl.data.samples import BatchMaker, empty_batch
from distrl.data.stream import local_batches
from distrl.engine.collectives import ensure_process_group
from distrl.engine.config import EngineConfig
from distrl.engine.zero import Engines
from distrl.errors import DivergedError, SchemaError
from distrl.methods import build, parse_method
from distrl.train import loop
from distrl.train.loop import Curves, Wishes, step_seed, steps
from tests.packed import batch_of
from tests.store_factory import make_store

SEQUENCES = [[1 + (u + i) % 12 for i in range(4 + u % 5)] for u in range(20)]


@pytest.fixture
def store(tmp_path):
    manifest = make_store(tmp_path / "store", SEQUENCES, num_shards=2, num_items=12)
    return manifest, DataConfig(store_uri=str(tmp_path / "store"), batch_size=8, max_len=6)


def run(store, *, lr=1e-2, wishes=None, epochs=1, **engine):
    manifest, config = store
    ensure_process_group("gloo")
    torch.manual_seed(0)
    settings = {"name": "mclrec", "hidden_size": 8, "inner_size": 16, "augmenter_sizes": [4]}
    method = build(parse_method(settings), Catalog(12, 6))
    engines = Engines(
        method,
        EngineConfig(lr=lr, optimizer="sgd", **engine),
        device=torch.device("cpu"),
        micro_batch_size=8,
        num_workers=1,
    )
    maker = BatchMaker(config, 2, 12, 0)
    ledger, curves = Ledger("store"), Curves()
    taken = []
    stream = local_batches(manifest, config, maker, epochs=epochs, ledger=ledger)
    try:
        for done in steps(
            method,
            engines,
            stream,
            empty=empty_batch(maker),
            already_consumed=0,
            curves=curves,
            seed=0,
            first_step=0,
            rows_per_epoch=manifest.num_trainable_rows,
            wishes=wishes or Wishes(),
        ):
            ledger.add(done.consumed.epoch, done.consumed.shard, done.consumed.serial)
            taken.append(done)
            if done.stop:
                break
    finally:
        stream.close()
    return taken, ledger, curves, method


def test_every_sample_is_trained_on_and_told(store):
    taken, ledger, curves, _ = run(store, epochs=2)
    manifest, _ = store
    assert [done.samples for done in taken] == [8, 8, 8, 8, 8]
    assert ledger.total == 2 * manifest.num_trainable_rows == 40
    assert sum(done.targets for done in taken) == 2 * manifest.num_prefixes
    assert [done.step for done in taken] == [1, 2, 3, 4, 5]
    means = curves.read()
    assert {"encoder/next_item", "augmenters/model_contrast", "encoder_again/margin"} <= set(means)
    assert curves.read() == {}


def test_a_curve_of_a_sum_is_the_sum_over_workers_and_of_a_mean_the_mean(store, monkeypatch):
    # Two workers of 3 and 1 targets, two steps each.
    monkeypatch.setattr(loop, "world_size", lambda: 2)
    told = []
    for num_targets, mean, total in ((3, 1.0, 10.0), (1, 5.0, 2.0)):
        batch = batch_of([[1]] * num_targets, [2] * num_targets, None, 6)
        curves, terms = Curves(), {"mean": torch.tensor(mean), "sum": torch.tensor(total)}
        for _ in range(2):
            curves.add("phase", terms, batch, {"mean": "target", "sum": "sum"})
        monkeypatch.setattr(loop, "gather_objects", lambda mine: told.append(mine) or [])
        curves.read()
    monkeypatch.setattr(loop, "gather_objects", lambda mine: told)
    assert Curves().read() == {"phase/mean": (3 * 1.0 + 5.0) / 4, "phase/sum": 12.0}


def test_the_same_seed_gives_the_same_weights(store):
    *_, first = run(store)
    *_, second = run(store)
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_learning_rates_follow_the_samples_consumed(store):
    manifest, config = store
    whole = manifest, config.model_copy(update={"batch_size": 10})
    taken, *_, twice = run(whole, epochs=2, decay="linear", decay_epochs=1.0)
    *_, once = run(whole, decay="linear", decay_epochs=1.0)
    *_, undecayed = run(whole)
    assert len(taken) == 4
    for name, parameter in twice.named_parameters():
        assert torch.equal(parameter, once.get_parameter(name)), "nothing moves after its end"
    item_table = once.get_parameter("encoder.item_table.weight")
    assert not torch.equal(item_table, undecayed.get_parameter("encoder.item_table.weight"))


def test_a_wish_to_stop_ends_training_after_the_step(store):
    taken, *_ = run(store, wishes=Wishes(stop=True))
    assert len(taken) == 1
    assert taken[0].stop


def test_a_wish_for_a_checkpoint_is_told_with_the_step_and_ends_nothing(store):
    taken, *_ = run(store, wishes=Wishes(save=True))
    assert [(done.save, done.stop) for done in taken] == [(True, False)] * 3
    taken, *_ = run(store)
    assert not any(done.save for done in taken)


def test_a_loss_that_is_not_finite_raises_and_names_phase_and_step(store):
    with pytest.raises(DivergedError, match=r"phase \w+, step \d+.*model_contrast=nan"):
        run(store, lr=1e30)


def test_what_the_stream_raises_is_raised_by_the_loop(store, tmp_path):
    manifest, config = store
    shard = tmp_path / "store" / manifest.sequences[1].path
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(SchemaError, match=r"part-00001\.parquet"):
        run((manifest, config))


def test_dropout_of_a_step_depends_on_run_step_and_worker_alone():
    seeds = {step_seed(s, t, w) for s in range(3) for t in range(3) for w in range(3)}
    assert len(seeds) == 27
    assert step_seed(1, 2, 3) == step_seed(1, 2, 3)
