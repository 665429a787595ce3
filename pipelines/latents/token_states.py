"""The states of captions' tokens as columns of a shard: ragged, so no padding is stored.

`tokens` is list<int32>, the number of tokens of each caption of the image; `states` is
list<fixed_size_binary[2D]>, one value a token with D little-endian float16, caption after caption.
Parquet writes such values fifty times as fast as nested lists of numbers.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

STATES, TOKENS = "states", "tokens"
TOKEN_COUNTS = pa.list_(pa.int32())


@dataclass(frozen=True)
class TokenStates:
    """States of the captions of some images.

    `values` float16 [T, D] of all tokens in order, `lengths` the number of tokens of each caption
    by image, `empty` float16 [L, D] the states of the empty caption.
    """

    values: np.ndarray
    lengths: Sequence[Sequence[int]]
    empty: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of `values`."""
        return self.values.nbytes

    def columns(self) -> dict[str, pa.Array]:
        """The two columns, a row an image."""
        ends = np.cumsum([0, *(sum(some) for some in self.lengths)])
        size, width = self.values.shape
        tokens = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(2 * width), size, [None, pa.py_buffer(self.values)]
        )
        return {
            TOKENS: pa.array(self.lengths, TOKEN_COUNTS),
            STATES: pa.ListArray.from_arrays(pa.array(ends, pa.int32()), tokens),
        }

    def notes(self) -> dict[str, Any]:
        """What the footer of a shard says of them."""
        empty = base64.b64encode(self.empty.tobytes()).decode()
        return {"tokens": len(self.values), "empty": empty}


def state_width(schema: pa.Schema) -> int:
    """D of the column `states`."""
    return int(schema.field(STATES).type.value_type.byte_width) // 2


def empty_states(manifest: Mapping[str, Any]) -> np.ndarray:
    """States float16 [L, D] of the empty caption, from the manifest of a text store."""
    data = base64.b64decode(manifest["empty"])
    return np.frombuffer(data, np.float16).reshape(-1, manifest["state_dim"])


def starts_of(tokens: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Of a column `tokens`, the first caption of each row [n+1] and of each caption the first
    token [m+1], both counted from the shard's beginning and int64.
    """
    lists = tokens.cast(TOKEN_COUNTS).combine_chunks()
    captions = lists.offsets.to_numpy().astype(np.int64)
    counts = lists.values.to_numpy()[captions[0] : captions[-1]]
    return captions - captions[0], np.cumsum(np.concatenate([[0], counts]), dtype=np.int64)
