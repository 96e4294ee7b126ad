import pytest
from pydantic import ValidationError

from distrl.errors import ConfigError
from distrl.tracking.verdict import Gate, judge

CHAMPION = {"ndcg_at_10": 0.040, "hr_at_20": 0.100}


def test_no_worse_is_good_enough_for_a_gain_of_zero():
    verdict = judge(CHAMPION, CHAMPION, Gate(min_gain={"ndcg_at_10": 0.0}))
    assert verdict.promoted
    assert verdict.reason == ("ndcg_at_10 0.04000 is at least 0.04000 (min_gain.ndcg_at_10=0)")


@pytest.mark.parametrize(
    ("value", "promoted"),
    # 5 % more than 0.040 is 0.042.
    [(0.0420, True), (0.0421, True), (0.0419, False), (float("nan"), False)],
)
def test_a_gain_is_a_share_of_the_champions_value(value, promoted):
    candidate = {**CHAMPION, "ndcg_at_10": value}
    assert judge(candidate, CHAMPION, Gate(min_gain={"ndcg_at_10": 0.05})).promoted is promoted


@pytest.mark.parametrize(
    ("value", "promoted"),
    # 2 % less than 0.100 is 0.098.
    [(0.0981, True), (0.0980, True), (0.0979, False)],
)
def test_a_loss_is_a_share_of_the_champions_value(value, promoted):
    candidate = {"ndcg_at_10": 0.050, "hr_at_20": value}
    gate = Gate(min_gain={"ndcg_at_10": 0.0}, max_loss={"hr_at_20": 0.02})
    assert judge(candidate, CHAMPION, gate).promoted is promoted


def test_a_rejection_names_every_check_that_failed_and_no_other():
    candidate = {"ndcg_at_10": 0.041, "hr_at_20": 0.090}
    gate = Gate(
        min_gain={"ndcg_at_10": 0.05}, max_loss={"hr_at_20": 0.02}, floors={"hr_at_20": 0.08}
    )
    verdict = judge(candidate, CHAMPION, gate)
    assert not verdict.promoted
    assert verdict.reason == (
        "ndcg_at_10 0.04100 should be at least 0.04200 (min_gain.ndcg_at_10=0.05); "
        "hr_at_20 0.09000 should be at least 0.09800 (max_loss.hr_at_20=0.02)"
    )


def test_the_first_version_has_only_the_floors_to_pass():
    gate = Gate(min_gain={"ndcg_at_10": 0.05}, floors={"ndcg_at_10": 0.03})
    passed = judge({"ndcg_at_10": 0.030}, None, gate)
    assert passed.promoted
    assert passed.reason.startswith("the first champion: ndcg_at_10 0.03000 is at least 0.03000")
    assert not judge({"ndcg_at_10": 0.029}, None, gate).promoted


def test_the_first_version_without_floors_is_promoted_and_the_reason_says_so():
    verdict = judge({"ndcg_at_10": 0.0}, None, Gate())
    assert verdict.promoted
    assert "no floors are set" in verdict.reason


def test_a_floor_also_binds_a_version_that_beats_the_champion():
    gate = Gate(min_gain={"ndcg_at_10": 0.0}, floors={"ndcg_at_10": 0.05})
    assert not judge({"ndcg_at_10": 0.045}, CHAMPION, gate).promoted


def test_a_gate_on_a_metric_that_is_not_measured_is_an_error():
    with pytest.raises(ConfigError, match="names ndcg_at_7; measured are hr_at_20, ndcg_at_10"):
        judge(CHAMPION, CHAMPION, Gate(min_gain={"ndcg_at_7": 0.0}))


def test_a_gate_that_any_version_passes_is_refused():
    with pytest.raises(ValidationError, match="any version would win"):
        Gate(min_gain={}, floors={"ndcg_at_10": 0.1})
