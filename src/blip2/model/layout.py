"""How the positions of a Q-Former's pass lie in memory: all queries, row after row, then all texts, padding left out.

    rows          q q q t t .          positions      q q q  q q q  t t  t t t
                  q q q t t t

Linear maps and norms work on positions (M, D), each side in one piece; attention works on rows (B, Q + T, D).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Of a pass of B rows.

    Attributes:
        batch: B.
        num_queries: Q, in each row.
        num_text: T, of the longest text.
        places: (Mt,) of the text's positions that are kept, among B * T; None: all are.
    """

    batch: int
    num_queries: int
    num_text: int
    places: Tensor | None = None

    @classmethod
    def of(cls, queries: Tensor | None, text: Tensor | None, is_real: Tensor | None) -> "Layout":
        """That of queries (B, Q, D) and text (B, T, D), `is_real` (B, T) where it is no padding; None: all."""
        fed = queries if queries is not None else text
        assert fed is not None, "a pass is fed queries, text or both"
        places = None if is_real is None or is_real.all() else is_real.flatten().nonzero().squeeze(1)
        num_queries = 0 if queries is None else queries.shape[1]
        return cls(fed.shape[0], num_queries, 0 if text is None else text.shape[1], places)

    @property
    def without_text(self) -> "Layout":
        """That of the queries alone."""
        return replace(self, num_text=0, places=None)

    def pack(self, queries: Tensor | None, text: Tensor | None) -> Tensor:
        """Positions (M, D) of queries (B, Q, D) and text (B, T, D)."""
        sides = [] if queries is None else [queries.flatten(0, 1)]
        if text is not None:
            sides.append(self._kept(text))
        return sides[0] if len(sides) == 1 else torch.cat(sides)

    def split(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The queries' positions (B * Q, D) and the texts' (Mt, D)."""
        border = self.batch * self.num_queries
        return positions[:border], positions[border:]

    def rows(self, positions: Tensor) -> Tensor:
        """Positions (M, D) as rows (B, Q + T, D), zero where padding is."""
        queries, text = self.split(positions)
        if not self.num_text:
            return self.queries(queries)
        texts = self.texts(text)  # (B, T, D)
        return torch.cat([self.queries(queries), texts], dim=1) if self.num_queries else texts

    def positions(self, rows: Tensor) -> Tensor:
        """Rows (B, Q + T, D) as positions (M, D)."""
        queries, text = rows[:, : self.num_queries], rows[:, self.num_queries :]
        return self.pack(queries if self.num_queries else None, text if self.num_text else None)

    def queries(self, queries: Tensor) -> Tensor:
        """The queries' positions (B * Q, D) as (B, Q, D)."""
        return queries.unflatten(0, (self.batch, self.num_queries))

    def texts(self, text: Tensor) -> Tensor:
        """The texts' positions (Mt, D) as (B, T, D), zero where padding is."""
        if self.places is not None:
            whole = text.new_zeros(self.batch * self.num_text, text.shape[1])
            text = whole.index_put((self.places,), text)  # index_copy would keep the text for its backward pass
        return text.unflatten(0, (self.batch, self.num_text))

    def _kept(self, text: Tensor) -> Tensor:
        whole = text.flatten(0, 1)
        return whole if self.places is None else whole.index_select(0, self.places)
