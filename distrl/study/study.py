"""A study from its config to its table, its picture and its one MLflow run."""

import contextlib
import json
import re
from collections.abc import Sequence
from typing import Any

from distrl.cluster import Need, check_capacity, connect
from distrl.config import dump_config
from distrl.data.store import check_sizes, manifest_hash, read_manifest
from distrl.errors import CheckpointError, ConfigError, DistrlError, TrackingError
from distrl.storage import absolute, check_writable, exists, join, read_bytes, write_bytes
from distrl.study.config import StudyConfig
from distrl.study.judging import judge_all, judged_so_far
from distrl.study.picture import picture
from distrl.study.table import VALIDATION, Row, as_csv, as_markdown, rows
from distrl.study.trials import Trial, trials
from distrl.study.tuning import tune_trials
from distrl.tracking import runs
from distrl.tracking.config import artifact_location, resolve_tracking_uri
from distrl.tracking.connection import check_reachable
from distrl.tracking.run_log import RunLog
from distrl.train.checks import check_run
from distrl.watch import Say

START_FILE = "study.json"
CHANGEABLE = ("cpus_per_trial", "max_concurrent", "max_failures", "relative", "tracking")
"""What may differ when a study is resumed: it decides no figure."""
FLUSH_S = 60.0


def run_study(study: StudyConfig, *, resume: bool, say: Say) -> list[Row]:
    """Trains and judges every trial, and writes the table and the picture.

    Args:
        study: The resolved config.
        resume: Go on with the study of this name; without it the name must be new.
        say: Takes lines for the user.

    Returns:
        The table.

    Raises:
        ConfigError: If a trial's config is wrong, the name is used, or a resumed study was another.
        StorageError: If a store or the storage cannot be reached.
        SchemaError: If a store is torn.
        TrackingError: If MLflow cannot be reached.
        DistrlError: If no trial came to an end.
    """
    study = study.model_copy(update={"storage_uri": absolute(study.storage_uri)})
    found = trials(study)
    hashes = _check(found)
    check_writable(study.storage_uri)
    uri = join(study.storage_uri, study.name)
    tracking_uri = resolve_tracking_uri(study.tracking, study.storage_uri)
    check_reachable(tracking_uri)
    run_id = _open(study, uri, hashes, tracking_uri, resume=resume)
    say(f"study {study.name}: {len(found)} trials in {uri}")
    try:
        table = _run(study, found, uri, tracking_uri, run_id, resume=resume, say=say)
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        with contextlib.suppress(TrackingError):  # what went wrong first is what must be read
            runs.finish_run(tracking_uri, run_id, status)
        raise
    runs.finish_run(tracking_uri, run_id, "FINISHED")
    return table


def table_so_far(study: StudyConfig) -> str:
    """What the trials that are over have come to, while others train or after a cut; as Markdown.

    Reads only what the trials wrote, and writes nothing. A search's trials that were ended early
    are judged at the study's end, and missing until then.

    Args:
        study: Its name and place count; the rest is taken from the study as it was begun.

    Raises:
        ConfigError: If there is no such study, or none of its trials is over yet.
    """
    uri = join(absolute(study.storage_uri), study.name)
    begun = StudyConfig.model_validate(_begun(study.name, uri)["config"])
    found = trials(begun)
    judged = judged_so_far(found, uri)
    if not judged:
        raise ConfigError(f"name={study.name}: none of its {len(found)} trials is over yet")
    table = _best_first(begun, rows(found, judged, by_length=begun.by_length))
    cutoffs = next(iter(found[0].evaluations.values())).cutoffs
    return f"{as_markdown(table, cutoffs)}\n{len(judged)} of {len(found)} trials are in it.\n"


def _begun(name: str, uri: str) -> dict[str, Any]:
    """What is on record of a study's beginning."""
    if not exists(join(uri, START_FILE)):
        raise ConfigError(f"name={name}: there is no study in {uri}")
    return json.loads(read_bytes(join(uri, START_FILE)))


def _run(
    study: StudyConfig,
    found: Sequence[Trial],
    uri: str,
    tracking_uri: str,
    run_id: str,
    *,
    resume: bool,
    say: Say,
) -> list[Row]:
    connect(study.cpus_per_trial)
    check_capacity([Need("trials", {"CPU": study.cpus_per_trial})], keys="cpus_per_trial")
    problems = tune_trials(study, found, uri, resume=resume, say=say)
    for name, problem in problems.items():
        say(f"warning: trial {name} failed and is not in the table: {problem}")
    trained = [trial for trial in found if trial.name not in problems]
    if not trained:
        raise DistrlError(f"study {study.name}: all {len(found)} trials failed")
    judged = judge_all(trained, uri, study.cpus_per_trial, say)
    table = rows(found, judged, by_length=study.by_length)
    cutoffs = next(iter(found[0].evaluations.values())).cutoffs
    markdown = as_markdown(_best_first(study, table), cutoffs)
    image = picture(study, table, 10 if 10 in cutoffs else cutoffs[-1])
    files = {"table.csv": as_csv(table).encode(), "table.md": markdown.encode()}
    files |= {"picture.png": image}
    for name, content in files.items():
        write_bytes(join(uri, name), content)
    _log(study, table, files, tracking_uri, run_id)
    say(f"\n{markdown}")
    for name in files:
        say(join(uri, name))
    return table


def _best_first(study: StudyConfig, table: Sequence[Row]) -> list[Row]:
    """A search is ordered by what it chooses by, anything else as it was written."""
    if not study.search:
        return list(table)
    return sorted(table, key=lambda row: -row.means[VALIDATION])


def _check(found: Sequence[Trial]) -> dict[str, str]:
    """Refuses on the driver what a trial would refuse; hash of the manifest of each store."""
    manifests = {}
    for trial in found:
        uri, run = trial.run.data.store_uri, trial.run
        if uri not in manifests:
            manifests[uri] = read_manifest(uri)
            check_sizes(uri, manifests[uri])
        check_run(run, manifests[uri])
    return {uri: manifest_hash(manifest) for uri, manifest in manifests.items()}


def _open(
    study: StudyConfig, uri: str, hashes: dict[str, str], tracking_uri: str, *, resume: bool
) -> str:
    """Starts or takes up the study; the id of its one MLflow run."""
    settings = study.model_dump(mode="json")
    if resume:
        before = _begun(study.name, uri)
        _check_same(uri, before, settings, hashes)
        runs.resume_run(tracking_uri, before["run_id"])
        return before["run_id"]
    if exists(uri):
        raise ConfigError(
            f"name={study.name}: {uri} exists; choose another name, or give --resume to go on with "
            "it"
        )
    run_id = runs.create_run(
        tracking_uri,
        study.name,
        study.name,
        runs.environment_tags(),
        artifacts=artifact_location(study.tracking, tracking_uri),
    )
    log = RunLog(tracking_uri, run_id)
    params = runs.flat_params(study)
    log.log_params({_as_name(key): value for key, value in params.items()})
    log.log_text("study.yaml", dump_config(study))
    log.close(FLUSH_S)
    record = {"run_id": run_id, "config": settings, "stores": hashes}
    write_bytes(join(uri, START_FILE), json.dumps(record, indent=1).encode())
    return run_id


def _check_same(
    uri: str, before: dict[str, Any], settings: dict[str, Any], hashes: dict[str, str]
) -> None:
    differ = [
        f"{key}={value!r} (was {before['config'].get(key)!r})"
        for key, value in settings.items()
        if key not in CHANGEABLE and value != before["config"].get(key)
    ]
    if differ:
        raise ConfigError(f"{uri} cannot be resumed with another config: {', '.join(differ)}")
    if hashes != before["stores"]:
        raise CheckpointError(
            f"{uri} was begun on other stores, or on what they held before: "
            f"{', '.join(before['stores'])}"
        )


def _log(
    study: StudyConfig,
    table: Sequence[Row],
    files: dict[str, bytes],
    tracking_uri: str,
    run_id: str,
) -> None:
    log = RunLog(tracking_uri, run_id)
    for row in table:
        place = [row.label]
        place += [row.evaluation] if len(study.evaluations) > 1 else []
        place += [row.length] if study.by_length else []
        name = _as_name("/".join(place))
        log.log_metrics(0, {f"{name}/{key}": value for key, value in row.means.items()})
    for file, content in files.items():
        log.log_bytes(file, content)
    log.close(FLUSH_S)


def _as_name(words: str) -> str:
    """Words of the user's as MLflow takes them for a name: without =, %, commas and the like."""
    return re.sub(r"[^\w\-./ ]", "_", words.replace("=", " ").replace("%", "pct"))
