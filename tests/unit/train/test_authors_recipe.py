"""A short run in `prefix` mode, step for step beside the authors' recipe restated slowly."""

import pytest
import torch

from distrl.contract import Catalog
from distrl.data.config import DataConfig
from distrl.data.plan import Ledger
from distrl.data.samples import BatchMaker
from distrl.data.stream import local_batches
from distrl.engine.collectives import ensure_process_group
from distrl.engine.config import EngineConfig
from distrl.engine.zero import Engines
from distrl.methods import build, parse_method
from tests.parity.authors_recipe import AuthorsTrainer, padded, with_weights_of
from tests.store_factory import make_store

NUM_ITEMS, MAX_LEN, BATCH, STEPS = 300, 12, 48, 20
SETTINGS = {"name": "mclrec", "dropout": 0.0, "attention_dropout": 0.0, "data_weight": 0.04}


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """Terms of every phase of every step: ours, through DeepSpeed and packed rows, and theirs."""
    folder = tmp_path_factory.mktemp("recipe")
    rng = torch.Generator().manual_seed(5)
    lengths = torch.randint(3, 20, (80,), generator=rng).tolist()
    items = [(torch.rand(n, generator=rng) ** 2 * NUM_ITEMS).long() + 1 for n in lengths]
    manifest = make_store(
        folder / "store", [row.tolist() for row in items], num_shards=2, num_items=NUM_ITEMS
    )
    data = DataConfig(
        store_uri=str(folder / "store"), samples="prefix", batch_size=BATCH, max_len=MAX_LEN
    )
    ensure_process_group("gloo")
    torch.manual_seed(0)
    method = build(parse_method({**SETTINGS, "model_weight": 0.4}), Catalog(NUM_ITEMS, MAX_LEN))
    encoder, augmenters = with_weights_of(method, NUM_ITEMS, MAX_LEN, dropout=0.0)
    theirs = AuthorsTrainer(encoder, augmenters, data_weight=0.04, model_weight=0.4)
    engines = Engines(
        method,
        EngineConfig(),
        device=torch.device("cpu"),
        micro_batch_size=BATCH,
        num_workers=1,
    )
    stream = local_batches(
        manifest, data, BatchMaker(data, 2, NUM_ITEMS, 0), epochs=9, ledger=Ledger("store")
    )
    found = []
    for step, (batch, _) in zip(range(STEPS), stream, strict=False):
        shares = {"target": 1.0, "pair": 1.0}
        ours = {
            phase.name: {
                name: value.item()
                for name, value in engines.step(batch, phase, shares, step=step).items()
            }
            for phase in method.phases(0)
        }
        first, second = (padded(view, MAX_LEN) for view in batch.views)
        found.append(
            (ours, theirs.step(padded(batch.clean, MAX_LEN), batch.targets, first, second))
        )
    stream.close()
    return found


@pytest.mark.parametrize("phase", ["encoder", "augmenters", "encoder_again"])
def test_every_term_of_every_phase_follows_the_authors_recipe(curves, phase):
    assert len(curves) == STEPS
    for step, (ours, theirs) in enumerate(curves):
        terms = set(ours[phase]) - {"total"}
        assert terms >= {"model_contrast", "margin"}
        for name in terms:
            assert ours[phase][name] == pytest.approx(theirs[phase][name], rel=2e-3), (step, name)


def test_the_run_has_moved_far_from_where_it_began(curves):
    (first, _), (last, _) = curves[0], curves[-1]
    assert last["encoder"]["next_item"] < first["encoder"]["next_item"] - 0.1
    assert last["augmenters"]["margin"] < 0.9 * first["augmenters"]["margin"]
