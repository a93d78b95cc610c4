# SPDX-License-Identifier: Apache-2.0
"""Packed folders in transformers' ``from_pretrained``, whichever of the two packages is imported first.

``register()`` runs at ``import obs_kernels``. Where transformers has loaded its quantizer registry already, the classes
of ``quantizer`` are entered at once; else a finder waits on ``sys.meta_path`` for the import of that one module, lets
the usual finders load it, enters the classes, and leaves. So nothing is imported that the program does not import.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

log = logging.getLogger("obs_kernels")
REGISTRY = "transformers.quantizers.auto"


def register() -> None:
    """Enter our quantizer now, or as soon as transformers imports its registry; idempotent."""
    module = sys.modules.get(REGISTRY)
    if module is not None and hasattr(module, "register_quantizer"):
        _enter()
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())


def _enter() -> None:
    try:
        import obs_kernels.sparse.quantizer  # noqa: F401 - its decorators enter the classes
    except ImportError as error:  # a transformers whose registry is another: obs_kernels.load needs none
        log.info("from_pretrained of transformers takes no packed folders here: %s; use obs_kernels.load", error)


class _RegistryFinder(MetaPathFinder):
    """Finds nothing itself; wraps the loader that another finder gives for the registry."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of the registry with our loader around its own; None for every other module."""
        if fullname != REGISTRY:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if finder is self or find is None else find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _EnteringLoader(spec.loader, self)
                return spec
        return None


class _EnteringLoader(Loader):
    """Runs the module by its own loader, then enters our classes."""

    def __init__(self, loader: Loader, finder: _RegistryFinder) -> None:
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the module's own loader, which has its place back from then on."""
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        _enter()


__all__ = ["REGISTRY", "register"]
