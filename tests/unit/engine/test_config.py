import math

import pytest
from pydantic import ValidationError

from distrl.engine.config import EngineConfig
from distrl.errors import ConfigError


def test_no_number_is_left_to_deepspeeds_defaults():
    keys = EngineConfig().deepspeed_dict(micro_batch_size=64, num_workers=2)
    zero = keys.pop("zero_optimization")
    assert keys == {
        "train_micro_batch_size_per_gpu": 64,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 128,
        "gradient_clipping": 0.0,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "gradient_allreduce_op": "mean",
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "fp16": {"enabled": False},
        "bf16": {
            "enabled": False,
            "bf16_master_weights_and_grads": False,
            "bf16_optimizer_states": False,
            "check_grad_overflow": True,
        },
        "zero_allow_untested_optimizer": True,
        "wall_clock_breakdown": False,
    }
    assert zero["stage"] == 1
    assert zero["memory_efficient_linear"] is False


def test_what_is_configured_reaches_deepspeed():
    config = EngineConfig(zero_stage=3, precision="bf16", max_grad_norm=2.5)
    keys = config.deepspeed_dict(micro_batch_size=8, num_workers=1)
    assert keys["zero_optimization"]["stage"] == 3
    assert keys["bf16"]["enabled"] is True
    assert keys["gradient_clipping"] == 2.5


def test_a_part_may_have_a_learning_rate_of_its_own():
    config = EngineConfig(lr=1e-3, lr_of={"augmenters": 1e-4})
    assert (config.lr_for("encoder"), config.lr_for("augmenters")) == (1e-3, 1e-4)


def test_a_learning_rate_for_no_part_is_named():
    config = EngineConfig(lr_of={"augmenter": 1e-4})
    with pytest.raises(ConfigError, match=r"names augmenter; .* are augmenters, encoder"):
        config.check_parts(["encoder", "augmenters"])


def test_yamls_1e_3_is_a_number():
    assert EngineConfig.model_validate({"lr": "1e-3"}).lr == 0.001


@pytest.mark.parametrize(
    "settings", [{"zero_stage": 0}, {"betas": [0.9, 1.0]}, {"lr": 0}, {"clip": 1.0}]
)
def test_what_cannot_be_is_refused(settings):
    with pytest.raises(ValidationError):
        EngineConfig.model_validate(settings)


@pytest.mark.parametrize(
    ("decay", "epoch", "factor"),
    [
        ("linear", 0.0, 0.0),
        ("linear", 1.0, 0.5),
        ("linear", 2.0, 0.8),
        ("linear", 5.0, 0.5),
        ("linear", 12.0, 0.0),
        ("cosine", 2.5, (1 + math.cos(math.pi / 4)) / 2),
        ("cosine", 10.0, 0.0),
    ],
)
def test_learning_rates_rise_and_fall(decay, epoch, factor):
    config = EngineConfig(warmup_epochs=2.0, decay=decay, decay_epochs=10.0)
    assert config.lr_factor(epoch) == pytest.approx(factor)


def test_learning_rates_stay_unless_told_otherwise():
    assert [EngineConfig().lr_factor(epoch) for epoch in (0.0, 3.5, 100.0)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("settings", [{"decay": "linear"}, {"decay_epochs": 3.0}])
def test_a_decay_without_an_end_and_an_end_without_a_decay_are_errors(settings):
    with pytest.raises(ValidationError, match="set both, or neither"):
        EngineConfig(**settings)
