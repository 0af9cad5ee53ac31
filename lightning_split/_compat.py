"""Lightning under both of its names, ``lightning.pytorch`` and ``pytorch_lightning``.

The two packages hold the same code twice, so a class of the one is not a class of the other. Either
Trainer accepts either callback, but LightningCLI and many a user's code check types. So the callback
has both bases where both are installed, and whatever is told apart by its class is told apart in both.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException as _Misconfiguration
from lightning_utilities.core import rank_zero
from lightning_utilities.core.overrides import is_overridden
from torch import nn

_log = rank_zero.log
try:
    import pytorch_lightning as _other
except ImportError:
    _other = None  # type: ignore[assignment]
# Whichever of the two is imported last takes over the messages of both. This import is ours, not the
# user's, who may have set the level of the other's logger.
rank_zero.log = _log

__all__ = ["Callback", "MisconfigurationException", "is_module", "is_trainer", "overrides", "twins"]


def twins(path: str) -> tuple[Any, ...]:
    """The classes of one name in both packages.

    Args:
        path: As in ``"callbacks.ModelPruning"``, from either package's root.

    Returns:
        One class, or two where both packages are installed; none if this version has no such class.
    """
    module, _, name = path.rpartition(".")
    found: list[Any] = []
    for package in (pl, _other):
        if package is None:
            continue
        try:
            home = importlib.import_module(f"{package.__name__}.{module}" if module else package.__name__)
        except ImportError:
            continue
        if hasattr(home, name):
            found.append(getattr(home, name))
    return tuple(found)


_MODULES = twins("LightningModule")
_TRAINERS = twins("Trainer")

if TYPE_CHECKING:
    Callback = pl.Callback
    MisconfigurationException = _Misconfiguration
else:
    Callback = type(
        "Callback",
        twins("Callback"),
        {"__module__": __name__, "__doc__": "A callback of both packages."},
    )
    MisconfigurationException = type(
        "MisconfigurationException",
        twins("utilities.exceptions.MisconfigurationException"),
        {"__module__": __name__, "__doc__": "What both packages raise if a user's set-up cannot work."},
    )


def is_module(value: Any) -> bool:
    """Whether something is a LightningModule of either package."""
    return isinstance(value, _MODULES)


def is_trainer(value: Any) -> bool:
    """Whether something is a Trainer of either package."""
    return isinstance(value, _TRAINERS)


def overrides(module: nn.Module, method: str) -> bool:
    """Whether a LightningModule has a method of its own in place of Lightning's empty one."""
    return all(is_overridden(method, module, base) for base in _MODULES)
