from pathlib import Path

import pytest

from distrl.config import dump_config, load_config
from distrl.errors import ConfigError
from distrl.semantics.embed_config import EmbedConfig

CONFIGS = Path(__file__).parents[3] / "configs" / "embed"
BEAUTY = CONFIGS / "beauty.yaml"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_embed_config_loads_and_is_read_back_from_its_dump(path, tmp_path):
    config = load_config(EmbedConfig, path, [])
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_config(config))
    assert load_config(EmbedConfig, dumped, []) == config


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["name=a/b"], "name='a/b' becomes a folder"),
        (["item_text_uri="], "exactly one of them holds the items' texts"),
        (["descriptions=d"], "exactly one of them holds the items' texts"),
        (["windows.source=user_states"], "user_states needs embedder.kind=trained"),
        (["windows.source=descriptions"], "`descriptions` names no table"),
        (["embedder.folder=/m"], "exactly one of them holds the weights"),
        (["embedder.kind=hugging"], "hugging"),
        (["embedder={kind: trained, checkpoint_uri: c}"], "reads no texts"),
        (
            ["embedder={kind: trained, checkpoint_uri: c, model_uri: m}", "item_text_uri="],
            "exactly one of them names the model",
        ),
        (
            [
                "embedder={kind: trained, checkpoint_uri: c}",
                "item_text_uri=",
                "windows.source=joined_texts",
            ],
            "windows.source=joined_texts is text",
        ),
        (
            ["embedder={kind: endpoint, base_url: 'http://u:pass@h/v1', model: m}"],
            "base_url carries credentials",
        ),
        (["embedder={kind: endpoint, base_url: h, model: m}"], "base_url is no address"),
        (["max_len=0"], "max_len=0"),
    ],
)
def test_what_cannot_be_embedded_is_named(overrides, said):
    with pytest.raises(ConfigError) as caught:
        load_config(EmbedConfig, BEAUTY, overrides)
    assert said in str(caught.value)
    assert "pass@" not in str(caught.value)


def test_what_windows_are_made_of_follows_from_the_embedder():
    of_text = load_config(EmbedConfig, BEAUTY, ["windows.source="])
    assert (of_text.source, of_text.windows_need_items) == ("mean_of_items", True)
    trained = ["embedder={kind: trained, checkpoint_uri: c}", "item_text_uri="]
    of_users = load_config(EmbedConfig, BEAUTY, [*trained, "windows.source="])
    assert (of_users.source, of_users.windows_need_items) == ("user_states", False)


def test_speed_and_places_are_no_part_of_what_a_table_is_made_with():
    config = load_config(EmbedConfig, BEAUTY, [])
    faster = ["embedder.batch_size=7", "concurrency=3", "gpus_per_actor=1", "store_uri=elsewhere"]
    same = load_config(EmbedConfig, BEAUTY, faster)
    assert same.content_settings() == config.content_settings()
    other = load_config(EmbedConfig, BEAUTY, ["embedder.max_tokens=16"])
    assert other.content_settings() != config.content_settings()
    key = ["embedder={kind: endpoint, base_url: 'http://h/v1', model: m, api_key_env: SECRET_NAME}"]
    endpoint = load_config(EmbedConfig, BEAUTY, key)
    assert "SECRET_NAME" not in str(endpoint.content_settings())
