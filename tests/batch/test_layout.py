import torch

from packed_examples import branching_demonstrations, paths_of, random_pairs
from prefloop.batch.layout import forest_layout, num_row_places, rows_layout, segments_of
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


def test_rows_hold_every_maximal_path_once():
    examples = branching_demonstrations()
    batch = pack(examples)
    layout = rows_layout(batch)
    texts = {tuple(one.token.tolist()) for one in paths_of(examples)}
    maximal = sorted(p for p in texts if not any(q != p and q[: len(p)] == p for q in texts))
    assert layout.input_ids_BL.shape == (len(maximal), max(map(len, maximal)))
    for row, tokens in zip(layout.input_ids_BL.tolist(), maximal, strict=True):
        assert tuple(row[: len(tokens)]) == tokens
    assert layout.input_ids_BL.numel() == num_row_places(batch)


def test_both_layouts_place_every_token_behind_its_ancestors():
    batch = pack(random_pairs(9))
    for layout in (forest_layout(batch), rows_layout(batch)):
        assert torch.equal(layout.input_ids_BL.flatten()[layout.place_T], batch.token_T)
    rows = rows_layout(batch)
    row_T, column_T = rows.place_T // rows.input_ids_BL.shape[1], rows.place_T % rows.input_ids_BL.shape[1]
    assert torch.equal(column_T, batch.depth_T)
    for t in range(batch.num_tokens):
        node = t
        while node >= 0:
            assert rows.input_ids_BL[row_T[t], batch.depth_T[node]] == batch.token_T[node]
            node = int(batch.parent_T[node])
