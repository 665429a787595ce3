"""How well images and texts agree: CLIP score, and retrieval in both directions.

Both compare embeddings of one space, such as those of CLIP's or SigLIP's towers.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from torch import Tensor
from torch.nn import functional as F

ROWS_AT_ONCE = 4096


def clip_scores(images: Tensor, texts: Tensor) -> Tensor:
    """100·max(cosine, 0) of each image [N, D] and its text [N, D]: float32 [N].

    It is torchmetrics' CLIPScore; Hessel et al. (arXiv 2104.08718) have 2.5 in the place of 100.
    """
    return 100.0 * F.cosine_similarity(images.float(), texts.float(), dim=-1).clamp_min(0.0)


def retrieval_top1(
    queries: Tensor,
    targets: Tensor,
    query_groups: Sequence[Set[int]] | None = None,
    target_groups: Sequence[Set[int]] | None = None,
) -> float:
    """Share of the queries [N, D] whose nearest target [M, D] by cosine is a right one.

    A target is right where one of its groups is one of the query's. Without groups the i-th belongs
    to the i-th. Of several nearest targets the first counts. Raises ValueError where there is no
    query or no target.
    """
    if not len(queries) or not len(targets):
        raise ValueError("Retrieval needs images and texts.")
    wanted = query_groups if query_groups is not None else [{i} for i in range(len(queries))]
    offered = target_groups if target_groups is not None else [{i} for i in range(len(targets))]
    queries, targets = F.normalize(queries.float(), dim=-1), F.normalize(targets.float(), dim=-1)
    nearest = [
        place
        for some in queries.split(ROWS_AT_ONCE)
        for place in (some @ targets.T).argmax(dim=1).tolist()
    ]
    right = [
        not groups.isdisjoint(offered[place]) for groups, place in zip(wanted, nearest, strict=True)
    ]
    return sum(right) / len(queries)
