"""Figures of the server for Prometheus (https://prometheus.io/docs/practices/naming/)."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

FIRST_TOKEN_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
NEXT_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)
REQUEST_SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counts what happens; safe to call from any thread."""

    def __init__(self) -> None:
        to = self._registry = CollectorRegistry()
        about = "Requests answered."
        self._requests = Counter("deepy_requests", about, ("endpoint", "status"), registry=to)
        about = "From a request to the end of its answer."
        self._seconds = Histogram("deepy_request_seconds", about, ("endpoint",), registry=to, buckets=REQUEST_SECONDS)
        self._errors = Counter("deepy_errors", "Answers that are or end with an error.", ("code",), registry=to)
        self._gone = Counter("deepy_disconnects", "Clients that left before their answer ended.", registry=to)
        self._prompt = Counter("deepy_prompt_tokens", "Tokens of prompts taken.", registry=to)
        self._generated = Counter("deepy_generated_tokens", "Tokens generated.", registry=to)
        name, about = "deepy_time_to_first_token_seconds", "From the acceptance of a text to its first token."
        self._first = Histogram(name, about, registry=to, buckets=FIRST_TOKEN_SECONDS)
        name, about = "deepy_time_between_tokens_seconds", "Between two tokens of a text."
        self._next = Histogram(name, about, registry=to, buckets=NEXT_TOKEN_SECONDS)
        self._in_use = Gauge("deepy_slots_in_use", "Texts that are being computed.", registry=to)
        self._waiting = Gauge("deepy_texts_waiting", "Texts that wait for a slot.", registry=to)
        self._slots = Gauge("deepy_slots", "Texts that can be computed at once.", registry=to)

    def set_slots(self, slots: int) -> None:
        """The number of texts that can be computed at once is known."""
        self._slots.set(slots)

    def observe_request(self, endpoint: str, status: int, seconds: float) -> None:
        """An answer has ended. endpoint: the path of the route, not what the client wrote."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def observe_error(self, code: str) -> None:
        """A request was answered, or a stream ended, with an error."""
        self._errors.labels(code).inc()

    def observe_disconnect(self) -> None:
        """A client left."""
        self._gone.inc()

    def observe_prompt(self, tokens: int) -> None:
        """A prompt was taken."""
        self._prompt.inc(tokens)

    def observe_tokens(self, count: int, seconds: float, is_first: bool) -> None:
        """A text has `count` new tokens. seconds: since its last ones, or since it was accepted."""
        self._generated.inc(count)
        if is_first:
            self._first.observe(seconds)
        else:
            self._next.observe(seconds / count)

    def observe_load(self, slots_in_use: int, waiting: int) -> None:
        """How busy the engine is now."""
        self._in_use.set(slots_in_use)
        self._waiting.set(waiting)

    def page(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)
