"""`python -m klora`: the command."""

from .cli import main

main()
