"""The last line of a command: where its result is, and the one next command."""

import typer


def close(found: str, following: str) -> None:
    """Print the line. `following` is what most people do next."""
    typer.echo(f"{found}   next: {following}")
