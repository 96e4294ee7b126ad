"""Windows, worked by hand."""

from itertools import pairwise

import numpy as np
import pytest

from distrl.ops.ragged import Ragged
from distrl.ops.windows import window_items, windows_of

LENGTHS = np.array([5, 3, 6, 2])


def pairs(**settings: bool | str) -> list[tuple[int, int]]:
    found = windows_of(LENGTHS, **settings)  # pyright: ignore[reportArgumentType]
    return list(zip(found.row.tolist(), found.length.tolist(), strict=True))


@pytest.mark.parametrize(
    ("which", "held_out", "expected"),
    [
        ("every", False, [(0, 1), (0, 2), (2, 1), (2, 2), (2, 3)]),
        ("last", False, [(0, 2), (2, 3)]),
        (
            "every",
            True,
            [(0, n) for n in (1, 2, 3, 4)]
            + [(1, 1), (1, 2)]
            + [(2, n) for n in (1, 2, 3, 4, 5)]
            + [(3, 1)],
        ),
        (
            "last",
            True,
            [(0, 2), (0, 3), (0, 4), (1, 1), (1, 2), (2, 3), (2, 4), (2, 5), (3, 1)],
        ),
    ],
)
def test_windows_are_what_a_target_follows(
    which: str, held_out: bool, expected: list[tuple[int, int]]
) -> None:
    assert pairs(which=which, held_out=held_out) == expected


def test_a_window_shows_its_newest_items() -> None:
    sequences = Ragged.of([[1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11, 12, 13, 14]])
    found = windows_of(sequences.lengths, "every")
    shown = window_items(sequences, found, max_len=2)
    assert [shown.values[a:b].tolist() for a, b in pairwise(shown.offsets)] == [
        [1],
        [1, 2],
        [9],
        [9, 10],
        [10, 11],
    ]


def test_beauty_has_as_many_windows_as_the_specification_counts(beauty_file):
    lengths = np.array([len(line.split()) - 1 for line in beauty_file.read_text().splitlines()])
    assert len(windows_of(lengths, "every").row) == 131_413
    assert len(windows_of(lengths, "every", held_out=True).row) == 176_139
    assert len(windows_of(lengths, "last").row) == 22_363
