"""The `ctfp8` command."""

from .app import app

__all__ = ["app"]
