# SPDX-License-Identifier: Apache-2.0
"""Classes derived at run time from a base of ours and the class of a module, which can be copied and pickled."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn


class Swapped(nn.Module):
    """Base of the class that a module gets by ``module.__class__ = swapped_class(base, type(module))``."""

    original: ClassVar[type[nn.Module]]

    @classmethod
    def attributes(cls, original: type[nn.Module]) -> dict[str, Any]:
        """Return the class attributes for this original."""
        return {}

    @classmethod
    def label(cls, original: type[nn.Module]) -> str:
        """Return the name of the derived class."""
        return f"Patched{original.__name__}"

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # the class has no importable name: pickle and deepcopy derive it again
        reduced = super().__reduce_ex__(2)
        assert isinstance(reduced, tuple)
        return (_new, (type(self).__mro__[1], self.original), *reduced[2:])


_classes: dict[tuple[type[Swapped], type[nn.Module]], type[Swapped]] = {}


def swapped_class(base: type[Swapped], original: type[nn.Module]) -> Any:
    """Return the subclass of both, cached."""
    if (base, original) not in _classes:
        names = {"__module__": original.__module__, "original": original, **base.attributes(original)}
        made = type(base.label(original), (base, original), names)
        _classes.setdefault((base, original), made)  # if two threads race, both get the first
    return _classes[base, original]


def _new(base: type[Swapped], original: type[nn.Module]) -> Swapped:
    cls = swapped_class(base, original)
    return cls.__new__(cls)
