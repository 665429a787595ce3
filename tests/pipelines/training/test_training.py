"""Training without Ray: accumulation, schedule, randomness, resume, split of the data."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.config.sections import TrainingSection
from fae.pipelines.data.order import EpochOrder
from fae.pipelines.networks.loading import backbone_of
from fae.pipelines.networks.untrained import build_autoencoder
from fae.pipelines.runtime import ray_private
from fae.pipelines.training import pixel_objective
from fae.pipelines.training.batches import Batch, random_flips, sample_noise
from fae.pipelines.training.checkpoint_files import list_checkpoints
from fae.pipelines.training.checkpoints import Checkpoints
from fae.pipelines.training.image_feed import step_parts
from fae.pipelines.training.job import TrainingError, check_batch, parts_of
from fae.pipelines.training.launch import fit, raised_by_worker
from fae.pipelines.training.meters import BadImages
from fae.pipelines.training.pixel_objective import Objective
from fae.pipelines.training.state import TrainState, ema_decay, write_content
from fae.pipelines.training.step import NonFiniteError, learning_rate, train_step
from tests.tiny import SMALLEST_BACKBONE, TINY
from tests.workers import on_workers

BATCH = 8


def section(**values) -> TrainingSection:
    defaults = {
        "steps": 10,
        "batch_size": BATCH,
        "warmup_steps": 2,
        "precision": "fp32",
        "learning_rate": 1e-2,
    }
    return TrainingSection(**{**defaults, **values})


def new_state(training: TrainingSection) -> TrainState:
    torch.manual_seed(0)
    return TrainState(nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 12)), training)


def batches_of(step: int, parts: int, skip: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (BATCH, 2, 2, 3), generator=generator, dtype=torch.uint8)
    size = BATCH // parts
    return [
        Batch(
            step,
            {"images": images[s + skip : s + size]},
            list(range(s + skip, s + size)),
            [f"k{i}" for i in range(s + skip, s + size)],
            (size - skip) / size,
            [],
        )
        for s in range(0, BATCH, size)
    ]


def loss(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    target = random_flips(7, batch).flatten(1).float() / 255
    return {
        "loss": (model(target + sample_noise(7, "noise", batch, (12,))) - target).square().mean()
    }


def parameters(state: TrainState) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in state.model.parameters()])


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulation_equals_the_large_batch(parts):
    training = section(gradient_clip=0.5)
    whole, split = new_state(training), new_state(training)
    for step in range(5):
        a = train_step(whole, whole.model, loss, batches_of(step, 1), training)
        b = train_step(split, split.model, loss, batches_of(step, parts), training)
        torch.testing.assert_close(a["loss"], b["loss"])
    torch.testing.assert_close(parameters(whole), parameters(split), rtol=1e-5, atol=1e-6)


def test_a_skipped_image_only_loses_its_own_gradient():
    training = section(gradient_clip=None)
    full, short = new_state(training), new_state(training)
    train_step(full, full.model, loss, batches_of(0, BATCH), training)
    train_step(short, short.model, loss, batches_of(0, 1, skip=1), training)
    gradients = []
    for state in (full, short):
        gradients.append(torch.cat([p.grad.flatten() for p in state.model.parameters()]))
    alone = new_state(training)
    first = batches_of(0, BATCH)[0]
    (loss(alone.model, first)["loss"] / BATCH).backward()
    lost = torch.cat([p.grad.flatten() for p in alone.model.parameters()])
    torch.testing.assert_close(gradients[0] - lost, gradients[1])


def test_the_schedule_warms_up_then_follows_a_cosine_or_stays():
    training = section(steps=110, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.2)
    assert learning_rate(0, training) == pytest.approx(0.1)
    assert learning_rate(9, training) == learning_rate(10, training) == pytest.approx(1.0)
    assert learning_rate(60, training) == pytest.approx(0.6)
    assert learning_rate(85, training) == pytest.approx(0.2 + 0.4 * (1 + math.cos(0.75 * math.pi)))
    assert learning_rate(110, training) == pytest.approx(0.2)
    assert learning_rate(90, section(steps=110, schedule="constant", learning_rate=1.0)) == 1.0


def test_the_average_forgets_the_untrained_weights():
    kept = 1.0
    for step in range(1200):  # 0.999 from the start would keep 30 %
        kept *= ema_decay(step, 0.999)
    assert kept < 1e-6
    assert ema_decay(1_000_000, 0.9999) == 0.9999


@pytest.mark.parametrize("killed_at", [1, 3, 5])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_resumed_run_ends_at_the_same_bits(tmp_path, killed_at, ema):
    training = section(ema_decay=ema)
    whole = new_state(training)
    for step in range(6):
        train_step(whole, whole.model, loss, batches_of(step, 2), training)
    first = new_state(training)
    for step in range(killed_at):
        train_step(first, first.model, loss, batches_of(step, 2), training)
        Checkpoints(str(tmp_path), training).save(first)
    assert len(list_checkpoints(str(tmp_path))) == min(2, killed_at)
    torch.manual_seed(99)
    second = TrainState(nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 12)), training)
    second.load([Path(list_checkpoints(str(tmp_path))[-1])])
    assert second.step == killed_at
    for step in range(killed_at, 6):
        train_step(second, second.model, loss, batches_of(step, 2), training)
    assert torch.equal(parameters(whole), parameters(second))
    assert all(torch.equal(a, b) for a, b in zip(whole.ema, second.ema, strict=True))


def test_a_part_of_a_training_goes_on_with_its_own_rates_and_the_weights_before(tmp_path):
    before, now = section(), section(weight_decay=0.2, learning_rate=3e-3, betas=(0.8, 0.9))
    first, second = new_state(before), new_state(now)
    train_step(first, first.model, loss, batches_of(0, 1), before)
    write_content(first.content(), tmp_path / "state.pt")
    second.load([tmp_path / "state.pt"])
    assert torch.equal(parameters(first), parameters(second)) and second.step == 1
    old, new = (s.networks["model"].optimizer.state_dict() for s in (first, second))
    assert torch.equal(old["state"][0]["exp_avg"], new["state"][0]["exp_avg"])
    kept = [(g["weight_decay"], tuple(g["betas"])) for g in new["param_groups"]]
    assert kept == [(0.2, (0.8, 0.9)), (0.0, (0.8, 0.9))]


def test_a_non_finite_loss_stops_before_the_step_and_names_the_images():
    training = section()
    state = new_state(training)
    before = parameters(state).clone()

    def broken(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        scale = math.nan if "k5" in batch.keys else 1.0
        return {"loss": loss(model, batch)["loss"] * scale}

    with pytest.raises(NonFiniteError, match=r"Step 0.*k4, k5") as error:
        train_step(state, state.model, broken, batches_of(0, 4), training)
    assert "k6" not in str(error.value)
    assert torch.equal(before, parameters(state)) and state.step == 0


def test_a_nan_is_told_of_the_worker_whose_images_it_comes_from():
    from ray.train import WorkerGroupError

    training = section()

    def ends(own: float, of_another: float, key: str) -> Exception:
        """How a worker ends whose loss has the factor `own`, where the mean has the gradients
        `of_another` too."""
        state = new_state(training)
        for parameter in state.model.parameters():
            parameter.register_hook(lambda gradient: gradient + of_another)
        batches = [replace(batch, keys=[key]) for batch in batches_of(0, 1)]
        scaled = lambda model, batch: {"loss": own * loss(model, batch)["loss"]}  # noqa: E731
        with pytest.raises(NonFiniteError) as error:
            train_step(state, state.model, scaled, batches, training)
        return error.value

    failures = [ends(1.0, math.nan, "good.png"), ends(math.nan, 0.0, "bad.png")]
    assert "the images of another worker" in str(failures[0])
    for order in ((0, 1), (1, 0)):
        workers = {rank: failures[number] for rank, number in enumerate(order)}
        shown = str(raised_by_worker(WorkerGroupError("", workers)))
        assert "The images of this batch: bad.png." in shown and "another worker" not in shown


@pytest.mark.parametrize(
    ("workers", "accumulation", "most"),
    [(1, 1, 1), (2, 1, 2), (4, 2, 4), (1, 8, 1), (1, 1, 4), (3, 1, 4), (2, 2, 2), (3, 2, 4)],
)
def test_an_epoch_holds_every_image_exactly_once_on_any_number_of_workers(
    workers, accumulation, most
):
    num_images, steps = 24, 6
    training = section(accumulation=accumulation, num_workers=most)
    order = EpochOrder(num_images, seed=3)
    for epoch in range(2):
        seen: list[int] = []
        for step in range(epoch * steps // 2, (epoch + 1) * steps // 2):
            places: list[int] = []
            for rank in range(workers):
                for part in step_parts(order, training, step, rank, workers):
                    seen += part.items
                    places += part.samples
            assert sorted(places) == list(range(BATCH))
        assert sorted(seen) == list(range(num_images))


def test_the_same_sample_gets_the_same_image_on_any_rank():
    order = EpochOrder(50, seed=1)
    by_sample = []
    for workers, accumulation in [(1, 1), (2, 2), (8, 1)]:
        pairs: dict[int, int] = {}
        for rank in range(workers):
            training = section(accumulation=accumulation, num_workers=workers)
            for part in step_parts(order, training, 3, rank, workers):
                pairs |= dict(zip(part.samples, part.items, strict=True))
        by_sample.append(pairs)
    assert by_sample[0] == by_sample[1] == by_sample[2]


def test_on_fewer_workers_the_batch_stays_and_no_micro_batch_grows():
    def sizes(workers: int, **values: int) -> list[list[int]]:
        training = section(**{"batch_size": 12, "num_workers": 3, **values})
        parts = [parts_of(training, rank, workers) for rank in range(workers)]
        assert [p for own in parts for part in own for p in part.places] == list(range(12))
        assert sum(part.weight for own in parts for part in own) == pytest.approx(
            sum(map(len, parts))
        )
        return [[len(part.places) for part in own] for own in parts]

    assert sizes(3) == [[4], [4], [4]]
    assert sizes(2) == [[3, 3], [3, 3]]
    assert sizes(1) == [[4, 4, 4]]
    assert sizes(3, num_workers=4) == [[2, 2], [2, 2], [2, 2]]
    assert sizes(2, accumulation=2) == [[2, 2, 2], [2, 2, 2]]
    assert sizes(5, num_workers=6) == [[1, 1], [1, 1], [2, 1], [1, 1], [1, 2]]


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_a_step_is_the_same_on_any_number_of_workers(workers):
    """Workers that average their gradients, as DDP's do, on a batch of 8 that 3 do not divide."""
    training = section(num_workers=4, gradient_clip=None)
    whole = new_state(training)
    train_step(whole, whole.model, loss, batches_of(0, 1), training)
    (images,) = (batch["images"] for batch in batches_of(0, 1))
    gradients, losses = [], []
    for rank in range(workers):
        state = new_state(training)
        batches = [
            Batch(0, {"images": images[p.start : p.stop]}, list(p), [], weight, [])
            for p, weight in parts_of(training, rank, workers)
        ]
        losses.append(train_step(state, state.model, loss, batches, training)["loss"])
        gradients.append(torch.cat([p.grad.flatten() for p in state.model.parameters()]))
    expected = torch.cat([p.grad.flatten() for p in whole.model.parameters()])
    torch.testing.assert_close(torch.stack(gradients).mean(0), expected)


def test_the_noise_of_finetuning_is_the_same_in_micro_batches_of_any_size():
    settings = ["stage=finetune", "latent_noise=0.5", "losses.perceptual=none"]
    recipe = load_recipe(
        "photos-dinov2s", [*TINY, *SMALLEST_BACKBONE, *(f"pixel_decoder.{s}" for s in settings)]
    )
    backbone = backbone_of(recipe)
    torch.manual_seed(0)
    autoencoder = build_autoencoder(recipe.autoencoder, backbone.spec)
    std = torch.linspace(0.1, 1.0, recipe.autoencoder.latent_dim)
    objective = Objective(recipe.pixel_decoder, 7, backbone, autoencoder, None, 0.5 * std)
    features = torch.randn(BATCH, 4, backbone.dim)

    def inputs(size: int) -> torch.Tensor:
        parts = [range(start, start + size) for start in range(0, BATCH, size)]
        batches = [
            Batch(0, {"features": features[p]}, list(p), [], 1.0, []) for p in map(list, parts)
        ]
        return torch.cat([objective.inputs(batch["features"], batch) for batch in batches])

    for size in (1, 2):
        torch.testing.assert_close(inputs(size), inputs(BATCH), rtol=1e-4, atol=1e-5)


def lecam_after_a_step(micro_batches: int) -> list[float]:
    """LeCam's running means after a step on this worker's share of eight images."""
    settings = ["width=32", "depth=1", "num_heads=2", "training.precision=fp32",
                "losses.perceptual=backbone", "losses.discriminator_start=0"]  # fmt: skip
    recipe = load_recipe(
        "photos-dinov2s", [*TINY, *SMALLEST_BACKBONE, *(f"pixel_decoder.{s}" for s in settings)]
    )
    torch.manual_seed(0)
    images = torch.randint(0, 256, (BATCH, 32, 32, 3), dtype=torch.uint8)
    images *= torch.arange(2, dtype=torch.uint8).repeat_interleave(BATCH // 2)[:, None, None, None]
    job, _ = pixel_objective.untrained_job(recipe)
    distributed = torch.distributed.is_initialized()
    rank, workers = (torch.distributed.get_rank(), 2) if distributed else (0, 1)
    training = section(num_workers=workers, accumulation=micro_batches)
    batches = [
        Batch(0, {"images": images[p.start : p.stop]}, list(p), [], weight, [])
        for p, weight in parts_of(training, rank, workers)
    ]
    judge = job.adversary
    train_step(TrainState(job.model, training, judge), job.model, job.loss, batches, training,
               judge.module, judge.loss)  # fmt: skip
    return [judge.module.lecam.real.item(), judge.module.lecam.fake.item()]


def test_lecams_means_are_those_of_the_whole_step_on_any_number_of_workers():
    expected = lecam_after_a_step(1)
    assert expected[0] != expected[1]
    assert lecam_after_a_step(4) == pytest.approx(expected, rel=1e-5)
    for means in on_workers(2, lecam_after_a_step, 2):
        assert means == pytest.approx(expected, rel=1e-5)


def test_a_batch_that_does_not_divide_is_refused_with_the_numbers():
    with pytest.raises(TrainingError, match=r"batch_size=8 .* 3 x 1"):
        check_batch(section(num_workers=3))
    check_batch(section(num_workers=8))
    check_batch(section(num_workers=4, min_workers=3))
    with pytest.raises(TrainingError, match=r"one image for each of .* 8 x 1"):
        check_batch(section(num_workers=8, min_workers=3))


def test_a_lost_worker_is_told_from_an_error_of_the_training_function():
    from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError
    from ray.train import WorkerGroupError

    WorkerHealthCheckFailedError = ray_private.train_error("WorkerHealthCheckFailedError")

    bug, nan = ValueError("a bug"), NonFiniteError("a NaN")
    echo = RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc] Connection closed by peer"
    )
    broken = torch.distributed.DistBackendError("NCCL error")
    decoder = RayTaskError("decode", "Traceback", bug).as_instanceof_cause()
    starved = RayTaskError("decode", "Traceback", OutOfMemoryError("killed"))
    unwell = WorkerHealthCheckFailedError("no answer", ActorDiedError())

    def raised(*failures: Exception) -> Exception | None:
        return raised_by_worker(WorkerGroupError("", dict(enumerate(failures))))

    assert raised(bug) is raised(echo, bug) is raised(bug, broken) is bug
    assert isinstance(raised(decoder), ValueError)
    assert isinstance(raised(ActorDiedError(), nan), NonFiniteError)
    for lost in (ActorDiedError(), OutOfMemoryError("killed"), starved, unwell):
        assert raised(lost) is raised(echo, lost) is raised(bug, lost) is None
    assert raised(echo) is raised(broken, echo) is raised() is None


def count_bad_images(folder: str) -> int:
    rank = torch.distributed.get_rank()
    bad_images = BadImages(folder, rank, 2)
    bad_images.add([{"key": "both.png"}, {"key": f"{rank}.png"}])
    return bad_images.count()


def test_an_image_that_two_workers_cannot_decode_counts_once(tmp_path):
    assert on_workers(2, count_bad_images, str(tmp_path)) == [3, 3]


def test_bad_images_of_any_name_are_read_again_on_resuming(tmp_path):
    bad_images = BadImages(str(tmp_path), 0, 1)
    bad_images.add([{"key": "a\u2028b.png", "message": "not an image"}])
    bad_images.save()
    assert BadImages(str(tmp_path), 0, 1).found == bad_images.found


@pytest.mark.integration
def test_an_error_of_the_training_function_ends_the_run_at_once(tmp_path):
    import ray

    from fae.pipelines.runtime.session import start_ray

    def worker(config):
        with open(config["log"], "a") as log:
            log.write("ran\n")
        raise ValueError("a bug in the training function")

    start_ray(num_cpus=2)
    try:
        with pytest.raises(ValueError, match="a bug in the training function"):
            fit(worker, {"log": str(tmp_path / "log")}, section(max_failures=3), f"{tmp_path}/bug")
    finally:
        ray.shutdown()
    assert (tmp_path / "log").read_text() == "ran\n"
