# SPDX-License-Identifier: Apache-2.0
"""The server: the one place where its parts are built from settings and put together."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from pydantic import ValidationError

from lorikit.proto.limits import MAX_MESSAGE_BYTES
from lorikit.proto.status import ErrorCode
from lorikit.proto.tensors import Tensors
from lorikit.server.config import (
    ConfigError,
    RunConfig,
    ServerConfig,
    explain,
    neighbour,
    read_evaluation_data,
)
from lorikit.server.downlink import downlink_scheme
from lorikit.server.downloads import Downloads
from lorikit.server.errors import LorikitError, RequestError
from lorikit.server.export import write_adapter
from lorikit.server.failpoints import Failpoint
from lorikit.server.gate import Gate
from lorikit.server.identity.setup import open_identity, server_credentials
from lorikit.server.learning import LearntMemory
from lorikit.server.methods import FACTS, base_delta_rank, build_method
from lorikit.server.methods.base import Method
from lorikit.server.methods.base_correction import Bases, CorrectionConfig
from lorikit.server.methods.corrected import Corrected
from lorikit.server.methods.corrections import build_correction
from lorikit.server.methods.head_start import HeadStart, HeadStartConfig
from lorikit.server.methods.server_optimizer import ServerOptimizer, ServerOptimizerConfig
from lorikit.server.offload import Offload
from lorikit.server.operator import OperatorService
from lorikit.server.patience import Patience
from lorikit.server.planner.planner import Planner
from lorikit.server.plans import wire_scheme
from lorikit.server.rounds import RunLoop
from lorikit.server.runs import Runs, Summary
from lorikit.server.service import DeviceService
from lorikit.server.signals import Signals
from lorikit.server.store.blobs import FolderBlobs
from lorikit.server.store.sql import SqlStore
from lorikit.server.store.tables import RunRow
from lorikit.server.tasks import TaskBoard
from lorikit.server.uploads import Uploads
from lorikit.server.work import RoundWork, RunParts

logger = logging.getLogger(__name__)

_R = TypeVar("_R")

OpenParts = Callable[[RunConfig, FolderBlobs], RunParts]
"""Opens method, compiler and planner of a run; may take minutes."""

_SERVICES = ("lorikit.proto.v1.DeviceService", "lorikit.proto.v1.OperatorService")

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 16 << 10),
    # No message is decompressed: bit 0 alone stands for plain ones.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    ("grpc.server_handshake_timeout_ms", 20_000),
    # A second server on the same port is an error, not a share of the calls.
    ("grpc.so_reuseport", 0),
    # Mobile networks drop silent connections after some minutes.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


_BIND_SECONDS = 3.0


class ServerError(LorikitError):
    """The server cannot start; the message says why and what to do."""


class Coordinator:
    """A running server within an event loop."""

    def __init__(self, config: ServerConfig, *, open_parts: OpenParts | None = None) -> None:
        """Open the store and put the parts together; nothing listens yet.

        Args:
            config: The server's settings.
            open_parts: Opens a run's parts; None for the compiler, planner and methods that are
                part of Lorikit.
        """
        self.config = config
        self.port = 0
        self.enrol_port = 0
        self._open_parts = open_parts or open_run_parts
        private = config.private_folder
        private.mkdir(parents=True, exist_ok=True)
        self._blobs = FolderBlobs(private / "blobs")
        self._kept = FolderBlobs(private / "updates")
        self._store = SqlStore(config.database_url)
        self._signals = Signals()
        self._offload = Offload()
        self._failpoint = Failpoint(os.environ.get("LORIKIT_FAILPOINT", ""))
        self._board = TaskBoard(self._store, self._signals, self._offload, config)
        self._identity = open_identity(
            config, store=self._store, board=self._board, offload=self._offload
        )
        self._uploads = Uploads(
            private / "uploads",
            store=self._store,
            private=self._kept,
            board=self._board,
            signals=self._signals,
            offload=self._offload,
            limits=config.limits,
            reach=self._failpoint,
        )
        self.runs = Runs(
            config,
            store=self._store,
            board=self._board,
            signals=self._signals,
            offload=self._offload,
            check=check_run if open_parts is None else lambda _: None,
            open_loop=self._open_loop,
        )
        self._is_stopping = False
        self._health = health.aio.HealthServicer()
        self._grpc: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Go on with runs in progress and listen.

        Raises:
            ServerError: The address cannot be listened on.
        """
        self._sweep()
        self._grpc = self._build_grpc()
        self.port = await self._listen(self._grpc)
        resumed = await self.runs.resume()
        await self._grpc.start()
        for name in ("", *_SERVICES):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        logger.info("listening address=%s port=%d resumed=%d", self.address, self.port, resumed)

    @property
    def enrol_address(self) -> str:
        """Host and port where devices enrol; empty where that is ``address``."""
        if not self.enrol_port:
            return ""
        host = (self.config.enrol_address or self.config.address).rpartition(":")[0]
        return f"{host}:{self.enrol_port}"

    @property
    def address(self) -> str:
        """Host and port that devices connect to."""
        host, separator, _ = self.config.address.rpartition(":")
        if not separator or host == "unix":
            return self.config.address
        return f"{host}:{self.port}"

    async def stop(self) -> None:
        """Hand out last adapters, answer what is in progress, and leave everything resumable."""
        if self._grpc is not None:
            await self._hand_out()
        self._is_stopping = True
        await self._health.enter_graceful_shutdown()
        self._board.stop()
        if self._grpc is not None:
            await self._grpc.stop(self.config.stop_seconds)
            self._grpc = None  # its port is free when the last reference is gone
        await self.runs.close()
        await asyncio.to_thread(self._offload.close)
        self._store.close()
        logger.info("stopped")

    async def _hand_out(self) -> None:
        """Let present devices fetch the last adapter; nothing keeps the server from stopping."""
        try:
            if await self._board.handed_out(self.config.handout_seconds):
                return
        except Exception:  # a store that fails now must not stand in the way
            logger.exception("cannot tell which devices lack the last adapter")
        logger.warning("some devices may lack the last adapter; they get it after a restart")

    def _sweep(self) -> None:
        """Remove what a killed server left half-written; nobody else writes yet."""
        self._blobs.remove_temporary()
        self._kept.remove_temporary()
        needed = self._store.referenced_digests()
        for digest in self._kept.digests():
            if digest not in needed:
                self._kept.remove(digest)

    def _build_grpc(self) -> grpc.aio.Server:
        limits = self.config.limits
        server = grpc.aio.server(
            interceptors=(
                Gate(
                    self._identity.admission,
                    self._identity.audit,
                    self._identity.rates,
                    lambda: self._is_stopping,
                    retry_seconds=limits.busy_retry_seconds,
                    stall_seconds=limits.stall_seconds,
                ),
            ),
            options=_OPTIONS,
            maximum_concurrent_rpcs=limits.max_calls,
        )
        device = DeviceService(
            self._board,
            self._uploads,
            Downloads(
                self._blobs,
                board=self._board,
                offload=self._offload,
                limits=limits,
            ),
            lease_seconds=self.config.lease_seconds,
            patience=Patience(
                stall_seconds=limits.stall_seconds, bytes_per_second=limits.min_bytes_per_second
            ),
            offload=self._offload,
            registry=self._identity.registry,
        )
        device.add_to(server)
        operator = OperatorService(self.runs, self._offload, registry=self._identity.registry)
        operator.add_to(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        return server

    async def _listen(self, server: grpc.aio.Server) -> int:
        """Take the port, and the one for enrolment where there is an authority."""
        config, registry = self.config, self._identity.registry
        certificate = config.tls_certificate or config.identity_folder / "server.pem"
        key = config.tls_key or config.identity_folder / "server.key"
        if registry is None and config.tls_certificate is None:
            return await _bound(config.address, server.add_insecure_port)
        clients = None if registry is None else registry.authority.root_pem
        port = await _bound(
            config.address,
            lambda address: server.add_secure_port(
                address, server_credentials(certificate, key, clients=clients)
            ),
        )
        if registry is not None:
            self.enrol_port = await _bound(
                config.enrol_address or neighbour(config.address, port),
                lambda address: server.add_secure_port(
                    address, server_credentials(certificate, key)
                ),
            )
        return port

    def _open_loop(self, run: RunRow, config: RunConfig) -> RunLoop:
        return RunLoop(
            run.id,
            config,
            lambda: RoundWork(
                run.id,
                config,
                self._open_parts(config, self._blobs),
                store=self._store,
                blobs=self._blobs,
                private=self._kept,
                folder=self.config.run_folder(run.name),
            ),
            store=self._store,
            board=self._board,
            uploads=self._uploads,
            signals=self._signals,
            offload=self._offload,
            server=self.config,
            reach=self._failpoint,
        )


async def _bound(address: str, add: Callable[[str], int]) -> int:
    """The port of the address; one that a server just left is free again after a moment.

    Raises:
        ServerError: It cannot be listened on.
    """
    end = asyncio.get_running_loop().time() + _BIND_SECONDS
    while True:
        try:
            return add(address)
        except (RuntimeError, OSError) as error:
            if isinstance(error, OSError) or asyncio.get_running_loop().time() >= end:
                raise ServerError(
                    f"cannot listen on {address!r}: {error}; is another server running there?"
                ) from error
        await asyncio.sleep(0.1)


class Server:
    """A server in a thread of its own, for programs that are not asynchronous.

    Usable as a context manager. Every call may be made from any thread.
    """

    def __init__(
        self,
        config: ServerConfig | None = None,
        *,
        open_parts: OpenParts | None = None,
        **settings: object,
    ) -> None:
        """Settings as one object, or as fields of ``ServerConfig``.

        Raises:
            ConfigError: A setting is wrong.
        """
        try:
            self.config = config or ServerConfig.model_validate(settings)
        except ValidationError as error:
            raise ConfigError(explain(error)) from error
        self._open_parts = open_parts
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._coordinator: Coordinator | None = None

    @property
    def address(self) -> str:
        """Host and port that devices connect to."""
        return self._running.address

    @property
    def enrol_address(self) -> str:
        """Host and port where devices enrol; empty where that is ``address``."""
        return self._running.enrol_address

    def start(self) -> Self:
        """Listen, and go on with the runs that an earlier server left.

        Raises:
            ServerError: The address cannot be listened on, or the server runs already.
        """
        if self._thread is not None:
            raise ServerError("server is running already; call stop() before start()")
        self._loop = asyncio.new_event_loop()
        # A program that ends without stop() loses nothing: every state is in the store.
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="lorikit-server", daemon=True
        )
        self._thread.start()
        try:
            self._coordinator = self._call(self._start())
        except BaseException:
            self._end_thread()
            raise
        return self

    def stop(self) -> None:
        """Shut down; runs go on when a server is started on the same folder."""
        coordinator, self._coordinator = self._coordinator, None
        try:
            if coordinator is not None:
                self._call(coordinator.stop())
        finally:
            self._end_thread()

    def create_run(self, config: RunConfig) -> Summary:
        """Start a run; the same settings again give the run that exists."""
        return self._call(self._running.runs.create(config))

    def summary(self, name_or_id: str) -> Summary:
        """Where a run stands."""
        return self._call(self._running.runs.summary(name_or_id))

    def stop_run(self, name_or_id: str, *, at_once: bool = False) -> Summary:
        """End a run after the round in progress, or at once."""
        return self._call(self._running.runs.stop(name_or_id, at_once=at_once))

    def wait(self, name_or_id: str, *, timeout: float | None = None) -> Summary:
        """Wait until a run has ended; where it stands then.

        Raises:
            TimeoutError: It has not after ``timeout`` seconds.
        """
        return self._call(self._running.runs.ended(name_or_id), timeout)

    def __enter__(self) -> Self:
        return self if self._thread is not None else self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def _running(self) -> Coordinator:
        if self._coordinator is None:
            raise ServerError("server is not running; call start() first")
        return self._coordinator

    async def _start(self) -> Coordinator:
        coordinator = Coordinator(self.config, open_parts=self._open_parts)
        try:
            await coordinator.start()
        except BaseException:
            await coordinator.stop()
            raise
        return coordinator

    def _call(self, call: Coroutine[Any, Any, _R], timeout: float | None = None) -> _R:
        if self._loop is None:
            call.close()
            raise ServerError("server is not running; call start() first")
        future: Future[_R] = asyncio.run_coroutine_threadsafe(call, self._loop)
        return future.result(timeout)

    def _end_thread(self) -> None:
        if self._loop is not None and self._thread is not None:
            self._call(self._loop.shutdown_default_executor())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
        self._loop = self._thread = None


async def serve(
    config: ServerConfig,
    *,
    open_parts: OpenParts | None = None,
    started: Callable[[Coordinator], None] | None = None,
) -> None:
    """Run a server until SIGINT or SIGTERM, then shut it down in good order.

    Args:
        config: The server's settings.
        open_parts: See ``Coordinator``.
        started: Called once the server listens.
    """
    coordinator = Coordinator(config, open_parts=open_parts)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C raises KeyboardInterrupt
            loop.add_signal_handler(signal_number, stop.set)
    try:
        await coordinator.start()
        if started is not None:
            started(coordinator)
        await stop.wait()
    finally:
        await coordinator.stop()


def check_run(config: RunConfig) -> None:
    """Nothing, when the run's files and method exist on this machine.

    Raises:
        RequestError: CONFIG_INVALID; the detail says what is missing.
    """
    try:
        if not (config.model / "config.json").is_file():
            raise ConfigError(
                f"model: {config.model} holds no config.json; give a Hugging Face model folder "
                "on the server"
            )
        make_method(config)
        FACTS[config.method].check_kind(config.adapter)
        wire_scheme(config)
        downlink_scheme(config)
        if config.evaluation_data is not None:
            read_evaluation_data(config.evaluation_data, config.task)
    except (LorikitError, ValueError) as error:
        raise RequestError(ErrorCode.CONFIG_INVALID, str(error)) from error


def correction_of(config: RunConfig) -> CorrectionConfig | None:
    """What is done about bases of different precisions in a run; None where all are the same.

    Raises:
        ValueError: Unknown option, a value out of range, or a correction that this adapter has not.
    """
    is_mixed, name = len(config.possible_precisions) > 1, config.base_correction
    if name == "auto":
        name = "compensator" if is_mixed and config.adapter == "lora" else "none"
    if name == "compensator" and config.adapter != "lora":
        raise ValueError(
            f"base_correction: a compensator goes with LoRA, the adapter is {config.adapter}; set "
            "it to none"
        )
    chosen = _from_options(
        CorrectionConfig,
        {"name": name, **config.base_correction_options},
        "base_correction_options",
    )
    return chosen if is_mixed else None


def delta_rank_of(config: RunConfig) -> int | None:
    """Largest rank of the base deltas in a run's packages; 0 for no limit, None for no deltas."""
    own = base_delta_rank(config.method, config.method_options, max_rank=config.max_rank)
    correction = correction_of(config)
    if correction is None or correction.name != "compensator":
        return own
    return 0 if own == 0 else (own or 0) + correction.rank


def make_method(config: RunConfig, bases: Bases | None = None) -> Method:
    """The method of a run, with its wrappers.

    Args:
        config: Settings of the run.
        bases: The base model at the run's precisions; None leaves the correction for them out.

    Raises:
        ValueError: Unknown method or option, or a value out of range.
    """
    method = build_method(
        config.method,
        config.method_options,
        scale=config.lora_scale,
        min_rank=config.min_rank,
        local_steps=config.local_steps,
    )
    if config.server_optimizer != "none":
        options = {
            "name": config.server_optimizer,
            "learning_rate": config.server_learning_rate,
            **config.server_optimizer_options,
        }
        settings = _from_options(ServerOptimizerConfig, options, "server_optimizer_options")
        method = ServerOptimizer(method, settings)
    correction = correction_of(config)
    if correction is not None and bases is not None:
        method = Corrected(
            method,
            build_correction(bases, correction),
            uses_deltas=FACTS[config.method].changes_base,
        )
    if config.head_start == "class-means":
        start = _from_options(HeadStartConfig, config.head_start_options, "head_start_options")
        method = HeadStart(method, start)
    return method


def open_run_parts(config: RunConfig, blobs: FolderBlobs) -> RunParts:
    """Load and export the base model of a run, and build its method and planner."""
    # Here and not above: torch takes seconds to load, and a server that starts should answer.
    from lorikit.server.compile.compiler import Compiler
    from lorikit.server.compile.insertion import AdapterConfig

    compiler = Compiler(
        config.model,
        config.task,
        adapter=AdapterConfig(
            kind=config.adapter,
            targets=config.targets,
            size=config.adapter_size,
            dropout=config.lora_dropout,
            delta_rank=delta_rank_of(config),
            principal_scale=config.lora_scale
            if FACTS[config.method].start == "principal"
            else None,
        ),
        blobs=blobs,
        is_progressive=config.progressive_base,
        progress=lambda sentence: logger.info("run=%s %s", config.name, sentence),
    )
    space = compiler.space(config.max_rank)
    learnt = LearntMemory(blobs.folder.parent / "memory")

    def export(folder: Path, adapter: Tensors, rank: int) -> None:
        write_adapter(
            folder,
            adapter,
            space=space,
            base_model=str(config.model),
            targets=compiler.targets,
            scale=config.lora_scale,
            rank=rank,
            labels=config.labels,
            task_kind=config.task_kind,
            use_rslora=config.use_rslora,
        )

    return RunParts(
        method=make_method(config, compiler.bases(config.possible_precisions)),
        source=compiler,
        planner=Planner(
            compiler,
            precisions=config.precisions,
            class_precisions=config.class_precisions,
            batch_size=config.batch_size,
            max_length=config.max_length,
            max_rank=config.max_rank,
            corrections=learnt.for_run(config.name),
        ),
        export=export,
        teach=learnt.teach,
        evaluation=None
        if config.evaluation_data is None
        else read_evaluation_data(config.evaluation_data, config.task),
    )


def _from_options(kind: type[_R], options: Mapping[str, object], field: str) -> _R:
    """A configuration from a table of options; raises ``ValueError`` naming an unknown one."""
    known = set(inspect.signature(kind).parameters)
    if unknown := sorted(set(options) - known):
        raise ValueError(f"{field} has no {', '.join(unknown)}; it has: {', '.join(sorted(known))}")
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
    return kind(**values)
