"""The errors a user of distrl can act on.

Each takes one message, so each survives the pickling between Ray's processes. A message names the
thing at fault, its value, and what would be right.
"""


class DistrlError(Exception):
    """Anything wrong that the user can mend; jobs print it without a stack trace."""


class ConfigError(DistrlError):
    """A config key, value or combination is wrong."""


class StorageError(DistrlError):
    """A place cannot be read or written: missing, forbidden, or unreachable."""


class SchemaError(DistrlError):
    """Data does not have the promised form: a column, a type, a count or a checksum."""


class CheckpointError(DistrlError):
    """A checkpoint is missing, torn, or belongs to another run."""


class TrackingError(DistrlError):
    """MLflow cannot be reached or refuses what it is given."""


class DivergedError(DistrlError):
    """A loss is not finite; the optimizer has not moved."""
