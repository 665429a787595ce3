"""`python -m fae COMMAND …`: what the script `fae` runs, and what every Ray job runs."""

from .cli import main

main()
