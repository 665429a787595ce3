"""Sections of a sweep: its space, its objectives, and when a trial is stopped."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from .base import Execution, Section


class SpaceSection(Section):
    """The values of one recipe key that a sweep tries: exactly one of these."""

    grid: list[Any] | None = Field(None, min_length=1)
    """Values that are all tried."""
    choice: list[Any] | None = Field(None, min_length=1)
    """Values of which one is drawn for a trial."""
    uniform: tuple[float, float] | None = None
    """Lower and upper bound of a number that is drawn evenly between them."""
    loguniform: tuple[float, float] | None = None
    """Lower and upper bound of a number whose logarithm is drawn evenly between theirs."""

    @model_validator(mode="after")
    def _exactly_one(self) -> SpaceSection:
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of {', '.join(type(self).model_fields)}")
        bounds = self.uniform or self.loguniform
        if bounds and not bounds[0] < bounds[1]:
            raise ValueError("expected the lower bound first")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError("loguniform needs bounds above 0")
        return self


class ObjectiveSection(Section):
    """A number that a sweep looks for."""

    metric: str
    """STAGE/NAME of a number that a stage of the chain returns, like evaluation/frechet_backbone or
    autoencoder/mse."""
    mode: Literal["min", "max"] = "min"
    """Whether smaller or larger is better."""


class AshaSection(Section):
    """Early stopping during the autoencoder's training: ASHA's rungs are steps at which it
    validates."""

    metric: str = "mse"
    """Number of the autoencoder's validation by which trials are compared."""
    mode: Literal["min", "max"] = "min"
    """Whether smaller or larger is better."""
    grace_steps: int = Field(100, gt=0)
    """Steps before which no trial is stopped."""
    reduction_factor: float = Field(3.0, gt=1.0)
    """One in so many trials continues at each rung, and the next rung is at so many times the
    steps."""


class TuneSection(Section):
    """A sweep: what `fae tune` varies, how, and what it looks for. None of this is in the paper,
    which gives only the results of its ablations."""

    name: Execution[str | None] = None
    """Name of the sweep: STORAGE/tune/NAME holds its trials, and the same name resumes it."""
    space: dict[str, SpaceSection] = {}
    """Dotted recipe keys and the values that they are to take; `seed` is one like any other."""
    points: list[dict[str, Any]] = []
    """Further trials, each a mapping of recipe keys to values, for example repetitions with other
    seeds at the setting that matters."""
    algorithm: Literal["grid", "random", "optuna"] = "grid"
    """grid: all combinations. random and optuna: num_samples settings, drawn, or suggested from the
    trials before."""
    num_samples: int = Field(10, gt=0)
    """Trials that random draws or optuna suggests."""
    scheduler: Literal["none", "asha"] = "none"
    """asha stops trials whose autoencoder falls behind the others' at the same step."""
    asha: AshaSection = AshaSection()
    objectives: list[ObjectiveSection] = Field(
        [ObjectiveSection(metric="autoencoder/mse")], min_length=1
    )
    """The first one ranks trials; together they make the Pareto front, and Optuna looks for all."""
    max_concurrent_trials: Execution[int | None] = Field(None, gt=0)
    """Trials that run at once; without it as many as the cluster's CPUs and GPUs can train at once,
    at least one. A cluster that begins without nodes gets 16, which wait for them."""

    @field_validator("space", mode="before")
    @classmethod
    def _dotted(cls, value: Any) -> Any:
        """Nested mappings, as overrides on the command line make them, become dotted keys."""
        return _dotted_space(value) if isinstance(value, dict) else value


def _dotted_space(value: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict) and any(isinstance(v, dict) for v in inner.values()):
            flat |= _dotted_space(inner, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = inner
    return flat
