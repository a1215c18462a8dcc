# SPDX-License-Identifier: Apache-2.0
"""The client that an app embeds: takes part in rounds, and uses what came out of them."""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import overload

from lorikit.proto.device import Profile
from lorikit.sdk._config import ClientConfig, parse_bytes
from lorikit.sdk._connection import Connection
from lorikit.sdk._data import Image, Row
from lorikit.sdk._errors import CancelledError, EngineUnavailableError, IdentityError
from lorikit.sdk._events import Event, State
from lorikit.sdk._feed import Feed
from lorikit.sdk._generation import Generation, Sampling
from lorikit.sdk._model import LocalModel, Prediction
from lorikit.sdk._profile import profile
from lorikit.sdk._session import Session, Stop
from lorikit.sdk._store import Store
from lorikit.sdk._transport import GrpcTransport, Transport
from lorikit.sdk._worker import Worker
from lorikit.sdk.engines import available_engines


class Client:
    """One device of a federation.

    ``run`` blocks until the server's run is finished; ``start`` does the same in the background.
    What the client has done survives a kill at any instant: a client on the same store goes on
    within the same task. Its methods may be called from any thread.

    Errors that end ``run``: ``RefusedError`` (the device does not fit), ``IdentityError`` (not
    enrolled), ``ProtocolVersionError`` (update needed), ``EngineUnavailableError``, and
    ``ConnectionLostError`` where the configuration bounds attempts. An error of a single task is
    an event, ``Failed``, and the client goes on.
    """

    def __init__(
        self,
        server: str,
        data: Iterable[Row],
        *,
        store: Path | str,
        memory_limit: int | str | None = None,
        device_class: str = "",
        engine: str | None = None,
        threads: int | None = None,
        insecure: bool = False,
        root_certificates: bytes | None = None,
        enrolment_token: str = "",
        enrol_server: str | None = None,
        speed_gflops: float | None = None,
        on_event: Callable[[Event], None] | None = None,
        config: ClientConfig | None = None,
        transport: Transport | None = None,
    ) -> None:
        """Open the store; nothing is sent yet.

        Args:
            server: Address, ``host:port``.
            data: Local rows, as the run's task needs them: mappings with its columns, pairs of
                input and label, or texts alone; docs/sdk.md has the list. They are read when work
                arrives and never leave the device.
            store: Folder to keep state in, made if absent; one per client.
            memory_limit: Most resident memory the process may use, bytes or for example
                ``"256MB"``; the server plans within it. None: what the system allows.
            device_class: Name of this kind of device in reports; empty: the server chooses.
            engine: ``onnx`` or ``onnx-training``; None: the best that is installed.
            threads: Processor threads for training; None: all that the process may use.
            insecure: Connect without encryption. For tests and loopback.
            root_certificates: PEM of the authorities to trust; None: the system's.
            enrolment_token: One-time token of the operator. With it, and TLS, the device asks for
                a certificate at its first start; later starts need none.
            enrol_server: Address where devices enrol; None: the next port of ``server``.
            speed_gflops: Speed to tell the server; None: measure it.
            on_event: Called with each event, in the thread in which it happens; keep it short.
            config: Deadlines, retries and bounds.
            transport: How to reach the server; None: gRPC.

        Raises:
            IdentityError: ``insecure`` with a store that has a certificate.
            StoreBusyError: Another client uses the store.
            ValueError: An argument is out of range.
        """
        self._config = config or ClientConfig()
        self._limit = None if memory_limit is None else parse_bytes(memory_limit)
        self._device_class = device_class
        self._engine = engine
        self._threads = threads or _cores()
        self._speed = speed_gflops
        self._rows = data if isinstance(data, Sequence) else list(data)
        self._feed = Feed(on_event)
        self._store = Store(store, max_bytes=self._config.storage_limit_bytes)
        if insecure and self._store.identity().certificate:
            self._store.close()
            raise IdentityError(
                f"{store} has a certificate, which an insecure connection cannot show; leave out "
                "insecure"
            )
        self._transport = transport or GrpcTransport(
            server,
            insecure=insecure,
            root_certificates=root_certificates,
            enrol_server=enrol_server,
            config=self._config,
        )
        self._enrolment_token = "" if insecure else enrolment_token
        self._connection = Connection(self._config, emit=self._feed.emit)
        self._model = LocalModel(self._store, engine=engine, threads=self._threads)
        self._stop = Stop()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._runner = 0
        self._idle = threading.Event()
        self._idle.set()

    @property
    def state(self) -> State:
        """What the client is doing."""
        return self._feed.state

    def run(self, *, max_rounds: int | None = None) -> State:
        """Take part until the server's run is finished.

        Args:
            max_rounds: Stop after so many rounds with an update of this device; None: no bound.

        Returns:
            ``State.FINISHED``, or ``State.STOPPED`` after ``stop`` or ``max_rounds``.

        Raises:
            LorikitError: See the class.
            RuntimeError: The client is running already.
        """
        self._begin()
        return self._run(max_rounds)

    def start(self, *, max_rounds: int | None = None) -> None:
        """Like ``run``, in a background thread; ``wait`` gives its result."""
        self._begin()
        self._failure = None
        self._thread = threading.Thread(
            target=self._run_in_background, args=(max_rounds,), name="lorikit-client", daemon=True
        )
        self._thread.start()

    def wait(self, timeout_seconds: float | None = None) -> State:
        """Wait for the end of what ``start`` began.

        Returns:
            The state; one of a client that still works if the time ran out.

        Raises:
            LorikitError: What ended the run, see the class.
        """
        thread = self._thread
        if thread is not None:
            thread.join(timeout_seconds)
            if not thread.is_alive() and self._failure is not None:
                raise self._failure
        return self.state

    def stop(self) -> None:
        """End the run soon, keeping the work done so far, and wait for its end.

        Called from ``on_event``, it does not wait.
        A later ``run`` or ``start``, also of another process, goes on where this one stopped.
        """
        with self._lock:
            if not self._idle.is_set():
                self._stop.session = True
                self._transport.interrupt()
                self._connection.interrupt()
        if self._runner != threading.get_ident():
            self._idle.wait()

    def cancel(self) -> None:
        """Drop the task in progress, tell the server, and go on with the next one."""
        self._stop.task = True

    def events(self) -> Iterator[Event]:
        """Events from now until the current (or else the next) run ends."""
        return self._feed.events()

    @overload
    def predict(self, examples: Sequence[Image]) -> list[Prediction]: ...

    @overload
    def predict(
        self, examples: Sequence[list[str]] | Sequence[tuple[str, ...]]
    ) -> list[list[Prediction]]: ...

    def predict(self, examples: Sequence[object]) -> list[Prediction] | list[list[Prediction]]:
        """The most probable label of each example with its probability, by the newest adapter.

        Works while training and without a connection. The newest adapter is the last one that the
        server handed out: the run's final one once it is finished.

        Args:
            examples: What the task reads: texts; images (as arrays, Pillow images, or paths); or
                lists of words, each of which gets a label of its own.

        Raises:
            PackageError: There is no adapter yet, or its model names no classes.
            DataError: An example is not what the task reads.
        """
        return self._model.predict(examples)

    def evaluate(self, rows: Iterable[Row]) -> dict[str, float]:
        """``accuracy``, ``loss`` and ``examples`` of the newest adapter on labelled rows.

        For language models also ``perplexity``. Accuracy and loss are means over all labels: of
        rows, or of words or tokens where those are labelled.

        Raises:
            PackageError: There is no adapter yet.
            DataError: A row does not fit the task.
        """
        return self._model.evaluate(rows)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[Generation]:
        """Continue texts with a causal language model and the newest adapter.

        Works while training and without a connection. A prompt that fills the model's length is
        refused; a text that reaches it ends there.

        Args:
            prompts: Texts to continue.
            max_new_tokens: Most tokens to add to each.
            temperature: Logits are divided by it; 0 takes the most probable token.
            top_k: Draw only from so many of the most probable tokens; 0 for all.
            top_p: Draw only from the most probable tokens that together reach it.
            seed: Of the draws; the same arguments give the same texts.
            stop: Texts that end the generation; they are not part of the result.

        Raises:
            PackageError: There is no adapter yet, or its model does not continue texts.
            DataError: A prompt cannot be continued; names it.
            ValueError: A number is out of range.
        """
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=tuple(stop) if not isinstance(stop, str) else (stop,),
        )
        return self._model.generate(prompts, sampling)

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """Like ``generate`` for one prompt, piece by piece as the text grows.

        The pieces joined are the text that ``generate`` gives. Ending the iteration early ends
        the work.
        """
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=tuple(stop) if not isinstance(stop, str) else (stop,),
        )
        return self._model.stream(prompt, sampling)

    def close(self) -> None:
        """Stop, and let go of connection and store; harmless when repeated.

        Raises:
            RuntimeError: Called from ``on_event``, in the middle of the run.
        """
        self.stop()
        if not self._idle.is_set():
            raise RuntimeError("close() inside on_event would pull the store from under the run")
        self._model.close()
        self._transport.close()
        self._store.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _begin(self) -> None:
        with self._lock:
            if not self._idle.is_set():
                raise RuntimeError("this client is running already")
            self._idle.clear()
            self._stop.session = False
            self._transport.resume()
            self._connection.resume()

    def _run_in_background(self, max_rounds: int | None) -> None:
        try:
            self._run(max_rounds)
        except Exception as error:  # handed to whoever waits
            self._failure = error

    def _run(self, max_rounds: int | None) -> State:
        self._runner = threading.get_ident()
        end = State.FAILED
        try:
            end = self._take_part(max_rounds)
        except CancelledError:
            if not self._stop.session:
                raise
            end = State.STOPPED
        finally:
            self._feed.enter(end)
            self._feed.end()
            self._runner = 0
            self._idle.set()
        return end

    def _take_part(self, max_rounds: int | None) -> State:
        own = self._profile()
        worker = Worker(
            self._rows,
            engine=own.engines[0].name,
            threads=self._threads,
            store=self._store,
            transport=self._transport,
            connection=self._connection,
            feed=self._feed,
            config=self._config,
            cancelled=self._stop.asked,
        )
        session = Session(
            own,
            worker,
            enrolment_token=self._enrolment_token,
            store=self._store,
            transport=self._transport,
            connection=self._connection,
            feed=self._feed,
            config=self._config,
            stop=self._stop,
        )
        try:
            return session.take_part(max_rounds)
        finally:
            worker.release()

    def _profile(self) -> Profile:
        """This device; of its engines only the one that was asked for, if one was."""
        engines = tuple(e for e in available_engines() if self._engine in (None, e.name))
        if not engines:
            wanted = self._engine or "onnx"
            raise EngineUnavailableError(
                f'engine {wanted!r} is not installed: pip install "lorikit[{wanted}]"'
            )
        own = profile(
            memory_limit_bytes=self._limit,
            device_class=self._device_class,
            threads=self._threads,
            store=self._store.folder,
            speed_gflops=self._speed,
        )
        return dataclasses.replace(own, engines=engines)


def _cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
