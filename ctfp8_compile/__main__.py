"""`python -m ctfp8_compile` is the command `ctfp8`."""

from .cli.app import app

app(prog_name="ctfp8")
