"""Finds files in a folder or on the hub, and writes a folder without ever leaving it half written.

Knows nothing about adapters: the content of the files is ``checkpoint``'s business.

Internal.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from softtune.errors import CheckpointError

HUB_OPTIONS = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download")
"""Keyword arguments of ``from_pretrained`` that say where on the hub to look."""


STAYS_REACHABLE = 30.0
"""Seconds for which the hub is taken to be reachable after it answered."""
_REACHED: dict[str, float] = {}
"""When the hub last answered, by repository."""


def cache_folder() -> Path:
    """The folder of converted models and records of checks: below ``XDG_CACHE_HOME``, or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "softtune"


def locate(model_id: str | os.PathLike[str], filename: str, *, is_optional: bool = False, **hub: Any) -> Path | None:
    """Return the path of ``filename`` in a local folder or a hub repository, or None where there is no such file.

    Args:
        model_id: the folder or the repository's name.
        filename: the file's name.
        is_optional: whether to go on without it, with a warning, where other files of the repository are cached and the
            hub cannot be reached.
        hub: where on the hub to look, see ``HUB_OPTIONS``.

    Raises:
        CheckpointError: the name could be a hub repository's, but the hub cannot be reached or has no such repository.
    """
    path = local(model_id) / (hub.get("subfolder") or "") / filename
    if path.is_file():
        return path
    if is_path(str(model_id)):
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    options = {name: value for name, value in hub.items() if value is not None}
    unreachable = CheckpointError(f"{model_id} is no local folder and the hub cannot be reached", "check the path")
    try:
        if is_cached_or_reachable(str(model_id), filename, **options):
            return Path(hf_hub_download(str(model_id), filename, **options))
    except LocalEntryNotFoundError:
        pass
    except EntryNotFoundError:
        return None
    except HfHubHTTPError as error:
        raise CheckpointError(f"{model_id} is no local folder and no readable hub repository", "check it") from error
    if not (is_optional and _has_cached(str(model_id), **options)):
        raise unreachable
    what = f"{filename} of {model_id} is not cached and the hub cannot be reached"
    warnings.warn(f"{what}: going on without, and without a check of the base model", stacklevel=2)
    return None


def is_cached_or_reachable(repository: str, filename: str, **hub: Any) -> bool:
    """Whether a file of a hub repository is cached, or known not to exist, or the hub answers a single request.

    The hub's own functions retry for half a minute. True with ``local_files_only``, where they only read the cache.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import OfflineModeIsEnabled

    places = _places(hub)
    path = f"{hub['subfolder']}/{filename}" if hub.get("subfolder") else filename
    if hub.get("local_files_only") or try_to_load_from_cache(repository, path, **places) is not None:
        return True
    if time.monotonic() - _REACHED.get(repository, float("-inf")) < STAYS_REACHABLE:
        return True
    url = hf_hub_url(repository, path, revision=hub.get("revision"))
    try:
        get_hf_file_metadata(url, token=hub.get("token"))
    except Exception as error:  # the hub's HTTP client, and so its types, change with the hub's version
        unreachable = ("ConnectError", "ConnectTimeout", "ProxyError")
        if isinstance(error, OfflineModeIsEnabled) or type(error).__name__ in unreachable:
            return False
    _REACHED[repository] = time.monotonic()
    return True


def _has_cached(repository: str, **hub: Any) -> bool:
    """Whether anything of a hub repository's revision is in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot_download(repository, local_files_only=True, **_places(hub))
    except LocalEntryNotFoundError:
        return False
    return True


def _places(hub: Mapping[str, Any]) -> dict[str, Any]:
    """The options that say where in the cache to look."""
    return {name: hub[name] for name in ("revision", "cache_dir") if hub.get(name) is not None}


def local(path: str | os.PathLike[str]) -> Path:
    """The path itself or, if it does not exist, with ``~`` replaced by the user's home."""
    # Path's own expanduser raises where there is no such user.
    return Path(path) if Path(path).exists() else Path(os.path.expanduser(path))  # noqa: PTH111


def is_path(name: str) -> bool:
    """Whether a name is a local path: such a file or folder exists, or it cannot be the name of a hub repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return Path(name).exists()


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        CheckpointError: the file is not valid JSON, or does not hold an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error})", "restore the file from a good copy") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object", "restore the file from a good copy")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_no_file(folder: str | os.PathLike[str]) -> None:
    """Check that a folder to save into, and every folder above it, is not a file.

    Raises:
        CheckpointError: one of them is a file.
    """
    for path in (Path(folder), *Path(folder).parents):
        if path.is_file():
            raise CheckpointError(f"{path} is a file", "name a folder to save into")


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Check that a folder to save into can be written, or created.

    Raises:
        CheckpointError: it cannot, or there is a file in its place.
    """
    check_no_file(folder)
    above = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.is_dir())
    try:
        tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        raise CheckpointError(f"{above} cannot be written ({error.strerror})", "name another folder") from error


@contextmanager
def staged(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder whose files move into ``folder`` if the block succeeds, and are deleted if it fails.

    Every file is complete before it appears under its own name; files of ``folder`` that the block does not write stay.
    """
    target = Path(folder)
    check_no_file(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # On the same file system as the target, which may be a mount.
    stage = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target if target.is_dir() else target.parent))
    try:
        yield stage
        target.mkdir(exist_ok=True)
        mode = _mode_of_new_files(stage)
        for path in sorted(stage.rglob("*")):
            if path.is_file():
                destination = target / path.relative_to(stage)
                destination.parent.mkdir(parents=True, exist_ok=True)
                path.chmod(mode)  # safetensors makes files that only their owner can read
                path.replace(destination)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _mode_of_new_files(folder: Path) -> int:
    """The permissions of a new file under the umask, taken from one, since reading the umask requires setting it."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    return mode
