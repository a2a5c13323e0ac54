"""The exceptions of this package. Each message says what was wrong, where, and what to do."""

from __future__ import annotations


class Ctfp8Error(Exception):
    """Base of every exception raised by ctfp8_compile."""


class CheckpointError(Ctfp8Error, ValueError):
    """A checkpoint file is damaged, incomplete or contradicts its own config."""


class SchemeError(Ctfp8Error, ValueError):
    """A quantization scheme is unknown to us, or does not fit the tensor it is meant for."""


class TargetError(Ctfp8Error, ValueError):
    """A target is misspelled, or asks for something this machine has not got."""


class UsageError(Ctfp8Error, RuntimeError):
    """A model or function of this package was used in a way that would silently lose the FP8 weights."""


class ArtifactError(Ctfp8Error, ValueError):
    """An artifact file is damaged, was edited, or is not one that ctfp8.export wrote."""


class InputError(Ctfp8Error, TypeError):
    """A loaded artifact was called with inputs it was not exported for."""


class PassError(Ctfp8Error, RuntimeError):
    """A pass left a graph that is not right; `passes.verifying` looks for that."""


class RankError(Ctfp8Error, RuntimeError):
    """Another one of several processes failed or ended, or they were started in another way than a file was made for."""
