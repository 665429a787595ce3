"""What the commands with a recipe share: their arguments, and how the recipe is merged from
them.
"""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .stopping import stoppable

if TYPE_CHECKING:
    from fae.pipelines.config import Recipe

TRAININGS = ("autoencoder", "pixel_decoder", "generator")
RESUMES = "If the command fails or is killed, run it again: it resumes."


def complete_recipe(incomplete: str) -> list[tuple[str, str]]:
    """Shipped recipes for the shell's completion, with what each is for."""
    from fae.pipelines.config.explain import describe_recipes

    recipes = ((recipe.name, recipe.about) for recipe in describe_recipes())
    return [found for found in recipes if found[0].startswith(incomplete)]


RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="The name of a shipped recipe (see `fae recipes`) or a YAML path.",
        autocompletion=complete_recipe,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Values that replace the recipe's: autoencoder.latent_dim=48. `fae explain KEY` says "
        "what a key means.",
    ),
]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print the recipe with all its values, and stop.")
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print how much memory each process will need, and stop."),
]
Probe = Annotated[
    bool,
    typer.Option(
        "--probe",
        help="Also measure this machine for some seconds, print how long the job will take, and "
        "stop.",
    ),
]


def merged(recipe: str, overrides: list[str] | None, print_config: bool) -> "Recipe":
    """The recipe with its overrides; with `print_config` it is printed and the command ends."""
    from fae.pipelines.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if print_config:
        typer.echo(loaded.to_yaml(), nl=False)
        raise typer.Exit
    return loaded


def recipe_command(
    group: typer.Typer, name: str, memory: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator that makes a function of the merged recipe the command `name`.

    The command takes RECIPE [KEY=VALUE]..., --print-config, the options of the function, and if
    `memory` is the name of a job also --dry-run, which prints the memory that the job will need, of
    a training the room for its checkpoints and of precompute-text the size of its store, and
    --probe, which adds the time.
    """

    def register(job: Callable[..., None]) -> Callable[..., None]:
        def command(
            recipe: RecipeName,
            overrides: Overrides = None,
            print_config: PrintConfig = False,
            dry_run: DryRun = False,
            probe: Probe = False,
            **options: Any,
        ) -> None:
            loaded = merged(recipe, overrides, print_config)
            if (dry_run or probe) and memory:
                from fae.pipelines.doctor import (
                    checkpoint_text,
                    expected_text,
                    memory_of,
                    speed_of,
                    speed_text,
                    text,
                )

                if memory == "precompute_text":
                    typer.echo(expected_text(loaded).text())
                typer.echo(text(memory_of(loaded, memory)))
                if memory in TRAININGS:
                    typer.echo(checkpoint_text(loaded, memory))
                if probe:
                    typer.echo(speed_text(speed_of(loaded, memory)))
                return
            with stoppable():
                job(loaded, **options)

        shared = list(inspect.signature(command).parameters.values())[: 5 if memory else 3]
        parameters = [*shared, *list(inspect.signature(job).parameters.values())[1:]]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        command.__doc__ = job.__doc__
        group.command(name, epilog=RESUMES if memory else None)(command)
        return job

    return register
