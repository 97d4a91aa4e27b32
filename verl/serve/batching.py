"""Requests that come together are embedded together: a bounded queue of the texts that wait.

A batch mixes requests with the same options, one text of each in turn, so that a short request is done in its first
batch however long the others are. Those that have texts left then go behind all others, so that other options get their
turn: a request waits for at most one batch of each request before it.
"""

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, NamedTuple

from verl.encoder.record import EncodedText
from verl.text_roles import Role

# Seconds to wait for the next requests of clients that have just been answered together. Without it the first of them
# to come back would be embedded alone, and the others meanwhile wait.
_LINGER_S = 0.01


class Options(NamedTuple):
    """What requests must have in common to share a batch."""

    think: bool
    max_new_tokens: int
    """0 without thinking."""
    seed: int
    """0 without thinking."""
    role: Role | None = None
    task: str | None = None

    def arguments(self) -> dict[str, Any]:
        """Those of `GraceEncoder.encode`."""
        return self._asdict() if self.think else {"think": False, "role": self.role, "task": self.task}


class QueueFullError(Exception):
    """The queue has no room for the texts of a request."""


class EndedError(Exception):
    """No request is embedded any more: the server ends, or its engine has."""


class UnfitTextError(ValueError):
    """A text does not fit the model's prompt."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index
        """In the request."""


class Job:
    """A request's texts on their way through the queue.

    Args:
        texts: one or more; a text that occurs several times is embedded once.
    """

    def __init__(self, texts: Sequence[str], options: Options) -> None:
        self.texts = texts
        self.options = options
        self.done: Future[list[EncodedText]] = Future()
        """The result of each text, in order, or the error. Cancelled when the client has gone."""
        self.waiting = deque(dict.fromkeys(texts))
        """Different texts that have not begun."""
        self._different = len(self.waiting)
        self._found: dict[str, EncodedText] = {}

    def take_in(self, found: Mapping[str, EncodedText]) -> None:
        """Keep what was embedded of this request; the last of it completes the request."""
        self._found |= found
        if len(self._found) == self._different:
            with suppress(InvalidStateError):  # the client has gone
                self.done.set_result([self._found[text] for text in self.texts])

    def fail(self, error: Exception) -> None:
        with suppress(InvalidStateError):
            self.done.set_exception(error)


Batch = dict[Job, list[str]]
"""The texts of each request; all requests have the same options."""


class Queue:
    """Requests whose texts have not all begun. All methods may be called from any thread.

    Args:
        most_texts: that may wait.
        most_in_batch: texts of one batch.
    """

    def __init__(self, most_texts: int, most_in_batch: int) -> None:
        self.most_texts = most_texts
        self._most_in_batch = most_in_batch
        self._jobs: deque[Job] = deque()
        self._waiting = 0
        self._ended = False
        self._change = threading.Condition()

    def __len__(self) -> int:
        """Texts that wait."""
        return self._waiting

    def put(self, job: Job) -> None:
        """Let a request wait.

        Raises:
            QueueFullError: its texts do not fit.
            EndedError: after `end`.
        """
        with self._change:
            if self._ended:
                raise EndedError
            if self._waiting + len(job.waiting) > self.most_texts:
                raise QueueFullError
            self._jobs.append(job)
            self._waiting += len(job.waiting)
            self._change.notify()

    def forget(self, job: Job) -> int:
        """Drop those texts of a request that have not begun; their number."""
        with self._change:
            if job not in self._jobs:
                return 0
            self._jobs.remove(job)
            self._waiting -= len(job.waiting)
            return len(job.waiting)

    def take(self, expected: int = 0) -> Batch | None:
        """The next batch, as soon as a request waits; None after `end`, when nothing is left.

        Args:
            expected: requests that are worth a moment's wait.
        """
        with self._change:
            self._change.wait_for(lambda: self._jobs or self._ended)
            if expected > 1:
                self._change.wait_for(lambda: len(self._jobs) >= expected or self._ended, _LINGER_S)
                # All that waited may have been forgotten meanwhile.
                self._change.wait_for(lambda: self._jobs or self._ended)
            if not self._jobs:
                return None
            batch = self._next_batch()
            left = [job for job in batch if job.waiting]
            self._jobs = deque([job for job in self._jobs if job not in batch] + left)
            self._waiting -= sum(map(len, batch.values()))
            return batch

    def end(self) -> list[Job]:
        """Take no more requests; those that wait, which `take` still gives."""
        with self._change:
            self._ended = True
            self._change.notify_all()
            return list(self._jobs)

    def _next_batch(self) -> Batch:
        """One text of each request in turn, in the order of the queue, until the batch is full."""
        options = self._jobs[0].options
        turn = [job for job in self._jobs if job.options == options]
        batch: Batch = {}
        room = self._most_in_batch
        while room and turn:
            turn = turn[:room]
            for job in turn:
                batch.setdefault(job, []).append(job.waiting.popleft())
            room -= len(turn)
            turn = [job for job in turn if job.waiting]
        return batch
