"""Work in several processes at once: how they start, meet, hand back what they found, and end."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

GRACE = 10  # seconds that the others have, once one has failed, to say what happened to them


def in_processes(work: Callable[..., Any], *arguments: Any, world: int = 2, gloo: bool = True) -> list[Any]:
    """What ``work(rank, *arguments)`` returns in each of ``world`` processes, by rank.

    ``work`` is a function of a module; what goes in and comes back is pickled. The processes have the environment that
    torchrun makes, with a store that is there already: no port is free now and taken later. With ``gloo`` they are on
    CPUs, and torch.distributed is initialised; without, that is left to ``work``.

    Raises:
        RuntimeError: ``work`` raised in a process, with its traceback, or a process died, with its exit code.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    spawn = multiprocessing.get_context("spawn")
    given = pickle.dumps((work, arguments))
    processes: dict[Connection, BaseProcess] = {}
    try:
        for rank in range(world):
            here, there = spawn.Pipe()
            process = spawn.Process(target=_run, args=(there, rank, world, store.port, gloo, given))
            process.start()
            there.close()  # so that the end of the process is the end of what comes
            processes[here] = process
        results = _collect(processes)
        for connection in processes:
            connection.send(None)
        for process in processes.values():
            process.join()
        return results
    finally:
        for connection, process in processes.items():
            process.kill()
            process.join()
            connection.close()


def _collect(processes: dict[Connection, BaseProcess]) -> list[Any]:
    """The results, in the order of ``processes``."""
    results: dict[Connection, Any] = {}
    failures: dict[Connection, str] = {}
    while waiting := [connection for connection in processes if connection not in results | failures]:
        ready = wait(waiting, GRACE if failures else None)
        if not ready:
            break
        for connection in ready:
            try:
                result, failure = pickle.loads(connection.recv_bytes())
            except (EOFError, ConnectionResetError):
                processes[connection].join()
                failure = f"exit code {processes[connection].exitcode} before its work was done"
            if failure:
                failures[connection] = failure
            else:
                results[connection] = result
    if failures:
        ranks = {connection: rank for rank, connection in enumerate(processes)}
        raise RuntimeError("\n".join(f"process {ranks[c]} of {len(ranks)}: {said}" for c, said in failures.items()))
    return [results[connection] for connection in processes]


def _run(connection: Connection, rank: int, world: int, port: int, gloo: bool, given: bytes) -> None:
    """One of the processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}  # the store is not ours
    torch.set_num_threads(1)
    try:
        if gloo:
            os.environ["ACCELERATE_USE_CPU"] = "true"
            dist.init_process_group("gloo")
        work, arguments = pickle.loads(given)  # imports its module
        connection.send_bytes(pickle.dumps((work(rank, *arguments), None)))
        connection.recv()  # none leaves while another may wait for it
    except BaseException:
        connection.send_bytes(pickle.dumps((None, traceback.format_exc())))
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by the interpreter's own end, which gloo's threads can turn into an abort. They outlive destroy_process_group
    # where a cache, as DTensor's, holds the group; one that drops a Python tensor when the interpreter begins to end is
    # stopped inside a destructor, and C++ terminates (pytorch's issue 190489).
    os._exit(0)
