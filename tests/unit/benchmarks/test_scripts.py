import subprocess
import sys
from importlib import import_module

import pytest

from benchmarks.__main__ import SCRIPTS, page
from benchmarks.prepare_engines import missing


def ran(*command):
    return subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("script", ["__main__", *SCRIPTS])
def test_every_script_explains_itself(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        import_module(f"benchmarks.{script}").main()
    assert ended.value.code == 0
    assert "--quick" in capsys.readouterr().out


def test_an_unknown_benchmark_is_refused_with_the_known_ones():
    done = ran("benchmarks", "trainign_step")
    assert done.returncode == 2
    assert "trainign_step" in done.stderr
    assert "training_step" in done.stderr


def test_without_a_gpu_nothing_is_claimed(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = ran("benchmarks.gpu_step", "--results", str(tmp_path))
    assert done.returncode == 0
    assert done.stdout == "no GPU here: nothing was measured, nothing is claimed\n"
    assert not list(tmp_path.iterdir())


def test_without_java_spark_is_named_and_the_others_are_not(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert "java" in missing("spark")
    assert missing("polars") is None
    assert missing("distrl") is None


def test_a_page_of_no_results_names_every_script(tmp_path):
    text = page(tmp_path)
    assert all(f"## {script}\n\nNot measured" in text for script in SCRIPTS)
