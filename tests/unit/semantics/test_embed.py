"""What a job that embeds looks at before Ray starts."""

import json

import pytest

from distrl.errors import SchemaError
from distrl.semantics.embed import embed
from distrl.semantics.embed_config import EmbedConfig
from tests.store_factory import make_store


class RayIsNextError(Exception):
    """All that can be checked without Ray has been."""


def ray_is_next():
    raise RayIsNextError


@pytest.fixture
def config(tmp_path):
    make_store(tmp_path / "s", [[1, 2, 3, 4], [4, 3, 2, 1]])
    (tmp_path / "texts.jsonl").write_text(json.dumps({"item": "item-1", "text": "soap"}))
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    return EmbedConfig(
        store_uri=str(tmp_path / "s"),
        name="e",
        item_text_uri=str(tmp_path / "texts.jsonl"),
        embedder={"kind": "transformers", "folder": str(tmp_path / "model")},
    )


def test_a_torn_manifest_is_named_and_replaced_when_told_to(config, tmp_path):
    manifest = tmp_path / "s/embeddings/e/manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text('{"kind": "embeddi')
    with pytest.raises(SchemaError, match=r"manifest\.json is no manifest .* with --overwrite"):
        embed(config, connect=ray_is_next)
    with pytest.raises(RayIsNextError):
        embed(config, overwrite=True, connect=ray_is_next)
