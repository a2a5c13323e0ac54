"""Runs a function of a test on several processes that share a gloo group, as torchrun starts them."""

from __future__ import annotations

import functools
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

#: By the process that ranks are forks of: nothing that starts threads, as no thread lives on in a fork.
IMPORTED = [
    "torch._inductor.compile_fx",
    "torch.distributed.tensor",
    "transformers",
    "transformers.modeling_utils",
    "ctfp8_compile.hf.hub",
]


def on_ranks(count: int, function: Callable[..., Any], *args: Any, seconds: float = 300) -> list[Any]:
    """What `function(*args)` returned on each rank, or the exception it raised, as `"TypeOfIt: its message"`.

    Raises:
        TimeoutError: a rank did not end in time; all are killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("forkserver")  # each rank a fork of one process, which has imported what takes seconds
    context.set_forkserver_preload(IMPORTED)
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(n, count, port, results, function, args)) for n in range(count)]
    for process in ranks:
        process.start()
    try:
        found = dict(results.get(timeout=seconds) for _ in ranks)
    except Exception as error:
        raise TimeoutError(f"{function.__name__} hangs or died on some of {count} ranks") from error
    finally:
        for process in ranks:
            process.join(5)
            process.kill()
    return [found[n] for n in range(count)]


def _rank(n: int, count: int, port: int, results: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import os

    os.environ |= {"RANK": str(n), "LOCAL_RANK": str(n), "WORLD_SIZE": str(count), "MASTER_PORT": str(port)}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    # as conftest does for its own process: our passes run only when Inductor compiles
    torch._inductor.config.fx_graph_cache = torch._functorch.config.enable_autograd_cache = False
    # a model's mesh opens seven groups, each with threads of gloo that hardly sleep; models of a test share one
    dist.init_device_mesh = functools.cache(dist.init_device_mesh)
    try:
        result: Any = function(*args)
    except Exception as error:
        traceback.print_exc()
        result = f"{type(error).__name__}: {error}"
    results.put((n, result))
