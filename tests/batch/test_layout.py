import numpy as np
import pytest
import torch

from packed_examples import branching_demonstrations, paths_of, random_pairs
from prefloop.batch import layout as layout_module
from prefloop.batch.layout import MAX_PADDING, forest_layout, num_row_places, row_blocks, rows_layout, segments_of
from prefloop.batch.packed import pack


def test_segments_cover_the_forest_in_unbranched_runs():
    batch = pack(branching_demonstrations())
    segments = segments_of(batch)
    assert [s.start for s in segments] == [0, *(s.stop for s in segments[:-1])]
    assert segments[-1].stop == batch.num_tokens
    for start, stop, end, asks in segments:
        assert asks
        assert batch.end_T[start:stop].tolist() == [end] * (stop - start)
        assert batch.parent_T[start + 1 : stop].tolist() == list(range(start, stop - 1))
        assert all(start <= batch.parent_T[child] for child in range(stop, end))


def test_a_pair_is_three_segments():
    [pair] = random_pairs(1, seed=3)
    batch = pack([pair])
    prompt, first, second = segments_of(batch)
    assert prompt.end == first.end + (second.stop - second.start) == batch.num_tokens
    assert first.stop == second.start


@pytest.fixture(params=[1024, 1], ids=["one block", "blocks"])
def min_places(request, monkeypatch):
    monkeypatch.setattr(layout_module, "MIN_PLACES", request.param)


def test_rows_hold_every_maximal_path_once(min_places):
    examples = branching_demonstrations()
    layout = rows_layout(pack(examples))
    texts = {tuple(one.token.tolist()) for one in paths_of(examples)}
    maximal = sorted((p for p in texts if not any(q != p and q[: len(p)] == p for q in texts)), key=lambda p: -len(p))
    rows = [row.tolist() for block in layout.blocks for row in block]
    assert len(rows) == len(maximal)
    assert sorted(tuple(row[: len(p)]) for row, p in zip(rows, maximal, strict=True)) == sorted(maximal)
    assert all(not any(row[len(p) :]) for row, p in zip(rows, maximal, strict=True))
    lengths = [len(p) for p in maximal]
    assert [tuple(block.shape) for block in layout.blocks] == row_blocks(lengths)
    assert layout.num_places == num_row_places(lengths)
    assert layout.num_positions == max(lengths)


def test_both_layouts_place_every_token_behind_its_ancestors(min_places):
    batch = pack(random_pairs(9))
    forest, rows = forest_layout(batch), rows_layout(batch)
    for layout in (forest, rows):
        assert torch.equal(torch.cat([block.flatten() for block in layout.blocks])[layout.place_T], batch.token_T)
    rows_of_blocks = [(row, i) for block in rows.blocks for row in block.tolist() for i in range(len(row))]
    for t in range(batch.num_tokens):
        row, column = rows_of_blocks[rows.place_T[t]]
        assert column == batch.depth_T[t]
        node = t
        while node >= 0:
            assert row[batch.depth_T[node]] == batch.token_T[node]
            node = int(batch.parent_T[node])


def test_little_of_a_block_is_padding():
    lengths = np.random.default_rng(0).lognormal(5.5, 0.6, 100).astype(int).tolist()
    blocks = row_blocks(lengths)
    assert sum(rows for rows, _ in blocks) == 100
    assert num_row_places(lengths) < sum(lengths) / (1 - MAX_PADDING)
    longest = sorted(lengths, reverse=True)
    for rows, columns in blocks:
        held, longest = longest[:rows], longest[rows:]
        assert columns == max(held)
        assert rows * columns <= 1024 or rows * columns - sum(held) <= MAX_PADDING * rows * columns


def test_few_rows_are_one_block_however_different():
    assert row_blocks([3, 100, 1]) == [(3, 100)]
    assert row_blocks([3000]) == [(1, 3000)]
    assert row_blocks([3000, 1]) == [(1, 3000), (1, 1)]
