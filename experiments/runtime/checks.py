"""Checks of values that a user sets. Errors name the field."""

from experiments.runtime.errors import UserError, unknown_name


def one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuses a value that is not allowed.

    Raises:
      UserError: names the field, the allowed values, and the nearest of them.
    """
    if value not in allowed:
        raise UserError(unknown_name(field, value, allowed))


def at_least(field: str, value: float, bound: float) -> None:
    """Refuses a number below a bound.

    Raises:
      UserError: names the field and the bound.
    """
    if not value >= bound:  # also true for NaN
        raise UserError(f"{field} is {value}: it must be at least {bound}")


def at_most(field: str, value: float, bound: float) -> None:
    """Refuses a number above a bound.

    Raises:
      UserError: names the field and the bound.
    """
    if not value <= bound:
        raise UserError(f"{field} is {value}: it must be at most {bound}")


def words(field: tuple[str, ...]) -> tuple[str, ...]:
    """The words of a field: a tuple, or one string with commas, as the command line gives it."""
    return tuple(word.strip() for part in field for word in str(part).split(",") if word.strip())
