"""What is refused before Ray starts."""

import shutil

import pytest
from pydantic import ValidationError

from distrl.config import RunConfig
from distrl.data.side_tables import part_path, write_manifest
from distrl.errors import ConfigError, SchemaError, StorageError
from distrl.train.checks import check_run
from tests.neighbor_store import neighbor_store

TEXT = 16


@pytest.fixture(scope="module")
def near(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checks") / "store"
    return folder, *neighbor_store(folder, [5, 9, 7, 6], k=4, max_len=8, dimension=TEXT)


def run_of(folder, method=None, **data):
    store = {"store_uri": str(folder), "max_len": 8, "num_neighbors": 4, "neighbors": "near"}
    asked = {"name": "sracl", "text_size": TEXT} | (method or {})
    return RunConfig.model_validate({"name": "a", "method": asked, "data": store | data})


def test_the_table_that_samples_bring_is_named(near):
    folder, manifest, table, _ = near
    assert check_run(run_of(folder), manifest) == table
    # Semantic views need no windows, and the base alone needs nothing.
    assert check_run(run_of(folder, {"inter_weight": 0}), manifest) is None
    assert check_run(run_of(folder, {"inter_weight": 0, "intra_weight": 0}), manifest) is None


def test_texts_of_another_size_are_named(near):
    folder, manifest, _, _ = near
    with pytest.raises(ConfigError, match=r"text_size=9.*vectors of 16; set method.text_size=16"):
        check_run(run_of(folder, {"text_size": 9}), manifest)


def test_a_table_without_windows_is_refused_by_what_contrasts_windows(near):
    folder, manifest, table, _ = near
    path = part_path("neighbors", "items_alone", "items", 0)
    (folder / path).parent.mkdir(parents=True)
    shutil.copy(folder / table.items[0].path, folder / path)
    items = (table.items[0].model_copy(update={"path": path}),)
    bare = {"windows": "none", "items": items, "window_parts": (), "pools": ()}
    write_manifest(str(folder), "items_alone", table.model_copy(update=bare))
    said = r"data\.neighbors=items_alone .*windows\.which=none.*windows\.which=every"
    with pytest.raises(ConfigError, match=said):
        check_run(run_of(folder, neighbors="items_alone"), manifest)
    assert check_run(run_of(folder, {"inter_weight": 0}, neighbors="items_alone"), manifest) is None


def test_a_missing_table_is_named_with_what_makes_it(near):
    folder, manifest, _, _ = near
    with pytest.raises(ConfigError, match=r"data.neighbors=far.*python jobs/retrieve.py"):
        check_run(run_of(folder, neighbors="far"), manifest)


def test_titles_that_are_not_there_or_none_are_named_before_anything_is_trained(near, tmp_path):
    folder, manifest, table, _ = near
    titles = tmp_path / "titles.jsonl"
    with pytest.raises(StorageError, match=r"titles\.jsonl"):
        check_run(run_of(folder, item_text_uri=str(titles)), manifest)
    titles.write_text("item,title\n")
    with pytest.raises(
        SchemaError, match=r"data\.item_text_uri=.*titles\.jsonl: line 1 is no JSON"
    ):
        check_run(run_of(folder, item_text_uri=str(titles)), manifest)
    titles.write_text('{"item": 3, "title": "Three"}\n')
    assert check_run(run_of(folder, item_text_uri=str(titles)), manifest) == table


def test_a_method_and_a_table_go_together(near):
    folder, _, _, _ = near
    with pytest.raises(ValidationError, match=r"data\.neighbors must name a table"):
        run_of(folder, neighbors=None)
    with pytest.raises(ValidationError, match="takes none; leave it out, or train sracl"):
        RunConfig.model_validate(
            {
                "name": "a",
                "method": {"name": "sasrec"},
                "data": {"store_uri": str(folder), "neighbors": "near"},
            }
        )
