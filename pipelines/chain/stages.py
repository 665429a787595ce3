"""The stages of the chain: what each reads, what decides its result, and its folder.

A stage's key hashes the values of the recipe that decide its result, the keys of the stages that it
builds on and, where it reads images, their list. Its folder is STORAGE/NAME-KEY. Two recipes that
agree up to a stage therefore share its result, and a changed recipe writes to another folder.
`fae run` and the trials of `fae tune` run these plans.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from fae_core.checkpoint import GENERATORS
from fae_core.errors import UserError

from ..config import Recipe, RecipeError, with_absolute_paths
from ..config.facts import deciding_values, path_values
from ..config.sections import STORED, ChainSection, StageName, TrainingSection
from ..data import plan_source
from ..data.records import (
    ImageRecord,
    SourceError,
    class_number,
    label_problem,
    records_of,
    source_digest,
    split_records,
)
from ..evaluation import probe_problem
from ..networks import load_checkpoint
from ..networks.text_encoder import identity_of, text_spec
from ..sampling.prompts import has_prompts, read_prompts
from ..storage import fingerprint_of, paths
from ..training import requirements
from ..training.tracking import resolve_uri

STAGES: tuple[StageName, ...] = get_args(StageName)
PLACES = ("storage", "data.path", "backbone.weights", "evaluate.reference")
"""Keys of the places that most stages use; each stage's job asks for its own too."""
KEY_LENGTH = 12
"""Hex digits of a stage's fingerprint that name its folder."""
NETWORKS = {
    "autoencoder": "autoencoder",
    "pixel-decoder": "pixel_decoder",
    "finetune": "pixel_decoder",
    "generator": "generator",
}
"""The network that a stage trains, by stage."""
STATE_KEYS = (
    *("text.name", "text.max_length", "text.template", "text.layer"),
    *("precompute.precision", "precompute.shard_size"),
)
"""What decides stored token states besides the captions and the encoder's weights. They are the
same for the latents of every autoencoder."""
FILLED_IN = {"finetune": "pixel_decoder.start_from", "evaluation": "evaluate.images"}
"""The input of a stage that another stage makes: that one's key decides, not the address."""


@dataclass(frozen=True)
class Stage:
    """One job of the chain."""

    name: StageName
    parts: Mapping[str, Any]
    """What decides the result, by name."""
    recipe: Recipe
    """What the job is called with."""
    uri: str
    """The stage's folder."""
    needs: tuple[str, ...]
    """Names of the stages whose results it reads."""
    num_images: int
    """Images that it reads or draws; 0 where their number does not matter."""
    problem: str | None = None
    """Why the images of data.path cannot serve it, where planning knows."""

    @property
    def key(self) -> str:
        """The part of the folder's name that identifies `parts`."""
        return self.uri.rpartition("-")[2]

    def result(self) -> dict[str, Any] | None:
        """What the job recorded at its end (metrics, fingerprint, seconds), None before."""
        uri = paths.join(self.uri, "stage.json")
        return dict(json.loads(paths.read_bytes(uri))) if paths.exists(uri) else None


def plan_stages(recipe: Recipe, images: Sequence[ImageRecord] | None = None) -> list[Stage]:
    """Every stage of the recipe's chain, in an order in which they can run; nothing is written.

    `images` are those of data.path; without them, data.path is listed. A network that the recipe
    names (`autoencoder.checkpoint`, …) replaces the stage that would train it, and
    `pixel_decoder.start_from` the first stage of the pixel decoder. Raises RecipeError,
    SourceError, and CheckpointError or WeightsError for a network that it names.
    """
    base = with_absolute_paths(recipe)
    base.tracking.uri = resolve_uri(recipe.tracking)
    (source_path,) = base.require("the chain", "data.path")
    base.evaluate.reference = _absolute(base.evaluate.reference or source_path)
    planner = _Planner()
    class_names: list[str] = []
    if images is None:
        listed = plan_source(base.data)
        records: Sequence[ImageRecord] = records_of(listed.table)
        class_names = listed.account.class_names
    else:
        records = images
    split = _split_problem(records, base.data.validation_fraction)
    source = {"source": source_digest(records)}

    training = ("seed", "data", "backbone")

    autoencoder = planner.network("autoencoder", base.autoencoder.checkpoint)
    if not autoencoder:
        autoencoder = planner.add(
            "autoencoder", base, (), (*training, "autoencoder"), source, len(records), split
        )

    first = base.model_copy(deep=True)
    first.autoencoder.checkpoint = first.pixel_decoder.start_from = None
    first.pixel_decoder.stage = "noisy"
    ready = base.pixel_decoder.checkpoint or base.pixel_decoder.start_from
    decoder = planner.network("pixel-decoder", ready)
    if not decoder:
        decoder = planner.add(
            "pixel-decoder", first, (), (*training, "pixel_decoder"), source, len(records), split
        )

    encoding = base.model_copy(deep=True)
    encoding.autoencoder.checkpoint = autoencoder
    limits = [n for n in (base.data.limit, base.chain.latents_limit) if n is not None]
    encoding.data.limit = min(limits, default=None)
    num_encoded = min([len(records), *limits])
    sections = ("data", "backbone", "precompute")
    latents = planner.add("latents", encoding, ("autoencoder",), sections, source, num_encoded)

    generating = encoding.model_copy(deep=True)
    generating.latents = latents
    generating.pixel_decoder.checkpoint = decoder
    captioned = base.generator.kind == "mmdit"
    planner.generator_kind = base.generator.kind
    generator = planner.network("generator", base.generator.checkpoint)
    if not generator:
        training_generator = generating.model_copy(deep=True)
        text: dict[str, Any] = {"text.weights": text_weights(base)} if captioned else {}
        if captioned and base.text.states == STORED:
            training_generator.text.states = planner.add(
                "text-states",
                generating,
                (),
                STATE_KEYS,
                {**text, "source": source_digest(records[:num_encoded])},
                num_encoded,
                after=("latents",),
            )
            # States in another precision than the training's make another network.
            precision = base.precompute.precision
            if precision != base.generator.training.precision:
                text["text precision"] = precision
        generator = planner.add(
            "generator",
            training_generator,
            ("latents",),
            ("seed", "generator", *(["text"] if captioned else [])),
            text,
            num_encoded,
            _condition_problem(base, records[:num_encoded], class_names),
            after=("text-states",),
        )
    prompts, texts, problem = _plan_prompts(base, planner.generator_kind)

    final = "pixel-decoder"
    if base.chain.finetune and not base.pixel_decoder.checkpoint:
        final = "finetune"
        second = base.model_copy(deep=True)
        second.autoencoder.checkpoint = autoencoder
        second.pixel_decoder.stage = "finetune"
        second.pixel_decoder.start_from = decoder
        steps = base.chain.finetune_steps or base.pixel_decoder.training.steps
        second.pixel_decoder.training.steps = steps
        decoder = planner.add(
            "finetune",
            second,
            ("autoencoder", "pixel-decoder"),
            (*training, "pixel_decoder"),
            source,
            len(records),
            split,
        )

    drawing = generating.model_copy(deep=True)
    drawing.data.limit = base.data.limit
    drawing.prompts = prompts
    drawing.generator.checkpoint = generator
    drawing.pixel_decoder.checkpoint = decoder
    samples = planner.add(
        "samples",
        drawing,
        ("autoencoder", final, "generator"),
        ("seed", "sample"),
        texts,
        base.sample.num_images,
        problem or _class_problem(base, class_names),
    )

    scoring = drawing.model_copy(deep=True)
    scoring.evaluate.images = samples
    planner.add("evaluation", scoring, ("samples",), ("data", "backbone", "evaluate"), {}, 0)
    if base.chain.probe or base.chain.until == "probe":
        sections = ("data", "backbone", "probe")
        probing = base.model_copy(deep=True)
        probing.autoencoder.checkpoint = autoencoder
        problem = probe_problem(records, base)
        planner.add("probe", probing, ("autoencoder",), sections, source, len(records), problem)
    planner.add("report", base, tuple(planner.stages), (), {}, 0)
    return list(planner.stages.values())


def text_weights(recipe: Recipe) -> str | dict[str, str]:
    """What stands for the text encoder in a stage's key: the hashes of a folder's content.

    A word of `text.weights` stands for itself, so planning downloads nothing. Raises WeightsError.
    """
    named = path_values(recipe).get("text.weights")
    return identity_of(text_spec(recipe.text)) if named else recipe.text.weights


def select(stages: Sequence[Stage], section: ChainSection) -> list[Stage]:
    """The stages that `section` asks for: what `until` needs, from `first` on.

    Raises RecipeError where a stage is not part of this chain, or where a stage before `first` has
    not finished.
    """
    by_name = {stage.name: stage for stage in stages}
    for wanted in (section.first, section.until):
        if wanted and wanted not in by_name:
            raise RecipeError(
                f"This chain has no stage {wanted!r}; it has {', '.join(by_name)}. A network that "
                "the recipe names is not trained. finetune needs chain.finetune=true, probe needs "
                "chain.probe=true."
            )
    last = by_name[section.until] if section.until else stages[-1]
    chosen = needed_stages(stages, {last.name})
    if section.first is None:
        return chosen
    start = STAGES.index(section.first)
    earlier = [stage for stage in chosen if STAGES.index(stage.name) < start]
    absent = [stage.name for stage in earlier if stage.result() is None]
    if absent:
        raise RecipeError(
            f"Before {section.first} come {', '.join(absent)}, and their results for this recipe "
            f"are not in {last.recipe.storage}. Start from an earlier stage, or without --from."
        )
    return [stage for stage in chosen if STAGES.index(stage.name) >= start]


def needed_stages(stages: Sequence[Stage], names: Collection[str]) -> list[Stage]:
    """The stages `names` and all stages that they build on, in order."""
    needed = set(names)
    for stage in reversed(stages):
        if stage.name in needed:
            needed |= set(stage.needs)
    return [stage for stage in stages if stage.name in needed]


def check_stages(stages: Sequence[Stage]) -> None:
    """Raises RecipeError where images or settings cannot serve a stage that is to run."""
    for stage in stages:
        if stage.result() is not None:
            continue
        problem = stage.problem
        if problem is None and stage.name in NETWORKS:
            try:
                requirements.check_settings(stage.recipe, NETWORKS[stage.name])
            except UserError as error:
                problem = str(error)
        if problem is not None:
            raise RecipeError(f"The stage {stage.name} cannot run: {problem}")


def training_of(stage: Stage) -> TrainingSection | None:
    """The training section of a stage that trains a network, None for the others."""
    if stage.name not in NETWORKS:
        return None
    return requirements.training_of(stage.recipe, NETWORKS[stage.name])


def _split_problem(records: Sequence[ImageRecord], validation_fraction: float) -> str | None:
    try:
        split_records(records, validation_fraction)
    except SourceError as error:
        return str(error)
    return None


def _condition_problem(
    recipe: Recipe, records: Sequence[ImageRecord], class_names: Sequence[str]
) -> str | None:
    """Why labels or captions of the images cannot train the recipe's generator."""
    if recipe.generator.kind != "mmdit":
        labelled = ((record.key, record.label) for record in records)
        return label_problem(labelled, recipe.generator.num_classes, class_names)
    without = [record.key for record in records if not (record.caption or "").strip()]
    if not without:
        return None
    return f"{len(without)} of {len(records)} images have no caption, for example {without[0]!r}."


def _plan_prompts(recipe: Recipe, kind: str) -> tuple[str | None, dict[str, str], str | None]:
    """Where the prompts of the samples are, what identifies them, and why they cannot be drawn.

    A generator of classes has none. Without prompts in the recipe they are the captions of the
    images that the samples are compared with.
    """
    if kind != "mmdit":
        unwanted = "prompts need a generator of kind mmdit." if has_prompts(recipe) else None
        return recipe.prompts, {}, unwanted
    made = recipe.model_copy()
    if not has_prompts(made):
        made.prompts = made.evaluate.reference
    try:
        return made.prompts, {"prompts": fingerprint_of({"prompts": read_prompts(made)})}, None
    except UserError as error:
        return made.prompts, {}, str(error)


def _class_problem(recipe: Recipe, class_names: Sequence[str]) -> str | None:
    """Why sample.classes are not classes of the generator that the chain trains, where known."""
    if recipe.generator.checkpoint:
        return None
    for given in recipe.sample.classes or []:
        if class_names or isinstance(given, int):
            try:
                class_number(given, class_names, recipe.generator.num_classes, "sample.classes:")
            except RecipeError as error:
                return str(error)
    return None


class _Planner:
    """Collects the stages and gives each its key, its folder, and a recipe that writes there."""

    def __init__(self) -> None:
        self.stages: dict[str, Stage] = {}
        self.identities: dict[str, str] = {}  # by stage: its key, or the hash of a named network
        self.generator_kind = ""

    def network(self, name: StageName, uri: str | None) -> str | None:
        """Record `uri`, a network that replaces the stage `name`; its content hash is the key.

        Returns `uri`. Raises CheckpointError.
        """
        if uri is not None:
            kinds = {"pixel-decoder": ("pixel_decoder",), "generator": GENERATORS}
            loaded = load_checkpoint(uri, *kinds.get(name, (name,)))
            self.identities[name] = loaded.weights_sha256
            if name == "generator":
                self.generator_kind = loaded.kind
        return uri

    def add(
        self,
        name: StageName,
        recipe: Recipe,
        needs: tuple[str, ...],
        sections: Sequence[str],
        extra: Mapping[str, Any],
        num_images: int,
        problem: str | None = None,
        after: tuple[str, ...] = (),
    ) -> str:
        """Plan the stage. Returns the address of its result: a network's file, else its folder.

        The results of `needs` decide its own; those of `after` are there before it runs.
        """
        made = recipe.model_copy(deep=True)
        upstream = {need: self.identities[need] for need in needs}
        parts = {**deciding_values(made, ("image_size", *sections)), **extra, **upstream}
        parts.pop(FILLED_IN.get(name, ""), None)
        key = fingerprint_of(parts)[:KEY_LENGTH]
        made.run = f"{name}-{key}"
        uri = made.output = paths.join(made.storage, made.run)
        made.evaluate.output = made.probe.output = uri
        self.identities[name] = key
        needs = tuple(need for need in (*needs, *after) if need in self.stages)
        self.stages[name] = Stage(name, parts, made, uri, needs, num_images, problem)
        return paths.join(uri, f"{NETWORKS[name]}.safetensors") if name in NETWORKS else uri


def _absolute(path: str) -> str:
    return path if paths.is_portable(path) else paths.filesystem(path)[1]
