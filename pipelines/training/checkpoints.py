"""Checkpoints of a run: files written whole, of which the newest undamaged one is resumed from.

The loop calls them; state.py says what a checkpoint holds.
"""

from __future__ import annotations

from ..storage import paths
from .distributed import is_sharded
from .job import TrainingError
from .state import CheckpointDamaged, TrainState, write_content

CHECKPOINTS = "checkpoints"


def checkpoint_uri(run_uri: str, step: int) -> str:
    """Address of the checkpoint at `step`."""
    return paths.join(run_uri, CHECKPOINTS, f"step_{step:09d}.pt")


def list_checkpoints(run_uri: str) -> list[str]:
    """Addresses of the run's checkpoints, lowest step first."""
    folder = paths.join(run_uri, CHECKPOINTS)
    names = (file.uri for file in paths.list_files(folder))
    return sorted(
        uri for uri in names if uri.rpartition("/")[2].startswith("step_") and uri.endswith(".pt")
    )


def save_checkpoint(state: TrainState, run_uri: str, keep: int, write: bool = True) -> None:
    """Write the state, then delete all but the `keep` newest checkpoints.

    All workers of a sharded model must call it together, one of them with `write`.
    """
    if not (write or is_sharded(state.model)):
        return
    content = state.content()
    if not write:
        return
    with paths.writing(checkpoint_uri(run_uri, state.step)) as path:
        write_content(content, path)
    for uri in [*list_checkpoints(run_uri)[:-keep], *_unfinished(run_uri)]:
        paths.delete(uri)


def resume(state: TrainState, run_uri: str) -> str:
    """Load the newest undamaged checkpoint into `state`; a line that says so.

    The line is empty where the run has no checkpoint. Raises TrainingError where all are damaged.
    """
    found = list_checkpoints(run_uri)
    said = ""
    for uri in reversed(found):
        try:
            with paths.local_copy(uri) as path:
                state.load(path)
        except CheckpointDamaged as error:
            said += f"{uri} is damaged ({error}); trying the one before. "
            continue
        return f"{said}resumed at step {state.step} from {uri}"
    if found:
        raise TrainingError(
            f"{said}\nThere is none before. "
            f"Delete {paths.join(run_uri, CHECKPOINTS)} to begin at step 0."
        )
    return ""


def _unfinished(run_uri: str) -> list[str]:
    """Local files of a checkpoint whose writer was killed; a run has one writer at a time."""
    folder = paths.join(run_uri, CHECKPOINTS)
    uris = (file.uri for file in paths.list_files(folder))
    return [uri for uri in uris if uri.endswith(paths.TEMPORARY_SUFFIX)]
