"""Let a registered version become the champion, if it is good enough.

    python jobs/promote.py configs/promote.yaml model=quickstart version=3
    python jobs/promote.py configs/promote.yaml model=quickstart --rollback

The version and models:/<model>@champion are evaluated on the same store and split. A version that
passes the gate becomes @champion, and the old champion becomes @previous; --rollback lets the two
change places. Exit status: 0 promoted or rolled back, 1 rejected, 2 an error.
"""

from distrl.promote import PromoteConfig, promote, roll_back
from jobs.command import arguments, resolve, run

REJECTED = 1


def main() -> int:
    """Promotes, rejects or rolls back."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--rollback", action="store_true", help="make @previous the @champion again"
    )
    args = parser.parse_intermixed_args()
    config = resolve(PromoteConfig, args)
    if args.rollback:
        roll_back(config, print)
        return 0
    return 0 if promote(config, print).verdict.promoted else REJECTED


if __name__ == "__main__":
    run(main)
