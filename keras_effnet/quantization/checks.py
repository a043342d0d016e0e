"""How configurations refuse values."""

from typing import Any


def check_values(config: Any, **allowed: tuple[bool, str]) -> None:
    """Raises ValueError for the first value of a configuration that is not allowed.

    Args:
        config: A dataclass.
        **allowed: By field, whether its value is allowed, and what is.
    """
    for name, (valid, what) in allowed.items():
        if not valid:
            raise ValueError(f"`{name}` must be {what}. Received: {getattr(config, name)!r}")
