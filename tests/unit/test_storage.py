from pathlib import Path

import pytest

from distrl import storage
from distrl.errors import StorageError


def test_a_local_path_becomes_absolute_and_a_remote_one_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs/") == str(tmp_path / "runs")
    assert storage.absolute(f"file://{tmp_path}/runs") == str(tmp_path / "runs")
    assert storage.absolute("s3://bucket/runs/") == "s3://bucket/runs"
    assert storage.join("s3://bucket/runs/", "a", "/b/") == "s3://bucket/runs/a/b"


def test_what_is_written_is_read_listed_and_deleted(tmp_path):
    place = storage.join(str(tmp_path), "new", "folder", "file.txt")
    assert not storage.exists(place)
    storage.write_bytes(place, b"first")
    storage.write_bytes(place, b"second")
    assert storage.read_bytes(place) == b"second"
    assert [info.base_name for info in storage.listing(str(tmp_path / "new" / "folder"))] == [
        "file.txt"  # and nothing half-written beside it
    ]
    storage.delete(place)
    storage.delete(place)
    assert not storage.exists(place)
    assert storage.listing(str(tmp_path / "nowhere")) == []


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"cannot read .*nothing\.txt: it does not exist"):
        storage.read_bytes(str(tmp_path / "nothing.txt"))


def test_credentials_in_a_uri_are_refused_and_not_repeated():
    with pytest.raises(StorageError, match="carries credentials") as caught:
        storage.filesystem("s3://AKIA123:topsecret@bucket/runs")
    assert "topsecret" not in str(caught.value)
    assert "AKIA123" not in str(caught.value)


def test_an_unknown_scheme_is_named():
    with pytest.raises(StorageError, match="no file system for nosuch://"):
        storage.filesystem("nosuch://bucket/runs")


def test_a_place_that_cannot_be_written_is_an_error_before_any_worker_starts(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write"):
        storage.check_writable(str(tmp_path / "file" / "runs"))
    storage.check_writable(str(tmp_path / "runs"))
    assert list((tmp_path / "runs").iterdir()) == []


def test_the_error_of_a_refused_request_says_where_credentials_come_from():
    said = storage.explained(
        "s3://b/x", "read", OSError("AWS Error ACCESS_DENIED during GetObject")
    )
    assert "permission denied" in str(said)
    assert "AWS_SECRET_ACCESS_KEY" in str(said)


def test_a_local_refusal_speaks_of_no_cloud():
    said = storage.explained(str(Path("/x")), "write", PermissionError(13, "Permission denied"))
    assert "AWS" not in str(said)
