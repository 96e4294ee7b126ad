import numpy as np
import pytest

from distrl.semantics.searched import (
    Searched,
    found_key,
    keep_facts,
    keep_search,
    kept_facts,
    kept_search,
)

NUMBERS = np.array([[4, 2, -1], [0, -1, -1]])


@pytest.fixture
def kept(tmp_path):
    path = tmp_path / "found" / "windows-00000-0-2.npz"
    keep_search(str(path), Searched(2, 1), NUMBERS)
    return path


def test_what_is_kept_comes_back_and_says_so(kept):
    searched, numbers = kept_search(str(kept), (2, 3))
    assert searched == Searched(2, 1, taken_over=True)
    assert (numbers == NUMBERS).all()


def test_nothing_and_another_shape_are_not_taken_over(kept):
    assert kept_search(f"{kept}.other", (2, 3)) is None
    assert kept_search(str(kept), (2, 4)) is None


@pytest.mark.parametrize("cut", range(0, 400, 13))
def test_a_torn_file_is_not_taken_over(kept, cut):
    content = kept.read_bytes()
    kept.write_bytes(content[: min(cut, len(content) - 1)])
    assert kept_search(str(kept), (2, 3)) is None


def test_a_pickle_is_not_read(kept):
    np.savez(kept, counts=np.array([2, 1]), numbers=np.array([[{}] * 3] * 2, dtype=object))
    assert kept_search(str(kept), (2, 3)) is None


def test_the_key_is_of_store_and_settings():
    keys = [found_key(store, {"k": k}) for store in "ab" for k in (5, 10)]
    assert len(set(keys)) == 4
    assert found_key("a", {"k": 5, "l": 1}) == found_key("a", {"l": 1, "k": 5})


@pytest.mark.parametrize("cut", range(16))
def test_what_was_measured_comes_back_unless_it_is_torn(tmp_path, cut):
    path = tmp_path / "key" / "items-index.json"
    assert kept_facts(str(path)) is None
    keep_facts(str(path), {"recall": 0.93, "num_probes": 16})
    assert kept_facts(str(path)) == {"recall": 0.93, "num_probes": 16}
    path.write_bytes(path.read_bytes()[:cut])
    assert kept_facts(str(path)) is None
