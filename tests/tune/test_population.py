"""Population based training with real Ray: a killed driver, weights taken over, and what cannot be a population."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fae_core.checkpoint import load
from pipelines.config import RecipeError, load_recipe
from tune.search import search

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "tests" / "tiny_chain.yaml")
RATE = "autoencoder.training.learning_rate"


def values(photographs, folder, *more: str) -> list[str]:
    return [
        f"data.path={photographs}", f"storage={folder}", "tune.name=s", "data.limit=48", "tracking.enabled=false",
        "tune.scheduler=pbt", "tune.pbt.round_steps=4", "tune.max_concurrent_trials=1", *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["tune.space.autoencoder.latent_dim.grid=[4,8]"], "tune.space.autoencoder.latent_dim.*does not allow"),
        ([f"tune.space.{RATE}.grid=[1e-3]"], "a population of 1"),
        ([f"tune.space.{RATE}.grid=[1e-3,1e-4]", "tune.points=[{seed: 1}]"], "no tune.points"),
        ([f"tune.space.{RATE}.grid=[1e-3,1e-4]", "tune.pbt.round_steps=8"], "nothing would ever be taken over"),
    ],
)  # fmt: skip
def test_what_is_no_population_is_refused_before_anything_runs(
    photographs, tmp_path, more, message
):
    with pytest.raises(RecipeError, match=message):
        search(load_recipe(RECIPE, values(photographs, tmp_path, *more)))
    assert not list(tmp_path.iterdir())


@pytest.mark.faults
@pytest.mark.integration
def test_a_killed_population_goes_on_and_the_worse_member_with_the_better_ones_weights(
    photographs, tmp_path
):
    overrides = values(
        photographs, tmp_path, "tune.algorithm=random", "tune.num_samples=2", f"tune.space.{RATE}.uniform=[1e-5,1e-3]",
        "tune.pbt.resample_probability=0", "autoencoder.training.schedule=constant", "autoencoder.training.warmup_steps=0",
    )  # fmt: skip
    members = tmp_path / "tune" / "s" / "members"

    def parts(number: int) -> dict[int, dict]:
        found = members.glob(f"*/round_{number:04d}/part.json")
        return {int(path.parts[-3]): json.loads(path.read_text()) for path in found}

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "tune.search", RECIPE, *overrides],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 900
    while not parts(2):
        if time.monotonic() > deadline or process.poll() is not None:
            process.kill()
            pytest.fail(process.communicate()[0])
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # What was decided when the driver died, and before that member has begun.
    ((worse, moved),) = parts(2).items()
    better = 1 - worse
    assert moved["from"] == {"member": better, "round": 1}

    numbers = search(load_recipe(RECIPE, overrides))
    assert numbers["trials"] == numbers["finished"] == 2
    stayed = parts(1)[better]
    assert parts(2) == {
        worse: moved,
        better: {**stayed, "round": 2, "stop": 8, "from": {"member": better, "round": 1}},
    }

    def weights(member: int, number: int) -> torch.Tensor:
        uri = members / f"{member:02d}" / f"round_{number:04d}" / "autoencoder.safetensors"
        return torch.cat([p.detach().flatten() for p in load(uri).module.parameters()])

    # From the better one's weights and moments AdamW goes about the same way, as far as the rate says.
    source = weights(better, 1)
    taken, kept = weights(worse, 2) - source, weights(better, 2) - source
    factor = moved["settings"][RATE] / stayed["settings"][RATE]
    assert factor == pytest.approx(0.8) or factor == pytest.approx(1.2)
    assert torch.cosine_similarity(taken, kept, dim=0) > 0.9
    assert float(taken.norm() / kept.norm()) == pytest.approx(factor, rel=0.1)
    recommended = load_recipe(str(tmp_path / "tune" / "s" / "recommended.yaml"))
    assert load(recommended.autoencoder.checkpoint).module is not None
