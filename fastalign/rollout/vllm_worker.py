"""What runs inside vLLM's worker: receive weights and adapters, and read back what it then holds.

vLLM builds its worker from this class by name (``worker_extension_cls``), and the engine calls the
methods by name through ``collective_rpc``.  Arguments and results stay in the process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from fastalign.rollout.sync import Fingerprint, fingerprint

# Input columns of each repacked matrix that one transfer reads back.
_PROBED = 16


@dataclass
class Transfer:
    """Checksums of one transfer of base weights.

    Attributes:
        sent: of each tensor as the trainer handed it over, in the engine's dtype.
        received: of the same content read back from the engine, where it can be read.
        unread: names whose content cannot be read back: they arrived at vLLM's loader, and only
            the canary says that the engine computes with them.
        unsent: parameters of the engine that nothing was sent for.
        bytes: sent.
        error: what stopped the loader, if anything did.
    """

    sent: dict[str, Fingerprint] = field(default_factory=dict)
    received: dict[str, Fingerprint] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    unsent: list[str] = field(default_factory=list)
    bytes: int = 0
    error: str | None = None


class WorkerExtension:
    """Mixed into vLLM's worker; ``fastalign_`` keeps the names apart from vLLM's own."""

    def fastalign_load_weights(
        self, tensors: Iterable[tuple[str, torch.Tensor]], names: frozenset[str], probe_seed: int
    ) -> Transfer:
        """Reload the model from ``tensors``, which is consumed to its end whatever happens.

        Names outside ``names`` are recorded but kept from vLLM, whose loader would stop at them.
        """
        transfer = Transfer()
        columns: dict[str, Fingerprint] = {}
        stream = iter(tensors)
        dtype = self.model_config.dtype

        def received() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in stream:
                # vLLM keeps what it is given until a whole layer has come, while the sender may
                # reuse or free its buffer when it is asked for the next one: hand over a copy.
                tensor = tensor.detach().to(device=self.device, dtype=dtype, copy=True)
                transfer.sent[name] = fingerprint(tensor)
                transfer.bytes += tensor.numel() * tensor.element_size()
                if tensor.ndim == 2:
                    picked = _columns(tensor.shape[1], probe_seed, tensor.device)
                    columns[name] = fingerprint(tensor[:, picked] + 0)
                if name in names:
                    yield name, tensor

        try:
            self.reload_weights(weights_iterator=received())
        except Exception as error:
            last = next(reversed(transfer.sent), "the first tensor")
            transfer.error = f"vLLM's loader stopped at {last}: {type(error).__name__}: {error}"
            for _ in received():
                pass
            return transfer
        with torch.no_grad():
            self._fastalign_read_back(transfer, columns, probe_seed)
        return transfer
