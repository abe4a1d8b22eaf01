"""The trainer's end of vLLM's nccl weight transfer: from GPU to GPU, bucket by bucket."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from vllm.distributed.weight_transfer.nccl_common import trainer_init
from vllm.distributed.weight_transfer.packed_tensor import (
    DEFAULT_PACKED_BUFFER_SIZE_BYTES,
    DEFAULT_PACKED_NUM_BUFFERS,
    packed_nccl_broadcast_producer,
)


def init_info(port: int, workers: int) -> dict[str, Any]:
    """What the workers are told of the group: where it meets, and how tensors are packed."""
    return {
        "master_address": "127.0.0.1",
        "master_port": port,
        "rank_offset": 1,
        "world_size": 1 + workers,
        "packed": True,
        "packed_buffer_size_bytes": DEFAULT_PACKED_BUFFER_SIZE_BYTES,
        "packed_num_buffers": DEFAULT_PACKED_NUM_BUFFERS,
    }


def update_info(bucket: Sequence[tuple[str, torch.Tensor]]) -> dict[str, Any]:
    """What the workers are told of a bucket."""
    return {
        "names": [name for name, _ in bucket],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
    }


class NcclSender:
    """Rank 0 of a group of its own, whose other ranks are the server's workers."""

    def __init__(
        self,
        post: Callable[[str, Mapping[str, Any]], Any],
        port: int,
        workers: int,
        timeout_s: float,
    ) -> None:
        """Meet the workers: both ends wait for each other, so the server is asked beside.

        Args:
            post: asks the server: (path, JSON body) -> answer.
            port: a free one of this machine, where the ends meet.
            workers: GPUs of the server.
            timeout_s: of the server's answer to one bucket.
        """
        self._post, self._timeout_s = post, timeout_s
        self._pool = ThreadPoolExecutor(1)
        meeting = init_info(port, workers)
        asked = self._pool.submit(post, "/init_weight_transfer_engine", {"init_info": meeting})
        self._group = trainer_init(meeting)
        asked.result(timeout_s)

    def send(self, bucket: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Broadcast contiguous tensors on this rank's GPU, while the server takes them in."""
        update = {"update_info": update_info(bucket)}
        asked = self._pool.submit(self._post, "/update_weights", update)
        if asked.done():
            # A server that refuses at once does not take part in the broadcast.
            asked.result()
        # It packs on streams of its own.
        torch.cuda.current_stream().synchronize()
        packed_nccl_broadcast_producer(
            iterator=iter(bucket),
            group=self._group,
            src=0,
            post_iter_func=lambda item: item[1],
            buffer_size_bytes=DEFAULT_PACKED_BUFFER_SIZE_BYTES,
            num_buffers=DEFAULT_PACKED_NUM_BUFFERS,
        )
        asked.result(self._timeout_s)

    def close(self) -> None:
        """Leave the group; a request under way ends with the server."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._group.destroy()
