"""Garbage collection pauses while something large is made, and runs as before when it is."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import ctfp8_compile as ctfp8
from ctfp8_compile.paused_gc import paused_gc


@pytest.fixture
def often():
    kept = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield (700, 10, 10)
    gc.set_threshold(*kept)


def test_as_before_after_it(often):
    with paused_gc():
        assert gc.get_threshold() == (100_000, 10, 10)
        with paused_gc():
            pass
        assert gc.get_threshold() == (100_000, 10, 10)
    assert gc.get_threshold() == often
    with pytest.raises(RuntimeError), paused_gc():
        raise RuntimeError
    assert gc.get_threshold() == often


def test_two_threads_at_once(often):
    """The one that began first ends first."""
    first, second = paused_gc(), paused_gc()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert gc.get_threshold()[0] == 100_000
    second.__exit__(None, None, None)
    assert gc.get_threshold() == often


@pytest.mark.parametrize("chosen", [0, 200_000])
def test_what_the_user_chose_stays(chosen, often):
    gc.set_threshold(chosen)
    with paused_gc():
        assert gc.get_threshold()[0] == chosen
    assert gc.get_threshold()[0] == chosen


def test_while_a_model_compiles(often):
    seen = []

    def backend(gm, inputs):
        seen.append(gc.get_threshold()[0])
        return gm.forward

    model = ctfp8.compile(nn.Linear(4, 4).eval(), backend=backend)
    model(torch.randn(2, 4))
    assert seen == [100_000]
    assert gc.get_threshold() == often
