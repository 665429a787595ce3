"""How well images and texts agree: CLIP score, and retrieval in both directions.

Both compare embeddings of one space, such as those of CLIP's or SigLIP's towers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
    query_groups: Sequence[int] | None = None,
    target_groups: Sequence[int] | None = None,
) -> float:
    """Share of the queries [N, D] whose nearest target [M, D] by cosine is a right one.

    A target is right where its group is the query's. Without groups the i-th belongs to the i-th.
    Of several nearest targets the first counts. Raises ValueError where there is no query or no
    target.
    """
    if not len(queries) or not len(targets):
        raise ValueError("Retrieval needs images and texts.")
    wanted = torch.as_tensor(query_groups if query_groups is not None else range(len(queries)))
    offered = torch.as_tensor(target_groups if target_groups is not None else range(len(targets)))
    queries, targets = F.normalize(queries.float(), dim=-1), F.normalize(targets.float(), dim=-1)
    right = 0
    for some, groups in zip(queries.split(ROWS_AT_ONCE), wanted.split(ROWS_AT_ONCE), strict=True):
        nearest = (some @ targets.T).argmax(dim=1).cpu()
        right += int((offered[nearest] == groups).sum())
    return right / len(queries)
