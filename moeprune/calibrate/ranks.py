"""Several processes that calibrate together, each on its own part of the text: ``torchrun``, ``accelerate launch``."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from moeprune.calibrate.stats import Stats, kind_of
from moeprune.checkpoint.load import choose_device
from moeprune.errors import MoePruneError, RankError
from moeprune.interrupts import Interrupted

Made = TypeVar("Made")

FAILED = "moeprune/failed"
POLL_SECONDS = 0.5
TELLING = timedelta(seconds=5)
GRACE_SECONDS = 20  # for a rank to save its sums after another one failed; torchrun gives 30
# Failures are told through the store, so that this is only how long a fast rank waits for a slow one.
PATIENCE = timedelta(hours=12)
PIECE = 1 << 23  # elements that are on a GPU at once while sums are added: 64 MiB


@dataclass(frozen=True)
class Ranks:
    """This process among those that calibrate together.

    Attributes:
        rank: Its number.
        world: How many there are.
        device: Where its model runs, ``cpu`` or ``cuda:N``.
        here: How many there are on its machine.
        local: Its number on its machine.
        store: Where ranks tell each other of failures (a ``torch.distributed.Store``); None where there is but one.
    """

    rank: int = 0
    world: int = 1
    device: str = "cpu"
    here: int = 1
    local: int = 0
    store: Any = None

    @classmethod
    def current(cls, device: str = "auto") -> Ranks:
        """The rank that ``torchrun`` or ``accelerate launch`` made of this process; without them it is rank 0 of 1.

        Ranks on CPUs talk through gloo, ranks on GPUs through NCCL, the n-th of a machine on its n-th GPU.

        Args:
            device: ``auto``, ``cpu``, ``cuda`` or, for a single rank on a machine, ``cuda:N``.

        Raises:
            MoePruneError: If the device is not there, or there are more ranks than GPUs.
        """
        rank, world, local, here = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
        )
        if world == 1 or "RANK" not in os.environ:
            return cls(device=choose_device(device))
        device = _own_device(choose_device(device), local=local, here=here)
        on_gpu = device.startswith("cuda")
        if on_gpu:
            torch.cuda.set_device(device)
        store, rank, world = next(rendezvous("env://"))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=dist.PrefixStore("sums", store),  # pyright: ignore[reportPrivateImportUsage]
            rank=rank, world_size=world, timeout=PATIENCE,
        )  # fmt: skip
        return cls(rank, world, device, here, local, store)

    @property
    def is_first(self) -> bool:
        """Whether this rank prints and writes files."""
        return self.rank == 0

    def share(self, count: int) -> list[int]:
        """Which of ``count`` units of work are this rank's; every unit belongs to one rank.

        Give it batches rather than rows: sums over the same batches differ by the order of float64 additions only.
        """
        return list(range(self.rank, count, self.world))

    def once(self, make: Callable[[], Made]) -> Made:
        """What ``make`` returns on rank 0, on all ranks: such as text that is read and tokenised once."""
        box = [make() if self.is_first else None]
        if self.world > 1:
            with _talking():
                dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]  # pyright: ignore[reportReturnType] - what was None has been received

    def once_then_all(self, make: Callable[[bool], Made]) -> Made:
        """Call ``make(True)`` on rank 0 and, when that is done, ``make(False)`` on the others."""
        made = [make(True)] if self.is_first else []
        self.wait()
        return made[0] if made else make(False)

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            with _talking():
                dist.barrier()

    def gather(self, value: Made) -> list[Made]:
        """Every rank's value, on all ranks."""
        if self.world == 1:
            return [value]
        values: list[Made | None] = [None] * self.world
        with _talking():
            dist.all_gather_object(values, value)
        return values  # pyright: ignore[reportReturnType] - filled

    def reduce(self, stats: Stats) -> Stats:
        """The statistics of all ranks together, on rank 0; on the others their own. ``stats`` stays as it is.

        Sums are added and maxima compared in float64.
        """
        if self.world == 1:
            return stats
        own = dict(stats.arrays())
        # A rank without text knows nothing of what the model does not give, nor how large a hidden state is.
        shapes = {name: array.shape for name, array in own.items()} if stats.tokens.any() else None
        saw = [part for part in self.gather(shapes) if part is not None]
        names = [name for name in saw[0] if all(name in part for part in saw)] if saw else []
        sums = {name: self._add(own.get(name), saw[0][name], kind_of(name)) for name in names}
        return _filled(stats, sums) if self.is_first and saw else stats

    def _add(self, array: np.ndarray | None, shape: tuple[int, ...], kind: str) -> np.ndarray:
        whole = np.zeros(shape) if array is None else np.array(array)
        operation = dist.ReduceOp.MAX if kind == "max" else dist.ReduceOp.SUM
        for piece in torch.from_numpy(whole.reshape(-1)).split(PIECE):
            sent = piece.to(self.device)
            with _talking():
                dist.reduce(sent, dst=0, op=operation)
                piece.copy_(sent)
        return whole

    @contextmanager
    def together(self) -> Iterator[None]:
        """End all ranks if one fails inside the block, and leave it only when all have come to its end.

        A rank that learns of a failure gets SIGTERM, which lets it save its sums, and is ended if it waits for others.

        A failure is printed once on each machine, by its first rank. The rank that it happened on leaves it to that one
        if that one answers.

        Raises:
            SystemExit: With status 1, if another rank failed, or this one did and others have said why.
        """
        if self.store is None:
            yield
            return
        watch = _Watch(self)
        watch.start()
        try:
            self._try_link()
            yield
            self.wait()
        except BaseException as error:
            watch.over.set()
            if watch.failure is not None and isinstance(error, Interrupted):
                raise SystemExit(1) from None  # that rank has said why
            text = str(error) if isinstance(error, MoePruneError | Interrupted) else f"{type(error).__name__}: {error}"
            is_told = False
            with suppress(RuntimeError):  # the store has ended with the first machine, or a rank does not answer
                is_told = self._tell(f"rank {self.rank} of {self.world}: {text}", watch, error)
            if is_told:
                raise SystemExit(1) from None
            raise
        watch.over.set()
        dist.destroy_process_group()

    def _try_link(self) -> None:
        """Let GPUs talk before anything is run: their sums will be added at the very end."""
        if self.device.startswith("cuda"):
            with _talking():
                dist.all_reduce(torch.zeros(1, device=self.device))
                torch.cuda.synchronize(self.device)

    def _tell(self, failure: str, watch: _Watch, error: BaseException) -> bool:
        """Tell the others of a failure. When a process ends its launcher ends the others: let them print it first.

        Returns:
            Whether all has been said: this is a consequence of another rank's failure, or its text has been printed.
        """
        first = self.store.compare_set(FAILED, "", failure).decode()
        if isinstance(error, Interrupted):
            return False  # the others got the signal, too
        if first != failure:
            watch.say(first)
            return True
        self.store.set(_told(self.rank), "")
        self.store.wait(sorted({_told(0), _told(self.rank - self.local)}), TELLING)
        # What moeprune did not expect is shown with its traceback.
        return self.local != 0 and isinstance(error, MoePruneError)


class _Watch(threading.Thread):
    """Asks the store whether a rank failed, because a rank that waits for others cannot."""

    def __init__(self, ranks: Ranks):
        super().__init__(daemon=True)
        assert ranks.store is not None
        self._ranks = ranks
        self._store = ranks.store.clone()  # a connection of its own: another thread may be waiting on that one
        self.over = threading.Event()
        self.failure: str | None = None
        self._lock = threading.Lock()
        self._has_said = False

    def say(self, failure: str) -> None:
        """Print it once on each machine."""
        with self._lock:
            if self._ranks.local == 0 and not self._has_said:
                self._has_said = True
                print(f"error: {failure}", file=sys.stderr, flush=True)
                with suppress(RuntimeError):
                    self._store.set(_told(self._ranks.rank), "")

    def run(self) -> None:
        while not self.over.wait(POLL_SECONDS):
            try:
                if not self._store.check([FAILED]):
                    continue
                failure = self._store.get(FAILED).decode()
            except RuntimeError as error:  # the store is on the first machine
                failure = f"the first machine does not answer any more ({error})"
            if self.over.wait(POLL_SECONDS):  # this very rank failed, or all is done and the store has gone
                return
            self.failure = failure
            self.say(failure)
            os.kill(os.getpid(), signal.SIGTERM)
            if not self.over.wait(GRACE_SECONDS):
                os._exit(1)


@contextmanager
def _talking() -> Iterator[None]:
    """Name what it means that ranks cannot talk to each other."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise RankError(
            f"another rank does not answer: it was killed, or its machine or the network between them failed ({reason})"
        ) from error


def _told(rank: int) -> str:
    return f"{FAILED}/told by {rank}"


def _filled(stats: Stats, arrays: dict[str, np.ndarray]) -> Stats:
    whole = replace(stats, tokens=arrays["tokens"], experts={}, layers={}, more={}, halves={}, runs=list(stats.runs))
    for key, array in arrays.items():
        group, _, name = key.rpartition(".")
        if group:
            getattr(whole, group)[name] = array
    whole.add_up()
    return whole


def _own_device(device: str, *, local: int, here: int) -> str:
    if not device.startswith("cuda"):
        return device
    if ":" in device and here > 1:
        raise MoePruneError(f"--device {device} is one GPU for {here} ranks of this machine. Give --device cuda.")
    if ":" in device:
        return device
    count = torch.cuda.device_count()
    if local >= count:
        raise MoePruneError(
            f"{here} ranks on a machine where torch sees {count} GPUs: each needs one of its own. Start at most "
            f"{count} ranks here, and let each see all GPUs."
        )
    return f"cuda:{local}"
