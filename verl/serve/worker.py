"""The one thread that owns the encoder: it loads it, embeds what is in the queue, and closes it.

An encoder is not safe for threads: its engine, its store's database and its counts are used from the thread that made
them. Others read what does not change: its settings, sizes and names.
"""

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from verl.encoder.grace_encoder import GraceEncoder
from verl.encoder.record import EncodedText
from verl.encoder.store import StoreError
from verl.errors import UserError
from verl.serve.batching import Batch, EndedError, Options, Queue, UnfitTextError
from verl.serve.messages import State
from verl.serve.metrics import Metrics
from verl.workers.rollout.base import RolloutError

LOG = logging.getLogger("verl.serve")
# Clients of OpenAI's wait no longer than this when they are asked to come again.
_LONGEST_WAIT_S = 60
# Their messages say what is to be done; of others the log shows where they were raised.
_EXPLAINED = (UserError, RolloutError, StoreError)


class Worker:
    """Embeds the batches of a queue in a thread of its own.

    Args:
        load: makes the encoder.
        thinks: whether most requests will want rationales, so that the engine is started before the first one.
    """

    def __init__(self, load: Callable[[], GraceEncoder], queue: Queue, metrics: Metrics, thinks: bool) -> None:
        self.queue = queue
        self.state: State = "loading"
        self.draining = False
        self.encoder: GraceEncoder | None = None
        """Set when it is ready."""
        self.ended = threading.Event()
        """Set when nothing is embedded any more, and the encoder is closed."""
        self._load = load
        self._metrics = metrics
        self._thinks = thinks
        self._seconds_per_text = 0.0
        self._thread = threading.Thread(target=self._run, name="encoder", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def drain(self) -> None:
        """Take no more requests; `ended` is set when those that wait are answered."""
        self.draining = True
        if self.state != "failed":
            self.state = "draining"
        self.queue.end()

    def seconds_of_queue(self) -> int:
        """About how long the texts that wait will take, from 1 to 60 s."""
        return min(max(math.ceil(len(self.queue) * self._seconds_per_text), 1), _LONGEST_WAIT_S)

    def _run(self) -> None:
        batch: Batch | None = {}
        try:
            with self._loaded() as encoder:
                answered = 0
                while (batch := self.queue.take(expected=answered)) is not None:
                    self._embed(encoder, batch)
                    answered = sum(not job.waiting for job in batch)
        # Whatever it is: nothing can be embedded any more, and everyone who waits must be told.
        except Exception as error:  # noqa: BLE001
            self._tell(error)
            self.state = "failed"
            for job in {*(batch or ()), *self.queue.end()}:
                self.queue.forget(job)
                job.fail(EndedError())
        finally:
            self.ended.set()

    def _loaded(self) -> GraceEncoder:
        """The encoder, when it has embedded a text: vllm starts with the first rationale."""
        started = time.monotonic()
        encoder = self._load()
        LOG.info("hashing the weights, and embedding a first text; engine %s", encoder.engine_reason)
        _ = encoder.revision
        if self._thinks:
            encoder.describe()  # raises where prompt and rationale do not fit the model's positions
        encoder.encode("a text", think=self._thinks, max_new_tokens=1 if self._thinks else None)
        self.encoder = encoder
        if self.state == "loading":
            self.state = "ok"
            LOG.info("ready after %.0f s: %d dimensions", time.monotonic() - started, encoder.embedding_dim)
        return encoder

    def _embed(self, encoder: GraceEncoder, batch: Batch) -> None:
        """Embed a batch; where a text cannot be rendered, its request alone fails."""
        options = next(iter(batch)).options
        texts = list(dict.fromkeys(text for portion in batch.values() for text in portion))
        started = time.monotonic()
        try:
            found = self._encode(encoder, texts, options)
        except ValueError:
            found = self._encode_those_that_fit(encoder, texts, options)
        seconds = time.monotonic() - started
        self._seconds_per_text = seconds / len(texts)
        self._metrics.batch(len(texts), seconds)
        for job, portion in batch.items():
            unfit = next((text for text in portion if text not in found), None)
            if unfit is None:
                job.take_in({text: found[text] for text in portion})
            else:
                self.queue.forget(job)
                job.fail(UnfitTextError(job.texts.index(unfit)))

    def _encode(self, encoder: GraceEncoder, texts: list[str], options: Options) -> dict[str, EncodedText]:
        before = replace(encoder.usage)
        found = encoder.encode_in_full(texts, **options.arguments())
        self._metrics.encoded(encoder.usage - before)
        return dict(zip(texts, found, strict=True))

    def _encode_those_that_fit(
        self, encoder: GraceEncoder, texts: list[str], options: Options
    ) -> dict[str, EncodedText]:
        """Without the texts that cannot be rendered: with truncation=error, those that are too long."""
        found: dict[str, EncodedText] = {}
        for text in texts:
            try:
                found |= self._encode(encoder, [text], options)
            except ValueError:
                continue  # its request is told
        return found

    def _tell(self, error: Exception) -> None:
        """Log what happened, and the way out."""
        where = None if isinstance(error, _EXPLAINED) else error
        if self.encoder is None:
            LOG.error("the model cannot be served: %s", error, exc_info=where)
            LOG.error("every request gets 503; put it right, end this server and start it again")
        else:
            LOG.error("the engine died: %s", error, exc_info=where)
            LOG.error(
                "every request gets 503; end this server and start it again. If memory ran out: a smaller --max_batch, "
                "--max_new_tokens, --num_processes (on a CPU) or --gpu_memory_utilization (with vllm on a GPU)"
            )
