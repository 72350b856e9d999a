"""fairseq's commands without the 4 seconds that it takes to import torch and fairseq: a process that has imported both
and forks for each command. What a command does is what its console script does; the plugin is not imported beforehand.

    python fork_server.py SOCKET

A client connects to the Unix socket and sends a line of JSON: {"name": "train", "arguments": [...], "cwd": ...,
"env": {...}, "stdin": FILE, "output": FILE}. It gets a line with the number of the command's process, and, when that
has ended, a line with its exit status.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import signal
import socket
import sys

HEAVY = (
    *("fairseq.checkpoint_utils", "fairseq.tasks.translation", "fairseq.trainer", "sacrebleu"),
    *("torch", "torch._dynamo", "torch.distributed.fsdp"),  # the last two come with the first optimizer
)


def take_over(request: dict) -> None:
    """Become the process that a shell would have started."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    source = os.open(request["stdin"], os.O_RDONLY)
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
    for descriptor, place in ((source, 0), (output, 1), (output, 2)):
        os.dup2(descriptor, place)
    sys.argv = [f"fairseq-{request['name']}", *request["arguments"]]


def serve(path: str) -> dict | None:
    """Answer clients; returns, in the process that is to run it, a command."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen(64)
    os.rename(f"{path}.new", path)  # a client that finds it is not refused
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the processes that wait for a command leave nothing behind
    while True:
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with connection.makefile("rw") as stream:
            line = stream.readline()
            if not line:
                os._exit(0)
            command = os.fork()
            if not command:
                return json.loads(line)
            print(command, file=stream, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(command, 0)[1]), file=stream, flush=True)
        os._exit(0)


def main() -> None:
    sys.path[0] = os.path.dirname(sys.executable)  # where the console scripts are
    for name in HEAVY:
        importlib.import_module(name)
    # As in a fresh process: a command's own module sets up the log.
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    gc.freeze()
    request = serve(sys.argv[1])
    assert request is not None
    take_over(request)
    sys.exit(importlib.import_module(f"fairseq_cli.{request['name']}").cli_main())


if __name__ == "__main__":
    main()
