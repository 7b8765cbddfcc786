"""How much memory there is, and whether a model fits into it."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from moeprune.anatomy.source import Source
from moeprune.checkpoint.load import choose_device
from moeprune.errors import RoomError

GIB = 1 << 30
WORKING = GIB  # for activations of a batch and for torch itself
CGROUP = Path("/sys/fs/cgroup")


def available_memory(device: torch.device) -> int:
    """Bytes that can still be taken: of a GPU, or of the host within the limit that a container has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        raise RoomError(
            "this system does not tell how much memory is free (no /proc/meminfo). Say --stream or --no-stream."
        )
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = _number(CGROUP / "memory.max"), _number(CGROUP / "memory.current")
    # Pages of files that were read count as used, and are given back when memory is wanted.
    cached = _statistic(CGROUP / "memory.stat", "inactive_file")
    return free if limit is None or used is None else min(free, max(0, limit - used + cached))


def fits(source: Source, *, device: str = "auto", dtype: str = "auto", sharing: int = 1) -> tuple[bool, str]:
    """Whether a model can be loaded as a whole, so that it need not be streamed.

    Args:
        source: The checkpoint; a quantised one is dequantised when it is loaded for calibration.
        device: Where it is to run.
        dtype: As what it is to be loaded.
        sharing: Processes that load it into the same memory.

    Returns:
        Whether it fits, and why in one sentence.
    """
    place = torch.device(choose_device(device))
    itemsize = _dtype_of(source, dtype).itemsize
    sizes = [parameter.numel() * itemsize for parameter in source.anatomy.skeleton.parameters()]
    # The largest parameter is in memory three times while its experts are stacked and joined.
    needed = sharing * (sum(sizes) + 2 * max(sizes)) + WORKING
    free = available_memory(place)
    where = "memory" if place.type == "cpu" else f"memory of {place}"
    holders = f" by {sharing} processes" if sharing > 1 else ""
    return needed <= free, (
        f"loading {source.name}{holders} takes {needed / GIB:.1f} GiB of {where}, {free / GIB:.1f} GiB are available"
    )


def check_layers(largest: int, *, held: int, device: torch.device) -> None:
    """Refuse a device without room for two layers.

    Args:
        largest: Bytes of the largest layer.
        held: Bytes of layers that are in memory now.
        device: The device.

    Raises:
        RoomError: If two such layers do not fit.
    """
    free = available_memory(device) + held
    if 2 * largest > free:
        raise RoomError(
            f"streaming keeps 2 layers of up to {largest / GIB:.2f} GiB in memory, of which {free / GIB:.2f} GiB are "
            f"left on {device}. Give --dtype bfloat16 if this is float32, or another machine."
        )


def check_hidden(num_bytes: int, *, folder: Path | None) -> None:
    """Refuse hidden states that do not fit where they are to be kept.

    Args:
        num_bytes: Bytes that will be kept at the same time.
        folder: Where they are written; None if they stay in memory.

    Raises:
        RoomError: If they do not fit, saying what would help.
    """
    size = f"the hidden states of this text take {num_bytes / GIB:.2f} GiB"
    if folder is None:
        free = available_memory(torch.device("cpu"))
        if num_bytes > free:
            raise RoomError(
                f"{size}, {free / GIB:.2f} GiB of memory are left. Keep them on a disk with --offload-hidden FOLDER, "
                "or calibrate on fewer tokens."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise RoomError(
            f"{size}, {free / GIB:.2f} GiB are left on the disk of {folder}. Give a folder on a larger one, or "
            "calibrate on fewer tokens."
        )


def _dtype_of(source: Source, dtype: str) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    for config in (source.anatomy.config, source.anatomy.text_config):
        given = getattr(config, "dtype", None)
        if given is not None:
            return given if isinstance(given, torch.dtype) else getattr(torch, str(given).removeprefix("torch."))
    return torch.float32


def _number(path: Path) -> int | None:
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None


def _statistic(path: Path, name: str) -> int:
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)
