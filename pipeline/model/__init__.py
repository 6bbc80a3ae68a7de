"""The two towers: texts and images to unit vectors. `load_model` is the way in; everything heavy loads when called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.errors import MissingExtra

if TYPE_CHECKING:
    from pipeline.model.identity import ModelCard
    from pipeline.model.load import describe_model, load_model
    from pipeline.model.model import Model

__all__ = ["Model", "ModelCard", "describe_model", "load_model"]

_HOMES = {"Model": "model", "ModelCard": "identity", "describe_model": "load", "load_model": "load"}
_EXTRA = {"torch", "tokenizers", "safetensors", "PIL", "huggingface_hub"}


def __getattr__(name: str) -> Any:
    """Import what was asked for, and name the extra where a package of it is missing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    try:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _EXTRA:
            raise
        raise MissingExtra(f"{error.name} is missing; install it with: pip install 'twotower[search]'.") from error
