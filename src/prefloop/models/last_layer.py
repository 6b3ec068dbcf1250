"""The last layer at the tokens that are read, and only there.

Nothing attends to the last layer's output, so where nobody reads the hidden state of a token, its query, its attention
and its feed-forward are computed for nothing: of a long prompt that is a whole layer but for keys and values. The
feed-forward and the output projection work on each token alone, and are given the read ones through hooks; attention
leaves out the queries of the others (`Segment.asks`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prefloop.batch.layout import Segment


def asking_segments(segments: tuple[Segment, ...], read_R: Tensor) -> tuple[Segment, ...]:
    """The segments of the last layer: the tokens of a segment before its first read one ask nothing.

    `read_R` are the tokens whose hidden state is read, int64, in order.
    """
    starts = torch.tensor([segment.start for segment in segments])
    first = torch.searchsorted(read_R.cpu(), starts)
    padded = torch.cat([read_R.cpu(), read_R.new_tensor([segments[-1].stop]).cpu()])[first].tolist()
    found: list[Segment] = []
    for segment, read in zip(segments, padded, strict=True):
        at = min(read, segment.stop)
        if at > segment.start:
            found.append(Segment(segment.start, at, segment.end, asks=False))
        if at < segment.stop:
            found.append(Segment(at, segment.stop, segment.end))
    return tuple(found)


@contextmanager
def only_at(layer: Any, read_R: Tensor, num_tokens: int) -> Iterator[None]:
    """Within this context the layer's position-wise modules work on the tokens `read_R`; the others get 0."""
    modules: tuple[nn.Module, ...] = (layer.self_attn.o_proj, layer.mlp)
    handles = [module.register_forward_pre_hook(_take(read_R)) for module in modules]
    handles += [module.register_forward_hook(_put(read_R, num_tokens)) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _take(read_R: Tensor) -> Any:
    def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arguments[0].index_select(1, read_R), *arguments[1:])

    return hook


def _put(read_R: Tensor, num_tokens: int) -> Any:
    def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.new_zeros(1, num_tokens, output.shape[-1]).index_copy(1, read_R, output)

    return hook
