"""``python -m routellm.cli``."""

from routellm.cli import main

main()
