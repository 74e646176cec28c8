"""Vision backbones on our attention kernels, through timm: importing this package registers every family.

    import mmeff.vision_backbones
    model = timm.create_model("nat_tiny")

One file per family; reading order: `_timm.py` is what timm asks of a registered model and how official checkpoints reach it,
`_staged.py` the surface that the new families share, then a family. timm's own names are never taken over.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from mmeff.vision_backbones._timm import create_model, registered

__all__ = ["create_model", "registered"]

# Every public module is a family, so that a new file is enough; what it lists in __all__ is offered here too.
for _info in pkgutil.iter_modules(__path__):
    if not _info.ispkg and not _info.name.startswith("_"):
        _family = importlib.import_module(f"{__name__}.{_info.name}")
        _public: dict[str, Any] = {_name: getattr(_family, _name) for _name in _family.__all__}
        globals().update(_public)
        __all__ += sorted(_public)
