"""What the training jobs share: the config, the method's name, and the run."""

from distrl.config import RunConfig
from distrl.errors import ConfigError
from distrl.launch import fit
from jobs.command import arguments, resolve


def train(method: str, doc: str | None) -> None:
    """Trains one method as its config says.

    Raises:
        ConfigError: If the config is wrong or names another method.
    """
    parser = arguments(doc)
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run of this name where it stopped"
    )
    args = parser.parse_intermixed_args()
    config = resolve(RunConfig, args)
    if config.method.name != method:
        raise ConfigError(
            f"method.name={config.method.name} in {args.config}: this job trains {method}"
        )
    fit(config, resume=args.resume, say=lambda line: print(line, flush=True))
