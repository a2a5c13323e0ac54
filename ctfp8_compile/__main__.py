"""`python -m ctfp8_compile` is the command `ctfp8`."""

from .cli.process import main

main()
