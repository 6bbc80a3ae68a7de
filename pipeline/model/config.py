"""Reading `config.json` key by key: a value this project cannot honour is an error that names the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from pipeline.errors import ModelError

Number = TypeVar("Number", int, float)


class Section:
    """One object of a `config.json`, read strictly.

    Args:
        name: where the section stands, for messages, such as `vision_config`.
        values: the parsed JSON object.

    Raises:
        ModelError: where `values` is not an object.
    """

    def __init__(self, name: str, values: object) -> None:
        if not isinstance(values, Mapping):
            raise ModelError(f"config.json: {name} must be an object, not {values!r}.")
        self.name = name
        self.values: Mapping[str, object] = values

    def positive_int(self, key: str, default: int | None = None) -> int:
        """An integer of at least one."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(f"config.json: {self.name}.{key} must be a positive integer, not {value!r}.")
        return value

    def positive_float(self, key: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ModelError(f"config.json: {self.name}.{key} must be a positive number, not {value!r}.")
        return float(value)

    def boolean(self, key: str) -> bool:
        """A required true or false."""
        value = self.values.get(key)
        if not isinstance(value, bool):
            raise ModelError(f"config.json: {self.name}.{key} must be true or false, not {value!r}.")
        return value

    def only(self, key: str, *supported: object, required: bool = False) -> None:
        """Refuse every value of `key` but the supported ones; an absent optional key is fine."""
        if key not in self.values and not required:
            return
        value = self.values.get(key)
        if not any(value == one and type(value) is type(one) for one in supported):
            wanted = " or ".join(repr(one) for one in supported)
            raise ModelError(f"config.json: {self.name}.{key} is {value!r}; this project supports {wanted} only.")

    def known(self, names: frozenset[str]) -> None:
        """Refuse keys outside `names`."""
        unknown = sorted(set(self.values) - names)
        if unknown:
            raise ModelError(f"config.json: {self.name} holds unknown keys: {', '.join(unknown)}.")
