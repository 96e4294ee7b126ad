"""Run a study: many trainings with Ray Tune, one table, one picture.

    python jobs/study.py configs/studies/ablation.yaml
    python jobs/study.py configs/studies/ablation.yaml epochs=3 'seeds=[0]' name=ablation-short
    python jobs/study.py configs/studies/ablation.yaml --resume
    python jobs/study.py configs/studies/ablation.yaml --so-far

With --resume finished trials are not repeated, and one that was cut goes on from its checkpoint.
--so-far prints the table of the trials that are over, while the study runs or after it was cut.
--dry-run prints the study, checks every trial's config and says how many there are.
"""

from distrl.config import dump_config
from distrl.study.config import StudyConfig
from distrl.study.study import run_study, table_so_far
from distrl.study.trials import trials
from jobs.command import arguments, resolve, run


def main() -> None:
    """Resolves the study and runs it."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--resume", action="store_true", help="go on with the study of this name where it stopped"
    )
    parser.add_argument(
        "--so-far", action="store_true", help="print the table of the trials that are over, no more"
    )
    args = parser.parse_intermixed_args()
    dry_run, args.dry_run = args.dry_run, False
    study = resolve(StudyConfig, args)
    if dry_run:
        print(dump_config(study), end="")
        print(f"# {len(trials(study))} trials")
        return
    if args.so_far:
        print(table_so_far(study), end="")
        return
    run_study(study, resume=args.resume, say=lambda line: print(line, flush=True))


if __name__ == "__main__":
    run(main)
