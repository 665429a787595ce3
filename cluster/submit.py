"""`fae submit`: a command as one job of Ray's job server, with its log and its exit status here.

The submission id comes from where the command writes. A job of that id that runs is not started
again, its log is followed; one that has done the same work is reported. After a job that failed or
was stopped comes NAME-2, NAME-3, …
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .command import Command
from .environment import job_environment
from .errors import SubmitError
from .working_tree import LIMIT, WorkingTree, working_tree

CODE = ("fae/cli.py", "fae/pipelines/__init__.py", "fae_core/__init__.py")
"""What a working tree with a folder `fae` must hold to run by itself."""
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
POLL_SECONDS = 1.0
ANSWER_SECONDS = 10.0
PATIENCE_SECONDS = 300.0
"""How long a job server that no longer answers is asked for the state of a job."""
RECIPE = "fae.recipe"
"""Key of the job's metadata: SHA-256 of the recipe that its command and file came to."""


@dataclass(frozen=True)
class Submission:
    """Everything that would be sent."""

    command: Command
    tree: WorkingTree
    environment: dict[str, str]
    remarks: list[str]
    submission_id: str
    recipe_sha256: str
    """Of the whole recipe as YAML, without passwords: what its file came to."""

    def describe(self) -> str:
        """What `--dry-run` prints."""
        size = f"{self.tree.size / 1e6:.1f} MB"
        lines = [
            f"job:      {self.submission_id}",
            f"runs:     {self.command.entrypoint}",
            f"sends:    {self.tree.root} ({size} in {len(self.tree.files)} files)",
            f"environ:  {', '.join(f'{k}={v}' for k, v in self.environment.items()) or 'nothing'}",
        ]
        return "\n".join([*lines, *(f"note:     {remark}" for remark in self.remarks)])


def prepare(
    command: Command,
    working_dir: str | Path = ".",
    env: list[str] | None = None,
    max_bytes: int = LIMIT,
) -> Submission:
    """Check everything that can be checked here. Raises SubmitError, RecipeError."""
    root = Path(working_dir).absolute()
    environment, remarks = job_environment(env or [], os.environ)
    tree = working_tree(root, max_bytes)
    if "fae/__init__.py" not in tree:
        remarks.append(f"{root} holds no fae/: the nodes must have fae-ray installed.")
    elif missing := [module for module in CODE if module not in tree]:
        raise SubmitError(
            f"{root} has no {missing[0]}, which `python -m fae` needs. In a checkout "
            "fae/pipelines, fae/tune and fae/cluster are links to the folders beside fae; Git for "
            "Windows makes them with core.symlinks=true."
        )
    if command.recipe_is_file and command.recipe not in tree:
        raise SubmitError(
            f"{command.recipe}: not among the files that are sent. Give its path relative to "
            f"{root}, and see that it is not hidden and no .gitignore or .rayignore leaves it out."
        )
    recipe = command.load(root)
    command.refuse_paths_of_this_machine(recipe)
    if "fae/__init__.py" in tree and (shipped := command.shipped_folders(recipe)):
        tree = working_tree(root, max_bytes, shipped)
    digest = hashlib.sha256(recipe.to_yaml().encode()).hexdigest()
    return Submission(command, tree, environment, remarks, command.submission_id(recipe), digest)


def submit(
    submission: Submission,
    address: str | None = None,
    follow: bool = True,
    say: Callable[[str], None] = print,
) -> int:
    """Start the job unless it runs or is done, and return the exit status.

    With `follow` its log is printed until it ends. Raises SubmitError for a server that cannot be
    reached or refuses the token, and for a running job of the same id with other arguments or
    another recipe.
    """
    client = connect(address)
    job = _earlier(client, submission)
    if job is None:
        say(submission.describe())
        job_id = _start(client, submission, _next_id(client, submission.submission_id))
        say(f"Submitted {job_id}.")
    elif job.status == "SUCCEEDED":
        say(f"{job.submission_id} has done this already. Nothing was started.")
        return 0
    else:
        job_id = job.submission_id
        say(f"{job_id} is {str(job.status).lower()} already. Nothing was started.")
    if not follow:
        say(how_to_see(client, job_id))
        return 0
    try:
        return follow_job(client, job_id)
    except KeyboardInterrupt:
        _ask_to_stop(client, job_id, say)
        return 130


def connect(address: str | None = None) -> Any:
    """Ray's JobSubmissionClient for `address`. Raises SubmitError that says what to check."""
    # Ray lets its variables win over an address that was given.
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    if not address.startswith(("http://", "https://")):
        raise SubmitError(
            f"--address {address}: the job server is an http:// address, usually http://HEAD:8265."
        )
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    # Ray's job client sends a token only in this mode, and does not look for one by itself.
    if "RAY_AUTH_MODE" not in os.environ and _has_token():
        os.environ["RAY_AUTH_MODE"] = "token"
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        # Any answer will do. Ray's client, which asks next, has no limit of time.
        requests.get(f"{address.rstrip('/')}/api/version", timeout=ANSWER_SECONDS)
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise SubmitError(_explain_refusal(address, str(error))) from None
    except (ConnectionError, requests.exceptions.RequestException) as error:
        tried = f" within {ANSWER_SECONDS:g} s" if isinstance(error, requests.Timeout) else ""
        raise SubmitError(
            f"No job server answers at {address}{tried}. Are host and port right? Is the head's "
            "dashboard up (ray start --head, port 8265), and does a port-forward to it still run "
            "(kubectl port-forward service/NAME-head-svc 8265)?"
        ) from None
    except RuntimeError as error:
        raise SubmitError(f"{address} is not a job server of Ray: {str(error)[:200]}") from None


def follow_job(client: Any, job_id: str) -> int:
    """Print the job's log until it ends; its exit status (1 if it ended without one).

    Raises SubmitError where the job server has not answered for PATIENCE_SECONDS.
    """
    import aiohttp

    try:
        asyncio.run(_print_log(client, job_id))
    except (RuntimeError, OSError, aiohttp.ClientError) as error:
        # A proxy that cuts the stream does not end the job.
        print(f"fae: the log's stream broke ({error}); waiting for the job.", file=sys.stderr)
    while not (details := _state(client, job_id)).status.is_terminal():
        time.sleep(POLL_SECONDS)
    if details.status == "SUCCEEDED":
        return 0
    code = details.driver_exit_code
    print(f"fae: {job_id} ended as {details.status}: {details.message}", file=sys.stderr)
    return int(code) if code else 1


def how_to_see(client: Any, job_id: str) -> str:
    """How to follow and how to stop the job with Ray's own commands."""
    address = client.get_address()
    return (
        f"Follow: ray job logs --follow --address {address} {job_id}\n"
        f"Stop:   ray job stop --address {address} {job_id}"
    )


async def _print_log(client: Any, job_id: str) -> None:
    async for lines in client.tail_job_logs(job_id):
        print(lines, end="", flush=True)


def _state(client: Any, job_id: str) -> Any:
    # A port-forward that ends, or a head that starts anew, does not end the job.
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return client.get_job_info(job_id)
        except (RuntimeError, OSError) as error:
            if time.monotonic() > deadline:
                raise SubmitError(
                    f"{client.get_address()} has not answered for {PATIENCE_SECONDS / 60:g} min "
                    f"({str(error)[:200]}). {job_id} may run on. Start the port-forward again; the "
                    f"same command then follows the job.\n{how_to_see(client, job_id)}"
                ) from None
        time.sleep(POLL_SECONDS)


def _difference(job: Any, submission: Submission) -> str:
    # What `job` has otherwise; "" for the same work.
    if job.entrypoint != submission.command.entrypoint:
        return "other arguments"
    kept = (job.metadata or {}).get(RECIPE, submission.recipe_sha256)
    return "" if kept == submission.recipe_sha256 else "another recipe of the same name"


def _earlier(client: Any, submission: Submission) -> Any:
    # The newest job of this id that makes a new one needless.
    jobs = _jobs(client, submission.submission_id)
    for job in jobs:
        if not job.status.is_terminal() and (difference := _difference(job, submission)):
            raise SubmitError(
                f"{job.submission_id} is {str(job.status).lower()} and writes to the same place "
                f"with {difference}:\n  {job.entrypoint}\nGive this one another "
                f"{' or '.join(f'{key}=' for key in submission.command.places)}, or stop that "
                f"one:\n{how_to_see(client, job.submission_id)}"
            )
        if not job.status.is_terminal():
            return job
    # What only asks may be answered otherwise now.
    if jobs and jobs[0].status == "SUCCEEDED" and submission.command.places:
        return None if _difference(jobs[0], submission) else jobs[0]
    return None


def _jobs(client: Any, base: str) -> list[Any]:
    # Newest first.
    ours = [job for job in client.list_jobs() if _number(job.submission_id or "", base)]
    return sorted(ours, key=lambda job: -_number(job.submission_id, base))


def _next_id(client: Any, base: str) -> str:
    jobs = _jobs(client, base)
    return f"{base}-{_number(jobs[0].submission_id, base) + 1}" if jobs else base


def _number(submission_id: str, base: str) -> int:
    # 1 for `base`, n for `base-n`, 0 for another job's.
    found = re.fullmatch(rf"{re.escape(base)}(?:-(\d+))?", submission_id)
    return int(found[1] or 1) if found else 0


def _start(client: Any, submission: Submission, job_id: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "working_tree.zip"
        submission.tree.write_zip(package)
        try:
            started: str = client.submit_job(
                entrypoint=submission.command.entrypoint,
                submission_id=job_id,
                metadata={RECIPE: submission.recipe_sha256},
                runtime_env={"working_dir": str(package), "env_vars": submission.environment},
            )
        except RuntimeError as error:
            if "already exists" in str(error):  # another `fae submit` was faster
                return job_id
            raise SubmitError(f"The job server refused the job: {str(error)[:500]}") from None
        except OSError as error:
            raise SubmitError(
                f"The connection broke while {job_id} was sent ({str(error)[:200]}). The same "
                "command starts the job, or follows it if it runs."
            ) from None
    return started


def _ask_to_stop(client: Any, job_id: str, say: Callable[[str], None]) -> None:
    answer = ""
    if sys.stdin.isatty():
        try:
            answer = input(f"\nStop {job_id} too? [y/N] ")
        except (KeyboardInterrupt, EOFError):
            answer = ""
    if answer.strip().lower() in ("y", "yes"):
        client.stop_job(job_id)
        say(
            f"{job_id} was told to stop. Its finished work remains, and the same command resumes "
            "from it."
        )
    else:
        say(f"\n{job_id} runs on.\n{how_to_see(client, job_id)}")


def _has_token() -> bool:
    variables = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    home = Path.home() / ".ray" / "auth_token"
    return any(os.environ.get(name) for name in variables) or home.is_file()


def _explain_refusal(address: str, message: str) -> str:
    wrong = "invalid" in message.lower()
    state = "another token than this machine's (403)" if wrong else "a token (401)"
    return (
        f"{address} wants {state}. Ray's token authentication is on there. Put the cluster's token "
        "in RAY_AUTH_TOKEN, or in a file that RAY_AUTH_TOKEN_PATH names (default "
        "~/.ray/auth_token), and leave RAY_AUTH_MODE unset or `token`. On KubeRay it is in the "
        "Secret of the cluster's name:\n  export RAY_AUTH_TOKEN=$(kubectl get secret NAME "
        "-o jsonpath='{.data.auth_token}' | base64 -d)"
    )
