from distrl.data import ray_stage
from distrl.data.ray_stage import Stage


def test_a_stage_says_rate_and_time_left(monkeypatch):
    times = iter([0.0, 4.0, 4.0, 4.0, 10.0])
    monkeypatch.setattr(ray_stage.time, "monotonic", lambda: next(times))
    lines = []
    with Stage("search", 5, lines.append) as stage:
        stage.advance(2, 2000)
    assert lines == [
        "search                       2/5 tasks          2,000 rows     4.0 s, 500/s, "
        "about 6 s left",
        "search                       2/5 tasks          2,000 rows    10.0 s, 200/s, "
        "about 15 s left",
    ]
