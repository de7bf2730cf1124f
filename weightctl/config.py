"""One frozen Config: flag, then WEIGHTCTL_* variable, then weightctl.toml, then default."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from weightctl.errors import UsageError, translated_os_errors

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def expanded(path: str | Path) -> Path:
    """`path` with its `~` written out. Raises UsageError where that home is not known, as to a user who has none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UsageError(f"no home directory is known for {str(path)!r}", "write the path out, or set HOME") from None


def user_directory(kind: Literal["cache", "config"]) -> Path:
    """The user's directory of that kind, as XDG says. Without a home it is a path at which nothing can be."""
    path = Path(os.environ.get(f"XDG_{kind.upper()}_HOME") or os.path.expanduser(f"~/.{kind}"))  # noqa: PTH111
    return path if path.is_absolute() else Path("/nonexistent")


def _integer(low: int, high: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if isinstance(value, str):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError
        return value

    return parse


def _switch(value: object) -> bool:
    named = {"true": True, "1": True, "false": False, "0": False}
    value = named.get(value.lower(), value) if isinstance(value, str) else value
    if not isinstance(value, bool):
        raise ValueError
    return value


def _path(value: object) -> Path:
    if not isinstance(value, (str, Path)) or not str(value):
        raise ValueError
    return expanded(value)


def _device(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError
    return value


def _name(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[a-z][a-z0-9_-]*", value):
        raise ValueError
    return value


def _share(value: object) -> float:
    number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else -1.0
    if not 0 <= number <= 1:
        raise ValueError
    return number


def _one_of(*allowed: str) -> dict[str, Any]:
    def parse(value: object) -> object:
        if value not in allowed:
            raise ValueError
        return value

    return {"parse": parse, "allowed": ", ".join(allowed)}


def _setting(parse: Callable[[object], object], allowed: str, meaning: str) -> dict[str, Any]:
    return {"parse": parse, "allowed": allowed, "meaning": meaning}


@dataclass(frozen=True)
class Config:
    """Every setting. Defaults suit a machine that is used for nothing else."""

    workers: int = field(
        default=min(8, os.cpu_count() or 1),
        metadata=_setting(_integer(1, 256), "a whole number from 1 to 256", "threads that read, hash and write files"),
    )
    cache_dir: Path | None = field(
        default=None,
        metadata=_setting(_path, "a directory", "where Hub snapshots are kept (default: huggingface_hub's own cache)"),
    )
    device: str = field(
        default="auto",
        metadata=_setting(_device, "auto, cpu, cuda or cuda:N", "where weights are loaded to"),
    )
    strategy: str = field(
        default="auto",
        metadata=_setting(_name, "auto or a name that 'weightctl backends' lists", "how weights are loaded"),
    )
    ring_bytes: int = field(
        default=128 << 20,
        metadata=_setting(
            _integer(2 << 20, 1 << 40), "bytes, from 2 MiB", "pinned memory that weights pass through to a CUDA device"
        ),
    )
    runs: int | None = field(
        default=None,
        metadata=_setting(
            _integer(1, 1000),
            "a whole number from 1 to 1000",
            "runs of each bench row, at most (default: 10), or whole cold starts of each way (default: 3)",
        ),
    )
    precision: float = field(
        default=0.05,
        metadata=_setting(
            _share, "a number from 0 to 1", "a bench ends when it knows every median to this share of it, either side"
        ),
    )
    timeout: int = field(
        default=600,
        metadata=_setting(_integer(1, 86400), "seconds, from 1 to 86400", "after which one bench run is stopped"),
    )

    plain_http: bool = field(
        default=False,
        metadata=_setting(_switch, "true or false", "speak plain HTTP to a registry that has no TLS"),
    )
    safetensors_backend: str = field(
        default="mmap",
        metadata={
            **_one_of("mmap", "pread", "prefetch"),
            "meaning": "how the strategy safetensors reads (prefetch: safetensors 0.9, to CUDA devices)",
        },
    )
    tensorizer_readers: int | None = field(
        default=None,
        metadata=_setting(
            _integer(1, 256), "a whole number from 1 to 256", "threads of the strategy tensorizer (default: its choice)"
        ),
    )
    tensorizer_key: Path | None = field(
        default=None,
        metadata=_setting(_path, "a file of 32 bytes", "the key that Tensorizer files are encrypted and read with"),
    )
    fastsafetensors_gds: bool = field(
        default=False,
        metadata=_setting(_switch, "true or false", "whether fastsafetensors uses GPUDirect Storage"),
    )
    runai_concurrency: int | None = field(
        default=None,
        metadata=_setting(
            _integer(1, 256), "a whole number from 1 to 256", "threads of the strategy runai (default: its choice)"
        ),
    )
    instanttensor_backend: str = field(
        default="auto",
        metadata={
            **_one_of("auto", "buffered", "direct"),
            "meaning": "how instanttensor reads: through the page cache, past it, or by what the cache holds",
        },
    )

    @classmethod
    def load(
        cls, flags: Mapping[str, object] | None = None, directory: Path | None = None, *, dashes: str = "--"
    ) -> Config:
        """The configuration in force. `flags` whose value is None are not set. Raises UsageError for a bad value, which
        calls a flag by its name behind `dashes`.
        """
        return cls(**{name: value for name, (value, _) in resolve(flags, directory, dashes=dashes).items()})


def resolve(
    flags: Mapping[str, object] | None = None, directory: Path | None = None, *, dashes: str = "--"
) -> dict[str, tuple[Any, str]]:
    """Every setting's name → its value and where that came from."""
    files = [(path, _read(path)) for path in config_files(directory)]
    found: dict[str, tuple[Any, str]] = {}
    for setting in dataclasses.fields(Config):
        variable = f"WEIGHTCTL_{setting.name.upper()}"
        flag = (flags or {}).get(setting.name)
        if flag is not None:
            origin = f"{dashes}{setting.name.replace('_', '-')}"
            found[setting.name] = (_parsed(setting, flag, origin), origin)
        elif os.environ.get(variable):
            found[setting.name] = (_parsed(setting, os.environ[variable], variable), variable)
        else:
            found[setting.name] = (setting.default, "default")
            for path, values in files:
                if setting.name in values:
                    value = _parsed(setting, values[setting.name], f"{path}: {setting.name}")
                    found[setting.name] = (value, str(path))
                    break
    return found


CLOSE = 0.8
"""How alike (difflib's ratio) a variable's name and a setting's are when the one is taken for the other misspelt."""


def misspelt_variables() -> dict[str, str]:
    """Variables that name no setting, but nearly one → that one's.

    Others may be there by right: Kubernetes gives every container WEIGHTCTL_SERVICE_HOST and the like, if a service is
    called weightctl, and an image that was baked has WEIGHTCTL_MODEL_DIR.
    """
    names = [setting.name.upper() for setting in dataclasses.fields(Config)]
    found = {}
    for variable in sorted(os.environ):
        prefix, _, word = variable.partition("WEIGHTCTL_")
        if not prefix and word not in names and (near := difflib.get_close_matches(word, names, 1, CLOSE)):
            found[variable] = f"WEIGHTCTL_{near[0]}"
    return found


def config_files(directory: Path | None = None) -> list[Path]:
    """The configuration files that exist, the one that wins first."""
    candidates = [(directory or Path()) / "weightctl.toml", user_directory("config") / "weightctl" / "config.toml"]
    return [path for path in candidates if path.is_file()]


def _read(path: Path) -> dict[str, object]:
    with translated_os_errors(f"read {path}"):
        text = path.read_bytes()
    try:
        values: dict[str, object] = tomllib.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error
    known = [setting.name for setting in dataclasses.fields(Config)]
    for key in values:
        if key not in known:
            raise UsageError(f"{path}: unknown key {key!r}", f"known keys: {', '.join(known)}")
    return values


def _parsed(setting: dataclasses.Field[Any], value: object, origin: str) -> object:
    try:
        return setting.metadata["parse"](value)
    except ValueError:
        hint = f"allowed: {setting.metadata['allowed']}"
        raise UsageError(f"{origin} is {value!r}, which is not allowed", hint) from None
