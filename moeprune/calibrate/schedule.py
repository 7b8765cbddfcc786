"""The batches of a calibration run, in an order that depends on the text alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moeprune.calibrate.rows import Rows


@dataclass(frozen=True)
class Batch:
    """Rows that go through the model together.

    Attributes:
        part: The domain's rows.
        begin: Its first row.
        stop: The row after its last.
        batch_size: Rows that a full batch has.
    """

    part: Rows
    begin: int
    stop: int
    batch_size: int

    @property
    def domain(self) -> str:
        """Name of the domain."""
        return self.part.domain

    @property
    def numbers(self) -> range:
        """Numbers of its rows in the domain."""
        return range(self.begin, self.stop)

    @property
    def num_tokens(self) -> int:
        """Tokens of text, padding excluded."""
        return int(self.part.mask[self.begin : self.stop].sum())

    def rows(self) -> Rows:
        """The rows themselves."""
        return next(self.part.batches(self.batch_size, rows=slice(self.begin, self.stop)))


def schedule(domains: Sequence[Rows], *, batch_size: int) -> list[Batch]:
    """All batches, domains interleaved so that any beginning of the list has about the mix of the whole.

    A batch is the unit that ranks share, that is summed at once and that a killed run resumes at. The rows in a batch
    thus are the same whatever the number of ranks, and so is every float32 product of the model.

    Args:
        domains: The text.
        batch_size: Rows a batch.
    """
    places = []
    for at, part in enumerate(domains):
        begins = range(0, len(part), batch_size)
        for i, begin in enumerate(begins):
            batch = Batch(part, begin, min(begin + batch_size, len(part)), batch_size)
            places.append(((2 * i + 1) / (2 * len(begins)), at, batch))
    return [batch for _, _, batch in sorted(places, key=lambda place: place[:2])]
