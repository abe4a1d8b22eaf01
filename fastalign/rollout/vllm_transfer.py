"""What runs inside the worker of a vLLM server: weights in, and what it then holds read back.

vLLM's server passes a worker text alone, and gives text and JSON back.  Full weights come in vLLM's
own phases (init, start, update, finish): over nccl where trainer and server have GPUs, and where
they have none through files in memory, by the transport registered here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.lora.request import LoRARequest

from fastalign.rollout.server import FILES
from fastalign.rollout.vllm_worker import Transfer, WorkerExtension, read_back


@dataclass
class FilesInit(WeightTransferInitInfo):
    """Nothing has to be agreed on before."""


@dataclass
class FilesUpdate(WeightTransferUpdateInfo):
    """One bucket of tensors: a safetensors file that stays until the update is over."""

    path: str


class FileTransferEngine(WeightTransferEngine[FilesInit, FilesUpdate]):
    """Takes tensors from files on this machine, in memory where the sender puts them there."""

    init_info_cls = FilesInit
    update_info_cls = FilesUpdate

    def init_transfer_engine(self, init_info: FilesInit) -> None:
        pass

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # vLLM's own waits for an accelerator, where there is none.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: FilesUpdate) -> None:
        self.model.load_weights(load_file(update_info.path).items())

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


WeightTransferEngineFactory.register_engine(FILES, FileTransferEngine)


class ServerExtension(WorkerExtension):
    """The calls of :class:`WorkerExtension` with JSON in place of objects."""

    # The worker's part, as used here.
    remove_lora: Callable[[int], bool]

    def fastalign_read_back(self, request: str) -> dict[str, Any]:
        """What the model holds of tensors that came in an update.

        Args:
            request: ``shapes`` of the tensors by name, ``columns_sent`` and ``version`` of the
                transfer.

        Returns:
            ``held``, ``columns_held``, ``unread`` and ``unsent`` of a :class:`Transfer`.
        """
        asked = json.loads(request)
        transfer = Transfer(columns_sent={n: (a, b) for n, (a, b) in asked["columns_sent"].items()})
        shapes = {name: torch.Size(shape) for name, shape in asked["shapes"].items()}
        with torch.no_grad():
            read_back(self.get_model(), transfer, shapes, self.model_config.dtype, asked["version"])
        return {
            "held": transfer.held,
            "columns_held": transfer.columns_held,
            "unread": transfer.unread,
            "unsent": transfer.unsent,
        }

    def fastalign_add_adapter(self, request: str) -> dict[str, Any]:
        """Load the adapter of vLLM's ``lora_name``, ``lora_int_id`` and ``lora_path``; returns the
        checksum of each tensor of ``shapes`` as :meth:`fastalign_load_adapter` does."""
        asked = json.loads(request)
        shapes = {name: torch.Size(shape) for name, shape in asked["shapes"].items()}
        adapter = LoRARequest(asked["lora_name"], asked["lora_int_id"], asked["lora_path"])
        return dict(self.fastalign_load_adapter(adapter, shapes))

    def fastalign_drop_adapter(self, number: str) -> None:
        """Give the adapter's place back."""
        self.remove_lora(int(number))
