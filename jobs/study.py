"""Run a study: many trainings with Ray Tune, one table, one picture.

    python jobs/study.py configs/studies/ablation.yaml
    python jobs/study.py configs/studies/ablation.yaml epochs=3 'seeds=[0]' name=ablation-short
    python jobs/study.py configs/studies/ablation.yaml --resume

With --resume finished trials are not repeated, and one that was cut goes on from its checkpoint.
--dry-run prints the study, checks every trial's config and says how many there are.
"""

from distrl.config import dump_config
from distrl.study.config import StudyConfig
from distrl.study.study import run_study
from distrl.study.trials import trials
from jobs.command import arguments, resolve, run


def main() -> None:
    """Resolves the study and runs it."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--resume", action="store_true", help="go on with the study of this name where it stopped"
    )
    args = parser.parse_intermixed_args()
    dry_run, args.dry_run = args.dry_run, False
    study = resolve(StudyConfig, args)
    if dry_run:
        print(dump_config(study), end="")
        print(f"# {len(trials(study))} trials")
        return
    run_study(study, resume=args.resume, say=lambda line: print(line, flush=True))


if __name__ == "__main__":
    run(main)
