"""Several jobs that are the first to use an MLflow file."""

import multiprocessing

import pytest

from distrl.tracking.connection import check_reachable, client

pytestmark = pytest.mark.slow


def use(uri, barrier, failures):
    barrier.wait(100)
    try:
        check_reachable(uri)
    except Exception as error:
        failures.put(repr(error))
    else:
        failures.put(None)


def test_jobs_that_start_together_all_find_a_whole_database(tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    context = multiprocessing.get_context("spawn")
    barrier, failures = context.Barrier(3), context.Queue()
    jobs = [
        context.Process(target=use, args=(uri, barrier, failures), daemon=True) for _ in range(3)
    ]
    for job in jobs:
        job.start()
    found = [failures.get(timeout=120) for _ in jobs]
    for job in jobs:
        job.join()
    assert found == [None, None, None]
    assert [e.name for e in client(uri).search_experiments()] == ["Default"]
