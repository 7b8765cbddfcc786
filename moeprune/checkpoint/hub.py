"""Models on the Hugging Face Hub: downloaded whole, or known by the ends of their files alone.

The ends of a safetensors file hold all that is needed to inspect a model and to check a plan: the header, and the
samples that :meth:`moeprune.checkpoint.folder.Checkpoint.fingerprint` takes. They are fetched by range requests and put
into a folder of sparse files of the true sizes, which opens like any checkpoint folder.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune.checkpoint.folder import INDEX_NAME, SAMPLE_BYTES, SINGLE_NAME, is_local, resolve_model
from moeprune.checkpoint.header import MAX_HEADER_BYTES
from moeprune.errors import CheckpointError, did_you_mean
from moeprune.files import read_json, replacing
from moeprune.resources import DEMO

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

FIRST_BYTES = 1 << 18  # holds the header of nearly every shard
OTHER_WEIGHTS = [
    "*.bin", "*.pth", "*.pt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.tflite", "*.mlmodel",
    "original/*", "onnx/*", "openvino/*", "metal/*",
]  # fmt: skip
PICKLES = {".bin", ".pt", ".pth"}
PARALLEL_REQUESTS = 8
TRIES = 4
TIMEOUT = 30


@dataclass(frozen=True)
class Located:
    """A model that is here, or of which at least all but the bulk of the weights is.

    Attributes:
        folder: Opens as a checkpoint folder.
        repo: Its repository (``owner/name``), if it is one of the Hub.
        commit: The commit it was taken from.
        missing: Size by name of the files in ``folder`` of which the ends alone are here.
    """

    folder: Path
    repo: str | None = None
    commit: str | None = None
    missing: Mapping[str, int] = field(default_factory=dict)


def split_id(model: str) -> tuple[str, str | None]:
    """Repository and revision of ``owner/name`` or ``owner/name@revision``.

    Raises:
        CheckpointError: If it is neither.
    """
    name, _, revision = model.partition("@")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        hint = did_you_mean(model, [DEMO]).partition("Known:")[0]
        raise CheckpointError(
            f"{model}: no such folder. Give the folder of a checkpoint, a Hub id (owner/name) or {DEMO!r}. "
            f"{hint}".strip()
        )
    return name, revision or None


def download(model: str) -> Path:
    """The folder of a model in the cache of huggingface_hub, downloaded if need be.

    Args:
        model: ``owner/name``, optionally ``owner/name@revision``.

    Raises:
        CheckpointError: If it is not such a name, or cannot be had.
    """
    from huggingface_hub import snapshot_download

    repo, revision = split_id(model)
    with explained(model):
        return Path(snapshot_download(repo, revision=revision, ignore_patterns=OTHER_WEIGHTS))


def locate(model: str | Path) -> Located:
    """A model without its weights: one of the Hub is not downloaded, but for small files and the ends of its shards.

    Shards that are in the cache already are used from there. Without a connection, all must be.

    Args:
        model: As :func:`moeprune.checkpoint.folder.resolve_model` takes it.

    Raises:
        CheckpointError: If there is no such model, or it cannot be had.
    """
    if is_local(model):
        return Located(resolve_model(model))
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    repo, revision = split_id(str(model))
    with explained(str(model)):
        try:
            info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT)
        except (_http_error(), OfflineModeIsEnabled) as error:
            if _status(error) < 500:  # the Hub is there, and says no
                raise
            return _from_cache(repo, revision)
        ignored = [*OTHER_WEIGHTS, "*.safetensors"]
        with quiet_downloads():
            snapshot = Path(snapshot_download(repo, revision=info.sha, ignore_patterns=ignored))
        return _outlined(str(model), info, snapshot)


def _http_error() -> type[Exception]:
    """The root of all failures of requests: huggingface_hub 1 uses httpx, 2 uses httpx2."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")


def _status(error: Exception) -> int:
    """The status of the answer that an error stands for; 599 if there was none."""
    return getattr(getattr(error, "response", None), "status_code", 599)


def is_transient(error: BaseException | None) -> bool:
    """Whether a request failed for what may be gone at the next try: the line, the server, too many requests."""
    if not isinstance(error, _http_error()):
        return False
    return _status(error) >= 500 or _status(error) in (408, 429)


@contextmanager
def quiet_downloads(quiet: bool = True) -> Iterator[None]:
    """No progress bars of huggingface_hub inside the block, if ``quiet``."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    change = quiet and not are_progress_bars_disabled()
    if change:
        disable_progress_bars()
    try:
        yield
    finally:
        if change:
            enable_progress_bars()


@contextmanager
def explained(model: str) -> Iterator[None]:
    """Turn what goes wrong with the Hub into one line that says what to do.

    Raises:
        CheckpointError: For any failure of a request.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, _, revision = model.partition("@")
    try:
        yield
    except CheckpointError:
        raise
    except GatedRepoError as error:
        text = f"is gated. Ask for access at https://huggingface.co/{repo}, then log in with `hf auth login`."
        raise CheckpointError(f"{model}: {text}") from error
    except RepositoryNotFoundError as error:
        text = "no local folder, and no such repository on the Hub. If it is private, log in with `hf auth login`."
        raise CheckpointError(f"{model}: {text}") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{model}: {repo} has no branch, tag or commit {revision!r}.") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        first = error.__cause__ or error.__context__
        why = "cannot be reached (offline, or HF_HUB_OFFLINE=1)"
        if getattr(first, "response", None) is not None:
            why = f"did not answer as expected ({_reason(first)})"
        raise CheckpointError(f"{model}: not in the local cache, and the Hub {why}.") from error
    except HFValidationError as error:
        raise CheckpointError(f"{model}: not a name that the Hub has ({error}).") from error
    # hf_xet reports all that goes wrong as RuntimeError, and huggingface_hub a file too large for HTTP as ValueError.
    except (_http_error(), OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None and error.strerror:
            text = f"{error.filename or 'the cache of huggingface_hub'}: {error.strerror}"
            raise CheckpointError(
                f"{model}: {text}. Make room there, or set HF_HOME to a folder that can be written to."
            ) from error
        raise CheckpointError(f"{model}: the Hub did not answer as expected ({_reason(error)}). Try again.") from error


def _reason(error: BaseException | None) -> str:
    """The first line of an error's text."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def abort_downloads() -> None:
    """End the downloads of hf_xet that are under way in this process, where huggingface_hub offers it."""
    from huggingface_hub.utils import _xet

    abort = getattr(_xet, "abort_xet_session", None)  # since 1.12
    if abort is not None:
        abort()


def _from_cache(repo: str, revision: str | None) -> Located:
    """A snapshot that is in the cache with all its shards."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, ignore_patterns=OTHER_WEIGHTS))
    if not all((folder / name).is_file() for name in _shard_names(folder) or [SINGLE_NAME]):
        raise LocalEntryNotFoundError(f"{folder} lacks shards")
    return Located(folder, repo, folder.name)


def _shard_names(folder: Path) -> list[str]:
    """Names of the shards of an index, as far as it can be read: whoever opens the folder checks it in full."""
    try:
        return sorted({str(name) for name in read_json(folder / INDEX_NAME)["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _outlined(model: str, info: ModelInfo, snapshot: Path) -> Located:
    """A folder beside the cache with all small files, links to the shards in the cache, and the ends of the others."""
    from huggingface_hub import cached_assets_path, try_to_load_from_cache

    repo, commit = info.id, str(info.sha)
    sizes = {file.rfilename: file.size for file in info.siblings or []}
    names = [name for name in _shard_names(snapshot) or [SINGLE_NAME] if sizes.get(name) is not None]
    folder = Path(cached_assets_path("moeprune", namespace=repo.replace("/", "--"), subfolder=commit))
    shutil.copytree(snapshot, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    for name in sizes:
        if not names and "/" not in name and Path(name).suffix in PICKLES:
            (folder / name).touch()  # so that whoever finds no safetensors can say what is there instead
    missing: dict[str, int] = {}
    for name in names:
        cached = try_to_load_from_cache(repo, name, revision=commit)
        if (folder / name).is_symlink() or isinstance(cached, str):
            (folder / name).unlink(missing_ok=True)
        if isinstance(cached, str):
            (folder / name).symlink_to(cached)
        else:
            missing[name] = int(sizes[name] or 0)
    if not missing and names:
        return Located(snapshot, repo, commit)
    wanted = [name for name, size in missing.items() if not _has_size(folder / name, size)]
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        for _ in pool.map(lambda name: _fetch_ends(model, repo, commit, name, missing[name], folder / name), wanted):
            pass
    return Located(folder, repo, commit, missing)


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _fetch_ends(model: str, repo: str, commit: str, name: str, size: int, path: Path) -> None:
    """Make a sparse file of a shard's size with its header and the first and last bytes of its data."""
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(repo, name, revision=commit)
    head = _range(url, 0, min(size, FIRST_BYTES))
    length = int.from_bytes(head[:8], "little")
    begin = min(size, 8 + length + SAMPLE_BYTES) if length <= MAX_HEADER_BYTES else len(head)
    if begin > len(head):
        head += _range(url, len(head), begin)
    tail = max(len(head), size - SAMPLE_BYTES)
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            file.write(head)
            file.seek(tail)
            file.write(_range(url, tail, size))
            file.truncate(size)
    except OSError as error:
        if getattr(error, "response", None) is not None or error.errno is None:
            raise
        raise CheckpointError(
            f"{model}: a sparse file of {size} bytes cannot be made in {path.parent} ({error.strerror}). Set "
            "HF_ASSETS_CACHE to a folder on another file system."
        ) from error


def _range(url: str, start: int, end: int) -> bytes:
    """Bytes of a file on the Hub; tried again if the connection breaks.

    Raises:
        CheckpointError: If the server sends something else.
    """
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    if start >= end:
        return b""
    headers: dict[str, Any] = {
        **build_hf_headers(),
        "Range": f"bytes={start}-{end - 1}",
        "Accept-Encoding": "identity",  # a compressed answer has other ranges
    }
    for attempt in range(TRIES):
        try:
            with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
                if response.status_code not in (200, 206):
                    response.read()
                    hf_raise_for_status(response)
                data = b"" if response.status_code == 200 and start else _read(response, end - start)
        except _http_error() as error:
            if not is_transient(error) or attempt == TRIES - 1:
                raise
            time.sleep(2**attempt / 2)
            continue
        if len(data) == end - start:
            return data
    raise CheckpointError(f"{url}: does not answer requests for a part of a file. Download the model first.")


def _read(response: Any, count: int) -> bytes:
    """The first bytes of an answer; what may follow is left unread."""
    data = bytearray()
    for chunk in response.iter_bytes(1 << 16):
        data += chunk
        if len(data) >= count:
            break
    return bytes(data[:count])
