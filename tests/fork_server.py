"""Server that runs fairseq's commands without the 4 seconds that importing torch and fairseq takes.

It imports both once and forks for each command. A command does what its console script does; the plugin is not imported
beforehand.

    python fork_server.py SOCKET

A client connects to the Unix socket and sends a line of JSON: {"name": "train", "arguments": [...], "cwd": ...,
"env": {...}, "stdin": FILE, "output": FILE}. It receives a line with the process id of the command and, when that has
ended, a line with its exit status.
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
    *("torch", "torch._dynamo", "torch.distributed.fsdp"),  # fairseq imports the last two with the first optimizer
)


def take_over(request: dict) -> None:
    """Set session, folder, environment, streams and sys.argv as a shell that starts the command would."""
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
    """Answer clients forever; in the child process that is to run a command, return its request."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen(64)
    os.rename(f"{path}.new", path)  # renamed once it accepts connections
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies of the processes that wait for a command
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
    # As in a fresh process, where the command's own module configures logging.
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    gc.freeze()
    request = serve(sys.argv[1])
    assert request is not None
    take_over(request)
    sys.exit(importlib.import_module(f"fairseq_cli.{request['name']}").cli_main())


if __name__ == "__main__":
    main()
