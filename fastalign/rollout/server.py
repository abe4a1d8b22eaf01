"""vLLM as a server of its own: another process, on its own GPUs, that samples while others train.

The trainer starts the server on this machine, and it ends with the trainer.  It is vLLM's own
OpenAI-compatible server with one more route (:mod:`fastalign.rollout.vllm_server`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save_file

from fastalign import ranks
from fastalign.config import ConfigError, RolloutConfig
from fastalign.rollout.adapters import fold, write_adapter
from fastalign.rollout.engine import (
    CLOSED,
    Adapter,
    EngineError,
    EngineFault,
    ServedModel,
    SyncReport,
)
from fastalign.rollout.sync import Fingerprint, digest, fingerprint, verify
from fastalign.rollout.vllm import (
    MAX_ADAPTERS,
    ONEDNN_CACHE,
    VllmAnswers,
    check_transfer,
    engine_arguments,
    process_state_kept,
)
from fastalign.rollout.vllm_worker import Transfer
from fastalign.rollout.watchdog import Watchdog

# One file, or one series of broadcasts, of a transfer of full weights.
_BUCKET_BYTES = 512 * 2**20

# Between this module and those that run in the server's processes.
TOKEN = "FASTALIGN_SERVER_TOKEN"
"""Environment variable: what every request has to bring."""
FOLDER = "FASTALIGN_SERVER_FOLDER"
"""Environment variable: a folder that goes when the trainer is gone."""
CALL, MODEL = "/fastalign/call", "/fastalign/model"
"""Routes: a whole call of an engine, and what the model is."""
FILES = "fastalign-files"
"""The transport of full weights where there is no GPU."""
GRACE_S = 15.0
"""What the server gets to end by itself."""
_ERROR = re.compile(r"\b\w*(?:Error|Exception)\b: .*")
_WORKER = re.compile(r"\((?:EngineCore|Worker)")


@dataclass(frozen=True)
class _Adapter(Adapter):
    """A loaded adapter: what a request names it by, and what its content has to be."""

    request: dict[str, Any]
    shapes: Mapping[str, list[int]]
    sent: Mapping[str, Fingerprint]


class _Sender(Protocol):
    """How tensors of full weights reach the server's workers."""

    def send(self, bucket: Sequence[tuple[str, torch.Tensor]]) -> None: ...

    def close(self) -> None: ...


class ServerEngine(VllmAnswers):
    """Samples with a vLLM server that all ranks of this machine's run share.

    The server takes one call at a time, each with an empty prefix cache, so that a call is a
    function of what is asked and of the weights, whoever else asks.  Every rank asks for itself;
    rank 0 alone starts the server, sends the weights and ends it.

    Adapters travel as files in memory, full weights in vLLM's weight-transfer phases: over nccl
    from GPU to GPU, and as files in memory where there is no GPU.  Either are read back from the
    workers and compared by checksum.  A rank of tensor parallelism holds a part of a matrix, which
    cannot be compared: there the canary alone speaks for it.

    A server that fails, hangs, dies or answers nonsense is not asked again, but started anew by
    :meth:`restart`.

    Sampling may run in a thread beside the trainer's own work, while no weights are sent.
    """

    name = "server"
    _called = "the vLLM server"
    _gone = EngineFault

    def __init__(self, model: ServedModel, config: RolloutConfig) -> None:
        """Start the server and wait until it answers; collective over the default process group.

        Raises:
            ConfigError: ``config.server.devices`` are not GPUs that the trainer leaves alone, or
                the run has several nodes.
            EngineError: the server does not start, or not in time.
        """
        super().__init__(model.max_model_len, model.tokenizer is not None)
        self._device = torch.device(model.device)
        self._on_cpu = self._device.type == "cpu"
        self._config = config
        _check_place(config, self._device)
        self._dtype = model.dtype
        self._max_adapters = MAX_ADAPTERS if model.lora_rank is not None else 0
        self._adapters: dict[str, _Adapter] = {}
        self._last_id = 0
        self._base_was_sent = False
        self._client: Any = None
        self._process: subprocess.Popen[bytes] | None = None
        self._sender: _Sender | None = None
        self._folder: Path | None = None
        self._arguments = server_arguments(model, config, self._on_cpu)
        # Requests have a limit of their own, which comes first.
        self._watchdog = Watchdog("the transfer of weights", config.timeout_s + GRACE_S)
        self._launch()

    # --- the protocol ---

    def load_weights(
        self, tensors: Iterable[tuple[str, torch.Tensor]], names: frozenset[str], version: int
    ) -> SyncReport:
        """Replace the base weights; adapters are loaded and verified again on top of them.

        Collective, and ``tensors`` is consumed to its end on every rank, also after an error.

        Raises:
            EngineError: see :class:`RolloutEngine`.
        """
        start = time.perf_counter()
        self._meet()
        self._base_was_sent = True
        self._stale = f"the transfer of version {version} did not finish"
        transfer, shapes = Transfer(), dict[str, list[int]]()
        failures: list[EngineError] = []
        if ranks.rank() == 0:
            with _kept(failures):
                self._begin_transfer()
        for bucket in self._buckets(tensors, transfer, shapes, version):
            if not failures:
                with _kept(failures):
                    self._send([(name, tensor) for name, tensor in bucket if name in names])
        if ranks.rank() == 0 and not failures:
            with _kept(failures):
                self._post("/finish_weight_update", None)
                self._read_back(transfer, shapes, names, version)
                for adapter in self._adapters.values():
                    self._add_adapter(adapter)
        seconds = time.perf_counter() - start
        outcome = (
            failures[0]
            if failures
            else SyncReport(
                version, len(transfer.sent), transfer.bytes, seconds, digest(transfer.sent)
            )
        )
        report: SyncReport = _raised(ranks.from_first(outcome))
        self._stale, self._version = None, version
        return report

    def load_adapter(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, Any],
        version: int,
    ) -> SyncReport:
        """Replace the LoRA adapter ``name``, under a new name and number for each version;
        collective.

        Raises:
            EngineError: the adapter is none that vLLM computes exactly (DoRA, trained modules,
                ...), too many are loaded, or the engine holds something else than was sent.
        """
        start = time.perf_counter()
        self._meet()
        self._check_room(name)
        self._last_id += 1
        old = self._adapters.pop(name, None)
        outcome: Any = None
        failures: list[EngineError] = []
        if ranks.rank() == 0:
            with _kept(failures):
                outcome = self._send_adapter(name, tensors, config, version, old)
        outcome = failures[0] if failures else outcome
        adapter, size = _raised(ranks.from_first(outcome))
        self._adapters[name] = adapter
        seconds = time.perf_counter() - start
        return SyncReport(version, len(adapter.sent), size, seconds, digest(adapter.sent))

    def sleep(self) -> None:
        """Nothing: the server's memory is its own."""

    def wake(self) -> None:
        """Nothing; every call starts with an empty prefix cache."""

    def lost(self) -> bool:
        """Whether any rank has found it dead, hanging or out of its mind; collective."""
        return any(ranks.gather(self._dead is not None))

    def restart(self) -> None:
        """Stop the server whole and start another one; see :class:`RolloutEngine`."""
        self._stop()
        self._adapters = {}
        try:
            self._launch()
        except EngineError as error:
            raise EngineFault(str(error)) from None
        self._dead = None
        self._stale = "it was started anew" if self._base_was_sent else None

    def close(self) -> None:
        """End the server and all of its processes."""
        self._dead = self._dead or CLOSED
        self._stop()

    def _stop(self) -> None:
        if self._sender is not None:
            self._sender.close()
            self._sender = None
        if self._process is not None:
            end_group(self._process)
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process = None
        if self._client is not None:
            self._client.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    # --- the server's process ---

    def _launch(self) -> None:
        """Start it on rank 0 and wait until it answers; collective."""
        outcome: Any = None
        if ranks.rank() == 0:
            port, token = self._config.server.port or _free_port(), secrets.token_hex(16)
            try:
                self._start(_flags(self._arguments | {"port": port}), token)
                self._connect(port, token)
                outcome = (port, token, self._wait_until_ready())
            except EngineError as error:
                self.close()
                outcome = error
        port, token, self._vocab_size = _raised(ranks.from_first(outcome))
        if ranks.rank() != 0:
            self._connect(port, token)

    def _start(self, arguments: list[str], token: str) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="fastalign-server-", dir=_memory_place()))
        environment = ONEDNN_CACHE | {
            key: value
            for key, value in os.environ.items()
            # torchrun's, which are the trainer's, and what an engine in this process has set.
            if key not in _TORCHRUN and not key.startswith(("VLLM_", "TORCHELASTIC_"))
        }
        environment |= {
            TOKEN: token,
            FOLDER: str(self._folder),
            # The phases of a weight transfer, and calls to the workers.
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # Sockets, which a process that is killed leaves.
            "VLLM_RPC_BASE_PATH": str(self._folder),
            # A call repeats to the bit on so many threads.
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
        if not self._on_cpu:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(_visible(self._config.server.devices))
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fastalign.rollout.vllm_server", *arguments],
                # The server ends when this pipe does.
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def _connect(self, port: int, token: str) -> None:
        import openai

        self._openai = openai
        self._client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}",
            api_key=token,
            # What failed may be under way still.
            max_retries=0,
            timeout=self._config.timeout_s,
            # A proxy knows nothing of this machine.
            http_client=openai.DefaultHttpxClient(trust_env=False),
        )

    def _wait_until_ready(self) -> int:
        """The size of the model's vocabulary, once the server answers."""
        assert self._process is not None
        deadline = time.monotonic() + self._config.server.start_timeout_s
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise EngineError(f"the vLLM server did not start: {self._last_words()}")
            try:
                reply = self._client.get(MODEL, cast_to=_response_type(), options={"timeout": 5.0})
                return int(reply.json()["vocab_size"])
            except self._openai.APIConnectionError:
                time.sleep(0.2)
            except (self._openai.OpenAIError, ValueError, KeyError, TypeError) as error:
                raise EngineError(
                    f"the vLLM server did not start: another server answers at "
                    f"{self._client.base_url}: {_line(error)}"
                ) from None
        raise EngineError(
            f"the vLLM server did not answer in {self._config.server.start_timeout_s:g} s "
            f"(rollout.server.start_timeout_s): {self._last_words()}"
        )

    def _last_words(self) -> str:
        if self._folder is None:
            return "its log is with rank 0"
        return last_words((self._folder / "log").read_text(encoding="utf-8", errors="replace"))

    # --- requests ---

    def _ask(
        self,
        prompts: Sequence[np.ndarray],
        settings: Mapping[str, Any],
        seeds: Sequence[int | None],
        adapter: str | None,
    ) -> list[dict[str, Any]]:
        call = {
            "prompts": [prompt.tolist() for prompt in prompts],
            "settings": settings,
            "seeds": seeds,
            "adapter": None if adapter is None else self._adapters[adapter].request,
        }
        answers = self._post(CALL, call) if prompts else []
        if not isinstance(answers, list) or len(answers) != len(prompts):
            raise self._failed(f"it answered {len(prompts)} prompts with {_line(answers)}")
        return self._counted(prompts, answers)

    def _post(self, path: str, body: Mapping[str, Any] | None) -> Any:
        """The server's answer as JSON; any failure is the engine's end."""
        self._check_alive()
        try:
            reply = self._client.post(path, cast_to=_response_type(), body=body)
            return reply.json() if reply.content else None
        except self._openai.APITimeoutError:
            raise self._failed(
                f"no answer in {self._config.timeout_s:g} s (rollout.timeout_s)"
            ) from None
        except self._openai.APIConnectionError as error:
            raise self._failed(f"{_line(error)} {self._ended()}") from None
        except self._openai.APIStatusError as error:
            raise self._failed(f"{error.status_code}: {_short(error.response.text)}") from None
        except ValueError as error:
            raise self._failed(f"no JSON: {_line(error)}") from None

    def _ended(self) -> str:
        # The trainer may be closing this engine while a thread still waits for an answer.
        process = self._process
        if process is None:
            return ""
        with contextlib.suppress(subprocess.TimeoutExpired):
            # What broke the connection may be its end, which takes a moment.
            code = process.wait(2.0)
            return f"It ended with exit code {code}: {self._last_words()}"
        return f"Its last words: {self._last_words()}"

    def _failed(self, why: str) -> EngineError:
        self._dead = self._dead or why
        return super()._failed(why)

    def _meet(self) -> None:
        """Wait for all ranks, which may still sample; raise on all of them where one found the
        server dead."""
        self._dead = next((why for why in ranks.gather(self._dead) if why is not None), None)
        self._check_alive()

    # --- weights ---

    def _ask_worker(self, method: str, argument: Mapping[str, Any] | str) -> list[Any]:
        """The answer of each worker."""
        text = argument if isinstance(argument, str) else json.dumps(argument)
        answers = self._post("/collective_rpc", {"method": method, "args": [text]})["results"]
        assert isinstance(answers, list)
        return answers

    def _begin_transfer(self) -> None:
        if self._sender is None:
            self._sender = self._make_sender()
        self._post("/start_weight_update", None)

    def _make_sender(self) -> _Sender:
        if self._on_cpu:
            assert self._folder is not None
            self._post("/init_weight_transfer_engine", {"init_info": {}})
            return _FileSender(self._folder / "bucket.safetensors", self._post)
        try:
            with process_state_kept():
                from fastalign.rollout.vllm_nccl import NcclSender
        except ImportError as error:
            why = f"the nccl weight transfer of this vLLM is not the one known here: {error}"
            raise self._failed(f"{why}: install a newer one") from error
        workers, limit = len(self._config.server.devices), self._config.timeout_s
        with self._transfer_errors():
            return NcclSender(self._post, _free_port(), workers, limit)

    def _send(self, bucket: Sequence[tuple[str, torch.Tensor]]) -> None:
        assert self._sender is not None
        with self._transfer_errors():
            self._sender.send(bucket)

    @contextlib.contextmanager
    def _transfer_errors(self) -> Iterator[None]:
        """Whatever stops a transport (a full disk, nccl, a time limit) is the engine's end.  A
        broadcast that the workers take no part in is stuck in nccl, in this process."""
        try:
            with self._watchdog.watching():
                yield
        except EngineError:
            raise
        except Exception as error:
            why = f"weight transfer: {type(error).__name__}: {_line(error)}"
            raise self._failed(why) from error

    def _buckets(
        self,
        tensors: Iterable[tuple[str, torch.Tensor]],
        transfer: Transfer,
        shapes: dict[str, list[int]],
        version: int,
    ) -> Iterable[list[tuple[str, torch.Tensor]]]:
        """Copies in the engine's dtype, so many at a time; rank 0 takes down what they are."""
        bucket: list[tuple[str, torch.Tensor]] = []
        size = 0
        for name, tensor in tensors:
            if ranks.rank() != 0:
                continue
            # The sender of the stream may reuse its buffer for the next one.
            tensor = tensor.detach().to(device=self._device, dtype=self._dtype, copy=True)
            tensor = tensor.contiguous()
            transfer.record(name, tensor, version)
            shapes[name] = list(tensor.shape)
            bucket.append((name, tensor))
            size += tensor.numel() * tensor.element_size()
            if size >= _BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket

    def _read_back(
        self,
        transfer: Transfer,
        shapes: Mapping[str, list[int]],
        names: frozenset[str],
        version: int,
    ) -> None:
        asked = {"shapes": shapes, "columns_sent": transfer.columns_sent, "version": version}
        for held in self._ask_worker("fastalign_read_back", asked):
            transfer.held = _fingerprints(held["held"])
            transfer.columns_held = _fingerprints(held["columns_held"])
            transfer.unread, transfer.unsent = held["unread"], held["unsent"]
            check_transfer(transfer, names)

    def _send_adapter(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, Any],
        version: int,
        old: _Adapter | None,
    ) -> tuple[_Adapter, int]:
        """Load it under the next number in place of the old one; returns its bytes as well."""
        folded = fold(name, tensors, config, self._dtype)
        assert self._folder is not None
        folder = self._folder / f"adapter-{self._last_id}"
        with self._transfer_errors():
            write_adapter(folder, folded)
        if old is not None:
            self._ask_worker("fastalign_drop_adapter", str(old.request["lora_int_id"]))
            shutil.rmtree(old.request["lora_path"])
        request = {
            "lora_name": f"{name}-{self._last_id}",
            "lora_int_id": self._last_id,
            "lora_path": str(folder),
        }
        adapter = _Adapter(
            version,
            request,
            {key: list(tensor.shape) for key, tensor in folded.items()},
            {key: fingerprint(tensor) for key, tensor in folded.items()},
        )
        try:
            self._add_adapter(adapter)
        except EngineError:
            if self._dead is None:
                # It would take the place of a good one.
                self._ask_worker("fastalign_drop_adapter", str(self._last_id))
            raise
        return adapter, sum(tensor.numel() * tensor.element_size() for tensor in folded.values())

    def _add_adapter(self, adapter: _Adapter) -> None:
        asked = {**adapter.request, "shapes": adapter.shapes}
        for held in self._ask_worker("fastalign_add_adapter", asked):
            found = _fingerprints(held)
            if len(self._config.server.devices) > 1:
                # Of what is cut over the workers each holds a part.
                found = {key: adapter.sent[key] for key in found}
            verify(adapter.sent, found, frozenset(adapter.sent))


class _FileSender:
    """A bucket at a time through a file that the worker reads."""

    def __init__(self, path: Path, post: Any) -> None:
        self._path, self._post = path, post

    def send(self, bucket: Sequence[tuple[str, torch.Tensor]]) -> None:
        save_file(dict(bucket), self._path)
        self._post("/update_weights", {"update_info": {"path": str(self._path)}})
        self._path.unlink()

    def close(self) -> None:
        pass


_TORCHRUN = frozenset(
    f"{prefix}{name}"
    for prefix in ("", "LOCAL_", "GROUP_", "ROLE_")
    for name in ("RANK", "WORLD_SIZE")
) | {"ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"}


def server_arguments(model: ServedModel, config: RolloutConfig, on_cpu: bool) -> dict[str, Any]:
    """The server's options; True and False switch one."""
    arguments = engine_arguments(model, config, on_cpu)
    # Of an engine inside the trainer's process.
    arguments = {k: v for k, v in arguments.items() if k not in _COLOCATED}
    # Imported by the worker before it makes its transport.
    arguments |= {
        "host": "127.0.0.1",
        "worker_extension_cls": "fastalign.rollout.vllm_transfer.ServerExtension",
        "middleware": "fastalign.rollout.vllm_server.routes",
        "disable_uvicorn_access_log": True,
        "tensor_parallel_size": max(1, len(config.server.devices)),
    }
    arguments["weight_transfer_config"] = json.dumps({"backend": FILES if on_cpu else "nccl"})
    return arguments


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a group, and whatever is left of the group."""
    shared = shared_memory(process.pid)
    process.terminate()
    with contextlib.suppress(ProcessLookupError):
        # One that was stopped hears nothing else.
        os.killpg(process.pid, signal.SIGCONT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    # A group outlives its leader, whose children may be there still.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for path in shared:
        path.unlink(missing_ok=True)


def shared_memory(group: int) -> set[Path]:
    """What the processes of a group share by name, as Python makes it: who is killed leaves it."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getpgid(int(process.name)) == group:
                places = re.findall(r"/dev/shm/psm_\w+", (process / "maps").read_text())
                found |= {Path(place) for place in places}
    return found


_COLOCATED = ("use_tqdm_on_load", "enable_sleep_mode")


def _check_place(config: RolloutConfig, device: torch.device) -> None:
    """Raises ConfigError unless all ranks are on this machine, and the server's GPUs are there and
    no rank's."""
    devices, world = config.server.devices, os.environ.get("WORLD_SIZE", "1")
    if os.environ.get("LOCAL_WORLD_SIZE", world) != world:
        raise ConfigError(
            "rollout.engine is 'server', which serves the ranks of one machine: take 'vllm' on "
            "several nodes"
        )
    if device.type == "cpu":
        if devices:
            raise ConfigError(f"rollout.server.devices is {list(devices)}: there is no GPU here")
        return
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    count = torch.cuda.device_count()
    if not devices or min(devices) < ranks or max(devices) >= count:
        raise ConfigError(
            f"rollout.server.devices is {list(devices)}: name GPUs from {ranks} to {count - 1}, "
            f"for the {ranks} process(es) of the trainer take those before (nproc_per_node)"
        )


def _visible(devices: Sequence[int]) -> list[str]:
    """Names of these GPUs for another process, counted as this one counts them."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return [names[i] if names != [""] else str(i) for i in devices]


def _flags(arguments: Mapping[str, Any]) -> list[str]:
    flags = []
    for name, value in arguments.items():
        name = name.replace("_", "-")
        if value is True:
            flags.append(f"--{name}")
        elif value is False:
            flags.append(f"--no-{name}")
        else:
            flags.append(f"--{name}={value}")
    return flags


def _fingerprints(rows: Mapping[str, Sequence[int]]) -> dict[str, Fingerprint]:
    return {name: (first, second) for name, (first, second) in rows.items()}


def last_words(log: str) -> str:
    """What a server's log says of its end, in a line: its last error, that of a worker before what
    followed from it, or whatever came last."""
    lines = [line for line in log.splitlines() if line.strip()]
    errors = [i for i, line in enumerate(lines) if _ERROR.search(line)]
    inner = [i for i in errors if _WORKER.match(lines[i])]
    if not errors:
        return _short(lines[-1]) if lines else "it said nothing"
    first = (inner or errors)[-1]
    found = _ERROR.search(lines[first])
    assert found is not None
    # The message may go on in the next lines.
    return _short(" ".join([found[0], *([] if inner else lines[first + 1 :])]))


def _memory_place() -> str | None:
    """A folder in memory with room for what passes through it; None: the usual one for such."""
    place = "/dev/shm"
    if os.access(place, os.W_OK) and shutil.disk_usage(place).free > 2 * _BUCKET_BYTES:
        return place
    return None


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _response_type() -> Any:
    """What the client gives an answer back as when it is none of its own kinds."""
    import httpx

    return httpx.Response


def _line(value: Any) -> str:
    return _short(str(value))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:300] + "..."


@contextlib.contextmanager
def _kept(failures: list[EngineError]) -> Iterator[None]:
    """Keep an error until the other ranks, which take part in what follows, can be told."""
    try:
        yield
    except EngineError as error:
        failures.append(error)


def _raised(outcome: Any) -> Any:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
