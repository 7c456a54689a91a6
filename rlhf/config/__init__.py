"""Settings of a run: one file per section, typed and documented where they are declared.

`load(path, overrides)` reads one YAML file, applies `section.key=value` overrides, and returns a frozen `Settings`, or
raises a `ConfigError` that names the file, the field and the remedy; `show(settings)` is its inverse. Owns no run state
and imports no torch, so that a mistake is found in a fraction of a second. Depends on no other room.
"""

from rlhf.config.extras import MissingPackageError
from rlhf.config.loader import ConfigError, UserError, load, show
from rlhf.config.settings import Settings

__all__ = ["ConfigError", "MissingPackageError", "Settings", "UserError", "load", "show"]
