"""What `TF_CONFIG` tells two processes of this machine that train as one."""

import contextlib
import json
import socket


def tf_configs() -> list[str]:
    """Returns the value of `TF_CONFIG` for each of two workers, on free ports."""
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(2)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        workers = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    return [
        json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}})
        for index in range(2)
    ]
