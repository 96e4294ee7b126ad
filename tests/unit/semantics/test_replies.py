import hashlib

import pytest

from distrl import storage
from distrl.errors import SchemaError, StorageError
from distrl.semantics import replies as module
from distrl.semantics.replies import Replies, Reply


def key(number):
    return hashlib.sha256(str(number).encode()).hexdigest()


def reply(number, *, malformed=False):
    return Reply(key(number), "m", malformed, f"text {number} \u00e9", number, 2 * number)


def opened(uri):
    replies = Replies(uri)
    replies.open()
    return replies


@pytest.fixture
def uri(tmp_path):
    return str(tmp_path / "replies")


def test_replies_are_found_by_key_after_a_new_start(uri):
    first = opened(uri)
    assert len(first) == 0
    assert not first.is_new(key(1))
    assert first.get([key(1)]) == [None]
    for number in range(50):
        first.add(reply(number, malformed=number % 7 == 0))
        if number % 10 == 9:
            first.flush()
    assert first.is_new(key(7))
    second = opened(uri)
    assert len(second) == 50
    assert not second.is_new(key(7))
    asked = [key(48), key(99), key(0), key(48)]
    assert second.get(asked) == [reply(48), None, reply(0, malformed=True), reply(48)]
    assert (second.tokens_in, second.tokens_out) == (48, 96)


def test_what_is_not_flushed_is_not_kept_and_nothing_is_written_for_nothing(uri):
    first = opened(uri)
    first.flush()
    first.add(reply(1))
    assert storage.listing(uri) == []
    assert len(opened(uri)) == 0
    first.flush()
    first.flush()
    assert len(storage.listing(uri)) == 1


def test_small_files_are_merged_when_opened_and_whole_ones_left(uri, monkeypatch):
    monkeypatch.setattr(module, "_WHOLE_BYTES", 6000)
    first = opened(uri)
    for number in range(40):
        first.add(reply(number))
        first.flush()
    assert len(storage.listing(uri)) == 40
    second = opened(uri)
    names = {info.base_name for info in storage.listing(uri)}
    assert 1 < len(names) < 20
    assert second.get([key(number) for number in range(40)]) == [reply(n) for n in range(40)]
    sizes = {info.base_name: info.size for info in storage.listing(uri)}
    opened(uri)
    left = {info.base_name for info in storage.listing(uri)}
    assert {name for name, size in sizes.items() if size >= 6000} <= left


def test_a_reply_that_is_there_twice_counts_once(uri):
    first, other = opened(uri), opened(uri)
    for replies in (first, other):
        replies.add(reply(3))
        replies.flush()
    second = opened(uri)
    assert len(second) == 1
    assert second.get([key(3)]) == [reply(3)]


def test_many_new_replies_are_found_before_and_after_they_are_folded(uri, monkeypatch):
    monkeypatch.setattr(module, "_FOLD", 8)
    first = opened(uri)
    first.add(reply(1000))
    first.flush()
    first.open()
    for number in range(100):
        first.add(reply(number, malformed=number % 2 == 0))
        assert first.is_new(key(number))
    assert all(first.is_new(key(number)) for number in range(100))
    assert len(first) == 101
    assert not first.is_new(key(1000))
    assert first.get([key(5), key(1000)]) == [None, reply(1000)]


def test_what_another_run_has_merged_away_is_found_again(uri, monkeypatch):
    monkeypatch.setattr(module, "_FOLD", 4)
    first = opened(uri)
    for number in range(10):
        first.add(reply(number))
        first.flush()
    first.open()
    # The open merged all into one file; one more makes two, which the next open merges.
    assert first.get([key(0)]) == [reply(0)]
    for number in range(20, 25):
        first.add(reply(number))
    first.flush()
    lay_in = set(first._files)
    opened(uri)
    assert not lay_in & {info.base_name for info in storage.listing(uri)}
    first._read.clear()
    assert first.get([key(n) for n in (0, 9, 11)]) == [reply(0), reply(9), None]
    assert (first.tokens_in, first.tokens_out) == (9, 18)
    # Its own new replies are still new, be they in the files that it has now found or not.
    assert all(first.is_new(key(n)) for n in range(20, 25))
    assert not first.is_new(key(9))
    assert len(first) == 15


def test_a_file_that_is_removed_is_a_reply_that_is_missing(uri):
    first = opened(uri)
    first.add(reply(1))
    first.flush()
    first.open()
    (name,) = first._files
    storage.delete(storage.join(uri, name))
    assert first.get([key(1)]) == [None]


def test_keys_that_end_with_zeros_are_told_apart(uri):
    ends = ["ab" + "00" * 31, "ab" + "00" * 14 + "01" + "00" * 16, "ab" * 16 + "00" * 16]
    first = opened(uri)
    first.add(Reply(ends[0], "m", False, "zero", 1, 1))
    first.flush()
    second = opened(uri)
    assert [found and found.text for found in second.get(ends)] == ["zero", None, None]
    # Equal in their first 16 bytes alone: what is found is compared in whole.
    assert second.get(["ab" + "00" * 15 + "11" * 16]) == [None]


@pytest.mark.parametrize("content", [b"", b"PAR1 torn", b"x" * 5000])
def test_a_torn_file_is_named(uri, content):
    storage.write_bytes(f"{uri}/part-00000000000000000001-aa.parquet", content)
    with pytest.raises(SchemaError, match=r"part-.*-aa\.parquet is no file of replies"):
        opened(uri)


def test_replies_are_held_until_they_can_be_written(uri, monkeypatch):
    first = opened(uri)
    first.add(reply(1))

    def full(place, content):
        raise StorageError(f"cannot write {place}: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", full)
        with pytest.raises(StorageError, match="No space left"):
            first.flush()
    first.flush()
    assert opened(uri).get([key(1)]) == [reply(1)]
