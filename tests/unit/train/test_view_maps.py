"""Maps of the views of small models on a small store, and the job that draws them."""

import csv
import json
import sys
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import save_file

from distrl.config import load_config
from distrl.contract import Catalog
from distrl.data.config import DataConfig
from distrl.errors import ConfigError
from distrl.methods import build, parse_method
from distrl.ops.diagnostics import view_diagnostics
from distrl.ops.packing import unpacked
from distrl.tracking.connection import speaking_to
from distrl.tracking.runs import find_run
from distrl.train.view_maps import ShownModel, check_alike, contrasted, map_views, read_model
from distrl.train.view_picture import as_csv, as_json, picture, table
from jobs.command import run
from jobs.map_views import MapViewsConfig, checkpoint_of, main
from tests.neighbor_store import LONGEST, neighbor_store
from tests.store_factory import make_store

REPOSITORY = Path(__file__).parents[3]
NUM_ITEMS, MAX_LEN, NUM_PAIRS = 30, 8, 25
SEQUENCES = [[1 + (7 * u + i * i) % NUM_ITEMS for i in range(5 + u % 6)] for u in range(60)]
SMALL = {"hidden_size": 8, "inner_size": 16}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "store"
    make_store(folder, SEQUENCES, num_items=NUM_ITEMS)
    return str(folder)


@pytest.fixture
def checkpoint(tmp_path, store):
    """Writes a checkpoint's folder as training does, without optimizer states."""

    def write(name, method="mclrec", seed=0, **data):
        torch.manual_seed(seed)
        config = parse_method({"name": method, **SMALL})
        weights = build(config, Catalog(NUM_ITEMS, MAX_LEN)).state_dict()
        folder = tmp_path / name / "checkpoint-000000007"
        folder.mkdir(parents=True)
        save_file(
            {key: tensor.clone() for key, tensor in weights.items()},
            folder / "model.safetensors",
            {"content": "weights"},
        )
        settings = DataConfig(store_uri=store, max_len=MAX_LEN, **data)
        described = {"name": name, "method": config.model_dump(mode="json")}
        described["data"] = settings.model_dump(mode="json")
        (folder / "run.json").write_text(json.dumps(described))
        return str(folder)

    return write


def mapped(uri, label="one"):
    return map_views(read_model(label, uri, None), num_pairs=NUM_PAIRS, perplexity=5.0, seed=3)


def same_views(first, second):
    return all(
        torch.equal(a.items, b.items) for a, b in zip(first.views, second.views, strict=True)
    )


def test_a_map_has_a_point_for_each_view_and_the_diagnostics_of_the_views(checkpoint):
    uri = checkpoint("one")
    data, learned = mapped(uri)
    assert (data.kind, learned.kind) == ("data", "learned")
    assert data.first.shape == data.second.shape == learned.first.shape == (NUM_PAIRS, 2)
    model = read_model("one", uri, None)
    with torch.no_grad():
        states = model.method.view_states(contrasted(model, NUM_PAIRS, 3))
    assert data.diagnostics == view_diagnostics(*states["data"])
    assert learned.diagnostics == view_diagnostics(*states["learned"])


def test_the_same_seed_gives_the_same_map(checkpoint):
    uri = checkpoint("one")
    for one, again in zip(mapped(uri), mapped(uri), strict=True):
        np.testing.assert_array_equal(one.first, again.first)


def test_models_are_shown_the_same_pairs_and_each_seed_others(checkpoint):
    one = read_model("one", checkpoint("one"), None)
    other = read_model("other", checkpoint("other", seed=1, batch_size=64), None)
    assert same_views(contrasted(one, NUM_PAIRS, 3), contrasted(other, NUM_PAIRS, 3))
    assert not same_views(contrasted(one, NUM_PAIRS, 3), contrasted(one, NUM_PAIRS, 4))


def test_views_are_those_of_the_models_own_augmentation(checkpoint):
    uri = checkpoint("one", augment={"operations": ["reorder"], "distinct": False})
    batch = contrasted(read_model("one", uri, None), NUM_PAIRS, 3)
    assert not any(hidden.any() for hidden in mapped(uri)[0].hidden)
    for view in batch.views:  # a reordered prefix holds the same items
        of_view = [sorted(view.items[view.segment == s].tolist()) for s in range(NUM_PAIRS)]
        of_input = [
            sorted(batch.clean.items[batch.clean.segment == s].tolist()) for s in range(NUM_PAIRS)
        ]
        assert of_view == of_input


@pytest.mark.parametrize("mask_with", ["pad", "token"])
def test_views_whose_newest_item_is_masked_are_told(checkpoint, mask_with):
    augment = {"operations": ["mask"], "distinct": False, "mask_with": mask_with}
    uri = checkpoint("one", augment=augment)
    batch = contrasted(read_model("one", uri, None), NUM_PAIRS, 3)
    for view, hidden in zip(batch.views, mapped(uri)[0].hidden, strict=True):
        newest = [view.items[view.segment == s][-1].item() for s in range(NUM_PAIRS)]
        mask_id = 0 if mask_with == "pad" else NUM_ITEMS + 1
        assert hidden.tolist() == [item == mask_id for item in newest]
        assert 0 < hidden.sum() < NUM_PAIRS


def test_the_report_holds_every_point_and_a_panel_for_each_map(checkpoint):
    maps = [*mapped(checkpoint("one")), *mapped(checkpoint("two", method="cl4srec"), "two")]
    rows = list(csv.DictReader(StringIO(as_csv(maps))))
    assert len(rows) == 3 * 2 * NUM_PAIRS  # MCLRec has two kinds of view, CL4SRec one
    assert {row["kind"] for row in rows if row["model"] == "two"} == {"data"}
    assert float(rows[0]["x"]) == pytest.approx(maps[0].first[0, 0], abs=1e-4)
    assert json.loads(json.dumps(as_json(maps)))[2]["model"] == "two"
    assert f"{maps[1].diagnostics['effective_rank']:.4f}" in table(maps)
    one, two = (imread(BytesIO(picture(shown, num_lines=5))) for shown in (maps[:2], maps))
    assert two.shape[1] == 2 * one.shape[1]


def test_a_learned_view_is_of_the_prefix_and_not_of_another_view(checkpoint):
    uri = checkpoint("mends", method="laclrec", augment={"crop_ratio": 0.9})
    model = read_model("mends", uri, None)
    batch = contrasted(model, NUM_PAIRS, 3)
    prefixes, _ = unpacked(batch.views[1])
    whole, _ = unpacked(batch.clean)
    assert len(prefixes.lengths) == NUM_PAIRS
    newest = {tuple(row) for row in np.split(whole.values, whole.offsets[1:-1])}
    assert {tuple(row) for row in np.split(prefixes.values, prefixes.offsets[1:-1])} <= newest
    (data,) = mapped(uri)
    assert data.kind == "data"
    assert not data.hidden[1].any()


def test_a_method_that_contrasts_nothing_is_named(checkpoint):
    uri = checkpoint("control", method="sasrec")
    with pytest.raises(ConfigError, match="control has no views"):
        mapped(uri, "control")


def test_models_that_were_contrasted_on_other_prefixes_are_named(checkpoint):
    models = [
        read_model("packed", checkpoint("packed"), None),
        read_model("papers", checkpoint("papers", samples="prefix"), None),
    ]
    with pytest.raises(ConfigError, match=r"papers .* data.samples=prefix .* packed"):
        check_alike(models)


def test_a_finished_run_means_its_best_checkpoint(checkpoint, tmp_path):
    uri = checkpoint("one")
    assert checkpoint_of(uri) == uri
    (tmp_path / "one" / "result.json").write_text(json.dumps({"best_step": 7}))
    assert checkpoint_of(str(tmp_path / "one")) == uri


def test_the_shipped_config_loads():
    config = load_config(MapViewsConfig, REPOSITORY / "configs" / "map-views.yaml", [])
    assert len(config.models) == 2


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["map_views.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        run(main)
    return ended.value.code


def test_the_job_writes_the_picture_here_and_in_mlflow(checkpoint, tmp_path, monkeypatch, capsys):
    models = [{"label": name, "uri": checkpoint(name, seed=i)} for i, name in enumerate("ab")]
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    arguments = (
        f"models={json.dumps(models)}",
        f"num_pairs={NUM_PAIRS}",
        "perplexity=5",
        f"output_uri={tmp_path}/maps",
        f"tracking.uri={uri}",
    )
    assert call(monkeypatch, *arguments) == 0
    said = capsys.readouterr().out
    stored = json.loads((tmp_path / "maps" / "views.json").read_text())
    assert [(view["model"], view["kind"]) for view in stored["views"]] == [
        ("a", "data"),
        ("a", "learned"),
        ("b", "data"),
        ("b", "learned"),
    ]
    assert f"{stored['views'][0]['alignment']:.4f}" in said
    run_id = find_run(uri, "distrl", "views")
    with speaking_to(uri, "look") as client:
        names = {file.path for file in client.list_artifacts(run_id)}
        assert client.get_run(run_id).info.status == "FINISHED"
    assert names == {"views.png", "views.csv", "views.json"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["models=[]"], "models"),
        (["models=[{label: a, uri: /nowhere/run}]"], "/nowhere/run is no checkpoint"),
        (["models=[{label: a, uri: x}, {label: a, uri: y}]"], "two have one label"),
        (["models=[{label: a, uri: x}]", "num_pairs=10"], "perplexity=30 is not below the 19"),
        (["models=[{label: a, url: x}]"], "unknown key"),
    ],
)
def test_the_job_says_in_one_line_what_is_wrong(arguments, said, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, f"output_uri={tmp_path}", *arguments) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ")
    assert said in stderr
    assert len(stderr.strip().splitlines()) == 1


def test_a_store_with_too_few_samples_is_named(checkpoint, tmp_path, monkeypatch, capsys):
    models = json.dumps([{"label": "a", "uri": checkpoint("one")}])
    assert call(monkeypatch, f"output_uri={tmp_path}", f"models={models}", "num_pairs=61") == 2
    assert "num_pairs=61" in capsys.readouterr().err


def test_semantic_views_are_shown_too_and_no_mask_hides_them(tmp_path):
    lengths = [4 + user % 9 for user in range(40)]
    neighbor_store(tmp_path / "store", lengths, k=3, max_len=MAX_LEN, dimension=4)
    base = {"name": "sasrec", **SMALL}
    config = parse_method({"name": "sracl", "text_size": 4, "base": base})
    torch.manual_seed(0)
    method = build(config, Catalog(len(lengths) * LONGEST, MAX_LEN)).eval()
    settings = DataConfig(
        store_uri=str(tmp_path / "store"), max_len=MAX_LEN, neighbors="near", num_neighbors=3
    )
    model = ShownModel("one", method, settings, len(lengths) * LONGEST)
    semantic, made = map_views(model, num_pairs=NUM_PAIRS, perplexity=5.0, seed=3)
    assert (semantic.kind, made.kind) == ("semantic", "synthesized")
    assert len(semantic.first) == NUM_PAIRS
    # Prefixes without neighbors have no sample made for them.
    assert 5 < len(made.first) < NUM_PAIRS
    for one in (semantic, made):
        assert [side.tolist() for side in one.hidden] == [[False] * len(one.first)] * 2
