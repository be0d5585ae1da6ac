"""Positions lie as told, padding left out, and come back where they were."""

import pytest
import torch

from blip2.model.layout import Layout

B, Q, T, D = 3, 2, 4, 5
REAL = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])


def sides():
    return torch.randn(B, Q, D), torch.randn(B, T, D)


def test_queries_stand_before_texts_without_padding():
    queries, text = sides()
    packed = Layout.of(queries, text, REAL).pack(queries, text)
    assert packed.shape == (B * Q + 7, D)
    torch.testing.assert_close(packed[: B * Q], queries.flatten(0, 1))
    torch.testing.assert_close(packed[B * Q :], text[REAL.bool()])


@pytest.mark.parametrize("is_real", [None, REAL, torch.ones_like(REAL)])
@pytest.mark.parametrize(("has_queries", "has_text"), [(True, True), (True, False), (False, True)])
def test_rows_come_back_with_zeros_where_padding_was(is_real, has_queries, has_text):
    queries, text = sides()
    given = queries if has_queries else None, text if has_text else None
    layout = Layout.of(*given, is_real if has_text else None)
    packed = layout.pack(*given)
    rows = layout.rows(packed)
    kept = text if is_real is None else text * is_real[..., None]
    expected = [part for part, is_there in ((queries, has_queries), (kept, has_text)) if is_there]
    torch.testing.assert_close(rows, torch.cat(expected, dim=1))
    torch.testing.assert_close(layout.positions(rows), packed)
    found, told = layout.split(packed)
    assert len(found) == (B * Q if has_queries else 0)
    if has_queries:
        torch.testing.assert_close(layout.queries(found), queries)
    if has_text:
        torch.testing.assert_close(layout.texts(told), kept)


def test_a_batch_without_padding_keeps_no_places():
    queries, text = sides()
    assert Layout.of(queries, text, torch.ones_like(REAL)).places is None
    assert Layout.of(queries, text, REAL).without_text == Layout(B, Q, 0)
