"""The ledger moves with the keys of its cache layer: selection, repetition, cropping, reset."""

from __future__ import annotations

import pytest
import torch

from mmeff.pruning.hosts._ledger import PrunedLayer


def pruned_layer() -> PrunedLayer:
    """Two rows that kept 4 of 6 columns, then two decoded tokens. Every key holds its own column number."""
    from transformers.cache_utils import DynamicLayer

    layer = PrunedLayer.adopt(DynamicLayer(), 2, torch.device("cpu"), attached=lambda: True)
    cols = torch.tensor([[0, 2, 4, 5], [0, 1, 4, 5]])
    layer.append(0, cols, torch.ones_like(cols, dtype=torch.bool), 6, complete=True)
    keys = cols[:, None, :, None].float()
    layer.update(keys, keys)
    for column in (6.0, 7.0):
        token = torch.full((2, 1, 1, 1), column)
        layer.update(token, token)
    return layer


def assert_aligned(layer: PrunedLayer, base: int) -> None:
    """The ledger's columns are what the keys hold."""
    rows = len(layer.keys)
    cols, valid = layer.columns(base, torch.zeros(rows, 0, dtype=torch.long), torch.zeros(rows, 0, dtype=torch.bool))
    assert torch.equal(cols.float(), layer.keys[:, 0, :, 0])
    assert valid.all()


def test_decoded_tokens_follow_in_order():
    assert_aligned(pruned_layer(), 8)


@pytest.mark.parametrize("index", [[1, 0], [1, 1], [0]])
def test_rows_move_together(index):
    for move in (PrunedLayer.reorder_cache, PrunedLayer.batch_select_indices):
        layer = pruned_layer()
        move(layer, torch.tensor(index))
        assert_aligned(layer, 8)
    layer = pruned_layer()
    layer.batch_repeat_interleave(3)
    assert len(layer.keys) == 6
    assert_aligned(layer, 8)


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4])
def test_cropping_the_end(tokens):
    """Up to two decoded tokens, then into the text that pruning kept."""
    layer = pruned_layer()
    layer.crop(-tokens)
    assert layer.get_seq_length() == 6 - tokens
    assert_aligned(layer, 8 - tokens)


def test_cropping_pruned_columns_is_refused_and_changes_nothing():
    layer = pruned_layer()
    with pytest.raises(ValueError, match="pruned columns lie among them"):
        layer.crop(-5)
    assert_aligned(layer, 8)
    with pytest.raises(ValueError, match="positive value"):
        layer.crop(5)
    assert_aligned(layer, 8)


def test_reset_forgets_everything():
    layer = pruned_layer()
    layer.complete = False
    layer.reset()
    assert (layer.get_seq_length(), layer.seen, layer.complete, layer.cols.shape[1]) == (0, 0, True, 0)
