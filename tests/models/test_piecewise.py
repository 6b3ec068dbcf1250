import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packed_examples import path
from prefloop.batch.examples import Demonstration
from prefloop.batch.layout import segments_of
from prefloop.batch.packed import pack
from prefloop.models import piecewise
from prefloop.models.piecewise import pieces_of, piecewise_attention

token_paths = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=9), min_size=1, max_size=6)


def inputs(num_tokens, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, h, num_tokens, 8, dtype=dtype, generator=generator).requires_grad_() for h in (4, 2, 2)]


def dense(q, k, v, batch, window, softcap):
    """The definition: the scores of all pairs, those of ancestors within the window kept."""
    index, depth = torch.arange(batch.num_tokens), batch.depth_T
    seen = (index[None] <= index[:, None]) & (index[:, None] < batch.end_T[None])
    seen &= depth[:, None] - depth[None] < (window or 10**9)
    score = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 8**0.5
    score = score if softcap is None else softcap * torch.tanh(score / softcap)
    return score.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)


def assert_same_as_dense(batch, window, softcap):
    q, k, v = inputs(batch.num_tokens)
    ours = piecewise_attention(q, k, v, segments_of(batch), 8**-0.5, window=window, softcap=softcap)
    theirs = dense(q, k, v, batch, window, softcap)
    weight = torch.randn(theirs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(piecewise, "PIECE", 3)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_windows_and_caps_equal_a_dense_mask_on_any_forest(small_pieces, softcap):
    @given(token_paths, st.sampled_from([None, 1, 2, 3, 5, 8]))
    @settings(deadline=None, max_examples=25)
    def check(paths, window):
        assert_same_as_dense(pack([Demonstration((path(p, 1),)) for p in paths]), window, softcap)

    check()


@pytest.mark.parametrize(("window", "softcap"), [(20, None), (300, None), (None, 5.0), (20, 5.0)])
def test_they_do_where_segments_are_longer_than_a_piece(window, softcap):
    root = list(range(280))
    paths = [root + [60] * 30, root + [59] * 3 + [58] * 10, root + [59] * 3 + [57] * 5, [56] * 30]
    assert_same_as_dense(pack([Demonstration((path(p, 1),)) for p in paths]), window, softcap)


def test_a_piece_gathers_no_more_than_the_window_reaches():
    batch = pack([Demonstration((path([*range(50), i, *range(700)], 1),)) for i in range(4)])
    for window in (1, 64, 400):
        pieces = pieces_of(segments_of(batch), window)
        assert [(p.start, p.stop) for p in pieces] == [(p.runs[-1][1] - (p.stop - p.start), p.stop) for p in pieces]
        assert sum(p.stop - p.start for p in pieces) == batch.num_tokens
        for piece in pieces:
            num_keys = sum(stop - start for start, stop in piece.runs)
            assert piece.stop - piece.start <= num_keys <= piecewise.PIECE + window - 1


def test_queries_that_nobody_reads_are_left_out():
    batch = pack([Demonstration((path([1, 2, 3, i, 5], 3),)) for i in range(3)])
    segments = segments_of(batch)
    quiet = (segments[0]._replace(asks=False), *segments[1:])
    q, k, v = inputs(batch.num_tokens)
    whole, part = (piecewise_attention(q, k, v, s, 0.3, window=3) for s in (segments, quiet))
    assert (part[:, :, :3] == 0).all()
    assert torch.equal(part[:, :, 3:], whole[:, :, 3:])
    assert torch.autograd.grad(part.sum(), q)[0][:, :, :3].abs().sum() == 0


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_window():
    batch = pack([Demonstration((path([0, *([1] * 600)], 1),))])
    q, k, v = inputs(batch.num_tokens, torch.float32)
    for window in (8, 512):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            piecewise_attention(q, k, v, segments_of(batch), 0.3, window=window, softcap=10.0)
        assert sum(x.untyped_storage().nbytes() for x in kept) == sum(x.nbytes for x in (q, k, v))
