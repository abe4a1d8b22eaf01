"""vLLM's own OpenAI-compatible server as the trainer starts it: its command line, and beside its
routes one that takes a whole call of an engine.

``python -m fastalign.rollout.vllm_server --model MODEL ...`` is ``vllm serve MODEL ...`` in a
process that ends with the one that started it, the server's own children included.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from fastalign.rollout.server import CALL, FOLDER, GRACE_S, MODEL, TOKEN, shared_memory
from fastalign.rollout.vllm import plain_answer

T = TypeVar("T")

# How often to look whether the engine lives, and how long to wait for what it leaves.
_PATIENCE_S = 2.0

_one_call = asyncio.Lock()
_numbers = itertools.count()


async def routes(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """vLLM's ``--middleware``: nobody but the trainer is answered, and our routes are ours."""
    bearer = f"Bearer {os.environ[TOKEN]}"
    if not hmac.compare_digest(request.headers.get("authorization", ""), bearer):
        return JSONResponse({"error": "this server belongs to a training run"}, 401)
    engine = request.app.state.engine_client
    if request.url.path == MODEL:
        return JSONResponse({"vocab_size": engine.model_config.get_vocab_size()})
    try:
        if request.url.path != CALL:
            return await while_alive(engine, call_next(request))
        # Plain numbers, infinities among them.
        return Response(json.dumps(await while_alive(engine, _call(engine, await request.json()))))
    except Exception as error:
        return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 500)


async def while_alive(engine: Any, work: Awaitable[T]) -> T:
    """What ``work`` comes to, unless the engine dies first.

    What vLLM is asked for while its engine dies, such as a pause, may never be answered.
    """
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            dead = engine.errored
            # vLLM's own error says more, where there is one.
            await asyncio.wait([task], timeout=_PATIENCE_S)
            if dead and not task.done():
                raise engine.dead_error
        return task.result()
    finally:
        # Nor does it outlive who asked; what it does then may wait for the engine, and we do not.
        task.cancel()


async def _call(engine: Any, call: dict[str, Any]) -> list[dict[str, Any]]:
    """Answer all prompts of one call of an engine.

    Calls follow each other, and each starts with an empty prefix cache and all of its prompts
    queued in their order.  So what is answered depends on the call and the weights alone, to the
    bit, and not on when requests arrive or what else the server was asked.
    """
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind

    settings = {**call["settings"], "output_kind": RequestOutputKind.FINAL_ONLY}
    lora = None if call["adapter"] is None else LoRARequest(**call["adapter"])
    async with _one_call:
        if not await engine.reset_prefix_cache():
            raise RuntimeError("the prefix cache was not reset")
        await engine.pause_generation(mode="keep", clear_cache=False)
        try:
            queues = [
                await engine.add_request(
                    f"fastalign-{next(_numbers)}",
                    tokens_input(prompt),
                    SamplingParams(**settings, seed=seed),
                    lora_request=lora,
                )
                for prompt, seed in zip(call["prompts"], call["seeds"], strict=True)
            ]
        finally:
            await engine.resume_generation()
        return [plain_answer(await queue.get()) for queue in queues]


def _guard() -> None:
    """Leave a process behind that ends this one and its children when the trainer closes its end of
    our standard input, which it does whatever it dies of."""
    server = os.getpid()
    if os.fork():
        return
    while os.read(sys.stdin.fileno(), 1):
        pass
    shared = shared_memory(os.getpgrp())
    if os.getppid() == server:
        # Asked to, vLLM leaves no shared memory behind.
        os.kill(server, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while os.getppid() == server and time.monotonic() < deadline:
        time.sleep(0.1)
    shutil.rmtree(os.environ[FOLDER], ignore_errors=True)
    for path in shared:
        path.unlink(missing_ok=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main() -> None:
    """Run vLLM's server with the options of the command line."""
    _guard()
    # What ``vllm serve`` runs; that command wants vLLM installed under just this name.
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    serve()


if __name__ == "__main__":
    main()
