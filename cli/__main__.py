"""`python -m klora.cli`, for launchers such as torchrun."""

from .app import main

main()
