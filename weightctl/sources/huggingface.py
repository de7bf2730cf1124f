"""A model on the Hugging Face Hub, brought here by huggingface_hub's own snapshot download."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import weightctl
from weightctl import storage
from weightctl.config import Config, expanded
from weightctl.digests import DigestCache, check_files
from weightctl.errors import IntegrityError, UsageError, WeightctlError, translated_os_errors
from weightctl.model import File, Reference, Snapshot, check_path, matches
from weightctl.progress import Progress, Task
from weightctl.sources.base import Plan, Source, sources
from weightctl.sources.directory import read_directory

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling


@sources.register("huggingface")
class HuggingFaceSource(Source):
    """The Hub, or what its cache holds of it when the Hub does not answer."""

    summary = "the Hugging Face Hub: org/name[@revision]"

    def plan(
        self,
        reference: Reference,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        to: Path | None = None,
        config: Config,
        progress: Progress,
    ) -> Plan:
        """Ask the Hub which files the revision has, with their sizes and digests."""
        from huggingface_hub import HfApi, constants

        try:
            with _translated_errors(reference):
                info = HfApi(library_name="weightctl", library_version=weightctl.__version__).model_info(
                    reference.location,
                    revision=reference.revision,
                    files_metadata=True,
                    timeout=constants.HF_HUB_ETAG_TIMEOUT,
                )
        except _UnreachableError as error:
            return _plan_from_cache(reference, include, exclude, to, config, progress, error)
        commit = info.sha
        if commit is None:
            raise WeightctlError(f"the Hub names no commit for {reference}")
        root = to.absolute() if to else _snapshot_directory(reference.location, commit, config)
        siblings = info.siblings or []
        files = [_listed_file(item, root) for item in siblings if matches(item.rfilename, include, exclude)]
        if not files:
            hint = "the patterns of --include and --exclude match none" if siblings else "the repository is empty"
            raise UsageError(f"no files in {reference}", hint)
        revision = reference.revision or "main"
        snapshot = Snapshot(
            reference.location, root, tuple(files), repo_id=reference.location, revision=revision, commit=commit
        )
        blobs = None if to else _repository_directory(reference.location, config) / "blobs"
        return Plan(self.name, snapshot, tuple(file for file in snapshot.files if not _is_here(file, blobs)))

    def fetch(self, plan: Plan, *, verify: bool, config: Config, progress: Progress) -> Snapshot:
        """Download what is missing; check small files always and large ones with `verify`.

        Raises IntegrityError, and removes the file, if its bytes are not those that the Hub lists.
        """
        if absent := [file for file in plan.snapshot.files if not _is_here(file)]:
            self._download(plan, absent, config, progress)
        files = [dataclasses.replace(file, source=_resolved(plan.snapshot, file)) for file in plan.snapshot.files]
        unread = [file for file in files if verify or file.sha256 is None]
        actual, bad = check_files(unread, config.workers, DigestCache(), progress)
        for file in bad:
            _remove(plan.snapshot.root / file.path, config)
        if bad:
            names = ", ".join(file.path for file in bad)
            raise IntegrityError(
                f"{names} of {plan.snapshot.repo_id}: the bytes are not those that the Hub lists",
                "they were removed: pull again to fetch them anew",
            )
        known = {file.path: file for file in actual}
        return plan.snapshot.replace_files([known.get(file.path, file) for file in files])

    def _download(self, plan: Plan, absent: Sequence[File], config: Config, progress: Progress) -> None:
        from huggingface_hub import snapshot_download

        snapshot = plan.snapshot
        if snapshot.repo_id is None or snapshot.commit is None:
            raise ValueError("only a snapshot of the Hub has files that are missing")
        to = None if snapshot.root == _snapshot_directory(snapshot.repo_id, snapshot.commit, config) else snapshot.root
        missing = sum(file.size for file in plan.missing)
        storage.check_space(snapshot.root, missing)
        with progress.task("downloading", missing) as task, _translated_errors(snapshot):
            _sweep_partial_downloads(snapshot, to, config)
            for file in absent:
                if not _is_here(file):
                    _remove(file.source, config)  # of the wrong size: snapshot_download would keep it
            # Ctrl-C reaches only the main thread, where snapshot_download would wait for every file under way.
            stop = threading.Event()
            with ThreadPoolExecutor(1) as pool:
                download = pool.submit(
                    snapshot_download,
                    snapshot.repo_id,
                    revision=snapshot.commit,
                    library_name="weightctl",
                    library_version=weightctl.__version__,
                    cache_dir=_cache(config),
                    local_dir=to,
                    # Exact names, in which glob's own characters stand for themselves.
                    allow_patterns=["".join(f"[{c}]" if c in "*?[" else c for c in f.path) for f in absent],
                    max_workers=config.workers,
                    tqdm_class=_bars_into(task, stop),
                )
                try:
                    download.result()
                finally:
                    stop.set()
            _keep_reference(snapshot, to, config)


def _cache(config: Config) -> Path:
    from huggingface_hub import constants

    return (config.cache_dir or expanded(constants.HF_HUB_CACHE)).resolve()


def _repository_directory(repo_id: str, config: Config) -> Path:
    return _cache(config) / f"models--{repo_id.replace('/', '--')}"


def _snapshot_directory(repo_id: str, commit: str, config: Config) -> Path:
    return _repository_directory(repo_id, config) / "snapshots" / commit


def _keep_reference(snapshot: Snapshot, to: Path | None, config: Config) -> None:
    """Let offline look-ups of the revision find the commit, as snapshot_download does for a branch or tag."""
    if to is None and snapshot.repo_id and snapshot.commit and snapshot.revision not in (None, snapshot.commit):
        reference = _repository_directory(snapshot.repo_id, config) / "refs" / check_path(str(snapshot.revision))
        reference.parent.mkdir(parents=True, exist_ok=True)
        with storage.atomic_write(reference) as stream:
            stream.write(snapshot.commit.encode())


def _listed_file(sibling: RepoSibling, root: Path) -> File:
    path = check_path(sibling.rfilename)
    sha256 = sibling.lfs.sha256 if sibling.lfs else None
    return File(path, sibling.size or 0, root / path, sha256, None if sha256 else sibling.blob_id)


def _is_here(file: File, blobs: Path | None = None) -> bool:
    """Whether the file lies where it belongs; with `blobs`, whether its bytes came here with another commit."""
    places = [file.source]
    if blobs and (name := file.sha256 or file.git_id):
        places.append(blobs / name)
    return any(place.is_file() and place.stat().st_size == file.size for place in places)


def _resolved(snapshot: Snapshot, file: File) -> Path:
    path = snapshot.root / file.path
    try:
        return path.resolve(strict=True)
    except OSError as error:
        raise WeightctlError(f"{path} is missing after the download", "pull the model again") from error


def _remove(path: Path, config: Config) -> None:
    """Take a file away, and if it is a link into the Hub's cache, what it leads to as well."""
    target = path.resolve()
    path.unlink(missing_ok=True)
    if target.is_relative_to(_cache(config)):
        target.unlink(missing_ok=True)


def _plan_from_cache(
    reference: Reference,
    include: Sequence[str],
    exclude: Sequence[str],
    to: Path | None,
    config: Config,
    progress: Progress,
    unreachable: _UnreachableError,
) -> Plan:
    """What the cache holds of the revision; re-raises `unreachable` if that is not the whole of it."""
    from huggingface_hub import snapshot_download

    if to is not None:
        raise unreachable
    try:
        path = snapshot_download(
            reference.location,
            revision=reference.revision,
            cache_dir=_cache(config),
            allow_patterns=list(include) or None,
            ignore_patterns=list(exclude) or None,
            local_files_only=True,
        )
    except (OSError, ValueError):
        raise unreachable from unreachable.__cause__
    progress.note(f"the Hub cannot be reached; using {reference} as it is cached")
    snapshot = read_directory(Path(path), include, exclude)
    return Plan(HuggingFaceSource.name, dataclasses.replace(snapshot, revision=reference.revision or "main"))


class _UnreachableError(WeightctlError):
    """The Hub does not answer."""


@contextlib.contextmanager
def _translated_errors(model: Reference | Snapshot) -> Iterator[None]:
    from huggingface_hub import errors

    # huggingface_hub 1 speaks through httpx and 2 through httpx2; the base of its own error is the one in use.
    http_error: type[Exception] = next(base for base in errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    repo_id = model.location if isinstance(model, Reference) else model.repo_id
    login = "set HF_TOKEN, or log in with: hf auth login"
    try:
        yield
    except errors.GatedRepoError as error:
        hint = f"ask for access at https://huggingface.co/{repo_id}, then {login}"
        raise WeightctlError(f"{repo_id} is gated, and this account has no access to it", hint) from error
    except errors.RevisionNotFoundError as error:
        message = f"{repo_id} has no revision {model.revision!r}"
        raise WeightctlError(message, "check the branch, tag or commit") from error
    except errors.RepositoryNotFoundError as error:
        hint = f"check the name; if the repository is private, {login}"
        if Path(str(repo_id)).exists():
            hint = f"a directory is written as a path: ./{repo_id}"
        raise WeightctlError(f"the Hub has no model {repo_id!r}, or this account may not see it", hint) from error
    except errors.HFValidationError as error:
        raise UsageError(f"not a model of the Hub: {repo_id!r}", "write org/name[@revision]") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
        answer = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
        if not isinstance(answer, errors.HfHubHTTPError):
            raise _no_answer(repo_id, error) from error
        status = answer.response.status_code
        if status in (401, 403):
            message = f"the Hub refuses access to {repo_id} (HTTP {status})"
            raise WeightctlError(message, f"check the token: {login}") from error
        raise _UnreachableError(f"the Hub answers HTTP {status} for {repo_id}", "try again later") from error
    except errors.OfflineModeIsEnabled as error:
        hint = "it is not all in the cache: pull it once without HF_HUB_OFFLINE"
        raise _UnreachableError(f"the Hub cannot be reached for {repo_id}: HF_HUB_OFFLINE is set", hint) from error
    except http_error as error:
        raise _no_answer(repo_id, error) from error
    except OSError as error:
        with translated_os_errors(f"download {repo_id}"):
            raise error


def _no_answer(repo_id: str | None, error: Exception) -> _UnreachableError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return _UnreachableError(
        f"the Hub cannot be reached for {repo_id}: the connection failed: {reason}",
        "check the network (and HF_ENDPOINT, if set); what was finished is kept, so run this again to go on",
    )


def _sweep_partial_downloads(snapshot: Snapshot, to: Path | None, config: Config) -> None:
    """Remove partial files of downloads that were killed: huggingface_hub never goes on with them.

    A living download holds its file's lock from before the partial file exists: where no lock is held after the
    partial files were listed, none of them belongs to anybody.
    """
    if to is None:
        partial = _repository_directory(str(snapshot.repo_id), config) / "blobs"
        locks = _cache(config) / ".locks" / partial.parent.name
    else:
        partial = locks = to / ".cache" / "huggingface" / "download"
    leftovers = list(partial.rglob("*.incomplete"))
    if leftovers and not any(_is_locked(path) for path in locks.rglob("*.lock")):
        for path in leftovers:
            path.unlink(missing_ok=True)


def _is_locked(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass  # some versions of filelock remove it as they let go
    return False


def _bars_into(task: Task, stop: threading.Event) -> type[Any]:
    """A tqdm class that draws nothing, reports the bytes written to `task`, and ends a download after `stop`."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            # Of the two byte bars of huggingface_hub 2 the other counts what the network brought.
            self._counts = options.get("unit") == "B" and not str(options.get("desc")).startswith("Downloading bytes")
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if stop.is_set():
                raise KeyboardInterrupt
            if self._counts and n:
                task.advance(int(n))

    return Bar
