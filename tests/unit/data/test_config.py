import pytest
from pydantic import ValidationError

from distrl.data.config import AugmentConfig, DataConfig


def test_a_row_must_hold_the_longest_sequence():
    with pytest.raises(ValidationError, match="row_length=40 is below max_len=50"):
        DataConfig(store_uri="x", row_length=40)
    assert DataConfig(store_uri="x").slots == 50
    assert DataConfig(store_uri="x", row_length=64).slots == 64


def test_nobody_substitutes_unless_asked_to():
    assert AugmentConfig().operations == ("crop", "mask", "reorder")


def test_two_different_views_need_two_operations():
    with pytest.raises(ValidationError, match=r"operations=\['crop'\] has one; .* distinct=false"):
        AugmentConfig(operations=("crop",))
    assert AugmentConfig(operations=("crop",), distinct=False).operations == ("crop",)


@pytest.mark.parametrize("operations", [(), ("crop", "mask", "crop")])
def test_operations_are_some_and_each_once(operations):
    with pytest.raises(ValidationError, match="is empty or repeats one"):
        AugmentConfig(operations=operations)


@pytest.mark.parametrize(
    ("key", "wrong", "right"),
    [
        ("crop_ratio", 1.0, 0.0),
        ("mask_ratio", 1.0, 0.99),
        ("mask_ratio", -0.1, 0.0),
        ("reorder_ratio", 1.01, 1.0),
        ("substitute_ratio", 1.01, 1.0),
        ("substitute_among", 0, 1),
    ],
)
def test_a_ratio_outside_its_range_is_named(key, wrong, right):
    with pytest.raises(ValidationError, match=key):
        AugmentConfig(**{key: wrong})
    assert AugmentConfig(**{key: right}).model_dump()[key] == right
