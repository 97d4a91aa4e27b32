"""What the server counts, in Prometheus' text format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from verl.encoder.usage import Usage
from verl.serve.batching import Queue

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """The counts of one server."""

    def __init__(self, queue: Queue) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "grace_requests", "Embedding requests by the status of their answer", ["status"], registry=registry
        )
        self.gone = Counter("grace_gone", "Embedding requests whose client went away", registry=registry)
        self.seconds = Histogram(
            "grace_request_seconds", "From the head of a request to its answer", buckets=_SECONDS, registry=registry
        )
        waiting = Gauge("grace_waiting_texts", "Texts in the queue", registry=registry)
        waiting.set_function(lambda: len(queue))
        self.ready = Gauge("grace_ready", "1 when requests are answered, otherwise 0", registry=registry)
        self._texts = Histogram("grace_batch_texts", "Texts embedded together", buckets=_TEXTS, registry=registry)
        self._batch_seconds = Histogram("grace_batch_seconds", "Time of a batch", buckets=_SECONDS, registry=registry)
        self._vectors = Counter(
            "grace_vectors", "Vectors by where they came from: made, or found in the store", ["source"],
            registry=registry,
        )  # fmt: skip
        self._tokens = Counter("grace_rationale_tokens", "Tokens of rationales generated", registry=registry)
        self._shortened = Counter("grace_shortened_texts", "Texts cut to fit max_prompt_length", registry=registry)

        for source in ("made", "stored"):
            self._vectors.labels(source)  # shown from the beginning, as 0

    def batch(self, texts: int, seconds: float) -> None:
        """Count a batch of different texts."""
        self._texts.observe(texts)
        self._batch_seconds.observe(seconds)

    def encoded(self, usage: Usage) -> None:
        """Count what the encoder did in a call."""
        self._vectors.labels("made").inc(usage.vectors_made)
        self._vectors.labels("stored").inc(usage.vectors_stored)
        self._tokens.inc(usage.generated_tokens)
        self._shortened.inc(usage.shortened)

    def text(self) -> bytes:
        """All counts, in the format of `prometheus_client.CONTENT_TYPE_LATEST`."""
        return generate_latest(self._registry)
