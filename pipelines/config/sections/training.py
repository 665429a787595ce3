"""How one network is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .base import Execution, Precision, Section


class TrainingSection(Section):
    """How one network is trained; each trainer has its own section, with the paper's values for it.

    The defaults here are those of the paper's autoencoder (arXiv 2512.07829, appendix D).
    """

    steps: int = Field(1_000_000, gt=0)
    """Optimizer steps of the whole training; the paper's for autoencoder and pixel decoder."""
    batch_size: int = Field(1024, gt=0)
    """Images of one optimizer step, over all workers and accumulation; the paper's for the
    autoencoder."""
    accumulation: int = Field(1, gt=0)
    """Micro-steps that one optimizer step is split into, to hold fewer images at once."""
    learning_rate: float = Field(1e-4, gt=0.0)
    """AdamW's largest learning rate; the paper's."""
    warmup_steps: int = Field(1000, ge=0)
    """Steps in which the learning rate grows linearly from 0; the paper's for autoencoder and pixel
    decoder."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """The learning rate after the warm-up; cosine is the paper's for autoencoder and pixel
    decoder."""
    final_learning_rate: float = Field(0.0, ge=0.0)
    """Learning rate at which the cosine ends; not in the paper."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's first and second moment; the paper's."""
    weight_decay: float = Field(0.05, ge=0.0)
    """AdamW's weight decay. Not in the paper: 0.05 is both public reimplementations'."""
    gradient_clip: float | None = Field(1.0, gt=0.0)
    """Largest global norm of the gradient; null does not clip. Not in the paper."""
    ema_decay: float | None = Field(None, gt=0.0, lt=1.0)
    """Decay of the moving average of the weights, which is shorter in the first steps; null keeps
    none. Not in the paper."""
    precision: Precision = "bf16"
    """Autocast dtype of forward passes; weights and optimizer are float32. auto is bf16 on a GPU
    and on a CPU with instructions for it, else fp32; a resumed run keeps what it began with. Not in
    the paper."""
    compile: Execution[Literal["auto"] | bool] = False
    """torch.compile the network and the frozen ones beside it: minutes for each shape of a batch,
    faster steps after. auto does so where the steps to come take twenty minutes or more, and goes
    back where they have not become faster; a resumed run keeps what it decided."""
    num_workers: Execution[int] = Field(1, gt=0)
    """Processes that train together, one to a GPU where `use_gpu` is set."""
    min_workers: Execution[int | None] = Field(None, gt=0)
    """Fewest workers with which training goes on when hosts are lost, with the same batch; it takes
    up to num_workers again when hosts join. null waits until num_workers fit."""
    parallel: Execution[Literal["ddp", "fsdp"]] = "ddp"
    """Between workers: ddp gives each a copy of the network, fsdp splits its parameters over
    them."""
    use_gpu: Execution[bool] = False
    """Whether Ray reserves a GPU for each worker; without it training runs on CPUs."""
    cpus_per_worker: Execution[float] = Field(1.0, gt=0.0)
    """CPUs that Ray reserves for a worker."""
    threads_per_worker: Execution[int | None] = Field(None, gt=0)
    """Torch threads of a CPU worker; without it the workers of a node share all of its cores."""
    log_every: Execution[int] = Field(50, gt=0)
    """Steps between two lines of progress and of metrics."""
    validate_every: Execution[int] = Field(1000, gt=0)
    """Steps between two validations on the images that are held out."""
    checkpoint_every: Execution[int] = Field(1000, gt=0)
    """Steps between two checkpoints; a lost worker repeats at most so many, and those that were
    taken while the newest checkpoint was written in the background."""
    keep_checkpoints: Execution[int] = Field(2, gt=0)
    """Newest checkpoints that are kept; older ones are deleted."""
    checkpoint_parts: Execution[Literal["auto"] | bool] = "auto"
    """Whether each worker writes its part of a checkpoint, all at once, and no worker gathers the
    whole state. auto does so from 1 GiB on; one worker writes one file."""
    checkpoint_background: Execution[Literal["auto"] | bool] = "auto"
    """Whether training goes on while a checkpoint is written from a copy on the host. auto does so
    on GPUs: on a CPU the writing takes the training's own cores, and the copy its memory."""
    max_failures: Execution[int] = Field(3, ge=0)
    """How often training resumes by itself from the newest checkpoint after workers or nodes were
    lost. An error of the training itself ends it at once."""

    @property
    def fewest_workers(self) -> int:
        """Workers on which the training runs at least."""
        return min(self.min_workers or self.num_workers, self.num_workers)
