"""Where methods are found: the rooms of this package, and the entry-point group `mmeff.methods` of any other.

A method registers by decorating its config class:

    @register
    @dataclass(frozen=True, kw_only=True)
    class FastV(PruningMethod): ...

The class is the key; its lower-case name is what YAML and the command line say. Third parties put
`name = "package.module"` (or `"package.module:Class"`) under `[project.entry-points."mmeff.methods"]`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from mmeff.config import MethodConfig, normalise
from mmeff.errors import UnknownMethod, suggest

ROOMS = ("mmeff.pruning", "mmeff.diffusion_attn", "mmeff.vision_backbones")
GROUP = "mmeff.methods"

_methods: dict[str, type[MethodConfig]] = {}
_problems: dict[str, str] = {}  # entry points that failed to import, and why
_loaded = False

MethodT = TypeVar("MethodT", bound=type[MethodConfig])


def register(cls: MethodT) -> MethodT:
    """Class decorator that adds a method.

    Raises:
        TypeError: not a MethodConfig with a stage.
        ValueError: another class of the same name is registered.
    """
    if not (isinstance(cls, type) and issubclass(cls, MethodConfig) and cls.stage):
        raise TypeError(f"register needs a subclass of MethodConfig with a stage, got {cls!r}")
    other = _methods.get(cls.name())
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"the method name {cls.name()!r} is taken by {other.__module__}.{other.__qualname__}")
    _methods[cls.name()] = cls
    return cls


def import_methods(package: str) -> dict[str, type[MethodConfig]]:
    """Import every module of a package (subpackages and names with a leading underscore apart) and return what they
    registered, by class name."""
    module = importlib.import_module(package)
    for info in pkgutil.iter_modules(module.__path__):
        if not info.ispkg and not info.name.startswith("_"):
            importlib.import_module(f"{package}.{info.name}")
    return {cls.__name__: cls for cls in _methods.values() if cls.__module__.startswith(package + ".")}


def _load() -> None:
    global _loaded
    if _loaded:
        return
    for room in ROOMS:
        import_methods(room)
    _loaded = True  # only now: a room that cannot be imported must fail each time, not leave half a registry
    for point in entry_points(group=GROUP):
        try:
            found = point.load()
            if isinstance(found, type):  # "package.module:Class"
                register(found)
        except (
            Exception
        ) as error:  # a broken plugin must not take the library down; it is named where methods are listed
            _problems[f"{point.name} = {point.value}"] = f"{type(error).__name__}: {error}"


def all_methods() -> dict[str, type[MethodConfig]]:
    """Every registered method by name, rooms in order, then by name."""
    _load()
    order = {room.rsplit(".", 1)[1]: i for i, room in enumerate(ROOMS)}
    return dict(sorted(_methods.items(), key=lambda item: (order.get(item[1].stage, len(order)), item[0])))


def broken_plugins() -> dict[str, str]:
    """Entry points that could not be imported, with the error."""
    _load()
    return dict(_problems)


def get(name: str) -> type[MethodConfig]:
    """The config class of a method name; case and separators do not matter.

    Raises:
        UnknownMethod: nothing has this name; near matches and the full list are in the message.
    """
    methods = all_methods()
    found = methods.get(normalise(name))
    if found is None:
        names = [cls.__name__ for cls in methods.values()]
        broken = f" Plugins that failed to load: {'; '.join(_problems)}." if _problems else ""
        raise UnknownMethod(f"no method is called {name!r}.{suggest(name, names)} Known: {', '.join(names)}.{broken}")
    return found


def build(method: Any, **fields: Any) -> MethodConfig:
    """A config from a config, its class, its name, a mapping with a `method` key, or a YAML file's path.

    Args:
        method: what names the method; fields: values that replace those of a config or the defaults of a class.
    Raises:
        UnknownMethod, TypeError, ValueError: as `get` and the config class say.
    """
    if isinstance(method, MethodConfig):
        return method.replace(**fields) if fields else method
    if isinstance(method, type) and issubclass(method, MethodConfig):
        return method.from_dict(fields)
    if isinstance(method, Mapping):
        if "method" not in method:
            raise ValueError(f"a method mapping needs the key 'method', got keys {sorted(map(str, method))}")
        return get(str(method["method"])).from_dict({**method, **fields})
    if isinstance(method, Path) or (isinstance(method, str) and method.endswith((".yaml", ".yml"))):
        return build(read_yaml(method), **fields)
    if isinstance(method, str):
        return get(method).from_dict(fields)
    raise TypeError(f"a method is a config, its class, its name, a mapping or a YAML path, got {type(method).__name__}")


def read_yaml(path: str | Path) -> Mapping[str, Any]:
    """The mapping in a YAML file, read safely.

    Raises:
        FileNotFoundError: no such file. ValueError: not a mapping.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no config file at {path}; `mmeff list --json` shows every method with its fields")
    values = yaml.safe_load(path.read_text())
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} must hold a mapping such as `method: radial`, got {type(values).__name__}")
    return values
