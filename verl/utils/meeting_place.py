"""Where processes of one machine meet to form a process group."""

import socket

import torch.distributed as dist

_ADDRESS = "127.0.0.1"


class MeetingPlace:
    """A store that this process holds, and at which all ranks of one group meet by torch's `env://`.

    It listens from the start. A port that is only noted, for rank 0 to listen at once it has imported its libraries,
    may be another program's by then.
    """

    def __init__(self) -> None:
        listening = socket.create_server((_ADDRESS, 0))
        port = listening.getsockname()[1]
        self.environment = {
            "MASTER_ADDR": _ADDRESS,
            "MASTER_PORT": str(port),
            # Rank 0 connects as the others do, as it does under torchrun; by default it would listen itself.
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        """Of every rank."""
        self._store = dist.TCPStore(
            _ADDRESS, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
        )
