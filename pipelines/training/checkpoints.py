"""Checkpoints of a run: listed, written whole, pruned, and resumed from the newest one that is undamaged."""

from __future__ import annotations

from ..storage import paths
from .distributed import is_sharded
from .job import TrainingError
from .state import CheckpointDamaged, TrainState

CHECKPOINTS = "checkpoints"


def checkpoint_uri(run_uri: str, step: int) -> str:
    return paths.join(run_uri, CHECKPOINTS, f"step_{step:09d}.pt")


def list_checkpoints(run_uri: str) -> list[str]:
    """Addresses of the run's checkpoints, oldest step first. Each file was written whole or is not there."""
    folder = paths.join(run_uri, CHECKPOINTS)
    names = (file.uri for file in paths.list_files(folder))
    return sorted(
        uri for uri in names if uri.rpartition("/")[2].startswith("step_") and uri.endswith(".pt")
    )


def save_checkpoint(state: TrainState, run_uri: str, keep: int, write: bool = True) -> None:
    """Write the state, then delete all but the `keep` newest checkpoints.

    Sharded workers all call it, and one of them with `write`.
    """
    if not (write or is_sharded(state.model)):
        return
    data = state.to_bytes()
    if not write:
        return
    paths.write_bytes(checkpoint_uri(run_uri, state.step), data)
    for uri in list_checkpoints(run_uri)[:-keep]:
        paths.delete(uri)


def resume(state: TrainState, run_uri: str) -> str:
    """Load the newest checkpoint that is whole into `state`; what happened, in words, empty where there is none.

    Raises TrainingError where there are some and every one is damaged.
    """
    found = list_checkpoints(run_uri)
    said = ""
    for uri in reversed(found):
        try:
            state.load_bytes(paths.read_bytes(uri))
        except CheckpointDamaged as error:
            said += f"{uri} is damaged ({error}); going back to the one before. "
            continue
        return f"{said}resumed at step {state.step} from {uri}"
    if found:
        raise TrainingError(
            f"{said}\nThere is none before. Delete {paths.join(run_uri, CHECKPOINTS)} to begin at step 0."
        )
    return ""
