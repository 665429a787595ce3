"""The account of a source: what was listed, what is planned of it, and what is not, by reason.

The promise "planned = stored + errors" begins after planning; this is what comes before: files
listed = files read + skipped, each skip with its reason, how many images have labels and captions,
from where, and which labels, captions and images were lost while planning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

KEPT_LOSSES = 100
"""Losses that an account holds in words; all of them are counted."""
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}


@dataclass
class Skip:
    """How many files were skipped for one reason, and one of them."""

    count: int
    example: str


@dataclass
class Account:
    """What became of everything that a source holds."""

    path: str
    source_format: str = ""
    """folder, parquet, webdataset or list."""
    num_files: int = 0
    """Files listed, hidden ones and links among them."""
    skipped: dict[str, Skip] = field(default_factory=dict)
    """By reason."""
    num_images: int = 0
    num_labels: int = 0
    labels_from: str = ""
    class_names: list[str] = field(default_factory=list)
    """In the order of their numbers, where classes have names."""
    num_classes: int = 0
    num_captions: int = 0
    captions_from: str = ""
    unused: list[str] = field(default_factory=list)
    """What was there and is not used: columns, sidecar files, members."""
    remarks: list[str] = field(default_factory=list)
    """What may hint at damage, and is no loss."""
    num_losses: int = 0
    losses: list[dict[str, str]] = field(default_factory=list)
    """The first losses of planning: address, stage `plan`, message."""
    lost_files: float = 0.0
    """Files of many images that cannot be read; a tar counts by the share of its bytes."""

    def skip(self, reason: str, uri: str, count: int = 1) -> None:
        """Count `count` files that are not read, `uri` among them."""
        there = self.skipped.setdefault(reason, Skip(0, uri))
        there.count += count

    def lose(self, address: str, message: str) -> None:
        """Record a label, caption, member or file that cannot be read while planning."""
        self.num_losses += 1
        if len(self.losses) < KEPT_LOSSES:
            self.losses.append({"address": address, "stage": "plan", "message": message})

    @property
    def num_skipped(self) -> int:
        """Files listed and not read."""
        return sum(skip.count for skip in self.skipped.values())

    def numbers(self) -> dict[str, int]:
        """The counts by name."""
        return {
            "files": self.num_files,
            "skipped": self.num_skipped,
            "images": self.num_images,
            "labels": self.num_labels,
            "classes": self.num_classes,
            "captions": self.num_captions,
            "losses": self.num_losses,
        }

    def to_dict(self) -> dict[str, Any]:
        """The account as JSON has it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Account:
        """What `to_dict` gave."""
        skipped = {reason: Skip(**skip) for reason, skip in values["skipped"].items()}
        return cls(**{**values, "skipped": skipped})

    def lines(self) -> list[str]:
        """At most eleven lines for people."""
        read = self.num_files - self.num_skipped
        lines = [
            f"source    {self.path} ({self.source_format})",
            f"files     {self.num_files:,} listed = {read:,} read + {self.num_skipped:,} skipped",
        ]
        reasons = sorted(self.skipped.items(), key=lambda item: -item[1].count)
        shown = reasons if len(reasons) <= 3 else reasons[:2]
        lines += [
            f"  skipped {s.count:,}: {reason}, for example {s.example}" for reason, s in shown
        ]
        if len(shown) < len(reasons):
            rest = sum(skip.count for _, skip in reasons[len(shown) :])
            lines.append(f"  skipped {rest:,} for {len(reasons) - len(shown)} other reasons")
        lines += [f"images    {self.num_images:,} planned", self._labels(), self._captions()]
        if self.unused:
            lines.append(f"not used  {_some(self.unused, 8)}")
        if self.remarks:
            lines.append(f"remark    {_some(self.remarks, 8)}")
        if self.num_losses:
            first = self.losses[0]
            more = f", and {self.num_losses - 1:,} more" if self.num_losses > 1 else ""
            lines.append(f"lost      {first['address']}: {first['message']}{more}")
        return lines

    def _labels(self) -> str:
        if not self.num_labels:
            return "labels    none"
        names = ""
        if self.class_names:
            first, last = self.class_names[0], self.class_names[-1]
            names = f" ({first} … {last})" if len(self.class_names) > 1 else f" ({first})"
        classes = "class" if self.num_classes == 1 else "classes"
        text = (
            f"labels    {self.num_labels:,} of {self.num_images:,} images, "
            f"{self.num_classes:,} {classes}{names} from {self.labels_from}"
        )
        if self.class_names and set(map(str.lower, self.class_names)) <= SPLIT_NAMES:
            text += (
                f". These are splits: give data.path={self.path.rstrip('/')}/{self.class_names[0]}"
            )
        return text

    def _captions(self) -> str:
        if not self.num_captions:
            return "captions  none"
        return (
            f"captions  {self.num_captions:,} of {self.num_images:,} images, "
            f"from {self.captions_from}"
        )


def _some(words: Sequence[str], number: int) -> str:
    shown = ", ".join(words[:number])
    return shown if len(words) <= number else f"{shown} and {len(words) - number} more"
