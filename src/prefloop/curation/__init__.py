"""Judgements in, training data out: the best of the scored, pairs of them, and what people said."""

from prefloop.curation.buffer import Curated, curate
from prefloop.curation.scores import noise_sd
from prefloop.curation.settings import CurationSettings

__all__ = ["Curated", "CurationSettings", "curate", "noise_sd"]
