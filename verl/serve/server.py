"""The server's process: its socket, its signals, its end. The work of `python3 -m verl.serve`."""

import argparse
import logging
import os
import signal
import socket
from functools import partial
from types import FrameType

import uvicorn
from uvicorn.server import HANDLED_SIGNALS

from verl.checkpoint.model_folder import model_folder
from verl.embedding.settings import EmbedderSettings
from verl.encoder.backend import require_gpus
from verl.encoder.grace_encoder import GraceEncoder
from verl.errors import UserError
from verl.prompt_options import read_system_prompt
from verl.serve.access import KEY_VARIABLE, choose_access
from verl.serve.app import Service, create_app
from verl.serve.batching import Queue
from verl.serve.messages import MOST_INPUTS
from verl.serve.metrics import Metrics
from verl.serve.worker import LOG, Worker
from verl.utils.console import complain
from verl.utils.logging import quiet_libraries
from verl.workers.rollout.choose import choose_device_and_engine

# Connections at once; more are told 503 by uvicorn.
_MOST_CONNECTIONS = 1000
# Seconds that clients have to take their answers once everything is embedded.
_LAST_ANSWERS_S = 10


def run_program(args: argparse.Namespace) -> int:
    """Serve as the arguments of `verl.serve` ask for; the exit code."""
    quiet_libraries()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    LOG.setLevel(logging.INFO)
    try:
        service, listener = prepare(args)
    except (UserError, ValueError, OSError) as error:
        return complain("serve", error)
    server = Server(service)
    server.take_signals()
    LOG.info("listening on %s; loading %s", _address(listener), args.model)
    service.worker.start()
    server.run([listener])
    service.worker.ended.wait()
    LOG.info("ended")
    return 1 if service.worker.state == "failed" else 0


def prepare(args: argparse.Namespace) -> tuple[Service, socket.socket]:
    """All that can be told before the model is loaded, and the socket.

    Raises:
        UserError, ValueError: an argument or the model's settings are wrong.
        OSError: the address cannot be listened on.
    """
    for name, least in (("max_batch", 1), ("max_queue", MOST_INPUTS)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)} must be {least} or more")
    access = choose_access(args.host, args.api_key, os.environ.get(KEY_VARIABLE), args.no_auth)
    device, *_ = choose_device_and_engine(args.device, args.engine)
    if device == "cuda":
        require_gpus(args.num_processes)
    settings = EmbedderSettings.read(model_folder(args.model)).changed(
        pooling=args.pooling, span=args.span, text_share=args.text_share, no_rationale_weight=args.no_rationale_weight,
        centre=False if args.no_centre else None, max_prompt_length=args.max_prompt_length,
        max_new_tokens=args.max_new_tokens,
        system_prompt=None if args.system_prompt is None else read_system_prompt(args.system_prompt),
        system_prompt_in=args.system_prompt_in, template_date=args.template_date,
    )  # fmt: skip
    queue = Queue(args.max_queue, args.max_batch)
    metrics = Metrics(queue)
    thinks = settings.think and not args.no_thinking
    worker = Worker(partial(load, args, settings), queue, metrics, thinks)
    return Service(args.name or args.model, thinks, worker, access, metrics), listen(args.host, args.port)


def load(args: argparse.Namespace, settings: EmbedderSettings) -> GraceEncoder:
    return GraceEncoder(
        args.model, engine=args.engine, device=args.device, settings=settings, store=args.store,
        num_processes=args.num_processes, tensor_parallel_size=args.tensor_parallel_size,
        gpu_memory_utilization=args.gpu_memory_utilization,
    )  # fmt: skip


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 = any that is free."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=_MOST_CONNECTIONS)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--host {host} --port {port} cannot be listened on: {error}; give an address of this "
            "machine, and a port that is free"
        ) from error


class Server(uvicorn.Server):
    """Uvicorn that answers what waits before it ends.

    The first SIGTERM or Ctrl-C drains: new requests get 503, those that wait are answered, then the process ends. The
    second ends it at once, as does the first while the model is being loaded, when nothing waits.
    """

    def __init__(self, service: Service) -> None:
        config = uvicorn.Config(
            create_app(service), log_config=None, access_log=False, proxy_headers=False, server_header=False,
            limit_concurrency=_MOST_CONNECTIONS, timeout_graceful_shutdown=_LAST_ANSWERS_S,
        )  # fmt: skip
        super().__init__(config)
        self._worker = service.worker

    def take_signals(self) -> None:
        """Handle signals from now on; uvicorn does so only from when its loop runs."""
        for sig in HANDLED_SIGNALS:
            signal.signal(sig, self.handle_exit)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._worker.draining or self._worker.state == "loading":
            LOG.info("%s: ending at once", signal.Signals(sig).name)
            os._exit(0 if self._worker.state == "loading" else 1)
        LOG.info("%s: %d texts wait and are embedded first", signal.Signals(sig).name, len(self._worker.queue))
        self._worker.drain()

    async def on_tick(self, counter: int) -> bool:
        # A failed worker has ended too, and its clients are to be told until somebody ends the server.
        if self._worker.ended.is_set() and self._worker.draining:
            self.should_exit = True
        return await super().on_tick(counter)


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
