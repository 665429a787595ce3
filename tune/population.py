"""Population based training (arXiv 1711.09846): the members of a sweep train side by side and take over each other's weights.

A member trains its autoencoder in rounds of `tune.pbt.round_steps`, each a run of its own in STORAGE/tune/NAME/members/MEMBER/,
and Ray Tune's PopulationBasedTraining says after each round which members go on from whose checkpoint, and with which
settings. It is written to part.json of the next round before it happens: from these files a killed sweep is restored. What
comes out is a trained autoencoder of every member, with which the sweep goes on (search.py).
"""

from __future__ import annotations

import json
import math
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.schedulers import PopulationBasedTraining

from pipelines import runs, storage
from pipelines.config import Recipe, RecipeError
from pipelines.ray_session import quiet_logs
from pipelines.train_autoencoder import train_autoencoder
from pipelines.training import Part, checkpoint_uri, list_checkpoints
from tune.claims import claimed
from tune.spaces import Settings, extremes, label, tune_space
from tune.trials import SearchError, failure_of, plan_trial, say, sweep_folder

MUTABLE = (
    "autoencoder.kl_weight",
    "autoencoder.training.learning_rate",
    "autoencoder.training.final_learning_rate",
    "autoencoder.training.weight_decay",
    "autoencoder.training.gradient_clip",
)
"""What may change in the middle of a training: neither a network's shape, nor its data, nor how its error is measured."""
CHECKPOINT = "autoencoder.checkpoint"
ROUND, SCORE, MEMBER = "round", "score", "member"
COPIED = ("plan.parquet", "linear_baseline.safetensors", "feature_stats.json")
"""What all parts of a training have in common; the statistics last, as their presence says that the others are there."""


def check_population(recipe: Recipe, settings: Sequence[Settings]) -> None:
    """Raises RecipeError where these settings are no population: its keys cannot change in a training, or it has one member."""
    tune = recipe.tune
    if tune.algorithm == "optuna" or tune.points:
        raise RecipeError(
            "tune.scheduler=pbt: its members are the settings of tune.space, drawn or all combinations. Give "
            "tune.algorithm=random or grid, and no tune.points."
        )
    for key in dict.fromkeys(key for each in settings for key in each):
        if key not in MUTABLE:
            raise RecipeError(
                f"tune.space.{key}: tune.scheduler=pbt hands a member's weights to others and changes settings in the "
                f"middle of training, which {key} does not allow. It may vary: {', '.join(MUTABLE)}. Sweep {key} with "
                "tune.scheduler=none or asha."
            )
    if len(settings) < 2:
        raise RecipeError(
            f"tune.scheduler=pbt: a population of {len(settings)}. Give more values, or tune.num_samples of at least 2."
        )
    if tune.pbt.round_steps >= recipe.autoencoder.training.steps:
        raise RecipeError(
            f"tune.pbt.round_steps={tune.pbt.round_steps} is not less than autoencoder.training.steps="
            f"{recipe.autoencoder.training.steps}: nothing would ever be taken over."
        )
    if recipe.autoencoder.checkpoint:
        raise RecipeError(
            f"{CHECKPOINT} is given, so there is none for tune.scheduler=pbt to train."
        )


def train_population(recipe: Recipe, settings: Sequence[Settings], at_once: int) -> list[Settings]:
    """Train the members' missing rounds, `at_once` members at a time; the last settings of each, its network among them.

    Raises RecipeError for a sweep of this name with another population, SearchError where members failed.
    """
    members = range(len(settings))
    for member in members:
        planned = _part(recipe, 1, settings[member], None)
        found = _read_part(recipe, member, 1) or planned
        if found != planned:
            raise RecipeError(
                f"{_round_uri(recipe, member, 1)} is of another population: {label(found['settings'])} to step "
                f"{found['stop']} there, {label(planned['settings'])} to step {planned['stop']} now. Choose another "
                "tune.name, or give the same space, seed and tune.pbt.round_steps."
            )
    last = _num_rounds(recipe)
    waiting = [member for member in members if _finished_rounds(recipe, member) < last]
    say(
        f"population of {len(members)}, {last} rounds; {len(members) - len(waiting)} are trained already"
    )
    if waiting:
        _run(recipe, settings, waiting, at_once)
    made = []
    for member in members:
        part = _read_part(recipe, member, last)
        assert part is not None
        network = storage.join(_round_uri(recipe, member, last), "autoencoder.safetensors")
        made.append({**part["settings"], CHECKPOINT: network})
    return made


def run_member(config: dict[str, Any], values: dict[str, Any], before: int, at_once: int) -> None:
    """What Ray Tune calls in a process of its own: the member's rounds, each reported with a checkpoint that names it.

    `before` rounds were behind all members when the sweep was started; rounds are counted from there for the scheduler.
    """
    from ray import tune

    quiet_logs()
    recipe = Recipe.model_validate(values)
    member = int(tune.get_context().get_trial_name())
    given = tune.get_checkpoint()
    finished = before
    if given:
        with given.as_directory() as folder:
            finished = json.loads((Path(folder) / "round.json").read_text())[ROUND]
    settings = {key: config[key] for key in recipe.tune.space}
    for number in range(finished + 1, _num_rounds(recipe) + 1):
        # So many at a time: a process that only waits takes no CPU that Ray knows of.
        with claimed(f"{sweep_folder(recipe)}/place-{member % at_once}"):
            metrics = _train_round(recipe, member, number, settings)
        if number == _num_rounds(recipe):
            return
        report = {ROUND: number - before, SCORE: metrics[recipe.tune.pbt.metric]}
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "round.json").write_text(json.dumps({MEMBER: member, ROUND: number}))
            tune.report(report, checkpoint=tune.Checkpoint.from_directory(folder))


def _train_round(recipe: Recipe, member: int, number: int, settings: Settings) -> dict[str, float]:
    part = _read_part(recipe, member, number)
    if part is None:
        source = {MEMBER: member, ROUND: number - 1} if number > 1 else None
        part = _part(recipe, number, settings, source)
        _write_part(recipe, member, part)
    start = None
    run_uri = _round_uri(recipe, member, number)
    if part["from"]:
        source_uri = _round_uri(recipe, part["from"][MEMBER], part["from"][ROUND])
        start = checkpoint_uri(source_uri, _stop(recipe, part["from"][ROUND]))
        for name in COPIED:
            if not storage.exists(storage.join(run_uri, name)):
                data = storage.read_bytes(storage.join(source_uri, name))
                storage.write_bytes(storage.join(run_uri, name), data)
    (stage,) = (s for s in plan_trial(recipe, part["settings"]).stages if s.name == "autoencoder")
    made = stage.recipe.model_copy(deep=True)
    made.storage, _, made.run = run_uri.rpartition("/")
    metrics = train_autoencoder(made, part=Part(start, part["stop"])).metrics
    if recipe.tune.pbt.metric not in metrics:
        raise RecipeError(
            f"tune.pbt.metric={recipe.tune.pbt.metric!r}: the autoencoder's validation has {', '.join(metrics) or 'no images'}."
        )
    # All members have begun the round before this one: nobody goes on from the one before that.
    for uri in list_checkpoints(_round_uri(recipe, member, number - 2)):
        storage.delete(uri)
    return metrics


class _Population(PopulationBasedTraining):
    """Ray Tune's, which leaves a member's next settings and weights in part.json as it decides on them."""

    def __init__(self, recipe: Recipe, before: int) -> None:
        pbt = recipe.tune.pbt
        intervals = tune_space(recipe.tune.space)
        mutations: dict[str, Any] = {
            key: intervals[key] if space.uniform or space.loguniform else list(extremes(space))
            for key, space in recipe.tune.space.items()
        }
        super().__init__(
            time_attr=ROUND,
            metric=SCORE,
            mode=pbt.mode,
            perturbation_interval=1,
            hyperparam_mutations=mutations,
            quantile_fraction=pbt.quantile,
            resample_probability=pbt.resample_probability,
            custom_explore_fn=_within(recipe),
            log_config=False,
            # Members differ in speed, and a comparison at different steps would be one of learning rate schedules.
            synch=True,
        )
        self._recipe = recipe
        self._before = before

    def _get_new_config(
        self, trial: Any, trial_to_clone: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        config, operations = super()._get_new_config(trial, trial_to_clone)
        finished = self._before + int(self._trial_state[trial_to_clone].last_train_time)
        settings = {key: config[key] for key in self._recipe.tune.space}
        source = {MEMBER: int(str(trial_to_clone)), ROUND: finished}
        part = _part(self._recipe, finished + 1, settings, source)
        _write_part(self._recipe, int(str(trial)), part)
        say(f"member {trial} takes over member {trial_to_clone}'s weights, with {label(settings)}")
        return config, operations


class _Listener(Callback):
    """In the driver: says how rounds go, and keeps what went wrong."""

    def __init__(self, recipe: Recipe, before: int) -> None:
        self.metric = recipe.tune.pbt.metric
        self.before = before
        self.errors: list[str] = []

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if ROUND in result:
            number = self.before + result[ROUND]
            say(f"member {trial}: round {number}  {self.metric} {result[SCORE]:.4g}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.errors.append(f"member {trial}: {failure_of(trial)}")
        say(self.errors[-1])


def _run(
    recipe: Recipe, settings: Sequence[Settings], waiting: Sequence[int], at_once: int
) -> None:
    from ray import tune

    members = range(len(settings))
    before = min(_finished_rounds(recipe, member) for member in waiting)
    if before and not any(_read_part(recipe, member, before + 1) for member in members):
        # The last round is behind all of them, and nobody has gone on: it is reported again, and decided on.
        before -= 1
    now = [_newest_settings(recipe, member) or settings[member] for member in members]

    def value(key: str, config: Mapping[str, Any]) -> Any:
        return now[config[MEMBER]][key]

    space: dict[str, Any] = {MEMBER: tune.grid_search(list(waiting))}
    space |= {key: tune.sample_from(partial(value, key)) for key in recipe.tune.space}
    values = recipe.model_dump(mode="json")
    trainable = tune.with_parameters(run_member, values=values, before=before, at_once=at_once)
    listener = _Listener(recipe, before)
    # Tune passes checkpoints between nodes through it. They name a round and hold nothing else.
    folder = storage.join(sweep_folder(recipe), "ray")
    filesystem, path = storage.filesystem(folder)
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"CPU": 0.01}),
        param_space=space,
        tune_config=tune.TuneConfig(
            scheduler=_Population(recipe, before), trial_name_creator=_trial_name
        ),
        run_config=tune.RunConfig(
            name=uuid.uuid4().hex,
            storage_path=path,
            storage_filesystem=filesystem,
            callbacks=[listener],
            verbose=0,
        ),
    )
    tuner.fit()
    for file in list(storage.list_files(folder)):
        storage.delete(file.uri)
    if listener.errors:
        raise SearchError(
            f"{len(listener.errors)} members failed:\n  "
            + "\n  ".join(listener.errors)
            + "\nThe same command goes on with them."
        )


def _trial_name(trial: Any) -> str:
    """Ray names a member by it for good, while its config becomes a copy of another's."""
    return f"{trial.config[MEMBER]:02d}"


def _within(recipe: Recipe) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Ray's factors of 0.8 and 1.2 know nothing of an interval's ends."""
    bounds = {key: s.uniform or s.loguniform for key, s in recipe.tune.space.items()}

    def clamp(config: dict[str, Any]) -> dict[str, Any]:
        for key, ends in bounds.items():
            if ends:
                config[key] = min(max(config[key], ends[0]), ends[1])
        return config

    return clamp


def _num_rounds(recipe: Recipe) -> int:
    return math.ceil(recipe.autoencoder.training.steps / recipe.tune.pbt.round_steps)


def _stop(recipe: Recipe, number: int) -> int:
    return min(number * recipe.tune.pbt.round_steps, recipe.autoencoder.training.steps)


def _round_uri(recipe: Recipe, member: int, number: int) -> str:
    return storage.join(sweep_folder(recipe), "members", f"{member:02d}", f"round_{number:04d}")


def _part(
    recipe: Recipe, number: int, settings: Mapping[str, Any], source: Mapping[str, int] | None
) -> dict[str, Any]:
    """A round as part.json holds it: its settings, the member and round that it goes on from, and its last step."""
    return {
        ROUND: number,
        "settings": dict(settings),
        "from": source and dict(source),
        "stop": _stop(recipe, number),
    }


def _write_part(recipe: Recipe, member: int, part: Mapping[str, Any]) -> None:
    uri = storage.join(_round_uri(recipe, member, part[ROUND]), "part.json")
    storage.write_bytes(uri, json.dumps(part, indent=1).encode())


def _read_part(recipe: Recipe, member: int, number: int) -> dict[str, Any] | None:
    uri = storage.join(_round_uri(recipe, member, number), "part.json")
    return dict(json.loads(storage.read_bytes(uri))) if storage.exists(uri) else None


def _finished_rounds(recipe: Recipe, member: int) -> int:
    number = 0
    while runs.result(_round_uri(recipe, member, number + 1)) is not None:
        number += 1
    return number


def _newest_settings(recipe: Recipe, member: int) -> Settings | None:
    next_round = _finished_rounds(recipe, member) + 1
    parts = (_read_part(recipe, member, number) for number in (next_round, next_round - 1))
    return next((part["settings"] for part in parts if part), None)
