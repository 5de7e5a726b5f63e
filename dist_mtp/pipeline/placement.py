"""Placement: which pipeline rank holds which virtual stage."""

from __future__ import annotations

from collections.abc import Sequence

from dist_mtp.config import Config


def stage_ranks(config: Config) -> tuple[int, ...]:
    """Rank of each virtual stage.

    ``v``: the stages run down the ranks and back up, so rank r holds stages r and 2P-1-r, and rank 0 both ends of the
    model: the embedding at one end and the head and MTP modules at the other are one set of parameters. With P=3::

        rank 0   stage 0   stage 5          (0, 1, 2, 2, 1, 0)
        rank 1   stage 1   stage 4
        rank 2   stage 2   stage 3

    ``last``: the stages go round the ranks, s on s % P; under ``1f1b`` and ``gpipe`` there is one for each rank.
    """
    ranks = tuple(range(config.parallel.pp))
    if config.pipeline.placement == "v":
        return ranks + ranks[::-1]
    return ranks * (config.num_stages // len(ranks))


def embedding_has_two_copies(config: Config, stage_to_rank: Sequence[int]) -> bool:
    """MTP modules and a tied head need it where the last stage is; a rank that holds both stages has one copy for both."""
    return (config.mtp.depth > 0 or config.model.tie_word_embeddings) and stage_to_rank[-1] != stage_to_rank[0]
